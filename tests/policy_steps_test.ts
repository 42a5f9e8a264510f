/** Every policy on the native library against the f64 list implementation, over random steps. */

import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertLessOrEqual,
} from "@std/assert";
import type { Backend } from "../src/backend/backend.ts";
import { Tensor } from "../src/backend/tensor.ts";
import { mergesRight } from "../src/cache/policy.ts";
import type { CacheEvent, KvCache } from "../src/cache/cache.ts";
import type { CacheOptions } from "../src/cache/layout.ts";
import { policyNames } from "../src/cache/registry.ts";
import {
  type Layer,
  openCache,
  openReference,
  qkvWidth,
} from "../src/selftest/layer.ts";
import {
  largestError,
  Random,
  relativeError,
} from "../src/selftest/numbers.ts";
import { type ReferenceCache, softmax } from "../src/selftest/reference.ts";
import {
  cheapest,
  type Choose,
  type Merging,
  type Token,
} from "../src/selftest/reference_policies.ts";
import { afterAll, beforeAll, describe, it, openBackend } from "./device.ts";

let backend: Backend;
beforeAll(async () => {
  backend = await openBackend();
});
afterAll(() => backend?.close());

/**
 * Limits of each cache type, for logits of deviation 1; values of 16 bits may be
 * rounded to the other side, by one unit in the last place.
 */
const limits = {
  f32: { out: 1e-5, score: 1e-5, value: 1e-5 },
  f16: { out: 1e-3, score: 1e-3, value: 2 ** -10 },
  bf16: { out: 5e-3, score: 5e-3, value: 2 ** -7 },
};

interface Run extends CacheOptions {
  policy: string;
  layer: Layer;
  steps: number;
  /** Empties the caches each so many steps. */
  reset?: number;
  /** The deviations of the logits, one after the other in blocks of 50 steps. */
  sharpness: number[];
}

/**
 * Steps three caches side by side on the same input: one that chooses freely,
 * one that is forced to the same choice, and the reference. Every other block
 * of 50 steps gives weights from elsewhere. Where free choice and reference
 * differ, both must be equal to the reference within the tolerance, and all
 * three go on with the free one, so that a near-tie forks nothing. Gives how
 * often they differed.
 */
