/** Tests of the tokenizer of a Hugging Face folder: small vocabularies against PyPI tokenizers and transformers, and files that are wrong. */

import {
  assert,
  assertEquals,
  assertRejects,
  assertStringIncludes,
} from "@std/assert";
import { afterAll, beforeAll, describe, it } from "@std/testing/bdd";
import { Random } from "../src/evaluate/tasks/random.ts";
import { FormatError } from "../src/formats/error.ts";
import { openModelFile } from "../src/models/file.ts";
import { openNative } from "../src/tokenizer/addon.ts";
import { spellBytes } from "../src/tokenizer/byte_map.ts";
import { tokenizerFromFolder } from "../src/tokenizer/hugging_face.ts";
import { TextStream, type Tokenizer } from "../src/tokenizer/tokenizer.ts";

const golden = new URL("golden/", import.meta.url);
const ROWS = 4096;

// deno-lint-ignore no-explicit-any
type Any = any;

/** A vocabulary that was trained for the tests. */
interface Vocabulary {
  tokens: string[];
  /** Of BPE. */
  merges?: string[];
  /** Of Unigram. */
  scores?: number[];
}

/** A way to use it, and what PyPI tokenizers gives the corpus with it. */
interface Case {
  pre_tokenizer: unknown;
  normalizer: unknown;
  tokens: { content: string }[];
  model: Record<string, unknown>;
  decoder: unknown;
  /** Ids of each line, null where they are those of the first case. */
  ids: (number[] | null)[];
  /** Ids with special tokens, by line, where they differ. */
  special: Record<string, number[]>;
  /** Text of the ids, by line, where it is not the line. */
  decoded: Record<string, string>;
}

async function read(name: string): Promise<Any> {
  return JSON.parse(await Deno.readTextFile(new URL(name, golden)));
}

const folders: string[] = [];

/** Writes a folder's files; text as it is, other values as JSON. */
async function folderOf(files: Record<string, unknown>): Promise<string> {
  const folder = await Deno.makeTempDir();
  folders.push(folder);
  for (const [name, value] of Object.entries(files)) {
    await Deno.writeTextFile(
      `${folder}/${name}`,
      typeof value === "string" ? value : JSON.stringify(value),
    );
  }
  return folder;
}

/** A tokenizer.json, as golden/vocabularies.py puts it together. */
function compose(
  vocabulary: Vocabulary,
  parts: Pick<
    Case,
    "pre_tokenizer" | "normalizer" | "tokens" | "model" | "decoder"
  >,
): Any {
  const ids = new Map(vocabulary.tokens.map((token, id) => [token, id]));
  const added_tokens = parts.tokens.map((token) => {
    const id = ids.get(token.content) ?? ids.size;
    ids.set(token.content, id);
    return { id, ...token };
  });
  const { pre_tokenizer, normalizer, decoder } = parts;
  return {
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens,
    normalizer,
    pre_tokenizer,
    post_processor: null,
    decoder,
    model: vocabulary.scores
      ? {
        type: "Unigram",
        unk_id: 0,
        ...parts.model,
        vocab: vocabulary.tokens
          .map((token, id) => [token, vocabulary.scores![id]]),
      }
      : {
        type: "BPE",
        dropout: null,
        unk_token: null,
        ...parts.model,
        vocab: Object.fromEntries(
          vocabulary.tokens.map((token, id) => [token, id]),
        ),
        merges: [...vocabulary.merges!],
      },
  };
}

async function open(
  files: Record<string, unknown>,
  endTokens?: number[],
): Promise<Tokenizer> {
  const folder = await folderOf(files);
  return (await tokenizerFromFolder(folder, { rows: ROWS, endTokens }))!;
}

/** The text of ids, token by token. */
function streamed(tokenizer: Tokenizer, ids: readonly number[]): string {
  const stream = new TextStream(tokenizer);
  return ids.map((id) => stream.push(id)).join("") + stream.flush();
}

const lines: string[] = await read("tokenizer_corpus.json");
const bytes: Vocabulary = await read("vocabularies/bytes.json");
const texts: Vocabulary = await read("vocabularies/text.json");
const unigrams: Vocabulary = await read("vocabularies/unigram.json");
const vocabularies = { bytes, text: texts, unigram: unigrams };
const cases = {
  bytes: await read("vocabularies/bytes_ids.json") as Record<string, Case>,
  text: await read("vocabularies/text_ids.json") as Record<string, Case>,
  unigram: await read("vocabularies/unigram_ids.json") as Record<string, Case>,
};

