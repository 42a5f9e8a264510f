/** SentencePiece's BPE: the pair whose token has the best score is merged first, the leftmost of equals; used by the tokenizers of GGUF files, as the native addon knows ranks only. */

import { type Bpe, KIND } from "./bpe.ts";
import { type Cut, cutBetweenTokens } from "./cuts.ts";
import type { Encoder } from "./vocabulary_tokenizer.ts";

/** What an encoder of this kind needs. */
export interface SentencePieceOptions {
  /** Score of every token. */
  readonly scores: ArrayLike<number>;
  /** Id of the token for what has no other; null for none. */
  readonly unknown: number | null;
}

/** UTF-16 units that take some milliseconds. */
const LONG = 8 * 1024;

/** Encodes by scores, in n log n steps for n characters. */
export class SentencePieceEncoder implements Encoder {
  readonly cut: Cut;
  /** Tokens that text may become. */
  readonly #ids: ReadonlyMap<string, number>;
  readonly #scores: ArrayLike<number>;
  /** Tokens of the 256 bytes, or what stands for them. */
  readonly #bytes: readonly (number | null)[];

  /**
   * Takes a vocabulary, checked.
   *
   * @param bpe The vocabulary.
   * @param options What else it needs.
   */
  constructor(bpe: Bpe, options: SentencePieceOptions) {
    // Control tokens and bytes never come of text that spells them, as in
    // SentencePiece itself; llama.cpp would merge them.
    this.#ids = new Map(
      [...bpe.ids].filter(([, id]) => {
        const kind = bpe.kinds[id];
        return kind === KIND.normal || kind === KIND.userDefined ||
          kind === KIND.unused;
      }),
    );
    this.#scores = options.scores;
    this.#bytes = Array.from({ length: 256 }, (_, byte) => {
      const hex = byte.toString(16).toUpperCase().padStart(2, "0");
      return bpe.ids.get(`<0x${hex}>`) ?? options.unknown;
    });
    this.cut = cutBetweenTokens(() => this.#ids.keys());
  }

  async encode(text: string): Promise<readonly number[]> {
    // Between the pieces of a long text others have their turn.
    if (text.length > LONG) await new Promise((done) => setTimeout(done, 0));
    return this.#encode(text);
  }

  #encode(text: string): number[] {
    const characters = [...text];
    const count = characters.length;
    // Where each symbol begins, and where the text ends.
    const starts = new Uint32Array(count + 1);
    for (let i = 0; i < count; i++) {
      starts[i + 1] = starts[i]! + characters[i]!.length;
    }
    // Each symbol by its first character: the one before, the one behind, and
    // its length in UTF-16 units; 0 once it is merged away.
    const before = Int32Array.from({ length: count }, (_, i) => i - 1);
    const behind = Int32Array.from({ length: count }, (_, i) => i + 1);
    const lengths = Uint32Array.from(characters, ({ length }) => length);
    const textOf = (left: number, length: number): string =>
      text.slice(starts[left]!, starts[left]! + length);
    const queue = new Queue();
    const add = (left: number, right: number): void => {
      if (left < 0 || right >= count) return;
      const length = lengths[left]! + lengths[right]!;
      const id = this.#ids.get(textOf(left, length));
      if (id !== undefined) {
        queue.push({ score: this.#scores[id]!, left, right, length });
      }
    };
    for (let i = 1; i < count; i++) add(i - 1, i);
    for (let pair = queue.pop(); pair !== null; pair = queue.pop()) {
      const { left, right, length } = pair;
      // One of the two was merged meanwhile.
      if (
        lengths[left] === 0 || lengths[right] === 0 ||
        lengths[left]! + lengths[right]! !== length
      ) continue;
      lengths[left] = length;
      lengths[right] = 0;
      behind[left] = behind[right]!;
      if (behind[left]! < count) before[behind[left]!] = left;
      add(before[left]!, left);
      add(left, behind[left]!);
    }
    const ids: number[] = [];
    for (let i = 0; i < count; i = behind[i]!) {
      const symbol = textOf(i, lengths[i]!);
      const id = this.#ids.get(symbol);
      if (id !== undefined) ids.push(id);
      else for (const one of this.#spell(symbol)) ids.push(one);
    }
    return ids;
  }

  /** The tokens of a character's bytes. */
  #spell(character: string): number[] {
    return [...new TextEncoder().encode(character)]
      .flatMap((byte) => this.#bytes[byte] ?? []);
  }
}

/** Two symbols that stand side by side and make a token. */
interface Pair {
  score: number;
  left: number;
  right: number;
  length: number;
}

/** The pairs, the best one first: a binary heap. */
class Queue {
  readonly #pairs: Pair[] = [];

  push(pair: Pair): void {
    const pairs = this.#pairs;
    let at = pairs.push(pair) - 1;
    while (at > 0) {
      const parent = (at - 1) >> 1;
      if (!isBefore(pair, pairs[parent]!)) break;
      pairs[at] = pairs[parent]!;
      at = parent;
    }
    pairs[at] = pair;
  }

  pop(): Pair | null {
    const pairs = this.#pairs;
    const top = pairs[0];
    if (top === undefined) return null;
    const last = pairs.pop()!;
    if (pairs.length === 0) return top;
    let at = 0;
    for (;;) {
      let child = 2 * at + 1;
      if (child >= pairs.length) break;
      const next = pairs[child + 1];
      if (next !== undefined && isBefore(next, pairs[child]!)) child++;
      if (!isBefore(pairs[child]!, last)) break;
      pairs[at] = pairs[child]!;
      at = child;
    }
    pairs[at] = last;
    return top;
  }
}

function isBefore(a: Pair, b: Pair): boolean {
  return a.score > b.score || a.score === b.score && a.left < b.left;
}
