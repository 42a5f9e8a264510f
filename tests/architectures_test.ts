/** Every architecture beside transformers and llama.cpp, on the tiny models of golden/models: logits at every position, fed at once and token by token. */

import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import { type CacheOptions, generate, loadModel, type Model } from "../mod.ts";
import { Tensor } from "../src/backend/tensor.ts";
import { PASS_ROWS } from "../src/model.ts";
import * as architectures from "../src/models/mod.ts";
import { Session } from "../src/session.ts";
import { describe, it, testDevice } from "./device.ts";
import { ggufModels, tinyGguf } from "./tiny_gguf.ts";
import { loadBytes } from "./tiny_model.ts";

const folder = new URL("golden/models/", import.meta.url).pathname;
const names = [...Deno.readDirSync(folder)].filter((entry) => entry.isDirectory)
  .map(({ name }) => name).sort();

interface Golden {
  tokens: number[];
  /** `[tokens, vocabulary]`. */
  logits: Float32Array;
}

async function golden(name: string): Promise<Golden> {
  const { tokens, logits } = JSON.parse(
    await Deno.readTextFile(`${folder}${name}.json`),
  );
  const bytes = Uint8Array.from(atob(logits), (c) => c.charCodeAt(0));
  return { tokens, logits: new Float32Array(bytes.buffer) };
}

/** The largest of all positions' ||a - b|| / ||b||. */
function furthest(a: Float32Array, b: Float32Array, columns: number): number {
  assertEquals(a.length, b.length);
  let worst = 0;
  for (let from = 0; from < b.length; from += columns) {
    let off = 0, norm = 0;
    for (let i = from; i < from + columns; i++) {
      off += (a[i]! - b[i]!) ** 2;
      norm += b[i]! ** 2;
    }
    const distance = Math.sqrt(off / norm);
    assert(Number.isFinite(distance));
    worst = Math.max(worst, distance);
  }
  return worst;
}

/** Logits of all positions, fed at once and one by one, of a model whose vocabulary has 256 tokens. */
async function bothWays(
  model: Model,
  tokens: readonly number[],
): Promise<{ passed: Float32Array; stepped: Float32Array }> {
  const { backend, network, config, activations: precision } = model;
  const rows = tokens.length;
  const options = { policy: "full", cacheType: "f32", capacity: rows } as const;
  using atOnce = model.createCache(options);
  using ids = Tensor.from(backend, Int32Array.from(tokens));
  using logits = new Tensor(backend, "F32", rows, config.vocabulary);
  using graph = backend.record(() =>
    network.forward({
      cache: atOnce,
      tokens: ids,
      rows,
      sequence: 0,
      logits,
      activations: model.memory(PASS_ROWS.cpu),
      precision,
    })
  );
  await graph.run();
  using stepwise = model.createCache(options);
  using session = new Session(model, stepwise);
  const steps: number[] = [];
  for (const id of tokens) {
    steps.push(...await session.logits(Int32Array.of(id)));
  }
  return { passed: logits.floats(), stepped: Float32Array.from(steps) };
}

describe("logits as transformers gives them", () => {
  for (const name of names) {
    it(name, async () => {
      const { tokens, logits: right } = await golden(name);
      using model = await loadModel(folder + name, {
        device: testDevice,
        activations: "f32",
      });
      const { passed, stepped } = await bothWays(model, tokens);
      const { vocabulary } = model.config;
      const errors = [passed, stepped].map((logits) =>
        furthest(logits, right, vocabulary)
      );
      assert(Math.max(...errors) <= 1e-3, `at once, by steps: ${errors}`);
    });
  }

  for (const name of ["gemma3", "olmo2", "phi3", "qwen3"]) {
    it(`${name}, its KV heads repeated for each query head`, async () => {
      const { tokens, logits: right } = await golden(name);
      using model = await loadModel(folder + name, {
        device: testDevice,
        activations: "f32",
        kvHeads: "query",
      });
      assertEquals(model.config.kvHeads, model.config.heads);
      const { stepped } = await bothWays(model, tokens);
      const error = furthest(stepped, right, model.config.vocabulary);
      assert(error <= 1e-3, `${error}`);
    });
  }

  it("there is a model of every architecture", () => {
    for (const { name } of Object.values(architectures)) {
      assert(names.some((tiny) => tiny.split("-")[0] === name), name);
    }
  });
});

describe("probabilities as llama.cpp gives them, from GGUF files", () => {
  for (const name of ggufModels) {
    it(name, async () => {
      const { tokens } = await golden(name);
      const { logProbs } = JSON.parse(
        await Deno.readTextFile(`${folder}${name}.llamacpp.json`),
      );
      const right = new Float32Array(
        Uint8Array.from(atob(logProbs), (c) => c.charCodeAt(0)).buffer,
      );
      using model = await loadBytes(await tinyGguf(name), {
        activations: "f32",
      });
      const { passed, stepped } = await bothWays(model, tokens);
      const { vocabulary } = model.config;
      const errors = [passed, stepped].map((logits) =>
        furthest(logSoftmax(logits, vocabulary), right, vocabulary)
      );
      assert(Math.max(...errors) <= 1e-3, `at once, by steps: ${errors}`);
    });
  }
});

