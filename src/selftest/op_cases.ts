/**
 * The kernels without a cache as a table of shapes, types and tolerances;
 * run_ops.ts checks each row against its formula in f64.
 */

import type { Activation, Precision } from "../backend/ops.ts";
import {
  blockColumns,
  type Dtype,
  dtypes,
  isQuantised,
} from "../backend/tensor.ts";

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
  /** Rows of the weights that differ; the others repeat them. @default all */
  distinct?: number;
  /** Relative error that is allowed. */
  tolerance: number;
}

/** `out = activation(norm(x) gate^T) * (norm(x) up^T)`. */
export interface GatedCase {
  /** The kernel. */
  kernel: "gated";
  /** Type of the gate. */
  dtype: Dtype;
  /** Type of the other matrix. @default the gate's */
  upDtype?: Dtype;
  /** What the gate goes through. @default `"silu"` */
  activation?: Activation;
  /** How the input is held. */
  precision: Precision;
  /** Rows of the input. */
  rows: number;
  /** Columns of the input. */
  columns: number;
  /** Rows of both matrices. */
  outputs: number;
  /** Rows of each that differ; the others repeat them. @default all */
  distinct?: number;
  /** Relative error that is allowed. */
  tolerance: number;
}

/** The products of a layer between two attentions, recorded as one graph: a GPU may make one launch of them. */
export interface ChainCase {
  /** The kernel. */
  kernel: "chain";
  /** Type of the weights, or of those of the feed-forward part too. */
  dtypes: Dtype | [Dtype, Dtype];
  /** Columns of what attention gives. */
  attended: number;
  /** Columns between layers. */
  width: number;
  /** Columns inside the feed-forward part. */
  hidden: number;
  /** Rows of queries, keys and values: of one matrix, or of several. */
  outputs: number | number[];
  /** What the gate goes through. @default `"silu"` */
  activation?: Activation;
  /** Adds biases. */
  bias?: boolean;
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
  /** What rows are multiplied by. @default `1` */
  scale?: number;
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
  /** Adds to what is there. */
  add?: boolean;
  /** Relative error that is allowed. */
  tolerance: number;
}

/** Norms of queries and keys where they lie. */
export interface QkNormCase {
  /** The kernel. */
  kernel: "qkNorm";
  /** Rows. */
  rows: number;
  /** Query heads. */
  heads: number;
  /** Key and value heads. */
  kvHeads: number;
  /** Dimensions of a head. */
  headDim: number;
  /** All heads of a row together, not each on its own. */
  all?: boolean;
  /** Relative error that is allowed. */
  tolerance: number;
}

/** `x = cap tanh(x / cap)`. */
export interface SoftcapCase {
  /** The kernel. */
  kernel: "softcap";
  /** Rows. */
  rows: number;
  /** Columns. */
  columns: number;
  /** The cap. */
  cap: number;
  /** Relative error that is allowed. */
  tolerance: number;
}

