/** What the config.json of every decoder has, and the names that most give their tensors; used by the architectures. */

import type { ConfigFile } from "../formats/config.ts";
import type { Activation } from "../backend/ops.ts";
import type { ModelConfig, SlidingWindow } from "./architecture.ts";
import { type Rope, ropeOf, type RopeShape } from "./rope.ts";

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

/** The same with norms of queries and keys. */
export const normedTensors: Readonly<Record<string, string>> = {
  ...llamaTensors,
  attn_q_norm: "self_attn.q_norm",
  attn_k_norm: "self_attn.k_norm",
};

/** Gemma's: norms before and after each part. */
export const gemmaTensors: Readonly<Record<string, string>> = {
  ...normedTensors,
  post_attention_norm: "post_attention_layernorm",
  ffn_norm: "pre_feedforward_layernorm",
  post_ffw_norm: "post_feedforward_layernorm",
};

/** Types that weights are announced in; what counts is the type of each tensor. */
const DTYPES = ["float32", "float16", "bfloat16"];

/** Activations by the names that transformers has for them. */
const ACTIVATIONS: Readonly<Record<string, Activation>> = {
  silu: "silu",
  gelu_pytorch_tanh: "gelu-tanh",
};

/** What a file means where it is silent, as transformers reads it. */
export interface ConfigDefaults {
  /** The architecture's name. */
  architecture: string;
  /** Dimensions of a head. @default width / heads */
  headDim?: number;
  /** What the gate goes through; the only one that is taken. @default `"silu"` */
  activation?: "silu" | "gelu_pytorch_tanh";
  /** Whether the head is the embedding. @default `false` */
  tied?: boolean;
  /** Reads the rotation. @default `ropeOf` */
  rope?: (file: ConfigFile, shape: RopeShape) => Rope;
}

/**
 * Reads and checks what all decoders have.
 *
 * @throws {FormatError} A key is missing or out of range.
 */
export function huggingFaceConfig(
  file: ConfigFile,
  defaults: ConfigDefaults,
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
    !file.has("head_dim") && !defaults.headDim && width % heads !== 0
  ) {
    throw file.error(
      "num_attention_heads",
      `a divisor of hidden_size, ${width}, as there is no head_dim`,
    );
  }
  const headDim = file.integer("head_dim", {
    min: 2,
    max: 256,
    fallback: defaults.headDim ?? width / heads,
  });
  if (headDim % 2 !== 0) throw file.error("head_dim", "an even number");
  const context = file.integer("max_position_embeddings", {
    min: 1,
    max: 1 << 24,
  });
  const vocabulary = file.integer("vocab_size", { min: 1, max: 1 << 24 });
  const { activation = "silu" } = defaults;
  for (const key of ["hidden_activation", "hidden_act"]) {
    if (file.string(key, activation) !== activation) {
      throw file.error(key, `"${activation}"`);
    }
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
  const rope = (defaults.rope ?? ropeOf)(file, { headDim, context });
  // A factor of queries and of keys is its square on their products.
  const { factor = 1 } = rope;
  return {
    architecture: defaults.architecture,
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
    activation: ACTIVATIONS[activation],
    tied: file.boolean("tie_word_embeddings", defaults.tied ?? false),
    endTokens: file.ids("eos_token_id", vocabulary - 1),
  };
}

/**
 * The sliding window, `sliding_window` tokens; undefined where the file has none
 * or no layer uses it.
 *
 * @param fallback Whether layer i does, where the file has no `layer_types`.
 * @throws {FormatError} A value is out of range or of an unknown type.
 */
export function slidingWindow(
  file: ConfigFile,
  layers: number,
  fallback: (layer: number) => boolean,
): SlidingWindow | undefined {
  if (!file.has("sliding_window")) return undefined;
  const tokens = file.integer("sliding_window", { min: 2, max: 1 << 24 });
  const which = windowLayers(file, layers, fallback);
  return which.includes(true) ? { tokens, layers: which } : undefined;
}

/** Qwen's window: of the layers from `max_window_layers` on, where it is used. */
export function qwenWindow(
  file: ConfigFile,
  layers: number,
): SlidingWindow | undefined {
  if (!file.boolean("use_sliding_window", false)) return undefined;
  const first = file.integer("max_window_layers", {
    min: 0,
    max: 1024,
    fallback: 28,
  });
  return slidingWindow(file, layers, (layer) => layer >= first);
}

/** What the files of all Gemmas leave unsaid. */
export function gemmaParts({ width }: ModelConfig) {
  return {
    activation: "gelu-tanh",
    norms: "both",
    embeddingScale: Math.sqrt(width),
  } as const;
}

/** The configuration that Gemmas share, as transformers reads it. */
export function gemmaConfig(
  file: ConfigFile,
  defaults: Pick<ConfigDefaults, "architecture" | "rope">,
): ModelConfig {
  const all = huggingFaceConfig(file, {
    headDim: 256,
    activation: "gelu_pytorch_tanh",
    tied: true,
    ...defaults,
  });
  const range = { min: Number.MIN_VALUE, max: 1e6, fallback: 256 };
  return {
    ...all,
    ...gemmaParts(all),
    normOffset: 1,
    biases: attentionBiases(file),
    scale: file.float("query_pre_attn_scalar", range) ** -0.5,
  };
}

/** Which projections have biases where `attention_bias` says so. */
export function attentionBiases(file: ConfigFile): "none" | "all" {
  return file.boolean("attention_bias", false) ? "all" : "none";
}

function windowLayers(
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
