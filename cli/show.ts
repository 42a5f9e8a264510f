/** `wkv show`: where a model's files are, how large, of which revision. */

import { DEFAULT_MODEL, describeModel } from "../src/hub/models.ts";
import { defineCommand } from "./command.ts";
import { listGrants, toFlags } from "./permissions.ts";
import { modelOption, outputOptions } from "./shared_options.ts";
import { formatBytes, formatTable } from "./units.ts";

/** The command. */
export const showCommand = defineCommand({
  operands: "[NAME]",
  most: { count: 1, what: "one model" },
  choices: [DEFAULT_MODEL],
  description:
    "Shows the files of a model that is here, with their sizes, the hashes that the\nHub has for them, and the commit they are of. It opens none; see wkv info.",
  options: { ...modelOption, ...outputOptions },
  permissions: () => Promise.resolve(toFlags([listGrants()])),
  async run({ values, operands, terminal }) {
    const name = operands[0] ?? values.model ?? DEFAULT_MODEL;
    const model = await describeModel(name);
    if (values.json) {
      await terminal.out.write(`${JSON.stringify(model)}\n`);
      return 0;
    }
    const { path, bytes, revision, files } = model;
    await terminal.out.write(
      `${model.name}\npath      ${path}\nsize      ${formatBytes(bytes)}\n` +
        (revision === null ? "" : `revision  ${revision}\n`) +
        formatTable(
          ["file", "size", "hash"],
          files.map((file) => [
            file.path.startsWith(`${path}/`)
              ? file.path.slice(path.length + 1)
              : file.path.split("/").at(-1)!,
            formatBytes(file.bytes),
            file.hash ?? "-",
          ]),
          ["size"],
        ),
    );
    return 0;
  },
});
