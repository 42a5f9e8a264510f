/** Commands as processes: help, wrong command lines and files, models, completions. */

import {
  assert,
  assertEquals,
  assertLess,
  assertLessOrEqual,
  assertMatch,
  assertStringIncludes,
} from "@std/assert";
import { afterAll, beforeAll, describe, it } from "@std/testing/bdd";
import {
  execute,
  expectErrors,
  ok,
  pattern,
  ROOT,
  wkv,
  writeScript,
} from "./cli_process.ts";
import { testModel } from "./model.ts";
import type { TensorInput } from "./gguf_writer.ts";
import { tinyModel, type TinyOptions } from "./tiny_model.ts";

let model = "";
let temporary = "";

beforeAll(async () => {
  model = await testModel();
  temporary = await Deno.makeTempDir({ prefix: "wkv_cli_" });
});
afterAll(async () => {
  await Deno.remove(temporary, { recursive: true });
});

describe("help and usage", () => {
  it("lists what works, in less than 300 ms", async () => {
    let best = Infinity;
    for (let i = 0; i < 4; i++) {
      const { stdout, stderr, ms } = await ok(["--help"]);
      best = Math.min(best, ms);
      assertEquals(stderr, "");
      for (
        const name of ["generate", "chat", "perplexity", "eval", "compare"]
          .concat("verify")
      ) {
        assertStringIncludes(stdout, `\n  ${name} `);
      }
    }
    assertLess(best, 300);
  });

  it("is what no command, help and --version give", async () => {
    const none = await wkv([]);
    assertEquals([none.code, none.stdout], [2, ""]);
    assertStringIncludes(none.stderr, "Usage: wkv <command>");
    const version = await ok(["--version"]);
    assertMatch(version.stdout, /^\d+\.\d+\.\d+\n$/);
    const help = await ok(["help", "list"]);
    assertEquals(help.stdout, (await ok(["list", "--help"])).stdout);
    assertStringIncludes(help.stdout, "Usage: wkv list [options]");
  });
});

describe("wrong command lines", () => {
  it("end with 2, before any model is loaded", async () => {
    const start = performance.now();
    const binary = `${temporary}/binary.txt`;
    await Deno.writeFile(binary, Uint8Array.of(0x61, 0x0a, 0xff, 0));
    await expectErrors([
      { args: ["genrate", "x"], code: 2, says: ["did you mean generate?"] },
      { args: ["chatt"], code: 2, says: ["did you mean chat?"] },
      ...([
        [["--system", "a", "--system-file", binary], "exclude each other"],
        [["--system-file", "-"], "Standard input is the conversation"],
        [["--chat-template", "/nowhere"], "/nowhere: There is no such file"],
        [["--budget", "4"], "sinks + recent"],
        [["a", "b"], "one model"],
        [["/nowhere.gguf"], "/nowhere.gguf"],
      ] as [string[], string][]).map(([args, says]) => ({
        args: ["chat", ...args],
        code: 2,
        says: [says],
      })),
      { args: ["__proto__"], code: 2, says: ["Unknown command"] },
      { args: ["--jsn"], code: 2, says: ["Unknown option"] },
      ...([
        [["--buget", "3", "x"], "did you mean --budget?"],
        [["--budget", "-1", "x"], '"-1"'],
        [["--budget", "1.5", "x"], '"1.5"'],
        [["--budget", "0", "x"], '"0"'],
        [["--max-tokens", "9007199254740992", "x"], "9007199254740992"],
        [["--max-tokens", "1e3", "x"], "whole number"],
        [["--temperature", "NaN", "x"], "NaN"],
        [["--seed", "18446744073709551616", "x"], "2^53"],
        [["--budget", "4", "x"], "sinks + recent"],
        [["--budget", "8", "--recent", "8", "x"], "8 is less than 4 + 8"],
        [["--policy", "none", "x"], "weighted-kv"],
        [["--prefill", "chunk:x", "x"], "chunk:N"],
        [[""], "The prompt is empty"],
        [[], "The prompt is empty"],
        [["a", "b"], "one prompt"],
        [["-f", "/nowhere/p.txt"], "/nowhere/p.txt: There is no such file"],
        [["-f", "/tmp"], "/tmp: This is a folder"],
        [["-f", binary], "binary.txt: byte 2: Found what is not UTF-8"],
        [["x", "--model", "/nowhere.gguf"], "/nowhere.gguf"],
        [["x", "--model", "/tmp"], "This is a folder"],
        [["x", "--model", "nothing"], "known names"],
      ] as [string[], string][]).map(([args, says]) => ({
        args: ["generate", ...args],
        code: 2,
        says: [says],
      })),
      { args: ["perplexity", "--window", "9"], code: 2, says: ["--text"] },
      { args: ["perplexity", "--text", "-"], code: 2, says: ["--window"] },
      { args: ["list", "x"], code: 2, says: ["no argument"] },
      { args: ["build", "cuda", "--all"], code: 2, says: ["not both"] },
      { args: ["build", "metal"], code: 2, says: ["cpu or cuda"] },
      { args: ["completions", "tcsh"], code: 2, says: ["bash, zsh, fish"] },
      { args: ["pull", "nothing"], code: 2, says: ["known names"] },
    ]);
    assertLess(performance.now() - start, 30_000);
  });

  it("say more with WKV_DEBUG=1", async () => {
    const { stderr } = await wkv(["generate", "x", "--model", "/no.gguf"], {
      env: { WKV_DEBUG: "1" },
    });
    assertMatch(stderr, /^wkv: .+\n[^]*\n\s+at /);
  });
});

