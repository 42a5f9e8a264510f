/**
 * Layers of real models as rows of the table of kernel cases; bench/kernels.ts
 * takes its shapes and its rows from here, so that what is timed is checked.
 */

import type { Precision } from "../backend/ops.ts";
import type { Dtype } from "../backend/tensor.ts";
import type { CacheType, Positions } from "../cache/layout.ts";
import { keepsAll } from "../cache/policy.ts";
import { findPolicy } from "../cache/registry.ts";
import type { AttendCase } from "./cache_cases.ts";
import { type GatedCase, type LinearCase, toleranceOf } from "./op_cases.ts";

/** Numbers of a model. */
export interface ModelShape {
  /** Layers. */
  layers: number;
  /** Columns between layers. */
  width: number;
  /** Columns inside the feed-forward part. */
  hidden: number;
  /** Query heads. */
  heads: number;
  /** KV heads. */
  kvHeads: number;
  /** Dimensions of a head. */
  headDim: number;
  /** Rows of the embedding. */
  vocabulary: number;
  /** Tokens that it was trained for. */
  context: number;
}

/** Models by name. */
export const modelShapes = {
  "llama-3-8b": {
    layers: 32,
    width: 4096,
    hidden: 14336,
    heads: 32,
    kvHeads: 8,
    headDim: 128,
    vocabulary: 128256,
    context: 8192,
  },
  "llama-2-7b": {
    layers: 32,
    width: 4096,
    hidden: 11008,
    heads: 32,
    kvHeads: 32,
    headDim: 128,
    vocabulary: 32000,
    context: 4096,
  },
  "smollm2-135m": {
    layers: 30,
    width: 576,
    hidden: 1536,
    heads: 9,
    kvHeads: 3,
    headDim: 64,
    vocabulary: 49152,
    context: 8192,
  },
  /** For tests. */
  "tiny": {
    layers: 2,
    width: 64,
    hidden: 96,
    heads: 4,
    kvHeads: 2,
    headDim: 16,
    vocabulary: 256,
    context: 512,
  },
} satisfies Record<string, ModelShape>;

/** What a decode step of attention is run with. */
export interface AttendSetting {
  /** The policy. */
  policy: string;
  /** Tokens kept a KV head. */
  budget: number;
  /** Type of keys and values. */
  cacheType: CacheType;
  /** Where keys are rotated. */
  positions: Positions;
  /** Sequences. */
  batch: number;
}

/** What `wkv bench kernels` times when it is told nothing. */
export const defaultSetting: AttendSetting = {
  policy: "weighted-kv",
  budget: 1024,
  cacheType: "f16",
  positions: "cache",
  batch: 1,
};

/** What bench/gpu.ts times beside the peers, with llama-3-8b. */
export const peerSizes = {
  cacheType: "bf16",
  budgets: [512, 1024, 2048, 8192],
  batches: [1, 16],
} as const;

/** The row of a decode step with a model's heads, the cache full. */
export function attendCase(
  { heads, kvHeads, headDim }: ModelShape,
  { policy, budget, cacheType, positions, batch }: AttendSetting,
): AttendCase {
  const full = keepsAll(findPolicy(policy));
  const steps = 2;
  return {
    kernel: "attend",
    policy,
    budget,
    ...full ? { sinks: 0, recent: 0 } : findPolicy(policy).protects(budget),
    cacheType,
    positions,
    sequences: batch,
    group: heads / kvHeads,
    kvHeads,
    headDim,
    pairs: "interleaved",
    kept: full ? budget - steps : budget,
    steps,
  };
}

/** The products of a layer, and the last one. */
export type LinearOp = "qkv" | "output" | "down" | "head";

/** The row of one product of a model. */
export function linearCase(
  shape: ModelShape,
  op: LinearOp,
  { dtype, precision, rows }: {
    dtype: Dtype;
    precision: Precision;
    rows: number;
  },
): LinearCase {
  const { width, hidden, heads, kvHeads, headDim, vocabulary } = shape;
  const { columns, outputs, ...kind } = {
    qkv: {
      columns: width,
      outputs: (heads + 2 * kvHeads) * headDim,
      norm: true,
    },
    output: { columns: heads * headDim, outputs: width, add: true },
    down: { columns: hidden, outputs: width, add: true },
    head: { columns: width, outputs: vocabulary, norm: true },
  }[op];
  return {
    kernel: "linear",
    dtype,
    precision,
    rows,
    columns,
    outputs,
    ...kind,
    distinct: DISTINCT,
    tolerance: toleranceOf(dtype, precision),
  };
}

/** Weights' rows that differ; a prime, so that no tile holds the rows of another. */
const DISTINCT = 61;

/** The row of the gated product of a model. */
export function gatedCase(
  { width, hidden }: ModelShape,
  { dtype, precision, rows }: {
    dtype: Dtype;
    precision: Precision;
    rows: number;
  },
): GatedCase {
  return {
    kernel: "gated",
    dtype,
    precision,
    rows,
    columns: width,
    outputs: hidden,
    distinct: DISTINCT,
    tolerance: toleranceOf(dtype, precision),
  };
}

const llama = modelShapes["llama-3-8b"];
const weights = { dtype: "BF16", precision: "f32", rows: 1 } as const;

/** Rows of the table with a cache. */
export const modelCacheCases: AttendCase[] = [
  ...(["llama-3-8b", "llama-2-7b", "smollm2-135m"] as const).map((name) =>
    attendCase(modelShapes[name], defaultSetting)
  ),
  ...peerSizes.batches.flatMap((batch) =>
    peerSizes.budgets.map((budget) =>
      attendCase(llama, {
        ...defaultSetting,
        cacheType: peerSizes.cacheType,
        budget,
        batch,
      })
    )
  ),
];

/** Rows of the table without one; a head of llama-3-8b would be a gigabyte. */
export const modelOpCases: (LinearCase | GatedCase)[] = [
  ...(["qkv", "output", "down"] as const).map((op) =>
    linearCase(llama, op, weights)
  ),
  linearCase(modelShapes["smollm2-135m"], "head", weights),
  gatedCase(llama, weights),
];
