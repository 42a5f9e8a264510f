/** What a cache promises whatever its policy: positions, batches, prefill, order, errors. */

import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertGreaterOrEqual,
  assertLessOrEqual,
  assertThrows,
} from "@std/assert";
import { Backend } from "../src/backend/backend.ts";
import { WkvError } from "../src/backend/error.ts";
import { Tensor } from "../src/backend/tensor.ts";
import type { KvCache } from "../src/cache/cache.ts";
import type { CacheOptions } from "../src/cache/layout.ts";
import { choosesByStep, mergesRight } from "../src/cache/policy.ts";
import { findPolicy, policyNames } from "../src/cache/registry.ts";
import {
  dense,
  type Layer,
  openCache,
  openReference,
  qkvWidth,
  turn,
} from "../src/selftest/layer.ts";
import {
  largestError,
  Random,
  relativeError,
} from "../src/selftest/numbers.ts";
import { afterAll, beforeAll, describe, it, openBackend } from "./device.ts";

let backend: Backend;
beforeAll(async () => {
  backend = await openBackend();
});
afterAll(() => backend?.close());

const layer: Layer = { heads: 4, kvHeads: 2, headDim: 16 };
const bounded = policyNames().filter((name) => name !== "full");
const merging = policyNames().filter((name) => mergesRight(findPolicy(name)));
/** Those whose prompts are fed in passes, and those that settle whole chunks. */
const passing = policyNames().filter((name) =>
  findPolicy(name).prefill === "sums"
);
const chunking = bounded.filter((name) => !choosesByStep(findPolicy(name)));
/** Those whose values come from what is left of a token alone. */
const ordered = policyNames().map(findPolicy).filter((policy) =>
  policy.merge === "none" || mergesRight(policy)
).map(({ name }) => name);

type Numbers = Float32Array<ArrayBuffer>;

/** Feeds rows `[steps, B, (H + 2 N) D]` one step at a time; gives the outputs. */
function decode(
  cache: KvCache,
  rows: Numbers,
  shape: Layer = layer,
  on: Backend = backend,
): Numbers {
  const { sequences: b } = cache;
  const width = qkvWidth(shape) * b;
  const outWidth = shape.heads * shape.headDim * b;
  const steps = rows.length / width;
  const out = new Float32Array(steps * outWidth);
  using qkv = new Tensor(on, "F32", b, width / b);
  using result = new Tensor(on, "F32", b, outWidth / b);
  for (let i = 0; i < steps; i++) {
    qkv.write(rows.subarray(i * width, (i + 1) * width));
    cache.attend(0, result, qkv);
    out.set(result.floats(), i * outWidth);
  }
  return out;
}

/** Feeds rows of one sequence at once; gives the outputs. */
function prefill(
  cache: KvCache,
  rows: Numbers,
  sequence = 0,
  shape: Layer = layer,
  on: Backend = backend,
): Numbers {
  const count = rows.length / qkvWidth(shape);
  using qkv = Tensor.from(on, rows, count);
  using out = new Tensor(on, "F32", count, shape.heads * shape.headDim);
  cache.prefill(0, sequence, out, qkv, count);
  return out.floats();
}

/** All that can be read of one sequence. */
function contents(cache: KvCache, sequence = 0, shape: Layer = layer) {
  return {
    stats: cache.stats(sequence),
    heads: Array.from({ length: shape.kvHeads }, (_, head) => ({
      rows: cache.rows(0, head, sequence),
      keys: cache.keys(0, head, sequence),
      values: cache.values(0, head, sequence),
    })),
  };
}

/** The same tokens and state, numbers up to a tolerance. */
function assertSameState(
  a: KvCache,
  b: KvCache,
  tolerance: number,
  shape: Layer = layer,
): void {
  assertEquals(a.stats(), b.stats());
  for (let head = 0; head < shape.kvHeads; head++) {
    const left = a.rows(0, head), right = b.rows(0, head);
    assertEquals(left.kept, right.kept);
    assertEquals(left.steps, right.steps);
    assertLessOrEqual(relativeError(left.score, right.score), tolerance);
    assertLessOrEqual(
      relativeError(a.values(0, head), b.values(0, head)),
      tolerance,
    );
    const keys = [a.keys(0, head), b.keys(0, head)] as const;
    // Keys that are rotated when they are stored need not be of one kernel.
    if (a.positions === "cache") assertEquals(...keys);
    else assertLessOrEqual(relativeError(...keys), tolerance);
  }
}

