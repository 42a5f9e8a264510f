/** `wkv perplexity`: measures policies and budgets on a text. */

import type { KvCache } from "../src/cache/cache.ts";
import { resolveBudget } from "../src/cache/policy.ts";
import { findPolicy } from "../src/cache/registry.ts";
import type { Model } from "../src/model.ts";
import { perplexity, type PerplexityRow } from "../src/evaluate/perplexity.ts";
import { chunkSize } from "../src/session.ts";
import { defineCommand } from "./command.ts";
import { processInput, readTextFile } from "./input.ts";
import { text, UsageError, whole, wholes, words } from "./option.ts";
import { runFlags } from "./permissions.ts";
import { Bar } from "./progress.ts";
import {
  BUDGET,
  cacheOptions,
  load,
  loadOptions,
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
  budget: wholes(1, BUDGET.summary, BUDGET.most),
  ...cacheOptions,
  batch: whole(1, "Windows run side by side (default by memory)", 4096),
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
    const { text, "dump-cache": dump } = values;
    return runFlags(values.model, {
      ...(text && text !== "-" ? { read: [text] } : {}),
      ...(dump ? { write: [dump] } : {}),
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
    for (const policy of policies.map(findPolicy)) {
      chunkSize(values.prefill ?? "exact", policy);
      if (policy.select === "none") continue;
      for (const budget of budgets) resolveBudget(policy, budget, values);
    }
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
    const rows = perplexity(model, input, {
      window,
      stride: values.stride,
      windows: values.windows,
      offset: values.offset,
      policies,
      budgets,
      sinks: values.sinks,
      recent: values.recent,
      interval: values.interval,
      positions: values.positions,
      cacheType: values["cache-type"],
      prefill: values.prefill,
      batch: values.batch,
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
    return 0;
  },
});

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

function table(rows: readonly PerplexityRow[]): string {
  const numbers = ["budget", "sinks", "recent", "targets", "perplexity", "+/-"];
  const cell = (value: number | null): string => value?.toString() ?? "-";
  const head = ["policy", ...numbers.slice(0, 3), "positions", "targets"]
    .concat("perplexity", "+/-", "time");
  const reasons = rows.flatMap(({ policy, reason }) =>
    reason === undefined ? [] : [`${policy}: ${reason}\n`]
  );
  return formatTable(
    head,
    rows.map((row) => [
      row.policy,
      cell(row.budget),
      cell(row.sinks),
      cell(row.recent),
      row.positions,
      row.targets.toString(),
      row.perplexity?.toFixed(4) ?? "-",
      row.stderr?.toFixed(4) ?? "-",
      formatTime(row.seconds * 1000),
    ]),
    numbers,
  ) + [...new Set(reasons)].join("");
}
