/**
 * sample.cu: wkv_sample, wkv_log_prob and wkv_divergence, from logits [B, vocabulary] to tokens and to their probabilities.
 *
 *   tokens[b] = the highest logit (temperature 0), or a draw from those that top-k, top-p and min-p leave
 *   out[i] = logits[i, targets[i]] - max - log(sum_j exp(logits[i, j] - max))
 *   out[i] = sum_j p (log p - log q), p and q being the softmaxes of row i of logits and of others; and whether their highest are one token
 *
 * Tokens stand in an order: higher logit first, of equals the lower token. Every rule keeps the first so many, up to the place where a
 * running sum, of tokens or of their probabilities, reaches a goal; so does the draw. Nothing is sorted: a histogram over the range of
 * logits says in which bin the goal lies, finer ones follow while it holds many tokens, and its few tokens are compared with each other.
 *
 * A cluster of 8 blocks owns a row (one block before sm_90, or when the row is short), each a slice of it; they read each other's shared
 * memory. Bytes moved: the row once from L2, then from L1, three or four passes for each rule. Probabilities are summed as 64-bit
 * integers, so their sums depend on no order.
 */
#include <climits>
#include <cmath>

#include "../random.h"
#include "common.cuh"

namespace wkv {
namespace {

constexpr int kThreads = 1024;
constexpr int kBins = 1024, kBinBits = 10;  // one bin a thread
constexpr int kList = kThreads / 4;         // tokens that are compared with each other: four threads each
constexpr int kBlocks = 8;                  // of a cluster
constexpr int kShort = 4096;                // tokens that one block is enough for

// ---- the blocks of a row ----

__device__ inline int32_t row_blocks() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int32_t>(__clusterSizeInBlocks());
#else
  return 1;
#endif
}
__device__ inline int32_t row_rank() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int32_t>(__clusterRelativeBlockRank());
#else
  return 0;
#endif
}
/** Waits for all threads of the row; what they wrote to shared memory can then be seen. */
__device__ inline void row_sync() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();  // the barrier is one for warps, not for threads
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#else
  __syncthreads();
#endif
}
/** The same variable in the shared memory of another block of the row. */
template <typename T>
__device__ inline T* peer(T* mine, int32_t rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(mine, static_cast<uint32_t>(rank)));
#else
  return mine;
#endif
}

/** The tokens of one block. */
struct Slice {
  const float* logits;  // the row
  int32_t begin, end;
  bool aligned;

  __device__ Slice(const float* logits, int32_t count) : logits(logits), aligned(count % 4 == 0) {
    const int32_t per = (count / 4 + row_blocks()) / row_blocks() * 4;
    begin = min(count, row_rank() * per), end = min(count, begin + per);
  }

  /** Calls body(logit, token) for each; a thread's tokens ascend. `Batch` loads of 16 bytes are under way at once. */
  template <int Batch, typename Body>
  __device__ __forceinline__ void each(Body body) const {
    for (int32_t i = begin + 4 * threadIdx.x; i < end; i += 4 * Batch * kThreads) {
      float4 x[Batch];
#pragma unroll
      for (int j = 0; j < Batch; j++) x[j] = load(i + 4 * kThreads * j);
#pragma unroll
      for (int j = 0; j < Batch; j++) {
        const int32_t token = i + 4 * kThreads * j;
        if (token < end) body(x[j].x, token);
        if (token + 1 < end) body(x[j].y, token + 1);
        if (token + 2 < end) body(x[j].z, token + 2);
        if (token + 3 < end) body(x[j].w, token + 3);
      }
    }
  }

 private:
  __device__ __forceinline__ float4 load(int32_t i) const {
    if (aligned) return i < end ? *reinterpret_cast<const float4*>(logits + i) : float4{};
    return {at(i), at(i + 1), at(i + 2), at(i + 3)};
  }
  __device__ __forceinline__ float at(int32_t i) const { return i < end ? logits[i] : 0.0f; }
};

// ---- order ----

