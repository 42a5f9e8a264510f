/** Tokens that are matched in text before it is split, such as `<|im_end|>`; used by every tokenizer. */

/** A token that is matched whole. */
export interface AddedToken {
  /** Its id. */
  readonly id: number;
  /** What is looked for. */
  readonly text: string;
  /** Whether it counts only where special tokens are asked for. */
  readonly special: boolean;
  /** Whether no letter, mark or digit may stand beside it. */
  readonly singleWord?: boolean;
  /** Whether it takes the white space before it along. */
  readonly leftStrip?: boolean;
  /** Whether it takes the white space behind it along. */
  readonly rightStrip?: boolean;
}

/** A piece of a text: an added token, or what stands between two. */
export interface Part {
  /** Where it begins, in UTF-16 units. */
  readonly start: number;
  /** Where it ends. */
  readonly end: number;
  /** The token's id; null for text. */
  readonly id: number | null;
}

/** Begin and end of a stretch of text, in UTF-16 units. */
type Stretch = readonly [start: number, end: number];

/** What a word is made of for `singleWord`, as Rust's `\w` has it. */
const WORD_BEFORE = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]$/u;
const WORD_AFTER = /^[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]/u;
const SPACE_BEFORE = /\p{White_Space}+$/u;
const SPACE_AFTER = /\p{White_Space}*/uy;
const ASCII_SPACE = /[\t-\r ]*/y;

/** The added tokens of a vocabulary. */
export class AddedTokens {
  /** Texts of those that are special. */
  readonly special: readonly string[];
  readonly #tokens: ReadonlyMap<string, AddedToken>;
  readonly #order: "leftmost" | "longest";
  /** Any token, the longest where several fit; null when there are none. */
  readonly #pattern: RegExp | null;

  /**
   * Makes them ready for matching.
   *
   * @param tokens The tokens; of two with the same text the first counts.
   * @param order Which of two that overlap counts: the `leftmost` one, then
   * the longest, as in tokenizer.json; or the `longest` one, as in llama.cpp.
   */
  constructor(
    tokens: readonly AddedToken[],
    order: "leftmost" | "longest",
  ) {
    this.#tokens = new Map(
      tokens.toReversed().map((token) => [token.text, token]),
    );
    this.special = tokens.filter(({ special }) => special)
      .map(({ text }) => text);
    this.#order = order;
    const texts = [...this.#tokens.keys()]
      .sort((a, b) => b.length - a.length)
      .map((text) => text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"));
    this.#pattern = texts.length === 0 ? null : new RegExp(
      order === "leftmost" ? texts.join("|") : `(?=(${texts.join("|")}))`,
      "gu",
    );
  }

  /**
   * Takes a text apart.
   *
   * @param text A text without lone surrogates.
   * @param special Whether special tokens count; otherwise they are text.
   * @param literal Stretches in which they are text all the same, in order.
   * @returns The parts in order, none empty; white space that a token takes
   * along is in none.
   */
  split(
    text: string,
    special: boolean,
    literal: readonly Stretch[] = [],
  ): Part[] {
    if (this.#pattern === null) return between(text, []);
    let next = 0;
    // Asked in the order of the text.
    const counts = (token: AddedToken, start: number): boolean => {
      if (!token.special) return true;
      while (next < literal.length && literal[next]![1] <= start) next++;
      const from = literal[next]?.[0] ?? Infinity;
      return special && from >= start + token.text.length;
    };
    const found = this.#order === "leftmost"
      ? this.#leftmost(text, counts)
      : this.#longest(text, counts);
    return between(text, found);
  }

  #leftmost(text: string, counts: Counts): Found[] {
    const found: Found[] = [];
    let free = 0;
    for (const match of text.matchAll(this.#pattern!)) {
      const token = this.#tokens.get(match[0])!;
      const start = match.index;
      const end = start + match[0].length;
      if (!counts(token, start)) continue;
      if (
        token.singleWord &&
        (WORD_BEFORE.test(text.slice(Math.max(0, start - 2), start)) ||
          WORD_AFTER.test(text.slice(end, end + 2)))
      ) continue;
      const from = token.leftStrip
        ? Math.max(free, spaceBefore(text, start))
        : start;
      const to = token.rightStrip ? matchEnd(SPACE_AFTER, text, end) : end;
      found.push({ token, start, end, from, to });
      free = to;
    }
    return found;
  }

  #longest(text: string, counts: Counts): Found[] {
    const all: { token: AddedToken; start: number }[] = [];
    for (const match of text.matchAll(this.#pattern!)) {
      const longest = match[1]!;
      for (let length = longest.length; length > 0; length--) {
        const token = this.#tokens.get(longest.slice(0, length));
        if (token && counts(token, match.index)) {
          all.push({ token, start: match.index });
        }
      }
    }
    if (all.length === 0) return [];
    all.sort((a, b) =>
      b.token.text.length - a.token.text.length || a.start - b.start
    );
    const taken = new Uint8Array(text.length);
    const found: Found[] = [];
    for (const { token, start } of all) {
      const end = start + token.text.length;
      // What is taken is at least as long: it would cover an end.
      if (taken[start] || taken[end - 1]) continue;
      let to = end;
      if (token.rightStrip) {
        const last = matchEnd(ASCII_SPACE, text, end);
        while (to < last && !taken[to]) to++;
      }
      taken.fill(1, start, to);
      found.push({ token, start, end, from: start, to });
    }
    return found.sort((a, b) => a.start - b.start);
  }
}

/** Whether a token that stands at an index is one there. */
type Counts = (token: AddedToken, start: number) => boolean;

/** A match: the token's own place, and with the white space it takes along. */
interface Found {
  token: AddedToken;
  start: number;
  end: number;
  from: number;
  to: number;
}

/** The matches with the text between them. */
function between(text: string, found: readonly Found[]): Part[] {
  const parts: Part[] = [];
  let at = 0;
  for (const { token, start, end, from, to } of found) {
    if (from > at) parts.push({ start: at, end: from, id: null });
    parts.push({ start, end, id: token.id });
    at = to;
  }
  if (at < text.length) parts.push({ start: at, end: text.length, id: null });
  return parts;
}

/** Where the white space before an index begins. */
function spaceBefore(text: string, end: number): number {
  // Runs are short: a window that doubles stays linear.
  for (let size = 16;; size *= 2) {
    const start = Math.max(0, end - size);
    const match = SPACE_BEFORE.exec(text.slice(start, end));
    const from = match === null ? end : start + match.index;
    if (from > start || start === 0) return from;
  }
}

/** Where a sticky pattern that starts at an index ends. */
function matchEnd(pattern: RegExp, text: string, start: number): number {
  pattern.lastIndex = start;
  return start + pattern.exec(text)![0].length;
}
