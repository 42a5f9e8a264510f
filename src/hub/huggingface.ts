/**
 * Models named `hf:org/repo[@revision][:file or quant]`: their names, which of a
 * repository's files they mean, and how these come from the Hugging Face Hub;
 * called by `models.ts`.
 */

import {
  COMMIT,
  hubTokenPath,
  linkBlob,
  repoFolder,
  writeRef,
} from "./hub_cache.ts";
import { firstPart, partNames, partOfName } from "../formats/part_names.ts";
import { Meter, type Progress } from "./progress.ts";
import {
  checkSpace,
  delay,
  difference,
  type Expected,
  fileSize,
  messageOf,
  takeLock,
} from "./staging.ts";

/** A name on the Hub, taken apart. */
export interface HubName {
  /** `org/repo`. */
  readonly repo: string;
  /** A branch, tag or commit. */
  readonly revision: string;
  /** A GGUF file's path in the repository, or a quant such as `Q4_K_M`; null for what the repository has. */
  readonly file: string | null;
}

/** A file on the Hub. */
export interface HubFile extends Expected {
  /** Its path in the repository. */
  readonly file: string;
  /** Its hash, by which blobs are named. */
  readonly hash: string;
}

/** How the Hub is asked. */
export interface HubOptions {
  /** The Hub's address; `HF_ENDPOINT` or the public Hub by default. */
  hubUrl?: string | undefined;
  /** Stands in for the global `fetch`. */
  fetch?: typeof fetch | undefined;
  /** Milliseconds without a byte after which a connection is given up. @default `60000` */
  stallMs?: number | undefined;
  /** Milliseconds before the first of the further tries, doubled each time. @default `1000` */
  retryMs?: number | undefined;
  /** Called with the stages `download` and `verify`. */
  onProgress?: ((progress: Progress) => void) | undefined;
  /** Ends the requests when it aborts. */
  signal?: AbortSignal | undefined;
}

/** What these names look like, for messages. */
export const HUB_FORM = "hf:org/repo[@revision][:file.gguf or quant]";

/** The Hub's own rule for organisations and repositories. */
const PART = /^(?!.*(?:--|\.\.))\w(?:[\w.-]{0,94}\w)?$/;
/** Revisions and files: plain segments, none of which begins with a dot. */
const PATH = /^(?!.*\.\.)(?=.{1,200}$)\w[\w.+-]*(?:\/\w[\w.+-]*)*$/;
const QUANT = /^[A-Za-z]+\w*$/;
/** What a folder is loaded from, beside its weights. */
const FOLDER_FILES = [
  ...["config.json", "generation_config.json", "tokenizer.json"],
  ...["tokenizer_config.json", "special_tokens_map.json"],
  ...["chat_template.jinja", "model.safetensors.index.json"],
];
const WEIGHTS = /^model(?:-(\d{5})-of-(\d{5}))?\.safetensors$/;
/** Tries of one file, each going on where the one before ended. */
const TRIES = 5;
const REDIRECTS = 5;

/**
 * Takes a name apart. Nothing in it can lead out of the folder it is given.
 *
 * @throws {RangeError} If it is not of the form, or names a file that is no
 * GGUF file.
 */
export function parseHubName(name: string): HubName {
  const parts = /^hf:([^/@:]*)\/([^/@:]*)(?:@([^:]*))?(?::(.*))?$/s.exec(name);
  const [, org = "", repo = "", revision = "main", file = null] = parts ?? [];
  if (
    !PART.test(org) || !PART.test(repo) || !PATH.test(revision) ||
    (file !== null && !PATH.test(file))
  ) {
    throw new RangeError(
      `${JSON.stringify(name)} is not of the form ${HUB_FORM}`,
    );
  }
  if (file !== null && !file.endsWith(".gguf") && !QUANT.test(file)) {
    throw new RangeError(
      `${name}: ${file} is neither a .gguf file nor a quant`,
    );
  }
  return { repo: `${org}/${repo}`, revision, file };
}

