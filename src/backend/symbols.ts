/** The C ABI as Deno.dlopen wants it, and its constants. Made from kernels/wkv.h by `deno task bind`. */

export const ABI_VERSION = 5;

export const wkv_status = {
  WKV_OK: 0,
  WKV_INVALID: 1,
  WKV_HANDLE: 2,
  WKV_MEMORY: 3,
  WKV_DATA: 4,
  WKV_DEVICE: 5,
  WKV_INTERNAL: 6,
} as const;

export const wkv_dtype = {
  WKV_F32: 0,
  WKV_F16: 1,
  WKV_BF16: 2,
  WKV_I32: 3,
  WKV_Q8_0: 4,
  WKV_Q4_0: 5,
  WKV_Q4_1: 6,
  WKV_Q5_0: 7,
  WKV_Q5_1: 8,
  WKV_Q2_K: 9,
  WKV_Q3_K: 10,
  WKV_Q4_K: 11,
  WKV_Q5_K: 12,
  WKV_Q6_K: 13,
  WKV_IQ4_NL: 14,
} as const;

export const wkv_pairs = {
  WKV_PAIRS_HALF: 0,
  WKV_PAIRS_INTERLEAVED: 1,
} as const;

export const wkv_positions = {
  WKV_POSITIONS_CACHE: 0,
  WKV_POSITIONS_TEXT: 1,
} as const;

export const wkv_select = {
  WKV_SELECT_NONE: 0,
  WKV_SELECT_OLDEST: 1,
  WKV_SELECT_LOWEST_AVERAGE: 2,
  WKV_SELECT_MERGE_COST: 3,
  WKV_SELECT_MERGE_COST_LINEAR: 4,
  WKV_SELECT_LITERAL_AVERAGE: 5,
  WKV_SELECT_LOWEST_SUM: 6,
  WKV_SELECT_LOWEST_NOW: 7,
  WKV_SELECT_LEAST_OFTEN: 8,
  WKV_SELECT_KEY_NORM: 9,
  WKV_SELECT_KEY_LIKENESS: 10,
  WKV_SELECT_WINDOW: 11,
  WKV_SELECT_SUM_VALUE_NORM: 12,
  WKV_SELECT_OUTPUT_ERROR: 13,
} as const;

export const wkv_merge = {
  WKV_MERGE_NONE: 0,
  WKV_MERGE_RIGHT: 1,
  WKV_MERGE_SPREAD: 2,
  WKV_MERGE_NEAREST: 3,
  WKV_MERGE_NEAREST_VOTES: 4,
  WKV_MERGE_RIGHT_LIGHT: 5,
} as const;

export const wkv_cache_field = {
  WKV_CACHE_COUNTS: 0,
  WKV_CACHE_POSITIONS: 1,
  WKV_CACHE_STEPS: 2,
  WKV_CACHE_SCORES: 3,
  WKV_CACHE_SLOTS: 4,
  WKV_CACHE_KEYS: 5,
  WKV_CACHE_VALUES: 6,
  WKV_CACHE_EVENT: 7,
} as const;

export const wkv_activation = {
  WKV_SILU: 0,
  WKV_GELU_TANH: 1,
} as const;

export const wkv_precision = {
  WKV_PRECISION_F32: 0,
  WKV_PRECISION_INT8: 1,
  WKV_PRECISION_HALF: 2,
} as const;

export const symbols = {
  wkv_abi_version: { parameters: [], result: "i32" },
  wkv_source_hash: { parameters: ["buffer","i32"], result: "i32" },
  wkv_live_handles: { parameters: [], result: "i32" },
  wkv_context_open: { parameters: ["i32","buffer","i32"], result: "i32" },
  wkv_error: { parameters: ["i32","buffer","i32"], result: "i32" },
  wkv_device: { parameters: ["i32","buffer","i32"], result: "i32" },
  wkv_close: { parameters: ["i32","i32"], result: "i32" },
  wkv_memory: { parameters: ["i32","buffer","i32"], result: "i32" },
  wkv_bytes: { parameters: ["i32","i32","buffer","i32"], result: "i32" },
  wkv_tensor_open: { parameters: ["i32","i32","i32","i32","buffer","i32"], result: "i32" },
  wkv_tensor_write: { parameters: ["i32","i32","i32","i32","buffer","i32"], result: "i32" },
  wkv_tensor_read: { parameters: ["i32","i32","i32","i32","buffer","i32"], result: "i32" },
  wkv_graph_begin: { parameters: ["i32"], result: "i32" },
  wkv_graph_end: { parameters: ["i32","buffer","i32"], result: "i32" },
  wkv_graph_run: { parameters: ["i32","i32","i32"], result: "i32", nonblocking: true },
  wkv_graph_start: { parameters: ["i32","i32"], result: "i32" },
  wkv_graph_poll: { parameters: ["i32","buffer","i32"], result: "i32" },
  wkv_embed: { parameters: ["i32","i32","i32","i32","i32","f32"], result: "i32" },
  wkv_rmsnorm: { parameters: ["i32","i32","i32","i32","i32","f32","i32"], result: "i32" },
  wkv_qk_norm: { parameters: ["i32","i32","i32","i32","i32","i32","i32","i32","f32"], result: "i32" },
  wkv_softcap: { parameters: ["i32","i32","i32","f32"], result: "i32" },
  wkv_linear: { parameters: ["i32","i32","i32","i32","i32","i32","i32","f32","i32","i32","i32","i32"], result: "i32" },
  wkv_gated: { parameters: ["i32","i32","i32","i32","i32","f32","i32","i32","i32","i32"], result: "i32" },
  wkv_rope_open: { parameters: ["i32","i32","i32","buffer","i32","i32","buffer","i32"], result: "i32" },
  wkv_cache_open: { parameters: ["i32","i32","i32","i32","i32","i32","i32","i32","i32","i32","i32","i32","i32","i32","i32","i32","buffer","i32"], result: "i32" },
  wkv_cache_reset: { parameters: ["i32","i32","i32"], result: "i32" },
  wkv_cache_read: { parameters: ["i32","i32","i32","i32","i32","i32","buffer","i32"], result: "i32" },
  wkv_attend: { parameters: ["i32","i32","i32","i32","i32","i32","f32","f32","i32"], result: "i32" },
  wkv_insert: { parameters: ["i32","i32","i32","i32","i32","i32"], result: "i32" },
  wkv_prefill: { parameters: ["i32","i32","i32","i32","i32","i32","i32","i32","f32","f32","i32"], result: "i32" },
  wkv_sample: { parameters: ["i32","i32","i32","i32","i32"], result: "i32" },
  wkv_log_prob: { parameters: ["i32","i32","i32","i32","i32"], result: "i32" },
  wkv_divergence: { parameters: ["i32","i32","i32","i32","i32"], result: "i32" },
} as const satisfies Deno.ForeignLibraryInterface;
