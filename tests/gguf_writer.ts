/** A small writer of GGUF files for tests, which can also write wrong ones: every number of the file may be overridden. */

import { GGML_TYPES, type GgmlType } from "../src/formats/ggml_types.ts";

/** Numbers of the value types in a file. */
export const VALUE_TYPE = {
  uint8: 0,
  int8: 1,
  uint16: 2,
  int16: 3,
  uint32: 4,
  int32: 5,
  float32: 6,
  bool: 7,
  string: 8,
  array: 9,
  uint64: 10,
  int64: 11,
  float64: 12,
} as const;

/** A value as it stands in the file: the number of its type and its bytes. */
export interface RawValue {
  /** Number of the type, right or wrong. */
  readonly type: number;
  /** All bytes after the type. */
  readonly bytes: Uint8Array;
}

/** A metadata value; numbers need a width, so they come as {@linkcode u32} etc. */
export type FieldValue = string | boolean | readonly string[] | RawValue;

/** A tensor to write. */
export interface TensorInput {
  /** Its name; bytes where it is to be malformed. */
  name: string | Uint8Array;
  /** Its type; F32 when left out. A number is written as it is. */
  type?: GgmlType | number;
  /** Dimensions, row length first. */
  shape: readonly (number | bigint)[];
  /** Its data; zeros when left out. Float32Array data suits type F32 only. */
  data?: Uint8Array | Float32Array;
  /** Number of dimensions, when not the shape's length. */
  rank?: number;
  /** Offset from the first data byte, when not the right one. */
  offset?: number | bigint;
  /** Data bytes to write, when not what shape and type ask for. */
  bytes?: number;
}

/** A file to write. */
export interface GgufInput {
  /** Four characters; "GGUF" when left out. */
  magic?: string;
  /** 3 when left out. */
  version?: number;
  /** Number of tensors, when not the true one. */
  tensorCount?: number | bigint;
  /** Number of metadata pairs, when not the true one. */
  metadataCount?: number | bigint;
  /** Pairs in file order; a key may come twice, or be bytes. */
  metadata?: readonly (readonly [string | Uint8Array, FieldValue])[];
  /** Tensors in file order. */
  tensors?: readonly TensorInput[];
  /** Alignment of the data in bytes; 32 when left out. Not written as metadata. */
  alignment?: number;
}

/** Where a number lies in a written file; mutation tests aim at them. */
export interface Mark {
  /** What the number is. */
  kind: "count" | "length" | "type" | "value" | "rank" | "dimension" | "offset";
  /** Its first byte. */
  at: number;
  /** Its bytes, 4 or 8. */
  size: 4 | 8;
}

/** Collects little-endian bytes. */
class Bytes {
  #parts: Uint8Array[] = [];
  length = 0;
  marks: Mark[] = [];

  add(part: Uint8Array): void {
    this.#parts.push(part);
    this.length += part.length;
  }

  number(kind: Mark["kind"], size: 4 | 8, value: number | bigint): void {
    this.marks.push({ kind, at: this.length, size });
    this.add(size === 4 ? u32(Number(value)).bytes : u64(value).bytes);
  }

  text(text: string | Uint8Array): void {
    const bytes = typeof text === "string" ? utf8(text) : text;
    this.number("length", 8, bytes.length);
    this.add(bytes);
  }

  pad(alignment: number): void {
    this.add(new Uint8Array((alignment - this.length % alignment) % alignment));
  }

