/** The Gemma 3 architecture, its text part: Gemma 2 without caps, with norms of queries and keys, and five layers of six with a sliding window and a rotation of their own; called by Model. */

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
import { plainRope, ropeOf } from "./rope.ts";

/** Gemma 3 (arXiv 2503.19786). */
export const gemma3: Architecture = {
  name: "gemma3",
  gguf: {
    name: "gemma3",
    config(file) {
      const all = ggufConfig(file, "gemma3", "half");
      const window = ggufWindow(file, "gemma3", all.layers, fiveOfSix);
      const rope = plainRope(LOCAL_BASE, all.headDim);
      return {
        ...all,
        ...gemmaParts(all),
        qkNorm: "head",
        // Of the 27B model's heads, scores are scaled by the width instead.
        scale: (all.layers === 62 ? all.width / all.heads : all.headDim) **
          -0.5,
        window: window && { ...window, rope },
      };
    },
  },
  huggingFace: {
    classes: ["Gemma3ForCausalLM"],
    config,
    tensors: gemmaTensors,
  },
  load: loadDecoder,
};

// ---- configuration ----

/** The base of the rotation in layers with a window. */
const LOCAL_BASE = 10000;

function fiveOfSix(layer: number): boolean {
  return (layer + 1) % 6 !== 0;
}

function config(file: ConfigFile): ModelConfig {
  if (file.boolean("use_bidirectional_attention", false)) {
    throw file.error("use_bidirectional_attention", "false");
  }
  const parameters = file.object("rope_parameters");
  const all = gemmaConfig(file, {
    architecture: "gemma3",
    rope: (file, shape) =>
      parameters?.has("full_attention")
        ? ropeOf(file, shape, parameters.object("full_attention"))
        : ropeOf(file, shape),
  });
  const { headDim, context, layers } = all;
  const local = parameters?.object("sliding_attention");
  const rope = local ? ropeOf(file, { headDim, context }, local) : plainRope(
    file.float("rope_local_base_freq", {
      min: 1,
      max: 1e12,
      fallback: LOCAL_BASE,
    }),
    headDim,
  );
  const period = file.integer("sliding_window_pattern", {
    min: 1,
    max: 1024,
    fallback: 6,
  });
  const window = slidingWindow(
    file,
    layers,
    (layer) => (layer + 1) % period !== 0,
  );
  return { ...all, qkNorm: "head", window: window && { ...window, rope } };
}
