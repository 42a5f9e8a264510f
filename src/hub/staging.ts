/**
 * How a file enters the models folder: staged under a lock, checked while it is
 * written, and renamed when it is whole.
 */

import { createHash } from "node:crypto";
import { statfs } from "node:fs/promises";
import type { Meter } from "./progress.ts";

/**
 * The models folder can't be written; its message names the folder and what
 * would help.
 */
export class UnwritableError extends Error {
  /** The class, for whoever prints the error. */
  override readonly name = "UnwritableError";
}

/** What is known beforehand about a file's content; null where nothing is. */
export interface Expected {
  /** Size in bytes. */
  readonly bytes: number | null;
  /** SHA-256 in lower-case hexadecimal. */
  readonly sha256: string | null;
  /** The name that git has for it, in lower-case hexadecimal. */
  readonly gitSha1?: string;
}

/** Milliseconds between two looks at a lock that another process holds. */
const LOCK_INTERVAL = 100;

/** Waits `ms` milliseconds; rejects with the signal's reason when it aborts. */
export function delay(ms: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) return reject(signal.reason);
    const onAbort = (): void => {
      clearTimeout(timer);
      reject(signal?.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", onAbort);
      resolve();
    }, ms);
    signal?.addEventListener("abort", onAbort, { once: true });
  });
}

/**
 * The text of anything thrown: `fetch` and streams also reject with strings.
 */
export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/**
 * Runs `work` with a fresh, empty folder beside the models, one caller at a
 * time for each `key`, and removes the folder whatever happens. The lock is the
 * kernel's and ends with its process, so what a killed pull left is known by
 * its free lock and is removed here too.
 *
 * @param models The models folder; created when absent.
 * @param key The final path of the file, relative to `models`.
 * @throws {UnwritableError} If nothing can be created in `models`.
 */
export async function withStaging<T>(
  models: string,
  key: string,
  options: { signal?: AbortSignal | undefined; onWait: () => void },
  work: (folder: string) => Promise<T>,
): Promise<T> {
  const root = `${models}/.staging`;
  const hash = createHash("sha256").update(key).digest("hex").slice(0, 16);
  const own = `${key.split("/").at(-1)?.slice(-80)}-${hash}`;
  using lock = await writable(models, async () => {
    await Deno.mkdir(root, { recursive: true });
    return await Deno.open(`${root}/${own}.lock`, {
      create: true,
      write: true,
    });
  });
  await takeLock(lock, options);
  await removeStale(root, own);
  // The random part keeps a pip that outlived its killed parent out of ours.
  const folder = `${root}/${own}/${crypto.randomUUID()}`;
  try {
    await writable(models, async () => {
      await remove(`${root}/${own}`);
      await Deno.mkdir(folder, { recursive: true });
    });
    return await work(folder);
  } finally {
    await remove(`${root}/${own}`).catch(() => {});
  }
}

/** Takes a file's lock, waiting for whoever has it. */
export async function takeLock(
  lock: Deno.FsFile,
  options: { signal?: AbortSignal | undefined; onWait: () => void },
): Promise<void> {
  for (let waited = false; !await lock.tryLock(true); waited = true) {
    if (!waited) options.onWait();
    await delay(LOCK_INTERVAL, options.signal);
  }
}

/** Size in bytes, or null when there is no such file. */
export async function fileSize(path: string): Promise<number | null> {
  try {
    const { isFile, size } = await Deno.stat(path);
    return isFile ? size : null;
  } catch (error) {
    if (
      error instanceof Deno.errors.NotFound ||
      error instanceof Deno.errors.NotADirectory
    ) return null;
    throw error;
  }
}

/** Removes every other staging folder whose lock is free. */
async function removeStale(root: string, own: string): Promise<void> {
  for await (const entry of Deno.readDir(root)) {
    if (!entry.isDirectory || entry.name === own) continue;
    try {
      using lock = await Deno.open(`${root}/${entry.name}.lock`, {
        create: true,
        write: true,
      });
      if (await lock.tryLock(true)) await remove(`${root}/${entry.name}`);
    } catch {
      // Someone else's leftovers must not stop this pull.
    }
  }
}