describe("a budget that is never reached", () => {
  for (const policy of bounded) {
    for (const positions of ["cache", "text"] as const) {
      it(`gives the bytes of full under ${policy}, positions ${positions}`, () => {
        const random = new Random(3);
        const rows = random.qkv(layer, 24, 2);
        for (const cacheType of ["f32", "f16", "bf16"] as const) {
          const common: CacheOptions = { positions, cacheType };
          for (const split of passing.includes(policy) ? [0, 9, 24] : [0]) {
            const results = [
              openCache(backend, layer, { ...common, policy, budget: 24 }),
              openCache(backend, layer, {
                ...common,
                policy: "full",
                capacity: 24,
              }),
            ].map((opened) => {
              using cache = opened;
              const at = split * qkvWidth(layer);
              const first = split ? [prefill(cache, rows.subarray(0, at))] : [];
              const outputs = [...first, decode(cache, rows.subarray(at))];
              return { outputs, ...contents(cache) };
            });
            assertEquals(results[0], results[1]);
          }
        }
      });
    }
  }
});

describe("prefill", () => {
  for (const policy of passing) {
    const fit = policy === "full"
      ? { policy, capacity: 64 }
      : { policy, budget: 24 };
    for (
      const [name, passes] of Object.entries({
        "one pass": [20],
        "several passes": [7, 1, 12, 4],
      })
    ) {
      it(`of ${name} and decode give what decode gives, under ${policy}`, () => {
        for (const positions of ["cache", "text"] as const) {
          for (const cacheType of ["f32", "f16"] as const) {
            const options: CacheOptions = { ...fit, positions, cacheType };
            using at = openCache(backend, layer, options);
            using one = openCache(backend, layer, options);
            const rows = new Random(5).qkv(layer, 60, 2);
            const width = qkvWidth(layer);
            const expected = decode(one, rows);
            let from = 0;
            const outputs: number[] = [];
            for (const count of passes) {
              outputs.push(
                ...prefill(
                  at,
                  rows.subarray(from * width, (from + count) * width),
                ),
              );
              from += count;
            }
            outputs.push(...decode(at, rows.subarray(from * width)));
            assertLessOrEqual(
              relativeError(outputs, expected),
              cacheType === "f32" ? 1e-5 : 1e-3,
            );
            assertSameState(at, one, cacheType === "f32" ? 1e-5 : 1e-3);
          }
        }
      });
    }
  }

  it("of one token equals a decode step once tokens have left", () => {
    for (const policy of chunking) {
      using a = openCache(backend, layer, { policy, budget: 10 });
      using b = openCache(backend, layer, { policy, budget: 10 });
      const random = new Random(8);
      const rows = random.qkv(layer, 30, 2);
      decode(a, rows);
      decode(b, rows);
      for (let i = 0; i < 20; i++) {
        const row = random.qkv(layer, 1, 2);
        const error = relativeError(prefill(a, row), decode(b, row));
        assertLessOrEqual(error, 1e-5);
        assertSameState(a, b, 1e-5);
      }
    }
  });

  it("of a chunk follows the f64 list implementation", () => {
    for (const policy of chunking) {
      for (const positions of ["cache", "text"] as const) {
        using cache = openCache(backend, layer, {
          policy,
          budget: 12,
          positions,
        });
        const reference = openReference(layer, cache);
        const random = new Random(13);
        for (const count of [5, 9, 1, 30, 12, 13, 2]) {
          const rows = random.qkv(layer, count, 1.5);
          const out = prefill(cache, rows);
          assertLessOrEqual(
            relativeError(out, reference.prefill(rows, count)),
            1e-5,
            `${policy}: ${count} rows`,
          );
          const { seen, merged, evicted } = reference;
          const kept = Math.min(12, seen);
          assertEquals(cache.stats(), { seen, kept, merged, evicted });
          reference.heads.forEach((tokens, head) => {
            const state = cache.rows(0, head);
            assertEquals(state.kept, tokens.map(({ position }) => position));
            assertEquals(state.steps, tokens.map(({ steps }) => steps));
            const scores = tokens.map(({ score }) => score);
            assertLessOrEqual(relativeError(state.score, scores), 1e-5);
            assertLessOrEqual(
              relativeError(
                cache.values(0, head),
                tokens.flatMap(({ value }) => [...value]),
              ),
              1e-5,
            );
          });
        }
      }
    }
  });

  it("of chunks keeps budget, protected tokens, order and convex values", () => {
    const one: Layer = { heads: 2, kvHeads: 1, headDim: 512 };
    for (const policy of chunking) {
      using cache = openCache(backend, one, {
        policy,
        budget: 16,
        sinks: 3,
        recent: 5,
      });
      const random = new Random(21);
      let seen = 0;
      for (const count of [40, 7, 64, 1, 100]) {
        prefill(cache, oneHot(random, one, seen, count), 0, one);
        seen += count;
        const { kept } = cache.rows(0, 0);
        assertEquals(kept.length, 16);
        assertEquals(kept.slice(0, 3), [0, 1, 2]);
        assertEquals(
          kept.slice(-5),
          Array.from({ length: 5 }, (_, i) => seen - 5 + i),
        );
        if (ordered.includes(policy)) assertOrigins(cache, policy);
      }
    }
  });

  it("is refused where each step's weights must be seen", () => {
    for (const policy of bounded.filter((name) => !chunking.includes(name))) {
      using cache = openCache(backend, layer, { policy, budget: 12 });
      const rows = new Random(14).qkv(layer, 13);
      assertThrows(() => prefill(cache, rows), WkvError, "one by one");
    }
  });

  it("feeds one sequence and leaves the others alone", () => {
    using cache = openCache(backend, layer, { budget: 12, sequences: 3 });
    using alone = openCache(backend, layer, { budget: 12 });
    const random = new Random(2);
    decode(cache, random.qkv(layer, 3 * 9));
    const others = [contents(cache, 0), contents(cache, 2)];
    cache.reset(1);
    assertEquals(cache.stats(1).seen, 0);
    const rows = random.qkv(layer, 20);
    assertEquals(prefill(cache, rows, 1), prefill(alone, rows));
    assertEquals([contents(cache, 0), contents(cache, 2)], others);
    assertEquals(contents(cache, 1), contents(alone));
  });

  it("takes more rows than a model's pass", () => {
    const small: Layer = { heads: 2, kvHeads: 1, headDim: 4 };
    using a = openCache(backend, small, { policy: "full", capacity: 700 });
    using b = openCache(backend, small, { policy: "full", capacity: 700 });
    const rows = new Random(4).qkv(small, 700, 2);
    const out = prefill(a, rows, 0, small);
    assertLessOrEqual(relativeError(out, decode(b, rows, small)), 1e-5);
    assertSameState(a, b, 1e-5, small);
  });
});

