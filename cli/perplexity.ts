/** `wkv perplexity`: measures policies and budgets on a text. */

import type { BudgetSize } from "../src/cache/budget.ts";
import type { KvCache } from "../src/cache/cache.ts";
import type { Model } from "../src/model.ts";
import {
  perplexity,
  type PerplexityOptions,
  type PerplexityRow,
  type WindowResult,
} from "../src/evaluate/perplexity.ts";
import { perplexityChart, perplexityReport } from "../src/evaluate/report.ts";
import {
  describeRun,
  RunFolder,
  textFingerprint,
} from "../src/evaluate/run_folder.ts";
import { defineCommand } from "./command.ts";
import { processInput, readTextFile } from "./input.ts";
import { flag, text, UsageError, type Values, whole, words } from "./option.ts";
import { runFlags } from "./permissions.ts";
import { Bar } from "./progress.ts";
import {
  budgetsOption,
  cacheOptions,
  cacheSettingsOf,
  checkedPolicy,
  load,
  loadOptions,
  noteFull,
  outputOptions,
  POLICY_NAMES,
  policyList,
} from "./shared_options.ts";
import { formatTable, formatTime } from "./units.ts";

const options = {
  text: text("FILE", "The text; - is standard input", { file: true }),
  window: whole(2, "Tokens of a window"),
  stride: whole(1, "Tokens between two windows (default half a window)"),
  windows: whole(1, "The most windows (default all whole ones)"),
  offset: whole(0, "Tokens skipped at the start (default 0)"),
  policy: words(
    "P[,P...]",
    "The cache's policies (default weighted-kv)",
    POLICY_NAMES,
  ),
  budget: budgetsOption,
  ...cacheOptions,
  batch: whole(1, "Windows run side by side (default by memory)", 4096),
  divergence: flag(
    "Run the full cache beside the others and measure how far they are from it",
  ),
  out: text(
    "FOLDER",
    "Keep results and a report there; given again, the run goes on",
    { file: true },
  ),
  svg: text("FILE", "Draw perplexity over the budget", { file: true }),
  "dump-cache": text(
    "FILE",
    "Write the cache after the first window's last fed token, as JSON lines",
    { file: true },
  ),
  ...loadOptions,
  ...outputOptions,
};

/** The command. */
export const perplexityCommand = defineCommand({
  operands: "",
  most: { count: 0, what: "no argument, the text goes behind --text" },
  description:
    `Measures perplexity over sliding windows, each from an empty cache: a row for each policy and budget.

${policyList()}`,
  options,
  permissions: (values) => {
    const { text, "dump-cache": dump, out, svg } = values;
    const write = [dump, svg, out].flatMap((path) => path ?? []);
    const read = [text === "-" ? undefined : text, out];
    return runFlags(values.model, {
      read: read.flatMap((path) => path ?? []),
      ...(write.length > 0 ? { write } : {}),
    });
  },
  async run({ values, terminal, signal }) {
    const { json = false, quiet = false, window, text: path } = values;
    if (path === undefined) {
      throw new UsageError("Name a text with --text FILE");
    }
    if (window === undefined) {
      throw new UsageError("Give the tokens of a window with --window N");
    }
    const policies = values.policy ?? ["weighted-kv"];
    const budgets = values.budget ?? [256];
    checkOptions(policies, budgets, values);
    await noteFull(policies, values, terminal);
    const input = await readTextFile(path, processInput(), signal);
    using dump = values["dump-cache"] === undefined
      ? null
      : await Deno.open(values["dump-cache"], {
        write: true,
        create: true,
        truncate: true,
      });
    using model = await load(values, terminal, signal);
    const bar = new Bar(terminal.err);
    const start = performance.now();
    const settings: PerplexityOptions = {
      window,
      stride: values.stride,
      windows: values.windows,
      offset: values.offset,
      policies,
      budgets,
      ...cacheSettingsOf(values),
      prefill: values.prefill,
      batch: values.batch,
      divergence: values.divergence,
    };
    const folder = await openFolder(values, settings, model, { path, input });
    if (folder !== null && folder.items.length > 0 && !quiet) {
      await terminal.err.write(
        `${folder.path}: going on after ${folder.items.length} results\n`,
      );
    }
    const rows = perplexity(model, input, {
      ...settings,
      ...(folder === null ? {} : { results: folder }),
      signal,
      onProgress(done, total) {
        if (quiet) return;
        const left = (performance.now() - start) * (total - done) / done;
        bar.draw("Perplexity", done / total, `${formatTime(left)} left`);
      },
      onFirstWindow: dump === null
        ? undefined
        : (cache) => dumpCache(dump, model, cache),
    });
    const done: PerplexityRow[] = [];
    try {
      for await (const row of rows) {
        bar.clear();
        done.push(row);
        if (json) await terminal.out.write(`${JSON.stringify(row)}\n`);
      }
    } finally {
      bar.clear();
      if (!json && done.length > 0) await terminal.out.write(table(done));
    }
    if (values.svg !== undefined) {
      await Deno.writeTextFile(values.svg, perplexityChart(done));
    }
    await folder?.write(
      "report.html",
      perplexityReport(done, folder.items, folder.manifest),
    );
    return 0;
  },
});

