/** `wkv bench`: times kernels, or a model's decode steps. */

import type { DecodeRow, PromptRow } from "../bench/decode.ts";
import type { KernelRow } from "../bench/kernels.ts";
import { kernelOps } from "../bench/kernels.ts";
import { measureMemory, type Memory } from "../bench/memory.ts";
import { randomModel, type WeightType } from "../bench/random_model.ts";
import { frame, writeResult } from "../bench/record.ts";
import { type ShapeName, shapeNames } from "../bench/shapes.ts";
import { Backend } from "../src/backend/backend.ts";
import { dtypes } from "../src/backend/tensor.ts";
import { findPolicy } from "../src/cache/registry.ts";
import type { Model } from "../src/model.ts";
import { MAX_SLOTS } from "../src/cache/policy.ts";
import { defineCommand } from "./command.ts";
import {
  choice,
  flag,
  type Options,
  text,
  UsageError,
  type Values,
  whole,
  wholes,
  words,
} from "./option.ts";
import { runFlags } from "./permissions.ts";
import { ProgressView } from "./progress.ts";
import {
  cacheOptions,
  load,
  loadOptions,
  outputOptions,
  POLICY_NAMES,
} from "./shared_options.ts";
import type { Terminal } from "./terminal.ts";
import { formatTable } from "./units.ts";

const weightTypes = dtypes.filter((dtype): dtype is WeightType =>
  dtype !== "I32"
);

/** Options of both. */
const shared = {
  shapes: choice(
    shapeNames,
    "Whose shapes, with random weights (kernels: default llama-3-8b)",
  ),
  dtype: words("T[,T...]", "Types of random weights", weightTypes),
  budget: wholes(1, "Tokens kept a KV head (default 1024)", MAX_SLOTS),
  batch: wholes(1, "Sequences side by side (default 1)", 4096),
  policy: words("P[,P...]", "Policies (default weighted-kv)", POLICY_NAMES),
  positions: cacheOptions.positions,
  "cache-type": cacheOptions["cache-type"],
  ...loadOptions,
  repeats: whole(1, "Samples (default 10; of a prompt 3)", 1000),
  quick: flag("Fewer and shorter samples"),
  record: text("FILE", "Write all figures with their samples there", {
    file: true,
  }),
  ...outputOptions,
};

/** Options of `bench kernels` alone. */
const kernelOptions = {
  op: words(
    "OP[,OP...]",
    "kernels: which (default attend,linear,gated,sample,prefill)",
    kernelOps,
  ),
  rows: wholes(1, "kernels: tokens of one prefill (default 512)", 1 << 16),
  "working-set": whole(
    1,
    "kernels: MiB that a graph walks through (default 3 caches of the device)",
    1 << 20,
  ),
};

/** Options of `bench decode` alone. */
const decodeOptions = {
  depth: wholes(1, "decode: tokens before the clock starts (default budget+4)"),
  tokens: whole(0, "decode: steps that are timed (default 128)", 1 << 20),
  prompt: wholes(1, "decode: prompts to time as well, in tokens"),
  prefill: {
    ...cacheOptions.prefill,
    summary:
      "decode: how tokens beyond the budget are fed (default chunk:256, or exact)",
  },
};

const options = { ...shared, ...kernelOptions, ...decodeOptions };

type BenchValues = Values<typeof options>;

/** The command. */
export const benchCommand = defineCommand({
  operands: "kernels|decode",
  most: { count: 1, what: "kernels or decode" },
  choices: ["kernels", "decode"],
  description:
    `kernels  single ops at a model's shapes. Each is recorded in one graph with so many
         copies of its data that they do not stay in the device's cache; the time
         of an op is a wall clock around many runs of the graph by their number.
decode   whole steps of a model, greedy, cache full: --model, or --shapes with
         random weights. device ms: a step without the call and the read of its
         token, host ms: what these add.

GB/s counts the bytes that must move: weights, keys and values once, and 16 bytes of
state a cached token. The share is of the bandwidth measured at the start: that of
reads, on a GPU the better of loads of 16 bytes and bulk copies to shared memory, on a
CPU that of all cores. It takes nvcc or g++, this project's checkout and deno run -A;
on a GPU without them it is a copy's, reads and writes counted.`,
  options,
  permissions: (values) =>
    runFlags(values.model, {
      run: ["nvidia-smi"],
      ffi: ["libcuda.so.1"],
      // A record is written beside its place and then renamed.
      ...(values.record
        ? {
          read: [folderOf(values.record)],
          write: [folderOf(values.record)],
        }
        : {}),
    }),
  async run({ values, operands, terminal, signal }) {
    const [what] = operands;
    if (what !== "kernels" && what !== "decode") {
      throw new UsageError(
        `Name what to time, kernels or decode${
          what === undefined ? "" : `: found ${JSON.stringify(what)}`
        }`,
      );
    }
    const other: Options = what === "kernels" ? decodeOptions : kernelOptions;
    for (const name of Object.keys(other)) {
      if (Object.hasOwn(values, name)) {
        throw new UsageError(`bench ${what} takes no --${name}`);
      }
    }
    for (const type of values.dtype ?? []) {
      if (!weightTypes.some((known) => known === type)) {
        throw new UsageError(
          `The value of --dtype must be of ${weightTypes.join(", ")}: found ${
            JSON.stringify(type)
          }`,
        );
      }
    }
    for (const policy of values.policy ?? []) findPolicy(policy);
    const rows = what === "kernels"
      ? runKernels(values, terminal, signal)
      : runDecode(values, terminal, signal);
    const report = new Report(values, terminal);
    try {
      for await (const row of rows) {
        await report.add(row);
        signal.throwIfAborted();
      }
    } finally {
      await report.end();
    }
    return 0;
  },
});