function compare(
  { layer, steps, reset = Infinity, sharpness, ...options }: Run,
): number {
  using free = openCache(backend, layer, options);
  using forced = openCache(backend, layer, options);
  const { sequences, capacity, policy } = free;
  const fresh = () =>
    Array.from({ length: sequences }, (_, b) => openReference(layer, free, b));
  let references = fresh();
  const { heads, kvHeads, headDim } = layer;
  const width = qkvWidth(layer), kvWidth = 2 * kvHeads * headDim;
  const outWidth = heads * headDim;
  using qkv = new Tensor(backend, "F32", sequences, width);
  using kv = new Tensor(backend, "F32", sequences, kvWidth);
  using weights = new Tensor(
    backend,
    "F32",
    sequences,
    kvHeads * (capacity + 1),
  );
  using outFree = new Tensor(backend, "F32", sequences, outWidth);
  using outForced = new Tensor(backend, "F32", sequences, outWidth);
  using victims = new Tensor(backend, "I32", sequences, kvHeads);
  const { budget } = free;
  // A forced rank names one token, so several at once cannot be forced.
  const single = free.interval === 1;
  const random = new Random(steps + capacity);
  const slots = new Map<string, number>();
  let differed = 0;
  for (let all = 0; all < steps; all++) {
    const step = all % reset;
    if (step === 0 && all > 0) {
      free.reset();
      forced.reset();
      references = fresh();
      slots.clear();
    }
    const block = Math.floor(all / 50);
    const sharp = sharpness[block % sharpness.length]!;
    const tolerance = scaled(limits[free.cacheType], Math.max(1, sharp));
    const at = `${options.policy}, step ${all}`;
    const held = references.map(({ heads }) => heads[0]!.length);
    const overflows = budget !== null && held[0] === budget;
    const checked = all % 16 < 2 || all + 1 === steps;
    const before = checked
      ? references.map((_, b) => scoreSums(free, kvHeads, b))
      : [];

    const given = block % 2 === 1;
    const input = random.qkv(layer, sequences, sharp);
    const tokens = references.map((_, b) =>
      input.subarray((b + 1) * width - kvWidth, (b + 1) * width)
    );
    const shares = references.map((_, b) =>
      Array.from(
        { length: kvHeads },
        () => Float32Array.from(softmax(random.normals(held[b]! + 1, sharp))),
      )
    );
    if (given) {
      const rows = new Float32Array(sequences * kvHeads * (capacity + 1));
      shares.flat().forEach((row, i) => rows.set(row, i * (capacity + 1)));
      kv.write(Float32Array.from(tokens.flatMap((row) => [...row])));
      weights.write(rows);
      free.insert(0, kv, weights);
    } else {
      qkv.write(input);
      free.attend(0, outFree, qkv);
    }

    const actual = outFree.floats();
    const ranks = new Int32Array(sequences * kvHeads).fill(-1);
    references.forEach((reference, b) => {
      const leaving = new Leaving(
        reference,
        free,
        overflows,
        single,
        b,
        tolerance.score,
        at,
      );
      const choose: Choose = (costs, tokens, head) =>
        ranks[b * kvHeads + head] = leaving.choose(costs, tokens, head);
      if (given) reference.insert(tokens[b]!, shares[b]!, choose, leaving);
      else {
        const out = reference.step(
          input.subarray(b * width, (b + 1) * width),
          choose,
          leaving,
        );
        const error = relativeError(
          actual.subarray(b * outWidth, (b + 1) * outWidth),
          out,
        );
        assertLessOrEqual(error, tolerance.out, `${at}: output`);
      }
      leaving.done();
      differed += leaving.differed;
      if (!checked) return;
      checkState(free, reference, b, tolerance, at);
      if (policy.select !== "lowest-average-literal") {
        // Increments of all tokens, those that left included, sum to 1.
        scoreSums(free, kvHeads, b).forEach((sum, head) =>
          assertAlmostEquals(
            sum + leaving.left[head]! - before[b]![head]!,
            1,
            1e-5 + 1e-6 * sum,
            `${at}: sum of the increments`,
          )
        );
      }
      for (let head = 0; head < kvHeads; head++) {
        const own = free.slots(0, head, b);
        assertEquals(
          [...own].sort((a, b) => a - b),
          [...own.keys()],
          `${at}: the first slots are used`,
        );
        own.forEach((slot, rank) => {
          const { position } = reference.heads[head]![rank]!;
          const key = `${b} ${head} ${position}`;
          // Where several leave at once, others move down into their slots.
          const before = slots.get(key) ?? slot;
          if (single) assertEquals(before, slot, `${at}: a slot moved`);
          else assertLessOrEqual(slot, before, `${at}: a slot moved up`);
          slots.set(key, slot);
        });
      }
    });

    if (!single) continue;
    victims.write(ranks);
    if (given) forced.insert(0, kv, weights, victims);
    else {
      forced.attend(0, outForced, qkv, victims);
      assertEquals(outForced.floats(), actual, at);
    }
    if (all % 64 === 0 || all + 1 === steps) {
      for (let b = 0; b < sequences; b++) {
        for (let head = 0; head < kvHeads; head++) {
          assertEquals(forced.rows(0, head, b), free.rows(0, head, b), at);
          assertEquals(forced.values(0, head, b), free.values(0, head, b), at);
          assertEquals(forced.keys(0, head, b), free.keys(0, head, b), at);
        }
      }
    }
  }
  return differed;
}

/** Leads the reference where the library went in a step, as far as that is right. */
class Leaving implements Merging {
  /** Choices that were not the reference's own. */
  differed = 0;
  /** a of what left, of each head. */
  readonly left: number[];
  readonly #reference: ReferenceCache;
  readonly #cache: KvCache;
  readonly #events: CacheEvent[];
  readonly #gone: (number[] | undefined)[] = [];
  readonly #merged = new Map<number, boolean>();
  readonly #single: boolean;
  readonly #sequence: number;
  readonly #tolerance: number;
  readonly #at: string;

  constructor(
    reference: ReferenceCache,
    cache: KvCache,
    overflows: boolean,
    single: boolean,
    sequence: number,
    tolerance: number,
    at: string,
  ) {
    this.#reference = reference;
    this.#cache = cache;
    this.#single = single;
    this.#sequence = sequence;
    this.#tolerance = tolerance;
    this.#at = at;
    this.left = reference.heads.map(() => 0);
    this.#events = overflows && single ? cache.events(sequence) : [];
  }

  /** The cheapest of the tokens that left, which must be as cheap as any. */
  choose(
    costs: readonly number[],
    tokens: readonly Token[],
    head: number,
  ): number {
    const gone = this.#gone[head] ??= this.#positionsGone(tokens, head);
    const rank = gone.map((position) =>
      tokens.findIndex((token) => token.position === position)
    ).filter((rank) => rank >= 0).sort((a, b) => a - b).reduce(
      (best, rank) => best < 0 || costs[rank]! < costs[best]! ? rank : best,
      -1,
    );
    assert(rank >= 0, `${this.#at}: head ${head} let no token leave`);
    const own = cheapest(costs, tokens, head);
    if (rank !== own) {
      this.differed++;
      this.#assertNear(costs, rank, own, tokens, `head ${head} victim`);
    }
    const token = tokens[rank]!;
    this.left[head]! += token.score;
    if (this.#single) {
      assertAlmostEquals(
        this.#events[head]!.weights[0],
        this.#reference.weigh(token),
        this.#tolerance * Math.max(1, this.#reference.weigh(token)),
        this.#at,
      );
      this.#checkNeighbour(tokens, rank, head);
    }
    return rank;
  }

