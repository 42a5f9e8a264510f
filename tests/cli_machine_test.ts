/** What commands need of the machine, as processes: library, compiler, permissions; doctor and build. */

import {
  assert,
  assertEquals,
  assertLess,
  assertMatch,
  assertStringIncludes,
} from "@std/assert";
import { afterAll, beforeAll, describe, it } from "@std/testing/bdd";
import { findCpuLibrary } from "../src/backend/library.ts";
import { ABI_VERSION, symbols } from "../src/backend/symbols.ts";
import {
  copyCheckout,
  execute,
  expectErrors,
  ok,
  ROOT,
  wkv,
  writeScript,
} from "./cli_process.ts";
import { testModel } from "./model.ts";

const PROMPT = "Once upon a time";
let model = "";
let temporary = "";

beforeAll(async () => {
  model = await testModel();
  temporary = await Deno.makeTempDir({ prefix: "wkv_cli_" });
});
afterAll(async () => {
  await Deno.remove(temporary, { recursive: true });
});

describe("the library", () => {
  let copy = "";
  let bare = "";
  let empty: Record<string, string> = {};
  beforeAll(async () => {
    copy = await copyCheckout();
    bare = `${temporary}/no_compiler`;
    await Deno.mkdir(bare);
    empty = { XDG_CACHE_HOME: `${temporary}/no_library` };
  });
  afterAll(async () => {
    await Deno.remove(copy, { recursive: true });
  });

  it("cannot be built without a compiler: generate and doctor say so", async () => {
    const setting = { root: copy, env: { ...empty, PATH: bare } };
    await expectErrors([{
      args: ["generate", "x", "--model", model, "--device", "cpu"],
      code: 1,
      says: [
        "No CPU library could be built",
        "WKV_LIB_CPU: not set",
        `${copy}/build: no libwkv_cpu-`,
        'No compiler: "g++" is not to be found; install g++',
      ],
      setting,
    }]);
    const { code, stdout } = await wkv(
      ["doctor", "--json", "--model", model],
      setting,
    );
    const { ok, library, compiler, python, model: file } = JSON.parse(stdout);
    assertEquals([code, ok, library], [1, false, null]);
    assertEquals([compiler.ok, python.ok, file.ok], [false, false, true]);
  });

  it("is built anew by build, with a line at the start and the end", async () => {
    const compiler = `${temporary}/fake_compiler`;
    await writeScript(
      compiler,
      `[ "$1" = --version ] && { echo fake 1.0; exit; }
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo "$$" > "$2"; shift; done`,
    );
    const setting = { root: copy, env: { ...empty, CXX: compiler } };
    const first = await ok(["build"], setting);
    assertMatch(
      first.stderr,
      /^Building the CPU library with .*\nBuilt in .*\n$/,
    );
    const path = first.stdout.trim();
    assert(path.startsWith(`${copy}/build/libwkv_cpu-${ABI_VERSION}-`), path);
    const before = await Deno.readTextFile(path);
    const again = await ok(["build", "cpu", "--json", "--quiet"], setting);
    assertEquals(JSON.parse(again.stdout), {
      library: "cpu",
      path,
      kernels: [],
    });
    assertEquals(again.stderr, "");
    assert(await Deno.readTextFile(path) !== before);
    // What this compiler made is no library.
    await expectErrors([
      {
        args: ["generate", "x", "--model", model, "--device", "cpu"],
        code: 1,
        says: [path, "cannot be opened"],
        setting,
      },
      {
        args: ["build", "--quiet"],
        code: 1,
        says: ["failed with code 1"],
        setting: { root: copy, env: { ...empty, CXX: "/bin/false" } },
      },
    ]);
  });

  it("leaves nothing behind when a build is interrupted", async () => {
    const compiler = `${temporary}/slow_compiler`;
    await writeScript(
      compiler,
      '[ "$1" = --version ] && { echo slow 1.0; exit; }\nexec sleep 60',
    );
    const folder = `${copy}/build`;
    await Deno.mkdir(folder, { recursive: true });
    const isWork = ({ name }: Deno.DirEntry) => name.startsWith(".build-");
    const works = async () =>
      (await Array.fromAsync(Deno.readDir(folder))).filter(isWork).length;
    const { code, stderr } = await wkv(["build"], {
      root: copy,
      env: { ...empty, CXX: compiler },
      async onSpawn(child) {
        for (let i = 0; i < 200 && await works() === 0; i++) {
          await new Promise((resolve) => setTimeout(resolve, 50));
        }
        await new Promise((resolve) => setTimeout(resolve, 200));
        child.kill("SIGINT");
      },
    });
    assertEquals(code, 130, stderr);
    assertStringIncludes(stderr, "wkv: Interrupted");
    assertEquals(await works(), 0);
  });

  it("is given up at once at the second Ctrl-C", async () => {
    const compiler = `${temporary}/stubborn_compiler`;
    await writeScript(
      compiler,
      `[ "$1" = --version ] && { echo stubborn 1.0; exit; }
trap "" INT TERM
sleep 4`,
    );
    let second = NaN;
    const { code } = await wkv(["build"], {
      root: copy,
      env: { ...empty, CXX: compiler },
      async onSpawn(child) {
        for (const wait of [1000, 500]) {
          await new Promise((resolve) => setTimeout(resolve, wait));
          child.kill("SIGINT");
        }
        second = performance.now();
      },
    });
    assertEquals(code, 130);
    assertLess(performance.now() - second, 1500);
  });

  it("of another ABI, or none at all, is refused by name", async () => {
    const source = `${temporary}/other.cpp`;
    const other = `${temporary}/other.so`;
    await Deno.writeTextFile(
      source,
      Object.keys(symbols).map((name) =>
        `extern "C" int ${name}() { return 999; }\n`
      ).join(""),
    );
    const built = await execute(Deno.env.get("CXX") ?? "g++", [
      ...["-shared", "-fPIC", "-o", other, source],
    ]);
    assertEquals(built.code, 0, built.stderr);
    const args = ["generate", "x", "--model", model, "--device", "cpu"];
    await expectErrors([
      {
        args,
        code: 1,
        says: [other, `ABI 999, expected ${ABI_VERSION}`],
        setting: { env: { WKV_LIB_CPU: other } },
      },
      {
        args,
        code: 1,
        says: [source, "cannot be opened"],
        setting: { env: { WKV_LIB_CPU: source } },
      },
      {
        args,
        code: 1,
        says: ["WKV_LIB_CPU", "/nowhere.so"],
        setting: { env: { WKV_LIB_CPU: "/nowhere.so" } },
      },
    ]);
  });
});

