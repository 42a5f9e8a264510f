/**
 * Compares this library with llama.cpp on the same cores in one run, and writes
 * bench/results/cpu.json; run by hand on a quiet machine.
 *
 *   deno task bench:cpu --modules FOLDER/node_modules [--runs 5] [--quick]
 *
 * FOLDER holds node-llama-cpp (see peers/llamacpp.mjs). Ours and the peer's
 * runs alternate, each a process of its own; medians are over all runs.
 */

import { parseArgs } from "@std/cli/parse-args";
import { DEFAULT_MODEL, resolveModel } from "../src/hub/models.ts";
import { measureMemory } from "./memory.ts";
import { frame, writeResult } from "./record.ts";
import { median } from "./timing.ts";
import { showUsage } from "./usage.ts";

/** A JSON line of `wkv bench decode` or of a peer. */
interface Line {
  peer: string;
  test: string;
  depth: number;
  tokens: number;
  tokensPerSecond: number;
  [field: string]: unknown;
}

await showUsage(import.meta.url);
const args = parseArgs(Deno.args, {
  string: ["modules", "runs", "out"],
  boolean: ["quick"],
  default: { runs: "5", out: "bench/results/cpu.json" },
}) as unknown as {
  modules?: string;
  runs: string;
  out: string;
  quick: boolean;
};
const runs = args.quick ? 1 : Number(args.runs);
const cores = navigator.hardwareConcurrency;
const model = await resolveModel(DEFAULT_MODEL);
const bandwidth = (await measureMemory("cpu")).bytesPerSecond ?? NaN;

const ours = (policy: string, ...more: string[]) =>
  lines(Deno.execPath(), [
    ...["run", "-A", "--no-prompt", "cli/main.ts", "bench", "decode"],
    ...["--device", "cpu", "--json", "--quiet", "--policy", policy, ...more],
  ]);
const samples = new Map<string, { line: Line; values: number[] }>();
const take = (list: Line[], name: string) => {
  for (const line of list) {
    if (line.test === "memory") continue;
    const key = `${name} ${line.test} ${line.depth}`;
    const entry = samples.get(key) ?? { line, values: [] };
    entry.values.push(line.tokensPerSecond);
    samples.set(key, entry);
  }
};

for (let run = 0; run < runs; run++) {
  take(
    await ours("full", "--depth", "512", "--prompt", "512", "--repeats", "1"),
    "full",
  );
  if (args.modules) {
    take(
      await lines("node", [
        "bench/peers/llamacpp.mjs",
        ...["--model", model, "--modules", args.modules],
        ...["--threads", String(cores), "--runs", "1", "--depth", "512"],
      ]),
      "llama.cpp",
    );
  }
}
if (!args.quick) {
  // A bounded cache: the time of a token must not depend on the depth.
  for (let run = 0; run < runs; run++) {
    take(
      await ours("weighted-kv", "--budget", "1024", "--depth", "2048,8192"),
      "weighted-kv 1024",
    );
  }
}

const rows = [...samples].map(([name, { line, values }]) => ({
  name,
  ...line,
  tokensPerSecond: median(values),
  samples: values,
  ms: undefined,
}));
const modelBytes = (await Deno.stat(model)).size;
const result = {
  ...await frame(`deno task bench:cpu ${Deno.args.join(" ")}`, "cpu"),
  model: DEFAULT_MODEL,
  modelBytes,
  readBandwidth: bandwidth,
  rows,
  memory: args.quick ? [] : await memory(),
};
await writeResult(args.out, result);

console.log(`read bandwidth ${(bandwidth / 1e9).toFixed(1)} GB/s`);
for (const { name, test, tokensPerSecond } of rows) {
  const share = test === "decode"
    ? `${(tokensPerSecond * modelBytes / bandwidth * 100).toFixed(0)}% of it`
    : "";
  console.log(name.padEnd(30), tokensPerSecond.toFixed(1), share);
}
for (const { depth, peakBytes } of result.memory) {
  console.log(`peak at depth ${depth}: ${(peakBytes / 1e6).toFixed(0)} MB`);
}

async function lines(command: string, argv: string[]): Promise<Line[]> {
  return (await output(command, argv)).split("\n")
    .filter((line) => line.startsWith("{")).map((line) => JSON.parse(line));
}

async function output(command: string, argv: string[]): Promise<string> {
  const { stdout, success } = await new Deno.Command(command, {
    args: argv,
    stderr: "inherit",
  }).output();
  if (!success) throw new Error(`${command} ${argv.join(" ")} failed`);
  return new TextDecoder().decode(stdout);
}

/** Peak resident memory of `generate` at budget 1024, after a short and a long prompt. */
async function memory(): Promise<{ depth: number; peakBytes: number }[]> {
  const wrapper =
    "import resource,subprocess,sys;subprocess.run(sys.argv[1:],stdout=subprocess.DEVNULL,stderr=subprocess.DEVNULL,check=True);print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss*1024)";
  const found: { depth: number; peakBytes: number }[] = [];
  for (const depth of [512, 2048, 8192]) {
    const peak = await output("python3", [
      ...["-c", wrapper, Deno.execPath(), "run", "-A", "cli/main.ts"],
      ...["generate", "The sea. ".repeat(depth / 3), "--budget", "1024"],
      ...["--max-tokens", "64", "--ignore-eos"],
    ]);
    found.push({ depth, peakBytes: Number(peak) });
  }
  return found;
}
