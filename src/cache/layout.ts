/** What a cache is made of, resolved to what each of its layers keeps, and the bytes that takes: without a library. Used by KvCache, `wkv info` and `wkv plan`. */

import {
  type BudgetSize,
  type LayerBudgets,
  layerBudgets,
  parseBudget,
} from "./budget.ts";
import {
  type Budget,
  keepsAll,
  MAX_SLOTS,
  type Policy,
  resolveBudget,
} from "./policy.ts";
import { findPolicy } from "./registry.ts";

/** Element types of cached keys and values. */
export type CacheType = "f32" | "f16" | "bf16";

/** Where keys are rotated: at their rank in the cache, or at their place in the text. */
export type Positions = "cache" | "text";

/** What a cache is made of. */
export interface CacheOptions {
  /** The policy's name. @default `"weighted-kv"` */
  policy?: string | undefined;
  /** How much is kept a KV head; no meaning for `full`. @default `256` tokens */
  budget?: BudgetSize | undefined;
  /** How the budget is spread over the layers. @default `"constant"` */
  layerBudgets?: LayerBudgets | undefined;
  /** First tokens that never leave. @default by policy */
  sinks?: number | undefined;
  /** Newest tokens that never leave. @default by policy */
  recent?: number | undefined;
  /** Tokens that leave, one after another, when it overflows. @default by policy */
  interval?: number | undefined;
  /** Of policies that draw: a whole number below 2^31. @default `0` */
  seed?: number | undefined;
  /** Where keys are rotated. @default `"cache"` */
  positions?: Positions | undefined;
  /** Type of keys and values. @default `"f16"` */
  cacheType?: CacheType | undefined;
  /** Sequences that are fed side by side. @default `1` */
  sequences?: number | undefined;
  /** Tokens that `full` has room for. @default the model's context */
  capacity?: number | undefined;
}

/** The shape that a model gives its caches. */
export interface CacheShape {
  /** Layers. */
  layers: number;
  /** Query heads. */
  heads: number;
  /** Key and value heads. */
  kvHeads: number;
  /** Dimensions of a head. */
  headDim: number;
  /** Tokens that the model was made for. */
  context: number;
  /** What products of queries and keys are multiplied by. @default 1 / sqrt(D) */
  scale?: number;
  /** Scores s become cap tanh(s / cap). @default none */
  scoreCap?: number | undefined;
  /** Tokens that a layer looks back on, the new one counted, and which layers. @default none */
  window?:
    | { tokens: number; layers: readonly boolean[] }
    | undefined;
}

/** What the cache of one layer is. */
export interface LayerPlan {
  /** Tokens kept a KV head. */
  slots: number;
  /** First tokens that never leave. */
  sinks: number;
  /** Newest tokens that never leave. */
  recent: number;
  /** Tokens that leave when it overflows. */
  interval: number;
  /** Whether it keeps the model's window as it is, whatever the policy. */
  whole: boolean;
  /** Tokens that the layer looks back on; 0 for all. */
  window: number;
}

/** A whole cache, every option resolved; of `full`, `budget` is what it has room for. */
export interface CachePlan extends Budget {
  /** The policy, its option included in the name. */
  policy: Policy;
  /** Where keys are rotated. */
  positions: Positions;
  /** Type of keys and values. */
  cacheType: CacheType;
  /** Sequences fed side by side. */
  sequences: number;
  /** What each layer keeps. */
  layers: LayerPlan[];
  /** Layers that are alike, which share a cache of the library. */
  groups: { plan: LayerPlan; layers: number[] }[];
  /** The layer that follows the policy whose slots are nearest to the budget. */
  typical: number;
  /** The longest text that rotations are for. */
  reach: number;
}

/**
 * Resolves what a cache is made of.
 *
 * @throws {RangeError} An option is out of range.
 */
