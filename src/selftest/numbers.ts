/** Random inputs that repeat, and how far results are from what they should be. */

import { type Layer, qkvWidth } from "./layer.ts";

/** Random numbers that repeat. */
export class Random {
  #state: number;

  /** A stream of its own for each seed. */
  constructor(seed: number) {
    this.#state = seed;
  }

  /** Uniform in [0, 1). */
  uniform(): number {
    let x = this.#state = this.#state + 0x6d2b79f5 | 0;
    x = Math.imul(x ^ x >>> 15, x | 1);
    x ^= x + Math.imul(x ^ x >>> 7, x | 61);
    return ((x ^ x >>> 14) >>> 0) / 2 ** 32;
  }

  /** A whole number in [0, below). */
  integer(below: number): number {
    return Math.floor(this.uniform() * below);
  }

  /** Normal with mean 0 and deviation 1. */
  normal(): number {
    return Math.sqrt(-2 * Math.log(1 - this.uniform())) *
      Math.cos(2 * Math.PI * this.uniform());
  }

  /** That many normal numbers. */
  normals(length: number, deviation = 1): Float32Array<ArrayBuffer> {
    return Float32Array.from({ length }, () => deviation * this.normal());
  }

  /**
   * Rows of queries, keys and values; `sharpness` is the deviation of the
   * logits: 0.3 is flat attention, 5 all but picks one token.
   */
  qkv(layer: Layer, rows: number, sharpness = 1): Float32Array<ArrayBuffer> {
    const width = qkvWidth(layer);
    const queries = layer.heads * layer.headDim;
    return this.normals(rows * width).map((x, i) =>
      i % width < queries ? x * sharpness : x
    );
  }
}

/** The length of the difference over that of the expected, or over `least` where that is more; Infinity for a NaN. */
export function relativeError(
  actual: ArrayLike<number>,
  expected: ArrayLike<number>,
  least = 0,
): number {
  if (actual.length !== expected.length) return Infinity;
  let difference = 0, total = 0;
  for (let i = 0; i < actual.length; i++) {
    difference += (actual[i]! - expected[i]!) ** 2;
    total += expected[i]! ** 2;
  }
  if (difference === 0) return 0;
  const error = Math.sqrt(difference / Math.max(total, least ** 2));
  return Number.isNaN(error) ? Infinity : error;
}

/** The largest difference between two lists; Infinity for a NaN. */
export function largestError(
  actual: ArrayLike<number>,
  expected: ArrayLike<number>,
): number {
  if (actual.length !== expected.length) return Infinity;
  let largest = 0;
  for (let i = 0; i < actual.length; i++) {
    const error = Math.abs(actual[i]! - expected[i]!);
    if (!(error <= largest)) largest = Number.isNaN(error) ? Infinity : error;
  }
  return largest;
}
