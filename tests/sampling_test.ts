/** wkv_sample: what it draws is distributed as its settings say, and repeats. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertNotEquals,
} from "@std/assert";
import { Backend } from "../src/backend/backend.ts";
import { sample } from "../src/backend/ops.ts";
import { Tensor } from "../src/backend/tensor.ts";
import { Random } from "../src/selftest/numbers.ts";
import { softmax } from "../src/selftest/reference.ts";
import { afterAll, beforeAll, describe, it, openBackend } from "./device.ts";

let backend: Backend;
beforeAll(async () => {
  backend = await openBackend();
});
afterAll(() => backend?.close());

interface Settings {
  temperature?: number;
  topK?: number;
  topP?: number;
  minP?: number;
}

/** Draws `count` rounds of tokens, one a sequence; sequence b has seed `seeds[b]`. */
function draw(
  logits: number[],
  { temperature = 1, topK = 0, topP = 1, minP = 0 }: Settings,
  count: number,
  seeds: number[] = [1],
): number[][] {
  const b = seeds.length;
  using rows = Tensor.from(
    backend,
    Float32Array.from(
      { length: b * logits.length },
      (_, i) => logits[i % logits.length]!,
    ),
    b,
  );
  using settings = Tensor.from(
    backend,
    Float32Array.from(seeds.flatMap(() => [temperature, topK, topP, minP])),
    b,
  );
  using rng = Tensor.from(
    backend,
    Int32Array.from(
      seeds.flatMap((seed) => [seed, Math.floor(seed / 2 ** 32), 0, 0]),
    ),
    b,
  );
  using tokens = new Tensor(backend, "I32", 1, b);
  const drawn: number[][] = [];
  for (let i = 0; i < count; i++) {
    sample(backend, tokens, rows, settings, rng);
    drawn.push([...tokens.integers()]);
  }
  if (temperature > 0) {
    assertEquals(rng.integers()[2], count, "the draws are not counted");
  }
  return drawn;
}

/** The probabilities that the settings leave, by the words of wkv.h. */
function expected(
  logits: number[],
  { temperature = 1, topK = 0, topP = 1, minP = 0 }: Settings,
): number[] {
  const order = logits.map((_, i) => i)
    .sort((a, b) => logits[b]! - logits[a]! || a - b);
  let kept = topK > 0 ? order.slice(0, topK) : order;
  if (topP < 1) {
    const shares = softmax(kept.map((i) => logits[i]!));
    let sum = 0, n = 0;
    while (n < kept.length && sum < topP) sum += shares[n++]!;
    kept = kept.slice(0, n);
  }
  const most = logits[order[0]!]!;
  kept = kept.filter((i) => Math.exp(logits[i]! - most) >= minP);
  const shares = softmax(kept.map((i) => logits[i]! / temperature));
  const out: number[] = logits.map(() => 0);
  kept.forEach((i, k) => out[i] = shares[k]!);
  return out;
}

/**
 * Pearson's chi-square of the draws, as standard deviations from its mean
 * (Wilson and Hilferty's approximation). Rare tokens are counted together.
 */
function surprise(drawn: number[], shares: number[]): number {
  const counts = shares.map(() => 0);
  for (const token of drawn) counts[token]!++;
  let chi = 0, degrees = -1, rareCount = 0, rareShare = 0;
  shares.forEach((share, i) => {
    if (share === 0) {
      assertEquals(counts[i], 0, `token ${i} cannot be drawn`);
    } else if (share * drawn.length < 10) {
      rareCount += counts[i]!;
      rareShare += share;
    } else add(counts[i]!, share);
  });
  if (rareShare * drawn.length >= 5) add(rareCount, rareShare);
  else assertLess(rareCount, 30, "rare tokens are drawn often");
  if (degrees < 1) return 0;
  const mean = 1 - 2 / (9 * degrees);
  return (Math.cbrt(chi / degrees) - mean) / Math.sqrt(2 / (9 * degrees));

  function add(count: number, share: number): void {
    const wanted = share * drawn.length;
    chi += (count - wanted) ** 2 / wanted;
    degrees++;
  }
}