/** Tokens drawn from logits. */
export interface SampleCase {
  /** The kernel. */
  kernel: "sample";
  /** Sequences. */
  rows: number;
  /** Logits of one. */
  vocabulary: number;
  /** 0 takes the first of the highest. */
  temperature: number;
  /** Tokens that may be drawn; 0 is all. */
  topK: number;
  /** Their share; 1 is all. */
  topP: number;
  /** Their least probability, as a share of the highest. */
  minP: number;
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

/** wkv_divergence: rows of logits against the same with noise. */
export interface DivergenceCase {
  /** The kernel. */
  kernel: "divergence";
  /** Rows of logits. */
  rows: number;
  /** Logits of one. */
  vocabulary: number;
  /** Absolute error that is allowed. */
  tolerance: number;
}

/** One row of the table. */
export type OpCase =
  | LinearCase
  | GatedCase
  | ChainCase
  | EmbedCase
  | RmsnormCase
  | QkNormCase
  | SoftcapCase
  | SampleCase
  | LogProbCase
  | DivergenceCase;

/** Types of weights. */
export const weightTypes = dtypes.filter((dtype) => dtype !== "I32");

/** Columns, rounded up to whole blocks. */
export function wholeBlocks(dtype: Dtype, columns: number): number {
  const block = blockColumns(dtype);
  return Math.ceil(columns / block) * block;
}

const precisions: Precision[] = ["f32", "int8"];
const tolerance = 1e-5;

/**
 * The error that a product with weights of this type may have. On a GPU x meets
 * 16-bit weights as two f16 numbers: 22 bits of it.
 */
export function toleranceOf(dtype: Dtype, precision: Precision): number {
  if (!dtype.endsWith("F16")) return tolerance;
  if (precision !== "half") return 3e-5;
  // Rounded once, and what a gate multiplies once more: halves of a last place.
  return dtype === "BF16" ? 2 ** -8 : 2 ** -11;
}

const linear: LinearCase[] = weightTypes.flatMap((dtype) =>
  precisions.flatMap((precision): LinearCase[] => {
    const common = {
      kernel: "linear" as const,
      dtype,
      precision,
      tolerance: toleranceOf(dtype, precision),
    };
    // Types that share their loops with others need fewer shapes.
    const shared = dtype.startsWith("Q5") || dtype.startsWith("IQ") ||
      blockColumns(dtype) === 256;
    const rowCounts = shared
      ? [1, 3, 4, 5, 8, 9, 65]
      : [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 130];
    const outputCounts = shared
      ? [1, 7, 8, 9, 33]
      : [1, 2, 3, 7, 8, 9, 15, 17, 33, 65, 97];
    const columnCounts = blockColumns(dtype) === 256
      ? [256, 512, 768, 1536]
      : isQuantised(dtype)
      ? [32, 64, 96, 160, 576, 1536]
      : [1, 2, 7, 8, 31, 33, 64, 100, 576, 1537];
    const rows: LinearCase[] = [
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
      ...(isQuantised(dtype)
        ? [1, 9].map((rows) => ({
          ...common,
          rows,
          columns: 128,
          outputs: 17,
          subnormal: true,
        }))
        : []),
    ];
    // Rounded up, some are the same.
    const all = rows.map((row) =>
      JSON.stringify({
        ...row,
        columns: wholeBlocks(dtype, row.columns),
      })
    );
    return [...new Set(all)].map((row) => JSON.parse(row));
  })
);

/**
 * Passes of a prompt, where the CUDA library may call cuBLASLt: from 256 rows
 * on, 2048 columns of inputs that were not rounded and 256 MiB of results at a time.
 */
const passes: (LinearCase | GatedCase)[] = ([
  ["F32", "f32"],
  ["F16", "f32"],
  ["BF16", "f32"],
  ["F16", "half"],
  ["BF16", "half"],
] as const)
  .flatMap(([dtype, precision]) => {
    const common = {
      dtype,
      precision,
      tolerance: toleranceOf(dtype, precision),
    };
    const linear = { kernel: "linear" as const, ...common };
    const gated = { kernel: "gated" as const, ...common };
    return [
      { ...linear, rows: 255, columns: 96, outputs: 65 },
      { ...linear, rows: 256, columns: 96, outputs: 64 },
      { ...linear, rows: 257, columns: 100, outputs: 33 },
      { ...linear, rows: 320, columns: 576, outputs: 24 },
      { ...linear, rows: 256, columns: 2144, outputs: 8 },
      {
        ...linear,
        rows: 300,
        columns: 128,
        outputs: 40,
        norm: true,
        bias: true,
        add: true,
        xRow: 2,
        outColumn: 5,
      },
      { ...gated, rows: 256, columns: 96, outputs: 40 },
      { ...gated, rows: 300, columns: 192, outputs: 33 },
    ];
  });

/**
 * Few rows, in whole tiles and not: the CUDA library shares out the columns,
 * too.
 */
const skinny: (LinearCase | GatedCase)[] = [
  ...(["F16", "BF16"] as const).flatMap((dtype) =>
    [1, 2, 5, 8, 9, 16, 17, 32, 33, 64].flatMap((rows) => {
      const common = {
        dtype,
        precision: "f32" as const,
        rows,
        tolerance: toleranceOf(dtype, "f32"),
      };
      const linear = { kernel: "linear" as const, ...common };
      return [
        { ...linear, columns: 1056, outputs: 301, norm: true, add: true },
        { ...linear, columns: 2048, outputs: 128, bias: true, outColumn: 3 },
        { kernel: "gated" as const, ...common, columns: 544, outputs: 141 },
      ];
    })
  ),
  ...weightTypes.filter(isQuantised).flatMap((dtype) =>
    [6, 16, 29, 64].flatMap((rows) => {
      const common = { dtype, precision: "int8" as const, rows, tolerance };
      const linear = { kernel: "linear" as const, ...common };
      return [
        { ...linear, columns: 2048, outputs: 133, norm: true, add: true },
        { ...linear, columns: wholeBlocks(dtype, 1056), outputs: 37 },
        { kernel: "gated" as const, ...common, columns: 2048, outputs: 77 },
      ];
    })
  ),
];

const gated: GatedCase[] = [
  ...weightTypes.flatMap((dtype) =>
    precisions.flatMap((precision) =>
      [1, 2, 7, 8, 17, 40].flatMap((rows) =>
        [1, 7, 40].map((outputs): GatedCase => ({
          kernel: "gated",
          dtype,
          precision,
          rows,
          columns: wholeBlocks(dtype, 96),
          outputs,
          tolerance: toleranceOf(dtype, precision),
        }))
      )
    )
  ),
  // Few rows, many, and what cuBLASLt takes.
  ...(["F32", "BF16", "Q8_0", "Q4_1"] as const).flatMap((dtype) =>
    [1, 4, 40, 256].map((rows): GatedCase => ({
      kernel: "gated",
      dtype,
      activation: "gelu-tanh",
      precision: rows === 40 ? "int8" : "f32",
      rows,
      columns: 96,
      outputs: 33,
      tolerance: toleranceOf(dtype, "f32"),
    }))
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

const chain: ChainCase[] = [
  ...weightTypes.filter(isQuantised).flatMap((dtype) => {
    // Of the K types rows are at least 256 columns.
    const of = (columns: number) => wholeBlocks(dtype, columns);
    const common = { kernel: "chain" as const, dtypes: dtype, tolerance };
    return [
      {
        ...common,
        attended: of(64),
        width: of(128),
        hidden: of(192),
        outputs: 96,
      },
      {
        ...common,
        attended: of(576),
        width: of(576),
        hidden: of(1536),
        outputs: [576, 192, 192],
        bias: true,
      },
      // Rows that are not whole fours.
      {
        ...common,
        attended: of(64),
        width: of(128),
        hidden: of(192),
        outputs: [97, 31],
      },
    ];
  }),
  // Rows that are not whole fours, columns that are not whole 64; several launches.
  ...([[64, 64, 64, 99], [96, 160, 224, 64], [576, 1024, 4096, 960]] as const)
    .map(([attended, width, hidden, outputs]): ChainCase => ({
      kernel: "chain",
      dtypes: "Q4_1",
      attended,
      width,
      hidden,
      outputs,
      activation: "gelu-tanh",
      tolerance,
    })),
  ...(["BF16", "F16", "Q4_1"] as const).flatMap((dtypes) =>
    // Units for all of a GPU's multiprocessors, and more; columns that no piece of them divides; odd numbers of rows, and biases.
    ([[288, 288, 4128, [288, 99, 99]], [96, 96, 1120, [64]]] as const).map((
      [attended, width, hidden, outputs],
    ): ChainCase => ({
      kernel: "chain",
      dtypes,
      attended,
      width,
      hidden,
      outputs: [...outputs],
      bias: width > 96,
      tolerance: toleranceOf(dtypes, "f32"),
    }))
  ),
  // More rows than a block finishes at once; rows of more columns than it reads at once.
  {
    kernel: "chain",
    dtypes: "Q4_1",
    attended: 32,
    width: 70400,
    hidden: 32,
    outputs: [8],
    tolerance,
  },
  {
    kernel: "chain",
    dtypes: ["Q8_0", "Q4_0"],
    attended: 576,
    width: 576,
    hidden: 1536,
    outputs: 960,
    tolerance,
  },
];

const embed: EmbedCase[] = weightTypes.flatMap((dtype) =>
  [1, 7, 40].map((rows): EmbedCase => ({
    kernel: "embed",
    dtype,
    rows,
    columns: wholeBlocks(dtype, 96),
    vocabulary: 19,
    ...rows === 7 ? { scale: 22.627417 } : {},
    tolerance: 1e-6,
  }))
);

const qkNorm: QkNormCase[] = [1, 2, 9].flatMap((rows) =>
  [[1, 1, 2], [4, 2, 64], [6, 3, 80], [8, 1, 256], [32, 8, 128]].flatMap((
    [heads, kvHeads, headDim],
  ) =>
    [false, true].map((all): QkNormCase => ({
      kernel: "qkNorm",
      rows,
      heads: heads!,
      kvHeads: kvHeads!,
      headDim: headDim!,
      ...all ? { all } : {},
      tolerance: 1e-6,
    }))
  )
);

const softcap: SoftcapCase[] = [1, 3].flatMap((rows) =>
  [1, 7, 1000, 49152].map((columns): SoftcapCase => ({
    kernel: "softcap",
    rows,
    columns,
    cap: columns === 7 ? 0.1 : 30,
    tolerance: 1e-6,
  }))
);

const rmsnorm: RmsnormCase[] = [1, 2, 9, 33].flatMap((rows) =>
  [1, 2, 7, 8, 31, 64, 100, 576, 4096].flatMap((columns) =>
    [{ inPlace: false }, { inPlace: true }, { add: true }].map((
      how,
    ): RmsnormCase => ({
      kernel: "rmsnorm",
      rows,
      columns,
      ...how,
      tolerance: 1e-6,
    }))
  )
);

const greedy: SampleCase[] = [1, 3].flatMap((rows) =>
  [1, 2, 7, 8, 9, 31, 64, 1000, 49152].map((vocabulary): SampleCase => ({
    kernel: "sample",
    rows,
    vocabulary,
    temperature: 0,
    topK: 0,
    topP: 1,
    minP: 0,
  }))
);

const drawn: SampleCase[] = [3, 1000, 49152].flatMap((vocabulary) =>
  [
    [1, 0, 1, 0],
    [0.8, 40, 1, 0],
    [1.3, 0, 0.9, 0],
    [0.8, 0, 1, 0.05],
    [1, 50, 0.95, 0.02],
    [0.7, 1, 1, 0],
    [20, 0, 1, 0],
    [1, 0, 0.0001, 0],
  ].map(([temperature, topK, topP, minP]): SampleCase => ({
    kernel: "sample",
    rows: 3,
    vocabulary,
    temperature: temperature!,
    topK: topK!,
    topP: topP!,
    minP: minP!,
  }))
);

const logProb: LogProbCase[] = [1, 3, 20].flatMap((rows) =>
  [1, 2, 7, 8, 9, 33, 1000, 49152].map((vocabulary): LogProbCase => ({
    kernel: "logProb",
    rows: vocabulary > 1000 ? Math.ceil(rows / 2) : rows,
    vocabulary,
    tolerance,
  }))
);

const divergence: DivergenceCase[] = logProb.map((row) => ({
  ...row,
  kernel: "divergence",
}));

/** The table. */
export const opCases: OpCase[] = [
  ...linear,
  ...gated,
  ...skinny,
  ...passes,
  ...chain,
  ...embed,
  ...rmsnorm,
  ...qkNorm,
  ...softcap,
  ...greedy,
  ...drawn,
  ...logProb,
  ...divergence,
];
