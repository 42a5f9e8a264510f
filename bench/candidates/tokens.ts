/**
 * Writes the windows that run.py beside this file reads, as token ids of the default
 * model: Python needs no tokenizer. What it measures, bench/tables.ts prints.
 *
 *   deno run -A bench/candidates/tokens.ts --text FILE[,FILE...] --out FILE
 *     [--window 4096] [--windows 12] [--model NAME]
 *   deno run -A bench/candidates/tokens.ts --tasks passkey,... --out FILE
 *     [--length 1024] [--samples 10]
 *
 * Each text gives its share of the windows from its beginning, half a window
 * apart as those of `wkv perplexity`, and one behind them to measure budgets with.
 * Questions are those of `wkv eval`, each with its right answer.
 */

import { parseArgs } from "@std/cli/parse-args";
import { DEFAULT_MODEL, loadModel } from "../../mod.ts";
import { ask, tasks } from "../../src/evaluate/evaluate.ts";
import { showUsage } from "../usage.ts";

const DEPTHS = [0, 0.25, 0.5, 0.75, 1];

await showUsage(import.meta.url);
const args = parseArgs(Deno.args, {
  string: [
    ...["text", "out", "window", "windows", "model"],
    ...["tasks", "length", "samples"],
  ],
  default: {
    ...{ window: "4096", windows: "12", model: DEFAULT_MODEL },
    ...{ length: "1024", samples: "10" },
  },
}) as unknown as
  & Record<
    "out" | "window" | "windows" | "model" | "length" | "samples",
    string
  >
  & { text?: string; tasks?: string };
using model = await loadModel(args.model, { device: "cpu" });
const made = args.tasks === undefined ? await texts() : await questions();
await Deno.writeTextFile(
  args.out,
  JSON.stringify({ model: args.model, ...made }),
);

async function texts(): Promise<Record<string, unknown>> {
  const window = Number(args.window);
  const paths = args.text!.split(",");
  const windows: number[][] = [], measure: number[][] = [];
  const starts: number[] = [];
  for (const [i, path] of paths.entries()) {
    const tokens = await model.tokenizer.encode(await Deno.readTextFile(path));
    const left = Number(args.windows) - windows.length;
    const share = Math.ceil(left / (paths.length - i));
    const at = (w: number) => {
      const start = w * window / 2;
      return [...tokens.slice(start, start + window)];
    };
    for (let w = 0; w < share; w++) {
      const own = at(w);
      if (own.length < window) throw new RangeError(`${path} is too short`);
      windows.push(own);
      starts.push(w * window / 2);
    }
    // Behind the last one's end.
    const behind = at(share + 1);
    if (behind.length === window) measure.push(behind);
  }
  const names = paths.map((path) => path.split("/").at(-1)!);
  return { texts: names, window, starts, windows, measure };
}

async function questions(): Promise<Record<string, unknown>> {
  const length = Number(args.length), count = 5 * Number(args.samples);
  const windows: number[][] = [], scored: [number, number][] = [];
  const names: string[] = [];
  for (const name of args.tasks!.split(",")) {
    const task = tasks.get(name);
    if (task === undefined) throw new RangeError(`Unknown task ${name}`);
    for (let i = 0; i < count; i++) {
      const depth = task.hasDepth ? DEPTHS[i % DEPTHS.length]! : null;
      const { prompt, answer } = await ask(
        ...[model.tokenizer, task, length, depth, i, 0] as const,
      );
      windows.push([...prompt, ...answer]);
      scored.push([prompt.length, prompt.length + answer.length]);
      names.push(name);
    }
  }
  const longest = Math.max(...windows.map((window) => window.length));
  // What is read behind an answer counts for nothing.
  for (const own of windows) {
    own.push(...Array<number>(longest - own.length).fill(0));
  }
  return { length, tasks: names, scored, windows };
}
