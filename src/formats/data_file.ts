/** An open model file that is read at any offset; the GGUF and safetensors readers own one a file. */

import { FormatError, quote } from "./error.ts";

/** Closes files whose owner was dropped without `close()`. */
const dropped = new FinalizationRegistry<Deno.FsFile>((file) => {
  try {
    file.close();
  } catch {
    // Closed by other means: nothing is left to do.
  }
});

/** A regular file, open for reading. */
export class DataFile implements Disposable {
  /** Path of the file, as given to `open`. */
  readonly path: string;
  /** Bytes in the file when it was opened. */
  readonly size: number;

  #file: Deno.FsFile | null;
  /** The last read; each waits for the one before, as they share a position. */
  #turn: Promise<void> = Promise.resolve();

  private constructor(path: string, size: number, file: Deno.FsFile) {
    this.path = path;
    this.size = size;
    this.#file = file;
    dropped.register(this, file, this);
  }

  /**
   * Opens a regular file; a pipe would block and a folder has no bytes.
   *
   * @param path Path of the file.
   * @param kind What it should be, such as `GGUF file`, for messages.
   * @returns The open file, to be closed by its owner.
   * @throws {FormatError} When the path leads to a pipe or a device.
   * @throws {Deno.errors.NotFound} When there is no file; likewise
   * `IsADirectory`, `PermissionDenied` and the rest, naming the path.
   */
  static async open(path: string, kind: string): Promise<DataFile> {
    if (typeof path !== "string") {
      throw new TypeError(
        `Cannot open a ${kind}: path is ${typeof path}, expected a string`,
      );
    }
    try {
      const info = await Deno.stat(path);
      if (info.isDirectory) {
        throw new Deno.errors.IsADirectory("Path is a folder");
      }
      if (!info.isFile) {
        throw new FormatError(
          path,
          "file",
          "Path is a pipe or a device, expected a regular file",
        );
      }
      const file = await Deno.open(path, { read: true });
      try {
        return new DataFile(path, (await file.stat()).size, file);
      } catch (error) {
        file.close();
        throw error;
      }
    } catch (cause) {
      throw named(path, kind, cause);
    }
  }

  /** Fills the start of `into` with what follows the last read; null at the end of the file. */
  next(into: Uint8Array): Promise<number | null> {
    return this.#open().read(into);
  }

  /**
   * Reads bytes from anywhere.
   *
   * @param offset Where to begin, in bytes from the file's start.
   * @param into Filled whole.
   * @throws {FormatError} When the file ends before.
   * @throws {RangeError} When the offset is not a whole number, 0 or more.
   * @throws {Deno.errors.BadResource} When the file is closed.
   */
  read(offset: number, into: Uint8Array): Promise<void> {
    const turn = this.#turn.then(() => this.#read(offset, into));
    this.#turn = turn.catch(() => {});
    return turn;
  }

  /** Closes the file; a second call does nothing. */
  close(): void {
    const file = this.#file;
    if (!file) return;
    this.#file = null;
    dropped.unregister(this);
    file.close();
  }

  /** Closes the file at the end of a `using` block. */
  [Symbol.dispose](): void {
    this.close();
  }

  /** The read itself, when its turn has come. */
  async #read(offset: number, into: Uint8Array): Promise<void> {
    if (!Number.isSafeInteger(offset) || offset < 0) {
      throw new RangeError(
        `Cannot read ${this.path}: offset is ${offset}, expected a whole number of 0 or more`,
      );
    }
    this.#open().seekSync(offset, Deno.SeekMode.Start);
    let done = 0;
    while (done < into.length) {
      const read = await this.next(into.subarray(done));
      if (!read) {
        throw new FormatError(
          this.path,
          `bytes ${offset} to ${offset + into.length}`,
          `Data cut short: the file ends at byte ${
            offset + done
          }, expected ${this.size} bytes as when it was opened`,
        );
      }
      done += read;
    }
  }

  /** The file, unless it is closed. */
  #open(): Deno.FsFile {
    if (this.#file) return this.#file;
    throw new Deno.errors.BadResource(
      `Cannot read ${this.path}: the file is closed`,
    );
  }
}

/** A system error again, its message naming the path and what to give. */
function named(path: string, wanted: string, cause: unknown): unknown {
  if (!(cause instanceof Error) || cause instanceof FormatError) return cause;
  const kind = "code" in cause && cause.code === "ENAMETOOLONG"
    ? Deno.errors.NotFound
    : Object.values(Deno.errors).find((kind) => cause.constructor === kind);
  if (!kind || kind === Deno.errors.NotCapable) return cause;
  const reason = cause.message.replace(/ \(os error \d+\).*/, "");
  return new kind(
    `Cannot open ${quote(path)}: ${reason}, expected a readable ${wanted}`,
    { cause },
  );
}
