/**
 * Builds the CPU library from the sources that the package carries; called by
 * library.ts on first use and by `wkv build`.
 */

import { sources } from "./sources.ts";
import { ABI_VERSION } from "./symbols.ts";

/** How a build's file is named and where builds lie. */
export interface BuildOptions {
  /** The folder that receives the library. */
  folder: string;
  /** The compiler; `CXX`, else `g++`. */
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

/** Hash of the sources, 64 hexadecimal digits. */
export async function sourceHash(): Promise<string> {
  const text = Object.entries(sources).map(([name, body]) =>
    `${name}\n${body.length}\n${body}`
  ).join("\n");
  return await sha256(text);
}

/** What every build of these sources is called, up to the compiler's part. */
export async function libraryPrefix(): Promise<string> {
  return `libwkv_cpu-${ABI_VERSION}-${(await sourceHash()).slice(0, 16)}-`;
}

/**
 * Builds the CPU library and gives its path. The file appears whole or not at
 * all: it is linked under another name and renamed.
 *
 * @throws {Error} The compiler is missing or fails; its text is in the message.
 */
export async function buildCpuLibrary(options: BuildOptions): Promise<string> {
  const compiler = options.compiler ?? Deno.env.get("CXX") ?? "g++";
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
  await Deno.mkdir(options.folder, { recursive: true });
  const work = await Deno.makeTempDir({
    dir: options.folder,
    prefix: ".build-",
  });
  try {
    for (const [name, body] of Object.entries(sources)) {
      const file = `${work}/${name}`;
      await Deno.mkdir(file.slice(0, file.lastIndexOf("/")), {
        recursive: true,
      });
      await Deno.writeTextFile(file, body);
    }
    await Deno.writeTextFile(`${work}/exports.map`, exportMap);
    const objects: string[] = [];
    const jobs: string[][] = [];
    const compile = (source: string, object: string, flags: string[]) => {
      objects.push(`${work}/${object}.o`);
      jobs.push([
        ...commonFlags,
        ...flags,
        "-c",
        `${work}/cpu/${source}.cpp`,
        "-o",
        `${work}/${object}.o`,
      ]);
    };
    for (const [name, flags] of sets) {
      compile("loops", `loops-${name}`, [
        "-O3",
        ...flags,
        `-DWKV_ISA=${name}`,
      ]);
    }
    for (const name of Object.keys(sources)) {
      const stem = /^cpu\/(\w+)\.cpp$/.exec(name)?.[1];
      if (stem === undefined || stem === "loops") continue;
      const flags = stem === "runtime" ? [`-DWKV_SOURCE_HASH="${hash}"`] : [];
      compile(stem, stem, flags);
    }
    const next = async () => {
      for (let job = jobs.shift(); job; job = jobs.shift()) {
        await run(compiler, job, options.signal);
      }
    };
    const workers = Math.min(navigator.hardwareConcurrency || 2, jobs.length);
    await Promise.all(Array.from({ length: workers }, next));
    await run(compiler, [
      "-shared",
      "-o",
      `${work}/library.so`,
      ...objects,
      ...linkFlags,
      `-Wl,--version-script=${work}/exports.map`,
    ], options.signal);
    await Deno.rename(`${work}/library.so`, path);
  } finally {
    await Deno.remove(work, { recursive: true });
  }
  return path;
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
        `No compiler: "${command}" is not to be found; install g++, or name another with CXX`,
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
  return new TextDecoder().decode(output.stdout);
}

async function sha256(text: string): Promise<string> {
  const digest = await crypto.subtle.digest(
    "SHA-256",
    new TextEncoder().encode(text),
  );
  return new Uint8Array(digest).toHex();
}
