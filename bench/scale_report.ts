/** What bench/scale.ts measured: as tables, as charts, and in docs/scale.md. */

import { formatTable } from "../cli/units.ts";
import { sourceHash } from "../src/backend/build.ts";
import type { CacheType } from "../src/cache/layout.ts";
import { MAX_SLOTS } from "../src/cache/policy.ts";
import { type ChartSeries, lineChart } from "../src/evaluate/chart.ts";
import { mostBudget, mostSequences } from "../src/plan.ts";
import { plannedShape } from "./arithmetic.ts";
import type { WeightType } from "./random_model.ts";
import type { Frame } from "./record.ts";
import type { ShapeName } from "./shapes.ts";

/** What caches hold. */
export const CACHE_TYPE = "bf16";

/** A step's time at one size. */
export interface StepRow {
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
export interface MemoryRow {
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

/** One figure. */
export type Row = StepRow | MemoryRow;

/** A result file. */
export interface Result extends Frame {
  shapes: ShapeName;
  dtype: WeightType;
  cacheType: CacheType;
  bandwidth: number | null;
  missing: string[];
  rows: Row[];
}

// ---- tables ----

const count = (n: number): string => n.toLocaleString("en-US");
const gb = (bytes: number): string => (bytes / 1e9).toFixed(2);

/** Every step's time. */
export function stepTable({ rows }: Result): string {
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

/** Every size in memory. */
export function memoryTable({ rows }: Result): string {
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
export function fits(): { side: string; alone: string } {
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
  return { side: markdown(side, 3), alone: markdown(alone, 2) };
}

/** A table in Markdown; columns from `right` on are set to the right. */
function markdown([head, ...rows]: string[][], right: number): string {
  const line = (cells: readonly string[]) => `| ${cells.join(" | ")} |`;
  const rule = head!.map((_, i) => i < right ? "---" : "---:");
  return [line(head!), line(rule), ...rows.map(line)].join("\n");
}

// ---- drawings ----

type Across = (row: StepRow) => number;

/** Rows of one part of a result. */
function stepsOf({ rows }: Result, part: StepRow["part"]): StepRow[] {
  return rows.filter((row): row is StepRow => row.part === part);
}

/** Sizes in memory of one policy, and of as many sequences. */
function memoryOf({ rows }: Result, policy: string, batch = 1): MemoryRow[] {
  return rows.filter((row): row is MemoryRow =>
    row.part === "memory" && row.policy === policy && row.batch === batch
  );
}

/** Measured times, and below them those that their bytes would take. */
function lines(
  name: string,
  list: readonly StepRow[],
  x: Across,
): ChartSeries[] {
  const least = list.filter(({ leastMs }) => leastMs !== null);
  return [
    { name, points: list.map((row) => ({ x: x(row), y: row.ms })) },
    {
      name: "its bytes at the bandwidth",
      bound: true,
      points: least.map((row) => ({ x: x(row), y: row.leastMs! })),
    },
  ];
}

/** Writes the charts of a result. */
export async function drawCharts(
  result: Result,
  folder: string,
): Promise<void> {
  await Deno.mkdir(folder, { recursive: true });
  const write = async (
    name: string,
    title: string,
    [row]: readonly { layers: number }[],
    series: ChartSeries[],
    options: { xLabel: string; yLabel: string; xScale: "linear" | "log" },
  ) => {
    if (row === undefined) return;
    const layers = name === "layers" ? [] : [`${row.layers} layers`];
    const of = [...layers, result.dtype, result.gpu ?? result.cpu].join(", ");
    const svg = lineChart({
      title: `${title} (${of})`,
      base: 0,
      series,
      ...options,
    });
    await Deno.writeTextFile(`${folder}/${name}.svg`, svg);
  };
  const times = async (
    part: StepRow["part"],
    title: string,
    xLabel: string,
    xScale: "linear" | "log",
    x: Across,
  ) => {
    const list = stepsOf(result, part);
    const groups = Map.groupBy(
      list,
      ({ policy, budget }) =>
        budget === null || part === "budget"
          ? policy
          : `${policy}, budget ${count(budget)}`,
    );
    const series = [...groups].flatMap(([name, rows]) => lines(name, rows, x));
    const yLabel = "ms a step";
    await write(part, title, list, series, { xLabel, yLabel, xScale });
  };
  await times(
    "depth",
    "A step by depth",
    "tokens fed before",
    "log",
    (row) => row.depth,
  );
  await times(
    "budget",
    "A step by budget",
    "tokens kept a KV head",
    "log",
    (row) => row.kept,
  );
  await times(
    "batch",
    "A step by batch",
    "sequences",
    "log",
    (row) => row.batch,
  );
  await times(
    "heads",
    "A step by KV heads",
    "KV heads",
    "linear",
    (row) => row.kvHeads,
  );
  await times(
    "layers",
    "A step by layers",
    "layers",
    "linear",
    (row) => row.layers,
  );
  const full = memoryOf(result, "full");
  const budget = boundOf(result);
  const kept = memoryOf(result, "weighted-kv")
    .find((row) => row.budget === budget);
  const points = (y: (row: MemoryRow) => number) =>
    full.map((row) => ({ x: row.depth, y: y(row) / 1e9 }));
  await write("memory", "A cache's memory by depth", full, [
    { name: "full", points: points(({ cache }) => cache) },
    {
      name: "as planned",
      bound: true,
      points: points(({ cachePlanned }) => cachePlanned),
    },
    {
      name: `weighted-kv, budget ${count(budget)}`,
      points: kept === undefined ? [] : points(() => kept.cache),
    },
  ], { xLabel: "tokens fed", yLabel: "GB", xScale: "log" });
}

/** The budget of those parts that do not vary it. */
function boundOf(result: Result): number {
  return result.rows.find(({ part, budget }) =>
    (part === "depth" || part === "batch") && budget !== null
  )?.budget ?? 1024;
}

// ---- docs/scale.md ----

/** Writes a result's tables between the marks of a document, and its charts into the folder `scale` beside it. */
export async function writeDocs(
  document: URL,
  path: string,
  result: Result,
): Promise<void> {
  let text = await Deno.readTextFile(document);
  const tables = {
    ...documentTables(result),
    run: await describeRun(path, result),
  };
  for (const [name, table] of Object.entries(tables)) {
    const [from, to] = [`<!-- ${name} -->`, `<!-- end of ${name} -->`];
    const start = text.indexOf(from), end = text.indexOf(to);
    if (start < 0 || end < start) {
      throw new Error(`No ${from} in ${document.pathname}`);
    }
    text = `${text.slice(0, start)}${from}\n\n${table}\n\n${text.slice(end)}`;
  }
  await Deno.writeTextFile(document, text);
  const args = ["fmt", "--quiet", document.pathname];
  await new Deno.Command(Deno.execPath(), { args }).output();
  await drawCharts(result, new URL("scale", document).pathname);
}

async function describeRun(path: string, result: Result): Promise<string> {
  const { gpu, driver, cpu, date, command, kernels, library } = result;
  const where = gpu === undefined
    ? `${cpu}, ${result.cores} cores`
    : `One ${gpu}, driver ${driver}`;
  const bandwidth = result.bandwidth === null
    ? "Its bandwidth was not measured"
    : `It reads ${(result.bandwidth / 1e12).toFixed(2)} TB/s`;
  const older = kernels === await sourceHash(library)
    ? ""
    : " These are figures of older kernels.";
  const parts = result.rows.filter(({ part }) => part !== "layers");
  const layers = Map.groupBy(parts, (row) => row.layers);
  const run = [...layers].map(([layers, rows]) =>
    `${layers} layers for ${
      [...new Set(rows.map(({ part }) => part))].join(", ")
    }`
  );
  return `${where}, ${date}. ${bandwidth}. The shapes are those of ${result.shapes}, with
${run.join("; ")}. Every figure is in [${path}](../${path}), made by

    ${command}
${older && `\n${older.trim()}`}`.trimEnd();
}

const ms = (n: number | null): string => n?.toFixed(n < 10 ? 3 : 2) ?? "-";

/** How much of a step's time its bytes need. */
function share({ ms, leastMs }: StepRow): string {
  return leastMs === null ? "-" : `${Math.round(leastMs / ms * 100)}%`;
}

/** Policies side by side, a depth a row. */
function depthTable(result: Result): string {
  const rows = stepsOf(result, "depth");
  const names = [...new Set(rows.map(({ policy }) => policy))];
  const head = names.flatMap((name) => {
    const { budget } = rows.find(({ policy }) => policy === name)!;
    const what = budget === null ? name : `${name}, budget ${count(budget)}`;
    return [`${what}: ms a step`, "its bytes take", "share"];
  });
  const depths = [...new Set(rows.map(({ depth }) => depth))];
  return markdown([
    ["tokens fed", ...head],
    ...depths.map((depth) => [
      count(depth),
      ...names.flatMap((name) => {
        const row = rows.find((row) =>
          row.policy === name && row.depth === depth
        );
        return row === undefined
          ? ["-", "-", "-"]
          : [ms(row.ms), ms(row.leastMs), share(row)];
      }),
    ]),
  ], 0);
}

/** The tables of the document by their marks. */
function documentTables(result: Result): Record<string, string> {
  const table = (
    part: StepRow["part"],
    columns: Record<string, (row: StepRow) => string>,
  ) =>
    markdown([
      Object.keys(columns),
      ...stepsOf(result, part).map((row) =>
        Object.values(columns).map((cell) => cell(row))
      ),
    ], 0);
  const times = {
    "ms a step": (row: StepRow) => ms(row.ms),
    "p10 to p90": (row: StepRow) => `${ms(row.ms10)} to ${ms(row.ms90)}`,
    "on the device": (row: StepRow) => ms(row.deviceMs),
    "its bytes take": (row: StepRow) => ms(row.leastMs),
    "share": share,
    "GB": (row: StepRow) => gb(row.bytes),
    "GFLOP": (row: StepRow) => (row.operations / 1e9).toFixed(1),
  };
  const memory = result.rows.filter((row): row is MemoryRow =>
    row.part === "memory"
  );
  const { side, alone } = fits();
  return {
    depth: depthTable(result),
    budget: table("budget", { budget: ({ kept }) => count(kept), ...times }),
    batch: table("batch", {
      sequences: ({ batch }) => count(batch),
      "tokens/s": (row) => count(Math.round(row.batch / row.ms * 1000)),
      ...times,
    }),
    heads: table("heads", {
      "KV heads": ({ kvHeads }) => count(kvHeads),
      ...times,
    }),
    layers: table("layers", {
      layers: ({ layers }) => count(layers),
      ...times,
    }),
    memory: markdown([
      ["policy", "sequences", "tokens", "cache, GB", "planned"]
        .concat("all, GB", "all planned"),
      ...memory.map((row) => [
        `\`${row.policy}\``,
        count(row.batch),
        count(row.depth),
        ...[row.cache, row.cachePlanned, row.total, row.totalPlanned]
          .map((bytes) => (bytes / 1e9).toPrecision(3)),
      ]),
    ], 1),
    side,
    alone,
  };
}
