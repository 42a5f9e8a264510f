/** The checked parts of a tokenizer.json, so that the native addon gets nothing that was not understood; called when a Hugging Face folder is opened. */

import type { ConfigFile } from "../formats/config.ts";
import { quote } from "../formats/error.ts";
import type { Json } from "../formats/json.ts";
import { type AddedToken, AddedTokens } from "./added_tokens.ts";
import { type Bpe, KIND, validateBpe } from "./bpe.ts";
import { cutBetweenTokens } from "./cuts.ts";
import type { NativeOptions, Unigram } from "./native_encoder.ts";
import { readNormalizer } from "./normalizer.ts";
import { BLANK, readSplitting, type Splitting } from "./splitting.ts";
import {
  byteLevelBytes,
  isByte,
  readTextDecoder,
  textBytes,
} from "./token_bytes.ts";
import type { TokenizerParts } from "./vocabulary_tokenizer.ts";

/** What a tokenizer.json says. */
export interface TokenizerJson {
  /** Its vocabulary. */
  readonly bpe: Bpe;
  /** What the addon is told beside it. */
  readonly native: NativeOptions;
  /** The rest of a tokenizer but its encoder and its special tokens. */
  readonly parts: Omit<TokenizerParts, "encoder" | "special">;
  /**
   * The special token that its template puts first, null when another; undefined
   * without a template.
   */
  readonly first: number | null | undefined;
}

/** Post-processors; all that matters of them is the token that they put first. */
const POST_PROCESSORS = [
  "BertProcessing",
  "ByteLevel",
  "RobertaProcessing",
  "Sequence",
  "TemplateProcessing",
];

/**
 * Reads a tokenizer.json.
 *
 * @param file The file.
 * @param rows Rows of the model's embedding: every id is below.
 * @returns Its parts.
 * @throws {FormatError} When a part is not known or does not hold together.
 */
export function readTokenizerJson(
  file: ConfigFile,
  rows: number,
): TokenizerJson {
  const model = readModel(file);
  const normalize = readNormalizer(file.object("normalizer"));
  const splitting = readSplitting(file.object("pre_tokenizer"), {
    blanksGone: normalize?.("a b", "behind").includes(" ") === false,
  });
  const vocab = readVocab(model);
  const added = withRows(
    file.objects("added_tokens").map(readAddedToken),
    vocab,
    rows,
  );
  const bpe = readBpe(file, { model, vocab, splitting, added, rows });
  const first = readPostProcessor(file.object("post_processor"), bpe);
  // Those of a second pass are looked for as the normalizer leaves them.
  const later = added.filter(({ normalized }) => normalized).map((token) =>
    normalize ? { ...token, text: normalize(token.text, "inside") } : token
  ).filter(({ text }) => text !== "");
  return {
    bpe,
    native: {
      preTokenizer: splitting.json,
      ignoreMerges: model.boolean("ignore_merges", false),
      byteFallback: model.boolean("byte_fallback", false),
      fuseUnknown: model.boolean("fuse_unk", false),
      ...(vocab.unigram
        ? { unigram: vocab.unigram }
        : { unknown: readUnknown(model, bpe) }),
      slow: splitting.slow,
      cut: splitting.cut ?? cutBetweenTokens(() => plainTokens(bpe)),
    },
    parts: {
      size: bpe.tokens.length,
      added: new AddedTokens(
        added.filter(({ normalized }) => !normalized),
        "leftmost",
      ),
      addedLater: new AddedTokens(later, "leftmost"),
      ...(normalize && { normalize }),
      ...(splitting.prefix && { prefix: splitting.prefix }),
      bytes: readBytes(file, bpe, new Map(later.map((t) => [t.id, t.text]))),
    },
    first,
  };
}

