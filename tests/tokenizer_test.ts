/** Tests of the tokenizer in a GGUF file: small vocabularies made here, and the default model's against llama.cpp. */

import {
  assert,
  assertEquals,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { afterAll, beforeAll, describe, it } from "@std/testing/bdd";
import { FormatError } from "../src/formats/error.ts";
import { GgufFile } from "../src/formats/gguf.ts";
import { openNative, tokenizerPermissions } from "../src/tokenizer/addon.ts";
import { type BpeSource, KIND, validateBpe } from "../src/tokenizer/bpe.ts";
import { spellBytes, tokenBytes } from "../src/tokenizer/byte_map.ts";
import { type Cut, MAX_RUN } from "../src/tokenizer/cuts.ts";
import { tokenizerFromGguf } from "../src/tokenizer/gguf.ts";
import { tokenizerJson } from "../src/tokenizer/native_encoder.ts";
import {
  findPreTokenizer,
  PRE_TOKENIZERS,
} from "../src/tokenizer/pre_tokenizers.ts";
import { splitBy } from "../src/tokenizer/splitting.ts";
import { TextStream, type Tokenizer } from "../src/tokenizer/tokenizer.ts";
import { f32s, ggufBytes, i32s, strings, u32, u32s } from "./gguf_writer.ts";
import type { FieldValue } from "./gguf_writer.ts";
import { testModel } from "./model.ts";

const ROWS = 1024;

/** The 256 single bytes, as every byte-level vocabulary begins. */
const BYTES = Array.from({ length: 256 }, (_, byte) => spellBytes([byte]));

/** Merges whose results show where a pre-tokenizer splits. */
const MERGES = [
  ["1 2", "12 3", "123 4", "Ġ 1", "! Ċ", "Ċ Ċ", "' S", "' s", "Ġ a", "a b"],
  ["e Ì", "eÌ ģ", "Ġ Ġ", "ĠĠ Ġ", "a a", "aa aa", "! !", "é ł", "Ã ©"],
].flat();

/** What a small file holds; a test changes some of it. */
interface Small {
  pre?: string;
  tokens?: string[];
  types?: number[];
  merges?: string[];
  /** Keys after `tokenizer.ggml.`, to add or, when undefined, to leave out. */
  fields?: Record<string, FieldValue | undefined>;
}

/** Tokens after the bytes: what merges make, a word, and special tokens. */
const MERGED = MERGES.map((merge) => merge.replace(" ", ""));
const WORD = "xyz";
const CONTROL = ["<|endoftext|>", "<|im_end|>", "<|im_end|>>"];
const USER = "<tool>";

function smallTokens(): { tokens: string[]; types: number[] } {
  const normal = [...BYTES, ...MERGED, WORD];
  return {
    tokens: [...normal, ...CONTROL, USER],
    types: [
      ...normal.map(() => KIND.normal),
      ...CONTROL.map(() => KIND.control),
      KIND.userDefined,
    ],
  };
}

const END = BYTES.length + MERGED.length + 1;
const files: string[] = [];

/** Writes a small file and opens it. */
async function openSmall(small: Small): Promise<GgufFile> {
  const { tokens, types } = smallTokens();
  const fields = {
    model: "gpt2",
    pre: small.pre ?? "gpt-2",
    tokens: strings(small.tokens ?? tokens),
    token_type: i32s(small.types ?? types),
    merges: strings(small.merges ?? MERGES),
    eos_token_id: u32(END),
    ...small.fields,
  };
  const metadata = Object.entries(fields).flatMap(([key, value]) =>
    value === undefined ? [] : [[`tokenizer.ggml.${key}`, value] as const]
  );
  const path = await Deno.makeTempFile({ suffix: ".gguf" });
  files.push(path);
  await Deno.writeFile(path, ggufBytes({ metadata }));
  return await GgufFile.open(path);
}

/** The tokenizer of a small file. */
async function small(content: Small = {}, rows = ROWS): Promise<Tokenizer> {
  using file = await openSmall(content);
  return await tokenizerFromGguf(file, { rows });
}

/** Asserts that a small file is refused, and how. */
async function refuses(
  content: Small,
  { field, message, rows = ROWS }: {
    field: string;
    message: string;
    rows?: number;
  },
): Promise<void> {
  const error = await assertRejects(() => small(content, rows), FormatError);
  assertEquals(error.field, `tokenizer.ggml.${field}`);
  assertStringIncludes(error.message, `${error.file}: ${error.field}: `);
  assertStringIncludes(error.message, message);
  assert(files.includes(error.file));
}

/** A tokenizer.json's vocabulary, for what GGUF metadata cannot hold. */
function source(change: Partial<BpeSource>): BpeSource {
  return {
    file: "tokenizer.json",
    fields: {
      tokens: "model.vocab",
      types: "added_tokens",
      scores: "scores",
      merges: "model.merges",
    },
    spelling: "bytes",
    tokens: ["a", "b", "ab"],
    merges: ["a b"],
    rows: ROWS,
    ...change,
  };
}

/** What the addon is told of a named pre-tokenizer. */
function native(
  name: string,
): { preTokenizer: unknown; ignoreMerges: boolean } {
  const { expressions, ignoreMerges = false } = findPreTokenizer(name)!;
  return { preTokenizer: splitBy(expressions).json, ignoreMerges };
}

/** The spelling of every token that a text gives. */
async function spell(tokenizer: Tokenizer, text: string): Promise<string[]> {
  const ids = await tokenizer.encode(text);
  return ids.map((id) => spellBytes(tokenizer.piece(id)));
}

/** Pseudo-random numbers from 0 to below n (mulberry32). */
function random(seed: number): (n: number) => number {
  return (n) => {
    seed = seed + 0x6d2b79f5 | 0;
    let t = Math.imul(seed ^ seed >>> 15, 1 | seed);
    t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
    return ((t ^ t >>> 14) >>> 0) % n;
  };
}

const ALPHABET = [
  ..."aabbeSsx1234 !!.'-_\n\n\r\t  ",
  ..."\0\u0085\u00a0\u00ad\u200d\u2028\u3000\ufeff\ufffd",
  ..."éßſÅÉカ・゛\u0301\u0308½²٣Ⅷ漢字あ가ไท\u0e49नि。、“”€😀👍🏽",
  "'s",
  "'RE",
  "   ",
];

function randomText(length: number, seed: number): string {
  const next = random(seed);
  let text = "";
  while (text.length < length) text += ALPHABET[next(ALPHABET.length)]!;
  return text;
}

/** A text cut at every place that there is. */
function cutAll(cut: Cut, text: string, step = 1): string[] {
  const parts: string[] = [];
  for (let start = 0; start < text.length;) {
    const end = cut(text, start + step);
    parts.push(text.slice(start, end));
    start = end;
  }
  return parts;
}

/** Every character but surrogates, and of large uniform blocks each 16th. */
function characters(): string[] {
  const uniform = [
    [0x3400, 0x9fff],
    [0xac00, 0xd7a3],
    [0xe000, 0xf8ff],
    [0x17000, 0x18cff],
    [0x1fc00, 0x33fff],
    [0xe0200, 0xe0fff],
  ] as const;
  const found: string[] = [];
  for (let code = 0; code < 0xe1000; code++) {
    if (code === 0xd800) code = 0xe000;
    // Planes without a character.
    if (code === 0x34000) code = 0xe0000;
    const dull = uniform.some(([a, b]) => code > a && code < b);
    if (!dull || code % 16 === 0) found.push(String.fromCodePoint(code));
  }
  return found;
}

afterAll(async () => {
  for (const path of files) await Deno.remove(path);
});

describe("byte map", () => {
  it("spells all bytes in characters of their own and back", () => {
    assertEquals(new Set(BYTES).size, 256);
    assertEquals(BYTES[0x20], "Ġ");
    assertEquals(BYTES[0x0a], "Ċ");
    assertEquals(BYTES[0x41], "A");
    const all = Uint8Array.from({ length: 256 }, (_, byte) => byte);
    assertEquals(tokenBytes(spellBytes(all)), all);
  });

  it("finds no bytes for other characters", () => {
    for (const text of [" ", "a\n", "\u00ad", "漢", "😀", "\u0144"]) {
      assertEquals(tokenBytes(text), null);
    }
  });
});

describe("pre-tokenizers", () => {
  const text = "1234 1 !\n\n a'S a's";
  const cases: Record<string, string[]> = {
    "smollm": "1 2 3 4 Ġ 1 Ġ ! ĊĊ Ġa ' S Ġa 's".split(" "),
    "gpt-2": "1234 Ġ1 Ġ ! ĊĊ Ġa ' S Ġa 's".split(" "),
    "llama-bpe": "123 4 Ġ 1 Ġ !Ċ Ċ Ġa 'S Ġa 's".split(" "),
    "qwen2": "1 2 3 4 Ġ 1 Ġ !Ċ Ċ Ġa 'S Ġa 's".split(" "),
  };
  for (const [pre, expected] of Object.entries(cases)) {
    it(`splits as ${pre} does`, async () => {
      using tokenizer = await small({ pre });
      assertEquals(await spell(tokenizer, text), expected);
      assertEquals(
        await spell(tokenizer, WORD),
        pre === "llama-bpe" ? [WORD] : ["x", "y", "z"],
      );
    });
  }

  it("brings text into NFC for qwen2 alone", async () => {
    for (const [pre, pieces] of [["qwen2", 1], ["gpt-2", 3]] as const) {
      using tokenizer = await small({ pre });
      assertEquals((await tokenizer.encode("e\u0301")).length, pieces);
    }
  });

  for (const [index, preTokenizer] of PRE_TOKENIZERS.entries()) {
    const name = preTokenizer.names[0]!;
    describe(`cuts under ${name}`, () => {
      const cut = splitBy(preTokenizer.expressions).cut!;
      let pieces: (text: string) => string[];

      beforeAll(async () => {
        const bpe = validateBpe(
          source({ tokens: BYTES, merges: [] }),
        );
        const json = tokenizerJson(bpe, native(name));
        const split = (await openNative(json)).getPreTokenizer();
        pieces = (text) =>
          split!.preTokenizeString(text).map(([piece]) => piece);
      });

      it("cuts random texts only where they split anyway", () => {
        let count = 0;
        for (let seed = 0; seed < 150; seed++) {
          const text = randomText(200, seed).toWellFormed();
          const parts = cutAll(cut, text, 1 + seed % 5);
          count += parts.length - 1;
          assertEquals(parts.join(""), text);
          assertEquals(parts.flatMap(pieces), pieces(text), text);
        }
        assert(count > 10);
      });

      it("holds for every character", () => {
        // All of them for the commonest, shares of them for the others.
        const codes = characters().filter((_, i) =>
          index < 4 || i % 16 === index % 16
        );
        for (let i = 0; i < codes.length; i += 1024) {
          const text = codes.slice(i, i + 1024)
            .map((c) => `a${c}1${c} `).join("");
          assertEquals(
            cutAll(cut, text).flatMap(pieces).join("|") ===
              pieces(text).join("|"),
            true,
            `from ${codes[i]}`,
          );
        }
      });
    });
  }

  it("are never cut inside a character", () => {
    const { cut } = splitBy(findPreTokenizer("gpt-2")!.expressions);
    assertEquals(cut!("a😀😀😀 b", 2), 7);
    assertEquals(cutAll(cut!, "😀a😀1😀"), ["😀a", "😀1", "😀"]);
    assertEquals(cut!("ab", 5), 2);
  });
});

describe("tokenizerFromGguf()", () => {
  it("reads the special tokens", async () => {
    using tokenizer = await small({
      fields: { bos_token_id: u32(END + 1), add_bos_token: true },
    });
    assertEquals(tokenizer.size, END + CONTROL.length + 1);
    assertEquals(tokenizer.bos, END + 1);
    assertEquals(tokenizer.eos, END);
    assertEquals(tokenizer.addBos, true);
    assertEquals([...tokenizer.endTokens].sort(), [END, END + 1]);
  });

  it("takes a vocabulary without types or special ids", async () => {
    using tokenizer = await small({
      tokens: BYTES,
      merges: [],
      fields: { token_type: undefined, eos_token_id: undefined },
    });
    assertEquals(tokenizer.bos, null);
    assertEquals(tokenizer.eos, null);
    assertEquals(tokenizer.addBos, false);
    assertEquals(tokenizer.endTokens.size, 0);
    assertEquals(await tokenizer.encode("A!"), [0x41, 0x21]);
  });

  it("adds bos by default where the family does", async () => {
    const fields = { bos_token_id: u32(END) };
    using llama = await small({ pre: "llama-bpe", fields });
    using gpt2 = await small({ pre: "gpt-2", fields });
    using none = await small({ pre: "llama-bpe" });
    assertEquals([llama, gpt2, none].map((t) => t.addBos), [
      true,
      false,
      false,
    ]);
  });

  it("refuses other tokenizers, naming what is known", async () => {
    await refuses({ fields: { model: "bert" } }, {
      field: "model",
      message: 'Unknown tokenizer "bert", expected gpt2',
    });
    await refuses({ fields: { model: undefined } }, {
      field: "model",
      message: "Missing",
    });
  });

  it("T10 refuses an unknown pre-tokenizer, naming the known ones", async () => {
    await refuses({ pre: "nothing" }, {
      field: "pre",
      message: 'Unknown pre-tokenizer "nothing", expected one of smollm,',
    });
    await refuses({ fields: { pre: undefined } }, {
      field: "pre",
      message: "Missing",
    });
  });

  it("refuses rows that are no count", async () => {
    for (const rows of [0, -1, 1.5, NaN]) {
      await assertRejects(() => small({}, rows), RangeError);
    }
  });

  it("T01 refuses a merge into no token, before the addon aborts", async () => {
    await refuses({ merges: [...MERGES, "1234 1234"] }, {
      field: "merges",
      message:
        `Merge ${MERGES.length} "1234 1234" needs "12341234", expected its parts and its result to be tokens`,
    });
  });

  it("T02 lets no regular expression of a file in", async () => {
    const evil = "(a+)+$";
    await refuses({ pre: evil }, { field: "pre", message: `"${evil}"` });
    using tokenizer = await small();
    const ids = await tokenizer.encode("a".repeat(32) + "b");
    assertEquals(tokenizer.decode(ids), "a".repeat(32) + "b");
  });

  it("T04 refuses ids without a row in the embedding", async () => {
    const { tokens } = smallTokens();
    await refuses({}, {
      field: "tokens",
      message: `Found ${tokens.length} tokens, expected 1 to ${
        tokens.length - 1
      }, the rows of the embedding`,
      rows: tokens.length - 1,
    });
    using tokenizer = await small({}, tokens.length);
    assertEquals(tokenizer.size, tokens.length);
    for (const id of [4294967295, -1, 0.5, NaN, 3]) {
      assertThrows(
        () => validateBpe(source({ ids: [0, 1, id] })),
        FormatError,
        `tokenizer.json: model.vocab: Token "ab" has id ${id}, expected 0 to 2`,
      );
    }
  });

  it("T07 refuses ids with gaps", () => {
    assertThrows(
      () => validateBpe(source({ ids: [0, 1, 3] })),
      FormatError,
      "without gaps",
    );
    assertEquals(validateBpe(source({ ids: [2, 0, 1] })).tokens, [
      "b",
      "ab",
      "a",
    ]);
  });

  it("T08 refuses duplicate ids and duplicate tokens", async () => {
    assertThrows(
      () => validateBpe(source({ ids: [0, 1, 1] })),
      FormatError,
      'Tokens "b" and "ab" both have id 1',
    );
    const { tokens } = smallTokens();
    await refuses({ tokens: tokens.with(-1, "a") }, {
      field: "tokens",
      message: 'Token "a" has ids 97 and',
    });
  });

  it("T09 refuses a merge of what is no token or no pair", async () => {
    for (const merge of ["zz a", "a zz", "aĠa a", "漢 字"]) {
      await refuses({ merges: [merge] }, {
        field: "merges",
        message: `Merge 0 "${merge}" needs`,
      });
    }
    for (const merge of ["", "a", " ", "a ", " a", "a  b", "a b a"]) {
      await refuses({ merges: [merge] }, {
        field: "merges",
        message: "is no pair",
      });
    }
    await refuses({ merges: ["a b", "a b"] }, {
      field: "merges",
      message: 'Merge 1 "a b" comes twice',
    });
  });

  it("refuses merges without end", async () => {
    await refuses({ merges: Array<string>(6000).fill("a b") }, {
      field: "merges",
      message: "Found 6000 merges, expected at most 16 for each of",
    });
  });

  it("refuses a merge that makes a control token of plain text", async () => {
    const tokens = [...BYTES, "<s"];
    const types = tokens.map((_, id) => id < 256 ? KIND.normal : KIND.control);
    await refuses({ tokens, types, merges: ["< s"] }, {
      field: "merges",
      message: 'needs "<s" of type 3',
    });
  });

  it("T12 refuses a special id of no token", async () => {
    for (const name of ["bos", "eos", "eot", "eom", "unknown", "padding"]) {
      await refuses({ fields: { [`${name}_token_id`]: u32(ROWS) } }, {
        field: `${name}_token_id`,
        message: `expected an integer from 0 to ${END + CONTROL.length}`,
      });
    }
  });

  it("T13 takes bos and eos that are absent and refuses lists", async () => {
    using tokenizer = await small({ fields: { eos_token_id: undefined } });
    assertEquals([tokenizer.bos, tokenizer.eos], [null, null]);
    await refuses({ fields: { eos_token_id: u32s([1, 2]) } }, {
      field: "eos_token_id",
      message: "expected an integer",
    });
  });

  it("G33 refuses <0x..> entries of the wrong form", async () => {
    const { tokens, types } = smallTokens();
    for (const token of ["<0x-1>", "<0x>", "<0x100>", "<0xZZ>", "<0x4 >"]) {
      for (const kind of [KIND.byte, KIND.control, KIND.unused]) {
        await refuses({ tokens: [...tokens, token], types: [...types, kind] }, {
          field: "tokens",
          message: `Token ${tokens.length} is "${token}", expected <0x00>`,
        });
      }
    }
    await refuses({ tokens: [...tokens, "q!"], types: [...types, KIND.byte] }, {
      field: "tokens",
      message: "for a byte",
    });
    using tokenizer = await small({
      tokens: [...tokens, "<0xE2>"],
      types: [...types, KIND.byte],
    });
    assertEquals(tokenizer.piece(tokens.length), Uint8Array.of(0xe2));
  });

  it("G34 refuses scores and types of another length", async () => {
    const { tokens, types } = smallTokens();
    await refuses({ fields: { scores: f32s([1, 2, 3]) } }, {
      field: "scores",
      message: `Found 3 values, expected ${tokens.length}, one for each token`,
    });
    await refuses({ types: types.slice(1) }, {
      field: "token_type",
      message: `Found ${tokens.length - 1} values`,
    });
    using tokenizer = await small({
      fields: { scores: f32s(tokens.map(() => 0)) },
    });
    assertEquals(tokenizer.size, tokens.length);
  });

  it("refuses tokens and types that make no sense", async () => {
    const { tokens, types } = smallTokens();
    const normal = (token: string): Small => ({
      tokens: [...tokens, token],
      types: [...types, KIND.normal],
    });
    for (const token of ["a b", "漢", "\n"]) {
      await refuses(normal(token), {
        field: "tokens",
        message: "the characters that byte-level vocabularies write bytes in",
      });
    }
    await refuses(normal(""), { field: "tokens", message: 'is ""' });
    await refuses(normal("q".repeat(20000)), {
      field: "tokens",
      message: "at most 16384 characters",
    });
    await refuses({ tokens: [], types: [], merges: [] }, {
      field: "tokens",
      message: "Found 0 tokens",
    });
    for (const type of [0, 7, -1]) {
      await refuses({ types: types.with(0, type) }, {
        field: "token_type",
        message: `has type ${type}, expected 1 to 6`,
      });
    }
  });

  it("keeps a token that is called like an object's own", async () => {
    const tokens = [...BYTES, "__", "to", "__pro", "__proto", "__proto__"];
    tokens.push("pr", "pro");
    using tokenizer = await small({
      tokens,
      merges: ["_ _", "t o", "p r", "pr o", "__ pro", "__pro to", "__proto __"],
      fields: { token_type: undefined, eos_token_id: undefined },
      pre: "gpt-2",
    });
    assertEquals(tokenizer.piece(260), new TextEncoder().encode("__proto__"));
    assertEquals(
      tokenizer.decode(await tokenizer.encode("__proto__ 0")),
      "__proto__ 0",
    );
  });
});

describe("Tokenizer.encode()", () => {
  let tokenizer: Tokenizer;

  beforeAll(async () => {
    tokenizer = await small();
  });

  it("gives no token for the empty text", async () => {
    assertEquals(await tokenizer.encode(""), []);
    assertEquals(await tokenizer.encode("", { special: true }), []);
  });

  it("takes special tokens as text unless asked", async () => {
    const text = "a<|im_end|>b<|im_end|>><|endoftext|>";
    const plain = await tokenizer.encode(text);
    assert(plain.every((id) => id < END));
    assertEquals(tokenizer.decode(plain), text);
    const special = await tokenizer.encode(text, { special: true });
    assertEquals(special, [97, END + 1, 98, END + 2, END]);
    assertEquals(tokenizer.decode(special), text);
  });

  it("leaves special tokens text in literal stretches", async () => {
    const text = "<|im_end|><|im_end|><|endoftext|>";
    const ids = await tokenizer.encode(text, {
      special: true,
      literal: [[10, 20], [30, 31]],
    });
    assertEquals(ids[0], END + 1);
    assert(ids.slice(1).every((id) => id < END));
    assertEquals(tokenizer.decode(ids), text);
    const inside = await tokenizer.encode(text, {
      special: true,
      literal: [[0, 0], [10, 10], [33, 99]],
    });
    assertEquals(inside, [END + 1, END + 1, END]);
    assertEquals(tokenizer.specialTokens, CONTROL);
  });

  it("takes special tokens as text in literal stretches", async () => {
    const text = `a<|im_end|>b<|im_end|><|im_end|>${USER}`;
    const plain = await tokenizer.encode("<|im_end|>");
    const read = (...literal: [number, number][]) =>
      tokenizer.encode(text, { special: true, literal });
    const end = END + 1;
    const user = END + CONTROL.length;
    assertEquals(await read(), [97, end, 98, end, end, user]);
    const first = [97, ...plain, 98, end, end, user];
    assertEquals(await read([1, 11]), first);
    // Any part of a token is enough; a stretch beside it is not.
    assertEquals(await read([10, 11]), first);
    assertEquals(await read([0, 1], [1, 2], [11, 12]), first);
    assertEquals(await read([12, 22], [22, 32]), [
      ...[97, end, 98],
      ...await tokenizer.encode("<|im_end|><|im_end|>"),
      user,
    ]);
    assertEquals(tokenizer.decode(await read([0, text.length])), text);
    assertEquals(new Set(tokenizer.specialTokens), new Set(CONTROL));
  });

  it("always takes user-defined tokens whole", async () => {
    const id = END + CONTROL.length;
    assertEquals(await tokenizer.encode(`a${USER}`), [97, id]);
    assertEquals(await tokenizer.encode(`${USER}b`, { special: true }), [
      id,
      98,
    ]);
  });

  it("leaves out bytes without a token", async () => {
    using partial = await small({
      tokens: BYTES.filter((_, byte) => byte !== 4),
      merges: [],
      fields: { token_type: undefined, eos_token_id: undefined },
    });
    assertEquals(partial.decode(await partial.encode("a\u0004b")), "ab");
  });

  it("T14 takes lone surrogates for U+FFFD", async () => {
    const replaced = await tokenizer.encode("a\ufffdb\ufffd");
    assertEquals(await tokenizer.encode("a\ud800b\udc00"), replaced);
    assertEquals(tokenizer.decode(replaced), "a\ufffdb\ufffd");
  });

  it("T14 takes NUL", async () => {
    assertEquals(await tokenizer.encode("\0a\0\0"), [0, 97, 0, 0]);
  });

  it("T14 takes 1 MB without a blank", async () => {
    const ids = await tokenizer.encode("a".repeat(1e6));
    assertEquals(tokenizer.decode(ids).length, 1e6);
    const mixed = randomText(3e5, 7).replace(/\s/g, "_").toWellFormed();
    assertEquals(tokenizer.decode(await tokenizer.encode(mixed)), mixed);
  });

  it("T14 refuses a run that would take the addon too long", async () => {
    for (const character of ["a", " ", "!", "漢", "😀"]) {
      await assertRejects(
        () => tokenizer.encode("b 1 " + character.repeat(2 * MAX_RUN)),
        RangeError,
        `more than ${MAX_RUN} characters after character`,
      );
    }
  });

  it("T05 refuses more than 64 MB", async () => {
    await assertRejects(
      () => tokenizer.encode("a ".repeat(2 ** 25) + "a"),
      RangeError,
      "text has 67108865 characters, expected at most 67108864",
    );
  });

  it("T05 stops a long text at a signal", async () => {
    const stop = new AbortController();
    const begun = performance.now();
    const done = tokenizer.encode("a b ".repeat(1e6), { signal: stop.signal });
    setTimeout(() => stop.abort(), 50);
    const error = await assertRejects(() => done, DOMException);
    assertEquals(error.name, "AbortError");
    assert(performance.now() - begun < 2000);
    await assertRejects(
      () => tokenizer.encode("a", { signal: AbortSignal.abort() }),
      DOMException,
    );
  });

  it("refuses what is no text", async () => {
    for (const text of [undefined, null, 1, ["a"]]) {
      await assertRejects(
        () => tokenizer.encode(text as unknown as string),
        TypeError,
      );
    }
  });

  for (const pre of ["smollm", "gpt-2", "llama-bpe", "qwen2"]) {
    it(`gives a long text the ids of the whole under ${pre}`, async () => {
      const { tokens, types } = smallTokens();
      const bpe = validateBpe(
        source({ tokens, types, merges: MERGES }),
      );
      const whole = await openNative(tokenizerJson(bpe, native(pre)));
      using pieces = await small({ pre });
      const text = randomText(80_000, 3).toWellFormed();
      const form = pre === "qwen2" ? text.normalize("NFC") : text;
      const encoding = await whole.encode(form, null, {
        addSpecialTokens: false,
      });
      assertEquals(await pieces.encode(text), encoding.getIds());
    });
  }
});

describe("Tokenizer.piece() and decode()", () => {
  let tokenizer: Tokenizer;

  beforeAll(async () => {
    tokenizer = await small();
  });

  it("T15 refuse ids of no token", () => {
    for (const id of [-1, 2 ** 31, tokenizer.size, 0.5, NaN, Infinity]) {
      const message = `Token id is ${id}, expected 0 to ${tokenizer.size - 1}`;
      assertThrows(() => tokenizer.piece(id), RangeError, message);
      assertThrows(() => tokenizer.decode([97, id]), RangeError, message);
      assertThrows(
        () => new TextStream(tokenizer).push(id),
        RangeError,
        message,
      );
    }
    assertThrows(() => tokenizer.piece("1" as unknown as number), TypeError);
  });

  it("give control tokens their names and bytes themselves", () => {
    assertEquals(
      tokenizer.piece(END),
      new TextEncoder().encode("<|endoftext|>"),
    );
    assertEquals(tokenizer.piece(0xe2), Uint8Array.of(0xe2));
    assertEquals(tokenizer.decode([97, END, 0x20]), "a<|endoftext|> ");
    assertEquals(tokenizer.decode([]), "");
  });

  it("hand out bytes that the caller may change", () => {
    tokenizer.piece(97).fill(0);
    assertEquals(tokenizer.decode([97]), "a");
  });

  it("keep a byte order mark and mark what is no UTF-8", () => {
    assertEquals(tokenizer.decode([0xef, 0xbb, 0xbf, 97]), "\ufeffa");
    assertEquals(tokenizer.decode([0xff, 97, 0xe2, 0x82]), "\ufffda\ufffd");
  });

  it("refuse a closed tokenizer", async () => {
    const closed = await small();
    closed.close();
    closed.close();
    assertThrows(() => closed.piece(1), Deno.errors.BadResource);
    assertThrows(() => closed.decode([1]), Deno.errors.BadResource);
    await assertRejects(() => closed.encode("a"), Deno.errors.BadResource);
  });

  it("TextStream holds back a character until it is whole", () => {
    const stream = new TextStream(tokenizer);
    const bytes = [...new TextEncoder().encode("é😀")];
    assertEquals(bytes.map((id) => stream.push(id)), [
      "",
      "é",
      "",
      "",
      "",
      "😀",
    ]);
    assertEquals(stream.flush(), "");
    assertEquals(stream.push(0xe2), "");
    assertEquals(stream.flush(), "\ufffd");
    assertEquals(stream.push(97), "a");
  });

  it("TextStream gives in sum what decode() gives", () => {
    const next = random(11);
    for (let run = 0; run < 300; run++) {
      const text = [...new TextEncoder().encode(randomText(8, run))];
      const ids = [
        ...text,
        ...Array.from({ length: next(6) }, () => next(tokenizer.size)),
        ...text.slice(next(4)),
      ];
      const stream = new TextStream(tokenizer);
      const parts = ids.map((id) => stream.push(id));
      assertEquals(parts.join("") + stream.flush(), tokenizer.decode(ids));
    }
  });
});

describe("permissions", () => {
  const root = new URL("../", import.meta.url);
  const open = `
    import { openNative } from "./src/tokenizer/addon.ts";
    import "./src/tokenizer/gguf.ts";
    console.log("imported");
    try {
      await openNative(Deno.args[0]);
      console.log("opened");
    } catch (error) {
      console.log(error.name + ": " + error.message);
    }`;
  const json = (): string =>
    tokenizerJson(
      validateBpe(source({ tokens: BYTES, merges: [] })),
      native("gpt-2"),
    );

  async function run(flags: string[]): Promise<string> {
    const child = new Deno.Command(Deno.execPath(), {
      args: ["run", "--quiet", "--no-prompt", ...flags, "-", json()],
      cwd: root,
      stdin: "piped",
      stdout: "piped",
      stderr: "inherit",
    }).spawn();
    const input = child.stdin.getWriter();
    await input.write(new TextEncoder().encode(open));
    await input.close();
    const { stdout } = await child.output();
    return new TextDecoder().decode(stdout);
  }

  it("tokenizerPermissions() is enough to open", async () => {
    assertEquals(await run(tokenizerPermissions()), "imported\nopened\n");
  });

  it("importing takes none, and opening without one names all", async () => {
    const flags = tokenizerPermissions();
    const expected =
      "imported\nNotCapable: Cannot load the tokenizer's native addon without permission, " +
      `run again with ${flags.join(" ")}\n`;
    assertEquals(await run([]), expected);
    for (const flag of flags) {
      if (flag.startsWith("--allow-read")) continue;
      assertEquals(
        await run(flags.filter((other) => other !== flag)),
        expected,
      );
    }
  });
});

describe("the default model's tokenizer", () => {
  const golden = new URL("golden/", import.meta.url);
  let file: GgufFile;
  let lines: string[];
  let ids: Record<string, number[][]>;

  /** The model's tokenizer, perhaps under another pre-tokenizer. */
  function open(pre: string): Promise<Tokenizer> {
    return tokenizerFromGguf({
      path: file.path,
      metadata: file.metadata,
      string: (key, fallback) =>
        key === "tokenizer.ggml.pre" ? pre : file.string(key, fallback),
      integer: file.integer.bind(file),
      boolean: file.boolean.bind(file),
      strings: file.strings.bind(file),
      numbers: file.numbers.bind(file),
    }, { rows: 49152 });
  }

  beforeAll(async () => {
    file = await GgufFile.open(await testModel());
    const read = async (name: string): Promise<unknown> =>
      JSON.parse(await Deno.readTextFile(new URL(name, golden)));
    lines = await read("tokenizer_corpus.json") as string[];
    ids = await read("tokenizer_ids.json") as typeof ids;
  });

  afterAll(() => file?.close());

  it("has its special tokens", async () => {
    using tokenizer = await tokenizerFromGguf(file, { rows: 49152 });
    assertEquals(tokenizer.size, 49152);
    assertEquals([tokenizer.bos, tokenizer.eos], [1, 2]);
    assertEquals(tokenizer.addBos, false);
    assertEquals([...tokenizer.endTokens].sort(), [0, 2]);
  });

  for (const pre of ["smollm", "gpt-2", "llama-bpe", "qwen2"]) {
    it(`gives llama.cpp's ids under ${pre}`, async () => {
      using tokenizer = await open(pre);
      assertEquals(ids[pre]!.length, lines.length);
      for (const [i, line] of lines.entries()) {
        const found = await tokenizer.encode(line);
        assertEquals(found, ids[pre]![i], JSON.stringify(line));
        const form = pre === "qwen2" ? line.normalize("NFC") : line;
        assertEquals(tokenizer.decode(found), form);
      }
    });
  }

  it("gives llama.cpp's ids of special tokens", async () => {
    using tokenizer = await open("smollm");
    for (const [i, line] of lines.entries()) {
      const found = await tokenizer.encode(line, { special: true });
      assertEquals(found, ids["special"]![i], JSON.stringify(line));
    }
  });

  it("gives a long text the ids of its lines' pieces", async () => {
    using tokenizer = await open("smollm");
    const text = lines.map((line) => `${line}x`).join(" ").repeat(40);
    const found = await tokenizer.encode(text);
    const parts: number[] = [];
    const { cut } = splitBy(findPreTokenizer("smollm")!.expressions);
    for (const part of cutAll(cut!, text, 1000)) {
      parts.push(...await tokenizer.encode(part));
    }
    assertEquals(found, parts);
    assertEquals(tokenizer.decode(found), text);
  });
});
