/** Chat: a conversation with a model over one cache, turn by turn; called by users and by `wkv chat`. */

import { KvCache } from "./cache/cache.ts";
import type { CacheOptions } from "./cache/layout.ts";
import { Mask } from "./chat/mask.ts";
import { type ChatMessage, ChatTemplate } from "./chat/template.ts";
import { quote } from "./formats/error.ts";
import {
  generate,
  type GenerateOptions,
  type GenerateResult,
  type Piece,
} from "./generate.ts";
import type { Model } from "./model.ts";

/** What a conversation is held with. */
export interface ChatOptions extends
  Pick<
    GenerateOptions,
    | "temperature"
    | "topK"
    | "topP"
    | "minP"
    | "seed"
    | "cache"
    | "maxTokens"
    | "stop"
    | "ignoreEos"
    | "prefill"
  > {
  /** What the model is told first. */
  system?: string | undefined;
  /** Messages to go on from, a system message not among them. */
  messages?: readonly ChatMessage[] | undefined;
  /** A template in Jinja. @default the model's own */
  template?: string | undefined;
  /** Which of the model's templates. @default `"default"` */
  templateName?: string | undefined;
}

/** How one answer is made. */
export type SendOptions = Pick<
  GenerateOptions,
  "signal" | "stopOnAbort" | "onToken"
>;

/** What an answer ends with. */
export interface ChatResult extends GenerateResult {
  /**
   * Whether the cache was emptied and the whole conversation fed anew, as what
   * the template makes of it does not go on from what the cache has.
   */
  refed: boolean;
}

/**
 * A conversation. Its cache stays at the budget: each turn feeds the tokens
 * that are new, and what the policy let go stays gone.
 */
export class Chat implements Disposable {
  /** The model. */
  readonly model: Model;
  readonly #template: ChatTemplate;
  readonly #options: ChatOptions;
  readonly #mask: Mask;
  readonly #endTokens: ReadonlySet<number>;
  readonly #ownsCache: boolean;
  #cache: KvCache;
  #system: string | undefined;
  #messages: ChatMessage[];
  /** What the template made of all that was fed; null when no text stands for it. */
  #text: string | null = "";
  /** The tokens of that; the cache has seen all but the last ones. */
  #ids: readonly number[] = [];
  #answering = false;

  private constructor(
    parts: {
      model: Model;
      template: ChatTemplate;
      mask: Mask;
      endTokens: ReadonlySet<number>;
    },
    options: ChatOptions,
  ) {
    this.model = parts.model;
    this.#template = parts.template;
    this.#mask = parts.mask;
    this.#endTokens = parts.endTokens;
    this.#options = options;
    this.#system = options.system;
    this.#messages = [...options.messages ?? []];
    const { cache = {} } = options;
    this.#ownsCache = !(cache instanceof KvCache);
    this.#cache = cache instanceof KvCache
      ? cache
      : parts.model.createCache(cache);
  }

  /** Begins a conversation; see {@linkcode createChat}. */
  static async create(model: Model, options: ChatOptions = {}): Promise<Chat> {
    checkMessages(options.messages ?? []);
    const { cache } = options;
    if (cache instanceof KvCache && cache.stats().seen > 0) {
      throw new RangeError(
        `The chat's cache must be empty: it has seen ${cache.stats().seen} tokens`,
      );
    }
    const template = await findTemplate(model, options);
    const mask = new Mask(model.tokenizer.specialTokens);
    const endTokens = await endOfTurn(model, template);
    return new Chat({ model, template, mask, endTokens }, options);
  }

  /** The cache, given or its own. */
  get cache(): KvCache {
    return this.#cache;
  }

  /** All that was said, the system message first where there is one. */
  get messages(): readonly ChatMessage[] {
    return this.#all(this.#messages);
  }

  /** What the model is told first; another one feeds the conversation anew. */
  get system(): string | undefined {
    return this.#system;
  }

  set system(text: string | undefined) {
    this.#checkIdle();
    this.#system = text;
  }

  /**
   * Replaces what was said, without the system message. The next turn feeds
   * what the template makes of it anew where the cache has something else.
   *
   * @throws {TypeError} A message has no role or no content.
   * @throws {RangeError} A role is no plain word.
   */
  setMessages(messages: readonly ChatMessage[]): void {
    this.#checkIdle();
    checkMessages(messages);
    this.#messages = [...messages];
  }