/** Queries and keys at random; token t's value is the unit vector of t. */
function oneHot(
  random: Random,
  shape: Layer,
  from: number,
  count: number,
): Numbers {
  const rows = random.qkv(shape, count, 2);
  const width = qkvWidth(shape);
  for (let i = 0; i < count; i++) {
    for (let n = 0; n < shape.kvHeads; n++) {
      const at = i * width + (shape.heads + shape.kvHeads + n) * shape.headDim;
      rows.fill(0, at, at + shape.headDim);
      rows[at + (from + i) % shape.headDim] = 1;
    }
  }
  return rows;
}

/**
 * Values made of unit vectors are shares of tokens: none negative, 1 in sum,
 * and only of tokens between the left neighbour and the token itself, since a
 * value is merged to the right.
 */
function assertOrigins(cache: KvCache, at: string, headDim = 512): void {
  const values = cache.values(0, 0);
  const { kept } = cache.rows(0, 0);
  kept.forEach((position, rank) => {
    const shares = values.subarray(rank * headDim, (rank + 1) * headDim);
    const left = kept[rank - 1] ?? -1;
    shares.forEach((share, token) => {
      assertGreaterOrEqual(share, 0, at);
      const may = token > left && token <= position;
      assert(share === 0 || may, `${at}: token ${token} in ${position}`);
    });
    const sum = shares.reduce((a, b) => a + b, 0);
    assertAlmostEquals(sum, 1, 1e-6, `${at}: shares of ${position}`);
    if (!merging.includes(cache.policy.name)) assertEquals(shares[position], 1);
  });
}

describe("a batch", () => {
  // What is drawn is another in each sequence.
  const drawing = (name: string) => findPolicy(name).merge === "spread";
  for (const policy of policyNames().filter((name) => !drawing(name))) {
    it(`gives each sequence what it gives alone, under ${policy}`, () => {
      for (const cacheType of ["f32", "f16", "bf16"] as const) {
        const size = policy === "full" ? { capacity: 40 } : { budget: 11 };
        const options: CacheOptions = { policy, cacheType, ...size };
        using batch = openCache(backend, layer, { ...options, sequences: 3 });
        const rows = new Random(17).qkv(layer, 3 * 40, 2);
        const outputs = decode(batch, rows);
        const width = qkvWidth(layer);
        const outWidth = layer.heads * layer.headDim;
        for (let b = 0; b < 3; b++) {
          using alone = openCache(backend, layer, options);
          const own = every(rows, width, 3, b);
          assertEquals(decode(alone, own), every(outputs, outWidth, 3, b));
          assertEquals(contents(batch, b), contents(alone));
        }
      }
    });
  }
});

