/** Calls that a library must refuse, and inputs that are no numbers: none may be hidden. */

import type { Backend } from "../backend/backend.ts";
import { WkvError } from "../backend/error.ts";
import {
  divergence,
  embed,
  gated,
  linear,
  logProb,
  sample,
} from "../backend/ops.ts";
import { Tensor } from "../backend/tensor.ts";
import { type Finding, Findings } from "./findings.ts";
import { type Layer, openCache, qkvWidth } from "./layer.ts";
import { Random } from "./numbers.ts";

/** One call. */
export interface RefusalCase {
  /** No kernel of its own. */
  kernel: "refusal";
  /** What is wrong with the call. */
  what: keyof typeof refusals;
}

const layer: Layer = { heads: 2, kvHeads: 1, headDim: 32 };
const width = qkvWidth(layer);

const floats = (b: Backend, length: number, value = 0) =>
  Tensor.from(b, new Float32Array(length).fill(value));

/** Steps of a cache of 8, the last with these numbers and this victim. */
function step(
  b: Backend,
  policy: string,
  before: number,
  change: (row: Float32Array) => void,
  by: "attend" | "prefill" = "attend",
  victim?: number,
): void {
  const random = new Random(1);
  using cache = openCache(b, layer, {
    policy,
    cacheType: "f16",
    ...policy === "full" ? { capacity: 8 } : { budget: 8, sinks: 1, recent: 1 },
  });
  using qkv = new Tensor(b, "F32", 1, width);
  using out = new Tensor(b, "F32", 1, layer.heads * layer.headDim);
  using victims = Tensor.from(b, Int32Array.of(victim ?? -1));
  for (let i = 0; i < before; i++) {
    qkv.write(random.qkv(layer, 1));
    cache.attend(0, out, qkv);
  }
  const row = random.qkv(layer, 1);
  change(row);
  qkv.write(row);
  if (by === "prefill") cache.prefill(0, 0, out, qkv, 1);
  else cache.attend(0, out, qkv, victims);
}

const nothing = () => {};
const at = (i: number, value: number) => (row: Float32Array) => {
  row[i] = value;
};

/** Whether an op on two rows, the second with a number that is none, shows it there and nowhere else. */
function shows(
  b: Backend,
  run: (x: Tensor, w: Tensor, out: Tensor) => void,
): boolean {
  const random = new Random(3);
  return [NaN, Infinity].every((bad) => {
    const x = random.normals(2 * 64);
    x[70] = bad;
    using xs = Tensor.from(b, x, 2);
    using w = new Tensor(b, "Q8_0", 3, 64);
    const bytes = new Uint8Array(3 * w.rowBytes);
    const view = new DataView(bytes.buffer);
    for (let i = 0; i < bytes.length; i++) bytes[i] = 1 + random.integer(90);
    for (let i = 0; i < bytes.length; i += 34) view.setUint16(i, 0x2c00, true);
    w.write(bytes);
    using out = new Tensor(b, "F32", 2, 3);
    run(xs, w, out);
    return out.floats(0, 1).every(Number.isFinite) &&
      !out.floats(1, 1).some(Number.isFinite);
  });
}

const refusals = {
  "a token outside the table": (b: Backend): void => {
    using table = Tensor.from(b, new Float32Array(64), 2);
    using tokens = Tensor.from(b, Int32Array.of(2));
    using out = floats(b, 32);
    embed(b, out, table, tokens, { rows: 1 });
  },
  "a NaN among logits": (b: Backend): void => {
    using tokens = Tensor.from(b, new Int32Array(1));
    using logits = Tensor.from(b, Float32Array.of(1, NaN, 3));
    using settings = floats(b, 4);
    using rng = Tensor.from(b, new Int32Array(4));
    sample(b, tokens, logits, settings, rng);
  },
  "a target outside the vocabulary": (b: Backend): void => {
    using out = floats(b, 1);
    using logits = floats(b, 9);
    using targets = Tensor.from(b, Int32Array.of(9));
    logProb(b, out, logits, targets, 1);
  },
  "a NaN among other logits": (b: Backend): void => {
    using out = Tensor.from(b, new Float32Array(2));
    using logits = floats(b, 9);
    using others = Tensor.from(b, new Float32Array(9).fill(NaN));
    divergence(b, out, logits, others, 1);
  },
  "a step of a cache that is full": (b: Backend): void =>
    step(b, "full", 8, nothing),
  "a protected victim": (b: Backend): void =>
    step(b, "weighted-kv", 8, nothing, "attend", 0),
  "a victim beyond the new token": (b: Backend): void =>
    step(b, "weighted-kv", 8, nothing, "attend", 9),
  "a victim of -2": (b: Backend): void =>
    step(b, "weighted-kv", 8, nothing, "attend", -2),
  "a victim of -2^31": (b: Backend): void =>
    step(b, "weighted-kv", 8, nothing, "attend", -(2 ** 31)),
  "a NaN in a query": (b: Backend): void =>
    step(b, "weighted-kv", 9, at(0, NaN)),
  "a NaN in a key": (b: Backend): void =>
    step(b, "weighted-kv", 3, at(layer.heads * layer.headDim, NaN)),
  "an Infinity in a query of full": (b: Backend): void =>
    step(b, "full", 3, at(0, Infinity)),
  "a NaN in a query of a prefill": (b: Backend): void =>
    step(b, "weighted-kv", 3, at(0, NaN), "prefill"),
  "a NaN in a key of a prefill": (b: Backend): void =>
    step(
      b,
      "weighted-kv-ward",
      8,
      at(layer.heads * layer.headDim, NaN),
      "prefill",
    ),
  "a scale that is not finite": (b: Backend): void => {
    using tensor = new Tensor(b, "Q8_0", 1, 32);
    tensor.write(new Uint8Array(34).fill(255));
  },
  "a NaN in a linear op of 8 bits": (b: Backend): boolean =>
    shows(
      b,
      (x, w, out) => linear(b, out, x, w, { rows: 2, precision: "int8" }),
    ),
  "a NaN in a linear op": (b: Backend): boolean =>
    shows(
      b,
      (x, w, out) => linear(b, out, x, w, { rows: 2, precision: "f32" }),
    ),
  "a NaN in a gated op of 8 bits": (b: Backend): boolean => {
    using weight = floats(b, 64, 1);
    const norm = { weight, epsilon: 1e-5 };
    return shows(
      b,
      (x, w, out) =>
        gated(b, out, x, w, w, { rows: 2, norm, precision: "int8" }),
    );
  },
};

/** The table. */
export const refusalCases: RefusalCase[] =
  (Object.keys(refusals) as RefusalCase["what"][])
    .map((what) => ({ kernel: "refusal", what }));

/** Runs one call. */
export function runRefusal(backend: Backend, { what }: RefusalCase): Finding[] {
  const found = new Findings();
  let shown: boolean | void = false;
  try {
    shown = refusals[what](backend);
  } catch (error) {
    if (!(error instanceof WkvError)) throw error;
    shown = true;
  }
  found.must("refusals", shown === true);
  return found.list;
}
