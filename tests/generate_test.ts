/** Tests of generate(): what it yields, how it ends, and what becomes of the cache; on tiny models, and on the default one. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertLessOrEqual,
  assertNotEquals,
  assertRejects,
  assertStrictEquals,
  assertStringIncludes,
} from "@std/assert";
import {
  generate,
  type GenerateOptions,
  type GenerateResult,
  loadModel,
  type Model,
  type Piece,
  type TokenEvent,
} from "../mod.ts";
import type { Backend } from "../src/backend/backend.ts";
import { WkvError } from "../src/backend/error.ts";
import { embed, rmsnorm } from "../src/backend/ops.ts";
import { Tensor } from "../src/backend/tensor.ts";
import type { KvCache } from "../src/cache/cache.ts";
import type { CacheOptions } from "../src/cache/layout.ts";
import { PASS_ROWS } from "../src/model.ts";
import { type Prefill, type SamplerOptions, Session } from "../src/session.ts";
import { testModel } from "./model.ts";
import { LibraryCopy } from "./isolated.ts";
import { loadTiny, TINY_END } from "./tiny_model.ts";
import { afterAll, beforeAll, describe, it, testDevice } from "./device.ts";

/** Runs a generation to its end. */
async function run(
  model: Model,
  prompt: string | readonly number[],
  options: GenerateOptions = {},
): Promise<{ pieces: Piece[]; result: GenerateResult }> {
  const pieces: Piece[] = [];
  const stream = generate(model, prompt, options);
  for (;;) {
    const { done, value } = await stream.next();
    if (done) return { pieces, result: value };
    pieces.push(value);
  }
}

/** The result alone. */
async function finish(
  ...args: Parameters<typeof run>
): Promise<GenerateResult> {
  return (await run(...args)).result;
}

/** Ids without a pattern. */
function noise(n: number, seed = 1): number[] {
  return Array.from(
    { length: n },
    (_, i) => (i * i * 31 + seed * 97 + i) % 256,
  );
}

/** The text positions that each layer's heads keep. */
function keptOf({ config }: Model, cache: KvCache): number[][] {
  return Array.from(
    { length: config.layers * config.kvHeads },
    (_, i) =>
      cache.rows(Math.floor(i / config.kvHeads), i % config.kvHeads).kept,
  );
}

/**
 * What the library is asked for while `work` runs: the functions' names in
 * their order, those that copy out with their bytes.
 */
async function callsOf(
  backend: Backend,
  work: (calls: string[]) => Promise<unknown>,
): Promise<string[]> {
  const calls: string[] = [];
  const { runGraph } = backend;
  const call = backend.call as (...all: unknown[]) => void;
  backend.call = (name, ...rest) => {
    const copied = /_read$/.test(name) ? ` ${rest.at(-1)}` : "";
    calls.push(name + copied);
    call.call(backend, name, ...rest);
  };
  backend.runGraph = (graph, times) => {
    calls.push("wkv_graph_run");
    return runGraph.call(backend, graph, times);
  };
  try {
    await work(calls);
  } finally {
    backend.call = call;
    backend.runGraph = runGraph;
  }
  return calls;
}

/** Asserts that nothing stays open after what `work` does a second time. */
async function leavesNothingOpen(
  { backend }: Model,
  work: () => Promise<unknown>,
): Promise<void> {
  // The first time opens memory that the model keeps.
  await work();
  const before = backend.liveHandles;
  await work();
  assertEquals(backend.liveHandles, before);
}

const bytes = (text: string) => [...new TextEncoder().encode(text)];

const POLICIES = [
  "weighted-kv",
  "eviction",
  "streaming-llm",
  "weighted-kv-ward",
  "weighted-kv-ward:linear",
];

