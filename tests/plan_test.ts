/** Tests of plans beside what the library holds: caches to the byte, a whole generation nearly so. */

import {
  assert,
  assertEquals,
  assertLessOrEqual,
  assertThrows,
} from "@std/assert";
import { type CacheOptions, generate, loadModel, policyNames } from "../mod.ts";
import {
  mostBudget,
  mostSequences,
  planMemory,
  type PlannedModel,
  plannedModel,
} from "../src/plan.ts";
import { openModelFile } from "../src/models/file.ts";
import { describe, it, testDevice } from "./device.ts";
import { LibraryCopy } from "./isolated.ts";
import { testModel } from "./model.ts";

const tiny = new URL("golden/models/", import.meta.url).pathname;

async function planned(path: string): Promise<PlannedModel> {
  using file = await openModelFile(path);
  return plannedModel(file);
}

describe("planMemory()", () => {
  it("counts caches to the byte, for every policy and shape", async () => {
    for (const name of ["llama", "gemma2", "gemma3", "phi3"]) {
      using model = await loadModel(tiny + name, { device: testDevice });
      const file = await planned(tiny + name);
      const all: CacheOptions[] = [
        ...policyNames().map((policy) => ({ policy, budget: 30 })),
        ...(["f32", "f16", "bf16"] as const).map((cacheType) => ({
          cacheType,
          budget: 21,
          sequences: 3,
        })),
        { layerBudgets: "pyramid", budget: 40, sinks: 0, recent: 1 },
        { policy: "full" },
        { policy: "full", positions: "text", capacity: 5 },
        { budget: 3, sinks: 0, recent: 1 },
      ];
      for (const options of all) {
        using cache = model.createCache(options);
        const plan = planMemory(file, { ...options, device: testDevice });
        assertEquals(
          plan.cache,
          cache.bytes,
          `${name} ${JSON.stringify(options)}`,
        );
      }
    }
  });

  it("counts what a generation takes", async () => {
    const name = await testModel();
    const file = await planned(name);
    const threads = 2;
    // What the library holds is counted a process: other tests' models too.
    await using copy = await LibraryCopy.make();
    using model = await loadModel(name, {
      device: testDevice,
      threads,
      library: copy.path,
    });
    const before = model.backend.memory - model.weightBytes;
    assertEquals(file.weights, model.weightBytes);
    const prompt = Array.from({ length: 600 }, (_, i) => 5 + i * 7 % 200);
    for (
      const options of [
        { budget: 1024 },
        { budget: 64, cacheType: "f32" },
        { policy: "full", capacity: 2048 },
      ] as const
    ) {
      using cache = model.createCache(options);
      const pieces = generate(model, prompt, {
        cache,
        maxTokens: 2,
        ignoreEos: true,
        prefill: "chunk:512",
      });
      for await (const _ of pieces);
      const plan = planMemory(file, {
        ...options,
        device: testDevice,
        threads,
      });
      const held = model.backend.memory;
      const off = (plan.total - held) / held;
      // Shared memory only grows: a later cache may need less than is held.
      assert(
        off > -0.02 - Math.max(0, before) / held && off < 0.1,
        `${JSON.stringify(options)}: planned ${plan.total}, held ${held}`,
      );
    }
  });
});

describe("mostBudget() and mostSequences()", () => {
  it("give the largest that fits, and null where none does", async () => {
    const file = await planned(tiny + "llama");
    const common = { sinks: 0, recent: 1 };
    for (const sequences of [1, 3]) {
      for (const budget of [1, 17, 63]) {
        const { total } = planMemory(file, { ...common, sequences, budget });
        const of = { ...common, sequences };
        assertEquals(mostBudget(file, total, of), budget);
        assertEquals(
          mostBudget(file, total - 1, of),
          budget === 1 ? null : budget - 1,
        );
        assertEquals(
          mostSequences(file, total, { ...common, budget }),
          sequences,
        );
      }
    }
    // What full has room for is planned as a budget is.
    const full = { policy: "full", capacity: 17 };
    const room = planMemory(file, full).total;
    assertEquals(mostBudget(file, room, { policy: "full" }), 17);
    assertEquals(mostBudget(file, room - 1, { policy: "full" }), 16);
    assertEquals(mostSequences(file, room, full), 1);
    // Five are protected by default.
    const { total } = planMemory(file, { budget: 5 });
    assertEquals(mostBudget(file, total), 5);
    assertEquals(mostBudget(file, total - 1), null);
    assertThrows(() => mostBudget(file, 1e9, { recent: 99 }), RangeError);
    assertEquals(mostSequences(file, 1e15, { budget: 16 }), 4096);
    assertEquals(mostBudget(file, 1e15), 64);
    assertLessOrEqual(file.weights, 2e5);
  });
});
