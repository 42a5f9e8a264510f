/** The OLMo 2 architecture: norms behind attention and feed-forward part, and of all queries and keys together; called by Model. */

import type { ConfigFile } from "../formats/config.ts";
import type { Architecture, ModelConfig } from "./architecture.ts";
import { loadDecoder } from "./decoder.ts";
import { ggufConfig } from "./gguf_config.ts";
import {
  attentionBiases,
  huggingFaceConfig,
  normedTensors,
} from "./hugging_face.ts";

/** OLMo 2 (arXiv 2501.00656): Llama with its norms behind the parts of a block. */
export const olmo2: Architecture = {
  name: "olmo2",
  gguf: {
    name: "olmo2",
    config: (file) => ({ ...ggufConfig(file, "olmo2", "half"), ...norms }),
  },
  huggingFace: {
    classes: ["Olmo2ForCausalLM"],
    config,
    tensors: {
      ...normedTensors,
      post_attention_norm: "post_attention_layernorm",
      post_ffw_norm: "post_feedforward_layernorm",
    },
  },
  load: loadDecoder,
};

// ---- configuration ----

const norms = { norms: "after", qkNorm: "all" } as const;

function config(file: ConfigFile): ModelConfig {
  return {
    ...huggingFaceConfig(file, { architecture: "olmo2" }),
    biases: attentionBiases(file),
    ...norms,
  };
}
