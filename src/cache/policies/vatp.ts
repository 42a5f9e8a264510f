/** VATP: heavy hitters, weighed with the size of their values. */

import type { Policy } from "../policy.ts";

/**
 * The token with the lowest product of its sum of attention and the L1 norm of
 * its value leaves (arXiv 2406.12335).
 */
export const vatp: Policy = {
  name: "vatp",
  summary: "The lowest sum of attention times L1 norm of the value leaves",
  paper: "VATP, arXiv 2406.12335",
  select: "sum-value-norm",
  merge: "none",
  protects: (m) => ({
    sinks: Math.min(20, Math.floor(m / 4)),
    recent: Math.floor(m / 2),
  }),
  prefill: "sums",
};
