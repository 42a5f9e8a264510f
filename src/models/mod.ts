/** Every architecture, one line a file; Model.load looks them up here. */
export * from "./llama.ts";
export * from "./mistral.ts";
export * from "./phi3.ts";
export * from "./qwen2.ts";
