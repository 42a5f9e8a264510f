/** The Llama architecture: Llama 1 to 3, SmolLM and TinyLlama; called by Model. */

import type { Backend } from "../backend/backend.ts";
import { embed, gated, linear, type Norm } from "../backend/ops.ts";
import type { Tensor } from "../backend/tensor.ts";
import { FormatError } from "../formats/error.ts";
import type { GgufFile } from "../formats/gguf.ts";
import type {
  Architecture,
  ModelConfig,
  Network,
  Pass,
} from "./architecture.ts";
import type { WeightSource } from "./weights.ts";

/** Llama: RMSNorm, rotary attention with grouped heads, SwiGLU. */
export const llama: Architecture = { name: "llama", config, load };

// ---- configuration ----

function config(file: GgufFile): ModelConfig {
  const of = (key: string) => `llama.${key}`;
  const layers = file.integer(of("block_count"), { min: 1, max: 1024 });
  const width = file.integer(of("embedding_length"), { min: 8, max: 1 << 16 });
  const heads = file.integer(of("attention.head_count"), {
    min: 1,
    max: 1024,
  });
  const kvHeads = file.integer(of("attention.head_count_kv"), {
    min: 1,
    max: heads,
    fallback: heads,
  });
  if (heads % kvHeads !== 0) {
    throw new FormatError(
      file.path,
      of("attention.head_count_kv"),
      `the value is ${kvHeads}, expected a divisor of the ${heads} query heads`,
    );
  }
  const headDim = file.integer(of("attention.key_length"), {
    min: 2,
    max: 512,
    fallback: width / heads,
  });
  if (width % heads !== 0 && !file.metadata.has(of("attention.key_length"))) {
    throw new FormatError(
      file.path,
      of("attention.head_count"),
      `the value is ${heads}, expected a divisor of the embedding length ${width}`,
    );
  }
  const base = file.float(of("rope.freq_base"), {
    min: 1,
    max: 1e12,
    fallback: 10000,
  });
  const rotary = file.integer(of("rope.dimension_count"), {
    min: 2,
    max: headDim,
    fallback: headDim,
  });
  return {
    architecture: "llama",
    layers,
    width,
    hidden: file.integer(of("feed_forward_length"), { min: 1, max: 1 << 20 }),
    heads,
    kvHeads,
    headDim,
    vocabulary: file.tensor("token_embd.weight").shape[1] ?? 1,
    context: file.integer(of("context_length"), { min: 1, max: 1 << 24 }),
    epsilon: file.float(of("attention.layer_norm_rms_epsilon"), {
      min: Number.MIN_VALUE,
      max: 1,
    }),
    rope: {
      // Files of this architecture hold Q and K with their rows so permuted.
      pairs: "interleaved",
      frequencies: frequencies(file, base, rotary),
    },
  };
}

function frequencies(
  file: GgufFile,
  base: number,
  rotary: number,
): Float32Array<ArrayBuffer> {
  const type = file.string("llama.rope.scaling.type", "none");
  const factor = file.float("llama.rope.scaling.factor", {
    min: Number.MIN_VALUE,
    max: 1e6,
    fallback: 1,
  });
  if (type !== "none" && type !== "linear") {
    throw new FormatError(
      file.path,
      "llama.rope.scaling.type",
      `the scaling "${type}" is not supported yet, expected none or linear`,
    );
  }
  const scale = type === "linear" ? 1 / factor : 1;
  return Float32Array.from(
    { length: Math.floor(rotary / 2) },
    (_, i) => scale * base ** (-2 * i / rotary),
  );
}

// ---- weights ----

interface Block {
  attentionNorm: Norm;
  /** One matrix `[(H + 2 N) D, C]`, or queries, keys and values apart. */
  qkv: Tensor[];
  output: Tensor;
  feedForwardNorm: Norm;
  gate: Tensor;
  up: Tensor;
  down: Tensor;
}

interface Weights {
  embedding: Tensor;
  blocks: Block[];
  norm: Norm;
  /** `[vocabulary, C]`; the embedding where the file has none of its own. */
  head: Tensor;
}

