/**
 * Compares the CUDA library with the CPU library, op by op and on the default
 * model; run by hand on a machine with a GPU.
 *
 *   deno run -A tests/cuda_check.ts [--only attend,model] [--model FILE]
 *     [--steps 1500] [--tokens 64] [--device cuda]
 *
 * Prints one JSON line a case: `error` is the length of the difference over
 * that of the CPU's result (Infinity after a NaN), `limit` what it must stay
 * below. Ends with the number of failures, and exits with 1 when there are any.
 * `--device cpu` compares the CPU library with itself, to test this script.
 */

import { parseArgs } from "@std/cli/parse-args";
import { Backend } from "../src/backend/backend.ts";
import { WkvError } from "../src/backend/error.ts";
import {
  embed,
  gated,
  linear,
  type Norm,
  type Precision,
  rmsnorm,
} from "../src/backend/ops.ts";
import { wkv_pairs } from "../src/backend/symbols.ts";
import { type Dtype, isQuantised, Tensor } from "../src/backend/tensor.ts";
import {
  type CacheOptions,
  type CacheType,
  KvCache,
} from "../src/cache/cache.ts";
import { policyNames } from "../src/cache/registry.ts";
import { DEFAULT_MODEL } from "../src/hub/models.ts";
import { loadModel } from "../src/model.ts";
import { Session } from "../src/session.ts";

const args = parseArgs(Deno.args, {
  string: ["only", "model", "steps", "tokens", "device"],
  default: {
    only: "",
    model: DEFAULT_MODEL,
    steps: "1500",
    tokens: "64",
    device: "cuda",
  },
}) as Record<string, string>;
const steps = Number(args.steps), newTokens = Number(args.tokens);
const device = args.device as "cuda" | "cpu";

type Floats = Float32Array<ArrayBuffer>;

// ---- report ----

let cases = 0, failures = 0;

/** Prints a case; `ok` decides where there is no limit. */
function print(op: string, facts: Record<string, unknown>): void {
  cases++;
  const { error, limit } = facts as { error?: number; limit?: number };
  const ok = facts.ok ??
    (error === undefined || limit === undefined || error <= limit);
  if (!ok) failures++;
  console.log(JSON.stringify({ op, ok, ...facts }, (_, value) => {
    if (typeof value !== "number" || Number.isFinite(value)) return value;
    return String(value);
  }));
}

/** Runs a case; what it throws is a failure. */
async function attempt(
  op: string,
  facts: Record<string, unknown>,
  body: () => Record<string, unknown> | Promise<Record<string, unknown>>,
): Promise<void> {
  try {
    print(op, { ...facts, ...await body() });
  } catch (error) {
    print(op, { ...facts, ok: false, thrown: String(error) });
  }
}

function difference(actual: ArrayLike<number>, expected: ArrayLike<number>) {
  let squares = 0, total = 0;
  for (let i = 0; i < expected.length; i++) {
    squares += (actual[i]! - expected[i]!) ** 2;
    total += expected[i]! ** 2;
  }
  if (actual.length !== expected.length || Number.isNaN(squares)) {
    return Infinity;
  }
  return squares === 0 ? 0 : Math.sqrt(squares / total);
}

// ---- inputs ----

let state = 1;

function uniform(): number {
  let x = state = state + 0x6d2b79f5 | 0;
  x = Math.imul(x ^ x >>> 15, x | 1);
  x ^= x + Math.imul(x ^ x >>> 7, x | 61);
  return ((x ^ x >>> 14) >>> 0) / 2 ** 32;
}

function normal(): number {
  return Math.sqrt(-2 * Math.log(1 - uniform())) *
    Math.cos(2 * Math.PI * uniform());
}

function normals(length: number, deviation = 1): Floats {
  return Float32Array.from({ length }, () => deviation * normal());
}

const half = new Uint16Array(new Float16Array(1).buffer);
const halfValue = new Float16Array(half.buffer);
function toHalf(x: number): number {
  halfValue[0] = x;
  return half[0]!;
}

/** Bytes of random weights, as a file holds them. */
function weightBytes(
  dtype: Dtype,
  rows: number,
  columns: number,
): Uint8Array<ArrayBuffer> {
  const count = rows * columns;
  if (!isQuantised(dtype)) {
    const values = normals(count, 0.1);
    if (dtype === "F32") return new Uint8Array(values.buffer);
    if (dtype === "F16") {
      return new Uint8Array(new Float16Array(values).buffer);
    }
    const bits = new Uint32Array(values.buffer);
    return new Uint8Array(Uint16Array.from(bits, (b) => b >>> 16).buffer);
  }
  const bytes = dtype === "Q8_0" ? 34 : dtype === "Q4_0" ? 18 : 20;
  const out = new Uint8Array(count / 32 * bytes);
  const view = new DataView(out.buffer);
  for (let i = 0; i < out.length; i++) out[i] = Math.floor(uniform() * 256);
  for (let at = 0; at < out.length; at += bytes) {
    view.setUint16(at, toHalf((0.5 + uniform()) * 0.01), true);
    if (dtype === "Q4_1") {
      view.setUint16(at + 2, toHalf(-0.07 * uniform()), true);
    }
  }
  return out;
}

