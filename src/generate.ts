/** generate(): continues a text token by token through a bounded cache; called by users and by `wkv generate`. */

import { type CacheEvent, type CacheStats, KvCache } from "./cache/cache.ts";
import type { CacheOptions, CacheType, Positions } from "./cache/layout.ts";
import { keepsAll } from "./cache/policy.ts";
import type { Precision } from "./backend/ops.ts";
import type { Model } from "./model.ts";
import {
  chunkSize,
  type Prefill,
  type SamplerOptions,
  Session,
} from "./session.ts";
import { StopStrings } from "./stop_strings.ts";
import { TextStream } from "./tokenizer/tokenizer.ts";

/** How a text is continued. */
export interface GenerateOptions extends SamplerOptions {
  /** A cache to go on with, or what to make one of. */
  cache?: KvCache | CacheOptions | undefined;
  /** The most tokens to generate. @default `256` */
  maxTokens?: number | undefined;
  /** Strings that end the text; they are not part of it. */
  stop?: readonly string[] | undefined;
  /** Goes on past the model's end token. @default `false` */
  ignoreEos?: boolean | undefined;
  /** Ids that end the text beside the model's own. */
  endTokens?: ReadonlySet<number> | undefined;
  /** Reads special tokens spelled in the prompt as such. @default `false` */
  special?: boolean | undefined;
  /** How a prompt beyond the budget is fed. @default `"exact"` */
  prefill?: Prefill | undefined;
  /** Ends the generation: it throws the signal's reason. */
  signal?: AbortSignal | undefined;
  /** Ends with what there is when the signal aborts. @default `false` */
  stopOnAbort?: boolean | undefined;
  /** Called for each generated token, before its piece is yielded. */
  onToken?: ((event: TokenEvent) => void) | undefined;
}

/** One generated token. */
export interface TokenEvent {
  /** Its place among the generated ones, from 0. */
  index: number;
  /** Its id. */
  token: number;
  /** What has become of the sequence's tokens so far. */
  cache: CacheStats;
  /** What the last step did in each layer and head; asked only when called. */
  events: () => CacheEvent[];
}

/** A piece of the generated text. */
export interface Piece {
  /** Text; empty while a character or a stop string may be incomplete. */
  text: string;
  /** The token that ended it. */
  token: number;
}

/** Why a generation ended. */
export type FinishReason = "length" | "eos" | "stop" | "abort";

/** What a cache was made of, and how it was fed, every option resolved. */
export interface CacheSettings {
  /** The policy's name. */
  policy: string;
  /** Tokens kept a KV head; null for `full`. */
  budget: number | null;
  /** First tokens that never leave. */
  sinks: number | null;
  /** Newest tokens that never leave. */
  recent: number | null;
  /** Tokens that leave at once when the cache overflows; null for `full`. */
  interval: number | null;
  /** Tokens kept in each layer, the mean of its KV heads, where any differ; null where none do. */
  layerSlots: readonly number[] | null;
  /** Tokens kept in each KV head of each layer, where those of a layer differ; null where they do not. */
  headSlots: readonly (readonly number[])[] | null;
  /** KV heads of a layer, each with a cache of its own. */
  kvHeads: number;
  /** Where keys are rotated. */
  positions: Positions;
  /** How tokens were fed. */
  prefill: Prefill;
  /** How activations met quantised weights. */
  activations: Precision;
  /** Type of keys and values. */
  cacheType: CacheType;
}

/**
 * The cache of a result, as `--json` prints it. Where heads keep different
 * numbers of tokens, the counts are those of the one nearest to the budget.
 */
export interface CacheReport extends CacheSettings, CacheStats {
  /** Tokens cached in each layer, the mean of its KV heads, where any differ; null where none do. */
  layerKept: readonly number[] | null;
  /** Tokens cached in each KV head of each layer, where those of a layer differ; null where they do not. */
  headKept: readonly (readonly number[])[] | null;
  /** Bytes of keys, values and state, allocated. */
  bytes: number;
  /** Bytes of keys and values of all tokens seen, in the same type. */
  fullBytes: number;
}

