/**
 * Generates text with a key/value cache of fixed size: WeightedKV
 * (arXiv 2503.01330) and the policies it is compared with.
 *
 * @example
 * ```ts ignore
 * import { generate, loadModel } from "@weightedkv/weightedkv";
 *
 * using model = await loadModel("smollm2-135m-instruct");
 * using cache = model.createCache({ policy: "weighted-kv", budget: 256 });
 * for await (const { text } of generate(model, "Once upon a time", { cache })) {
 *   console.log(text);
 * }
 * ```
 *
 * @module
 */

export { loadModel, type LoadOptions, type Model } from "./src/model.ts";
export * from "./src/generate.ts";
export * from "./src/perplexity.ts";
