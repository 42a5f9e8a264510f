/** `wkv generate`: continues a text. */

import type { GenerateResult, Model } from "../mod.ts";
import { resolveBudget } from "../src/cache/policy.ts";
import { findPolicy } from "../src/cache/registry.ts";
import { generate } from "../src/generate.ts";
import { chunkSize } from "../src/session.ts";
import { defineCommand } from "./command.ts";
import { processInput, readPrompt } from "./input.ts";
import { flag, text, texts, whole } from "./option.ts";
import { runFlags } from "./permissions.ts";
import {
  budgetOption,
  cacheOptions,
  load,
  loadOptions,
  outputOptions,
  POLICY_NAMES,
  policyList,
  samplerOptions,
} from "./shared_options.ts";
import { formatBytes, formatTime } from "./units.ts";

const options = {
  file: text("FILE", "Read the prompt from a file; - is standard input", {
    short: "f",
    file: true,
  }),
  "max-tokens": whole(
    1,
    "The most tokens to generate (default 256)",
    2 ** 31 - 1,
  ),
  policy: text("NAME", "The cache's policy (default weighted-kv)", {
    choices: POLICY_NAMES,
  }),
  budget: budgetOption,
  ...cacheOptions,
  ...samplerOptions,
  stop: texts("TEXT", "End before this text; may be given again"),
  "ignore-eos": flag("Go on past the model's end token"),
  special: flag("Read special tokens spelled in the prompt as such"),
  ...loadOptions,
  ...outputOptions,
};

/** The command. */
export const generateCommand = defineCommand({
  operands: "[PROMPT]",
  most: { count: 1, what: "one prompt" },
  description:
    `Continues a text, without any chat template. The prompt is the argument, a
file (-f), or what a pipe brings; a pipe or file and an argument are joined with
a newline.

${policyList()}`,
  options,
  permissions: (values) =>
    runFlags(
      values.model,
      values.file && values.file !== "-" ? { read: [values.file] } : {},
    ),
  async run({ values, operands, terminal, signal }) {
    const { json = false, quiet = false } = values;
    const policy = findPolicy(values.policy ?? "weighted-kv");
    const { budget = 256 } = values;
    if (policy.select !== "none" && typeof budget === "number") {
      resolveBudget(policy, budget, values);
    }
    chunkSize(values.prefill ?? "exact", policy);
    const prompt = await readPrompt(
      operands[0],
      values.file,
      processInput(),
      { ...(quiet ? {} : { terminal }), signal },
    );
    using model = await load(values, terminal, signal);
    const pieces = generate(model, prompt, {
      cache: {
        policy: policy.name,
        budget: values.budget,
        sinks: values.sinks,
        recent: values.recent,
        interval: values.interval,
        layerBudgets: values["layer-budgets"],
        positions: values.positions,
        cacheType: values["cache-type"],
      },
      maxTokens: values["max-tokens"],
      temperature: values.temperature,
      topK: values["top-k"],
      topP: values["top-p"],
      minP: values["min-p"],
      seed: values.seed,
      stop: values.stop,
      ignoreEos: values["ignore-eos"],
      special: values.special,
      prefill: values.prefill,
      signal,
      stopOnAbort: true,
    });
    let next = await pieces.next();
    while (!next.done) {
      if (!json && next.value.text !== "") {
        await terminal.out.write(next.value.text);
      }
      next = await pieces.next();
    }
    const result = next.value;
    if (json) {
      await terminal.out.write(
        `${JSON.stringify(resultJson(model, result))}\n`,
      );
    } else if (terminal.out.isTerminal && !result.text.endsWith("\n")) {
      await terminal.out.write("\n");
    }
    if (!json && !quiet) await terminal.err.write(`${summary(result)}\n`);
    return result.finishReason === "abort" ? 130 : 0;
  },
});

/** A result as `--json` prints it. */
export function resultJson(model: Model, result: GenerateResult): unknown {
  const { timings, cache, ...rest } = result;
  return {
    model: model.name,
    device: model.backend.description,
    ...rest,
    timings: { loadMs: model.loadMs, ...timings },
    cache,
  };
}

/** One line on speed and memory. */
function summary({ tokens, timings, cache }: GenerateResult): string {
  const { decodeTokensPerSecond: speed, firstTokenMs } = timings;
  const { bytes, fullBytes, merged, evicted } = cache;
  return [
    speed === null
      ? `${tokens.length} tokens`
      : `${tokens.length} tokens at ${speed.toFixed(1)} tokens/s`,
    ...(firstTokenMs === null
      ? []
      : [`first after ${formatTime(firstTokenMs)}`]),
    `cache ${formatBytes(bytes)} (in full ${formatBytes(fullBytes)})`,
    `${merged} merged, ${evicted} evicted`,
  ].join("; ");
}
