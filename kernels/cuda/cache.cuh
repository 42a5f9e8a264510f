/**
 * cache.cuh: the cache of the CUDA library and steps 3 to 6 of a decode step, shared by attend.cu, cache.cu and prefill.cu.
 *
 * Slots never move; `ranks[slot]` is a token's rank. The used slots of a head are always 0 .. kept - 1. State has room for slots + 1
 * entries, the last of which a new token holds until it takes its victim's slot. Everything that a step changes lies on the device.
 */
#pragma once
#include <climits>

#include "../policy.h"
#include "common.cuh"

namespace wkv {

/** Counters of one head; `event` as WKV_CACHE_EVENT. */
struct Counts {
  int32_t kept, steps, merged, evicted;
  float event[4];
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
  DeviceRef tables, frequencies, phases;
  Rope() : Object(Kind::Rope) {}
  size_t bytes() const override { return tables->bytes(); }
  RopeView view() const {
    const float* cosines = tables->as<float>();
    return {count, positions, pairs == WKV_PAIRS_INTERLEAVED, cosines, cosines + int64_t{positions} * count, frequencies->as<double>(), phases->as<uint64_t>()};
  }
};
using RopeRef = std::shared_ptr<Rope>;

/** State of some tokens of one head, by entry. */
struct Entries {
  float* score;
  int32_t* birth;  // the step that fed the token, from 1: its place in the text + 1
  int32_t* rank;   // -1: it has left
  float* gap;      // |V_j - V_r|^2 with the right neighbour, for rules that ask for it; else null
  float* average;  // [ranks] scratch, for the same rules
  int32_t* freed;  // scratch: slots that victims left, in order; null where there is one at most
};

/** A cache, or one layer of it, as kernels see it. */
struct CacheView {
  int32_t sequences, heads, kv_heads, head_dim, slots, sinks, recent, select, merge;
  bool text;        // keys are rotated once, at their place in the text
  int64_t first;    // the layer's first head
  uint8_t *keys, *values;
  float *scores, *gaps, *averages;
  int32_t *births, *ranks;
  int32_t* places;  // [ranks] scratch of rules that ask for gaps: the slot of each rank
  Counts* counts;
  RopeView rope;

