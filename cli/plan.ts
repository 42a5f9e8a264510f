/** `wkv plan`: the largest budget or batch that fits a memory size, from the header alone. */

import { MAX_SLOTS } from "../src/cache/policy.ts";
import { findPolicy, policyNames } from "../src/cache/registry.ts";
import { parseBudget } from "../src/cache/budget.ts";
import { DEFAULT_MODEL, resolveHere } from "../src/hub/models.ts";
import { FormatError } from "../src/formats/error.ts";
import { type ModelFile, openModelFile } from "../src/models/file.ts";
import {
  type MemoryPlan,
  mostBudget,
  mostSequences,
  planMemory,
  type PlannedModel,
  plannedModel,
  type PlanOptions,
} from "../src/plan.ts";
import { chunkSize } from "../src/session.ts";
import { defineCommand } from "./command.ts";
import {
  choice,
  type Option,
  UsageError,
  type Values,
  whole,
  wholes,
} from "./option.ts";
import { readGrants, toFlags } from "./permissions.ts";
import {
  cacheOptions,
  cacheSettingsOf,
  modelOption,
  noteFull,
  outputOptions,
  spreadOptions,
} from "./shared_options.ts";
import { formatBytes, formatTable } from "./units.ts";

const memory: Option<number> = {
  summary: "Memory to plan for, such as 8GiB or 24GB",
  value: "BYTES",
  read(texts, name) {
    const text = texts.at(-1)!;
    try {
      const parsed = parseBudget(text);
      if (parsed.kind === "bytes") return parsed.bytes;
    } catch {
      // The message below says more.
    }
    throw new UsageError(
      `The value of --${name} must be a number of bytes such as 8GiB: current value is ${
        JSON.stringify(text)
      }`,
    );
  },
};

const options = {
  ...modelOption,
  memory,
  device: choice(["cpu", "cuda"], "Whose memory it is (default cpu)"),
  threads: whole(1, "Threads of the CPU (default one a core)", 1024),
  policy: choice(
    policyNames(),
    "What leaves a full cache (default weighted-kv)",
  ),
  budget: wholes(1, "Tokens kept a KV head: plans the batch", MAX_SLOTS),
  batch: wholes(1, "Sequences side by side: plans the budget", 4096),
  ...cacheOptions,
  ...outputOptions,
};

/** One line of the plan; what does not fit is null. */
interface Row {
  batch: number | null;
  budget: number | null;
  plan: MemoryPlan | null;
}

/** The command. */
export const planCommand = defineCommand({
  operands: "[MODEL]",
  most: { count: 1, what: "one model" },
  choices: [DEFAULT_MODEL],
  description:
    `Says which budget fits a memory size at some batches, or which batch at some
budgets, and what the memory is for; full's budget is the tokens it has room for.
"between" and "shared" are what passes of a prompt and steps work in. It reads the
file's header and needs no library. On a GPU leave half a gigabyte for the driver.`,
  options,
  permissions: async ({ model }) => toFlags([await readGrants(model)]),
  async run({ values, operands, terminal }) {
    if (values.memory === undefined) {
      throw new UsageError("Say what it must fit with --memory BYTES");
    }
    // What is a budget of others is room here.
    await noteFull([values.policy], values, terminal, spreadOptions);
    const name = operands[0] ?? values.model ?? DEFAULT_MODEL;
    const path = await resolveHere(name);
    using file = await openModelFile(path);
    await refuseUnrunnable(file);
    const model = plannedModel(file);
    if (model.weights > values.memory) {
      throw new RangeError(
        `The weights alone take ${formatBytes(model.weights)}, more than the ${
          formatBytes(values.memory)
        } of --memory`,
      );
    }
    const rows = rowsOf(model, values.memory, values);
    if (values.json) {
      for (const { batch, budget, plan } of rows) {
        const line = { name, memory: values.memory, batch, budget, ...plan };
        await terminal.out.write(`${JSON.stringify(line)}\n`);
      }
      return 0;
    }
    const size = (bytes?: number): string =>
      bytes === undefined ? "-" : formatBytes(bytes);
    const heads = [
      ...["batch", "budget", "weights", "cache", "between", "shared", "all"],
    ];
    await terminal.out.write(
      formatTable(
        heads,
        rows.map(({ batch, budget, plan }) => [
          batch?.toString() ?? "-",
          budget?.toString() ?? "-",
          size(plan?.weights),
          size(plan?.cache),
          size(plan?.activations),
          size(plan?.scratch),
          plan === null ? "does not fit" : size(plan.total),
        ]),
        heads,
      ),
    );
    const { context } = model.config;
    if (!values.quiet && rows.some(({ budget }) => budget === context)) {
      await terminal.err.write(
        `A budget of ${context} is the model's whole context\n`,
      );
    }
    return 0;
  },
});

/**
 * Refuses what `wkv info` says does not run.
 *
 * @throws {SyntaxError} It does not.
 */
async function refuseUnrunnable(file: ModelFile): Promise<void> {
  try {
    await file.check();
  } catch (cause) {
    if (!(cause instanceof FormatError)) throw cause;
    const text = `The model does not run: ${cause.message}`;
    throw new SyntaxError(text, { cause });
  }
}

/** The given budgets and batches, or the largest of what is not given. */
function rowsOf(
  model: PlannedModel,
  memory: number,
  values: Values<typeof options>,
): Row[] {
  const common: PlanOptions = {
    ...cacheSettingsOf(values),
    policy: values.policy,
    chunk: chunkSize(
      values.prefill ?? "exact",
      findPolicy(values.policy ?? "weighted-kv"),
    ),
    device: values.device,
    threads: values.threads,
  };
  const row = (batch: number | null, budget: number | null): Row => {
    if (batch === null || budget === null) return { batch, budget, plan: null };
    const plan = planMemory(model, {
      ...common,
      budget,
      capacity: budget,
      sequences: batch,
    });
    return { batch, budget, plan: plan.total <= memory ? plan : null };
  };
  const { batch, budget } = values;
  if (budget === undefined) {
    return (batch ?? [1, 2, 4, 8, 16, 32]).map((sequences) =>
      row(sequences, mostBudget(model, memory, { ...common, sequences }))
    );
  }
  return budget.flatMap((tokens) =>
    batch?.map((sequences) => row(sequences, tokens)) ??
      row(
        mostSequences(model, memory, {
          ...common,
          budget: tokens,
          capacity: tokens,
        }),
        tokens,
      )
  );
}
