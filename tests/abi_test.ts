/**
 * The C ABI: generated files are current, the library exports wkv.h and nothing
 * else, wrong arguments give a status with a text, and one permission is enough.
 */

import {
  assert,
  assertEquals,
  assertGreater,
  assertMatch,
  assertNotEquals,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { sourceModule, symbolTable } from "../kernels/bind.ts";
import { Backend } from "../src/backend/backend.ts";
import { sourceHash } from "../src/backend/build.ts";
import { LIBRARY_VARIABLE } from "../src/backend/library.ts";
import {
  ABI_VERSION,
  symbols,
  wkv_cache_field,
  wkv_status,
} from "../src/backend/symbols.ts";
import { afterAll, beforeAll, describe, it, testDevice } from "./device.ts";
import { LibraryCopy, runScript } from "./isolated.ts";

const root = new URL("../", import.meta.url);
const read = (path: string) => Deno.readTextFile(new URL(path, root));
const { WKV_OK, WKV_INVALID, WKV_HANDLE, WKV_MEMORY, WKV_DATA } = wkv_status;
const HUGE = 2 ** 31 - 1;
const LOWEST = -(2 ** 31);

let backend: Backend;
let library: Deno.DynamicLibrary<typeof symbols>;
let start = 0;
let copy: LibraryCopy;
beforeAll(async () => {
  copy = await LibraryCopy.make();
  backend = await Backend.open({ library: copy.path, threads: 1 });
  library = Deno.dlopen(backend.path, symbols);
  start = backend.liveHandles;
});
afterAll(async () => {
  assertEquals(backend?.liveHandles, start, "a test left handles open");
  library?.close();
  backend?.close();
  await copy?.[Symbol.asyncDispose]();
});

type Name = keyof typeof symbols;
type Argument = number | ArrayBufferView<ArrayBuffer> | null;

/** Calls a function of the library as it is. */
function raw(name: Name, ...args: Argument[]): number {
  const entry = library.symbols[name] as (...args: Argument[]) => number;
  return entry(...args);
}

/** The text of a context's last failure. */
function text(context: number): string {
  const out = new Uint8Array(1024);
  assertEquals(raw("wkv_error", context, out, out.length), WKV_OK);
  assert(out.includes(0), "the text has no end");
  return new TextDecoder().decode(out.subarray(0, out.indexOf(0)));
}

/** Opens something and gives its handle. */
function open(name: Name, ...args: Argument[]): number {
  const out = new Int32Array(1);
  const status = raw(name, ...args, out, 4);
  assertEquals(status, WKV_OK, `${name}: ${text(args[0] as number)}`);
  assertNotEquals(out[0], 0);
  return out[0]!;
}

/** One object of every kind, in a context of its own. */
class Things implements Disposable {
  readonly context = open("wkv_context_open", 1);
  /** F32 `[4, 64]`. */
  readonly x = this.#tensor(0, 4, 64);
  readonly y = this.#tensor(0, 4, 64);
  /** F32 `[64, 64]`. */
  readonly w = this.#tensor(0, 64, 64);
  /** F32 `[1, 64]`. */
  readonly row = this.#tensor(0, 1, 64);
  /** F32 `[4, 2]`. */
  readonly pairs = this.#tensor(0, 4, 2);
  /** Q8_0 `[64, 64]`. */
  readonly packed = this.#tensor(4, 64, 64);
  /** I32 `[1, 4]`. */
  readonly ids = this.#tensor(3, 1, 4);
  /** F32 and I32 `[4, 4]`. */
  readonly settings = this.#tensor(0, 4, 4);
  readonly rng = this.#tensor(3, 4, 4);
  /** Of a head of 16 with 2 query heads and 1 KV head: `[1, 64]`, `[1, 32]`, ... */
  readonly out = this.#tensor(0, 1, 32);
  readonly kv = this.#tensor(0, 1, 32);
  readonly weights = this.#tensor(0, 1, 9);
  readonly victims = this.#tensor(3, 1, 1);
  readonly norm = this.#tensor(0, 1, 16);
  readonly rope = open(
    "wkv_rope_open",
    this.context,
    16,
    0,
    new Float32Array(8).fill(0.5),
    32,
    9,
  );
  readonly cache = open("wkv_cache_open", ...this.cacheArguments);
  readonly graph: number;

  constructor() {
    raw("wkv_graph_begin", this.context);
    raw("wkv_embed", this.context, this.x, this.w, this.ids, 4, 1);
    this.graph = open("wkv_graph_end", this.context);
  }

  /** What wkv_cache_open takes, without `out`. */
  get cacheArguments(): number[] {
    return [this.context, this.rope, 1, 1, 2, 1, 16, 8, 1, 2, 1, 2, 1, 0, 0, 0];
  }

  /** Arguments that each function accepts. */
  get good(): Record<Name, Argument[]> {
    const c = this.context;
    const handle = () => new Int32Array(1);
    return {
      wkv_abi_version: [],
      wkv_source_hash: [new Uint8Array(65), 65],
      wkv_live_handles: [],
      wkv_context_open: [1, handle(), 4],
      wkv_error: [c, new Uint8Array(64), 64],
      wkv_device: [c, new Uint8Array(64), 64],
      wkv_close: [c, open("wkv_tensor_open", c, 0, 1, 1)],
      wkv_memory: [c, new Float64Array(1), 8],
      wkv_bytes: [c, this.x, new Float64Array(1), 8],
      wkv_tensor_open: [c, 0, 2, 3, handle(), 4],
      wkv_tensor_write: [c, this.x, 1, 2, new Float32Array(128), 512],
      wkv_tensor_read: [c, this.x, 1, 2, new Float32Array(128), 512],
      wkv_graph_begin: [c],
      wkv_graph_end: [c, handle(), 4],
      wkv_graph_run: [c, this.graph, 1],
      wkv_graph_start: [c, this.graph],
      wkv_graph_poll: [c, handle(), 4],
      wkv_embed: [c, this.x, this.w, this.ids, 4, 1],
      wkv_rmsnorm: [c, this.y, this.x, 4, this.row, 1e-5, 0],
      wkv_qk_norm: [c, this.row, 1, 2, 1, 16, this.norm, this.norm, 1e-5],
      wkv_softcap: [c, this.x, 4, 30],
      wkv_linear: [
        ...[c, this.y, 0, this.x, 0, 4, this.row, 1e-5],
        ...[this.packed, this.row, 1, 1],
      ],
      wkv_gated: [c, this.y, this.x, 4, this.row, 1e-5, this.w, this.w, 0, 0],
      wkv_rope_open: [c, 16, 0, new Float32Array(8), 32, 9, handle(), 4],
      wkv_cache_open: [...this.cacheArguments, handle(), 4],
      wkv_cache_reset: [c, this.cache, -1],
      wkv_cache_read: [c, this.cache, 0, 0, 0, 0, new Int32Array(4), 16],
      wkv_attend: [c, this.cache, 0, 0, this.out, this.row, 0.25, 0, 0],
      wkv_insert: [c, this.cache, 0, this.kv, this.weights, 0],
      wkv_prefill: [c, this.cache, 0, 0, 0, this.out, this.row, 1, 0.25, 0, 0],
      wkv_sample: [c, this.ids, this.x, this.settings, this.rng],
      wkv_log_prob: [c, this.row, this.x, this.ids, 4],
      wkv_divergence: [c, this.pairs, this.x, this.y, 4],
    };
  }

  [Symbol.dispose](): void {
    assertEquals(raw("wkv_close", this.context, this.context), WKV_OK);
  }

  #tensor(dtype: number, rows: number, columns: number): number {
    return open("wkv_tensor_open", this.context, dtype, rows, columns);
  }
}

