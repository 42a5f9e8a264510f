/** Writes safetensors files by hand, also ones that break the format; used by tests. */

/** A tensor of a written file. */
export interface WrittenTensor {
  /** Its type as the file names it. */
  dtype: string;
  /** Its dimensions. */
  shape: readonly number[];
  /** Its data. */
  data: Uint8Array;
}

/** A file from the text of its header and its data; `length` lies about the header's. */
export function rawSafetensors(
  header: string | Uint8Array,
  data: Uint8Array = new Uint8Array(),
  length?: bigint,
): Uint8Array<ArrayBuffer> {
  const text = typeof header === "string"
    ? new TextEncoder().encode(header)
    : header;
  const bytes = new Uint8Array(8 + text.length + data.length);
  new DataView(bytes.buffer).setBigUint64(
    0,
    length ?? BigInt(text.length),
    true,
  );
  bytes.set(text, 8);
  bytes.set(data, 8 + text.length);
  return bytes;
}

/** A well-formed file. */
export function safetensors(
  tensors: Readonly<Record<string, WrittenTensor>>,
): Uint8Array<ArrayBuffer> {
  let end = 0;
  const rows = Object.entries(tensors).map(([name, { dtype, shape, data }]) => {
    const begin = end;
    end += data.length;
    return [name, { dtype, shape, data_offsets: [begin, end] }] as const;
  });
  const data = new Uint8Array(end);
  Object.values(tensors).forEach((tensor, i) =>
    data.set(tensor.data, rows[i]![1].data_offsets[0])
  );
  return rawSafetensors(JSON.stringify(Object.fromEntries(rows)), data);
}
