/**
 * What a long load tells its caller: the event, and the meter that the parts of
 * this folder report through.
 */

/** One of the files of a pull. */
export interface ProgressFile {
  /** Its path in the repository. */
  name: string;
  /** Which of the files it is, from 1. */
  index: number;
  /** How many there are. */
  count: number;
  /** How much of it is done, in bytes. */
  loaded: number;
  /** What `loaded` ends at; null when that is not known. */
  total: number | null;
}

/** One report of a running pull, build or load. */
export interface Progress {
  /** What is going on. */
  stage: "download" | "unpack" | "verify" | "build" | "load";
  /** How much is done, in bytes; within one stage it never goes back. */
  loaded: number;
  /** What `loaded` ends at, in bytes; null when that is not known. */
  total: number | null;
  /** What is being worked on, such as a file's name. */
  label: string;
  /** A sentence worth keeping on the screen, present only when there is one. */
  note?: string;
  /**
   * Of a pull of several files the one that is worked on; `loaded` and `total`
   * are those of all files together.
   */
  file?: ProgressFile;
}

/** One of several files, as a meter counts it. */
export interface MeteredFile
  extends Pick<ProgressFile, "name" | "index" | "count"> {
  /** What all files end at, in bytes. */
  all: number;
  /** What of all of them is done before this stage of this file. */
  before: number;
  /** Whether this stage adds to that. */
  counts: boolean;
}

/** Milliseconds between two reports of one stage. */
const INTERVAL = 50;

/**
 * Turns counts into {@linkcode Progress} reports: upwards only, not too often,
 * and with the total at the end.
 */
export class Meter {
  readonly #onProgress: ((progress: Progress) => void) | undefined;
  readonly #stage: Progress["stage"];
  readonly #label: string;
  readonly #total: number | null;
  readonly #file: MeteredFile | undefined;
  #loaded = -1;
  #next = 0;

  /**
   * A meter of one stage of the work on `label`, which ends at `total` bytes;
   * of one of several files these are its own.
   */
  constructor(
    onProgress: ((progress: Progress) => void) | undefined,
    stage: Progress["stage"],
    label: string,
    total: number | null,
    file?: MeteredFile,
  ) {
    this.#file = file;
    this.#onProgress = onProgress;
    this.#stage = stage;
    this.#label = label;
    this.#total = total;
  }

  /** Reports that `loaded` bytes are done, unless that is old or too soon. */
  at(loaded: number): void {
    const value = Math.min(loaded, this.#total ?? loaded);
    const now = performance.now();
    if (value <= this.#loaded || now < this.#next) return;
    this.#next = now + INTERVAL;
    this.#report(value);
  }

  /** Reports something worth saying without any headway. */
  say(note: string): void {
    this.#report(Math.max(this.#loaded, 0), note);
  }

  /** Reports the end of the stage, at `loaded` bytes when no total is known. */
  done(loaded: number, note?: string): void {
    this.#report(this.#total ?? loaded, note);
  }

  #report(loaded: number, note?: string): void {
    this.#loaded = loaded;
    const total = this.#total;
    this.#onProgress?.({
      stage: this.#stage,
      ...(this.#file === undefined
        ? { loaded, total }
        : withFile(this.#file, loaded, total)),
      label: this.#label,
      ...(note === undefined ? {} : { note }),
    });
  }
}

function withFile(
  { all, before, counts, ...file }: MeteredFile,
  loaded: number,
  total: number | null,
): Pick<Progress, "loaded" | "total" | "file"> {
  return {
    loaded: before + (counts ? loaded : 0),
    total: all,
    file: { ...file, loaded, total },
  };
}
