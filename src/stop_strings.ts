/** Finds stop strings in streamed text; used by generate. */

/** Lets text through up to the first stop string, holding back what may begin one. */
export class StopStrings {
  readonly #stops: readonly string[];
  #held = "";
  #found = false;

  /**
   * Looks for these strings.
   *
   * @throws {RangeError} One of them is empty.
   */
  constructor(stops: readonly string[]) {
    if (stops.includes("")) {
      throw new RangeError("A stop string must not be empty");
    }
    this.#stops = stops;
  }

  /** Whether a stop string was met; nothing comes through any more. */
  get found(): boolean {
    return this.#found;
  }

  /** Adds text; gives what is certainly before any stop string. */
  push(text: string): string {
    if (this.#found) return "";
    const all = this.#held + text;
    const hits = this.#stops.map((stop) => all.indexOf(stop))
      .filter((at) => at >= 0);
    if (hits.length > 0) {
      this.#found = true;
      this.#held = "";
      return all.slice(0, Math.min(...hits));
    }
    let held = 0;
    for (const stop of this.#stops) {
      for (let n = Math.min(stop.length - 1, all.length); n > held; n--) {
        if (all.endsWith(stop.slice(0, n))) held = n;
      }
    }
    this.#held = all.slice(all.length - held);
    return all.slice(0, all.length - held);
  }

  /** Ends the text; gives what was held back. */
  flush(): string {
    const held = this.#held;
    this.#held = "";
    return held;
  }
}
