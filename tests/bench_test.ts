/** `wkv bench` on the CPU with tiny shapes: every op gives a figure, caches are full, files say how they came about. */

import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertGreater,
  assertMatch,
  assertRejects,
} from "@std/assert";
import { describe, it } from "@std/testing/bdd";
import { plannedShape, stepCost } from "../bench/arithmetic.ts";
import { writeDocs } from "../bench/scale_report.ts";
import { benchDecode } from "../bench/decode.ts";
import { benchKernels, kernelOps } from "../bench/kernels.ts";
import { measureMemory, type Memory } from "../bench/memory.ts";
import {
  randomModel,
  RandomRows,
  type WeightType,
} from "../bench/random_model.ts";
import { type ShapeName, shapeNames, shapeOf } from "../bench/shapes.ts";
import { student } from "../bench/student.ts";
import { median, quantile, timeGraph } from "../bench/timing.ts";
import { LibraryCopy } from "./isolated.ts";
import { Backend } from "../src/backend/backend.ts";
import { sourceHash } from "../src/backend/build.ts";
import { findCpuLibrary } from "../src/backend/library.ts";
import { blockColumns, dtypes, Tensor } from "../src/backend/tensor.ts";
import { caseName, kernelCases } from "../src/selftest/cases.ts";
import {
  attendCase,
  type AttendSetting,
  defaultSetting,
  peerSizes,
} from "../src/selftest/model_cases.ts";
import { Session } from "../src/session.ts";
import { execute, expectErrors, ok, ROOT } from "./cli_process.ts";
import { loadTiny } from "./tiny_model.ts";

const memory: Memory = {
  kind: "read",
  bytesPerSecond: 1e10,
  cacheBytes: 1 << 20,
};

const types = dtypes.filter((dtype): dtype is WeightType => dtype !== "I32");

/** Rows of a command's JSON lines. */
function parse(stdout: string): Record<string, unknown>[] {
  return stdout.trim().split("\n").map((line) => JSON.parse(line));
}

/** Whether these fields are numbers above zero. */
function assertPositive(row: object, ...names: string[]): void {
  const fields: Record<string, unknown> = { ...row };
  for (const name of names) {
    const value = fields[name];
    assert(
      typeof value === "number" && value > 0 && Number.isFinite(value),
      `${name} is ${value} in ${JSON.stringify(row)}`,
    );
  }
}

describe("timing", () => {
  it("finds quantiles", () => {
    assertEquals(median([3, 1, 2]), 2);
    assertEquals(median([4, 1, 2, 3]), 2.5);
    assertEquals(quantile([0, 10], 0.9), 9);
    assertEquals(quantile([7], 0.99), 7);
  });

  it("runs a graph until a sample is long enough, preparing each", async () => {
    using backend = await Backend.open({ device: "cpu" });
    let prepared = 0;
    using graph = backend.record(() => {});
    const { times, samples } = await timeGraph(graph, {
      repeats: 3,
      least: 1,
      most: 5,
      before: () => void prepared++,
    });
    assert(times >= 1 && times <= 5);
    assertEquals(samples.length, 3);
    assertEquals(prepared, 7);
  });
});

