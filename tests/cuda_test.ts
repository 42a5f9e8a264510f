/**
 * The CUDA library without a GPU: it builds and loads, exports wkv.h, and says
 * what is missing; with a GPU also what is wrong there. tests/cuda_check.ts
 * compares what it computes.
 */

import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertMatch,
  assertRejects,
  assertStringIncludes,
} from "@std/assert";
import { afterAll, describe, it } from "@std/testing/bdd";
import { Backend } from "../src/backend/backend.ts";
import { buildCudaLibrary, sourceHash } from "../src/backend/build.ts";
import { LibraryError, WkvError } from "../src/backend/error.ts";
import {
  buildFolders,
  CUDA_LIBRARY_VARIABLE,
  findCudaLibrary,
} from "../src/backend/library.ts";
import { ABI_VERSION, symbols, wkv_status } from "../src/backend/symbols.ts";
import { execute, ROOT } from "./cli_process.ts";
import { LibraryCopy, runScript } from "./isolated.ts";
import { writeLargeModel } from "./large_model.ts";

const functions = Object.keys(symbols);
const compiler = Deno.env.get("NVCC") || "nvcc";
/** What a script writes before what it gives. */
const FOUND = "found ";

const temporary = await Deno.makeTempDir({ prefix: "wkv_cuda_" });
/** The library; null where there is none and nvcc is not to be found. */
const library = await findOrBuild();
/** The GPU in words; null when there is none. */
const gpu = library === null ? null : (await opening({})).ok ?? null;

/** Runs a script that prints one JSON value with `give(...)`. */
async function ask<T>(
  script: string,
  env: Record<string, string> = {},
): Promise<T> {
  const ended = await runScript(
    `import { Backend } from "src/backend/backend.ts";
import { Tensor } from "src/backend/tensor.ts";
import { findCudaLibrary } from "src/backend/library.ts";
const give = (value) => console.log("${FOUND}" + JSON.stringify(value));
async function attempt(body) {
  try { return { ok: await body() }; }
  catch (error) { return { name: error.name, status: error.status, message: error.message }; }
}
${script}`,
    ["-A"],
    env,
  );
  const line = ended.stdout.split("\n").find((line) => line.startsWith(FOUND));
  assert(line !== undefined, `${ended.stdout}${ended.stderr}`);
  assertEquals(ended.code, 0, ended.stderr);
  return JSON.parse(line.slice(FOUND.length));
}

/** What `attempt` in a script gives. */
interface Attempt {
  ok?: string;
  name?: string;
  status?: number;
  message?: string;
}

/** What opening a backend for CUDA says, with other variables. */
async function opening(env: Record<string, string>): Promise<Attempt> {
  return await ask(
    `give(await attempt(async () => {
  using backend = await Backend.open({ device: "cuda", library: ${
      JSON.stringify(library)
    } });
  return backend.description;
}));`,
    env,
  );
}

/** Whether nvcc can be run. */
async function hasCompiler(): Promise<boolean> {
  try {
    return (await execute(compiler, ["--version"])).code === 0;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    throw error;
  }
}

/** Compiles one C++ file to a library. */
async function compile(name: string, text: string): Promise<string> {
  const source = `${temporary}/${name}.cpp`;
  const path = `${temporary}/${name}`;
  await Deno.mkdir(path.slice(0, path.lastIndexOf("/")), { recursive: true });
  await Deno.writeTextFile(source, text);
  const built = await execute(Deno.env.get("CXX") ?? "g++", [
    ...["-shared", "-fPIC", "-w", "-o", path, source],
  ]);
  assertEquals(built.code, 0, built.stderr);
  return path;
}

/**
 * The library that there is, or one built for one target, as several take
 * minutes. It goes to a folder of its own: with one in the build folder, every
 * test on a machine without a GPU would note that it leaves CUDA aside. The
 * objects that are kept there make the next run's build a matter of linking.
 */
