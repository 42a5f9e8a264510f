/** settle.cuh: steps 4 to 6 of a decode step for one head by one block: select, merge, insert; used by settle.cu and prefill.cu. */
#pragma once
#include "cache.cuh"

namespace wkv {

/** Shared memory of settle. */
struct SettleArea {
  float value[32];
  int32_t rank[32], bad[32];
  int32_t victim;          // its rank
  int32_t around[4];       // entries of the ranks victim - 1 .. victim + 2; -1: none
  int32_t freed, arrived_left, first_freed, holes;
  float sum[512], part[512];  // a row's worth, and parts of it
};

/** Sums over a warp, alike in every lane. */
__device__ inline float2 warp_sums(float x, float y) { return make_float2(warp_sum(x), warp_sum(y)); }

/** One head while tokens leave it: entries [0, kept) are its slots, [kept, total) the incoming tokens. All threads call everything. */
template <typename T>
struct Settling {
  const CacheView& c;
  const int64_t head;
  const Entries& e;
  const int32_t kept, total;
  T *const in_keys, *const in_values;
  SettleArea& area;
  const int32_t tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, threads = blockDim.x, warps = threads >> 5, dim = c.head_dim;
  const int32_t step = c.counts[head].steps;
  T *const keys = c.keys_of<T>(head), *const values = c.values_of<T>(head);

  __device__ T* key_of(int32_t entry) const { return entry < kept ? keys + int64_t{entry} * dim : in_keys + int64_t{entry - kept} * dim; }
  __device__ T* value_of(int32_t entry) const { return entry < kept ? values + int64_t{entry} * dim : in_values + int64_t{entry - kept} * dim; }
  __device__ float average(int32_t entry) const { return wkv_average(e.score[entry], step - e.birth[entry] + 1); }
  /** The weight of a token's value in a merge, and what an average rule minimises. */
  __device__ float weight(int32_t entry) const { return c.select == WKV_SELECT_LITERAL_AVERAGE ? e.score[entry] : average(entry); }
  __device__ bool there(int32_t entry) const { return e.rank[entry] >= 0; }

  /** Notes this step's weights, whether or not a token leaves. */
  __device__ void note() const {
    const bool often = c.select == WKV_SELECT_LEAST_OFTEN;
    if (!often && c.select != WKV_SELECT_WINDOW) return;
    const float threshold = 1.0f / static_cast<float>(total);
    const int32_t bit = (step - 1) % WKV_OFTEN_STEPS;
    for (int32_t i = tid; i < total; i += threads) {
      if (often) {
        uint32_t& word = e.words[bit / 32 * e.stride + i];
        word = e.now[i] > threshold ? word | 1u << bit % 32 : word & ~(1u << bit % 32);
      } else {
        e.number((step - 1) % WKV_WINDOW_STEPS)[i] = e.now[i];
      }
    }
    __syncthreads();
  }

  /** area.sum[d] = factor * sum over tokens of weights[i] * rows[i][d], in a fixed order. */
  template <typename Row>
  __device__ void add_rows(Row row, const float* weights, float factor) const {
    const int32_t groups = max(1, threads / dim);
    __syncthreads();
    for (int32_t x = tid; x < groups * dim; x += threads) {
      float sum = 0.0f;
      for (int32_t i = x / dim; i < total; i += groups) {
        if (there(i)) sum = fmaf(weights[i], to_float(row(i)[x % dim]), sum);
      }
      area.part[x] = sum;
    }
    __syncthreads();
    for (int32_t d = tid; d < dim; d += threads) {
      float sum = 0.0f;
      for (int32_t g = 0; g < groups; g++) sum += area.part[g * dim + d];
      area.sum[d] = sum * factor;
    }
    __syncthreads();
  }

