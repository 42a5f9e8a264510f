/**
 * The f64 reference itself: each policy against examples worked by hand from
 * docs/policies.md, and what holds for all of them. No library is needed.
 */

import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertNotEquals,
  assertThrows,
} from "@std/assert";
import { describe, it } from "@std/testing/bdd";
import { resolveBudget } from "../src/cache/policy.ts";
import { findPolicy, policyNames } from "../src/cache/registry.ts";
import { Random } from "../src/selftest/numbers.ts";
import {
  ReferenceCache,
  type ReferenceOptions,
} from "../src/selftest/reference.ts";
import { draw, type Token } from "../src/selftest/reference_policies.ts";

interface Example extends Partial<ReferenceOptions> {
  /** The budget. */
  m: number;
}

/** A reference of the policy: one head of 2 dimensions unless said. */
function open(name: string, { m, ...options }: Example): ReferenceCache {
  const { select, merge } = findPolicy(name);
  return new ReferenceCache({
    heads: 1,
    kvHeads: 1,
    headDim: 2,
    slots: m,
    sinks: 0,
    recent: 1,
    interval: 1,
    select,
    merge,
    positions: "cache",
    cacheType: "f32",
    pairs: "interleaved",
    frequencies: [1],
    ...options,
  });
}

interface Fed {
  key?: number[];
  value?: number[];
  /** The weights of this step, in rank order. */
  weights: number[];
}

/** Feeds a reference of one head. */
function feed(
  cache: ReferenceCache,
  { key = [0, 0], value = [0, 0], weights }: Fed,
): void {
  cache.insert([...key, ...value], [weights]);
}

/** The same, with the averages that the tokens shall have after the step. */
function feedAverages(
  cache: ReferenceCache,
  averages: number[],
  fed: Omit<Fed, "weights"> = {},
): void {
  const tokens = cache.heads[0]!;
  feed(cache, {
    ...fed,
    weights: averages.map((wanted, i) =>
      wanted * ((tokens[i]?.steps ?? 0) + 1) - (tokens[i]?.score ?? 0)
    ),
  });
}

function kept(cache: ReferenceCache, head = 0): number[] {
  return cache.heads[head]!.map(({ position }) => position);
}

function assertNumbers(
  actual: ArrayLike<number>,
  expected: number[],
  tolerance = 1e-7,
): void {
  assertEquals(actual.length, expected.length);
  expected.forEach((x, i) => assertAlmostEquals(actual[i]!, x, tolerance));
}

function tokenAt(cache: ReferenceCache, position: number): Token {
  return cache.heads[0]!.find((token) => token.position === position)!;
}

describe("full", () => {
  it("keeps every token, and one too many is an error", () => {
    const cache = open("full", { m: 3, recent: 0 });
    for (const n of [1, 2, 3]) feed(cache, { weights: Array(n).fill(0) });
    assertEquals(kept(cache), [0, 1, 2]);
    assertThrows(
      () => feed(cache, { weights: [0, 0, 0, 0] }),
      RangeError,
      "full",
    );
  });
});

describe("weighted-kv", () => {
  it("follows the paper's Fig. 3", () => {
    const cache = open("weighted-kv", { m: 4, headDim: 8, frequencies: [] });
    const value = (i: number) =>
      Array.from({ length: 8 }, (_, d) => d === i ? 1 : 0);
    const fed = (i: number) => ({ key: Array(8).fill(0), value: value(i) });
    for (let i = 0; i < 4; i++) {
      feedAverages(cache, Array(i + 1).fill(0.25), fed(i));
    }
    feedAverages(cache, [.3, .1, .5, .3, .5], fed(4));
    assertEquals(kept(cache), [0, 2, 3, 4]);
    assertNumbers(tokenAt(cache, 2).value, [0, 1 / 6, 5 / 6, 0, 0, 0, 0, 0]);
    feedAverages(cache, [.3, .4, .2, .3, .9], fed(5));
    assertEquals(kept(cache), [0, 2, 4, 5]);
    assertNumbers(tokenAt(cache, 4).value, [0, 0, 0, .4, .6, 0, 0, 0]);
    feedAverages(cache, [.3, .4, .2, .5, .7], fed(6));
    assertEquals(kept(cache), [0, 2, 5, 6]);
    assertNumbers(
      tokenAt(cache, 5).value,
      [0, 0, 0, .8 / 7, 1.2 / 7, 5 / 7, 0, 0],
    );
    feedAverages(cache, [.2, .4, .3, .4, .6], fed(7));
    assertEquals(kept(cache), [2, 5, 6, 7]);
    assertNumbers(
      tokenAt(cache, 2).value,
      [1 / 3, 1 / 9, 5 / 9, 0, 0, 0, 0, 0],
    );
    assertEquals([cache.merged, cache.evicted], [4, 0]);
  });

  it("leaves the neighbour's value when both averages are 0", () => {
    const cache = open("weighted-kv", { m: 1 });
    feed(cache, { value: [1, 0], weights: [0] });
    feed(cache, { value: [0, 1], weights: [0, 0] });
    assertNumbers(tokenAt(cache, 1).value, [0, 1]);
    assertEquals([cache.merged, cache.evicted], [1, 0]);
  });

  it("drops the newest when it leaves", () => {
    const cache = open("weighted-kv", { m: 1, recent: 0 });
    feed(cache, { value: [1, 0], weights: [1] });
    feed(cache, { value: [0, 1], weights: [.9, .1] });
    assertEquals(kept(cache), [0]);
    assertEquals([cache.merged, cache.evicted], [0, 1]);
  });

  it("resolves chains at an interval above 1", () => {
    const cache = open("weighted-kv", {
      m: 3,
      interval: 2,
      headDim: 4,
      frequencies: [],
    });
    const fed = (i: number) => ({
      key: [0, 0, 0, 0],
      value: [0, 1, 2, 3].map((d) => d === i ? 1 : 0),
    });
    for (const i of [0, 1, 2]) {
      feedAverages(cache, Array(i + 1).fill(.25), fed(i));
    }
    feedAverages(cache, [.5, .1, .2, .6], fed(3));
    assertEquals(kept(cache), [0, 3]);
    // v2 takes a third of v1; then v3 takes a quarter of that.
    assertNumbers(tokenAt(cache, 3).value, [0, 1 / 12, 1 / 6, 3 / 4]);
    feedAverages(cache, [.5, .5, .5], fed(0));
    assertEquals(kept(cache), [0, 3, 4], "below the budget none leaves");
  });
});

