/** Tensors of the native library; the model's weights and activations. */

import type { Backend } from "./backend.ts";
import { GGML_TYPES } from "../formats/ggml_types.ts";
import { wkv_dtype } from "./symbols.ts";

/** Element types of tensors; quantised ones are GGUF blocks of 32 or 256 columns. */
export type Dtype =
  | "F32"
  | "F16"
  | "BF16"
  | "I32"
  | "Q8_0"
  | "Q4_0"
  | "Q4_1"
  | "Q5_0"
  | "Q5_1"
  | "Q2_K"
  | "Q3_K"
  | "Q4_K"
  | "Q5_K"
  | "Q6_K"
  | "IQ4_NL";

/** The types that a tensor can have. */
export const dtypes: readonly Dtype[] = [
  ...["F32", "F16", "BF16", "I32", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"],
  ...["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"],
] as Dtype[];

/** The library's number of a type. */
export function dtypeId(dtype: Dtype): number {
  return wkv_dtype[`WKV_${dtype}`];
}

/** Columns of a block of this type; 1 where numbers stand alone. */
export function blockColumns(dtype: Dtype): number {
  return GGML_TYPES[dtype].block;
}

/** Whether rows of this type are blocks of few-bit numbers. */
export function isQuantised(dtype: Dtype): boolean {
  return blockColumns(dtype) > 1;
}

/** A tensor `[rows, columns]` in the library's memory. */
export class Tensor implements Disposable {
  /** Its handle in the library. */
  readonly handle: number;
  /** Its element type. */
  readonly dtype: Dtype;
  /** Its rows. */
  readonly rows: number;
  /** Its columns. */
  readonly columns: number;
  readonly #backend: Backend;
  #closed = false;

  /**
   * Opens a tensor of zeros.
   *
   * @throws {WkvError} The shape is refused, or memory is short.
   */
  constructor(backend: Backend, dtype: Dtype, rows: number, columns: number) {
    this.#backend = backend;
    this.dtype = dtype;
    this.rows = rows;
    this.columns = columns;
    this.handle = backend.open((out) =>
      backend.call("wkv_tensor_open", dtypeId(dtype), rows, columns, out, 4)
    );
  }

  /** Opens a tensor that holds these numbers. */
  static from(
    backend: Backend,
    values: Float32Array<ArrayBuffer> | Int32Array<ArrayBuffer>,
    rows = 1,
  ): Tensor {
    const dtype = values instanceof Int32Array ? "I32" : "F32";
    using opened = new DisposableStack();
    const tensor = opened.use(
      new Tensor(backend, dtype, rows, values.length / rows),
    );
    tensor.write(values);
    opened.move();
    return tensor;
  }

  /** Bytes of one row as files hold it and {@linkcode Tensor.write} wants it. */
  get rowBytes(): number {
    const { block, bytes } = GGML_TYPES[this.dtype];
    return this.columns / block * bytes;
  }

  /** Copies rows in, in file order, from row `row` on. */
  write(data: ArrayBufferView<ArrayBuffer>, row = 0): void {
    const rows = data.byteLength / this.rowBytes;
    this.#backend.call(
      "wkv_tensor_write",
      this.handle,
      row,
      rows,
      data,
      data.byteLength,
    );
  }

  /** Copies rows out as floats, from row `row` on; F32 and quantised types. */
  floats(row = 0, rows: number = this.rows - row): Float32Array<ArrayBuffer> {
    const out = new Float32Array(rows * this.columns);
    this.#read(row, rows, out);
    return out;
  }

  /** Copies rows of an I32 tensor out. */
  integers(row = 0, rows: number = this.rows - row): Int32Array<ArrayBuffer> {
    const out = new Int32Array(rows * this.columns);
    this.#read(row, rows, out);
    return out;
  }

  /** Gives the memory back. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#backend.closeHandle(this.handle);
  }

  /** Same as {@linkcode Tensor.close}. */
  [Symbol.dispose](): void {
    this.close();
  }

  #read(row: number, rows: number, out: ArrayBufferView<ArrayBuffer>): void {
    this.#backend.call(
      "wkv_tensor_read",
      this.handle,
      row,
      rows,
      out,
      out.byteLength,
    );
  }
}
