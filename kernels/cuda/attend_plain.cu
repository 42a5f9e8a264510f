/**
 * attend_plain.cu: wkv_attend's cache read with ordinary f32 products: f32 caches, and any head dimension; the step around it is attend.cuh.
 *
 * Neighbouring lanes share a key, each with parts of both its halves, which they turn by its rank: rank * (angle a position, in turns of
 * 2^64) wraps as turns do, so the angle is exact to 2^-32 turns at any rank, without a table. Then all lanes share a value. Heads wider
 * than 128, or whose rows are no whole words of 16 bytes, are read number by number.
 */
#include "attend.cuh"

namespace wkv {
namespace {

/** How a warp reads rows. */
template <typename T_, int kGroup_, int kDim_>
struct PlainCut {
  using T = T_;
  static constexpr int kGroup = kGroup_, kDim = kDim_, kHalf = kDim / 2;
  static constexpr bool kLoose = kDim > 128;                      // any size, slowly
  static constexpr int kKey = kLoose ? 8 : 16 / sizeof(T);        // a lane's part of either half of a key
  static constexpr int kStride = kLoose ? 1 : kKey;
  static constexpr int kLanes = kHalf / kKey;                     // that share a key
  static constexpr int kValue = kDim / 32;                        // a lane's part of a value
  static constexpr int kRows = 32 / kLanes;                       // keys of an item
  static constexpr int kItems = kChunk / kRows;                   // of a chunk
  static constexpr int kWords = 2 * kKey * int(sizeof(T)) / 16;   // a lane's part of an item, keys or values, in 16 bytes
  static constexpr int kStages = kLoose ? 1 : 4;                  // items on their way
  static constexpr int kAtOnce = kLoose ? 1 : 2;                  // items of keys that share what is read of q
  static constexpr int kPass = kLoose ? 2 : kGroup < 8 ? kGroup : 8;  // query heads whose outputs are summed at once
  static constexpr int kMine = kGroup > kLanes ? kGroup / kLanes : 1; // scores of a row that a lane has at last
  static constexpr int kQuery = (kGroup + 1) * kHalf * 8;         // q, and the phases
};

template <typename Cut>
struct PlainWay : AttendStep<Cut> {
  using Step = AttendStep<Cut>;
  using T = typename Cut::T;
  using Step::a, Step::c, Step::area, Step::tid, Step::warp, Step::lane, Step::dim, Step::half, Step::pairs, Step::keys, Step::values, Step::items, Step::scores, Step::kept, Step::length, Step::local;
  using Step::kGroup, Step::kDim, Step::kHalf, Step::kItems, Step::kRows, Step::kWords, Step::kStages, Step::kPass;
  using Step::slot_at, Step::entry_at, Step::item_at, Step::first_of, Step::second_of, Step::item, Step::slot_step, Step::entry_step, Step::read_rank, Step::number_at;
  static constexpr int kKey = Cut::kKey, kLanes = Cut::kLanes, kValue = Cut::kValue, kAtOnce = Cut::kAtOnce, kMine = Cut::kMine, kQuery = Cut::kQuery;
  static constexpr int kResident = 1;

  /** A lane's part of an item. */
  struct Part {
    uint4 words[kWords];
    __device__ float operator[](int i) const { return to_float(reinterpret_cast<const T*>(words)[i]); }
  };
  /** A lane's sums of values. */
  float sums[kPass][kValue];

  float2* const q;                   // in the order of q_at, rotated and scaled
  uint32_t *const high, *const low;  // the phases of the pairs a key is turned by, in the order of phase_at
  // The next item to bring: its first slot, and what this lane takes of it: words at `from` + slot * dim and `apart` further on, where
  // the slot is below the limits.
  int32_t next = 0, next_slot = 0, apart = 0, first_limit = 0, second_limit = 0;
  const T* from = nullptr;

