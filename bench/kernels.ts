/**
 * Times single kernels with caches and weights that no longer lie in the
 * device's cache; called by `wkv bench kernels`.
 *
 * Each op is recorded once a copy of its data in one graph, with so many copies
 * that the graph walks through more than twice the last-level cache before it
 * comes back to the first; microseconds an op are those of the graph by the
 * number of its ops. Caches are full before the clock starts: every step of a
 * policy selects, and merges where the policy does.
 */

import type { Backend, Graph } from "../src/backend/backend.ts";
import {
  embed,
  gated,
  linear,
  logProb,
  type Precision,
  rmsnorm,
  sample,
} from "../src/backend/ops.ts";
import { isQuantised, Tensor } from "../src/backend/tensor.ts";
import type { KvCache } from "../src/cache/cache.ts";
import type { CacheType, Positions } from "../src/cache/layout.ts";
import type { ModelConfig } from "../src/models/architecture.ts";
import {
  caseName,
  type KernelCase,
  kernelCases,
} from "../src/selftest/cases.ts";
import {
  attendCase,
  gatedCase,
  linearCase,
  type LinearOp,
} from "../src/selftest/model_cases.ts";
import type { Memory } from "./memory.ts";
import {
  emptyModel,
  randomFloats,
  RandomRows,
  type WeightType,
} from "./random_model.ts";
import { type ShapeName, shapeOf } from "./shapes.ts";
import { median, rounded, timeGraph } from "./timing.ts";

/** What is measured. */
export interface KernelOptions {
  /** Whose shapes. */
  shapes: ShapeName;
  /** Names of {@linkcode kernelOps}. */
  ops: readonly string[];
  /** Tokens kept a KV head, for ops on a cache. */
  budgets: readonly number[];
  /** Sequences side by side. */
  batches: readonly number[];
  /** Policies, for ops on a cache. */
  policies: readonly string[];
  /** Type of cached keys and values. */
  cacheType: CacheType;
  /** Where keys are rotated. */
  positions: Positions;
  /** Types of weights. */
  dtypes: readonly WeightType[];
  /** How activations meet quantised weights. */
  activations: Precision;
  /** Tokens of one prefill. */
  rows: readonly number[];
  /** Samples. */
  repeats: number;
  /** Milliseconds of a sample. */
  least: number;
  /** Bytes that a graph must walk through. */
  workingSet: number;
}

/** One figure. */
export interface KernelRow {
  test: "kernel";
  op: string;
  /** The row of the table of kernel cases that has this launch, for ops that the table has by model. */
  case?: string;
  /** Whether the table has that row: its tests and `wkv doctor --self-test` compare it with f64, of huge ones on a GPU only. */
  checked?: boolean;
  shapes: ShapeName;
  device: string;
  /** Type of the weights, for ops on weights. */
  dtype?: WeightType;
  activations?: Precision;
  /** For ops on a cache. */
  policy?: string;
  budget?: number;
  cacheType?: CacheType;
  positions?: Positions;
  /** Tokens that left by merging and by dropping, of one sequence. */
  merged?: number;
  evicted?: number;
  /** Tokens cached when the clock started. */
  kept?: number;
  batch: number;
  /** Tokens of a prefill. */
  rows?: number;
  /** Copies of the data, which is the ops of one graph. */
  copies: number;
  /** Runs of the graph in a sample. */
  times: number;
  /** Microseconds of one op: median, least and most of the samples. */
  us: number;
  usLow: number;
  usHigh: number;
  /** Bytes that one op must move. */
  bytes: number;
  /** Gigabytes a second of those. */
  gbps: number;
  /** Their share of the memory's bandwidth, when that is known. */
  share: number | null;
  /** Tera floating-point operations a second, where work counts more than bytes. */
  tflops?: number;
  /** Microseconds of one op, by sample. */
  samples: number[];
}

/** An op that is ready to be timed. */
interface Case {
  fields: Partial<KernelRow>;
  /** What is timed as a row of the table. */
  row?: KernelCase;
  /** Bytes that one op must move; `times` matters where a cache still grows. */
  bytes: (times: number) => number;
  flops?: number;
  copies: number;
  record: (copy: number) => void;
  before?: () => Promise<void> | void;
  most?: number;
}

