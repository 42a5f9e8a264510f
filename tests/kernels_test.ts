/** Every row of kernel_cases.ts against f64 formulas, and what holds beyond numbers. */

import {
  assert,
  assertEquals,
  assertLessOrEqual,
  assertThrows,
} from "@std/assert";
import { afterAll, beforeAll, describe, it } from "@std/testing/bdd";
import { Backend } from "../src/backend/backend.ts";
import { WkvError } from "../src/backend/error.ts";
import {
  embed,
  gated,
  linear,
  logProb,
  type Norm,
  type Precision,
  rmsnorm,
  sample,
} from "../src/backend/ops.ts";
import { type Dtype, isQuantised, Tensor } from "../src/backend/tensor.ts";
import {
  dense,
  openCache,
  qkvWidth,
  Random,
  relativeError,
} from "./attention.ts";
import {
  type ArgmaxCase,
  type AttendCase,
  caseName,
  type EmbedCase,
  type GatedCase,
  type KernelCase,
  kernelCases,
  type LinearCase,
  type LogProbCase,
  type RmsnormCase,
  weightTypes,
} from "./kernel_cases.ts";
import { stored } from "./reference.ts";

let backend: Backend;
beforeAll(async () => {
  backend = await Backend.open({ device: "cpu", threads: 1 });
});
afterAll(() => backend.close());

type Numbers = Float32Array<ArrayBuffer>;
const EPSILON = 1e-5;

// ---- matrices of every type, made and read by the layout of their blocks ----

/** A matrix in the library and its numbers in f64, row by row. */
interface Matrix extends Disposable {
  tensor: Tensor;
  rows: Float64Array[];
}

/** A random matrix; its bytes are random too where the type is quantised. */
function matrix(
  random: Random,
  dtype: Dtype,
  rows: number,
  columns: number,
  subnormal = false,
): Matrix {
  const tensor = new Tensor(backend, dtype, rows, columns);
  const bytes = new Uint8Array(rows * tensor.rowBytes);
  const view = new DataView(bytes.buffer);
  const numbers = Array.from({ length: rows }, () => new Float64Array(columns));
  const scale = () =>
    subnormal
      ? (1 + random.integer(1023)) * 2 ** -24
      : stored(random.normal() / 64, "f16");
  if (isQuantised(dtype)) {
    const size = tensor.rowBytes / columns * 32;
    for (let at = 0, b = 0; at < bytes.length; at += size, b++) {
      for (let i = at; i < at + size; i++) bytes[i] = random.integer(256);
      view.setUint16(at, halfBits(scale()), true);
      if (dtype === "Q4_1") view.setUint16(at + 2, halfBits(scale() * 8), true);
      // The lowest byte and the largest nibbles somewhere in every block.
      bytes[at + size - 1] = dtype === "Q8_0" ? 0x80 : 0xf0;
      const row = Math.floor(b / (columns / 32));
      numbers[row]!.set(block(dtype, view, at), b % (columns / 32) * 32);
    }
  } else {
    numbers.forEach((row, r) =>
      row.forEach((_, c) => {
        const type = dtype.toLowerCase() as "f32" | "f16" | "bf16";
        const x = row[c] = stored(random.normal(), type);
        const at = r * tensor.rowBytes + c * tensor.rowBytes / columns;
        if (dtype === "F32") view.setFloat32(at, x, true);
        else if (dtype === "F16") view.setUint16(at, halfBits(x), true);
        else view.setUint16(at, bfloatBits(x), true);
      })
    );
  }
  tensor.write(bytes);
  return { tensor, rows: numbers, [Symbol.dispose]: () => tensor.close() };
}

/** The 32 numbers of a GGUF block. */
function block(dtype: Dtype, view: DataView, at: number): number[] {
  const scale = half(view.getUint16(at, true));
  if (dtype === "Q8_0") {
    return Array.from(
      { length: 32 },
      (_, i) => scale * view.getInt8(at + 2 + i),
    );
  }
  const first = dtype === "Q4_1" ? at + 4 : at + 2;
  const nibble = (i: number) =>
    i < 16 ? view.getUint8(first + i) & 15 : view.getUint8(first + i - 16) >> 4;
  const least = dtype === "Q4_1"
    ? half(view.getUint16(at + 2, true))
    : -8 * scale;
  return Array.from({ length: 32 }, (_, i) => scale * nibble(i) + least);
}

