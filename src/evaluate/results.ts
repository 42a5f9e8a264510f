/** ResultStore: where results of single windows and questions are kept; a run folder is one. */

import type { CacheOptions } from "../cache/layout.ts";

/** A cache whose budget is in tokens. */
export type SizedCache = CacheOptions & { budget?: number | undefined };

/** Keeps results as they come. */
export interface ResultStore<T> {
  /** What there is. */
  readonly items: readonly T[];
  /** Keeps more; when it is cut off, the first of them at most. */
  add(items: readonly T[]): Promise<void>;
}

/** A store that lasts as long as its owner. */
export function memoryStore<T>(): ResultStore<T> {
  const items: T[] = [];
  return {
    items,
    add(more) {
      items.push(...more);
      return Promise.resolve();
    },
  };
}
