/** The help texts, made from the list of commands and their option tables; called by main.ts. */

import type { Command } from "./command.ts";
import { commands } from "./commands.ts";
import type { Options, Values } from "./option.ts";

/** The main help. */
export function mainHelp(): string {
  const rows = Object.entries(commands).map((
    [name, { summary }],
  ): [string, string] => [name, summary]);
  return `Generate text with a key/value cache of fixed size (WeightedKV).

Usage: wkv <command> [options]

Commands:
${columns(rows)}
Options:
${
    columns([
      ["-h, --help", "Show this help, or that of a command"],
      ["-V, --version", "Show the version"],
    ])
  }
Results go to standard output, all else to standard error. Exit codes: 0 done,
2 wrong options or files, 1 anything else that fails, 130 Ctrl-C.
`;
}

/** One command's help, with the permissions that it needs on this machine. */
export async function commandHelp(
  name: string,
  command: Command,
  values: Values<Options>,
  operands: readonly string[],
): Promise<string> {
  const usage = ["wkv", name, command.operands, "[options]"]
    .filter((part) => part !== "").join(" ");
  const options = Object.entries(command.options).map((
    [name, { short, value, summary }],
  ): [string, string] => [
    `${short ? `-${short}, ` : "    "}--${name}${value ? ` ${value}` : ""}`,
    summary,
  ]);
  options.push(["-h, --help", "Show this help"]);
  return `Usage: ${usage}

${command.description}

Options:
${columns(options)}
Permissions on this machine:
${await permissionLines(command, values, operands)}`;
}

async function permissionLines(
  command: Command,
  values: Values<Options>,
  operands: readonly string[],
): Promise<string> {
  try {
    const flags = await command.permissions(values, operands);
    return flags.length === 0
      ? "  none\n"
      : flags.map((flag) => `  ${shellQuote(flag)}\n`).join("");
  } catch (error) {
    if (!(error instanceof Deno.errors.NotCapable)) throw error;
    return "  (to find them takes --allow-read and --allow-env)\n";
  }
}

/** A word as a shell takes it. */
export function shellQuote(word: string): string {
  return /^[\w@%+=:,./-]+$/.test(word)
    ? word
    : `'${word.replaceAll("'", `'\\''`)}'`;
}

function columns(rows: readonly (readonly [string, string])[]): string {
  const width = Math.min(30, Math.max(...rows.map(([left]) => left.length)));
  return rows.map(([left, right]) =>
    left.length > width
      ? `  ${left}\n  ${" ".repeat(width)}  ${right}\n`
      : `  ${left.padEnd(width)}  ${right}\n`
  ).join("");
}