/** The model, where it is of a kind that is known. */
function readModel(file: ConfigFile): ConfigFile {
  const model = file.object("model");
  if (model === null) throw file.error("model", "an object");
  // The oldest files leave the type out.
  const type = model.string("type", model.has("merges") ? "BPE" : "unknown");
  if (type !== "BPE" && type !== "Unigram") {
    throw model.error("type", '"BPE" or "Unigram"');
  }
  if (model.has("dropout")) {
    model.float("dropout", { min: 0, max: 0 });
  }
  for (const key of ["continuing_subword_prefix", "end_of_word_suffix"]) {
    if (model.string(key, "") !== "") throw model.error(key, "none");
  }
  return model;
}

/** An added token, with whether the normalizer comes before it. */
interface JsonAddedToken extends AddedToken {
  normalized: boolean;
}

function readAddedToken(file: ConfigFile): JsonAddedToken {
  const special = file.boolean("special", false);
  return {
    id: file.integer("id", { min: 0, max: 2 ** 31 - 1 }),
    text: file.string("content"),
    special,
    singleWord: file.boolean("single_word", false),
    leftStrip: file.boolean("lstrip", false),
    rightStrip: file.boolean("rstrip", false),
    normalized: file.boolean("normalized", !special),
  };
}

/**
 * Added tokens but the last ones that the model has no row for, as where a
 * family shares a file and only some models see images. They are text here.
 */
function withRows(
  added: readonly JsonAddedToken[],
  vocab: Vocab,
  rows: number,
): readonly JsonAddedToken[] {
  const texts = new Set(vocab.entries.map(([text]) => text));
  const own = added.filter(({ text }) => !texts.has(text))
    .sort((a, b) => b.id - a.id);
  let total = texts.size + own.length;
  const left = new Set<JsonAddedToken>();
  for (const token of own) {
    if (total <= rows || token.id !== total - 1) break;
    left.add(token);
    total--;
  }
  return added.filter((token) => !left.has(token));
}

/** The vocabulary with the added tokens, checked. */
function readBpe(
  file: ConfigFile,
  { model, vocab, splitting, added, rows }: {
    model: ConfigFile;
    vocab: Vocab;
    splitting: Splitting;
    added: readonly JsonAddedToken[];
    rows: number;
  },
): Bpe {
  const byteFallback = model.boolean("byte_fallback", false);
  const addedByText = new Map(added.map((token) => [token.text, token]));
  const placeByText = new Map(vocab.entries.map(([text], i) => [text, i]));
  const tokens: string[] = [];
  const ids: number[] = [];
  const types: number[] = [];
  const kindOf = ({ special }: JsonAddedToken): number =>
    special ? KIND.control : KIND.userDefined;
  for (const [token, id] of vocab.entries) {
    const same = addedByText.get(token);
    const plain = byteFallback && isByte(token) ? KIND.byte : KIND.normal;
    tokens.push(token);
    ids.push(typeof id === "number" ? id : NaN);
    types.push(same ? kindOf(same) : plain);
  }
  for (const token of added) {
    const same = vocab.entries[placeByText.get(token.text) ?? -1];
    if (same?.[1] === token.id) continue;
    tokens.push(token.text);
    ids.push(token.id);
    types.push(kindOf(token));
  }
  return validateBpe({
    file: file.path,
    fields: {
      tokens: "model.vocab",
      types: "added_tokens",
      scores: "model.vocab",
      merges: "model.merges",
    },
    spelling: splitting.bytes ? "bytes" : "text",
    tokens,
    ids,
    types,
    merges: vocab.merges,
    rows,
  });
}

/** The vocabulary of a model, its tokens and ids not yet checked. */
interface Vocab {
  entries: [string, Json][];
  /** Of BPE. */
  merges: (string | string[])[];
  /** Of Unigram. */
  unigram?: Unigram;
}