async function load(
  backend: Backend,
  config: ModelConfig,
  loader: WeightSource,
): Promise<Network> {
  const { layers, width, hidden, heads, kvHeads, headDim, vocabulary } = config;
  const norm = async (name: string): Promise<Norm> => ({
    weight: await loader.vector(name, width),
    epsilon: config.epsilon,
  });
  if (loader.has("rope_freqs.weight")) {
    const { frequencies } = config.rope;
    const factors = await loader.floats(
      "rope_freqs.weight",
      frequencies.length,
    );
    frequencies.forEach((f, i) => frequencies[i] = f / factors[i]!);
  }
  const embedding = await loader.matrix("token_embd.weight", vocabulary, width);
  const blocks: Block[] = [];
  for (let i = 0; i < layers; i++) {
    const of = (name: string) => `blk.${i}.${name}.weight`;
    blocks.push({
      attentionNorm: await norm(of("attn_norm")),
      qkv: await loader.matrices([
        [of("attn_q"), heads * headDim],
        [of("attn_k"), kvHeads * headDim],
        [of("attn_v"), kvHeads * headDim],
      ], width),
      output: await loader.matrix(of("attn_output"), width, heads * headDim),
      feedForwardNorm: await norm(of("ffn_norm")),
      gate: await loader.matrix(of("ffn_gate"), hidden, width),
      up: await loader.matrix(of("ffn_up"), hidden, width),
      down: await loader.matrix(of("ffn_down"), width, hidden),
    });
  }
  const weights: Weights = {
    embedding,
    blocks,
    norm: await norm("output_norm.weight"),
    head: loader.has("output.weight")
      ? await loader.matrix("output.weight", vocabulary, width)
      : embedding,
  };
  return {
    bytes: loader.bytes,
    // The head is read whole, whether or not it is the embedding.
    stepBytes: loader.bytes -
      (weights.head === embedding ? 0 : embedding.rowBytes * vocabulary),
    forward: (pass) => forward(backend, weights, pass),
  };
}

// ---- forward pass ----

function forward(backend: Backend, weights: Weights, pass: Pass): void {
  const { x } = pass.activations;
  embed(backend, x, weights.embedding, pass.tokens, pass.rows);
  weights.blocks.forEach((block, layer) => {
    attention(backend, block, layer, pass);
    feedForward(backend, block, pass);
  });
  if (pass.logits) head(backend, weights, pass, pass.logits);
}

/** x += attention(norm(x) [q; k; v]^T) output^T */
function attention(
  backend: Backend,
  block: Block,
  layer: number,
  pass: Pass,
): void {
  const { cache, rows, sequence, precision } = pass;
  const { x, qkv, attended } = pass.activations;
  const norm = block.attentionNorm;
  let outColumn = 0;
  for (const w of block.qkv) {
    linear(backend, qkv, x, w, { rows, norm, outColumn, precision });
    outColumn += w.rows;
  }
  if (sequence === null) cache.attend(layer, attended, qkv);
  else cache.prefill(layer, sequence, attended, qkv, rows);
  linear(backend, x, attended, block.output, { rows, add: true, precision });
}

/** x += (silu(norm(x) gate^T) * (norm(x) up^T)) down^T */
function feedForward(backend: Backend, block: Block, pass: Pass): void {
  const { rows, precision } = pass;
  const { x, hidden } = pass.activations;
  const norm = block.feedForwardNorm;
  gated(backend, hidden, x, block.gate, block.up, { rows, norm, precision });
  linear(backend, x, hidden, block.down, { rows, add: true, precision });
}

/** logits = norm(x) head^T, for the last rows */
function head(
  backend: Backend,
  weights: Weights,
  pass: Pass,
  logits: Tensor,
): void {
  const { rows, precision } = pass;
  linear(backend, logits, pass.activations.x, weights.head, {
    rows: logits.rows,
    xRow: rows - logits.rows,
    norm: weights.norm,
    precision,
  });
}
