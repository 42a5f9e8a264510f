/**
 * attend.cu: wkv_attend, one decode step of one layer in one launch: attend, accumulate scores, select, merge, insert.
 *
 *   s[g, i] = scale * rotate(q[g], len) . rotate(k[i], rank i)     i = 0..len, the new token being i = len; capped where asked
 *   p = softmax(s);  out[g] = sum_i p[g, i] v[i];  a[i] += mean_g p[g, i];  then steps 4 to 6 of the step (wkv.h, policy.h)
 * or, where the policy must see the whole step's weights, those weights for a second launch (settle.cu).
 *
 * qkv [B, (H + 2 N) D], out [B, H D]. A KV head of a sequence, with all its query heads, belongs to a cluster of blocks (one block where
 * there are no clusters). Chunks of 8 slots go round the blocks, then round a block's warps, so K and V are read once. A warp works alone:
 * it has its own keys and then its own values brought to shared memory, some items ahead, each lane the parts that it will read; it scores
 * all its slots, and sums its values under its own highest score. Its barriers: before the scores (q is ready), after them and after the
 * values.
 *
 * What the blocks tell each other they push into each other's shared memory, where a barrier counts the bytes: first the highest score and
 * the sum of each block (while values are summed), then its part of the output and its candidate for leaving. Then every block knows the
 * victim: it updates the state of its own slots, and the warp that owns the right neighbour merges and writes the new token's rows. The
 * last block, `home`, owns the new token until it has a slot.
 *
 * The scores [entries, kPad] of a block stay in shared memory or, for long caches, in scratch. Keys are turned by their rank in registers:
 * rank * (angle a position, in turns of 2^64) wraps as turns do, so the angle is exact to 2^-32 turns at any rank, without a table.
 * Bytes moved: K and V of the cached tokens, 24 bytes of state a slot, three rows. Sums are taken in a fixed order.
 */
#include <algorithm>
#include <cfloat>

#include "cache.cuh"

namespace wkv {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMostBlocks = 16;     // of a cluster; more than 8 need leave
constexpr int kChunk = 8;           // slots that a warp owns together: a sector of each array of state

/** How the work is cut: chosen on the host from the sizes. */
struct Plan {
  int32_t blocks_log, slice_log;     // log2 of the blocks of a cluster; of the pairs of outputs that a block joins
  int32_t q_at, phases_at, rows_at, outputs_at, weights_at;  // bytes of shared memory
  int32_t room;                      // entries that a block may own
  float share;                       // 1 / G
  float* weights;                    // scratch, [units, blocks, room, kPad]; null: in shared memory
};

struct AttendView {
  CacheView cache;
  Plan plan;
  const float* qkv;
  float* out;
  float scale;
  float softcap;                     // in units of ln 2, as scores are; 0: none
  int32_t layer;
  const int32_t* victims;
  __device__ float capped(float s) const { return softcap > 0.0f ? softcap * tanhf(s / softcap) : s; }
};

constexpr int power_up(int x) { return x <= 1 ? 1 : 2 * power_up((x + 1) / 2); }

/** How a warp reads rows. kGroup: query heads a KV head, or more (the rest are zeros); kDim: dimensions of a head, or more. */
template <typename T, int kGroup, int kDim>
struct Cut {
  static constexpr bool kLoose = kDim > 128;  // any size, slowly
  static constexpr int kHeads = power_up(kGroup);
  static constexpr int kPad = kHeads < 4 ? 4 : kHeads;            // floats between two entries' scores
  static constexpr int kHalf = kDim / 2;
  static constexpr int kKey = kLoose ? 8 : 16 / sizeof(T);        // a lane's part of either half of a key
  static constexpr int kLanes = kHalf / kKey;                     // that share a key
  static constexpr int kValue = kLoose ? 16 : 16 / sizeof(T);     // a lane's part of a value
  static constexpr int kValueLanes = kDim / kValue;
  static constexpr int kRows = 32 / kLanes, kValueRows = 32 / kValueLanes;  // keys of an item; values that a warp takes at once
  static constexpr int kItems = kChunk / kRows;                   // of a chunk
  static constexpr int kWords = 2 * kKey * int(sizeof(T)) / 16;   // a lane's part of an item, keys or values, in 16 bytes
  static constexpr int kStages = kLoose ? 1 : 4;                  // items on their way
  static constexpr bool kHeld = !kLoose && kGroup * kKey <= 32;   // a lane's part of q stays in registers
  static constexpr int kAtOnce = kHeld || kLoose ? 1 : 2;         // items of keys that share what is read of q
  static constexpr int kPass = kLoose ? 2 : kGroup < 8 ? kGroup : 8;  // query heads whose outputs are summed at once
  static constexpr int kMine = kHeads > kLanes ? kHeads / kLanes : 1; // scores of a row that a lane has at last
  static constexpr int kParts = kWarps * kValueRows;              // of the output
  static constexpr int kRegion = std::max(kStages * kWords * 512, kValueRows * kPass * kDim * 4);  // bytes of a warp: its items, then its outputs
  static constexpr int kDots = kGroup * kHalf / 32;
};

/** A token's state. */
struct Own {
  float score;
  int32_t birth, rank;
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

template <int kHeads, int kDots>
struct Area {
  uint64_t met, told;  // barriers: every block's softmax has come; every block's output and candidate
  float2 softmax[kMostBlocks][kHeads], part[kWarps][kHeads];  // the highest score, and the sum of exponentials under it
  Candidate candidates[kMostBlocks], found[kWarps];
  Own first[kThreads];    // of each thread's first entry, as it was
  float dots[kDots];      // home's: parts of the new token's scores, 32 pairs each
  float fresh[kHeads];    // home's: the new token's probabilities
  float arrived;          // home's: the new token's score
  int32_t newest;         // the slot of the newest cached token, if it is this block's
};

/** 2^x; what is too small for a normal float is 0. */
__device__ inline float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
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

// ---- items: each lane reads only what it asked for itself ----

/** Brings 16 bytes from global to shared memory, or zeros. */
__device__ inline void bring(uint4* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0) : "memory");
}
__device__ inline void close_item() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/** Waits until at most kCount of the newest items are on their way. */
template <int kCount>
__device__ inline void await_items() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kCount) : "memory");
}

