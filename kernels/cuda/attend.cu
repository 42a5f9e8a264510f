/**
 * attend.cu: wkv_attend, one decode step of one layer in one launch: attend, accumulate scores, select, merge, insert.
 *
 *   s[g, i] = scale * rotate(q[g], len) . rotate(k[i], rank i)     i = 0..len, the new token being i = len
 *   p = softmax(s);  out[g] = sum_i p[g, i] v[i];  a[i] += mean_g p[g, i];  then steps 4 to 6 of the step (wkv.h, policy.h)
 *
 * qkv [B, (H + 2 N) D], out [B, H D]. A KV head of a sequence, with all its query heads, belongs to a cluster of blocks that share its
 * slots tile by tile (one block where there are no clusters), so K and V are read once. What the blocks tell each other they push into
 * each other's shared memory, where a barrier counts the bytes: first the highest score and the sum of each block, then its part of the
 * output and its candidate for leaving. Then every block knows the victim: it updates the state of its own slots, and the block that
 * owns the right neighbour merges and writes the new token's rows. The last block, `home`, owns the new token until it has a slot.
 *
 * The weights [entries, G] of a block stay in shared memory or, for long caches, in scratch. Keys are turned by their rank in registers:
 * rank * (angle a position, in turns of 2^64) wraps as turns do, so the angle is exact to 2^-32 turns at any rank, without a table.
 * Bytes moved: K and V of the cached tokens, 24 bytes of state a slot, three rows. Sums are taken in a fixed order.
 */
#include <algorithm>

#include "cache.cuh"

namespace wkv {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMostBlocks = 16;     // of a cluster; more than 8 need leave
constexpr int kKeyRows = 2;         // keys that a thread works on at once, while as many are on their way
constexpr int kAhead = 2 * kKeyRows;

/** How the work is cut: chosen on the host from the sizes. */
struct Plan {
  int32_t blocks;                        // blocks of a cluster
  int32_t key_lanes, value_lanes;        // log2 of the lanes that share a row
  int32_t rows_at, outputs_at, weights_at;  // bytes of shared memory
  int32_t room;                          // entries that a block may own
  float* weights;                        // scratch, [units, blocks, room, kPad]; null: in shared memory
};

struct AttendView {
  CacheView cache;
  Plan plan;
  const float* qkv;
  float* out;
  float scale;
  int32_t layer;
  const int32_t* victims;
};

/** How rows are read: 16 bytes at a time where the sizes allow it (kWide). kGroup: query heads a KV head, or more (the rest are zeros). */
template <typename T, int kGroup, bool kWide>
struct Cut {
  static constexpr int kPad = kGroup <= 2 ? kGroup : kGroup <= 4 ? 4 : kGroup <= 8 ? 8 : 16;  // floats between two entries' weights
  static constexpr int kKey = kWide ? 16 / sizeof(T) : 1;                                      // a lane's part of either half of a key
  static constexpr int kPairs = kWide ? 2 : 1;                                                 // pairs of q that are read at once
  static constexpr int kValue = !kWide ? 2 : kGroup > 8 ? 4 : 16 / sizeof(T);                  // a lane's part of a value
  static constexpr int kValueRows = kGroup <= 4 ? 8 : 4;                                       // values that a thread has on their way
};

/** A token that may leave; the lowest value wins, then the lowest rank. */
struct alignas(16) Candidate {
  uint32_t value;      // in an order that holds for bits
  int32_t rank, slot;  // slot >= kept: the new token
  int32_t bad;         // the lowest rank whose value is not a number
  float average;
  int32_t birth;
  float arrived;       // home's: the new token's score
  int32_t unused;
};
constexpr Candidate kNobody = {UINT_MAX, INT_MAX, 0, INT_MAX, 0.0f, 0, 0.0f, 0};

template <int kPad>
struct Area {
  uint64_t met, told;  // barriers: every block's softmax has come; every block's output and candidate
  float2 softmax[kMostBlocks][kPad];
  Candidate candidates[kMostBlocks], found[kWarps];
  float highest[kWarps][kPad], sums[kWarps][kPad];
  float factor[kPad], share[kPad];  // from a block's weights to probabilities, and to what a score gains
  float arrived;                    // the new token's score
  int32_t newest;                   // the slot of the newest cached token, if it is this block's
  int32_t right, right_birth;       // the victim's right neighbour, if it is this block's
  float right_average;
};

// ---- rows ----

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<16> { using Type = uint4; };
template <>
struct BitsOf<8> { using Type = uint2; };
template <>
struct BitsOf<4> { using Type = uint32_t; };
template <>
struct BitsOf<2> { using Type = uint16_t; };

/** Some numbers of a row, read at once. */
template <typename T, int kCount>
struct Pack {
  typename BitsOf<kCount * sizeof(T)>::Type bits;
  __device__ float operator[](int i) const { return to_float(reinterpret_cast<const T*>(&bits)[i]); }
};

template <int kCount, typename T>
__device__ inline Pack<T, kCount> read_row(const T* at) {
  return {__ldcg(reinterpret_cast<const typename BitsOf<kCount * sizeof(T)>::Type*>(at))};
}

template <int kCount>
__device__ inline void read_floats(const float* from, float (&to)[kCount]) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 x = *reinterpret_cast<const float4*>(from + i);
      to[i] = x.x, to[i + 1] = x.y, to[i + 2] = x.z, to[i + 3] = x.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i++) to[i] = from[i];
  }
}