afterAll(async () => {
  for (const folder of folders) await Deno.remove(folder, { recursive: true });
});

describe("tokenizer.json against PyPI tokenizers", () => {
  for (const kind of ["bytes", "text", "unigram"] as const) {
    const vocabulary = vocabularies[kind];
    const [first] = Object.values(cases[kind]);
    for (const [name, golden] of Object.entries(cases[kind])) {
      describe(name, () => {
        let tokenizer: Tokenizer;
        const plain = lines.map((_, i) => golden.ids[i] ?? first!.ids[i]!);

        beforeAll(async () => {
          const file = compose(vocabulary, golden);
          tokenizer = await open({ "tokenizer.json": file });
        });

        afterAll(() => tokenizer?.close());

        it("gives the same ids", async () => {
          for (const [i, line] of lines.entries()) {
            const text = JSON.stringify(line);
            const found = await tokenizer.encode(line);
            // PyPI tokenizers' Unigram makes special tokens of plain text.
            const named = tokenizer.specialTokens.some((token) =>
              line.includes(token)
            );
            if (kind === "unigram" && named) {
              assert(!found.includes(1) && !found.includes(2), text);
            } else assertEquals(found, plain[i], text);
            assertEquals(
              await tokenizer.encode(line, { special: true }),
              golden.special[i] ?? plain[i],
              text,
            );
          }
        });

        it("gives the same text, at once and token by token", () => {
          for (const [i, line] of lines.entries()) {
            const text = golden.decoded[i] ?? line;
            // Bytes that are no UTF-8 are marked by another rule there.
            if (text.includes("\ufffd") && !line.includes("\ufffd")) continue;
            assertEquals(tokenizer.decode(plain[i]!), text);
            assertEquals(streamed(tokenizer, plain[i]!), text);
          }
        });

        it("gives a long text, cut, the ids of the whole", async () => {
          const text = lines.join(" a ").repeat(30);
          assert(text.length > 96 * 1024);
          const file = JSON.stringify(compose(vocabulary, golden));
          const whole = await (await openNative(file)).encode(text, null, {
            addSpecialTokens: false,
          });
          assertEquals(
            await tokenizer.encode(text, { special: true }),
            whole.getIds(),
          );
        });
      });
    }
  }
});

describe("special tokens of a folder", () => {
  it("are those that transformers finds", async () => {
    const golden: Record<string, Any> = await read("vocabularies/configs.json");
    for (const [name, known] of Object.entries(golden)) {
      const file = compose(texts, cases.text["llama"]!);
      file.post_processor = known.post_processor;
      using tokenizer = await open({
        "tokenizer.json": file,
        "tokenizer_config.json": known.config,
      });
      // Where no name is given, the template's first token counts here.
      const bos = known.bos ?? (known.post_processor && 1);
      assertEquals(
        [tokenizer.bos, tokenizer.eos, tokenizer.addBos],
        [bos, known.eos, known.addBos],
        name,
      );
    }
  });

  it("begin a text where a file without a template asks for it", async () => {
    for (
      const [config, bos, addBos] of [
        [{ bos_token: "<s>", add_bos_token: true }, 1, true],
        [{ bos_token: "<s>", add_bos_token: false }, 1, false],
        [{ add_bos_token: true }, null, false],
      ]
    ) {
      using tokenizer = await open({
        "tokenizer.json": compose(texts, cases.text["llama"]!),
        "tokenizer_config.json": config,
      });
      assertEquals([tokenizer.bos, tokenizer.addBos], [bos, addBos]);
    }
  });

  it("end generation by any of the three files", async () => {
    const file = compose(texts, cases.text["llama"]!);
    const config = { eos_token: "</s>" };
    const ends = async (
      generation: unknown,
      fromConfig?: number[],
    ): Promise<number[]> => {
      using tokenizer = await open({
        "tokenizer.json": file,
        "tokenizer_config.json": config,
        "generation_config.json": { eos_token_id: generation },
      }, fromConfig);
      return [...tokenizer.endTokens];
    };
    assertEquals(await ends(null), [2]);
    assertEquals(await ends(300), [2, 300]);
    assertEquals(await ends([300, 301], [302]), [2, 300, 301, 302]);
    using bare = await open({ "tokenizer.json": file }, [7]);
    assertEquals([bare.eos, [...bare.endTokens]], [7, [7]]);
  });

  it("T13 take bos and eos that are absent and refuse lists", async () => {
    for (const key of ["bos_token", "eos_token"]) {
      for (const value of [["<s>"], 1, true, "no token"]) {
        await refuses({ "tokenizer_config.json": { [key]: value } }, {
          file: "tokenizer_config.json",
          field: key,
          message: "expected",
        });
      }
    }
    await refuses({ "tokenizer_config.json": { eos_token: { id: 2 } } }, {
      file: "tokenizer_config.json",
      field: "eos_token.content",
      message: "Found nothing, expected a string",
    });
    await refuses({ "tokenizer_config.json": { add_bos_token: "yes" } }, {
      file: "tokenizer_config.json",
      field: "add_bos_token",
      message: 'Found "yes", expected true or false',
    });
  });

  it("T12 refuse ids of no token", async () => {
    for (const id of [ROWS, -1, 1.5, "2", [1, ROWS]]) {
      await refuses({ "generation_config.json": { eos_token_id: id } }, {
        file: "generation_config.json",
        field: "eos_token_id",
        message: `expected token ids from 0 to ${ROWS - 1}`,
      });
    }
    await refusesChange(
      (file) => file.added_tokens.push({ id: ROWS, content: "<new>" }),
      { field: "model.vocab", message: `Token "<new>" has id ${ROWS}` },
    );
  });
});

