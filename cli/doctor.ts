/** `wkv doctor`: checks what generating needs on this machine. */

import { Backend, DRIVER_FILES } from "../src/backend/backend.ts";
import { compilerOf, sourceHash } from "../src/backend/build.ts";
import { LibraryError } from "../src/backend/error.ts";
import {
  findCpuLibrary,
  findCudaLibrary,
  LIBRARY_VARIABLE,
} from "../src/backend/library.ts";
import { ABI_VERSION } from "../src/backend/symbols.ts";
import { isOffline } from "../src/hub/hub_cache.ts";
import { DEFAULT_MODEL, resolveHere } from "../src/hub/models.ts";
import { openNative } from "../src/tokenizer/addon.ts";
import { defineCommand } from "./command.ts";
import { commands } from "./commands.ts";
import { errorMessage } from "./errors.ts";
import { shellQuote } from "./help.ts";
import { runSelfTest } from "./doctor_kernels.ts";
import { flag } from "./option.ts";
import {
  buildGrants,
  listGrants,
  pullGrants,
  runFlags,
} from "./permissions.ts";
import { loadOptions, modelOption, outputOptions } from "./shared_options.ts";

/** What was found of one thing: it, or why there is none. */
interface Finding {
  ok: boolean;
  text: string;
}

/** The command. */
export const doctorCommand = defineCommand({
  operands: "",
  most: { count: 0, what: "no argument" },
  description:
    "Checks what generating needs: library or compiler, tokenizer, model or pip, and\nwhat a GPU needs: driver, CUDA library or nvcc. It exits with 0 when generating can\nwork, on the CPU at least, builds nothing and downloads nothing.",
  options: {
    ...modelOption,
    "self-test": flag("Run the kernels for a minute, beside f64"),
    device: loadOptions.device,
    ...outputOptions,
  },
  permissions: async ({ model }) => {
    const { run = [] } = pullGrants();
    return await runFlags(model, {
      run: [...run, ...buildGrants(["cpu", "cuda"]).run!],
      // Where other commands would look.
      env: ["CXX", "NVCC", ...listGrants().env!],
    });
  },
  async run({ values, terminal, signal }) {
    if (values["self-test"]) {
      const { device = "auto", json = false } = values;
      return await runSelfTest(device, { terminal, signal, json });
    }
    const found = await examine(values.model ?? DEFAULT_MODEL);
    await terminal.out.write(values.json ? asJson(found) : asText(found));
    return found.ok ? 0 : 1;
  },
});

/** All that was found. */
interface Examination {
  /** Whether generating can work. */
  ok: boolean;
  sourceHash: string;
  library: Search;
  device: Finding;
  compiler: Finding;
  cuda: Search;
  gpu: Finding;
  driver: Finding;
  nvcc: Finding;
  python: Finding;
  pip: Finding;
  tokenizer: Finding;
  model: Finding;
  /** Flags by command. */
  permissions: Record<string, string[]>;
}

async function examine(name: string): Promise<Examination> {
  const library = await findLibrary(findCpuLibrary);
  const cuda = await findLibrary(findCudaLibrary);
  const answers = await Promise.all([
    version(compilerOf("cpu"), ["--version"]),
    version(compilerOf("cuda"), ["--version"], -2),
    findDriver(),
    version("python3", ["--version"]),
    version("python3", ["-m", "pip", "--version"]),
    openTokenizer(),
    attempt(() => resolveHere(name)),
  ]);
  const [compiler, nvcc, driver, python, pip, tokenizer, model] = answers;
  const device = library.path !== null
    ? await openDevice(library.path, "cpu")
    // A named library stands for itself: nothing is built in its place.
    : Deno.env.get(LIBRARY_VARIABLE)
    ? { ok: false, text: `unset ${LIBRARY_VARIABLE}, or name a library` }
    : { ok: compiler.ok, text: "known once the library is built" };
  const gpu = cuda.path !== null
    ? await openDevice(cuda.path, "cuda")
    : { ok: false, text: "known once the CUDA library is built" };
  const pullable = !isOffline() && (name.startsWith("hf:") ||
    (name === DEFAULT_MODEL && pip.ok));
  return {
    ok: device.ok && tokenizer.ok && (model.ok || pullable),
    sourceHash: await sourceHash(),
    ...{ library, device, compiler, cuda, gpu, driver, nvcc },
    ...{ python, pip, tokenizer, model },
    permissions: await allPermissions(),
  };
}

function asJson(found: Examination): string {
  const { library, cuda, gpu, driver, nvcc } = found;
  const line = {
    ok: found.ok,
    deno: Deno.version.deno,
    abi: ABI_VERSION,
    sourceHash: found.sourceHash,
    device: found.device,
    library: library.path,
    tried: library.tried,
    compiler: found.compiler,
    cuda: { library: cuda.path, tried: cuda.tried, gpu, driver, nvcc },
    python: found.python,
    pip: found.pip,
    tokenizer: found.tokenizer,
    model: found.model,
    permissions: found.permissions,
  };
  return `${JSON.stringify(line)}\n`;
}