async function findOrBuild(): Promise<string | null> {
  try {
    return (await findCudaLibrary({ build: false })).path;
  } catch (error) {
    if (!(error instanceof LibraryError)) throw error;
  }
  if (!await hasCompiler()) return null;
  const targets = (Deno.env.get("WKV_CUDA_TARGETS") || "sm_90").split(",");
  const folder = `${buildFolders()[0]}/cuda_test`;
  return await buildCudaLibrary({ folder, targets });
}

afterAll(async () => {
  await Deno.remove(temporary, { recursive: true });
});

/** A test that takes the library. */
function withLibrary(name: string, body: () => Promise<void>): void {
  it(name, { skip: library === null && `No ${compiler} here` }, body);
}

/** A test that takes a GPU, too. */
function withGpu(name: string, body: () => Promise<void>): void {
  it(name, { skip: gpu === null && "No GPU here" }, body);
}

describe("the CUDA library", () => {
  withLibrary("exports what wkv.h declares, and nothing else", async () => {
    let listing: string;
    try {
      ({ stdout: listing } = await execute("nm", [
        ...["-D", "--defined-only", library!],
      ]));
    } catch (error) {
      // Without binutils, that dlopen found every name has to do.
      if (error instanceof Deno.errors.NotFound) return;
      throw error;
    }
    const names = listing.trim().split("\n").map((line) => line.split(" ")[2]!);
    assertEquals(names.sort(), [...functions].sort());
  });

  withLibrary("loads without a driver, and is of these sources", async () => {
    const opened = Deno.dlopen(library!, symbols);
    try {
      assertEquals(opened.symbols.wkv_abi_version(), ABI_VERSION);
      const out = new Uint8Array(65);
      assertEquals(opened.symbols.wkv_source_hash(out, 65), wkv_status.WKV_OK);
      const hash = new TextDecoder().decode(out.subarray(0, 64));
      if (!Deno.env.get(CUDA_LIBRARY_VARIABLE)) {
        assertEquals(hash, await sourceHash("cuda"));
      }
      assertEquals(opened.symbols.wkv_live_handles(), 0);
    } finally {
      opened.close();
    }
  });

  it("of another ABI is refused", async () => {
    const other = await compile(
      "other.so",
      functions.map((name) => `extern "C" int ${name}() { return 999; }\n`)
        .join(""),
    );
    const error = await assertRejects(
      () => Backend.open({ device: "cuda", library: other }),
      WkvError,
    );
    assertStringIncludes(
      error.message,
      `${other} has ABI 999, expected ${ABI_VERSION}: build it anew`,
    );
  });

  it("that is a CPU library is refused", async () => {
    using cpu = await Backend.open({ device: "cpu", threads: 1 });
    const error = await assertRejects(
      () => Backend.open({ device: "cuda", library: cpu.path }),
      RangeError,
    );
    assertStringIncludes(error.message, "a library for cpu");
  });

  it("that WKV_LIB_CUDA names, but is a CPU library, is refused", async () => {
    using cpu = await Backend.open({ device: "cpu", threads: 1 });
    const { name, message } = await ask<Attempt>(
      `give(await attempt(async () => {
  using backend = await Backend.open({ device: "cuda" });
  return backend.description;
}));`,
      { WKV_LIB_CUDA: cpu.path },
    );
    assertEquals(name, "RangeError");
    assertStringIncludes(message!, `${cpu.path} is a library for cpu`);
    const { ok, notes } = await ask<{ ok: string; notes: string[] }>(
      `const notes = [];
using backend = await Backend.open({ onNote: (note) => notes.push(note) });
give({ ok: backend.device, notes });`,
      { WKV_LIB_CUDA: cpu.path },
    );
    assertEquals(ok, "cpu");
    assertMatch(notes.join(), /WKV_LIB_CUDA: .* is a library for cpu/);
  });

  it("that may not be opened is left with a note", async () => {
    using cpu = await Backend.open({ device: "cpu", threads: 1 });
    await using copy = await LibraryCopy.make();
    const { stdout, stderr } = await runScript(
      `import { Backend } from "src/backend/backend.ts";
using backend = await Backend.open({ onNote: (note) => console.log(note) });
console.log(backend.device);`,
      ["--allow-read", "--allow-env", "--allow-sys", `--allow-ffi=${cpu.path}`],
      { WKV_LIB_CUDA: copy.path, WKV_LIB_CPU: cpu.path },
    );
    assertEquals(
      stdout,
      `Using the CPU: ${copy.path} may not be opened without --allow-ffi=${copy.path}\ncpu\n`,
      stderr,
    );
  });
});

