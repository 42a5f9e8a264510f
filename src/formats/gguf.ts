/** An open GGUF model file, its metadata and tensors checked; used by model loading and by the tokenizer. */

import { DataFile } from "./data_file.ts";
import { FormatError, quote } from "./error.ts";
import { MAX_HEADER, readGgufHeader } from "./gguf_header.ts";
import {
  describeGguf,
  type GgufValue,
  type GgufValueType,
} from "./gguf_metadata.ts";
import { refuseSplit } from "./gguf_split.ts";
import type { GgufTensor } from "./gguf_tensors.ts";
import { HeaderReader } from "./header_reader.ts";

export type { GgmlType } from "./ggml_types.ts";
export type { GgufNumbers, GgufValue } from "./gguf_metadata.ts";
export type { GgufTensor } from "./gguf_tensors.ts";

/** Bounds of a number in the metadata, both included. */
export interface GgufRange {
  /** The least value that makes sense. */
  min: number;
  /** The greatest value that makes sense. */
  max: number;
  /** What to return when the key is absent; without it that is an error. */
  fallback?: number;
}

/**
 * A GGUF file: header, metadata and tensor table are read and checked by
 * {@linkcode GgufFile.open}; tensor data is read on demand.
 *
 * @example
 * ```ts ignore
 * using file = await GgufFile.open("model.gguf");
 * const layers = file.integer("llama.block_count", { min: 1, max: 1024 });
 * const tensor = file.tensor("token_embd.weight");
 * const bytes = new Uint8Array(tensor.bytes);
 * await file.read(tensor.offset, bytes);
 * ```
 */
export class GgufFile implements Disposable {
  /** Path of the file, as given to `open`. */
  readonly path: string;
  /** Version of the format, 2 or 3. */
  readonly version: number;
  /** Bytes in the file when it was opened. */
  readonly size: number;
  /** Metadata in file order. */
  readonly metadata: ReadonlyMap<string, GgufValue>;
  /** Tensors in file order, by name. */
  readonly tensors: ReadonlyMap<string, GgufTensor>;

  #types: ReadonlyMap<string, GgufValueType>;
  #file: DataFile;

  private constructor(
    file: DataFile,
    fields:
      & Pick<GgufFile, "path" | "version" | "size" | "metadata" | "tensors">
      & { types: ReadonlyMap<string, GgufValueType> },
  ) {
    this.path = fields.path;
    this.version = fields.version;
    this.size = fields.size;
    this.metadata = fields.metadata;
    this.tensors = fields.tensors;
    this.#types = fields.types;
    this.#file = file;
  }

  /**
   * Opens a file and checks everything but the tensors' data.
   *
   * @param path Path of the file.
   * @returns The open file, to be closed by its owner.
   * @throws {FormatError} When the file is not a whole GGUF file.
   * @throws {Deno.errors.NotFound} When there is none; likewise `IsADirectory`,
   * `PermissionDenied` and the rest, naming the path.
   */
  static async open(path: string): Promise<GgufFile> {
    const file = await DataFile.open(path, "GGUF file");
    try {
      const { size } = file;
      const reader = new HeaderReader(
        { read: (into) => file.next(into) },
        { path, size, limit: MAX_HEADER },
      );
      const header = await readGgufHeader(
        reader,
        (metadata) => refuseSplit(path, metadata),
      );
      return new GgufFile(file, { path, size, ...header });
    } catch (error) {
      file.close();
      throw error;
    }
  }

  /**
   * A string from the metadata.
   *
   * @param key The key.
   * @param fallback What to return when the key is absent.
   * @returns The string.
   * @throws {FormatError} When it is absent or of another type.
   */
  string(key: string, fallback?: string): string {
    if (fallback !== undefined && !this.metadata.has(key)) return fallback;
    const value = this.#get(key, "a string");
    if (typeof value === "string") return value;
    throw this.#wrong(key, value, "a string");
  }

  /**
   * An integer from the metadata, whatever its width.
   *
   * @param key The key.
   * @param range Its bounds, and a fallback for when the key is absent.
   * @returns The integer.
   * @throws {FormatError} When it is absent, of another type or out of range.
   */
  integer(key: string, range: GgufRange): number {
    const { min, max, fallback } = range;
    if (fallback !== undefined && !this.metadata.has(key)) return fallback;
    const expected = `an integer from ${min} to ${max}`;
    const value = this.#get(key, expected);
    const fits = !this.#types.get(key)!.startsWith("float") &&
      typeof value === "number" && value >= min && value <= max;
    if (fits) return value;
    throw this.#wrong(key, value, expected);
  }

