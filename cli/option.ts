/** What an option of a command is, with one function for each kind of value; every command's table is made of these. */

/** One option: how it is written, explained and read. */
export interface Option<T> {
  /** One line of help. */
  readonly summary: string;
  /** What stands for its value in help; null for a flag. */
  readonly value: string | null;
  /** A letter that stands for its name. */
  readonly short?: string;
  /** Whether each occurrence counts, not the last alone. */
  readonly many?: boolean;
  /** Values to offer in help and completions. */
  readonly choices?: readonly string[];
  /** Whether completions offer files. */
  readonly file?: boolean;
  /**
   * Reads the values as typed, at least one; `name` is for messages.
   *
   * @throws {UsageError} One of them is not what is wanted.
   */
  readonly read: (texts: string[], name: string) => T;
}

/** A command's options by name. */
// deno-lint-ignore no-explicit-any -- each has a type of its own
export type Options = Readonly<Record<string, Option<any>>>;

/** What was given on the command line; what was not is absent. */
export type Values<O extends Options> = {
  readonly [K in keyof O]?: O[K] extends Option<infer T> ? T : never;
};

/** A command line that says something wrong: exit 2. */
export class UsageError extends RangeError {
  /** Its name in messages. */
  override readonly name = "UsageError";
}

/** An option without a value. */
export function flag(summary: string, short?: string): Option<boolean> {
  return {
    summary,
    value: null,
    ...(short ? { short } : {}),
    read: () => true,
  };
}

/** Any text but the empty one. */
export function text(
  value: string,
  summary: string,
  more: Pick<Option<string>, "short" | "file" | "choices"> = {},
): Option<string> {
  return { summary, value, ...more, read: (texts) => texts.at(-1)! };
}

/** A text that may be given more than once. */
export function texts(value: string, summary: string): Option<string[]> {
  return { summary, value, many: true, read: (texts) => texts };
}

/** One of a few words. */
export function choice<const T extends string>(
  choices: readonly T[],
  summary: string,
): Option<T> {
  return {
    summary,
    value: choices.join("|"),
    choices,
    read(texts, name) {
      const found = choices.find((choice) => choice === texts.at(-1));
      if (found !== undefined) return found;
      throw wrong(name, `one of ${choices.join(", ")}`, texts.at(-1)!);
    },
  };
}

/** A whole number, digits alone. */
export function whole(
  least: number,
  summary: string,
  most: number = Number.MAX_SAFE_INTEGER,
): Option<number> {
  return {
    summary,
    value: "N",
    read: (texts, name) => readWhole(texts.at(-1)!, name, least, most),
  };
}

/** Whole numbers separated by commas. */
export function wholes(
  least: number,
  summary: string,
  most: number = Number.MAX_SAFE_INTEGER,
): Option<number[]> {
  return {
    summary,
    value: "N[,N...]",
    read: (texts, name) =>
      texts.at(-1)!.split(",").map((text) =>
        readWhole(text, name, least, most)
      ),
  };
}

/** Sizes of a cache separated by commas; plain ones become numbers. */
export function sizes(
  summary: string,
  check: (text: string) => void,
  most: number,
): Option<(number | string)[]> {
  const one = whole(1, summary, most);
  return {
    summary,
    value: "N|N%|BYTES[,...]",
    read: (texts, name) =>
      texts.at(-1)!.split(",").map((typed) => {
        if (/^\d*$/.test(typed)) return one.read([typed], name);
        try {
          check(typed);
        } catch (cause) {
          throw new UsageError(`--${name}: ${(cause as Error).message}`, {
            cause,
          });
        }
        return typed;
      }),
  };
}

/** Decimal numbers separated by commas. */
export function decimals(
  least: number,
  most: number,
  summary: string,
): Option<number[]> {
  const one = decimal(least, most, summary);
  return {
    summary,
    value: "X[,X...]",
    read: (texts, name) =>
      texts.at(-1)!.split(",").map((text) => one.read([text], name)),
  };
}

/** Words separated by commas. */
export function words(
  value: string,
  summary: string,
  choices: readonly string[],
): Option<string[]> {
  return {
    summary,
    value,
    choices,
    read(texts, name) {
      const words = texts.at(-1)!.split(",");
      if (!words.includes("")) return words;
      throw wrong(name, "names separated by commas", texts.at(-1)!);
    },
  };
}

/** A finite decimal number; `above` leaves the lower limit itself out. */
export function decimal(
  least: number,
  most: number,
  summary: string,
  above = false,
): Option<number> {
  return {
    summary,
    value: "X",
    read(texts, name) {
      const typed = texts.at(-1)!;
      const value = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(typed)
        ? Number(typed)
        : NaN;
      if (value >= least && value <= most && !(above && value === least)) {
        return value;
      }
      const range = above
        ? `above ${least} and at most ${most}`
        : `between ${least} and ${most}`;
      throw wrong(name, `a number ${range}`, typed);
    },
  };
}

function readWhole(
  typed: string,
  name: string,
  least: number,
  most: number,
): number {
  const value = /^\d+$/.test(typed) ? Number(typed) : NaN;
  if (value >= least && value <= most) return value;
  const range = most === Number.MAX_SAFE_INTEGER
    ? `of at least ${least}${value > most ? ` and below 2^53` : ""}`
    : `between ${least} and ${most}`;
  throw wrong(name, `a whole number ${range}`, typed);
}

function wrong(name: string, expected: string, found: string): UsageError {
  return new UsageError(
    `The value of --${name} must be ${expected}: current value is ${
      JSON.stringify(found)
    }`,
  );
}