/** Two steps of 2 tokens, then two that overflow. */
const pair: number[][] = [[1], [.5, .5], [.25, .25, .5], [.2, .3, .5]];

/** A cache of 2 tokens after these steps, whose values are the unit vectors. */
function fedPair(policy: string) {
  const cache = open(policy, { m: 2, headDim: 4, frequencies: [] });
  pair.forEach((weights, i) =>
    feed(cache, {
      key: [0, 0, 0, 0],
      value: [0, 1, 2, 3].map((d) => d === i ? 1 : 0),
      weights,
    })
  );
  return cache;
}

describe("weighted-kv:literal", () => {
  it("divides the sums in place in steps that overflow", () => {
    const cache = fedPair("weighted-kv:literal");
    // Sums 1.75, 0.75, 0.5 over 3, 2, 1: the second leaves into the third, .375
    // to .5. Then 7/12 + .2, .5 + .3, .5 over 4, 2, 1: the first, 47/240 to .4.
    assertEquals(kept(cache), [2, 3]);
    const [first, second] = cache.heads[0]!;
    assertNumbers(first!.value, [
      47 / 143,
      96 / 143 * 3 / 7,
      96 / 143 * 4 / 7,
      0,
    ]);
    assertNumbers(second!.value, [0, 0, 0, 1]);
    assertNumbers([first!.score, second!.score], [.4, .5]);
    assertEquals([first!.steps, second!.steps], [2, 1]);
  });

  it("differs from weighted-kv there", () => {
    const cache = open("weighted-kv", { m: 2 });
    for (const weights of pair) feed(cache, { weights });
    // 1.95, 0.8, 0.5 over 4, 2, 1: the second.
    assertEquals(kept(cache), [0, 3]);
  });
});

describe("weighted-kv:light", () => {
  it("lets what leaves weigh a quarter of its average", () => {
    const cache = fedPair("weighted-kv:light");
    // Averages 1.75/3, .75/2, .5: the second leaves, 3/32 to 1/2. Then 1.95/4,
    // .8/2, .5: what took it in leaves in its turn, 1/10 to 1/2.
    assertEquals(kept(cache), [0, 3]);
    const [first, second] = cache.heads[0]!;
    assertNumbers(first!.value, [1, 0, 0, 0]);
    assertNumbers(second!.value, [0, 3 / 19 / 6, 16 / 19 / 6, 5 / 6]);
    assertNumbers([first!.score, second!.score], [1.95, .5]);
    assertEquals([cache.merged, cache.evicted], [2, 0]);
  });
});

describe("eviction", () => {
  it("drops the value of the lowest average", () => {
    const cache = open("eviction", { m: 2 });
    pair.slice(0, 3).forEach((weights, i) =>
      feed(cache, { value: [i + 1, 0], weights })
    );
    assertEquals(kept(cache), [0, 2]);
    assertNumbers(cache.heads[0]!.map(({ value }) => value[0]!), [1, 3]);
    assertEquals([cache.merged, cache.evicted], [0, 1]);
  });

  it("lets the interval leave at once, the lowest rank of equal ones", () => {
    const cache = open("eviction", { m: 5, interval: 3 });
    for (let i = 0; i < 5; i++) feedAverages(cache, Array(i + 1).fill(.5));
    feedAverages(cache, [.5, .25, .5, .125, .5, .0625]);
    assertEquals(kept(cache), [2, 4, 5]);
  });
});

