/** LM-Infinite: a window that keeps the first tokens. */

import type { Policy } from "../policy.ts";

/**
 * The oldest token behind the first ones leaves (arXiv 2308.16137). Positions
 * within the cache stay below the length at which the paper caps distances.
 */
export const lmInfinite: Policy = {
  name: "lm-infinite",
  summary: "The oldest token behind 10 sinks leaves",
  paper: "LM-Infinite, arXiv 2308.16137",
  select: "oldest",
  merge: "none",
  protects: (m) => ({ sinks: 10, recent: Math.max(0, m - 10) }),
  prefill: "sums",
};
