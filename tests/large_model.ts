/** Writes Llama models of some hundred megabytes in each format, a piece at a time; used by tests of the memory that loading takes. */

import { ggufBytes, i32s, strings, u32 } from "./gguf_writer.ts";
import { f32, type FieldValue, type TensorInput } from "./gguf_writer.ts";
import { spellBytes } from "../src/tokenizer/byte_map.ts";
import { rawSafetensors } from "./safetensors_writer.ts";

/** How a model is written. */
export type LargeFormat = "safetensors" | "sharded" | "gguf" | "gguf Q8_0";

const WIDTH = 1024, HIDDEN = 4096, HEADS = 8, VOCABULARY = 257;
/** Bytes of random numbers that are written again and again: F16 below 1. */
const POOL = 8 << 20;

interface Entry {
  /** Its name in GGUF files, and in safetensors. */
  names: readonly [string, string];
  /** Its dimensions, the row length last. */
  shape: readonly number[];
}

/** Writes a model of that many layers, each of 32 MiB in F16; gives the path to load. */
export async function writeLargeModel(
  folder: string,
  format: LargeFormat,
  layers: number,
): Promise<string> {
  const entries = entriesOf(layers);
  if (format === "gguf" || format === "gguf Q8_0") {
    const path = `${folder}/model.gguf`;
    await writeGguf(path, entries, layers, format === "gguf" ? "F16" : "Q8_0");
    return path;
  }
  await Deno.writeTextFile(
    `${folder}/config.json`,
    JSON.stringify({
      architectures: ["LlamaForCausalLM"],
      hidden_size: WIDTH,
      intermediate_size: HIDDEN,
      max_position_embeddings: 256,
      num_attention_heads: HEADS,
      num_hidden_layers: layers,
      num_key_value_heads: HEADS,
      rms_norm_eps: 1e-5,
      vocab_size: VOCABULARY,
      tie_word_embeddings: true,
    }),
  );
  if (format === "safetensors") {
    await writeSafetensors(`${folder}/model.safetensors`, entries);
    return folder;
  }
  const map: Record<string, string> = {};
  for (let shard = 0; shard < 3; shard++) {
    const name = `model-0000${shard + 1}-of-00003.safetensors`;
    const own = entries.filter((_, i) => i % 3 === shard);
    for (const { names } of own) map[names[1]] = name;
    await writeSafetensors(`${folder}/${name}`, own);
  }
  await Deno.writeTextFile(
    `${folder}/model.safetensors.index.json`,
    JSON.stringify({ weight_map: map }),
  );
  return folder;
}

function entriesOf(layers: number): Entry[] {
  const entries: Entry[] = [
    {
      names: ["token_embd.weight", "model.embed_tokens.weight"],
      shape: [VOCABULARY, WIDTH],
    },
    { names: ["output_norm.weight", "model.norm.weight"], shape: [WIDTH] },
  ];
  for (let i = 0; i < layers; i++) {
    const add = (gguf: string, own: string, shape: readonly number[]) =>
      entries.push({
        names: [`blk.${i}.${gguf}.weight`, `model.layers.${i}.${own}.weight`],
        shape,
      });
    const square = [WIDTH, WIDTH];
    add("attn_norm", "input_layernorm", [WIDTH]);
    add("attn_q", "self_attn.q_proj", square);
    add("attn_k", "self_attn.k_proj", square);
    add("attn_v", "self_attn.v_proj", square);
    add("attn_output", "self_attn.o_proj", square);
    add("ffn_norm", "post_attention_layernorm", [WIDTH]);
    add("ffn_gate", "mlp.gate_proj", [HIDDEN, WIDTH]);
    add("ffn_up", "mlp.up_proj", [HIDDEN, WIDTH]);
    add("ffn_down", "mlp.down_proj", [WIDTH, HIDDEN]);
  }
  return entries;
}

const count = (shape: readonly number[]) => shape.reduce((a, b) => a * b);

