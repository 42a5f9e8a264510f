/** Tiny random Llama models as GGUF files, with a plain f64 forward pass over the same weights; used by tests of the model runner. */

import { loadModel, type LoadOptions, type Model } from "../mod.ts";
import type { Dtype } from "../src/backend/tensor.ts";
import { GGML_TYPES } from "../src/formats/ggml_types.ts";
import { blockNumbers, halvesOf } from "../src/selftest/matrix.ts";
import { spellBytes } from "../src/tokenizer/byte_map.ts";
import { testDevice } from "./device.ts";
import {
  f32,
  type FieldValue,
  ggufBytes,
  i32,
  i32s,
  strings,
  type TensorInput,
  u16,
  u32,
} from "./gguf_writer.ts";

/** Storage types that weights can be written in. */
export type TinyType = Exclude<Dtype, "I32">;

/** What a tiny model is like; see `defaults` for what is left out. */
export interface TinyOptions {
  /** Another seed gives other weights. */
  seed?: number;
  /** Blocks. */
  layers?: number;
  /** Columns of the residual stream. */
  width?: number;
  /** Query heads. */
  heads?: number;
  /** Key and value heads. */
  kvHeads?: number;
  /** Dimensions of a head; written as key_length when not width / heads. */
  headDim?: number;
  /** Columns inside the feed-forward part. */
  hidden?: number;
  /** Tokens: 256 bytes, the end token, and more rows without a token. */
  vocabulary?: number;
  /** Context length. */
  context?: number;
  /** Dimensions that turn; headDim when left out. */
  rotary?: number;
  /** Base of the rotation. */
  base?: number;
  /** Linear scaling of positions by this factor. */
  linear?: number;
  /** rope_freqs.weight, what each frequency is divided by. */
  factors?: readonly number[];
  /** Gives the model an output.weight. */
  untied?: boolean;
  /** Type of each matrix; F32 when left out. */
  type?: (name: string) => TinyType;
  /** Type of the norms' weights; F32 when left out. */
  vectors?: TinyType;
  /** Makes each of these ids be followed by the next, the last by the first. */
  chain?: readonly number[];
  /** Id of the end token. */
  eos?: number;
  /** Metadata to replace or, when undefined, to leave out. */
  metadata?: Record<string, FieldValue | undefined>;
  /** Changes the tensors before they are written. */
  change?: (tensors: Map<string, TensorInput>) => void;
}

/** A written model. */
export interface TinyModel {
  /** Its file. */
  bytes: Uint8Array<ArrayBuffer>;
  /** The same as so many files, as llama.cpp's gguf-split would write them. */
  split(count: number): Uint8Array<ArrayBuffer>[];
  /** The logits after each token of a text, in f64. */
  logits(ids: readonly number[]): Float64Array[];
}

/** The id of `<|endoftext|>`, after the 256 bytes. */
export const TINY_END = 256;

const defaults = {
  seed: 1,
  layers: 2,
  width: 32,
  heads: 4,
  kvHeads: 2,
  hidden: 48,
  vocabulary: 257,
  context: 64,
  base: 10000,
  eos: TINY_END,
};

const EPSILON = 1e-5;

type Resolved = TinyOptions & typeof defaults & { headDim: number };

