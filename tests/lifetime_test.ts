/** What owns memory: closed once or twice, used after, left behind, opened a thousand times. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertInstanceOf,
  assertLess,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { Backend } from "../src/backend/backend.ts";
import { WkvError } from "../src/backend/error.ts";
import { embed, linear } from "../src/backend/ops.ts";
import { wkv_status } from "../src/backend/symbols.ts";
import { Tensor } from "../src/backend/tensor.ts";
import { generate } from "../src/generate.ts";
import { loadModel } from "../src/model.ts";
import { type Layer, openCache, qkvWidth } from "../src/selftest/layer.ts";
import { matrix } from "../src/selftest/matrix.ts";
import { Random } from "../src/selftest/numbers.ts";
import { afterAll, beforeAll, describe, it } from "./device.ts";
import { LibraryCopy, runScript } from "./isolated.ts";

const layer: Layer = { heads: 4, kvHeads: 2, headDim: 16 };

// Handles are counted by library: this file's tests count their own.
let copy: LibraryCopy;
beforeAll(async () => {
  copy = await LibraryCopy.make();
});
afterAll(() => copy?.[Symbol.asyncDispose]());

const open = (threads = 1) => Backend.open({ library: copy.path, threads });

/** Handles that are open, asked through a backend that adds one itself. */
async function live(): Promise<number> {
  using backend = await open();
  return backend.liveHandles - 1;
}

/** A graph that takes some tens of milliseconds, and what it uses. */
function slowGraph(backend: Backend) {
  const x = new Tensor(backend, "F32", 64, 512);
  const w = new Tensor(backend, "F32", 512, 512);
  const out = new Tensor(backend, "F32", 64, 512);
  const graph = backend.record(() => {
    for (let i = 0; i < 40; i++) {
      linear(backend, out, x, w, { rows: 64, precision: "f32" });
    }
  });
  return { graph, x, w, out };
}

describe("close()", () => {
  it("is done by `using`, and a second time does nothing", async () => {
    const before = await live();
    {
      using backend = await open();
      using tensor = new Tensor(backend, "F32", 2, 2);
      using cache = openCache(backend, layer, { budget: 8 });
      using out = new Tensor(backend, "F32", 1, 64);
      using qkv = new Tensor(backend, "F32", 1, qkvWidth(layer));
      using graph = backend.record(() => cache.attend(0, out, qkv));
      assertEquals(backend.liveHandles, before + 6);
      for (const owner of [graph, qkv, out, cache, tensor, backend]) {
        owner.close();
        owner.close();
      }
    }
    assertEquals(await live(), before);
  });

  it("of the backend closes what it opened, in whatever order", async () => {
    const before = await live();
    const backend = await open();
    const tensor = new Tensor(backend, "F32", 2, 2);
    const cache = openCache(backend, layer, { budget: 8 });
    const graph = backend.record(() => {});
    backend.close();
    assertEquals(await live(), before);
    for (const owner of [tensor, cache, graph]) owner.close();
    assertEquals(await live(), before);
  });

  it("of one backend leaves another's alone", async () => {
    using one = await open();
    const other = await open();
    using tensor = Tensor.from(one, Float32Array.of(1, 2));
    other.close();
    assertEquals([...tensor.floats()], [1, 2]);
  });

  it("of a cache keeps its rotation as long as it is needed", async () => {
    using backend = await open();
    const before = backend.liveHandles;
    using cache = openCache(backend, layer, { budget: 8 });
    // The rotation's own handle is closed already.
    assertEquals(backend.liveHandles, before + 1);
    using out = new Tensor(backend, "F32", 1, 64);
    using qkv = new Tensor(backend, "F32", 1, qkvWidth(layer));
    cache.attend(0, out, qkv);
    assertEquals(cache.stats().seen, 1);
  });
});

