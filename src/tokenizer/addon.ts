/** Loads the native addon of npm:tokenizers when a tokenizer is opened, and says which permissions that takes; used by the tokenizer, by help and by doctor. */

import type { Tokenizer } from "tokenizers";

/** The addon's tokenizer. */
export type NativeTokenizer = Tokenizer;

/** Environment variables that the addon's loader reads. */
const VARIABLES = ["NAPI_RS_NATIVE_LIBRARY_PATH", "NAPI_RS_FORCE_WASI"];

/** What the addon's loader reads on Linux to tell glibc from musl. */
const LDD = "/usr/bin/ldd";

/**
 * The flags of `deno run` that let the tokenizer load on this machine.
 *
 * @returns One flag an entry, such as `--allow-ffi=<the addon's folder>`.
 */
export function tokenizerPermissions(): string[] {
  const module = import.meta.resolve("tokenizers");
  const flags = [
    // Outside an npm cache there is no folder to name.
    module.startsWith("file:")
      ? `--allow-ffi=${listed(folder(module))}`
      : "--allow-ffi",
    `--allow-env=${VARIABLES.join(",")}`,
  ];
  if (Deno.build.os === "linux") flags.push(`--allow-read=${LDD}`);
  return flags;
}

/**
 * Makes a native tokenizer. The JSON must have been checked: the addon ends
 * the process on some wrong ones.
 *
 * @param json The text of a tokenizer.json.
 * @returns The tokenizer.
 * @throws {Deno.errors.NotCapable} When a permission is missing, naming all
 * flags.
 * @throws {Error} When the addon does not load for another reason.
 */
export async function openNative(json: string): Promise<NativeTokenizer> {
  const { Tokenizer } = await loadAddon();
  return Tokenizer.fromString(json);
}

async function loadAddon(): Promise<typeof import("tokenizers")> {
  try {
    return await import("tokenizers");
  } catch (cause) {
    if (lacksPermission(cause)) {
      throw new Deno.errors.NotCapable(
        `Cannot load the tokenizer's native addon without permission, run again with ${
          tokenizerPermissions().join(" ")
        }`,
        { cause },
      );
    }
    throw new Error(
      `Cannot load the tokenizer's native addon (npm:tokenizers) on ${Deno.build.os} ${Deno.build.arch}: ${
        cause instanceof Error ? cause.message : cause
      }`,
      { cause },
    );
  }
}

/** Whether an error, or one that led to it, is a refused permission. */
function lacksPermission(error: unknown): boolean {
  // The loader chains one cause per place tried; a bound ends any circle.
  for (let depth = 0; depth < 32 && error instanceof Error; depth++) {
    if (error instanceof Deno.errors.NotCapable) return true;
    error = error.cause;
  }
  return false;
}

/** Folder of a file URL's file, as the system spells it. */
function folder(module: string): string {
  const path = decodeURIComponent(new URL(".", module).pathname).slice(0, -1);
  return Deno.build.os === "windows"
    ? path.slice(1).replaceAll("/", "\\")
    : path;
}

/** A path as an entry of a flag's list, where a comma is written twice. */
function listed(path: string): string {
  return path.replaceAll(",", ",,");
}
