/** KeepKV: keys and values merged by votes. */

import { type Policy, sinksAndHalf } from "../policy.ts";

/**
 * The token with the lowest average attention leaves; it is merged, key and value,
 * into the token with the nearest key, weighted with votes times averages, when
 * their cosine is at least 0.8 (arXiv 2504.09936).
 */
export const keepkv: Policy = {
  name: "keepkv",
  summary:
    "The lowest average attention leaves, merged by votes into the nearest key",
  paper: "KeepKV, arXiv 2504.09936",
  select: "lowest-average",
  merge: "nearest-votes",
  protects: sinksAndHalf,
  prefill: "sums",
};
