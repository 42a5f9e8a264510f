/**
 * attend.cuh: one decode step of one layer in one launch; attend_tensor.cu and attend_plain.cu read the cache for it, each in its own way.
 *
 * A KV head of a sequence, with all its query heads, belongs to a cluster of blocks (one block where there are no clusters). Chunks of 8
 * slots go round the blocks, then round a block's warps, so K and V are read once. A warp works alone: it has its own keys and then its own
 * values brought to shared memory, some items ahead; it scores all its slots, and sums its values under its own highest score. A block's
 * warps meet when q is ready, and when their outputs are.
 *
 * What blocks tell each other they push into each other's shared memory, where a barrier counts the bytes: each warp its highest scores and
 * sums as soon as it has them, and its candidate for leaving; each block its part of the output. Then every block knows the victim: it
 * updates the state of its own slots, and the warp that owns the right neighbour merges and writes the new token's rows. The last block,
 * `home`, owns the new token until it has a slot.
 *
 * What needs nothing of the kernel in front is done before it has ended: the first keys are brought, at first as if the cache were full, as
 * its length comes later. Where blocks fill the device all of their stages are 5 us of reading, behind which whatever is asked for later
 * waits, q too, and a store of the kernel in front, and so its end: so two stages of keys go first, then q, then the other keys.
 *
 * The new token takes the same way through `accumulate` as the others, and outputs are joined behind the choice of the victim, as both
 * lie on the way of the slowest warp. Reading the cache before the kernel in front has ended takes 1.3 to 2.3 us off at batch 1 (H200).
 * Asking for keys before the length is known takes 0.9 of 45 us off at 16 sequences of 2,048 tokens, 1.0 of 18 at 512 (H200).
 *
 * Scores of a block stay in shared memory or, for long caches, in scratch: 8 slots of a chunk for each query head, in units of ln 2, then
 * 2^(score - the warp's highest); behind them the ranks, which accumulate leaves there. Where blocks fill the device, scores are added up
 * while the first values are on their way (2 us of 59 at 16 sequences of 2,048 tokens, an H100); at batch 1 that would only lie before them.
 */
#pragma once
#include <algorithm>
#include <cfloat>

#include "cache.cuh"
#include "cluster.cuh"

namespace wkv {

constexpr int kAttendWarps = 8;      // of a block
constexpr int kMostBlocks = 16;     // of a cluster; more than 8 need leave
constexpr int kChunk = 8;           // slots that a warp owns together: a sector of each array of state

/** How the work is cut: chosen on the host from the sizes. */
struct AttendPlan {
  int32_t blocks_log, slice_log;     // log2 of the blocks of a cluster; of the pairs of outputs that a block joins
  int32_t q_at, rows_at, outputs_at, weights_at;  // bytes of shared memory
  int32_t room;                      // entries that a block may own
  float share;                       // 1 / G
  float* weights;                    // scratch, [units, blocks, room, kGroup + 1]; null: in shared memory
  bool fills;                        // blocks fill the device: scores are added up before values are summed, which are on their way meanwhile
  bool early;                        // the kernel in front does not write the layer, which is read before it has ended
};

struct AttendView {
  CacheView cache;
  RowHeads row;
  AttendPlan plan;
  const float* qkv;
  float* out;
  float scale;
  float softcap;                     // in units of ln 2, as scores are; 0: none
  int32_t layer;
  const int32_t* victims;
  __device__ float capped(float s) const { return softcap > 0.0f ? softcap * tanhf(s / softcap) : s; }
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

template <int kGroup, int kDots>
struct AttendArea {
  static constexpr int kWarps = kAttendWarps;
  uint64_t met, told, given;  // barriers: every warp's softmax has come; its candidate; every block's output
  alignas(16) float2 softmax[kMostBlocks][kWarps][kGroup];  // the highest score, and the sum of exponentials under it
  uint4 candidates[2][kMostBlocks][kWarps];     // the halves of each warp's
  Candidate found[kWarps];
  alignas(16) float2 part[kWarps][kGroup];
  float factor[kWarps][kGroup];  // of a warp's exponentials in all's
  Own first[kWarps * 32];        // of each thread's first entry, as it was
  float dots[kDots];      // home's: parts of the new token's scores, 32 pairs each
  float fresh[kGroup];    // home's: the new token's weights
  float arrived;          // home's: the new token's score
  int32_t newest;         // the slot of the newest cached token, if it is this block's
};

/** 2^x; what is too small for a normal float is 0. */
__device__ inline float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/** Bits in whose order floats lie as well. */
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 as 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// ---- items: each lane reads only what it asked for itself ----

/** Brings 16 bytes from global to shared memory, or zeros. */
__device__ inline void bring(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0) : "memory");
}
__device__ inline void close_item() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/** Waits until at most kCount of the newest items are on their way. */
template <int kCount>
__device__ inline void await_items() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kCount) : "memory");
}

// ---- a block's share of a step ----

