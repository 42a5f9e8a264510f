/**
 * attend.cpp: wkv_attend, one decode step of one layer: attend, accumulate scores, select, merge, insert.
 *
 *   s[g, i] = scale * rotate(q[g], len) . rotate(k[i], i)     i = 0..len, the new token being i = len; capped where asked
 *   p = softmax(s);  out[g] = sum_i p[g, i] v[i];  a[i] += mean_g p[g, i];  then steps 4 to 6 (settle.cpp)
 *
 * A task owns one KV head and a stretch of ranks, for all its query heads, so K and V are read once; the stretches depend on the number
 * of slots alone and are joined in rank order by one task a head. Bytes moved: K and V of the cached tokens once, the scores twice.
 */
#include <cmath>
#include <cstring>

#include "cache.hpp"

namespace wkv {
namespace {

/** One KV head's share of the scratch memory, in the order of its fields. */
struct Work {
  float* q;         // [G, D], rotated
  float* weights;   // [G, stride]: exp(s - the stretch's highest)
  float* highest;   // [stretches, G]
  float* sums;      // [stretches, G]
  float* outputs;   // [stretches, G, D]
  float* now;       // [stride]: mean_g p
  uint8_t* key;     // the new token, as stored
  uint8_t* value;
};

/** How the scratch memory is cut. */
struct Plan {
  int32_t group, head_dim, stretch, stretches;
  int64_t stride, floats, bytes;

  explicit Plan(const Cache& cache) : group(cache.group()), head_dim(cache.head_dim) {
    const int32_t entries = cache.slots + 1;
    stretch = 128;
    while (entries / stretch > 64) stretch *= 2;
    stretches = (entries + stretch - 1) / stretch;
    stride = (int64_t{entries} + 15) / 16 * 16;
    floats = group * head_dim + (group + 1) * stride + int64_t{stretches} * group * (2 + head_dim);
    bytes = (floats * 4 + 2 * cache.row_bytes() + 63) / 64 * 64;
  }

  Work work(uint8_t* scratch, int64_t unit, int64_t row_bytes) const {
    Work w;
    w.q = reinterpret_cast<float*>(scratch + unit * bytes);
    w.weights = w.q + group * head_dim;
    w.highest = w.weights + group * stride;
    w.sums = w.highest + int64_t{stretches} * group;
    w.outputs = w.sums + int64_t{stretches} * group;
    w.now = w.outputs + int64_t{stretches} * group * head_dim;
    w.key = reinterpret_cast<uint8_t*>(w.now + stride);
    w.value = w.key + row_bytes;
    return w;
  }
};

/** Rotates q at the new token's rank, and rounds k and v to what will be stored. */
void prepare(const Loops& loops, const Cache& cache, const RowHeads& row, const float* qkv, int32_t n, int64_t head, const Work& w) {
  const Counts& counts = cache.counts[head];
  const int32_t group = cache.group(), dim = cache.head_dim;
  float own[512], key[512];
  const bool text = cache.positions == WKV_POSITIONS_TEXT;
  const Rotation at = cache.rope->at(text ? counts.steps : counts.kept, own);
  for (int32_t g = 0; g < group; g++) {
    float* q = w.q + g * dim;
    std::memcpy(q, qkv + row.query(n, g) * dim, size_t(dim) * 4);
    cache.rope->to_half(q);
    rotate(q, at);
  }
  std::memcpy(key, qkv + row.key(n) * dim, size_t(dim) * 4);
  store_key(loops, cache, key, at, w.key);
  loops.write_row(cache.dtype, qkv + row.value(n) * dim, dim, w.value);
}

/** Ranks [first, last) of one head: weights, their highest score and sum, and the weighted values. */
void attend_stretch(const Loops& loops, Cache& cache, int64_t head, const Plan& plan, const Work& w, int32_t s, float scale, float softcap) {
  const Ranked r = cache.ranked(head);
  const int32_t first = s * plan.stretch, total = r.count + 1;
  const int32_t last = first + plan.stretch < total ? first + plan.stretch : total;
  if (first >= last) return;
  const int32_t stored = (last < r.count ? last : r.count) - first, none = 0;
  const StoredRows keys{cache.keys_of(head), cache.dtype, plan.head_dim, r.slot + first, stored};
  const StoredRows values{cache.values_of(head), cache.dtype, plan.head_dim, r.slot + first, stored};
  const StoredRows new_key{w.key, cache.dtype, plan.head_dim, &none, 1}, new_value{w.value, cache.dtype, plan.head_dim, &none, 1};
  if (stored > 0) loops.scores(keys, cache.rotation(first), w.q, plan.group, scale, w.weights + first, plan.stride);
  if (last == total) loops.scores(new_key, cache.rotation(r.count), w.q, plan.group, scale, w.weights + r.count, plan.stride);
  float* out = w.outputs + int64_t{s} * plan.group * plan.head_dim;
  std::memset(out, 0, size_t(plan.group) * plan.head_dim * 4);
  for (int32_t g = 0; g < plan.group; g++) {
    float* weights = w.weights + g * plan.stride + first;
    if (softcap > 0.0f) loops.softcap(weights, last - first, softcap);
    const float most = loops.highest(weights, last - first);
    w.highest[s * plan.group + g] = most;
    w.sums[s * plan.group + g] = loops.exponentials(weights, last - first, most);
  }
  if (stored > 0) loops.weighted_values(values, w.weights + first, plan.stride, plan.group, out);
  if (last == total) loops.weighted_values(new_value, w.weights + r.count, plan.stride, plan.group, out);
}

/** Joins the stretches of one head in order: its outputs, and every token's mean weight over the query heads. */
void join(const Loops& loops, Cache& cache, int32_t layer, int64_t head, const Plan& plan, const Work& w, float* out) {
  const int32_t total = cache.counts[head].kept + 1, used = (total + plan.stretch - 1) / plan.stretch;
  std::memset(w.now, 0, size_t(total) * 4);
  for (int32_t g = 0; g < plan.group; g++) {
    float most = -INFINITY, sum = 0.0f;
    for (int32_t s = 0; s < used; s++) most = std::fmax(most, w.highest[s * plan.group + g]);
    for (int32_t s = 0; s < used; s++) sum += std::exp(w.highest[s * plan.group + g] - most) * w.sums[s * plan.group + g];
    check_sum(sum, layer);
    std::memset(out + g * plan.head_dim, 0, size_t(plan.head_dim) * 4);
    for (int32_t s = 0; s < used; s++) {
      const float factor = std::exp(w.highest[s * plan.group + g] - most) / sum;
      const int32_t first = s * plan.stretch, count = total - first < plan.stretch ? total - first : plan.stretch;
      loops.add_scaled(out + g * plan.head_dim, w.outputs + (int64_t{s} * plan.group + g) * plan.head_dim, factor, plan.head_dim);
      loops.add_scaled(w.now + first, w.weights + g * plan.stride + first, factor / static_cast<float>(plan.group), count);
    }
  }
}

/** Adds the weights to the scores, and settles the new token. `first`: the work of the layer's first KV head of the sequence. */
void accumulate(const Loops& loops, Cache& cache, int64_t head, const Plan& plan, const Work& w, const Work& first, int32_t forced) {
  static thread_local std::vector<float> layer_mean;
  Ranked r = cache.ranked(head);
  r.add(0, ++cache.counts[head].steps);
  loops.add_scaled(r.score, w.now, 1.0f, r.count);
  if (cache.by_layer()) mean_of_heads(loops, first.now, plan.bytes / 4, cache.kv_heads, r.count, layer_mean);
  settle(loops, cache, head, r, Incoming{w.key, w.value}, forced, cache.by_layer() ? layer_mean.data() : w.now);
}

}  // namespace
}  // namespace wkv