const functions = Object.keys(symbols) as Name[];
/** Those that give a status and take a context first. */
const onContext = functions.filter((name) =>
  !["wkv_abi_version", "wkv_source_hash", "wkv_live_handles"].includes(name) &&
  name !== "wkv_context_open"
);

/** Calls that may be waited for: wkv_graph_run is off the main thread. */
async function status(name: Name, args: Argument[]): Promise<number> {
  return await (raw(name, ...args) as number | Promise<number>);
}

describe("what kernels/bind.ts writes", () => {
  it("src/backend/symbols.ts is current", async () => {
    assertEquals(
      await read("src/backend/symbols.ts"),
      symbolTable(await read("kernels/wkv.h")),
      "run `deno task bind`",
    );
  });

  it("src/backend/sources.ts is current", async () => {
    assert(
      await read("src/backend/sources.ts") === await sourceModule(),
      "run `deno task bind`",
    );
  });

  it("the table has every function of wkv.h", async () => {
    const header = await read("kernels/wkv.h");
    const declared = [...header.matchAll(/^WKV_API\w* .*?(wkv_\w+)\(/gm)];
    assertEquals(functions.sort(), declared.map((match) => match[1]!).sort());
  });

  it("a type without a binding is an error", () => {
    const header = "#define WKV_ABI_VERSION 1\nWKV_API int64_t wkv_x(void);\n";
    assertThrows(() => symbolTable(header), SyntaxError, "int64_t");
  });
});

describe("the library", () => {
  it("exports what wkv.h declares, and nothing else", async () => {
    let listing: string;
    try {
      const { stdout } = await new Deno.Command("nm", {
        args: ["-D", "--defined-only", backend.path],
      }).output();
      listing = new TextDecoder().decode(stdout);
    } catch (error) {
      // Without binutils, that dlopen found every name has to do.
      if (error instanceof Deno.errors.NotFound) return;
      throw error;
    }
    const names = listing.trim().split("\n").map((line) => line.split(" ")[2]!);
    const ours = names.filter((name) => name.startsWith("wkv_"));
    assertEquals(ours.sort(), functions.sort());
    // A build for a checker carries the checker's symbols as well.
    if (Deno.env.get(LIBRARY_VARIABLE)) return;
    const others = names.filter((name) => !name.startsWith("wkv_"));
    assertEquals(others.slice(0, 5), [], `${others.length} more than wkv.h`);
  });

  it("tells its ABI version and the sources it was built from", async () => {
    assertEquals(raw("wkv_abi_version"), ABI_VERSION);
    const out = new Uint8Array(65);
    assertEquals(raw("wkv_source_hash", out, 65), WKV_OK);
    assertEquals(
      new TextDecoder().decode(out),
      `${await sourceHash(testDevice)}\0`,
    );
    assertEquals(raw("wkv_source_hash", out, 64), WKV_INVALID);
    assertEquals(raw("wkv_source_hash", null, 65), WKV_INVALID);
    assertEquals(raw("wkv_source_hash", out, -1), WKV_INVALID);
  });

  it("tells its device, cut to the room there is", () => {
    using things = new Things();
    const out = new Uint8Array(64);
    assertEquals(raw("wkv_device", things.context, out, 64), WKV_OK);
    const line = new TextDecoder().decode(out.subarray(0, out.indexOf(0)));
    assertMatch(
      line,
      testDevice === "cuda" ? /^CUDA, / : /^CPU, .*, 1 thread$/,
    );
    assertEquals(raw("wkv_device", things.context, out.fill(7), 4), WKV_OK);
    assertEquals([...out.subarray(0, 5)], [
      ...new TextEncoder().encode(line.slice(0, 3)),
      0,
      7,
    ]);
  });
});

describe("a function", () => {
  it("accepts its own arguments", async () => {
    using things = new Things();
    for (const name of onContext) {
      if (name === "wkv_graph_end") raw("wkv_graph_begin", things.context);
      const result = await status(name, things.good[name]);
      assertEquals(result, WKV_OK, `${name}: ${text(things.context)}`);
      if (name === "wkv_graph_begin") {
        raw("wkv_graph_end", things.context, new Int32Array(1), 4);
      }
    }
  });

  it("refuses a context that is none", async () => {
    using things = new Things();
    const closed = open("wkv_context_open", 1);
    raw("wkv_close", closed, closed);
    for (const name of onContext) {
      if (name === "wkv_error") continue;
      for (const bad of [0, -1, HUGE, LOWEST, closed, things.x]) {
        const [, ...rest] = things.good[name];
        assertEquals(
          await status(name, [bad, ...rest]),
          WKV_HANDLE,
          `${name} on ${bad}`,
        );
      }
    }
  });

  it("refuses handles that are closed, of another kind or another context's", async () => {
    using things = new Things();
    using other = new Things();
    const closed = open("wkv_tensor_open", things.context, 0, 4, 64);
    raw("wkv_close", things.context, closed);
    // Argument places that hold a handle, and which may be 0 for none.
    const places: Partial<
      Record<Name, { [place: number]: "optional" | true }>
    > = {
      wkv_bytes: { 1: true },
      wkv_tensor_write: { 1: true },
      wkv_tensor_read: { 1: true },
      wkv_graph_run: { 1: true },
      wkv_graph_start: { 1: true },
      wkv_embed: { 1: true, 2: true, 3: true },
      wkv_rmsnorm: { 1: true, 2: true, 4: true },
      wkv_qk_norm: { 1: true, 6: true, 7: true },
      wkv_softcap: { 1: true },
      wkv_linear: {
        1: true,
        3: true,
        6: "optional",
        8: true,
        9: "optional",
      },
      wkv_gated: { 1: true, 2: true, 4: "optional", 6: true, 7: true },
      wkv_cache_open: { 1: true },
      wkv_cache_reset: { 1: true },
      wkv_cache_read: { 1: true },
      wkv_attend: { 1: true, 4: true, 5: true, 8: "optional" },
      wkv_insert: { 1: true, 3: true, 4: true, 5: "optional" },
      wkv_prefill: { 1: true, 5: true, 6: true },
      wkv_sample: { 1: true, 2: true, 3: true, 4: true },
      wkv_log_prob: { 1: true, 2: true, 3: true },
      wkv_divergence: { 1: true, 2: true, 3: true },
    };
    for (const [name, list] of Object.entries(places) as [Name, object][]) {
      for (const [place, kind] of Object.entries(list)) {
        const wrong = [
          closed,
          -1,
          HUGE,
          LOWEST,
          things.context,
          other.x,
          other.cache,
        ];
        if (kind === true) wrong.push(0);
        if (name !== "wkv_bytes") {
          wrong.push(
            things.good[name][+place] === things.rope ? things.x : things.rope,
          );
        }
        for (const bad of wrong) {
          const args = [...things.good[name]];
          args[+place] = bad;
          // A context is an object too, whose bytes are no one's.
          if (name === "wkv_bytes" && bad === things.context) continue;
          const at = `${name}, argument ${place}, handle ${bad}`;
          assertEquals(await status(name, args), WKV_HANDLE, at);
          assertGreater(text(things.context).length, 10, at);
        }
      }
    }
    const { context } = things;
    for (const bad of [closed, 0, -1, HUGE, LOWEST, other.x, other.context]) {
      assertEquals(raw("wkv_close", context, bad), WKV_HANDLE);
    }
  });

  it("refuses null and buffers of the wrong length", async () => {
    using things = new Things();
    for (const name of onContext) {
      if (name === "wkv_error" || name === "wkv_device") continue;
      const args = things.good[name];
      for (let i = 0; i < args.length; i++) {
        const buffer = args[i];
        if (typeof buffer === "number" || buffer === null) continue;
        const wrong = [0, -1, 1, HUGE, LOWEST];
        for (const bytes of [buffer!.byteLength, ...wrong]) {
          if (name === "wkv_graph_end") raw("wkv_graph_begin", things.context);
          const bad = [...args];
          bad[i] = bytes === buffer!.byteLength ? null : buffer!;
          bad[i + 1] = bytes;
          const at = `${name}, ${bad[i] && "buffer"} of ${bytes} bytes`;
          assertEquals(await status(name, bad), WKV_INVALID, at);
          assertGreater(text(things.context).length, 10, at);
        }
      }
    }
    for (const name of ["wkv_error", "wkv_device"] as const) {
      const { context } = things;
      for (const bytes of [0, -1, LOWEST]) {
        assertEquals(raw(name, context, new Uint8Array(8), bytes), WKV_INVALID);
      }
      assertEquals(raw(name, context, null, 8), WKV_INVALID);
    }
    for (const bytes of [0, -1, 3, LOWEST]) {
      const status = raw("wkv_context_open", 1, new Int32Array(1), bytes);
      assertEquals(status, WKV_INVALID);
    }
    assertEquals(raw("wkv_context_open", 1, null, 4), WKV_INVALID);
    assertGreater(text(0).length, 10);
  });

  it("refuses numbers out of range, and says which", async () => {
    using things = new Things();
    // Function, argument place, wrong values, what the text must hold.
    const wrong: [Name, number, number[], RegExp][] = [
      ["wkv_tensor_open", 1, [-1, 15, HUGE, LOWEST], /dtype/],
      ["wkv_tensor_open", 2, [0, -1, LOWEST], /rows/],
      ["wkv_tensor_open", 3, [0, -1, LOWEST], /columns/],
      ["wkv_tensor_write", 2, [-1, 3, HUGE, LOWEST], /rows/],
      ["wkv_tensor_write", 3, [0, -1, 4, HUGE, LOWEST], /rows/],
      ["wkv_tensor_read", 2, [-1, 3, HUGE, LOWEST], /rows/],
      ["wkv_tensor_read", 3, [0, -1, 4, HUGE, LOWEST], /rows/],
      ["wkv_graph_run", 2, [-1, LOWEST], /times/],
      ["wkv_embed", 4, [-1, 5, HUGE, LOWEST], /rows|columns/],
      ["wkv_rmsnorm", 3, [-1, 5, HUGE, LOWEST], /rows/],
      ["wkv_rmsnorm", 6, [-1, 2, HUGE, LOWEST], /add/],
      ["wkv_qk_norm", 2, [-1, 2, HUGE, LOWEST], /rows/],
      ["wkv_qk_norm", 3, [0, -1, 3, HUGE, LOWEST], /heads|columns/],
      ["wkv_qk_norm", 4, [0, -1, 2, HUGE, LOWEST], /heads|columns/],
      ["wkv_qk_norm", 5, [0, -1, 8, HUGE, LOWEST], /head_dim|columns/],
      ["wkv_softcap", 2, [-1, 5, HUGE, LOWEST], /rows/],
      ["wkv_softcap", 3, [0, -1, NaN, Infinity], /cap/],
      ["wkv_linear", 2, [-1, 1, HUGE, LOWEST], /column/],
      ["wkv_linear", 4, [-1, 1, HUGE, LOWEST], /row/],
      ["wkv_linear", 5, [0, -1, 5, HUGE, LOWEST], /row/],
      ["wkv_linear", 10, [-1, 2, HUGE, LOWEST], /add/],
      ["wkv_linear", 11, [-1, 3, HUGE, LOWEST], /precision/],
      ["wkv_gated", 3, [0, -1, 5, HUGE, LOWEST], /rows/],
      ["wkv_gated", 8, [-1, 2, HUGE, LOWEST], /activation/],
      ["wkv_gated", 9, [-1, 3, HUGE, LOWEST], /precision/],
      ["wkv_rope_open", 1, [-1, 0, 1, 14, 513, HUGE, LOWEST], /head_dim/],
      ["wkv_rope_open", 2, [-1, 2, HUGE, LOWEST], /pairs/],
      ["wkv_rope_open", 5, [-1, 2 ** 21 + 1, HUGE, LOWEST], /positions/],
      ["wkv_cache_open", 2, [0, -1, HUGE, LOWEST], /layers/],
      ["wkv_cache_open", 3, [0, -1, HUGE, LOWEST], /sequences/],
      ["wkv_cache_open", 4, [0, -1, LOWEST], /heads/],
      ["wkv_cache_open", 5, [0, -1, 3, HUGE, LOWEST], /heads/],
      ["wkv_cache_open", 6, [0, -1, 8, HUGE, LOWEST], /head_dim/],
      ["wkv_cache_open", 7, [0, -1, 9, HUGE, LOWEST], /slots|positions/],
      ["wkv_cache_open", 8, [-1, 7, HUGE, LOWEST], /sinks/],
      ["wkv_cache_open", 9, [-1, 8, HUGE, LOWEST], /recent/],
      ["wkv_cache_open", 10, [0, -1, 6, HUGE, LOWEST], /interval/],
      ["wkv_cache_open", 11, [-1, 14, HUGE, LOWEST], /select/],
      ["wkv_cache_open", 12, [-1, 6, HUGE, LOWEST], /merge/],
      ["wkv_cache_open", 14, [-1, 2, HUGE, LOWEST], /positions/],
      ["wkv_cache_open", 15, [-1, 3, 4, HUGE, LOWEST], /dtype/],
      ["wkv_cache_reset", 2, [-2, 1, HUGE, LOWEST], /sequence/],
      ["wkv_cache_read", 2, [-1, 8, HUGE, LOWEST], /field|bytes/],
      ["wkv_cache_read", 3, [-1, 1, HUGE, LOWEST], /layer/],
      ["wkv_cache_read", 4, [-1, 1, HUGE, LOWEST], /sequence/],
      ["wkv_cache_read", 5, [-1, 1, HUGE, LOWEST], /head/],
      ["wkv_attend", 2, [-1, 1, HUGE, LOWEST], /layer/],
      ["wkv_attend", 3, [-1, 1, HUGE, LOWEST], /kv_head/],
      ["wkv_attend", 7, [-1, NaN, Infinity], /softcap/],
      ["wkv_insert", 2, [-1, 1, HUGE, LOWEST], /layer/],
      ["wkv_prefill", 2, [-1, 1, HUGE, LOWEST], /layer/],
      ["wkv_prefill", 3, [-1, 1, HUGE, LOWEST], /kv_head/],
      ["wkv_prefill", 4, [-1, 1, HUGE, LOWEST], /sequence/],
      ["wkv_prefill", 7, [0, -1, 2, HUGE, LOWEST], /rows/],
      ["wkv_prefill", 9, [-1, NaN, Infinity], /softcap/],
      ["wkv_prefill", 10, [-1, LOWEST], /window/],
      ["wkv_log_prob", 4, [0, -1, 5, HUGE, LOWEST], /rows/],
      ["wkv_divergence", 4, [0, -1, 5, HUGE, LOWEST], /rows/],
    ];
    for (const [name, place, values, pattern] of wrong) {
      for (const value of values) {
        const args = [...things.good[name]];
        args[place] = value;
        const at = `${name}, argument ${place} = ${value}`;
        assertEquals(await status(name, args), WKV_INVALID, at);
        assertMatch(text(things.context), pattern, at);
      }
    }
    for (const threads of [-1, 1025, HUGE, LOWEST]) {
      const out = new Int32Array(1);
      assertEquals(raw("wkv_context_open", threads, out, 4), WKV_INVALID);
      assertStringIncludes(text(0), "threads");
    }
    const { context } = things;
    const frequencies = Float32Array.of(0.5, NaN);
    const out = new Int32Array(1);
    for (const bad of [NaN, Infinity, -Infinity]) {
      frequencies[1] = bad;
      assertEquals(
        raw("wkv_rope_open", context, 16, 0, frequencies, 8, 9, out, 4),
        WKV_INVALID,
      );
    }
    assertEquals(
      raw("wkv_rope_open", context, 2, 0, new Float32Array(2), 8, 9, out, 4),
      WKV_INVALID,
    );
    for (const dtype of [4, 5, 6]) {
      const status = raw("wkv_tensor_open", context, dtype, 1, 33, out, 4);
      assertEquals(status, WKV_INVALID);
    }
  });

  it("refuses tensors of another shape or type", async () => {
    using things = new Things();
    const { context } = things;
    const tensor = (dtype: number, rows: number, columns: number) =>
      open("wkv_tensor_open", context, dtype, rows, columns);
    const odd = tensor(0, 4, 63);
    const flat = tensor(0, 3, 64);
    const half = tensor(1, 64, 64);
    const whole = tensor(3, 64, 64);
    const wrong: [Name, number, number[]][] = [
      ["wkv_embed", 1, [odd, flat, half, whole]],
      ["wkv_embed", 2, [odd, whole]],
      ["wkv_embed", 3, [things.row, tensor(3, 1, 3)]],
      ["wkv_rmsnorm", 1, [odd, flat, half, whole]],
      ["wkv_rmsnorm", 2, [odd, flat, half, whole]],
      ["wkv_rmsnorm", 4, [odd, half, whole]],
      ["wkv_qk_norm", 1, [odd, half, whole]],
      ["wkv_qk_norm", 6, [odd, half, whole]],
      ["wkv_qk_norm", 7, [odd, half, whole]],
      ["wkv_softcap", 1, [half, whole]],
      ["wkv_linear", 1, [odd, flat, half, whole]],
      ["wkv_linear", 3, [odd, flat, half, whole]],
      ["wkv_linear", 6, [odd, half, whole]],
      ["wkv_linear", 8, [odd, whole, tensor(0, 65, 64)]],
      ["wkv_linear", 9, [odd, half, whole]],
      ["wkv_gated", 1, [odd, flat, half, whole, things.x]],
      ["wkv_gated", 2, [odd, flat, half, whole]],
      ["wkv_gated", 4, [odd, half, whole]],
      ["wkv_gated", 6, [odd, whole, flat]],
      ["wkv_gated", 7, [odd, whole, flat]],
      ["wkv_attend", 4, [things.row, whole, half]],
      ["wkv_attend", 5, [things.out, whole, half]],
      ["wkv_attend", 8, [things.row, things.ids]],
      ["wkv_insert", 3, [things.row, whole, half]],
      ["wkv_insert", 4, [things.row, things.victims]],
      ["wkv_insert", 5, [things.row, things.ids]],
      ["wkv_prefill", 5, [things.row, whole, half]],
      ["wkv_prefill", 6, [things.out, whole, half]],
      ["wkv_sample", 1, [things.row, tensor(3, 1, 3)]],
      ["wkv_sample", 2, [half, whole]],
      ["wkv_sample", 3, [things.rng, things.x, tensor(0, 3, 4)]],
      ["wkv_sample", 4, [things.settings, tensor(3, 3, 4)]],
      ["wkv_log_prob", 1, [things.ids, tensor(0, 1, 3)]],
      ["wkv_log_prob", 2, [half, flat, whole]],
      ["wkv_log_prob", 3, [things.row, tensor(3, 1, 3)]],
      ["wkv_divergence", 1, [things.ids, things.row, tensor(0, 3, 2)]],
      ["wkv_divergence", 2, [half, flat, whole]],
      ["wkv_divergence", 3, [half, flat, whole]],
    ];
    for (const [name, place, handles] of wrong) {
      for (const handle of handles) {
        const args = [...things.good[name]];
        args[place] = handle;
        const at = `${name}, argument ${place}, ${handles.indexOf(handle)}`;
        assertEquals(await status(name, args), WKV_INVALID, at);
        assertGreater(text(context).length, 10, at);
      }
    }
    // An op that reads what it writes.
    const same = [...things.good.wkv_linear];
    [same[1], same[6], same[8], same[11]] = [things.x, 0, things.w, 0];
    assertEquals(raw("wkv_linear", ...same), WKV_INVALID);
  });

  it("says so when memory is short", () => {
    using things = new Things();
    const { context } = things;
    const out = new Int32Array(1);
    const live = raw("wkv_live_handles");
    for (const dtype of [0, 1, 3, 4]) {
      const huge = HUGE - HUGE % 32;
      const status = raw("wkv_tensor_open", context, dtype, huge, huge, out, 4);
      assertEquals(status, WKV_MEMORY, `dtype ${dtype}`);
      assertGreater(text(context).length, 5);
    }
    // The largest cache of all, and one whose bytes are a multiple of 2^64.
    for (const slots of [HUGE, 2 ** 30]) {
      const rope = open(
        "wkv_rope_open",
        context,
        512,
        0,
        new Float32Array(256),
        1024,
        0,
      );
      const shape = [rope, 1024, 4096, 1024, 1024, 512, slots, 0, 0];
      const args = [...shape, 1, 2, 1, 0, 1, 0];
      assertEquals(
        raw("wkv_cache_open", context, ...args, out, 4),
        WKV_MEMORY,
      );
      raw("wkv_close", context, rope);
    }
    assertEquals(raw("wkv_live_handles"), live);
    assertEquals(raw("wkv_embed", ...things.good.wkv_embed), WKV_OK);
  });

  it("survives any number in any place", async () => {
    using things = new Things();
    const numbers = [0, 1, -1, 2, 31, 65536, HUGE, LOWEST];
    const floats = [NaN, Infinity, -Infinity, 0, -1, 3.4e38, 1e-45];
    for (const name of onContext) {
      const { parameters } = symbols[name];
      for (let place = 1; place < parameters.length; place++) {
        const type = parameters[place];
        if (type === "buffer" || name === "wkv_graph_begin") continue;
        for (const value of type === "f32" ? floats : numbers) {
          // So many runs are allowed, but take long.
          if (name === "wkv_graph_run" && value > 65536) continue;
          if (name === "wkv_graph_end") raw("wkv_graph_begin", things.context);
          // Lengths go with their buffers; the claim of more is another test.
          if (parameters[place - 1] === "buffer") continue;
          const args = [...things.good[name]];
          args[place] = value;
          const before = raw("wkv_live_handles");
          const result = await status(name, args);
          assert(Object.values(wkv_status).includes(result as 0), name);
          if (result !== WKV_OK) assert(text(things.context) !== "", name);
          const opened = args.at(-2);
          if (raw("wkv_live_handles") > before) {
            assert(opened instanceof Int32Array, name);
            raw("wkv_close", things.context, opened[0]!);
          }
        }
      }
    }
    raw("wkv_cache_reset", things.context, things.cache, -1);
    for (const name of ["wkv_embed", "wkv_attend", "wkv_linear"] as const) {
      assertEquals(raw(name, ...things.good[name]), WKV_OK);
    }
  });

  it("takes no number that is none: the binding throws", () => {
    using things = new Things();
    for (const bad of [NaN, Infinity, 2 ** 31, -(2 ** 31) - 1]) {
      for (const place of [0, 1, 4]) {
        const args = [...things.good.wkv_embed];
        args[place] = bad;
        assertThrows(() => raw("wkv_embed", ...args), TypeError);
      }
    }
  });
});

describe("handles", () => {
  it("are not taken for those that had their place before", () => {
    using things = new Things();
    const { context } = things;
    const seen = new Set<number>();
    for (let i = 0; i < 100; i++) {
      const tensor = open("wkv_tensor_open", context, 0, 1, 1);
      assert(!seen.has(tensor), "a handle came back");
      seen.add(tensor);
      assertEquals(raw("wkv_close", context, tensor), WKV_OK);
      for (const old of seen) {
        assertEquals(
          raw("wkv_bytes", context, old, new Float64Array(1), 8),
          WKV_HANDLE,
        );
      }
    }
  });

  it("of a context close with it", () => {
    const before = raw("wkv_live_handles");
    const things = new Things();
    assertGreater(raw("wkv_live_handles"), before + 10);
    const { context, x } = things;
    things[Symbol.dispose]();
    assertEquals(raw("wkv_live_handles"), before);
    const again = open("wkv_context_open", 1);
    assertEquals(
      raw("wkv_bytes", again, x, new Float64Array(1), 8),
      WKV_HANDLE,
    );
    assertEquals(raw("wkv_close", context, context), WKV_HANDLE);
    assertEquals(raw("wkv_close", again, again), WKV_OK);
  });

  it("that a graph uses may be closed first", async () => {
    using things = new Things();
    const { context } = things;
    const ids = Int32Array.of(3, 2, 1, 0);
    raw("wkv_tensor_write", context, things.ids, 0, 1, ids, 16);
    raw("wkv_close", context, things.ids);
    raw("wkv_close", context, things.w);
    assertEquals(
      await status("wkv_graph_run", [context, things.graph, 3]),
      WKV_OK,
    );
  });
});

describe("graphs", () => {
  it("end only where they began, and begin once", () => {
    using things = new Things();
    const { context } = things;
    const out = new Int32Array(1);
    assertEquals(raw("wkv_graph_end", context, out, 4), WKV_INVALID);
    assertEquals(raw("wkv_graph_begin", context), WKV_OK);
    assertEquals(raw("wkv_graph_begin", context), WKV_INVALID);
    assertStringIncludes(text(context), "already");
    assertEquals(raw("wkv_graph_end", context, out, 4), WKV_INVALID);
    assertEquals(raw("wkv_graph_end", context, out, 4), WKV_INVALID);
    assertEquals(raw("wkv_graph_begin", context), WKV_OK);
    assertEquals(raw("wkv_graph_end", context, out, 4), WKV_OK);
  });

  it("fail at their end when an op was refused, and hold what was recorded else", async () => {
    using things = new Things();
    const { context, good } = things;
    const out = new Int32Array(1);
    raw("wkv_graph_begin", context);
    assertEquals(raw("wkv_embed", ...good.wkv_embed), WKV_OK);
    const wrong = [...good.wkv_embed];
    wrong[4] = 5;
    assertEquals(raw("wkv_embed", ...wrong), WKV_INVALID);
    assertEquals(raw("wkv_graph_end", context, out, 4), WKV_INVALID);

    // Recorded ops do not run: the cache stays empty until the graph does.
    raw("wkv_graph_begin", context);
    assertEquals(raw("wkv_attend", ...good.wkv_attend), WKV_OK);
    const graph = open("wkv_graph_end", context);
    const counts = new Int32Array(4);
    const read = () =>
      raw("wkv_cache_read", context, things.cache, 0, 0, 0, 0, counts, 16);
    read();
    assertEquals(counts[1], 0);
    assertEquals(await status("wkv_graph_run", [context, graph, 5]), WKV_OK);
    read();
    assertEquals(counts[1], 5);
    assertEquals(await status("wkv_graph_run", [context, graph, 0]), WKV_OK);
  });

  it("report what an op finds when it runs, and run again", async () => {
    using things = new Things();
    const { context, graph } = things;
    const write = (id: number) =>
      raw(
        "wkv_tensor_write",
        context,
        things.ids,
        0,
        1,
        new Int32Array(4).fill(id),
        16,
      );
    write(64);
    assertEquals(await status("wkv_graph_run", [context, graph, 1]), WKV_DATA);
    assertMatch(text(context), /64/);
    write(63);
    assertEquals(await status("wkv_graph_run", [context, graph, 1]), WKV_OK);
  });
});

describe("a run that is started", () => {
  /** Starts a run and looks after it to its end. */
  const watched = (context: number, graph: number): number => {
    const started = raw("wkv_graph_start", context, graph);
    if (started !== WKV_OK) return started;
    const out = new Int32Array(1);
    for (;;) {
      const status = raw("wkv_graph_poll", context, out.fill(7), 4);
      if (status !== WKV_OK) return status;
      assert(out[0] === 0 || out[0] === 1);
      if (out[0] === 1) return WKV_OK;
    }
  };

  it("does what one that is waited for does, and fails once as it does", async () => {
    using things = new Things();
    const { context, graph } = things;
    const out = new Int32Array(1);
    assertEquals(raw("wkv_graph_poll", context, out, 4), WKV_OK);
    assertEquals(out[0], 1, "nothing runs");
    const write = (id: number) =>
      raw(
        "wkv_tensor_write",
        context,
        things.ids,
        0,
        1,
        new Int32Array(4).fill(id),
        16,
      );
    write(64);
    assertEquals(watched(context, graph), WKV_DATA);
    assertMatch(text(context), /64/);
    assertEquals(raw("wkv_graph_poll", context, out, 4), WKV_OK);
    write(63);
    assertEquals(watched(context, graph), WKV_OK);
    assertEquals(await status("wkv_graph_run", [context, graph, 1]), WKV_OK);
  });

  it("ends before what follows reads, writes or closes what it uses", () => {
    using things = new Things();
    const { context, good } = things;
    raw("wkv_graph_begin", context);
    for (let i = 0; i < 100; i++) raw("wkv_attend", ...good.wkv_attend);
    const graph = open("wkv_graph_end", context);
    const counts = new Int32Array(4);
    for (let i = 1; i <= 5; i++) {
      assertEquals(raw("wkv_graph_start", context, graph), WKV_OK);
      raw("wkv_cache_read", context, things.cache, 0, 0, 0, 0, counts, 16);
      assertEquals(counts[1], 100 * i);
    }
    raw("wkv_graph_start", context, graph);
    raw("wkv_graph_start", context, graph);
    // An op that is not recorded follows, too.
    assertEquals(raw("wkv_attend", ...good.wkv_attend), WKV_OK);
    raw("wkv_cache_read", context, things.cache, 0, 0, 0, 0, counts, 16);
    assertEquals(counts[1], 701);
    raw("wkv_graph_start", context, graph);
    for (const handle of [graph, things.cache, things.row, things.out]) {
      assertEquals(raw("wkv_close", context, handle), WKV_OK);
    }
  });

  it("leaves a recording alone, and draws what is read without it", () => {
    using things = new Things();
    const { context, good } = things;
    const logits = new Float32Array(4 * 64);
    const draw = (token: number) => {
      for (let row = 0; row < 4; row++) {
        logits.fill(0, row * 64, row * 64 + 64)[row * 64 + token + row] = 1;
      }
      raw("wkv_tensor_write", context, things.x, 0, 4, logits, 1024);
    };
    const tokens = new Int32Array(4);
    const read = () => {
      raw("wkv_tensor_read", context, things.ids, 0, 1, tokens, 16);
      return [...tokens];
    };
    raw("wkv_tensor_write", context, things.ids, 0, 1, tokens.fill(5), 16);
    raw("wkv_graph_begin", context);
    raw("wkv_sample", ...good.wkv_sample);
    const graph = open("wkv_graph_end", context);
    assertEquals(read(), [5, 5, 5, 5]);
    for (const token of [3, 60, 17]) {
      draw(token);
      raw("wkv_graph_begin", context);
      assertEquals(watched(context, graph), WKV_OK);
      assertEquals(read(), [token, token + 1, token + 2, token + 3]);
      raw("wkv_embed", ...good.wkv_embed);
      open("wkv_graph_end", context);
    }
    raw("wkv_tensor_write", context, things.ids, 0, 1, tokens.fill(9), 16);
    assertEquals(read(), [9, 9, 9, 9]);
    // What is written while the graph runs is written after it.
    for (let i = 0; i < 20; i++) {
      draw(i);
      raw("wkv_graph_begin", context);
      assertEquals(raw("wkv_graph_start", context, graph), WKV_OK);
      raw("wkv_tensor_write", context, things.ids, 0, 1, tokens.fill(7), 16);
      assertEquals(read(), [7, 7, 7, 7]);
      open("wkv_graph_end", context);
    }
    // A refused start is no failure of what is recorded.
    raw("wkv_graph_begin", context);
    assertEquals(raw("wkv_graph_start", context, 0), WKV_HANDLE);
    open("wkv_graph_end", context);
  });
});

describe("fields of a cache", () => {
  it("are read whole or not at all", () => {
    using things = new Things();
    const { context, cache } = things;
    for (let i = 0; i < 3; i++) raw("wkv_attend", ...things.good.wkv_attend);
    const sizes: Record<keyof typeof wkv_cache_field, number> = {
      WKV_CACHE_COUNTS: 16,
      WKV_CACHE_POSITIONS: 12,
      WKV_CACHE_STEPS: 12,
      WKV_CACHE_SCORES: 12,
      WKV_CACHE_SLOTS: 12,
      WKV_CACHE_KEYS: 192,
      WKV_CACHE_VALUES: 192,
      WKV_CACHE_EVENT: 16,
    };
    for (const [name, bytes] of Object.entries(sizes)) {
      const field = wkv_cache_field[name as keyof typeof wkv_cache_field];
      const out = new Uint8Array(256);
      const read = (
        length: number,
        buffer: Uint8Array<ArrayBuffer> | null = out,
      ) =>
        raw("wkv_cache_read", context, cache, field, 0, 0, 0, buffer, length);
      assertEquals(read(bytes), WKV_OK, name);
      assertEquals(read(bytes, null), WKV_INVALID, name);
      for (const other of [bytes - 4, bytes + 4, 0, -1]) {
        assertEquals(read(other), WKV_INVALID, name);
      }
    }
  });
});

describe("permissions", () => {
  const script = () => `
import { Backend } from "src/backend/backend.ts";
import { Tensor } from "src/backend/tensor.ts";
import { embed } from "src/backend/ops.ts";
const library = ${JSON.stringify(backend.path)};
using backend = await Backend.open({ library, threads: 1 });
using table = Tensor.from(backend, Float32Array.of(1, 2, 3, 4), 2);
using ids = Tensor.from(backend, Int32Array.of(1));
using out = new Tensor(backend, "F32", 1, 2);
using graph = backend.record(() => embed(backend, out, table, ids, { rows: 1 }));
await graph.run();
console.log(out.floats().join());
try {
  Deno.readTextFileSync("/etc/hostname");
  console.log("read");
} catch {
  console.log("no read");
}
`;

  it("--allow-ffi of the library alone is enough", async () => {
    const { code, stdout, stderr } = await runScript(script(), [
      `--allow-ffi=${backend.path}`,
    ]);
    assertEquals([code, stdout], [0, "3,4\nno read\n"], stderr);
  });

  it("without it the error names the option", async () => {
    const { code, stderr } = await runScript(script(), []);
    assertEquals(code, 1);
    assertStringIncludes(stderr, `--allow-ffi=${backend.path}`);
  });
});
