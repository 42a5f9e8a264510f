/** CaM: a window whose leaving tokens are spread over those behind. */

import type { Policy } from "../policy.ts";

/**
 * The oldest token behind the sinks leaves; with a probability that its share of
 * attention gives, a sixteenth of its value is added to each of the next 16
 * tokens (ICML 2024).
 */
export const cam: Policy = {
  name: "cam",
  summary:
    "The oldest behind the sinks leaves, its value spread by chance over 16 tokens",
  paper: "CaM, ICML 2024",
  select: "oldest",
  merge: "spread",
  protects: (m) => ({ sinks: 4, recent: Math.max(0, m - 4) }),
  prefill: "sums",
};
