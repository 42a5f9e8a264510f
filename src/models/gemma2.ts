/** The Gemma 2 architecture: norms around each part, capped scores and logits, every other layer with a sliding window; called by Model. */

import type { ConfigFile } from "../formats/config.ts";
import type { Architecture, ModelConfig } from "./architecture.ts";
import { loadDecoder } from "./decoder.ts";
import { ggufConfig, ggufWindow } from "./gguf_config.ts";
import {
  gemmaConfig,
  gemmaParts,
  gemmaTensors,
  slidingWindow,
} from "./hugging_face.ts";

/** Gemma 2 (arXiv 2408.00118). */
export const gemma2: Architecture = {
  name: "gemma2",
  gguf: {
    name: "gemma2",
    config(file) {
      const all = ggufConfig(file, "gemma2", "half");
      const cap = (key: string, fallback: number) =>
        file.float(`gemma2.${key}`, { ...CAPS, fallback });
      return {
        ...all,
        ...gemmaParts(all),
        // Of the 27B model's heads, scores are scaled by the width instead.
        scale: (all.layers === 46 ? all.width / all.heads : all.headDim) **
          -0.5,
        scoreCap: cap("attn_logit_softcapping", 50),
        logitCap: cap("final_logit_softcapping", 30),
        window: ggufWindow(file, "gemma2", all.layers, everyOther),
      };
    },
  },
  huggingFace: {
    classes: ["Gemma2ForCausalLM"],
    config,
    tensors: gemmaTensors,
  },
  load: loadDecoder,
};

// ---- configuration ----

const CAPS = { min: Number.MIN_VALUE, max: 1e9 };

function everyOther(layer: number): boolean {
  return layer % 2 === 0;
}

function config(file: ConfigFile): ModelConfig {
  const all = gemmaConfig(file, { architecture: "gemma2" });
  const cap = (key: string) =>
    file.has(key) ? file.float(key, CAPS) : undefined;
  return {
    ...all,
    scoreCap: cap("attn_logit_softcapping"),
    logitCap: cap("final_logit_softcapping"),
    window: slidingWindow(file, all.layers, everyOther),
  };
}