// ---- a block's share of a step ----

template <typename T, int kGroup, int kDim>
struct Attend {
  using C = Cut<T, kGroup, kDim>;
  static constexpr int kHeads = C::kHeads, kPad = C::kPad, kHalf = C::kHalf, kKey = C::kKey, kLanes = C::kLanes, kValue = C::kValue, kRows = C::kRows;
  static constexpr int kItems = C::kItems, kWords = C::kWords, kStages = C::kStages, kAtOnce = C::kAtOnce, kPass = C::kPass, kMine = C::kMine;
  using Area = wkv::Area<kHeads, C::kDots>;

  /** The softmax of all blocks: p = 2^(s - highest) * inverse. */
  struct Softmax {
    float highest[kGroup], inverse[kGroup];
  };
  /** A lane's part of an item. */
  struct Part {
    uint4 words[kWords];
    __device__ float operator[](int i) const { return to_float(reinterpret_cast<const T*>(words)[i]); }
  };

  const AttendView& a;
  const CacheView& c;
  const Faults& faults;
  Area& area;
  const int32_t tid, warp, lane, dim, half, pairs, group, blocks, block, unit;
  const bool home;
  const int64_t head;
  const Entries e;
  T *const keys, *const values;
  // Shared memory.
  uint4* const items;                // this warp's [stages, words, lane]; at last its part of the outputs
  const float* const partial;        // [warp's region][parts of a warp, kPass, kDim]
  float2* const q;                   // in the order of q_at, rotated and scaled
  uint32_t *const high, *const low;  // the phases of the pairs a key is turned by, in the order of phase_at
  T *const key, *const value, *const joined;  // rows: the new token's, as stored; the right neighbour's value
  float2* const outputs;             // [blocks, slice] pushed
  float* const scores;               // [entries, kPad]; after accumulate the new score, rank and birth
  // After use_counts.
  int32_t kept = 0, step = 0;
  int32_t local = 0, count = 0;      // entries of this block: its chunks', the last of which may not be full; with the new token
  int32_t length = 0;                // this warp's items of keys, and of values
  // The next item to bring: its first slot, and what this lane takes of it: words at `from` + slot * dim and `apart` further on, where
  // the slot is below the limits.
  int32_t next = 0, next_slot = 0, apart = 0, first_limit = 0, second_limit = 0;
  const T* from = nullptr;
  bool full = false;

  __device__ Attend(const AttendView& a, const Faults& faults, Area& area, uint8_t* shared)
      : a(a), c(a.cache), faults(faults), area(area),
        tid(threadIdx.x), warp(threadIdx.x >> 5), lane(threadIdx.x & 31), dim(c.head_dim), half(dim / 2), pairs(c.rope.pairs), group(c.group()),
        blocks(1 << a.plan.blocks_log), block(blockIdx.x & (blocks - 1)), unit(blockIdx.x >> a.plan.blocks_log), home(block == blocks - 1),
        head(c.first + unit), e(c.entries(head)), keys(c.keys_of<T>(head)), values(c.values_of<T>(head)),
        items(reinterpret_cast<uint4*>(shared + warp * C::kRegion)), partial(reinterpret_cast<const float*>(shared)),
        q(reinterpret_cast<float2*>(shared + a.plan.q_at)),
        high(reinterpret_cast<uint32_t*>(shared + a.plan.phases_at)), low(high + kHalf),
        key(reinterpret_cast<T*>(shared + a.plan.rows_at)), value(key + kDim), joined(value + kDim),
        outputs(reinterpret_cast<float2*>(shared + a.plan.outputs_at)),
        scores(a.plan.weights ? a.plan.weights + int64_t{blockIdx.x} * a.plan.room * kPad : reinterpret_cast<float*>(shared + a.plan.weights_at)) {}

  // Entry i of a block: chunk i / 8 of the block's, warp (i / 8) % kWarps.
  __device__ int32_t slot_at(int32_t i) const { return (((i / kChunk) << a.plan.blocks_log) + block) * kChunk + i % kChunk; }
  /** The first entry of this warp's item n. */
  __device__ int32_t item_at(int32_t n) const { return (n / kItems * kWarps + warp) * kChunk + n % kItems * kRows; }
  /** A thread's entries, for state: a warp takes 4 of its chunks at once. */
  static constexpr int kTurn = kThreads;
  __device__ int32_t entry_at(int32_t turn) const { return ((turn * 4 + lane / kChunk) * kWarps + warp) * kChunk + lane % kChunk; }

  /** The first of the two dimensions of pair x: a rotated pair, or a pair of those that are never rotated. */
  __device__ int32_t first_of(int32_t x) const { return x < pairs ? x : 2 * pairs + (x - pairs) / stride() * 2 * stride() + (x - pairs) % stride(); }
  __device__ int32_t second_of(int32_t x) const { return first_of(x) + (x < pairs ? pairs : stride()); }
  __device__ int32_t stride() const { return C::kLoose ? 1 : kKey; }
  /** Where a pair of query head g lies: the lanes' next to each other, two pairs at a time. */
  __device__ int32_t q_at(int32_t x, int32_t g) const { return ((x % kKey / 2 * kGroup + g) * kLanes + x / kKey) * 2 + x % 2; }
  __device__ int32_t phase_of(int32_t x) const { return (x % kKey / 4 * kLanes + x / kKey) * 4 + x % 4; }

  // ---- before the scores ----

  /** What needs nothing of earlier kernels; returns the phase of this thread's pair. */
  __device__ uint64_t begin() {
    const uint64_t phase = tid % kHalf < pairs ? c.rope.phases[tid % kHalf] : 0;
    if (tid < kHalf) high[phase_of(tid)] = static_cast<uint32_t>(phase >> 32), low[phase_of(tid)] = static_cast<uint32_t>(phase);
    if (tid == 0) {
      area.newest = -1;
      if (blocks > 1) open_barrier(&area.met), open_barrier(&area.told);
    }
    __syncwarp();
    if (blocks > 1) say_begun();
    return phase;
  }

