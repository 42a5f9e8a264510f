/** How a tokenizer.json splits text into words, each part checked before the native addon sees it; called by its reader and for the pre-tokenizers of GGUF files. */

import type { ConfigFile } from "../formats/config.ts";
import { type Cut, cutWhere } from "./cuts.ts";
import { type Alternative, cutPattern, findPattern } from "./patterns.ts";
import type { Place } from "./vocabulary_tokenizer.ts";

/** How text becomes words. */
export interface Splitting {
  /** What the addon is told. */
  readonly json: unknown;
  /** Whether words are spelled in the characters of their bytes. */
  readonly bytes: boolean;
  /** Where long texts are cut; null when the vocabulary must tell. */
  readonly cut: Cut | null;
  /** Whether splitting takes the square of a run's time. */
  readonly slow: boolean;
  /** Puts a blank before a text. */
  readonly prefix?: (text: string, place: Place) => string;
}

/** The blank of SentencePiece. */
export const BLANK = "\u2581";

/** GPT-2's way, which is built into the addon; its pattern is this. */
const GPT2 =
  "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

/** A text may be cut nowhere. */
const NOWHERE: Alternative = { unless: "(?!)" };

/** What a `pre_tokenizer` says, its sequences undone. */
interface Found {
  nodes: unknown[];
  patterns: Alternative[];
  bytes: boolean;
  prefix?: Splitting["prefix"];
  /** Whether there is a pattern of the file's own. */
  split?: boolean;
  /** Whether the blank of SentencePiece begins a word. */
  blanks?: "split" | "kept";
}

/**
 * Splits by regular expressions one after another, then into bytes.
 *
 * @param expressions Expressions that {@linkcode findPattern} knows.
 * @returns How.
 */
export function splitBy(expressions: readonly string[]): Splitting {
  const found: Found = { nodes: [], patterns: [], bytes: true };
  for (const expression of expressions) {
    found.nodes.push(splitNode(expression, "Isolated", false));
    found.patterns.push(...findPattern(expression)!);
  }
  found.nodes.push(byteLevel(false));
  return finish(found);
}

/**
 * Reads the `pre_tokenizer` of a tokenizer.json.
 *
 * @param file Its object; null when there is none.
 * @param options `blanksGone`: whether the normalizer leaves no blank.
 * @returns How text is split.
 * @throws {FormatError} When a part or its pattern is not known.
 */
export function readSplitting(
  file: ConfigFile | null,
  { blanksGone }: { blanksGone: boolean },
): Splitting {
  const found: Found = { nodes: [], patterns: [], bytes: false };
  if (file !== null) readNode(file, found, blanksGone);
  return finish(found);
}

function readNode(file: ConfigFile, found: Found, blanksGone: boolean): void {
  const type = file.string("type");
  const behind = found.bytes
    ? ["Digits", "Split"]
    : found.blanks && ["Digits", "Punctuation"];
  if (behind && !behind.includes(type)) {
    throw file.error(
      "type",
      `${behind.join(" or ")} behind ${
        found.bytes ? "ByteLevel" : "Metaspace"
      }`,
    );
  }
  switch (type) {
    case "Sequence":
      for (const part of file.objects("pretokenizers")) {
        readNode(part, found, blanksGone);
      }
      return;
    case "ByteLevel":
      return readByteLevel(file, found);
    case "Split":
      return readSplit(file, found, blanksGone);
    case "Metaspace":
      return readMetaspace(file, found);
    case "Digits": {
      const each = file.boolean("individual_digits", false);
      found.nodes.push({ type, individual_digits: each });
      found.patterns.push(...findPattern("\\p{N}")!);
      return;
    }
    case "Punctuation": {
      const behavior = file.string("behavior", "Isolated");
      if (!["Isolated", "Contiguous"].includes(behavior)) {
        throw file.error("behavior", "Isolated or Contiguous");
      }
      found.nodes.push({ type, behavior });
      return;
    }
  }
  throw file.error(
    "type",
    "a pre-tokenizer that is known: ByteLevel, Digits, Metaspace, Punctuation, Sequence, Split",
  );
}

