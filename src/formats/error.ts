/** The error of a model file that breaks its format; thrown by every reader in this folder and by what checks the values they return. */

/**
 * A file whose bytes do not follow its format, or whose values make no sense.
 *
 * The message reads `<file>: <field>: <what was wrong>, <what would be right>`.
 */
export class FormatError extends SyntaxError {
  /** Path of the file, as the caller gave it. */
  readonly file: string;
  /** The part of the file at fault: a header field, a metadata key, a tensor. */
  readonly field: string;

  /**
   * Makes the error.
   *
   * @param file Path of the file, as the caller gave it.
   * @param field The part of the file at fault.
   * @param message What was wrong and what would be right.
   * @param options The cause, where another error led to this one.
   */
  constructor(
    file: string,
    field: string,
    message: string,
    options?: ErrorOptions,
  ) {
    super(`${file}: ${field}: ${message}`, options);
    this.name = "FormatError";
    this.file = file;
    this.field = field;
  }
}

/**
 * Text from a file, made fit for a message: in quotes, at most 80 characters,
 * with no character that a terminal would act on.
 *
 * @param text Any text.
 * @returns The text as it may be printed.
 */
export function quote(text: string): string {
  const short = text.length > 80 ? `${text.slice(0, 77)}...` : text;
  return JSON.stringify(short).replace(
    /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu,
    (character) =>
      `\\u${character.codePointAt(0)!.toString(16).padStart(4, "0")}`,
  );
}
