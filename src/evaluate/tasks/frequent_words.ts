/** frequent_words: the three most frequent coded words, their counts falling as a zeta distribution does (RULER). */

import type { Task } from "./task.ts";

const ALPHA = 2;
/** Riemann's zeta of 2. */
const ZETA = Math.PI ** 2 / 6;

/** The task. */
export const frequentWords: Task = {
  name: "frequent_words",
  summary: "the three most frequent words of a coded text",
  source:
    "NVIDIA/RULER c3f5e3b (arXiv 2404.06654), freq_words_extraction.py, alpha 2",
  tokens: 50,
  hasDepth: false,
  make(random, units) {
    const draw = random();
    const coded = draw.distinct(
      Math.max(4, Math.floor(units / 10)),
      () => draw.letters(6, "a"),
    );
    // The most frequent of all are dots, which the question says to ignore.
    const ranked = ["....", ...coded];
    const list = draw.shuffled(
      ranked.flatMap((word, i) => {
        const count = Math.round(units * (i + 1) ** -ALPHA / ZETA);
        // The answer is one answer: the first words differ in their counts.
        const least = i < 4 ? 5 - i : 0;
        return Array<string>(Math.max(least, count)).fill(word);
      }),
    );
    const answer = coded.slice(0, 3);
    return {
      prompt:
        `Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. ${
          list.join(" ")
        }\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words in the above coded text? Answer: According to the coded text above, the three most frequently appeared words are:`,
      answer: ` ${answer.join(", ")}`,
      references: answer,
    };
  },
};