/** What a generation ends with. */
export interface GenerateResult {
  /** All of the text. */
  text: string;
  /** The generated ids, without the end token. */
  tokens: number[];
  /** Tokens of the prompt. */
  promptTokens: number;
  /** Why it ended. */
  finishReason: FinishReason;
  /** How long it took. */
  timings: {
    /** Milliseconds that the prompt took, the first token's draw with it; null when it was aborted. */
    prefillMs: number | null;
    /** Milliseconds from the call to the first token; null when there is none. */
    firstTokenMs: number | null;
    /** Tokens after the first, by the time between first and last; null below two tokens. */
    decodeTokensPerSecond: number | null;
  };
  /** The cache at the end. */
  cache: CacheReport;
}

/**
 * Continues a text. The cache stays at its budget: in each step that overflows
 * it, its policy lets one token leave. The last token drawn is not in the cache
 * yet: a call that goes on with the same cache begins its prompt with it.
 *
 * @example
 * ```ts ignore
 * for await (const { text } of generate(model, "Once upon a time")) {
 *   console.log(text);
 * }
 * ```
 *
 * @param prompt Text, or token ids.
 * @returns Pieces of text as they come, and at the end the result.
 * @throws {RangeError} The prompt is empty or does not fit a full cache, or an
 * option is out of range.
 */
export async function* generate(
  model: Model,
  prompt: string | readonly number[],
  options: GenerateOptions = {},
): AsyncGenerator<Piece, GenerateResult> {
  const start = performance.now();
  const { maxTokens = 256, signal, prefill = "exact" } = options;
  if (!Number.isInteger(maxTokens) || maxTokens < 1 || maxTokens > 2 ** 31) {
    throw new RangeError(
      `The maxTokens must be a whole number of at least 1: current value is ${maxTokens}`,
    );
  }
  chunkSize(prefill);
  const stops = new StopStrings(options.stop ?? []);
  if (!options.stopOnAbort) signal?.throwIfAborted();
  const ids = await promptTokens(model, prompt, options);
  const own = !(options.cache instanceof KvCache);
  const cache = options.cache instanceof KvCache
    ? options.cache
    : openCache(model, options.cache ?? {}, ids.length + maxTokens);
  try {
    if (cache.sequences !== 1) {
      throw new RangeError(
        `generate feeds one sequence: the cache has ${cache.sequences}`,
      );
    }
    checkRoom(cache, ids.length);
    using session = new Session(model, cache);
    session.setSampler(options);
    const settings = { ...options, maxTokens, prefill };
    const drawn = yield* continued(session, ids, stops, settings);
    const { text, tokens, finishReason, firstTime, lastTime } = drawn;
    return {
      text,
      tokens,
      promptTokens: ids.length,
      finishReason,
      timings: {
        prefillMs: elapsed(drawn.promptTime, firstTime),
        firstTokenMs: elapsed(start, firstTime),
        decodeTokensPerSecond: tokens.length < 2
          ? null
          : (tokens.length - 1) / (lastTime - firstTime) * 1000,
      },
      cache: report(model, cache, prefill),
    };
  } finally {
    if (own) cache.close();
  }
}

/** What was drawn behind a prompt, and when; NaN where no token was. */
interface Drawn
  extends Pick<GenerateResult, "text" | "tokens" | "finishReason"> {
  promptTime: number;
  firstTime: number;
  lastTime: number;
}

/** Feeds the prompt and draws tokens until there is a reason to end. */
async function* continued(
  session: Session,
  ids: readonly number[],
  stops: StopStrings,
  options: GenerateOptions & { maxTokens: number; prefill: Prefill },
): AsyncGenerator<Piece, Drawn> {
  const { model, cache } = session;
  const { maxTokens, prefill, signal } = options;
  const ends = (token: number): boolean =>
    model.tokenizer.endTokens.has(token) ||
    (options.endTokens?.has(token) ?? false);
  const stream = new TextStream(model.tokenizer, { continues: true });
  const tokens: number[] = [];
  let text = "";
  let finishReason: FinishReason = "length";
  let firstTime = NaN;
  let lastTime = NaN;
  const promptTime = performance.now();
  try {
    let token = await session.prompt(ids, { prefill, signal });
    // Asked once: a copy from the device would delay each token.
    const room = keepsAll(cache.policy)
      ? cache.capacity - cache.stats().kept
      : Infinity;
    for (;;) {
      lastTime = performance.now();
      if (tokens.length === 0) firstTime = lastTime;
      if (!options.ignoreEos && ends(token)) {
        finishReason = "eos";
        break;
      }
      tokens.push(token);
      options.onToken?.({
        index: tokens.length - 1,
        token,
        cache: cache.stats(),
        events: () => cache.events(),
      });
      // Rows that only pad the embedding stand for no text.
      const known = token < model.tokenizer.size;
      const piece = stops.push(known ? stream.push(token) : "");
      text += piece;
      yield { text: piece, token };
      if (stops.found) {
        finishReason = "stop";
        break;
      }
      if (tokens.length >= maxTokens || tokens.length > room) break;
      signal?.throwIfAborted();
      token = (await session.next())[0]!;
    }
  } catch (error) {
    if (!signal?.aborted || !options.stopOnAbort) throw error;
    finishReason = "abort";
  }
  const rest = stops.push(stream.flush()) + stops.flush();
  if (rest !== "") {
    text += rest;
    yield { text: rest, token: tokens.at(-1)! };
  }
  return { text, tokens, finishReason, promptTime, firstTime, lastTime };
}

