/** The index of a safetensors model in several files, which says what file holds each tensor; called by `SafetensorsFile.open()`. */

import { FormatError, quote } from "./error.ts";
import { readJsonFile } from "./json_file.ts";
import { describe } from "./safetensors_header.ts";

/**
 * Reads an index.
 *
 * @param path Path of the file, `model.safetensors.index.json`.
 * @returns The file name of each tensor, by the tensor's name.
 * @throws {FormatError} When it is malformed, or names a file that is not
 * beside it.
 */
export async function readIndex(path: string): Promise<Map<string, string>> {
  const root = await readJsonFile(path, "safetensors index");
  const map = root.get("weight_map");
  if (!(map instanceof Map)) {
    throw new FormatError(
      path,
      "weight_map",
      `Found ${describe(map)}, expected an object of tensors with their files`,
    );
  }
  const files = new Map<string, string>();
  for (const [name, file] of map) {
    if (
      typeof file !== "string" || !/^[\w][\w.-]*\.safetensors$/.test(file) ||
      file.includes("..")
    ) {
      throw new FormatError(
        path,
        `weight_map ${quote(name)}`,
        `Found ${
          describe(file)
        }, expected the name of a .safetensors file in the same folder`,
      );
    }
    files.set(name, file);
  }
  if (files.size > 0) return files;
  throw new FormatError(path, "weight_map", "It is empty, expected tensors");
}
