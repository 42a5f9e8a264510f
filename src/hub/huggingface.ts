/**
 * Models named `hf:org/repo[@revision][:file]`: their names, and their files on
 * the Hugging Face Hub; called by `models.ts`.
 */

import type { ListFileEntry } from "@huggingface/hub";
import { Meter, type Progress } from "./progress.ts";
import {
  checkSpace,
  type Expected,
  messageOf,
  writeChecked,
} from "./staging.ts";

/** A name on the Hub, taken apart. */
export interface HubName {
  /** `org/repo`. */
  readonly repo: string;
  /** A branch, tag or commit. */
  readonly revision: string;
  /** Path in the repository; null for its only GGUF file. */
  readonly file: string | null;
}

/** A file on the Hub that can be pulled. */
export interface HubFile extends Expected {
  /** Where it is. */
  readonly name: HubName & { readonly file: string };
}

/** How the Hub is asked. */
export interface HubOptions {
  /** The Hub's address; `HF_ENDPOINT` or the public Hub by default. */
  hubUrl?: string | undefined;
  /** Stands in for the global `fetch`. */
  fetch?: typeof fetch | undefined;
  /** Called with the stage `download`. */
  onProgress?: ((progress: Progress) => void) | undefined;
  /** Ends the requests when it aborts. */
  signal?: AbortSignal | undefined;
}

/** What these names look like, for messages. */
export const HUB_FORM = "hf:org/repo[@revision][:file.gguf]";

/** The Hub's own rule for organisations and repositories. */
const PART = /^(?!.*(?:--|\.\.))\w(?:[\w.-]{0,94}\w)?$/;
/** Revisions and files: plain segments, none of which begins with a dot. */
const PATH = /^(?!.*\.\.)(?=.{1,200}$)\w[\w.+-]*(?:\/\w[\w.+-]*)*$/;

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
  if (file !== null && !file.endsWith(".gguf")) {
    throw new RangeError(`${name}: ${file} is not a .gguf file`);
  }
  return { repo: `${org}/${repo}`, revision, file };
}

/** Writes a name back, without the revision where it is `main`. */
export function formatHubName({ repo, revision, file }: HubName): string {
  return `hf:${repo}${revision === "main" ? "" : `@${revision}`}${
    file === null ? "" : `:${file}`
  }`;
}

/**
 * The folder of a name's repository and revision, relative to the models
 * folder: names of files repeat across repositories.
 */
export function hubFolder({ repo, revision }: HubName): string {
  return `hf/${repo}/${encodeURIComponent(revision)}`;
}

/**
 * Turns a path below the models folder back into its name; null where it is
 * none of a Hub file.
 */
export function hubNameOf(path: string): string | null {
  const [hf, org, repo, revision, ...file] = path.split("/");
  if (hf !== "hf" || revision === undefined || file.length === 0) return null;
  try {
    const name = formatHubName({
      repo: `${org}/${repo}`,
      revision: decodeURIComponent(revision),
      file: file.join("/"),
    });
    parseHubName(name);
    return name;
  } catch {
    return null;
  }
}

/**
 * Asks the Hub which file a name means, and for its size and hash.
 *
 * @throws {RangeError} If the repository has no such file, or no file is named
 * and it has none or several.
 * @throws {Error} If the Hub can't be reached or refuses.
 */