/** The two libraries, and tensors of the same content in both. */
const cpu = await Backend.open({ device: "cpu" });
const gpu = await Backend.open({ device });
const both = [cpu, gpu] as const;
type Pair = [Tensor, Tensor];

function pair(values: Floats | Int32Array<ArrayBuffer>, rows = 1): Pair {
  return [Tensor.from(cpu, values, rows), Tensor.from(gpu, values, rows)];
}

function weightPair(dtype: Dtype, rows: number, columns: number): Pair {
  const bytes = weightBytes(dtype, rows, columns);
  return both.map((backend) => {
    const tensor = new Tensor(backend, dtype, rows, columns);
    tensor.write(bytes);
    return tensor;
  }) as Pair;
}

function close(...pairs: (Pair | undefined)[]): void {
  for (const tensor of pairs.flatMap((p) => p ?? [])) tensor.close();
}

// ---- linear, gated, embed, rmsnorm ----

const dtypes: Dtype[] = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"];

async function checkLinear(): Promise<void> {
  const shapes: [number, number][] = [
    [7, 32],
    [65, 96],
    [130, 576],
    [48, 1536],
    [9, 33],
    [20, 50],
  ];
  for (const dtype of dtypes) {
    for (const precision of ["f32", "int8"] as const) {
      if (precision === "int8" && !isQuantised(dtype)) continue;
      let error = 0, count = 0, worst = "";
      const facts = { dtype, precision };
      await attempt("linear", facts, () => {
        for (const [j, c] of shapes) {
          if (isQuantised(dtype) && c % 32 !== 0) continue;
          const w = weightPair(dtype, j, c);
          for (const rows of [1, 2, 3, 4, 5, 7, 8, 9, 17, 64, 70]) {
            const xRow = rows % 3, outColumn = rows % 4, add = rows % 2 === 1;
            const x = pair(normals((rows + xRow) * c), rows + xRow);
            const out = pair(normals(rows * (j + outColumn)), rows);
            const norm = rows % 4 < 2 ? pair(normals(c)) : undefined;
            const bias = rows % 5 < 2 ? pair(normals(j)) : undefined;
            both.forEach((backend, i) =>
              linear(backend, out[i]!, x[i]!, w[i]!, {
                rows,
                xRow,
                outColumn,
                add,
                precision,
                ...(norm ? { norm: { weight: norm[i]!, epsilon: 1e-5 } } : {}),
                bias: bias?.[i],
              })
            );
            const found = difference(out[1].floats(), out[0].floats());
            if (!(found <= error)) error = found, worst = `${rows}x${j}x${c}`;
            count++;
            close(x, out, norm, bias);
          }
          // out = x, normed, added.
          close(w);
        }
        for (const rows of [1, 6, 20]) {
          const w = weightPair(dtype, 96, 96), norm = pair(normals(96));
          const x = pair(normals(rows * 96), rows);
          both.forEach((backend, i) =>
            linear(backend, x[i]!, x[i]!, w[i]!, {
              rows,
              add: true,
              precision,
              norm: { weight: norm[i]!, epsilon: 1e-5 },
            })
          );
          const found = difference(x[1].floats(), x[0].floats());
          if (!(found <= error)) error = found, worst = `in place, ${rows}`;
          count++;
          close(w, norm, x);
        }
        return {
          count,
          error,
          worst,
          limit: precision === "f32" ? 1e-5 : 1e-4,
        };
      });
    }
  }
}

async function checkGated(): Promise<void> {
  const kinds: [Dtype, Dtype][] = [
    ...dtypes.map((d): [Dtype, Dtype] => [d, d]),
    ["Q4_1", "Q8_0"],
    ["F16", "Q4_0"],
  ];
  for (const [first, second] of kinds) {
    for (const precision of ["f32", "int8"] as Precision[]) {
      await attempt("gated", { first, second, precision }, () => {
        let error = 0;
        for (const [j, c] of [[37, 64], [100, 576]] as const) {
          const gate = weightPair(first, j, c), up = weightPair(second, j, c);
          const norm = pair(normals(c));
          for (const rows of [1, 2, 3, 6, 8, 11, 66]) {
            const x = pair(normals(rows * c), rows);
            const out = pair(normals(rows * j), rows);
            both.forEach((backend, i) =>
              gated(backend, out[i]!, x[i]!, gate[i]!, up[i]!, {
                rows,
                norm: { weight: norm[i]!, epsilon: 1e-5 },
                precision,
              })
            );
            error = Math.max(
              error,
              difference(out[1].floats(), out[0].floats()),
            );
            close(x, out);
          }
          close(gate, up, norm);
        }
        return { error, limit: precision === "f32" ? 1e-5 : 1e-4 };
      });
    }
  }
}

