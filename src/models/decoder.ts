/** The weights of a decoder and the pass over them: RMSNorm, rotary attention with grouped heads, a gated feed-forward part; used by the architectures. */

import type { Backend } from "../backend/backend.ts";
import {
  embed,
  gated,
  linear,
  type Norm,
  qkNorm,
  rmsnorm,
  softcap,
} from "../backend/ops.ts";
import { Tensor } from "../backend/tensor.ts";
import type { ModelConfig, Network, Pass } from "./architecture.ts";
import type { Rope } from "./rope.ts";
import type { Part, WeightSource } from "./weights.ts";

/** How an architecture's files hold the weights. */
export interface DecoderOptions {
  /** Queries, keys and values are one matrix in the file, and gate and up too. @default `false` */
  fused?: boolean;
}

// ---- weights ----

interface Projection {
  weight: Tensor;
  /** `[1, J]`; undefined for none. */
  bias: Tensor | undefined;
}

interface Block {
  attentionNorm: Norm | undefined;
  /** One matrix `[(H + 2 N) D, C]`, or queries, keys and values apart. */
  qkv: Projection[];
  /** Norms of queries and keys. */
  qkNorm: { q: Norm; k: Norm } | undefined;
  output: Projection;
  /** Of what attention gives. */
  postAttentionNorm: Norm | undefined;
  feedForwardNorm: Norm | undefined;
  gate: Tensor;
  up: Tensor;
  down: Tensor;
  /** Of what the feed-forward part gives. */
  postFeedForwardNorm: Norm | undefined;
}

interface Weights {
  embedding: Tensor;
  blocks: Block[];
  norm: Norm;
  /** `[vocabulary, C]`; the embedding where the file has none of its own. */
  head: Tensor;
}

/**
 * Loads the weights.
 *
 * @throws {FormatError} One is missing, of another shape or of an unknown type.
 */
export async function loadDecoder(
  backend: Backend,
  config: ModelConfig,
  loader: WeightSource,
  { fused = false }: DecoderOptions = {},
): Promise<Network> {
  const { layers, width, vocabulary } = config;
  const from: Reading = { backend, config, loader, fused };
  await loadRopeFactors(config.rope, loader);
  const tied = config.tied ?? !loader.has("output.weight");
  const embedding = await loader.matrix("token_embd.weight", vocabulary, width);
  const blocks: Block[] = [];
  for (let i = 0; i < layers; i++) blocks.push(await loadBlock(from, i));
  const weights: Weights = {
    embedding,
    blocks,
    norm: await loadNorm(from, "output_norm.weight"),
    head: tied
      ? embedding
      : await loader.matrix("output.weight", vocabulary, width),
  };
  return {
    bytes: loader.bytes,
    // The head is read whole, whether or not it is the embedding.
    stepBytes: loader.bytes -
      (weights.head === embedding ? 0 : embedding.rowBytes * vocabulary),
    forward: (pass) => forward(backend, config, weights, pass),
  };
}

/** What weights are read from, and for. */
interface Reading {
  backend: Backend;
  config: ModelConfig;
  loader: WeightSource;
  fused: boolean;
}

async function loadBlock(from: Reading, index: number): Promise<Block> {
  const { config, loader, fused } = from;
  const { width, hidden, heads, headDim } = config;
  const { biases = "none", norms = "before" } = config;
  const block = `blk.${index}`;
  const before = (name: string) =>
    norms === "after" ? undefined : loadNorm(from, `${block}.${name}.weight`);
  const after = (name: string) =>
    norms === "before" ? undefined : loadNorm(from, `${block}.${name}.weight`);
  const projections = (parts: Part[], columns: number, biased: boolean) =>
    loadProjections(from, block, parts, columns, biased);
  const ofAttention = attentionParts(config, fused);
  return {
    attentionNorm: await before("attn_norm"),
    qkv: await projections(ofAttention, width, biases !== "none"),
    qkNorm: await loadQkNorm(from, block),
    output: (await projections(
      [["attn_output", width]],
      heads * headDim,
      biases === "all",
    ))[0]!,
    postAttentionNorm: await after("post_attention_norm"),
    feedForwardNorm: await before("ffn_norm"),
    ...await loadGateAndUp(from, block),
    down: await loader.matrix(`${block}.ffn_down.weight`, width, hidden),
    postFeedForwardNorm: await after("post_ffw_norm"),
  };
}

