/** perplexity(): sliding-window perplexity by policy and budget (paper, Table I); called by users and by `wkv perplexity`. */

import type { Precision } from "./backend/ops.ts";
import type {
  CacheOptions,
  CacheType,
  KvCache,
  Positions,
} from "./cache/cache.ts";
import { findPolicy } from "./cache/registry.ts";
import { resolveBudget } from "./cache/policy.ts";
import type { Model } from "./model.ts";
import { chunkSize, type Prefill, Session } from "./session.ts";

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
  budgets: readonly number[];
  /** First tokens that never leave. @default by policy */
  sinks?: number | undefined;
  /** Newest tokens that never leave. @default by policy */
  recent?: number | undefined;
  /** Tokens that leave at once when a cache overflows. @default by policy */
  interval?: number | undefined;
  /** Where keys are rotated. @default `"cache"` */
  positions?: Positions | undefined;
  /** Type of keys and values. @default `"f16"` */
  cacheType?: CacheType | undefined;
  /** How tokens beyond the budget are fed: one by one, or in chunks. @default `"exact"` */
  prefill?: Prefill | undefined;
  /** Windows that are run side by side. @default 8, or what 1 GiB holds */
  batch?: number | undefined;
  /** Ends the run. */
  signal?: AbortSignal | undefined;
  /** Called after each step with the tokens fed, of all rows together. */
  onProgress?: ((done: number, total: number) => void) | undefined;
  /** Called when a row's first window has been fed; it is sequence 0. */
  onFirstWindow?: ((cache: KvCache) => void | Promise<void>) | undefined;
}

/** One row of the table, as `--json` prints it. */
export interface PerplexityRow {
  /** The policy's name. */
  policy: string;
  /** Tokens kept a KV head; null for `full`. */
  budget: number | null;
  /** First tokens that never leave. */
  sinks: number | null;
  /** Newest tokens that never leave. */
  recent: number | null;
  /** Tokens that leave at once when the cache overflows; null for `full`. */
  interval: number | null;
  /** Where keys are rotated. */
  positions: Positions;
  /** How windows were fed. */
  prefill: Prefill;
  /** How activations met quantised weights. */
  activations: Precision;
  /** Type of keys and values. */
  cacheType: CacheType;
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
  /** Seconds that the row took. */
  seconds: number;
  /** Why there is no figure; absent when there is one. */
  reason?: string;
}

const BATCH_BYTES = 2 ** 30;

/**
 * Measures perplexity over sliding windows, each from an empty cache: the first
 * window scores all its targets, each later one its last `stride`.
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
  const fitting = Math.floor((tokens.length - offset - window) / stride) + 1;
  const windows = Math.min(options.windows ?? Infinity, Math.max(0, fitting));
  if (windows < 1) {
    throw new RangeError(
      `No window of ${window} tokens fits: the text has ${tokens.length}, of which ${offset} are skipped`,
    );
  }
  const rows = plan(model, options);
  const total = rows.filter(({ reason }) => reason === undefined).length *
    windows * (window - 1);
  let done = 0;
  for (const { cacheOptions, reason } of rows) {
    const start = performance.now();
    if (reason !== undefined) {
      using cache = model.createCache({ ...cacheOptions, capacity: 1 });
      yield {
        ...header(model, cache, window, stride, options.prefill),
        windows: 0,
        targets: 0,
        nll: null,
        perplexity: null,
        stderr: null,
        seconds: 0,
        reason,
      };
      continue;
    }
    const onFed = (fed: number) => {
      done += fed;
      options.onProgress?.(done, total);
    };
    const { cache, tally } = await measure(
      model,
      { ...options, tokens, stride, offset, windows, onFed },
      cacheOptions,
    );
    const { count, sum, squares } = tally;
    const nll = sum / count;
    const deviation = Math.sqrt(
      Math.max(0, squares - sum * nll) / Math.max(1, count - 1),
    );
    const value = Math.exp(nll);
    yield {
      ...header(model, cache, window, stride, options.prefill),
      windows,
      targets: count,
      nll,
      perplexity: value,
      stderr: value * deviation / Math.sqrt(count),
      seconds: (performance.now() - start) / 1000,
    };
  }
}

interface PlannedRow {
  cacheOptions: CacheOptions;
  reason?: string;
}

/** The rows in order; every option is checked before the first one is run. */
function plan(model: Model, options: PerplexityOptions): PlannedRow[] {
  const { sinks, recent, interval, window } = options;
  const { positions = "cache", cacheType } = options;
  if (options.policies.length === 0) {
    throw new RangeError("Name at least one policy");
  }
  const rows: PlannedRow[] = [];
  for (const name of options.policies) {
    const policy = findPolicy(name);
    chunkSize(options.prefill ?? "exact", policy);
    const full = policy.select === "none";
    if (!full && options.budgets.length === 0) {
      throw new RangeError(`Name at least one budget for the policy ${name}`);
    }
    for (const budget of full ? [undefined] : options.budgets) {
      if (budget !== undefined) {
        resolveBudget(policy, budget, { sinks, recent, interval });
      }
      const beyond = window > model.config.context &&
        (full || positions === "text");
      rows.push({
        cacheOptions: {
          policy: name,
          budget,
          sinks,
          recent,
          interval,
          positions,
          cacheType,
          capacity: window - 1,
        },
        ...(beyond
          ? {
            reason:
              `The window of ${window} tokens exceeds the model's context of ${model.config.context}`,
          }
          : {}),
      });
    }
  }
  return rows;
}