  __device__ int32_t length_of(int32_t chunks) const {
    const int32_t mine = chunks > block ? (chunks - block + blocks - 1) >> a.plan.blocks_log : 0;
    const int32_t n = mine > warp ? (mine - warp + kWarps - 1) / kWarps * kItems : 0;
    return (n + kAtOnce - 1) / kAtOnce * kAtOnce;
  }

  /** The cache's length is now known. */
  __device__ void use_counts(int2 counts) {
    kept = counts.x, step = counts.y + 1;
    full = kept >= c.slots;
    const int32_t chunks = (kept + kChunk - 1) / kChunk;
    local = (chunks > block ? (chunks - block + blocks - 1) >> a.plan.blocks_log : 0) * kChunk;
    count = local + (home ? 1 : 0);
    // The items that are on their way already stay what they are.
    length = max(length_of(chunks), min(length, kStages));
  }

  __device__ bool fresh(int32_t i) const { return i >= local; }
  __device__ bool used(int32_t i) const { return fresh(i) || slot_at(i) < kept; }
  __device__ Own read_own(int32_t i) const {
    const int32_t slot = slot_at(i);
    if (slot >= c.slots) return {0.0f, 0, 0};
    return {__ldcg(e.score + slot), __ldcg(e.birth + slot), __ldcg(e.rank + slot)};
  }
  __device__ int32_t read_rank(int32_t i) const { return slot_at(i) < c.slots ? __ldcg(e.rank + slot_at(i)) : 0; }

  /** Where this thread's pair of the new token's rows lies: of its first query head's, of the key and of the value. */
  struct Places {
    const float *q, *k, *v;
    int32_t apart;  // from a pair's first to its second
  };
  __device__ Places find_rows() const {
    const int32_t n = unit % c.kv_heads, b = unit / c.kv_heads, x = tid % kHalf;
    const int32_t first = c.rope.source(first_of(x)), second = c.rope.source(second_of(x));
    const float* row = a.qkv + int64_t{b} * (c.heads + 2 * c.kv_heads) * dim;
    const float* k = row + int64_t{c.heads + n} * dim;
    return {row + (int64_t{n} * group + tid / kHalf) * dim + first, k + first, k + int64_t{c.kv_heads} * dim + 2 * x, second - first};
  }
  /** The new token's rows on their way: a pair of each of this thread's query heads, of the key and of the value. */
  struct Rows {
    static constexpr int kTurns = (kGroup * kHalf + kThreads - 1) / kThreads;
    float2 q[kTurns], k, v;
  };
  __device__ Rows read_rows(const Places& at) const {
    Rows rows;
    const bool there = tid % kHalf < half;
#pragma unroll
    for (int t = 0; t < Rows::kTurns; t++) {
      const float* q = at.q + t * (kThreads / kHalf) * dim;
      rows.q[t] = make_float2(0.0f, 0.0f);
      if (there && (tid + t * kThreads) / kHalf < group) rows.q[t] = make_float2(__ldcg(q), __ldcg(q + at.apart));
    }
    rows.k = rows.v = make_float2(0.0f, 0.0f);
    if (there) rows.k = make_float2(__ldcg(at.k), __ldcg(at.k + at.apart)), rows.v = make_float2(__ldcg(at.v), __ldcg(at.v + 1));
    return rows;
  }

  /** The new token: q rotated at its rank or place and scaled, k and v rounded to what will be stored; home's parts of its scores. */
  __device__ void prepare(const Rows& rows, uint64_t phase) {
    const int32_t x = tid % kHalf;
    const auto position = static_cast<uint32_t>(c.text ? step - 1 : kept);
    const float scale = a.scale * 1.4426950408889634f;  // powers of two from here on
    float sine, cosine;
    sincospif(phase_at(position, static_cast<uint32_t>(phase >> 32), static_cast<uint32_t>(phase)) * 0x1p-31f, &sine, &cosine);
    const auto rotate = [&](float2 p) { return make_float2(p.x * cosine - p.y * sine, p.x * sine + p.y * cosine); };
    float2 turned = c.text ? rotate(rows.k) : rows.k;
    const T first = from_float<T>(turned.x), second = from_float<T>(turned.y);
    turned = make_float2(to_float(first), to_float(second));
    if (!c.text) turned = rotate(turned);
    if (tid < half) {
      key[first_of(x)] = first, key[second_of(x)] = second;
      value[2 * x] = from_float<T>(rows.v.x), value[2 * x + 1] = from_float<T>(rows.v.y);
    }
#pragma unroll
    for (int t = 0; t < Rows::kTurns; t++) {
      const int32_t i = tid + t * kThreads;
      if (i >= kGroup * kHalf) break;
      float2 out = rotate(rows.q[t]);
      out.x *= scale, out.y *= scale;
      q[q_at(x, i / kHalf)] = out;
      if (home) {
        const float sum = warp_sum(fmaf(out.x, turned.x, out.y * turned.y));
        if (lane == 0) area.dots[i / 32] = sum;
      }
    }
  }

  /** The new token's score. */
  __device__ float new_score(int32_t g) const {
    float sum = 0.0f;
    if (g >= kGroup) return sum;
#pragma unroll
    for (int i = 0; i < kHalf / 32; i++) sum += area.dots[g * (kHalf / 32) + i];
    return a.capped(sum);
  }

  // ---- items ----

  __device__ uint4* item(int32_t n) const { return items + n % kStages * kWords * 32 + lane; }
  __device__ Part read_item(int32_t n) const {
    Part part;
#pragma unroll
    for (int w = 0; w < kWords; w++) part.words[w] = item(n)[w * 32];
    return part;
  }

  // From an item's first slot or entry to the next one's.
  __device__ int32_t slot_step(int32_t n) const { return n % kItems < kItems - 1 ? kRows : ((kWarps * kChunk) << a.plan.blocks_log) - (kItems - 1) * kRows; }
  __device__ int32_t entry_step(int32_t n) const { return n % kItems < kItems - 1 ? kRows : kWarps * kChunk - (kItems - 1) * kRows; }

