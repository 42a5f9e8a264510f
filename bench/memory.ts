/**
 * What the device's memory can do, the ceiling that benchmarks compare with:
 * how fast it is read, since a decode step hardly writes.
 *
 * CUDA: the better of two kernels that read 1 GiB (read_bandwidth.cu, built
 * with nvcc), and beside it a device-to-device copy of 1 GiB by the driver
 * (cuMemcpyDtoDAsync), read and write both counted, the median of ten samples
 * of twenty copies; without nvcc this copy is the ceiling. CPU: all cores
 * reading 512 MiB (read_bandwidth.cpp, built with g++).
 */

import { compilerOf } from "../src/backend/build.ts";
import { median } from "./timing.ts";

/** A memory's figures; null where they could not be had. */
export interface Memory {
  /** What the ceiling is a figure of. */
  kind: "copy" | "read";
  /** Bytes a second: the ceiling. */
  bytesPerSecond: number | null;
  /** Of a GPU: bytes a second that are read with loads of 16 bytes. */
  loads?: number | null;
  /** And with bulk copies to shared memory. */
  bulk?: number | null;
  /** And that a copy moves, read and write both counted. */
  copy?: number | null;
  /** Bytes of the last cache before the memory. */
  cacheBytes: number | null;
  /** Why a figure is missing. */
  note?: string;
}

/** Measures the memory of a device. */
export async function measureMemory(device: "cpu" | "cuda"): Promise<Memory> {
  return device === "cuda" ? await measureCuda() : await measureCpu();
}

const symbols = {
  cuInit: { parameters: ["u32"], result: "i32" },
  cuDeviceGet: { parameters: ["buffer", "i32"], result: "i32" },
  cuDeviceGetAttribute: {
    parameters: ["buffer", "i32", "i32"],
    result: "i32",
  },
  cuDevicePrimaryCtxRetain: { parameters: ["buffer", "i32"], result: "i32" },
  cuDevicePrimaryCtxRelease_v2: { parameters: ["i32"], result: "i32" },
  // A context is a pointer, which travels as the integer that it is.
  cuCtxSetCurrent: { parameters: ["u64"], result: "i32" },
  cuCtxSynchronize: { parameters: [], result: "i32" },
  cuMemAlloc_v2: { parameters: ["buffer", "usize"], result: "i32" },
  cuMemFree_v2: { parameters: ["u64"], result: "i32" },
  cuMemcpyDtoDAsync_v2: {
    parameters: ["u64", "u64", "usize", "u64"],
    result: "i32",
  },
} as const;

const L2_CACHE_SIZE = 38; // CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE
const COPIES = 20, SAMPLES = 10;

async function measureCuda(): Promise<Memory> {
  const { copy, cacheBytes, note } = measureCopy();
  const notes = note === undefined ? [] : [note];
  let loads: number | null = null, bulk: number | null = null;
  try {
    ({ loads, bulk } = JSON.parse(await runProbe("cuda", [])));
  } catch (error) {
    notes.push(`no read bandwidth: ${(error as Error).message}`);
  }
  const read = Math.max(loads ?? 0, bulk ?? 0);
  return {
    kind: read > 0 ? "read" : "copy",
    bytesPerSecond: read || copy,
    loads,
    bulk,
    copy,
    cacheBytes,
    ...notes.length > 0 ? { note: notes.join("; ") } : {},
  };
}

