/** Every row of the table of kernel cases against f64, and what holds beyond numbers. */

import {
  assert,
  assertEquals,
  assertGreaterOrEqual,
  assertLessOrEqual,
  assertThrows,
} from "@std/assert";
import { Backend } from "../src/backend/backend.ts";
import { WkvError } from "../src/backend/error.ts";
import {
  embed,
  gated,
  linear,
  logProb,
  type Norm,
  sample,
} from "../src/backend/ops.ts";
import { blockColumns, isQuantised, Tensor } from "../src/backend/tensor.ts";
import {
  cacheCases,
  cacheTypes,
  casePolicies,
  edgeBudgets,
  groups,
  headDims,
  placements,
  sequenceCounts,
} from "../src/selftest/cache_cases.ts";
import {
  caseName,
  isHuge,
  isLarge,
  kernelCases,
  runCase,
  tinyCases,
} from "../src/selftest/cases.ts";
import { halvesOf, matrix } from "../src/selftest/matrix.ts";
import { selfTest, type WorstFinding } from "../src/selftest/mod.ts";
import { Random, relativeError } from "../src/selftest/numbers.ts";
import { weightTypes, wholeBlocks } from "../src/selftest/op_cases.ts";
import {
  afterAll,
  beforeAll,
  describe,
  it,
  openBackend,
  testDevice,
} from "./device.ts";

let backend: Backend;
beforeAll(async () => {
  backend = await openBackend();
});
afterAll(() => backend?.close());

type Numbers = Float32Array<ArrayBuffer>;
const EPSILON = 1e-5;

describe("the table of kernel cases", () => {
  const parameters = {
    cacheType: cacheTypes,
    headDim: headDims,
    group: groups,
    sequences: sequenceCounts,
    positions: placements,
    policy: casePolicies,
    budget: edgeBudgets,
  };

  it("has at least 300 rows of caches, each once", () => {
    assertGreaterOrEqual(cacheCases.length, 300);
    assertEquals(new Set(kernelCases.map(caseName)).size, kernelCases.length);
  });

  it("holds every pair of values of decode steps", () => {
    const rows = cacheCases.filter(({ kernel }) => kernel === "attend");
    const entries = Object.entries(parameters) as [
      keyof typeof parameters,
      readonly unknown[],
    ][];
    for (const [a, left] of entries) {
      for (const [b, right] of entries.filter(([b]) => b < a)) {
        for (const x of left) {
          for (const y of right) {
            assert(
              rows.some((row) => row[a] === x && row[b] === y),
              `${a} ${x} with ${b} ${y}`,
            );
          }
        }
      }
    }
    assert(rows.some((r) => r.budget > 1 && r.budget === r.sinks + r.recent));
  });
});

describe("each kernel against f64", () => {
  for (const kernel of new Set(kernelCases.map((row) => row.kernel))) {
    it(kernel, async () => {
      const rows = kernelCases.filter((row) => row.kernel === kernel);
      // Of the large ones the CPU, which has no blocks, runs every third, and
      // of the huge ones none.
      let large = 0;
      for (const row of rows) {
        const skip = isHuge(row) || isLarge(row) && large++ % 3 !== 0;
        if (skip && testDevice === "cpu") continue;
        const at = caseName(row);
        let findings;
        try {
          findings = await runCase(backend, row);
        } catch (cause) {
          throw new Error(`${at}: ${cause}`, { cause });
        }
        for (const { quantity, error, limit } of findings) {
          assertLessOrEqual(error, limit, `${at}: ${quantity}`);
        }
      }
    });
  }
});

describe("selfTest()", () => {
  it("names the worst case of each quantity, and what is over its limit", async () => {
    const good = await selfTest(backend, { seconds: 60, rows: tinyCases() });
    assertEquals([good.ok, good.failures], [true, []]);
    assert(good.cases <= 80 && good.cases === good.table);
    const row = kernelCases.find((row) => row.kernel === "linear")!;
    const strict = { ...row, tolerance: 0 };
    const rows = [strict, ...tinyCases()];
    const bad = await selfTest(backend, { seconds: 60, rows });
    assertEquals(bad.ok, false);
    const [{ quantity, ok, case: name }] = bad.worst as [WorstFinding];
    assertEquals([quantity, ok, name], ["linear", false, caseName(strict)]);
  });
});

