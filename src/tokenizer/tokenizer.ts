/** What every tokenizer can do, and the stream that turns tokens into text; used by generation and by the commands. */

/** How {@linkcode Tokenizer.encode} reads a text. */
export interface EncodeOptions {
  /**
   * Whether special tokens spelled in the text, such as `<|im_end|>`, become
   * those tokens; otherwise they are text like any other.
   *
   * @default {false}
   */
  special?: boolean;
  /**
   * Stretches of the text in which special tokens stay text all the same: begin
   * and end in UTF-16 units, in order.
   */
  literal?: readonly (readonly [start: number, end: number])[];
  /**
   * Whether the text goes on from one that was encoded before: then no blank
   * is put before it, as some vocabularies do at the beginning of a text.
   *
   * @default {false}
   */
  continues?: boolean;
  /** Stops the work between two pieces of a long text. */
  signal?: AbortSignal;
}

/** Turns text into token ids and back. */
export interface Tokenizer extends Disposable {
  /** How many tokens there are: ids are 0 to `size - 1`. */
  readonly size: number;
  /** Id of the token that begins a text; null when the file names none. */
  readonly bos: number | null;
  /** Id of the token that ends a text; null when the file names none. */
  readonly eos: number | null;
  /** Ids that end generation. */
  readonly endTokens: ReadonlySet<number>;
  /** Texts that are tokens where `special` is asked for, and text elsewhere. */
  readonly specialTokens: readonly string[];
  /** Whether the model file asks for `bos` first; `encode` never adds it. */
  readonly addBos: boolean;
  /**
   * The tokens of a text.
   *
   * @param text Any text; a lone surrogate counts as U+FFFD. A character that
   * the vocabulary has no token for, not even byte by byte, is left out.
   * @param options How to read it.
   * @returns Token ids, each below `size`; none for the empty text.
   * @throws {RangeError} When the text is too long, or holds too long a run of
   * letters, digits, signs or spaces.
   * @throws {Deno.errors.BadResource} When the tokenizer is closed.
   */
  encode(text: string, options?: EncodeOptions): Promise<number[]>;
  /**
   * The bytes that a token stands for, perhaps only part of a character; of a
   * special token the bytes of its name.
   *
   * @param id A token id.
   * @param first Whether the token begins a text: then the blank that `encode`
   * put before the text is left out.
   * @returns The bytes, the caller's to keep.
   * @throws {RangeError} When there is no such token.
   */
  piece(id: number, first?: boolean): Uint8Array;
  /**
   * The text of tokens, U+FFFD where their bytes are no UTF-8; without the
   * blank that `encode` put before it.
   *
   * @param ids Token ids.
   * @returns The text.
   * @throws {RangeError} When there is no such token.
   */
  decode(ids: Iterable<number>): string;
  /** Lets go of the vocabulary; a second call does nothing. */
  close(): void;
}

/** How a {@linkcode TextStream} begins. */
export interface TextStreamOptions {
  /**
   * Whether the tokens go on from a text: then their first blank counts.
   *
   * @default {false}
   */
  continues?: boolean;
}

/**
 * Text of tokens that come one by one. A character spread over several tokens
 * is held back until it is whole, so that all pushes and the flush together
 * give what `decode` gives for all ids.
 */
export class TextStream {
  #tokenizer: Tokenizer;
  #decoder: TextDecoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #first: boolean;

  /**
   * Begins an empty text.
   *
   * @param tokenizer Where the tokens' bytes come from; the caller's to close.
   * @param options How it begins.
   */
  constructor(tokenizer: Tokenizer, options: TextStreamOptions = {}) {
    this.#tokenizer = tokenizer;
    this.#first = !(options.continues ?? false);
  }

  /**
   * Adds a token.
   *
   * @param id A token id.
   * @returns The text that is now whole, often "".
   * @throws {RangeError} When there is no such token.
   */
  push(id: number): string {
    const piece = this.#tokenizer.piece(id, this.#first);
    this.#first = false;
    return this.#decoder.decode(piece, { stream: true });
  }

  /**
   * Ends the text; the next push begins another.
   *
   * @returns U+FFFD for a character left incomplete, otherwise "".
   */
  flush(): string {
    this.#first = true;
    return this.#decoder.decode();
  }
}
