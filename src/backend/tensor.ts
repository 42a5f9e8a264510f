/** Tensors of the native library; the model's weights and activations. */

import type { Backend } from "./backend.ts";
import { wkv_dtype } from "./symbols.ts";

/** Element types of tensors; quantised ones are GGUF blocks of 32 columns. */
export type Dtype = "F32" | "F16" | "BF16" | "I32" | "Q8_0" | "Q4_0" | "Q4_1";

/** The library's number of each type, and its bytes for 32 columns. */
const layouts: Record<Dtype, { id: number; bytes: number }> = {
  F32: { id: wkv_dtype.WKV_F32, bytes: 128 },
  F16: { id: wkv_dtype.WKV_F16, bytes: 64 },
  BF16: { id: wkv_dtype.WKV_BF16, bytes: 64 },
  I32: { id: wkv_dtype.WKV_I32, bytes: 128 },
  Q8_0: { id: wkv_dtype.WKV_Q8_0, bytes: 34 },
  Q4_0: { id: wkv_dtype.WKV_Q4_0, bytes: 18 },
  Q4_1: { id: wkv_dtype.WKV_Q4_1, bytes: 20 },
};

/** The types that a tensor can have. */
export const dtypes = Object.keys(layouts) as Dtype[];

/** The library's number of a type. */
export function dtypeId(dtype: Dtype): number {
  return layouts[dtype].id;
}

/** Whether rows of this type are blocks of few-bit numbers. */
export function isQuantised(dtype: Dtype): boolean {
  return layouts[dtype].bytes < 64;
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
    const tensor = new Tensor(backend, dtype, rows, values.length / rows);
    tensor.write(values);
    return tensor;
  }

  /** Bytes of one row as files hold it and {@linkcode Tensor.write} wants it. */
  get rowBytes(): number {
    return this.columns / 32 * layouts[this.dtype].bytes;
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
