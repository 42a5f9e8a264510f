/** What a retrieval task is, and what several share; tasks/ holds one a file. */

import type { Random } from "./random.ts";

/** One question. */
export interface Question {
  /** What the model continues; nothing stands behind it. */
  prompt: string;
  /** The right continuation, whose log-likelihood is taken. */
  answer: string;
  /** What a generated continuation must contain. */
  references: string[];
}

/** A task: data, and one function that makes its questions. */
export interface Task {
  /** Its name on the command line. */
  readonly name: string;
  /** One sentence: what is asked. */
  readonly summary: string;
  /** Where it comes from. */
  readonly source: string;
  /** Tokens that may be generated. */
  readonly tokens: number;
  /** Whether what is asked for lies at a depth of the context. */
  readonly hasDepth: boolean;
  /**
   * Makes a question of `units` pieces of context: the same random numbers give
   * the same question, and more units a longer one.
   *
   * @param depth Where the answer lies, 0 the context's beginning, 1 its end.
   */
  readonly make: (
    random: () => Random,
    units: number,
    depth: number,
  ) => Question;
}

/** What fills a context that says nothing (RULER, Mohtashami and Jaggi 2023). */
export const NOISE =
  "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

/** The share of the references that an output contains, letter case aside (RULER's string_match_all). */
export function matchAll(
  output: string,
  references: readonly string[],
): number {
  const text = output.toLowerCase();
  const found = references.filter((one) => text.includes(one.toLowerCase()));
  return found.length / references.length;
}

/** Puts an item among others at a depth. */
export function insertAt(
  lines: readonly string[],
  item: string,
  depth: number,
): string[] {
  const place = Math.round(depth * lines.length);
  return lines.toSpliced(place, 0, item);
}

/** RULER's needles: the questions of the niah tasks. */
export function needleQuestion(
  kind: "number" | "uuid",
  key: string,
  value: string,
  lines: readonly string[],
  depth: number,
): Question {
  const context = insertAt(lines, needle(kind, key, value), depth).join("\n");
  return {
    prompt:
      `A special magic ${kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the ${kind} afterwards.\n${context}\nWhat is the special magic ${kind} for ${key} mentioned in the provided text? The special magic ${kind} for ${key} mentioned in the provided text is`,
    answer: ` ${value}`,
    references: [value],
  };
}

/** One needle. */
export function needle(
  kind: "number" | "uuid",
  key: string,
  value: string,
): string {
  return `One of the special magic ${kind}s for ${key} is: ${value}.`;
}
