/** Progress on standard error: bars on a terminal, a line at the start and the end elsewhere; used by the commands that wait. */

import type { Progress, ProgressFile } from "../src/hub/progress.ts";
import type { Terminal } from "./terminal.ts";
import { formatBytes, formatTime } from "./units.ts";

/** Milliseconds between two drawings. */
const INTERVAL = 80;
const WIDTH = 24;

/** One bar: what is done, the share of it, and a word behind. */
type BarRow = readonly [label: string, share: number, rest: string];

/** Lines that are drawn over. */
class Bars {
  readonly #err: Terminal["err"];
  #next = 0;
  #drawn = 0;

  /** Bars on this output; nothing is drawn where that takes none. */
  constructor(err: Terminal["err"]) {
    this.#err = err;
  }

  /** Draws a bar a row, unless that is too soon and the last one is not at its end. */
  draw(rows: readonly BarRow[]): void {
    const now = performance.now();
    if (!this.#err.bars || (now < this.#next && rows.at(-1)![1] < 1)) return;
    if (this.#drawn > rows.length) this.clear();
    this.#next = now + INTERVAL;
    const lines = rows.map((row) => `\r\x1b[K${this.line(row)}`);
    this.#err.writeNow(this.#up() + lines.join("\n"));
    this.#drawn = rows.length;
  }

  /** The text of a bar, within the line. */
  line([label, share, rest]: BarRow): string {
    const full = Math.round(Math.min(1, Math.max(0, share)) * WIDTH);
    const percent = `${Math.floor(share * 100)}`.padStart(3);
    const tail = ` [${"#".repeat(full)}${
      "-".repeat(WIDTH - full)
    }] ${percent}% ${rest}`;
    // The last column stays free: some terminals wrap there.
    const room = Math.max(1, this.#err.columns - 1);
    const line = label.slice(0, Math.max(12, room - tail.length)) + tail;
    return line.slice(0, room);
  }

  /** Takes all lines away. */
  clear(): void {
    if (this.#drawn === 0) return;
    // From the first line on, to the end of the screen.
    this.#err.writeNow(
      this.#drawn === 1 ? "\r\x1b[K" : `${this.#up()}\r\x1b[J`,
    );
    this.#drawn = 0;
    this.#next = 0;
  }

  /** To the first line that is drawn. */
  #up(): string {
    return this.#drawn > 1 ? `\x1b[${this.#drawn - 1}A` : "";
  }
}

/** One line that is drawn over. */
export class Bar {
  readonly #bars: Bars;

  /** A bar on this output; nothing is drawn where that takes none. */
  constructor(err: Terminal["err"]) {
    this.#bars = new Bars(err);
  }

  /** Draws `label`, the share done and `rest`, unless that is too soon. */
  draw(label: string, share: number, rest: string): void {
    this.#bars.draw([[label, share, rest]]);
  }

  /** Takes the line away. */
  clear(): void {
    this.#bars.clear();
  }
}

const doing: Partial<Record<Progress["stage"], string>> = {
  download: "Downloading",
  unpack: "Unpacking",
  verify: "Verifying",
  load: "Loading",
};

/** The file of a pull of several that is worked on. */
interface CurrentFile extends ProgressFile {
  start: number;
  /** Whether it was not here before. */
  pulled: boolean;
}

/**
 * Shows what a load, pull or build reports. Of a pull of several files a
 * terminal has a bar of the one that is worked on above one of all of them, and
 * each file's line stays; elsewhere each file's end is a line.
 */
export class ProgressView implements Disposable {
  readonly #terminal: Terminal;
  readonly #quiet: boolean;
  readonly #bars: Bars;
  #stage: Progress["stage"] | null = null;
  #label = "";
  #start = 0;
  #file: CurrentFile | null = null;
  /** Bytes of all files that were here when the first of them began to come. */
  #before = 0;

  /** A view that with `quiet` shows nothing. */
  constructor(terminal: Terminal, quiet: boolean) {
    this.#terminal = terminal;
    this.#quiet = quiet;
    this.#bars = new Bars(terminal.err);
  }

  /** Takes one report. */
  readonly report = (progress: Progress): void => {
    if (this.#quiet) return;
    const { stage, loaded, total, label, note, file } = progress;
    if (file !== undefined) {
      this.#reportFile(progress, file);
      return;
    }
    // A sentence before anything is known begins nothing.
    if (note !== undefined && stage === "download" && total === null) {
      this.#say(note);
      return;
    }
    const fresh = stage !== this.#stage;
    if (fresh) this.#begin(stage, label);
    if (note !== undefined) this.#say(note);
    else if (fresh && stage === "download") {
      this.#announce(total === null ? "" : ` (${formatBytes(total)})`);
    }
    const word = doing[stage];
    if (word === undefined || total === null || note !== undefined) return;
    this.#bars.draw([[
      `${word} ${label.split("/").at(-1)}`,
      total === 0 ? 1 : loaded / total,
      `${formatBytes(loaded)} of ${formatBytes(total)}`,
    ]]);
  };