async function loadNorm(
  { backend, config, loader }: Reading,
  name: string,
  columns = config.width,
  repeat = (weight: Float32Array<ArrayBuffer>) => weight,
): Promise<Norm> {
  const { epsilon, normOffset = 0 } = config;
  const stored = await loader.floats(name, columns);
  const weight = repeat(stored.map((w) => w + normOffset));
  return { weight: Tensor.from(backend, weight), epsilon };
}

async function loadQkNorm(
  from: Reading,
  block: string,
): Promise<Block["qkNorm"]> {
  const { heads, headDim, kvHeads, storedKvHeads = kvHeads, qkNorm } =
    from.config;
  if (qkNorm === undefined) return undefined;
  const all = qkNorm === "all";
  const of = (part: string) => `${block}.attn_${part}_norm.weight`;
  return {
    q: await loadNorm(from, of("q"), (all ? heads : 1) * headDim),
    k: await loadNorm(
      from,
      of("k"),
      (all ? storedKvHeads : 1) * headDim,
      all ? (weight) => repeatHeads(weight, storedKvHeads, kvHeads) : undefined,
    ),
  };
}

/** Parts with their biases, as one matrix where their types are the same. */
async function loadProjections(
  { backend, loader }: Reading,
  block: string,
  parts: readonly Part[],
  columns: number,
  biased: boolean,
): Promise<Projection[]> {
  const of = (kind: string) =>
    parts.map(([name, ...rest]): Part => [`${block}.${name}.${kind}`, ...rest]);
  const weights = await loader.matrices(of("weight"), columns);
  const bias = of("bias");
  const all: Projection[] = [];
  for (const [i, weight] of weights.entries()) {
    const own = weights.length === 1 ? bias : [bias[i]!];
    all.push({
      weight,
      bias: biased ? await loadVectors(backend, loader, own) : undefined,
    });
  }
  return all;
}

async function loadVectors(
  backend: Backend,
  loader: WeightSource,
  parts: readonly Part[],
): Promise<Tensor> {
  const all: number[] = [];
  for (const [name, rows, { from, of } = { from: 0, of: rows }] of parts) {
    const whole = await loader.floats(name, of);
    all.push(...whole.subarray(from, from + rows));
  }
  return Tensor.from(backend, Float32Array.from(all));
}

async function loadGateAndUp(
  { config: { width, hidden }, loader, fused }: Reading,
  block: string,
): Promise<Pick<Block, "gate" | "up">> {
  const name = `${block}.ffn_up.weight`;
  if (!fused) {
    const gate = `${block}.ffn_gate.weight`;
    return {
      gate: await loader.matrix(gate, hidden, width),
      up: await loader.matrix(name, hidden, width),
    };
  }
  const half = async (from: number) =>
    (await loader.matrices(
      [[name, hidden, { from, of: 2 * hidden }]],
      width,
    ))[0]!;
  return { gate: await half(0), up: await half(hidden) };
}

/** Divides frequencies by the factors that are tensors: one list, or LongRoPE's two. */
async function loadRopeFactors(
  rope: Rope,
  loader: WeightSource,
): Promise<void> {
  const plain = rope.frequencies;
  const divided = async (name: string) => {
    const factors = await loader.floats(`${name}.weight`, plain.length);
    return plain.map((f, i) => f / factors[i]!);
  };
  if (loader.has("rope_freqs.weight")) {
    rope.frequencies = await divided("rope_freqs");
  } else if (loader.has("rope_factors_long.weight")) {
    const far = await divided("rope_factors_long");
    rope.frequencies = await divided("rope_factors_short");
    if (rope.longer) rope.longer.at = () => far;
  }
}

