/**
 * Measures how the time of a step and the memory grow with depth, budget,
 * batch, heads and layers, beside what arithmetic says, and draws it; run by
 * hand on a machine with nothing else on its GPU.
 *
 *   deno task bench:scale [--quick] [--only PART[,PART...]] [--device cuda]
 *     [--shapes llama-3-8b] [--out FILE] [--draw FOLDER]
 *   deno task bench:scale --only fits
 *
 * Parts: depth, budget, batch, heads, layers, memory, and `fits`, the tables of
 * what fits on 24, 80 and 141 GB, which needs no device. Weights are random. The
 * file is written anew after every figure, and a part that fails loses no
 * other's. --draw writes the charts as SVG files, of a file that is there already
 * where no other part is asked for (`--only draw`).
 *
 * Depth is how many tokens a cache has really been fed: each of them attended,
 * was scored, and let another one leave, in steps of attention alone, without
 * the products around it, whose result no cache depends on. A full cache takes
 * them in passes of 2,048.
 */

import { parseArgs } from "@std/cli/parse-args";
import { formatTable } from "../cli/units.ts";
import { Backend, type Graph } from "../src/backend/backend.ts";
import { Tensor } from "../src/backend/tensor.ts";
import type { KvCache } from "../src/cache/cache.ts";
import { MAX_SLOTS } from "../src/cache/policy.ts";
import { type ChartSeries, lineChart } from "../src/evaluate/chart.ts";
import type { Model } from "../src/model.ts";
import type { ModelConfig } from "../src/models/architecture.ts";
import { mostBudget, mostSequences, planMemory } from "../src/plan.ts";
import { Session } from "../src/session.ts";
import { plannedShape, stepCost } from "./arithmetic.ts";
import { measureMemory } from "./memory.ts";
import { randomFloats, randomModel, type WeightType } from "./random_model.ts";
import { type Frame, frame, writeResult } from "./record.ts";
import type { ShapeName } from "./shapes.ts";
import { median, quantile, timeRuns } from "./timing.ts";

/** A step's time at one size. */
interface StepRow {
  part: "depth" | "budget" | "batch" | "heads" | "layers";
  policy: string;
  layers: number;
  kvHeads: number;
  batch: number;
  /** Tokens that a KV head keeps; null: all of them. */
  budget: number | null;
  /** Tokens fed before the clock started. */
  depth: number;
  /** Tokens cached then. */
  kept: number;
  /** Milliseconds of a step: median, tenth and ninetieth percentile. */
  ms: number;
  ms10: number;
  ms90: number;
  /** Milliseconds of a step where one call runs many and reads no token. */
  deviceMs: number;
  /** What a step must move and compute. */
  bytes: number;
  operations: number;
  /** Milliseconds that the bytes take at the bandwidth measured here. */
  leastMs: number | null;
}

/** Memory at one size. */
interface MemoryRow {
  part: "memory";
  policy: string;
  layers: number;
  batch: number;
  budget: number | null;
  depth: number;
  /** Bytes on the device: as the library counts them, and as planned. */
  weights: number;
  cache: number;
  cachePlanned: number;
  total: number;
  totalPlanned: number;
}

type Row = StepRow | MemoryRow;

interface Result extends Frame {
  shapes: ShapeName;
  dtype: WeightType;
  cacheType: typeof CACHE_TYPE;
  bandwidth: number | null;
  missing: string[];
  rows: Row[];
}

const PARTS = ["depth", "budget", "batch", "heads", "layers", "memory"];
const CACHE_TYPE = "bf16";
const DTYPE = "BF16";
/** Steps of different tokens in the graph that fills a cache. */
const KINDS = 8;
/** Tokens of a pass into a full cache. */
const PASS = 2048;
/** Steps that no clock sees. */
const WARM_UP = 4;

