/** Pages and curves of runs; called by `wkv perplexity` and `wkv eval`. */

import { lineChart } from "./chart.ts";
import type { EvaluateRow, QuestionResult } from "./evaluate.ts";
import { htmlReport } from "./html.ts";
import type { PerplexityRow, WindowResult } from "./perplexity.ts";
import type { Manifest } from "./run_folder.ts";

/** Perplexity over the budget, a line for each policy; `full`, which has no budget, is a level line. */
export function perplexityChart(rows: readonly PerplexityRow[]): string {
  const budgets = rows.flatMap(({ budget }) => budget ?? []);
  const [least, most] = budgets.length > 0
    ? [Math.min(...budgets), Math.max(...budgets)]
    : [1, 1];
  const names = [...new Set(rows.map(({ policy }) => policy))];
  const windows = [...new Set(rows.map(({ window }) => window))];
  return lineChart({
    title: `Perplexity by budget, windows of ${windows.join(" and ")} tokens`,
    xLabel: "budget, tokens a KV head",
    yLabel: "perplexity",
    xScale: "log",
    series: names.flatMap((name) => {
      const points = rows.filter(({ policy }) => policy === name).flatMap(
        ({ budget, perplexity: y, stderr }) =>
          y === null
            ? []
            : (budget === null ? [...new Set([least, most])] : [budget])
              .map((x) => ({ x, y, error: stderr ?? 0 })),
      );
      return points.length === 0 ? [] : [{ name, points }];
    }),
  });
}

/** The page of a run. */
export function perplexityReport(
  rows: readonly PerplexityRow[],
  windows: readonly WindowResult[],
  manifest: Manifest,
): string {
  const { model, text, device } = manifest;
  const reasons = rows.flatMap(({ policy, reason }) =>
    reason === undefined ? [] : [`${policy}: ${reason}.`]
  );
  return htmlReport({
    title: `Perplexity of ${model.name}`,
    summary: `${text?.name ?? "A text"} on ${device}.`,
    sections: [
      {
        heading: "Policies and budgets",
        text: [
          "Perplexity is exp of the mean negative log-likelihood of a target, lower is better; +/- is one standard error. The gap is the distance to the full cache, with the standard error of the windows' differences: it decides between rows that lie within each other's own errors. KL is the divergence from the full cache in nats a token.",
          ...new Set(reasons),
        ].join("\n"),
        table: {
          columns: [
            ...["policy", "budget", "sinks", "recent", "window", "windows"],
            ...["targets", "perplexity", "+/-", "gap", "+/-", "KL", "+/-"],
            ...["same top", "seconds"],
          ],
          rows: rows.map((row) => [
            row.policy,
            row.budget,
            row.sinks,
            row.recent,
            row.window,
            row.windows,
            row.targets,
            round(row.perplexity, 3),
            round(row.stderr, 3),
            round(row.gap, 3),
            round(row.gapStderr, 3),
            round(row.kl, 4),
            round(row.klStderr, 4),
            round(row.sameTop, 4),
            round(row.seconds, 1),
          ]),
        },
        chart: perplexityChart(rows),
      },
      {
        heading: "Windows",
        text: "Each window by itself, in nats a target.",
        table: {
          columns: [
            ...["policy", "budget", "window", "targets", "nll", "KL"],
            "same top",
          ],
          rows: windows.map((item) => [
            item.policy,
            item.budget,
            item.window,
            item.targets,
            round(item.nll / item.targets, 4),
            round(item.kl === null ? null : item.kl / item.targets, 4),
            round(item.same === null ? null : item.same / item.targets, 4),
          ]),
        },
      },
    ],
    manifest,
  });
}

/** The page of a run of questions. */
export function evaluateReport(
  rows: readonly EvaluateRow[],
  questions: readonly QuestionResult[],
  manifest: Manifest,
): string {
  const { model, device } = manifest;
  const reasons = rows.flatMap(({ policy, reason }) =>
    reason === undefined ? [] : [`${policy}: ${reason}.`]
  );
  const name = ({ policy, budget }: EvaluateRow): string =>
    budget === null ? policy : `${policy} ${budget}`;
  const groups = Map.groupBy(
    rows.filter(({ byDepth }) => byDepth !== null),
    ({ task, length }) => `${task}, ${length} tokens`,
  );
  return htmlReport({
    title: `Retrieval by ${model.name}`,
    summary: `Generated questions, seed ${rows[0]?.seed ?? 0}, prompts ${
      rows[0]?.prompt ?? "streamed"
    }, on ${device}.`,
    sections: [
      {
        heading: "Tasks, policies and budgets",
        text: [
          "Score is the mean share of the references that the output contains, in percent, higher is better; nll is the mean negative log-likelihood of the right answer in nats a token, lower is better; +/- is one standard error over the questions.",
          ...new Set(reasons),
        ].join("\n"),
        table: {
          columns: [
            ...["task", "length", "policy", "budget", "questions"],
            ...["score", "+/-", "nll", "+/-"],
          ],
          rows: rows.map((row) => [
            row.task,
            row.length,
            row.policy,
            row.budget,
            row.questions,
            round(row.score, 1),
            round(row.scoreStderr, 1),
            round(row.nll, 3),
            round(row.nllStderr, 3),
          ]),
        },
      },
      ...[...groups].map(([heading, rows]) => ({
        heading,
        chart: lineChart({
          title: `nll of the answer by its depth: ${heading}`,
          xLabel: "depth, 0 the beginning",
          yLabel: "nats a token",
          series: rows.map((row) => ({
            name: name(row),
            points: row.byDepth!.map(({ depth, nll }) => ({
              x: depth,
              y: nll,
            })),
          })),
        }),
      })),
      {
        heading: "Questions",
        table: {
          columns: [
            ...["task", "length", "depth", "policy", "budget", "score"],
            ...["nll", "references", "output"],
          ],
          rows: questions.map((one) => [
            one.task,
            one.length,
            one.depth,
            one.policy,
            one.budget,
            round(one.score, 2),
            round(one.nll, 3),
            one.references.join(", ").slice(0, 60),
            one.output.trim().replace(/\s+/g, " ").slice(0, 60),
          ]),
        },
      },
    ],
    manifest,
  });
}

function round(x: number | null, digits: number): number | null {
  return x === null ? null : Number(x.toFixed(digits));
}
