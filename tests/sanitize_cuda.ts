/**
 * Runs compute-sanitizer's four tools over a few tiny cases on a machine with a
 * GPU, each tool first over a bug planted for it (planted.cu), which it must
 * report: a tool that finds nothing there proves nothing here.
 *
 *   deno run -A tests/sanitize_cuda.ts --planted build/planted
 *     [--sanitizer PATH] [--tools memcheck,racecheck] [--out build/sanitize_cuda]
 *
 * Writes a log for each run and summary.json into `--out`; exits with 1 when a
 * planted bug is missed or anything of ours is reported, with 2 when there is
 * no compute-sanitizer. It comes with CUDA, or with
 * `pip install nvidia-cuda-sanitizer-api`.
 */

import { parseArgs } from "@std/cli/parse-args";

const tools = ["memcheck", "racecheck", "initcheck", "synccheck"] as const;
type Tool = typeof tools[number];

const args = parseArgs(Deno.args, {
  string: ["planted", "sanitizer", "tools", "out"],
  default: {
    planted: "build/planted",
    sanitizer: "compute-sanitizer",
    tools: tools.join(","),
    out: "build/sanitize_cuda",
  },
}) as unknown as Record<"planted" | "sanitizer" | "tools" | "out", string>;

const options: Record<Tool, string[]> = {
  // Without padding what lies behind an allocation may be another one.
  memcheck: ["--leak-check", "full", "--padding", "512"],
  racecheck: ["--racecheck-report", "all"],
  initcheck: [],
  synccheck: [],
};

/** What a run of a tool reported. */
interface Report {
  /** Errors, hazards and leaks; null when the tool gave no summary. */
  reports: number | null;
  /** The program's exit code, or the tool's. */
  code: number;
  /** How long it took. */
  seconds: number;
  /** The last lines of what was printed, where something went wrong. */
  text?: string;
}

/** A program's output; null when there is no such program. */
async function output(
  program: string,
  words: string[],
): Promise<{ code: number; text: string } | null> {
  try {
    const { code, stdout, stderr } = await new Deno.Command(program, {
      args: words,
    }).output();
    const decoder = new TextDecoder();
    return { code, text: decoder.decode(stdout) + decoder.decode(stderr) };
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return null;
    throw error;
  }
}

async function run(
  tool: Tool,
  name: string,
  program: string,
  words: string[],
): Promise<Report> {
  const log = `${args.out}/${tool}.${name}.log`;
  const start = performance.now();
  const found = (await output(args.sanitizer, [
    "--tool",
    tool,
    ...options[tool],
    "--print-limit",
    "50",
    "--log-file",
    log,
    program,
    ...words,
  ]))!;
  const seconds = (performance.now() - start) / 1000;
  let text = "";
  try {
    text = await Deno.readTextFile(log);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
  const reports = reportsIn(text);
  await Deno.writeTextFile(log, `\n---- the program ----\n${found.text}`, {
    append: true,
  });
  return {
    reports,
    code: found.code,
    seconds: Math.round(seconds * 10) / 10,
    ...reports === 0 && found.code === 0
      ? {}
      : { text: `${text}\n${found.text}`.slice(-2000) },
  };
}

/** The sum of what a log's summaries count. */
function reportsIn(log: string): number | null {
  const counts = [
    ...log.matchAll(
      /ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard|LEAK SUMMARY: \d+ bytes leaked in (\d+) alloc/g,
    ),
  ].map(([, ...groups]) => Number(groups.find((group) => group !== undefined)));
  return counts.length === 0 ? null : counts.reduce((a, b) => a + b);
}

const version = await output(args.sanitizer, ["--version"]);
if (version === null) {
  console.error(
    `No ${args.sanitizer} here: it comes with CUDA and with pip's nvidia-cuda-sanitizer-api; name it with --sanitizer`,
  );
  Deno.exit(2);
}
await Deno.mkdir(args.out, { recursive: true });
const gpu = await output("nvidia-smi", [
  "--query-gpu=name,driver_version",
  "--format=csv,noheader",
]);
const [device, driver] = (gpu?.text ?? "unknown, unknown").trim().split(", ");
const root = decodeURIComponent(new URL("../", import.meta.url).pathname);
const results: Record<string, { planted: Report; ours: Report | null }> = {};
let ok = true;
for (const tool of args.tools.split(",") as Tool[]) {
  if (!tools.includes(tool)) throw new RangeError(`No tool "${tool}"`);
  const planted = await run(tool, "planted", args.planted, [tool]);
  const caught = (planted.reports ?? 0) > 0;
  const ours = caught
    ? await run(tool, "ours", Deno.execPath(), [
      "run",
      "-A",
      "--no-prompt",
      "--no-check",
      `${root}tests/cuda_check.ts`,
      "--small",
    ])
    : null;
  results[tool] = { planted, ours };
  const good = ours !== null && ours.reports === 0 && ours.code === 0;
  ok &&= good;
  console.log(
    `${good ? "ok  " : "FAIL"} ${tool}: ${
      planted.reports ?? "no"
    } reports of the planted bug, ${ours?.reports ?? "no"} of ours`,
  );
  if (!good) console.log(ours?.text ?? planted.text ?? "");
}
const summary = {
  ok,
  date: new Date().toISOString(),
  device,
  driver,
  sanitizer: version.text.trim().split("\n").at(-1),
  tools: results,
};
await Deno.writeTextFile(
  `${args.out}/summary.json`,
  JSON.stringify(summary, null, 2) + "\n",
);
Deno.exit(ok ? 0 : 1);
