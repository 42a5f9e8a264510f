/**
 * The native library as an object: opens it, checks each call's status, owns
 * every handle. Model, caches and tests reach C through it and ops.ts.
 */

import { LibraryError, WkvError } from "./error.ts";
import {
  CUDA_LIBRARY_VARIABLE,
  findCpuLibrary,
  findCudaLibrary,
  type FindOptions,
} from "./library.ts";
import { ABI_VERSION, symbols } from "./symbols.ts";

/** The devices that a backend can be asked for. */
export type Device = "auto" | "cpu" | "cuda";

/** How a backend is opened. */
export interface BackendOptions extends FindOptions {
  /** The device. @default `"auto"` */
  device?: Device | undefined;
  /** Threads; 0 is one for each core this process may use. @default `0` */
  threads?: number | undefined;
  /** A library to open as it is; then no file or variable is looked at. */
  library?: string | undefined;
  /** Gets one line when `auto` leaves a GPU aside that it looked for. */
  onNote?: ((line: string) => void) | undefined;
}

type Library = Deno.DynamicLibrary<typeof symbols>;

/**
 * Functions that return a status and take the context first.
 *
 * @internal
 */
export type ContextFunction = {
  [K in keyof typeof symbols]: (typeof symbols)[K] extends { nonblocking: true }
    ? never
    : (typeof symbols)[K]["parameters"] extends readonly ["i32", ...infer _] ? K
    : never;
}[keyof typeof symbols];

type Rest<T> = T extends (context: number, ...rest: infer R) => unknown ? R
  : never;

const decoder = new TextDecoder();

/** What a machine with an NVIDIA driver has: its version, or Windows' GPU or a Jetson's under Linux. */
export const DRIVER_FILES = [
  "/proc/driver/nvidia/version",
  "/dev/dxg",
  "/dev/nvmap",
] as const;

const NO_DRIVER = "no NVIDIA driver is loaded";

/** An open native library with one context. */
export class Backend implements Disposable {
  /** The library's file. */
  readonly path: string;
  /** SHA-256 of the sources that the library was built from, in hexadecimal. */
  readonly sourceHash: string;
  /** The device in words, such as `CPU, x86_64_v3, 2 threads`. */
  readonly description: string;
  /** The kind of device. */
  readonly device: "cpu" | "cuda";
  readonly #library: Library;
  readonly #context: number;
  /** Runs that were asked for and have not ended. */
  #running = 0;
  /** Those that another thread waits for. */
  #waited = 0;
  /** The one that this thread looks after. */
  #watched: Promise<number> | undefined;
  #closed = false;

  private constructor(path: string, library: Library, context: number) {
    this.path = path;
    this.#library = library;
    this.#context = context;
    const hash = new Uint8Array(65);
    library.symbols.wkv_source_hash(hash, hash.length);
    this.sourceHash = decoder.decode(hash.subarray(0, 64));
    this.description = this.#text("wkv_device");
    this.device = this.description.startsWith("CUDA") ? "cuda" : "cpu";
  }

