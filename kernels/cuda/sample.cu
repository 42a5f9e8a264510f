/**
 * sample.cu: wkv_sample and wkv_log_prob, from logits [B, vocabulary] to tokens and to their probabilities.
 *
 *   tokens[b] = the highest logit (temperature 0), or a draw from those that top-k, top-p and min-p leave
 *   out[i] = logits[i, targets[i]] - max - log(sum_j exp(logits[i, j] - max))
 *
 * A block owns one row. Nothing is sorted: tokens stand in an order (higher logit first, of equals the lower token), every rule keeps
 * its first so many, and where a rule ends is found by bisecting the bits of the logit, one pass over the row a bit. Bytes moved:
 * greedy the row once; drawing 33 passes for each rule in use, from cache. Sums are doubles in a fixed order.
 */
#include <climits>
#include <cmath>

#include "../random.h"
#include "common.cuh"

namespace wkv {
namespace {

constexpr int kThreads = 1024;

/** Floats as integers of the same order; both zeros are one. */
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float unordered(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

/** The kept tokens: logits above `key`, and of those equal to it the ids up to `token`. */
struct Cut {
  uint32_t key;
  int32_t token;
  __device__ bool keeps(uint32_t k, int32_t t) const { return k > key || (k == key && t <= token); }
};

/** What a token counts for: 1, or exp(logit / temperature - most / temperature). */
struct Measure {
  bool counts;
  float temperature, most;
  __device__ float of(float logit) const { return counts ? 1.0f : expf(logit / temperature - most / temperature); }
};

struct Row {
  const float* logits;
  int32_t count;
  double* area;

  __device__ __noinline__ double total(const Cut& cut, const Measure& measure, uint32_t least) const {
    double sum = 0.0;
    for (int32_t i = threadIdx.x; i < count; i += kThreads) {
      const float x = logits[i];
      const uint32_t key = ordered(x);
      if (key >= least && cut.keeps(key, i)) sum += measure.of(x);
    }
    return block_sum(sum, area);
  }

  /** Kept tokens with exactly this logit, of those up to token `last`. */
  __device__ __noinline__ double ties(const Cut& cut, uint32_t key, int32_t last) const {
    double sum = 0.0;
    for (int32_t i = threadIdx.x; i <= last; i += kThreads) sum += ordered(logits[i]) == key && cut.keeps(key, i) ? 1.0 : 0.0;
    return block_sum(sum, area);
  }

  /** The place in the order where the running sum of `measure` over the kept tokens first reaches `goal` (passes it, when `strict`). */
  __device__ __noinline__ Cut reach(const Cut& cut, const Measure& measure, double goal, bool strict) const {
    // The highest logit from which on the sum is reached; that from the cut on it is, is given.
    uint32_t key = 0;
    for (int bit = 31; bit >= 0; bit--) {
      const uint32_t candidate = key | 1u << bit;
      const double sum = candidate <= cut.key ? INFINITY : total(cut, measure, candidate);
      if (strict ? sum > goal : sum >= goal) key = candidate;
    }
    // Of the tokens with this logit, as many as it takes.
    const double above = total(cut, measure, key + 1), each = measure.of(unordered(key)), missing = (goal - above) / each;
    const double wanted = fmin(fmax(strict ? floor(missing) + 1.0 : ceil(missing), 1.0), ties(cut, key, count - 1));
    int32_t low = 0, high = count - 1;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (ties(cut, key, middle) >= wanted) high = middle;
      else low = middle + 1;
    }
    return {key, low};
  }
};

/** The lowest token of the highest logit, in every thread; -1 after a NaN. */
__device__ int32_t argmax(const float* logits, int32_t count, const Faults& faults, float* highest) {
  __shared__ float values[kThreads / 32];
  __shared__ int32_t tokens[kThreads / 32], bads[kThreads / 32];
  float most = -INFINITY;
  int32_t best = INT_MAX, bad = INT_MAX;
  for (int32_t i = threadIdx.x; i < count; i += kThreads) {
    const float x = logits[i];
    if (isnan(x)) bad = min(bad, i);
    if (best == INT_MAX || x > most) most = x, best = i;
  }
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) {
    const float x = __shfl_xor_sync(0xffffffffu, most, o);
    const int32_t i = __shfl_xor_sync(0xffffffffu, best, o);
    if (x > most || (x == most && i < best)) most = x, best = i;
  }
  bad = __reduce_min_sync(0xffffffffu, bad);
  if ((threadIdx.x & 31) == 0) values[threadIdx.x >> 5] = most, tokens[threadIdx.x >> 5] = best, bads[threadIdx.x >> 5] = bad;
  __syncthreads();
  most = values[0], best = tokens[0], bad = bads[0];
  for (int w = 1; w < kThreads / 32; w++) {
    if (values[w] > most || (values[w] == most && tokens[w] < best)) most = values[w], best = tokens[w];
    bad = min(bad, bads[w]);
  }
  *highest = most;
  if (bad == INT_MAX) return best;
  if (threadIdx.x == 0) faults.report(Fault::NanLogit, bad);
  return -1;
}

__global__ void __launch_bounds__(kThreads) sample_kernel(int32_t* tokens, const float* logits, int32_t count, const float* settings, int32_t* rng, Faults faults) {
  __shared__ double area[32];
  const int64_t b = blockIdx.x;
  const Row row{logits + b * count, count, area};
  const float temperature = settings[b * 4], top_k = settings[b * 4 + 1], top_p = settings[b * 4 + 2], min_p = settings[b * 4 + 3];
  float most;
  int32_t token = argmax(row.logits, count, faults, &most);
  if (token < 0) return;
  if (temperature > 0.0f) {
    // Tokens of less than e^-30 of the best one's probability cannot be drawn with 24 random bits.
    const float floor = most + (min_p > 0.0f && (top_p <= 0.0f || top_p >= 1.0f) ? logf(min_p) : -30.0f * fmaxf(1.0f, temperature));
    Cut cut{ordered(floor), INT_MAX};
    const Measure one{true, 1.0f, most}, probability{false, 1.0f, most}, weight{false, temperature, most};
    if (top_k >= 1.0f && row.total(cut, one, 0) > floorf(top_k)) cut = row.reach(cut, one, floorf(top_k), false);
    if (top_p > 0.0f && top_p < 1.0f) cut = row.reach(cut, probability, top_p * row.total(cut, probability, 0), false);
    if (min_p > 0.0f) {
      const uint32_t least = ordered(most + logf(min_p));
      if (least > cut.key) cut = {least, INT_MAX};
    }
    const uint64_t seed = static_cast<uint32_t>(rng[b * 4]) | static_cast<uint64_t>(static_cast<uint32_t>(rng[b * 4 + 1])) << 32;
    const double goal = static_cast<double>(wkv_uniform(seed, static_cast<uint32_t>(rng[b * 4 + 2]))) * row.total(cut, weight, 0);
    token = row.reach(cut, weight, goal, true).token;
    if (threadIdx.x == 0) rng[b * 4 + 2] = static_cast<int32_t>(static_cast<uint32_t>(rng[b * 4 + 2]) + 1);
  }
  if (threadIdx.x == 0) tokens[b] = token;
}

__global__ void __launch_bounds__(kThreads) log_prob_kernel(float* out, const float* logits, int32_t count, const int32_t* targets, Faults faults) {
  __shared__ double area[32];
  __shared__ float highest[32];
  const int64_t b = blockIdx.x;
  const float* row = logits + b * count;
  const int32_t id = targets[b];
  if (id < 0 || id >= count) {
    if (threadIdx.x == 0) faults.report(Fault::Target, id, count);
    return;
  }
  float most = -INFINITY;
  for (int32_t i = threadIdx.x; i < count; i += kThreads) most = fmaxf(most, row[i]);
  most = block_max(most, highest);
  double sum = 0.0;
  for (int32_t i = threadIdx.x; i < count; i += kThreads) sum += expf(row[i] - most);
  sum = block_sum(sum, area);
  if (threadIdx.x == 0) out[b] = row[id] - most - static_cast<float>(log(sum));
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
    ctx.hold(from, rules, state, to);
    sample_kernel<<<from->rows, kThreads, 0, ctx.stream>>>(to->i32(), from->f32(), from->columns, rules->f32(), state->i32(), ctx.faults());
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
    log_prob_kernel<<<rows, kThreads, 0, ctx.stream>>>(to->f32(), from->f32(), from->columns, ids->i32(), ctx.faults());
    ctx.submitted();
  });
}