/** Row b of each group of `count` rows. */
function every(
  rows: Numbers,
  width: number,
  count: number,
  b: number,
): Numbers {
  return rows.filter((_, i) => Math.floor(i / width) % count === b);
}

describe("positions", () => {
  for (const positions of ["cache", "text"] as const) {
    it(`${positions}: a step after evictions is dense attention over what is kept`, () => {
      for (const policy of bounded) {
        for (const pairs of ["interleaved", "half"] as const) {
          const shape: Layer = { ...layer, pairs, rotary: 12 };
          using cache = openCache(backend, shape, {
            policy,
            budget: 16,
            positions,
          });
          const random = new Random(31);
          decode(cache, random.qkv(shape, 70, 2), shape);
          for (let i = 0; i < 5; i++) {
            const row = random.qkv(shape, 1, 2);
            const expected = dense(cache, row, shape).out;
            const error = relativeError(decode(cache, row, shape), expected);
            assertLessOrEqual(error, 1e-5, `${policy}, ${pairs}`);
          }
        }
      }
    });
  }

  it("cache: keys are stored as they came, text: rotated at their place", () => {
    const random = new Random(6);
    const rows = random.qkv(layer, 30);
    const keyOf = (token: number, head: number) =>
      rows.subarray(
        token * qkvWidth(layer) + (layer.heads + head) * layer.headDim,
      ).subarray(0, layer.headDim);
    for (const positions of ["cache", "text"] as const) {
      using cache = openCache(backend, layer, { budget: 12, positions });
      decode(cache, rows);
      for (let head = 0; head < layer.kvHeads; head++) {
        const keys = cache.keys(0, head);
        cache.rows(0, head).kept.forEach((token, rank) => {
          const key = keys.subarray(
            rank * layer.headDim,
            (rank + 1) * layer.headDim,
          );
          if (positions === "cache") assertEquals(key, keyOf(token, head));
          else {
            const turned = turn(keyOf(token, head), token, layer);
            assertLessOrEqual(largestError(key, turned), 1e-6);
          }
        });
      }
    }
  });
});

describe("over a long run", () => {
  const one: Layer = { heads: 2, kvHeads: 1, headDim: 512 };
  for (const policy of bounded) {
    it(`${policy} keeps budget, protected tokens, order, slots and convex values`, () => {
      using cache = openCache(backend, one, {
        policy,
        budget: 20,
        sinks: 3,
        recent: 6,
        interval: 1,
      });
      const random = new Random(19);
      let slots = new Map<number, number>();
      let before: number[] = [];
      for (let seen = 1; seen <= 500; seen++) {
        decode(cache, oneHot(random, one, seen - 1, 1), one);
        const { kept, steps } = cache.rows(0, 0);
        const now = cache.slots(0, 0);
        assertEquals(kept.length, Math.min(seen, 20));
        assert(kept.every((p, rank) => rank === 0 || p > kept[rank - 1]!));
        assertEquals(steps, kept.map((p) => seen - p));
        const sinks = Math.min(seen, 3), recent = Math.min(seen, 6);
        for (let i = 0; i < sinks; i++) assertEquals(kept[i], i);
        for (let i = 1; i <= recent; i++) assertEquals(kept.at(-i), seen - i);
        // One token at most leaves, and none comes back.
        assertGreaterOrEqual(
          before.filter((p) => kept.includes(p)).length,
          before.length - 1,
        );
        assertEquals(
          [...now].sort((a, b) => a - b),
          Array.from({ length: kept.length }, (_, i) => i),
        );
        kept.forEach((p, rank) => {
          assertEquals(now[rank], slots.get(p) ?? now[rank], `slot of ${p}`);
        });
        slots = new Map(kept.map((p, rank) => [p, now[rank]!]));
        before = kept;
        if (seen % 10 > 0 || !ordered.includes(policy)) continue;
        assertOrigins(cache, `${policy}, ${seen}`);
      }
    });
  }

  it("a merge of equal values changes nothing", () => {
    for (const policy of merging) {
      for (const cacheType of ["f32", "f16", "bf16"] as const) {
        using cache = openCache(backend, layer, {
          policy,
          budget: 10,
          cacheType,
        });
        const rows = new Random(9).qkv(layer, 80, 2);
        const width = qkvWidth(layer);
        const values = rows.slice(width - 2 * layer.headDim, width);
        for (let i = 0; i < 80; i++) {
          rows.set(values, (i + 1) * width - values.length);
        }
        decode(cache, rows.subarray(0, width));
        const first = [cache.values(0, 0), cache.values(0, 1)];
        decode(cache, rows.subarray(width));
        first.forEach((value, head) => {
          const all = cache.values(0, head);
          for (let at = 0; at < all.length; at += value.length) {
            const error = largestError(
              all.subarray(at, at + value.length),
              value,
            );
            assertLessOrEqual(error, cacheType === "f32" ? 2e-6 : 0);
          }
        });
      }
    }
  });
});

