/** embed.cpp: wkv_embed and wkv_rmsnorm, the ops at both ends of a forward pass. */
#include <cstring>

#include "common.hpp"

using namespace wkv;

int32_t wkv_embed(int32_t context, int32_t out, int32_t table, int32_t tokens, int32_t rows) {
  return entry(context, [&](Context& ctx) {
    const TensorRef from = find_tensor(context, table, "table");
    require(from->dtype != WKV_I32, "table is of dtype I32");
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, from->columns);
    const TensorRef ids = find_tensor(context, tokens, "tokens", WKV_I32, 1, -1);
    require(ids->columns >= rows, "tokens has fewer columns than rows");
    ctx.submit([=, loops = ctx.loops] {
      for (int32_t i = 0; i < rows; i++) {
        const int32_t id = ids->i32()[i];
        if (id < 0 || id >= from->rows) fail(WKV_DATA, "Token " + std::to_string(id) + " is outside the table of " + std::to_string(from->rows));
        if (from->dtype == WKV_F32) std::memcpy(to->row(i), from->row(id), size_t(from->columns) * 4);
        else loops->weight_row(from->dtype, from->memory.data(), from->columns, id, to->row(i));
      }
    });
  });
}

int32_t wkv_rmsnorm(int32_t context, int32_t out, int32_t x, int32_t rows, int32_t weight, float epsilon) {
  return entry(context, [&](Context& ctx) {
    const TensorRef w = find_tensor(context, weight, "weight", WKV_F32, 1, -1);
    const TensorRef from = find_tensor(context, x, "x", WKV_F32, rows, w->columns);
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, w->columns);
    ctx.submit([=, loops = ctx.loops] {
      for (int32_t i = 0; i < rows; i++) loops->rmsnorm(from->row(i), w->f32(), w->columns, epsilon, to->row(i));
    });
  });
}
