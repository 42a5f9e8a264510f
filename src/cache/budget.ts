/** How large a cache may be, as people say it: tokens, a share, bytes, or a preset; resolved to tokens by Model. */

import { MAX_SLOTS } from "./policy.ts";

/**
 * A budget: tokens kept a KV head, a share of the tokens that a full cache would
 * hold (`"25%"`), the bytes of one sequence's cache (`"64MiB"`, `"64MB"`), or a
 * preset (`"paper-256"`).
 */
export type BudgetSize = number | string;

/** What a budget says. */
export type ParsedBudget =
  | { readonly kind: "tokens"; readonly tokens: number }
  | { readonly kind: "share"; readonly share: number }
  | { readonly kind: "bytes"; readonly bytes: number };

/**
 * The paper's two cache sizes (arXiv 2503.01330, section 4); the first 4 tokens
 * and 124 or 508 recent ones are what its policies protect by default.
 */
export const budgetPresets: Readonly<Record<string, number>> = {
  "paper-256": 256,
  "paper-1024": 1024,
};

/** How a budget is spread over the layers, at the same total. */
export type LayerBudgets = "constant" | "pyramid" | "inverse";

/** What part of the mean the smallest layer of a pyramid keeps (PyramidKV's beta). */
const PYRAMID = 20;

/**
 * The budget of each layer. A pyramid falls in a line from the first layer,
 * `2 m - m / 20` tokens, to the last, `m / 20` (PyramidKV, arXiv 2406.02069,
 * section 4.2, without its window of queries); the inverse rises.
 *
 * @param budget m, the mean over the layers.
 * @returns Whole numbers of at least 1 whose sum is `budget * layers`.
 * @throws {RangeError} `kind` is none of the three.
 */
export function layerBudgets(
  kind: LayerBudgets,
  budget: number,
  layers: number,
): number[] {
  if (!["constant", "pyramid", "inverse"].includes(kind)) {
    throw new RangeError(
      `The layer budgets must be constant, pyramid or inverse: current value is "${kind}"`,
    );
  }
  const least = Math.max(1, budget / PYRAMID), most = 2 * budget - least;
  if (kind === "constant" || layers === 1 || most < least) {
    return Array(layers).fill(budget);
  }
  // Rounding the running total keeps the sum exact.
  const falling: number[] = [];
  let wanted = 0, given = 0;
  for (let layer = 0; layer < layers; layer++) {
    wanted += most - (most - least) * layer / (layers - 1);
    falling.push(Math.round(wanted) - given);
    given = Math.round(wanted);
  }
  return kind === "pyramid" ? falling : falling.toReversed();
}

const units: Readonly<Record<string, number>> = {
  B: 1,
  KB: 1e3,
  MB: 1e6,
  GB: 1e9,
  KIB: 2 ** 10,
  MIB: 2 ** 20,
  GIB: 2 ** 30,
};

/**
 * Reads a budget.
 *
 * @throws {RangeError} It is no budget, or out of range.
 */
export function parseBudget(size: BudgetSize): ParsedBudget {
  const text = String(size);
  const preset = Object.hasOwn(budgetPresets, text)
    ? budgetPresets[text]
    : undefined;
  if (preset !== undefined) return { kind: "tokens", tokens: preset };
  const [, digits, unit] = /^(\d+(?:\.\d+)?)\s*(%|[KMG]?i?B)?$/i.exec(text) ??
    [];
  const value = Number(digits);
  if (unit === "%" && value > 0 && value <= 100) {
    return { kind: "share", share: value / 100 };
  }
  const factor = unit === undefined ? undefined : units[unit.toUpperCase()];
  const bytes = Math.floor(value * (factor ?? 0));
  if (bytes >= 1) return { kind: "bytes", bytes };
  if (
    unit === undefined && Number.isInteger(value) && value >= 1 &&
    value <= MAX_SLOTS
  ) {
    return { kind: "tokens", tokens: value };
  }
  throw new RangeError(
    `The budget must be a whole number of tokens between 1 and ${MAX_SLOTS}, a share such as 25%, bytes such as 64MiB, or one of ${
      Object.keys(budgetPresets).join(", ")
    }: current value is ${JSON.stringify(size)}`,
  );
}