describe("tensors", () => {
  it("give back what was written, quantised ones as floats", () => {
    const random = new Random(1);
    for (const dtype of weightTypes) {
      if (dtype === "F16" || dtype === "BF16") continue;
      for (const subnormal of [false, true]) {
        const columns = wholeBlocks(dtype, 96);
        using m = matrix(backend, random, dtype, 9, columns, { subnormal });
        for (const [row, count] of [[0, 9], [8, 1], [3, 4]] as const) {
          const expected = m.rows.slice(row, row + count).flatMap((
            r,
          ) => [...r]);
          const error = relativeError(m.tensor.floats(row, count), expected);
          // A sum with a minimum is rounded.
          const limit = halvesOf[dtype]?.[1] === undefined ? 0 : 1e-7;
          assertLessOrEqual(error, limit, dtype);
        }
      }
    }
  });

  it("read and multiply as gguf-py dequantises them", async () => {
    const golden: Record<string, { bytes: string; values: string }> = JSON
      .parse(
        await Deno.readTextFile(
          new URL("golden/blocks.json", import.meta.url),
        ),
      );
    const types = weightTypes.filter(isQuantised);
    assertEquals(Object.keys(golden).sort(), [...types].sort());
    const decode = (text: string) =>
      Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    for (const dtype of types) {
      using tensor = new Tensor(backend, dtype, 3, 256);
      tensor.write(decode(golden[dtype]!.bytes));
      const right = new Float32Array(decode(golden[dtype]!.values).buffer);
      for (let row = 0; row < 3; row++) {
        const found = tensor.floats(row, 1);
        const error = relativeError(
          found,
          right.subarray(row * 256, (row + 1) * 256),
        );
        assertLessOrEqual(error, 2e-7, `${dtype}, row ${row}`);
      }
      // Inputs of one size are 127 in 8 bits: the largest products there are.
      for (const same of [true, false]) {
        const x = new Float32Array(256).map((_, i) => same || i % 3 ? 1 : -1);
        using xs = Tensor.from(backend, x);
        using out = new Tensor(backend, "F32", 1, 3);
        const exact = [0, 1, 2].map((row) =>
          x.reduce((sum, y, i) => sum + y * right[row * 256 + i]!, 0)
        );
        for (const precision of ["f32", "int8"] as const) {
          linear(backend, out, xs, tensor, { rows: 1, precision });
          out.floats().forEach((y, row) => {
            const values = right.subarray(row * 256, (row + 1) * 256);
            const error = Math.abs(y - exact[row]!) /
              values.reduce((sum, v) => sum + Math.abs(v), 1e-30);
            // In f32 256 additions are rounded, in 8 bits those of 8 blocks.
            const limit = precision === "f32" ? 1e-5 : 1e-6;
            assertLessOrEqual(
              error,
              limit,
              `${dtype}, row ${row}, ${precision}`,
            );
          });
        }
      }
    }
  });

  it("refuse a block whose scale is not finite", () => {
    for (const dtype of weightTypes.filter(isQuantised)) {
      for (const place of halvesOf[dtype]!) {
        for (const bits of [0x7c00, 0xfc00, 0x7e00, 0xffff]) {
          const columns = 2 * blockColumns(dtype);
          using tensor = new Tensor(backend, dtype, 2, columns);
          const bytes = new Uint8Array(2 * tensor.rowBytes);
          const at = tensor.rowBytes * 1.5 + place!;
          new DataView(bytes.buffer).setUint16(at, bits, true);
          assertThrows(
            () => tensor.write(bytes),
            WkvError,
            "Row 1: The scale of block 1 is not finite",
          );
        }
      }
    }
  });

  it("have whole blocks of columns", () => {
    for (const dtype of weightTypes.filter(isQuantised)) {
      const block = blockColumns(dtype);
      new Tensor(backend, dtype, 1, block).close();
      assertThrows(
        () => new Tensor(backend, dtype, 1, block + 16),
        WkvError,
        `a multiple of ${block}`,
      );
    }
  });
});

