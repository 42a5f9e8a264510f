/**
 * KvCache: keys, values and state of every layer at a fixed number of slots.
 * Models attend through it; users make one with Model.createCache.
 */

import type { Backend } from "../backend/backend.ts";
import {
  wkv_cache_field as field,
  wkv_merge,
  wkv_positions,
  wkv_select,
} from "../backend/symbols.ts";
import { type Dtype, dtypeId, type Tensor } from "../backend/tensor.ts";
import {
  MAX_SLOTS,
  type Merge,
  type Policy,
  resolveBudget,
  type Select,
} from "./policy.ts";
import { type BudgetSize, parseBudget } from "./budget.ts";
import { findPolicy } from "./registry.ts";

/** Element types of cached keys and values. */
export type CacheType = "f32" | "f16" | "bf16";

/** Where keys are rotated: at their rank in the cache, or at their place in the text. */
export type Positions = "cache" | "text";

/** What a cache is made of. */
export interface CacheOptions {
  /** The policy's name. @default `"weighted-kv"` */
  policy?: string | undefined;
  /** How much is kept a KV head; no meaning for `full`. @default `256` tokens */
  budget?: BudgetSize | undefined;
  /** First tokens that never leave. @default by policy */
  sinks?: number | undefined;
  /** Newest tokens that never leave. @default by policy */
  recent?: number | undefined;
  /** Tokens that leave, one after another, when it overflows. @default by policy */
  interval?: number | undefined;
  /** Of policies that draw: a whole number below 2^31. @default `0` */
  seed?: number | undefined;
  /** Where keys are rotated. @default `"cache"` */
  positions?: Positions | undefined;
  /** Type of keys and values. @default `"f16"` */
  cacheType?: CacheType | undefined;
  /** Sequences that are fed side by side. @default `1` */
  sequences?: number | undefined;
  /** Tokens that `full` has room for. @default the model's context */
  capacity?: number | undefined;
}

/** The shape that a model gives its caches. */
export interface CacheShape {
  /** Layers. */
  layers: number;
  /** Query heads. */
  heads: number;
  /** Key and value heads. */
  kvHeads: number;
  /** Dimensions of a head. */
  headDim: number;
  /** Tokens that the model was made for. */
  context: number;
  /** What products of queries and keys are multiplied by. @default 1 / sqrt(D) */
  scale?: number;
  /** The fewest tokens that a layer looks back on, the new one counted. @default all */
  window?: number;
}

/** What became of a sequence's tokens; `seen = kept + merged + evicted`. */
export interface CacheStats {
  /** Tokens fed. */
  seen: number;
  /** Tokens still cached. */
  kept: number;
  /** Tokens whose value was merged into another's. */
  merged: number;
  /** Tokens that were dropped. */
  evicted: number;
}

/** One head's cached tokens, the oldest first. */
export interface CacheRows {
  /** Their places in the text. */
  kept: number[];
  /** n: the steps that attended to each. */
  steps: number[];
  /** a: the sum of attention weights that each received. */
  score: number[];
  /** L2 norm of each stored value. */
  valueNorm: number[];
}

/** What the last step did in one head. */
export interface CacheEvent {
  /** The layer. */
  layer: number;
  /** The KV head. */
  head: number;
  /** The place in the text of the token that left. */
  from: number;
  /** That of the token its value was merged into; null when it was dropped. */
  into: number | null;
  /** The averages a / n of both. */
  weights: [from: number, into: number];
}

