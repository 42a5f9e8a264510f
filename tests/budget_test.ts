/** Tests of budgets in other words than tokens: shares, bytes, presets. */

import {
  assertEquals,
  assertGreater,
  assertLessOrEqual,
  assertThrows,
} from "@std/assert";
import { generate, perplexity, policies } from "../mod.ts";
import { parseBudget } from "../src/cache/budget.ts";
import { loadTiny } from "./tiny_model.ts";
import { describe, it } from "./device.ts";

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