describe("wkv doctor", () => {
  it("fails when WKV_LIB_CPU names no library, as generate does", async () => {
    const { code, stdout } = await wkv(["doctor"], {
      env: { WKV_LIB_CPU: `${temporary}/no_library.so` },
    });
    assertEquals(code, 1);
    assertStringIncludes(stdout, "unset WKV_LIB_CPU");
    assertStringIncludes(stdout, "Generating cannot work here");
  });

  it("finds what generating needs", async () => {
    const { stdout } = await ok(["doctor", "--json"]);
    const found = JSON.parse(stdout);
    assertEquals(found.ok, true);
    assertEquals(found.abi, ABI_VERSION);
    assertMatch(found.sourceHash, /^[0-9a-f]{64}$/);
    assertMatch(found.device.text, /^CPU, /);
    for (const name of ["device", "compiler", "python", "pip", "tokenizer"]) {
      assertEquals(found[name].ok, true, name);
    }
    assertEquals(found.model, { ok: true, text: model });
    assertEquals(
      Object.keys(found.permissions).slice(0, 6),
      ["generate", "chat", "perplexity", "eval", "compare", "verify"],
    );
    const text = (await ok(["doctor"])).stdout;
    assertStringIncludes(text, found.library);
    assertStringIncludes(text, found.permissions.generate.join(" "));
  });
});