describe("use after close", () => {
  it("of a backend throws", async () => {
    const backend = await open();
    const tensor = new Tensor(backend, "F32", 2, 2);
    const cache = openCache(backend, layer, { budget: 8 });
    const graph = backend.record(() => {});
    backend.close();
    const text = "The backend is closed";
    assertThrows(() => backend.liveHandles, Error, text);
    assertThrows(() => new Tensor(backend, "F32", 1, 1), Error, text);
    assertThrows(() => tensor.floats(), Error, text);
    assertThrows(() => tensor.write(new Float32Array(4)), Error, text);
    assertThrows(() => cache.stats(), Error, text);
    assertThrows(() => backend.record(() => {}), Error, text);
    await assertRejects(() => graph.run(), Error, text);
  });

  it("of a cache throws", async () => {
    using backend = await open();
    using out = new Tensor(backend, "F32", 1, 64);
    using qkv = new Tensor(backend, "F32", 1, qkvWidth(layer));
    const cache = openCache(backend, layer, { budget: 8 });
    cache.close();
    assert(cache.closed);
    const text = "The cache is closed";
    assertThrows(() => cache.attend(0, out, qkv), Error, text);
    assertThrows(() => cache.prefill(0, 0, out, qkv, 1), Error, text);
    assertThrows(() => cache.insert(0, out, qkv), Error, text);
    assertThrows(() => cache.stats(), Error, text);
    assertThrows(() => cache.rows(0, 0), Error, text);
    assertThrows(() => cache.reset(), Error, text);
  });

  it("of a tensor or a graph is refused by the library", async () => {
    using backend = await open();
    const tensor = new Tensor(backend, "F32", 2, 2);
    tensor.close();
    assertThrows(() => tensor.floats(), WkvError, "closed");
    using ids = new Tensor(backend, "I32", 1, 1);
    using out = new Tensor(backend, "F32", 1, 2);
    assertThrows(
      () => embed(backend, out, tensor, ids, { rows: 1 }),
      WkvError,
      "closed",
    );
    const graph = backend.record(() => {});
    graph.close();
    await assertRejects(() => graph.run(), WkvError, "closed");
    // Not even when another object has taken its place.
    using _ = new Tensor(backend, "F32", 2, 2);
    using again = backend.record(() => {});
    assertThrows(() => tensor.floats(), WkvError, "closed");
    await assertRejects(() => graph.run(), WkvError, "closed");
    await again.run();
  });
});

describe("a graph", () => {
  it("keeps what it uses until it is closed itself", async () => {
    using backend = await open();
    const table = Tensor.from(backend, Float32Array.of(1, 2, 3, 4), 2);
    const ids = Tensor.from(backend, Int32Array.of(1));
    using out = new Tensor(backend, "F32", 1, 2);
    const before = backend.liveHandles;
    using graph = backend.record(() =>
      embed(backend, out, table, ids, { rows: 1 })
    );
    table.close();
    ids.close();
    assertEquals(backend.liveHandles, before + 1 - 2);
    await graph.run();
    assertEquals([...out.floats()], [3, 4]);
  });

  it("is closed when what is recorded throws", async () => {
    using backend = await open();
    using tensor = new Tensor(backend, "F32", 1, 2);
    const before = backend.liveHandles;
    const stop = new Error("stop");
    const thrown = assertThrows(() =>
      backend.record(() => {
        throw stop;
      })
    );
    assertEquals(thrown, stop);
    assertThrows(
      () =>
        backend.record(() =>
          embed(backend, tensor, tensor, tensor, { rows: 9 })
        ),
      WkvError,
      "wkv_embed",
    );
    assertEquals(backend.liveHandles, before);
    using graph = backend.record(() => {});
    await graph.run();
  });

  it("runs to its end when it or the backend is closed meanwhile", async () => {
    const before = await live();
    // On a GPU, one run is looked after, several are waited for by a thread.
    for (const [threads, times] of [[1, 3], [2, 3], [2, 1]] as const) {
      for (const what of ["graph", "tensors", "backend"] as const) {
        const backend = await open(threads);
        const { graph, x, w, out } = slowGraph(backend);
        const run = graph.run(times);
        if (what === "backend") backend.close();
        else if (what === "graph") graph.close();
        else for (const tensor of [x, w, out]) tensor.close();
        try {
          await run;
        } catch (error) {
          // The run starts on a thread of its own, perhaps after close().
          assertEquals(what, "graph");
          assertInstanceOf(error, WkvError);
          assertStringIncludes(error.message, "closed");
        }
        backend.close();
        assertEquals(
          await live(),
          before,
          `${what}, ${threads} threads, ${times}`,
        );
      }
    }
  });

  it("runs after another, however many are asked for at once", async () => {
    using backend = await open();
    using cache = openCache(backend, layer, { budget: 8 });
    using out = new Tensor(backend, "F32", 1, 64);
    using qkv = new Tensor(backend, "F32", 1, qkvWidth(layer));
    using graph = backend.record(() => cache.attend(0, out, qkv));
    await Promise.all(Array.from({ length: 100 }, () => graph.run(3)));
    assertEquals(cache.stats().seen, 300);
  });

  it("runs beside another backend's, whichever takes the whole device", async () => {
    const made = async () => {
      const backend = await open(2), random = new Random(7);
      const [first, second] = [1024, 640].map((rows, i) =>
        matrix(backend, random, "BF16", rows, i ? 1024 : 512).tensor
      ) as [Tensor, Tensor];
      const x = Tensor.from(backend, random.normals(512));
      const inner = new Tensor(backend, "F32", 1, 1024);
      const out = new Tensor(backend, "F32", 1, 640);
      const once = { rows: 1, precision: "f32" } as const;
      const graph = backend.record(() => {
        linear(backend, inner, x, first, once);
        linear(backend, out, inner, second, once);
      });
      return { backend, graph, out };
    };
    // As large weights are taken, on a GPU.
    Deno.env.set("WKV_CUDA_GRID_MB", "0");
    using _ = {
      [Symbol.dispose]: () => Deno.env.delete("WKV_CUDA_GRID_MB"),
    };
    const one = await made(), both = [one, await made()];
    using _one = one.backend, _other = both[1]!.backend;
    await one.graph.run();
    const expected = one.out.floats();
    assert(expected.some((y) => y !== 0));
    for (let i = 0; i < 3; i++) {
      await Promise.all(both.map(({ graph }) => graph.run(100)));
      for (const { out } of both) assertEquals(out.floats(), expected);
    }
  });

  it("left behind goes with its backend", async () => {
    const before = await live();
    {
      using backend = await open();
      for (let i = 0; i < 50; i++) {
        const tensor = new Tensor(backend, "F32", 1, 2);
        backend.record(() => {});
        assertGreater(tensor.handle, 0);
      }
      assertEquals(backend.liveHandles, before + 101);
    }
    assertEquals(await live(), before);
  });
});

