/** The metadata of a GGUF header: typed values by key; read by the header parser, handed out by `GgufFile`. */

import { quote } from "./error.ts";
import { readName, readText, takeLength } from "./gguf_text.ts";
import type { HeaderReader } from "./header_reader.ts";

/** A numeric array: bools as 0 and 1, and 64-bit integers as float64 where all are below 2^53. */
export type GgufNumbers =
  | Uint8Array
  | Int8Array
  | Uint16Array
  | Int16Array
  | Uint32Array
  | Int32Array
  | Float32Array
  | Float64Array
  | BigUint64Array
  | BigInt64Array;

/** A metadata value; integers are numbers below 2^53 and bigints above. */
export type GgufValue =
  | number
  | bigint
  | boolean
  | string
  | readonly string[]
  | GgufNumbers;

/** The type of a metadata value, as the file says. */
export type GgufValueType =
  | "uint8"
  | "int8"
  | "uint16"
  | "int16"
  | "uint32"
  | "int32"
  | "float32"
  | "bool"
  | "string"
  | "array"
  | "uint64"
  | "int64"
  | "float64";

/** All metadata of a file. */
export interface GgufMetadata {
  /** Values in file order. */
  readonly metadata: ReadonlyMap<string, GgufValue>;
  /** Types of the values; of an array, that of its elements. */
  readonly types: ReadonlyMap<string, GgufValueType>;
}

/** The most bytes of a key; from the specification. */
const MAX_KEY = 65_535;
/** The most bytes of one string. */
const MAX_STRING = 64 * 1024 * 1024;
/** The most strings in all arrays together, some twice the most seen. */
const MAX_STRINGS = 1536 * 1024;
/** The largest alignment in bytes. */
const MAX_ALIGNMENT = 1024 * 1024;
/** The alignment of a file that names none, in bytes. */
const DEFAULT_ALIGNMENT = 32;

/** Names and bytes of the value types, by their number in the file. */
const VALUE_TYPES: readonly (readonly [GgufValueType, number])[] = [
  ["uint8", 1],
  ["int8", 1],
  ["uint16", 2],
  ["int16", 2],
  ["uint32", 4],
  ["int32", 4],
  ["float32", 4],
  ["bool", 1],
  ["string", 8],
  ["array", 12],
  ["uint64", 8],
  ["int64", 8],
  ["float64", 8],
];

/**
 * Reads the pairs of keys and values.
 *
 * @param reader At the first key.
 * @param count Number of pairs.
 * @returns The metadata.
 * @throws {FormatError} When anything in it is wrong.
 */
export async function readMetadata(
  reader: HeaderReader,
  count: number,
): Promise<GgufMetadata> {
  const metadata = new Map<string, GgufValue>();
  const types = new Map<string, GgufValueType>();
  const budget = { strings: MAX_STRINGS };
  for (let i = 0; i < count; i++) {
    const key = await readKey(reader, i, metadata);
    const [value, type] = await readValue(reader, budget);
    metadata.set(key, value);
    types.set(key, type);
  }
  return { metadata, types };
}

/** Reads a metadata key, which then names the field in messages. */
async function readKey(
  reader: HeaderReader,
  index: number,
  seen: ReadonlyMap<string, unknown>,
): Promise<string> {
  reader.field = `metadata key ${index}`;
  const key = await readName(reader, MAX_KEY, seen);
  reader.field = shortened(key);
  return key;
}

/** A key as it stands at the front of a message. */
function shortened(key: string): string {
  return /^[\w.\-]{1,80}$/.test(key) ? key : quote(key);
}

/** Reads the number of a value type. */
async function readValueType(
  reader: HeaderReader,
): Promise<readonly [GgufValueType, number]> {
  await reader.fill(4);
  const number = reader.u32();
  const type = VALUE_TYPES[number];
  if (type) return type;
  throw reader.error(
    `Value type is ${number}, expected 0 to ${VALUE_TYPES.length - 1}`,
  );
}

/** What the rest of the metadata may still hold. */
interface Budget {
  /** Strings in arrays: each costs far more memory than its bytes. */
  strings: number;
}

/** Reads a value and its type, an array's being that of its elements. */
async function readValue(
  reader: HeaderReader,
  budget: Budget,
): Promise<[GgufValue, GgufValueType]> {
  const [type, bytes] = await readValueType(reader);
  if (type === "array") return await readArray(reader, budget);
  if (type === "string") return [await readText(reader, MAX_STRING), type];
  await reader.fill(bytes);
  return [readScalar(reader, type), type];
}

/** Takes a buffered scalar. */
function readScalar(
  reader: HeaderReader,
  type: Exclude<GgufValueType, "array" | "string">,
): number | bigint | boolean {
  switch (type) {
    case "uint8":
      return reader.u8();
    case "int8":
      return reader.i8();
    case "uint16":
      return reader.u16();
    case "int16":
      return reader.i16();
    case "uint32":
      return reader.u32();
    case "int32":
      return reader.i32();
    case "float32":
      return reader.f32();
    case "uint64":
      return reader.u64();
    case "int64":
      return reader.i64();
    case "float64":
      return reader.f64();
    case "bool": {
      const value = reader.u8();
      if (value < 2) return value === 1;
      throw reader.error(`Bool is ${value}, expected 0 or 1`);
    }
  }
}