/** What the makers of cases share. */
interface Bench {
  backend: Backend;
  config: ModelConfig;
  options: KernelOptions;
  random: RandomRows;
  /** Owns what a case opens. */
  stack: DisposableStack;
}

type Maker = (bench: Bench) => AsyncGenerator<Case>;

/** Steps of different tokens in the graph that fills a cache. */
const KINDS = 8;
/** Tokens of a pass that fills a cache. */
const PASS = 2048;
/** The most steps that a full cache is timed for; their middle is the budget. */
const ROOM = 64;
/** The most copies: a graph of so many ops is long enough. */
const MOST_COPIES = 1024;
/** Random numbers that are made; more are these again, at other places of rows. */
const POOL = 4_194_301;

const makers: Record<string, Maker> = {
  attend,
  qkv: (bench) => weights(bench, "qkv"),
  output: (bench) => weights(bench, "output"),
  gated: gatedCases,
  down: (bench) => weights(bench, "down"),
  head: (bench) => weights(bench, "head"),
  sample: (bench) => logitCases(bench, [0, 0, 1, 0]),
  draw: (bench) => logitCases(bench, [0.8, 40, 0.95, 0.05]),
  logprob: (bench) => logitCases(bench, null),
  embed: embedCases,
  norm: normCases,
  prefill: (bench) => prefillCases(bench, "prefill"),
  chunk: (bench) => prefillCases(bench, "chunk"),
};

/** Names that stand for several. */
const groups: Record<string, readonly string[]> = {
  linear: ["qkv", "output", "down", "head"],
  all: Object.keys(makers),
};

/** Every op that can be named. */
export const kernelOps: readonly string[] = [
  ...Object.keys(makers),
  ...Object.keys(groups),
];

/** Measures, a row at a time. */
export async function* benchKernels(
  backend: Backend,
  memory: Memory,
  options: KernelOptions,
): AsyncGenerator<KernelRow> {
  const { config } = shapeOf(options.shapes);
  const random = new RandomRows();
  const ops = options.ops.flatMap((op) => groups[op] ?? [op]);
  for (const op of new Set(ops)) {
    if (makers[op] === undefined) {
      throw new RangeError(
        `Unknown op "${op}": known are ${kernelOps.join(", ")}`,
      );
    }
  }
  for (const op of new Set(ops)) {
    let stack = new DisposableStack();
    const bench = { backend, config, options, random, stack };
    try {
      for await (const one of makers[op]!(bench)) {
        yield await measure(backend, memory, options, op, one);
        stack.dispose();
        stack = bench.stack = new DisposableStack();
      }
    } finally {
      stack.dispose();
    }
  }
}

async function measure(
  backend: Backend,
  memory: Memory,
  options: KernelOptions,
  op: string,
  one: Case,
): Promise<KernelRow> {
  using graph = backend.record(() => {
    for (let copy = 0; copy < one.copies; copy++) one.record(copy);
  });
  const { times, samples } = await timeGraph(graph, {
    repeats: options.repeats,
    least: options.least,
    most: one.most,
    before: one.before,
  });
  const us = samples.map((ms) => ms * 1000 / one.copies);
  const middle = median(us);
  const bytes = one.bytes(times);
  const { bytesPerSecond } = memory;
  const { fields } = one;
  return {
    test: "kernel",
    op,
    shapes: options.shapes,
    device: backend.description,
    ...one.row ? nameOf(one.row) : {},
    batch: 1,
    ...fields,
    copies: one.copies,
    times,
    us: middle,
    usLow: Math.min(...us),
    usHigh: Math.max(...us),
    bytes,
    gbps: bytes / middle / 1000,
    share: bytesPerSecond && bytes / (middle / 1e6) / bytesPerSecond,
    ...(one.flops ? { tflops: one.flops / middle / 1e6 } : {}),
    samples: rounded(us),
  };
}

const names: ReadonlySet<string> = new Set(kernelCases.map(caseName));

/** What a row says of the case that it timed. */
function nameOf(row: KernelCase): { case: string; checked: boolean } {
  const name = caseName(row);
  return { case: name, checked: names.has(name) };
}

/** Copies of so many bytes that together are the working set. */
function copiesOf(bytes: number, { options }: Bench): number {
  const wanted = Math.ceil(options.workingSet / bytes);
  return Math.max(1, Math.min(MOST_COPIES, wanted));
}

