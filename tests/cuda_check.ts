/**
 * Checks the CUDA library on a machine with a GPU: every kernel case against
 * f64, long runs and the default model beside the CPU library, and the tests
 * that take a device. About three minutes on 16 cores.
 *
 *   deno run -A tests/cuda_check.ts [--only table,long,model,tests]
 *     [--small] [--model FILE] [--steps 1500] [--tokens 64] [--device cuda]
 *
 * Prints one JSON line a check; `error` is relative unless its name says
 * otherwise, `limit` what it must stay below. The last line has the number of
 * failures; there are none when it exits with 0. `--small` runs a few tiny
 * cases and nothing else, for compute-sanitizer (sanitize_cuda.ts).
 * `--device cpu` checks the CPU library, to test this script.
 */

import { parseArgs } from "@std/cli/parse-args";
import { Backend } from "../src/backend/backend.ts";
import { Tensor } from "../src/backend/tensor.ts";
import type { CacheOptions, KvCache } from "../src/cache/cache.ts";
import { policyNames } from "../src/cache/registry.ts";
import { DEFAULT_MODEL } from "../src/hub/models.ts";
import { loadModel } from "../src/model.ts";
import { tinyCases } from "../src/selftest/cases.ts";
import { type Layer, openCache, qkvWidth } from "../src/selftest/layer.ts";
import { selfTest } from "../src/selftest/mod.ts";
import { Random, relativeError } from "../src/selftest/numbers.ts";
import { Session } from "../src/session.ts";

const args = parseArgs(Deno.args, {
  string: ["only", "model", "steps", "tokens", "device"],
  boolean: ["small"],
  default: {
    only: "",
    model: DEFAULT_MODEL,
    steps: "1500",
    tokens: "64",
    device: "cuda",
    small: false,
  },
}) as unknown as {
  only: string;
  model: string;
  steps: string;
  tokens: string;
  device: "cuda" | "cpu";
  small: boolean;
};
const { device } = args;
const steps = Number(args.steps), newTokens = Number(args.tokens);

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
  using gpu = await Backend.open({ device });
  const result = await selfTest(gpu, {
    seconds: Infinity,
    ...args.small ? { rows: tinyCases() } : {},
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
  print("table", { ok: result.ok, cases, seconds });
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
        ...policy === "full" ? { capacity: steps } : { budget: 64 },
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
    models.forEach((m) => m.close());
  }
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
) {
  let equal = 0, overlap = 0;
  for (let l = 0; l < layers; l++) {
    for (let n = 0; n < kvHeads; n++) {
      const [x, y] = caches.map((c) => c.rows(l, n).kept) as [
        number[],
        number[],
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