/** The rows of queries, keys and values; KV heads that the file has fewer of are repeated. */
function attentionParts(config: ModelConfig, fused: boolean): Part[] {
  const { heads, kvHeads, headDim } = config;
  const stored = config.storedKvHeads ?? kvHeads;
  if (stored === kvHeads) {
    return fused ? [["attn_qkv", (heads + 2 * kvHeads) * headDim]] : [
      ["attn_q", heads * headDim],
      ["attn_k", kvHeads * headDim],
      ["attn_v", kvHeads * headDim],
    ];
  }
  const of = (heads + 2 * stored) * headDim;
  const repeated = (name: string, first: number): Part[] =>
    Array.from({ length: kvHeads }, (_, head) => {
      const from = Math.floor(head * stored / kvHeads) * headDim;
      return fused
        ? ["attn_qkv", headDim, { from: first * headDim + from, of }]
        : [name, headDim, { from, of: stored * headDim }];
    });
  const queries: Part = fused
    ? ["attn_qkv", heads * headDim, { from: 0, of }]
    : ["attn_q", heads * headDim];
  return [
    queries,
    ...repeated("attn_k", heads),
    ...repeated("attn_v", heads + stored),
  ];
}

/** The weights of key heads, each repeated for the heads that stand for it. */
function repeatHeads(
  weight: Float32Array<ArrayBuffer>,
  stored: number,
  heads: number,
): Float32Array<ArrayBuffer> {
  const headDim = weight.length / stored;
  return Float32Array.from(
    { length: heads * headDim },
    (_, i) =>
      weight[
        Math.floor(Math.floor(i / headDim) * stored / heads) * headDim +
        i % headDim
      ]!,
  );
}

// ---- forward pass ----

function forward(
  backend: Backend,
  config: ModelConfig,
  weights: Weights,
  pass: Pass,
): void {
  const { x } = pass.activations;
  embed(backend, x, weights.embedding, pass.tokens, {
    rows: pass.rows,
    scale: config.embeddingScale,
  });
  weights.blocks.forEach((block, layer) => {
    attention(backend, config, block, layer, pass);
    feedForward(backend, config, block, pass);
  });
  if (pass.logits) head(backend, config, weights, pass, pass.logits);
}

/** x += norm(attention(norm(x) [q; k; v]^T) output^T), either norm where there is one */
function attention(
  backend: Backend,
  config: ModelConfig,
  block: Block,
  layer: number,
  pass: Pass,
): void {
  const { cache, rows, sequence, precision } = pass;
  const { x, qkv, attended } = pass.activations;
  const norm = block.attentionNorm;
  let outColumn = 0;
  for (const { weight, bias } of block.qkv) {
    linear(backend, qkv, x, weight, { rows, norm, bias, outColumn, precision });
    outColumn += weight.rows;
  }
  if (block.qkNorm) {
    const { heads, kvHeads, headDim } = config;
    qkNorm(backend, qkv, block.qkNorm, { rows, heads, kvHeads, headDim });
  }
  if (sequence === null) cache.attend(layer, attended, qkv);
  else cache.prefill(layer, sequence, attended, qkv, rows);
  addBranch(backend, attended, block.output, block.postAttentionNorm, pass);
}

/** x += norm((activation(norm(x) gate^T) * (norm(x) up^T)) down^T), either norm where there is one */
function feedForward(
  backend: Backend,
  config: ModelConfig,
  block: Block,
  pass: Pass,
): void {
  const { rows, precision } = pass;
  const { x, hidden } = pass.activations;
  const norm = block.feedForwardNorm;
  const { activation } = config;
  gated(backend, hidden, x, block.gate, block.up, {
    rows,
    norm,
    activation,
    precision,
  });
  const down = { weight: block.down, bias: undefined };
  addBranch(backend, hidden, down, block.postFeedForwardNorm, pass);
}

/** x += norm(from weight^T + bias), without the norm where there is none */
function addBranch(
  backend: Backend,
  from: Tensor,
  { weight, bias }: Projection,
  norm: Norm | undefined,
  pass: Pass,
): void {
  const { rows, precision } = pass;
  const { x, branch } = pass.activations;
  if (norm === undefined || branch === undefined) {
    linear(backend, x, from, weight, { rows, bias, add: true, precision });
  } else {
    linear(backend, branch, from, weight, { rows, bias, precision });
    rmsnorm(backend, x, branch, norm, { rows, add: true });
  }
}

/** logits = norm(x) head^T, for the last rows */
function head(
  backend: Backend,
  config: ModelConfig,
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
  const { logitCap } = config;
  if (logitCap) softcap(backend, logits, logits.rows, logitCap);
}
