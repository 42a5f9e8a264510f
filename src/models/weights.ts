/** Streams a file's tensors into the library's memory, in pieces of about a megabyte; used by the architectures. */

import type { Backend } from "../backend/backend.ts";
import { type Dtype, dtypes, Tensor } from "../backend/tensor.ts";
import { WkvError } from "../backend/error.ts";
import { wkv_status } from "../backend/symbols.ts";
import { FormatError } from "../formats/error.ts";
import type { GgufFile } from "../formats/gguf.ts";
import type { SafetensorsFile } from "../formats/safetensors.ts";

const PIECE = 1 << 20;

/** One tensor of a file, whatever the file's format. */
export interface StoredWeight {
  /** Path of the file, and the tensor's name in it, for messages. */
  path: string;
  /** Its name in the file. */
  name: string;
  /** Its type, as the file names it. */
  type: string;
  /** Length of its data in bytes. */
  bytes: number;
  /** Fills `into` with data from byte `at` of the tensor on. */
  read(at: number, into: Uint8Array): Promise<void>;
}

/** A file with weights, under the names that GGUF files have for them. */
export interface WeightFile {
  /** Whether there is a tensor of this name. */
  has(name: string): boolean;
  /**
   * A tensor.
   *
   * @param shape Its dimensions, the row length last.
   * @throws {FormatError} It is missing, or of another shape.
   */
  find(name: string, shape: readonly number[]): StoredWeight;
}

/** The weights of a GGUF file. */
export function ggufWeights(file: GgufFile): WeightFile {
  return {
    has: (name) => file.tensors.has(name),
    find: (name, shape) => {
      const found = file.tensor(name, shape.toReversed());
      const { type, bytes, offset, file: { path } } = found;
      const read = (at: number, into: Uint8Array) =>
        found.file.read(offset + at, into);
      return { path, name, type, bytes, read };
    },
  };
}

/**
 * The weights of a safetensors model.
 *
 * @param names What the model calls each tensor of a block, and those outside,
 * by GGUF's name without `blk.N.` and `.weight`.
 */
export function safetensorsWeights(
  file: SafetensorsFile,
  names: Readonly<Record<string, string>>,
): WeightFile {
  const rename = (name: string): string => {
    const [, block, inner, kind] = /^(?:blk\.(\d+)\.)?(.+)\.(weight|bias)$/
      .exec(
        name,
      )!;
    const own = Object.hasOwn(names, inner!) ? names[inner!] : inner;
    return `${
      block === undefined ? "" : `model.layers.${block}.`
    }${own}.${kind}`;
  };
  return {
    has: (name) => file.tensors.has(rename(name)),
    find: (canonical, shape) => {
      const found = file.tensor(rename(canonical), shape);
      const { name, type, bytes, offset, file: { path } } = found;
      const read = (at: number, into: Uint8Array) =>
        found.file.read(offset + at, into);
      return { path, name, type, bytes, read };
    },
  };
}

/** Rows of a matrix: all of them, or `rows` of its `of` rows from `from` on. */
export type Part = readonly [
  name: string,
  rows: number,
  slice?: { from: number; of: number },
];

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
    parts: readonly Part[],
    columns: number,
  ): Promise<Tensor[]>;
  /** One tensor `[rows, columns]`. */
  matrix(name: string, rows: number, columns: number): Promise<Tensor>;
  /** The numbers of a vector. */
  floats(name: string, columns: number): Promise<Float32Array<ArrayBuffer>>;
}

/** Loads tensors of one file, keeping count of them. */
export class WeightLoader implements WeightSource {
  readonly #backend: Backend;
  readonly #file: WeightFile;
  readonly #onBytes: (bytes: number) => void;
  readonly #signal: AbortSignal | undefined;
  readonly #buffer = new Uint8Array(PIECE);
  /** Bytes that were loaded. */
  bytes = 0;