  join(): Uint8Array {
    return concat(this.#parts);
  }
}

/**
 * Writes a file.
 *
 * @param input What is in it.
 * @returns Its bytes.
 */
export function ggufBytes(input: GgufInput): Uint8Array<ArrayBuffer> {
  return ggufMarked(input).bytes;
}

/**
 * Writes a file and tells where its numbers lie.
 *
 * @param input What is in it.
 * @returns Its bytes and marks.
 */
export function ggufMarked(
  input: GgufInput,
): { bytes: Uint8Array<ArrayBuffer>; marks: Mark[] } {
  const { metadata = [], tensors = [], alignment = 32 } = input;
  const out = new Bytes();
  out.add(latin1(input.magic ?? "GGUF"));
  out.number("value", 4, input.version ?? 3);
  out.number("count", 8, input.tensorCount ?? tensors.length);
  out.number("count", 8, input.metadataCount ?? metadata.length);
  for (const [key, value] of metadata) {
    out.text(key);
    const raw = rawValue(value);
    out.number("type", 4, raw.type);
    if (raw.type === VALUE_TYPE.array && raw.bytes.length >= 12) {
      out.marks.push({ kind: "type", at: out.length, size: 4 });
      out.marks.push({ kind: "length", at: out.length + 4, size: 8 });
    } else if (raw.bytes.length >= 8) {
      out.marks.push({ kind: "length", at: out.length, size: 8 });
    } else if (raw.bytes.length >= 4) {
      out.marks.push({ kind: "value", at: out.length, size: 4 });
    }
    out.add(raw.bytes);
  }

  const data: Uint8Array[] = [];
  let offset = 0;
  for (const tensor of tensors) {
    const bytes = tensorData(tensor);
    out.text(tensor.name);
    out.number("rank", 4, tensor.rank ?? tensor.shape.length);
    for (const length of tensor.shape) out.number("dimension", 8, length);
    const type = tensor.type ?? "F32";
    out.number(
      "type",
      4,
      typeof type === "number" ? type : GGML_TYPES[type].id,
    );
    out.number("offset", 8, tensor.offset ?? offset);
    const gap = (alignment - bytes.length % alignment) % alignment;
    data.push(bytes, new Uint8Array(gap));
    offset += bytes.length + gap;
  }
  if (tensors.length > 0) out.pad(alignment);
  for (const part of data) out.add(part);
  return { bytes: out.join() as Uint8Array<ArrayBuffer>, marks: out.marks };
}

/** The bytes of a tensor's data. */
function tensorData(tensor: TensorInput): Uint8Array {
  const { data, type = "F32" } = tensor;
  if (data) {
    return data instanceof Uint8Array
      ? data
      : new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  }
  const values = tensor.shape.reduce<number>((n, x) => n * Number(x), 1);
  const { block, bytes } = typeof type === "number"
    ? { block: 1, bytes: 0 }
    : GGML_TYPES[type];
  return new Uint8Array(tensor.bytes ?? values / block * bytes);
}

/** A value in the form that the file has it. */
function rawValue(value: FieldValue): RawValue {
  if (typeof value === "string") return text(value);
  if (typeof value === "boolean") {
    return { type: VALUE_TYPE.bool, bytes: Uint8Array.of(Number(value)) };
  }
  return "bytes" in value ? value : strings(value);
}

/** A scalar of `size` bytes. */
function scalar(
  type: keyof typeof VALUE_TYPE,
  size: number,
  set: (view: DataView) => void,
): RawValue {
  const bytes = new Uint8Array(size);
  set(new DataView(bytes.buffer));
  return { type: VALUE_TYPE[type], bytes };
}

/** An unsigned 8-bit integer. */
export function u8(value: number): RawValue {
  return scalar("uint8", 1, (view) => view.setUint8(0, value));
}

/** A signed 8-bit integer. */
export function i8(value: number): RawValue {
  return scalar("int8", 1, (view) => view.setInt8(0, value));
}

/** An unsigned 16-bit integer. */
export function u16(value: number): RawValue {
  return scalar("uint16", 2, (view) => view.setUint16(0, value, true));
}

/** A signed 16-bit integer. */
export function i16(value: number): RawValue {
  return scalar("int16", 2, (view) => view.setInt16(0, value, true));
}

/** An unsigned 32-bit integer, the usual type of counts. */
export function u32(value: number): RawValue {
  return scalar("uint32", 4, (view) => view.setUint32(0, value, true));
}

/** A signed 32-bit integer. */
export function i32(value: number): RawValue {
  return scalar("int32", 4, (view) => view.setInt32(0, value, true));
}

/** An unsigned 64-bit integer. */
export function u64(value: number | bigint): RawValue {
  return scalar(
    "uint64",
    8,
    (view) => view.setBigUint64(0, BigInt(value), true),
  );
}

/** A signed 64-bit integer. */
export function i64(value: number | bigint): RawValue {
  return scalar("int64", 8, (view) => view.setBigInt64(0, BigInt(value), true));
}

/** A 32-bit float. */
export function f32(value: number): RawValue {
  return scalar("float32", 4, (view) => view.setFloat32(0, value, true));
}

/** A 64-bit float. */
export function f64(value: number): RawValue {
  return scalar("float64", 8, (view) => view.setFloat64(0, value, true));
}

/** A string, from text or from any bytes. */
export function text(value: string | Uint8Array): RawValue {
  const bytes = typeof value === "string" ? utf8(value) : value;
  return {
    type: VALUE_TYPE.string,
    bytes: concat([u64(bytes.length).bytes, bytes]),
  };
}

/**
 * An array.
 *
 * @param type Number of the elements' type.
 * @param elements The elements' bytes.
 * @param length Number of elements, when not the true one.
 * @returns The value.
 */
export function array(
  type: number,
  elements: readonly Uint8Array[],
  length: number | bigint = elements.length,
): RawValue {
  return {
    type: VALUE_TYPE.array,
    bytes: concat([u32(type).bytes, u64(length).bytes, ...elements]),
  };
}

/** An array of strings, from text or from any bytes. */
export function strings(values: readonly (string | Uint8Array)[]): RawValue {
  return array(VALUE_TYPE.string, values.map((value) => text(value).bytes));
}

/** An array of booleans. */
export function booleans(values: readonly boolean[]): RawValue {
  return array(
    VALUE_TYPE.bool,
    values.map((value) => Uint8Array.of(Number(value))),
  );
}

/** An array of signed 32-bit integers, such as token types. */
export function i32s(values: readonly number[]): RawValue {
  return array(VALUE_TYPE.int32, values.map((value) => i32(value).bytes));
}

/** An array of unsigned 32-bit integers. */
export function u32s(values: readonly number[]): RawValue {
  return array(VALUE_TYPE.uint32, values.map((value) => u32(value).bytes));
}

/** An array of 32-bit floats, such as token scores. */
export function f32s(values: readonly number[]): RawValue {
  return array(VALUE_TYPE.float32, values.map((value) => f32(value).bytes));
}

/** Joins bytes. */
export function concat(parts: readonly Uint8Array[]): Uint8Array<ArrayBuffer> {
  const length = parts.reduce((sum, part) => sum + part.length, 0);
  const joined = new Uint8Array(length);
  let at = 0;
  for (const part of parts) {
    joined.set(part, at);
    at += part.length;
  }
  return joined;
}

/** UTF-8 of a text. */
function utf8(text: string): Uint8Array {
  return new TextEncoder().encode(text);
}

/** One byte a character. */
function latin1(text: string): Uint8Array {
  return Uint8Array.from(text, (character) => character.charCodeAt(0));
}
