/** The configuration that GGUF files of every decoder have, under keys that begin with the architecture's name; used by the architectures. */

import { FormatError } from "../formats/error.ts";
import type { GgufFile } from "../formats/gguf.ts";
import type { ModelConfig, SlidingWindow } from "./architecture.ts";

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
  const base = file.float(of("rope.freq_base"), {
    min: 1,
    max: 1e12,
    fallback: 10000,
  });
  const rotary = file.integer(of("rope.dimension_count"), {
    min: 2,
    max: headDim,
    fallback: headDim,
  });
  return {
    architecture: name,
    layers,
    width,
    hidden: file.integer(of("feed_forward_length"), { min: 1, max: 1 << 20 }),
    heads,
    kvHeads,
    headDim,
    vocabulary: file.tensor("token_embd.weight").shape[1] ?? 1,
    context: file.integer(of("context_length"), { min: 1, max: 1 << 24 }),
    epsilon: file.float(of("attention.layer_norm_rms_epsilon"), {
      min: Number.MIN_VALUE,
      max: 1,
    }),
    rope: { pairs, frequencies: frequencies(file, name, base, rotary) },
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

function frequencies(
  file: GgufFile,
  name: string,
  base: number,
  rotary: number,
): Float32Array<ArrayBuffer> {
  const type = file.string(`${name}.rope.scaling.type`, "none");
  const factor = file.float(`${name}.rope.scaling.factor`, {
    min: Number.MIN_VALUE,
    max: 1e6,
    fallback: 1,
  });
  if (type !== "none" && type !== "linear") {
    throw new FormatError(
      file.path,
      `${name}.rope.scaling.type`,
      `the scaling "${type}" is not supported yet, expected none or linear`,
    );
  }
  const scale = type === "linear" ? 1 / factor : 1;
  return Float32Array.from(
    { length: Math.floor(rotary / 2) },
    (_, i) => scale * base ** (-2 * i / rotary),
  );
}
