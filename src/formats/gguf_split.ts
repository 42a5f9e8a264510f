/** The check for models split into several GGUF files, which are not read yet; called while a file is opened. */

import { FormatError, quote } from "./error.ts";
import { describeGguf, type GgufMetadata } from "./gguf_metadata.ts";

/**
 * Refuses a model in several files, naming the first part that is not there.
 *
 * @param path Path of the file that was opened.
 * @param metadata The file's metadata.
 * @throws {FormatError} When the file is one of several.
 */
export async function refuseSplit(
  path: string,
  { metadata, types }: GgufMetadata,
): Promise<void> {
  const count = metadata.get("split.count");
  if (count === undefined || count === 0 || count === 1) return;
  const fail = (message: string): never => {
    throw new FormatError(path, "split.count", message);
  };
  if (typeof count !== "number" || !Number.isInteger(count) || count < 0) {
    return fail(
      `Found ${
        describeGguf(count, types.get("split.count"))
      }, expected a count of files`,
    );
  }
  const number = (part: number): string => String(part).padStart(5, "0");
  const ending = /-(\d{5})-of-(\d{5})\.gguf$/;
  const found = ending.exec(path);
  if (!found || found[2] !== number(count)) {
    return fail(
      `Model is split into ${count} files, expected this one's name to end in "-${
        number(1)
      }-of-${number(count)}.gguf"`,
    );
  }
  for (let part = 1; part <= count; part++) {
    const name = path.replace(ending, `-${number(part)}-of-${found[2]}.gguf`);
    const present = await Deno.stat(name).then(() => true, () => false);
    if (!present) {
      return fail(
        `Model is split into ${count} files, expected ${
          quote(name)
        }, which is missing`,
      );
    }
  }
  return fail(
    `Model is split into ${count} files, which is not supported yet; expected one file, merge them with llama-gguf-split --merge`,
  );
}
