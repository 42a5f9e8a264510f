/** perplexity(): sliding-window perplexity by policy and budget (paper, Table I); called by users and by `wkv perplexity`. */

import type { KvCache } from "../cache/cache.ts";
import {
  type CacheOptions,
  type CacheType,
  planCache,
  type Positions,
} from "../cache/layout.ts";
import type { BudgetSize, LayerBudgets } from "../cache/budget.ts";
import { findPolicy } from "../cache/registry.ts";
import { keepsAll } from "../cache/policy.ts";
import { type CacheSettings, cacheSettings } from "../generate.ts";
import type { Model } from "../model.ts";
import { chunkSize, type Prefill, Session } from "../session.ts";
import { memoryStore, type ResultStore, type SizedCache } from "./results.ts";

/** What is measured. */
export interface PerplexityOptions {
  /** Tokens of a window. */
  window: number;
  /** Tokens between two windows' starts. @default `window / 2` */
  stride?: number | undefined;
  /** The most windows. @default all whole ones */
  windows?: number | undefined;
  /** Tokens skipped at the start of the text. @default `0` */
  offset?: number | undefined;
  /** Policies by name. */
  policies: readonly string[];
  /** Budgets, each used with every policy but `full`. */
  budgets: readonly BudgetSize[];
  /** First tokens that never leave. @default by policy */
  sinks?: number | undefined;
  /** Newest tokens that never leave. @default by policy */
  recent?: number | undefined;
  /** Tokens that leave at once when a cache overflows. @default by policy */
  interval?: number | undefined;
  /** How the budget is spread over the layers. @default `"constant"` */
  layerBudgets?: LayerBudgets | undefined;
  /** Where keys are rotated. @default `"cache"` */
  positions?: Positions | undefined;
  /** Type of keys and values. @default `"f16"` */
  cacheType?: CacheType | undefined;
  /** How tokens beyond the budget are fed: one by one, or in chunks. @default `"exact"` */
  prefill?: Prefill | undefined;
  /** Windows that are run side by side. @default 8, or what 1 GiB holds */
  batch?: number | undefined;
  /**
   * Runs the full cache beside the others, window by window, and measures how
   * far their next-token distributions are from its. @default `false`
   */
  divergence?: boolean | undefined;
  /** Where results of single windows are kept; those it has are not measured again. */
  results?: ResultStore<WindowResult> | undefined;
  /** Ends the run. */
  signal?: AbortSignal | undefined;
  /** Called after each step with the tokens fed, of all rows together. */
  onProgress?: ((done: number, total: number) => void) | undefined;
  /** Called when a row's first window has been fed; it is sequence 0. */
  onFirstWindow?: ((cache: KvCache) => void | Promise<void>) | undefined;
}

/** Sums over the targets of one window in one row. */
export interface WindowResult {
  /** The policy's name. */
  policy: string;
  /** Tokens kept a KV head; null for `full`. */
  budget: number | null;
  /** Tokens of the window. */
  length: number;
  /** Its index, from 0. */
  window: number;
  /** Tokens scored. */
  targets: number;
  /** Sum of their negative natural log probabilities. */
  nll: number;
  /** Sum of the squares of those. */
  squares: number;
  /** Sum of the divergences from the full cache, in nats; null without. */
  kl: number | null;
  /** Sum of the squares of those. */
  klSquares: number | null;
  /** Targets before which both caches make the same token the likeliest. */
  same: number | null;
  /** Its share of the seconds that its steps took. */
  seconds: number;
}

/** One row of the table, as `--json` prints it. */
export interface PerplexityRow extends CacheSettings {
  /** Tokens of a window. */
  window: number;
  /** Tokens between two windows' starts. */
  stride: number;
  /** Windows measured. */
  windows: number;
  /** Tokens scored, each once. */
  targets: number;
  /** Mean negative natural log probability; null when it cannot be had. */
  nll: number | null;
  /** exp(nll). */
  perplexity: number | null;
  /** perplexity * sample deviation of the targets' nll / sqrt(targets). */
  stderr: number | null;
  /**
   * Kullback-Leibler divergence in nats of the row's distribution of a token
   * from the full cache's, the mean over the targets; null without
   * {@linkcode PerplexityOptions.divergence}.
   */
  kl: number | null;
  /** Standard error of that mean, from the targets' deviation. */
  klStderr: number | null;
  /** Share of the targets before which both have the same likeliest token. */
  sameTop: number | null;
  /** Perplexity minus that of `full`, where the run has it. */
  gap: number | null;
  /** Standard error of the gap: of the windows' differences where the windows are the same. */
  gapStderr: number | null;
  /** Tokens of the windows of `full` that the gap is taken from. */
  gapWindow: number | null;
  /** Seconds that the row's steps took. */
  seconds: number;
  /** Why there is no figure, or no divergence; absent when nothing is missing. */
  reason?: string;
}

