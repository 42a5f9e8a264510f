/** Tests of loading and running models: tiny random ones against an f64 forward pass, the default one against llama.cpp and PyTorch. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertInstanceOf,
  assertLess,
  assertRejects,
  assertStringIncludes,
} from "@std/assert";
import { generate, loadModel, type Model } from "../mod.ts";
import { WkvError } from "../src/backend/error.ts";
import { Tensor } from "../src/backend/tensor.ts";
import type { KvCache } from "../src/cache/cache.ts";
import type { CacheOptions } from "../src/cache/layout.ts";
import { FormatError } from "../src/formats/error.ts";
import { PASS_ROWS } from "../src/model.ts";
import { Session } from "../src/session.ts";
import { f32, type FieldValue, u32 } from "./gguf_writer.ts";
import { LibraryCopy } from "./isolated.ts";
import { testModel } from "./model.ts";
import {
  loadBytes,
  loadTiny,
  tinyModel,
  type TinyOptions,
} from "./tiny_model.ts";
import { afterAll, beforeAll, describe, it, testDevice } from "./device.ts";

type Floats = Float32Array | Float64Array;

/** ||a - b|| / ||b||; NaN where either holds one. */
function distance(a: Floats, b: Floats): number {
  assertEquals(a.length, b.length);
  let difference = 0, norm = 0;
  for (let i = 0; i < a.length; i++) {
    difference += (a[i]! - b[i]!) ** 2;
    norm += b[i]! ** 2;
  }
  return Math.sqrt(difference / norm);
}

/** The largest distance between the rows of two runs, each of them checked. */
function furthest(runs: readonly Floats[], right: readonly Floats[]): number {
  assertEquals(runs.length, right.length);
  const distances = runs.map((run, i) => distance(run, right[i]!));
  assert(distances.every(Number.isFinite), `${distances}`);
  return Math.max(...distances);
}

/** The logits after each token, fed one by one to a new session. */
async function stepLogits(
  model: Model,
  cache: KvCache,
  ids: readonly number[],
): Promise<Float32Array[]> {
  using session = new Session(model, cache);
  const all: Float32Array[] = [];
  for (const id of ids) all.push(await session.logits(Int32Array.of(id)));
  return all;
}

/** The logits after the last n tokens, all fed to one sequence in one pass. */
async function passLogits(
  model: Model,
  cache: KvCache,
  ids: readonly number[],
  n = ids.length,
  sequence = 0,
): Promise<Float32Array[]> {
  const { backend, network, activations: precision } = model;
  const columns = model.config.vocabulary;
  assert(ids.length <= PASS_ROWS.cpu);
  using tokens = Tensor.from(backend, Int32Array.from(ids));
  using logits = new Tensor(backend, "F32", n, columns);
  using graph = backend.record(() =>
    network.forward({
      cache,
      tokens,
      rows: ids.length,
      sequence,
      logits,
      activations: model.memory(PASS_ROWS.cpu),
      precision,
    })
  );
  await graph.run();
  return Array.from({ length: n }, (_, row) => logits.floats(row, 1));
}

/** Asserts that two caches keep much the same; `least` is the mean overlap. */
function assertSameKept(
  { config }: Model,
  a: KvCache,
  b: KvCache,
  { least = 0.999, sequence = 0 }: { least?: number; sequence?: number } = {},
): void {
  assertEquals(a.stats(sequence), b.stats());
  const overlaps: number[] = [];
  for (let layer = 0; layer < config.layers; layer++) {
    for (let head = 0; head < config.kvHeads; head++) {
      const right = b.rows(layer, head).kept;
      const places = new Set(right);
      const kept = a.rows(layer, head, sequence).kept;
      const both = kept.filter((place) => places.has(place)).length;
      overlaps.push(both / right.length);
    }
  }
  const mean = overlaps.reduce((x, y) => x + y) / overlaps.length;
  assert(mean >= least, `The mean overlap is ${mean}, expected ${least}`);
}

