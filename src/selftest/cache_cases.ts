/**
 * The kernels with a cache as a table of shapes, types, policies and budgets:
 * every two values of them meet. run_cache.ts checks each row in f64.
 */

import type { CacheType, Positions } from "../cache/layout.ts";
import { choosesByStep, keepsAll, mergesRight } from "../cache/policy.ts";
import { findPolicy, policyNames } from "../cache/registry.ts";
import { pairwise } from "./pairs.ts";

/** What all cases of a cache say. */
export interface CacheCase {
  /** The policy. */
  policy: string;
  /** Tokens kept a KV head, or what `full` has room for. */
  budget: number;
  /** First tokens that never leave. */
  sinks: number;
  /** Newest tokens that never leave. */
  recent: number;
  /** Type of keys and values. */
  cacheType: CacheType;
  /** Where keys are rotated. */
  positions: Positions;
  /** Sequences. */
  sequences: number;
  /** Query heads a KV head. */
  group: number;
  /** KV heads. */
  kvHeads: number;
  /** Dimensions of a head. */
  headDim: number;
  /** Dimensions that are rotated. @default all */
  rotary?: number;
  /** Which dimensions a rotation turns together. */
  pairs: "half" | "interleaved";
  /** Scores s become cap tanh(s / cap). @default none */
  scoreCap?: number;
  /** Tokens that one looks back on. @default all */
  window?: number;
}

/**
 * Which ranks are forced to leave: the new token, the one before it (its value
 * goes into the new token's), the first, the newest and the oldest slot in
 * turns, ranks at the ends of blocks of 64 or of chunks of 8, or any, some left
 * free.
 */
export type Victims =
  | "new"
  | "before new"
  | "first"
  | "across"
  | "block ends"
  | "chunk ends"
  | "any";

/** Decode steps. */
export interface AttendCase extends CacheCase {
  /** The kernel. */
  kernel: "attend";
  /** Tokens that are cached before the first step. */
  kept: number;
  /** Steps. */
  steps: number;
  /** Ranks that are forced to leave. @default none */
  victims?: Victims;
}

/** Steps with weights from elsewhere. */
export interface InsertCase extends CacheCase {
  /** The kernel. */
  kernel: "insert";
  /** Steps. */
  steps: number;
  /** Ranks that are forced to leave. @default none */
  victims?: Victims;
}

/** Several tokens of one sequence at once. */
export interface PrefillCase extends CacheCase {
  /** The kernel. */
  kernel: "prefill";
  /** Tokens of each pass, one after the other. */
  passes: readonly number[];
}

/** Runs that must give the same bytes: again and again, or as one graph. */
export interface RepeatCase extends CacheCase {
  /** The kernel. */
  kernel: "repeat" | "graph";
  /** Runs of the case, or of the graph. */
  times: number;
}

/** One row of the table. */
export type CacheRow = AttendCase | InsertCase | PrefillCase | RepeatCase;

/** Types of keys and values. */
export const cacheTypes = ["f32", "f16", "bf16"] as const;
/** Head dimensions: those of models, and odd ones. */
export const headDims = [64, 80, 96, 128, 256, 2, 66] as const;
/** Query heads a KV head. */
export const groups = [1, 2, 3, 4, 5, 6, 7, 8, 16] as const;
/** Sequences. */
export const sequenceCounts = [1, 2, 3, 16] as const;
/** Where keys are rotated. */
export const placements = ["cache", "text"] as const;
/**
 * Policies whose steps can begin anywhere: a, n, keys and values are all that
 * they know of a token, and its value goes nowhere but to the right. The others
 * are followed from an empty cache, in the tests of steps.
 */
export const casePolicies: readonly string[] = policyNames().filter((name) => {
  const policy = findPolicy(name), { merge, prefill } = policy;
  return prefill === "sums" && (merge === "none" || mergesRight(policy));
});
const chunking = casePolicies.filter((name) =>
  !choosesByStep(findPolicy(name))
);
/** Budgets at the edges; 7 is 4 sinks and 3 recent tokens. */
export const edgeBudgets = [1, 2, 7, 63, 64, 65, 8192, 8193] as const;

const shapes = {
  cacheType: cacheTypes,
  headDim: headDims,
  group: groups,
  sequences: sequenceCounts,
  positions: placements,
  policy: casePolicies,
};

