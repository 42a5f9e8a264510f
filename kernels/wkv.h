/**
 * wkv.h: the C ABI of WeightedKV and its manual. libwkv_cpu.so and libwkv_cuda.so both implement all of it;
 * src/backend/symbols.ts is made from it by kernels/bind.ts.
 *
 * Rules that hold for every function
 * - Only 32-bit integers, floats and caller-owned buffers cross the boundary, each buffer with its length in bytes.
 * - Contexts, tensors, rotations, caches and graphs are opaque int32_t handles, never 0; a closed or foreign handle is
 *   an error, not a crash. A handle is opened by one context and used with that context only.
 * - A function returns WKV_OK or the status of a failure, whose text wkv_error gives. Nothing exits, aborts or throws.
 * - Tensors are row-major [rows, columns]; activations are F32. One letter vocabulary: B sequences, H query heads,
 *   N key/value heads, G = H / N, D head dimension, M slots a head, T tokens of one sequence.
 * - Between wkv_graph_begin and wkv_graph_end the functions marked "op" are checked and recorded, not run.
 * - Results do not depend on the number of threads, and the same calls give the same bytes.
 */
#ifndef WKV_H
#define WKV_H
#include <stdint.h>

#define WKV_ABI_VERSION 5

#ifdef __cplusplus
#define WKV_API extern "C" __attribute__((visibility("default")))
#else
#define WKV_API __attribute__((visibility("default")))
#endif
/** Marks a call that may take longer than a millisecond: bindings run it off the main thread. */
#define WKV_API_SLOW WKV_API

enum wkv_status {
  WKV_OK = 0,
  WKV_INVALID = 1,  /* an argument is out of range, or shapes do not match */
  WKV_HANDLE = 2,   /* a handle is closed, of another kind or of another context */
  WKV_MEMORY = 3,   /* memory could not be had */
  WKV_DATA = 4,     /* weights or activations hold what cannot be computed with, such as a NaN */
  WKV_DEVICE = 5,   /* the device failed */
  WKV_INTERNAL = 6, /* a fault of the library */
};

/** Element types; a quantised row is a sequence of GGUF blocks, of 256 columns where the name ends in K, of 32 elsewhere (quants.h). */
enum wkv_dtype {
  WKV_F32 = 0,
  WKV_F16 = 1,
  WKV_BF16 = 2,
  WKV_I32 = 3,
  WKV_Q8_0 = 4, /* 34 bytes a block: f16 scale, 32 int8 */
  WKV_Q4_0 = 5, /* 18 bytes a block: f16 scale, 32 4-bit values less 8 */
  WKV_Q4_1 = 6, /* 20 bytes a block: f16 scale, f16 minimum, 32 4-bit values */
  WKV_Q5_0 = 7, /* 22 bytes a block */
  WKV_Q5_1 = 8, /* 24 */
  WKV_Q2_K = 9, /* 84 */
  WKV_Q3_K = 10, /* 110 */
  WKV_Q4_K = 11, /* 144 */
  WKV_Q5_K = 12, /* 176 */
  WKV_Q6_K = 13, /* 210 */
  WKV_IQ4_NL = 14, /* 18 */
};

/** Which dimensions a rotation turns together. */
enum wkv_pairs {
  WKV_PAIRS_HALF = 0,        /* (i, i + rotary / 2) */
  WKV_PAIRS_INTERLEAVED = 1, /* (2 i, 2 i + 1) */
};

/** Where a key is rotated. */
enum wkv_positions {
  WKV_POSITIONS_CACHE = 0, /* at its rank among the cached tokens, anew each step */
  WKV_POSITIONS_TEXT = 1,  /* once, at its place in the text */
};

/** Which token leaves when the cache is over its budget; ties go to the lowest rank. The rules are in policy.h. */
enum wkv_select {
  WKV_SELECT_NONE = 0,              /* nothing ever leaves: a full cache is an error */
  WKV_SELECT_OLDEST = 1,            /* the lowest evictable rank */
  WKV_SELECT_LOWEST_AVERAGE = 2,    /* the lowest average a / n */
  WKV_SELECT_MERGE_COST = 3,        /* the lowest w_j w_r / (w_j + w_r) |V_j - V_r|^2 with its right neighbour r */
  WKV_SELECT_MERGE_COST_LINEAR = 4, /* the same with |V_j - V_r| */
  WKV_SELECT_LITERAL_AVERAGE = 5,   /* the same as 2, but the averages replace the scores for good in every step that overflows */
  WKV_SELECT_LOWEST_SUM = 6,        /* the lowest sum a */
  WKV_SELECT_LOWEST_NOW = 7,        /* the lowest weight of this step, mean over the KV heads: one choice a layer */
  WKV_SELECT_LEAST_OFTEN = 8,       /* the fewest of the last 400 steps whose weight was above 1 / tokens */
  WKV_SELECT_KEY_NORM = 9,          /* the highest |K| */
  WKV_SELECT_KEY_LIKENESS = 10,     /* the highest cosine with the mean of the normalised keys */
  WKV_SELECT_WINDOW = 11,           /* the lowest weight over the last 32 steps, averaged over neighbouring ranks */
  WKV_SELECT_SUM_VALUE_NORM = 12,   /* the lowest a |V|_1 */
  WKV_SELECT_OUTPUT_ERROR = 13,     /* the lowest p / (1 - p) |V - o|, o the mean output of the group */
};

