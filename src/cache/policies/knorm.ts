/** Key norms: keys that are short draw attention. */

import { type Policy, sinksAndHalf } from "../policy.ts";

/**
 * The token with the longest key leaves (arXiv 2406.11430).
 */
export const knorm: Policy = {
  name: "knorm",
  summary: "The longest key leaves",
  paper: "L2 norm of keys, arXiv 2406.11430",
  select: "key-norm",
  merge: "none",
  protects: sinksAndHalf,
  prefill: "sums",
};
