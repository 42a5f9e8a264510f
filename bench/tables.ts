/**
 * Prints tables of docs/results.md from the study's files, with differences
 * paired by window, or by question, from a policy.
 *
 *   deno run -A bench/tables.ts FILE... [--against eviction]
 *     [--beside FILE[,FILE...]] [--pool]
 *
 * Rows of `--beside` are what others are paired with: those of the policy that
 * `--against` names, without one those of the same policy; several files' rows of
 * a policy count as one. `--pool` counts the windows of all files together, for
 * the policies or rules that all of them have. Of candidate files `--against "E,
 * cache"` puts every rule beside that one, without its bound.
 *
 * Intervals are one standard error of the sum of the windows' differences; the
 * 95% ones in brackets are of 10,000 draws of windows. Those of g, the share of a
 * host's gap that docs/candidates.md defines, are Student's, of g with one window
 * left out at a time: rules were run on as few as six windows.
 */

import { parseArgs } from "@std/cli/parse-args";
import { Random } from "../mod.ts";
import { student } from "./student.ts";
import { showUsage } from "./usage.ts";

/** A row of windows, of questions or of a candidate rule. */
interface Row {
  policy: string;
  positions: string;
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
  /** A candidate's name; its host is a rule of these files too. */
  rule?: string;
  host?: string;
  hostPositions?: string;
  /** The g, in per cent, that it is kept above. */
  bound: number;
  /** Which windows of the tuning text it was run on. */
  picked: readonly (number | string)[];
}

await showUsage(import.meta.url);
const args = parseArgs(Deno.args, {
  string: ["against", "beside"],
  boolean: ["pool"],
}) as unknown as {
  _: string[];
  against?: string;
  beside?: string;
  pool: boolean;
};
const beside = args.beside === undefined
  ? null
  : together(await Promise.all(args.beside.split(",").map(read)));
const against = args.against ?? (beside ? null : "eviction");
const rules: Row[][] = [], files: Row[][] = [];

for (const path of args._) {
  const rows = await read(path);
  if (rows[0]?.rule !== undefined) {
    rules.push(rows);
    continue;
  }
  if (args.pool) {
    files.push(rows);
    continue;
  }
  const of = args.beside === undefined ? "" : ` of ${args.beside}`;
  console.log(`\n${path}, against ${against ?? "the same policy"}${of}\n`);
  if (rows[0]?.task === undefined) windows(rows);
  else questions(rows);
}
if (files.length > 0) {
  const all = together(files).filter(({ policy }) =>
    files.every((rows) => rows.some((row) => row.policy === policy))
  );
  console.log(`\n${args._.join(", ")} together\n`);
  windows(all);
}
if (rules.length > 0) candidates(args.pool ? pool(rules) : rules.flat());

async function read(path: string): Promise<Row[]> {
  return JSON.parse(await Deno.readTextFile(path)).rows;
}

/** Rows of several files: windows of the same policy as one row, in the files' order. */
function together(files: readonly Row[][]): Row[] {
  if (files.length === 1) return files[0]!;
  const groups = Map.groupBy(files.flat(), ({ policy }) => policy);
  return [...groups.values()].map((rows) => {
    if (rows.length === 1) return rows[0]!;
    const sum = (of: (row: Row) => number) =>
      rows.reduce((sum, row) => sum + of(row), 0);
    const targets = sum((row) => row.targets);
    const row = {
      ...rows[0]!,
      targets,
      seconds: sum((row) => row.seconds),
      windowTargets: rows.flatMap(({ windowTargets }) => windowTargets),
      windowNll: rows.flatMap(({ windowNll }) => windowNll),
      // Other columns are not sums over windows that the files have.
      ...{ kl: null, klStderr: null, sameTop: null },
    };
    const perplexity = perplexityWithout(row);
    const squares = sum(({ targets, stderr, perplexity }) =>
      (targets * stderr / perplexity) ** 2
    );
    const stderr = perplexity * Math.sqrt(squares) / targets;
    return { ...row, perplexity, stderr };
  });
}

/** What a row is paired with: of `--beside`, or of its own file. */
function hostOf(row: Row, rows: readonly Row[]): Row | undefined {
  return (beside ?? rows).find(({ policy, task }) =>
    policy === (against ?? row.policy) && task === row.task
  );
}

function windows(rows: Row[]): void {
  const full = (beside ?? rows).find(({ policy }) => policy === "full");
  rows.sort((a, b) => a.perplexity - b.perplexity);
  for (const row of rows) {
    const host = hostOf(row, rows);
    for (const other of [host, full]) {
      if (other && other.windowNll.length !== row.windowNll.length) {
        throw new RangeError(
          `${row.policy} has ${row.windowNll.length} windows, ${other.policy} beside it ${other.windowNll.length}`,
        );
      }
    }
    if (!host) continue;
    const gap = full && host.perplexity - full.perplexity;
    const { policy, perplexity, stderr, kl, klStderr, sameTop } = row;
    const cells = [policy, `${perplexity.toFixed(2)} ± ${stderr.toFixed(2)}`];
    if (full && gap) {
      const own = perplexity - full.perplexity;
      const error = perplexity * pair(row, full).error;
      cells.push(`${own.toFixed(2)} ± ${error.toFixed(2)}`);
      cells.push(`${(100 * own / gap).toFixed(0)}%`);
    }
    const { mean, error, low, high } = pair(row, host);
    cells.push(
      `${percent(mean)}% ± ${(100 * error).toFixed(2)}% [${percent(low)}, ${
        percent(high)
      }]`,
    );
    if (full && against === null) cells.push(gain(row, host, full));
    if (kl !== null) cells.push(`${kl.toFixed(3)} ± ${klStderr!.toFixed(3)}`);
    if (sameTop !== null) cells.push(`${(100 * sameTop).toFixed(1)}%`);
    cells.push(row.seconds.toFixed(1), `${row.targets}`);
    console.log(`| ${cells.join(" | ")} |`);
  }
}

