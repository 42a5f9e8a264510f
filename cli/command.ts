/** What a command is: each file of this folder that commands.ts names holds one. */

import type { Interrupt } from "./interrupt.ts";
import type { Options, Values } from "./option.ts";
import type { Terminal } from "./terminal.ts";

/** What a command gets to run. */
export interface Run<O extends Options> {
  /** The options that were given. */
  values: Values<O>;
  /** The other arguments. */
  operands: string[];
  /** Where its output goes. */
  terminal: Terminal;
  /** Aborts at the first Ctrl-C. */
  signal: AbortSignal;
  /** What Ctrl-C does, for a command that goes on after it. */
  interrupt: Interrupt;
}

/** One command. */
export interface Command<O extends Options = Options> {
  /** What stands behind its name in usage, such as `[PROMPT]`. */
  readonly operands: string;
  /** The most operands it takes; what one is, in messages. */
  readonly most: { readonly count: number; readonly what: string };
  /** Words to offer for an operand in completions. */
  readonly choices?: readonly string[];
  /** What help says below the usage. */
  readonly description: string;
  /** Its options, `--help` excepted. */
  readonly options: O;
  /** The flags of `deno run` that it needs on this machine. */
  readonly permissions: (
    values: Values<O>,
    operands: readonly string[],
  ) => Promise<string[]>;
  /**
   * Runs it.
   *
   * @returns The exit code.
   */
  readonly run: (run: Run<O>) => Promise<number>;
}

/** Gives a command its type while its options keep theirs. */
export function defineCommand<const O extends Options>(
  command: Command<O>,
): Command<O> {
  return command;
}