  /** Ends the last stage; `failed` leaves out that it is done. */
  close(failed = false): void {
    if (failed) this.#stage = this.#file = null;
    this.#end();
  }

  /** Same as {@linkcode ProgressView.close} after a failure. */
  [Symbol.dispose](): void {
    this.close(true);
  }

  #reportFile(
    { stage, loaded, total, label, note }: Progress,
    file: ProgressFile,
  ): void {
    if (this.#file === null || this.#label !== label) this.#begin(null, label);
    if (this.#file?.index !== file.index) {
      this.#endFile();
      const start = performance.now();
      this.#file = { ...file, start, pulled: false };
    }
    if (note !== undefined) {
      this.#say(note);
      return;
    }
    const all = total ?? 0;
    if (stage === "download") {
      // Verifying alone is no download.
      if (this.#stage === null) {
        this.#stage = stage;
        this.#start = performance.now();
        this.#before = loaded;
        this.#announce(` (${file.count} files, ${formatBytes(all)})`);
      }
      this.#file!.pulled = true;
    }
    const spent = performance.now() - this.#start;
    const left = spent * (all - loaded) / (loaded - this.#before);
    const size = file.total ?? 0;
    this.#bars.draw([
      [
        `${doing[stage]} ${file.name.split("/").at(-1)}`,
        size === 0 ? 1 : file.loaded / size,
        `${formatBytes(file.loaded)} of ${formatBytes(size)}`,
      ],
      [
        `${file.index} of ${file.count} files`,
        all === 0 ? 1 : loaded / all,
        `${formatBytes(loaded)} of ${formatBytes(all)}${
          this.#stage !== null && Number.isFinite(left) && left > 0
            ? `, ${formatTime(left)} left`
            : ""
        }`,
      ],
    ]);
  }

  #begin(stage: Progress["stage"] | null, label: string): void {
    this.#end();
    this.#stage = stage;
    this.#label = label;
    this.#start = performance.now();
  }

  /** Says that a download begins, where no bar shows it. */
  #announce(size: string): void {
    if (!this.#terminal.err.bars) {
      this.#say(`Downloading ${this.#label}${size}`);
    }
  }

  #endFile(): void {
    const file = this.#file;
    this.#file = null;
    if (file === null || !file.pulled) return;
    const size = formatBytes(file.total ?? 0);
    const rest = `${size} in ${formatTime(performance.now() - file.start)}`;
    this.#say(
      this.#terminal.err.bars
        ? this.#bars.line([file.name.split("/").at(-1)!, 1, rest])
        : `${file.name} (${file.index} of ${file.count}): ${rest}`,
    );
  }

  #end(): void {
    this.#endFile();
    this.#bars.clear();
    const time = formatTime(performance.now() - this.#start);
    if (this.#stage === "download") {
      this.#say(`Downloaded ${this.#label} in ${time}`);
    } else if (this.#stage === "build") {
      this.#say(`Built in ${time}`);
    }
    this.#stage = null;
  }

  #say(line: string): void {
    this.#bars.clear();
    this.#terminal.err.writeNow(`${line}\n`);
  }
}
