/** Progress on standard error: bars on a terminal, a line at the start and the end elsewhere; used by the commands that wait. */

import type { Progress } from "../src/hub/models.ts";
import type { Terminal } from "./terminal.ts";
import { formatBytes, formatTime } from "./units.ts";

/** Milliseconds between two drawings. */
const INTERVAL = 80;
const WIDTH = 24;

/** One line that is drawn over. */
export class Bar {
  readonly #err: Terminal["err"];
  #next = 0;
  #drawn = false;

  /** A bar on this output; nothing is drawn where that takes none. */
  constructor(err: Terminal["err"]) {
    this.#err = err;
  }

  /** Draws `label`, the share done and `rest`, unless that is too soon. */
  draw(label: string, share: number, rest: string): void {
    const now = performance.now();
    if (!this.#err.bars || (now < this.#next && share < 1)) return;
    this.#next = now + INTERVAL;
    const full = Math.round(Math.min(1, Math.max(0, share)) * WIDTH);
    const percent = `${Math.floor(share * 100)}`.padStart(3);
    const tail = ` [${"#".repeat(full)}${
      "-".repeat(WIDTH - full)
    }] ${percent}% ${rest}`;
    // The last column stays free: some terminals wrap there.
    const room = Math.max(1, this.#err.columns - 1);
    const line = label.slice(0, Math.max(12, room - tail.length)) + tail;
    this.#err.writeNow(`\r\x1b[K${line.slice(0, room)}`);
    this.#drawn = true;
  }

  /** Takes the line away. */
  clear(): void {
    if (!this.#drawn) return;
    this.#err.writeNow("\r\x1b[K");
    this.#drawn = false;
    this.#next = 0;
  }
}

const doing: Partial<Record<Progress["stage"], string>> = {
  download: "Downloading",
  unpack: "Unpacking",
  verify: "Verifying",
  load: "Loading",
};

/** Shows what a load, pull or build reports. */
export class ProgressView implements Disposable {
  readonly #terminal: Terminal;
  readonly #quiet: boolean;
  readonly #bar: Bar;
  #stage: Progress["stage"] | null = null;
  #label = "";
  #start = 0;

  /** A view that with `quiet` shows nothing. */
  constructor(terminal: Terminal, quiet: boolean) {
    this.#terminal = terminal;
    this.#quiet = quiet;
    this.#bar = new Bar(terminal.err);
  }

  /** Takes one report. */
  readonly report = (progress: Progress): void => {
    if (this.#quiet) return;
    const { stage, loaded, total, label, note } = progress;
    const fresh = stage !== this.#stage;
    if (fresh) {
      this.#end();
      this.#stage = stage;
      this.#label = label;
      this.#start = performance.now();
    }
    if (note !== undefined) this.#say(note);
    else if (fresh && stage === "download" && !this.#terminal.err.bars) {
      this.#say(
        `Downloading ${label}${
          total === null ? "" : ` (${formatBytes(total)})`
        }`,
      );
    }
    const word = doing[stage];
    if (word === undefined || total === null || note !== undefined) return;
    this.#bar.draw(
      `${word} ${label.split("/").at(-1)}`,
      total === 0 ? 1 : loaded / total,
      `${formatBytes(loaded)} of ${formatBytes(total)}`,
    );
  };

  /** Ends the last stage; `failed` leaves out that it is done. */
  close(failed = false): void {
    if (failed) this.#stage = null;
    this.#end();
  }

  /** Same as {@linkcode ProgressView.close} after a failure. */
  [Symbol.dispose](): void {
    this.close(true);
  }

  #end(): void {
    this.#bar.clear();
    const time = formatTime(performance.now() - this.#start);
    if (this.#stage === "download") {
      this.#say(`Downloaded ${this.#label} in ${time}`);
    } else if (this.#stage === "build") {
      this.#say(`Built in ${time}`);
    }
    this.#stage = null;
  }

  #say(line: string): void {
    this.#bar.clear();
    this.#terminal.err.writeNow(`${line}\n`);
  }
}
