/** H2O: heavy hitters and a recent window. */

import type { Policy } from "../policy.ts";

/**
 * The token with the lowest sum of attention leaves; half of the budget is recent
 * (arXiv 2306.14048).
 */
export const h2o: Policy = {
  name: "h2o",
  summary: "The lowest sum of attention leaves",
  paper: "H2O, arXiv 2306.14048",
  select: "lowest-sum",
  merge: "none",
  protects: (m) => ({ sinks: 0, recent: Math.floor(m / 2) }),
  prefill: "sums",
};
