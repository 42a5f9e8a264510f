/** The Qwen3 architecture: Llama whose heads' queries and keys are normed; called by Model. */

import type { ConfigFile } from "../formats/config.ts";
import type { Architecture, ModelConfig } from "./architecture.ts";
import { loadDecoder } from "./decoder.ts";
import { ggufConfig } from "./gguf_config.ts";
import {
  attentionBiases,
  huggingFaceConfig,
  normedTensors,
  qwenWindow,
} from "./hugging_face.ts";

/** Qwen3: Llama with a norm of each head's queries and keys. */
export const qwen3: Architecture = {
  name: "qwen3",
  gguf: {
    name: "qwen3",
    config: (file) => ({
      ...ggufConfig(file, "qwen3", "half"),
      qkNorm: "head",
    }),
  },
  huggingFace: {
    classes: ["Qwen3ForCausalLM"],
    config,
    tensors: normedTensors,
  },
  load: loadDecoder,
};

// ---- configuration ----

function config(file: ConfigFile): ModelConfig {
  const all = huggingFaceConfig(file, { architecture: "qwen3", headDim: 128 });
  return {
    ...all,
    biases: attentionBiases(file),
    qkNorm: "head",
    window: qwenWindow(file, all.layers),
  };
}
