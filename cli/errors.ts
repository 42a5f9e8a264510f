/** What an error means to whoever typed the command: its line and its exit code; used by main.ts. */

/** Errors of what the user gave: exit 2. */
const wrongInput = [
  TypeError,
  RangeError,
  SyntaxError,
  Deno.errors.NotFound,
  Deno.errors.PermissionDenied,
  Deno.errors.IsADirectory,
  Deno.errors.NotADirectory,
];

/** 2 for options, values and files that are wrong; 1 for device, memory, disk, network, compiler. */
export function exitCode(error: unknown): number {
  return wrongInput.some((kind) => error instanceof kind) ? 2 : 1;
}

/** The error's message; a missing permission becomes the flag that gives it. */
export function errorMessage(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  const { message } = error;
  if (!(error instanceof Deno.errors.NotCapable)) {
    return message || error.name;
  }
  const asked =
    /^Requires (\w+) access(?: to (.+?))?, run again with the --allow-(\w+) flag/
      .exec(message);
  if (asked === null) return message;
  const [, , target, kind] = asked;
  const quoted = /^"(.*)"$/s.exec(target ?? "")?.[1];
  const flag = quoted === undefined
    ? `--allow-${kind}`
    : `--allow-${kind}=${quoted}`;
  return `A permission is missing: run again with ${flag} (a command's --help, run with -A, lists all that it needs)`;
}

/** Whether WKV_DEBUG asks for stacks; no where it may not be read. */
export function wantsStack(): boolean {
  const name = "WKV_DEBUG";
  const { state } = Deno.permissions.querySync({ name: "env", variable: name });
  return state === "granted" && Deno.env.get(name) === "1";
}
