/** Tests of GGUF vocabularies of every kind and name against llama.cpp, and of what is refused. */

import { assert, assertEquals, assertRejects } from "@std/assert";
import {
  afterAll,
  afterEach,
  beforeEach,
  describe,
  it,
} from "@std/testing/bdd";
import { FormatError } from "../src/formats/error.ts";
import { GgufFile } from "../src/formats/gguf.ts";
import { validateBpe } from "../src/tokenizer/bpe.ts";
import { tokenizerFromGguf } from "../src/tokenizer/gguf.ts";
import { PRE_TOKENIZERS } from "../src/tokenizer/pre_tokenizers.ts";
import { SentencePieceEncoder } from "../src/tokenizer/sentence_piece.ts";
import { TextStream, type Tokenizer } from "../src/tokenizer/tokenizer.ts";
import {
  f32s,
  type FieldValue,
  ggufBytes,
  i32s,
  strings,
  u32,
} from "./gguf_writer.ts";

/** What llama.cpp gives the corpus. */
interface Case {
  /** Ids of each line, null where they are those of the first case. */
  ids: (number[] | null)[];
  /** Ids with special tokens, by line, where they differ. */
  special: Record<string, number[]>;
  /** Text of the ids, by line, where it is not the line. */
  decoded?: Record<string, string>;
}

const golden = new URL("golden/", import.meta.url);
const read = async (name: string) =>
  JSON.parse(await Deno.readTextFile(new URL(name, golden)));
const lines: string[] = await read("tokenizer_corpus.json");
const bytes: { tokens: string[]; merges: string[] } = await read(
  "vocabularies/bytes.json",
);
const scores: { tokens: string[]; scores: number[]; types: number[] } =
  await read("vocabularies/scores.json");
const llamaCpp: {
  names: string[][];
  added: [string, number][];
  gpt2: Record<string, Case>;
  llama: Record<string, Case>;
} = await read("vocabularies/llamacpp.json");

const files: string[] = [];

/** The tokenizer of a file with these fields. */
async function open(
  fields: Record<string, FieldValue | undefined>,
): Promise<Tokenizer> {
  const path = await Deno.makeTempFile({ suffix: ".gguf" });
  files.push(path);
  const metadata = Object.entries(fields).flatMap(([key, value]) =>
    value === undefined ? [] : [[key, value] as const]
  );
  await Deno.writeFile(path, ggufBytes({ metadata }));
  using file = await GgufFile.open(path);
  return await tokenizerFromGguf(file, { rows: 4096 });
}

function openGpt2(pre: string): Promise<Tokenizer> {
  const { added } = llamaCpp;
  return open({
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": pre,
    "tokenizer.ggml.tokens": strings([
      ...bytes.tokens,
      ...added.map(([token]) => token),
    ]),
    "tokenizer.ggml.token_type": i32s([
      ...bytes.tokens.map(() => 1),
      ...added.map(([, type]) => type),
    ]),
    "tokenizer.ggml.merges": strings(bytes.merges),
  });
}

function openLlama(
  change: Record<string, FieldValue | undefined> = {},
  tokens = scores.tokens,
): Promise<Tokenizer> {
  return open({
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": strings(tokens),
    "tokenizer.ggml.scores": f32s(scores.scores),
    "tokenizer.ggml.token_type": i32s(scores.types),
    ...change,
  });
}

/** Compares ids and texts of the corpus. */
async function compare(
  tokenizer: Tokenizer,
  { found, first, form = (line) => line }: {
    found: Case;
    first: Case;
    form?: (line: string) => string;
  },
): Promise<void> {
  for (const [i, line] of lines.entries()) {
    // Where a form changes a line, llama.cpp was given another text.
    if (form(line) !== line) continue;
    const text = `${i} ${JSON.stringify(line)}`;
    const ids = found.ids[i] ?? first.ids[i]!;
    assertEquals(await tokenizer.encode(line), ids, text);
    const special = await tokenizer.encode(line, { special: true });
    assertEquals(special, found.special[i] ?? ids, text);
    const stream = new TextStream(tokenizer);
    const streamed = ids.map((id) => stream.push(id)).join("") + stream.flush();
    assertEquals(streamed, found.decoded?.[i] ?? line, text);
    assertEquals(tokenizer.decode(ids), streamed, text);
  }
}

