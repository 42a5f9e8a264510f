/** Runs commands as processes of their own; imported by the tests of the command line. */

import { assert, assertEquals, assertMatch } from "@std/assert";

/** The project's folder. */
export const ROOT: string = decodeURIComponent(
  new URL("..", import.meta.url).pathname,
).replace(/\/$/, "");

/** How a command is run. */
export interface Setting {
  /** Its standard input; none by default. */
  stdin?: string | Uint8Array | undefined;
  /** Variables beside the test's own. */
  env?: Record<string, string> | undefined;
  /** The project it is run from. @default this one */
  root?: string | undefined;
  /** Flags of `deno run`. @default `["-A"]` */
  flags?: readonly string[] | undefined;
  /** Called as it begins. */
  onSpawn?: ((child: Deno.ChildProcess) => void | Promise<void>) | undefined;
}

/** What a command left. */
export interface Outcome {
  /** Its exit code. */
  code: number;
  /** Standard output. */
  stdout: string;
  /** Standard error. */
  stderr: string;
  /** Milliseconds that it took. */
  ms: number;
}

/** The arguments of `deno` that run a command line. */
export function denoArguments(
  args: readonly string[],
  { root = ROOT, flags = ["-A"] }: Setting = {},
): string[] {
  return ["run", "--no-prompt", ...flags, `${root}/cli/main.ts`, ...args];
}

/** Runs one command line to its end. */
export async function wkv(
  args: readonly string[],
  setting: Setting = {},
): Promise<Outcome> {
  return await execute(Deno.execPath(), denoArguments(args, setting), setting);
}

/** Runs any program to its end. */
export async function execute(
  program: string,
  args: readonly string[],
  setting: Setting = {},
): Promise<Outcome> {
  const start = performance.now();
  const { root = ROOT, env = {}, stdin, onSpawn } = setting;
  const child = new Deno.Command(program, {
    args: [...args],
    cwd: root,
    env: { DENO_DIR: await denoDir(), DENO_NO_UPDATE_CHECK: "1", ...env },
    stdin: stdin === undefined ? "null" : "piped",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const output = child.output();
  if (stdin !== undefined) {
    const writer = child.stdin.getWriter();
    const bytes = typeof stdin === "string"
      ? new TextEncoder().encode(stdin)
      : stdin;
    await writer.write(bytes).then(() => writer.close()).catch(() => {});
  }
  await onSpawn?.(child);
  const { code, stdout, stderr } = await output;
  const decoder = new TextDecoder();
  return {
    code,
    stdout: decoder.decode(stdout),
    stderr: decoder.decode(stderr),
    ms: performance.now() - start,
  };
}

let found: Promise<string> | undefined;

/**
 * Where Deno keeps packages: it would look elsewhere once a test moves
 * XDG_CACHE_HOME.
 */
export function denoDir(): Promise<string> {
  return found ??= (async () => {
    const { stdout } = await new Deno.Command(Deno.execPath(), {
      args: ["info", "--json"],
    }).output();
    return JSON.parse(new TextDecoder().decode(stdout)).denoDir as string;
  })();
}

/** Copies this project's sources, so without its build folder, and gives the folder. */
export async function copyCheckout(): Promise<string> {
  const copy = await Deno.makeTempDir({ prefix: "wkv_copy_" });
  for (const name of ["mod.ts", "deno.json", "deno.lock"]) {
    await Deno.copyFile(`${ROOT}/${name}`, `${copy}/${name}`);
  }
  for (const name of ["src", "cli", "bench", "tests/std"]) {
    await copyFolder(`${ROOT}/${name}`, `${copy}/${name}`);
  }
  return copy;
}

async function copyFolder(from: string, to: string): Promise<void> {
  await Deno.mkdir(to, { recursive: true });
  for await (const { name, isDirectory } of Deno.readDir(from)) {
    if (isDirectory) await copyFolder(`${from}/${name}`, `${to}/${name}`);
    else await Deno.copyFile(`${from}/${name}`, `${to}/${name}`);
  }
}

/** Writes a script that can be run. */
export async function writeScript(path: string, text: string): Promise<void> {
  await Deno.writeTextFile(path, `#!/bin/sh\n${text}\n`);
  await Deno.chmod(path, 0o755);
}

/** A command that must end with this code and say these things on standard error. */
export interface Case {
  /** Its arguments. */
  args: string[];
  /** Its exit code. */
  code: number;
  /** What its message holds. */
  says: (string | RegExp)[];
  /** How it is run. */
  setting?: Setting;
}

/** Runs cases two at a time; each error is one message, without a stack. */
export async function expectErrors(cases: readonly Case[]): Promise<void> {
  const queue = [...cases];
  const next = async (): Promise<void> => {
    for (let one = queue.shift(); one; one = queue.shift()) {
      const { code, stdout, stderr } = await wkv(one.args, one.setting);
      const label = `wkv ${one.args.join(" ").slice(0, 200)}: ${stderr}`;
      assertEquals(code, one.code, label);
      assertEquals(stdout, "", label);
      assert(stderr.startsWith("wkv: "), label);
      assert(!/\n\s+at /.test(stderr), label);
      for (const text of one.says) assertMatch(stderr, pattern(text), label);
    }
  };
  await Promise.all([next(), next()]);
}

/** A text as a pattern that finds it. */
export function pattern(text: string | RegExp): RegExp {
  return typeof text === "string"
    ? new RegExp(text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"))
    : text;
}

/** Ends with 0, and gives standard output. */
export async function ok(args: string[], setting?: Setting): Promise<Outcome> {
  const outcome = await wkv(args, setting);
  assertEquals(outcome.code, 0, `wkv ${args.join(" ")}: ${outcome.stderr}`);
  return outcome;
}