  __device__ void begin_keys() {
    const int32_t x = lane % kLanes * kKey, row = lane / kLanes, limit = x < half ? c.slots - row : 0;
    next = 0, next_slot = slot_at(item_at(0));
    from = keys + row * dim + first_of(x), apart = second_of(x) - first_of(x);
    first_limit = second_limit = limit;
  }
  __device__ void begin_values() {
    const int32_t at = lane % C::kValueLanes * kValue, row = lane / C::kValueLanes, limit = at < dim ? c.slots - row : 0;
    next = length, next_slot = slot_at(item_at(0));
    from = values + row * dim + at, apart = C::kValueRows * dim;
    first_limit = limit, second_limit = limit - C::kValueRows;
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
      if constexpr (C::kLoose) {
        bring_slowly();
      } else {
        const T* at = from + int64_t{next_slot} * dim;
        bring(item(next), at, next_slot < first_limit);
        bring(item(next) + 32, at + apart, next_slot < second_limit);
      }
    }
    close_item();
    next_slot += slot_step(next - (next < length ? 0 : length));
    next++;
  }

  // ---- scores ----

  /** Adds a lane's part of some keys times all queries to `sums`. */
  template <typename Query>
  __device__ void multiply(const Part (&from)[kAtOnce], const int32_t (&ranks)[kAtOnce], const Query& query, float (&sums)[kAtOnce][kHeads]) const {
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
  static constexpr int kSame = kLanes > kHeads ? kLanes / kHeads : 1;
  __device__ int32_t my_head() const {
    int32_t g = 0, n = kHeads;
#pragma unroll
    for (int o = kLanes / 2; o > 0; o /= 2) {
      if (n > 1) n /= 2, g += lane & o ? n : 0;
    }
    return g;
  }
  __device__ void share(float (&sums)[kHeads]) const {
    int n = kHeads;
#pragma unroll
    for (int o = kLanes / 2; o > 0; o /= 2) {
      if (n == 1) {
        sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], o);
        continue;
      }
      n /= 2;
#pragma unroll
      for (int i = 0; i < kHeads / 2; i++) {
        if (i >= n) break;
        const float give = lane & o ? sums[i] : sums[i + n], keep = lane & o ? sums[i + n] : sums[i];
        sums[i] = keep + __shfl_xor_sync(0xffffffffu, give, o);
      }
    }
  }

  /** Caps what this lane's keys have in `scores`, and its softmax with them: apart, as few models do, and the loop above pays for it. */
  __device__ void cap_scores(int32_t mine, float (&most)[kMine], float (&total)[kMine]) const {
#pragma unroll
    for (int k = 0; k < kMine; k++) most[k] = -FLT_MAX, total[k] = 0.0f;
    __syncwarp();
    int32_t entry = item_at(0) + lane / kLanes, slot = slot_at(entry);
    for (int32_t n = 0; n < length; n++) {
      float* at = scores + int64_t{entry} * kPad + mine;
      float s[kMine];
#pragma unroll
      for (int k = 0; k < kMine; k++) s[k] = slot < kept ? a.capped(at[k]) : 0.0f;
      __syncwarp();  // neighbours that have the same read it before one writes
      if (slot < kept) {
#pragma unroll
        for (int k = 0; k < kMine; k++) {
          const float higher = fmaxf(most[k], s[k]);
          if (lane % kSame == 0) at[k] = s[k];
          total[k] = fmaf(total[k], power(most[k] - higher), power(s[k] - higher));
          most[k] = higher;
        }
      }
      slot += slot_step(n), entry += entry_step(n);
    }
  }

  /** Leaves this warp's scores in `scores`, its softmax in area.part; `ranks` are those of the thread's own entries. */
  __device__ void score(int32_t ranks) {
    const int32_t u = lane % kLanes, mine = my_head();
    float4 held[C::kHeld ? kKey / 2 : 1][kGroup];
    const auto* shared = reinterpret_cast<const float4*>(q);
    if constexpr (C::kHeld) {
#pragma unroll
      for (int j = 0; j < kKey / 2; j++) {
#pragma unroll
        for (int g = 0; g < kGroup; g++) held[j][g] = shared[(j * kGroup + g) * kLanes + u];
      }
    }
    const auto query = [&](int j, int g) {
      if constexpr (C::kHeld) return held[j][g];
      else return shared[(j * kGroup + g) * kLanes + u];
    };
    float most[kMine], total[kMine];
#pragma unroll
    for (int k = 0; k < kMine; k++) most[k] = -FLT_MAX, total[k] = 0.0f;
    int32_t next_ranks = read_rank(entry_at(1)), entry = item_at(0) + lane / kLanes, slot = slot_at(entry);
    for (int32_t n = 0; n < length; n += kAtOnce) {
      if (n > 0 && n % (4 * kItems) == 0) ranks = next_ranks, next_ranks = read_rank(entry_at(n / (4 * kItems) + 1));
      await_items<kStages - kAtOnce>();
      Part parts[kAtOnce];
      int32_t rank[kAtOnce];
      float sums[kAtOnce][kHeads] = {};
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) {
        parts[r] = read_item(n + r);
        rank[r] = __shfl_sync(0xffffffffu, ranks, (n + r) / kItems % 4 * kChunk + (n + r) % kItems * kRows + lane / kLanes);
      }
      multiply(parts, rank, query, sums);
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) {
        bring_item();
        share(sums[r]);
        if (slot < kept) {
#pragma unroll
          for (int k = 0; k < kMine; k++) {
            const float s = sums[r][k], higher = fmaxf(most[k], s);
            total[k] = fmaf(total[k], power(most[k] - higher), power(s - higher));
            most[k] = higher;
            if (lane % kSame == 0) scores[int64_t{entry} * kPad + mine + k] = s;
          }
        }
        slot += slot_step(n + r), entry += entry_step(n + r);
      }
    }
    if (a.softcap > 0.0f) cap_scores(mine, most, total);
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
  }

  // ---- softmax ----

  static constexpr int kShares = kMostBlocks * kHeads > 32 ? kMostBlocks * kHeads / 32 : 1;  // of all blocks' numbers, for a lane

  /** Warp 0 waits until all warps have their scores, and tells every block this one's highest scores and sums. */
  __device__ void tell_softmax() {
    __syncthreads();
    if (warp != 0) return;
    const int32_t g = lane % kHeads;
    float2 parts[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; w++) parts[w] = area.part[w][g];
    float highest = parts[0].x, sum = 0.0f;
#pragma unroll
    for (int w = 1; w < kWarps; w++) highest = fmaxf(highest, parts[w].x);
    const float fresh = home ? new_score(g) : -FLT_MAX;
    highest = fmaxf(highest, fresh);
    if (home) sum = power(fresh - highest);
#pragma unroll
    for (int w = 0; w < kWarps; w++) sum = fmaf(parts[w].y, power(parts[w].x - highest), sum);
    if (blocks == 1 && lane < kHeads) area.softmax[0][g] = make_float2(highest, sum);
#pragma unroll
    for (int k = 0; k < kShares; k++) {
      const int32_t to = lane / kHeads + k * (32 / kHeads);
      if (blocks > 1 && to < blocks) push(&area.softmax[block][g], make_float2(highest, sum), &area.met, to);
    }
  }

  /** The softmax of all blocks, alike in every thread. */
  __device__ Softmax join_softmax() {
    if (blocks > 1) await(&area.met);
    else __syncthreads();
    const int32_t g = lane % kHeads;
    float highest = -FLT_MAX, sum = 0.0f;
    float2 parts[kShares];
#pragma unroll
    for (int k = 0; k < kShares; k++) {
      const int32_t b = lane / kHeads + k * (32 / kHeads);
      parts[k] = b < blocks ? area.softmax[b][g] : make_float2(-FLT_MAX, 0.0f);
      highest = fmaxf(highest, parts[k].x);
    }
#pragma unroll
    for (int o = kHeads; o < 32; o *= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, o));
