/** compare(): continues one prompt under several policies in lock-step; called by users and by `wkv compare`. */

import type { CacheOptions } from "../cache/layout.ts";
import {
  type CacheReport,
  checkRoom,
  type FinishReason,
  isOutOfRoom,
  openCache,
  promptTokens,
  report,
} from "../generate.ts";
import type { Model } from "../model.ts";
import { type Prefill, type SamplerOptions, Session } from "../session.ts";
import { TextStream } from "../tokenizer/tokenizer.ts";

/** What is compared. */
export interface CompareOptions extends SamplerOptions {
  /** What each column's cache is made of; the first is what the others are compared with. */
  caches: readonly CacheOptions[];
  /** The most tokens to generate in each. @default `64` */
  maxTokens?: number | undefined;
  /** Goes on past the model's end token. @default `false` */
  ignoreEos?: boolean | undefined;
  /** Reads special tokens spelled in the prompt as such. @default `false` */
  special?: boolean | undefined;
  /** How a prompt beyond the budget is fed. @default `"exact"` */
  prefill?: Prefill | undefined;
  /** Ends the comparison: it throws the signal's reason. */
  signal?: AbortSignal | undefined;
  /** Called after each token with those that all columns together have. */
  onProgress?: ((done: number, total: number) => void) | undefined;
}

/** One policy's continuation. */
export interface ComparedText {
  /** All of the text. */
  text: string;
  /** The generated ids, without the end token. */
  tokens: number[];
  /** The text of each token, "" while a character is incomplete; then what was left. */
  pieces: string[];
  /** Why it ended. */
  finishReason: FinishReason;
  /** Index of the first token that differs from the first column's; null when none does. */
  differsAt: number | null;
  /**
   * Kullback-Leibler divergence in nats from the first column's distribution,
   * the mean over the tokens that were drawn behind the same text.
   */
  kl: number;
  /** The share of those before which both have the same likeliest token. */
  sameTop: number;
  /** How many those are. */
  shared: number;
  /** Milliseconds that the prompt took. */
  prefillMs: number;
  /** Tokens after the first by the time of this column's own steps; null below two. */
  decodeTokensPerSecond: number | null;
  /** The cache at the end. */
  cache: CacheReport;
}

/** What a comparison ends with. */
export interface Comparison {
  /** Tokens of the prompt. */
  promptTokens: number;
  /** A column for each cache. */
  columns: ComparedText[];
}

/** A column while it grows. */
interface Lane {
  session: Session;
  stream: TextStream;
  tokens: number[];
  pieces: string[];
  /** The token drawn last. */
  drawn: number;
  finishReason: FinishReason | null;
  differsAt: number | null;
  kl: number;
  same: number;
  shared: number;
  prefillMs: number;
  decodeMs: number;
}

/**
 * Continues a prompt under several caches, a step of each in turn. As long as a
 * column's text is the first one's, their distributions of the next token are
 * compared too.
 *
 * @param prompt Text, or token ids.
 * @throws {RangeError} There is no cache, the prompt is empty or does not fit a
 * full cache, or an option is out of range.
 */
export async function compare(
  model: Model,
  prompt: string | readonly number[],
  options: CompareOptions,
): Promise<Comparison> {
  const { caches, maxTokens = 64, prefill = "exact", signal } = options;
  if (caches.length === 0) throw new RangeError("Name at least one cache");
  if (!Number.isInteger(maxTokens) || maxTokens < 1 || maxTokens > 2 ** 20) {
    throw new RangeError(
      `The maxTokens must be a whole number between 1 and ${
        2 ** 20
      }: current value is ${maxTokens}`,
    );
  }
  // Without a seed all columns draw by one of their own.
  const seed = options.seed ?? Math.floor(Math.random() * 2 ** 53);
  const ids = await promptTokens(model, prompt, options);
  using opened = new DisposableStack();
  const lanes = caches.map((cacheOptions): Lane => {
    const cache = opened.use(
      openCache(model, cacheOptions, ids.length + maxTokens),
    );
    checkRoom(cache, ids.length);
    const session = opened.use(new Session(model, cache));
    session.setSampler({ ...options, seed });
    return {
      session,
      stream: new TextStream(model.tokenizer, { continues: true }),
      tokens: [],
      pieces: [],
      drawn: -1,
      finishReason: null,
      differsAt: null,
      kl: 0,
      same: 0,
      shared: 0,
      prefillMs: 0,
      decodeMs: 0,
    };
  });
  const [first] = lanes as [Lane];
  for (let i = 0; i < maxTokens; i++) {
    for (const lane of lanes) {
      signal?.throwIfAborted();
      if (lane.finishReason !== null) continue;
      const start = performance.now();
      lane.drawn = i === 0
        ? await lane.session.prompt(ids, { prefill, signal })
        : (await lane.session.next())[0]!;
      lane[i === 0 ? "prefillMs" : "decodeMs"] += performance.now() - start;
    }
    for (const lane of lanes) {
      // A column that has ended differs from one that goes on.
      if (lane.differsAt === null && lane.drawn !== first.drawn) {
        lane.differsAt = i;
      }
      const behindSame = lane.differsAt === null || lane.differsAt === i;
      if (lane.finishReason === null && behindSame) {
        const [kl, same] = await lane.session.divergence(first.session);
        lane.kl += kl!, lane.same += same!, lane.shared++;
      }
    }
    for (const lane of lanes) take(model, lane, options.ignoreEos ?? false);
    if (lanes.every(({ finishReason }) => finishReason !== null)) break;
    options.onProgress?.((i + 1) * lanes.length, maxTokens * lanes.length);
  }
  return {
    promptTokens: ids.length,
    columns: lanes.map((lane) => finish(model, lane, prefill)),
  };
}

/** Takes a column's drawn token into its text. */
function take(model: Model, lane: Lane, ignoreEos: boolean): void {
  const { drawn, finishReason } = lane;
  if (finishReason !== null) return;
  if (!ignoreEos && model.tokenizer.endTokens.has(drawn)) {
    lane.finishReason = "eos";
    return;
  }
  lane.tokens.push(drawn);
  // Rows that only pad the embedding stand for no text.
  const known = drawn < model.tokenizer.size;
  lane.pieces.push(known ? lane.stream.push(drawn) : "");
  if (isOutOfRoom(lane.session.cache)) lane.finishReason = "length";
}

function finish(model: Model, lane: Lane, prefill: Prefill): ComparedText {
  const { tokens, session, differsAt, shared, prefillMs, decodeMs } = lane;
  const pieces = [...lane.pieces, lane.stream.flush()];
  return {
    text: pieces.join(""),
    tokens,
    pieces,
    finishReason: lane.finishReason ?? "length",
    differsAt,
    kl: lane.kl / shared,
    sameTop: lane.same / shared,
    shared,
    prefillMs,
    decodeTokensPerSecond: tokens.length < 2
      ? null
      : (tokens.length - 1) / decodeMs * 1000,
    cache: report(model, session.cache, prefill),
  };
}