/** Bits in whose order floats lie as well. */
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 as 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/** The angle at a position, in turns of 2^32 from -1/2 to 1/2. */
__device__ inline float phase_at(uint32_t position, uint32_t high, uint32_t low) {
  return static_cast<float>(static_cast<int32_t>(position * high + __umulhi(position, low)));
}

// ---- between the blocks of a cluster ----

/** Writes into another block's memory, at the place of one's own `at`, and counts the bytes on its barrier. */
template <typename V>
__device__ inline void push(const V* at, const V& value, const uint64_t* barrier, int32_t block) {
#if __CUDA_ARCH__ >= 900
  uint32_t to, counts;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(at))), "r"(block));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counts) : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier))), "r"(block));
  const auto* words = reinterpret_cast<const uint32_t*>(&value);
  if constexpr (sizeof(V) == 8) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to), "r"(words[0]), "r"(words[1]), "r"(counts) : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(V) / 4); i += 4) {
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to + i * 4), "r"(words[i]), "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3]), "r"(counts) : "memory");
    }
  }
#endif
}

/** Makes a barrier that one arrival and the bytes it announces complete. */
__device__ inline void open_barrier(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier))) : "memory");
#endif
}
__device__ inline void expect(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier))), "r"(bytes) : "memory");
#endif
}
__device__ inline void await(const uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  uint32_t done;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier))) : "memory");
  } while (!done);
#endif
}

/** Says that this block has begun and its barriers are open; await_begun waits for all of the cluster. */
__device__ inline void say_begun() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;\nbarrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void await_begun() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
/** After it the blocks of a cluster see what each wrote to global memory before. */
__device__ inline void cluster_sync(int32_t blocks) {
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

/** Has a tile of rows brought to the second-level cache. */
__device__ inline void prefetch(const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)), "r"(bytes) : "memory");
#endif
}

// ---- a block's share of a step ----

template <typename T, int kGroup, bool kWide>
struct Attend {
  using C = Cut<T, kGroup, kWide>;
  static constexpr int kPad = C::kPad, kKey = C::kKey, kPairs = C::kPairs, kValue = C::kValue, kValueRows = C::kValueRows;

  /** Parts of keys on their way from memory. */
  struct Keys {
    Pack<T, kKey> first[kKeyRows], second[kKeyRows];
    int32_t rank[kKeyRows];
  };
  struct Own {
    float score;
    int32_t birth, rank;
  };

  const AttendView& a;
  const CacheView& c;
  const Faults& faults;
  Area<kPad>& area;
  const int32_t tid, warp, lane, dim, half, pairs, group, blocks, block, unit;
  const bool home;
  const int64_t head;
  const Entries e;
  T *const keys, *const values;
  // Shared memory. Partial outputs take the place of all that only the scores need: phases, turned, q.
  uint32_t *const high, *const low;  // [D / 2] the phases of the pairs a key is turned by
  float2* const turned;              // [D / 2] the new token's key as it is attended to
  float2* const q;                   // [D / 2, G] in the order of q_at, rotated and scaled
  float* const partial;              // [parts, G, D]
  T *const key, *const value, *const joined;  // rows: the new token's, as stored; the right neighbour's value
  float2* const outputs;             // [blocks, slice] pushed
  float* const weights;              // [entries, kPad] scores, then exponentials; at last [entry, 0] is the new score
  // After read_counts.
  int32_t kept = 0, step = 0;
  int32_t local = 0, count = 0;  // entries of this block: its tiles', the last of which may not be full; with the new token
  bool full = false;

  __device__ Attend(const AttendView& a, const Faults& faults, Area<kPad>& area, uint8_t* shared)
      : a(a), c(a.cache), faults(faults), area(area),
        tid(threadIdx.x), warp(threadIdx.x >> 5), lane(threadIdx.x & 31), dim(c.head_dim), half(dim / 2), pairs(c.rope.pairs), group(c.group()),
        blocks(a.plan.blocks), block(blockIdx.x % blocks), unit(blockIdx.x / blocks), home(block == blocks - 1),
        head(c.first + unit), e(c.entries(head)), keys(c.keys_of<T>(head)), values(c.values_of<T>(head)),
        high(reinterpret_cast<uint32_t*>(shared)), low(high + half), turned(reinterpret_cast<float2*>(low + half)), q(turned + half),
        partial(reinterpret_cast<float*>(shared)),
        key(reinterpret_cast<T*>(shared + a.plan.rows_at)), value(key + row_stride()), joined(value + row_stride()),
        outputs(reinterpret_cast<float2*>(shared + a.plan.outputs_at)),
        weights(a.plan.weights ? a.plan.weights + int64_t{blockIdx.x} * a.plan.room * kPad : reinterpret_cast<float*>(shared + a.plan.weights_at)) {}

  __device__ int32_t row_stride() const { return (dim * int32_t(sizeof(T)) + 15) / 16 * 16 / int32_t(sizeof(T)); }

  // Tiles of 256 / lanes slots go round the blocks.
  __device__ int32_t tile_log() const { return 8 - a.plan.key_lanes; }
  __device__ int32_t slot_at(int32_t i) const { return (((i >> tile_log()) * blocks + block) << tile_log()) | (i & ((1 << tile_log()) - 1)); }

  /** The first of the two dimensions of pair x: a rotated pair, or a pair of those that are never rotated. */
  __device__ int32_t first_of(int32_t x) const { return x < pairs ? x : 2 * pairs + (x - pairs) / kKey * 2 * kKey + (x - pairs) % kKey; }
  __device__ int32_t second_of(int32_t x) const { return first_of(x) + (x < pairs ? pairs : kKey); }
  /** Where pair x = unit * kKey + j of query head g lies: neighbouring units next to each other, kPairs pairs at a time. */
  __device__ int32_t q_at(int32_t unit_of_key, int32_t j, int32_t g) const { return ((j / kPairs * kGroup + g) * (half / kKey) + unit_of_key) * kPairs + j % kPairs; }