function folderOf(path: string): string {
  const end = path.lastIndexOf("/");
  return end < 0 ? "." : path.slice(0, end) || "/";
}

type Row =
  | ({ test: "memory"; device: "cpu" | "cuda" } & Memory)
  | KernelRow
  | DecodeRow
  | PromptRow;

/** Opens the device, with a note when its library is built. */
async function openBackend(
  values: BenchValues,
  terminal: Terminal,
  signal: AbortSignal,
): Promise<Backend> {
  using view = new ProgressView(terminal, values.quiet ?? false);
  const note = (note: string) =>
    view.report({ stage: "build", loaded: 0, total: null, label: note, note });
  return await Backend.open({
    device: values.device,
    threads: values.threads,
    onBuild: note,
    onNote: note,
    signal,
  });
}

async function* runKernels(
  values: BenchValues,
  terminal: Terminal,
  signal: AbortSignal,
): AsyncGenerator<Row> {
  if (values.model !== undefined) {
    throw new UsageError("bench kernels takes --shapes, not --model");
  }
  const { benchKernels } = await import("../bench/kernels.ts");
  const { defaultSetting: of } = await import(
    "../src/selftest/model_cases.ts"
  );
  using backend = await openBackend(values, terminal, signal);
  const memory = await measureMemory(backend.device);
  yield { test: "memory", device: backend.device, ...memory };
  const { quick = false } = values;
  const set = values["working-set"];
  yield* benchKernels(backend, memory, {
    shapes: values.shapes ?? "llama-3-8b",
    ops: values.op ?? ["attend", "linear", "gated", "sample", "prefill"],
    budgets: values.budget ?? [of.budget],
    batches: values.batch ?? [of.batch],
    policies: values.policy ?? [of.policy],
    cacheType: values["cache-type"] ?? of.cacheType,
    positions: values.positions ?? of.positions,
    dtypes: (values.dtype ?? ["BF16"]) as WeightType[],
    activations: values.activations ?? "int8",
    rows: values.rows ?? [512],
    repeats: values.repeats ?? (quick ? 3 : 10),
    least: quick ? 10 : 40,
    workingSet: set ? set << 20 : 3 * (memory.cacheBytes ?? 64 << 20),
  });
}

async function* runDecode(
  values: BenchValues,
  terminal: Terminal,
  signal: AbortSignal,
): AsyncGenerator<Row> {
  const { shapes, quick = false } = values;
  if (shapes !== undefined && values.model !== undefined) {
    throw new UsageError("Give --model or --shapes, not both");
  }
  if (shapes === undefined && values.dtype !== undefined) {
    throw new UsageError("--dtype goes with --shapes: a model has its own");
  }
  const { benchDecode } = await import("../bench/decode.ts");
  let memory: Memory | undefined;
  for (const dtype of (values.dtype ?? ["BF16"]) as WeightType[]) {
    using model = await openModel(shapes, dtype, values, terminal, signal);
    const { device } = model.backend;
    if (memory === undefined) {
      memory = await measureMemory(device);
      yield { test: "memory", device, ...memory };
    }
    yield* benchDecode(model, memory, {
      policies: values.policy ?? ["weighted-kv"],
      budgets: values.budget ?? [1024],
      cache: {
        cacheType: values["cache-type"],
        positions: values.positions,
      },
      batches: values.batch ?? [1],
      depths: values.depth,
      tokens: values.tokens ?? (quick ? 32 : 128),
      prompts: values.prompt ?? [],
      prefill: values.prefill,
      repeats: values.repeats ?? (quick ? 1 : 3),
    });
  }
}