/** Makes a model. */
export function tinyModel(options: TinyOptions = {}): TinyModel {
  const of: Resolved = {
    ...defaults,
    ...options,
    headDim: options.headDim ??
      (options.width ?? defaults.width) / (options.heads ?? defaults.heads),
  };
  const weights = new Map<string, Float64Array>();
  const tensors = new Map<string, TensorInput>();
  const normal = gaussian(of.seed);
  const add = (
    name: string,
    shape: number[],
    type: TinyType,
    scale: number,
  ) => {
    const count = shape.reduce((n, x) => n * x);
    const offset = shape.length === 1 ? 1 : 0;
    const wanted = Float64Array.from(
      { length: count },
      () => offset + scale * normal(),
    );
    const { data, values } = store(wanted, type);
    tensors.set(name, { name, type, shape, data });
    weights.set(name, values);
  };
  const matrix = (name: string, rows: number, columns: number, gain = 1) =>
    add(
      name,
      [columns, rows],
      of.type?.(name) ?? "F32",
      gain / Math.sqrt(columns),
    );
  const { width, heads, kvHeads, headDim, hidden, vocabulary } = of;
  matrix("token_embd.weight", vocabulary, width, Math.sqrt(width));
  // In a chain the blocks add nothing, and the output knows the token itself.
  const adds = of.chain ? 0 : 1;
  for (let i = 0; i < of.layers; i++) {
    const block = `blk.${i}.`;
    add(`${block}attn_norm.weight`, [width], of.vectors ?? "F32", 0.2);
    // Some attention is sharp, so that policies have something to choose.
    matrix(`${block}attn_q.weight`, heads * headDim, width, 2);
    matrix(`${block}attn_k.weight`, kvHeads * headDim, width, 2);
    matrix(`${block}attn_v.weight`, kvHeads * headDim, width);
    matrix(`${block}attn_output.weight`, width, heads * headDim, adds);
    add(`${block}ffn_norm.weight`, [width], of.vectors ?? "F32", 0.2);
    matrix(`${block}ffn_gate.weight`, hidden, width);
    matrix(`${block}ffn_up.weight`, hidden, width);
    matrix(`${block}ffn_down.weight`, width, hidden, adds);
  }
  add("output_norm.weight", [width], of.vectors ?? "F32", 0.2);
  if (of.untied) matrix("output.weight", vocabulary, width, 2);
  if (of.chain) {
    const embedding = weights.get("token_embd.weight")!;
    const data = new Float32Array(vocabulary * width);
    of.chain.forEach((id, i) => {
      const next = of.chain![(i + 1) % of.chain!.length]!;
      data.set(embedding.subarray(id * width, (id + 1) * width), next * width);
    });
    const shape = [width, vocabulary];
    tensors.set("output.weight", { name: "output.weight", shape, data });
  }
  if (of.factors) {
    const data = Float32Array.from(of.factors);
    const shape = [data.length];
    tensors.set("rope_freqs.weight", {
      name: "rope_freqs.weight",
      shape,
      data,
    });
  }
  of.change?.(tensors);
  const all = [...tensors.values()];
  const bytes = ggufBytes({ metadata: metadata(of), tensors: all });
  const split = (count: number) =>
    Array.from({ length: count }, (_, no) =>
      ggufBytes({
        metadata: [
          ...no === 0 ? metadata(of) : [],
          ["split.no", u16(no)],
          ["split.count", u16(count)],
          ["split.tensors.count", i32(all.length)],
        ],
        tensors: all.slice(
          Math.floor(all.length * no / count),
          Math.floor(all.length * (no + 1) / count),
        ),
      }));
  return { bytes, split, logits: (ids) => forward(of, weights, ids) };
}

/** Loads a model from a file that is gone when this returns. */
export async function loadBytes(
  bytes: Uint8Array,
  options: LoadOptions = {},
): Promise<Model> {
  const path = await Deno.makeTempFile({ prefix: "wkv-", suffix: ".gguf" });
  try {
    await Deno.writeFile(path, bytes);
    return await loadModel(path, { device: testDevice, ...options });
  } finally {
    await Deno.remove(path);
  }
}

/** Makes a tiny model and loads it. */
export function loadTiny(
  options: TinyOptions = {},
  load: LoadOptions = {},
): Promise<Model> {
  return loadBytes(tinyModel(options).bytes, load);
}

function metadata(of: Resolved): [string, FieldValue][] {
  const tokens = Array.from({ length: 256 }, (_, byte) => spellBytes([byte]));
  const fields: Record<string, FieldValue | undefined> = {
    "general.architecture": "llama",
    "llama.block_count": u32(of.layers),
    "llama.context_length": u32(of.context),
    "llama.embedding_length": u32(of.width),
    "llama.feed_forward_length": u32(of.hidden),
    "llama.attention.head_count": u32(of.heads),
    "llama.attention.head_count_kv": u32(of.kvHeads),
    "llama.attention.key_length": of.headDim * of.heads === of.width
      ? undefined
      : u32(of.headDim),
    "llama.attention.layer_norm_rms_epsilon": f32(EPSILON),
    "llama.rope.freq_base": f32(of.base),
    "llama.rope.dimension_count": of.rotary ? u32(of.rotary) : undefined,
    "llama.rope.scaling.type": of.linear ? "linear" : undefined,
    "llama.rope.scaling.factor": of.linear ? f32(of.linear) : undefined,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": strings([...tokens, "<|endoftext|>"]),
    "tokenizer.ggml.token_type": i32s([...tokens.map(() => 1), 3]),
    "tokenizer.ggml.merges": strings([]),
    "tokenizer.ggml.eos_token_id": u32(of.eos),
    ...of.metadata,
  };
  return Object.entries(fields).flatMap(([key, value]) =>
    value === undefined ? [] : [[key, value]]
  );
}