export async function findHubFile(
  name: HubName,
  options: HubOptions,
): Promise<HubFile> {
  const files = new Map<string, ListFileEntry>();
  await onHub(name, options, async ({ listFiles }, common) => {
    // listFiles puts the revision into its address as it is.
    const revision = encodeURIComponent(name.revision);
    for await (
      const entry of listFiles({ ...common, revision, recursive: true })
    ) {
      if (entry.type === "file" && entry.path.endsWith(".gguf")) {
        files.set(entry.path, entry);
      }
    }
  });
  const label = formatHubName(name);
  const listed = [...files.keys()].join(", ");
  const [only] = files.keys();
  if (only === undefined) {
    throw new RangeError(`${label}: The repository has no .gguf file`);
  }
  if (name.file === null && files.size > 1) {
    throw new RangeError(
      `${label}: The repository has ${files.size} .gguf files, name one of them: ${listed}`,
    );
  }
  const file = name.file ?? only;
  const entry = files.get(file);
  if (entry === undefined) {
    throw new RangeError(
      `${label}: The repository has no ${file}, but ${listed}`,
    );
  }
  // A name from the Hub becomes a path here: it obeys the rule of typed ones.
  const full = { ...name, file };
  parseHubName(formatHubName(full));
  const oid = entry.lfs?.oid.replace(/^sha256:/, "").toLowerCase() ?? "";
  return {
    name: full,
    bytes: entry.lfs?.size ?? entry.size,
    sha256: /^[0-9a-f]{64}$/.test(oid) ? oid : null,
  };
}

/**
 * Downloads a file into `folder`, checked against what the Hub said of it, and
 * synced.
 *
 * @param folder An empty folder; the caller removes it.
 * @returns The path of the file in `folder`.
 * @throws {Error} If the Hub can't be reached, or the file does not come whole.
 */
export async function pullFromHub(
  file: HubFile,
  folder: string,
  options: HubOptions,
): Promise<string> {
  const label = formatHubName(file.name);
  if (file.bytes !== null) await checkSpace(folder, file.bytes);
  const stream = await onHub(file.name, options, async (hub, common) => {
    const blob = await hub.downloadFile({
      ...common,
      path: file.name.file,
      revision: file.name.revision,
      // Plain HTTP: one request, whose bytes are hashed as they come.
      xet: false,
    });
    return blob?.stream();
  });
  if (stream === undefined) {
    throw new Error(`${label}: The Hub lists the file but does not have it`);
  }
  const path = `${folder}/model.gguf`;
  await writeChecked(path, stream, file, {
    label,
    meter: new Meter(options.onProgress, "download", label, file.bytes),
    signal: options.signal,
  });
  return path;
}

type Hub = typeof import("@huggingface/hub");
interface Common {
  repo: string;
  fetch: typeof fetch;
  hubUrl?: string;
  accessToken?: string;
}

/** Loads the Hub's client, which nothing else needs, and words its errors. */
async function onHub<T>(
  name: HubName,
  options: HubOptions,
  ask: (hub: Hub, common: Common) => Promise<T>,
): Promise<T> {
  const { signal, fetch: get = fetch } = options;
  signal?.throwIfAborted();
  const hubUrl = options.hubUrl ??
    (Deno.env.get("HF_ENDPOINT")?.trim() || null);
  if (hubUrl !== null && !/^https?:\/\/\S+$/.test(hubUrl)) {
    throw new RangeError(
      `The Hub's address is ${
        JSON.stringify(hubUrl)
      }, it should be an http(s) one`,
    );
  }
  const accessToken = Deno.env.get("HF_TOKEN")?.trim() || null;
  if (accessToken !== null && !accessToken.startsWith("hf_")) {
    throw new RangeError("HF_TOKEN is not a token of the Hub: they begin hf_");
  }
  const hub = await import("@huggingface/hub");
  try {
    return await ask(hub, {
      repo: name.repo,
      fetch: (input, init) =>
        get(input, signal === undefined ? init : { ...init, signal }),
      ...(hubUrl === null ? {} : { hubUrl: hubUrl.replace(/\/+$/, "") }),
      ...(accessToken === null ? {} : { accessToken }),
    });
  } catch (cause) {
    signal?.throwIfAborted();
    if (cause instanceof Deno.errors.NotCapable) throw cause;
    const status = cause instanceof hub.HubApiError ? cause.statusCode : 0;
    const why = status === 401 || status === 403 || status === 404
      ? `The Hub has no such repository or revision, or keeps it from you (HTTP ${status}); check the name, or set HF_TOKEN to a token that may read it`
      : `The Hub could not be asked (${messageOf(cause)})`;
    throw new Error(`${formatHubName(name)}: ${why}`, { cause });
  }
}