describe("streaming-llm", () => {
  it("lets the oldest behind the sinks leave", () => {
    const cache = open("streaming-llm", { m: 3, sinks: 1, recent: 2 });
    for (const n of [1, 2, 3, 4, 4]) feed(cache, { weights: Array(n).fill(9) });
    assertEquals(kept(cache), [0, 3, 4]);
  });
});

describe("lm-infinite", () => {
  it("keeps 10 first tokens", () => {
    const { sinks, recent } = resolveBudget(findPolicy("lm-infinite"), 12);
    const cache = open("lm-infinite", { m: 12, sinks, recent });
    for (let i = 0; i < 15; i++) {
      feed(cache, { weights: Array(Math.min(i, 12) + 1).fill(1) });
    }
    assertEquals(kept(cache), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14]);
  });
});

describe("tova", () => {
  it("makes one choice for the layer, from this step alone", () => {
    const cache = open("tova", { m: 2, recent: 0, heads: 2, kvHeads: 2 });
    const step = (...weights: number[][]) =>
      cache.insert(Array(8).fill(0), weights);
    step([1], [1]);
    step([0, 1], [0, 1]);
    // Means 3/8, 5/16, 5/16; by itself head 0 would let rank 0 leave.
    step([1 / 4, 1 / 2, 1 / 4], [1 / 2, 1 / 8, 3 / 8]);
    assertEquals([kept(cache), kept(cache, 1)], [[0, 2], [0, 2]]);
    step([.5, .375, .125], [.5, .25, .25]);
    assertEquals(kept(cache), [0, 2], "the new token leaves");
    assertEquals([cache.merged, cache.evicted], [0, 2]);
  });
});

describe("h2o", () => {
  it("goes by the sum, where the average says otherwise", () => {
    const weights = [
      [1],
      [.5, .5],
      [.25, .5, .25],
      [.25, .25, .25, .25],
      [0, 0, .5, .25, .25],
    ];
    // Sums of the first three 2, 1.25, 1; averages 2/5, 1.25/4, 1/3.
    const h2o = open("h2o", { m: 4, recent: 2 });
    const eviction = open("eviction", { m: 4, recent: 2 });
    for (const w of weights) {
      feed(h2o, { weights: w });
      feed(eviction, { weights: w });
    }
    assertEquals(kept(h2o), [0, 1, 3, 4]);
    assertEquals(kept(eviction), [0, 2, 3, 4]);
  });
});

describe("scissorhands", () => {
  it("lets half of the budget leave, by how often a share was above even", () => {
    const cache = open("scissorhands", { m: 4, recent: 2, interval: 2 });
    for (
      const weights of [
        [1],
        [.6, .4],
        [.4, .4, .2],
        [.2, .3, .3, .2],
        [.5, .1, .1, .1, .2],
      ]
    ) feed(cache, { weights });
    // Counts of the first three: 3, 2, 1; the others are recent.
    assertEquals(kept(cache), [0, 3, 4]);
  });

  it("takes an even share for none", () => {
    const cache = open("scissorhands", { m: 1, recent: 0 });
    feed(cache, { weights: [1] });
    feed(cache, { weights: [.5, .5] });
    assertEquals(kept(cache), [1], "0 each: the lowest rank leaves");
  });

  it("forgets what is 400 steps ago", () => {
    const cache = open("scissorhands", { m: 402, recent: 400 });
    const above: Record<number, number[]> = {
      2: [1],
      3: [0],
      10: [0, 1, 2],
      11: [2],
    };
    for (let step = 0; step <= 402; step++) {
      const weights = Array(step + 1).fill(0);
      for (const rank of above[step] ?? []) weights[rank] = 1;
      feed(cache, { weights });
    }
    // Of the steps 3 to 402 they have 2, 1, 2. With step 2, or without step 3,
    // the first two would be equal, and the first would leave.
    assertEquals(kept(cache).slice(0, 3), [0, 2, 3]);
  });
});

