/**
 * Times a whole model's decode steps and prompts, real or with random weights;
 * called by `wkv bench decode`.
 *
 * A step is what generation does for a token: one call that runs the recorded
 * graph, greedy draw included, and one read of the token. The clock starts
 * behind `depth` tokens, by default more than the budget, so that every step
 * selects, and merges where the policy does.
 */

import type { CacheStats, KvCache } from "../src/cache/cache.ts";
import type { CacheOptions } from "../src/cache/layout.ts";
import { choosesByStep } from "../src/cache/policy.ts";
import { findPolicy } from "../src/cache/registry.ts";
import type { Model } from "../src/model.ts";
import { type Prefill, Session } from "../src/session.ts";
import type { Memory } from "./memory.ts";
import { median, quantile, rounded, timeRuns } from "./timing.ts";

/** What is measured. */
export interface DecodeOptions {
  /** The caches' policies. */
  policies: readonly string[];
  /** Their budgets. */
  budgets: readonly number[];
  /** What else caches are made of. */
  cache: Omit<CacheOptions, "policy" | "budget" | "sequences" | "capacity">;
  /** Sequences side by side. */
  batches: readonly number[];
  /** Tokens before the clock starts; the budget and a few more by default. */
  depths?: readonly number[] | undefined;
  /** Steps that are timed; none times no decode. */
  tokens: number;
  /** Prompts to time, in tokens. */
  prompts: readonly number[];
  /**
   * How tokens beyond the budget are fed, and depths of one sequence filled.
   * @default `"chunk:256"`, or `"exact"` where the policy takes no chunks
   */
  prefill?: Prefill | undefined;
  /** Samples of a prompt. */
  repeats: number;
}

/** What every row says. */
interface Common {
  peer: "weightedkv";
  model: string;
  device: string;
  activations: string;
  weightBytes: number;
  policy: string;
  budget: number | null;
  cacheType: string;
  positions: string;
  batch: number;
}

/** Decode steps behind some tokens. */
export interface DecodeRow extends Common, CacheStats {
  test: "decode";
  depth: number;
  tokens: number;
  /** Tokens of all sequences, by the whole time. */
  tokensPerSecond: number;
  /** Milliseconds of a step: median, tenth, ninetieth and 99th percentile. */
  ms: number;
  ms10: number;
  ms90: number;
  ms99: number;
  /** Milliseconds of a step when one call runs many and reads no token. */
  deviceMs: number;
  /** What the call, the wait and the read add to a step. */
  hostMs: number;
  /** Bytes of weights and cache that a step must move. */
  bytes: number;
  /** Gigabytes a second of those. */
  gbps: number;
  /** Their share of the memory's bandwidth, when that is known. */
  share: number | null;
  /** Milliseconds of each step. */
  samples: number[];
}

/** A prompt from an empty cache to the first new token. */
export interface PromptRow extends Common, CacheStats {
  test: "prefill";
  depth: 0;
  tokens: number;
  prefill: Prefill;
  tokensPerSecond: number;
  ms: number;
  samples: number[];
}

/** Steps that no clock sees: graphs are recorded, a full cache overflows. */
const WARM_UP = 4;
/** The most steps of one call. */
const RUN = 32;

/** Measures, a row at a time. */
export async function* benchDecode(
  model: Model,
  memory: Memory,
  options: DecodeOptions,
): AsyncGenerator<DecodeRow | PromptRow> {
  for (const policy of options.policies) {
    let only: number | null | undefined;
    for (const budget of options.budgets) {
      // A full cache has no budget: one is enough.
      if (only === null) break;
      for (const tokens of options.prompts) {
        const row = await timePrompt(model, policy, budget, tokens, options);
        only = row.budget;
        yield row;
      }
      if (options.tokens === 0) continue;
      const depths = options.depths ?? [budget + WARM_UP];
      for (const batch of options.batches) {
        for (const depth of depths) {
          const shape = { policy, budget, batch, depth };
          const row = await timeDecode(model, memory, shape, options);
          only = row.budget;
          yield row;
        }
      }
    }
  }
}

function common(model: Model, cache: KvCache): Common {
  return {
    peer: "weightedkv",
    model: model.name,
    device: model.backend.description,
    activations: model.activations,
    weightBytes: model.weightBytes,
    policy: cache.policy.name,
    budget: cache.budget,
    cacheType: cache.cacheType,
    positions: cache.positions,
    batch: cache.sequences,
  };
}

/** Ids of a text that means nothing. */
function someTokens(model: Model, count: number): number[] {
  const { vocabulary } = model.config;
  return Array.from({ length: count }, (_, i) => (i * 7919 + 13) % vocabulary);
}

async function timeDecode(
  model: Model,
  memory: Memory,
  { policy, budget, batch, depth }: {
    policy: string;
    budget: number;
    batch: number;
    depth: number;
  },
  { cache: cacheOptions, tokens, prefill = feeding(policy) }: DecodeOptions,
): Promise<DecodeRow> {
  const run = Math.min(RUN, tokens);
  using cache = model.createCache({
    ...cacheOptions,
    policy,
    budget,
    sequences: batch,
    capacity: depth + WARM_UP + tokens + run,
  });
  using session = new Session(model, cache);
  session.setSampler({});
  if (batch === 1) await session.prompt(someTokens(model, depth), { prefill });
  else await session.advance(depth);
  for (let i = 0; i < WARM_UP; i++) await session.next();
  const before = cache.stats().kept;
  const samples = await timeRuns(tokens, () => session.next());
  const { kept, ...stats } = cache.stats();
  const [together] = await timeRuns(1, () => session.advance(run));
  const total = samples.reduce((sum, ms) => sum + ms, 0);
  const ms = median(samples);
  const deviceMs = together! / run;
  const { layers, kvHeads } = model.config;
  // 16 bytes of state a token: its score read and written, birth, rank.
  const states = 16 * layers * kvHeads;
  const attended = (before + kept) / 2;
  const bytes = model.network.stepBytes +
    batch * (cache.fullBytes(attended) + states * attended);
  const gbps = bytes / ms / 1e6;
  return {
    ...common(model, cache),
    test: "decode",
    depth,
    tokens,
    tokensPerSecond: batch * tokens / total * 1000,
    ms,
    ms10: quantile(samples, 0.1),
    ms90: quantile(samples, 0.9),
    ms99: quantile(samples, 0.99),
    deviceMs,
    hostMs: ms - deviceMs,
    bytes,
    gbps,
    share: memory.bytesPerSecond && gbps * 1e9 / memory.bytesPerSecond,
    kept,
    ...stats,
    samples: rounded(samples),
  };
}

function feeding(policy: string): Prefill {
  return choosesByStep(findPolicy(policy)) ? "exact" : "chunk:256";
}

async function timePrompt(
  model: Model,
  policy: string,
  budget: number,
  tokens: number,
  { cache: cacheOptions, prefill = feeding(policy), repeats }: DecodeOptions,
): Promise<PromptRow> {
  using cache = model.createCache({
    ...cacheOptions,
    policy,
    budget,
    capacity: tokens,
  });
  using session = new Session(model, cache);
  session.setSampler({});
  const text = someTokens(model, tokens);
  await session.prompt(text.slice(0, Math.min(64, tokens)), { prefill });
  const samples = await timeRuns(
    repeats,
    () => session.prompt(text, { prefill }),
    () => cache.reset(),
  );
  const ms = median(samples);
  return {
    ...common(model, cache),
    test: "prefill",
    depth: 0,
    tokens,
    prefill,
    tokensPerSecond: tokens / ms * 1000,
    ms,
    ...cache.stats(),
    samples: rounded(samples),
  };
}