async function openModel(
  shapes: ShapeName | undefined,
  dtype: WeightType,
  values: BenchValues,
  terminal: Terminal,
  signal: AbortSignal,
): Promise<Model> {
  if (shapes === undefined) return await load(values, terminal, signal);
  const backend = await openBackend(values, terminal, signal);
  try {
    return await randomModel(backend, shapes, dtype, values.activations);
  } catch (error) {
    backend.close();
    throw error;
  }
}

/** Prints rows as they come, or a table at the end, and records them. */
class Report {
  readonly #values: BenchValues;
  readonly #terminal: Terminal;
  readonly #rows: Row[] = [];

  constructor(values: BenchValues, terminal: Terminal) {
    this.#values = values;
    this.#terminal = terminal;
  }

  async add(row: Row): Promise<void> {
    this.#rows.push(row);
    const { json = false, quiet = false } = this.#values;
    if (json) await this.#terminal.out.write(`${JSON.stringify(row)}\n`);
    else if (!quiet && this.#terminal.err.bars) {
      this.#terminal.err.writeNow(`${summary(row)}\n`);
    }
  }

  async end(): Promise<void> {
    const { json = false, record } = this.#values;
    const rows = this.#rows;
    if (rows.length === 0) return;
    if (!json) await this.#terminal.out.write(tables(rows));
    if (record === undefined) return;
    const device = rows.find((row) => row.test === "memory")?.device ?? "cpu";
    const command = ["wkv", ...Deno.args].join(" ");
    await writeResult(record, { ...await frame(command, device), rows });
  }
}

/** A word on what was just measured, while more is. */
function summary(row: Row): string {
  switch (row.test) {
    case "memory":
      return `${row.device}: ${row.kind} ${gbps(row.bytesPerSecond)} GB/s`;
    case "kernel":
      return `${row.op}: ${row.us.toFixed(2)} us`;
    default:
      return `${row.test}: ${row.tokensPerSecond.toFixed(1)} tokens/s`;
  }
}

const gbps = (bytesPerSecond: number | null): string =>
  bytesPerSecond === null ? "?" : (bytesPerSecond / 1e9).toFixed(1);
const percent = (share: number | null): string =>
  share === null ? "-" : `${(share * 100).toFixed(0)}%`;
const cell = (value: string | number | null | undefined): string =>
  value?.toString() ?? "-";

function tables(rows: readonly Row[]): string {
  let text = "";
  for (const row of rows) {
    if (row.test !== "memory") continue;
    text += `${row.kind} bandwidth ${gbps(row.bytesPerSecond)} GB/s${
      row.copy === undefined || row.kind === "copy"
        ? ""
        : `: loads of 16 bytes ${
          gbps(row.loads ?? null)
        }, bulk copies to shared memory ${
          gbps(row.bulk ?? null)
        }; a copy, reads and writes counted, ${gbps(row.copy)}`
    }${row.note ? ` (${row.note})` : ""}\n`;
  }
  const kernels = rows.filter((row) => row.test === "kernel");
  if (kernels.length > 0) {
    const right = ["budget", "rows", "batch", "us", "from", "to", "GB/s"]
      .concat("share", "TFLOP/s");
    text += formatTable(
      ["op", "policy", "type", ...right],
      kernels.map((row) => [
        row.op,
        cell(row.policy),
        cell(row.dtype ?? row.cacheType),
        cell(row.budget),
        cell(row.rows),
        cell(row.batch),
        row.us.toFixed(2),
        row.usLow.toFixed(2),
        row.usHigh.toFixed(2),
        row.gbps.toFixed(0),
        percent(row.share),
        row.tflops?.toFixed(1) ?? "-",
      ]),
      right,
    );
  }
  const steps = rows.filter((row) =>
    row.test === "decode" || row.test === "prefill"
  );
  if (steps.length > 0) {
    const right = ["budget", "batch", "depth", "tokens", "tokens/s", "ms"]
      .concat("to p90", "device ms", "host ms", "GB/s", "share");
    text += formatTable(
      ["test", "model", "policy", ...right],
      steps.map((row) => [
        row.test,
        row.model,
        row.policy,
        cell(row.budget),
        cell(row.batch),
        cell(row.depth),
        cell(row.tokens),
        row.tokensPerSecond.toFixed(1),
        row.ms.toFixed(3),
        ...(row.test === "decode"
          ? [
            row.ms90.toFixed(3),
            row.deviceMs.toFixed(3),
            row.hostMs.toFixed(3),
            row.gbps.toFixed(0),
            percent(row.share),
          ]
          : ["-", "-", "-", "-", "-"]),
      ]),
      right,
    );
  }
  return text;
}