describe("cam", () => {
  /** Four steps; the last lets rank 1 leave, with this sum of attention. */
  function run(sum: number, options: Partial<ReferenceOptions> = {}) {
    const cache = open("cam", { m: 3, sinks: 1, recent: 2, ...options });
    feed(cache, { value: [9, 9], weights: [1] });
    feed(cache, { value: [16, 32], weights: [0, sum] });
    feed(cache, { value: [1, 0], weights: [0, 0, .25] });
    feed(cache, { value: [0, 1], weights: [0, 0, .25, 3.5] });
    assertEquals(kept(cache), [0, 2, 3]);
    return cache;
  }

  it("adds a sixteenth to each of the next tokens when it must", () => {
    // The mean of the targets is 2, so the chance of a sum of 2 is 1.
    const cache = run(2);
    assertNumbers(tokenAt(cache, 0).value, [9, 9]);
    assertNumbers(tokenAt(cache, 2).value, [2, 2]);
    assertNumbers(tokenAt(cache, 3).value, [1, 3]);
    assertEquals([cache.merged, cache.evicted], [1, 0]);
  });

  it("drops what got no attention, even where all is 0", () => {
    assertEquals([run(0).merged, run(0).evicted], [0, 1]);
    const cache = open("cam", { m: 1, sinks: 0 });
    feed(cache, { value: [16, 0], weights: [0] });
    feed(cache, { weights: [0, 0] });
    assertNumbers(tokenAt(cache, 1).value, [0, 0]);
    assertEquals([cache.merged, cache.evicted], [0, 1]);
  });

  it("goes into 16 tokens and no more", () => {
    const cache = open("cam", { m: 20, recent: 20 });
    for (let i = 0; i <= 20; i++) {
      const weights = Array(i + 1).fill(0);
      weights[0] = 1;
      feed(cache, { value: [i === 0 ? 16 : 0, 0], weights });
    }
    assertEquals(
      cache.heads[0]!.map(({ value }) => value[0]),
      [...Array(16).fill(1), ...Array(4).fill(0)],
    );
  });

  it("merges as often as the chance says", () => {
    const seeds = 4000;
    let merged = 0;
    for (let seed = 0; seed < seeds; seed++) merged += run(.6, { seed }).merged;
    // 4 deviations of a share of 0.3.
    const deviation = Math.sqrt(.3 * .7 / seeds);
    assertAlmostEquals(merged / seeds, .3, 4 * deviation);
  });

  it("draws from seed, layer, sequence, head, step and turn", () => {
    const words: [number[], number][] = [
      [[0, 0, 0, 0, 0, 0], 12_251_802],
      [[0, 0, 0, 0, 256, 0], 11_178_257],
      [[0, 0, 0, 1, 256, 0], 12_357_767],
      [[0, 0, 0, 0, 256, 1], 16_374_233],
      [[42, 29, 3, 2, 100_000, 7], 8_724_906],
      [[2 ** 32 - 1, 0, 0, 0, 1, 0], 15_970_974],
    ];
    for (const [list, drawn] of words) {
      assertEquals(draw(list) * 2 ** 24, drawn, `${list}`);
      assertEquals(drawAgain(list), drawn, `${list}`);
    }
    for (const [seed, layer, sequence] of [[1, 0, 0], [0, 2, 0], [0, 0, 3]]) {
      const drawn = drawAgain([seed!, layer!, sequence!, 0, 3, 0]) / 2 ** 24;
      const options = { seed: seed!, layer: layer!, sequence: sequence! };
      assertEquals(run(2 * (drawn + 1e-6), options).merged, 1);
      assertEquals(run(2 * (drawn - 1e-6), options).merged, 0);
    }
  });

  it("draws anew for each head and each token of a step", () => {
    const second = drawAgain([0, 0, 0, 1, 2, 0]) / 2 ** 24;
    const next = drawAgain([0, 0, 0, 0, 4, 1]) / 2 ** 24;
    for (const [by, merges] of [[1e-6, true], [-1e-6, false]] as const) {
      const heads = open("cam", { m: 2, recent: 2, heads: 2, kvHeads: 2 });
      for (
        const weights of [[second + by], [0, 1], [0, 0, 1]]
      ) heads.insert([0, 0, 0, 0, 16, 16, 16, 16], [weights, weights]);
      assertEquals(heads.heads[1]![0]!.value[0], merges ? 17 : 16);

      const several = open("cam", { m: 4, sinks: 1, recent: 2, interval: 2 });
      for (
        const weights of [
          [0],
          [0, 0],
          [0, 0, 2 * (next + by)],
          [0, 0, 0, 2],
          [0, 0, 0, 0, 2],
        ]
      ) feed(several, { weights });
      assertEquals(kept(several), [0, 3, 4]);
      assertEquals(several.merged, merges ? 1 : 0);
    }
  });
});

/** The draw once more, in whole numbers without bounds. */
function drawAgain(words: number[]): number {
  const low = (x: bigint) => x & 0xffffffffn;
  let h = 0n;
  for (const word of words) {
    h = low((h ^ BigInt(word)) + 0x9e3779b9n);
    h = low((h ^ h >> 16n) * 0x85ebca6bn);
    h = low((h ^ h >> 13n) * 0xc2b2ae35n);
    h ^= h >> 16n;
  }
  return Number(h >> 8n);
}

