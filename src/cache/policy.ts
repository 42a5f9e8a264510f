/** What a cache policy is, and how a budget is resolved; policies/ holds one record a file. */

/** Which token leaves when the cache is over its budget; docs/policies.md has the formulas. */
export type Select =
  | "none"
  | "oldest"
  | "lowest-average"
  | "lowest-average-literal"
  | "merge-cost"
  | "merge-cost-linear"
  | "lowest-sum"
  | "lowest-now"
  | "least-often"
  | "key-norm"
  | "key-likeness"
  | "window"
  | "sum-value-norm"
  | "output-error";

/** What happens to the token that leaves. */
export type Merge =
  | "none"
  | "right"
  | "right-light"
  | "spread"
  | "nearest"
  | "nearest-votes";

/** A cache policy: data without state, which lives in the cache. */
export interface Policy {
  /** Its name on the command line. */
  readonly name: string;
  /** One sentence: which token leaves, and what becomes of its value. */
  readonly summary: string;
  /** Where it comes from. */
  readonly paper: string;
  /** Which token leaves; `none` keeps every token and has no budget. */
  readonly select: Select;
  /** What happens to its value. */
  readonly merge: Merge;
  /** Tokens that are protected by default, of a budget of `m`. */
  readonly protects: (m: number) => { sinks: number; recent: number };
  /** Tokens that leave at once when a budget of `m` overflows. @default `1` */
  readonly interval?: (m: number) => number;
  /**
   * Whether the column sums of attention rebuild its state, so that a prompt is
   * processed at once, or each step is needed, so that it is streamed.
   */
  readonly prefill: "sums" | "steps";
  /** Variants, chosen by `name:option`, with what they change. */
  readonly options?: Readonly<
    Record<string, Partial<Pick<Policy, "select" | "merge" | "prefill">>>
  >;
}

/** A budget with the tokens that it protects, in tokens a KV head. */
export interface Budget {
  /** Tokens kept. */
  readonly budget: number;
  /** First tokens, always kept. */
  readonly sinks: number;
  /** Newest tokens, always kept, the new one counted. */
  readonly recent: number;
  /** Tokens that leave, one after another, when the cache overflows. */
  readonly interval: number;
}

/** The largest budget and full cache, in tokens. */
export const MAX_SLOTS = 1 << 20;

/**
 * Checks a budget and fills in what the policy protects by default.
 *
 * @throws {RangeError} A number is not a whole one in its range, or more is
 * protected or leaves at once than the budget has.
 */
export function resolveBudget(
  policy: Policy,
  budget: number,
  given: {
    sinks?: number | undefined;
    recent?: number | undefined;
    interval?: number | undefined;
  } = {},
): Budget {
  whole("budget", budget, 1);
  const defaults = policy.protects(budget);
  const sinks = whole("sinks", given.sinks ?? defaults.sinks, 0);
  const recent = whole("recent", given.recent ?? defaults.recent, 0);
  if (sinks + recent > budget) {
    throw new RangeError(
      `The budget must be at least sinks + recent: ${budget} is less than ${sinks} + ${recent}`,
    );
  }
  const most = Math.max(1, budget - sinks - recent);
  const interval = given.interval ??
    Math.min(policy.interval?.(budget) ?? 1, most);
  if (!Number.isInteger(interval) || interval < 1 || interval > most) {
    throw new RangeError(
      `The interval must be a whole number between 1 and budget - sinks - recent = ${most}: current value is ${interval}`,
    );
  }
  return { budget, sinks, recent, interval };
}

function whole(name: string, value: number, least: number): number {
  if (!Number.isInteger(value) || value < least || value > MAX_SLOTS) {
    throw new RangeError(
      `The ${name} must be a whole number between ${least} and ${MAX_SLOTS}: current value is ${value}`,
    );
  }
  return value;
}

/** Whether no token leaves, so that a cache has room for as many as it was opened with, and no budget. */
export function keepsAll({ select }: Policy): boolean {
  return select === "none";
}

/** Whether the value of the token that leaves goes into the next one's. */
export function mergesRight({ merge }: Pick<Policy, "merge">): boolean {
  return merge === "right" || merge === "right-light";
}

/** Whether tokens that the cache has no room for must be fed one by one: the choice needs one step's own weights. */
export function choosesByStep({ prefill, select }: Policy): boolean {
  return prefill === "steps" || select === "lowest-now" ||
    select === "output-error";
}

/** The paper's split: 4 sinks, and half of the budget with them kept recent. */
export function sinksAndHalf(m: number): { sinks: number; recent: number } {
  return { sinks: 4, recent: Math.max(1, Math.floor(m / 2) - 4) };
}
