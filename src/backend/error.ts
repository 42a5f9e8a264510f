/** WkvError and the errors of finding a library; thrown by src/backend. */

const statusNames = [
  "ok",
  "invalid argument",
  "closed handle",
  "out of memory",
  "bad data",
  "device failure",
  "internal fault",
] as const;

/** A failure that the native library reported. */
export class WkvError extends Error {
  /** The function that failed, as in wkv.h. */
  readonly functionName: string;
  /** Its status, as in wkv.h. */
  readonly status: number;

  /** Makes the error of one call. */
  constructor(functionName: string, status: number, text: string) {
    super(
      `${functionName}: ${text} (${statusNames[status] ?? `status ${status}`})`,
    );
    this.name = "WkvError";
    this.functionName = functionName;
    this.status = status;
  }
}

/** No native library could be opened or built. */
export class LibraryError extends Error {
  /** What was tried, in order, each with why it did not serve. */
  readonly tried: readonly string[];

  /** Makes the error that lists all that was tried. */
  constructor(
    message: string,
    tried: readonly string[],
    options?: ErrorOptions,
  ) {
    super([message, ...tried.map((line) => `  - ${line}`)].join("\n"), options);
    this.name = "LibraryError";
    this.tried = tried;
  }
}