/** Floats as integers of the same order; both zeros are one. */
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float unordered(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

/** Where a token stands: the first has the lowest place, and no two have the same. */
__device__ inline uint64_t place_of(float logit, uint32_t token) { return static_cast<uint64_t>(~ordered(logit)) << 32 | token; }
/** The last place that this logit can have. */
__device__ inline uint64_t last_place(float logit) { return place_of(logit, UINT_MAX); }

/** What a token counts for: 1, or exp(logit / temperature - most / temperature) in units of 1 / unit. */
struct Measure {
  bool counts;
  float temperature, most, unit;
  __device__ uint64_t of(float logit) const {
    if (counts) return 1;
    const float exponent = __fsub_rn(__fdiv_rn(logit, temperature), __fdiv_rn(most, temperature));
    return __float2ull_rn(logit == most ? unit : __saturatef(expf(exponent)) * unit);
  }
};

/**
 * Some tokens that follow each other in the order, found by digits: two of the distance from the highest logit, by which tokens spread
 * evenly over the bins, then those of the place itself, which tell any two apart.
 */
struct Members {
  float most, scale;
  uint64_t first = 0, last;                                // places
  uint32_t near = 0, far = (1u << 2 * kBinBits) - 1;  // distances

  __device__ Members(float most, uint64_t last) : most(most), last(last) {
    scale = __fdiv_rn(static_cast<float>(far), __fsub_rn(most, unordered(~static_cast<uint32_t>(last >> 32))));
  }
  /** Ascends with the place; a logit that is not finite may make the product none, and such tokens come last. */
  __device__ uint32_t distance(float logit) const {
    return static_cast<uint32_t>(fminf(__fmul_rn(__fsub_rn(most, logit), scale), static_cast<float>((1u << 2 * kBinBits) - 1)));
  }
  __device__ bool has(float logit, uint64_t place) const {
    if (place < first || place > last) return false;
    const uint32_t d = distance(logit);
    return d >= near && d <= far;
  }
  __device__ static int shift(int level) { return max(0, 64 - kBinBits * (level - 1)); }
  __device__ uint32_t bin(int level, float logit, uint64_t place) const {
    const uint64_t digits = level == 0 ? distance(logit) >> kBinBits : level == 1 ? distance(logit) : place >> shift(level);
    return static_cast<uint32_t>(digits) & (kBins - 1);
  }
  /** Leaves those of one bin. */
  __device__ void narrow(int level, uint32_t bin) {
    if (level == 0) near = bin << kBinBits, far = near + kBins - 1;
    else if (level == 1) near += bin, far = near;
    else first |= static_cast<uint64_t>(bin) << shift(level), last = min(last, first | ((uint64_t{1} << shift(level)) - 1));
  }
};

// ---- sums over a row ----

/** The first of the highest logits, and the first that is not a number. */
struct Top {
  float most;
  int32_t token, bad;
  __device__ static Top none() { return {-INFINITY, INT_MAX, INT_MAX}; }
  __device__ void join(const Top& other) {
    if (other.most > most || (other.most == most && other.token < token)) most = other.most, token = other.token;
    bad = min(bad, other.bad);
  }
};

struct Total {
  uint64_t weight;
  uint32_t tokens;
};

/** What a block has in shared memory. What other blocks read is written again two row_sync() later at the earliest. */
struct Board {
  Top tops[kThreads / 32], top;
  uint64_t area[kThreads / 32];
  double sums[32], sum, parts[3];
  Total total;
  uint32_t tokens[kBins], low[kBins], high[kBins];  // the histogram of the slice: tokens, and the halves of their weights' sums
  uint64_t share;                                   // the weight in the bins that this block adds up
  struct {
    uint32_t bin, tokens;
    uint64_t before;
  } found;
  struct {
    uint64_t place, weight;
  } list[kList];  // in the first block only
  uint32_t listed;
  uint64_t chosen;
};

__device__ __noinline__ Top highest(Board& board, const Slice& slice) {
  Top top = Top::none();
  slice.each<4>([&](float x, int32_t token) {
    if (isnan(x)) top.bad = min(top.bad, token);
    if (top.token == INT_MAX || x > top.most) top.most = x, top.token = token;
  });
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) {
    Top other;
    other.most = __shfl_xor_sync(0xffffffffu, top.most, o);
    other.token = __shfl_xor_sync(0xffffffffu, top.token, o);
    other.bad = __shfl_xor_sync(0xffffffffu, top.bad, o);
    top.join(other);
  }
  if ((threadIdx.x & 31) == 0) board.tops[threadIdx.x >> 5] = top;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / 32; w++) top.join(board.tops[w]);
    board.top = top;
  }
  row_sync();
  top = Top::none();
  for (int32_t r = 0; r < row_blocks(); r++) top.join(*peer(&board.top, r));
  return top;
}

/** The sum over the block's threads up to this one; the last thread's is the whole one. */
__device__ uint64_t running_sum(Board& board, uint64_t x) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    const uint64_t before = __shfl_up_sync(0xffffffffu, x, o);
    if (lane >= o) x += before;
  }
  __syncthreads();
  if (lane == 31) board.area[warp] = x;
  __syncthreads();
  for (int w = 0; w < warp; w++) x += board.area[w];
  return x;
}

