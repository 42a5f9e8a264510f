/** `chat` as a process: pipes, its commands, a terminal, Ctrl-C. */

import {
  assert,
  assertEquals,
  assertMatch,
  assertStringIncludes,
} from "@std/assert";
import { afterAll, beforeAll, describe, it } from "@std/testing/bdd";
import { spellBytes } from "../src/tokenizer/byte_map.ts";
import {
  denoArguments,
  execute,
  expectErrors,
  ok,
  type Outcome,
  ROOT,
  wkv,
} from "./cli_process.ts";
import { testModel } from "./model.ts";

/** What every run is told. */
let here: string[] = [];
let temporary = "";

beforeAll(async () => {
  here = [await testModel(), "--device", "cpu", "--max-tokens", "8"];
  temporary = await Deno.makeTempDir({ prefix: "wkv_chat_" });
});
afterAll(async () => {
  await Deno.remove(temporary, { recursive: true });
});

interface Line {
  text: string;
  tokens: number[];
  promptTokens: number;
  finishReason: string;
  refed: boolean;
  // deno-lint-ignore no-explicit-any -- compared field by field
  cache: Record<string, any>;
}

/** The lines of a conversation that is piped in. */
async function lines(stdin: string, args: string[] = []): Promise<Line[]> {
  const { stdout, stderr } = await ok(
    ["chat", ...here, "--json", "--quiet", ...args],
    { stdin },
  );
  assertEquals(stderr, "");
  return stdout.trim().split("\n").map((line) => JSON.parse(line));
}

