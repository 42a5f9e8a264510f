/** settle.cuh: steps 4 to 6 of a decode step for one head by one block: select, merge, insert; used by settle.cu and prefill.cu. */
#pragma once
#include "cache.cuh"

namespace wkv {

constexpr int32_t kMany = 8;  // tokens that leave together rather than one by one

/** Shared memory of settle. */
struct SettleArea {
  float value[32];
  int32_t rank[32], bad[32];
  int32_t around[4];       // entries of the ranks victim - 1 .. victim + 2; -1: none
  int32_t targets[WKV_SPREAD_RANKS];  // entries of the ranks behind the victim; -1: none
  int32_t freed, arrived_left, first_freed, holes, into;
  float sum[512];          // a row's worth; zeros where eights go past it
  float part[16 * 128];    // each warp's part of some dimensions of it
};

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
    if (c.merge == WKV_MERGE_NEAREST_VOTES) {
      for (int32_t i = kept + tid; i < total; i += threads) e.number(0)[i] = 1.0f;
      __syncthreads();
    }
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

  /** Eight numbers of a row from dimension d on, zeros behind its end. */
  __device__ void read_eight(const T* row, int32_t d, float (&x)[8]) const {
    if (dim % 8 == 0) {
      uint4 words[sizeof(T) / 2];
#pragma unroll
      for (int w = 0; w < static_cast<int>(sizeof(T) / 2); w++) words[w] = reinterpret_cast<const uint4*>(row + d)[w];
#pragma unroll
      for (int k = 0; k < 8; k++) x[k] = to_float(reinterpret_cast<const T*>(words)[k]);
    } else {
      for (int k = 0; k < 8; k++) x[k] = d + k < dim ? to_float(row[d + k]) : 0.0f;
    }
  }

  /** Lanes that share a row, eight dimensions each at a time. */
  __device__ int32_t lanes_of(int32_t most) const { return dim <= 64 ? 8 : dim <= 128 ? 16 : most; }