const TEXT = Array.from(
  new TextEncoder().encode("The cache keeps what was read."),
);

describe("a model in several GGUF files", () => {
  it("gives the logits of the same in one", async () => {
    const tiny = tinyModel({
      layers: 3,
      type: () => "Q8_0",
      width: 64,
      hidden: 96,
    });
    const folder = await Deno.makeTempDir({ prefix: "wkv_split_" });
    try {
      const paths = tiny.split(4).map((bytes, i) => {
        const path = `${folder}/m-0000${i + 1}-of-00004.gguf`;
        Deno.writeFileSync(path, bytes);
        return path;
      });
      const options = { device: testDevice };
      using one = await loadBytes(tiny.bytes);
      using several = await loadModel(paths[0]!, options);
      assertEquals(several.weightBytes, one.weightBytes);
      using first = one.createCache({ budget: 16 });
      using second = several.createCache({ budget: 16 });
      assertEquals(
        await stepLogits(several, second, TEXT),
        await stepLogits(one, first, TEXT),
      );
      await assertRejects(
        () => loadModel(paths[1]!, options),
        FormatError,
        "expected the first",
      );
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
  });
});

describe("a Llama file, against a plain f64 forward pass", () => {
  const mixed = ({ q, k, v }: Record<"q" | "k" | "v", string>) =>
    ((name) =>
      name.includes("attn_q")
        ? q
        : name.includes("attn_k")
        ? k
        : name.includes("attn_v")
        ? v
        : "F32") as NonNullable<TinyOptions["type"]>;
  // Rows of whole blocks of 256.
  const wide: TinyOptions = { width: 256, hidden: 256, layers: 1 };
  const variants: Record<string, TinyOptions> = {
    "F32 weights": {},
    "F16 weights": { type: () => "F16" },
    "BF16 weights": { type: () => "BF16" },
    "Q8_0 weights": { type: () => "Q8_0", hidden: 64 },
    "Q4_0 weights": { type: () => "Q4_0", hidden: 64 },
    "Q4_1 weights": { type: () => "Q4_1", hidden: 64 },
    ...Object.fromEntries((["Q5_0", "Q5_1", "IQ4_NL"] as const).map((type) => [
      `${type} weights`,
      { type: () => type, hidden: 64 } satisfies TinyOptions,
    ])),
    ...Object.fromEntries(
      (["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"] as const).map((type) => [
        `${type} weights`,
        { ...wide, type: () => type } satisfies TinyOptions,
      ]),
    ),
    "the types of a Q4_K_M file": {
      ...wide,
      type: (name) => /token_embd|attn_v|ffn_down/.test(name) ? "Q6_K" : "Q4_K",
    },
    "a type of blocks of 32 beside one of 256": {
      ...wide,
      type: (name) =>
        name.includes("ffn_gate")
          ? "Q5_0"
          : name.includes("ffn_up") || name.includes("attn_q")
          ? "Q3_K"
          : "Q8_0",
    },
    "Q, K and V of three types": {
      type: mixed({ q: "F16", k: "F32", v: "BF16" }),
    },
    "Q and K quantised, V not": {
      type: mixed({ q: "Q8_0", k: "Q4_1", v: "F16" }),
    },
    "gate and up of two types": {
      type: (name) =>
        name.includes("ffn_gate")
          ? "Q8_0"
          : name.includes("ffn_up")
          ? "F16"
          : "F32",
    },
    "norms in F16": { vectors: "F16" },
    "norms in BF16": { vectors: "BF16" },
    "an output matrix of its own": { untied: true },
    "an output matrix of another type": {
      untied: true,
      type: (name) => name === "output.weight" ? "Q8_0" : "F16",
    },
    "rope_freqs.weight": { factors: [1, 1.5, 4, 8] },
    "linear scaling of positions": { linear: 4 },
    "both": { linear: 2, factors: [1, 1, 2, 3] },
    "fewer rotated dimensions than a head has": { rotary: 4 },
    "another base": { base: 500000 },
    "as many KV heads as heads": { kvHeads: 4 },
    "one KV head": { kvHeads: 1 },
    "three heads a KV head": { heads: 9, kvHeads: 3, width: 72 },
    "heads of 80 dimensions": { heads: 2, kvHeads: 1, width: 160 },
    "heads whose columns are not the width": { headDim: 12 },
    "heads of 2 dimensions": { heads: 16, kvHeads: 4 },
    "odd numbers of rows": { hidden: 37, vocabulary: 259 },
    "one layer": { layers: 1 },
    "no head_count_kv": {
      kvHeads: 4,
      metadata: { "llama.attention.head_count_kv": undefined },
    },
  };
  for (const [name, options] of Object.entries(variants)) {
    it(name, async () => {
      const tiny = tinyModel(options);
      using model = await loadBytes(tiny.bytes, { activations: "f32" });
      const right = tiny.logits(TEXT);
      const cacheOptions: CacheOptions = {
        policy: "full",
        capacity: TEXT.length,
        cacheType: "f32",
      };
      using cache = model.createCache(cacheOptions);
      assertLess(furthest(await stepLogits(model, cache, TEXT), right), 2e-5);
      cache.reset();
      assertLess(furthest(await passLogits(model, cache, TEXT), right), 2e-5);
      // Without an eviction, ranks are the text's positions.
      using bounded = model.createCache({
        ...cacheOptions,
        policy: "weighted-kv",
        budget: TEXT.length,
        positions: "text",
      });
      assertLess(furthest(await stepLogits(model, bounded, TEXT), right), 2e-5);
    });
  }

  for (const types of ["Q8_0 weights", "the types of a Q4_K_M file"]) {
    it(`8-bit activations and 16-bit caches come close with ${types}`, async () => {
      const tiny = tinyModel(variants[types]);
      const right = tiny.logits(TEXT);
      const limits = { f32: 2e-5, f16: 3e-3, bf16: 2e-2 } as const;
      for (const activations of ["f32", "int8"] as const) {
        using model = await loadBytes(tiny.bytes, { activations });
        assertEquals(model.activations, activations);
        for (const cacheType of ["f32", "f16", "bf16"] as const) {
          using cache = model.createCache({ policy: "full", cacheType });
          const far = furthest(await stepLogits(model, cache, TEXT), right);
          const limit = limits[cacheType] +
            (activations === "int8" ? 5e-2 : 0);
          assertLess(far, limit);
          if (activations === "int8") assertGreater(far, 1e-4);
        }
      }
    });
  }

  it("activations make no difference to weights that are not quantised", async () => {
    const { bytes } = tinyModel({ type: () => "F16" });
    using a = await loadBytes(bytes, { activations: "int8" });
    using b = await loadBytes(bytes, { activations: "f32" });
    using cacheA = a.createCache();
    using cacheB = b.createCache();
    assertEquals(
      await stepLogits(a, cacheA, TEXT),
      await stepLogits(b, cacheB, TEXT),
    );
  });

  it("keeps its weights' bytes and numbers", async () => {
    using model = await loadTiny({ untied: true });
    assertEquals(model.config.layers, 2);
    assertEquals(model.config.headDim, 8);
    assertEquals(model.config.vocabulary, 257);
    assertEquals(model.config.context, 64);
    const block = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48 + 2 * 32;
    assertEquals(model.weightBytes, 4 * (2 * block + 2 * 257 * 32 + 32));
    assertGreater(model.loadMs, 0);
  });
});

describe("a file that is refused", () => {
  /** Loads a changed tiny model and gives the error. */
  async function refused(
    options: TinyOptions,
    message: string,
  ): Promise<FormatError> {
    const before = await liveHandles();
    const error = await assertRejects(
      () => loadTiny(options, { library: copy.path }),
      FormatError,
      message,
    );
    assertStringIncludes(error.message, `${error.file}: ${error.field}: `);
    assertEquals(await liveHandles(), before);
    return error;
  }

  let copy: LibraryCopy;
  let model: Model;
  beforeAll(async () => {
    copy = await LibraryCopy.make();
    model = await loadTiny({}, { library: copy.path });
  });
  afterAll(async () => {
    model?.close();
    await copy?.[Symbol.asyncDispose]();
  });
  const liveHandles = async () => {
    await new Promise((resolve) => setTimeout(resolve));
    return model.backend.liveHandles;
  };

  const keys: [key: string, value: FieldValue | undefined, message: string][] =
    [
      ["block_count", u32(2 ** 32 - 1), "4294967295"],
      ["block_count", u32(0), "0"],
      ["attention.head_count", u32(0), "0"],
      ["attention.head_count", undefined, "expected"],
      ["attention.head_count_kv", u32(8), "8"],
      ["attention.head_count_kv", u32(0), "0"],
      ["attention.head_count_kv", u32(3), "expected a divisor of the 4"],
      ["attention.key_length", u32(2 ** 31), "2147483648"],
      ["attention.layer_norm_rms_epsilon", f32(-1), "-1"],
      ["attention.layer_norm_rms_epsilon", f32(NaN), "NaN"],
      ["context_length", u32(0), "0"],
      ["embedding_length", u32(2 ** 32 - 1), "4294967295"],
      ["feed_forward_length", u32(0), "0"],
      ["rope.freq_base", f32(0), "0"],
      ["rope.freq_base", f32(Infinity), "Infinity"],
      ["rope.dimension_count", u32(10), "10"],
      ["rope.scaling.type", "ntk", '"ntk"'],
      ["rope.scaling.factor", f32(0), "0"],
    ];
  for (const [key, value, message] of keys) {
    const wrong = message.startsWith("expected") ? "wrong" : message;
    it(`${key}: ${wrong}`, async () => {
      const name = `llama.${key}`;
      const error = await refused({ metadata: { [name]: value } }, message);
      assertEquals(error.field, name);
    });
  }

  it("heads that do not divide the width", async () => {
    const error = await refused({
      metadata: {
        "llama.attention.head_count": u32(5),
        "llama.attention.head_count_kv": undefined,
      },
    }, "expected a divisor of the embedding length 32");
    assertEquals(error.field, "llama.attention.head_count");
  });

  it("an unknown architecture, naming those there are", async () => {
    const metadata = { "general.architecture": "mamba" };
    const error = await refused({ metadata }, '"mamba"');
    assertStringIncludes(error.message, "expected gemma2, gemma3, llama");
    await refused({
      metadata: { "general.architecture": "__proto__" },
    }, '"__proto__"');
  });

  it("a scale that is not finite, at the row of its own tensor", async () => {
    const name = "blk.1.attn_v.weight";
    const error = await refused({
      type: (name) => name.includes("attn_") ? "Q8_0" : "F32",
      change(tensors) {
        // A row is one block of 34 bytes, its scale first.
        const { buffer, byteOffset } = tensors.get(name)!.data!;
        new DataView(buffer, byteOffset).setUint16(3 * 34, 0x7e00, true);
      },
    }, "Row 3: The scale of block 0 is not finite");
    assertEquals(error.field, name);
  });

  it("a type without a kernel, named", async () => {
    const error = await refused({
      width: 256,
      heads: 32,
      kvHeads: 4,
      change: (tensors) => {
        const name = "blk.1.attn_output.weight";
        tensors.set(name, { name, type: "IQ4_XS", shape: [256, 256] });
      },
    }, "IQ4_XS");
    assertStringIncludes(error.field, "blk.1.attn_output.weight");
    assertStringIncludes(error.message, "Q4_1");
  });

  it("a vector that is quantised", async () => {
    await refused({
      change: (tensors) => {
        const name = "blk.0.ffn_norm.weight";
        tensors.set(name, { name, type: "Q8_0", shape: [32] });
      },
    }, "expected F32, F16 or BF16");
  });

  it("a tensor that is missing", async () => {
    for (
      const name of [
        "token_embd.weight",
        "blk.0.attn_k.weight",
        "blk.1.ffn_down.weight",
        "output_norm.weight",
      ]
    ) {
      const error = await refused({
        change: (tensors) => tensors.delete(name),
      }, "Missing");
      assertStringIncludes(error.field, name);
    }
  });

  it("a tensor of another shape", async () => {
    const shapes: [string, number[]][] = [
      ["blk.0.attn_q.weight", [32, 16]],
      ["blk.0.attn_v.weight", [16, 32]],
      ["blk.1.ffn_up.weight", [48, 32]],
      ["blk.1.attn_norm.weight", [31]],
      ["token_embd.weight", [64, 257]],
      ["rope_freqs.weight", [3]],
    ];
    for (const [name, shape] of shapes) {
      const error = await refused({
        factors: [1, 1, 1, 1],
        change: (tensors) => tensors.set(name, { name, shape }),
      }, "expected shape");
      assertStringIncludes(error.field, name);
    }
  });

  it("a block scale that is NaN or infinite, naming the tensor", async () => {
    for (const type of ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "IQ4_NL"] as const) {
      for (const scale of [NaN, Infinity, -Infinity]) {
        const name = "blk.1.attn_k.weight";
        const error = await refused({
          type: () => type,
          hidden: 64,
          change: (tensors) => {
            const data = tensors.get(name)!.data as Uint8Array;
            const size = data.length / 16;
            new DataView(data.buffer).setFloat16(5 * size, scale, true);
          },
        }, "not finite");
        assertStringIncludes(error.field, name);
        assertInstanceOf(error.cause, WkvError);
      }
    }
  });

  it("a NaN that no check of the file sees is an error when it is run", async () => {
    for (
      const name of [
        "blk.0.attn_norm.weight",
        "blk.1.ffn_norm.weight",
        "output_norm.weight",
        "blk.1.attn_k.weight",
        "blk.1.ffn_down.weight",
      ]
    ) {
      using bad = await loadTiny({
        change: (tensors) => {
          const data = tensors.get(name)!.data as Uint8Array;
          new DataView(data.buffer).setFloat32(8, NaN, true);
        },
      });
      for (const prompt of [[1], [1, 2, 3]]) {
        await assertRejects(
          () => generate(bad, prompt, { maxTokens: 4 }).next(),
          WkvError,
          "not a number",
        );
      }
    }
  });

  it("a model whose load is aborted", async () => {
    const reason = new Error("enough");
    const before = await liveHandles();
    const error = await assertRejects(
      () =>
        loadTiny({}, {
          library: copy.path,
          signal: AbortSignal.abort(reason),
        }),
    );
    assertEquals(error, reason);
    const controller = new AbortController();
    let loaded = 0;
    const late = await assertRejects(
      () =>
        loadTiny({}, {
          library: copy.path,
          signal: controller.signal,
          onProgress: (progress) => {
            if (progress.stage !== "load") return;
            loaded = progress.loaded;
            if (loaded > 40_000) controller.abort(reason);
          },
        }),
    );
    assertEquals(late, reason);
    assertGreater(loaded, 40_000);
    assertEquals(await liveHandles(), before);
  });

  it("options out of range, before the file is read", async () => {
    const bad = { activations: "fp4" } as unknown as { activations: "f32" };
    await assertRejects(() => loadTiny({}, bad), RangeError, "fp4");
    await assertRejects(() => loadTiny({}, { threads: -1 }), RangeError, "-1");
    await assertRejects(() => loadModel("/nowhere.gguf"), Deno.errors.NotFound);
  });
});