describe("threads", () => {
  it("change no byte of linear, gated and logProb", async () => {
    const random = new Random(7);
    const x = random.normals(40 * 576);
    const weight = random.normals(576);
    const ids = Int32Array.from({ length: 40 }, () => random.integer(1001));
    const bytes = random.normals(1001 * 576);
    const results: Numbers[][] = [];
    for (const threads of [1, 2, 3]) {
      using on = await Backend.open({ device: "cpu", threads });
      using xs = Tensor.from(on, x, 40);
      using norm = Tensor.from(on, weight);
      using targets = Tensor.from(on, ids);
      using w = new Tensor(on, "Q4_1", 1001, 576);
      const packed = new Uint8Array(1001 * w.rowBytes)
        .map((_, i) => bytes[i]! * 50 & 0x3f);
      w.write(packed);
      using out = new Tensor(on, "F32", 40, 1001);
      using logs = new Tensor(on, "F32", 1, 40);
      for (const rows of [1, 3, 40]) {
        for (const precision of ["f32", "int8"] as const) {
          const options = {
            rows,
            norm: { weight: norm, epsilon: EPSILON },
            precision,
          };
          linear(on, out, xs, w, options);
          logProb(on, logs, out, targets, rows);
          const first = [out.floats(), logs.floats()];
          gated(on, out, xs, w, w, options);
          results.push([...first, out.floats()]);
        }
      }
    }
    const each = results.length / 3;
    results.forEach((result, i) => assertEquals(result, results[i % each]));
  });
});

describe("ops on numbers that are none", () => {
  it("embed refuses an id outside the table", () => {
    using table = new Tensor(backend, "F32", 5, 8);
    using out = new Tensor(backend, "F32", 2, 8);
    for (const id of [-1, 5, 2 ** 31 - 1, -(2 ** 31)]) {
      using tokens = Tensor.from(backend, Int32Array.of(0, id));
      assertThrows(
        () => embed(backend, out, table, tokens, { rows: 2 }),
        WkvError,
        "bad data",
      );
    }
  });

  it("sample and logProb refuse NaN logits and ids outside", () => {
    using settings = Tensor.from(backend, Float32Array.of(0, 0, 1, 0));
    using rng = new Tensor(backend, "I32", 1, 4);
    using tokens = new Tensor(backend, "I32", 1, 1);
    using logits = Tensor.from(backend, Float32Array.of(1, NaN, 3));
    assertThrows(
      () => sample(backend, tokens, logits, settings, rng),
      WkvError,
      "bad data",
    );
    using out = new Tensor(backend, "F32", 1, 1);
    for (const id of [-1, 3, 2 ** 31 - 1]) {
      using targets = Tensor.from(backend, Int32Array.of(id));
      assertThrows(
        () => logProb(backend, out, logits, targets, 1),
        WkvError,
        "bad data",
      );
    }
  });

  it("linear and gated hide no NaN and no Infinity", () => {
    const norm: Norm = {
      weight: Tensor.from(backend, new Float32Array(256).fill(1)),
      epsilon: EPSILON,
    };
    using _ = norm.weight;
    const random = new Random(3);
    for (const dtype of weightTypes) {
      for (const precision of ["f32", "int8"] as const) {
        for (const bad of [NaN, Infinity]) {
          const x = random.normals(2 * 256);
          x[270] = bad;
          using xs = Tensor.from(backend, x, 2);
          using w = matrix(backend, random, dtype, 3, 256);
          using out = new Tensor(backend, "F32", 2, 3);
          const at = `${dtype}, ${precision}, ${bad}`;
          const finite = () => out.floats(1, 1).some(Number.isFinite);
          linear(backend, out, xs, w.tensor, { rows: 2, precision });
          assert(!finite(), `linear, ${at}`);
          assert(out.floats(0, 1).every(Number.isFinite), `linear, ${at}`);
          gated(backend, out, xs, w.tensor, w.tensor, {
            rows: 2,
            norm,
            precision,
          });
          assert(!finite(), `gated, ${at}`);
        }
      }
    }
  });
});
