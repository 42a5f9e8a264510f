/** Models without a file: shapes with random weights, or with none for those who only need caches. */

import type { Backend } from "../src/backend/backend.ts";
import type { Precision } from "../src/backend/ops.ts";
import { blockColumns, type Dtype, Tensor } from "../src/backend/tensor.ts";
import { GGML_TYPES } from "../src/formats/ggml_types.ts";
import { Model } from "../src/model.ts";
import type { ModelConfig, Network } from "../src/models/architecture.ts";
import * as architectures from "../src/models/mod.ts";
import type { Part, WeightSource } from "../src/models/weights.ts";
import { halvesOf } from "../src/selftest/matrix.ts";
import { noTokenizer } from "../src/tokenizer/none.ts";
import { type ShapeName, shapeOf } from "./shapes.ts";

/** Types that weights can have. */
export type WeightType = Exclude<Dtype, "I32">;

/** Bytes of random numbers that are made once a type and written again and again. */
const POOL = 8 << 20;
/** Deviation of weights, near that of trained ones: activations stay in range. */
const DEVIATION = 0.02;

/** Normal random numbers, the same each time. */
export function randomFloats(
  count: number,
  seed = 1,
): Float32Array<ArrayBuffer> {
  let state = seed;
  const uniform = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state + 0.5) / 2 ** 32;
  };
  return Float32Array.from(
    { length: count },
    () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(6.2831853 * uniform()),
  );
}

/** Rows of random numbers in each type, as files hold them. */
export class RandomRows {
  readonly #pools = new Map<WeightType, Uint8Array<ArrayBuffer>>();
  readonly #deviation: number;
  #at = 0;

  /** Numbers of this deviation. */
  constructor(deviation: number = DEVIATION) {
    this.#deviation = deviation;
  }

  /** Fills a tensor. */
  fill(tensor: Tensor): void {
    const pool = this.#pool(tensor.dtype as WeightType);
    const columns = Math.max(32, blockColumns(tensor.dtype));
    const block = tensor.rowBytes / tensor.columns * columns;
    const most = Math.max(1, Math.floor(pool.length / 2 / tensor.rowBytes));
    for (let row = 0; row < tensor.rows; row += most) {
      const bytes = Math.min(most, tensor.rows - row) * tensor.rowBytes;
      const room = Math.floor((pool.length - bytes) / block);
      // Each piece begins elsewhere, so that rows are not copies of others near by.
      const at = (this.#at = (this.#at + 7919) % (room + 1)) * block;
      tensor.write(pool.subarray(at, at + bytes), row);
    }
  }

  #pool(dtype: WeightType): Uint8Array<ArrayBuffer> {
    let pool = this.#pools.get(dtype);
    if (pool === undefined) {
      pool = makePool(dtype, this.#deviation);
      this.#pools.set(dtype, pool);
    }
    return pool;
  }
}

/** Of blocks of random bytes: the f16 scale that makes their deviation 1, and their minimum beside it that makes their mean 0. */
const QUANTISED: Partial<Record<Dtype, [scale: number, least: number]>> = {
  Q8_0: [1 / 74, 0],
  Q4_0: [1 / 4.6, 0],
  Q4_1: [1 / 4.6, -7.5],
  Q5_0: [1 / 9.2, 0],
  Q5_1: [1 / 9.2, -15.5],
  Q2_K: [1 / 13.8, 1.5],
  Q3_K: [1 / 42, 0],
  Q4_K: [1 / 251, 7.5],
  Q5_K: [1 / 515, 15.5],
  Q6_K: [1 / 1370, 0],
  IQ4_NL: [1 / 70, 0],
};

function makePool(
  dtype: WeightType,
  deviation: number,
): Uint8Array<ArrayBuffer> {
  const normal = randomFloats(1 << 18).map((x) => x * deviation);
  switch (dtype) {
    case "F32":
      return repeated(new Uint8Array(normal.buffer));
    case "F16":
      return repeated(new Uint8Array(Float16Array.from(normal).buffer));
    case "BF16": {
      const halves = Uint16Array.from(
        new Uint32Array(normal.buffer),
        (word) => word >>> 16,
      );
      return repeated(new Uint8Array(halves.buffer));
    }
  }
  const { bytes: block } = GGML_TYPES[dtype];
  const [scaleAt, leastAt] = halvesOf[dtype]!;
  const [scale, least] = QUANTISED[dtype]!;
  const bytes = new Uint8Array(block << 13);
  const words = new Uint32Array(normal.buffer);
  for (let i = 0; i < bytes.length; i++) {
    bytes[i] = words[i % words.length]! >>> 4;
  }
  const view = new DataView(bytes.buffer);
  for (let at = 0; at < bytes.length; at += block) {
    view.setFloat16(at + scaleAt, scale * deviation, true);
    if (leastAt !== undefined) {
      view.setFloat16(at + leastAt, least * scale * deviation, true);
    }
  }
  return repeated(bytes);
}

/** A pool of whole copies. */
function repeated(piece: Uint8Array): Uint8Array<ArrayBuffer> {
  const pool = new Uint8Array(Math.ceil(POOL / piece.length) * piece.length);
  for (let at = 0; at < pool.length; at += piece.length) pool.set(piece, at);
  return pool;
}

/** Gives any tensor that is asked for, of one type. */
class RandomWeights implements WeightSource {
  bytes = 0;
  readonly #rows = new RandomRows();
  readonly #backend: Backend;
  readonly #dtype: WeightType;
  readonly #absent: ReadonlySet<string>;