afterAll(async () => {
  for (const path of files) await Deno.remove(path);
});

describe("named pre-tokenizers against llama.cpp", () => {
  const first = llamaCpp.gpt2["gpt-2"]!;
  for (const [pre, ...others] of llamaCpp.names) {
    it(`splits as ${pre} does`, async () => {
      using tokenizer = await openGpt2(pre!);
      const form = (line: string): string =>
        pre === "qwen2" ? line.normalize("NFC") : line;
      await compare(tokenizer, { found: llamaCpp.gpt2[pre!]!, first, form });
      for (const other of others) {
        const { expressions } = PRE_TOKENIZERS.find(({ names }) =>
          names.includes(other)
        )!;
        const own = PRE_TOKENIZERS.find(({ names }) => names.includes(pre!))!;
        assertEquals(expressions, own.expressions);
      }
    });
  }
});

describe("SentencePiece vocabularies against llama.cpp", () => {
  const { scores: first } = llamaCpp.llama as { scores: Case };
  const ties = f32s(scores.scores.map((score) => Math.floor(score / 64)));
  const changes: Record<string, Parameters<typeof openLlama>> = {
    "scores": [],
    "no prefix": [{ "tokenizer.ggml.add_space_prefix": false }],
    "ties": [{ "tokenizer.ggml.scores": ties }],
    "phi-3": [
      {
        "general.name": "Phi-3 mini",
        "tokenizer.ggml.token_type": i32s(scores.types.with(-1, 3)),
      },
      [...scores.tokens.slice(0, -1), "<|endoftext|>"],
    ],
  };
  for (const [name, change] of Object.entries(changes)) {
    it(`merges by score: ${name}`, async () => {
      using tokenizer = await openLlama(...change);
      await compare(tokenizer, { found: llamaCpp.llama[name]!, first });
    });
  }

  it("has a test of each", () => {
    assertEquals(Object.keys(llamaCpp.llama), Object.keys(changes));
  });
});