/** Writes a name back, without the revision where it is `main`. */
export function formatHubName({ repo, revision, file }: HubName): string {
  return `hf:${repo}${revision === "main" ? "" : `@${revision}`}${
    file === null ? "" : `:${file}`
  }`;
}

/** A name means several files; its message lists them. */
export class SeveralFilesError extends RangeError {
  /** The class, for whoever prints the error. */
  override readonly name = "SeveralFilesError";
}

/** What a name means among the files of its repository. */
export interface Choice {
  /** The file to open; null for the folder. */
  readonly open: string | null;
  /** All that it needs. */
  readonly files: readonly string[];
}

/**
 * Which files a name means: the GGUF file or the quant that it names; else
 * safetensors with their config.json, or the only GGUF file. A model that is
 * split into several GGUF files is named by its first.
 *
 * @param listed Paths of the repository's files.
 * @throws {RangeError} If it means none, or several.
 */
export function chooseFiles(
  name: HubName,
  listed: readonly string[],
): Choice {
  const label = formatHubName(name);
  const ggufs = listed.filter((path) => path.endsWith(".gguf")).sort();
  const { file } = name;
  if (file === null) {
    const weights = listed.filter((path) => WEIGHTS.test(path));
    if (weights.length > 0 && listed.includes("config.json")) {
      const others = FOLDER_FILES.filter((path) => listed.includes(path));
      return { open: null, files: [...others, ...weights.sort()] };
    }
  }
  if (ggufs.length === 0) {
    throw new RangeError(
      file === null
        ? `${label}: The repository has neither a .gguf file nor config.json with model.safetensors`
        : `${label}: The repository has no .gguf file`,
    );
  }
  const named = file === null
    ? ggufs
    : file.endsWith(".gguf")
    ? ggufs.filter((path) => path === file)
    : ggufs.filter((path) => hasQuant(path, file));
  if (named.length === 0) {
    throw new RangeError(
      `${label}: The repository has no ${file}, but ${ggufs.join(", ")}`,
    );
  }
  // A model in several files is named by each of them, and opened by the first.
  const models = new Set(named.map(firstPart));
  if (models.size > 1) {
    throw new SeveralFilesError(
      `${label}: The repository has ${models.size} such .gguf files, name one of them: ${
        [...models].join(", ")
      }`,
    );
  }
  const open = [...models][0]!;
  const files = partNames(open);
  const missing = files.find((path) => !listed.includes(path));
  if (missing !== undefined) {
    throw new RangeError(
      `${label}: The model is split into ${files.length} files, and the repository has no ${missing}`,
    );
  }
  if (file !== null && file.endsWith(".gguf") && file !== open) {
    throw new RangeError(
      `${label}: This is part ${
        partOfName(file)!.part
      } of a model in ${files.length} files, name the first: ${open}`,
    );
  }
  return { open, files };
}

/** Whether a file's name has the quant as a part of its own. */
function hasQuant(path: string, quant: string): boolean {
  const parts = path.split("/").at(-1)!.replace(/\.gguf$/, "").split(/[-.]/);
  return parts.some((part) => part.toLowerCase() === quant.toLowerCase());
}

/** Whether the files of a snapshot are all that a choice needs. */
export function isWhole(choice: Choice, listed: readonly string[]): boolean {
  if (choice.open !== null) return listed.includes(choice.open);
  const shards = listed.flatMap((path) => {
    const of = WEIGHTS.exec(path)?.[2];
    return of === undefined ? [] : [Number(of)];
  });
  return listed.includes("model.safetensors") || (shards.length > 0 &&
    shards.length === shards[0] &&
    listed.includes("model.safetensors.index.json"));
}

/** What the Hub says of a revision. */
export interface HubRevision {
  /** The commit that it is now. */
  readonly commit: string;
  /** Its files. */
  readonly files: readonly HubFile[];
}

/**
 * Asks the Hub what a revision is, and for the sizes and hashes of its files.
 *
 * @throws {Error} If the Hub can't be reached, refuses or makes no sense.
 */