/**
 * What both ways share. A Cut says how a warp reads rows:
 * - T: the cache's type; kGroup: query heads a KV head, or more (the rest are zeros); kDim: dimensions of a head, or more;
 * - kKey: neighbouring pairs that lie together in a lane's part of a key; kPass: query heads whose outputs are summed at once;
 * - kItems, kRows: items of a chunk, and keys of an item; kStages: items on their way; kWords: a lane's part of one, in 16 bytes;
 * - kQuery: bytes of shared memory for q.
 */
template <typename Cut>
struct AttendStep {
  using T = typename Cut::T;
  static constexpr int kGroup = Cut::kGroup, kDim = Cut::kDim, kHalf = kDim / 2, kPass = Cut::kPass, kWarps = kAttendWarps, kThreads = kWarps * 32;
  static constexpr int kItems = Cut::kItems, kRows = Cut::kRows, kStages = Cut::kStages, kWords = Cut::kWords;
  static constexpr int kRegion = std::max(kStages * kWords * 512, kPass * kDim * 4);  // bytes of a warp: its items, then its outputs
  using Area = AttendArea<kGroup, kGroup * kHalf / 32>;

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
  const float* const partial;        // [warp's region][kPass, kDim]
  T *const key, *const value, *const joined;  // rows: the new token's, as stored; the right neighbour's value
  float2* const outputs;             // [blocks, slice] pushed
  float* const scores;               // [chunks, kGroup, 8]
  int32_t* const ranks;              // [chunks, 8]
  // After use_counts.
  int32_t kept = 0, step = 0;
  int32_t local = 0, count = 0;      // entries of this block: its chunks', the last of which may not be full; with the new token
  int32_t fresh_warp = 0;            // home's that has the new token
  int32_t length = 0;                // this warp's items of keys, and of values
  bool full = false;

  __device__ AttendStep(const AttendView& a, const Faults& faults, Area& area, uint8_t* shared)
      : a(a), c(a.cache), faults(faults), area(area),
        tid(threadIdx.x), warp(threadIdx.x >> 5), lane(threadIdx.x & 31), dim(c.head_dim), half(dim / 2), pairs(c.rope.pairs), group(c.group()),
        blocks(1 << a.plan.blocks_log), block(blockIdx.x & (blocks - 1)), unit(blockIdx.x >> a.plan.blocks_log), home(block == blocks - 1),
        head(c.first + unit), e(c.entries(head)), keys(c.keys_of<T>(head)), values(c.values_of<T>(head)),
        items(reinterpret_cast<uint4*>(shared + warp * kRegion)), partial(reinterpret_cast<const float*>(shared)),
        key(reinterpret_cast<T*>(shared + a.plan.rows_at)), value(key + kDim), joined(value + kDim),
        outputs(reinterpret_cast<float2*>(shared + a.plan.outputs_at)),
        scores(a.plan.weights ? a.plan.weights + int64_t{blockIdx.x} * a.plan.room * (kGroup + 1) : reinterpret_cast<float*>(shared + a.plan.weights_at)),
        ranks(reinterpret_cast<int32_t*>(scores + a.plan.room * kGroup)) {}

  // Entry i of a block: chunk i / 8 of the block's, warp (i / 8) % kWarps.
  __device__ int32_t slot_at(int32_t i) const { return (((i / kChunk) << a.plan.blocks_log) + block) * kChunk + i % kChunk; }
  /** The first entry of this warp's item n. */
  __device__ int32_t item_at(int32_t n) const { return (n / kItems * kWarps + warp) * kChunk + n % kItems * kRows; }
  /** A thread's entries, for state: a warp takes 4 of its chunks at once. */
  __device__ int32_t entry_at(int32_t turn) const { return ((turn * 4 + lane / kChunk) * kWarps + warp) * kChunk + lane % kChunk; }
  /** Where a number of an entry lies in `scores`: 4 chunks that a warp reads at once lie in all banks. */
  __device__ int32_t number_at(int32_t i, int32_t number) const {
    const int32_t chunk = i / kChunk;
    return (chunk * kGroup + (number ^ chunk / kWarps % 4)) * kChunk + i % kChunk;
  }

  /** The first of the two dimensions of pair x: a rotated pair, or a pair of those that are never rotated. */
  __device__ int32_t first_of(int32_t x) const { return x < pairs ? x : 2 * pairs + (x - pairs) / Cut::kStride * 2 * Cut::kStride + (x - pairs) % Cut::kStride; }
  __device__ int32_t second_of(int32_t x) const { return first_of(x) + (x < pairs ? pairs : Cut::kStride); }

  // ---- before the scores ----

  /** What needs nothing of memory. */
  __device__ void begin() {
    if (tid == 0) {
      area.newest = -1;
      if (blocks > 1) open_barrier(&area.met), open_barrier(&area.told), open_barrier(&area.given);
    }
    __syncwarp();
    if (blocks > 1) say_begun();
  }

  /** The phase of this thread's pair. */
  __device__ uint64_t read_phase() const { return tid % kHalf < pairs ? c.rope.phases[tid % kHalf] : 0; }
  /** A lane's part of the counts. Not all lanes read the same, or the compiler would wait for it at once. */
  __device__ int32_t read_counts() const { return __ldcg(&c.counts[head].kept + lane % 2); }