/** Where a file is wrong, and how. */
interface Wrong {
  file?: string;
  field: string;
  message: string;
}

/** Asserts that a folder is refused. */
async function refuses(
  files: Record<string, unknown>,
  { file = "tokenizer.json", field, message }: Wrong,
): Promise<void> {
  const folder = await folderOf({
    "tokenizer.json": compose(texts, cases.text["llama"]!),
    ...files,
  });
  const error = await assertRejects(
    () => tokenizerFromFolder(folder, { rows: ROWS }),
    FormatError,
  );
  assertStringIncludes(error.message, `${folder}/${file}: ${error.field}: `);
  assertEquals([error.file, error.field], [`${folder}/${file}`, field]);
  assertStringIncludes(error.message, message);
}

/** Asserts that a tokenizer.json with something changed is refused. */
async function refusesChange(
  change: (file: Any) => void,
  wrong: Wrong,
): Promise<void> {
  const file = compose(texts, cases.text["llama"]!);
  change(file);
  await refuses({ "tokenizer.json": file }, wrong);
}

describe("a tokenizer.json that is wrong", () => {
  const size = texts.tokens.length;
  const byteLevel = compose(bytes, cases.bytes["llama3"]!);

  it("T01 is refused for a merge into no token", async () => {
    await refusesChange((file) => file.model.merges.push("the the"), {
      field: "model.merges",
      message: `Merge ${texts.merges!.length} "the the" needs "thethe"`,
    });
    await refusesChange((file) => file.model.merges.push(["▁a", "▁a"]), {
      field: "model.merges",
      message: 'needs "▁a▁a"',
    });
  });

  it("T02 is refused for a regular expression that is not known", async () => {
    const evil = [
      "(a+)+$",
      "(?:a|a)*b",
      "\\s+(a+)+$|\\s+",
      "\\s+|".repeat(40) + "\\s+",
      // Half of a pattern, which takes the square of a run's time.
      "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+|\\s+",
      "",
    ];
    for (const expression of evil) {
      const split = {
        type: "Split",
        pattern: { Regex: expression },
        behavior: "Isolated",
        invert: false,
      };
      await refusesChange((file) => file.pre_tokenizer = split, {
        field: "pre_tokenizer.pattern.Regex",
        message: "expected a regular expression of a model family",
      });
      await refusesChange(
        (file) =>
          file.normalizer = {
            type: "Replace",
            pattern: { Regex: expression },
            content: " ",
          },
        {
          field: "normalizer.pattern",
          message: "expected a text to look for",
        },
      );
    }
  });

  it("T03 is refused for a template with an unknown token", async () => {
    const template = (id: string, ids?: unknown): unknown => ({
      type: "TemplateProcessing",
      single: [{ SpecialToken: { id, type_id: 0 } }, {
        Sequence: { id: "A", type_id: 0 },
      }],
      pair: [],
      special_tokens: ids ? { [id]: { id, ids, tokens: [id] } } : {},
    });
    const field = "post_processor.single.0.SpecialToken.id";
    for (const id of ["[NOPE]", "<s>", "__proto__"]) {
      await refusesChange((file) => file.post_processor = template(id), {
        field,
        message: `Found "${id}", expected one of special_tokens`,
      });
    }
    await refusesChange(
      (file) => file.post_processor = template("<s>", [size + 100]),
      {
        field: "post_processor.special_tokens.<s>.ids",
        message: "expected token ids from 0 to",
      },
    );
    await refusesChange((file) => file.post_processor = { type: "Evil" }, {
      field: "post_processor.type",
      message: 'Found "Evil", expected one of BertProcessing',
    });
  });

  it("T04 is refused for ids without a row in the embedding", async () => {
    for (const id of [4294967295, -1, 0.5, "7", null]) {
      await refusesChange((file) => file.model.vocab["the"] = id, {
        field: "model.vocab",
        message: `Token "the" has id ${typeof id === "number" ? id : NaN}`,
      });
    }
    const folder = await folderOf({ "tokenizer.json": byteLevel });
    const error = await assertRejects(
      () => tokenizerFromFolder(folder, { rows: 100 }),
      FormatError,
    );
    assertStringIncludes(error.message, "tokens, expected 1 to 100, the rows");
  });

  it("T06 is refused when it is cut short or no JSON", async () => {
    const whole = JSON.stringify(byteLevel);
    for (const length of [0, 1, 100, whole.length >> 1, whole.length - 1]) {
      const folder = await folderOf({
        "tokenizer.json": whole.slice(0, length),
      });
      await assertRejects(
        () => tokenizerFromFolder(folder, { rows: ROWS }),
        FormatError,
        `${folder}/tokenizer.json`,
      );
    }
    for (const text of ["[]", "null", "{} {}", '{"a":1,"a":1}', "\ufeff{}"]) {
      const folder = await folderOf({ "tokenizer.json": text });
      await assertRejects(
        () => tokenizerFromFolder(folder, { rows: ROWS }),
        FormatError,
      );
    }
  });

  it("T07 is refused for ids with gaps", async () => {
    await refusesChange((file) => file.model.vocab["new"] = size + 1, {
      field: "model.vocab",
      message: `Token "new" has id ${size + 1}, expected 0 to ${size}`,
    });
    await refusesChange(
      (file) => file.added_tokens.push({ id: size + 9, content: "<new>" }),
      { field: "model.vocab", message: "without gaps" },
    );
  });

  it("T08 is refused for two tokens of one id, or two ids", async () => {
    await refusesChange((file) => file.model.vocab["new"] = 5, {
      field: "model.vocab",
      message: 'and "new" both have id 5',
    });
    await refusesChange(
      (file) => file.added_tokens.push({ id: size, content: "<s>" }),
      { field: "model.vocab", message: `Token "<s>" has ids 1 and ${size}` },
    );
    await refusesChange(
      (file) => file.added_tokens.push({ id: 1, content: "<new>" }),
      { field: "model.vocab", message: "both have id 1" },
    );
  });

  it("T09 is refused for a merge of what is no token or no pair", async () => {
    for (const merge of ["zzzz a", ["a", "zzzz"], "ა ბ"]) {
      await refusesChange((file) => file.model.merges[3] = merge, {
        field: "model.merges",
        message: "Merge 3",
      });
    }
    for (const merge of ["a", "", "a b c", ["a"], ["a", "b", "c"], []]) {
      await refusesChange((file) => file.model.merges[0] = merge, {
        field: "model.merges",
        message: "is no pair",
      });
    }
    for (const merges of [{}, "a b", [1], [["a", 1]], undefined]) {
      await refusesChange((file) => file.model.merges = merges, {
        field: "model.merges",
        message: "expected a list of pairs",
      });
    }
    await refusesChange((file) => file.model.merges[0] = ["<0xE2>", "<0x96>"], {
      field: "model.merges",
      message: "of type 6",
    });
  });

  it("T10 is refused for a part that is not known, by its name", async () => {
    for (const type of ["Evil", "Precompiled", "BertNormalizer"]) {
      await refusesChange((file) => file.normalizer = { type }, {
        field: "normalizer.type",
        message: `Found "${type}", expected a normalizer that is known: NFC,`,
      });
    }
    for (const type of ["Evil", "BertPreTokenizer", "UnicodeScripts"]) {
      await refusesChange((file) => file.pre_tokenizer = { type }, {
        field: "pre_tokenizer.type",
        message: `Found "${type}", expected a pre-tokenizer that is known`,
      });
    }
    for (const type of ["Evil", "WordPiece", "CTC"]) {
      await refusesChange((file) => file.decoder = { type }, {
        field: "decoder.type",
        message: `Found "${type}", expected a decoder that is known`,
      });
    }
    for (const type of ["WordPiece", "WordLevel", "Evil"]) {
      await refusesChange((file) => file.model.type = type, {
        field: "model.type",
        message: `Found "${type}", expected`,
      });
    }
    const nested = {
      type: "Sequence",
      pretokenizers: [{ type: "Digits" }, { type: "Whitespace" }],
    };
    await refusesChange((file) => file.pre_tokenizer = nested, {
      field: "pre_tokenizer.pretokenizers.1.type",
      message: 'Found "Whitespace"',
    });
    await refusesChange((file) => file.decoder = null, {
      field: "decoder",
      message: "expected a decoder that turns ▁ into a blank",
    });
    const spelled = { ...byteLevel, decoder: { type: "Fuse" } };
    await refuses({ "tokenizer.json": spelled }, {
      field: "decoder.type",
      message: 'Found "Fuse", expected ByteLevel',
    });
  });

  it("T11 is refused for 100 MB of added tokens", async () => {
    const one = `{"id":1,"content":"${"x".repeat(1000)}"},`;
    const folder = await folderOf({
      "tokenizer.json": `{"added_tokens":[${one.repeat(1e5)}null]}`,
    });
    await assertRejects(
      () => tokenizerFromFolder(folder, { rows: ROWS }),
      FormatError,
      "bytes, expected at most 100000000",
    );
    const many = Array.from({ length: 2000 }, (_, i) => ({
      id: size + i,
      content: `${i}`.padEnd(1000, "x"),
    }));
    await refusesChange((file) => file.added_tokens.push(...many), {
      field: "added_tokens",
      message: "expected at most 262144",
    });
  });

  it("is refused for a normalizer that grows a text without end", async () => {
    const replace = (content: string): unknown => ({
      type: "Replace",
      pattern: { String: "a" },
      content,
    });
    for (
      const normalizers of [
        [replace("aaa"), replace("aaa")],
        [replace("a".repeat(100))],
        Array(9).fill(replace("b")),
      ]
    ) {
      await refusesChange(
        (file) => file.normalizer = { type: "Sequence", normalizers },
        {
          field: "normalizer.type",
          message: "expected at most 8 steps, which put in at most 8",
        },
      );
    }
  });

  it("is refused for Unigram scores or an unknown token that are wrong", async () => {
    for (
      const [key, value] of [
        ["vocab", {}],
        ["vocab", [["a", 1], ["b"]]],
        ["vocab", [["a", "1"]]],
        ["vocab", ["a"]],
        ["unk_id", null],
        ["unk_id", 4096],
        ["unk_id", -1],
      ] as const
    ) {
      const file = compose(unigrams, cases.unigram["unigram"]!);
      file.model[key] = value;
      await refuses({ "tokenizer.json": file }, {
        field: `model.${key}`,
        message: "expected",
      });
    }
  });

  it("is refused for settings that would change what it does", async () => {
    for (
      const [key, value] of [
        ["dropout", 0.1],
        ["continuing_subword_prefix", "##"],
        ["end_of_word_suffix", "</w>"],
        ["unk_token", "no token"],
        ["ignore_merges", "yes"],
        ["vocab", []],
      ] as const
    ) {
      await refusesChange((file) => file.model[key] = value, {
        field: `model.${key}`,
        message: "expected",
      });
    }
    await refusesChange((file) => delete file.model, {
      field: "model",
      message: "Found nothing, expected an object",
    });
    await refusesChange((file) => file.added_tokens = [1], {
      field: "added_tokens.0",
      message: "Found 1, expected an object",
    });
  });
});

