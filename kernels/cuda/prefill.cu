/**
 * prefill.cu: wkv_prefill, many tokens of one sequence at once: causal attention whose columns are also summed into the scores.
 *
 *   p[t, i] = softmax_i(scale * rotate(q[t], len + t) . rotate(k[i], i)),  i <= len + t;  out[t] = sum_i p[t, i] v[i]
 *   a[i] += mean_g sum_t p[t, i]
 *
 * Four launches; no matrix of rows x length is ever in memory. Columns are counted by entry: the cached slots as they lie, then the new
 * tokens (softmax and sums do not mind the order).
 * 1. arrive: rotates q [H, rows, D], rounds k and v to what will be stored. A block owns one head of one row.
 * 2. forward: a block owns 16 rows of one query head and walks over the entries, 32 at a time, with a running maximum; it leaves out and
 *    each row's highest score and 1 / sum. Bytes moved: K and V once a 16 rows of each query head, mostly from the second-level cache.
 * 3. columns: a block owns 32 entries of one KV head, rotated once, and walks over all rows that see them. Bytes moved: K once, q once
 *    a 32 entries.
 * 4. settle: a block owns one KV head, and brings it back to its budget.
 */
#include <algorithm>

#include "cache.cuh"

namespace wkv {
namespace {

constexpr int kRows = 16, kColumns = 32;

struct PrefillView {
  CacheView cache;
  int32_t layer, sequence, rows;
  const float* qkv;
  float* out;
  float scale;
  // Scratch.
  float* q;                    // [H, rows, D], rotated, in the library's order
  uint8_t *keys, *values;      // [N, rows, D], as stored
  float *highest, *inverse;    // [H, rows]
  float* columns;              // [N, entries]
  int64_t entries;             // slots + rows
  float *score, *gap, *average;
  int32_t *birth, *rank, *freed;

