/** The ways of splitting text into words that are known, and the places where all of them split; used to check a model's vocabulary and to encode. */

import { cutWhere } from "./cuts.ts";

/**
 * How one family of models splits text before merging: the only source of the
 * regular expressions that reach the native addon, which a hostile one kills.
 */
export interface PreTokenizer {
  /** Value of `tokenizer.ggml.pre`; the first is its usual name. */
  readonly names: readonly string[];
  /** The same as tokenizer.json's `pre_tokenizer`. */
  readonly json: unknown;
  /** Whether a word that is a token is taken whole, whatever the merges. */
  readonly ignoreMerges: boolean;
  /** Whether text is brought into Unicode's form NFC first. */
  readonly nfc: boolean;
  /** What `tokenizer.ggml.add_bos_token` means when a file leaves it out. */
  readonly addBos: boolean;
}

/** GPT-2's pattern is built into the addon. */
const GPT2 = {
  type: "ByteLevel",
  add_prefix_space: false,
  trim_offsets: true,
  use_regex: true,
};

/** Llama 3's pattern; Qwen2's differs in taking digits one by one. */
function split(digits: string): unknown {
  const pattern = "(?i:'s|'t|'re|'ve|'m|'ll|'d)" +
    "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+" +
    `|${digits}` +
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*" +
    "|\\s*[\\r\\n]+" +
    "|\\s+(?!\\S)" +
    "|\\s+";
  return sequence([
    {
      type: "Split",
      pattern: { Regex: pattern },
      behavior: "Isolated",
      invert: false,
    },
    { ...GPT2, use_regex: false },
  ]);
}

function sequence(pretokenizers: unknown[]): unknown {
  return { type: "Sequence", pretokenizers };
}

/** Every pre-tokenizer that is known. */
export const PRE_TOKENIZERS: readonly PreTokenizer[] = [
  {
    names: ["smollm"],
    json: sequence([{ type: "Digits", individual_digits: true }, GPT2]),
    ignoreMerges: false,
    nfc: false,
    addBos: false,
  },
  {
    names: ["gpt-2"],
    json: GPT2,
    ignoreMerges: false,
    nfc: false,
    addBos: false,
  },
  {
    names: ["llama-bpe", "llama3", "llama-v3"],
    json: split("\\p{N}{1,3}"),
    ignoreMerges: true,
    nfc: false,
    addBos: true,
  },
  {
    names: ["qwen2"],
    json: split("\\p{N}"),
    ignoreMerges: false,
    nfc: true,
    addBos: false,
  },
];

/**
 * The pre-tokenizer of a name.
 *
 * @param name Value of `tokenizer.ggml.pre`.
 * @returns It, or null when the name is not known.
 */
export function findPreTokenizer(name: string): PreTokenizer | null {
  return PRE_TOKENIZERS.find(({ names }) => names.includes(name)) ?? null;
}

/**
 * A place where every pre-tokenizer above splits, whatever stands around it:
 * no pattern goes on past a letter but into letters, past a number but into
 * numbers, past a sign into a blank; and none looks past one of these.
 */
export const cutWords = cutWhere(
  /(?<=\p{L})(?!\p{L})|(?<=\p{N})(?!\p{N})|(?<=[\p{P}\p{S}])(?= )/gu,
);