describe("runs", () => {
  for (const policy of policyNames()) {
    it(`repeat to the byte after reset() and on any number of threads, under ${policy}`, async () => {
      const wide: Layer = { heads: 9, kvHeads: 3, headDim: 64 };
      const random = new Random(23);
      const prompt = random.qkv(wide, 50, 2);
      const size = policy === "full" ? { capacity: 120 } : { budget: 40 };
      const options: CacheOptions = {
        policy,
        ...size,
        cacheType: "f16",
        sequences: 2,
      };
      const rows = random.qkv(wide, 2 * 60, 2);
      const results = [];
      for (const threads of [1, 2, 3]) {
        using on = await Backend.open({ device: "cpu", threads });
        using cache = openCache(on, wide, options);
        for (let again = 0; again < 2; again++) {
          results.push([
            ...choosesByStep(findPolicy(policy)) ? [] : [
              prefill(cache, prompt, 0, wide, on),
              prefill(cache, prompt, 1, wide, on),
            ],
            decode(cache, rows, wide, on),
            contents(cache, 0, wide),
            contents(cache, 1, wide),
          ]);
          cache.reset();
          assertEquals(cache.stats(1).seen, 0);
        }
      }
      for (const result of results) assertEquals(result, results[0]);
    });
  }

  for (const cacheType of ["f32", "f16", "bf16"] as const) {
    it(`forget at reset() values that were no numbers, in ${cacheType}`, () => {
      const shape: Layer = { heads: 4, kvHeads: 2, headDim: 64 };
      const options: CacheOptions = { budget: 30, cacheType, sequences: 2 };
      using spoilt = openCache(backend, shape, options);
      using fresh = openCache(backend, shape, options);
      const random = new Random(31);
      const width = qkvWidth(shape);
      const values = width - shape.kvHeads * shape.headDim;
      const bad = random.qkv(shape, 2 * 25, 2).map((x, i) =>
        i % width < values ? x : NaN
      );
      assert(decode(spoilt, bad, shape).some(Number.isNaN));
      spoilt.reset(0);
      spoilt.reset();
      const rows = random.qkv(shape, 2 * 40, 2);
      assertEquals(decode(spoilt, rows, shape), decode(fresh, rows, shape));
    });
  }

  it("of one layer leave the others alone", () => {
    const deep: Layer = { ...layer, layers: 2 };
    using two = openCache(backend, deep, { budget: 8 });
    using first = openCache(backend, layer, { budget: 8 });
    using second = openCache(backend, layer, { budget: 8 });
    const apart = [first, second];
    const random = new Random(29);
    using out = new Tensor(backend, "F32", 1, 64);
    for (let i = 0; i < 30; i++) {
      for (let l = 0; l < 2; l++) {
        using qkv = Tensor.from(backend, random.qkv(layer, 1, 2));
        two.attend(l, out, qkv);
        apart[l]!.attend(0, out, qkv);
      }
    }
    for (let l = 0; l < 2; l++) {
      for (let head = 0; head < 2; head++) {
        assertEquals(two.rows(l, head), apart[l]!.rows(0, head));
        assertEquals(two.values(l, head), apart[l]!.values(0, head));
        assertEquals(two.keys(l, head), apart[l]!.keys(0, head));
      }
    }
  });
});