function asText(found: Examination): string {
  const line = (label: string, { ok, text }: Finding): string =>
    `${ok ? "ok     " : "missing"}  ${label.padEnd(10)}  ${
      text.replaceAll("\n", "\n" + " ".repeat(21))
    }\n`;
  const flags = Object.entries(found.permissions).map(([command, flags]) =>
    `  ${command.padEnd(11)}  ${flags.map(shellQuote).join(" ") || "none"}\n`
  );
  return [
    `Deno ${Deno.version.deno}, ABI ${ABI_VERSION}, sources ${
      found.sourceHash.slice(0, 16)
    }\n`,
    line("library", libraryFinding(found.library)),
    line("device", found.device),
    line("compiler", found.compiler),
    line("cuda", libraryFinding(found.cuda)),
    line("gpu", found.gpu),
    line("driver", found.driver),
    line("nvcc", found.nvcc),
    line("tokenizer", found.tokenizer),
    line("model", found.model),
    line("python", found.python),
    line("pip", found.pip),
    "Permissions:\n",
    ...flags,
    found.ok
      ? "Generating can work here.\n"
      : "Generating cannot work here: see what is missing.\n",
  ].join("");
}

/** Where a library is, or why there is none. */
interface Search {
  path: string | null;
  reason: string;
  tried: readonly string[];
}

async function findLibrary(find: typeof findCpuLibrary): Promise<Search> {
  try {
    const { path, tried } = await find({ build: false });
    return { path, tried, reason: "" };
  } catch (error) {
    if (!(error instanceof LibraryError)) throw error;
    const reason = error.message.split("\n")[0]!;
    return { path: null, reason, tried: error.tried };
  }
}

function libraryFinding({ path, reason, tried }: Search): Finding {
  return { ok: path !== null, text: [path ?? reason, ...tried].join("\n") };
}

/** What the kernel says about its NVIDIA driver; under Windows or on a Jetson there is a device alone, which tells no version. */
async function findDriver(): Promise<Finding> {
  try {
    const [version, ...devices] = DRIVER_FILES;
    const text = await readIfThere(version);
    if (text !== null) {
      const [line = ""] = text.split("\n");
      return { ok: true, text: line.replace(/^NVRM version:\s*/, "") };
    }
    for (const path of devices) {
      try {
        await Deno.stat(path);
        return { ok: true, text: `found by its device, ${path}` };
      } catch (error) {
        if (!(error instanceof Deno.errors.NotFound)) throw error;
      }
    }
  } catch (error) {
    if (!(error instanceof Deno.errors.NotCapable)) throw error;
    return { ok: false, text: "not to be seen without --allow-all" };
  }
  return { ok: false, text: "No NVIDIA driver is loaded" };
}

async function readIfThere(path: string): Promise<string | null> {
  try {
    return await Deno.readTextFile(path);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return null;
    throw error;
  }
}

function openDevice(
  library: string,
  device: "cpu" | "cuda",
): Promise<Finding> {
  return attempt(async () => {
    using backend = await Backend.open({ library, device });
    return backend.description;
  });
}

function openTokenizer(): Promise<Finding> {
  const json = JSON.stringify({
    version: "1.0",
    added_tokens: [],
    model: { type: "BPE", vocab: { a: 0 }, merges: [] },
  });
  return attempt(async () => {
    await openNative(json);
    return "npm:tokenizers loads";
  });
}

/** A line that a program prints about itself, the first unless told otherwise. */
function version(
  program: string,
  args: string[],
  line = 0,
): Promise<Finding> {
  return attempt(async () => {
    const { success, stdout, stderr } = await new Deno.Command(program, {
      args,
      stdin: "null",
      signal: AbortSignal.timeout(20_000),
    }).output();
    const decoder = new TextDecoder();
    const lines = decoder.decode(stdout).trim().split("\n");
    if (success) return lines.at(line) ?? lines[0]!;
    throw new Error(
      decoder.decode(stderr).trim().split("\n").at(-1) || `${program} failed`,
    );
  });
}

async function attempt(find: () => Promise<string>): Promise<Finding> {
  try {
    return { ok: true, text: await find() };
  } catch (error) {
    return { ok: false, text: errorMessage(error) };
  }
}

/** Flags by command. */
async function allPermissions(): Promise<Record<string, string[]>> {
  const all: Record<string, string[]> = {};
  for (const [name, { load }] of Object.entries(commands)) {
    all[name] = await (await load()).permissions({}, []);
  }
  return all;
}
