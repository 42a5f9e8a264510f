/** Scissorhands: tokens that were important stay so. */

import type { Policy } from "../policy.ts";

/**
 * Half of the budget leaves at once: the tokens that had more than an even share
 * of attention in the fewest of the last 400 steps (arXiv 2305.17118).
 */
export const scissorhands: Policy = {
  name: "scissorhands",
  summary: "Half leaves at once: least often above an even share of attention",
  paper: "Scissorhands, arXiv 2305.17118",
  select: "least-often",
  merge: "none",
  protects: (m) => ({
    sinks: 0,
    recent: Math.min(10, Math.floor(m / 2)),
  }),
  interval: (m) => Math.max(1, Math.floor(m / 2)),
  prefill: "steps",
};
