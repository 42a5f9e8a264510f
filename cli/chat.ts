/** `wkv chat`: a conversation, typed or piped. */

import type { CacheOptions, Chat, ChatResult } from "../mod.ts";
import { findPolicy } from "../src/cache/registry.ts";
import { createChat } from "../src/chat.ts";
import { report } from "../src/generate.ts";
import { DEFAULT_MODEL } from "../src/hub/registry.ts";
import { defineCommand } from "./command.ts";
import { loadConversation, saveConversation } from "./conversation.ts";
import { errorMessage, exitCode } from "./errors.ts";
import { printPieces, resultJson } from "./generate.ts";
import { processInput, readTextFile } from "./input.ts";
import { LineReader } from "./lines.ts";
import { text, texts, UsageError, type Values, whole } from "./option.ts";
import { runFlags } from "./permissions.ts";
import {
  budgetOption,
  cacheOptions,
  cacheSettingsOf,
  checkedPolicy,
  load,
  loadOptions,
  noteFull,
  outputOptions,
  POLICY_NAMES,
  policyList,
  samplerOf,
  samplerOptions,
} from "./shared_options.ts";
import { ClosedOutput, type Terminal } from "./terminal.ts";
import { formatBytes } from "./units.ts";

const options = {
  system: text("TEXT", "What the model is told first"),
  "system-file": text("FILE", "The same, from a file", { file: true }),
  "chat-template": text("FILE", "A template in Jinja (default the model's)", {
    file: true,
  }),
  "template-name": text("NAME", "Which of the model's templates"),
  "max-tokens": whole(
    1,
    "The most tokens of an answer (default 256)",
    2 ** 31 - 1,
  ),
  policy: text("NAME", "The cache's policy (default weighted-kv)", {
    choices: POLICY_NAMES,
  }),
  budget: budgetOption,
  ...cacheOptions,
  ...samplerOptions,
  stop: texts("TEXT", "End an answer before this text; may be given again"),
  ...loadOptions,
  ...outputOptions,
};

const HELP = `/system [TEXT]  show what the model is told first, or change it
/clear          forget the conversation and empty the cache
/cache          show what became of the tokens
/policy [NAME]  show the cache's policy, or change it
/save FILE      write the conversation to a file
/load FILE      go on with a conversation from a file
/help           show this
/bye            leave, as Ctrl-D does
"""             begins and ends a text of several lines
Ctrl-C          ends an answer
`;

/** The command. */
export const chatCommand = defineCommand({
  operands: "[MODEL]",
  most: { count: 1, what: "one model" },
  choices: [DEFAULT_MODEL],
  description:
    `Talks with a model through its chat template. One cache of fixed size lasts for
the whole conversation: each turn feeds the new tokens alone. Special tokens
spelled in what is typed are text. Of a pipe each line is a turn, and the first
error ends the conversation.

In the conversation:
${HELP.replace(/^/gm, "  ").trimEnd()}
/save needs --allow-write, /load --allow-read of its file.

${policyList()}`,
  options,
  permissions: (values, [model = values.model]) =>
    runFlags(model, { read: files(values) }),
  async run({ values, operands, terminal, signal, interrupt }) {
    const { json = false, quiet = false } = values;
    checkedPolicy(values.policy, values);
    await noteFull([values.policy], values, terminal);
    if (values.system !== undefined && values["system-file"] !== undefined) {
      throw new UsageError(
        "The options --system and --system-file exclude each other: give one",
      );
    }
    const input = processInput();
    const [system, template] = await Promise.all([
      readText(values["system-file"], signal),
      readText(values["chat-template"], signal),
    ]);
    const [name = values.model] = operands;
    using model = await load(
      name === undefined ? values : { ...values, model: name },
      terminal,
      signal,
    );
    using chat = await createChat(model, {
      system: values.system ?? system,
      template,
      templateName: values["template-name"],
      cache: cacheOf(values, values.policy),
      maxTokens: values["max-tokens"],
      ...samplerOf(values),
      stop: values.stop,
      prefill: values.prefill,
    });
    const typed = input.kind === "terminal";
    const say = (line: string): void => {
      if (!quiet) terminal.err.writeNow(line);
    };
    const reader = new LineReader(
      input.readable,
      (prompt) => typed && say(prompt),
    );
    let answer: AbortController | null = null;
    using _taken = typed
      ? interrupt.take(() => {
        if (answer !== null) answer.abort();
        else say(`\nCtrl-D or /bye leaves\n${reader.waiting}`);
      })
      : null;
    const leave = (): void => void reader.close();
    signal.addEventListener("abort", leave);
    if (typed) say(`${describe(chat)}; /help lists what else can be typed\n`);
    for (;;) {
      const entry = await reader.next();
      signal.throwIfAborted();
      if (entry === null) break;
      try {
        if (entry.kind === "command") {
          if (entry.name === "bye") break;
          const { name, argument } = entry;
          await runCommand({ name, argument, chat, values, terminal, say });
          continue;
        }
        answer = new AbortController();
        const result = await printAnswer(chat, entry.text, {
          json,
          terminal,
          signal: typed ? answer.signal : signal,
        });
        note(chat, result, values["max-tokens"] ?? 256, say);
        if (signal.aborted) return 130;
      } catch (error) {
        const ours = entry.kind === "command" || exitCode(error) === 2;
        if (!typed || !ours || error instanceof ClosedOutput) throw error;
        terminal.err.writeNow(`wkv: ${errorMessage(error)}\n`);
      } finally {
        answer = null;
      }
    }
    await reader.close();
    return 0;
  },
});

