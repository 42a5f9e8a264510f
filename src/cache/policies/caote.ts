/** CAOTE: the token that the output misses least leaves. */

import type { Policy } from "../policy.ts";

/**
 * The token leaves whose removal would move this step's attention output least
 * (arXiv 2504.14051).
 */
export const caote: Policy = {
  name: "caote",
  summary: "The token whose removal moves this step's output least leaves",
  paper: "CAOTE, arXiv 2504.14051",
  select: "output-error",
  merge: "none",
  protects: () => ({ sinks: 0, recent: 0 }),
  prefill: "sums",
};
