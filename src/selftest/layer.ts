/**
 * One attention layer on the native library and in f64; used by the self-test
 * and by the tests of the cache.
 */

import type { Backend } from "../backend/backend.ts";
import { wkv_pairs } from "../backend/symbols.ts";
import { KvCache } from "../cache/cache.ts";
import type { CacheOptions } from "../cache/layout.ts";
import { ReferenceCache, softmax } from "./reference.ts";
import { stored } from "./reference_policies.ts";

/** The shape of an attention layer. */
export interface Layer {
  /** Query heads. */
  heads: number;
  /** Key and value heads. */
  kvHeads: number;
  /** Dimensions of a head. */
  headDim: number;
  /** Which dimensions a rotation turns together. @default `"interleaved"` */
  pairs?: "half" | "interleaved";
  /** Dimensions that are rotated. @default all */
  rotary?: number;
  /** Layers. @default `1` */
  layers?: number;
  /** Scores s become cap tanh(s / cap). @default none */
  scoreCap?: number | undefined;
  /** Tokens that one looks back on. @default all */
  window?: number | undefined;
}

/** Numbers of one row of queries, keys and values. */
export function qkvWidth({ heads, kvHeads, headDim }: Layer): number {
  return (heads + 2 * kvHeads) * headDim;
}

/** The rotation's frequencies, as the library gets them. */
export function frequencies(layer: Layer): Float32Array<ArrayBuffer> {
  const rotary = layer.rotary ?? layer.headDim;
  return Float32Array.from(
    { length: rotary / 2 },
    (_, i) => 10000 ** (-2 * i / rotary),
  );
}

/** Opens the layer's rotation. */
export function openRope(
  backend: Backend,
  layer: Layer,
  positions: number,
): number {
  const pairs = layer.pairs === "half"
    ? wkv_pairs.WKV_PAIRS_HALF
    : wkv_pairs.WKV_PAIRS_INTERLEAVED;
  const list = frequencies(layer);
  return backend.open((out) =>
    backend.call(
      "wkv_rope_open",
      layer.headDim,
      pairs,
      list,
      list.byteLength,
      positions,
      out,
      4,
    )
  );
}

/** Opens a cache of the layer, in f32 unless said. */
export function openCache(
  backend: Backend,
  layer: Layer,
  options: CacheOptions = {},
): KvCache {
  return new KvCache(
    backend,
    {
      layers: layer.layers ?? 1,
      heads: layer.heads,
      kvHeads: layer.kvHeads,
      headDim: layer.headDim,
      context: 64,
      scoreCap: layer.scoreCap,
      window: layer.window === undefined
        ? undefined
        : { tokens: layer.window, layers: Array(layer.layers ?? 1).fill(true) },
    },
    (positions) => openRope(backend, layer, positions),
    { cacheType: "f32", ...options },
  );
}

/** The f64 list implementation of the same cache, for one sequence. */
export function openReference(
  layer: Layer,
  cache: KvCache,
  sequence = 0,
): ReferenceCache {
  return new ReferenceCache({
    heads: layer.heads,
    kvHeads: layer.kvHeads,
    headDim: layer.headDim,
    slots: cache.layerSlots[0]!,
    ...cache.layerSlots[0] === cache.capacity
      ? {
        sinks: cache.sinks ?? 0,
        recent: cache.recent ?? 0,
        interval: cache.interval,
        select: cache.policy.select,
        merge: cache.policy.merge,
      }
      // The layer keeps its window.
      : { sinks: 0, recent: 0, interval: 1, select: "oldest", merge: "none" },
    positions: cache.positions,
    cacheType: cache.cacheType,
    pairs: layer.pairs ?? "interleaved",
    frequencies: frequencies(layer),
    scoreCap: layer.scoreCap,
    window: layer.window,
    sequence,
  });
}

/**
 * What attention over one sequence's cache and one more token gives, in f64:
 * the output `[H D]`, and the mean weights `[N][kept + 1]` in rank order.
 */
export function dense(
  cache: KvCache,
  row: ArrayLike<number>,
  layer: Layer,
  sequence = 0,
): { out: number[]; weights: number[][] } {
  const { heads, kvHeads, headDim } = layer;
  const group = heads / kvHeads;
  const { seen, kept } = cache.stats(sequence);
  const inText = cache.positions === "text";
  const place = inText ? seen : kept;
  const part = (from: ArrayLike<number>, i: number) =>
    Array.from({ length: headDim }, (_, d) => from[i * headDim + d]!);
  const round = (x: number[]) => x.map((y) => stored(y, cache.cacheType));
  const out: number[] = [];
  const means: number[][] = [];
  for (let n = 0; n < kvHeads; n++) {
    const storedKeys = cache.keys(0, n, sequence);
    const storedValues = cache.values(0, n, sequence);
    const keys: number[][] = [], values: number[][] = [];
    for (let i = 0; i < kept; i++) {
      const key = part(storedKeys, i);
      keys.push(inText ? key : turn(key, i, layer));
      values.push(part(storedValues, i));
    }
    const key = part(row, heads + n);
    keys.push(
      inText ? round(turn(key, place, layer)) : turn(round(key), place, layer),
    );
    values.push(round(part(row, heads + kvHeads + n)));
    const mean: number[] = Array(kept + 1).fill(0);
    for (let g = 0; g < group; g++) {
      const query = turn(part(row, n * group + g), place, layer);
      const weights = softmax(keys.map((key) => {
        let sum = 0;
        for (let d = 0; d < headDim; d++) sum += key[d]! * query[d]!;
        return sum / Math.sqrt(headDim);
      }));
      weights.forEach((p, i) => mean[i]! += p / group);
      for (let d = 0; d < headDim; d++) {
        out.push(weights.reduce((sum, p, i) => sum + p * values[i]![d]!, 0));
      }
    }
    means.push(mean);
  }
  return { out, weights: means };
}

/** A head's vector rotated to a position, in f64. */
export function turn(
  x: ArrayLike<number>,
  position: number,
  layer: Layer,
): number[] {
  const out = Array.from(x);
  const angles = frequencies(layer);
  angles.forEach((frequency, i) => {
    const half = layer.pairs === "half";
    const a = half ? i : 2 * i;
    const b = half ? i + angles.length : 2 * i + 1;
    const cos = Math.cos(position * frequency);
    const sin = Math.sin(position * frequency);
    out[a] = x[a]! * cos - x[b]! * sin;
    out[b] = x[b]! * cos + x[a]! * sin;
  });
  return out;
}