describe("one pass and many steps, a batch and single runs", () => {
  const bounded: CacheOptions = { budget: 16, cacheType: "f32" };
  const random = (seed: number, n: number) =>
    Array.from({ length: n }, (_, i) => (i * i * 31 + seed * 97 + i) % 256);
  let model: Model;
  beforeAll(async () => {
    model = await loadTiny({ width: 64, layers: 3 }, { activations: "f32" });
  });
  afterAll(() => model?.close());

  for (
    const policy of [
      "weighted-kv",
      "eviction",
      "streaming-llm",
      "weighted-kv-ward",
    ]
  ) {
    it(`${policy}: prefill and decode equal token by token`, async () => {
      const ids = random(1, 50);
      using one = model.createCache({ ...bounded, policy });
      const right = await stepLogits(model, one, ids);
      for (const first of [1, 7, 16]) {
        using cache = model.createCache({ ...bounded, policy });
        const passed = await passLogits(model, cache, ids.slice(0, first));
        const stepped = await stepLogits(model, cache, ids.slice(first));
        assertLess(furthest([...passed, ...stepped], right), 1e-4);
        assertSameKept(model, cache, one);
      }
    });

    it(`${policy}: a batch equals single runs`, async () => {
      const texts = [2, 3, 4, 5].map((seed) => random(seed, 40));
      const sequences = texts.length;
      using cache = model.createCache({ ...bounded, policy, sequences });
      using session = new Session(model, cache);
      const { vocabulary } = model.config;
      const logits: Float32Array[] = [];
      for (let i = 0; i < 40; i++) {
        logits.push(
          await session.logits(Int32Array.from(texts, (text) => text[i]!)),
        );
      }
      for (const [b, text] of texts.entries()) {
        using single = model.createCache({ ...bounded, policy });
        const right = await stepLogits(model, single, text);
        const mine = logits.map((all) =>
          all.subarray(b * vocabulary, (b + 1) * vocabulary)
        );
        assertLess(furthest(mine, right), 1e-4);
        assertSameKept(model, cache, single, { sequence: b });
      }
    });
  }
});