/** What happens to the token that leaves. */
enum wkv_merge {
  WKV_MERGE_NONE = 0,          /* dropped */
  WKV_MERGE_RIGHT = 1,         /* its value is merged into the next rank's, weighted with both averages */
  WKV_MERGE_SPREAD = 2,        /* by chance a 16th of its value is added to each of the next 16 ranks' */
  WKV_MERGE_NEAREST = 3,       /* key and value are merged into those of the likest key, if it is like enough */
  WKV_MERGE_NEAREST_VOTES = 4, /* the same for any likest key, weighted with votes and recent weights */
  WKV_MERGE_RIGHT_LIGHT = 5,   /* as 1, its own average counting a quarter */
};

/** What wkv_cache_read gives, always in rank order, `kept` entries for one layer, sequence and KV head. */
enum wkv_cache_field {
  WKV_CACHE_COUNTS = 0,    /* int32 [4]: kept, seen, merged, evicted */
  WKV_CACHE_POSITIONS = 1, /* int32 [kept]: each token's place in the text */
  WKV_CACHE_STEPS = 2,     /* int32 [kept]: n, the steps that attended to it */
  WKV_CACHE_SCORES = 3,    /* float [kept]: a, the sum of its attention weights */
  WKV_CACHE_SLOTS = 4,     /* int32 [kept]: where it lies */
  WKV_CACHE_KEYS = 5,      /* float [kept, D]: as stored, in the model's own dimension order */
  WKV_CACHE_VALUES = 6,    /* float [kept, D]: as stored */
  WKV_CACHE_EVENT = 7,     /* float [4]: the last step's victim and right neighbour (places in the text, -1: none), both averages */
};

/** What the gate of a feed-forward part goes through. */
enum wkv_activation {
  WKV_SILU = 0,      /* x / (1 + e^-x) */
  WKV_GELU_TANH = 1, /* x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) */
};

/** How a linear op holds its input. */
enum wkv_precision {
  WKV_PRECISION_F32 = 0,  /* as it is */
  WKV_PRECISION_INT8 = 1, /* for quantised weights: rounded to 8 bits in blocks of 32 */
  WKV_PRECISION_HALF = 2, /* for F16 and BF16 weights: as it is, or rounded once to their type, where products of many rows gain by that */
};

/* ---- library, context, handles ---- */

/** WKV_ABI_VERSION of the library. */
WKV_API int32_t wkv_abi_version(void);

/** Copies the hash of the sources that the library was built from (64 hexadecimal digits and a zero). */
WKV_API int32_t wkv_source_hash(char* out, int32_t out_bytes);

/** Number of handles that are open in this process. */
WKV_API int32_t wkv_live_handles(void);

/** Opens a context. threads: 0 for one a core that this process may use. */
WKV_API int32_t wkv_context_open(int32_t threads, int32_t* out /* [1] */, int32_t out_bytes);

/** Copies the text of the context's last failure, cut to out_bytes and ended by a zero; context 0: of wkv_context_open. */
WKV_API int32_t wkv_error(int32_t context, char* out, int32_t out_bytes);

/** Copies a line that names the device, its instruction set and the threads in use. */
WKV_API int32_t wkv_device(int32_t context, char* out, int32_t out_bytes);

/** Closes a handle of any kind. Closing a context closes all that it opened. What a graph uses lives as long as the graph. */
WKV_API int32_t wkv_close(int32_t context, int32_t handle);

/** Bytes that all contexts of this process hold on the device: what was opened, and memory that ops share. */
WKV_API int32_t wkv_memory(int32_t context, double* out /* [1] */, int32_t out_bytes);

/** Bytes that a tensor, rotation or cache holds. */
WKV_API int32_t wkv_bytes(int32_t context, int32_t handle, double* out /* [1] */, int32_t out_bytes);

/* ---- tensors ---- */

