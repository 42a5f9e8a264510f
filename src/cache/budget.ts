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

/**
 * How a budget is spread over the layers, at the same total: alike, in a line
 * that falls or rises, or in proportion to a list of a number a layer, in which a
 * layer may also have a list of a number a KV head.
 */
export type LayerBudgets =
  | "constant"
  | "pyramid"
  | "inverse"
  | readonly (number | readonly number[])[];

/** What part of the mean the smallest layer of a pyramid keeps (PyramidKV's beta). */
const PYRAMID = 20;

/**
 * The budget of each KV head of each layer. A pyramid falls in a line from the
 * first layer, `2 m - m / 20` tokens, to the last, `m / 20` (PyramidKV, arXiv
 * 2406.02069, section 4.2, without its window of queries); the inverse rises. A
 * list's shares are scaled to the total, so one that adds up to it is taken as
 * it is.
 *
 * @param budget m, the mean over all heads.
 * @returns `[layers][kvHeads]` whole numbers of at least 1, whose sum is
 *   `budget * layers * kvHeads`; where layers are given, alike in each.
 * @throws {RangeError} `kind` is none of these, or its numbers are not as many
 *   as layers or heads, or leave one of them without a token.
 */
export function headBudgets(
  kind: LayerBudgets,
  budget: number,
  layers: number,
  kvHeads = 1,
): number[][] {
  if (typeof kind === "string") {
    return ofLine(kind, budget, layers).map((own) => Array(kvHeads).fill(own));
  }
  checkNumbers(kind);
  if (kind.length !== layers) {
    throw new RangeError(
      `The layer budgets must be as many as the layers, ${layers}: current value has ${kind.length}`,
    );
  }
  const uneven = kind.findIndex((own) =>
    typeof own !== "number" && own.length !== kvHeads
  );
  if (uneven >= 0) {
    throw new RangeError(
      `The budgets of a layer must be one, or as many as its KV heads, ${kvHeads}: layer ${uneven} has ${
        (kind[uneven] as number[]).length
      }`,
    );
  }
  const byHead = kind.some((own) => typeof own !== "number");
  if (!byHead) {
    return shared(kind as number[], budget, (layer) => `layer ${layer}`)
      .map((own) => Array(kvHeads).fill(own));
  }
  const all = shared(
    kind.flatMap((own) =>
      typeof own === "number" ? Array<number>(kvHeads).fill(own) : own
    ),
    budget,
    (i) => `layer ${Math.floor(i / kvHeads)}, KV head ${i % kvHeads},`,
  );
  return kind.map((_, layer) =>
    all.slice(layer * kvHeads, (layer + 1) * kvHeads)
  );
}

function checkNumbers(kind: readonly (number | readonly number[])[]): void {
  const isNumber = (x: unknown) => typeof x === "number" && Number.isFinite(x);
  if (!Array.isArray(kind)) {
    throw new TypeError(
      `The layer budgets must be a word or a list: current value is ${
        String(kind)
      }`,
    );
  }
  // Array.from also sees what a list leaves out.
  const wrong = Array.from(kind).findIndex((own) =>
    Array.isArray(own) ? !own.every(isNumber) : !isNumber(own)
  );
  if (wrong >= 0) {
    throw new TypeError(
      `The layer budgets must be numbers, or lists of a number a KV head: layer ${wrong} has ${
        String(kind[wrong])
      }`,
    );
  }
}

function ofLine(kind: string, budget: number, layers: number): number[] {
  if (!["constant", "pyramid", "inverse"].includes(kind)) {
    throw new RangeError(
      `The layer budgets must be constant, pyramid, inverse or a list of a number a layer: current value is "${kind}"`,
    );
  }
  const least = Math.max(1, budget / PYRAMID), most = 2 * budget - least;
  if (kind === "constant" || layers === 1 || most < least) {
    return Array(layers).fill(budget);
  }
  const falling = rounded(Array.from(
    { length: layers },
    (_, layer) => most - (most - least) * layer / (layers - 1),
  ));
  return kind === "pyramid" ? falling : falling.toReversed();
}

function shared(
  shares: readonly number[],
  budget: number,
  nameOf: (i: number) => string,
): number[] {
  const sum = shares.reduce((a, b) => a + b);
  const wanted = shares.map((share) => share * budget * shares.length / sum);
  const short = wanted.findIndex((tokens) => !(tokens >= 1));
  if (short >= 0) {
    throw new RangeError(
      `The layer budgets must leave every layer and KV head a token: ${
        nameOf(short)
      } has ${shares[short]} of ${sum} at a budget of ${budget}`,
    );
  }
  return rounded(wanted);
}

/** Whole numbers of the same sum, each less than one from its own: the running total is rounded. */
function rounded(wanted: readonly number[]): number[] {
  let total = 0, given = 0;
  return wanted.map((tokens) => {
    total += tokens;
    const whole = Math.round(total) - given;
    given += whole;
    return whole;
  });
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