describe("a thousand times", () => {
  // In processes of their own, as memory is counted by the process. A cycle
  // that kept a megabyte would keep a gigabyte.
  const grows = async (script: string): Promise<number> => {
    const { code, stdout, stderr } = await runScript(
      `const path = ${JSON.stringify(copy.path)};
${script}
for (let i = 0; i < 200; i++) await cycle();
const settled = Deno.memoryUsage().rss;
for (let i = 0; i < 1000; i++) await cycle();
console.log(Deno.memoryUsage().rss - settled);
`,
      [`--allow-ffi=${copy.path}`],
    );
    assertEquals(code, 0, stderr);
    return Number(stdout);
  };

  it("a context opens and closes with flat memory, its threads too", async () => {
    // One dlopen for all: Deno frees its own part of it late.
    const growth = await grows(`
import { symbols } from "src/backend/symbols.ts";
const { symbols: call } = Deno.dlopen(path, symbols);
const ok = (status: number) => {
  if (status !== 0) throw new Error("status " + status);
};
const row = new Float32Array(1024).fill(1);
const out = new Int32Array(1);
function cycle() {
  ok(call.wkv_context_open(2, out, 4));
  const context = out[0]!;
  ok(call.wkv_tensor_open(context, 0, 256, 1024, out, 4));
  const x = out[0]!;
  ok(call.wkv_tensor_write(context, x, 7, 1, row, 4096));
  ok(call.wkv_rmsnorm(context, x, x, 256, x, 1e-5, 0));
  ok(call.wkv_graph_begin(context));
  ok(call.wkv_rmsnorm(context, x, x, 256, x, 1e-5, 0));
  ok(call.wkv_graph_end(context, out, 4));
  ok(call.wkv_close(context, context));
  if (call.wkv_live_handles() !== 0) throw new Error("handles are open");
}`);
    assertLess(growth, 16e6);
  });

  it("tensors, caches and graphs open and close with flat memory", async () => {
    const growth = await grows(`
import { Backend } from "src/backend/backend.ts";
import { KvCache } from "src/cache/cache.ts";
import { Tensor } from "src/backend/tensor.ts";
const backend = await Backend.open({ library: path, threads: 1 });
const shape = { layers: 1, heads: 4, kvHeads: 2, headDim: 16, context: 64 };
const rope = (positions: number) =>
  backend.open((out) =>
    backend.call("wkv_rope_open", 16, 0, new Float32Array(8), 32, positions, out, 4)
  );
async function cycle() {
  using cache = new KvCache(backend, shape, rope, { budget: 1000 });
  using out = new Tensor(backend, "F32", 100, 64);
  using qkv = new Tensor(backend, "F32", 100, 128);
  using graph = backend.record(() => cache.prefill(0, 0, out, qkv, 100));
  await graph.run();
}`);
    assertLess(growth, 48e6);
  });

  it("is too often for Backend.open(); a hundred leave nothing open", async () => {
    using backend = await open();
    const before = backend.liveHandles;
    for (let i = 0; i < 100; i++) {
      using other = await Backend.open({ library: backend.path, threads: 2 });
      using tensor = new Tensor(other, "F32", 256, 1024);
      // The other context and its tensor.
      assertEquals(other.liveHandles, before + 2);
      assertGreater(tensor.handle, 0);
    }
    assertEquals(backend.liveHandles, before);
  });
});

