/**
 * How a backend has a GPU run graphs: each is started and looked after in the
 * event loop, or waited for by another thread. The library is a stand-in that
 * says what it was asked for, so this takes no GPU; abi_test.ts and
 * lifetime_test.ts take the real ones.
 */

import {
  assertEquals,
  assertGreater,
  assertInstanceOf,
  assertRejects,
  assertStringIncludes,
} from "@std/assert";
import { afterAll, beforeAll, describe, it } from "@std/testing/bdd";
import { Backend } from "../src/backend/backend.ts";
import { WkvError } from "../src/backend/error.ts";
import { ABI_VERSION, symbols } from "../src/backend/symbols.ts";
import { execute } from "./cli_process.ts";

/** A graph that runs until it is let go, or was looked at for a million times. */
const HELD = 999;
/** A graph that cannot be started. */
const NONE = 0;

/** Graph 1,000 S + L ends with status S when it was looked at L times. */
const STAND_IN = `
#include <atomic>
#include <cstdio>
#include <mutex>
#include <string>
#include <unistd.h>
#define API extern "C" int
namespace {
std::mutex one;
std::string done, text;
std::atomic<int> going{0}, looks{0};
int watched = 0;
void begin(const char* what, int graph) {
  if (going++) done += "overlap ";
  done += what + std::to_string(graph) + " ";
}
int end(int graph) {
  going--;
  if (graph >= 1000) text = "graph " + std::to_string(graph) + " failed";
  return graph / 1000;
}
}
API wkv_abi_version() { return ${ABI_VERSION}; }
API wkv_context_open(int, int* out, int) { *out = 1; return 0; }
API wkv_close(int, int handle) { done += "close" + std::to_string(handle) + " "; return 0; }
API wkv_device(int, char* out, int bytes) { return snprintf(out, bytes, "CUDA, a stand-in") < 0; }
API wkv_error(int, char* out, int bytes) { return snprintf(out, bytes, "%s", text.c_str()) < 0; }
API wkv_graph_start(int, int graph) {
  if (graph == ${NONE}) { text = "graph is none"; return 3; }
  begin("start", graph);
  looks = graph % 1000 == ${HELD} ? 1000000 : graph % 1000;
  watched = graph;
  return 0;
}
API wkv_graph_poll(int, int* out, int) {
  *out = looks-- <= 0;
  return *out ? end(watched) : 0;
}
API wkv_graph_run(int, int graph, int times) {
  std::lock_guard<std::mutex> lock(one);
  begin(times == 1 ? "run" : "repeat", graph);
  usleep(1000 * (graph % 1000));
  return end(graph);
}
API let_go() { looks = 0; return 0; }
API take_done(char* out, int bytes) { snprintf(out, bytes, "%s", done.c_str()); done.clear(); return 0; }
`;

let folder = "", path = "";
beforeAll(async () => {
  folder = await Deno.makeTempDir({ prefix: "wkv_watch_" });
  path = `${folder}/stand_in.so`;
  const others = Object.keys(symbols)
    .filter((name) => !STAND_IN.includes(`${name}(`))
    .map((name) => `API ${name}() { return 1; }\n`);
  await Deno.writeTextFile(`${folder}/it.cpp`, STAND_IN + others.join(""));
  const built = await execute(Deno.env.get("CXX") ?? "g++", [
    ...["-shared", "-fPIC", "-w", "-o", path, `${folder}/it.cpp`],
  ]);
  assertEquals(built.code, 0, built.stderr);
});
afterAll(() => Deno.remove(folder, { recursive: true }));

/** The backend, and the library behind it. */
class Watched implements Disposable {
  readonly backend: Backend;
  readonly #library = Deno.dlopen(path, {
    let_go: { parameters: [], result: "i32" },
    take_done: { parameters: ["buffer", "i32"], result: "i32" },
  });

  private constructor(backend: Backend) {
    this.backend = backend;
  }

  static async open(): Promise<Watched> {
    const backend = await Backend.open({ device: "cuda", library: path });
    const watched = new Watched(backend);
    watched.done(); // what it did for another test
    return watched;
  }

  letGo(): void {
    this.#library.symbols.let_go();
  }

  /** What the library did since it was asked last. */
  done(): string[] {
    const out = new Uint8Array(65536);
    this.#library.symbols.take_done(out, out.length);
    const text = new TextDecoder().decode(out.subarray(0, out.indexOf(0)));
    return text.trim().split(" ");
  }

  [Symbol.dispose](): void {
    this.backend.close();
    this.#library.close();
  }
}

