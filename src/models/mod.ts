/** Every architecture, one line a file; Model.load looks them up here. */
export { gemma2 } from "./gemma2.ts";
export { gemma3 } from "./gemma3.ts";
export { llama } from "./llama.ts";
export { mistral } from "./mistral.ts";
export { olmo2 } from "./olmo2.ts";
export { phi3 } from "./phi3.ts";
export { qwen2 } from "./qwen2.ts";
export { qwen3 } from "./qwen3.ts";
