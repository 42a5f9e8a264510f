/** evaluate(): questions whose answers lie far back, asked through bounded caches; called by users and by `wkv eval`. */

import {
  type CacheOptions,
  type CacheType,
  planCache,
  type Positions,
} from "../cache/layout.ts";
import { choosesByStep, keepsAll, resolveBudget } from "../cache/policy.ts";
import {
  type BudgetSize,
  type LayerBudgets,
  parseBudget,
} from "../cache/budget.ts";
import { findPolicy } from "../cache/registry.ts";
import { checkRoom, openCache } from "../generate.ts";
import type { Model } from "../model.ts";
import { Session } from "../session.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { memoryStore, type ResultStore, type SizedCache } from "./results.ts";
import * as all from "./tasks/mod.ts";
import { Random } from "./tasks/random.ts";
import { matchAll, type Question, type Task } from "./tasks/task.ts";

/** The tasks by name. */
export const tasks: ReadonlyMap<string, Task> = new Map(
  Object.values(all).map((task) => [task.name, task]),
);

/**
 * How a question reaches a bounded cache: token by token through it, or in one
 * pass that sees all of it, after which the cache is compressed to its budget.
 */
export type PromptRegime = "streamed" | "compressed";

/** What is asked, and of which caches. */
export interface EvaluateOptions {
  /** Tasks by name. */
  tasks: readonly string[];
  /** The most tokens of a question with those that may be generated. */
  lengths: readonly number[];
  /** Where the answer lies, 0 the context's beginning, 1 its end. @default `[0, 0.25, 0.5, 0.75, 1]` */
  depths?: readonly number[] | undefined;
  /** Questions for each task, length and depth; tasks without depths get as many as all depths together. @default `4` */
  samples?: number | undefined;
  /** The share of the questions that is asked, the same ones for every cache. @default `1` */
  fraction?: number | undefined;
  /** Policies by name. */
  policies: readonly string[];
  /** Budgets, each used with every policy but `full`. */
  budgets: readonly BudgetSize[];
  /** How questions reach the cache. @default `"streamed"` */
  prompt?: PromptRegime | undefined;
  /** Questions of a task that are asked side by side. @default `1` */
  batch?: number | undefined;
  /** Another seed gives other questions. @default `0` */
  seed?: number | undefined;
  /** First tokens that never leave. @default by policy */
  sinks?: number | undefined;
  /** Newest tokens that never leave. @default by policy */
  recent?: number | undefined;
  /** Tokens that leave at once when a cache overflows. @default by policy */
  interval?: number | undefined;
  /** How the budget is spread over the layers. @default `"constant"` */
  layerBudgets?: LayerBudgets | undefined;
  /** Where keys are rotated. @default `"cache"` */
  positions?: Positions | undefined;
  /** Type of keys and values. @default `"f16"` */
  cacheType?: CacheType | undefined;
  /** Where results of single questions are kept; those it has are not asked again. */
  results?: ResultStore<QuestionResult> | undefined;
  /** Ends the run. */
  signal?: AbortSignal | undefined;
  /** Called after each question, with those that all rows together have. */
  onProgress?: ((done: number, total: number) => void) | undefined;
}

/** One question put to one cache. */
export interface QuestionResult {
  /** The task. */
  task: string;
  /** The length asked for. */
  length: number;
  /** The depth; null where the task has none. */
  depth: number | null;
  /** Its index among those of task and length. */
  index: number;
  /** The policy. */
  policy: string;
  /** Tokens kept a KV head; null for `full`. */
  budget: number | null;
  /** Tokens of the question. */
  promptTokens: number;
  /** The share of the references that the output contains (RULER's string_match_all). */
  score: number;
  /** Mean negative natural log probability of the right answer's tokens. */
  nll: number;
  /** What was generated. */
  output: string;
  /** What it should contain. */
  references: string[];
}

