/** Tests of the tokenizer of a Hugging Face folder: small vocabularies against PyPI tokenizers and transformers, and files that are wrong. */

import {
  assert,
  assertEquals,
  assertRejects,
  assertStringIncludes,
} from "@std/assert";
import { afterAll, beforeAll, describe, it } from "@std/testing/bdd";
import { FormatError } from "../src/formats/error.ts";
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
  merges: string[];
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
    model: {
      type: "BPE",
      dropout: null,
      unk_token: null,
      ...parts.model,
      vocab: Object.fromEntries(
        vocabulary.tokens.map((token, id) => [token, id]),
      ),
      merges: vocabulary.merges,
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
const cases = {
  bytes: await read("vocabularies/bytes_ids.json") as Record<string, Case>,
  text: await read("vocabularies/text_ids.json") as Record<string, Case>,
};

afterAll(async () => {
  for (const folder of folders) await Deno.remove(folder, { recursive: true });
});

describe("tokenizer.json against PyPI tokenizers", () => {
  for (const kind of ["bytes", "text"] as const) {
    const vocabulary = kind === "bytes" ? bytes : texts;
    const [first] = Object.values(cases[kind]);
    for (const [name, golden] of Object.entries(cases[kind])) {
      describe(name, () => {
        let tokenizer: Tokenizer;
        const plain = lines.map((_, i) => golden.ids[i] ?? first!.ids[i]!);

        beforeAll(async () => {
          const file = compose(vocabulary, golden);
          tokenizer = await open({ "tokenizer.json": file });
        });

        afterAll(() => tokenizer.close());

        it("gives the same ids", async () => {
          for (const [i, line] of lines.entries()) {
            const text = JSON.stringify(line);
            assertEquals(await tokenizer.encode(line), plain[i], text);
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
