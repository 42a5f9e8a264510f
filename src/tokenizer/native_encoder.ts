/** BPE and Unigram in the native addon, which is given only what was checked; used by the tokenizers of GGUF files and of tokenizer.json. */

import { type NativeTokenizer, openNative } from "./addon.ts";
import { type Bpe, KIND } from "./bpe.ts";
import type { Cut } from "./cuts.ts";
import type { Encoder } from "./vocabulary_tokenizer.ts";

/** What makes a vocabulary a Unigram model, by the score of a whole text. */
export interface Unigram {
  /** Scores of the first tokens; others are added ones. */
  readonly scores: readonly number[];
  /** Id of the token for characters without one. */
  readonly unknown: number;
}

/** What the addon is told beside the vocabulary. */
export interface NativeOptions {
  /** How text is split: tokenizer.json's `pre_tokenizer`, each pattern known. */
  readonly preTokenizer: unknown;
  /** Whether a word that is a token is taken whole, whatever the merges. */
  readonly ignoreMerges: boolean;
  /** Whether characters without a token become their bytes' tokens. @default `false` */
  readonly byteFallback?: boolean;
  /** The token of characters that have no other. @default `null` */
  readonly unknown?: string | null;
  /** Whether a run of such characters is one token. @default `false` */
  readonly fuseUnknown?: boolean;
  /** The scores of a Unigram model; BPE without. */
  readonly unigram?: Unigram;
  /** Where a text can be cut without a change to its tokens. */
  readonly cut: Cut;
  /** Whether splitting takes the square of a run's time. @default `false` */
  readonly slow?: boolean;
}

/** What the addon is told of a vocabulary itself. */
export type NativeModel = Omit<NativeOptions, "cut" | "slow">;

/** What a slow pattern would take minutes for. */
const LONG_RUN = /\p{N}{4097}|\p{White_Space}{4097}/u;

/** Stands in for `NativeEncoder.open` where a vocabulary is checked and no text is encoded: the addon is not loaded. */
export function noEncoder(_: Bpe, { cut }: NativeOptions): Promise<Encoder> {
  const encode = () => Promise.reject(new Error("No text is encoded here"));
  return Promise.resolve({ cut, encode });
}

/** The addon as an encoder. */
export class NativeEncoder implements Encoder {
  readonly cut: Cut;
  readonly #slow: boolean;
  readonly #native: NativeTokenizer;
  readonly #size: number;

  private constructor(
    native: NativeTokenizer,
    size: number,
    options: NativeOptions,
  ) {
    this.#native = native;
    this.#size = size;
    this.cut = options.cut;
    this.#slow = options.slow ?? false;
  }

  /**
   * Gives a vocabulary to the addon.
   *
   * @throws {Deno.errors.NotCapable} When a permission is missing.
   * @throws {Error} When the addon does not load.
   */
  static async open(
    this: void,
    bpe: Bpe,
    options: NativeOptions,
  ): Promise<Encoder> {
    const native = await openNative(tokenizerJson(bpe, options));
    return new NativeEncoder(native, bpe.tokens.length, options);
  }

  async encode(text: string): Promise<readonly number[]> {
    if (this.#slow && LONG_RUN.test(text)) {
      throw new RangeError(
        "Cannot encode: text holds more than 4096 digits or blanks in a row, expected fewer with this vocabulary",
      );
    }
    const encoding = await this.#native.encode(text, null, {
      addSpecialTokens: false,
    });
    const ids = encoding.getIds();
    for (const id of ids) {
      if (!(id < this.#size)) {
        throw new RangeError(
          `Tokenizer returned id ${id}, expected less than ${this.#size}`,
        );
      }
    }
    return ids;
  }
}

/**
 * A checked vocabulary as a tokenizer.json. Tokens that text must not turn
 * into by itself are left out.
 *
 * @param bpe The vocabulary.
 * @param options How text is split and merged.
 * @returns The JSON text.
 */
export function tokenizerJson(
  bpe: Bpe,
  options: NativeModel,
): string {
  const rest = JSON.stringify({
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens: [],
    normalizer: null,
    pre_tokenizer: options.preTokenizer,
    post_processor: null,
    decoder: null,
  });
  const model = options.unigram
    ? unigramJson(bpe, options.unigram, options.byteFallback ?? false)
    : bpeJson(bpe, options);
  return `${rest.slice(0, -1)},"model":${model}}`;
}

function unigramJson(
  bpe: Bpe,
  { scores, unknown }: Unigram,
  byteFallback: boolean,
): string {
  // Ids are places, so what text must not become keeps its own, under a name
  // that no text can know.
  const secret = crypto.randomUUID();
  const text = (id: number): string => {
    const kind = bpe.kinds[id];
    const hidden = kind === KIND.control || kind === KIND.unknown ||
      id === unknown;
    return hidden ? `${secret} ${id}` : bpe.tokens[id]!;
  };
  return JSON.stringify({
    type: "Unigram",
    unk_id: unknown,
    byte_fallback: byteFallback,
    vocab: scores.map((score, id) => [text(id), score]),
  });
}

function bpeJson(bpe: Bpe, options: NativeModel): string {
  const { unknown = null } = options;
  const merged = new Set<string>();
  for (const [left, right] of bpe.merges) {
    merged.add(left).add(right).add(left + right);
  }
  const kept = (token: string, kind: number): boolean =>
    kind === KIND.normal ||
    kind === KIND.byte && options.byteFallback === true ||
    token === unknown || merged.has(token);
  const vocab = bpe.tokens.flatMap((token, id) =>
    kept(token, bpe.kinds[id]!) ? `${JSON.stringify(token)}:${id}` : []
  );
  const model = JSON.stringify({
    type: "BPE",
    dropout: null,
    unk_token: unknown,
    continuing_subword_prefix: null,
    end_of_word_suffix: null,
    fuse_unk: options.fuseUnknown ?? false,
    byte_fallback: options.byteFallback ?? false,
    ignore_merges: options.ignoreMerges,
    merges: bpe.merges,
  });
  // Written by hand: an object would lose the token "__proto__".
  return `${model.slice(0, -1)},"vocab":{${vocab.join(",")}}}`;
}
