/** `wkv compare`: continues one prompt under several policies, side by side. */

import type { CacheOptions } from "../src/cache/layout.ts";
import { keepsAll } from "../src/cache/policy.ts";
import { findPolicy } from "../src/cache/registry.ts";
import {
  compare,
  type ComparedText,
  type Comparison,
} from "../src/evaluate/compare.ts";
import { htmlReport } from "../src/evaluate/html.ts";
import { describeRun } from "../src/evaluate/run_folder.ts";
import type { Model } from "../src/model.ts";
import { sideBySide } from "./columns.ts";
import { defineCommand } from "./command.ts";
import { processInput, readPrompt } from "./input.ts";
import { flag, text, type Values, whole, words } from "./option.ts";
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
  samplerOf,
  samplerOptions,
} from "./shared_options.ts";
import { formatBytes, formatTable } from "./units.ts";

const DEFAULT_POLICIES = ["full", "weighted-kv", "eviction"];
const DEFAULT_TOKENS = 64;

const options = {
  file: text("FILE", "Read the prompt from a file; - is standard input", {
    short: "f",
    file: true,
  }),
  "max-tokens": whole(
    1,
    `The most tokens to generate in each (default ${DEFAULT_TOKENS})`,
    2 ** 20,
  ),
  policy: words(
    "P[,P...]",
    `The caches' policies (default ${DEFAULT_POLICIES.join(",")})`,
    POLICY_NAMES,
  ),
  budget: budgetsOption,
  ...cacheOptions,
  ...samplerOptions,
  "ignore-eos": flag("Go on past the model's end token"),
  special: flag("Read special tokens spelled in the prompt as such"),
  html: text("FILE", "Write a page of it", { file: true }),
  ...loadOptions,
  ...outputOptions,
};

/** The command. */
export const compareCommand = defineCommand({
  operands: "[PROMPT]",
  most: { count: 1, what: "one prompt" },
  description:
    `Continues a prompt under several policies and budgets in lock-step. The first
token that differs from the first column's stands between \u27e6 and \u27e7; below are the
divergence from the first column, the memory and the speed of each.

${policyList()}`,
  options,
  permissions: (values) =>
    runFlags(values.model, {
      ...(values.file && values.file !== "-" ? { read: [values.file] } : {}),
      ...(values.html ? { write: [values.html] } : {}),
    }),
  async run({ values, operands, terminal, signal }) {
    const { json = false, quiet = false } = values;
    const caches = columnsOf(values);
    await noteFull(values.policy ?? DEFAULT_POLICIES, values, terminal);
    const prompt = await readPrompt(
      operands[0],
      values.file,
      processInput(),
      { ...(quiet ? {} : { terminal }), signal },
    );
    using model = await load(values, terminal, signal);
    const bar = new Bar(terminal.err);
    let comparison: Comparison;
    try {
      comparison = await compare(model, prompt, {
        caches,
        maxTokens: values["max-tokens"] ?? DEFAULT_TOKENS,
        ...samplerOf(values),
        ignoreEos: values["ignore-eos"],
        special: values.special,
        prefill: values.prefill,
        signal,
        onProgress(done, total) {
          if (!quiet) bar.draw("Comparing", done / total, `${done} tokens`);
        },
      });
    } finally {
      bar.clear();
    }
    const { columns, promptTokens } = comparison;
    if (json) {
      const common = { model: model.name, device: model.backend.description };
      for (const { pieces: _, ...column } of columns) {
        const line = { ...common, promptTokens, ...column };
        await terminal.out.write(`${JSON.stringify(line)}\n`);
      }
    } else {
      const texts = columns.map((column) => ({
        title: titleOf(column),
        text: marked(column),
      }));
      const width = terminal.out.isTerminal ? terminal.err.columns : 100;
      await terminal.out.write(
        `${sideBySide(texts, width)}\n${table(columns)}`,
      );
    }
    if (values.html !== undefined) {
      const html = await page(model, prompt, comparison);
      await Deno.writeTextFile(values.html, html);
    }
    return 0;
  },
});

/** A cache for each policy and budget, `full` once. */
function columnsOf(values: Values<typeof options>): CacheOptions[] {
  const common = cacheSettingsOf(values);
  return (values.policy ?? DEFAULT_POLICIES).flatMap((name) => {
    const full = keepsAll(findPolicy(name));
    return (full ? [undefined] : values.budget ?? [256]).map((budget) => {
      const policy = checkedPolicy(name, { ...values, budget });
      return { ...common, policy: policy.name, budget };
    });
  });
}

function titleOf({ cache }: ComparedText): string {
  return cache.budget === null
    ? cache.policy
    : `${cache.policy} ${cache.budget}`;
}

/** A column's text, its first token that differs between brackets. */
function marked({ pieces, tokens, differsAt }: ComparedText): string {
  return pieces.map((piece, i) =>
    i === differsAt && i < tokens.length
      ? piece.replace(/^(\s*)(.*)$/s, "$1\u27e6$2\u27e7")
      : piece
  ).join("");
}

const heads = [
  ...["cache", "tokens", "differs at", "KL", "same top", "behind"],
  ...["bytes", "in full", "tokens/s"],
];

function cells(column: ComparedText): string[] {
  const { cache, differsAt, kl, sameTop, shared, tokens } = column;
  return [
    titleOf(column),
    `${tokens.length}`,
    differsAt === null ? "-" : `${differsAt}`,
    kl.toFixed(4),
    sameTop.toFixed(3),
    `${shared}`,
    formatBytes(cache.bytes),
    formatBytes(cache.fullBytes),
    column.decodeTokensPerSecond?.toFixed(1) ?? "-",
  ];
}

function table(columns: readonly ComparedText[]): string {
  return formatTable(heads, columns.map(cells), heads.slice(1));
}

async function page(
  model: Model,
  prompt: string,
  { promptTokens, columns }: Comparison,
): Promise<string> {
  return htmlReport({
    title: "One prompt, several caches",
    summary:
      `${model.name} continues a prompt of ${promptTokens} tokens in lock-step. The first token that differs from the first column's stands between \u27e6 and \u27e7.`,
    sections: [
      {
        heading: "Divergence, memory, speed",
        text:
          "KL is the mean divergence from the first column in nats, same top the share of tokens before which both have the same likeliest one; both over the tokens drawn behind the same text, as many as the column behind says.",
        table: { columns: heads, rows: columns.map(cells) },
      },
      ...columns.map((column) => ({
        heading: titleOf(column),
        text: marked(column),
      })),
      { heading: "Prompt", text: prompt },
    ],
    manifest: {
      ...await describeRun(model),
      caches: columns.map(({ cache }) => cache),
    },
  });
}