/** The cache as results show it. */
export function report(
  model: Model,
  cache: KvCache,
  prefill: Prefill,
): CacheReport {
  const stats = cache.stats();
  return {
    ...cacheSettings(model, cache, prefill),
    ...stats,
    layerKept: cache.uneven
      ? cache.layerSlots.map((_, layer) => cache.layerKept(layer))
      : null,
    headKept: cache.unevenHeads ? cache.headKept() : null,
    bytes: cache.bytes,
    fullBytes: cache.fullBytes(stats.seen),
  };
}

/** What a cache is made of, as results show it. */
export function cacheSettings(
  model: Model,
  cache: KvCache,
  prefill: Prefill,
): CacheSettings {
  return {
    policy: cache.policy.name,
    budget: cache.budget,
    sinks: cache.sinks,
    recent: cache.recent,
    interval: cache.budget === null ? null : cache.interval,
    layerSlots: cache.uneven ? cache.layerSlots : null,
    headSlots: cache.unevenHeads ? cache.headSlots : null,
    kvHeads: model.config.kvHeads,
    positions: cache.positions,
    prefill,
    activations: model.activations,
    cacheType: cache.cacheType,
  };
}

function elapsed(from: number, to: number): number | null {
  return Number.isNaN(to) ? null : to - from;
}

/** The prompt's ids. */
export async function promptTokens(
  model: Model,
  prompt: string | readonly number[],
  options: Pick<GenerateOptions, "special" | "signal" | "stopOnAbort">,
): Promise<readonly number[]> {
  if (typeof prompt !== "string" && !Array.isArray(prompt)) {
    throw new TypeError(
      `The prompt must be a text or a list of token ids: found ${typeof prompt}`,
    );
  }
  const ids = typeof prompt === "string"
    ? await model.tokenizer.encode(prompt, {
      special: options.special ?? false,
      ...(options.signal && !options.stopOnAbort
        ? { signal: options.signal }
        : {}),
    })
    : prompt;
  if (ids.length === 0) {
    throw new RangeError("The prompt is empty: give at least one character");
  }
  for (const id of ids) {
    if (!Number.isInteger(id) || id < 0 || id >= model.config.vocabulary) {
      throw new RangeError(
        `The prompt's token ids must be whole numbers below ${model.config.vocabulary}: found ${id}`,
      );
    }
  }
  return ids;
}

/** A cache of its own for one call; `full` gets room for what the call needs. */
export function openCache(
  model: Model,
  options: CacheOptions,
  need: number,
): KvCache {
  return model.createCache({
    capacity: Math.min(model.config.context, need),
    ...options,
  });
}

/** Refuses a prompt that a full cache has no room for. */
export function checkRoom(cache: KvCache, tokens: number): void {
  if (cache.closed) throw new Error("The cache is closed");
  const { kept } = cache.stats();
  if (keepsAll(cache.policy) && kept + tokens > cache.capacity) {
    throw new RangeError(
      `The prompt's ${tokens} tokens do not fit the ${
        cache.capacity - kept
      } that the full cache has left: shorten it, or choose a policy with a budget`,
    );
  }
}

/** Whether a full cache has no room for another token. */
export function isOutOfRoom(cache: KvCache): boolean {
  return keepsAll(cache.policy) && cache.stats().kept >= cache.capacity;
}
