/** The byte-level BPE tokenizer: the native addon merges, all else is here; made by the readers of model files. */

import { type NativeTokenizer, openNative } from "./addon.ts";
import { type Bpe, KIND } from "./bpe.ts";
import { tokenBytes } from "./byte_map.ts";
import { findCut } from "./pre_tokenizers.ts";
import type { EncodeOptions, Tokenizer } from "./tokenizer.ts";

/** The most UTF-16 units of a text: 64 Mi. */
const MAX_TEXT = 64 * 1024 * 1024;

/** UTF-16 units given to the addon at once; it takes some 150 bytes for each. */
const CHUNK = 32 * 1024;

/** Special tokens of a vocabulary, by what a model file says. */
export interface SpecialTokens {
  /** Id of the token that begins a text. */
  readonly bos: number | null;
  /** Id of the token that ends a text. */
  readonly eos: number | null;
  /** Ids that end generation. */
  readonly endTokens: ReadonlySet<number>;
  /** Whether the model file asks for `bos` first. */
  readonly addBos: boolean;
}

/** A tokenizer over a checked vocabulary. */
export class ByteLevelTokenizer implements Tokenizer {
  readonly size: number;
  readonly bos: number | null;
  readonly eos: number | null;
  readonly endTokens: ReadonlySet<number>;
  readonly specialTokens: readonly string[];
  readonly addBos: boolean;

  /** Null once closed. */
  #bpe: Bpe | null;
  #native: NativeTokenizer | null;
  /** Bytes of the tokens that were asked for. */
  #pieces: (Uint8Array<ArrayBuffer> | undefined)[] = [];
  /** Tokens that are matched in text before it is split; null when none. */
  #always: RegExp | null;
  #special: RegExp | null;

  private constructor(
    bpe: Bpe,
    native: NativeTokenizer,
    special: SpecialTokens,
  ) {
    this.#bpe = bpe;
    this.#native = native;
    this.size = bpe.tokens.length;
    this.bos = special.bos;
    this.eos = special.eos;
    this.endTokens = special.endTokens;
    this.addBos = special.addBos;
    const ofKinds = (...kinds: number[]): string[] =>
      bpe.tokens.filter((_, id) => kinds.includes(bpe.kinds[id]!));
    const always = ofKinds(KIND.userDefined);
    this.specialTokens = ofKinds(KIND.control, KIND.unknown);
    this.#always = anyOf(always);
    this.#special = anyOf([...always, ...this.specialTokens]);
  }

  /**
   * Gives a vocabulary to the native addon.
   *
   * @param bpe The vocabulary, checked.
   * @param special Its special tokens.
   * @returns The tokenizer.
   * @throws {Deno.errors.NotCapable} When a permission is missing.
   * @throws {Error} When the addon does not load.
   */
  static async open(
    bpe: Bpe,
    special: SpecialTokens,
  ): Promise<ByteLevelTokenizer> {
    const native = await openNative(tokenizerJson(bpe));
    return new ByteLevelTokenizer(bpe, native, special);
  }

  async encode(text: string, options: EncodeOptions = {}): Promise<number[]> {
    const { special = false, literal = [], signal } = options;
    if (typeof text !== "string") {
      throw new TypeError(
        `Cannot encode: text is ${typeof text}, expected a string`,
      );
    }
    if (text.length > MAX_TEXT) {
      throw new RangeError(
        `Cannot encode: text has ${text.length} characters, expected at most ${MAX_TEXT}`,
      );
    }
    signal?.throwIfAborted();
    const { bpe } = this.#open();
    const ids: number[] = [];
    const pattern = special ? this.#special : this.#always;
    for (const part of parts(text.toWellFormed(), pattern, literal)) {
      if (part.token) ids.push(bpe.ids.get(part.text)!);
      else await this.#encodePlain(part.text, ids, signal);
    }
    return ids;
  }

  piece(id: number): Uint8Array {
    return this.#piece(id).slice();
  }

