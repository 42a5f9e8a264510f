/** Strings and names of a GGUF header, checked before they are read; used for metadata and for the tensor table. */

import { quote } from "./error.ts";
import type { HeaderReader } from "./header_reader.ts";

/**
 * Takes a string's length, checked before anything is read for it.
 *
 * @param reader With 8 bytes buffered.
 * @param most The most bytes that the string may have.
 * @returns The length in bytes.
 * @throws {FormatError} When it is more, or more than the file has left.
 */
export function takeLength(reader: HeaderReader, most: number): number {
  const length = reader.u64();
  if (length > reader.left) {
    throw reader.error(
      `Data cut short: length is ${length} bytes, but ${reader.left} are left in the file`,
    );
  }
  if (length > most) {
    throw reader.error(`Length is ${length} bytes, expected at most ${most}`);
  }
  return Number(length);
}

/**
 * Reads one string.
 *
 * @param reader At the string's length.
 * @param most The most bytes that it may have.
 * @returns The text.
 * @throws {FormatError} When it is longer or not UTF-8.
 */
export async function readText(
  reader: HeaderReader,
  most: number,
): Promise<string> {
  await reader.fill(8);
  const length = takeLength(reader, most);
  await reader.fill(length);
  return reader.text(length);
}

/**
 * Reads a name: text that is not empty and holds no control character.
 *
 * @param reader At the name's length.
 * @param most The most bytes that it may have.
 * @param seen The names before it.
 * @returns The name.
 * @throws {FormatError} When it breaks a rule or was seen before.
 */
export async function readName(
  reader: HeaderReader,
  most: number,
  seen: ReadonlyMap<string, unknown>,
): Promise<string> {
  const name = await readText(reader, most);
  if (name === "") {
    throw reader.error("Name is empty, expected at least one character");
  }
  if (/\p{Cc}/u.test(name)) {
    throw reader.error(
      `Name ${quote(name)} holds a control character, expected none`,
    );
  }
  if (seen.has(name)) {
    throw reader.error(`Name ${quote(name)} comes twice, expected it once`);
  }
  return name;
}
