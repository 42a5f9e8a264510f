/**
 * Checks the CUDA library on a machine with a GPU: every kernel case against
 * f64, long runs and the default model beside the CPU library, the memory that
 * a long prompt takes, how soon Ctrl-C ends a run, and the tests that take a
 * device. About ten minutes on 16 cores and a GPU with nothing else on it.
 *
 *   deno run -A tests/cuda_check.ts
 *     [--only table,long,model,prefill,interrupt,tests] [--small] [--model FILE]
 *     [--part 1/12] [--steps 1500] [--tokens 64] [--rows 32768] [--device cuda]
 *
 * Prints one JSON line a check; `error` is relative unless its name says
 * otherwise, `limit` what it must stay below. The last line has the number of
 * failures; there are none when it exits with 0. `--small` runs a few tiny
 * cases and nothing else, for compute-sanitizer (sanitize_cuda.ts).
 * `--part 3/12` takes every twelfth case of the table from the third on: twelve
 * processes side by side check it in 80 s, one in seven minutes.
 * `--device cpu` checks the CPU library, to test this script.
 */

import { parseArgs } from "@std/cli/parse-args";
import { Backend } from "../src/backend/backend.ts";
import { Tensor } from "../src/backend/tensor.ts";
import type { KvCache } from "../src/cache/cache.ts";
import type { CacheOptions } from "../src/cache/layout.ts";
import { policyNames } from "../src/cache/registry.ts";
import { DEFAULT_MODEL } from "../src/hub/models.ts";
import { loadModel, type Model } from "../src/model.ts";
import {
  type KernelCase,
  kernelCases,
  tinyCases,
} from "../src/selftest/cases.ts";
import { type Layer, openCache, qkvWidth } from "../src/selftest/layer.ts";
import { selfTest } from "../src/selftest/mod.ts";
import { modelShapes } from "../src/selftest/model_cases.ts";
import { Random, relativeError } from "../src/selftest/numbers.ts";
import { Session } from "../src/session.ts";
import { denoArguments } from "./cli_process.ts";

const args = parseArgs(Deno.args, {
  string: ["only", "model", "part", "steps", "tokens", "rows", "device"],
  boolean: ["small"],
  default: {
    only: "",
    model: DEFAULT_MODEL,
    part: "1/1",
    steps: "1500",
    tokens: "64",
    rows: "32768",
    device: "cuda",
    small: false,
  },
}) as unknown as {
  only: string;
  model: string;
  part: string;
  steps: string;
  tokens: string;
  rows: string;
  device: "cuda" | "cpu";
  small: boolean;
};
const { device } = args;
const steps = Number(args.steps), newTokens = Number(args.tokens);
const promptRows = Number(args.rows);
const [part, parts] = args.part.split("/").map(Number);
if (!(Number.isInteger(part) && part! >= 1 && part! <= parts!)) {
  throw new TypeError(
    `--part must be one of so many, as 3/12: current value is "${args.part}"`,
  );
}

// ---- report ----

let checks = 0, failures = 0;

/** Prints a check; `ok` decides where there is no limit. */
function print(op: string, facts: Record<string, unknown>): void {
  checks++;
  const { error, limit } = facts as { error?: number; limit?: number };
  const ok = facts.ok ??
    (error === undefined || limit === undefined || error <= limit);
  if (!ok) failures++;
  console.log(JSON.stringify({ op, ok, ...facts }, (_, value) => {
    if (typeof value !== "number" || Number.isFinite(value)) return value;
    return String(value);
  }));
}

/** Runs a check; what it throws is a failure. */
async function attempt(
  op: string,
  facts: Record<string, unknown>,
  body: () => Record<string, unknown> | Promise<Record<string, unknown>>,
): Promise<void> {
  try {
    print(op, { ...facts, ...await body() });
  } catch (error) {
    print(op, { ...facts, ok: false, thrown: String(error) });
  }
}

// ---- the table ----

/** Every case; a line for each that is over its limit, and one for the worst of each quantity. */
async function checkTable(): Promise<void> {
  const rows = (args.small ? tinyCases() : kernelCases)
    .filter((_, i) => i % parts! === part! - 1);
  {
    using gpu = await Backend.open({ device });
    await checkRows(gpu, "table", rows);
  }
  // Chains of small weights, too, in the launch that large ones get.
  Deno.env.set("WKV_CUDA_GRID_MB", "0");
  using gpu = await Backend.open({ device });
  Deno.env.delete("WKV_CUDA_GRID_MB");
  await checkRows(gpu, "chains", rows.filter((row) => row.kernel === "chain"));
}

