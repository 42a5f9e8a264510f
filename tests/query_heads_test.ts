/** Tests of `kvHeads: "query"`: a model whose KV heads are repeated is one that was written with as many. */

import {
  assertEquals,
  assertGreater,
  assertLess,
  assertNotEquals,
  assertRejects,
} from "@std/assert";
import { loadModel, type Model, policies, Session } from "../mod.ts";
import type { TensorInput } from "./gguf_writer.ts";
import { loadBytes, tinyModel, type TinyOptions } from "./tiny_model.ts";
import { describe, it } from "./device.ts";

const shape: TinyOptions = { width: 48, heads: 6, kvHeads: 2, context: 128 };

/** The same model with each KV head written once for each of its query heads. */
function repeated(type?: TinyOptions["type"]): Uint8Array<ArrayBuffer> {
  const all = new Map<string, TensorInput>();
  tinyModel({
    ...shape,
    ...(type ? { type } : {}),
    change: (tensors) =>
      tensors.forEach((tensor, name) => all.set(name, tensor)),
  });
  return tinyModel({
    ...shape,
    kvHeads: 6,
    ...(type ? { type } : {}),
    change(tensors) {
      for (const [name, tensor] of all) {
        if (!/attn_[kv]\.weight$/.test(name)) {
          tensors.set(name, tensor);
          continue;
        }
        const bytes = new Uint8Array(
          tensor.data!.buffer,
          tensor.data!.byteOffset,
          tensor.data!.byteLength,
        );
        const head = bytes.length / 2;
        const data = new Uint8Array(6 * head);
        for (let h = 0; h < 6; h++) {
          const from = Math.floor(h / 3) * head;
          data.set(bytes.subarray(from, from + head), h * head);
        }
        tensors.set(name, {
          ...tensor,
          shape: [tensor.shape[0]!, 6 * 8],
          data,
        });
      }
    },
  }).bytes;
}

const text = Array.from({ length: 60 }, (_, i) => (i * i * 7 + 3 * i) % 256);

/** The logits behind a text, and the places that each head of layer 0 keeps. */
async function run(
  model: Model,
  policy: string,
): Promise<{ logits: Float32Array[]; kept: number[][] }> {
  using cache = model.createCache({
    policy,
    ...(policy === "full" ? {} : { budget: 24 }),
    cacheType: "f32",
  });
  using session = new Session(model, cache);
  const logits: Float32Array[] = [];
  for (const id of text) logits.push(await session.logits(Int32Array.of(id)));
  const kept = Array.from(
    { length: model.config.kvHeads },
    (_, head) => cache.rows(0, head).kept,
  );
  return { logits, kept };
}

describe("kvHeads: query", () => {
  it("is the same function with a full cache", async () => {
    const { bytes } = tinyModel(shape);
    using own = await loadBytes(bytes, { activations: "f32" });
    using query = await loadBytes(bytes, {
      activations: "f32",
      kvHeads: "query",
    });
    assertEquals([own.config.kvHeads, query.config.kvHeads], [2, 6]);
    const [a, b] = [await run(own, "full"), await run(query, "full")];
    a.logits.forEach((row, i) => {
      const most = row.reduce((x, y) => Math.max(x, Math.abs(y)), 0);
      row.forEach((x, j) => {
        assertLess(Math.abs(x - b.logits[i]![j]!) / most, 1e-5);
      });
    });
    using small = own.createCache({ budget: 24 });
    using large = query.createCache({ budget: 24 });
    assertGreater(large.bytes, 2.5 * small.bytes);
  });

  for (const policy of policies.keys()) {
    it(`runs ${policy} as a model written with a KV head a query head`, async () => {
      using query = await loadBytes(tinyModel(shape).bytes, {
        kvHeads: "query",
      });
      using written = await loadBytes(repeated());
      const [a, b] = [await run(query, policy), await run(written, policy)];
      assertEquals(a, b);
      // Heads of a group see the same keys and values, and choose for themselves.
      const alike = ["full", "streaming-llm", "lm-infinite", "cam"]
        .concat("tova", "knorm", "keydiff");
      if (!alike.includes(policy)) assertNotEquals(a.kept[0], a.kept[1]);
    });
  }

  it("repeats quantised rows as they are", async () => {
    const options: TinyOptions = {
      ...shape,
      width: 64,
      heads: 8,
      type: (name) => name.includes("attn_v") ? "Q8_0" : "Q4_1",
      hidden: 64,
    };
    const { bytes } = tinyModel(options);
    using own = await loadBytes(bytes);
    using query = await loadBytes(bytes, { kvHeads: "query" });
    const [a, b] = [await run(own, "full"), await run(query, "full")];
    const [x, y] = [a.logits.at(-1)!, b.logits.at(-1)!];
    const most = x.reduce((m, v) => Math.max(m, Math.abs(v)), 0);
    x.forEach((v, j) => assertLess(Math.abs(v - y[j]!) / most, 1e-5));
  });

  it("refuses other words", async () => {
    await assertRejects(
      () => loadModel("x", { kvHeads: "group" as "query" }),
      RangeError,
      "must be model or query",
    );
  });
});
