/** Random matrices of every type, made and read by the layout of their blocks. */

import type { Backend } from "../backend/backend.ts";
import { type Dtype, isQuantised, Tensor } from "../backend/tensor.ts";
import { GGML_TYPES } from "../formats/ggml_types.ts";
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
    const { block: wide, bytes: size } = GGML_TYPES[dtype];
    const end = differ * tensor.rowBytes;
    for (let at = 0, b = 0; at < end; at += size, b++) {
      for (let i = at; i < at + size; i++) bytes[i] = random.integer(256);
      // The lowest byte and the largest nibbles somewhere in every block.
      const extreme = dtype === "Q6_K" || dtype === "Q3_K" ? at : at + size - 1;
      bytes[extreme] = dtype === "Q8_0" ? 0x80 : 0xf0;
      const [scaleAt, leastAt] = halvesOf[dtype]!;
      // Sub-scales of K types are numbers of up to 63.
      const by = wide === 256 ? 1 / 16 : 1;
      view.setUint16(at + scaleAt, halfBits(scale() * by), true);
      if (leastAt !== undefined) {
        view.setUint16(at + leastAt, halfBits(scale() * 8 * by), true);
      }
      const row = Math.floor(b / (columns / wide));
      numbers[row]!.set(
        blockNumbers(dtype, view, at),
        b % (columns / wide) * wide,
      );
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

/** Where the f16 scale of a block lies, and its minimum where there is one. */
export const halvesOf: Partial<Record<Dtype, [scale: number, least?: number]>> =
  {
    Q8_0: [0],
    Q4_0: [0],
    Q4_1: [0, 2],
    Q5_0: [0],
    Q5_1: [0, 2],
    Q2_K: [80, 82],
    Q3_K: [108],
    Q4_K: [0, 2],
    Q5_K: [0, 2],
    Q6_K: [208],
    IQ4_NL: [0],
  };

/** What IQ4_NL's sixteen numbers stand for. */
const IQ4_VALUES = [
  ...[-127, -104, -83, -65, -49, -35, -22, -10],
  ...[1, 13, 25, 38, 53, 69, 89, 113],
];

/** The numbers of a GGUF block, as ggml-common.h and ggml-quants.c have them. */
export function blockNumbers(
  dtype: Dtype,
  view: DataView,
  at: number,
): number[] {
  const byte = (i: number) => view.getUint8(at + i);
  const signed = (i: number) => view.getInt8(at + i);
  const [scaleAt, leastAt] = halvesOf[dtype]!;
  const d = half(view.getUint16(at + scaleAt, true));
  const least = leastAt === undefined
    ? 0
    : half(view.getUint16(at + leastAt, true));
  const bits = (i: number, shift: number, width: number) =>
    byte(i) >> shift & (1 << width) - 1;
  const numbers = (count: number, number: (i: number) => number) =>
    Array.from({ length: count }, (_, i) => number(i));
  /** Nibble i of 32 that begin at byte `first`. */
  const nibble = (first: number, i: number) =>
    bits(first + i % 16, i < 16 ? 0 : 4, 4);
  /** Scale and minimum of piece p of Q4_K and Q5_K. */
  const subs = (p: number): [number, number] =>
    p < 4 ? [bits(4 + p, 0, 6), bits(8 + p, 0, 6)] : [
      bits(8 + p, 0, 4) + 16 * bits(p, 6, 2),
      bits(8 + p, 4, 4) + 16 * bits(4 + p, 6, 2),
    ];
  switch (dtype) {
    case "Q8_0":
      return numbers(32, (i) => d * signed(2 + i));
    case "Q4_0":
      return numbers(32, (i) => d * (nibble(2, i) - 8));
    case "Q4_1":
      return numbers(32, (i) => d * nibble(4, i) + least);
    case "IQ4_NL":
      return numbers(32, (i) => d * IQ4_VALUES[nibble(2, i)]!);
    case "Q5_0":
      return numbers(
        32,
        (i) => d * (nibble(6, i) + 16 * bits(2 + (i >> 3), i % 8, 1) - 16),
      );
    case "Q5_1":
      return numbers(
        32,
        (i) => d * (nibble(8, i) + 16 * bits(4 + (i >> 3), i % 8, 1)) + least,
      );
    case "Q2_K":
      return numbers(256, (i) => {
        const sub = i >> 4;
        const q = bits(16 + (i >> 7) * 32 + i % 32, (i >> 5) % 4 * 2, 2);
        return d * bits(sub, 0, 4) * q - least * bits(sub, 4, 4);
      });
    case "Q3_K":
      return numbers(256, (i) => {
        const sub = i >> 4;
        const scale = bits(96 + sub % 8, sub < 8 ? 0 : 4, 4) +
          16 * bits(104 + sub % 4, (sub >> 2) * 2, 2) - 32;
        const q = bits(32 + (i >> 7) * 32 + i % 32, (i >> 5) % 4 * 2, 2) +
          4 * bits(i % 32, i >> 5, 1);
        return d * scale * (q - 4);
      });
    case "Q4_K":
      return numbers(256, (i) => {
        const [scale, min] = subs(i >> 5);
        const q = bits(16 + (i >> 6) * 32 + i % 32, (i >> 5) % 2 * 4, 4);
        return d * scale * q - least * min;
      });
    case "Q5_K":
      return numbers(256, (i) => {
        const [scale, min] = subs(i >> 5);
        const q = bits(48 + (i >> 6) * 32 + i % 32, (i >> 5) % 2 * 4, 4) +
          16 * bits(16 + i % 32, i >> 5, 1);
        return d * scale * q - least * min;
      });
    default: // Q6_K
      return numbers(256, (i) => {
        const part = (i >> 5) % 4;
        const low = (i >> 7) * 64 + part % 2 * 32 + i % 32;
        const q = bits(low, part < 2 ? 0 : 4, 4) +
          16 * bits(128 + (i >> 7) * 32 + i % 32, part * 2, 2);
        return d * signed(192 + (i >> 4)) * (q - 32);
      });
  }
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
