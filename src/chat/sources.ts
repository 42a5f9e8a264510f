/** Where a model keeps its chat templates: a GGUF file's metadata, or files of a Hugging Face folder; used by model files. */

import { ConfigFile } from "../formats/config.ts";
import { DataFile } from "../formats/data_file.ts";
import { FormatError } from "../formats/error.ts";
import type { GgufFile } from "../formats/gguf.ts";

/** A model's templates by name; the one without a name is `default`. */
export type ChatTemplates = ReadonlyMap<string, TemplateSource>;

/** A template's text, and where it was found. */
export interface TemplateSource {
  /** The text. */
  readonly source: string;
  /** File and field, for messages. */
  readonly origin: string;
}

const KEY = "tokenizer.chat_template";

/** The most bytes of a template's file. */
const MOST_BYTES = 1024 * 1024;

/** The templates of a GGUF file. */
export function ggufChatTemplates(
  file: Pick<GgufFile, "path" | "metadata" | "string">,
): ChatTemplates {
  const found = new Map<string, TemplateSource>();
  for (const key of file.metadata.keys()) {
    if (key !== KEY && !key.startsWith(`${KEY}.`)) continue;
    found.set(key.slice(KEY.length + 1) || "default", {
      source: file.string(key),
      origin: `${file.path}: ${key}`,
    });
  }
  return found;
}

/**
 * The templates of a folder: chat_template.jinja, and those of
 * tokenizer_config.json, which it comes before.
 *
 * @throws {FormatError} A file is malformed.
 */
export async function folderChatTemplates(
  folder: string,
): Promise<ChatTemplates> {
  const found = new Map<string, TemplateSource>();
  const path = `${folder}/tokenizer_config.json`;
  const config = await absent(ConfigFile.open(path));
  for (const [name, source] of config === null ? [] : listed(config)) {
    found.set(name, { source, origin: `${path}: chat_template` });
  }
  const jinja = `${folder}/chat_template.jinja`;
  const source = await absent(readTemplate(jinja));
  if (source !== null) found.set("default", { source, origin: jinja });
  return found;
}

/** What tokenizer_config.json has: one template, or several with names. */
function listed(config: ConfigFile): [name: string, source: string][] {
  const value = config.value("chat_template") ?? [];
  if (typeof value === "string") return [["default", value]];
  const pairs = Array.isArray(value)
    ? value.map((item) =>
      item instanceof Map ? [item.get("name"), item.get("template")] : []
    )
    : [[]];
  return pairs.map(([name, source]) => {
    if (typeof name === "string" && typeof source === "string") {
      return [name, source];
    }
    throw config.error(
      "chat_template",
      "a text, or a list of objects with name and template",
    );
  });
}

async function readTemplate(path: string): Promise<string> {
  using file = await DataFile.open(path, "chat template");
  if (file.size > MOST_BYTES) {
    throw new FormatError(
      path,
      "file",
      `Found ${file.size} bytes, expected at most ${MOST_BYTES}`,
    );
  }
  const bytes = new Uint8Array(file.size);
  await file.read(0, bytes);
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch (cause) {
    throw new FormatError(path, "file", "Not valid UTF-8, expected UTF-8", {
      cause,
    });
  }
}

/** A file's content, or null where there is none. */
async function absent<T>(reading: Promise<T>): Promise<T | null> {
  try {
    return await reading;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return null;
    throw error;
  }
}
