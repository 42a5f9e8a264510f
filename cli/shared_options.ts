/** The options that several commands share, and what they mean to the library. */

import { findPolicy, policies, policyNames } from "../src/cache/registry.ts";
import { type LayerBudgets, parseBudget } from "../src/cache/budget.ts";
import {
  keepsAll,
  MAX_SLOTS,
  type Policy,
  resolveBudget,
} from "../src/cache/policy.ts";
import { PRECISIONS } from "../src/backend/ops.ts";
import { DEFAULT_MODEL } from "../src/hub/registry.ts";
import type { CacheOptions } from "../src/cache/layout.ts";
import {
  chunkSize,
  type Prefill,
  type SamplerOptions,
} from "../src/session.ts";
import type { LoadOptions, Model } from "../mod.ts";
import {
  choice,
  decimal,
  flag,
  type Option,
  sizes,
  text,
  UsageError,
  type Values,
  whole,
} from "./option.ts";
import { ProgressView } from "./progress.ts";
import type { Terminal } from "./terminal.ts";

/** `--json` and `--quiet`. */
export const outputOptions = {
  json: flag("Print JSON, one object a line"),
  quiet: flag("Print nothing on standard error but errors"),
};

/** `--model`. */
export const modelOption = {
  model: text(
    "NAME",
    `A name, a GGUF file, a folder or hf:org/repo[:file] (default ${DEFAULT_MODEL})`,
    { short: "m", file: true, choices: [DEFAULT_MODEL] },
  ),
};

/** Which model runs, and on what. */
export const loadOptions = {
  ...modelOption,
  device: choice(["auto", "cpu", "cuda"], "Where it runs (default auto)"),
  activations: choice(
    PRECISIONS,
    "How activations meet weights (default int8, of quantised ones; half: once rounded, of 16-bit ones)",
  ),
  "kv-heads": choice(
    ["model", "query"],
    "One cache a KV head, or one a query head as in the paper (default model)",
  ),
  threads: whole(0, "Threads of the CPU; 0 is one a core (default 0)", 1024),
  offline: flag(
    "Take a model that is here and ask nobody, as with HF_HUB_OFFLINE=1",
  ),
};

const prefill: Option<Prefill> = {
  summary: "How tokens beyond the budget are fed (default exact)",
  value: "exact|chunk:N",
  choices: ["exact", "chunk:64"],
  read(texts, name) {
    const typed = texts.at(-1) as Prefill;
    try {
      chunkSize(typed);
    } catch (cause) {
      throw new UsageError(`--${name}: ${(cause as Error).message}`, { cause });
    }
    return typed;
  },
};

const spreads = ["constant", "pyramid", "inverse"] as const;

const spread: Option<LayerBudgets> = {
  summary:
    "How the budget is spread over the layers, at the same total; numbers are shares, a layer's or N/N/... of its KV heads (default constant)",
  value: `${spreads.join("|")}|N[/N...],N[/N...],...`,
  choices: spreads,
  read(texts, name) {
    const typed = texts.at(-1)!;
    const word = spreads.find((spread) => spread === typed);
    if (word !== undefined) return word;
    if (/^\d+([,/]\d+)+$/.test(typed)) {
      return typed.split(",").map((layer) => {
        const own = layer.split("/").map(Number);
        return own.length === 1 ? own[0]! : own;
      });
    }
    throw new UsageError(
      `--${name} must be one of ${
        spreads.join(", ")
      }, or a whole number a layer separated by commas, or one a KV head separated by slashes: current value is "${typed}"`,
    );
  },
};

/** What a cache is made of and how it is fed, policy and budget excepted. */
export const cacheOptions = {
  sinks: whole(
    0,
    "First tokens that never leave (default by policy)",
    MAX_SLOTS,
  ),
  recent: whole(
    0,
    "Newest tokens that never leave (default by policy)",
    MAX_SLOTS,
  ),
  interval: whole(
    1,
    "Tokens that leave at once when the cache overflows (default by policy)",
    MAX_SLOTS,
  ),
  "layer-budgets": spread,
  positions: choice(
    ["cache", "text"],
    "Where keys are rotated: rank in the cache or place in the text (default cache)",
  ),
  "cache-type": choice(
    ["f16", "f32", "bf16"],
    "Type of keys and values (default f16)",
  ),
  prefill,
};

/** What these options say of a cache; how it is fed is apart. */
export function cacheSettingsOf(values: Values<typeof cacheOptions>): Pick<
  CacheOptions,
  | "sinks"
  | "recent"
  | "interval"
  | "layerBudgets"
  | "positions"
  | "cacheType"
