/** Rotations from config.json: the frequencies of every scaling that transformers knows, computed in f64; used by the architectures. */

import type { ConfigFile } from "../formats/config.ts";
import { FormatError } from "../formats/error.ts";

/** A rotation of queries and keys. */
export interface Rope {
  /** `half` turns (i, i + rotary / 2), `interleaved` (2 i, 2 i + 1). */
  pairs: "half" | "interleaved";
  /** Radians a position, of each pair. */
  frequencies: Float32Array<ArrayBuffer>;
  /**
   * Where they depend on the length of the text: those of a cache whose
   * positions reach `length`, more than `from`. All keys of a cache are rotated
   * alike, so the cache's room decides, not the text read so far.
   */
  longer?: {
    /** The last length that the frequencies above are for. */
    from: number;
    /** Frequencies for one that is longer. */
    at(length: number): Float32Array<ArrayBuffer>;
  };
  /** What cosines and sines are multiplied by. @default `1` */
  factor?: number;
}

/** The types, with the keys that each takes beside rope_theta and factor. */
const TYPES = ["default", "linear", "dynamic", "yarn", "llama3", "longrope"];

/** What a reader knows beside the rotation's own values. */
export interface RopeShape {
  /** Dimensions of a head. */
  headDim: number;
  /** Tokens that the model was made for. */
  context: number;
}

/** Pairs (i, i + rotary / 2) that turn by base^(-2 i / rotary). */
export function plainRope(base: number, rotary: number): Rope {
  return of(powers(base, rotary));
}

/**
 * The rotation of a config.json: `rope_parameters`, or `rope_theta` and
 * `rope_scaling` as older files have them.
 *
 * @param inner The parameters, where they are not in these places.
 * @throws {FormatError} A value is missing, out of range or of an unknown type.
 */
export function ropeOf(
  config: ConfigFile,
  shape: RopeShape,
  inner: ConfigFile | null = config.object("rope_parameters") ??
    config.object("rope_scaling"),
): Rope {
  const { headDim, context } = shape;
  const within = (key: string) => inner?.has(key) ? inner : config;
  const share = within("partial_rotary_factor").float("partial_rotary_factor", {
    min: Number.MIN_VALUE,
    max: 1,
    fallback: 1,
  });
  const base = within("rope_theta").float("rope_theta", {
    min: 1,
    max: 1e12,
    fallback: 10000,
  });
  const rotary = Math.floor(headDim * share);
  if (rotary < 2 || rotary % 2 !== 0) {
    throw within("partial_rotary_factor").error(
      "partial_rotary_factor",
      `an even number of the ${headDim} dimensions of a head`,
    );
  }
  const plain = powers(base, rotary);
  const typeKey = inner?.has("rope_type") ? "rope_type" : "type";
  const type = inner?.string(typeKey, "default") ?? "default";
  if (type === "default" || inner === null) return of(plain);
  const original = within("original_max_position_embeddings").integer(
    "original_max_position_embeddings",
    { min: 2, max: 1 << 24, fallback: context },
  );
  const factor = (fallback?: number) =>
    inner.float("factor", {
      min: Number.MIN_VALUE,
      max: 1e6,
      ...fallback === undefined ? {} : { fallback },
    });
  switch (type) {
    case "linear": {
      const by = factor();
      return of(plain.map((f) => f / by));
    }
    case "dynamic": {
      const by = factor();
      if (rotary < 4) break;
      return dynamic(plain, base, by, context);
    }
    case "llama3":
      return of(llama3(plain, inner, factor(), original));
    case "yarn": {
      const by = factor(context / original);
      return yarnOf(inner, { factor: by, base, rotary, original });
    }
    // The name that Phi-3 had for it first.
    case "su":
    case "longrope":
      return longrope(plain, inner, factor(context / original), original);
  }
  throw inner.error(typeKey, `one of ${TYPES.join(", ")}`);
}

function of(frequencies: ArrayLike<number>): Rope {
  return { pairs: "half", frequencies: Float32Array.from(frequencies) };
}

/** base^(-2 i / rotary) for each pair i. */
export function powers(base: number, rotary: number): number[] {
  return Array.from(
    { length: rotary / 2 },
    (_, i) => base ** (-2 * i / rotary),
  );
}

/** Dynamic NTK: a longer text has a larger base. */
function dynamic(
  plain: number[],
  base: number,
  factor: number,
  context: number,
): Rope {
  const rotary = 2 * plain.length;
  const at = (length: number) => {
    const grown = factor * length / context - (factor - 1);
    const larger = base * grown ** (rotary / (rotary - 2));
    return Float32Array.from(powers(larger, rotary));
  };
  return { ...of(plain), longer: { from: context, at } };
}