describe("the text of a generation", () => {
  // This model goes round in a circle: its greedy text is known.
  const ROUND = "abcdefghijné€😀";
  let model: Model;
  let ender: Model;
  beforeAll(async () => {
    model = await loadTiny({ chain: bytes(ROUND), context: 4096 });
    ender = await loadTiny({ chain: [...bytes("abcd"), TINY_END] });
  });
  afterAll(() => {
    model?.close();
    ender?.close();
  });

  it("is its pieces joined and its tokens decoded", async () => {
    for (const maxTokens of [1, 2, 19, 50]) {
      const { pieces, result } = await run(model, "j", { maxTokens });
      assertEquals(pieces.map(({ text }) => text).join(""), result.text);
      assertEquals(model.tokenizer.decode(result.tokens), result.text);
      assertEquals(result.tokens.length, maxTokens);
      assertEquals(result.finishReason, "length");
    }
  });

  it("never holds half a character", async () => {
    const { pieces, result } = await run(model, "j", { maxTokens: 40 });
    assertStringIncludes(result.text, ROUND.slice(10) + ROUND.slice(0, 10));
    const texts = pieces.map(({ text }) => text);
    assertEquals(texts.slice(0, 10), [
      "n",
      "",
      "é",
      "",
      "",
      "€",
      "",
      "",
      "",
      "😀",
    ]);
    // Cut off inside a character, the text ends like any decoder's.
    const cut = await run(model, "j", { maxTokens: 8 });
    assertEquals(cut.result.text, "né€\ufffd");
    assertEquals(cut.pieces.at(-1)!.text, "\ufffd");
    assertEquals(cut.result.tokens.length, 8);
  });

  it("ends before a stop string, wherever tokens part", async () => {
    const cases: [stop: string[], text: string, tokens: number][] = [
      [["d"], "bc", 3],
      [["de"], "bc", 4],
      [["efgh"], "bcd", 7],
      [["efgh", "g"], "bcdef", 6],
      [["é€"], "bcdefghijn", 15],
      [["😀ab"], "bcdefghijné€", 21],
      [["bcd"], "", 3],
      [["xyz", "ij"], "bcdefgh", 9],
    ];
    for (const [stop, text, tokens] of cases) {
      const { pieces, result } = await run(model, "a", { stop });
      assertEquals(result.text, text);
      assertEquals(pieces.map((piece) => piece.text).join(""), text);
      assertEquals(result.finishReason, "stop");
      assertEquals(result.tokens.length, tokens);
    }
  });

  it("holds back what may begin a stop string, no longer than needed", async () => {
    const { pieces, result } = await run(model, "a", {
      stop: ["cdx", "ghijx"],
      maxTokens: 9,
    });
    assertEquals(result.text, "bcdefghij");
    assertEquals(result.finishReason, "length");
    const texts = pieces.map(({ text }) => text);
    assertEquals(texts, ["b", "", "", "cde", "f", "", "", "", "", "ghij"]);
  });

  it("ends at the end token, or goes on past it", async () => {
    const ended = await finish(ender, "a");
    assertEquals(ended.finishReason, "eos");
    assertEquals(ended.text, "bcd");
    assertEquals(ended.tokens, bytes("bcd"));
    assertEquals(ended.cache.seen, 4);
    const on = await finish(ender, "a", { ignoreEos: true, maxTokens: 6 });
    assertEquals(on.finishReason, "length");
    assertEquals(on.tokens, [...bytes("bcd"), TINY_END, ...bytes("ab")]);
    const none = await run(ender, "d");
    assertEquals(none.result.tokens, []);
    assertEquals(none.result.text, "");
    assertEquals(none.result.finishReason, "eos");
    assertEquals(none.result.timings.decodeTokensPerSecond, null);
    assertEquals(none.pieces, []);
  });

  it("reads special tokens of the prompt only when asked", async () => {
    const prompt = "<|endoftext|>";
    const plain = await finish(ender, prompt, { maxTokens: 1 });
    assertEquals(plain.promptTokens, prompt.length);
    const special = await finish(ender, prompt, {
      maxTokens: 1,
      special: true,
    });
    assertEquals(special.promptTokens, 1);
    assertEquals(special.text, "a");
  });

  it("comes with events in order, each before its piece", async () => {
    const order: string[] = [];
    const onToken = ({ index, token }: TokenEvent) => {
      order.push(`event ${index} ${token}`);
    };
    let i = 0;
    for await (
      const { token } of generate(model, "a", { onToken, maxTokens: 5 })
    ) order.push(`piece ${i++} ${token}`);
    assertEquals(
      order,
      bytes("bcdef").flatMap((token, i) => [
        `event ${i} ${token}`,
        `piece ${i} ${token}`,
      ]),
    );
  });

  it("comes with times", async () => {
    const { timings } = await finish(model, "a", { maxTokens: 5 });
    assertGreater(timings.prefillMs, 0);
    assertLessOrEqual(timings.prefillMs, timings.firstTokenMs);
    assertGreater(timings.decodeTokensPerSecond!, 0);
    const one = await finish(model, "a", { maxTokens: 1 });
    assertEquals(one.timings.decodeTokensPerSecond, null);
  });
});

