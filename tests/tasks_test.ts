/** Tests of evaluate(), compare() and the tasks: questions by their rules, scores against formulas in f64 on tiny models. */

import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertGreater,
  assertLess,
  assertLessOrEqual,
  assertNotEquals,
  assertRejects,
} from "@std/assert";
import {
  compare,
  evaluate,
  type EvaluateOptions,
  type EvaluateRow,
  type Model,
  type QuestionResult,
  Random,
  tasks,
} from "../mod.ts";
import { sideBySide, textWidth, wrapText } from "../cli/columns.ts";
import { memoryStore } from "../src/evaluate/results.ts";
import { matchAll } from "../src/evaluate/tasks/task.ts";
import { loadBytes, type TinyModel, tinyModel } from "./tiny_model.ts";
import { afterAll, beforeAll, describe, it } from "./device.ts";

const seeded = (seed: number) => () => new Random(seed, "a task");

describe("tasks", () => {
  for (const task of tasks.values()) {
    it(`${task.name} asks what its context answers, the same for a seed`, () => {
      const one = task.make(seeded(1), 100, 0.5);
      assertEquals(one, task.make(seeded(1), 100, 0.5));
      assertNotEquals(
        one.references,
        task.make(seeded(2), 100, 0.5).references,
      );
      assertEquals(new Set(one.references).size, one.references.length);
      for (const reference of one.references) {
        assert(one.prompt.includes(reference), reference);
      }
      assertEquals(matchAll(one.answer, one.references), 1);
      assert(!/\s$/.test(one.prompt), "the answer's space is its own");
      assertGreater(
        one.prompt.length,
        task.make(seeded(1), 50, 0.5).prompt.length,
      );
      task.make(seeded(1), 0, 1);
    });

    it(`${task.name} puts its answer at the depth`, () => {
      for (const depth of task.hasDepth ? [0, 0.3, 1] : []) {
        const { prompt, references } = task.make(seeded(3), 100, depth);
        const lines = prompt.split("\n").slice(1, 102);
        assertEquals(lines.length, 101);
        const at = lines.findIndex((line) => line.includes(references[0]!));
        assertEquals(at, Math.round(depth * 100));
      }
    });
  }

  it("common and frequent words are the most frequent ones", () => {
    const counts = (words: string[]) => {
      const all = new Map<string, number>();
      for (const word of words) all.set(word, (all.get(word) ?? 0) + 1);
      return [...all].sort(([, a], [, b]) => b - a);
    };
    for (const units of [150, 900]) {
      const list = tasks.get("common_words")!.make(seeded(4), units, 0);
      const words = list.prompt.split("\n")[1]!.split(/ ?\d+\. /).slice(1);
      assertEquals(words.length, units);
      const most = counts(words);
      assertEquals(
        new Set(most.slice(0, 10).map(([word]) => word)),
        new Set(list.references),
      );
      assertGreater(most[9]![1], most[10]![1]);
    }
    const coded = tasks.get("frequent_words")!.make(seeded(4), 300, 0);
    const text = /coded words\. (.*)\nQuestion/.exec(coded.prompt)![1]!;
    const most = counts(text.split(" ")).filter(([word]) => word !== "....");
    assertEquals(most.slice(0, 3).map(([word]) => word), coded.references);
    assertGreater(most[2]![1], most[3]![1]);
  });

  it("chains of variables are in order", () => {
    const { prompt, references } = tasks.get("variable_tracking")!
      .make(seeded(5), 40, 0);
    const found = [...prompt.matchAll(/^VAR (\w+) = (VAR )?(\w+)$/gm)];
    assertEquals(found.map(([, name]) => name), references);
    found.slice(1).forEach(([, , , from], i) => {
      assertEquals(from, references[i]);
    });
  });

  it("are scored as RULER scores strings", () => {
    assertEquals(matchAll(" It is 42, or ABC.", ["42", "abc"]), 1);
    assertEquals(matchAll("only 4 2", ["42", "7"]), 0);
    assertEquals(matchAll("142", ["42", "7"]), 0.5);
  });
});

