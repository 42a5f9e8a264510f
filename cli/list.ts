/** `wkv list`: the models that are here. */

import { listModels } from "../src/hub/models.ts";
import { defineCommand } from "./command.ts";
import { listGrants, toFlags } from "./permissions.ts";
import { outputOptions } from "./shared_options.ts";
import { formatBytes, formatTable } from "./units.ts";

/** The command. */
export const listCommand = defineCommand({
  operands: "",
  most: { count: 0, what: "no argument" },
  description:
    "Lists the models that have been pulled, those that other clients of the Hub put\ninto its cache among them.",
  options: outputOptions,
  permissions: () => Promise.resolve(toFlags([listGrants()])),
  async run({ values, terminal }) {
    const models = await listModels();
    if (values.json) {
      for (const model of models) {
        await terminal.out.write(`${JSON.stringify(model)}\n`);
      }
    } else if (models.length > 0) {
      await terminal.out.write(formatTable(
        ["name", "size", "revision", "path"],
        models.map(({ name, path, bytes, revision }) => [
          name,
          formatBytes(bytes),
          revision?.slice(0, 12) ?? "-",
          path,
        ]),
        ["size"],
      ));
    } else if (!values.quiet) {
      await terminal.err.write("No model is here yet: wkv pull gets one\n");
    }
    return 0;
  },
});
