/** embed.cpp: the ops that touch each activation once: wkv_embed, wkv_rmsnorm, wkv_qk_norm, wkv_softcap. */
#include <cmath>
#include <cstring>

#include "common.hpp"

using namespace wkv;

int32_t wkv_embed(int32_t context, int32_t out, int32_t table, int32_t tokens, int32_t rows, float scale) {
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
        if (scale == 1.0f) continue;
        for (int32_t c = 0; c < from->columns; c++) to->row(i)[c] *= scale;
      }
    });
  });
}

int32_t wkv_rmsnorm(int32_t context, int32_t out, int32_t x, int32_t rows, int32_t weight, float epsilon, int32_t add) {
  return entry(context, [&](Context& ctx) {
    require(add == 0 || add == 1, "add must be 0 or 1: " + std::to_string(add));
    const TensorRef w = find_tensor(context, weight, "weight", WKV_F32, 1, -1);
    const TensorRef from = find_tensor(context, x, "x", WKV_F32, rows, w->columns);
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, w->columns);
    if (add && rows > 0) ctx.normed.reserve(w->columns);
    ctx.submit([=, &ctx] {
      for (int32_t i = 0; i < rows; i++) {
        float* out = add ? ctx.normed.data() : to->row(i);
        ctx.loops->rmsnorm(from->row(i), w->f32(), w->columns, epsilon, out);
        if (add) ctx.loops->add_scaled(to->row(i), out, 1.0f, w->columns);
      }
    });
  });
}

int32_t wkv_qk_norm(int32_t context, int32_t qkv, int32_t rows, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t q_weight, int32_t k_weight, float epsilon) {
  return entry(context, [&](Context& ctx) {
    const TensorRef q = find_tensor(context, q_weight, "q_weight", WKV_F32, 1, -1), k = find_tensor(context, k_weight, "k_weight", WKV_F32, 1, -1);
    check_qk_norm(heads, kv_heads, head_dim, q->columns, k->columns);
    const TensorRef x = find_tensor(context, qkv, "qkv", WKV_F32, rows, (heads + 2 * kv_heads) * head_dim);
    ctx.submit([=, loops = ctx.loops] {
      for (int32_t i = 0; i < rows; i++) {
        float *at = x->row(i), *const keys = at + heads * head_dim, *const values = keys + kv_heads * head_dim;
        for (; at < keys; at += q->columns) loops->rmsnorm(at, q->f32(), q->columns, epsilon, at);
        for (; at < values; at += k->columns) loops->rmsnorm(at, k->f32(), k->columns, epsilon, at);
      }
    });
  });
}

int32_t wkv_softcap(int32_t context, int32_t x, int32_t rows, float cap) {
  return entry(context, [&](Context& ctx) {
    const TensorRef at = find_tensor(context, x, "x", WKV_F32, rows, -1);
    require(std::isfinite(cap) && cap > 0.0f, "cap must be a number above 0");
    ctx.submit([=, &ctx] {
      for (int32_t i = 0; i < rows; i++) {
        ctx.threads.loop((at->columns + 1023) / 1024, 1, [&](int64_t begin, int64_t end, int) {
          ctx.loops->softcap(at->row(i) + begin * 1024, std::min<int64_t>(end * 1024, at->columns) - begin * 1024, cap);
        });
      }
    });
  });
}
