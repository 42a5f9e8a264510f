/** planMemory(): what a model with a cache takes, from headers alone, and the largest budget or batch that fits; used by `wkv plan`. */

import {
  type CacheOptions,
  type CachePlan,
  type GroupPlan,
  planCache,
  rowBytes,
} from "./cache/layout.ts";
import { headBudgets, type LayerBudgets } from "./cache/budget.ts";
import { MAX_SLOTS, mergesRight, type Policy } from "./cache/policy.ts";
import { PASS_ROWS, passMemory } from "./model.ts";
import type { ModelConfig } from "./models/architecture.ts";
import type { ModelFile } from "./models/file.ts";

/** What is planned for. */
export interface PlanOptions extends CacheOptions {
  /** Whose layouts are counted. @default `"cpu"` */
  device?: "cpu" | "cuda" | undefined;
  /** Threads of the CPU. @default one a core */
  threads?: number | undefined;
  /** Tokens of a chunk, where a prompt beyond the room is fed in chunks. @default none */
  chunk?: number | null | undefined;
}

/** Bytes that generation takes, the tokenizer and the process itself aside. */
export interface MemoryPlan {
  /** Weights. */
  weights: number;
  /** Keys, values, state and rotation tables, of all sequences. */
  cache: number;
  /** Rows between the steps, and logits. */
  activations: number;
  /** What ops share. */
  scratch: number;
  /** All of it. */
  total: number;
}

/** A model as headers show it. */
export interface PlannedModel {
  /** Its numbers. */
  config: ModelConfig;
  /** Bytes of its weights. */
  weights: number;
  /** Whether they are in blocks. */
  quantised: boolean;
}

/** A model's file as a plan needs it. */
export function plannedModel(
  { config, tensors }: Pick<ModelFile, "config" | "tensors">,
): PlannedModel {
  let weights = 0, quantised = false;
  for (const { type, shape, bytes } of tensors) {
    // Vectors are kept in F32.
    weights += shape.length === 1 ? 4 * shape[0]! : bytes;
    quantised ||= !["F32", "F16", "BF16"].includes(type);
  }
  return { config, weights, quantised };
}

/**
 * What a model and a cache take.
 *
 * @example
 * ```ts ignore
 * const { total } = planMemory(model, { budget: 1024, sequences: 16 });
 * ```
 *
 * @throws {RangeError} An option is out of range.
 */
export function planMemory(
  model: PlannedModel,
  options: PlanOptions = {},
): MemoryPlan {
  const { config, weights } = model;
  const { device = "cpu" } = options;
  const plan = planCache(config, options);
  const { sequences } = plan;
  const sizes = sizesOf(config);
  const row = sizes.width + sizes.qkv + sizes.attended + sizes.hidden +
    ((config.norms ?? "before") === "before" ? 0 : sizes.width);
  const cache = plan.groups.reduce(
    (sum, group) => sum + groupBytes(config, plan, group, device),
    0,
  );
  // A pass's rows, a step's, and what is drawn from.
  const rows = rowsOfPass(plan, device, options.chunk ?? 0);
  const memory = rows === 0 ? 0 : passMemory(rows);
  const activations = 4 *
    ((memory + sequences) * row + sequences * (config.vocabulary + 32));
  const threads = options.threads ?? navigator.hardwareConcurrency;
  const scratch = device === "cpu"
    ? cpuScratch(model, plan, rows, threads)
    : cudaScratch(model, plan, memory);
  const total = weights + cache + activations + scratch;
  return { weights, cache, activations, scratch, total };
}

/**
 * The largest budget that fits, at most the model's context, of `full` the
 * tokens that it has room for; null when none does.
 *
 * @param memory Bytes.
 */
export function mostBudget(
  model: PlannedModel,
  memory: number,
  options: PlanOptions = {},
): number | null {
  const { context, layers, kvHeads } = model.config;
  const { layerBudgets = "constant" } = options;
  // Where the budget is spread unevenly, the largest head reaches the limit first.
  const most = largest(
    Math.min(context, MAX_SLOTS),
    (tokens) => mostOf(layerBudgets, tokens, layers, kvHeads) <= MAX_SLOTS,
  ) ?? 1;
  const of = (tokens: number): PlanOptions => ({
    ...options,
    budget: tokens,
    capacity: tokens,
  });
  // What is wrong with other options is wrong with the largest budget too.
  planMemory(model, of(most));
  const budget = largest(
    most,
    (tokens) => (bytesOf(model, of(tokens)) ?? 0) <= memory,
  );
  return budget === null || bytesOf(model, of(budget)) === null ? null : budget;
}

