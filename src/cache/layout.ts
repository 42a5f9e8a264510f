/** What a cache is made of, resolved to what each of its layers keeps, and the bytes that takes: without a library. Used by KvCache, `wkv info` and `wkv plan`. */

import {
  type BudgetSize,
  headBudgets,
  type LayerBudgets,
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
  /** How the budget is spread over the layers and KV heads. @default `"constant"` */
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

/** What the cache of one KV head is. */
export interface HeadPlan {
  /** Tokens kept. */
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
  /** What each KV head of each layer keeps. */
  heads: HeadPlan[][];
  /** Caches of the library. */
  groups: GroupPlan[];
  /** The head that follows the policy whose slots are nearest to the budget. */
  typical: HeadPlace;
  /** The longest text that rotations are for. */
  reach: number;
}

/** A KV head. */
export interface HeadPlace {
  /** Its layer. */
  layer: number;
  /** Which of the layer's KV heads it is. */
  head: number;
}

/** A cache of the library, whose heads are all alike. */
export interface GroupPlan {
  /** What each of its heads keeps. */
  plan: HeadPlan;
  /** KV heads that each of its layers has: all of the model's, or one. */
  kvHeads: number;
  /** The first head of each of its layers. */
  places: HeadPlace[];
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
  const all = full
    ? { budget: capacity, sinks: 0, recent: 0, interval: 1 }
    : resolveBudget(policy, tokensOf(options.budget ?? 256, capacity), options);
  const heads = planHeads(shape, options, { policy, full, positions }, all);
  const most = Math.max(
    all.budget,
    ...heads.flat().map(({ slots, whole }) => whole ? 0 : slots),
  );
  const reach = full
    ? all.budget
    : positions === "cache"
    ? most + 1
    : Math.max(shape.context, most + 1);
  return {
    ...all,
    policy,
    positions,
    cacheType,
    sequences,
    heads,
    groups: groupsOf(heads),
    typical: typicalHead(heads, all.budget),
    reach,
  };
}

/** What each head of each layer keeps; `all` is the mean's. */
function planHeads(
  shape: CacheShape,
  options: CacheOptions,
  { policy, full, positions }: {
    policy: Policy;
    full: boolean;
    positions: Positions;
  },
  all: Budget,
): HeadPlan[][] {
  const { layers, kvHeads } = shape;
  const plan = (layer: number, budget: number) => {
    const own = budget === all.budget
      ? all
      : resolveHead(policy, options, budget, all.recent);
    return planHead(shape, layer, own, full, positions);
  };
  const spread = full ? "constant" : options.layerBudgets ?? "constant";
  return headBudgets(spread, all.budget, layers, kvHeads).map((own, layer) => {
    const even = isEven(own);
    if (!even && policy.select === "lowest-now") {
      throw new RangeError(
        `The policy ${policy.name} chooses for all KV heads of a layer at once, so they cannot have budgets of their own`,
      );
    }
    return own.map((budget, head) =>
      naming(
        budget === all.budget ? "" : nameOf(shape, layer, even ? null : head),
        () => plan(layer, budget),
      )
    );
  });
}

/** More room is for older tokens: no head protects more recent ones than it would at the mean. */
function resolveHead(
  policy: Policy,
  options: CacheOptions,
  budget: number,
  most: number,
): Budget {
  const own = resolveBudget(policy, budget, options);
  if (own.recent <= most) return own;
  return resolveBudget(policy, budget, { ...options, recent: most });
}

function isEven(budgets: readonly number[]): boolean {
  return budgets.every((budget) => budget === budgets[0]);
}

function nameOf(
  { layers, kvHeads }: CacheShape,
  layer: number,
  head: number | null,
): string {
  const which = head === null ? "" : `KV head ${head} of ${kvHeads} in `;
  const name = `${which}layer ${layer} of ${layers}: `;
  return name[0]!.toUpperCase() + name.slice(1);
}

/** One head: the policy's, or the model's window where that is no larger. */
function planHead(
  { window }: CacheShape,
  layer: number,
  { budget, sinks, recent, interval }: Budget,
  full: boolean,
  positions: Positions,
): HeadPlan {
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

/** Layers whose heads are alike have a cache together, other heads each one alone. */
function groupsOf(heads: readonly HeadPlan[][]): GroupPlan[] {
  const groups: GroupPlan[] = [];
  const put = (plan: HeadPlan, kvHeads: number, place: HeadPlace) => {
    const group = groups.find((group) =>
      group.kvHeads === kvHeads && samePlan(group.plan, plan)
    );
    if (group) group.places.push(place);
    else groups.push({ plan, kvHeads, places: [place] });
  };
  heads.forEach((own, layer) => {
    if (own.every((plan) => samePlan(plan, own[0]!))) {
      return put(own[0]!, own.length, { layer, head: 0 });
    }
    own.forEach((plan, head) => put(plan, 1, { layer, head }));
  });
  return groups;
}

function samePlan(a: HeadPlan, b: HeadPlan): boolean {
  return a.slots === b.slots && a.sinks === b.sinks && a.recent === b.recent &&
    a.interval === b.interval && a.whole === b.whole && a.window === b.window;
}

/** The head that follows the policy whose slots are nearest to the budget. */
function typicalHead(
  heads: readonly HeadPlan[][],
  budget: number,
): HeadPlace {
  const off = ({ slots, whole }: HeadPlan) =>
    whole ? Infinity : Math.abs(slots - budget);
  let best = { layer: 0, head: 0 };
  heads.forEach((own, layer) =>
    own.forEach((plan, head) => {
      if (off(plan) < off(heads[best.layer]![best.head]!)) {
        best = { layer, head };
      }
    })
  );
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
