/**
 * The cache step in f64 on plain lists, written from its description alone: the
 * oracle of the self-test and of the tests of the cache.
 */

/** One cached token of one KV head. */
export interface Token {
  /** Its place in the text. */
  position: number;
  /** Its key `[D]`, rotated only when positions are the text's. */
  key: Float64Array;
  /** Its stored value `[D]`. */
  value: Float64Array;
  /** a: the sum of the attention weights that it received. */
  score: number;
  /** n: the steps that attended to it. */
  steps: number;
  /** Values that were merged into its own since it came or was loaded. */
  merges: number;
}

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
  /** Which token leaves. */
  select:
    | "none"
    | "oldest"
    | "lowest-average"
    | "merge-cost"
    | "merge-cost-linear";
  /** What happens to its value. */
  merge: "none" | "right";
  /** Where keys are rotated. */
  positions: "cache" | "text";
  /** How stored numbers are rounded. */
  cacheType: "f32" | "f16" | "bf16";
  /** Which dimensions turn together. */
  pairs: "half" | "interleaved";
  /** The angle of each pair for one position. */
  frequencies: ArrayLike<number>;
}

/**
 * Picks the rank that leaves. `costs` holds what each rank costs, Infinity for
 * those that must stay.
 */
export type Choose = (
  costs: readonly number[],
  tokens: readonly Token[],
  head: number,
) => number;

/** The lowest rank of the lowest cost. */
export const cheapest: Choose = (costs) => {
  let best = 0;
  costs.forEach((cost, rank) => {
    if (cost < costs[best]!) best = rank;
  });
  return best;
};

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
          score: score[rank]!,
          steps: steps[rank]!,
          merges: 0,
        };
      });
    });
  }

  /** One decode step: `qkv` `[(H + 2 N) D]` in, the output `[H D]` out. */
  step(qkv: ArrayLike<number>, choose: Choose = cheapest): Float64Array {
    return this.prefill(qkv, 1, choose);
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
  ): Float64Array {
    const { heads, kvHeads, headDim } = this.#options;
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
            logits[rank] = dot(query, keys[rank]!) / Math.sqrt(headDim);
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
        receive(tokens, mean);
      }
      this.#shrink(tokens, head, choose);
    });
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
  ): void {
    const { kvHeads, headDim } = this.#options;
    this.heads.forEach((tokens, head) => {
      tokens.push(this.#token(
        slice(kv, head * headDim, headDim),
        slice(kv, (kvHeads + head) * headDim, headDim),
        this.seen,
      ));
      receive(tokens, weights[head]!);
      this.#shrink(tokens, head, choose);
    });
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
      score: 0,
      steps: 0,
      merges: 0,
    };
  }

  #shrink(tokens: Token[], head: number, choose: Choose): void {
    const { slots, select, merge, cacheType } = this.#options;
    while (tokens.length > slots) {
      if (select === "none") throw new RangeError("The cache is full");
      const victim = choose(this.#costs(tokens), tokens, head);
      const leaving = tokens[victim]!;
      const right = tokens[victim + 1];
      if (merge === "right" && right !== undefined) {
        const a = average(leaving), b = average(right);
        if (a + b > 0) {
          right.value = right.value.map((x, d) =>
            stored((a * leaving.value[d]! + b * x) / (a + b), cacheType)
          );
        }
        right.merges += leaving.merges + 1;
        if (head === 0) this.merged++;
      } else if (head === 0) this.evicted++;
      tokens.splice(victim, 1);
    }
  }

  #costs(tokens: readonly Token[]): number[] {
    const { select, sinks, recent } = this.#options;
    return tokens.map((token, rank) => {
      if (rank < sinks || rank >= tokens.length - recent) return Infinity;
      if (select === "oldest") return rank;
      const a = average(token);
      if (select === "lowest-average") return a;
      const right = tokens[rank + 1];
      // The newest has none to be merged with: it leaves when it alone may.
      if (right === undefined) return Number.MAX_VALUE;
      const b = average(right);
      if (a + b === 0) return 0;
      let gap = 0;
      token.value.forEach((x, d) => gap += (x - right.value[d]!) ** 2);
      return a * b / (a + b) *
        (select === "merge-cost" ? gap : Math.sqrt(gap));
    });
  }
}

/** a / n of a token. */
export function average({ score, steps }: Token): number {
  return score / steps;
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

/** A number as a cache of this type holds it, rounded to nearest, ties to even. */
export function stored(x: number, type: "f32" | "f16" | "bf16"): number {
  if (type === "f32") return Math.fround(x);
  const [digits, lowest] = type === "f16" ? [10, -14] : [7, -126];
  if (x === 0 || !Number.isFinite(x)) return x;
  let exponent = Math.floor(Math.log2(Math.abs(x)));
  if (2 ** exponent > Math.abs(x)) exponent--;
  const unit = 2 ** (Math.max(exponent, lowest) - digits);
  const low = Math.floor(x / unit);
  const rest = x / unit - low;
  const up = rest > 0.5 || (rest === 0.5 && low % 2 !== 0);
  return (low + (up ? 1 : 0)) * unit;
}

function receive(tokens: Token[], weights: ArrayLike<number>): void {
  for (let rank = 0; rank < weights.length; rank++) {
    tokens[rank]!.score += weights[rank]!;
    tokens[rank]!.steps++;
  }
}

function dot(a: Float64Array, b: Float64Array): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i]! * b[i]!;
  return sum;
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
