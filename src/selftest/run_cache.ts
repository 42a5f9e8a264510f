/** Runs one row of cache_cases.ts on a library, step by step beside the f64 cache. */

import type { Backend } from "../backend/backend.ts";
import { Tensor } from "../backend/tensor.ts";
import type { KvCache } from "../cache/cache.ts";
import type { CacheType } from "../cache/layout.ts";
import { keepsAll, mergesRight } from "../cache/policy.ts";
import { findPolicy } from "../cache/registry.ts";
import type {
  AttendCase,
  CacheCase,
  CacheRow,
  InsertCase,
  PrefillCase,
  RepeatCase,
  Victims,
} from "./cache_cases.ts";
import { type Finding, Findings, sameBytes } from "./findings.ts";
import { type Layer, openCache, openReference, qkvWidth } from "./layer.ts";
import { largestError, Random, relativeError } from "./numbers.ts";
import type { HeadState, ReferenceCache } from "./reference.ts";
import { cheapest, type Choose } from "./reference_policies.ts";

/**
 * What is allowed: of outputs and weights relative, of values relative to the
 * row's largest. The f64 list rounds merged values as the cache does; a sum near
 * a tie may go to the other side, one unit in the last place away.
 */
interface Limits {
  output: number;
  score: number;
  value: number;
}

const rounding: Record<CacheType, Limits> = {
  f32: { output: 1e-5, score: 1e-5, value: 1e-5 },
  f16: { output: 1e-3, score: 1e-3, value: 2 ** -10 },
  bf16: { output: 5e-3, score: 5e-3, value: 2 ** -7 },
};

/** Stored keys and values are exact, so where none is rotated before it is stored f32 does as well as in an f32 cache. */
function limitsOf(row: CacheRow, backend: Backend): Limits {
  const limits = rounding[row.cacheType];
  if (row.kernel === "insert") return { ...limits, score: 1e-5 };
  if (row.positions === "text") return limits;
  if (row.kernel === "prefill") return { ...limits, output: 1e-3, score: 1e-3 };
  return backend.device === "cpu"
    ? { ...limits, output: 1e-5, score: 1e-5 }
    : limits;
}

/**
 * Runs the row. Each step starts from what the library holds, so that errors
 * do not add up and each is checked sharply.
 */
export async function runCacheCase(
  backend: Backend,
  row: CacheRow,
  random: Random,
): Promise<Finding[]> {
  const found = new Findings();
  switch (row.kernel) {
    case "attend":
      await attend(backend, row, random, found);
      break;
    case "insert":
      insert(backend, row, random, found);
      break;
    case "prefill":
      prefill(backend, row, random, found);
      break;
    case "repeat":
      await repeat(backend, row, random, found);
      break;
    case "graph":
      await graph(backend, row, random, found);
      break;
  }
  return found.list;
}

/** The layer of a case. */
function layerOf(row: CacheCase): Layer {
  return {
    heads: row.group * row.kvHeads,
    kvHeads: row.kvHeads,
    headDim: row.headDim,
    pairs: row.pairs,
    ...row.rotary === undefined ? {} : { rotary: row.rotary },
    scoreCap: row.scoreCap,
    window: row.window,
  };
}

function open(backend: Backend, row: CacheCase): KvCache {
  const { policy, positions, cacheType, sequences, budget } = row;
  const common = { policy, positions, cacheType, sequences };
  return openCache(
    backend,
    layerOf(row),
    keepsAll(findPolicy(policy)) ? { ...common, capacity: budget } : {
      ...common,
      budget,
      sinks: row.sinks,
      recent: row.recent,
      interval: 1,
    },
  );
}

/** Weights as of attention, for each rank. */
function weightsOf(row: CacheCase, random: Random): Float32Array<ArrayBuffer> {
  const { sequences, kvHeads, budget } = row;
  return Float32Array.from(
    { length: sequences * kvHeads * (budget + 1) },
    () => (0.01 + random.uniform()) ** 2 * 3 / (budget + 1),
  );
}

