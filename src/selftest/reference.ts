/**
 * The cache step in f64 on plain lists, written from its description alone
 * (docs/policies.md): the oracle of the self-test and of the tests of the cache.
 * What each policy weighs and does is in reference_policies.ts.
 */

import type { CacheType, Positions } from "../cache/layout.ts";
import type { Merge, Select } from "../cache/policy.ts";
import {
  average,
  byNumbers,
  cheapest,
  type Choose,
  dot,
  draw,
  lookback,
  mergeInto,
  type Merging,
  stored,
  type Token,
  valuesOf,
} from "./reference_policies.ts";

/** What one KV head holds, in rank order. */
export interface HeadState {
  /** Places in the text. */
  kept: ArrayLike<number>;
  /** n of each token. */
  steps: ArrayLike<number>;
  /** a of each token. */
  score: ArrayLike<number>;
  /** Keys as stored, `[kept, D]`. */
  keys: ArrayLike<number>;
  /** Values as stored, `[kept, D]`. */
  values: ArrayLike<number>;
}

/** What a reference cache is made of. */
export interface ReferenceOptions {
  /** Query heads. */
  heads: number;
  /** Key and value heads. */
  kvHeads: number;
  /** Dimensions of a head. */
  headDim: number;
  /** m: tokens kept a KV head. */
  slots: number;
  /** First tokens that never leave. */
  sinks: number;
  /** Newest tokens that never leave, the new one counted. */
  recent: number;
  /** Tokens that leave at once. */
  interval: number;
  /** Which token leaves. */
  select: Select;
  /** What happens to its value. */
  merge: Merge;
  /** Where keys are rotated. */
  positions: Positions;
  /** How stored numbers are rounded. */
  cacheType: CacheType;
  /** What makes the draws of merges by chance. @default `0` */
  seed?: number;
  /** The layer, for draws. @default `0` */
  layer?: number;
  /** The sequence, for draws. @default `0` */
  sequence?: number;
  /** Which dimensions turn together. */
  pairs: "half" | "interleaved";
  /** The angle of each pair for one position. */
  frequencies: ArrayLike<number>;
  /** Scores s become cap tanh(s / cap). @default none */
  scoreCap?: number | undefined;
  /** Ranks that a token looks back on, itself counted. @default all */
  window?: number | undefined;
}

/** One layer of one sequence. */
export class ReferenceCache {
  /** Tokens of each KV head, the oldest first. */
  readonly heads: Token[][];
  /** Tokens fed. */
  seen = 0;
  /** Tokens of one head whose value was merged into another's. */
  merged = 0;
  /** Tokens of one head that were dropped. */
  evicted = 0;
  readonly #options: ReferenceOptions;
  readonly #thresholds: (number | undefined)[] = [];
  readonly #turns = new Map<number, Float64Array>();

  /** An empty cache. */
  constructor(options: ReferenceOptions) {
    this.#options = options;
    this.heads = Array.from({ length: options.kvHeads }, () => []);
  }

  /** Takes over what another cache holds after `seen` tokens, head by head. */
  load(seen: number, heads: readonly HeadState[]): void {
    const { headDim } = this.#options;
    this.seen = seen;
    heads.forEach(({ kept, steps, score, keys, values }, head) => {
      this.heads[head] = Array.from(kept, (position, rank) => {
        const at = rank * headDim;
        return {
          position,
          key: slice(keys, at, headDim),
          value: slice(values, at, headDim),
          ...fresh(),
          score: score[rank]!,
          steps: steps[rank]!,
        };
      });
    });
  }

  /** One decode step: `qkv` `[(H + 2 N) D]` in, the output `[H D]` out. */
  step(
    qkv: ArrayLike<number>,
    choose: Choose = cheapest,
    merging: Merging = byNumbers,
  ): Float64Array {
    return this.prefill(qkv, 1, choose, merging);
  }

