/** niah_multikey_3: one needle among needles, of UUIDs and UUIDs (RULER). */

import { needle, needleQuestion, type Task } from "./task.ts";

/** The task. */
export const niahMultikey3: Task = {
  name: "niah_multikey_3",
  summary: "a UUID's UUID among others of the same form",
  source:
    "NVIDIA/RULER c3f5e3b (arXiv 2404.06654), niah.py with needles as the haystack",
  tokens: 128,
  hasDepth: true,
  make(random, units, depth) {
    const draw = random();
    const [key, value] = [draw.uuid(), draw.uuid()];
    const others = draw.distinct(units, () => draw.uuid(), new Set([key]));
    const lines = others.map((other) => needle("uuid", other, draw.uuid()));
    return needleQuestion("uuid", key, value, lines, depth);
  },
};
