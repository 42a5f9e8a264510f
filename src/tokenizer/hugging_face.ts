/** The tokenizer of a Hugging Face folder: tokenizer.json, with what tokenizer_config.json and generation_config.json say of special tokens; opened by model loading. */

import { ConfigFile } from "../formats/config.ts";
import type { Bpe } from "./bpe.ts";
import { NativeEncoder } from "./native_encoder.ts";
import type { Tokenizer } from "./tokenizer.ts";
import { readTokenizerJson } from "./tokenizer_json.ts";
import {
  type SpecialTokens,
  VocabularyTokenizer,
} from "./vocabulary_tokenizer.ts";

/** What the model says of its tokens. */
export interface FolderOptions {
  /** Rows of the embedding: every id is below. */
  rows: number;
  /** Ids that end generation by config.json. @default `[]` */
  endTokens?: readonly number[] | undefined;
  /** Makes the encoder of what was checked. @default `NativeEncoder.open` */
  native?: typeof NativeEncoder.open;
}

/**
 * Opens the tokenizer of a folder. Its vocabulary is checked whole before the
 * native addon is loaded.
 *
 * @param folder The folder.
 * @param options What the model says.
 * @returns The tokenizer, to be closed by its owner; null when the folder has
 * no tokenizer.json.
 * @throws {FormatError} When a file is malformed or of a kind that is not
 * known.
 * @throws {Deno.errors.NotCapable} When a permission is missing, naming the
 * flags.
 * @throws {Error} When the native addon does not load.
 */
export async function tokenizerFromFolder(
  folder: string,
  options: FolderOptions,
): Promise<Tokenizer | null> {
  const { rows, endTokens = [], native: open = NativeEncoder.open } = options;
  const file = await openIfThere(folder, "tokenizer.json");
  if (file === null) return null;
  const { bpe, native, parts, first } = readTokenizerJson(file, rows);
  const special = readSpecial(bpe, {
    config: await openIfThere(folder, "tokenizer_config.json"),
    generation: await openIfThere(folder, "generation_config.json"),
    first,
    rows,
    endTokens,
  });
  const encoder = await open(bpe, native);
  return new VocabularyTokenizer({ ...parts, special, encoder });
}

/** A JSON file of the folder; null when there is none. */
async function openIfThere(
  folder: string,
  name: string,
): Promise<ConfigFile | null> {
  try {
    return await ConfigFile.open(`${folder}/${name}`, name);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return null;
    throw error;
  }
}

/** Where special tokens are looked for. */
interface Sources {
  config: ConfigFile | null;
  generation: ConfigFile | null;
  /** The token that a template puts first; undefined without one. */
  first: number | null | undefined;
  rows: number;
  endTokens: readonly number[];
}

function readSpecial(bpe: Bpe, sources: Sources): SpecialTokens {
  const { config, generation, first, rows, endTokens } = sources;
  const bos = config && readToken(config, "bos_token", bpe);
  const eos = config && readToken(config, "eos_token", bpe);
  const ends = generation?.ids("eos_token_id", rows - 1) ?? [];
  const all = [eos, ...ends, ...endTokens].filter((id) => id !== null);
  const begins = bos ?? first ?? null;
  // As in transformers, a template says more than the flag.
  const addBos = first === undefined
    ? config?.boolean("add_bos_token", false) ?? false
    : first === begins;
  return {
    bos: begins,
    eos: eos ?? all[0] ?? null,
    endTokens: new Set(all),
    addBos: addBos && begins !== null,
  };
}

/** The id of a token that is named, as a string or an object with `content`. */
function readToken(config: ConfigFile, key: string, bpe: Bpe): number | null {
  if (!config.has(key)) return null;
  const isText = typeof config.value(key) === "string";
  const text = isText
    ? config.string(key)
    : config.object(key)!.string("content");
  const id = bpe.ids.get(text);
  if (id !== undefined) return id;
  throw config.error(key, "one of the tokens of tokenizer.json");
}