async function checkRows(
  gpu: Backend,
  op: string,
  rows: readonly KernelCase[],
): Promise<void> {
  const result = await selfTest(gpu, {
    seconds: Infinity,
    rows,
    onCase: (name, findings) => {
      for (const { quantity, error, limit } of findings) {
        if (!(error <= limit)) {
          print("case", { quantity, error, limit, case: name });
        }
      }
    },
  });
  for (const failure of result.failures) {
    print("case", { ok: false, ...failure });
  }
  for (const finding of result.worst) print("worst", { ...finding });
  const { cases, seconds } = result;
  print(op, { ok: result.ok, cases, seconds });
}

// ---- long runs beside the CPU ----

/**
 * Steps of one layer on both libraries, the second being told the victims of
 * the first; in the end both hold the same tokens.
 */
function longRun(
  both: readonly [Backend, Backend],
  layer: Layer,
  options: CacheOptions,
): Record<string, unknown> {
  const { kvHeads } = layer;
  const caches = both.map((b) => openCache(b, layer, options)) as [
    KvCache,
    KvCache,
  ];
  const inputs = both.map((b) => new Tensor(b, "F32", 1, qkvWidth(layer)));
  const outs = both.map((b) =>
    new Tensor(b, "F32", 1, layer.heads * layer.headDim)
  );
  const victims = new Tensor(both[1], "I32", 1, kvHeads);
  const kept: number[][] = Array.from({ length: kvHeads }, () => []);
  const random = new Random(steps);
  let error = 0;
  for (let step = 0; step < steps; step++) {
    const sharpness = [0.3, 1, 3][Math.floor(step / 50) % 3]!;
    const row = random.qkv(layer, 1, sharpness);
    inputs.forEach((input) => input.write(row));
    const full = step >= caches[0].capacity;
    caches[0].attend(0, outs[0]!, inputs[0]!);
    const events = full ? caches[0].events() : [];
    victims.write(Int32Array.from(kept, (list, head) => {
      list.push(step);
      if (!full) return -1;
      const rank = list.indexOf(events[head]!.from);
      list.splice(rank, 1);
      return rank;
    }));
    caches[1].attend(0, outs[1]!, inputs[1]!, victims);
    const found = relativeError(outs[1]!.floats(), outs[0]!.floats());
    if (!(found <= error)) error = found;
  }
  let score = 0, values = 0, same = true;
  for (let head = 0; head < kvHeads; head++) {
    const [x, y] = caches.map((cache) => cache.rows(0, head));
    same &&= `${x!.kept} ${x!.steps}` === `${y!.kept} ${y!.steps}`;
    score = Math.max(score, relativeError(y!.score, x!.score));
    values = Math.max(
      values,
      relativeError(caches[1].values(0, head), caches[0].values(0, head)),
    );
  }
  for (const one of [...caches, ...inputs, ...outs, victims]) one.close();
  const limit = { f32: 1e-5, f16: 1e-3, bf16: 8e-3 }[options.cacheType!];
  return {
    ok: same && error <= limit && score <= Math.max(limit, 1e-4) &&
      values <= limit,
    same,
    error,
    limit,
    score,
    values,
  };
}

async function checkLong(): Promise<void> {
  using cpu = await Backend.open({ device: "cpu" });
  using gpu = await Backend.open({ device });
  const layer: Layer = { heads: 9, kvHeads: 3, headDim: 64 };
  for (const policy of policyNames()) {
    for (const cacheType of ["f32", "f16", "bf16"] as const) {
      const options: CacheOptions = {
        policy,
        cacheType,
        // An event tells one victim of a step: of more that leave at once the tests of steps take care.
        ...policy === "full"
          ? { capacity: steps }
          : { budget: 64, interval: 1 },
      };
      await attempt(
        "long run",
        { ...options, steps },
        () => longRun([cpu, gpu], layer, options),
      );
    }
  }
}

// ---- the model ----

