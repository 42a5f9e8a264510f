/** The tensor table of a GGUF header, every size and offset checked against the file; read by the header parser. */

import { quote } from "./error.ts";
import {
  GGML_TYPES,
  type GgmlType,
  ggmlType,
  removedGgmlType,
} from "./ggml_types.ts";
import { readName } from "./gguf_text.ts";
import type { HeaderReader } from "./header_reader.ts";

/** One row of the tensor table. */
export interface GgufTensor {
  /** Its name, unique in the file. */
  readonly name: string;
  /** How its values are stored. */
  readonly type: GgmlType;
  /** 1 to 4 dimensions in ggml's order: `shape[0]` is the row length. */
  readonly shape: readonly number[];
  /** Where its data begins, in bytes from the file's start. */
  readonly offset: number;
  /** Length of its data in bytes. */
  readonly bytes: number;
}

/** The most bytes of a tensor's name, ggml's GGML_MAX_NAME less its NUL. */
const MAX_NAME = 63;

/** A row of the table whose offset still counts from the first data byte. */
interface RawTensor {
  name: string;
  type: GgmlType;
  shape: number[];
  offset: number;
  bytes: number;
}

/**
 * Reads the tensor table and checks that all data lies in the file.
 *
 * @param reader At the first tensor.
 * @param count Number of tensors.
 * @param alignment Of the data, in bytes.
 * @returns The tensors in file order.
 * @throws {FormatError} When anything in the table is wrong.
 */
export async function readTensors(
  reader: HeaderReader,
  count: number,
  alignment: number,
): Promise<Map<string, GgufTensor>> {
  const rows = new Map<string, RawTensor>();
  let next = 0;
  for (let i = 0; i < count; i++) {
    const row = await readTensor(reader, i, rows, next);
    rows.set(row.name, row);
    next = padded(next + row.bytes, alignment);
  }
  const start = padded(reader.position, alignment);
  const tensors = new Map<string, GgufTensor>();
  for (const row of rows.values()) {
    const offset = start + row.offset;
    if (offset + row.bytes > reader.size) {
      reader.field = `tensor ${quote(row.name)} data`;
      throw reader.error(
        `Data cut short: ends at byte ${
          offset + row.bytes
        }, but the file at byte ${reader.size}`,
      );
    }
    tensors.set(row.name, { ...row, offset });
  }
  return tensors;
}

/** Rounds up; not with bit operations, which would cut at 2^31. */
function padded(bytes: number, alignment: number): number {
  return Math.ceil(bytes / alignment) * alignment;
}

/** Reads one row of the table, whose data must begin at `next`. */
async function readTensor(
  reader: HeaderReader,
  index: number,
  seen: ReadonlyMap<string, unknown>,
  next: number,
): Promise<RawTensor> {
  reader.field = `tensor ${index} name`;
  const name = await readName(reader, MAX_NAME, seen);
  const field = `tensor ${quote(name)}`;

  reader.field = `${field} dimensions`;
  await reader.fill(4);
  const rank = reader.u32();
  if (rank < 1 || rank > 4) {
    throw reader.error(`Found ${rank} dimensions, expected 1 to 4`);
  }
  await reader.fill(8 * rank + 4 + 8);
  const shape = readShape(reader, rank);

  reader.field = `${field} type`;
  const id = reader.u32();
  const type = ggmlType(id);
  if (type === undefined) {
    const removed = removedGgmlType(id);
    throw reader.error(
      removed === undefined
        ? `Type is ${id}, expected one that ggml knows, 0 to 42`
        : `Type is ${id} (${removed}), which ggml removed; expected a current one, convert the model again`,
    );
  }
  const { block, bytes: blockBytes } = GGML_TYPES[type];
  const row = shape[0]!;
  if (row % block !== 0) {
    reader.field = `${field} dimensions`;
    throw reader.error(
      `Row length is ${row}, expected a multiple of ${block} for type ${type}`,
    );
  }
  // Above 2^53 this is rounded, and still above any file's size.
  const bytes = shape.reduce((product, n) => product * n, 1) / block *
    blockBytes;

  reader.field = `${field} offset`;
  const offset = reader.u64();
  if (offset !== next) {
    throw reader.error(
      `Offset is ${offset}, expected ${next}, where the tensor before ends`,
    );
  }
  if (next + bytes > reader.left) {
    reader.field = `${field} data`;
    throw reader.error(
      `Data cut short: needs ${bytes} bytes at offset ${next}, but ${reader.left} are left in the file`,
    );
  }
  return { name, type, shape, offset: next, bytes };
}

/** Takes the dimensions, whose product stays below 2^53 even without zeros. */
function readShape(reader: HeaderReader, rank: number): number[] {
  const shape: number[] = [];
  let product = 1;
  for (let i = 0; i < rank; i++) {
    const length = reader.u64();
    if (typeof length === "bigint") {
      throw reader.error(
        length >= 1n << 63n
          ? `Dimension ${i} is ${BigInt.asIntN(64, length)}, expected 0 or more`
          : `Dimension ${i} is ${length}, expected below 2^53`,
      );
    }
    product *= Math.max(1, length);
    if (!Number.isSafeInteger(product)) {
      throw reader.error(
        `Product of dimensions 0 to ${i} is ${product}, expected below 2^53`,
      );
    }
    shape.push(length);
  }
  return shape;
}