function open(
  { backend, stack }: Bench,
  rows: number,
  columns: number,
): Tensor {
  return stack.use(new Tensor(backend, "F32", rows, columns));
}

/** A tensor of normal random numbers. */
function normal(bench: Bench, rows: number, columns: number, seed = 1): Tensor {
  const tensor = open(bench, rows, columns);
  const count = rows * columns;
  const numbers = randomFloats(Math.min(count, POOL), seed);
  const all = new Float32Array(count);
  for (let at = 0; at < count; at += POOL) {
    all.set(numbers.subarray(0, count - at), at);
  }
  tensor.write(all);
  return tensor;
}

// ---- ops on a cache ----

/** Bytes that a step must move for `kept` tokens: keys, values, and 16 bytes of state a token (score read and written, birth, rank). */
function cacheBytes({ config, options }: Bench, kept: number): number {
  const row = config.headDim * (options.cacheType === "f32" ? 4 : 2);
  return config.kvHeads * kept * (2 * row + 16);
}

/** A cache with a layer for each copy. */
function openCache(
  bench: Bench,
  layers: number,
  sequences: number,
  policy: string,
  tokens: number,
  room = ROOM,
): KvCache {
  const { cacheType, positions } = bench.options;
  const config = { ...bench.config, layers };
  return bench.stack.use(
    emptyModel(bench.backend, config).createCache({
      policy,
      budget: tokens,
      capacity: tokens + room,
      cacheType,
      positions,
      sequences,
    }),
  );
}

/**
 * Fills a cache: as far as it has room in passes, unless its policy must see
 * each step, and then with steps of a few kinds of tokens, whose inputs it gives.
 */
async function fill(
  bench: Bench,
  cache: KvCache,
  layers: number,
  tokens: number,
): Promise<{ qkv: Tensor[]; out: Tensor; refill: () => Promise<void> }> {
  const { heads, kvHeads, headDim } = bench.config;
  const width = (heads + 2 * kvHeads) * headDim;
  const qkv = Array.from(
    { length: KINDS },
    (_, i) => normal(bench, cache.sequences, width, i + 1),
  );
  const out = open(bench, cache.sequences, heads * headDim);
  const step = (kinds: readonly Tensor[]): Graph =>
    bench.stack.use(bench.backend.record(() => {
      for (const one of kinds) {
        for (let layer = 0; layer < layers; layer++) {
          cache.attend(layer, out, one);
        }
      }
    }));
  const pass = (rows: number): Graph => {
    const all = normal(bench, rows, width, KINDS + 1);
    const out = open(bench, rows, heads * headDim);
    return bench.stack.use(bench.backend.record(() => {
      for (let layer = 0; layer < layers; layer++) {
        for (let b = 0; b < cache.sequences; b++) {
          cache.prefill(layer, b, out, all, rows);
        }
      }
    }));
  };
  const all = step(qkv);
  const single = step(qkv.slice(0, 1));
  const fits = cache.policy.prefill === "steps"
    ? 0
    : Math.min(tokens, cache.capacity);
  const passes = [PASS, fits % PASS].map((rows) =>
    rows > 0 && rows <= fits ? pass(rows) : null
  );
  const refill = async () => {
    cache.reset();
    await passes[0]?.run(Math.floor(fits / PASS));
    await passes[1]?.run();
    await all.run(Math.floor((tokens - fits) / KINDS));
    await single.run((tokens - fits) % KINDS);
  };
  await refill();
  return { qkv, out, refill };
}

async function* attend(bench: Bench): AsyncGenerator<Case> {
  const { budgets, batches, policies, cacheType, positions } = bench.options;
  for (const policy of policies) {
    for (const batch of batches) {
      for (const budget of budgets) {
        const copies = copiesOf(batch * cacheBytes(bench, budget), bench);
        const cache = openCache(bench, copies, batch, policy, budget);
        const full = cache.budget === null;
        const tokens = full
          ? Math.ceil(budget - Math.min(ROOM, budget) / 2)
          : budget + KINDS;
        const { qkv, out, refill } = await fill(bench, cache, copies, tokens);
        const { kept, merged, evicted } = cache.stats();
        yield {
          fields: {
            policy,
            budget,
            cacheType,
            positions,
            batch,
            kept,
            merged,
            evicted,
          },
          row: attendCase(bench.config, {
            policy,
            budget,
            cacheType,
            positions,
            batch,
          }),
          // A full cache grows while it is timed.
          bytes: (times) =>
            batch * cacheBytes(bench, full ? kept + times / 2 : kept),
          copies,
          record: (copy) => cache.attend(copy, out, qkv[copy % KINDS]!),
          ...(full ? { before: refill, most: ROOM } : {}),
        };
      }
    }
  }
}