const selects: Record<Select, number> = {
  "none": wkv_select.WKV_SELECT_NONE,
  "oldest": wkv_select.WKV_SELECT_OLDEST,
  "lowest-average": wkv_select.WKV_SELECT_LOWEST_AVERAGE,
  "merge-cost": wkv_select.WKV_SELECT_MERGE_COST,
  "merge-cost-linear": wkv_select.WKV_SELECT_MERGE_COST_LINEAR,
  "lowest-average-literal": wkv_select.WKV_SELECT_LITERAL_AVERAGE,
  "lowest-sum": wkv_select.WKV_SELECT_LOWEST_SUM,
  "lowest-now": wkv_select.WKV_SELECT_LOWEST_NOW,
  "least-often": wkv_select.WKV_SELECT_LEAST_OFTEN,
  "key-norm": wkv_select.WKV_SELECT_KEY_NORM,
  "key-likeness": wkv_select.WKV_SELECT_KEY_LIKENESS,
  "window": wkv_select.WKV_SELECT_WINDOW,
  "sum-value-norm": wkv_select.WKV_SELECT_SUM_VALUE_NORM,
  "output-error": wkv_select.WKV_SELECT_OUTPUT_ERROR,
};
const merges: Record<Merge, number> = {
  "none": wkv_merge.WKV_MERGE_NONE,
  "right": wkv_merge.WKV_MERGE_RIGHT,
  "spread": wkv_merge.WKV_MERGE_SPREAD,
  "nearest": wkv_merge.WKV_MERGE_NEAREST,
  "nearest-votes": wkv_merge.WKV_MERGE_NEAREST_VOTES,
};
const places = {
  cache: wkv_positions.WKV_POSITIONS_CACHE,
  text: wkv_positions.WKV_POSITIONS_TEXT,
};
const types: Record<CacheType, Dtype> = {
  f32: "F32",
  f16: "F16",
  bf16: "BF16",
};

/** Keys, values and state of all layers, of one or more sequences. */
export class KvCache implements Disposable {
  /** The policy, its option included in the name. */
  readonly policy: Policy;
  /** Tokens kept a KV head; null for `full`. */
  readonly budget: number | null;
  /** First tokens that never leave; null for `full`. */
  readonly sinks: number | null;
  /** Newest tokens that never leave; null for `full`. */
  readonly recent: number | null;
  /** Tokens that leave when it overflows. */
  readonly interval: number;
  /** Where keys are rotated. */
  readonly positions: Positions;
  /** Type of keys and values. */
  readonly cacheType: CacheType;
  /** Sequences fed side by side. */
  readonly sequences: number;
  /** Slots a KV head: the budget, or what `full` has room for. */
  readonly capacity: number;
  /** Bytes of keys, values and state, all allocated at once. */
  readonly bytes: number;
  readonly #backend: Backend;
  readonly #handle: number;
  readonly #shape: CacheShape;
  readonly #scale: number;
  #closed = false;

  /**
   * Opens an empty cache. `rope` is a function that gives the handle of a
   * rotation whose tables reach a number of positions, for texts of a length.
   *
   * Distances are counted where keys are rotated. With positions in the cache a
   * sliding window is one of ranks, so a cache that is smaller never meets it;
   * a larger one, whose steps it would cut, is refused.
   *
   * @throws {RangeError} An option is out of range.
   * @throws {WkvError} Memory is short.
   */
  constructor(
    backend: Backend,
    shape: CacheShape,
    rope: (positions: number, length: number) => number,
    options: CacheOptions = {},
  ) {
    const { positions = "cache", cacheType = "f16", sequences = 1 } = options;
    if (!Object.hasOwn(places, positions)) {
      throw new RangeError(
        `The positions must be cache or text: current value is "${positions}"`,
      );
    }
    if (!Object.hasOwn(types, cacheType)) {
      throw new RangeError(
        `The cache type must be f32, f16 or bf16: current value is "${cacheType}"`,
      );
    }
    if (!Number.isInteger(sequences) || sequences < 1 || sequences > 4096) {
      throw new RangeError(
        `The sequences must be a whole number between 1 and 4096: current value is ${sequences}`,
      );
    }
    this.policy = findPolicy(options.policy ?? "weighted-kv");
    this.positions = positions;
    this.cacheType = cacheType;
    this.sequences = sequences;
    if (this.policy.select === "none") {
      this.budget = this.sinks = this.recent = null;
      this.interval = 1;
      this.capacity = options.capacity ?? shape.context;
      if (
        !Number.isInteger(this.capacity) || this.capacity < 1 ||
        this.capacity > MAX_SLOTS
      ) {
        throw new RangeError(
          `The capacity must be a whole number between 1 and ${MAX_SLOTS}: current value is ${this.capacity}`,
        );
      }
    } else {
      const resolved = resolveBudget(
        this.policy,
        tokensOf(options.budget ?? 256, options.capacity ?? shape.context),
        options,
      );
      this.budget = this.capacity = resolved.budget;
      this.sinks = resolved.sinks;
      this.recent = resolved.recent;
      this.interval = resolved.interval;
    }
    this.#backend = backend;
    this.#shape = shape;
    this.#scale = shape.scale ?? 1 / Math.sqrt(shape.headDim);
    const reach = this.budget === null
      ? this.capacity
      : positions === "cache"
      ? this.capacity + 1
      : Math.max(shape.context, this.capacity + 1);
    if (shape.window !== undefined && reach > shape.window) {
      throw new RangeError(
        `The model's layers look back on ${shape.window} tokens, which no kernel does yet: take a ${
          this.budget === null
            ? `capacity of at most ${shape.window}`
            : `budget below ${shape.window} and positions in the cache`
        }, current values are ${this.capacity} and ${positions}`,
      );
    }
    const rotation = rope(
      positions === "cache" ? this.capacity + 1 : 0,
      reach,
    );
    try {
      this.#handle = backend.open((out) =>
        backend.call(
          "wkv_cache_open",
          rotation,
          shape.layers,
          sequences,
          shape.heads,
          shape.kvHeads,
          shape.headDim,
          this.capacity,
          this.sinks ?? 0,
          this.recent ?? 0,
          this.interval,
          selects[this.policy.select],
          merges[this.policy.merge],
          options.seed ?? 0,
          places[positions],
          dtypeId(types[cacheType]),
          out,
          4,
        )
      );
      this.bytes = backend.bytes(this.#handle) + backend.bytes(rotation);
    } finally {
      backend.closeHandle(rotation);
    }
  }

