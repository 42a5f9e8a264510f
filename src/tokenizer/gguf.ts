/** The tokenizer inside a GGUF file's metadata; opened by model loading. */

import { FormatError, quote } from "../formats/error.ts";
import type { GgufFile } from "../formats/gguf.ts";
import { AddedTokens } from "./added_tokens.ts";
import { type Bpe, KIND, validateBpe } from "./bpe.ts";
import { NativeEncoder } from "./native_encoder.ts";
import {
  findPreTokenizer,
  PRE_TOKENIZERS,
  type PreTokenizer,
} from "./pre_tokenizers.ts";
import { SentencePieceEncoder } from "./sentence_piece.ts";
import { BLANK, splitBy } from "./splitting.ts";
import { byteLevelBytes, textBytes } from "./token_bytes.ts";
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
  "<|eom_id|>",
  "<|end_of_text|>",
  "<|end|>",
  "<end_of_turn>",
  "<end_of_utterance>",
  "<EOT>",
  "<｜end▁of▁sentence｜>",
];

/** Keys of the vocabulary. */
const FIELDS = {
  tokens: "tokenizer.ggml.tokens",
  types: "tokenizer.ggml.token_type",
  scores: "tokenizer.ggml.scores",
  merges: "tokenizer.ggml.merges",
};

/** Special tokens whose ids a file may name. */
const SPECIAL = ["bos", "eos", "eot", "eom", "unknown", "padding"];

/** Special tokens of Phi-3 that leave the blanks behind them. */
const KEEP_BLANKS = ["<unk>", "<s>", "<|endoftext|>"];

/**
 * Opens the tokenizer of a GGUF file. Its vocabulary is checked whole before
 * the native addon is loaded.
 *
 * @param file The open file; it may be closed afterwards.
 * @param options `rows`, the rows of the embedding: every id is below; `native`
 * makes the encoder of what was checked, `NativeEncoder.open` by default.
 * @returns The tokenizer, to be closed by its owner.
 * @throws {FormatError} When the vocabulary does not hold together, or is of a
 * kind that is not known.
 * @throws {Deno.errors.NotCapable} When a permission is missing, naming the
 * flags.
 * @throws {Error} When the native addon does not load.
 */
export async function tokenizerFromGguf(
  file: GgufMetadata,
  options: { rows: number; native?: typeof NativeEncoder.open },
): Promise<Tokenizer> {
  const { rows, native = NativeEncoder.open } = options;
  if (!Number.isSafeInteger(rows) || rows < 1) {
    throw new RangeError(
      `Cannot open a tokenizer: rows is ${rows}, expected a whole number of 1 or more`,
    );
  }
  const model = file.string("tokenizer.ggml.model");
  if (model === "gpt2") return await openGpt2(file, rows, native);
  if (model === "llama") return openLlama(file, rows);
  throw new FormatError(
    file.path,
    "tokenizer.ggml.model",
    `Unknown tokenizer ${
      quote(model)
    }, expected gpt2 (byte-level BPE) or llama (SentencePiece BPE)`,
  );
}

/** Byte-level BPE. */
async function openGpt2(
  file: GgufMetadata,
  rows: number,
  native: typeof NativeEncoder.open,
): Promise<Tokenizer> {
  const preTokenizer = readPreTokenizer(file);
  const bpe = readBpe(file, rows, "bytes");
  const { expressions, ignoreMerges = false, addBos = false } = preTokenizer;
  const { json, slow, cut } = splitBy(expressions);
  return new VocabularyTokenizer({
    size: bpe.tokens.length,
    special: readSpecial(file, bpe, { addBos }),
    added: addedTokens(file, bpe),
    ...(preTokenizer.nfc && { normalize: (text) => text.normalize("NFC") }),
    encoder: await native(bpe, {
      preTokenizer: json,
      ignoreMerges,
      slow,
      cut: cut!,
    }),
    bytes: (id) => byteLevelBytes(bpe.tokens[id]!, bpe.kinds[id]!),
  });
}

