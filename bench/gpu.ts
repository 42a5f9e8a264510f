/**
 * Measures this library on a GPU beside what torch has, in one command, and
 * writes bench/results/GPU.json; run by hand on a machine with nothing else on
 * its GPU.
 *
 *   deno task bench:gpu [--quick] [--peers attention,gptfast,transformers]
 *     [--model FILE.gguf] [--shapes llama-3-8b] [--out FILE] [--device cuda]
 *     [--seconds 480]
 *
 * `full` is the time of the same kernel on a full cache of that size, `over full`
 * what choosing a token and letting it leave takes beside. The parts run one
 * behind the other, what matters most first, each a process with a time limit of
 * its own, and all within --seconds: eight minutes, two with --quick. The file is
 * written anew after every figure, so that a part that fails or is stopped loses
 * no other's. Peers need python3 with torch and are left out, with a line, where
 * it is not. --model adds steps of a real model, such as SmolLM2's Q4_1 file.
 */

import { parseArgs } from "@std/cli/parse-args";
import { formatTable } from "../cli/units.ts";
import { peerSizes } from "../src/selftest/model_cases.ts";
import { frame, writeResult } from "./record.ts";
import { showUsage } from "./usage.ts";

/** A figure as a part printed it. */
interface Row {
  part: string;
  test: string;
  [field: string]: unknown;
}

/** One process. */
interface Part {
  name: string;
  command: string;
  args: string[];
  /** Seconds that it may take. */
  limit: number;
}

await showUsage(import.meta.url);
const args = parseArgs(Deno.args, {
  string: ["peers", "model", "shapes", "out", "device", "seconds"],
  boolean: ["quick"],
  default: {
    peers: "attention,gptfast,transformers",
    shapes: "llama-3-8b",
    device: "cuda",
  },
}) as unknown as {
  peers: string;
  model?: string;
  shapes: string;
  out?: string;
  device: "cpu" | "cuda";
  seconds?: string;
  quick: boolean;
};
const { quick, device, shapes } = args;
const tiny = shapes === "tiny";
const budgets = tiny ? [32, 64] : quick ? [1024, 8192] : peerSizes.budgets;
const budget = tiny ? 32 : 1024;
const batches = tiny ? [1, 2] : peerSizes.batches;
const prompts = tiny ? [32, 64] : quick ? [4096] : [4096, 32768];
const allowed = Number(args.seconds ?? (quick ? 120 : 480));
if (!(allowed >= 0)) {
  throw new TypeError(`--seconds must be a number: ${args.seconds}`);
}
const list = (numbers: readonly number[]) => numbers.join(",");

const start = performance.now();
const head = await frame(`deno task bench:gpu ${Deno.args.join(" ")}`, device);
const out = args.out ?? `bench/results/${slug(head.gpu ?? head.cpu)}.json`;
const rows: Row[] = [];
/** What did not run to its end, and why. */
const missing: string[] = [];

for (const part of [...await parts()]) await runPart(part);
await save();
const { ceiling, attention, decode, prefill } = join();
console.log(ceilingText(ceiling));
for (const { text } of [attention, decode, prefill]) console.log(text);
for (const line of missing) console.log(line);
const seconds = Math.round((performance.now() - start) / 1000);
console.log(`${rows.length} figures in ${out} after ${seconds} s`);

async function parts(): Promise<Part[]> {
  const peers = args.peers.split(",").filter((name) => name !== "");
  const reason = peers.length > 0 ? await withoutTorch() : null;
  if (reason !== null) {
    missing.push(`Peers ${peers.join(", ")} left out: ${reason}`);
  }
  const some = quick ? ["--quick"] : [];
  const peer = (name: string, file: string, limit: number, more: string[]) =>
    reason === null && peers.includes(name)
      ? [{
        name,
        command: "python3",
        args: [`bench/peers/${file}`, ...some, ...more],
        limit,
      }]
      : [];
  const wkv = (name: string, limit: number, more: string[]): Part => ({
    name,
    command: Deno.execPath(),
    args: [
      ...["run", "-A", "--no-prompt", "cli/main.ts", "bench", ...more],
      ...["--device", device, "--json", ...some],
    ],
    limit,
  });
  const attend = (
    name: string,
    limit: number,
    policies: readonly string[],
    budgets: readonly number[],
    batches: readonly number[],
  ) =>
    wkv(name, limit, [
      ...["kernels", "--shapes", shapes, "--op", "attend", ...cache],
      ...["--policy", policies.join(), "--budget", list(budgets)],
      ...["--batch", list(batches)],
    ]);
  const random = ["--shapes", shapes, "--dtype", "BF16"];
  const cache = ["--cache-type", peerSizes.cacheType];
  const sizes = ["--batch", list(batches)];
  return [
    attend("attend", 90, ["weighted-kv", "full"], budgets, batches),
    ...peer("attention", "attention.py", 120, [
      ...["--cache", list(budgets), ...sizes],
    ]),
    ...(quick ? [] : [
      attend("long", 40, ["weighted-kv", "full"], [tiny ? 128 : 131072], [1]),
    ]),
    wkv("model", 90, [
      ...["decode", ...random, ...cache, ...sizes, "--budget", String(budget)],
    ]),
    ...peer("gptfast", "gptfast.py", 150, [
      ...["--cache", String(budget)],
      ...(quick ? ["--batch", "1", "--tokens", "50"] : sizes),
    ]),
    wkv("prefill", 60, [
      ...["decode", ...random, ...cache, "--policy", "full", "--tokens", "0"],
      ...["--prompt", list(prompts), "--activations", "half"],
    ]),
    ...peer("transformers", "transformers_llama.py", 60, [
      ...["--prompt", list(prompts), "--cache", "0"],
    ]),
    ...(args.model
      ? [wkv("file", 60, ["decode", "--model", args.model, "--offline"])]
      : []),
    ...(quick ? [] : [
      wkv("linear", 60, [
        ...["kernels", ...random, "--op", "linear,gated,sample", ...sizes],
      ]),
      attend("policies", 30, ["eviction", "weighted-kv-ward"], [budget], [1]),
    ]),
  ];
}