async function checkModel(): Promise<void> {
  const prompt =
    "The old lighthouse keeper climbed the stairs every evening and looked at the sea. One night";
  for (const activations of ["f32", "int8"] as const) {
    const models = await Promise.all(
      ["cpu", device].map((d) =>
        loadModel(args.model!, {
          device: d as "cpu",
          activations,
          offline: true,
        })
      ),
    );
    const ids = await models[0]!.tokenizer.encode(prompt.repeat(12));
    const cacheType = activations === "f32" ? "f32" as const : "f16" as const;
    for (
      const options of [
        { policy: "full", capacity: 600 },
        { policy: "weighted-kv", budget: 64 },
        { policy: "weighted-kv-ward", budget: 64 },
        { policy: "streaming-llm", budget: 64 },
      ]
    ) {
      await attempt(
        "model logits",
        { activations, cacheType, ...options },
        async () => {
          const caches = models.map((m) =>
            m.createCache({ ...options, cacheType })
          );
          const sessions = models.map((m, i) => new Session(m, caches[i]!));
          let error = 0, sum = 0, same = 0, count = 0;
          const tokens = ids.slice(0, 120);
          for (const id of tokens) {
            const logits = await Promise.all(
              sessions.map((s) => s.logits(Int32Array.of(id))),
            );
            const found = relativeError(logits[1]!, logits[0]!);
            error = Math.max(error, found);
            sum += found;
            if (argmax(logits[0]!) === argmax(logits[1]!)) same++;
            count++;
          }
          const equal = overlapOf(
            caches as [KvCache, KvCache],
            models[0]!.config.layers,
            models[0]!.config.kvHeads,
          );
          sessions.forEach((s) => s.close());
          caches.forEach((c) => c.close());
          return {
            ok: sum / count <= (activations === "f32" ? 1e-3 : 0.1),
            error,
            mean: sum / count,
            sameArgmax: `${same}/${count}`,
            ...equal,
          };
        },
      );
      await attempt(
        "model greedy",
        { activations, cacheType, ...options },
        async () => {
          const texts: string[] = [],
            rates: number[] = [],
            prefills: number[] = [];
          for (const model of models) {
            const cache = model.createCache({ ...options, cacheType });
            const session = new Session(model, cache);
            session.setSampler({ temperature: 0 });
            const begin = performance.now();
            const tokens = [await session.prompt(ids.slice(0, 60))];
            prefills.push(Math.round((performance.now() - begin) * 10) / 10);
            await session.next();
            const start = performance.now();
            for (let i = 0; i < newTokens; i++) {
              tokens.push((await session.next())[0]!);
            }
            rates.push(
              Math.round(newTokens / (performance.now() - start) * 1000),
            );
            texts.push(model.tokenizer.decode(tokens));
            session.close();
            cache.close();
          }
          let agree = 0;
          while (
            agree < texts[0]!.length && texts[0]![agree] === texts[1]![agree]
          ) agree++;
          return {
            ok: texts[1]!.length > 0 &&
              (activations !== "f32" || agree === texts[0]!.length),
            agreeCharacters: `${agree}/${texts[0]!.length}`,
            tokensPerSecond: rates,
            prefillMs: prefills,
            text: texts[1]!.slice(0, 200),
          };
        },
      );
    }
    if (activations === "f32") {
      for (const policy of ["weighted-kv", "streaming-llm"]) {
        await attempt(
          "model side by side",
          { activations, cacheType, policy, budget: 64 },
          () => sideBySide(models[1]!, { policy, budget: 64, cacheType }),
        );
      }
    }
    models.forEach((m) => m.close());
  }
}

/** Windows of a text side by side beside each alone, on the device both times. */
async function sideBySide(
  model: Model,
  options: CacheOptions,
): Promise<Record<string, unknown>> {
  const windows = 4, tokens = 256;
  const ids: number[] = JSON.parse(
    await Deno.readTextFile(new URL("golden/text.json", import.meta.url)),
  );
  const { vocabulary, layers, kvHeads } = model.config;
  using cache = model.createCache({ ...options, sequences: windows });
  using single = model.createCache(options);
  using session = new Session(model, cache);
  using alone = new Session(model, single);
  const id = (window: number, i: number) => ids[window * tokens + i]!;
  const together: Float32Array[] = [];
  for (let i = 0; i < tokens; i++) {
    const all = Int32Array.from({ length: windows }, (_, b) => id(b, i));
    together.push(await session.logits(all));
  }
  let error = 0, kept = 0;
  for (let b = 0; b < windows; b++) {
    single.reset();
    for (let i = 0; i < tokens; i++) {
      const right = await alone.logits(Int32Array.of(id(b, i)));
      const from = b * vocabulary;
      const mine = together[i]!.subarray(from, from + vocabulary);
      error = Math.max(error, relativeError(mine, right));
    }
    kept += overlapOf([single, cache], layers, kvHeads, b).overlap / windows;
  }
  const limit = 1e-4;
  return {
    ok: error <= limit && kept >= 0.999,
    windows,
    tokens,
    error,
    limit,
    overlap: kept,
  };
}