const BATCH_BYTES = 2 ** 30;

/**
 * Measures perplexity over sliding windows, each from an empty cache: the first
 * window scores all its targets, each later one its last `stride`. `full` comes
 * first, as the others' gaps are taken from it; where the windows exceed the
 * model's context it is also measured with the longest that fit.
 *
 * @param text Text, or its token ids.
 * @returns A row for each policy and budget, `full` once.
 * @throws {RangeError} An option is out of range, or no whole window fits.
 */
export async function* perplexity(
  model: Model,
  text: string | readonly number[],
  options: PerplexityOptions,
): AsyncGenerator<PerplexityRow, void> {
  const { window, offset = 0, signal } = options;
  const { stride = Math.floor(window / 2) } = options;
  whole("window", window, 2);
  whole("stride", stride, 1, window - 1);
  whole("offset", offset, 0);
  if (options.windows !== undefined) whole("windows", options.windows, 1);
  if (options.batch !== undefined) whole("batch", options.batch, 1, 4096);
  const tokens = typeof text === "string"
    ? await model.tokenizer.encode(text, signal ? { signal } : {})
    : text;
  const left = tokens.length - offset;
  const count = (length: number, step: number): number => {
    const fitting = Math.floor((left - length) / step) + 1;
    return Math.min(options.windows ?? Infinity, Math.max(0, fitting));
  };
  if (count(window, stride) < 1) {
    throw new RangeError(
      `No window of ${window} tokens fits: the text has ${tokens.length}, of which ${offset} are skipped`,
    );
  }
  const rows = plan(model, options, window, stride);
  const { context } = model.config;
  if (rows.some(isFull) && window > context && count(context, 1) > 0) {
    const half = Math.max(1, Math.floor(context / 2));
    rows.splice(1, 0, ...plan(model, options, context, half).filter(isFull));
  }
  const groups = grouped(rows, options.divergence ?? false);
  let total = groups.flat().reduce(
    (sum, { reason, window, stride }) =>
      sum + (reason ? 0 : count(window, stride) * (window - 1)),
    0,
  );
  let done = 0;
  const onFed = (fed: number): void => {
    done += fed;
    options.onProgress?.(done, total);
  };
  let full: Measured | undefined;
  for (const group of groups) {
    const { window, stride } = group[0]!;
    const run: Run = {
      ...options,
      tokens,
      window,
      stride,
      offset,
      windows: count(window, stride),
      onFed,
      // What need not be done again says nothing about the time that is left.
      onKnown: (tokens) => total -= tokens,
    };
    for (const measured of await measure(model, run, group)) {
      if (isFull(measured.row) && measured.windows.length > 0) full = measured;
      if (measured.row.hidden) continue;
      yield summary(model, measured, full, options.prefill);
    }
  }
}

/** One row to measure. */
interface PlannedRow {
  cacheOptions: SizedCache;
  window: number;
  stride: number;
  /** Why it cannot be measured. */
  reason?: string;
  /** Why its divergence cannot. */
  alone?: string;
  /** Whether nobody asked for it: it runs beside others that do not contain it. */
  hidden?: boolean;
}

/** One row with the results of its windows. */
interface Measured {
  row: PlannedRow;
  windows: readonly WindowResult[];
}

function isFull({ cacheOptions }: PlannedRow): boolean {
  return keepsAll(findPolicy(cacheOptions.policy!));
}