/** Refuses before a model is loaded what cannot be measured. */
function checkOptions(
  policies: readonly string[],
  budgets: readonly BudgetSize[],
  values: Values<typeof options>,
): void {
  for (const policy of policies) {
    for (const budget of budgets) checkedPolicy(policy, { ...values, budget });
  }
  if (values.out !== undefined && values["dump-cache"] !== undefined) {
    throw new UsageError(
      "Give --out or --dump-cache: a run that goes on may have no first window",
    );
  }
}

/** The folder of `--out`, new or to go on with; null without one. */
async function openFolder(
  values: Values<typeof options>,
  settings: PerplexityOptions,
  model: Model,
  text: { path: string; input: string },
): Promise<RunFolder<WindowResult> | null> {
  if (values.out === undefined) return null;
  return await RunFolder.open<WindowResult>(values.out, {
    command: "perplexity",
    options: {
      ...settings,
      activations: model.activations,
      kvHeads: values["kv-heads"] ?? "model",
    },
    ...await describeRun(model),
    text: textFingerprint(text.path, text.input),
  });
}

/** Writes sequence 0 of a cache, a line for each layer and KV head. */
async function dumpCache(
  file: Deno.FsFile,
  model: Model,
  cache: KvCache,
): Promise<void> {
  const { layers, kvHeads } = model.config;
  const lines: string[] = [];
  for (let layer = 0; layer < layers; layer++) {
    for (let head = 0; head < kvHeads; head++) {
      const { kept, steps, score, valueNorm } = cache.rows(layer, head);
      lines.push(JSON.stringify({
        policy: cache.policy.name,
        positions: cache.positions,
        budget: cache.budget,
        steps: cache.stats().seen,
        layer,
        head,
        kept,
        steps_attended: steps,
        score,
        value_norm: valueNorm,
      }));
    }
  }
  const bytes = new TextEncoder().encode(lines.join("\n") + "\n");
  for (let at = 0; at < bytes.length;) {
    at += await file.write(bytes.subarray(at));
  }
}

/** The least and the most that heads of layers keep, where they differ. */
function layersOf({ layerSlots, headSlots }: PerplexityRow): string {
  const slots = headSlots?.flat() ?? layerSlots;
  return slots === null ? "-" : `${Math.min(...slots)}-${Math.max(...slots)}`;
}

function table(rows: readonly PerplexityRow[]): string {
  const whole = (value: number | null): string => value?.toString() ?? "-";
  const fixed = (digits: number) => (value: number | null): string =>
    value?.toFixed(digits) ?? "-";
  const columns: [head: string, cell: (row: PerplexityRow) => string][] = [
    ["policy", ({ policy }) => policy],
    ["budget", ({ budget }) => whole(budget)],
    ["sinks", ({ sinks }) => whole(sinks)],
    ["recent", ({ recent }) => whole(recent)],
    ...rows.some(({ layerSlots }) => layerSlots !== null)
      ? [["layers", layersOf] as [string, (row: PerplexityRow) => string]]
      : [],
    ["positions", ({ positions }) => positions],
    ["window", ({ window }) => whole(window)],
    ["targets", ({ targets }) => whole(targets)],
    ["perplexity", ({ perplexity }) => fixed(4)(perplexity)],
    ["+/-", ({ stderr }) => fixed(4)(stderr)],
  ];
  if (rows.some(({ gap }) => gap !== null)) {
    columns.push(
      ["gap", ({ gap }) => fixed(4)(gap)],
      ["gap +/-", ({ gapStderr }) => fixed(4)(gapStderr)],
    );
  }
  if (rows.some(({ kl }) => kl !== null)) {
    columns.push(
      ["KL", ({ kl }) => fixed(5)(kl)],
      ["KL +/-", ({ klStderr }) => fixed(5)(klStderr)],
      ["same top", ({ sameTop }) => fixed(4)(sameTop)],
    );
  }
  columns.push(["time", ({ seconds }) => formatTime(seconds * 1000)]);
  const reasons = rows.flatMap(({ policy, reason }) =>
    reason === undefined ? [] : [`${policy}: ${reason}\n`]
  );
  const heads = columns.map(([head]) => head);
  return formatTable(
    heads,
    rows.map((row) => columns.map(([, cell]) => cell(row))),
    heads.filter((head) => !["policy", "positions", "time"].includes(head)),
  ) + [...new Set(reasons)].join("");
}
