/**
 * Measures what the paper's Fig. 2 and Fig. 4 show, and writes a file for each.
 *
 *   deno run -A bench/figures.ts --figure 2|4 --text FILE[,FILE...]
 *     [--device cpu|cuda] [--kv-heads model,query] [--budget 256,...]
 *     [--out bench/results] [--svg FILE] [--seconds N] [--model NAME]
 *
 * Fig. 2: how alike the weights of attention stay after one merge. At token 100
 * every head merges one value; then 800 tokens are fed to that cache and to a
 * full one. The cosine is of a step's weights over the tokens, those of the
 * merged pair added up; `behind` leaves the first 4 tokens out.
 *
 * Fig. 4: eviction beside weighted-kv over the first 32,768 tokens of each text,
 * from one cache that is never emptied. `--budget` and `--svg`, which
 * draws it, are for this one.
 */

import { parseArgs } from "@std/cli/parse-args";
import {
  DEFAULT_MODEL,
  type Device,
  type KvCache,
  loadModel,
  type LoadOptions,
  type Model,
  Session,
} from "../mod.ts";
import { Tensor } from "../src/backend/tensor.ts";
import { lineChart } from "../src/evaluate/chart.ts";
import { frame, writeResult } from "./record.ts";
import { showUsage } from "./usage.ts";

/** Weights of single steps, as differences of the sums that caches keep. */
class Weights {
  readonly #caches: readonly KvCache[];
  readonly #noted: number[][][];
  readonly #heads: number;
  readonly #sequences: number;
  readonly #layers: number;

  constructor(model: Model, caches: readonly KvCache[], sequences: number) {
    this.#caches = caches;
    this.#layers = model.config.layers;
    this.#heads = model.config.kvHeads;
    this.#sequences = sequences;
    this.#noted = caches.map(() => []);
  }

  #at(layer: number, head: number, sequence: number): number {
    return (layer * this.#heads + head) * this.#sequences + sequence;
  }

  note(): void {
    this.#caches.forEach((cache, c) => {
      for (let layer = 0; layer < this.#layers; layer++) {
        for (let head = 0; head < this.#heads; head++) {
          for (let b = 0; b < this.#sequences; b++) {
            this.#noted[c]![this.#at(layer, head, b)] =
              cache.rows(layer, head, b).score;
          }
        }
      }
    });
  }

  since(c: number, layer: number, head: number, sequence: number): number[] {
    const noted = this.#noted[c]![this.#at(layer, head, sequence)]!;
    const { score } = this.#caches[c]!.rows(layer, head, sequence);
    return score.map((sum, i) => sum - (noted[i] ?? 0));
  }
}

await showUsage(import.meta.url);
const args = parseArgs(Deno.args, {
  string: [
    ...["figure", "text", "device", "kv-heads", "budget", "out", "svg"],
    ...["seconds", "model"],
  ],
  default: {
    device: "cuda",
    "kv-heads": "model,query",
    budget: "256",
    out: "bench/results",
    seconds: "1e9",
    model: DEFAULT_MODEL,
  },
}) as unknown as {
  figure?: string;
  text: string;
  device: Device;
  "kv-heads": string;
  budget: string;
  svg?: string;
  out: string;
  seconds: string;
  model: string;
};
const end = performance.now() + Number(args.seconds) * 1000;
const texts = args.text.split(",");
const FIRST = 100, AFTER = 800, EVERY = 20, SINKS = 4;
const LENGTH = 32768, BUCKET = 2048;