  /** Forgets what was said and empties the cache; the system message stays. */
  clear(): void {
    this.#checkIdle();
    this.#messages = [];
    this.#empty();
  }

  /**
   * Goes on with another cache, in place of the one made for this conversation;
   * the next turn feeds all of it.
   *
   * @throws {RangeError} An option is out of range; then the old cache stays.
   */
  changeCache(options: CacheOptions): void {
    this.#checkIdle();
    if (!this.#ownsCache) {
      throw new TypeError(
        "The chat's cache was given to it: empty or change that one",
      );
    }
    const cache = this.model.createCache(options);
    this.#cache.close();
    this.#cache = cache;
    this.#empty();
  }

  /**
   * Says something and streams the answer, up to a token that ends a turn. A
   * turn that fails, that is left, or that is aborted before its first token is
   * not kept; the next one then feeds the conversation anew. With `stopOnAbort`
   * an answer that has begun is kept as far as it goes.
   *
   * @param content What the user says; special tokens spelled in it are text.
   * @returns Pieces of the answer as they come, and at the end the result.
   * @throws {RangeError} The template refuses the messages, they do not fit a
   * full cache, or an option is out of range.
   */
  async *send(
    content: string,
    options: SendOptions = {},
  ): AsyncGenerator<Piece, ChatResult> {
    this.#checkIdle();
    const messages = [...this.#messages, { role: "user", content }];
    checkMessages(messages.slice(-1));
    this.#answering = true;
    try {
      const { text, ids, prompt, refed } = await this.#next(messages, options);
      const { cache } = this;
      const before = { text: this.#text, seen: cache.stats().seen };
      this.#text = null;
      let result: GenerateResult;
      try {
        result = yield* generate(this.model, prompt, {
          ...this.#options,
          ...options,
          cache,
          endTokens: this.#endTokens,
        });
      } finally {
        // Nothing was fed: what the cache has still stands for its text.
        if (cache.closed || cache.stats().seen === before.seen) {
          this.#text = before.text;
        }
      }
      if (result.tokens.length > 0 || result.finishReason !== "abort") {
        this.#messages = [...messages, {
          role: "assistant",
          content: this.#content(messages, text, result.text),
        }];
        // A stop string was generated, but is not part of the answer.
        this.#text = result.finishReason === "stop"
          ? null
          : text + this.#mask.hide(result.text);
        this.#ids = [...ids, ...result.tokens];
      }
      return { ...result, refed };
    } finally {
      this.#answering = false;
    }
  }

  /** Gives its cache back, unless it was given to it. */
  close(): void {
    if (this.#ownsCache) this.#cache.close();
  }

  /** Same as {@linkcode Chat.close}. */
  [Symbol.dispose](): void {
    this.close();
  }

  /** The tokens to feed so that the answer to the last message is next. */
  async #next(
    messages: readonly ChatMessage[],
    options: SendOptions,
  ): Promise<
    { text: string; ids: number[]; prompt: number[]; refed: boolean }
  > {
    const text = this.#render(messages, true);
    const { cache } = this;
    const goesOn = this.#text !== null && text.startsWith(this.#text);
    const known = goesOn ? this.#text!.length : 0;
    const { text: fresh, literal } = this.#mask.reveal(text.slice(known));
    const { signal, stopOnAbort } = options;
    const ids = await this.model.tokenizer.encode(fresh, {
      special: true,
      literal,
      continues: known > 0,
      ...(signal && !stopOnAbort ? { signal } : {}),
    });
    const seen = cache.stats().seen;
    if (goesOn) {
      const all = [...this.#ids, ...ids];
      return { text, ids: all, prompt: all.slice(seen), refed: false };
    }
    this.#empty();
    return { text, ids, prompt: ids, refed: seen > 0 };
  }

  /**
   * An answer as a message: without its first blank where the template writes
   * one itself, as then the text goes on from what was generated.
   */
  #content(
    messages: readonly ChatMessage[],
    text: string,
    answer: string,
  ): string {
    if (!answer.startsWith(" ")) return answer;
    const content = answer.slice(1);
    const whole = [...messages, { role: "assistant", content }];
    const made = text + this.#mask.hide(answer);
    try {
      return this.#render(whole, false).startsWith(made) ? content : answer;
    } catch {
      // A template may want a user's message last; the next turn has one.
      return answer;
    }
  }