  __device__ int32_t group() const { return heads / kv_heads; }
  template <typename T>
  __device__ T* keys_of(int64_t head) const { return reinterpret_cast<T*>(keys) + head * slots * head_dim; }
  template <typename T>
  __device__ T* values_of(int64_t head) const { return reinterpret_cast<T*>(values) + head * slots * head_dim; }
  __device__ bool gapped() const { return gaps != nullptr; }
  __device__ Entries entries(int64_t head) const {
    const int64_t at = head * (slots + 1);
    return {scores + at, births + at, ranks + at, gaps ? gaps + at : nullptr, averages ? averages + at : nullptr, nullptr};
  }
};

struct Cache : Object {
  RopeRef rope;
  int32_t layers, sequences, heads, kv_heads, head_dim, slots, sinks, recent, select, merge, positions, dtype;
  DeviceRef memory;
  size_t keys_at, values_at, scores_at, births_at, ranks_at, gaps_at, averages_at, places_at, counts_at;
  Cache() : Object(Kind::Cache) {}
  size_t bytes() const override { return memory->bytes(); }
  bool gapped() const { return wkv_select_uses_gap(select); }
  int32_t group() const { return heads / kv_heads; }
  int64_t row_bytes() const { return int64_t{head_dim} * (dtype == WKV_F32 ? 4 : 2); }
  int64_t head(int32_t layer, int32_t sequence, int32_t kv_head) const { return (int64_t{layer} * sequences + sequence) * kv_heads + kv_head; }
  void check_layer(int32_t layer) const;
  CacheView view(int32_t layer) const;
};
using CacheRef = std::shared_ptr<Cache>;

CacheRef find_cache(int32_t context, int32_t handle, int32_t layer);
TensorRef find_victims(int32_t context, int32_t handle, const Cache& cache);

/** Calls body with a value of the cache's element type. */
template <typename Body>
void by_cache_type(int32_t dtype, Body body) {
  if (dtype == WKV_F32) body(float());
  else if (dtype == WKV_F16) body(__half());
  else body(__nv_bfloat16());
}

/** Whether a softmax's sum is a number: it is none when a query or key was none. */
__device__ inline bool is_sum(float sum) { return sum > 0.0f && sum <= 3.4e38f; }

// ---- select, merge, insert: one block a head ----

/** Shared memory of settle. */
struct SettleArea {
  float value[32];
  int32_t rank[32], bad[32];
  int32_t victim;          // its rank
  int32_t around[4];       // entries of the ranks victim - 1 .. victim + 2; -1: none
  int32_t freed, arrived_left, first_freed;
  float w_v, w_r;
};

/** |a - b|^2 of two stored rows, by one warp. */
template <typename T>
__device__ inline float warp_gap(const T* a, const T* b, int32_t dim) {
  float total = 0.0f;
  for (int32_t d = threadIdx.x & 31; d < dim; d += 32) {
    const float x = to_float(a[d]) - to_float(b[d]);
    total += x * x;
  }
  return warp_sum(total);
}

/**
 * Steps 4 to 6 for one head: entries [0, kept) are its slots, [kept, kept + arrived) the incoming tokens, whose rows are in_keys and
 * in_values; scores already have this step's weights, counts->steps counts it. While more than `slots` are left the policy's victim (or
 * rank `forced`, -1: none) leaves, merged into its right neighbour or dropped; what is left of the incoming tokens then goes into free
 * slots. `e` is the head's own state or, when more than one token arrives, a copy, which is written back. All threads call it.
 */
template <typename T>
__device__ void settle(const CacheView& c, int64_t head, const Entries& e, int32_t kept, int32_t arrived, T* in_keys, T* in_values, int32_t forced, const Faults& faults, SettleArea& area) {
  const int32_t tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, warps = blockDim.x >> 5, dim = c.head_dim, total = kept + arrived;
  Counts& counts = c.counts[head];
  T *keys = c.keys_of<T>(head), *values = c.values_of<T>(head);
  const auto value_of = [&](int32_t entry) { return entry < kept ? values + int64_t{entry} * dim : in_values + int64_t{entry - kept} * dim; };
  const int32_t step = counts.steps;
  const auto average = [&](int32_t entry) { return wkv_average(e.score[entry], step - e.birth[entry] + 1); };
  if (tid == 0) area.freed = 0, area.arrived_left = arrived, area.around[0] = -1;
  __syncthreads();
  if (c.gapped()) {
    for (int32_t i = tid; i < kept; i += blockDim.x) {
      if (e.rank[i] == kept - 1) area.around[0] = i;
    }
    __syncthreads();
    for (int32_t i = kept - 1 + warp; i < total - 1; i += warps) {
      const int32_t entry = i < kept ? area.around[0] : i;
      if (entry < 0) continue;
      const float gap = warp_gap(value_of(entry), value_of(i + 1), dim);
      if (lane == 0) e.gap[entry] = gap;
    }
    __syncthreads();
  }
  if (total > c.slots && c.select == WKV_SELECT_NONE) {
    if (tid == 0) faults.report(Fault::Full, c.slots);
    return;
  }
  for (int32_t count = total; count > c.slots; count--) {
    // Select.
    if (forced == -1) {
      if (c.gapped()) {
        for (int32_t i = tid; i < total; i += blockDim.x) {
          if (e.rank[i] >= 0) e.average[e.rank[i]] = average(i);
        }
        __syncthreads();
      }
      float least = INFINITY;
      int32_t best = INT_MAX, bad = INT_MAX;
      for (int32_t i = tid; i < total; i += blockDim.x) {
        const int32_t rank = e.rank[i];
        if (rank < 0 || !wkv_evictable(rank, count, c.sinks, c.recent)) continue;
        float value = INFINITY;  // the newest has no right neighbour to be merged with
        if (!c.gapped()) value = wkv_select_value(c.select, rank, average(i), 0.0f, 0.0f);
        else if (rank + 1 < count) value = wkv_select_value(c.select, rank, e.average[rank], e.average[rank + 1], e.gap[i]);
        if (isnan(value)) bad = min(bad, rank);
        if (value < least || (value == least && rank < best)) least = value, best = rank;
      }
#pragma unroll
      for (int o = 16; o > 0; o >>= 1) {
        const float v = __shfl_xor_sync(0xffffffffu, least, o);
        const int32_t r = __shfl_xor_sync(0xffffffffu, best, o);
        if (v < least || (v == least && r < best)) least = v, best = r;
      }
      bad = __reduce_min_sync(0xffffffffu, bad);
      if (lane == 0) area.value[warp] = least, area.rank[warp] = best, area.bad[warp] = bad;
      __syncthreads();
      if (tid == 0) {
        for (int w = 1; w < warps; w++) {
          if (area.value[w] < least || (area.value[w] == least && area.rank[w] < best)) least = area.value[w], best = area.rank[w];
          bad = min(bad, area.bad[w]);
        }
        area.victim = best == INT_MAX ? -1 : best;
        area.bad[0] = bad;
      }
    } else if (tid == 0) {
      area.victim = forced, area.bad[0] = INT_MAX;
    }
    if (tid < 4) area.around[tid] = -1;
    __syncthreads();
    const int32_t j = area.victim, bad = area.bad[0];
    if (bad != INT_MAX) {
      if (tid == 0) faults.report(Fault::NanScore, bad);
      return;
    }
    if (!wkv_evictable(j, count, c.sinks, c.recent)) {
      if (tid == 0) faults.report(Fault::Rank, j, count, c.sinks, c.recent);
      return;
    }
    // Take the rank out.
    for (int32_t i = tid; i < total; i += blockDim.x) {
      const int32_t rank = e.rank[i];
      if (rank >= j - 1 && rank <= j + 2 && rank >= 0) area.around[rank - j + 1] = i;
      if (rank == j) e.rank[i] = -1;
      else if (rank > j) e.rank[i] = rank - 1;
    }
    __syncthreads();
    const int32_t left = area.around[0], victim = area.around[1], right = area.around[2], far = area.around[3];
    const bool neighbour = j + 1 < count, merges = c.merge == WKV_MERGE_RIGHT && neighbour;
    const float w_v = average(victim), w_r = neighbour ? average(right) : 0.0f;
    // Merge.
    if (merges && w_v + w_r > 0.0f) {
      const T* v = value_of(victim);
      T* r = value_of(right);
      for (int32_t d = tid; d < dim; d += blockDim.x) r[d] = from_float<T>(wkv_merged(w_v, to_float(v[d]), w_r, to_float(r[d])));
    }
    if (tid == 0) {
      counts.event[0] = static_cast<float>(e.birth[victim] - 1);
      counts.event[1] = merges ? static_cast<float>(e.birth[right] - 1) : -1.0f;
      counts.event[2] = w_v;
      counts.event[3] = w_r;
      if (merges) counts.merged++;
      else counts.evicted++;
      if (victim < kept) {
        if (area.freed == 0) area.first_freed = victim;
        if (e.freed) e.freed[area.freed] = victim;
        area.freed++;
      } else {
        area.arrived_left--;
      }
    }
    __syncthreads();
    if (c.gapped() && neighbour) {
      if (warp == 0 && left >= 0) {
        const float gap = warp_gap(value_of(left), value_of(right), dim);
        if (lane == 0) e.gap[left] = gap;
      }
      if (warp == 1 && far >= 0) {
        const float gap = warp_gap(value_of(right), value_of(far), dim);
        if (lane == 0) e.gap[right] = gap;
      }
      __syncthreads();
    }
  }
  // Insert what is left of the incoming tokens, in rank order: freed slots first, then unused ones.
  const int32_t freed = area.freed, stayed = kept - freed;
  const Entries own = c.entries(head);
  if (own.rank != e.rank) {
    for (int32_t i = tid; i < kept; i += blockDim.x) {
      if (e.rank[i] < 0) continue;
      own.score[i] = e.score[i], own.birth[i] = e.birth[i], own.rank[i] = e.rank[i];
      if (e.gap) own.gap[i] = e.gap[i];
    }
  }
  for (int32_t t = warp; t < arrived; t += warps) {
    const int32_t rank = e.rank[kept + t];
    if (rank < 0) continue;
    const int32_t order = rank - stayed;
    const int32_t slot = order >= freed ? kept + order - freed : e.freed ? e.freed[order] : area.first_freed;
    for (int32_t d = lane; d < dim; d += 32) {
      keys[int64_t{slot} * dim + d] = in_keys[int64_t{t} * dim + d];
      values[int64_t{slot} * dim + d] = in_values[int64_t{t} * dim + d];
    }
    if (lane == 0) {
      own.score[slot] = e.score[kept + t], own.birth[slot] = e.birth[kept + t], own.rank[slot] = rank;
      if (e.gap) own.gap[slot] = e.gap[kept + t];
    }
  }
  if (tid == 0) counts.kept = stayed + area.arrived_left;
}

}  // namespace wkv