// ---- numbers and how files hold them ----

/** Normally distributed numbers from a seed (mulberry32, Box-Muller). */
export function gaussian(seed: number): () => number {
  let state = seed;
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let x = Math.imul(state ^ (state >>> 15), state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return (((x ^ (x >>> 14)) >>> 0) + 0.5) / 2 ** 32;
  };
  return () =>
    Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
}

/** Numbers as a type holds them: the bytes, and what they say. */
function store(
  wanted: Float64Array,
  type: TinyType,
): { data: Uint8Array; values: Float64Array } {
  switch (type) {
    case "F32":
      return plain(new Float32Array(wanted));
    case "F16":
      return plain(Float16Array.from(wanted));
    case "BF16": {
      const words = new Uint32Array(new Float32Array(wanted).buffer);
      const halves = Uint16Array.from(words, (word) => (word + 0x8000) >>> 16);
      const back = Uint32Array.from(halves, (half) => half << 16);
      return {
        data: new Uint8Array(halves.buffer),
        values: Float64Array.from(new Float32Array(back.buffer)),
      };
    }
    case "Q8_0":
    case "Q4_0":
    case "Q4_1":
      return quantise(wanted, type);
    default:
      return randomBlocks(wanted, type);
  }
}

function plain(
  array: Float32Array<ArrayBuffer> | Float16Array<ArrayBuffer>,
): { data: Uint8Array; values: Float64Array } {
  return {
    data: new Uint8Array(array.buffer),
    values: Float64Array.from(array),
  };
}

/** Blocks of 32 columns: a scale, perhaps a minimum, small integers. */
function quantise(
  wanted: Float64Array,
  type: "Q8_0" | "Q4_0" | "Q4_1",
): { data: Uint8Array; values: Float64Array } {
  const size = GGML_TYPES[type].bytes;
  const data = new Uint8Array(wanted.length / 32 * size);
  const view = new DataView(data.buffer);
  const values = new Float64Array(wanted.length);
  for (let block = 0; block < wanted.length / 32; block++) {
    const from = wanted.subarray(block * 32, block * 32 + 32);
    const at = block * size;
    const most = Math.max(...from.map(Math.abs));
    const least = type === "Q4_1" ? Math.min(...from) : 0;
    const range = type === "Q8_0"
      ? most / 127
      : type === "Q4_0"
      ? most / 7
      : (Math.max(...from) - least) / 15;
    view.setFloat16(at, range, true);
    const scale = view.getFloat16(at, true);
    if (type === "Q4_1") view.setFloat16(at + 2, least, true);
    const minimum = type === "Q4_1" ? view.getFloat16(at + 2, true) : 0;
    const bound = (x: number, low: number, high: number) =>
      Math.min(high, Math.max(low, Math.round(x)));
    from.forEach((x, i) => {
      const column = block * 32 + i;
      if (type === "Q8_0") {
        const q = bound(x / scale, -127, 127);
        view.setInt8(at + 2 + i, q);
        values[column] = q * scale;
        return;
      }
      const zero = type === "Q4_0" ? 8 : 0;
      const q = bound((x - minimum) / scale + zero, 0, 15);
      // Columns 0 to 15 are the low halves of the bytes, 16 to 31 the high.
      data[at + size - 16 + i % 16]! |= i < 16 ? q : q << 4;
      values[column] = (q - zero) * scale + minimum;
    });
  }
  return { data, values };
}

/** Minima that centre random blocks, in units of their scale. */
const centres: Partial<Record<TinyType, number>> = {
  Q5_1: -15.5,
  Q2_K: 1.5,
  Q4_K: 7.5,
  Q5_K: 15.5,
};

