/** GPT-2's way of writing bytes as printable characters, which byte-level vocabularies are spelled in; used by the vocabulary check and by decoding. */

/** Character of each byte: itself when printable Latin-1, else U+0100 on. */
const CHARACTERS: readonly string[] = byteCharacters();

/** Byte of each character code, -1 where a code stands for none. */
const BYTES: Int16Array = byteCodes(CHARACTERS);

/**
 * The bytes that a token of a byte-level vocabulary stands for.
 *
 * @param token The token as the vocabulary spells it, such as `Ġthe`.
 * @returns Its bytes, or null when a character stands for no byte.
 */
export function tokenBytes(token: string): Uint8Array<ArrayBuffer> | null {
  const bytes = new Uint8Array(token.length);
  for (let i = 0; i < token.length; i++) {
    const byte = BYTES[token.charCodeAt(i)] ?? -1;
    if (byte < 0) return null;
    bytes[i] = byte;
  }
  return bytes;
}

/**
 * Whether a token is spelled in the byte characters alone.
 *
 * @param token The token as the vocabulary spells it.
 * @returns True when {@linkcode tokenBytes} would find bytes for it.
 */
export function isByteLevel(token: string): boolean {
  for (let i = 0; i < token.length; i++) {
    if ((BYTES[token.charCodeAt(i)] ?? -1) < 0) return false;
  }
  return true;
}

/**
 * Bytes as a byte-level vocabulary spells them.
 *
 * @param bytes Any bytes.
 * @returns One character a byte.
 */
export function spellBytes(bytes: Iterable<number>): string {
  let text = "";
  for (const byte of bytes) text += CHARACTERS[byte]!;
  return text;
}

function byteCharacters(): string[] {
  const characters: string[] = [];
  let spare = 256;
  for (let byte = 0; byte < 256; byte++) {
    const printable = byte >= 0x21 && byte <= 0x7e ||
      byte >= 0xa1 && byte !== 0xad;
    characters.push(String.fromCharCode(printable ? byte : spare++));
  }
  return characters;
}

function byteCodes(characters: readonly string[]): Int16Array {
  const codes = new Int16Array(512).fill(-1);
  characters.forEach((character, byte) => {
    codes[character.charCodeAt(0)] = byte;
  });
  return codes;
}
