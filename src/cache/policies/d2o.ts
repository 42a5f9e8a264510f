/** D2O: heavy hitters, the rest recalled into similar tokens. */

import { type Policy, sinksAndHalf } from "../policy.ts";

/**
 * The token with the lowest sum of attention leaves; it is merged, key and value,
 * into the token with the nearest key when their cosine reaches a moving
 * threshold (arXiv 2406.13035).
 */
export const d2o: Policy = {
  name: "d2o",
  summary:
    "The lowest sum of attention leaves, merged into a key that is near enough",
  paper: "D2O, arXiv 2406.13035",
  select: "lowest-sum",
  merge: "nearest",
  protects: sinksAndHalf,
  prefill: "sums",
};