/** Weight and number of the tokens up to `last`. */
__device__ Total total(Board& board, const Slice& slice, const Measure& measure, uint64_t last) {
  uint64_t weight = 0, tokens = 0;
  slice.each<1>([&](float x, int32_t token) {
    if (place_of(x, token) <= last) weight += measure.of(x), tokens++;
  });
  weight = running_sum(board, weight);
  tokens = running_sum(board, tokens);
  if (threadIdx.x == kThreads - 1) board.total = {weight, static_cast<uint32_t>(tokens)};
  row_sync();
  Total all{0, 0};
  for (int32_t r = 0; r < row_blocks(); r++) {
    const Total part = *peer(&board.total, r);
    all.weight += part.weight, all.tokens += part.tokens;
  }
  return all;
}

/** Adds to one bin. Two 32-bit atomics, as shared memory has none of 64 bits: each carry is seen by exactly one thread. */
__device__ inline void add_to_bin(Board& board, uint32_t bin, uint64_t weight) {
  const uint32_t low = static_cast<uint32_t>(weight);
  const uint32_t carry = atomicAdd(&board.low[bin], low) > ~low ? 1 : 0, high = static_cast<uint32_t>(weight >> 32) + carry;
  if (high != 0) atomicAdd(&board.high[bin], high);
  atomicAdd(&board.tokens[bin], 1u);
}

/** Leaves of `members` the bin in which the running weight reaches `goal`. Gives their number, and adds to `before` the weight that
 *  stands before them. */
__device__ uint32_t narrow(Board& board, const Slice& slice, const Measure& measure, uint64_t goal, int level, Members* members, uint64_t* before) {
  const int32_t thread = threadIdx.x, rank = row_rank(), blocks = row_blocks();
  board.tokens[thread] = board.low[thread] = board.high[thread] = 0;
  __syncthreads();
  slice.each<1>([&](float x, int32_t token) {
    const uint64_t place = place_of(x, token);
    if (members->has(x, place)) add_to_bin(board, members->bin(level, x, place), measure.of(x));
  });
  row_sync();
  // Every block adds up its share of the bins, one a thread.
  const int32_t per = kBins / blocks, bin = rank * per + thread;
  uint64_t weight = 0;
  uint32_t tokens = 0;
  for (int32_t r = 0; r < blocks && thread < per; r++) {
    tokens += *peer(&board.tokens[bin], r);
    weight += *peer(&board.low[bin], r) + (static_cast<uint64_t>(*peer(&board.high[bin], r)) << 32);
  }
  uint64_t sum = running_sum(board, weight);
  if (thread == kThreads - 1) board.share = sum;
  row_sync();
  sum += *before;
  for (int32_t r = 0; r < rank; r++) sum += *peer(&board.share, r);
  if (sum - weight < goal && goal <= sum) {  // true for exactly one thread of the row
    for (int32_t r = 0; r < blocks; r++) *peer(&board.found, r) = {static_cast<uint32_t>(bin), tokens, sum - weight};
  }
  row_sync();
  *before = board.found.before;
  members->narrow(level, board.found.bin);
  return board.found.tokens;
}

/** The place at which the running weight of the tokens up to `last` reaches `goal`, from 1 to their whole weight. */
__device__ uint64_t reach(Board& board, const Slice& slice, const Measure& measure, uint64_t goal, float most, uint64_t last, uint32_t tokens) {
  Members members(most, last);
  uint64_t before = 0;
  for (int level = 0; tokens > kList; level++) tokens = narrow(board, slice, measure, goal, level, &members, &before);
  slice.each<1>([&](float x, int32_t token) {
    const uint64_t place = place_of(x, token);
    if (!members.has(x, place)) return;
    const uint32_t i = atomicAdd(peer(&board.listed, 0), 1u);
    *peer(&board.list[i], 0) = {place, measure.of(x)};
  });
  row_sync();
  if (row_rank() == 0) {
    // Four threads a token add up what stands before it.
    const uint32_t i = threadIdx.x / 4;
    const auto mine = board.list[i];
    uint64_t sum = 0;
    for (uint32_t j = threadIdx.x % 4; i < tokens && j < tokens; j += 4) sum += board.list[j].place <= mine.place ? board.list[j].weight : 0;
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    sum += before;
    if (i < tokens && threadIdx.x % 4 == 0 && sum - mine.weight < goal && goal <= sum) {
      for (int32_t r = 0; r < row_blocks(); r++) *peer(&board.chosen, r) = mine.place;
    }
    if (threadIdx.x == 0) board.listed = 0;
  }
  row_sync();
  return board.chosen;
}