#pragma unroll
    for (int k = 0; k < kShares; k++) sum = fmaf(parts[k].y, power(parts[k].x - highest), sum);
#pragma unroll
    for (int o = kHeads; o < 32; o *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    const float inverse = __fdividef(1.0f, sum);
    if (home && warp == 0 && lane < kHeads) {
      area.fresh[g] = power(new_score(g) - highest) * inverse;
      if (g < group && !is_sum(sum)) faults.report(Fault::NanAttention, a.layer);
    }
    Softmax all;
#pragma unroll
    for (int k = 0; k < kGroup; k++) all.highest[k] = __shfl_sync(0xffffffffu, highest, k), all.inverse[k] = __shfl_sync(0xffffffffu, inverse, k);
    return all;
  }

  // ---- output ----

  struct Sums {
    float at[kPass][kValue], highest[kPass];
  };

  /** Sums of exponentials, under this warp's own highest score, times values: query heads from `head` on. */
  __device__ void sum_values(int32_t head, Sums& sums) {
    const int32_t at_head = head * kPass;
    if (head > 0) {
      next = length;
      for (int n = 0; n < kStages; n++) bring_item();
    }
#pragma unroll
    for (int g = 0; g < kPass; g++) {
      sums.highest[g] = area.part[warp][at_head + g].x;
#pragma unroll
      for (int i = 0; i < kValue; i++) sums.at[g][i] = 0.0f;
    }
    int32_t entry = item_at(0) + lane / C::kValueLanes, slot = slot_at(entry);
    for (int32_t n = 0; n < length; n++) {
      await_items<kStages - 1>();
      const Part part = read_item(length + n);
      bring_item();
#pragma unroll
      for (int p = 0; p < kRows / C::kValueRows; p++) {
        if (slot + p * C::kValueRows >= kept) continue;
        float w[kPass > 2 ? (kPass + 3) / 4 * 4 : kPass];
        read_floats(scores + int64_t{entry + p * C::kValueRows} * kPad + at_head, w);
#pragma unroll
        for (int g = 0; g < kPass; g++) {
          const float weight = power(w[g] - sums.highest[g]);
#pragma unroll
          for (int k = 0; k < kValue; k++) sums.at[g][k] = fmaf(weight, part[p * kValue + k], sums.at[g][k]);
        }
      }
      slot += slot_step(n), entry += entry_step(n);
    }
    await_items<0>();
  }

  /** Leaves them in this warp's region, under the highest score of all. */
  __device__ void keep_sums(int32_t head, const Sums& sums, const Softmax& all) {
    __syncwarp();
    float* to = reinterpret_cast<float*>(items) + lane / C::kValueLanes * kPass * kDim + lane % C::kValueLanes * kValue;
#pragma unroll
    for (int g = 0; g < kPass; g++) {
      float factor = 0.0f;
#pragma unroll
      for (int k = g; k < kGroup; k += kPass) {
        if (k == head * kPass + g) factor = power(sums.highest[g] - all.highest[k]) * all.inverse[k];
      }
#pragma unroll
      for (int i = 0; i < kValue; i += 4) {
        *reinterpret_cast<float4*>(to + g * kDim + i) = make_float4(sums.at[g][i] * factor, sums.at[g][i + 1] * factor, sums.at[g][i + 2] * factor, sums.at[g][i + 3] * factor);
      }
    }
  }

  __device__ float2* out() const { return reinterpret_cast<float2*>(a.out + int64_t{unit} * group * dim); }
  /** The outputs are joined by slices of 2^slice_log pairs, one a block. */
  __device__ int32_t my_slice() const { return max(0, min(1 << a.plan.slice_log, group * half - (block << a.plan.slice_log))); }

  __device__ void tell_output(int32_t head) {
    for (int32_t i = tid; i < kPass * kHalf; i += kThreads) {
      const int32_t g = head * kPass + i / kHalf, x = i % kHalf;
      if (g >= group || x >= half) continue;
      float2 sum = make_float2(0.0f, 0.0f);
      if (home) sum = make_float2(area.fresh[g] * to_float(value[2 * x]), area.fresh[g] * to_float(value[2 * x + 1]));
#pragma unroll
      for (int p = 0; p < C::kParts; p++) {
        const float2 y = *reinterpret_cast<const float2*>(partial + p / C::kValueRows * (C::kRegion / 4) + p % C::kValueRows * kPass * kDim + 2 * i);
        sum.x += y.x, sum.y += y.y;
      }
      const int32_t at = g * half + x;
      if (blocks == 1) out()[at] = sum;
      else push(outputs + (block << a.plan.slice_log) + (at & ((1 << a.plan.slice_log) - 1)), sum, &area.told, at >> a.plan.slice_log);
    }
  }

  __device__ void join_output() {
    const int32_t mine = my_slice();
    for (int32_t i = tid; i < mine; i += kThreads) {
      float2 sum = outputs[i];
#pragma unroll 4
      for (int32_t s = 1; s < blocks; s++) {
        const float2 x = outputs[(s << a.plan.slice_log) + i];
        sum.x += x.x, sum.y += x.y;
      }
      out()[(block << a.plan.slice_log) + i] = sum;
    }
  }

  // ---- accumulate, select ----

  /** The weight of a token's value in a merge, and what an average rule minimises. */
  __device__ float weight(float score, int32_t birth) const { return c.select == WKV_SELECT_LITERAL_AVERAGE ? score : wkv_average(score, step - birth + 1); }
  __device__ float rule(const Own& o, float w) const { return wkv_select_value(c.select, wkv_token{o.rank, o.score, w, 0.0f, 0.0f, 0.0f}); }

  __device__ void put(int32_t i, const Own& o) { *reinterpret_cast<float4*>(scores + int64_t{i} * kPad) = make_float4(o.score, __int_as_float(o.birth), __int_as_float(o.rank), 0.0f); }
  __device__ Own get(int32_t i) const {
    const float4 x = *reinterpret_cast<const float4*>(scores + int64_t{i} * kPad);
    return {x.x, __float_as_int(x.y), __float_as_int(x.z)};
  }

  /** Leaves each entry's new state in `scores`, and finds this thread's candidate. */
  __device__ Candidate accumulate(const Softmax& all, bool selects, int32_t forced) {
    Candidate best = kNobody;
    Own own = area.first[tid];
    const bool by_gap = c.gapped() && forced == -1;
    float shares[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; g++) shares[g] = g < group ? all.inverse[g] * a.plan.share : 0.0f;
    for (int32_t t = 0, i; (i = entry_at(t)) < count; t++) {
      Own o = fresh(i) ? Own{0.0f, step, kept} : own;
      if (i + kTurn < local) own = read_own(i + kTurn);
      if (!used(i)) continue;
      const int32_t slot = fresh(i) ? kept : slot_at(i);
      float s[kPad], now = 0.0f;
      read_floats(scores + int64_t{i} * kPad, s);
#pragma unroll
      for (int g = 0; g < kGroup; g++) now = fmaf(power((fresh(i) ? new_score(g) : s[g]) - all.highest[g]), shares[g], now);
      if (c.later) {
        c.weights[int64_t{unit} * (c.slots + 1) + o.rank] = now;
        continue;
      }
      o.score += now;
      if (full && c.select == WKV_SELECT_LITERAL_AVERAGE) o.score = wkv_average(o.score, step - o.birth + 1);
      put(i, o);
      if (fresh(i)) area.arrived = o.score;
      if (!selects && !c.gapped()) continue;
      const float w = weight(o.score, o.birth);
      if (c.gapped()) {
        __stcg(e.by_rank + o.rank, w);
        __stcg(c.places_of(head) + o.rank, slot);
        if (o.rank == kept - 1) area.newest = slot;
      }
      if (selects && !by_gap) consider(best, forced == -1 ? rule(o, w) : 0.0f, o, slot, w, forced);
    }
    if (!c.gapped()) return best;
    // Rules that ask for gaps: the newest cached token now has a right neighbour; then everyone's average is needed.
    __syncthreads();
    if (warp == 0 && area.newest >= 0) {
      const float gap = warp_gap(values + int64_t{area.newest} * dim, value, dim);
      if (lane == 0) e.gap[area.newest] = gap;
    }
    __syncwarp();
    cluster_sync(blocks);
    if (!selects || !by_gap) return best;
    for (int32_t t = 0, i; (i = entry_at(t)) < count; t++) {
      if (!used(i)) continue;
      const Own o = get(i);
      const int32_t slot = fresh(i) ? kept : slot_at(i);
      const float w = weight(o.score, o.birth);
      // The newest has no right neighbour to be merged with.
      const float cost = fresh(i) ? INFINITY : wkv_select_value(c.select, {o.rank, o.score, w, __ldcg(e.by_rank + o.rank + 1), 0.0f, e.gap[slot]});
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
  __device__ int32_t best_lane(uint32_t mine, int32_t rank, int32_t& bad) const {
    const uint32_t value = __reduce_min_sync(0xffffffffu, mine);
    bad = __reduce_min_sync(0xffffffffu, bad);
    const int32_t lowest = __reduce_min_sync(0xffffffffu, mine == value ? rank : INT_MAX);
    return __ffs(__ballot_sync(0xffffffffu, mine == value && rank == lowest)) - 1;
  }

  __device__ void keep_candidate(Candidate mine) {
    int32_t bad = mine.bad;
    if (lane == best_lane(mine.value, mine.rank, bad)) {
      mine.bad = bad;
      area.found[warp] = mine;
    }
  }

  /** The best of some candidates, alike in every lane. */
  __device__ Candidate best_of(const Candidate* from, int32_t count) const {
    uint32_t value = kNobody.value;
    int32_t rank = kNobody.rank, bad = kNobody.bad;
    if (lane < count) value = from[lane].value, rank = from[lane].rank, bad = from[lane].bad;
    Candidate best = from[best_lane(value, rank, bad)];
    best.bad = bad;
    return best;
  }

  /** Warp 0 tells every block this one's candidate. */
  __device__ void tell_candidate() {
    if (warp != 0) return;
    Candidate mine = best_of(area.found, kWarps);
    mine.arrived = home ? area.arrived : 0.0f;
    if (blocks == 1 && lane == 0) area.candidates[0] = mine;
    else if (blocks > 1 && lane < blocks) push(&area.candidates[block], mine, &area.told, lane);
  }

  /** The best of all blocks' candidates, alike in every thread. */
  __device__ Candidate choose() const {
    Candidate best = best_of(area.candidates, blocks);
    best.arrived = area.candidates[blocks - 1].arrived;
    return best;
  }

  // ---- merge, insert ----

  /** Writes the state of this block's slots; `victim` is null where nobody leaves. The warp of its right neighbour puts the new token in. */
  __device__ void update(const Candidate* victim) {
    Own right{};
    int32_t right_slot = -1;
    for (int32_t t = 0, i; (i = entry_at(t)) < count; t++) {
      if (!used(i)) continue;
      const Own o = get(i);
      const int32_t slot = fresh(i) ? kept : slot_at(i);
      if (victim && o.rank == victim->rank + 1) right = o, right_slot = slot;
      if (fresh(i)) {
        if (!victim) e.score[slot] = o.score, e.birth[slot] = step, e.rank[slot] = kept;
      } else if (victim && slot == victim->slot) {
        e.score[slot] = victim->arrived, e.birth[slot] = step, e.rank[slot] = kept - 1;
      } else {
        e.score[slot] = o.score;
        if (victim && o.rank > victim->rank) e.rank[slot] = o.rank - 1;
      }
    }
    if (!victim) return;
    const uint32_t found = __ballot_sync(0xffffffffu, right_slot >= 0);
    if (!found) return;
    const int32_t from = __ffs(found) - 1;
    right.score = __shfl_sync(0xffffffffu, right.score, from), right.birth = __shfl_sync(0xffffffffu, right.birth, from);
    replace(*victim, __shfl_sync(0xffffffffu, right_slot, from), right);
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

  /** A warp merges the victim's value into its right neighbour's, which it owns, and gives the victim's rows to the new token. */
  __device__ void replace(const Candidate& victim, int32_t right, const Own& neighbour) {
    const float w_v = victim.average, w_r = weight(neighbour.score, neighbour.birth);
    const bool merges = c.merge == WKV_MERGE_RIGHT;
    T *to_key = keys + int64_t{victim.slot} * dim, *to_value = values + int64_t{victim.slot} * dim, *to_right = values + int64_t{right} * dim;
    T left[kDim / 32], mid[kDim / 32];
#pragma unroll
    for (int i = 0; i < kDim / 32; i++) {
      const int32_t d = lane + i * 32;
      if (d >= dim) break;
      left[i] = to_value[d], mid[i] = right == kept ? value[d] : to_right[d];
    }
#pragma unroll
    for (int i = 0; i < kDim / 32; i++) {
      const int32_t d = lane + i * 32;
      if (d >= dim) break;
      if (merges && w_v + w_r > 0.0f) mid[i] = from_float<T>(wkv_merged(w_v, to_float(left[i]), w_r, to_float(mid[i])));
      joined[d] = mid[i];
      if (right != kept && merges) to_right[d] = mid[i];
      to_value[d] = right == kept ? mid[i] : value[d];
      to_key[d] = key[d];
    }
    if (lane == 0) note(victim, merges, static_cast<float>(neighbour.birth - 1), w_r);
    if (!c.gapped()) return;
    __syncwarp();
    const int32_t* places = c.places_of(head);
    if (victim.rank > 0) {
      const int32_t before = __ldcg(places + victim.rank - 1);
      const float gap = warp_gap(values + int64_t{before} * dim, joined, dim);
      if (lane == 0) e.gap[before] = gap;
    }
    if (right != kept) {
      const T* far = victim.rank + 2 == kept ? value : values + int64_t{__ldcg(places + victim.rank + 2)} * dim;
      const float gap = warp_gap(joined, far, dim);
      if (lane == 0) e.gap[right] = gap;
    }
  }
};

template <typename T, int kGroup, int kDim>
__global__ void __launch_bounds__(kThreads, kGroup > 8 || kDim > 128 || sizeof(T) > 2 ? 1 : 2) attend_kernel(const __grid_constant__ AttendView a, const Faults faults) {
  extern __shared__ uint4 shared16[];
  using Block = Attend<T, kGroup, kDim>;
  __shared__ typename Block::Area area;
  Block my(a, faults, area, reinterpret_cast<uint8_t*>(shared16));
  const CacheView& c = a.cache;
  const uint64_t phase = my.begin();
  const auto places = my.find_rows();
  my.length = my.length_of((c.slots + kChunk - 1) / kChunk);
  my.begin_keys();
  wait_for_previous();
  let_next_start();

  // Nothing waits for the cache's length here: the first items are read as if it were full.
  const int2 counts = __ldcg(reinterpret_cast<const int2*>(c.counts + my.head));
  const auto rows = my.read_rows(places);
  const auto own = my.read_own(my.entry_at(0));
#pragma unroll 1
  for (int n = 0; n < Block::kStages; n++) my.bring_item();
  const int32_t forced = a.victims ? a.victims[my.unit] : -1;
  my.use_counts(counts);
  my.prepare(rows, phase);
  area.first[my.tid] = own;
  __syncthreads();

  const bool selects = my.full && c.select != WKV_SELECT_NONE && !c.later;
  if (my.blocks > 1 && my.tid == 0) {
    expect(&area.met, my.blocks * Block::kHeads * sizeof(float2));
    expect(&area.told, my.blocks * (my.my_slice() * sizeof(float2) + (selects ? sizeof(Candidate) : 0)));
  }

  my.score(own.rank);
  __syncwarp();
  if (my.blocks > 1) await_begun();
  my.tell_softmax();
  typename Block::Sums sums;
  my.sum_values(0, sums);
  const auto all = my.join_softmax();
  my.keep_sums(0, sums, all);
  for (int32_t head = 1; head * Block::kPass < kGroup; head++) {
    __syncthreads();
    my.tell_output(head - 1);
    __syncthreads();
    my.sum_values(head, sums);
    my.keep_sums(head, sums, all);
  }
  const Candidate mine = my.accumulate(all, selects, forced);
  if (selects) my.keep_candidate(mine);
  __syncthreads();
  if (selects) my.tell_candidate();
  my.tell_output((kGroup - 1) / Block::kPass);
  if (my.blocks > 1) await(&area.told);
  else __syncthreads();
  if (my.blocks > 1) my.join_output();

  if (c.later) return;
  const bool last = my.home && my.tid == 0;
  if (last) c.counts[my.head].steps = my.step;
  if (!my.full) {
    my.update(nullptr);
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
  my.update(&victim);
  // The newest leaves alone, and nothing is written.
  if (last && victim.rank == my.kept) my.note(victim, false, -1.0f, 0.0f);
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

template <typename T, int kGroup, int kDim>
void start(Context& ctx, const Cache& cache, AttendView a) {
  using C = Cut<T, kGroup, kDim>;
  const auto kernel = attend_kernel<T, kGroup, kDim>;
  const int32_t dim = cache.head_dim, units = cache.sequences * cache.kv_heads, outputs = cache.group() * dim / 2;
  Plan& plan = a.plan;
  plan.share = 1.0f / static_cast<float>(cache.group());
  plan.q_at = kWarps * C::kRegion;
  plan.phases_at = plan.q_at + kGroup * C::kHalf * 8;
  plan.rows_at = plan.phases_at + C::kHalf * 8;
  plan.outputs_at = plan.rows_at + 3 * kDim * static_cast<int32_t>(sizeof(T));
  // Blocks enough to fill the processors twice, each with 64 slots or more; clusters that all find room at once.
  const int32_t most = ctx.capability < 90 ? 1 : kMostBlocks;
  int32_t blocks = 1;
  while (blocks < most && int64_t{units} * blocks * 2 <= 2 * ctx.processors && cache.slots >= blocks * 2 * 64) blocks *= 2;
  for (;; blocks /= 2) {
    plan.blocks_log = log2_up(blocks), plan.slice_log = log2_up(divide_up(outputs, blocks));
    plan.room = (divide_up(divide_up(cache.slots, kChunk), blocks) + 1) * kChunk;
    plan.weights_at = plan.outputs_at + (blocks == 1 ? 0 : static_cast<int32_t>(round_up(size_t(blocks) << plan.slice_log << 3, 16)));
    const size_t weights = size_t(plan.room) * C::kPad * 4, limit = std::min<size_t>(ctx.shared_limit, 112 * 1024) - sizeof(typename Attend<T, kGroup, kDim>::Area);
    const bool fits = plan.weights_at + weights <= limit;
    const size_t shared = plan.weights_at + (fits ? weights : 0);
    const Shape shape{units * blocks, kThreads, shared, static_cast<uint32_t>(blocks)};
    if (blocks > 1 && shared > limit) continue;
    allow_shared(kernel, shared);
    if (blocks > 8 && clusters_at_once(kernel, shape) < units) continue;
    plan.weights = fits ? nullptr : reinterpret_cast<float*>(ctx.reserve(weights * units * blocks));
    launch(ctx, kernel, shape, a, ctx.faults());
    return;
  }
}

template <typename T, int kDim>
void by_heads(Context& ctx, const Cache& cache, const AttendView& a) {
  switch (cache.group()) {
    case 1: return start<T, 1, kDim>(ctx, cache, a);
    case 2: return start<T, 2, kDim>(ctx, cache, a);
    case 3: return start<T, 3, kDim>(ctx, cache, a);
    case 4: return start<T, 4, kDim>(ctx, cache, a);
    case 5:
    case 6: return start<T, 6, kDim>(ctx, cache, a);
    case 7:
    case 8: return start<T, 8, kDim>(ctx, cache, a);
    default: return start<T, 16, 128>(ctx, cache, a);
  }
}

template <typename T>
void by_group(Context& ctx, const Cache& cache, const AttendView& a) {
  constexpr int kWidth = 16 / sizeof(T);
  const int32_t group = cache.group();
  const bool wide = cache.head_dim % (2 * kWidth) == 0 && cache.rope->count % kWidth == 0;
  if (!wide || cache.head_dim > 128) return group <= 4 ? start<T, 4, 512>(ctx, cache, a) : start<T, 16, 512>(ctx, cache, a);
  if constexpr (sizeof(T) == 4) return group <= 4 ? start<T, 4, 128>(ctx, cache, a) : start<T, 16, 128>(ctx, cache, a);
  else if (cache.head_dim <= 64) by_heads<T, 64>(ctx, cache, a);
  else by_heads<T, 128>(ctx, cache, a);
}

}  // namespace
}  // namespace wkv

using namespace wkv;

int32_t wkv_attend(int32_t context, int32_t handle, int32_t layer, int32_t out, int32_t qkv, float scale, float softcap, int32_t victims) {
  return entry(context, [&](Context& ctx) {
    const CacheRef cache = find_cache(context, handle, layer);
    const TensorRef from = find_tensor(context, qkv, "qkv", WKV_F32, cache->sequences, (cache->heads + 2 * cache->kv_heads) * cache->head_dim);
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, cache->sequences, cache->heads * cache->head_dim);
    const TensorRef forced = find_victims(context, victims, *cache);
    check_softcap(softcap);
    ctx.hold(cache, from, to, forced);
    AttendView a{};
    a.cache = cache->view(layer);
    a.qkv = from->f32();
    a.out = to->f32();
    a.scale = scale;
    a.softcap = softcap * 1.4426950408889634f;
    a.layer = layer;
    a.victims = forced ? forced->i32() : nullptr;
    by_cache_type(cache->dtype, [&](auto type) { by_group<decltype(type)>(ctx, *cache, a); });
    if (a.cache.later) settle_step(ctx, *cache, a.cache, a.qkv + int64_t{cache->heads} * cache->head_dim, from->columns, a.cache.weights, a.victims);
    ctx.submitted();
  });
}
