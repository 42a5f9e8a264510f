/**
 * The command line: finds the command of a name, reads its options, runs it and
 * turns errors into a line and an exit code.
 *
 * @example
 * ```sh
 * deno run -A --no-prompt cli/main.ts generate "Once upon a time" --budget 128
 * ```
 *
 * @module
 */

import { nearest, readArguments } from "./arguments.ts";
import { commands } from "./commands.ts";
import { errorMessage, exitCode, wantsStack } from "./errors.ts";
import { commandHelp, mainHelp } from "./help.ts";
import { Interrupt } from "./interrupt.ts";
import { UsageError } from "./option.ts";
import { ClosedOutput, processTerminal } from "./terminal.ts";

export { Interrupt };

/**
 * Runs one command line.
 *
 * @param args What stands behind `wkv`.
 * @param interrupt What Ctrl-C does.
 * @returns The exit code: 0 done, 2 wrong options or files, 1 anything else
 * that fails, 130 interrupted.
 */
export async function main(
  args: readonly string[],
  interrupt: Interrupt = new Interrupt(),
): Promise<number> {
  const terminal = processTerminal();
  try {
    return await dispatch(args, interrupt, terminal);
  } catch (error) {
    if (error instanceof ClosedOutput) return 0;
    const interrupted = interrupt.signal.aborted;
    await terminal.err.write(
      interrupted ? "wkv: Interrupted\n" : `wkv: ${errorMessage(error)}\n`,
    );
    if (wantsStack() && error instanceof Error) {
      await terminal.err.write(`${Deno.inspect(error)}\n`);
    }
    return interrupted ? 130 : exitCode(error);
  }
}

async function dispatch(
  args: readonly string[],
  interrupt: Interrupt,
  terminal: ReturnType<typeof processTerminal>,
): Promise<number> {
  const [name, ...rest] = args[0] === "help" && args[1] !== undefined
    ? [args[1], "--help"]
    : args;
  if (name === undefined) {
    await terminal.err.write(mainHelp());
    return 2;
  }
  if (["--help", "-h", "help"].includes(name)) {
    await terminal.out.write(mainHelp());
    return 0;
  }
  if (["--version", "-V"].includes(name)) {
    const config = await import("../deno.json", { with: { type: "json" } });
    await terminal.out.write(`${config.default.version}\n`);
    return 0;
  }
  if (!Object.hasOwn(commands, name)) {
    const kind = name.startsWith("-") ? "option" : "command";
    const near = nearest(name, Object.keys(commands));
    throw new UsageError(
      `Unknown ${kind} ${JSON.stringify(name)}${
        near ? `, did you mean ${near}?` : ""
      } (wkv --help lists the commands)`,
    );
  }
  const command = await commands[name]!.load();
  const end = rest.indexOf("--");
  const before = end < 0 ? rest : rest.slice(0, end);
  if (before.includes("--help") || before.includes("-h")) {
    const given = before.filter((arg) => arg !== "--help" && arg !== "-h");
    const { values, operands } = readArguments(given, command.options);
    await terminal.out.write(
      await commandHelp(name, command, values, operands),
    );
    return 0;
  }
  checkPlatform(Deno.build.os);
  const { values, operands } = readArguments(rest, command.options);
  const { count, what } = command.most;
  if (operands.length > count) {
    throw new UsageError(
      `${name} takes ${what}: found ${operands.length} arguments${
        count === 1 ? ", quotes keep words together" : ""
      }`,
    );
  }
  const { signal } = interrupt;
  return await command.run({ values, operands, terminal, signal, interrupt });
}

/**
 * Refuses the systems that nothing was tried on.
 *
 * @throws {Error} It is not Linux.
 */
export function checkPlatform(os: string): void {
  if (os !== "linux") throw new Error(`Linux only so far: this is ${os}`);
}

if (import.meta.main) {
  const interrupt = new Interrupt();
  Deno.addSignalListener("SIGINT", () => interrupt.press());
  Deno.exit(await main(Deno.args, interrupt));
}