  /** A loader that reports each piece's bytes. */
  constructor(
    backend: Backend,
    file: WeightFile,
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
    return this.#file.has(name);
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
    parts: readonly Part[],
    columns: number,
  ): Promise<Tensor[]> {
    const groups = groupsOf(this.#file, parts, columns);
    const tensors: Tensor[] = [];
    for (const group of groups) {
      const rows = group.reduce((sum, part) => sum + part.rows, 0);
      const out = new Tensor(this.#backend, group[0]!.dtype, rows, columns);
      tensors.push(out);
      let row = 0;
      for (const part of group) {
        await this.#copy(part, out, row);
        row += part.rows;
      }
    }
    return tensors;
  }

  /** One tensor `[rows, columns]`. */
  async matrix(name: string, rows: number, columns: number): Promise<Tensor> {
    return (await this.matrices([[name, rows]], columns))[0]!;
  }

  /** The numbers of a vector, whatever float type the file has. */
  async floats(
    name: string,
    columns: number,
  ): Promise<Float32Array<ArrayBuffer>> {
    const tensor = findVector(this.#file, name, columns);
    const bytes = new Uint8Array(tensor.bytes);
    await tensor.read(0, bytes);
    this.#count(tensor.bytes);
    switch (tensor.type) {
      case "F16":
        return Float32Array.from(new Float16Array(bytes.buffer));
      case "BF16":
        return new Float32Array(
          Uint32Array.from(new Uint16Array(bytes.buffer), (h) => h << 16)
            .buffer,
        );
      default:
        return new Float32Array(bytes.buffer);
    }
  }

  /** Copies rows of a tensor to `row` of `out` and on. */
  async #copy(
    { tensor, from, rows }: {
      tensor: StoredWeight;
      from: number;
      rows: number;
    },
    out: Tensor,
    row: number,
  ): Promise<void> {
    const { rowBytes } = out;
    const step = Math.max(1, Math.floor(PIECE / rowBytes));
    const buffer = rowBytes <= PIECE ? this.#buffer : new Uint8Array(rowBytes);
    for (let done = 0; done < rows; done += step) {
      this.#signal?.throwIfAborted();
      const n = Math.min(step, rows - done);
      const piece = buffer.subarray(0, n * rowBytes);
      await tensor.read((from + done) * rowBytes, piece);
      try {
        out.write(piece, row + done);
      } catch (error) {
        // Bad data is the file's fault, a lost device or no memory is not.
        if (
          !(error instanceof WkvError) || error.status !== wkv_status.WKV_DATA
        ) throw error;
        // The library names the row of what several tensors are put together in.
        const message = error.message.replace(
          /\bRow (\d+)/,
          (_, place) => `Row ${Number(place) - row + from}`,
        );
        throw new FormatError(tensor.path, tensor.name, message, {
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

/** Some rows of a tensor. */
export interface StoredRows {
  tensor: StoredWeight;
  from: number;
  rows: number;
  dtype: Dtype;
}

/**
 * Parts as one group where their types are the same, else one a part.
 *
 * @throws {FormatError} As {@linkcode WeightLoader.matrices}.
 */
export function groupsOf(
  file: WeightFile,
  parts: readonly Part[],
  columns: number,
): StoredRows[][] {
  const found = parts.map(([name, rows, slice]): StoredRows => {
    const tensor = file.find(name, [slice?.of ?? rows, columns]);
    return { tensor, rows, from: slice?.from ?? 0, dtype: dtypeOf(tensor) };
  });
  const first = found[0]!.dtype;
  return found.every(({ dtype }) => dtype === first)
    ? [found]
    : found.map((part) => [part]);
}

function dtypeOf(tensor: StoredWeight): Dtype {
  const found = dtypes.find((dtype) =>
    dtype === tensor.type && dtype !== "I32"
  );
  if (found !== undefined) return found;
  throw new FormatError(
    tensor.path,
    tensor.name,
    `the type ${tensor.type} has no kernel yet, expected one of ${
      dtypes.filter((dtype) => dtype !== "I32").join(", ")
    }`,
  );
}

/**
 * A vector of a float type.
 *
 * @throws {FormatError} It is missing, of another length or of another type.
 */
export function findVector(
  file: WeightFile,
  name: string,
  columns: number,
): StoredWeight {
  const tensor = file.find(name, [columns]);
  if (["F32", "F16", "BF16"].includes(tensor.type)) return tensor;
  throw new FormatError(
    tensor.path,
    tensor.name,
    `the type is ${tensor.type}, expected F32, F16 or BF16`,
  );
}
