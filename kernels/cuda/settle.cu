/**
 * settle.cu: steps 3 to 6 of a decode step with given weights: wkv_insert, and the second launch of policies that choose by more than
 * wkv_attend's one launch knows.
 *
 *   a[i] += weights[rank[i]];  then one settle a head (settle.cuh)         weights [B, N (M + 1)] in rank order
 *
 * A block owns one KV head of one sequence and keeps its state in shared memory where it fits: the steps to a choice are many and short, so
 * what they wait for is memory. Bytes moved: the head's state (12 bytes a slot and its words, read and written), its weights, three rows; all
 * keys or values, one to three times, for rules that measure rows.
 */
#include "settle.cuh"

namespace wkv {
namespace {

constexpr int32_t kArrays = 6;  // of state and scratch that may lie in shared memory

template <typename T>
__global__ void __launch_bounds__(512) settle_kernel(CacheView c, NewRows rows, const float* weights, const int32_t* victims, int32_t near, Faults faults) {
  extern __shared__ float shared[];  // near: [kArrays, slots + 1]
  __shared__ SettleArea area;
  __shared__ alignas(16) T key[512], value[512];
  wait_for_previous();
  let_next_start();
  const int32_t unit = blockIdx.x, n = unit % c.kv_heads, dim = c.head_dim;
  const int64_t head = c.first + unit, b = unit / c.kv_heads;
  Counts& counts = c.counts[head];
  const int32_t kept = counts.kept, step = counts.steps + 1;
  const Entries own = c.entries(head);
  Entries e = own;
  const int64_t stride = c.slots + 1;
  if (near) {
    e.score = shared, e.birth = reinterpret_cast<int32_t*>(shared + stride), e.rank = reinterpret_cast<int32_t*>(shared + 2 * stride);
    e.by_rank = shared + 3 * stride, e.measure = shared + 4 * stride, e.now = own.now ? shared + 5 * stride : nullptr;
  }
  const float *k = rows.keys + b * rows.row + int64_t{n} * dim, *v = k + rows.value;
  for (int32_t i = threadIdx.x; i < dim; i += blockDim.x) {
    float x = k[c.rope.source(i)];
    if (c.text && i < 2 * c.rope.pairs) {
      const int32_t pair = i % c.rope.pairs;
      const float2 both = make_float2(k[c.rope.source(pair)], k[c.rope.source(pair + c.rope.pairs)]);
      const float2 turned = rotated(both, turn_at(static_cast<uint32_t>(step - 1), c.rope.phases[pair]));
      x = i < c.rope.pairs ? turned.x : turned.y;
    }
    key[i] = from_float<T>(x);
    value[i] = from_float<T>(v[i]);
  }
  const float *given = weights + unit * stride, *of_layer = weights + b * c.kv_heads * stride;
  for (int32_t i = threadIdx.x; i <= kept; i += blockDim.x) {
    const bool cached = i < kept;
    const int32_t rank = cached ? own.rank[i] : kept;
    e.score[i] = (cached ? own.score[i] : 0.0f) + given[rank];
    e.birth[i] = cached ? own.birth[i] : step;
    e.rank[i] = rank;
    for (int32_t w = 0; w < c.width && !cached; w++) e.words[w * e.stride + i] = 0;
    if (!c.later) continue;
    float now = given[rank];
    if (c.select == WKV_SELECT_LOWEST_NOW) {
      now = 0.0f;
      for (int32_t h = 0; h < c.kv_heads; h++) now += of_layer[h * stride + rank];
      now /= static_cast<float>(c.kv_heads);
    }
    e.now[i] = now;
  }
  __syncthreads();
  if (threadIdx.x == 0) counts.steps = step;
  __syncthreads();
  settle<T>(c, head, e, kept, 1, key, value, victims ? victims[unit] : -1, faults, area);
}

}  // namespace

void settle_step(Context& ctx, const Cache& cache, const CacheView& view, const NewRows& rows, const float* weights, const int32_t* victims) {
  const size_t shared = size_t(kArrays) * (cache.slots + 1) * 4;
  const bool near = shared + 32 * 1024 <= static_cast<size_t>(ctx.shared_limit);
  by_cache_type(cache.dtype, [&](auto type) {
    launch(ctx, settle_kernel<decltype(type)>, {cache.sequences * cache.kv_heads, 512, near ? shared : 0}, view, rows, weights, victims, near, ctx.faults());
  });
}

}  // namespace wkv

using namespace wkv;

int32_t wkv_insert(int32_t context, int32_t handle, int32_t layer, int32_t kv, int32_t weights, int32_t victims) {
  return entry(context, [&](Context& ctx) {
    const CacheRef cache = find_cache(context, handle, layer);
    const int32_t n_heads = cache->kv_heads;
    const TensorRef rows = find_tensor(context, kv, "kv", WKV_F32, cache->sequences, 2 * n_heads * cache->head_dim);
    const TensorRef given = find_tensor(context, weights, "weights", WKV_F32, cache->sequences, n_heads * (cache->slots + 1));
    const TensorRef forced = find_victims(context, victims, *cache);
    ctx.hold(cache, rows, given, forced);
    settle_step(ctx, *cache, cache->view(layer), {rows->f32(), rows->columns, int64_t{n_heads} * cache->head_dim}, given->f32(), forced ? forced->i32() : nullptr);
    cache->touch(ctx, layer);
    ctx.submitted();
  });
}
