/** `@std/testing/bdd` over node:test, with std's names. */
import { after, afterEach, before, beforeEach, describe, it } from "node:test";

export {
  after as afterAll,
  afterEach,
  before as beforeAll,
  beforeEach,
  describe,
  it,
};