  nearest: Choose = (costs, tokens, head) => {
    const own = cheapest(costs, tokens, head);
    const into = this.#events[head]?.into ?? null;
    if (into === null) return own;
    const rank = tokens.findIndex(({ position }) => position === into);
    if (rank !== own) {
      this.differed++;
      this.#assertNear(costs, rank, own, tokens, `head ${head} nearest`);
    }
    return rank;
  };

  merges = (wanted: boolean, margin: number, head: number): boolean => {
    if (!this.#single) return wanted;
    const merged = this.#events[head]!.into !== null;
    this.#merged.set(head, merged);
    if (merged !== wanted) {
      this.differed++;
      assertLessOrEqual(
        margin,
        this.#tolerance,
        `${this.#at}: head ${head} ${merged ? "merged" : "dropped"}`,
      );
    }
    return merged;
  };

  /** Everything that left was met. */
  done(): void {
    this.#gone.forEach((positions, head) => {
      const stays = this.#reference.heads[head]!.map(({ position }) =>
        position
      );
      assertEquals(
        positions!.filter((position) => stays.includes(position)),
        [],
        `${this.#at}: head ${head} let more tokens leave`,
      );
    });
  }

  #positionsGone(tokens: readonly Token[], head: number): number[] {
    if (this.#single) return [this.#events[head]!.from];
    const { kept } = this.#cache.rows(0, head, this.#sequence);
    return tokens.map(({ position }) => position).filter((position) =>
      !kept.includes(position)
    );
  }

  #checkNeighbour(tokens: readonly Token[], rank: number, head: number): void {
    const { into } = this.#events[head]!;
    const right = tokens[rank + 1]?.position ?? null;
    const { merge } = this.#cache.policy;
    if (merge === "none") assertEquals(into, null, this.#at);
    if (mergesRight({ merge })) assertEquals(into, right, this.#at);
    if (merge === "spread" && into !== null) {
      assertEquals(into, right, this.#at);
    }
  }

  #assertNear(
    costs: readonly number[],
    rank: number,
    own: number,
    tokens: readonly Token[],
    what: string,
  ): void {
    const a = costs[rank]!, b = costs[own]!;
    const near = this.#cache.policy.select === "least-often"
      // A share that is even to the last digits may count or not.
      ? this.#unsure(tokens[rank]!) + this.#unsure(tokens[own]!)
      : this.#tolerance * Math.max(Math.abs(a), Math.abs(b)) + 1e-12;
    assert(
      a - b <= near,
      `${this.#at}: ${what} rank ${rank} at ${a}, not rank ${own} at ${b}`,
    );
  }

  #unsure({ history }: Token): number {
    return history.filter(({ weight, tokens }) =>
      Math.abs(weight * tokens - 1) <= this.#tolerance
    ).length;
  }
}

function scoreSums(
  cache: KvCache,
  kvHeads: number,
  sequence: number,
): number[] {
  return Array.from(
    { length: kvHeads },
    (_, head) => cache.rows(0, head, sequence).score.reduce((a, b) => a + b, 0),
  );
}

function checkState(
  cache: KvCache,
  reference: ReferenceCache,
  sequence: number,
  tolerance: { score: number; value: number },
  at: string,
): void {
  const { seen, merged, evicted } = reference;
  const { merge } = cache.policy;
  // A value that takes in many others may be rounded to the other side in some.
  const roundings = merge === "none" || mergesRight({ merge }) ? 1 : 4;
  const keysMerge = merge === "nearest" || merge === "nearest-votes";
  reference.heads.forEach((tokens, head) => {
    const rows = cache.rows(0, head, sequence);
    assertEquals(rows.kept, tokens.map((token) => token.position), at);
    assertEquals(rows.steps, tokens.map((token) => token.steps), at);
    assertEquals(rows.steps, rows.kept.map((p) => seen - p), at);
    assertLessOrEqual(
      relativeError(rows.score, tokens.map((token) => token.score)),
      tolerance.score,
      `${at}: scores`,
    );
    const values = cache.values(0, head, sequence);
    const keys = cache.keys(0, head, sequence);
    const width = values.length / tokens.length;
    tokens.forEach(({ value, key, merges }, rank) => {
      const part = (all: Float32Array) =>
        all.subarray(rank * width, (rank + 1) * width);
      assertLessOrEqual(
        largestError(part(values), value),
        tolerance.value * roundings * largest(value),
        `${at}: value of rank ${rank}`,
      );
      const exact = cache.positions === "cache" && !(keysMerge && merges > 0);
      assertLessOrEqual(
        largestError(part(keys), key),
        exact ? 0 : tolerance.value * roundings * Math.max(4, largest(key)),
        `${at}: key of rank ${rank}`,
      );
    });
  });
  const kept = reference.heads[0]!.length;
  assertEquals(seen, kept + merged + evicted, at);
  assertEquals(cache.stats(sequence), { seen, kept, merged, evicted }, at);
}