  __device__ PlainWay(const AttendView& a, const Faults& faults, typename Step::Area& area, uint8_t* shared)
      : Step(a, faults, area, shared), q(reinterpret_cast<float2*>(shared + a.plan.q_at)), high(reinterpret_cast<uint32_t*>(q + kGroup * kHalf)), low(high + kHalf) {
    if (tid >= kHalf) return;
    const uint64_t phase = tid < pairs ? c.rope.phases[tid] : 0;
    high[phase_of(tid)] = static_cast<uint32_t>(phase >> 32), low[phase_of(tid)] = static_cast<uint32_t>(phase);
  }

  /** Where a pair of query head g lies: the lanes' next to each other, two pairs at a time. */
  __device__ int32_t q_at(int32_t x, int32_t g) const { return ((x % kKey / 2 * kGroup + g) * kLanes + x / kKey) * 2 + x % 2; }
  __device__ int32_t phase_of(int32_t x) const { return (x % kKey / 4 * kLanes + x / kKey) * 4 + x % 4; }
  __device__ void keep_q(int32_t x, int32_t g, float2 numbers) { q[q_at(x, g)] = numbers; }

  // ---- items ----

  __device__ Part read_item(int32_t n) const {
    Part part;
#pragma unroll
    for (int w = 0; w < kWords; w++) part.words[w] = item(n)[w * 32];
    return part;
  }

  __device__ void begin_keys() {
    const int32_t x = lane % kLanes * kKey, row = lane / kLanes, limit = x < half ? c.slots - row : 0;
    next = 0, next_slot = slot_at(item_at(0));
    from = keys + row * dim + first_of(x), apart = second_of(x) - first_of(x);
    first_limit = second_limit = limit;
  }
  /** There are but `length` items of keys: values take the places behind them. */
  __device__ void end_keys() { next = length; }
  __device__ void begin_values() {
    const int32_t at = lane * kValue, limit = at < dim ? c.slots : 0;
    next = length, next_slot = slot_at(item_at(0));
    from = values + at, apart = dim;
    first_limit = limit, second_limit = limit - 1;
  }

  /** A lane's part of a row, number by number. */
  __device__ void bring_slowly() {
    const int32_t u = lane % kLanes, at = lane * kValue;
    const T *key_row = keys + int64_t{next_slot} * dim, *value_row = values + int64_t{next_slot} * dim;
    const bool there = next_slot < c.slots;
    Part part;
    T* to = reinterpret_cast<T*>(part.words);
#pragma unroll
    for (int i = 0; i < 2 * kKey; i++) {
      const int32_t x = u * kKey + i % kKey;
      if (next < length) to[i] = there && x < half ? key_row[i < kKey ? first_of(x) : second_of(x)] : from_float<T>(0.0f);
      else to[i] = there && at + i < dim ? value_row[at + i] : from_float<T>(0.0f);
    }
#pragma unroll
    for (int w = 0; w < kWords; w++) item(next)[w * 32] = part.words[w];
  }

  /** The next item is now on its way: `length` items of keys, then as many of values. */
  __device__ void bring_item() {
    if (next == length) begin_values();
    if (next < 2 * length) {
      if constexpr (Cut::kLoose) {
        bring_slowly();
      } else {
        const T* at = from + int64_t{next_slot} * dim;
        bring(shared_address(item(next)), at, next_slot < first_limit);
        bring(shared_address(item(next) + 32), at + apart, next_slot < second_limit);
      }
    }
    close_item();
    next_slot += slot_step(next - (next < length ? 0 : length));
    next++;
  }

  // ---- scores ----

  __device__ void read_turns() {}
  __device__ void begin_scores(int32_t) {}