describe("the default model", () => {
  interface Greedy {
    name: string;
    promptTokens: number[];
    tokens: number[];
  }
  const golden = async <T>(name: string): Promise<T> =>
    JSON.parse(
      await Deno.readTextFile(new URL(`golden/${name}`, import.meta.url)),
    );
  let prompts: Greedy[];
  let exact: Model;
  beforeAll(async () => {
    ({ prompts } = await golden<{ prompts: Greedy[] }>("llamacpp.json"));
    exact = await loadModel(await testModel(), {
      device: testDevice,
      activations: "f32",
    });
  });
  afterAll(() => exact?.close());

  describe("with f32 activations against PyTorch in f32", () => {
    /** One position of logits.bin. */
    interface Record {
      columns: Float32Array;
      topIds: Uint32Array;
      topLogits: Float32Array;
      logSumExp: number;
      norm: number;
    }
    let columns: number[];
    const records = new Map<string, Record[]>();
    beforeAll(async () => {
      const header = await golden<
        {
          recordBytes: number;
          columns: number[];
          prompts: { name: string; first: number; positions: number }[];
        }
      >("logits.json");
      columns = header.columns;
      const { buffer } = await Deno.readFile(
        new URL("golden/logits.bin", import.meta.url),
      );
      for (const { name, first, positions } of header.prompts) {
        records.set(
          name,
          Array.from({ length: positions }, (_, i) => {
            const at = (first + i) * header.recordBytes;
            const floats = new Float32Array(buffer, at, 82);
            return {
              columns: floats.subarray(0, 64),
              topIds: new Uint32Array(buffer, at + 256, 8),
              topLogits: floats.subarray(72, 80),
              logSumExp: floats[80]!,
              norm: floats[81]!,
            };
          }),
        );
      }
    });

    /** Compares the positions from `first` on; gives the largest distance. */
    function compare(
      name: string,
      logits: readonly Float32Array[],
      first: number,
    ): number {
      const right = records.get(name)!.slice(first);
      assertEquals(logits.length, right.length);
      let most = 0;
      logits.forEach((all, i) => {
        const record = right[i]!;
        const picked = Float32Array.from(
          [...columns, ...record.topIds],
          (id) => all[id]!,
        );
        const wanted = Float32Array.of(...record.columns, ...record.topLogits);
        const sum = Math.log(all.reduce((sum, x) => sum + Math.exp(x), 0));
        const norm = Math.sqrt(all.reduce((sum, x) => sum + x * x, 0));
        most = Math.max(
          most,
          distance(picked, wanted),
          Math.abs(norm / record.norm - 1),
          Math.abs(sum / record.logSumExp - 1),
        );
      });
      return most;
    }

    const text = (name: string) => {
      const { promptTokens, tokens } = prompts.find((row) =>
        row.name === name
      )!;
      return { ids: [...promptTokens, ...tokens], start: promptTokens.length };
    };

    it("every step of a text fed token by token", async () => {
      const { ids } = text("code");
      using cache = exact.createCache({
        policy: "full",
        capacity: ids.length,
        cacheType: "f32",
      });
      const logits = await stepLogits(exact, cache, ids);
      assertLess(compare("code", logits, 0), 1e-3);
    });

    it("every step of a passage fed at once, and of its continuation", async () => {
      const { ids, start } = text("passage");
      using cache = exact.createCache({
        policy: "full",
        capacity: ids.length,
        cacheType: "f32",
      });
      const passed = await passLogits(exact, cache, ids.slice(0, start));
      const stepped = await stepLogits(exact, cache, ids.slice(start));
      assertLess(compare("passage", [...passed, ...stepped], 0), 1e-3);
    });
  });

  it("chooses llama.cpp's greedy tokens", async () => {
    using model = await loadModel(await testModel(), { device: testDevice });
    assertEquals(model.activations, "int8");
    const gaps: number[] = [];
    for (const { promptTokens, tokens } of prompts) {
      using cache = model.createCache({
        policy: "full",
        capacity: promptTokens.length + tokens.length,
      });
      const logits = [
        ...await passLogits(model, cache, promptTokens, 1),
        ...await stepLogits(model, cache, tokens.slice(0, -1)),
      ];
      logits.forEach((all, i) => {
        const top = all.reduce((most, x) => Math.max(most, x));
        gaps.push(top - all[tokens[i]!]!);
      });
    }
    assertEquals(gaps.length, 384);
    const first = gaps.filter((gap) => gap === 0).length;
    assert(
      first >= 0.97 * gaps.length,
      `${first} of ${gaps.length} are our first choice`,
    );
    assertLess(Math.max(...gaps), 1);
  });

  it("a prompt in a pass, and three texts side by side, equal token by token", async () => {
    const options: CacheOptions = { budget: 24, cacheType: "f32" };
    const texts = ["story", "dialogue", "german"].map((name) => {
      const { promptTokens, tokens } = prompts.find((row) =>
        row.name === name
      )!;
      return [...promptTokens, ...tokens].slice(0, 40);
    });
    using batch = exact.createCache({ ...options, sequences: 3 });
    using session = new Session(exact, batch);
    const together: Float32Array[] = [];
    for (let i = 0; i < 40; i++) {
      together.push(
        await session.logits(Int32Array.from(texts, (text) => text[i]!)),
      );
    }
    const { vocabulary } = exact.config;
    const of = (b: number) =>
      together.map((all) => all.subarray(b * vocabulary, (b + 1) * vocabulary));
    using single = exact.createCache(options);
    const right = await stepLogits(exact, single, texts[2]!);
    const far = furthest(of(2), right);
    assertSameKept(exact, batch, single, { sequence: 2 });
    for (const [b, text] of texts.entries()) {
      using cache = exact.createCache(options);
      const passed = await passLogits(exact, cache, text.slice(0, 24));
      const stepped = await stepLogits(exact, cache, text.slice(24));
      const farther = furthest([...passed, ...stepped], of(b));
      assertLess(farther, 1e-4);
      assertSameKept(exact, batch, cache, { sequence: b });
    }
    assertLess(far, 1e-4);
  });
});