function percent(difference: number): string {
  const percent = 100 * Math.expm1(difference);
  return `${percent < 0 ? "" : "+"}${percent.toFixed(2)}`;
}

/** Rules that all files have, on the windows of all of them. */
function pool([first, ...others]: readonly Row[][]): Row[] {
  return first!.flatMap((row) => {
    const rows = [row];
    for (const other of others) {
      const same = other.find(({ rule, positions }) =>
        rule === row.rule && positions === row.positions
      );
      if (!same) return [];
      rows.push(same);
    }
    const pooled = {
      ...row,
      windowTargets: rows.flatMap(({ windowTargets }) => windowTargets),
      windowNll: rows.flatMap(({ windowNll }) => windowNll),
      picked: rows.flatMap(({ picked }, file) =>
        picked.map((window) => `${file}:${window}`)
      ),
    };
    return [{ ...pooled, perplexity: perplexityWithout(pooled) }];
  });
}

/** Every rule beside its host on the windows that the rule was run on. */
function candidates(rows: readonly Row[]): void {
  const find = (name: string, where?: string) =>
    rows.find(({ rule, positions }) =>
      rule === name && (where === undefined || positions === where)
    )!;
  const full = find("full");
  const beside = args.against?.match(/^(.+), (\w+)$/)?.slice(1);
  console.log(`\nRules, against ${args.against ?? "their hosts"}\n`);
  for (const row of rows) {
    if (row.host === undefined) continue;
    const [rule, where] = beside ?? [row.host, row.hostPositions];
    if (row.rule === rule && row.positions === where) continue;
    const host = on(row.picked, find(rule!, where));
    const { mean, error } = pair(row, host);
    const none = on(row.picked, full);
    const { low, high } = closed(row, host, none);
    const verdict = 100 * high < row.bound
      ? "refuted"
      : 100 * low > row.bound
      ? "above"
      : "undecided";
    const cells = [
      row.rule,
      `${row.positions}, ${where}`,
      row.picked.length,
      `${row.perplexity.toFixed(2)}, ${host.perplexity.toFixed(2)}`,
      `${percent(mean)}% ± ${(100 * error).toFixed(2)}%`,
      gain(row, host, none),
      ...(beside ? [] : [`${row.bound}%`, verdict]),
    ];
    console.log(`| ${cells.join(" | ")} |`);
  }
}

/** A row on some of its windows. */
function on(picked: Row["picked"], row: Row): Row {
  const pick = <T>(list: readonly T[]) =>
    picked.map((window) => list[row.picked.indexOf(window)]!);
  const own = {
    ...row,
    windowTargets: pick(row.windowTargets),
    windowNll: pick(row.windowNll),
  };
  return { ...own, perplexity: perplexityWithout(own) };
}

function perplexityWithout(row: Row, left?: number): number {
  const sum = (list: readonly number[]) =>
    list.reduce((sum, x, w) => w === left ? sum : sum + x, 0);
  return Math.exp(sum(row.windowNll) / sum(row.windowTargets));
}

/** g with its interval, as a cell. */
function gain(row: Row, host: Row, full: Row): string {
  const { g, low, high } = closed(row, host, full);
  const share = (x: number) => `${x < 0 ? "" : "+"}${(100 * x).toFixed(1)}`;
  return `${share(g)}% [${share(low)}, ${share(high)}]`;
}

/** The share of the host's gap that a rule closes, and its 95% interval. */
function closed(
  row: Row,
  host: Row,
  full: Row,
): { g: number; low: number; high: number } {
  const share = (left?: number) => {
    const [own, hosts, none] = [row, host, full].map((row) =>
      perplexityWithout(row, left)
    ) as [number, number, number];
    return (hosts - own) / (hosts - none);
  };
  const g = share(), n = row.windowNll.length;
  const without = row.windowNll.map((_, w) => share(w));
  const mean = without.reduce((a, b) => a + b) / n;
  const squares = without.reduce((sum, x) => sum + (x - mean) ** 2, 0);
  const reach = student(n - 1) * Math.sqrt((n - 1) / n * squares);
  return { g, low: g - reach, high: g + reach };
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
    own.sort((a, b) => a.nll - b.nll);
    console.log(`${task}, ${own[0]!.questions} questions`);
    for (const row of own) {
      const host = hostOf(row, own);
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
