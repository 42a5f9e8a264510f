// Writes tokenizer_ids.json: the ids that llama.cpp gives the lines of tokenizer_corpus.json under each pre-tokenizer; tokenizer_test.ts compares with it.
//
// Install the peer in a folder of its own, outside the project:
//   npm install --ignore-scripts node-llama-cpp@3.22.1
// Run from the project's root:
//   node tests/golden/tokenizer.mjs --model MODEL.gguf --modules FOLDER/node_modules
// MODEL is the default one. Its vocabulary serves all pre-tokenizers: copies of the file name another one, in a temporary folder.
// Special tokens spelled in a line are plain text, but under the key "special", which has them parsed (pre-tokenizer smollm).
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import process from "node:process";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";

const { values } = parseArgs({ options: { model: { type: "string" }, modules: { type: "string" } } });
const { getLlama } = await import(pathToFileURL(join(resolve(values.modules), "node-llama-cpp", "dist", "index.js")).href);
const folder = "tests/golden";
const lines = JSON.parse(await readFile(join(folder, "tokenizer_corpus.json"), "utf8"));
const model = await readFile(values.model);
const llama = await getLlama({ gpu: false, build: "never", maxThreads: 2 });
const scratch = await mkdtemp(join(tmpdir(), "tokenizer-"));

/** The string value of a key: where its length stands and the text. */
function valueOf(key) {
  const at = model.indexOf(Buffer.from(key)) + key.length + 4;
  const length = Number(model.readBigUInt64LE(at));
  return { at, length, text: model.toString("utf8", at + 8, at + 8 + length) };
}

/** The file with another pre-tokenizer; the model's name takes up the difference in length. */
function renamed(pre) {
  const edits = [["general.name", valueOf("general.name")], ["pre", valueOf("tokenizer.ggml.pre")]];
  const gap = edits[1][1].length - pre.length;
  const parts = [];
  let done = 0;
  for (const [key, { at, length }] of edits) {
    const text = key === "pre" ? pre : "x".repeat(length + gap);
    const size = Buffer.alloc(8);
    size.writeBigUInt64LE(BigInt(text.length));
    parts.push(model.subarray(done, at), size, Buffer.from(text));
    done = at + 8 + length;
  }
  return Buffer.concat([...parts, model.subarray(done)]);
}

const ids = {};
for (const pre of ["smollm", "gpt-2", "llama-bpe", "qwen2"]) {
  const path = join(scratch, "model.gguf");
  await writeFile(path, renamed(pre));
  const loaded = await llama.loadModel({ modelPath: path, vocabOnly: true });
  // Qwen2's own tokenizer brings text into NFC first; llama.cpp leaves that out.
  const form = (line) => pre === "qwen2" ? line.normalize("NFC") : line;
  ids[pre] = lines.map((line) => Array.from(loaded.tokenize(form(line), false)));
  if (pre === "smollm") ids.special = lines.map((line) => Array.from(loaded.tokenize(line, true)));
  await loaded.dispose();
}
await rm(scratch, { recursive: true });
const rows = Object.entries(ids).map(([pre, lists]) =>
  `${JSON.stringify(pre)}: [\n${lists.map((list) => JSON.stringify(list)).join(",\n")}\n]`
);
await writeFile(join(folder, "tokenizer_ids.json"), `{\n${rows.join(",\n")}\n}\n`);
process.exit(0);
