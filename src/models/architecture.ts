/** What an architecture gives: its configuration from a GGUF header or a config.json, its weights, and its forward pass. */

import type { Backend } from "../backend/backend.ts";
import type { Activation, Precision } from "../backend/ops.ts";
import type { Tensor } from "../backend/tensor.ts";
import type { KvCache } from "../cache/cache.ts";
import type { ConfigFile } from "../formats/config.ts";
import type { GgufFile } from "../formats/gguf.ts";
import type { Rope } from "./rope.ts";
import type { WeightSource } from "./weights.ts";

/** Layers whose tokens see those closest behind them only. */
export interface SlidingWindow {
  /** Tokens that one sees, itself counted. */
  tokens: number;
  /** Whether layer i has the window. */
  layers: readonly boolean[];
  /** The rotation of these layers. @default the model's */
  rope?: Rope | undefined;
}

/** The numbers of a model, from its file. */
export interface ModelConfig {
  /** The architecture's name in the file. */
  architecture: string;
  /** Transformer blocks. */
  layers: number;
  /** Columns of the residual stream, C. */
  width: number;
  /** Columns inside the feed-forward part. */
  hidden: number;
  /** Query heads, H. */
  heads: number;
  /** Key and value heads, N. */
  kvHeads: number;
  /** Those that the file has, where each is repeated. @default kvHeads */
  storedKvHeads?: number;
  /** Dimensions of a head, D. */
  headDim: number;
  /** Rows of the embedding: token ids are below it. */
  vocabulary: number;
  /** Tokens that the model was trained on at once. */
  context: number;
  /** Epsilon of its norms. */
  epsilon: number;
  /** Rotation of queries and keys. */
  rope: Rope;
  /** What products of queries and keys are multiplied by. @default 1 / sqrt(D) */
  scale?: number;
  /** Scores s become cap tanh(s / cap). @default none */
  scoreCap?: number | undefined;
  /** The same for logits. @default none */
  logitCap?: number | undefined;
  /** Layers that look back on some tokens only. @default none */
  window?: SlidingWindow | undefined;
  /** What embeddings are multiplied by. @default 1 */
  embeddingScale?: number | undefined;
  /** What the gate of the feed-forward part goes through. @default `"silu"` */
  activation?: Activation | undefined;
  /** Where a block's norms stand: before its parts, after them, or both. @default `"before"` */
  norms?: "before" | "after" | "both" | undefined;
  /** What is added to every norm's weight. @default 0 */
  normOffset?: number | undefined;
  /** Norms of queries and keys, of each head or of all together. @default none */
  qkNorm?: "head" | "all" | undefined;
  /** Which projections of attention have biases: those in, or the output too. @default `"none"` */
  biases?: "none" | "qkv" | "all";
  /** Whether the head is the embedding. @default where the file has no head */
  tied?: boolean;
  /** Ids that end a text, where the configuration names them. */
  endTokens?: readonly number[];
}

/** One forward pass over some rows: a decode step or a stretch of a prompt. */
export interface Pass {
  /** The cache that attention goes through. */
  cache: KvCache;
  /** Token ids, I32 `[1, >= rows]`. */
  tokens: Tensor;
  /** Rows: the cache's sequences, or the tokens of one sequence. */
  rows: number;
  /** The sequence that all rows belong to; null for one row a sequence. */
  sequence: number | null;
  /** Gets the logits `[n, vocabulary]` of the last n rows; null for none. */
  logits: Tensor | null;
  /** Memory between the steps. */
  activations: Activations;
  /** How linear ops hold their input where weights are quantised. */
  precision: Precision;
}

/** Memory that a pass of at most `rows` rows needs. */
export interface Activations {
  /** Residual stream `[rows, C]`. */
  x: Tensor;
  /** Queries, keys, values `[rows, (H + 2 N) D]`. */
  qkv: Tensor;
  /** What attention gives, `[rows, H D]`. */
  attended: Tensor;
  /** Inside the feed-forward part, `[rows, hidden]`. */
  hidden: Tensor;
  /** What a part of a block gives, before its norm, `[rows, C]`; absent where no norm stands behind one. */
  branch?: Tensor | undefined;
}

/** A model's weights with the pass over them. */
export interface Network {
  /** Bytes of its weights. */
  readonly bytes: number;
  /** Bytes of them that a decode step reads; of an embedding it reads rows. */
  readonly stepBytes: number;
  /** Runs, or records, one pass. */
  forward(pass: Pass): void;
}

/** One architecture; each file in this folder that mod.ts lists holds one. */
export interface Architecture {
  /** Its name. */
  readonly name: string;
  /** GGUF files of this `general.architecture`; null where none are taken. */
  readonly gguf: {
    /** The name in the file. */
    readonly name: string;
    /**
     * Reads and checks the configuration.
     *
     * @throws {FormatError} A key is missing or out of range.
     */
    config(file: GgufFile): ModelConfig;
  } | null;
  /** Hugging Face folders. */
  readonly huggingFace: {
    /** What `architectures` holds in config.json. */
    readonly classes: readonly string[];
    /**
     * Reads and checks the configuration.
     *
     * @throws {FormatError} A key is missing or out of range.
     */
    config(file: ConfigFile): ModelConfig;
    /** Names of tensors; see safetensorsWeights in weights.ts. */
    readonly tensors: Readonly<Record<string, string>>;
  };
  /** Loads the weights. */
  load(
    backend: Backend,
    config: ModelConfig,
    weights: WeightSource,
  ): Promise<Network>;
}
