/**
 * Builds the native libraries from the sources that the package carries; called
 * by library.ts on first use and by `wkv build`.
 */

import { sources } from "./sources.ts";
import { ABI_VERSION } from "./symbols.ts";

/** The libraries there are. */
export type LibraryKind = "cpu" | "cuda";

/** The compiler of a library: what `CXX` or `NVCC` names, else `g++` or `nvcc`. */
export function compilerOf(kind: LibraryKind): string {
  return kind === "cpu"
    ? Deno.env.get("CXX") || "g++"
    : Deno.env.get("NVCC") || "nvcc";
}

/** How a build's file is named and where builds lie. */
export interface BuildOptions {
  /** The folder that receives the library. */
  folder: string;
  /** The compiler; `CXX`, else `g++`; for CUDA `NVCC`, else `nvcc`. */
  compiler?: string;
  /** Called once, before the compiler starts, with one line to show. */
  onStart?: (line: string) => void;
  /** Ends the build. */
  signal?: AbortSignal;
}

/** The instruction sets that the loops are compiled for. */
const instructionSets: Record<string, [name: string, flags: string[]][]> = {
  x86_64: [
    ["x86_64_v1", []],
    ["x86_64_v3", ["-march=x86-64-v3"]],
    ["x86_64_v4_vnni", ["-march=x86-64-v4", "-mavx512vnni"]],
  ],
  aarch64: [["portable", []]],
};

const commonFlags = [
  "-std=c++17",
  "-O2",
  "-fPIC",
  "-fvisibility=hidden",
  "-fno-math-errno",
  "-Wall",
  "-Wextra",
  "-Wno-psabi",
];

const linkFlags = [
  "-static-libstdc++",
  "-static-libgcc",
  "-pthread",
];

/** Exports what wkv.h declares, and nothing of the standard library inside. */
const exportMap = "{ global: wkv_*; local: *; };\n";

/** The sources of one library, by path below kernels/. */
function sourcesOf(kind: LibraryKind): [name: string, body: string][] {
  const other = kind === "cpu" ? "cuda/" : "cpu/";
  return Object.entries(sources).filter(([name]) => !name.startsWith(other));
}

/** Hash of a library's sources, 64 hexadecimal digits. */
export async function sourceHash(kind: LibraryKind = "cpu"): Promise<string> {
  const text = sourcesOf(kind).map(([name, body]) =>
    `${name}\n${body.length}\n${body}`
  ).join("\n");
  return await sha256(text);
}

/** What every build of these sources is called, up to the compiler's part. */
export async function libraryPrefix(
  kind: LibraryKind = "cpu",
): Promise<string> {
  const hash = (await sourceHash(kind)).slice(0, 16);
  return `libwkv_${kind}-${ABI_VERSION}-${hash}-`;
}

/**
 * Builds the CPU library and gives its path. The file appears whole or not at
 * all: it is linked under another name and renamed.
 *
 * @throws {Error} The compiler is missing or fails; its text is in the message.
 */
export async function buildCpuLibrary(options: BuildOptions): Promise<string> {
  const compiler = options.compiler ?? compilerOf("cpu");
  const sets = instructionSets[Deno.build.arch] ?? [];
  const version = await run(compiler, ["--version"], options.signal);
  const hash = await sourceHash();
  const key = await sha256(
    JSON.stringify([version, commonFlags, sets, linkFlags, exportMap]),
  );
  const path = `${options.folder}/${await libraryPrefix()}${
    key.slice(0, 8)
  }.so`;
  options.onStart?.(
    `Building the CPU library with ${compiler} (once, some 20 seconds)`,
  );
  const jobs: Job[] = [];
  const compile = (source: string, object: string, flags: string[]) =>
    jobs.push({ source, object, flags: [...commonFlags, ...flags] });
  for (const [name, flags] of sets) {
    compile("cpu/loops.cpp", `loops-${name}`, [
      "-O3",
      ...flags,
      `-DWKV_ISA=${name}`,
    ]);
  }
  for (const [name] of sourcesOf("cpu")) {
    const stem = /^(?:cpu\/)?(\w+)\.cpp$/.exec(name)?.[1];
    if (stem === undefined || stem === "loops") continue;
    compile(name, stem, stem === "handles" ? [hashFlag(hash)] : []);
  }
  await make({
    ...options,
    compiler,
    kind: "cpu",
    jobs,
    link: linkFlags,
    path,
  });
  return path;
}

/** The GPUs that the CUDA library has code for unless told otherwise. */
const cudaTargets = ["sm_80", "sm_90", "compute_90"];

/** What the compiler says that one kernel uses. */
export interface KernelUse {
  /** The kernel, as the assembler names it. */
  kernel: string;
  /** The target. */
  target: string;
  /** Registers a thread. */
  registers: number;
  /** Bytes of static shared memory a block. */
  shared: number;
  /** Bytes that registers were spilled to, stores and loads together. */
  spills: number;
}

