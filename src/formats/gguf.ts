/** An open GGUF model, in one file or several, its metadata and tensors checked; used by model loading and by the tokenizer. */

import { DataFile } from "./data_file.ts";
import { FormatError, quote } from "./error.ts";
import { type GgufHeader, MAX_HEADER, readGgufHeader } from "./gguf_header.ts";
import {
  describeGguf,
  type GgufValue,
  type GgufValueType,
} from "./gguf_metadata.ts";
import {
  missingPart,
  readSplit,
  requireFirst,
  requireSameModel,
} from "./gguf_split.ts";
import type { GgufTensor } from "./gguf_tensors.ts";
import { HeaderReader } from "./header_reader.ts";
import { partNames } from "./part_names.ts";

export type { GgmlType } from "./ggml_types.ts";
export type { GgufNumbers, GgufValue } from "./gguf_metadata.ts";

/** Bounds of a number in the metadata, both included. */
export interface GgufRange {
  /** The least value that makes sense. */
  min: number;
  /** The greatest value that makes sense. */
  max: number;
  /** What to return when the key is absent; without it that is an error. */
  fallback?: number;
}

/** One tensor, with the file that holds it. */
export interface GgufFileTensor extends GgufTensor {
  /** The file. */
  readonly file: DataFile;
}

/**
 * A GGUF model: headers, metadata and tensor tables of all its files are read
 * and checked by {@linkcode GgufFile.open}; tensor data is read on demand.
 *
 * @example
 * ```ts ignore
 * using file = await GgufFile.open("model.gguf");
 * const layers = file.integer("llama.block_count", { min: 1, max: 1024 });
 * const tensor = file.tensor("token_embd.weight");
 * const bytes = new Uint8Array(tensor.bytes);
 * await tensor.file.read(tensor.offset, bytes);
 * ```
 */
export class GgufFile implements Disposable {
  /** Path of the file, of several the first, as given to `open`. */
  readonly path: string;
  /** Number of its files. */
  readonly parts: number;
  /** Version of the format, 2 or 3. */
  readonly version: number;
  /** Bytes of all files when they were opened. */
  readonly size: number;
  /** Metadata in file order, of the first file. */
  readonly metadata: ReadonlyMap<string, GgufValue>;
  /** Tensors in file order, by name. */
  readonly tensors: ReadonlyMap<string, GgufFileTensor>;

  #types: ReadonlyMap<string, GgufValueType>;
  #files: readonly DataFile[];

  private constructor(
    files: readonly DataFile[],
    { version, metadata, types }: GgufHeader,
    tensors: ReadonlyMap<string, GgufFileTensor>,
  ) {
    this.path = files[0]!.path;
    this.parts = files.length;
    this.version = version;
    this.size = files.reduce((sum, { size }) => sum + size, 0);
    this.metadata = metadata;
    this.tensors = tensors;
    this.#types = types;
    this.#files = files;
  }

  /**
   * Opens a model and checks everything but the tensors' data.
   *
   * @param path Path of the file, or of the first of several that llama.cpp's
   * gguf-split made; the others lie beside it.
   * @returns The open model, to be closed by its owner.
   * @throws {FormatError} When a file is not a whole GGUF file, or the files
   * are not those of one model.
   * @throws {Deno.errors.NotFound} When there is none; likewise `IsADirectory`,
   * `PermissionDenied` and the rest, naming the path.
   */
  static async open(path: string): Promise<GgufFile> {
    const files: DataFile[] = [];
    try {
      const header = await openPart(path, files);
      const tensors = new Map<string, GgufFileTensor>();
      addTensors(tensors, header, files[0]!);
      const first = readSplit(path, header);
      if (first === null) return new GgufFile(files, header, tensors);
      requireFirst(path, first);
      for (const name of partNames(path).slice(1)) {
        let other: GgufHeader;
        try {
          other = await openPart(name, files);
        } catch (cause) {
          if (!(cause instanceof Deno.errors.NotFound)) throw cause;
          throw missingPart(path, first, name, cause);
        }
        const split = readSplit(name, other);
        requireSameModel(name, split, other, first, header);
        addTensors(tensors, other, files.at(-1)!);
      }
      if (tensors.size !== first.tensors) {
        throw new FormatError(
          path,
          "split.tensors.count",
          `The ${first.count} files hold ${tensors.size} tensors, expected ${first.tensors}`,
        );
      }
      return new GgufFile(files, header, tensors);
    } catch (error) {
      for (const file of files) file.close();
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
  tensor(name: string, shape?: readonly number[]): GgufFileTensor {
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
      tensor.file.path,
      field,
      `Shape is [${tensor.shape.join(", ")}], expected ${expected}`,
    );
  }

  /** Closes all files; a second call does nothing. */
  close(): void {
    for (const file of this.#files) file.close();
  }

  /** Closes all files at the end of a `using` block. */
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

/** Opens one file into `files`, and reads its header. */
async function openPart(
  path: string,
  files: DataFile[],
): Promise<GgufHeader> {
  const file = await DataFile.open(path, "GGUF file");
  files.push(file);
  const { size } = file;
  return await readGgufHeader(
    new HeaderReader(
      { read: (into) => file.next(into) },
      { path, size, limit: MAX_HEADER },
    ),
  );
}

/** Adds the tensors of one file to those of the others. */
function addTensors(
  all: Map<string, GgufFileTensor>,
  { tensors }: GgufHeader,
  file: DataFile,
): void {
  for (const [name, tensor] of tensors) {
    const other = all.get(name);
    if (other !== undefined) {
      throw new FormatError(
        file.path,
        `tensor ${quote(name)}`,
        `Lies in ${quote(other.file.path)} as well, expected it once`,
      );
    }
    all.set(name, { ...tensor, file });
  }
}
