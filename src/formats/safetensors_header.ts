/** The strict parser of a safetensors header: what the format's reference parser checks, and what JavaScript would let through besides; called by `SafetensorsFile.open()`. */

import { quote } from "./error.ts";
import type { HeaderReader } from "./header_reader.ts";
import { type Json, JsonError, parseJson } from "./json.ts";

/** The element types of the format, with their bits. */
export const SAFETENSORS_TYPES: ReadonlyMap<string, number> = new Map([
  ["BOOL", 8],
  ["F4", 4],
  ["F6_E2M3", 6],
  ["F6_E3M2", 6],
  ["U8", 8],
  ["I8", 8],
  ["F8_E5M2", 8],
  ["F8_E4M3", 8],
  ["F8_E8M0", 8],
  ["F8_E4M3FNUZ", 8],
  ["F8_E5M2FNUZ", 8],
  ["I16", 16],
  ["U16", 16],
  ["F16", 16],
  ["BF16", 16],
  ["I32", 32],
  ["U32", 32],
  ["F32", 32],
  ["C64", 64],
  ["F64", 64],
  ["I64", 64],
  ["U64", 64],
]);

/** One tensor of one file. */
export interface StoredTensor {
  /** Its name, unique in the model. */
  readonly name: string;
  /** How its values are stored, as the file names it. */
  readonly type: string;
  /** Its dimensions, the row length last; none for a single number. */
  readonly shape: readonly number[];
  /** Where its data begins, in bytes from the file's start. */
  readonly offset: number;
  /** Length of its data in bytes. */
  readonly bytes: number;
}

/** What a header holds. */
export interface SafetensorsHeader {
  /** Tensors by name, in the order of their data. */
  readonly tensors: ReadonlyMap<string, StoredTensor>;
  /** The strings of `__metadata__`. */
  readonly metadata: ReadonlyMap<string, string>;
}

/** The most bytes of a header's JSON, as in the reference parser. */
const MAX_JSON = 100_000_000;
/** The most bytes that are read of a file before its data. */
export const MAX_HEADER: number = 8 + MAX_JSON;
const MAX_TENSORS = 200_000;
const MAX_RANK = 8;
const MAX_NAME = 512;
const METADATA = "__metadata__";
const encoder = new TextEncoder();

/**
 * Reads a header from the file's first byte.
 *
 * @param reader At byte 0.
 * @returns The tensors, whose data fills the rest of the file exactly.
 * @throws {FormatError} When anything in it is wrong.
 */
export async function readSafetensorsHeader(
  reader: HeaderReader,
): Promise<SafetensorsHeader> {
  reader.field = "header length";
  if (reader.size === 0) {
    throw reader.error("File is empty, expected a safetensors model");
  }
  await reader.fill(8);
  const length = reader.u64();
  if (length > MAX_JSON) {
    throw reader.error(
      `Found ${length} bytes, expected at most ${MAX_JSON}; is it a safetensors file?`,
    );
  }
  if (length > reader.left) {
    throw reader.error(
      `Data cut short: found ${length} bytes, but ${reader.left} are left in the file`,
    );
  }
  reader.field = "header";
  if (length === 0) {
    throw reader.error("Header is empty, expected a JSON object");
  }
  await reader.fill(Number(length));
  const root = parse(reader, reader.text(Number(length)));
  const metadata = readMetadata(reader, root.get(METADATA));
  root.delete(METADATA);
  return { tensors: readTensors(reader, root), metadata };
}

function parse(reader: HeaderReader, text: string): Map<string, Json> {
  let root: Json;
  try {
    // The metadata is one member more.
    const members = MAX_TENSORS + 1;
    root = parseJson(text, { depth: 3, members, integers: true });
  } catch (cause) {
    if (!(cause instanceof JsonError)) throw cause;
    const [name, ...rest] = cause.place;
    if (name !== undefined) {
      reader.field = ["tensor", quote(String(name)), ...rest].join(" ");
    }
    throw reader.error(cause.message, { cause });
  }
  if (root instanceof Map) return root;
  throw reader.error(`Found ${describe(root)}, expected an object`);
}

function readMetadata(
  reader: HeaderReader,
  value: Json | undefined,
): Map<string, string> {
  const strings = new Map<string, string>();
  if (value === undefined) return strings;
  reader.field = METADATA;
  if (!(value instanceof Map)) {
    throw reader.error(`Found ${describe(value)}, expected an object`);
  }
  for (const [key, text] of value) {
    if (typeof text !== "string") {
      reader.field = `${METADATA} ${quote(key)}`;
      throw reader.error(`Found ${describe(text)}, expected a string`);
    }
    strings.set(key, text);
  }
  return strings;
}