/** Puts this many tokens into an empty cache. */
async function fill(
  backend: Backend,
  cache: KvCache,
  row: CacheCase,
  tokens: number,
  random: Random,
): Promise<void> {
  if (tokens === 0) return;
  const { sequences, kvHeads, headDim } = row;
  const period = Math.min(tokens, 61);
  const kv = Array.from({ length: period }, () =>
    Tensor.from(
      backend,
      random.normals(sequences * 2 * kvHeads * headDim),
      sequences,
    ));
  const weights = Array.from(
    { length: Math.min(period, 3) },
    () => Tensor.from(backend, weightsOf(row, random), sequences),
  );
  const put = (i: number) =>
    cache.insert(0, kv[i]!, weights[i % weights.length]!);
  {
    using all = backend.record(() => kv.forEach((_, i) => put(i)));
    await all.run(Math.floor(tokens / period));
  }
  for (let i = 0; i < tokens % period; i++) put(i);
  for (const tensor of [...kv, ...weights]) tensor.close();
}

function read(cache: KvCache, row: CacheCase, sequence: number): HeadState[] {
  return Array.from({ length: row.kvHeads }, (_, head) => ({
    ...cache.rows(0, head, sequence),
    keys: cache.keys(0, head, sequence),
    values: cache.values(0, head, sequence),
  }));
}

/** The ranks that must leave; -1 is free. */
function ranksOf(
  row: { victims?: Victims },
  budget: number,
  step: number,
  count: number,
  random: Random,
): Int32Array<ArrayBuffer> {
  const pick = (): number => {
    switch (row.victims!) {
      case "new":
        return budget;
      case "before new":
        return budget - 1;
      case "first":
        return 0;
      case "across":
        // Slot 0 first; then the new token lies in it, and before it the last.
        return step === 0 ? 0 : Math.max(0, budget - 2);
      case "block ends":
        return Math.min(budget, 64 * (1 + random.integer(budget / 64 + 1)) - 1);
      case "chunk ends":
        return 8 * (1 + random.integer(budget / 8)) - 1;
      case "any":
        return random.integer(budget + 2) - 1;
    }
  };
  return Int32Array.from({ length: count }, pick);
}

/** Follows the library's choice, once it is known to be as good as the best. */
function follow(
  cache: KvCache,
  reference: ReferenceCache,
  row: CacheCase,
  sequence: number,
  ranks: Int32Array | null,
  limits: Limits,
  found: Findings,
): Choose {
  const events = cache.events(sequence);
  return (costs, tokens, head) => {
    const event = events[head];
    const rank = tokens.findIndex(({ position }) => position === event?.from);
    const forced = ranks?.[sequence * row.kvHeads + head] ?? -1;
    if (event === undefined || rank < 0) {
      found.must("victim", false);
      return forced >= 0 ? forced : cheapest(costs, tokens, head);
    }
    if (forced >= 0) found.must("victim", rank === forced);
    else {
      const least = costs.reduce((a, b) => Math.min(a, b));
      const excess = costs[rank] === least
        ? 0
        : (costs[rank]! - least) / Math.abs(least);
      found.note("victim", excess, 2 * limits.score);
    }
    const right = tokens[rank + 1];
    const merges = mergesRight(cache.policy) && right !== undefined;
    found.must(
      "neighbour",
      event.into === (merges ? right.position : null),
    );
    const weight = reference.weigh(tokens[rank]!);
    found.note(
      "averages",
      Math.abs(event.weights[0] - weight) / weight,
      limits.score,
    );
    return rank;
  };
}

/**
 * Compares what the library holds of one sequence with the f64 cache, which
 * held `before` until now. Heads in `forked` merged in another order.
 */