/** How the CUDA library is built. */
export interface CudaBuildOptions extends BuildOptions {
  /**
   * GPU targets: `sm_90`, or `compute_90` for code that the driver compiles.
   * `WKV_CUDA_TARGETS` names them with commas in between.
   *
   * @default `["sm_80", "sm_90", "compute_90"]`
   */
  targets?: readonly string[];
  /** Gets what each kernel uses, when all is compiled. */
  onKernels?: (kernels: KernelUse[]) => void;
}

/**
 * Builds the CUDA library and gives its path, as {@linkcode buildCpuLibrary}
 * does. It loads on machines without a GPU. Objects are kept beside it, so that
 * a change to one file compiles that file.
 *
 * @throws {RangeError} A target is not `sm_NN` or `compute_NN`.
 * @throws {Error} The compiler is missing or fails; its text is in the message.
 */
export async function buildCudaLibrary(
  options: CudaBuildOptions,
): Promise<string> {
  const compiler = options.compiler ?? compilerOf("cuda");
  const targets = options.targets ??
    Deno.env.get("WKV_CUDA_TARGETS")?.split(",").map((t) => t.trim())
      .filter((t) => t !== "") ??
    cudaTargets;
  if (targets.length === 0) throw new RangeError("No CUDA target is given");
  const flags = [
    "-std=c++17",
    "-O3",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
    "-Xptxas",
    "-v",
  ];
  const codes = (targets: readonly string[]) =>
    targets.flatMap((target) => ["-gencode", generation(target)]);
  const version = await run(compiler, ["--version"], options.signal);
  const hash = await sourceHash("cuda");
  const key = await sha256(
    JSON.stringify([version, [...flags, ...codes(targets)], exportMap]),
  );
  const path = `${options.folder}/${await libraryPrefix("cuda")}${
    key.slice(0, 8)
  }.so`;
  options.onStart?.(
    `Building the CUDA library for ${
      targets.join(", ")
    } with ${compiler} (once, some minutes)`,
  );
  const jobs = sourcesOf("cuda").flatMap(([source]): Job[] => {
    const [, stem, extension] = /^(?:cuda\/)?(\w+)\.(cu|cpp)$/.exec(source) ??
      [];
    if (stem === undefined) return [];
    const own = extension === "cpp" ? [hashFlag(hash)] : [];
    const code = codes(targetsOf(source, targets));
    return [{ source, object: stem, flags: [...flags, ...code, ...own] }];
  });
  const said = await make({
    ...options,
    compiler,
    kind: "cuda",
    jobs,
    kept: { folder: `${options.folder}/objects`, version },
    link: [
      "-cudart",
      "static",
      "-Xcompiler",
      "-static-libstdc++,-static-libgcc",
    ],
    path,
  });
  options.onKernels?.(said.flatMap(kernelUses));
  return path;
}

/** The linker's flag in words that the compiler passes on. */
function versionScript(kind: LibraryKind, file: string): string[] {
  return kind === "cpu"
    ? [`-Wl,--version-script=${file}`]
    : ["-Xlinker", `--version-script=${file}`];
}

/**
 * A file named for wgmma is for GPUs of 9.0 alone, whose `sm_90a` has it; built
 * for others its kernels are empty, and the library asks before it takes them.
 */
function targetsOf(
  source: string,
  targets: readonly string[],
): readonly string[] {
  return source.endsWith("_wgmma.cu") &&
      targets.some((target) => /_90a?$/.test(target))
    ? ["sm_90a"]
    : targets;
}

/** The `-gencode` of a target. */
function generation(target: string): string {
  const [, kind, number] = /^(sm|compute)_(\d+a?)$/.exec(target) ?? [];
  if (kind === undefined) {
    throw new RangeError(
      `A CUDA target must be sm_NN or compute_NN: current value is "${target}"`,
    );
  }
  return `arch=compute_${number},code=${target}`;
}

/** Reads what `ptxas -v` printed. */
function kernelUses(text: string): KernelUse[] {
  const uses: KernelUse[] = [];
  const entry =
    /Compiling entry function '(\w+)' for '(\w+)'[\s\S]*?(\d+) bytes spill stores, (\d+) bytes spill loads[\s\S]*?Used (\d+) registers([^\n]*)/g;
  for (
    const [, kernel, target, stores, loads, registers, rest] of text.matchAll(
      entry,
    )
  ) {
    uses.push({
      kernel: kernel!,
      target: target!,
      registers: Number(registers),
      shared: Number(/(\d+) bytes smem/.exec(rest!)?.[1] ?? 0),
      spills: Number(stores) + Number(loads),
    });
  }
  return uses;
}

/** One file to compile. */
interface Job {
  source: string;
  object: string;
  flags: string[];
}

function hashFlag(hash: string): string {
  return `-DWKV_SOURCE_HASH="${hash}"`;
}

/** Objects of earlier builds, by the hash of all that went into them. */
class KeptObjects {
  readonly #folder: string;
  readonly #common: string;
  readonly #used = new Set<string>();

