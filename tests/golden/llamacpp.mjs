// Writes llamacpp.json: what llama.cpp on the CPU continues six prompts with, greedily; the runner's tests compare with it.
//
// Install the peer in a folder of its own, outside the project:
//   npm install --ignore-scripts node-llama-cpp@3.22.1
// Run from the project's root:
//   node tests/golden/llamacpp.mjs --model MODEL.gguf --modules FOLDER/node_modules [--out FILE]
// Prompts are raw text: no chat template, no special token added, special tokens spelled in them are plain text.
import { readFile, writeFile } from "node:fs/promises";
import { join, resolve } from "node:path";
import process from "node:process";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";

const TOKENS = 64;

const PROMPTS = [
  ["story", "Once upon a time, in a village at the foot of a mountain, there lived a clockmaker who"],
  ["code", 'def fibonacci(n: int) -> list[int]:\n    """Return the first n Fibonacci numbers."""\n'],
  ["list", "Things to bring on a winter hike:\n1. A warm coat\n2. A map and a compass\n3."],
  ["dialogue", '"Where have you been?" asked Anna.\n\n"At the harbour," said Tom. "The ship from Lisbon has come in."\n\n"And was he on it?"\n\n'],
  [
    "passage",
    "The lighthouse stood on the last rock of the cape, and for sixty years the same family had kept its lamp. " +
    "The grandfather had carried the oil up the stairs in two tin cans, one hundred and ninety-six steps every evening, and he had written the weather of each night into a ledger bound in grey cloth. " +
    "His daughter had seen the first electric bulb screwed into the old brass holder; she had wept a little, and then she had slept through a whole night for the first time since her childhood. " +
    "She kept the ledger all the same. Wind from the north-west, force seven. Two trawlers, one coaster, a yacht with a torn sail. Fog until four in the morning. " +
    "Her son Henrik learned to read from those pages, and when the ministry sent a letter to say that the lamp would be switched by a computer in the capital, he asked only whether somebody would still write down the weather. " +
    "Nobody answered that question. A man in a blue jacket came in May, bolted a white box to the wall, drank a cup of coffee, and went away again with the evening boat. " +
    "From that day on the light came on by itself. Henrik still climbed the stairs. He told the people in the village that he did it for his knees, and they nodded, since everybody on the cape had something that he did for his knees. " +
    "In the ledger the entries grew longer. He wrote down the birds that struck the glass, the colour of the sea, the names of the ships as long as he could read them through the telescope. " +
    "Then, on a night in late October, with a storm coming up from the south, the white box on the wall began to hum, and the light went out. Henrik",
  ],
  ["german", "Die Stadt Heidelberg liegt am Neckar und ist bekannt für ihre Universität und ihr Schloss. Im Sommer"],
];

const { values } = parseArgs({
  options: {
    model: { type: "string" },
    modules: { type: "string", default: "node_modules" },
    out: { type: "string", default: "tests/golden/llamacpp.json" },
    // Prints the ids of a text file as JSON and stops: the other goldens take their tokens from here.
    tokenize: { type: "string" },
  },
});
if (values.model === undefined) throw new TypeError("--model is missing");

const folder = join(resolve(values.modules), "node-llama-cpp");
const { getLlama } = await import(pathToFileURL(join(folder, "dist/index.js")).href);
const version = JSON.parse(await readFile(join(folder, "package.json"), "utf8")).version;
const llama = await getLlama({ gpu: false, build: "never", maxThreads: 1, skipDownload: true });
const model = await llama.loadModel({ modelPath: values.model });

if (values.tokenize !== undefined) {
  const text = await readFile(values.tokenize, "utf8");
  process.stdout.write(JSON.stringify(Array.from(model.tokenize(text, false))) + "\n");
  process.exit(0);
}

const rows = [];
for (const [name, prompt] of PROMPTS) {
  const promptTokens = Array.from(model.tokenize(prompt, false));
  const context = await model.createContext({ contextSize: 1024, threads: 1 });
  const tokens = [];
  for await (
    const token of context.getSequence().evaluate(promptTokens, {
      temperature: 0,
      yieldEogToken: true,
    })
  ) {
    tokens.push(Number(token));
    if (tokens.length === TOKENS) break;
  }
  await context.dispose();
  process.stderr.write(`${name}: ${promptTokens.length} + ${tokens.length}: ${JSON.stringify(model.detokenize(tokens))}\n`);
  rows.push({ name, prompt, promptTokens, tokens });
}
const lines = rows.map((row) => "    " + JSON.stringify(row)).join(",\n");
await writeFile(
  values.out,
  `{\n  "peer": "llama.cpp ${llama.llamaCppRelease?.release ?? ""}, node-llama-cpp ${version}, CPU",\n  "prompts": [\n${lines}\n  ]\n}\n`,
);
process.exit(0);
