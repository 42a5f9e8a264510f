/** Every architecture, one line a file; Model.load looks them up here. */
export * from "./llama.ts";