function half(bits: number): number {
  const exponent = bits >> 10 & 31, digits = bits & 1023;
  const size = exponent === 0
    ? digits * 2 ** -24
    : (1024 + digits) * 2 ** (exponent - 25);
  return bits >> 15 ? -size : size;
}

function halfBits(x: number): number {
  const sign = x < 0 || Object.is(x, -0) ? 0x8000 : 0;
  const size = Math.abs(x);
  if (size < 2 ** -14) return sign | size * 2 ** 24;
  const exponent = Math.floor(Math.log2(size));
  return sign | (exponent + 15) << 10 | (size / 2 ** exponent - 1) * 1024;
}

function bfloatBits(x: number): number {
  return new Uint32Array(Float32Array.of(x).buffer)[0]! >>> 16;
}

// ---- the formulas ----

function dot(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i]! * b[i]!;
  return sum;
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

// ---- one check for each kernel ----

const checks: {
  [K in KernelCase["kernel"]]: (
    row: Extract<KernelCase, { kernel: K }>,
    random: Random,
  ) => void;
} = {
  linear: checkLinear,
  gated: checkGated,
  embed: checkEmbed,
  rmsnorm: checkRmsnorm,
  argmax: checkArgmax,
  logProb: checkLogProb,
  attend: checkAttend,
};

function checkLinear(row: LinearCase, random: Random): void {
  const { rows, columns, outputs, xRow = 0, outColumn = 0, add } = row;
  const x = input(random, xRow + rows, columns);
  const weight = normWeight(random, columns);
  const biases = random.normals(outputs);
  const width = outColumn + outputs + (outColumn && 3);
  // Whatever is not written must stay: NaN where nothing is added.
  const before = add
    ? random.normals(rows * width)
    : new Float32Array(rows * width).fill(NaN);
  using w = matrix(random, row.dtype, outputs, columns, row.subnormal);
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
  if (isRounded(row.dtype, row.precision)) {
    assertLessOrEqual(
      relativeError(results, products(plain.map(rounded))),
      tolerance,
    );
    // Against the lengths, as few outputs may cancel to nearly nothing.
    const lengths = plain.flatMap((r) =>
      w.rows.map((v) => Math.hypot(...r) * Math.hypot(...v))
    );
    const error = Math.hypot(...results.map((y, i) => y - exact[i]!));
    assertLessOrEqual(error, 1e-2 * Math.hypot(...lengths));
  } else assertLessOrEqual(relativeError(results, exact), tolerance);
  const outside = (y: number, i: number) => !inside(y, i);
  assertEquals(actual.filter(outside), before.filter(outside));

  // Each row alone gives the same bytes.
  using single = new Tensor(backend, "F32", 1, width);
  for (const r of [0, rows - 1, rows >> 1]) {
    single.write(before.subarray(r * width, (r + 1) * width));
    linear(backend, single, xs, w.tensor, {
      ...options,
      rows: 1,
      xRow: xRow + r,
      outColumn,
    });
    assertEquals(
      single.floats(),
      actual.slice(r * width, (r + 1) * width),
      `row ${r} alone`,
    );
  }
}

