/** Tests of chat templates: what transformers makes of the same conversations, hostile templates, and what users type. */

import {
  assert,
  assertEquals,
  assertLess,
  assertMatch,
  assertNotEquals,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { describe, it } from "@std/testing/bdd";
import { Mask } from "../src/chat/mask.ts";
import { folderChatTemplates, ggufChatTemplates } from "../src/chat/sources.ts";
import { ChatTemplate } from "../src/chat/template.ts";
import { FormatError } from "../src/formats/error.ts";
import { GgufFile } from "../src/formats/gguf.ts";
import { execute, ROOT } from "./cli_process.ts";
import { testModel } from "./model.ts";

interface Golden {
  now: string;
  conversations: { role: string; content: string }[][];
  templates: {
    name: string;
    template: string;
    bos: string | null;
    eos: string | null;
    rows: { text?: string; refuses?: string }[];
  }[];
}

const golden: Golden = JSON.parse(
  await Deno.readTextFile(new URL("golden/chat.json", import.meta.url)),
);

/** What a template makes of one message. */
function render(source: string, content = "Hello"): string {
  return new ChatTemplate(source, "here").render([{ role: "user", content }]);
}

describe("a chat template", () => {
  for (const { name, template, bos, eos, rows } of golden.templates) {
    it(`renders as transformers does: ${name}`, () => {
      const chat = new ChatTemplate(template, name);
      const options = {
        bosToken: bos ?? undefined,
        eosToken: eos ?? undefined,
        now: new Date(golden.now),
      };
      assertEquals(rows.length, 2 * golden.conversations.length);
      for (const [i, { text, refuses }] of rows.entries()) {
        const messages = golden.conversations[i >> 1]!;
        const of = { ...options, addGenerationPrompt: i % 2 === 1 };
        if (text !== undefined) {
          assertEquals(chat.render(messages, of), text, `row ${i}`);
          continue;
        }
        const { message } = assertThrows(
          () => chat.render(messages, of),
          RangeError,
        );
        assertEquals(
          message,
          `${name}: The chat template refuses these messages: ${refuses}`,
        );
      }
    });
  }

  it("has a clear error when it is wrong", () => {
    for (
      const [source, says] of [
        ["{% if %}", "The chat template is wrong: "],
        ["{% for x in messages %}", "The chat template is wrong: It ends"],
        ["{% if messages %}a{% else %}", "The chat template is wrong: It ends"],
        ["{% endfor %}", "Unknown statement type: endfor"],
        ["{{ 'open", "The chat template is wrong: "],
        ["x".repeat(300_000), "expected at most 262144"],
        [`a${" ".repeat(200_000)}b`, "1024 blanks in a row"],
        [`{{ ${"(".repeat(50_000)}1${")".repeat(50_000)} }}`, "too deeply"],
      ] as const
    ) {
      const error = assertThrows(() => render(source), SyntaxError);
      assertMatch(error.message, /^here: /);
      assertStringIncludes(error.message, says);
    }
    for (
      const [source, says] of [
        ["{{ nothing() }}", "not a function"],
        ["{{ messages | nothing }}", "Unknown ArrayValue filter"],
        ["{{ range(1.5) }}", "whole numbers"],
        ["{{ range(0, 1, 0) }}", "whole numbers"],
        [`{{ ${"1+".repeat(50_000)}1 }}`, "too deeply"],
      ] as const
    ) {
      const error = assertThrows(() => render(source), RangeError);
      assertMatch(error.message, /^here: The chat template fails: /);
      assertStringIncludes(error.message, says);
    }
  });
});

/** Makes `ns.s` out of itself a hundred times. */
const again = (start: string, step: string, end = "") =>
  `{% set ns = namespace(s=${start}) %}{% for i in range(100) %}{% set ns.s = ${step} %}{% endfor %}${end}`;

/** Templates that would never end, or take all memory. */
const hostile: Record<string, string> = {
  "loops in loops":
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
  "empty loops":
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
  "unknown names in loops":
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ x }}{% endfor %}{% endfor %}",
  "a macro that calls itself twice":
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
  "a macro that calls itself forever":
    "{% macro m(f) %}{{ f(f) }}{% endmacro %}{{ m(m) }}",
  "a range": "{{ range(1000000000000) }}",
  "a text that doubles": again("'aaaa'", "ns.s + ns.s", "{{ ns.s }}"),
  "a text joined to itself": again("'aaaa'", "ns.s ~ ns.s", "{{ ns.s }}"),
  "a list that doubles": again("[1]", "ns.s + ns.s"),
  "lists in lists, as JSON": again("[1]", "[ns.s, ns.s]", "{{ ns.s|tojson }}"),
  "lists in lists, written": again("[1]", "[ns.s, ns.s]", "{{ ns.s }}"),
  "lists in lists, joined": again("[1]", "[ns.s, ns.s]", "{{ ns.s|join }}"),
  "lists in lists, compared": again("[1]", "[ns.s, ns.s]", "{{ ns.s == 'a' }}"),
  "lists in lists, appended": again("[1]", "[ns.s, ns.s]", "{{ ns.s ~ 'a' }}"),
  "dictionaries": again("{'a': 1}", "{'a': ns.s, 'b': ns.s}", "{{ ns.s }}"),
  "a namespace in itself":
    "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
  "replace": again("'aaaaaaaa'", "ns.s.replace('a', ns.s)", "{{ ns.s }}"),
  "replace of nothing": again("'aaaaaaaa'", "ns.s.replace('', ns.s)"),
  "replace under another name": again("'aaaaaaaa'", "f('a', ns.s)")
    .replace("{% set ns.s", "{% set f = ns.s.replace %}{% set ns.s"),
  "replace by a computed name": again(
    "'aaaaaaaa'",
    "ns.s['re' ~ 'place']('a', ns.s)",
  ),
  "the filter replace": again("'aaaaaaaa'", "ns.s | replace('a', ns.s)"),
  "indent": "{{ 'a\\nb' | indent(1000000000) }}",
  "indent of a block":
    "{% filter indent(width=1000000000) %}a\nb{% endfilter %}",
  "indented JSON": "{{ [[1], [2]] | tojson(indent=1000000000) }}",
  "copies that are kept": again("'aaaaaaaa'", "ns.s + ns.s")
    .replace("range(100)", "range(19)") +
    "{% set kept = namespace(l=[]) %}{% for i in range(99999) %}{% set kept.l = kept.l + [(ns.s ~ i) | upper] %}{% endfor %}",
};

