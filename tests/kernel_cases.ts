/**
 * Every kernel as a table of shapes, types and tolerances; kernels_test.ts
 * checks each row against f64 formulas, whatever the device.
 */

import type { Precision } from "../src/backend/ops.ts";
import type { Dtype } from "../src/backend/tensor.ts";
import type { CacheType } from "../src/cache/cache.ts";
import type { Layer } from "./attention.ts";

/** `out = norm(x) w^T + bias (+ out)`. */
export interface LinearCase {
  /** The kernel. */
  kernel: "linear";
  /** Type of the weights. */
  dtype: Dtype;
  /** How the input is held. */
  precision: Precision;
  /** Rows of the input, C, and rows of the weights, J. */
  rows: number;
  /** Columns of input and weights. */
  columns: number;
  /** Rows of the weights. */
  outputs: number;
  /** Applies a norm to the input. */
  norm?: boolean;
  /** Adds a bias. */
  bias?: boolean;
  /** Adds what `out` held. */
  add?: boolean;
  /** The first row of the input. */
  xRow?: number;
  /** The first column of `out`. */
  outColumn?: number;
  /** Makes the scales of quantised blocks subnormal halves. */
  subnormal?: boolean;
  /** Relative error that is allowed. */
  tolerance: number;
}

/** `out = silu(norm(x) gate^T) * (norm(x) up^T)`. */
export interface GatedCase {
  /** The kernel. */
  kernel: "gated";
  /** Type of the gate. */
  dtype: Dtype;
  /** Type of the other matrix. @default the gate's */
  upDtype?: Dtype;
  /** How the input is held. */
  precision: Precision;
  /** Rows of the input. */
  rows: number;
  /** Columns of the input. */
  columns: number;
  /** Rows of both matrices. */
  outputs: number;
  /** Relative error that is allowed. */
  tolerance: number;
}

/** Rows of a table. */
export interface EmbedCase {
  /** The kernel. */
  kernel: "embed";
  /** Type of the table. */
  dtype: Dtype;
  /** Tokens. */
  rows: number;
  /** Columns of the table. */
  columns: number;
  /** Rows of the table. */
  vocabulary: number;
  /** Relative error that is allowed. */
  tolerance: number;
}

/** `out = x / sqrt(mean(x^2) + epsilon) * weight`. */
export interface RmsnormCase {
  /** The kernel. */
  kernel: "rmsnorm";
  /** Rows of the input. */
  rows: number;
  /** Columns of the input. */
  columns: number;
  /** Writes over the input. */
  inPlace?: boolean;
  /** Relative error that is allowed. */
  tolerance: number;
}

/** The first of the highest logits. */
export interface ArgmaxCase {
  /** The kernel. */
  kernel: "argmax";
  /** Sequences. */
  rows: number;
  /** Logits of one. */
  vocabulary: number;
  /** No error is allowed. */
  tolerance: 0;
}

/** The logarithm of a softmax. */
export interface LogProbCase {
  /** The kernel. */
  kernel: "logProb";
  /** Rows of logits. */
  rows: number;
  /** Logits of one. */
  vocabulary: number;
  /** Absolute error that is allowed. */
  tolerance: number;
}

/** One decode step of attention. */
export interface AttendCase {
  /** The kernel. */
  kernel: "attend";
  /** Shape of the layer. */
  layer: Layer;
  /** Tokens cached before the step. */
  kept: number;
  /** Type of the cache. */
  cacheType: CacheType;
  /** Sequences. */
  sequences: number;
  /** Relative error of outputs and of each head's weights that is allowed. */
  tolerance: number;
}

/** One row of the table. */
export type KernelCase =
  | LinearCase
  | GatedCase
  | EmbedCase
  | RmsnormCase
  | ArgmaxCase
  | LogProbCase
  | AttendCase;

/** Types of weights. */
export const weightTypes = [
  "F32",
  "F16",
  "BF16",
  "Q8_0",
  "Q4_0",
  "Q4_1",
] as const satisfies Dtype[];

const precisions: Precision[] = ["f32", "int8"];
const tolerance = 1e-5;

