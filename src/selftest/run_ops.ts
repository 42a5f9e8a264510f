/** Runs one row of op_cases.ts on a library, beside the kernel's formula in f64. */

import type { Backend } from "../backend/backend.ts";
import {
  type Activation,
  divergence,
  embed,
  gated,
  linear,
  logProb,
  type Precision,
  qkNorm,
  rmsnorm,
  sample,
  softcap,
} from "../backend/ops.ts";
import { type Dtype, isQuantised, Tensor } from "../backend/tensor.ts";
import { type Finding, Findings, sameBytes } from "./findings.ts";
import { matrix } from "./matrix.ts";
import { type Random, relativeError } from "./numbers.ts";
import type {
  ChainCase,
  DivergenceCase,
  EmbedCase,
  GatedCase,
  LinearCase,
  LogProbCase,
  OpCase,
  QkNormCase,
  RmsnormCase,
  SampleCase,
  SoftcapCase,
} from "./op_cases.ts";
import { dot } from "./reference_policies.ts";

type Numbers = Float32Array<ArrayBuffer>;
const EPSILON = 1e-5;

/** Runs the row. */
export async function runOpCase(
  backend: Backend,
  row: OpCase,
  random: Random,
): Promise<Finding[]> {
  const found = new Findings();
  switch (row.kernel) {
    case "linear":
      checkLinear(backend, row, random, found);
      break;
    case "gated":
      checkGated(backend, row, random, found);
      break;
    case "chain":
      await checkChain(backend, row, random, found);
      break;
    case "embed":
      checkEmbed(backend, row, random, found);
      break;
    case "rmsnorm":
      checkRmsnorm(backend, row, random, found);
      break;
    case "qkNorm":
      checkQkNorm(backend, row, random, found);
      break;
    case "softcap":
      checkSoftcap(backend, row, random, found);
      break;
    case "sample":
      checkSample(backend, row, random, found);
      break;
    case "logProb":
      checkLogProb(backend, row, random, found);
      break;
    case "divergence":
      checkDivergence(backend, row, random, found);
      break;
  }
  return found.list;
}

function normed(x: ArrayLike<number>, weight: ArrayLike<number>): Float64Array {
  const root = Math.sqrt(dot(x, x) / x.length + EPSILON);
  return Float64Array.from(x, (y, i) => y / root * weight[i]!);
}

/** Rounds each 32 columns to 127 steps of their largest size. */
function rounded(x: Float64Array): Float64Array {
  return x.map((y, i) => {
    const from = i - i % 32;
    const most = x.subarray(from, from + 32)
      .reduce((a, b) => Math.max(a, Math.abs(b)), 0);
    return most === 0 ? 0 : Math.round(y / most * 127) * most / 127;
  });
}

/**
 * Random rows whose numbers lie off the middle between two steps of 127, so
 * that f32 and f64 round them alike.
 */
function input(random: Random, rows: number, columns: number): Numbers {
  const out = random.normals(rows * columns);
  for (let i = 0; i < out.length; i++) {
    const block = i % columns % 32;
    if (block === 0) {
      out[i] = (random.uniform() < 0.5 ? -1 : 1) * (3 + random.uniform());
    }
    const most = Math.abs(out[i - block]!);
    const step = Math.max(
      -127,
      Math.min(127, Math.round(out[i]! / most * 127)),
    );
    const off = Math.abs(step) === 127 ? 0 : 0.8 * random.uniform() - 0.4;
    if (block !== 0) out[i] = (step + off) / 127 * most;
  }
  return out;
}

/** A norm's weight, equal over each 32 columns: it moves no rounding. */
function normWeight(random: Random, columns: number): Numbers {
  const out = new Float32Array(columns);
  for (let i = 0; i < columns; i += 32) {
    out.fill(0.5 + random.uniform(), i, i + 32);
  }
  return out;
}

function split(x: ArrayLike<number>, columns: number): Float64Array[] {
  return Array.from(
    { length: x.length / columns },
    (_, r) =>
      Float64Array.from({ length: columns }, (_, c) => x[r * columns + c]!),
  );
}

const isRounded = (dtype: Dtype, precision: Precision) =>
  precision === "int8" && isQuantised(dtype);

/** On the CPU, and of few rows, it is not. */
const isHalf = (dtype: Dtype, precision: Precision) =>
  precision === "half" && dtype.endsWith("F16");

