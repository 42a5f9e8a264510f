/**
 * attend.cu: wkv_attend, one decode step of one layer in one launch: attend, accumulate scores, select, merge, insert.
 *
 *   s[g, i] = scale * rotate(q[g], len) . rotate(k[i], rank i)     i = 0..len, the new token being i = len
 *   p = softmax(s);  out[g] = sum_i p[g, i] v[i];  a[i] += mean_g p[g, i];  then steps 4 to 6 (settle in cache.cuh)
 *
 * qkv [B, (H + 2 N) D], out [B, H D]. A block owns one KV head of one sequence with all its query heads, so K and V are read once; its
 * weights [G, len + 1] stay in shared memory, or, for long caches, in scratch. Bytes moved: K and V of the cached tokens, 24 bytes of
 * state a slot, the rotation's tables (from the second-level cache). Sums are taken in a fixed order.
 */
#include <algorithm>
#include <type_traits>

#include "cache.cuh"

namespace wkv {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

struct AttendView {
  CacheView cache;
  const float* qkv;
  float* out;
  float scale;
  int32_t layer;
  const int32_t* victims;
  float* weights;  // [units, G, stride], null: in shared memory
  int32_t stride;
};

template <typename T>
size_t fixed_shared(int32_t group, int32_t dim) {
  return round_up(size_t(group) * dim * 4, 16) + 2 * round_up(size_t(dim) * sizeof(T), 16) + round_up(size_t(dim) * 4, 16) + size_t(kWarps) * group * 64 * 4;
}

/** kGroup: query heads a KV head, or more (then the rest are zeros). */
template <typename T, int kGroup>
__global__ void __launch_bounds__(kThreads) attend_kernel(AttendView a, Faults faults) {
  extern __shared__ int4 shared4[];
  __shared__ SettleArea area;
  __shared__ float most[kGroup], factor[kGroup];
  const CacheView& c = a.cache;
  const int32_t tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, dim = c.head_dim, group = c.group(), pairs = c.rope.pairs;
  const int32_t unit = blockIdx.x, n = unit % c.kv_heads;
  const int64_t head = c.first + unit, b = unit / c.kv_heads;
  Counts& counts = c.counts[head];
  const int32_t kept = counts.kept, step = counts.steps + 1, total = kept + 1;
  const Entries e = c.entries(head);
  const T *keys = c.keys_of<T>(head), *values = c.values_of<T>(head);

  uint8_t* at = reinterpret_cast<uint8_t*>(shared4);
  const auto take = [&](size_t bytes) {
    uint8_t* p = at;
    at += (bytes + 15) / 16 * 16;
    return p;
  };
  float* q = reinterpret_cast<float*>(take(size_t(kGroup) * dim * 4));  // [G, D], rotated
  T* key = reinterpret_cast<T*>(take(dim * sizeof(T)));                  // the new token, as stored
  T* value = reinterpret_cast<T*>(take(dim * sizeof(T)));
  float* turn = reinterpret_cast<float*>(take(size_t(dim) * 4));         // cosines, then sines, of the new token's place
  float* partial = reinterpret_cast<float*>(take(size_t(kWarps) * kGroup * 64 * 4));
  float* weights = a.weights ? a.weights + int64_t{unit} * kGroup * a.stride : reinterpret_cast<float*>(at);

  // The new token: q rotated at its rank or place, k and v rounded to what will be stored.
  for (int32_t i = tid; i < pairs; i += kThreads) {
    const float2 cs = c.rope.at(c.text ? step - 1 : kept, i);
    turn[i] = cs.x, turn[i + pairs] = cs.y;
  }
  __syncthreads();
  const float* row = a.qkv + b * (c.heads + 2 * c.kv_heads) * dim;
  const auto turned = [&](const float* from, int32_t d) {
    const float x = from[c.rope.source(d)];
    if (d >= 2 * pairs) return x;
    const int32_t i = d < pairs ? d : d - pairs;
    const float other = from[c.rope.source(d < pairs ? d + pairs : i)];
    return d < pairs ? x * turn[i] - other * turn[i + pairs] : other * turn[i + pairs] + x * turn[i];
  };
  for (int32_t i = tid; i < kGroup * dim; i += kThreads) {
    const int32_t g = i / dim;
    q[i] = g < group ? turned(row + (int64_t{n} * group + g) * dim, i % dim) : 0.0f;
  }
  const float *k = row + (int64_t{c.heads} + n) * dim, *v = k + int64_t{c.kv_heads} * dim;
  for (int32_t d = tid; d < dim; d += kThreads) {
    key[d] = from_float<T>(c.text ? turned(k, d) : k[c.rope.source(d)]);
    value[d] = from_float<T>(v[d]);
  }
  __syncthreads();

  // Scores: a warp a slot.
  const int32_t turns = c.text ? 0 : pairs;
  for (int32_t s = warp; s < total; s += kWarps) {
    const T* from = s < kept ? keys + int64_t{s} * dim : key;
    const int64_t rank = s < kept ? e.rank[s] : kept;
    float sum[kGroup] = {};
    for (int32_t i = lane; i < turns; i += 32) {
      const float x = to_float(from[i]), y = to_float(from[i + turns]);
      const float cosine = c.rope.cosines[rank * turns + i], sine = c.rope.sines[rank * turns + i];
      const float first = x * cosine - y * sine, second = x * sine + y * cosine;
#pragma unroll
      for (int g = 0; g < kGroup; g++) sum[g] = fmaf(first, q[g * dim + i], fmaf(second, q[g * dim + i + turns], sum[g]));
    }
    for (int32_t d = 2 * turns + lane; d < dim; d += 32) {
      const float x = to_float(from[d]);
#pragma unroll
      for (int g = 0; g < kGroup; g++) sum[g] = fmaf(x, q[g * dim + d], sum[g]);
    }
#pragma unroll
    for (int g = 0; g < kGroup; g++) {
      const float score = warp_sum(sum[g]) * a.scale;
      if (lane == 0) weights[int64_t{g} * a.stride + s] = score;
    }
  }
  __syncthreads();

  // Softmax.
  for (int g = 0; g < kGroup; g++) {
    float highest = -INFINITY;
    for (int32_t s = tid; s < total; s += kThreads) highest = fmaxf(highest, weights[int64_t{g} * a.stride + s]);
    highest = warp_max(highest);
    if (lane == 0) partial[g * kWarps + warp] = highest;
  }
  __syncthreads();
  if (tid < kGroup) {
    float highest = partial[tid * kWarps];
    for (int w = 1; w < kWarps; w++) highest = fmaxf(highest, partial[tid * kWarps + w]);
    most[tid] = highest;
  }
  __syncthreads();
  for (int g = 0; g < kGroup; g++) {
    float sum = 0.0f;
    for (int32_t s = tid; s < total; s += kThreads) {
      float* w = weights + int64_t{g} * a.stride + s;
      const float p = expf(*w - most[g]);
      *w = p;
      sum += p;
    }
    sum = warp_sum(sum);
    if (lane == 0) partial[g * kWarps + warp] = sum;
  }
  __syncthreads();
  if (tid < kGroup) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; w++) sum += partial[tid * kWarps + w];
    factor[tid] = 1.0f / sum;
    if (tid < group && !is_sum(sum)) faults.report(Fault::NanAttention, a.layer);
  }
  __syncthreads();

  // Output: 64 dimensions at a time, a warp a slot, two dimensions a lane.
  for (int32_t d0 = 0; d0 < dim; d0 += 64) {
    const int32_t d = d0 + 2 * lane;
    float x[kGroup] = {}, y[kGroup] = {};
    if (d < dim) {
      for (int32_t s = warp; s < total; s += kWarps) {
        const T* from = s < kept ? values + int64_t{s} * dim : value;
        const float v0 = to_float(from[d]), v1 = to_float(from[d + 1]);
#pragma unroll
        for (int g = 0; g < kGroup; g++) {
          const float p = weights[int64_t{g} * a.stride + s];
          x[g] = fmaf(p, v0, x[g]), y[g] = fmaf(p, v1, y[g]);
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kGroup; g++) {
      partial[(warp * kGroup + g) * 64 + 2 * lane] = x[g];
      partial[(warp * kGroup + g) * 64 + 2 * lane + 1] = y[g];
    }
    __syncthreads();
    for (int32_t i = tid; i < group * 64; i += kThreads) {
      const int32_t g = i / 64, to = d0 + i % 64;
      float sum = 0.0f;
      for (int w = 0; w < kWarps; w++) sum += partial[(w * kGroup + g) * 64 + i % 64];
      if (to < dim) a.out[(b * c.heads + int64_t{n} * group + g) * dim + to] = sum * factor[g];
    }
    __syncthreads();
  }

  // Scores of the policy.
  for (int32_t s = tid; s < total; s += kThreads) {
    float score = s < kept ? e.score[s] : 0.0f;
    for (int g = 0; g < group; g++) score += weights[int64_t{g} * a.stride + s] * (factor[g] / static_cast<float>(group));
    e.score[s] = score;
    if (s == kept) e.birth[s] = step, e.rank[s] = kept;
  }
  if (tid == 0) counts.steps = step;
  __syncthreads();
  settle<T>(c, head, e, kept, 1, key, value, a.victims ? a.victims[unit] : -1, faults, area);
}

template <typename T, int kGroup>
void launch(Context& ctx, const Cache& cache, AttendView a) {
  const int32_t units = cache.sequences * cache.kv_heads;
  size_t shared = fixed_shared<T>(kGroup, cache.head_dim);
  a.stride = divide_up(cache.slots + 1, 32) * 32;
  const size_t weights = size_t(kGroup) * a.stride * 4;
  a.weights = nullptr;
  if (shared + weights + 2048 <= size_t(ctx.shared_limit)) shared += weights;
  else a.weights = reinterpret_cast<float*>(ctx.reserve(weights * units));
  const auto kernel = attend_kernel<T, kGroup>;
  allow_shared(kernel, shared);
  kernel<<<units, kThreads, shared, ctx.stream>>>(a, ctx.faults());
}

template <typename T>
void by_group(Context& ctx, const Cache& cache, const AttendView& a) {
  switch (cache.group()) {
    case 1: return launch<T, 1>(ctx, cache, a);
    case 2: return launch<T, 2>(ctx, cache, a);
    case 3: return launch<T, 3>(ctx, cache, a);
    case 4: return launch<T, 4>(ctx, cache, a);
    case 5: return launch<T, 5>(ctx, cache, a);
    case 6: return launch<T, 6>(ctx, cache, a);
    case 7: return launch<T, 7>(ctx, cache, a);
    case 8: return launch<T, 8>(ctx, cache, a);
    default: return launch<T, 16>(ctx, cache, a);
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
