/** The strict parser of a GGUF header: version, counts, then metadata and tensor table; called by `GgufFile.open()`. */

import { quote } from "./error.ts";
import {
  type GgufMetadata,
  readAlignment,
  readMetadata,
} from "./gguf_metadata.ts";
import { type GgufTensor, readTensors } from "./gguf_tensors.ts";
import type { HeaderReader } from "./header_reader.ts";

/** What a header holds. */
export interface GgufHeader extends GgufMetadata {
  /** Version of the format, 2 or 3. */
  readonly version: number;
  /** The tensor table in file order. */
  readonly tensors: ReadonlyMap<string, GgufTensor>;
}

/** The most bytes of a header; the largest vocabularies take a tenth. */
export const MAX_HEADER = 128 * 1024 * 1024;
/** The most metadata keys, and the most tensors. */
const MAX_COUNT = 65_536;
/** The fewest bytes of a metadata pair: length, one-byte key, type, value. */
const MIN_PAIR = 8 + 1 + 4 + 1;
/** The fewest bytes of a tensor: length, name, rank, one dimension, type, offset. */
const MIN_TENSOR = 8 + 1 + 4 + 8 + 4 + 8;

/**
 * Reads a header from the file's first byte.
 *
 * @param reader At byte 0.
 * @returns The header, with every tensor's data inside the file.
 * @throws {FormatError} When anything in it is wrong.
 */
export async function readGgufHeader(
  reader: HeaderReader,
): Promise<GgufHeader> {
  const version = await readVersion(reader);
  reader.field = "tensor count";
  const tensorCount = await readCount(reader, MIN_TENSOR);
  reader.field = "metadata count";
  const metadataCount = await readCount(reader, MIN_PAIR);

  const { metadata, types } = await readMetadata(reader, metadataCount);
  const alignment = readAlignment(reader, { metadata, types });
  const tensors = await readTensors(reader, tensorCount, alignment);
  return { version, metadata, types, tensors };
}

/** Reads the magic and the version. */
async function readVersion(reader: HeaderReader): Promise<number> {
  reader.field = "magic";
  if (reader.size === 0) {
    throw reader.error("File is empty, expected a GGUF model");
  }
  await reader.fill(4);
  const magic = reader.u32();
  if (magic === 0x47475546) {
    throw reader.error(
      'Byte-swapped magic "FUGG", expected "GGUF" of a little-endian file',
    );
  }
  if (magic !== 0x46554747) {
    throw reader.error(`Found ${describeMagic(magic)}, expected "GGUF"`);
  }
  reader.field = "version";
  await reader.fill(4);
  const version = reader.u32();
  if (version === 2 || version === 3) return version;
  throw reader.error(
    version !== 0 && (version & 0xffff) === 0
      ? `Byte-swapped version ${version}: the file is big-endian, expected a little-endian one`
      : `Unsupported version ${version}, expected 2 or 3`,
  );
}

/** Names the file kinds that are most often taken for a GGUF file. */
function describeMagic(magic: number): string {
  const text = String.fromCharCode(
    ...[0, 8, 16, 24].map((shift) => (magic >>> shift) & 0xff),
  );
  switch (text) {
    case "vers":
      return "a Git LFS pointer instead of the model itself";
    case "<!DO":
    case "<htm":
      return "a web page";
    case "PK\x03\x04":
      return "a ZIP archive, such as a PyTorch checkpoint";
    case "lmgg":
    case "fmgg":
    case "tjgg":
    case "algg":
      return "a GGML file from before GGUF";
  }
  return quote(text);
}

/** Reads a count that fits both the limit and what the file's rest can hold. */
async function readCount(
  reader: HeaderReader,
  smallest: number,
): Promise<number> {
  await reader.fill(8);
  const count = reader.u64();
  if (count > MAX_COUNT) {
    throw reader.error(`Found ${count}, expected at most ${MAX_COUNT}`);
  }
  const room = Math.floor(reader.left / smallest);
  if (count > room) {
    throw reader.error(
      `Data cut short: found ${count}, but the ${reader.left} bytes left hold at most ${room}`,
    );
  }
  return Number(count);
}
