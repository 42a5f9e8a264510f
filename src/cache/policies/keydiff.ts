/** KeyDiff: keys that are unlike the others stay. */

import { type Policy, sinksAndHalf } from "../policy.ts";

/**
 * The token whose key is most like the mean direction of all cached keys leaves
 * (arXiv 2504.15364).
 */
export const keydiff: Policy = {
  name: "keydiff",
  summary: "The key most like the mean direction of all leaves",
  paper: "KeyDiff, arXiv 2504.15364",
  select: "key-likeness",
  merge: "none",
  protects: sinksAndHalf,
  prefill: "sums",
};
