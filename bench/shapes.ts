/** The models of the table of kernel cases, which benchmarks run with random weights. */

import type { ModelConfig } from "../src/models/architecture.ts";
import { modelShapes } from "../src/selftest/model_cases.ts";

/** Base of the rotation. */
const bases: Record<ShapeName, number> = {
  "llama-3-8b": 500000,
  "llama-2-7b": 10000,
  "smollm2-135m": 100000,
  "tiny": 10000,
};

/** The names of shapes. */
export type ShapeName = keyof typeof modelShapes;

/** Their list. */
export const shapeNames = Object.keys(modelShapes) as ShapeName[];

/** A model's numbers, and whether its head is its embedding. */
export function shapeOf(
  name: ShapeName,
): { config: ModelConfig; tied: boolean } {
  const numbers = modelShapes[name];
  const pairs = numbers.headDim / 2;
  return {
    tied: name === "smollm2-135m",
    config: {
      architecture: "llama",
      ...numbers,
      epsilon: 1e-5,
      rope: {
        pairs: "interleaved",
        frequencies: Float32Array.from(
          { length: pairs },
          (_, i) => bases[name] ** (-i / pairs),
        ),
      },
    },
  };
}
