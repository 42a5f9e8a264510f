/** The ways of splitting text into words that GGUF files name, as llama.cpp splits; used to read their vocabularies. */

import {
  ASCII_ENDINGS,
  asciiCased,
  CASED_ALPHABETS,
  EDGE,
  HAN,
  OTHER_SCRIPTS,
  UNSPACED,
  WIDE_SIGNS,
} from "./patterns.ts";

/** How one family of models splits text before merging. */
export interface PreTokenizer {
  /** Values of `tokenizer.ggml.pre`; the first is its usual name. */
  readonly names: readonly string[];
  /** Regular expressions that split one after another. */
  readonly expressions: readonly string[];
  /** Whether a word that is a token is taken whole, whatever the merges. */
  readonly ignoreMerges?: boolean;
  /** Whether text is brought into Unicode's form NFC first. */
  readonly nfc?: boolean;
  /** What `tokenizer.ggml.add_bos_token` means when a file leaves it out. */
  readonly addBos?: boolean;
}

const BLANKS = "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

const GPT2 =
  "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

/** Llama 3's pattern with other digits, endings or blanks. */
function llama3(
  digits: string,
  endings = `${ASCII_ENDINGS}|`,
  blanks = BLANKS,
): string {
  return `${endings}${EDGE}\\p{L}+|${digits}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|${blanks}`;
}

/** Words by case, with signs that paths are made of behind. */
function byCase(words: readonly string[], digits: string): string {
  return `${
    words.join("|")
  }|${digits}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|${BLANKS}`;
}

const ENDED = `${EDGE}[\\p{L}\\p{M}]+${ASCII_ENDINGS}?`;

/** Groups of three digits from the right; the first stays with the text before it. */
const DIGITS_FROM_RIGHT =
  "(?<!\\P{N})\\P{N}*+\\p{N}{1,3}(?=(?:\\p{N}{3})*+(?!\\p{N}))";

const KANA = "[一-龥\u3040-ゟ゠-ヿ]+";

/** DeepSeek's pattern since its third model, with other signs and breaks. */
function deepSeek3(tail: string): string {
  return "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+" +
    `|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+${tail}`;
}

const DEEPSEEK3 = deepSeek3(`[\\r\\n]*|${BLANKS}`);

/** Other scripts; of their range llama.cpp leaves blanks out. */
const OTHERS = `[[${OTHER_SCRIPTS}]&&[^\\s]]+`;
const BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+";

