/** Pages and curves of perplexity runs; called by `wkv perplexity`. */

import { lineChart } from "./chart.ts";
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
  const round = (x: number | null, digits: number): number | null =>
    x === null ? null : Number(x.toFixed(digits));
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