  /** area.sum[d] = sum over tokens of weights[i] * rows[i][d], in a fixed order. */
  template <typename Row>
  __device__ void add_rows(Row row, const float* weights) const {
    const int32_t lanes = lanes_of(16), own = 32 / lanes;
    for (int32_t first = 0; first < dim; first += lanes * 8) {
      const int32_t d = first + lane % lanes * 8;
      float sums[8] = {};
      if (d < dim) {
#pragma unroll 4
        for (int32_t i = warp * own + lane / lanes; i < total; i += warps * own) {
          if (!there(i)) continue;
          float x[8];
          read_eight(row(i), d, x);
#pragma unroll
          for (int k = 0; k < 8; k++) sums[k] = fmaf(weights[i], x[k], sums[k]);
        }
      }
      for (int o = lanes; o < 32; o *= 2) {
#pragma unroll
        for (int k = 0; k < 8; k++) sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], o);
      }
      __syncthreads();
      if (lane < lanes) {
#pragma unroll
        for (int k = 0; k < 8; k++) area.part[(warp * lanes + lane) * 8 + k] = sums[k];
      }
      __syncthreads();
      for (int32_t x = tid; x < lanes * 8; x += threads) {
        float sum = 0.0f;
        for (int32_t w = 0; w < warps; w++) sum += area.part[w * lanes * 8 + x];
        area.sum[first + x] = sum;
      }
    }
    __syncthreads();
  }

  /** measure[i] = finish(sums over a row's dimensions of part(number, dimension)); some lanes a row, some rows a warp at once. */
  template <typename Row, typename Part, typename Finish>
  __device__ void measure_rows(Row row, Part part, Finish finish) const {
    constexpr int kAtOnce = 4;
    const int32_t lanes = lanes_of(32), own = 32 / lanes;
    for (int32_t base = warp * kAtOnce * own; base < total; base += warps * kAtOnce * own) {
      const int32_t i = base + lane / lanes;
      float2 sums[kAtOnce] = {};
      for (int32_t d = lane % lanes * 8; d < dim; d += lanes * 8) {
        float x[kAtOnce][8] = {};
#pragma unroll
        for (int r = 0; r < kAtOnce; r++) {
          if (i + r * own < total && there(i + r * own)) read_eight(row(i + r * own), d, x[r]);
        }
#pragma unroll
        for (int r = 0; r < kAtOnce; r++) {
#pragma unroll
          for (int k = 0; k < 8; k++) {
            const float2 y = part(x[r][k], d + k);
            sums[r].x += y.x, sums[r].y += y.y;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) {
        for (int o = lanes / 2; o > 0; o /= 2) {
          sums[r].x += __shfl_xor_sync(0xffffffffu, sums[r].x, o);
          sums[r].y += __shfl_xor_sync(0xffffffffu, sums[r].y, o);
        }
        if (lane % lanes == 0 && i + r * own < total) e.measure[i + r * own] = finish(sums[r]);
      }
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
            sum /= WKV_WINDOW_STEPS;
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
        measure_rows(key, [](float x, int32_t) { return make_float2(x * x, 0.0f); }, [](float2 s) { return s.x; });
        break;
      case WKV_SELECT_SUM_VALUE_NORM:
        measure_rows(value, [](float x, int32_t) { return make_float2(fabsf(x), 0.0f); }, [](float2 s) { return s.x; });
        break;
      case WKV_SELECT_OUTPUT_ERROR:
        add_rows(value, e.now);
        measure_rows(value, [&](float x, int32_t d) { return make_float2((x - area.sum[d]) * (x - area.sum[d]), 0.0f); }, [](float2 s) { return sqrtf(s.x); });
        break;
      default: break;
    }
  }

  /** What key-likeness measures, anew whenever a token leaves: each normalised key times the sum of all of them. */
  __device__ void measure_likeness() const {
    const auto key = [&](int32_t i) { return key_of(i); };
    measure_rows(key, [](float x, int32_t) { return make_float2(x * x, 0.0f); }, [](float2 s) { return 1.0f / fmaxf(sqrtf(s.x), 1e-12f); });
    add_rows(key, e.measure);
    measure_rows(key, [&](float x, int32_t d) { return make_float2(x * area.sum[d], x * x); }, [](float2 s) { return s.x * (1.0f / fmaxf(sqrtf(s.y), 1e-12f)); });
  }

  /** The entry whose value is the lowest, the lowest rank of equals, in area.rank[0] (its rank) and area.value[0]; in area.bad[0] the
   *  lowest rank without one. value(entry, rank) is asked for the tokens of ranks that may(rank). */
  template <typename May, typename Value>
  __device__ void find_least(May may, Value value) const {
    float least = INFINITY;
    int32_t best = INT_MAX, bad = INT_MAX;
    for (int32_t i = tid; i < total; i += threads) {
      const int32_t rank = e.rank[i];
      if (rank < 0 || !may(rank)) continue;
      const float x = value(i, rank);
      if (isnan(x)) bad = min(bad, rank);
      if (x < least || (x == least && rank < best)) least = x, best = rank;
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
      area.value[0] = least, area.rank[0] = best, area.bad[0] = bad;
    }
    __syncthreads();
  }

  /** Leaves the rank that minimises the policy's value in area.rank[0], and the lowest that has none in area.bad[0]. */
  __device__ void pick(int32_t count) const {
    const bool gapped = c.gapped(), pools = c.select == WKV_SELECT_WINDOW;
    if (c.select == WKV_SELECT_KEY_LIKENESS) measure_likeness();
    if (gapped || pools) {
      for (int32_t i = tid; i < total; i += threads) {
        if (there(i)) e.by_rank[e.rank[i]] = gapped ? average(i) : e.measure[i];
      }
      __syncthreads();
    }
    find_least([&](int32_t rank) { return wkv_evictable(rank, count, c.sinks, c.recent); }, [&](int32_t i, int32_t rank) {
      if (gapped && rank + 1 == count) return INFINITY;  // the newest has no right neighbour to be merged with
      wkv_token t{rank, e.score[i], weight(i), 0.0f, 0.0f, 0.0f};
      if (gapped) t.right = e.by_rank[rank + 1], t.measure = e.gap[i];
      else if (pools) t.measure = pooled(rank, count);
      else if (c.later) t.now = e.now ? e.now[i] : 0.0f, t.measure = e.measure[i];
      return wkv_select_value(c.select, t);
    });
  }

  /** The mean over neighbouring ranks, those of recent tokens counting as 0. */
  __device__ float pooled(int32_t rank, int32_t count) const {
    float sum = 0.0f;
    for (int32_t r = max(0, rank - WKV_WINDOW_POOL / 2); r <= rank + WKV_WINDOW_POOL / 2; r++) {
      if (r < count - c.recent) sum += e.by_rank[r];
    }
    return sum / WKV_WINDOW_POOL;
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

  /** Takes rank j of `count` out and hands its rows on; the turn-th of a step. */
  __device__ void leave(int32_t j, int32_t count, int32_t turn) const {
    if (tid < WKV_SPREAD_RANKS) area.targets[tid] = -1;
    __syncthreads();
    for (int32_t i = tid; i < total; i += threads) {
      const int32_t rank = e.rank[i];
      if (rank < 0) continue;
      if (rank >= j - 1 && rank <= j + 2) area.around[rank - j + 1] = i;
      if (rank > j && rank <= j + WKV_SPREAD_RANKS) area.targets[rank - j - 1] = i;
      if (rank == j) e.rank[i] = -1;
      else if (rank > j) e.rank[i] = rank - 1;
    }
    __syncthreads();
    const int32_t left = area.around[0], victim = area.around[1], right = area.around[2], far = area.around[3];
    const int32_t into = hand_on(victim, right, j, turn);
    if (tid == 0) {
      Counts& counts = c.counts[head];
      counts.event[0] = static_cast<float>(e.birth[victim] - 1);
      counts.event[1] = into >= 0 ? static_cast<float>(e.birth[into] - 1) : -1.0f;
      counts.event[2] = weight(victim);
      counts.event[3] = into >= 0 ? weight(into) : right >= 0 ? weight(right) : 0.0f;
      if (into >= 0) counts.merged++;
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
    if (c.gapped() && right >= 0) {
      if (warp == 0 && left >= 0) update_gap(left, right);
      if (warp == 1 && far >= 0) update_gap(right, far);
      __syncthreads();
    }
  }

  /** to = body(from, to) in each dimension, rounded once; `threads` of them call it, `t` being the first dimension. */
  template <typename Body>
  __device__ void join(const T* from, T* to, int32_t t, int32_t stride, Body body) const {
    for (int32_t d = t; d < dim; d += stride) to[d] = from_float<T>(body(to_float(from[d]), to_float(to[d])));
  }

  /** What becomes of the victim's rows; gives the entry that took them in, or -1. */
  __device__ int32_t hand_on(int32_t victim, int32_t right, int32_t j, int32_t turn) const {
    const auto merge = [&](float w_v, float w_r) { return [=](float v, float r) { return wkv_merged(w_v, v, w_r, r); }; };
    switch (c.merge) {
      case WKV_MERGE_RIGHT:
      case WKV_MERGE_RIGHT_LIGHT: {
        if (right < 0) return -1;
        const float w_v = wkv_given(c.merge, weight(victim)), w_r = weight(right);
        if (w_v + w_r > 0.0f) join(value_of(victim), value_of(right), tid, threads, merge(w_v, w_r));
        return right;
      }
      case WKV_MERGE_SPREAD: return spread(victim, turn);
      case WKV_MERGE_NEAREST: {
        const int32_t to = nearest(victim, j);
        if (to < 0) return -1;
        const float likeness = -area.value[0];
        float& threshold = c.counts[head].threshold;
        const float before = threshold;
        __syncthreads();
        if (tid == 0) threshold = before == WKV_UNSET ? likeness : (before + likeness) * 0.5f;
        if (before != WKV_UNSET && likeness < before) return -1;
        const auto halve = [=](float v, float r) { return wkv_halved(r, likeness, v); };
        join(key_of(victim), key_of(to), tid, threads, halve);
        join(value_of(victim), value_of(to), tid, threads, halve);
        return to;
      }
      case WKV_MERGE_NEAREST_VOTES: {
        const int32_t to = nearest(victim, j);
        if (to < 0 || -area.value[0] < WKV_VOTES_LIKENESS) return -1;
        float* votes = e.number(0);
        const float w_v = votes[victim] * weight(victim), w_r = votes[to] * weight(to);
        __syncthreads();
        if (tid == 0) votes[to] += votes[victim];
        if (w_v + w_r > 0.0f) {
          join(key_of(victim), key_of(to), tid, threads, merge(w_v, w_r));
          join(value_of(victim), value_of(to), tid, threads, merge(w_v, w_r));
        }
        return to;
      }
      default: return -1;
    }
  }

  __device__ int32_t spread(int32_t victim, int32_t turn) const {
    float scores = 0.0f;
    int32_t count = 0;
    for (; count < WKV_SPREAD_RANKS && area.targets[count] >= 0; count++) scores += e.score[area.targets[count]];
    if (count == 0) return -1;
    const int32_t heads = c.kv_heads, index = static_cast<int32_t>(head);
    const float draw = wkv_draw(c.seed, index / (heads * c.sequences), index / heads % c.sequences, index % heads, step - (total - kept), turn);
    if (!wkv_spreads(e.score[victim], scores, count, draw)) return -1;
    for (int32_t i = warp; i < count; i += warps) {
      join(value_of(victim), value_of(area.targets[i]), lane, 32, [](float v, float x) { return x + v * (1.0f / WKV_SPREAD_RANKS); });
    }
    return area.targets[0];
  }

  /** The entry whose key is most like the victim's, which has left; -1: it was alone. Its cosine is -area.value[0]. */
  __device__ int32_t nearest(int32_t victim, int32_t j) const {
    const T* own = key_of(victim);
    float squares = 0.0f;
    for (int32_t d = lane; d < dim; d += 32) squares += to_float(own[d]) * to_float(own[d]);
    squares = warp_sum(squares);
    for (int32_t d = tid; d < (dim + 7) / 8 * 8; d += threads) area.sum[d] = d < dim ? to_float(own[d]) : 0.0f;
    __syncthreads();
    measure_rows([&](int32_t i) { return key_of(i); }, [&](float x, int32_t d) { return make_float2(x * area.sum[d], x * x); }, [&](float2 s) { return wkv_cosine(s.x, s.y, squares); });
    find_least([](int32_t) { return true; }, [&](int32_t i, int32_t) { return -e.measure[i]; });
    if (area.rank[0] == INT_MAX) return -1;
    for (int32_t i = tid; i < total; i += threads) {
      if (e.rank[i] == area.rank[0]) area.into = i;
    }
    __syncthreads();
    return area.into;
  }

  /** Writes entry `from`'s state to a slot; a warp calls it. */
  __device__ void fill(const Entries& own, int32_t slot, int32_t from) const {
    const T *key = key_of(from), *value = value_of(from);
    for (int32_t d = lane; d < dim; d += 32) keys[int64_t{slot} * dim + d] = key[d], values[int64_t{slot} * dim + d] = value[d];
    for (int32_t w = lane; w < c.width; w += 32) own.words[w * own.stride + slot] = e.words[w * e.stride + from];
    if (lane == 0) own.score[slot] = e.score[from], own.birth[slot] = e.birth[from], own.rank[slot] = e.rank[from];
  }

  /** Gives the tokens that arrived slots: freed ones in the order of leaving, then unused ones. Used slots stay the first ones. With
   *  `places` their slots are told, -1 for those that have left, behind `kept`, and neither they nor the state of those that stayed are
   *  written. */
  __device__ void place(int32_t arrived, int32_t* places) const {
    const int32_t freed = area.freed, stayed = kept - freed, left = stayed + area.arrived_left;
    const Entries own = c.entries(head);
    if (!places && own.rank != e.rank) {
      for (int32_t i = tid; i < kept; i += threads) {
        if (!there(i)) continue;
        own.score[i] = e.score[i], own.birth[i] = e.birth[i], own.rank[i] = e.rank[i];
        if (own.words == e.words) continue;
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
    const auto slot_of = [&](int32_t t) {
      const int32_t rank = e.rank[kept + t], order = rank - stayed;
      return rank < 0 ? -1 : order >= holes ? kept + order - holes : e.freed ? e.freed[order] : area.first_freed;
    };
    if (places) {
      for (int32_t t = tid; t < arrived; t += threads) places[1 + t] = slot_of(t);
      if (tid == 0) places[0] = kept;
    } else {
      for (int32_t t = warp; t < arrived; t += warps) {
        const int32_t slot = slot_of(t);
        if (slot >= 0) fill(own, slot, kept + t);
      }
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
 * Tokens that leave in numbers. Of most rules a token's value does not change while others leave, and which tokens may leave does not
 * either: then the victims are the first of the evictable ones in the order of (value, rank), and with T(r) = the turn at which rank r
 * leaves (ranks as they are before the first leaves; a token that stays: never), a victim's right neighbour in its turn is the next rank
 * to the right with a later T. So each token takes in, one after the other, x - 1, then p(x - 1), p(p(x - 1)), ... as long as they leave
 * before x, p being the next rank to the left with a later T. Runs of ranks with rising T are walked by a warp each, the value of the
 * moment in registers, from left to right, waiting for the ends of runs further left: the same sums in the same order as one by one.
 * Where the oldest leaves and gives to ranks behind it, the block does that turn by turn. Rules by cost, whose merges change the costs of two
 * neighbours, go one by one.
 */
template <typename T>
struct Leaving {
  const Settling<T>& s;
  const Entries& e;
  SettleArea& area;
  const int64_t stride;
  int32_t* const scratch;  // [kScratch, stride]
  const int32_t tid = s.tid, warp = s.warp, lane = s.lane, threads = s.threads, warps = s.warps, total = s.total;
  static constexpr int kScratch = 6, kNever = INT_MAX;
  static constexpr int kSlab = 128, kPer = kSlab / 32, kAhead = 8;  // dimensions of a row that a warp holds; rows on their way

  __device__ int32_t* array(int i) const { return scratch + i * stride; }
  __device__ int32_t* turns() const { return array(4); }     // T, by rank
  __device__ int32_t* entries() const { return array(5); }   // by rank

  /** Whether a rule's values stay while tokens leave. */
  static __device__ bool takes(const CacheView& c) {
    const bool stays = c.select == WKV_SELECT_OLDEST || c.select == WKV_SELECT_LOWEST_AVERAGE || c.select == WKV_SELECT_LITERAL_AVERAGE || c.select == WKV_SELECT_LOWEST_SUM ||
                       c.select == WKV_SELECT_LEAST_OFTEN || c.select == WKV_SELECT_KEY_NORM || c.select == WKV_SELECT_SUM_VALUE_NORM;
    if (c.merge == WKV_MERGE_SPREAD) return c.select == WKV_SELECT_OLDEST;
    return stays && (c.merge == WKV_MERGE_NONE || wkv_merges_right(c.merge));
  }

  /** The sum over the threads before this one, and over all in area.into; exact, as all are whole numbers. */
  __device__ int32_t sum_before(int32_t x) const {
    int32_t sum = x;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      const int32_t y = __shfl_up_sync(0xffffffffu, sum, o);
      if (lane >= o) sum += y;
    }
    __syncthreads();
    if (lane == 31) area.rank[warp] = sum;
    __syncthreads();
    int32_t before = 0, all = 0;
    for (int w = 0; w < warps; w++) {
      if (w == warp) before = all;
      all += area.rank[w];
    }
    __syncthreads();
    if (tid == 0) area.into = all;
    __syncthreads();
    return before + sum - x;
  }

  /** Sorts `count` pairs of arrays 0 (keys) and 1 (ranks) by key, equals as they are; gives the array of ranks. */
  __device__ int32_t* sort(int32_t count) const {
    constexpr int kBits = 7, kDigits = 1 << kBits;
    uint32_t* const counts = reinterpret_cast<uint32_t*>(area.part);  // [warps, kDigits]
    static_assert(sizeof area.part >= 16 * kDigits * 4, "a count a warp and digit");
    const int32_t own = (count + warps * 32 - 1) / (warps * 32) * 32, first = min(warp * own, count), end = min(first + own, count);
    int from = 0;
    for (int shift = 0; shift < 32; shift += kBits, from ^= 2) {
      const uint32_t* keys = reinterpret_cast<const uint32_t*>(array(from));
      const int32_t* ranks = array(from + 1);
      uint32_t* to_keys = reinterpret_cast<uint32_t*>(array(from ^ 2));
      int32_t* to_ranks = array((from ^ 2) + 1);
      const auto digit_of = [&](uint32_t key) { return key >> shift & (kDigits - 1); };
      for (int32_t i = lane; i < kDigits; i += 32) counts[warp * kDigits + i] = 0;
      __syncwarp();
      for (int32_t i = first + lane; i < end; i += 32) atomicAdd(&counts[warp * kDigits + digit_of(keys[i])], 1u);
      __syncthreads();
      // Where each warp's numbers of each digit begin.
      uint32_t sum = 0;
      if (tid < kDigits) {
        for (int w = 0; w < warps; w++) {
          const uint32_t x = counts[w * kDigits + tid];
          counts[w * kDigits + tid] = sum;
          sum += x;
        }
      }
      const uint32_t before = sum_before(tid < kDigits ? static_cast<int32_t>(sum) : 0);
      if (tid < kDigits) {
        for (int w = 0; w < warps; w++) counts[w * kDigits + tid] += before;
      }
      __syncthreads();
      for (int32_t base = first; base < end; base += 32) {
        const bool inside = base + lane < end;
        const uint32_t key = inside ? keys[base + lane] : 0, digit = inside ? digit_of(key) : kDigits;
        const uint32_t same = __match_any_sync(0xffffffffu, digit);
        const int32_t at = __popc(same & ((1u << lane) - 1));
        uint32_t place = 0;
        if (inside) place = counts[warp * kDigits + digit] + at;
        __syncwarp();
        if (inside && at == 0) counts[warp * kDigits + digit] += __popc(same);
        __syncwarp();
        if (inside) to_keys[place] = key, to_ranks[place] = ranks[base + lane];
      }
      __syncthreads();
    }
    return array(from + 1);
  }

  /** Of a float, so that lower ones come first; both zeros are equal. */
  static __device__ uint32_t key_of(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }

  /** The next rank to the left of r with a later turn than r's; -1: none. highs: the latest turns of 32 and of 1024 ranks. */
  __device__ int32_t later_left(int32_t r, const int32_t* highs, const int32_t* highest) const {
    const int32_t own = turns()[r];
    int32_t i = r - 1;
    while (i >= 0) {
      if ((i & 1023) == 1023 && highest[i >> 10] <= own) i -= 1024;
      else if ((i & 31) == 31 && highs[i >> 5] <= own) i -= 32;
      else if (turns()[i] > own) return i;
      else i--;
    }
    return -1;
  }

  /** Merges all victims to the right; lefts: p of each, done: flags, how many slabs of a rank's row took in all that they ever will. */
  __device__ void merge(const int32_t* lefts, volatile int32_t* done) const {
    const int32_t* const at = turns();
    const float* const weights = e.by_rank;
    for (int32_t slab = 0; slab * kSlab < s.dim; slab++) {
      const int32_t d0 = slab * kSlab + lane;
      const auto read = [&](int32_t rank, float (&x)[kPer]) {
        const T* row = s.value_of(entries()[rank]);
#pragma unroll
        for (int k = 0; k < kPer; k++) x[k] = d0 + k * 32 < s.dim ? to_float(row[d0 + k * 32]) : 0.0f;
      };
      __syncthreads();
      if (tid == 0) area.holes = 0;
      __syncthreads();
      for (;;) {
        int32_t base = 0;
        if (lane == 0) base = atomicAdd(&area.holes, 32);
        base = __shfl_sync(0xffffffffu, base, 0);
        if (base >= total) break;
        // Runs of two and more begin where the turn before is later and that behind is too.
        const int32_t r = base + lane;
        const bool begins = r + 1 < total && at[r] < at[r + 1] && !(r > 0 && at[r - 1] < at[r]);
        uint32_t starts = __ballot_sync(0xffffffffu, begins);
        for (; starts; starts &= starts - 1) {
          int32_t x = base + __ffs(starts) - 1;
          float value[kPer];
          read(x, value);
          // x holds its last value; its right neighbour takes it in, and what else leaves before that.
          while (x + 1 < total && at[x] < at[x + 1]) {
            float own[kPer];
            read(x + 1, own);
            const int32_t turn = at[x + 1];
            const float weight = weights[x + 1];
            const auto take = [&](float average, const float (&from)[kPer]) {
              const float w = wkv_given(s.c.merge, average);
              if (!(w + weight > 0.0f)) return;
#pragma unroll
              for (int k = 0; k < kPer; k++) own[k] = to_float(from_float<T>(wkv_merged(w, from[k], weight, own[k])));
            };
            take(weights[x], value);
            int32_t next = lefts[x], count = 0;
            float rows[kAhead][kPer], factors[kAhead];
            do {
              count = 0;
#pragma unroll
              for (int u = 0; u < kAhead; u++) {
                if (next < 0 || at[next] >= turn) continue;
                while (done[next] <= slab) {}
                __threadfence_block();
                factors[u] = weights[next];
                read(next, rows[u]);
                next = lefts[next], count = u + 1;
              }
#pragma unroll
              for (int u = 0; u < kAhead; u++) {
                if (u < count) take(factors[u], rows[u]);
              }
            } while (count == kAhead);
            x++;
#pragma unroll
            for (int k = 0; k < kPer; k++) value[k] = own[k];
          }
          T* row = s.value_of(entries()[x]);
#pragma unroll
          for (int k = 0; k < kPer; k++) {
            if (d0 + k * 32 < s.dim) row[d0 + k * 32] = from_float<T>(value[k]);
          }
          __threadfence_block();
          __syncwarp();
          if (lane == 0) done[x] = slab + 1;
        }
      }
      __syncthreads();
    }
  }

  /** The rank whose value is none, or INT_MAX; `values` of evictable ranks go to array 0 as keys, the ranks to array 1. */
  __device__ int32_t value_all(int32_t first, int32_t evictable) const {
    const CacheView& c = s.c;
    if (tid == 0) area.bad[0] = INT_MAX;
    __syncthreads();
    for (int32_t i = tid; i < evictable; i += threads) {
      const int32_t rank = first + i, entry = entries()[rank];
      const float value = wkv_select_value(c.select, {rank, e.score[entry], e.by_rank[rank], 0.0f, e.now ? e.now[entry] : 0.0f, c.later ? e.measure[entry] : 0.0f});
      if (isnan(value)) atomicMin(&area.bad[0], rank);
      array(0)[i] = static_cast<int32_t>(key_of(value)), array(1)[i] = rank;
    }
    __syncthreads();
    return area.bad[0];
  }

  /** Has the oldest leave, `leaving` times over, each giving its value to ranks behind it or not; counts them and says what the last did. */
  __device__ void spread_oldest(int32_t first, int32_t leaving) const {
    for (int32_t turn = 0; turn < leaving; turn++) {
      const int32_t rank = first + turn, victim = entries()[rank];
      if (tid < WKV_SPREAD_RANKS) area.targets[tid] = rank + 1 + tid < total ? entries()[rank + 1 + tid] : -1;
      __syncthreads();
      const int32_t into = s.spread(victim, turn);
      if (tid == 0) tell(victim, area.targets[0], into), into >= 0 ? s.c.counts[s.head].merged++ : s.c.counts[s.head].evicted++;
      __syncthreads();
    }
  }

  /** What the last token to leave did. */
  __device__ void tell(int32_t victim, int32_t right, int32_t into) const {
    Counts& counts = s.c.counts[s.head];
    counts.event[0] = static_cast<float>(e.birth[victim] - 1);
    counts.event[1] = into >= 0 ? static_cast<float>(e.birth[into] - 1) : -1.0f;
    counts.event[2] = s.weight(victim);
    counts.event[3] = into >= 0 ? s.weight(into) : right >= 0 ? s.weight(right) : 0.0f;
  }

  /** Has `leaving` tokens leave; false, and a fault is reported, when one has no value. */
  __device__ bool run(int32_t leaving, int32_t arrived, const Faults& faults) const {
    const CacheView& c = s.c;
    const int32_t first = c.sinks, evictable = total - c.recent - first;
    for (int32_t i = tid; i < total; i += threads) {
      const int32_t rank = e.rank[i];
      entries()[rank] = i, turns()[rank] = kNever;
      e.by_rank[rank] = s.weight(i);
    }
    __syncthreads();
    const int32_t bad = value_all(first, evictable);
    if (bad != INT_MAX) {
      if (tid == 0) faults.report(Fault::NanScore, bad);
      return false;
    }
    const int32_t* order = c.select == WKV_SELECT_OLDEST ? array(1) : sort(evictable);
    // The victims' slots in the order of leaving.
    int32_t freed = 0;
    for (int32_t base = 0; base < leaving; base += threads) {
      const int32_t i = base + tid;
      int32_t entry = INT_MAX;
      if (i < leaving) turns()[order[i]] = i, entry = entries()[order[i]];
      const int32_t at = freed + sum_before(entry < s.kept);
      if (entry < s.kept) e.freed[at] = entry;
      freed += area.into;
    }
    const int32_t last = order[leaving - 1];
    if (tid == 0) area.freed = freed;
    __syncthreads();
    int32_t dropped = c.merge == WKV_MERGE_NONE ? leaving : 0;
    if (c.merge == WKV_MERGE_SPREAD) spread_oldest(first, leaving);
    if (wkv_merges_right(c.merge)) {
      // The sort's arrays are free again.
      int32_t *highs = array(0), *lefts = array(2), *done = array(3), *highest = highs + (total + 31) / 32;
      for (int32_t k = warp; k * 32 < total; k += warps) {
        const int32_t r = k * 32 + lane, high = __reduce_max_sync(0xffffffffu, r < total ? turns()[r] : 0);
        if (lane == 0) highs[k] = high;
      }
      __syncthreads();
      for (int32_t k = warp; k * 1024 < total; k += warps) {
        const int32_t i = k * 32 + lane, high = __reduce_max_sync(0xffffffffu, i * 32 < total ? highs[i] : 0);
        if (lane == 0) highest[k] = high;
      }
      __syncthreads();
      for (int32_t r = tid; r < total; r += threads) {
        const int32_t turn = turns()[r];
        if (turn == kNever) continue;
        lefts[r] = later_left(r, highs, highest);
        // What takes nothing in is ready.
        done[r] = r > 0 && turns()[r - 1] < turn ? 0 : INT_MAX;
      }
      __syncthreads();
      merge(lefts, done);
      // Those behind whom nobody stays or leaves later have nobody to go to.
      if (tid == 0) {
        for (int32_t r = total - 1; r >= 0 && turns()[r] != kNever; r = lefts[r]) dropped++;
        area.into = dropped;
      }
      __syncthreads();
      dropped = area.into;
    }
    // The right neighbour of the last one: all others have left.
    if (tid == 0) area.around[0] = INT_MAX, area.arrived_left = arrived - (leaving - area.freed), area.first_freed = area.freed > 0 ? e.freed[0] : 0;
    __syncthreads();
    for (int32_t r = last + 1 + tid; r < total; r += threads) {
      if (turns()[r] != kNever) continue;
      atomicMin(&area.around[0], r);
      break;
    }
    __syncthreads();
    if (tid == 0 && c.merge != WKV_MERGE_SPREAD) {
      const int32_t right = area.around[0] == INT_MAX ? -1 : entries()[area.around[0]];
      tell(entries()[last], right, wkv_merges_right(c.merge) ? right : -1);
      c.counts[s.head].merged += leaving - dropped, c.counts[s.head].evicted += dropped;
    }
    // Ranks close up.
    int32_t left = 0;
    for (int32_t base = 0; base < total; base += threads) {
      const int32_t r = base + tid;
      const bool stays = r < total && turns()[r] == kNever;
      const int32_t rank = left + sum_before(stays);
      if (r < total) e.rank[entries()[r]] = stays ? rank : -1;
      left += area.into;
    }
    __syncthreads();
    return true;
  }
};

/**
 * Steps 4 to 6 for one head; scores already have this step's weights, counts->steps counts it. While too many tokens are left the
 * policy's victim (rank `forced` at first, -1: none) leaves; what is left of the incoming tokens, whose rows are in_keys and in_values,
 * then goes into free slots. `e` is the head's own state or a copy, which is written back. `order`: scratch of Leaving, of e's stride; null:
 * there is none, and tokens leave one by one. `places`: as of Settling::place; untouched after a fault.
 */
template <typename T>
__device__ void settle(const CacheView& c, int64_t head, const Entries& e, int32_t kept, int32_t arrived, T* in_keys, T* in_values, int32_t forced, const Faults& faults, SettleArea& area, int32_t* order = nullptr, int32_t* places = nullptr) {
  const int32_t tid = threadIdx.x, total = kept + arrived, target = wkv_target(total, c.slots, c.interval);
  const Settling<T> s{c, head, e, kept, total, in_keys, in_values, area};
  if (tid == 0) area.freed = 0, area.arrived_left = arrived;
  if (c.later) s.note();
  if (c.gapped()) s.update_gaps();
  if (total > target && c.select == WKV_SELECT_NONE) {
    if (tid == 0) faults.report(Fault::Full, c.slots);
    return;
  }
  if (total > target && !e.now && wkv_uses_now(c.select)) {
    if (tid == 0) faults.report(Fault::OneStep, 0);
    return;
  }
  if (total > target && c.select == WKV_SELECT_LITERAL_AVERAGE) {
    for (int32_t i = tid; i < total; i += blockDim.x) e.score[i] = s.average(i);
    __syncthreads();
  }
  if (total > target && c.later) s.measure_all();
  if (order && total - target >= kMany && Leaving<T>::takes(c)) {
    __syncthreads();
    if (Leaving<T>{s, e, area, e.stride, order}.run(total - target, arrived, faults)) s.place(arrived, places);
    return;
  }
  for (int32_t count = total, turn = 0; count > target; count--, turn++, forced = -1) {
    __syncthreads();
    if (tid < 4) area.around[tid] = -1;
    if (tid == 0 && forced != -1) area.rank[0] = forced, area.bad[0] = INT_MAX;
    if (forced == -1) s.pick(count);
    else __syncthreads();
    const int32_t j = area.rank[0], bad = area.bad[0];
    if (bad != INT_MAX) {
      if (tid == 0) faults.report(Fault::NanScore, bad);
      return;
    }
    if (!wkv_evictable(j, count, c.sinks, c.recent)) {
      if (tid == 0) faults.report(Fault::Rank, j == INT_MAX ? -1 : j, count, c.sinks, c.recent);
      return;
    }
    __syncthreads();
    s.leave(j, count, turn);
  }
  __syncthreads();
  s.place(arrived, places);
}

}  // namespace wkv
