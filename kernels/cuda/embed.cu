/**
 * embed.cu: wkv_embed and wkv_rmsnorm, the ops at both ends of a forward pass.
 *
 *   out[i, c] = table[tokens[i], c]                                  out [rows, C]
 *   out[i, c] = x[i, c] / sqrt(mean_c(x[i, c]^2) + epsilon) * w[c]   x, out [rows, C]
 *
 * A block owns one row. Bytes moved: embed one row of the table and of out, rmsnorm x twice (the second time from cache) and out once.
 */
#include "common.cuh"

namespace wkv {
namespace {

__global__ void __launch_bounds__(256) embed_kernel(float* out, WeightView table, const int32_t* tokens, Faults faults) {
  wait_for_previous();
  let_next_start();
  const int32_t id = tokens[blockIdx.x];
  const bool inside = id >= 0 && id < table.rows;
  if (!inside && threadIdx.x == 0) faults.report(Fault::Token, id, table.rows);
  float* row = out + int64_t{blockIdx.x} * table.columns;
  for (int32_t c = threadIdx.x; c < table.columns; c += blockDim.x) row[c] = inside ? weight_at(table, id, c) : 0.0f;
}

__global__ void __launch_bounds__(256) rmsnorm_kernel(float* out, const float* x, const float* weight, int32_t columns, float epsilon) {
  __shared__ double area[32];
  wait_for_previous();
  let_next_start();
  const float* from = x + int64_t{blockIdx.x} * columns;
  float* to = out + int64_t{blockIdx.x} * columns;
  double squares = 0.0;
  for (int32_t c = threadIdx.x; c < columns; c += blockDim.x) squares += static_cast<double>(from[c]) * from[c];
  const float scale = 1.0f / sqrtf(static_cast<float>(block_sum(squares, area) / columns) + epsilon);
  for (int32_t c = threadIdx.x; c < columns; c += blockDim.x) to[c] = from[c] * scale * weight[c];
}

}  // namespace
}  // namespace wkv

using namespace wkv;

int32_t wkv_embed(int32_t context, int32_t out, int32_t table, int32_t tokens, int32_t rows) {
  return entry(context, [&](Context& ctx) {
    const TensorRef from = find_tensor(context, table, "table");
    require(from->dtype != WKV_I32, "table is of dtype I32");
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, from->columns);
    const TensorRef ids = find_tensor(context, tokens, "tokens", WKV_I32, 1, -1);
    require(ids->columns >= rows, "tokens has fewer columns than rows");
    ctx.hold(from, to, ids);
    if (rows > 0) launch(ctx, embed_kernel, {rows, 256}, to->f32(), from->view(), ids->i32(), ctx.faults());
    ctx.submitted();
  });
}

int32_t wkv_rmsnorm(int32_t context, int32_t out, int32_t x, int32_t rows, int32_t weight, float epsilon) {
  return entry(context, [&](Context& ctx) {
    const TensorRef w = find_tensor(context, weight, "weight", WKV_F32, 1, -1);
    const TensorRef from = find_tensor(context, x, "x", WKV_F32, rows, w->columns);
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, w->columns);
    ctx.hold(w, from, to);
    if (rows > 0) launch(ctx, rmsnorm_kernel, {rows, 256}, to->f32(), from->f32(), w->f32(), w->columns, epsilon);
    ctx.submitted();
  });
}