type Row = Record<string, unknown>;
const path = `${args.out}/figure-${args.figure}.json`;
const rows: Row[] = await readRows(path);
let longest = 0;
for (const kvHeads of args["kv-heads"].split(",")) {
  using model = await loadModel(args.model, {
    device: args.device,
    kvHeads: kvHeads as NonNullable<LoadOptions["kvHeads"]>,
  });
  const tokens: number[][] = [];
  for (const text of texts) {
    tokens.push(
      [...await model.tokenizer.encode(await Deno.readTextFile(text))],
    );
  }
  const parts = args.figure === "2"
    ? [{ policy: "weighted-kv", budget: FIRST }]
    : args.budget.split(",").flatMap((budget) =>
      ["eviction", "weighted-kv"].map((policy) => ({
        policy,
        budget: Number(budget),
      }))
    );
  for (const { policy, budget } of parts) {
    const known = rows.some((row) =>
      row.kvHeads === kvHeads && row.policy === policy &&
      (row.budget ?? budget) === budget
    );
    if (known) continue;
    if ((end - performance.now()) / 1000 < longest) continue;
    const begin = performance.now();
    const row = args.figure === "2"
      ? await likeness(model, tokens)
      : await stream(model, policy, budget, tokens);
    longest = Math.max(longest, (performance.now() - begin) / 1000);
    rows.push({ kvHeads, policy, ...row });
    await writeResult(path, {
      ...await frame(
        `deno run -A bench/figures.ts --figure ${args.figure}`,
        model.backend,
      ),
      model: args.model.split("/").at(-1)!,
      texts: texts.map((text) => text.split("/").at(-1)!),
      rows,
    });
    console.log(JSON.stringify(rows.at(-1)));
  }
}

if (args.figure === "4" && args.svg !== undefined) {
  await Deno.writeTextFile(args.svg, drawn(rows as unknown as Stream[]));
}

async function readRows(path: string): Promise<Row[]> {
  try {
    return JSON.parse(await Deno.readTextFile(path)).rows;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return [];
    throw error;
  }
}

/** A row of Fig. 4. */
interface Stream {
  kvHeads: string;
  policy: string;
  budget: number;
  bucket: number;
  /** Of each text, by bucket. */
  nll: number[][];
}

/** Perplexity of all texts along their tokens, a point a bucket. */
function drawn(rows: readonly Stream[]): string {
  return lineChart({
    title: "Perplexity along a book, by what becomes of the victim's value",
    xLabel: "tokens read",
    yLabel: "perplexity of the last 2,048 tokens",
    series: rows.map(({ kvHeads, policy, budget, bucket, nll }) => ({
      name: `${policy}, ${budget} tokens a ${
        kvHeads === "query" ? "query" : "KV"
      } head`,
      points: nll[0]!.map((_, i) => ({
        x: (i + 1) * bucket,
        y: Math.exp(nll.reduce((sum, own) => sum + own[i]!, 0) / nll.length),
      })),
    })),
  });
}

/** Each text's mean negative log probability by bucket of its tokens. */
async function stream(
  model: Model,
  policy: string,
  budget: number,
  texts: readonly number[][],
): Promise<Row> {
  const sequences = texts.length;
  using cache = model.createCache({ policy, budget, sequences });
  using session = new Session(model, cache);
  const sums = texts.map(() =>
    Array.from({ length: LENGTH / BUCKET }, () => 0)
  );
  const at = (i: number) => Int32Array.from(texts, (text) => text[i]!);
  for (let i = 0; i < LENGTH; i++) {
    const logs = await session.score(at(i), at(i + 1));
    logs.forEach((log, b) => sums[b]![Math.floor(i / BUCKET)]! -= log);
  }
  const nll = sums.map((own) => own.map((sum) => sum / BUCKET));
  return { budget, tokens: LENGTH, bucket: BUCKET, nll };
}