function checkGated(row: GatedCase, random: Random): void {
  const { rows, columns, outputs, dtype, upDtype = dtype } = row;
  const x = input(random, rows, columns);
  // Products of a few units, where silu is neither 0 nor the identity.
  const weight = normWeight(random, columns).map((y) => y / 8);
  using gate = matrix(random, dtype, outputs, columns);
  using up = matrix(random, upDtype, outputs, columns);
  using xs = Tensor.from(backend, x, rows);
  using norm = Tensor.from(backend, weight);
  using out = Tensor.from(
    backend,
    new Float32Array(rows * outputs).fill(NaN),
    rows,
  );
  const options = {
    norm: { weight: norm, epsilon: EPSILON },
    precision: row.precision,
  };
  gated(backend, out, xs, gate.tensor, up.tensor, { ...options, rows });
  const actual = out.floats();
  const plain = split(x, columns).map((r) => normed(r, weight));
  const results = (source: Float64Array[]) =>
    source.flatMap((r) =>
      gate.rows.map((g, j) => {
        const a = dot(r, g);
        return a / (1 + Math.exp(-a)) * dot(r, up.rows[j]!);
      })
    );
  const expected = results(
    isRounded(dtype, row.precision) ? plain.map(rounded) : plain,
  );
  assertLessOrEqual(relativeError(actual, expected), row.tolerance);
  using one = new Tensor(backend, "F32", 1, columns);
  using single = new Tensor(backend, "F32", 1, outputs);
  for (const r of [0, rows - 1]) {
    one.write(x.subarray(r * columns, (r + 1) * columns));
    gated(backend, single, one, gate.tensor, up.tensor, {
      ...options,
      rows: 1,
    });
    assertEquals(single.floats(), actual.slice(r * outputs, (r + 1) * outputs));
  }
}

function checkEmbed(row: EmbedCase, random: Random): void {
  const { rows, columns, vocabulary } = row;
  const ids = Int32Array.from(
    { length: rows },
    () => random.integer(vocabulary),
  );
  ids[rows - 1] = vocabulary - 1;
  using table = matrix(random, row.dtype, vocabulary, columns);
  using tokens = Tensor.from(backend, ids);
  using out = Tensor.from(
    backend,
    new Float32Array((rows + 1) * columns).fill(NaN),
    rows + 1,
  );
  embed(backend, out, table.tensor, tokens, rows);
  const expected = [...ids].flatMap((id) => [...table.rows[id]!]);
  assertLessOrEqual(
    relativeError(out.floats(0, rows), expected),
    row.tolerance,
  );
  assert(out.floats(rows).every(Number.isNaN), "a row too many was written");
}

function checkRmsnorm(row: RmsnormCase, random: Random): void {
  const { rows, columns } = row;
  const x = random.normals(rows * columns, 3);
  const weight = random.normals(columns);
  using xs = Tensor.from(backend, x, rows);
  using norm = Tensor.from(backend, weight);
  using apart = new Tensor(backend, "F32", rows, columns);
  const out = row.inPlace ? xs : apart;
  rmsnorm(backend, out, xs, { weight: norm, epsilon: EPSILON }, rows);
  const expected = split(x, columns).flatMap((r) => [...normed(r, weight)]);
  assertLessOrEqual(relativeError(out.floats(), expected), row.tolerance);
}

function checkArgmax({ rows, vocabulary }: ArgmaxCase, random: Random): void {
  using settings = new Tensor(backend, "F32", rows, 4);
  using rng = new Tensor(backend, "I32", rows, 4);
  using tokens = new Tensor(backend, "I32", 1, rows);
  settings.write(
    Float32Array.from({ length: rows * 4 }, (_, i) => i % 4 === 2 ? 1 : 0),
  );
  for (let round = 0; round < 3; round++) {
    // The second round has ties all over, the third nothing else.
    const logits = random.normals(rows * vocabulary)
      .map((x) => round === 0 ? x : round === 1 ? Math.round(x) : -1);
    using tensor = Tensor.from(backend, logits, rows);
    sample(backend, tokens, tensor, settings, rng);
    const expected = split(logits, vocabulary)
      .map((r) => r.indexOf(r.reduce((a, b) => Math.max(a, b), -Infinity)));
    assertEquals([...tokens.integers()], expected);
  }
}

function checkLogProb(row: LogProbCase, random: Random): void {
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
      assertLessOrEqual(
        Math.abs(actual[i]! - expected),
        row.tolerance * Math.max(1, Math.abs(expected)),
      );
    });
    assert(Number.isNaN(actual[rows]), "a row too many was written");
  }
}

