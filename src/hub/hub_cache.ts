/**
 * The Hub's cache on disk, laid out as its own clients lay it out, so that what
 * one has pulled the others find: `models--org--repo/` with `blobs/<hash>`,
 * `snapshots/<commit>/<file>`, which are links into `blobs`, and
 * `refs/<revision>`, which names a commit. Called by `models.ts`.
 */

import { userCache } from "../user_cache.ts";

/** A revision of a repository. */
export interface Revision {
  /** `org/repo`. */
  readonly repo: string;
  /** A branch, tag or commit. */
  readonly revision: string;
}

/** A file of a snapshot. */
export interface CachedFile {
  /** Its path in the repository. */
  readonly file: string;
  /** Its size in bytes. */
  readonly bytes: number;
  /** The name of its blob: a hash, as the Hub has it; null where it is no link to one. */
  readonly hash: string | null;
}

/** One commit of a repository, as far as it was pulled. */
export interface Snapshot {
  /** `org/repo`. */
  readonly repo: string;
  /** The commit. */
  readonly commit: string;
  /** Revisions that name it. */
  readonly refs: readonly string[];
  /** The folder of its files. */
  readonly path: string;
}

/** A commit's name. */
export const COMMIT = /^[0-9a-f]{40}$/;
/** A link of a snapshot into `blobs`, as all clients write it. */
const BLOB = /^(?:\.\.\/)+blobs\/([^/]+)$/;

/**
 * The folder of the cache: `HF_HUB_CACHE`, `HF_HOME/hub`, or
 * `huggingface/hub` in the user's cache. Nothing is created.
 *
 * @throws {Error} If `HOME` is needed and unset.
 */
export function hubCacheDir(): string {
  const own = Deno.env.get("HF_HUB_CACHE")?.trim() ||
    Deno.env.get("HUGGINGFACE_HUB_CACHE")?.trim();
  return own ? own.replace(/\/+$/, "") : `${hubHome()}/hub`;
}

/** Where the Hub's clients keep the token that was logged in with. */
export function hubTokenPath(): string {
  return Deno.env.get("HF_TOKEN_PATH")?.trim() || `${hubHome()}/token`;
}

/** The variable that forbids the Hub's clients to ask it. */
export const OFFLINE_VARIABLE = "HF_HUB_OFFLINE";

/** Whether it does, by the words that Python's client takes for yes. */
export function isOffline(): boolean {
  const value = Deno.env.get(OFFLINE_VARIABLE)?.toUpperCase() ?? "";
  return ["1", "ON", "YES", "TRUE"].includes(value);
}

function hubHome(): string {
  const home = Deno.env.get("HF_HOME")?.trim();
  if (home) return home.replace(/\/+$/, "");
  return `${userCache()}/huggingface`;
}

/** The folder of a repository. */
export function repoFolder(cache: string, repo: string): string {
  return `${cache}/models--${repo.replace("/", "--")}`;
}

/** The snapshot that a revision names here; null where there is none. */
export async function findSnapshot(
  cache: string,
  { repo, revision }: Revision,
): Promise<Snapshot | null> {
  const found = await snapshotsOf(cache, repo);
  return found.find(({ commit, refs }) =>
    commit === revision || refs.includes(revision)
  ) ?? null;
}

/** Every snapshot of a repository that is here. */
async function snapshotsOf(
  cache: string,
  repo: string,
): Promise<Snapshot[]> {
  const folder = repoFolder(cache, repo);
  const refs = new Map<string, string>();
  for (const { file } of await filesBelow(`${folder}/refs`)) {
    const commit = (await Deno.readTextFile(`${folder}/refs/${file}`)).trim();
    refs.set(file, commit);
  }
  const snapshots: Snapshot[] = [];
  for (const commit of await namesIn(`${folder}/snapshots`)) {
    if (!COMMIT.test(commit)) continue;
    snapshots.push({
      repo,
      commit,
      refs: [...refs].flatMap(([ref, of]) => of === commit ? [ref] : []).sort(),
      path: `${folder}/snapshots/${commit}`,
    });
  }
  return snapshots;
}

/** Every snapshot of every repository that is here. */
export async function allSnapshots(cache: string): Promise<Snapshot[]> {
  const all: Snapshot[] = [];
  for (const name of await namesIn(cache)) {
    const [, org, repo] = /^models--(.+?)--(.+)$/.exec(name) ?? [];
    if (repo !== undefined) {
      all.push(...await snapshotsOf(cache, `${org}/${repo}`));
    }
  }
  return all;
}

