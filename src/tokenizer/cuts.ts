/** Places where a long text can be cut in two that encode to the same ids as the whole; used by the encoders. */

/**
 * The first place from `from` on where a text can be cut.
 *
 * @param text A text without lone surrogates.
 * @param from The least index, in UTF-16 units, above 0.
 * @returns The index, or the text's length.
 * @throws {RangeError} When there is none for too many units.
 */
export type Cut = (text: string, from: number) => number;

/** The most UTF-16 units without a place to cut; the addon takes seconds. */
export const MAX_RUN = 1024 * 1024;

/**
 * Cuts where a pattern matches between two characters, which it sees whole.
 *
 * @param pattern Matches the empty text; its flags are `gu`.
 * @returns The cut.
 */
export function cutWhere(pattern: RegExp): Cut {
  return (text, from) =>
    search(text, from, (window, at) => {
      pattern.lastIndex = at;
      return pattern.exec(window)?.index ?? -1;
    });
}

/**
 * Cuts between two characters that no token holds side by side: merges never
 * cross such a place, so it is one for a vocabulary that text is not split for.
 *
 * @param tokens Every token that merges can make.
 * @returns The cut.
 */
export function cutBetweenTokens(tokens: () => Iterable<string>): Cut {
  let known: { pairs: Set<number>; characters: Set<number> } | null = null;
  return (text, from) => {
    if (from >= text.length) return text.length;
    // Only long texts need it.
    const { pairs, characters } = known ??= neighbours(tokens());
    return search(text, from, (window, at) => {
      let before = window.codePointAt(at - (isLow(window, at - 1) ? 2 : 1))!;
      for (let i = at; i < window.length;) {
        const code = window.codePointAt(i)!;
        // Characters without a token may be fused into one.
        const alone = characters.has(before) && characters.has(code);
        if (alone && !pairs.has(pairOf(before, code))) return i;
        before = code;
        i += code > 0xffff ? 2 : 1;
      }
      return -1;
    });
  };
}

/** Searches a window that shows the characters before and after too. */
function search(
  text: string,
  from: number,
  find: (window: string, at: number) => number,
): number {
  // A character of two units is never cut.
  if (isLow(text, from)) from++;
  if (from >= text.length) return text.length;
  const start = Math.max(0, from - 2);
  const last = from + MAX_RUN;
  const found = find(text.slice(start, last + 2), from - start);
  if (found >= 0 && start + found <= last) {
    return Math.min(start + found, text.length);
  }
  if (text.length <= last) return text.length;
  throw new RangeError(
    `Cannot encode: text holds more than ${MAX_RUN} characters after character ${from} that no word ends among, expected one that does`,
  );
}

function isLow(text: string, index: number): boolean {
  return (text.charCodeAt(index) & 0xfc00) === 0xdc00;
}

/** The characters that are tokens, and all pairs that stand side by side in one. */
function neighbours(
  tokens: Iterable<string>,
): { pairs: Set<number>; characters: Set<number> } {
  const pairs = new Set<number>();
  const characters = new Set<number>();
  for (const token of tokens) {
    let before = -1;
    for (const character of token) {
      const code = character.codePointAt(0)!;
      if (character === token) characters.add(code);
      if (before >= 0) pairs.add(pairOf(before, code));
      before = code;
    }
  }
  return { pairs, characters };
}

function pairOf(left: number, right: number): number {
  return left * 0x110000 + right;
}