/** Why the peers cannot run; null when they can. */
async function withoutTorch(): Promise<string | null> {
  if (device === "cpu") return "they need a GPU";
  try {
    const { success, stderr } = await new Deno.Command("python3", {
      args: ["-c", "import torch; torch.zeros(1, device='cuda')"],
      stdout: "null",
    }).output();
    const last = new TextDecoder().decode(stderr).trim().split("\n").at(-1)!;
    return success ? null : last;
  } catch {
    return "there is no python3";
  }
}

/** Runs one part to its end or its limit, keeping each line that it prints. */
async function runPart(part: Part): Promise<void> {
  const { name, command, args } = part;
  const since = performance.now();
  const left = allowed - (since - start) / 1000;
  if (left <= 0) {
    missing.push(`${name} was left out: ${allowed} s were over`);
    return;
  }
  const limit = Math.min(part.limit, left);
  console.error(`${name}: ${command} ${args.join(" ")}`);
  const child = new Deno.Command(command, {
    args,
    stdin: "null",
    stdout: "piped",
    stderr: "inherit",
  }).spawn();
  let late = false;
  const timer = setTimeout(() => {
    late = true;
    child.kill("SIGKILL");
  }, limit * 1000);
  let rest = "";
  for await (
    const text of child.stdout.pipeThrough(new TextDecoderStream())
  ) {
    const lines = (rest + text).split("\n");
    rest = lines.pop()!;
    for (const line of lines) {
      if (!line.startsWith("{")) continue;
      rows.push({ part: name, ...JSON.parse(line) });
      await save();
    }
  }
  const { success, code } = await child.status;
  clearTimeout(timer);
  const seconds = ((performance.now() - since) / 1000).toFixed(0);
  console.error(`${name}: ${seconds} s`);
  if (late) missing.push(`${name} was stopped after ${seconds} s`);
  else if (!success) missing.push(`${name} ended with ${code}`);
}

async function save(): Promise<void> {
  const { ceiling, attention, decode, prefill } = join();
  await writeResult(out, {
    ...head,
    ceiling,
    attention: attention.rows,
    decode: decode.rows,
    prefill: prefill.rows,
    missing,
    rows,
  });
}

/** How fast the memory was read in this run, and by what; shares are of it. */
interface Ceiling {
  /** Bytes a second: the most of what follows but the copies, in bytes a second too. */
  bytesPerSecond: number | null;
  /** Loads of 16 bytes, and bulk copies to shared memory; of a CPU all cores. */
  loads: number | null;
  bulk: number | null;
  cores: number | null;
  /** cuDNN's attention, keys and values counted, at its fastest size. */
  cudnn: number | null;
  cudnnSize: string | null;
  /** Copies, reads and writes counted: the driver's, and torch's copy_. */
  copy: number | null;
  torchCopy: number | null;
}

function number(value: unknown): number | null {
  return typeof value === "number" ? value : null;
}

function of(part: string, test: string): Row[] {
  return rows.filter((row) => row.part === part && row.test === test);
}

function measureCeiling(): Ceiling {
  const [memory] = of("attend", "memory");
  const [copied] = of("attention", "copy");
  let cudnn: number | null = null, cudnnSize: string | null = null;
  for (
    const { bytes, cudnn: us, batch, cache } of of("attention", "attention")
  ) {
    if (typeof us !== "number") continue;
    const speed = (bytes as number) / us * 1e6;
    if (speed <= (cudnn ?? 0)) continue;
    cudnn = speed;
    cudnnSize = `batch ${batch}, ${cache} tokens`;
  }
  const loads = number(memory?.loads), bulk = number(memory?.bulk);
  const cores = device === "cpu" ? number(memory?.bytesPerSecond) : null;
  const copy = number(memory?.copy);
  const most = Math.max(loads ?? 0, bulk ?? 0, cores ?? 0, cudnn ?? 0);
  return {
    bytesPerSecond: most || copy,
    loads,
    bulk,
    cores,
    cudnn,
    cudnnSize,
    copy,
    torchCopy: number(copied?.bytesPerSecond),
  };
}