// ---- memory of a long prompt ----

/** What says how many bytes are in use: the whole GPU's, or this process's. */
function memoryMeter(): { used: () => number } & Disposable {
  if (device === "cpu") {
    return { used: () => Deno.memoryUsage().rss, [Symbol.dispose]() {} };
  }
  const driver = Deno.dlopen("libcuda.so.1", {
    cuMemGetInfo_v2: { parameters: ["buffer", "buffer"], result: "i32" },
  });
  const free = new BigUint64Array(1), all = new BigUint64Array(1);
  return {
    // The context is the one that the library made current to this thread.
    used() {
      const status = driver.symbols.cuMemGetInfo_v2(free, all);
      if (status !== 0) throw new Error(`cuMemGetInfo gives ${status}`);
      return Number(all[0]! - free[0]!);
    },
    [Symbol.dispose]: () => driver.close(),
  };
}

/**
 * A prompt in one pass through a layer of Llama 3 8B: beside input, output and
 * cache it must take less than half a head's matrix of weights.
 */
async function checkPrefill(): Promise<void> {
  const rows = promptRows;
  const { heads, kvHeads, headDim } = modelShapes["llama-3-8b"];
  const layer: Layer = { heads, kvHeads, headDim };
  const width = qkvWidth(layer);
  // Again and again, as so many random numbers take their time.
  const block = new Random(rows).normals(1024 * width);
  using gpu = await Backend.open({ device });
  using meter = memoryMeter();
  for (
    const options of [
      { policy: "full", capacity: rows },
      { policy: "weighted-kv", budget: 1024 },
    ] as CacheOptions[]
  ) {
    const facts = { rows, ...layer, cacheType: "bf16" as const, ...options };
    await attempt("prefill memory", facts, async () => {
      using cache = openCache(gpu, layer, { ...options, cacheType: "bf16" });
      using qkv = new Tensor(gpu, "F32", rows, width);
      using out = new Tensor(gpu, "F32", rows, heads * headDim);
      for (let row = 0; row < rows; row += block.length / width) {
        qkv.write(block.subarray(0, (rows - row) * width), row);
      }
      const before = meter.used();
      using graph = gpu.record(() => cache.prefill(0, 0, out, qkv, rows));
      let most = meter.used();
      const timer = setInterval(() => most = Math.max(most, meter.used()), 5);
      const start = performance.now();
      try {
        await graph.run();
      } finally {
        clearInterval(timer);
      }
      const ms = performance.now() - start;
      const bytes = Math.max(most, meter.used()) - before;
      const { kept } = cache.stats();
      const finite = out.floats(rows - 1, 1).every(Number.isFinite);
      const matrix = 4 * rows ** 2;
      // A process on a CPU grows by less than a matrix would be for itself.
      const limit = matrix / 2 + (device === "cpu" ? 256 << 20 : 0);
      return {
        ok: bytes <= limit && finite && kept === cache.capacity,
        ms,
        bytes,
        limit,
        matrixOfOneHead: matrix,
        kept,
      };
    });
  }
}

// ---- Ctrl-C ----

/** Milliseconds from a signal to the end of a generation. */
/**
 * Milliseconds after Ctrl-C: to the last output, which this project answers for,
 * and to the end of the process, most of which the driver takes to give up what
 * the process had on the GPU.
 */
const INTERRUPT_LIMITS = { ended: 50, gone: 250 };

