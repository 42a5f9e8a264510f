/** Session: one cache with the graphs that feed it; used by generate and perplexity. */

import type { Graph } from "./backend/backend.ts";
import { divergence, logProb, sample } from "./backend/ops.ts";
import { type Dtype, Tensor } from "./backend/tensor.ts";
import type { KvCache } from "./cache/cache.ts";
import { choosesByStep, type Policy } from "./cache/policy.ts";
import { type Model, PASS_ROWS, passMemory } from "./model.ts";

/** How the next token is drawn; applied in the order top-k, top-p, min-p, temperature. */
export interface SamplerOptions {
  /** 0 takes the likeliest token. @default `0` */
  temperature?: number | undefined;
  /** Keeps this many tokens; 0 keeps all. @default `0` */
  topK?: number | undefined;
  /** Keeps the likeliest tokens that reach this share. @default `1` */
  topP?: number | undefined;
  /** Drops tokens less likely than this share of the likeliest. @default `0` */
  minP?: number | undefined;
  /** Repeats a run: a whole number below 2^53. @default random */
  seed?: number | undefined;
}

/** The largest chunk. */
const MAX_CHUNK = 4096;

/** A chunked prefill's size, or `exact` for token by token. */
export type Prefill = "exact" | `chunk:${number}`;

/**
 * The tokens of a chunk; null for `exact`.
 *
 * @throws {RangeError} It is neither, or the policy must see each step.
 */
export function chunkSize(prefill: Prefill, policy?: Policy): number | null {
  if (prefill === "exact") return null;
  if (policy !== undefined && choosesByStep(policy)) {
    throw new RangeError(
      `The prefill must be exact for ${policy.name}, which chooses by each step's own weights: current value is "${prefill}"`,
    );
  }
  const size = Number(/^chunk:(\d+)$/.exec(prefill)?.[1] ?? NaN);
  if (!(size >= 1 && size <= MAX_CHUNK)) {
    throw new RangeError(
      `The prefill must be exact, or chunk:N with N between 1 and ${MAX_CHUNK}: current value is "${prefill}"`,
    );
  }
  return size;
}

/** A pass as it was recorded; it may run more than once. */
interface RecordedPass {
  readonly rows: number;
  run(tokens: Int32Array<ArrayBuffer>): Promise<void>;
  close(): void;
}

/** The graphs of one cache, each recorded when it is first needed. */
export class Session implements Disposable {
  /** The model. */
  readonly model: Model;
  /** The cache; the caller's to close. */
  readonly cache: KvCache;
  readonly #tokens: Tensor;
  readonly #logits: Tensor;
  readonly #settings: Tensor;
  readonly #rng: Tensor;
  readonly #targets: Tensor;
  readonly #logProbs: Tensor;
  readonly #apart: Tensor;
  readonly #graphs = new Map<string, Graph>();
  /** What the recorded divergence is from. */
  #from: Session | undefined;

  /** A session on a cache of this model. */
  constructor(model: Model, cache: KvCache) {
    const { sequences } = cache;
    // What was opened is given back when there is no memory for the rest.
    using opened = new DisposableStack();
    const open = (dtype: Dtype, rows: number, columns: number): Tensor =>
      opened.use(new Tensor(model.backend, dtype, rows, columns));
    this.model = model;
    this.cache = cache;
    this.#tokens = open("I32", 1, sequences);
    this.#targets = open("I32", 1, sequences);
    this.#logProbs = open("F32", 1, sequences);
    this.#apart = open("F32", sequences, 2);
    this.#logits = open("F32", sequences, model.config.vocabulary);
    this.#settings = open("F32", sequences, 4);
    this.#rng = open("I32", sequences, 4);
    opened.move();
  }