/** A row of the table. */
export interface EvaluateRow {
  /** The task. */
  task: string;
  /** The length asked for. */
  length: number;
  /** The policy. */
  policy: string;
  /** Tokens kept a KV head; null for `full`. */
  budget: number | null;
  /** First tokens that never leave. */
  sinks: number | null;
  /** Newest tokens that never leave. */
  recent: number | null;
  /** How questions reached the cache. */
  prompt: PromptRegime;
  /** Where keys were rotated. */
  positions: Positions;
  /** Type of keys and values. */
  cacheType: CacheType;
  /** The seed of the questions. */
  seed: number;
  /** Questions asked. */
  questions: number;
  /** Mean score in percent; null when there is none. */
  score: number | null;
  /** Standard error of that mean. */
  scoreStderr: number | null;
  /** Mean of the questions' nll. */
  nll: number | null;
  /** Standard error of that mean. */
  nllStderr: number | null;
  /** Mean score in percent by depth; null where the task has none. */
  byDepth: { depth: number; score: number; nll: number }[] | null;
  /** Why there is no figure; absent when there is one. */
  reason?: string;
}

/** A question with its ids. */
export interface Asked {
  task: Task;
  length: number;
  depth: number | null;
  index: number;
  question: Question;
  prompt: number[];
  answer: number[];
}

/**
 * Asks questions of several caches and scores the answers: by the strings that
 * a greedy continuation contains, and by the log-likelihood of the right one.
 *
 * @returns A row for each task, length, policy and budget.
 * @throws {RangeError} An option is out of range, or a length leaves no room for
 * a question.
 */
export async function* evaluate(
  model: Model,
  options: EvaluateOptions,
): AsyncGenerator<EvaluateRow, void> {
  const { prompt = "streamed", seed = 0, signal } = options;
  const { positions = "cache", cacheType = "f16", batch = 1 } = options;
  const plans = check(options);
  const caches = cachesOf(options);
  // What is wrong with the last row is said before the first one is run.
  for (const one of caches) {
    if (typeof one.budget === "number") planCache(model.config, one);
  }
  const store = options.results ?? memoryStore<QuestionResult>();
  const counts = plans.map(({ places }) => places.length);
  let total = counts.reduce((a, b) => a + b, 0) * caches.length;
  let done = 0;
  for (const { task, length, places } of plans) {
    const asked: Asked[] = [];
    for (const { depth, index } of places) {
      signal?.throwIfAborted();
      asked.push(await ask(model.tokenizer, task, length, depth, index, seed));
    }
    for (const typed of caches) {
      const budget = typed.budget === undefined
        ? null
        : model.budgetTokens({ ...typed, capacity: length });
      const cacheOptions = { ...typed, budget: budget ?? undefined };
      const policy = findPolicy(cacheOptions.policy!);
      const reason = missing(model, cacheOptions, prompt, length);
      // What need not be asked again says nothing about the time that is left.
      const results = asked.map((one) => find(store, one, cacheOptions));
      const left = reason === undefined
        ? [...asked.keys()].filter((i) => results[i] === undefined)
        : [];
      total -= asked.length - left.length;
      for (let at = 0; at < left.length; at += batch) {
        const some = left.slice(at, at + batch);
        const made = await answer(
          model,
          some.map((i) => asked[i]!),
          cacheOptions,
          prompt,
          signal,
        );
        await store.add(made);
        made.forEach((result, k) => results[some[k]!] = result);
        options.onProgress?.(done += some.length, total);
      }
      const answered = reason === undefined
        ? results.filter((result) => result !== undefined)
        : [];
      const resolved = budget === null
        ? { sinks: null, recent: null }
        : resolveBudget(policy, budget, options);
      yield {
        task: task.name,
        length,
        policy: policy.name,
        budget,
        sinks: resolved.sinks,
        recent: resolved.recent,
        prompt,
        positions,
        cacheType,
        seed,
        questions: answered.length,
        ...summary(answered, task),
        ...(reason === undefined ? {} : { reason }),
      };
    }
  }
}