/** What a value of a file is changed to. */
const OTHERS: unknown[] = [
  ...[null, true, false, 0, 1, -1, 4294967295, 0.5, [], {}, ["a", "b"]],
  ..."a|▁|<s>|(a+)+$|Sequence|ByteLevel|Metaspace|NFC|Split|always|first|Isolated"
    .split("|"),
  ...["", " ", { String: " " }, { Regex: "\\s+" }, { type: "Digits" }],
];

/** Changes one value somewhere in a file, seldom in its vocabulary. */
function mutate(file: Any, next: (n: number) => number): void {
  for (let parent = file;;) {
    const keys = Object.keys(parent);
    const key = keys[next(keys.length)]!;
    const child = parent[key];
    const deeper = child !== null && typeof child === "object" &&
      Object.keys(child).length > 0 && next(8) > 0;
    if (deeper) parent = child;
    else {
      if (next(4) === 0 && !Array.isArray(parent)) delete parent[key];
      else parent[key] = structuredClone(OTHERS[next(OTHERS.length)]);
      return;
    }
  }
}

describe("a tokenizer.json that was changed somewhere", () => {
  for (const kind of ["bytes", "text", "unigram"] as const) {
    it(`is refused by name or works: ${kind}`, async () => {
      const random = new Random(1, kind);
      const next = (n: number): number => random.below(n);
      const known = Object.values(cases[kind]);
      let worked = 0;
      for (let i = 0; i < 300; i++) {
        const file = compose(
          vocabularies[kind],
          structuredClone(known[next(known.length)]!),
        );
        for (let changes = next(3); changes >= 0; changes--) mutate(file, next);
        try {
          using tokenizer = await open({ "tokenizer.json": file });
          const line = lines[next(lines.length)]!;
          tokenizer.decode(await tokenizer.encode(line, { special: true }));
          worked++;
        } catch (error) {
          assert(error instanceof FormatError, `${i}: ${error}`);
        }
      }
      assert(worked > 10 && worked < 290, `${worked}`);
    });
  }
});