/** Opens a tensor of zeros. columns must be whole blocks of a quantised dtype. */
WKV_API int32_t wkv_tensor_open(int32_t context, int32_t dtype, int32_t rows, int32_t columns, int32_t* out /* [1] */, int32_t out_bytes);

/** Copies rows [row, row + rows) in, in file order. data_bytes must be their exact size. A scale that is not finite is WKV_DATA. */
WKV_API int32_t wkv_tensor_write(int32_t context, int32_t tensor, int32_t row, int32_t rows, const void* data, int32_t data_bytes);

/** Copies rows [row, row + rows) out. Quantised rows come out as floats. */
WKV_API int32_t wkv_tensor_read(int32_t context, int32_t tensor, int32_t row, int32_t rows, void* out, int32_t out_bytes);

/* ---- graphs ---- */

/** Starts recording: the ops that follow are checked and kept for wkv_graph_run. A context records one graph at a time. */
WKV_API int32_t wkv_graph_begin(int32_t context);

/** Ends recording and gives the graph; an op that failed since wkv_graph_begin makes it fail. */
WKV_API int32_t wkv_graph_end(int32_t context, int32_t* out /* [1] */, int32_t out_bytes);

/** Runs a graph `times` times over. Runs of one context follow each other, and may begin while a graph is being recorded, which they
 *  leave alone. After a failure the caches it wrote are undefined. */
WKV_API_SLOW int32_t wkv_graph_run(int32_t context, int32_t graph, int32_t times);

/** Starts one run of a graph and, on a GPU, returns while it goes on; other functions of the context wait for it where they must.
 *  Waiting so for a short run is cheaper than having a thread wake for wkv_graph_run. */
WKV_API int32_t wkv_graph_start(int32_t context, int32_t graph);

/** Gives 1 when the run that was started last has ended, else 0. Fails, once, where that run failed. */
WKV_API int32_t wkv_graph_poll(int32_t context, int32_t* out /* [1] */, int32_t out_bytes);

/* ---- ops on activations ---- */

/** op: out[i] = scale * table[tokens[i]]. An id outside the table is WKV_DATA. */
WKV_API int32_t wkv_embed(int32_t context, int32_t out /* [>= rows, C] */, int32_t table /* [vocabulary, C] */, int32_t tokens /* I32 [1, >= rows] */, int32_t rows, float scale);

/** op: out[i] = x[i] / sqrt(mean(x[i]^2) + epsilon) * weight (+ what out held, when add is 1); out may be x. */
WKV_API int32_t wkv_rmsnorm(int32_t context, int32_t out, int32_t x, int32_t rows, int32_t weight /* [1, C] */, float epsilon, int32_t add);

/** op: wkv_rmsnorm of queries and keys where they lie, before they are rotated. The weights tell what is normed: every head on its own
 *  ([1, D]), or all query heads and all key heads together ([1, H * D] and [1, N * D]). */
WKV_API int32_t wkv_qk_norm(int32_t context, int32_t qkv /* [>= rows, (H + 2 N) * D] */, int32_t rows, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t q_weight, int32_t k_weight, float epsilon);

/** op: x[i] = cap tanh(x[i] / cap) where it lies; cap above 0. */
WKV_API int32_t wkv_softcap(int32_t context, int32_t x /* [>= rows, C] */, int32_t rows, float cap);

/** op: out[i, out_column + j] = norm(x[x_row + i]) . w[j] + bias[j] (+ what out held, when add is 1), for rows i and all rows j of w.
 *  norm and bias are 0 or tensors [1, C]; norm is wkv_rmsnorm's. out must not be x unless norm, x and out are of one width and add is 1. */
WKV_API int32_t wkv_linear(int32_t context, int32_t out, int32_t out_column, int32_t x, int32_t x_row, int32_t rows, int32_t norm, float epsilon, int32_t w /* [J, C] */, int32_t bias, int32_t add, int32_t precision);

/** op: out[i, j] = activation(norm(x[i]) . gate[j]) * (norm(x[i]) . up[j]). */
WKV_API int32_t wkv_gated(int32_t context, int32_t out, int32_t x, int32_t rows, int32_t norm, float epsilon, int32_t gate /* [J, C] */, int32_t up /* [J, C] */, int32_t activation, int32_t precision);

/* ---- cache ---- */

/** Opens a rotation of the first 2 * count dimensions of a head by position * frequencies[i]; tables reach `positions` ranks, 2^21 at most. */
WKV_API int32_t wkv_rope_open(int32_t context, int32_t head_dim, int32_t pairs, const float* frequencies /* [count] */, int32_t frequencies_bytes, int32_t positions, int32_t* out /* [1] */, int32_t out_bytes);

