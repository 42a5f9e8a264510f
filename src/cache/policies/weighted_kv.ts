/** WeightedKV and its ablation, which differ in the merge alone. */

import { type Policy, sinksAndHalf } from "../policy.ts";

/**
 * The token with the lowest average attention leaves, and its value is merged
 * into its right neighbour's, weighted with both averages (Algorithm 1).
 * `:literal` divides the sums in place, as the pseudo code is written; `:light`
 * lets what leaves weigh a quarter of its average in the merge.
 */
export const weightedKv: Policy = {
  name: "weighted-kv",
  summary:
    "The lowest average attention leaves, its value merged into the next token's",
  paper: "WeightedKV, arXiv 2503.01330, Algorithm 1",
  select: "lowest-average",
  merge: "right",
  protects: sinksAndHalf,
  prefill: "sums",
  options: {
    literal: { select: "lowest-average-literal" },
    light: { merge: "right-light" },
  },
};

/** The same choice, its value dropped (section "Ablation", Fig. 4). */
export const eviction: Policy = {
  name: "eviction",
  summary: "The lowest average attention leaves, its value dropped",
  paper: "WeightedKV, arXiv 2503.01330, ablation in Fig. 4",
  select: "lowest-average",
  merge: "none",
  protects: sinksAndHalf,
  prefill: "sums",
};
