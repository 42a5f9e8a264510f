/** Standard input line by line, as a conversation is typed; read by chat.ts. */

import { UsageError } from "./option.ts";
import { formatBytes } from "./units.ts";

/** The most characters of a line, or of lines between triple quotes. */
const MOST_TEXT = 64 * 2 ** 20;
const QUOTES = '"""';

/** What was typed: a text to send, or a command with its argument. */
export type Entry =
  | { kind: "text"; text: string }
  | { kind: "command"; name: string; argument: string };

/** Reads entries: lines, or several between triple quotes. */
export class LineReader {
  readonly #reader: ReadableStreamDefaultReader<Uint8Array>;
  readonly #decoder = new TextDecoder("utf-8", { fatal: true });
  readonly #prompt: (text: string) => void;
  #held: string[] = [];
  #length = 0;
  #ended = false;
  #waiting = "";

  /** A reader that calls `prompt` with what to show before each line. */
  constructor(
    stream: ReadableStream<Uint8Array>,
    prompt: (text: string) => void,
  ) {
    this.#reader = stream.getReader();
    this.#prompt = prompt;
  }

  /** What stands before the line that is waited for; "" when none is. */
  get waiting(): string {
    return this.#waiting;
  }

  /**
   * The next entry, blank lines left out.
   *
   * @returns Null at the end of the input.
   * @throws {SyntaxError} The input is no UTF-8, or ends between quotes.
   * @throws {UsageError} A text is too long.
   */
  async next(): Promise<Entry | null> {
    for (;;) {
      const line = await this.#line(">>> ");
      if (line === null) return null;
      const text = line.trim();
      if (text.startsWith(QUOTES)) {
        return { kind: "text", text: await this.#quoted(text.slice(3)) };
      }
      if (text.startsWith("/")) {
        const [, name, argument] = /^\/(\S*)\s*([^]*)$/.exec(text)!;
        return { kind: "command", name: name!, argument: argument! };
      }
      if (text !== "") return { kind: "text", text: line };
    }
  }

  /** Ends the reading; a read that waits ends too. */
  async close(): Promise<void> {
    await this.#reader.cancel().catch(() => {});
  }

  async #quoted(first: string): Promise<string> {
    const lines: string[] = [];
    let length = 0;
    for (let line: string | null = first;;) {
      const end = line.trimEnd();
      if (end.endsWith(QUOTES)) {
        lines.push(end.slice(0, -3));
        // Quotes on lines of their own are no lines of the text.
        if (lines.length > 1 && lines.at(-1) === "") lines.pop();
        if (lines.length > 1 && lines[0] === "") lines.shift();
        return lines.join("\n");
      }
      lines.push(line);
      length += line.length;
      if (length > MOST_TEXT) throw tooLong();
      line = await this.#line("... ");
      if (line === null) {
        throw new SyntaxError(
          'standard input: Found the end, expected the """ that end the text',
        );
      }
    }
  }

  async #line(prompt: string): Promise<string | null> {
    this.#waiting = prompt;
    this.#prompt(prompt);
    try {
      return await this.#read();
    } finally {
      this.#waiting = "";
    }
  }

  async #read(): Promise<string | null> {
    for (;;) {
      const last = this.#held.at(-1) ?? "";
      const at = last.indexOf("\n");
      if (at >= 0) {
        const line = this.#held.slice(0, -1).join("") + last.slice(0, at);
        this.#hold(last.slice(at + 1));
        return line.replace(/\r$/, "");
      }
      if (this.#ended) {
        const line = this.#held.join("");
        this.#hold("");
        return line === "" ? null : line;
      }
      const { done, value } = await this.#reader.read();
      // A terminal goes on after Ctrl-D; a conversation does not.
      this.#ended = done;
      const text = this.#decode(value);
      this.#held.push(text);
      this.#length += text.length;
      if (this.#length > MOST_TEXT) throw tooLong();
    }
  }

  #hold(text: string): void {
    this.#held = text === "" ? [] : [text];
    this.#length = text.length;
  }

  #decode(bytes: Uint8Array | undefined): string {
    try {
      return this.#decoder.decode(bytes, { stream: bytes !== undefined });
    } catch (cause) {
      throw new SyntaxError(
        "standard input: Found what is not UTF-8, expected text",
        { cause },
      );
    }
  }
}

function tooLong(): UsageError {
  return new UsageError(
    `standard input: The text is longer than ${formatBytes(MOST_TEXT)}`,
  );
}