// ---- kernels ----

__global__ void __launch_bounds__(kThreads) sample_kernel(int32_t* tokens, int32_t* mirror, const float* logits, int32_t count, const float* settings, int32_t* rng, Faults faults) {
  __shared__ Board board;
  if (threadIdx.x == 0) board.listed = 0;
  wait_for_previous();
  let_next_start();
  const int64_t b = blockIdx.x / row_blocks();
  const Slice slice(logits + b * count, count);
  const float temperature = settings[b * 4], top_k = settings[b * 4 + 1], top_p = settings[b * 4 + 2], min_p = settings[b * 4 + 3];
  rng += b * 4;
  const uint64_t seed = static_cast<uint32_t>(rng[0]) | static_cast<uint64_t>(static_cast<uint32_t>(rng[1])) << 32;
  const float uniform = wkv_uniform(seed, static_cast<uint32_t>(rng[2]));
  const bool writes = row_rank() == 0 && threadIdx.x == 0;

  const Top top = highest(board, slice);
  if (top.bad != INT_MAX || !(temperature > 0.0f)) {
    if (writes && top.bad != INT_MAX) faults.report(Fault::NanLogit, top.bad);
    else if (writes) tokens[b] = mirror[b] = top.token;
    row_sync();  // no block may end while another reads its memory
    return;
  }

  const float most = top.most;
  const uint64_t best = place_of(most, top.token);
  // Tokens of less than e^-30 of the best one's probability cannot be drawn with 24 random bits.
  const bool cuts = top_p > 0.0f && top_p < 1.0f;
  const float least = most + (min_p > 0.0f && !cuts ? logf(min_p) : -30.0f * fmaxf(1.0f, temperature));
  uint64_t last = max(best, last_place(least));
  const float unit = exp2f(static_cast<float>(__clz(count) + 30));  // `count` times it is below 2^62
#pragma unroll 1
  for (int rule = 0; rule < 3; rule++) {  // top-k; top-p; min-p and the draw
    if ((rule == 0 && !(top_k >= 1.0f)) || (rule == 1 && !cuts)) continue;
    if (rule == 2 && min_p > 0.0f) last = max(best, min(last, last_place(most + logf(min_p))));
    const Measure measure{rule == 0, rule == 2 ? temperature : 1.0f, most, unit};
    const Total all = total(board, slice, measure, last);
    const double weight = static_cast<double>(all.weight), share = rule == 1 ? top_p : uniform;
    const double goal = rule == 0 ? floorf(top_k) : rule == 1 ? ceil(share * weight) : floor(share * weight) + 1.0;
    last = reach(board, slice, measure, min(static_cast<uint64_t>(fmax(goal, 1.0)), all.weight), most, last, all.tokens);
  }
  if (!writes) return;
  tokens[b] = mirror[b] = static_cast<int32_t>(last);
  rng[2] = static_cast<int32_t>(static_cast<uint32_t>(rng[2]) + 1);
}

__global__ void __launch_bounds__(kThreads) log_prob_kernel(float* out, const float* logits, int32_t count, const int32_t* targets, Faults faults) {
  __shared__ Board board;
  wait_for_previous();
  let_next_start();
  const int64_t b = blockIdx.x / row_blocks();
  const Slice slice(logits + b * count, count);
  const bool writes = row_rank() == 0 && threadIdx.x == 0;
  const int32_t id = targets[b];
  if (id < 0 || id >= count) {
    if (writes) faults.report(Fault::Target, id, count);
    return;
  }
  const float most = highest(board, slice).most;
  double sum = 0.0;
  slice.each<1>([&](float x, int32_t) { sum += expf(x - most); });
  sum = block_sum(sum, board.sums);
  if (threadIdx.x == 0) board.sum = sum;
  row_sync();
  if (writes) {
    sum = 0.0;
    for (int32_t r = 0; r < row_blocks(); r++) sum += *peer(&board.sum, r);
    out[b] = slice.logits[id] - most - static_cast<float>(log(sum));
  }
  row_sync();  // no block may end while another reads its memory
}

