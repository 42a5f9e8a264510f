/** cache.hpp: the cache of the CPU library and steps 4 to 6 of a decode step, shared by wkv_attend, wkv_insert and wkv_prefill. */
#pragma once
#include "../policy.h"
#include "../rows.hpp"
#include "common.hpp"

namespace wkv {

/**
 * The tokens of one head in rank order. `slot` says where a token's K and V lie (they never move); a negative slot -1 - t is row t of
 * the incoming tokens, which have no slot yet. `words` [words a token, stride] is what the policy keeps of a token (policy.h).
 */
struct Ranked {
  float* score;
  int32_t* birth;  // the step that fed the token, from 1: its place in the text + 1
  int32_t* slot;
  uint32_t* words;
  int64_t stride;
  int32_t count, width;  // tokens; words a token

  uint32_t* word(int32_t w) const { return words + w * stride; }
  float* number(int32_t w) const { return reinterpret_cast<float*>(word(w)); }
  /** Takes a rank out. */
  void remove(int32_t rank);
  /** Adds incoming row t at the end, its words 0. */
  void add(int32_t t, int32_t birth_step);
};

/** Counters of one head. */
struct Counts {
  int32_t kept = 0, steps = 0, merged = 0, evicted = 0;
  float event[4] = {-1.0f, -1.0f, 0.0f, 0.0f};
  float threshold = WKV_UNSET;  // of nearest
};

struct Cache : Object {
  RopeRef rope;
  int32_t layers, sequences, heads, kv_heads, head_dim, slots, sinks, recent, interval, select, merge, seed, positions, dtype;
  Memory<uint8_t> keys, values;                 // [layers, B, N, slots, D] in `dtype`, keys in the library's order of dimensions
  Memory<float> scores;                         // [layers, B, N, slots + 1]
  Memory<int32_t> births, places;               // the same
  Memory<uint32_t> words;                       // [layers, B, N, words a token, slots + 1]
  std::vector<Counts> counts;                   // [layers, B, N]
  Cache() : Object(Kind::Cache) {}

  size_t bytes() const override;
  int32_t group() const { return heads / kv_heads; }
  /** Where its heads lie in rows that begin with its KV head kv_head; `out_columns`: of a row of outputs. */
  RowHeads row_heads(int32_t out_columns, int32_t kv_head) const { return RowHeads(group(), kv_heads, head_dim, out_columns, kv_head); }
  int64_t row_bytes() const { return int64_t{head_dim} * (dtype == WKV_F32 ? 4 : 2); }
  int64_t head(int32_t layer, int32_t sequence, int32_t kv_head) const { return (int64_t{layer} * sequences + sequence) * kv_heads + kv_head; }
  uint8_t* keys_of(int64_t head) { return keys.data() + head * slots * row_bytes(); }
  uint8_t* values_of(int64_t head) { return values.data() + head * slots * row_bytes(); }
  Ranked ranked(int64_t head);
  int32_t width() const { return wkv_words(select, merge); }
  /** Whether all KV heads of a layer choose as one. */
  bool by_layer() const { return select == WKV_SELECT_LOWEST_NOW; }
  /** The rotation that attention applies to stored rows from rank `rank` on. */
  Rotation rotation(int32_t rank) const;
  void check_layer(int32_t layer) const;
};
using CacheRef = std::shared_ptr<Cache>;

/** Incoming keys and values of one head, in the cache's dtype, row_bytes apart. */
struct Incoming {
  uint8_t* keys;
  uint8_t* values;
};

/**
 * Steps 4 to 6 for one head (settle.cpp): `ranked` holds the cached tokens and the incoming ones behind them, scores already added.
 * While too many are left the policy's victim (rank `forced` at first, -1: none) leaves; the incoming tokens that are left are then
 * copied into free slots. now: the weights of this step in rank order, mean over the layer where it chooses as one; null: unknown.
 */
void settle(const Loops& loops, Cache& cache, int64_t head, Ranked& ranked, const Incoming& incoming, int32_t forced, const float* now);

/** The mean of the KV heads' weights, [heads, stride], over their first `count` ranks. */
void mean_of_heads(const Loops& loops, const float* weights, int64_t stride, int32_t heads, int32_t count, std::vector<float>& mean);

/** Turns a new key into what is stored: the library's order, rotated (`at` its place in the text) when positions are the text's, in the
 *  cache's dtype; `key` is changed. */
void store_key(const Loops& loops, const Cache& cache, float* key, const Rotation& at, uint8_t* out);

/** Rotates a head that is in the library's order. */
void rotate(float* head, const Rotation& by);

/** Refuses a softmax whose sum is no number: a query or key was none. */
inline void check_sum(float sum, int32_t layer) {
  if (!(sum > 0.0f && sum <= 3.4e38f)) fail(WKV_DATA, "The attention of layer " + std::to_string(layer) + " is not a number");
}

CacheRef find_cache(int32_t context, int32_t handle, int32_t layer);

/** The ranks that must leave, per sequence and KV head. */
TensorRef find_victims(int32_t context, int32_t handle, const Cache& cache);

}  // namespace wkv
