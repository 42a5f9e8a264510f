/**
 * Where the user's cache lies; asked by everything that keeps files between two
 * runs.
 */

/** This project's folder in the user's cache, see {@linkcode userCache}. */
export function cacheDir(): string {
  return `${userCache()}/weightedkv`;
}

/**
 * The user's cache: `$XDG_CACHE_HOME`, or `~/.cache` when that is unset, empty
 * or (as its specification demands) not absolute. Nothing is created.
 *
 * @throws {Error} If `HOME` is needed and unset.
 */
export function userCache(): string {
  const xdg = Deno.env.get("XDG_CACHE_HOME") ?? "";
  if (xdg.startsWith("/")) return xdg.replace(/\/+$/, "");
  const home = Deno.env.get("HOME") ?? "";
  if (!home.startsWith("/")) {
    throw new Error(
      "No folder for pulled models: set XDG_CACHE_HOME or HOME to an absolute path",
    );
  }
  return `${home.replace(/\/+$/, "")}/.cache`;
}

/** The folder of pulled models inside a cache folder. */
export function modelsDir(cache: string = cacheDir()): string {
  return `${cache}/models`;
}