describe("weighted-kv-ward", () => {
  /** Equal steps, then averages and values that tell both linkages apart. */
  function run(name: string): ReferenceCache {
    const cache = open(name, { m: 3 });
    [0, 3, 5].forEach((x, i) =>
      feedAverages(cache, Array(i + 1).fill(.1), { value: [x, 0] })
    );
    feedAverages(cache, [.1, .1, .9, .9], { value: [10, 0] });
    return cache;
  }

  it("lets the cheapest merge leave", () => {
    // .05 * 9, .09 * 4, .45 * 25.
    const cache = run("weighted-kv-ward");
    assertEquals(kept(cache), [0, 2, 3]);
    assertNumbers(tokenAt(cache, 2).value, [.1 * 3 + .9 * 5, 0], 1e-6);
  });

  it("takes the distance instead of its square with :linear", () => {
    // .05 * 3, .09 * 2, .45 * 5.
    const cache = run("weighted-kv-ward:linear");
    assertEquals(kept(cache), [1, 2, 3]);
    assertNumbers(tokenAt(cache, 1).value, [1.5, 0], 1e-6);
  });
});

describe("weighted-kv-ward of averages of 0", () => {
  it("takes them for free, the lowest rank first", () => {
    const cache = open("weighted-kv-ward", { m: 3, sinks: 1 });
    for (const n of [1, 2, 3]) {
      feed(cache, { value: [n, 0], weights: Array(n).fill(0) });
    }
    feed(cache, { value: [9, 0], weights: [1, 0, 0, 1] });
    assertEquals(kept(cache), [0, 2, 3]);
    assertNumbers(tokenAt(cache, 2).value, [3, 0]);
  });
});

describe("knorm", () => {
  it("lets the longest key leave", () => {
    const cache = open("knorm", { m: 3 });
    const keys = [[3, 0], [3, 4], [0, -4.5], [9, 9]];
    keys.forEach((key, i) =>
      feed(cache, { key, weights: Array(i + 1).fill(0) })
    );
    assertEquals(kept(cache), [0, 2, 3]);
    feed(cache, { key: [0, 0], weights: [9, 9, 9, 9] });
    assertEquals(kept(cache), [0, 2, 4]);
  });
});

describe("keydiff", () => {
  it("lets the key most like the mean direction leave", () => {
    const cache = open("keydiff", { m: 3 });
    const keys = [[10, 0], [1, 1], [0, 1], [3, 0]];
    // Directions sum to (2 + h, 1 + h), h = 1/sqrt 2: products 2 + h, 3h + 1, 1 + h.
    // With keys of their own length, the first would be nearest.
    keys.forEach((key, i) =>
      feed(cache, { key, weights: Array(i + 1).fill(0) })
    );
    assertEquals(kept(cache), [0, 2, 3]);
  });

  it("takes a key of 0 for unlike all", () => {
    const cache = open("keydiff", { m: 2 });
    const keys = [[0, 0], [-1, 0], [1, 1]];
    keys.forEach((key, i) =>
      feed(cache, { key, weights: Array(i + 1).fill(0) })
    );
    // Directions sum to (h - 1, h): products 0 and 1 - h.
    assertEquals(kept(cache), [0, 2]);
  });
});

describe("snapkv", () => {
  it("averages over neighbours, the recent ones left out", () => {
    const cache = open("snapkv", { m: 6 });
    for (let i = 0; i < 6; i++) feed(cache, { weights: Array(i + 1).fill(0) });
    feed(cache, { weights: [1, 0, 9, 0, 0, 2, 100] });
    // Sums of five: 10, 10, 10, 11, 11, 2; with the recent one the last is 102.
    assertEquals(kept(cache), [0, 1, 2, 3, 4, 6]);
  });

  it("forgets what is 32 steps ago", () => {
    // Of the steps 4 to 35 the sums of five are w, w, w, 1, 1, 1.
    for (const [at, w, left] of [[3, 0, 0], [4, 2, 3]] as const) {
      const cache = open("snapkv", { m: 35, recent: 30 });
      for (let step = 0; step <= 35; step++) {
        const weights = Array(step + 1).fill(0);
        if (step === at) weights[0] = 2;
        if (step === 35) weights[5] = 1;
        feed(cache, { weights });
      }
      const rest = [0, 1, 2, 3, 4, 5].filter((rank) => rank !== left);
      assertEquals(kept(cache).slice(0, 5), rest, `${w} in the window`);
    }
  });
});

describe("vatp", () => {
  it("multiplies sums and L1 norms", () => {
    const cache = open("vatp", { m: 3 });
    const values = [[.5, -.5], [1, -1], [1.8, 0], [0, 0]];
    const weights = [[5], [0, .5], [0, 0, .5], [0, .5, .5, 1]];
    // 5 * 1, 1 * 2, 1 * 1.8; by the L2 norm the second has the least.
    values.forEach((value, i) => feed(cache, { value, weights: weights[i]! }));
    assertEquals(kept(cache), [0, 1, 3]);
  });
});