  constructor(folder: string, kind: LibraryKind, version: string) {
    this.#folder = folder;
    const headers = sourcesOf(kind).filter(([name]) =>
      /\.(h|hpp|cuh)$/.test(name)
    );
    this.#common = JSON.stringify([version, headers]);
  }

  /** Gives an object its place, compiled if need be, and what was said then. */
  async take(
    { source, flags }: Job,
    object: string,
    compile: () => Promise<string>,
  ): Promise<string> {
    const hash = await sha256(
      JSON.stringify([this.#common, source, sources[source], flags]),
    );
    const kept = `${this.#folder}/${hash}`;
    this.#used.add(hash);
    try {
      const said = await Deno.readTextFile(`${kept}.txt`);
      await Deno.copyFile(`${kept}.o`, object);
      return said;
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
    }
    const said = await compile();
    await Deno.mkdir(this.#folder, { recursive: true });
    // The text comes last and each file whole: who sees it finds the object.
    const part = `${kept}.${crypto.randomUUID()}`;
    await Deno.copyFile(object, part);
    await Deno.rename(part, `${kept}.o`);
    await Deno.writeTextFile(part, said);
    await Deno.rename(part, `${kept}.txt`);
    return said;
  }

  /** Removes what this build did not use. */
  async tidy(): Promise<void> {
    for await (const { name } of Deno.readDir(this.#folder)) {
      if (this.#used.has(name.slice(0, name.indexOf(".")))) continue;
      // Another build may be tidying as well.
      await Deno.remove(`${this.#folder}/${name}`).catch(() => {});
    }
  }
}

/**
 * Writes a library's sources to a folder of their own, compiles them side by
 * side, links them and gives the file its name. Gives what each compiler said,
 * also of those objects that `kept` had.
 */
async function make(
  options: BuildOptions & {
    compiler: string;
    kind: LibraryKind;
    jobs: Job[];
    kept?: { folder: string; version: string };
    link: string[];
    path: string;
  },
): Promise<string[]> {
  const { compiler, signal } = options;
  const kept = options.kept &&
    new KeptObjects(options.kept.folder, options.kind, options.kept.version);
  await Deno.mkdir(options.folder, { recursive: true });
  const work = await Deno.makeTempDir({
    dir: options.folder,
    prefix: ".build-",
  });
  try {
    for (const [name, body] of sourcesOf(options.kind)) {
      const file = `${work}/${name}`;
      await Deno.mkdir(file.slice(0, file.lastIndexOf("/")), {
        recursive: true,
      });
      await Deno.writeTextFile(file, body);
    }
    await Deno.writeTextFile(`${work}/exports.map`, exportMap);
    const said: string[] = [];
    const jobs = [...options.jobs];
    const objects = jobs.map(({ object }) => `${work}/${object}.o`);
    const next = async () => {
      for (let job = jobs.shift(); job; job = jobs.shift()) {
        const { source, flags } = job;
        const object = `${work}/${job.object}.o`;
        const compile = () =>
          run(
            compiler,
            [...flags, "-c", `${work}/${source}`, "-o", object],
            signal,
          );
        said.push(await (kept?.take(job, object, compile) ?? compile()));
      }
    };
    const workers = Math.min(navigator.hardwareConcurrency || 2, jobs.length);
    await Promise.all(Array.from({ length: workers }, next));
    const library = `${work}/library.so`;
    await run(compiler, [
      "-shared",
      "-o",
      library,
      ...objects,
      ...options.link,
      ...versionScript(options.kind, `${work}/exports.map`),
    ], signal);
    await Deno.rename(library, options.path);
    await kept?.tidy();
    return said;
  } finally {
    await Deno.remove(work, { recursive: true });
  }
}

async function run(
  command: string,
  args: string[],
  signal?: AbortSignal,
): Promise<string> {
  let output: Deno.CommandOutput;
  try {
    output = await new Deno.Command(command, {
      args,
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
      ...(signal ? { signal } : {}),
    }).output();
  } catch (cause) {
    if (cause instanceof Deno.errors.NotFound) {
      throw new Error(
        `No compiler: "${command}" is not to be found; install ${
          command.includes("nvcc")
            ? "the CUDA toolkit, or name its nvcc with NVCC"
            : "g++, or name another with CXX"
        }`,
        { cause },
      );
    }
    throw cause;
  }
  signal?.throwIfAborted();
  if (!output.success) {
    const text = new TextDecoder().decode(output.stderr).trim();
    throw new Error(
      `${command} failed with code ${output.code}:\n${text.slice(0, 4000)}`,
    );
  }
  const decoder = new TextDecoder();
  return decoder.decode(output.stdout) + decoder.decode(output.stderr);
}

async function sha256(text: string): Promise<string> {
  const digest = await crypto.subtle.digest(
    "SHA-256",
    new TextEncoder().encode(text),
  );
  return new Uint8Array(digest).toHex();
}