/** The rows, `full` first; every option is checked before the first one is run. */
function plan(
  model: Model,
  options: PerplexityOptions,
  window: number,
  stride: number,
): PlannedRow[] {
  const { sinks, recent, interval, layerBudgets, divergence = false } = options;
  const { positions = "cache", cacheType, prefill = "exact" } = options;
  if (options.policies.length === 0) {
    throw new RangeError("Name at least one policy");
  }
  if (divergence && prefill !== "exact") {
    throw new RangeError(
      `The prefill must be exact to measure the divergence, as caches are fed in lock-step: current value is "${prefill}"`,
    );
  }
  const long =
    `The window of ${window} tokens exceeds the model's context of ${model.config.context}`;
  const beyond = window > model.config.context;
  const rows: PlannedRow[] = [];
  for (const name of options.policies) {
    const policy = findPolicy(name);
    chunkSize(prefill, policy);
    const full = keepsAll(policy);
    if (!full && options.budgets.length === 0) {
      throw new RangeError(`Name at least one budget for the policy ${name}`);
    }
    const missing = beyond && (full || positions === "text");
    const common = {
      policy: name,
      ...{ sinks, recent, interval, layerBudgets },
      ...{ positions, cacheType },
    };
    for (const size of full ? [undefined] : options.budgets) {
      // Shares are those of a window.
      const budget = size === undefined
        ? undefined
        : model.budgetTokens({ ...common, budget: size, capacity: window });
      const cacheOptions = { ...common, budget, capacity: window - 1 };
      if (!missing) planCache(model.config, cacheOptions);
      rows.push({
        cacheOptions,
        window,
        stride,
        ...(missing ? { reason: long } : {}),
        ...(divergence && beyond && !missing
          ? { alone: `No divergence: ${long.toLowerCase()}` }
          : {}),
      });
    }
  }
  return rows.sort((a, b) => Number(isFull(b)) - Number(isFull(a)));
}

/**
 * Rows that run in lock-step: those with a divergence together, behind a full
 * cache, every other one alone.
 */
function grouped(
  rows: readonly PlannedRow[],
  divergence: boolean,
): PlannedRow[][] {
  const alone = (row: PlannedRow) =>
    !divergence || row.reason !== undefined || row.alone !== undefined;
  const together = rows.filter((row) => !alone(row));
  const [first] = together;
  const groups = rows.flatMap((row) =>
    alone(row) ? [[row]] : row === first ? [together] : []
  );
  if (first !== undefined && !isFull(first)) {
    const { positions, cacheType, capacity } = first.cacheOptions;
    const cacheOptions = { policy: "full", positions, cacheType, capacity };
    together.unshift({ ...first, cacheOptions, hidden: true });
  }
  return groups;
}

/** What `--json` prints of a measured row. */
function summary(
  model: Model,
  { row, windows }: Measured,
  full: Measured | undefined,
  prefill: Prefill = "exact",
): PerplexityRow {
  using cache = model.createCache({ ...row.cacheOptions, capacity: 1 });
  const reason = row.reason ?? row.alone;
  const common = {
    ...cacheSettings(model, cache, prefill),
    window: row.window,
    stride: row.stride,
    windows: windows.length,
    targets: total(windows, "targets"),
  };
  const seconds = total(windows, "seconds");
  if (windows.length === 0) {
    return {
      ...common,
      nll: null,
      perplexity: null,
      stderr: null,
      kl: null,
      klStderr: null,
      sameTop: null,
      gap: null,
      gapStderr: null,
      gapWindow: null,
      seconds,
      ...(reason === undefined ? {} : { reason }),
    };
  }
  const { targets } = common;
  const nll = total(windows, "nll") / targets;
  const value = Math.exp(nll);
  const stderr = value *
    errorOfMean(targets, nll, total(windows, "squares"));
  const diverges = windows.every(({ kl }) => kl !== null);
  const kl = diverges ? total(windows, "kl") / targets : null;
  return {
    ...common,
    nll,
    perplexity: value,
    stderr,
    kl,
    klStderr: kl === null
      ? null
      : errorOfMean(targets, kl, total(windows, "klSquares")),
    sameTop: diverges ? total(windows, "same") / targets : null,
    ...gapFrom(full, row, windows, value, stderr),
    seconds,
    ...(reason === undefined ? {} : { reason }),
  };
}

