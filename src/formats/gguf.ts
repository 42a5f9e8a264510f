/** An open GGUF model file, its metadata and tensors checked; used by model loading and by the tokenizer. */

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

/** Closes files whose owner was dropped without `close()`. */
const dropped = new FinalizationRegistry<Deno.FsFile>((file) => {
  try {
    file.close();
  } catch {
    // Closed by other means: nothing is left to do.
  }
});

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
  #file: Deno.FsFile | null;
  /** The last read; each waits for the one before, as they share a position. */
  #turn: Promise<void> = Promise.resolve();

  private constructor(
    file: Deno.FsFile,
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
    dropped.register(this, file, this);
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
    if (typeof path !== "string") {
      throw new TypeError(
        `Cannot open a GGUF file: path is ${typeof path}, expected a string`,
      );
    }
    const file = await openFile(path);
    try {
      const { size } = await file.stat();
      const reader = new HeaderReader(file, { path, size, limit: MAX_HEADER });
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
    const turn = this.#turn.then(() => this.#read(offset, into));
    this.#turn = turn.catch(() => {});
    return turn;
  }

  /** Closes the file; a second call does nothing. */
  close(): void {
    const file = this.#file;
    if (!file) return;
    this.#file = null;
    dropped.unregister(this);
    file.close();
  }

  /** Closes the file at the end of a `using` block. */
  [Symbol.dispose](): void {
    this.close();
  }

  /** The read itself, when its turn has come. */
  async #read(offset: number, into: Uint8Array): Promise<void> {
    if (!Number.isSafeInteger(offset) || offset < 0) {
      throw new RangeError(
        `Cannot read ${this.path}: offset is ${offset}, expected a whole number of 0 or more`,
      );
    }
    this.#open().seekSync(offset, Deno.SeekMode.Start);
    let done = 0;
    while (done < into.length) {
      const read = await this.#open().read(into.subarray(done));
      if (!read) {
        throw new FormatError(
          this.path,
          `bytes ${offset} to ${offset + into.length}`,
          `Data cut short: the file ends at byte ${
            offset + done
          }, expected ${this.size} bytes as when it was opened`,
        );
      }
      done += read;
    }
  }

  /** The file, unless it is closed. */
  #open(): Deno.FsFile {
    if (this.#file) return this.#file;
    throw new Deno.errors.BadResource(
      `Cannot read ${this.path}: the file is closed`,
    );
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

/** Opens a regular file; a pipe would block and a folder has no bytes. */
async function openFile(path: string): Promise<Deno.FsFile> {
  try {
    const info = await Deno.stat(path);
    if (info.isDirectory) {
      throw new Deno.errors.IsADirectory("Path is a folder");
    }
    if (!info.isFile) {
      throw new FormatError(
        path,
        "file",
        "Path is a pipe or a device, expected a regular file",
      );
    }
    return await Deno.open(path, { read: true });
  } catch (cause) {
    throw named(path, cause);
  }
}

/** A system error again, its message naming the path and what to give. */
function named(path: string, cause: unknown): unknown {
  if (!(cause instanceof Error) || cause instanceof FormatError) return cause;
  const kind = "code" in cause && cause.code === "ENAMETOOLONG"
    ? Deno.errors.NotFound
    : Object.values(Deno.errors).find((kind) => cause.constructor === kind);
  if (!kind || kind === Deno.errors.NotCapable) return cause;
  const reason = cause.message.replace(/ \(os error \d+\).*/, "");
  return new kind(
    `Cannot open ${quote(path)}: ${reason}, expected a readable GGUF file`,
    { cause },
  );
}