const args = parseArgs(Deno.args, {
  string: ["only", "shapes", "out", "device", "draw"],
  boolean: ["quick"],
  default: { shapes: "llama-3-8b", device: "cuda", only: PARTS.join() },
}) as unknown as {
  only: string;
  shapes: ShapeName;
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
  layers: tiny ? 2 : quick ? 4 : 32,
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
  const command = `deno task bench:scale ${Deno.args.join(" ")}`;
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
  for (const [part, measured] of Object.entries(parts)) {
    if (!only.includes(part)) continue;
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
  if (args.draw) await draw(result, args.draw);
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
    using model = await openModel({ layers: sizes.layers });
    for (const depth of sizes.depths) {
      yield await memoryOf(model, "full", depth, 1);
    }
    for (const budget of sizes.budgets) {
      yield await memoryOf(model, "weighted-kv", budget, 1);
    }
    for (const batch of sizes.batches) {
      yield await memoryOf(model, "weighted-kv", sizes.budget, batch);
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

// ---- tables ----

const count = (n: number): string => n.toLocaleString("en-US");
const gb = (bytes: number): string => (bytes / 1e9).toFixed(2);

function stepTable({ rows }: Result): string {
  const head = ["part", "policy", "layers", "KV heads", "batch", "budget"]
    .concat("depth", "ms", "device ms", "least ms", "GB", "GFLOP");
  return formatTable(
    head,
    rows.filter((row) => row.part !== "memory").map((row) => [
      row.part,
      row.policy,
      String(row.layers),
      String(row.kvHeads),
      String(row.batch),
      row.budget === null ? "-" : count(row.budget),
      count(row.depth),
      row.ms.toFixed(3),
      row.deviceMs.toFixed(3),
      row.leastMs?.toFixed(3) ?? "-",
      gb(row.bytes),
      (row.operations / 1e9).toFixed(2),
    ]),
    head.slice(2),
  );
}

function memoryTable({ rows }: Result): string {
  const head = ["policy", "batch", "tokens", "cache GB", "planned"]
    .concat("all GB", "all planned");
  return formatTable(
    head,
    rows.filter((row) => row.part === "memory").map((row) => [
      row.policy,
      String(row.batch),
      count(row.depth),
      gb(row.cache),
      gb(row.cachePlanned),
      gb(row.total),
      gb(row.totalPlanned),
    ]),
    head.slice(1),
  );
}

/** What fits on 24, 80 and 141 GB, as the tables of docs/scale.md. */
function fits(): string {
  const models = {
    "llama-3-8b": ["BF16", "Q8_0", "Q4_K"],
    "llama-2-7b": ["BF16", "Q8_0", "Q4_K"],
    "smollm2-135m": ["BF16", "Q8_0", "Q4_1"],
  } as const;
  // What the driver and its context take, with some room: a GB.
  const devices = [24e9, 80e9, 141e9].map((bytes) => bytes - 1e9);
  const options = { device: "cuda", cacheType: CACHE_TYPE } as const;
  const names = ["24 GB", "80 GB", "141 GB"];
  const side: string[][] = [["model", "weights", "each keeps", ...names]];
  const alone: string[][] = [["model", "weights", ...names]];
  for (const [name, types] of Object.entries(models)) {
    for (const dtype of types) {
      const model = plannedShape(name as ShapeName, dtype);
      const { context } = model.config;
      const weights = `${dtype}, ${gb(model.weights)} GB`;
      const caches = [
        ...[256, 1024, 4096].map((budget) =>
          [`${count(budget)}`, { budget }] as const
        ),
        [`all, to ${count(context)}`, { policy: "full" }] as const,
      ];
      for (const [keeps, cache] of caches) {
        side.push([
          ...[name, weights, keeps],
          ...devices.map((bytes) => {
            const most = mostSequences(model, bytes, { ...options, ...cache });
            return most === 4096 ? "4,096 or more" : count(most ?? 0);
          }),
        ]);
      }
      const endless = {
        ...model,
        config: { ...model.config, context: MAX_SLOTS },
      };
      alone.push([
        ...[name, weights],
        ...devices.map((bytes) => {
          const most = mostBudget(endless, bytes, options);
          return most === MAX_SLOTS
            ? `${count(MAX_SLOTS)} or more`
            : count(most ?? 0);
        }),
      ]);
    }
  }
  return `Sequences side by side:\n\n${markdown(side, 3)}\n
Tokens that one sequence can keep:\n\n${markdown(alone, 2)}`;
}

/** A table in Markdown; columns from `right` on are set to the right. */
function markdown([head, ...rows]: string[][], right: number): string {
  const line = (cells: readonly string[]) => `| ${cells.join(" | ")} |`;
  const rule = head!.map((_, i) => i < right ? "---" : "---:");
  return [line(head!), line(rule), ...rows.map(line)].join("\n");
}

// ---- drawings ----

/** Writes the charts of a result. */
async function draw(result: Result, folder: string): Promise<void> {
  await Deno.mkdir(folder, { recursive: true });
  const on = result.gpu ?? result.cpu;
  const { rows } = result;
  const steps = (part: StepRow["part"]) =>
    rows.filter((row): row is StepRow => row.part === part);
  const write = async (
    name: string,
    title: string,
    xLabel: string,
    yLabel: string,
    xScale: "linear" | "log",
    series: ChartSeries[],
  ) => {
    if (series.every(({ points }) => points.length === 0)) return;
    const svg = lineChart({
      title: `${title} (${on})`,
      xLabel,
      yLabel,
      xScale,
      base: 0,
      series,
    });
    await Deno.writeTextFile(`${folder}/${name}.svg`, svg);
  };
  /** A part's measured times, and those that its bytes would take. */
  const lines = (
    name: string,
    list: readonly StepRow[],
    x: (row: StepRow) => number,
  ): ChartSeries[] => [
    { name, points: list.map((row) => ({ x: x(row), y: row.ms })) },
    {
      name: `${name}: bytes / bandwidth`,
      points: list.flatMap((row) =>
        row.leastMs === null ? [] : [{ x: x(row), y: row.leastMs }]
      ),
    },
  ];
  const of = `${result.shapes}, ${result.dtype}`;
  const depth = steps("depth");
  const bounded = depth.filter(({ budget }) => budget !== null);
  await write(
    "depth",
    `A token's time by depth: ${of}`,
    "tokens fed before",
    "ms a token",
    "log",
    [
      ...lines(
        "full",
        depth.filter(({ budget }) => budget === null),
        (row) => row.depth,
      ),
      ...lines(
        `weighted-kv ${count(bounded[0]?.budget ?? 0)}`,
        bounded,
        (row) => row.depth,
      ),
    ],
  );
  await write(
    "budget",
    `A token's time by budget: ${of}`,
    "tokens kept a KV head",
    "ms a token",
    "log",
    lines("weighted-kv", steps("budget"), (row) => row.budget!),
  );
  await write(
    "batch",
    `A step's time by batch: ${of}`,
    "sequences",
    "ms a step",
    "log",
    lines("weighted-kv", steps("batch"), (row) => row.batch),
  );
  await write(
    "heads",
    `A token's time by KV heads: ${of}`,
    "KV heads",
    "ms a token",
    "linear",
    lines("weighted-kv", steps("heads"), (row) => row.kvHeads),
  );
  await write(
    "layers",
    `A token's time by layers: ${of}`,
    "layers",
    "ms a token",
    "linear",
    lines("weighted-kv", steps("layers"), (row) => row.layers),
  );
  const memory = rows.filter((row): row is MemoryRow => row.part === "memory");
  const full = memory.filter(({ policy }) => policy === "full");
  const kept = memory.find(({ budget, batch }) =>
    batch === 1 && budget === sizes.budget
  );
  await write(
    "memory",
    `A cache's memory by depth: ${of}`,
    "tokens fed",
    "GB",
    "log",
    [
      {
        name: "full",
        points: full.map((row) => ({ x: row.depth, y: row.cache / 1e9 })),
      },
      {
        name: "full: planned",
        points: full.map((row) => ({
          x: row.depth,
          y: row.cachePlanned / 1e9,
        })),
      },
      {
        name: `weighted-kv ${count(sizes.budget)}`,
        points: kept === undefined
          ? []
          : full.map((row) => ({ x: row.depth, y: kept.cache / 1e9 })),
      },
    ],
  );
}

if (only.includes("fits")) console.log(fits());
if (only.some((part) => PARTS.includes(part))) await measure();
else if (args.draw && args.out) {
  await draw(JSON.parse(await Deno.readTextFile(args.out)), args.draw);
}