  /** What needs nothing of earlier kernels. */
  __device__ void begin() {
    for (int32_t i = tid; i < half; i += kThreads) {
      const uint64_t phase = i < pairs ? c.rope.phases[i] : 0;
      high[i] = static_cast<uint32_t>(phase >> 32), low[i] = static_cast<uint32_t>(phase);
    }
    if (tid == 0) {
      area.right = -1, area.newest = -1;
      if (blocks > 1) open_barrier(&area.met), open_barrier(&area.told);
    }
    __syncthreads();
    if (blocks > 1) say_begun();
  }

  __device__ void use_counts(int2 counts) {
    kept = counts.x, step = counts.y + 1;
    full = kept >= c.slots;
    const int32_t tiles = (kept + (1 << tile_log()) - 1) >> tile_log();
    local = (tiles > block ? (tiles - block + blocks - 1) / blocks : 0) << tile_log();
    count = local + (home ? 1 : 0);
  }

  __device__ bool fresh(int32_t i) const { return i >= local; }
  __device__ bool used(int32_t i) const { return fresh(i) || slot_at(i) < kept; }
  __device__ Own read_own(int32_t slot) const { return {e.score[slot], e.birth[slot], e.rank[slot]}; }
  /** The state of entry i as it was; `first` is that of entry tid, read early. */
  __device__ Own own(int32_t i, const Own& first) const {
    if (fresh(i)) return {0.0f, step, kept};
    return i == tid ? first : read_own(slot_at(i));
  }

  // ---- scores ----

  /** Reads a lane's parts of kKeyRows keys, one a tile; slots from `limit` on are zeros. */
  __device__ void read_keys(Keys& to, int32_t tile, int32_t turn, int32_t limit) const {
    const int32_t lanes = 1 << a.plan.key_lanes, u = (tid & (lanes - 1)) + turn * lanes;
    const int32_t first = first_of(u * kKey), second = second_of(u * kKey);
#pragma unroll
    for (int r = 0; r < kKeyRows; r++) {
      const int32_t slot = slot_at(((tile + r) << tile_log()) + (tid >> a.plan.key_lanes));
      to.first[r] = {}, to.second[r] = {}, to.rank[r] = 0;
      if (u * kKey < half && slot < limit) {
        const T* row = keys + int64_t{slot} * dim;
        to.first[r] = read_row<kKey>(row + first);
        to.second[r] = read_row<kKey>(row + second);
        if (!c.text) to.rank[r] = e.rank[slot];
      }
    }
  }

  /** The new token: q rotated at its rank or place and scaled, k and v rounded to what will be stored. */
  __device__ void prepare() {
    const int32_t n = unit % c.kv_heads, b = unit / c.kv_heads;
    const float* row = a.qkv + int64_t{b} * (c.heads + 2 * c.kv_heads) * dim;
    const float *k = row + int64_t{c.heads + n} * dim, *v = k + int64_t{c.kv_heads} * dim;
    const auto position = static_cast<uint32_t>(c.text ? step - 1 : kept);
    const float scale = a.scale * 1.4426950408889634f;  // powers of two from here on
    for (int32_t i = tid; i < (kGroup + 1) * half; i += kThreads) {
      const int32_t g = i / half, x = i % half;
      float2 out = make_float2(0.0f, 0.0f), cs = make_float2(1.0f, 0.0f);
      if (x < pairs) sincospif(phase_at(position, high[x], low[x]) * 0x1p-31f, &cs.y, &cs.x);
      const auto rotate = [&](float2 p) { return make_float2(p.x * cs.x - p.y * cs.y, p.x * cs.y + p.y * cs.x); };
      if (g < kGroup) {
        if (g < group) {
          const float* from = row + int64_t{n * group + g} * dim;
          out = rotate(make_float2(from[c.rope.source(first_of(x))], from[c.rope.source(second_of(x))]));
        }
        q[q_at(x / kKey, x % kKey, g)] = make_float2(out.x * scale, out.y * scale);
      } else {
        out = make_float2(k[c.rope.source(first_of(x))], k[c.rope.source(second_of(x))]);
        if (c.text) out = rotate(out);
        key[first_of(x)] = from_float<T>(out.x), key[second_of(x)] = from_float<T>(out.y);
        out = make_float2(to_float(key[first_of(x)]), to_float(key[second_of(x)]));
        turned[x] = c.text ? out : rotate(out);
      }
    }
    for (int32_t d = tid; d < dim; d += kThreads) value[d] = from_float<T>(v[d]);
  }

  /** Home's score of the new token, a warp a query head. */
  __device__ void score_new(float (&most)[kGroup]) {
#pragma unroll
    for (int g = 0; g < kGroup; g++) {
      if (g % kWarps != warp) continue;
      float sum = 0.0f;
      for (int32_t x = lane; x < half; x += 32) {
        const float2 p = q[q_at(x / kKey, x % kKey, g)];
        sum = fmaf(p.x, turned[x].x, fmaf(p.y, turned[x].y, sum));
      }
      sum = warp_sum(sum);
      most[g] = fmaxf(most[g], sum);
      if (lane == 0) weights[int64_t{local} * kPad + g] = sum;
    }
  }

