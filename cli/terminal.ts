/** Standard output and standard error as commands use them; tests bring their own. */

/** One of the two outputs. */
export interface Output {
  /** Whether a person is looking at it. */
  readonly isTerminal: boolean;
  /** Writes all of a text. */
  write(text: string): Promise<void>;
}

/** Both outputs. */
export interface Terminal {
  /** Results. */
  readonly out: Output;
  /** All else. */
  readonly err: Output & {
    /** Writes at once, for what must not wait: a bar, a note. */
    writeNow(text: string): void;
    /** Characters of a line. */
    readonly columns: number;
    /** Whether lines may be drawn over. */
    readonly bars: boolean;
  };
}

/** Standard output was closed by its reader, as `head` does: no error. */
export class ClosedOutput extends Error {
  /** Its name in messages. */
  override readonly name = "ClosedOutput";
}

const encoder = new TextEncoder();

/** The process's own outputs. */
export function processTerminal(): Terminal {
  const isTerminal = Deno.stderr.isTerminal();
  const writeNow = (text: string): void => {
    try {
      const bytes = encoder.encode(text);
      for (let at = 0; at < bytes.length;) {
        at += Deno.stderr.writeSync(bytes.subarray(at));
      }
    } catch {
      // Without standard error there is nowhere to say so.
    }
  };
  return {
    out: {
      isTerminal: Deno.stdout.isTerminal(),
      async write(text) {
        const bytes = encoder.encode(text);
        try {
          for (let at = 0; at < bytes.length;) {
            at += await Deno.stdout.write(bytes.subarray(at));
          }
        } catch (cause) {
          if (cause instanceof Deno.errors.BrokenPipe) {
            throw new ClosedOutput("Standard output is closed", { cause });
          }
          throw cause;
        }
      },
    },
    err: {
      isTerminal,
      bars: isTerminal && !Deno.noColor,
      get columns() {
        try {
          // A terminal without a size says 0.
          return Deno.consoleSize().columns || 80;
        } catch {
          return 80;
        }
      },
      writeNow,
      write(text) {
        writeNow(text);
        return Promise.resolve();
      },
    },
  };
}