function readByteLevel(file: ConfigFile, found: Found): void {
  const ownPattern = file.boolean("use_regex", true);
  if (file.boolean("add_prefix_space", false)) {
    if (found.nodes.length > 0) {
      throw file.error("add_prefix_space", "false behind another splitting");
    }
    found.prefix = (text, place) =>
      place === "behind" || text.startsWith(" ") ? text : ` ${text}`;
  }
  found.bytes = true;
  found.nodes.push(byteLevel(ownPattern));
  if (ownPattern) found.patterns.push(...findPattern(GPT2)!);
}

function readSplit(file: ConfigFile, found: Found, blanksGone: boolean): void {
  const pattern = file.object("pattern");
  const behavior = file.string("behavior");
  const invert = file.boolean("invert", false);
  if (pattern?.has("String")) {
    const text = pattern.string("String");
    if (text === "") throw pattern.error("String", "at least a character");
    if (behavior === "Removed") throw file.error("behavior", "no text removed");
    if (!BEHAVIORS.includes(behavior)) {
      throw file.error("behavior", `one of ${BEHAVIORS.join(", ")}`);
    }
    if (blanksGone && text === " ") return;
    found.split = true;
    found.nodes.push({
      type: "Split",
      pattern: { String: text },
      behavior,
      invert,
    });
    found.patterns.push(NOWHERE);
    return;
  }
  const expression = pattern?.string("Regex") ?? "";
  const known = findPattern(expression);
  if (known === null) {
    throw (pattern ?? file).error(
      pattern ? "Regex" : "pattern",
      "a regular expression of a model family that is known, as others may take for ever",
    );
  }
  // Matches kept and the rest removed is how some files say the same.
  if (
    !(behavior === "Isolated" && !invert || behavior === "Removed" && invert)
  ) {
    throw file.error("behavior", "Isolated, or Removed with invert");
  }
  found.split = true;
  found.nodes.push(splitNode(expression, behavior, invert));
  found.patterns.push(...known);
}

const BEHAVIORS = [
  "Isolated",
  "MergedWithPrevious",
  "MergedWithNext",
  "Contiguous",
];

function readMetaspace(file: ConfigFile, found: Found): void {
  if (file.string("replacement", BLANK) !== BLANK) {
    throw file.error("replacement", `"${BLANK}"`);
  }
  // An older spelling of "always" and "never".
  const always = file.boolean("add_prefix_space", true);
  const scheme = file.string("prepend_scheme", always ? "always" : "never");
  if (!["always", "first", "never"].includes(scheme)) {
    throw file.error("prepend_scheme", "always, first or never");
  }
  if (found.nodes.length > 0) {
    throw file.error("type", "Metaspace before all others");
  }
  const split = file.boolean("split", true);
  found.blanks = split ? "split" : "kept";
  found.prefix = (text, place) => {
    const blanks = text.replaceAll(" ", BLANK);
    const put = place === "start" && scheme !== "never" ||
      place === "inside" && scheme === "always";
    return put && !blanks.startsWith(BLANK) ? BLANK + blanks : blanks;
  };
  if (split) {
    found.nodes.push({
      type: "Metaspace",
      replacement: BLANK,
      prepend_scheme: "never",
      split,
    });
  }
}

/** The parts put together, with the places where long texts are cut. */
function finish(found: Found): Splitting {
  const { nodes, patterns, bytes, prefix, blanks } = found;
  let cut: Cut | null = null;
  if (blanks === "split") cut = cutWhere(/(?=\u2581)/gu);
  else if (bytes || found.split) {
    cut = cutWhere(cutPattern(patterns) ?? /(?!)/gu);
  }
  return {
    json: nodes.length === 0
      ? null
      : { type: "Sequence", pretokenizers: nodes },
    bytes,
    cut,
    slow: patterns.some((pattern) => pattern.slow),
    ...(prefix && { prefix }),
  };
}

function splitNode(
  expression: string,
  behavior: string,
  invert: boolean,
): unknown {
  return { type: "Split", pattern: { Regex: expression }, behavior, invert };
}

function byteLevel(ownPattern: boolean): unknown {
  return {
    type: "ByteLevel",
    add_prefix_space: false,
    trim_offsets: true,
    use_regex: ownPattern,
  };
}