  /** What the template makes of the messages, with marks in it. */
  #render(
    messages: readonly ChatMessage[],
    addGenerationPrompt: boolean,
  ): string {
    return this.#template.render(
      this.#all(messages).map(({ role, content }) => ({
        role,
        content: this.#mask.hide(content),
      })),
      { addGenerationPrompt, ...tokenNames(this.model) },
    );
  }

  #empty(): void {
    this.#cache.reset();
    this.#text = "";
    this.#ids = [];
  }

  #all(messages: readonly ChatMessage[]): ChatMessage[] {
    return this.#system === undefined
      ? [...messages]
      : [{ role: "system", content: this.#system }, ...messages];
  }

  #checkIdle(): void {
    if (this.#answering) {
      throw new Error(
        "The chat is answering: read that answer to its end, or leave it, first",
      );
    }
  }
}

/**
 * Begins a conversation with a model. It has a cache of its own unless one is
 * given; a given one must be empty.
 *
 * @example
 * ```ts ignore
 * using model = await loadModel("smollm2-135m-instruct");
 * using chat = await createChat(model, { system: "Answer briefly." });
 * for await (const { text } of chat.send("What is a lighthouse for?")) {
 *   console.log(text);
 * }
 * ```
 *
 * @throws {RangeError} The model has no such template, or an option is out of
 * range.
 * @throws {SyntaxError} The template cannot be parsed.
 */
export function createChat(
  model: Model,
  options: ChatOptions = {},
): Promise<Chat> {
  return Chat.create(model, options);
}

async function findTemplate(
  model: Model,
  { template, templateName: name = "default" }: ChatOptions,
): Promise<ChatTemplate> {
  if (template !== undefined) {
    return new ChatTemplate(template, "the given template");
  }
  const templates = await model.chatTemplates();
  const found = templates.get(name);
  if (found !== undefined) return new ChatTemplate(found.source, found.origin);
  const names = [...templates.keys()].join(", ");
  throw new RangeError(
    names === ""
      ? `${model.path}: The model has no chat template: give one, or take an instruction-tuned model`
      : `${model.path}: The model has no chat template ${
        JSON.stringify(name)
      }: its templates are ${names}`,
  );
}

/** The special tokens that begin and end a text, spelled. */
function tokenNames(
  { tokenizer }: Model,
): { bosToken: string | undefined; eosToken: string | undefined } {
  const name = (id: number | null): string | undefined =>
    id === null || id >= tokenizer.size ? undefined : tokenizer.decode([id]);
  return { bosToken: name(tokenizer.bos), eosToken: name(tokenizer.eos) };
}

/** The special token that the template puts behind an answer, if it does. */
async function endOfTurn(
  model: Model,
  template: ChatTemplate,
): Promise<ReadonlySet<number>> {
  const { tokenizer } = model;
  const answer = crypto.randomUUID();
  let text: string;
  try {
    text = template.render([
      { role: "user", content: "Hello" },
      { role: "assistant", content: answer },
    ], tokenNames(model));
  } catch {
    // It has its reasons, and says them when a conversation is rendered.
    return new Set();
  }
  const at = text.lastIndexOf(answer);
  if (at < 0) return new Set();
  const rest = text.slice(at + answer.length).trimStart();
  const token = tokenizer.specialTokens
    .filter((token) => rest.startsWith(token))
    .sort((a, b) => b.length - a.length)[0];
  return new Set(
    token === undefined ? [] : await tokenizer.encode(token, { special: true }),
  );
}

function checkMessages(messages: readonly ChatMessage[]): void {
  for (const { role, content } of messages) {
    if (typeof role !== "string" || typeof content !== "string") {
      throw new TypeError(
        `A message must have a role and a content, both texts: found ${typeof role} and ${typeof content}`,
      );
    }
    // Templates write roles between special tokens.
    if (!/^[\w-]{1,64}$/.test(role)) {
      throw new RangeError(
        `A role must be up to 64 letters, digits, - and _: found ${
          quote(role)
        }`,
      );
    }
  }
}
