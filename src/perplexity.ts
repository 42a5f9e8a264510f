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
import { type Prefill, Session } from "./session.ts";

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
  /** Where keys are rotated. @default `"cache"` */
  positions?: Positions | undefined;
  /** Type of keys and values. @default `"f16"` */
  cacheType?: CacheType | undefined;
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
  /** Where keys are rotated. */
  positions: Positions;
  /** How windows are fed: always token by token. */
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
        ...header(model, cache, window, stride),
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
    const run = measure(
      model,
      tokens,
      { ...options, stride, offset, windows },
      cacheOptions,
      (fed) => {
        done += fed;
        options.onProgress?.(done, total);
      },
    );
    const { cache, sum, squares, count } = await run;
    const nll = sum / count;
    const deviation = Math.sqrt(
      Math.max(0, squares - sum * nll) / Math.max(1, count - 1),
    );
    const value = Math.exp(nll);
    yield {
      ...header(model, cache, window, stride),
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
  const { sinks, recent, positions = "cache", cacheType, window } = options;
  if (options.policies.length === 0) {
    throw new RangeError("Name at least one policy");
  }
  const rows: PlannedRow[] = [];
  for (const name of options.policies) {
    const policy = findPolicy(name);
    const full = policy.select === "none";
    if (!full && options.budgets.length === 0) {
      throw new RangeError(`Name at least one budget for the policy ${name}`);
    }
    for (const budget of full ? [undefined] : options.budgets) {
      if (budget !== undefined) {
        resolveBudget(policy, budget, { sinks, recent });
      }
      const beyond = window > model.config.context &&
        (full || positions === "text");
      rows.push({
        cacheOptions: {
          policy: name,
          budget,
          sinks,
          recent,
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
): Pick<
  PerplexityRow,
  | "policy"
  | "budget"
  | "sinks"
  | "recent"
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
    positions: cache.positions,
    prefill: "exact",
    activations: model.activations,
    cacheType: cache.cacheType,
    window,
    stride,
  };
}

/** Runs one row's windows, some side by side in lock-step. */
async function measure(
  model: Model,
  tokens: readonly number[],
  options: PerplexityOptions & {
    stride: number;
    offset: number;
    windows: number;
  },
  cacheOptions: CacheOptions,
  onFed: (tokens: number) => void,
): Promise<{ cache: KvCache; sum: number; squares: number; count: number }> {
  const { window, stride, offset, windows, signal } = options;
  const batch = Math.min(
    windows,
    options.batch ?? defaultBatch(model, cacheOptions),
  );
  let sum = 0, squares = 0, count = 0;
  let cache: KvCache | undefined;
  using opened = new DisposableStack();
  for (let first = 0; first < windows; first += batch) {
    const sequences = Math.min(batch, windows - first);
    if (cache?.sequences !== sequences) {
      cache?.close();
      cache = opened.use(model.createCache({ ...cacheOptions, sequences }));
    }
    using session = new Session(model, cache!);
    cache!.reset();
    const at = (i: number) =>
      Int32Array.from(
        { length: sequences },
        (_, b) => tokens[offset + (first + b) * stride + i]!,
      );
    for (let i = 0; i + 1 < window; i++) {
      signal?.throwIfAborted();
      const scored = first === 0 || i + 1 >= window - stride;
      if (scored) {
        const logs = await session.score(at(i), at(i + 1));
        for (let b = 0; b < sequences; b++) {
          if (first + b > 0 && i + 1 < window - stride) continue;
          const nll = -logs[b]!;
          sum += nll;
          squares += nll * nll;
          count++;
        }
      } else {
        await session.feed(at(i));
      }
      onFed(sequences);
    }
    if (first === 0) await options.onFirstWindow?.(cache!);
  }
  return { cache: cache!, sum, squares, count };
}

function defaultBatch(model: Model, cacheOptions: CacheOptions): number {
  using one = model.createCache(cacheOptions);
  return Math.max(1, Math.min(8, Math.floor(BATCH_BYTES / one.bytes)));
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