describe("without a usable GPU", () => {
  /**
   * A driver that says this version, gives `result` for cuInit, and has nothing
   * else that the runtime asks for.
   */
  async function driver(version: number, result: number): Promise<string> {
    const path = await compile(
      `driver_${version}_${result}/libcuda.so.1`,
      `extern "C" {
int cuInit(unsigned) { return ${result}; }
int cuDriverGetVersion(int* out) { *out = ${version}; return 0; }
int cuGetProcAddress_v2(const char* name, void** out, int, unsigned long long, int* found) {
  const auto is = [&](const char* want) { return __builtin_strcmp(name, want) == 0; };
  *out = is("cuInit") ? (void*)cuInit : is("cuDriverGetVersion") ? (void*)cuDriverGetVersion : is("cuGetProcAddress") ? (void*)cuGetProcAddress_v2 : nullptr;
  if (found) *found = *out ? 0 : 1;
  return *out ? 0 : 500;
}
int cuGetProcAddress(const char* name, void** out, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(name, out, version, flags, nullptr);
}
}
`,
    );
    return path.slice(0, path.lastIndexOf("/"));
  }

  withLibrary("no driver is told from an old one and from no GPU", async () => {
    const cases: [Record<string, string>, RegExp][] = [
      [
        { LD_LIBRARY_PATH: await driver(12040, 0) },
        /The NVIDIA driver is for CUDA 12\.4, and this library needs a driver for CUDA \d+\.0 or later/,
      ],
      [
        { LD_LIBRARY_PATH: await driver(99000, 100) },
        /The NVIDIA driver is for CUDA 99\.0 and finds no GPU: nvidia-smi must list one/,
      ],
      [
        {
          LD_LIBRARY_PATH: await driver(99000, 100),
          CUDA_VISIBLE_DEVICES: "7",
        },
        /and CUDA_VISIBLE_DEVICES let it be seen \("7"\)/,
      ],
    ];
    if (gpu === null && (await libcuda()) === null) {
      cases.push([
        {},
        /There is no NVIDIA driver: install a driver for CUDA \d+\.0 or later/,
      ]);
    }
    for (const [env, says] of cases) {
      const { ok, name, status, message } = await opening(env);
      assertEquals([ok, name, status], [
        undefined,
        "WkvError",
        wkv_status.WKV_DEVICE,
      ]);
      assertMatch(message!, says);
    }
  });

  withLibrary("auto takes the CPU with one note, cuda fails", async () => {
    const hidden = { LD_LIBRARY_PATH: await driver(12040, 0) };
    const found = await ask<{ device: string; notes: string[]; cuda: Attempt }>(
      `const notes = [];
using backend = await Backend.open({ onNote: (line) => notes.push(line), threads: 1 });
const cuda = await attempt(() => Backend.open({ device: "cuda" }));
give({ device: backend.device, notes, cuda });`,
      { ...hidden, [CUDA_LIBRARY_VARIABLE]: library! },
    );
    assertEquals([found.device, found.notes.length], ["cpu", 1]);
    assertMatch(found.notes[0]!, /^Using the CPU: .* CUDA 12\.4/);
    assertStringIncludes(found.cuda.message!, "CUDA 12.4");
  });

  it("cuda without a library or a compiler says what was tried", async () => {
    const found = await ask<Attempt>(
      `give(await attempt(() => Backend.open({ device: "cuda" })));`,
      { [CUDA_LIBRARY_VARIABLE]: `${temporary}/none.so` },
    );
    assertEquals(found.name, "LibraryError");
    assertStringIncludes(found.message!, `${temporary}/none.so`);
  });

  /** Where a driver lies; null: nowhere. */
  async function libcuda(): Promise<string | null> {
    try {
      Deno.dlopen("libcuda.so.1", {}).close();
      return await Promise.resolve("libcuda.so.1");
    } catch {
      return null;
    }
  }
});