describe("a SentencePiece vocabulary", () => {
  let tokenizer: Tokenizer;
  const id = (token: string): number => scores.tokens.indexOf(token);

  beforeEach(async () => {
    tokenizer = await openLlama();
  });

  afterEach(() => tokenizer.close());

  it("has the special tokens of its kind where the file names none", async () => {
    assertEquals([tokenizer.bos, tokenizer.eos], [1, 2]);
    assertEquals([...tokenizer.endTokens], [2]);
    assertEquals(tokenizer.addBos, true);
    using named = await openLlama({
      "tokenizer.ggml.bos_token_id": u32(5),
      "tokenizer.ggml.eos_token_id": u32(6),
      "tokenizer.ggml.add_bos_token": false,
    });
    assertEquals([named.bos, named.eos, named.addBos], [5, 6, false]);
    assertEquals([...named.endTokens], [6]);
  });

  it("never makes a control token or a byte of text", async () => {
    const tokens = scores.tokens.with(-1, "<s").with(-2, "<0x").with(-3, "<0x4")
      .with(-4, "<0x41");
    using open = await openLlama({}, tokens);
    for (const text of ["<s>", "<0x41>", "a<s>b</s>"]) {
      const ids = await open.encode(text);
      assert(!ids.includes(1) && !ids.includes(id("<0x41>")));
      assertEquals(open.decode(ids), text);
    }
  });

  it("gives a long text, cut, the ids of the whole", async () => {
    // No token holds these two side by side.
    const end = "Zq";
    assert(!scores.tokens.some((token) => token.includes(end)));
    assert(id("Z") > 0 && id("q") > 0);
    const text = lines.join(end).repeat(30) + end;
    assert(text.length > 2 * 32 * 1024);
    const bpe = validateBpe({
      file: "",
      fields: { tokens: "", types: "", scores: "", merges: "" },
      spelling: "text",
      ...scores,
      merges: [],
      rows: 4096,
    });
    const encoder = new SentencePieceEncoder(bpe, { ...scores, unknown: 0 });
    assertEquals(encoder.cut(text, 1), text.indexOf(end) + 1);
    // User-defined tokens are not the encoder's part.
    const plain = text.replaceAll("<tool>", "").replaceAll(" ", "▁");
    assertEquals(
      await tokenizer.encode(plain, { continues: true }),
      await encoder.encode(plain),
    );
  });

  it("takes a million characters without a blank", async () => {
    const text = "aabhe".repeat(2e5);
    assertEquals(tokenizer.decode(await tokenizer.encode(text)) === text, true);
  });

  it("stops a long text at a signal", async () => {
    const stop = new AbortController();
    setTimeout(() => stop.abort(), 20);
    const error = await assertRejects(
      () => tokenizer.encode("he was Zq ".repeat(1e6), { signal: stop.signal }),
      DOMException,
    );
    assertEquals(error.name, "AbortError");
  });

  it("puts the unknown token where a byte has none", async () => {
    const kept = scores.tokens.map((_, i) => i !== id("<0xF0>"));
    const only = <T>(list: T[]): T[] => list.filter((_, i) => kept[i]);
    using open = await openLlama({
      "tokenizer.ggml.scores": f32s(only(scores.scores)),
      "tokenizer.ggml.token_type": i32s(only(scores.types)),
    }, only(scores.tokens));
    const ids = await open.encode("\u{1f9ff}", { continues: true });
    assertEquals(ids[0], 0);
    assertEquals(ids.length, 4);
  });

  it("is refused where it does not hold together", async () => {
    for (
      const [change, field, message] of [
        [{ scores: undefined }, "scores", "Missing"],
        [{ scores: f32s([1, 2]) }, "scores", "Found 2 values"],
        [
          { scores: f32s(scores.scores.with(7, NaN)) },
          "scores",
          "Score 7 is NaN, expected a finite number",
        ],
        [{ token_type: i32s([1]) }, "token_type", "Found 1 values"],
        [
          { tokens: strings(scores.tokens.with(9, "<s>")) },
          "tokens",
          "expected",
        ],
        [{ tokens: strings(scores.tokens.with(9, "<0x-1>")) }, "tokens", "<0x"],
        [{ bos_token_id: u32(4096) }, "bos_token_id", "expected an integer"],
        [{ unknown_token_id: u32(4096) }, "unknown_token_id", "expected"],
      ] as const
    ) {
      const fields = Object.fromEntries(
        Object.entries(change)
          .map(([key, value]) => [`tokenizer.ggml.${key}`, value]),
      );
      const error = await assertRejects(() => openLlama(fields), FormatError);
      assertEquals(error.field, `tokenizer.ggml.${field}`);
      assert(error.message.includes(message), error.message);
    }
  });
});

describe("what GGUF vocabularies are not read", () => {
  it("kinds are refused by name, with those that are", async () => {
    for (const model of ["bert", "t5", "rwkv", "plamo2", "gemma4", "none"]) {
      await assertRejects(
        () => open({ "tokenizer.ggml.model": model }),
        FormatError,
        `Unknown tokenizer "${model}", expected gpt2 (byte-level BPE) or llama (SentencePiece BPE)`,
      );
    }
  });

  it("pre-tokenizers are refused by name, with those that are", async () => {
    for (const pre of ["gemma4", "sarvam-moe", "whitespace", "roberta-bpe"]) {
      await assertRejects(
        () => openGpt2(pre),
        FormatError,
        `Unknown pre-tokenizer "${pre}", expected one of smollm, starcoder,`,
      );
    }
  });

  it("every name that is read was compared", () => {
    const read = PRE_TOKENIZERS.flatMap(({ names }) => names);
    assertEquals(read.toSorted(), llamaCpp.names.flat().toSorted());
    assertEquals(new Set(read).size, read.length);
  });
});
