/** `wkv eval`: asks generated questions whose answers lie far back, through bounded caches. */

import {
  checkOptions,
  evaluate,
  type EvaluateOptions,
  type EvaluateRow,
  type QuestionResult,
  tasks,
} from "../src/evaluate/evaluate.ts";
import { evaluateReport } from "../src/evaluate/report.ts";
import { describeRun, RunFolder } from "../src/evaluate/run_folder.ts";
import { defineCommand } from "./command.ts";
import {
  choice,
  decimal,
  decimals,
  text,
  whole,
  wholes,
  words,
} from "./option.ts";
import { runFlags } from "./permissions.ts";
import { Bar } from "./progress.ts";
import {
  budgetsOption,
  cacheOptions,
  cacheSettingsOf,
  load,
  loadOptions,
  noteFull,
  outputOptions,
  POLICY_NAMES,
  policyList,
} from "./shared_options.ts";
import { formatTable, formatTime } from "./units.ts";

const { prefill: _, ...cache } = cacheOptions;
const DEFAULT_LENGTHS = [512, 1024];

const options = {
  tasks: words("T[,T...]", "The tasks (default all)", [...tasks.keys()]),
  lengths: wholes(
    64,
    `Tokens of a question with its answer (default ${
      DEFAULT_LENGTHS.join(",")
    })`,
    2 ** 20,
  ),
  depths: decimals(
    0,
    1,
    "Where answers lie, 0 the beginning (default 0,0.25,0.5,0.75,1)",
  ),
  samples: whole(1, "Questions a depth (default 4)", 1e6),
  fraction: decimal(0, 1, "Ask this share of the questions alone", true),
  batch: whole(1, "Questions asked side by side (default 1)", 2048),
  policy: words(
    "P[,P...]",
    "The cache's policies (default full,weighted-kv)",
    POLICY_NAMES,
  ),
  budget: budgetsOption,
  prompt: choice(
    ["streamed", "compressed"],
    "Token by token through the cache, or compressed after one pass (default streamed)",
  ),
  seed: whole(0, "Another seed gives other questions (default 0)"),
  ...cache,
  out: text(
    "FOLDER",
    "Keep results and a report there; given again, the run goes on",
    { file: true },
  ),
  ...loadOptions,
  ...outputOptions,
};

/** The command. */
export const evalCommand = defineCommand({
  operands: "",
  most: { count: 0, what: "no argument" },
  description:
    `Asks generated questions whose answers lie far back: a row for each task, length,
policy and budget. Scores count the strings that a greedy continuation contains;
nll is the right answer's, which tells models apart that spell none of them.

Tasks:
${
      [...tasks.values()].map(({ name, summary }) =>
        `  ${name.padEnd(17)}  ${summary}`
      ).join("\n")
    }

${policyList()}`,
  options,
  permissions: (values) =>
    runFlags(
      values.model,
      values.out ? { read: [values.out], write: [values.out] } : {},
    ),
  async run({ values, terminal, signal }) {
    const { json = false, quiet = false } = values;
    const settings: EvaluateOptions = {
      tasks: values.tasks ?? [...tasks.keys()],
      lengths: values.lengths ?? DEFAULT_LENGTHS,
      depths: values.depths,
      samples: values.samples,
      batch: values.batch,
      fraction: values.fraction,
      policies: values.policy ?? ["full", "weighted-kv"],
      budgets: values.budget ?? [256],
      prompt: values.prompt,
      seed: values.seed,
      ...cacheSettingsOf(values),
    };
    checkOptions(settings);
    await noteFull(settings.policies, values, terminal);
    using model = await load(values, terminal, signal);
    const folder = values.out === undefined
      ? null
      : await RunFolder.open<QuestionResult>(values.out, {
        command: "eval",
        options: {
          ...settings,
          activations: model.activations,
          kvHeads: values["kv-heads"] ?? "model",
        },
        ...await describeRun(model),
        text: null,
      });
    const bar = new Bar(terminal.err);
    const start = performance.now();
    const done: EvaluateRow[] = [];
    try {
      for await (
        const row of evaluate(model, {
          ...settings,
          ...(folder === null ? {} : { results: folder }),
          signal,
          onProgress(done, total) {
            if (quiet) return;
            const left = (performance.now() - start) * (total - done) / done;
            bar.draw("Asking", done / total, `${formatTime(left)} left`);
          },
        })
      ) {
        bar.clear();
        done.push(row);
        if (json) await terminal.out.write(`${JSON.stringify(row)}\n`);
      }
    } finally {
      bar.clear();
      if (!json && done.length > 0) await terminal.out.write(table(done));
    }
    await folder?.write(
      "report.html",
      evaluateReport(done, folder.items, folder.manifest),
    );
    return 0;
  },
});

function table(rows: readonly EvaluateRow[]): string {
  const fixed = (digits: number, value: number | null): string =>
    value?.toFixed(digits) ?? "-";
  const right = ["length", "budget", "questions", "score", "+/-", "nll"];
  const reasons = rows.flatMap(({ policy, reason }) =>
    reason === undefined ? [] : [`${policy}: ${reason}\n`]
  );
  return formatTable(
    [
      ...["task", "length", "policy", "budget", "questions"],
      ...["score", "+/-", "nll", "+/-"],
    ],
    rows.map((row) => [
      row.task,
      `${row.length}`,
      row.policy,
      `${row.budget ?? "-"}`,
      `${row.questions}`,
      fixed(1, row.score),
      fixed(1, row.scoreStderr),
      fixed(3, row.nll),
      fixed(3, row.nllStderr),
    ]),
    right,
  ) + [...new Set(reasons)].join("");
}
