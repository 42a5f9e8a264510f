/** The tokenizer inside a GGUF file's metadata; opened by model loading. */

import { FormatError, quote } from "../formats/error.ts";
import type { GgufFile } from "../formats/gguf.ts";
import { type Bpe, KIND, validateBpe } from "./bpe.ts";
import { ByteLevelTokenizer, type SpecialTokens } from "./byte_level.ts";
import type { Tokenizer } from "./tokenizer.ts";

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
  const bpe = readBpe(file, rows);
  return await ByteLevelTokenizer.open(bpe, readSpecial(file, bpe));
}

/** The vocabulary, checked. */
function readBpe(file: GgufMetadata, rows: number): Bpe {
  const model = file.string("tokenizer.ggml.model");
  if (model !== "gpt2") {
    throw new FormatError(
      file.path,
      "tokenizer.ggml.model",
      `Unknown tokenizer ${quote(model)}, expected gpt2 (byte-level BPE)`,
    );
  }
  const fields = {
    tokens: "tokenizer.ggml.tokens",
    types: "tokenizer.ggml.token_type",
    scores: "tokenizer.ggml.scores",
    merges: "tokenizer.ggml.merges",
    preTokenizer: "tokenizer.ggml.pre",
  };
  const has = (key: string): boolean => file.metadata.has(key);
  return validateBpe({
    file: file.path,
    fields,
    tokens: file.strings(fields.tokens),
    ...(has(fields.types) && { types: file.numbers(fields.types) }),
    ...(has(fields.scores) && { scores: file.numbers(fields.scores) }),
    merges: file.strings(fields.merges),
    preTokenizer: file.string(fields.preTokenizer),
    rows,
  });
}

/** The special tokens, their ids checked. */
function readSpecial(file: GgufMetadata, bpe: Bpe): SpecialTokens {
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
      file.boolean("tokenizer.ggml.add_bos_token", bpe.preTokenizer.addBos),
  };
}