function checkAttend(row: AttendCase, random: Random): void {
  const { layer, kept, cacheType, sequences } = row;
  const { heads, kvHeads, headDim } = layer;
  using cache = openCache(backend, layer, {
    policy: "full",
    capacity: kept + 1,
    cacheType,
    sequences,
  });
  if (kept > 0) {
    using fill = new Tensor(backend, "F32", kept, qkvWidth(layer));
    using out = new Tensor(backend, "F32", kept, heads * headDim);
    for (let b = 0; b < sequences; b++) {
      fill.write(random.qkv(layer, kept));
      cache.prefill(0, b, out, fill, kept);
    }
  }
  const before = scores();
  const next = random.qkv(layer, sequences, 2);
  const width = qkvWidth(layer);
  const expected = Array.from(
    { length: sequences },
    (_, b) => dense(cache, next.subarray(b * width, (b + 1) * width), layer, b),
  );
  using qkv = Tensor.from(backend, next, sequences);
  using out = Tensor.from(
    backend,
    new Float32Array(sequences * heads * headDim).fill(NaN),
    sequences,
  );
  cache.attend(0, out, qkv);
  const after = scores();
  expected.forEach((sequence, b) => {
    assertLessOrEqual(
      relativeError(out.floats(b, 1), sequence.out),
      row.tolerance,
    );
    sequence.weights.forEach((weights, n) => {
      const old = before[b]![n]!;
      const gained = after[b]![n]!.map((a, i) => a - (old[i] ?? 0));
      // A score in f32 hides what is below its last digit.
      const hidden = Math.hypot(...old) * 2 ** -24 / Math.hypot(...weights);
      assertLessOrEqual(
        relativeError(gained, weights),
        row.tolerance + 2 * hidden,
      );
      const sum = gained.reduce((a, b) => a + b, 0);
      assertLessOrEqual(Math.abs(sum - 1), 1e-5 * (1 + Math.sqrt(kept) / 16));
    });
  });

  function scores(): number[][][] {
    return Array.from(
      { length: sequences },
      (_, b) =>
        Array.from({ length: kvHeads }, (_, n) => cache.rows(0, n, b).score),
    );
  }
}

// ---- tests ----

describe("each kernel against its formula in f64", () => {
  for (const kernel of new Set(kernelCases.map((row) => row.kernel))) {
    it(kernel, () => {
      const rows = kernelCases.filter((row) => row.kernel === kernel);
      rows.forEach((row, i) => {
        try {
          const check = checks[kernel] as (row: KernelCase, r: Random) => void;
          check(row, new Random(i + 1));
        } catch (cause) {
          throw new Error(`${caseName(row)}: ${cause}`, { cause });
        }
      });
    });
  }
});

describe("tensors", () => {
  it("give back what was written, quantised ones as floats", () => {
    const random = new Random(1);
    for (const dtype of weightTypes) {
      if (dtype === "F16" || dtype === "BF16") continue;
      for (const subnormal of [false, true]) {
        using m = matrix(random, dtype, 9, 96, subnormal);
        for (const [row, count] of [[0, 9], [8, 1], [3, 4]] as const) {
          const expected = m.rows.slice(row, row + count).flatMap((
            r,
          ) => [...r]);
          const error = relativeError(m.tensor.floats(row, count), expected);
          assertLessOrEqual(error, dtype === "Q4_1" ? 1e-7 : 0, dtype);
        }
      }
    }
  });

  it("refuse a block whose scale is not finite", () => {
    for (const dtype of ["Q8_0", "Q4_0", "Q4_1"] as const) {
      for (const bits of [0x7c00, 0xfc00, 0x7e00, 0xffff]) {
        using tensor = new Tensor(backend, dtype, 2, 64);
        const bytes = new Uint8Array(2 * tensor.rowBytes);
        new DataView(bytes.buffer).setUint16(
          tensor.rowBytes + tensor.rowBytes / 2,
          bits,
          true,
        );
        assertThrows(() => tensor.write(bytes), WkvError, "bad data");
      }
    }
    using tensor = new Tensor(backend, "Q4_1", 1, 32);
    const bytes = new Uint8Array(20);
    new DataView(bytes.buffer).setUint16(2, 0x7c00, true);
    assertThrows(() => tensor.write(bytes), WkvError, "bad data");
  });
});

