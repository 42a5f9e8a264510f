/** variable_tracking: a chain of assignments within noise (RULER); without RULER's worked example in front. */

import { NOISE, type Task } from "./task.ts";

const HOPS = 4;

/** The task. */
export const variableTracking: Task = {
  name: "variable_tracking",
  summary: "all variables of a chain of assignments within noise",
  source:
    "NVIDIA/RULER c3f5e3b (arXiv 2404.06654), variable_tracking.py, 1 chain of 4 hops",
  tokens: 30,
  hasDepth: false,
  make(random, units) {
    const draw = random();
    const value = draw.digits(5);
    const names = draw.distinct(HOPS + 1, () => draw.letters(5, "A"));
    const chain = names.map((name, i) =>
      `VAR ${name} = ${i === 0 ? value : `VAR ${names[i - 1]!}`}`
    );
    // The chain's places, in order, anywhere among the noise.
    const places = chain.map(() => draw.below(units + 1)).sort((a, b) => a - b);
    const lines: string[] = [];
    for (let i = 0, next = 0; i <= units; i++) {
      while (places[next] === i) lines.push(chain[next++]!);
      if (i < units) lines.push(NOISE);
    }
    return {
      prompt:
        `Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n${
          lines.join("\n")
        }\nQuestion: Find all variables that are assigned the value ${value} in the text above. Answer: According to the chain(s) of variable assignment in the text above, ${names.length} variables are assigned the value ${value}, they are:`,
      answer: ` ${names.join(", ")}`,
      references: names,
    };
  },
};