describe("wrong files", () => {
  it("end with 2 and name file and field", async () => {
    const short = `${temporary}/short.gguf`;
    const cut = `${temporary}/cut.gguf`;
    const foreign = `${temporary}/foreign.gguf`;
    const none = `${temporary}/none.gguf`;
    {
      using file = await Deno.open(model);
      const bytes = new Uint8Array(1 << 22);
      let length = 0;
      while (length < bytes.length) {
        length += await file.read(bytes.subarray(length)) ?? 0;
      }
      await Deno.writeFile(cut, bytes);
      await Deno.writeFile(short, bytes.subarray(0, 1000));
    }
    await Deno.writeTextFile(foreign, "{}".repeat(1000));
    await Deno.writeFile(none, new Uint8Array());
    await expectErrors([
      ...[cut, short, foreign, none].map((path) => ({
        args: ["generate", "x", "--model", path],
        code: 2,
        says: [path],
      })),
      { args: ["info", foreign], code: 2, says: ["foreign.gguf: magic:"] },
      {
        args: ["perplexity", "--text", cut, "--window", "9"],
        code: 2,
        says: ["UTF-8"],
      },
    ]);
  });
});

describe("models", () => {
  it("info reads the header", async () => {
    const { stdout } = await ok(["info", model, "--json", "--budget", "100"]);
    const info = JSON.parse(stdout);
    assertEquals(
      [info.architecture, info.layers, info.heads, info.kvHeads, info.headDim],
      ["llama", 30, 9, 3, 64],
    );
    assertEquals([info.vocabulary, info.context], [49152, 8192]);
    assertEquals(info.parameters, 134_515_008);
    assertEquals(info.cache.bytesPerToken, 23040);
    assertEquals(info.cache.budgetBytes, 2_304_000);
    assertEquals(info.types.Q4_1.tensors, 210);
    assertEquals([info.runs, info.window], [true, null]);
    const text = await ok(["info", "--model", model]);
    assertStringIncludes(text.stdout, "134.5 million");
    assertStringIncludes(text.stdout, "22.5 KiB a token");
  });

  it("info says from headers alone whether and why a model does not run, and plan refuses it", async () => {
    const drop = (name: string) => (tensors: Map<string, TensorInput>) =>
      void tensors.delete(name);
    const cases: Record<string, [TinyOptions, string | null]> = {
      whole: [{}, null],
      tokenizer: [
        { metadata: { "tokenizer.ggml.model": "rwkv" } },
        'Unknown tokenizer "rwkv"',
      ],
      words: [
        { metadata: { "tokenizer.ggml.pre": "none such" } },
        'Unknown pre-tokenizer "none such"',
      ],
      missing: [
        { change: drop("blk.1.ffn_down.weight") },
        'tensor "blk.1.ffn_down.weight": Missing',
      ],
      shape: [
        {
          change: (tensors) => {
            tensors.get("blk.1.ffn_up.weight")!.shape = [48, 32];
          },
        },
        "Shape is [48, 32], expected shape [32, 48]",
      ],
      type: [
        {
          width: 256,
          hidden: 256,
          change: (tensors) => {
            const name = "blk.0.attn_q.weight";
            tensors.set(name, { name, type: "IQ4_XS", shape: [256, 256] });
          },
        },
        "type IQ4_XS has no kernel yet",
      ],
      vector: [
        {
          change: (tensors) => {
            const name = "blk.0.attn_norm.weight";
            tensors.set(name, { name, type: "Q8_0", shape: [32] });
          },
        },
        "attn_norm.weight: the type is Q8_0, expected F32, F16 or BF16",
      ],
    };
    for (const [name, [options, why]] of Object.entries(cases)) {
      const path = `${temporary}/${name}.gguf`;
      await Deno.writeFile(path, tinyModel(options).bytes);
      const { stdout } = await ok(["info", path, "--json"]);
      const { runs, reason } = JSON.parse(stdout);
      assertEquals(runs, why === null, name);
      if (why === null) assertEquals(reason, null);
      else assertStringIncludes(reason, why);
      const run = await wkv(
        ["generate", "a", "--model", path, "--max-tokens", "1"]
          .concat("--device", "cpu", "--quiet"),
      );
      // What loading says is what info said.
      assertEquals(run.code, why === null ? 0 : 2, run.stderr);
      if (why !== null) assertEquals(run.stderr, `wkv: ${reason}\n`);
      // What can't run is not planned for.
      const plan = await wkv(["plan", path, "--memory", "1GiB"]);
      assertEquals(plan.code, run.code, name);
      if (why === null) continue;
      assertEquals(plan.stdout, "", name);
      assertEquals(plan.stderr, `wkv: The model does not run: ${reason}\n`);
    }
    const text = await ok(["info", `${temporary}/missing.gguf`]);
    assertMatch(text.stdout, /\nruns +no: .*ffn_down/);
    // Every architecture's tiny folder runs, by token ids.
    const models = `${ROOT}/tests/golden/models`;
    for await (const { name, isDirectory } of Deno.readDir(models)) {
      if (!isDirectory) continue;
      const { stdout } = await ok(["info", `${models}/${name}`, "--json"]);
      const { runs, reason, tokenizer } = JSON.parse(stdout);
      assertEquals([runs, reason, tokenizer], [true, null, false], name);
    }
  });

  it("info counts a sliding window once it is full", async () => {
    const folder = new URL("golden/models/gemma2", import.meta.url).pathname;
    const { stdout } = await ok(["info", folder, "--json", "--budget", "100"]);
    const { window, windowLayers, cache, runs } = JSON.parse(stdout);
    assertEquals([window, windowLayers, runs], [8, 2, true]);
    // Of three layers two keep 7 tokens; 2 KV heads of 32 dimensions in f16.
    assertEquals(cache.budgetBytes, (100 + 7 + 7) * 2 * 2 * 32 * 2);
    assertEquals(cache.contextBytes, (64 + 7 + 7) * 2 * 2 * 32 * 2);
  });

  it("info, plan and generate take a model in several files by its first", async () => {
    const paths = tinyModel({ layers: 2 }).split(3).map((bytes, i) => {
      const path = `${temporary}/tiny-0000${i + 1}-of-00003.gguf`;
      Deno.writeFileSync(path, bytes);
      return path;
    });
    const [first] = paths as [string];
    const size = paths.reduce((sum, path) => sum + Deno.statSync(path).size, 0);
    const { stdout } = await ok(["info", first, "--json"]);
    const { bytes, files, runs, types } = JSON.parse(stdout);
    assertEquals([bytes, files, runs], [size, 3, true]);
    assertEquals(types.F32.tensors, 20);
    assertStringIncludes((await ok(["info", first])).stdout, " in 3 files\n");
    const args = ["plan", first, "--memory", "5MB", "--batch", "1"];
    assertStringIncludes((await ok(args)).stdout, "64");
    const run = ["generate", "a", "--model", first, "--max-tokens", "3"]
      .concat("--budget", "16", "--device", "cpu");
    const help = await ok([...run, "--help"]);
    const flags = help.stdout.match(/(?<=^ *)--allow-.*/gm)!;
    assertMatch(flags.join(), /tiny-00003-of-00003/);
    await ok(run, { flags });
    await expectErrors([
      {
        args: ["info", paths[1]!],
        code: 2,
        says: [paths[1]!, "expected the first", first],
      },
    ]);
    await Deno.remove(paths[2]!);
    await expectErrors([
      { args: ["info", first], code: 2, says: [paths[2]!, "missing"] },
    ]);
  });

  it("plan says what fits, and refuses what is no size", async () => {
    const { stdout } = await ok(["plan", model, "--memory", "300MB", "--json"]);
    const rows = stdout.trim().split("\n").map((line) => JSON.parse(line));
    assertEquals(rows.map(({ batch }) => batch), [1, 2, 4, 8, 16, 32]);
    for (const { budget, total, memory } of rows) {
      assert(total <= memory && total > 0.99 * memory, `${budget}: ${total}`);
    }
    const { stdout: none } = await ok(
      ["plan", model, "--memory", "120MB", "--budget", "8192", "--batch", "9"],
    );
    assertStringIncludes(none, "does not fit");
    await expectErrors([
      { args: ["plan"], code: 2, says: ["--memory"] },
      { args: ["plan", "--memory", "8"], code: 2, says: ["such as 8GiB"] },
      {
        args: ["plan", model, "--memory", "1MB"],
        code: 2,
        says: ["The weights alone take 92.1 MiB"],
      },
      {
        args: ["plan", model, "--memory", "1GB", "--policy", "snapkv"]
          .concat("--prefill", "chunk:64"),
        code: 2,
        says: ["must be exact for snapkv"],
      },
    ]);
  });

  it("show and rm say what is here, and take it away when told to", async () => {
    const cache = `${temporary}/cache`;
    const file = `${cache}/weightedkv/models/mine.gguf`;
    await Deno.mkdir(`${cache}/weightedkv/models`, { recursive: true });
    await Deno.writeTextFile(file, "mine");
    const env = { XDG_CACHE_HOME: cache };
    const { stdout } = await ok(["show", "mine.gguf", "--json"], { env });
    const { name, path, bytes, revision } = JSON.parse(stdout);
    assertEquals([name, path, bytes, revision], ["mine.gguf", file, 4, null]);
    const asked = await wkv(["rm", "mine.gguf"], { env });
    assertEquals(asked.code, 2);
    assertStringIncludes(asked.stderr, `give --yes to remove ${file}`);
    const gone = await ok(["rm", "mine.gguf", "--yes"], { env });
    assertStringIncludes(gone.stderr, "Removed mine.gguf: 4 B free");
    const again = await wkv(["rm", "mine.gguf", "--yes"], { env });
    assertEquals(again.code, 2);
    assertStringIncludes(again.stderr, "No such model is here");
    await expectErrors([
      { args: ["rm"], code: 2, says: ["Name the model"] },
      { args: ["show", "hf:org/none"], code: 2, says: ["No such model"] },
    ]);
  });

  it("list and pull find what is here", async () => {
    const { stdout } = await ok(["list", "--json"]);
    const models = stdout.trim().split("\n").map((line) => JSON.parse(line));
    const row = models.find(({ path }) => path === model);
    assertEquals(row, {
      name: "smollm2-135m-instruct",
      path: model,
      bytes: 98_362_432,
      revision: null,
    });
    assertStringIncludes((await ok(["list"])).stdout, "93.8 MiB");
    const pull = await ok(["pull", "smollm2-135m-instruct"]);
    assertEquals(pull.stdout, `${model}\n`);
    assertStringIncludes(pull.stderr, "already there, hash verified");
    const empty = await ok(["list"], { env: { XDG_CACHE_HOME: temporary } });
    assertEquals(empty.stdout, "");
    assertStringIncludes(empty.stderr, "wkv pull");
  });

  it("say what to do without pip, network or a writable cache", async () => {
    const bare = `${temporary}/bare`;
    const offline = `${temporary}/offline`;
    const file = `${temporary}/file`;
    for (const folder of [bare, offline]) await Deno.mkdir(folder);
    await Deno.writeTextFile(file, "");
    await writeScript(
      `${offline}/python3`,
      'echo "ERROR: No matching distribution found" >&2; exit 1',
    );
    const ways = [/pip/, "pull hf:", "--model FILE"];
    const empty = { XDG_CACHE_HOME: `${temporary}/cache` };
    await expectErrors([
      {
        args: ["generate", "x", "--quiet"],
        code: 1,
        says: ways,
        setting: { env: { ...empty, PATH: bare } },
      },
    ]);
    for (
      const { says, env } of [
        { says: ways, env: { ...empty, PATH: bare } },
        {
          says: [...ways, "No matching distribution"],
          env: { ...empty, PATH: offline },
        },
        {
          says: ["can't be written", "XDG_CACHE_HOME"],
          env: { XDG_CACHE_HOME: file },
        },
      ]
    ) {
      const { code, stderr } = await wkv(["pull"], { env });
      assertEquals(code, 1, stderr);
      for (const text of says) assertMatch(stderr, pattern(text));
    }
    await expectErrors([{
      args: ["generate", "x", "--offline"],
      code: 2,
      says: ["`offline` is set", "pull smollm2"],
      setting: { env: empty },
    }]);
  });

  it("HF_HUB_OFFLINE is --offline, where its other clients take it for yes", async () => {
    // Nothing answers here: who asks ends with 1.
    const env = {
      XDG_CACHE_HOME: `${temporary}/none`,
      HF_HUB_CACHE: `${temporary}/none`,
      HF_ENDPOINT: "http://127.0.0.1:9",
      PATH: `${temporary}/none`,
    };
    const says = ["HF_HUB_OFFLINE is set"];
    const run = (name: string) => ["generate", "x", "--model", name, "--quiet"];
    const cases = ["smollm2-135m-instruct", "hf:org/none"].flatMap((name) => {
      const setting = { env: { ...env, HF_HUB_OFFLINE: "1" } };
      return [
        { args: run(name), code: 2, says: [...says, `pull ${name}`], setting },
        { args: ["pull", name], code: 2, says, setting },
        {
          args: [...run(name), "--offline"],
          code: 2,
          says: ["`offline` is set"],
          setting,
        },
      ];
    });
    const of = (HF_HUB_OFFLINE: string) => ({
      args: run("hf:org/none"),
      setting: { env: { ...env, HF_HUB_OFFLINE } },
    });
    await expectErrors([
      ...cases,
      ...["ON", "yes", "True"].map((yes) => ({ ...of(yes), code: 2, says })),
      ...["0", "", "off", "2", " 1"].map((no) => ({
        ...of(no),
        code: 1,
        says: ["could not be asked"],
      })),
    ]);
  });

  it("info and plan say that a model is not here, and what brings it", async () => {
    const env = {
      XDG_CACHE_HOME: `${temporary}/none`,
      HF_HUB_CACHE: `${temporary}/none`,
    };
    for (const name of ["smollm2-135m-instruct", "hf:org/none:Q4_0"]) {
      for (const args of [["info", name], ["plan", name, "--memory", "1GiB"]]) {
        const { code, stdout, stderr } = await wkv(args, { env });
        assertEquals([code, stdout], [2, ""]);
        assertEquals(
          stderr,
          `wkv: ${name}: The model is not here; \`wkv pull ${name}\` brings it\n`,
        );
      }
    }
  });
});

