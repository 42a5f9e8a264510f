/** niah_multikey_2: one needle among needles, of words and numbers (RULER). */

import { needle, needleQuestion, type Task } from "./task.ts";

/** The task. */
export const niahMultikey2: Task = {
  name: "niah_multikey_2",
  summary: "a word's number among others of the same form",
  source:
    "NVIDIA/RULER c3f5e3b (arXiv 2404.06654), niah.py with needles as the haystack",
  tokens: 128,
  hasDepth: true,
  make(random, units, depth) {
    const draw = random();
    const [key, value] = [draw.pair(), draw.digits(7)];
    const others = draw.distinct(units, () => draw.pair(), new Set([key]));
    const lines = others.map((other) =>
      needle("number", other, draw.digits(7))
    );
    return needleQuestion("number", key, value, lines, depth);
  },
};