function checkLinear(
  backend: Backend,
  row: LinearCase,
  random: Random,
  found: Findings,
): void {
  const { rows, columns, outputs, xRow = 0, outColumn = 0, add } = row;
  const x = input(random, xRow + rows, columns);
  const weight = normWeight(random, columns);
  const biases = random.normals(outputs);
  const width = outColumn + outputs + (outColumn && 3);
  // Whatever is not written must stay: NaN where nothing is added.
  const before = add
    ? random.normals(rows * width)
    : new Float32Array(rows * width).fill(NaN);
  const { subnormal, distinct } = row;
  using w = matrix(backend, random, row.dtype, outputs, columns, {
    subnormal,
    distinct,
  });
  using xs = Tensor.from(backend, x, xRow + rows);
  using out = Tensor.from(backend, before, rows);
  using norm = Tensor.from(backend, weight);
  using bias = Tensor.from(backend, biases);
  const options = {
    ...row.norm ? { norm: { weight: norm, epsilon: EPSILON } } : {},
    ...row.bias ? { bias } : {},
    ...add ? { add } : {},
    precision: row.precision,
  };
  linear(backend, out, xs, w.tensor, { ...options, rows, xRow, outColumn });
  const actual = out.floats();
  const plain = split(x, columns).slice(xRow)
    .map((r) => row.norm ? normed(r, weight) : r);
  const products = (source: Float64Array[]) =>
    source.flatMap((r) =>
      w.rows.map((v, j) => dot(r, v) + (row.bias ? biases[j]! : 0))
    );
  const inside = (_: number, i: number) => {
    const column = i % width - outColumn;
    return column >= 0 && column < outputs;
  };
  const held = before.filter(inside);
  const results = Array.from(
    actual.filter(inside),
    (y, i) => add ? y - held[i]! : y,
  );
  const exact = products(plain);
  // What was held is part of the sum's rounding.
  const tolerance = add
    ? row.tolerance * (1 + Math.hypot(...held) / Math.hypot(...exact))
    : row.tolerance;
  // Few outputs may cancel to nearly nothing: then what counts is the lengths.
  const lengths = Math.hypot(
    ...plain.flatMap((r) =>
      w.rows.map((v) => Math.hypot(...r) * Math.hypot(...v))
    ),
  );
  if (isRounded(row.dtype, row.precision)) {
    found.note(
      "linear, 8-bit input",
      relativeError(results, products(plain.map(rounded)), lengths / 100),
      tolerance,
    );
    const error = Math.hypot(...results.map((y, i) => y - exact[i]!));
    found.note("rounding to 8 bits", error / lengths, 1e-2);
  } else {
    found.note(
      isHalf(row.dtype, row.precision) ? "linear, 16-bit input" : "linear",
      relativeError(results, exact, lengths / 100),
      tolerance,
    );
  }
  const outside = (_: number, i: number) => !inside(_, i);
  found.must(
    "columns outside",
    sameBytes(actual.filter(outside), before.filter(outside)),
  );
  if (backend.device !== "cpu") return;

  // On the CPU each row alone gives the same bytes.
  using single = new Tensor(backend, "F32", 1, width);
  for (const r of [0, rows - 1, rows >> 1]) {
    single.write(before.subarray(r * width, (r + 1) * width));
    linear(backend, single, xs, w.tensor, {
      ...options,
      rows: 1,
      xRow: xRow + r,
      outColumn,
    });
    found.must(
      "bytes of a row alone",
      sameBytes(single.floats(), actual.slice(r * width, (r + 1) * width)),
    );
  }
}

function activated(x: number, activation: Activation = "silu"): number {
  if (activation === "silu") return x / (1 + Math.exp(-x));
  const inner = Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3);
  return x / 2 * (1 + Math.tanh(inner));
}

