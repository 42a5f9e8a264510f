/** Ctrl-C: ends the command at first and the process after that, unless the command takes it; main.ts makes one, chat.ts takes it. */

/** What Ctrl-C does. */
export class Interrupt {
  readonly #controller = new AbortController();
  #taker: (() => void) | null = null;

  /** Aborts at the first Ctrl-C that nobody took. */
  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  /** Ctrl-C was pressed. */
  press(): void {
    if (this.#taker !== null) this.#taker();
    else if (this.signal.aborted) Deno.exit(130);
    else this.#controller.abort();
  }

  /** Calls this at each Ctrl-C instead, until the end of a `using` block. */
  take(taker: () => void): Disposable {
    this.#taker = taker;
    return { [Symbol.dispose]: () => this.#taker = null };
  }
}