/**
 * The most sequences that fit; null when not one does.
 *
 * @param memory Bytes.
 */
export function mostSequences(
  model: PlannedModel,
  memory: number,
  options: PlanOptions = {},
): number | null {
  return largest(
    4096,
    (sequences) => planMemory(model, { ...options, sequences }).total <= memory,
  );
}

/** The tokens of the head that keeps most; where a budget is too small to be spread, itself. */
function mostOf(
  spread: LayerBudgets,
  budget: number,
  layers: number,
  kvHeads: number,
): number {
  try {
    return Math.max(...headBudgets(spread, budget, layers, kvHeads).flat());
  } catch (error) {
    if (error instanceof RangeError) return budget;
    throw error;
  }
}

/** All bytes; null where the budget has no room for what is protected. */
function bytesOf(model: PlannedModel, options: PlanOptions): number | null {
  try {
    return planMemory(model, options).total;
  } catch (error) {
    if (error instanceof RangeError) return null;
    throw error;
  }
}

/** The largest whole number from 1 to `most` that passes, all below it passing too. */
function largest(most: number, passes: (n: number) => boolean): number | null {
  let low = 0, high = most;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (passes(middle)) low = middle;
    else high = middle - 1;
  }
  return low === 0 ? null : low;
}

// ---- caches, as Cache in kernels/cpu/cache.hpp and kernels/cuda/cache.cu ----

function groupBytes(
  config: ModelConfig,
  { policy, positions, cacheType, sequences }: CachePlan,
  { plan, kvHeads, places }: GroupPlan,
  device: "cpu" | "cuda",
): number {
  const { slots, whole, window, interval } = plan;
  const heads = places.length * sequences * kvHeads;
  const entries = heads * (slots + 1);
  const words = whole ? 0 : wordsOf(policy);
  const half = heads * slots * rowBytes(config, cacheType) / config.kvHeads / 2;
  const counts = device === "cpu" ? 36 : 48;
  const parts = [
    ...[half, half],
    ...[4 * entries, 4 * entries, 4 * entries],
    4 * entries * words,
    counts * heads,
  ];
  if (device === "cuda" && !whole) {
    const lists = inOneLaunch(policy, interval) ? usesGap(policy) ? 2 : 0 : 6;
    const list = 4 * sequences * kvHeads * (slots + 1);
    for (let i = 0; i < lists; i++) parts.push(list);
  }
  const rope = window > 0 && config.window?.rope || config.rope;
  const tables = positions === "cache"
    ? 8 * (slots + 1) * rope.frequencies.length
    : 0;
  const whole256 = device === "cpu" ? (x: number) => x : roundUp;
  return tables + parts.reduce((sum, part) => sum + whole256(part), 0);
}

function roundUp(bytes: number, to = 256): number {
  return Math.ceil(bytes / to) * to;
}

function usesGap({ select }: Policy): boolean {
  return select === "merge-cost" || select === "merge-cost-linear";
}

/** Words of state a token, as wkv_words in kernels/policy.h has them. */
function wordsOf(policy: Policy): number {
  if (usesGap(policy)) return 1;
  if (policy.select === "least-often") return Math.ceil(400 / 32);
  if (policy.select === "window") return 32;
  return policy.merge === "nearest-votes" ? 1 : 0;
}

/** As wkv_in_one_launch in kernels/policy.h. */
function inOneLaunch(policy: Policy, interval: number): boolean {
  const { select, merge } = policy;
  return interval === 1 && (merge === "none" || mergesRight(policy)) &&
    ![
      ...["lowest-now", "least-often", "key-norm", "key-likeness", "window"],
      ...["sum-value-norm", "output-error"],
    ].includes(select);
}