function compare(
  cache: KvCache,
  reference: ReferenceCache,
  before: readonly HeadState[],
  after: readonly HeadState[],
  sequence: number,
  limits: Limits,
  found: Findings,
  forked: ReadonlySet<number> = new Set(),
): void {
  const { seen, merged, evicted } = reference;
  const stats = cache.stats(sequence);
  found.must(
    "counts",
    stats.seen === seen && stats.merged === merged &&
      stats.evicted === evicted &&
      stats.kept === reference.heads[0]!.length,
  );
  reference.heads.forEach((tokens, head) => {
    const { kept, steps, score, keys, values } = after[head]!;
    const same = kept.length === tokens.length &&
      tokens.every(({ position }, rank) => position === kept[rank]);
    found.must("kept tokens", same);
    if (!same) return;
    found.must(
      "steps",
      tokens.every((token, rank) => token.steps === steps[rank]),
    );
    const places = [...cache.slots(0, head, sequence)].sort((a, b) => a - b);
    found.must(
      "slots",
      places.every((slot, i) =>
        slot >= 0 && slot < cache.layerSlots[0]! && slot !== places[i - 1]
      ),
    );
    const scores = tokens.map((token) => token.score);
    found.note("scores", relativeError(score, scores), limits.score);
    const old = new Map<number, number>();
    const { kept: places0, score: score0 } = before[head]!;
    for (let i = 0; i < places0.length; i++) old.set(places0[i]!, score0[i]!);
    const held = tokens.map(({ position }) => old.get(position) ?? 0);
    const gains = scores.map((a, rank) => a - held[rank]!);
    // A score in f32 hides what is below its last digit.
    const hidden = lengthOf(scores) * 2 ** -24 / lengthOf(gains);
    found.note(
      "score increments",
      relativeError(Array.from(score, (a, r) => a - held[r]!), gains),
      limits.score + 2 * hidden,
    );
    const width = values.length / tokens.length;
    const part = (all: ArrayLike<number>, rank: number) =>
      (all as Float32Array).subarray(rank * width, (rank + 1) * width);
    tokens.forEach(({ key, value, merges }, rank) => {
      const error = largestError(part(values, rank), value) / largest(value);
      if (merges === 0) found.note("values", error, 0);
      else if (!forked.has(head)) {
        found.note("merged values", error, limits.value * merges);
      }
      found.note(
        "keys",
        largestError(part(keys, rank), key) / largest(key),
        cache.positions === "cache" ? 0 : limits.value,
      );
    });
  });
}

/** The root of the sum of the squares; Math.hypot takes no more than a call's arguments. */
function lengthOf(x: readonly number[]): number {
  return Math.sqrt(x.reduce((sum, y) => sum + y * y, 0));
}

function largest(x: Float64Array): number {
  let most = Number.MIN_VALUE;
  for (let i = 0; i < x.length; i++) most = Math.max(most, Math.abs(x[i]!));
  return most;
}

async function attend(
  backend: Backend,
  row: AttendCase,
  random: Random,
  found: Findings,
): Promise<void> {
  const layer = layerOf(row);
  const { sequences, budget, kvHeads } = row;
  const limits = limitsOf(row, backend);
  const width = qkvWidth(layer), outWidth = layer.heads * layer.headDim;
  using cache = open(backend, row);
  await fill(backend, cache, row, row.kept, random);
  using qkv = new Tensor(backend, "F32", sequences, width);
  using out = new Tensor(backend, "F32", sequences, outWidth);
  using victims = new Tensor(backend, "I32", sequences, kvHeads);
  // Of many large sequences the first and the last are followed.
  const large = sequences * budget * outWidth > 4e6;
  const followed = Array.from({ length: sequences }, (_, b) => b)
    .filter((b) => !large || b === 0 || b === sequences - 1)
    .map((sequence) => ({
      sequence,
      reference: openReference(layer, cache, sequence),
      state: read(cache, row, sequence),
    }));
  for (let step = 0; step < row.steps; step++) {
    const seen = row.kept + step;
    const input = random.qkv(layer, sequences, [1, 0.3, 2][step % 3]);
    qkv.write(input);
    out.write(new Float32Array(sequences * outWidth).fill(NaN));
    const ranks = row.victims && seen >= budget
      ? ranksOf(row, budget, step, sequences * kvHeads, random)
      : null;
    if (ranks) victims.write(ranks);
    cache.attend(0, out, qkv, ranks ? victims : undefined);
    for (const one of followed) {
      const { sequence, reference, state } = one;
      reference.load(seen, state);
      const expected = reference.step(
        input.subarray(sequence * width, (sequence + 1) * width),
        follow(cache, reference, row, sequence, ranks, limits, found),
      );
      found.note(
        "attention output",
        relativeError(out.floats(sequence, 1), expected),
        limits.output,
      );
      one.state = read(cache, row, sequence);
      compare(cache, reference, state, one.state, sequence, limits, found);
      if (seen < budget) {
        one.state.forEach(({ score }, head) => {
          const sum = total(score), before = total(state[head]!.score);
          found.note(
            "sum of increments",
            Math.abs(sum - before - 1),
            1e-5 + 1e-6 * sum,
          );
        });
      }
    }
  }
}

