/**
 * Measures how the time of a step and the memory grow with depth, budget,
 * batch, heads and layers, beside what arithmetic says, and draws it; run by
 * hand on a machine with nothing else on its GPU.
 *
 *   deno task bench:scale [--quick] [--only PART[,PART...]] [--device cuda]
 *     [--shapes llama-3-8b] [--layers N] [--out FILE] [--draw FOLDER]
 *   deno task bench:scale --only fits
 *   deno task bench:scale --only docs --out FILE
 *
 * Parts, measured in the order in which they are named: depth, budget, batch,
 * heads, layers, memory; and `fits`, the tables of what fits on 24, 80 and 141
 * GB, which needs no device. Weights are random. The file is written anew after
 * every figure, and a part that fails loses no other's. --draw writes the charts
 * as SVG files. `docs` measures nothing: it writes the tables of a file, and
 * those of `fits`, into docs/scale.md, and draws the charts beside it.
 *
 * Depth is how many tokens a cache has really been fed: each of them attended,
 * was scored, and let another one leave, in steps of attention alone, without
 * the products around it, whose result no cache depends on. A full cache takes
 * them in passes of 2,048.
 */

import { parseArgs } from "@std/cli/parse-args";
import { Backend, type Graph } from "../src/backend/backend.ts";
import { Tensor } from "../src/backend/tensor.ts";
import type { KvCache } from "../src/cache/cache.ts";
import type { Model } from "../src/model.ts";
import type { ModelConfig } from "../src/models/architecture.ts";
import { planMemory } from "../src/plan.ts";
import { Session } from "../src/session.ts";
import { stepCost } from "./arithmetic.ts";
import { measureMemory } from "./memory.ts";
import { randomFloats, randomModel } from "./random_model.ts";
import { frame, writeResult } from "./record.ts";
import {
  CACHE_TYPE,
  drawCharts,
  fits,
  type MemoryRow,
  memoryTable,
  type Result,
  type Row,
  type StepRow,
  stepTable,
  writeDocs,
} from "./scale_report.ts";
import type { ShapeName } from "./shapes.ts";
import { median, quantile, timeRuns } from "./timing.ts";
import { showUsage } from "./usage.ts";

const PARTS = ["depth", "budget", "batch", "heads", "layers", "memory"];
const DTYPE = "BF16";
/** Steps of different tokens in the graph that fills a cache. */
const KINDS = 8;
/** Tokens of a pass into a full cache. */
const PASS = 2048;
/** Steps that no clock sees. */
const WARM_UP = 4;

await showUsage(import.meta.url);
const args = parseArgs(Deno.args, {
  string: ["only", "shapes", "layers", "out", "device", "draw"],
  boolean: ["quick"],
  default: { shapes: "llama-3-8b", device: "cuda", only: PARTS.join() },
}) as unknown as {
  only: string;
  shapes: ShapeName;
  layers?: string;
  out?: string;
  draw?: string;
  device: "cpu" | "cuda";
  quick: boolean;
};
const { quick, device, shapes } = args;
const only = args.only.split(",");
const tiny = shapes === "tiny";

/** What is measured. */
const sizes = {
  steps: tiny ? 8 : quick ? 16 : 48,
  layers: Number(args.layers ?? (tiny ? 2 : quick ? 4 : 32)),
  budget: tiny ? 64 : 1024,
  depths: doubled(tiny ? 64 : 1024, tiny ? 512 : 131072, quick ? 8 : 2),
  budgets: doubled(tiny ? 32 : 256, tiny ? 256 : 131072, quick ? 8 : 2),
  batches: doubled(1, tiny ? 4 : 64, quick ? 8 : 2),
  /** KV heads beside the model's own query heads, of fewer layers and a large cache, so that they count. */
  kvHeads: doubled(tiny ? 1 : 2, tiny ? 4 : 32, quick ? 4 : 2),
  headLayers: tiny ? 2 : quick ? 2 : 8,
  headBudget: tiny ? 64 : 32768,
  depthsOfLayers: doubled(1, tiny ? 4 : quick ? 8 : 32, quick ? 4 : 2),
};

function doubled(from: number, to: number, by: number): number[] {
  const values: number[] = [];
  for (let n = from; n < to; n *= by) values.push(n);
  return [...values, to];
}