/** Llama 3.1: low frequencies are divided by the factor, with a smooth step between. */
function llama3(
  plain: number[],
  inner: ConfigFile,
  factor: number,
  original: number,
): number[] {
  const range = { min: Number.MIN_VALUE, max: 1e6 };
  const low = inner.float("low_freq_factor", range);
  const high = inner.float("high_freq_factor", range);
  if (high <= low) {
    throw inner.error("high_freq_factor", `more than low_freq_factor, ${low}`);
  }
  return plain.map((f) => {
    const turns = original * f / (2 * Math.PI);
    if (turns > high) return f;
    if (turns < low) return f / factor;
    const smooth = (turns - low) / (high - low);
    return (1 - smooth) * f / factor + smooth * f;
  });
}

/** What YaRN is made of. */
export interface Yarn {
  /** What low frequencies are divided by. */
  factor: number;
  /** Base of the rotation. */
  base: number;
  /** Dimensions that are rotated. */
  rotary: number;
  /** Tokens that the model was made for at first. */
  original: number;
  /** Turns within them from which on a pair is left as it is. @default `32` */
  fast?: number;
  /** Turns below which a pair is divided by the whole factor. @default `1` */
  slow?: number;
  /** Whether the ramp between begins and ends at whole pairs. @default `true` */
  cut?: boolean;
}

/** YaRN (arXiv 2309.00071): pairs that turn less often than `slow` are divided by the factor, those above `fast` are not. */
export function yarn(of: Yarn): number[] {
  const { factor, fast = 32, slow = 1, cut = true } = of;
  const plain = powers(of.base, of.rotary);
  const pairOf = (turns: number) =>
    of.rotary * Math.log(of.original / (turns * 2 * Math.PI)) /
    (2 * Math.log(of.base));
  const low = pairOf(fast), high = pairOf(slow);
  const first = Math.max(cut ? Math.floor(low) : low, 0);
  const last = Math.min(cut ? Math.ceil(high) : high, of.rotary - 1);
  const span = first === last ? 0.001 : last - first;
  return plain.map((f, i) => {
    const ramp = Math.min(1, Math.max(0, (i - first) / span));
    return f / factor * ramp + f * (1 - ramp);
  });
}

function yarnOf(
  inner: ConfigFile,
  numbers: Pick<Yarn, "factor" | "base" | "rotary" | "original">,
): Rope {
  const beta = (key: string, fallback: number) =>
    inner.float(key, { min: Number.MIN_VALUE, max: 1e6, fallback });
  const frequencies = yarn({
    ...numbers,
    fast: beta("beta_fast", 32),
    slow: beta("beta_slow", 1),
    cut: inner.boolean("truncate", true),
  });
  return { ...of(frequencies), factor: yarnFactor(inner, numbers.factor) };
}

function yarnFactor(inner: ConfigFile, factor: number): number {
  const scale = (by: number) =>
    factor <= 1 ? 1 : 0.1 * by * Math.log(factor) + 1;
  const range = { min: 0, max: 1e6, fallback: 0 };
  const mscale = inner.float("mscale", range);
  const all = inner.float("mscale_all_dim", range);
  return attentionFactor(
    inner,
    mscale !== 0 && all !== 0 ? scale(mscale) / scale(all) : scale(1),
  );
}

/** LongRoPE (arXiv 2402.13753): each pair is divided by a number of its own, by another one in a longer text. */
function longrope(
  plain: number[],
  inner: ConfigFile,
  factor: number,
  original: number,
): Rope {
  const divided = (key: string) => {
    const by = inner.numbers(key, { min: Number.MIN_VALUE, max: 1e6 });
    if (by.length === plain.length) return plain.map((f, i) => f / by[i]!);
    throw new FormatError(
      inner.path,
      key,
      `Found ${by.length} numbers, expected ${plain.length}`,
    );
  };
  const short = divided("short_factor");
  const long = Float32Array.from(divided("long_factor"));
  return {
    ...of(short),
    longer: { from: original, at: () => long },
    factor: attentionFactor(
      inner,
      factor <= 1 ? 1 : Math.sqrt(1 + Math.log(factor) / Math.log(original)),
    ),
  };
}

function attentionFactor(inner: ConfigFile, fallback: number): number {
  return inner.float("attention_factor", {
    min: Number.MIN_VALUE,
    max: 1e6,
    fallback,
  });
}
