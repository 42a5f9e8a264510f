/** The configuration that GGUF files of every decoder have, under keys that begin with the architecture's name; used by the architectures. */

import { FormatError, quote } from "../formats/error.ts";
import type { GgufFile } from "../formats/gguf.ts";
import type { ModelConfig, SlidingWindow } from "./architecture.ts";
import { powers, type Rope, type RopeShape, yarn } from "./rope.ts";

/**
 * Reads and checks the configuration.
 *
 * @param name The architecture's name in the file.
 * @param pairs Which dimensions turn together in files of that name.
 * @throws {FormatError} A key is missing or out of range.
 */
export function ggufConfig(
  file: GgufFile,
  name: string,
  pairs: "half" | "interleaved",
): ModelConfig {
  const of = (key: string) => `${name}.${key}`;
  const layers = file.integer(of("block_count"), { min: 1, max: 1024 });
  const width = file.integer(of("embedding_length"), { min: 8, max: 1 << 16 });
  const heads = file.integer(of("attention.head_count"), {
    min: 1,
    max: 1024,
  });
  const kvHeads = file.integer(of("attention.head_count_kv"), {
    min: 1,
    max: heads,
    fallback: heads,
  });
  if (heads % kvHeads !== 0) {
    throw new FormatError(
      file.path,
      of("attention.head_count_kv"),
      `the value is ${kvHeads}, expected a divisor of the ${heads} query heads`,
    );
  }
  const headDim = file.integer(of("attention.key_length"), {
    min: 2,
    max: 512,
    fallback: width / heads,
  });
  if (width % heads !== 0 && !file.metadata.has(of("attention.key_length"))) {
    throw new FormatError(
      file.path,
      of("attention.head_count"),
      `the value is ${heads}, expected a divisor of the embedding length ${width}`,
    );
  }
  const context = file.integer(of("context_length"), { min: 1, max: 1 << 24 });
  const rope = ggufRope(file, name, pairs, { headDim, context });
  const { factor = 1 } = rope;
  if (factor !== 1 && 2 * rope.frequencies.length !== headDim) {
    throw new FormatError(
      file.path,
      of("rope.dimension_count"),
      `the value is ${
        2 * rope.frequencies.length
      }, expected the ${headDim} dimensions of a head where the scaling has a factor`,
    );
  }
  return {
    architecture: name,
    layers,
    width,
    hidden: file.integer(of("feed_forward_length"), { min: 1, max: 1 << 20 }),
    heads,
    kvHeads,
    headDim,
    vocabulary: file.tensor("token_embd.weight").shape[1] ?? 1,
    context,
    epsilon: file.float(of("attention.layer_norm_rms_epsilon"), {
      min: Number.MIN_VALUE,
      max: 1,
    }),
    rope,
    // A factor of queries and of keys is its square on their products.
    scale: factor ** 2 / Math.sqrt(headDim),
    biases: file.tensors.has("blk.0.attn_output.bias")
      ? "all"
      : file.tensors.has("blk.0.attn_q.bias")
      ? "qkv"
      : "none",
  };
}

/**
 * The sliding window of a GGUF file; undefined where it has none.
 *
 * @param layer Whether layer i has it.
 * @throws {FormatError} Its size is out of range.
 */
export function ggufWindow(
  file: GgufFile,
  name: string,
  layers: number,
  layer: (i: number) => boolean,
): SlidingWindow | undefined {
  const key = `${name}.attention.sliding_window`;
  const tokens = file.integer(key, { min: 0, max: 1 << 24, fallback: 0 });
  if (tokens < 2) return undefined;
  return { tokens, layers: Array.from({ length: layers }, (_, i) => layer(i)) };
}

/** The rotation: its scaling, as llama.cpp reads it; factors that are tensors come with the weights. */
function ggufRope(
  file: GgufFile,
  name: string,
  pairs: Rope["pairs"],
  { headDim, context }: RopeShape,
): Rope {
  const of = (key: string) => `${name}.rope.${key}`;
  const base = file.float(of("freq_base"), {
    min: 1,
    max: 1e12,
    fallback: 10000,
  });
  const rotary = file.integer(of("dimension_count"), {
    min: 2,
    max: headDim,
    fallback: headDim,
  }) & ~1;
  const number = (key: string, fallback: number) =>
    file.float(of(`scaling.${key}`), {
      min: Number.MIN_VALUE,
      max: 1e6,
      fallback,
    });
  const factor = number("factor", 1);
  const original = file.integer(of("scaling.original_context_length"), {
    min: 2,
    max: 1 << 24,
    fallback: context,
  });
  const make = (frequencies: readonly number[]): Rope => ({
    pairs,
    frequencies: Float32Array.from(frequencies),
  });
  const plain = powers(base, rotary);
  const type = file.string(of("scaling.type"), "none");
  switch (type) {
    case "none":
      return make(plain);
    case "linear":
      return make(plain.map((f) => f / factor));
    case "yarn":
      return {
        ...make(yarn({
          ...{ factor, base, rotary, original },
          fast: number("yarn_beta_fast", 32),
          slow: number("yarn_beta_slow", 1),
        })),
        factor: number("attn_factor", 1) * (1 + 0.1 * Math.log(factor)),
      };
    case "longrope": {
      const rope = make(plain);
      return {
        ...rope,
        longer: { from: original, at: () => rope.frequencies },
        factor: number("attn_factor", 1),
      };
    }
  }
  throw new FormatError(
    file.path,
    of("scaling.type"),
    `the scaling ${
      quote(type)
    } is not known, expected none, linear, yarn or longrope`,
  );
}