const linear: LinearCase[] = weightTypes.flatMap((dtype) =>
  precisions.flatMap((precision): LinearCase[] => {
    const common = { kernel: "linear" as const, dtype, precision, tolerance };
    const rowCounts = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 70];
    const outputCounts = [1, 2, 3, 7, 8, 9, 15, 17, 33, 65, 97];
    const columnCounts = dtype.startsWith("Q")
      ? [32, 64, 96, 160, 576, 1536]
      : [1, 2, 7, 8, 31, 33, 64, 100, 576, 1537];
    return [
      ...rowCounts.map((rows) => ({
        ...common,
        rows,
        columns: 96,
        outputs: 33,
      })),
      ...outputCounts.flatMap((outputs) =>
        [1, 6].map((rows) => ({ ...common, rows, columns: 64, outputs }))
      ),
      ...columnCounts.flatMap((columns) =>
        [1, 5, 18].map((rows) => ({ ...common, rows, columns, outputs: 24 }))
      ),
      ...[1, 5, 20].flatMap((rows) => [
        { ...common, rows, columns: 96, outputs: 19, norm: true },
        { ...common, rows, columns: 96, outputs: 19, bias: true },
        { ...common, rows, columns: 96, outputs: 19, add: true },
        { ...common, rows, columns: 96, outputs: 19, xRow: 3 },
        { ...common, rows, columns: 96, outputs: 19, outColumn: 11 },
        {
          ...common,
          rows,
          columns: 128,
          outputs: 21,
          norm: true,
          bias: true,
          add: true,
          xRow: 2,
          outColumn: 5,
        },
      ]),
      ...(dtype.startsWith("Q")
        ? [1, 9].map((rows) => ({
          ...common,
          rows,
          columns: 128,
          outputs: 17,
          subnormal: true,
        }))
        : []),
    ];
  })
);

const gated: GatedCase[] = [
  ...weightTypes.flatMap((dtype) =>
    precisions.flatMap((precision) =>
      [1, 2, 7, 8, 17, 40].flatMap((rows) =>
        [1, 7, 40].map((outputs): GatedCase => ({
          kernel: "gated",
          dtype,
          precision,
          rows,
          columns: 96,
          outputs,
          tolerance,
        }))
      )
    )
  ),
  ...precisions.flatMap((precision) =>
    [1, 9].map((rows): GatedCase => ({
      kernel: "gated",
      dtype: "Q4_1",
      upDtype: "Q8_0",
      precision,
      rows,
      columns: 64,
      outputs: 13,
      tolerance,
    }))
  ),
];

const embed: EmbedCase[] = weightTypes.flatMap((dtype) =>
  [1, 7, 40].map((rows): EmbedCase => ({
    kernel: "embed",
    dtype,
    rows,
    columns: 96,
    vocabulary: 19,
    tolerance: 1e-6,
  }))
);

const rmsnorm: RmsnormCase[] = [1, 2, 9, 33].flatMap((rows) =>
  [1, 2, 7, 8, 31, 64, 100, 576, 4096].flatMap((columns) =>
    [false, true].map((inPlace): RmsnormCase => ({
      kernel: "rmsnorm",
      rows,
      columns,
      inPlace,
      tolerance: 1e-6,
    }))
  )
);

const argmax: ArgmaxCase[] = [1, 3].flatMap((rows) =>
  [1, 2, 7, 8, 9, 31, 64, 1000, 49152].map((vocabulary): ArgmaxCase => ({
    kernel: "argmax",
    rows,
    vocabulary,
    tolerance: 0,
  }))
);

const logProb: LogProbCase[] = [1, 3, 20].flatMap((rows) =>
  [1, 2, 7, 8, 9, 33, 1000, 49152].map((vocabulary): LogProbCase => ({
    kernel: "logProb",
    rows: vocabulary > 1000 ? Math.min(rows, 2) : rows,
    vocabulary,
    tolerance,
  }))
);

const layers: Layer[] = [
  { heads: 9, kvHeads: 3, headDim: 64 },
  { heads: 2, kvHeads: 2, headDim: 80, pairs: "half" },
  { heads: 8, kvHeads: 1, headDim: 128, pairs: "half" },
  { heads: 3, kvHeads: 1, headDim: 10, rotary: 6 },
  { heads: 4, kvHeads: 2, headDim: 256 },
];

const attend: AttendCase[] = layers.flatMap((layer, i) =>
  (["f32", "f16", "bf16"] as const).flatMap((cacheType) =>
    (i === 0 ? [0, 1, 7, 8, 15, 16, 17, 63, 64, 65, 127, 257, 600] : [0, 5, 70])
      .map((kept): AttendCase => ({
        kernel: "attend",
        layer,
        kept,
        cacheType,
        sequences: kept > 100 ? 1 : kept % 3 + 1,
        tolerance: 1e-5,
      }))
  )
);

/** The table. */
export const kernelCases: KernelCase[] = [
  ...linear,
  ...gated,
  ...embed,
  ...rmsnorm,
  ...argmax,
  ...logProb,
  ...attend,
];

/** A row's name, such as `linear dtype Q8_0 rows 3`. */
export function caseName(row: KernelCase): string {
  return Object.entries(row).map(([key, value]) => {
    if (key === "kernel") return value;
    return value === true
      ? key
      : `${key} ${typeof value === "object" ? JSON.stringify(value) : value}`;
  }).join(" ");
}
