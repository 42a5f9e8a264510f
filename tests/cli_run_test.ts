/** `generate` and `perplexity` as processes: results, pipes, terminals, Ctrl-C. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertMatch,
  assertStringIncludes,
} from "@std/assert";
import { afterAll, beforeAll, describe, it } from "@std/testing/bdd";
import {
  denoArguments,
  execute,
  ok,
  type Outcome,
  ROOT,
  type Setting,
  wkv,
} from "./cli_process.ts";
import * as onDevice from "./device.ts";
import { testModel } from "./model.ts";

const PROMPT = "Once upon a time";
/** What every run is told. */
let here: string[] = [];
let temporary = "";

beforeAll(async () => {
  here = ["--model", await testModel(), "--device", "cpu"];
  temporary = await Deno.makeTempDir({ prefix: "wkv_cli_" });
});
afterAll(async () => {
  await Deno.remove(temporary, { recursive: true });
});

interface Json {
  model: string;
  device: string;
  text: string;
  tokens: number[];
  promptTokens: number;
  finishReason: string;
  timings: Record<string, number | null>;
  // deno-lint-ignore no-explicit-any -- compared field by field
  cache: Record<string, any>;
}

async function generateJson(args: string[], setting?: Setting): Promise<Json> {
  const { stdout, stderr } = await ok(
    ["generate", "--json", ...here, ...args],
    setting,
  );
  assertEquals(stdout.split("\n").length, 2, stdout);
  assertEquals(stderr, "");
  return JSON.parse(stdout);
}

