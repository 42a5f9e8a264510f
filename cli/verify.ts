/** `wkv verify`: repeats a run that a folder holds, and says whether the results are the same. */

import type { Precision } from "../src/backend/ops.ts";
import {
  evaluate,
  type EvaluateOptions,
  type QuestionResult,
} from "../src/evaluate/evaluate.ts";
import {
  perplexity,
  type PerplexityOptions,
  type WindowResult,
} from "../src/evaluate/perplexity.ts";
import { memoryStore } from "../src/evaluate/results.ts";
import {
  describeRun,
  type Fingerprint,
  type Manifest,
  RunFolder,
  textFingerprint,
} from "../src/evaluate/run_folder.ts";
import { compareResults, TOLERANCE } from "../src/evaluate/verify.ts";
import type { Model } from "../src/model.ts";
import { defineCommand } from "./command.ts";
import { processInput, readTextFile } from "./input.ts";
import { text, UsageError } from "./option.ts";
import { runFlags } from "./permissions.ts";
import { Bar } from "./progress.ts";
import { load, loadOptions, outputOptions } from "./shared_options.ts";
import { formatTime } from "./units.ts";

const options = {
  text: text("FILE", "The text, where it lies elsewhere now", { file: true }),
  ...loadOptions,
  ...outputOptions,
};

/** The command. */
export const verifyCommand = defineCommand({
  operands: "FOLDER",
  most: { count: 1, what: "one folder" },
  description:
    `Repeats a run that was kept with --out, and says whether its results are
bit-equal, within ${TOLERANCE} (relative for numbers above 1), or different and where
first. Exits 1 when they are different.`,
  options,
  permissions: (values) =>
    // The folder and the text that it names may lie anywhere.
    runFlags(values.model, { read: [] }),
  async run({ values, operands: [path], terminal, signal }) {
    if (path === undefined) throw new UsageError("Name the folder of a run");
    const folder = await RunFolder.read<object>(path);
    const { manifest } = folder;
    const { activations, kvHeads, ...rest } = manifest.options;
    using model = await load(
      {
        ...values,
        model: values.model ?? manifest.model.name,
        activations: values.activations ?? activations as Precision,
        "kv-heads": values["kv-heads"] ?? kvHeads as "model" | "query",
      },
      terminal,
      signal,
    );
    const now = await describeRun(model);
    same("model", manifest.model, now.model);
    const bar = new Bar(terminal.err);
    const start = performance.now();
    const onProgress = (done: number, total: number): void => {
      if (values.quiet) return;
      const left = (performance.now() - start) * (total - done) / done;
      bar.draw("Verifying", done / total, `${formatTime(left)} left`);
    };
    let again: readonly object[];
    try {
      again = await repeat(model, manifest, rest, values.text, {
        signal,
        onProgress,
      });
    } finally {
      bar.clear();
    }
    // A run that was cut off has the first results, in the same order.
    const count = folder.items.length;
    const verdict = compareResults(folder.items, again.slice(0, count));
    const differs = [
      ...(manifest.device === now.device ? [] : [`device: ${now.device}`]),
      ...(manifest.versions.kernels === now.versions.kernels
        ? []
        : ["other kernels"]),
    ];
    const words = {
      equal: "bit-equal",
      close: `within ${TOLERANCE}, the largest difference is ${
        verdict.worst.toExponential(1)
      }`,
      different: "different",
    };
    await terminal.out.write(
      values.json
        ? `${
          JSON.stringify({
            folder: path,
            results: count,
            of: again.length,
            ...verdict,
            differs,
          })
        }\n`
        : `${path}: ${
          count < again.length
            ? `unfinished, ${count} of ${again.length}`
            : count
        } results, ${words[verdict.outcome]}\n${
          verdict.outcome === "equal" ? "" : `first: ${verdict.first}\n`
        }${differs.length > 0 ? `this run: ${differs.join(", ")}\n` : ""}`,
    );
    return verdict.outcome === "different" ? 1 : 0;
  },
});

/** Runs what a manifest says once more; gives the results in their order. */
async function repeat(
  model: Model,
  manifest: Manifest,
  options: Record<string, unknown>,
  elsewhere: string | undefined,
  more: Pick<PerplexityOptions, "signal" | "onProgress">,
): Promise<readonly object[]> {
  if (manifest.command === "eval") {
    const results = memoryStore<QuestionResult>();
    const settings = options as unknown as EvaluateOptions;
    const rows = evaluate(model, { ...settings, ...more, results });
    await Array.fromAsync(rows);
    return results.items;
  }
  const path = elsewhere ?? manifest.text!.name;
  const input = await readTextFile(path, processInput(), more.signal);
  same("text", manifest.text!, textFingerprint(path, input));
  const results = memoryStore<WindowResult>();
  const settings = options as unknown as PerplexityOptions;
  const rows = perplexity(model, input, { ...settings, ...more, results });
  await Array.fromAsync(rows);
  return results.items;
}

function same(what: string, there: Fingerprint, now: Fingerprint): void {
  if (there.sha256 === now.sha256) return;
  throw new UsageError(
    `The ${what} is another: the run had ${there.name} with sha256 ${there.sha256}, ${now.name} has ${now.sha256}`,
  );
}
