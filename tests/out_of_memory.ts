/**
 * A process of its own for cuda_test.ts: fills the GPU's memory but for a
 * little, asks for a model and for caches that have no room in that, and prints
 * what was said and what was held before and after.
 *
 *   deno run -A tests/out_of_memory.ts LIBRARY SMALL LARGE
 */

import { generate, loadModel, type Model } from "../mod.ts";
import { Backend } from "../src/backend/backend.ts";
import { Tensor } from "../src/backend/tensor.ts";
import type { CacheOptions } from "../src/cache/layout.ts";

const [library, small, large] = Deno.args as [string, string, string];
const device = "cuda", MIB = 1 << 20;

/** What a body throws, as JSON has it. */
async function failure(body: () => unknown): Promise<unknown> {
  try {
    await body();
    return null;
  } catch (error) {
    const { name, status, message } = error as Error & { status?: number };
    return { name, status, message };
  }
}

/** A few tokens from a small cache. */
async function tokensOf(model: Model): Promise<number[]> {
  const cache = { budget: 16, sinks: 0, recent: 1 };
  const pieces = generate(model, [3, 4, 5], { cache, maxTokens: 24 });
  for (;;) {
    const { done, value } = await pieces.next();
    if (done) return value.tokens;
  }
}

const open = () => loadModel(small, { device, library });

using backend = await Backend.open({ device, library });
const held = () => [backend.memory, backend.liveHandles];
using model = await open();
const tokens = await tokensOf(model);
const start = held();

// Pieces of 1 GiB, then of 64 MiB, until one is refused, and the last three back: 192 MiB or a little more are free.
const filler: Tensor[] = [];
let asked = 0;
for (const bytes of [1024 * MIB, 64 * MIB]) {
  while (
    await failure(() =>
      filler.push(new Tensor(backend, "F32", bytes >> 12, 1024))
    ) === null
  ) asked += bytes;
}
for (const tensor of filler.splice(-3)) tensor.close();
asked -= 3 * 64 * MIB;
const filled = held();

const loading = await failure(() => loadModel(large, { device, library }));
const loaded = held();
const caches: unknown[] = [];
const most = { sequences: 4096, sinks: 0, recent: 1 };
for (
  const options of [
    { ...most, budget: 4096 },
    { ...most, policy: "full", capacity: 4096 },
    // The first of its two kinds of layers has room, the second has none.
    { ...most, layerBudgets: "inverse", budget: 400 },
  ] as CacheOptions[]
) {
  const said = await failure(() => model.createCache(options));
  caches.push({ said, held: held() });
}
const crowded = await tokensOf(model);
for (const tensor of filler) tensor.close();
const end = held();
using again = await open();
const afterwards = await tokensOf(again);
using whole = await loadModel(large, { device, library });
console.log(JSON.stringify({
  start,
  asked,
  filled,
  loading,
  loaded,
  caches,
  end,
  tokens: { before: tokens, crowded, afterwards },
  weights: whole.weightBytes,
}));
