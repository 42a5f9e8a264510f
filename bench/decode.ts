/**
 * Measures prefill and decode speed of this library on a real model; run by
 * hand, and by cpu.ts beside llama.cpp.
 *
 *   deno run -A bench/decode.ts [--model NAME] [--policy full] [--budget N]
 *     [--depth 512,2048,8192] [--tokens 128] [--prefill 512] [--runs 3]
 *     [--threads N] [--activations int8|f32]
 *
 * Prints one JSON line a figure, the median of the runs. `prefill`: tokens into
 * an empty cache until the first new token is there; `decode`: greedy tokens
 * one by one behind `depth` tokens, the call from JavaScript included.
 */

import { parseArgs } from "@std/cli/parse-args";
import { DEFAULT_MODEL } from "../src/hub/models.ts";
import { loadModel, type Model } from "../src/model.ts";
import { Session } from "../src/session.ts";
import { median } from "./record.ts";

const args = parseArgs(Deno.args, {
  string: [
    "model",
    "policy",
    "budget",
    "depth",
    "tokens",
    "prefill",
    "runs",
    "threads",
    "activations",
  ],
  default: {
    model: DEFAULT_MODEL,
    policy: "full",
    budget: "1024",
    depth: "512",
    tokens: "128",
    prefill: "512",
    runs: "3",
    threads: "0",
    activations: "int8",
  },
}) as Record<string, string>;

const depths = args.depth!.split(",").map(Number);
const [tokens, prefill, runs] = [args.tokens, args.prefill, args.runs]
  .map(Number) as [number, number, number];

using model = await loadModel(args.model!, {
  threads: Number(args.threads),
  activations: args.activations as "int8" | "f32",
});
const ids = await model.tokenizer.encode(
  "The old lighthouse keeper climbed the stairs and looked at the sea. ".repeat(
    1 + Math.max(prefill, ...depths) / 12,
  ),
);

if (prefill > 0) {
  await prefillMs(model, Math.min(64, prefill));
  print("prefill", 0, prefill, await repeat(() => prefillMs(model, prefill)));
}
for (const depth of depths) {
  print("decode", depth, tokens, await repeat(() => decodeMs(model, depth)));
}

async function repeat(measure: () => Promise<number>): Promise<number[]> {
  const samples: number[] = [];
  for (let i = 0; i < runs; i++) samples.push(await measure());
  return samples;
}

function openCache(model: Model, capacity: number) {
  return model.createCache({
    policy: args.policy,
    capacity,
    ...(args.policy === "full" ? {} : { budget: Number(args.budget) }),
  });
}

async function prefillMs(model: Model, rows: number): Promise<number> {
  using cache = openCache(model, rows);
  using session = new Session(model, cache);
  session.setSampler({});
  const start = performance.now();
  await session.prompt(ids.slice(0, rows));
  return performance.now() - start;
}

async function decodeMs(model: Model, depth: number): Promise<number> {
  using cache = openCache(model, depth + tokens + 8);
  using session = new Session(model, cache);
  session.setSampler({});
  // Beyond a budget in chunks: the time of a token behind them is the same.
  await session.prompt(ids.slice(0, depth), { prefill: "chunk:256" });
  for (let i = 0; i < 4; i++) await session.next();
  const start = performance.now();
  for (let i = 0; i < tokens; i++) await session.next();
  return performance.now() - start;
}

function print(
  test: string,
  depth: number,
  tokens: number,
  samples: number[],
): void {
  const ms = median(samples);
  console.log(JSON.stringify({
    peer: "weightedkv",
    device: model.backend.description,
    test,
    policy: args.policy,
    budget: args.policy === "full" ? null : Number(args.budget),
    activations: model.activations,
    cacheType: "f16",
    depth,
    tokens,
    tokensPerSecond: tokens / ms * 1000,
    ms,
    samples,
  }));
}