/** What a step of f64 costs: multiplications of one KV head. */
function cost(
  row: {
    budget?: number;
    headDim?: number;
    group?: number;
    sequences?: number;
  },
): number {
  const { budget = 1, headDim = 2, group = 1, sequences = 1 } = row;
  return budget * headDim * group * sequences;
}

const cheapEnough = (row: Parameters<typeof cost>[0]) =>
  cost(row) <= 8193 * 256 * 2;

/** Tokens that stay, so that at least one may leave. */
function protects(
  policy: string,
  budget: number,
): { sinks: number; recent: number } {
  if (keepsAll(findPolicy(policy))) return { sinks: 0, recent: 0 };
  if (budget === 1) return { sinks: 0, recent: 0 };
  if (budget === 2) return { sinks: 1, recent: 1 };
  if (budget === 7) return { sinks: 4, recent: 3 };
  const { sinks, recent } = findPolicy(policy).protects(budget);
  return sinks + recent <= budget ? { sinks, recent } : { sinks: 1, recent: 1 };
}

const kvHeadsOf = (row: Parameters<typeof cost>[0], i: number) =>
  cost(row) > 2e5 ? 1 : 1 + i % 3;

/** Heads that choose as one cannot be forced apart. */
const oneChoice = (policy: string) =>
  findPolicy(policy).select === "lowest-now";

const pairsOf = (i: number) => i % 2 === 0 ? "interleaved" : "half";

/** Steps that cross the budget, the edge budgets among them. */
const edges: AttendCase[] = pairwise(
  { ...shapes, budget: edgeBudgets },
  cheapEnough,
  1,
).map((row, i): AttendCase => {
  const full = keepsAll(findPolicy(row.policy));
  const steps = row.budget > 1000 ? 3 : 4;
  return {
    kernel: "attend",
    ...row,
    ...protects(row.policy, row.budget),
    kvHeads: kvHeadsOf(row, i),
    pairs: pairsOf(i),
    kept: Math.max(0, row.budget - (full ? steps : 1)),
    steps: full ? Math.min(steps, row.budget) : steps,
  };
});

/** Odd budgets, nearly empty caches, and rotations of some dimensions. */
const odd: AttendCase[] = pairwise(
  {
    ...shapes,
    budget: [3, 5, 17, 33, 100, 127, 129, 255, 257, 513, 1000, 4097],
    fill: ["over", "empty", "few", "half"],
  },
  cheapEnough,
  2,
).map(({ fill, ...row }, i): AttendCase => {
  const full = keepsAll(findPolicy(row.policy));
  const steps = row.budget > 1000 ? 2 : 3;
  const kept = {
    over: row.budget - (full ? steps : 1),
    empty: 0,
    few: Math.min(2 + i % 7, row.budget - steps),
    half: (row.budget - steps) >> 1,
  }[fill];
  const partly = row.headDim > 2 && i % 5 === 0;
  return {
    kernel: "attend",
    ...row,
    ...protects(row.policy, row.budget),
    ...partly ? { rotary: row.headDim / 2 & ~1 } : {},
    kvHeads: kvHeadsOf(row, i),
    pairs: pairsOf(i),
    kept: Math.max(0, kept),
    steps,
  };
});

const bounded = casePolicies.filter((name) => !keepsAll(findPolicy(name)));

/** Victims and neighbours at every place that a cache of blocks has. */
const forced: AttendCase[] = pairwise(
  {
    cacheType: cacheTypes,
    headDim: headDims,
    policy: bounded,
    positions: placements,
    victims: ["new", "before new", "first", "across", "block ends", "any"],
    budget: [2, 3, 64, 65, 130, 513, 1000, 2049],
  },
  cheapEnough,
  3,
).map((row, i): AttendCase => ({
  kernel: "attend",
  ...row,
  sinks: 0,
  recent: 0,
  sequences: 1 + i % 2,
  group: 1 + i % 4,
  kvHeads: oneChoice(row.policy) ? 1 : 1 + i % 2,
  pairs: pairsOf(i),
  kept: row.budget,
  steps: 3,
}));

/**
 * Values that are read again for more query heads, while their slot may be given
 * away: victims whose neighbours lie in another block, which has less to do.
 */
