/**
 * Every policy against the f64 list implementation over random steps, the
 * paper's worked example, and how budgets are resolved.
 */

import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertLessOrEqual,
  assertThrows,
} from "@std/assert";
import type { Backend } from "../src/backend/backend.ts";
import { WkvError } from "../src/backend/error.ts";
import { Tensor } from "../src/backend/tensor.ts";
import type { CacheOptions, KvCache } from "../src/cache/cache.ts";
import { resolveBudget } from "../src/cache/policy.ts";
import { findPolicy, policies, policyNames } from "../src/cache/registry.ts";
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
import type { ReferenceCache } from "../src/selftest/reference.ts";
import { average } from "../src/selftest/reference_policies.ts";
import { afterAll, beforeAll, describe, it, openBackend } from "./device.ts";

let backend: Backend;
beforeAll(async () => {
  backend = await openBackend();
});
afterAll(() => backend.close());

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
 * one that is forced to the reference's choice, and the reference. Where free
 * choice and reference differ, the free choice must cost at most twice the
 * tolerance more, and all three go on with it, so that a near-tie forks nothing.
 */
function compare(
  { layer, steps, reset = Infinity, sharpness, ...options }: Run,
): void {
  using free = openCache(backend, layer, options);
  using forced = openCache(backend, layer, options);
  const { sequences } = free;
  const fresh = () =>
    Array.from({ length: sequences }, () => openReference(layer, free));
  let references = fresh();
  const { heads, kvHeads, headDim } = layer;
  using qkv = new Tensor(backend, "F32", sequences, qkvWidth(layer));
  using outFree = new Tensor(backend, "F32", sequences, heads * headDim);
  using outForced = new Tensor(backend, "F32", sequences, heads * headDim);
  using victims = new Tensor(backend, "I32", sequences, kvHeads);
  const random = new Random(steps + free.capacity);
  const slots = new Map<string, number>();
  for (let all = 0; all < steps; all++) {
    const step = all % reset;
    if (step === 0 && all > 0) {
      free.reset();
      forced.reset();
      references = fresh();
      slots.clear();
    }
    const sharp = sharpness[Math.floor(all / 50) % sharpness.length]!;
    const tolerance = scaled(limits[free.cacheType], Math.max(1, sharp));
    const at = `${options.policy}, step ${all}`;
    const input = random.qkv(layer, sequences, sharp);
    qkv.write(input);
    const full = step >= free.capacity;
    const checked = all % 16 < 2 || all + 1 === steps;
    const before = checked
      ? references.map((_, b) => scoreSums(free, kvHeads, b))
      : [];
    free.attend(0, outFree, qkv);
    const actual = outFree.floats();
    const ranks = new Int32Array(sequences * kvHeads).fill(-1);
    references.forEach((reference, b) => {
      const events = full ? free.events(b) : [];
      const out = reference.step(
        input.subarray(b * qkvWidth(layer), (b + 1) * qkvWidth(layer)),
        (costs, tokens, head) => {
          const { from, into, weights } = events[head]!;
          const rank = tokens.findIndex(({ position }) => position === from);
          const least = Math.min(...costs);
          assert(
            costs[rank]! <= least * (1 + 2 * tolerance.score) + 1e-12,
            `${at}: head ${head} chose rank ${rank} at ${
              costs[rank]
            }, the least is ${least}`,
          );
          const right = tokens[rank + 1];
          const merges = free.policy.merge === "right" && right !== undefined;
          assertEquals(into, merges ? right.position : null, at);
          assertAlmostEquals(
            weights[0],
            average(tokens[rank]!),
            tolerance.score,
            at,
          );
          ranks[b * kvHeads + head] = rank;
          return rank;
        },
      );
      const error = relativeError(
        actual.subarray(b * heads * headDim, (b + 1) * heads * headDim),
        out,
      );
      assertLessOrEqual(error, tolerance.out, `${at}: output`);
      if (checked) {
        checkState(free, reference, b, tolerance, at);
        // Increments of all tokens, the one that left included, sum to 1.
        const after = scoreSums(free, kvHeads, b);
        for (let head = 0; head < kvHeads; head++) {
          const event = events[head];
          const left = event ? event.weights[0] * (step - event.from + 1) : 0;
          assertAlmostEquals(
            after[head]! + left - before[b]![head]!,
            1,
            1e-5 + 1e-6 * after[head]!,
            `${at}: sum of the increments`,
          );
          free.slots(0, head, b).forEach((slot, rank) => {
            const key = `${b} ${head} ${
              reference.heads[head]![rank]!.position
            }`;
            assertEquals(slots.get(key) ?? slot, slot, `${at}: a slot moved`);
            slots.set(key, slot);
          });
        }
      }
    });
    victims.write(ranks);
    forced.attend(0, outForced, qkv, victims);
    assertEquals(outForced.floats(), actual, at);
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
    tokens.forEach(({ value, key }, rank) => {
      const largest = value.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
      const from = rank * width;
      assertLessOrEqual(
        largestError(values.subarray(from, from + width), value),
        tolerance.value * largest,
        `${at}: value of rank ${rank}`,
      );
      assertLessOrEqual(
        largestError(keys.subarray(from, from + width), key),
        cache.positions === "cache" ? 0 : tolerance.value * 4,
        `${at}: key of rank ${rank}`,
      );
    });
  });
  const kept = reference.heads[0]!.length;
  assertEquals(seen, kept + merged + evicted, at);
  assertEquals(cache.stats(sequence), { seen, kept, merged, evicted }, at);
}