function checkGated(
  backend: Backend,
  row: GatedCase,
  random: Random,
  found: Findings,
): void {
  const { rows, columns, outputs, dtype, upDtype = dtype } = row;
  const x = input(random, rows, columns);
  // Products of a few units, where silu is neither 0 nor the identity.
  const weight = normWeight(random, columns).map((y) => y / 8);
  const { distinct } = row;
  using gate = matrix(backend, random, dtype, outputs, columns, { distinct });
  using up = matrix(backend, random, upDtype, outputs, columns, { distinct });
  using xs = Tensor.from(backend, x, rows);
  using norm = Tensor.from(backend, weight);
  using out = Tensor.from(
    backend,
    new Float32Array(rows * outputs).fill(NaN),
    rows,
  );
  const options = {
    norm: { weight: norm, epsilon: EPSILON },
    activation: row.activation,
    precision: row.precision,
  };
  gated(backend, out, xs, gate.tensor, up.tensor, { ...options, rows });
  const actual = out.floats();
  const plain = split(x, columns).map((r) => normed(r, weight));
  const results = (source: Float64Array[]) =>
    source.flatMap((r) =>
      gate.rows.map((g, j) => {
        return activated(dot(r, g), row.activation) * dot(r, up.rows[j]!);
      })
    );
  const expected = results(
    isRounded(dtype, row.precision) ? plain.map(rounded) : plain,
  );
  const rounding = isRounded(dtype, row.precision)
    ? ", 8-bit input"
    : isHalf(dtype, row.precision)
    ? ", 16-bit input"
    : "";
  found.note(
    `gated${rounding}`,
    relativeError(actual, expected),
    row.tolerance,
  );
  if (backend.device !== "cpu") return;
  using one = new Tensor(backend, "F32", 1, columns);
  using single = new Tensor(backend, "F32", 1, outputs);
  for (const r of [0, rows - 1]) {
    one.write(x.subarray(r * columns, (r + 1) * columns));
    gated(backend, single, one, gate.tensor, up.tensor, {
      ...options,
      rows: 1,
    });
    found.must(
      "bytes of a row alone",
      sameBytes(single.floats(), actual.slice(r * outputs, (r + 1) * outputs)),
    );
  }
}

/**
 * Each product beside its formula of what the graph's products before left, which
 * graphs of the first of them give away: x is written twice.
 */
async function checkChain(
  backend: Backend,
  row: ChainCase,
  random: Random,
  found: Findings,
): Promise<void> {
  const { attended, width, hidden, activation } = row;
  const [dtype, inner] = Array.isArray(row.dtypes)
    ? row.dtypes
    : [row.dtypes, row.dtypes];
  const parts = [row.outputs].flat();
  using stack = new DisposableStack();
  const weight = (
    dtype: Dtype,
    rows: number,
    columns: number,
    biased = row.bias,
  ) => {
    const made = stack.use(matrix(backend, random, dtype, rows, columns));
    const biases = biased ? random.normals(rows) : new Float32Array(rows);
    const bias = biased ? stack.use(Tensor.from(backend, biases)) : undefined;
    const product = (x: Numbers | Float64Array) => {
      const exact = Float64Array.from(x);
      const read = isQuantised(dtype) ? rounded(exact) : exact;
      return made.rows.map((w, j) => dot(read, w) + biases[j]!);
    };
    return { w: made.tensor, bias, product };
  };
  const normOf = (scale: number) => {
    const numbers = random.normals(width).map((x) => scale * (1 + x / 4));
    return {
      of: (x: Numbers) => normed(x, numbers),
      norm: {
        weight: stack.use(Tensor.from(backend, numbers)),
        epsilon: EPSILON,
      },
    };
  };
  const output = weight(dtype, width, attended);
  const gate = weight(inner, hidden, width, false);
  const up = weight(inner, hidden, width, false);
  const down = weight(inner, width, hidden);
  const last = parts.map((rows) => weight(dtype, rows, width));
  const [before, behind] = [normOf(1 / 8), normOf(1)];
  const x0 = random.normals(width), from = input(random, 1, attended);
  const x = stack.use(Tensor.from(backend, x0));
  const given = stack.use(Tensor.from(backend, from));
  const inside = stack.use(new Tensor(backend, "F32", 1, hidden));
  const total = parts.reduce((a, b) => a + b);
  const out = stack.use(new Tensor(backend, "F32", 1, total));
  const common = { rows: 1, precision: "int8" as const };

  const ops = [
    () =>
      linear(backend, x, given, output.w, {
        ...common,
        bias: output.bias,
        add: true,
      }),
    () =>
      gated(backend, inside, x, gate.w, up.w, {
        ...common,
        norm: before.norm,
        activation,
      }),
    () =>
      linear(backend, x, inside, down.w, {
        ...common,
        bias: down.bias,
        add: true,
      }),
    () => {
      let outColumn = 0;
      for (const { w, bias } of last) {
        linear(backend, out, x, w, {
          ...common,
          norm: behind.norm,
          bias,
          outColumn,
        });
        outColumn += w.rows;
      }
    },
  ];
  /** What a graph of the first `count` leaves: x, the inner part and the last. */
  const run = async (count: number): Promise<Numbers[]> => {
    using graph = backend.record(() => ops.slice(0, count).forEach((f) => f()));
    x.write(x0);
    await graph.run();
    return [x.floats(), inside.floats(), out.floats()];
  };
  const [x1, h] = await run(2);
  const [x2, h2, results] = await run(4);
  // Of two types the gate ends the shorter graph alone, in another kernel.
  if (inner === dtype) {
    found.must("bytes of a shorter graph", sameBytes(h!, h2!));
  } else {
    found.note("a shorter graph", relativeError(h!, h2!), row.tolerance);
  }
  const repeated = await run(4);
  found.must("bytes of a repeated run", sameBytes(results!, repeated[2]!));

  const sum = (a: Numbers, b: number[]) => b.map((y, j) => a[j]! + y);
  const note = (quantity: string, actual: Numbers, expected: number[]) =>
    found.note(quantity, relativeError(actual, expected), row.tolerance);
  note("chain, output", x1!, sum(x0, output.product(from)));
  const normedX = before.of(x1!), ups = up.product(normedX);
  note(
    "chain, gated",
    h!,
    gate.product(normedX).map((g, j) => activated(g, activation) * ups[j]!),
  );
  note("chain, down", x2!, sum(x1!, down.product(h!)));
  const end = behind.of(x2!);
  note("chain, last", results!, last.flatMap(({ product }) => product(end)));
}