/** How far a row is from `full`; window by window where both have the same ones. */
function gapFrom(
  full: Measured | undefined,
  row: PlannedRow,
  windows: readonly WindowResult[],
  value: number,
  stderr: number,
): Pick<PerplexityRow, "gap" | "gapStderr" | "gapWindow"> {
  if (full === undefined || isFull(row)) {
    return { gap: null, gapStderr: null, gapWindow: null };
  }
  const targets = total(full.windows, "targets");
  const nll = total(full.windows, "nll") / targets;
  const base = Math.exp(nll);
  const gap = value - base;
  const gapWindow = full.row.window;
  if (gapWindow !== row.window) {
    const own = base *
      errorOfMean(targets, nll, total(full.windows, "squares"));
    return { gap, gapStderr: Math.hypot(stderr, own), gapWindow };
  }
  // A ratio of sums: each window weighs as many targets as it has.
  const mean = (total(windows, "nll") - total(full.windows, "nll")) / targets;
  const squares = windows.reduce((sum, { nll, targets }, i) => {
    const own = nll - full.windows[i]!.nll - mean * targets;
    return sum + own * own;
  }, 0);
  const n = windows.length;
  return {
    gap,
    gapStderr: n < 2
      ? null
      : value * Math.sqrt(n / (n - 1) * squares) / targets,
    gapWindow,
  };
}

/** Standard error of a mean, from the sum of squares. */
function errorOfMean(count: number, mean: number, squares: number): number {
  const variance = Math.max(0, squares - count * mean * mean) /
    Math.max(1, count - 1);
  return Math.sqrt(variance / count);
}

function total(
  windows: readonly WindowResult[],
  field:
    | "targets"
    | "nll"
    | "squares"
    | "kl"
    | "klSquares"
    | "same"
    | "seconds",
): number {
  return windows.reduce((sum, window) => sum + (window[field] ?? 0), 0);
}

/** One group's windows with what they are made of. */
interface Run extends PerplexityOptions {
  tokens: readonly number[];
  stride: number;
  offset: number;
  windows: number;
  onFed: (tokens: number) => void;
  onKnown: (tokens: number) => void;
}

/** A row while some windows run side by side. */
interface Lane {
  row: PlannedRow;
  session: Session;
  /** Of each window. */
  sums: WindowResult[];
}

/** Runs the windows of rows in lock-step, some side by side. */
async function measure(
  model: Model,
  run: Run,
  rows: readonly PlannedRow[],
): Promise<Measured[]> {
  if (rows[0]!.reason !== undefined) {
    return [{ row: rows[0]!, windows: [] }];
  }
  const diverges = run.divergence === true && rows[0]!.alone === undefined;
  const chunk = chunkSize(run.prefill ?? "exact");
  const options = rows.map(({ cacheOptions }) => cacheOptions);
  const batch = chunk !== null
    ? 1
    : Math.min(run.windows, run.batch ?? defaultBatch(model, options));
  const store = run.results ?? memoryStore<WindowResult>();
  using opened = new DisposableStack();
  const caches: KvCache[] = [];
  for (let first = 0; first < run.windows; first += batch) {
    const sequences = Math.min(batch, run.windows - first);
    const windows = Array.from({ length: sequences }, (_, b) => first + b);
    const known = rows.every((row) =>
      windows.every((window) => find(store, row, window, diverges))
    );
    if (known) {
      run.onKnown(sequences * rows.length * (run.window - 1));
      continue;
    }
    using sessions = new DisposableStack();
    const lanes = rows.map((row, i): Lane => {
      if (caches[i]?.sequences !== sequences) {
        caches[i]?.close();
        caches[i] = opened.use(
          model.createCache({ ...row.cacheOptions, sequences }),
        );
      }
      const cache = caches[i]!;
      cache.reset();
      const session = sessions.use(new Session(model, cache));
      const sums = windows.map((window) => empty(row, window, diverges));
      return { row, session, sums };
    });
    if (chunk === null) await feedSteps(run, lanes, first, diverges);
    else await feedChunks(run, lanes[0]!, first, chunk);
    if (first === 0) {
      for (const { session, row } of lanes) {
        if (!row.hidden) await run.onFirstWindow?.(session.cache);
      }
    }
    // A run that was cut off while it wrote may have left some of them.
    await store.add(
      lanes.flatMap(({ row, sums }) =>
        sums.filter(({ window }) => !find(store, row, window, diverges))
      ),
    );
  }
  return rows.map((row) => ({
    row,
    windows: Array.from(
      { length: run.windows },
      (_, window) => find(store, row, window, diverges)!,
    ),
  }));
}