/** What is asked of every cache: depths and indices by task and length. */
interface Plan {
  task: Task;
  length: number;
  places: { depth: number | null; index: number }[];
}

/**
 * Checks options before a model is loaded.
 *
 * @throws {RangeError} One is out of range or unknown.
 */
export function checkOptions(options: EvaluateOptions): void {
  check(options);
  cachesOf(options);
}

function check(options: EvaluateOptions): Plan[] {
  const { depths = [0, 0.25, 0.5, 0.75, 1], samples = 4 } = options;
  const { fraction = 1, seed = 0, prompt = "streamed", batch = 1 } = options;
  const range = (name: string, value: number, least: number, most: number) => {
    if (value >= least && value <= most) return;
    throw new RangeError(
      `The ${name} must be between ${least} and ${most}: current value is ${value}`,
    );
  };
  const whole = (name: string, value: number, least: number, most: number) => {
    range(name, value, least, most);
    if (Number.isInteger(value)) return;
    throw new RangeError(
      `The ${name} must be a whole number: current value is ${value}`,
    );
  };
  whole("samples", samples, 1, 1e6);
  whole("batch", batch, 1, 2048);
  whole("seed", seed, 0, Number.MAX_SAFE_INTEGER);
  range("fraction", fraction, Number.MIN_VALUE, 1);
  for (const depth of depths) range("depth", depth, 0, 1);
  for (const length of options.lengths) whole("length", length, 64, 2 ** 20);
  if (prompt !== "streamed" && prompt !== "compressed") {
    throw new RangeError(
      `The prompt must be streamed or compressed: current value is "${prompt}"`,
    );
  }
  for (
    const [name, list] of Object.entries({
      task: options.tasks,
      length: options.lengths,
      depth: depths,
      policy: options.policies,
    })
  ) {
    if (list.length === 0) throw new RangeError(`Name at least one ${name}`);
  }
  return options.tasks.flatMap((name) => {
    const task = tasks.get(name);
    if (task === undefined) {
      throw new RangeError(
        `Unknown task "${name}": known are ${[...tasks.keys()].join(", ")}`,
      );
    }
    return options.lengths.map((length) => {
      const every = Array.from({ length: samples * depths.length }, (_, i) => ({
        depth: task.hasDepth ? depths[i % depths.length]! : null,
        index: i,
      }));
      const count = Math.max(1, Math.round(every.length * fraction));
      return { task, length, places: every.slice(0, count) };
    });
  });
}

/** A cache for each policy and budget, `full` once. */
function cachesOf(options: EvaluateOptions): CacheOptions[] {
  const { sinks, recent, interval, layerBudgets } = options;
  const { positions, cacheType } = options;
  const common = {
    ...{ sinks, recent, interval, layerBudgets },
    positions,
    cacheType,
  };
  return options.policies.flatMap((name) => {
    const policy = findPolicy(name);
    const full = keepsAll(policy);
    if (!full && options.budgets.length === 0) {
      throw new RangeError(`Name at least one budget for the policy ${name}`);
    }
    return (full ? [undefined] : options.budgets).map((budget) => {
      if (typeof budget === "number") resolveBudget(policy, budget, common);
      else if (budget !== undefined) parseBudget(budget);
      return { ...common, policy: policy.name, budget };
    });
  });
}

/** Why a row cannot be had. */
function missing(
  model: Model,
  { policy: name, budget, positions }: CacheOptions,
  prompt: PromptRegime,
  length: number,
): string | undefined {
  const policy = findPolicy(name!);
  const { context } = model.config;
  if (length > context && (budget === undefined || positions === "text")) {
    return `The length of ${length} tokens exceeds the model's context of ${context}`;
  }
  if (prompt === "compressed" && choosesByStep(policy)) {
    return `${policy.name} chooses by each step's own weights, which a prompt that is compressed afterwards does not have`;
  }
  return undefined;
}