describe("generate()", () => {
  let copy: LibraryCopy;
  let model: Model;
  beforeAll(async () => {
    copy = await LibraryCopy.make();
    model = await loadTiny({ context: 128 }, { library: copy.path });
  });
  afterAll(async () => {
    model?.close();
    await copy?.[Symbol.asyncDispose]();
  });
  const free = { ignoreEos: true } as const;

  describe("sampling", () => {
    const tokens = async (options: GenerateOptions) =>
      (await finish(model, noise(8), { ...free, maxTokens: 24, ...options }))
        .tokens;

    it("repeats with a seed and differs with another", async () => {
      // Hot enough that no two runs are alike by chance.
      const warm = { temperature: 30 };
      const first = await tokens({ ...warm, seed: 7 });
      assertEquals(await tokens({ ...warm, seed: 7 }), first);
      assertNotEquals(await tokens({ ...warm, seed: 8 }), first);
      // Every bit of a seed counts.
      assertNotEquals(await tokens({ ...warm, seed: 7 + 2 ** 32 }), first);
      assertNotEquals(await tokens(warm), await tokens(warm));
    });

    it("is greedy by default and repeats", async () => {
      const greedy = await tokens({});
      assertEquals(await tokens({}), greedy);
      assertEquals(await tokens({ temperature: 0, seed: 3 }), greedy);
      assertEquals(await tokens({ temperature: 2, topK: 1 }), greedy);
      assertEquals(await tokens({ temperature: 2, topP: 1e-9 }), greedy);
      assertEquals(await tokens({ temperature: 2, minP: 1 }), greedy);
      assertNotEquals(await tokens({ temperature: 2, seed: 1 }), greedy);
    });

    it("refuses settings out of range", async () => {
      const wrong: SamplerOptions[] = [
        { temperature: -1 },
        { temperature: NaN },
        { temperature: Infinity },
        { topK: -1 },
        { topK: 1.5 },
        { topP: 0 },
        { topP: 1.1 },
        { minP: -0.1 },
        { minP: NaN },
        { seed: -1 },
        { seed: 0.5 },
        { seed: 2 ** 53 },
      ];
      for (const options of wrong) {
        const [value] = Object.values(options);
        await assertRejects(
          () => tokens(options),
          RangeError,
          `current value is ${value}`,
        );
      }
    });
  });

  describe("prompts and options", () => {
    it("takes a prompt of one token", async () => {
      const result = await finish(model, [65], { ...free, maxTokens: 3 });
      assertEquals(result.promptTokens, 1);
      assertEquals(result.tokens.length, 3);
      assertEquals(result.cache.seen, 3);
      const text = await finish(model, "A", { ...free, maxTokens: 3 });
      assertEquals(text.tokens, result.tokens);
    });

    it("refuses an empty prompt", async () => {
      for (const prompt of ["", []]) {
        await assertRejects(
          () => finish(model, prompt),
          RangeError,
          "The prompt is empty",
        );
      }
    });

    it("refuses ids that the model has no row for", async () => {
      for (const id of [-1, 257, 1.5, NaN, Infinity, 2 ** 32]) {
        await assertRejects(
          () => finish(model, [1, id]),
          RangeError,
          `found ${id}`,
        );
      }
    });

    it("refuses options out of range, with nothing left open", async () => {
      const wrong: [GenerateOptions, string][] = [
        [{ maxTokens: 0 }, "maxTokens"],
        [{ maxTokens: -1 }, "maxTokens"],
        [{ maxTokens: 1.5 }, "maxTokens"],
        [{ maxTokens: NaN }, "maxTokens"],
        [{ stop: ["a", ""] }, "stop string"],
        [{ temperature: -1 }, "temperature"],
        [{ cache: { policy: "wkv" } }, 'Unknown policy "wkv"'],
        [{ cache: { budget: 0 } }, "budget"],
        [{ cache: { budget: 10, sinks: 6, recent: 5 } }, "sinks + recent"],
        [{ cache: { sequences: 2 } }, "feeds one sequence"],
        [{ cache: { policy: "full", capacity: 1 } }, "do not fit"],
      ];
      for (
        const prefill of ["chunk:0", "chunk:", "chunk:1.5", "all", "chunk:4097"]
      ) {
        wrong.push([{ prefill: prefill as Prefill }, `"${prefill}"`]);
      }
      for (const [options, message] of wrong) {
        await leavesNothingOpen(model, async () => {
          await assertRejects(
            () => finish(model, noise(4), options),
            RangeError,
            message,
          );
        });
      }
    });

    it("refuses a closed cache", async () => {
      const cache = model.createCache();
      cache.close();
      await assertRejects(
        () => finish(model, "a", { cache }),
        Error,
        "The cache is closed",
      );
    });

    it("refuses another model's cache", async () => {
      using other = await loadTiny();
      using cache = other.createCache();
      await assertRejects(() => finish(model, "a", { cache }), Error);
    });
  });

  describe("the cache", () => {
    for (const policy of POLICIES) {
      it(`${policy}: holds a long prompt at the budget`, async () => {
        using cache = model.createCache({ policy, budget: 24 });
        const kept: number[] = [];
        const result = await finish(model, noise(60), {
          ...free,
          cache,
          maxTokens: 30,
          onToken: (event) => {
            assertEquals(
              event.cache.seen,
              event.cache.kept + event.cache.merged + event.cache.evicted,
            );
            assertEquals(event.cache.seen, 60 + event.index);
            kept.push(event.cache.kept);
          },
        });
        assertEquals(new Set(kept), new Set([24]));
        assertEquals(result.tokens.length, 30);
        const { seen, merged, evicted, ...rest } = result.cache;
        assertEquals(seen, 89);
        const merges = policy.startsWith("weighted-kv");
        assertEquals([merged, evicted], merges ? [65, 0] : [0, 65]);
        assertEquals(rest, {
          policy,
          budget: 24,
          sinks: 4,
          recent: policy === "streaming-llm" ? 20 : 8,
          interval: 1,
          layerSlots: null,
          headSlots: null,
          kvHeads: model.config.kvHeads,
          positions: "cache",
          prefill: "exact",
          activations: "int8",
          cacheType: "f16",
          kept: 24,
          layerKept: null,
          headKept: null,
          bytes: cache.bytes,
          fullBytes: 89 * 2 * 2 * 2 * 8 * 2,
        });
        for (const row of keptOf(model, cache)) {
          assertEquals(row.slice(0, 4), [0, 1, 2, 3]);
          assertEquals(
            row.slice(-8),
            Array.from({ length: 8 }, (_, i) => 81 + i),
          );
          assertEquals(row, row.toSorted((a, b) => a - b));
        }
      });

      it(`${policy}: streams a long prompt as if token by token`, async () => {
        const options: CacheOptions = { policy, budget: 16, cacheType: "f32" };
        using whole = model.createCache(options);
        using parts = model.createCache(options);
        const ids = noise(50, 2);
        const { tokens } = await finish(model, ids, {
          ...free,
          cache: whole,
          maxTokens: 1,
        });
        let last: number[] = [];
        for (const id of ids) {
          last = (await finish(model, [id], {
            ...free,
            cache: parts,
            maxTokens: 1,
          })).tokens;
        }
        assertEquals(last, tokens);
        assertEquals(keptOf(model, parts), keptOf(model, whole));
      });

      it(`${policy}: takes a long prompt in chunks`, async () => {
        using cache = model.createCache({ policy, budget: 24 });
        for (const [prefill, seen] of [["chunk:16", 100], ["chunk:7", 200]]) {
          const result = await finish(model, noise(100), {
            ...free,
            cache,
            prefill: prefill as Prefill,
            maxTokens: 1,
          });
          assertEquals(result.cache.prefill, prefill);
          assertEquals(result.cache.kept, 24);
          assertEquals(result.cache.seen, seen);
          for (const row of keptOf(model, cache)) {
            assertEquals(row.length, 24);
            assertEquals(row.slice(0, 4), [0, 1, 2, 3]);
            assertEquals(row.at(-1), Number(seen) - 1);
          }
        }
      });

      it(`${policy}: tells what each step did`, async () => {
        using cache = model.createCache({ policy, budget: 16 });
        let checked = 0;
        await finish(model, noise(14), {
          ...free,
          cache,
          maxTokens: 20,
          onToken: ({ cache: { seen }, events }) => {
            const all = events();
            if (seen <= 16) return assertEquals(all, []);
            assertEquals(
              all.map(({ layer, head }) => [layer, head]),
              [[0, 0], [0, 1], [1, 0], [1, 1]],
            );
            for (const { layer, head, from, into, weights } of all) {
              const { kept } = cache.rows(layer, head);
              assert(from >= 4 && from < seen && !kept.includes(from));
              if (policy.startsWith("weighted-kv")) {
                assert(into !== null && into > from && kept.includes(into));
                // Nothing that is kept lies between the two.
                assert(!kept.some((place) => place > from && place < into));
                assert(weights.every((w) => w > 0 && w <= 1), `${weights}`);
              } else {
                assertEquals(into, null);
              }
              checked++;
            }
          },
        });
        assertGreater(checked, 40);
      });
    }

    it("goes on over two calls as in one", async () => {
      const options: CacheOptions = { budget: 24, cacheType: "f32" };
      using split = model.createCache(options);
      using joined = model.createCache(options);
      const first = await finish(model, noise(20), {
        ...free,
        cache: split,
        maxTokens: 10,
      });
      // The last token was drawn, not fed: it begins the next prompt.
      assertEquals(split.stats().seen, 29);
      const rest = [first.tokens.at(-1)!, ...noise(12, 5)];
      const second = await finish(model, rest, {
        ...free,
        cache: split,
        maxTokens: 8,
      });
      const ids = [...noise(20), ...first.tokens.slice(0, -1), ...rest];
      const once = await finish(model, ids, {
        ...free,
        cache: joined,
        maxTokens: 8,
      });
      assertEquals(second.tokens, once.tokens);
      assertEquals(second.cache, once.cache);
      assertEquals(keptOf(model, split), keptOf(model, joined));
    });

    it("is closed when it is generate's own, left open when it is not", async () => {
      using cache = model.createCache({ budget: 16 });
      await leavesNothingOpen(
        model,
        () => finish(model, "abc", { cache, maxTokens: 3 }),
      );
      assert(!cache.closed);
      assertEquals(keptOf(model, cache).length, 4);
      await leavesNothingOpen(
        model,
        () => finish(model, "abc", { cache: { budget: 16 }, maxTokens: 3 }),
      );
      await leavesNothingOpen(
        model,
        () => finish(model, "abc", { maxTokens: 3 }),
      );
    });

    it("of policy full ends the text at its capacity", async () => {
      using cache = model.createCache({ policy: "full", capacity: 20 });
      const result = await finish(model, noise(10), { ...free, cache });
      assertEquals(result.finishReason, "length");
      // The token that follows the twentieth needs no room.
      assertEquals(result.tokens.length, 11);
      assertEquals(result.cache.kept, 20);
      assertEquals(result.cache.budget, null);
      await assertRejects(
        () => finish(model, "a", { cache }),
        RangeError,
        "1 tokens do not fit the 0 that the full cache has left",
      );
      cache.reset();
      assertEquals((await finish(model, noise(20), { cache })).cache.kept, 20);
    });

    it("of policy full refuses a prompt beyond the context", async () => {
      const cache: CacheOptions = { policy: "full" };
      await assertRejects(
        () => finish(model, noise(129), { cache }),
        RangeError,
        "129 tokens do not fit the 128",
      );
      const all = await finish(model, noise(128), { ...free, cache });
      assertEquals(all.finishReason, "length");
      assertEquals(all.tokens.length, 1);
      const some = await finish(model, noise(100), { ...free, cache });
      assertEquals(some.tokens.length, 29);
    });

    it("with a budget has no limit at the context", async () => {
      for (const positions of ["cache", "text"] as const) {
        const result = await finish(model, noise(300), {
          ...free,
          cache: { budget: 16, positions },
          maxTokens: 40,
        });
        assertEquals(result.tokens.length, 40);
        assertEquals(result.cache.positions, positions);
      }
    });

    it("takes a prompt of more than one pass", async () => {
      using cache = model.createCache({ policy: "full", capacity: 2000 });
      const ids = noise(2 * PASS_ROWS.cpu + 100);
      const { tokens } = await finish(model, ids, {
        ...free,
        cache,
        maxTokens: 4,
      });
      using steps = model.createCache({ policy: "full", capacity: 2000 });
      for (const at of [0, 300, 600, 900]) {
        await finish(model, ids.slice(at, at + 300), {
          cache: steps,
          maxTokens: 1,
        });
      }
      assertEquals(steps.stats().seen, ids.length);
      const [last] = tokens;
      const rest = await finish(model, [last!], {
        ...free,
        cache: steps,
        maxTokens: 3,
      });
      assertEquals(rest.tokens, tokens.slice(1));
    });
  });

  describe("abort", () => {
    const reason = new Error("enough");
    /** Aborts while the prompt is streamed. */
    const soon = () => {
      const controller = new AbortController();
      setTimeout(() => controller.abort(reason), 5);
      return controller.signal;
    };
    const long = noise(20_000);
    const cache: CacheOptions = { budget: 16 };

    it("before the call throws the reason", async () => {
      await leavesNothingOpen(model, async () => {
        const error = await assertRejects(() =>
          finish(model, "a", { signal: AbortSignal.abort(reason) })
        );
        assertStrictEquals(error, reason);
      });
    });

    it("during the prompt throws the reason", async () => {
      for (const prefill of ["exact", "chunk:16"] as const) {
        await leavesNothingOpen(model, async () => {
          const error = await assertRejects(() =>
            finish(model, long, { cache, prefill, signal: soon() })
          );
          assertStrictEquals(error, reason);
        });
      }
    });

    it("during the prompt can end with nothing", async () => {
      using cache = model.createCache({ budget: 16 });
      const { pieces, result } = await run(model, long, {
        cache,
        signal: soon(),
        stopOnAbort: true,
      });
      assertEquals(pieces, []);
      assertEquals(result.finishReason, "abort");
      assertEquals(result.tokens, []);
      assertEquals(result.text, "");
      assertEquals(result.timings.decodeTokensPerSecond, null);
      assertEquals(result.timings.prefillMs, null);
      assertEquals(result.timings.firstTokenMs, null);
      assertLess(result.cache.seen, long.length);
      assertEquals(result.cache.seen, cache.stats().seen);
    });

    it("during decoding throws the reason, or ends with what there is", async () => {
      const aborting = () => {
        const controller = new AbortController();
        const onToken = ({ index }: TokenEvent) => {
          if (index === 4) controller.abort(reason);
        };
        return { ...free, signal: controller.signal, onToken };
      };
      await leavesNothingOpen(model, async () => {
        const error = await assertRejects(() =>
          finish(model, noise(8), aborting())
        );
        assertStrictEquals(error, reason);
      });
      const right = await finish(model, noise(8), { ...free, maxTokens: 5 });
      const { pieces, result } = await run(model, noise(8), {
        ...aborting(),
        stopOnAbort: true,
      });
      assertEquals(result.finishReason, "abort");
      assertEquals(result.tokens, right.tokens);
      assertEquals(result.text, right.text);
      assertEquals(pieces.map(({ text }) => text).join(""), right.text);
    });

    it("of one generation leaves the model fit for the next", async () => {
      const right = await finish(model, noise(8), { ...free, maxTokens: 5 });
      await assertRejects(() => finish(model, long, { cache, signal: soon() }));
      const again = await finish(model, noise(8), { ...free, maxTokens: 5 });
      assertEquals(again.tokens, right.tokens);
    });

    it("does not hide another error", async () => {
      const controller = new AbortController();
      const error = await assertRejects(() =>
        finish(model, noise(8), {
          signal: controller.signal,
          stopOnAbort: true,
          onToken: () => {
            throw new TypeError("mine");
          },
        }), TypeError);
      assertEquals(error.message, "mine");
    });
  });

  describe("what crosses to the device and back", () => {
    const step = ["wkv_graph_run", "wkv_tensor_read 4"];

    for (const policy of POLICIES) {
      it(`${policy}: one run and 4 bytes a token, from an empty to a full cache`, async () => {
        const cache: CacheOptions = { policy, budget: 16 };
        const maxTokens = 40;
        let result: GenerateResult | undefined;
        const at: number[] = [];
        const calls = await callsOf(model.backend, async (calls) => {
          const stream = generate(model, noise(4), {
            ...free,
            cache,
            maxTokens,
          });
          for (;;) {
            const { done, value } = await stream.next();
            if (done) {
              result = value;
              break;
            }
            at.push(calls.length);
          }
        });
        const { merged, evicted, kept, seen } = result!.cache;
        assertEquals([kept, seen, merged + evicted], [16, 43, 27]);
        assertEquals(at.length, maxTokens);
        const between = at.map((end, i) => calls.slice(at[i - 1] ?? 0, end));
        // The second token's step records the graph that all later ones run.
        const [prompt, first, ...others] = between as [string[], string[]];
        assertEquals(prompt.filter((name) => name.startsWith(step[1]!)), [
          step[1],
        ]);
        assertEquals(first.slice(-2), step);
        for (const one of others) assertEquals(one, step);
        const count = (name: string) =>
          calls.filter((call) => call === name).length;
        assertEquals(count("wkv_graph_begin"), 2);
        assertEquals(count("wkv_graph_run"), maxTokens);
        assertEquals(count("wkv_tensor_read 4"), maxTokens);
      });
    }

    it("is one run and 4 bytes a sequence for sequences side by side, and no byte for steps ahead", async () => {
      using cache = model.createCache({ budget: 16, sequences: 3 });
      using session = new Session(model, cache);
      session.setSampler({ temperature: 0 });
      await session.next();
      const calls = await callsOf(model.backend, async () => {
        for (let i = 0; i < 30; i++) await session.next();
        await session.advance(30);
      });
      assertEquals(calls, [
        ...Array(30).fill(["wkv_graph_run", "wkv_tensor_read 12"]).flat(),
        "wkv_graph_run",
      ]);
      for (const sequence of [0, 1, 2]) {
        const { kept, seen, merged } = cache.stats(sequence);
        assertEquals([kept, seen, merged], [16, 61, 45]);
      }
    });
  });

  describe("what is opened", () => {
    it("is closed when the loop is left", async () => {
      await leavesNothingOpen(model, async () => {
        for await (const _ of generate(model, noise(8), free)) break;
      });
      await leavesNothingOpen(model, async () => {
        for await (const { token } of generate(model, noise(8), free)) {
          if (token >= 0) {
            await assertRejects(async () => {
              for await (const _ of generate(model, noise(4), free)) {
                throw new Error("left");
              }
            });
            return;
          }
        }
      });
    });

    it("is closed when onToken throws", async () => {
      await leavesNothingOpen(model, async () => {
        await assertRejects(
          () =>
            finish(model, noise(8), {
              onToken: () => {
                throw new Error("mine");
              },
            }),
          Error,
          "mine",
        );
      });
    });

    it("is nothing when it is never started", async () => {
      const before = model.backend.liveHandles;
      const stream = generate(model, noise(8));
      await stream.return(undefined as never);
      generate(model, noise(8));
      assertEquals(model.backend.liveHandles, before);
    });
  });

  describe("two generations on one model", () => {
    const jobs: [number[], GenerateOptions][] = [
      [noise(30, 3), {
        ...free,
        cache: { budget: 16 },
        maxTokens: 25,
        temperature: 1,
        seed: 5,
      }],
      [noise(9, 4), {
        ...free,
        cache: { policy: "full" },
        maxTokens: 25,
        temperature: 1,
        seed: 6,
      }],
    ];
    let apart: GenerateResult[];
    beforeAll(async () => {
      apart = [];
      for (const [ids, options] of jobs) {
        apart.push(await finish(model, ids, options));
      }
    });
    const same = (results: GenerateResult[]) =>
      results.forEach((result, i) => {
        assertEquals(result.tokens, apart[i]!.tokens);
        assertEquals(result.cache, apart[i]!.cache);
      });

    it("step in turn as one after the other", async () => {
      const streams = jobs.map(([ids, options]) =>
        generate(model, ids, options)
      );
      const results: GenerateResult[] = [];
      while (results.filter(Boolean).length < 2) {
        for (const [i, stream] of streams.entries()) {
          const { done, value } = await stream.next();
          if (done && value) results[i] = value;
        }
      }
      same(results);
    });

    it("run at once as one after the other", async () => {
      same(
        await Promise.all(
          jobs.map(([ids, options]) => finish(model, ids, options)),
        ),
      );
    });

    it("may record while a graph of the other runs", async () => {
      const { backend } = model;
      using x = new Tensor(backend, "F32", 1, 32);
      const op = () =>
        rmsnorm(backend, x, x, { weight: x, epsilon: 1 }, { rows: 1 });
      using graph = backend.record(op);
      for (let i = 0; i < 10; i++) {
        const run = graph.run();
        // The run begins on its own thread, as likely as not in here.
        using other = backend.record(() => {
          op();
          const end = performance.now() + 3;
          while (performance.now() < end);
          op();
        });
        await run;
        await other.run();
      }
      // A failing run is no failure of what is being recorded.
      using bad = Tensor.from(backend, Int32Array.of(99));
      using table = new Tensor(backend, "F32", 4, 32);
      using failing = backend.record(() =>
        embed(backend, x, table, bad, { rows: 1 })
      );
      const failed = assertRejects(() => failing.run(), WkvError, "99");
      using other = backend.record(() => {
        const end = performance.now() + 10;
        while (performance.now() < end);
        op();
      });
      await failed;
      await other.run();
    });
  });
});

