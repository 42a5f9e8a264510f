/** key_value: the value of one of many keys; its answer's log-likelihood tells small models apart that never spell it. */

import { insertAt, type Task } from "./task.ts";

/** The task. */
export const keyValue: Task = {
  name: "key_value",
  summary: "the number that belongs to one of many words",
  source:
    "after Liu et al. 2023 (arXiv 2307.03172), section 3, with short keys",
  tokens: 8,
  hasDepth: true,
  make(random, units, depth) {
    const draw = random();
    const [key, value] = [draw.pair(), draw.digits(4)];
    const lines = draw.distinct(units, () => draw.pair(), new Set([key]))
      .map((other) => `${other}: ${draw.digits(4)}`);
    return {
      prompt: `A list of keys with their values.\n${
        insertAt(lines, `${key}: ${value}`, depth).join("\n")
      }\nThe value of a key again.\n${key}:`,
      answer: ` ${value}`,
      references: [value],
    };
  },
};
