/** Tests of budgets in other words than tokens (shares, bytes, presets), and of budgets spread over the layers. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertLessOrEqual,
  assertThrows,
} from "@std/assert";
import { generate, perplexity, policies } from "../mod.ts";
import { Tensor } from "../src/backend/tensor.ts";
import { layerBudgets, parseBudget } from "../src/cache/budget.ts";
import { openCache } from "../src/selftest/layer.ts";
import { Random } from "../src/selftest/numbers.ts";
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

describe("layerBudgets()", () => {
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
      "must be constant, pyramid, inverse or a number a layer",
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
});