async function measure(): Promise<void> {
  const start = performance.now();
  const places = ["--out", "--draw"];
  const given = Deno.args.filter((arg, i, all) =>
    !places.includes(arg) && !places.includes(all[i - 1] ?? "")
  );
  const command = ["deno task bench:scale", ...given].join(" ");
  const { bytesPerSecond } = await measureMemory(device);
  const head = await frame(command, device);
  const name = (head.gpu ?? head.cpu).toLowerCase().replace(/^nvidia /, "")
    .replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "");
  const out = args.out ?? `bench/results/${name}-scale.json`;
  const result: Result = {
    ...head,
    shapes,
    dtype: DTYPE,
    cacheType: CACHE_TYPE,
    bandwidth: bytesPerSecond,
    missing: [],
    rows: [],
  };
  const save = () => writeResult(out, { ...result });
  for (const part of only) {
    const measured = parts[part];
    if (measured === undefined) continue;
    const since = performance.now();
    try {
      for await (const row of measured(bytesPerSecond)) {
        result.rows.push(row);
        await save();
      }
    } catch (error) {
      result.missing.push(`${part}: ${error}`);
    }
    const seconds = (performance.now() - since) / 1000;
    console.error(`${part}: ${seconds.toFixed(1)} s`);
  }
  await save();
  console.log(stepTable(result) + "\n" + memoryTable(result));
  for (const line of result.missing) console.log(line);
  if (args.draw) await drawCharts(result, args.draw);
  const seconds = Math.round((performance.now() - start) / 1000);
  console.log(`${result.rows.length} figures in ${out} after ${seconds} s`);
}

// ---- parts ----

type Part = (bandwidth: number | null) => AsyncGenerator<Row>;

const parts: Record<string, Part> = {
  async *depth(bandwidth) {
    using model = await openModel({ layers: sizes.layers });
    for (const policy of ["weighted-kv", "full"]) {
      using filled = new Filled(model, policy, {
        budget: sizes.budget,
        capacity: sizes.depths.at(-1)! + 5 * sizes.steps + 2 * WARM_UP,
      });
      let fed = 0;
      for (const depth of sizes.depths) {
        // Steps that were timed count.
        await filled.feed(depth - fed);
        yield await filled.time("depth", bandwidth, depth);
        fed = filled.cache.stats().seen;
      }
    }
  },
  async *budget(bandwidth) {
    using model = await openModel({ layers: sizes.layers });
    for (const budget of sizes.budgets) {
      using filled = new Filled(model, "weighted-kv", { budget });
      yield await filled.full("budget", bandwidth);
    }
  },
  async *batch(bandwidth) {
    using model = await openModel({ layers: sizes.layers });
    for (const sequences of sizes.batches) {
      const { budget } = sizes;
      using filled = new Filled(model, "weighted-kv", {
        budget,
        sequences,
      });
      yield await filled.full("batch", bandwidth);
    }
  },
  async *heads(bandwidth) {
    for (const kvHeads of sizes.kvHeads) {
      const layers = sizes.headLayers;
      using model = await openModel({ layers, kvHeads });
      using filled = new Filled(model, "weighted-kv", {
        budget: sizes.headBudget,
      });
      yield await filled.full("heads", bandwidth);
    }
  },
  async *layers(bandwidth) {
    for (const layers of sizes.depthsOfLayers) {
      using model = await openModel({ layers });
      using filled = new Filled(model, "weighted-kv", {
        budget: sizes.budget,
      });
      yield await filled.full("layers", bandwidth);
    }
  },
  async *memory() {
    const { depths, budgets, budget, batches } = sizes;
    const groups: (readonly [string, number, number])[][] = [
      depths.map((depth) => ["full", depth, 1]),
      budgets.map((budget) => ["weighted-kv", budget, 1]),
      batches.map((batch) => ["weighted-kv", budget, batch]),
    ];
    for (const group of groups) {
      // Room for intermediate results stays as large as it was once needed.
      using model = await openModel({ layers: sizes.layers });
      for (const [policy, tokens, batch] of group) {
        yield await memoryOf(model, policy, tokens, batch);
      }
    }
  },
};

/** A model of random weights, alone on a backend that closes with it. */
async function openModel(changes: Partial<ModelConfig>): Promise<Model> {
  const backend = await Backend.open({ device });
  try {
    return await randomModel(backend, shapes, DTYPE, "int8", changes);
  } catch (error) {
    backend.close();
    throw error;
  }
}

/** A cache that is fed by attention alone, and a session that times whole steps on it. */
class Filled implements Disposable {
  readonly cache: KvCache;
  readonly #model: Model;
  readonly #session: Session;
  readonly #stack = new DisposableStack();
  readonly #graphs = new Map<string, Graph>();