  /** Chunks of a block. */
  __device__ int32_t chunks_of(int32_t b) const {
    const int32_t chunks = (kept + kChunk - 1) / kChunk;
    return chunks > b ? (chunks - b + blocks - 1) >> a.plan.blocks_log : 0;
  }
  /** This warp's items of keys where its block has so many chunks. */
  __device__ int32_t items_of(int32_t chunks) const {
    const int32_t n = chunks > warp ? (chunks - warp + kWarps - 1) / kWarps * kItems : 0;
    return (n + Cut::kAtOnce - 1) / Cut::kAtOnce * Cut::kAtOnce;
  }

  /** As if the cache were full. */
  __device__ void assume_full() { kept = c.slots, length = items_of(chunks_of(block)); }
  /** The cache's length is now known: that, and the cosine and sine of this thread's pair at the new token's place. */
  __device__ float2 use_counts(int32_t counts, uint64_t phase) {
    kept = __shfl_sync(0xffffffffu, counts, 0), step = __shfl_sync(0xffffffffu, counts, 1) + 1;
    full = kept >= c.slots;
    const int32_t mine = chunks_of(block);
    local = mine * kChunk, count = local + (home ? 1 : 0), fresh_warp = chunks_of(blocks - 1) % kWarps;
    length = items_of(mine);
    return turn_at(static_cast<uint32_t>(c.text ? step - 1 : kept), phase);
  }

