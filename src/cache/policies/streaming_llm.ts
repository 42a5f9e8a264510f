/** StreamingLLM: a window that keeps the first tokens. */

import type { Policy } from "../policy.ts";

/** The oldest token behind the sinks leaves. */
export const streamingLlm: Policy = {
  name: "streaming-llm",
  summary: "The oldest token behind the sinks leaves",
  paper: "StreamingLLM, arXiv 2309.17453",
  select: "oldest",
  merge: "none",
  protects: (m) => ({ sinks: 4, recent: Math.max(0, m - 4) }),
  prefill: "sums",
};
