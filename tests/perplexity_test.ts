/** Tests of perplexity(): its sums on tiny models against the f64 forward pass, its figures and caches on the default one against PyTorch. */

import {
  assert,
  assertAlmostEquals,
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
  loadModel,
  type Model,
  perplexity,
  type PerplexityOptions,
  type PerplexityRow,
  type WindowResult,
} from "../mod.ts";
import type { Precision } from "../src/backend/ops.ts";
import type { KvCache } from "../src/cache/cache.ts";
import type { Positions } from "../src/cache/layout.ts";
import { memoryStore } from "../src/evaluate/results.ts";
import { compareResults } from "../src/evaluate/verify.ts";
import { Session } from "../src/session.ts";
import { LibraryCopy } from "./isolated.ts";
import { testModel } from "./model.ts";
import { loadBytes, type TinyModel, tinyModel } from "./tiny_model.ts";
import { afterAll, beforeAll, describe, it, testDevice } from "./device.ts";

/** All rows of a run. */
async function rowsOf(
  model: Model,
  text: string | readonly number[],
  options: PerplexityOptions,
): Promise<PerplexityRow[]> {
  return await Array.fromAsync(perplexity(model, text, options));
}

describe("perplexity()", () => {
  const ids = Array.from({ length: 90 }, (_, i) => (i * i * 31 + i) % 256);
  const full: PerplexityOptions = {
    window: 32,
    policies: ["full"],
    budgets: [],
    cacheType: "f32",
  };
  let tiny: TinyModel;
  let copy: LibraryCopy;
  let model: Model;
  beforeAll(async () => {
    tiny = tinyModel({ context: 64 });
    copy = await LibraryCopy.make();
    model = await loadBytes(tiny.bytes, { library: copy.path });
  });
  afterAll(async () => {
    model?.close();
    await copy?.[Symbol.asyncDispose]();
  });

  /** The negative log probability of each target of a window, in f64. */
  function losses(window: readonly number[]): number[] {
    const logits = tiny.logits(window.slice(0, -1));
    return logits.map((all, i) => {
      const top = all.reduce((a, b) => Math.max(a, b));
      const sum = all.reduce((sum, x) => sum + Math.exp(x - top), 0);
      return top + Math.log(sum) - all[window[i + 1]!]!;
    });
  }

  it("scores each target of the text once", async () => {
    const cases: [
      options: Partial<PerplexityOptions>,
      stride: number,
      windows: number,
    ][] = [
      [{}, 16, 4],
      [{ stride: 1, windows: 3 }, 1, 3],
      [{ stride: 31 }, 31, 2],
      [{ window: 33 }, 16, 4],
      [{ window: 90 - 1, stride: 1, policies: ["weighted-kv"] }, 1, 2],
      [{ window: 2 }, 1, 89],
      [{ offset: 25 }, 16, 3],
      [{ offset: 58 }, 16, 1],
      [{ windows: 2 }, 16, 2],
      [{ windows: 1000 }, 16, 4],
    ];
    for (const [options, stride, windows] of cases) {
      // A budget that is never reached changes nothing.
      const all = { ...full, budgets: [90], ...options };
      const [row] = await rowsOf(model, ids, all);
      assert(row !== undefined);
      const { window, offset = 0 } = all;
      const right: number[] = [];
      for (let w = 0; w < windows; w++) {
        const start = offset + w * stride;
        const all = losses(ids.slice(start, start + window));
        right.push(...(w === 0 ? all : all.slice(-stride)));
      }
      assertEquals([row.window, row.stride], [window, stride]);
      assertEquals([row.windows, row.targets], [windows, right.length]);
      assertEquals(row.targets, window - 1 + (windows - 1) * stride);
      const nll = right.reduce((a, b) => a + b) / right.length;
      const deviation = Math.sqrt(
        right.reduce((sum, x) => sum + (x - nll) ** 2, 0) / (right.length - 1),
      );
      const close = (a: number | null, b: number) =>
        assertLess(Math.abs(a! / b - 1), 1e-5);
      close(row.nll, nll);
      close(row.perplexity, Math.exp(nll));
      close(
        row.stderr,
        Math.exp(nll) * deviation / Math.sqrt(right.length),
      );
      assertGreater(row.seconds, 0);
      assertEquals(row.reason, undefined);
    }
  });

  it("gives a row for each policy and budget, full once", async () => {
    const rows = await rowsOf(model, ids, {
      ...full,
      policies: ["full", "weighted-kv", "streaming-llm"],
      budgets: [12, 16],
      windows: 1,
    });
    const common = {
      kvHeads: 2,
      positions: "cache",
      prefill: "exact",
      activations: "int8",
      cacheType: "f32",
      window: 32,
      stride: 16,
      windows: 1,
      targets: 31,
    } as const;
    assertEquals(
      rows.map(({ nll, perplexity, stderr, seconds, gap, ...row }) => {
        assertAlmostEquals(Math.exp(nll!), perplexity!);
        assertGreater(stderr!, 0);
        assertGreater(seconds, 0);
        const base = rows[0]!.perplexity!;
        assertEquals(gap, row.budget === null ? null : perplexity! - base);
        return row;
      }),
      [
        ["full", null, null, null] as const,
        ["weighted-kv", 12, 4, 2] as const,
        ["weighted-kv", 16, 4, 4] as const,
        ["streaming-llm", 12, 4, 8] as const,
        ["streaming-llm", 16, 4, 12] as const,
      ].map(([policy, budget, sinks, recent]) => ({
        policy,
        budget,
        sinks,
        recent,
        interval: policy === "full" ? null : 1,
        layerSlots: null,
        headSlots: null,
        ...common,
        kl: null,
        klStderr: null,
        sameTop: null,
        gapStderr: null,
        gapWindow: budget === null ? null : 32,
      })),
    );
    assertEquals(new Set(rows.map(({ nll }) => nll)).size, 5);
  });

  it("measures how far each row is from the full cache", async () => {
    const options: PerplexityOptions = {
      ...full,
      policies: ["weighted-kv", "streaming-llm"],
      budgets: [12, 40],
      divergence: true,
    };
    const rows = await rowsOf(model, ids, options);
    assertEquals(rows.length, 4);
    const softmax = (logits: ArrayLike<number>) => {
      const all = Array.from(logits);
      const top = Math.max(...all);
      const sum = all.reduce((sum, x) => sum + Math.exp(x - top), 0);
      return all.map((x) => x - top - Math.log(sum));
    };
    for (const row of rows) {
      using cache = model.createCache({
        policy: row.policy,
        budget: row.budget!,
        cacheType: "f32",
      });
      const kls: number[] = [];
      let same = 0;
      for (let w = 0; w < 4; w++) {
        const window = ids.slice(16 * w, 16 * w + 32);
        const right = tiny.logits(window.slice(0, -1)).map(softmax);
        cache.reset();
        using session = new Session(model, cache);
        for (let i = 0; i < 31; i++) {
          const q = softmax(await session.logits(Int32Array.of(window[i]!)));
          if (w > 0 && i + 1 < 16) continue;
          const p = right[i]!;
          kls.push(
            p.reduce((s, log, j) => s + Math.exp(log) * (log - q[j]!), 0),
          );
          const first = (x: number[]) => x.indexOf(Math.max(...x));
          same += first(p) === first(q) ? 1 : 0;
        }
      }
      const mean = kls.reduce((a, b) => a + b) / kls.length;
      const deviation = Math.sqrt(
        kls.reduce((sum, x) => sum + (x - mean) ** 2, 0) / (kls.length - 1),
      );
      const label = `${row.policy} ${row.budget}`;
      assertAlmostEquals(row.kl!, mean, 1e-5, label);
      assertAlmostEquals(
        row.klStderr!,
        deviation / Math.sqrt(kls.length),
        1e-4,
        label,
      );
      assertAlmostEquals(row.sameTop!, same / kls.length, 1e-9, label);
      if (row.budget === 12) assertGreater(row.kl!, 1e-3);
      else assertLess(row.kl!, 1e-6);
    }
    // The same row alone, and beside a full one that was asked for.
    const [, alone] = await rowsOf(model, ids, {
      ...options,
      policies: ["streaming-llm", "full"],
      budgets: [12],
    });
    assertEquals(alone!.kl, rows[2]!.kl);
    assertEquals(alone!.nll, rows[2]!.nll);
    await assertRejects(
      () => rowsOf(model, ids, { ...options, prefill: "chunk:4" }),
      RangeError,
      "lock-step",
    );
  });

  it("gives the gap the standard error of the windows' differences", async () => {
    const options = {
      ...full,
      policies: ["full", "weighted-kv"],
      budgets: [12],
    };
    const items: WindowResult[] = [];
    const results = {
      items,
      add: (more: readonly WindowResult[]) => {
        items.push(...more);
        return Promise.resolve();
      },
    };
    const [base, row] = await rowsOf(model, ids, { ...options, results });
    const of = (policy: string) =>
      items.filter((item) => item.policy === policy);
    const [a, b] = [of("full"), of("weighted-kv")];
    assertEquals([a.length, b.length], [4, 4]);
    const targets = a.reduce((sum, item) => sum + item.targets, 0);
    const sum = a.reduce((sum, item, i) => sum + b[i]!.nll - item.nll, 0);
    assertAlmostEquals(
      Math.log(row!.perplexity! / base!.perplexity!),
      sum / targets,
      1e-9,
    );
    // Cochran's standard error of a ratio of sums, by leaving windows as they are.
    const rest = a.map((item, i) =>
      b[i]!.nll - item.nll - sum / targets * item.targets
    );
    const variance = rest.reduce((sum, x) => sum + x * x, 0) / 3 * 4;
    assertAlmostEquals(
      row!.gapStderr!,
      row!.perplexity! * Math.sqrt(variance) / targets,
      1e-6 * row!.perplexity!,
    );
  });

  it("goes on where a run was cut off, to the same figures", async () => {
    const options: PerplexityOptions = {
      ...full,
      policies: ["weighted-kv", "eviction"],
      budgets: [12],
      batch: 2,
      divergence: true,
    };
    const whole = await rowsOf(model, ids, options);
    const items: WindowResult[] = [];
    let calls = 0;
    const results = {
      items,
      add: (more: readonly WindowResult[]) => {
        if (++calls === 2) throw new Error("cut off");
        items.push(...more);
        return Promise.resolve();
      },
    };
    await assertRejects(
      () => rowsOf(model, ids, { ...options, results }),
      Error,
      "cut off",
    );
    const known = items.length;
    assertEquals(known, 6);
    let fed = 0;
    const again = await rowsOf(model, ids, {
      ...options,
      results,
      onProgress: (done, total) => fed = done / total,
    });
    assertEquals(fed, 1);
    assertEquals(items.length, 12);
    const timeless = (rows: PerplexityRow[]) =>
      rows.map(({ seconds: _, ...row }) => row);
    assertEquals(timeless(again), timeless(whole));
  });

  it("keeps each result once where a run was cut off among those of one batch", async () => {
    const options: PerplexityOptions = {
      ...full,
      policies: ["weighted-kv", "eviction"],
      budgets: [12],
      batch: 2,
      divergence: true,
    };
    const whole = memoryStore<WindowResult>();
    await rowsOf(model, ids, { ...options, results: whole });
    const cut = memoryStore<WindowResult>();
    await cut.add(whole.items.slice(0, 8));
    await rowsOf(model, ids, { ...options, results: cut });
    const { outcome, first } = compareResults(whole.items, cut.items);
    assertEquals([outcome, first], ["equal", null]);
  });

  it("does not depend on how many windows run side by side", async () => {
    const options: PerplexityOptions = {
      ...full,
      policies: ["weighted-kv"],
      budgets: [12],
      stride: 8,
    };
    const runs: PerplexityRow[] = [];
    for (const batch of [1, 3, 8, 100, undefined]) {
      runs.push(...await rowsOf(model, ids, { ...options, batch }));
    }
    for (const { nll, targets } of runs) {
      assertEquals(targets, 31 + 7 * 8);
      assertLess(Math.abs(nll! / runs[0]!.nll! - 1), 1e-6);
    }
  });

  it("takes text as well as its ids, and resolves options", async () => {
    const options: PerplexityOptions = {
      ...full,
      policies: ["eviction"],
      budgets: [16],
      sinks: 1,
      recent: 7,
      positions: "text",
    };
    const text = "Text of one byte a token, as many as ninety or so of them, "
      .repeat(2).slice(0, 90);
    const [a] = await rowsOf(model, text, options);
    const [b] = await rowsOf(
      model,
      [...new TextEncoder().encode(text)],
      options,
    );
    assertEquals(a!.nll, b!.nll);
    assertEquals([a!.sinks, a!.recent, a!.positions], [1, 7, "text"]);
    const { cacheType: _, ...rest } = options;
    const [c] = await rowsOf(model, text, rest);
    assertEquals(c!.cacheType, "f16");
    assertNotEquals(c!.nll, a!.nll);
    assertAlmostEquals(c!.nll!, a!.nll!, 0.05);
  });

  it("has no figure beyond the context, and says why", async () => {
    const options: PerplexityOptions = {
      ...full,
      window: 80,
      policies: ["full", "weighted-kv"],
      budgets: [16],
    };
    const [none, fits, some] = await rowsOf(model, ids, options);
    assertStringIncludes(none!.reason!, "80 tokens exceeds");
    assertEquals(
      [none!.nll, none!.perplexity, none!.stderr, none!.targets],
      [null, null, null, 0],
    );
    assertGreater(some!.perplexity!, 1);
    assertEquals(some!.reason, undefined);
    // The gap is taken from the longest windows that fit.
    assertEquals([fits!.policy, fits!.window, fits!.stride], ["full", 64, 32]);
    assertEquals(some!.gapWindow, 64);
    assertEquals(some!.gap, some!.perplexity! - fits!.perplexity!);
    assertAlmostEquals(
      some!.gapStderr!,
      Math.hypot(some!.stderr!, fits!.stderr!),
      1e-9,
    );
    const diverging = { ...options, divergence: true };
    const alone = (await rowsOf(model, ids, diverging)).at(-1)!;
    assertEquals([alone.nll, alone.kl], [some!.nll, null]);
    assertStringIncludes(alone.reason!, "No divergence");
    const text = await rowsOf(model, ids, { ...options, positions: "text" });
    assertEquals(text.map(({ window }) => window), [80, 64, 80]);
    assertEquals([text[0]!.nll, text[2]!.nll], [null, null]);
    assertEquals(text[2]!.budget, 16);
  });

  it("refuses options out of range before anything is run", async () => {
    const wrong: [Partial<PerplexityOptions>, string][] = [
      [{ window: 1 }, "window"],
      [{ window: 1.5 }, "window"],
      [{ window: NaN }, "window"],
      [{ window: 91 }, "No window of 91 tokens fits"],
      [{ offset: 59 }, "No window of 32 tokens fits"],
      [{ offset: -1 }, "offset"],
      [{ stride: 0 }, "stride"],
      [{ stride: 32 }, "stride"],
      [{ windows: 0 }, "windows"],
      [{ batch: 0 }, "batch"],
      [{ batch: 4097 }, "batch"],
      [{ prefill: "chunk:0" }, '"chunk:0"'],
      [{ policies: [] }, "at least one policy"],
      [{ policies: ["weighted-kv"] }, "at least one budget"],
      [{ policies: ["full", "nope"] }, 'Unknown policy "nope"'],
      [{ policies: ["full", "eviction"], budgets: [16, 3] }, "sinks + recent"],
      [{ policies: ["full", "eviction"], budgets: [0] }, "budget"],
    ];
    for (const [options, message] of wrong) {
      let fed = 0;
      await assertRejects(
        () =>
          rowsOf(model, ids, {
            ...full,
            ...options,
            onProgress: (done) => {
              fed = done;
            },
          }),
        RangeError,
        message,
      );
      assertEquals(fed, 0);
    }
    await assertRejects(() => rowsOf(model, "", full), RangeError, "has 0");
  });

  it("feeds windows in chunks when asked", async () => {
    const options: PerplexityOptions = {
      ...full,
      policies: ["full", "weighted-kv"],
      budgets: [12],
    };
    const steps = await rowsOf(model, ids, options);
    const chunks = await rowsOf(model, ids, { ...options, prefill: "chunk:4" });
    for (const [i, { prefill, targets, nll }] of chunks.entries()) {
      assertEquals([prefill, targets], ["chunk:4", steps[i]!.targets]);
      assertAlmostEquals(nll!, steps[i]!.nll!, i === 0 ? 1e-4 : 2);
    }
    // A chunk attends to more than the cache may keep: it is not the same.
    assertNotEquals(chunks[1]!.nll, steps[1]!.nll);
    const single = await rowsOf(model, ids, { ...options, prefill: "chunk:1" });
    assertAlmostEquals(single[1]!.nll!, steps[1]!.nll!, 1e-4);
  });

  it("refuses ids that the model has no row for", async () => {
    await assertRejects(
      () => rowsOf(model, [...ids.slice(0, 31), 257], full),
      Error,
      "257",
    );
  });

  it("tells how far it is", async () => {
    const calls: [number, number][] = [];
    await rowsOf(model, ids, {
      ...full,
      policies: ["full", "eviction"],
      budgets: [8, 16],
      batch: 3,
      onProgress: (done, total) => calls.push([done, total]),
    });
    const total = 3 * 4 * 31;
    assertEquals(calls.at(-1), [total, total]);
    assert(calls.every(([done], i) => i === 0 || done > calls[i - 1]![0]));
    assert(calls.every(([, all]) => all === total));
  });

  it("shows each row's cache after the first window", async () => {
    const seen: [string, number, number[]][] = [];
    await rowsOf(model, ids, {
      ...full,
      policies: ["full", "weighted-kv"],
      budgets: [12],
      onFirstWindow: (cache) => {
        const { kept } = cache.rows(1, 1);
        seen.push([cache.policy.name, cache.stats().seen, kept]);
      },
    });
    assertEquals(seen.map(([policy, n]) => [policy, n]), [
      ["full", 31],
      ["weighted-kv", 31],
    ]);
    assertEquals(seen[0]![2], Array.from({ length: 31 }, (_, i) => i));
    assertEquals(seen[1]![2].length, 12);
    assertEquals(seen[1]![2].slice(0, 4), [0, 1, 2, 3]);
  });

  it("leaves nothing open, whether it ends, is aborted or left", async () => {
    const options = { ...full, policies: ["eviction"], budgets: [8, 12] };
    await rowsOf(model, ids, { ...options, batch: 3 });
    const before = model.backend.liveHandles;
    await rowsOf(model, ids, { ...options, batch: 3 });
    assertEquals(model.backend.liveHandles, before);

    const reason = new Error("enough");
    const controller = new AbortController();
    const error = await assertRejects(() =>
      rowsOf(model, ids, {
        ...options,
        signal: controller.signal,
        onProgress: (done) => {
          if (done > 60) controller.abort(reason);
        },
      })
    );
    assertStrictEquals(error, reason);
    assertEquals(model.backend.liveHandles, before);

    for await (const _ of perplexity(model, ids, options)) break;
    assertEquals(model.backend.liveHandles, before);

    const mine = await assertRejects(() =>
      rowsOf(model, ids, {
        ...options,
        onFirstWindow: () => {
          throw reason;
        },
      })
    );
    assertStrictEquals(mine, reason);
    assertEquals(model.backend.liveHandles, before);
  });
});