/** `prefill`: `rows` tokens into an empty cache; `chunk`: into a full one, which settles. */
async function* prefillCases(
  bench: Bench,
  op: "prefill" | "chunk",
): AsyncGenerator<Case> {
  const { options, config } = bench;
  const { budgets, policies, cacheType, positions } = options;
  const { heads, kvHeads, headDim } = config;
  const empty = op === "prefill";
  const sizes = options.rows.flatMap((rows) =>
    [...new Set(empty ? [rows] : budgets)].map((tokens) => [rows, tokens])
  ) as [rows: number, tokens: number][];
  for (const policy of policies) {
    if (!empty && policy === "full") continue;
    for (const [rows, tokens] of sizes) {
      const before = empty ? 0 : tokens;
      const copies = Math.min(
        Math.max(8, copiesOf(cacheBytes(bench, before + rows), bench)),
        64,
      );
      const cache = openCache(bench, copies, 1, policy, tokens, rows);
      if (!empty) await fill(bench, cache, copies, tokens + KINDS);
      const columns = (heads + 2 * kvHeads) * headDim;
      const qkv = normal(bench, rows, columns);
      const out = open(bench, rows, heads * headDim);
      const { kept, merged, evicted } = cache.stats();
      yield {
        fields: {
          policy,
          budget: tokens,
          cacheType,
          positions,
          rows,
          kept,
          merged,
          evicted,
        },
        bytes: () =>
          4 * rows * (columns + heads * headDim) +
          cacheBytes(bench, before + rows),
        // Queries with keys, weights with values: two each a multiply and an add.
        flops: 4 * heads * headDim * rows * (before + (rows + 1) / 2),
        copies,
        record: (copy) => cache.prefill(copy, 0, out, qkv, rows),
        ...(empty ? { before: () => cache.reset(), most: 1 } : {}),
      };
    }
  }
}

// ---- ops on weights ----

/** What differs from type to type. */
function weightFields(
  dtype: WeightType,
  batch: number,
  { options }: Bench,
): Partial<KernelRow> & { activations: Precision } {
  const other = options.activations === "half" ? "half" : "f32";
  const activations = isQuantised(dtype) ? options.activations : other;
  return { dtype, activations, batch };
}

function randomWeight(
  bench: Bench,
  dtype: WeightType,
  rows: number,
  columns: number,
): Tensor {
  const tensor = bench.stack.use(
    new Tensor(bench.backend, dtype, rows, columns),
  );
  bench.random.fill(tensor);
  return tensor;
}

/** So many random weights of one shape that they are the working set. */
function randomWeights(
  bench: Bench,
  dtype: WeightType,
  rows: number,
  columns: number,
  parts = 1,
): Tensor[] {
  const first = randomWeight(bench, dtype, rows, columns);
  const count = parts * copiesOf(parts * first.rowBytes * rows, bench);
  return [
    first,
    ...Array.from(
      { length: count - 1 },
      () => randomWeight(bench, dtype, rows, columns),
    ),
  ];
}

function normOf(bench: Bench): { weight: Tensor; epsilon: number } {
  const { width, epsilon } = bench.config;
  return { weight: normal(bench, 1, width), epsilon };
}

async function* weights(
  bench: Bench,
  op: LinearOp,
): AsyncGenerator<Case> {
  for (const dtype of bench.options.dtypes) {
    for (const batch of bench.options.batches) {
      const fields = weightFields(dtype, batch, bench);
      const precision = fields.activations;
      const row = linearCase(bench.config, op, {
        dtype,
        precision,
        rows: batch,
      });
      const { outputs: rows, columns, add = false } = row;
      const w = randomWeights(bench, dtype, rows, columns);
      const x = normal(bench, batch, columns);
      const out = open(bench, batch, rows);
      const how = row.norm ? { norm: normOf(bench) } : { add };
      yield {
        fields,
        row,
        bytes: () => w[0]!.rowBytes * rows,
        flops: 2 * batch * rows * columns,
        copies: w.length,
        record: (copy) =>
          linear(bench.backend, out, x, w[copy]!, {
            rows: batch,
            precision,
            ...how,
          }),
      };
    }
  }
}