function scaled(
  { out, score, value }: typeof limits.f32,
  by: number,
): typeof limits.f32 {
  return { out: out * by, score: score * by, value: value * by };
}

const square: Layer = { heads: 4, kvHeads: 2, headDim: 8 };
const wide: Layer = { heads: 9, kvHeads: 3, headDim: 64 };

describe("every policy against the f64 list implementation", () => {
  for (const policy of policyNames()) {
    it(`${policy} over 10,000 random steps`, () => {
      compare({
        policy,
        layer: square,
        steps: 10_000,
        sharpness: [1, 0.2, 5],
        ...policy === "full" ? { capacity: 32, reset: 32 } : { budget: 16 },
      });
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
    "3 sequences in f16": { sequences: 3, cacheType: "f16", budget: 9 },
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
          sharpness: [1, 5, 0.2],
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

/**
 * Inserts tokens with the averages that they shall have afterwards; each
 * value is the unit vector of its token, so that it spells its own origins.
 */
class Story implements Disposable {
  readonly cache: KvCache;
  readonly #kv = new Tensor(backend, "F32", 1, 16);
  readonly #weights: Tensor;

  constructor(options: CacheOptions) {
    const layer: Layer = { heads: 1, kvHeads: 1, headDim: 8 };
    this.cache = openCache(backend, layer, options);
    this.#weights = new Tensor(backend, "F32", 1, this.cache.capacity + 1);
  }

  insert(averages: number[], victim?: number): void {
    const { score, steps } = this.cache.rows(0, 0);
    const { seen } = this.cache.stats();
    const kv = new Float32Array(16);
    kv[8 + seen % 8] = 1;
    this.#kv.write(kv);
    const weights = new Float32Array(this.cache.capacity + 1);
    averages.forEach((wanted, i) => {
      weights[i] = wanted * ((steps[i] ?? 0) + 1) - (score[i] ?? 0);
    });
    this.#weights.write(weights);
    if (victim === undefined) this.cache.insert(0, this.#kv, this.#weights);
    else {
      using victims = Tensor.from(backend, Int32Array.of(victim));
      this.cache.insert(0, this.#kv, this.#weights, victims);
    }
  }

  /** Each cached token as v1.. with the shares of the tokens in its value. */
  get shares(): Record<string, Record<string, number>> {
    const values = this.cache.values(0, 0);
    return Object.fromEntries(
      this.cache.rows(0, 0).kept.map((position, rank) => [
        `v${position + 1}`,
        Object.fromEntries(
          [...values.subarray(8 * rank, 8 * rank + 8)]
            .map((share, i): [string, number] => [`v${i + 1}`, share])
            .filter(([, share]) => share !== 0),
        ),
      ]),
    );
  }

  [Symbol.dispose](): void {
    this.cache.close();
    this.#kv.close();
    this.#weights.close();
  }
}

function assertShares(
  actual: Record<string, Record<string, number>>,
  expected: Record<string, Record<string, number>>,
): void {
  assertEquals(Object.keys(actual), Object.keys(expected));
  for (const [token, shares] of Object.entries(expected)) {
    assertEquals(Object.keys(actual[token]!), Object.keys(shares), token);
    for (const [from, share] of Object.entries(shares)) {
      assertAlmostEquals(
        actual[token]![from]!,
        share,
        1e-6,
        `${token}.${from}`,
      );
    }
  }
}

describe("select and merge", () => {
  const options: CacheOptions = {
    policy: "weighted-kv",
    budget: 4,
    sinks: 0,
    recent: 1,
  };

  it("follows the paper's Fig. 3 step by step", () => {
    using story = new Story(options);
    for (let i = 0; i < 4; i++) story.insert(Array(i + 1).fill(0.25));
    assertShares(story.shares, {
      v1: { v1: 1 },
      v2: { v2: 1 },
      v3: { v3: 1 },
      v4: { v4: 1 },
    });
    const steps: [
      averages: number[],
      event: [number, number, number, number],
      shares: Record<string, Record<string, number>>,
    ][] = [
      [[.3, .1, .5, .3, .5], [2, 3, .1, .5], {
        v1: { v1: 1 },
        v3: { v2: 1 / 6, v3: 5 / 6 },
        v4: { v4: 1 },
        v5: { v5: 1 },
      }],
      [[.3, .4, .2, .3, .9], [4, 5, .2, .3], {
        v1: { v1: 1 },
        v3: { v2: 1 / 6, v3: 5 / 6 },
        v5: { v4: .4, v5: .6 },
        v6: { v6: 1 },
      }],
      [[.3, .4, .2, .5, .7], [5, 6, .2, .5], {
        v1: { v1: 1 },
        v3: { v2: 1 / 6, v3: 5 / 6 },
        v6: { v4: .4 * 2 / 7, v5: .6 * 2 / 7, v6: 5 / 7 },
        v7: { v7: 1 },
      }],
      [[.2, .4, .3, .4, .6], [1, 3, .2, .4], {
        v3: { v1: 1 / 3, v2: 1 / 9, v3: 5 / 9 },
        v6: { v4: .4 * 2 / 7, v5: .6 * 2 / 7, v6: 5 / 7 },
        v7: { v7: 1 },
        v8: { v8: 1 },
      }],
    ];
    for (const [averages, [from, into, a, b], shares] of steps) {
      story.insert(averages);
      assertShares(story.shares, shares);
      const [event] = story.cache.events();
      assertEquals([event!.from + 1, event!.into! + 1], [from, into]);
      assertAlmostEquals(event!.weights[0], a, 1e-6);
      assertAlmostEquals(event!.weights[1], b, 1e-6);
    }
    const { kept, steps: n, score } = story.cache.rows(0, 0);
    assertEquals(kept, [2, 5, 6, 7]);
    assertEquals(n, [6, 3, 2, 1]);
    [.4, .3, .4, .6].forEach((average, i) =>
      assertAlmostEquals(score[i]! / n[i]!, average, 1e-6)
    );
    assertEquals(story.cache.stats(), {
      seen: 8,
      kept: 4,
      merged: 4,
      evicted: 0,
    });
  });

  it("drops the value in the ablation", () => {
    using story = new Story({ ...options, policy: "eviction" });
    for (let i = 0; i < 4; i++) story.insert(Array(i + 1).fill(0.25));
    story.insert([.3, .1, .5, .3, .5]);
    assertShares(story.shares, {
      v1: { v1: 1 },
      v3: { v3: 1 },
      v4: { v4: 1 },
      v5: { v5: 1 },
    });
    assertEquals(story.cache.events()[0]!.into, null);
  });

  it("takes the lowest rank of equal averages", () => {
    using story = new Story(options);
    for (let i = 0; i < 4; i++) story.insert(Array(i + 1).fill(0.25));
    story.insert([.5, .25, .5, .25, .25]);
    assertEquals(story.cache.events()[0]!.from, 1);
  });

  it("leaves the neighbour's value when both averages are 0", () => {
    for (const policy of ["weighted-kv", "weighted-kv-ward"]) {
      using story = new Story({ ...options, sinks: 1, policy });
      for (let i = 0; i < 4; i++) story.insert(Array(i + 1).fill(0));
      story.insert([1, 0, 0, 1, 1]);
      assertShares(story.shares, {
        v1: { v1: 1 },
        v3: { v3: 1 },
        v4: { v4: 1 },
        v5: { v5: 1 },
      });
    }
  });

  it("merges into the recent window, the new token included", () => {
    using story = new Story({ ...options, sinks: 3, recent: 1 });
    for (let i = 0; i < 4; i++) story.insert(Array(i + 1).fill(0.25));
    story.insert([.1, .1, .1, .25, .75]);
    assertShares(story.shares, {
      v1: { v1: 1 },
      v2: { v2: 1 },
      v3: { v3: 1 },
      v5: { v4: .25, v5: .75 },
    });
  });

  it("weighs mass and distance in weighted-kv-ward", () => {
    // Costs of ranks 0 to 3 with unit vectors: a b / (a + b), times 2 or its root.
    using story = new Story({ ...options, policy: "weighted-kv-ward" });
    for (let i = 0; i < 4; i++) story.insert(Array(i + 1).fill(0.25));
    story.insert([.9, .2, .9, .15, .15]);
    assertEquals(story.cache.events()[0]!.from, 3);
  });

  it("takes the victim that the caller names", () => {
    using story = new Story(options);
    for (let i = 0; i < 4; i++) story.insert(Array(i + 1).fill(0.25));
    story.insert([.3, .1, .5, .3, .5], 2);
    assertEquals(story.cache.rows(0, 0).kept, [0, 1, 3, 4]);
  });

  it("refuses a victim that must stay", () => {
    for (const victim of [0, 4, 5, -2, 2 ** 31 - 1]) {
      using story = new Story({ ...options, sinks: 1, recent: 1 });
      for (let i = 0; i < 4; i++) story.insert(Array(i + 1).fill(0.25));
      assertThrows(
        () => story.insert([.3, .1, .5, .3, .5], victim),
        WkvError,
        "wkv_insert",
      );
      assertEquals(story.cache.rows(0, 0).kept, [0, 1, 2, 3], `${victim}`);
    }
  });
});

describe("resolveBudget()", () => {
  it("fills in what each policy protects", () => {
    const expected: Record<string, [sinks: number, recent: number]> = {
      "weighted-kv": [4, 124],
      "eviction": [4, 124],
      "weighted-kv-ward": [4, 124],
      "streaming-llm": [4, 252],
    };
    for (const [name, [sinks, recent]] of Object.entries(expected)) {
      assertEquals(resolveBudget(findPolicy(name), 256), {
        budget: 256,
        sinks,
        recent,
      });
    }
    assertEquals(
      resolveBudget(findPolicy("weighted-kv"), 1024).recent,
      508,
    );
    assertEquals(resolveBudget(findPolicy("weighted-kv"), 6).recent, 1);
  });

  it("refuses sinks + recent above the budget, and what is no count", () => {
    const policy = findPolicy("weighted-kv");
    for (const budget of [0, -1, 1.5, NaN, Infinity, 2 ** 53, 4]) {
      assertThrows(() => resolveBudget(policy, budget), RangeError, "budget");
    }
    assertThrows(
      () => resolveBudget(findPolicy("streaming-llm"), 3),
      RangeError,
      "sinks + recent",
    );
    for (const count of [-1, 0.5, NaN, 9]) {
      const given = { sinks: count, recent: 0 };
      assertThrows(() => resolveBudget(policy, 8, given), RangeError, "sinks");
    }
    for (const count of [-1, 0.5, NaN, 9]) {
      const given = { sinks: 0, recent: count };
      assertThrows(() => resolveBudget(policy, 8, given), RangeError, "recent");
    }
    assertEquals(resolveBudget(policy, 8, { sinks: 3, recent: 5 }).recent, 5);
  });
});

describe("findPolicy()", () => {
  it("finds each name that policyNames() lists", () => {
    for (const name of policyNames()) assertEquals(findPolicy(name).name, name);
    assert(policies.size >= 5);
    assertEquals(
      findPolicy("weighted-kv-ward:linear").select,
      "merge-cost-linear",
    );
  });

  it("names the known ones when there is none", () => {
    for (
      const name of [
        "",
        "weightedkv",
        "full:",
        "full:linear",
        "weighted-kv-ward:linear:linear",
        "weighted-kv-ward:toString",
        "constructor",
        "__proto__",
      ]
    ) {
      assertThrows(
        () => findPolicy(name),
        RangeError,
        "weighted-kv-ward:linear",
      );
    }
  });
});