describe("threads", () => {
  it("change no byte of linear, gated and logProb", async () => {
    const random = new Random(7);
    const x = random.normals(40 * 576);
    const weight = random.normals(576);
    const ids = Int32Array.from({ length: 40 }, () => random.integer(1001));
    const bytes = random.normals(1001 * 576);
    const results: Numbers[][] = [];
    for (const threads of [1, 2, 3]) {
      using on = await Backend.open({ device: "cpu", threads });
      using xs = Tensor.from(on, x, 40);
      using norm = Tensor.from(on, weight);
      using targets = Tensor.from(on, ids);
      using w = new Tensor(on, "Q4_1", 1001, 576);
      const packed = new Uint8Array(1001 * w.rowBytes)
        .map((_, i) => bytes[i]! * 50 & 0x3f);
      w.write(packed);
      using out = new Tensor(on, "F32", 40, 1001);
      using logs = new Tensor(on, "F32", 1, 40);
      for (const rows of [1, 3, 40]) {
        for (const precision of ["f32", "int8"] as const) {
          const options = {
            rows,
            norm: { weight: norm, epsilon: EPSILON },
            precision,
          };
          linear(on, out, xs, w, options);
          logProb(on, logs, out, targets, rows);
          const first = [out.floats(), logs.floats()];
          gated(on, out, xs, w, w, options);
          results.push([...first, out.floats()]);
        }
      }
    }
    const each = results.length / 3;
    results.forEach((result, i) => assertEquals(result, results[i % each]));
  });
});

describe("ops on numbers that are none", () => {
  it("embed refuses an id outside the table", () => {
    using table = new Tensor(backend, "F32", 5, 8);
    using out = new Tensor(backend, "F32", 2, 8);
    for (const id of [-1, 5, 2 ** 31 - 1, -(2 ** 31)]) {
      using tokens = Tensor.from(backend, Int32Array.of(0, id));
      assertThrows(
        () => embed(backend, out, table, tokens, 2),
        WkvError,
        "bad data",
      );
    }
  });

  it("sample and logProb refuse NaN logits and ids outside", () => {
    using settings = Tensor.from(backend, Float32Array.of(0, 0, 1, 0));
    using rng = new Tensor(backend, "I32", 1, 4);
    using tokens = new Tensor(backend, "I32", 1, 1);
    using logits = Tensor.from(backend, Float32Array.of(1, NaN, 3));
    assertThrows(
      () => sample(backend, tokens, logits, settings, rng),
      WkvError,
      "bad data",
    );
    using out = new Tensor(backend, "F32", 1, 1);
    for (const id of [-1, 3, 2 ** 31 - 1]) {
      using targets = Tensor.from(backend, Int32Array.of(id));
      assertThrows(
        () => logProb(backend, out, logits, targets, 1),
        WkvError,
        "bad data",
      );
    }
  });

  it("linear and gated hide no NaN and no Infinity", () => {
    const norm: Norm = {
      weight: Tensor.from(backend, new Float32Array(64).fill(1)),
      epsilon: EPSILON,
    };
    using _ = norm.weight;
    const random = new Random(3);
    for (const dtype of weightTypes) {
      for (const precision of ["f32", "int8"] as const) {
        for (const bad of [NaN, Infinity]) {
          const x = random.normals(2 * 64);
          x[70] = bad;
          using xs = Tensor.from(backend, x, 2);
          using w = matrix(random, dtype, 3, 64);
          using out = new Tensor(backend, "F32", 2, 3);
          const at = `${dtype}, ${precision}, ${bad}`;
          const finite = () => out.floats(1, 1).some(Number.isFinite);
          linear(backend, out, xs, w.tensor, { rows: 2, precision });
          assert(!finite(), `linear, ${at}`);
          assert(out.floats(0, 1).every(Number.isFinite), `linear, ${at}`);
          gated(backend, out, xs, w.tensor, w.tensor, {
            rows: 2,
            norm,
            precision,
          });
          assert(!finite(), `gated, ${at}`);
        }
      }
    }
  });
});
