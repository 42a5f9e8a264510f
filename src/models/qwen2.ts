/** The Qwen2 architecture: Qwen 2 and 2.5; Llama with biases of queries, keys and values; called by Model. */

import type { ConfigFile } from "../formats/config.ts";
import type { Architecture, ModelConfig } from "./architecture.ts";
import { loadDecoder } from "./decoder.ts";
import { ggufConfig } from "./gguf_config.ts";
import { huggingFaceConfig, llamaTensors, qwenWindow } from "./hugging_face.ts";

/** Qwen2: Llama with biases of queries, keys and values. */
export const qwen2: Architecture = {
  name: "qwen2",
  gguf: {
    name: "qwen2",
    config: (file) => ({ ...ggufConfig(file, "qwen2", "half"), biases: "qkv" }),
  },
  huggingFace: {
    classes: ["Qwen2ForCausalLM"],
    config,
    tensors: llamaTensors,
  },
  load: loadDecoder,
};

// ---- configuration ----

function config(file: ConfigFile): ModelConfig {
  const all = huggingFaceConfig(file, { architecture: "qwen2" });
  return { ...all, biases: "qkv", window: qwenWindow(file, all.layers) };
}