function measureCopy(): {
  copy: number | null;
  cacheBytes: number | null;
  note?: string;
} {
  const none = { copy: null, cacheBytes: null };
  let library: Deno.DynamicLibrary<typeof symbols>;
  try {
    library = Deno.dlopen("libcuda.so.1", symbols);
  } catch (error) {
    return { ...none, note: `No driver library: ${(error as Error).message}` };
  }
  using stack = new DisposableStack();
  stack.defer(() => library.close());
  const cuda = library.symbols;
  const check = (status: number) => {
    if (status !== 0) throw new Error(`The CUDA driver failed with ${status}`);
  };
  const number = new Int32Array(1);
  const word = new BigUint64Array(1);
  try {
    check(cuda.cuInit(0));
    check(cuda.cuDeviceGet(number, 0));
    const device = number[0]!;
    check(cuda.cuDeviceGetAttribute(number, L2_CACHE_SIZE, device));
    const cacheBytes = number[0]!;
    check(cuda.cuDevicePrimaryCtxRetain(word, device));
    stack.defer(() => cuda.cuDevicePrimaryCtxRelease_v2(device));
    check(cuda.cuCtxSetCurrent(word[0]!));
    const allocate = (bytes: number): bigint => {
      check(cuda.cuMemAlloc_v2(word, BigInt(bytes)));
      const memory = word[0]!;
      stack.defer(() => cuda.cuMemFree_v2(memory));
      return memory;
    };
    const bytes = 1 << 30;
    const [to, from] = [allocate(bytes), allocate(bytes)];
    const samples: number[] = [];
    for (let sample = 0; sample <= SAMPLES; sample++) {
      const start = performance.now();
      for (let i = 0; i < COPIES; i++) {
        check(cuda.cuMemcpyDtoDAsync_v2(to, from, BigInt(bytes), 0n));
      }
      check(cuda.cuCtxSynchronize());
      // The first one warms up.
      if (sample > 0) samples.push(performance.now() - start);
    }
    const copy = 2 * bytes * COPIES / median(samples) * 1000;
    return { copy, cacheBytes };
  } catch (error) {
    return { ...none, note: (error as Error).message };
  }
}

async function measureCpu(): Promise<Memory> {
  const notes: string[] = [];
  let cacheBytes: number | null = null, bytesPerSecond: number | null = null;
  try {
    const size = await Deno.readTextFile(
      "/sys/devices/system/cpu/cpu0/cache/index3/size",
    );
    cacheBytes = parseInt(size) * 1024;
  } catch {
    notes.push("the cache's size is not known");
  }
  try {
    const cores = String(navigator.hardwareConcurrency);
    bytesPerSecond = Number(await runProbe("cpu", [cores]));
  } catch (error) {
    notes.push((error as Error).message);
  }
  return {
    kind: "read",
    bytesPerSecond,
    cacheBytes,
    ...notes.length > 0 ? { note: notes.join("; ") } : {},
  };
}

// ---- the programs that read ----

const probes = {
  cpu: {
    source: new URL("read_bandwidth.cpp", import.meta.url),
    flags: ["-O3", "-march=native", "-pthread"],
  },
  cuda: {
    source: new URL("read_bandwidth.cu", import.meta.url),
    flags: ["-O3", "-std=c++17", "-arch=native", "-cudart", "static"],
  },
};

/** Builds a program, which takes a second or two, and runs it. */
async function runProbe(
  device: "cpu" | "cuda",
  args: string[],
): Promise<string> {
  const { source, flags } = probes[device];
  if (source.protocol !== "file:") {
    throw new Error("the read bandwidth is measured in a checkout only");
  }
  try {
    const program = await Deno.makeTempFile();
    try {
      const from = decodeURIComponent(source.pathname);
      await run(compilerOf(device), [...flags, "-o", program, from]);
      return await run(program, args);
    } finally {
      await Deno.remove(program);
    }
  } catch (error) {
    if (!(error instanceof Deno.errors.NotCapable)) throw error;
    // Deno lets nobody write what it may run.
    throw new Error("the read bandwidth is measured with --allow-all only");
  }
}

async function run(command: string, args: string[]): Promise<string> {
  let output: Deno.CommandOutput;
  try {
    output = await new Deno.Command(command, { args }).output();
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
    throw new Error(`there is no ${command}`);
  }
  const { success, stdout, stderr } = output;
  const text = new TextDecoder();
  if (!success) throw new Error(`${command} failed: ${text.decode(stderr)}`);
  return text.decode(stdout);
}