  /** Adds a lane's part of some keys times all queries to `sums`. */
  template <typename Query>
  __device__ void multiply(const Part (&from)[kAtOnce], const int32_t (&ranks)[kAtOnce], const Query& query, float (&sums)[kAtOnce][kGroup]) const {
    const int32_t u = lane % kLanes;
    const bool turns = !c.text && u * kKey < pairs;
#pragma unroll
    for (int j = 0; j < kKey; j += 4) {
      float x[kAtOnce][4], y[kAtOnce][4];
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) {
#pragma unroll
        for (int i = 0; i < 4; i++) x[r][i] = from[r][j + i], y[r][i] = from[r][kKey + j + i];
      }
      if (turns) {
        const uint4 h = *reinterpret_cast<const uint4*>(high + phase_of(u * kKey + j)), l = *reinterpret_cast<const uint4*>(low + phase_of(u * kKey + j));
        const uint32_t highs[4] = {h.x, h.y, h.z, h.w}, lows[4] = {l.x, l.y, l.z, l.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
          for (int r = 0; r < kAtOnce; r++) {
            const float angle = phase_at(ranks[r], highs[i], lows[i]) * (3.14159265358979f * 0x1p-31f);
            const float cosine = __cosf(angle), sine = __sinf(angle), was = x[r][i];
            x[r][i] = was * cosine - y[r][i] * sine;
            y[r][i] = was * sine + y[r][i] * cosine;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
#pragma unroll
        for (int g = 0; g < kGroup; g++) {
          const float4 p = query((j + i) / 2, g);
#pragma unroll
          for (int r = 0; r < kAtOnce; r++) sums[r][g] = fmaf(x[r][i], p.x, fmaf(y[r][i], p.y, fmaf(x[r][i + 1], p.z, fmaf(y[r][i + 1], p.w, sums[r][g]))));
        }
      }
    }
  }

  // The lanes of a key share its sums: each has at last those of kMine query heads from my_head() on; kSame neighbours have the same.
  static constexpr int kSame = kLanes > kGroup ? kLanes / kGroup : 1;
  __device__ int32_t my_head() const {
    int32_t g = 0, n = kGroup;
#pragma unroll
    for (int o = kLanes / 2; o > 0; o /= 2) {
      if (n > 1) n /= 2, g += lane & o ? n : 0;
    }
    return g;
  }
  __device__ void share(float (&sums)[kGroup]) const {
    int n = kGroup;
#pragma unroll
    for (int o = kLanes / 2; o > 0; o /= 2) {
      if (n == 1) {
        sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], o);
        continue;
      }
      n /= 2;
#pragma unroll
      for (int i = 0; i < kGroup / 2; i++) {
        if (i >= n) break;
        const float give = lane & o ? sums[i] : sums[i + n], keep = lane & o ? sums[i + n] : sums[i];
        sums[i] = keep + __shfl_xor_sync(0xffffffffu, give, o);
      }
    }
  }

