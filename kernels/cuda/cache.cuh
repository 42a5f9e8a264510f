/**
 * cache.cuh: the cache of the CUDA library, shared by attend.cu, cache.cu and prefill.cu.
 *
 * Slots never move; `ranks[slot]` is a token's rank. The used slots of a head are always 0 .. kept - 1. State has room for slots + 1
 * entries, the last of which a new token holds until it takes its victim's slot. Everything that a step changes lies on the device.
 */
#pragma once
#include <climits>

#include "../policy.h"
#include "../rows.hpp"
#include "common.cuh"

namespace wkv {

/** Counters of one head; `event` as WKV_CACHE_EVENT. */
struct Counts {
  int32_t kept, steps, merged, evicted;
  float event[4];
  float threshold;  // of nearest
  int32_t unused[3];
};

/** Cosine and sine of an angle that the tables do not reach; a call, as in line it would double every kernel. */
static __device__ __noinline__ float2 turn_beyond(double angle) {
  double s, c;
  sincos(angle, &s, &c);
  return make_float2(static_cast<float>(c), static_cast<float>(s));
}

/** A rotation as kernels see it. */
struct RopeView {
  int32_t pairs, positions;      // pairs that are rotated; positions that the tables reach
  bool interleaved;              // the model's order
  const float *cosines, *sines;  // [positions, pairs]
  const double* frequencies;
  const uint64_t* phases;        // each pair's angle a position, in turns of 2^64
  const uint32_t* turns;         // the same, rounded to turns of 2^32

  /** Where dimension d of the library's own order, in which the rotated pairs are (i, i + pairs), lies in the model's. */
  __host__ __device__ int32_t source(int32_t d) const {
    if (!interleaved || d >= 2 * pairs) return d;
    return d < pairs ? 2 * d : 2 * (d - pairs) + 1;
  }
  /** Cosine and sine of pair i at a position. */
  __device__ float2 at(int64_t position, int32_t i) const {
    if (position < positions) return make_float2(cosines[position * pairs + i], sines[position * pairs + i]);
    return turn_beyond(frequencies[i] * static_cast<double>(position));
  }
};

struct Rope : Object {
  int32_t head_dim, pairs, count, positions;
  DeviceRef tables, frequencies, phases, turns;
  Rope() : Object(Kind::Rope) {}
  size_t bytes() const override { return tables->bytes(); }
  RopeView view() const {
    const float* cosines = tables->as<float>();
    return {count, positions, pairs == WKV_PAIRS_INTERLEAVED, cosines, cosines + int64_t{positions} * count, frequencies->as<double>(), phases->as<uint64_t>(), turns->as<uint32_t>()};
  }
};
using RopeRef = std::shared_ptr<Rope>;

/** State of some tokens of one head, by entry, and scratch memory for those that choose among them. */
struct Entries {
  float* score;
  int32_t* birth;   // the step that fed the token, from 1: its place in the text + 1
  int32_t* rank;    // -1: it has left
  uint32_t* words;  // [words a token, stride]: what the policy keeps of a token (policy.h)
  int64_t stride;
  float* gap;       // the first word, |V_j - V_r|^2 with the right neighbour, for rules that ask for it; else null
  float* by_rank;   // [ranks] scratch: averages, for the same rules; what is pooled
  float* measure;   // scratch of rules that measure tokens
  float* now;       // scratch: this step's weights, where they are known
  int32_t* freed;   // scratch: slots that victims left, in order; null where there is one at most

  __device__ float* number(int32_t w) const { return reinterpret_cast<float*>(words) + w * stride; }
};

/** A cache, or one layer of it, as kernels see it. */
struct CacheView {
  int32_t sequences, heads, kv_heads, head_dim, slots, sinks, recent, interval, select, merge, seed, width;
  bool text;        // keys are rotated once, at their place in the text
  bool later;       // a second launch chooses, from `weights`
  int64_t first;    // the layer's first head
  uint8_t *keys, *values;
  float* scores;
  int32_t *births, *ranks;
  uint32_t* words;
  Counts* counts;
  // Scratch memory of one layer, [heads of the layer, slots + 1], for rules that ask for gaps (the first two) and where a second launch chooses.
  float* by_rank;
  int32_t* places;    // the slot of each rank
  float *measures, *now;
  float* weights;     // of a step, in rank order
  int32_t* freed;
  RopeView rope;