> {
  const { sinks, recent, interval, positions } = values;
  return {
    ...{ sinks, recent, interval, positions },
    layerBudgets: values["layer-budgets"],
    cacheType: values["cache-type"],
  };
}

/**
 * Finds a policy and checks what is known of its cache before a model is loaded.
 *
 * @throws {RangeError} An option is out of range.
 */
export function checkedPolicy(
  name: string | undefined,
  values: Values<typeof cacheOptions> & {
    budget?: number | string | undefined;
  },
): Policy {
  const policy = findPolicy(name ?? "weighted-kv");
  const { budget = 256 } = values;
  if (!keepsAll(policy) && typeof budget === "number") {
    resolveBudget(policy, budget, values);
  }
  chunkSize(values.prefill ?? "exact", policy);
  return policy;
}

/** Options of how a budget is spread. */
export const spreadOptions = ["sinks", "recent", "interval", "layer-budgets"];

/** Says which options have no meaning when `full` is the only policy. */
export async function noteFull(
  policies: readonly (string | undefined)[],
  values: { quiet?: boolean | undefined; [name: string]: unknown },
  terminal: Terminal,
  names: readonly string[] = ["budget", ...spreadOptions],
): Promise<void> {
  const given = names.filter((name) => values[name] !== undefined)
    .map((name) => `--${name}`);
  if (values.quiet || given.length === 0) return;
  if (policies.some((name) => name !== "full")) return;
  await terminal.err.write(
    `full keeps every token: ${given.join(", ")} left aside\n`,
  );
}

/** How tokens are drawn. */
export const samplerOptions = {
  temperature: decimal(
    0,
    1000,
    "0 takes the likeliest token (default 0)",
  ),
  "top-k": whole(0, "Draw from the N likeliest tokens; 0 is all", 2 ** 24),
  "top-p": decimal(
    0,
    1,
    "Draw from the likeliest tokens that reach this share",
    true,
  ),
  "min-p": decimal(
    0,
    1,
    "Leave out tokens less likely than this share of the likeliest",
  ),
  seed: whole(0, "Repeat a run (default random)"),
};

/** What these options say. */
export function samplerOf(
  values: Values<typeof samplerOptions>,
): SamplerOptions {
  const { temperature, seed } = values;
  return {
    temperature,
    topK: values["top-k"],
    topP: values["top-p"],
    minP: values["min-p"],
    seed,
  };
}

const BUDGET =
  "Tokens kept a KV head, a share or bytes: 256, 25%, 64MiB, paper-1024 (default 256)";

/** `--budget` for several caches. */
export const budgetsOption = sizes(BUDGET, parseBudget, MAX_SLOTS);

/** `--budget` for one. */
export const budgetOption: Option<number | string> = {
  ...budgetsOption,
  value: "N|N%|BYTES",
  read(texts, name) {
    const [size, ...more] = budgetsOption.read(texts, name);
    if (more.length === 0) return size!;
    throw new UsageError(
      `The value of --${name} must be one budget: current value is ${
        JSON.stringify(texts.at(-1))
      }`,
    );
  },
};

/** Names of policies, for help and completions. */
export const POLICY_NAMES: readonly string[] = policyNames();

/** What the policies do, for help. */
export function policyList(): string {
  const width = Math.max(...[...policies.keys()].map((name) => name.length));
  return "Policies:\n" +
    [...policies.values()].map(({ name, summary, options = {} }) =>
      `  ${name.padEnd(width)}  ${summary}${
        Object.keys(options).map((option) => `; also ${name}:${option}`).join(
          "",
        )
      }`
    ).join("\n");
}

/**
 * Loads the model, with progress on standard error. After Ctrl-C `using` leaves
 * it open: the process ends next, which gives a GPU's memory back sooner than
 * closing first does.
 */
export async function load(
  values: Values<typeof loadOptions & { quiet: Option<boolean> }>,
  terminal: Terminal,
  signal: AbortSignal,
): Promise<Model> {
  const { loadModel } = await import("../mod.ts");
  using view = new ProgressView(terminal, values.quiet ?? false);
  const options: LoadOptions = {
    device: values.device,
    activations: values.activations,
    kvHeads: values["kv-heads"],
    threads: values.threads,
    offline: values.offline,
    onProgress: view.report,
    signal,
  };
  const model = await loadModel(values.model ?? DEFAULT_MODEL, options);
  model[Symbol.dispose] = () => {
    if (!signal.aborted) model.close();
  };
  view.close();
  return model;
}
