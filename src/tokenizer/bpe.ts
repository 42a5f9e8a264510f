/** The check of a vocabulary before anything encodes with it, as a wrong merge kills the native addon; called for GGUF metadata and tokenizer.json. */

import { FormatError, quote } from "../formats/error.ts";
import { isByteLevel } from "./byte_map.ts";

/** What a token is for; the numbers are those of `tokenizer.ggml.token_type`. */
export const KIND = {
  normal: 1,
  unknown: 2,
  control: 3,
  userDefined: 4,
  unused: 5,
  byte: 6,
} as const;

/** A vocabulary as a file has it: nothing here is trusted. */
export interface BpeSource {
  /** Path of the file. */
  file: string;
  /** What errors call each part. */
  fields: {
    tokens: string;
    types: string;
    scores: string;
    merges: string;
  };
  /** What normal tokens are written in: the characters of bytes, or text. */
  spelling: "bytes" | "text";
  /** Every token's text. */
  tokens: readonly string[];
  /** Every token's id; its place in `tokens` when left out. */
  ids?: ArrayLike<number>;
  /** Every token's {@linkcode KIND}; all normal when left out. */
  types?: ArrayLike<number>;
  /** Every token's score; not used, but their count must be right. */
  scores?: ArrayLike<number>;
  /** Pairs of tokens, or with a blank between them; the first merged first. */
  merges: readonly (string | readonly string[])[];
  /** Rows of the model's embedding: every id is below. */
  rows: number;
}

/** A vocabulary that holds together. */
export interface Bpe {
  /** Text of every token, by id. */
  readonly tokens: readonly string[];
  /** Its {@linkcode KIND}, by id. */
  readonly kinds: Uint8Array;
  /** Id of every text. */
  readonly ids: ReadonlyMap<string, number>;
  /** The two tokens of every merge, the first merged first. */
  readonly merges: readonly (readonly [string, string])[];
  /** What normal tokens are written in. */
  readonly spelling: "bytes" | "text";
}

/** The most UTF-16 units of a token; real ones have up to some hundreds. */
const MAX_TOKEN = 16384;

/** The most UTF-16 units of all tokens that are matched in text together. */
const MAX_MATCHED = 256 * 1024;

/** The most merges per token; a token of n bytes has at most n - 1. */
const MAX_MERGES = 16;

/**
 * Checks a vocabulary, so that the native addon cannot abort on it and every
 * id that comes out has a row in the embedding.
 *
 * @param source The vocabulary as its file has it.
 * @returns The same by id.
 * @throws {FormatError} When it does not hold together, naming file and field.
 */
export function validateBpe(source: BpeSource): Bpe {
  checkCounts(source);
  const { tokens, kinds } = placeTokens(source);
  checkMatched(source, tokens, kinds);
  const ids = new Map<string, number>();
  for (let id = 0; id < tokens.length; id++) {
    const token = tokens[id]!;
    checkToken(source, { id, token, kind: kinds[id]! });
    const first = ids.get(token);
    if (first !== undefined) {
      throw fail(
        source,
        "tokens",
        `Token ${quote(token)} has ids ${first} and ${id}, expected one id`,
      );
    }
    ids.set(token, id);
  }
  const merges = checkMerges(source, ids, kinds);
  return { tokens, kinds, ids, merges, spelling: source.spelling };
}

function fail(
  source: BpeSource,
  field: keyof BpeSource["fields"],
  message: string,
): FormatError {
  return new FormatError(source.file, source.fields[field], message);
}

/** Refuses parts of different lengths and vocabularies of absurd size. */
function checkCounts(source: BpeSource): void {
  const { tokens, ids, types, scores, merges, rows } = source;
  if (tokens.length === 0 || tokens.length > rows) {
    throw fail(
      source,
      "tokens",
      `Found ${tokens.length} tokens, expected 1 to ${rows}, the rows of the embedding`,
    );
  }
  for (
    const [field, values] of [
      ["tokens", ids],
      ["types", types],
      ["scores", scores],
    ] as const
  ) {
    if (values && values.length !== tokens.length) {
      throw fail(
        source,
        field,
        `Found ${values.length} values, expected ${tokens.length}, one for each token`,
      );
    }
  }
  if (merges.length > MAX_MERGES * tokens.length) {
    throw fail(
      source,
      "merges",
      `Found ${merges.length} merges, expected at most ${MAX_MERGES} for each of ${tokens.length} tokens`,
    );
  }
}