describe("random weights", () => {
  it("are finite in every type, of one deviation, and differ from row to row", async () => {
    using backend = await Backend.open({ device: "cpu" });
    const rows = new RandomRows();
    for (const dtype of types) {
      const columns = Math.max(64, blockColumns(dtype));
      using tensor = new Tensor(backend, dtype, 300, columns);
      rows.fill(tensor);
      if (dtype === "F16" || dtype === "BF16") continue; // not read as floats
      const values = tensor.floats();
      assert(values.every(Number.isFinite), dtype);
      const mean = values.reduce((sum, x) => sum + x, 0) / values.length;
      const squares = values.reduce((sum, x) => sum + x * x, 0);
      const deviation = Math.sqrt(squares / values.length);
      // Q4_0 reaches from -8 to 7 of its scale, a little to the left.
      assert(Math.abs(mean) < 0.003, `${dtype}: mean ${mean}`);
      assert(Math.abs(deviation - 0.02) < 0.002, `${dtype}: ${deviation}`);
      const row = (r: number) => values.slice(r * columns, (r + 1) * columns);
      assert(row(0).join() !== row(1).join());
    }
  });

  it("make a model whose steps are those of its layers, in every type", async () => {
    // The tiny model's rows are no whole blocks of 256.
    for (const dtype of types.filter((dtype) => blockColumns(dtype) <= 32)) {
      const backend = await Backend.open({ device: "cpu" });
      using model = await randomModel(backend, "tiny", dtype);
      const { config } = shapeOf("tiny");
      const matrices = config.layers * (64 * (128 + 64) + 3 * 96 * 64) +
        2 * 256 * 64;
      const bytes = new Tensor(backend, dtype, 1, 32).rowBytes / 32 * matrices;
      const norms = 4 * 64 * (2 * config.layers + 1);
      assertEquals(model.weightBytes, bytes + norms);
      assertEquals(
        model.network.stepBytes,
        bytes + norms - bytes / matrices * 256 * 64,
      );
      using cache = model.createCache({ budget: 16 });
      using session = new Session(model, cache);
      session.setSampler({});
      await session.advance(20);
      assertEquals(cache.stats().kept, 16);
      assertGreater(cache.stats().merged, 0);
    }
  });

  it("have the shapes of real models", () => {
    assertEquals(shapeNames.length, 4);
    const { config, tied } = shapeOf("smollm2-135m");
    assert(tied);
    assertEquals(config.rope.frequencies.length, 32);
    assertEquals(shapeOf("llama-3-8b").config.hidden, 14336);
  });
});

describe("benchKernels", () => {
  it("times every op, on full caches that merged, under every policy's name", async () => {
    await using copy = await LibraryCopy.make();
    using backend = await Backend.open({ library: copy.path });
    const before = backend.liveHandles;
    const seen = new Set<string>();
    for await (
      const row of benchKernels(backend, memory, {
        shapes: "tiny",
        ops: ["all"],
        budgets: [16, 24],
        batches: [1, 3],
        policies: ["weighted-kv", "streaming-llm", "full"],
        cacheType: "bf16",
        positions: "cache",
        dtypes: ["BF16", "Q4_1"],
        activations: "int8",
        rows: [8],
        repeats: 2,
        least: 0.5,
        workingSet: 1 << 16,
      })
    ) {
      seen.add(row.op);
      assertPositive(row, "us", "usLow", "usHigh", "bytes", "gbps", "share");
      assertPositive(row, "copies", "times", "batch");
      assert(row.usLow <= row.us && row.us <= row.usHigh);
      assertEquals(row.samples.length, 2);
      if (row.op !== "attend" && row.op !== "chunk") continue;
      // A full one is timed around its budget: it has room for more tokens.
      assertEquals(
        row.kept,
        row.policy === "full" ? row.budget! / 2 : row.budget,
      );
      assertEquals((row.merged ?? 0) > 0, row.policy === "weighted-kv");
      assertEquals((row.evicted ?? 0) > 0, row.policy === "streaming-llm");
      // Keys and values of 2 heads, 16 dimensions, 2 bytes, and 16 of state.
      if (row.op === "attend" && row.policy !== "full") {
        assertEquals(row.bytes, row.batch * 2 * row.budget! * (2 * 32 + 16));
        assert(row.copies * row.bytes >= 1 << 16);
      }
    }
    assertEquals(
      [...seen].sort(),
      kernelOps.filter((op) => op !== "all" && op !== "linear").sort(),
    );
    assertEquals(backend.liveHandles, before);
  });

  it("times rows of the table of kernel cases", async () => {
    const table = new Set(kernelCases.map(caseName));
    const has = (name: ShapeName, setting: Partial<AttendSetting>) => {
      const { config } = shapeOf(name);
      const row = attendCase(config, { ...defaultSetting, ...setting });
      assert(table.has(caseName(row)), caseName(row));
    };
    for (const name of shapeNames) if (name !== "tiny") has(name, {});
    const { cacheType, budgets, batches } = peerSizes;
    for (const budget of budgets) {
      for (const batch of batches) {
        has("llama-3-8b", { cacheType, budget, batch });
      }
    }
    using backend = await Backend.open({ device: "cpu" });
    const run = async (
      options: { shapes: ShapeName; op: string; budget: number },
    ) => {
      for await (
        const row of benchKernels(backend, memory, {
          ...options,
          ops: [options.op],
          budgets: [options.budget],
          batches: [1],
          policies: [defaultSetting.policy],
          cacheType: defaultSetting.cacheType,
          positions: defaultSetting.positions,
          dtypes: ["BF16"],
          activations: "int8",
          rows: [8],
          repeats: 1,
          least: 0.1,
          workingSet: 1,
        })
      ) return row;
    };
    const { budget } = defaultSetting;
    const cases = [
      [{ shapes: "smollm2-135m", op: "attend", budget }, true],
      [{ shapes: "smollm2-135m", op: "attend", budget: 999 }, false],
      [{ shapes: "smollm2-135m", op: "head", budget }, true],
      [{ shapes: "smollm2-135m", op: "gated", budget }, false],
      [{ shapes: "llama-3-8b", op: "output", budget }, true],
    ] as const;
    for (const [options, checked] of cases) {
      const row = (await run(options))!;
      assertEquals(row.checked, checked, row.case);
      assertEquals(table.has(row.case!), checked);
    }
  });

  it("refuses ops that it does not know", async () => {
    using backend = await Backend.open({ device: "cpu" });
    const options = { ops: ["atend"], shapes: "tiny" } as never;
    await assertRejects(
      () => benchKernels(backend, memory, options).next(),
      RangeError,
      'Unknown op "atend"',
    );
  });
});

