/** `wkv info`: what a model file holds and what its cache takes, from the header alone. */

import { type CacheType, layerRows, rowBytes } from "../src/cache/layout.ts";
import { MAX_SLOTS } from "../src/cache/policy.ts";
import { DEFAULT_MODEL, resolveHere } from "../src/hub/models.ts";
import { FormatError } from "../src/formats/error.ts";
import { type ModelFile, openModelFile } from "../src/models/file.ts";
import { defineCommand } from "./command.ts";
import { choice, whole } from "./option.ts";
import { readGrants, toFlags } from "./permissions.ts";
import { modelOption, outputOptions } from "./shared_options.ts";
import { formatBytes } from "./units.ts";

const options = {
  ...modelOption,
  budget: whole(1, "The budget to count for (default 256)", MAX_SLOTS),
  "cache-type": choice(
    ["f16", "f32", "bf16"],
    "Type of keys and values (default f16)",
  ),
  ...outputOptions,
};

/** The command. */
export const infoCommand = defineCommand({
  operands: "[MODEL]",
  most: { count: 1, what: "one model" },
  choices: [DEFAULT_MODEL],
  description:
    "Shows a model's architecture, sizes and types, and the memory of its keys and\nvalues. It reads the file's header and needs no library.",
  options,
  permissions: async ({ model }) => toFlags([await readGrants(model)]),
  async run({ values, operands, terminal }) {
    const name = operands[0] ?? values.model ?? DEFAULT_MODEL;
    const path = await resolveHere(name);
    using file = await openModelFile(path);
    const info = await infoOf(name, path, file, {
      cacheType: values["cache-type"] ?? "f16",
      budget: values.budget ?? 256,
    });
    if (values.json) {
      await terminal.out.write(`${JSON.stringify(info)}\n`);
      return 0;
    }
    const rows = rowsOf(info);
    const wide = Math.max(...rows.map(([left]) => left.length));
    await terminal.out.write(
      rows.map(([left, right]) => `${left.padEnd(wide)}  ${right}\n`).join(""),
    );
    return 0;
  },
});

/** What `--json` prints. */
type Info = Awaited<ReturnType<typeof infoOf>>;

async function infoOf(
  name: string,
  path: string,
  file: ModelFile,
  { cacheType, budget }: { cacheType: CacheType; budget: number },
) {
  const { config } = file;
  const types: Record<string, { tensors: number; bytes: number }> = {};
  let parameters = 0;
  for (const { type, shape, bytes } of file.tensors) {
    const count = types[type] ??= { tensors: 0, bytes: 0 };
    count.tensors++;
    count.bytes += bytes;
    parameters += shape.reduce((all, n) => all * n, 1);
  }
  const { architecture, layers, width, hidden, heads, kvHeads } = config;
  const { headDim, vocabulary, context, window } = config;
  const perLayer = rowBytes(config, cacheType);
  const bytesOf = (tokens: number): number =>
    perLayer * layerRows(config, tokens).reduce((a, b) => a + b);
  const { reason, tokenizer } = await judge(file);
  return {
    name,
    path,
    bytes: file.size,
    files: file.parts,
    architecture,
    parameters,
    layers,
    width,
    hidden,
    heads,
    kvHeads,
    headDim,
    vocabulary,
    context,
    window: window?.tokens ?? null,
    windowLayers: window?.layers.filter((has) => has).length ?? 0,
    types,
    tokenizer,
    runs: reason === null,
    reason,
    cache: {
      cacheType,
      bytesPerToken: layers * perLayer,
      budget,
      budgetBytes: bytesOf(budget),
      contextBytes: bytesOf(context),
    },
  };
}

/** The same in words. */
function rowsOf(info: Info): [string, string][] {
  const { files, layers, window, types, cache, tokenizer, reason } = info;
  const parts = files === 1 ? "" : ` in ${files} files`;
  const rows: [string, string][] = [
    ["file", info.path],
    ["size", `${formatBytes(info.bytes)}${parts}`],
    ["architecture", info.architecture],
    ["parameters", `${(info.parameters / 1e6).toFixed(1)} million`],
    ["layers", `${layers}`],
    ["width", `${info.width}, ${info.hidden} inside the feed-forward part`],
    [
      "heads",
      `${info.heads} query, ${info.kvHeads} KV, of ${info.headDim} dimensions`,
    ],
    ["vocabulary", `${info.vocabulary}`],
    ["context", `${info.context} tokens`],
  ];
  if (window !== null) {
    const some = `${info.windowLayers} of ${layers} layers`;
    rows.push(["sliding window", `${window} tokens in ${some}`]);
  }
  for (const [type, { tensors, bytes }] of Object.entries(types)) {
    const count = `${tensors} tensor${tensors === 1 ? "" : "s"}`;
    rows.push([type, `${count}, ${formatBytes(bytes)}`]);
  }
  rows.push(
    [
      "keys and values",
      `${formatBytes(cache.bytesPerToken)} a token in ${cache.cacheType}`,
    ],
    [
      `at budget ${cache.budget}`,
      `${formatBytes(cache.budgetBytes)}, whatever the text's length`,
    ],
    ["at full context", formatBytes(cache.contextBytes)],
  );
  if (tokenizer === false) {
    rows.push([
      "tokenizer",
      "none: text needs a tokenizer.json beside the weights",
    ]);
  }
  rows.push(["runs", reason === null ? "yes" : `no: ${reason}`]);
  return rows;
}

/** Why a model would be refused when it is loaded, and whether it takes text; null where that is not known. */
async function judge(
  file: ModelFile,
): Promise<{ reason: string | null; tokenizer: boolean | null }> {
  try {
    return { reason: null, ...await file.check() };
  } catch (error) {
    if (!(error instanceof FormatError)) throw error;
    return { reason: error.message, tokenizer: null };
  }
}
