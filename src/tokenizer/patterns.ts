/** The regular expressions that may reach the native addon, which a hostile one kills, and where a long text may be cut under each; used for GGUF files and tokenizer.json. */

/** Part of a regular expression: what stands between two `|` of its top level. */
export interface Alternative {
  /**
   * What it takes whole, so that it splits behind it: letters, numbers, or
   * signs that are followed by a blank. Undefined when none of these.
   */
  readonly takes?: "letters" | "numbers" | "signs";
  /** What else must hold where text is cut: lookarounds. */
  readonly unless?: string;
  /** Whether its time grows with the square of a run of digits. */
  readonly slow?: boolean;
}

/** Where text may be cut behind what an alternative takes. */
const CUTS = {
  // Marks, apostrophes and digits may go on a word, and so may signs of kana.
  letters:
    "(?<=\\p{L})(?![\\p{L}\\p{M}\\p{N}'\\u309b\\u309c\\u30a0\\u30fb\\uff65])",
  numbers: "(?<=\\p{N})(?![\\p{L}\\p{M}\\p{N}])",
  signs: "(?<=[\\p{P}\\p{S}])(?= )",
};

const UPPER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]";
const LOWER = "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]";
const EDGE = "[^\\r\\n\\p{L}\\p{N}]?";
const ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
const ASCII_ENDINGS =
  "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])";

/** How llama.cpp spells classes of case, where only ASCII letters have one. */
const upper = (letters: string): string => `((?=[${letters}])([^a-z]))`;
const lower = (letters: string): string => `((?=[${letters}])([^A-Z]))`;

/** Words of one case after another, with what may end them. */
function cased(up: string, low: string, end: string): string[] {
  return [`${EDGE}${up}*${low}+${end}`, `${EDGE}${up}+${low}*${end}`];
}

const letters: Alternative = { takes: "letters" };
const numbers: Alternative = { takes: "numbers" };
const signs: Alternative = { takes: "signs" };
const blanks: Alternative = {};
/** Takes all but blanks and some signs. */
const untilBlank: Alternative = { takes: "letters", unless: "(?= )" };

/** The most alternatives of one expression; real ones have up to a dozen. */
const MAX_ALTERNATIVES = 32;

/** Every alternative that is known, by its text. */
const ALTERNATIVES: ReadonlyMap<string, Alternative> = new Map([
  // What ends English words, as words of their own.
  ...[
    ENDINGS,
    ASCII_ENDINGS,
    "'(?i:[sdmt]|ll|ve|re)",
    "'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])",
    "'(?:[sdmt]|ll|ve|re)",
    ..."'s|'t|'re|'ve|'m|'ll|'d".split("|"),
  ].map((text) => [text, blanks] as const),
  ...[
    " ?\\p{L}+",
    "\\s?\\p{L}+",
    `${EDGE}\\p{L}+`,
    `${EDGE}+\\p{L}+`,
    `${EDGE}[\\p{L}\\p{M}]+`,
    "[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+",
    ...cased(UPPER, LOWER, ""),
    ...cased(UPPER, LOWER, `${ENDINGS}?`),
    ...cased(upper("\\p{L}"), lower("\\p{L}"), ""),
    ...cased(upper("\\p{L}"), lower("\\p{L}"), `${ASCII_ENDINGS}?`),
    ...cased(upper("\\p{L}\\p{M}"), lower("\\p{L}\\p{M}"), `${ASCII_ENDINGS}?`),
    `${EDGE}[\\p{L}\\p{M}]+${ASCII_ENDINGS}?`,
  ].map((text) => [text, letters] as const),
  ...["\\p{N}", "\\p{N}+", " ?\\p{N}+", "\\p{N}{1}", "\\p{N}{1,3}"]
    .map((text) => [text, numbers] as const),
  ...[
    " ?[^\\s\\p{L}\\p{N}]+",
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*",
    " ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*",
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*",
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]?",
    " ?[^\\s\\p{L}\\p{N}\\r\\n]+",
    " ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*",
    " ?[\\p{P}\\p{S}]+",
    " ?[\\p{P}\\p{S}]+[\\r\\n]*",
  ].map((text) => [text, signs] as const),
  ...[
    "\\s?\\p{P}+",
    "\\s+",
    "\\s+(?!\\S)",
    "\\s*[\\r\\n]+",
    "\\s*[\\r\\n]",
    "[\\r\\n]",
  ]
    .map((text) => [text, blanks] as const),
  // Words joined by blanks (EXAONE).
  [`${EDGE}(?:\\p{L}\\p{M}*(?: \\p{L}\\p{M}*)*)+`, blanks],
  // BLOOM and its relatives.
  [" ?[^(\\s|.,!?…。，、।۔،)]+", untilBlank],
  [" ?[^(\\s|[.,!?…。，、।۔،])]+", untilBlank],
  // Scripts without blanks (DeepSeek, Youtu, Trinity).
  ["[一-龥぀-ゟ゠-ヿ]+", blanks],
  ["[一-龥ࠀ-一가-퟿]+", blanks],
  ["[가-힣ㄱ-ㆎ]+", blanks],
  ["[！…“”‘’—：；，、-〿︰-﹏]+", blanks],
  ["[ㄅ-ㄯ]+", blanks],
  // Signs apart, and groups of three digits from the left (Falcon).
  ["[\\p{P}\\$\\+<=>\\^~\\|`]+", blanks],
  ["[\\p{P}\\$\\+<=>\\^~\\|]+", blanks],
  ["[0-9][0-9][0-9]", blanks],
  // Lines.
  ["[^\\n]+", blanks],
  ["[\\n]+", blanks],
  // Groups of three digits from the right (Command, Trinity).
  ["\\d{1,3}(?=(?:\\d{3})*\\b)", { slow: true }],
]);

/**
 * Looks a regular expression up.
 *
 * @param text The regular expression.
 * @returns Its alternatives, or null when one is not known.
 */
export function findPattern(text: string): Alternative[] | null {
  // Some files have the line breaks themselves.
  const escaped = text.replaceAll("\r", "\\r").replaceAll("\n", "\\n");
  const found = topLevel(escaped).map((part) => ALTERNATIVES.get(part));
  if (found.length > MAX_ALTERNATIVES) return null;
  return found.includes(undefined) ? null : found as Alternative[];
}

/**
 * Where a text may be cut that several patterns split one after another.
 *
 * @param patterns The alternatives of all of them.
 * @returns A pattern that matches between two characters, or null when there
 * is no such place.
 */
export function cutPattern(patterns: readonly Alternative[]): RegExp | null {
  const kinds = new Set(patterns.flatMap(({ takes }) => takes ?? []));
  if (kinds.size === 0) return null;
  const unless = new Set(patterns.map((one) => one.unless ?? ""));
  const any = [...kinds].map((kind) => CUTS[kind]).join("|");
  return new RegExp(`(?:${any})${[...unless].join("")}`, "gu");
}

/** Splits a regular expression at each `|` outside of brackets and groups. */
function topLevel(text: string): string[] {
  const parts: string[] = [];
  let groups = 0;
  let inClass = false;
  let start = 0;
  for (let i = 0; i < text.length; i++) {
    const character = text[i]!;
    if (character === "\\") i++;
    else if (inClass) inClass = character !== "]";
    else if (character === "[") inClass = true;
    else if (character === "(") groups++;
    else if (character === ")") groups--;
    else if (character === "|" && groups === 0) {
      parts.push(text.slice(start, i));
      start = i + 1;
    }
  }
  return [...parts, text.slice(start)];
}
