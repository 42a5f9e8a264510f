/**
 * What each policy weighs and does, in f64 on plain lists, written from
 * docs/policies.md alone; reference.ts runs the step around it.
 */

import type { CacheType } from "../cache/layout.ts";
import type { Merge, Select } from "../cache/policy.ts";

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
  /** p: the weight that it received in this step. */
  weight: number;
  /** The last steps, the newest at the end, for policies that look back. */
  history: Past[];
  /** The tokens that its key and value stand for, in keepkv. */
  votes: number;
  /** Values that were merged into its own since it came or was loaded. */
  merges: number;
}

/** What one step gave a token. */
export interface Past {
  /** p: its weight. */
  weight: number;
  /** t: the tokens that shared the attention. */
  tokens: number;
}

/** What a choice is made from. */
export interface Situation {
  /** The head's tokens in rank order. */
  tokens: readonly Token[];
  /** Every KV head's tokens, for choices of the layer. */
  heads: readonly (readonly Token[])[];
  /** o of the step: the mean output of the head's group. */
  output: ArrayLike<number>;
  /** Newest tokens that never leave. */
  recent: number;
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

/** What a merge decides, so that a test can follow another cache at a near-tie. */
export interface Merging {
  /** Picks the nearest token; costs are cosines with the sign turned. */
  nearest: Choose;
  /** Whether to merge; `margin` is how far the numbers are from saying otherwise. */
  merges: (wanted: boolean, margin: number, head: number) => boolean;
}

/** Decides by the numbers alone. */
export const byNumbers: Merging = {
  nearest: cheapest,
  merges: (wanted) => wanted,
};

/** The steps that a selection looks back on. */
export const lookback: Partial<Record<Select, number>> = {
  "least-often": 400,
  "window": 32,
};

/** What each rank costs; the lowest leaves. */
export const valuesOf: Record<
  Exclude<Select, "none">,
  (situation: Situation) => number[]
> = {
  "oldest": ({ tokens }) => tokens.map((_, rank) => rank),
  "lowest-average": ({ tokens }) => tokens.map(average),
  // In the step that overflows the sums are divided already.
  "lowest-average-literal": ({ tokens }) => tokens.map(({ score }) => score),
  "merge-cost": ({ tokens }) => mergeCosts(tokens, (squares) => squares),
  "merge-cost-linear": ({ tokens }) => mergeCosts(tokens, Math.sqrt),
  "lowest-sum": ({ tokens }) => tokens.map(({ score }) => score),
  "lowest-now": ({ tokens, heads }) =>
    tokens.map((_, rank) =>
      heads.reduce((sum, head) => sum + head[rank]!.weight, 0) / heads.length
    ),
  "least-often": ({ tokens }) =>
    tokens.map(({ history }) =>
      history.filter(({ weight, tokens }) => weight > 1 / tokens).length
    ),
  "key-norm": ({ tokens }) => tokens.map(({ key }) => -dot(key, key)),
  "key-likeness": ({ tokens }) => {
    const units = tokens.map(({ key }) => key.map((x) => x / length(key)));
    const sum = units[0]!.map((_, d) =>
      units.reduce((total, unit) => total + unit[d]!, 0)
    );
    return units.map((unit) => -dot(unit, sum));
  },
  "window": ({ tokens, recent }) => {
    const pooled = tokens.slice(0, tokens.length - recent).map(({ history }) =>
      history.reduce((sum, { weight }) => sum + weight, 0) / 32
    );
    return tokens.map((_, rank) => {
      let sum = 0;
      for (let i = rank - 2; i <= rank + 2; i++) sum += pooled[i] ?? 0;
      return sum / 5;
    });
  },
  "sum-value-norm": ({ tokens }) =>
    tokens.map(({ score, value }) =>
      score * value.reduce((sum, x) => sum + Math.abs(x), 0)
    ),
  "output-error": ({ tokens, output }) =>
    tokens.map(({ weight, value }) =>
      // Near 1 the difference is lost in rounding; such a token must not leave.
      1 - weight < 2 ** -16
        ? Number.MAX_VALUE
        : weight / (1 - weight) * Math.sqrt(distance(value, output))
    ),
};

function mergeCosts(
  tokens: readonly Token[],
  measure: (squares: number) => number,
): number[] {
  return tokens.map((token, rank) => {
    const right = tokens[rank + 1];
    // The newest has none to be merged with: it leaves when it alone may.
    if (right === undefined) return Number.MAX_VALUE;
    const a = average(token), b = average(right);
    if (a + b === 0) return 0;
    return a * b / (a + b) * measure(distance(token.value, right.value));
  });
}

/** A token that leaves, before it is taken out. */
export interface Leaving {
  /** The head's tokens, the leaving one among them. */
  tokens: readonly Token[];
  /** Its rank. */
  victim: number;
  /** The KV head. */
  head: number;
  /** What a token weighs in a merge. */
  weigh: (token: Token) => number;
  /** How merged numbers are rounded. */
  cacheType: CacheType;
  /** A number in [0, 1), for merges by chance. */
  draw: number;
  /** d2o's threshold of each KV head, unset until a token has left. */
  thresholds: (number | undefined)[];
  /** How the merge decides. */
  merging: Merging;
}

/** Merges the leaving value into the next one, `part` of its weight counted. */
function mergeRight(leaving: Leaving, part: number): boolean {
  const { tokens, victim, weigh } = leaving;
  const right = tokens[victim + 1];
  if (right === undefined) return false;
  const weight = part * weigh(tokens[victim]!);
  blend(leaving, right, ["value"], weight, weigh(right));
  return true;
}

/** Merges the leaving token into others; false when it is dropped. */
export const mergeInto: Record<Merge, (leaving: Leaving) => boolean> = {
  "none": () => false,
  "right": (leaving) => mergeRight(leaving, 1),
  "right-light": (leaving) => mergeRight(leaving, 1 / 4),
  "spread": ({ tokens, victim, head, cacheType, draw, merging }) => {
    const token = tokens[victim]!;
    const targets = tokens.slice(victim + 1, victim + 17);
    if (targets.length === 0) return false;
    const mean = targets.reduce((sum, { score }) => sum + score, 0) /
      targets.length;
    const chance = token.score === 0 ? 0 : Math.min(1, token.score / mean);
    const margin = Math.abs(draw - chance);
    if (!merging.merges(draw < chance, margin, head)) return false;
    for (const target of targets) {
      target.value = target.value.map((x, d) =>
        stored(x + token.value[d]! / 16, cacheType)
      );
      target.merges++;
    }
    return true;
  },
  "nearest": (leaving) => {
    const { victim, tokens, head, thresholds, merging } = leaving;
    const [near, cosine] = nearest(leaving);
    const before = thresholds[head];
    thresholds[head] = before === undefined ? cosine : (before + cosine) / 2;
    const limit = before ?? cosine;
    const margin = Math.abs(cosine - limit);
    if (!merging.merges(cosine >= limit, margin, head)) return false;
    // (r + cosine j) / 2, which is no mean of both.
    const token = tokens[victim]!;
    for (const part of ["key", "value"] as const) {
      near[part] = near[part].map((x, d) =>
        stored((x + cosine * token[part][d]!) / 2, leaving.cacheType)
      );
    }
    near.merges += token.merges + 1;
    return true;
  },
  "nearest-votes": (leaving) => {
    const { victim, tokens, head, weigh, merging } = leaving;
    const [near, cosine] = nearest(leaving);
    const margin = Math.abs(cosine - 0.8);
    if (!merging.merges(cosine >= 0.8, margin, head)) return false;
    const token = tokens[victim]!;
    blend(
      leaving,
      near,
      ["key", "value"],
      token.votes * weigh(token),
      near.votes * weigh(near),
    );
    near.votes += token.votes;
    return true;
  },
};

/** The mean of the leaving token and `into`, weighted with a and b. */
function blend(
  { tokens, victim, cacheType }: Leaving,
  into: Token,
  parts: readonly ("key" | "value")[],
  a: number,
  b: number,
): void {
  const token = tokens[victim]!;
  if (a + b > 0) {
    for (const part of parts) {
      into[part] = into[part].map((x, d) =>
        stored((a * token[part][d]! + b * x) / (a + b), cacheType)
      );
    }
  }
  into.merges += token.merges + 1;
}

function nearest(
  { tokens, victim, head, merging }: Leaving,
): [token: Token, cosine: number] {
  const { key } = tokens[victim]!;
  const costs = tokens.map((token, rank) =>
    rank === victim
      ? Infinity
      : -dot(key, token.key) / (length(key) * length(token.key))
  );
  const rank = merging.nearest(costs, tokens, head);
  return [tokens[rank]!, -costs[rank]!];
}

/** A number in [0, 1) that these words give, the same everywhere. */
export function draw(words: readonly number[]): number {
  let h = 0;
  for (const word of words) {
    h = (h ^ word) + 0x9e3779b9 | 0;
    h ^= h >>> 16;
    h = Math.imul(h, 0x85ebca6b);
    h ^= h >>> 13;
    h = Math.imul(h, 0xc2b2ae35);
    h ^= h >>> 16;
  }
  return (h >>> 8) / 2 ** 24;
}

/** a / n of a token. */
export function average({ score, steps }: Token): number {
  return score / steps;
}

/** A number as a cache of this type holds it, rounded to nearest, ties to even. */
export function stored(x: number, type: CacheType): number {
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

/** The sum of the products. */
export function dot(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i]! * b[i]!;
  return sum;
}

function distance(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += (a[i]! - b[i]!) ** 2;
  return sum;
}

function length(x: Float64Array): number {
  return Math.max(Math.sqrt(dot(x, x)), 1e-12);
}
