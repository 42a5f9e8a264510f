/**
 * Prints `N passed, N failed` from the JUnit report of `deno test`, a test that
 * only groups others not counted; run by .ci/run.
 */

const [path, code] = Deno.args;
if (path === undefined || code === undefined) {
  throw new TypeError("Expected the report's path and the tests' exit code");
}
const report = await Deno.readTextFile(path);

/** One test case: its name and its outcome. */
interface Case {
  name: string;
  outcome: "passed" | "failed" | "skipped";
}

const cases: Case[] = [
  ...report.matchAll(
    /<testcase name="([^"]*)"[^>]*?(?:\/>|>(.*?)<\/testcase>)/gs,
  ),
].map(([, name = "", body = ""]) => ({
  name,
  outcome: /<(failure|error)\b/.test(body)
    ? "failed"
    : body.includes("<skipped")
    ? "skipped"
    : "passed",
}));

/** What a group's tests have before their own names, with the group's name. */
const groups = new Map<string, { failed: boolean }>();
for (const { name, outcome } of cases) {
  const parts = name.split(" &gt; ");
  for (let depth = 1; depth < parts.length; depth++) {
    const group = parts.slice(0, depth).join(" &gt; ");
    const failed = outcome === "failed" || !!groups.get(group)?.failed;
    groups.set(group, { failed });
  }
}

let passed = 0;
let failed = 0;
for (const { name, outcome } of cases) {
  const group = groups.get(name);
  // A group whose tests all passed can still fail, in what runs around them.
  if (outcome === "failed" && !group?.failed) failed++;
  if (outcome === "passed" && group === undefined) passed++;
}

if (passed + failed === 0) throw new Error(`${path} reports no test`);
if (code !== "0" && failed === 0) {
  throw new Error(
    `The tests ended with code ${code}, and none is reported as failed`,
  );
}
console.log(`${passed} passed, ${failed} failed`);