  __device__ int64_t head(int32_t n) const { return cache.first + int64_t{sequence} * cache.kv_heads + n; }
  template <typename T>
  __device__ T* new_keys(int32_t n) const { return reinterpret_cast<T*>(keys) + int64_t{n} * rows * cache.head_dim; }
  template <typename T>
  __device__ T* new_values(int32_t n) const { return reinterpret_cast<T*>(values) + int64_t{n} * rows * cache.head_dim; }
};

template <typename T>
__global__ void __launch_bounds__(128) arrive_kernel(PrefillView p) {
  const CacheView& c = p.cache;
  const int32_t t = blockIdx.x, which = blockIdx.y, dim = c.head_dim, pairs = c.rope.pairs;
  const int32_t n = which < c.heads ? which / c.group() : (which - c.heads) % c.kv_heads;
  const Counts& counts = c.counts[p.head(n)];
  const int64_t place = int64_t{t} + (c.text ? counts.steps : counts.kept);
  const float* from = p.qkv + (int64_t{t} * (c.heads + 2 * c.kv_heads) + which) * dim;
  if (which >= c.heads + c.kv_heads) {
    T* to = p.new_values<T>(n) + int64_t{t} * dim;
    for (int32_t d = threadIdx.x; d < dim; d += blockDim.x) to[d] = from_float<T>(from[d]);
    return;
  }
  const bool is_key = which >= c.heads;
  T* key = p.new_keys<T>(n) + int64_t{t} * dim;
  float* q = p.q + (int64_t{which} * p.rows + t) * dim;
  for (int32_t d = threadIdx.x; d < dim; d += blockDim.x) {
    float x = from[c.rope.source(d)];
    if (d < 2 * pairs && (!is_key || c.text)) {
      const int32_t i = d < pairs ? d : d - pairs;
      const float2 cs = c.rope.at(place, i);
      const float other = from[c.rope.source(d < pairs ? d + pairs : i)];
      x = d < pairs ? x * cs.x - other * cs.y : other * cs.y + x * cs.x;
    }
    if (is_key) key[d] = from_float<T>(x);
    else q[d] = x;
  }
}

/** The entries [first, first + kColumns) of a head as floats, keys rotated; rows of `tile` are dim + 1 apart. */
template <typename T>
__device__ void load_keys(const PrefillView& p, int32_t n, int32_t kept, int32_t first, int32_t length, float* tile) {
  const CacheView& c = p.cache;
  const int32_t dim = c.head_dim, pairs = c.text ? 0 : c.rope.pairs;
  const int64_t head = p.head(n);
  const T *stored = c.keys_of<T>(head), *fresh = p.new_keys<T>(n);
  const int32_t* ranks = c.ranks + head * (c.slots + 1);
  for (int32_t i = threadIdx.x; i < kColumns * dim; i += blockDim.x) {
    const int32_t entry = first + i / dim, d = i % dim;
    float x = 0.0f;
    if (entry < length) {
      const T* row = entry < kept ? stored + int64_t{entry} * dim : fresh + int64_t{entry - kept} * dim;
      x = to_float(row[d]);
      if (d < 2 * pairs) {
        const int32_t pair = d < pairs ? d : d - pairs;
        const float2 cs = c.rope.at(entry < kept ? ranks[entry] : entry, pair);
        const float other = to_float(row[d < pairs ? d + pairs : pair]);
        x = d < pairs ? x * cs.x - other * cs.y : other * cs.y + x * cs.x;
      }
    }
    tile[i / dim * (dim + 1) + d] = x;
  }
}

template <typename T>
__device__ void load_values(const PrefillView& p, int32_t n, int32_t kept, int32_t first, int32_t length, float* tile) {
  const int32_t dim = p.cache.head_dim;
  const T *stored = p.cache.values_of<T>(p.head(n)), *fresh = p.new_values<T>(n);
  for (int32_t i = threadIdx.x; i < kColumns * dim; i += blockDim.x) {
    const int32_t entry = first + i / dim, d = i % dim;
    float x = 0.0f;
    if (entry < length) x = to_float(entry < kept ? stored[int64_t{entry} * dim + d] : fresh[int64_t{entry - kept} * dim + d]);
    tile[i / dim * (dim + 1) + d] = x;
  }
}

/** Rows [t0, t0 + kRows) of a query head; rows of `tile` are dim + 1 apart. */
__device__ inline void load_queries(const PrefillView& p, int32_t h, int32_t t0, float* tile) {
  const int32_t dim = p.cache.head_dim;
  for (int32_t i = threadIdx.x; i < kRows * dim; i += blockDim.x) {
    const int32_t t = t0 + i / dim;
    tile[i / dim * (dim + 1) + i % dim] = t < p.rows ? p.q[(int64_t{h} * p.rows + t) * dim + i % dim] : 0.0f;
  }
}

__device__ inline float dot(const float* a, const float* b, int32_t dim) {
  float sum = 0.0f;
  for (int32_t d = 0; d < dim; d++) sum = fmaf(a[d], b[d], sum);
  return sum;
}

/** 16 threads a row; thread x of them owns the dimensions x + 16 k. */
template <typename T, int kDim>
__global__ void __launch_bounds__(256) forward_kernel(PrefillView p, Faults faults) {
  extern __shared__ float shared[];
  __shared__ float weights[kRows][kColumns];
  const CacheView& c = p.cache;
  const int32_t dim = c.head_dim, h = blockIdx.y, n = h / c.group(), t0 = blockIdx.x * kRows, ty = threadIdx.x / 16, tx = threadIdx.x % 16, t = t0 + ty;
  const int32_t kept = c.counts[p.head(n)].kept;
  const int32_t length = kept + min(t0 + kRows, p.rows);  // what the last row sees
  float *q = shared, *tile = shared + kRows * (dim + 1);
  load_queries(p, h, t0, q);
  float acc[kDim / 16] = {}, most = -INFINITY, sum = 0.0f;
  for (int32_t first = 0; first < length; first += kColumns) {
    __syncthreads();
    load_keys<T>(p, n, kept, first, length, tile);
    __syncthreads();
    float s[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const int32_t column = tx + 16 * k;
      s[k] = first + column <= kept + t && first + column < length ? dot(q + ty * (dim + 1), tile + column * (dim + 1), dim) * p.scale : -INFINITY;
    }
    float highest = fmaxf(most, fmaxf(s[0], s[1]));
#pragma unroll
    for (int o = 8; o > 0; o >>= 1) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, o));
    // The first tile holds an entry that every row sees, so `highest` is finite; rows past the end are never written.
    const float shrink = expf(most - highest);
    most = highest;
    sum *= shrink;
    float add = 0.0f;
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const float w = expf(s[k] - most);
      weights[ty][tx + 16 * k] = w;
      add += w;
    }
#pragma unroll
    for (int o = 8; o > 0; o >>= 1) add += __shfl_xor_sync(0xffffffffu, add, o);
    sum += add;
    __syncthreads();
    load_values<T>(p, n, kept, first, length, tile);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDim / 16; k++) {
      const int32_t d = tx + 16 * k;
      acc[k] *= shrink;
      if (d < dim) {
        for (int i = 0; i < kColumns; i++) acc[k] = fmaf(weights[ty][i], tile[i * (dim + 1) + d], acc[k]);
      }
    }
  }
  if (t >= p.rows) return;
  if (tx == 0 && !is_sum(sum)) faults.report(Fault::NanAttention, p.layer);