async function checkEmbed(): Promise<void> {
  for (const dtype of dtypes) {
    await attempt("embed", { dtype }, () => {
      const table = weightPair(dtype, 50, 96);
      const ids = pair(Int32Array.of(0, 49, 7, 7, 13));
      const out = pair(normals(5 * 96), 5);
      both.forEach((b, i) => embed(b, out[i]!, table[i]!, ids[i]!, 5));
      const read = isQuantised(dtype)
        ? difference(table[1].floats(), table[0].floats())
        : 0;
      const error = Math.max(
        read,
        difference(out[1].floats(), out[0].floats()),
      );
      close(table, ids, out);
      return { error, limit: 1e-6 };
    });
  }
  for (const columns of [1, 31, 576, 4096]) {
    await attempt("rmsnorm", { columns }, () => {
      const x = pair(normals(5 * columns), 5), weight = pair(normals(columns));
      both.forEach((b, i) => {
        const norm: Norm = { weight: weight[i]!, epsilon: 1e-6 };
        rmsnorm(b, x[i]!, x[i]!, norm, 5);
      });
      const error = difference(x[1].floats(), x[0].floats());
      close(x, weight);
      return { error, limit: 1e-6 };
    });
  }
}

// ---- caches ----

interface Shape {
  heads: number;
  kvHeads: number;
  headDim: number;
  rotary?: number;
  pairs?: "half" | "interleaved";
}

function openCache(backend: Backend, shape: Shape, options: CacheOptions) {
  const rotary = shape.rotary ?? shape.headDim;
  const frequencies = Float32Array.from(
    { length: rotary / 2 },
    (_, i) => 10000 ** (-2 * i / rotary),
  );
  return new KvCache(
    backend,
    { layers: 2, context: 64, ...shape },
    (positions) =>
      backend.open((out) =>
        backend.call(
          "wkv_rope_open",
          shape.headDim,
          shape.pairs === "half"
            ? wkv_pairs.WKV_PAIRS_HALF
            : wkv_pairs.WKV_PAIRS_INTERLEAVED,
          frequencies,
          frequencies.byteLength,
          positions,
          out,
          4,
        )
      ),
    options,
  );
}

/** The layer that is used; KvCache.stats reads the first. */
const layer = 0;

/** What two caches hold: the same tokens? and how far apart is their state? */
function compareCaches(shape: Shape, caches: readonly [KvCache, KvCache]) {
  const result = {
    heads: 0,
    equal: 0,
    overlap: 0,
    slots: 0,
    score: 0,
    keys: 0,
    values: 0,
    counts: true,
  };
  for (let b = 0; b < caches[0].sequences; b++) {
    const [one, two] = caches.map((c) => JSON.stringify(c.stats(b)));
    result.counts &&= one === two;
    for (let n = 0; n < shape.kvHeads; n++) {
      const [x, y] = caches.map((c) => c.rows(layer, n, b)) as [
        ReturnType<KvCache["rows"]>,
        ReturnType<KvCache["rows"]>,
      ];
      result.heads++;
      const has = new Set(x.kept);
      // Two empty heads are equal.
      result.overlap += (y.kept.filter((p) => has.has(p)).length || 1) /
        Math.max(1, x.kept.length);
      if (`${x.kept}` !== `${y.kept}` || `${x.steps}` !== `${y.steps}`) {
        continue;
      }
      result.equal++;
      if (
        `${caches[0].slots(layer, n, b)}` === `${caches[1].slots(layer, n, b)}`
      ) result.slots++;
      result.score = Math.max(result.score, difference(y.score, x.score));
      result.keys = Math.max(
        result.keys,
        difference(caches[1].keys(layer, n, b), caches[0].keys(layer, n, b)),
      );
      result.values = Math.max(
        result.values,
        difference(
          caches[1].values(layer, n, b),
          caches[0].values(layer, n, b),
        ),
      );
    }
  }
  result.overlap /= result.heads;
  return result;
}

function limitOf(cacheType: CacheType): number {
  return cacheType === "f32" ? 1e-5 : cacheType === "f16" ? 1e-3 : 8e-3;
}

