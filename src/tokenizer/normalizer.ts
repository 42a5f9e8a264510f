/** How a tokenizer.json changes text before it is split; called by its reader. */

import type { ConfigFile } from "../formats/config.ts";
import type { Place } from "./vocabulary_tokenizer.ts";

/** Changes a piece of text. */
export type Normalize = (text: string, place: Place) => string;

/** A step, with the most characters that it puts in for one. */
interface Step {
  apply: Normalize;
  growth: number;
}

/** The most steps, and the most characters that all put in for one. */
const MAX_STEPS = 8;
const MAX_GROWTH = 8;

/** The most UTF-16 units that a text may grow to. */
const MAX_GROWN = 128 * 1024 * 1024;

const FORMS = ["NFC", "NFD", "NFKC", "NFKD"];

/**
 * Reads the `normalizer` of a tokenizer.json.
 *
 * @param file Its object; null when there is none.
 * @returns What it does; null when nothing.
 * @throws {FormatError} When a step is not known, or text would grow too much.
 */
export function readNormalizer(file: ConfigFile | null): Normalize | null {
  const steps = file === null ? [] : readSteps(file);
  if (steps.length === 0) return null;
  const growth = steps.reduce((product, step) => product * step.growth, 1);
  if (steps.length > MAX_STEPS || growth > MAX_GROWTH) {
    throw file!.error(
      "type",
      `at most ${MAX_STEPS} steps, which put in at most ${MAX_GROWTH} characters for one`,
    );
  }
  return (text, place) => {
    for (const { apply } of steps) {
      text = apply(text, place);
      if (text.length > MAX_GROWN) {
        throw new RangeError(
          `Cannot encode: the text grows to ${text.length} characters, expected at most ${MAX_GROWN}`,
        );
      }
    }
    return text;
  };
}

function readSteps(file: ConfigFile): Step[] {
  const type = file.string("type");
  if (type === "Sequence") {
    return file.objects("normalizers").flatMap(readSteps);
  }
  if (FORMS.includes(type)) {
    return [{ apply: (text) => text.normalize(type), growth: 1 }];
  }
  if (type === "Prepend") {
    const put = file.string("prepend");
    const apply: Normalize = (text, place) =>
      place === "behind" || text === "" ? text : put + text;
    return [{ apply, growth: Math.max(1, put.length) }];
  }
  if (type === "Replace") {
    const pattern = file.object("pattern");
    const from = pattern?.has("String") ? pattern.string("String") : "";
    if (from === "") {
      throw file.error("pattern", 'a text to look for, as {"String": " "}');
    }
    const to = file.string("content");
    const growth = Math.max(1, to.length / from.length);
    return [{ apply: (text) => text.replaceAll(from, () => to), growth }];
  }
  throw file.error(
    "type",
    `a normalizer that is known: ${
      FORMS.join(", ")
    }, Prepend, Replace, Sequence`,
  );
}