function largest(x: Float64Array): number {
  return x.reduce((most, y) => Math.max(most, Math.abs(y)), 0);
}

function scaled(
  { out, score, value }: typeof limits.f32,
  by: number,
): typeof limits.f32 {
  return { out: out * by, score: score * by, value: value * by };
}

const square: Layer = { heads: 4, kvHeads: 2, headDim: 4 };
const wide: Layer = { heads: 9, kvHeads: 3, headDim: 64 };

describe("every policy against the f64 list implementation", () => {
  for (const policy of policyNames()) {
    it(`${policy} over 10,000 random steps`, () => {
      const differed = compare({
        policy,
        layer: square,
        steps: 10_000,
        sharpness: [1, 1, 0.2, 0.2, 5, 5],
        ...policy === "full" ? { capacity: 64, reset: 64 } : { budget: 16 },
      });
      // Of 20,000 choices 0.2 are expected to lie within 1e-5, of costs spread evenly.
      assertLessOrEqual(differed, 3);
    });
  }

  const settings: Record<string, Partial<Run>> = {
    "no sinks": { sinks: 0 },
    "nothing protected": { sinks: 0, recent: 0 },
    "only the new token recent": { sinks: 2, recent: 1 },
    "all but one protected": { sinks: 5, recent: 7 },
    "sinks alone": { budget: 4, sinks: 4, recent: 0 },
    "a budget of 1": { budget: 1, sinks: 0, recent: 0 },
    "a budget of 1, the new token": { budget: 1, sinks: 0, recent: 1 },
    "a budget of 1, the first token": { budget: 1, sinks: 1, recent: 0 },
    "a budget of 2": { budget: 2, sinks: 1, recent: 1 },
    "a budget of 2, nothing protected": { budget: 2, sinks: 0, recent: 0 },
    "a budget of 65": { budget: 65, layer: wide, steps: 110 },
    "positions of the text": { positions: "text", steps: 2000 },
    "f16": { cacheType: "f16", steps: 500 },
    "f16 at positions of the text": { cacheType: "f16", positions: "text" },
    "bf16": { cacheType: "bf16", steps: 500 },
    "bf16 at positions of the text": { cacheType: "bf16", positions: "text" },
    "2 sequences": { sequences: 2 },
    "3 sequences in f16": { sequences: 3, cacheType: "f16", budget: 11 },
    "1 head of 2 dimensions": {
      layer: { heads: 1, kvHeads: 1, headDim: 2 },
    },
    "pairs of halves": { layer: { ...square, pairs: "half" } },
    "9 query heads on 3 of 64": { layer: wide, steps: 90 },
    "12 of 20 dimensions rotated": {
      layer: { heads: 6, kvHeads: 1, headDim: 20, rotary: 12 },
    },
    "8 heads of 96 in halves": {
      layer: { heads: 8, kvHeads: 8, headDim: 96, pairs: "half" },
      steps: 40,
    },
    "64 of 128 dimensions rotated in halves": {
      layer: { heads: 4, kvHeads: 2, headDim: 128, rotary: 64, pairs: "half" },
      steps: 60,
    },
    "80 dimensions at positions of the text": {
      layer: { heads: 5, kvHeads: 1, headDim: 80, pairs: "half" },
      positions: "text",
      steps: 90,
    },
  };
  for (const [name, setting] of Object.entries(settings)) {
    it(`with ${name}`, () => {
      for (const policy of policyNames()) {
        const run: Run = {
          policy,
          layer: square,
          steps: 200,
          sharpness: [1, 1, 5, 5, 0.2, 0.2],
          budget: 12,
          ...setting,
        };
        if (policy === "full") {
          Object.assign(run, { capacity: 40, reset: 40 });
          run.steps = Math.min(run.steps, 100);
        }
        compare(run);
      }
    });
  }
});
