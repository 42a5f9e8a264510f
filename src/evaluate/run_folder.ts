/** RunFolder: what a run leaves behind, and goes on from: a manifest, its results line by line, a report; used by perplexity, eval and verify. */

import { createHash } from "node:crypto";
import { ABI_VERSION } from "../backend/symbols.ts";
import type { Model } from "../model.ts";

/** A file by its contents. */
export interface Fingerprint {
  /** Its name, or a text's path as it was given. */
  name: string;
  /** Its hash, 64 hexadecimal digits; of a folder that of its files' hashes. */
  sha256: string;
  /** Its size. */
  bytes: number;
}

/** What a run was: `manifest.json`. */
export interface Manifest {
  /** The command that made it. */
  command: "perplexity" | "eval";
  /** Its options, the defaults filled in. */
  options: Record<string, unknown>;
  /** The model. */
  model: Fingerprint;
  /** The text; null for generated ones. */
  text: Fingerprint | null;
  /** The package, the runtime, the native library's ABI and sources. */
  versions: { weightedkv: string; deno: string; abi: number; kernels: string };
  /** What it ran on. */
  device: string;
  /** When it began. */
  created: string;
}

const MANIFEST = "manifest.json";
const RESULTS = "results.jsonl";

/** A folder with a manifest and one result a line. */
export class RunFolder<T> {
  /** Where it is. */
  readonly path: string;
  /** What the run was. */
  readonly manifest: Manifest;
  /** Every result so far. */
  readonly items: T[];

  private constructor(path: string, manifest: Manifest, items: T[]) {
    this.path = path;
    this.manifest = manifest;
    this.items = items;
  }

  /**
   * Makes a folder for a run, or goes on with the one that is there.
   *
   * @throws {RangeError} The folder holds a run that differs, or something else.
   */
  static async open<T>(
    path: string,
    manifest: Manifest,
  ): Promise<RunFolder<T>> {
    await Deno.mkdir(path, { recursive: true });
    const there = await readManifest(path);
    if (there === null) {
      for await (const { name } of Deno.readDir(path)) {
        throw new RangeError(
          `${path}: The folder must be empty or hold a run: it has ${
            JSON.stringify(name)
          } and no ${MANIFEST}`,
        );
      }
      await replace(
        `${path}/${MANIFEST}`,
        `${JSON.stringify(manifest, null, 2)}\n`,
      );
      return new RunFolder(path, manifest, []);
    }
    const differs = difference(manifest, there);
    if (differs !== null) {
      throw new RangeError(
        `${path}: The folder holds another run: ${differs}; name a new folder`,
      );
    }
    return new RunFolder(path, there, await readResults<T>(path, true));
  }

  /**
   * Opens a run that is there.
   *
   * @throws {SyntaxError} One of its files is not what a run leaves.
   */
  static async read<T>(path: string): Promise<RunFolder<T>> {
    const manifest = await readManifest(path);
    if (manifest === null) {
      throw new Deno.errors.NotFound(
        `${path}: There is no ${MANIFEST}; name the folder of a run`,
      );
    }
    return new RunFolder(path, manifest, await readResults<T>(path, false));
  }

  /** Keeps results: they are on disk when this returns. */
  async add(items: readonly T[]): Promise<void> {
    const lines = items.map((item) => `${JSON.stringify(item)}\n`).join("");
    using file = await Deno.open(`${this.path}/${RESULTS}`, {
      create: true,
      append: true,
    });
    const bytes = new TextEncoder().encode(lines);
    for (let at = 0; at < bytes.length;) {
      at += await file.write(bytes.subarray(at));
    }
    await file.sync();
    this.items.push(...items);
  }

  /** Writes a file beside them. */
  async write(name: string, text: string): Promise<void> {
    await replace(`${this.path}/${name}`, text);
  }
}

