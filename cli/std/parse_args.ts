/** `@std/cli/parse-args` from the npm mirror of the standard library, with the types that the mirror lacks. */
// @ts-types="./parse_args.d.ts"
export { parseArgs } from "npm:deno-std@1.4.0/cli/parse_args.js";