/** The files of a snapshot, sorted; links that lead nowhere are left out. */
export async function snapshotFiles(
  { path }: Pick<Snapshot, "path">,
): Promise<CachedFile[]> {
  const files = await filesBelow(path);
  return files.sort((a, b) => a.file < b.file ? -1 : 1);
}

/** Puts a blob in its place in a snapshot; what was there before is replaced. */
export async function linkBlob(
  cache: string,
  repo: string,
  at: { commit: string; file: string; hash: string },
): Promise<void> {
  const path = `${repoFolder(cache, repo)}/snapshots/${at.commit}/${at.file}`;
  await Deno.mkdir(path.slice(0, path.lastIndexOf("/")), { recursive: true });
  const up = "../".repeat(at.file.split("/").length + 1);
  const staged = `${path}.${crypto.randomUUID()}`;
  await Deno.symlink(`${up}blobs/${at.hash}`, staged);
  await Deno.rename(staged, path);
}

/** Records the commit that a revision was when it was pulled. */
export async function writeRef(
  cache: string,
  { repo, revision }: Revision,
  commit: string,
): Promise<void> {
  if (revision === commit) return;
  const path = `${repoFolder(cache, repo)}/refs/${revision}`;
  await Deno.mkdir(path.slice(0, path.lastIndexOf("/")), { recursive: true });
  const staged = `${path}.${crypto.randomUUID()}`;
  await Deno.writeTextFile(staged, commit);
  await Deno.rename(staged, path);
}

/**
 * Removes files of a snapshot, the blobs that no other snapshot has, and what
 * is then empty.
 *
 * @returns The bytes that were freed.
 */
export async function removeFiles(
  cache: string,
  snapshot: Snapshot,
  files: readonly CachedFile[],
): Promise<number> {
  const folder = repoFolder(cache, snapshot.repo);
  let freed = 0;
  for (const { file, hash, bytes } of files) {
    const path = `${snapshot.path}/${file}`;
    // What a link to elsewhere leads to stays there.
    if (hash === null && (await Deno.lstat(path)).isFile) freed += bytes;
    await Deno.remove(path);
  }
  const used = new Set<string | null>();
  for (const other of await snapshotsOf(cache, snapshot.repo)) {
    for (const { hash } of await snapshotFiles(other)) used.add(hash);
  }
  for (const { hash, bytes } of files) {
    if (hash === null || used.has(hash)) continue;
    used.add(hash);
    await Deno.remove(`${folder}/blobs/${hash}`);
    freed += bytes;
  }
  if ((await snapshotFiles(snapshot)).length > 0) return freed;
  await Deno.remove(snapshot.path, { recursive: true });
  for (const ref of snapshot.refs) await Deno.remove(`${folder}/refs/${ref}`);
  if ((await snapshotsOf(cache, snapshot.repo)).length === 0) {
    await Deno.remove(folder, { recursive: true });
  }
  return freed;
}

async function namesIn(folder: string): Promise<string[]> {
  const names: string[] = [];
  try {
    for await (const { name } of Deno.readDir(folder)) names.push(name);
  } catch (error) {
    if (
      !(error instanceof Deno.errors.NotFound) &&
      !(error instanceof Deno.errors.NotADirectory)
    ) throw error;
  }
  return names.sort();
}

async function filesBelow(folder: string, inner = ""): Promise<CachedFile[]> {
  const files: CachedFile[] = [];
  for (const name of await namesIn(folder + inner && `${folder}/${inner}`)) {
    const file = inner === "" ? name : `${inner}/${name}`;
    const path = `${folder}/${file}`;
    let info: Deno.FileInfo;
    try {
      info = await Deno.stat(path);
    } catch (error) {
      if (error instanceof Deno.errors.NotFound) continue;
      throw error;
    }
    if (info.isDirectory) {
      files.push(...await filesBelow(folder, file));
    } else {
      const { isSymlink } = await Deno.lstat(path);
      const hash = isSymlink
        ? BLOB.exec(await Deno.readLink(path))?.[1] ?? null
        : null;
      files.push({ file, bytes: info.size, hash });
    }
  }
  return files;
}
