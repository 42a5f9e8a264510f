/** The sources of the native libraries, by path below kernels/. Made by `deno task bind`. */
export const sources: Record<string, string> = {
  "cpu/attend.cpp": `/**
 * attend.cpp: wkv_attend, one decode step of one layer: attend, accumulate scores, select, merge, insert.
 *
 *   s[g, i] = scale * rotate(q[g], len) . rotate(k[i], i)     i = 0..len, the new token being i = len
 *   p = softmax(s);  out[g] = sum_i p[g, i] v[i];  a[i] += mean_g p[g, i];  then steps 4 to 6 (cache.cpp)
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
    floats = group * head_dim + group * stride + int64_t{stretches} * group * (2 + head_dim);
    bytes = (floats * 4 + 2 * cache.row_bytes() + 63) / 64 * 64;
  }

  Work work(uint8_t* scratch, int64_t unit, int64_t row_bytes) const {
    Work w;
    w.q = reinterpret_cast<float*>(scratch + unit * bytes);
    w.weights = w.q + group * head_dim;
    w.highest = w.weights + group * stride;
    w.sums = w.highest + int64_t{stretches} * group;
    w.outputs = w.sums + int64_t{stretches} * group;
    w.key = reinterpret_cast<uint8_t*>(w.outputs + int64_t{stretches} * group * head_dim);
    w.value = w.key + row_bytes;
    return w;
  }
};

/** Rotates q at the new token's rank, and rounds k and v to what will be stored. */
void prepare(const Loops& loops, const Cache& cache, const float* qkv, int32_t n, int64_t head, const Work& w) {
  const Counts& counts = cache.counts[head];
  const int32_t group = cache.group(), dim = cache.head_dim;
  float own[512], key[512];
  const bool text = cache.positions == WKV_POSITIONS_TEXT;
  const Rotation at = cache.rope->at(text ? counts.steps : counts.kept, own);
  for (int32_t g = 0; g < group; g++) {
    float* q = w.q + g * dim;
    std::memcpy(q, qkv + (int64_t{n} * group + g) * dim, size_t(dim) * 4);
    cache.rope->to_half(q);
    rotate(q, at);
  }
  std::memcpy(key, qkv + (int64_t{cache.heads} + n) * dim, size_t(dim) * 4);
  store_key(loops, cache, key, at, w.key);
  loops.write_row(cache.dtype, qkv + (int64_t{cache.heads} + cache.kv_heads + n) * dim, dim, w.value);
}

/** Ranks [first, last) of one head: weights, their highest score and sum, and the weighted values. */
void attend_stretch(const Loops& loops, Cache& cache, int64_t head, const Plan& plan, const Work& w, int32_t s, float scale) {
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
    const float most = loops.highest(weights, last - first);
    w.highest[s * plan.group + g] = most;
    w.sums[s * plan.group + g] = loops.exponentials(weights, last - first, most);
  }
  if (stored > 0) loops.weighted_values(values, w.weights + first, plan.stride, plan.group, out);
  if (last == total) loops.weighted_values(new_value, w.weights + r.count, plan.stride, plan.group, out);
}

/** Joins the stretches of one head in order, adds the weights to the scores, and settles the new token. */
void join(const Loops& loops, Cache& cache, int32_t layer, int64_t head, const Plan& plan, const Work& w, float* out, int32_t forced) {
  Ranked r = cache.ranked(head);
  const int32_t total = r.count + 1, used = (total + plan.stretch - 1) / plan.stretch;
  const int32_t step = ++cache.counts[head].steps;
  r.add(0, step);
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
      loops.add_scaled(r.score + first, w.weights + g * plan.stride + first, factor / static_cast<float>(plan.group), count);
    }
  }
  settle(loops, cache, head, r, Incoming{w.key, w.value}, forced);
}

}  // namespace
}  // namespace wkv

using namespace wkv;

int32_t wkv_attend(int32_t context, int32_t handle, int32_t layer, int32_t out, int32_t qkv, float scale, int32_t victims) {
  return entry(context, [&](Context& ctx) {
    const CacheRef cache = find_cache(context, handle, layer);
    const TensorRef from = find_tensor(context, qkv, "qkv", WKV_F32, cache->sequences, (cache->heads + 2 * cache->kv_heads) * cache->head_dim);
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, cache->sequences, cache->heads * cache->head_dim);
    const TensorRef forced = find_victims(context, victims, *cache);
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
          prepare(loops, *cache, from->row(b), static_cast<int32_t>(u % cache->kv_heads), first + u, work(u));
        }
      });
      // Heads turn fastest, so that a stretch's part of the rotation's tables stays in the cache.
      ctx.threads.loop(units * used, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; i++) attend_stretch(loops, *cache, first + i % units, plan, work(i % units), static_cast<int32_t>(i / units), scale);
      });
      ctx.threads.loop(units, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t u = begin; u < end; u++) {
          float* row = to->row(u / cache->kv_heads) + u % cache->kv_heads * plan.group * plan.head_dim;
          join(loops, *cache, layer, first + u, plan, work(u), row, forced ? forced->i32()[u] : -1);
        }
      });
    });
  });
}
`,
  "cpu/cache.cpp": `/** cache.cpp: rotations and caches, select, merge and insert, and wkv_insert. The rules themselves are in policy.h. */
#include "cache.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace wkv {

// ---- rotation ----

void Rope::to_half(float* head) const {
  if (pairs == WKV_PAIRS_HALF) return;
  float turned[512];
  for (int32_t i = 0; i < count; i++) turned[i] = head[2 * i], turned[i + count] = head[2 * i + 1];
  std::memcpy(head, turned, size_t(count) * 8);
}

void Rope::from_half(float* head) const {
  if (pairs == WKV_PAIRS_HALF) return;
  float turned[512];
  for (int32_t i = 0; i < count; i++) turned[2 * i] = head[i], turned[2 * i + 1] = head[i + count];
  std::memcpy(head, turned, size_t(count) * 8);
}

Rotation Rope::at(int64_t position, float* own) const {
  if (position < positions) return {cosines.data() + position * count, sines.data() + position * count, count};
  for (int32_t i = 0; i < count; i++) {
    const double angle = frequencies[i] * static_cast<double>(position);
    own[i] = static_cast<float>(std::cos(angle));
    own[i + count] = static_cast<float>(std::sin(angle));
  }
  return {own, own + count, count};
}

void rotate(float* head, const Rotation& by) {
  for (int32_t i = 0; i < by.pairs; i++) {
    const float x = head[i], y = head[i + by.pairs];
    head[i] = x * by.cosines[i] - y * by.sines[i];
    head[i + by.pairs] = x * by.sines[i] + y * by.cosines[i];
  }
}

// ---- state ----

size_t Cache::bytes() const {
  return keys.bytes() + values.bytes() + scores.bytes() + gaps.bytes() + births.bytes() + places.bytes() + counts.size() * sizeof(Counts);
}

Ranked Cache::ranked(int64_t head) {
  const int64_t at = head * (slots + 1);
  return {scores.data() + at, births.data() + at, places.data() + at, gapped() ? gaps.data() + at : nullptr, counts[head].kept};
}

Rotation Cache::rotation(int32_t rank) const {
  if (positions == WKV_POSITIONS_TEXT) return {nullptr, nullptr, 0};
  const int64_t at = int64_t{rank} * rope->count;
  return {rope->cosines.data() + at, rope->sines.data() + at, rope->count};
}

void Cache::check_layer(int32_t layer) const {
  require(layer >= 0 && layer < layers, "layer must be between 0 and " + std::to_string(layers - 1) + ": " + std::to_string(layer));
}

void Ranked::remove(int32_t rank, bool gaps) {
  const size_t after = size_t(count - rank - 1) * 4;
  std::memmove(score + rank, score + rank + 1, after);
  std::memmove(birth + rank, birth + rank + 1, after);
  std::memmove(slot + rank, slot + rank + 1, after);
  if (gaps) std::memmove(gap + rank, gap + rank + 1, after);
  count--;
}

void Ranked::add(int32_t t, int32_t birth_step) {
  score[count] = 0.0f;
  birth[count] = birth_step;
  slot[count] = -1 - t;
  count++;
}

// ---- select, merge, insert ----

namespace {

struct Rows {
  const Cache& cache;
  uint8_t* values;
  const Incoming& incoming;
  uint8_t* value(int32_t slot) const {
    return slot >= 0 ? values + slot * cache.row_bytes() : incoming.values + (-1 - slot) * cache.row_bytes();
  }
};

void update_gap(const Loops& loops, const Rows& rows, Ranked& r, int32_t rank) {
  if (rank < 0 || rank + 1 >= r.count) return;
  r.gap[rank] = loops.gap(rows.cache.dtype, rows.value(r.slot[rank]), rows.value(r.slot[rank + 1]), rows.cache.head_dim);
}

/** The rank that minimises the policy's value; the lowest rank of equals. */
int32_t pick(const Cache& cache, const Ranked& r, int32_t step) {
  int32_t best = -1;
  float least = 0.0f;
  const bool gapped = cache.gapped();
  for (int32_t rank = cache.sinks; rank < r.count - cache.recent; rank++) {
    const float w = wkv_average(r.score[rank], step - r.birth[rank] + 1);
    float value = INFINITY;  // the newest has no right neighbour to be merged with
    if (!gapped) value = wkv_select_value(cache.select, rank, w, 0.0f, 0.0f);
    else if (rank + 1 < r.count) value = wkv_select_value(cache.select, rank, w, wkv_average(r.score[rank + 1], step - r.birth[rank + 1] + 1), r.gap[rank]);
    if (std::isnan(value)) fail(WKV_DATA, "The merge cost of rank " + std::to_string(rank) + " is not a number");
    if (best < 0 || value < least) best = rank, least = value;
  }
  return best;
}

}  // namespace

void settle(const Loops& loops, Cache& cache, int64_t head, Ranked& r, const Incoming& incoming, int32_t forced) {
  Counts& counts = cache.counts[head];
  const Rows rows{cache, cache.values_of(head), incoming};
  const int32_t step = counts.steps;
  const int32_t arrived = r.count - counts.kept;
  if (cache.gapped()) {
    for (int32_t rank = counts.kept - 1; rank + 1 < r.count; rank++) update_gap(loops, rows, r, rank);
  }
  if (r.count > cache.slots && cache.select == WKV_SELECT_NONE) fail(WKV_INVALID, "The cache is full: its policy keeps every token, and it has " + std::to_string(cache.slots) + " slots");
  // A thread's own list, so that a step allocates nothing once it has grown.
  static thread_local std::vector<int32_t> freed;
  freed.clear();
  while (r.count > cache.slots) {
    const int32_t j = forced != -1 ? forced : pick(cache, r, step);
    if (!wkv_evictable(j, r.count, cache.sinks, cache.recent)) fail(WKV_INVALID, "Rank " + std::to_string(j) + " may not leave a cache of " + std::to_string(r.count) + " tokens with " + std::to_string(cache.sinks) + " sinks and " + std::to_string(cache.recent) + " recent");
    const bool neighbour = j + 1 < r.count;
    const float w_v = wkv_average(r.score[j], step - r.birth[j] + 1);
    const float w_r = neighbour ? wkv_average(r.score[j + 1], step - r.birth[j + 1] + 1) : 0.0f;
    const bool merges = cache.merge == WKV_MERGE_RIGHT && neighbour;
    if (merges && w_v + w_r > 0.0f) loops.merge(cache.dtype, w_v, rows.value(r.slot[j]), w_r, rows.value(r.slot[j + 1]), cache.head_dim);
    counts.event[0] = static_cast<float>(r.birth[j] - 1);
    counts.event[1] = merges ? static_cast<float>(r.birth[j + 1] - 1) : -1.0f;
    counts.event[2] = w_v;
    counts.event[3] = w_r;
    ++(merges ? counts.merged : counts.evicted);
    if (r.slot[j] >= 0) freed.push_back(r.slot[j]);
    r.remove(j, cache.gapped());
    if (cache.gapped()) update_gap(loops, rows, r, j - 1), update_gap(loops, rows, r, j);
  }
  size_t next_freed = 0;
  int32_t unused = counts.kept;
  for (int32_t rank = std::max(0, r.count - arrived); rank < r.count; rank++) {
    if (r.slot[rank] >= 0) continue;
    const int64_t from = (-1 - r.slot[rank]) * cache.row_bytes();
    const int32_t slot = next_freed < freed.size() ? freed[next_freed++] : unused++;
    std::memcpy(cache.keys_of(head) + slot * cache.row_bytes(), incoming.keys + from, size_t(cache.row_bytes()));
    std::memcpy(rows.values + slot * cache.row_bytes(), incoming.values + from, size_t(cache.row_bytes()));
    r.slot[rank] = slot;
  }
  counts.kept = r.count;
}

void store_key(const Loops& loops, const Cache& cache, float* key, const Rotation& at, uint8_t* out) {
  cache.rope->to_half(key);
  if (cache.positions == WKV_POSITIONS_TEXT) rotate(key, at);
  loops.write_row(cache.dtype, key, cache.head_dim, out);
}

CacheRef find_cache(int32_t context, int32_t handle, int32_t layer) {
  const CacheRef cache = find<Cache>(context, handle, Kind::Cache, "cache");
  cache->check_layer(layer);
  return cache;
}

TensorRef find_victims(int32_t context, int32_t handle, const Cache& cache) {
  return handle ? find_tensor(context, handle, "victims", WKV_I32, cache.sequences, cache.kv_heads) : TensorRef();
}

}  // namespace wkv

using namespace wkv;

int32_t wkv_rope_open(int32_t context, int32_t head_dim, int32_t pairs, const float* frequencies, int32_t frequencies_bytes, int32_t positions, int32_t* out, int32_t out_bytes) {
  return entry(context, [&](Context&) {
    require_buffer(out, out_bytes, 4, "out");
    require(head_dim >= 2 && head_dim <= 512, "head_dim must be between 2 and 512: " + std::to_string(head_dim));
    require(pairs == WKV_PAIRS_HALF || pairs == WKV_PAIRS_INTERLEAVED, "pairs " + std::to_string(pairs) + " is unknown");
    require(positions >= 0 && positions <= 1 << 21, "positions must be between 0 and 2097152: " + std::to_string(positions));
    require(frequencies != nullptr && frequencies_bytes > 0 && frequencies_bytes % 4 == 0 && frequencies_bytes / 4 * 2 <= head_dim, "frequencies must hold between 1 and head_dim / 2 floats");
    auto rope = std::make_shared<Rope>();
    rope->head_dim = head_dim;
    rope->pairs = pairs;
    rope->count = frequencies_bytes / 4;
    rope->positions = positions;
    for (int32_t i = 0; i < rope->count; i++) {
      require(std::isfinite(frequencies[i]), "frequency " + std::to_string(i) + " is not finite");
      rope->frequencies.push_back(frequencies[i]);
    }
    rope->cosines.resize(size_t(positions) * rope->count);
    rope->sines.resize(size_t(positions) * rope->count);
    for (int64_t p = 0; p < positions; p++) {
      for (int32_t i = 0; i < rope->count; i++) {
        rope->cosines.data()[p * rope->count + i] = static_cast<float>(std::cos(rope->frequencies[i] * static_cast<double>(p)));
        rope->sines.data()[p * rope->count + i] = static_cast<float>(std::sin(rope->frequencies[i] * static_cast<double>(p)));
      }
    }
    *out = add_handle(context, rope);
  });
}

int32_t wkv_cache_open(int32_t context, int32_t rope, int32_t layers, int32_t sequences, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t slots, int32_t sinks, int32_t recent, int32_t select, int32_t merge, int32_t positions, int32_t dtype, int32_t* out, int32_t out_bytes) {
  return entry(context, [&](Context&) {
    require_buffer(out, out_bytes, 4, "out");
    auto cache = std::make_shared<Cache>();
    cache->rope = find<Rope>(context, rope, Kind::Rope, "rope");
    require(layers >= 1 && layers <= 1024 && sequences >= 1 && sequences <= 4096, "layers must be between 1 and 1024, sequences between 1 and 4096");
    require(kv_heads >= 1 && kv_heads <= 1024 && heads >= kv_heads && heads % kv_heads == 0, "heads must be a multiple of kv_heads: " + std::to_string(heads) + ", " + std::to_string(kv_heads));
    require(cache->rope->head_dim == head_dim, "head_dim " + std::to_string(head_dim) + " is not the rotation's " + std::to_string(cache->rope->head_dim));
    require(slots >= 1, "slots must be at least 1: " + std::to_string(slots));
    require(sinks >= 0 && recent >= 0 && int64_t{sinks} + recent <= slots, "sinks + recent must be between 0 and slots: " + std::to_string(sinks) + " + " + std::to_string(recent) + " of " + std::to_string(slots));
    require(select >= WKV_SELECT_NONE && select <= WKV_SELECT_MERGE_COST_LINEAR, "select " + std::to_string(select) + " is unknown");
    require(merge == WKV_MERGE_NONE || merge == WKV_MERGE_RIGHT, "merge " + std::to_string(merge) + " is unknown");
    require(positions == WKV_POSITIONS_CACHE || positions == WKV_POSITIONS_TEXT, "positions " + std::to_string(positions) + " is unknown");
    require(positions == WKV_POSITIONS_TEXT || cache->rope->positions > slots, "the rotation's tables reach " + std::to_string(cache->rope->positions) + " positions, expected more than " + std::to_string(slots));
    require(dtype == WKV_F32 || dtype == WKV_F16 || dtype == WKV_BF16, "dtype " + std::to_string(dtype) + " is not a cache type");
    cache->layers = layers;
    cache->sequences = sequences;
    cache->heads = heads;
    cache->kv_heads = kv_heads;
    cache->head_dim = head_dim;
    cache->slots = slots;
    cache->sinks = sinks;
    cache->recent = recent;
    cache->select = select;
    cache->merge = merge;
    cache->positions = positions;
    cache->dtype = dtype;
    const size_t all = size_t(layers) * sequences * kv_heads;
    const size_t entries = all * (size_t(slots) + 1);
    cache->keys.resize(all * slots * cache->row_bytes());
    cache->values.resize(all * slots * cache->row_bytes());
    cache->scores.resize(entries);
    cache->births.resize(entries);
    cache->places.resize(entries);
    if (cache->gapped()) cache->gaps.resize(entries);
    cache->counts.resize(all);
    *out = add_handle(context, cache);
  });
}

int32_t wkv_cache_reset(int32_t context, int32_t handle, int32_t sequence) {
  return entry(context, [&](Context&) {
    const CacheRef cache = find_cache(context, handle, 0);
    require(sequence >= -1 && sequence < cache->sequences, "sequence must be between -1 and " + std::to_string(cache->sequences - 1) + ": " + std::to_string(sequence));
    for (int32_t layer = 0; layer < cache->layers; layer++) {
      for (int32_t b = 0; b < cache->sequences; b++) {
        if (sequence >= 0 && b != sequence) continue;
        for (int32_t n = 0; n < cache->kv_heads; n++) cache->counts[cache->head(layer, b, n)] = Counts();
      }
    }
  });
}

int32_t wkv_cache_read(int32_t context, int32_t handle, int32_t field, int32_t layer, int32_t sequence, int32_t kv_head, void* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    const CacheRef cache = find_cache(context, handle, layer);
    require(sequence >= 0 && sequence < cache->sequences, "sequence must be between 0 and " + std::to_string(cache->sequences - 1) + ": " + std::to_string(sequence));
    require(kv_head >= 0 && kv_head < cache->kv_heads, "kv_head must be between 0 and " + std::to_string(cache->kv_heads - 1) + ": " + std::to_string(kv_head));
    const int64_t head = cache->head(layer, sequence, kv_head);
    const Counts& counts = cache->counts[head];
    const Ranked r = cache->ranked(head);
    const bool rows = field == WKV_CACHE_KEYS || field == WKV_CACHE_VALUES;
    const int64_t want = field == WKV_CACHE_COUNTS || field == WKV_CACHE_EVENT ? 16 : int64_t{r.count} * (rows ? cache->head_dim : 1) * 4;
    require(out_bytes == want, "out has " + std::to_string(out_bytes) + " bytes, expected " + std::to_string(want));
    if (want == 0) return;
    require(out != nullptr, "out is null");
    auto* ints = static_cast<int32_t*>(out);
    auto* floats = static_cast<float*>(out);
    switch (field) {
      case WKV_CACHE_COUNTS: ints[0] = counts.kept, ints[1] = counts.steps, ints[2] = counts.merged, ints[3] = counts.evicted; return;
      case WKV_CACHE_EVENT: std::memcpy(out, counts.event, 16); return;
      case WKV_CACHE_SCORES: std::memcpy(out, r.score, size_t(want)); return;
      case WKV_CACHE_SLOTS: std::memcpy(out, r.slot, size_t(want)); return;
      case WKV_CACHE_POSITIONS:
        for (int32_t i = 0; i < r.count; i++) ints[i] = r.birth[i] - 1;
        return;
      case WKV_CACHE_STEPS:
        for (int32_t i = 0; i < r.count; i++) ints[i] = counts.steps - r.birth[i] + 1;
        return;
      default: break;
    }
    require(rows, "field " + std::to_string(field) + " is unknown");
    const uint8_t* from = field == WKV_CACHE_KEYS ? cache->keys_of(head) : cache->values_of(head);
    for (int32_t i = 0; i < r.count; i++, floats += cache->head_dim) {
      ctx.loops->read_row(cache->dtype, from + r.slot[i] * cache->row_bytes(), cache->head_dim, floats);
      if (field == WKV_CACHE_KEYS) cache->rope->from_half(floats);
    }
  });
}

int32_t wkv_insert(int32_t context, int32_t handle, int32_t layer, int32_t kv, int32_t weights, int32_t victims) {
  return entry(context, [&](Context& ctx) {
    const CacheRef cache = find_cache(context, handle, layer);
    const int32_t n_heads = cache->kv_heads, dim = cache->head_dim;
    const TensorRef rows = find_tensor(context, kv, "kv", WKV_F32, cache->sequences, 2 * n_heads * dim);
    const TensorRef given = find_tensor(context, weights, "weights", WKV_F32, cache->sequences, n_heads * (cache->slots + 1));
    const TensorRef forced = find_victims(context, victims, *cache);
    ctx.scratch.reserve(size_t(cache->row_bytes()) * 2);
    ctx.submit([=, &ctx] {
      std::vector<float> key(dim), angles(dim);
      const Incoming incoming{ctx.scratch.data(), ctx.scratch.data() + cache->row_bytes()};
      for (int32_t b = 0; b < cache->sequences; b++) {
        for (int32_t n = 0; n < n_heads; n++) {
          const int64_t head = cache->head(layer, b, n);
          Counts& counts = cache->counts[head];
          Ranked r = cache->ranked(head);
          const int32_t step = ++counts.steps;
          std::memcpy(key.data(), rows->row(b) + n * dim, size_t(dim) * 4);
          store_key(*ctx.loops, *cache, key.data(), cache->rope->at(step - 1, angles.data()), incoming.keys);
          ctx.loops->write_row(cache->dtype, rows->row(b) + (n_heads + n) * dim, dim, incoming.values);
          r.add(0, step);
          ctx.loops->add_scaled(r.score, given->row(b) + int64_t{n} * (cache->slots + 1), 1.0f, r.count);
          settle(*ctx.loops, *cache, head, r, incoming, forced ? forced->i32()[b * n_heads + n] : -1);
        }
      }
    });
  });
}
`,
  "cpu/cache.hpp": `/** cache.hpp: the cache of the CPU library and steps 3 to 6 of a decode step, shared by wkv_attend, wkv_insert and wkv_prefill. */
#pragma once
#include "../policy.h"
#include "common.hpp"

namespace wkv {

/**
 * The tokens of one head in rank order. \`slot\` says where a token's K and V lie (they never move); a negative slot -1 - t is row t of
 * the incoming tokens, which have no slot yet. \`gap\` is |V_j - V_r|^2 with the right neighbour, kept for rules that ask for it.
 */
struct Ranked {
  float* score;
  int32_t* birth;  // the step that fed the token, from 1: its place in the text + 1
  int32_t* slot;
  float* gap;
  int32_t count;

  /** Takes a rank out. */
  void remove(int32_t rank, bool gaps);
  /** Adds incoming row t at the end. */
  void add(int32_t t, int32_t birth_step);
};

/** Counters of one head. */
struct Counts {
  int32_t kept = 0, steps = 0, merged = 0, evicted = 0;
  float event[4] = {-1.0f, -1.0f, 0.0f, 0.0f};
};

struct Cache : Object {
  RopeRef rope;
  int32_t layers, sequences, heads, kv_heads, head_dim, slots, sinks, recent, select, merge, positions, dtype;
  Memory<uint8_t> keys, values;                 // [layers, B, N, slots, D] in \`dtype\`, keys in the library's order of dimensions
  Memory<float> scores, gaps;                   // [layers, B, N, slots + 1]
  Memory<int32_t> births, places;               // the same
  std::vector<Counts> counts;                   // [layers, B, N]
  Cache() : Object(Kind::Cache) {}

  size_t bytes() const override;
  int32_t group() const { return heads / kv_heads; }
  int64_t row_bytes() const { return int64_t{head_dim} * (dtype == WKV_F32 ? 4 : 2); }
  int64_t head(int32_t layer, int32_t sequence, int32_t kv_head) const { return (int64_t{layer} * sequences + sequence) * kv_heads + kv_head; }
  uint8_t* keys_of(int64_t head) { return keys.data() + head * slots * row_bytes(); }
  uint8_t* values_of(int64_t head) { return values.data() + head * slots * row_bytes(); }
  Ranked ranked(int64_t head);
  bool gapped() const { return wkv_select_uses_gap(select); }
  /** The rotation that attention applies to stored rows from rank \`rank\` on. */
  Rotation rotation(int32_t rank) const;
  void check_layer(int32_t layer) const;
};
using CacheRef = std::shared_ptr<Cache>;

/** Incoming keys and values of one head, in the cache's dtype, row_bytes apart. */
struct Incoming {
  uint8_t* keys;
  uint8_t* values;
};

/**
 * Steps 4 to 6 for one head: \`ranked\` holds the cached tokens and the incoming ones behind them, scores already added. While more than
 * \`slots\` are left the policy's victim (or rank \`forced\`, -1: none) leaves, merged into its right neighbour or dropped; the incoming
 * tokens that are left are then copied into free slots.
 */
void settle(const Loops& loops, Cache& cache, int64_t head, Ranked& ranked, const Incoming& incoming, int32_t forced);

/** Turns a new key into what is stored: the library's order, rotated (\`at\` its place in the text) when positions are the text's, in the
 *  cache's dtype; \`key\` is changed. */
void store_key(const Loops& loops, const Cache& cache, float* key, const Rotation& at, uint8_t* out);

/** Rotates a head that is in the library's order. */
void rotate(float* head, const Rotation& by);

/** Refuses a softmax whose sum is no number: a query or key was none. */
inline void check_sum(float sum, int32_t layer) {
  if (!(sum > 0.0f && sum <= 3.4e38f)) fail(WKV_DATA, "The attention of layer " + std::to_string(layer) + " is not a number");
}

CacheRef find_cache(int32_t context, int32_t handle, int32_t layer);

/** The ranks that must leave, per sequence and KV head. */
TensorRef find_victims(int32_t context, int32_t handle, const Cache& cache);

}  // namespace wkv
`,
  "cpu/common.hpp": `/** common.hpp: what every file of the CPU library shares: the context with its threads, tensors, recorded ops. */
#pragma once
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../handles.hpp"
#include "loops.hpp"
#include "threads.hpp"

namespace wkv {

void* zeroed(size_t bytes);
void release(void* memory, size_t bytes);

/** Zeroed memory on a cache line's boundary; large blocks take up room only where they are written. */
template <typename T>
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t count) { resize(count); }
  /** Replaces the memory by \`count\` zeros; what it held is gone. */
  void resize(size_t count);
  /** Makes room for at least \`count\`; what it held is gone when it grows. */
  void reserve(size_t count) {
    if (count > count_) resize(count);
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  size_t count() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }

 private:
  struct Free {
    size_t bytes = 0;
    void operator()(T* p) const { release(p, bytes); }
  };
  std::unique_ptr<T, Free> data_;
  size_t count_ = 0;
};

template <typename T>
void Memory<T>::resize(size_t count) {
  data_.reset();
  count_ = 0;
  if (count > SIZE_MAX / sizeof(T)) throw std::bad_alloc();
  const size_t bytes = count * sizeof(T);
  data_ = std::unique_ptr<T, Free>(static_cast<T*>(zeroed(bytes)), Free{bytes});
  count_ = count;
}

/** Rows of numbers; weights lie in groups of 8 rows (see loops.hpp), activations and I32 row by row. */
struct Tensor : Object {
  int32_t dtype, rows, columns;
  Memory<uint8_t> memory;
  Tensor(int32_t dtype, int32_t rows, int32_t columns);
  size_t bytes() const override { return memory.bytes(); }
  float* f32() { return reinterpret_cast<float*>(memory.data()); }
  int32_t* i32() { return reinterpret_cast<int32_t*>(memory.data()); }
  float* row(int64_t r) { return f32() + r * columns; }
};
using TensorRef = std::shared_ptr<Tensor>;

/** Frequencies of a rotation and its tables [positions, count]. */
struct Rope : Object {
  int32_t head_dim, pairs, count, positions;
  std::vector<double> frequencies;
  Memory<float> cosines, sines;
  Rope() : Object(Kind::Rope) {}
  size_t bytes() const override { return cosines.bytes() + sines.bytes(); }
  /** Puts a head into the library's own order, in which the rotated pairs are (i, i + count). */
  void to_half(float* head) const;
  /** Puts a head back into the model's order. */
  void from_half(float* head) const;
  /** The rotation of one position, from the tables or, beyond them, computed into \`own\` [2 * count]. */
  Rotation at(int64_t position, float* own) const;
};
using RopeRef = std::shared_ptr<Rope>;

/** A recorded op. */
using Op = std::function<void()>;

struct Graph : Object {
  std::vector<Op> ops;
  Graph() : Object(Kind::Graph) {}
};

/** A device with its threads and its scratch memory. */
struct Context : ContextBase {
  const Loops* loops;
  Threads threads;
  std::shared_ptr<Graph> recording;
  Memory<float> normed;     // [rows, columns] of a linear op's input after its norm
  Memory<int8_t> rounded;   // the same in 8 bits
  Memory<float> rounding;   // its scales, then its sums, a block each
  Memory<uint8_t> scratch;  // attention
  Context(int32_t threads);
  /** Runs an op now, or keeps it while a graph is recorded. */
  void submit(Op op) {
    if (recording) recording->ops.push_back(std::move(op));
    else op();
  }
};

inline TensorRef find_tensor(int32_t context, int32_t handle, const char* what) {
  return find<Tensor>(context, handle, Kind::Tensor, what);
}
/** A tensor of this dtype with at least these rows and exactly these columns (-1: any). */
TensorRef find_tensor(int32_t context, int32_t handle, const char* what, int32_t dtype, int32_t rows, int32_t columns);

/** Wraps the body of a C entry; see handles.hpp. */
template <typename Body>
int32_t entry(int32_t handle, Body body) {
  return entry_of<Context>(handle, body);
}

}  // namespace wkv
`,
  "cpu/embed.cpp": `/** embed.cpp: wkv_embed and wkv_rmsnorm, the ops at both ends of a forward pass. */
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
`,
  "cpu/linear.cpp": `/**
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
    require(precision == WKV_PRECISION_F32 || precision == WKV_PRECISION_INT8, "precision " + std::to_string(precision) + " is unknown");
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
    require(activation == WKV_SILU, "activation " + std::to_string(activation) + " is unknown");
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
            ctx.loops->silu_times(gates, ups, int64_t{count} * 8);
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
`,
  "cpu/loops.cpp": `/** loops.cpp: the loops of loops.hpp in 8-wide vectors; compiled once for each instruction set, with WKV_ISA as its name. */
#include "loops.hpp"

#include <cmath>
#include <cstring>

#include "../policy.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef WKV_ISA
#define WKV_ISA portable
#endif
#define WKV_TEXT2(x) #x
#define WKV_TEXT(x) WKV_TEXT2(x)

namespace wkv {
namespace WKV_ISA {
namespace {

typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));

inline f8 load(const float* p) {
  f8 v;
  std::memcpy(&v, p, 32);
  return v;
}
inline void store(float* p, f8 v) { std::memcpy(p, &v, 32); }
inline f8 spread(float x) { return f8{x, x, x, x, x, x, x, x}; }
inline float sum(f8 v) {
#if defined(__AVX2__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}

inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t rest = h & 0x7fff;
  float value;
  uint32_t bits;
  if (rest >= 0x7c00) bits = 0x7f800000 | (rest & 0x3ff) << 13;
  else if (rest >= 0x400) bits = (rest << 13) + (112u << 23);
  else {
    value = static_cast<float>(rest) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

inline uint16_t float_to_half(float value) {
#if defined(__F16C__)
  return _cvtss_sh(value, 0);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;
  if (bits < 0x38800000) {
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    // Adding 0.5 rounds the last bit of a subnormal half to even.
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000);
  }
  bits += 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((bits - (112u << 23)) >> 13);
#endif
}

inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline f8 load_halves(const uint8_t* p) {
#if defined(__F16C__)
  return (f8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  uint16_t h[8];
  std::memcpy(h, p, 16);
  f8 v;
  for (int i = 0; i < 8; i++) v[i] = half_to_float(h[i]);
  return v;
#endif
}

inline f8 load_bf16(const uint8_t* p) {
  uint16_t h[8];
  std::memcpy(h, p, 16);
  i8 bits;
  for (int i = 0; i < 8; i++) bits[i] = static_cast<int32_t>(static_cast<uint32_t>(h[i]) << 16);
  return (f8)bits;
}

template <int32_t kType>
inline f8 load8(const uint8_t* p) {
  if (kType == WKV_F32) return load(reinterpret_cast<const float*>(p));
  return kType == WKV_F16 ? load_halves(p) : load_bf16(p);
}

template <int32_t kType>
inline float load1(const uint8_t* row, int32_t i) {
  if (kType == WKV_F32) {
    float value;
    std::memcpy(&value, row + 4 * i, 4);
    return value;
  }
  uint16_t h;
  std::memcpy(&h, row + 2 * i, 2);
  return kType == WKV_F16 ? half_to_float(h) : bf16_to_float(h);
}

template <int32_t kType>
inline void store1(uint8_t* row, int32_t i, float value) {
  if (kType == WKV_F32) {
    std::memcpy(row + 4 * i, &value, 4);
    return;
  }
  const uint16_t h = kType == WKV_F16 ? float_to_half(value) : float_to_bf16(value);
  std::memcpy(row + 2 * i, &h, 2);
}

constexpr int32_t size_of(int32_t dtype) { return dtype == WKV_F32 ? 4 : 2; }

/** Calls body with the cache type as a constant. */
#define WKV_BY_TYPE(dtype, body)          \\
  switch (dtype) {                        \\
    case WKV_F32: body(WKV_F32); break;   \\
    case WKV_F16: body(WKV_F16); break;   \\
    default: body(WKV_BF16); break;       \\
  }

/** exp to about 1e-7 relative (range reduction by ln 2 in two parts, a polynomial of degree 6); 0 below -87. */
inline f8 exponential(f8 x) {
  const f8 low = spread(-87.0f), high = spread(88.0f);
  const i8 under = x < low;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const f8 magic = spread(12582912.0f);
  const f8 shifted = x * spread(1.44269504f) + magic;
  const f8 n = shifted - magic;
  const f8 r = x - n * spread(0.693359375f) - n * spread(-2.12194440e-4f);
  f8 p = spread(1.9875691500e-4f);
  p = p * r + spread(1.3981999507e-3f);
  p = p * r + spread(8.3334519073e-3f);
  p = p * r + spread(4.1665795894e-2f);
  p = p * r + spread(1.6666665459e-1f);
  p = p * r + spread(5.0000001201e-1f);
  p = p * r * r + r + spread(1.0f);
  const i8 power = ((i8)shifted + 127) << 23;
  const f8 value = p * (f8)power;
  return (f8)((i8)value & ~under);
}

// ---- weights ----

constexpr int32_t block_bytes(int32_t dtype) { return dtype == WKV_Q8_0 ? 272 : dtype == WKV_Q4_0 ? 144 : 160; }

/** Columns [0, n) of a group as floats, n <= 32: out[c] holds column \`column + c\` of the 8 rows. */
inline void dequantise(int32_t dtype, const uint8_t* weight, int32_t columns, int32_t rows, int64_t group, int32_t column, int32_t n, f8* out) {
  switch (dtype) {
    case WKV_F32: {
      const float* w = reinterpret_cast<const float*>(weight) + group * 8 * columns + column;
      const int32_t have = rows - group * 8 < 8 ? static_cast<int32_t>(rows - group * 8) : 8;
      for (int32_t c = 0; c < n; c++) out[c] = spread(0.0f);
      for (int32_t r = 0; r < have; r++) {
        for (int32_t c = 0; c < n; c++) out[c][r] = w[static_cast<int64_t>(r) * columns + c];
      }
      return;
    }
    case WKV_F16:
    case WKV_BF16: {
      const uint8_t* w = weight + (group * columns + column) * 16;
      for (int32_t c = 0; c < n; c++) out[c] = dtype == WKV_F16 ? load_halves(w + c * 16) : load_bf16(w + c * 16);
      return;
    }
    default: break;
  }
  const uint8_t* block = weight + (group * (columns / 32) + column / 32) * block_bytes(dtype);
  const f8 scale = load_halves(block);
  const f8 least = dtype == WKV_Q4_1 ? load_halves(block + 16) : spread(0.0f);
  const uint8_t* q = block + (dtype == WKV_Q4_1 ? 32 : 16);
  if (dtype == WKV_Q8_0) {
    for (int32_t v = 0; v < 8; v++) {
      i8 packed;
      std::memcpy(&packed, q + v * 32, 32);
      for (int32_t c = 0; c < 4; c++) out[4 * v + c] = __builtin_convertvector(packed << (24 - 8 * c) >> 24, f8) * scale;
    }
    return;
  }
  const int32_t middle = dtype == WKV_Q4_0 ? 8 : 0;
  for (int32_t v = 0; v < 4; v++) {
    i8 packed;
    std::memcpy(&packed, q + v * 32, 32);
    for (int32_t c = 0; c < 4; c++) {
      const i8 byte = packed >> (8 * c);
      out[4 * v + c] = __builtin_convertvector((byte & 15) - middle, f8) * scale + least;
      out[16 + 4 * v + c] = __builtin_convertvector((byte >> 4 & 15) - middle, f8) * scale + least;
    }
  }
}

void weight_row(int32_t dtype, const uint8_t* weight, int32_t columns, int64_t row, float* out) {
  f8 block[32];
  for (int32_t c = 0; c < columns; c += 32) {
    const int32_t n = columns - c < 32 ? columns - c : 32;
    dequantise(dtype, weight, columns, 0, row / 8, c, n, block);
    for (int32_t i = 0; i < n; i++) out[c + i] = block[i][row % 8];
  }
}

template <int32_t kRows>
inline void add_products(const f8* block, int32_t n, const float* x, int32_t columns, float* tile) {
  f8 total[kRows];
  for (int32_t t = 0; t < kRows; t++) total[t] = load(tile + t * 8);
  for (int32_t c = 0; c < n; c++) {
    for (int32_t t = 0; t < kRows; t++) total[t] += block[c] * spread(x[static_cast<int64_t>(t) * columns + c]);
  }
  for (int32_t t = 0; t < kRows; t++) store(tile + t * 8, total[t]);
}

void group_f32(int32_t dtype, const uint8_t* weight, int32_t columns, int32_t rows, int64_t group, const float* x, int32_t count, float* tile) {
  std::memset(tile, 0, static_cast<size_t>(count) * 32);
  f8 block[32];
  for (int32_t c = 0; c < columns; c += 32) {
    const int32_t n = columns - c < 32 ? columns - c : 32;
    dequantise(dtype, weight, columns, rows, group, c, n, block);
    int32_t t = 0;
    for (; t + 4 <= count; t += 4) add_products<4>(block, n, x + static_cast<int64_t>(t) * columns + c, columns, tile + t * 8);
    for (; t < count; t++) add_products<1>(block, n, x + static_cast<int64_t>(t) * columns + c, columns, tile + t * 8);
  }
}

void round_row(const float* x, int32_t columns, int8_t* rounded, float* scales, float* sums) {
  for (int32_t b = 0; b < columns / 32; b++, x += 32, rounded += 32) {
    f8 highest8 = spread(0.0f), none8 = spread(0.0f);
    for (int32_t i = 0; i < 32; i += 8) {
      const f8 v = load(x + i), magnitude = (f8)((i8)v & 0x7fffffff);
      highest8 = magnitude > highest8 ? magnitude : highest8;
      none8 += v * spread(0.0f);
    }
    float most = 0.0f;
    for (int32_t i = 0; i < 8; i++) most = highest8[i] > most ? highest8[i] : most;
    const float none = sum(none8);
    if (std::isnan(none)) {  // x is not finite: nor is what comes of it
      std::memset(rounded, 0, 32);
      scales[b] = sums[b] = none;
      continue;
    }
    const float scale = most / 127.0f, inverse = most > 0.0f ? 127.0f / most : 0.0f;
    int32_t total = 0;
    for (int32_t i = 0; i < 32; i++) {
      const int32_t q = static_cast<int32_t>(__builtin_rintf(x[i] * inverse));
      rounded[i] = static_cast<int8_t>(q);
      total += q;
    }
    scales[b] = scale;
    sums[b] = scale * static_cast<float>(total);
  }
}

#if defined(__AVX2__)
inline __m256i spread4(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}
#endif

/** Sums over 32 columns of weight (0..15 or int8) times x, for each of the 8 rows; Q4 values are taken as stored. */
template <int32_t kType, int32_t kRows>
inline void integer_products(const uint8_t* q, const int8_t* x, int64_t x_stride, i8* totals) {
#if defined(__AVX2__)
  __m256i total[kRows];
  for (int32_t t = 0; t < kRows; t++) total[t] = _mm256_setzero_si256();
  if (kType == WKV_Q8_0) {
    for (int32_t v = 0; v < 8; v++) {
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + v * 32));
      const __m256i magnitude = _mm256_abs_epi8(w);
      for (int32_t t = 0; t < kRows; t++) {
        // |w| <= 128 and |x| <= 127, so a pair of products fits 16 bits.
        const __m256i signed_x = _mm256_sign_epi8(spread4(x + t * x_stride + v * 4), w);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
        total[t] = _mm256_dpbusd_epi32(total[t], magnitude, signed_x);
#else
        total[t] = _mm256_add_epi32(total[t], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, signed_x), _mm256_set1_epi16(1)));
#endif
      }
    }
  } else {
    const __m256i low = _mm256_set1_epi8(15);
    for (int32_t v = 0; v < 4; v++) {
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + v * 32));
      const __m256i first = _mm256_and_si256(packed, low), second = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
      for (int32_t t = 0; t < kRows; t++) {
        const __m256i x_first = spread4(x + t * x_stride + v * 4), x_second = spread4(x + t * x_stride + 16 + v * 4);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
        total[t] = _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(total[t], first, x_first), second, x_second);
#else
        // 16 products of at most 15 * 127 stay below 2^15.
        total[t] = _mm256_add_epi16(total[t], _mm256_add_epi16(_mm256_maddubs_epi16(first, x_first), _mm256_maddubs_epi16(second, x_second)));
#endif
      }
    }
#if !(defined(__AVX512VNNI__) && defined(__AVX512VL__))
    for (int32_t t = 0; t < kRows; t++) total[t] = _mm256_madd_epi16(total[t], _mm256_set1_epi16(1));
#endif
  }
  for (int32_t t = 0; t < kRows; t++) totals[t] = (i8)total[t];
#else
  for (int32_t t = 0; t < kRows; t++) {
    int32_t total[8] = {};
    const int8_t* row = x + t * x_stride;
    for (int32_t v = 0; v < (kType == WKV_Q8_0 ? 8 : 4); v++) {
      for (int32_t r = 0; r < 8; r++) {
        for (int32_t c = 0; c < 4; c++) {
          const uint8_t byte = q[v * 32 + r * 4 + c];
          if (kType == WKV_Q8_0) total[r] += static_cast<int8_t>(byte) * row[v * 4 + c];
          else total[r] += (byte & 15) * row[v * 4 + c] + (byte >> 4) * row[16 + v * 4 + c];
        }
      }
    }
    std::memcpy(&totals[t], total, 32);
  }
#endif
}

template <int32_t kType, int32_t kRows>
inline void group_rows(const uint8_t* block, int32_t blocks, const int8_t* x, const float* scales, const float* sums, float* tile) {
  f8 total[kRows];
  for (int32_t t = 0; t < kRows; t++) total[t] = spread(0.0f);
  const int64_t stride = int64_t{blocks} * 32;
  for (int32_t b = 0; b < blocks; b++, block += block_bytes(kType)) {
    const f8 scale = load_halves(block);
    i8 products[kRows];
    integer_products<kType, kRows>(block + (kType == WKV_Q4_1 ? 32 : 16), x + b * 32, stride, products);
    for (int32_t t = 0; t < kRows; t++) {
      const int64_t at = static_cast<int64_t>(t) * blocks + b;
      total[t] += __builtin_convertvector(products[t], f8) * (scale * spread(scales[at]));
      if (kType == WKV_Q4_1) total[t] += load_halves(block + 16) * spread(sums[at]);
      if (kType == WKV_Q4_0) total[t] -= scale * spread(8.0f * sums[at]);
    }
  }
  for (int32_t t = 0; t < kRows; t++) store(tile + t * 8, total[t]);
}

template <int32_t kType>
inline void group_typed(const uint8_t* weight, int32_t columns, int64_t group, const int8_t* x, const float* scales, const float* sums, int32_t count, float* tile) {
  const int32_t blocks = columns / 32;
  const uint8_t* block = weight + group * blocks * block_bytes(kType);
  int32_t t = 0;
  for (; t + 4 <= count; t += 4) group_rows<kType, 4>(block, blocks, x + int64_t{t} * columns, scales + int64_t{t} * blocks, sums + int64_t{t} * blocks, tile + t * 8);
  for (; t < count; t++) group_rows<kType, 1>(block, blocks, x + int64_t{t} * columns, scales + int64_t{t} * blocks, sums + int64_t{t} * blocks, tile + t * 8);
}

void group_int8(int32_t dtype, const uint8_t* weight, int32_t columns, int64_t group, const int8_t* x, const float* scales, const float* sums, int32_t count, float* tile) {
  switch (dtype) {
    case WKV_Q8_0: return group_typed<WKV_Q8_0>(weight, columns, group, x, scales, sums, count, tile);
    case WKV_Q4_0: return group_typed<WKV_Q4_0>(weight, columns, group, x, scales, sums, count, tile);
    default: return group_typed<WKV_Q4_1>(weight, columns, group, x, scales, sums, count, tile);
  }
}

void rmsnorm(const float* x, const float* weight, int32_t columns, float epsilon, float* out) {
  double total = 0.0;
  for (int32_t c = 0; c < columns; c++) total += static_cast<double>(x[c]) * x[c];
  const float scale = 1.0f / std::sqrt(static_cast<float>(total / columns) + epsilon);
  for (int32_t c = 0; c < columns; c++) out[c] = x[c] * scale * weight[c];
}

void silu_times(float* gate, const float* up, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const f8 g = load(gate + i);
    store(gate + i, g / (spread(1.0f) + exponential(-g)) * load(up + i));
  }
  for (; i < count; i++) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

// ---- attention ----

void read_row(int32_t dtype, const uint8_t* row, int32_t count, float* out) {
#define WKV_BODY(type) for (int32_t i = 0; i < count; i++) out[i] = load1<type>(row, i)
  WKV_BY_TYPE(dtype, WKV_BODY)
#undef WKV_BODY
}

void write_row(int32_t dtype, const float* values, int32_t count, uint8_t* row) {
#define WKV_BODY(type) for (int32_t i = 0; i < count; i++) store1<type>(row, i, values[i])
  WKV_BY_TYPE(dtype, WKV_BODY)
#undef WKV_BODY
}

/** One row as floats, rotated, of any shape. */
template <int32_t kType>
inline void read_key(const uint8_t* row, int32_t head_dim, const float* cosines, const float* sines, int32_t pairs, float* out) {
  for (int32_t i = 0; i < pairs; i++) {
    const float x = load1<kType>(row, i), y = load1<kType>(row, i + pairs);
    out[i] = x * cosines[i] - y * sines[i];
    out[i + pairs] = x * sines[i] + y * cosines[i];
  }
  for (int32_t i = 2 * pairs; i < head_dim; i++) out[i] = load1<kType>(row, i);
}

inline float dot(const float* a, const float* b, int32_t count) {
  f8 total = spread(0.0f);
  int32_t i = 0;
  for (; i + 8 <= count; i += 8) total += load(a + i) * load(b + i);
  float rest = sum(total);
  for (; i < count; i++) rest += a[i] * b[i];
  return rest;
}

/** kHeads products with rows that are rotated in registers, a vector of pairs at a time; pairs and head_dim are multiples of 8. */
template <int32_t kType, int32_t kHeads>
void vector_scores(const StoredRows& keys, const Rotation& rotation, const float* q, float scale, float* scores, int64_t stride) {
  const int32_t size = size_of(kType), dim = keys.head_dim, pairs = rotation.pairs;
  for (int32_t i = 0; i < keys.count; i++) {
    const uint8_t* row = keys.data + keys.slots[i] * int64_t{dim} * size;
    const float *cosines = rotation.cosines + int64_t{i} * pairs, *sines = rotation.sines + int64_t{i} * pairs;
    f8 total[kHeads];
    for (int32_t g = 0; g < kHeads; g++) total[g] = spread(0.0f);
    for (int32_t d = 0; d < pairs; d += 8) {
      const f8 x = load8<kType>(row + d * size), y = load8<kType>(row + (d + pairs) * size), c = load(cosines + d), s = load(sines + d);
      const f8 first = x * c - y * s, second = x * s + y * c;
      for (int32_t g = 0; g < kHeads; g++) total[g] += first * load(q + g * dim + d) + second * load(q + g * dim + d + pairs);
    }
    for (int32_t d = 2 * pairs; d < dim; d += 8) {
      const f8 x = load8<kType>(row + d * size);
      for (int32_t g = 0; g < kHeads; g++) total[g] += x * load(q + g * dim + d);
    }
    for (int32_t g = 0; g < kHeads; g++) scores[g * stride + i] = scale * sum(total[g]);
  }
}

template <int32_t kType>
void typed_scores(const StoredRows& keys, const Rotation& rotation, const float* q, int32_t heads, float scale, float* scores, int64_t stride) {
  const int32_t dim = keys.head_dim;
  if (dim % 8 == 0 && rotation.pairs % 8 == 0) {
    int32_t g = 0;
    for (; g + 4 <= heads; g += 4) vector_scores<kType, 4>(keys, rotation, q + g * dim, scale, scores + g * stride, stride);
    if (heads - g == 3) vector_scores<kType, 3>(keys, rotation, q + g * dim, scale, scores + g * stride, stride);
    if (heads - g == 2) vector_scores<kType, 2>(keys, rotation, q + g * dim, scale, scores + g * stride, stride);
    if (heads - g == 1) vector_scores<kType, 1>(keys, rotation, q + g * dim, scale, scores + g * stride, stride);
    return;
  }
  float key[512];
  for (int32_t i = 0; i < keys.count; i++) {
    const int64_t at = int64_t{i} * rotation.pairs;
    read_key<kType>(keys.data + keys.slots[i] * int64_t{dim} * size_of(kType), dim, rotation.cosines + at, rotation.sines + at, rotation.pairs, key);
    for (int32_t g = 0; g < heads; g++) scores[g * stride + i] = scale * dot(q + g * dim, key, dim);
  }
}

void scores(const StoredRows& keys, const Rotation& rotation, const float* q, int32_t heads, float scale, float* out, int64_t stride) {
#define WKV_BODY(type) typed_scores<type>(keys, rotation, q, heads, scale, out, stride)
  WKV_BY_TYPE(keys.dtype, WKV_BODY)
#undef WKV_BODY
}

/** 16 dimensions of kHeads outputs stay in registers over all rows. */
template <int32_t kType, int32_t kHeads>
void typed_values(const StoredRows& values, const float* weights, int64_t stride, float* out) {
  const int32_t size = size_of(kType), head_dim = values.head_dim;
  const int64_t bytes = int64_t{head_dim} * size;
  int32_t d = 0;
  for (; d + 16 <= head_dim; d += 16) {
    f8 low[kHeads], high[kHeads];
    for (int32_t g = 0; g < kHeads; g++) low[g] = load(out + g * head_dim + d), high[g] = load(out + g * head_dim + d + 8);
    for (int32_t i = 0; i < values.count; i++) {
      const uint8_t* row = values.data + values.slots[i] * bytes + d * size;
      const f8 a = load8<kType>(row), b = load8<kType>(row + 8 * size);
      for (int32_t g = 0; g < kHeads; g++) {
        const f8 w = spread(weights[g * stride + i]);
        low[g] += w * a;
        high[g] += w * b;
      }
    }
    for (int32_t g = 0; g < kHeads; g++) store(out + g * head_dim + d, low[g]), store(out + g * head_dim + d + 8, high[g]);
  }
  for (; d < head_dim; d++) {
    for (int32_t g = 0; g < kHeads; g++) {
      float total = out[g * head_dim + d];
      for (int32_t i = 0; i < values.count; i++) total += weights[g * stride + i] * load1<kType>(values.data + values.slots[i] * bytes, d);
      out[g * head_dim + d] = total;
    }
  }
}

template <int32_t kType>
void typed_values(const StoredRows& values, const float* weights, int64_t stride, int32_t heads, float* out) {
  const int64_t step = values.head_dim;
  int32_t g = 0;
  for (; g + 4 <= heads; g += 4) typed_values<kType, 4>(values, weights + g * stride, stride, out + g * step);
  if (heads - g == 3) typed_values<kType, 3>(values, weights + g * stride, stride, out + g * step);
  if (heads - g == 2) typed_values<kType, 2>(values, weights + g * stride, stride, out + g * step);
  if (heads - g == 1) typed_values<kType, 1>(values, weights + g * stride, stride, out + g * step);
}

void weighted_values(const StoredRows& values, const float* weights, int64_t stride, int32_t heads, float* out) {
#define WKV_BODY(type) typed_values<type>(values, weights, stride, heads, out)
  WKV_BY_TYPE(values.dtype, WKV_BODY)
#undef WKV_BODY
}

float highest(const float* x, int64_t count) {
  float most = -INFINITY;
  int64_t i = 0;
  if (count >= 8) {
    f8 best = load(x);
    for (i = 8; i + 8 <= count; i += 8) {
      const f8 v = load(x + i);
      best = v > best ? v : best;
    }
    for (int32_t j = 0; j < 8; j++) most = best[j] > most ? best[j] : most;
  }
  for (; i < count; i++) most = x[i] > most ? x[i] : most;
  return most;
}

float exponentials(float* x, int64_t count, float most) {
  f8 total = spread(0.0f);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const f8 e = exponential(load(x + i) - spread(most));
    store(x + i, e);
    total += e;
  }
  float rest = sum(total);
  if (i < count) {
    f8 tail = spread(-INFINITY);
    for (int64_t j = i; j < count; j++) tail[j - i] = x[j] - most;
    tail = exponential(tail);
    for (int64_t j = i; j < count; j++) rest += x[j] = tail[j - i];
  }
  return rest;
}

void add_scaled(float* into, const float* x, float factor, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) store(into + i, load(into + i) + spread(factor) * load(x + i));
  for (; i < count; i++) into[i] += factor * x[i];
}

void merge(int32_t dtype, float w_v, const uint8_t* v, float w_r, uint8_t* r, int32_t count) {
#define WKV_BODY(type) for (int32_t i = 0; i < count; i++) store1<type>(r, i, wkv_merged(w_v, load1<type>(v, i), w_r, load1<type>(r, i)))
  WKV_BY_TYPE(dtype, WKV_BODY)
#undef WKV_BODY
}

float gap(int32_t dtype, const uint8_t* a, const uint8_t* b, int32_t count) {
  float total = 0.0f;
#define WKV_BODY(type)                                          \\
  for (int32_t i = 0; i < count; i++) {                         \\
    const float d = load1<type>(a, i) - load1<type>(b, i);      \\
    total += d * d;                                             \\
  }
  WKV_BY_TYPE(dtype, WKV_BODY)
#undef WKV_BODY
  return total;
}

template <int32_t kRows>
inline void score_rows(const float* q, int32_t head_dim, const float* keys, int64_t key_stride, int32_t count, float scale, float* out, int64_t stride) {
  for (int32_t i = 0; i < count; i += 16) {
    f8 low[kRows], high[kRows];
    for (int32_t t = 0; t < kRows; t++) low[t] = high[t] = spread(0.0f);
    for (int32_t d = 0; d < head_dim; d++) {
      const f8 a = load(keys + d * key_stride + i), b = load(keys + d * key_stride + i + 8);
      for (int32_t t = 0; t < kRows; t++) {
        const f8 w = spread(q[t * head_dim + d]);
        low[t] += w * a;
        high[t] += w * b;
      }
    }
    for (int32_t t = 0; t < kRows; t++) store(out + t * stride + i, low[t] * spread(scale)), store(out + t * stride + i + 8, high[t] * spread(scale));
  }
}

void block_scores(const float* q, int32_t rows, int32_t head_dim, const float* keys, int64_t key_stride, int32_t count, float scale, float* out, int64_t stride) {
  int32_t t = 0;
  for (; t + 4 <= rows; t += 4) score_rows<4>(q + t * head_dim, head_dim, keys, key_stride, count, scale, out + t * stride, stride);
  for (; t < rows; t++) score_rows<1>(q + t * head_dim, head_dim, keys, key_stride, count, scale, out + t * stride, stride);
}

template <int32_t kRows>
inline void value_rows(const float* weights, int64_t stride, int32_t count, const float* values, int32_t head_dim, float* out, int64_t out_stride) {
  int32_t d = 0;
  for (; d + 16 <= head_dim; d += 16) {
    f8 low[kRows], high[kRows];
    for (int32_t t = 0; t < kRows; t++) low[t] = high[t] = spread(0.0f);
    for (int32_t i = 0; i < count; i++) {
      const f8 a = load(values + int64_t{i} * head_dim + d), b = load(values + int64_t{i} * head_dim + d + 8);
      for (int32_t t = 0; t < kRows; t++) {
        const f8 w = spread(weights[t * stride + i]);
        low[t] += w * a;
        high[t] += w * b;
      }
    }
    for (int32_t t = 0; t < kRows; t++) store(out + t * out_stride + d, low[t]), store(out + t * out_stride + d + 8, high[t]);
  }
  for (; d < head_dim; d++) {
    for (int32_t t = 0; t < kRows; t++) {
      float total = 0.0f;
      for (int32_t i = 0; i < count; i++) total += weights[t * stride + i] * values[int64_t{i} * head_dim + d];
      out[t * out_stride + d] = total;
    }
  }
}

void block_values(const float* weights, int64_t stride, int32_t rows, int32_t count, const float* values, int32_t head_dim, float* out, int64_t out_stride) {
  int32_t t = 0;
  for (; t + 4 <= rows; t += 4) value_rows<4>(weights + t * stride, stride, count, values, head_dim, out + t * out_stride, out_stride);
  for (; t < rows; t++) value_rows<1>(weights + t * stride, stride, count, values, head_dim, out + t * out_stride, out_stride);
}

}  // namespace

const Loops loops = {
    WKV_TEXT(WKV_ISA), weight_row, round_row, rmsnorm, group_f32, group_int8, silu_times, read_row, write_row, scores, weighted_values,
    highest, exponentials, add_scaled, merge, gap, block_scores, block_values,
};

}  // namespace WKV_ISA
}  // namespace wkv
`,
  "cpu/loops.hpp": `/**
 * loops.hpp: the CPU library's loops over numbers, compiled once for each instruction set (loops.cpp) and picked at run time.
 *
 * Weights other than F32 lie in groups of 8 rows, so that one vector holds one column of 8 rows:
 * - F16, BF16: [group][column][8 rows].
 * - quantised: [group][block of 32 columns]: 8 f16 scales, (Q4_1) 8 f16 minima, then vectors of 32 bytes; a vector holds, row by
 *   row, 4 neighbouring columns: Q8_0 columns 4 v .. 4 v + 3 in vector v; Q4 those in its low, columns 16 + 4 v .. in its high halves.
 */
#pragma once
#include <cstdint>

namespace wkv {

/** Stored rows of a head that attention reads: row i lies at data + slots[i] * head_dim elements. */
struct StoredRows {
  const uint8_t* data;
  int32_t dtype, head_dim;
  const int32_t* slots;
  int32_t count;
};

/** Tables of a rotation from some rank on, [ranks, pairs]; pairs 0: the rows are read as they are. */
struct Rotation {
  const float* cosines;
  const float* sines;
  int32_t pairs;
};

struct Loops {
  const char* name;

  /** out[columns] = one row of a weight that is not F32. */
  void (*weight_row)(int32_t dtype, const uint8_t* weight, int32_t columns, int64_t row, float* out);
  /** x[columns] in 8 bits: per block of 32, scale = max |x| / 127 and sum = scale * sum of the rounded. */
  void (*round_row)(const float* x, int32_t columns, int8_t* rounded, float* scales, float* sums);
  void (*rmsnorm)(const float* x, const float* weight, int32_t columns, float epsilon, float* out);
  /** tile[t][8] = x[t] . the 8 rows of group \`group\`. */
  void (*group_f32)(int32_t dtype, const uint8_t* weight, int32_t columns, int32_t rows, int64_t group, const float* x, int32_t count, float* tile);
  /** The same from 8-bit rows; scales and sums are [count, columns / 32]. */
  void (*group_int8)(int32_t dtype, const uint8_t* weight, int32_t columns, int64_t group, const int8_t* x, const float* scales, const float* sums, int32_t count, float* tile);
  /** gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i]. */
  void (*silu_times)(float* gate, const float* up, int64_t count);

  void (*read_row)(int32_t dtype, const uint8_t* row, int32_t count, float* out);
  void (*write_row)(int32_t dtype, const float* values, int32_t count, uint8_t* row);
  /** scores[g * stride + i] = scale * q[g] . rotated row i, for \`heads\` query heads. */
  void (*scores)(const StoredRows& keys, const Rotation& rotation, const float* q, int32_t heads, float scale, float* scores, int64_t stride);
  /** out[g] += sum over i of weights[g * stride + i] * row i. */
  void (*weighted_values)(const StoredRows& values, const float* weights, int64_t stride, int32_t heads, float* out);
  float (*highest)(const float* x, int64_t count);
  /** x = exp(x - highest); gives the sum. */
  float (*exponentials)(float* x, int64_t count, float highest);
  /** into += factor * x. */
  void (*add_scaled)(float* into, const float* x, float factor, int64_t count);
  /** r = the merge of v into r, weighted w_v and w_r (policy.h), rounded once. */
  void (*merge)(int32_t dtype, float w_v, const uint8_t* v, float w_r, uint8_t* r, int32_t count);
  /** |a - b|^2 of two stored rows. */
  float (*gap)(int32_t dtype, const uint8_t* a, const uint8_t* b, int32_t count);

  /** scores[t][i] = scale * q[t] . column i of keys, for keys transposed [head_dim, key_stride]. */
  void (*block_scores)(const float* q, int32_t rows, int32_t head_dim, const float* keys, int64_t key_stride, int32_t count, float scale, float* scores, int64_t stride);
  /** out[t] = sum over i of weights[t][i] * values[i], rows of \`out\` out_stride apart. */
  void (*block_values)(const float* weights, int64_t stride, int32_t rows, int32_t count, const float* values, int32_t head_dim, float* out, int64_t out_stride);
};

#if defined(__x86_64__)
namespace x86_64_v1 { extern const Loops loops; }
namespace x86_64_v3 { extern const Loops loops; }
namespace x86_64_v4_vnni { extern const Loops loops; }
#else
namespace portable { extern const Loops loops; }
#endif

/** The fastest set that this processor runs. */
inline const Loops* pick_loops() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (v3 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) return &x86_64_v4_vnni::loops;
  if (v3) return &x86_64_v3::loops;
  return &x86_64_v1::loops;
#else
  return &portable::loops;
#endif
}

}  // namespace wkv
`,
  "cpu/prefill.cpp": `/**
 * prefill.cpp: wkv_prefill, many tokens of one sequence at once: causal attention whose columns are also summed into the scores.
 *
 *   p[t, i] = softmax_i(scale * rotate(q[t], len + t) . rotate(k[i], i)),  i <= len + t;  out[t] = sum_i p[t, i] v[i]
 *   a[i] += mean_g sum_t p[t, i]
 *
 * One KV head at a time: its keys are rotated and transposed once, then a task takes blocks of 16 query rows of one query head; the
 * blocks of a task, and so the order of every sum, depend on the shapes alone. Only 16 rows of weights a thread are ever in memory.
 */
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cache.hpp"

namespace wkv {
namespace {

constexpr int32_t kBlock = 16;   // query rows a block
constexpr int32_t kStripes = 8;  // tasks a query head

/** Where one KV head's share of the scratch memory lies. */
struct Work {
  int64_t length;   // kept + rows
  int64_t stride;   // length, rounded up to a vector
  float* keys;      // [D, stride], rotated
  float* values;    // [stride, D]
  float* columns;   // [G * kStripes, stride]
  float* blocks;    // [threads, kBlock, stride]
  float* q;         // [threads, kBlock, D]
  float* score;
  float* gap;
  int32_t* birth;
  int32_t* slot;
  uint8_t* new_keys;    // [rows], as stored
  uint8_t* new_values;
};

Work cut(uint8_t* scratch, const Cache& cache, int32_t threads, int64_t kept, int64_t rows, int64_t* bytes) {
  Work w;
  w.length = kept + rows;
  w.stride = (w.length + 15) / 16 * 16;
  int64_t at = 0;
  const auto take = [&](int64_t count, int64_t size) {
    uint8_t* p = scratch + at;
    at += (count * size + 63) / 64 * 64;
    return p;
  };
  const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count, 4)); };
  w.keys = floats(cache.head_dim * w.stride);
  w.values = floats(w.stride * cache.head_dim);
  w.columns = floats(int64_t{cache.group()} * kStripes * w.stride);
  w.blocks = floats(int64_t{threads} * kBlock * w.stride);
  w.q = floats(int64_t{threads} * kBlock * cache.head_dim);
  w.score = floats(w.length);
  w.gap = floats(w.length);
  w.birth = reinterpret_cast<int32_t*>(take(w.length, 4));
  w.slot = reinterpret_cast<int32_t*>(take(w.length, 4));
  w.new_keys = take(rows, cache.row_bytes());
  w.new_values = take(rows, cache.row_bytes());
  if (bytes) *bytes = at;
  return w;
}

struct Job {
  Context& ctx;
  Cache& cache;
  Tensor& qkv;
  Tensor& out;
  int32_t rows, layer, kv_head;
  int64_t head;
  float scale;
  const Work& w;

  /** Where row t's query and key are rotated. */
  int64_t position(int32_t t) const {
    const Counts& counts = cache.counts[head];
    return t + (cache.positions == WKV_POSITIONS_TEXT ? counts.steps : counts.kept);
  }

  /** Rounds the new tokens to what will be stored, and spreads all keys and values out as floats. */
  void gather() const {
    const Loops& loops = *ctx.loops;
    const Ranked r = cache.ranked(head);
    const int32_t dim = cache.head_dim;
    const int64_t bytes = cache.row_bytes();
    ctx.threads.loop(w.stride, 64, [&](int64_t begin, int64_t end, int) {
      float key[512], own[512];
      for (int64_t i = begin; i < end; i++) {
        float* value = w.values + i * dim;
        if (i >= w.length) {
          std::memset(value, 0, size_t(dim) * 4);
          for (int32_t d = 0; d < dim; d++) w.keys[d * w.stride + i] = 0.0f;
          continue;
        }
        const uint8_t *stored_key, *stored_value;
        if (i < r.count) {
          stored_key = cache.keys_of(head) + r.slot[i] * bytes;
          stored_value = cache.values_of(head) + r.slot[i] * bytes;
        } else {
          const int32_t t = static_cast<int32_t>(i - r.count);
          const float* row = qkv.row(t) + (int64_t{cache.heads} + kv_head) * dim;
          std::memcpy(key, row, size_t(dim) * 4);
          store_key(loops, cache, key, cache.rope->at(position(t), own), w.new_keys + t * bytes);
          loops.write_row(cache.dtype, row + int64_t{cache.kv_heads} * dim, dim, w.new_values + t * bytes);
          stored_key = w.new_keys + t * bytes;
          stored_value = w.new_values + t * bytes;
        }
        loops.read_row(cache.dtype, stored_value, dim, value);
        loops.read_row(cache.dtype, stored_key, dim, key);
        if (cache.positions == WKV_POSITIONS_CACHE) rotate(key, cache.rope->at(i, own));
        for (int32_t d = 0; d < dim; d++) w.keys[d * w.stride + i] = key[d];
      }
    });
  }

  /** Attention of query rows [t0, t0 + n) of one query head; adds their weights to the task's columns. */
  void block(int32_t g, int32_t t0, int32_t n, float* columns, int thread) const {
    const Loops& loops = *ctx.loops;
    const int32_t dim = cache.head_dim;
    const int64_t kept = w.length - rows, h = int64_t{kv_head} * cache.group() + g;
    float own[512];
    float* q = w.q + int64_t{thread} * kBlock * dim;
    float* weights = w.blocks + int64_t{thread} * kBlock * w.stride;
    for (int32_t t = 0; t < n; t++) {
      std::memcpy(q + t * dim, qkv.row(t0 + t) + h * dim, size_t(dim) * 4);
      cache.rope->to_half(q + t * dim);
      rotate(q + t * dim, cache.rope->at(position(t0 + t), own));
    }
    const int32_t seen = static_cast<int32_t>(kept) + t0 + n, padded = (seen + 15) / 16 * 16;
    loops.block_scores(q, n, dim, w.keys, w.stride, padded, scale, weights, w.stride);
    for (int32_t t = 0; t < n; t++) {
      float* row = weights + t * w.stride;
      const int32_t count = static_cast<int32_t>(kept) + t0 + t + 1;
      const float sum = loops.exponentials(row, count, loops.highest(row, count));
      check_sum(sum, layer);
      for (int32_t i = 0; i < count; i++) row[i] /= sum;
      std::fill(row + count, row + padded, 0.0f);
      loops.add_scaled(columns, row, 1.0f, count);
    }
    loops.block_values(weights, w.stride, n, seen, w.values, dim, out.row(t0) + h * dim, out.columns);
  }

  void attend() const {
    const int32_t tasks = cache.group() * kStripes, blocks = (rows + kBlock - 1) / kBlock;
    ctx.threads.loop(tasks, 1, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t task = begin; task < end; task++) {
        float* columns = w.columns + task * w.stride;
        std::memset(columns, 0, size_t(w.stride) * 4);
        for (int32_t b = static_cast<int32_t>(task % kStripes); b < blocks; b += kStripes) {
          block(static_cast<int32_t>(task / kStripes), b * kBlock, std::min(kBlock, rows - b * kBlock), columns, thread);
        }
      }
    });
  }

  /** Adds the column sums to the scores, and brings the head back to its budget. */
  void settle_rows() const {
    Counts& counts = cache.counts[head];
    const Ranked stored = cache.ranked(head);
    Ranked r{w.score, w.birth, w.slot, w.gap, stored.count};
    const size_t kept = size_t(stored.count) * 4;
    std::memcpy(r.score, stored.score, kept);
    std::memcpy(r.birth, stored.birth, kept);
    std::memcpy(r.slot, stored.slot, kept);
    if (cache.gapped()) std::memcpy(r.gap, stored.gap, kept);
    for (int32_t t = 0; t < rows; t++) r.add(t, counts.steps + 1 + t);
    const int32_t tasks = cache.group() * kStripes;
    for (int32_t task = 0; task < tasks; task++) ctx.loops->add_scaled(r.score, w.columns + task * w.stride, 1.0f / static_cast<float>(cache.group()), w.length);
    counts.steps += rows;
    settle(*ctx.loops, cache, head, r, Incoming{w.new_keys, w.new_values}, -1);
    const size_t left = size_t(r.count) * 4;
    std::memcpy(stored.score, r.score, left);
    std::memcpy(stored.birth, r.birth, left);
    std::memcpy(stored.slot, r.slot, left);
    if (cache.gapped()) std::memcpy(stored.gap, r.gap, left);
  }
};

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
    int64_t bytes = 0;
    cut(nullptr, *cache, ctx.threads.count(), cache->slots, rows, &bytes);
    ctx.scratch.reserve(size_t(bytes));
    ctx.submit([=, &ctx] {
      for (int32_t n = 0; n < cache->kv_heads; n++) {
        const int64_t head = cache->head(layer, sequence, n);
        const Work w = cut(ctx.scratch.data(), *cache, ctx.threads.count(), cache->counts[head].kept, rows, nullptr);
        const Job job{ctx, *cache, *from, *to, rows, layer, n, head, scale, w};
        job.gather();
        job.attend();
        job.settle_rows();
      }
    });
  });
}
`,
  "cpu/runtime.cpp": `/** runtime.cpp: contexts, tensors and graphs of the CPU library. */
#include <sched.h>
#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <new>
#include <system_error>

#include "common.hpp"

namespace wkv {

namespace {
constexpr size_t kLarge = size_t{1} << 20;
}

void* zeroed(size_t bytes) {
  if (bytes >= kLarge) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return memory;
  }
  const size_t size = (bytes + 64) / 64 * 64;
  void* memory = std::aligned_alloc(64, size);
  if (!memory) throw std::bad_alloc();
  std::memset(memory, 0, size);
  return memory;
}

void release(void* memory, size_t bytes) {
  if (bytes >= kLarge) munmap(memory, bytes);
  else std::free(memory);
}

TensorRef find_tensor(int32_t context, int32_t handle, const char* what, int32_t dtype, int32_t rows, int32_t columns) {
  TensorRef tensor = find_tensor(context, handle, what);
  require(tensor->dtype == dtype, std::string(what) + " is of another dtype (" + std::to_string(tensor->dtype) + ", expected " + std::to_string(dtype) + ")");
  require(rows >= 0 && tensor->rows >= rows, std::string(what) + " has " + std::to_string(tensor->rows) + " rows, expected at least " + std::to_string(rows));
  require(columns < 0 || tensor->columns == columns, std::string(what) + " has " + std::to_string(tensor->columns) + " columns, expected " + std::to_string(columns));
  return tensor;
}

Context::Context(int32_t count) : loops(pick_loops()), threads(count) {}

// ---- tensors ----

namespace {
bool quantised(int32_t dtype) { return dtype == WKV_Q8_0 || dtype == WKV_Q4_0 || dtype == WKV_Q4_1; }
int32_t block_bytes(int32_t dtype) { return dtype == WKV_Q8_0 ? 34 : dtype == WKV_Q4_0 ? 18 : 20; }
int64_t row_bytes(int32_t dtype, int32_t columns) {
  if (quantised(dtype)) return int64_t{columns} / 32 * block_bytes(dtype);
  return int64_t{columns} * (dtype == WKV_F16 || dtype == WKV_BF16 ? 2 : 4);
}
/** F32 and I32 lie row by row, weights of every other type in groups of 8 rows. */
bool grouped(int32_t dtype) { return dtype != WKV_F32 && dtype != WKV_I32; }

/** Puts one row in file order into its place within its group of 8. */
void scatter(int32_t dtype, int32_t columns, uint8_t* group, int32_t lane, const uint8_t* row) {
  if (!quantised(dtype)) {
    for (int32_t c = 0; c < columns; c++) std::memcpy(group + (c * 8 + lane) * 2, row + c * 2, 2);
    return;
  }
  const int32_t bytes = block_bytes(dtype), heads = dtype == WKV_Q4_1 ? 2 : 1, vectors = dtype == WKV_Q8_0 ? 8 : 4;
  for (int32_t b = 0; b < columns / 32; b++, row += bytes, group += bytes * 8) {
    for (int32_t h = 0; h < heads; h++) {
      std::memcpy(group + h * 16 + lane * 2, row + h * 2, 2);
      uint16_t half;
      std::memcpy(&half, row + h * 2, 2);
      if ((half & 0x7c00) == 0x7c00) fail(WKV_DATA, "The scale of block " + std::to_string(b) + " is not finite");
    }
    for (int32_t v = 0; v < vectors; v++) std::memcpy(group + heads * 16 + v * 32 + lane * 4, row + heads * 2 + v * 4, 4);
  }
}
}  // namespace

Tensor::Tensor(int32_t dtype, int32_t rows, int32_t columns) : Object(Kind::Tensor), dtype(dtype), rows(rows), columns(columns) {
  const int64_t stored = grouped(dtype) ? (int64_t{rows} + 7) / 8 * 8 : rows;
  memory.resize(static_cast<size_t>(stored) * static_cast<size_t>(row_bytes(dtype, columns)));  // below 2^64: 2^31 rows of 2^33 bytes
}

}  // namespace wkv

using namespace wkv;

int32_t wkv_context_open(int32_t threads, int32_t* out, int32_t out_bytes) {
  return guarded(nullptr, [&] {
    require(out != nullptr && out_bytes >= 4, "out must hold 4 bytes");
    require(threads >= 0 && threads <= 1024, "threads must be between 0 and 1024: " + std::to_string(threads));
    if (threads == 0) {
      cpu_set_t set;
      CPU_ZERO(&set);
      threads = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    }
    try {
      *out = add_handle(0, std::make_shared<Context>(threads));
    } catch (const std::system_error& error) {
      fail(WKV_MEMORY, error.what());  // a thread could not be started
    }
  });
}

int32_t wkv_device(int32_t context, char* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    require(out != nullptr && out_bytes >= 1, "out must hold a text");
    const int32_t threads = ctx.threads.count();
    const std::string text = std::string("CPU, ") + ctx.loops->name + ", " + std::to_string(threads) + (threads == 1 ? " thread" : " threads");
    give_text(text, out, out_bytes);
  });
}

int32_t wkv_tensor_open(int32_t context, int32_t dtype, int32_t rows, int32_t columns, int32_t* out, int32_t out_bytes) {
  return entry(context, [&](Context&) {
    require_buffer(out, out_bytes, 4, "out");
    require(dtype >= WKV_F32 && dtype <= WKV_Q4_1, "dtype " + std::to_string(dtype) + " is unknown");
    require(rows >= 1 && columns >= 1, "rows and columns must be at least 1: " + std::to_string(rows) + " x " + std::to_string(columns));
    require(!quantised(dtype) || columns % 32 == 0, "columns must be a multiple of 32 for quantised rows: " + std::to_string(columns));
    *out = add_handle(context, std::make_shared<Tensor>(dtype, rows, columns));
  });
}

namespace {
void check_rows(const Tensor& tensor, int32_t row, int32_t rows) {
  require(row >= 0 && rows >= 1 && row <= tensor.rows - rows, "rows " + std::to_string(row) + " to " + std::to_string(int64_t{row} + rows) + " of " + std::to_string(tensor.rows) + " asked for");
}
}  // namespace

int32_t wkv_tensor_write(int32_t context, int32_t handle, int32_t row, int32_t rows, const void* data, int32_t data_bytes) {
  return entry(context, [&](Context&) {
    const TensorRef tensor = find_tensor(context, handle, "tensor");
    check_rows(*tensor, row, rows);
    const int64_t bytes = row_bytes(tensor->dtype, tensor->columns);
    require_buffer(data, data_bytes, rows * bytes, "data");
    if (!grouped(tensor->dtype)) {
      std::memcpy(tensor->memory.data() + row * bytes, data, static_cast<size_t>(rows * bytes));
      return;
    }
    for (int64_t r = row; r < int64_t{row} + rows; r++) {
      try {
        scatter(tensor->dtype, tensor->columns, tensor->memory.data() + r / 8 * 8 * bytes, static_cast<int32_t>(r % 8), static_cast<const uint8_t*>(data) + (r - row) * bytes);
      } catch (const Failure& failure) {
        fail(failure.status, "Row " + std::to_string(r) + ": " + failure.what());
      }
    }
  });
}

int32_t wkv_tensor_read(int32_t context, int32_t handle, int32_t row, int32_t rows, void* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    const TensorRef tensor = find_tensor(context, handle, "tensor");
    check_rows(*tensor, row, rows);
    const bool as_floats = quantised(tensor->dtype);
    const int64_t bytes = as_floats ? int64_t{tensor->columns} * 4 : row_bytes(tensor->dtype, tensor->columns);
    require_buffer(out, out_bytes, rows * bytes, "out");
    auto* to = static_cast<uint8_t*>(out);
    for (int64_t r = row; r < int64_t{row} + rows; r++, to += bytes) {
      if (!grouped(tensor->dtype)) {
        std::memcpy(to, tensor->memory.data() + r * bytes, static_cast<size_t>(bytes));
      } else if (as_floats) {
        ctx.loops->weight_row(tensor->dtype, tensor->memory.data(), tensor->columns, r, reinterpret_cast<float*>(to));
      } else {
        const uint8_t* group = tensor->memory.data() + r / 8 * 8 * bytes;
        for (int32_t c = 0; c < tensor->columns; c++) std::memcpy(to + c * 2, group + (c * 8 + r % 8) * 2, 2);
      }
    }
  });
}

// ---- graphs ----

int32_t wkv_graph_begin(int32_t context) {
  return entry(context, [&](Context& ctx) {
    if (ctx.recording) fail(WKV_INVALID, "A graph is being recorded already");
    ctx.recording = std::make_shared<Graph>();
    ctx.recording_failed = false;
  });
}

int32_t wkv_graph_end(int32_t context, int32_t* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    require(ctx.recording != nullptr, "No graph is being recorded");
    const std::shared_ptr<Graph> graph = std::move(ctx.recording);
    ctx.recording.reset();
    require(!ctx.recording_failed, "An op of the graph failed when it was recorded");
    require_buffer(out, out_bytes, 4, "out");
    *out = add_handle(context, graph);
  });
}

int32_t wkv_graph_run(int32_t context, int32_t handle, int32_t times) {
  return entry(context, [&](Context& ctx) {
    ctx.running = true;  // perhaps while another thread records a graph, which this leaves alone
    require(times >= 0, "times must not be negative: " + std::to_string(times));
    const auto graph = find<Graph>(context, handle, Kind::Graph, "graph");
    for (int32_t i = 0; i < times; i++) {
      for (const Op& op : graph->ops) op();
    }
  });
}
`,
  "cpu/sample.cpp": `/** sample.cpp: wkv_sample and wkv_log_prob, from logits to tokens and to their probabilities. */
#include <algorithm>
#include <cmath>

#include "../random.h"
#include "common.hpp"

namespace wkv {
namespace {

struct Candidate {
  float logit;
  int32_t token;
};

/** Higher logit first; of equals the lower token. */
bool before(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.token < b.token; }

int32_t argmax(const float* logits, int32_t count) {
  int32_t best = -1;
  for (int32_t i = 0; i < count; i++) {
    if (std::isnan(logits[i])) fail(WKV_DATA, "The logit of token " + std::to_string(i) + " is not a number");
    if (best < 0 || logits[i] > logits[best]) best = i;
  }
  return best;
}

int32_t draw(const Loops& loops, const float* logits, int32_t count, const float* settings, int32_t* rng, std::vector<Candidate>& kept, std::vector<float>& weights) {
  const float temperature = settings[0], top_p = settings[2], min_p = settings[3];
  const int32_t top_k = static_cast<int32_t>(settings[1]);
  const int32_t best = argmax(logits, count);
  if (!(temperature > 0.0f)) return best;
  const float most = logits[best];
  // Tokens of less than e^-30 of the best one's probability cannot be drawn with 24 random bits.
  const float floor = most + (min_p > 0.0f && (top_p <= 0.0f || top_p >= 1.0f) ? std::log(min_p) : -30.0f * std::max(1.0f, temperature));
  kept.clear();
  for (int32_t i = 0; i < count; i++) {
    if (logits[i] >= floor || i == best) kept.push_back({logits[i], i});
  }
  if (top_k > 0 && static_cast<size_t>(top_k) < kept.size()) {
    std::nth_element(kept.begin(), kept.begin() + top_k, kept.end(), before);
    kept.resize(top_k);
  }
  std::sort(kept.begin(), kept.end(), before);
  if (top_p > 0.0f && top_p < 1.0f) {
    weights.clear();
    for (const Candidate& c : kept) weights.push_back(c.logit);
    const float sum = loops.exponentials(weights.data(), static_cast<int64_t>(weights.size()), most);
    float reached = 0.0f;
    size_t n = 0;
    while (n < kept.size() && reached < top_p * sum) reached += weights[n++];
    kept.resize(std::max<size_t>(n, 1));
  }
  if (min_p > 0.0f) {
    const float least = most + std::log(min_p);
    while (kept.size() > 1 && kept.back().logit < least) kept.pop_back();
  }
  weights.clear();
  for (const Candidate& c : kept) weights.push_back(c.logit / temperature);
  const float sum = loops.exponentials(weights.data(), static_cast<int64_t>(weights.size()), most / temperature);
  const uint64_t seed = static_cast<uint32_t>(rng[0]) | static_cast<uint64_t>(static_cast<uint32_t>(rng[1])) << 32;
  const float goal = wkv_uniform(seed, static_cast<uint32_t>(rng[2])) * sum;
  rng[2] = static_cast<int32_t>(static_cast<uint32_t>(rng[2]) + 1);
  float reached = 0.0f;
  for (size_t i = 0; i < kept.size(); i++) {
    reached += weights[i];
    if (reached > goal) return kept[i].token;
  }
  return kept.back().token;
}

}  // namespace
}  // namespace wkv

using namespace wkv;

int32_t wkv_sample(int32_t context, int32_t tokens, int32_t logits, int32_t settings, int32_t rng) {
  return entry(context, [&](Context& ctx) {
    const TensorRef from = find_tensor(context, logits, "logits", WKV_F32, 1, -1);
    const TensorRef rules = find_tensor(context, settings, "settings", WKV_F32, from->rows, 4);
    const TensorRef state = find_tensor(context, rng, "rng", WKV_I32, from->rows, 4);
    const TensorRef to = find_tensor(context, tokens, "tokens", WKV_I32, 1, -1);
    require(to->columns >= from->rows, "tokens has fewer columns than logits has rows");
    ctx.submit([=, &ctx] {
      ctx.threads.loop(from->rows, 1, [&](int64_t begin, int64_t end, int) {
        std::vector<Candidate> kept;
        std::vector<float> weights;
        for (int64_t b = begin; b < end; b++) {
          to->i32()[b] = draw(*ctx.loops, from->row(b), from->columns, rules->row(b), state->i32() + b * 4, kept, weights);
        }
      });
    });
  });
}

int32_t wkv_log_prob(int32_t context, int32_t out, int32_t logits, int32_t targets, int32_t rows) {
  return entry(context, [&](Context& ctx) {
    const TensorRef from = find_tensor(context, logits, "logits", WKV_F32, rows, -1);
    const TensorRef ids = find_tensor(context, targets, "targets", WKV_I32, 1, -1);
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, 1, -1);
    require(rows >= 1 && ids->columns >= rows && to->columns >= rows, "targets and out must have at least \`rows\` columns, and rows be at least 1");
    ctx.submit([=, &ctx] {
      ctx.threads.loop(rows, 1, [&](int64_t begin, int64_t end, int) {
        float piece[1024];
        for (int64_t i = begin; i < end; i++) {
          const int32_t id = ids->i32()[i];
          if (id < 0 || id >= from->columns) fail(WKV_DATA, "Target " + std::to_string(id) + " is outside the vocabulary of " + std::to_string(from->columns));
          const float* row = from->row(i);
          const float most = ctx.loops->highest(row, from->columns);
          double sum = 0.0;
          for (int32_t j = 0; j < from->columns; j += 1024) {
            const int32_t count = std::min(1024, from->columns - j);
            std::copy(row + j, row + j + count, piece);
            sum += ctx.loops->exponentials(piece, count, most);
          }
          to->f32()[i] = row[id] - most - static_cast<float>(std::log(sum));
        }
      });
    });
  });
}
`,
  "cpu/threads.cpp": `/** threads.cpp: threads that spin shortly between the loops of a step, and sleep between steps. */
#include "threads.hpp"

#include <system_error>

namespace wkv {

namespace {
// About 50 us: longer than the gap between two ops of a step, shorter than a scheduler's slice.
constexpr int kSpins = 4000;
constexpr uint64_t kOpen = uint64_t{1} << 31;
constexpr uint64_t kJoined = kOpen - 1;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}
}  // namespace

Threads::Threads(int32_t count) {
  workers_.reserve(count);
  try {
    for (int32_t i = 1; i < count; i++) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::system_error&) {  // the system has no more: fewer threads give the same results
  }
}

Threads::~Threads() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_.store(true);
    gate_.fetch_add(uint64_t{1} << 32);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Threads::run(int64_t total, int64_t grain, Call call, const void* body) {
  total_ = total;
  grain_ = grain;
  call_ = call;
  body_ = body;
  error_ = nullptr;
  next_.store(0, std::memory_order_relaxed);
  gate_.store(((gate_.load(std::memory_order_relaxed) >> 32) + 1) << 32 | kOpen);
  if (asleep_.load() > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  take(0);
  gate_.fetch_and(~kOpen);
  for (int spins = 0; (gate_.load(std::memory_order_acquire) & kJoined) > 0; spins++) {
    if (spins < kSpins) pause();
    else std::this_thread::yield();
  }
  if (error_) std::rethrow_exception(error_);
}

void Threads::take(int thread) {
  try {
    for (;;) {
      const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
      if (begin >= total_) return;
      const int64_t end = begin + grain_ < total_ ? begin + grain_ : total_;
      call_(body_, begin, end, thread);
    }
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
    next_.store(total_, std::memory_order_relaxed);
  }
}

void Threads::work(int thread) {
  uint64_t seen = 0;
  for (;;) {
    const auto fresh = [&] { return gate_.load() >> 32 != seen; };
    for (int spins = 0; !fresh() && spins < kSpins; spins++) pause();
    if (!fresh()) {
      std::unique_lock<std::mutex> lock(mutex_);
      asleep_.fetch_add(1);
      wake_.wait(lock, fresh);
      asleep_.fetch_sub(1);
    }
    if (stop_.load()) return;
    uint64_t gate = gate_.load();
    seen = gate >> 32;
    while ((gate & kOpen) && gate >> 32 == seen && !gate_.compare_exchange_weak(gate, gate + 1)) {
    }
    if (!(gate & kOpen) || gate >> 32 != seen) continue;
    take(thread);
    gate_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace wkv
`,
  "cpu/threads.hpp": `/** threads.hpp: the CPU library's parallel loop, used by every op. */
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace wkv {

/** A fixed set of threads that run one loop at a time; the caller takes part. */
class Threads {
 public:
  explicit Threads(int32_t count);
  ~Threads();
  int32_t count() const { return static_cast<int32_t>(workers_.size()) + 1; }

  /** Calls body(begin, end, thread) over [0, total) in pieces of \`grain\`, each once, on any thread; rethrows the first exception. */
  template <typename Body>
  void loop(int64_t total, int64_t grain, const Body& body) {
    if (total <= 0) return;
    if (grain < 1) grain = 1;
    if (workers_.empty() || total <= grain) {
      body(int64_t{0}, total, 0);
      return;
    }
    run(total, grain, [](const void* b, int64_t begin, int64_t end, int thread) { (*static_cast<const Body*>(b))(begin, end, thread); }, &body);
  }

 private:
  using Call = void (*)(const void*, int64_t, int64_t, int);
  void run(int64_t total, int64_t grain, Call call, const void* body);
  void take(int thread);
  void work(int thread);

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  // The loop's number (high half), whether it may be joined (kOpen), and how many workers have joined it. A worker that comes too
  // late, because another process had its core, is not waited for.
  std::atomic<uint64_t> gate_{0};
  std::atomic<int32_t> asleep_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> next_{0};
  int64_t total_ = 0, grain_ = 1;
  Call call_ = nullptr;
  const void* body_ = nullptr;
  std::exception_ptr error_;
};

}  // namespace wkv
`,
  "cuda/attend.cu": `/**
 * attend.cu: wkv_attend, one decode step of one layer in one launch: attend, accumulate scores, select, merge, insert.
 *
 *   s[g, i] = scale * rotate(q[g], len) . rotate(k[i], rank i)     i = 0..len, the new token being i = len
 *   p = softmax(s);  out[g] = sum_i p[g, i] v[i];  a[i] += mean_g p[g, i];  then steps 4 to 6 (settle in cache.cuh)
 *
 * qkv [B, (H + 2 N) D], out [B, H D]. A block owns one KV head of one sequence with all its query heads, so K and V are read once; its
 * weights [G, len + 1] stay in shared memory, or, for long caches, in scratch. Bytes moved: K and V of the cached tokens, 24 bytes of
 * state a slot, the rotation's tables (from the second-level cache). Sums are taken in a fixed order.
 */
#include <algorithm>
#include <type_traits>

#include "cache.cuh"

namespace wkv {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

struct AttendView {
  CacheView cache;
  const float* qkv;
  float* out;
  float scale;
  int32_t layer;
  const int32_t* victims;
  float* weights;  // [units, G, stride], null: in shared memory
  int32_t stride;
};

template <typename T>
size_t fixed_shared(int32_t group, int32_t dim) {
  return round_up(size_t(group) * dim * 4, 16) + 2 * round_up(size_t(dim) * sizeof(T), 16) + round_up(size_t(dim) * 4, 16) + size_t(kWarps) * group * 64 * 4;
}

/** kGroup: query heads a KV head, or more (then the rest are zeros). */
template <typename T, int kGroup>
__global__ void __launch_bounds__(kThreads) attend_kernel(AttendView a, Faults faults) {
  extern __shared__ int4 shared4[];
  __shared__ SettleArea area;
  __shared__ float most[kGroup], factor[kGroup];
  const CacheView& c = a.cache;
  const int32_t tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, dim = c.head_dim, group = c.group(), pairs = c.rope.pairs;
  const int32_t unit = blockIdx.x, n = unit % c.kv_heads;
  const int64_t head = c.first + unit, b = unit / c.kv_heads;
  Counts& counts = c.counts[head];
  const int32_t kept = counts.kept, step = counts.steps + 1, total = kept + 1;
  const Entries e = c.entries(head);
  const T *keys = c.keys_of<T>(head), *values = c.values_of<T>(head);

  uint8_t* at = reinterpret_cast<uint8_t*>(shared4);
  const auto take = [&](size_t bytes) {
    uint8_t* p = at;
    at += (bytes + 15) / 16 * 16;
    return p;
  };
  float* q = reinterpret_cast<float*>(take(size_t(kGroup) * dim * 4));  // [G, D], rotated
  T* key = reinterpret_cast<T*>(take(dim * sizeof(T)));                  // the new token, as stored
  T* value = reinterpret_cast<T*>(take(dim * sizeof(T)));
  float* turn = reinterpret_cast<float*>(take(size_t(dim) * 4));         // cosines, then sines, of the new token's place
  float* partial = reinterpret_cast<float*>(take(size_t(kWarps) * kGroup * 64 * 4));
  float* weights = a.weights ? a.weights + int64_t{unit} * kGroup * a.stride : reinterpret_cast<float*>(at);

  // The new token: q rotated at its rank or place, k and v rounded to what will be stored.
  for (int32_t i = tid; i < pairs; i += kThreads) {
    const float2 cs = c.rope.at(c.text ? step - 1 : kept, i);
    turn[i] = cs.x, turn[i + pairs] = cs.y;
  }
  __syncthreads();
  const float* row = a.qkv + b * (c.heads + 2 * c.kv_heads) * dim;
  const auto turned = [&](const float* from, int32_t d) {
    const float x = from[c.rope.source(d)];
    if (d >= 2 * pairs) return x;
    const int32_t i = d < pairs ? d : d - pairs;
    const float other = from[c.rope.source(d < pairs ? d + pairs : i)];
    return d < pairs ? x * turn[i] - other * turn[i + pairs] : other * turn[i + pairs] + x * turn[i];
  };
  for (int32_t i = tid; i < kGroup * dim; i += kThreads) {
    const int32_t g = i / dim;
    q[i] = g < group ? turned(row + (int64_t{n} * group + g) * dim, i % dim) : 0.0f;
  }
  const float *k = row + (int64_t{c.heads} + n) * dim, *v = k + int64_t{c.kv_heads} * dim;
  for (int32_t d = tid; d < dim; d += kThreads) {
    key[d] = from_float<T>(c.text ? turned(k, d) : k[c.rope.source(d)]);
    value[d] = from_float<T>(v[d]);
  }
  __syncthreads();

  // Scores: a warp a slot.
  const int32_t turns = c.text ? 0 : pairs;
  for (int32_t s = warp; s < total; s += kWarps) {
    const T* from = s < kept ? keys + int64_t{s} * dim : key;
    const int64_t rank = s < kept ? e.rank[s] : kept;
    float sum[kGroup] = {};
    for (int32_t i = lane; i < turns; i += 32) {
      const float x = to_float(from[i]), y = to_float(from[i + turns]);
      const float cosine = c.rope.cosines[rank * turns + i], sine = c.rope.sines[rank * turns + i];
      const float first = x * cosine - y * sine, second = x * sine + y * cosine;
#pragma unroll
      for (int g = 0; g < kGroup; g++) sum[g] = fmaf(first, q[g * dim + i], fmaf(second, q[g * dim + i + turns], sum[g]));
    }
    for (int32_t d = 2 * turns + lane; d < dim; d += 32) {
      const float x = to_float(from[d]);
#pragma unroll
      for (int g = 0; g < kGroup; g++) sum[g] = fmaf(x, q[g * dim + d], sum[g]);
    }
#pragma unroll
    for (int g = 0; g < kGroup; g++) {
      const float score = warp_sum(sum[g]) * a.scale;
      if (lane == 0) weights[int64_t{g} * a.stride + s] = score;
    }
  }
  __syncthreads();

  // Softmax.
  for (int g = 0; g < kGroup; g++) {
    float highest = -INFINITY;
    for (int32_t s = tid; s < total; s += kThreads) highest = fmaxf(highest, weights[int64_t{g} * a.stride + s]);
    highest = warp_max(highest);
    if (lane == 0) partial[g * kWarps + warp] = highest;
  }
  __syncthreads();
  if (tid < kGroup) {
    float highest = partial[tid * kWarps];
    for (int w = 1; w < kWarps; w++) highest = fmaxf(highest, partial[tid * kWarps + w]);
    most[tid] = highest;
  }
  __syncthreads();
  for (int g = 0; g < kGroup; g++) {
    float sum = 0.0f;
    for (int32_t s = tid; s < total; s += kThreads) {
      float* w = weights + int64_t{g} * a.stride + s;
      const float p = expf(*w - most[g]);
      *w = p;
      sum += p;
    }
    sum = warp_sum(sum);
    if (lane == 0) partial[g * kWarps + warp] = sum;
  }
  __syncthreads();
  if (tid < kGroup) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; w++) sum += partial[tid * kWarps + w];
    factor[tid] = 1.0f / sum;
    if (tid < group && !is_sum(sum)) faults.report(Fault::NanAttention, a.layer);
  }
  __syncthreads();

  // Output: 64 dimensions at a time, a warp a slot, two dimensions a lane.
  for (int32_t d0 = 0; d0 < dim; d0 += 64) {
    const int32_t d = d0 + 2 * lane;
    float x[kGroup] = {}, y[kGroup] = {};
    if (d < dim) {
      for (int32_t s = warp; s < total; s += kWarps) {
        const T* from = s < kept ? values + int64_t{s} * dim : value;
        const float v0 = to_float(from[d]), v1 = to_float(from[d + 1]);
#pragma unroll
        for (int g = 0; g < kGroup; g++) {
          const float p = weights[int64_t{g} * a.stride + s];
          x[g] = fmaf(p, v0, x[g]), y[g] = fmaf(p, v1, y[g]);
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kGroup; g++) {
      partial[(warp * kGroup + g) * 64 + 2 * lane] = x[g];
      partial[(warp * kGroup + g) * 64 + 2 * lane + 1] = y[g];
    }
    __syncthreads();
    for (int32_t i = tid; i < group * 64; i += kThreads) {
      const int32_t g = i / 64, to = d0 + i % 64;
      float sum = 0.0f;
      for (int w = 0; w < kWarps; w++) sum += partial[(w * kGroup + g) * 64 + i % 64];
      if (to < dim) a.out[(b * c.heads + int64_t{n} * group + g) * dim + to] = sum * factor[g];
    }
    __syncthreads();
  }

  // Scores of the policy.
  for (int32_t s = tid; s < total; s += kThreads) {
    float score = s < kept ? e.score[s] : 0.0f;
    for (int g = 0; g < group; g++) score += weights[int64_t{g} * a.stride + s] * (factor[g] / static_cast<float>(group));
    e.score[s] = score;
    if (s == kept) e.birth[s] = step, e.rank[s] = kept;
  }
  if (tid == 0) counts.steps = step;
  __syncthreads();
  settle<T>(c, head, e, kept, 1, key, value, a.victims ? a.victims[unit] : -1, faults, area);
}

template <typename T, int kGroup>
void launch(Context& ctx, const Cache& cache, AttendView a) {
  const int32_t units = cache.sequences * cache.kv_heads;
  size_t shared = fixed_shared<T>(kGroup, cache.head_dim);
  a.stride = divide_up(cache.slots + 1, 32) * 32;
  const size_t weights = size_t(kGroup) * a.stride * 4;
  a.weights = nullptr;
  if (shared + weights + 2048 <= size_t(ctx.shared_limit)) shared += weights;
  else a.weights = reinterpret_cast<float*>(ctx.reserve(weights * units));
  const auto kernel = attend_kernel<T, kGroup>;
  allow_shared(kernel, shared);
  kernel<<<units, kThreads, shared, ctx.stream>>>(a, ctx.faults());
}

template <typename T>
void by_group(Context& ctx, const Cache& cache, const AttendView& a) {
  switch (cache.group()) {
    case 1: return launch<T, 1>(ctx, cache, a);
    case 2: return launch<T, 2>(ctx, cache, a);
    case 3: return launch<T, 3>(ctx, cache, a);
    case 4: return launch<T, 4>(ctx, cache, a);
    case 5: return launch<T, 5>(ctx, cache, a);
    case 6: return launch<T, 6>(ctx, cache, a);
    case 7: return launch<T, 7>(ctx, cache, a);
    case 8: return launch<T, 8>(ctx, cache, a);
    default: return launch<T, 16>(ctx, cache, a);
  }
}

}  // namespace
}  // namespace wkv

using namespace wkv;

int32_t wkv_attend(int32_t context, int32_t handle, int32_t layer, int32_t out, int32_t qkv, float scale, int32_t victims) {
  return entry(context, [&](Context& ctx) {
    const CacheRef cache = find_cache(context, handle, layer);
    const TensorRef from = find_tensor(context, qkv, "qkv", WKV_F32, cache->sequences, (cache->heads + 2 * cache->kv_heads) * cache->head_dim);
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, cache->sequences, cache->heads * cache->head_dim);
    const TensorRef forced = find_victims(context, victims, *cache);
    ctx.hold(cache, from, to, forced);
    AttendView a{};
    a.cache = cache->view(layer);
    a.qkv = from->f32();
    a.out = to->f32();
    a.scale = scale;
    a.layer = layer;
    a.victims = forced ? forced->i32() : nullptr;
    by_cache_type(cache->dtype, [&](auto type) { by_group<decltype(type)>(ctx, *cache, a); });
    ctx.submitted();
  });
}
`,
  "cuda/cache.cu": `/**
 * cache.cu: rotations and caches, and wkv_insert: steps 3 to 6 with given weights (select, merge and insert are settle in cache.cuh).
 *
 *   a[i] += weights[rank[i]];  then one settle a head                kv [B, 2 N D], weights [B, N (M + 1)]
 *
 * A block owns one KV head of one sequence. Bytes moved: the head's state (12 bytes a slot, read and written), its weights, three rows.
 */
#include "cache.cuh"

#include <cmath>
#include <cstring>

namespace wkv {

void Cache::check_layer(int32_t layer) const {
  require(layer >= 0 && layer < layers, "layer must be between 0 and " + std::to_string(layers - 1) + ": " + std::to_string(layer));
}

CacheView Cache::view(int32_t layer) const {
  CacheView v;
  v.sequences = sequences, v.heads = heads, v.kv_heads = kv_heads, v.head_dim = head_dim, v.slots = slots, v.sinks = sinks, v.recent = recent, v.select = select, v.merge = merge;
  v.text = positions == WKV_POSITIONS_TEXT;
  v.first = head(layer, 0, 0);
  v.keys = memory->as<uint8_t>(keys_at);
  v.values = memory->as<uint8_t>(values_at);
  v.scores = memory->as<float>(scores_at);
  v.births = memory->as<int32_t>(births_at);
  v.ranks = memory->as<int32_t>(ranks_at);
  v.gaps = gapped() ? memory->as<float>(gaps_at) : nullptr;
  v.averages = gapped() ? memory->as<float>(averages_at) : nullptr;
  v.counts = memory->as<Counts>(counts_at);
  v.rope = rope->view();
  return v;
}

CacheRef find_cache(int32_t context, int32_t handle, int32_t layer) {
  const CacheRef cache = find<Cache>(context, handle, Kind::Cache, "cache");
  cache->check_layer(layer);
  return cache;
}

TensorRef find_victims(int32_t context, int32_t handle, const Cache& cache) {
  return handle ? find_tensor(context, handle, "victims", WKV_I32, cache.sequences, cache.kv_heads) : TensorRef();
}

namespace {

template <typename T>
__global__ void __launch_bounds__(256) insert_kernel(CacheView c, const float* kv, const float* weights, const int32_t* victims, Faults faults) {
  __shared__ SettleArea area;
  __shared__ T key[512], value[512];
  const int32_t unit = blockIdx.x, n = unit % c.kv_heads, dim = c.head_dim;
  const int64_t head = c.first + unit, b = unit / c.kv_heads;
  Counts& counts = c.counts[head];
  const int32_t kept = counts.kept, step = counts.steps + 1;
  const Entries e = c.entries(head);
  const float *k = kv + b * 2 * c.kv_heads * dim + int64_t{n} * dim, *v = k + int64_t{c.kv_heads} * dim;
  for (int32_t i = threadIdx.x; i < dim; i += blockDim.x) {
    float x = k[c.rope.source(i)];
    if (c.text && i < 2 * c.rope.pairs) {
      const int32_t pair = i % c.rope.pairs;
      const float2 turn = c.rope.at(step - 1, pair);
      const float other = k[c.rope.source(i < c.rope.pairs ? i + c.rope.pairs : pair)];
      x = i < c.rope.pairs ? x * turn.x - other * turn.y : other * turn.y + x * turn.x;
    }
    key[i] = from_float<T>(x);
    value[i] = from_float<T>(v[i]);
  }
  const float* given = weights + int64_t{unit} * (c.slots + 1);
  for (int32_t i = threadIdx.x; i <= kept; i += blockDim.x) {
    if (i == kept) e.score[i] = given[kept], e.birth[i] = step, e.rank[i] = kept;
    else e.score[i] += given[e.rank[i]];
  }
  __syncthreads();
  if (threadIdx.x == 0) counts.steps = step;
  __syncthreads();
  settle<T>(c, head, e, kept, 1, key, value, victims ? victims[unit] : -1, faults, area);
}

constexpr Counts kEmpty = {0, 0, 0, 0, {-1.0f, -1.0f, 0.0f, 0.0f}};

}  // namespace
}  // namespace wkv

using namespace wkv;

int32_t wkv_rope_open(int32_t context, int32_t head_dim, int32_t pairs, const float* frequencies, int32_t frequencies_bytes, int32_t positions, int32_t* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    require_buffer(out, out_bytes, 4, "out");
    require(head_dim >= 2 && head_dim <= 512, "head_dim must be between 2 and 512: " + std::to_string(head_dim));
    require(pairs == WKV_PAIRS_HALF || pairs == WKV_PAIRS_INTERLEAVED, "pairs " + std::to_string(pairs) + " is unknown");
    require(positions >= 0 && positions <= 1 << 21, "positions must be between 0 and 2097152: " + std::to_string(positions));
    require(frequencies != nullptr && frequencies_bytes > 0 && frequencies_bytes % 4 == 0 && frequencies_bytes / 4 * 2 <= head_dim, "frequencies must hold between 1 and head_dim / 2 floats");
    auto rope = std::make_shared<Rope>();
    rope->head_dim = head_dim;
    rope->pairs = pairs;
    rope->count = frequencies_bytes / 4;
    rope->positions = positions;
    std::vector<double> wide;
    for (int32_t i = 0; i < rope->count; i++) {
      require(std::isfinite(frequencies[i]), "frequency " + std::to_string(i) + " is not finite");
      wide.push_back(frequencies[i]);
    }
    const size_t count = size_t(positions) * rope->count;
    std::vector<float> tables(count * 2);
    for (size_t i = 0; i < count; i++) {
      const double angle = wide[i % rope->count] * static_cast<double>(i / rope->count);
      tables[i] = static_cast<float>(std::cos(angle));
      tables[i + count] = static_cast<float>(std::sin(angle));
    }
    rope->tables = std::make_shared<DeviceMemory>(count * 8);
    rope->frequencies = std::make_shared<DeviceMemory>(wide.size() * 8);
    if (count) ctx.copy(rope->tables->as<void>(), tables.data(), count * 8);
    ctx.copy(rope->frequencies->as<void>(), wide.data(), wide.size() * 8);
    *out = add_handle(context, rope);
  });
}

int32_t wkv_cache_open(int32_t context, int32_t rope, int32_t layers, int32_t sequences, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t slots, int32_t sinks, int32_t recent, int32_t select, int32_t merge, int32_t positions, int32_t dtype, int32_t* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    require_buffer(out, out_bytes, 4, "out");
    auto cache = std::make_shared<Cache>();
    cache->rope = find<Rope>(context, rope, Kind::Rope, "rope");
    require(layers >= 1 && layers <= 1024 && sequences >= 1 && sequences <= 4096, "layers must be between 1 and 1024, sequences between 1 and 4096");
    require(kv_heads >= 1 && kv_heads <= 1024 && heads >= kv_heads && heads % kv_heads == 0, "heads must be a multiple of kv_heads: " + std::to_string(heads) + ", " + std::to_string(kv_heads));
    require(cache->rope->head_dim == head_dim, "head_dim " + std::to_string(head_dim) + " is not the rotation's " + std::to_string(cache->rope->head_dim));
    require(slots >= 1, "slots must be at least 1: " + std::to_string(slots));
    require(sinks >= 0 && recent >= 0 && int64_t{sinks} + recent <= slots, "sinks + recent must be between 0 and slots: " + std::to_string(sinks) + " + " + std::to_string(recent) + " of " + std::to_string(slots));
    require(select >= WKV_SELECT_NONE && select <= WKV_SELECT_MERGE_COST_LINEAR, "select " + std::to_string(select) + " is unknown");
    require(merge == WKV_MERGE_NONE || merge == WKV_MERGE_RIGHT, "merge " + std::to_string(merge) + " is unknown");
    require(positions == WKV_POSITIONS_CACHE || positions == WKV_POSITIONS_TEXT, "positions " + std::to_string(positions) + " is unknown");
    require(positions == WKV_POSITIONS_TEXT || cache->rope->positions > slots, "the rotation's tables reach " + std::to_string(cache->rope->positions) + " positions, expected more than " + std::to_string(slots));
    require(dtype == WKV_F32 || dtype == WKV_F16 || dtype == WKV_BF16, "dtype " + std::to_string(dtype) + " is not a cache type");
    cache->layers = layers;
    cache->sequences = sequences;
    cache->heads = heads;
    cache->kv_heads = kv_heads;
    cache->head_dim = head_dim;
    cache->slots = slots;
    cache->sinks = sinks;
    cache->recent = recent;
    cache->select = select;
    cache->merge = merge;
    cache->positions = positions;
    cache->dtype = dtype;
    require(heads / kv_heads <= 16, "the CUDA library takes at most 16 query heads a KV head: " + std::to_string(heads / kv_heads));
    require(head_dim % 2 == 0, "the CUDA library takes even head dimensions: " + std::to_string(head_dim));
    const size_t all = size_t(layers) * sequences * kv_heads, entries = all * (size_t(slots) + 1);
    size_t bytes = 0;
    const auto take = [&](size_t part) {
      const size_t at = bytes;
      bytes += round_up(part);
      return at;
    };
    cache->keys_at = take(all * slots * cache->row_bytes());
    cache->values_at = take(all * slots * cache->row_bytes());
    cache->scores_at = take(entries * 4);
    cache->births_at = take(entries * 4);
    cache->ranks_at = take(entries * 4);
    cache->gaps_at = take(cache->gapped() ? entries * 4 : 0);
    cache->averages_at = take(cache->gapped() ? entries * 4 : 0);
    cache->counts_at = take(all * sizeof(Counts));
    cache->memory = std::make_shared<DeviceMemory>(bytes);
    ctx.zero(cache->memory->as<void>(), bytes);
    const std::vector<Counts> empty(all, kEmpty);
    ctx.copy(cache->memory->as<void>(cache->counts_at), empty.data(), all * sizeof(Counts));
    *out = add_handle(context, cache);
  });
}

int32_t wkv_cache_reset(int32_t context, int32_t handle, int32_t sequence) {
  return entry(context, [&](Context& ctx) {
    const CacheRef cache = find_cache(context, handle, 0);
    require(sequence >= -1 && sequence < cache->sequences, "sequence must be between -1 and " + std::to_string(cache->sequences - 1) + ": " + std::to_string(sequence));
    const size_t a_layer = size_t(cache->sequences) * cache->kv_heads, count = sequence < 0 ? a_layer * cache->layers : size_t(cache->kv_heads);
    const std::vector<Counts> empty(count, kEmpty);
    Counts* counts = cache->memory->as<Counts>(cache->counts_at);
    if (sequence < 0) {
      ctx.copy(counts, empty.data(), count * sizeof(Counts));
      return;
    }
    for (int32_t layer = 0; layer < cache->layers; layer++) ctx.copy(counts + cache->head(layer, sequence, 0), empty.data(), count * sizeof(Counts));
  });
}

int32_t wkv_cache_read(int32_t context, int32_t handle, int32_t field, int32_t layer, int32_t sequence, int32_t kv_head, void* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    const CacheRef cache = find_cache(context, handle, layer);
    require(sequence >= 0 && sequence < cache->sequences, "sequence must be between 0 and " + std::to_string(cache->sequences - 1) + ": " + std::to_string(sequence));
    require(kv_head >= 0 && kv_head < cache->kv_heads, "kv_head must be between 0 and " + std::to_string(cache->kv_heads - 1) + ": " + std::to_string(kv_head));
    const int64_t head = cache->head(layer, sequence, kv_head);
    const CacheView view = cache->view(layer);
    Counts counts;
    ctx.copy(&counts, view.counts + head, sizeof counts);
    const bool rows = field == WKV_CACHE_KEYS || field == WKV_CACHE_VALUES;
    const int64_t kept = counts.kept, want = field == WKV_CACHE_COUNTS || field == WKV_CACHE_EVENT ? 16 : kept * (rows ? cache->head_dim : 1) * 4;
    require(out_bytes == want, "out has " + std::to_string(out_bytes) + " bytes, expected " + std::to_string(want));
    if (want == 0) return;
    require(out != nullptr, "out is null");
    if (field == WKV_CACHE_COUNTS || field == WKV_CACHE_EVENT) {
      std::memcpy(out, field == WKV_CACHE_COUNTS ? static_cast<const void*>(&counts) : counts.event, 16);
      return;
    }
    // Everything else comes out in rank order.
    const int64_t at = head * (cache->slots + 1);
    std::vector<int32_t> ranks(kept), slots(kept);
    ctx.copy(ranks.data(), view.ranks + at, size_t(kept) * 4);
    for (int64_t slot = 0; slot < kept; slot++) {
      if (ranks[slot] < 0 || ranks[slot] >= kept) fail(WKV_INTERNAL, "Slot " + std::to_string(slot) + " has rank " + std::to_string(ranks[slot]) + " of " + std::to_string(kept));
      slots[ranks[slot]] = static_cast<int32_t>(slot);
    }
    auto* ints = static_cast<int32_t*>(out);
    auto* floats = static_cast<float*>(out);
    if (field == WKV_CACHE_SLOTS) {
      std::memcpy(out, slots.data(), size_t(want));
      return;
    }
    if (field == WKV_CACHE_POSITIONS || field == WKV_CACHE_STEPS || field == WKV_CACHE_SCORES) {
      std::vector<int32_t> state(kept);
      const void* from = view.births + at;
      if (field == WKV_CACHE_SCORES) from = view.scores + at;
      ctx.copy(state.data(), from, size_t(kept) * 4);
      for (int64_t i = 0; i < kept; i++) {
        const int32_t x = state[slots[i]];
        ints[i] = field == WKV_CACHE_POSITIONS ? x - 1 : field == WKV_CACHE_STEPS ? counts.steps - x + 1 : x;
      }
      return;
    }
    require(rows, "field " + std::to_string(field) + " is unknown");
    const int32_t dim = cache->head_dim;
    std::vector<uint8_t> stored(size_t(kept * cache->row_bytes()));
    ctx.copy(stored.data(), (field == WKV_CACHE_KEYS ? view.keys : view.values) + head * cache->slots * cache->row_bytes(), stored.size());
    for (int64_t i = 0; i < kept; i++, floats += dim) {
      const uint8_t* from = stored.data() + slots[i] * cache->row_bytes();
      for (int32_t d = 0; d < dim; d++) {
        float x;
        if (cache->dtype == WKV_F32) std::memcpy(&x, from + d * 4, 4);
        else if (cache->dtype == WKV_F16) x = __half2float(reinterpret_cast<const __half*>(from)[d]);
        else x = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(from)[d]);
        floats[field == WKV_CACHE_KEYS ? view.rope.source(d) : d] = x;
      }
    }
  });
}

int32_t wkv_insert(int32_t context, int32_t handle, int32_t layer, int32_t kv, int32_t weights, int32_t victims) {
  return entry(context, [&](Context& ctx) {
    const CacheRef cache = find_cache(context, handle, layer);
    const int32_t n_heads = cache->kv_heads;
    const TensorRef rows = find_tensor(context, kv, "kv", WKV_F32, cache->sequences, 2 * n_heads * cache->head_dim);
    const TensorRef given = find_tensor(context, weights, "weights", WKV_F32, cache->sequences, n_heads * (cache->slots + 1));
    const TensorRef forced = find_victims(context, victims, *cache);
    ctx.hold(cache, rows, given, forced);
    by_cache_type(cache->dtype, [&](auto type) {
      insert_kernel<decltype(type)><<<cache->sequences * n_heads, 256, 0, ctx.stream>>>(cache->view(layer), rows->f32(), given->f32(), forced ? forced->i32() : nullptr, ctx.faults());
    });
    ctx.submitted();
  });
}
`,
  "cuda/cache.cuh": `/**
 * cache.cuh: the cache of the CUDA library and steps 3 to 6 of a decode step, shared by attend.cu, cache.cu and prefill.cu.
 *
 * Slots never move; \`ranks[slot]\` is a token's rank. The used slots of a head are always 0 .. kept - 1. State has room for slots + 1
 * entries, the last of which a new token holds until it takes its victim's slot. Everything that a step changes lies on the device.
 */
#pragma once
#include <climits>

#include "../policy.h"
#include "common.cuh"

namespace wkv {

/** Counters of one head; \`event\` as WKV_CACHE_EVENT. */
struct Counts {
  int32_t kept, steps, merged, evicted;
  float event[4];
};

/** Cosine and sine of an angle that the tables do not reach; a call, as in line it would double every kernel. */
static __device__ __noinline__ float2 turn_beyond(double angle) {
  double s, c;
  sincos(angle, &s, &c);
  return make_float2(static_cast<float>(c), static_cast<float>(s));
}

/** A rotation as kernels see it. */
struct RopeView {
  int32_t pairs, positions;      // pairs that are rotated; positions that the tables reach
  bool interleaved;              // the model's order
  const float *cosines, *sines;  // [positions, pairs]
  const double* frequencies;

  /** Where dimension d of the library's own order, in which the rotated pairs are (i, i + pairs), lies in the model's. */
  __host__ __device__ int32_t source(int32_t d) const {
    if (!interleaved || d >= 2 * pairs) return d;
    return d < pairs ? 2 * d : 2 * (d - pairs) + 1;
  }
  /** Cosine and sine of pair i at a position. */
  __device__ float2 at(int64_t position, int32_t i) const {
    if (position < positions) return make_float2(cosines[position * pairs + i], sines[position * pairs + i]);
    return turn_beyond(frequencies[i] * static_cast<double>(position));
  }
};

struct Rope : Object {
  int32_t head_dim, pairs, count, positions;
  DeviceRef tables, frequencies;
  Rope() : Object(Kind::Rope) {}
  size_t bytes() const override { return tables->bytes(); }
  RopeView view() const {
    const float* cosines = tables->as<float>();
    return {count, positions, pairs == WKV_PAIRS_INTERLEAVED, cosines, cosines + int64_t{positions} * count, frequencies->as<double>()};
  }
};
using RopeRef = std::shared_ptr<Rope>;

/** State of some tokens of one head, by entry. */
struct Entries {
  float* score;
  int32_t* birth;  // the step that fed the token, from 1: its place in the text + 1
  int32_t* rank;   // -1: it has left
  float* gap;      // |V_j - V_r|^2 with the right neighbour, for rules that ask for it; else null
  float* average;  // [ranks] scratch, for the same rules
  int32_t* freed;  // scratch: slots that victims left, in order; null where there is one at most
};

/** A cache, or one layer of it, as kernels see it. */
struct CacheView {
  int32_t sequences, heads, kv_heads, head_dim, slots, sinks, recent, select, merge;
  bool text;        // keys are rotated once, at their place in the text
  int64_t first;    // the layer's first head
  uint8_t *keys, *values;
  float *scores, *gaps, *averages;
  int32_t *births, *ranks;
  Counts* counts;
  RopeView rope;

  __device__ int32_t group() const { return heads / kv_heads; }
  template <typename T>
  __device__ T* keys_of(int64_t head) const { return reinterpret_cast<T*>(keys) + head * slots * head_dim; }
  template <typename T>
  __device__ T* values_of(int64_t head) const { return reinterpret_cast<T*>(values) + head * slots * head_dim; }
  __device__ bool gapped() const { return gaps != nullptr; }
  __device__ Entries entries(int64_t head) const {
    const int64_t at = head * (slots + 1);
    return {scores + at, births + at, ranks + at, gaps ? gaps + at : nullptr, averages ? averages + at : nullptr, nullptr};
  }
};

struct Cache : Object {
  RopeRef rope;
  int32_t layers, sequences, heads, kv_heads, head_dim, slots, sinks, recent, select, merge, positions, dtype;
  DeviceRef memory;
  size_t keys_at, values_at, scores_at, births_at, ranks_at, gaps_at, averages_at, counts_at;
  Cache() : Object(Kind::Cache) {}
  size_t bytes() const override { return memory->bytes(); }
  bool gapped() const { return wkv_select_uses_gap(select); }
  int32_t group() const { return heads / kv_heads; }
  int64_t row_bytes() const { return int64_t{head_dim} * (dtype == WKV_F32 ? 4 : 2); }
  int64_t head(int32_t layer, int32_t sequence, int32_t kv_head) const { return (int64_t{layer} * sequences + sequence) * kv_heads + kv_head; }
  void check_layer(int32_t layer) const;
  CacheView view(int32_t layer) const;
};
using CacheRef = std::shared_ptr<Cache>;

CacheRef find_cache(int32_t context, int32_t handle, int32_t layer);
TensorRef find_victims(int32_t context, int32_t handle, const Cache& cache);

/** Calls body with a value of the cache's element type. */
template <typename Body>
void by_cache_type(int32_t dtype, Body body) {
  if (dtype == WKV_F32) body(float());
  else if (dtype == WKV_F16) body(__half());
  else body(__nv_bfloat16());
}

/** Whether a softmax's sum is a number: it is none when a query or key was none. */
__device__ inline bool is_sum(float sum) { return sum > 0.0f && sum <= 3.4e38f; }

// ---- select, merge, insert: one block a head ----

/** Shared memory of settle. */
struct SettleArea {
  float value[32];
  int32_t rank[32], bad[32];
  int32_t victim;          // its rank
  int32_t around[4];       // entries of the ranks victim - 1 .. victim + 2; -1: none
  int32_t freed, arrived_left, first_freed;
  float w_v, w_r;
};

/** |a - b|^2 of two stored rows, by one warp. */
template <typename T>
__device__ inline float warp_gap(const T* a, const T* b, int32_t dim) {
  float total = 0.0f;
  for (int32_t d = threadIdx.x & 31; d < dim; d += 32) {
    const float x = to_float(a[d]) - to_float(b[d]);
    total += x * x;
  }
  return warp_sum(total);
}

/**
 * Steps 4 to 6 for one head: entries [0, kept) are its slots, [kept, kept + arrived) the incoming tokens, whose rows are in_keys and
 * in_values; scores already have this step's weights, counts->steps counts it. While more than \`slots\` are left the policy's victim (or
 * rank \`forced\`, -1: none) leaves, merged into its right neighbour or dropped; what is left of the incoming tokens then goes into free
 * slots. \`e\` is the head's own state or, when more than one token arrives, a copy, which is written back. All threads call it.
 */
template <typename T>
__device__ void settle(const CacheView& c, int64_t head, const Entries& e, int32_t kept, int32_t arrived, T* in_keys, T* in_values, int32_t forced, const Faults& faults, SettleArea& area) {
  const int32_t tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, warps = blockDim.x >> 5, dim = c.head_dim, total = kept + arrived;
  Counts& counts = c.counts[head];
  T *keys = c.keys_of<T>(head), *values = c.values_of<T>(head);
  const auto value_of = [&](int32_t entry) { return entry < kept ? values + int64_t{entry} * dim : in_values + int64_t{entry - kept} * dim; };
  const int32_t step = counts.steps;
  const auto average = [&](int32_t entry) { return wkv_average(e.score[entry], step - e.birth[entry] + 1); };
  if (tid == 0) area.freed = 0, area.arrived_left = arrived, area.around[0] = -1;
  __syncthreads();
  if (c.gapped()) {
    for (int32_t i = tid; i < kept; i += blockDim.x) {
      if (e.rank[i] == kept - 1) area.around[0] = i;
    }
    __syncthreads();
    for (int32_t i = kept - 1 + warp; i < total - 1; i += warps) {
      const int32_t entry = i < kept ? area.around[0] : i;
      if (entry < 0) continue;
      const float gap = warp_gap(value_of(entry), value_of(i + 1), dim);
      if (lane == 0) e.gap[entry] = gap;
    }
    __syncthreads();
  }
  if (total > c.slots && c.select == WKV_SELECT_NONE) {
    if (tid == 0) faults.report(Fault::Full, c.slots);
    return;
  }
  for (int32_t count = total; count > c.slots; count--) {
    // Select.
    if (forced == -1) {
      if (c.gapped()) {
        for (int32_t i = tid; i < total; i += blockDim.x) {
          if (e.rank[i] >= 0) e.average[e.rank[i]] = average(i);
        }
        __syncthreads();
      }
      float least = INFINITY;
      int32_t best = INT_MAX, bad = INT_MAX;
      for (int32_t i = tid; i < total; i += blockDim.x) {
        const int32_t rank = e.rank[i];
        if (rank < 0 || !wkv_evictable(rank, count, c.sinks, c.recent)) continue;
        float value = INFINITY;  // the newest has no right neighbour to be merged with
        if (!c.gapped()) value = wkv_select_value(c.select, rank, average(i), 0.0f, 0.0f);
        else if (rank + 1 < count) value = wkv_select_value(c.select, rank, e.average[rank], e.average[rank + 1], e.gap[i]);
        if (isnan(value)) bad = min(bad, rank);
        if (value < least || (value == least && rank < best)) least = value, best = rank;
      }
#pragma unroll
      for (int o = 16; o > 0; o >>= 1) {
        const float v = __shfl_xor_sync(0xffffffffu, least, o);
        const int32_t r = __shfl_xor_sync(0xffffffffu, best, o);
        if (v < least || (v == least && r < best)) least = v, best = r;
      }
      bad = __reduce_min_sync(0xffffffffu, bad);
      if (lane == 0) area.value[warp] = least, area.rank[warp] = best, area.bad[warp] = bad;
      __syncthreads();
      if (tid == 0) {
        for (int w = 1; w < warps; w++) {
          if (area.value[w] < least || (area.value[w] == least && area.rank[w] < best)) least = area.value[w], best = area.rank[w];
          bad = min(bad, area.bad[w]);
        }
        area.victim = best == INT_MAX ? -1 : best;
        area.bad[0] = bad;
      }
    } else if (tid == 0) {
      area.victim = forced, area.bad[0] = INT_MAX;
    }
    if (tid < 4) area.around[tid] = -1;
    __syncthreads();
    const int32_t j = area.victim, bad = area.bad[0];
    if (bad != INT_MAX) {
      if (tid == 0) faults.report(Fault::NanScore, bad);
      return;
    }
    if (!wkv_evictable(j, count, c.sinks, c.recent)) {
      if (tid == 0) faults.report(Fault::Rank, j, count, c.sinks, c.recent);
      return;
    }
    // Take the rank out.
    for (int32_t i = tid; i < total; i += blockDim.x) {
      const int32_t rank = e.rank[i];
      if (rank >= j - 1 && rank <= j + 2 && rank >= 0) area.around[rank - j + 1] = i;
      if (rank == j) e.rank[i] = -1;
      else if (rank > j) e.rank[i] = rank - 1;
    }
    __syncthreads();
    const int32_t left = area.around[0], victim = area.around[1], right = area.around[2], far = area.around[3];
    const bool neighbour = j + 1 < count, merges = c.merge == WKV_MERGE_RIGHT && neighbour;
    const float w_v = average(victim), w_r = neighbour ? average(right) : 0.0f;
    // Merge.
    if (merges && w_v + w_r > 0.0f) {
      const T* v = value_of(victim);
      T* r = value_of(right);
      for (int32_t d = tid; d < dim; d += blockDim.x) r[d] = from_float<T>(wkv_merged(w_v, to_float(v[d]), w_r, to_float(r[d])));
    }
    if (tid == 0) {
      counts.event[0] = static_cast<float>(e.birth[victim] - 1);
      counts.event[1] = merges ? static_cast<float>(e.birth[right] - 1) : -1.0f;
      counts.event[2] = w_v;
      counts.event[3] = w_r;
      if (merges) counts.merged++;
      else counts.evicted++;
      if (victim < kept) {
        if (area.freed == 0) area.first_freed = victim;
        if (e.freed) e.freed[area.freed] = victim;
        area.freed++;
      } else {
        area.arrived_left--;
      }
    }
    __syncthreads();
    if (c.gapped() && neighbour) {
      if (warp == 0 && left >= 0) {
        const float gap = warp_gap(value_of(left), value_of(right), dim);
        if (lane == 0) e.gap[left] = gap;
      }
      if (warp == 1 && far >= 0) {
        const float gap = warp_gap(value_of(right), value_of(far), dim);
        if (lane == 0) e.gap[right] = gap;
      }
      __syncthreads();
    }
  }
  // Insert what is left of the incoming tokens, in rank order: freed slots first, then unused ones.
  const int32_t freed = area.freed, stayed = kept - freed;
  const Entries own = c.entries(head);
  if (own.rank != e.rank) {
    for (int32_t i = tid; i < kept; i += blockDim.x) {
      if (e.rank[i] < 0) continue;
      own.score[i] = e.score[i], own.birth[i] = e.birth[i], own.rank[i] = e.rank[i];
      if (e.gap) own.gap[i] = e.gap[i];
    }
  }
  for (int32_t t = warp; t < arrived; t += warps) {
    const int32_t rank = e.rank[kept + t];
    if (rank < 0) continue;
    const int32_t order = rank - stayed;
    const int32_t slot = order >= freed ? kept + order - freed : e.freed ? e.freed[order] : area.first_freed;
    for (int32_t d = lane; d < dim; d += 32) {
      keys[int64_t{slot} * dim + d] = in_keys[int64_t{t} * dim + d];
      values[int64_t{slot} * dim + d] = in_values[int64_t{t} * dim + d];
    }
    if (lane == 0) {
      own.score[slot] = e.score[kept + t], own.birth[slot] = e.birth[kept + t], own.rank[slot] = rank;
      if (e.gap) own.gap[slot] = e.gap[kept + t];
    }
  }
  if (tid == 0) counts.kept = stayed + area.arrived_left;
}

}  // namespace wkv
`,
  "cuda/common.cuh": `/** common.cuh: what every file of the CUDA library shares: the context with its stream, device memory, tensors, data errors, reductions. */
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>
#include <utility>
#include <vector>

#include "../handles.hpp"

namespace wkv {

/** Throws the failure that a CUDA error is, and remembers it when the device is lost to this process with it. */
[[noreturn]] void fail_device(cudaError_t error, const std::string& what);

/** Fails once the device is lost to this process, with the text of the first failure. */
void require_device();

/** Turns a CUDA error into a failure. */
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail_device(error, what);
}

/** Device memory, given back with its last owner. */
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) : bytes_(bytes) {
    const cudaError_t error = cudaMalloc(&data_, bytes ? bytes : 1);
    if (error != cudaSuccess) fail_device(error, "Allocating " + std::to_string(bytes) + " bytes on the device");
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() { cudaFree(data_); }
  template <typename T>
  T* as(size_t byte = 0) const { return reinterpret_cast<T*>(static_cast<uint8_t*>(data_) + byte); }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};
using DeviceRef = std::shared_ptr<DeviceMemory>;

// ---- data errors: found on the device, read after a run ----

enum class Fault : int32_t { None, Token, Target, NanLogit, NanAttention, NanScore, Full, Rank };

/** What the first faulty thread left. */
struct FaultWord {
  Fault fault;
  int32_t values[4];
};

/** Where kernels report; passed by value. The first report since the last read wins. */
struct Faults {
  int32_t* taken;   // device memory
  FaultWord* word;  // host memory, mapped
  __device__ void report(Fault fault, int32_t a, int32_t b = 0, int32_t c = 0, int32_t d = 0) const {
    if (atomicCAS(taken, 0, 1) != 0) return;
    word->values[0] = a, word->values[1] = b, word->values[2] = c, word->values[3] = d;
    word->fault = fault;
    __threadfence_system();
  }
};

// ---- tensors ----

constexpr bool is_quantised(int32_t dtype) { return dtype >= WKV_Q8_0; }

/** A weight as kernels see it. Quantised rows lie in two planes: 32 (Q8_0) or 16 bytes of quants a block of 32 columns, in file order,
 *  and one f16 scale a block, with Q4_1 a pair (scale, minimum). */
struct WeightView {
  int32_t dtype, rows, columns;
  const uint8_t* data;
  const __half* scales;
};

struct Tensor : Object {
  int32_t dtype, rows, columns;
  size_t scales_at = 0;  // where the plane of scales begins
  DeviceRef memory;
  Tensor(int32_t dtype, int32_t rows, int32_t columns);
  size_t bytes() const override { return memory->bytes(); }
  float* f32() const { return memory->as<float>(); }
  int32_t* i32() const { return memory->as<int32_t>(); }
  float* row(int64_t r) const { return f32() + r * columns; }
  WeightView view() const { return {dtype, rows, columns, memory->as<uint8_t>(), memory->as<__half>(scales_at)}; }
};
using TensorRef = std::shared_ptr<Tensor>;

inline TensorRef find_tensor(int32_t context, int32_t handle, const char* what) {
  return find<Tensor>(context, handle, Kind::Tensor, what);
}
/** A tensor of this dtype with at least these rows and exactly these columns (-1: any). */
TensorRef find_tensor(int32_t context, int32_t handle, const char* what, int32_t dtype, int32_t rows, int32_t columns);

// ---- context ----

/** A captured graph, and all that its kernels read and write. */
struct Graph : Object {
  cudaGraphExec_t run = nullptr;
  std::vector<std::shared_ptr<void>> holds;
  Graph() : Object(Kind::Graph) {}
  ~Graph() override {
    if (run) cudaGraphExecDestroy(run);
  }
};

/** One GPU. Ops go to \`stream\`, which may be recording; graphs and copies to \`side\`, as they may run meanwhile. Between two entries
 *  nothing runs, so the two need no order. */
struct Context : ContextBase {
  int32_t device = 0, processors = 0;
  int32_t shared_limit = 0;  // bytes a block; WKV_CUDA_SHARED_KB lowers it, to test what smaller GPUs take
  int32_t capability = 0;    // 90 for 9.0: the device's, or that of the code it runs when this is lower
  std::string name;          // for wkv_device
  cudaStream_t stream = nullptr, side = nullptr;
  DeviceRef taken;
  FaultWord* word = nullptr;
  std::shared_ptr<Graph> recording;
  DeviceRef scratch;  // an op's intermediate results; a graph holds the one it was recorded with
  Context();
  ~Context() override;

  Faults faults() const { return {taken->as<int32_t>(), word}; }
  /** Memory for this op's intermediate results, good until the op ends. */
  uint8_t* reserve(size_t bytes);
  /** Keeps what an op uses for as long as the graph that is recorded. */
  template <typename... Refs>
  void hold(const Refs&... refs) {
    if (recording) (recording->holds.push_back(refs), ...);
  }
  /** Ends an op: checks its launches and, unless a graph is recorded, waits for it and for its faults. */
  void submitted();
  /** Waits for a stream, and fails with the fault that kernels left. */
  void finish(cudaStream_t ran);
  void copy(void* to, const void* from, size_t bytes);
  void zero(void* to, size_t bytes);

 private:
  void release();
};

template <typename Body>
int32_t entry(int32_t handle, Body body) {
  return entry_of<Context>(handle, [&](Context& context) {
    require_device();
    check(cudaSetDevice(context.device), "Choosing the device");
    body(context);
  });
}

/** Lets a kernel use this much shared memory: what it declares itself, 8 KB at most, counts towards the 48 KB that need no leave. */
template <typename Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  if (bytes > 40 * 1024) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), "Shared memory");
}

/** How a kernel is launched; \`cluster\`: blocks along x that share their memory. */
struct Shape {
  dim3 grid, block;
  size_t shared = 0;
  uint32_t cluster = 1;
};

/** Launches a kernel on the context's stream, through which all ops go. From sm_90 on its blocks may start while the kernel before it
 *  ends (programmatic dependent launch), so every kernel calls wait_for_previous() before it reads or writes what earlier kernels did. */
template <typename... Parameters, typename... Arguments>
void launch(Context& ctx, void (*kernel)(Parameters...), const Shape& shape, Arguments&&... arguments) {
  allow_shared(kernel, shape.shared);
  cudaLaunchAttribute attributes[2];
  uint32_t count = 0;
  if (ctx.capability >= 90) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim = {shape.cluster, 1, 1};
    count++;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid, config.blockDim = shape.block, config.dynamicSmemBytes = shape.shared, config.stream = ctx.stream;
  config.attrs = attributes, config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "Launching a kernel");
}

inline int32_t divide_up(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }
inline size_t round_up(size_t bytes, size_t to = 256) { return (bytes + to - 1) / to * to; }

// ---- device helpers ----

/** Waits until the kernels before this one have ended and what they wrote can be seen. */
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/** Lets the next kernel's blocks start where there is room for them. Only after wait_for_previous(): so a kernel that runs knows that all
 *  but the one before it have ended. */
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}
__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
  return x;
}

/** The block's sum in a fixed order, in every thread; \`area\` holds 32 doubles. */
__device__ inline double block_sum(double x, double* area) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  x = warp_sum(x);
  __syncthreads();
  if (lane == 0) area[warp] = x;
  __syncthreads();
  double total = 0.0;
  for (int w = 0; w < warps; w++) total += area[w];
  return total;
}

/** The block's highest, in every thread; \`area\` holds 32 floats. */
__device__ inline float block_max(float x, float* area) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  x = warp_max(x);
  __syncthreads();
  if (lane == 0) area[warp] = x;
  __syncthreads();
  float most = area[0];
  for (int w = 1; w < warps; w++) most = fmaxf(most, area[w]);
  return most;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

/** One number of a weight. */
__device__ inline float weight_at(const WeightView& w, int64_t row, int32_t column) {
  const int64_t i = row * w.columns + column;
  switch (w.dtype) {
    case WKV_F32: return reinterpret_cast<const float*>(w.data)[i];
    case WKV_F16: return __half2float(reinterpret_cast<const __half*>(w.data)[i]);
    case WKV_BF16: return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(w.data)[i]);
    default: break;
  }
  const int64_t block = row * (w.columns / 32) + column / 32;
  const int32_t within = column % 32;
  if (w.dtype == WKV_Q8_0) return reinterpret_cast<const int8_t*>(w.data)[block * 32 + within] * __half2float(w.scales[block]);
  const int32_t nibble = w.data[block * 16 + within % 16] >> (within / 16 * 4) & 15;
  if (w.dtype == WKV_Q4_0) return (nibble - 8) * __half2float(w.scales[block]);
  return fmaf(nibble, __half2float(w.scales[block * 2]), __half2float(w.scales[block * 2 + 1]));
}

}  // namespace wkv
`,
  "cuda/embed.cu": `/**
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
`,
  "cuda/linear.cu": `/**
 * linear.cu: wkv_linear and wkv_gated, the projections of prefill and decode.
 *
 *   out[t, j] = norm(x[t]) . w[j] + bias[j] (+ out[t, j])            x [rows, C], w [J, C], out [rows, J of a wider tensor]
 *   out[t, j] = silu(norm(x[t]) . gate[j]) * (norm(x[t]) . up[j])
 *
 * Up to 8 rows (matvec): every block norms and rounds all rows of x into shared memory (x comes from the second-level cache), then each
 * of its 8 warps owns one row of w at a time for all rows of x. Bytes moved: w once.
 * More rows (matmul): x is normed and rounded once into scratch; a block owns a tile of 64 x 64 of out and walks along C in steps of 32.
 * Bytes moved: w once a 64 rows of x, x once a 64 rows of w.
 * With int8 precision x is rounded as loops.cpp's round_row does (per 32 columns: scale = max |x| / 127), products are integers (dp4a);
 * otherwise weights are widened in registers and products are f32.
 */
#include <algorithm>
#include <type_traits>

#include "common.cuh"

namespace wkv {
namespace {

/** An input: rows [0, rows) of x with their norm (null: none). */
struct InputView {
  const float* x;
  int32_t rows, columns;
  const float* norm;
  float epsilon;
};

/** Where results go: row t at out + t * stride. */
struct OutputView {
  float* out;
  int64_t stride;
  const float* bias;
  int32_t add;
  __device__ void put(int32_t t, int32_t j, float value) const {
    float* to = out + t * stride + j;
    if (bias) value += bias[j];
    *to = add ? *to + value : value;
  }
};

__device__ inline float silu_times(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

/** One block of 32 numbers, a lane each, in 8 bits: returns the rounded number, and the scale and sum in every lane. */
__device__ inline int32_t round_lane(float x, float* scale, float* sum) {
  const float most = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(fabsf(x))));
  if (!(most <= 3.402823466e38f)) {  // x is not finite: nor is what comes of it
    *scale = *sum = __uint_as_float(0x7fc00000u);
    return 0;
  }
  const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
  const int32_t q = static_cast<int32_t>(rintf(x * inverse));
  *scale = most / 127.0f;
  *sum = *scale * static_cast<float>(__reduce_add_sync(0xffffffffu, q));
  return q;
}

// ---- dot products of one block of 32 columns in 8 bits ----

/** The quants of one block as words; low and high nibbles of Q4 apart, in column order. */
template <int kType>
struct Block8 {
  int32_t words[8];
  float scale, least;
  __device__ Block8(const WeightView& w, int64_t block) {
    if (kType == WKV_Q8_0) {
      const int4* from = reinterpret_cast<const int4*>(w.data) + block * 2;
      const int4 a = __ldg(from), b = __ldg(from + 1);
      words[0] = a.x, words[1] = a.y, words[2] = a.z, words[3] = a.w, words[4] = b.x, words[5] = b.y, words[6] = b.z, words[7] = b.w;
    } else {
      const int4 a = __ldg(reinterpret_cast<const int4*>(w.data) + block);
      const int32_t packed[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
      for (int v = 0; v < 4; v++) words[v] = packed[v] & 0x0f0f0f0f, words[v + 4] = packed[v] >> 4 & 0x0f0f0f0f;
    }
    if (kType == WKV_Q4_1) {
      const float2 both = __half22float2(__ldg(reinterpret_cast<const __half2*>(w.scales) + block));
      scale = both.x, least = both.y;
    } else {
      scale = __half2float(__ldg(w.scales + block)), least = 0.0f;
    }
  }
  /** Adds the product with a block of x, whose words lie at \`q\`. */
  __device__ float product(const int32_t* q, float x_scale, float x_sum) const {
    const int4 a = *reinterpret_cast<const int4*>(q), b = *reinterpret_cast<const int4*>(q + 4);
    int32_t dot = __dp4a(words[0], a.x, 0);
    dot = __dp4a(words[1], a.y, dot), dot = __dp4a(words[2], a.z, dot), dot = __dp4a(words[3], a.w, dot);
    dot = __dp4a(words[4], b.x, dot), dot = __dp4a(words[5], b.y, dot), dot = __dp4a(words[6], b.z, dot), dot = __dp4a(words[7], b.w, dot);
    float value = static_cast<float>(dot) * (scale * x_scale);
    if (kType == WKV_Q4_1) value += least * x_sum;
    if (kType == WKV_Q4_0) value -= scale * (8.0f * x_sum);
    return value;
  }
};

/** total[t] += this lane's share of w[row] . x[t], x in 8 bits in shared memory. */
template <int kType, int kRows>
__device__ inline void dots_int8(const WeightView& w, int64_t row, const int32_t* q, const float* scales, const float* sums, float* total) {
  const int32_t blocks = w.columns / 32, lane = threadIdx.x & 31;
  for (int32_t b = lane; b < blocks; b += 32) {
    const Block8<kType> block(w, row * blocks + b);
#pragma unroll
    for (int t = 0; t < kRows; t++) total[t] += block.product(q + (t * blocks + b) * 8, scales[t * blocks + b], sums[t * blocks + b]);
  }
}

// ---- dot products in f32 ----

/** Reads 4 columns of a row at once. */
template <int kType>
__device__ inline float4 weights4(const WeightView& w, int64_t row, int32_t column) {
  const int64_t i = row * w.columns + column;
  if (kType == WKV_F32) return __ldg(reinterpret_cast<const float4*>(w.data + i * 4));
  if (kType == WKV_F16) {
    const uint2 raw = __ldg(reinterpret_cast<const uint2*>(w.data + i * 2));
    const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&raw.x)), b = __half22float2(*reinterpret_cast<const __half2*>(&raw.y));
    return make_float4(a.x, a.y, b.x, b.y);
  }
  if (kType == WKV_BF16) {
    const uint2 raw = __ldg(reinterpret_cast<const uint2*>(w.data + i * 2));
    return make_float4(__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u), __uint_as_float(raw.y << 16), __uint_as_float(raw.y & 0xffff0000u));
  }
  const int64_t block = row * (w.columns / 32) + column / 32;
  if (kType == WKV_Q8_0) {
    const int32_t raw = __ldg(reinterpret_cast<const int32_t*>(w.data + block * 32 + column % 32));
    const float s = __half2float(__ldg(w.scales + block));
    return make_float4((raw << 24 >> 24) * s, (raw << 16 >> 24) * s, (raw << 8 >> 24) * s, (raw >> 24) * s);
  }
  const int32_t within = column % 32;
  const uint32_t raw = __ldg(reinterpret_cast<const uint32_t*>(w.data + block * 16 + within % 16)) >> (within / 16 * 4);
  const int32_t middle = kType == WKV_Q4_0 ? 8 : 0;
  float s, m = 0.0f;
  if (kType == WKV_Q4_1) {
    const float2 both = __half22float2(__ldg(reinterpret_cast<const __half2*>(w.scales) + block));
    s = both.x, m = both.y;
  } else {
    s = __half2float(__ldg(w.scales + block));
  }
  const auto wide = [&](int shift) { return fmaf(static_cast<float>(static_cast<int32_t>(raw >> shift & 15) - middle), s, m); };
  return make_float4(wide(0), wide(8), wide(16), wide(24));
}

/** total[t] += this lane's share of w[row] . x[t], x [kRows, C] in shared memory. */
template <int kType, int kRows>
__device__ inline void dots_f32(const WeightView& w, int64_t row, const float* x, float* total) {
  const int32_t columns = w.columns, lane = threadIdx.x & 31;
  if (columns % 4 == 0) {
    for (int32_t c = lane * 4; c < columns; c += 128) {
      const float4 v = weights4<kType>(w, row, c);
#pragma unroll
      for (int t = 0; t < kRows; t++) {
        const float4 y = *reinterpret_cast<const float4*>(x + t * columns + c);
        total[t] = fmaf(v.x, y.x, fmaf(v.y, y.y, fmaf(v.z, y.z, fmaf(v.w, y.w, total[t]))));
      }
    }
    return;
  }
  for (int32_t c = lane; c < columns; c += 32) {
    const float v = weight_at(w, row, c);
#pragma unroll
    for (int t = 0; t < kRows; t++) total[t] = fmaf(v, x[t * columns + c], total[t]);
  }
}

// ---- up to 8 rows ----

template <int kRows, bool kInt8>
size_t matvec_shared(int32_t columns) {
  return kInt8 ? size_t(kRows) * (columns + columns / 32 * 8) : size_t(kRows) * columns * 4;
}

template <int kType, bool kInt8, int kRows, bool kGated>
__global__ void __launch_bounds__(256) matvec_kernel(InputView in, WeightView w, WeightView up, OutputView to) {
  extern __shared__ int4 shared4[];
  __shared__ double area[8][kRows];
  __shared__ float norms[kRows];
  const int32_t columns = in.columns, blocks = columns / 32, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int32_t first = blockIdx.y * kRows, rows = min(kRows, in.rows - first);
  const float* x = in.x + int64_t{first} * columns;
  if (in.norm) {
    double squares[kRows];
#pragma unroll
    for (int t = 0; t < kRows; t++) {
      squares[t] = 0.0;
      if (t < rows) {
        for (int32_t c = threadIdx.x; c < columns; c += 256) squares[t] += static_cast<double>(x[int64_t{t} * columns + c]) * x[int64_t{t} * columns + c];
      }
      squares[t] = warp_sum(squares[t]);
      if (lane == 0) area[warp][t] = squares[t];
    }
    __syncthreads();
    if (threadIdx.x < kRows) {
      double total = 0.0;
      for (int i = 0; i < 8; i++) total += area[i][threadIdx.x];
      norms[threadIdx.x] = 1.0f / sqrtf(static_cast<float>(total / columns) + in.epsilon);
    }
    __syncthreads();
  }
  const auto value = [&](int32_t t, int32_t c) {
    if (t >= rows) return 0.0f;
    const float v = x[int64_t{t} * columns + c];
    return in.norm ? v * norms[t] * in.norm[c] : v;
  };
  int8_t* q = reinterpret_cast<int8_t*>(shared4);
  float *scales = reinterpret_cast<float*>(q + kRows * columns), *sums = scales + kRows * blocks, *floats = reinterpret_cast<float*>(shared4);
  if (kInt8) {
    for (int32_t u = warp; u < kRows * blocks; u += 8) {
      float scale, sum;
      const int32_t rounded = round_lane(value(u / blocks, u % blocks * 32 + lane), &scale, &sum);
      q[u * 32 + lane] = static_cast<int8_t>(rounded);
      if (lane == 0) scales[u] = scale, sums[u] = sum;
    }
  } else {
    for (int32_t t = 0; t < kRows; t++) {
      for (int32_t c = threadIdx.x; c < columns; c += 256) floats[t * columns + c] = value(t, c);
    }
  }
  __syncthreads();
  for (int64_t j = int64_t{blockIdx.x} * 8 + warp; j < w.rows; j += int64_t{gridDim.x} * 8) {
    float total[kRows] = {}, ups[kRows] = {};
    if constexpr (kInt8) {
      dots_int8<kType, kRows>(w, j, reinterpret_cast<const int32_t*>(q), scales, sums, total);
      if (kGated) dots_int8<kType, kRows>(up, j, reinterpret_cast<const int32_t*>(q), scales, sums, ups);
    } else {
      dots_f32<kType, kRows>(w, j, floats, total);
      if (kGated) dots_f32<kType, kRows>(up, j, floats, ups);
    }
#pragma unroll
    for (int t = 0; t < kRows; t++) {
      float result = warp_sum(total[t]);
      if (kGated) result = silu_times(result, warp_sum(ups[t]));
      if (lane == t && t < rows) to.put(first + t, static_cast<int32_t>(j), result);
    }
  }
}

// ---- more rows ----

/** Norms x into floats (out) or into 8 bits (q, scales, sums); a block owns a row. */
__global__ void __launch_bounds__(256) prepare_kernel(InputView in, float* out, int8_t* q, float* scales, float* sums) {
  __shared__ double area[32];
  const int64_t t = blockIdx.x;
  const int32_t columns = in.columns, blocks = columns / 32;
  const float* x = in.x + t * columns;
  float scale = 1.0f;
  if (in.norm) {
    double squares = 0.0;
    for (int32_t c = threadIdx.x; c < columns; c += 256) squares += static_cast<double>(x[c]) * x[c];
    scale = 1.0f / sqrtf(static_cast<float>(block_sum(squares, area) / columns) + in.epsilon);
  }
  const auto value = [&](int32_t c) { return in.norm ? x[c] * scale * in.norm[c] : x[c]; };
  if (out) {
    for (int32_t c = threadIdx.x; c < columns; c += 256) out[t * columns + c] = value(c);
    return;
  }
  const int32_t lane = threadIdx.x & 31;
  for (int32_t b = threadIdx.x >> 5; b < blocks; b += 8) {
    float s, sum;
    q[t * columns + b * 32 + lane] = static_cast<int8_t>(round_lane(value(b * 32 + lane), &s, &sum));
    if (lane == 0) scales[t * blocks + b] = s, sums[t * blocks + b] = sum;
  }
}

constexpr int kTile = 64;

/** A thread owns outputs [4 ty, 4 ty + 4) x {tx, tx + 16, tx + 32, tx + 48} of the tile. */
template <int kType>
__global__ void __launch_bounds__(256) matmul_int8_kernel(const int8_t* q, const float* scales, const float* sums, int32_t rows, WeightView w, OutputView to) {
  __shared__ __align__(16) int32_t xs[kTile][12], ws[kTile][12];  // 8 words and padding that keeps 16-byte loads free of conflicts
  __shared__ float x_scale[kTile], x_sum[kTile], w_scale[kTile], w_least[kTile];
  const int32_t blocks = w.columns / 32, t0 = blockIdx.y * kTile, j0 = blockIdx.x * kTile, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float total[4][4] = {};
  for (int32_t b = 0; b < blocks; b++) {
    __syncthreads();
    const int32_t i = threadIdx.x % 64;
    if (threadIdx.x < 64) {
      if (j0 + i < w.rows) {
        const Block8<kType> block(w, int64_t{j0 + i} * blocks + b);
#pragma unroll
        for (int v = 0; v < 8; v++) ws[i][v] = block.words[v];
        w_scale[i] = block.scale, w_least[i] = block.least;
      } else {
#pragma unroll
        for (int v = 0; v < 8; v++) ws[i][v] = 0;
        w_scale[i] = 0.0f, w_least[i] = 0.0f;
      }
    } else if (threadIdx.x < 128) {
      const bool inside = t0 + i < rows;
      x_scale[i] = inside ? scales[int64_t{t0 + i} * blocks + b] : 0.0f;
      x_sum[i] = inside ? sums[int64_t{t0 + i} * blocks + b] : 0.0f;
    } else {
      const int32_t half = (threadIdx.x - 128) / 64;
      int4 v = make_int4(0, 0, 0, 0);
      if (t0 + i < rows) v = *reinterpret_cast<const int4*>(q + int64_t{t0 + i} * w.columns + b * 32 + half * 16);
      *reinterpret_cast<int4*>(&xs[i][half * 4]) = v;
    }
    __syncthreads();
    int32_t dot[4][4] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int4 a[4], c[4];
#pragma unroll
      for (int k = 0; k < 4; k++) a[k] = *reinterpret_cast<const int4*>(&xs[ty * 4 + k][half * 4]), c[k] = *reinterpret_cast<const int4*>(&ws[tx + 16 * k][half * 4]);
#pragma unroll
      for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int l = 0; l < 4; l++) dot[k][l] = __dp4a(a[k].x, c[l].x, __dp4a(a[k].y, c[l].y, __dp4a(a[k].z, c[l].z, __dp4a(a[k].w, c[l].w, dot[k][l]))));
      }
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float s = x_scale[ty * 4 + k], sum = x_sum[ty * 4 + k];
#pragma unroll
      for (int l = 0; l < 4; l++) {
        const float ws1 = w_scale[tx + 16 * l];
        total[k][l] += static_cast<float>(dot[k][l]) * (ws1 * s);
        if (kType == WKV_Q4_1) total[k][l] += w_least[tx + 16 * l] * sum;
        if (kType == WKV_Q4_0) total[k][l] -= ws1 * (8.0f * sum);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < 4; k++) {
#pragma unroll
    for (int l = 0; l < 4; l++) {
      if (t0 + ty * 4 + k < rows && j0 + tx + 16 * l < w.rows) to.put(t0 + ty * 4 + k, j0 + tx + 16 * l, total[k][l]);
    }
  }
}

template <int kType>
__global__ void __launch_bounds__(256) matmul_f32_kernel(const float* x, int32_t rows, WeightView w, OutputView to) {
  __shared__ __align__(16) float xs[32][kTile + 4], ws[32][kTile + 4];  // transposed
  const int32_t columns = w.columns, t0 = blockIdx.y * kTile, j0 = blockIdx.x * kTile, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float total[4][4] = {};
  for (int32_t c0 = 0; c0 < columns; c0 += 32) {
    __syncthreads();
    if (columns % 4 == 0) {
#pragma unroll
      for (int u = threadIdx.x; u < kTile * 8; u += 256) {
        const int32_t i = u / 8, c = u % 8 * 4;
        float4 a = make_float4(0, 0, 0, 0), b = a;
        if (c0 + c < columns) {
          if (t0 + i < rows) a = *reinterpret_cast<const float4*>(x + int64_t{t0 + i} * columns + c0 + c);
          if (j0 + i < w.rows) b = weights4<kType>(w, j0 + i, c0 + c);
        }
        xs[c][i] = a.x, xs[c + 1][i] = a.y, xs[c + 2][i] = a.z, xs[c + 3][i] = a.w;
        ws[c][i] = b.x, ws[c + 1][i] = b.y, ws[c + 2][i] = b.z, ws[c + 3][i] = b.w;
      }
    } else {
      for (int u = threadIdx.x; u < kTile * 32; u += 256) {
        const int32_t i = u / 32, c = u % 32;
        const bool inside = c0 + c < columns;
        xs[c][i] = inside && t0 + i < rows ? x[int64_t{t0 + i} * columns + c0 + c] : 0.0f;
        ws[c][i] = inside && j0 + i < w.rows ? weight_at(w, j0 + i, c0 + c) : 0.0f;
      }
    }
    __syncthreads();
#pragma unroll 8
    for (int c = 0; c < 32; c++) {
      const float4 a = *reinterpret_cast<const float4*>(&xs[c][ty * 4]);
      const float av[4] = {a.x, a.y, a.z, a.w};
      float bv[4];
#pragma unroll
      for (int l = 0; l < 4; l++) bv[l] = ws[c][tx + 16 * l];
#pragma unroll
      for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int l = 0; l < 4; l++) total[k][l] = fmaf(av[k], bv[l], total[k][l]);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < 4; k++) {
#pragma unroll
    for (int l = 0; l < 4; l++) {
      if (t0 + ty * 4 + k < rows && j0 + tx + 16 * l < w.rows) to.put(t0 + ty * 4 + k, j0 + tx + 16 * l, total[k][l]);
    }
  }
}

/** out[t, j] = silu(gate[t, j]) * up[t, j]; out may be gate. */
__global__ void __launch_bounds__(256) silu_kernel(float* gate, int64_t stride, const float* up, int32_t columns) {
  float* g = gate + blockIdx.y * stride;
  const float* u = up + int64_t{blockIdx.y} * columns;
  for (int32_t c = blockIdx.x * 256 + threadIdx.x; c < columns; c += gridDim.x * 256) g[c] = silu_times(g[c], u[c]);
}

/** x, when out is x too: blocks that write must not change what others read. */
__global__ void __launch_bounds__(256) copy_kernel(float* to, const float* from, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < count; i += int64_t{gridDim.x} * 256) to[i] = from[i];
}

// ---- launches ----

/** Calls body with the weight's type as a constant; \`quantised_only\` leaves the others out. */
template <typename Body>
void by_type(int32_t dtype, Body body) {
  switch (dtype) {
    case WKV_F32: return body(std::integral_constant<int, WKV_F32>());
    case WKV_F16: return body(std::integral_constant<int, WKV_F16>());
    case WKV_BF16: return body(std::integral_constant<int, WKV_BF16>());
    case WKV_Q8_0: return body(std::integral_constant<int, WKV_Q8_0>());
    case WKV_Q4_0: return body(std::integral_constant<int, WKV_Q4_0>());
    default: return body(std::integral_constant<int, WKV_Q4_1>());
  }
}

template <int kType, bool kInt8, int kRows, bool kGated>
bool launch_matvec(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, const OutputView& to) {
  const size_t shared = matvec_shared<kRows, kInt8>(in.columns);
  if (shared + 2048 > size_t(ctx.shared_limit)) return false;
  const auto kernel = matvec_kernel<kType, kInt8, kRows, kGated>;
  allow_shared(kernel, shared);
  const int32_t blocks = std::min(divide_up(w.rows, 8), ctx.processors * 4);
  kernel<<<dim3(blocks, divide_up(in.rows, kRows)), 256, shared, ctx.stream>>>(in, w, up, to);
  return true;
}

/** False when not even one row of x fits shared memory. */
template <int kType, bool kInt8, bool kGated>
bool matvec(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, const OutputView& to) {
  if (in.rows > 4 && launch_matvec<kType, kInt8, 8, kGated>(ctx, in, w, up, to)) return true;
  if (in.rows > 2 && launch_matvec<kType, kInt8, 4, kGated>(ctx, in, w, up, to)) return true;
  if (in.rows > 1 && launch_matvec<kType, kInt8, 2, kGated>(ctx, in, w, up, to)) return true;
  return launch_matvec<kType, kInt8, 1, kGated>(ctx, in, w, up, to);
}

/** x as matmul wants it. */
struct Prepared {
  const float* x;
  int8_t* q;
  float *scales, *sums;
};

size_t prepared_bytes(const InputView& in) { return round_up(size_t(in.rows) * in.columns * 4); }

Prepared prepare(Context& ctx, const InputView& in, bool int8, uint8_t* scratch) {
  const size_t count = size_t(in.rows) * in.columns;
  Prepared p{in.x, nullptr, nullptr, nullptr};
  if (int8) {
    p.q = reinterpret_cast<int8_t*>(scratch);
    p.scales = reinterpret_cast<float*>(scratch + count);
    p.sums = p.scales + count / 32;
  } else if (in.norm) {
    p.x = reinterpret_cast<float*>(scratch);
  } else {
    return p;
  }
  prepare_kernel<<<in.rows, 256, 0, ctx.stream>>>(in, int8 ? nullptr : const_cast<float*>(p.x), p.q, p.scales, p.sums);
  return p;
}

void matmul(Context& ctx, const Prepared& p, int32_t rows, bool int8, const WeightView& w, const OutputView& to) {
  const dim3 grid(divide_up(w.rows, kTile), divide_up(rows, kTile));
  by_type(w.dtype, [&](auto type) {
    if constexpr (is_quantised(type.value)) {
      if (int8) {
        matmul_int8_kernel<type.value><<<grid, 256, 0, ctx.stream>>>(p.q, p.scales, p.sums, rows, w, to);
        return;
      }
    }
    matmul_f32_kernel<type.value><<<grid, 256, 0, ctx.stream>>>(p.x, rows, w, to);
  });
}

constexpr int32_t kMatvecRows = 8;

/** out = in . w^T, or gated with \`up\` (data null: not). */
void project(Context& ctx, InputView in, const WeightView& w, const WeightView& up, bool int8, const OutputView& to, bool aliased) {
  const bool gated = up.data != nullptr;
  const size_t own = prepared_bytes(in);
  uint8_t* scratch = ctx.reserve(own * 2 + size_t(in.rows) * w.rows * 4);
  if (in.rows <= kMatvecRows && (!gated || w.dtype == up.dtype)) {
    if (aliased) {
      float* copied = reinterpret_cast<float*>(scratch + own);
      copy_kernel<<<std::min(1024, divide_up(int64_t{in.rows} * in.columns, 256)), 256, 0, ctx.stream>>>(copied, in.x, int64_t{in.rows} * in.columns);
      in.x = copied;
    }
    bool done = false;
    by_type(w.dtype, [&](auto type) {
      if constexpr (is_quantised(type.value)) {
        if (int8) {
          done = gated ? matvec<type.value, true, true>(ctx, in, w, up, to) : matvec<type.value, true, false>(ctx, in, w, up, to);
          return;
        }
      }
      done = gated ? matvec<type.value, false, true>(ctx, in, w, up, to) : matvec<type.value, false, false>(ctx, in, w, up, to);
    });
    if (done) return;
  }
  const Prepared p = prepare(ctx, in, int8, scratch);
  matmul(ctx, p, in.rows, int8, w, to);
  if (!gated) return;
  float* ups = reinterpret_cast<float*>(scratch + own * 2);
  matmul(ctx, p, in.rows, int8, up, OutputView{ups, w.rows, nullptr, 0});
  silu_kernel<<<dim3(divide_up(w.rows, 256), in.rows), 256, 0, ctx.stream>>>(to.out, to.stride, ups, w.rows);
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
  require(precision == WKV_PRECISION_F32 || precision == WKV_PRECISION_INT8, "precision " + std::to_string(precision) + " is unknown");
  *found = find_tensor(context, x, "x", WKV_F32, x_row + rows, columns);
  TensorRef weight;
  if (norm) weight = find_tensor(context, norm, "norm", WKV_F32, 1, columns);
  ctx.hold(*found, weight);
  return {(*found)->row(x_row), rows, columns, weight ? weight->f32() : nullptr, epsilon};
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
    project(ctx, in, weight->view(), WeightView{}, int8, {to->f32() + out_column, to->columns, plus ? plus->f32() : nullptr, add}, to == from);
    ctx.submitted();
  });
}

int32_t wkv_gated(int32_t context, int32_t out, int32_t x, int32_t rows, int32_t norm, float epsilon, int32_t gate, int32_t up, int32_t activation, int32_t precision) {
  return entry(context, [&](Context& ctx) {
    const TensorRef w_gate = find_weight(context, gate, "gate"), w_up = find_weight(context, up, "up");
    require(w_gate->rows == w_up->rows && w_gate->columns == w_up->columns, "gate and up are of different shapes");
    require(activation == WKV_SILU, "activation " + std::to_string(activation) + " is unknown");
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, w_gate->rows);
    TensorRef from;
    const InputView in = find_input(ctx, context, x, 0, rows, norm, epsilon, w_gate->columns, precision, &from);
    const bool int8 = is_quantised(w_gate->dtype) && is_quantised(w_up->dtype) && precision == WKV_PRECISION_INT8;
    require(to != from, "out must not be x");
    ctx.hold(w_gate, w_up, to);
    project(ctx, in, w_gate->view(), w_up->view(), int8, {to->f32(), to->columns, nullptr, 0}, false);
    ctx.submitted();
  });
}
`,
  "cuda/prefill.cu": `/**
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

/** The entries [first, first + kColumns) of a head as floats, keys rotated; rows of \`tile\` are dim + 1 apart. */
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

/** Rows [t0, t0 + kRows) of a query head; rows of \`tile\` are dim + 1 apart. */
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
    // The first tile holds an entry that every row sees, so \`highest\` is finite; rows past the end are never written.
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
`,
  "cuda/runtime.cu": `/** runtime.cu: contexts, tensors and graphs of the CUDA library. */
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "common.cuh"

namespace wkv {

// ---- failures of the device ----

namespace {
std::mutex lost_mutex;
std::string lost;  // the failure with which the device was lost; empty: it was not

/** 13.0 for 13000. */
std::string version_text(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

/** Why there is no device, and what would be right. */
[[noreturn]] void fail_no_device(cudaError_t error) {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  cudaGetLastError();
  const std::string needed = "a driver for CUDA " + std::to_string(CUDART_VERSION / 1000) + ".0 or later";
  if (driver == 0) fail(WKV_DEVICE, "There is no NVIDIA driver: install " + needed);
  const std::string found = "The NVIDIA driver is for CUDA " + version_text(driver);
  if (error == cudaErrorInsufficientDriver) fail(WKV_DEVICE, found + ", and this library needs " + needed);
  if (error == cudaErrorNoDevice || error == cudaSuccess) {
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    fail(WKV_DEVICE, found + " and finds no GPU: nvidia-smi must list one" + (visible ? std::string(", and CUDA_VISIBLE_DEVICES let it be seen (\\"") + visible + "\\")" : ""));
  }
  fail(WKV_DEVICE, found + " and opens no GPU: " + cudaGetErrorString(error));
}
}  // namespace

void fail_device(cudaError_t error, const std::string& what) {
  cudaGetLastError();  // an error that goes away must not reach the next call
  const std::string text = what + ": " + cudaGetErrorString(error);
  size_t free = 0, all = 0;
  const cudaError_t now = cudaMemGetInfo(&free, &all);
  if (now == cudaSuccess && error == cudaErrorMemoryAllocation) {
    fail(WKV_MEMORY, text + ", " + std::to_string(free) + " of " + std::to_string(all) + " bytes are free");
  }
  if (now != cudaSuccess) {
    cudaGetLastError();
    std::lock_guard<std::mutex> lock(lost_mutex);
    if (lost.empty()) lost = text;
  }
  require_device();
  fail(WKV_DEVICE, text);
}

void require_device() {
  std::lock_guard<std::mutex> lock(lost_mutex);
  if (!lost.empty()) fail(WKV_DEVICE, lost + "; with this failure the GPU's memory is lost to this process, which must start anew");
}

// ---- context ----

namespace {
__global__ void probe() {}

std::string fault_text(const FaultWord& word, int32_t* status) {
  const auto n = [&](int i) { return std::to_string(word.values[i]); };
  *status = word.fault == Fault::Full || word.fault == Fault::Rank ? WKV_INVALID : WKV_DATA;
  switch (word.fault) {
    case Fault::Token: return "Token " + n(0) + " is outside the table of " + n(1);
    case Fault::Target: return "Target " + n(0) + " is outside the vocabulary of " + n(1);
    case Fault::NanLogit: return "The logit of token " + n(0) + " is not a number";
    case Fault::NanAttention: return "The attention of layer " + n(0) + " is not a number";
    case Fault::NanScore: return "The merge cost of rank " + n(0) + " is not a number";
    case Fault::Full: return "The cache is full: its policy keeps every token, and it has " + n(0) + " slots";
    default: return "Rank " + n(0) + " may not leave a cache of " + n(1) + " tokens with " + n(2) + " sinks and " + n(3) + " recent";
  }
}
}  // namespace

namespace {
/** What a block may have of shared memory: all that the device gives, or less by WKV_CUDA_SHARED_KB. */
int32_t shared_bytes(size_t most) {
  const char* text = std::getenv("WKV_CUDA_SHARED_KB");
  if (!text || !*text) return static_cast<int32_t>(most);
  char* end = nullptr;
  const long kb = std::strtol(text, &end, 10);
  if (*end || kb < 48 || kb > static_cast<long>(most / 1024)) {
    fail(WKV_INVALID, "WKV_CUDA_SHARED_KB must be a whole number between 48 and " + std::to_string(most / 1024) + ": current value is \\"" + text + "\\"");
  }
  return static_cast<int32_t>(kb * 1024);
}
}  // namespace

Context::Context() {
  require_device();
  int32_t count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) fail_no_device(error);
  check(cudaSetDevice(device), "Choosing the device");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "Asking for the device's properties");
  int32_t driver = 0;
  check(cudaDriverGetVersion(&driver), "Asking for the driver's version");
  processors = properties.multiProcessorCount;
  capability = properties.major * 10 + properties.minor;
  shared_limit = shared_bytes(properties.sharedMemPerBlockOptin);
  name = std::string(properties.name) + ", sm_" + std::to_string(capability) + ", " + std::to_string(processors) + " multiprocessors, driver " + version_text(driver);
  if (properties.major < 8) fail(WKV_DEVICE, name + ": the GPU is too old, compute capability 8.0 or later is needed");
  cudaFuncAttributes attributes;
  const cudaError_t loaded = cudaFuncGetAttributes(&attributes, probe);
  if (loaded == cudaErrorNoKernelImageForDevice || loaded == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    fail(WKV_DEVICE, name + ": the library was built for other GPUs; WKV_CUDA_TARGETS=sm_" + std::to_string(capability) + " builds it for this one");
  }
  check(loaded, "Loading the kernels");
  capability = std::min(capability, attributes.ptxVersion);
  try {
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "Opening a stream");
    check(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking), "Opening a stream");
    taken = std::make_shared<DeviceMemory>(sizeof(int32_t));
    zero(taken->as<void>(), sizeof(int32_t));
    check(cudaHostAlloc(reinterpret_cast<void**>(&word), sizeof(FaultWord), cudaHostAllocMapped), "Allocating host memory");
    *word = FaultWord{};
  } catch (...) {
    release();
    throw;
  }
}

Context::~Context() { release(); }

void Context::release() {
  if (word) cudaFreeHost(word);
  if (side) cudaStreamDestroy(side);
  if (stream) cudaStreamDestroy(stream);
}

uint8_t* Context::reserve(size_t bytes) {
  if (!scratch || scratch->bytes() < bytes) scratch = std::make_shared<DeviceMemory>(round_up(bytes, size_t{1} << 20));
  hold(scratch);
  return scratch->as<uint8_t>();
}

void Context::submitted() {
  check(cudaGetLastError(), "Launching a kernel");
  if (!recording) finish(stream);
}

void Context::finish(cudaStream_t ran) {
  check(cudaStreamSynchronize(ran), "Running kernels");
  if (word->fault == Fault::None) return;
  int32_t status;
  const std::string text = fault_text(*word, &status);
  *word = FaultWord{};
  zero(taken->as<void>(), sizeof(int32_t));
  fail(status, text);
}

void Context::copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, side), "Copying");
  check(cudaStreamSynchronize(side), "Copying");
}

void Context::zero(void* to, size_t bytes) {
  check(cudaMemsetAsync(to, 0, bytes, side), "Clearing memory");
  check(cudaStreamSynchronize(side), "Clearing memory");
}

// ---- tensors ----

namespace {
int32_t quant_bytes(int32_t dtype) { return dtype == WKV_Q8_0 ? 32 : 16; }
int32_t scale_bytes(int32_t dtype) { return dtype == WKV_Q4_1 ? 4 : 2; }
int64_t row_bytes(int32_t dtype, int32_t columns) {
  if (is_quantised(dtype)) return int64_t{columns} / 32 * (quant_bytes(dtype) + scale_bytes(dtype));
  return int64_t{columns} * (dtype == WKV_F16 || dtype == WKV_BF16 ? 2 : 4);
}
bool finite(const uint8_t* half) { return (half[1] & 0x7c) != 0x7c; }

/** Spreads rows in file order over the two planes. */
void split(const Tensor& tensor, int32_t row, int32_t rows, const uint8_t* from, std::vector<uint8_t>& quants, std::vector<uint8_t>& scales) {
  const int64_t blocks = tensor.columns / 32;
  const int32_t q = quant_bytes(tensor.dtype), s = scale_bytes(tensor.dtype);
  quants.resize(size_t(rows * blocks * q));
  scales.resize(size_t(rows * blocks * s));
  for (int64_t i = 0; i < rows * blocks; i++, from += q + s) {
    if (!finite(from) || (s == 4 && !finite(from + 2))) fail(WKV_DATA, "Row " + std::to_string(row + i / blocks) + ": The scale of block " + std::to_string(i % blocks) + " is not finite");
    std::memcpy(scales.data() + i * s, from, size_t(s));
    std::memcpy(quants.data() + i * q, from + s, size_t(q));
  }
}

float half_to_float(const uint8_t* p) {
  __half_raw raw;
  std::memcpy(&raw.x, p, 2);
  return __half2float(__half(raw));
}

void check_rows(const Tensor& tensor, int32_t row, int32_t rows) {
  require(row >= 0 && rows >= 1 && row <= tensor.rows - rows, "rows " + std::to_string(row) + " to " + std::to_string(int64_t{row} + rows) + " of " + std::to_string(tensor.rows) + " asked for");
}
}  // namespace

Tensor::Tensor(int32_t dtype, int32_t rows, int32_t columns) : Object(Kind::Tensor), dtype(dtype), rows(rows), columns(columns) {
  size_t bytes = size_t(rows) * row_bytes(dtype, columns);
  if (is_quantised(dtype)) {
    const size_t blocks = size_t(rows) * (columns / 32);
    scales_at = round_up(blocks * quant_bytes(dtype));
    bytes = scales_at + blocks * scale_bytes(dtype);
  }
  memory = std::make_shared<DeviceMemory>(bytes);
}

TensorRef find_tensor(int32_t context, int32_t handle, const char* what, int32_t dtype, int32_t rows, int32_t columns) {
  TensorRef tensor = find_tensor(context, handle, what);
  require(tensor->dtype == dtype, std::string(what) + " is of another dtype (" + std::to_string(tensor->dtype) + ", expected " + std::to_string(dtype) + ")");
  require(rows >= 0 && tensor->rows >= rows, std::string(what) + " has " + std::to_string(tensor->rows) + " rows, expected at least " + std::to_string(rows));
  require(columns < 0 || tensor->columns == columns, std::string(what) + " has " + std::to_string(tensor->columns) + " columns, expected " + std::to_string(columns));
  return tensor;
}

}  // namespace wkv

using namespace wkv;

int32_t wkv_context_open(int32_t threads, int32_t* out, int32_t out_bytes) {
  return guarded(nullptr, [&] {
    require(out != nullptr && out_bytes >= 4, "out must hold 4 bytes");
    require(threads >= 0 && threads <= 1024, "threads must be between 0 and 1024: " + std::to_string(threads));
    *out = add_handle(0, std::make_shared<Context>());
  });
}

int32_t wkv_device(int32_t context, char* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    require(out != nullptr && out_bytes >= 1, "out must hold a text");
    give_text("CUDA, " + ctx.name, out, out_bytes);
  });
}

int32_t wkv_tensor_open(int32_t context, int32_t dtype, int32_t rows, int32_t columns, int32_t* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    require_buffer(out, out_bytes, 4, "out");
    require(dtype >= WKV_F32 && dtype <= WKV_Q4_1, "dtype " + std::to_string(dtype) + " is unknown");
    require(rows >= 1 && columns >= 1, "rows and columns must be at least 1: " + std::to_string(rows) + " x " + std::to_string(columns));
    require(!is_quantised(dtype) || columns % 32 == 0, "columns must be a multiple of 32 for quantised rows: " + std::to_string(columns));
    const auto tensor = std::make_shared<Tensor>(dtype, rows, columns);
    ctx.zero(tensor->memory->as<void>(), tensor->memory->bytes());
    *out = add_handle(context, tensor);
  });
}

int32_t wkv_tensor_write(int32_t context, int32_t handle, int32_t row, int32_t rows, const void* data, int32_t data_bytes) {
  return entry(context, [&](Context& ctx) {
    const TensorRef tensor = find_tensor(context, handle, "tensor");
    check_rows(*tensor, row, rows);
    const int64_t bytes = row_bytes(tensor->dtype, tensor->columns);
    require_buffer(data, data_bytes, rows * bytes, "data");
    if (!is_quantised(tensor->dtype)) {
      ctx.copy(tensor->memory->as<uint8_t>(row * bytes), data, size_t(rows * bytes));
      return;
    }
    std::vector<uint8_t> quants, scales;
    split(*tensor, row, rows, static_cast<const uint8_t*>(data), quants, scales);
    const size_t first = size_t(row) * (tensor->columns / 32);
    ctx.copy(tensor->memory->as<uint8_t>(first * quant_bytes(tensor->dtype)), quants.data(), quants.size());
    ctx.copy(tensor->memory->as<uint8_t>(tensor->scales_at + first * scale_bytes(tensor->dtype)), scales.data(), scales.size());
  });
}

int32_t wkv_tensor_read(int32_t context, int32_t handle, int32_t row, int32_t rows, void* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    const TensorRef tensor = find_tensor(context, handle, "tensor");
    check_rows(*tensor, row, rows);
    const bool as_floats = is_quantised(tensor->dtype);
    const int64_t bytes = as_floats ? int64_t{tensor->columns} * 4 : row_bytes(tensor->dtype, tensor->columns);
    require_buffer(out, out_bytes, rows * bytes, "out");
    if (!as_floats) {
      ctx.copy(out, tensor->memory->as<uint8_t>(row * bytes), size_t(rows * bytes));
      return;
    }
    const int32_t dtype = tensor->dtype, q = quant_bytes(dtype), s = scale_bytes(dtype);
    const size_t blocks = size_t(tensor->columns / 32), first = row * blocks, count = rows * blocks;
    std::vector<uint8_t> quants(count * q), scales(count * s);
    ctx.copy(quants.data(), tensor->memory->as<uint8_t>(first * q), quants.size());
    ctx.copy(scales.data(), tensor->memory->as<uint8_t>(tensor->scales_at + first * s), scales.size());
    auto* to = static_cast<float*>(out);
    for (size_t b = 0; b < count; b++, to += 32) {
      const float scale = half_to_float(scales.data() + b * s), least = s == 4 ? half_to_float(scales.data() + b * s + 2) : 0.0f;
      const uint8_t* from = quants.data() + b * q;
      for (int32_t i = 0; i < 32; i++) {
        if (dtype == WKV_Q8_0) to[i] = static_cast<float>(static_cast<int8_t>(from[i])) * scale;
        else to[i] = static_cast<float>((from[i % 16] >> (i / 16 * 4) & 15) - (dtype == WKV_Q4_0 ? 8 : 0)) * scale + least;
      }
    }
  });
}

// ---- graphs ----

int32_t wkv_graph_begin(int32_t context) {
  return entry(context, [&](Context& ctx) {
    if (ctx.recording) fail(WKV_INVALID, "A graph is being recorded already");
    check(cudaStreamBeginCapture(ctx.stream, cudaStreamCaptureModeRelaxed), "Starting to record");
    ctx.recording = std::make_shared<Graph>();
    ctx.recording_failed = false;
  });
}

int32_t wkv_graph_end(int32_t context, int32_t* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    require(ctx.recording != nullptr, "No graph is being recorded");
    const std::shared_ptr<Graph> graph = std::move(ctx.recording);
    ctx.recording.reset();
    cudaGraph_t captured = nullptr;
    const cudaError_t error = cudaStreamEndCapture(ctx.stream, &captured);
    const std::shared_ptr<void> owner(captured, [](void* g) {
      if (g) cudaGraphDestroy(static_cast<cudaGraph_t>(g));
    });
    require(!ctx.recording_failed, "An op of the graph failed when it was recorded");
    check(error, "Recording a graph");
    require_buffer(out, out_bytes, 4, "out");
    check(cudaGraphInstantiate(&graph->run, captured, 0), "Making a graph");
    *out = add_handle(context, graph);
  });
}

int32_t wkv_graph_run(int32_t context, int32_t handle, int32_t times) {
  return entry(context, [&](Context& ctx) {
    ctx.running = true;  // perhaps while another thread records a graph, which this leaves alone
    require(times >= 0, "times must not be negative: " + std::to_string(times));
    const auto graph = find<Graph>(context, handle, Kind::Graph, "graph");
    for (int32_t i = 0; i < times; i++) check(cudaGraphLaunch(graph->run, ctx.side), "Launching a graph");
    ctx.finish(ctx.side);
  });
}
`,
  "cuda/sample.cu": `/**
 * sample.cu: wkv_sample and wkv_log_prob, from logits [B, vocabulary] to tokens and to their probabilities.
 *
 *   tokens[b] = the highest logit (temperature 0), or a draw from those that top-k, top-p and min-p leave
 *   out[i] = logits[i, targets[i]] - max - log(sum_j exp(logits[i, j] - max))
 *
 * Tokens stand in an order: higher logit first, of equals the lower token. Every rule keeps the first so many, up to the place where a
 * running sum, of tokens or of their probabilities, reaches a goal; so does the draw. Nothing is sorted: a histogram over the range of
 * logits says in which bin the goal lies, finer ones follow while it holds many tokens, and its few tokens are compared with each other.
 *
 * A cluster of 8 blocks owns a row (one block before sm_90, or when the row is short), each a slice of it; they read each other's shared
 * memory. Bytes moved: the row once from L2, then from L1, three or four passes for each rule. Probabilities are summed as 64-bit
 * integers, so their sums depend on no order.
 */
#include <climits>
#include <cmath>

#include "../random.h"
#include "common.cuh"

namespace wkv {
namespace {

constexpr int kThreads = 1024;
constexpr int kBins = 1024, kBinBits = 10;  // one bin a thread
constexpr int kList = kThreads / 4;         // tokens that are compared with each other: four threads each
constexpr int kBlocks = 8;                  // of a cluster
constexpr int kShort = 4096;                // tokens that one block is enough for

// ---- the blocks of a row ----

__device__ inline int32_t row_blocks() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int32_t>(__clusterSizeInBlocks());
#else
  return 1;
#endif
}
__device__ inline int32_t row_rank() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int32_t>(__clusterRelativeBlockRank());
#else
  return 0;
#endif
}
/** Waits for all threads of the row; what they wrote to shared memory can then be seen. */
__device__ inline void row_sync() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#else
  __syncthreads();
#endif
}
/** The same variable in the shared memory of another block of the row. */
template <typename T>
__device__ inline T* peer(T* mine, int32_t rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(mine, static_cast<uint32_t>(rank)));
#else
  return mine;
#endif
}

/** The tokens of one block. */
struct Slice {
  const float* logits;  // the row
  int32_t begin, end;
  bool aligned;

  __device__ Slice(const float* logits, int32_t count) : logits(logits), aligned(count % 4 == 0) {
    const int32_t per = (count / 4 + row_blocks()) / row_blocks() * 4;
    begin = min(count, row_rank() * per), end = min(count, begin + per);
  }

  /** Calls body(logit, token) for each; a thread's tokens ascend. \`Batch\` loads of 16 bytes are under way at once. */
  template <int Batch, typename Body>
  __device__ __forceinline__ void each(Body body) const {
    for (int32_t i = begin + 4 * threadIdx.x; i < end; i += 4 * Batch * kThreads) {
      float4 x[Batch];
#pragma unroll
      for (int j = 0; j < Batch; j++) x[j] = load(i + 4 * kThreads * j);
#pragma unroll
      for (int j = 0; j < Batch; j++) {
        const int32_t token = i + 4 * kThreads * j;
        if (token < end) body(x[j].x, token);
        if (token + 1 < end) body(x[j].y, token + 1);
        if (token + 2 < end) body(x[j].z, token + 2);
        if (token + 3 < end) body(x[j].w, token + 3);
      }
    }
  }

 private:
  __device__ __forceinline__ float4 load(int32_t i) const {
    if (aligned) return i < end ? *reinterpret_cast<const float4*>(logits + i) : float4{};
    return {at(i), at(i + 1), at(i + 2), at(i + 3)};
  }
  __device__ __forceinline__ float at(int32_t i) const { return i < end ? logits[i] : 0.0f; }
};

// ---- order ----

/** Floats as integers of the same order; both zeros are one. */
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float unordered(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

/** Where a token stands: the first has the lowest place, and no two have the same. */
__device__ inline uint64_t place_of(float logit, uint32_t token) { return static_cast<uint64_t>(~ordered(logit)) << 32 | token; }
/** The last place that this logit can have. */
__device__ inline uint64_t last_place(float logit) { return place_of(logit, UINT_MAX); }

/** What a token counts for: 1, or exp(logit / temperature - most / temperature) in units of 1 / unit. */
struct Measure {
  bool counts;
  float temperature, most, unit;
  __device__ uint64_t of(float logit) const {
    if (counts) return 1;
    const float exponent = __fsub_rn(__fdiv_rn(logit, temperature), __fdiv_rn(most, temperature));
    return __float2ull_rn(logit == most ? unit : __saturatef(expf(exponent)) * unit);
  }
};

/**
 * Some tokens that follow each other in the order, found by digits: two of the distance from the highest logit, by which tokens spread
 * evenly over the bins, then those of the place itself, which tell any two apart.
 */
struct Members {
  float most, scale;
  uint64_t first = 0, last;                                // places
  uint32_t near = 0, far = (1u << 2 * kBinBits) - 1;  // distances

  __device__ Members(float most, uint64_t last) : most(most), last(last) {
    scale = __fdiv_rn(static_cast<float>(far), __fsub_rn(most, unordered(~static_cast<uint32_t>(last >> 32))));
  }
  /** Ascends with the place; a logit that is not finite may make the product none, and such tokens come last. */
  __device__ uint32_t distance(float logit) const {
    return static_cast<uint32_t>(fminf(__fmul_rn(__fsub_rn(most, logit), scale), static_cast<float>((1u << 2 * kBinBits) - 1)));
  }
  __device__ bool has(float logit, uint64_t place) const {
    if (place < first || place > last) return false;
    const uint32_t d = distance(logit);
    return d >= near && d <= far;
  }
  __device__ static int shift(int level) { return max(0, 64 - kBinBits * (level - 1)); }
  __device__ uint32_t bin(int level, float logit, uint64_t place) const {
    const uint64_t digits = level == 0 ? distance(logit) >> kBinBits : level == 1 ? distance(logit) : place >> shift(level);
    return static_cast<uint32_t>(digits) & (kBins - 1);
  }
  /** Leaves those of one bin. */
  __device__ void narrow(int level, uint32_t bin) {
    if (level == 0) near = bin << kBinBits, far = near + kBins - 1;
    else if (level == 1) near += bin, far = near;
    else first |= static_cast<uint64_t>(bin) << shift(level), last = min(last, first | ((uint64_t{1} << shift(level)) - 1));
  }
};

// ---- sums over a row ----

/** The first of the highest logits, and the first that is not a number. */
struct Top {
  float most;
  int32_t token, bad;
  __device__ static Top none() { return {-INFINITY, INT_MAX, INT_MAX}; }
  __device__ void join(const Top& other) {
    if (other.most > most || (other.most == most && other.token < token)) most = other.most, token = other.token;
    bad = min(bad, other.bad);
  }
};

struct Total {
  uint64_t weight;
  uint32_t tokens;
};

/** What a block has in shared memory. What other blocks read is written again two row_sync() later at the earliest. */
struct Board {
  Top tops[kThreads / 32], top;
  uint64_t area[kThreads / 32];
  double sums[32], sum;
  Total total;
  uint32_t tokens[kBins], low[kBins], high[kBins];  // the histogram of the slice: tokens, and the halves of their weights' sums
  uint64_t share;                                   // the weight in the bins that this block adds up
  struct {
    uint32_t bin, tokens;
    uint64_t before;
  } found;
  struct {
    uint64_t place, weight;
  } list[kList];  // in the first block only
  uint32_t listed;
  uint64_t chosen;
};

__device__ __noinline__ Top highest(Board& board, const Slice& slice) {
  Top top = Top::none();
  slice.each<4>([&](float x, int32_t token) {
    if (isnan(x)) top.bad = min(top.bad, token);
    if (top.token == INT_MAX || x > top.most) top.most = x, top.token = token;
  });
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) {
    Top other;
    other.most = __shfl_xor_sync(0xffffffffu, top.most, o);
    other.token = __shfl_xor_sync(0xffffffffu, top.token, o);
    other.bad = __shfl_xor_sync(0xffffffffu, top.bad, o);
    top.join(other);
  }
  if ((threadIdx.x & 31) == 0) board.tops[threadIdx.x >> 5] = top;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / 32; w++) top.join(board.tops[w]);
    board.top = top;
  }
  row_sync();
  top = Top::none();
  for (int32_t r = 0; r < row_blocks(); r++) top.join(*peer(&board.top, r));
  return top;
}

/** The sum over the block's threads up to this one; the last thread's is the whole one. */
__device__ uint64_t running_sum(Board& board, uint64_t x) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    const uint64_t before = __shfl_up_sync(0xffffffffu, x, o);
    if (lane >= o) x += before;
  }
  __syncthreads();
  if (lane == 31) board.area[warp] = x;
  __syncthreads();
  for (int w = 0; w < warp; w++) x += board.area[w];
  return x;
}

/** Weight and number of the tokens up to \`last\`. */
__device__ Total total(Board& board, const Slice& slice, const Measure& measure, uint64_t last) {
  uint64_t weight = 0, tokens = 0;
  slice.each<1>([&](float x, int32_t token) {
    if (place_of(x, token) <= last) weight += measure.of(x), tokens++;
  });
  weight = running_sum(board, weight);
  tokens = running_sum(board, tokens);
  if (threadIdx.x == kThreads - 1) board.total = {weight, static_cast<uint32_t>(tokens)};
  row_sync();
  Total all{0, 0};
  for (int32_t r = 0; r < row_blocks(); r++) {
    const Total part = *peer(&board.total, r);
    all.weight += part.weight, all.tokens += part.tokens;
  }
  return all;
}

/** Adds to one bin. Two 32-bit atomics, as shared memory has none of 64 bits: each carry is seen by exactly one thread. */
__device__ inline void add_to_bin(Board& board, uint32_t bin, uint64_t weight) {
  const uint32_t low = static_cast<uint32_t>(weight);
  const uint32_t carry = atomicAdd(&board.low[bin], low) > ~low ? 1 : 0, high = static_cast<uint32_t>(weight >> 32) + carry;
  if (high != 0) atomicAdd(&board.high[bin], high);
  atomicAdd(&board.tokens[bin], 1u);
}

/** Leaves of \`members\` the bin in which the running weight reaches \`goal\`. Gives their number, and adds to \`before\` the weight that
 *  stands before them. */
__device__ uint32_t narrow(Board& board, const Slice& slice, const Measure& measure, uint64_t goal, int level, Members* members, uint64_t* before) {
  const int32_t thread = threadIdx.x, rank = row_rank(), blocks = row_blocks();
  board.tokens[thread] = board.low[thread] = board.high[thread] = 0;
  __syncthreads();
  slice.each<1>([&](float x, int32_t token) {
    const uint64_t place = place_of(x, token);
    if (members->has(x, place)) add_to_bin(board, members->bin(level, x, place), measure.of(x));
  });
  row_sync();
  // Every block adds up its share of the bins, one a thread.
  const int32_t per = kBins / blocks, bin = rank * per + thread;
  uint64_t weight = 0;
  uint32_t tokens = 0;
  for (int32_t r = 0; r < blocks && thread < per; r++) {
    tokens += *peer(&board.tokens[bin], r);
    weight += *peer(&board.low[bin], r) + (static_cast<uint64_t>(*peer(&board.high[bin], r)) << 32);
  }
  uint64_t sum = running_sum(board, weight);
  if (thread == kThreads - 1) board.share = sum;
  row_sync();
  sum += *before;
  for (int32_t r = 0; r < rank; r++) sum += *peer(&board.share, r);
  if (sum - weight < goal && goal <= sum) {  // true for exactly one thread of the row
    for (int32_t r = 0; r < blocks; r++) *peer(&board.found, r) = {static_cast<uint32_t>(bin), tokens, sum - weight};
  }
  row_sync();
  *before = board.found.before;
  members->narrow(level, board.found.bin);
  return board.found.tokens;
}

/** The place at which the running weight of the tokens up to \`last\` reaches \`goal\`, from 1 to their whole weight. */
__device__ uint64_t reach(Board& board, const Slice& slice, const Measure& measure, uint64_t goal, float most, uint64_t last, uint32_t tokens) {
  Members members(most, last);
  uint64_t before = 0;
  for (int level = 0; tokens > kList; level++) tokens = narrow(board, slice, measure, goal, level, &members, &before);
  slice.each<1>([&](float x, int32_t token) {
    const uint64_t place = place_of(x, token);
    if (!members.has(x, place)) return;
    const uint32_t i = atomicAdd(peer(&board.listed, 0), 1u);
    *peer(&board.list[i], 0) = {place, measure.of(x)};
  });
  row_sync();
  if (row_rank() == 0) {
    // Four threads a token add up what stands before it.
    const uint32_t i = threadIdx.x / 4;
    const auto mine = board.list[i];
    uint64_t sum = 0;
    for (uint32_t j = threadIdx.x % 4; i < tokens && j < tokens; j += 4) sum += board.list[j].place <= mine.place ? board.list[j].weight : 0;
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    sum += before;
    if (i < tokens && threadIdx.x % 4 == 0 && sum - mine.weight < goal && goal <= sum) {
      for (int32_t r = 0; r < row_blocks(); r++) *peer(&board.chosen, r) = mine.place;
    }
    if (threadIdx.x == 0) board.listed = 0;
  }
  row_sync();
  return board.chosen;
}

// ---- kernels ----

__global__ void __launch_bounds__(kThreads) sample_kernel(int32_t* tokens, const float* logits, int32_t count, const float* settings, int32_t* rng, Faults faults) {
  __shared__ Board board;
  if (threadIdx.x == 0) board.listed = 0;
  wait_for_previous();
  let_next_start();
  const int64_t b = blockIdx.x / row_blocks();
  const Slice slice(logits + b * count, count);
  const float temperature = settings[b * 4], top_k = settings[b * 4 + 1], top_p = settings[b * 4 + 2], min_p = settings[b * 4 + 3];
  rng += b * 4;
  const uint64_t seed = static_cast<uint32_t>(rng[0]) | static_cast<uint64_t>(static_cast<uint32_t>(rng[1])) << 32;
  const float uniform = wkv_uniform(seed, static_cast<uint32_t>(rng[2]));
  const bool writes = row_rank() == 0 && threadIdx.x == 0;

  const Top top = highest(board, slice);
  if (top.bad != INT_MAX || !(temperature > 0.0f)) {
    if (writes && top.bad != INT_MAX) faults.report(Fault::NanLogit, top.bad);
    else if (writes) tokens[b] = top.token;
    row_sync();  // no block may end while another reads its memory
    return;
  }

  const float most = top.most;
  const uint64_t best = place_of(most, top.token);
  // Tokens of less than e^-30 of the best one's probability cannot be drawn with 24 random bits.
  const bool cuts = top_p > 0.0f && top_p < 1.0f;
  const float least = most + (min_p > 0.0f && !cuts ? logf(min_p) : -30.0f * fmaxf(1.0f, temperature));
  uint64_t last = max(best, last_place(least));
  const float unit = exp2f(static_cast<float>(__clz(count) + 30));  // \`count\` times it is below 2^62
#pragma unroll 1
  for (int rule = 0; rule < 3; rule++) {  // top-k; top-p; min-p and the draw
    if ((rule == 0 && !(top_k >= 1.0f)) || (rule == 1 && !cuts)) continue;
    if (rule == 2 && min_p > 0.0f) last = max(best, min(last, last_place(most + logf(min_p))));
    const Measure measure{rule == 0, rule == 2 ? temperature : 1.0f, most, unit};
    const Total all = total(board, slice, measure, last);
    const double weight = static_cast<double>(all.weight), share = rule == 1 ? top_p : uniform;
    const double goal = rule == 0 ? floorf(top_k) : rule == 1 ? ceil(share * weight) : floor(share * weight) + 1.0;
    last = reach(board, slice, measure, min(static_cast<uint64_t>(fmax(goal, 1.0)), all.weight), most, last, all.tokens);
  }
  if (!writes) return;
  tokens[b] = static_cast<int32_t>(last);
  rng[2] = static_cast<int32_t>(static_cast<uint32_t>(rng[2]) + 1);
}

__global__ void __launch_bounds__(kThreads) log_prob_kernel(float* out, const float* logits, int32_t count, const int32_t* targets, Faults faults) {
  __shared__ Board board;
  wait_for_previous();
  let_next_start();
  const int64_t b = blockIdx.x / row_blocks();
  const Slice slice(logits + b * count, count);
  const bool writes = row_rank() == 0 && threadIdx.x == 0;
  const int32_t id = targets[b];
  if (id < 0 || id >= count) {
    if (writes) faults.report(Fault::Target, id, count);
    return;
  }
  const float most = highest(board, slice).most;
  double sum = 0.0;
  slice.each<1>([&](float x, int32_t) { sum += expf(x - most); });
  sum = block_sum(sum, board.sums);
  if (threadIdx.x == 0) board.sum = sum;
  row_sync();
  if (writes) {
    sum = 0.0;
    for (int32_t r = 0; r < row_blocks(); r++) sum += *peer(&board.sum, r);
    out[b] = slice.logits[id] - most - static_cast<float>(log(sum));
  }
  row_sync();  // no block may end while another reads its memory
}

/** A cluster for each row. */
Shape shape_of(const Context& ctx, int32_t rows, int32_t count) {
  const uint32_t blocks = ctx.capability >= 90 && count > kShort ? kBlocks : 1;
  return {dim3(static_cast<uint32_t>(rows) * blocks), dim3(kThreads), 0, blocks};
}

}  // namespace
}  // namespace wkv

using namespace wkv;

int32_t wkv_sample(int32_t context, int32_t tokens, int32_t logits, int32_t settings, int32_t rng) {
  return entry(context, [&](Context& ctx) {
    const TensorRef from = find_tensor(context, logits, "logits", WKV_F32, 1, -1);
    const TensorRef rules = find_tensor(context, settings, "settings", WKV_F32, from->rows, 4);
    const TensorRef state = find_tensor(context, rng, "rng", WKV_I32, from->rows, 4);
    const TensorRef to = find_tensor(context, tokens, "tokens", WKV_I32, 1, -1);
    require(to->columns >= from->rows, "tokens has fewer columns than logits has rows");
    ctx.hold(from, rules, state, to);
    launch(ctx, sample_kernel, shape_of(ctx, from->rows, from->columns), to->i32(), from->f32(), from->columns, rules->f32(), state->i32(), ctx.faults());
    ctx.submitted();
  });
}

int32_t wkv_log_prob(int32_t context, int32_t out, int32_t logits, int32_t targets, int32_t rows) {
  return entry(context, [&](Context& ctx) {
    const TensorRef from = find_tensor(context, logits, "logits", WKV_F32, rows, -1);
    const TensorRef ids = find_tensor(context, targets, "targets", WKV_I32, 1, -1);
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, 1, -1);
    require(rows >= 1 && ids->columns >= rows && to->columns >= rows, "targets and out must have at least \`rows\` columns, and rows be at least 1");
    ctx.hold(from, ids, to);
    launch(ctx, log_prob_kernel, shape_of(ctx, rows, from->columns), to->f32(), from->f32(), from->columns, ids->i32(), ctx.faults());
    ctx.submitted();
  });
}
`,
  "handles.cpp": `/** handles.cpp: the handle table, and the entries of wkv.h that know no device. */
#include "handles.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

namespace wkv {

// ---- handles: 20 bits of place, 11 of generation, so that a closed handle is not taken for a new one ----

namespace {
struct Place {
  std::shared_ptr<Object> object;
  int32_t generation = 1;
};
std::mutex handles_mutex;
std::vector<Place> places;
std::vector<int32_t> free_places;
int32_t live = 0;
std::string open_text;

constexpr int32_t kPlaceBits = 20;
constexpr int32_t kPlaceMask = (1 << kPlaceBits) - 1;

Place* locate(int32_t handle) {
  const int32_t place = handle & kPlaceMask;
  if (handle <= 0 || place >= static_cast<int32_t>(places.size())) return nullptr;
  Place& p = places[place];
  return p.object && p.generation == handle >> kPlaceBits ? &p : nullptr;
}

void release(Place& place, int32_t handle) {
  place.object.reset();
  place.generation = place.generation % 2047 + 1;
  free_places.push_back(handle & kPlaceMask);
  live--;
}

const char* name(Kind kind) {
  switch (kind) {
    case Kind::Context: return "context";
    case Kind::Tensor: return "tensor";
    case Kind::Rope: return "rotation";
    case Kind::Cache: return "cache";
    default: return "graph";
  }
}
}  // namespace

int32_t add_handle(int32_t context, std::shared_ptr<Object> object) {
  std::lock_guard<std::mutex> lock(handles_mutex);
  object->context = context;
  if (free_places.empty()) {
    if (places.size() > static_cast<size_t>(kPlaceMask)) fail(WKV_MEMORY, "Too many open handles");
    free_places.push_back(static_cast<int32_t>(places.size()));
    places.emplace_back();
  }
  const int32_t place = free_places.back();
  free_places.pop_back();
  places[place].object = std::move(object);
  live++;
  return places[place].generation << kPlaceBits | place;
}

std::shared_ptr<Object> find_handle(int32_t context, int32_t handle, Kind kind, const char* what) {
  std::lock_guard<std::mutex> lock(handles_mutex);
  Place* place = locate(handle);
  if (!place) fail(WKV_HANDLE, std::string(what) + ": handle " + std::to_string(handle) + " is closed or was never open");
  if (place->object->kind != kind) fail(WKV_HANDLE, std::string(what) + " is a " + name(place->object->kind) + ", expected a " + name(kind));
  if (kind != Kind::Context && place->object->context != context) fail(WKV_HANDLE, std::string(what) + " belongs to another context");
  return place->object;
}

std::shared_ptr<ContextBase> find_context(int32_t context) {
  return std::static_pointer_cast<ContextBase>(find_handle(0, context, Kind::Context, "Context"));
}

int32_t report(const std::shared_ptr<ContextBase>& context, int32_t status, const std::string& text) {
  std::mutex& mutex = context ? context->text_mutex : handles_mutex;
  std::lock_guard<std::mutex> lock(mutex);
  (context ? context->text : open_text) = text;
  return status;
}

void give_text(const std::string& text, char* out, int32_t out_bytes) {
  const size_t length = std::min(text.size(), static_cast<size_t>(out_bytes) - 1);
  std::memcpy(out, text.data(), length);
  out[length] = 0;
}

}  // namespace wkv

using namespace wkv;

int32_t wkv_abi_version(void) { return WKV_ABI_VERSION; }

int32_t wkv_source_hash(char* out, int32_t out_bytes) {
#ifndef WKV_SOURCE_HASH
#define WKV_SOURCE_HASH "unknown"
#endif
  const std::string text = WKV_SOURCE_HASH;
  if (!out || out_bytes < static_cast<int32_t>(text.size()) + 1) return WKV_INVALID;
  give_text(text, out, out_bytes);
  return WKV_OK;
}

int32_t wkv_live_handles(void) {
  std::lock_guard<std::mutex> lock(handles_mutex);
  return live;
}

int32_t wkv_error(int32_t context, char* out, int32_t out_bytes) {
  if (!out || out_bytes < 1) return WKV_INVALID;
  std::string text;
  try {
    const auto found = find_context(context);
    std::lock_guard<std::mutex> lock(found->text_mutex);
    text = found->text;
  } catch (const std::exception&) {
    std::lock_guard<std::mutex> lock(handles_mutex);
    text = open_text;
  }
  give_text(text, out, out_bytes);
  return WKV_OK;
}

int32_t wkv_close(int32_t context, int32_t handle) {
  std::vector<std::shared_ptr<Object>> gone;  // destroyed outside both locks, the context last
  return entry_of<ContextBase>(context, [&](ContextBase&) {
    std::lock_guard<std::mutex> lock(handles_mutex);
    Place* place = locate(handle);
    if (!place || (handle != context && place->object->context != context)) fail(WKV_HANDLE, "Handle " + std::to_string(handle) + " is closed or was never open in this context");
    if (handle == context) {
      for (size_t i = 0; i < places.size(); i++) {
        if (!places[i].object || places[i].object->context != context) continue;
        gone.push_back(places[i].object);
        release(places[i], static_cast<int32_t>(i));
      }
    }
    gone.push_back(place->object);
    release(*place, handle);
  });
}

int32_t wkv_bytes(int32_t context, int32_t handle, double* out, int32_t out_bytes) {
  return entry_of<ContextBase>(context, [&](ContextBase&) {
    require_buffer(out, out_bytes, 8, "out");
    std::lock_guard<std::mutex> lock(handles_mutex);
    Place* place = locate(handle);
    if (!place || place->object->context != context) fail(WKV_HANDLE, "Handle " + std::to_string(handle) + " is closed or was never open in this context");
    *out = static_cast<double>(place->object->bytes());
  });
}
`,
  "handles.hpp": `/** handles.hpp: errors, handles and the wrapper of every C entry; shared by both libraries (handles.cpp). */
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>

#include "wkv.h"

namespace wkv {

/** A failure on its way to the C boundary: a status and what wkv_error will say. */
struct Failure : std::runtime_error {
  int32_t status;
  Failure(int32_t status, const std::string& text) : std::runtime_error(text), status(status) {}
};

[[noreturn]] inline void fail(int32_t status, const std::string& text) { throw Failure(status, text); }

inline void require(bool holds, const std::string& text) {
  if (!holds) fail(WKV_INVALID, text);
}

enum class Kind { Context, Tensor, Rope, Cache, Graph };

/** What a handle stands for. */
struct Object {
  Kind kind;
  int32_t context = 0;
  explicit Object(Kind kind) : kind(kind) {}
  virtual ~Object() = default;
  virtual size_t bytes() const { return 0; }
};

/** What a context of either library has: its lock and the text of its last failure. Every entry holds \`mutex\`. */
struct ContextBase : Object {
  std::mutex mutex, text_mutex;
  std::string text;
  bool recording_failed = false;  // since wkv_graph_begin
  bool running = false;           // in wkv_graph_run, whose failures leave a recording alone
  ContextBase() : Object(Kind::Context) {}
};

int32_t add_handle(int32_t context, std::shared_ptr<Object> object);
std::shared_ptr<Object> find_handle(int32_t context, int32_t handle, Kind kind, const char* what);
std::shared_ptr<ContextBase> find_context(int32_t context);

template <typename T>
std::shared_ptr<T> find(int32_t context, int32_t handle, Kind kind, const char* what) {
  return std::static_pointer_cast<T>(find_handle(context, handle, kind, what));
}

/** Keeps the text of a failure for wkv_error (null: that of wkv_context_open), and gives its status. */
int32_t report(const std::shared_ptr<ContextBase>& context, int32_t status, const std::string& text);

/** Runs body() and turns every exception into a status. */
template <typename Body>
int32_t guarded(const std::shared_ptr<ContextBase>& context, Body body) {
  try {
    body();
    return WKV_OK;
  } catch (const Failure& failure) {
    return report(context, failure.status, failure.what());
  } catch (const std::bad_alloc&) {
    return report(context, WKV_MEMORY, "Out of memory");
  } catch (const std::exception& error) {
    return report(context, WKV_INTERNAL, error.what());
  } catch (...) {
    return report(context, WKV_INTERNAL, "Unknown failure");
  }
}

/** Wraps the body of a C entry: looks the context up and takes its lock. */
template <typename ContextType, typename Body>
int32_t entry_of(int32_t handle, Body body) {
  std::shared_ptr<ContextBase> context;
  const int32_t found = guarded(nullptr, [&] { context = find_context(handle); });
  if (found != WKV_OK) return found;
  std::lock_guard<std::mutex> lock(context->mutex);
  const int32_t status = guarded(context, [&] { body(static_cast<ContextType&>(*context)); });
  if (status != WKV_OK && !context->running) context->recording_failed = true;
  context->running = false;
  return status;
}

inline void require_buffer(const void* data, int64_t have, int64_t want, const char* what) {
  require(data != nullptr, std::string(what) + " is null");
  require(have == want, std::string(what) + " has " + std::to_string(have) + " bytes, expected " + std::to_string(want));
}

/** Copies a text out, cut to out_bytes and ended by a zero. */
void give_text(const std::string& text, char* out, int32_t out_bytes);

}  // namespace wkv
`,
  "policy.h": `/** policy.h: the score, select and merge rules, compiled into both libraries so that they choose alike (DESIGN: the step; paper: Algorithm 1). */
#ifndef WKV_POLICY_H
#define WKV_POLICY_H
#include <stdint.h>

#include "wkv.h"

#ifdef __CUDACC__
#define WKV_HD __host__ __device__
#else
#define WKV_HD
#endif

/** The average attention a / n of a token: the paper's weight. */
WKV_HD inline float wkv_average(float score, int32_t steps) { return score / (float)steps; }

/** Whether the token of this rank may leave, of \`total\` tokens with the new one. */
WKV_HD inline bool wkv_evictable(int32_t rank, int32_t total, int32_t sinks, int32_t recent) {
  return rank >= sinks && rank < total - recent;
}

/** Ward's cost of merging a token with its right neighbour: attention as mass, gap = |V_j - V_r|^2. */
WKV_HD inline float wkv_merge_cost(int32_t select, float w_j, float w_r, float gap) {
  const float mass = w_j + w_r;
  if (!(mass > 0.0f)) return 0.0f;
  if (select == WKV_SELECT_MERGE_COST_LINEAR) gap = __builtin_sqrtf(gap);
  return w_j * w_r / mass * gap;
}

/** Whether the rule needs the neighbour's average and the gap between the two values. */
WKV_HD inline bool wkv_select_uses_gap(int32_t select) {
  return select == WKV_SELECT_MERGE_COST || select == WKV_SELECT_MERGE_COST_LINEAR;
}

/** What the victim minimises. w_j, w_r: averages of the token and its right neighbour; where merges cost,
 *  the caller passes over the newest token, which has none. */
WKV_HD inline float wkv_select_value(int32_t select, int32_t rank, float w_j, float w_r, float gap) {
  if (select == WKV_SELECT_OLDEST) return (float)rank;
  if (wkv_select_uses_gap(select)) return wkv_merge_cost(select, w_j, w_r, gap);
  return w_j;
}

/** The merged value of one dimension: a convex combination, computed in f32 and rounded once when stored. */
WKV_HD inline float wkv_merged(float w_v, float v, float w_r, float r) {
  return (w_v * v + w_r * r) / (w_v + w_r);
}

#endif
`,
  "random.h": `/** random.h: the counter-based random numbers of wkv_sample, the same on both libraries. */
#ifndef WKV_RANDOM_H
#define WKV_RANDOM_H
#include <stdint.h>

#ifdef __CUDACC__
#define WKV_RANDOM_HD __host__ __device__
#else
#define WKV_RANDOM_HD
#endif

/** SplitMix64's output function. */
WKV_RANDOM_HD inline uint64_t wkv_mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

/** Uniform in [0, 1) with 24 bits: place \`draw\` of the stream \`seed\`; seeds are mixed first, so that near ones share nothing. */
WKV_RANDOM_HD inline float wkv_uniform(uint64_t seed, uint32_t draw) {
  const uint64_t z = wkv_mix(wkv_mix(seed) + 0x9e3779b97f4a7c15ull * ((uint64_t)draw + 1));
  return (float)(z >> 40) * (1.0f / 16777216.0f);
}

#endif
`,
  "wkv.h": `/**
 * wkv.h: the C ABI of WeightedKV and its manual. libwkv_cpu.so and libwkv_cuda.so both implement all of it;
 * src/backend/symbols.ts is made from it by kernels/bind.ts.
 *
 * Rules that hold for every function
 * - Only 32-bit integers, floats and caller-owned buffers cross the boundary, each buffer with its length in bytes.
 * - Contexts, tensors, rotations, caches and graphs are opaque int32_t handles, never 0; a closed or foreign handle is
 *   an error, not a crash. A handle is opened by one context and used with that context only.
 * - A function returns WKV_OK or the status of a failure, whose text wkv_error gives. Nothing exits, aborts or throws.
 * - Tensors are row-major [rows, columns]; activations are F32. One letter vocabulary: B sequences, H query heads,
 *   N key/value heads, G = H / N, D head dimension, M slots a head, T tokens of one sequence.
 * - Between wkv_graph_begin and wkv_graph_end the functions marked "op" are checked and recorded, not run.
 * - Results do not depend on the number of threads, and the same calls give the same bytes.
 */
#ifndef WKV_H
#define WKV_H
#include <stdint.h>

#define WKV_ABI_VERSION 1

#ifdef __cplusplus
#define WKV_API extern "C" __attribute__((visibility("default")))
#else
#define WKV_API __attribute__((visibility("default")))
#endif
/** Marks a call that may take longer than a millisecond: bindings run it off the main thread. */
#define WKV_API_SLOW WKV_API

enum wkv_status {
  WKV_OK = 0,
  WKV_INVALID = 1,  /* an argument is out of range, or shapes do not match */
  WKV_HANDLE = 2,   /* a handle is closed, of another kind or of another context */
  WKV_MEMORY = 3,   /* memory could not be had */
  WKV_DATA = 4,     /* weights or activations hold what cannot be computed with, such as a NaN */
  WKV_DEVICE = 5,   /* the device failed */
  WKV_INTERNAL = 6, /* a fault of the library */
};

/** Element types; a quantised row is a sequence of GGUF blocks of 32 columns. */
enum wkv_dtype {
  WKV_F32 = 0,
  WKV_F16 = 1,
  WKV_BF16 = 2,
  WKV_I32 = 3,
  WKV_Q8_0 = 4, /* 34 bytes a block: f16 scale, 32 int8 */
  WKV_Q4_0 = 5, /* 18 bytes a block: f16 scale, 32 4-bit values less 8 */
  WKV_Q4_1 = 6, /* 20 bytes a block: f16 scale, f16 minimum, 32 4-bit values */
};

/** Which dimensions a rotation turns together. */
enum wkv_pairs {
  WKV_PAIRS_HALF = 0,        /* (i, i + rotary / 2) */
  WKV_PAIRS_INTERLEAVED = 1, /* (2 i, 2 i + 1) */
};

/** Where a key is rotated. */
enum wkv_positions {
  WKV_POSITIONS_CACHE = 0, /* at its rank among the cached tokens, anew each step */
  WKV_POSITIONS_TEXT = 1,  /* once, at its place in the text */
};

/** Which token leaves when the cache is over its budget; ties go to the lowest rank. The rules are in policy.h. */
enum wkv_select {
  WKV_SELECT_NONE = 0,              /* nothing ever leaves: a full cache is an error */
  WKV_SELECT_OLDEST = 1,            /* the lowest evictable rank */
  WKV_SELECT_LOWEST_AVERAGE = 2,    /* the lowest average a / n */
  WKV_SELECT_MERGE_COST = 3,        /* the lowest w_j w_r / (w_j + w_r) |V_j - V_r|^2 with its right neighbour r */
  WKV_SELECT_MERGE_COST_LINEAR = 4, /* the same with |V_j - V_r| */
};

/** What happens to the value of the token that leaves. */
enum wkv_merge {
  WKV_MERGE_NONE = 0,  /* dropped */
  WKV_MERGE_RIGHT = 1, /* merged into the next rank's value, weighted with both averages */
};

/** What wkv_cache_read gives, always in rank order, \`kept\` entries for one layer, sequence and KV head. */
enum wkv_cache_field {
  WKV_CACHE_COUNTS = 0,    /* int32 [4]: kept, seen, merged, evicted */
  WKV_CACHE_POSITIONS = 1, /* int32 [kept]: each token's place in the text */
  WKV_CACHE_STEPS = 2,     /* int32 [kept]: n, the steps that attended to it */
  WKV_CACHE_SCORES = 3,    /* float [kept]: a, the sum of its attention weights */
  WKV_CACHE_SLOTS = 4,     /* int32 [kept]: where it lies */
  WKV_CACHE_KEYS = 5,      /* float [kept, D]: as stored, in the model's own dimension order */
  WKV_CACHE_VALUES = 6,    /* float [kept, D]: as stored */
  WKV_CACHE_EVENT = 7,     /* float [4]: the last step's victim and right neighbour (places in the text, -1: none), both averages */
};

enum wkv_activation { WKV_SILU = 0 };

/** How a linear op holds its input: as it is, or rounded to 8 bits in blocks of 32 (quantised weights only). */
enum wkv_precision { WKV_PRECISION_F32 = 0, WKV_PRECISION_INT8 = 1 };

/* ---- library, context, handles ---- */

/** WKV_ABI_VERSION of the library. */
WKV_API int32_t wkv_abi_version(void);

/** Copies the hash of the sources that the library was built from (64 hexadecimal digits and a zero). */
WKV_API int32_t wkv_source_hash(char* out, int32_t out_bytes);

/** Number of handles that are open in this process. */
WKV_API int32_t wkv_live_handles(void);

/** Opens a context. threads: 0 for one a core that this process may use. */
WKV_API int32_t wkv_context_open(int32_t threads, int32_t* out /* [1] */, int32_t out_bytes);

/** Copies the text of the context's last failure, cut to out_bytes and ended by a zero; context 0: of wkv_context_open. */
WKV_API int32_t wkv_error(int32_t context, char* out, int32_t out_bytes);

/** Copies a line that names the device, its instruction set and the threads in use. */
WKV_API int32_t wkv_device(int32_t context, char* out, int32_t out_bytes);

/** Closes a handle of any kind. Closing a context closes all that it opened. What a graph uses lives as long as the graph. */
WKV_API int32_t wkv_close(int32_t context, int32_t handle);

/** Bytes that a tensor, rotation or cache holds. */
WKV_API int32_t wkv_bytes(int32_t context, int32_t handle, double* out /* [1] */, int32_t out_bytes);

/* ---- tensors ---- */

/** Opens a tensor of zeros. columns must be a multiple of 32 for a quantised dtype. */
WKV_API int32_t wkv_tensor_open(int32_t context, int32_t dtype, int32_t rows, int32_t columns, int32_t* out /* [1] */, int32_t out_bytes);

/** Copies rows [row, row + rows) in, in file order. data_bytes must be their exact size. A scale that is not finite is WKV_DATA. */
WKV_API int32_t wkv_tensor_write(int32_t context, int32_t tensor, int32_t row, int32_t rows, const void* data, int32_t data_bytes);

/** Copies rows [row, row + rows) out. Quantised rows come out as floats. */
WKV_API int32_t wkv_tensor_read(int32_t context, int32_t tensor, int32_t row, int32_t rows, void* out, int32_t out_bytes);

/* ---- graphs ---- */

/** Starts recording: the ops that follow are checked and kept for wkv_graph_run. A context records one graph at a time. */
WKV_API int32_t wkv_graph_begin(int32_t context);

/** Ends recording and gives the graph; an op that failed since wkv_graph_begin makes it fail. */
WKV_API int32_t wkv_graph_end(int32_t context, int32_t* out /* [1] */, int32_t out_bytes);

/** Runs a graph \`times\` times over. Runs of one context follow each other, and may begin while a graph is being recorded, which they
 *  leave alone. After a failure the caches it wrote are undefined. */
WKV_API_SLOW int32_t wkv_graph_run(int32_t context, int32_t graph, int32_t times);

/* ---- ops on activations ---- */

/** op: out[i] = table[tokens[i]]. An id outside the table is WKV_DATA. */
WKV_API int32_t wkv_embed(int32_t context, int32_t out /* [>= rows, C] */, int32_t table /* [vocabulary, C] */, int32_t tokens /* I32 [1, >= rows] */, int32_t rows);

/** op: out[i] = x[i] / sqrt(mean(x[i]^2) + epsilon) * weight; out may be x. */
WKV_API int32_t wkv_rmsnorm(int32_t context, int32_t out, int32_t x, int32_t rows, int32_t weight /* [1, C] */, float epsilon);

/** op: out[i, out_column + j] = norm(x[x_row + i]) . w[j] + bias[j] (+ what out held, when add is 1), for rows i and all rows j of w.
 *  norm and bias are 0 or tensors [1, C]; norm is wkv_rmsnorm's. out must not be x unless norm, x and out are of one width and add is 1. */
WKV_API int32_t wkv_linear(int32_t context, int32_t out, int32_t out_column, int32_t x, int32_t x_row, int32_t rows, int32_t norm, float epsilon, int32_t w /* [J, C] */, int32_t bias, int32_t add, int32_t precision);

/** op: out[i, j] = activation(norm(x[i]) . gate[j]) * (norm(x[i]) . up[j]). */
WKV_API int32_t wkv_gated(int32_t context, int32_t out, int32_t x, int32_t rows, int32_t norm, float epsilon, int32_t gate /* [J, C] */, int32_t up /* [J, C] */, int32_t activation, int32_t precision);

/* ---- cache ---- */

/** Opens a rotation of the first 2 * count dimensions of a head by position * frequencies[i]; tables reach \`positions\` ranks, 2^21 at most. */
WKV_API int32_t wkv_rope_open(int32_t context, int32_t head_dim, int32_t pairs, const float* frequencies /* [count] */, int32_t frequencies_bytes, int32_t positions, int32_t* out /* [1] */, int32_t out_bytes);

/** Opens an empty cache of exactly \`slots\` tokens a KV head, in every layer and sequence; nothing is allocated later.
 *  Must hold: 0 <= sinks, 0 <= recent, sinks + recent <= slots; heads a multiple of kv_heads; the rotation is of this head
 *  dimension and, with positions in the cache, of more than \`slots\` positions; dtype F32, F16 or BF16. */
WKV_API int32_t wkv_cache_open(int32_t context, int32_t rope, int32_t layers, int32_t sequences, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t slots, int32_t sinks, int32_t recent, int32_t select, int32_t merge, int32_t positions, int32_t dtype, int32_t* out /* [1] */, int32_t out_bytes);

/** Empties one sequence, or all of them (-1). */
WKV_API int32_t wkv_cache_reset(int32_t context, int32_t cache, int32_t sequence);

/** Copies a wkv_cache_field of one layer, sequence and KV head out. */
WKV_API int32_t wkv_cache_read(int32_t context, int32_t cache, int32_t field, int32_t layer, int32_t sequence, int32_t kv_head, void* out, int32_t out_bytes);

/** op: one decode step of one layer for every sequence (the paper's Algorithm 1). The new token attends over cache and itself at
 *  rank \`kept\`; every token's mean weight over its query heads is added to its score; if kept + 1 > slots the policy picks a
 *  victim, merges or drops it, and the new token takes its slot. k and v are rounded to the cache's type first.
 *  victims: 0, or I32 [B, N], the rank that must leave (-1: the policy's own choice). */
WKV_API int32_t wkv_attend(int32_t context, int32_t cache, int32_t layer, int32_t out /* [B, H * D] */, int32_t qkv /* [B, (H + 2 N) * D] */, float scale, int32_t victims);

/** op: steps 3 to 6 of wkv_attend with attention weights that the caller computed: kv[b] holds N keys, then N values. */
WKV_API int32_t wkv_insert(int32_t context, int32_t cache, int32_t layer, int32_t kv /* [B, 2 N * D] */, int32_t weights /* [B, N * (M + 1)], rank order */, int32_t victims);

/** op: \`rows\` tokens of one sequence at once: causal attention over cache and tokens, each column's sum of weights added to its score
 *  as if streamed. When kept + rows > slots the policy is then applied with the averages of that moment until \`slots\` are left. */
WKV_API int32_t wkv_prefill(int32_t context, int32_t cache, int32_t layer, int32_t sequence, int32_t out /* [>= rows, H * D] */, int32_t qkv /* [>= rows, (H + 2 N) * D] */, int32_t rows, float scale);

/* ---- from logits to tokens ---- */

/** op: the next token of each row of logits. settings: F32 [B, 4]: temperature (0: the first of the highest), top-k (0: all), top-p
 *  (1: all), min-p (0: all), applied as top-k, top-p, min-p, temperature. rng: I32 [B, 4]: seed low, seed high, draws so far, unused. */
WKV_API int32_t wkv_sample(int32_t context, int32_t tokens /* I32 [1, B] */, int32_t logits /* [B, vocabulary] */, int32_t settings, int32_t rng);

/** op: out[i] = natural logarithm of the probability of targets[i] under logits[i]. */
WKV_API int32_t wkv_log_prob(int32_t context, int32_t out /* [1, >= rows] */, int32_t logits /* [>= rows, vocabulary] */, int32_t targets /* I32 [1, >= rows] */, int32_t rows);

#endif
`,
};
