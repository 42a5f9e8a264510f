/** Tests of budgets in other words than tokens (shares, bytes, presets), and of budgets spread over the layers. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertLessOrEqual,
  assertRejects,
  assertThrows,
} from "@std/assert";
import { evaluate, generate, perplexity, policies } from "../mod.ts";
import { Tensor } from "../src/backend/tensor.ts";
import type { KvCache } from "../src/cache/cache.ts";
import { headBudgets, parseBudget } from "../src/cache/budget.ts";
import { openCache } from "../src/selftest/layer.ts";
import { Random, relativeError } from "../src/selftest/numbers.ts";
import { loadTiny } from "./tiny_model.ts";
import { describe, it, openBackend } from "./device.ts";

describe("parseBudget()", () => {
  it("reads tokens, shares, bytes and presets", () => {
    const cases: [string | number, ReturnType<typeof parseBudget>][] = [
      [64, { kind: "tokens", tokens: 64 }],
      ["64", { kind: "tokens", tokens: 64 }],
      ["paper-1024", { kind: "tokens", tokens: 1024 }],
      ["25%", { kind: "share", share: 0.25 }],
      ["100 %", { kind: "share", share: 1 }],
      ["1.5kb", { kind: "bytes", bytes: 1500 }],
      ["2MiB", { kind: "bytes", bytes: 2 ** 21 }],
      ["3GB", { kind: "bytes", bytes: 3e9 }],
      ["700 B", { kind: "bytes", bytes: 700 }],
    ];
    for (const [size, parsed] of cases) assertEquals(parseBudget(size), parsed);
  });

  it("refuses all else, and says what it may be", () => {
    for (
      const size of [
        ...["", "x", "0", "-1", "1.5", "0%", "101%", "64M", "0B", "1e3"],
        ...["0.4B", "paper-512", "constructor", 2 ** 21, NaN],
      ]
    ) {
      assertThrows(() => parseBudget(size), RangeError, "such as 64MiB");
    }
  });
});

describe("a cache's budget", () => {
  it("in bytes is as many tokens as fit, to a few hundredths, for every policy", async () => {
    using model = await loadTiny();
    for (const [policy, { select }] of policies) {
      if (select === "none") continue;
      for (const sequences of [1, 3]) {
        const options = { policy, sequences };
        using cache = model.createCache({ ...options, budget: "48KiB" });
        assertLessOrEqual(cache.bytes, sequences * 48 * 1024, policy);
        using larger = model.createCache({
          ...options,
          budget: Math.ceil(cache.capacity * 1.03) + 1,
        });
        assertGreater(larger.bytes, sequences * 48 * 1024, policy);
      }
    }
    assertThrows(
      () => model.createCache({ policy: "tova", budget: "100B" }),
      RangeError,
      "no room for a token",
    );
    assertThrows(
      () => model.createCache({ budget: "half" }),
      RangeError,
      "such as 64MiB",
    );
  });

  it("as a share is one of what a full cache would hold", async () => {
    using model = await loadTiny();
    using cache = model.createCache({ budget: "25%", capacity: 48 });
    assertEquals(cache.budget, 12);
    using whole = model.createCache({ budget: "50%" });
    assertEquals(whole.budget, model.config.context / 2);
    const ids = Array.from({ length: 60 }, (_, i) => i * 7 % 256);
    const rows = await Array.fromAsync(perplexity(model, ids, {
      window: 40,
      policies: ["full", "weighted-kv"],
      budgets: ["25%", 20],
    }));
    assertEquals(rows.map(({ budget }) => budget), [null, 10, 20]);
    // Of a generation: the prompt and the tokens that may follow.
    const pieces = generate(model, ids.slice(0, 30), {
      cache: { budget: "50%" },
      maxTokens: 10,
      ignoreEos: true,
    });
    let next = await pieces.next();
    while (!next.done) next = await pieces.next();
    assertEquals(next.value.cache.budget, 20);
  });

  it("of the paper protects what the paper does", async () => {
    using model = await loadTiny();
    using cache = model.createCache({ budget: "paper-256" });
    const { budget, sinks, recent } = cache;
    assertEquals([budget, sinks, recent], [256, 4, 124]);
    using large = model.createCache({ budget: "paper-1024" });
    assertEquals([large.sinks, large.recent], [4, 508]);
  });
});

/** Budgets of layers whose heads are alike. */
function layerBudgets(...given: Parameters<typeof headBudgets>): number[] {
  return headBudgets(...given).map(([own]) => own!);
}

