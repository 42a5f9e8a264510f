/** `wkv rm`: removes a model that is here. */

import { describeModel, removeModel } from "../src/hub/models.ts";
import { defineCommand } from "./command.ts";
import { flag, UsageError } from "./option.ts";
import { removeGrants, toFlags } from "./permissions.ts";
import { outputOptions } from "./shared_options.ts";
import { formatBytes } from "./units.ts";

/** The command. */
export const rmCommand = defineCommand({
  operands: "NAME",
  most: { count: 1, what: "one model" },
  description:
    "Removes a model that wkv list names; of the Hub's cache only what no other\nrevision needs. On a terminal it asks first.",
  options: { yes: flag("Ask nothing", "y"), ...outputOptions },
  permissions: () => Promise.resolve(toFlags([removeGrants()])),
  async run({ values, operands, terminal }) {
    const [name] = operands;
    if (name === undefined) throw new UsageError("Name the model to remove");
    const { path, bytes } = await describeModel(name);
    if (!values.yes) {
      if (!Deno.stdin.isTerminal()) {
        throw new UsageError(
          `Nobody can be asked here: give --yes to remove ${path}`,
        );
      }
      if (!confirm(`Remove ${path} (${formatBytes(bytes)})?`)) return 0;
    }
    const freed = await removeModel(name);
    if (values.json) {
      await terminal.out.write(`${JSON.stringify({ name, path, freed })}\n`);
    } else if (!values.quiet) {
      await terminal.err.write(`Removed ${name}: ${formatBytes(freed)} free\n`);
    }
    return 0;
  },
});