describe("caote", () => {
  it("lets the token leave that the output misses least", () => {
    const cache = open("caote", { m: 2, recent: 0 });
    feed(cache, { value: [0, 0], weights: [1] });
    feed(cache, { value: [4, 0], weights: [.5, .5] });
    // The output is 1: errors .5 / .5 * 1, .25 / .75 * 3, .25 / .75 * 1.
    feed(cache, { value: [0, 0], weights: [.5, .25, .25] });
    assertEquals(kept(cache), [0, 1]);
  });

  it("knows how far the output moves", () => {
    const random = new Random(1);
    for (let run = 0; run < 50; run++) {
      const parts = Array.from({ length: 6 }, () => random.uniform() ** 3);
      const sum = parts.reduce((a, b) => a + b);
      const weights = parts.map((x) => x / sum);
      const values = weights.map(() => [...random.normals(2)]);
      const cache = open("caote", { m: 5, recent: 0 });
      values.forEach((value, i) =>
        feed(cache, {
          value,
          weights: i < 5 ? Array(i + 1).fill(0) : weights,
        })
      );
      const moved = weights.map((_, left) => {
        const rest = (p: number, i: number) => i === left ? 0 : p;
        const mass = weights.map(rest).reduce((a, b) => a + b);
        return Math.hypot(
          ...[0, 1].map((d) =>
            weights.reduce((o, p, i) => o + p * values[i]![d]!, 0) -
            weights.map(rest).reduce((o, p, i) => o + p * values[i]![d]!, 0) /
              mass
          ),
        );
      });
      const left = moved.indexOf(Math.min(...moved));
      assertEquals(kept(cache), [0, 1, 2, 3, 4, 5].filter((i) => i !== left));
    }
  });

  it("weighs what is left of the attention", () => {
    const cache = open("caote", { m: 2, recent: 0 });
    feed(cache, { value: [0, 0], weights: [0] });
    feed(cache, { value: [-1.3, 0], weights: [0, 0] });
    // The output is .2: errors .5 / .5 * .2, .1 / .9 * 1.5, .4 / .6 * .625;
    // without the division the first would have the least.
    feed(cache, { value: [.825, 0], weights: [.5, .1, .4] });
    assertEquals(kept(cache), [0, 2]);
  });

  it("keeps what takes all of the attention", () => {
    for (const rest of [0, 1e-9, 1e-6]) {
      const cache = open("caote", { m: 1, recent: 0 });
      feed(cache, { value: [1, 0], weights: [1] });
      feed(cache, { value: [2, 0], weights: [1 - rest, rest] });
      assertEquals(kept(cache), [0]);
    }
  });
});

describe("keepkv", () => {
  it("merges keys and values by votes times averages", () => {
    const cache = open("keepkv", { m: 3 });
    feedAverages(cache, [.25], { key: [1, 0], value: [8, 0] });
    feedAverages(cache, [.25, .25], { key: [0, 1], value: [0, 0] });
    feedAverages(cache, [.25, .25, .25], { key: [2, 0], value: [0, 8] });
    feedAverages(cache, [.1, .5, .3, .4], { key: [0, -1], value: [0, 0] });
    assertEquals(kept(cache), [1, 2, 3]);
    assertNumbers(tokenAt(cache, 2).key, [1.75, 0], 1e-6);
    assertNumbers(tokenAt(cache, 2).value, [2, 6], 1e-6);
    assertEquals(tokenAt(cache, 2).votes, 2);
    // Two votes of .2 against one of .6.
    feedAverages(cache, [.5, .2, .4, .6], { key: [4, 0], value: [7, 1] });
    assertEquals(kept(cache), [1, 3, 4]);
    assertNumbers(tokenAt(cache, 4).value, [5, 3], 1e-6);
    assertNumbers(tokenAt(cache, 4).key, [3.1, 0], 1e-6);
    assertEquals(tokenAt(cache, 4).votes, 3);
    assertEquals([cache.merged, cache.evicted], [2, 0]);
  });

  it("merges from a cosine of 0.8 on", () => {
    for (const [key, merged] of [[[3, 4], 1], [[4, 3], 0]] as const) {
      const cache = open("keepkv", { m: 1 });
      feed(cache, { key: [0, 1], value: [1, 0], weights: [.5] });
      feed(cache, { key: [...key], value: [0, 1], weights: [.5, 1] });
      assertEquals([cache.merged, cache.evicted], [merged, 1 - merged]);
      assertNumbers(tokenAt(cache, 1).value, merged ? [1 / 3, 2 / 3] : [0, 1]);
    }
  });

  it("counts the votes of the token that stays", () => {
    const cache = open("keepkv", { m: 2 });
    feedAverages(cache, [.5], { key: [1, 0], value: [0, 0] });
    feedAverages(cache, [.5, .5], { key: [1, 0], value: [0, 0] });
    feedAverages(cache, [0, .5, .5], { key: [1, 0], value: [12, 0] });
    feedAverages(cache, [.5, .2, .4], { key: [0, 1], value: [0, 0] });
    // One vote of .2 against two of .5.
    assertEquals(kept(cache), [1, 3]);
    assertNumbers(tokenAt(cache, 1).value, [2, 0], 1e-6);
    assertEquals(tokenAt(cache, 1).votes, 3);
  });

  it("takes the lowest rank of equally near keys", () => {
    const cache = open("keepkv", { m: 3 });
    feed(cache, { key: [1, 0], value: [4, 0], weights: [0] });
    feed(cache, { key: [2, 0], value: [0, 4], weights: [.5, .5] });
    feed(cache, { key: [2, 0], value: [0, 4], weights: [.5, .5, .5] });
    feed(cache, { key: [2, 0], value: [0, 4], weights: [0, .5, .5, .5] });
    assertEquals(cache.heads[0]!.map(({ votes }) => votes), [2, 1, 1]);
  });
});

