/** `wkv build`: compiles the native library anew. */

import { findCpuLibrary } from "../src/backend/library.ts";
import { defineCommand } from "./command.ts";
import { flag, UsageError } from "./option.ts";
import { buildGrants, toFlags } from "./permissions.ts";
import { ProgressView } from "./progress.ts";
import { outputOptions } from "./shared_options.ts";

/** The command. */
export const buildCommand = defineCommand({
  operands: "[cpu|cuda]",
  most: { count: 1, what: "one library" },
  choices: ["cpu", "cuda"],
  description:
    "Compiles the native library anew with g++, or the compiler that CXX names, and\nprints its path. Nobody needs to: what is missing is built on first use.",
  options: { all: flag("Build every library there is"), ...outputOptions },
  permissions: () => Promise.resolve(toFlags([buildGrants()])),
  async run({ values, operands, terminal, signal }) {
    const [library = "cpu"] = operands;
    if (library === "cuda") {
      throw new Error("There is no CUDA library yet: wkv build cpu builds one");
    }
    if (library !== "cpu") {
      throw new UsageError(
        `The library to build must be cpu or cuda: found ${
          JSON.stringify(library)
        }`,
      );
    }
    using view = new ProgressView(terminal, values.quiet ?? false);
    const { path } = await findCpuLibrary({
      anew: true,
      signal,
      onBuild: (note) =>
        view.report({
          stage: "build",
          loaded: 0,
          total: null,
          label: "the CPU library",
          note,
        }),
    });
    view.close();
    await terminal.out.write(
      values.json ? `${JSON.stringify({ library, path })}\n` : `${path}\n`,
    );
    return 0;
  },
});