  decode(ids: Iterable<number>): string {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    const texts: string[] = [];
    for (const id of ids) {
      texts.push(decoder.decode(this.#piece(id), { stream: true }));
    }
    texts.push(decoder.decode());
    return texts.join("");
  }

  close(): void {
    // The addon's memory goes with its object, which has no end of its own.
    this.#bpe = null;
    this.#native = null;
    this.#pieces = [];
  }

  /** Closes the tokenizer at the end of a `using` block. */
  [Symbol.dispose](): void {
    this.close();
  }

  #open(): { bpe: Bpe; native: NativeTokenizer } {
    if (this.#bpe && this.#native) {
      return { bpe: this.#bpe, native: this.#native };
    }
    throw new Deno.errors.BadResource("Cannot use a closed tokenizer");
  }

  /** Adds the ids of text without special tokens, piece by piece. */
  async #encodePlain(
    text: string,
    ids: number[],
    signal: AbortSignal | undefined,
  ): Promise<void> {
    const { bpe } = this.#open();
    if (bpe.preTokenizer.nfc) text = text.normalize("NFC");
    for (let start = 0; start < text.length;) {
      const end = findCut(text, start + CHUNK);
      const { native } = this.#open();
      const encoding = await native.encode(text.slice(start, end), null, {
        addSpecialTokens: false,
      });
      signal?.throwIfAborted();
      for (const id of encoding.getIds()) {
        if (!(id < this.size)) {
          throw new RangeError(
            `Tokenizer returned id ${id}, expected less than ${this.size}`,
          );
        }
        ids.push(id);
      }
      start = end;
    }
  }

  /** The bytes of a token, shared. */
  #piece(id: number): Uint8Array<ArrayBuffer> {
    if (typeof id !== "number") {
      throw new TypeError(`Token id is ${typeof id}, expected a number`);
    }
    const { bpe } = this.#open();
    if (!Number.isInteger(id) || id < 0 || id >= this.size) {
      throw new RangeError(
        `Token id is ${id}, expected 0 to ${this.size - 1}`,
      );
    }
    return this.#pieces[id] ??= pieceBytes(bpe.tokens[id]!, bpe.kinds[id]!);
  }
}

/**
 * A checked vocabulary as a tokenizer.json. Tokens that text must not turn
 * into by itself are left out.
 *
 * @param bpe The vocabulary.
 * @returns The JSON text.
 */
export function tokenizerJson(bpe: Bpe): string {
  const merged = new Set<string>();
  for (const [left, right] of bpe.merges) {
    merged.add(left).add(right).add(left + right);
  }
  const vocab = bpe.tokens.flatMap((token, id) =>
    bpe.kinds[id] === KIND.normal || merged.has(token)
      ? `${JSON.stringify(token)}:${id}`
      : []
  );
  const model = JSON.stringify({
    type: "BPE",
    dropout: null,
    unk_token: null,
    continuing_subword_prefix: null,
    end_of_word_suffix: null,
    fuse_unk: false,
    byte_fallback: false,
    ignore_merges: bpe.preTokenizer.ignoreMerges,
    merges: bpe.merges,
  });
  const rest = JSON.stringify({
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens: [],
    normalizer: null,
    pre_tokenizer: bpe.preTokenizer.json,
    post_processor: null,
    decoder: null,
  });
  // Written by hand: an object would lose the token "__proto__".
  return `${rest.slice(0, -1)},"model":${model.slice(0, -1)},"vocab":{${
    vocab.join(",")
  }}}}`;
}

/** The bytes that a token stands for. */
function pieceBytes(token: string, kind: number): Uint8Array<ArrayBuffer> {
  if (kind === KIND.byte) {
    return Uint8Array.of(Number.parseInt(token.slice(3, 5), 16));
  }
  const spelled = kind === KIND.normal || kind === KIND.unused
    ? tokenBytes(token)
    : null;
  return spelled ?? new TextEncoder().encode(token);
}

/** Matches any of some tokens, the longest where several fit. */
function anyOf(tokens: string[]): RegExp | null {
  if (tokens.length === 0) return null;
  const escaped = tokens
    .toSorted((a, b) => b.length - a.length)
    .map((token) => token.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"));
  return new RegExp(escaped.join("|"), "gu");
}

/** Text between the tokens that a pattern matches outside of literal stretches, and those tokens. */
function* parts(
  text: string,
  pattern: RegExp | null,
  literal: readonly (readonly [number, number])[],
): Generator<{ text: string; token: boolean }> {
  let start = 0;
  let next = 0;
  for (const match of pattern ? text.matchAll(pattern) : []) {
    while (next < literal.length && literal[next]![1] <= match.index) next++;
    const from = literal[next]?.[0] ?? Infinity;
    if (from < match.index + match[0].length) continue;
    if (match.index > start) {
      yield { text: text.slice(start, match.index), token: false };
    }
    yield { text: match[0], token: true };
    start = match.index + match[0].length;
  }
  if (start < text.length) yield { text: text.slice(start), token: false };
}