/** Steps of both libraries; the second is told the first's victims, or chooses itself. */
function attendSteps(
  shape: Shape,
  options: CacheOptions,
  count: number,
  forced: boolean,
  by: "attend" | "insert",
) {
  const { heads, kvHeads, headDim } = shape;
  const sequences = options.sequences ?? 1;
  const caches = both.map((b) => openCache(b, shape, options)) as [
    KvCache,
    KvCache,
  ];
  const slots = caches[0].capacity;
  const columns = (by === "attend" ? heads + 2 * kvHeads : 2 * kvHeads) *
    headDim;
  const input: Pair = both.map((b) =>
    new Tensor(b, "F32", sequences, columns)
  ) as Pair;
  const given: Pair = both.map((b) =>
    new Tensor(b, "F32", sequences, kvHeads * (slots + 1))
  ) as Pair;
  const out: Pair = both.map((b) =>
    new Tensor(b, "F32", sequences, heads * headDim)
  ) as Pair;
  const victims = new Tensor(gpu, "I32", sequences, kvHeads);
  const kept: number[][] = Array.from(
    { length: sequences * kvHeads },
    () => [],
  );
  let error = 0, at = -1;
  for (let step = 0; step < count; step++) {
    const row = normals(sequences * columns);
    if (by === "attend") {
      // Sharp and flat attention in turns.
      const sharp = [0.3, 1, 3][Math.floor(step / 50) % 3]!;
      for (let b = 0; b < sequences; b++) {
        for (let i = 0; i < heads * headDim; i++) {
          row[b * columns + i]! *= sharp;
        }
      }
    } else {
      const weights = Float32Array.from({
        length: sequences * kvHeads * (slots + 1),
      }, () => uniform() ** 4);
      given.forEach((t) => t.write(weights));
    }
    input.forEach((t) => t.write(row));
    const full = kept[0]!.length === slots;
    const run = (i: 0 | 1, with_?: Tensor) =>
      by === "attend"
        ? caches[i].attend(layer, out[i], input[i], with_)
        : caches[i].insert(layer, input[i], given[i], with_);
    run(0);
    const ranks = new Int32Array(sequences * kvHeads).fill(-1);
    for (let b = 0; b < sequences; b++) {
      const events = full ? eventsOf(caches[0], b) : [];
      for (let n = 0; n < kvHeads; n++) {
        const list = kept[b * kvHeads + n]!;
        list.push(step);
        if (!full) continue;
        const rank = list.indexOf(events[n]!);
        ranks[b * kvHeads + n] = rank;
        list.splice(rank, 1);
      }
    }
    victims.write(ranks);
    run(1, forced ? victims : undefined);
    if (by === "attend") {
      const found = difference(out[1].floats(), out[0].floats());
      if (!(found <= error)) error = found, at = step;
    }
  }
  const state = compareCaches(shape, caches);
  caches.forEach((c) => c.close());
  close(input, given, out);
  victims.close();
  return { error, at, ...state };
}

/** The places in the text of the tokens that left each head in the last step. */
function eventsOf(cache: KvCache, sequence: number): number[] {
  return cache.events(sequence).filter((e) => e.layer === layer)
    .sort((a, b) => a.head - b.head).map((e) => e.from);
}