/** Blocks of random bits, sub-scales too, whose numbers are as large as those wanted. */
function randomBlocks(
  wanted: Float64Array,
  type: TinyType,
): { data: Uint8Array; values: Float64Array } {
  const { block: columns, bytes: size } = GGML_TYPES[type];
  const words = new Uint32Array(new Float32Array(wanted).buffer);
  const blocks = wanted.length / columns;
  const data = Uint8Array.from(
    { length: blocks * size },
    (_, i) => words[i % words.length]! >>> 4 & 255,
  );
  const view = new DataView(data.buffer);
  const [scaleAt, leastAt] = halvesOf[type]!;
  const values = new Float64Array(wanted.length);
  const fill = (scale: number) => {
    for (let i = 0; i < blocks; i++) {
      view.setFloat16(i * size + scaleAt, scale, true);
      if (leastAt !== undefined) {
        view.setFloat16(i * size + leastAt, scale * centres[type]!, true);
      }
      values.set(blockNumbers(type, view, i * size), i * columns);
    }
  };
  fill(1);
  fill(Math.hypot(...wanted) / Math.hypot(...values));
  return { data, values };
}

// ---- the forward pass ----

/** The logits after each token, by the published formulas and nothing else. */
function forward(
  of: Resolved,
  weights: ReadonlyMap<string, Float64Array>,
  ids: readonly number[],
): Float64Array[] {
  const { width, heads, kvHeads, headDim, vocabulary } = of;
  const weight = (name: string) => weights.get(`${name}.weight`)!;
  const rotary = of.rotary ?? headDim;
  const angle = (position: number, pair: number) =>
    position / (of.linear ?? 1) * of.base ** (-2 * pair / rotary) /
    (of.factors?.[pair] ?? 1);
  const keys: Float64Array[][] = [];
  const values: Float64Array[][] = [];
  return ids.map((id, position) => {
    const turn = (x: Float64Array) => {
      for (let h = 0; h < x.length / headDim; h++) {
        for (let pair = 0; pair < rotary / 2; pair++) {
          const at = h * headDim + 2 * pair;
          const [even, odd] = [x[at]!, x[at + 1]!];
          const [c, s] = [
            Math.cos(angle(position, pair)),
            Math.sin(angle(position, pair)),
          ];
          x[at] = even * c - odd * s;
          x[at + 1] = even * s + odd * c;
        }
      }
      return x;
    };
    let x: Float64Array = weight("token_embd").slice(
      id * width,
      (id + 1) * width,
    );
    for (let layer = 0; layer < of.layers; layer++) {
      const block = `blk.${layer}.`;
      let h = normed(x, weight(`${block}attn_norm`));
      const q = turn(times(weight(`${block}attn_q`), h));
      (keys[layer] ??= []).push(turn(times(weight(`${block}attn_k`), h)));
      (values[layer] ??= []).push(times(weight(`${block}attn_v`), h));
      const attended = new Float64Array(heads * headDim);
      for (let head = 0; head < heads; head++) {
        const from = Math.floor(head / (heads / kvHeads)) * headDim;
        const query = q.subarray(head * headDim, (head + 1) * headDim);
        const scores = keys[layer]!.map((key) =>
          dot(query, key.subarray(from, from + headDim)) / Math.sqrt(headDim)
        );
        const top = Math.max(...scores);
        const exps = scores.map((score) => Math.exp(score - top));
        const sum = exps.reduce((a, b) => a + b);
        exps.forEach((e, i) => {
          for (let d = 0; d < headDim; d++) {
            attended[head * headDim + d]! += e / sum *
              values[layer]![i]![from + d]!;
          }
        });
      }
      x = plus(x, times(weight(`${block}attn_output`), attended));
      h = normed(x, weight(`${block}ffn_norm`));
      const up = times(weight(`${block}ffn_up`), h);
      const gate = times(weight(`${block}ffn_gate`), h)
        .map((g, i) => g / (1 + Math.exp(-g)) * up[i]!);
      x = plus(x, times(weight(`${block}ffn_down`), gate));
    }
    const last = normed(x, weight("output_norm"));
    const out = times(weight(of.untied ? "output" : "token_embd"), last);
    return out.subarray(0, vocabulary);
  });
}

/** w `[rows, columns]` times x. */
function times(w: Float64Array, x: Float64Array): Float64Array {
  return Float64Array.from(
    { length: w.length / x.length },
    (_, row) => dot(w.subarray(row * x.length, (row + 1) * x.length), x),
  );
}

function dot(a: Float64Array, b: Float64Array): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i]! * b[i]!;
  return sum;
}

function plus(a: Float64Array, b: Float64Array): Float64Array {
  return a.map((value, i) => value + b[i]!);
}

function normed(x: Float64Array, weight: Float64Array): Float64Array {
  const scale = 1 / Math.sqrt(dot(x, x) / x.length + EPSILON);
  return x.map((value, i) => value * scale * weight[i]!);
}