describe("headBudgets()", () => {
  it("are PyramidKV's line, its inverse, or the same, at one total", () => {
    // From 2 m - m / 20 down to m / 20.
    assertEquals(layerBudgets("pyramid", 100, 5), [195, 148, 100, 52, 5]);
    assertEquals(layerBudgets("inverse", 100, 5), [5, 52, 100, 148, 195]);
    assertEquals(layerBudgets("constant", 100, 3), [100, 100, 100]);
    assertEquals(layerBudgets("pyramid", 100, 1), [100]);
    for (const kind of ["pyramid", "inverse"] as const) {
      for (const m of [1, 2, 3, 7, 20, 256, 1023]) {
        for (const layers of [1, 2, 3, 30, 126]) {
          const all = layerBudgets(kind, m, layers);
          assertEquals(all.reduce((a, b) => a + b), m * layers);
          assert(all.every((budget) => budget >= 1), `${all}`);
        }
      }
    }
    assertThrows(
      () => layerBudgets("funnel" as "pyramid", 10, 2),
      RangeError,
      "must be constant, pyramid, inverse or a list of a number a layer",
    );
  });

  it("are a list's shares, at the total of the budget", () => {
    assertEquals(layerBudgets([30, 10, 20], 20, 3), [30, 10, 20]);
    assertEquals(layerBudgets([3, 1, 2], 20, 3), [30, 10, 20]);
    assertEquals(layerBudgets([3, 1, 2], 7, 3), [11, 3, 7]);
    for (const m of [2, 3, 7, 20, 256, 1023]) {
      for (const layers of [1, 2, 3, 30, 126]) {
        const shares = Array.from(
          { length: layers },
          (_, i) => 20 + i * 7919 % 17,
        );
        const all = layerBudgets(shares, m, layers);
        const sum = shares.reduce((a, b) => a + b);
        assertEquals(all.reduce((a, b) => a + b), m * layers);
        all.forEach((budget, i) =>
          assert(Math.abs(budget - shares[i]! * m * layers / sum) < 1, `${all}`)
        );
      }
    }
    const wrong: [number[], string][] = [
      [[1, 2], "must be as many as the layers, 3: current value has 2"],
      [[100, 1, 100], "layer 1 has 1 of 201"],
      [[2, 0, 2], "layer 1 has 0 of 4"],
      [[2, -1, 2], "layer 1 has -1 of 3"],
      [[0, 0, 0], "layer 0 has 0 of 0"],
    ];
    for (const [shares, message] of wrong) {
      assertThrows(() => layerBudgets(shares, 20, 3), RangeError, message);
    }
  });

  it("give each layer the cache that it would have alone", async () => {
    using backend = await openBackend();
    const random = new Random(3);
    const layer = { heads: 4, kvHeads: 2, headDim: 16 };
    const few = { sinks: 0, recent: 1 };
    using all = openCache(backend, { ...layer, layers: 3 }, {
      ...few,
      budget: 20,
      layerBudgets: "inverse",
    });
    assertEquals(all.layerSlots, [1, 20, 39]);
    const alone = all.layerSlots.map((budget) =>
      openCache(backend, layer, { ...few, budget })
    );
    using out = new Tensor(backend, "F32", 1, 64);
    for (let step = 0; step < 60; step++) {
      assertEquals(all.room(), Math.max(0, 1 - step));
      using qkv = Tensor.from(backend, random.qkv(layer, 1));
      alone.forEach((one, i) => {
        one.attend(0, out, qkv);
        const right = out.floats();
        all.attend(i, out, qkv);
        assertEquals(out.floats(), right);
      });
    }
    alone.forEach((one, i) => {
      for (const head of [0, 1]) {
        assertEquals(all.rows(i, head), one.rows(0, head));
        assertEquals(all.slots(i, head), one.slots(0, head));
        assertEquals(all.values(i, head), one.values(0, head));
      }
      assertEquals(all.stats(0, i), one.stats());
      one.close();
    });
    // What stands for all is the layer that keeps the mean.
    assertEquals(all.stats().kept, 20);
    assertEquals(all.events().map(({ layer }) => layer), [0, 0, 1, 1, 2, 2]);
    all.reset();
    assertEquals([0, 1, 2].map((i) => all.stats(0, i).seen), [0, 0, 0]);
  });

  it("run through a model, and say which layer has no room", async () => {
    using model = await loadTiny({ layers: 3 });
    const ids = Array.from({ length: 60 }, (_, i) => i * 7 % 256);
    const rows = await Array.fromAsync(perplexity(model, ids, {
      window: 48,
      policies: ["weighted-kv"],
      budgets: [16],
      sinks: 0,
      recent: 1,
      layerBudgets: "pyramid",
      divergence: true,
    }));
    assertEquals(rows[0]!.layerSlots, [31, 16, 1]);
    assert(rows[0]!.kl! > 0);
    using listed = model.createCache({
      ...{ budget: 16, sinks: 0, recent: 1 },
      layerBudgets: [2, 1, 3],
    });
    assertEquals(listed.layerSlots, [16, 8, 24]);
    assertThrows(
      () =>
        model.createCache({ budget: 16, recent: 8, layerBudgets: "pyramid" }),
      RangeError,
      "Layer 2 of 3: The budget must be at least sinks + recent: 1 is less than",
    );
  });

  it("are checked for every row before the first one is run", async () => {
    using model = await loadTiny({ layers: 3 });
    const ids = Array.from({ length: 60 }, (_, i) => i * 7 % 256);
    const common = { layerBudgets: Array(3).fill([1, 3]), sinks: 0, recent: 1 };
    let fed = 0;
    const onProgress = () => fed++;
    await assertRejects(
      () =>
        Array.fromAsync(perplexity(model, ids, {
          ...{ ...common, window: 48, onProgress },
          ...{ policies: ["eviction", "tova"], budgets: [16] },
        })),
      RangeError,
      "The policy tova chooses for all KV heads",
    );
    await assertRejects(
      () =>
        Array.fromAsync(evaluate(model, {
          ...{ ...common, tasks: ["passkey"], lengths: [64], onProgress },
          ...{ policies: ["eviction", "tova"], budgets: [16] },
        })),
      RangeError,
      "The policy tova chooses for all KV heads",
    );
    assertEquals(fed, 0);
  });

  it("are shares of KV heads, at the total of all of them", () => {
    assertEquals(headBudgets("constant", 5, 2, 3), [[5, 5, 5], [5, 5, 5]]);
    assertEquals(headBudgets([1, 3], 4, 2, 2), [[2, 2], [6, 6]]);
    assertEquals(headBudgets([[1, 2], [3, 6]], 3, 2, 2), [[1, 2], [3, 6]]);
    assertEquals(headBudgets([[1, 3], 2], 20, 2, 2), [[10, 30], [20, 20]]);
    assertThrows(
      () => headBudgets([[1, 2, 3], 2], 9, 2, 2),
      RangeError,
      "The budgets of a layer must be one, or as many as its KV heads, 2: layer 0 has 3",
    );
    assertThrows(
      () => headBudgets([50, [100, 1]], 2, 2, 2),
      RangeError,
      "layer 1, KV head 1, has 1 of 201 at a budget of 2",
    );
    for (
      const junk of [[["3", "1"], 2], [null, 2], [NaN, 2], [[1n, 1n], 2], 5]
    ) {
      assertThrows(
        () => headBudgets(junk as number[], 2, 2, 2),
        TypeError,
        "The layer budgets must be",
      );
    }
  });

  for (
    const policy of ["weighted-kv", "eviction", "weighted-kv-ward", "snapkv"]
  ) {
    it(`let each KV head keep what a cache of its budget would, under ${policy}`, async () => {
      using backend = await openBackend();
      const layer = { heads: 6, kvHeads: 3, headDim: 16, layers: 3 };
      // The caches of the second layer's heads are opened in another order.
      const budgets = [[20, 6, 10], [10, 20, 6], [12, 12, 12]];
      const common = {
        ...{ policy, positions: "text" as const, sinks: 1, recent: 2 },
        ...{ interval: 1, sequences: 2 },
      };
      using all = openCache(backend, layer, {
        ...{ ...common, budget: 12, layerBudgets: budgets },
      });
      assertEquals(all.headSlots, budgets);
      assertEquals(all.layerSlots, [12, 12, 12]);
      assert(all.uneven);
      const alone = budgets.map((own) =>
        own.map((budget) => openCache(backend, layer, { ...common, budget }))
      );
      const random = new Random(3), width = 2 * 16;
      const run = (
        rows: number,
        feed: (cache: KvCache, at: number, out: Tensor, qkv: Tensor) => void,
      ) => {
        using qkv = Tensor.from(backend, random.qkv(layer, rows), rows);
        using out = new Tensor(backend, "F32", rows, 6 * 16);
        budgets.forEach((own, at) => {
          feed(all, at, out, qkv);
          const found = out.floats();
          own.forEach((_, head) => {
            feed(alone[at]![head]!, 0, out, qkv);
            const right = out.floats();
            for (let row = 0; row < rows; row++) {
              const from = row * 6 * 16 + head * width;
              assertLessOrEqual(
                relativeError(
                  found.subarray(from, from + width),
                  right.subarray(from, from + width),
                ),
                1e-5,
              );
            }
          });
        });
      };
      const step = () =>
        run(2, (cache, at, out, qkv) => cache.attend(at, out, qkv));
      for (let i = 0; i < 25; i++) step();
      if (policy !== "snapkv") {
        run(9, (cache, at, out, qkv) => cache.prefill(at, 1, out, qkv, 9));
      }
      for (let i = 0; i < 5; i++) step();
      budgets.forEach((own, at) =>
        own.forEach((budget, head) => {
          for (const sequence of [0, 1]) {
            const one = alone[at]![head]!;
            const { kept } = all.rows(at, head, sequence);
            assertEquals(kept, one.rows(0, head, sequence).kept);
            assertEquals(kept.length, budget);
            assertEquals(all.stats(sequence, at, head), one.stats(sequence));
          }
        })
      );
      assertEquals(all.layerKept(0), 12);
      assertEquals(all.events().length, 9);
      assertThrows(
        () => {
          using kv = new Tensor(backend, "F32", 2, 2 * 3 * 16);
          using weights = new Tensor(backend, "F32", 2, 3 * 13);
          all.insert(0, kv, weights);
        },
        RangeError,
        "The KV heads of layer 0 have budgets of their own",
      );
      alone.flat().forEach((cache) => cache.close());
    });
  }

  it("are refused where a policy chooses for all heads of a layer", async () => {
    using backend = await openBackend();
    const layer = { heads: 2, kvHeads: 2, headDim: 16 };
    assertThrows(
      () =>
        openCache(backend, layer, {
          policy: "tova",
          budget: 20,
          layerBudgets: [[1, 3]],
        }),
      RangeError,
      "The policy tova chooses for all KV heads of a layer at once",
    );
    assertThrows(
      () =>
        openCache(backend, layer, {
          budget: 20,
          recent: 8,
          layerBudgets: [[1, 9]],
        }),
      RangeError,
      "KV head 0 of 2 in layer 0 of 1: The budget must be at least sinks + recent",
    );
  });
});
