/** The Llama architecture: Llama 1 to 3, SmolLM and TinyLlama; called by Model. */

import type { ConfigFile } from "../formats/config.ts";
import type { Architecture, ModelConfig } from "./architecture.ts";
import { loadDecoder } from "./decoder.ts";
import { ggufConfig } from "./gguf_config.ts";
import {
  attentionBiases,
  huggingFaceConfig,
  llamaTensors,
} from "./hugging_face.ts";

/** Llama: RMSNorm, rotary attention with grouped heads, SwiGLU. */
export const llama: Architecture = {
  name: "llama",
  gguf: {
    name: "llama",
    // Files of this name hold Q and K with their rows so permuted.
    config: (file) => ggufConfig(file, "llama", "interleaved"),
  },
  huggingFace: {
    classes: ["LlamaForCausalLM"],
    config,
    tensors: llamaTensors,
  },
  load: loadDecoder,
};

// ---- configuration ----

function config(file: ConfigFile): ModelConfig {
  if (file.boolean("mlp_bias", false)) {
    throw file.error("mlp_bias", "false: no kernel adds them yet");
  }
  return {
    ...huggingFaceConfig(file, { architecture: "llama" }),
    biases: attentionBiases(file),
  };
}