async function checkInterrupt(): Promise<void> {
  for (let run = 0; run < 5; run++) {
    await attempt("interrupt", { device }, async () => {
      const child = new Deno.Command(Deno.execPath(), {
        args: denoArguments([
          ...["generate", "Once upon a time", "--ignore-eos", "--offline"],
          ...["--model", args.model, "--max-tokens", "100000"],
          ...["--device", device],
        ]),
        stdin: "null",
        stdout: "piped",
        stderr: "piped",
      }).spawn();
      const reader = child.stdout.getReader();
      await reader.read();
      await new Promise((resolve) => setTimeout(resolve, 200));
      const start = performance.now();
      child.kill("SIGINT");
      // The summary is written when the text has ended.
      const written = lastWrite(child.stderr);
      while (!(await reader.read()).done);
      const { text, at } = await written;
      const { code } = await child.status;
      const gone = performance.now() - start, ended = at - start;
      const { ended: soon, gone: late } = INTERRUPT_LIMITS;
      const ok = code === 130 && /tokens.*; cache/.test(text) &&
        ended <= soon && gone <= late;
      return { ok, code, ended, gone, limits: INTERRUPT_LIMITS };
    });
  }
}

/** What is written last until a stream ends, and when. */
async function lastWrite(
  stream: ReadableStream<Uint8Array>,
): Promise<{ text: string; at: number }> {
  let text = "", at = NaN;
  for await (const chunk of stream) {
    text = new TextDecoder().decode(chunk);
    at = performance.now();
  }
  return { text, at };
}

function argmax(x: Float32Array): number {
  let best = 0;
  for (let i = 1; i < x.length; i++) if (x[i]! > x[best]!) best = i;
  return best;
}

function overlapOf(
  caches: [KvCache, KvCache],
  layers: number,
  kvHeads: number,
  sequence = 0,
) {
  let equal = 0, overlap = 0;
  for (let l = 0; l < layers; l++) {
    for (let n = 0; n < kvHeads; n++) {
      const [x, y] = [
        caches[0].rows(l, n).kept,
        caches[1].rows(l, n, sequence).kept,
      ];
      if (`${x}` === `${y}`) equal++;
      const has = new Set(x);
      overlap += y.filter((p) => has.has(p)).length / x.length;
    }
  }
  return {
    equalHeads: `${equal}/${layers * kvHeads}`,
    overlap: overlap / (layers * kvHeads),
  };
}

// ---- the tests that take a device ----

/** Files that compute on WKV_TEST_DEVICE; among them the golden ones. */
const testFiles = [
  "kernels",
  "policies",
  "cache",
  "sampling",
  "lifetime",
  "abi",
  "model",
  "generate",
  "perplexity",
];

async function checkTests(): Promise<void> {
  await Promise.all(
    testFiles.map((name) =>
      attempt("test", { file: `tests/${name}_test.ts` }, async () => {
        const start = performance.now();
        const { success, stdout } = await new Deno.Command(Deno.execPath(), {
          args: [
            "test",
            "-A",
            "--no-prompt",
            "--no-check",
            `tests/${name}_test.ts`,
          ],
          cwd: new URL("../", import.meta.url),
          env: { WKV_TEST_DEVICE: device, NO_COLOR: "1" },
          stderr: "inherit",
        }).output();
        const text = new TextDecoder().decode(stdout);
        const failed = text.indexOf(" ERRORS ");
        return {
          ok: success,
          seconds: (performance.now() - start) / 1000,
          text: success
            ? text.trim().split("\n").at(-1)
            : text.slice(Math.max(0, failed)).slice(0, 6000),
        };
      })
    ),
  );
}

// ---- all ----

{
  using gpu = await Backend.open({ device });
  print("device", { device: gpu.description, library: gpu.path });
}
const sections: Record<string, () => Promise<void>> = {
  table: checkTable,
  long: checkLong,
  model: checkModel,
  prefill: checkPrefill,
  interrupt: checkInterrupt,
  tests: checkTests,
};
const wanted = args.small
  ? ["table"]
  : args.only === ""
  ? Object.keys(sections)
  : args.only.split(",");
for (const name of wanted) {
  const start = performance.now();
  await attempt("section", { section: name }, async () => {
    const section = sections[name];
    if (section === undefined) throw new RangeError(`No section "${name}"`);
    await section();
    return { seconds: (performance.now() - start) / 1000 };
  });
}
console.log(JSON.stringify({ checks, failures }));
Deno.exit(failures === 0 ? 0 : 1);
