/** Select and merge by the paper's worked example, and how budgets are resolved. */

import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertThrows,
} from "@std/assert";
import type { Backend } from "../src/backend/backend.ts";
import { WkvError } from "../src/backend/error.ts";
import { Tensor } from "../src/backend/tensor.ts";
import type { KvCache } from "../src/cache/cache.ts";
import type { CacheOptions } from "../src/cache/layout.ts";
import { resolveBudget } from "../src/cache/policy.ts";
import { findPolicy, policies, policyNames } from "../src/cache/registry.ts";
import { type Layer, openCache } from "../src/selftest/layer.ts";
import { afterAll, beforeAll, describe, it, openBackend } from "./device.ts";

let backend: Backend;
beforeAll(async () => {
  backend = await openBackend();
});
afterAll(() => backend?.close());

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
        interval: 1,
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