describe("generate() with the default model", () => {
  let model: Model;
  beforeAll(async () => {
    model = await loadModel(await testModel(), { device: testDevice });
  });
  afterAll(() => model?.close());

  it("continues a text", async () => {
    const prompt = "The capital of France is";
    const { pieces, result } = await run(model, prompt, { maxTokens: 8 });
    assertStringIncludes(result.text, "Paris");
    assertEquals(pieces.map(({ text }) => text).join(""), result.text);
    assertEquals(model.tokenizer.decode(result.tokens), result.text);
    const ids = await model.tokenizer.encode(prompt);
    const again = await finish(model, ids, { maxTokens: 8 });
    assertEquals(again.tokens, result.tokens);
    assertEquals(again.promptTokens, ids.length);
  });

  it("stops at a string that tokens span", async () => {
    const { result } = await run(model, "The capital of France is", {
      stop: ["aris"],
    });
    assertEquals(result.finishReason, "stop");
    assertEquals(result.text, " P");
  });

  it("ends its turn", async () => {
    const result = await finish(
      model,
      "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
      { special: true, maxTokens: 48 },
    );
    assertEquals(result.finishReason, "eos");
    assertStringIncludes(result.text, "4");
    assert(!result.text.includes("<|im_end|>"));
  });

  it("reads a prompt longer than its budget", async () => {
    const text = await Deno.readTextFile(
      new URL("golden/text.txt", import.meta.url),
    );
    const prompt = text.slice(0, 600);
    const results = await Promise.all(
      (["exact", "chunk:32"] as const).map((prefill) =>
        finish(model, prompt, {
          cache: { budget: 64 },
          maxTokens: 12,
          prefill,
        })
      ),
    );
    for (const { cache, promptTokens, tokens } of results) {
      assertGreater(promptTokens, 100);
      assertEquals(tokens.length, 12);
      assertEquals(cache.kept, 64);
      assertEquals(cache.merged, promptTokens + 11 - 64);
      assertLess(cache.bytes, cache.fullBytes);
    }
  });
});