/** Makes a question as long as fits its length. */
export async function ask(
  tokenizer: Tokenizer,
  task: Task,
  length: number,
  depth: number | null,
  index: number,
  seed: number,
): Promise<Asked> {
  const random = () => new Random(seed, `${task.name} ${length} ${index}`);
  const make = async (units: number) => {
    const question = task.make(random, units, depth ?? 0);
    return { question, prompt: await tokenizer.encode(question.prompt) };
  };
  const room = length - task.tokens;
  let best = await make(0);
  if (best.prompt.length > room) {
    throw new RangeError(
      `The length of ${task.name} must be at least ${
        best.prompt.length + task.tokens
      } tokens: current value is ${length}`,
    );
  }
  // A unit has a token at least.
  for (let low = 0, high = room; high - low > 1;) {
    // At first the units that so many tokens should hold.
    const guess = low === 0 ? Math.ceil(high / 16) : (low + high) >> 1;
    const units = Math.min(high - 1, Math.max(low + 1, guess));
    const made = await make(units);
    if (made.prompt.length <= room) [low, best] = [units, made];
    else high = units;
  }
  const answer = await tokenizer.encode(best.question.answer, {
    continues: true,
  });
  return { task, length, depth, index, ...best, answer };
}

/**
 * Puts questions, side by side, to two sequences of a cache each: one goes on
 * greedily, the other, behind all of the first, is given the right answer.
 */
async function answer(
  model: Model,
  asked: readonly Asked[],
  cacheOptions: SizedCache,
  prompt: PromptRegime,
  signal: AbortSignal | undefined,
): Promise<QuestionResult[]> {
  const { vocabulary } = model.config;
  const steps = Math.max(
    ...asked.map(({ task, answer }) => Math.max(task.tokens, answer.length)),
  );
  const longest = Math.max(...asked.map(({ prompt }) => prompt.length));
  const sequences = 2 * asked.length;
  using cache = openCache(
    model,
    { ...cacheOptions, sequences },
    longest + steps,
  );
  checkRoom(cache, longest);
  using session = new Session(model, cache);
  const before = asked.map(({ prompt }) =>
    Int32Array.from(prompt.slice(0, -1))
  );
  if (prompt === "compressed") {
    for (let sequence = 0; sequence < sequences; sequence++) {
      await session.feedPass(sequence, before[sequence % asked.length]!);
    }
  } else {
    await stream(session, before, signal);
  }
  const output = asked.map((): number[] => []);
  const nll = asked.map(() => 0);
  const ended = asked.map(() => false);
  const next = Int32Array.from(
    { length: sequences },
    (_, b) => asked[b % asked.length]!.prompt.at(-1)!,
  );
  for (let i = 0; i < steps; i++) {
    signal?.throwIfAborted();
    const logits = await session.logits(next);
    const row = (b: number) =>
      logits.subarray(b * vocabulary, (b + 1) * vocabulary);
    for (const [b, { task, answer }] of asked.entries()) {
      const right = answer[i];
      const forced = asked.length + b;
      if (right !== undefined) nll[b]! -= logProbOf(row(forced), right);
      if (!ended[b]) {
        const drawn = likeliest(row(b));
        ended[b] = i >= task.tokens || model.tokenizer.endTokens.has(drawn);
        if (!ended[b] && drawn < model.tokenizer.size) output[b]!.push(drawn);
        next[b] = drawn;
      }
      next[forced] = right ?? next[b]!;
    }
    if (asked.every(({ answer }, b) => ended[b] && i + 1 >= answer.length)) {
      break;
    }
  }
  return asked.map(({ task, length, depth, index, question, ...one }, b) => {
    const text = model.tokenizer.decode(output[b]!);
    return {
      task: task.name,
      length,
      depth,
      index,
      policy: cacheOptions.policy!,
      budget: cacheOptions.budget ?? null,
      promptTokens: one.prompt.length,
      score: matchAll(text, question.references),
      nll: nll[b]! / one.answer.length,
      output: text,
      references: question.references,
    };
  });
}

