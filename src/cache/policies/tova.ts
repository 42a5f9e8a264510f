/** TOVA: what the newest query attends to stays. */

import type { Policy } from "../policy.ts";

/**
 * The token with the least attention of this step leaves, by the mean over all
 * heads: one choice for the layer (arXiv 2401.06104).
 */
export const tova: Policy = {
  name: "tova",
  summary: "The lowest attention of this step, over the layer's heads, leaves",
  paper: "TOVA, arXiv 2401.06104",
  select: "lowest-now",
  merge: "none",
  protects: () => ({ sinks: 0, recent: 0 }),
  prefill: "sums",
};