/** SentencePiece's BPE, by scores. */
function openLlama(file: GgufMetadata, rows: number): Tokenizer {
  const bpe = readBpe(file, rows, "text");
  const scores = Float32Array.from(file.numbers(FIELDS.scores));
  const wrong = scores.findIndex((score) => !Number.isFinite(score));
  if (wrong >= 0) {
    throw new FormatError(
      file.path,
      FIELDS.scores,
      `Score ${wrong} is ${scores[wrong]}, expected a finite number`,
    );
  }
  const special = readSpecial(file, bpe, { addBos: true, bos: 1, eos: 2 });
  const blank = file.boolean("tokenizer.ggml.add_space_prefix", true);
  const decoding = { bytes: true, first: blank ? "blank" : "nothing" } as const;
  const unknown = readId(file, bpe, "unknown") ?? 0;
  return new VocabularyTokenizer({
    size: bpe.tokens.length,
    special,
    added: addedTokens(file, bpe),
    normalize: (text, place) =>
      (blank && place !== "behind" ? BLANK : "") + text.replaceAll(" ", BLANK),
    encoder: new SentencePieceEncoder(bpe, { scores, unknown }),
    bytes: (id, first) => {
      const kind = bpe.kinds[id];
      const isText = kind === KIND.control || kind === KIND.unknown ||
        kind === KIND.userDefined;
      return isText
        ? new TextEncoder().encode(bpe.tokens[id])
        : textBytes(bpe.tokens[id]!, decoding, first);
    },
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
  const has = (key: string): boolean => file.metadata.has(key);
  return validateBpe({
    file: file.path,
    fields: FIELDS,
    spelling,
    tokens: file.strings(FIELDS.tokens),
    ...(has(FIELDS.types) && { types: file.numbers(FIELDS.types) }),
    ...(has(FIELDS.scores) && { scores: file.numbers(FIELDS.scores) }),
    merges: spelling === "bytes" ? file.strings(FIELDS.merges) : [],
    rows,
  });
}

/** Tokens that are matched in text, the longest first, as llama.cpp does. */
function addedTokens(file: GgufMetadata, bpe: Bpe): AddedTokens {
  // Files do not say so, but Phi-3's tokens take the blanks behind them along.
  const name = file.string("general.name", "").toLowerCase();
  const strips = name.includes("phi-3") || name.includes("phi3");
  const tokens = bpe.tokens.flatMap((text, id) => {
    const kind = bpe.kinds[id]!;
    const special = kind === KIND.control || kind === KIND.unknown;
    const rightStrip = strips && !KEEP_BLANKS.includes(text);
    return special || kind === KIND.userDefined
      ? { id, text, special, rightStrip }
      : [];
  });
  return new AddedTokens(tokens, "longest");
}

/** The special tokens, their ids checked; some have defaults. */
function readSpecial(
  file: GgufMetadata,
  bpe: Bpe,
  defaults: { addBos: boolean; bos?: number; eos?: number },
): SpecialTokens {
  const ids = new Map(SPECIAL.map((name) => [name, readId(file, bpe, name)]));
  const orElse = (id = -1): number | null => id in bpe.tokens ? id : null;
  const bos = ids.get("bos") ?? orElse(defaults.bos);
  const eos = ids.get("eos") ?? orElse(defaults.eos);
  const named = END_TOKENS.map((token) => bpe.ids.get(token) ?? null)
    .filter((id) => id !== null && bpe.kinds[id] !== KIND.normal);
  const endTokens = [eos, ids.get("eot"), ids.get("eom"), ...named]
    .filter((id) => id !== null && id !== undefined);
  return {
    bos,
    eos,
    endTokens: new Set(endTokens),
    addBos: bos !== null &&
      file.boolean("tokenizer.ggml.add_bos_token", defaults.addBos),
  };
}

/** The id of a special token; null when the file names none. */
function readId(file: GgufMetadata, bpe: Bpe, name: string): number | null {
  const key = `tokenizer.ggml.${name}_token_id`;
  if (!file.metadata.has(key)) return null;
  return file.integer(key, { min: 0, max: bpe.tokens.length - 1 });
}