  constructor(
    model: Model,
    policy: string,
    options: { budget: number; sequences?: number; capacity?: number },
  ) {
    this.#model = model;
    this.cache = this.#stack.use(
      model.createCache({ policy, cacheType: CACHE_TYPE, ...options }),
    );
    this.#session = this.#stack.use(new Session(model, this.cache));
    this.#session.setSampler({});
  }

  /** Feeds tokens: those that there is room for in passes, the others in steps. */
  async feed(tokens: number): Promise<void> {
    let left = tokens;
    while (left > 0 && this.cache.sequences === 1) {
      const rows = Math.min(left, PASS, this.cache.room());
      if (rows === 0) break;
      const graph = this.#graph(`pass ${rows}`, () => {
        const { qkv, out } = this.#memory(rows);
        return (layer) => this.cache.prefill(layer, 0, out, qkv, rows);
      });
      await graph.run();
      left -= rows;
    }
    if (left <= 0) return;
    const steps = (kinds: number) =>
      this.#graph(`steps ${kinds}`, () => {
        const all = Array.from(
          { length: kinds },
          (_, i) => this.#memory(this.cache.sequences, i + 1),
        );
        return (layer) => {
          for (const { qkv, out } of all) this.cache.attend(layer, out, qkv);
        };
      });
    await steps(KINDS).run(Math.floor(left / KINDS));
    await steps(1).run(left % KINDS);
  }

  /** Fills a cache of fixed size and times it. */
  async full(part: StepRow["part"], bandwidth: number | null) {
    const depth = this.cache.capacity + KINDS;
    await this.feed(depth);
    return await this.time(part, bandwidth, depth);
  }

  /** Times steps from here on. */
  async time(
    part: StepRow["part"],
    bandwidth: number | null,
    depth: number,
  ): Promise<StepRow> {
    const session = this.#session;
    for (let i = 0; i < WARM_UP; i++) await session.next();
    const { kept } = this.cache.stats();
    const samples = await timeRuns(sizes.steps, () => session.next());
    const together = await timeRuns(3, () => session.advance(sizes.steps));
    const { config, network } = this.#model;
    const { sequences, budget, policy } = this.cache;
    const cost = stepCost(
      config,
      network.stepBytes,
      CACHE_TYPE,
      kept,
      sequences,
    );
    return {
      part,
      policy: policy.name,
      layers: config.layers,
      kvHeads: config.kvHeads,
      batch: sequences,
      budget,
      depth,
      kept,
      ms: round(median(samples)),
      ms10: round(quantile(samples, 0.1)),
      ms90: round(quantile(samples, 0.9)),
      deviceMs: round(median(together) / sizes.steps),
      ...cost,
      leastMs: bandwidth && round(cost.bytes / bandwidth * 1000),
    };
  }

  [Symbol.dispose](): void {
    this.#stack.dispose();
  }

  #graph(name: string, make: () => (layer: number) => void): Graph {
    let graph = this.#graphs.get(name);
    if (graph === undefined) {
      const record = make();
      graph = this.#stack.use(this.#model.backend.record(() => {
        for (let i = 0; i < this.#model.config.layers; i++) record(i);
      }));
      this.#graphs.set(name, graph);
    }
    return graph;
  }

  #memory(rows: number, seed = 1): { qkv: Tensor; out: Tensor } {
    const { backend, config: { heads, kvHeads, headDim } } = this.#model;
    const width = (heads + 2 * kvHeads) * headDim;
    const qkv = this.#stack.use(new Tensor(backend, "F32", rows, width));
    qkv.write(randomFloats(rows * width, seed));
    const out = new Tensor(backend, "F32", rows, heads * headDim);
    return { qkv, out: this.#stack.use(out) };
  }
}

/** Memory with a cache of this size, once a prompt's pass and steps have run. */
async function memoryOf(
  model: Model,
  policy: string,
  tokens: number,
  batch: number,
): Promise<MemoryRow> {
  const options = {
    policy,
    budget: tokens,
    capacity: tokens,
    sequences: batch,
    cacheType: CACHE_TYPE,
  } as const;
  using cache = model.createCache(options);
  using session = new Session(model, cache);
  session.setSampler({});
  const prompt = Array.from({ length: Math.min(tokens - 1, 512) }, () => 1);
  await session.prompt(prompt);
  await session.advance(1);
  const { config } = model;
  const planned = planMemory(
    { config, weights: model.weightBytes, quantised: false },
    { ...options, device },
  );
  return {
    part: "memory",
    policy,
    layers: config.layers,
    batch,
    budget: cache.budget,
    depth: tokens,
    weights: model.weightBytes,
    cache: cache.bytes,
    cachePlanned: planned.cache,
    total: model.backend.memory,
    totalPlanned: planned.total,
  };
}

function round(ms: number): number {
  return Number(ms.toPrecision(5));
}

if (only.includes("fits")) {
  const { side, alone } = fits();
  console.log(`Sequences side by side:\n\n${side}\n`);
  console.log(`Tokens that one sequence can keep:\n\n${alone}`);
}
if (only.some((part) => PARTS.includes(part))) await measure();
if (only.includes("docs")) {
  if (args.out === undefined) throw new Error("docs takes --out FILE");
  await writeDocs(
    new URL("../docs/scale.md", import.meta.url),
    args.out,
    JSON.parse(await Deno.readTextFile(args.out)),
  );
}
