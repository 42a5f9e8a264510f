/** Reads a command line by a command's option table, over `@std/cli/parse-args`; called by main.ts. */

import { parseArgs } from "@std/cli/parse-args";
import { type Options, UsageError, type Values } from "./option.ts";

/** A command line, read. */
export interface Arguments<O extends Options> {
  /** The options that were given. */
  values: Values<O>;
  /** What is not an option, in order. */
  operands: string[];
}

/**
 * Reads a command line.
 *
 * @throws {UsageError} An option is unknown, or its value not what is wanted.
 */
export function readArguments<O extends Options>(
  args: readonly string[],
  options: O,
): Arguments<O> {
  const names = Object.keys(options);
  const flags = names.filter((name) => options[name]!.value === null);
  const parsed = parseArgs(spellOut(args, options), {
    boolean: flags,
    string: ["_", ...names.filter((name) => !flags.includes(name))],
    collect: names.filter((name) => !flags.includes(name)),
  });
  const values: Record<string, unknown> = {};
  for (const name of names) {
    const given: unknown = parsed[name];
    if (given === true) values[name] = true;
    if (!Array.isArray(given) || given.length === 0) continue;
    values[name] = options[name]!.read(given as string[], name);
  }
  return { values: values as Values<O>, operands: parsed._ as string[] };
}

/**
 * The same command line with every option as `--name` or `--name=value` and
 * all operands behind `--`. parse-args alone takes a value that begins with a
 * dash for an option, and a `true` behind a flag for its value.
 */
function spellOut(args: readonly string[], options: Options): string[] {
  const spelled: string[] = [];
  const operands: string[] = [];
  for (let i = 0; i < args.length; i++) {
    const arg = args[i]!;
    if (arg === "--") {
      operands.push(...args.slice(i + 1));
      break;
    }
    if (!arg.startsWith("-") || arg === "-") {
      operands.push(arg);
      continue;
    }
    const { name, value } = split(arg, options);
    const option = options[name]!;
    if (option.value === null) {
      if (value !== null) {
        throw new UsageError(`--${name} takes no value: found ${arg}`);
      }
      spelled.push(`--${name}`);
      continue;
    }
    const next = value ?? args[++i];
    const isOption = value === null && next !== undefined &&
      (next === "--" || next.startsWith("--") &&
          Object.hasOwn(options, next.slice(2).split("=")[0]!));
    if (next === undefined || next === "" || isOption) {
      throw new UsageError(`--${name} needs a value: ${option.value}`);
    }
    spelled.push(`--${name}=${next}`);
  }
  return [...spelled, "--", ...operands];
}

/** An option's name and the value written in the same argument. */
function split(
  arg: string,
  options: Options,
): { name: string; value: string | null } {
  if (arg.startsWith("--")) {
    const at = arg.indexOf("=");
    const name = arg.slice(2, at < 0 ? undefined : at);
    if (Object.hasOwn(options, name)) {
      return { name, value: at < 0 ? null : arg.slice(at + 1) };
    }
    const near = nearest(name, Object.keys(options));
    throw new UsageError(
      `Unknown option --${name}${near ? `, did you mean --${near}?` : ""}`,
    );
  }
  const letter = arg.slice(1, 2);
  const found = Object.entries(options).find(([, { short }]) =>
    short === letter
  );
  if (found === undefined || (arg.length > 2 && found[1].value === null)) {
    throw new UsageError(
      `Unknown option ${arg} (an argument that begins with a dash goes behind --)`,
    );
  }
  return { name: found[0], value: arg.length > 2 ? arg.slice(2) : null };
}

/** The name that is closest to what was typed, if one is close. */
export function nearest(
  typed: string,
  names: readonly string[],
): string | undefined {
  const close = names
    .map((name) => ({ name, distance: editDistance(typed, name) }))
    .filter(({ name, distance }) =>
      distance <= Math.ceil(name.length / 3) ||
      (typed.length >= 3 && name.startsWith(typed))
    );
  return close.sort((a, b) => a.distance - b.distance)[0]?.name;
}

/** Insertions, removals and replacements that turn one text into the other. */
export function editDistance(a: string, b: string): number {
  // Long arguments are prompts gone astray, not names mistyped.
  if (a.length > 64) return Infinity;
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next.push(Math.min(
        row[j]! + 1,
        next[j - 1]! + 1,
        row[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1),
      ));
    }
    row = next;
  }
  return row[b.length]!;
}