  /**
   * Several tokens at once: causal attention over cache and tokens, then one
   * token after the other leaves until the rest fits. `qkv` `[rows, (H + 2 N) D]`
   * in, `[rows, H D]` out.
   */
  prefill(
    qkv: ArrayLike<number>,
    rows: number,
    choose: Choose = cheapest,
    merging: Merging = byNumbers,
  ): Float64Array {
    const { heads, kvHeads, headDim, scoreCap, window } = this.#options;
    const width = (heads + 2 * kvHeads) * headDim;
    const group = heads / kvHeads;
    const out = new Float64Array(rows * heads * headDim);
    this.heads.forEach((tokens, head) => {
      const before = tokens.length;
      for (let row = 0; row < rows; row++) {
        tokens.push(this.#token(
          slice(qkv, row * width + (heads + head) * headDim, headDim),
          slice(qkv, row * width + (heads + kvHeads + head) * headDim, headDim),
          this.seen + row,
        ));
      }
      const inText = this.#options.positions === "text";
      const keys = tokens.map(({ key }, rank) =>
        inText ? key : this.#rotate(key, rank)
      );
      for (let row = 0; row < rows; row++) {
        const last = before + row;
        const mean = new Float64Array(last + 1);
        for (let g = 0; g < group; g++) {
          const h = head * group + g;
          const query = this.#rotate(
            slice(qkv, row * width + h * headDim, headDim),
            inText ? this.seen + row : last,
          );
          const logits = new Float64Array(last + 1);
          for (let rank = 0; rank <= last; rank++) {
            const score = dot(query, keys[rank]!) / Math.sqrt(headDim);
            logits[rank] = window !== undefined && rank <= last - window
              ? -Infinity
              : scoreCap === undefined
              ? score
              : scoreCap * Math.tanh(score / scoreCap);
          }
          const weights = softmax(logits);
          const sum = out.subarray((row * heads + h) * headDim);
          for (let rank = 0; rank <= last; rank++) {
            const p = weights[rank]!;
            mean[rank]! += p / group;
            const { value } = tokens[rank]!;
            for (let d = 0; d < headDim; d++) sum[d]! += p * value[d]!;
          }
        }
        this.#receive(tokens, mean);
      }
    });
    this.#shrink(choose, merging);
    this.seen += rows;
    return out;
  }

  /**
   * One step with attention weights from elsewhere: `kv` `[2 N D]`, and the
   * weights of each head in rank order, the new token's last.
   */
  insert(
    kv: ArrayLike<number>,
    weights: readonly ArrayLike<number>[],
    choose: Choose = cheapest,
    merging: Merging = byNumbers,
  ): void {
    const { kvHeads, headDim } = this.#options;
    this.heads.forEach((tokens, head) => {
      tokens.push(this.#token(
        slice(kv, head * headDim, headDim),
        slice(kv, (kvHeads + head) * headDim, headDim),
        this.seen,
      ));
      this.#receive(tokens, weights[head]!);
    });
    this.#shrink(choose, merging);
    this.seen++;
  }

  /** Rotates a vector of one head to a position. */
  #rotate(x: ArrayLike<number>, position: number): Float64Array {
    const { frequencies, pairs } = this.#options;
    const count = frequencies.length;
    let turn = this.#turns.get(position);
    if (turn === undefined) {
      turn = new Float64Array(2 * count);
      for (let i = 0; i < count; i++) {
        turn[2 * i] = Math.cos(position * frequencies[i]!);
        turn[2 * i + 1] = Math.sin(position * frequencies[i]!);
      }
      this.#turns.set(position, turn);
    }
    const out = Float64Array.from(x);
    for (let i = 0; i < count; i++) {
      const [a, b] = pairs === "half" ? [i, i + count] : [2 * i, 2 * i + 1];
      const cos = turn[2 * i]!, sin = turn[2 * i + 1]!;
      out[a] = x[a]! * cos - x[b]! * sin;
      out[b] = x[a]! * sin + x[b]! * cos;
    }
    return out;
  }

  #token(
    key: Float64Array,
    value: Float64Array,
    position: number,
  ): Token {
    const { positions, cacheType } = this.#options;
    const placed = positions === "text" ? this.#rotate(key, position) : key;
    return {
      position,
      key: placed.map((x) => stored(x, cacheType)),
      value: value.map((x) => stored(x, cacheType)),
      ...fresh(),
    };
  }

  #receive(tokens: readonly Token[], weights: ArrayLike<number>): void {
    const kept = lookback[this.#options.select] ?? 0;
    for (let rank = 0; rank < weights.length; rank++) {
      const token = tokens[rank]!, weight = weights[rank]!;
      token.weight = weight;
      token.score += weight;
      token.steps++;
      token.history.push({ weight, tokens: weights.length });
      if (token.history.length > kept) token.history.shift();
    }
  }

  /** Lets tokens leave one after another, in all heads side by side. */
  #shrink(choose: Choose, merging: Merging): void {
    const { heads, seen } = this;
    const { slots, recent, interval, select, merge } = this.#options;
    if (heads[0]!.length <= slots) return;
    if (select === "none") throw new RangeError("The cache is full");
    const outputs = heads.map(output);
    if (select === "lowest-average-literal") {
      for (const token of heads.flat()) token.score /= token.steps;
    }
    const { cacheType, seed = 0, layer = 0, sequence = 0 } = this.#options;
    for (let turn = 0; heads[0]!.length > slots + 1 - interval; turn++) {
      const costs = heads.map((tokens, head) =>
        this.#guard(
          valuesOf[select]({ tokens, heads, output: outputs[head]!, recent }),
        )
      );
      heads.forEach((tokens, head) => {
        const victim = choose(costs[head]!, tokens, head);
        const merged = mergeInto[merge]({
          tokens,
          victim,
          head,
          weigh: (token) => this.weigh(token),
          cacheType,
          draw: draw([seed, layer, sequence, head, seen, turn]),
          thresholds: this.#thresholds,
          merging,
        });
        if (head === 0) {
          if (merged) this.merged++;
          else this.evicted++;
        }
        tokens.splice(victim, 1);
      });
    }
  }

  /** What a token weighs in a merge: its average, however it is kept. */
  weigh(token: Token): number {
    return this.#options.select === "lowest-average-literal"
      ? token.score
      : average(token);
  }

  /** Infinity for the ranks that must stay. */
  #guard(costs: number[]): number[] {
    const { sinks, recent } = this.#options;
    return costs.map((cost, rank) =>
      rank < sinks || rank >= costs.length - recent ? Infinity : cost
    );
  }
}

/** The softmax of some logits. */
export function softmax(logits: ArrayLike<number>): Float64Array {
  const parts = Float64Array.from(logits);
  const highest = parts.reduce((a, b) => Math.max(a, b), -Infinity);
  let sum = 0;
  for (let i = 0; i < parts.length; i++) {
    sum += parts[i] = Math.exp(parts[i]! - highest);
  }
  return parts.map((x) => x / sum);
}

/** o: the mean output of a head's group in this step. */
function output(tokens: readonly Token[]): Float64Array {
  const sum = new Float64Array(tokens[0]!.value.length);
  for (const { weight, value } of tokens) {
    for (let d = 0; d < sum.length; d++) sum[d]! += weight * value[d]!;
  }
  return sum;
}

/** The state of a token that has not been attended to. */
function fresh(): Omit<Token, "position" | "key" | "value"> {
  return { score: 0, steps: 0, weight: 0, history: [], votes: 1, merges: 0 };
}

function slice(
  x: ArrayLike<number>,
  from: number,
  length: number,
): Float64Array {
  const out = new Float64Array(length);
  for (let i = 0; i < length; i++) out[i] = x[from + i]!;
  return out;
}