function readVocab(model: ConfigFile): Vocab {
  const vocab = model.value("vocab");
  if (model.value("type") === "Unigram") {
    if (!Array.isArray(vocab) || !vocab.every(isScored)) {
      throw model.error("vocab", 'a list of scored tokens as ["a", -1.5]');
    }
    return {
      entries: vocab.map(([text], id) => [text, id]),
      merges: [],
      unigram: {
        scores: vocab.map(([, score]) => score),
        unknown: model.integer("unk_id", { min: 0, max: vocab.length - 1 }),
      },
    };
  }
  if (!(vocab instanceof Map)) {
    throw model.error("vocab", "an object of ids by token");
  }
  const merges = model.value("merges");
  if (!Array.isArray(merges) || !merges.every(isMerge)) {
    throw model.error("merges", 'a list of pairs as "a b" or ["a", "b"]');
  }
  return { entries: [...vocab], merges };
}

function isScored(value: Json): value is [string, number] {
  return Array.isArray(value) && value.length === 2 &&
    typeof value[0] === "string" && typeof value[1] === "number";
}

function isMerge(value: Json): value is string | string[] {
  return typeof value === "string" ||
    Array.isArray(value) && value.every((part) => typeof part === "string");
}

/** The token of characters without one. */
function readUnknown(model: ConfigFile, bpe: Bpe): string | null {
  if (!model.has("unk_token")) return null;
  const token = model.string("unk_token");
  if (bpe.ids.has(token)) return token;
  throw model.error("unk_token", "one of the tokens");
}

/** What tokens become when text is decoded; some as the normalizer has them. */
function readBytes(
  file: ConfigFile,
  bpe: Bpe,
  normalized: ReadonlyMap<number, string>,
): TokenizerParts["bytes"] {
  const textOf = (id: number): string => normalized.get(id) ?? bpe.tokens[id]!;
  const decoder = file.object("decoder");
  if (bpe.spelling === "bytes") {
    if (decoder?.string("type") !== "ByteLevel") {
      throw (decoder ?? file).error(
        decoder ? "type" : "decoder",
        "ByteLevel, as the pre-tokenizer is",
      );
    }
    return (id) => byteLevelBytes(textOf(id), bpe.kinds[id]!);
  }
  if (decoder === null) {
    throw file.error("decoder", `a decoder that turns ${BLANK} into a blank`);
  }
  const decoding = readTextDecoder(decoder);
  return (id, first) => textBytes(textOf(id), decoding, first);
}

/** Tokens that text may become without being matched whole. */
function plainTokens(bpe: Bpe): string[] {
  return bpe.tokens.filter((_, id) =>
    bpe.kinds[id] !== KIND.control && bpe.kinds[id] !== KIND.byte
  );
}

/** The special token that a template puts first; every token named must be one. */
function readPostProcessor(
  file: ConfigFile | null,
  bpe: Bpe,
): TokenizerJson["first"] {
  if (file === null) return undefined;
  const type = file.string("type");
  if (!POST_PROCESSORS.includes(type)) {
    throw file.error("type", `one of ${POST_PROCESSORS.join(", ")}`);
  }
  if (type === "Sequence") {
    const firsts = file.objects("processors").map((part) =>
      readPostProcessor(part, bpe)
    );
    return firsts.find((first) => first !== undefined);
  }
  if (type !== "TemplateProcessing") return undefined;
  const known = file.object("special_tokens");
  const idsOf = (name: string, from: ConfigFile): number[] => {
    const ids = known?.object(name)?.ids("ids", bpe.tokens.length - 1) ?? [];
    if (ids.length > 0) return ids;
    throw from.error("id", `one of special_tokens, as ${quote(name)} is none`);
  };
  let first: number | null = null;
  for (const key of ["single", "pair"]) {
    for (const [place, item] of file.objects(key).entries()) {
      const special = item.object("SpecialToken");
      if (special === null) continue;
      const ids = idsOf(special.string("id"), special);
      if (key === "single" && place === 0) first = ids[0]!;
    }
  }
  return first;
}
