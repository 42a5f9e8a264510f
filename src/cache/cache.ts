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
  type CacheOptions,
  type CacheShape,
  type CacheType,
  type GroupPlan,
  type HeadPlace,
  type HeadPlan,
  layerRows,
  planCache,
  type Positions,
  rowBytes,
} from "./layout.ts";
import { keepsAll, type Merge, type Policy, type Select } from "./policy.ts";

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
  "right-light": wkv_merge.WKV_MERGE_RIGHT_LIGHT,
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

/** Heads that are alike, as one cache of the library. */
interface Group extends HeadPlan {
  handle: number;
  /** KV heads that each of its layers has. */
  kvHeads: number;
  /** The first head of each of its layers. */
  places: readonly HeadPlace[];
  /** Bytes of keys, values, state and rotation. */
  bytes: number;
}

/** Some heads of a layer. */
interface Part {
  group: Group;
  /** Which of the group's layers it is. */
  index: number;
  /** The layer's KV head that is its first. */
  head: number;
}

function meanOf(numbers: readonly number[]): number {
  return Math.round(numbers.reduce((a, b) => a + b) / numbers.length);
}

/** Opens a rotation whose tables reach `positions`, for texts of `length` tokens; `windowed`: of the layers with a window. */
export type OpenRope = (
  positions: number,
  length: number,
  windowed: boolean,
) => number;

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
  /**
   * Slots a KV head of each layer, the mean of its heads. They differ where the
   * budget is spread unevenly, and where a layer keeps the model's sliding window.
   */
  readonly layerSlots: readonly number[];
  /** Slots of each KV head of each layer. */
  readonly headSlots: readonly (readonly number[])[];
  /** Bytes of keys, values and state, all allocated at once. */
  readonly bytes: number;
  readonly #backend: Backend;
  readonly #groups: Group[] = [];
  /** Where each layer's heads are: from `head` on in which group, and which of its layers. */
  readonly #parts: Part[][] = [];
  /** The head that stands for all in numbers of the whole. */
  readonly #typical: HeadPlace;
  readonly #shape: CacheShape;
  readonly #scale: number;
  #closed = false;

  /**
   * Opens an empty cache.
   *
   * A layer with a sliding window that the budget is smaller than follows the
   * policy: with positions in the cache, distances are ranks, and none is beyond
   * the window. Where the budget, or `full`, is as large, the layer keeps its
   * window exactly as the model does, and no more.
   *
   * @throws {RangeError} An option is out of range.
   * @throws {WkvError} Memory is short.
   */
  constructor(
    backend: Backend,
    shape: CacheShape,
    rope: OpenRope,
    options: CacheOptions = {},
  ) {
    const plans = planCache(shape, options);
    const { positions, cacheType, sequences } = plans;
    this.policy = plans.policy;
    this.positions = positions;
    this.cacheType = cacheType;
    this.sequences = sequences;
    this.#backend = backend;
    this.#shape = shape;
    this.#scale = shape.scale ?? 1 / Math.sqrt(shape.headDim);
    this.capacity = plans.budget;
    if (keepsAll(this.policy)) {
      this.budget = this.sinks = this.recent = null;
      this.interval = 1;
    } else {
      this.budget = plans.budget;
      this.sinks = plans.sinks;
      this.recent = plans.recent;
      this.interval = plans.interval;
    }
    this.headSlots = plans.heads.map((own) => own.map(({ slots }) => slots));
    this.layerSlots = this.headSlots.map(meanOf);
    this.#typical = plans.typical;
    try {
      for (const one of plans.groups) {
        const group = this.#openGroup(one, rope, plans.reach, options);
        one.places.forEach(({ layer, head }, index) =>
          (this.#parts[layer] ??= []).push({ group, index, head })
        );
      }
      for (const parts of this.#parts) parts.sort((a, b) => a.head - b.head);
    } catch (error) {
      this.close();
      throw error;
    }
    this.bytes = this.#groups.reduce((sum, { bytes }) => sum + bytes, 0);
  }

  /** Bytes that keys and values of this many tokens of one sequence take in full. */
  fullBytes(tokens: number): number {
    const rows = layerRows(this.#shape, tokens).reduce((a, b) => a + b);
    return rows * rowBytes(this.#shape, this.cacheType);
  }

  /**
   * Records one decode step of a layer: `qkv` `[B, (H + 2 N) D]` in, `out`
   * `[B, H D]` out. `victims` `[B, N]` forces the ranks that leave (-1: free),
   * where the layer's heads are alike.
   *
   * @throws {RangeError} Heads of unequal budgets are to be forced.
   */
  attend(layer: number, out: Tensor, qkv: Tensor, victims?: Tensor): void {
    const parts = victims ? [this.#whole(layer)] : this.#partsOf(layer);
    for (const { group, index, head } of parts) {
      this.#backend.call(
        "wkv_attend",
        group.handle,
        index,
        head,
        out.handle,
        qkv.handle,
        this.#scale,
        this.#shape.scoreCap ?? 0,
        victims?.handle ?? 0,
      );
    }
  }

  /**
   * Records one step of a layer with attention weights from elsewhere: `kv`
   * `[B, 2 N D]`, `weights` `[B, N (capacity + 1)]` in rank order.
   *
   * @throws {RangeError} The layer's heads have unequal budgets.
   */
  insert(layer: number, kv: Tensor, weights: Tensor, victims?: Tensor): void {
    const { group, index } = this.#whole(layer);
    this.#backend.call(
      "wkv_insert",
      group.handle,
      index,
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
    for (const { group, index, head } of this.#partsOf(layer)) {
      this.#backend.call(
        "wkv_prefill",
        group.handle,
        index,
        head,
        sequence,
        out.handle,
        qkv.handle,
        rows,
        this.#scale,
        this.#shape.scoreCap ?? 0,
        group.window,
      );
    }
  }

  /** Whether layers or heads keep different numbers of tokens. */
  get uneven(): boolean {
    return this.headSlots.some((own) =>
      own.some((slots) => slots !== this.capacity)
    );
  }

  /** Whether KV heads of a layer keep different numbers of tokens. */
  get unevenHeads(): boolean {
    return this.headSlots.some((own) => own.some((slots) => slots !== own[0]));
  }

  /** Tokens that a sequence has room for in every layer that follows the policy. */
  room(sequence = 0): number {
    // A layer that keeps its window always has room.
    const rooms = this.#groups.filter(({ whole }) => !whole)
      .map(({ slots, places }) => {
        const { layer, head } = places[0]!;
        return slots - this.stats(sequence, layer, head).kept;
      });
    return Math.max(0, Math.min(...rooms));
  }

  /**
   * What became of a sequence's tokens, the same in every head that has as many
   * slots; where heads differ, of the one whose slots are nearest to the budget.
   */
  stats(
    sequence = 0,
    layer: number = this.#typical.layer,
    head: number = layer === this.#typical.layer ? this.#typical.head : 0,
  ): CacheStats {
    const counts = new Int32Array(4);
    this.#read(field.WKV_CACHE_COUNTS, layer, sequence, head, counts);
    const [kept, seen, merged, evicted] = counts as unknown as [
      number,
      number,
      number,
      number,
    ];
    return { seen, kept, merged, evicted };
  }

  /** Tokens that each KV head of each layer holds of a sequence. */
  headKept(sequence = 0): number[][] {
    return this.#parts.map((_, layer) => this.#kept(layer, sequence));
  }

  /** Tokens that a layer holds of a sequence, the mean of its heads. */
  layerKept(layer: number, sequence = 0): number {
    return meanOf(this.#kept(layer, sequence));
  }

  /** Tokens that each KV head of a layer holds; heads of one cache hold as many. */
  #kept(layer: number, sequence: number): number[] {
    return this.#partsOf(layer).flatMap(({ group, head }) =>
      Array(group.kvHeads).fill(this.stats(sequence, layer, head).kept)
    );
  }

  /** One head's cached tokens with their state, the oldest first. */
  rows(layer: number, head: number, sequence = 0): CacheRows {
    const { kept } = this.stats(sequence, layer, head);
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
    const slots = new Int32Array(this.stats(sequence, layer, head).kept);
    this.#read(field.WKV_CACHE_SLOTS, layer, sequence, head, slots);
    return [...slots];
  }

  /** What the last step did, for each head that a token has left. */
  events(sequence = 0): CacheEvent[] {
    const events: CacheEvent[] = [];
    const out = new Float32Array(4);
    for (const [layer, parts] of this.#parts.entries()) {
      // Tokens leave all heads of one cache in the same steps.
      const left = parts.flatMap(({ group, head }) => {
        const { merged, evicted } = this.stats(sequence, layer, head);
        if (merged + evicted === 0) return [];
        return Array.from({ length: group.kvHeads }, (_, i) => head + i);
      });
      for (const head of left) {
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
    this.#checkOpen();
    for (const { handle } of this.#groups) {
      this.#backend.call("wkv_cache_reset", handle, sequence);
    }
  }

  /** Whether {@linkcode KvCache.close} was called. */
  get closed(): boolean {
    return this.#closed;
  }

  /** Gives the memory back. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    for (const { handle } of this.#groups) this.#backend.closeHandle(handle);
  }

  /** Same as {@linkcode KvCache.close}. */
  [Symbol.dispose](): void {
    this.close();
  }

  #checkOpen(): void {
    if (this.#closed) throw new Error("The cache is closed");
  }

  /** A layer's caches in the library, each with some of its heads. */
  #partsOf(layer: number): readonly Part[] {
    this.#checkOpen();
    const parts = this.#parts[layer];
    if (parts === undefined) {
      throw new RangeError(
        `The layer must be between 0 and ${
          this.#parts.length - 1
        }: current value is ${layer}`,
      );
    }
    return parts;
  }

  /** A layer's one cache in the library. */
  #whole(layer: number): Part {
    const [part, ...others] = this.#partsOf(layer);
    if (others.length === 0) return part!;
    throw new RangeError(
      `The KV heads of layer ${layer} have budgets of their own: no weights or victims can be given for all of them`,
    );
  }

  /** Opens a cache of the library. */
  #openGroup(
    { plan, kvHeads, places: heads }: GroupPlan,
    rope: OpenRope,
    reach: number,
    { seed = 0 }: CacheOptions,
  ): Group {
    const { slots, sinks, recent, interval, whole, window } = plan;
    const backend = this.#backend;
    const rotation = rope(
      this.positions === "cache" ? slots + 1 : 0,
      reach,
      window > 0,
    );
    try {
      const handle = backend.open((out) =>
        backend.call(
          "wkv_cache_open",
          rotation,
          heads.length,
          this.sequences,
          this.#shape.heads / this.#shape.kvHeads * kvHeads,
          kvHeads,
          this.#shape.headDim,
          slots,
          sinks,
          recent,
          interval,
          whole ? selects.oldest : selects[this.policy.select],
          whole ? merges.none : merges[this.policy.merge],
          // Layers of the same number in two groups draw apart.
          this.#groups.length === 0
            ? seed
            : (seed + this.#groups.length * 0x10001) % 2 ** 31,
          places[this.positions],
          dtypeId(types[this.cacheType]),
          out,
          4,
        )
      );
      const bytes = backend.bytes(handle) + backend.bytes(rotation);
      const group = { ...plan, handle, kvHeads, places: heads, bytes };
      this.#groups.push(group);
      return group;
    } finally {
      backend.closeHandle(rotation);
    }
  }

  #stored(
    what: number,
    layer: number,
    head: number,
    sequence: number,
  ): Float32Array<ArrayBuffer> {
    const { kept } = this.stats(sequence, layer, head);
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
    const parts = this.#partsOf(layer), { kvHeads } = this.#shape;
    if (!Number.isInteger(head) || head < 0 || head >= kvHeads) {
      throw new RangeError(
        `The KV head must be between 0 and ${
          kvHeads - 1
        }: current value is ${head}`,
      );
    }
    const part = parts.findLast((part) => part.head <= head)!;
    this.#backend.call(
      "wkv_cache_read",
      part.group.handle,
      what,
      part.index,
      sequence,
      head - part.head,
      out,
      out.byteLength,
    );
  }
}
