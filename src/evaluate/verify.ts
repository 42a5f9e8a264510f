/** compareResults(): whether a run that was repeated gave the same results; called by `wkv verify`. */

/** How far results may be apart and still be called the same. */
export const TOLERANCE = 1e-4;

/** What a comparison found. */
export interface Verdict {
  /** `equal`: bit for bit; `close`: within {@linkcode TOLERANCE}; else `different`. */
  outcome: "equal" | "close" | "different";
  /** The largest relative difference of a number. */
  worst: number;
  /** The first result that differs, and in what; null when all are equal. */
  first: string | null;
}

/** Fields that say how long something took. */
const TIMES = new Set(["seconds"]);

/**
 * Compares results in their order, times excepted. Numbers differ by their
 * distance, relative where they are above 1.
 */
export function compareResults(
  before: readonly object[],
  after: readonly object[],
): Verdict {
  let worst = 0;
  let first: string | null = null;
  const differ = (what: string, by: number): void => {
    if (by > TOLERANCE && worst <= TOLERANCE) first = what;
    else first ??= what;
    worst = Math.max(worst, by);
  };
  if (before.length !== after.length) {
    differ(`${before.length} results there and ${after.length} now`, Infinity);
  }
  before.slice(0, after.length).forEach((old, i) => {
    const now = after[i] as Record<string, unknown>;
    const fields = Object.entries(old);
    const name = fields.filter(([, value]) => typeof value === "string")
      .concat(
        fields.filter(([key]) => ["budget", "window", "index"].includes(key)),
      )
      .map(([key, value]) => `${key} ${value}`).join(", ");
    for (const [key, value] of fields) {
      if (TIMES.has(key) || Object.is(value, now[key])) continue;
      const by = typeof value === "number" && typeof now[key] === "number"
        ? Math.abs(value - now[key]) / Math.max(1, Math.abs(value))
        : JSON.stringify(value) === JSON.stringify(now[key])
        ? 0
        : Infinity;
      if (by === 0) continue;
      differ(
        `result ${i + 1} (${name}): ${key} is ${
          JSON.stringify(value)
        } there and ${JSON.stringify(now[key])} now`,
        by,
      );
    }
  });
  const outcome = first === null
    ? "equal"
    : worst <= TOLERANCE
    ? "close"
    : "different";
  return { outcome, worst, first };
}