// ---- what ops share, of passes of `rows` rows, 0 where tokens go one by one ----

/** The most rows of a pass, as Session feeds prompts. */
function rowsOfPass(
  { policy, heads }: CachePlan,
  device: "cpu" | "cuda",
  chunk: number,
): number {
  if (policy.prefill === "steps") return 0;
  // A layer that keeps its window always has room.
  const room = heads.flat().map(({ whole, slots }) => whole ? Infinity : slots);
  const rows = Math.max(Math.min(PASS_ROWS[device], ...room), chunk);
  return rows === 1 ? 0 : rows;
}

/** Columns of what a step moves. */
function sizesOf(config: ModelConfig): Record<
  "width" | "qkv" | "attended" | "hidden" | "widest",
  number
> {
  const { width, hidden, heads, kvHeads, headDim } = config;
  const attended = heads * headDim;
  return {
    width,
    qkv: attended + 2 * kvHeads * headDim,
    attended,
    hidden,
    widest: Math.max(width, attended, hidden),
  };
}

function mostSlots({ heads }: CachePlan): number {
  return Math.max(...heads.flat().map(({ slots }) => slots));
}

/** Of wkv_attend or wkv_prefill, and of the linear ops. */
function cpuScratch(
  { config, quantised }: PlannedModel,
  plan: CachePlan,
  rows: number,
  threads: number,
): number {
  const { heads, kvHeads, headDim } = config;
  const group = heads / kvHeads;
  const stored = rowBytes(config, plan.cacheType) / kvHeads;
  const attendOf = ({ plan: { slots }, kvHeads }: GroupPlan): number => {
    let stretch = 128;
    while ((slots + 1) / stretch > 64) stretch *= 2;
    const stretches = Math.ceil((slots + 1) / stretch);
    const own = group * headDim + (group + 1) * roundUp(slots + 1, 16) +
      stretches * group * (2 + headDim);
    return plan.sequences * kvHeads * roundUp(4 * own + stored, 64);
  };
  const attend = Math.max(...plan.groups.map(attendOf));
  const length = roundUp(mostSlots(plan) + rows, 16);
  const prefill = rows === 0
    ? 0
    : 4 * length * (2 * headDim + 8 * group + 16 * threads + 4) +
      64 * threads * headDim + rows * stored;
  const { width, widest } = sizesOf(config);
  // Normed rows, and rounded ones with scale and sum of each 32.
  const linear = Math.max(rows, plan.sequences) *
    (4 * width + (quantised ? 1.25 * widest : 0));
  return Math.max(attend, prefill) + linear;
}

/** Of wkv_prefill or a linear op: one piece of memory. */
function cudaScratch(
  { config, quantised }: PlannedModel,
  plan: CachePlan,
  rows: number,
): number {
  const { headDim } = config;
  const exact = plan.cacheType === "f32" || headDim > 256;
  const wide = exact
    ? 4 * roundUp(headDim, 64)
    : 2 * (headDim <= 64 ? 64 : headDim <= 128 ? 128 : 256);
  const words = wordsOf(plan.policy);
  const prefillOf = ({ plan: { slots }, kvHeads }: GroupPlan): number => {
    const heads = config.heads / config.kvHeads * kvHeads;
    // Whole tiles of 128.
    const entries = roundUp(slots + rows, 128);
    const stored = rowBytes(config, plan.cacheType) / config.kvHeads * kvHeads;
    return wide * (heads * rows + 2 * kvHeads * entries) +
      rows * (stored + 4 * heads) + 4 * heads * entries +
      4 * kvHeads * entries * (12 + words);
  };
  const prefill = rows === 0 ? 0 : Math.max(...plan.groups.map(prefillOf));
  const { qkv, width, hidden, widest } = sizesOf(config);
  // Rows made ready, twice where a product writes over them; cuBLASLt's
  // workspace and results for weights that it takes.
  const most = Math.max(rows, plan.sequences);
  const linear = 4 * most * (widest + 1) +
    (quantised
      ? 4 * most * (width + 1)
      : (32 << 20) + 4 * most * Math.max(2 * hidden, qkv, width));
  return roundUp(Math.max(prefill, linear), 1 << 20);
}
