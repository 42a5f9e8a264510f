/** What the config.json of every decoder has, and the names that most give their tensors; used by the architectures. */

import type { ConfigFile } from "../formats/config.ts";
import type { ModelConfig } from "./architecture.ts";
import { ropeOf } from "./rope.ts";

/** Names of Llama's tensors, and of most others'. */
export const llamaTensors: Readonly<Record<string, string>> = {
  token_embd: "model.embed_tokens",
  output_norm: "model.norm",
  output: "lm_head",
  attn_norm: "input_layernorm",
  attn_q: "self_attn.q_proj",
  attn_k: "self_attn.k_proj",
  attn_v: "self_attn.v_proj",
  attn_output: "self_attn.o_proj",
  ffn_norm: "post_attention_layernorm",
  ffn_gate: "mlp.gate_proj",
  ffn_up: "mlp.up_proj",
  ffn_down: "mlp.down_proj",
};

/** Types that weights are announced in; what counts is the type of each tensor. */
const DTYPES = ["float32", "float16", "bfloat16"];

/**
 * Reads and checks what all decoders have.
 *
 * @throws {FormatError} A key is missing or out of range.
 */
export function huggingFaceConfig(
  file: ConfigFile,
  options: { architecture: string },
): ModelConfig {
  const layers = file.integer("num_hidden_layers", { min: 1, max: 1024 });
  const width = file.integer("hidden_size", { min: 8, max: 1 << 16 });
  const heads = file.integer("num_attention_heads", { min: 1, max: 1024 });
  const kvHeads = file.integer("num_key_value_heads", {
    min: 1,
    max: heads,
    fallback: heads,
  });
  if (heads % kvHeads !== 0) {
    throw file.error(
      "num_key_value_heads",
      `a divisor of the ${heads} query heads`,
    );
  }
  if (
    !file.has("head_dim") && width % heads !== 0
  ) {
    throw file.error(
      "num_attention_heads",
      `a divisor of hidden_size, ${width}, as there is no head_dim`,
    );
  }
  const headDim = file.integer("head_dim", {
    min: 2,
    max: 256,
    fallback: width / heads,
  });
  if (headDim % 2 !== 0) throw file.error("head_dim", "an even number");
  const context = file.integer("max_position_embeddings", {
    min: 1,
    max: 1 << 24,
  });
  const vocabulary = file.integer("vocab_size", { min: 1, max: 1 << 24 });
  if (file.string("hidden_act", "silu") !== "silu") {
    throw file.error("hidden_act", '"silu"');
  }
  for (const key of ["dtype", "torch_dtype"]) {
    if (!DTYPES.includes(file.string(key, "float32"))) {
      throw file.error(key, `one of ${DTYPES.join(", ")}`);
    }
  }
  if (file.has("quantization_config")) {
    throw file.error(
      "quantization_config",
      "none: take the weights as they were before, or a GGUF file",
    );
  }
  const rope = ropeOf(file, { headDim, context });
  // A factor of queries and of keys is its square on their products.
  const { factor = 1 } = rope;
  return {
    architecture: options.architecture,
    layers,
    width,
    hidden: file.integer("intermediate_size", { min: 1, max: 1 << 20 }),
    heads,
    kvHeads,
    headDim,
    vocabulary,
    context,
    epsilon: file.float("rms_norm_eps", {
      min: Number.MIN_VALUE,
      max: 1,
      fallback: 1e-6,
    }),
    rope,
    scale: factor ** 2 / Math.sqrt(headDim),
    tied: file.boolean("tie_word_embeddings", false),
    endTokens: file.ids("eos_token_id", vocabulary - 1),
  };
}

/** `sliding_window`, whether it is used or not; undefined for none. */
export function slidingWindow(file: ConfigFile): number | undefined {
  return file.has("sliding_window")
    ? file.integer("sliding_window", { min: 1, max: 1 << 24 })
    : undefined;
}

/**
 * Which layers look back on a window only.
 *
 * @param fallback Whether layer i does, where the file has no `layer_types`.
 * @throws {FormatError} Their number or a name is wrong.
 */
export function windowLayers(
  file: ConfigFile,
  layers: number,
  fallback: (layer: number) => boolean,
): boolean[] {
  if (!file.has("layer_types")) {
    return Array.from({ length: layers }, (_, i) => fallback(i));
  }
  const types = file.strings("layer_types");
  const known = ["full_attention", "sliding_attention"];
  if (
    types.length !== layers || types.some((type) => !known.includes(type))
  ) throw file.error("layer_types", `${layers} of ${known.join(", ")}`);
  return types.map((type) => type === "sliding_attention");
}
