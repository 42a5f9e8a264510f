/** A tokenizer over a checked vocabulary: added tokens are matched, what stands between them is prepared, cut and encoded; made by the readers of model files. */

import type { AddedTokens } from "./added_tokens.ts";
import type { Cut } from "./cuts.ts";
import type { EncodeOptions, Tokenizer } from "./tokenizer.ts";

/** The most UTF-16 units of a text: 64 Mi. */
const MAX_TEXT = 64 * 1024 * 1024;

/** UTF-16 units encoded at once; the addon takes some 150 bytes for each. */
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

/** What turns text without added tokens into ids. */
export interface Encoder {
  /** The ids of a text. */
  encode(text: string): Promise<readonly number[]>;
  /** Where a text can be cut without a change to its ids. */
  readonly cut: Cut;
}

/**
 * Where a piece of text stands: at the `start` of the whole, `inside` it, or
 * first but behind text that was encoded before it.
 */
export type Place = "start" | "inside" | "behind";

/** What a tokenizer is made of. */
export interface TokenizerParts {
  /** Number of tokens. */
  readonly size: number;
  /** Its special tokens. */
  readonly special: SpecialTokens;
  /** Tokens matched in the text as it is given. */
  readonly added: AddedTokens;
  /** Changes what stands between them; the text itself by default. */
  readonly normalize?: (text: string, place: Place) => string;
  /** Tokens matched after that; none by default. */
  readonly addedLater?: AddedTokens;
  /** Puts a blank before what is left; nothing by default. */
  readonly prefix?: (text: string, place: Place) => string;
  /** Encodes the rest. */
  readonly encoder: Encoder;
  /** The bytes of a token; `first` when it begins a text. */
  readonly bytes: (id: number, first: boolean) => Uint8Array<ArrayBuffer>;
}

/** A tokenizer put together from its parts. */
export class VocabularyTokenizer implements Tokenizer {
  readonly size: number;
  readonly bos: number | null;
  readonly eos: number | null;
  readonly endTokens: ReadonlySet<number>;
  readonly specialTokens: readonly string[];
  readonly addBos: boolean;

  /** Null once closed. */
  #parts: TokenizerParts | null;
  /** Bytes of the tokens that were asked for. */
  #pieces: (Uint8Array<ArrayBuffer> | undefined)[] = [];

  /** Takes the parts, which hold together. */
  constructor(parts: TokenizerParts) {
    this.#parts = parts;
    this.size = parts.size;
    this.bos = parts.special.bos;
    this.eos = parts.special.eos;
    this.endTokens = parts.special.endTokens;
    this.specialTokens = [
      ...parts.added.special,
      ...parts.addedLater?.special ?? [],
    ];
    this.addBos = parts.special.addBos;
  }

  async encode(text: string, options: EncodeOptions = {}): Promise<number[]> {
    const { special = false, literal = [], continues = false, signal } =
      options;
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
    const { added, addedLater, normalize, prefix } = this.#open();
    text = text.toWellFormed();
    const first = continues ? "behind" : "start";
    const ids: number[] = [];
    for (const part of added.split(text, special, literal)) {
      if (part.id !== null) {
        ids.push(part.id);
        continue;
      }
      const place = part.start === 0 ? first : "inside";
      let plain = text.slice(part.start, part.end);
      if (normalize) plain = normalize(plain, place);
      // Where the stretches are now is not known.
      const later = special &&
        !literal.some(([start, end]) => start < part.end && end > part.start);
      for (
        const { start, end, id } of addedLater?.split(plain, later) ??
          [{ start: 0, end: plain.length, id: null }]
      ) {
        if (id !== null) {
          ids.push(id);
          continue;
        }
        const rest = plain.slice(start, end);
        const prefixed = prefix?.(rest, start === 0 ? place : "inside") ?? rest;
        await this.#encodePlain(prefixed, ids, signal);
      }
    }
    return ids;
  }

  piece(id: number, first = false): Uint8Array {
    return this.#piece(id, first).slice();
  }

  decode(ids: Iterable<number>): string {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    const texts: string[] = [];
    let first = true;
    for (const id of ids) {
      texts.push(decoder.decode(this.#piece(id, first), { stream: true }));
      first = false;
    }
    texts.push(decoder.decode());
    return texts.join("");
  }

  close(): void {
    // The addon's memory goes with its object, which has no end of its own.
    this.#parts = null;
    this.#pieces = [];
  }

  /** Closes the tokenizer at the end of a `using` block. */
  [Symbol.dispose](): void {
    this.close();
  }

  #open(): TokenizerParts {
    if (this.#parts) return this.#parts;
    throw new Deno.errors.BadResource("Cannot use a closed tokenizer");
  }

  /** Adds the ids of text without added tokens, piece by piece. */
  async #encodePlain(
    text: string,
    ids: number[],
    signal: AbortSignal | undefined,
  ): Promise<void> {
    for (let start = 0; start < text.length;) {
      const { encoder } = this.#open();
      const end = encoder.cut(text, start + CHUNK);
      const found = await encoder.encode(text.slice(start, end));
      signal?.throwIfAborted();
      for (const id of found) ids.push(id);
      start = end;
    }
  }

  /** The bytes of a token, shared. */
  #piece(id: number, first: boolean): Uint8Array<ArrayBuffer> {
    if (typeof id !== "number") {
      throw new TypeError(`Token id is ${typeof id}, expected a number`);
    }
    const { bytes } = this.#open();
    if (!Number.isInteger(id) || id < 0 || id >= this.size) {
      throw new RangeError(
        `Token id is ${id}, expected 0 to ${this.size - 1}`,
      );
    }
    return first ? bytes(id, true) : this.#pieces[id] ??= bytes(id, false);
  }
}