const again: AttendCase[] = ([
  ["f32", 128, 16],
  ["f32", 256, 16],
  ["f32", 256, 4],
  ["bf16", 66, 16],
] as const).flatMap(([cacheType, headDim, group]) =>
  [136, 520].map((budget, i): AttendCase => ({
    kernel: "attend",
    cacheType,
    headDim,
    policy: i === 0 ? "weighted-kv" : "h2o",
    positions: i === 0 ? "cache" : "text",
    victims: "chunk ends",
    budget,
    sinks: 0,
    recent: 0,
    sequences: 1,
    group,
    kvHeads: 1,
    pairs: pairsOf(i),
    kept: budget,
    steps: 3,
  }))
);

/** Caches of sinks alone: whatever the rule, the new token leaves. */
const sinksAlone: AttendCase[] = pairwise(
  { cacheType: cacheTypes, policy: bounded, budget: [1, 4, 65, 520] },
  () => true,
  9,
).map((row, i): AttendCase => ({
  kernel: "attend",
  ...row,
  headDim: 64,
  positions: placements[i % 2]!,
  sinks: row.budget,
  recent: 0,
  sequences: 1 + i % 2,
  group: 1 + i % 4,
  kvHeads: 1 + i % 2,
  pairs: pairsOf(i),
  kept: row.budget,
  steps: 2,
}));

/** Prompts that fit, that do not, and chunks behind them. */
const prefill: PrefillCase[] = pairwise(
  {
    ...shapes,
    policy: chunking,
    sequences: [1, 2],
    budget: [7, 64, 130, 320],
    passes: [
      [1],
      [2, 1, 5],
      [63],
      [64, 3],
      [65, 64],
      [20, 129, 1],
      [7, 300],
      [128, 17, 100],
    ] as readonly (readonly number[])[],
  },
  ({ passes = [1], headDim = 2, group = 1, budget = 320, policy }) => {
    const rows = passes.reduce((a, b) => a + b);
    const full = policy !== undefined && keepsAll(findPolicy(policy));
    return rows * rows * headDim * group <= 2.5e7 &&
      (!full || rows <= budget);
  },
  4,
).map((row, i): PrefillCase => ({
  kernel: "prefill",
  ...row,
  ...protects(row.policy, row.budget),
  kvHeads: row.headDim * row.group > 256 ? 1 : 1 + i % 3,
  pairs: pairsOf(i),
}));

/** Scores that are capped: of normal inputs they are a few units. */
const capped: AttendCase[] = pairwise(
  {
    cacheType: cacheTypes,
    headDim: [64, 80, 128, 256, 66],
    group: [1, 2, 4, 8, 16],
    positions: placements,
    policy: ["full", "weighted-kv", "weighted-kv-ward", "tova", "h2o"],
    budget: [7, 65, 257],
  },
  () => true,
  6,
).map((row, i): AttendCase => ({
  kernel: "attend",
  ...row,
  ...protects(row.policy, row.budget),
  sequences: 1 + i % 2,
  kvHeads: 1 + i % 3,
  pairs: pairsOf(i),
  scoreCap: [0.5, 2, 30][i % 3]!,
  kept: row.policy === "full" ? row.budget - 3 : row.budget,
  steps: 3,
}));

/** Groups between those of models, many sequences, and the longest full cache. */
const wide: AttendCase[] = ([
  [9, 64, 8192, 1],
  [12, 128, 8192, 1],
  [16, 64, 8192, 1],
  [10, 96, 257, 2],
  [11, 80, 130, 1],
  [12, 64, 513, 2],
  [13, 64, 64, 1],
  [14, 128, 63, 3],
  [15, 64, 1000, 1],
  [1, 128, 65, 64],
  [4, 64, 130, 64],
  [8, 128, 33, 64],
] as const).flatMap(([group, headDim, budget, sequences], i) =>
  ["weighted-kv", "weighted-kv-ward"].map((policy, p): AttendCase => ({
    kernel: "attend",
    policy,
    budget,
    ...protects(policy, budget),
    cacheType: cacheTypes[(i + p) % 3]!,
    positions: placements[i % 2]!,
    sequences,
    group,
    kvHeads: 1 + i % 2,
    headDim,
    pairs: pairsOf(i),
    kept: budget,
    steps: 2,
  }))
).concat(placements.map((positions, i): AttendCase => ({
  kernel: "attend",
  policy: "full",
  budget: 131072,
  sinks: 0,
  recent: 0,
  cacheType: cacheTypes[1 + i]!,
  positions,
  sequences: 1,
  group: 4,
  kvHeads: 1,
  headDim: 64,
  pairs: pairsOf(i),
  kept: 131070,
  steps: 2,
})));