function total(x: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += x[i]!;
  return sum;
}

function insert(
  backend: Backend,
  row: InsertCase,
  random: Random,
  found: Findings,
): void {
  const { sequences, kvHeads, headDim, budget } = row;
  const limits = limitsOf(row, backend);
  const width = 2 * kvHeads * headDim;
  using cache = open(backend, row);
  using kv = new Tensor(backend, "F32", sequences, width);
  using given = new Tensor(
    backend,
    "F32",
    sequences,
    kvHeads * (budget + 1),
  );
  using victims = new Tensor(backend, "I32", sequences, kvHeads);
  const references = Array.from(
    { length: sequences },
    (_, b) => openReference(layerOf(row), cache, b),
  );
  for (let step = 0; step < row.steps; step++) {
    const input = random.normals(sequences * width);
    const weights = weightsOf(row, random);
    kv.write(input);
    given.write(weights);
    const ranks = row.victims && step >= budget
      ? ranksOf(row, budget, step, sequences * kvHeads, random)
      : null;
    if (ranks) victims.write(ranks);
    const checked = step < 2 || step >= budget - 1;
    const before = references.map((_, b) => checked ? read(cache, row, b) : []);
    cache.insert(0, kv, given, ranks ? victims : undefined);
    references.forEach((reference, b) => {
      if (checked) reference.load(step, before[b]!);
      const total = Math.min(step, budget) + 1;
      reference.insert(
        input.subarray(b * width, (b + 1) * width),
        Array.from({ length: kvHeads }, (_, head) => {
          const from = (b * kvHeads + head) * (budget + 1);
          return weights.subarray(from, from + total);
        }),
        follow(cache, reference, row, b, ranks, limits, found),
      );
      if (checked) {
        const after = read(cache, row, b);
        compare(cache, reference, before[b]!, after, b, limits, found);
      }
    });
  }
}

function prefill(
  backend: Backend,
  row: PrefillCase,
  random: Random,
  found: Findings,
): void {
  const layer = layerOf(row);
  const limits = limitsOf(row, backend);
  const outWidth = layer.heads * layer.headDim;
  const sequence = row.sequences - 1;
  using cache = open(backend, row);
  const reference = openReference(layer, cache, sequence);
  let state = read(cache, row, sequence), seen = 0;
  for (const [i, rows] of row.passes.entries()) {
    const input = random.qkv(layer, rows, [1, 2, 0.3][i % 3]);
    using qkv = Tensor.from(backend, input, rows);
    // A row too many, which must stay as it is.
    using out = Tensor.from(
      backend,
      new Float32Array((rows + 1) * outWidth).fill(NaN),
      rows + 1,
    );
    cache.prefill(0, sequence, out, qkv, rows);
    const after = read(cache, row, sequence);
    const stays = after.map(({ kept }) => new Set(Array.from(kept)));
    const forked = new Set<number>();
    reference.load(seen, state);
    const expected = reference.prefill(input, rows, (costs, tokens, head) => {
      // Of equally good ones the library may have taken another, or in another order.
      const least = costs.reduce((a, b) => Math.min(a, b));
      const most = least + 2 * limits.score * Math.abs(least);
      const leave = [...costs.keys()].filter((rank) =>
        costs[rank]! <= most && !stays[head]!.has(tokens[rank]!.position)
      );
      if (leave.length > 1) forked.add(head);
      return leave.reduce(
        (a, b) => costs[b]! < costs[a]! ? b : a,
        leave[0] ?? cheapest(costs, tokens, head),
      );
    });
    found.note(
      "prefill output",
      relativeError(out.floats(0, rows), expected),
      limits.output,
    );
    found.must("rows beyond the last", out.floats(rows).every(Number.isNaN));
    compare(
      cache,
      reference,
      state,
      after,
      sequence,
      limits,
      found,
      forked,
    );
    if (sequence > 0) found.must("other sequences", cache.stats(0).seen === 0);
    state = after;
    seen += rows;
  }
}

