/** `wkv build`: compiles the native libraries anew. */

import type { KernelUse, LibraryKind } from "../src/backend/build.ts";
import { findCpuLibrary, findCudaLibrary } from "../src/backend/library.ts";
import { defineCommand } from "./command.ts";
import { flag, UsageError } from "./option.ts";
import { buildGrants, toFlags } from "./permissions.ts";
import { ProgressView } from "./progress.ts";
import { outputOptions } from "./shared_options.ts";
import { formatTable } from "./units.ts";

/** The libraries by name. */
const libraries: Record<LibraryKind, typeof findCpuLibrary> = {
  cpu: findCpuLibrary,
  cuda: findCudaLibrary,
};
const kinds = Object.keys(libraries) as LibraryKind[];

/** The command. */
export const buildCommand = defineCommand({
  operands: "[cpu|cuda]",
  most: { count: 1, what: "one library" },
  choices: kinds,
  description:
    `Compiles a native library anew and prints its path: cpu with g++ (or what CXX
names), cuda with nvcc (or what NVCC names), followed by what each kernel uses.
WKV_CUDA_TARGETS names the GPUs to compile for (default sm_80,sm_90,compute_90).
The CPU library is built on first use; the CUDA library by --device cuda or here.`,
  options: { all: flag("Build both libraries"), ...outputOptions },
  permissions: () => Promise.resolve(toFlags([buildGrants(kinds)])),
  async run({ values, operands, terminal, signal }) {
    const [named] = operands;
    if (named !== undefined && !kinds.includes(named as LibraryKind)) {
      throw new UsageError(
        `The library to build must be cpu or cuda: found ${
          JSON.stringify(named)
        }`,
      );
    }
    if (named !== undefined && values.all) {
      throw new UsageError("Give --all or the name of one library, not both");
    }
    for (
      const library of values.all ? kinds : [named as LibraryKind ?? "cpu"]
    ) {
      let kernels: KernelUse[] = [];
      using view = new ProgressView(terminal, values.quiet ?? false);
      const { path } = await libraries[library]({
        anew: true,
        signal,
        onKernels: (uses) => kernels = uses,
        onBuild: (note) =>
          view.report({
            stage: "build",
            loaded: 0,
            total: null,
            label: `the ${library} library`,
            note,
          }),
      });
      view.close();
      await terminal.out.write(
        values.json
          ? `${JSON.stringify({ library, path, kernels })}\n`
          : `${path}\n`,
      );
      if (kernels.length > 0 && !values.json && !values.quiet) {
        await terminal.err.write(kernelTable(kernels));
      }
    }
    return 0;
  },
});

/** What the kernels use, as a table. */
function kernelTable(kernels: readonly KernelUse[]): string {
  return formatTable(
    ["kernel", "target", "registers", "shared", "spills"],
    kernels.map(({ kernel, target, registers, shared, spills }) => [
      kernel,
      target,
      ...[registers, shared, spills].map(String),
    ]),
    ["registers", "shared", "spills"],
  );
}