function checkEmbed(
  backend: Backend,
  row: EmbedCase,
  random: Random,
  found: Findings,
): void {
  const { rows, columns, vocabulary } = row;
  const ids = Int32Array.from(
    { length: rows },
    () => random.integer(vocabulary),
  );
  ids[rows - 1] = vocabulary - 1;
  using table = matrix(backend, random, row.dtype, vocabulary, columns);
  using tokens = Tensor.from(backend, ids);
  using out = Tensor.from(
    backend,
    new Float32Array((rows + 1) * columns).fill(NaN),
    rows + 1,
  );
  const { scale } = row;
  embed(backend, out, table.tensor, tokens, { rows, scale });
  const expected = [...ids].flatMap((id) =>
    Array.from(table.rows[id]!, (x) => x * (scale ?? 1))
  );
  found.note(
    "embedding",
    relativeError(out.floats(0, rows), expected),
    row.tolerance,
  );
  found.must("rows beyond the last", out.floats(rows).every(Number.isNaN));
}

function checkRmsnorm(
  backend: Backend,
  row: RmsnormCase,
  random: Random,
  found: Findings,
): void {
  const { rows, columns } = row;
  const x = random.normals(rows * columns, 3);
  const weight = random.normals(columns);
  using xs = Tensor.from(backend, x, rows);
  using norm = Tensor.from(backend, weight);
  const held = random.normals(rows * columns);
  using apart = Tensor.from(backend, held, rows);
  const out = row.inPlace ? xs : apart;
  rmsnorm(backend, out, xs, { weight: norm, epsilon: EPSILON }, {
    rows,
    add: row.add ?? false,
  });
  const expected = split(x, columns).flatMap((r) => [...normed(r, weight)])
    .map((y, i) => row.add ? held[i]! + y : y);
  found.note("norm", relativeError(out.floats(), expected), row.tolerance);
}

