/**
 * attend.cu: wkv_attend, one decode step of one layer in one launch: attend, accumulate scores, select, merge, insert.
 *
 *   s[g, i] = scale * rotate(q[g], len) . rotate(k[i], rank i)     i = 0..len, the new token being i = len; capped where asked
 *   p = softmax(s);  out[g] = sum_i p[g, i] v[i];  a[i] += mean_g p[g, i];  then steps 4 to 6 of the step (wkv.h, policy.h)
 * or, where the policy must see the whole step's weights, those weights for a second launch (settle.cu).
 *
 * qkv [B, (H + 2 N) D], out [B, H D]. The kernel is attend.cuh's, with the tensor cores (attend_tensor.cu) or without (attend_plain.cu).
 * Bytes moved: K and V of the cached tokens, 24 bytes of state a slot, three rows. Sums are taken in a fixed order.
 */
#include "attend.cuh"

using namespace wkv;

int32_t wkv_attend(int32_t context, int32_t handle, int32_t layer, int32_t kv_head, int32_t out, int32_t qkv, float scale, float softcap, int32_t victims) {
  return entry(context, [&](Context& ctx) {
    const CacheRef cache = find_cache(context, handle, layer);
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, cache->sequences, -1);
    const RowHeads row = cache->row_heads(to->columns, kv_head);
    const TensorRef from = find_tensor(context, qkv, "qkv", WKV_F32, cache->sequences, row.columns(cache->head_dim));
    const TensorRef forced = find_victims(context, victims, *cache);
    check_softcap(softcap);
    ctx.hold(cache, from, to, forced);
    AttendView a{};
    a.cache = cache->view(layer);
    a.row = row;
    a.qkv = from->f32();
    a.out = to->f32();
    a.scale = scale;
    a.softcap = softcap * 1.4426950408889634f;
    a.layer = layer;
    a.victims = forced ? forced->i32() : nullptr;
    if (!attend_tensor(ctx, *cache, a)) attend_plain(ctx, *cache, a);
    if (a.cache.later) settle_step(ctx, *cache, a.cache, {a.qkv + row.key(0) * cache->head_dim, from->columns, row.kv_heads * cache->head_dim}, a.cache.weights, a.victims);
    cache->touch(ctx, layer);
    ctx.submitted();
  });
}