async function remove(path: string): Promise<void> {
  try {
    await Deno.remove(path, { recursive: true });
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

async function writable<T>(
  models: string,
  make: () => Promise<T>,
): Promise<T> {
  try {
    return await make();
  } catch (cause) {
    if (cause instanceof Deno.errors.NotCapable) throw cause;
    throw new UnwritableError(
      `The models folder ${models} can't be written (${
        messageOf(cause)
      }); make it writable, or set XDG_CACHE_HOME to a folder that is`,
      { cause },
    );
  }
}

/**
 * Checks that the disk of `folder` has `bytes` free. Without the permission to
 * ask (`--allow-sys=statfs`) it is left to the disk to say no.
 *
 * @throws {Error} If it has less.
 */
export async function checkSpace(folder: string, bytes: number): Promise<void> {
  const { state } = await Deno.permissions.query({
    name: "sys",
    kind: "statfs",
  });
  if (state !== "granted") return;
  const { bavail, bsize } = await statfs(folder);
  if (bavail * bsize >= bytes) return;
  throw new Error(
    `Not enough space on the disk of ${folder}: ${
      megabytes(bavail * bsize)
    } MB free, the pull needs ${
      megabytes(bytes)
    } MB; free some, or set XDG_CACHE_HOME to a folder on another disk`,
  );
}

function megabytes(bytes: number): number {
  return Math.ceil(bytes / 1e6);
}

/**
 * Writes a stream to the new file `path`, hashing it on the way, and syncs it
 * to the disk.
 *
 * @param label The file's name in messages.
 * @throws {Error} If the stream breaks off, the disk fails, or size or hash are
 * not as expected.
 */
export async function writeChecked(
  path: string,
  stream: ReadableStream<Uint8Array>,
  expected: Expected,
  options: { label: string; meter: Meter; signal?: AbortSignal | undefined },
): Promise<void> {
  const { label, meter, signal } = options;
  const hash = createHash("sha256");
  const reader = stream.getReader();
  let loaded = 0;
  try {
    using file = await Deno.open(path, { createNew: true, write: true });
    while (true) {
      signal?.throwIfAborted();
      const { done, value } = await reader.read();
      if (done) break;
      loaded += value.length;
      // A server or wheel with more to say is not let fill the disk.
      if (expected.bytes !== null && loaded > expected.bytes) {
        throw new Error(
          `The data does not end after the expected ${expected.bytes} bytes`,
        );
      }
      hash.update(value);
      for (let at = 0; at < value.length;) {
        at += await file.write(value.subarray(at));
      }
      meter.at(loaded);
    }
    if (expected.bytes !== null && loaded !== expected.bytes) {
      throw new Error(
        `The data ends after ${loaded} of ${expected.bytes} bytes`,
      );
    }
    const sha256 = hash.digest("hex");
    if (expected.sha256 !== null && sha256 !== expected.sha256) {
      throw new Error(
        `The sha256 is ${sha256}, it should be ${expected.sha256}`,
      );
    }
    await file.sync();
    meter.done(loaded);
  } catch (cause) {
    await reader.cancel().catch(() => {});
    signal?.throwIfAborted();
    if (cause instanceof Deno.errors.NotCapable) throw cause;
    throw new Error(
      `${label}: ${messageOf(cause)}; what had come was removed`,
      { cause },
    );
  }
}

/**
 * Renames a whole, synced file to its final path and syncs the folder, so that
 * a power cut leaves all of it or none.
 */
export async function moveIntoPlace(from: string, to: string): Promise<void> {
  const folder = to.slice(0, to.lastIndexOf("/"));
  try {
    await Deno.mkdir(folder, { recursive: true });
    await Deno.rename(from, to);
    using handle = await Deno.open(folder);
    await handle.sync();
  } catch (cause) {
    if (cause instanceof Deno.errors.NotCapable) throw cause;
    throw new Error(`${to}: Can't be put there (${messageOf(cause)})`, {
      cause,
    });
  }
}

/**
 * Reads the file at `path` and says how it differs from what is expected: null
 * when it does not.
 *
 * @throws {Deno.errors.NotFound} If there is none.
 */
export async function difference(
  path: string,
  expected: Expected,
  options: { meter: Meter; signal?: AbortSignal | undefined },
): Promise<string | null> {
  using file = await Deno.open(path);
  const { size } = await file.stat();
  if (expected.bytes !== null && size !== expected.bytes) {
    return `its size is ${size} bytes, it should be ${expected.bytes}`;
  }
  const { sha256, gitSha1 } = expected;
  if (sha256 === null && gitSha1 === undefined) return null;
  const kind = sha256 === null ? "sha1" : "sha256";
  const hash = createHash(kind);
  if (sha256 === null) hash.update(`blob ${size}\0`);
  const chunk = new Uint8Array(1 << 20);
  let loaded = 0;
  for (let n; (n = await file.read(chunk)) !== null;) {
    options.signal?.throwIfAborted();
    hash.update(chunk.subarray(0, n));
    options.meter.at(loaded += n);
  }
  const right = sha256 ?? gitSha1, found = hash.digest("hex");
  return found === right
    ? null
    : `its ${kind} is ${found}, it should be ${right}`;
}
