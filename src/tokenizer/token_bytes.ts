/** The bytes that tokens stand for, by how their vocabulary is spelled and what its decoder does; used by the readers of vocabularies. */

import type { ConfigFile } from "../formats/config.ts";
import { KIND } from "./bpe.ts";
import { tokenBytes } from "./byte_map.ts";
import { BLANK } from "./splitting.ts";

/** What a decoder does to tokens spelled as text. */
export interface TextDecoding {
  /** Whether tokens such as `<0xE2>` are bytes. */
  readonly bytes: boolean;
  /** What is left out of the first token: nothing, one blank, or all of them. */
  readonly first: "nothing" | "blank" | "blanks";
}

const encoder = new TextEncoder();

/**
 * The bytes of a token of a byte-level vocabulary.
 *
 * @param token The token as it is spelled.
 * @param kind Its {@linkcode KIND}: those that merges cannot make are text.
 */
export function byteLevelBytes(
  token: string,
  kind: number,
): Uint8Array<ArrayBuffer> {
  if (kind === KIND.byte) return byteOf(token);
  const spelled = kind === KIND.normal || kind === KIND.unused
    ? tokenBytes(token)
    : null;
  return spelled ?? encoder.encode(token);
}

/**
 * The bytes of a token that is spelled as text, blanks as U+2581.
 *
 * @param token The token as it is spelled.
 * @param decoding What the decoder does.
 * @param first Whether the token begins a text.
 */
export function textBytes(
  token: string,
  decoding: TextDecoding,
  first: boolean,
): Uint8Array<ArrayBuffer> {
  const left = first ? decoding.first : "nothing";
  if (left === "blanks") token = token.replaceAll(BLANK, "");
  const bytes = decoding.bytes && isByte(token)
    ? byteOf(token)
    : encoder.encode(token.replaceAll(BLANK, " "));
  return left === "blank" && bytes[0] === 0x20 ? bytes.slice(1) : bytes;
}

/**
 * Whether a token is written as a byte, such as `<0xE2>`.
 *
 * @param token The token as it is spelled.
 */
export function isByte(token: string): boolean {
  return /^<0x[0-9A-Fa-f]{2}>$/.test(token);
}

function byteOf(token: string): Uint8Array<ArrayBuffer> {
  return Uint8Array.of(Number.parseInt(token.slice(3, 5), 16));
}

/**
 * Reads the `decoder` of a tokenizer.json whose tokens are spelled as text.
 *
 * @param file Its object.
 * @returns What it does.
 * @throws {FormatError} When a step is not known, or blanks are not undone.
 */
export function readTextDecoder(file: ConfigFile): TextDecoding {
  const steps = readSteps(file);
  if (!steps.some(({ blanks }) => blanks)) {
    throw file.error(
      "type",
      `a decoder that turns ${BLANK} into a blank, by Replace or Metaspace`,
    );
  }
  const first = steps.map(({ first }) => first ?? "nothing")
    .find((what) => what !== "nothing");
  return {
    bytes: steps.some(({ bytes }) => bytes),
    first: first ?? "nothing",
  };
}

/** One step: what it does, and whether it undoes blanks. */
type Step = Partial<TextDecoding> & { blanks?: boolean };

function readSteps(file: ConfigFile): Step[] {
  const type = file.string("type");
  switch (type) {
    case "Sequence":
      return file.objects("decoders").flatMap(readSteps);
    case "Fuse":
      return [];
    case "ByteFallback":
      return [{ bytes: true }];
    case "Replace": {
      const pattern = file.object("pattern");
      const from = pattern?.has("String") ? pattern.string("String") : "";
      if (from === BLANK && file.string("content") === " ") {
        return [{ blanks: true }];
      }
      throw file.error("pattern", `${BLANK} replaced by a blank`);
    }
    case "Strip": {
      const start = file.integer("start", { min: 0, max: 1, fallback: 0 });
      file.integer("stop", { min: 0, max: 0, fallback: 0 });
      if (file.string("content") !== " ") {
        throw file.error("content", "a blank");
      }
      return start === 1 ? [{ first: "blank" }] : [];
    }
    case "Metaspace": {
      const always = file.boolean("add_prefix_space", true);
      const scheme = file.string("prepend_scheme", always ? "always" : "never");
      return [{
        blanks: true,
        first: scheme === "never" ? "nothing" : "blanks",
      }];
    }
  }
  throw file.error(
    "type",
    "a decoder that is known: ByteFallback, ByteLevel, Fuse, Metaspace, Replace, Sequence, Strip",
  );
}