#pragma unroll
  for (int k = 0; k < kDim / 16; k++) {
    const int32_t d = tx + 16 * k;
    if (d < dim) p.out[(int64_t{t} * c.heads + h) * dim + d] = acc[k] / sum;
  }
  if (tx == 0) p.highest[int64_t{h} * p.rows + t] = most, p.inverse[int64_t{h} * p.rows + t] = 1.0f / sum;
}

template <typename T>
__global__ void __launch_bounds__(256) columns_kernel(PrefillView p) {
  extern __shared__ float shared[];
  __shared__ float sums[kRows][kColumns];
  const CacheView& c = p.cache;
  const int32_t dim = c.head_dim, n = blockIdx.y, first = blockIdx.x * kColumns, ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  const int32_t kept = c.counts[p.head(n)].kept, length = kept + p.rows;
  if (first >= length) return;
  float *q = shared, *tile = shared + kRows * (dim + 1);
  load_keys<T>(p, n, kept, first, length, tile);
  float total[2] = {};
  for (int32_t g = 0; g < c.group(); g++) {
    const int32_t h = n * c.group() + g;
    for (int32_t t0 = max(0, first - kept) / kRows * kRows; t0 < p.rows; t0 += kRows) {
      __syncthreads();
      load_queries(p, h, t0, q);
      __syncthreads();
      const int32_t t = t0 + ty;
      if (t >= p.rows) continue;
      const float most = p.highest[int64_t{h} * p.rows + t], inverse = p.inverse[int64_t{h} * p.rows + t];
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const int32_t column = tx + 16 * k;
        if (first + column <= kept + t && first + column < length) total[k] += expf(dot(q + ty * (dim + 1), tile + column * (dim + 1), dim) * p.scale - most) * inverse;
      }
    }
  }
  sums[ty][tx] = total[0], sums[ty][tx + 16] = total[1];
  __syncthreads();
  if (threadIdx.x < kColumns && first + threadIdx.x < length) {
    float sum = 0.0f;
    for (int i = 0; i < kRows; i++) sum += sums[i][threadIdx.x];
    p.columns[n * p.entries + first + threadIdx.x] = sum / static_cast<float>(c.group());
  }
}