__global__ void __launch_bounds__(kThreads) divergence_kernel(float* out, const float* logits, const float* others, int32_t count, Faults faults) {
  __shared__ Board board;
  wait_for_previous();
  let_next_start();
  const int64_t b = blockIdx.x / row_blocks();
  const Slice slice(logits + b * count, count);
  const float* other = others + b * count;
  const bool writes = row_rank() == 0 && threadIdx.x == 0;
  const Top top = highest(board, slice);
  row_sync();
  const Top other_top = highest(board, Slice(other, count));
  const int32_t bad = min(top.bad, other_top.bad);
  if (bad != INT_MAX) {
    if (writes) faults.report(Fault::NanLogit, bad);
    row_sync();
    return;
  }
  double p = 0.0, q = 0.0, apart = 0.0;
  slice.each<1>([&](float x, int32_t token) {
    const float below = x - top.most, other_below = other[token] - other_top.most, share = expf(below);
    p += share, q += expf(other_below);
    // What has no probability adds nothing, however far below the highest its logits are.
    if (share > 0.0f) apart += static_cast<double>(share) * (static_cast<double>(below) - static_cast<double>(other_below));
  });
  p = block_sum(p, board.sums), q = block_sum(q, board.sums), apart = block_sum(apart, board.sums);
  if (threadIdx.x == 0) board.parts[0] = p, board.parts[1] = q, board.parts[2] = apart;
  row_sync();
  if (writes) {
    p = q = apart = 0.0;
    for (int32_t r = 0; r < row_blocks(); r++) {
      const double* parts = peer(&board.parts[0], r);
      p += parts[0], q += parts[1], apart += parts[2];
    }
    out[2 * b] = static_cast<float>(fmax(0.0, apart / p - log(p) + log(q)));
    out[2 * b + 1] = top.token == other_top.token ? 1.0f : 0.0f;
  }
  row_sync();  // no block may end while another reads its memory
}

/** A cluster for each row. */
Shape shape_of(const Context& ctx, int32_t rows, int32_t count) {
  const uint32_t blocks = ctx.capability >= 90 && count > kShort ? kBlocks : 1;
  return {dim3(static_cast<uint32_t>(rows) * blocks), dim3(kThreads), 0, blocks};
}

}  // namespace
}  // namespace wkv

using namespace wkv;

int32_t wkv_sample(int32_t context, int32_t tokens, int32_t logits, int32_t settings, int32_t rng) {
  return entry(context, [&](Context& ctx) {
    const TensorRef from = find_tensor(context, logits, "logits", WKV_F32, 1, -1);
    const TensorRef rules = find_tensor(context, settings, "settings", WKV_F32, from->rows, 4);
    const TensorRef state = find_tensor(context, rng, "rng", WKV_I32, from->rows, 4);
    const TensorRef to = find_tensor(context, tokens, "tokens", WKV_I32, 1, -1);
    require(to->columns >= from->rows, "tokens has fewer columns than logits has rows");
    if (!to->mirror) {
      const size_t bytes = to->memory->bytes();
      const auto mirror = std::make_shared<HostMemory>(bytes);
      ctx.copy(mirror->as<void>(), to->i32(), bytes);
      to->mirror = mirror;
    }
    ctx.hold(from, rules, state, to);
    launch(ctx, sample_kernel, shape_of(ctx, from->rows, from->columns), to->i32(), to->mirror->as<int32_t>(), from->f32(), from->columns, rules->f32(), state->i32(), ctx.faults());
    ctx.submitted();
  });
}

int32_t wkv_log_prob(int32_t context, int32_t out, int32_t logits, int32_t targets, int32_t rows) {
  return entry(context, [&](Context& ctx) {
    const TensorRef from = find_tensor(context, logits, "logits", WKV_F32, rows, -1);
    const TensorRef ids = find_tensor(context, targets, "targets", WKV_I32, 1, -1);
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, 1, -1);
    require(rows >= 1 && ids->columns >= rows && to->columns >= rows, "targets and out must have at least `rows` columns, and rows be at least 1");
    ctx.hold(from, ids, to);
    launch(ctx, log_prob_kernel, shape_of(ctx, rows, from->columns), to->f32(), from->f32(), from->columns, ids->i32(), ctx.faults());
    ctx.submitted();
  });
}

int32_t wkv_divergence(int32_t context, int32_t out, int32_t logits, int32_t others, int32_t rows) {
  return entry(context, [&](Context& ctx) {
    const TensorRef from = find_tensor(context, logits, "logits", WKV_F32, rows, -1);
    const TensorRef with = find_tensor(context, others, "others", WKV_F32, rows, from->columns);
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, 2);
    require(rows >= 1, "rows must be at least 1");
    ctx.hold(from, with, to);
    launch(ctx, divergence_kernel, shape_of(ctx, rows, from->columns), to->f32(), from->f32(), with->f32(), from->columns, ctx.faults());
    ctx.submitted();
  });
}
