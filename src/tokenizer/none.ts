/** The tokenizer of a model that has none: token ids go in and out, text does not; used for folders without a tokenizer.json and by benchmarks. */

import type { Tokenizer } from "./tokenizer.ts";

/**
 * A tokenizer that refuses every text.
 *
 * @param why The message of the error.
 * @param endTokens Ids that end generation.
 */
export function noTokenizer(
  why: string,
  endTokens: readonly number[] = [],
): Tokenizer {
  const none = (): never => {
    throw new RangeError(why);
  };
  return {
    size: 0,
    bos: null,
    eos: endTokens[0] ?? null,
    endTokens: new Set(endTokens),
    specialTokens: [],
    addBos: false,
    encode: () => Promise.reject(new RangeError(why)),
    piece: none,
    decode: none,
    close() {},
    [Symbol.dispose]() {},
  };
}
