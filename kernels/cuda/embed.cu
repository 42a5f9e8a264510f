/**
 * embed.cu: the ops that touch each activation once: wkv_embed, wkv_rmsnorm, wkv_qk_norm, wkv_softcap.
 *
 *   out[i, c] = scale * table[tokens[i], c]                          out [rows, C]
 *   out[i, c] = x[i, c] / sqrt(mean_c(x[i, c]^2) + epsilon) * w[c]   x, out [rows, C], or parts of a row of queries and keys
 *   x[i, c] = cap tanh(x[i, c] / cap)                                x [rows, C]
 *
 * A block owns one row, or one normed part of it. Bytes moved: embed one row of the table and of out, the norms x twice (the second time
 * from cache) and out once, softcap x twice.
 */
#include <algorithm>
#include <cmath>

#include "common.cuh"

namespace wkv {
namespace {

__global__ void __launch_bounds__(256) embed_kernel(float* out, WeightView table, const int32_t* tokens, float scale, Faults faults) {
  wait_for_previous();
  let_next_start();
  const int32_t id = tokens[blockIdx.x];
  const bool inside = id >= 0 && id < table.rows;
  if (!inside && threadIdx.x == 0) faults.report(Fault::Token, id, table.rows);
  float* row = out + int64_t{blockIdx.x} * table.columns;
  for (int32_t c = threadIdx.x; c < table.columns; c += blockDim.x) row[c] = inside ? scale * weight_at(table, id, c) : 0.0f;
}

/** By a block; `to` may be `from`. */
__device__ void norm_part(float* to, const float* from, const float* weight, int32_t columns, float epsilon, bool add) {
  __shared__ double area[32];
  double squares = 0.0;
  for (int32_t c = threadIdx.x; c < columns; c += blockDim.x) squares += static_cast<double>(from[c]) * from[c];
  const float scale = 1.0f / sqrtf(static_cast<float>(block_sum(squares, area) / columns) + epsilon);
  for (int32_t c = threadIdx.x; c < columns; c += blockDim.x) {
    const float normed = from[c] * scale * weight[c];
    to[c] = add ? to[c] + normed : normed;
  }
}

__global__ void __launch_bounds__(256) rmsnorm_kernel(float* out, const float* x, const float* weight, int32_t columns, float epsilon, bool add) {
  wait_for_previous();
  let_next_start();
  const int64_t at = int64_t{blockIdx.x} * columns;
  norm_part(out + at, x + at, weight, columns, epsilon, add);
}

/** Parts [0, q_parts) are of queries, the others of keys. */
__global__ void __launch_bounds__(256) qk_norm_kernel(float* qkv, int32_t columns, const float* q_weight, int32_t q_columns, int32_t q_parts, const float* k_weight, int32_t k_columns, float epsilon) {
  wait_for_previous();
  let_next_start();
  const int32_t part = blockIdx.x;
  float* row = qkv + int64_t{blockIdx.y} * columns;
  if (part < q_parts) {
    float* at = row + part * q_columns;
    norm_part(at, at, q_weight, q_columns, epsilon, false);
  } else {
    float* at = row + q_parts * q_columns + (part - q_parts) * k_columns;
    norm_part(at, at, k_weight, k_columns, epsilon, false);
  }
}

__global__ void __launch_bounds__(256) softcap_kernel(float* x, int32_t columns, float cap) {
  wait_for_previous();
  let_next_start();
  float* row = x + int64_t{blockIdx.y} * columns;
  for (int32_t c = blockIdx.x * 256 + threadIdx.x; c < columns; c += gridDim.x * 256) row[c] = cap * tanhf(row[c] / cap);
}

}  // namespace
}  // namespace wkv

using namespace wkv;

int32_t wkv_embed(int32_t context, int32_t out, int32_t table, int32_t tokens, int32_t rows, float scale) {
  return entry(context, [&](Context& ctx) {
    const TensorRef from = find_tensor(context, table, "table");
    require(from->dtype != WKV_I32, "table is of dtype I32");
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, from->columns);
    const TensorRef ids = find_tensor(context, tokens, "tokens", WKV_I32, 1, -1);
    require(ids->columns >= rows, "tokens has fewer columns than rows");
    ctx.hold(from, to, ids);
    if (rows > 0) launch(ctx, embed_kernel, {rows, 256}, to->f32(), from->view(), ids->i32(), scale, ctx.faults());
    ctx.submitted();
  });
}

int32_t wkv_rmsnorm(int32_t context, int32_t out, int32_t x, int32_t rows, int32_t weight, float epsilon, int32_t add) {
  return entry(context, [&](Context& ctx) {
    require(add == 0 || add == 1, "add must be 0 or 1: " + std::to_string(add));
    const TensorRef w = find_tensor(context, weight, "weight", WKV_F32, 1, -1);
    const TensorRef from = find_tensor(context, x, "x", WKV_F32, rows, w->columns);
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, w->columns);
    ctx.hold(w, from, to);
    if (rows > 0) launch(ctx, rmsnorm_kernel, {rows, 256}, to->f32(), from->f32(), w->f32(), w->columns, epsilon, add == 1);
    ctx.submitted();
  });
}

int32_t wkv_qk_norm(int32_t context, int32_t qkv, int32_t rows, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t q_weight, int32_t k_weight, float epsilon) {
  return entry(context, [&](Context& ctx) {
    const TensorRef q = find_tensor(context, q_weight, "q_weight", WKV_F32, 1, -1), k = find_tensor(context, k_weight, "k_weight", WKV_F32, 1, -1);
    check_qk_norm(heads, kv_heads, head_dim, q->columns, k->columns);
    const TensorRef x = find_tensor(context, qkv, "qkv", WKV_F32, rows, (heads + 2 * kv_heads) * head_dim);
    ctx.hold(q, k, x);
    const int32_t q_parts = heads * head_dim / q->columns, k_parts = kv_heads * head_dim / k->columns;
    if (rows > 0) launch(ctx, qk_norm_kernel, {dim3(q_parts + k_parts, rows), 256}, x->f32(), x->columns, q->f32(), q->columns, q_parts, k->f32(), k->columns, epsilon);
    ctx.submitted();
  });
}

int32_t wkv_softcap(int32_t context, int32_t x, int32_t rows, float cap) {
  return entry(context, [&](Context& ctx) {
    const TensorRef at = find_tensor(context, x, "x", WKV_F32, rows, -1);
    require(std::isfinite(cap) && cap > 0.0f, "cap must be a number above 0");
    ctx.hold(at);
    if (rows > 0) launch(ctx, softcap_kernel, {dim3(std::min(1024, divide_up(at->columns, 256)), rows), 256}, at->f32(), at->columns, cap);
    ctx.submitted();
  });
}