/** What a run on this model is, but for its command, options and text. */
export async function describeRun(
  model: Model,
): Promise<Pick<Manifest, "model" | "versions" | "device" | "created">> {
  const config = await import("../../deno.json", { with: { type: "json" } });
  return {
    model: await modelFingerprint(model),
    versions: {
      weightedkv: config.default.version,
      deno: Deno.version.deno,
      abi: ABI_VERSION,
      kernels: model.backend.sourceHash,
    },
    device: model.backend.description,
    created: new Date().toISOString(),
  };
}

/** The fingerprint of a text. */
export function textFingerprint(name: string, text: string): Fingerprint {
  const bytes = new TextEncoder().encode(text);
  return {
    name,
    sha256: createHash("sha256").update(bytes).digest("hex"),
    bytes: bytes.length,
  };
}

async function modelFingerprint({ name, path }: Model): Promise<Fingerprint> {
  const { isDirectory } = await Deno.stat(path);
  if (!isDirectory) return { name, ...await hashFile(path) };
  const hash = createHash("sha256");
  let bytes = 0;
  const names: string[] = [];
  for await (const entry of Deno.readDir(path)) {
    if (/\.(json|safetensors)$/.test(entry.name)) names.push(entry.name);
  }
  for (const file of names.sort()) {
    const one = await hashFile(`${path}/${file}`);
    hash.update(`${file} ${one.sha256}\n`);
    bytes += one.bytes;
  }
  return { name, sha256: hash.digest("hex"), bytes };
}

async function hashFile(
  path: string,
): Promise<Pick<Fingerprint, "sha256" | "bytes">> {
  using file = await Deno.open(path);
  const hash = createHash("sha256");
  const chunk = new Uint8Array(1 << 20);
  let bytes = 0;
  for (let n; (n = await file.read(chunk)) !== null; bytes += n) {
    hash.update(chunk.subarray(0, n));
  }
  return { sha256: hash.digest("hex"), bytes };
}

/** The first field in which two manifests differ, but for their dates; null when none does. */
export function difference(wanted: Manifest, there: Manifest): string | null {
  const walk = (a: unknown, b: unknown, at: string): string | null => {
    if (isRecord(a) && isRecord(b)) {
      for (const key of new Set([...Object.keys(a), ...Object.keys(b)])) {
        const found = walk(a[key], b[key], at === "" ? key : `${at}.${key}`);
        if (found !== null) return found;
      }
      return null;
    }
    const [now, then] = [JSON.stringify(a), JSON.stringify(b)];
    return now === then ? null : `${at} is ${then} there and ${now} now`;
  };
  return walk({ ...wanted, created: "" }, { ...there, created: "" }, "");
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

async function readManifest(path: string): Promise<Manifest | null> {
  let text: string;
  try {
    text = await Deno.readTextFile(`${path}/${MANIFEST}`);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return null;
    throw error;
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new SyntaxError(
      `${path}/${MANIFEST}: Found what is not JSON, expected a run's manifest`,
      { cause },
    );
  }
  const wanted = ["command", "options", "model", "versions", "device"];
  const missing = wanted.find((key) => !isRecord(value) || !(key in value));
  if (missing === undefined) return value as Manifest;
  throw new SyntaxError(
    `${path}/${MANIFEST}: Found no "${missing}", expected a run's manifest`,
  );
}

/** The results; a last line that was cut off is dropped, from the file too when the run goes on. */
async function readResults<T>(path: string, mend: boolean): Promise<T[]> {
  const file = `${path}/${RESULTS}`;
  let text: string;
  try {
    text = await Deno.readTextFile(file);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return [];
    throw error;
  }
  const good = text.slice(0, text.lastIndexOf("\n") + 1);
  if (mend && good !== text) await replace(file, good);
  return good.split("\n").slice(0, -1).map((line, i) => {
    try {
      return JSON.parse(line) as T;
    } catch (cause) {
      throw new SyntaxError(
        `${file}: line ${i + 1}: Found what is not JSON, expected a result`,
        { cause },
      );
    }
  });
}

/** Writes a file whole or not at all. */
async function replace(path: string, text: string): Promise<void> {
  const part = `${path}.part`;
  await Deno.writeTextFile(part, text);
  await Deno.rename(part, path);
}