describe("wkv generate", () => {
  it("says what each layer keeps where they differ", async () => {
    const args = [PROMPT, "--max-tokens", "40", "--budget", "200"];
    const uneven = ["--layer-budgets", "inverse", "--recent", "2"];
    const plain = await ok(["generate", ...here, ...args, ...uneven]);
    assertMatch(plain.stderr, /; 10 to 43 of 43 tokens kept a layer\n$/);
    const { cache } = await generateJson([...args, ...uneven]);
    assertEquals(
      cache.layerKept,
      cache.layerSlots.map((n: number) => Math.min(43, n)),
    );
    assertEquals([cache.headSlots, cache.headKept], [null, null]);
    const heads = ["--layer-budgets", Array(30).fill("300/30/270").join()];
    const byHead = await ok(["generate", ...here, ...args, ...heads]);
    assertMatch(byHead.stderr, /; 30 to 43 of 43 tokens kept a KV head\n$/);
    const { cache: own } = await generateJson([...args, ...heads]);
    assertEquals(own.headSlots, Array(30).fill([300, 30, 270]));
    assertEquals(own.headKept, Array(30).fill([43, 30, 43]));
  });

  it("says what has no meaning for full, and leaves it aside", async () => {
    const args = ["generate", ...here, PROMPT, "--max-tokens", "3"];
    const aside = ["--sinks", "2", "--recent", "300"];
    const full = ["--policy", "full"];
    const { stdout } = await ok([...args, ...full]);
    const said = await ok([...args, ...full, ...aside]);
    assertEquals(said.stdout, stdout);
    assertMatch(
      said.stderr,
      /^full keeps every token: --sinks, --recent left aside\n3 tokens/,
    );
    const quiet = await ok([...args, ...full, ...aside, "--quiet"]);
    assertEquals([quiet.stdout, quiet.stderr], [stdout, ""]);
  });

  it("prints text, and a line on speed and memory", async () => {
    const args = [PROMPT, "--max-tokens", "40", "--budget", "16"];
    const plain = await ok(["generate", ...here, ...args]);
    assertMatch(
      plain.stderr,
      /^40 tokens at \d+\.\d tokens\/s; first after \d.*; cache 385 KiB \(in full 968 KiB\); 27 merged, 0 evicted\n$/,
    );
    const json = await generateJson(args);
    assertEquals(json.text, plain.stdout);
    assertEquals(Object.keys(json), [
      "model",
      "device",
      "text",
      "tokens",
      "promptTokens",
      "finishReason",
      "timings",
      "cache",
    ]);
    assertEquals(json.model, here[1]);
    assertMatch(json.device, /CPU/);
    assertEquals([json.tokens.length, json.promptTokens], [40, 4]);
    assertEquals(json.finishReason, "length");
    assertEquals(Object.keys(json.timings), [
      "loadMs",
      "prefillMs",
      "firstTokenMs",
      "decodeTokensPerSecond",
    ]);
    for (const value of Object.values(json.timings)) assertGreater(value!, 0);
    const { bytes, fullBytes, ...cache } = json.cache;
    assertEquals(cache, {
      policy: "weighted-kv",
      budget: 16,
      sinks: 4,
      recent: 4,
      interval: 1,
      layerSlots: null,
      headSlots: null,
      kvHeads: 3,
      positions: "cache",
      prefill: "exact",
      activations: "int8",
      cacheType: "f16",
      seen: 43,
      kept: 16,
      merged: 27,
      evicted: 0,
      layerKept: null,
      headKept: null,
    });
    assertEquals(fullBytes, 43 * 23040);
    assertLess(bytes, fullBytes);
  });

  it("lets later flags win, and passes every option on", async () => {
    const { cache, tokens, finishReason } = await generateJson([
      "--max-tokens=300",
      "--policy=full",
      PROMPT,
      "--max-tokens",
      "5",
      ...["--policy", "streaming-llm", "--budget", "12", "--sinks", "2"],
      ...["--recent", "3", "--positions", "text", "--cache-type", "f32"],
      ...["--activations", "f32", "--prefill", "chunk:4", "--threads", "1"],
      ...["--temperature", "0.8", "--min-p", "0.05", "--seed", "1"],
      ...["--stop", "zzzz", "--stop", "yyyy", "--ignore-eos", "--offline"],
    ]);
    assertEquals([tokens.length, finishReason], [5, "length"]);
    assertEquals(
      [cache.policy, cache.budget, cache.sinks, cache.recent],
      ["streaming-llm", 12, 2, 3],
    );
    assertEquals(
      [cache.positions, cache.cacheType, cache.activations, cache.prefill],
      ["text", "f32", "f32", "chunk:4"],
    );
  });

  it("takes a prompt that is longer than the budget", async () => {
    const prompt = "The cat sat on the mat and looked at the dog. ".repeat(5);
    const { cache, promptTokens } = await generateJson(
      ["-", "--budget", "12", "--max-tokens", "2"],
      { stdin: prompt },
    );
    assertGreater(promptTokens, 40);
    assertEquals(cache.kept, 12);
    assertEquals(cache.merged, promptTokens + 1 - 12);
  });

  it("joins a pipe and an argument, and reads files", async () => {
    const file = `${temporary}/prompt.txt`;
    await Deno.writeTextFile(file, PROMPT);
    const args = ["--max-tokens", "4"];
    const [whole, piped, joined, read] = [
      await generateJson([`Tell me.\n${PROMPT}`, ...args]),
      await generateJson(args, { stdin: `Tell me.\n${PROMPT}` }),
      await generateJson([PROMPT, ...args], { stdin: "Tell me." }),
      await generateJson([PROMPT, "-f", file, ...args], { stdin: "unread" }),
    ];
    assertEquals(piped.tokens, whole.tokens);
    assertEquals(joined.tokens, whole.tokens);
    assertEquals(read.promptTokens, 9);
  });

  it("stops before a stop string, which it does not print", async () => {
    const { stdout, stderr } = await ok([
      ...["generate", ...here, PROMPT, "--stop", "Nova", "--quiet"],
    ]);
    assertEquals(stderr, "");
    assertGreater(stdout.length, 5);
    assert(!stdout.includes("Nova"));
  });

  it("refuses a prompt longer than the context with full", async () => {
    const { code, stderr, ms } = await wkv(
      ["generate", ...here, "--policy", "full"],
      { stdin: "word ".repeat(9000) },
    );
    assertEquals(code, 2, stderr);
    assertMatch(stderr, /^wkv: The prompt's 900\d tokens do not fit the 8192/);
    assertLess(ms, 10_000);
  });

  it("says what a folder without a tokenizer lacks", async () => {
    const folder = `${ROOT}/tests/golden/models/llama`;
    const { code, stderr } = await wkv(
      ["generate", "-m", folder, "--device", "cpu", PROMPT],
    );
    assertEquals(code, 2, stderr);
    assertMatch(stderr, /^wkv: .*no tokenizer.json, which text needs: put /);
  });

  it("ends silently when nobody reads on", async () => {
    const child = new Deno.Command(Deno.execPath(), {
      args: denoArguments(
        ["generate", ...here, PROMPT, "--ignore-eos"],
      ),
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    const reader = child.stdout.getReader();
    await reader.read();
    await reader.cancel();
    const [{ code }, stderr] = await Promise.all([
      child.status,
      new Response(child.stderr).text(),
    ]);
    assertEquals([code, stderr], [0, ""]);
  });

  it("works with standard input closed", async () => {
    const { code, stderr } = await execute("sh", [
      "-c",
      'exec "$@" <&-',
      "sh",
      Deno.execPath(),
      ...denoArguments(["generate", ...here, "x", "--max-tokens=2"]),
    ]);
    assertEquals(code, 0, stderr);
  });
});

onDevice.describe("Ctrl-C", () => {
  onDevice.it("once prints what there is, and ends with 130", async () => {
    const child = new Deno.Command(Deno.execPath(), {
      args: denoArguments(
        ["generate", ...here, "--device", onDevice.testDevice, PROMPT].concat(
          ["--ignore-eos", "--max-tokens", "100000"],
        ),
      ),
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    const reader = child.stdout.getReader();
    await reader.read();
    child.kill("SIGINT");
    const sent = performance.now();
    while (!(await reader.read()).done);
    const [{ code }, stderr] = await Promise.all([
      child.status,
      new Response(child.stderr).text(),
    ]);
    // Tens of milliseconds, which cuda_check.ts prints; a busy machine's more.
    assertLess(performance.now() - sent, 1000);
    assertEquals(code, 130);
    assertMatch(stderr, /^\d+ tokens.*; cache .*\n$/);
  });

  onDevice.it("ends with 130 while standard input is waited for", async () => {
    const child = new Deno.Command(Deno.execPath(), {
      args: denoArguments(["generate", ...here, "-"]),
      stdin: "piped",
      stdout: "null",
      stderr: "piped",
    }).spawn();
    // The command shows nothing while it waits: time has to pass.
    await new Promise((resolve) => setTimeout(resolve, 700));
    child.kill("SIGINT");
    const stderr = await new Response(child.stderr).text();
    assertEquals([(await child.status).code, stderr], [
      130,
      "wkv: Interrupted\n",
    ]);
    await child.stdin.close().catch(() => {});
  });
});

/** Runs a command on a terminal of 100 columns; `interrupt` types Ctrl-C at the first output that has it. Cleared lines show as `<clear>`. */
async function onTerminal(
  args: string[],
  options: { env?: Record<string, string>; interrupt?: string } = {},
): Promise<Outcome> {
  const script = `
import fcntl, os, pty, struct, sys, termios
pid, fd = pty.fork()
if pid == 0:
    os.execv(sys.argv[2], sys.argv[2:])
fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
out, typed = b"", False
while True:
    try:
        data = os.read(fd, 65536)
    except OSError:
        break
    if not data:
        break
    out += data
    if sys.argv[1] and not typed and sys.argv[1].encode() in out:
        typed = True
        os.write(fd, b"\\x03")
sys.stdout.buffer.write(out)
sys.stdout.flush()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
`;
  const outcome = await execute(
    "python3",
    ["-c", script, options.interrupt ?? "", Deno.execPath()].concat(
      denoArguments(args),
    ),
    { env: { NO_COLOR: "", TERM: "xterm", ...options.env } },
  );
  return {
    ...outcome,
    stdout: outcome.stdout.replaceAll("\x1b[K", "<clear>"),
  };
}

describe("on a terminal", () => {
  it("draws a bar, takes it away and ends the text with a newline", async () => {
    const args = ["generate", ...here, PROMPT, "--max-tokens", "3"];
    const { code, stdout } = await onTerminal(args);
    assertEquals(code, 0, stdout);
    assertMatch(stdout, /\r<clear>Loading SmolLM2.* \[#*-*\] +\d+% /);
    assertMatch(stdout, /\r<clear>, the city\r\n3 tokens at .*\r\n$/);
    const plain = await onTerminal(args, { env: { NO_COLOR: "1" } });
    assertMatch(plain.stdout, /, the city\r\n3 tokens at .*\r\n$/);
    assert(!plain.stdout.includes("Loading"));
  });

  it("shows the time left of a perplexity", async () => {
    const { stdout } = await onTerminal(
      ["perplexity", ...here, "--window", "32", "--windows", "1"]
        .concat("--text", `${ROOT}/tests/golden/text.txt`),
    );
    assertMatch(stdout, /Perplexity \[#+-+\] +\d+% \d+ m?s left/);
    assertMatch(stdout, /\r<clear>policy .*\r\nweighted-kv .*\r\n$/);
  });

  it("stops at Ctrl-C", async () => {
    const { code, stdout } = await onTerminal(
      ["generate", ...here, PROMPT, "--ignore-eos"].concat(
        ["--max-tokens", "100000"],
      ),
      { interrupt: ", the city" },
    );
    assertEquals(code, 130, stdout);
    assertMatch(stdout, /\r\n\d+ tokens at .*\r\n$/);
  });
});

describe("wkv perplexity", () => {
  const text = `${ROOT}/tests/golden/text.txt`;

  it("prints a JSON line for each policy and budget, and dumps the caches", async () => {
    const dump = `${temporary}/dump.jsonl`;
    const args = ["perplexity", ...here, "--text", text];
    const { stdout, stderr } = await ok([
      ...args,
      ...["--window", "24", "--windows", "2", "--stride", "8", "--json"],
      ...["--policy", "full,weighted-kv", "--budget", "12,16"],
      ...["--offset", "3", "--batch", "2", "--cache-type", "f32"],
      ...["--dump-cache", dump],
    ]);
    assertEquals(stderr, "");
    const rows = stdout.trim().split("\n").map((line) => JSON.parse(line));
    assertEquals(rows.map(({ policy, budget }) => [policy, budget]), [
      ["full", null],
      ["weighted-kv", 12],
      ["weighted-kv", 16],
    ]);
    for (const row of rows) {
      assertEquals(Object.keys(row), [
        ...["policy", "budget", "sinks", "recent", "interval", "layerSlots"],
        ...["headSlots", "kvHeads", "positions", "prefill"],
        ...["activations", "cacheType", "window", "stride", "windows"],
        ...["targets", "nll", "perplexity", "stderr"],
        ...["kl", "klStderr", "sameTop", "gap", "gapStderr", "gapWindow"],
        "seconds",
      ]);
      assertEquals([row.windows, row.targets, row.stride], [2, 31, 8]);
      assertEquals(row.perplexity, Math.exp(row.nll));
    }
    const cache = (await Deno.readTextFile(dump)).trim().split("\n").map((
      line,
    ) => JSON.parse(line));
    assertEquals(cache.length, 3 * 30 * 3);
    for (const row of cache) {
      const kept = row.budget ?? 23;
      assertEquals(row.steps, 23);
      for (const name of ["kept", "steps_attended", "score", "value_norm"]) {
        assertEquals(row[name].length, kept);
      }
    }
    assertEquals(cache[90].kept.slice(0, 4), [0, 1, 2, 3]);
  });

  it("prints a table without --json", async () => {
    const { stdout } = await ok(
      ["perplexity", ...here, "--text", text, "--windows", "1"]
        .concat("--window", "24", "--policy", "full", "--quiet"),
    );
    assertMatch(
      stdout,
      /^policy +budget .*\nfull +- +- +- +cache +24 +23 +\d+\.\d{4} .*\n$/,
    );
  });

  it("refuses a text without a whole window", async () => {
    const { code, stderr } = await wkv(
      ["perplexity", ...here, "--text", "-", "--window", "64"],
      { stdin: "too short" },
    );
    assertEquals(code, 2);
    assertStringIncludes(stderr, "No window of 64 tokens fits");
  });
});

describe("wkv eval, compare and verify", () => {
  const text = `${ROOT}/tests/golden/text.txt`;

  it("keep a run, go on with it, and repeat it", async () => {
    const out = `${temporary}/run`;
    const args = ["perplexity", ...here, "--text", text, "--window", "24"]
      .concat("--windows", "2", "--policy", "weighted-kv,eviction", "--quiet")
      .concat("--budget", "12", "--divergence", "--out", out, "--json");
    const first = await ok(args);
    const rows = first.stdout.trim().split("\n").map((line) =>
      JSON.parse(line)
    );
    assertEquals(rows.map(({ policy }) => policy), ["weighted-kv", "eviction"]);
    for (const { kl, sameTop } of rows) {
      assertGreater(kl, 0);
      assertGreater(sameTop, 0);
    }
    const page = await Deno.readTextFile(`${out}/report.html`);
    assertMatch(page, /weighted-kv/);
    assertEquals((await ok(args)).stdout, first.stdout);
    const verify = ["verify", out, "--quiet"];
    const { stdout } = await ok(verify);
    assertEquals(stdout, `${out}: 6 results, bit-equal\n`);
    const file = `${out}/results.jsonl`;
    const lines = (await Deno.readTextFile(file)).split("\n");
    await Deno.writeTextFile(file, `${lines.slice(0, 3).join("\n")}\n`);
    assertEquals(
      (await ok(verify)).stdout,
      `${out}: unfinished, 3 of 6 results, bit-equal\n`,
    );
    // A number that somebody changed is found.
    lines[1] = lines[1]!.replace(/"nll":\d+/, (found) => `${found}9`);
    await Deno.writeTextFile(file, lines.join("\n"));
    const changed = await wkv(verify);
    assertEquals(changed.code, 1);
    assertMatch(changed.stdout, /different\nfirst: result 2 .*nll is/);
    const other = await wkv([...args, "--sinks", "1"]);
    assertEquals(other.code, 2);
    assertMatch(other.stderr, /options\.sinks is undefined there and 1 now/);
    const missing = await wkv(["verify", `${temporary}/nothing`]);
    assertEquals(missing.code, 2);
    assertMatch(missing.stderr, /no manifest\.json/);
  });

  it("ask questions", async () => {
    const out = `${temporary}/questions`;
    const { stdout } = await ok(
      ["eval", ...here, "--tasks", "passkey", "--lengths", "160", "--quiet"]
        .concat("--depths", "0.5", "--samples", "1", "--json", "--out", out)
        .concat("--policy", "full,streaming-llm", "--budget", "32"),
    );
    const [full, cut] = stdout.trim().split("\n").map((line) =>
      JSON.parse(line)
    );
    assertEquals([full.task, full.score, full.questions], ["passkey", 100, 1]);
    assertEquals([cut.budget, cut.score], [32, 0]);
    assertGreater(cut.nll, full.nll);
    const verified = await ok(["verify", out, "--quiet"]);
    assertMatch(verified.stdout, /: 2 results, bit-equal\n$/);
    const wrong = await wkv(["eval", "--tasks", "nope"]);
    assertEquals(wrong.code, 2);
    assertMatch(wrong.stderr, /Unknown task "nope": known are/);
    assertEquals((await wkv(["eval", "--depths", "0,2"])).code, 2);
  });

  it("compare columns", async () => {
    const html = `${temporary}/columns.html`;
    const args = ["compare", ...here, "The sea was calm and the", "--quiet"]
      .concat("--policy", "full,eviction", "--budget", "16,32")
      .concat("--max-tokens", "24");
    const { stdout } = await ok([...args, "--html", html]);
    const [title] = stdout.split("\n");
    assertMatch(title!, /^full +\| eviction 16 +\| eviction 32$/);
    assertMatch(stdout, /\neviction 16 +24 +\d+ +0\.\d{4} /);
    assertMatch(await Deno.readTextFile(html), /eviction 32/);
    const json = await ok([...args, "--json"]);
    const columns = json.stdout.trim().split("\n").map((l) => JSON.parse(l));
    assertEquals(columns.map(({ cache }) => cache.budget), [null, 16, 32]);
    assertEquals([columns[0].kl, columns[0].differsAt], [0, null]);
  });
});