export async function askHub(
  name: HubName,
  options: HubOptions,
): Promise<HubRevision> {
  const label = formatHubName(name);
  const access = await hubAccess(options);
  const revision = encodeURIComponent(name.revision);
  const path = `api/models/${name.repo}/revision/${revision}`;
  const { sha } = await onHub(name, options, async () => {
    const response = await request(access, path, {}, options);
    return await response.json() as { sha?: unknown };
  });
  if (typeof sha !== "string" || !COMMIT.test(sha)) {
    throw new Error(`${label}: The Hub names no commit of this revision`);
  }
  const files: HubFile[] = [];
  await onHub(name, options, async () => {
    const { listFiles } = await import("@huggingface/hub");
    const entries = listFiles({
      repo: name.repo,
      revision: sha,
      recursive: true,
      fetch: (input, init) =>
        request(access, String(input), init ?? {}, options),
      hubUrl: access.url,
    });
    for await (const { type, path, size, oid, lfs } of entries) {
      if (type !== "file") continue;
      const sha256 = lfs?.oid.replace(/^sha256:/, "").toLowerCase() ?? null;
      const hash = sha256 ?? oid?.toLowerCase() ?? "";
      if (!/^[0-9a-f]{40}(?:[0-9a-f]{24})?$/.test(hash)) continue;
      files.push({
        file: path,
        bytes: lfs?.size ?? size,
        sha256,
        ...(sha256 === null ? { gitSha1: hash } : {}),
        hash,
      });
    }
  });
  return { commit: sha, files };
}

/**
 * Gets files of a commit into the cache, checked against what the Hub said of
 * them. A file that was begun goes on where it ended; blobs that are there are
 * verified.
 *
 * @throws {Error} If the Hub can't be reached, or a file does not come whole.
 */
export async function pullFiles(
  cache: string,
  name: HubName,
  { commit, files }: HubRevision,
  options: HubOptions,
): Promise<void> {
  for (const { file } of files) {
    // A name from the Hub becomes a path here: it obeys the rule of typed ones.
    if (!PATH.test(file)) {
      throw new RangeError(
        `${formatHubName(name)}: The Hub lists ${
          JSON.stringify(file)
        }, which is no path below a folder`,
      );
    }
  }
  const folder = repoFolder(cache, name.repo);
  await Deno.mkdir(`${folder}/blobs`, { recursive: true });
  // Python's client locks blobs; two of us would write to one file.
  using lock = await Deno.open(`${folder}/.weightedkv.lock`, {
    create: true,
    write: true,
  });
  await takeLock(lock, {
    signal: options.signal,
    onWait: () =>
      new Meter(options.onProgress, "download", name.repo, null).say(
        `Another pull of ${name.repo} is running: waiting for it`,
      ),
  });
  const access = await hubAccess(options);
  const total = files.reduce((sum, { bytes }) => sum + (bytes ?? 0), 0);
  const label = formatHubName(name);
  await checkSpace(folder, total);
  let before = 0;
  for (const [i, one] of files.entries()) {
    const blob = `${folder}/blobs/${one.hash}`;
    const bytes = one.bytes ?? 0, count = files.length;
    const alone = count === 1;
    const own = alone
      ? `${label}${name.file === one.file ? "" : `:${one.file}`}`
      : `${label}: ${one.file} (${i + 1} of ${count})`;
    const meterOf = (stage: "download" | "verify", adds: boolean): Meter =>
      alone
        ? new Meter(options.onProgress, stage, own, bytes)
        : new Meter(options.onProgress, stage, label, bytes, {
          ...{ name: one.file, index: i + 1, count, all: total },
          before: adds ? before : before + bytes,
          counts: adds,
        });
    if (!await isVerified(blob, one, own, meterOf, options)) {
      const wanted = { name, commit, file: one, blob, label: own };
      await download(access, wanted, meterOf, options);
    }
    before += bytes;
    await linkBlob(cache, name.repo, { commit, ...one });
  }
  await writeRef(cache, name, commit);
}

/** Makes the meter of a stage of one file; `adds`: what is done counts as pulled. */
type MeterOf = (stage: "download" | "verify", adds: boolean) => Meter;

