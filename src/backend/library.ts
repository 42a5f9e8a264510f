/**
 * Finds a native library, or builds it: an override, the checkout's build
 * folder, the user's cache, the compiler. Called by Backend.open.
 */

import { cacheDir } from "../user_cache.ts";
import {
  buildCpuLibrary,
  buildCudaLibrary,
  type KernelUse,
  type LibraryKind,
  libraryPrefix,
} from "./build.ts";
import { LibraryError } from "./error.ts";

/** How the library is found. */
export interface FindOptions {
  /** Called with one line before a build starts. */
  onBuild?: ((line: string) => void) | undefined;
  /** Ends a build. */
  signal?: AbortSignal | undefined;
  /** Whether a missing library may be built. @default `true` */
  build?: boolean;
  /** Gets what each kernel uses, after a CUDA build. */
  onKernels?: ((kernels: KernelUse[]) => void) | undefined;
  /** Builds even where there is a library; the variable is left aside. @default `false` */
  anew?: boolean;
}

/** A library that was found, and the places that had none. */
export interface FoundLibrary {
  /** Its full path. */
  path: string;
  /** What was tried before, each with why it did not serve. */
  tried: string[];
}

/** The environment variable that names a CPU library to use as it is. */
export const LIBRARY_VARIABLE = "WKV_LIB_CPU";

/** The environment variable that names a CUDA library to use as it is. */
export const CUDA_LIBRARY_VARIABLE = "WKV_LIB_CUDA";

const kinds = {
  cpu: { name: "CPU", variable: LIBRARY_VARIABLE, build: buildCpuLibrary },
  cuda: {
    name: "CUDA",
    variable: CUDA_LIBRARY_VARIABLE,
    build: buildCudaLibrary,
  },
};

/** The folders that hold built libraries, the one that builds go to first. */
export function buildFolders(): string[] {
  const folders: string[] = [];
  if (import.meta.url.startsWith("file:")) {
    folders.push(
      decodeURIComponent(new URL("../../build", import.meta.url).pathname),
    );
  }
  return [...folders, `${cacheDir()}/lib`];
}

/**
 * Finds the CPU library and builds it when there is none.
 *
 * @throws {LibraryError} If none was found and none could be built; it lists
 * what was tried.
 */
export function findCpuLibrary(
  options: FindOptions = {},
): Promise<FoundLibrary> {
  return findLibrary("cpu", options);
}

/**
 * Finds the CUDA library and builds it when there is none.
 *
 * @throws {LibraryError} As {@linkcode findCpuLibrary}.
 */
export function findCudaLibrary(
  options: FindOptions = {},
): Promise<FoundLibrary> {
  return findLibrary("cuda", options);
}

async function findLibrary(
  kind: LibraryKind,
  options: FindOptions,
): Promise<FoundLibrary> {
  const { name, variable, build } = kinds[kind];
  const tried: string[] = [];
  const named = options.anew ? undefined : Deno.env.get(variable);
  if (named) {
    try {
      return { path: await Deno.realPath(named), tried };
    } catch (cause) {
      throw new LibraryError(
        `No ${name} library where ${variable} says`,
        [`${named}: ${text(cause)}`],
        { cause },
      );
    }
  }
  if (!options.anew) tried.push(`${variable}: not set`);
  const prefix = await libraryPrefix(kind);
  const folders = buildFolders();
  for (const folder of options.anew ? [] : folders) {
    const newest = await newestIn(folder, prefix);
    if (newest !== null) return { path: newest, tried };
    tried.push(`${folder}: no ${prefix}*.so`);
  }
  if (options.build === false) {
    throw new LibraryError(`No ${name} library is built yet`, tried);
  }
  for (const folder of folders) {
    try {
      using _lock = await lockFolder(folder);
      // Another process may have built it while this one waited.
      const built = options.anew ? null : await newestIn(folder, prefix);
      const path = built ?? await build({
        folder,
        ...(options.onBuild ? { onStart: options.onBuild } : {}),
        ...(options.signal ? { signal: options.signal } : {}),
        ...(options.onKernels ? { onKernels: options.onKernels } : {}),
      });
      return { path, tried };
    } catch (cause) {
      options.signal?.throwIfAborted();
      tried.push(`building into ${folder}: ${text(cause)}`);
      if (!isUnwritable(cause)) {
        throw new LibraryError(`No ${name} library could be built`, tried, {
          cause,
        });
      }
    }
  }
  throw new LibraryError(`No folder takes the ${name} library`, tried);
}

/** Lets one process at a time build into a folder. */
async function lockFolder(folder: string): Promise<Deno.FsFile> {
  await Deno.mkdir(folder, { recursive: true });
  const file = await Deno.open(`${folder}/.lock`, {
    create: true,
    write: true,
  });
  await file.lock(true);
  return file;
}

async function newestIn(
  folder: string,
  prefix: string,
): Promise<string | null> {
  let newest: string | null = null;
  let newestTime = -1;
  try {
    for await (const { name } of Deno.readDir(folder)) {
      if (!name.startsWith(prefix) || !name.endsWith(".so")) continue;
      const { mtime } = await Deno.stat(`${folder}/${name}`);
      const time = mtime?.getTime() ?? 0;
      if (time > newestTime) [newest, newestTime] = [`${folder}/${name}`, time];
    }
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return null;
    if (error instanceof Deno.errors.NotADirectory) return null;
    throw error;
  }
  return newest;
}

function isUnwritable(error: unknown): boolean {
  return error instanceof Deno.errors.PermissionDenied ||
    error instanceof Deno.errors.NotADirectory ||
    error instanceof Deno.errors.NotFound ||
    (error instanceof Error && "code" in error && error.code === "EROFS");
}

function text(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