async function checkAttend(): Promise<void> {
  const small: Shape = { heads: 9, kvHeads: 3, headDim: 64 };
  const runs: [Shape, CacheOptions, number][] = [];
  for (const policy of policyNames()) {
    for (const cacheType of ["f32", "f16", "bf16"] as const) {
      runs.push([
        small,
        { policy, cacheType, budget: 64, capacity: steps },
        steps,
      ]);
    }
    runs.push([small, {
      policy,
      cacheType: "f16",
      budget: 50,
      positions: "text",
      sequences: 3,
      capacity: 300,
    }, 300]);
  }
  const shapes: Shape[] = [
    { heads: 4, kvHeads: 4, headDim: 80, pairs: "half" },
    { heads: 4, kvHeads: 2, headDim: 96, rotary: 48 },
    { heads: 8, kvHeads: 2, headDim: 128, pairs: "half" },
    { heads: 10, kvHeads: 2, headDim: 256 },
    { heads: 6, kvHeads: 1, headDim: 34 },
    { heads: 7, kvHeads: 1, headDim: 66, rotary: 20 },
    { heads: 8, kvHeads: 1, headDim: 512 },
    { heads: 11, kvHeads: 1, headDim: 64 },
    { heads: 32, kvHeads: 2, headDim: 128 },
  ];
  for (const shape of shapes) {
    for (const cacheType of ["f32", "f16"] as const) {
      runs.push([shape, {
        policy: "weighted-kv",
        cacheType,
        budget: 40,
        sequences: 2,
      }, 200]);
      runs.push([shape, {
        policy: "weighted-kv-ward",
        cacheType,
        budget: 33,
        sinks: 0,
        recent: 0,
      }, 150]);
    }
  }
  for (const budget of [1, 2, 31, 127, 1000]) {
    runs.push([small, {
      policy: "weighted-kv",
      cacheType: "f32",
      budget,
      sinks: 0,
      recent: 0,
    }, budget + 200]);
    runs.push([small, {
      policy: "weighted-kv-ward",
      cacheType: "f32",
      budget,
      sinks: 0,
      recent: 0,
    }, budget + 200]);
  }
  for (const [shape, options, count] of runs) {
    const limit = limitOf(options.cacheType!);
    await attempt("attend", { ...shape, ...options, steps: count }, () => {
      const r = attendSteps(shape, options, count, true, "attend");
      const ok = r.counts && r.equal === r.heads && r.slots === r.heads &&
        r.error <= limit && r.score <= 1e-4 && r.keys <= limit &&
        r.values <= limit;
      return { ok, limit, ...r };
    });
  }
  for (const policy of policyNames()) {
    const options: CacheOptions = {
      policy,
      cacheType: "f16",
      budget: 100,
      sequences: 2,
      capacity: 400,
    };
    await attempt("attend free", { ...small, ...options }, () => {
      const r = attendSteps(small, options, 400, false, "attend");
      return { ok: r.counts && r.overlap >= 0.9, ...r };
    });
    await attempt("insert", { ...small, ...options }, () => {
      const r = attendSteps(small, options, 400, true, "insert");
      return {
        ok: r.counts && r.equal === r.heads && r.slots === r.heads &&
          r.score <= 1e-5 && r.values <= 1e-3,
        ...r,
      };
    });
  }
  await attempt("attend twice", {}, () => {
    // The same steps in two caches of one device give the same bytes.
    const outs = [0, 1].map(() => {
      state = 77;
      const cache = openCache(gpu, small, { budget: 64 });
      const input = new Tensor(gpu, "F32", 1, 15 * 64),
        out = new Tensor(gpu, "F32", 1, 9 * 64);
      const all: number[] = [];
      for (let i = 0; i < 300; i++) {
        input.write(normals(15 * 64, 2));
        cache.attend(layer, out, input);
        all.push(...out.floats());
      }
      for (let n = 0; n < 3; n++) {
        all.push(...cache.rows(layer, n).score, ...cache.values(layer, n));
      }
      cache.close();
      input.close();
      out.close();
      return Float32Array.from(all);
    });
    const [x, y] = outs.map((o) => new Uint32Array(o.buffer)) as [
      Uint32Array,
      Uint32Array,
    ];
    return { ok: x.every((bits, i) => bits === y[i]) };
  });
}

// ---- prefill ----

async function checkPrefill(): Promise<void> {
  const shapes: Shape[] = [
    { heads: 9, kvHeads: 3, headDim: 64 },
    { heads: 4, kvHeads: 4, headDim: 80, pairs: "half" },
    { heads: 4, kvHeads: 2, headDim: 128, rotary: 64 },
    { heads: 3, kvHeads: 1, headDim: 256 },
    { heads: 2, kvHeads: 1, headDim: 512 },
  ];
  for (const shape of shapes) {
    for (const policy of policyNames()) {
      for (const cacheType of ["f32", "f16", "bf16"] as const) {
        for (const positions of ["cache", "text"] as const) {
          if (cacheType === "bf16" && shape.headDim !== 64) continue;
          const options: CacheOptions = {
            policy,
            cacheType,
            positions,
            budget: 150,
            capacity: 1000,
            sequences: 2,
          };
          await attempt(
            "prefill",
            { ...shape, ...options },
            () => prefillSteps(shape, options),
          );
        }
      }
    }
  }
}

function prefillSteps(shape: Shape, options: CacheOptions) {
  const { heads, kvHeads, headDim } = shape;
  const caches = both.map((b) => openCache(b, shape, options)) as [
    KvCache,
    KvCache,
  ];
  const columns = (heads + 2 * kvHeads) * headDim;
  let error = 0;
  const equals: string[] = [];
  let score = 0, values = 0, counts = true, overlap = 1;
  // Into an empty cache, up to its budget and beyond it; then a row, a few, and many.
  for (const rows of [1, 20, 129, 1, 37, 200]) {
    const qkv = pair(normals(rows * columns), rows);
    const out: Pair = both.map((b) =>
      new Tensor(b, "F32", rows, heads * headDim)
    ) as Pair;
    caches.forEach((c, i) => c.prefill(layer, 1, out[i]!, qkv[i]!, rows));
    const found = difference(out[1].floats(), out[0].floats());
    // After a fork the outputs may differ.
    if (overlap === 1 || !Number.isFinite(found)) {
      error = Math.max(error, found);
    }
    const r = compareCaches(shape, caches);
    equals.push(`${r.equal - kvHeads}/${kvHeads}`);
    counts &&= r.counts;
    overlap = Math.min(overlap, r.overlap);
    score = Math.max(score, r.score);
    values = Math.max(values, r.values);
    close(qkv, out);
  }
  caches.forEach((c) => c.close());
  const limit = limitOf(options.cacheType!);
  return {
    ok: counts && error <= limit && score <= 1e-3 && values <= limit &&
      overlap >= 0.95,
    error,
    limit,
    score,
    values,
    overlap,
    equals: equals.join(" "),
  };
}

