/** Every architecture beside transformers, on the tiny models of golden/models: logits at every position, fed at once and token by token. */

import { assert, assertEquals, assertRejects } from "@std/assert";
import { generate, loadModel } from "../mod.ts";
import { Tensor } from "../src/backend/tensor.ts";
import { PASS_ROWS } from "../src/model.ts";
import * as architectures from "../src/models/mod.ts";
import { Session } from "../src/session.ts";
import { describe, it, testDevice } from "./device.ts";

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

describe("logits as transformers gives them", () => {
  for (const name of names) {
    it(name, async () => {
      const { tokens, logits: right } = await golden(name);
      using model = await loadModel(folder + name, {
        device: testDevice,
        activations: "f32",
      });
      const { backend, network, config, activations: precision } = model;
      const open = () =>
        model.createCache({
          policy: "full",
          cacheType: "f32",
          capacity: tokens.length,
        });
      const rows = tokens.length;
      using atOnce = open();
      using ids = Tensor.from(backend, Int32Array.from(tokens));
      using logits = new Tensor(backend, "F32", rows, config.vocabulary);
      using graph = backend.record(() =>
        network.forward({
          cache: atOnce,
          tokens: ids,
          rows,
          sequence: 0,
          logits,
          activations: model.memory(PASS_ROWS),
          precision,
        })
      );
      await graph.run();
      const passed = furthest(logits.floats(), right, config.vocabulary);
      using stepwise = open();
      using session = new Session(model, stepwise);
      const steps: number[] = [];
      for (const id of tokens) {
        steps.push(...await session.logits(Int32Array.of(id)));
      }
      const stepped = furthest(
        Float32Array.from(steps),
        right,
        config.vocabulary,
      );
      assert(passed <= 1e-3, `at once: ${passed}`);
      assert(stepped <= 1e-3, `token by token: ${stepped}`);
    });
  }

  it("there is a model of every architecture", () => {
    for (const { name } of Object.values(architectures)) {
      assert(names.some((tiny) => tiny.split("-")[0] === name), name);
    }
  });
});

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
      "give token ids instead of text",
    );
  });

  it("a cache beyond the sliding window is refused", async () => {
    using model = await loadModel(`${folder}mistral`, { device: testDevice });
    model.createCache({ budget: 31 }).close();
    for (
      const options of [
        { budget: 32 },
        { budget: 16, positions: "text" },
        { policy: "full" },
      ] as const
    ) {
      await assertRejects(
        async () => await model.createCache(options),
        RangeError,
        "look back on 32 tokens",
      );
    }
    using cache = model.createCache({ budget: 30 });
    using session = new Session(model, cache);
    await session.prompt(Array.from({ length: 30 }, (_, i) => i));
    await assertRejects(
      () => session.prompt([1, 2, 3, 4], { prefill: "chunk:4" }),
      RangeError,
      "take smaller chunks",
    );
  });
});
