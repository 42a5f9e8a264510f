/** niah_single_1: one needle, a word's number, within noise (RULER). */

import { needleQuestion, NOISE, type Task } from "./task.ts";

/** The task. */
export const niahSingle1: Task = {
  name: "niah_single_1",
  summary: "a word's number within noise",
  source:
    "NVIDIA/RULER c3f5e3b (arXiv 2404.06654), niah.py with noise, words, numbers",
  tokens: 128,
  hasDepth: true,
  make(random, units, depth) {
    const draw = random();
    const lines = Array.from({ length: units }, () => NOISE);
    return needleQuestion("number", draw.pair(), draw.digits(7), lines, depth);
  },
};