describe("the default model against PyTorch in f32", () => {
  interface Figure {
    policy: string;
    positions: Positions;
    perplexity: number;
    budget: number | null;
    sinks: number | null;
    recent: number | null;
    targets: number;
  }
  interface CacheRow {
    policy: string;
    positions: Positions;
    layer: number;
    head: number;
    kept: number[];
    steps_attended: number[];
    score: number[];
    value_norm: number[];
  }
  const read = async <T>(name: string): Promise<T> =>
    JSON.parse(
      await Deno.readTextFile(new URL(`golden/${name}`, import.meta.url)),
    );
  let golden: { perplexity: Figure[]; cache: CacheRow[] };
  let ids: number[];
  const models = new Map<Precision, Model>();
  beforeAll(async () => {
    golden = await read("perplexity.json");
    ids = await read("text.json");
    for (const activations of ["f32", "int8"] as const) {
      const model = await loadModel(await testModel(), {
        device: testDevice,
        activations,
      });
      models.set(activations, model);
    }
  });
  afterAll(() => models.forEach((model) => model.close()));

  /** Measures what one figure of the golden file is about. */
  async function measure(
    figure: Figure,
    { activations = "f32", ...options }: Partial<PerplexityOptions> & {
      activations?: Precision;
    },
  ): Promise<number> {
    const { policy, positions, budget } = figure;
    const [row] = await rowsOf(models.get(activations)!, ids, {
      window: 256,
      windows: 2,
      policies: [policy],
      budgets: budget === null ? [] : [budget],
      positions,
      ...options,
    });
    assertEquals(
      [row!.sinks, row!.recent, row!.targets],
      [figure.sinks, figure.recent, figure.targets],
    );
    return Math.abs(row!.perplexity! / figure.perplexity - 1);
  }

  function find(policy: string, positions: Positions = "cache"): Figure {
    return golden.perplexity.find((row) =>
      row.policy === policy && row.positions === positions
    )!;
  }

  /** How a cache's rows differ from the golden file's. */
  function compare(cache: KvCache): { equal: number; overlap: number } {
    const rows = golden.cache.filter((row) =>
      row.policy === cache.policy.name && row.positions === cache.positions
    );
    assertEquals(rows.length, 12);
    let equal = 0, overlap = 0, entries = 0, far = 0;
    const close = (a: readonly number[], b: readonly number[]) => {
      const differences = a.map((value, i) => Math.abs(value - b[i]!));
      assertLessOrEqual(
        Math.hypot(...differences),
        1e-3 * Math.hypot(...b),
      );
      entries += a.length;
      far += differences.filter((d, i) => d > 1e-3 * b[i]!).length;
    };
    for (const right of rows) {
      const mine = cache.rows(right.layer, right.head);
      const places = new Set(right.kept);
      const both = mine.kept.filter((place) => places.has(place));
      assertEquals(mine.kept.length, right.kept.length);
      overlap += both.length / right.kept.length / rows.length;
      if (both.length < right.kept.length) continue;
      equal += 1 / rows.length;
      assertEquals(mine.kept, right.kept);
      assertEquals(mine.steps, right.steps_attended);
      close(mine.score, right.score);
      close(mine.valueNorm, right.value_norm);
    }
    // In the golden run of weighted-kv, the two lowest averages of layer 20,
    // head 1, step 101 are 8e-7 apart: whichever leaves first, the same tokens
    // are kept in the end, but a few numbers of later layers differ.
    assertLessOrEqual(far, 0.01 * entries);
    return { equal, overlap };
  }

  it("full: a prompt in one pass", async () => {
    const model = models.get("f32")!;
    using cache = model.createCache({
      policy: "full",
      capacity: 255,
      cacheType: "f32",
    });
    using session = new Session(model, cache);
    await session.prompt(ids.slice(0, 255));
    const { equal } = compare(cache);
    assertEquals(Math.round(12 * equal), 12);
  });

  for (
    const [policy, positions] of [
      ["weighted-kv", "cache"],
      ["eviction", "cache"],
      ["eviction", "text"],
      ["streaming-llm", "cache"],
      ["weighted-kv-ward", "cache"],
    ] as const
  ) {
    it(`${policy} with positions ${positions}, token by token`, async () => {
      let result: { equal: number; overlap: number } | undefined;
      const change = await measure(find(policy, positions), {
        cacheType: "f32",
        onFirstWindow: (cache) => {
          result = compare(cache);
        },
      });
      // Ward's costs are near each other: a tie of rounding moves a row.
      const ward = policy === "weighted-kv-ward";
      assertGreater(result!.overlap, ward ? 0.99 : 0.9995 - 1e-9);
      if (!ward) assertGreater(result!.equal, 0.97);
      assertLess(change, 1e-3);
    });
  }

  it("with a 16-bit cache", async () => {
    assertLess(await measure(find("weighted-kv"), { cacheType: "f16" }), 7e-3);
  });

  it("with 8-bit activations", async () => {
    for (const policy of ["full", "weighted-kv"]) {
      const change = await measure(find(policy), { activations: "int8" });
      assertLess(change, 2e-2);
    }
  });
});
