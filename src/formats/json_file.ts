/** Reads a JSON file of a model folder through the strict parser; used for config.json and for the index of a model in several files. */

import { DataFile } from "./data_file.ts";
import { FormatError, quote } from "./error.ts";
import { type Json, JsonError, parseJson } from "./json.ts";

const MAX_BYTES = 100_000_000;

/**
 * Reads a file that holds one JSON object.
 *
 * @param path Path of the file.
 * @param kind What it should be, for messages.
 * @returns The object's members.
 * @throws {FormatError} When it is too large, no UTF-8 or no JSON object.
 * @throws {Deno.errors.NotFound} When there is none, and so on.
 */
export async function readJsonFile(
  path: string,
  kind: string,
): Promise<Map<string, Json>> {
  using file = await DataFile.open(path, kind);
  if (file.size > MAX_BYTES) {
    throw new FormatError(
      path,
      "file",
      `Found ${file.size} bytes, expected at most ${MAX_BYTES}`,
    );
  }
  const bytes = new Uint8Array(file.size);
  await file.read(0, bytes);
  let text: string;
  try {
    // The byte order mark is kept, so that the parser refuses it.
    const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
    text = decoder.decode(bytes);
  } catch (cause) {
    throw new FormatError(path, "file", "Not valid UTF-8, expected UTF-8", {
      cause,
    });
  }
  try {
    const members = 1_000_000;
    const root = parseJson(text, { depth: 64, members, integers: false });
    if (root instanceof Map) return root;
  } catch (cause) {
    if (!(cause instanceof JsonError)) throw cause;
    const place = cause.place.map(String).join(".");
    throw new FormatError(
      path,
      place === "" ? "JSON" : quote(place),
      cause.message,
      { cause },
    );
  }
  throw new FormatError(path, "JSON", "Not an object, expected one");
}
