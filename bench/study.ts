/**
 * Runs the study of docs/results.md on a GPU, column by column, and writes a
 * file a column. What a file has is not measured again, so a run that was cut
 * off, or had too little time, goes on.
 *
 *   deno run -A bench/study.ts --text FILE[,FILE...] [--out bench/results]
 *     [--columns NAME,...] [--seconds N] [--model NAME]
 *
 * Texts are read one after the other, as one.
 */

import { parseArgs } from "@std/cli/parse-args";
import { createHash } from "node:crypto";
import {
  DEFAULT_MODEL,
  evaluate,
  loadModel,
  type Model,
  perplexity,
  type PerplexityOptions,
  type QuestionResult,
  type WindowResult,
} from "../mod.ts";
import { type Frame, frame, writeResult } from "./record.ts";
import { showUsage } from "./usage.ts";

/** A table of the study. */
interface Column {
  /** Its file is `study-NAME.json`. */
  name: string;
  /** Policies that run together, with one full cache where divergences are measured. */
  groups: readonly (readonly string[])[];
  budget: number;
  /** Windows of perplexity; absent of questions. */
  windows?: { window: number; windows: number; divergence: boolean };
  /** Questions; absent of windows. */
  questions?: {
    tasks: readonly string[];
    length: number;
    samples: number;
  };
  /** Options of the cache beyond its policy's own. */
  cache?: Pick<PerplexityOptions, "positions" | "layerBudgets">;
}

const SIX = [
  "eviction",
  "weighted-kv-ward:linear",
  "snapkv",
  "streaming-llm",
  "weighted-kv",
  "keepkv",
];
const RECALL = ["passkey", "niah_single_1", "key_value", "variable_tracking"];
const RULER = [
  ...["niah_multikey_2", "frequent_words", "common_words", "niah_multikey_3"],
];

/** Budgets of each KV head of the default model, of `E, heads by loss` in docs/candidates.md. */
const HEADS = Deno.readTextFileSync(
  new URL("candidates/heads-by-loss.txt", import.meta.url),
).trim().split(",").map((layer) => layer.split("/").map(Number));

const columns: readonly Column[] = [
  {
    name: "4096-256-light",
    groups: [["eviction", "weighted-kv", "weighted-kv:light"]],
    budget: 256,
    windows: { window: 4096, windows: 40, divergence: true },
  },
  {
    name: "4096-256-light-text",
    groups: [["eviction", "weighted-kv", "weighted-kv:light"]],
    budget: 256,
    windows: { window: 4096, windows: 40, divergence: true },
    cache: { positions: "text" },
  },
  {
    name: "4096-256-text",
    groups: [
      ["eviction", "weighted-kv", "weighted-kv-ward:linear"],
      ["snapkv", "h2o", "streaming-llm"],
    ],
    budget: 256,
    windows: { window: 4096, windows: 40, divergence: true },
    cache: { positions: "text" },
  },
  {
    name: "questions-256-text",
    groups: [["eviction"]],
    budget: 256,
    questions: { tasks: RECALL, length: 1024, samples: 10 },
    cache: { positions: "text" },
  },
  {
    name: "4096-256-heads",
    groups: [["eviction", "weighted-kv"]],
    budget: 256,
    windows: { window: 4096, windows: 40, divergence: true },
    cache: { positions: "text", layerBudgets: HEADS },
  },
  // The same windows of another book, with even budgets beside.
  ...([
    ["", {}],
    ["-text", { positions: "text" }],
    ["-heads", { positions: "text", layerBudgets: HEADS }],
  ] as const).map(([name, cache]): Column => ({
    name: `4096-256-more${name}`,
    groups: [["eviction"]],
    budget: 256,
    windows: { window: 4096, windows: 40, divergence: true },
    cache,
  })),
  {
    name: "questions-256-heads",
    groups: [["eviction"]],
    budget: 256,
    questions: { tasks: RECALL, length: 1024, samples: 10 },
    cache: { positions: "text", layerBudgets: HEADS },
  },
  ...([256, 1024] as const).map((budget): Column => ({
    name: `questions-${budget}`,
    groups: [
      ...["full", "eviction", "weighted-kv", "weighted-kv-ward:linear"],
      ...["keydiff", "snapkv"],
    ].map((policy) => [policy]),
    budget,
    questions: { tasks: RECALL, length: 4 * budget, samples: 10 },
  })),
  // RULER's other tasks; longer questions take longer, so there are fewer.
  {
    name: "ruler-256",
    groups: [
      ...["full", "eviction", "weighted-kv", "weighted-kv-ward:linear"],
      ...["keydiff", "snapkv"],
    ].map((policy) => [policy]),
    budget: 256,
    questions: { tasks: RULER, length: 1024, samples: 10 },
  },
  {
    name: "ruler-1024",
    groups: ["full", "eviction", "weighted-kv", "keydiff"].map((policy) => [
      policy,
    ]),
    budget: 1024,
    questions: { tasks: RULER, length: 4096, samples: 5 },
  },
  {
    name: "4096-1024",
    groups: [
      ["full", "eviction", "weighted-kv", "weighted-kv-ward:linear", "h2o"],
      ["snapkv", "keepkv", "weighted-kv-ward", "streaming-llm"],
      ["keydiff", "d2o", "vatp", "weighted-kv:literal"],
      ["lm-infinite", "cam", "tova", "knorm", "scissorhands", "caote"],
    ],
    budget: 1024,
    windows: { window: 4096, windows: 40, divergence: true },
  },
  {
    name: "16384-256",
    groups: SIX.map((policy) => [policy]),
    budget: 256,
    windows: { window: 16384, windows: 10, divergence: false },
  },
];

