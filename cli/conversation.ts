/** Conversations in files: what `/save` and `/load` of chat.ts write and read. */

import type { Chat, ChatMessage } from "../mod.ts";
import { FormatError } from "../src/formats/error.ts";
import { readJsonFile } from "../src/formats/json_file.ts";

/** Writes all messages as one JSON object. */
export async function saveConversation(
  path: string,
  { model, messages }: Chat,
): Promise<void> {
  const json = JSON.stringify({ model: model.name, messages }, null, 2);
  await Deno.writeTextFile(path, `${json}\n`);
}

/**
 * Reads what was saved, or any object with a list `messages`.
 *
 * @throws {FormatError} It is something else.
 */
export async function loadConversation(path: string): Promise<
  { system: string | undefined; messages: ChatMessage[] }
> {
  const values = await readJsonFile(path, "conversation");
  const list = values.get("messages");
  if (!Array.isArray(list)) {
    throw new FormatError(path, "messages", "Found none, expected a list");
  }
  const messages = list.map((item, i) => {
    const [role, content] = item instanceof Map
      ? [item.get("role"), item.get("content")]
      : [];
    if (typeof role === "string" && typeof content === "string") {
      return { role, content };
    }
    throw new FormatError(
      path,
      `messages.${i}`,
      "Found something else, expected an object with the texts role and content",
    );
  });
  const [first] = messages;
  return first?.role === "system"
    ? { system: first.content, messages: messages.slice(1) }
    : { system: undefined, messages };
}