describe("benchDecode", () => {
  it("times steps and prompts of a real model, behind a full cache", async () => {
    using model = await loadTiny();
    const rows = [];
    for await (
      const row of benchDecode(model, memory, {
        policies: ["weighted-kv", "full"],
        budgets: [16, 24],
        cache: { cacheType: "f32" },
        batches: [1, 2],
        tokens: 8,
        prompts: [20],
        prefill: "chunk:4",
        repeats: 2,
      })
    ) rows.push(row);
    const kinds = rows.map(({ test, policy, budget, batch }) =>
      `${test} ${policy} ${budget} ${batch}`
    );
    const one = (policy: string, budget: number | null) => [
      `prefill ${policy} ${budget} 1`,
      `decode ${policy} ${budget} 1`,
      `decode ${policy} ${budget} 2`,
    ];
    assertEquals(kinds, [
      ...one("weighted-kv", 16),
      ...one("weighted-kv", 24),
      ...one("full", null),
    ]);
    for (const row of rows) {
      assertPositive(row, "ms", "tokensPerSecond", "tokens", "weightBytes");
      assertEquals(row.seen, row.kept + row.merged + row.evicted);
      if (row.test === "prefill") {
        assertEquals(row.samples.length, 2);
        assertEquals(row.seen, 21 - 1);
        continue;
      }
      assertPositive(row, "ms10", "ms90", "ms99", "deviceMs", "bytes", "gbps");
      assertEquals(row.samples.length, 8);
      assertEquals(row.seen, row.depth + 4 + 8);
      if (row.policy === "weighted-kv") {
        assertEquals(row.kept, row.budget);
        assertGreater(row.merged, 0);
      }
    }
  });
});