/** A row's result of one window, with its divergence where that is asked for. */
function find(
  { items }: ResultStore<WindowResult>,
  { cacheOptions, window: length }: PlannedRow,
  window: number,
  diverges: boolean,
): WindowResult | undefined {
  const { policy, budget = null } = cacheOptions;
  return items.findLast((item) =>
    item.policy === policy && item.budget === budget &&
    item.length === length && item.window === window &&
    (!diverges || item.kl !== null)
  );
}

function empty(
  { cacheOptions, window: length }: PlannedRow,
  window: number,
  diverges: boolean,
): WindowResult {
  const none = diverges ? 0 : null;
  return {
    policy: cacheOptions.policy!,
    budget: cacheOptions.budget ?? null,
    length,
    window,
    targets: 0,
    nll: 0,
    squares: 0,
    kl: none,
    klSquares: none,
    same: none,
    seconds: 0,
  };
}

function addTarget(sums: WindowResult, logProb: number): void {
  sums.targets++;
  sums.nll -= logProb;
  sums.squares += logProb * logProb;
}

/** Every target of the first window counts, of a later one the last `stride`. */
function isTarget(run: Run, window: number, place: number): boolean {
  return window === 0 || place >= run.window - run.stride;
}

/** Feeds windows `first` and on token by token to every lane; the first lane is `full` where divergences are measured. */
async function feedSteps(
  run: Run,
  lanes: readonly Lane[],
  first: number,
  diverges: boolean,
): Promise<void> {
  const { sequences } = lanes[0]!.session.cache;
  const at = (i: number) =>
    Int32Array.from(
      { length: sequences },
      (_, b) => run.tokens[run.offset + (first + b) * run.stride + i]!,
    );
  for (let i = 0; i + 1 < run.window; i++) {
    run.signal?.throwIfAborted();
    const scores = isTarget(run, first, i + 1);
    const [tokens, targets] = [at(i), at(i + 1)];
    for (const { session, sums } of lanes) {
      const start = performance.now();
      if (!scores) {
        await session.feed(tokens);
      } else {
        const logs = await session.score(tokens, targets);
        const apart = diverges
          ? await session.divergence(lanes[0]!.session)
          : null;
        sums.forEach((sum, b) => {
          if (!isTarget(run, sum.window, i + 1)) return;
          addTarget(sum, logs[b]!);
          if (apart === null) return;
          sum.kl! += apart[2 * b]!;
          sum.klSquares! += apart[2 * b]! ** 2;
          sum.same! += apart[2 * b + 1]!;
        });
      }
      const seconds = (performance.now() - start) / 1000 / sequences;
      for (const sum of sums) sum.seconds += seconds;
      run.onFed(sequences);
    }
  }
}

/** Feeds window `index` in passes: what fits the cache at once, the rest in chunks. */
async function feedChunks(
  run: Run,
  { session, sums }: Lane,
  index: number,
  chunk: number,
): Promise<void> {
  const begin = performance.now();
  const start = run.offset + index * run.stride;
  const text = Int32Array.from(run.tokens.slice(start, start + run.window));
  const fed = run.window - 1;
  for (let i = 0; i < fed;) {
    run.signal?.throwIfAborted();
    const room = session.cache.room();
    const rows = Math.min(fed - i, room > 0 ? Math.min(room, 64) : chunk);
    const logs = await session.scorePass(
      0,
      text.slice(i, i + rows),
      text.slice(i + 1, i + rows + 1),
    );
    logs.forEach((log, t) => {
      if (isTarget(run, index, i + t + 1)) addTarget(sums[0]!, log);
    });
    i += rows;
    run.onFed(rows);
  }
  sums[0]!.seconds = (performance.now() - begin) / 1000;
}

/** Windows whose caches, of all rows together, fit in a gibibyte. */
function defaultBatch(model: Model, rows: readonly CacheOptions[]): number {
  const bytes = rows.reduce((sum, options) => {
    using one = model.createCache(options);
    return sum + one.bytes;
  }, 0);
  const most = model.backend.device === "cuda" ? 64 : 8;
  return Math.max(1, Math.min(most, Math.floor(BATCH_BYTES / bytes)));
}

function whole(
  name: string,
  value: number,
  least: number,
  most = Number.MAX_SAFE_INTEGER,
): void {
  if (Number.isInteger(value) && value >= least && value <= most) return;
  throw new RangeError(
    `The ${name} must be a whole number between ${least} and ${most}: current value is ${value}`,
  );
}