  /** Bytes that keys and values of this many tokens of one sequence take in full. */
  fullBytes(tokens: number): number {
    const { layers, kvHeads, headDim } = this.#shape;
    const size = this.cacheType === "f32" ? 4 : 2;
    return 2 * tokens * layers * kvHeads * headDim * size;
  }

  /**
   * Records one decode step of a layer: `qkv` `[B, (H + 2 N) D]` in, `out`
   * `[B, H D]` out. `victims` `[B, N]` forces the ranks that leave (-1: free).
   */
  attend(layer: number, out: Tensor, qkv: Tensor, victims?: Tensor): void {
    this.#backend.call(
      "wkv_attend",
      this.#open,
      layer,
      out.handle,
      qkv.handle,
      this.#scale,
      victims?.handle ?? 0,
    );
  }

  /**
   * Records one step of a layer with attention weights from elsewhere: `kv`
   * `[B, 2 N D]`, `weights` `[B, N (capacity + 1)]` in rank order.
   */
  insert(layer: number, kv: Tensor, weights: Tensor, victims?: Tensor): void {
    this.#backend.call(
      "wkv_insert",
      this.#open,
      layer,
      kv.handle,
      weights.handle,
      victims?.handle ?? 0,
    );
  }

  /** Records a layer's prefill of `rows` tokens of one sequence. */
  prefill(
    layer: number,
    sequence: number,
    out: Tensor,
    qkv: Tensor,
    rows: number,
  ): void {
    this.#backend.call(
      "wkv_prefill",
      this.#open,
      layer,
      sequence,
      out.handle,
      qkv.handle,
      rows,
      this.#scale,
    );
  }

  /**
   * Checks that a pass of `rows` tokens stays within the model's sliding window.
   *
   * @throws {RangeError} It does not.
   */
  checkPass(sequence: number, rows: number): void {
    const { window } = this.#shape;
    if (window === undefined) return;
    const { kept } = this.stats(sequence);
    if (kept + rows <= window) return;
    throw new RangeError(
      `A pass of ${rows} tokens behind ${kept} cached ones is beyond the ${window} that the model's layers look back on: take smaller chunks`,
    );
  }

  /** What became of a sequence's tokens, the same in every head. */
  stats(sequence = 0): CacheStats {
    const counts = new Int32Array(4);
    this.#read(field.WKV_CACHE_COUNTS, 0, sequence, 0, counts);
    const [kept, seen, merged, evicted] = counts as unknown as [
      number,
      number,
      number,
      number,
    ];
    return { seen, kept, merged, evicted };
  }

  /** One head's cached tokens with their state, the oldest first. */
  rows(layer: number, head: number, sequence = 0): CacheRows {
    const { kept } = this.stats(sequence);
    const positions = new Int32Array(kept);
    const steps = new Int32Array(kept);
    const score = new Float32Array(kept);
    this.#read(field.WKV_CACHE_POSITIONS, layer, sequence, head, positions);
    this.#read(field.WKV_CACHE_STEPS, layer, sequence, head, steps);
    this.#read(field.WKV_CACHE_SCORES, layer, sequence, head, score);
    const values = this.values(layer, head, sequence);
    const { headDim } = this.#shape;
    const valueNorm: number[] = [];
    for (let from = 0; from < values.length; from += headDim) {
      let squares = 0;
      for (let i = from; i < from + headDim; i++) squares += values[i]! ** 2;
      valueNorm.push(Math.sqrt(squares));
    }
    return {
      kept: [...positions],
      steps: [...steps],
      score: [...score],
      valueNorm,
    };
  }

  /** Stored keys of one head `[kept, D]`, the oldest first, rotated only when positions are the text's. */
  keys(layer: number, head: number, sequence = 0): Float32Array<ArrayBuffer> {
    return this.#stored(field.WKV_CACHE_KEYS, layer, head, sequence);
  }

  /** Stored values of one head `[kept, D]`, the oldest first. */
  values(layer: number, head: number, sequence = 0): Float32Array<ArrayBuffer> {
    return this.#stored(field.WKV_CACHE_VALUES, layer, head, sequence);
  }

  /** The slots of one head's tokens, the oldest first. */
  slots(layer: number, head: number, sequence = 0): number[] {
    const slots = new Int32Array(this.stats(sequence).kept);
    this.#read(field.WKV_CACHE_SLOTS, layer, sequence, head, slots);
    return [...slots];
  }

  /** What the last step did, for each head that a token has left. */
  events(sequence = 0): CacheEvent[] {
    const events: CacheEvent[] = [];
    const { merged, evicted } = this.stats(sequence);
    if (merged + evicted === 0) return events;
    const out = new Float32Array(4);
    for (let layer = 0; layer < this.#shape.layers; layer++) {
      for (let head = 0; head < this.#shape.kvHeads; head++) {
        this.#read(field.WKV_CACHE_EVENT, layer, sequence, head, out);
        const [from, into, a, b] = out as unknown as [
          number,
          number,
          number,
          number,
        ];
        events.push({
          layer,
          head,
          from,
          into: into < 0 ? null : into,
          weights: [a, b],
        });
      }
    }
    return events;
  }

  /** Empties one sequence, or all of them. */
  reset(sequence = -1): void {
    this.#backend.call("wkv_cache_reset", this.#open, sequence);
  }

  /** Whether {@linkcode KvCache.close} was called. */
  get closed(): boolean {
    return this.#closed;
  }

  /** Gives the memory back. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#backend.closeHandle(this.#handle);
  }

  /** Same as {@linkcode KvCache.close}. */
  [Symbol.dispose](): void {
    this.close();
  }

  get #open(): number {
    if (this.#closed) throw new Error("The cache is closed");
    return this.#handle;
  }

  #stored(
    what: number,
    layer: number,
    head: number,
    sequence: number,
  ): Float32Array<ArrayBuffer> {
    const { kept } = this.stats(sequence);
    const out = new Float32Array(kept * this.#shape.headDim);
    this.#read(what, layer, sequence, head, out);
    return out;
  }

  #read(
    what: number,
    layer: number,
    sequence: number,
    head: number,
    out: Float32Array<ArrayBuffer> | Int32Array<ArrayBuffer>,
  ): void {
    this.#backend.call(
      "wkv_cache_read",
      this.#open,
      what,
      layer,
      sequence,
      head,
      out,
      out.byteLength,
    );
  }
}

/** A budget in tokens, a share being one of what a full cache would hold. */
function tokensOf(size: BudgetSize, capacity: number): number {
  // A number's own message says most.
  if (typeof size === "number") return size;
  const parsed = parseBudget(size);
  if (parsed.kind === "tokens") return parsed.tokens;
  if (parsed.kind === "share") {
    return Math.max(1, Math.floor(parsed.share * capacity));
  }
  throw new RangeError(
    `A budget in bytes is resolved by a model's createCache: current value is "${size}"`,
  );
}
