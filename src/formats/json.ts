/** A strict JSON parser that sees what JSON.parse hides: duplicate keys, numbers that are no integers or not exact, depth; used for safetensors headers and config files. */

/** A parsed value; objects are Maps, so that no key means anything to JavaScript. */
export type Json =
  | null
  | boolean
  | number
  | string
  | Json[]
  | Map<string, Json>;

/** What a text may hold. */
export interface JsonRules {
  /** The deepest nesting of objects and arrays, the outermost counted. */
  depth: number;
  /** The most members of one object, and the most items of one array. */
  members: number;
  /** Refuses numbers that are no integers, in value or in spelling, or are beyond 2^53 - 1. */
  integers: boolean;
}

/** What is wrong with a text, and where: keys and indexes down to the value. */
export class JsonError extends SyntaxError {
  /** Keys and indexes that lead to the place. */
  readonly place: readonly (string | number)[];

  /** Makes the error. */
  constructor(message: string, place: readonly (string | number)[]) {
    super(message);
    this.name = "JsonError";
    this.place = place;
  }
}

/**
 * Parses a text that is one JSON value with white space around it.
 *
 * @throws {JsonError} It is not, or breaks one of the rules.
 */
export function parseJson(text: string, rules: JsonRules): Json {
  return new Parser(text, rules).parse();
}

const SPACE = /[ \t\n\r]*/y;
// All but quotes, backslashes and the control characters below U+0020.
const PLAIN = /[ !#-[\]-\u{10ffff}]*/uy;
const ESCAPE = /\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})/y;
const NUMBER = /-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/y;
const WORD = /true|false|null/y;
const words = new Map<string, Json>([
  ["true", true],
  ["false", false],
  ["null", null],
]);

class Parser {
  readonly #text: string;
  readonly #rules: JsonRules;
  readonly #place: (string | number)[] = [];
  #at = 0;

  constructor(text: string, rules: JsonRules) {
    this.#text = text;
    this.#rules = rules;
  }

  parse(): Json {
    const value = this.#value();
    this.#take(SPACE);
    if (this.#at < this.#text.length) {
      throw this.#error(`Found ${this.#found()} behind the value`, "its end");
    }
    return value;
  }

  #value(): Json {
    this.#take(SPACE);
    switch (this.#text[this.#at]) {
      case "{":
        return this.#object();
      case "[":
        return this.#array();
      case '"':
        return this.#string();
    }
    const word = words.get(this.#take(WORD));
    return word === undefined ? this.#number() : word;
  }

  #object(): Map<string, Json> {
    const map = new Map<string, Json>();
    this.#list("}", () => {
      this.#take(SPACE);
      if (this.#text[this.#at] !== '"') {
        throw this.#error(`Found ${this.#found()}`, "a key in quotes");
      }
      const key = this.#string();
      this.#place.push(key);
      if (map.has(key)) {
        throw this.#error("The key comes twice", "it once");
      }
      this.#take(SPACE);
      if (this.#text[this.#at] !== ":") {
        throw this.#error(`Found ${this.#found()}`, "a colon");
      }
      this.#at++;
      map.set(key, this.#value());
      this.#place.pop();
    });
    return map;
  }

  #array(): Json[] {
    const list: Json[] = [];
    this.#list("]", () => {
      this.#place.push(list.length);
      list.push(this.#value());
      this.#place.pop();
    });
    return list;
  }

  /** Takes the opening bracket, items with commas between them, and the closing one. */
  #list(end: string, item: () => void): void {
    this.#at++;
    if (++this.#depth > this.#rules.depth) {
      throw this.#error(
        `Nested deeper than ${this.#rules.depth} levels`,
        "fewer",
      );
    }
    this.#take(SPACE);
    if (this.#text[this.#at] === end) this.#at++;
    else {
      for (let count = 1;; count++) {
        if (count > this.#rules.members) {
          throw this.#error(
            `More than ${this.#rules.members} entries`,
            "fewer",
          );
        }
        item();
        this.#take(SPACE);
        const next = this.#text[this.#at];
        if (next !== "," && next !== end) {
          throw this.#error(`Found ${this.#found()}`, `"," or "${end}"`);
        }
        this.#at++;
        if (next === end) break;
      }
    }
    this.#depth--;
  }

  #string(): string {
    const start = this.#at++;
    let escaped = false;
    this.#take(PLAIN);
    while (this.#text[this.#at] !== '"') {
      if (this.#take(ESCAPE) === "") {
        throw this.#error(`Found ${this.#found()} in a string`, "its end");
      }
      escaped = true;
      this.#take(PLAIN);
    }
    const raw = this.#text.slice(start, ++this.#at);
    const value: string = escaped ? JSON.parse(raw) : raw.slice(1, -1);
    if (value.isWellFormed()) return value;
    throw this.#error("A string holds half of a surrogate pair", "both halves");
  }

  #number(): number {
    const raw = this.#take(NUMBER);
    if (raw === "") throw this.#error(`Found ${this.#found()}`, "a value");
    const value = Number(raw);
    if (this.#rules.integers) {
      if (!/^-?[0-9]+$/.test(raw) || raw === "-0") {
        throw this.#error(`The number is ${short(raw)}`, "a plain integer");
      }
      if (!Number.isSafeInteger(value)) {
        throw this.#error(`The number is ${short(raw)}`, "at most 2^53 - 1");
      }
    }
    if (Number.isFinite(value)) return value;
    throw this.#error(`The number is ${short(raw)}`, "a smaller one");
  }

  #depth = 0;

  /** Takes what the pattern matches here. */
  #take(pattern: RegExp): string {
    pattern.lastIndex = this.#at;
    const match = pattern.exec(this.#text)?.[0] ?? "";
    this.#at += match.length;
    return match;
  }

  #found(): string {
    const code = this.#text.codePointAt(this.#at);
    if (code === undefined) return "the end of the text";
    if (code === 0xfeff) return "a byte order mark";
    return code > 0x20 && code < 0x7f
      ? `"${String.fromCodePoint(code)}"`
      : `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
  }

  #error(message: string, expected: string): JsonError {
    return new JsonError(
      `${message} at character ${this.#at}, expected ${expected}`,
      [...this.#place],
    );
  }
}

function short(raw: string): string {
  return raw.length > 40 ? `${raw.slice(0, 37)}...` : raw;
}
