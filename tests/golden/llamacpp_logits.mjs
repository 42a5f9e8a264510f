// Writes models/<name>.llamacpp.json: what llama.cpp on the CPU makes of the tiny models as GGUF files, the logarithms of all
// probabilities after every token.
//
// Install the peer in a folder of its own, outside the project, and write the files:
//   npm install --ignore-scripts node-llama-cpp@3.22.1
//   deno run -A tests/tiny_gguf.ts FOLDER
// Run from the project's root:
//   node tests/golden/llamacpp_logits.mjs --models FOLDER --modules FOLDER/node_modules
// Tokens are those of models/<name>.json. Keys and values are cached in f32, without flash attention.
import { readdir, readFile, writeFile } from "node:fs/promises";
import { join, resolve } from "node:path";
import process from "node:process";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";

const { values } = parseArgs({
  options: { models: { type: "string" }, modules: { type: "string", default: "node_modules" } },
});
if (values.models === undefined) throw new TypeError("--models is missing");

const folder = join(resolve(values.modules), "node-llama-cpp");
const { getLlama } = await import(pathToFileURL(join(folder, "dist/index.js")).href);
const version = JSON.parse(await readFile(join(folder, "package.json"), "utf8")).version;
const llama = await getLlama({ gpu: false, build: "never", maxThreads: 1, skipDownload: true });

for (const file of (await readdir(values.models)).sort()) {
  const name = file.replace(".gguf", "");
  const golden = join("tests/golden/models", `${name}.json`);
  const { tokens } = JSON.parse(await readFile(golden, "utf8"));
  const model = await llama.loadModel({ modelPath: resolve(values.models, file) });
  const context = await model.createContext({
    contextSize: 64,
    flashAttention: false,
    experimentalKvCacheKeyType: "F32",
    experimentalKvCacheValueType: "F32",
  });
  const sequence = context.getSequence();
  const logs = new Float32Array(tokens.length * 256);
  const rows = await sequence.controlledEvaluate(
    tokens.map((token) => [token, { generateNext: { probabilities: true } }]),
  );
  rows.forEach((row, i) => {
    for (const [token, p] of row.next.probabilities) logs[i * 256 + token] = Math.log(p);
  });
  await context.dispose();
  await model.dispose();
  await writeFile(
    join("tests/golden/models", `${name}.llamacpp.json`),
    JSON.stringify({ version, release: llama.llamaCppRelease.release, logProbs: Buffer.from(logs.buffer).toString("base64") }) + "\n",
  );
  process.stderr.write(`${name}\n`);
}
process.exit(0);