  constructor(backend: Backend, dtype: WeightType, absent: readonly string[]) {
    this.#backend = backend;
    this.#dtype = dtype;
    this.#absent = new Set(absent);
  }

  has(name: string): boolean {
    return !this.#absent.has(name);
  }

  async matrices(
    parts: readonly Part[],
    columns: number,
  ): Promise<Tensor[]> {
    const rows = parts.reduce((sum, [, rows]) => sum + rows, 0);
    return [await this.matrix("", rows, columns)];
  }

  matrix(_name: string, rows: number, columns: number): Promise<Tensor> {
    const tensor = new Tensor(this.#backend, this.#dtype, rows, columns);
    this.#rows.fill(tensor);
    this.bytes += tensor.rowBytes * rows;
    return Promise.resolve(tensor);
  }

  floats(_name: string, columns: number): Promise<Float32Array<ArrayBuffer>> {
    this.bytes += 4 * columns;
    return Promise.resolve(
      randomFloats(columns).map((x) => 1 + DEVIATION * x),
    );
  }
}

/** A model of these shapes, but for what `changes` names, whose weights are random. */
export async function randomModel(
  backend: Backend,
  name: ShapeName,
  dtype: WeightType,
  activations: Precision = "int8",
  changes: Partial<ModelConfig> = {},
): Promise<Model> {
  const start = performance.now();
  const shape = shapeOf(name);
  const { tied } = shape;
  const config = { ...shape.config, ...changes };
  const network = await architectures.llama.load(
    backend,
    config,
    new RandomWeights(backend, dtype, [
      "rope_freqs.weight",
      "rope_factors_long.weight",
      ...(tied ? ["output.weight"] : []),
    ]),
  );
  const label = `${name} ${dtype}, random`;
  return assemble(backend, label, config, network, activations, start);
}

/** A model with caches but no weights. */
export function emptyModel(backend: Backend, config: ModelConfig): Model {
  const network = { bytes: 0, stepBytes: 0, forward() {} };
  return assemble(backend, "", config, network, "f32", performance.now());
}

function assemble(
  backend: Backend,
  name: string,
  config: ModelConfig,
  network: Network,
  activations: Precision,
  start: number,
): Model {
  const loadMs = performance.now() - start;
  const tokenizer = noTokenizer(
    "A model of random weights has no tokenizer",
  );
  return new Model({
    name,
    path: "",
    config,
    tokenizer,
    backend,
    activations,
    loadMs,
    network,
    chatTemplates: () => Promise.resolve(new Map()),
  });
}
