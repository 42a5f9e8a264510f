/** A model's chat template: makes one text of a conversation; used by Chat. */

import {
  parseTemplate,
  type Program,
  renderTemplate,
  TemplateFault,
  TemplateRefusal,
} from "./interpreter.ts";
import { strftime } from "./strftime.ts";

/** One message of a conversation. */
export interface ChatMessage {
  /** Who speaks: `system`, `user`, `assistant`, or what the template knows. */
  role: string;
  /** What is said. */
  content: string;
}

/** How a conversation is rendered. */
export interface RenderOptions {
  /** Ends with what an answer begins with. @default `false` */
  addGenerationPrompt?: boolean | undefined;
  /** The token that begins a text, spelled; undefined for none. */
  bosToken?: string | undefined;
  /** The token that ends a text, spelled; undefined for none. */
  eosToken?: string | undefined;
  /** What the template takes for now. @default the present time */
  now?: Date | undefined;
}

/** A template in Jinja, as transformers renders it. */
export class ChatTemplate {
  /** Where it comes from, for messages. */
  readonly origin: string;
  readonly #program: Program;

  /**
   * Parses a template.
   *
   * @param source Its text.
   * @param origin Where it comes from, for messages.
   * @throws {SyntaxError} It cannot be parsed.
   */
  constructor(source: string, origin: string) {
    this.origin = origin;
    try {
      this.#program = parseTemplate(source);
    } catch (cause) {
      if (!(cause instanceof TemplateFault)) throw cause;
      throw new SyntaxError(
        `${origin}: The chat template is wrong: ${cause.message}`,
        { cause },
      );
    }
  }

  /**
   * The text of a conversation. The template has the variables that
   * transformers gives it, and permissions to nothing: it sees these values and
   * no others, and ends with an error when it takes more than a second or makes
   * too much text.
   *
   * @throws {RangeError} The template refuses the conversation, fails or goes
   * beyond a bound.
   */
  render(
    messages: readonly ChatMessage[],
    options: RenderOptions = {},
  ): string {
    const { now = new Date() } = options;
    try {
      return renderTemplate(this.#program, {
        messages: messages.map(({ role, content }) => ({ role, content })),
        tools: null,
        documents: null,
        add_generation_prompt: options.addGenerationPrompt ?? false,
        bos_token: options.bosToken,
        eos_token: options.eosToken,
        strftime_now: (format: unknown) => strftime(now, String(format)),
      });
    } catch (cause) {
      if (cause instanceof TemplateRefusal) {
        throw new RangeError(
          `${this.origin}: The chat template refuses these messages: ${cause.message}`,
          { cause },
        );
      }
      if (!(cause instanceof TemplateFault)) throw cause;
      throw new RangeError(
        `${this.origin}: The chat template fails: ${cause.message}`,
        { cause },
      );
    }
  }
}