/** Reads an array and the type of its elements. */
async function readArray(
  reader: HeaderReader,
  budget: Budget,
): Promise<[GgufValue, GgufValueType]> {
  const [type, bytes] = await readValueType(reader);
  if (type === "array") {
    throw reader.error("Array holds arrays, expected plain values");
  }
  await reader.fill(8);
  const length = reader.u64();
  if (length > Math.floor(reader.left / bytes)) {
    throw reader.error(
      `Data cut short: array has ${length} elements of type ${type}, but ${reader.left} bytes are left in the file`,
    );
  }
  const count = Number(length);
  reader.require(count * bytes);
  if (type === "string") {
    return [await readStrings(reader, count, budget), type];
  }
  return [await readNumbers(reader, type, count * bytes), type];
}

/** Reads an array of strings. */
async function readStrings(
  reader: HeaderReader,
  count: number,
  budget: Budget,
): Promise<string[]> {
  budget.strings -= count;
  if (budget.strings < 0) {
    throw reader.error(
      `Array has ${count} strings, expected at most ${
        budget.strings + count
      } (${MAX_STRINGS} in the whole file)`,
    );
  }
  const strings: string[] = [];
  for (let i = 0; i < count; i++) {
    reader.index = i;
    // Nothing is awaited while the buffer lasts: there are 100,000 of these.
    if (reader.buffered < 8) await reader.fill(8);
    const length = takeLength(reader, MAX_STRING);
    if (reader.buffered < length) await reader.fill(length);
    strings.push(reader.text(length));
  }
  reader.index = -1;
  return strings;
}

/** Reads an array of numbers; host and file are both little-endian. */
async function readNumbers(
  reader: HeaderReader,
  type: Exclude<GgufValueType, "array" | "string">,
  bytes: number,
): Promise<GgufNumbers> {
  const raw = new Uint8Array(bytes);
  await reader.copy(raw);
  switch (type) {
    case "uint8":
      return raw;
    case "bool":
      return checkedBools(reader, raw);
    case "int8":
      return new Int8Array(raw.buffer);
    case "uint16":
      return new Uint16Array(raw.buffer);
    case "int16":
      return new Int16Array(raw.buffer);
    case "uint32":
      return new Uint32Array(raw.buffer);
    case "int32":
      return new Int32Array(raw.buffer);
    case "float32":
      return new Float32Array(raw.buffer);
    case "float64":
      return new Float64Array(raw.buffer);
    case "uint64":
      return narrowed(new BigUint64Array(raw.buffer));
    case "int64":
      return narrowed(new BigInt64Array(raw.buffer));
  }
}

/** Bools of 0 and 1, and nothing else. */
function checkedBools(reader: HeaderReader, values: Uint8Array): Uint8Array {
  for (let i = 0; i < values.length; i++) {
    if (values[i]! < 2) continue;
    reader.index = i;
    throw reader.error(`Bool is ${values[i]}, expected 0 or 1`);
  }
  return values;
}

/** The same integers as numbers, where each of them is exact. */
function narrowed(values: BigUint64Array | BigInt64Array): GgufNumbers {
  const numbers = new Float64Array(values.length);
  for (let i = 0; i < numbers.length; i++) {
    numbers[i] = Number(values[i]);
    if (!Number.isSafeInteger(numbers[i])) return values;
  }
  return numbers;
}

/**
 * The alignment that the metadata asks for.
 *
 * @param reader Names the file in errors.
 * @param metadata The metadata and its types.
 * @returns The alignment of tensor data in bytes.
 * @throws {FormatError} When it is not a power of two stored as uint32.
 */
export function readAlignment(
  reader: HeaderReader,
  { metadata, types }: GgufMetadata,
): number {
  reader.field = "general.alignment";
  const value = metadata.get("general.alignment");
  if (value === undefined) return DEFAULT_ALIGNMENT;
  const type = types.get("general.alignment");
  if (type !== "uint32" || typeof value !== "number") {
    throw reader.error(`Found ${describeGguf(value, type)}, expected a uint32`);
  }
  if (value < 1 || value > MAX_ALIGNMENT || (value & (value - 1)) !== 0) {
    throw reader.error(
      `Alignment is ${value}, expected a power of two of at most ${MAX_ALIGNMENT}`,
    );
  }
  return value;
}

/**
 * A metadata value in words, for messages.
 *
 * @param value The value.
 * @param type Its type, or that of its elements.
 * @returns For example `array of 32 int32` or `float32 0.5`.
 */
export function describeGguf(
  value: GgufValue,
  type: GgufValueType | undefined,
): string {
  if (typeof value === "object") {
    return `an array of ${value.length} values of type ${type}`;
  }
  return typeof value === "string"
    ? `the string ${quote(value)}`
    : `${type} ${value}`;
}