/** Random F16 numbers between -1 / 16 and 1 / 16. */
function halves(): Uint8Array<ArrayBuffer> {
  const values = new Uint16Array(POOL / 2);
  let state = 1;
  for (let i = 0; i < values.length; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    values[i] = state >>> 16 & 0xabff;
  }
  return new Uint8Array(values.buffer);
}

/** The same bytes as blocks of Q8_0, each with the scale 2^-10. */
function blocks(): Uint8Array<ArrayBuffer> {
  const bytes = halves().subarray(0, Math.floor(POOL / 34) * 34);
  for (let at = 0; at < bytes.length; at += 34) {
    bytes[at] = 0;
    bytes[at + 1] = 0x14;
  }
  return bytes;
}

async function writeSafetensors(
  path: string,
  entries: readonly Entry[],
): Promise<void> {
  let end = 0;
  const header = entries.map(({ names, shape }) => {
    const begin = end;
    end += 2 * count(shape);
    const row = { dtype: "F16", shape, data_offsets: [begin, end] };
    return [names[1], row] as const;
  });
  const text = JSON.stringify(Object.fromEntries(header));
  await writeData(path, rawSafetensors(text), halves(), end);
}

async function writeGguf(
  path: string,
  entries: readonly Entry[],
  layers: number,
  type: "F16" | "Q8_0",
): Promise<void> {
  const tokens = Array.from({ length: 256 }, (_, byte) => spellBytes([byte]));
  const metadata: [string, FieldValue][] = [
    ["general.architecture", "llama"],
    ["llama.block_count", u32(layers)],
    ["llama.context_length", u32(256)],
    ["llama.embedding_length", u32(WIDTH)],
    ["llama.feed_forward_length", u32(HIDDEN)],
    ["llama.attention.head_count", u32(HEADS)],
    ["llama.attention.head_count_kv", u32(HEADS)],
    ["llama.attention.layer_norm_rms_epsilon", f32(1e-5)],
    ["tokenizer.ggml.model", "gpt2"],
    ["tokenizer.ggml.pre", "gpt-2"],
    ["tokenizer.ggml.tokens", strings([...tokens, "<|endoftext|>"])],
    ["tokenizer.ggml.token_type", i32s([...tokens.map(() => 1), 3])],
    ["tokenizer.ggml.merges", strings([])],
    ["tokenizer.ggml.eos_token_id", u32(256)],
  ];
  // Vectors first, in F16 whatever the type of matrices, then blocks.
  const order = entries.toSorted((a, b) => a.shape.length - b.shape.length);
  const typeOf = ({ shape }: Entry) => shape.length === 1 ? "F16" : type;
  let end = 0, vectors = 0;
  const tensors = order.map((entry): TensorInput => {
    const offset = end;
    const numbers = count(entry.shape);
    end += typeOf(entry) === "F16" ? 2 * numbers : numbers / 32 * 34;
    if (entry.shape.length === 1) vectors = end;
    return {
      name: entry.names[0],
      type: typeOf(entry),
      shape: entry.shape.toReversed(),
      offset,
      bytes: 0,
    };
  });
  const header = ggufBytes({ metadata, tensors });
  const pool = halves();
  const first = new Uint8Array(header.length + vectors);
  first.set(header);
  first.set(pool.subarray(0, vectors), header.length);
  await writeData(
    path,
    first,
    type === "F16" ? pool : blocks(),
    end - vectors,
  );
}

/** Writes a header, and behind it so many bytes of a pool. */
async function writeData(
  path: string,
  header: Uint8Array,
  pool: Uint8Array,
  bytes: number,
): Promise<void> {
  using file = await Deno.open(path, { write: true, create: true });
  const write = async (part: Uint8Array) => {
    for (let at = 0; at < part.length;) {
      at += await file.write(part.subarray(at));
    }
  };
  await write(header);
  for (let left = bytes; left > 0; left -= pool.length) {
    await write(pool.subarray(0, Math.min(left, pool.length)));
  }
}