function ceilingText(ceiling: Ceiling): string {
  const gbps = (x: number | null) => x === null ? "-" : (x / 1e9).toFixed(0);
  return device === "cpu"
    ? `Shares are of ${gbps(ceiling.cores)} GB/s, all cores reading`
    : `Shares are of ${
      gbps(ceiling.bytesPerSecond)
    } GB/s, the fastest read: loads of 16 bytes ${
      gbps(ceiling.loads)
    }, bulk copies to shared memory ${gbps(ceiling.bulk)}, cuDNN ${
      gbps(ceiling.cudnn)
    }${
      ceiling.cudnnSize === null ? "" : ` (${ceiling.cudnnSize})`
    }; copies, reads and writes counted: the driver's ${
      gbps(ceiling.copy)
    }, torch's ${gbps(ceiling.torchCopy)}`;
}

/** Ours beside the peers, by size. */
function join() {
  const ceiling = measureCeiling();
  const { bytesPerSecond } = ceiling;
  const share = ({ gbps }: Row) =>
    bytesPerSecond && (gbps as number) * 1e9 / bytesPerSecond;
  const ratio = (a: unknown, b: unknown) =>
    typeof a === "number" && typeof b === "number"
      ? Number((a / b).toFixed(3))
      : null;
  const steps = ["attend", "long", "policies"].flatMap((part) =>
    of(part, "kernel")
  );
  const attention = steps.filter(({ policy }) => policy !== "full").map(
    (row) => {
      const same = (other: Row) =>
        other.batch === row.batch &&
        (other.cache ?? other.budget) === row.budget;
      const peer: Record<string, unknown> =
        of("attention", "attention").find(same) ?? {};
      const { flash = null, cudnn = null, compiled_scores: scores = null } =
        peer;
      const us = row.us as number;
      // The same kernel where no token leaves: what choosing and merging one costs.
      const full = steps.find((one) => one.policy === "full" && same(one))?.us;
      return {
        policy: row.policy,
        batch: row.batch,
        cache: row.budget,
        us: Number(us.toFixed(3)),
        full: typeof full === "number" ? Number(full.toFixed(3)) : null,
        "over full": typeof full === "number"
          ? Number((us - full).toFixed(3))
          : null,
        share: share(row),
        cudnn,
        flash,
        scores,
        "ours/cudnn": ratio(row.us, cudnn),
        "ours/flash": ratio(row.us, flash),
        "ours/scores": ratio(row.us, scores),
      };
    },
  );
  const decode = [...of("model", "decode"), ...of("file", "decode")].map(
    (row) => {
      const peer = row.part === "model"
        ? of("gptfast", "decode").find((peer) =>
          peer.batch === row.batch && peer.cache === row.budget
        )
        : undefined;
      return {
        model: row.model,
        batch: row.batch,
        budget: row.budget,
        "tokens/s": Number((row.tokensPerSecond as number).toFixed(2)),
        ms: Number((row.ms as number).toFixed(4)),
        "host ms": Number((row.hostMs as number).toFixed(4)),
        share: share(row),
        gptfast: peer?.tokensPerSecond ?? null,
        "ours/gptfast": ratio(row.tokensPerSecond, peer?.tokensPerSecond),
      };
    },
  );
  const prefill = of("prefill", "prefill").map((row) => {
    const peer = (name: string) =>
      of("transformers", "prefill").find((peer) =>
        peer.peer === `transformers ${name}` && peer.tokens === row.tokens
      )?.ms ?? null;
    const sdpa = peer("sdpa");
    return {
      model: row.model,
      activations: row.activations,
      tokens: row.tokens,
      ms: Number((row.ms as number).toFixed(3)),
      "transformers SDPA": sdpa,
      "transformers eager": peer("eager"),
      "ours/SDPA": ratio(row.ms, sdpa),
    };
  });
  return {
    ceiling,
    attention: { rows: attention, text: table(attention) },
    decode: { rows: decode, text: table(decode) },
    prefill: { rows: prefill, text: table(prefill) },
  };
}

function table(rows: readonly Record<string, unknown>[]): string {
  if (rows.length === 0) return "";
  const head = Object.keys(rows[0]!);
  const cell = (key: string, value: unknown): string =>
    typeof value !== "number"
      ? value?.toString() ?? "-"
      : key === "share"
      ? `${(value * 100).toFixed(0)}%`
      : String(value);
  return formatTable(
    head,
    rows.map((row) => head.map((key) => cell(key, row[key]))),
    head.filter((key) => !["model", "policy", "activations"].includes(key)),
  );
}

/** A device's name as a file's: `h100-80gb-hbm3`. */
function slug(name: string): string {
  return name.toLowerCase().replace(/^nvidia /, "").replace(/[^a-z0-9]+/g, "-")
    .replace(/^-+|-+$/g, "");
}
