/** Keeps what users type from becoming special tokens: it is hidden from the template behind marks, and found again in what the template made; used by Chat. */

/** A text, and its stretches in which special tokens stay text. */
export interface Revealed {
  /** The text. */
  text: string;
  /** Begin and end of the stretches, in UTF-16 units. */
  literal: [start: number, end: number][];
}

/**
 * Marks for one conversation. What spells a special token is replaced by a
 * mark, and so is what could be completed to one by the template's own text: a
 * token's beginning at the end of a message, its end at the beginning. All else
 * stays as it is, so that templates can trim, cut and look at it. A template
 * that changes the letters of a message does not change those of a mark.
 */
export class Mask {
  readonly #tokens: readonly string[];
  readonly #pattern: RegExp | null;
  readonly #beginnings = new Set<string>();
  readonly #ends = new Set<string>();
  readonly #longest: number;
  readonly #edge: string;
  readonly #mark: RegExp;
  readonly #hidden: string[] = [];
  readonly #numbers = new Map<string, number>();

  /** Marks for these special tokens, which nobody can guess. */
  constructor(tokens: readonly string[]) {
    this.#tokens = tokens;
    for (const token of tokens) {
      for (let n = 1; n < token.length; n++) {
        this.#beginnings.add(token.slice(0, n));
        this.#ends.add(token.slice(n));
      }
    }
    this.#longest = Math.max(0, ...tokens.map(({ length }) => length));
    const escaped = tokens.toSorted((a, b) => b.length - a.length)
      .map((token) => token.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"));
    this.#pattern = tokens.length === 0
      ? null
      : new RegExp(`(${escaped.join("|")})`, "u");
    // Characters for private use, which no template changes or trims.
    const random = crypto.getRandomValues(new Uint32Array(4));
    this.#edge = String.fromCodePoint(
      ...Array.from(random, (n) => 0xf0000 + n % 0xfffe),
    );
    this.#mark = new RegExp(`${this.#edge}(\\d+)${this.#edge}`, "gu");
  }

  /** A message's text as the template gets it: the same for the same text. */
  hide(text: string): string {
    if (this.#pattern === null) return text;
    const core = text.trim();
    if (core === "") return text;
    const before = text.slice(0, text.length - text.trimStart().length);
    const after = text.slice(before.length + core.length);
    if (this.#tokens.some((token) => token !== core && token.includes(core))) {
      return before + this.#hide(core) + after;
    }
    // A capturing group puts what was found at the odd places.
    const parts = core.split(this.#pattern).map((part, i) =>
      i % 2 === 1 ? this.#hide(part) : part
    );
    const [first, last] = [parts[0]!, parts.at(-1)!];
    const head = this.#most(
      first,
      (n) => first.slice(0, n),
      this.#ends,
    );
    parts[0] = (head === "" ? "" : this.#hide(head)) + first.slice(head.length);
    const rest = parts.length === 1 ? parts[0]! : last;
    const tail = this.#most(last, (n) => last.slice(-n), this.#beginnings);
    if (tail !== "" && rest.endsWith(tail)) {
      parts[parts.length - 1] = rest.slice(0, -tail.length) + this.#hide(tail);
    }
    return before + parts.join("") + after;
  }

  /** What the template made, with the marks' texts in their places. */
  reveal(masked: string): Revealed {
    const literal: [number, number][] = [];
    let text = "";
    let at = 0;
    for (const match of masked.matchAll(this.#mark)) {
      text += masked.slice(at, match.index);
      const hidden = this.#hidden[Number(match[1])] ?? "";
      literal.push([text.length, text.length + hidden.length]);
      text += hidden;
      at = match.index + match[0].length;
    }
    return { text: text + masked.slice(at), literal };
  }

  /** The longest piece of a text that is in a set. */
  #most(
    text: string,
    piece: (length: number) => string,
    known: ReadonlySet<string>,
  ): string {
    for (let n = Math.min(this.#longest, text.length); n > 0; n--) {
      if (known.has(piece(n))) return piece(n);
    }
    return "";
  }

  #hide(text: string): string {
    let number = this.#numbers.get(text);
    if (number === undefined) {
      number = this.#hidden.push(text) - 1;
      this.#numbers.set(text, number);
    }
    return `${this.#edge}${number}${this.#edge}`;
  }
}