/** A row as it is kept, with what it was measured on. */
type Row = Record<string, unknown> & { policy: string; task?: string };

await showUsage(import.meta.url);
const args = parseArgs(Deno.args, {
  string: ["text", "out", "columns", "seconds", "model"],
  default: { out: "bench/results", seconds: "1e9", model: DEFAULT_MODEL },
}) as unknown as {
  text?: string;
  out: string;
  columns?: string;
  seconds: string;
  model: string;
};
const end = performance.now() + Number(args.seconds) * 1000;
const names = args.columns?.split(",") ?? columns.map(({ name }) => name);
const text = (args.text?.split(",") ?? []).map((path) =>
  Deno.readTextFileSync(path)
).join("");
using model = await loadModel(args.model, { device: "cuda" });
const tokens = await model.tokenizer.encode(text);

for (const name of names) {
  const column = columns.find((column) => column.name === name);
  if (column === undefined) throw new RangeError(`Unknown column ${name}`);
  const path = `${args.out}/study-${name}.json`;
  const known = await readRows(path);
  const current = await frame(
    `deno run -A bench/study.ts --columns ${name}`,
    model.backend,
  );
  const rows = known.rows;
  // What the slowest part so far took tells whether another one has time.
  let longest = 0;
  const parts = (column.questions?.tasks ?? [null]).flatMap((task) =>
    column.groups.map((group) => ({ task, group }))
  );
  for (const { task, group } of parts) {
    const left = (end - performance.now()) / 1000;
    if (left < longest) break;
    const begin = performance.now();
    const fresh = task === null
      ? await measure(model, column, group, rows)
      : await ask(model, column, task, group, rows);
    if (fresh.length === 0) continue;
    longest = Math.max(longest, (performance.now() - begin) / 1000);
    const { kernels, gpu, date } = current;
    rows.push(...fresh.map((row) => ({ ...row, kernels, gpu, date })));
    await writeResult(
      path,
      {
        ...current,
        model: args.model.split("/").at(-1)!,
        ...(column.windows ? { textSha256: sha256(text) } : {}),
        rows,
      } as Frame & Record<string, unknown>,
    );
    for (const row of fresh) {
      console.log(
        [name, row.policy, row.task, row.perplexity ?? row.score, row.nll]
          .map((x) => typeof x === "number" ? x.toFixed(3) : x ?? "")
          .join("  "),
      );
    }
  }
}

async function readRows(path: string): Promise<{ rows: Row[] }> {
  try {
    return JSON.parse(await Deno.readTextFile(path));
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return { rows: [] };
    throw error;
  }
}

/** Rows of a group that are not there yet, with each window's sums. */
async function measure(
  model: Model,
  column: Column,
  group: readonly string[],
  known: readonly Row[],
): Promise<Row[]> {
  const policies = group.filter((policy) =>
    !known.some((row) => row.policy === policy)
  );
  if (policies.length === 0) return [];
  const { window, windows, divergence } = column.windows!;
  const items: WindowResult[] = [];
  const rows: Row[] = [];
  for await (
    const row of perplexity(model, tokens, {
      ...column.cache,
      window,
      windows,
      divergence,
      batch: windows,
      policies,
      budgets: [column.budget],
      results: {
        items,
        add: (more) => Promise.resolve(void items.push(...more)),
      },
    })
  ) {
    const own = items.filter(({ policy, length }) =>
      policy === row.policy && length === row.window
    );
    rows.push({
      ...row,
      windowTargets: own.map(({ targets }) => targets),
      windowNll: own.map(({ nll }) => nll),
      ...(divergence ? { windowKl: own.map(({ kl }) => kl) } : {}),
    });
  }
  return rows;
}

/** Rows of a group's questions that are not there yet, with each one's score. */
async function ask(
  model: Model,
  column: Column,
  task: string,
  group: readonly string[],
  known: readonly Row[],
): Promise<Row[]> {
  const policies = group.filter((policy) =>
    !known.some((row) => row.policy === policy && row.task === task)
  );
  if (policies.length === 0) return [];
  const { length, samples } = column.questions!;
  const items: QuestionResult[] = [];
  const rows: Row[] = [];
  for await (
    const row of evaluate(model, {
      ...column.cache,
      tasks: [task],
      lengths: [length],
      samples,
      batch: 5 * samples,
      policies,
      budgets: [column.budget],
      results: {
        items,
        add: (more) => Promise.resolve(void items.push(...more)),
      },
    })
  ) {
    const own = items.filter(({ policy }) => policy === row.policy);
    rows.push({
      ...row,
      scores: own.map(({ score }) => score),
      nlls: own.map(({ nll }) => nll),
    });
  }
  return rows;
}

function sha256(text: string): string {
  return createHash("sha256").update(text).digest("hex");
}