/** Puts every token at its id, where ids must leave no gap. */
function placeTokens(
  source: BpeSource,
): { tokens: readonly string[]; kinds: Uint8Array } {
  const count = source.tokens.length;
  const tokens = new Array<string>(count);
  const taken = new Uint8Array(count);
  const kinds = new Uint8Array(count);
  for (let i = 0; i < count; i++) {
    const id = source.ids ? source.ids[i]! : i;
    const token = source.tokens[i]!;
    if (!Number.isInteger(id) || id < 0 || id >= count) {
      throw fail(
        source,
        "tokens",
        `Token ${quote(token)} has id ${id}, expected 0 to ${
          count - 1
        } as there are ${count} tokens, their ids without gaps`,
      );
    }
    if (taken[id]) {
      throw fail(
        source,
        "tokens",
        `Tokens ${quote(tokens[id]!)} and ${
          quote(token)
        } both have id ${id}, expected ids of their own`,
      );
    }
    taken[id] = 1;
    tokens[id] = token;
    const kind = source.types ? source.types[i]! : KIND.normal;
    if (!Number.isInteger(kind) || kind < KIND.normal || kind > KIND.byte) {
      throw fail(
        source,
        "types",
        `Token ${quote(token)} has type ${kind}, expected 1 to 6`,
      );
    }
    kinds[id] = kind;
  }
  return { tokens, kinds };
}

/** Refuses more tokens to look for in text than a pattern has room for. */
function checkMatched(
  source: BpeSource,
  tokens: readonly string[],
  kinds: Uint8Array,
): void {
  const total = tokens.reduce((sum, token, id) => {
    const plain = kinds[id] === KIND.normal || kinds[id] === KIND.byte;
    return plain ? sum : sum + token.length;
  }, 0);
  if (total <= MAX_MATCHED) return;
  throw fail(
    source,
    "types",
    `Found special and added tokens of ${total} characters together, expected at most ${MAX_MATCHED}`,
  );
}

/** Refuses a token whose text does not suit its kind. */
function checkToken(
  source: BpeSource,
  { id, token, kind }: { id: number; token: string; kind: number },
): void {
  const wrong = (expected: string): FormatError =>
    fail(
      source,
      "tokens",
      `Token ${id} is ${quote(token)}, expected ${expected}`,
    );
  if (token.length > MAX_TOKEN) {
    throw wrong(`at most ${MAX_TOKEN} characters, found ${token.length}`);
  }
  if (token === "" && kind !== KIND.unused) throw wrong("at least a character");
  const isByte = /^<0x[0-9A-Fa-f]{2}>$/.test(token);
  if (kind === KIND.byte && !isByte || !isByte && /^<0x.*>$/s.test(token)) {
    throw wrong("<0x00> to <0xFF> for a byte");
  }
  const bytes = source.spelling === "bytes";
  if (bytes && kind === KIND.normal && !isByteLevel(token)) {
    throw wrong(
      "the characters that byte-level vocabularies write bytes in, or type 3 (control) or 4 (user-defined)",
    );
  }
}

/** Refuses merges of what is no token, into what is none, or twice the same. */
function checkMerges(
  source: BpeSource,
  ids: ReadonlyMap<string, number>,
  kinds: Uint8Array,
): [string, string][] {
  const seen = new Set<string>();
  return source.merges.map((merge, rank) => {
    const wrong = (found: string, expected: string): FormatError =>
      fail(
        source,
        "merges",
        `Merge ${rank} ${quote(name)} ${found}, expected ${expected}`,
      );
    const name = typeof merge === "string" ? merge : merge.join(" ");
    const parts = typeof merge === "string" ? merge.split(" ") : merge;
    const [left, right] = parts;
    if (parts.length !== 2 || !left || !right) {
      throw wrong("is no pair", "two tokens with a blank between them");
    }
    for (const token of [left, right, left + right]) {
      const id = ids.get(token);
      if (id === undefined) {
        throw wrong(
          `needs ${quote(token)}`,
          "its parts and its result to be tokens",
        );
      }
      const kind = kinds[id];
      // Otherwise plain text could turn into a special token.
      if (kind !== KIND.normal && !mergeable(source, kind, token)) {
        throw wrong(
          `needs ${quote(token)} of type ${kind}`,
          "tokens of type 1 (normal)",
        );
      }
    }
    const pair = `${left.length} ${left}${right}`;
    if (seen.has(pair)) throw wrong("comes twice", "every merge once");
    seen.add(pair);
    return [left, right];
  });
}

/** Whether a token that is not normal may still come of merges. */
function mergeable(
  source: BpeSource,
  kind: number | undefined,
  token: string,
): boolean {
  return (kind === KIND.userDefined || kind === KIND.unused) &&
    (source.spelling === "text" || isByteLevel(token));
}