function readTensors(
  reader: HeaderReader,
  root: Map<string, Json>,
): Map<string, StoredTensor> {
  reader.field = "header";
  if (root.size > MAX_TENSORS) {
    throw reader.error(
      `Found ${root.size} tensors, expected at most ${MAX_TENSORS}`,
    );
  }
  const start = reader.position;
  const rows: (StoredTensor & { end: number })[] = [];
  for (const [name, value] of root) rows.push(readTensor(reader, name, value));
  rows.sort((a, b) => a.offset - b.offset || a.end - b.end);
  const tensors = new Map<string, StoredTensor>();
  let next = 0;
  for (const { name, type, shape, offset, end, bytes } of rows) {
    reader.field = `tensor ${quote(name)} data_offsets`;
    if (offset !== next) {
      throw reader.error(
        `Begins at ${offset}, expected ${next}, where the tensor before ends: data may neither overlap nor leave holes`,
      );
    }
    if (start + end > reader.size) {
      throw reader.error(
        `Data cut short: ends at byte ${
          start + end
        }, but the file at byte ${reader.size}`,
      );
    }
    tensors.set(name, { name, type, shape, offset: start + offset, bytes });
    next = end;
  }
  if (start + next !== reader.size) {
    reader.field = "data";
    throw reader.error(
      `The tensors end at byte ${
        start + next
      }, expected the file's end at byte ${reader.size}`,
    );
  }
  return tensors;
}

/** One entry of the header, its offsets counted from the first data byte. */
function readTensor(
  reader: HeaderReader,
  name: string,
  value: Json,
): StoredTensor & { end: number } {
  const field = `tensor ${quote(name)}`;
  reader.field = "header";
  if (name === "" || encoder.encode(name).length > MAX_NAME) {
    throw reader.error(
      `The tensor name ${quote(name)} has ${
        encoder.encode(name).length
      } bytes, expected 1 to ${MAX_NAME}`,
    );
  }
  if (/\p{Cc}/u.test(name)) {
    throw reader.error(
      `The tensor name ${quote(name)} holds a control character, expected none`,
    );
  }
  reader.field = field;
  if (!(value instanceof Map)) {
    throw reader.error(`Found ${describe(value)}, expected an object`);
  }
  reader.field = `${field} dtype`;
  const type = value.get("dtype");
  const bits = typeof type === "string"
    ? SAFETENSORS_TYPES.get(type)
    : undefined;
  if (typeof type !== "string" || bits === undefined) {
    throw reader.error(
      `Found ${describe(type)}, expected one of ${
        [...SAFETENSORS_TYPES.keys()].join(", ")
      }`,
    );
  }
  reader.field = `${field} shape`;
  const shape = integers(reader, value.get("shape"));
  if (shape.length > MAX_RANK) {
    throw reader.error(
      `Found ${shape.length} dimensions, expected at most ${MAX_RANK}`,
    );
  }
  // As in the reference parser a zero hides no overflow of what stands before it.
  let count = 1;
  for (const length of shape) {
    count *= length;
    if (!Number.isSafeInteger(count)) {
      throw reader.error(
        `The product of [${
          shape.join(", ")
        }] is too large, expected below 2^53`,
      );
    }
  }
  const size = count * bits;
  if (!Number.isSafeInteger(size)) {
    throw reader.error(
      `Its ${count} values of ${bits} bits are too large, expected below 2^53 bits`,
    );
  }
  if (size % 8 !== 0) {
    throw reader.error(
      `Its ${count} values of ${bits} bits are no whole number of bytes, expected one`,
    );
  }
  reader.field = `${field} data_offsets`;
  const offsets = integers(reader, value.get("data_offsets"));
  const [offset, end] = offsets;
  if (offsets.length !== 2 || offset === undefined || end === undefined) {
    throw reader.error(`Found ${offsets.length} numbers, expected 2`);
  }
  if (end < offset) {
    throw reader.error(`Ends at ${end}, expected at least ${offset}`);
  }
  if (end - offset !== size / 8) {
    throw reader.error(
      `Holds ${end - offset} bytes, expected ${size / 8}: its shape is [${
        shape.join(", ")
      }] of ${type}`,
    );
  }
  return { name, type, shape, offset, end, bytes: size / 8 };
}

/** A list of integers, none of them negative. */
function integers(reader: HeaderReader, value: Json | undefined): number[] {
  if (!Array.isArray(value)) {
    throw reader.error(`Found ${describe(value)}, expected a list of integers`);
  }
  return value.map((item) => {
    if (typeof item === "number" && item >= 0) return item;
    throw reader.error(
      `Holds ${describe(item)}, expected whole numbers of 0 or more`,
    );
  });
}

/** A value as a message names it. */
export function describe(value: Json | undefined): string {
  if (value === undefined) return "nothing";
  if (Array.isArray(value)) return "a list";
  if (value instanceof Map) return "an object";
  return typeof value === "string" ? quote(value) : String(value);
}