/** Everything a cache holds, and what it gave. */
function bytesOf(cache: KvCache, row: CacheCase, out: number[]): number[] {
  for (let b = 0; b < row.sequences; b++) {
    for (const { kept, steps, score, keys, values } of read(cache, row, b)) {
      for (const list of [kept, steps, score, keys, values]) {
        for (let i = 0; i < list.length; i++) out.push(list[i]!);
      }
    }
  }
  return out;
}

async function repeat(
  backend: Backend,
  row: RepeatCase,
  random: Random,
  found: Findings,
): Promise<void> {
  const layer = layerOf(row);
  const seed = random.integer(2 ** 31);
  const rows = 20, steps = 6;
  using chunk = Tensor.from(backend, random.qkv(layer, rows), rows);
  using qkv = Tensor.from(
    backend,
    random.qkv(layer, row.sequences, 2),
    row.sequences,
  );
  const outWidth = layer.heads * layer.headDim;
  using chunkOut = new Tensor(backend, "F32", rows, outWidth);
  using out = new Tensor(backend, "F32", row.sequences, outWidth);
  using cache = open(backend, row);
  let first: number[] | undefined;
  for (let run = 0; run < row.times; run++) {
    cache.reset();
    await fill(backend, cache, row, row.budget - 10, new Random(seed));
    const all: number[] = [];
    cache.prefill(0, 0, chunkOut, chunk, rows);
    all.push(...chunkOut.floats());
    for (let step = 0; step < steps; step++) {
      cache.attend(0, out, qkv);
      all.push(...out.floats());
    }
    bytesOf(cache, row, all);
    first ??= all;
    found.must("bytes of a repeated run", sameBytes(all, first));
  }
}

async function graph(
  backend: Backend,
  row: RepeatCase,
  random: Random,
  found: Findings,
): Promise<void> {
  const layer = layerOf(row);
  const seed = random.integer(2 ** 31);
  const inputs = [0, 1].map(() =>
    Tensor.from(backend, random.qkv(layer, row.sequences), row.sequences)
  );
  using out = new Tensor(
    backend,
    "F32",
    row.sequences,
    layer.heads * layer.headDim,
  );
  using cache = open(backend, row);
  const step = () => inputs.forEach((qkv) => cache.attend(0, out, qkv));
  using recorded = backend.record(step);
  const runs: (() => Promise<void> | void)[] = [
    () => recorded.run(row.times),
    async () => {
      for (let i = 0; i < row.times; i++) await recorded.run();
    },
    () => {
      for (let i = 0; i < row.times; i++) step();
    },
  ];
  const results: number[][] = [];
  for (const run of runs) {
    cache.reset();
    await fill(backend, cache, row, row.budget - 30, new Random(seed));
    await run();
    results.push(bytesOf(cache, row, [...out.floats()]));
  }
  found.must("bytes of a graph", sameBytes(results[0]!, results[1]!));
  found.must("bytes of calls", sameBytes(results[0]!, results[2]!));
  for (const tensor of inputs) tensor.close();
}
