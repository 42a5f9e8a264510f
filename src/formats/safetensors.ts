/** An open safetensors model, in one file or several, its headers checked; used by model loading. */

import { DataFile } from "./data_file.ts";
import { FormatError, quote } from "./error.ts";
import { HeaderReader } from "./header_reader.ts";
import {
  MAX_HEADER,
  readSafetensorsHeader,
  type StoredTensor,
} from "./safetensors_header.ts";
import { readIndex } from "./safetensors_index.ts";

/** One tensor, with the file that holds it. */
export interface SafetensorsTensor extends StoredTensor {
  /** The file. */
  readonly file: DataFile;
}

/**
 * A safetensors model: all headers are read and checked by
 * {@linkcode SafetensorsFile.open}; tensor data is read on demand.
 *
 * @example
 * ```ts ignore
 * using file = await SafetensorsFile.open("model.safetensors.index.json");
 * const tensor = file.tensor("model.norm.weight", [2048]);
 * const bytes = new Uint8Array(tensor.bytes);
 * await tensor.file.read(tensor.offset, bytes);
 * ```
 */
export class SafetensorsFile implements Disposable {
  /** Path of the file or of the index, as given to `open`. */
  readonly path: string;
  /** Number of its files. */
  readonly parts: number;
  /** Bytes of all files when they were opened. */
  readonly size: number;
  /** Tensors by name. */
  readonly tensors: ReadonlyMap<string, SafetensorsTensor>;

  #files: readonly DataFile[];

  private constructor(
    path: string,
    files: readonly DataFile[],
    tensors: ReadonlyMap<string, SafetensorsTensor>,
  ) {
    this.path = path;
    this.#files = files;
    this.parts = files.length;
    this.size = files.reduce((sum, { size }) => sum + size, 0);
    this.tensors = tensors;
  }

  /**
   * Opens a model and checks everything but the tensors' data.
   *
   * @param path A `.safetensors` file, or the `.index.json` of several.
   * @returns The open model, to be closed by its owner.
   * @throws {FormatError} When a file is not a whole safetensors file, or the
   * index and the files differ.
   * @throws {Deno.errors.NotFound} When there is none; likewise `IsADirectory`,
   * `PermissionDenied` and the rest, naming the path.
   */
  static async open(path: string): Promise<SafetensorsFile> {
    const files: DataFile[] = [];
    try {
      const tensors = typeof path === "string" && path.endsWith(".json")
        ? await openShards(path, files)
        : await openOne(path, files);
      return new SafetensorsFile(path, files, tensors);
    } catch (error) {
      for (const file of files) file.close();
      throw error;
    }
  }

  /**
   * A tensor.
   *
   * @param name The tensor's name.
   * @param shape The shape that it must have.
   * @returns The tensor.
   * @throws {FormatError} When it is absent or of another shape.
   */
  tensor(name: string, shape: readonly number[]): SafetensorsTensor {
    const field = `tensor ${quote(name)}`;
    const expected = `shape [${shape.join(", ")}]`;
    const tensor = this.tensors.get(name);
    if (!tensor) {
      throw new FormatError(
        this.path,
        field,
        `Missing from the model, expected ${expected}`,
      );
    }
    const same = shape.length === tensor.shape.length &&
      shape.every((length, i) => length === tensor.shape[i]);
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
}

/** Opens one file into `files`. */
async function openOne(
  path: string,
  files: DataFile[],
): Promise<Map<string, SafetensorsTensor>> {
  const file = await DataFile.open(path, "safetensors file");
  files.push(file);
  const reader = new HeaderReader(
    { read: (into) => file.next(into) },
    { path, size: file.size, limit: MAX_HEADER },
  );
  const { tensors } = await readSafetensorsHeader(reader);
  return new Map(
    [...tensors].map(([name, tensor]) => [name, { ...tensor, file }]),
  );
}

/** Opens every file that an index names. */
async function openShards(
  path: string,
  files: DataFile[],
): Promise<Map<string, SafetensorsTensor>> {
  const index = await readIndex(path);
  const folder = path.slice(0, path.lastIndexOf("/") + 1);
  const all = new Map<string, SafetensorsTensor>();
  for (const name of [...new Set(index.values())].sort()) {
    let shard: Map<string, SafetensorsTensor>;
    try {
      shard = await openOne(folder + name, files);
    } catch (cause) {
      if (!(cause instanceof Deno.errors.NotFound)) throw cause;
      throw new FormatError(
        path,
        "weight_map",
        `Names ${quote(name)}, which is missing, expected it beside the index`,
        { cause },
      );
    }
    for (const [tensor, row] of shard) {
      const other = all.get(tensor);
      if (other) {
        throw new FormatError(
          path,
          `tensor ${quote(tensor)}`,
          `Lies in ${quote(other.file.path)} and in ${
            quote(row.file.path)
          }, expected it once`,
        );
      }
      all.set(tensor, row);
    }
  }
  for (const [tensor, name] of index) {
    if (all.get(tensor)?.file.path === folder + name) continue;
    throw new FormatError(
      path,
      `weight_map ${quote(tensor)}`,
      `Names ${
        quote(name)
      }, which does not hold it, expected the file that does`,
    );
  }
  return all;
}