describe("a hostile template", () => {
  it("ends with an error soon, and takes little memory", async () => {
    // A process of its own, without permissions, whose memory can be read.
    const script = `import { ChatTemplate } from "${ROOT}/src/chat/template.ts";
const all = ${JSON.stringify(hostile)};
for (const [name, source] of Object.entries(all)) {
  let said = "";
  try {
    new ChatTemplate(source, name).render([{ role: "user", content: "x" }]);
  } catch (error) {
    said = error.name + ": " + error.message;
  }
  const mib = Deno.memoryUsage().rss / 2 ** 20;
  console.log(JSON.stringify({ name, said, mib }));
}`;
    const { code, stdout, stderr } = await execute(
      Deno.execPath(),
      ["run", "--no-prompt", "--no-check", "-"],
      { stdin: script },
    );
    assertEquals(code, 0, stderr);
    const rows = stdout.trim().split("\n").map((line) => JSON.parse(line));
    assertEquals(rows.length, Object.keys(hostile).length);
    for (const { name, said, mib } of rows) {
      assertMatch(
        said,
        /^RangeError: .*: The chat template fails: (It takes more than 1 s|It makes more than|It nests too deeply|A range has)/,
        name,
      );
      assertLess(mib, 1500, name);
    }
  });

  it("sees nothing but the conversation", () => {
    for (
      const name of ["constructor", "__proto__", "toString", "prototype"]
    ) {
      for (const base of ["messages", "messages[0]", "''", "range", "loop"]) {
        assertEquals(render(`[{{ ${base}.${name} }}]`), "[]");
        assertEquals(render(`[{{ ${base}['${name}'] }}]`), "[]");
      }
    }
    for (const name of ["Deno", "globalThis", "process", "self", "import"]) {
      assertEquals(render(`[{{ ${name} }}]`), "[]");
    }
  });
});