  /** Leaves the exponentials of this warp's scores, under its own highest, in `scores`, its softmax in area.part; `ranks` are those of
   *  the thread's own entries. */
  __device__ void score(int32_t ranks) {
    const int32_t u = lane % kLanes, mine = my_head();
    const auto query = [&](int j, int g) { return reinterpret_cast<const float4*>(q)[(j * kGroup + g) * kLanes + u]; };
    float most[kMine], total[kMine];
#pragma unroll
    for (int k = 0; k < kMine; k++) most[k] = -FLT_MAX, total[k] = 0.0f;
    int32_t next_ranks = read_rank(entry_at(1)), entry = item_at(0) + lane / kLanes, slot = slot_at(entry);
    for (int32_t n = 0; n < length; n += kAtOnce) {
      if (n > 0 && n % (4 * kItems) == 0) ranks = next_ranks, next_ranks = read_rank(entry_at(n / (4 * kItems) + 1));
      await_items<kStages - kAtOnce>();
      Part parts[kAtOnce];
      int32_t rank[kAtOnce];
      float products[kAtOnce][kGroup] = {};
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) {
        parts[r] = read_item(n + r);
        rank[r] = __shfl_sync(0xffffffffu, ranks, (n + r) / kItems % 4 * kChunk + (n + r) % kItems * kRows + lane / kLanes);
      }
      multiply(parts, rank, query, products);
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) {
        bring_item();
        share(products[r]);
        if (slot < kept) {
#pragma unroll
          for (int k = 0; k < kMine; k++) {
            const float s = a.capped(products[r][k]), higher = fmaxf(most[k], s);
            total[k] = fmaf(total[k], power(most[k] - higher), power(s - higher));
            most[k] = higher;
            if (lane % kSame == 0) scores[number_at(entry, mine + k)] = s;
          }
        }
        slot += slot_step(n + r), entry += entry_step(n + r);
      }
    }
#pragma unroll
    for (int k = 0; k < kMine; k++) {
#pragma unroll
      for (int o = kLanes; o < 32; o *= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, most[k], o), sum = __shfl_xor_sync(0xffffffffu, total[k], o), higher = fmaxf(most[k], other);
        total[k] = fmaf(total[k], power(most[k] - higher), sum * power(other - higher));
        most[k] = higher;
      }
      if (lane < kLanes && lane % kSame == 0) area.part[warp][mine + k] = make_float2(most[k], total[k]);
    }
    __syncwarp();
    for (auto at = this->first_entry(); at.i < local; this->next_entry(at)) {
      if (at.slot >= kept) continue;
#pragma unroll
      for (int g = 0; g < kGroup; g++) {
        float& s = at.numbers[g * kChunk ^ this->swizzle()];
        s = power(s - area.part[warp][g].x);
      }
    }
    __syncwarp();
  }

  // ---- output ----

  /** Sums of exponentials times values: query heads of a pass. */
  __device__ void sum_values(int32_t pass) {
    if (pass > 0) {
      next = length;
      for (int n = 0; n < kStages; n++) bring_item();
    }
#pragma unroll
    for (int g = 0; g < kPass; g++) {
#pragma unroll
      for (int i = 0; i < kValue; i++) sums[g][i] = 0.0f;
    }
    int32_t entry = item_at(0), slot = slot_at(entry);
    for (int32_t n = 0; n < length; n++) {
      await_items<kStages - 1>();
      const Part part = read_item(length + n);
      bring_item();
#pragma unroll
      for (int p = 0; p < kRows; p++) {
        if (slot + p >= kept) continue;
#pragma unroll
        for (int g = 0; g < kPass; g++) {
          const float weight = scores[number_at(entry + p, pass * kPass + g)];
#pragma unroll
          for (int k = 0; k < kValue; k++) sums[g][k] = fmaf(weight, part[p * kValue + k], sums[g][k]);
        }
      }
      slot += slot_step(n), entry += entry_step(n);
    }
    await_items<0>();
  }

  /** Leaves them in this warp's region. */
  __device__ void keep_sums(int32_t) {
    __syncwarp();
    float* to = reinterpret_cast<float*>(items) + lane * kValue;
#pragma unroll
    for (int g = 0; g < kPass; g++) {
#pragma unroll
      for (int i = 0; i < kValue; i += 4) *reinterpret_cast<float4*>(to + g * kDim + i) = make_float4(sums[g][i], sums[g][i + 1], sums[g][i + 2], sums[g][i + 3]);
    }
  }
};

template <typename T, int kDim>
void by_heads(Context& ctx, const Cache& cache, const AttendView& a) {
  if (cache.group() <= 4) return start_attend<PlainWay<PlainCut<T, 4, kDim>>>(ctx, cache, a);
  start_attend<PlainWay<PlainCut<T, 16, kDim>>>(ctx, cache, a);
}

}  // namespace

void attend_plain(Context& ctx, const Cache& cache, const AttendView& a) {
  if (cache.dtype == WKV_F32 && cache.head_dim <= 128 && cache.head_dim % 8 == 0 && cache.rope->count % 4 == 0) return by_heads<float, 128>(ctx, cache, a);
  by_cache_type(cache.dtype, [&](auto type) { by_heads<decltype(type), 512>(ctx, cache, a); });
}

}  // namespace wkv