template <typename T>
__global__ void __launch_bounds__(512) settle_kernel(PrefillView p, Faults faults) {
  __shared__ SettleArea area;
  const CacheView& c = p.cache;
  const int32_t n = blockIdx.x;
  const int64_t head = p.head(n), at = n * p.entries;
  Counts& counts = c.counts[head];
  const int32_t kept = counts.kept, steps = counts.steps;
  const Entries own = c.entries(head);
  const Entries e{p.score + at, p.birth + at, p.rank + at, c.gapped() ? p.gap + at : nullptr, c.gapped() ? p.average + at : nullptr, p.freed + at};
  for (int32_t i = threadIdx.x; i < kept + p.rows; i += blockDim.x) {
    const bool cached = i < kept;
    e.score[i] = (cached ? own.score[i] : 0.0f) + p.columns[at + i];
    e.birth[i] = cached ? own.birth[i] : steps + 1 + i - kept;
    e.rank[i] = cached ? own.rank[i] : i;
    if (cached && c.gapped()) e.gap[i] = own.gap[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) counts.steps = steps + p.rows;
  __syncthreads();
  settle<T>(c, head, e, kept, p.rows, p.new_keys<T>(n), p.new_values<T>(n), -1, faults, area);
}

template <typename T, int kDim>
void launch(Context& ctx, const Cache& cache, const PrefillView& p) {
  const size_t shared = size_t(kRows + kColumns) * (cache.head_dim + 1) * 4;
  allow_shared(forward_kernel<T, kDim>, shared);
  allow_shared(columns_kernel<T>, shared);
  arrive_kernel<T><<<dim3(p.rows, cache.heads + 2 * cache.kv_heads), 128, 0, ctx.stream>>>(p);
  forward_kernel<T, kDim><<<dim3(divide_up(p.rows, kRows), cache.heads), 256, shared, ctx.stream>>>(p, ctx.faults());
  columns_kernel<T><<<dim3(divide_up(p.entries, kColumns), cache.kv_heads), 256, shared, ctx.stream>>>(p);
  settle_kernel<T><<<cache.kv_heads, 512, 0, ctx.stream>>>(p, ctx.faults());
}

}  // namespace
}  // namespace wkv

using namespace wkv;

int32_t wkv_prefill(int32_t context, int32_t handle, int32_t layer, int32_t sequence, int32_t out, int32_t qkv, int32_t rows, float scale) {
  return entry(context, [&](Context& ctx) {
    const CacheRef cache = find_cache(context, handle, layer);
    require(sequence >= 0 && sequence < cache->sequences, "sequence must be between 0 and " + std::to_string(cache->sequences - 1) + ": " + std::to_string(sequence));
    require(rows >= 1, "rows must be at least 1: " + std::to_string(rows));
    const TensorRef from = find_tensor(context, qkv, "qkv", WKV_F32, rows, (cache->heads + 2 * cache->kv_heads) * cache->head_dim);
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, cache->heads * cache->head_dim);
    ctx.hold(cache, from, to);
    PrefillView p{};
    p.cache = cache->view(layer);
    p.layer = layer;
    p.sequence = sequence;
    p.rows = rows;
    p.qkv = from->f32();
    p.out = to->f32();
    p.scale = scale;
    p.entries = int64_t{cache->slots} + rows;
    // Cut the scratch memory: once to know its size, once to have it.
    uint8_t* scratch = nullptr;
    for (int pass = 0; pass < 2; pass++) {
      size_t bytes = 0;
      const auto take = [&](int64_t count, int64_t size) {
        uint8_t* part = scratch + bytes;
        bytes += round_up(size_t(count * size));
        return part;
      };
      const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count, 4)); };
      const auto ints = [&](int64_t count) { return reinterpret_cast<int32_t*>(take(count, 4)); };
      const int64_t states = cache->kv_heads * p.entries, gaps = cache->gapped() ? states : 0;
      p.q = floats(int64_t{cache->heads} * rows * cache->head_dim);
      p.keys = take(int64_t{cache->kv_heads} * rows, cache->row_bytes());
      p.values = take(int64_t{cache->kv_heads} * rows, cache->row_bytes());
      p.highest = floats(int64_t{cache->heads} * rows);
      p.inverse = floats(int64_t{cache->heads} * rows);
      p.columns = floats(states);
      p.score = floats(states);
      p.gap = floats(gaps);
      p.average = floats(gaps);
      p.birth = ints(states);
      p.rank = ints(states);
      p.freed = ints(states);
      if (pass == 0) scratch = ctx.reserve(bytes);
    }
    by_cache_type(cache->dtype, [&](auto type) {
      using T = decltype(type);
      if (cache->head_dim <= 64) launch<T, 64>(ctx, *cache, p);
      else if (cache->head_dim <= 128) launch<T, 128>(ctx, *cache, p);
      else if (cache->head_dim <= 256) launch<T, 256>(ctx, *cache, p);
      else launch<T, 512>(ctx, *cache, p);
    });
    ctx.submitted();
  });
}
