/**
 * Prints tables of docs/results.md from the study's files, with differences
 * paired by window, or by question, from a policy of the same file.
 *
 *   deno run -A bench/tables.ts FILE... [--against eviction]
 *
 * Intervals are one standard error of the sum of the windows' differences; the
 * 95% ones in brackets are of 10,000 draws of windows.
 */

import { parseArgs } from "@std/cli/parse-args";
import { Random } from "../mod.ts";

/** A row of windows or of questions, as study.ts writes it. */
interface Row {
  policy: string;
  targets: number;
  perplexity: number;
  stderr: number;
  kl: number | null;
  klStderr: number | null;
  sameTop: number | null;
  seconds: number;
  windowTargets: number[];
  windowNll: number[];
  task?: string;
  questions: number;
  score: number;
  scores: number[];
  nll: number;
  nlls: number[];
}

const args = parseArgs(Deno.args, {
  string: ["against"],
  default: { against: "eviction" },
}) as unknown as { _: string[]; against: string };

for (const path of args._) {
  const { rows } = JSON.parse(await Deno.readTextFile(path)) as { rows: Row[] };
  console.log(`\n${path}, against ${args.against}\n`);
  if (rows[0]?.task === undefined) windows(rows);
  else questions(rows);
}

function windows(rows: Row[]): void {
  const host = rows.find(({ policy }) => policy === args.against)!;
  const full = rows.find(({ policy }) => policy === "full");
  const gap = full && host.perplexity - full.perplexity;
  rows.sort((a, b) => a.perplexity - b.perplexity);
  for (const row of rows) {
    const { policy, perplexity, stderr, kl, klStderr, sameTop } = row;
    const cells = [policy, `${perplexity.toFixed(2)} ± ${stderr.toFixed(2)}`];
    if (full && gap) {
      const own = perplexity - full.perplexity;
      const error = perplexity * pair(row, full).error;
      cells.push(`${own.toFixed(2)} ± ${error.toFixed(2)}`);
      cells.push(`${(100 * own / gap).toFixed(0)}%`);
    }
    const { mean, error, low, high } = pair(row, host);
    const percent = (x: number) => (100 * Math.expm1(x)).toFixed(2);
    cells.push(
      `${percent(mean)}% ± ${(100 * error).toFixed(2)}% [${percent(low)}, ${
        percent(high)
      }]`,
    );
    if (kl !== null) cells.push(`${kl.toFixed(3)} ± ${klStderr!.toFixed(3)}`);
    if (sameTop !== null) cells.push(`${(100 * sameTop).toFixed(1)}%`);
    cells.push(row.seconds.toFixed(1), `${row.targets}`);
    console.log(`| ${cells.join(" | ")} |`);
  }
}

/** The mean difference of two rows' nll, its standard error and 95% interval. */
function pair(
  row: Row,
  host: Row,
): { mean: number; error: number; low: number; high: number } {
  const differences = row.windowNll.map((nll, w) => nll - host.windowNll[w]!);
  return paired(differences, row.windowTargets);
}

function paired(
  differences: readonly number[],
  weights: readonly number[],
): { mean: number; error: number; low: number; high: number } {
  const n = differences.length;
  const ratio = (indices: readonly number[]) =>
    indices.reduce((sum, i) => sum + differences[i]!, 0) /
    indices.reduce((sum, i) => sum + weights[i]!, 0);
  const mean = ratio([...differences.keys()]);
  const total = weights.reduce((a, b) => a + b);
  const squares = differences.reduce(
    (sum, x, i) => sum + (x - mean * weights[i]!) ** 2,
    0,
  );
  const random = new Random(0, "tables");
  const draws = Array.from(
    { length: 10000 },
    () => ratio(Array.from({ length: n }, () => random.below(n))),
  ).sort((a, b) => a - b);
  const error = Math.sqrt(n / (n - 1) * squares) / total;
  return { mean, error, low: draws[250]!, high: draws[9750]! };
}

function questions(rows: Row[]): void {
  for (const task of new Set(rows.map(({ task }) => task))) {
    const own = rows.filter((row) => row.task === task);
    const host = own.find(({ policy }) => policy === args.against);
    own.sort((a, b) => a.nll - b.nll);
    console.log(`${task}, ${own[0]!.questions} questions`);
    for (const row of own) {
      const cells = [
        row.policy,
        ...[row.scores.map((x) => 100 * x), row.nlls]
          .map((list, i) => {
            const { mean, error } = paired(list, list.map(() => 1));
            return `${mean.toFixed(i === 0 ? 0 : 3)} ± ${
              error.toFixed(i === 0 ? 1 : 3)
            }`;
          }),
      ];
      if (host) {
        const { mean, error, low, high } = paired(
          row.nlls.map((nll, i) => nll - host.nlls[i]!),
          row.nlls.map(() => 1),
        );
        cells.push(
          `${mean.toFixed(3)} ± ${error.toFixed(3)} [${low.toFixed(3)}, ${
            high.toFixed(3)
          }]`,
        );
      }
      console.log(`| ${cells.join(" | ")} |`);
    }
  }
}
