/** A model on disk, whatever its format: a GGUF file or the first of several, or a Hugging Face folder; opened by Model.load and `wkv info`. */

import {
  type ChatTemplates,
  folderChatTemplates,
  ggufChatTemplates,
} from "../chat/sources.ts";
import { ConfigFile } from "../formats/config.ts";
import { FormatError, quote } from "../formats/error.ts";
import { GgufFile } from "../formats/gguf.ts";
import { SafetensorsFile } from "../formats/safetensors.ts";
import { tokenizerFromGguf } from "../tokenizer/gguf.ts";
import { tokenizerFromFolder } from "../tokenizer/hugging_face.ts";
import { noEncoder } from "../tokenizer/native_encoder.ts";
import { noTokenizer } from "../tokenizer/none.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import type { Architecture, ModelConfig } from "./architecture.ts";
import { checkWeights } from "./check.ts";
import * as architectures from "./mod.ts";
import { ggufWeights, safetensorsWeights, type WeightFile } from "./weights.ts";

/** An open model. */
export interface ModelFile extends Disposable {
  /** Bytes of its files of weights. */
  readonly size: number;
  /** Number of those files. */
  readonly parts: number;
  /** What it is. */
  readonly architecture: Architecture;
  /** Its numbers. */
  readonly config: ModelConfig;
  /** Every tensor. */
  readonly tensors: Iterable<
    { type: string; shape: readonly number[]; bytes: number }
  >;
  /** Its weights. */
  readonly weights: WeightFile;
  /** Opens its tokenizer. */
  tokenizer(): Promise<Tokenizer>;
  /**
   * Checks, from headers and vocabulary alone, what loading would refuse.
   *
   * @returns Whether it has a tokenizer.
   * @throws {FormatError} A weight is missing, of another shape or of a type
   * that no kernel takes, or the vocabulary is of a kind that is not known.
   */
  check(): Promise<{ tokenizer: boolean }>;
  /** Reads its chat templates; the file may be closed by then. */
  readonly chatTemplates: () => Promise<ChatTemplates>;
}

const known: Architecture[] = Object.values(architectures);

/**
 * Opens a model: a GGUF file, the first of several, a folder with a config.json
 * and safetensors, or one of these safetensors files or their index.
 *
 * @throws {FormatError} A file is malformed, or of an unknown architecture.
 */
export async function openModelFile(path: string): Promise<ModelFile> {
  const { isDirectory } = await Deno.stat(path);
  if (isDirectory) return await openFolder(path, await weightsIn(path));
  if (/\.safetensors(\.index\.json)?$/.test(path)) {
    return await openFolder(path.replace(/\/?[^/]*$/, "") || ".", path);
  }
  return await openGguf(path);
}

async function openGguf(path: string): Promise<ModelFile> {
  const file = await GgufFile.open(path);
  try {
    const name = file.string("general.architecture");
    const found = known.find(({ gguf }) => gguf?.name === name);
    if (!found?.gguf) {
      const names = known.flatMap(({ gguf }) => gguf ? [gguf.name] : []);
      throw new FormatError(
        path,
        "general.architecture",
        `the architecture "${name}" is not supported yet, expected ${
          names.join(", ")
        }`,
      );
    }
    const config = found.gguf.config(file);
    const templates = ggufChatTemplates(file);
    const weights = ggufWeights(file);
    const rows = config.vocabulary;
    return {
      size: file.size,
      parts: file.parts,
      architecture: found,
      config,
      tensors: file.tensors.values(),
      weights,
      tokenizer: () => tokenizerFromGguf(file, { rows }),
      async check() {
        await checkWeights(found, config, weights);
        (await tokenizerFromGguf(file, { rows, native: noEncoder })).close();
        return { tokenizer: true };
      },
      chatTemplates: () => Promise.resolve(templates),
      [Symbol.dispose]: () => file.close(),
    };
  } catch (error) {
    file.close();
    throw error;
  }
}

/** The weights of a folder: one file, or the index of several. */
async function weightsIn(folder: string): Promise<string> {
  for (const name of ["model.safetensors", "model.safetensors.index.json"]) {
    const path = `${folder}/${name}`;
    if (await Deno.stat(path).then(() => true, () => false)) return path;
  }
  throw new Deno.errors.NotFound(
    `${folder}: This folder has no weights, expected model.safetensors or model.safetensors.index.json in it`,
  );
}

async function openFolder(folder: string, path: string): Promise<ModelFile> {
  const values = await ConfigFile.open(`${folder}/config.json`);
  const classes = values.strings("architectures");
  const architecture = known.find(({ huggingFace }) =>
    huggingFace.classes.some((name) => classes.includes(name))
  );
  if (architecture === undefined) {
    const names = known.flatMap(({ huggingFace }) => huggingFace.classes);
    throw new FormatError(
      values.path,
      "architectures",
      `Found ${classes.map(quote).join(", ") || "none"}, expected one of ${
        names.join(", ")
      }`,
    );
  }
  const config = architecture.huggingFace.config(values);
  const file = await SafetensorsFile.open(path);
  const weights = safetensorsWeights(file, architecture.huggingFace.tensors);
  const ofTokens = { rows: config.vocabulary, endTokens: config.endTokens };
  return {
    size: file.size,
    parts: file.parts,
    architecture,
    config,
    tensors: file.tensors.values(),
    weights,
    tokenizer: async () =>
      await tokenizerFromFolder(folder, ofTokens) ?? noTokenizer(
        `${folder}: This folder has no tokenizer.json, which text needs: put the model's there, or give the library token ids`,
        config.endTokens,
      ),
    async check() {
      await checkWeights(architecture, config, weights);
      const options = { ...ofTokens, native: noEncoder };
      using tokenizer = await tokenizerFromFolder(folder, options);
      return { tokenizer: tokenizer !== null };
    },
    chatTemplates: () => folderChatTemplates(folder),
    [Symbol.dispose]: () => file.close(),
  };
}
