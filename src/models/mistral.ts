/** The Mistral architecture: Llama with a sliding window; its GGUF files are named llama; called by Model. */

import type { ConfigFile } from "../formats/config.ts";
import type { Architecture, ModelConfig } from "./architecture.ts";
import { loadDecoder } from "./decoder.ts";
import {
  huggingFaceConfig,
  llamaTensors,
  slidingWindow,
} from "./hugging_face.ts";

/** Mistral: Llama, whose layers may look back on a window only. */
export const mistral: Architecture = {
  name: "mistral",
  gguf: null,
  huggingFace: {
    classes: ["MistralForCausalLM"],
    config,
    tensors: llamaTensors,
  },
  load: loadDecoder,
};

// ---- configuration ----

function config(file: ConfigFile): ModelConfig {
  const all = huggingFaceConfig(file, { architecture: "mistral" });
  return { ...all, window: slidingWindow(file, all.layers, () => true) };
}