// ---- sample, log_prob, errors ----

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

/** The uniform numbers that give `token`, in f64: two libraries that sum in f32 and f64 may part next to their ends. */
function shareOf(
  logits: Floats,
  [temperature, topK, topP, minP]: readonly number[],
  token: number,
): [number, number] {
  const ids = [...logits.keys()].sort((a, b) =>
    logits[b]! - logits[a]! || a - b
  );
  const most = logits[ids[0]!]!;
  const weight = (id: number, t: number) => Math.exp((logits[id]! - most) / t);
  let kept = topK! > 0 ? ids.slice(0, topK) : ids;
  if (topP! > 0 && topP! < 1) {
    const goal = Math.fround(topP!) *
      kept.reduce((sum, id) => sum + weight(id, 1), 0);
    let n = 0, reached = 0;
    while (n < kept.length && reached < goal) reached += weight(kept[n++]!, 1);
    kept = kept.slice(0, Math.max(1, n));
  }
  kept = kept.filter((id) => minP === 0 || weight(id, 1) >= minP!);
  const t = Math.fround(temperature!);
  const total = kept.reduce((sum, id) => sum + weight(id, t), 0);
  let low = 0;
  for (const id of kept) {
    const high = low + weight(id, t) / total;
    if (id === token) return [low, high];
    low = high;
  }
  return [Infinity, -Infinity];
}

async function checkSample(): Promise<void> {
  const rows = 5;
  for (const vocabulary of [3, 1000, 49152]) {
    for (
      const settings of [
        [0, 0, 1, 0],
        [1, 0, 1, 0],
        [0.8, 40, 1, 0],
        [1.3, 0, 0.9, 0],
        [0.8, 0, 1, 0.05],
        [1, 50, 0.95, 0.02],
        [0.7, 1, 1, 0],
        [20, 0, 1, 0],
        [1, 0, 0.0001, 0],
      ]
    ) {
      await attempt("sample", { vocabulary, settings: `${settings}` }, () => {
        const rules = pair(
          Float32Array.from({ length: rows * 4 }, (_, i) => settings[i % 4]!),
          rows,
        );
        const rng = pair(
          Int32Array.from(
            { length: rows * 4 },
            (_, i) => i % 4 < 2 ? i * 7919 : 0,
          ),
          rows,
        );
        const tokens = pair(new Int32Array(rows));
        const seeds = rng[0].integers();
        let equal = 0, wrong = 0, count = 0;
        for (let draw = 0; draw < 20; draw++) {
          // Every third time with many equal logits.
          const values = normals(rows * vocabulary, 3).map((x) =>
            draw % 3 === 2 ? Math.round(x) : x
          );
          const logits = pair(values, rows);
          both.forEach((b, i) =>
            b.call(
              "wkv_sample",
              tokens[i]!.handle,
              logits[i]!.handle,
              rules[i]!.handle,
              rng[i]!.handle,
            )
          );
          const [x, y] = tokens.map((t) => t.integers()) as [
            Int32Array,
            Int32Array,
          ];
          x.forEach((token, i) => {
            count++;
            if (token === y[i]) equal++;
            else if (settings[0] === 0) wrong++;
            else {
              const row = values.subarray(i * vocabulary, (i + 1) * vocabulary);
              const [low, high] = shareOf(row, settings, y[i]!);
              const u = uniformOf(seeds[i * 4]!, seeds[i * 4 + 1]!, draw);
              if (u < low - 1e-5 || u > high + 1e-5) wrong++;
            }
          });
          close(logits);
        }
        const draws = `${rng[0].integers()}` === `${rng[1].integers()}`;
        close(rules, rng, tokens);
        return {
          ok: draws && wrong === 0,
          equal,
          wrong,
          count,
          draws,
        };
      });
    }
    await attempt("log_prob", { vocabulary }, () => {
      const logits = pair(normals(rows * vocabulary, 4), rows);
      const targets = pair(
        Int32Array.from({ length: rows }, (_, i) => i % vocabulary),
      );
      const out = pair(new Float32Array(rows));
      both.forEach((b, i) =>
        b.call(
          "wkv_log_prob",
          out[i]!.handle,
          logits[i]!.handle,
          targets[i]!.handle,
          rows,
        )
      );
      const error = difference(out[1].floats(), out[0].floats());
      close(logits, targets, out);
      return { error, limit: 1e-6 };
    });
  }
}