async function* gatedCases(bench: Bench): AsyncGenerator<Case> {
  for (const dtype of bench.options.dtypes) {
    for (const batch of bench.options.batches) {
      const fields = weightFields(dtype, batch, bench);
      const precision = fields.activations;
      const row = gatedCase(bench.config, { dtype, precision, rows: batch });
      const { outputs: hidden, columns: width } = row;
      const w = randomWeights(bench, dtype, hidden, width, 2);
      const x = normal(bench, batch, width);
      const out = open(bench, batch, hidden);
      const norm = normOf(bench);
      yield {
        fields,
        row,
        bytes: () => 2 * w[0]!.rowBytes * hidden,
        flops: 4 * batch * hidden * width,
        copies: w.length / 2,
        record: (copy) =>
          gated(bench.backend, out, x, w[2 * copy]!, w[2 * copy + 1]!, {
            rows: batch,
            norm,
            precision,
          }),
      };
    }
  }
}

// ---- ops on activations ----

async function* logitCases(
  bench: Bench,
  settings: readonly number[] | null,
): AsyncGenerator<Case> {
  const { backend, config: { vocabulary } } = bench;
  // Logits spread as those of trained models do.
  const random = new RandomRows(3);
  for (const batch of bench.options.batches) {
    const bytes = 4 * batch * vocabulary;
    const logits = Array.from(
      { length: Math.min(64, copiesOf(bytes, bench)) },
      () => randomWeight({ ...bench, random }, "F32", batch, vocabulary),
    );
    const tokens = bench.stack.use(new Tensor(backend, "I32", 1, batch));
    let record: (copy: number) => void;
    if (settings === null) {
      const out = open(bench, 1, batch);
      record = (copy) => logProb(backend, out, logits[copy]!, tokens, batch);
    } else {
      const chosen = open(bench, batch, 4);
      chosen.write(
        Float32Array.from({ length: 4 * batch }, (_, i) => settings[i % 4]!),
      );
      const rng = bench.stack.use(new Tensor(backend, "I32", batch, 4));
      record = (copy) => sample(backend, tokens, logits[copy]!, chosen, rng);
    }
    yield {
      fields: { batch },
      bytes: () => bytes,
      copies: logits.length,
      record,
    };
  }
}

async function* embedCases(bench: Bench): AsyncGenerator<Case> {
  const { backend, config: { vocabulary, width } } = bench;
  for (const dtype of bench.options.dtypes) {
    for (const batch of bench.options.batches) {
      const table = randomWeight(bench, dtype, vocabulary, width);
      const out = open(bench, batch, width);
      const rows = Math.min(MOST_COPIES, Math.floor(vocabulary / batch));
      const tokens = Array.from({ length: rows }, (_, copy) => {
        const ids = bench.stack.use(new Tensor(backend, "I32", 1, batch));
        ids.write(
          Int32Array.from(
            { length: batch },
            (_, i) => (copy * batch + i) * 7919 % vocabulary,
          ),
        );
        return ids;
      });
      yield {
        fields: { dtype, batch },
        bytes: () => batch * (table.rowBytes + 4 * width),
        copies: rows,
        record: (copy) =>
          embed(backend, out, table, tokens[copy]!, { rows: batch }),
      };
    }
  }
}

async function* normCases(bench: Bench): AsyncGenerator<Case> {
  const { width } = bench.config;
  for (const batch of bench.options.batches) {
    const bytes = 8 * batch * width;
    const x = Array.from(
      { length: copiesOf(bytes, bench) },
      () => randomWeight(bench, "F32", batch, width),
    );
    const norm = normOf(bench);
    yield {
      fields: { batch },
      bytes: () => bytes,
      copies: x.length,
      record: (copy) =>
        rmsnorm(bench.backend, x[copy]!, x[copy]!, norm, { rows: batch }),
    };
  }
}
