/**
 * One function a kernel, with names for what wkv.h counts by position; the
 * architectures in src/models compose them.
 */

import type { Backend } from "./backend.ts";
import { wkv_activation, wkv_precision } from "./symbols.ts";
import type { Tensor } from "./tensor.ts";

/** How linear ops hold their input; see wkv.h. */
export type Precision = "f32" | "int8" | "half";

/** Their list, the default first. */
export const PRECISIONS: readonly Precision[] = ["int8", "f32", "half"];

/** What the gate of a feed-forward part goes through; see wkv.h. */
export type Activation = "silu" | "gelu-tanh";

/** A norm before a projection: weight `[1, C]` and epsilon. */
export interface Norm {
  /** Its weight, `[1, C]`. */
  weight: Tensor;
  /** What is added to the mean square. */
  epsilon: number;
}

/** What a projection may do beside `x W^T`. */
export interface LinearOptions {
  /** Rows of `x` that are used. */
  rows: number;
  /** Applied to `x` first. */
  norm?: Norm | undefined;
  /** Added to the result, `[1, J]`. */
  bias?: Tensor | undefined;
  /** Adds the result to what `out` holds. @default `false` */
  add?: boolean;
  /** The first of the rows of `x`. @default `0` */
  xRow?: number;
  /** The first column of `out` that is written. @default `0` */
  outColumn?: number;
  /** How `x` is held. */
  precision: Precision;
}

const activations: Record<Activation, number> = {
  "silu": wkv_activation.WKV_SILU,
  "gelu-tanh": wkv_activation.WKV_GELU_TANH,
};

const precisions: Record<Precision, number> = {
  f32: wkv_precision.WKV_PRECISION_F32,
  int8: wkv_precision.WKV_PRECISION_INT8,
  half: wkv_precision.WKV_PRECISION_HALF,
};

/** `out[i] = scale * table[tokens[i]]` for the first `rows` tokens. */
export function embed(
  backend: Backend,
  out: Tensor,
  table: Tensor,
  tokens: Tensor,
  { rows, scale = 1 }: { rows: number; scale?: number | undefined },
): void {
  backend.call(
    "wkv_embed",
    out.handle,
    table.handle,
    tokens.handle,
    rows,
    scale,
  );
}

/** `out[i] = norm(x[i])` for the first `rows` rows, or what is added to it. */
export function rmsnorm(
  backend: Backend,
  out: Tensor,
  x: Tensor,
  norm: Norm,
  { rows, add = false }: { rows: number; add?: boolean },
): void {
  backend.call(
    "wkv_rmsnorm",
    out.handle,
    x.handle,
    rows,
    norm.weight.handle,
    norm.epsilon,
    add ? 1 : 0,
  );
}

/**
 * Norms queries and keys of `qkv` `[rows, (H + 2 N) D]` where they lie: each head
 * on its own with weights `[1, D]`, or all of a row with `[1, H D]` and `[1, N D]`.
 */
export function qkNorm(
  backend: Backend,
  qkv: Tensor,
  norms: { q: Norm; k: Norm },
  shape: { rows: number; heads: number; kvHeads: number; headDim: number },
): void {
  backend.call(
    "wkv_qk_norm",
    qkv.handle,
    shape.rows,
    shape.heads,
    shape.kvHeads,
    shape.headDim,
    norms.q.weight.handle,
    norms.k.weight.handle,
    norms.q.epsilon,
  );
}

/** `x[i] = cap tanh(x[i] / cap)` for the first `rows` rows. */
export function softcap(
  backend: Backend,
  x: Tensor,
  rows: number,
  cap: number,
): void {
  backend.call("wkv_softcap", x.handle, rows, cap);
}

/** `out = norm(x) w^T + bias`, `w` being `[J, C]`. */
export function linear(
  backend: Backend,
  out: Tensor,
  x: Tensor,
  w: Tensor,
  options: LinearOptions,
): void {
  backend.call(
    "wkv_linear",
    out.handle,
    options.outColumn ?? 0,
    x.handle,
    options.xRow ?? 0,
    options.rows,
    options.norm?.weight.handle ?? 0,
    options.norm?.epsilon ?? 0,
    w.handle,
    options.bias?.handle ?? 0,
    options.add ? 1 : 0,
    precisions[options.precision],
  );
}

/** `out = activation(norm(x) gate^T) * (norm(x) up^T)`. */
export function gated(
  backend: Backend,
  out: Tensor,
  x: Tensor,
  gate: Tensor,
  up: Tensor,
  options: {
    rows: number;
    norm?: Norm | undefined;
    activation?: Activation | undefined;
    precision: Precision;
  },
): void {
  backend.call(
    "wkv_gated",
    out.handle,
    x.handle,
    options.rows,
    options.norm?.weight.handle ?? 0,
    options.norm?.epsilon ?? 0,
    gate.handle,
    up.handle,
    activations[options.activation ?? "silu"],
    precisions[options.precision],
  );
}

/** The next token of each row of `logits`; see wkv.h for the settings. */
export function sample(
  backend: Backend,
  tokens: Tensor,
  logits: Tensor,
  settings: Tensor,
  rng: Tensor,
): void {
  backend.call(
    "wkv_sample",
    tokens.handle,
    logits.handle,
    settings.handle,
    rng.handle,
  );
}

/** `out[i]` = log of the probability of `targets[i]` under `logits[i]`. */
export function logProb(
  backend: Backend,
  out: Tensor,
  logits: Tensor,
  targets: Tensor,
  rows: number,
): void {
  backend.call(
    "wkv_log_prob",
    out.handle,
    logits.handle,
    targets.handle,
    rows,
  );
}

/**
 * `out[i]` = the Kullback-Leibler divergence in nats of the distribution of
 * `others[i]` from that of `logits[i]`, and 1 where both have the same likeliest
 * token. `out` is `[rows, 2]`.
 */
export function divergence(
  backend: Backend,
  out: Tensor,
  logits: Tensor,
  others: Tensor,
  rows: number,
): void {
  backend.call(
    "wkv_divergence",
    out.handle,
    logits.handle,
    others.handle,
    rows,
  );
}