export function planCache(
  shape: CacheShape,
  options: CacheOptions = {},
): CachePlan {
  const { positions = "cache", cacheType = "f16", sequences = 1 } = options;
  if (positions !== "cache" && positions !== "text") {
    throw new RangeError(
      `The positions must be cache or text: current value is "${positions}"`,
    );
  }
  if (!Object.hasOwn(BYTES, cacheType)) {
    throw new RangeError(
      `The cache type must be f32, f16 or bf16: current value is "${cacheType}"`,
    );
  }
  if (!Number.isInteger(sequences) || sequences < 1 || sequences > 4096) {
    throw new RangeError(
      `The sequences must be a whole number between 1 and 4096: current value is ${sequences}`,
    );
  }
  const policy = findPolicy(options.policy ?? "weighted-kv");
  const full = keepsAll(policy);
  const capacity = options.capacity ?? shape.context;
  if (
    full &&
    (!Number.isInteger(capacity) || capacity < 1 || capacity > MAX_SLOTS)
  ) {
    throw new RangeError(
      `The capacity must be a whole number between 1 and ${MAX_SLOTS}: current value is ${capacity}`,
    );
  }
  const resolve = (budget: number): Budget =>
    full
      ? { budget, sinks: 0, recent: 0, interval: 1 }
      : resolveBudget(policy, budget, options);
  const all = resolve(
    full ? capacity : tokensOf(options.budget ?? 256, capacity),
  );
  const budgets = layerBudgets(
    full ? "constant" : options.layerBudgets ?? "constant",
    all.budget,
    shape.layers,
  );
  const layers = budgets.map((budget, layer) =>
    naming(
      budget === all.budget ? "" : `Layer ${layer} of ${shape.layers}: `,
      () => planLayer(shape, layer, resolve(budget), full, positions),
    )
  );
  const reach = full
    ? all.budget
    : positions === "cache"
    ? all.budget + 1
    : Math.max(shape.context, all.budget + 1);
  const typical = typicalLayer(layers, all.budget);
  return {
    ...all,
    policy,
    positions,
    cacheType,
    sequences,
    layers,
    groups: groupsOf(layers),
    typical,
    reach,
  };
}

/** One layer: the policy's, or the model's window where that is no larger. */
function planLayer(
  { window }: CacheShape,
  layer: number,
  { budget, sinks, recent, interval }: Budget,
  full: boolean,
  positions: Positions,
): LayerPlan {
  const tokens = window?.layers[layer] ? window.tokens : 0;
  const plan = { slots: budget, sinks, recent, interval };
  if (tokens === 0) return { ...plan, whole: false, window: 0 };
  if (budget + (full ? 0 : 1) > tokens) {
    const kept = { slots: tokens - 1, sinks: 0, recent: 0, interval: 1 };
    return { ...kept, whole: true, window: tokens };
  }
  if (positions === "text" && !full) {
    throw new RangeError(
      `The model's layer ${layer} looks back on ${tokens} tokens of the text: take positions in the cache, or a budget of at least ${tokens}, current value is ${budget}`,
    );
  }
  return { ...plan, whole: false, window: tokens };
}

const BYTES: Readonly<Record<CacheType, number>> = { f32: 4, f16: 2, bf16: 2 };

/** Bytes of the keys and values of one token in one layer. */
export function rowBytes(shape: CacheShape, cacheType: CacheType): number {
  return 2 * shape.kvHeads * shape.headDim * BYTES[cacheType];
}

/** Tokens that each layer of a full cache holds of a text. */
export function layerRows(shape: CacheShape, tokens: number): number[] {
  const { layers, window } = shape;
  return Array.from(
    { length: layers },
    (_, i) => window?.layers[i] ? Math.min(tokens, window.tokens - 1) : tokens,
  );
}

function groupsOf(plans: readonly LayerPlan[]): CachePlan["groups"] {
  const groups: CachePlan["groups"] = [];
  plans.forEach((plan, layer) => {
    const group = groups.find((group) => samePlan(group.plan, plan));
    if (group) group.layers.push(layer);
    else groups.push({ plan, layers: [layer] });
  });
  return groups;
}

function samePlan(a: LayerPlan, b: LayerPlan): boolean {
  return a.slots === b.slots && a.sinks === b.sinks && a.recent === b.recent &&
    a.interval === b.interval && a.whole === b.whole && a.window === b.window;
}

/** The layer that follows the policy whose slots are nearest to the budget. */
function typicalLayer(plans: readonly LayerPlan[], budget: number): number {
  const off = ({ slots, whole }: LayerPlan) =>
    whole ? Infinity : Math.abs(slots - budget);
  let best = 0;
  plans.forEach((plan, i) => {
    if (off(plan) < off(plans[best]!)) best = i;
  });
  return best;
}

/** Says in a refusal what it is about. */
function naming<T>(what: string, body: () => T): T {
  try {
    return body();
  } catch (cause) {
    if (!(cause instanceof RangeError)) throw cause;
    throw new RangeError(what + cause.message, { cause });
  }
}

/** A budget in tokens, a share being one of what a full cache would hold. */
function tokensOf(size: BudgetSize, capacity: number): number {
  // A number's own message says most.
  if (typeof size === "number") return size;
  const parsed = parseBudget(size);
  if (parsed.kind === "tokens") return parsed.tokens;
  if (parsed.kind === "share") {
    return Math.max(1, Math.floor(parsed.share * capacity));
  }
  throw new RangeError(
    `A budget in bytes is resolved by a model's createCache: current value is "${size}"`,
  );
}
