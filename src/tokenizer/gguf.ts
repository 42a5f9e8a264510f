/** The tokenizer inside a GGUF file's metadata; opened by model loading. */

import { FormatError, quote } from "../formats/error.ts";
import type { GgufFile } from "../formats/gguf.ts";
import { AddedTokens } from "./added_tokens.ts";
import { type Bpe, KIND, validateBpe } from "./bpe.ts";
import { NativeEncoder } from "./native_encoder.ts";
import {
  cutWords,
  findPreTokenizer,
  PRE_TOKENIZERS,
  type PreTokenizer,
} from "./pre_tokenizers.ts";
import { byteLevelBytes } from "./token_bytes.ts";
import type { Tokenizer } from "./tokenizer.ts";
import {
  type SpecialTokens,
  VocabularyTokenizer,
} from "./vocabulary_tokenizer.ts";

/** What is asked of a GGUF file: its metadata, not its tensors. */
export type GgufMetadata = Pick<
  GgufFile,
  | "path"
  | "metadata"
  | "string"
  | "integer"
  | "boolean"
  | "strings"
  | "numbers"
>;

/** Names under which vocabularies keep tokens that end a turn or a text. */
const END_TOKENS = [
  "<|im_end|>",
  "<|endoftext|>",
  "<|eot_id|>",
  "<|end_of_text|>",
];

/** Keys that name a special token's id. */
const SPECIAL_KEYS = ["bos", "eos", "eot", "eom", "unknown", "padding"]
  .map((name) => `tokenizer.ggml.${name}_token_id`);

/**
 * Opens the tokenizer of a GGUF file. Its vocabulary is checked whole before
 * the native addon is loaded.
 *
 * @param file The open file; it may be closed afterwards.
 * @param options `rows`, the rows of the embedding: every id is below.
 * @returns The tokenizer, to be closed by its owner.
 * @throws {FormatError} When the vocabulary does not hold together, or is of a
 * kind that is not known.
 * @throws {Deno.errors.NotCapable} When a permission is missing, naming the
 * flags.
 * @throws {Error} When the native addon does not load.
 */
export async function tokenizerFromGguf(
  file: GgufMetadata,
  options: { rows: number },
): Promise<Tokenizer> {
  const { rows } = options;
  if (!Number.isSafeInteger(rows) || rows < 1) {
    throw new RangeError(
      `Cannot open a tokenizer: rows is ${rows}, expected a whole number of 1 or more`,
    );
  }
  const model = file.string("tokenizer.ggml.model");
  if (model === "gpt2") return await openGpt2(file, rows);
  throw new FormatError(
    file.path,
    "tokenizer.ggml.model",
    `Unknown tokenizer ${quote(model)}, expected gpt2 (byte-level BPE)`,
  );
}

/** Byte-level BPE. */
async function openGpt2(file: GgufMetadata, rows: number): Promise<Tokenizer> {
  const preTokenizer = readPreTokenizer(file);
  const bpe = readBpe(file, rows, "bytes");
  const { json, ignoreMerges, nfc } = preTokenizer;
  return new VocabularyTokenizer({
    size: bpe.tokens.length,
    special: readSpecial(file, bpe, preTokenizer.addBos),
    added: addedTokens(bpe),
    ...(nfc && { normalize: (text) => text.normalize("NFC") }),
    encoder: await NativeEncoder.open(bpe, {
      preTokenizer: json,
      ignoreMerges,
      cut: cutWords,
    }),
    bytes: (id) => byteLevelBytes(bpe.tokens[id]!, bpe.kinds[id]!),
  });
}

/** How text is split, by its name. */
function readPreTokenizer(file: GgufMetadata): PreTokenizer {
  const key = "tokenizer.ggml.pre";
  const name = file.string(key);
  const found = findPreTokenizer(name);
  if (found) return found;
  const known = PRE_TOKENIZERS.flatMap(({ names }) => names).join(", ");
  throw new FormatError(
    file.path,
    key,
    `Unknown pre-tokenizer ${quote(name)}, expected one of ${known}`,
  );
}

/** The vocabulary, checked. */
function readBpe(
  file: GgufMetadata,
  rows: number,
  spelling: "bytes" | "text",
): Bpe {
  const fields = {
    tokens: "tokenizer.ggml.tokens",
    types: "tokenizer.ggml.token_type",
    scores: "tokenizer.ggml.scores",
    merges: "tokenizer.ggml.merges",
  };
  const has = (key: string): boolean => file.metadata.has(key);
  return validateBpe({
    file: file.path,
    fields,
    spelling,
    tokens: file.strings(fields.tokens),
    ...(has(fields.types) && { types: file.numbers(fields.types) }),
    ...(has(fields.scores) && { scores: file.numbers(fields.scores) }),
    merges: spelling === "bytes" ? file.strings(fields.merges) : [],
    rows,
  });
}

/** Tokens that are matched in text, the longest first, as llama.cpp does. */
function addedTokens(bpe: Bpe): AddedTokens {
  const tokens = bpe.tokens.flatMap((text, id) => {
    const kind = bpe.kinds[id]!;
    const special = kind === KIND.control || kind === KIND.unknown;
    return special || kind === KIND.userDefined ? { id, text, special } : [];
  });
  return new AddedTokens(tokens, "longest");
}

/** The special tokens, their ids checked. */
function readSpecial(
  file: GgufMetadata,
  bpe: Bpe,
  addBos: boolean,
): SpecialTokens {
  const max = bpe.tokens.length - 1;
  const ids = new Map<string, number>();
  for (const key of SPECIAL_KEYS) {
    if (file.metadata.has(key)) {
      ids.set(key, file.integer(key, { min: 0, max }));
    }
  }
  const id = (name: string): number | null =>
    ids.get(`tokenizer.ggml.${name}_token_id`) ?? null;
  const named = END_TOKENS.map((token) => bpe.ids.get(token) ?? null)
    .filter((id) => id !== null && bpe.kinds[id] !== KIND.normal);
  const endTokens = [id("eos"), id("eot"), id("eom"), ...named]
    .filter((id) => id !== null);
  const bos = id("bos");
  return {
    bos,
    eos: id("eos"),
    endTokens: new Set(endTokens),
    addBos: bos !== null &&
      file.boolean("tokenizer.ggml.add_bos_token", addBos),
  };
}
