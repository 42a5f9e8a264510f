/**
 * What tests of one process would count together: a copy of the library, whose
 * handles are its own, and child processes, whose memory and permissions are.
 */

import { testLibrary } from "./device.ts";

/** A copy of the library with handles of its own. */
export class LibraryCopy implements AsyncDisposable {
  /** Its full path. */
  readonly path: string;
  readonly #folder: string;

  private constructor(folder: string) {
    this.#folder = folder;
    this.path = `${folder}/library.so`;
  }

  /** Copies the library, which is built when there is none. */
  static async make(): Promise<LibraryCopy> {
    const path = await testLibrary();
    const folder = await Deno.makeTempDir({ prefix: "wkv_library_" });
    const copy = new LibraryCopy(await Deno.realPath(folder));
    await Deno.copyFile(path, copy.path);
    return copy;
  }

  /** Removes the copy. */
  async [Symbol.asyncDispose](): Promise<void> {
    await Deno.remove(this.#folder, { recursive: true });
  }
}

/** How a child process ended. */
export interface Ended {
  /** Its exit code. */
  code: number;
  /** What it wrote. */
  stdout: string;
  /** What it wrote to stderr. */
  stderr: string;
}

/**
 * Runs a TypeScript text in a child process with these permissions and, beside
 * this process's own, these variables. Imports of files of this repository are
 * written as `src/...`.
 */
export async function runScript(
  script: string,
  permissions: string[],
  env: Record<string, string> = {},
): Promise<Ended> {
  const root = new URL("../", import.meta.url).href;
  const child = new Deno.Command(Deno.execPath(), {
    args: [
      "run",
      "--no-prompt",
      "--no-config",
      "--no-lock",
      ...permissions,
      "-",
    ],
    env,
    stdin: "piped",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const writer = child.stdin.getWriter();
  const text = script.replaceAll(/from "src\//g, `from "${root}src/`);
  await writer.write(new TextEncoder().encode(text));
  await writer.close();
  const { code, stdout, stderr } = await child.output();
  const decoder = new TextDecoder();
  return {
    code,
    stdout: decoder.decode(stdout),
    stderr: decoder.decode(stderr),
  };
}