function checkQkNorm(
  backend: Backend,
  row: QkNormCase,
  random: Random,
  found: Findings,
): void {
  const { rows, heads, kvHeads, headDim } = row;
  const width = (heads + 2 * kvHeads) * headDim;
  const x = random.normals((rows + 1) * width, 3);
  const q = random.normals(row.all ? heads * headDim : headDim);
  const k = random.normals(row.all ? kvHeads * headDim : headDim);
  using qkv = Tensor.from(backend, x, rows + 1);
  using qWeight = Tensor.from(backend, q);
  using kWeight = Tensor.from(backend, k);
  const of = (weight: Tensor) => ({ weight, epsilon: EPSILON });
  qkNorm(backend, qkv, { q: of(qWeight), k: of(kWeight) }, {
    rows,
    heads,
    kvHeads,
    headDim,
  });
  const actual = qkv.floats();
  const keys = heads * headDim, values = (heads + kvHeads) * headDim;
  const expected = split(x.subarray(0, rows * width), width).flatMap((r) =>
    [
      ...split(r.subarray(0, keys), q.length).map((part) => normed(part, q)),
      ...split(r.subarray(keys, values), k.length).map((part) =>
        normed(part, k)
      ),
    ].flatMap((part) => [...part])
  );
  const isNormed = (_: number, i: number) =>
    i < rows * width && i % width < values;
  found.note(
    "norm of queries and keys",
    relativeError(actual.filter(isNormed), expected),
    row.tolerance,
  );
  const rest = (y: number, i: number) => !isNormed(y, i);
  found.must(
    "values and rows beyond",
    sameBytes(actual.filter(rest), x.filter(rest)),
  );
}

function checkSoftcap(
  backend: Backend,
  row: SoftcapCase,
  random: Random,
  found: Findings,
): void {
  const { rows, columns, cap } = row;
  const x = random.normals((rows + 1) * columns, cap);
  using xs = Tensor.from(backend, x, rows + 1);
  softcap(backend, xs, rows, cap);
  found.note(
    "soft cap",
    relativeError(
      xs.floats(0, rows),
      Array.from(
        x.subarray(0, rows * columns),
        (y) => cap * Math.tanh(y / cap),
      ),
    ),
    row.tolerance,
  );
  found.must(
    "rows beyond the last",
    sameBytes(xs.floats(rows), x.slice(rows * columns)),
  );
}

/** random.h's uniform number. */
function uniformOf(low: number, high: number, draw: number): number {
  const mix = (z: bigint): bigint => {
    z = BigInt.asUintN(64, (z ^ z >> 30n) * 0xbf58476d1ce4e5b9n);
    z = BigInt.asUintN(64, (z ^ z >> 27n) * 0x94d049bb133111ebn);
    return z ^ z >> 31n;
  };
  const seed = BigInt(low >>> 0) | BigInt(high >>> 0) << 32n;
  const step = 0x9e3779b97f4a7c15n * BigInt(draw + 1);
  return Number(mix(BigInt.asUintN(64, mix(seed) + step)) >> 40n) / 2 ** 24;
}

/** The uniform numbers in [0, 1) that draw `token`; none when it may not be drawn. */
function shareOf(
  logits: Float32Array,
  { temperature, topK, topP, minP }: SampleCase,
  token: number,
): [number, number] {
  const ids = [...logits.keys()].sort((a, b) =>
    logits[b]! - logits[a]! || a - b
  );
  const most = logits[ids[0]!]!;
  const weight = (id: number, t: number) => Math.exp((logits[id]! - most) / t);
  let kept = topK > 0 ? ids.slice(0, topK) : ids;
  if (topP > 0 && topP < 1) {
    const goal = Math.fround(topP) *
      kept.reduce((sum, id) => sum + weight(id, 1), 0);
    let n = 0, reached = 0;
    while (n < kept.length && reached < goal) reached += weight(kept[n++]!, 1);
    kept = kept.slice(0, Math.max(1, n));
  }
  kept = kept.filter((id) => minP === 0 || weight(id, 1) >= minP);
  const t = Math.fround(temperature);
  const total = kept.reduce((sum, id) => sum + weight(id, t), 0);
  let low = 0;
  for (const id of kept) {
    const high = low + weight(id, t) / total;
    if (id === token) return [low, high];
    low = high;
  }
  return [Infinity, -Infinity];
}

