// Writes vocabularies/llamacpp.json: the ids, and of SentencePiece the texts, that llama.cpp gives the lines of tokenizer_corpus.json with the vocabularies of vocabularies.py as GGUF files, under each name of a pre-tokenizer; tokenizer_gguf_test.ts compares with it.
//
// Install the peer in a folder of its own, outside the project:
//   npm install --ignore-scripts node-llama-cpp@3.22.1
// Run from the project's root, after vocabularies.py:
//   node tests/golden/vocabularies.mjs --modules FOLDER/node_modules
// Ids are null where they are those of the kind's first case. Under `special`, by line, are those with special tokens parsed, where they differ.
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import process from "node:process";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";

const { values } = parseArgs({ options: { modules: { type: "string" } } });
const { getLlama } = await import(pathToFileURL(join(resolve(values.modules), "node-llama-cpp", "dist", "index.js")).href);
const folder = "tests/golden";
const read = async (name) => JSON.parse(await readFile(join(folder, name), "utf8"));
const lines = await read("tokenizer_corpus.json");
const bytes = await read("vocabularies/bytes.json");
const scores = await read("vocabularies/scores.json");
const llama = await getLlama({ gpu: false, build: "never", maxThreads: 2, logLevel: "error" });
const scratch = await mkdtemp(join(tmpdir(), "vocabularies-"));

/** Names of pre-tokenizers: the first of each group, whose splitting all of it have. */
const NAMES = [
  "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert exaone4 mpt olmo jais trillion granite-docling",
  "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
  "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
  "dbrx smaug-bpe glm4 chatglm-bpe",
  "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2",
  "qwen35",
  "default",
  "deepseek-llm",
  "deepseek-coder",
  "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
  "spark2_5",
  "youtu",
  "falcon",
  "bloom gpt3-finnish poro-chat",
  "viking",
  "jais-2",
  "tekken",
  "gpt-4o llama4 kanana2 talkie minimax-m2",
  "granite-embed-multi-97m",
  "tiny_aya cohere2moe",
  "superbpe",
  "bailingmoe bailingmoe2 llada-moe",
  "seed-coder",
  "ufakzeka",
  "minicpm5",
  "afmoe",
  "laguna",
  "exaone-moe",
  "chameleon",
  "kimi-k2",
].map((group) => group.split(" "));

/** Tokens matched in text, some of which overlap. */
const ADDED = [["<|endoftext|>", 3], ["<|im_start|>", 3], ["<|im_end|>", 3], ["user\nHi", 4], ["r\nHi<|im_", 4], ["<tool>", 4]];

const u32 = (n) => Buffer.from(Uint32Array.of(n).buffer);
const u64 = (n) => Buffer.from(BigUint64Array.of(BigInt(n)).buffer);
const text = (value) => Buffer.concat([u64(Buffer.byteLength(value)), Buffer.from(value)]);
const list = (type, items) => Buffer.concat([u32(9), u32(type), u64(items.length), ...items]);
const strings = (items) => list(8, items.map(text));
const floats = (items) => list(6, [Buffer.from(Float32Array.from(items).buffer)].flatMap((all) => items.map((_, i) => all.subarray(4 * i, 4 * i + 4))));
const ints = (items) => list(5, items.map((n) => Buffer.from(Int32Array.of(n).buffer)));
const bool = (value) => Buffer.concat([u32(7), Buffer.from([value ? 1 : 0])]);
const string = (value) => Buffer.concat([u32(8), text(value)]);
const number = (value) => Buffer.concat([u32(4), u32(value)]);

/** What llama.cpp asks of any model. */
const MODEL = {
  "general.architecture": string("llama"),
  "llama.context_length": number(64),
  "llama.embedding_length": number(32),
  "llama.block_count": number(1),
  "llama.feed_forward_length": number(32),
  "llama.attention.head_count": number(4),
  "llama.attention.layer_norm_rms_epsilon": Buffer.concat([u32(6), Buffer.from(Float32Array.of(1e-5).buffer)]),
};

/** The tensors of a model of one layer, all zero: llama.cpp loads none without them. */
function tensors(tokens) {
  const row = ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"].map((name) => [name, [32]]);
  const square = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"].map((name) => [`blk.0.${name}`, [32, 32]]);
  let offset = 0;
  const infos = [["token_embd", [32, tokens]], ...row, ...square].map(([name, shape]) => {
    const info = [text(`${name}.weight`), u32(shape.length), ...shape.map(u64), u32(0), u64(offset)];
    offset += 4 * shape.reduce((a, b) => a * b);
    return info;
  });
  return { infos, bytes: offset };
}

