/** Tests of plans beside what the library holds: caches to the byte, a whole generation nearly so. */

import {
  assert,
  assertEquals,
  assertLessOrEqual,
  assertThrows,
} from "@std/assert";
import {
  type CacheOptions,
  generate,
  loadModel,
  policyNames,
  Session,
} from "../mod.ts";
import {
  mostBudget,
  mostSequences,
  planMemory,
  type PlannedModel,
  plannedModel,
  type PlanOptions,
} from "../src/plan.ts";
import { openModelFile } from "../src/models/file.ts";
import { describe, it, testDevice } from "./device.ts";
import { LibraryCopy } from "./isolated.ts";
import { testModel } from "./model.ts";
import { tinyModel } from "./tiny_model.ts";

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
        {
          // A number a KV head.
          layerBudgets: Array(model.config.layers).fill(
            Array.from({ length: model.config.kvHeads }, (_, i) => 2 + i),
          ),
          ...{ budget: 40, sinks: 0, recent: 1 },
        },
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
    const prompt = Array.from({ length: 600 }, (_, i) => 5 + i * 7 % 200);
    for (
      const options of [
        { budget: 1024 },
        { budget: 64, cacheType: "f32", chunk: 512 },
        { policy: "full", capacity: 1024 },
      ] as const
    ) {
      // What the library holds is counted a process, and shared memory only grows.
      await using copy = await LibraryCopy.make();
      using model = await loadModel(name, {
        device: testDevice,
        threads,
        library: copy.path,
      });
      assertEquals(file.weights, model.weightBytes);
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
      assert(
        off > -0.02 && off < 0.1,
        `${JSON.stringify(options)}: planned ${plan.total}, held ${held}`,
      );
    }
  });
});

/** Bytes that the library holds once a sequence's prompt was fed, which are enough for each sequence's, and all took two steps. */
async function heldBy(
  name: string,
  { chunk = null, ...options }: PlanOptions,
): Promise<number> {
  await using copy = await LibraryCopy.make();
  using model = await loadModel(name, { ...options, library: copy.path });
  using cache = model.createCache(options);
  using session = new Session(model, cache);
  session.setSampler({});
  // Of a prompt of 600 tokens what goes in passes.
  for (let at = 0, rows; at < 600; at += rows) {
    rows = Math.min(session.passRows(chunk), 600 - at);
    if (rows === 1) break;
    const ids = Int32Array.from({ length: rows }, (_, i) => 5 + i * 7 % 200);
    await session.feedPass(0, ids);
  }
  await session.feed(new Int32Array(cache.sequences).fill(9));
  await session.next();
  return model.backend.memory;
}

// On a GPU the room for passes is a bound from above.
if (testDevice === "cpu") {
  describe("planMemory() of sequences side by side", () => {
    it("counts what they take, the weights aside", async () => {
      const folder = await Deno.makeTempDir({ prefix: "wkv_plan_" });
      const small = `${folder}/small.gguf`;
      const shape = { width: 256, hidden: 512, heads: 8, kvHeads: 4 };
      await Deno.writeFile(small, tinyModel({ ...shape, context: 4096 }).bytes);
      const cases: PlanOptions[] = [
        { budget: 64 },
        { budget: 64, chunk: 512 },
        { budget: 1024 },
        { budget: 256, cacheType: "f32", policy: "tova" },
        // Tokens of these go one by one.
        { budget: 256, policy: "snapkv" },
        { budget: 1024, policy: "scissorhands" },
        { budget: 1024, layerBudgets: [[1, 1, 1, 9], [2, 4, 2, 4]] },
        { policy: "full", capacity: 1024 },
      ];
      const all: [string, PlanOptions][] = cases.map((one) => [small, one]);
      for (
        const [name, one] of [...all, [await testModel(), cases[0]!] as const]
      ) {
        const file = await planned(name);
        for (const sequences of [1, 4, 16]) {
          const options = { ...one, sequences, threads: 2 };
          const held = await heldBy(name, options) - file.weights;
          const plan = planMemory(file, options).total - file.weights;
          const off = (plan - held) / held;
          assert(
            Math.abs(off) < 0.02,
            `${name} ${JSON.stringify(options)}: planned ${plan}, held ${held}`,
          );
        }
      }
      await Deno.remove(folder, { recursive: true });
    });
  });
}

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