describe("evaluate() and compare()", () => {
  let tiny: TinyModel;
  let model: Model;
  beforeAll(async () => {
    tiny = tinyModel({ context: 2048 });
    model = await loadBytes(tiny.bytes, { activations: "f32" });
  });
  afterAll(() => model?.close());

  const options: EvaluateOptions = {
    tasks: ["passkey", "key_value"],
    lengths: [600],
    depths: [0.2, 0.9],
    samples: 1,
    policies: ["full"],
    budgets: [],
    cacheType: "f32",
  };
  const rowsOf = (more: Partial<EvaluateOptions>): Promise<EvaluateRow[]> =>
    Array.fromAsync(evaluate(model, { ...options, ...more }));
  const bytes = (text: string) => [...new TextEncoder().encode(text)];

  it("fills the length and takes the answer's likelihood", async () => {
    const results = memoryStore<QuestionResult>();
    const rows = await rowsOf({ results });
    assertEquals(rows.map(({ task }) => task), ["passkey", "key_value"]);
    for (const result of results.items) {
      const task = tasks.get(result.task)!;
      assertLessOrEqual(result.promptTokens + task.tokens, 600);
      assertGreater(result.promptTokens + task.tokens, 500);
      const random = () =>
        new Random(0, `${task.name} ${result.length} ${result.index}`);
      const questions = Array.from(
        { length: 100 },
        (_, units) => task.make(random, units, result.depth!),
      );
      const question = questions.find(({ prompt }) =>
        bytes(prompt).length === result.promptTokens
      )!;
      assertEquals(question.references, result.references);
      const [prompt, answer] = [bytes(question.prompt), bytes(question.answer)];
      const logits = tiny.logits([...prompt, ...answer.slice(0, -1)]);
      const nll = answer.reduce((sum, id, i) => {
        const all = logits[prompt.length - 1 + i]!;
        const top = all.reduce((a, b) => Math.max(a, b));
        const total = all.reduce((sum, x) => sum + Math.exp(x - top), 0);
        return sum + top + Math.log(total) - all[id]!;
      }, 0) / answer.length;
      assertAlmostEquals(result.nll, nll, 1e-3 * nll);
    }
    const own = results.items.filter(({ task }) => task === "passkey");
    assertAlmostEquals(rows[0]!.nll!, (own[0]!.nll + own[1]!.nll) / 2, 1e-9);
    assertAlmostEquals(
      rows[0]!.nllStderr!,
      Math.abs(own[0]!.nll - own[1]!.nll) / 2,
      1e-9,
    );
    assertEquals(rows[0]!.byDepth!.map(({ depth }) => depth), [0.2, 0.9]);
  });

  it("gives the same through every cache that nothing leaves", async () => {
    const more = { tasks: ["passkey"], policies: ["full", "weighted-kv"] };
    const [full, bounded] = await rowsOf({ ...more, budgets: [700] });
    const [, , whole] = await rowsOf({
      ...more,
      policies: ["full", "eviction", "weighted-kv"],
      budgets: [700],
      prompt: "compressed",
    });
    assertAlmostEquals(bounded!.nll!, full!.nll!, 1e-4);
    assertAlmostEquals(whole!.nll!, full!.nll!, 1e-4);
    assertEquals(whole!.prompt, "compressed");
  });

  it("feeds prompts through the cache, or compresses them afterwards", async () => {
    const more: Partial<EvaluateOptions> = {
      tasks: ["passkey"],
      policies: ["weighted-kv", "tova"],
      budgets: [64],
    };
    const [streamed, tova] = await rowsOf(more);
    const [compressed, none] = await rowsOf({ ...more, prompt: "compressed" });
    assertGreater(Math.abs(streamed!.nll! - compressed!.nll!), 1e-4);
    assertGreater(tova!.nll!, 0);
    assertEquals([none!.nll, none!.score, none!.questions], [null, null, 0]);
    assert(none!.reason!.includes("tova chooses by each step's own weights"));
  });

  it("asks questions side by side as it does one by one", async () => {
    for (const prompt of ["streamed", "compressed"] as const) {
      const answers = async (batch: number) => {
        const results = memoryStore<QuestionResult>();
        const policies = prompt === "streamed"
          ? ["full", "weighted-kv", "snapkv"]
          : ["full", "weighted-kv"];
        const more = { samples: 2, policies, budgets: [64], prompt, results };
        await rowsOf({ ...more, batch });
        return results.items;
      };
      const [alone, beside] = [await answers(1), await answers(3)];
      const lengths = new Set(alone.map(({ promptTokens }) => promptTokens));
      assertGreater(lengths.size, 1);
      assertEquals(beside.length, alone.length);
      beside.forEach(({ nll, ...rest }, i) => {
        const { nll: expected, ...others } = alone[i]!;
        assertEquals(rest, others);
        assertAlmostEquals(nll, expected, 1e-4);
      });
    }
  });

  it("asks a share of the questions, and none twice", async () => {
    const results = memoryStore<QuestionResult>();
    const more = { tasks: ["passkey"], samples: 4, fraction: 0.5, results };
    const [row] = await rowsOf(more);
    assertEquals([row!.questions, results.items.length], [4, 4]);
    assertEquals(
      results.items.map(({ index, depth }) => [index, depth]),
      [[0, 0.2], [1, 0.9], [2, 0.2], [3, 0.9]],
    );
    const again = await rowsOf({ ...more, fraction: 1 });
    assertEquals([again[0]!.questions, results.items.length], [8, 8]);
  });

  it("refuses options out of range", async () => {
    const wrong: [Partial<EvaluateOptions>, string][] = [
      [{ tasks: ["nope"] }, 'Unknown task "nope": known are'],
      [{ tasks: [] }, "at least one task"],
      [{ lengths: [63] }, "length must be between 64"],
      [{ lengths: [128] }, "length of passkey must be at least"],
      [{ depths: [1.5] }, "depth must be between 0 and 1"],
      [{ samples: 0 }, "samples"],
      [{ fraction: 0 }, "fraction"],
      [{ policies: ["weighted-kv"] }, "at least one budget"],
      [{ prompt: "x" as "streamed" }, "streamed or compressed"],
    ];
    for (const [more, message] of wrong) {
      await assertRejects(() => rowsOf(more), RangeError, message);
    }
    const long = await rowsOf({ tasks: ["passkey"], lengths: [4096] });
    assert(long[0]!.reason!.includes("exceeds the model's context of 2048"));
  });

  it("compares columns in lock-step", async () => {
    const prompt = bytes("a prompt of some length, so that something leaves");
    const caches = [
      { policy: "full", cacheType: "f32" },
      { policy: "weighted-kv", budget: 200, cacheType: "f32" },
      { policy: "streaming-llm", budget: 6, cacheType: "f32" },
    ] as const;
    const { columns, promptTokens } = await compare(model, prompt, {
      caches,
      maxTokens: 24,
      ignoreEos: true,
    });
    assertEquals(promptTokens, prompt.length);
    const [full, same] = columns as [typeof columns[0], typeof columns[0]];
    assertEquals(full.tokens, same.tokens);
    assertEquals([same.differsAt, same.shared, same.sameTop], [null, 24, 1]);
    assertLess(same.kl, 1e-6);
    // The full column is the model's own greedy text.
    const ids = [...prompt];
    for (const token of full.tokens) {
      const logits = tiny.logits(ids).at(-1)!;
      const top = logits.reduce((a, b) => Math.max(a, b));
      assertEquals(token, logits.indexOf(top));
      ids.push(token);
    }
    // Drawn by one seed, texts part where distributions do.
    const drawn = await compare(model, prompt, {
      caches,
      maxTokens: 24,
      ignoreEos: true,
      temperature: 8,
      seed: 5,
    });
    const [first, , other] = drawn.columns as [
      typeof columns[0],
      typeof columns[0],
      typeof columns[0],
    ];
    assertEquals(drawn.columns[1]!.differsAt, null);
    const at = first.tokens.findIndex((id, i) => id !== other.tokens[i]);
    assertEquals(other.differsAt, at);
    assertEquals(other.shared, at + 1);
    assertGreater(other.kl, 0.01);
    assertEquals(other.text, other.pieces.join(""));
    await assertRejects(
      () => compare(model, prompt, { caches: [] }),
      RangeError,
      "at least one cache",
    );
  });
});

describe("texts side by side", () => {
  it("break behind spaces, and count wide characters twice", () => {
    assertEquals(wrapText("one two three", 7), ["one two", "three"]);
    assertEquals(wrapText("abcdefgh", 3), ["abc", "def", "gh"]);
    assertEquals(wrapText("a\n\nb", 5), ["a", "", "b"]);
    assertEquals(textWidth("日本e\u0301"), 5);
    assertEquals(wrapText("日本語", 4), ["日本", "語"]);
    // Nothing moves the cursor.
    assertEquals(wrapText("\x1b[2J\r", 10), ["\u241b[2J\u240d"]);
    for (const line of wrapText("x 日本語 yy\tzzz ".repeat(9), 11)) {
      assertLessOrEqual(textWidth(line), 11);
    }
  });

  it("stand in columns where there is room, else one below the other", () => {
    const texts = [{ title: "A", text: "x y" }, { title: "B", text: "z" }];
    assertEquals(
      sideBySide(texts, 11, 3),
      "A    | B\n---- | ----\nx y  | z\n",
    );
    assertEquals(sideBySide(texts, 11, 9), "A\nx y\n\nB\nz\n");
  });
});
