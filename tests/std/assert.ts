/** `@std/assert` from the npm mirror of the standard library, with the types that the mirror lacks. */
// @ts-types="./assert.d.ts"
export * from "npm:deno-std@1.4.0/assert/mod.js";