describe("permissions", () => {
  /** The flags that a command's help prints. */
  async function flags(args: string[]): Promise<string[]> {
    const { stdout } = await ok([...args, "--help"]);
    const lines = stdout.slice(stdout.indexOf("Permissions on")).split("\n");
    return lines.map((line) => line.trim()).filter((line) =>
      line.startsWith("--allow-")
    );
  }

  it("in a command's help are all that it needs", async () => {
    const text = `${ROOT}/tests/golden/text.txt`;
    const dump = `${temporary}/permitted.jsonl`;
    const short = `${temporary}/permitted.txt`;
    await Deno.writeTextFile(short, PROMPT);
    const runs: string[][] = [
      ["generate", "--model", model, "--max-tokens", "2", "-f", short],
      ["chat", model, "--max-tokens", "2", "--system-file", short],
      ["perplexity", "--model", model, "--text", text, "--dump-cache", dump]
        .concat("--window", "16", "--windows", "1"),
      ["info"],
      ["plan", "--memory", "1GiB"],
      ["list"],
      ["show"],
      ["pull"],
      ["doctor"],
      ["completions", "bash"],
      ["bench", "kernels", "--shapes", "tiny", "--op", "norm", "--quick"]
        .concat("--device", "cpu", "--record", `${temporary}/bench.json`),
    ];
    for (const args of runs) {
      const allowed = await flags(args);
      assert(!allowed.includes("--allow-all"));
      // A turn for the command that waits for one.
      const stdin = args[0] === "chat" ? "Hello\n" : undefined;
      await ok(args, { flags: allowed, stdin });
    }
    // So are those of the default model by its name.
    const named = ["generate", PROMPT, "--max-tokens", "2", "--device", "cpu"];
    const allowed = await flags(named);
    for (const kind of ["ffi", "read", "env"]) {
      assertMatch(allowed.join("\n"), new RegExp(`^--allow-${kind}=`, "m"));
    }
    for (const kind of ["write", "run", "net"]) {
      assert(!allowed.join().includes(`--allow-${kind}`));
    }
    await ok(named, { flags: allowed });
    await expectErrors([
      ...["ffi", "read", "env"].map((kind) => ({
        args: named,
        code: 1,
        says: [`--allow-${kind}`],
        setting: {
          flags: allowed.filter((flag) => !flag.startsWith(`--allow-${kind}=`)),
        },
      })),
      { args: ["list"], code: 1, says: ["--allow-"], setting: { flags: [] } },
    ]);
  });

  it("in help are those of named libraries, wherever they lie", async () => {
    const file = `${temporary}/named_cpu.so`, link = `${temporary}/link.so`;
    await Deno.copyFile((await findCpuLibrary()).path, file);
    await Deno.symlink(file, link);
    const none = `${temporary}/named_cuda.so`;
    await Deno.writeTextFile(none, "no library");
    const here = { WKV_LIB_CPU: link, WKV_LIB_CUDA: none };
    const run = ["generate", PROMPT, "--model", model, "--max-tokens", "2"]
      .concat("--device", "cpu");
    const find = async (args: string[]) =>
      (await wkv([...args, "--help"], { env: here })).stdout
        .match(/(?<=^ *)--allow-.*/gm)!;
    await ok(run, { flags: await find(run), env: here });
    // It gets as far as opening the file.
    const args = ["doctor", "--self-test", "--device", "cuda"];
    const flags = await find(args);
    const kinds = flags.filter((flag) => flag.includes(none))
      .map((flag) => flag.slice(0, flag.indexOf("=")));
    assertEquals(kinds, ["--allow-ffi", "--allow-read"]);
    await expectErrors([{
      args,
      code: 1,
      says: [none, /^(?!.*--allow)/s],
      setting: { flags, env: here },
    }]);
  });

  it("are not needed for help", async () => {
    const { stdout } = await ok(["generate", "--help"], { flags: [] });
    assertStringIncludes(stdout, "--max-tokens");
    assertStringIncludes(stdout, "takes --allow-read and --allow-env");
  });
});
