/** Streams a file's tensors into the library's memory, in pieces of about a megabyte; used by the architectures. */

import type { Backend } from "../backend/backend.ts";
import { type Dtype, dtypes, Tensor } from "../backend/tensor.ts";
import { WkvError } from "../backend/error.ts";
import { FormatError } from "../formats/error.ts";
import type { GgufFile, GgufTensor } from "../formats/gguf.ts";

const PIECE = 1 << 20;

/** Where an architecture's weights come from: a file, or in benchmarks chance. */
export interface WeightSource {
  /** Bytes that were loaded. */
  readonly bytes: number;
  /** Whether there is a tensor of this name. */
  has(name: string): boolean;
  /**
   * One tensor made of the rows of some, in order, or one each where their
   * types differ; every part has `columns` columns.
   */
  matrices(
    parts: readonly [name: string, rows: number][],
    columns: number,
  ): Promise<Tensor[]>;
  /** One tensor `[rows, columns]`. */
  matrix(name: string, rows: number, columns: number): Promise<Tensor>;
  /** A vector as F32 `[1, columns]`. */
  vector(name: string, columns: number): Promise<Tensor>;
  /** The numbers of a vector. */
  floats(name: string, columns: number): Promise<Float32Array<ArrayBuffer>>;
}

/** Loads tensors of one file, keeping count of them. */
export class WeightLoader implements WeightSource {
  readonly #backend: Backend;
  readonly #file: GgufFile;
  readonly #onBytes: (bytes: number) => void;
  readonly #signal: AbortSignal | undefined;
  readonly #buffer = new Uint8Array(PIECE);
  /** Bytes that were loaded. */
  bytes = 0;

  /** A loader that reports each piece's bytes. */
  constructor(
    backend: Backend,
    file: GgufFile,
    onBytes: (bytes: number) => void,
    signal?: AbortSignal,
  ) {
    this.#backend = backend;
    this.#file = file;
    this.#onBytes = onBytes;
    this.#signal = signal;
  }

  /** Whether the file has a tensor of this name. */
  has(name: string): boolean {
    return this.#file.tensors.has(name);
  }

  /**
   * One tensor made of the rows of some, in order, when they are of one type.
   *
   * @param parts Names and rows; every part has `columns` columns.
   * @returns The tensor, or one a part when their types differ.
   * @throws {FormatError} A part is missing, of another shape or of a type that
   * no kernel takes.
   */
  async matrices(
    parts: readonly [name: string, rows: number][],
    columns: number,
  ): Promise<Tensor[]> {
    const found = parts.map(([name, rows]) => {
      const tensor = this.#file.tensor(name, [columns, rows]);
      return { tensor, rows, dtype: this.#dtype(tensor) };
    });
    const first = found[0]!.dtype;
    const groups = found.every(({ dtype }) => dtype === first)
      ? [found]
      : found.map((part) => [part]);
    const tensors: Tensor[] = [];
    for (const group of groups) {
      const rows = group.reduce((sum, part) => sum + part.rows, 0);
      const out = new Tensor(this.#backend, group[0]!.dtype, rows, columns);
      tensors.push(out);
      let row = 0;
      for (const part of group) {
        await this.#copy(part.tensor, out, row);
        row += part.rows;
      }
    }
    return tensors;
  }

  /** One tensor `[rows, columns]`. */
  async matrix(name: string, rows: number, columns: number): Promise<Tensor> {
    return (await this.matrices([[name, rows]], columns))[0]!;
  }

  /** A vector as F32 `[1, columns]`, whatever float type the file has. */
  async vector(name: string, columns: number): Promise<Tensor> {
    return Tensor.from(this.#backend, await this.floats(name, columns));
  }

  /** The numbers of a vector. */
  async floats(
    name: string,
    columns: number,
  ): Promise<Float32Array<ArrayBuffer>> {
    const tensor = this.#file.tensor(name, [columns]);
    const bytes = new Uint8Array(tensor.bytes);
    await this.#file.read(tensor.offset, bytes);
    this.#count(tensor.bytes);
    switch (tensor.type) {
      case "F32":
        return new Float32Array(bytes.buffer);
      case "F16":
        return Float32Array.from(new Float16Array(bytes.buffer));
      case "BF16":
        return new Float32Array(
          Uint32Array.from(new Uint16Array(bytes.buffer), (h) => h << 16)
            .buffer,
        );
      default:
        throw new FormatError(
          this.#file.path,
          name,
          `the type is ${tensor.type}, expected F32, F16 or BF16`,
        );
    }
  }

  #dtype(tensor: GgufTensor): Dtype {
    const found = dtypes.find((dtype) =>
      dtype === tensor.type && dtype !== "I32"
    );
    if (found !== undefined) return found;
    throw new FormatError(
      this.#file.path,
      tensor.name,
      `the type ${tensor.type} has no kernel yet, expected one of ${
        dtypes.filter((dtype) => dtype !== "I32").join(", ")
      }`,
    );
  }

  async #copy(tensor: GgufTensor, out: Tensor, row: number): Promise<void> {
    const { rowBytes } = out;
    const rows = tensor.bytes / rowBytes;
    const step = Math.max(1, Math.floor(PIECE / rowBytes));
    const buffer = rowBytes <= PIECE ? this.#buffer : new Uint8Array(rowBytes);
    for (let done = 0; done < rows; done += step) {
      this.#signal?.throwIfAborted();
      const n = Math.min(step, rows - done);
      const piece = buffer.subarray(0, n * rowBytes);
      await this.#file.read(tensor.offset + done * rowBytes, piece);
      try {
        out.write(piece, row + done);
      } catch (error) {
        if (!(error instanceof WkvError)) throw error;
        throw new FormatError(this.#file.path, tensor.name, error.message, {
          cause: error,
        });
      }
      this.#count(piece.length);
    }
  }

  #count(bytes: number): void {
    this.bytes += bytes;
    this.#onBytes(bytes);
  }
}