describe("what cannot be opened", () => {
  it("is told with the path, and leaves nothing open", async () => {
    const before = await live();
    const folder = await Deno.makeTempDir({ prefix: "wkv_lifetime_" });
    try {
      const path = `${folder}/none.so`;
      await Deno.writeTextFile(path, "no library");
      for (const library of [path, `${folder}/absent.so`, folder]) {
        await assertRejects(() => Backend.open({ library }), Error, library);
      }
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
    for (const threads of [-1, 0.5, NaN, 1025, Infinity]) {
      await assertRejects(
        () => Backend.open({ threads }),
        RangeError,
        "threads",
      );
    }
    await assertRejects(
      () => Backend.open({ device: "tpu" as "cpu" }),
      RangeError,
      "tpu",
    );
    assertEquals(await live(), before);
  });

  it("as a cache leaves nothing open either", async () => {
    using backend = await open();
    const before = backend.liveHandles;
    for (
      const options of [
        { policy: "none" },
        { budget: 0 },
        { budget: 8, sinks: 9 },
        { sequences: 5000 },
      ]
    ) {
      assertThrows(() => openCache(backend, layer, options), RangeError);
      assertEquals(backend.liveHandles, before);
    }
    const many: Layer = { ...layer, layers: 2000 };
    assertThrows(() => openCache(backend, many, { budget: 8 }), WkvError);
    assertEquals(backend.liveHandles, before);
  });
});

describe("memory that cannot be had", () => {
  const folder = new URL("golden/models/", import.meta.url).pathname;
  const real = Backend.prototype.call;
  /** What takes memory of the device or, of a copy, of the host. */
  const openers = [
    ...["wkv_tensor_open", "wkv_rope_open", "wkv_cache_open"],
    "wkv_tensor_write",
  ];

  /** Runs `body` with the n-th opening refused; whether there was one. */
  async function refusing(
    n: number,
    body: () => Promise<void>,
  ): Promise<boolean> {
    let opened = 0;
    Backend.prototype.call = function (...all) {
      const [name] = all;
      if (openers.includes(name) && ++opened === n) {
        throw new WkvError(name, wkv_status.WKV_MEMORY, "No memory");
      }
      return Reflect.apply(real, this, all);
    };
    try {
      await body();
      assertLess(opened, n);
      return false;
    } catch (error) {
      assertInstanceOf(error, WkvError);
      assertEquals(error.status, wkv_status.WKV_MEMORY);
      return true;
    } finally {
      Backend.prototype.call = real;
    }
  }

  it("while a model is loaded leaves nothing open", async () => {
    const before = await live();
    let failed = 0;
    const load = async () => {
      using _ = await loadModel(`${folder}llama`, { library: copy.path });
    };
    while (await refusing(failed + 1, load)) {
      failed++;
      assertEquals(await live(), before, `opening ${failed}`);
    }
    // Embedding, head, norms, and the matrices of two layers.
    assertGreater(failed, 12);
    assertEquals(await live(), before);
  });

  it("while a text is continued leaves what there was, and the next one goes on", async () => {
    // Layers with and without a window, so caches of two kinds.
    const options = { library: copy.path, threads: 1 };
    const path = `${folder}gemma2`;
    const continued = async (model: Awaited<ReturnType<typeof loadModel>>) => {
      let tokens: number[] = [];
      const cache = {
        layerBudgets: "pyramid",
        budget: 20,
        sinks: 0,
        recent: 1,
      } as const;
      const pieces = generate(model, [3, 4, 5], { cache, maxTokens: 30 });
      for (;;) {
        const { done, value } = await pieces.next();
        if (done) {
          tokens = value.tokens;
          break;
        }
      }
      return tokens;
    };
    using untouched = await loadModel(path, options);
    const from = untouched.backend.liveHandles;
    const held = untouched.backend.memory;
    const tokens = await continued(untouched);
    const handles = untouched.backend.liveHandles - from;
    const bytes = untouched.backend.memory - held;
    for (let n = 1;; n++) {
      using model = await loadModel(path, options);
      const { backend } = model;
      const [from, held] = [backend.liveHandles, backend.memory];
      const failed = await refusing(n, async () => void await continued(model));
      assertEquals(await continued(model), tokens);
      assertEquals(backend.liveHandles - from, handles, `opening ${n}`);
      assertEquals(backend.memory - held, bytes, `opening ${n}`);
      if (!failed) {
        assertGreater(n, 15);
        break;
      }
    }
  });
});