describe("a mask", () => {
  const tokens = ["<|im_start|>", "<|im_end|>", "</s>", "[INST]"];
  const mask = new Mask(tokens);

  /** What comes out of a template that writes the text between these. */
  function through(text: string, before = "", after = "") {
    return mask.reveal(before + mask.hide(text) + after);
  }

  it("leaves plain text alone, and gives every text back", () => {
    for (
      const text of ["", " ", "Hello", " a < b \n", "x|y", "{{ 1 }}", "世界 👋"]
    ) assertEquals(mask.hide(text), text);
    for (
      const text of [
        ...[
          "<|im_end|>",
          " <|im_end|>\n",
          "a<|im_end|>b</s>",
          "<|im_end|",
          "<",
        ],
        ...["|>", "im_end", "<|<|im_end|>im_end|>", "</s></s>", "/s", " <|"],
        ...["s>", "a <", "> a", "<|im_<|im_end|>start|>", "[INST]x[INST", "]["],
      ]
    ) {
      assertEquals(through(text).text, text);
      assertEquals(mask.hide(text), mask.hide(text));
    }
  });

  it("hides special tokens, and what the template could complete", () => {
    for (
      const [before, text, after] of [
        ["", "a <|im_end|> b", ""],
        ["", "a <|im_end|", ">"],
        ["<", "|im_end|> a", ""],
        ["<|", "im_end", "|>"],
        ["<|im", "_", "end|>"],
        ["", "a <", "/s>"],
        ["", "a [INST", "]"],
        ["", "<|im_end|><|im_end|", ">"],
        ["<|im_end", "|></s><|", "im_start|>"],
      ] as const
    ) {
      const { text: whole, literal } = through(text, before, after);
      assertEquals(whole, before + text + after);
      for (const token of tokens) {
        for (
          let at = whole.indexOf(token);
          at >= 0;
          at = whole.indexOf(token, at + 1)
        ) {
          assert(
            literal.some(([from, to]) => from < at + token.length && to > at),
            `${token} in ${JSON.stringify([before, text, after])}`,
          );
        }
      }
    }
  });

  it("lets templates trim, cut and change the rest", () => {
    const messages = [{
      role: "user",
      content: mask.hide("  One <|im_end|>\n</think> Two </s> \n"),
    }];
    const made = (source: string) =>
      mask.reveal(new ChatTemplate(source, "here").render(messages)).text;
    const content = "messages[0].content";
    assertEquals(
      made(`[{{ ${content} | trim }}]`),
      "[One <|im_end|>\n</think> Two </s>]",
    );
    assertEquals(
      made(`[{{ ${content}.split('</think>')[-1].strip() }}]`),
      "[Two </s>]",
    );
    assertEquals(made(`{{ '</think>' in ${content} }}`), "true");
    // The letters of a mark stay.
    assertEquals(made(`{{ (${content} | upper).strip()[:3] }}`), "ONE");
    assertStringIncludes(made(`{{ ${content} | upper }}`), "TWO </s>");
  });

  it("cannot be guessed", () => {
    const hidden = mask.hide("</s>");
    assertNotEquals(new Mask(tokens).hide("</s>"), hidden);
    assertEquals(mask.reveal(new Mask(tokens).hide("</s>")).literal, []);
  });
});

describe("templates of a model", () => {
  it("are in a GGUF file's metadata, some with names", async () => {
    using file = await GgufFile.open(await testModel());
    const own = golden.templates.find(({ name }) => name === "default model")!;
    assertEquals(ggufChatTemplates(file).get("default"), {
      source: own.template,
      origin: `${file.path}: tokenizer.chat_template`,
    });
    const metadata = new Map([
      ["tokenizer.chat_template", "a"],
      ["tokenizer.chat_template.tool_use", "b"],
      ["tokenizer.chat_templates", "tool_use"],
    ]);
    const string = (key: string) => metadata.get(key)!;
    const found = ggufChatTemplates({ path: "x", metadata, string });
    assertEquals([...found].map(([name, { source }]) => [name, source]), [
      ["default", "a"],
      ["tool_use", "b"],
    ]);
  });

  it("are in files of a folder", async () => {
    const folder = await Deno.makeTempDir();
    const config = `${folder}/tokenizer_config.json`;
    const jinja = `${folder}/chat_template.jinja`;
    const found = async () =>
      [...await folderChatTemplates(folder)].map(([name, { source }]) => [
        name,
        source,
      ]);
    try {
      assertEquals(await found(), []);
      await Deno.writeTextFile(config, '{"chat_template": "one"}');
      assertEquals(await found(), [["default", "one"]]);
      const list = [
        { name: "default", template: "two" },
        { name: "rag", template: "three" },
      ];
      await Deno.writeTextFile(config, JSON.stringify({ chat_template: list }));
      assertEquals(await found(), [["default", "two"], ["rag", "three"]]);
      await Deno.writeTextFile(jinja, "four");
      assertEquals(await found(), [["default", "four"], ["rag", "three"]]);
      for (const wrong of ["3", "[3]", '[{"name": "x"}]', "{}"]) {
        await Deno.writeTextFile(config, `{"chat_template": ${wrong}}`);
        const error = await assertRejects(found, FormatError);
        assertStringIncludes(error.message, `${config}: chat_template: Found`);
      }
      await Deno.writeTextFile(config, "{}");
      await Deno.writeFile(jinja, Uint8Array.of(0xff));
      await assertRejects(found, FormatError, "UTF-8");
      await Deno.writeFile(jinja, new Uint8Array(1024 * 1024 + 1));
      await assertRejects(found, FormatError, "expected at most 1048576");
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
  });
});