  /** Adds a lane's parts of some keys times all queries to `sums`. */
  __device__ void multiply(const Keys& from, int32_t turn, float (&sums)[kKeyRows][kGroup]) const {
    const int32_t lanes = 1 << a.plan.key_lanes, u = (tid & (lanes - 1)) + turn * lanes;
    if (u * kKey >= half) return;
    const bool turns = !c.text && u * kKey < pairs;
#pragma unroll
    for (int j = 0; j < kKey; j += kPairs) {
      float x[kKeyRows][kPairs], y[kKeyRows][kPairs];
#pragma unroll
      for (int r = 0; r < kKeyRows; r++) {
#pragma unroll
        for (int i = 0; i < kPairs; i++) x[r][i] = from.first[r][j + i], y[r][i] = from.second[r][j + i];
      }
      if (turns) {
#pragma unroll
        for (int i = 0; i < kPairs; i++) {
          const uint32_t phase_high = high[u * kKey + j + i], phase_low = low[u * kKey + j + i];
#pragma unroll
          for (int r = 0; r < kKeyRows; r++) {
            const float angle = phase_at(from.rank[r], phase_high, phase_low) * (3.14159265358979f * 0x1p-31f);
            const float cosine = __cosf(angle), sine = __sinf(angle), was = x[r][i];
            x[r][i] = was * cosine - y[r][i] * sine;
            y[r][i] = was * sine + y[r][i] * cosine;
          }
        }
      }
#pragma unroll
      for (int g = 0; g < kGroup; g++) {
        float p[2 * kPairs];
        read_floats(reinterpret_cast<const float*>(q + q_at(u, j, g)), p);
#pragma unroll
        for (int r = 0; r < kKeyRows; r++) {
#pragma unroll
          for (int i = 0; i < kPairs; i++) sums[r][g] = fmaf(x[r][i], p[2 * i], fmaf(y[r][i], p[2 * i + 1], sums[r][g]));
        }
      }
    }
  }