  /**
   * Opens the library, building it when there is none. `auto` takes the CUDA
   * library when one is built or named and a GPU answers, else the CPU's, with
   * a note that says why.
   *
   * @throws {LibraryError} No library was found and none could be built.
   * @throws {WkvError} The library has another ABI, or opens no context.
   */
  static async open(options: BackendOptions = {}): Promise<Backend> {
    const { device = "auto", threads = 0 } = options;
    if (device !== "cpu" && device !== "auto" && device !== "cuda") {
      throw new RangeError(
        `The device must be auto, cpu or cuda: current value is "${device}"`,
      );
    }
    if (!Number.isInteger(threads) || threads < 0 || threads > 1024) {
      throw new RangeError(
        `The threads must be between 0 and 1024: current value is ${threads}`,
      );
    }
    if (Deno.build.os !== "linux") throw new Error("Linux only so far");
    if (options.library !== undefined) {
      return Backend.#load(options.library, device, threads);
    }
    if (device === "cuda") {
      return Backend.#load(
        await Backend.#cudaLibrary(options),
        device,
        threads,
      );
    }
    if (device === "auto") {
      const cuda = await Backend.#tryCuda(options);
      if (cuda !== null) return cuda;
    }
    return Backend.#load((await findCpuLibrary(options)).path, "cpu", threads);
  }

  /** The CUDA library's path; it is built where there is a driver to run it. */
  static async #cudaLibrary(options: BackendOptions): Promise<string> {
    try {
      return (await findCudaLibrary({ ...options, build: false })).path;
    } catch (error) {
      if (!(error instanceof LibraryError)) throw error;
      if (Deno.env.get(CUDA_LIBRARY_VARIABLE)) throw error;
      if (!await hasDriver()) {
        throw new LibraryError(`No CUDA: ${NO_DRIVER}`, error.tried);
      }
    }
    return (await findCudaLibrary(options)).path;
  }

  /** The CUDA library, if there is one and a GPU answers; else a note says why not. */
  static async #tryCuda(options: BackendOptions): Promise<Backend | null> {
    const refuse = (reason: string): null => {
      options.onNote?.(`Using the CPU: ${reason}`);
      return null;
    };
    // Who may not ask for the variable gets the CPU, not a question.
    const variable = CUDA_LIBRARY_VARIABLE;
    const { state } = await Deno.permissions.query({ name: "env", variable });
    if (state !== "granted") return refuse(`${variable} may not be read`);
    let path: string;
    try {
      ({ path } = await findCudaLibrary({ build: false }));
    } catch (error) {
      if (!(error instanceof LibraryError)) throw error;
      if (Deno.env.get(variable)) return refuse(error.message);
      return refuse(
        await hasDriver()
          ? "no CUDA library is built yet (wkv build cuda, or --device cuda)"
          : NO_DRIVER,
      );
    }
    const ffi = await Deno.permissions.query({ name: "ffi", path });
    if (ffi.state !== "granted") {
      return refuse(`${path} may not be opened without --allow-ffi=${path}`);
    }
    try {
      return Backend.#load(path, "cuda", options.threads ?? 0);
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error);
      return refuse(Deno.env.get(variable) ? `${variable}: ${reason}` : reason);
    }
  }

  /** Opens the library at `path`, which must be for `device`. */
  static #load(
    path: string,
    device: "auto" | "cpu" | "cuda",
    threads: number,
  ): Backend {
    let library: Library;
    try {
      library = Deno.dlopen(path, symbols);
    } catch (cause) {
      if (cause instanceof Deno.errors.NotCapable) {
        throw new Deno.errors.NotCapable(
          `The library may not be opened: run with --allow-ffi=${path}`,
          { cause },
        );
      }
      throw new Error(
        `${path} cannot be opened: ${
          cause instanceof Error ? cause.message : cause
        }`,
        { cause },
      );
    }
    try {
      const version = library.symbols.wkv_abi_version();
      if (version !== ABI_VERSION) {
        throw new WkvError(
          "wkv_abi_version",
          1,
          `${path} has ABI ${version}, expected ${ABI_VERSION}: build it anew`,
        );
      }
      const out = new Int32Array(1);
      const status = library.symbols.wkv_context_open(threads, out, 4);
      if (status !== 0) {
        throw new WkvError("wkv_context_open", status, lastError(library, 0));
      }
      const backend = new Backend(path, library, out[0]!);
      if (device === "auto" || device === backend.device) return backend;
      library.symbols.wkv_close(out[0]!, out[0]!);
      throw new RangeError(
        `The device is ${device}, but ${path} is a library for ${backend.device}`,
      );
    } catch (error) {
      library.close();
      throw error;
    }
  }

  /**
   * Calls a function of wkv.h with this context and checks its status.
   *
   * @internal
   */
  call<K extends ContextFunction>(
    name: K,
    ...rest: Rest<Library["symbols"][K]>
  ): void {
    this.#check();
    const entry = this.#library.symbols[name] as (
      context: number,
      ...rest: unknown[]
    ) => number;
    const status = entry(this.#context, ...rest);
    if (status !== 0) throw this.#error(name, status);
  }

  /** Calls a function that writes a new handle out. */
  open(open: (out: Int32Array<ArrayBuffer>) => void): number {
    const out = new Int32Array(1);
    open(out);
    return out[0]!;
  }

  /** Closes a handle; does nothing once the backend itself is closed. */
  closeHandle(handle: number): void {
    if (!this.#closed) this.call("wkv_close", handle);
  }

  /** Bytes on the device that this process holds through the library. */
  get memory(): number {
    const out = new Float64Array(1);
    this.call("wkv_memory", out, 8);
    return out[0]!;
  }

  /** Bytes that a handle's object holds. */
  bytes(handle: number): number {
    const out = new Float64Array(1);
    this.call("wkv_bytes", handle, out, 8);
    return out[0]!;
  }

  /**
   * Records what `ops` calls as a graph.
   *
   * @throws {WkvError} One of the ops was refused.
   */
  record(ops: () => void): Graph {
    this.call("wkv_graph_begin");
    const out = new Int32Array(1);
    let failure: unknown;
    try {
      ops();
    } catch (error) {
      failure = error;
    }
    try {
      this.call("wkv_graph_end", out, 4);
    } catch (error) {
      throw failure ?? error;
    }
    const graph = new Graph(this, out[0]!);
    if (failure === undefined) return graph;
    graph.close();
    throw failure;
  }

  /**
   * Runs a graph beside the main thread. Used by {@linkcode Graph.run}.
   *
   * One run on a GPU is started from here and looked after once a turn of the
   * event loop: until a thread that waits for it has woken, and has woken this
   * one, takes as long as many a kernel of it.
   */
  async runGraph(graph: number, times: number): Promise<void> {
    this.#check();
    this.#running++;
    try {
      // Runs follow each other, and to look after one must not wait for the next.
      while (this.#watched !== undefined) await this.#watched;
      const status = this.device === "cuda" && times === 1 && this.#waited === 0
        ? await this.#watch(graph)
        : await this.#wait(graph, times);
      if (status !== 0) throw this.#error("wkv_graph_run", status);
    } finally {
      this.#running--;
      if (this.#closed && this.#running === 0) this.#unload();
    }
  }

  /** Starts a run and looks after it; gives its status. */
  #watch(graph: number): Promise<number> | number {
    const { wkv_graph_start, wkv_graph_poll } = this.#library.symbols;
    const started = wkv_graph_start(this.#context, graph);
    if (started !== 0) return started;
    const ended = new Int32Array(1);
    return this.#watched = new Promise((resolve) => {
      const look = () => {
        const status = wkv_graph_poll(this.#context, ended, 4);
        if (status === 0 && ended[0] === 0) return void setImmediate(look);
        this.#watched = undefined;
        resolve(status);
      };
      setImmediate(look);
    });
  }

  /** Has another thread run a graph; gives its status. */
  async #wait(graph: number, times: number): Promise<number> {
    this.#waited++;
    try {
      const { wkv_graph_run } = this.#library.symbols;
      return await wkv_graph_run(this.#context, graph, times);
    } finally {
      this.#waited--;
    }
  }

  /** Handles that are open in the library, over all backends. */
  get liveHandles(): number {
    this.#check();
    return this.#library.symbols.wkv_live_handles();
  }

  /** Closes the context with all that it opened; calls in flight end first. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    if (this.#running === 0) this.#unload();
  }

  /** Same as {@linkcode Backend.close}. */
  [Symbol.dispose](): void {
    this.close();
  }

  #unload(): void {
    this.#library.symbols.wkv_close(this.#context, this.#context);
    this.#library.close();
  }

  #check(): void {
    if (this.#closed) throw new Error("The backend is closed");
  }

  #error(name: string, status: number): WkvError {
    return new WkvError(name, status, lastError(this.#library, this.#context));
  }

  #text(name: "wkv_device"): string {
    const out = new Uint8Array(256);
    this.call(name, out, out.length);
    return decoder.decode(out.subarray(0, out.indexOf(0)));
  }
}

