/** `wkv generate`: continues a text. */

import type { GenerateResult, Model, Piece } from "../mod.ts";
import { generate } from "../src/generate.ts";
import { defineCommand } from "./command.ts";
import { processInput, readPrompt } from "./input.ts";
import { flag, text, texts, whole } from "./option.ts";
import { runFlags } from "./permissions.ts";
import {
  budgetOption,
  cacheOptions,
  cacheSettingsOf,
  checkedPolicy,
  load,
  loadOptions,
  noteFull,
  outputOptions,
  POLICY_NAMES,
  policyList,
  samplerOf,
  samplerOptions,
} from "./shared_options.ts";
import type { Terminal } from "./terminal.ts";
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
    const policy = checkedPolicy(values.policy, values);
    await noteFull([values.policy], values, terminal);
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
        ...cacheSettingsOf(values),
      },
      maxTokens: values["max-tokens"],
      ...samplerOf(values),
      stop: values.stop,
      ignoreEos: values["ignore-eos"],
      special: values.special,
      prefill: values.prefill,
      signal,
      stopOnAbort: true,
    });
    const result = await printPieces(pieces, json ? null : terminal);
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

/** Writes pieces as they come, where there is a terminal for them; gives what they end with. */
export async function printPieces<T>(
  pieces: AsyncGenerator<Piece, T>,
  terminal: Terminal | null,
): Promise<T> {
  let next = await pieces.next();
  while (!next.done) {
    if (next.value.text !== "") await terminal?.out.write(next.value.text);
    next = await pieces.next();
  }
  return next.value;
}

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
  const kept = cache.headKept?.flat() ?? cache.layerKept;
  return [
    speed === null
      ? `${tokens.length} tokens`
      : `${tokens.length} tokens at ${speed.toFixed(1)} tokens/s`,
    ...(firstTokenMs === null
      ? []
      : [`first after ${formatTime(firstTokenMs)}`]),
    `cache ${formatBytes(bytes)} (in full ${formatBytes(fullBytes)})`,
    kept === null
      ? `${merged} merged, ${evicted} evicted`
      : `${Math.min(...kept)} to ${
        Math.max(...kept)
      } of ${cache.seen} tokens kept a ${cache.headKept ? "KV head" : "layer"}`,
  ].join("; ");
}
