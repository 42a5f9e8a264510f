/** How a tokenizer.json changes text before it is split; called by its reader. */

import type { ConfigFile } from "../formats/config.ts";
import type { Place } from "./vocabulary_tokenizer.ts";

/** Changes a piece of text. */
export type Normalize = (text: string, place: Place) => string;

/** The most steps, and the most characters that one puts in. */
const MAX_STEPS = 8;
const MAX_CONTENT = 8;

/** The most UTF-16 units that a text may grow to. */
const MAX_GROWN = 128 * 1024 * 1024;

const FORMS = ["NFC", "NFD", "NFKC", "NFKD"];

/**
 * Reads the `normalizer` of a tokenizer.json.
 *
 * @param file Its object; null when there is none.
 * @returns What it does; null when nothing.
 * @throws {FormatError} When a step is not known.
 */
export function readNormalizer(file: ConfigFile | null): Normalize | null {
  const steps = file === null ? [] : readSteps(file);
  if (steps.length === 0) return null;
  if (steps.length > MAX_STEPS) {
    throw file!.error("normalizers", `at most ${MAX_STEPS} steps`);
  }
  return (text, place) => {
    for (const step of steps) {
      text = step(text, place);
      if (text.length > MAX_GROWN) {
        throw new RangeError(
          `Cannot encode: the text grows to ${text.length} characters, expected at most ${MAX_GROWN}`,
        );
      }
    }
    return text;
  };
}

function readSteps(file: ConfigFile): Normalize[] {
  const type = file.string("type");
  if (type === "Sequence") {
    return file.objects("normalizers").flatMap(readSteps);
  }
  if (FORMS.includes(type)) return [(text) => text.normalize(type)];
  if (type === "Prepend") {
    const blank = content(file, "prepend");
    return [
      (text, place) => place === "behind" || text === "" ? text : blank + text,
    ];
  }
  if (type === "Replace") {
    const pattern = file.object("pattern");
    const from = pattern?.has("String") ? pattern.string("String") : "";
    if (from === "") {
      throw file.error("pattern", 'a text to look for, as {"String": " "}');
    }
    const to = content(file, "content");
    return [(text) => text.replaceAll(from, () => to)];
  }
  throw file.error(
    "type",
    `a normalizer that is known: ${
      FORMS.join(", ")
    }, Prepend, Replace, Sequence`,
  );
}

/** A short text that is put in. */
function content(file: ConfigFile, key: string): string {
  const text = file.string(key);
  if (text.length <= MAX_CONTENT) return text;
  throw file.error(key, `at most ${MAX_CONTENT} characters`);
}
