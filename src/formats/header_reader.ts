/** A forward reader of a file's header that holds one chunk at a time and never goes past the file's end; used by the GGUF parser. */

import { FormatError } from "./error.ts";

/** Bytes read at once. */
const CHUNK = 1 << 20;

/** The most bytes of a string that is first tried as ASCII. */
const SHORT = 16;

/** Where a {@linkcode HeaderReader} reads from. */
export interface HeaderSource {
  /** Fills the start of `into`; null at the end of the file. */
  read(into: Uint8Array): Promise<number | null>;
}

/** Reads little-endian values in file order; `fill` first, then the getters. */
export class HeaderReader {
  /** Path of the file, for messages. */
  readonly path: string;
  /** Bytes in the file when it was opened. */
  readonly size: number;
  /** The most bytes that this header may have. */
  readonly limit: number;
  /** The field being read, for messages. */
  field: string = "header";
  /** Index into the field when it is an array, otherwise -1. */
  index: number = -1;

  #source: HeaderSource;
  #bytes = new Uint8Array(CHUNK);
  #view = new DataView(this.#bytes.buffer);
  #next = 0;
  #end = 0;
  #position = 0;
  /** The byte order mark is kept: a vocabulary may hold it as a token. */
  #text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

  /**
   * Starts at the source's present position, taken as byte 0.
   *
   * @param source The open file.
   * @param options Its path and size, and the most bytes to read, all in bytes.
   */
  constructor(
    source: HeaderSource,
    options: { path: string; size: number; limit: number },
  ) {
    this.#source = source;
    this.path = options.path;
    this.size = options.size;
    this.limit = options.limit;
  }

  /** Offset of the next byte from the file's start. */
  get position(): number {
    return this.#position;
  }

  /** Bytes from here to the file's end. */
  get left(): number {
    return this.size - this.#position;
  }

  /** Bytes that the getters may take before the next fill. */
  get buffered(): number {
    return this.#end - this.#next;
  }

  /**
   * Makes the error of the field being read.
   *
   * @param message What was wrong and what would be right.
   * @param options The cause, if any.
   * @returns The error, to be thrown.
   */
  error(message: string, options?: ErrorOptions): FormatError {
    const field = this.index < 0 ? this.field : `${this.field}[${this.index}]`;
    return new FormatError(this.path, field, message, options);
  }

  /**
   * Checks that the file and the header's limit have room for more bytes,
   * before anything is allocated for them.
   *
   * @param count Bytes wanted from here on.
   * @throws {FormatError} When they go past either end.
   */
  require(count: number): void {
    if (count > this.left) {
      throw this.error(
        `Data cut short: expected ${count} bytes from byte ${this.#position}, the file ends at byte ${this.size}`,
      );
    }
    if (this.#position + count > this.limit) {
      throw this.error(
        `Header is larger than ${this.limit} bytes, expected a smaller one`,
      );
    }
  }

  /**
   * Reads until the getters may take `count` bytes.
   *
   * @param count Bytes wanted from here on.
   * @throws {FormatError} When the file ends before.
   */
  async fill(count: number): Promise<void> {
    if (this.buffered >= count) return;
    this.require(count);
    const rest = this.#bytes.subarray(this.#next, this.#end);
    if (count > this.#bytes.length) {
      const larger = new Uint8Array(count);
      larger.set(rest);
      this.#bytes = larger;
      this.#view = new DataView(larger.buffer);
    } else {
      this.#bytes.copyWithin(0, this.#next, this.#end);
    }
    this.#next = 0;
    this.#end = rest.length;
    while (this.#end < count) {
      const read = await this.#source.read(this.#bytes.subarray(this.#end));
      if (!read) {
        throw this.error(
          `Data cut short: the file had ${this.size} bytes when opened and now ends before them`,
        );
      }
      this.#end += read;
    }
  }

  /** Takes one unsigned byte. */
  u8(): number {
    return this.#view.getUint8(this.#take(1));
  }

  /** Takes one signed byte. */
  i8(): number {
    return this.#view.getInt8(this.#take(1));
  }

  /** Takes an unsigned 16-bit integer. */
  u16(): number {
    return this.#view.getUint16(this.#take(2), true);
  }

  /** Takes a signed 16-bit integer. */
  i16(): number {
    return this.#view.getInt16(this.#take(2), true);
  }

  /** Takes an unsigned 32-bit integer. */
  u32(): number {
    return this.#view.getUint32(this.#take(4), true);
  }

  /** Takes a signed 32-bit integer. */
  i32(): number {
    return this.#view.getInt32(this.#take(4), true);
  }

  /** Takes a 32-bit float. */
  f32(): number {
    return this.#view.getFloat32(this.#take(4), true);
  }

  /** Takes a 64-bit float. */
  f64(): number {
    return this.#view.getFloat64(this.#take(8), true);
  }

  /** Takes an unsigned 64-bit integer: a number below 2^53, else a bigint. */
  u64(): number | bigint {
    const at = this.#take(8);
    const high = this.#view.getUint32(at + 4, true);
    return high < 0x200000
      ? high * 0x100000000 + this.#view.getUint32(at, true)
      : this.#view.getBigUint64(at, true);
  }

  /** Takes a signed 64-bit integer: a number where it fits, else a bigint. */
  i64(): number | bigint {
    const value = this.#view.getBigInt64(this.#take(8), true);
    const number = Number(value);
    return Number.isSafeInteger(number) ? number : value;
  }

  /**
   * Takes UTF-8 text.
   *
   * @param length Its bytes.
   * @returns The text, with a byte order mark if there is one.
   * @throws {FormatError} When the bytes are not UTF-8.
   */
  text(length: number): string {
    const at = this.#take(length);
    if (length <= SHORT) {
      // Five times the decoder's speed, on text that most tokens are.
      const codes: number[] = [];
      let i = at;
      while (i < at + length && this.#bytes[i]! < 0x80) {
        codes.push(this.#bytes[i++]!);
      }
      if (i === at + length) return String.fromCharCode(...codes);
    }
    try {
      return this.#text.decode(this.#bytes.subarray(at, at + length));
    } catch (cause) {
      throw this.error(
        `Text at byte ${
          this.#position - length
        } is not valid UTF-8, expected UTF-8`,
        { cause },
      );
    }
  }

  /**
   * Copies bytes out, in several reads where needed.
   *
   * @param into Filled whole.
   * @throws {FormatError} When the file ends before.
   */
  async copy(into: Uint8Array): Promise<void> {
    this.require(into.length);
    let done = 0;
    while (done < into.length) {
      const wanted = into.length - done;
      await this.fill(Math.min(wanted, CHUNK));
      const part = Math.min(wanted, this.buffered);
      const at = this.#take(part);
      into.set(this.#bytes.subarray(at, at + part), done);
      done += part;
    }
  }

  /** Steps over `count` buffered bytes and returns where they begin. */
  #take(count: number): number {
    const at = this.#next;
    if (at + count > this.#end) {
      throw new RangeError(
        `Cannot take ${count} bytes: ${this.buffered} are buffered`,
      );
    }
    this.#next += count;
    this.#position += count;
    return at;
  }
}