  /** A warp an entry: measure[i] = body(entry, lane's part of a sum for each of its dimensions), summed and finished. */
  template <typename Row, typename Part, typename Finish>
  __device__ void measure_rows(Row row, Part part, Finish finish) const {
    for (int32_t i = warp; i < total; i += warps) {
      if (!there(i)) continue;
      const T* x = row(i);
      float2 sums = make_float2(0.0f, 0.0f);
      for (int32_t d = lane; d < dim; d += 32) {
        const float2 y = part(to_float(x[d]), d);
        sums.x += y.x, sums.y += y.y;
      }
      sums = warp_sums(sums.x, sums.y);
      if (lane == 0) e.measure[i] = finish(sums);
    }
    __syncthreads();
  }

  /** Measures all tokens before the first leaves. */
  __device__ void measure_all() const {
    const auto key = [&](int32_t i) { return key_of(i); };
    const auto value = [&](int32_t i) { return value_of(i); };
    switch (c.select) {
      case WKV_SELECT_LEAST_OFTEN:
      case WKV_SELECT_WINDOW:
        for (int32_t i = tid; i < total; i += threads) {
          float sum = 0.0f;
          if (c.select == WKV_SELECT_WINDOW) {
            for (int32_t w = 0; w < WKV_WINDOW_STEPS; w++) sum += e.number(w)[i];
          } else {
            int32_t count = 0;
            for (int32_t w = 0; w < WKV_OFTEN_WORDS; w++) count += __popc(e.words[w * e.stride + i]);
            sum = static_cast<float>(count);
          }
          e.measure[i] = sum;
        }
        __syncthreads();
        break;
      case WKV_SELECT_KEY_NORM:
        measure_rows(key, [](float x, int32_t) { return make_float2(x * x, 0.0f); }, [](float2 s) { return sqrtf(s.x); });
        break;
      case WKV_SELECT_SUM_VALUE_NORM:
        measure_rows(value, [](float x, int32_t) { return make_float2(fabsf(x), 0.0f); }, [](float2 s) { return s.x; });
        break;
      case WKV_SELECT_OUTPUT_ERROR:
        add_rows(value, e.now, 1.0f);
        measure_rows(value, [&](float x, int32_t d) { return make_float2((x - area.sum[d]) * (x - area.sum[d]), 0.0f); }, [](float2 s) { return sqrtf(s.x); });
        break;
      default: break;
    }
  }

  /** Each key's cosine with the mean of the normalised keys, of the `count` tokens that are left. */
  __device__ void measure_likeness(int32_t count) const {
    const auto key = [&](int32_t i) { return key_of(i); };
    measure_rows(key, [](float x, int32_t) { return make_float2(x * x, 0.0f); }, [](float2 s) { return s.x > 0.0f ? rsqrtf(s.x) : 0.0f; });
    add_rows(key, e.measure, 1.0f / static_cast<float>(count));
    float squares = 0.0f;
    for (int32_t d = lane; d < dim; d += 32) squares += area.sum[d] * area.sum[d];
    const float length = sqrtf(warp_sum(squares));
    measure_rows(key, [&](float x, int32_t d) { return make_float2(x * area.sum[d], x * x); }, [&](float2 s) {
      const float both = sqrtf(s.y) * length;
      return both > 0.0f ? s.x / both : 0.0f;
    });
  }

