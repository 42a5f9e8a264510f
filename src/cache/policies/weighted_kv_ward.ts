/** WeightedKV with the victim chosen by what its merge costs. */

import { type Policy, sinksAndHalf } from "../policy.ts";

/**
 * The token whose merge with its right neighbour costs least leaves, by Ward's
 * linkage with attention as mass: `w_j w_r / (w_j + w_r) * |V_j - V_r|^2`;
 * `:linear` takes the distance unsquared. Merged as in WeightedKV.
 */
export const weightedKvWard: Policy = {
  name: "weighted-kv-ward",
  summary: "The token whose merge costs least leaves, merged as in WeightedKV",
  paper: "This project; merge of WeightedKV, linkage of Ward (1963)",
  select: "merge-cost",
  merge: "right",
  protects: sinksAndHalf,
  prefill: "sums",
  options: { linear: { select: "merge-cost-linear" } },
};