describe("Tokenizer of a tokenizer.json", () => {
  let llama: Tokenizer;
  let llama3: Tokenizer;

  beforeAll(async () => {
    llama = await open({
      "tokenizer.json": compose(texts, cases.text["llama"]!),
    });
    llama3 = await open({
      "tokenizer.json": compose(bytes, cases.bytes["llama3"]!),
    });
  });

  afterAll(() => {
    llama?.close();
    llama3?.close();
  });

  it("T05 takes millions of characters, T14 one without a blank", async () => {
    const text = "the cat sat. ".repeat(2e5);
    const ids = await llama3.encode(text);
    assertEquals(llama3.decode(ids) === text, true);
    for (const tokenizer of [llama, llama3]) {
      const run = "ab".repeat(5e5);
      const found = await tokenizer.encode(run);
      assertEquals(tokenizer.decode(found) === run, true);
    }
  });

  it("T14 refuses runs that some patterns would take minutes for", async () => {
    for (
      const [expression, run] of [
        ["\\d{1,3}(?=(?:\\d{3})*\\b)", "1"],
        ["\\s*[\\r\\n]+", " "],
      ] as const
    ) {
      const file = compose(bytes, {
        ...cases.bytes["llama3"]!,
        pre_tokenizer: {
          type: "Sequence",
          pretokenizers: [
            {
              type: "Split",
              pattern: { Regex: expression },
              behavior: "Isolated",
            },
            { type: "ByteLevel", use_regex: false },
          ],
        },
      });
      using tokenizer = await open({ "tokenizer.json": file });
      const text = run.repeat(4096);
      assertEquals(tokenizer.decode(await tokenizer.encode(text)), text);
      await assertRejects(
        () => tokenizer.encode(text + run),
        RangeError,
        "more than 4096 digits or blanks in a row",
      );
    }
  });

  it("T14 takes lone surrogates and NUL", async () => {
    for (const tokenizer of [llama, llama3]) {
      const ids = await tokenizer.encode("a\ud800b\udc00\0");
      assertEquals(tokenizer.decode(ids), "a\ufffdb\ufffd\0");
    }
  });

  it("T15 refuses ids of no token", () => {
    for (const id of [-1, 2 ** 31, llama.size, 0.5, NaN]) {
      for (const read of [() => llama.piece(id), () => llama.decode([id])]) {
        try {
          read();
        } catch (error) {
          assert(error instanceof RangeError);
          assertStringIncludes(error.message, `Token id is ${id}`);
          continue;
        }
        throw new Error(`Token id ${id} was taken`);
      }
    }
  });

  it("gives bytes of byte tokens, and blanks unless a text begins", () => {
    const id = (token: string): number => texts.tokens.indexOf(token);
    assertEquals(llama.piece(id("<0xE2>")), Uint8Array.of(0xe2));
    assertEquals(llama.piece(id("▁a")), new TextEncoder().encode(" a"));
    assertEquals(llama.piece(id("▁a"), true), new TextEncoder().encode("a"));
    assertEquals(llama.decode([id("▁a"), id("▁a")]), "a a");
    const stream = new TextStream(llama, { continues: true });
    assertEquals(stream.push(id("▁a")), " a");
    assertEquals(
      [0xe2, 0x96, 0x81].map((byte) =>
        stream.push(id(`<0x${byte.toString(16).toUpperCase()}>`))
      ),
      ["", "", "▁"],
    );
  });

  it("puts no blank before a text that goes on", async () => {
    const [a, blank] = [texts.tokens.indexOf("a"), texts.tokens.indexOf("▁a")];
    assertEquals(await llama.encode("a"), [blank]);
    assertEquals(await llama.encode("a", { continues: true }), [a]);
    assertEquals(await llama.encode(" a", { continues: true }), [blank]);
    assertEquals(
      await llama.encode("a<s>a", { continues: true, special: true }),
      [a, 1, blank],
    );
  });

  it("leaves special tokens text in literal stretches", async () => {
    const [a, blank] = [texts.tokens.indexOf("a"), texts.tokens.indexOf("▁a")];
    const ids = await llama.encode("<s>a<s>a", {
      special: true,
      literal: [[4, 7]],
    });
    assertEquals(ids.slice(0, 2), [1, blank]);
    assertEquals(ids.at(-1), a);
    assert(!ids.slice(1).includes(1));
    assertEquals(llama.specialTokens, ["<unk>", "<s>", "</s>"]);
  });

  it("leaves out last tokens that the model has no row for", async () => {
    const file = compose(texts, cases.text["llama-first"]!);
    const size = texts.tokens.length;
    file.added_tokens.push(
      { id: size, content: "<image>", special: true },
      { id: size + 1, content: "<sound>", special: true },
    );
    const folder = await folderOf({ "tokenizer.json": file });
    const text = "a<image>b<sound>";
    for (const rows of [size, size + 1, size + 2]) {
      using tokenizer = (await tokenizerFromFolder(folder, { rows }))!;
      assertEquals(tokenizer.size, rows);
      const ids = await tokenizer.encode(text, { special: true });
      assert(ids.every((id) => id < rows));
      assertEquals(ids.includes(size), rows > size);
      assertEquals(ids.includes(size + 1), rows > size + 1);
      assertEquals(tokenizer.decode(ids), text);
    }
    await assertRejects(
      () => tokenizerFromFolder(folder, { rows: size - 1 }),
      FormatError,
      `Found ${size} tokens, expected 1 to ${size - 1}`,
    );
  });

  it("spells every byte", async () => {
    const ids = await llama3.encode("é");
    const spelled = ids.map((id) => spellBytes(llama3.piece(id))).join("");
    assertEquals(spelled, "Ã©");
  });

  it("comes with the folder of a model", async () => {
    const model = new URL("models/llama/", golden);
    const folder = await folderOf({
      "tokenizer.json": compose(
        { tokens: bytes.tokens.slice(0, 256), merges: [] },
        cases.bytes["deepseek-v3"]!,
      ),
    });
    for (const name of ["config.json", "model.safetensors"]) {
      await Deno.copyFile(new URL(name, model), `${folder}/${name}`);
    }
    using file = await openModelFile(folder);
    using tokenizer = await file.tokenizer();
    assertEquals(tokenizer.decode(await tokenizer.encode("naïve")), "naïve");
    assertEquals([...tokenizer.endTokens], file.config.endTokens);
    await Deno.remove(`${folder}/tokenizer.json`);
    using none = await file.tokenizer();
    await assertRejects(
      () => none.encode("a"),
      RangeError,
      "This folder has no tokenizer.json, which text needs",
    );
  });

  it("is null for a folder without the file", async () => {
    assertEquals(
      await tokenizerFromFolder(await folderOf({}), { rows: ROWS }),
      null,
    );
  });
});