  /**
   * A finite number from the metadata, stored as a float.
   *
   * @param key The key.
   * @param range Its bounds, and a fallback for when the key is absent.
   * @returns The number.
   * @throws {FormatError} When it is absent, of another type, not finite or
   * out of range.
   */
  float(key: string, range: GgufRange): number {
    const { min, max, fallback } = range;
    if (fallback !== undefined && !this.metadata.has(key)) return fallback;
    const expected = `a float from ${min} to ${max}`;
    const value = this.#get(key, expected);
    const fits = this.#types.get(key)!.startsWith("float") &&
      typeof value === "number" && Number.isFinite(value) &&
      value >= min && value <= max;
    if (fits) return value;
    throw this.#wrong(key, value, expected);
  }

  /**
   * A boolean from the metadata.
   *
   * @param key The key.
   * @param fallback What to return when the key is absent.
   * @returns The boolean.
   * @throws {FormatError} When it is absent or of another type.
   */
  boolean(key: string, fallback?: boolean): boolean {
    if (fallback !== undefined && !this.metadata.has(key)) return fallback;
    const value = this.#get(key, "a bool");
    if (typeof value === "boolean") return value;
    throw this.#wrong(key, value, "a bool");
  }

  /**
   * An array of strings from the metadata.
   *
   * @param key The key.
   * @returns The strings; they belong to the file, so leave them as they are.
   * @throws {FormatError} When it is absent or of another type.
   */
  strings(key: string): string[] {
    const value = this.#get(key, "an array of strings");
    if (Array.isArray(value) && this.#types.get(key) === "string") {
      return value;
    }
    throw this.#wrong(key, value, "an array of strings");
  }

  /**
   * An array of numbers from the metadata.
   *
   * @param key The key.
   * @returns The numbers; they belong to the file, so leave them as they are.
   * @throws {FormatError} When it is absent, of another type, or holds an
   * integer of 2^53 or more.
   */
  numbers(key: string): ArrayLike<number> {
    const value = this.#get(key, "an array of numbers");
    if (value instanceof BigInt64Array || value instanceof BigUint64Array) {
      throw this.#wrong(key, value, "an array of numbers below 2^53");
    }
    if (ArrayBuffer.isView(value)) return value;
    throw this.#wrong(key, value, "an array of numbers");
  }

  /**
   * A row of the tensor table.
   *
   * @param name The tensor's name.
   * @param shape The shape that it must have; trailing ones count for nothing.
   * @returns The row.
   * @throws {FormatError} When it is absent or of another shape.
   */
  tensor(name: string, shape?: readonly number[]): GgufTensor {
    const field = `tensor ${quote(name)}`;
    const expected = shape ? `shape [${shape.join(", ")}]` : "it";
    const tensor = this.tensors.get(name);
    if (!tensor) {
      throw new FormatError(
        this.path,
        field,
        `Missing from the file, expected ${expected}`,
      );
    }
    const same = !shape ||
      [0, 1, 2, 3].every((i) => (shape[i] ?? 1) === (tensor.shape[i] ?? 1));
    if (same) return tensor;
    throw new FormatError(
      this.path,
      field,
      `Shape is [${tensor.shape.join(", ")}], expected ${expected}`,
    );
  }

  /**
   * Reads bytes of the file, such as a tensor's data.
   *
   * @param offset Where to begin, in bytes from the file's start.
   * @param into Filled whole.
   * @throws {FormatError} When the file ends before.
   * @throws {RangeError} When the offset is not a whole number, 0 or more.
   * @throws {Deno.errors.BadResource} When the file is closed.
   */
  read(offset: number, into: Uint8Array): Promise<void> {
    return this.#file.read(offset, into);
  }

  /** Closes the file; a second call does nothing. */
  close(): void {
    this.#file.close();
  }

  /** Closes the file at the end of a `using` block. */
  [Symbol.dispose](): void {
    this.close();
  }

  /** A value that must be there. */
  #get(key: string, expected: string): GgufValue {
    const value = this.metadata.get(key);
    if (value !== undefined) return value;
    throw new FormatError(this.path, key, `Missing, expected ${expected}`);
  }

  /** The error of a value that is not what its reader wants. */
  #wrong(key: string, value: GgufValue, expected: string): FormatError {
    const found = describeGguf(value, this.#types.get(key));
    return new FormatError(
      this.path,
      key,
      `Found ${found}, expected ${expected}`,
    );
  }
}
