/** The tiny models of golden/models as GGUF files, with the names, permutations and keys that llama.cpp's converter gives them; used by architectures_test.ts and by golden/llamacpp_logits.mjs through its command line. */

import { SafetensorsFile } from "../src/formats/safetensors.ts";
import * as architectures from "../src/models/mod.ts";
import { spellBytes } from "../src/tokenizer/byte_map.ts";
import {
  f32,
  type FieldValue,
  ggufBytes,
  i32s,
  strings,
  type TensorInput,
  u32,
} from "./gguf_writer.ts";

const folder = new URL("golden/models/", import.meta.url).pathname;

/** The models that llama.cpp reads too. */
export const ggufModels = [
  "gemma2",
  "gemma3",
  "llama",
  "llama-linear",
  "llama-llama3",
  "llama-mqa",
  "llama-yarn",
  "olmo2",
  "phi3",
  "phi3-longrope",
  "qwen2",
  "qwen3",
] as const;

/** The values of a config.json. */
// deno-lint-ignore no-explicit-any
type Config = Record<string, any>;

/** One model's file. */
export async function tinyGguf(name: string): Promise<Uint8Array<ArrayBuffer>> {
  const config: Config = JSON.parse(
    await Deno.readTextFile(`${folder}${name}/config.json`),
  );
  const kind = name.split("-")[0] as keyof typeof architectures;
  const { tensors: names } = architectures[kind].huggingFace;
  const canonical = new Map(
    Object.entries(names).map(([own, theirs]) => [theirs, own]),
  );
  using file = await SafetensorsFile.open(`${folder}${name}/model.safetensors`);
  const tensors: TensorInput[] = [];
  const headDim = config.head_dim ??
    config.hidden_size / config.num_attention_heads;
  for (const tensor of file.tensors.values()) {
    const bytes = new Uint8Array(tensor.bytes);
    await tensor.file.read(tensor.offset, bytes);
    const block = /^model\.layers\.(\d+)\.(.+)\.(weight|bias)$/.exec(
      tensor.name,
    );
    const inner = block?.[2] ?? tensor.name.replace(/\.weight$/, "");
    const own = canonical.get(inner);
    if (own === undefined) {
      throw new Error(`${tensor.name} has no name in GGUF`);
    }
    const to = block ? `blk.${block[1]}.${own}.${block[3]}` : `${own}.weight`;
    // In F32: of BF16 weights, llama.cpp rounds the other factor too.
    let data = toFloats(bytes);
    if (kind.startsWith("gemma") && own.endsWith("norm")) {
      data = data.map((x) => x + 1);
    }
    if (kind === "llama" && (own === "attn_q" || own === "attn_k")) {
      data = interleaved(data, headDim, tensor.shape[0]!);
    }
    tensors.push({
      name: to,
      shape: tensor.shape.toReversed(),
      data,
    });
  }
  const { fields, factors } = metadata(kind, config, headDim);
  for (const [name, data] of Object.entries(factors)) {
    tensors.push({ name, shape: [data.length], data });
  }
  return ggufBytes({
    metadata: Object.entries(fields).flatMap(([key, value]) =>
      value === undefined ? [] : [[key, value] as const]
    ),
    tensors,
  });
}