/** Both libraries must refuse the same calls with the same words. */
async function checkErrors(): Promise<void> {
  const shape: Shape = { heads: 2, kvHeads: 1, headDim: 32 };
  const f32 = (b: Backend, length: number, rows = 1, value = 0) =>
    Tensor.from(b, new Float32Array(length).fill(value), rows);
  const calls: Record<string, (b: Backend) => void> = {
    "token": (b) =>
      embed(
        b,
        f32(b, 32),
        Tensor.from(b, normals(64), 2),
        Tensor.from(b, Int32Array.of(2)),
        1,
      ),
    "nan logit": (b) =>
      b.call(
        "wkv_sample",
        Tensor.from(b, new Int32Array(1)).handle,
        Tensor.from(b, Float32Array.of(1, NaN, 3)).handle,
        f32(b, 4).handle,
        Tensor.from(b, new Int32Array(4)).handle,
      ),
    "target": (b) =>
      b.call(
        "wkv_log_prob",
        f32(b, 1).handle,
        f32(b, 9).handle,
        Tensor.from(b, Int32Array.of(9)).handle,
        1,
      ),
    "full": (b) => {
      const cache = openCache(b, shape, { policy: "full", capacity: 2 });
      for (let i = 0; i < 3; i++) {
        cache.attend(0, f32(b, 64), f32(b, 128, 1, 0.5));
      }
    },
    "rank": (b) => {
      const cache = openCache(b, shape, { budget: 4, sinks: 1, recent: 1 });
      for (let i = 0; i < 5; i++) {
        cache.attend(
          0,
          f32(b, 64),
          f32(b, 128, 1, 0.5),
          i < 4 ? undefined : Tensor.from(b, Int32Array.of(0)),
        );
      }
    },
    "nan score": (b) => {
      const cache = openCache(b, shape, { budget: 4, sinks: 0, recent: 0 });
      for (let i = 0; i < 5; i++) {
        cache.attend(0, f32(b, 64), f32(b, 128, 1, NaN));
      }
    },
    "scale": (b) =>
      new Tensor(b, "Q8_0", 1, 32).write(new Uint8Array(34).fill(255)),
    "dtype": (b) => b.call("wkv_embed", f32(b, 1).handle, 12345, 1, 1),
    "in graph": (b) => {
      b.record(() =>
        b.call(
          "wkv_log_prob",
          f32(b, 1).handle,
          f32(b, 9).handle,
          f32(b, 1).handle,
          1,
        )
      ).close();
    },
  };
  for (const [name, call] of Object.entries(calls)) {
    await attempt("refused", { name }, () => {
      const texts = both.map((b) => {
        try {
          call(b);
          return "no error";
        } catch (error) {
          return error instanceof WkvError ? error.message : `threw ${error}`;
        }
      });
      return {
        ok: texts[0] === texts[1] && texts[0] !== "no error",
        text: texts[0],
        ...(texts[0] === texts[1] ? {} : { other: texts[1] }),
      };
    });
  }
  await attempt("refused in a run", {}, async () => {
    // A fault that a graph finds is reported once, and the context goes on.
    const texts: string[] = [];
    for (const b of both) {
      const ids = Tensor.from(b, Int32Array.of(5)),
        out = f32(b, 32),
        table = Tensor.from(b, normals(64), 2);
      const graph = b.record(() => embed(b, out, table, ids, 1));
      let text = "";
      try {
        await graph.run(3);
      } catch (error) {
        text = String(error);
      }
      ids.write(Int32Array.of(1));
      await graph.run(2);
      texts.push(
        `${text} then ${difference(out.floats(), table.floats(1, 1))}`,
      );
      graph.close();
    }
    return { ok: texts[0] === texts[1], text: texts[1] };
  });
}

// ---- the model ----

