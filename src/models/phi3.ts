/** The Phi-3 architecture: Phi-3, 3.5 and 4-mini; Llama with fused projections, partial rotation and LongRoPE; called by Model. */

import type { ConfigFile } from "../formats/config.ts";
import type { Architecture, ModelConfig } from "./architecture.ts";
import { loadDecoder } from "./decoder.ts";
import { ggufConfig, ggufWindow } from "./gguf_config.ts";
import {
  huggingFaceConfig,
  llamaTensors,
  slidingWindow,
} from "./hugging_face.ts";

/** Phi-3: Llama whose files hold fused projections. */
export const phi3: Architecture = {
  name: "phi3",
  gguf: {
    name: "phi3",
    config(file) {
      const all = ggufConfig(file, "phi3", "half");
      return {
        ...all,
        window: ggufWindow(file, "phi3", all.layers, () => true),
      };
    },
  },
  huggingFace: {
    classes: ["Phi3ForCausalLM"],
    config,
    tensors: {
      ...llamaTensors,
      attn_qkv: "self_attn.qkv_proj",
      ffn_up: "mlp.gate_up_proj",
    },
  },
  load: (backend, config, weights) =>
    loadDecoder(backend, config, weights, { fused: true }),
};

// ---- configuration ----

function config(file: ConfigFile): ModelConfig {
  const all = huggingFaceConfig(file, { architecture: "phi3" });
  const { factor = 1, frequencies } = all.rope;
  if (factor !== 1 && 2 * frequencies.length !== all.headDim) {
    throw file.error(
      "partial_rotary_factor",
      "1 where cosines and sines have a factor: no kernel multiplies part of a head yet",
    );
  }
  return { ...all, window: slidingWindow(file, all.layers, () => true) };
}