/** Ops that were recorded once and run as often as wanted. */
export class Graph implements Disposable {
  readonly #backend: Backend;
  readonly #handle: number;
  #closed = false;

  /** Made by {@linkcode Backend.record}. */
  constructor(backend: Backend, handle: number) {
    this.#backend = backend;
    this.#handle = handle;
  }

  /**
   * Runs all its ops in order, `times` times over, beside the main thread.
   *
   * @throws {WkvError} An op failed; the caches it wrote are undefined then.
   */
  run(times = 1): Promise<void> {
    return this.#backend.runGraph(this.#handle, times);
  }

  /** Gives the graph up. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#backend.closeHandle(this.#handle);
  }

  /** Same as {@linkcode Graph.close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}

function lastError(library: Library, context: number): string {
  const out = new Uint8Array(1024);
  library.symbols.wkv_error(context, out, out.length);
  return decoder.decode(out.subarray(0, out.indexOf(0)));
}

/** Whether this machine has an NVIDIA driver; true where that may not be asked. */
async function hasDriver(): Promise<boolean> {
  for (const path of DRIVER_FILES) {
    try {
      await Deno.stat(path);
      return true;
    } catch (error) {
      // Such files may be asked for with all permissions only.
      if (error instanceof Deno.errors.NotCapable) return true;
    }
  }
  return false;
}
