/** SnapKV: what the last queries attend to stays, with its neighbours. */

import type { Policy } from "../policy.ts";

/**
 * The token with the lowest attention of the last 32 steps, averaged with its two
 * neighbours on either side, leaves (arXiv 2404.14469, in decoding).
 */
export const snapkv: Policy = {
  name: "snapkv",
  summary:
    "The lowest attention of the last 32 steps, over 5 neighbours, leaves",
  paper: "SnapKV, arXiv 2404.14469",
  select: "window",
  merge: "none",
  protects: (m) => ({
    sinks: 0,
    recent: Math.min(32, Math.max(1, Math.floor(m / 2))),
  }),
  prefill: "steps",
};
