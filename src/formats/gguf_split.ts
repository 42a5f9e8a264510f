/** Models in several GGUF files, as llama.cpp's gguf-split writes them: what a file says of itself, and that the parts are those of one model; called by `GgufFile.open()`. */

import { FormatError, quote } from "./error.ts";
import {
  describeGguf,
  type GgufMetadata,
  type GgufValue,
} from "./gguf_metadata.ts";
import { firstPart, partEnding } from "./part_names.ts";

/** What one of several files says of itself. */
export interface GgufSplit {
  /** Which part it is, from 0. */
  readonly no: number;
  /** Number of parts. */
  readonly count: number;
  /** Tensors in all parts together. */
  readonly tensors: number;
}

/** The most files of one model. */
const MAX_PARTS = 999;
/** The most tensors of one model. */
const MAX_TENSORS = 65_536;

/**
 * What a file says of being one of several.
 *
 * @param path Path of the file.
 * @param metadata The file's metadata.
 * @returns Null for a model in one file.
 * @throws {FormatError} When what it says makes no sense, or its name says
 * something else.
 */
export function readSplit(
  path: string,
  { metadata, types }: GgufMetadata,
): GgufSplit | null {
  const integer = (key: string, min: number, max: number): number => {
    const value = metadata.get(key);
    const fits = typeof value === "number" && Number.isInteger(value) &&
      !types.get(key)!.startsWith("float") && value >= min && value <= max;
    if (fits) return value;
    throw new FormatError(
      path,
      key,
      `${
        value === undefined
          ? "Missing"
          : `Found ${describeGguf(value, types.get(key))}`
      }, expected a whole number from ${min} to ${max}`,
    );
  };
  if (!metadata.has("split.count")) return null;
  const count = integer("split.count", 0, MAX_PARTS);
  if (count <= 1) return null;
  const no = integer("split.no", 0, count - 1);
  const tensors = integer("split.tensors.count", 0, MAX_TENSORS);
  if (!path.endsWith(partEnding(no + 1, count))) {
    throw new FormatError(
      path,
      "split.no",
      `This is part ${
        no + 1
      } of ${count} of a model, expected its name to end in "${
        partEnding(no + 1, count)
      }"`,
    );
  }
  return { no, count, tensors };
}

/**
 * Refuses any part but the first, which has what the model is.
 *
 * @throws {FormatError} When this is another one.
 */
export function requireFirst(path: string, { no, count }: GgufSplit): void {
  if (no === 0) return;
  throw new FormatError(
    path,
    "split.no",
    `This is part ${no + 1} of ${count} of a model, expected the first, ${
      quote(firstPart(path))
    }`,
  );
}

/** The error of a part that is not there. */
export function missingPart(
  path: string,
  { count }: GgufSplit,
  name: string,
  cause: unknown,
): FormatError {
  return new FormatError(
    path,
    "split.count",
    `Model is split into ${count} files, expected ${
      quote(name)
    }, which is missing`,
    { cause },
  );
}

/**
 * Refuses a part that is of another model than the first one, as far as that
 * shows: counts and whatever else both of them say.
 *
 * @param path Path of the part.
 * @param split What it says of itself; its number is that of its name.
 * @throws {FormatError} When the two differ.
 */
export function requireSameModel(
  path: string,
  split: GgufSplit | null,
  of: GgufMetadata,
  first: GgufSplit,
  firstOf: GgufMetadata,
): void {
  if (split === null) {
    throw new FormatError(
      path,
      "split.count",
      `This is a model in one file, expected a part of one in ${first.count}`,
    );
  }
  if (split.tensors !== first.tensors) {
    throw new FormatError(
      path,
      "split.tensors.count",
      `Found ${split.tensors}, expected ${first.tensors} as in the first part`,
    );
  }
  for (const [key, value] of of.metadata) {
    // Each file has its own number and alignment.
    if (key === "split.no" || key === "general.alignment") continue;
    const other = firstOf.metadata.get(key);
    if (other === undefined || sameValue(value, other)) continue;
    throw new FormatError(
      path,
      key,
      `Found ${
        describeGguf(value, of.types.get(key))
      }, which differs from the first part's: expected parts of one model`,
    );
  }
}

function sameValue(a: GgufValue, b: GgufValue): boolean {
  if (typeof a !== "object" || typeof b !== "object") return a === b;
  const [x, y] = [a, b] as ArrayLike<unknown>[];
  return x!.length === y!.length &&
    Array.prototype.every.call(x, (value, i) => value === y![i]);
}