function header(
  model: Model,
  cache: KvCache,
  window: number,
  stride: number,
  prefill: Prefill = "exact",
): Pick<
  PerplexityRow,
  | "policy"
  | "budget"
  | "sinks"
  | "recent"
  | "interval"
  | "positions"
  | "prefill"
  | "activations"
  | "cacheType"
  | "window"
  | "stride"
> {
  return {
    policy: cache.policy.name,
    budget: cache.budget,
    sinks: cache.sinks,
    recent: cache.recent,
    interval: cache.budget === null ? null : cache.interval,
    positions: cache.positions,
    prefill,
    activations: model.activations,
    cacheType: cache.cacheType,
    window,
    stride,
  };
}

/** What a row needs of its targets. */
class Tally {
  count = 0;
  sum = 0;
  squares = 0;

  add(logProb: number): void {
    this.count++;
    this.sum -= logProb;
    this.squares += logProb * logProb;
  }
}

/** One row's windows with what they are made of. */
interface Run extends PerplexityOptions {
  tokens: readonly number[];
  stride: number;
  offset: number;
  windows: number;
  onFed: (tokens: number) => void;
}

/** Runs one row's windows, some side by side. */
async function measure(
  model: Model,
  run: Run,
  cacheOptions: CacheOptions,
): Promise<{ cache: KvCache; tally: Tally }> {
  const chunk = chunkSize(run.prefill ?? "exact");
  const batch = chunk !== null
    ? 1
    : Math.min(run.windows, run.batch ?? defaultBatch(model, cacheOptions));
  const tally = new Tally();
  let cache: KvCache | undefined;
  using opened = new DisposableStack();
  for (let first = 0; first < run.windows; first += batch) {
    const sequences = Math.min(batch, run.windows - first);
    if (cache?.sequences !== sequences) {
      cache?.close();
      cache = opened.use(model.createCache({ ...cacheOptions, sequences }));
    }
    cache!.reset();
    using session = new Session(model, cache!);
    if (chunk === null) await feedSteps(session, run, first, tally);
    else await feedChunks(session, run, first, chunk, tally);
    if (first === 0) await run.onFirstWindow?.(cache!);
  }
  return { cache: cache!, tally };
}

/** Every target of the first window counts, of a later one the last `stride`. */
function isTarget(run: Run, window: number, place: number): boolean {
  return window === 0 || place >= run.window - run.stride;
}

/** Feeds windows `first` and on token by token, in lock-step. */
async function feedSteps(
  session: Session,
  run: Run,
  first: number,
  tally: Tally,
): Promise<void> {
  const { sequences } = session.cache;
  const at = (i: number) =>
    Int32Array.from(
      { length: sequences },
      (_, b) => run.tokens[run.offset + (first + b) * run.stride + i]!,
    );
  for (let i = 0; i + 1 < run.window; i++) {
    run.signal?.throwIfAborted();
    if (isTarget(run, first, i + 1)) {
      const logs = await session.score(at(i), at(i + 1));
      logs.forEach((log, b) => {
        if (isTarget(run, first + b, i + 1)) tally.add(log);
      });
    } else {
      await session.feed(at(i));
    }
    run.onFed(sequences);
  }
}

/** Feeds window `index` in passes: what fits the cache at once, the rest in chunks. */
async function feedChunks(
  session: Session,
  run: Run,
  index: number,
  chunk: number,
  tally: Tally,
): Promise<void> {
  const start = run.offset + index * run.stride;
  const text = Int32Array.from(run.tokens.slice(start, start + run.window));
  const fed = run.window - 1;
  for (let i = 0; i < fed;) {
    run.signal?.throwIfAborted();
    const room = session.cache.capacity - session.cache.stats().kept;
    const rows = Math.min(fed - i, room > 0 ? Math.min(room, 64) : chunk);
    const logs = await session.scorePass(
      0,
      text.slice(i, i + rows),
      text.slice(i + 1, i + rows + 1),
    );
    logs.forEach((log, t) => {
      if (isTarget(run, index, i + t + 1)) tally.add(log);
    });
    i += rows;
    run.onFed(rows);
  }
}

function defaultBatch(model: Model, cacheOptions: CacheOptions): number {
  using one = model.createCache(cacheOptions);
  const most = model.backend.device === "cuda" ? 64 : 8;
  return Math.max(1, Math.min(most, Math.floor(BATCH_BYTES / one.bytes)));
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