describe("d2o", () => {
  it("merges into the nearest key above a threshold that moves", () => {
    const cache = open("d2o", { m: 2 });
    feed(cache, { key: [1, 0], value: [10, 0], weights: [.1] });
    feed(cache, { key: [3, 4], value: [0, 10], weights: [.1, .3] });
    // The first to leave merges whatever its cosine is: here .6, the threshold.
    feed(cache, { key: [0, -1], value: [5, 5], weights: [0, 0, .2] });
    assertEquals(kept(cache), [1, 2]);
    assertNumbers(tokenAt(cache, 1).key, [1.8, 2], 1e-6);
    assertNumbers(tokenAt(cache, 1).value, [3, 5], 1e-6);
    // .8 is above .6, which becomes .7.
    feed(cache, { key: [3, -4], value: [0, 0], weights: [0, 0, 1] });
    assertEquals(kept(cache), [1, 3]);
    assertNumbers(tokenAt(cache, 3).key, [1.5, -2.4], 1e-6);
    assertNumbers(tokenAt(cache, 3).value, [2, 2], 1e-6);
    assertEquals([cache.merged, cache.evicted], [2, 0]);
  });

  it("takes the mean of old threshold and cosine, merged or not", () => {
    const cache = open("d2o", { m: 1 });
    feed(cache, { key: [1, 0], weights: [1] });
    // Thresholds from before: none, .6, .7, .725, .7225, .72325, .611625.
    const cosines: [cosine: number, merged: boolean][] = [
      [.6, true],
      [.8, true],
      [.75, true],
      [.72, false],
      [.724, true],
      [.5, false],
      [.62, true],
    ];
    for (const [cosine, merged] of cosines) {
      const [x, y] = [...cache.heads[0]![0]!.key] as [number, number];
      const size = Math.hypot(x, y);
      const sine = Math.sqrt(1 - cosine ** 2);
      const before = cache.merged;
      feed(cache, {
        key: [
          (cosine * x - sine * y) / size,
          (cosine * y + sine * x) / size,
        ],
        weights: [0, 1],
      });
      assertEquals(cache.merged - before, merged ? 1 : 0, `${cosine}`);
    }
  });
});

/** What every policy protects and lets leave at a budget of 256, by hand. */
const defaults: Record<string, [sinks: number, recent: number, at: number]> = {
  "weighted-kv": [4, 124, 1],
  "weighted-kv:literal": [4, 124, 1],
  "weighted-kv:light": [4, 124, 1],
  "eviction": [4, 124, 1],
  "streaming-llm": [4, 252, 1],
  "lm-infinite": [10, 246, 1],
  "tova": [0, 0, 1],
  "h2o": [0, 128, 1],
  "scissorhands": [0, 10, 128],
  "cam": [4, 252, 1],
  "weighted-kv-ward": [4, 124, 1],
  "weighted-kv-ward:linear": [4, 124, 1],
  "knorm": [4, 124, 1],
  "keydiff": [4, 124, 1],
  "snapkv": [0, 32, 1],
  "vatp": [20, 128, 1],
  "caote": [0, 0, 1],
  "keepkv": [4, 124, 1],
  "d2o": [4, 124, 1],
};
const bounded = policyNames().filter((name) => name !== "full");