/** The cosines of some steps after the merge: mean and deviation over heads, layers and texts. */
async function likeness(
  model: Model,
  texts: readonly number[][],
): Promise<Row> {
  const sequences = texts.length, capacity = FIRST + AFTER + 2;
  using full = model.createCache({ policy: "full", sequences, capacity });
  using pressed = model.createCache({ budget: FIRST, sequences });
  using merged = model.createCache({ policy: "full", sequences, capacity });
  using whole = new Session(model, full);
  using before = new Session(model, pressed);
  using after = new Session(model, merged);
  const at = (i: number) => Int32Array.from(texts, (text) => text[i]!);
  for (let i = 0; i <= FIRST; i++) {
    await whole.feed(at(i));
    await before.feed(at(i));
  }
  // What each head merged, as ranks of the full cache: places in the text.
  const events = texts.map((_, b) => pressed.events(b));
  await copy(model, pressed, merged, sequences);
  const { layers } = model.config;
  const weights = new Weights(model, [full, merged], sequences);
  const steps: number[] = [], all = lists(), behind = lists();
  for (let step = 1; step <= AFTER; step++) {
    const reads = step % EVERY === 0 || step === 1;
    if (reads) weights.note();
    await whole.feed(at(FIRST + step));
    await after.feed(at(FIRST + step));
    if (!reads) continue;
    const cosines: number[] = [], others: number[] = [];
    for (let b = 0; b < sequences; b++) {
      for (const { layer, head, from, into } of events[b]!) {
        if (layer >= layers || into === null) continue;
        const p = weights.since(0, layer, head, b);
        const q = weights.since(1, layer, head, b);
        p[into]! += p[from]!;
        p.splice(from, 1);
        cosines.push(cosine(p, q));
        // The first tokens draw so much attention that little else shows.
        others.push(cosine(p.slice(SINKS), q.slice(SINKS)));
      }
    }
    steps.push(step);
    add(all, cosines);
    add(behind, others);
  }
  return { merge: FIRST, heads: events[0]!.length, steps, all, behind };
}

/** Means and deviations of a step's cosines. */
interface Lists {
  mean: number[];
  deviation: number[];
}

function lists(): Lists {
  return { mean: [], deviation: [] };
}

function add(to: Lists, cosines: readonly number[]): void {
  const n = cosines.length, mean = cosines.reduce((a, b) => a + b) / n;
  const squares = cosines.reduce((sum, x) => sum + (x - mean) ** 2, 0);
  to.mean.push(Number(mean.toFixed(7)));
  to.deviation.push(Number(Math.sqrt(squares / (n - 1)).toFixed(7)));
}

/** Copies what a bounded cache holds into an empty full one: keys and values as they are, in rank order. */
async function copy(
  model: Model,
  from: KvCache,
  to: KvCache,
  sequences: number,
): Promise<void> {
  const { layers, kvHeads, headDim } = model.config;
  const { backend } = model;
  const width = 2 * kvHeads * headDim;
  using kv = new Tensor(backend, "F32", sequences, width);
  using weights = new Tensor(
    backend,
    "F32",
    sequences,
    kvHeads * (to.capacity + 1),
  );
  for (let layer = 0; layer < layers; layer++) {
    const stored = Array.from({ length: sequences * kvHeads }, (_, i) => {
      const at = [layer, i % kvHeads, Math.floor(i / kvHeads)] as const;
      return { keys: from.keys(...at), values: from.values(...at) };
    });
    for (let rank = 0; rank < from.capacity; rank++) {
      const row = new Float32Array(sequences * width);
      stored.forEach(({ keys, values }, i) => {
        const at = Math.floor(i / kvHeads) * width + i % kvHeads * headDim;
        const part = [rank * headDim, (rank + 1) * headDim] as const;
        row.set(keys.subarray(...part), at);
        row.set(values.subarray(...part), at + width / 2);
      });
      kv.write(row);
      using graph = backend.record(() => to.insert(layer, kv, weights));
      await graph.run();
    }
  }
}

function cosine(x: readonly number[], y: readonly number[]): number {
  let xy = 0, xx = 0, yy = 0;
  x.forEach((a, i) => {
    const b = y[i]!;
    xy += a * b, xx += a * a, yy += b * b;
  });
  return xy / Math.sqrt(xx * yy);
}
