/** An open JSON file of a Hugging Face folder, its values checked as they are asked for; used by the architectures and the tokenizer. */

import { FormatError, quote } from "./error.ts";
import type { GgufRange } from "./gguf.ts";
import type { Json } from "./json.ts";
import { readJsonFile } from "./json_file.ts";
import { describe } from "./safetensors_header.ts";

/** The values of such a file, or of an object inside it. Null counts as absent. */
export class ConfigFile {
  /** Path of the file, for messages. */
  readonly path: string;
  readonly #values: ReadonlyMap<string, Json>;
  readonly #prefix: string;

  private constructor(
    path: string,
    values: ReadonlyMap<string, Json>,
    prefix: string,
  ) {
    this.path = path;
    this.#values = values;
    this.#prefix = prefix;
  }

  /**
   * Reads a file.
   *
   * @param path Path of the file.
   * @param kind What it should be, for messages.
   * @throws {FormatError} When it is not one JSON object.
   * @throws {Deno.errors.NotFound} When there is none, and so on.
   */
  static async open(
    path: string,
    kind: string = "config.json",
  ): Promise<ConfigFile> {
    return new ConfigFile(path, await readJsonFile(path, kind), "");
  }

  /** Whether there is a value that is not null. */
  has(key: string): boolean {
    return (this.#values.get(key) ?? null) !== null;
  }

  /**
   * An integer.
   *
   * @throws {FormatError} When it is absent, of another type or out of range.
   */
  integer(key: string, range: GgufRange): number {
    const { min, max, fallback } = range;
    const value = this.#get(key, fallback);
    if (Number.isInteger(value) && this.#within(value, min, max)) {
      return value as number;
    }
    throw this.error(key, `an integer from ${min} to ${max}`);
  }

  /**
   * A finite number.
   *
   * @throws {FormatError} When it is absent, of another type or out of range.
   */
  float(key: string, range: GgufRange): number {
    const { min, max, fallback } = range;
    const value = this.#get(key, fallback);
    if (this.#within(value, min, max)) return value as number;
    throw this.error(key, `a number from ${min} to ${max}`);
  }

  /**
   * A string.
   *
   * @throws {FormatError} When it is absent or of another type.
   */
  string(key: string, fallback?: string): string {
    const value = this.#get(key, fallback);
    if (typeof value === "string") return value;
    throw this.error(key, "a string");
  }

  /**
   * A boolean.
   *
   * @throws {FormatError} When it is absent or of another type.
   */
  boolean(key: string, fallback?: boolean): boolean {
    const value = this.#get(key, fallback);
    if (typeof value === "boolean") return value;
    throw this.error(key, "true or false");
  }

  /**
   * Strings; none when the key is absent.
   *
   * @throws {FormatError} When it is of another type.
   */
  strings(key: string): string[] {
    const value = this.#get(key, []);
    if (Array.isArray(value)) {
      const strings = value.filter((item) => typeof item === "string");
      if (strings.length === value.length) return strings;
    }
    throw this.error(key, "a list of strings");
  }

  /**
   * Numbers, each within the range.
   *
   * @throws {FormatError} When it is absent, of another type or out of range.
   */
  numbers(key: string, { min, max }: { min: number; max: number }): number[] {
    const value = this.#get(key);
    if (Array.isArray(value)) {
      const numbers = value.filter((item) => typeof item === "number");
      if (
        numbers.length === value.length &&
        numbers.every((item) => this.#within(item, min, max))
      ) return numbers;
    }
    throw this.error(key, `a list of numbers from ${min} to ${max}`);
  }

  /**
   * A whole number or a list of them, as a list; none when the key is absent.
   *
   * @throws {FormatError} When it is of another type or out of range.
   */
  ids(key: string, max: number): number[] {
    if (!this.has(key)) return [];
    const value = this.#values.get(key)!;
    const list = Array.isArray(value) ? value : [value];
    const ids = list.filter((id) =>
      Number.isInteger(id) && this.#within(id, 0, max)
    );
    if (ids.length === list.length) return ids as number[];
    throw this.error(key, `token ids from 0 to ${max}`);
  }

  /**
   * An object inside; null when the key is absent.
   *
   * @throws {FormatError} When it is of another type.
   */
  object(key: string): ConfigFile | null {
    if (!this.has(key)) return null;
    const value = this.#values.get(key);
    if (value instanceof Map) {
      return new ConfigFile(this.path, value, `${this.#prefix}${key}.`);
    }
    throw this.error(key, "an object");
  }

  /**
   * Objects in a list; none when the key is absent.
   *
   * @throws {FormatError} When it is of another type.
   */
  objects(key: string): ConfigFile[] {
    const value = this.#get(key, []);
    if (!Array.isArray(value)) throw this.error(key, "a list of objects");
    return value.map((item, i) => {
      const prefix = `${this.#prefix}${key}.${i}`;
      if (item instanceof Map) {
        return new ConfigFile(this.path, item, `${prefix}.`);
      }
      throw new FormatError(
        this.path,
        prefix,
        `Found ${describe(item)}, expected an object`,
      );
    });
  }

  /** A value as it is; undefined when the key is absent. */
  value(key: string): Json | undefined {
    return this.has(key) ? this.#values.get(key) : undefined;
  }

  /** The error of a value that is not what is expected. */
  error(key: string, expected: string): FormatError {
    return new FormatError(
      this.path,
      this.#prefix + (/^[\w.-]{1,80}$/.test(key) ? key : quote(key)),
      `Found ${describe(this.value(key))}, expected ${expected}`,
    );
  }

  #get(key: string, fallback?: Json): Json | undefined {
    return this.has(key) ? this.#values.get(key) : fallback;
  }

  #within(value: Json | undefined, min: number, max: number): boolean {
    return typeof value === "number" && value >= min && value <= max;
  }
}