/** Loads a vocabulary, and runs the corpus. */
async function run(fields, tokens, first) {
  const decodes = fields["tokenizer.ggml.scores"] !== undefined;
  const pairs = Object.entries({ ...MODEL, ...fields, "tokenizer.ggml.tokens": strings(tokens) });
  const path = join(scratch, "vocabulary.gguf");
  const { infos, bytes } = tensors(tokens.length);
  const head = Buffer.concat([
    ...[Buffer.from("GGUF"), u32(3), u64(infos.length), u64(pairs.length)],
    ...pairs.flatMap(([key, value]) => [text(key), value]),
    ...infos.flat(),
  ]);
  await writeFile(path, Buffer.concat([head, Buffer.alloc(-head.length & 31), Buffer.alloc(bytes)]));
  const model = await llama.loadModel({ modelPath: path });
  const plain = lines.map((line) => Array.from(model.tokenize(line, false)));
  const special = lines.map((line) => Array.from(model.tokenize(line, true)));
  const decoded = plain.map((ids) => model.detokenize(ids, true));
  await model.dispose();
  const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
  const differing = (list, from) => Object.fromEntries(list.map((item, i) => [i, item]).filter(([i, item]) => !same(item, from[i])));
  return {
    ids: plain.map((ids, i) => first && same(ids, first.ids[i]) ? null : ids),
    special: differing(special, plain),
    // Of byte-level BPE llama.cpp leaves out blanks before signs: that is no decoding.
    ...(decodes && { decoded: differing(decoded, lines) }),
  };
}

const gpt2 = {};
const refused = {};
for (const group of NAMES) {
  for (const pre of group) {
    try {
      const found = await run({
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string(pre),
        "tokenizer.ggml.token_type": ints([...bytes.tokens.map(() => 1), ...ADDED.map(([, type]) => type)]),
        "tokenizer.ggml.merges": strings(bytes.merges),
        "tokenizer.ggml.bos_token_id": number(0),
        "tokenizer.ggml.eos_token_id": number(0),
      }, [...bytes.tokens, ...ADDED.map(([token]) => token)], gpt2["gpt-2"]);
      // Names of one group must split alike; only the first is kept.
      if (pre === group[0]) gpt2[pre] = found;
      else {
        const all = (one) => JSON.stringify(one.ids.map((ids, i) => ids ?? gpt2["gpt-2"].ids[i]));
        if (all(found) !== all(gpt2[group[0]])) console.error(`${pre} differs from ${group[0]}`);
      }
    } catch (error) {
      refused[pre] = String(error.message);
    }
  }
}
if (Object.keys(refused).length > 0) console.error(refused);

const spm = (first, change = {}, tokens = scores.tokens) => run({
  "tokenizer.ggml.model": string("llama"),
  "tokenizer.ggml.pre": string("default"),
  "tokenizer.ggml.scores": floats(scores.scores),
  "tokenizer.ggml.token_type": ints(scores.types),
  ...change,
}, tokens, first);
const first = await spm();
const llamas = {
  scores: first,
  "no prefix": await spm(first, { "tokenizer.ggml.add_space_prefix": bool(false) }),
  // Equal scores: the leftmost pair comes first.
  ties: await spm(first, { "tokenizer.ggml.scores": floats(scores.scores.map((score) => Math.floor(score / 64))) }),
  // Its last token is one that Phi-3 always has.
  "phi-3": await spm(first, { "general.name": string("Phi-3 mini"), "tokenizer.ggml.token_type": ints(scores.types.with(-1, 3)) }, [...scores.tokens.slice(0, -1), "<|endoftext|>"]),
};

await rm(scratch, { recursive: true });
const rows = (cases) => Object.entries(cases).map(([name, value]) => `${JSON.stringify(name)}: ${JSON.stringify(value)}`).join(",\n");
await writeFile(
  join(folder, "vocabularies", "llamacpp.json"),
  `{\n"names": ${JSON.stringify(NAMES)},\n"added": ${JSON.stringify(ADDED)},\n"gpt2": {\n${rows(gpt2)}\n},\n"llama": {\n${rows(llamas)}\n}\n}\n`,
);
process.exit(0);