/** The logarithms of all probabilities, row by row. */
function logSoftmax(logits: Float32Array, columns: number): Float32Array {
  return logits.map((x, i) => {
    const from = i - i % columns;
    const row = logits.subarray(from, from + columns);
    const most = row.reduce((a, b) => Math.max(a, b));
    const sum = row.reduce((a, b) => a + Math.exp(b - most), 0);
    return x - most - Math.log(sum);
  });
}

describe("a Hugging Face folder", () => {
  it("continues token ids, and says that it reads no text yet", async () => {
    using model = await loadModel(`${folder}llama`, { device: testDevice });
    let tokens = 0;
    for await (
      const _ of generate(model, [5, 6, 7], { maxTokens: 4, ignoreEos: true })
    ) tokens++;
    assertEquals(tokens, 4);
    await assertRejects(
      async () => {
        for await (const _ of generate(model, "text"));
      },
      RangeError,
      "put the model's there, or give the library token ids",
    );
  });
});

describe("layers with a sliding window", () => {
  it("follow the policy below it, and keep it whole from there on", async () => {
    using model = await loadModel(`${folder}gemma2`, { device: testDevice });
    const slots = (options: CacheOptions) => {
      using cache = model.createCache(options);
      return cache.layerSlots;
    };
    // Of 8 tokens, the new one counted, in layers 0 and 2.
    assertEquals(slots({ budget: 7 }), [7, 7, 7]);
    assertEquals(slots({ budget: 8 }), [7, 8, 7]);
    assertEquals(slots({ budget: 40 }), [7, 40, 7]);
    assertEquals(slots({ policy: "full", capacity: 8 }), [8, 8, 8]);
    assertEquals(slots({ policy: "full" }), [7, 64, 7]);
    assertEquals(slots({ budget: 40, positions: "text" }), [7, 40, 7]);
    assertThrows(
      () => model.createCache({ budget: 7, positions: "text" }),
      RangeError,
      "layer 0 looks back on 8 tokens of the text",
    );
    using cache = model.createCache({ policy: "full", cacheType: "f32" });
    const { kvHeads, headDim } = model.config;
    assertEquals(cache.fullBytes(20), (7 + 20 + 7) * 2 * kvHeads * headDim * 4);
  });

  it("hold the last tokens, whatever the policy keeps elsewhere", async () => {
    using model = await loadModel(`${folder}gemma3`, { device: testDevice });
    const { tokens } = await golden("gemma3");
    for (const prefill of ["exact", "chunk:5"] as const) {
      using cache = model.createCache({ budget: 12, sinks: 2, recent: 4 });
      using session = new Session(model, cache);
      await session.prompt(tokens, { prefill });
      assertEquals(cache.layerSlots, [7, 7, 7, 7, 7, 12, 7]);
      for (const layer of [0, 4, 6]) {
        assertEquals(
          cache.rows(layer, 0).kept,
          [17, 18, 19, 20, 21, 22, 23],
          `layer ${layer}, ${prefill}`,
        );
        assertEquals(cache.stats(0, layer).evicted, 17);
      }
      assertEquals(cache.rows(5, 0).kept.slice(0, 2), [0, 1]);
      assertEquals(cache.stats(), {
        seen: 24,
        kept: 12,
        merged: 12,
        evicted: 0,
      });
      assertEquals(cache.room(), 0);
      cache.reset();
      assertEquals(cache.stats(0, 0).kept, 0);
      assertEquals(cache.room(), 12);
    }
  });

  it("see no further in a chunk than one by one", async () => {
    using model = await loadModel(`${folder}mistral-window`, {
      device: testDevice,
      activations: "f32",
    });
    const { tokens, logits } = await golden("mistral-window");
    const { vocabulary } = model.config;
    for (const chunks of [[24], [3, 1, 20], [10, 7, 7]]) {
      using cache = model.createCache({ budget: 20, cacheType: "f32" });
      using session = new Session(model, cache);
      let at = 0;
      for (const rows of chunks) {
        const last = at + rows === tokens.length ? 1 : 0;
        const ids = Int32Array.from(tokens.slice(at, at + rows - last));
        if (ids.length > 0) await session.feedPass(0, ids);
        at += rows;
      }
      const found = await session.logits(Int32Array.of(tokens.at(-1)!));
      const error = furthest(found, logits.slice(-vocabulary), vocabulary);
      assert(error <= 1e-3, `${chunks}: ${error}`);
    }
  });
});