describe("a run on a GPU", () => {
  it("leaves timers, files, messages and signals their turns", async () => {
    using watched = await Watched.open();
    let ended = false;
    const run = watched.backend.runGraph(HELD, 1).then(() => ended = true);
    let ticks = 0;
    const timer = setInterval(() => ticks++, 1);
    const { port1, port2 } = new MessageChannel();
    const message = new Promise((resolve) => port2.onmessage = resolve);
    port1.postMessage("");
    await message;
    const { promise: heard, resolve: hear } = Promise.withResolvers<void>();
    Deno.addSignalListener("SIGUSR2", hear);
    Deno.kill(Deno.pid, "SIGUSR2");
    await heard;
    await new Promise((resolve) => {
      AbortSignal.timeout(5).addEventListener("abort", resolve);
    });
    await Deno.readTextFile(new URL(import.meta.url));
    assertEquals(ended, false);
    assertGreater(ticks, 0);
    watched.letGo();
    await run;
    clearInterval(timer);
    Deno.removeSignalListener("SIGUSR2", hear);
    port1.close();
    port2.close();
  });

  it("follows those that were asked for before, and fails alone", async () => {
    using watched = await Watched.open();
    const { backend } = watched;
    const ends = await Promise.allSettled(
      [3, 2005, NONE, 4, 1000, 1].map((graph) => backend.runGraph(graph, 1)),
    );
    assertEquals(watched.done(), [
      ...["start3", "start2005", "start4", "start1000", "start1"],
    ]);
    const failures = ends.map((end) => {
      if (end.status === "fulfilled") return null;
      assertInstanceOf(end.reason, WkvError);
      return [end.reason.status, end.reason.message];
    });
    assertEquals(failures.map((failure) => failure?.[0] ?? 0), [
      ...[0, 2, 3, 0, 1, 0],
    ]);
    assertStringIncludes(`${failures[1]![1]}`, "graph 2005 failed");
    assertStringIncludes(`${failures[2]![1]}`, "graph is none");
    assertStringIncludes(`${failures[4]![1]}`, "graph 1000 failed");
  });

  it("starts when no thread waits for another, else waits in one too", async () => {
    using watched = await Watched.open();
    const { backend } = watched;
    await Promise.all([
      backend.runGraph(5, 1),
      backend.runGraph(6, 2),
      backend.runGraph(7, 1),
      backend.runGraph(8, 2),
    ]);
    await backend.runGraph(9, 1);
    const done = watched.done();
    // Threads take their turns as they come.
    assertEquals([done[0], done.slice(1, 4).sort(), done[4]], [
      "start5",
      ["repeat6", "repeat8", "run7"],
      "start9",
    ]);
    assertEquals(done.length, 5);
  });

  it("takes turns with those that others ask for", async () => {
    using watched = await Watched.open();
    const steps = async (graph: number) => {
      for (let i = 0; i < 20; i++) await watched.backend.runGraph(graph, 1);
    };
    await Promise.all([steps(1), steps(2), steps(3)]);
    const rounds = Array.from(
      { length: 20 },
      () => ["start1", "start2", "start3"],
    );
    assertEquals(watched.done(), rounds.flat());
  });

  it("ends before a backend that was closed meanwhile", async () => {
    using watched = await Watched.open();
    const { backend } = watched;
    const runs = [backend.runGraph(20, 1), backend.runGraph(1003, 1)];
    backend.close();
    backend.close();
    await assertRejects(() => backend.runGraph(1, 1), Error, "closed");
    const ends = await Promise.allSettled(runs);
    assertEquals(ends.map(({ status }) => status), ["fulfilled", "rejected"]);
    assertEquals(watched.done(), ["start20", "start1003", "close1"]);
  });
});
