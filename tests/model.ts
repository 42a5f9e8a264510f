/** The model that tests run on; imported by every test that needs weights. */

import { DEFAULT_MODEL, resolveModel } from "../src/hub/models.ts";

let path: Promise<string> | undefined;

/**
 * The default model's path. It is pulled when absent, once however many test
 * files ask at the same time: the pull takes a lock, and the others wait.
 */
export function testModel(): Promise<string> {
  return path ??= resolveModel(DEFAULT_MODEL);
}