/** Opens an empty cache of exactly `slots` tokens a KV head, in every layer and sequence; nothing is allocated later.
 *  interval: tokens that leave, one after another, when it overflows; seed: of policies that draw.
 *  Must hold: 0 <= sinks, 0 <= recent, sinks + recent <= slots; 1 <= interval <= max(1, slots - sinks - recent);
 *  heads a multiple of kv_heads; the rotation is of this head
 *  dimension and, with positions in the cache, of more than `slots` positions; dtype F32, F16 or BF16. */
WKV_API int32_t wkv_cache_open(int32_t context, int32_t rope, int32_t layers, int32_t sequences, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t slots, int32_t sinks, int32_t recent, int32_t interval, int32_t select, int32_t merge, int32_t seed, int32_t positions, int32_t dtype, int32_t* out /* [1] */, int32_t out_bytes);

/** Empties one sequence, or all of them (-1). */
WKV_API int32_t wkv_cache_reset(int32_t context, int32_t cache, int32_t sequence);

/** Copies a wkv_cache_field of one layer, sequence and KV head out. */
WKV_API int32_t wkv_cache_read(int32_t context, int32_t cache, int32_t field, int32_t layer, int32_t sequence, int32_t kv_head, void* out, int32_t out_bytes);

/** op: one decode step of one layer for every sequence (the paper's Algorithm 1). The new token attends over cache and itself at
 *  rank `kept`; every token's mean weight over its query heads is added to its score; if kept + 1 > slots the policy picks
 *  `interval` victims, merges or drops them, and the new token takes a freed slot. k and v are rounded to the cache's type first.
 *  softcap: 0, or the scores s = scale q . k become softcap tanh(s / softcap) before the softmax.
 *  victims: 0, or I32 [B, N], the rank that must leave first (-1: the policy's own choice).
 *  kv_head: the row's KV head that is the cache's first. Rows may have more heads than the cache, with as many query heads a KV head:
 *  H and N are the row's, and the others' outputs stay as they are. */
WKV_API int32_t wkv_attend(int32_t context, int32_t cache, int32_t layer, int32_t kv_head, int32_t out /* [B, H * D] */, int32_t qkv /* [B, (H + 2 N) * D] */, float scale, float softcap, int32_t victims);

/** op: steps 3 to 6 of wkv_attend with attention weights that the caller computed: kv[b] holds N keys, then N values. */
WKV_API int32_t wkv_insert(int32_t context, int32_t cache, int32_t layer, int32_t kv /* [B, 2 N * D] */, int32_t weights /* [B, N * (M + 1)], rank order */, int32_t victims);

/** op: `rows` tokens of one sequence at once: causal attention over cache and tokens, each column's sum of weights added to its score
 *  as if streamed. When kept + rows > slots the policy is then applied with the state of that moment until slots + 1 - interval are
 *  left. Refused for policies that keep a record of each step's weights, and to let tokens leave for those that choose by one
 *  step's weights (wkv_by_step, wkv_uses_now in policy.h).
 *  window: 0, or how many ranks a token looks back on, itself counted: those before weigh nothing. kv_head and softcap are wkv_attend's. */
WKV_API int32_t wkv_prefill(int32_t context, int32_t cache, int32_t layer, int32_t kv_head, int32_t sequence, int32_t out /* [>= rows, H * D] */, int32_t qkv /* [>= rows, (H + 2 N) * D] */, int32_t rows, float scale, float softcap, int32_t window);

/* ---- from logits to tokens ---- */

/** op: the next token of each row of logits. settings: F32 [B, 4]: temperature (0: the first of the highest), top-k (0: all), top-p
 *  (1: all), min-p (0: all), applied as top-k, top-p, min-p, temperature. rng: I32 [B, 4]: seed low, seed high, draws so far, unused. */
WKV_API int32_t wkv_sample(int32_t context, int32_t tokens /* I32 [1, B] */, int32_t logits /* [B, vocabulary] */, int32_t settings, int32_t rng);

/** op: out[i] = natural logarithm of the probability of targets[i] under logits[i]. */
WKV_API int32_t wkv_log_prob(int32_t context, int32_t out /* [1, >= rows] */, int32_t logits /* [>= rows, vocabulary] */, int32_t targets /* I32 [1, >= rows] */, int32_t rows);

/** op: how far the distributions of `others` are from those of `logits`. out[i] = the Kullback-Leibler divergence of row i in nats,
 *  sum over j of p (ln p - ln q) with p of `logits` and q of `others`, and 1 where the first of the highest is the same in both, else 0. */
WKV_API int32_t wkv_divergence(int32_t context, int32_t out /* [>= rows, 2] */, int32_t logits /* [>= rows, vocabulary] */, int32_t others /* [>= rows, vocabulary] */, int32_t rows);

#endif