describe("a build", () => {
  it("refuses targets that are none", async () => {
    for (const target of ["", "90", "sm90", "sm_", "sm_90;sm_80", "native"]) {
      const error = await assertRejects(
        () => buildCudaLibrary({ folder: temporary, targets: [target] }),
        RangeError,
      );
      assertStringIncludes(error.message, `current value is "${target}"`);
    }
    const error = await assertRejects(
      () => buildCudaLibrary({ folder: temporary, targets: [] }),
      RangeError,
    );
    assertStringIncludes(error.message, "No CUDA target");
  });

  it("without nvcc says how to come by it", async () => {
    const error = await assertRejects(
      () => buildCudaLibrary({ folder: temporary, compiler: "/no/nvcc" }),
      Error,
    );
    assertStringIncludes(error.message, `No compiler: "/no/nvcc"`);
    assertStringIncludes(error.message, "CUDA toolkit");
  });

  it("compiles what changed, and keeps no other objects", async () => {
    // Notes its sources, and writes what is asked for as a compiler would.
    const fake = `${temporary}/fake_nvcc`;
    const log = `${temporary}/compiled`;
    await Deno.writeTextFile(
      fake,
      `#!/bin/sh
[ "$1" = --version ] && { cat "${temporary}/version"; exit; }
while [ $# -gt 0 ]; do
  case "$1" in
    -c) basename "$2" >> "${log}";;
    -o) echo object > "$2";;
  esac
  shift
done
echo "Compiling entry function 'k' for 'sm_90'
8 bytes spill stores, 4 bytes spill loads
Used 32 registers, used 1 barriers, 1024 bytes smem"
`,
    );
    await Deno.chmod(fake, 0o755);
    const folder = `${temporary}/objects_test`;
    const build = async (version: string, targets: string[]) => {
      await Deno.writeTextFile(`${temporary}/version`, version);
      await Deno.writeTextFile(log, "");
      let kernels = 0;
      const path = await buildCudaLibrary({
        folder,
        targets,
        compiler: fake,
        onKernels: (uses) => {
          kernels = uses.length;
          assertEquals(uses[0], {
            kernel: "k",
            target: "sm_90",
            registers: 32,
            shared: 1024,
            spills: 12,
          });
        },
      });
      assertEquals(await Deno.readTextFile(path), "object\n");
      const compiled = (await Deno.readTextFile(log)).trim();
      const names: string[] = [];
      for await (const { name } of Deno.readDir(`${folder}/objects`)) {
        names.push(name);
      }
      return {
        compiled: compiled === "" ? 0 : compiled.split("\n").length,
        kernels,
        names: names.sort(),
      };
    };
    const first = await build("1", ["sm_90"]);
    assertGreater(first.compiled, 5);
    assertEquals(first.kernels, first.compiled);
    assertEquals(first.names.length, 2 * first.compiled);
    const second = await build("1", ["sm_90"]);
    assertEquals(second, { ...first, compiled: 0 });
    // One object gone: that file alone.
    const gone = first.names.find((name) => name.endsWith(".o"))!;
    await Deno.remove(`${folder}/objects/${gone}`);
    assertEquals(await build("1", ["sm_90"]), { ...first, compiled: 1 });
    for (
      const other of [
        await build("2", ["sm_90"]),
        await build("2", ["sm_80"]),
      ]
    ) {
      assertEquals(other.compiled, first.compiled);
      assertEquals(other.names.length, first.names.length);
      assert(!other.names.some((name) => first.names.includes(name)));
    }
    for await (const { name } of Deno.readDir(folder)) {
      assert(!name.startsWith(".build-"), name);
    }
  });

  it("compiles files for wgmma for sm_90a alone where 9.0 is a target", async () => {
    const fake = `${temporary}/codes_nvcc`, log = `${temporary}/codes.log`;
    await Deno.writeTextFile(
      fake,
      `#!/bin/sh
codes=
while [ $# -gt 0 ]; do
  case "$1" in
    -gencode) codes="$codes $2";;
    -c) source=$(basename "$2");;
    -o) echo object > "$2";;
  esac
  shift
done
if [ -n "$source" ]; then echo "$source$codes" >> "${log}"; fi
`,
    );
    await Deno.chmod(fake, 0o755);
    const codesOf = async (targets: string[]) => {
      await Deno.writeTextFile(log, "");
      // Each its own, as an object for the same codes is kept.
      const folder = `${temporary}/codes_${targets.join("_")}`;
      await buildCudaLibrary({ folder, targets, compiler: fake });
      const lines = (await Deno.readTextFile(log)).trim().split("\n");
      return Object.fromEntries(
        lines.map((line) => {
          const [source, ...codes] = line.split(" ");
          return [source, codes.map((code) => code.replace(/^.*code=/, ""))];
        }),
      );
    };
    for (
      const [targets, wgmma] of [
        [["sm_90"], ["sm_90a"]],
        [["sm_80", "sm_90", "compute_90"], ["sm_90a"]],
        [["sm_80", "sm_89"], ["sm_80", "sm_89"]],
        [["sm_100"], ["sm_100"]],
      ]
    ) {
      const codes = await codesOf(targets!);
      assertEquals(codes["prefill_wgmma.cu"], wgmma);
      assertEquals(codes["prefill.cu"], targets);
    }
  });
});

