/** Every policy, one line a file; command line, tests and tables walk this list. */
export * from "./full.ts";
export * from "./streaming_llm.ts";
export * from "./weighted_kv.ts";
export * from "./weighted_kv_ward.ts";