using namespace wkv;

int32_t wkv_attend(int32_t context, int32_t handle, int32_t layer, int32_t kv_head, int32_t out, int32_t qkv, float scale, float softcap, int32_t victims) {
  return entry(context, [&](Context& ctx) {
    const CacheRef cache = find_cache(context, handle, layer);
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, cache->sequences, -1);
    const RowHeads row = cache->row_heads(to->columns, kv_head);
    const TensorRef from = find_tensor(context, qkv, "qkv", WKV_F32, cache->sequences, row.columns(cache->head_dim));
    const TensorRef forced = find_victims(context, victims, *cache);
    check_softcap(softcap);
    const Plan plan(*cache);
    const int64_t units = int64_t{cache->sequences} * cache->kv_heads;
    ctx.scratch.reserve(size_t(units * plan.bytes));
    ctx.submit([=, &ctx] {
      const Loops& loops = *ctx.loops;
      const int64_t first = cache->head(layer, 0, 0);
      const auto work = [&](int64_t unit) { return plan.work(ctx.scratch.data(), unit, cache->row_bytes()); };
      int32_t used = 1;  // stretches of the longest head
      for (int64_t u = 0; u < units; u++) used = std::max(used, cache->counts[first + u].kept / plan.stretch + 1);
      ctx.threads.loop(units, 8, [&](int64_t begin, int64_t end, int) {
        for (int64_t u = begin; u < end; u++) {
          const int64_t b = u / cache->kv_heads;
          prepare(loops, *cache, row, from->row(b), static_cast<int32_t>(u % cache->kv_heads), first + u, work(u));
        }
      });
      // Heads turn fastest, so that a stretch's part of the rotation's tables stays in the cache.
      ctx.threads.loop(units * used, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; i++) attend_stretch(loops, *cache, first + i % units, plan, work(i % units), static_cast<int32_t>(i / units), scale, softcap);
      });
      ctx.threads.loop(units, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t u = begin; u < end; u++) {
          float* own = to->row(u / cache->kv_heads) + row.query(static_cast<int32_t>(u % cache->kv_heads), 0) * plan.head_dim;
          join(loops, *cache, layer, first + u, plan, work(u), own);
        }
      });
      ctx.threads.loop(units, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t u = begin; u < end; u++) accumulate(loops, *cache, first + u, plan, work(u), work(u / cache->kv_heads * cache->kv_heads), forced ? forced->i32()[u] : -1);
      });
    });
  });
}
