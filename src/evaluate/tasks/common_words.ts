/** common_words: the ten most common words of a list (RULER); without RULER's worked example, and with words of our own. */

import type { Task } from "./task.ts";

const COMMON = 10;

/** The task. */
export const commonWords: Task = {
  name: "common_words",
  summary: "the ten most common words of a numbered list",
  source: "NVIDIA/RULER c3f5e3b (arXiv 2404.06654), common_words_extraction.py",
  tokens: 120,
  hasDepth: false,
  make(random, units) {
    const draw = random();
    const words = draw.words();
    const common = words.slice(0, COMMON);
    // Of a short list RULER's 30 and 3 times would leave no room for others.
    const [often, seldom] = units < 500 ? [6, 1] : [30, 3];
    const rest = words.slice(COMMON);
    const others = Math.max(0, units - COMMON * often);
    const list = draw.shuffled([
      ...common.flatMap((word) => Array<string>(often).fill(word)),
      ...Array.from(
        { length: others },
        (_, i) => rest[Math.floor(i / seldom) % rest.length]!,
      ),
    ]);
    return {
      prompt:
        `Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n${
          list.map((word, i) => `${i + 1}. ${word}`).join(" ")
        }\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often in the list are:`,
      answer: ` ${common.join(", ")}`,
      references: common,
    };
  },
};
