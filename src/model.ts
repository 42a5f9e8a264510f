/** Model: a file's weights on a device, its tokenizer, and the caches and sessions made for it. */

import { Backend, type Device } from "./backend/backend.ts";
import { type Precision, PRECISIONS } from "./backend/ops.ts";
import { wkv_pairs } from "./backend/symbols.ts";
import { Tensor } from "./backend/tensor.ts";
import { parseBudget } from "./cache/budget.ts";
import { KvCache } from "./cache/cache.ts";
import { type CacheOptions, layerRows, rowBytes } from "./cache/layout.ts";
import { keepsAll, MAX_SLOTS } from "./cache/policy.ts";
import { findPolicy } from "./cache/registry.ts";
import type { ChatTemplates } from "./chat/sources.ts";
import { type Progress, resolveModel } from "./hub/models.ts";
import type {
  Activations,
  ModelConfig,
  Network,
} from "./models/architecture.ts";
import { openModelFile } from "./models/file.ts";
import { WeightLoader } from "./models/weights.ts";
import type { Tokenizer } from "./tokenizer/tokenizer.ts";

/** How a model is loaded. */
export interface LoadOptions {
  /** The device. @default `"auto"` */
  device?: Device | undefined;
  /**
   * How activations meet weights: `"int8"` rounds them to 8 bits where weights
   * are quantised, `"half"` may round them once to the weights' own type where
   * those are of 16 bits, `"f32"` leaves them as they are, and so do the other
   * two where weights are of another kind.
   *
   * @default `"int8"`
   */
  activations?: Precision | undefined;
  /**
   * Whose keys a cache holds: the model's own KV heads, or one a query head, as
   * in the paper. The latter repeats the KV heads of a model with fewer: the
   * same function, more memory, and every query head chooses for itself.
   *
   * @default `"model"`
   */
  kvHeads?: "model" | "query" | undefined;
  /** Threads of the CPU; 0 is one a core. @default `0` */
  threads?: number | undefined;
  /** Called while a model is pulled, a library built, weights loaded. */
  onProgress?: ((progress: Progress) => void) | undefined;
  /** Ends the load. */
  signal?: AbortSignal | undefined;
  /** Takes pulled models only. @default what `HF_HUB_OFFLINE` says */
  offline?: boolean | undefined;
  /** The project's cache folder. @default `~/.cache/weightedkv` */
  cacheDir?: string | undefined;
  /** A native library to use as it is. */
  library?: string | undefined;
}

/** Rows of a prompt that one pass takes at most; an abort is seen between two passes. */
export const PASS_ROWS: Record<"cpu" | "cuda", number> = {
  cpu: 512,
  // Products of fewer rows leave a large GPU idle.
  cuda: 4096,
};

/** Rows of the memory that a pass takes: powers of two, so that there are few. */
export function passMemory(rows: number): number {
  return Math.max(PASS_ROWS.cpu, 2 ** Math.ceil(Math.log2(rows)));
}

/** A loaded model. */
export class Model implements Disposable {
  /** The name it was loaded by. */
  readonly name: string;
  /** Its file. */
  readonly path: string;
  /** Its numbers. */
  readonly config: ModelConfig;
  /** Its tokenizer. */
  readonly tokenizer: Tokenizer;
  /** The native library it runs in. */
  readonly backend: Backend;
  /** How activations meet weights. */
  readonly activations: Precision;
  /** Milliseconds that loading took, a pull or a build included. */
  readonly loadMs: number;
  /** Bytes of its weights. */
  readonly weightBytes: number;
  /** The weights with the pass over them; used by sessions. */
  readonly network: Network;
  /** Reads its chat templates, by name; `createChat` takes them from here. */
  readonly chatTemplates: () => Promise<ChatTemplates>;
  readonly #memory = new Map<number, Activations>();

  /**
   * Puts a model together from its parts, which it owns from here on; users
   * call {@linkcode loadModel}, benchmarks bring weights of their own.
   */
  constructor(
    parts: Pick<
      Model,
      | "name"
      | "path"
      | "config"
      | "tokenizer"
      | "backend"
      | "activations"
      | "loadMs"
      | "network"
      | "chatTemplates"
    >,
  ) {
    this.name = parts.name;
    this.path = parts.path;
    this.config = parts.config;
    this.tokenizer = parts.tokenizer;
    this.backend = parts.backend;
    this.activations = parts.activations;
    this.loadMs = parts.loadMs;
    this.network = parts.network;
    this.chatTemplates = parts.chatTemplates;
    this.weightBytes = parts.network.bytes;
  }

  /** Loads a model; see {@linkcode loadModel}. */
  static async load(name: string, options: LoadOptions = {}): Promise<Model> {
    const start = performance.now();
    const { onProgress, signal, activations = "int8" } = options;
    if (!PRECISIONS.includes(activations)) {
      throw new RangeError(
        `The activations must be int8, f32 or half: current value is "${activations}"`,
      );
    }
    const { kvHeads = "model" } = options;
    if (kvHeads !== "model" && kvHeads !== "query") {
      throw new RangeError(
        `The kvHeads must be model or query: current value is "${kvHeads}"`,
      );
    }
    const path = await resolveModel(name, options);
    using file = await openModelFile(path);
    const { architecture } = file;
    const config = kvHeads === "model" ? file.config : {
      ...file.config,
      kvHeads: file.config.heads,
      storedKvHeads: file.config.kvHeads,
    };
    const note = (stage: Progress["stage"]) => (line: string) =>
      onProgress?.({
        stage,
        loaded: 0,
        total: null,
        label: line,
        note: line,
      });
    const backend = await Backend.open({
      ...options,
      onBuild: note("build"),
      onNote: note("load"),
    });
    let tokenizer: Tokenizer | undefined;
    try {
      tokenizer = await file.tokenizer();
      const total = file.size;
      let loaded = 0;
      const loader = new WeightLoader(backend, file.weights, (bytes) => {
        loaded += bytes;
        onProgress?.({ stage: "load", loaded, total, label: name });
      }, signal);
      const network = await architecture.load(backend, config, loader);
      return new Model({
        name,
        path,
        config,
        tokenizer,
        backend,
        activations,
        network,
        chatTemplates: file.chatTemplates,
        loadMs: performance.now() - start,
      });
    } catch (error) {
      tokenizer?.close();
      backend.close();
      throw error;
    }
  }

