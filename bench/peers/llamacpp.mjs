// Measures llama.cpp's prefill and decode speed through node-llama-cpp, the peer our own figures stand beside; run by hand.
//
// Install the peer in a folder of its own, outside the project (--ignore-scripts: its prebuilt binary needs no build):
//   npm install --ignore-scripts node-llama-cpp@3.22.1
// Run:
//   node bench/peers/llamacpp.mjs --model FILE --modules FOLDER/node_modules [--threads N] [--depth 512,2048,8192]
//     [--tokens 128] [--prefill 512] [--runs 3] [--quick]
//
// Prints one JSON line a figure, the median of the runs. llama.cpp's own defaults otherwise: f16 cache, flash attention
// where it supports it, batches of 512.
//   prefill  `tokens` prompt tokens into an empty cache, until the first new token is there
//   decode   `tokens` greedy tokens, one by one, behind `depth` cached ones; the cost of crossing from JavaScript to
//            llama.cpp is part of it (some 0.1 ms a token)
import { readFile } from "node:fs/promises";
import { availableParallelism, cpus } from "node:os";
import { basename, join, resolve } from "node:path";
import process from "node:process";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";

const { values } = parseArgs({
  options: {
    model: { type: "string" },
    modules: { type: "string", default: "node_modules" },
    threads: { type: "string", default: String(availableParallelism()) },
    depth: { type: "string", default: "512" },
    tokens: { type: "string", default: "128" },
    prefill: { type: "string", default: "512" },
    runs: { type: "string", default: "3" },
    quick: { type: "boolean", default: false },
  },
});

/** @returns {number} The whole number above zero that an option holds. */
function count(name, text) {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 1) {
    throw new RangeError(
      `--${name} is ${text}: it must be a whole number above 0`,
    );
  }
  return value;
}

if (values.model === undefined) throw new TypeError("--model is missing");
const threads = count("threads", values.threads);
const runs = values.quick ? 1 : count("runs", values.runs);
const tokens = values.quick ? 16 : count("tokens", values.tokens);
const prefill = values.quick ? 64 : count("prefill", values.prefill);
const depths = values.quick
  ? [64]
  : values.depth.split(",").map((depth) => count("depth", depth));

const folder = join(resolve(values.modules), "node-llama-cpp");
const { version } = JSON.parse(
  await readFile(join(folder, "package.json"), "utf8"),
);
const { getLlama } = await import(
  pathToFileURL(join(folder, "dist/index.js")).href
);
const llama = await getLlama({
  gpu: false,
  build: "never",
  skipDownload: true,
  maxThreads: threads,
});
const model = await llama.loadModel({ modelPath: values.model });
const context = await model.createContext({
  contextSize: Math.max(prefill, ...depths) + tokens + 8,
  threads: { ideal: threads, min: threads },
});
const sequence = context.getSequence();

const sentence = model.tokenize(
  "The old lighthouse keeper climbed the stairs and looked at the sea. ",
  false,
);
const greedy = { temperature: 0, yieldEogToken: true };

/** @returns {number[]} A text of that many tokens. */
function text(length) {
  return Array.from({ length }, (_, i) => sentence[i % sentence.length]);
}

/** @returns {Promise<number>} Milliseconds until the first new token. */
async function timePrefill(length) {
  await sequence.clearHistory();
  const start = performance.now();
  for await (const _ of sequence.evaluate(text(length), greedy)) break;
  return performance.now() - start;
}

/** @returns {Promise<number>} Milliseconds for `length` tokens behind `depth`. */
async function timeDecode(depth, length) {
  // What an earlier run left: the first `depth` tokens stay cached.
  if (sequence.nextTokenIndex > depth) {
    await sequence.eraseContextTokenRanges([
      { start: depth, end: sequence.nextTokenIndex },
    ]);
  } else if (sequence.nextTokenIndex < depth) {
    const missing = text(depth).slice(sequence.nextTokenIndex);
    await sequence.evaluateWithoutGeneratingNewTokens(missing);
  }
  // The first step feeds a token behind `depth` cached ones and yields the next, which the following step feeds.
  const start = performance.now();
  let done = 0;
  for await (const _ of sequence.evaluate(sentence.slice(0, 1), greedy)) {
    if (++done === length) break;
  }
  return performance.now() - start;
}

/** Runs `time`, then prints the median of its runs. */
async function report(test, depth, length, time) {
  const times = [];
  for (let run = 0; run < runs; run++) times.push(await time());
  times.sort((a, b) => a - b);
  const ms = times[Math.floor(times.length / 2)];
  console.log(JSON.stringify({
    peer: "llama.cpp",
    version: `${
      llama.llamaCppRelease?.release ?? "?"
    } (node-llama-cpp ${version})`,
    device: "cpu",
    threads,
    test,
    depth,
    tokens: length,
    tokensPerSecond: Number((length / ms * 1000).toFixed(2)),
    ms: Number(ms.toFixed(2)),
    cpu: cpus()[0]?.model ?? "?",
    model: basename(values.model),
    cacheType: "f16",
    flashAttention: String(context.flashAttention),
    runs,
  }));
}

await timePrefill(32); // warm-up: the first pass pages the weights in
await report("prefill", 0, prefill, () => timePrefill(prefill));
await sequence.clearHistory();
for (const depth of depths.toSorted((a, b) => a - b)) {
  await report("decode", depth, tokens, () => timeDecode(depth, tokens));
}
process.exit(0);