function checkSample(
  backend: Backend,
  row: SampleCase,
  random: Random,
  found: Findings,
): void {
  const { rows, vocabulary, temperature, topK, topP, minP } = row;
  const seeds = Int32Array.from(
    { length: rows * 4 },
    (_, i) => i % 4 < 2 ? i * 7919 : 0,
  );
  using settings = Tensor.from(
    backend,
    Float32Array.from(
      { length: rows * 4 },
      (_, i) => [temperature, topK, topP, minP][i % 4]!,
    ),
    rows,
  );
  using rng = Tensor.from(backend, seeds, rows);
  using tokens = new Tensor(backend, "I32", 1, rows);
  for (let draw = 0; draw < 3; draw++) {
    // The second time has ties all over, the third nothing else.
    const logits = random.normals(rows * vocabulary, temperature > 0 ? 3 : 1)
      .map((x) => draw === 0 ? x : draw === 1 ? Math.round(x) : -1);
    using tensor = Tensor.from(backend, logits, rows);
    sample(backend, tokens, tensor, settings, rng);
    tokens.integers().forEach((token, b) => {
      const own = logits.subarray(b * vocabulary, (b + 1) * vocabulary);
      if (temperature === 0) {
        const first = own.indexOf(own.reduce((x, y) => Math.max(x, y)));
        found.must("greedy tokens", token === first);
        return;
      }
      const [low, high] = shareOf(own, row, token);
      const u = uniformOf(seeds[b * 4]!, seeds[b * 4 + 1]!, draw);
      // A running sum in f32 is off by about its length.
      const limit = 1e-5 + vocabulary * 2 ** -27;
      found.note("drawn tokens", Math.max(0, low - u, u - high), limit);
    });
  }
  if (temperature > 0) found.must("draws", rng.integers()[2] === 3);
}

function checkDivergence(
  backend: Backend,
  row: DivergenceCase,
  random: Random,
  found: Findings,
): void {
  const { rows, vocabulary } = row;
  for (const noise of [0, 1e-3, 1, 20]) {
    const logits = random.normals(rows * vocabulary, 3);
    const others = random.normals(rows * vocabulary, noise)
      .map((x, i) => logits[i]! + x);
    using from = Tensor.from(backend, logits, rows);
    using with_ = Tensor.from(backend, others, rows);
    using out = Tensor.from(
      backend,
      new Float32Array(2 * (rows + 1)).fill(NaN),
      rows + 1,
    );
    divergence(backend, out, from, with_, rows);
    const actual = out.floats();
    const q = split(others, vocabulary);
    split(logits, vocabulary).forEach((p, i) => {
      const [logP, logQ] = [logSoftmax(p), logSoftmax(q[i]!)];
      const expected = logP.reduce(
        (sum, log, j) => sum + Math.exp(log) * (log - logQ[j]!),
        0,
      );
      found.note(
        "divergence",
        Math.abs(actual[2 * i]! - expected) / Math.max(1, expected),
        row.tolerance,
      );
      const same = first(p) === first(q[i]!);
      found.must("same likeliest token", actual[2 * i + 1] === (same ? 1 : 0));
    });
    found.must("rows beyond the last", Number.isNaN(actual[2 * rows]));
  }
}

/** The first of the highest. */
function first(row: Float64Array): number {
  return row.indexOf(row.reduce((a, b) => Math.max(a, b)));
}

function logSoftmax(row: Float64Array): Float64Array {
  const most = row.reduce((a, b) => Math.max(a, b));
  const sum = row.reduce((a, b) => a + Math.exp(b - most), 0);
  return Float64Array.from(row, (x) => x - most - Math.log(sum));
}

function checkLogProb(
  backend: Backend,
  row: LogProbCase,
  random: Random,
  found: Findings,
): void {
  const { rows, vocabulary } = row;
  const ids = Int32Array.from(
    { length: rows },
    () => random.integer(vocabulary),
  );
  for (const deviation of [1, 20]) {
    const logits = random.normals(rows * vocabulary, deviation);
    using tensor = Tensor.from(backend, logits, rows);
    using targets = Tensor.from(backend, ids);
    using out = Tensor.from(backend, new Float32Array(rows + 1).fill(NaN));
    logProb(backend, out, tensor, targets, rows);
    const actual = out.floats();
    split(logits, vocabulary).forEach((r, i) => {
      const most = r.reduce((a, b) => Math.max(a, b));
      const sum = r.reduce((a, b) => a + Math.exp(b - most), 0);
      const expected = r[ids[i]!]! - most - Math.log(sum);
      found.note(
        "log probability",
        Math.abs(actual[i]! - expected) / Math.max(1, Math.abs(expected)),
        row.tolerance,
      );
    });
    found.must("rows beyond the last", Number.isNaN(actual[rows]));
  }
}