describe("draws", () => {
  const random = new Random(1);
  const logits = [...random.normals(40, 2)];
  const settings: Record<string, Settings> = {
    "every token": {},
    "at a low temperature": { temperature: 0.4 },
    "at a high temperature": { temperature: 3 },
    "of top-k 1": { topK: 1 },
    "of top-k 5": { topK: 5 },
    "of top-k beyond the vocabulary": { topK: 1000 },
    "of top-p 0.1": { topP: 0.1 },
    "of top-p 0.7": { topP: 0.7 },
    "of top-p 0.99": { topP: 0.99 },
    "of min-p 0.05": { minP: 0.05 },
    "of min-p 1": { minP: 1 },
    "of top-k 20 and top-p 0.8": { topK: 20, topP: 0.8 },
    "of top-p 0.95 and min-p 0.1": { topP: 0.95, minP: 0.1 },
    "of all together": { temperature: 1.7, topK: 15, topP: 0.9, minP: 0.02 },
  };
  for (const [name, setting] of Object.entries(settings)) {
    it(`${name} are distributed as they should`, () => {
      const shares = expected(logits, setting);
      const drawn = draw(logits, setting, 20_000).flat();
      const deviations = surprise(drawn, shares);
      assert(Math.abs(deviations) < 4, `${deviations} deviations off`);
      const possible = shares.filter((share) => share > 0.001).length;
      assertGreater(new Set(drawn).size, possible - 1);
    });
  }

  it("follow the seed: with logits apart the draws apart too", () => {
    const flat = Array(64).fill(0);
    // A stream for each seed: near seeds and far ones share nothing.
    const seeds = [1, 2, 3, 2 ** 31, 2 ** 32 + 1, 2 ** 52, 0];
    const drawn = draw(flat, {}, 2000, seeds);
    for (let a = 0; a < seeds.length; a++) {
      const own = drawn.map((row) => row[a]!);
      assert(Math.abs(surprise(own, expected(flat, {}))) < 4);
      for (let b = 0; b < a; b++) {
        const other = drawn.map((row) => row[b]!);
        for (let shift = -3; shift <= 3; shift++) {
          const same = own.filter((x, i) => x === other[i + shift]).length;
          // 1 in 64 by chance: 31 of 2000, give or take 5.5.
          assertLess(same, 31 + 5 * 5.5, `seeds ${seeds[a]} and ${seeds[b]}`);
        }
      }
    }
  });

  it("do not hang on the draw before", () => {
    const flat = Array(8).fill(0);
    const drawn = draw(flat, {}, 20_000).flat();
    const pairs = drawn.slice(1).map((x, i) => 8 * drawn[i]! + x);
    const even = Array(64).fill(1 / 64);
    assert(Math.abs(surprise(pairs, even)) < 4);
  });

  it("repeat with the seed, alone and in a batch", () => {
    const setting = { temperature: 1.2, topK: 30, topP: 0.95 };
    const first = draw(logits, setting, 50, [7]);
    assertEquals(draw(logits, setting, 50, [7]), first);
    assertNotEquals(draw(logits, setting, 50, [8]), first);
    const batch = draw(logits, setting, 50, [3, 7, 11]);
    assertEquals(batch.map((row) => row[1]), first.flat());
    assertNotEquals(batch.map((row) => row[0]), first.flat());
    assertNotEquals(batch.map((row) => row[0]), batch.map((row) => row[2]));
  });

  it("do not depend on threads", async () => {
    const wide = [...random.normals(5000, 3)];
    const own = backend;
    const results = [];
    try {
      for (const threads of [1, 2, 3]) {
        using other = await Backend.open({ device: "cpu", threads });
        backend = other;
        results.push(draw(wide, { topP: 0.9 }, 20, [1, 2, 3, 4, 5]));
      }
    } finally {
      backend = own;
    }
    assertEquals(results[1], results[0]);
    assertEquals(results[2], results[0]);
  });
});

describe("temperature 0", () => {
  it("takes the first of the highest and draws nothing", () => {
    const cases: [number[], number][] = [
      [[1, 3, 3, 2], 1],
      [[0, 0, 0], 0],
      [[-5, -4, -4], 1],
      [[-Infinity, -1e30], 1],
      [[-Infinity, -Infinity], 0],
      [[1, Infinity], 1],
      [[0], 0],
    ];
    for (const [logits, token] of cases) {
      for (const setting of [{}, { topK: 1 }, { topP: 0.5 }, { minP: 0.5 }]) {
        const drawn = draw(logits, { ...setting, temperature: 0 }, 3);
        assertEquals(drawn, [[token], [token], [token]]);
      }
    }
  });

  it("is what a temperature near 0 comes to", () => {
    const logits = [0.5, 2, 1.9, 1.99];
    assertEquals(
      new Set(draw(logits, { temperature: 1e-4 }, 200).flat()),
      new Set([1]),
    );
    assertEquals(
      new Set(draw(logits, { temperature: 1e-38 }, 20).flat()),
      new Set([1]),
    );
  });
});

describe("odd settings", () => {
  it("give some token of the vocabulary", () => {
    const logits = [0, 1, -Infinity, 2];
    const odd = [NaN, Infinity, -Infinity, -1, 1e30, -1e30, 1e-40, 2];
    for (const x of odd) {
      for (const key of ["topK", "topP", "minP"] as const) {
        for (const token of draw(logits, { [key]: x }, 20).flat()) {
          assert([0, 1, 3].includes(token), `${key} ${x} gave ${token}`);
        }
      }
    }
  });

  it("of top-p just above a token's share keep the next as well", () => {
    const logits = [Math.log(0.5), Math.log(0.3), Math.log(0.2)];
    const drawn = (topP: number) => new Set(draw(logits, { topP }, 300).flat());
    assertEquals(drawn(0.49), new Set([0]));
    assertEquals(drawn(0.51).size, 2);
    assertEquals(drawn(0.79).size, 2);
    assertEquals(drawn(0.81).size, 3);
  });

  it("of top-k with ties keep the lower tokens", () => {
    const drawn = draw([1, 1, 1, 1, 0], { topK: 2 }, 300).flat();
    assertEquals(new Set(drawn), new Set([0, 1]));
  });
});