describe("on a GPU", () => {
  withGpu("the device is named with its driver", async () => {
    assertMatch(
      (await opening({})).ok!,
      /^CUDA, .+, sm_\d+, \d+ multiprocessors, driver \d+\.\d+/,
    );
  });

  withGpu("WKV_CUDA_SHARED_KB lowers what blocks share", async () => {
    for (const value of ["99", "48", ""]) {
      const { ok, message } = await opening({ WKV_CUDA_SHARED_KB: value });
      assert(ok !== undefined, message);
    }
    for (const value of ["47", "0", "-1", "99x", "x", "9999", "1e2"]) {
      const { status, message } = await opening({ WKV_CUDA_SHARED_KB: value });
      assertEquals(status, wkv_status.WKV_INVALID, value);
      assertMatch(
        message!,
        new RegExp(`between 48 and \\d+: current value is "${value}"`),
      );
    }
  });

  withGpu("WKV_CUDA_GRID_MB is how large a chain's weights are", async () => {
    for (const value of ["0", "1024", ""]) {
      const { ok, message } = await opening({ WKV_CUDA_GRID_MB: value });
      assert(ok !== undefined, message);
    }
    for (const value of ["-1", "1.5", "x"]) {
      const { status, message } = await opening({ WKV_CUDA_GRID_MB: value });
      assertEquals(status, wkv_status.WKV_INVALID, value);
      assertMatch(message!, new RegExp(`current value is "${value}"`));
    }
  });

  withGpu(
    "memory that cannot be had is an error, and life goes on",
    async () => {
      const found = await ask<
        { failed: Attempt[]; handles: [number, number]; sum: number }
      >(
        `using backend = await Backend.open({ device: "cuda", library: ${
          JSON.stringify(library)
        } });
const kept = [], failed = [], before = backend.liveHandles;
for (let i = 0; i < 64; i++) {
  // 8 GiB each, until there are none.
  const result = await attempt(() => { kept.push(new Tensor(backend, "F32", 65536, 32768)); });
  if (result.name) { failed.push(result); if (failed.length === 2) break; }
}
const during = backend.liveHandles - kept.length;
for (const tensor of kept) tensor.close();
using after = Tensor.from(backend, Float32Array.of(1, 2, 3));
give({ failed, handles: [before, during], sum: after.floats().reduce((a, b) => a + b) });`,
      );
      assertEquals(found.failed.length, 2);
      for (const { name, status, message } of found.failed) {
        assertEquals([name, status], ["WkvError", wkv_status.WKV_MEMORY]);
        const [, asked, free, all] =
          /Allocating (\d+) bytes on the device: .*, (\d+) of (\d+) bytes are free/
            .exec(message!)!.map(Number);
        assertEquals(asked, 2 ** 33);
        assertLess(free!, asked!);
        assertLess(asked!, all!);
      }
      assertEquals(found.handles[0], found.handles[1]);
      assertEquals(found.sum, 6);
    },
  );

  withGpu(
    "a model and caches that have no room leave nothing behind, and a small one runs",
    async () => {
      const folder = `${temporary}/large`;
      await Deno.mkdir(folder);
      // 400 MB where 200 to 256 are free.
      const large = await writeLargeModel(folder, "safetensors", 12);
      const small = `${ROOT}/tests/golden/models/llama`;
      const ended = await execute(Deno.execPath(), [
        ...["run", "-A", "--no-prompt", "tests/out_of_memory.ts"],
        ...[library!, small, large],
      ]);
      assertEquals(ended.code, 0, ended.stderr);
      const found: {
        start: number[];
        asked: number;
        filled: number[];
        loading: Attempt;
        loaded: number[];
        caches: { said: Attempt; held: number[] }[];
        end: number[];
        tokens: Record<string, number[]>;
        weights: number;
      } = JSON.parse(ended.stdout);
      assertEquals(found.filled[0], found.start[0]! + found.asked);
      const refusals = [
        { said: found.loading, held: found.loaded },
        ...found.caches,
      ];
      assertEquals(refusals.length, 4);
      for (const { said, held } of refusals) {
        assertEquals([said.name, said.status], [
          "WkvError",
          wkv_status.WKV_MEMORY,
        ], said.message);
        const [, asked, free, all] =
          /Allocating (\d+) bytes on the device: .*, (\d+) of (\d+) bytes are free/
            .exec(said.message!)!.map(Number);
        assertGreater(asked!, 1 << 20);
        assertLess(free!, 320 << 20);
        assertLess(free!, all!);
        // All that the refused had taken is given back, to the byte.
        assertEquals(held, found.filled, said.message);
      }
      assertEquals(found.end, found.start);
      const { before, crowded, afterwards } = found.tokens;
      assertEquals(before!.length, 24);
      assertEquals([crowded, afterwards], [before, before]);
      assertGreater(found.weights, 384 << 20);
    },
  );

  withGpu("a failure that loses the device is told by every call", async () => {
    if (!await hasCompiler()) return;
    // A kernel outside the library traps in the process's one device context.
    const source = `${temporary}/trap.cu`;
    const path = `${temporary}/trap.so`;
    await Deno.writeTextFile(
      source,
      `__global__ void trap() { __trap(); }
extern "C" int wreck() { trap<<<1, 1>>>(); return cudaDeviceSynchronize(); }
`,
    );
    const built = await execute(compiler, [
      ...["-shared", "-Xcompiler", "-fPIC", "-cudart", "static"],
      ...["-arch=native", "-o", path, source],
    ]);
    assertEquals(built.code, 0, built.stderr);
    const found = await ask<
      { wreck: number; said: Attempt[]; opened: Attempt; closed: Attempt }
    >(
      `const library = ${JSON.stringify(library)};
const backend = await Backend.open({ device: "cuda", library });
const tensor = Tensor.from(backend, Float32Array.of(1, 2, 3));
const graph = backend.record(() => {});
const other = Deno.dlopen(${
        JSON.stringify(path)
      }, { wreck: { parameters: [], result: "i32" } });
const wreck = other.symbols.wreck();
const said = [
  await attempt(() => tensor.floats()),
  await attempt(() => tensor.floats()),
  await attempt(() => { new Tensor(backend, "F32", 1, 1); }),
  await attempt(() => graph.run()),
];
const opened = await attempt(() => Backend.open({ device: "cuda", library }));
const closed = await attempt(() => { tensor.close(); graph.close(); backend.close(); return "closed"; });
give({ wreck, said, opened, closed });`,
    );
    assert(found.wreck !== 0);
    assertEquals(found.closed, { ok: "closed" });
    const first = /: (.*; .* start anew)/.exec(found.said[0]!.message!)?.[1];
    assert(first !== undefined, found.said[0]!.message);
    for (const { status, message } of [...found.said, found.opened]) {
      assertEquals(status, wkv_status.WKV_DEVICE);
      assertStringIncludes(message!, first);
    }
  });
});
