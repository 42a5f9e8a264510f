/** Every policy, one line a file; command line, tests and tables walk this list. */
export * from "./cam.ts";
export * from "./caote.ts";
export * from "./d2o.ts";
export * from "./full.ts";
export * from "./h2o.ts";
export * from "./keepkv.ts";
export * from "./keydiff.ts";
export * from "./knorm.ts";
export * from "./lm_infinite.ts";
export * from "./scissorhands.ts";
export * from "./snapkv.ts";
export * from "./streaming_llm.ts";
export * from "./tova.ts";
export * from "./vatp.ts";
export * from "./weighted_kv.ts";
export * from "./weighted_kv_ward.ts";