/** Whether a blob is there and right; one that is not is removed. */
async function isVerified(
  blob: string,
  expected: HubFile,
  label: string,
  meterOf: MeterOf,
  { signal }: HubOptions,
): Promise<boolean> {
  const meter = meterOf("verify", true);
  try {
    const wrong = await difference(blob, expected, { meter, signal });
    if (wrong === null) {
      meter.done(expected.bytes ?? 0, `${label}: already there, hash verified`);
      return true;
    }
    await Deno.remove(blob);
    meter.say(`Removed ${blob} (${wrong}): pulling it again`);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
  return false;
}

/** One file of a commit, and where it goes. */
interface Wanted {
  name: HubName;
  commit: string;
  file: HubFile;
  blob: string;
  /** What it is called in messages. */
  label: string;
}

async function download(
  access: HubAccess,
  { name, commit, file: expected, blob, label }: Wanted,
  meterOf: MeterOf,
  options: HubOptions,
): Promise<void> {
  const { signal, retryMs = 1000 } = options;
  const part = `${blob}.incomplete`;
  const path = `${name.repo}/resolve/${commit}/${
    expected.file.split("/").map(encodeURIComponent).join("/")
  }`;
  const bytes = expected.bytes ?? 0;
  const loading = meterOf("download", true);
  let resumed = (await fileSize(part) ?? 0) > 0;
  for (let tries = 1;; tries++) {
    try {
      await fetchPart(access, path, part, bytes, options, loading);
    } catch (cause) {
      signal?.throwIfAborted();
      if (cause instanceof Deno.errors.NotCapable) throw cause;
      const final = cause instanceof HubError && cause.status < 500 &&
        cause.status !== 429;
      if (!final && tries < TRIES) {
        await delay(retryMs * 2 ** (tries - 1), signal);
        resumed = true;
        continue;
      }
      const have = await fileSize(part) ?? 0;
      throw new Error(
        `${label}: ${
          messageOf(cause)
        }; ${have} of its ${bytes} bytes are here, and the next pull goes on from there`,
        { cause },
      );
    }
    loading.done(bytes);
    const meter = meterOf("verify", false);
    const wrong = await difference(part, expected, { meter, signal });
    if (wrong === null) break;
    await Deno.remove(part);
    // What an earlier pull left may have been of no use.
    if (resumed) {
      resumed = false;
      continue;
    }
    throw new Error(`${label}: ${wrong}; what had come was removed`);
  }
  await Deno.rename(part, blob);
}

/** Adds to `part` what it lacks. */
async function fetchPart(
  access: HubAccess,
  path: string,
  part: string,
  bytes: number,
  options: HubOptions,
  meter: Meter,
): Promise<void> {
  const { signal, stallMs = 60_000 } = options;
  let have = await fileSize(part) ?? 0;
  if (have > bytes) await Deno.remove(part), have = 0;
  if (have === bytes && bytes > 0) return meter.at(have);
  const headers: Record<string, string> = have > 0
    ? { range: `bytes=${have}-` }
    : {};
  const response = await request(access, path, { headers }, options);
  const goesOn = response.status === 206 &&
    response.headers.get("content-range")?.startsWith(`bytes ${have}-`);
  if (!goesOn) have = 0;
  using file = await Deno.open(part, {
    create: true,
    write: true,
    truncate: !goesOn,
    append: goesOn === true,
  });
  const reader = response.body?.getReader();
  try {
    while (reader !== undefined) {
      signal?.throwIfAborted();
      const { done, value } = await within(reader.read(), stallMs, signal);
      if (done) break;
      have += value.length;
      // A server with more to say is not let fill the disk.
      if (have > bytes) {
        throw new Error(
          `The data does not end after the expected ${bytes} bytes`,
        );
      }
      for (let at = 0; at < value.length;) {
        at += await file.write(value.subarray(at));
      }
      meter.at(have);
    }
    await file.sync();
  } finally {
    reader?.cancel().catch(() => {});
  }
  if (have < bytes) {
    throw new Error(`The data ends after ${have} of ${bytes} bytes`);
  }
}

/** Waits for a part of an answer, not for ever. */
async function within<T>(
  wait: Promise<T>,
  ms: number,
  signal: AbortSignal | undefined,
): Promise<T> {
  const done = new AbortController();
  const onAbort = (): void => done.abort();
  signal?.addEventListener("abort", onAbort, { once: true });
  try {
    return await Promise.race([
      wait,
      delay(ms, done.signal).then(() => {
        throw new Error(`The Hub sent nothing for ${ms / 1000} s`);
      }, (): T => {
        signal?.throwIfAborted();
        return undefined as never;
      }),
    ]);
  } finally {
    signal?.removeEventListener("abort", onAbort);
    done.abort();
  }
}

// ---- requests ----

/** Where the Hub is, and who asks. */
interface HubAccess {
  url: string;
  token: string | null;
}

/** An answer that is an error. */
class HubError extends Error {
  override readonly name = "HubError";
  readonly status: number;
  constructor(status: number) {
    super(`HTTP ${status}`);
    this.status = status;
  }
}

async function hubAccess(options: HubOptions): Promise<HubAccess> {
  const { HUB_URL } = await import("@huggingface/hub");
  const url = options.hubUrl ??
    (Deno.env.get("HF_ENDPOINT")?.trim() || HUB_URL);
  if (!/^https?:\/\/\S+$/.test(url)) {
    throw new RangeError(
      `The Hub's address is ${
        JSON.stringify(url)
      }, it should be an http(s) one`,
    );
  }
  const token = Deno.env.get("HF_TOKEN")?.trim() || await loggedIn();
  if (token !== null && !token.startsWith("hf_")) {
    throw new RangeError("HF_TOKEN is not a token of the Hub: they begin hf_");
  }
  return { url: url.replace(/\/+$/, ""), token };
}

/** The token that a client of the Hub was logged in with; null where it can't be read. */
async function loggedIn(): Promise<string | null> {
  try {
    return (await Deno.readTextFile(hubTokenPath())).trim() || null;
  } catch {
    return null;
  }
}

/**
 * One request. The token goes to the Hub's own host only, wherever it sends us.
 *
 * @throws {HubError} The answer is an error.
 */
async function request(
  { url, token }: HubAccess,
  path: string,
  init: RequestInit,
  options: HubOptions,
): Promise<Response> {
  const { signal, fetch: get = fetch, stallMs = 60_000 } = options;
  let target = new URL(path, `${url}/`);
  for (let hops = 0;; hops++) {
    const headers = new Headers(init.headers);
    headers.delete("authorization");
    if (token !== null && target.origin === new URL(url).origin) {
      headers.set("authorization", `Bearer ${token}`);
    }
    const response = await within(
      get(target, {
        ...init,
        headers,
        redirect: "manual",
        ...(signal === undefined ? {} : { signal }),
      }),
      stallMs,
      signal,
    );
    const location = response.headers.get("location");
    if (response.status >= 300 && response.status < 400 && location !== null) {
      await response.body?.cancel();
      if (hops >= REDIRECTS) throw new Error("The Hub redirects without end");
      target = new URL(location, target);
      if (!/^https?:$/.test(target.protocol)) {
        throw new Error("The Hub redirects to no web address");
      }
      continue;
    }
    if (response.ok) return response;
    await response.body?.cancel();
    throw new HubError(response.status);
  }
}

/** Words the errors of questions to the Hub. */
async function onHub<T>(
  name: HubName,
  options: HubOptions,
  ask: () => Promise<T>,
): Promise<T> {
  const { signal } = options;
  signal?.throwIfAborted();
  try {
    return await ask();
  } catch (cause) {
    signal?.throwIfAborted();
    if (cause instanceof Deno.errors.NotCapable) throw cause;
    const status = cause instanceof HubError ? cause.status : 0;
    const why = status === 401 || status === 403 || status === 404
      ? `The Hub has no such repository or revision, or keeps it from you (HTTP ${status}); check the name, or set HF_TOKEN to a token that may read it`
      : status === 429
      ? "The Hub asks to wait before the next request (HTTP 429)"
      : `The Hub could not be asked (${messageOf(cause)})`;
    throw new Error(`${formatHubName(name)}: ${why}`, { cause });
  }
}