  __device__ Own read_own(int32_t slot) const {
    if (slot >= c.slots) return {0.0f, 0, 0};
    return {__ldcg(e.score + slot), __ldcg(e.birth + slot), __ldcg(e.rank + slot)};
  }
  /** Reads a rank, and has the rest of the state brought nearer, which accumulate will read. */
  __device__ int32_t read_rank(int32_t i) const {
    const int32_t slot = slot_at(i);
    if (slot >= c.slots) return 0;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(e.score + slot));
    asm volatile("prefetch.global.L2 [%0];" ::"l"(e.birth + slot));
    return __ldcg(e.rank + slot);
  }

  /** Where this thread's pair of the new token's rows lies: of its first query head's, of the key and of the value. */
  struct Places {
    const float *q, *k, *v;
    int32_t apart;  // from a pair's first to its second
  };
  __device__ Places find_rows() const {
    const int32_t n = unit % c.kv_heads, b = unit / c.kv_heads, x = tid % kHalf;
    const int32_t first = c.rope.source(first_of(x)), second = c.rope.source(second_of(x));
    const float* row = a.qkv + int64_t{b} * a.row.columns(dim);
    return {row + a.row.query(n, tid / kHalf) * dim + first, row + a.row.key(n) * dim + first, row + a.row.value(n) * dim + 2 * x, second - first};
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

  /** The new token: q rotated at its rank or place and scaled, for keep_q(pair, head, numbers); k and v rounded to what will be stored;
   *  home's parts of its scores. */
  template <typename Keep>
  __device__ void prepare(const Rows& rows, float2 turn, const Keep& keep_q) {
    const int32_t x = tid % kHalf;
    const float scale = a.scale * 1.4426950408889634f;  // powers of two from here on
    float2 turned = c.text ? rotated(rows.k, turn) : rows.k;
    const T first = from_float<T>(turned.x), second = from_float<T>(turned.y);
    turned = make_float2(to_float(first), to_float(second));
    if (!c.text) turned = rotated(turned, turn);
    if (tid < half) {
      key[first_of(x)] = first, key[second_of(x)] = second;
      value[2 * x] = from_float<T>(rows.v.x), value[2 * x + 1] = from_float<T>(rows.v.y);
    }
#pragma unroll
    for (int t = 0; t < Rows::kTurns; t++) {
      const int32_t i = tid + t * kThreads;
      if (i >= kGroup * kHalf) break;
      float2 out = rotated(rows.q[t], turn);
      out.x *= scale, out.y *= scale;
      keep_q(x, i / kHalf, out);
      if (home) {
        const float sum = warp_sum(fmaf(out.x, turned.x, out.y * turned.y));
        if (lane == 0) area.dots[i / 32] = sum;
      }
    }
  }

  /** The new token's score. */
  __device__ float new_score(int32_t g) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kHalf / 32; i++) sum += area.dots[g * (kHalf / 32) + i];
    return a.capped(sum);
  }

  // ---- items ----

  __device__ uint4* item(int32_t n) const { return items + n % kStages * kWords * 32 + lane; }
  // From an item's first slot or entry to the next one's.
  __device__ int32_t slot_step(int32_t n) const { return n % kItems < kItems - 1 ? kRows : ((kWarps * kChunk) << a.plan.blocks_log) - (kItems - 1) * kRows; }
  __device__ int32_t entry_step(int32_t n) const { return n % kItems < kItems - 1 ? kRows : kWarps * kChunk - (kItems - 1) * kRows; }

  // ---- softmax ----

  /** Tells every block this warp's highest scores and sums, two heads at a time; they are in area.part. Home's last warp counts the new
   *  token in. */
  __device__ void tell_softmax() {
    constexpr int kPairs = kGroup / 2;
    const int32_t g = lane % kPairs * 2;
    float4 mine = *reinterpret_cast<const float4*>(&area.part[warp][g]);
    if (home && warp == kWarps - 1) {
      const auto meet = [&](float& highest, float& sum, float fresh) {
        const float higher = fmaxf(highest, fresh);
        sum = fmaf(sum, power(highest - higher), power(fresh - higher)), highest = higher;
      };
      meet(mine.x, mine.y, new_score(g)), meet(mine.z, mine.w, new_score(g + 1));
    }
    for (int32_t to = lane / kPairs; to < blocks; to += 32 / kPairs) {
      auto* at = reinterpret_cast<float4*>(&area.softmax[block][warp][g]);
      if (blocks == 1) *at = mine;
      else push(at, mine, &area.met, to);
    }
  }

  /** A thread's view of the softmax of all warps: what its entries' exponentials count, and the new token's weight. */
  struct Shares {
    float of[kGroup], fresh;
  };

  /** Leaves what this warp's exponentials count in area.factor; home, the new token's in area.fresh. */
  __device__ Shares join_softmax() {
    if (blocks > 1) await(&area.met);
    else __syncthreads();
    constexpr int kPairs = kGroup / 2, kApart = 32 / kPairs, kMost = kMostBlocks * kWarps / kApart < 8 ? kMostBlocks * kWarps / kApart : 8;
    const int32_t g = lane % kPairs * 2, count = blocks * kWarps;
    const float2* all = &area.softmax[0][0][0];
    float2 highest = make_float2(-FLT_MAX, -FLT_MAX), sum = make_float2(0.0f, 0.0f);
    for (int32_t first = lane / kPairs; first < count; first += kApart * kMost) {
      float4 parts[kMost];
      float2 higher = highest;
#pragma unroll
      for (int k = 0; k < kMost; k++) {
        const int32_t at = first + k * kApart;
        parts[k] = at < count ? *reinterpret_cast<const float4*>(all + at * kGroup + g) : make_float4(-FLT_MAX, 0.0f, -FLT_MAX, 0.0f);
        higher.x = fmaxf(higher.x, parts[k].x), higher.y = fmaxf(higher.y, parts[k].z);
      }
      sum.x *= power(highest.x - higher.x), sum.y *= power(highest.y - higher.y);
      highest = higher;
#pragma unroll
      for (int k = 0; k < kMost; k++) {
        sum.x = fmaf(parts[k].y, power(parts[k].x - highest.x), sum.x);
        sum.y = fmaf(parts[k].w, power(parts[k].z - highest.y), sum.y);
      }
    }
    float2 most = highest;
#pragma unroll
    for (int o = kPairs; o < 32; o *= 2) {
      most.x = fmaxf(most.x, __shfl_xor_sync(0xffffffffu, most.x, o));
      most.y = fmaxf(most.y, __shfl_xor_sync(0xffffffffu, most.y, o));
    }
    sum.x *= power(highest.x - most.x), sum.y *= power(highest.y - most.y);
#pragma unroll
    for (int o = kPairs; o < 32; o *= 2) {
      sum.x += __shfl_xor_sync(0xffffffffu, sum.x, o);
      sum.y += __shfl_xor_sync(0xffffffffu, sum.y, o);
    }
    const float2 inverse = make_float2(g < group ? __fdividef(1.0f, sum.x) : 0.0f, g + 1 < group ? __fdividef(1.0f, sum.y) : 0.0f);
    if (lane < kPairs) {
      area.factor[warp][g] = power(area.part[warp][g].x - most.x) * inverse.x;
      area.factor[warp][g + 1] = power(area.part[warp][g + 1].x - most.y) * inverse.y;
      if (home && warp == 0 && ((g < group && !is_sum(sum.x)) || (g + 1 < group && !is_sum(sum.y)))) faults.report(Fault::NanAttention, a.layer);
    }
    Shares shares;
    shares.fresh = 0.0f;
    if (home) {
      const float first = power(new_score(g) - most.x) * inverse.x, second = power(new_score(g + 1) - most.y) * inverse.y;
      if (warp == 0 && lane < kPairs) area.fresh[g] = first, area.fresh[g + 1] = second;
      shares.fresh = first + second;
#pragma unroll
      for (int o = 1; o < kPairs; o *= 2) shares.fresh += __shfl_xor_sync(0xffffffffu, shares.fresh, o);
      shares.fresh *= a.plan.share;
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kGroup; k++) shares.of[k] = area.factor[warp][k] * a.plan.share;
    return shares;
  }

  // ---- output ----

  __device__ float2* out() const {
    const int32_t b = unit / c.kv_heads, n = unit % c.kv_heads;
    return reinterpret_cast<float2*>(a.out + (int64_t{b} * a.row.kv_heads * group + a.row.query(n, 0)) * dim);
  }
  /** The outputs are joined by slices of 2^slice_log pairs, one a block. */
  __device__ int32_t my_slice() const { return max(0, min(1 << a.plan.slice_log, group * half - (block << a.plan.slice_log))); }

  /** Adds up the warps' outputs of a pass, and gives each block its slice of them. */
  __device__ void tell_output(int32_t pass) {
    for (int32_t i = tid; i < kPass * kHalf; i += kThreads) {
      const int32_t g = pass * kPass + i / kHalf, x = i % kHalf;
      if (g >= group || x >= half) continue;
      float2 sum = make_float2(0.0f, 0.0f);
      if (home) sum = make_float2(area.fresh[g] * to_float(value[2 * x]), area.fresh[g] * to_float(value[2 * x + 1]));
#pragma unroll
      for (int w = 0; w < kWarps; w++) {
        const float2 y = *reinterpret_cast<const float2*>(partial + w * (kRegion / 4) + 2 * i);
        const float factor = area.factor[w][g];
        sum.x = fmaf(factor, y.x, sum.x), sum.y = fmaf(factor, y.y, sum.y);
      }
      const int32_t at = g * half + x;
      if (blocks == 1) out()[at] = sum;
      else push(outputs + (block << a.plan.slice_log) + (at & ((1 << a.plan.slice_log) - 1)), sum, &area.given, at >> a.plan.slice_log);
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

  /** The weight of a token's value in a merge, and what an average rule minimises; of a score that accumulate has left. */
  __device__ float weight(float score, int32_t birth) const { return c.select == WKV_SELECT_LITERAL_AVERAGE ? score : wkv_average(score, step - birth + 1); }
  __device__ float rule(const Own& o, float w) const {
    __builtin_assume(c.select <= WKV_SELECT_LOWEST_SUM && !wkv_uses_gap(c.select));
    return wkv_select_value(c.select, wkv_token{o.rank, o.score, w, 0.0f, 0.0f, 0.0f});
  }

  /** A thread's entries, one after another: an entry, its slot, and where its numbers lie, `swizzle` turned. */
  struct Mine {
    int32_t i, slot;
    float* numbers;
  };
  __device__ Mine first_entry() const {
    const int32_t i = entry_at(0);
    return {i, slot_at(i), scores + i / kChunk * kGroup * kChunk + i % kChunk};
  }
  __device__ void next_entry(Mine& at) const { at.i += kThreads, at.slot += kThreads << a.plan.blocks_log, at.numbers += kThreads * kGroup; }
  __device__ int32_t swizzle() const { return lane / kChunk * kChunk; }

  /** The state of a thread's next entries behind its first, on its way. */
  struct Ahead {
    static constexpr int kCount = 4;
    Own own[kCount];
  };
  __device__ Ahead read_ahead() const {
    Ahead ahead;
    const int32_t slot = slot_at(entry_at(0)), apart = kThreads << a.plan.blocks_log;
#pragma unroll
    for (int k = 0; k < Ahead::kCount; k++) ahead.own[k] = read_own(slot + (1 + k) * apart);
    return ahead;
  }

  /** Adds each entry's weight to its score, leaves its rank in `ranks`, and finds this thread's candidate. */
  __device__ Candidate accumulate(const Shares& shares, Ahead ahead, bool selects, int32_t forced) {
    const bool by_gap = c.gapped() && forced == -1, literal = full && c.select == WKV_SELECT_LITERAL_AVERAGE;
    const int32_t turned = swizzle(), apart = kThreads << a.plan.blocks_log;
    Candidate best = kNobody;
    Mine at = first_entry();
    Own own = area.first[tid];
#pragma unroll 1
    for (; at.i < count; next_entry(at)) {
      // The new token goes the same way as the others: a way of its own would double the time of its warp.
      const bool fresh = at.i >= local;
      Own o = fresh ? Own{0.0f, step, kept} : own;
      own = ahead.own[0];
#pragma unroll
      for (int k = 1; k < Ahead::kCount; k++) ahead.own[k - 1] = ahead.own[k];
      ahead.own[Ahead::kCount - 1] = read_own(at.slot + (1 + Ahead::kCount) * apart);
      if (!fresh && at.slot >= kept) continue;
      float now = 0.0f;
#pragma unroll
      for (int g = 0; g < kGroup; g++) now = fmaf(at.numbers[g * kChunk ^ turned], shares.of[g], now);
      if (fresh) now = shares.fresh;
      if (c.later) {
        c.weights[int64_t{unit} * (c.slots + 1) + o.rank] = now;
        continue;
      }
      o.score += now;
      float w = 0.0f;
      if (selects || c.gapped()) w = wkv_average(o.score, step - o.birth + 1);
      if (literal) o.score = w;
      if (fresh) area.arrived = o.score;
      else e.score[at.slot] = o.score;
      ranks[at.i] = o.rank;
      const int32_t slot = fresh ? kept : at.slot;
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
    for (at = first_entry(); at.i < count; next_entry(at)) {
      const bool fresh = at.i >= local;
      if (!fresh && at.slot >= kept) continue;
      const Own o = fresh ? Own{area.arrived, step, kept} : Own{__ldcg(e.score + at.slot), __ldcg(e.birth + at.slot), ranks[at.i]};
      const float w = weight(o.score, o.birth);
      // The newest has no right neighbour to be merged with: it leaves only when nobody else may.
      const float value = fresh ? INFINITY : wkv_select_value(c.select, {o.rank, o.score, w, __ldcg(e.by_rank + o.rank + 1), 0.0f, e.gap[at.slot]});
      consider(best, value, o, fresh ? kept : at.slot, w, forced);
    }
    return best;
  }

  __device__ void consider(Candidate& best, float value, const Own& o, int32_t slot, float w, int32_t forced) const {
    if (forced == -1 ? !wkv_evictable(o.rank, kept + 1, c.sinks, c.recent) : o.rank != forced) return;
    if (isnan(value)) best.bad = min(best.bad, o.rank);
    const uint32_t bits = isnan(value) ? UINT_MAX : ordered(value);
    if (bits < best.value || (bits == best.value && o.rank < best.rank)) best.value = bits, best.rank = o.rank, best.slot = slot, best.average = w, best.birth = o.birth;
  }

  /** The lane that holds the best candidate of a warp; `bad` becomes the lowest. */
  __device__ int32_t best_lane(uint32_t mine, int32_t rank, int32_t& bad) const {
    const uint32_t value = __reduce_min_sync(0xffffffffu, mine);
    if (__any_sync(0xffffffffu, bad != INT_MAX)) bad = __reduce_min_sync(0xffffffffu, bad);
    const int32_t lowest = __reduce_min_sync(0xffffffffu, mine == value ? rank : INT_MAX);
    return __ffs(__ballot_sync(0xffffffffu, mine == value && rank == lowest)) - 1;
  }

  /** Tells every block this warp's candidate, each lane a half of it to one block. */
  __device__ void tell_candidate(Candidate mine) {
    __syncwarp();
    int32_t bad = mine.bad;
    if (lane == best_lane(mine.value, mine.rank, bad)) {
      mine.bad = bad;
      mine.arrived = home && warp == fresh_warp ? area.arrived : 0.0f;
      area.found[warp] = mine;
    }
    __syncwarp();
    const uint4 part = reinterpret_cast<const uint4*>(&area.found[warp])[lane % 2];
    uint4* at = &area.candidates[lane % 2][block][warp];
    if (blocks == 1 && lane < 2) *at = part;
    else if (blocks > 1 && lane / 2 < blocks) push(at, part, &area.told, lane / 2);
  }

  /** The best of all warps' candidates, alike in every thread. */
  __device__ Candidate choose() const {
    const uint4* all = &area.candidates[0][0][0];
    const auto rank_of = [](const uint4& half) { return static_cast<int32_t>(half.y); };
    uint4 mine = make_uint4(kNobody.value, kNobody.rank, 0, kNobody.bad);
    int32_t bad = kNobody.bad, at = 0;
    for (int32_t i = lane; i < blocks * kWarps; i += 32) {
      const uint4 its = all[i];
      bad = min(bad, static_cast<int32_t>(its.w));
      if (its.x < mine.x || (its.x == mine.x && rank_of(its) < rank_of(mine))) mine = its, at = i;
    }
    at = __shfl_sync(0xffffffffu, at, best_lane(mine.x, rank_of(mine), bad));
    const uint4 first = all[at], second = (&area.candidates[1][0][0])[at];
    const float arrived = __uint_as_float(area.candidates[1][blocks - 1][fresh_warp].z);
    return {first.x, rank_of(first), static_cast<int32_t>(first.z), bad, __uint_as_float(second.x), static_cast<int32_t>(second.y), arrived, 0};
  }

  // ---- merge, insert ----

  /** Writes what the victim's leaving changes in the state of this block's slots. The warp of its right neighbour puts the new token in. */
  __device__ void update(const Candidate& victim) {
    int32_t right = -1;
    T left[kDim / 32];  // the victim's value, on its way to whoever merges it
#pragma unroll
    for (int i = 0; i < kDim / 32; i++) {
      const int32_t d = lane + i * 32;
      left[i] = d < dim && victim.slot < kept ? __ldcg(values + int64_t{victim.slot} * dim + d) : from_float<T>(0.0f);
    }
    Mine at = first_entry();
    int32_t next_rank = at.i < count ? ranks[at.i] : 0;
#pragma unroll 1
    for (; at.i < count; next_entry(at)) {
      const bool fresh = at.i >= local;
      const int32_t rank = next_rank;
      if (at.i + kThreads < count) next_rank = ranks[at.i + kThreads];
      if (!fresh && at.slot >= kept) continue;
      if (rank == victim.rank + 1) right = fresh ? kept : at.slot;
      if (fresh) continue;
      if (at.slot == victim.slot) e.score[at.slot] = victim.arrived, e.birth[at.slot] = step, e.rank[at.slot] = kept - 1;
      else if (rank > victim.rank) e.rank[at.slot] = rank - 1;
    }
    const uint32_t found = __ballot_sync(0xffffffffu, right >= 0);
    if (!found) return;
    right = __shfl_sync(0xffffffffu, right, __ffs(found) - 1);
    replace(victim, left, right, right == kept ? Own{victim.arrived, step, kept} : Own{__ldcg(e.score + right), __ldcg(e.birth + right), victim.rank + 1});
  }

  /** Puts the new token behind the last one. */
  __device__ void append() {
    if (tid == 0) e.score[kept] = area.arrived, e.birth[kept] = step, e.rank[kept] = kept;
#pragma unroll 1
    for (int32_t d = tid; d < dim; d += kThreads) keys[int64_t{kept} * dim + d] = key[d], values[int64_t{kept} * dim + d] = value[d];
  }

  __device__ void note(const Candidate& victim, bool merges, float right_birth, float right_average) const {
    Counts& counts = c.counts[head];
    counts.event[0] = static_cast<float>(victim.birth - 1);
    counts.event[1] = merges ? right_birth : -1.0f;
    counts.event[2] = victim.average;
    counts.event[3] = right_average;
    atomicAdd(merges ? &counts.merged : &counts.evicted, 1);  // nothing waits for it
  }

  /** A warp merges the victim's value into its right neighbour's, which it owns, and gives the victim's rows to the new token. */
  __device__ void replace(const Candidate& victim, const T (&left)[kDim / 32], int32_t right, const Own& neighbour) {
    const float w_v = wkv_given(c.merge, victim.average), w_r = weight(neighbour.score, neighbour.birth);
    const bool merges = wkv_merges_right(c.merge);
    T *to_key = keys + int64_t{victim.slot} * dim, *to_value = values + int64_t{victim.slot} * dim, *to_right = values + int64_t{right} * dim;
    T mid[kDim / 32];
#pragma unroll
    for (int i = 0; i < kDim / 32; i++) {
      const int32_t d = lane + i * 32;
      if (d >= dim) break;
      mid[i] = right == kept ? value[d] : __ldcg(to_right + d);
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


/** One block's part of a step, for a way to read the cache. */
template <typename Way>
__global__ void __launch_bounds__(Way::kThreads, Way::kResident) attend_kernel(const __grid_constant__ AttendView a, const Faults faults) {
  extern __shared__ uint4 shared16[];
  __shared__ typename Way::Area area;
  Way my(a, faults, area, reinterpret_cast<uint8_t*>(shared16));
  const CacheView& c = a.cache;
  const auto begin_step = [&] {
    wait_for_previous();
    let_next_start();
  };
  my.begin();
  if (!a.plan.early) begin_step();
  // What is asked for first comes before the keys do.
  const int32_t counts = my.read_counts();
  const Own own = my.read_own(my.slot_at(my.entry_at(0)));
  const uint64_t phase = my.read_phase();
  my.read_turns();
  my.assume_full();
  my.begin_keys();
  const int32_t before_q = a.plan.fills ? Way::kStages / 2 : Way::kStages;
#pragma unroll 1
  for (int32_t n = 0; n < before_q; n++) my.bring_item();
  const auto places = my.find_rows();
  typename Way::Rows rows;
  if (a.plan.fills) {
    if (a.plan.early) begin_step();
    rows = my.read_rows(places);
#pragma unroll 1
    for (int32_t n = before_q; n < Way::kStages; n++) my.bring_item();
  }
  const int32_t assumed = my.length;
  const float2 turn = my.use_counts(counts, phase);
  if (my.length < assumed && my.length < Way::kStages) {  // values come sooner than a full cache's
    await_items<0>();
    my.end_keys();
#pragma unroll 1
    for (int32_t n = my.length; n < Way::kStages; n++) my.bring_item();
  }
  my.begin_scores(own.rank);
  if (!a.plan.fills) {
    if (a.plan.early) begin_step();
    rows = my.read_rows(places);
  }
  const int32_t forced = a.victims ? a.victims[my.unit] : -1;
  my.prepare(rows, turn, [&](int32_t x, int32_t g, float2 numbers) { my.keep_q(x, g, numbers); });
  area.first[my.tid] = own;
  __syncthreads();

  const bool selects = my.full && c.select != WKV_SELECT_NONE && !c.later;
  if (my.blocks > 1 && my.tid == 0) {
    expect(&area.met, my.blocks * Way::kWarps * Way::kGroup * sizeof(float2));
    if (selects) expect(&area.told, my.blocks * Way::kWarps * sizeof(Candidate));
    expect(&area.given, my.blocks * my.my_slice() * sizeof(float2));
  }

  my.score(own.rank);
  __syncwarp();
  if (my.blocks > 1) await_begun();
  my.tell_softmax();
  Candidate mine;
#pragma unroll 1
  for (int part = 0; part < 2; part++) {
    if ((part == 0) == a.plan.fills) {
      const auto ahead = my.read_ahead();
      const auto shares = my.join_softmax();
      mine = my.accumulate(shares, ahead, selects, forced);
    } else {
      my.sum_values(0);
      my.keep_sums(0);
    }
  }
  for (int32_t pass = 0;; pass++) {
    // A candidate also says that its warp has read its values for the last time: the victim's may then be written over.
    const bool ends = Way::kPass == Way::kGroup || (pass + 1) * Way::kPass >= my.group;
    if (ends && selects) my.tell_candidate(mine);
    __syncthreads();
    my.tell_output(pass);
    if (ends) break;
    __syncthreads();
    my.sum_values(pass + 1);
    my.keep_sums(pass + 1);
  }

  const bool last = my.home && my.tid == 0;
  if (!c.later) {
    if (last) c.counts[my.head].steps = my.step;
    if (selects) {
      if (my.blocks > 1) await(&area.told);
      const Candidate victim = my.choose();
      const int32_t leaves = forced != -1 ? forced : victim.rank == INT_MAX ? -1 : victim.rank;
      if (victim.bad != INT_MAX) {
        if (last) faults.report(Fault::NanScore, victim.bad);
      } else if (!wkv_evictable(leaves, my.kept + 1, c.sinks, c.recent)) {
        if (last) faults.report(Fault::Rank, leaves, my.kept + 1, c.sinks, c.recent);
      } else {
        my.update(victim);
        // The newest leaves alone, and nothing is written.
        if (last && victim.rank == my.kept) my.note(victim, false, -1.0f, 0.0f);
      }
    } else if (my.full) {
      if (last) faults.report(Fault::Full, c.slots);
    } else {
      if (my.home) my.append();
      if (last) c.counts[my.head].kept = my.kept + 1;
    }
  }
  // Before a block ends, all that others push into its memory must have come.
  if (my.blocks > 1) {
    await(&area.given);
    my.join_output();
  }
}

// ---- host ----

inline int32_t log2_up(int32_t x) {
  int32_t log = 0;
  while (1 << log < x) log++;
  return log;
}

/** Cuts the work and launches it. */
template <typename Way>
void start_attend(Context& ctx, const Cache& cache, AttendView a) {
  const auto kernel = attend_kernel<Way>;
  const int32_t dim = cache.head_dim, units = cache.sequences * cache.kv_heads, outputs = cache.group() * dim / 2;
  AttendPlan& plan = a.plan;
  plan.share = 1.0f / static_cast<float>(cache.group());
  plan.q_at = Way::kWarps * Way::kRegion;
  plan.rows_at = plan.q_at + Way::kQuery;
  plan.outputs_at = plan.rows_at + 3 * Way::kDim * static_cast<int32_t>(sizeof(typename Way::T));
  // Blocks enough to fill the processors twice, each warp with a chunk or more, or two where clusters are larger than any GPU need have;
  // clusters that all find room at once.
  const int32_t most = ctx.capability < 90 ? 1 : kMostBlocks;
  int32_t blocks = 1;
  while (blocks < most && int64_t{units} * blocks * 2 <= 2 * ctx.processors && cache.slots >= blocks * 2 * Way::kWarps * kChunk * (blocks < 8 ? 1 : 2)) blocks *= 2;
  // Two blocks share a multiprocessor: scores and ranks that leave no room for that lie in scratch, which costs less than half of the warps.
  const size_t limit = std::min<size_t>(ctx.shared_limit, 112 * 1024) - sizeof(typename Way::Area);
  size_t weights;
  const auto cut_for = [&](int32_t n) {
    plan.blocks_log = log2_up(n), plan.slice_log = log2_up(divide_up(outputs, n));
    plan.room = (divide_up(divide_up(cache.slots, kChunk), n) + 1) * kChunk;
    plan.weights_at = plan.outputs_at + (n == 1 ? 0 : static_cast<int32_t>(round_up(size_t(n) << plan.slice_log << 3, 16)));
    weights = size_t(plan.room) * (Way::kGroup + 1) * 4;
    return plan.weights_at + weights <= limit;
  };
  plan.fills = units * blocks > ctx.processors;
  if (plan.fills) {  // they fill the device: then rather more of them, some waiting for others, than scores in scratch
    for (int32_t more = blocks; more <= std::min(most, 8); more *= 2) {
      if (!cut_for(more)) continue;
      blocks = more;
      break;
    }
  }
  for (;; blocks = std::max(1, blocks / 2)) {
    const bool fits = cut_for(blocks);
    const size_t shared = plan.weights_at + (fits ? weights : 0);
    if (blocks > 1 && shared > limit) continue;
    const Shape shape{units * blocks, Way::kThreads, shared, static_cast<uint32_t>(blocks)};
    allow_shared(kernel, shared);
    if (blocks > 8 && clusters_at_once(kernel, shape) < units) continue;
    plan.weights = fits ? nullptr : reinterpret_cast<float*>(ctx.reserve(weights * units * blocks));
    plan.early = cache.untouched(ctx, a.layer);
    launch(ctx, kernel, shape, a, ctx.faults());
    return;
  }
}

/** The ways: false, and nothing launched, where the sizes do not suit the tensor cores. */
bool attend_tensor(Context& ctx, const Cache& cache, const AttendView& a);
void attend_plain(Context& ctx, const Cache& cache, const AttendView& a);

}  // namespace wkv
