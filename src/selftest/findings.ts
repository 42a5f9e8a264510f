/** What a case found: how far each quantity is from f64, beside what is allowed. */

/** One quantity of one case. */
export interface Finding {
  /** What was compared, such as `attention output`. */
  readonly quantity: string;
  /** How far it is off; Infinity for a NaN, or for what must be equal and is not. */
  readonly error: number;
  /** The most that is allowed. */
  readonly limit: number;
}

/** How near an error is to its limit; above 1 it is over. */
export function share({ error, limit }: Finding): number {
  if (error <= limit) return limit === 0 ? 0 : error / limit;
  return limit === 0 ? Infinity : error / limit;
}

/** Collects findings, and keeps the worst of each quantity. */
export class Findings {
  readonly #worst = new Map<string, Finding>();

  /** Notes one; a NaN is an infinite error. */
  note(quantity: string, error: number, limit: number): void {
    const finding = {
      quantity,
      error: Number.isNaN(error) ? Infinity : error,
      limit,
    };
    const worst = this.#worst.get(quantity);
    if (worst === undefined || share(finding) > share(worst)) {
      this.#worst.set(quantity, finding);
    }
  }

  /** Notes what must hold. */
  must(quantity: string, holds: boolean): void {
    this.note(quantity, holds ? 0 : Infinity, 0);
  }

  /** The worst of each quantity. */
  get list(): Finding[] {
    return [...this.#worst.values()];
  }
}

/** Whether two lists of numbers have the same bytes in f32; two NaN are the same. */
export function sameBytes(
  a: ArrayLike<number>,
  b: ArrayLike<number>,
): boolean {
  if (a.length !== b.length) return false;
  for (let i = 0; i < a.length; i++) {
    if (!Object.is(a[i], b[i])) return false;
  }
  return true;
}