async function checkModel(): Promise<void> {
  const prompt =
    "The old lighthouse keeper climbed the stairs every evening and looked at the sea. One night";
  for (const activations of ["f32", "int8"] as const) {
    const models = await Promise.all(
      ["cpu", device].map((d) =>
        loadModel(args.model!, {
          device: d as "cpu",
          activations,
          offline: true,
        })
      ),
    );
    const ids = await models[0]!.tokenizer.encode(prompt.repeat(12));
    const cacheType = activations === "f32" ? "f32" as const : "f16" as const;
    for (
      const options of [
        { policy: "full", capacity: 600 },
        { policy: "weighted-kv", budget: 64 },
        { policy: "weighted-kv-ward", budget: 64 },
        { policy: "streaming-llm", budget: 64 },
      ]
    ) {
      await attempt(
        "model logits",
        { activations, cacheType, ...options },
        async () => {
          const caches = models.map((m) =>
            m.createCache({ ...options, cacheType })
          );
          const sessions = models.map((m, i) => new Session(m, caches[i]!));
          let error = 0, sum = 0, same = 0, count = 0;
          const tokens = ids.slice(0, 120);
          for (const id of tokens) {
            const logits = await Promise.all(
              sessions.map((s) => s.logits(Int32Array.of(id))),
            );
            const found = difference(logits[1]!, logits[0]!);
            error = Math.max(error, found);
            sum += found;
            if (argmax(logits[0]!) === argmax(logits[1]!)) same++;
            count++;
          }
          const equal = overlapOf(
            caches as [KvCache, KvCache],
            models[0]!.config.layers,
            models[0]!.config.kvHeads,
          );
          sessions.forEach((s) => s.close());
          caches.forEach((c) => c.close());
          return {
            ok: sum / count <= (activations === "f32" ? 1e-3 : 0.1),
            error,
            mean: sum / count,
            sameArgmax: `${same}/${count}`,
            ...equal,
          };
        },
      );
      await attempt(
        "model greedy",
        { activations, cacheType, ...options },
        async () => {
          const texts: string[] = [],
            rates: number[] = [],
            prefills: number[] = [];
          for (const model of models) {
            const cache = model.createCache({ ...options, cacheType });
            const session = new Session(model, cache);
            session.setSampler({ temperature: 0 });
            const begin = performance.now();
            const tokens = [await session.prompt(ids.slice(0, 60))];
            prefills.push(Math.round((performance.now() - begin) * 10) / 10);
            await session.next();
            const start = performance.now();
            for (let i = 0; i < newTokens; i++) {
              tokens.push((await session.next())[0]!);
            }
            rates.push(
              Math.round(newTokens / (performance.now() - start) * 1000),
            );
            texts.push(model.tokenizer.decode(tokens));
            session.close();
            cache.close();
          }
          let agree = 0;
          while (
            agree < texts[0]!.length && texts[0]![agree] === texts[1]![agree]
          ) agree++;
          return {
            ok: texts[1]!.length > 0 &&
              (activations !== "f32" || agree === texts[0]!.length),
            agreeCharacters: `${agree}/${texts[0]!.length}`,
            tokensPerSecond: rates,
            prefillMs: prefills,
            text: texts[1]!.slice(0, 200),
          };
        },
      );
      if (activations === "int8") {
        await attempt("model chunks", { ...options }, async () => {
          const stats: string[] = [];
          for (const model of models) {
            const cache = model.createCache({ ...options, cacheType });
            const session = new Session(model, cache);
            session.setSampler({ temperature: 0.8, minP: 0.05, seed: 3 });
            const begin = performance.now();
            const token = await session.prompt(ids.slice(0, 500), {
              prefill: "chunk:128",
            });
            stats.push(
              `${token} ${JSON.stringify(cache.stats())} ${
                Math.round(performance.now() - begin)
              } ms`,
            );
            session.close();
            cache.close();
          }
          return { stats };
        });
      }
    }
    models.forEach((m) => m.close());
  }
}

function argmax(x: Floats): number {
  let best = 0;
  for (let i = 1; i < x.length; i++) if (x[i]! > x[best]!) best = i;
  return best;
}

function overlapOf(
  caches: [KvCache, KvCache],
  layers: number,
  kvHeads: number,
) {
  let equal = 0, overlap = 0;
  for (let l = 0; l < layers; l++) {
    for (let n = 0; n < kvHeads; n++) {
      const [x, y] = caches.map((c) => c.rows(l, n).kept) as [
        number[],
        number[],
      ];
      if (`${x}` === `${y}`) equal++;
      const has = new Set(x);
      overlap += y.filter((p) => has.has(p)).length / x.length;
    }
  }
  return {
    equalHeads: `${equal}/${layers * kvHeads}`,
    overlap: overlap / (layers * kvHeads),
  };
}

// ---- all ----

console.log(
  JSON.stringify({
    cpu: cpu.description,
    against: gpu.description,
    library: gpu.path,
  }),
);
const sections: Record<string, () => Promise<void>> = {
  embed: checkEmbed,
  linear: checkLinear,
  gated: checkGated,
  errors: checkErrors,
  sample: checkSample,
  attend: checkAttend,
  prefill: checkPrefill,
  model: checkModel,
};
const wanted = args.only === "" ? Object.keys(sections) : args.only!.split(",");
for (const name of wanted) {
  const start = performance.now();
  await attempt(name, { section: name }, async () => {
    await sections[name]!();
    return { seconds: (performance.now() - start) / 1000 };
  });
}
cpu.close();
gpu.close();
console.log(JSON.stringify({ cases, failures }));
Deno.exit(failures === 0 ? 0 : 1);