/** Streams one answer. */
async function printAnswer(
  chat: Chat,
  text: string,
  { json, terminal, signal }: {
    json: boolean;
    terminal: Terminal;
    signal: AbortSignal;
  },
): Promise<ChatResult> {
  const pieces = chat.send(text, { signal, stopOnAbort: true });
  const result = await printPieces(pieces, json ? null : terminal);
  if (json) {
    const line = JSON.stringify(resultJson(chat.model, result));
    await terminal.out.write(`${line}\n`);
  } else if (!result.text.endsWith("\n")) await terminal.out.write("\n");
  return result;
}

/** Says what an answer does not show. */
function note(
  { cache }: Chat,
  { refed, finishReason, promptTokens, tokens }: ChatResult,
  maxTokens: number,
  say: (line: string) => void,
): void {
  if (refed) {
    say(
      `The conversation was fed anew (${promptTokens} tokens): its text does not go on from what the cache had\n`,
    );
  }
  if (finishReason !== "length") return;
  say(
    tokens.length >= maxTokens
      ? `Cut at ${maxTokens} tokens (--max-tokens)\n`
      : `Cut, as the ${cache.capacity} tokens of the full cache are taken: /clear, or /policy with a budget\n`,
  );
}

interface Command {
  name: string;
  argument: string;
  chat: Chat;
  values: Values<typeof options>;
  terminal: Terminal;
  say: (line: string) => void;
}

async function runCommand(
  { name, argument, chat, values, terminal, say }: Command,
): Promise<void> {
  const { out } = terminal;
  switch (name) {
    case "help":
      return await out.write(HELP);
    case "system":
      if (argument !== "") chat.system = argument;
      return await out.write(`${chat.system ?? "No system message"}\n`);
    case "clear":
      return chat.clear();
    case "cache": {
      const cache = report(chat.model, chat.cache, values.prefill ?? "exact");
      return await out.write(
        values.json ? `${JSON.stringify({ cache })}\n` : cacheLines(chat),
      );
    }
    case "policy":
      if (argument !== "") {
        checkedPolicy(argument, values);
        chat.changeCache(cacheOf(values, argument));
      }
      return await out.write(`${describe(chat)}\n`);
    case "save":
      await saveConversation(needed(name, argument), chat);
      return say(`Saved ${chat.messages.length} messages\n`);
    case "load": {
      const loaded = await loadConversation(needed(name, argument));
      chat.system = loaded.system;
      chat.setMessages(loaded.messages);
      return say(`Loaded ${chat.messages.length} messages\n`);
    }
    default:
      throw new UsageError(
        `Unknown command /${name}: /help lists them (a text that begins with a slash goes between """)`,
      );
  }
}

function needed(name: string, argument: string): string {
  if (argument !== "") return argument;
  throw new UsageError(`The command /${name} needs the name of a file`);
}

/** One line on model and cache. */
function describe({ model, cache }: Chat): string {
  const { policy, budget, sinks, recent } = cache;
  return `${model.name} on ${model.backend.description}; ${policy.name}, ${
    budget === null
      ? `room for ${cache.capacity} tokens`
      : `budget ${budget}, sinks ${sinks}, recent ${recent}`
  }`;
}

function cacheLines(chat: Chat): string {
  const { cache } = chat;
  const { seen, kept, merged, evicted } = cache.stats();
  const kepts = cache.headKept().flat();
  return `${describe(chat)}
${seen} tokens seen: ${
    cache.uneven
      ? `${Math.min(...kepts)} to ${Math.max(...kepts)} kept a KV head`
      : `${kept} kept, ${merged} merged, ${evicted} evicted`
  }
${formatBytes(cache.bytes)} (in full ${formatBytes(cache.fullBytes(seen))})
`;
}

function cacheOf(
  values: Values<typeof options>,
  policy: string | undefined,
): CacheOptions {
  return {
    policy: findPolicy(policy ?? "weighted-kv").name,
    budget: values.budget,
    ...cacheSettingsOf(values),
  };
}

/** Files that the options name. */
function files(values: Values<typeof options>): string[] {
  return [values["system-file"], values["chat-template"]]
    .filter((path) => path !== undefined);
}

async function readText(
  path: string | undefined,
  signal: AbortSignal,
): Promise<string | undefined> {
  if (path === undefined) return undefined;
  if (path === "-") {
    throw new UsageError("Standard input is the conversation: name a file");
  }
  return await readTextFile(path, processInput(), signal);
}