describe("a cache refuses", () => {
  const fed = (options: CacheOptions, steps: number): KvCache => {
    const cache = openCache(backend, layer, options);
    decode(cache, new Random(1).qkv(layer, steps));
    return cache;
  };

  it("a token more than full has room for", () => {
    using cache = fed({ policy: "full", capacity: 5 }, 5);
    const random = new Random(2);
    assertThrows(() => decode(cache, random.qkv(layer, 1)), WkvError, "full");
    using other = fed({ policy: "full", capacity: 5 }, 3);
    assertThrows(() => prefill(other, random.qkv(layer, 3)), WkvError, "full");
  });

  it("to let a protected token leave", () => {
    for (const rank of [0, 1, 7, 8, 9, 2 ** 31 - 1, -2, -(2 ** 31)]) {
      using cache = fed({ budget: 8, sinks: 2, recent: 2 }, 8);
      using qkv = Tensor.from(backend, new Random(3).qkv(layer, 1));
      using out = new Tensor(backend, "F32", 1, 64);
      using victims = Tensor.from(backend, Int32Array.of(rank, rank));
      assertThrows(
        () => cache.attend(0, out, qkv, victims),
        WkvError,
        "",
        `rank ${rank}`,
      );
    }
  });

  it("what is not a number in keys and queries, and ends", () => {
    for (const policy of policyNames()) {
      const size = policy === "full"
        ? { capacity: 30 }
        : { budget: 8, sinks: 1, recent: 2 };
      for (const bad of [NaN, Infinity, -Infinity]) {
        for (const at of [0, layer.heads * layer.headDim]) {
          for (const steps of [0, 3, 12]) {
            using cache = fed({ policy, ...size }, steps);
            const row = new Random(4).qkv(layer, 1);
            row[at] = bad;
            assertThrows(
              () => decode(cache, row),
              WkvError,
              "wkv_attend",
              `${policy} ${bad} ${at} ${steps}`,
            );
            using other = fed({ policy, ...size }, steps);
            assertThrows(() => prefill(other, row), WkvError, "wkv_prefill");
          }
        }
      }
    }
  });

  it("layers, sequences and heads that it lacks", () => {
    using cache = fed({ budget: 8 }, 3);
    using qkv = new Tensor(backend, "F32", 1, qkvWidth(layer));
    using out = new Tensor(backend, "F32", 1, 64);
    for (const bad of [-1, 1, 2 ** 31 - 1]) {
      assertThrows(() => cache.attend(bad, out, qkv), RangeError, "layer");
      assertThrows(
        () => cache.prefill(bad, 0, out, qkv, 1),
        RangeError,
        "The layer must be between 0 and 0",
      );
      assertThrows(
        () => cache.prefill(0, bad, out, qkv, 1),
        WkvError,
        "equence",
      );
      assertThrows(() => cache.rows(bad, 0), RangeError, "layer");
      assertThrows(() => cache.layerKept(bad), RangeError, "layer");
      assertThrows(() => cache.rows(0, 0, bad), WkvError, "equence");
      assertThrows(
        () => cache.rows(0, bad === 1 ? 2 : bad),
        RangeError,
        "The KV head must be between 0 and 1",
      );
    }
    assertThrows(() => cache.reset(1), WkvError, "equence");
    assertThrows(() => cache.reset(-2), WkvError, "equence");
  });

  it("options out of range", () => {
    const bad: [CacheOptions, string][] = [
      [{ positions: "rank" as "cache" }, "cache or text"],
      [{ cacheType: "f64" as "f32" }, "f32, f16 or bf16"],
      [{ policy: "none" }, "weighted-kv"],
      ...[0, -1, 1.5, NaN, 2 ** 53].flatMap((
        x,
      ): [CacheOptions, string][] => [
        [{ sequences: x }, "sequences"],
        [{ budget: x }, "budget"],
        [{ policy: "full", capacity: x }, "capacity"],
      ]),
    ];
    for (const [options, text] of bad) {
      assertThrows(() => openCache(backend, layer, options), RangeError, text);
    }
  });
});

describe("a cache's bytes", () => {
  it("hold keys, values and state, and do not grow", () => {
    for (
      const [cacheType, size] of [["f32", 4], ["f16", 2], ["bf16", 2]] as const
    ) {
      using cache = openCache(backend, layer, { budget: 64, cacheType });
      const { bytes } = cache;
      const stored = 2 * 64 * layer.kvHeads * layer.headDim * size;
      assertEquals(cache.fullBytes(64), stored);
      assertGreaterOrEqual(bytes, stored);
      decode(cache, new Random(1).qkv(layer, 100));
      assertEquals(cache.bytes, bytes);
      assertEquals(cache.fullBytes(0), 0);
    }
  });
});
