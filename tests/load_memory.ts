/**
 * A process of its own for load_memory_test.ts: loads a small model, so that
 * all code and libraries are there, then a large one, and prints what memory
 * that took beside what the library holds.
 *
 *   deno run -A tests/load_memory.ts LIBRARY SMALL LARGE
 */

import { loadModel } from "../mod.ts";

const [library, small, large] = Deno.args as [string, string, string];

/** A line of the process's own account, in bytes. */
function status(name: string): number {
  const text = Deno.readTextFileSync("/proc/self/status");
  return 1024 * Number(new RegExp(`${name}:\\s*(\\d+) kB`).exec(text)![1]);
}

const options = { library, threads: 1 };
(await loadModel(small, options)).close();
// The peak is counted from here on.
Deno.writeTextFileSync("/proc/self/clear_refs", "5");
const before = status("VmRSS");
using model = await loadModel(large, options);
const { backend, weightBytes } = model;
console.log(JSON.stringify({
  before,
  peak: status("VmHWM"),
  held: backend.memory,
  weights: weightBytes,
}));
