/**
 * What the device's memory can do, the ceiling that benchmarks compare with.
 *
 * CUDA: a device-to-device copy of 1 GiB by the driver (cuMemcpyDtoDAsync, what
 * torch's copy_ comes to), read and write both counted, the best of five
 * samples of twenty copies. CPU: all cores reading 512 MiB
 * (read_bandwidth.cpp, built with g++), since its ops hardly write.
 */

/** A memory's figures; null where they could not be had. */
export interface Memory {
  /** What was measured. */
  kind: "copy" | "read";
  /** Bytes a second. */
  bytesPerSecond: number | null;
  /** Bytes of the last cache before the memory. */
  cacheBytes: number | null;
  /** Why a figure is missing. */
  note?: string;
}

/** Measures the memory of a device. */
export async function measureMemory(device: "cpu" | "cuda"): Promise<Memory> {
  return device === "cuda" ? measureCuda() : await measureCpu();
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
const COPIES = 20;

function measureCuda(): Memory {
  const kind = "copy";
  const none = { kind, bytesPerSecond: null, cacheBytes: null } as const;
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
    let best = Infinity;
    for (let sample = 0; sample < 6; sample++) {
      const start = performance.now();
      for (let i = 0; i < COPIES; i++) {
        check(cuda.cuMemcpyDtoDAsync_v2(to, from, BigInt(bytes), 0n));
      }
      check(cuda.cuCtxSynchronize());
      // The first one warms up.
      if (sample > 0) best = Math.min(best, performance.now() - start);
    }
    const bytesPerSecond = 2 * bytes * COPIES / best * 1000;
    return { kind, bytesPerSecond, cacheBytes };
  } catch (error) {
    return { ...none, note: (error as Error).message };
  }
}

async function measureCpu(): Promise<Memory> {
  const kind = "read";
  let cacheBytes: number | null = null;
  let note: string | undefined;
  try {
    const size = await Deno.readTextFile(
      "/sys/devices/system/cpu/cpu0/cache/index3/size",
    );
    cacheBytes = parseInt(size) * 1024;
  } catch {
    note = "The cache's size is not known";
  }
  const source = new URL("read_bandwidth.cpp", import.meta.url);
  let bytesPerSecond: number | null = null;
  if (source.protocol === "file:") {
    const program = await Deno.makeTempFile();
    try {
      await run("g++", [
        ..."-O3 -march=native -pthread -o".split(" "),
        program,
        decodeURIComponent(source.pathname),
      ]);
      const cores = String(navigator.hardwareConcurrency);
      bytesPerSecond = Number(await run(program, [cores]));
    } catch (error) {
      note = (error as Error).message;
    } finally {
      await Deno.remove(program);
    }
  } else {
    note = "The read bandwidth is measured in a checkout only";
  }
  return {
    kind,
    bytesPerSecond,
    cacheBytes,
    ...(note === undefined ? {} : { note }),
  };
}

async function run(command: string, args: string[]): Promise<string> {
  const { success, stdout, stderr } = await new Deno.Command(command, { args })
    .output();
  const text = new TextDecoder();
  if (!success) throw new Error(`${command} failed: ${text.decode(stderr)}`);
  return text.decode(stdout);
}
