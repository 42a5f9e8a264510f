/** What a decode step must move and compute, and what a model's weights take, from its numbers alone; used by bench/scale.ts. */

import { GGML_TYPES } from "../src/formats/ggml_types.ts";
import { type CacheType, rowBytes } from "../src/cache/layout.ts";
import type { ModelConfig } from "../src/models/architecture.ts";
import type { PlannedModel } from "../src/plan.ts";
import type { WeightType } from "./random_model.ts";
import { type ShapeName, shapeOf } from "./shapes.ts";

/** Bytes of state a cached token of a KV head: score read and written, birth, rank. */
const STATE = 16;

/** What a step costs whatever runs it. */
export interface StepCost {
  /** Bytes of weights, keys, values and state that it must move. */
  bytes: number;
  /** Multiplications and additions. */
  operations: number;
}

/** Numbers of a model's matrices that every step reads, its head included, and those of its embedding where that is no head. */
function matrixNumbers(
  config: ModelConfig,
  tied: boolean,
): { step: number; embedding: number } {
  const { layers, width, hidden, heads, kvHeads, headDim, vocabulary } = config;
  const attention = (2 * heads + 2 * kvHeads) * headDim * width;
  const table = vocabulary * width;
  return {
    step: layers * (attention + 3 * hidden * width) + table,
    embedding: tied ? 0 : table,
  };
}

/** A model of these shapes as a plan needs it, every matrix of one type. */
export function plannedShape(name: ShapeName, dtype: WeightType): PlannedModel {
  const { config, tied } = shapeOf(name);
  const { step, embedding } = matrixNumbers(config, tied);
  const { bytes, block } = GGML_TYPES[dtype];
  const norms = 4 * config.width * (2 * config.layers + 1);
  return {
    config,
    weights: (step + embedding) / block * bytes + norms,
    quantised: block > 1,
  };
}

/**
 * The cost of one decode step.
 *
 * @param stepBytes Bytes of weights that it reads.
 * @param kept Tokens cached a KV head.
 * @param batch Sequences.
 */
export function stepCost(
  config: ModelConfig,
  stepBytes: number,
  cacheType: CacheType,
  kept: number,
  batch: number,
): StepCost {
  const { layers, heads, kvHeads, headDim } = config;
  const cached = batch * layers * kept;
  const { step } = matrixNumbers(config, true);
  return {
    bytes: stepBytes +
      cached * (rowBytes(config, cacheType) + STATE * kvHeads),
    // A query meets each key, a weight each value: a product and a sum each.
    operations: 2 * batch * step + 4 * cached * heads * headDim,
  };
}