/** Capped scores and sliding windows; one that the budget exceeds is all that is kept. */
const bent: PrefillCase[] = pairwise(
  {
    cacheType: cacheTypes,
    headDim: [64, 96, 128, 256],
    group: [1, 2, 8],
    policy: ["full", "weighted-kv", "eviction", "streaming-llm"],
    scoreCap: [undefined, 2],
    window: [undefined, 40, 70, 140],
    passes: [[20, 129, 1], [65, 64], [
      7,
      200,
    ]] as readonly (readonly number[])[],
  },
  ({ scoreCap, window }) => scoreCap !== undefined || window !== undefined,
  7,
).map(({ scoreCap, window, ...row }, i): PrefillCase => ({
  kernel: "prefill",
  ...row,
  ...row.policy === "full"
    ? { budget: 256, sinks: 0, recent: 0 }
    : { budget: 64, ...protects(row.policy, 64) },
  sequences: 1,
  kvHeads: 1 + i % 2,
  positions: "cache",
  pairs: pairsOf(i),
  ...scoreCap === undefined ? {} : { scoreCap },
  ...window === undefined ? {} : { window },
}));

const insert: InsertCase[] = pairwise(
  {
    cacheType: cacheTypes,
    headDim: headDims,
    policy: casePolicies,
    positions: placements,
    sequences: sequenceCounts,
    budget: [1, 2, 7, 65, 130],
  },
  () => true,
  5,
).map((row, i): InsertCase => ({
  kernel: "insert",
  ...row,
  ...protects(row.policy, row.budget),
  group: 1 + i % 3,
  kvHeads: oneChoice(row.policy) ? 1 : 1 + i % 3,
  pairs: pairsOf(i),
  steps: keepsAll(findPolicy(row.policy)) ? row.budget : row.budget + 3,
  ...i % 4 === 3 && row.budget > 7 && row.policy !== "full"
    ? { victims: "any" as const, sinks: 0, recent: 0 }
    : {},
}));

const repeat: RepeatCase[] = (["repeat", "graph"] as const).flatMap((kernel) =>
  (kernel === "graph"
    ? policyNames().filter((name) => name !== "full")
    : chunking.filter((name) => name !== "full")).flatMap((policy, i) =>
      [65, 1000].map((budget): RepeatCase => ({
        kernel,
        policy,
        budget,
        ...protects(policy, budget),
        cacheType: cacheTypes[(i + budget) % 3]!,
        positions: placements[i % 2]!,
        sequences: 1 + i % 3,
        group: 3,
        kvHeads: 3,
        headDim: 64,
        pairs: pairsOf(i),
        times: kernel === "repeat" ? budget === 65 ? 100 : 10 : 64,
      }))
    )
);

/** KV heads enough to fill a GPU, where scores are added up before values are. */
const crowded: AttendCase[] = [20, 40].flatMap((sequences, i) =>
  ["weighted-kv", "weighted-kv-ward", "vatp", "weighted-kv:literal"].map((
    policy,
    p,
  ): AttendCase => ({
    kernel: "attend",
    policy,
    budget: 200 - 70 * i,
    ...protects(policy, 200 - 70 * i),
    cacheType: cacheTypes[(i + p) % 3]!,
    positions: placements[p % 2]!,
    sequences,
    group: 2 + 3 * i,
    kvHeads: 4,
    headDim: 64,
    pairs: pairsOf(i),
    kept: 199 - 70 * i,
    steps: 3,
  }))
);

/** The table. */
export const cacheCases: CacheRow[] = [
  ...edges,
  ...odd,
  ...forced,
  ...again,
  ...sinksAlone,
  ...prefill,
  ...wide,
  ...crowded,
  ...capped,
  ...bent,
  ...insert,
  ...repeat,
];