  /** Leaves the rank that minimises the policy's value, the lowest of equals, in area.victim, and the lowest that has none in area.bad[0]. */
  __device__ void pick(int32_t count) const {
    const bool gapped = c.gapped(), pools = c.select == WKV_SELECT_WINDOW;
    if (c.select == WKV_SELECT_KEY_LIKENESS) measure_likeness(count);
    if (gapped || pools) {
      for (int32_t i = tid; i < total; i += threads) {
        if (there(i)) e.by_rank[e.rank[i]] = gapped ? average(i) : e.measure[i];
      }
      __syncthreads();
    }
    float least = INFINITY;
    int32_t best = INT_MAX, bad = INT_MAX;
    for (int32_t i = tid; i < total; i += threads) {
      const int32_t rank = e.rank[i];
      if (rank < 0 || !wkv_evictable(rank, count, c.sinks, c.recent)) continue;
      float value = INFINITY;  // the newest has no right neighbour to be merged with
      if (!gapped || rank + 1 < count) {
        wkv_token t{rank, e.score[i], weight(i), 0.0f, 0.0f, 0.0f};
        if (gapped) t.right = e.by_rank[rank + 1], t.measure = e.gap[i];
        else if (pools) t.measure = pooled(rank, count);
        else if (c.later) t.now = e.now ? e.now[i] : 0.0f, t.measure = e.measure[i];
        value = wkv_select_value(c.select, t);
      }
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
    if (tid > 0) return;
    for (int w = 1; w < warps; w++) {
      if (area.value[w] < least || (area.value[w] == least && area.rank[w] < best)) least = area.value[w], best = area.rank[w];
      bad = min(bad, area.bad[w]);
    }
    area.victim = best == INT_MAX ? -1 : best;
    area.bad[0] = bad;
  }

  __device__ float pooled(int32_t rank, int32_t count) const {
    float sum = 0.0f;
    for (int32_t r = max(0, rank - WKV_WINDOW_POOL / 2); r <= min(count - 1, rank + WKV_WINDOW_POOL / 2); r++) sum += e.by_rank[r];
    return sum;
  }

  __device__ void update_gap(int32_t entry, int32_t right) const {
    const float gap = warp_gap(value_of(entry), value_of(right), dim);
    if (lane == 0) e.gap[entry] = gap;
  }

  /** The newest cached token and those that arrive have right neighbours now. */
  __device__ void update_gaps() const {
    if (tid == 0) area.around[0] = -1;
    __syncthreads();
    for (int32_t i = tid; i < kept; i += threads) {
      if (e.rank[i] == kept - 1) area.around[0] = i;
    }
    __syncthreads();
    for (int32_t i = kept - 1 + warp; i < total - 1; i += warps) {
      const int32_t entry = i < kept ? area.around[0] : i;
      if (entry >= 0) update_gap(entry, i + 1);
    }
    __syncthreads();
  }

  /** Takes rank area.victim of `count` out and hands its rows on. */
  __device__ void leave(int32_t count) const {
    const int32_t j = area.victim;
    for (int32_t i = tid; i < total; i += threads) {
      const int32_t rank = e.rank[i];
      if (rank >= j - 1 && rank <= j + 2 && rank >= 0) area.around[rank - j + 1] = i;
      if (rank == j) e.rank[i] = -1;
      else if (rank > j) e.rank[i] = rank - 1;
    }
    __syncthreads();
    const int32_t left = area.around[0], victim = area.around[1], right = area.around[2], far = area.around[3];
    const bool neighbour = j + 1 < count, merges = c.merge == WKV_MERGE_RIGHT && neighbour;
    const float w_v = weight(victim), w_r = neighbour ? weight(right) : 0.0f;
    if (merges && w_v + w_r > 0.0f) {
      const T* v = value_of(victim);
      T* r = value_of(right);
      for (int32_t d = tid; d < dim; d += threads) r[d] = from_float<T>(wkv_merged(w_v, to_float(v[d]), w_r, to_float(r[d])));
    }
    if (tid == 0) {
      Counts& counts = c.counts[head];
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
      if (warp == 0 && left >= 0) update_gap(left, right);
      if (warp == 1 && far >= 0) update_gap(right, far);
      __syncthreads();
    }
  }

  /** Writes entry `from`'s state to a slot; a warp calls it. */
  __device__ void fill(const Entries& own, int32_t slot, int32_t from) const {
    const T *key = key_of(from), *value = value_of(from);
    for (int32_t d = lane; d < dim; d += 32) keys[int64_t{slot} * dim + d] = key[d], values[int64_t{slot} * dim + d] = value[d];
    for (int32_t w = lane; w < c.width; w += 32) own.words[w * own.stride + slot] = e.words[w * e.stride + from];
    if (lane == 0) own.score[slot] = e.score[from], own.birth[slot] = e.birth[from], own.rank[slot] = e.rank[from];
  }

  /** Gives the tokens that arrived slots: freed ones in the order of leaving, then unused ones. Used slots stay the first ones. */
  __device__ void place(int32_t arrived) const {
    const int32_t freed = area.freed, stayed = kept - freed, left = stayed + area.arrived_left;
    const Entries own = c.entries(head);
    if (own.rank != e.rank) {
      for (int32_t i = tid; i < kept; i += threads) {
        if (!there(i)) continue;
        own.score[i] = e.score[i], own.birth[i] = e.birth[i], own.rank[i] = e.rank[i];
        for (int32_t w = 0; w < c.width; w++) own.words[w * own.stride + i] = e.words[w * e.stride + i];
      }
    }
    if (tid == 0) {
      area.holes = freed;
      if (left < kept && e.freed) {
        area.holes = 0;
        for (int32_t i = 0; i < freed; i++) {
          if (e.freed[i] < left) e.freed[area.holes++] = e.freed[i];
        }
      }
    }
    __syncthreads();
    const int32_t holes = area.holes;
    for (int32_t t = warp; t < arrived; t += warps) {
      const int32_t rank = e.rank[kept + t];
      if (rank < 0) continue;
      const int32_t order = rank - stayed;
      fill(own, order >= holes ? kept + order - holes : e.freed ? e.freed[order] : area.first_freed, kept + t);
    }
    if (tid == 0) c.counts[head].kept = left;
    if (left >= kept) return;
    // More left than arrived: tokens move down into the holes, in the order of their slots.
    if (warp > 0) return;
    int32_t next = area.arrived_left;
    for (int32_t base = left; base < kept; base += 32) {
      uint32_t moves = __ballot_sync(0xffffffffu, base + lane < kept && there(base + lane));
      for (; moves; moves &= moves - 1) fill(own, e.freed[next++], base + __ffs(moves) - 1);
    }
  }
};

/**
 * Steps 4 to 6 for one head; scores already have this step's weights, counts->steps counts it. While too many tokens are left the
 * policy's victim (rank `forced` at first, -1: none) leaves; what is left of the incoming tokens, whose rows are in_keys and in_values,
 * then goes into free slots. `e` is the head's own state or, when more than one token arrives, a copy, which is written back.
 */
template <typename T>
__device__ void settle(const CacheView& c, int64_t head, const Entries& e, int32_t kept, int32_t arrived, T* in_keys, T* in_values, int32_t forced, const Faults& faults, SettleArea& area) {
  const int32_t tid = threadIdx.x, total = kept + arrived, target = wkv_target(total, c.slots, c.interval);
  const Settling<T> s{c, head, e, kept, total, in_keys, in_values, area};
  if (tid == 0) area.freed = 0, area.arrived_left = arrived;
  if (c.later) s.note();
  if (c.gapped()) s.update_gaps();
  if (total > target && c.select == WKV_SELECT_NONE) {
    if (tid == 0) faults.report(Fault::Full, c.slots);
    return;
  }
  if (total > target && c.select == WKV_SELECT_LITERAL_AVERAGE) {
    for (int32_t i = tid; i < total; i += blockDim.x) e.score[i] = s.average(i);
    __syncthreads();
  }
  if (total > target && c.later) s.measure_all();
  for (int32_t count = total; count > target; count--, forced = -1) {
    __syncthreads();
    if (tid < 4) area.around[tid] = -1;
    if (forced == -1) s.pick(count);
    else if (tid == 0) area.victim = forced, area.bad[0] = INT_MAX;
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
    s.leave(count);
  }
  __syncthreads();
  s.place(arrived);
}

}  // namespace wkv