/** Every pre-tokenizer that is known. */
export const PRE_TOKENIZERS: readonly PreTokenizer[] = [
  {
    names: split(
      "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    ),
    expressions: ["\\p{N}", GPT2],
  },
  {
    names: split(
      "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert exaone4 mpt olmo jais trillion granite-docling",
    ),
    expressions: [GPT2],
  },
  {
    names: split(
      "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    ),
    expressions: [llama3("\\p{N}{1,3}")],
    ignoreMerges: true,
    addBos: true,
  },
  // Qwen2's own tokenizer brings text into NFC; llama.cpp leaves that out.
  { names: ["qwen2"], expressions: [llama3("\\p{N}")], nfc: true },
  {
    names: split(
      "deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2",
    ),
    expressions: [llama3("\\p{N}")],
  },
  {
    names: split("dbrx smaug-bpe glm4 chatglm-bpe"),
    expressions: [llama3("\\p{N}{1,3}")],
  },
  {
    names: ["qwen35"],
    expressions: [
      `${ASCII_ENDINGS}|${EDGE}[\\p{L}\\p{M}]+|\\p{N}| ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*|${BLANKS}`,
    ],
  },
  {
    names: ["default"],
    expressions: [
      "[\\p{P}\\$\\+<=>\\^~\\|]+",
      GPT2,
      "\\p{N}+",
      "[0-9][0-9][0-9]",
    ],
  },
  {
    names: ["deepseek-llm"],
    expressions: [
      "[\\r\\n]",
      `\\s?[${CASED_ALPHABETS}]+`,
      `\\s?[[${WIDE_SIGNS}]&&[^\\s]]+`,
      "\\s+$",
      OTHERS,
      "\\p{N}+",
    ],
  },
  {
    names: ["deepseek-coder"],
    expressions: [
      "[\\r\\n]",
      "\\s?\\p{L}+",
      "\\s?\\p{P}+",
      OTHERS,
      "\\p{N}",
    ],
  },
  {
    names: split("deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    expressions: ["\\p{N}{1,3}", KANA, DEEPSEEK3],
  },
  {
    names: ["spark2_5"],
    expressions: [
      "\\p{N}{1,3}",
      KANA,
      deepSeek3("|[\\r\\n]|\\s+(?!\\S)|\\s+"),
      "\\p{N}",
    ],
  },
  {
    names: ["youtu"],
    expressions: [
      `[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|${KANA}`,
      byCase([ENDED], "\\p{N}"),
    ],
    ignoreMerges: true,
  },
  {
    names: ["falcon"],
    expressions: ["[\\p{P}\\$\\+<=>\\^~\\|`]+", GPT2, "[0-9][0-9][0-9]"],
  },
  {
    names: split("bloom gpt3-finnish poro-chat"),
    expressions: [BLOOM],
  },
  { names: ["viking"], expressions: [BLOOM, "\\p{N}"] },
  {
    names: ["jais-2"],
    expressions: [
      llama3(
        "\\p{N}{1,3}",
        `${ASCII_ENDINGS}|`,
        `\\s*[\\r\\n]+|${
          [512, 256, 128, 64, 32, 16, 8, 4, "1,2"]
            .map((n) => `\\s{${n}}(?!\\S)`).join("|")
        }|\\s{1}`,
      ),
    ],
  },
  {
    names: ["tekken"],
    expressions: [byCase(asciiCased("\\p{L}", ""), "\\p{N}")],
    ignoreMerges: true,
    addBos: true,
  },
  {
    names: split("gpt-4o llama4 kanana2 talkie minimax-m2"),
    expressions: [
      byCase(asciiCased("\\p{L}", `${ASCII_ENDINGS}?`), "\\p{N}{1,3}"),
    ],
  },
  {
    names: ["granite-embed-multi-97m"],
    expressions: [
      byCase(asciiCased("\\p{L}\\p{M}", `${ASCII_ENDINGS}?`), "\\p{N}{1,3}"),
    ],
    ignoreMerges: true,
  },
  {
    names: split("tiny_aya cohere2moe"),
    expressions: [
      DIGITS_FROM_RIGHT,
      byCase([ENDED], "\\p{N}{1,3}"),
    ],
  },
  {
    names: ["superbpe"],
    expressions: ["\\p{N}+", "(?=([0-9]{3})+(?![0-9]))"],
  },
  {
    names: split("bailingmoe bailingmoe2 llada-moe"),
    expressions: [
      llama3(
        "\\p{N}",
        "'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|",
        "\\s*[\\r\\n]|\\s+(?!\\S)|\\s+",
      ),
    ],
  },
  {
    names: ["seed-coder"],
    expressions: [
      `${ASCII_ENDINGS}|${EDGE}\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\\r\\n]+|${BLANKS}`,
    ],
  },
  { names: ["ufakzeka"], expressions: [llama3("\\p{N}", "")] },
  {
    names: ["minicpm5"],
    expressions: ["\\p{N}{1,3}", llama3("\\p{N}+")],
    ignoreMerges: true,
  },
  {
    names: ["afmoe"],
    expressions: [
      DIGITS_FROM_RIGHT,
      `[${UNSPACED}]+`,
      DEEPSEEK3,
    ],
  },
  { names: ["laguna"], expressions: ["[^\\n]+|[\\n]+", llama3("\\p{N}")] },
  {
    names: ["exaone-moe"],
    expressions: [
      `${ASCII_ENDINGS}|${EDGE}(?:\\p{L}\\p{M}*(?: \\p{L}\\p{M}*)*)+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]?|\\s*[\\r\\n]|\\s+(?!\\S)|\\s+`,
    ],
  },
  {
    names: ["chameleon"],
    expressions: [
      "<sentinel:[0-9]+>",
      "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
      "([\\t\\n]|    |  )",
      "\\p{N}",
      "[\\p{P}!-/:-@\\[-`{-~]",
      GPT2,
    ],
    addBos: true,
  },
  {
    names: ["kimi-k2"],
    expressions: [
      `[${HAN}]+|${EDGE}[\\p{L}&&[^${HAN}]]+${ASCII_ENDINGS}?|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|${BLANKS}`,
    ],
  },
];

function split(names: string): string[] {
  return names.split(" ");
}

/**
 * The pre-tokenizer of a name.
 *
 * @param name Value of `tokenizer.ggml.pre`.
 * @returns It, or null when the name is not known.
 */
export function findPreTokenizer(name: string): PreTokenizer | null {
  return PRE_TOKENIZERS.find(({ names }) => names.includes(name)) ?? null;
}
