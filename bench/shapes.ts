/** Shapes of models that benchmarks run with random weights. */

import type { ModelConfig } from "../src/models/architecture.ts";

type Shape =
  & Pick<
    ModelConfig,
    | "layers"
    | "width"
    | "hidden"
    | "heads"
    | "kvHeads"
    | "headDim"
    | "vocabulary"
    | "context"
  >
  & { base: number; tied?: boolean };

const shapes = {
  "llama-3-8b": {
    layers: 32,
    width: 4096,
    hidden: 14336,
    heads: 32,
    kvHeads: 8,
    headDim: 128,
    vocabulary: 128256,
    context: 8192,
    base: 500000,
  },
  "llama-2-7b": {
    layers: 32,
    width: 4096,
    hidden: 11008,
    heads: 32,
    kvHeads: 32,
    headDim: 128,
    vocabulary: 32000,
    context: 4096,
    base: 10000,
  },
  "smollm2-135m": {
    layers: 30,
    width: 576,
    hidden: 1536,
    heads: 9,
    kvHeads: 3,
    headDim: 64,
    vocabulary: 49152,
    context: 8192,
    base: 100000,
    tied: true,
  },
  /** For tests. */
  "tiny": {
    layers: 2,
    width: 64,
    hidden: 96,
    heads: 4,
    kvHeads: 2,
    headDim: 16,
    vocabulary: 256,
    context: 512,
    base: 10000,
  },
} satisfies Record<string, Shape>;

/** The names of shapes. */
export type ShapeName = keyof typeof shapes;

/** Their list. */
export const shapeNames = Object.keys(shapes) as ShapeName[];

/** A model's numbers, and whether its head is its embedding. */
export function shapeOf(
  name: ShapeName,
): { config: ModelConfig; tied: boolean } {
  const { base, tied = false, ...numbers }: Shape = shapes[name];
  const pairs = numbers.headDim / 2;
  return {
    tied,
    config: {
      architecture: "llama",
      ...numbers,
      epsilon: 1e-5,
      rope: {
        pairs: "interleaved",
        frequencies: Float32Array.from(
          { length: pairs },
          (_, i) => base ** (-i / pairs),
        ),
      },
    },
  };
}