describe("every policy", () => {
  it("has its defaults", () => {
    assertEquals(Object.keys(defaults).sort(), [...bounded].sort());
    for (const [name, [sinks, recent, at]] of Object.entries(defaults)) {
      const policy = findPolicy(name);
      assertEquals(
        resolveBudget(policy, 256),
        { budget: 256, sinks, recent, interval: at },
        name,
      );
    }
    const policy = findPolicy("scissorhands");
    const few = { sinks: 2, recent: 10 };
    assertEquals(resolveBudget(policy, 16, few).interval, 4);
    assertEquals(resolveBudget(policy, 16, { ...few, sinks: 6 }).interval, 1);
    assertThrows(
      () => resolveBudget(policy, 16, { ...few, interval: 5 }),
      RangeError,
      "The interval must be a whole number between 1 and budget - sinks - recent = 4: current value is 5",
    );
  });

  it("has its block in docs/policies.md, and its row says what it is", async () => {
    const text = await Deno.readTextFile(
      new URL("../docs/policies.md", import.meta.url),
    );
    const rows = new Map(
      [...text.matchAll(/^\| `(\w.*?)` .*$/gm)].map(([row, name]) => [
        name!,
        row.split("|").slice(2, -1).map((cell) => cell.trim()),
      ]),
    );
    assertEquals([...rows.keys()].sort(), policyNames().sort());
    const blocks = new Map(
      text.split("\n## ").slice(1).flatMap((block) => {
        const [title] = block.split("\n");
        return title!.split(", ").map((name) => [name, block] as const);
      }),
    );
    for (const name of policyNames()) {
      const { select, merge, interval, prefill } = findPolicy(name);
      const [a, b, c, d] = rows.get(name)!;
      assertEquals([a, b, d], [`\`${select}\``, `\`${merge}\``, prefill]);
      if (interval === undefined) assertEquals(c, name === "full" ? "" : "1");
      else assertNotEquals(c, "1");
      for (
        const part of [
          "Source",
          "State",
          "Order in the step",
          "Protected",
          "Victim",
          "Action",
          "Positions",
          "Defaults",
          "Prefill",
          "Paper and code",
          "Ours",
        ]
      ) {
        assert(
          blocks.get(name)?.includes(`- **${part}**:`),
          `${name}: ${part}`,
        );
      }
    }
  });

  for (const name of bounded) {
    it(`${name} keeps what it must, and no more than the budget`, () => {
      const policy = findPolicy(name);
      const random = new Random(7);
      for (const [m, sinks, recent] of [[1, 0, 0], [6, 2, 1], [12, 3, 4]]) {
        const limits = { budget: m!, sinks: sinks!, recent: recent! };
        const { interval } = resolveBudget(policy, m!, limits);
        const cache = open(name, {
          m: m!,
          sinks: sinks!,
          recent: recent!,
          interval,
          heads: 4,
          kvHeads: 2,
        });
        let least = Infinity;
        for (let step = 0; step < 200; step++) {
          cache.step(random.normals(16));
          for (const tokens of cache.heads) {
            const places = tokens.map(({ position }) => position);
            assertEquals(places, [...new Set(places)].sort((a, b) => a - b));
            assert(places.length <= m! && places.length <= step + 1);
            const first = Math.min(sinks!, step + 1);
            for (let i = 0; i < first; i++) assertEquals(places[i], i);
            for (let i = 0; i < Math.min(recent!, step + 1); i++) {
              assertEquals(places.at(-1 - i), step - i);
            }
            for (const { position, steps, key, value } of tokens) {
              assertEquals(steps, step + 1 - position);
              assert([...key, ...value].every(Number.isFinite));
            }
          }
          const { length } = cache.heads[0]!;
          assertEquals(cache.heads[1]!.length, length);
          assertEquals(cache.seen, length + cache.merged + cache.evicted);
          if (step >= m!) least = Math.min(least, length);
        }
        assertEquals(least, m! + 1 - interval);
      }
    });

    it(`${name} is a full cache below its budget`, () => {
      const inputs = new Random(3);
      const cache = open(name, { m: 20, heads: 2, recent: 0 });
      const full = open("full", { m: 20, heads: 2, recent: 0 });
      for (let step = 0; step < 20; step++) {
        const qkv = inputs.normals(8);
        assertEquals(cache.step(qkv), full.step(qkv));
      }
      assertEquals([cache.merged, cache.evicted], [0, 0]);
    });
  }

  it("needs no more than sums, or does, as its record says", () => {
    for (const name of bounded) {
      const policy = findPolicy(name);
      const limits = { budget: 40, sinks: 0, recent: 3 };
      const { interval } = resolveBudget(policy, 40, limits);
      const options = { m: 40, recent: 3, interval };
      const random = new Random(11);
      const streamed = open(name, options);
      for (let step = 0; step < 40; step++) streamed.step(random.normals(6, 2));
      const summed = open(name, options);
      summed.load(
        40,
        streamed.heads.map((tokens) => ({
          kept: tokens.map(({ position }) => position),
          steps: tokens.map(({ steps }) => steps),
          score: tokens.map(({ score }) => score),
          keys: tokens.flatMap(({ key }) => [...key]),
          values: tokens.flatMap(({ value }) => [...value]),
        })),
      );
      let equal = true;
      for (let step = 0; step < 60; step++) {
        const qkv = random.normals(6, 2);
        streamed.step(qkv);
        summed.step(qkv);
        const same = streamed.merged === summed.merged &&
          kept(streamed).join() === kept(summed).join();
        if (!same) equal = false;
      }
      assertEquals(equal, policy.prefill === "sums", name);
    }
  });
});
