/**
 * linear.cpp: wkv_linear and wkv_gated, the projections of prefill and decode: out = norm(x) W^T.
 *
 * Weights stay in their blocks. With int8 precision the input is rounded once a row (8 bits, a scale per block of 32) and products
 * are integers; with f32 the blocks are widened in registers. A thread owns whole groups of 8 output columns, for all input rows,
 * so weights are read once and no result depends on the number of threads. Bytes moved: W once, x once a group from cache.
 */
#include "common.hpp"

namespace wkv {
namespace {

/** An op's input rows after norm and rounding, in the context's scratch. */
struct Input {
  TensorRef x, norm;
  int32_t x_row, rows, precision;
  float epsilon;

  Input(Context& ctx, int32_t context, int32_t x_handle, int32_t x_row, int32_t rows, int32_t norm_handle, float epsilon, int32_t columns, bool quantised, int32_t precision)
      : x_row(x_row), rows(rows), precision(quantised ? precision : static_cast<int32_t>(WKV_PRECISION_F32)), epsilon(epsilon) {
    require(rows >= 1 && x_row >= 0, "rows must be at least 1 and x_row at least 0: " + std::to_string(rows) + ", " + std::to_string(x_row));
    require(x_row <= INT32_MAX - rows, "x_row is too large");
    require(precision >= WKV_PRECISION_F32 && precision <= WKV_PRECISION_HALF, "precision " + std::to_string(precision) + " is unknown");
    x = find_tensor(context, x_handle, "x", WKV_F32, x_row + rows, columns);
    if (norm_handle) norm = find_tensor(context, norm_handle, "norm", WKV_F32, 1, columns);
    const size_t count = static_cast<size_t>(rows) * columns;
    if (norm) ctx.normed.reserve(count);
    if (this->precision == WKV_PRECISION_INT8) {
      ctx.rounded.reserve(count);
      ctx.rounding.reserve(count / 32 * 2);
    }
  }

  void prepare(Context& ctx) const {
    const int32_t columns = x->columns;
    ctx.threads.loop(rows, 8, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; t++) {
        const float* row = x->row(x_row + t);
        if (norm) {
          float* out = ctx.normed.data() + t * columns;
          ctx.loops->rmsnorm(row, norm->f32(), columns, epsilon, out);
          row = out;
        }
        if (precision == WKV_PRECISION_INT8) ctx.loops->round_row(row, columns, ctx.rounded.data() + t * columns, scales(ctx) + t * (columns / 32), sums(ctx) + t * (columns / 32));
      }
    });
  }

  /** tile[t][8] for input rows [t, t + count). */
  void group(const Context& ctx, const Tensor& w, int64_t group, int32_t t, int32_t count, float* tile) const {
    const int64_t columns = x->columns;
    if (precision == WKV_PRECISION_INT8) {
      ctx.loops->group_int8(w.dtype, w.memory.data(), w.columns, group, ctx.rounded.data() + t * columns, scales(ctx) + t * (columns / 32), sums(ctx) + t * (columns / 32), count, tile);
    } else {
      const float* from = norm ? ctx.normed.data() + t * columns : x->row(x_row + t);
      ctx.loops->group_f32(w.dtype, w.memory.data(), w.columns, w.rows, group, from, count, tile);
    }
  }

 private:
  float* scales(const Context& ctx) const { return const_cast<float*>(ctx.rounding.data()); }
  float* sums(const Context& ctx) const { return scales(ctx) + static_cast<int64_t>(rows) * (x->columns / 32); }
};

constexpr int32_t kTile = 64;  // input rows a tile: 2 KB of sums stay in the first-level cache

bool is_quantised(int32_t dtype) { return dtype >= WKV_Q8_0; }

TensorRef find_weight(int32_t context, int32_t handle, const char* what) {
  const TensorRef w = find_tensor(context, handle, what);
  require(w->dtype != WKV_I32, std::string(what) + " is of dtype I32");
  return w;
}

int64_t grain(const Context& ctx, int64_t groups) {
  const int64_t pieces = int64_t{ctx.threads.count()} * 4;
  return (groups + pieces - 1) / pieces;
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
    TensorRef plus;
    if (bias) plus = find_tensor(context, bias, "bias", WKV_F32, 1, weight->rows);
    const Input input(ctx, context, x, x_row, rows, norm, epsilon, weight->columns, is_quantised(weight->dtype), precision);
    require(to != input.x || input.norm || input.precision == WKV_PRECISION_INT8, "out must not be x unless x is normed or rounded first");
    ctx.submit([=, &ctx] {
      input.prepare(ctx);
      const int64_t groups = (weight->rows + 7) / 8;
      ctx.threads.loop(groups, grain(ctx, groups), [&](int64_t begin, int64_t end, int) {
        float tile[kTile * 8];
        for (int32_t t0 = 0; t0 < rows; t0 += kTile) {
          const int32_t count = rows - t0 < kTile ? rows - t0 : kTile;
          for (int64_t g = begin; g < end; g++) {
            input.group(ctx, *weight, g, t0, count, tile);
            const int32_t lanes = weight->rows - g * 8 < 8 ? static_cast<int32_t>(weight->rows - g * 8) : 8;
            for (int32_t t = 0; t < count; t++) {
              float* row = to->row(t0 + t) + out_column + g * 8;
              for (int32_t j = 0; j < lanes; j++) {
                const float value = tile[t * 8 + j] + (plus ? plus->f32()[g * 8 + j] : 0.0f);
                row[j] = add ? row[j] + value : value;
              }
            }
          }
        }
      });
    });
  });
}

int32_t wkv_gated(int32_t context, int32_t out, int32_t x, int32_t rows, int32_t norm, float epsilon, int32_t gate, int32_t up, int32_t activation, int32_t precision) {
  return entry(context, [&](Context& ctx) {
    const TensorRef w_gate = find_weight(context, gate, "gate"), w_up = find_weight(context, up, "up");
    require(w_gate->rows == w_up->rows && w_gate->columns == w_up->columns, "gate and up are of different shapes");
    require(activation == WKV_SILU || activation == WKV_GELU_TANH, "activation " + std::to_string(activation) + " is unknown");
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, w_gate->rows);
    const bool both = is_quantised(w_gate->dtype) && is_quantised(w_up->dtype);
    const Input input(ctx, context, x, 0, rows, norm, epsilon, w_gate->columns, both, precision);
    require(to != input.x, "out must not be x");
    ctx.submit([=, &ctx] {
      input.prepare(ctx);
      const int64_t groups = (w_gate->rows + 7) / 8;
      ctx.threads.loop(groups, grain(ctx, groups), [&](int64_t begin, int64_t end, int) {
        float gates[kTile * 8], ups[kTile * 8];
        for (int32_t t0 = 0; t0 < rows; t0 += kTile) {
          const int32_t count = rows - t0 < kTile ? rows - t0 : kTile;
          for (int64_t g = begin; g < end; g++) {
            input.group(ctx, *w_gate, g, t0, count, gates);
            input.group(ctx, *w_up, g, t0, count, ups);
            ctx.loops->activate(activation, gates, ups, int64_t{count} * 8);
            const int32_t lanes = w_gate->rows - g * 8 < 8 ? static_cast<int32_t>(w_gate->rows - g * 8) : 8;
            for (int32_t t = 0; t < count; t++) {
              for (int32_t j = 0; j < lanes; j++) to->row(t0 + t)[g * 8 + j] = gates[t * 8 + j];
            }
          }
        }
      });
    });
  });
}
