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
  /** Whether its time grows with the square of a run of digits or blanks. */
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

/** What ends English words, in any case: as PyPI tokenizers and llama.cpp have it. */
const ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
export const ASCII_ENDINGS =
  "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])";

const UPPER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]";
const LOWER = "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]";
/** A character that may stand before the letters of a word. */
export const EDGE = "[^\\r\\n\\p{L}\\p{N}]?";

/** Words of one case after another, with what may end them. */
function cased(upper: string, lower: string, end: string): string[] {
  return [`${EDGE}${upper}*${lower}+${end}`, `${EDGE}${upper}+${lower}*${end}`];
}

/**
 * The same as llama.cpp spells it, where only ASCII letters have a case.
 *
 * @param letters What counts as a letter, for a class.
 * @param end What may end a word.
 * @returns Two alternatives.
 */
export function asciiCased(letters: string, end: string): string[] {
  return cased(`((?=[${letters}])([^a-z]))`, `((?=[${letters}])([^A-Z]))`, end);
}

/** Letters of alphabets with case, of DeepSeek's first models. */
export const CASED_ALPHABETS =
  "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃";

/** Signs of ASCII and of East Asia, of the same. */
export const WIDE_SIGNS = "!-/:-~！-／：-～‘-‟　-。";

/** Scripts without case, of the same. */
export const OTHER_SCRIPTS = "一-龥ࠀ-一가-\ud7ff";

/** Han characters, as Kimi K2 sets them apart. */
export const HAN =
  "\\x{4E00}-\\x{9FFF}\\x{3400}-\\x{4DBF}\\x{20000}-\\x{2A6DF}\\x{2A700}-\\x{2CEAF}\\x{2CEB0}-\\x{2EBEF}\\x{F900}-\\x{FAFF}\\x{2F800}-\\x{2FA1F}";

/** Scripts that are written without blanks, as Trinity sets them apart. */
export const UNSPACED =
  "一-鿿㐀-䶿豈-﫿\u3040-ゟ゠-ヿ･-ﾟ⼀-⿟\u0e40-\u0e7f\u0e80-\u0effក-\u17ffက-႟ꩠ-ꩿꧠ-\ua9ff가-\ud7afᄀ-ᇿ";

const letters: Alternative = { takes: "letters" };
const numbers: Alternative = { takes: "numbers" };
const signs: Alternative = { takes: "signs" };
const blanks: Alternative = {};
const slow: Alternative = { slow: true };
/** Takes some letters only, with the blank before them. */
const latin: Alternative = {
  takes: "letters",
  unless: "(?<=[A-Za-z])(?= [A-Za-z])",
};
/** Takes all but blanks and some signs. */
const untilBlank: Alternative = { takes: "letters", unless: "(?= )" };

/** The most alternatives of one expression; real ones have up to a dozen. */
const MAX_ALTERNATIVES = 32;

/** Alternatives that come in twos: each alone would try every start of a run. */
const BY_CASE = [
  cased(UPPER, LOWER, ""),
  cased(UPPER, LOWER, `${ENDINGS}?`),
  asciiCased("\\p{L}", ""),
  asciiCased("\\p{L}", `${ASCII_ENDINGS}?`),
  asciiCased("\\p{L}\\p{M}", `${ASCII_ENDINGS}?`),
];

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
    ...BY_CASE.flat(),
    `${EDGE}[\\p{L}&&[^${HAN}]]+${ASCII_ENDINGS}?`,
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
  [`[${OTHER_SCRIPTS}]+`, blanks],
  [`[[${OTHER_SCRIPTS}]&&[^\\s]]+`, blanks],
  ["[가-힣ㄱ-ㆎ]+", blanks],
  ["[！…“”‘’—：；，、-〿︰-﹏]+", blanks],
  ["[ㄅ-ㄯ]+", blanks],
  // Signs apart, and groups of three digits from the left (Falcon).
  ["[\\p{P}\\$\\+<=>\\^~\\|`]+", blanks],
  ["[\\p{P}\\$\\+<=>\\^~\\|]+", blanks],
  ["[0-9][0-9][0-9]", blanks],
  ["(?=([0-9]{3})+(?![0-9]))", slow],
  // Alphabets with case apart, and what else there is (DeepSeek).
  [`\\s?[${CASED_ALPHABETS}]+`, latin],
  [`\\s?[${WIDE_SIGNS}]+`, blanks],
  [`\\s?[[${WIDE_SIGNS}]&&[^\\s]]+`, blanks],
  ["\\s+$", slow],
  [`[${HAN}]+`, blanks],
  [`[${UNSPACED}]+`, blanks],
  // Runs of blanks of a few lengths (Jais).
  ...[512, 256, 128, 64, 32, 16, 8, 4, "1,2"]
    .map((n) => [`\\s{${n}}(?!\\S)`, slow] as const),
  ["\\s{1}", blanks],
  // Names of images, single signs and blanks in twos (Chameleon).
  ["<sentinel:[0-9]+>", blanks],
  ["(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", blanks],
  ["([\\t\\n]|    |  )", blanks],
  ["[\\p{P}!-/:-@\\[-`{-~]", blanks],
  // Lines.
  ["[^\\n]+", blanks],
  ["[\\n]+", blanks],
  // Groups of three digits from the right (Command, Trinity).
  ["\\d{1,3}(?=(?:\\d{3})*\\b)", slow],
  ["(?<!\\P{N})\\P{N}*+\\p{N}{1,3}(?=(?:\\p{N}{3})*+(?!\\p{N}))", {
    slow: true,
  }],
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
  const parts = topLevel(escaped);
  if (parts.length > MAX_ALTERNATIVES) return null;
  const found = parts.map((part) => ALTERNATIVES.get(part));
  if (found.includes(undefined)) return null;
  const has = (part: string): boolean => parts.includes(part);
  if (BY_CASE.some((two) => two.some(has) && !two.every(has))) return null;
  // So would this one, if nothing else took a run of blanks.
  const alone = parts.some((part) => part.startsWith("\\s*")) &&
    !has("\\s+") && !has("\\s{1}");
  return alone ? [...found as Alternative[], slow] : found as Alternative[];
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