  __device__ int32_t group() const { return heads / kv_heads; }
  template <typename T>
  __device__ T* keys_of(int64_t head) const { return reinterpret_cast<T*>(keys) + head * slots * head_dim; }
  template <typename T>
  __device__ T* values_of(int64_t head) const { return reinterpret_cast<T*>(values) + head * slots * head_dim; }
  __device__ bool gapped() const { return wkv_uses_gap(select); }
  __device__ int32_t* places_of(int64_t head) const { return places + (head - first) * (slots + 1); }
  __device__ Entries entries(int64_t head) const {
    const int64_t stride = slots + 1, at = head * stride, unit = (head - first) * stride;
    uint32_t* own = words + at * width;
    return {scores + at, births + at, ranks + at, own, stride, gapped() ? reinterpret_cast<float*>(own) : nullptr, by_rank + unit, measures + unit, later ? now + unit : nullptr, later ? freed + unit : nullptr};
  }
};

struct Cache : Object {
  RopeRef rope;
  int32_t layers, sequences, heads, kv_heads, head_dim, slots, sinks, recent, interval, select, merge, seed, positions, dtype;
  DeviceRef memory;
  size_t keys_at, values_at, scores_at, births_at, ranks_at, words_at, counts_at, scratch_at;
  std::vector<uint64_t> touched;  // a layer's last writer, as the context counts launches
  Cache() : Object(Kind::Cache) {}
  size_t bytes() const override { return memory->bytes(); }
  int32_t width() const { return wkv_words(select, merge); }
  bool later() const { return !wkv_in_one_launch(select, merge, interval); }
  int32_t group() const { return heads / kv_heads; }
  /** Where its heads lie in rows that begin with its KV head kv_head; `out_columns`: of a row of outputs. */
  RowHeads row_heads(int32_t out_columns, int32_t kv_head) const { return RowHeads(group(), kv_heads, head_dim, out_columns, kv_head); }
  int64_t row_bytes() const { return int64_t{head_dim} * (dtype == WKV_F32 ? 4 : 2); }
  int64_t head(int32_t layer, int32_t sequence, int32_t kv_head) const { return (int64_t{layer} * sequences + sequence) * kv_heads + kv_head; }
  void check_layer(int32_t layer) const;
  /** Says that the kernel just launched writes a layer. */
  void touch(const Context& ctx, int32_t layer) { touched[layer] = ctx.launches; }
  /** Whether it does not: the next kernel may then read the layer before this one has ended. */
  bool untouched(const Context& ctx, int32_t layer) const { return touched[layer] != ctx.launches; }
  CacheView view(int32_t layer) const;
};
using CacheRef = std::shared_ptr<Cache>;

CacheRef find_cache(int32_t context, int32_t handle, int32_t layer);
TensorRef find_victims(int32_t context, int32_t handle, const Cache& cache);

/** The angle at a position, in turns of 2^32 from -1/2 to 1/2. */
__device__ inline float phase_at(uint32_t position, uint32_t high, uint32_t low) {
  return static_cast<float>(static_cast<int32_t>(position * high + __umulhi(position, low)));
}

/** Cosine and sine of a pair at a position, and a pair turned by them: the same bits wherever a decode step stores a key. */
__device__ inline float2 turn_at(uint32_t position, uint64_t phase) {
  float2 turn;
  sincospif(phase_at(position, static_cast<uint32_t>(phase >> 32), static_cast<uint32_t>(phase)) * 0x1p-31f, &turn.y, &turn.x);
  return turn;
}
__device__ inline float2 rotated(float2 pair, float2 turn) {
  return make_float2(fmaf(pair.x, turn.x, -(pair.y * turn.y)), fmaf(pair.x, turn.y, pair.y * turn.x));
}

/** Calls body with a value of the cache's element type. */
template <typename Body>
void by_cache_type(int32_t dtype, Body body) {
  if (dtype == WKV_F32) body(float());
  else if (dtype == WKV_F16) body(__half());
  else body(__nv_bfloat16());
}

/** Whether a softmax's sum is a number: it is none when a query or key was none. */
__device__ inline bool is_sum(float sum) { return sum > 0.0f && sum <= 3.4e38f; }

/** |a - b|^2 of two stored rows, by one warp; a call, as few policies need it. */
template <typename T>
static __device__ __noinline__ float warp_gap(const T* a, const T* b, int32_t dim) {
  float total = 0.0f;
  for (int32_t d = threadIdx.x & 31; d < dim; d += 32) {
    const float x = to_float(a[d]) - to_float(b[d]);
    total += x * x;
  }
  return warp_sum(total);
}

/** New keys and values of the sequences, in floats: a head's key, how far apart rows lie, and a value from its key. */
struct NewRows {
  const float* keys;
  int64_t row, value;
};

/** Launches what is left of a step when wkv_attend's launch left it to a second one: the layer's weights lie in `weights`. */
void settle_step(Context& ctx, const Cache& cache, const CacheView& view, const NewRows& rows, const float* weights, const int32_t* victims);

}  // namespace wkv
