/**
 * linear.cu: wkv_linear and wkv_gated, the projections of prefill and decode.
 *
 *   out[t, j] = norm(x[t]) . w[j] + bias[j] (+ out[t, j])            x [rows, C], w [J, C], out [rows, J of a wider tensor]
 *   out[t, j] = activation(norm(x[t]) . gate[j]) * (norm(x[t]) . up[j])
 *
 * Few rows go to matvec.cu, and 2 to 64 with f16 or bf16 weights to matmul_skinny.cu: one launch. In a graph, products of one row that
 * follow each other are one launch together (chain.cu). For more rows x is normed and rounded once (matmul.cu), then each weight is
 * one launch: on the tensor cores (matmul_int8.cu, matmul_half.cu) or not (matmul.cu); or it is cuBLASLt's, where that is installed
 * (cublaslt.cu). Here: the ops' checks, and the choice.
 */
#include <algorithm>

#include "chain.cuh"
#include "cublaslt.cuh"

namespace wkv {
namespace {

/** out[t, j] = activation(out[t, j]) * up[t, j]. */
__global__ void __launch_bounds__(256) activate_kernel(OutputView to, const float* up, int32_t columns) {
  wait_for_previous();
  let_next_start();
  float* g = to.out + blockIdx.y * to.stride;
  const float* u = up + int64_t{blockIdx.y} * columns;
  for (int32_t c = blockIdx.x * 256 + threadIdx.x; c < columns; c += gridDim.x * 256) g[c] = activate(to.activation, g[c], u[c]);
}

/** x, when out is x too: blocks that write must not change what others read. */
__global__ void __launch_bounds__(256) copy_kernel(float* to, const float* from, int64_t count) {
  wait_for_previous();
  let_next_start();
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < count; i += int64_t{gridDim.x} * 256) to[i] = from[i];
}

/** Where a product of many rows goes. */
enum class Way { Int8, Half, Plain };
Way way_of(const WeightView& w, bool int8) {
  if (int8) return Way::Int8;
  return (w.dtype == WKV_F16 || w.dtype == WKV_BF16) && w.columns % 32 == 0 ? Way::Half : Way::Plain;
}

/** From here on cuBLASLt is faster, and its launches are few beside the work. */
constexpr int32_t kLibraryRows = 256;

/** Scratch of project_many behind x prepared: of cuBLASLt, or rows of up's product. */
size_t product_bytes(const InputView& in, const WeightView& w, bool gated, bool int8) {
  if (way_of(w, int8) == Way::Int8) return 0;
  const size_t ups = gated ? round_up(size_t(in.rows) * w.rows * 4) : 0;
  return in.rows >= kLibraryRows && !is_quantised(w.dtype) ? std::max(ups, cublaslt_bytes(in.rows, w, gated)) : ups;
}

void activate_rows(Context& ctx, const OutputView& to, const float* ups, int32_t rows, int32_t columns) {
  launch(ctx, activate_kernel, {dim3(divide_up(columns, 256), rows), dim3(256)}, to, ups, columns);
}

/** out = in . w^T, or gated with `up` (data null: not), by kernels for many rows. */
void project_many(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, bool int8, const OutputView& to, uint8_t* scratch) {
  const Way way = way_of(w, int8);
  uint8_t* products = scratch + prepared_bytes(in);
  if (way == Way::Int8) return matmul_int8(ctx, round_rows(ctx, in, scratch), w, up, to);
  if (way == Way::Half) {
    if (in.half && in.rows >= kLibraryRows) {
      const SplitView x = split_rows(ctx, in, w.dtype == WKV_BF16, scratch);
      if (cublaslt_matmul(ctx, x.parts, 1, x.factors, in.rows, w, up, to, products)) return;
    }
    InputView both = in;
    both.half = false;
    const SplitView x = split_rows(ctx, both, w.dtype == WKV_BF16, scratch);
    if (in.rows >= kLibraryRows && cublaslt_matmul(ctx, x.parts, 2, x.factors, in.rows, w, up, to, products)) return;
    return matmul_half(ctx, x, w, up, to);
  }
  const float* x = norm_rows(ctx, in, scratch);
  if (in.rows >= kLibraryRows && w.dtype == WKV_F32 && cublaslt_matmul(ctx, x, 1, nullptr, in.rows, w, up, to, products)) return;
  matmul_f32(ctx, x, in.rows, w, to);
  if (!up.data) return;
  float* ups = reinterpret_cast<float*>(products);
  matmul_f32(ctx, x, in.rows, up, {ups, w.rows, nullptr, 0, 0});
  activate_rows(ctx, to, ups, in.rows, w.rows);
}

/** Scratch: x prepared, products, then x copied, or up's product where each weight goes its own way. */
void project(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, bool int8, const OutputView& to, bool aliased) {
  if (ctx.chain && ctx.chain->take(ctx, in, w, up, int8, to)) return;
  ctx.flush();
  if (ctx.chain && ctx.chain->take(ctx, in, w, up, int8, to)) return;  // the first of the next one
  const size_t own = prepared_bytes(in);
  if (up.data && w.dtype != up.dtype) {
    const size_t products = std::max(product_bytes(in, w, false, int8), product_bytes(in, up, false, int8));
    uint8_t* scratch = ctx.reserve(own + products + size_t(in.rows) * w.rows * 4);
    float* ups = reinterpret_cast<float*>(scratch + own + products);
    project_many(ctx, in, w, WeightView{}, int8, to, scratch);
    project_many(ctx, in, up, WeightView{}, int8, {ups, w.rows, nullptr, 0, 0}, scratch);
    activate_rows(ctx, to, ups, in.rows, w.rows);
    return;
  }
  const size_t products = product_bytes(in, w, up.data != nullptr, int8);
  uint8_t* scratch = ctx.reserve(own + products + (aliased ? own : 0));
  const Way way = way_of(w, int8);
  constexpr int32_t few_rows[] = {4, 1, 8};  // by way: where matvec.cu is the fastest
  const bool few = in.rows <= few_rows[static_cast<int>(way)], skinny = way == Way::Half && in.rows <= kSkinnyRows;
  if (few || skinny) {  // these read in as it is
    InputView from = in;
    if (aliased) {
      float* copied = reinterpret_cast<float*>(scratch + own + products);
      const int64_t count = int64_t{in.rows} * in.columns;
      launch(ctx, copy_kernel, {dim3(std::min(1024, divide_up(count, 256))), dim3(256)}, copied, in.x, count);
      from.x = copied;
    }
    if (few && matvec(ctx, from, w, up, int8, to)) return;
    if (skinny && matmul_skinny(ctx, from, w, up, to)) return;
  }
  project_many(ctx, in, w, up, int8, to, scratch);
}

TensorRef find_weight(int32_t context, int32_t handle, const char* what) {
  const TensorRef w = find_tensor(context, handle, what);
  require(w->dtype != WKV_I32, std::string(what) + " is of dtype I32");
  return w;
}

/** Checks and holds an op's input, as linear.cpp does. */
InputView find_input(Context& ctx, int32_t context, int32_t x, int32_t x_row, int32_t rows, int32_t norm, float epsilon, int32_t columns, int32_t precision, TensorRef* found) {
  require(rows >= 1 && x_row >= 0, "rows must be at least 1 and x_row at least 0: " + std::to_string(rows) + ", " + std::to_string(x_row));
  require(x_row <= INT32_MAX - rows, "x_row is too large");
  require(precision >= WKV_PRECISION_F32 && precision <= WKV_PRECISION_HALF, "precision " + std::to_string(precision) + " is unknown");
  *found = find_tensor(context, x, "x", WKV_F32, x_row + rows, columns);
  TensorRef weight;
  if (norm) weight = find_tensor(context, norm, "norm", WKV_F32, 1, columns);
  ctx.hold(*found, weight);
  return {(*found)->row(x_row), rows, columns, weight ? weight->f32() : nullptr, epsilon, precision == WKV_PRECISION_HALF};
}

}  // namespace
}  // namespace wkv