describe("wkv completions", () => {
  it("complete commands, options and their values in bash", async () => {
    const script = `${temporary}/completions.bash`;
    const { stdout } = await ok(["completions", "bash"]);
    await Deno.writeTextFile(script, stdout);
    const complete = async (...words: string[]): Promise<string[]> => {
      const { stdout, stderr } = await execute("bash", [
        ...["--norc", "-c"],
        `source ${script}; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_wkv; printf '%s\\n' "\${COMPREPLY[@]}"`,
        ...["bash", "_", ...words],
      ]);
      assertEquals(stderr, "");
      return stdout.split("\n").filter((line) => line !== "");
    };
    assertEquals(await complete("wkv", "gen"), ["generate"]);
    assertEquals(await complete("wkv", "p"), ["perplexity", "pull", "plan"]);
    assertEquals(await complete("wkv", "generate", "--bud"), ["--budget"]);
    assertEquals(await complete("wkv", "generate", "--device", "c"), [
      "cpu",
      "cuda",
    ]);
    assertEquals(await complete("wkv", "perplexity", "--policy", "str"), [
      "streaming-llm",
    ]);
    assertEquals(await complete("wkv", "completions", "z"), ["zsh"]);
  });

  it("name every command and option in zsh and fish", async () => {
    for (const shell of ["zsh", "fish"]) {
      const { stdout } = await ok(["completions", shell]);
      for (
        const word of ["generate", "doctor", "max-tokens", "dump-cache"].concat(
          "weighted-kv-ward",
        )
      ) assertStringIncludes(stdout, word);
      assertLessOrEqual(stdout.length, 50_000);
    }
  });
});