/**
 * Feeds each text to its two sequences: what fits at once, the rest one by one.
 * Texts end in the same step; a sequence whose text is shorter than others' is
 * fed anything until its turn, and then begins anew.
 */
async function stream(
  session: Session,
  texts: readonly Int32Array<ArrayBuffer>[],
  signal: AbortSignal | undefined,
): Promise<void> {
  const rows = session.passRows(null);
  const room = rows > 1 ? session.cache.room() : 0;
  const atOnce = texts.map(({ length }) => Math.min(length, room));
  const steps = texts.map(({ length }, b) => length - atOnce[b]!);
  const most = Math.max(...steps);
  for (let step = 0; step <= most; step++) {
    signal?.throwIfAborted();
    for (const [b, text] of texts.entries()) {
      if (step !== most - steps[b]!) continue;
      for (const sequence of [b, texts.length + b]) {
        if (step > 0) session.cache.reset(sequence);
        for (let at = 0; at < atOnce[b]!; at += rows) {
          const to = Math.min(at + rows, atOnce[b]!);
          await session.feedPass(sequence, text.slice(at, to));
        }
      }
    }
    if (step === most) break;
    const tokens = texts.map((text) =>
      text[text.length - (most - step)] ?? text[0]!
    );
    await session.feed(Int32Array.of(...tokens, ...tokens));
  }
}

function likeliest(logits: Float32Array): number {
  let best = 0;
  for (let i = 1; i < logits.length; i++) {
    if (logits[i]! > logits[best]!) best = i;
  }
  return best;
}

function logProbOf(logits: Float32Array, id: number): number {
  const most = logits[likeliest(logits)]!;
  let sum = 0;
  for (const x of logits) sum += Math.exp(x - most);
  return logits[id]! - most - Math.log(sum);
}

function find(
  { items }: ResultStore<QuestionResult>,
  { task, length, index }: Asked,
  cacheOptions: SizedCache,
): QuestionResult | undefined {
  const { policy } = cacheOptions;
  const budget = cacheOptions.budget ?? null;
  return items.find((item) =>
    item.task === task.name && item.length === length &&
    item.index === index && item.policy === policy && item.budget === budget
  );
}

function summary(
  results: readonly QuestionResult[],
  task: Task,
): Pick<
  EvaluateRow,
  "score" | "scoreStderr" | "nll" | "nllStderr" | "byDepth"
> {
  if (results.length === 0) {
    return {
      score: null,
      scoreStderr: null,
      nll: null,
      nllStderr: null,
      byDepth: null,
    };
  }
  const [score, scoreStderr] = meanOf(results.map(({ score }) => 100 * score));
  const [nll, nllStderr] = meanOf(results.map(({ nll }) => nll));
  const depths = [...new Set(results.map(({ depth }) => depth))];
  return {
    score,
    scoreStderr,
    nll,
    nllStderr,
    byDepth: !task.hasDepth ? null : depths.map((depth) => {
      const own = results.filter((result) => result.depth === depth);
      return {
        depth: depth!,
        score: meanOf(own.map(({ score }) => 100 * score))[0],
        nll: meanOf(own.map(({ nll }) => nll))[0],
      };
    }),
  };
}

/** A mean with its standard error, null below two values. */
function meanOf(values: readonly number[]): [number, number | null] {
  const n = values.length;
  const mean = values.reduce((a, b) => a + b, 0) / n;
  if (n < 2) return [mean, null];
  const squares = values.reduce((sum, x) => sum + (x - mean) ** 2, 0);
  return [mean, Math.sqrt(squares / (n - 1) / n)];
}