using namespace wkv;

int32_t wkv_linear(int32_t context, int32_t out, int32_t out_column, int32_t x, int32_t x_row, int32_t rows, int32_t norm, float epsilon, int32_t w, int32_t bias, int32_t add, int32_t precision) {
  return entry(context, [&](Context& ctx) {
    const TensorRef weight = find_weight(context, w, "w");
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, -1);
    require(out_column >= 0 && out_column <= to->columns - weight->rows, "out has " + std::to_string(to->columns) + " columns, expected " + std::to_string(weight->rows) + " from column " + std::to_string(out_column));
    require(add == 0 || add == 1, "add must be 0 or 1: " + std::to_string(add));
    TensorRef plus, from;
    if (bias) plus = find_tensor(context, bias, "bias", WKV_F32, 1, weight->rows);
    const InputView in = find_input(ctx, context, x, x_row, rows, norm, epsilon, weight->columns, precision, &from);
    const bool int8 = is_quantised(weight->dtype) && precision == WKV_PRECISION_INT8;
    require(to != from || norm || int8, "out must not be x unless x is normed or rounded first");
    ctx.hold(weight, to, plus);
    project(ctx, in, weight->view(), WeightView{}, int8, {to->f32() + out_column, to->columns, plus ? plus->f32() : nullptr, add, 0}, to == from);
    ctx.submitted();
  });
}

int32_t wkv_gated(int32_t context, int32_t out, int32_t x, int32_t rows, int32_t norm, float epsilon, int32_t gate, int32_t up, int32_t activation, int32_t precision) {
  return entry(context, [&](Context& ctx) {
    const TensorRef w_gate = find_weight(context, gate, "gate"), w_up = find_weight(context, up, "up");
    require(w_gate->rows == w_up->rows && w_gate->columns == w_up->columns, "gate and up are of different shapes");
    require(activation == WKV_SILU || activation == WKV_GELU_TANH, "activation " + std::to_string(activation) + " is unknown");
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, w_gate->rows);
    TensorRef from;
    const InputView in = find_input(ctx, context, x, 0, rows, norm, epsilon, w_gate->columns, precision, &from);
    const bool int8 = is_quantised(w_gate->dtype) && is_quantised(w_up->dtype) && precision == WKV_PRECISION_INT8;
    require(to != from, "out must not be x");
    ctx.hold(w_gate, w_up, to);
    project(ctx, in, w_gate->view(), w_up->view(), int8, {to->f32(), to->columns, nullptr, 0, activation}, false);
    ctx.submitted();
  });
}
