/** passkey: a number within noise (Mohtashami and Jaggi 2023, arXiv 2305.16300). */

import { insertAt, NOISE, type Task } from "./task.ts";

/** The task. */
export const passkey: Task = {
  name: "passkey",
  summary: "a number of 5 digits within noise",
  source: "Mohtashami and Jaggi 2023 (arXiv 2305.16300), section 4.2",
  tokens: 8,
  hasDepth: true,
  make(random, units, depth) {
    const value = random().digits(5);
    const key =
      `The pass key is ${value}. Remember it. ${value} is the pass key.`;
    const lines = Array.from({ length: units }, () => NOISE);
    return {
      prompt:
        `There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about the important information there.\n${
          insertAt(lines, key, depth).join("\n")
        }\nWhat is the pass key? The pass key is`,
      answer: ` ${value}`,
      references: [value],
    };
  },
};