function metadata(kind: string, config: Config, headDim: number): {
  fields: Record<string, FieldValue | undefined>;
  factors: Record<string, Float32Array>;
} {
  const of = (values: Record<string, FieldValue | undefined>) =>
    Object.fromEntries(
      Object.entries(values).map(([key, value]) => [`${kind}.${key}`, value]),
    );
  const tokens = Array.from({ length: 256 }, (_, byte) => spellBytes([byte]));
  const rope = config.rope_parameters?.full_attention ?? config.rope_parameters;
  const { rope_type: type, factor } = rope;
  const rotary = headDim * (rope.partial_rotary_factor ?? 1);
  const original = rope.original_max_position_embeddings;
  const long = type === "longrope";
  const scaled = type === "linear" || type === "yarn" || long;
  const by = factor ?? config.max_position_embeddings / original;
  return {
    fields: {
      "general.architecture": kind,
      ...of({
        "block_count": u32(config.num_hidden_layers),
        "context_length": u32(config.max_position_embeddings),
        "embedding_length": u32(config.hidden_size),
        "feed_forward_length": u32(config.intermediate_size),
        "attention.head_count": u32(config.num_attention_heads),
        "attention.head_count_kv": u32(config.num_key_value_heads),
        "attention.key_length": u32(headDim),
        "attention.value_length": u32(headDim),
        "attention.layer_norm_rms_epsilon": f32(config.rms_norm_eps),
        "attention.sliding_window": kind.startsWith("gemma")
          ? u32(config.sliding_window)
          : undefined,
        "attn_logit_softcapping": config.attn_logit_softcapping
          ? f32(config.attn_logit_softcapping)
          : undefined,
        "final_logit_softcapping": config.final_logit_softcapping
          ? f32(config.final_logit_softcapping)
          : undefined,
        "vocab_size": u32(256),
        "rope.freq_base": f32(rope.rope_theta),
        "rope.dimension_count": u32(rotary),
        "rope.scaling.type": scaled ? type : undefined,
        "rope.scaling.factor": scaled && !long ? f32(by) : undefined,
        "rope.scaling.original_context_length": scaled && original
          ? u32(original)
          : undefined,
        "rope.scaling.attn_factor": long
          ? f32(Math.sqrt(1 + Math.log(by) / Math.log(original)))
          : undefined,
      }),
      "tokenizer.ggml.model": "gpt2",
      "tokenizer.ggml.pre": "gpt-2",
      "tokenizer.ggml.tokens": strings(tokens),
      "tokenizer.ggml.token_type": i32s(tokens.map(() => 1)),
      "tokenizer.ggml.merges": strings([]),
      "tokenizer.ggml.bos_token_id": u32(1),
      "tokenizer.ggml.eos_token_id": u32(2),
    },
    factors: long
      ? {
        "rope_factors_long.weight": Float32Array.from(rope.long_factor),
        "rope_factors_short.weight": Float32Array.from(rope.short_factor),
      }
      : type === "llama3"
      ? { "rope_freqs.weight": llama3Factors(rope, headDim) }
      : {},
  };
}

/** What Llama 3.1 divides each frequency by, as the converter writes it. */
function llama3Factors(rope: Config, headDim: number): Float32Array {
  const { factor, low_freq_factor: low, high_freq_factor: high } = rope;
  return Float32Array.from({ length: headDim / 2 }, (_, i) => {
    const wave = 2 * Math.PI * rope.rope_theta ** (2 * i / headDim);
    const turns = rope.original_max_position_embeddings / wave;
    if (turns > high) return 1;
    if (turns < low) return factor;
    const smooth = (turns - low) / (high - low);
    return 1 / ((1 - smooth) / factor + smooth);
  });
}

/** Rows i and i + D / 2 of each head side by side, as files of Llama's have them. */
function interleaved(
  data: Float32Array,
  headDim: number,
  rows: number,
): Float32Array {
  const out = data.slice();
  const row = data.length / rows;
  for (let r = 0; r < rows; r++) {
    const i = r % headDim;
    const from = r - i + (i % 2) * headDim / 2 + (i >> 1);
    out.set(data.subarray(from * row, (from + 1) * row), r * row);
  }
  return out;
}

function toFloats(bytes: Uint8Array): Float32Array {
  const halves = new Uint16Array(bytes.buffer, 0, bytes.length / 2);
  return new Float32Array(Uint32Array.from(halves, (h) => h << 16).buffer);
}

if (import.meta.main) {
  const [out] = Deno.args;
  if (out === undefined) throw new TypeError("Give a folder for the files");
  for (const name of ggufModels) {
    await Deno.writeFile(`${out}/${name}.gguf`, await tinyGguf(name));
  }
}
