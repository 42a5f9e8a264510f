/** Random matrices of every type, made and read by the layout of their blocks. */

import type { Backend } from "../backend/backend.ts";
import { type Dtype, isQuantised, Tensor } from "../backend/tensor.ts";
import type { Random } from "./numbers.ts";
import { stored } from "./reference_policies.ts";

/** A matrix in the library and its numbers in f64, row by row. */
export interface Matrix extends Disposable {
  /** The tensor. */
  tensor: Tensor;
  /** Its rows. */
  rows: Float64Array[];
}

/**
 * A random matrix; its bytes are random too where the type is quantised. Rows
 * from `distinct` on repeat those before.
 */
export function matrix(
  backend: Backend,
  random: Random,
  dtype: Dtype,
  rows: number,
  columns: number,
  { subnormal = false, distinct = rows }: {
    subnormal?: boolean | undefined;
    distinct?: number | undefined;
  } = {},
): Matrix {
  const tensor = new Tensor(backend, dtype, rows, columns);
  const bytes = new Uint8Array(rows * tensor.rowBytes);
  const view = new DataView(bytes.buffer);
  const differ = Math.min(rows, distinct);
  const numbers = Array.from(
    { length: differ },
    () => new Float64Array(columns),
  );
  const scale = () =>
    subnormal
      ? (1 + random.integer(1023)) * 2 ** -24
      : stored(random.normal() / 64, "f16");
  if (isQuantised(dtype)) {
    const size = tensor.rowBytes / columns * 32;
    const end = differ * tensor.rowBytes;
    for (let at = 0, b = 0; at < end; at += size, b++) {
      for (let i = at; i < at + size; i++) bytes[i] = random.integer(256);
      view.setUint16(at, halfBits(scale()), true);
      if (dtype === "Q4_1") view.setUint16(at + 2, halfBits(scale() * 8), true);
      // The lowest byte and the largest nibbles somewhere in every block.
      bytes[at + size - 1] = dtype === "Q8_0" ? 0x80 : 0xf0;
      const row = Math.floor(b / (columns / 32));
      numbers[row]!.set(block(dtype, view, at), b % (columns / 32) * 32);
    }
  } else {
    numbers.forEach((row, r) =>
      row.forEach((_, c) => {
        const type = dtype.toLowerCase() as "f32" | "f16" | "bf16";
        const x = row[c] = stored(random.normal(), type);
        const at = r * tensor.rowBytes + c * tensor.rowBytes / columns;
        if (dtype === "F32") view.setFloat32(at, x, true);
        else if (dtype === "F16") view.setUint16(at, halfBits(x), true);
        else view.setUint16(at, bfloatBits(x), true);
      })
    );
  }
  for (let r = differ; r < rows; r++) {
    const from = r % differ * tensor.rowBytes;
    bytes.copyWithin(r * tensor.rowBytes, from, from + tensor.rowBytes);
    numbers.push(numbers[r % differ]!);
  }
  tensor.write(bytes);
  return { tensor, rows: numbers, [Symbol.dispose]: () => tensor.close() };
}

/** The 32 numbers of a GGUF block. */
function block(dtype: Dtype, view: DataView, at: number): number[] {
  const scale = half(view.getUint16(at, true));
  if (dtype === "Q8_0") {
    return Array.from(
      { length: 32 },
      (_, i) => scale * view.getInt8(at + 2 + i),
    );
  }
  const first = dtype === "Q4_1" ? at + 4 : at + 2;
  const nibble = (i: number) =>
    i < 16 ? view.getUint8(first + i) & 15 : view.getUint8(first + i - 16) >> 4;
  const least = dtype === "Q4_1"
    ? half(view.getUint16(at + 2, true))
    : -8 * scale;
  return Array.from({ length: 32 }, (_, i) => scale * nibble(i) + least);
}

function half(bits: number): number {
  const exponent = bits >> 10 & 31, digits = bits & 1023;
  const size = exponent === 0
    ? digits * 2 ** -24
    : (1024 + digits) * 2 ** (exponent - 25);
  return bits >> 15 ? -size : size;
}

function halfBits(x: number): number {
  const sign = x < 0 || Object.is(x, -0) ? 0x8000 : 0;
  const size = Math.abs(x);
  if (size < 2 ** -14) return sign | size * 2 ** 24;
  const exponent = Math.floor(Math.log2(size));
  return sign | (exponent + 15) << 10 | (size / 2 ** exponent - 1) * 1024;
}

function bfloatBits(x: number): number {
  return new Uint32Array(Float32Array.of(x).buffer)[0]! >>> 16;
}