  /** Leaves the scores of this block's entries in `weights`; `now` and `next` are the first keys, on their way. */
  __device__ void score(Keys now, Keys next, float (&most)[kGroup]) {
    const int32_t lanes = 1 << a.plan.key_lanes, turns = (half / kKey + lanes - 1) >> a.plan.key_lanes, tiles = local >> tile_log();
    int32_t turn = 0, next_tile = 2 / turns * kKeyRows, next_turn = 2 % turns;
    float sums[kKeyRows][kGroup] = {};
    for (int32_t tile = 0; tile < tiles;) {
      multiply(now, turn, sums);
      now = next;
      read_keys(next, next_tile, next_turn, kept);
      if (++next_turn >= turns) next_turn = 0, next_tile += kKeyRows;
      if (++turn < turns) continue;
      turn = 0;
#pragma unroll
      for (int r = 0; r < kKeyRows; r++) {
        if (tile + r >= tiles) break;
        const int32_t i = ((tile + r) << tile_log()) + (tid >> a.plan.key_lanes);
        const bool there = slot_at(i) < kept;
#pragma unroll
        for (int g = 0; g < kGroup; g++) {
          float sum = sums[r][g];
          for (int32_t o = lanes >> 1; o > 0; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
          sums[r][g] = there ? sum : -INFINITY;
          most[g] = fmaxf(most[g], sums[r][g]);
        }
        if ((tid & (lanes - 1)) == 0) {
          float* to = weights + int64_t{i} * kPad;
#pragma unroll
          for (int g = 0; g < kGroup; g++) to[g] = sums[r][g];
        }
      }
#pragma unroll
      for (int r = 0; r < kKeyRows; r++) {
#pragma unroll
        for (int g = 0; g < kGroup; g++) sums[r][g] = 0.0f;
      }
      tile += kKeyRows;
    }
  }

  // ---- softmax ----

  __device__ void keep_highest(const float (&most)[kGroup]) {
#pragma unroll
    for (int g = 0; g < kGroup; g++) {
      const float highest = warp_max(most[g]);
      if (lane == 0) area.highest[warp][g] = highest;
    }
  }

  /** Turns scores into exponentials under the block's own highest score, and returns that; thread t works for query head t % kPad. */
  __device__ float exponentiate() {
    const int32_t g = tid % kPad;
    float highest = -INFINITY, sum = 0.0f;
    if (g < kGroup) {
#pragma unroll
      for (int w = 0; w < kWarps; w++) highest = fmaxf(highest, area.highest[w][g]);
      const float from = highest == -INFINITY ? 0.0f : highest;
      for (int32_t i = tid / kPad; i < count; i += kThreads / kPad) {
        float* at = weights + int64_t{i} * kPad + g;
        const float p = exp2f(*at - from);
        *at = p;
        sum += p;
      }
    }
#pragma unroll
    for (int o = 16; o >= kPad; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    if (lane < kPad) area.sums[warp][lane] = sum;
    return highest;
  }

  /** Tells every block this one's highest scores and sums. */
  __device__ void tell_softmax(float highest) {
    const int32_t to = tid / kPad, g = tid % kPad;
    if (to >= blocks) return;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) sum += area.sums[w][g];
    if (blocks == 1) area.softmax[0][g] = make_float2(highest, sum);
    else push(&area.softmax[block][g], make_float2(highest, sum), &area.met, to);
  }

  /** From this block's exponentials to probabilities: one thread a query head, the one that told where there is one block. */
  __device__ void join_softmax() {
    if (tid >= kGroup) return;
    if (blocks > 1) await(&area.met);
    float highest = -INFINITY, sum = 0.0f;
    for (int32_t i = 0; i < blocks; i++) highest = fmaxf(highest, area.softmax[i][tid].x);
    const float from = highest == -INFINITY ? 0.0f : highest;
    for (int32_t i = 0; i < blocks; i++) sum += exp2f(area.softmax[i][tid].x - from) * area.softmax[i][tid].y;
    if (home && tid < group && !is_sum(sum)) faults.report(Fault::NanAttention, a.layer);
    const float factor = exp2f(area.softmax[block][tid].x - from) / sum;
    area.factor[tid] = factor;
    area.share[tid] = tid < group ? factor / static_cast<float>(group) : 0.0f;
  }

  // ---- output ----

  __device__ Pack<T, kValue> read_value(int32_t i) const {
    const int32_t at = (tid & ((1 << a.plan.value_lanes) - 1)) * kValue, slot = slot_at(i);
    if (at >= dim || i >= local || slot >= kept) return {};
    return read_row<kValue>(values + int64_t{slot} * dim + at);
  }
  __device__ int32_t value_rows() const { return kThreads >> a.plan.value_lanes; }  // that the block reads at once
  __device__ void read_first_values(Pack<T, kValue> (&ahead)[kValueRows]) const {
#pragma unroll
    for (int k = 0; k < kValueRows; k++) ahead[k] = read_value((tid >> a.plan.value_lanes) + k * value_rows());
  }

  /** Leaves the sums of exponentials times values in `partial`: [warp, or group of warps that share a row] of [G, D]. */
  __device__ void sum_values(Pack<T, kValue> (&ahead)[kValueRows]) {
    const int32_t lanes = 1 << a.plan.value_lanes, at = (tid & (lanes - 1)) * kValue, rows = value_rows(), row = tid >> a.plan.value_lanes;
    float sums[kGroup][kValue] = {};
    const auto add = [&](const auto& v, const float* w) {
      float p[kPad];
      read_floats(w, p);
#pragma unroll
      for (int g = 0; g < kGroup; g++) {
#pragma unroll
        for (int i = 0; i < kValue; i++) sums[g][i] = fmaf(p[g], v[i], sums[g][i]);
      }
    };
    for (int32_t i0 = row; i0 < local; i0 += rows * kValueRows) {
#pragma unroll
      for (int k = 0; k < kValueRows; k++) {
        const int32_t i = i0 + k * rows;
        if (i >= local) break;
        const Pack<T, kValue> v = ahead[k];
        ahead[k] = read_value(i + rows * kValueRows);
        add(v, weights + int64_t{i} * kPad);
      }
    }
    if (home && row == 0 && at < dim) {
      float v[kValue];
#pragma unroll
      for (int i = 0; i < kValue; i++) v[i] = to_float(value[at + i]);
      add(v, weights + int64_t{local} * kPad);
    }
    for (int32_t o = lanes; o < 32; o <<= 1) {
#pragma unroll
      for (int g = 0; g < kGroup; g++) {
#pragma unroll
        for (int i = 0; i < kValue; i++) sums[g][i] += __shfl_xor_sync(0xffffffffu, sums[g][i], o);
      }
    }
    if (at < dim && (lanes >= 32 || lane < lanes)) {
      float* to = partial + int64_t{lanes >= 32 ? row : warp} * kGroup * dim + at;
#pragma unroll
      for (int g = 0; g < kGroup; g++) {
#pragma unroll
        for (int i = 0; i < kValue; i += 2) *reinterpret_cast<float2*>(to + g * dim + i) = make_float2(sums[g][i], sums[g][i + 1]);
      }
    }
  }

  __device__ float2* out() const { return reinterpret_cast<float2*>(a.out + int64_t{unit} * group * dim); }
  /** The outputs are joined by slices, one a block. */
  __device__ int32_t slice() const { return (group * half + blocks - 1) / blocks; }
  __device__ int32_t my_slice() const { return max(0, min(slice(), group * half - block * slice())); }

  __device__ void tell_output() {
    const int32_t parts = a.plan.value_lanes <= 5 ? kWarps : value_rows(), all = group * half;
    const auto* from = reinterpret_cast<const float2*>(partial);
    for (int32_t i = tid; i < all; i += kThreads) {
      float2 sum = from[i];
      for (int32_t p = 1; p < parts; p++) {
        const float2 x = from[int64_t{p} * kGroup * half + i];
        sum.x += x.x, sum.y += x.y;
      }
      const float factor = area.factor[i / half];
      sum.x *= factor, sum.y *= factor;
      if (blocks == 1) out()[i] = sum;
      else push(outputs + block * slice() + i % slice(), sum, &area.told, i / slice());
    }
  }

  __device__ void join_output() {
    const int32_t mine = my_slice();
    for (int32_t i = tid; i < mine; i += kThreads) {
      float2 sum = outputs[i];
      for (int32_t s = 1; s < blocks; s++) {
        const float2 x = outputs[s * slice() + i];
        sum.x += x.x, sum.y += x.y;
      }
      out()[block * slice() + i] = sum;
    }
  }

  // ---- accumulate, select ----

  __device__ float average(float score, int32_t birth) const { return wkv_average(score, step - birth + 1); }

  /** Leaves each entry's new score in `weights`, and finds this thread's candidate. */
  __device__ Candidate accumulate(const Own& first, bool selects, int32_t forced) {
    Candidate best = kNobody;
    const bool by_gap = c.gapped() && forced == -1;
    for (int32_t i = tid; i < count; i += kThreads) {
      if (!used(i)) continue;
      const Own o = own(i, first);
      const int32_t slot = fresh(i) ? kept : slot_at(i);
      float p[kPad], score = o.score;
      read_floats(weights + int64_t{i} * kPad, p);
#pragma unroll
      for (int g = 0; g < kGroup; g++) score = fmaf(p[g], area.share[g], score);
      weights[int64_t{i} * kPad] = score;
      if (fresh(i)) area.arrived = score;
      const float w = average(score, o.birth);
      if (c.gapped()) {
        __stcg(e.average + o.rank, w);
        __stcg(c.places + head * (c.slots + 1) + o.rank, slot);
        if (o.rank == kept - 1) area.newest = slot;
      }
      if (selects && !by_gap) consider(best, forced == -1 ? wkv_select_value(c.select, o.rank, w, 0.0f, 0.0f) : 0.0f, o, slot, w, forced);
    }
    if (!c.gapped()) return best;
    // Rules that ask for gaps: the newest cached token now has a right neighbour; then everyone's average is needed.
    __syncthreads();
    if (warp == 0 && area.newest >= 0) {
      const float gap = warp_gap(values + int64_t{area.newest} * dim, value, dim);
      if (lane == 0) e.gap[area.newest] = gap;
    }
    cluster_sync(blocks);
    if (!selects || !by_gap) return best;
    for (int32_t i = tid; i < count; i += kThreads) {
      if (!used(i)) continue;
      const Own o = own(i, first);
      const int32_t slot = fresh(i) ? kept : slot_at(i);
      const float w = average(weights[int64_t{i} * kPad], o.birth);
      // The newest has no right neighbour to be merged with.
      const float cost = fresh(i) ? INFINITY : wkv_select_value(c.select, o.rank, w, __ldcg(e.average + o.rank + 1), e.gap[slot]);
      consider(best, cost, o, slot, w, forced);
    }
    return best;
  }

  __device__ void consider(Candidate& best, float value, const Own& o, int32_t slot, float w, int32_t forced) const {
    if (forced == -1 ? !wkv_evictable(o.rank, kept + 1, c.sinks, c.recent) : o.rank != forced) return;
    if (isnan(value)) {
      best.bad = min(best.bad, o.rank);
      return;
    }
    const uint32_t bits = ordered(value);
    if (bits < best.value || (bits == best.value && o.rank < best.rank)) best.value = bits, best.rank = o.rank, best.slot = slot, best.average = w, best.birth = o.birth;
  }

  /** The lane that holds the best candidate of a warp; `bad` becomes the lowest. */
  __device__ int32_t best_lane(const Candidate& mine, int32_t& bad) const {
    const uint32_t value = __reduce_min_sync(0xffffffffu, mine.value);
    const int32_t rank = __reduce_min_sync(0xffffffffu, mine.value == value ? mine.rank : INT_MAX);
    bad = __reduce_min_sync(0xffffffffu, mine.bad);
    return __ffs(__ballot_sync(0xffffffffu, mine.value == value && mine.rank == rank)) - 1;
  }

  /** Tells every block this one's candidate. */
  __device__ void tell_candidate(Candidate mine) {
    int32_t bad;
    if (lane == best_lane(mine, bad)) {
      mine.bad = bad;
      area.found[warp] = mine;
    }
    __syncthreads();
    if (warp != 0) return;
    mine = lane < kWarps ? area.found[lane] : kNobody;
    mine = area.found[best_lane(mine, bad)];
    mine.bad = bad;
    mine.arrived = home ? area.arrived : 0.0f;
    if (blocks == 1 && lane == 0) area.candidates[0] = mine;
    else if (blocks > 1 && lane < blocks) push(&area.candidates[block], mine, &area.told, lane);
  }

  /** The best of all blocks' candidates, alike in every thread. */
  __device__ Candidate choose() const {
    Candidate best = area.candidates[0];
    for (int32_t i = 1; i < blocks; i++) {
      const Candidate& x = area.candidates[i];
      const int32_t bad = min(best.bad, x.bad);
      if (x.value < best.value || (x.value == best.value && x.rank < best.rank)) best = x;
      best.bad = bad;
    }
    best.arrived = area.candidates[blocks - 1].arrived;
    return best;
  }

  // ---- merge, insert ----

  /** Writes the state of this block's slots; `victim` is null where nobody leaves. Also finds the victim's right neighbour. */
  __device__ void update(const Own& first, const Candidate* victim) {
    for (int32_t i = tid; i < count; i += kThreads) {
      if (!used(i)) continue;
      const Own o = own(i, first);
      const int32_t slot = fresh(i) ? kept : slot_at(i);
      const float score = weights[int64_t{i} * kPad];
      if (victim && o.rank == victim->rank + 1) area.right_birth = o.birth, area.right_average = average(score, o.birth), area.right = slot;
      if (fresh(i)) {
        if (!victim) e.score[slot] = score, e.birth[slot] = step, e.rank[slot] = kept;
      } else if (victim && slot == victim->slot) {
        e.score[slot] = victim->arrived, e.birth[slot] = step, e.rank[slot] = kept - 1;
      } else {
        e.score[slot] = score;
        if (victim && o.rank > victim->rank) e.rank[slot] = o.rank - 1;
      }
    }
  }

  __device__ void append() {
    for (int32_t d = tid; d < dim; d += kThreads) keys[int64_t{kept} * dim + d] = key[d], values[int64_t{kept} * dim + d] = value[d];
  }

  __device__ void note(const Candidate& victim, bool merges, float right_birth, float right_average) const {
    Counts& counts = c.counts[head];
    counts.event[0] = static_cast<float>(victim.birth - 1);
    counts.event[1] = merges ? right_birth : -1.0f;
    counts.event[2] = victim.average;
    counts.event[3] = right_average;
    if (merges) counts.merged++;
    else counts.evicted++;
  }

  /** The block that owns the right neighbour: merges the victim's value into it, and gives the victim's rows to the new token. */
  __device__ void replace(const Candidate& victim) {
    const int32_t right = area.right;
    const float w_v = victim.average, w_r = area.right_average;
    const bool merges = c.merge == WKV_MERGE_RIGHT;
    T *to_key = keys + int64_t{victim.slot} * dim, *to_value = values + int64_t{victim.slot} * dim, *neighbour = values + int64_t{right} * dim;
    for (int32_t d = tid; d < dim; d += kThreads) {
      float r = right == kept ? to_float(value[d]) : read_row<1>(neighbour + d)[0];
      if (merges && w_v + w_r > 0.0f) r = wkv_merged(w_v, read_row<1>(to_value + d)[0], w_r, r);
      joined[d] = from_float<T>(r);
      if (right != kept && merges) neighbour[d] = joined[d];
      to_value[d] = right == kept ? joined[d] : value[d];
      to_key[d] = key[d];
    }
    if (tid == 0) note(victim, merges, static_cast<float>(area.right_birth - 1), w_r);
    if (!c.gapped()) return;
    __syncthreads();
    const int32_t* places = c.places + head * (c.slots + 1);
    if (warp == 0 && victim.rank > 0) {
      const int32_t left = __ldcg(places + victim.rank - 1);
      const float gap = warp_gap(values + int64_t{left} * dim, joined, dim);
      if (lane == 0) e.gap[left] = gap;
    }
    if (warp == 1 && right != kept) {
      const T* far = victim.rank + 2 == kept ? value : values + int64_t{__ldcg(places + victim.rank + 2)} * dim;
      const float gap = warp_gap(joined, far, dim);
      if (lane == 0) e.gap[right] = gap;
    }
  }
};

template <typename T, int kGroup, bool kWide>
__global__ void __launch_bounds__(kThreads, kGroup * sizeof(T) > 16 ? 1 : 2) attend_kernel(const __grid_constant__ AttendView a, const Faults faults) {
  extern __shared__ uint4 shared16[];
  using Block = Attend<T, kGroup, kWide>;
  __shared__ Area<Block::kPad> area;
  Block my(a, faults, area, reinterpret_cast<uint8_t*>(shared16));
  const CacheView& c = a.cache;
  const int32_t tid = my.tid;
  my.begin();
  wait_for_previous();
  let_next_start();

  // Nothing waits for the cache's length here: the first keys are read as if it were full.
  const int2 counts = __ldcg(reinterpret_cast<const int2*>(c.counts + my.head));
  typename Block::Keys now, next;
  const int32_t key_lanes = 1 << a.plan.key_lanes, turns = (my.half / Block::kKey + key_lanes - 1) >> a.plan.key_lanes;
  my.read_keys(now, 0, 0, c.slots);
  my.read_keys(next, 1 / turns * kKeyRows, 1 % turns, c.slots);
  typename Block::Own first{};
  if (my.slot_at(tid) < c.slots) first = my.read_own(my.slot_at(tid));
  if (kWide && tid < kAhead) {
    const int32_t slot = my.slot_at(tid << my.tile_log()), rows = min(1 << my.tile_log(), c.slots - slot);
    if (rows > 0) prefetch(my.values + int64_t{slot} * my.dim, static_cast<uint32_t>(rows * my.dim * sizeof(T)));
  }
  my.use_counts(counts);
  my.prepare();
  __syncthreads();

  const int32_t forced = a.victims ? a.victims[my.unit] : -1;
  const bool selects = my.full && c.select != WKV_SELECT_NONE;
  if (my.blocks > 1 && tid == 0) {
    expect(&area.met, my.blocks * Block::kPad * sizeof(float2));
    expect(&area.told, my.blocks * (my.my_slice() * sizeof(float2) + (selects ? sizeof(Candidate) : 0)));
  }

  float most[kGroup];
#pragma unroll
  for (int g = 0; g < kGroup; g++) most[g] = -INFINITY;
  if (my.home) my.score_new(most);
  my.score(now, next, most);
  Pack<T, Block::kValue> ahead[Block::kValueRows];
  my.read_first_values(ahead);
  my.keep_highest(most);
  __syncthreads();
  const float highest = my.exponentiate();
  __syncthreads();
  if (my.blocks > 1) await_begun();
  my.tell_softmax(highest);

  my.sum_values(ahead);
  my.join_softmax();
  __syncthreads();
  my.tell_output();
  const Candidate mine = my.accumulate(first, selects, forced);
  if (selects) my.tell_candidate(mine);
  if (my.blocks > 1) await(&area.told);
  else __syncthreads();
  if (my.blocks > 1) my.join_output();

  const bool last = my.home && tid == 0;
  if (last) c.counts[my.head].steps = my.step;
  if (!my.full) {
    my.update(first, nullptr);
    if (my.home) my.append();
    if (last) c.counts[my.head].kept = my.kept + 1;
    return;
  }
  if (!selects) {
    if (last) faults.report(Fault::Full, c.slots);
    return;
  }
  const Candidate victim = my.choose();
  const int32_t leaves = forced != -1 ? forced : victim.rank == INT_MAX ? -1 : victim.rank;
  if (victim.bad != INT_MAX) {
    if (last) faults.report(Fault::NanScore, victim.bad);
    return;
  }
  if (!wkv_evictable(leaves, my.kept + 1, c.sinks, c.recent)) {
    if (last) faults.report(Fault::Rank, leaves, my.kept + 1, c.sinks, c.recent);
    return;
  }
  my.update(first, &victim);
  // The newest leaves alone, and nothing is written.
  if (last && victim.rank == my.kept) my.note(victim, false, -1.0f, 0.0f);
  __syncthreads();
  if (area.right >= 0) my.replace(victim);
}

// ---- host ----

int32_t log2_up(int32_t x) {
  int32_t log = 0;
  while (1 << log < x) log++;
  return log;
}

/** How many clusters of this size the device runs at once. */
template <typename Kernel>
int32_t clusters_at_once(Kernel kernel, const Shape& shape) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {shape.cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid, config.blockDim = shape.block, config.dynamicSmemBytes = shape.shared, config.attrs = &attribute, config.numAttrs = 1;
  int count = 0;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess || cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

template <typename T, int kGroup, bool kWide>
void start(Context& ctx, const Cache& cache, AttendView a) {
  using C = Cut<T, kGroup, kWide>;
  const auto kernel = attend_kernel<T, kGroup, kWide>;
  const int32_t dim = cache.head_dim, units = cache.sequences * cache.kv_heads;
  Plan& plan = a.plan;
  plan.key_lanes = std::min(5, log2_up(dim / 2 / C::kKey));
  plan.value_lanes = log2_up(divide_up(dim, C::kValue));
  const int32_t tile = kThreads >> plan.key_lanes, parts = plan.value_lanes <= 5 ? kWarps : kThreads >> plan.value_lanes;
  const size_t row = round_up(size_t(dim) * sizeof(T), 16);
  // Blocks enough to fill the processors twice, each with 64 slots or more; clusters that all find room at once.
  const int32_t most = ctx.capability < 90 ? 1 : kMostBlocks;
  int32_t blocks = 1;
  while (blocks < most && int64_t{units} * blocks * 2 <= 2 * ctx.processors && cache.slots >= blocks * 2 * 64) blocks *= 2;
  for (;; blocks /= 2) {
    plan.blocks = blocks;
    plan.room = divide_up(divide_up(cache.slots, tile), blocks) * tile + 1;
    plan.rows_at = static_cast<int32_t>(round_up(size_t(dim) * 4 * std::max(kGroup + 2, parts * kGroup), 16));
    plan.outputs_at = plan.rows_at + static_cast<int32_t>(3 * row);
    plan.weights_at = plan.outputs_at + (blocks == 1 ? 0 : static_cast<int32_t>(round_up(size_t(blocks) * divide_up(int64_t{cache.group()} * dim / 2, blocks) * 8, 16)));
    const size_t weights = size_t(plan.room) * C::kPad * 4, limit = std::min<size_t>(ctx.shared_limit, 112 * 1024) - sizeof(Area<C::kPad>);
    const bool fits = plan.weights_at + weights <= limit;
    const size_t shared = plan.weights_at + (fits ? weights : 0);
    const Shape shape{units * blocks, kThreads, shared, static_cast<uint32_t>(blocks)};
    allow_shared(kernel, shared);
    if (blocks > 1 && (shared > limit || (blocks > 8 && clusters_at_once(kernel, shape) < units))) continue;
    plan.weights = fits ? nullptr : reinterpret_cast<float*>(ctx.reserve(weights * units * blocks));
    launch(ctx, kernel, shape, a, ctx.faults());
    return;
  }
}

template <typename T>
void by_group(Context& ctx, const Cache& cache, const AttendView& a) {
  constexpr int kWidth = 16 / sizeof(T);
  const int32_t group = cache.group();
  if (cache.head_dim % (2 * kWidth) != 0 || cache.rope->count % kWidth != 0) return group <= 4 ? start<T, 4, false>(ctx, cache, a) : start<T, 16, false>(ctx, cache, a);
  switch (group) {
    case 1: return start<T, 1, true>(ctx, cache, a);
    case 2: return start<T, 2, true>(ctx, cache, a);
    case 3: return start<T, 3, true>(ctx, cache, a);
    case 4: return start<T, 4, true>(ctx, cache, a);
    case 5:
    case 6: return start<T, 6, true>(ctx, cache, a);
    case 7:
    case 8: return start<T, 8, true>(ctx, cache, a);
    default: return start<T, 16, true>(ctx, cache, a);
  }
}

}  // namespace
}  // namespace wkv

using namespace wkv;

int32_t wkv_attend(int32_t context, int32_t handle, int32_t layer, int32_t out, int32_t qkv, float scale, int32_t victims) {
  return entry(context, [&](Context& ctx) {
    const CacheRef cache = find_cache(context, handle, layer);
    const TensorRef from = find_tensor(context, qkv, "qkv", WKV_F32, cache->sequences, (cache->heads + 2 * cache->kv_heads) * cache->head_dim);
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, cache->sequences, cache->heads * cache->head_dim);
    const TensorRef forced = find_victims(context, victims, *cache);
    ctx.hold(cache, from, to, forced);
    AttendView a{};
    a.cache = cache->view(layer);
    a.qkv = from->f32();
    a.out = to->f32();
    a.scale = scale;
    a.layer = layer;
    a.victims = forced ? forced->i32() : nullptr;
    by_cache_type(cache->dtype, [&](auto type) { by_group<decltype(type)>(ctx, *cache, a); });
    ctx.submitted();
  });
}