describe("wkv chat on a pipe", () => {
  it("takes each line as a turn, and prints answers alone", async () => {
    const stdin = "What is a lighthouse?\n\nWho lives there?";
    const plain = await ok(["chat", ...here], { stdin });
    const [first, second, ...rest] = await lines(stdin);
    assertEquals(rest, []);
    assertEquals(plain.stdout, `${first!.text}\n${second!.text}\n`);
    assertEquals(plain.stderr, "Cut at 8 tokens (--max-tokens)\n".repeat(2));
    assertEquals(Object.keys(first!), [
      ...["model", "device", "text", "tokens", "promptTokens"],
      ...["finishReason", "refed", "timings", "cache"],
    ]);
    const { seen, kept, merged, budget, policy } = second!.cache;
    assertEquals([budget, policy, merged], [256, "weighted-kv", 0]);
    assertEquals(seen, kept);
    assertEquals(
      seen,
      first!.cache.seen + second!.promptTokens + second!.tokens.length - 1,
    );
    assert(!second!.refed);
  });

  it("takes several lines between quotes, and none after /bye", async () => {
    const one = await lines('"""One\ntwo"""\n/bye\nnot read\n');
    const other = await lines('"""\nOne\ntwo\n"""\n');
    assertEquals([one.length, one[0]!.tokens], [1, other[0]!.tokens]);
    const joined = await lines("One two\n");
    assertEquals(one[0]!.promptTokens, joined[0]!.promptTokens + 1);
    await expectErrors([{
      args: ["chat", ...here],
      code: 2,
      says: ['expected the """ that end the text'],
      setting: { stdin: '"""never\nended\n' },
    }]);
  });

  it("obeys its commands", async () => {
    const file = `${temporary}/conversation.json`;
    const { stdout, stderr } = await ok(["chat", ...here, "--budget", "64"], {
      stdin: [
        ...["/system", "/system Say little.", "Hello", "/cache"],
        ...[`/save ${file}`, "/policy streaming-llm", "/clear", "/cache"],
        ...[`/load ${file}`, "Again", "/system", "/help"],
      ].join("\n"),
    });
    assertMatch(stdout, /^No system message\nSay little\.\n/);
    assertMatch(stdout, /; weighted-kv, budget 64, sinks 4, recent 28\n/);
    assertMatch(
      stdout,
      /\n\d+ tokens seen: \d+ kept, 0 merged, 0 evicted\n.* \(in full .*\)\n/,
    );
    assertMatch(stdout, /; streaming-llm, budget 64, sinks 4, recent 60\n/);
    assertMatch(stdout, /\n0 tokens seen: 0 kept/);
    assertMatch(stdout, /\nSay little\.\n\/system \[TEXT\]/);
    assertStringIncludes(stderr, "Saved 3 messages\n");
    assertStringIncludes(stderr, "Loaded 3 messages\n");
    const saved = JSON.parse(await Deno.readTextFile(file));
    assertEquals(
      saved.messages.map(({ role }: { role: string }) => role),
      ["system", "user", "assistant"],
    );
    // A conversation from a file is the conversation that was saved.
    const whole = await lines("Hello\nAgain\n", ["--system", "Say little."]);
    const loaded = await lines(`/load ${file}\nAgain\n`);
    assertEquals(
      loaded[0]!.promptTokens,
      whole[0]!.cache.seen + whole[1]!.promptTokens,
    );
    const system = `${temporary}/system.txt`;
    await Deno.writeTextFile(system, "Say little.");
    const again = await lines("Hello\n", ["--system-file", system]);
    assertEquals(again[0]!.tokens, whole[0]!.tokens);
    const [{ cache }] = await lines("/cache\n") as [Line];
    assertEquals([cache.seen, cache.budget], [0, 256]);
  });

  it("takes a template from a file", async () => {
    const path = `${temporary}/template.jinja`;
    await Deno.writeTextFile(
      path,
      "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    );
    const [turn] = await lines("Hello<|im_end|>\n", ["--chat-template", path]);
    // Hello, the seven tokens of the text <|im_end|>, and one special token.
    assertEquals(turn!.promptTokens, 1 + 7 + 1);
    await Deno.writeTextFile(path, "{{ raise_exception('Not today') }}");
    await expectErrors([
      {
        args: ["chat", ...here, "--chat-template", path],
        code: 2,
        says: ["refuses these messages: Not today"],
        setting: { stdin: "Hello\n" },
      },
      {
        args: ["chat", ...here, "--template-name", "rag"],
        code: 2,
        says: ['no chat template "rag": its templates are default'],
        setting: { stdin: "Hello\n" },
      },
    ]);
    await Deno.writeTextFile(
      path,
      "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    );
    const { code, stderr } = await wkv(
      ["chat", ...here, "--chat-template", path],
      { stdin: "Hello\n" },
    );
    assertEquals(code, 2);
    assertStringIncludes(stderr, "It takes more than 1 s");
  });

  it("talks with a model of a folder, with the permissions of its help", async () => {
    const folder = `${temporary}/folder`;
    await Deno.mkdir(folder);
    const from = `${ROOT}/tests/golden/models/llama`;
    for (const name of ["config.json", "model.safetensors"]) {
      await Deno.copyFile(`${from}/${name}`, `${folder}/${name}`);
    }
    const special = ["<s>", "</s>", "<|user|>"];
    const bytes = Array.from({ length: 253 }, (_, byte) => spellBytes([byte]));
    const tokens = [...special, ...bytes].map((token, id) => [token, id]);
    const byteLevel = { type: "ByteLevel", add_prefix_space: false };
    const files = {
      "tokenizer.json": {
        version: "1.0",
        added_tokens: special.map((content, id) => ({
          ...{ id, content, special: true, normalized: false },
          ...{ single_word: false, lstrip: false, rstrip: false },
        })),
        normalizer: null,
        pre_tokenizer: { ...byteLevel, use_regex: true },
        post_processor: null,
        decoder: byteLevel,
        model: { type: "BPE", vocab: Object.fromEntries(tokens), merges: [] },
      },
      "tokenizer_config.json": {
        bos_token: "<s>",
        eos_token: "</s>",
        chat_template:
          "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}",
      },
    };
    for (const [name, json] of Object.entries(files)) {
      await Deno.writeTextFile(`${folder}/${name}`, JSON.stringify(json));
    }
    const args = ["chat", folder, "--device", "cpu", "--max-tokens", "2"];
    const { stdout: help } = await ok([...args, "--help"]);
    const flags = help.match(/(?<=^ *)--allow-.*/gm)!;
    const { stdout } = await ok([...args, "--json", "--quiet"], {
      stdin: "<s>\nb</s>c\n",
      flags,
    });
    const [first, second] = stdout.trim().split("\n")
      .map((line): Line => JSON.parse(line));
    // The first token, <|user|>, the text <s> in three bytes, the last one.
    assertEquals(first!.promptTokens, 1 + 1 + 3 + 1);
    // Without the beginning of an answer the text cannot go on.
    assertEquals(second!.refed, true);
  });

  it("ends at the first error", async () => {
    const empty = `${temporary}/empty.json`;
    await Deno.writeTextFile(empty, "{}");
    for (
      const [stdin, says] of [
        ["/nope\nHello\n", "Unknown command /nope: /help lists them"],
        ["/load\n", "/load needs the name of a file"],
        ["/load /nowhere.json\n", "/nowhere.json"],
        [`/load ${empty}\n`, "messages: Found none, expected a list"],
        ["/policy none\n", "weighted-kv"],
        [Uint8Array.of(0x61, 0xff, 0x0a), "Found what is not UTF-8"],
      ] as const
    ) {
      const { code, stdout, stderr } = await wkv(["chat", ...here, "--quiet"], {
        stdin,
      });
      assertEquals([code, stdout], [2, ""], stderr);
      assertStringIncludes(stderr, says);
    }
  });

  it("ends with 130 at Ctrl-C", async () => {
    const child = new Deno.Command(Deno.execPath(), {
      args: denoArguments(["chat", ...here, "--max-tokens", "100000"]),
      stdin: "piped",
      stdout: "piped",
      stderr: "null",
    }).spawn();
    const writer = child.stdin.getWriter();
    await writer.write(
      new TextEncoder().encode("Write a very long story about a ship.\n"),
    );
    const reader = child.stdout.getReader();
    await reader.read();
    child.kill("SIGINT");
    while (!(await reader.read()).done);
    assertEquals((await child.status).code, 130);
    await writer.close().catch(() => {});
  });
});

/** Holds a conversation on a terminal: types each text once the output that came since the last one has what it waits for. */
async function onTerminal(
  args: string[],
  steps: readonly [wait: string, type: string][],
): Promise<Outcome> {
  const script = `
import json, os, pty, sys
steps = json.loads(sys.argv[1])
pid, fd = pty.fork()
if pid == 0:
    os.execv(sys.argv[2], sys.argv[2:])
out, since = b"", 0
while True:
    try:
        data = os.read(fd, 65536)
    except OSError:
        break
    if not data:
        break
    out += data
    if steps and steps[0][0].encode() in out[since:]:
        since = len(out)
        os.write(fd, steps.pop(0)[1].encode())
sys.stdout.buffer.write(out)
sys.stdout.flush()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
`;
  return await execute(
    "python3",
    ["-c", script, JSON.stringify(steps), Deno.execPath()].concat(
      denoArguments(args),
    ),
    { env: { NO_COLOR: "1", TERM: "xterm" } },
  );
}

describe("wkv chat on a terminal", () => {
  it("prompts, answers, and survives Ctrl-C and wrong commands", async () => {
    const { code, stdout } = await onTerminal(
      ["chat", ...here, "--max-tokens", "400"],
      [
        [">>> ", "/nope\n"],
        [">>> ", "\x03"],
        [">>> ", '"""\n'],
        ["... ", "Write a very long story about a ship.\n"],
        ["... ", '"""\n'],
        ["\n", ""],
        ["the ", "\x03"],
        [">>> ", "/cache\n"],
        [">>> ", "Write another one.\n"],
        ["the ", "\x03"],
        [">>> ", "\x04"],
      ],
    );
    assertEquals(code, 0, stdout);
    assertMatch(stdout, /weighted-kv, budget 256.*; \/help lists/);
    assertStringIncludes(stdout, "wkv: Unknown command /nope");
    assertStringIncludes(stdout, "Ctrl-D or /bye leaves\r\n>>> ");
    assertMatch(stdout, /\d+ tokens seen: \d+ kept/);
    // The answer that was ended stays: nothing is fed anew.
    assert(!stdout.includes("fed anew"), stdout);
  });
});