  /**
   * Makes an empty cache for this model. Of a budget in bytes it has as many
   * tokens as keys, values and state of one sequence have room for.
   *
   * @throws {RangeError} An option is out of range.
   */
  createCache(options: CacheOptions = {}): KvCache {
    const { budget = 256, policy = "weighted-kv", sequences = 1 } = options;
    const full = keepsAll(findPolicy(policy));
    if (full || typeof budget === "number") return this.#openCache(options);
    const parsed = parseBudget(budget);
    if (parsed.kind !== "bytes") return this.#openCache(options);
    const most = parsed.bytes * sequences;
    let tokens = mostTokens(
      this.config,
      parsed.bytes / rowBytes(this.config, options.cacheType ?? "f16"),
    );
    // State comes on top, of a size that the policy knows.
    while (tokens >= 1) {
      const cache = this.#openCache({
        ...options,
        budget: Math.min(tokens, MAX_SLOTS),
      });
      if (cache.bytes <= most) return cache;
      cache.close();
      tokens = Math.min(
        tokens - 1,
        Math.floor(tokens * most / cache.bytes),
      );
    }
    throw new RangeError(
      `The budget of ${budget} has no room for a token: ask for more`,
    );
  }

  /** What a budget is in tokens. */
  budgetTokens(options: CacheOptions): number {
    const { budget = 256 } = options;
    if (typeof budget === "number") return budget;
    using cache = this.createCache({ ...options, sequences: 1 });
    return cache.budget ?? cache.capacity;
  }

  #openCache(options: CacheOptions): KvCache {
    return new KvCache(
      this.backend,
      this.config,
      (...of) => this.#rope(...of),
      options,
    );
  }

  /** Memory for passes of at most `rows` rows; shared, as passes never overlap. */
  memory(rows: number): Activations {
    const { width, hidden, heads, kvHeads, headDim } = this.config;
    const { norms = "before" } = this.config;
    let memory = this.#memory.get(rows);
    if (memory === undefined) {
      // What was opened is given back when there is no memory for the rest.
      using opened = new DisposableStack();
      const tensor = (columns: number) =>
        opened.use(new Tensor(this.backend, "F32", rows, columns));
      memory = {
        x: tensor(width),
        qkv: tensor((heads + 2 * kvHeads) * headDim),
        attended: tensor(heads * headDim),
        hidden: tensor(hidden),
        ...norms === "before" ? {} : { branch: tensor(width) },
      };
      opened.move();
      this.#memory.set(rows, memory);
    }
    return memory;
  }

  /** Gives all memory back, that of caches and sessions included. */
  close(): void {
    this.tokenizer.close();
    this.backend.close();
  }

  /** Same as {@linkcode Model.close}. */
  [Symbol.dispose](): void {
    this.close();
  }

  /** A rotation whose tables reach `positions`, for texts of `length` tokens. */
  #rope(positions: number, length: number, windowed: boolean): number {
    const { rope: ropeOfAll, window } = this.config;
    const { pairs, longer, ...rope } = windowed && window?.rope || ropeOfAll;
    const frequencies = longer !== undefined && length > longer.from
      ? longer.at(length)
      : rope.frequencies;
    return this.backend.open((out) =>
      this.backend.call(
        "wkv_rope_open",
        this.config.headDim,
        pairs === "half"
          ? wkv_pairs.WKV_PAIRS_HALF
          : wkv_pairs.WKV_PAIRS_INTERLEAVED,
        frequencies,
        frequencies.byteLength,
        positions,
        out,
        4,
      )
    );
  }
}

/** The most tokens of which the layers of a cache hold at most `rows` rows. */
function mostTokens(config: ModelConfig, rows: number): number {
  let low = 0, high = MAX_SLOTS;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    const held = layerRows(config, middle).reduce((a, b) => a + b);
    if (held <= rows) low = middle;
    else high = middle - 1;
  }
  return low;
}

/**
 * Loads a model: a registry name, a path (of a GGUF file, of a folder with a
 * config.json and safetensors, or of one of these), or
 * `hf:org/repo[@revision][:file or quant]`. What is
 * missing is pulled, and the native library built on first use.
 *
 * @example
 * ```ts ignore
 * using model = await loadModel("smollm2-135m-instruct");
 * using cache = model.createCache({ budget: 256 });
 * ```
 *
 * @throws {RangeError} The name or an option is not known.
 * @throws {FormatError} The file is malformed or of an unknown kind.
 * @throws {LibraryError} There is no native library and none could be built.
 */
export function loadModel(
  name: string,
  options: LoadOptions = {},
): Promise<Model> {
  return Model.load(name, options);
}