  /**
   * Sets how tokens are drawn from here on.
   *
   * @throws {RangeError} A setting is out of range.
   */
  setSampler(options: SamplerOptions): void {
    const { temperature = 0, topK = 0, topP = 1, minP = 0 } = options;
    const seed = options.seed ?? Math.floor(Math.random() * 2 ** 53);
    between("temperature", temperature, 0, 1000);
    between("top-k", topK, 0, 2 ** 24, true);
    between("top-p", topP, Number.MIN_VALUE, 1);
    between("min-p", minP, 0, 1);
    between("seed", seed, 0, Number.MAX_SAFE_INTEGER, true);
    const { sequences } = this.cache;
    const settings = [temperature, topK, topP, minP];
    this.#settings.write(
      Float32Array.from({ length: sequences * 4 }, (_, i) => settings[i % 4]!),
    );
    const rng = new Int32Array(sequences * 4);
    for (let b = 0; b < sequences; b++) {
      rng[4 * b] = seed % 2 ** 32;
      // Each sequence draws from a stream of its own.
      rng[4 * b + 1] = Math.floor(seed / 2 ** 32) + b * 2 ** 21;
    }
    this.#rng.write(rng);
  }

  /**
   * Feeds tokens to sequence 0 and draws the one that follows. Tokens that fit
   * the cache go in passes; the others one by one, or in chunks.
   *
   * @param tokens At least one id.
   */
  async prompt(
    tokens: readonly number[],
    options: { prefill?: Prefill; signal?: AbortSignal | undefined } = {},
  ): Promise<number> {
    const chunk = chunkSize(options.prefill ?? "exact", this.cache.policy);
    const last = tokens.length;
    // Of many passes that are alike one graph is made.
    let fed: RecordedPass | undefined;
    try {
      for (let at = 0, rows; at < last; at += rows) {
        options.signal?.throwIfAborted();
        rows = Math.min(last - at, this.passRows(chunk));
        const draws = at + rows === last;
        if (rows === 1) {
          this.#tokens.write(Int32Array.of(tokens[at]!));
          await this.#step(draws ? "next" : "feed").run();
          continue;
        }
        const part = Int32Array.from(tokens.slice(at, at + rows));
        if (draws) {
          await this.#pass(0, part, this.#logits, () => this.#sample());
          continue;
        }
        if (fed?.rows !== rows) {
          fed?.close();
          fed = this.#record(0, rows, null, () => {});
        }
        await fed.run(part);
      }
    } finally {
      fed?.close();
    }
    return this.#tokens.integers()[0]!;
  }

  /**
   * The most tokens that may go to sequence 0 in one pass: of those that the
   * cache has room for as many as a pass takes, then a chunk; one where each
   * step's weights must be seen.
   */
  passRows(chunk: number | null): number {
    if (this.cache.policy.prefill === "steps") return 1;
    const room = this.cache.room(), { device } = this.model.backend;
    return room > 0 ? Math.min(room, PASS_ROWS[device]) : chunk ?? 1;
  }

  /** Feeds the token drawn last and draws the next, in every sequence. */
  async next(): Promise<Int32Array<ArrayBuffer>> {
    await this.#step("next").run();
    return this.#tokens.integers();
  }

  /** Does what {@linkcode Session.next} does, `times` times in one call, and reads no token. */
  async advance(times: number): Promise<void> {
    await this.#step("next").run(times);
  }

  /** Feeds one token a sequence. */
  async feed(tokens: Int32Array<ArrayBuffer>): Promise<void> {
    this.#tokens.write(tokens);
    await this.#step("feed").run();
  }

  /** Feeds one token a sequence; gives the log probability of each target that follows. */
  async score(
    tokens: Int32Array<ArrayBuffer>,
    targets: Int32Array<ArrayBuffer>,
  ): Promise<Float32Array<ArrayBuffer>> {
    this.#tokens.write(tokens);
    this.#targets.write(targets);
    await this.#step("score").run();
    return this.#logProbs.floats();
  }

  /**
   * How far the logits that each sequence's last token left are from those of
   * another session, as both stand: its Kullback-Leibler divergence in nats, and
   * 1 where the likeliest token is the same, `[B, 2]`.
   */
  async divergence(from: Session): Promise<Float32Array<ArrayBuffer>> {
    const { backend } = this.model;
    const { sequences } = this.cache;
    let graph = this.#graphs.get("divergence");
    if (graph === undefined || this.#from !== from) {
      graph?.close();
      this.#from = from;
      graph = backend.record(() =>
        divergence(
          backend,
          this.#apart,
          from.#logits,
          this.#logits,
          sequences,
        )
      );
      this.#graphs.set("divergence", graph);
    }
    await graph.run();
    return this.#apart.floats();
  }

  /**
   * Feeds tokens to one sequence as one pass; gives the log probability of each
   * one's target. Tokens beyond the cache's room are settled as one chunk.
   */
  async scorePass(
    sequence: number,
    tokens: Int32Array<ArrayBuffer>,
    targets: Int32Array<ArrayBuffer>,
  ): Promise<Float32Array<ArrayBuffer>> {
    const { backend, config } = this.model;
    const rows = tokens.length;
    using wanted = Tensor.from(backend, targets);
    using logProbs = new Tensor(backend, "F32", 1, rows);
    using logits = new Tensor(backend, "F32", rows, config.vocabulary);
    await this.#pass(
      sequence,
      tokens,
      logits,
      () => logProb(backend, logProbs, logits, wanted, rows),
    );
    return logProbs.floats();
  }

  /**
   * Feeds tokens to one sequence as one pass, however many: those beyond the
   * cache's room attend to all of the others before the cache is compressed.
   */
  async feedPass(
    sequence: number,
    tokens: Int32Array<ArrayBuffer>,
  ): Promise<void> {
    await this.#pass(sequence, tokens, null, () => {});
  }

  /** Feeds one token a sequence; gives the logits that follow, `[B, vocabulary]`. */
  async logits(
    tokens: Int32Array<ArrayBuffer>,
  ): Promise<Float32Array<ArrayBuffer>> {
    this.#tokens.write(tokens);
    await this.#step("score").run();
    return this.#logits.floats();
  }

  /** Gives the graphs and their memory back, not the cache. */
  close(): void {
    for (const graph of this.#graphs.values()) graph.close();
    this.#graphs.clear();
    for (
      const tensor of [
        this.#tokens,
        this.#logits,
        this.#settings,
        this.#rng,
        this.#targets,
        this.#logProbs,
        this.#apart,
      ]
    ) tensor.close();
  }

  /** Same as {@linkcode Session.close}. */
  [Symbol.dispose](): void {
    this.close();
  }

  /** The graph of one decode step: feed alone, with the draw, or with log probabilities. */
  #step(kind: "feed" | "next" | "score"): Graph {
    let graph = this.#graphs.get(kind);
    if (graph !== undefined) return graph;
    const { model, cache } = this;
    const { backend } = model;
    graph = backend.record(() => {
      model.network.forward({
        cache,
        tokens: this.#tokens,
        rows: cache.sequences,
        sequence: null,
        logits: kind === "feed" ? null : this.#logits,
        activations: model.memory(cache.sequences),
        precision: model.activations,
      });
      if (kind === "next") {
        this.#sample();
      } else if (kind === "score") {
        logProb(
          backend,
          this.#logProbs,
          this.#logits,
          this.#targets,
          cache.sequences,
        );
      }
    });
    this.#graphs.set(kind, graph);
    return graph;
  }

  /** Runs tokens of one sequence as one pass, and what uses its logits. */
  async #pass(
    sequence: number,
    tokens: Int32Array<ArrayBuffer>,
    logits: Tensor | null,
    then: () => void,
  ): Promise<void> {
    const pass = this.#record(sequence, tokens.length, logits, then);
    try {
      await pass.run(tokens);
    } finally {
      pass.close();
    }
  }

  /** Records a pass of so many tokens of one sequence, and what uses its logits. */
  #record(
    sequence: number,
    rows: number,
    logits: Tensor | null,
    then: () => void,
  ): RecordedPass {
    const { model, cache } = this;
    const ids = new Tensor(model.backend, "I32", 1, rows);
    try {
      const graph = model.backend.record(() => {
        model.network.forward({
          cache,
          tokens: ids,
          rows,
          sequence,
          logits,
          activations: model.memory(passMemory(rows)),
          precision: model.activations,
        });
        then();
      });
      return {
        rows,
        async run(tokens) {
          ids.write(tokens);
          await graph.run();
        },
        close() {
          graph.close();
          ids.close();
        },
      };
    } catch (error) {
      ids.close();
      throw error;
    }
  }

  /** Records the draw of the next tokens. */
  #sample(): void {
    sample(
      this.model.backend,
      this.#tokens,
      this.#logits,
      this.#settings,
      this.#rng,
    );
  }
}

function between(
  name: string,
  value: number,
  least: number,
  most: number,
  whole = false,
): void {
  if (value >= least && value <= most && (!whole || Number.isInteger(value))) {
    return;
  }
  const kind = whole ? "a whole number" : "a number";
  const from = least === Number.MIN_VALUE
    ? "above 0 and at most"
    : `between ${least} and`;
  throw new RangeError(
    `The ${name} must be ${kind} ${from} ${most}: current value is ${value}`,
  );
}
