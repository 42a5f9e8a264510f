/** Reads the texts that commands take: files, standard input, and the prompt made of them. */

import { fstatSync } from "node:fs";
import { UsageError } from "./option.ts";
import type { Terminal } from "./terminal.ts";
import { formatBytes } from "./units.ts";

/** The most bytes of text that a command reads. */
const MOST_BYTES = 64 * 2 ** 20;
/** Milliseconds before a silent pipe is mentioned. */
const PATIENCE = 2000;

/** What stands in for standard input in tests. */
export interface Input {
  /** What it is: a person's, nothing that anyone would have piped, or a pipe. */
  readonly kind: "terminal" | "socket" | "pipe";
  /** Its bytes. */
  readonly readable: ReadableStream<Uint8Array>;
}

/** The process's own standard input. */
export function processInput(): Input {
  return {
    get kind() {
      if (Deno.stdin.isTerminal()) return "terminal";
      try {
        return fstatSync(0).isSocket() ? "socket" : "pipe";
      } catch {
        return "pipe";
      }
    },
    get readable() {
      return Deno.stdin.readable;
    },
  };
}

/**
 * A file's text, exactly as it is; `-` is standard input.
 *
 * @throws {SyntaxError} It is not UTF-8.
 */
export async function readTextFile(
  path: string,
  input: Input,
  signal?: AbortSignal,
): Promise<string> {
  if (path === "-") {
    return await readAll(input.readable, "standard input", signal);
  }
  using file = await Deno.open(path).catch((cause) => {
    if (!(cause instanceof Deno.errors.NotFound)) throw cause;
    throw new Deno.errors.NotFound(`${path}: There is no such file`, { cause });
  });
  const { isDirectory } = await file.stat();
  if (isDirectory) {
    throw new Deno.errors.IsADirectory(
      `${path}: This is a folder, a text file is wanted`,
    );
  }
  return await readAll(file.readable, path, signal);
}

/**
 * The prompt: what a pipe or a file holds, then the argument on a line of its
 * own.
 *
 * @throws {UsageError} There is none.
 */
export async function readPrompt(
  argument: string | undefined,
  file: string | undefined,
  input: Input,
  options: { terminal?: Terminal; signal?: AbortSignal } = {},
): Promise<string> {
  const parts: string[] = [];
  const dash = argument === "-";
  if (file !== undefined) {
    parts.push(await readTextFile(file, input, options.signal));
  } else if (dash || piped(input, argument)) {
    const waiting = setTimeout(() => {
      options.terminal?.err.writeNow(
        "Waiting for the end of standard input (no pipe is meant? add </dev/null)\n",
      );
    }, dash ? 2 ** 30 : PATIENCE);
    try {
      parts.push(await readTextFile("-", input, options.signal));
    } finally {
      clearTimeout(waiting);
    }
  }
  if (argument !== undefined && !dash) parts.push(argument);
  const prompt = parts.filter((part) => part !== "").reduce(
    (all, part) =>
      all === "" || all.endsWith("\n") ? all + part : `${all}\n${part}`,
    "",
  );
  if (prompt !== "") return prompt;
  throw new UsageError(
    "The prompt is empty: give it as an argument, with -f FILE, or through a pipe",
  );
}

/**
 * Whether standard input belongs to the prompt. Beside an argument a socket
 * does not: programs that start others leave one open that never ends.
 */
function piped({ kind }: Input, argument: string | undefined): boolean {
  return kind === "pipe" || (kind === "socket" && argument === undefined);
}

async function readAll(
  stream: ReadableStream<Uint8Array>,
  name: string,
  signal?: AbortSignal,
): Promise<string> {
  signal?.throwIfAborted();
  const reader = stream.getReader();
  const abort = (): void => void reader.cancel().catch(() => {});
  signal?.addEventListener("abort", abort, { once: true });
  const pieces: Uint8Array<ArrayBuffer>[] = [];
  let bytes = 0;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      signal?.throwIfAborted();
      if (done) break;
      bytes += value.length;
      if (bytes > MOST_BYTES) {
        throw new UsageError(
          `${name}: The text is longer than ${formatBytes(MOST_BYTES)}`,
        );
      }
      pieces.push(value.slice());
    }
  } finally {
    signal?.removeEventListener("abort", abort);
    await reader.cancel().catch(() => {});
  }
  return decode(new Uint8Array(await new Blob(pieces).arrayBuffer()), name);
}

function decode(bytes: Uint8Array<ArrayBuffer>, name: string): string {
  // A byte order mark is part of the text, as it is for the tokenizer.
  const options = { fatal: true, ignoreBOM: true };
  try {
    return new TextDecoder("utf-8", options).decode(bytes);
  } catch (cause) {
    // The longest good beginning, by halves; its last character may be cut.
    let text = "";
    for (let good = 0, bad = bytes.length; bad - good > 1;) {
      const middle = (good + bad) >> 1;
      try {
        text = new TextDecoder("utf-8", options).decode(
          bytes.subarray(0, middle),
          { stream: true },
        );
        good = middle;
      } catch {
        bad = middle;
      }
    }
    const at = new TextEncoder().encode(text).length;
    throw new SyntaxError(
      `${name}: byte ${at}: Found what is not UTF-8, expected a text file`,
      { cause },
    );
  }
}
