/**
 * The device that tests run on: `WKV_TEST_DEVICE=cuda deno task test` takes the
 * GPU. Tests of anything that computes import their describe() and hooks from
 * here: they are skipped where there is no such device.
 */

import * as bdd from "@std/testing/bdd";
import { Backend } from "../src/backend/backend.ts";
import { findCpuLibrary, findCudaLibrary } from "../src/backend/library.ts";

const asked = Deno.env.get("WKV_TEST_DEVICE") || "cpu";
if (asked !== "cpu" && asked !== "cuda") {
  throw new RangeError(`WKV_TEST_DEVICE must be cpu or cuda: it is "${asked}"`);
}

/** The device that is tested. */
export const testDevice: "cpu" | "cuda" = asked;

// A CUDA library takes minutes to build: `deno task wkv build cuda` does that.
const build = testDevice === "cpu";

/** Opens it; results do not depend on the threads. */
export function openBackend(threads = 1): Promise<Backend> {
  return Backend.open({ device: testDevice, threads, build });
}

/** The file of its library. */
export async function testLibrary(): Promise<string> {
  const find = testDevice === "cuda" ? findCudaLibrary : findCpuLibrary;
  return (await find({ build })).path;
}

/** Why nothing can be tested; null when it can. */
async function absence(): Promise<string | null> {
  if (testDevice === "cpu") return null;
  try {
    using _ = await openBackend();
    return null;
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  }
}

const absent = await absence();
if (absent !== null) console.error(`Skipped, for want of a GPU: ${absent}`);

/** A group of tests, skipped without the device. */
export const describe: (name: string, body: () => void) => void =
  absent === null ? bdd.describe : bdd.describe.skip;

/** One test, skipped without the device. */
export const it: (
  name: string,
  body: () => void | Promise<void>,
) => void = absent === null ? bdd.it : bdd.it.skip;

/** Runs before all tests, if there are any. */
export function beforeAll(hook: () => void | Promise<void>): void {
  if (absent === null) bdd.beforeAll(hook);
}

/**
 * Runs after all tests, if there were any. It runs after a failed beforeAll()
 * too, and an error of its own would be shown in place of that one: so
 * `model?.close()`.
 */
export function afterAll(hook: () => void | Promise<void>): void {
  if (absent === null) bdd.afterAll(hook);
}
