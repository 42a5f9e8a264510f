/** Whether a file has every weight that loading asks for, from headers alone; used by `wkv info`. */

import type { Backend } from "../backend/backend.ts";
import { Tensor } from "../backend/tensor.ts";
import type { Architecture, ModelConfig } from "./architecture.ts";
import {
  findVector,
  groupsOf,
  type Part,
  type WeightFile,
  type WeightSource,
} from "./weights.ts";

/** Opens nothing, for tensors that nobody computes with. */
const noBackend = {
  open: () => 0,
  call() {},
  closeHandle() {},
} as unknown as Backend;

/** Finds and checks what is asked for as a loader does, and reads none of it. */
class WeightCheck implements WeightSource {
  readonly bytes = 0;
  readonly #file: WeightFile;

  constructor(file: WeightFile) {
    this.#file = file;
  }

  has(name: string): boolean {
    return this.#file.has(name);
  }

  matrices(parts: readonly Part[], columns: number): Promise<Tensor[]> {
    return Promise.resolve(
      groupsOf(this.#file, parts, columns).map((group) => {
        const rows = group.reduce((sum, part) => sum + part.rows, 0);
        return new Tensor(noBackend, group[0]!.dtype, rows, columns);
      }),
    );
  }

  async matrix(name: string, rows: number, columns: number): Promise<Tensor> {
    return (await this.matrices([[name, rows]], columns))[0]!;
  }

  floats(name: string, columns: number): Promise<Float32Array<ArrayBuffer>> {
    findVector(this.#file, name, columns);
    return Promise.resolve(new Float32Array(columns).fill(1));
  }
}

/**
 * Checks that a file has every weight that an architecture loads, of a shape
 * and type that it takes, from headers alone.
 *
 * @throws {FormatError} One is missing, of another shape or of a type that no
 * kernel takes.
 */
export async function checkWeights(
  architecture: Architecture,
  config: ModelConfig,
  file: WeightFile,
): Promise<void> {
  // Loading puts the files' factors into the rotations: these are thrown away.
  const { rope, window } = config;
  const copy: ModelConfig = {
    ...config,
    rope: { ...rope },
    window: window && {
      ...window,
      ...(window.rope && { rope: { ...window.rope } }),
    },
  };
  await architecture.load(noBackend, copy, new WeightCheck(file));
}