describe("wkv bench", () => {
  it("prints kernels as JSON lines, and records them with their frame", async () => {
    const file = await Deno.makeTempFile();
    try {
      const { stdout } = await ok([
        ...["bench", "kernels", "--device", "cpu", "--shapes", "tiny"],
        ...["--op", "attend,gated", "--budget", "16", "--cache-type", "bf16"],
        ...["--dtype", "Q8_0", "--working-set", "1", "--repeats", "2"],
        ...["--quick", "--json", "--record", file],
      ]);
      const [first, ...rows] = parse(stdout);
      assertEquals(first!.test, "memory");
      assertEquals(rows.map(({ op }) => op), ["attend", "gated"]);
      assertPositive(rows[0]!, "us", "merged", "copies");
      const result = JSON.parse(await Deno.readTextFile(file));
      assertEquals(result.rows, [first, ...rows]);
      assertEquals(result.library, "cpu");
      assertEquals(result.kernels, await sourceHash("cpu"));
      assert(result.command.startsWith("wkv bench kernels"));
    } finally {
      await Deno.remove(file);
    }
  });

  it("records the hash that the measured library has", async () => {
    const folder = await Deno.makeTempDir();
    const [file, path] = [`${folder}/record.json`, `${folder}/library.so`];
    const other = "0123456789abcdef".repeat(4);
    try {
      const bytes = await Deno.readFile((await findCpuLibrary()).path);
      const text = new TextDecoder("latin1").decode(bytes);
      const at = text.indexOf(await sourceHash("cpu"));
      assertGreater(at, 0);
      bytes.set(new TextEncoder().encode(other), at);
      await Deno.writeFile(path, bytes);
      await ok([
        ...["bench", "kernels", "--device", "cpu", "--shapes", "tiny"],
        ...["--op", "norm", "--working-set", "1", "--repeats", "2"],
        ...["--quick", "--record", file],
      ], { env: { WKV_LIB_CPU: path } });
      const result = JSON.parse(await Deno.readTextFile(file));
      assertEquals(result.kernels, other);
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
  });

  it("prints a table of a model's steps", async () => {
    const { stdout } = await ok([
      ...["bench", "decode", "--device", "cpu", "--shapes", "tiny"],
      ...["--budget", "16", "--batch", "1,2", "--tokens", "8", "--quick"],
    ]);
    const lines = stdout.trim().split("\n");
    assertEquals(lines.length, 4, stdout);
    assert(lines[1]!.includes("host ms"), stdout);
    assert(lines[2]!.includes("tiny BF16, random"), stdout);
  });

  it("says what is wrong with its options", async () => {
    const kernels = ["bench", "kernels"];
    const decode = ["bench", "decode"];
    await expectErrors([
      { args: ["bench"], code: 2, says: ["kernels or decode"] },
      { args: ["bench", "all"], code: 2, says: ['found "all"'] },
      { args: [...kernels, "--depth", "3"], code: 2, says: ["no --depth"] },
      { args: [...decode, "--op", "attend"], code: 2, says: ["no --op"] },
      { args: [...kernels, "--model", "x"], code: 2, says: ["not --model"] },
      { args: [...kernels, "--dtype", "Q3"], code: 2, says: ['found "Q3"'] },
      { args: [...decode, "--dtype", "F16"], code: 2, says: ["--shapes"] },
      { args: [...decode, "--policy", "x"], code: 2, says: ["Unknown policy"] },
      {
        args: [...decode, "--shapes", "tiny", "--model", "x"],
        code: 2,
        says: ["not both"],
      },
    ]);
  });
});

describe("a script of bench/", () => {
  for (const name of ["cpu", "figures", "gpu", "scale", "tables"]) {
    it(`says what it takes, and runs nothing: ${name}.ts --help`, async () => {
      const { code, stdout } = await execute(Deno.execPath(), [
        ...["run", "-A", "--no-prompt", `bench/${name}.ts`, "--help"],
      ]);
      assertEquals(code, 0);
      const command = `deno (task bench:${name}|run -A bench/${name}\\.ts) `;
      assertMatch(stdout, new RegExp(`^[A-Z][^*]+\n\n  ${command}`));
    });
  }
});

describe("bench/tables.ts", () => {
  it("knows Student's 97.5% quantile for any number of windows", () => {
    const table = [[1, 12.7062], [2, 4.3027], [5, 2.5706], [11, 2.201]];
    for (const [freedom, t] of [...table, [39, 2.0227], [79, 1.9905]]) {
      assertAlmostEquals(student(freedom!), t!, 1e-4);
    }
  });

  const tables = async (...args: string[]) => {
    const { code, stdout } = await execute(Deno.execPath(), [
      ...["run", "-A", "--no-prompt", "bench/tables.ts", ...args],
    ]);
    assertEquals(code, 0);
    return stdout.split("\n").filter((line) => line.startsWith("|"));
  };

  it("counts the windows of several files together with --pool, for rules of all of them", async () => {
    const windows = (...windowNll: number[]) => ({
      windowNll,
      windowTargets: windowNll.map(() => 1),
      picked: windowNll.map((_, window) => window),
      perplexity: Math.exp(windowNll[0]!),
    });
    const host = { host: "E", hostPositions: "cache", bound: 50 };
    const file = (full: number, e: number, rule: number, more = false) => [
      { rule: "full", positions: "cache", ...windows(full, full) },
      { rule: "E", positions: "cache", ...windows(e, e) },
      { rule: "x", positions: "text", ...host, ...windows(rule, rule) },
      ...(more
        ? [{ rule: "y", positions: "text", ...host, ...windows(e, e) }]
        : []),
    ];
    const folder = await Deno.makeTempDir();
    try {
      const [a, b] = [`${folder}/a.json`, `${folder}/b.json`];
      const ln = Math.log;
      const write = (path: string, rows: unknown) =>
        Deno.writeTextFile(path, JSON.stringify({ rows }));
      await write(a, file(ln(2), ln(4), ln(3), true));
      await write(b, file(ln(8), ln(16), ln(12)));
      const [row, ...others] = await tables(a, b, "--pool");
      assertEquals(others, []);
      // Perplexities are the roots of 2 · 8, 4 · 16 and 3 · 12: g = (8 - 6) / (8 - 4).
      assertMatch(row!, /^\| x \| text, cache \| 4 \| 6\.00, 8\.00 \|/);
      assertMatch(row!, /\| \+50\.0% \[.+\] \| 50% \| undecided \|$/);
      const beside = await tables(a, "--against", "x, text");
      assertEquals(beside.length, 1);
      assertMatch(beside[0]!, /^\| y \| text, text \| 2 \| 4\.00, 3\.00 \|/);
      assertMatch(beside[0]!, /\| -100\.0% \[-100\.0, -100\.0\] \|$/);
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
  });
});

describe("bench/gpu.ts", () => {
  it("keeps what ran, and says what did not", async () => {
    const file = await Deno.makeTempFile();
    try {
      const { success, stdout } = await new Deno.Command(Deno.execPath(), {
        args: [
          ...["run", "-A", "--no-prompt", "bench/gpu.ts", "--device", "cpu"],
          ...["--shapes", "tiny", "--quick", "--out", file],
          ...["--model", "missing.gguf"],
        ],
        cwd: ROOT,
        stderr: "null",
      }).output();
      assert(success);
      const result = JSON.parse(await Deno.readTextFile(file));
      assertEquals(result.attention.length, 4);
      for (const row of result.attention) {
        assertEquals(row.policy, "weighted-kv");
        assertPositive(row, "us", "full");
        assert(Math.abs(row["over full"] - (row.us - row.full)) < 0.002);
      }
      assertEquals(result.decode.length, 2);
      assertEquals(
        result.prefill.map((row: { tokens: number }) => row.tokens),
        [32, 64],
      );
      for (const row of result.prefill) {
        assertPositive(row, "ms");
        assertEquals(row.activations, "half");
        assertEquals(row["transformers SDPA"], null);
      }
      const { ceiling } = result;
      assertPositive(ceiling, "bytesPerSecond");
      assertEquals(ceiling.bytesPerSecond, ceiling.cores);
      for (const { us, share } of result.attention) {
        const row = result.rows.find((row: { us?: number }) =>
          row.us !== undefined && Number(row.us.toFixed(3)) === us
        );
        assertAlmostEquals(share, row.gbps * 1e9 / ceiling.bytesPerSecond);
      }
      assertEquals(result.missing, [
        "Peers attention, gptfast, transformers left out: they need a GPU",
        "file ended with 2",
      ]);
      const text = new TextDecoder().decode(stdout);
      assert(text.includes("ours/cudnn"), text);
      assertMatch(text, /^Shares are of \d+ GB\/s, all cores reading$/m);
    } finally {
      await Deno.remove(file);
    }
  });

  it("leaves out what there is no time for", async () => {
    const file = await Deno.makeTempFile();
    try {
      const { success } = await new Deno.Command(Deno.execPath(), {
        args: [
          ...["run", "-A", "--no-prompt", "bench/gpu.ts", "--device", "cpu"],
          ...["--shapes", "tiny", "--peers", "", "--out", file],
          ...["--seconds", "0"],
        ],
        cwd: ROOT,
        stderr: "null",
      }).output();
      assert(success);
      const result = JSON.parse(await Deno.readTextFile(file));
      assertEquals(result.rows, []);
      assertEquals(
        result.missing,
        ["attend", "long", "model", "prefill", "linear", "policies"].map((
          name,
        ) => `${name} was left out: 0 s were over`),
      );
    } finally {
      await Deno.remove(file);
    }
  });
});

describe("bench/scale.ts", () => {
  const scale = async (...args: string[]) => {
    const { success, stdout } = await new Deno.Command(Deno.execPath(), {
      args: ["run", "-A", "--no-prompt", "bench/scale.ts", ...args],
      cwd: ROOT,
      stderr: "null",
    }).output();
    assert(success, args.join(" "));
    return new TextDecoder().decode(stdout);
  };

  it("measures every part beside its arithmetic, and draws it", async () => {
    const folder = await Deno.makeTempDir();
    try {
      const out = `${folder}/scale.json`;
      await scale(
        ...["--device", "cpu", "--shapes", "tiny", "--quick"],
        ...["--out", out, "--draw", folder],
      );
      const { rows, missing } = JSON.parse(await Deno.readTextFile(out));
      assertEquals(missing, []);
      const parts = ["depth", "budget", "batch", "heads", "layers", "memory"];
      assertEquals(
        [...new Set(rows.map(({ part }: { part: string }) => part))],
        parts,
      );
      for (const row of rows) {
        if (row.part === "memory") {
          // One of a kind each: none is an estimate of the other.
          assertEquals(row.cache, row.cachePlanned);
          assertPositive(row, "weights", "total", "totalPlanned");
          continue;
        }
        assertPositive(row, "ms", "deviceMs", "bytes", "operations", "kept");
        // A full cache has taken the steps that warm up as well.
        assertEquals(row.kept, row.budget ?? row.depth + 4);
      }
      for (const name of parts) {
        const svg = await Deno.readTextFile(`${folder}/${name}.svg`);
        assert(svg.startsWith("<svg") && !svg.includes("NaN"), name);
      }
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
  });

  it("counts weights and steps as a model of random weights has them", async () => {
    for (const dtype of ["BF16", "Q8_0"] as const) {
      const backend = await Backend.open({ device: "cpu" });
      using model = await randomModel(backend, "tiny", dtype);
      assertEquals(plannedShape("tiny", dtype).weights, model.weightBytes);
      using cache = model.createCache({ budget: 32, sequences: 3 });
      const { bytes, operations } = stepCost(
        model.config,
        model.network.stepBytes,
        "f16",
        32,
        3,
      );
      // 2 KV heads of 2 layers, 16 bytes of state a token.
      const states = 3 * 2 * 2 * 32 * 16;
      assertEquals(
        bytes,
        model.network.stepBytes + 3 * cache.fullBytes(32) + states,
      );
      // Every matrix number once for each of three rows, and 4 heads of 16.
      const numbers = 2 * (8 * 16 + 64 + 3 * 96) * 64 + 256 * 64;
      assertEquals(operations, 6 * numbers + 3 * 2 * 32 * 4 * 16 * 4);
    }
  });

  it("wrote the tables and charts of docs/scale.md", async () => {
    const folder = await Deno.makeTempDir();
    try {
      const text = await Deno.readTextFile(`${ROOT}/docs/scale.md`);
      const path = /bench\/results\/[\w.-]+\.json/.exec(text)![0];
      const copy = new URL(`file://${folder}/scale.md`);
      const empty = text.replace(
        /(<!-- (\w+) -->).*?(?=<!-- end of \2)/gs,
        "$1",
      );
      assert(empty.length < text.length / 2);
      await Deno.writeTextFile(copy, empty);
      const result = JSON.parse(await Deno.readTextFile(`${ROOT}/${path}`));
      await writeDocs(copy, path, result);
      assertEquals(await Deno.readTextFile(copy), text);
      for await (const { name } of Deno.readDir(`${folder}/scale`)) {
        assertEquals(
          await Deno.readTextFile(`${folder}/scale/${name}`),
          await Deno.readTextFile(`${ROOT}/docs/scale/${name}`),
          `deno task bench:scale --only docs --out ${path}`,
        );
      }
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
  });

  it("tells what fits without a device", async () => {
    const text = await scale("--only", "fits");
    assert(text.includes("| llama-3-8b | BF16, 16.06 GB |"), text);
    assertEquals(
      text.split("\n").filter((line) => line.startsWith("|")).length,
      49,
    );
  });
});

describe("measureMemory", () => {
  it("gives figures, or says why not", async () => {
    const { bytesPerSecond, note } = await measureMemory("cpu");
    assert(note !== undefined || (bytesPerSecond ?? 0) > 1e9);
    const gpu = await measureMemory("cuda");
    const { loads, bulk, copy } = gpu;
    const read = Math.max(loads ?? 0, bulk ?? 0);
    assertEquals(gpu.kind, read > 0 ? "read" : "copy");
    assertEquals(gpu.bytesPerSecond, read || copy);
    if (gpu.bytesPerSecond === null) assertMatch(gpu.note!, /; no read/);
  });
});
