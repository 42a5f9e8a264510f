/** The full cache, the reference that every policy is compared with. */

import type { Policy } from "../policy.ts";

/** Keeps every token; the cache's capacity bounds the text. */
export const full: Policy = {
  name: "full",
  summary: "Keeps every token",
  paper: "Vaswani et al., arXiv 1706.03762",
  select: "none",
  merge: "none",
  protects: () => ({ sinks: 0, recent: 0 }),
  prefill: "sums",
};
