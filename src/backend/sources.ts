/** The sources of the native libraries, by path below kernels/. Made by `deno task bind`. */
export const sources: Record<string, string> = {
  "cpu/attend.cpp": `/**
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

/** Adds the weights to the scores, and settles the new token. \`first\`: the work of the layer's first KV head of the sequence. */
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
`,
  "cpu/cache.cpp": `/** cache.cpp: rotations and caches, and wkv_insert. */
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
  return keys.bytes() + values.bytes() + scores.bytes() + words.bytes() + births.bytes() + places.bytes() + counts.size() * sizeof(Counts);
}

Ranked Cache::ranked(int64_t head) {
  const int64_t at = head * (slots + 1);
  return {scores.data() + at, births.data() + at, places.data() + at, words.data() + at * width(), slots + 1, counts[head].kept, width()};
}

Rotation Cache::rotation(int32_t rank) const {
  if (positions == WKV_POSITIONS_TEXT) return {nullptr, nullptr, 0};
  const int64_t at = int64_t{rank} * rope->count;
  return {rope->cosines.data() + at, rope->sines.data() + at, rope->count};
}

void Cache::check_layer(int32_t layer) const {
  require(layer >= 0 && layer < layers, "layer must be between 0 and " + std::to_string(layers - 1) + ": " + std::to_string(layer));
}

void Ranked::remove(int32_t rank) {
  const size_t after = size_t(count - rank - 1) * 4;
  std::memmove(score + rank, score + rank + 1, after);
  std::memmove(birth + rank, birth + rank + 1, after);
  std::memmove(slot + rank, slot + rank + 1, after);
  for (int32_t w = 0; w < width; w++) std::memmove(word(w) + rank, word(w) + rank + 1, after);
  count--;
}

void Ranked::add(int32_t t, int32_t birth_step) {
  score[count] = 0.0f;
  birth[count] = birth_step;
  slot[count] = -1 - t;
  for (int32_t w = 0; w < width; w++) word(w)[count] = 0;
  count++;
}

void mean_of_heads(const Loops& loops, const float* weights, int64_t stride, int32_t heads, int32_t count, std::vector<float>& mean) {
  mean.assign(count, 0.0f);
  for (int32_t n = 0; n < heads; n++) loops.add_scaled(mean.data(), weights + n * stride, 1.0f / static_cast<float>(heads), count);
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

int32_t wkv_cache_open(int32_t context, int32_t rope, int32_t layers, int32_t sequences, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t slots, int32_t sinks, int32_t recent, int32_t interval, int32_t select, int32_t merge, int32_t seed, int32_t positions, int32_t dtype, int32_t* out, int32_t out_bytes) {
  return entry(context, [&](Context&) {
    require_buffer(out, out_bytes, 4, "out");
    auto cache = std::make_shared<Cache>();
    cache->rope = find<Rope>(context, rope, Kind::Rope, "rope");
    require(layers >= 1 && layers <= 1024 && sequences >= 1 && sequences <= 4096, "layers must be between 1 and 1024, sequences between 1 and 4096");
    require(kv_heads >= 1 && kv_heads <= 1024 && heads >= kv_heads && heads % kv_heads == 0, "heads must be a multiple of kv_heads: " + std::to_string(heads) + ", " + std::to_string(kv_heads));
    require(cache->rope->head_dim == head_dim, "head_dim " + std::to_string(head_dim) + " is not the rotation's " + std::to_string(cache->rope->head_dim));
    require(slots >= 1, "slots must be at least 1: " + std::to_string(slots));
    require(sinks >= 0 && recent >= 0 && int64_t{sinks} + recent <= slots, "sinks + recent must be between 0 and slots: " + std::to_string(sinks) + " + " + std::to_string(recent) + " of " + std::to_string(slots));
    const int32_t most = std::max(1, slots - sinks - recent);
    require(interval >= 1 && interval <= most, "interval must be between 1 and " + std::to_string(most) + ": " + std::to_string(interval));
    require(select >= WKV_SELECT_NONE && select <= WKV_SELECT_OUTPUT_ERROR, "select " + std::to_string(select) + " is unknown");
    require(merge >= WKV_MERGE_NONE && merge <= WKV_MERGE_RIGHT_LIGHT, "merge " + std::to_string(merge) + " is unknown");
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
    cache->interval = interval;
    cache->select = select;
    cache->merge = merge;
    cache->seed = seed;
    cache->positions = positions;
    cache->dtype = dtype;
    const size_t all = size_t(layers) * sequences * kv_heads;
    const size_t entries = all * (size_t(slots) + 1);
    cache->keys.resize(all * slots * cache->row_bytes());
    cache->values.resize(all * slots * cache->row_bytes());
    cache->scores.resize(entries);
    cache->births.resize(entries);
    cache->places.resize(entries);
    cache->words.resize(entries * cache->width());
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
      std::vector<float> key(dim), angles(dim), layer_mean;
      const Incoming incoming{ctx.scratch.data(), ctx.scratch.data() + cache->row_bytes()};
      for (int32_t b = 0; b < cache->sequences; b++) {
        const float* shares = given->row(b);
        if (cache->by_layer()) mean_of_heads(*ctx.loops, shares, cache->slots + 1, n_heads, cache->counts[cache->head(layer, b, 0)].kept + 1, layer_mean);
        for (int32_t n = 0; n < n_heads; n++) {
          const int64_t head = cache->head(layer, b, n);
          Counts& counts = cache->counts[head];
          Ranked r = cache->ranked(head);
          const int32_t step = ++counts.steps;
          const float* now = shares + int64_t{n} * (cache->slots + 1);
          std::memcpy(key.data(), rows->row(b) + n * dim, size_t(dim) * 4);
          store_key(*ctx.loops, *cache, key.data(), cache->rope->at(step - 1, angles.data()), incoming.keys);
          ctx.loops->write_row(cache->dtype, rows->row(b) + (n_heads + n) * dim, dim, incoming.values);
          r.add(0, step);
          ctx.loops->add_scaled(r.score, now, 1.0f, r.count);
          settle(*ctx.loops, *cache, head, r, incoming, forced ? forced->i32()[b * n_heads + n] : -1, cache->by_layer() ? layer_mean.data() : now);
        }
      }
    });
  });
}
`,
  "cpu/cache.hpp": `/** cache.hpp: the cache of the CPU library and steps 4 to 6 of a decode step, shared by wkv_attend, wkv_insert and wkv_prefill. */
#pragma once
#include "../policy.h"
#include "../rows.hpp"
#include "common.hpp"

namespace wkv {

/**
 * The tokens of one head in rank order. \`slot\` says where a token's K and V lie (they never move); a negative slot -1 - t is row t of
 * the incoming tokens, which have no slot yet. \`words\` [words a token, stride] is what the policy keeps of a token (policy.h).
 */
struct Ranked {
  float* score;
  int32_t* birth;  // the step that fed the token, from 1: its place in the text + 1
  int32_t* slot;
  uint32_t* words;
  int64_t stride;
  int32_t count, width;  // tokens; words a token

  uint32_t* word(int32_t w) const { return words + w * stride; }
  float* number(int32_t w) const { return reinterpret_cast<float*>(word(w)); }
  /** Takes a rank out. */
  void remove(int32_t rank);
  /** Adds incoming row t at the end, its words 0. */
  void add(int32_t t, int32_t birth_step);
};

/** Counters of one head. */
struct Counts {
  int32_t kept = 0, steps = 0, merged = 0, evicted = 0;
  float event[4] = {-1.0f, -1.0f, 0.0f, 0.0f};
  float threshold = WKV_UNSET;  // of nearest
};

struct Cache : Object {
  RopeRef rope;
  int32_t layers, sequences, heads, kv_heads, head_dim, slots, sinks, recent, interval, select, merge, seed, positions, dtype;
  Memory<uint8_t> keys, values;                 // [layers, B, N, slots, D] in \`dtype\`, keys in the library's order of dimensions
  Memory<float> scores;                         // [layers, B, N, slots + 1]
  Memory<int32_t> births, places;               // the same
  Memory<uint32_t> words;                       // [layers, B, N, words a token, slots + 1]
  std::vector<Counts> counts;                   // [layers, B, N]
  Cache() : Object(Kind::Cache) {}

  size_t bytes() const override;
  int32_t group() const { return heads / kv_heads; }
  /** Where its heads lie in rows that begin with its KV head kv_head; \`out_columns\`: of a row of outputs. */
  RowHeads row_heads(int32_t out_columns, int32_t kv_head) const { return RowHeads(group(), kv_heads, head_dim, out_columns, kv_head); }
  int64_t row_bytes() const { return int64_t{head_dim} * (dtype == WKV_F32 ? 4 : 2); }
  int64_t head(int32_t layer, int32_t sequence, int32_t kv_head) const { return (int64_t{layer} * sequences + sequence) * kv_heads + kv_head; }
  uint8_t* keys_of(int64_t head) { return keys.data() + head * slots * row_bytes(); }
  uint8_t* values_of(int64_t head) { return values.data() + head * slots * row_bytes(); }
  Ranked ranked(int64_t head);
  int32_t width() const { return wkv_words(select, merge); }
  /** Whether all KV heads of a layer choose as one. */
  bool by_layer() const { return select == WKV_SELECT_LOWEST_NOW; }
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
 * Steps 4 to 6 for one head (settle.cpp): \`ranked\` holds the cached tokens and the incoming ones behind them, scores already added.
 * While too many are left the policy's victim (rank \`forced\` at first, -1: none) leaves; the incoming tokens that are left are then
 * copied into free slots. now: the weights of this step in rank order, mean over the layer where it chooses as one; null: unknown.
 */
void settle(const Loops& loops, Cache& cache, int64_t head, Ranked& ranked, const Incoming& incoming, int32_t forced, const float* now);

/** The mean of the KV heads' weights, [heads, stride], over their first \`count\` ranks. */
void mean_of_heads(const Loops& loops, const float* weights, int64_t stride, int32_t heads, int32_t count, std::vector<float>& mean);

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
  "cpu/embed.cpp": `/** embed.cpp: the ops that touch each activation once: wkv_embed, wkv_rmsnorm, wkv_qk_norm, wkv_softcap. */
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

typedef uint8_t b32 __attribute__((vector_size(32)));
typedef uint8_t b8 __attribute__((vector_size(8)));
typedef int8_t s8 __attribute__((vector_size(8)));

inline b32 load_bytes(const uint8_t* p) {
  b32 v;
  std::memcpy(&v, p, 32);
  return v;
}
/** 8 bytes as floats, signed or not. */
inline f8 widen(const uint8_t* p) {
  b8 v;
  std::memcpy(&v, p, 8);
  return __builtin_convertvector(v, f8);
}
inline f8 widen_signed(const uint8_t* p) {
  s8 v;
  std::memcpy(&v, p, 8);
  return __builtin_convertvector(v, f8);
}

/** The numbers of a piece as int8, q - middle or what IQ4_NL's stand for: vector v has columns 4 v .. 4 v + 3, row by row. */
template <int32_t kType>
inline void unpack(const uint8_t* from, b32 (&w)[8]) {
  constexpr wkv_form form = wkv_form_of(kType);
  if (form.low == 4) {
    for (int32_t v = 0; v < 4; v++) {
      const b32 both = load_bytes(from + v * 32);
      w[v] = both & 15, w[4 + v] = both >> 4;
    }
  } else {
    const b32 first = load_bytes(from), second = load_bytes(from + 32);
    for (int32_t v = 0; v < 4; v++) w[v] = first >> (2 * v) & 3, w[4 + v] = second >> (2 * v) & 3;
  }
  const uint8_t* high = from + (form.low == 4 ? 128 : 64);
  if (form.high == 1) {
    const b32 bits = load_bytes(high);
    for (int32_t v = 0; v < 4; v++) w[v] |= (bits >> v & 1) << form.low, w[4 + v] |= (bits >> (4 + v) & 1) << form.low;
  }
  if (form.high == 2) {
    const b32 first = load_bytes(high), second = load_bytes(high + 32);
    for (int32_t v = 0; v < 4; v++) w[v] |= (first >> (2 * v) & 3) << form.low, w[4 + v] |= (second >> (2 * v) & 3) << form.low;
  }
  if (kType == WKV_IQ4_NL) {
#if defined(__AVX2__)
    __m128i values;
    std::memcpy(&values, WKV_IQ4_VALUES, 16);
    const __m256i table = _mm256_broadcastsi128_si256(values);
    for (int32_t v = 0; v < 8; v++) w[v] = (b32)_mm256_shuffle_epi8(table, (__m256i)w[v]);
#else
    for (int32_t v = 0; v < 8; v++) {
      for (int32_t i = 0; i < 32; i++) w[v][i] = static_cast<uint8_t>(WKV_IQ4_VALUES[w[v][i]]);
    }
#endif
  } else if (form.middle) {
    for (int32_t v = 0; v < 8; v++) w[v] -= static_cast<uint8_t>(form.middle);
  }
}

/** A piece's scales and minima for 8 rows: of its first and its second 16 columns. A number is scale * int8 + least. */
struct PieceScales {
  f8 scale[2], least[2];
};

template <int32_t kType>
inline PieceScales piece_scales(const uint8_t* group, int32_t piece) {
  constexpr wkv_form form = wkv_form_of(kType);
  const uint8_t* at = group + piece_at(kType, piece);
  const f8 none = spread(0.0f);
  if (!form.subs) {
    const f8 d = load_halves(at), least = form.least ? load_halves(at + 16) : none;
    return {{d, d}, {least, least}};
  }
  const uint8_t* of = group + super_at(kType, piece);
  const f8 d = load_halves(of);
  if (kType == WKV_Q2_K) {
    const f8 m = load_halves(of + 16), first = widen(at), second = widen(at + 8);
    uint8_t mins[16];
    for (int32_t i = 0; i < 16; i++) mins[i] = at[i] >> 4;
    const f8 m0 = widen(mins), m1 = widen(mins + 8), sixteen = spread(16.0f);
    return {{d * (first - m0 * sixteen), d * (second - m1 * sixteen)}, {-m * m0, -m * m1}};
  }
  if (form.least) {
    const f8 scale = d * widen(at), least = -load_halves(of + 16) * widen(at + 8);
    return {{scale, scale}, {least, least}};
  }
  return {{d * widen_signed(at), d * widen_signed(at + 8)}, {none, none}};
}

template <int32_t kType>
inline void dequantise_piece(const uint8_t* group, int32_t piece, f8* out) {
  const PieceScales of = piece_scales<kType>(group, piece);
  b32 w[8];
  unpack<kType>(group + piece_at(kType, piece) + piece_head(kType), w);
  for (int32_t v = 0; v < 8; v++) {
    const i8 packed = (i8)w[v];
    for (int32_t c = 0; c < 4; c++) out[4 * v + c] = __builtin_convertvector(packed << (24 - 8 * c) >> 24, f8) * of.scale[v / 4] + of.least[v / 4];
  }
}

/** Calls body with a type of quants.h as a constant. */
#define WKV_BY_PIECES(dtype, body)            \\
  switch (dtype) {                            \\
    case WKV_Q5_0: body(WKV_Q5_0); break;     \\
    case WKV_Q5_1: body(WKV_Q5_1); break;     \\
    case WKV_Q2_K: body(WKV_Q2_K); break;     \\
    case WKV_Q3_K: body(WKV_Q3_K); break;     \\
    case WKV_Q4_K: body(WKV_Q4_K); break;     \\
    case WKV_Q5_K: body(WKV_Q5_K); break;     \\
    case WKV_Q6_K: body(WKV_Q6_K); break;     \\
    default: body(WKV_IQ4_NL); break;         \\
  }

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
  if (wkv_has_pieces(dtype)) {
    const uint8_t* at = weight + group * piece_at(dtype, columns / 32);
#define WKV_BODY(type) dequantise_piece<type>(at, column / 32, out)
    WKV_BY_PIECES(dtype, WKV_BODY)
#undef WKV_BODY
    return;
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

/** total + the sums of 4 products of signed bytes in each lane: |w| <= 128 and |x| <= 127, so a pair of products fits 16 bits. */
inline __m256i add_signed(__m256i total, __m256i w, __m256i x) {
  const __m256i magnitude = _mm256_abs_epi8(w), signed_x = _mm256_sign_epi8(x, w);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpbusd_epi32(total, magnitude, signed_x);
#else
  return _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, signed_x), _mm256_set1_epi16(1)));
#endif
}
#endif

/** Sums over the first and the second 16 columns of int8 weights times x, for each of the 8 rows. */
template <int32_t kType, int32_t kRows>
inline void half_products(const b32 (&w)[8], const int8_t* x, int64_t x_stride, i8 (&first)[kRows], i8 (&second)[kRows]) {
#if defined(__AVX2__)
  for (int32_t half = 0; half < 2; half++) {
    __m256i total[kRows];
    for (int32_t t = 0; t < kRows; t++) total[t] = _mm256_setzero_si256();
    for (int32_t v = 4 * half; v < 4 * half + 4; v++) {
      const __m256i own = (__m256i)w[v];
      for (int32_t t = 0; t < kRows; t++) {
        const __m256i four = spread4(x + t * x_stride + v * 4);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
        total[t] = wkv_form_of(kType).middle || kType == WKV_IQ4_NL ? add_signed(total[t], own, four) : _mm256_dpbusd_epi32(total[t], own, four);
#else
        // 8 products of at most 32 * 127 stay below 2^15; only IQ4_NL has larger numbers.
        if (kType == WKV_IQ4_NL) total[t] = add_signed(total[t], own, four);
        else if (wkv_form_of(kType).middle) total[t] = _mm256_add_epi16(total[t], _mm256_maddubs_epi16(_mm256_abs_epi8(own), _mm256_sign_epi8(four, own)));
        else total[t] = _mm256_add_epi16(total[t], _mm256_maddubs_epi16(own, four));
#endif
      }
    }
    for (int32_t t = 0; t < kRows; t++) {
#if !(defined(__AVX512VNNI__) && defined(__AVX512VL__))
      if (kType != WKV_IQ4_NL) total[t] = _mm256_madd_epi16(total[t], _mm256_set1_epi16(1));
#endif
      (half ? second : first)[t] = (i8)total[t];
    }
  }
#else
  for (int32_t t = 0; t < kRows; t++) {
    const int8_t* row = x + t * x_stride;
    int32_t total[2][8] = {};
    for (int32_t v = 0; v < 8; v++) {
      for (int32_t i = 0; i < 32; i++) total[v / 4][i / 4] += static_cast<int8_t>(w[v][i]) * row[v * 4 + i % 4];
    }
    std::memcpy(&first[t], total[0], 32);
    std::memcpy(&second[t], total[1], 32);
  }
#endif
}

/** Sums over 32 columns of weight (0..15 or int8) times x, for each of the 8 rows; Q4 values are taken as stored. */
template <int32_t kType, int32_t kRows>
inline void integer_products(const uint8_t* q, const int8_t* x, int64_t x_stride, i8* totals) {
#if defined(__AVX2__)
  __m256i total[kRows];
  for (int32_t t = 0; t < kRows; t++) total[t] = _mm256_setzero_si256();
  if (kType == WKV_Q8_0) {
    for (int32_t v = 0; v < 8; v++) {
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + v * 32));
      for (int32_t t = 0; t < kRows; t++) total[t] = add_signed(total[t], w, spread4(x + t * x_stride + v * 4));
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

/** Adds the products of a piece with kRows rows of x to their tile. */
template <int32_t kType, int32_t kRows>
inline void add_piece(const PieceScales& of, const b32 (&w)[8], const int8_t* x, int64_t x_stride, const float* scales, const float* sums, int64_t stride, float* tile) {
  constexpr wkv_form form = wkv_form_of(kType);
  i8 first[kRows], second[kRows];
  half_products<kType, kRows>(w, x, x_stride, first, second);
  for (int32_t t = 0; t < kRows; t++) {
    const f8 scale = spread(scales[t * stride]);
    f8 total = load(tile + t * 8);
    if (form.halves) total += __builtin_convertvector(first[t], f8) * (of.scale[0] * scale) + __builtin_convertvector(second[t], f8) * (of.scale[1] * scale);
    else total += __builtin_convertvector(first[t] + second[t], f8) * (of.scale[0] * scale);
    if (kType == WKV_Q2_K) {
      int32_t sum = 0;
      for (int32_t i = 0; i < 16; i++) sum += x[t * x_stride + i];
      const float half = scales[t * stride] * static_cast<float>(sum);
      total += of.least[0] * spread(half) + of.least[1] * spread(sums[t * stride] - half);
    } else if (form.least) {
      total += of.least[0] * spread(sums[t * stride]);
    }
    store(tile + t * 8, total);
  }
}

/** The same for the types of quants.h: a piece is unpacked once for all rows of x. */
template <int32_t kType>
inline void pieces_typed(const uint8_t* weight, int32_t columns, int64_t group, const int8_t* x, const float* scales, const float* sums, int32_t count, float* tile) {
  const int32_t blocks = columns / 32;
  const uint8_t* own = weight + group * piece_at(kType, blocks);
  std::memset(tile, 0, static_cast<size_t>(count) * 32);
  b32 w[8];
  for (int32_t b = 0; b < blocks; b++) {
    const PieceScales of = piece_scales<kType>(own, b);
    unpack<kType>(own + piece_at(kType, b) + piece_head(kType), w);
    int32_t t = 0;
    for (; t + 4 <= count; t += 4) add_piece<kType, 4>(of, w, x + int64_t{t} * columns + b * 32, columns, scales + int64_t{t} * blocks + b, sums + int64_t{t} * blocks + b, blocks, tile + t * 8);
    for (; t < count; t++) add_piece<kType, 1>(of, w, x + int64_t{t} * columns + b * 32, columns, scales + int64_t{t} * blocks + b, sums + int64_t{t} * blocks + b, blocks, tile + t * 8);
  }
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
    case WKV_Q4_1: return group_typed<WKV_Q4_1>(weight, columns, group, x, scales, sums, count, tile);
    default: break;
  }
#define WKV_BODY(type) pieces_typed<type>(weight, columns, group, x, scales, sums, count, tile)
  WKV_BY_PIECES(dtype, WKV_BODY)
#undef WKV_BODY

}

void rmsnorm(const float* x, const float* weight, int32_t columns, float epsilon, float* out) {
  double total = 0.0;
  for (int32_t c = 0; c < columns; c++) total += static_cast<double>(x[c]) * x[c];
  const float scale = 1.0f / std::sqrt(static_cast<float>(total / columns) + epsilon);
  for (int32_t c = 0; c < columns; c++) out[c] = x[c] * scale * weight[c];
}

/** gate / (1 + e^-s) * up, s being the gate or, as (1 + tanh(u)) / 2 = 1 / (1 + e^-2u), twice GELU's argument. */
void activate(int32_t activation, float* gate, const float* up, int64_t count) {
  const bool gelu = activation == WKV_GELU_TANH;
  constexpr float kLinear = 1.5957691216f, kCubic = 0.0713548162726f;  // 2 sqrt(2 / pi), and 0.044715 times it
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const f8 g = load(gate + i), s = gelu ? g * (spread(kLinear) + spread(kCubic) * g * g) : g;
    store(gate + i, g / (spread(1.0f) + exponential(-s)) * load(up + i));
  }
  for (; i < count; i++) {
    const float g = gate[i], s = gelu ? g * (kLinear + kCubic * g * g) : g;
    gate[i] = g / (1.0f + std::exp(-s)) * up[i];
  }
}

void softcap(float* x, int64_t count, float cap) {
  for (int64_t i = 0; i < count; i++) x[i] = cap * std::tanh(x[i] / cap);
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

constexpr int32_t kAhead = 12;

/** Asks for the row kAhead behind row i: once tokens have left, rows lie in no order that the hardware would foresee. Not inlined, GCC
 *  takes it for a function without effect and drops it. */
__attribute__((always_inline)) inline void ask_ahead(const StoredRows& rows, int32_t i, int64_t row_bytes) {
  if (i + kAhead >= rows.count) return;
  const uint8_t* row = rows.data + rows.slots[i + kAhead] * row_bytes;
  for (int64_t line = 0; line < row_bytes; line += 64) __builtin_prefetch(row + line);
}

/** kHeads products with rows that are rotated in registers, a vector of pairs at a time; pairs and head_dim are multiples of 8. */
template <int32_t kType, int32_t kHeads>
void vector_scores(const StoredRows& keys, const Rotation& rotation, const float* q, float scale, float* scores, int64_t stride) {
  const int32_t size = size_of(kType), dim = keys.head_dim, pairs = rotation.pairs;
  for (int32_t i = 0; i < keys.count; i++) {
    const uint8_t* row = keys.data + keys.slots[i] * int64_t{dim} * size;
    ask_ahead(keys, i, int64_t{dim} * size);
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
      if (d == 0) ask_ahead(values, i, bytes);
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
    WKV_TEXT(WKV_ISA), weight_row, round_row, rmsnorm, group_f32, group_int8, activate, softcap, read_row, write_row, scores, weighted_values,
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
 * - the other types (quants.h): of a K type, for each 256 columns 8 f16 scales and, where there are any, 8 f16 minima of the blocks, then
 *   the pieces. A piece of 32 columns has its 8 first and 8 second sub-scales (K) or 8 f16 scales and minima; then vectors as above, whose
 *   bytes hold the low bits (4: as Q4; 2: columns 4 v .. at bit 2 v of the first of two vectors, 16 + 4 v .. of the second), then the high
 *   ones (1: at bit v and bit 4 + v of one vector; 2: as the low 2).
 */
#pragma once
#include <cstdint>

#include "../quants.h"

namespace wkv {

/** Stored rows of a head that attention reads: row i lies at data + slots[i] * head_dim elements. */
struct StoredRows {
  const uint8_t* data;
  int32_t dtype, head_dim;
  const int32_t* slots;
  int32_t count;
};

/** Bytes of a piece's scales in a group, and of all that 32 columns take beside the block's own. */
constexpr int32_t piece_head(int32_t dtype) { return wkv_form_of(dtype).subs ? 16 : wkv_form_of(dtype).least ? 32 : 16; }
constexpr int32_t piece_bytes(int32_t dtype) { return piece_head(dtype) + (wkv_form_of(dtype).low == 4 ? 128 : 64) + wkv_form_of(dtype).high * 32; }
/** Bytes of the scales of 8 K blocks. */
constexpr int32_t super_bytes(int32_t dtype) { return !wkv_form_of(dtype).subs ? 0 : wkv_form_of(dtype).least ? 32 : 16; }
/** Where a piece lies in its group, and that of the scales of its block. */
constexpr int64_t super_at(int32_t dtype, int32_t piece) { return int64_t{piece / 8} * (super_bytes(dtype) + 8 * piece_bytes(dtype)); }
constexpr int64_t piece_at(int32_t dtype, int32_t piece) {
  return wkv_form_of(dtype).subs ? super_at(dtype, piece) + super_bytes(dtype) + piece % 8 * piece_bytes(dtype) : int64_t{piece} * piece_bytes(dtype);
}

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
  /** gate[i] = activation(gate[i]) * up[i], a wkv_activation. */
  void (*activate)(int32_t activation, float* gate, const float* up, int64_t count);
  /** x = cap * tanh(x / cap). */
  void (*softcap)(float* x, int64_t count, float cap);

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
 *   (scores capped, and i > len + t - window, where asked)
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
  uint32_t* words;  // [words a token, length]
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
  w.words = reinterpret_cast<uint32_t*>(take(w.length * cache.width(), 4));
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
  const RowHeads& of;
  Tensor& qkv;
  Tensor& out;
  int32_t rows, layer, kv_head;
  int64_t head;
  float scale, softcap;
  int32_t window;
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
          const float* row = qkv.row(t);
          std::memcpy(key, row + of.key(kv_head) * dim, size_t(dim) * 4);
          store_key(loops, cache, key, cache.rope->at(position(t), own), w.new_keys + t * bytes);
          loops.write_row(cache.dtype, row + of.value(kv_head) * dim, dim, w.new_values + t * bytes);
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
    const int64_t kept = w.length - rows, h = of.query(kv_head, g);
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
      const int32_t first = window > 0 ? std::max(0, count - window) : 0;
      if (softcap > 0.0f) loops.softcap(row + first, count - first, softcap);
      const float sum = loops.exponentials(row + first, count - first, loops.highest(row + first, count - first));
      check_sum(sum, layer);
      for (int32_t i = first; i < count; i++) row[i] /= sum;
      std::fill(row, row + first, 0.0f);
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
    Ranked r{w.score, w.birth, w.slot, w.words, w.length, stored.count, stored.width};
    const size_t kept = size_t(stored.count) * 4;
    std::memcpy(r.score, stored.score, kept);
    std::memcpy(r.birth, stored.birth, kept);
    std::memcpy(r.slot, stored.slot, kept);
    for (int32_t i = 0; i < r.width; i++) std::memcpy(r.word(i), stored.word(i), kept);
    for (int32_t t = 0; t < rows; t++) r.add(t, counts.steps + 1 + t);
    const int32_t tasks = cache.group() * kStripes;
    for (int32_t task = 0; task < tasks; task++) ctx.loops->add_scaled(r.score, w.columns + task * w.stride, 1.0f / static_cast<float>(cache.group()), w.length);
    counts.steps += rows;
    settle(*ctx.loops, cache, head, r, Incoming{w.new_keys, w.new_values}, -1, nullptr);
    const size_t left = size_t(r.count) * 4;
    std::memcpy(stored.score, r.score, left);
    std::memcpy(stored.birth, r.birth, left);
    std::memcpy(stored.slot, r.slot, left);
    for (int32_t i = 0; i < r.width; i++) std::memcpy(stored.word(i), r.word(i), left);
  }
};

}  // namespace
}  // namespace wkv

using namespace wkv;

int32_t wkv_prefill(int32_t context, int32_t handle, int32_t layer, int32_t kv_head, int32_t sequence, int32_t out, int32_t qkv, int32_t rows, float scale, float softcap, int32_t window) {
  return entry(context, [&](Context& ctx) {
    const CacheRef cache = find_cache(context, handle, layer);
    require(sequence >= 0 && sequence < cache->sequences, "sequence must be between 0 and " + std::to_string(cache->sequences - 1) + ": " + std::to_string(sequence));
    require(rows >= 1, "rows must be at least 1: " + std::to_string(rows));
    check_softcap(softcap);
    require(window >= 0, "window must be at least 0: " + std::to_string(window));
    require(!wkv_by_step(cache->select), "this policy keeps a record of each step's weights: feed its tokens one by one");
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, -1);
    const RowHeads of = cache->row_heads(to->columns, kv_head);
    const TensorRef from = find_tensor(context, qkv, "qkv", WKV_F32, rows, of.columns(cache->head_dim));
    int64_t bytes = 0;
    cut(nullptr, *cache, ctx.threads.count(), cache->slots, rows, &bytes);
    ctx.scratch.reserve(size_t(bytes));
    ctx.submit([=, &ctx] {
      for (int32_t n = 0; n < cache->kv_heads; n++) {
        const int64_t head = cache->head(layer, sequence, n);
        const Work w = cut(ctx.scratch.data(), *cache, ctx.threads.count(), cache->counts[head].kept, rows, nullptr);
        const Job job{ctx, *cache, of, *from, *to, rows, layer, n, head, scale, softcap, window, w};
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
  void* memory = nullptr;
  if (bytes >= kLarge) {
    memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
  } else {
    const size_t size = (bytes + 64) / 64 * 64;
    memory = std::aligned_alloc(64, size);
    if (!memory) throw std::bad_alloc();
    std::memset(memory, 0, size);
  }
  count_bytes(static_cast<int64_t>(bytes));
  return memory;
}

void release(void* memory, size_t bytes) {
  count_bytes(-static_cast<int64_t>(bytes));
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
bool quantised(int32_t dtype) { return dtype >= WKV_Q8_0; }
/** Bytes of 8 rows. */
int64_t group_bytes(int32_t dtype, int32_t columns) { return wkv_has_pieces(dtype) ? piece_at(dtype, columns / 32) : 8 * wkv_row_bytes(dtype, columns); }
/** F32 and I32 lie row by row, weights of every other type in groups of 8 rows. */
bool grouped(int32_t dtype) { return dtype != WKV_F32 && dtype != WKV_I32; }

void require_finite(uint16_t half, int32_t block) {
  if ((half & 0x7c00) == 0x7c00) fail(WKV_DATA, "The scale of block " + std::to_string(block) + " is not finite");
}

/** Puts one row in file order into its place within its group of 8: the types of quants.h. */
void scatter_pieces(int32_t dtype, int32_t columns, uint8_t* group, int32_t lane, const uint8_t* row) {
  const wkv_form form = wkv_form_of(dtype);
  wkv_piece piece;
  for (int32_t b = 0; b < columns / 32; b++) {
    const int32_t block = b * 32 / form.columns;
    wkv_read_piece(dtype, row + int64_t{block} * form.bytes, form.subs ? b % 8 : 0, &piece);
    require_finite(piece.d, block);
    require_finite(piece.least, block);
    uint8_t *at = group + piece_at(dtype, b), *scales = form.subs ? group + super_at(dtype, b) : at;
    std::memcpy(scales + lane * 2, &piece.d, 2);
    if (form.least) std::memcpy(scales + 16 + lane * 2, &piece.least, 2);
    if (form.subs) at[lane] = piece.sub[0], at[8 + lane] = piece.sub[1];
    uint8_t* const low = at + piece_head(dtype) + lane * 4;
    uint8_t* const high = low + (form.low == 4 ? 128 : 64);
    // A byte is shared by columns of one row only, so its other bits are this row's too.
    for (int32_t c = 0; c < 4; c++) {
      for (int32_t v = 0; v < 4; v++) {
        if (form.low == 4) low[v * 32 + c] = 0;
      }
      if (form.low == 2) low[c] = low[32 + c] = 0;
      for (int32_t h = 0; h < form.high; h++) high[h * 32 + c] = 0;
    }
    for (int32_t i = 0; i < 32; i++) {
      const int32_t half = i / 16, v = i % 16 / 4, c = i % 4, first = piece.q[i] & ((1 << form.low) - 1), rest = piece.q[i] >> form.low;
      const auto put = [](uint8_t& byte, int32_t bits) { byte = static_cast<uint8_t>(byte | bits); };
      if (form.low == 4) put(low[v * 32 + c], first << (half * 4));
      else put(low[half * 32 + c], first << (v * 2));
      if (form.high == 1) put(high[c], rest << (half * 4 + v));
      if (form.high == 2) put(high[half * 32 + c], rest << (v * 2));
    }
  }
}

/** The same for all types but F32 and I32. */
void scatter(int32_t dtype, int32_t columns, uint8_t* group, int32_t lane, const uint8_t* row) {
  if (!quantised(dtype)) {
    for (int32_t c = 0; c < columns; c++) std::memcpy(group + (c * 8 + lane) * 2, row + c * 2, 2);
    return;
  }
  if (wkv_has_pieces(dtype)) return scatter_pieces(dtype, columns, group, lane, row);
  const int32_t bytes = wkv_form_of(dtype).bytes, heads = dtype == WKV_Q4_1 ? 2 : 1, vectors = dtype == WKV_Q8_0 ? 8 : 4;
  for (int32_t b = 0; b < columns / 32; b++, row += bytes, group += bytes * 8) {
    for (int32_t h = 0; h < heads; h++) {
      std::memcpy(group + h * 16 + lane * 2, row + h * 2, 2);
      uint16_t half;
      std::memcpy(&half, row + h * 2, 2);
      require_finite(half, b);
    }
    for (int32_t v = 0; v < vectors; v++) std::memcpy(group + heads * 16 + v * 32 + lane * 4, row + heads * 2 + v * 4, 4);
  }
}
}  // namespace

Tensor::Tensor(int32_t dtype, int32_t rows, int32_t columns) : Object(Kind::Tensor), dtype(dtype), rows(rows), columns(columns) {
  // Below 2^64: 2^31 rows of 2^33 bytes.
  if (grouped(dtype)) memory.resize((size_t(rows) + 7) / 8 * static_cast<size_t>(group_bytes(dtype, columns)));
  else memory.resize(size_t(rows) * static_cast<size_t>(wkv_row_bytes(dtype, columns)));
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
    require(dtype >= WKV_F32 && dtype <= WKV_IQ4_NL, "dtype " + std::to_string(dtype) + " is unknown");
    require(rows >= 1 && columns >= 1, "rows and columns must be at least 1: " + std::to_string(rows) + " x " + std::to_string(columns));
    const int32_t whole = wkv_form_of(dtype).columns;
    require(columns % whole == 0, "columns must be a multiple of " + std::to_string(whole) + " for quantised rows of this type: " + std::to_string(columns));
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
    const int64_t bytes = wkv_row_bytes(tensor->dtype, tensor->columns);
    require_buffer(data, data_bytes, rows * bytes, "data");
    if (!grouped(tensor->dtype)) {
      std::memcpy(tensor->memory.data() + row * bytes, data, static_cast<size_t>(rows * bytes));
      return;
    }
    for (int64_t r = row; r < int64_t{row} + rows; r++) {
      try {
        scatter(tensor->dtype, tensor->columns, tensor->memory.data() + r / 8 * group_bytes(tensor->dtype, tensor->columns), static_cast<int32_t>(r % 8), static_cast<const uint8_t*>(data) + (r - row) * bytes);
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
    const int64_t bytes = as_floats ? int64_t{tensor->columns} * 4 : wkv_row_bytes(tensor->dtype, tensor->columns);
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

int32_t wkv_graph_start(int32_t context, int32_t handle) { return wkv_graph_run(context, handle, 1); }

int32_t wkv_graph_poll(int32_t context, int32_t* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    ctx.running = true;
    require_buffer(out, out_bytes, 4, "out");
    *out = 1;  // wkv_graph_start has run it
  });
}
`,
  "cpu/sample.cpp": `/** sample.cpp: wkv_sample, wkv_log_prob and wkv_divergence, from logits to tokens and to their probabilities. */
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

/** p (x - y); what has no probability adds nothing, however far below the highest its logits are. */
double weighted(float p, float x, float y) { return p > 0.0f ? double{p} * (double{x} - double{y}) : 0.0; }

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

int32_t wkv_divergence(int32_t context, int32_t out, int32_t logits, int32_t others, int32_t rows) {
  return entry(context, [&](Context& ctx) {
    const TensorRef from = find_tensor(context, logits, "logits", WKV_F32, rows, -1);
    const TensorRef with = find_tensor(context, others, "others", WKV_F32, rows, from->columns);
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, 2);
    require(rows >= 1, "rows must be at least 1");
    ctx.submit([=, &ctx] {
      ctx.threads.loop(rows, 1, [&](int64_t begin, int64_t end, int) {
        float p[1024], q[1024];
        for (int64_t i = begin; i < end; i++) {
          const float *x = from->row(i), *y = with->row(i);
          const int32_t columns = from->columns, first = argmax(x, columns), second = argmax(y, columns);
          double sum_p = 0.0, sum_q = 0.0, apart = 0.0;
          for (int32_t j = 0; j < columns; j += 1024) {
            const int32_t count = std::min(1024, columns - j);
            std::copy(x + j, x + j + count, p);
            std::copy(y + j, y + j + count, q);
            sum_p += ctx.loops->exponentials(p, count, x[first]);
            sum_q += ctx.loops->exponentials(q, count, y[second]);
            for (int32_t k = 0; k < count; k++) apart += weighted(p[k], x[j + k] - x[first], y[j + k] - y[second]);
          }
          to->row(i)[0] = static_cast<float>(std::max(0.0, apart / sum_p - std::log(sum_p) + std::log(sum_q)));
          to->row(i)[1] = first == second ? 1.0f : 0.0f;
        }
      });
    });
  });
}
`,
  "cpu/settle.cpp": `/** settle.cpp: steps 4 to 6 of a decode step: select, merge, insert. The rules are in policy.h, their blocks in docs/policies.md. */
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cache.hpp"

namespace wkv {
namespace {

/** Lists of a thread, kept so that a step allocates nothing once they have grown. */
struct Lists {
  std::vector<float> now, measure, row, sum;
  std::vector<int32_t> freed;
};

/** One head while tokens leave it. */
struct Head {
  const Loops& loops;
  Cache& cache;
  const int64_t index;
  Ranked& r;
  const Incoming& incoming;
  Lists& lists;
  const int32_t step, arrived, dim;

  float* now() const { return lists.now.data(); }
  float* measure() const { return lists.measure.data(); }
  uint8_t* key(int32_t rank) const { return row_of(cache.keys_of(index), incoming.keys, rank); }
  uint8_t* value(int32_t rank) const { return row_of(cache.values_of(index), incoming.values, rank); }
  uint8_t* row_of(uint8_t* stored, uint8_t* arrived, int32_t rank) const {
    const int32_t slot = r.slot[rank];
    return slot >= 0 ? stored + slot * cache.row_bytes() : arrived + (-1 - slot) * cache.row_bytes();
  }
  void read(const uint8_t* row, float* out) const { loops.read_row(cache.dtype, row, dim, out); }
  float average(int32_t rank) const { return wkv_average(r.score[rank], step - r.birth[rank] + 1); }
  /** The weight of a token's value in a merge, and what an average rule minimises. */
  float weight(int32_t rank) const { return cache.select == WKV_SELECT_LITERAL_AVERAGE ? r.score[rank] : average(rank); }

  void update_gap(int32_t rank) const {
    if (rank < 0 || rank + 1 >= r.count) return;
    r.number(0)[rank] = loops.gap(cache.dtype, value(rank), value(rank + 1), dim);
  }

  /** Notes this step's weights, whether or not a token leaves. */
  void note() const {
    if (cache.select == WKV_SELECT_LEAST_OFTEN) {
      const int32_t bit = (step - 1) % WKV_OFTEN_STEPS;
      uint32_t* word = r.word(bit / 32);
      const uint32_t mask = 1u << bit % 32;
      const float threshold = 1.0f / static_cast<float>(r.count);
      for (int32_t i = 0; i < r.count; i++) word[i] = now()[i] > threshold ? word[i] | mask : word[i] & ~mask;
    } else if (cache.select == WKV_SELECT_WINDOW) {
      std::memcpy(r.number((step - 1) % WKV_WINDOW_STEPS), now(), size_t(r.count) * 4);
    } else if (cache.merge == WKV_MERGE_NEAREST_VOTES) {
      std::fill(r.number(0) + r.count - arrived, r.number(0) + r.count, 1.0f);
    }
  }

  /** The weighted sum of all values, into lists.sum: the mean output of the group's query heads. */
  void find_output() const {
    lists.sum.assign(dim, 0.0f);
    for (int32_t i = 0; i < r.count; i++) {
      read(value(i), lists.row.data());
      loops.add_scaled(lists.sum.data(), lists.row.data(), now()[i], dim);
    }
  }
  float dot(const float* x, const float* y) const {
    float sum = 0.0f;
    for (int32_t d = 0; d < dim; d++) sum += x[d] * y[d];
    return sum;
  }

  /** Measures all tokens before the first leaves. */
  void measure_all() const {
    float* m = measure();
    float* row = lists.row.data();
    if (cache.select == WKV_SELECT_OUTPUT_ERROR) find_output();
    for (int32_t i = 0; i < r.count; i++) {
      switch (cache.select) {
        case WKV_SELECT_LEAST_OFTEN: {
          int32_t count = 0;
          for (int32_t w = 0; w < WKV_OFTEN_WORDS; w++) count += __builtin_popcount(r.word(w)[i]);
          m[i] = static_cast<float>(count);
          break;
        }
        case WKV_SELECT_WINDOW: {
          float sum = 0.0f;
          for (int32_t w = 0; w < WKV_WINDOW_STEPS; w++) sum += r.number(w)[i];
          m[i] = sum / WKV_WINDOW_STEPS;
          break;
        }
        case WKV_SELECT_KEY_NORM:
          read(key(i), row);
          m[i] = dot(row, row);
          break;
        case WKV_SELECT_SUM_VALUE_NORM:
          read(value(i), row);
          m[i] = 0.0f;
          for (int32_t d = 0; d < dim; d++) m[i] += std::fabs(row[d]);
          break;
        case WKV_SELECT_OUTPUT_ERROR:
          read(value(i), row);
          for (int32_t d = 0; d < dim; d++) row[d] -= lists.sum[d];
          m[i] = std::sqrt(dot(row, row));
          break;
        default: break;
      }
    }
  }
  /** What key-likeness measures, anew whenever a token leaves: each normalised key times the sum of all of them. */
  void measure_likeness() const {
    float* row = lists.row.data();
    lists.sum.assign(dim, 0.0f);
    const auto each = [&](auto body) {
      for (int32_t i = 0; i < r.count; i++) {
        read(key(i), row);
        body(i, 1.0f / std::max(std::sqrt(dot(row, row)), 1e-12f));
      }
    };
    each([&](int32_t, float scale) { loops.add_scaled(lists.sum.data(), row, scale, dim); });
    each([&](int32_t i, float scale) { measure()[i] = dot(row, lists.sum.data()) * scale; });
  }
  /** The mean over neighbouring ranks, those of recent tokens counting as 0. */
  float pooled(int32_t rank) const {
    float sum = 0.0f;
    for (int32_t i = std::max(0, rank - WKV_WINDOW_POOL / 2); i <= rank + WKV_WINDOW_POOL / 2; i++) {
      if (i < r.count - cache.recent) sum += measure()[i];
    }
    return sum / WKV_WINDOW_POOL;
  }

  /** The rank that minimises the policy's value; the lowest rank of equals. */
  int32_t pick() const {
    if (cache.select == WKV_SELECT_KEY_LIKENESS) measure_likeness();
    int32_t best = -1;
    float least = 0.0f;
    for (int32_t rank = cache.sinks; rank < r.count - cache.recent; rank++) {
      wkv_token t{rank, r.score[rank], weight(rank), 0.0f, now()[rank], measure()[rank]};
      float value = INFINITY;  // the newest has no right neighbour to be merged with
      if (!wkv_uses_gap(cache.select) || rank + 1 < r.count) {
        if (wkv_uses_gap(cache.select)) t.right = average(rank + 1), t.measure = r.number(0)[rank];
        else if (cache.select == WKV_SELECT_WINDOW) t.measure = pooled(rank);
        value = wkv_select_value(cache.select, t);
      }
      if (std::isnan(value)) fail(WKV_DATA, "What rank " + std::to_string(rank) + " is chosen by is not a number");
      if (best < 0 || value < least) best = rank, least = value;
    }
    return best;
  }

  /** What becomes of the victim's rows; gives the rank that took them in, or -1. */
  int32_t hand_on(int32_t j, int32_t turn) const {
    switch (cache.merge) {
      case WKV_MERGE_RIGHT:
      case WKV_MERGE_RIGHT_LIGHT: {
        if (j + 1 >= r.count) return -1;
        const float w_v = wkv_given(cache.merge, weight(j)), w_r = weight(j + 1);
        if (w_v + w_r > 0.0f) loops.merge(cache.dtype, w_v, value(j), w_r, value(j + 1), dim);
        return j + 1;
      }
      case WKV_MERGE_SPREAD: return spread(j, turn);
      case WKV_MERGE_NEAREST: {
        float likeness;
        const int32_t to = nearest(j, &likeness);
        float& threshold = cache.counts[index].threshold;
        const bool merges = to >= 0 && (threshold == WKV_UNSET || likeness >= threshold);
        if (to >= 0) threshold = threshold == WKV_UNSET ? likeness : (threshold + likeness) * 0.5f;
        if (!merges) return -1;
        const auto halve = [&](float v, float x) { return wkv_halved(x, likeness, v); };
        join(key(j), key(to), halve), join(value(j), value(to), halve);
        return to;
      }
      case WKV_MERGE_NEAREST_VOTES: {
        float likeness;
        const int32_t to = nearest(j, &likeness);
        if (to < 0 || likeness < WKV_VOTES_LIKENESS) return -1;
        float* votes = r.number(0);
        const float w_v = votes[j] * weight(j), w_r = votes[to] * weight(to);
        if (w_v + w_r > 0.0f) loops.merge(cache.dtype, w_v, key(j), w_r, key(to), dim), loops.merge(cache.dtype, w_v, value(j), w_r, value(to), dim);
        votes[to] += votes[j];
        return to;
      }
      default: return -1;
    }
  }

  /** to = body(from, to) in each dimension, rounded once. */
  template <typename Body>
  void join(const uint8_t* from, uint8_t* to, Body body) const {
    read(from, lists.row.data());
    read(to, lists.sum.data());
    for (int32_t d = 0; d < dim; d++) lists.sum[d] = body(lists.row[d], lists.sum[d]);
    loops.write_row(cache.dtype, lists.sum.data(), dim, to);
  }

  int32_t spread(int32_t j, int32_t turn) const {
    const int32_t last = std::min(j + WKV_SPREAD_RANKS, r.count - 1);
    if (last == j) return -1;
    float scores = 0.0f;
    for (int32_t i = j + 1; i <= last; i++) scores += r.score[i];
    const int32_t heads = cache.kv_heads, sequences = cache.sequences;
    const float draw = wkv_draw(cache.seed, static_cast<uint32_t>(index / (heads * sequences)), index / heads % sequences, index % heads, step - arrived, turn);
    if (!wkv_spreads(r.score[j], scores, last - j, draw)) return -1;
    for (int32_t i = j + 1; i <= last; i++) join(value(j), value(i), [](float v, float x) { return x + v * (1.0f / WKV_SPREAD_RANKS); });
    return j + 1;
  }

  /** The rank whose key is most like that of rank j; -1: it is alone. */
  int32_t nearest(int32_t j, float* likeness) const {
    int32_t best = -1;
    read(key(j), lists.sum.data());
    const float own = dot(lists.sum.data(), lists.sum.data());
    for (int32_t i = 0; i < r.count; i++) {
      if (i == j) continue;
      read(key(i), lists.row.data());
      const float x = wkv_cosine(dot(lists.row.data(), lists.sum.data()), dot(lists.row.data(), lists.row.data()), own);
      if (best < 0 || x > *likeness) best = i, *likeness = x;
    }
    return best;
  }

  void remove(int32_t j) const {
    const auto close = [&](std::vector<float>& list) { std::memmove(&list[j], &list[j + 1], size_t(r.count - j - 1) * 4); };
    close(lists.now), close(lists.measure);
    if (r.slot[j] >= 0) lists.freed.push_back(r.slot[j]);
    r.remove(j);
  }

  /** Copies a row of the incoming tokens, or of another slot, into a slot. */
  void fill(int32_t rank, int32_t slot) const {
    const size_t bytes = size_t(cache.row_bytes());
    std::memcpy(cache.keys_of(index) + slot * cache.row_bytes(), key(rank), bytes);
    std::memcpy(cache.values_of(index) + slot * cache.row_bytes(), value(rank), bytes);
    r.slot[rank] = slot;
  }

  /** Gives the tokens that arrived slots: freed ones in the order of leaving, then unused ones. Used slots stay the first \`count\`. */
  void place(int32_t kept, int32_t arrived) const {
    std::vector<int32_t>& holes = lists.freed;
    holes.erase(std::remove_if(holes.begin(), holes.end(), [&](int32_t slot) { return slot >= r.count; }), holes.end());
    size_t next = 0;
    int32_t unused = kept;
    for (int32_t rank = std::max(0, r.count - arrived); rank < r.count; rank++) {
      if (r.slot[rank] < 0) fill(rank, next < holes.size() ? holes[next++] : unused++);
    }
    if (next == holes.size()) return;
    // More left than arrived: tokens move down into the holes, in the order of their slots.
    std::vector<int32_t> beyond;
    for (int32_t rank = 0; rank < r.count; rank++) {
      if (r.slot[rank] >= r.count) beyond.push_back(rank);
    }
    std::sort(beyond.begin(), beyond.end(), [&](int32_t a, int32_t b) { return r.slot[a] < r.slot[b]; });
    for (const int32_t rank : beyond) fill(rank, holes[next++]);
  }
};

}  // namespace

void settle(const Loops& loops, Cache& cache, int64_t head, Ranked& r, const Incoming& incoming, int32_t forced, const float* now) {
  static thread_local Lists lists;
  Counts& counts = cache.counts[head];
  const int32_t arrived = r.count - counts.kept;
  const Head h{loops, cache, head, r, incoming, lists, counts.steps, arrived, cache.head_dim};
  lists.now.assign(now ? now : r.score, (now ? now : r.score) + r.count);
  lists.measure.assign(r.count, 0.0f);
  lists.row.resize(cache.head_dim);
  lists.sum.resize(cache.head_dim);
  lists.freed.clear();
  h.note();
  const bool gapped = wkv_uses_gap(cache.select);
  if (gapped) {
    for (int32_t rank = counts.kept - 1; rank + 1 < r.count; rank++) h.update_gap(rank);
  }
  const int32_t target = wkv_target(r.count, cache.slots, cache.interval);
  if (r.count > target) {
    if (cache.select == WKV_SELECT_NONE) fail(WKV_INVALID, "The cache is full: its policy keeps every token, and it has " + std::to_string(cache.slots) + " slots");
    if (!now && wkv_uses_now(cache.select)) fail(WKV_INVALID, "This policy chooses by the weights of one step: feed the tokens that the cache has no room for one by one");
    if (cache.select == WKV_SELECT_LITERAL_AVERAGE) {
      for (int32_t i = 0; i < r.count; i++) r.score[i] = h.average(i);
    }
    h.measure_all();
  }
  for (int32_t turn = 0; r.count > target; turn++, forced = -1) {
    const int32_t j = forced != -1 ? forced : h.pick();
    if (!wkv_evictable(j, r.count, cache.sinks, cache.recent)) fail(WKV_INVALID, "Rank " + std::to_string(j) + " may not leave a cache of " + std::to_string(r.count) + " tokens with " + std::to_string(cache.sinks) + " sinks and " + std::to_string(cache.recent) + " recent");
    counts.event[0] = static_cast<float>(r.birth[j] - 1);
    counts.event[2] = h.weight(j);
    const int32_t into = h.hand_on(j, turn);
    counts.event[1] = into >= 0 ? static_cast<float>(r.birth[into] - 1) : -1.0f;
    counts.event[3] = into >= 0 ? h.weight(into) : j + 1 < r.count ? h.weight(j + 1) : 0.0f;
    ++(into >= 0 ? counts.merged : counts.evicted);
    h.remove(j);
    if (gapped) h.update_gap(j - 1), h.update_gap(j);
  }
  h.place(counts.kept, arrived);
  counts.kept = r.count;
}

}  // namespace wkv
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
`,
  "cuda/attend.cuh": `/**
 * attend.cuh: one decode step of one layer in one launch; attend_tensor.cu and attend_plain.cu read the cache for it, each in its own way.
 *
 * A KV head of a sequence, with all its query heads, belongs to a cluster of blocks (one block where there are no clusters). Chunks of 8
 * slots go round the blocks, then round a block's warps, so K and V are read once. A warp works alone: it has its own keys and then its own
 * values brought to shared memory, some items ahead; it scores all its slots, and sums its values under its own highest score. A block's
 * warps meet when q is ready, and when their outputs are.
 *
 * What blocks tell each other they push into each other's shared memory, where a barrier counts the bytes: each warp its highest scores and
 * sums as soon as it has them, and its candidate for leaving; each block its part of the output. Then every block knows the victim: it
 * updates the state of its own slots, and the warp that owns the right neighbour merges and writes the new token's rows. The last block,
 * \`home\`, owns the new token until it has a slot.
 *
 * What needs nothing of the kernel in front is done before it has ended: the first keys are brought, at first as if the cache were full, as
 * its length comes later. Where blocks fill the device all of their stages are 5 us of reading, behind which whatever is asked for later
 * waits, q too, and a store of the kernel in front, and so its end: so two stages of keys go first, then q, then the other keys.
 *
 * The new token takes the same way through \`accumulate\` as the others, and outputs are joined behind the choice of the victim, as both
 * lie on the way of the slowest warp. Reading the cache before the kernel in front has ended takes 1.3 to 2.3 us off at batch 1 (H200).
 * Asking for keys before the length is known takes 0.9 of 45 us off at 16 sequences of 2,048 tokens, 1.0 of 18 at 512 (H200).
 *
 * Scores of a block stay in shared memory or, for long caches, in scratch: 8 slots of a chunk for each query head, in units of ln 2, then
 * 2^(score - the warp's highest); behind them the ranks, which accumulate leaves there. Where blocks fill the device, scores are added up
 * while the first values are on their way (2 us of 59 at 16 sequences of 2,048 tokens, an H100); at batch 1 that would only lie before them.
 */
#pragma once
#include <algorithm>
#include <cfloat>

#include "cache.cuh"
#include "cluster.cuh"

namespace wkv {

constexpr int kAttendWarps = 8;      // of a block
constexpr int kMostBlocks = 16;     // of a cluster; more than 8 need leave
constexpr int kChunk = 8;           // slots that a warp owns together: a sector of each array of state

/** How the work is cut: chosen on the host from the sizes. */
struct AttendPlan {
  int32_t blocks_log, slice_log;     // log2 of the blocks of a cluster; of the pairs of outputs that a block joins
  int32_t q_at, rows_at, outputs_at, weights_at;  // bytes of shared memory
  int32_t room;                      // entries that a block may own
  float share;                       // 1 / G
  float* weights;                    // scratch, [units, blocks, room, kGroup + 1]; null: in shared memory
  bool fills;                        // blocks fill the device: scores are added up before values are summed, which are on their way meanwhile
  bool early;                        // the kernel in front does not write the layer, which is read before it has ended
};

struct AttendView {
  CacheView cache;
  RowHeads row;
  AttendPlan plan;
  const float* qkv;
  float* out;
  float scale;
  float softcap;                     // in units of ln 2, as scores are; 0: none
  int32_t layer;
  const int32_t* victims;
  __device__ float capped(float s) const { return softcap > 0.0f ? softcap * tanhf(s / softcap) : s; }
};

/** A token's state. */
struct Own {
  float score;
  int32_t birth, rank;
};

/** A token that may leave; the lowest value wins, then the lowest rank. */
struct alignas(16) Candidate {
  uint32_t value;      // in an order that holds for bits
  int32_t rank, slot;  // slot >= kept: the new token
  int32_t bad;         // the lowest rank whose value is not a number
  float average;
  int32_t birth;
  float arrived;       // home's: the new token's score
  int32_t unused;
};
constexpr Candidate kNobody = {UINT_MAX, INT_MAX, 0, INT_MAX, 0.0f, 0, 0.0f, 0};

template <int kGroup, int kDots>
struct AttendArea {
  static constexpr int kWarps = kAttendWarps;
  uint64_t met, told, given;  // barriers: every warp's softmax has come; its candidate; every block's output
  alignas(16) float2 softmax[kMostBlocks][kWarps][kGroup];  // the highest score, and the sum of exponentials under it
  uint4 candidates[2][kMostBlocks][kWarps];     // the halves of each warp's
  Candidate found[kWarps];
  alignas(16) float2 part[kWarps][kGroup];
  float factor[kWarps][kGroup];  // of a warp's exponentials in all's
  Own first[kWarps * 32];        // of each thread's first entry, as it was
  float dots[kDots];      // home's: parts of the new token's scores, 32 pairs each
  float fresh[kGroup];    // home's: the new token's weights
  float arrived;          // home's: the new token's score
  int32_t newest;         // the slot of the newest cached token, if it is this block's
};

/** 2^x; what is too small for a normal float is 0. */
__device__ inline float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/** Bits in whose order floats lie as well. */
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 as 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// ---- items: each lane reads only what it asked for itself ----

/** Brings 16 bytes from global to shared memory, or zeros. */
__device__ inline void bring(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0) : "memory");
}
__device__ inline void close_item() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/** Waits until at most kCount of the newest items are on their way. */
template <int kCount>
__device__ inline void await_items() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kCount) : "memory");
}

// ---- a block's share of a step ----

/**
 * What both ways share. A Cut says how a warp reads rows:
 * - T: the cache's type; kGroup: query heads a KV head, or more (the rest are zeros); kDim: dimensions of a head, or more;
 * - kKey: neighbouring pairs that lie together in a lane's part of a key; kPass: query heads whose outputs are summed at once;
 * - kItems, kRows: items of a chunk, and keys of an item; kStages: items on their way; kWords: a lane's part of one, in 16 bytes;
 * - kQuery: bytes of shared memory for q.
 */
template <typename Cut>
struct AttendStep {
  using T = typename Cut::T;
  static constexpr int kGroup = Cut::kGroup, kDim = Cut::kDim, kHalf = kDim / 2, kPass = Cut::kPass, kWarps = kAttendWarps, kThreads = kWarps * 32;
  static constexpr int kItems = Cut::kItems, kRows = Cut::kRows, kStages = Cut::kStages, kWords = Cut::kWords;
  static constexpr int kRegion = std::max(kStages * kWords * 512, kPass * kDim * 4);  // bytes of a warp: its items, then its outputs
  using Area = AttendArea<kGroup, kGroup * kHalf / 32>;

  const AttendView& a;
  const CacheView& c;
  const Faults& faults;
  Area& area;
  const int32_t tid, warp, lane, dim, half, pairs, group, blocks, block, unit;
  const bool home;
  const int64_t head;
  const Entries e;
  T *const keys, *const values;
  // Shared memory.
  uint4* const items;                // this warp's [stages, words, lane]; at last its part of the outputs
  const float* const partial;        // [warp's region][kPass, kDim]
  T *const key, *const value, *const joined;  // rows: the new token's, as stored; the right neighbour's value
  float2* const outputs;             // [blocks, slice] pushed
  float* const scores;               // [chunks, kGroup, 8]
  int32_t* const ranks;              // [chunks, 8]
  // After use_counts.
  int32_t kept = 0, step = 0;
  int32_t local = 0, count = 0;      // entries of this block: its chunks', the last of which may not be full; with the new token
  int32_t fresh_warp = 0;            // home's that has the new token
  int32_t length = 0;                // this warp's items of keys, and of values
  bool full = false;

  __device__ AttendStep(const AttendView& a, const Faults& faults, Area& area, uint8_t* shared)
      : a(a), c(a.cache), faults(faults), area(area),
        tid(threadIdx.x), warp(threadIdx.x >> 5), lane(threadIdx.x & 31), dim(c.head_dim), half(dim / 2), pairs(c.rope.pairs), group(c.group()),
        blocks(1 << a.plan.blocks_log), block(blockIdx.x & (blocks - 1)), unit(blockIdx.x >> a.plan.blocks_log), home(block == blocks - 1),
        head(c.first + unit), e(c.entries(head)), keys(c.keys_of<T>(head)), values(c.values_of<T>(head)),
        items(reinterpret_cast<uint4*>(shared + warp * kRegion)), partial(reinterpret_cast<const float*>(shared)),
        key(reinterpret_cast<T*>(shared + a.plan.rows_at)), value(key + kDim), joined(value + kDim),
        outputs(reinterpret_cast<float2*>(shared + a.plan.outputs_at)),
        scores(a.plan.weights ? a.plan.weights + int64_t{blockIdx.x} * a.plan.room * (kGroup + 1) : reinterpret_cast<float*>(shared + a.plan.weights_at)),
        ranks(reinterpret_cast<int32_t*>(scores + a.plan.room * kGroup)) {}

  // Entry i of a block: chunk i / 8 of the block's, warp (i / 8) % kWarps.
  __device__ int32_t slot_at(int32_t i) const { return (((i / kChunk) << a.plan.blocks_log) + block) * kChunk + i % kChunk; }
  /** The first entry of this warp's item n. */
  __device__ int32_t item_at(int32_t n) const { return (n / kItems * kWarps + warp) * kChunk + n % kItems * kRows; }
  /** A thread's entries, for state: a warp takes 4 of its chunks at once. */
  __device__ int32_t entry_at(int32_t turn) const { return ((turn * 4 + lane / kChunk) * kWarps + warp) * kChunk + lane % kChunk; }
  /** Where a number of an entry lies in \`scores\`: 4 chunks that a warp reads at once lie in all banks. */
  __device__ int32_t number_at(int32_t i, int32_t number) const {
    const int32_t chunk = i / kChunk;
    return (chunk * kGroup + (number ^ chunk / kWarps % 4)) * kChunk + i % kChunk;
  }

  /** The first of the two dimensions of pair x: a rotated pair, or a pair of those that are never rotated. */
  __device__ int32_t first_of(int32_t x) const { return x < pairs ? x : 2 * pairs + (x - pairs) / Cut::kStride * 2 * Cut::kStride + (x - pairs) % Cut::kStride; }
  __device__ int32_t second_of(int32_t x) const { return first_of(x) + (x < pairs ? pairs : Cut::kStride); }

  // ---- before the scores ----

  /** What needs nothing of memory. */
  __device__ void begin() {
    if (tid == 0) {
      area.newest = -1;
      if (blocks > 1) open_barrier(&area.met), open_barrier(&area.told), open_barrier(&area.given);
    }
    __syncwarp();
    if (blocks > 1) say_begun();
  }

  /** The phase of this thread's pair. */
  __device__ uint64_t read_phase() const { return tid % kHalf < pairs ? c.rope.phases[tid % kHalf] : 0; }
  /** A lane's part of the counts. Not all lanes read the same, or the compiler would wait for it at once. */
  __device__ int32_t read_counts() const { return __ldcg(&c.counts[head].kept + lane % 2); }

  /** Chunks of a block. */
  __device__ int32_t chunks_of(int32_t b) const {
    const int32_t chunks = (kept + kChunk - 1) / kChunk;
    return chunks > b ? (chunks - b + blocks - 1) >> a.plan.blocks_log : 0;
  }
  /** This warp's items of keys where its block has so many chunks. */
  __device__ int32_t items_of(int32_t chunks) const {
    const int32_t n = chunks > warp ? (chunks - warp + kWarps - 1) / kWarps * kItems : 0;
    return (n + Cut::kAtOnce - 1) / Cut::kAtOnce * Cut::kAtOnce;
  }

  /** As if the cache were full. */
  __device__ void assume_full() { kept = c.slots, length = items_of(chunks_of(block)); }
  /** The cache's length is now known: that, and the cosine and sine of this thread's pair at the new token's place. */
  __device__ float2 use_counts(int32_t counts, uint64_t phase) {
    kept = __shfl_sync(0xffffffffu, counts, 0), step = __shfl_sync(0xffffffffu, counts, 1) + 1;
    full = kept >= c.slots;
    const int32_t mine = chunks_of(block);
    local = mine * kChunk, count = local + (home ? 1 : 0), fresh_warp = chunks_of(blocks - 1) % kWarps;
    length = items_of(mine);
    return turn_at(static_cast<uint32_t>(c.text ? step - 1 : kept), phase);
  }

  __device__ Own read_own(int32_t slot) const {
    if (slot >= c.slots) return {0.0f, 0, 0};
    return {__ldcg(e.score + slot), __ldcg(e.birth + slot), __ldcg(e.rank + slot)};
  }
  /** Reads a rank, and has the rest of the state brought nearer, which accumulate will read. */
  __device__ int32_t read_rank(int32_t i) const {
    const int32_t slot = slot_at(i);
    if (slot >= c.slots) return 0;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(e.score + slot));
    asm volatile("prefetch.global.L2 [%0];" ::"l"(e.birth + slot));
    return __ldcg(e.rank + slot);
  }

  /** Where this thread's pair of the new token's rows lies: of its first query head's, of the key and of the value. */
  struct Places {
    const float *q, *k, *v;
    int32_t apart;  // from a pair's first to its second
  };
  __device__ Places find_rows() const {
    const int32_t n = unit % c.kv_heads, b = unit / c.kv_heads, x = tid % kHalf;
    const int32_t first = c.rope.source(first_of(x)), second = c.rope.source(second_of(x));
    const float* row = a.qkv + int64_t{b} * a.row.columns(dim);
    return {row + a.row.query(n, tid / kHalf) * dim + first, row + a.row.key(n) * dim + first, row + a.row.value(n) * dim + 2 * x, second - first};
  }
  /** The new token's rows on their way: a pair of each of this thread's query heads, of the key and of the value. */
  struct Rows {
    static constexpr int kTurns = (kGroup * kHalf + kThreads - 1) / kThreads;
    float2 q[kTurns], k, v;
  };
  __device__ Rows read_rows(const Places& at) const {
    Rows rows;
    const bool there = tid % kHalf < half;
#pragma unroll
    for (int t = 0; t < Rows::kTurns; t++) {
      const float* q = at.q + t * (kThreads / kHalf) * dim;
      rows.q[t] = make_float2(0.0f, 0.0f);
      if (there && (tid + t * kThreads) / kHalf < group) rows.q[t] = make_float2(__ldcg(q), __ldcg(q + at.apart));
    }
    rows.k = rows.v = make_float2(0.0f, 0.0f);
    if (there) rows.k = make_float2(__ldcg(at.k), __ldcg(at.k + at.apart)), rows.v = make_float2(__ldcg(at.v), __ldcg(at.v + 1));
    return rows;
  }

  /** The new token: q rotated at its rank or place and scaled, for keep_q(pair, head, numbers); k and v rounded to what will be stored;
   *  home's parts of its scores. */
  template <typename Keep>
  __device__ void prepare(const Rows& rows, float2 turn, const Keep& keep_q) {
    const int32_t x = tid % kHalf;
    const float scale = a.scale * 1.4426950408889634f;  // powers of two from here on
    float2 turned = c.text ? rotated(rows.k, turn) : rows.k;
    const T first = from_float<T>(turned.x), second = from_float<T>(turned.y);
    turned = make_float2(to_float(first), to_float(second));
    if (!c.text) turned = rotated(turned, turn);
    if (tid < half) {
      key[first_of(x)] = first, key[second_of(x)] = second;
      value[2 * x] = from_float<T>(rows.v.x), value[2 * x + 1] = from_float<T>(rows.v.y);
    }
#pragma unroll
    for (int t = 0; t < Rows::kTurns; t++) {
      const int32_t i = tid + t * kThreads;
      if (i >= kGroup * kHalf) break;
      float2 out = rotated(rows.q[t], turn);
      out.x *= scale, out.y *= scale;
      keep_q(x, i / kHalf, out);
      if (home) {
        const float sum = warp_sum(fmaf(out.x, turned.x, out.y * turned.y));
        if (lane == 0) area.dots[i / 32] = sum;
      }
    }
  }

  /** The new token's score. */
  __device__ float new_score(int32_t g) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kHalf / 32; i++) sum += area.dots[g * (kHalf / 32) + i];
    return a.capped(sum);
  }

  // ---- items ----

  __device__ uint4* item(int32_t n) const { return items + n % kStages * kWords * 32 + lane; }
  // From an item's first slot or entry to the next one's.
  __device__ int32_t slot_step(int32_t n) const { return n % kItems < kItems - 1 ? kRows : ((kWarps * kChunk) << a.plan.blocks_log) - (kItems - 1) * kRows; }
  __device__ int32_t entry_step(int32_t n) const { return n % kItems < kItems - 1 ? kRows : kWarps * kChunk - (kItems - 1) * kRows; }

  // ---- softmax ----

  /** Tells every block this warp's highest scores and sums, two heads at a time; they are in area.part. Home's last warp counts the new
   *  token in. */
  __device__ void tell_softmax() {
    constexpr int kPairs = kGroup / 2;
    const int32_t g = lane % kPairs * 2;
    float4 mine = *reinterpret_cast<const float4*>(&area.part[warp][g]);
    if (home && warp == kWarps - 1) {
      const auto meet = [&](float& highest, float& sum, float fresh) {
        const float higher = fmaxf(highest, fresh);
        sum = fmaf(sum, power(highest - higher), power(fresh - higher)), highest = higher;
      };
      meet(mine.x, mine.y, new_score(g)), meet(mine.z, mine.w, new_score(g + 1));
    }
    for (int32_t to = lane / kPairs; to < blocks; to += 32 / kPairs) {
      auto* at = reinterpret_cast<float4*>(&area.softmax[block][warp][g]);
      if (blocks == 1) *at = mine;
      else push(at, mine, &area.met, to);
    }
  }

  /** A thread's view of the softmax of all warps: what its entries' exponentials count, and the new token's weight. */
  struct Shares {
    float of[kGroup], fresh;
  };

  /** Leaves what this warp's exponentials count in area.factor; home, the new token's in area.fresh. */
  __device__ Shares join_softmax() {
    if (blocks > 1) await(&area.met);
    else __syncthreads();
    constexpr int kPairs = kGroup / 2, kApart = 32 / kPairs, kMost = kMostBlocks * kWarps / kApart < 8 ? kMostBlocks * kWarps / kApart : 8;
    const int32_t g = lane % kPairs * 2, count = blocks * kWarps;
    const float2* all = &area.softmax[0][0][0];
    float2 highest = make_float2(-FLT_MAX, -FLT_MAX), sum = make_float2(0.0f, 0.0f);
    for (int32_t first = lane / kPairs; first < count; first += kApart * kMost) {
      float4 parts[kMost];
      float2 higher = highest;
#pragma unroll
      for (int k = 0; k < kMost; k++) {
        const int32_t at = first + k * kApart;
        parts[k] = at < count ? *reinterpret_cast<const float4*>(all + at * kGroup + g) : make_float4(-FLT_MAX, 0.0f, -FLT_MAX, 0.0f);
        higher.x = fmaxf(higher.x, parts[k].x), higher.y = fmaxf(higher.y, parts[k].z);
      }
      sum.x *= power(highest.x - higher.x), sum.y *= power(highest.y - higher.y);
      highest = higher;
#pragma unroll
      for (int k = 0; k < kMost; k++) {
        sum.x = fmaf(parts[k].y, power(parts[k].x - highest.x), sum.x);
        sum.y = fmaf(parts[k].w, power(parts[k].z - highest.y), sum.y);
      }
    }
    float2 most = highest;
#pragma unroll
    for (int o = kPairs; o < 32; o *= 2) {
      most.x = fmaxf(most.x, __shfl_xor_sync(0xffffffffu, most.x, o));
      most.y = fmaxf(most.y, __shfl_xor_sync(0xffffffffu, most.y, o));
    }
    sum.x *= power(highest.x - most.x), sum.y *= power(highest.y - most.y);
#pragma unroll
    for (int o = kPairs; o < 32; o *= 2) {
      sum.x += __shfl_xor_sync(0xffffffffu, sum.x, o);
      sum.y += __shfl_xor_sync(0xffffffffu, sum.y, o);
    }
    const float2 inverse = make_float2(g < group ? __fdividef(1.0f, sum.x) : 0.0f, g + 1 < group ? __fdividef(1.0f, sum.y) : 0.0f);
    if (lane < kPairs) {
      area.factor[warp][g] = power(area.part[warp][g].x - most.x) * inverse.x;
      area.factor[warp][g + 1] = power(area.part[warp][g + 1].x - most.y) * inverse.y;
      if (home && warp == 0 && ((g < group && !is_sum(sum.x)) || (g + 1 < group && !is_sum(sum.y)))) faults.report(Fault::NanAttention, a.layer);
    }
    Shares shares;
    shares.fresh = 0.0f;
    if (home) {
      const float first = power(new_score(g) - most.x) * inverse.x, second = power(new_score(g + 1) - most.y) * inverse.y;
      if (warp == 0 && lane < kPairs) area.fresh[g] = first, area.fresh[g + 1] = second;
      shares.fresh = first + second;
#pragma unroll
      for (int o = 1; o < kPairs; o *= 2) shares.fresh += __shfl_xor_sync(0xffffffffu, shares.fresh, o);
      shares.fresh *= a.plan.share;
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kGroup; k++) shares.of[k] = area.factor[warp][k] * a.plan.share;
    return shares;
  }

  // ---- output ----

  __device__ float2* out() const {
    const int32_t b = unit / c.kv_heads, n = unit % c.kv_heads;
    return reinterpret_cast<float2*>(a.out + (int64_t{b} * a.row.kv_heads * group + a.row.query(n, 0)) * dim);
  }
  /** The outputs are joined by slices of 2^slice_log pairs, one a block. */
  __device__ int32_t my_slice() const { return max(0, min(1 << a.plan.slice_log, group * half - (block << a.plan.slice_log))); }

  /** Adds up the warps' outputs of a pass, and gives each block its slice of them. */
  __device__ void tell_output(int32_t pass) {
    for (int32_t i = tid; i < kPass * kHalf; i += kThreads) {
      const int32_t g = pass * kPass + i / kHalf, x = i % kHalf;
      if (g >= group || x >= half) continue;
      float2 sum = make_float2(0.0f, 0.0f);
      if (home) sum = make_float2(area.fresh[g] * to_float(value[2 * x]), area.fresh[g] * to_float(value[2 * x + 1]));
#pragma unroll
      for (int w = 0; w < kWarps; w++) {
        const float2 y = *reinterpret_cast<const float2*>(partial + w * (kRegion / 4) + 2 * i);
        const float factor = area.factor[w][g];
        sum.x = fmaf(factor, y.x, sum.x), sum.y = fmaf(factor, y.y, sum.y);
      }
      const int32_t at = g * half + x;
      if (blocks == 1) out()[at] = sum;
      else push(outputs + (block << a.plan.slice_log) + (at & ((1 << a.plan.slice_log) - 1)), sum, &area.given, at >> a.plan.slice_log);
    }
  }

  __device__ void join_output() {
    const int32_t mine = my_slice();
    for (int32_t i = tid; i < mine; i += kThreads) {
      float2 sum = outputs[i];
#pragma unroll 4
      for (int32_t s = 1; s < blocks; s++) {
        const float2 x = outputs[(s << a.plan.slice_log) + i];
        sum.x += x.x, sum.y += x.y;
      }
      out()[(block << a.plan.slice_log) + i] = sum;
    }
  }

  // ---- accumulate, select ----

  /** The weight of a token's value in a merge, and what an average rule minimises; of a score that accumulate has left. */
  __device__ float weight(float score, int32_t birth) const { return c.select == WKV_SELECT_LITERAL_AVERAGE ? score : wkv_average(score, step - birth + 1); }
  __device__ float rule(const Own& o, float w) const {
    __builtin_assume(c.select <= WKV_SELECT_LOWEST_SUM && !wkv_uses_gap(c.select));
    return wkv_select_value(c.select, wkv_token{o.rank, o.score, w, 0.0f, 0.0f, 0.0f});
  }

  /** A thread's entries, one after another: an entry, its slot, and where its numbers lie, \`swizzle\` turned. */
  struct Mine {
    int32_t i, slot;
    float* numbers;
  };
  __device__ Mine first_entry() const {
    const int32_t i = entry_at(0);
    return {i, slot_at(i), scores + i / kChunk * kGroup * kChunk + i % kChunk};
  }
  __device__ void next_entry(Mine& at) const { at.i += kThreads, at.slot += kThreads << a.plan.blocks_log, at.numbers += kThreads * kGroup; }
  __device__ int32_t swizzle() const { return lane / kChunk * kChunk; }

  /** The state of a thread's next entries behind its first, on its way. */
  struct Ahead {
    static constexpr int kCount = 4;
    Own own[kCount];
  };
  __device__ Ahead read_ahead() const {
    Ahead ahead;
    const int32_t slot = slot_at(entry_at(0)), apart = kThreads << a.plan.blocks_log;
#pragma unroll
    for (int k = 0; k < Ahead::kCount; k++) ahead.own[k] = read_own(slot + (1 + k) * apart);
    return ahead;
  }

  /** Adds each entry's weight to its score, leaves its rank in \`ranks\`, and finds this thread's candidate. */
  __device__ Candidate accumulate(const Shares& shares, Ahead ahead, bool selects, int32_t forced) {
    const bool by_gap = c.gapped() && forced == -1, literal = full && c.select == WKV_SELECT_LITERAL_AVERAGE;
    const int32_t turned = swizzle(), apart = kThreads << a.plan.blocks_log;
    Candidate best = kNobody;
    Mine at = first_entry();
    Own own = area.first[tid];
#pragma unroll 1
    for (; at.i < count; next_entry(at)) {
      // The new token goes the same way as the others: a way of its own would double the time of its warp.
      const bool fresh = at.i >= local;
      Own o = fresh ? Own{0.0f, step, kept} : own;
      own = ahead.own[0];
#pragma unroll
      for (int k = 1; k < Ahead::kCount; k++) ahead.own[k - 1] = ahead.own[k];
      ahead.own[Ahead::kCount - 1] = read_own(at.slot + (1 + Ahead::kCount) * apart);
      if (!fresh && at.slot >= kept) continue;
      float now = 0.0f;
#pragma unroll
      for (int g = 0; g < kGroup; g++) now = fmaf(at.numbers[g * kChunk ^ turned], shares.of[g], now);
      if (fresh) now = shares.fresh;
      if (c.later) {
        c.weights[int64_t{unit} * (c.slots + 1) + o.rank] = now;
        continue;
      }
      o.score += now;
      float w = 0.0f;
      if (selects || c.gapped()) w = wkv_average(o.score, step - o.birth + 1);
      if (literal) o.score = w;
      if (fresh) area.arrived = o.score;
      else e.score[at.slot] = o.score;
      ranks[at.i] = o.rank;
      const int32_t slot = fresh ? kept : at.slot;
      if (c.gapped()) {
        __stcg(e.by_rank + o.rank, w);
        __stcg(c.places_of(head) + o.rank, slot);
        if (o.rank == kept - 1) area.newest = slot;
      }
      if (selects && !by_gap) consider(best, forced == -1 ? rule(o, w) : 0.0f, o, slot, w, forced);
    }
    if (!c.gapped()) return best;
    // Rules that ask for gaps: the newest cached token now has a right neighbour; then everyone's average is needed.
    __syncthreads();
    if (warp == 0 && area.newest >= 0) {
      const float gap = warp_gap(values + int64_t{area.newest} * dim, value, dim);
      if (lane == 0) e.gap[area.newest] = gap;
    }
    __syncwarp();
    cluster_sync(blocks);
    if (!selects || !by_gap) return best;
    for (at = first_entry(); at.i < count; next_entry(at)) {
      const bool fresh = at.i >= local;
      if (!fresh && at.slot >= kept) continue;
      const Own o = fresh ? Own{area.arrived, step, kept} : Own{__ldcg(e.score + at.slot), __ldcg(e.birth + at.slot), ranks[at.i]};
      const float w = weight(o.score, o.birth);
      // The newest has no right neighbour to be merged with: it leaves only when nobody else may.
      const float value = fresh ? INFINITY : wkv_select_value(c.select, {o.rank, o.score, w, __ldcg(e.by_rank + o.rank + 1), 0.0f, e.gap[at.slot]});
      consider(best, value, o, fresh ? kept : at.slot, w, forced);
    }
    return best;
  }

  __device__ void consider(Candidate& best, float value, const Own& o, int32_t slot, float w, int32_t forced) const {
    if (forced == -1 ? !wkv_evictable(o.rank, kept + 1, c.sinks, c.recent) : o.rank != forced) return;
    if (isnan(value)) best.bad = min(best.bad, o.rank);
    const uint32_t bits = isnan(value) ? UINT_MAX : ordered(value);
    if (bits < best.value || (bits == best.value && o.rank < best.rank)) best.value = bits, best.rank = o.rank, best.slot = slot, best.average = w, best.birth = o.birth;
  }

  /** The lane that holds the best candidate of a warp; \`bad\` becomes the lowest. */
  __device__ int32_t best_lane(uint32_t mine, int32_t rank, int32_t& bad) const {
    const uint32_t value = __reduce_min_sync(0xffffffffu, mine);
    if (__any_sync(0xffffffffu, bad != INT_MAX)) bad = __reduce_min_sync(0xffffffffu, bad);
    const int32_t lowest = __reduce_min_sync(0xffffffffu, mine == value ? rank : INT_MAX);
    return __ffs(__ballot_sync(0xffffffffu, mine == value && rank == lowest)) - 1;
  }

  /** Tells every block this warp's candidate, each lane a half of it to one block. */
  __device__ void tell_candidate(Candidate mine) {
    __syncwarp();
    int32_t bad = mine.bad;
    if (lane == best_lane(mine.value, mine.rank, bad)) {
      mine.bad = bad;
      mine.arrived = home && warp == fresh_warp ? area.arrived : 0.0f;
      area.found[warp] = mine;
    }
    __syncwarp();
    const uint4 part = reinterpret_cast<const uint4*>(&area.found[warp])[lane % 2];
    uint4* at = &area.candidates[lane % 2][block][warp];
    if (blocks == 1 && lane < 2) *at = part;
    else if (blocks > 1 && lane / 2 < blocks) push(at, part, &area.told, lane / 2);
  }

  /** The best of all warps' candidates, alike in every thread. */
  __device__ Candidate choose() const {
    const uint4* all = &area.candidates[0][0][0];
    const auto rank_of = [](const uint4& half) { return static_cast<int32_t>(half.y); };
    uint4 mine = make_uint4(kNobody.value, kNobody.rank, 0, kNobody.bad);
    int32_t bad = kNobody.bad, at = 0;
    for (int32_t i = lane; i < blocks * kWarps; i += 32) {
      const uint4 its = all[i];
      bad = min(bad, static_cast<int32_t>(its.w));
      if (its.x < mine.x || (its.x == mine.x && rank_of(its) < rank_of(mine))) mine = its, at = i;
    }
    at = __shfl_sync(0xffffffffu, at, best_lane(mine.x, rank_of(mine), bad));
    const uint4 first = all[at], second = (&area.candidates[1][0][0])[at];
    const float arrived = __uint_as_float(area.candidates[1][blocks - 1][fresh_warp].z);
    return {first.x, rank_of(first), static_cast<int32_t>(first.z), bad, __uint_as_float(second.x), static_cast<int32_t>(second.y), arrived, 0};
  }

  // ---- merge, insert ----

  /** Writes what the victim's leaving changes in the state of this block's slots. The warp of its right neighbour puts the new token in. */
  __device__ void update(const Candidate& victim) {
    int32_t right = -1;
    T left[kDim / 32];  // the victim's value, on its way to whoever merges it
#pragma unroll
    for (int i = 0; i < kDim / 32; i++) {
      const int32_t d = lane + i * 32;
      left[i] = d < dim && victim.slot < kept ? __ldcg(values + int64_t{victim.slot} * dim + d) : from_float<T>(0.0f);
    }
    Mine at = first_entry();
    int32_t next_rank = at.i < count ? ranks[at.i] : 0;
#pragma unroll 1
    for (; at.i < count; next_entry(at)) {
      const bool fresh = at.i >= local;
      const int32_t rank = next_rank;
      if (at.i + kThreads < count) next_rank = ranks[at.i + kThreads];
      if (!fresh && at.slot >= kept) continue;
      if (rank == victim.rank + 1) right = fresh ? kept : at.slot;
      if (fresh) continue;
      if (at.slot == victim.slot) e.score[at.slot] = victim.arrived, e.birth[at.slot] = step, e.rank[at.slot] = kept - 1;
      else if (rank > victim.rank) e.rank[at.slot] = rank - 1;
    }
    const uint32_t found = __ballot_sync(0xffffffffu, right >= 0);
    if (!found) return;
    right = __shfl_sync(0xffffffffu, right, __ffs(found) - 1);
    replace(victim, left, right, right == kept ? Own{victim.arrived, step, kept} : Own{__ldcg(e.score + right), __ldcg(e.birth + right), victim.rank + 1});
  }

  /** Puts the new token behind the last one. */
  __device__ void append() {
    if (tid == 0) e.score[kept] = area.arrived, e.birth[kept] = step, e.rank[kept] = kept;
#pragma unroll 1
    for (int32_t d = tid; d < dim; d += kThreads) keys[int64_t{kept} * dim + d] = key[d], values[int64_t{kept} * dim + d] = value[d];
  }

  __device__ void note(const Candidate& victim, bool merges, float right_birth, float right_average) const {
    Counts& counts = c.counts[head];
    counts.event[0] = static_cast<float>(victim.birth - 1);
    counts.event[1] = merges ? right_birth : -1.0f;
    counts.event[2] = victim.average;
    counts.event[3] = right_average;
    atomicAdd(merges ? &counts.merged : &counts.evicted, 1);  // nothing waits for it
  }

  /** A warp merges the victim's value into its right neighbour's, which it owns, and gives the victim's rows to the new token. */
  __device__ void replace(const Candidate& victim, const T (&left)[kDim / 32], int32_t right, const Own& neighbour) {
    const float w_v = wkv_given(c.merge, victim.average), w_r = weight(neighbour.score, neighbour.birth);
    const bool merges = wkv_merges_right(c.merge);
    T *to_key = keys + int64_t{victim.slot} * dim, *to_value = values + int64_t{victim.slot} * dim, *to_right = values + int64_t{right} * dim;
    T mid[kDim / 32];
#pragma unroll
    for (int i = 0; i < kDim / 32; i++) {
      const int32_t d = lane + i * 32;
      if (d >= dim) break;
      mid[i] = right == kept ? value[d] : __ldcg(to_right + d);
    }
#pragma unroll
    for (int i = 0; i < kDim / 32; i++) {
      const int32_t d = lane + i * 32;
      if (d >= dim) break;
      if (merges && w_v + w_r > 0.0f) mid[i] = from_float<T>(wkv_merged(w_v, to_float(left[i]), w_r, to_float(mid[i])));
      joined[d] = mid[i];
      if (right != kept && merges) to_right[d] = mid[i];
      to_value[d] = right == kept ? mid[i] : value[d];
      to_key[d] = key[d];
    }
    if (lane == 0) note(victim, merges, static_cast<float>(neighbour.birth - 1), w_r);
    if (!c.gapped()) return;
    __syncwarp();
    const int32_t* places = c.places_of(head);
    if (victim.rank > 0) {
      const int32_t before = __ldcg(places + victim.rank - 1);
      const float gap = warp_gap(values + int64_t{before} * dim, joined, dim);
      if (lane == 0) e.gap[before] = gap;
    }
    if (right != kept) {
      const T* far = victim.rank + 2 == kept ? value : values + int64_t{__ldcg(places + victim.rank + 2)} * dim;
      const float gap = warp_gap(joined, far, dim);
      if (lane == 0) e.gap[right] = gap;
    }
  }
};


/** One block's part of a step, for a way to read the cache. */
template <typename Way>
__global__ void __launch_bounds__(Way::kThreads, Way::kResident) attend_kernel(const __grid_constant__ AttendView a, const Faults faults) {
  extern __shared__ uint4 shared16[];
  __shared__ typename Way::Area area;
  Way my(a, faults, area, reinterpret_cast<uint8_t*>(shared16));
  const CacheView& c = a.cache;
  const auto begin_step = [&] {
    wait_for_previous();
    let_next_start();
  };
  my.begin();
  if (!a.plan.early) begin_step();
  // What is asked for first comes before the keys do.
  const int32_t counts = my.read_counts();
  const Own own = my.read_own(my.slot_at(my.entry_at(0)));
  const uint64_t phase = my.read_phase();
  my.read_turns();
  my.assume_full();
  my.begin_keys();
  const int32_t before_q = a.plan.fills ? Way::kStages / 2 : Way::kStages;
#pragma unroll 1
  for (int32_t n = 0; n < before_q; n++) my.bring_item();
  const auto places = my.find_rows();
  typename Way::Rows rows;
  if (a.plan.fills) {
    if (a.plan.early) begin_step();
    rows = my.read_rows(places);
#pragma unroll 1
    for (int32_t n = before_q; n < Way::kStages; n++) my.bring_item();
  }
  const int32_t assumed = my.length;
  const float2 turn = my.use_counts(counts, phase);
  if (my.length < assumed && my.length < Way::kStages) {  // values come sooner than a full cache's
    await_items<0>();
    my.end_keys();
#pragma unroll 1
    for (int32_t n = my.length; n < Way::kStages; n++) my.bring_item();
  }
  my.begin_scores(own.rank);
  if (!a.plan.fills) {
    if (a.plan.early) begin_step();
    rows = my.read_rows(places);
  }
  const int32_t forced = a.victims ? a.victims[my.unit] : -1;
  my.prepare(rows, turn, [&](int32_t x, int32_t g, float2 numbers) { my.keep_q(x, g, numbers); });
  area.first[my.tid] = own;
  __syncthreads();

  const bool selects = my.full && c.select != WKV_SELECT_NONE && !c.later;
  if (my.blocks > 1 && my.tid == 0) {
    expect(&area.met, my.blocks * Way::kWarps * Way::kGroup * sizeof(float2));
    if (selects) expect(&area.told, my.blocks * Way::kWarps * sizeof(Candidate));
    expect(&area.given, my.blocks * my.my_slice() * sizeof(float2));
  }

  my.score(own.rank);
  __syncwarp();
  if (my.blocks > 1) await_begun();
  my.tell_softmax();
  Candidate mine;
#pragma unroll 1
  for (int part = 0; part < 2; part++) {
    if ((part == 0) == a.plan.fills) {
      const auto ahead = my.read_ahead();
      const auto shares = my.join_softmax();
      mine = my.accumulate(shares, ahead, selects, forced);
    } else {
      my.sum_values(0);
      my.keep_sums(0);
    }
  }
  for (int32_t pass = 0;; pass++) {
    // A candidate also says that its warp has read its values for the last time: the victim's may then be written over.
    const bool ends = Way::kPass == Way::kGroup || (pass + 1) * Way::kPass >= my.group;
    if (ends && selects) my.tell_candidate(mine);
    __syncthreads();
    my.tell_output(pass);
    if (ends) break;
    __syncthreads();
    my.sum_values(pass + 1);
    my.keep_sums(pass + 1);
  }

  const bool last = my.home && my.tid == 0;
  if (!c.later) {
    if (last) c.counts[my.head].steps = my.step;
    if (selects) {
      if (my.blocks > 1) await(&area.told);
      const Candidate victim = my.choose();
      const int32_t leaves = forced != -1 ? forced : victim.rank == INT_MAX ? -1 : victim.rank;
      if (victim.bad != INT_MAX) {
        if (last) faults.report(Fault::NanScore, victim.bad);
      } else if (!wkv_evictable(leaves, my.kept + 1, c.sinks, c.recent)) {
        if (last) faults.report(Fault::Rank, leaves, my.kept + 1, c.sinks, c.recent);
      } else {
        my.update(victim);
        // The newest leaves alone, and nothing is written.
        if (last && victim.rank == my.kept) my.note(victim, false, -1.0f, 0.0f);
      }
    } else if (my.full) {
      if (last) faults.report(Fault::Full, c.slots);
    } else {
      if (my.home) my.append();
      if (last) c.counts[my.head].kept = my.kept + 1;
    }
  }
  // Before a block ends, all that others push into its memory must have come.
  if (my.blocks > 1) {
    await(&area.given);
    my.join_output();
  }
}

// ---- host ----

inline int32_t log2_up(int32_t x) {
  int32_t log = 0;
  while (1 << log < x) log++;
  return log;
}

/** Cuts the work and launches it. */
template <typename Way>
void start_attend(Context& ctx, const Cache& cache, AttendView a) {
  const auto kernel = attend_kernel<Way>;
  const int32_t dim = cache.head_dim, units = cache.sequences * cache.kv_heads, outputs = cache.group() * dim / 2;
  AttendPlan& plan = a.plan;
  plan.share = 1.0f / static_cast<float>(cache.group());
  plan.q_at = Way::kWarps * Way::kRegion;
  plan.rows_at = plan.q_at + Way::kQuery;
  plan.outputs_at = plan.rows_at + 3 * Way::kDim * static_cast<int32_t>(sizeof(typename Way::T));
  // Blocks enough to fill the processors twice, each warp with a chunk or more, or two where clusters are larger than any GPU need have;
  // clusters that all find room at once.
  const int32_t most = ctx.capability < 90 ? 1 : kMostBlocks;
  int32_t blocks = 1;
  while (blocks < most && int64_t{units} * blocks * 2 <= 2 * ctx.processors && cache.slots >= blocks * 2 * Way::kWarps * kChunk * (blocks < 8 ? 1 : 2)) blocks *= 2;
  // Two blocks share a multiprocessor: scores and ranks that leave no room for that lie in scratch, which costs less than half of the warps.
  const size_t limit = std::min<size_t>(ctx.shared_limit, 112 * 1024) - sizeof(typename Way::Area);
  size_t weights;
  const auto cut_for = [&](int32_t n) {
    plan.blocks_log = log2_up(n), plan.slice_log = log2_up(divide_up(outputs, n));
    plan.room = (divide_up(divide_up(cache.slots, kChunk), n) + 1) * kChunk;
    plan.weights_at = plan.outputs_at + (n == 1 ? 0 : static_cast<int32_t>(round_up(size_t(n) << plan.slice_log << 3, 16)));
    weights = size_t(plan.room) * (Way::kGroup + 1) * 4;
    return plan.weights_at + weights <= limit;
  };
  plan.fills = units * blocks > ctx.processors;
  if (plan.fills) {  // they fill the device: then rather more of them, some waiting for others, than scores in scratch
    for (int32_t more = blocks; more <= std::min(most, 8); more *= 2) {
      if (!cut_for(more)) continue;
      blocks = more;
      break;
    }
  }
  for (;; blocks = std::max(1, blocks / 2)) {
    const bool fits = cut_for(blocks);
    const size_t shared = plan.weights_at + (fits ? weights : 0);
    if (blocks > 1 && shared > limit) continue;
    const Shape shape{units * blocks, Way::kThreads, shared, static_cast<uint32_t>(blocks)};
    allow_shared(kernel, shared);
    if (blocks > 8 && clusters_at_once(kernel, shape) < units) continue;
    plan.weights = fits ? nullptr : reinterpret_cast<float*>(ctx.reserve(weights * units * blocks));
    plan.early = cache.untouched(ctx, a.layer);
    launch(ctx, kernel, shape, a, ctx.faults());
    return;
  }
}

/** The ways: false, and nothing launched, where the sizes do not suit the tensor cores. */
bool attend_tensor(Context& ctx, const Cache& cache, const AttendView& a);
void attend_plain(Context& ctx, const Cache& cache, const AttendView& a);

}  // namespace wkv
`,
  "cuda/attend_plain.cu": `/**
 * attend_plain.cu: wkv_attend's cache read with ordinary f32 products: f32 caches, and any head dimension; the step around it is attend.cuh.
 *
 * Neighbouring lanes share a key, each with parts of both its halves, which they turn by its rank: rank * (angle a position, in turns of
 * 2^64) wraps as turns do, so the angle is exact to 2^-32 turns at any rank, without a table. Then all lanes share a value. Heads wider
 * than 128, or whose rows are no whole words of 16 bytes, are read number by number.
 */
#include "attend.cuh"

namespace wkv {
namespace {

/** How a warp reads rows. */
template <typename T_, int kGroup_, int kDim_>
struct PlainCut {
  using T = T_;
  static constexpr int kGroup = kGroup_, kDim = kDim_, kHalf = kDim / 2;
  static constexpr bool kLoose = kDim > 128;                      // any size, slowly
  static constexpr int kKey = kLoose ? 8 : 16 / sizeof(T);        // a lane's part of either half of a key
  static constexpr int kStride = kLoose ? 1 : kKey;
  static constexpr int kLanes = kHalf / kKey;                     // that share a key
  static constexpr int kValue = kDim / 32;                        // a lane's part of a value
  static constexpr int kRows = 32 / kLanes;                       // keys of an item
  static constexpr int kItems = kChunk / kRows;                   // of a chunk
  static constexpr int kWords = 2 * kKey * int(sizeof(T)) / 16;   // a lane's part of an item, keys or values, in 16 bytes
  static constexpr int kStages = kLoose ? 1 : 4;                  // items on their way
  static constexpr int kAtOnce = kLoose ? 1 : 2;                  // items of keys that share what is read of q
  static constexpr int kPass = kLoose ? 2 : kGroup < 8 ? kGroup : 8;  // query heads whose outputs are summed at once
  static constexpr int kMine = kGroup > kLanes ? kGroup / kLanes : 1; // scores of a row that a lane has at last
  static constexpr int kQuery = (kGroup + 1) * kHalf * 8;         // q, and the phases
};

template <typename Cut>
struct PlainWay : AttendStep<Cut> {
  using Step = AttendStep<Cut>;
  using T = typename Cut::T;
  using Step::a, Step::c, Step::area, Step::tid, Step::warp, Step::lane, Step::dim, Step::half, Step::pairs, Step::keys, Step::values, Step::items, Step::scores, Step::kept, Step::length, Step::local;
  using Step::kGroup, Step::kDim, Step::kHalf, Step::kItems, Step::kRows, Step::kWords, Step::kStages, Step::kPass;
  using Step::slot_at, Step::entry_at, Step::item_at, Step::first_of, Step::second_of, Step::item, Step::slot_step, Step::entry_step, Step::read_rank, Step::number_at;
  static constexpr int kKey = Cut::kKey, kLanes = Cut::kLanes, kValue = Cut::kValue, kAtOnce = Cut::kAtOnce, kMine = Cut::kMine, kQuery = Cut::kQuery;
  static constexpr int kResident = 1;

  /** A lane's part of an item. */
  struct Part {
    uint4 words[kWords];
    __device__ float operator[](int i) const { return to_float(reinterpret_cast<const T*>(words)[i]); }
  };
  /** A lane's sums of values. */
  float sums[kPass][kValue];

  float2* const q;                   // in the order of q_at, rotated and scaled
  uint32_t *const high, *const low;  // the phases of the pairs a key is turned by, in the order of phase_at
  // The next item to bring: its first slot, and what this lane takes of it: words at \`from\` + slot * dim and \`apart\` further on, where
  // the slot is below the limits.
  int32_t next = 0, next_slot = 0, apart = 0, first_limit = 0, second_limit = 0;
  const T* from = nullptr;

  __device__ PlainWay(const AttendView& a, const Faults& faults, typename Step::Area& area, uint8_t* shared)
      : Step(a, faults, area, shared), q(reinterpret_cast<float2*>(shared + a.plan.q_at)), high(reinterpret_cast<uint32_t*>(q + kGroup * kHalf)), low(high + kHalf) {
    if (tid >= kHalf) return;
    const uint64_t phase = tid < pairs ? c.rope.phases[tid] : 0;
    high[phase_of(tid)] = static_cast<uint32_t>(phase >> 32), low[phase_of(tid)] = static_cast<uint32_t>(phase);
  }

  /** Where a pair of query head g lies: the lanes' next to each other, two pairs at a time. */
  __device__ int32_t q_at(int32_t x, int32_t g) const { return ((x % kKey / 2 * kGroup + g) * kLanes + x / kKey) * 2 + x % 2; }
  __device__ int32_t phase_of(int32_t x) const { return (x % kKey / 4 * kLanes + x / kKey) * 4 + x % 4; }
  __device__ void keep_q(int32_t x, int32_t g, float2 numbers) { q[q_at(x, g)] = numbers; }

  // ---- items ----

  __device__ Part read_item(int32_t n) const {
    Part part;
#pragma unroll
    for (int w = 0; w < kWords; w++) part.words[w] = item(n)[w * 32];
    return part;
  }

  __device__ void begin_keys() {
    const int32_t x = lane % kLanes * kKey, row = lane / kLanes, limit = x < half ? c.slots - row : 0;
    next = 0, next_slot = slot_at(item_at(0));
    from = keys + row * dim + first_of(x), apart = second_of(x) - first_of(x);
    first_limit = second_limit = limit;
  }
  /** There are but \`length\` items of keys: values take the places behind them. */
  __device__ void end_keys() { next = length; }
  __device__ void begin_values() {
    const int32_t at = lane * kValue, limit = at < dim ? c.slots : 0;
    next = length, next_slot = slot_at(item_at(0));
    from = values + at, apart = dim;
    first_limit = limit, second_limit = limit - 1;
  }

  /** A lane's part of a row, number by number. */
  __device__ void bring_slowly() {
    const int32_t u = lane % kLanes, at = lane * kValue;
    const T *key_row = keys + int64_t{next_slot} * dim, *value_row = values + int64_t{next_slot} * dim;
    const bool there = next_slot < c.slots;
    Part part;
    T* to = reinterpret_cast<T*>(part.words);
#pragma unroll
    for (int i = 0; i < 2 * kKey; i++) {
      const int32_t x = u * kKey + i % kKey;
      if (next < length) to[i] = there && x < half ? key_row[i < kKey ? first_of(x) : second_of(x)] : from_float<T>(0.0f);
      else to[i] = there && at + i < dim ? value_row[at + i] : from_float<T>(0.0f);
    }
#pragma unroll
    for (int w = 0; w < kWords; w++) item(next)[w * 32] = part.words[w];
  }

  /** The next item is now on its way: \`length\` items of keys, then as many of values. */
  __device__ void bring_item() {
    if (next == length) begin_values();
    if (next < 2 * length) {
      if constexpr (Cut::kLoose) {
        bring_slowly();
      } else {
        const T* at = from + int64_t{next_slot} * dim;
        bring(shared_address(item(next)), at, next_slot < first_limit);
        bring(shared_address(item(next) + 32), at + apart, next_slot < second_limit);
      }
    }
    close_item();
    next_slot += slot_step(next - (next < length ? 0 : length));
    next++;
  }

  // ---- scores ----

  __device__ void read_turns() {}
  __device__ void begin_scores(int32_t) {}

  /** Adds a lane's part of some keys times all queries to \`sums\`. */
  template <typename Query>
  __device__ void multiply(const Part (&from)[kAtOnce], const int32_t (&ranks)[kAtOnce], const Query& query, float (&sums)[kAtOnce][kGroup]) const {
    const int32_t u = lane % kLanes;
    const bool turns = !c.text && u * kKey < pairs;
#pragma unroll
    for (int j = 0; j < kKey; j += 4) {
      float x[kAtOnce][4], y[kAtOnce][4];
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) {
#pragma unroll
        for (int i = 0; i < 4; i++) x[r][i] = from[r][j + i], y[r][i] = from[r][kKey + j + i];
      }
      if (turns) {
        const uint4 h = *reinterpret_cast<const uint4*>(high + phase_of(u * kKey + j)), l = *reinterpret_cast<const uint4*>(low + phase_of(u * kKey + j));
        const uint32_t highs[4] = {h.x, h.y, h.z, h.w}, lows[4] = {l.x, l.y, l.z, l.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
          for (int r = 0; r < kAtOnce; r++) {
            const float angle = phase_at(ranks[r], highs[i], lows[i]) * (3.14159265358979f * 0x1p-31f);
            const float cosine = __cosf(angle), sine = __sinf(angle), was = x[r][i];
            x[r][i] = was * cosine - y[r][i] * sine;
            y[r][i] = was * sine + y[r][i] * cosine;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
#pragma unroll
        for (int g = 0; g < kGroup; g++) {
          const float4 p = query((j + i) / 2, g);
#pragma unroll
          for (int r = 0; r < kAtOnce; r++) sums[r][g] = fmaf(x[r][i], p.x, fmaf(y[r][i], p.y, fmaf(x[r][i + 1], p.z, fmaf(y[r][i + 1], p.w, sums[r][g]))));
        }
      }
    }
  }

  // The lanes of a key share its sums: each has at last those of kMine query heads from my_head() on; kSame neighbours have the same.
  static constexpr int kSame = kLanes > kGroup ? kLanes / kGroup : 1;
  __device__ int32_t my_head() const {
    int32_t g = 0, n = kGroup;
#pragma unroll
    for (int o = kLanes / 2; o > 0; o /= 2) {
      if (n > 1) n /= 2, g += lane & o ? n : 0;
    }
    return g;
  }
  __device__ void share(float (&sums)[kGroup]) const {
    int n = kGroup;
#pragma unroll
    for (int o = kLanes / 2; o > 0; o /= 2) {
      if (n == 1) {
        sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], o);
        continue;
      }
      n /= 2;
#pragma unroll
      for (int i = 0; i < kGroup / 2; i++) {
        if (i >= n) break;
        const float give = lane & o ? sums[i] : sums[i + n], keep = lane & o ? sums[i + n] : sums[i];
        sums[i] = keep + __shfl_xor_sync(0xffffffffu, give, o);
      }
    }
  }

  /** Leaves the exponentials of this warp's scores, under its own highest, in \`scores\`, its softmax in area.part; \`ranks\` are those of
   *  the thread's own entries. */
  __device__ void score(int32_t ranks) {
    const int32_t u = lane % kLanes, mine = my_head();
    const auto query = [&](int j, int g) { return reinterpret_cast<const float4*>(q)[(j * kGroup + g) * kLanes + u]; };
    float most[kMine], total[kMine];
#pragma unroll
    for (int k = 0; k < kMine; k++) most[k] = -FLT_MAX, total[k] = 0.0f;
    int32_t next_ranks = read_rank(entry_at(1)), entry = item_at(0) + lane / kLanes, slot = slot_at(entry);
    for (int32_t n = 0; n < length; n += kAtOnce) {
      if (n > 0 && n % (4 * kItems) == 0) ranks = next_ranks, next_ranks = read_rank(entry_at(n / (4 * kItems) + 1));
      await_items<kStages - kAtOnce>();
      Part parts[kAtOnce];
      int32_t rank[kAtOnce];
      float products[kAtOnce][kGroup] = {};
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) {
        parts[r] = read_item(n + r);
        rank[r] = __shfl_sync(0xffffffffu, ranks, (n + r) / kItems % 4 * kChunk + (n + r) % kItems * kRows + lane / kLanes);
      }
      multiply(parts, rank, query, products);
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) {
        bring_item();
        share(products[r]);
        if (slot < kept) {
#pragma unroll
          for (int k = 0; k < kMine; k++) {
            const float s = a.capped(products[r][k]), higher = fmaxf(most[k], s);
            total[k] = fmaf(total[k], power(most[k] - higher), power(s - higher));
            most[k] = higher;
            if (lane % kSame == 0) scores[number_at(entry, mine + k)] = s;
          }
        }
        slot += slot_step(n + r), entry += entry_step(n + r);
      }
    }
#pragma unroll
    for (int k = 0; k < kMine; k++) {
#pragma unroll
      for (int o = kLanes; o < 32; o *= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, most[k], o), sum = __shfl_xor_sync(0xffffffffu, total[k], o), higher = fmaxf(most[k], other);
        total[k] = fmaf(total[k], power(most[k] - higher), sum * power(other - higher));
        most[k] = higher;
      }
      if (lane < kLanes && lane % kSame == 0) area.part[warp][mine + k] = make_float2(most[k], total[k]);
    }
    __syncwarp();
    for (auto at = this->first_entry(); at.i < local; this->next_entry(at)) {
      if (at.slot >= kept) continue;
#pragma unroll
      for (int g = 0; g < kGroup; g++) {
        float& s = at.numbers[g * kChunk ^ this->swizzle()];
        s = power(s - area.part[warp][g].x);
      }
    }
    __syncwarp();
  }

  // ---- output ----

  /** Sums of exponentials times values: query heads of a pass. */
  __device__ void sum_values(int32_t pass) {
    if (pass > 0) {
      next = length;
      for (int n = 0; n < kStages; n++) bring_item();
    }
#pragma unroll
    for (int g = 0; g < kPass; g++) {
#pragma unroll
      for (int i = 0; i < kValue; i++) sums[g][i] = 0.0f;
    }
    int32_t entry = item_at(0), slot = slot_at(entry);
    for (int32_t n = 0; n < length; n++) {
      await_items<kStages - 1>();
      const Part part = read_item(length + n);
      bring_item();
#pragma unroll
      for (int p = 0; p < kRows; p++) {
        if (slot + p >= kept) continue;
#pragma unroll
        for (int g = 0; g < kPass; g++) {
          const float weight = scores[number_at(entry + p, pass * kPass + g)];
#pragma unroll
          for (int k = 0; k < kValue; k++) sums[g][k] = fmaf(weight, part[p * kValue + k], sums[g][k]);
        }
      }
      slot += slot_step(n), entry += entry_step(n);
    }
    await_items<0>();
  }

  /** Leaves them in this warp's region. */
  __device__ void keep_sums(int32_t) {
    __syncwarp();
    float* to = reinterpret_cast<float*>(items) + lane * kValue;
#pragma unroll
    for (int g = 0; g < kPass; g++) {
#pragma unroll
      for (int i = 0; i < kValue; i += 4) *reinterpret_cast<float4*>(to + g * kDim + i) = make_float4(sums[g][i], sums[g][i + 1], sums[g][i + 2], sums[g][i + 3]);
    }
  }
};

template <typename T, int kDim>
void by_heads(Context& ctx, const Cache& cache, const AttendView& a) {
  if (cache.group() <= 4) return start_attend<PlainWay<PlainCut<T, 4, kDim>>>(ctx, cache, a);
  start_attend<PlainWay<PlainCut<T, 16, kDim>>>(ctx, cache, a);
}

}  // namespace

void attend_plain(Context& ctx, const Cache& cache, const AttendView& a) {
  if (cache.dtype == WKV_F32 && cache.head_dim <= 128 && cache.head_dim % 8 == 0 && cache.rope->count % 4 == 0) return by_heads<float, 128>(ctx, cache, a);
  by_cache_type(cache.dtype, [&](auto type) { by_heads<decltype(type), 512>(ctx, cache, a); });
}

}  // namespace wkv
`,
  "cuda/attend_tensor.cu": `/**
 * attend_tensor.cu: wkv_attend's cache of f16 or bf16 read on the tensor cores; the step around it is attend.cuh.
 *
 *   s[g, i] = q[g] . rotate(k[i], rank i), products of 16 rows (8 query heads, each high and low part) by 8 slots
 *   o[d, g] += v[i, d] 2^(s[g, i] - highest), products of 16 dimensions by 8 query heads over 8 slots
 *
 * Accuracy: q and the exponentials are sums of two 16-bit numbers; keys that are turned by their rank are turned in f32 and rounded to
 * f16, others and values are taken as they are stored; all sums are f32.
 *
 * Lane 4 g + i takes 16-byte parts of rows as they lie, since neither sum minds its order: of keys, parts i, i + 4, .. of slot g and what
 * they are turned with; of values, parts g, g + 8, .. of slots 2 i and 2 i + 1. The products give it the scores of query head g for slots
 * 2 i and 2 i + 1, which is just what it has to bring to the second product. A chunk's keys are turned while the products of the chunk
 * before are made, the first one's before q is there. Keys are turned by rank * (angle a position, in turns of 2^32): it wraps as turns do.
 * Instructions of a warp, 128 dimensions: some 57 a slot, of them 27 to turn its key. Bytes moved: 4 D a slot, and its state.
 *
 * Tried, and not kept (16 sequences of 2,048 tokens on an H100): lanes that bring just what they read, without whole lines, 78 us
 * instead of 61; scores that leave a multiprocessor to one block rather than go to scratch, 11% longer at 8,192 tokens (H200); blocks of
 * 16 warps, no gain at any size; one block of a sequence and head instead of two, 16 to 33% longer; four where two have room,
 * 28 to 44% longer, eight, 40 to 106%; exponentials of two items at once instead of eight, 272 us instead of 226 at 8,192 tokens; blocks of
 * 16 warps that have a sequence and head alone, 58 us instead of 54; scores added up by some warps sooner than by others, 58 instead of 56;
 * values summed four items behind the keys, under a highest score that rises, so that one's instructions hide the other's bytes, 62.
 */
#include "attend.cuh"
#include "mma.cuh"

namespace wkv {
namespace {

template <typename T_, int kGroup_, int kDim_>
struct TensorCut {
  using T = T_;
  static constexpr int kGroup = kGroup_, kDim = kDim_, kPass = kGroup, kStride = 8;
  static constexpr int kItems = 1, kRows = kChunk, kAtOnce = 1, kWords = kDim / 32, kStages = 4;
  static constexpr int kSets = kGroup > 8 ? 2 : 1;            // high and low parts of q beside each other in one product, or in two
  static constexpr int kQuery = kDim / 16 * kSets * 512;
};

/** d += a [16 x 8] . b [8 x 8] in f32. Lane 4 g + i has a: columns 2 i, 2 i + 1 of rows g and g + 8; b: rows 2 i, 2 i + 1 of column g. */
template <bool kBf16>
__device__ inline void mma_narrow(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  if constexpr (kBf16) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b));
  }
}

/** Two numbers as a word of f16 (beyond its range: its largest) or bf16, and back. */
template <typename T>
__device__ inline uint32_t pack(float first, float second) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __half>) asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
template <typename T>
__device__ inline float2 unpack(uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) return __half22float2(*reinterpret_cast<const __half2*>(&word));
  else return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

template <typename Cut>
struct TensorWay : AttendStep<Cut> {
  using Step = AttendStep<Cut>;
  using T = typename Cut::T;
  using Step::a, Step::c, Step::area, Step::warp, Step::lane, Step::dim, Step::pairs, Step::keys, Step::values, Step::items, Step::scores, Step::kept, Step::length;
  using Step::kGroup, Step::kDim, Step::kWords, Step::kStages, Step::kWarps;
  static constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  static constexpr int kQuery = Cut::kQuery, kSets = Cut::kSets, kResident = kGroup > 8 || kDim > 128 ? 1 : 2;
  static constexpr int kParts = kDim / 64;             // of a key: 16 bytes and what they are turned with; of a value: of two slots
  static constexpr int kSteps = kDim / 16;             // products of a chunk's keys
  static constexpr int kMine = kGroup > 8 ? 2 : 1;     // query heads whose scores a lane has: g and g + 8
  static constexpr int kOutputs = 4 * kParts;          // products of a chunk's values
  static constexpr bool kHeld = kSets * kSteps <= 8;   // q stays in registers

  const int g, i;
  uint4* const query;                                  // [kSteps, kSets, lane]
  uint32_t turns[kParts * 8];                          // of the pairs that this lane turns: angles a position
  uint32_t turned[kWords * 4];                         // a chunk's keys, this lane's part
  float sums[kMine][kOutputs][4];
  // The next item to bring: its first slot, this lane's first piece of 16 bytes, and how far it is to that of the item behind it.
  int32_t next, next_slot;
  const T* from;
  int64_t apart;
  uint32_t place[kWords];                              // pieces of an item that this lane brings: where they lie in shared memory
  bool whole;                                          // items are whole chunks of full rows
  int32_t key_at[kWords];                              // pieces of an item that this lane takes, of keys

  __device__ TensorWay(const AttendView& a, const Faults& faults, typename Step::Area& area, uint8_t* shared)
      : Step(a, faults, area, shared), g(lane >> 2), i(lane & 3), query(reinterpret_cast<uint4*>(shared + a.plan.q_at)) {}

  /** The angles a position of the pairs that this lane turns. */
  __device__ void read_turns() {
#pragma unroll
    for (int n = 0; n < kParts * 8; n += 4) {
      const int32_t x = (i + n / 8 * 4) * 8 + n % 8;
      uint4 four = make_uint4(0, 0, 0, 0);
      if (x < pairs && !c.text) four = *reinterpret_cast<const uint4*>(c.rope.turns + x);
      turns[n] = four.x, turns[n + 1] = four.y, turns[n + 2] = four.z, turns[n + 3] = four.w;
    }
  }

  /** Keeps a pair of a query head as the products take it: in f16, or as keys that are not turned are stored. */
  __device__ void keep_q(int32_t x, int32_t head, float2 numbers) {
    const int32_t u = x / 8, j = x % 8, of = (head % 8 * 4 + u % 4) * 4 + j % 4 / 2 * 2 + head / 8;
    auto* to = reinterpret_cast<uint16_t*>(query) + j % 2;
    const auto put = [&](int32_t step, float number) {
      number = fmaf(number, 0.0f, number);  // an infinity must not end as the largest f16
      const bool stored = kBf16 && c.text;
      const uint32_t high = stored ? pack<__nv_bfloat16>(number, 0.0f) : pack<__half>(number, 0.0f);
      const float left = number - (stored ? unpack<__nv_bfloat16>(high).x : unpack<__half>(high).x);
      const uint32_t low = stored ? pack<__nv_bfloat16>(left, 0.0f) : pack<__half>(left, 0.0f);
      to[(step * kSets * 128 + of) * 2] = static_cast<uint16_t>(high);
      to[(step * kSets * 128 + (kSets == 1 ? of + 1 : of + 128)) * 2] = static_cast<uint16_t>(low);
    };
    put(u / 4 * 4 + j / 4, numbers.x);
    put(u / 4 * 4 + 2 + j / 4, numbers.y);
  }

  // ---- items: a chunk's rows, as they lie but for their order within 128 bytes, so that no two lanes read from one bank ----

  static constexpr int kAcross = kDim / 8;  // pieces of a row
  static __device__ int32_t place_of(int32_t row, int32_t piece) { return row * kAcross + (piece ^ (row / 2 % 4 * 2 ^ row % 2 * 4)); }
  __device__ uint4* item(int32_t n) const { return items + n % kStages * kWords * 32; }

  __device__ void begin_keys() {
    next = 0, next_slot = this->slot_at(this->item_at(0)), from = keys + int64_t{next_slot} * dim + lane * 8;
    apart = int64_t{this->slot_step(0)} * dim;
    const auto find_places = [&](int32_t across) {
#pragma unroll
      for (int w = 0; w < kWords; w++) place[w] = shared_address(items + place_of((w * 32 + lane) / across, (w * 32 + lane) % across));
    };
    if (dim == kDim) find_places(kAcross);
    else find_places(dim / 8);
    whole = dim == kDim && c.slots % kChunk == 0;
    if (whole) return;
    // What is never brought must be numbers.
    for (int n = 0; n < kStages * kWords; n++) items[n * 32 + lane] = make_uint4(0, 0, 0, 0);
    __syncwarp();
  }

  /** There are but \`length\` items of keys: values take the places behind them. */
  __device__ void end_keys() { next = length; }

  /** The next item is now on its way: \`length\` items of keys, then as many of values. */
  __device__ void bring_item() {
    if (next == length) next_slot = this->slot_at(this->item_at(0)), from = values + int64_t{next_slot} * dim + lane * 8;
    if (next < 2 * length) {
      const uint32_t stage = static_cast<uint32_t>(next) % kStages * (kWords * 512);
      const auto bring_piece = [&](int w) { bring(place[w] + stage, from + w * 256, true); };
      if (whole) {
#pragma unroll
        for (int w = 0; w < kWords; w++) bring_piece(w);
      } else {
        const int32_t pieces = min(c.slots - next_slot, kChunk) * (dim / 8) - lane;
#pragma unroll
        for (int w = 0; w < kWords; w++) {
          if (w * 32 < pieces) bring_piece(w);
        }
      }
    }
    close_item();
    next_slot += this->slot_step(0), from += apart;
    next++;
  }
  /** The item that is waited for next has come, to all lanes. */
  __device__ void await_item() {
    await_items<kStages - 1>();
    __syncwarp();
  }

  // ---- scores ----

  /** Turns this lane's part of an item of keys by the rank of its slot. */
  __device__ void turn(int32_t n, int32_t ranks) {
    const uint32_t rank = __shfl_sync(0xffffffffu, ranks, n % 4 * kChunk + g);
#pragma unroll
    for (int w = 0; w < kWords; w++) {
      const uint4 part = item(n)[key_at[w]];
      turned[w * 4] = part.x, turned[w * 4 + 1] = part.y, turned[w * 4 + 2] = part.z, turned[w * 4 + 3] = part.w;
    }
    if (c.text) return;
#pragma unroll
    for (int w = 0; w < kParts * 4; w++) {
      uint32_t &first = turned[w / 4 * 8 + w % 4], &second = turned[w / 4 * 8 + 4 + w % 4];
      const float2 was = unpack<T>(first), other = unpack<T>(second);
      float cosines[2], sines[2];
#pragma unroll
      for (int k = 0; k < 2; k++) {
        // The high bits of the angle as a number from 1 to 2, a turn too large.
        const float angle = fmaf(__uint_as_float(__funnelshift_r(rank * turns[w * 2 + k], 0x7f, 9)), 6.28318530718f, -6.28318530718f);
        cosines[k] = __cosf(angle), sines[k] = __sinf(angle);
      }
      first = pack<__half>(was.x * cosines[0] - other.x * sines[0], was.y * cosines[1] - other.y * sines[1]);
      second = pack<__half>(was.x * sines[0] + other.x * cosines[0], was.y * sines[1] + other.y * cosines[1]);
    }
  }

  /** The first keys, before q is there. */
  __device__ void begin_scores(int32_t ranks) {
#pragma unroll
    for (int w = 0; w < kWords; w++) {
      const int32_t x = (i + w / 2 * 4) * 8;
      key_at[w] = place_of(g, (w % 2 ? this->second_of(x) : this->first_of(x)) / 8);
    }
    if (length == 0) return;
    await_item();
    turn(0, ranks);
  }

  /** The products of q with the keys that are turned. */
  template <bool kStored, typename Query>
  __device__ void multiply_all(const Query& of, float (&d)[2][4]) const {
#pragma unroll
    for (int k = 0; k < kSteps; k++) {
#pragma unroll
      for (int set = 0; set < kSets; set++) {
        const uint4 q = of(k * kSets + set);
        const int32_t rows[4] = {static_cast<int32_t>(q.x), static_cast<int32_t>(q.y), static_cast<int32_t>(q.z), static_cast<int32_t>(q.w)};
        float(&sum)[4] = d[kSets == 1 ? k % 2 : set];
        mma_half<kStored>(sum, rows, static_cast<int32_t>(turned[k * 2]), static_cast<int32_t>(turned[k * 2 + 1]), sum);
      }
    }
  }
  template <typename Query>
  __device__ void multiply(const Query& of, float (&s)[kMine][2]) const {
    float d[2][4] = {};
    if (kBf16 && c.text) multiply_all<true>(of, d);
    else multiply_all<false>(of, d);
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const float first = d[0][k] + d[1][k], second = d[0][2 + k] + d[1][2 + k];
      if constexpr (kMine == 1) s[0][k] = first + second;
      else s[0][k] = first, s[1][k] = second;
    }
  }

  /** Where this lane's scores of item n lie, of query head g; those of g + 8 are 64 further on. */
  __device__ float2* scores_at(int32_t n) const { return reinterpret_cast<float2*>(scores + ((n * kWarps + warp) * kGroup + (g ^ n % 4)) * kChunk + 2 * i); }

  /** Leaves the exponentials of this warp's scores, under its own highest, in \`scores\`, its softmax in area.part; \`ranks\` are those of the
   *  thread's own entries. */
  __device__ void score(int32_t ranks) {
    uint4 held[kHeld ? kSteps * kSets : 1];
    if constexpr (kHeld) {
#pragma unroll
      for (int k = 0; k < kSteps * kSets; k++) held[k] = query[k * 32 + lane];
    }
    const auto of = [&](int k) {
      if constexpr (kHeld) return held[k];
      else return query[k * 32 + lane];
    };
    float most[kMine];
#pragma unroll
    for (int m = 0; m < kMine; m++) most[m] = -FLT_MAX;
    int32_t next_ranks = this->read_rank(this->entry_at(1)), left = kept - this->slot_at(this->item_at(0)) - 2 * i;
#pragma unroll 1
    for (int32_t n = 0; n < length; n++) {
      float s[kMine][2];
      multiply(of, s);
      __syncwarp();  // all lanes have read the item whose place the next one takes
      bring_item();
      if (n + 1 < length) {
        if (n % 4 == 3) ranks = next_ranks, next_ranks = this->read_rank(this->entry_at((n + 1) / 4 + 1));
        await_item();
        turn(n + 1, ranks);
      }
#pragma unroll
      for (int m = 0; m < kMine; m++) {
        if (a.softcap > 0.0f) s[m][0] = a.capped(s[m][0]), s[m][1] = a.capped(s[m][1]);
        if (left < 1) s[m][0] = -INFINITY;
        if (left < 2) s[m][1] = -INFINITY;
        most[m] = fmaxf(most[m], fmaxf(s[m][0], s[m][1]));
        if (g < kGroup) scores_at(n)[m * 32] = make_float2(s[m][0], s[m][1]);
      }
      left -= this->slot_step(0);
    }
    float total[kMine] = {};
#pragma unroll
    for (int m = 0; m < kMine; m++) {
      most[m] = fmaxf(most[m], __shfl_xor_sync(0xffffffffu, most[m], 1));
      most[m] = fmaxf(most[m], __shfl_xor_sync(0xffffffffu, most[m], 2));
    }
    if (g < kGroup) {
      constexpr int kTurns = kMine == 1 ? 8 : 4;  // whose scores are asked for together
#pragma unroll 1
      for (int32_t first = 0; first < length; first += kTurns) {
        float2 s[kTurns][kMine];
#pragma unroll
        for (int k = 0; k < kTurns; k++) {
#pragma unroll
          for (int m = 0; m < kMine; m++) {
            if (first + k < length) s[k][m] = scores_at(first + k)[m * 32];
          }
        }
#pragma unroll
        for (int k = 0; k < kTurns; k++) {
          if (first + k >= length) break;
#pragma unroll
          for (int m = 0; m < kMine; m++) {
            const float2 p = make_float2(power(s[k][m].x - most[m]), power(s[k][m].y - most[m]));
            total[m] += p.x + p.y;
            scores_at(first + k)[m * 32] = p;
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kMine; m++) {
      total[m] += __shfl_xor_sync(0xffffffffu, total[m], 1);
      total[m] += __shfl_xor_sync(0xffffffffu, total[m], 2);
      if (i == 0 && g < kGroup) area.part[warp][g + m * 8] = make_float2(most[m], total[m]);
    }
    __syncwarp();
  }

  // ---- output ----

  /** Sums of exponentials times values. */
  __device__ void sum_values(int32_t) {
#pragma unroll
    for (int n = 0; n < kMine * kOutputs * 4; n++) sums[n / 4 / kOutputs][n / 4 % kOutputs][n % 4] = 0.0f;
    int32_t value_at[kWords];
#pragma unroll
    for (int w = 0; w < kWords; w++) value_at[w] = place_of(2 * i + w % 2, g + w / 2 * 8);
    float2 next_p[kMine];
    const auto read_p = [&](int32_t n) {
#pragma unroll
      for (int m = 0; m < kMine; m++) next_p[m] = n < length && g < kGroup ? scores_at(n)[m * 32] : make_float2(0.0f, 0.0f);
    };
    read_p(0);
#pragma unroll 1
    for (int32_t n = 0; n < length; n++) {
      await_item();
      float2 p[kMine];
#pragma unroll
      for (int m = 0; m < kMine; m++) p[m] = next_p[m];
      read_p(n + 1);
      uint4 words[kWords];
#pragma unroll
      for (int w = 0; w < kWords; w++) words[w] = item(length + n)[value_at[w]];
      __syncwarp();
      bring_item();
      uint32_t high[kMine], low[kMine];
#pragma unroll
      for (int m = 0; m < kMine; m++) {
        high[m] = pack<T>(p[m].x, p[m].y);
        const float2 rounded = unpack<T>(high[m]);
        low[m] = pack<T>(p[m].x - rounded.x, p[m].y - rounded.y);
      }
      // Number r of this lane's dimensions, of both slots.
      const auto both = [&](int r) {
        const auto word = [&](const uint4& x) { return r % 8 / 2 == 0 ? x.x : r % 8 / 2 == 1 ? x.y : r % 8 / 2 == 2 ? x.z : x.w; };
        return __byte_perm(word(words[r / 8 * 2]), word(words[r / 8 * 2 + 1]), r % 2 ? 0x7632 : 0x5410);
      };
#pragma unroll
      for (int r = 0; r < kOutputs; r++) {
        const uint32_t first = both(r), second = both(r + kOutputs);
#pragma unroll
        for (int m = 0; m < kMine; m++) {
          mma_narrow<kBf16>(sums[m][r], first, second, high[m]);
          mma_narrow<kBf16>(sums[m][r], first, second, low[m]);
        }
      }
    }
    await_items<0>();
  }

  /** Leaves them in this warp's region. */
  __device__ void keep_sums(int32_t) {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kMine; m++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int32_t head = m * 8 + 2 * i + h;
        if (head >= kGroup) continue;
#pragma unroll
        for (int r = 0; r < kParts * 8; r += 4) {
          const auto number = [&](int k) { return sums[m][(r + k) % kOutputs][(r + k) / kOutputs * 2 + h]; };
          *reinterpret_cast<float4*>(reinterpret_cast<float*>(items) + head * kDim + (g + r / 8 * 8) * 8 + r % 8) = make_float4(number(0), number(1), number(2), number(3));
        }
      }
    }
  }
};

template <typename T, int kDim>
void by_heads(Context& ctx, const Cache& cache, const AttendView& a) {
  if (cache.group() <= 4) return start_attend<TensorWay<TensorCut<T, 4, kDim>>>(ctx, cache, a);
  if (cache.group() <= 8) return start_attend<TensorWay<TensorCut<T, 8, kDim>>>(ctx, cache, a);
  start_attend<TensorWay<TensorCut<T, 16, kDim>>>(ctx, cache, a);
}

template <typename T>
void by_dim(Context& ctx, const Cache& cache, const AttendView& a) {
  if (cache.head_dim <= 64) return by_heads<T, 64>(ctx, cache, a);
  if (cache.head_dim <= 128) return by_heads<T, 128>(ctx, cache, a);
  start_attend<TensorWay<TensorCut<T, 4, 256>>>(ctx, cache, a);
}

}  // namespace

bool attend_tensor(Context& ctx, const Cache& cache, const AttendView& a) {
  if (cache.dtype == WKV_F32 || cache.head_dim % 16 != 0 || cache.rope->count % 8 != 0) return false;
  if (cache.head_dim > 256 || (cache.head_dim > 128 && cache.group() > 4)) return false;
  if (cache.dtype == WKV_F16) by_dim<__half>(ctx, cache, a);
  else by_dim<__nv_bfloat16>(ctx, cache, a);
  return true;
}

}  // namespace wkv
`,
  "cuda/cache.cu": `/** cache.cu: rotations and caches. */
#include "cache.cuh"

#include <cmath>
#include <cstring>

namespace wkv {

void Cache::check_layer(int32_t layer) const {
  require(layer >= 0 && layer < layers, "layer must be between 0 and " + std::to_string(layers - 1) + ": " + std::to_string(layer));
}

CacheView Cache::view(int32_t layer) const {
  CacheView v;
  v.sequences = sequences, v.heads = heads, v.kv_heads = kv_heads, v.head_dim = head_dim, v.slots = slots, v.sinks = sinks, v.recent = recent, v.interval = interval, v.select = select, v.merge = merge, v.seed = seed;
  v.width = width();
  v.text = positions == WKV_POSITIONS_TEXT;
  v.first = head(layer, 0, 0);
  v.keys = memory->as<uint8_t>(keys_at);
  v.values = memory->as<uint8_t>(values_at);
  v.scores = memory->as<float>(scores_at);
  v.births = memory->as<int32_t>(births_at);
  v.ranks = memory->as<int32_t>(ranks_at);
  v.words = memory->as<uint32_t>(words_at);
  v.counts = memory->as<Counts>(counts_at);
  v.later = later();
  const size_t part = round_up(size_t(sequences) * kv_heads * (size_t(slots) + 1) * 4);
  const auto scratch = [&](size_t i) { return memory->as<float>(scratch_at + i * part); };
  v.by_rank = scratch(0), v.places = memory->as<int32_t>(scratch_at + part);
  v.measures = scratch(2), v.now = scratch(3), v.weights = scratch(4), v.freed = memory->as<int32_t>(scratch_at + 5 * part);
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

/** An angle in turns of 2^64, so that its multiples wrap as turns do. */
uint64_t phase_of(float frequency) {
  const long double turns = static_cast<long double>(frequency) / 6.283185307179586476925286766559L;
  const long double part = turns - std::floor(turns);
  return part < 1.0L ? static_cast<uint64_t>(std::ldexp(part, 64)) : 0;
}

constexpr size_t kScratchLists = 6;  // as Cache::view cuts them
constexpr Counts kEmpty = {0, 0, 0, 0, {-1.0f, -1.0f, 0.0f, 0.0f}, WKV_UNSET, {}};

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
    std::vector<uint64_t> phases;
    std::vector<uint32_t> turns;
    for (int32_t i = 0; i < rope->count; i++) {
      require(std::isfinite(frequencies[i]), "frequency " + std::to_string(i) + " is not finite");
      wide.push_back(frequencies[i]);
      phases.push_back(phase_of(frequencies[i]));
      turns.push_back(static_cast<uint32_t>((phases[i] + 0x80000000u) >> 32));
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
    rope->phases = std::make_shared<DeviceMemory>(phases.size() * 8);
    rope->turns = std::make_shared<DeviceMemory>(turns.size() * 4);
    if (count) ctx.copy(rope->tables->as<void>(), tables.data(), count * 8);
    ctx.copy(rope->frequencies->as<void>(), wide.data(), wide.size() * 8);
    ctx.copy(rope->phases->as<void>(), phases.data(), phases.size() * 8);
    ctx.copy(rope->turns->as<void>(), turns.data(), turns.size() * 4);
    *out = add_handle(context, rope);
  });
}

int32_t wkv_cache_open(int32_t context, int32_t rope, int32_t layers, int32_t sequences, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t slots, int32_t sinks, int32_t recent, int32_t interval, int32_t select, int32_t merge, int32_t seed, int32_t positions, int32_t dtype, int32_t* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    require_buffer(out, out_bytes, 4, "out");
    auto cache = std::make_shared<Cache>();
    cache->rope = find<Rope>(context, rope, Kind::Rope, "rope");
    require(layers >= 1 && layers <= 1024 && sequences >= 1 && sequences <= 4096, "layers must be between 1 and 1024, sequences between 1 and 4096");
    require(kv_heads >= 1 && kv_heads <= 1024 && heads >= kv_heads && heads % kv_heads == 0, "heads must be a multiple of kv_heads: " + std::to_string(heads) + ", " + std::to_string(kv_heads));
    require(cache->rope->head_dim == head_dim, "head_dim " + std::to_string(head_dim) + " is not the rotation's " + std::to_string(cache->rope->head_dim));
    require(slots >= 1, "slots must be at least 1: " + std::to_string(slots));
    require(sinks >= 0 && recent >= 0 && int64_t{sinks} + recent <= slots, "sinks + recent must be between 0 and slots: " + std::to_string(sinks) + " + " + std::to_string(recent) + " of " + std::to_string(slots));
    const int32_t most = std::max(1, slots - sinks - recent);
    require(interval >= 1 && interval <= most, "interval must be between 1 and " + std::to_string(most) + ": " + std::to_string(interval));
    require(select >= WKV_SELECT_NONE && select <= WKV_SELECT_OUTPUT_ERROR, "select " + std::to_string(select) + " is unknown");
    require(merge >= WKV_MERGE_NONE && merge <= WKV_MERGE_RIGHT_LIGHT, "merge " + std::to_string(merge) + " is unknown");
    require(positions == WKV_POSITIONS_CACHE || positions == WKV_POSITIONS_TEXT, "positions " + std::to_string(positions) + " is unknown");
    require(positions == WKV_POSITIONS_TEXT || cache->rope->positions > slots, "the rotation's tables reach " + std::to_string(cache->rope->positions) + " positions, expected more than " + std::to_string(slots));
    require(dtype == WKV_F32 || dtype == WKV_F16 || dtype == WKV_BF16, "dtype " + std::to_string(dtype) + " is not a cache type");
    cache->layers = layers;
    cache->touched.assign(layers, 0);
    cache->sequences = sequences;
    cache->heads = heads;
    cache->kv_heads = kv_heads;
    cache->head_dim = head_dim;
    cache->slots = slots;
    cache->sinks = sinks;
    cache->recent = recent;
    cache->interval = interval;
    cache->select = select;
    cache->merge = merge;
    cache->seed = seed;
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
    cache->words_at = take(entries * cache->width() * 4);
    cache->counts_at = take(all * sizeof(Counts));
    cache->scratch_at = bytes;
    const size_t lists = cache->later() ? kScratchLists : wkv_uses_gap(select) ? 2 : 0;
    for (size_t i = 0; i < lists; i++) take(size_t(sequences) * kv_heads * (size_t(slots) + 1) * 4);
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
    // wkv_attend weighs values behind the last token with 0, so a failed step must leave none there that are no numbers.
    const size_t values = size_t(cache->slots) * cache->row_bytes();
    const auto empty_heads = [&](int64_t first) {
      ctx.copy(counts + first, empty.data(), count * sizeof(Counts));
      ctx.zero(cache->memory->as<void>(cache->values_at + first * values), count * values);
    };
    if (sequence < 0) return empty_heads(0);
    for (int32_t layer = 0; layer < cache->layers; layer++) empty_heads(cache->head(layer, sequence, 0));
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
`,
  "cuda/cache.cuh": `/**
 * cache.cuh: the cache of the CUDA library, shared by attend.cu, cache.cu and prefill.cu.
 *
 * Slots never move; \`ranks[slot]\` is a token's rank. The used slots of a head are always 0 .. kept - 1. State has room for slots + 1
 * entries, the last of which a new token holds until it takes its victim's slot. Everything that a step changes lies on the device.
 */
#pragma once
#include <climits>

#include "../policy.h"
#include "../rows.hpp"
#include "common.cuh"

namespace wkv {

/** Counters of one head; \`event\` as WKV_CACHE_EVENT. */
struct Counts {
  int32_t kept, steps, merged, evicted;
  float event[4];
  float threshold;  // of nearest
  int32_t unused[3];
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
  const uint64_t* phases;        // each pair's angle a position, in turns of 2^64
  const uint32_t* turns;         // the same, rounded to turns of 2^32

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
  DeviceRef tables, frequencies, phases, turns;
  Rope() : Object(Kind::Rope) {}
  size_t bytes() const override { return tables->bytes(); }
  RopeView view() const {
    const float* cosines = tables->as<float>();
    return {count, positions, pairs == WKV_PAIRS_INTERLEAVED, cosines, cosines + int64_t{positions} * count, frequencies->as<double>(), phases->as<uint64_t>(), turns->as<uint32_t>()};
  }
};
using RopeRef = std::shared_ptr<Rope>;

/** State of some tokens of one head, by entry, and scratch memory for those that choose among them. */
struct Entries {
  float* score;
  int32_t* birth;   // the step that fed the token, from 1: its place in the text + 1
  int32_t* rank;    // -1: it has left
  uint32_t* words;  // [words a token, stride]: what the policy keeps of a token (policy.h)
  int64_t stride;
  float* gap;       // the first word, |V_j - V_r|^2 with the right neighbour, for rules that ask for it; else null
  float* by_rank;   // [ranks] scratch: averages, for the same rules; what is pooled
  float* measure;   // scratch of rules that measure tokens
  float* now;       // scratch: this step's weights, where they are known
  int32_t* freed;   // scratch: slots that victims left, in order; null where there is one at most

  __device__ float* number(int32_t w) const { return reinterpret_cast<float*>(words) + w * stride; }
};

/** A cache, or one layer of it, as kernels see it. */
struct CacheView {
  int32_t sequences, heads, kv_heads, head_dim, slots, sinks, recent, interval, select, merge, seed, width;
  bool text;        // keys are rotated once, at their place in the text
  bool later;       // a second launch chooses, from \`weights\`
  int64_t first;    // the layer's first head
  uint8_t *keys, *values;
  float* scores;
  int32_t *births, *ranks;
  uint32_t* words;
  Counts* counts;
  // Scratch memory of one layer, [heads of the layer, slots + 1], for rules that ask for gaps (the first two) and where a second launch chooses.
  float* by_rank;
  int32_t* places;    // the slot of each rank
  float *measures, *now;
  float* weights;     // of a step, in rank order
  int32_t* freed;
  RopeView rope;

  __device__ int32_t group() const { return heads / kv_heads; }
  template <typename T>
  __device__ T* keys_of(int64_t head) const { return reinterpret_cast<T*>(keys) + head * slots * head_dim; }
  template <typename T>
  __device__ T* values_of(int64_t head) const { return reinterpret_cast<T*>(values) + head * slots * head_dim; }
  __device__ bool gapped() const { return wkv_uses_gap(select); }
  __device__ int32_t* places_of(int64_t head) const { return places + (head - first) * (slots + 1); }
  __device__ Entries entries(int64_t head) const {
    const int64_t stride = slots + 1, at = head * stride, unit = (head - first) * stride;
    uint32_t* own = words + at * width;
    return {scores + at, births + at, ranks + at, own, stride, gapped() ? reinterpret_cast<float*>(own) : nullptr, by_rank + unit, measures + unit, later ? now + unit : nullptr, later ? freed + unit : nullptr};
  }
};

struct Cache : Object {
  RopeRef rope;
  int32_t layers, sequences, heads, kv_heads, head_dim, slots, sinks, recent, interval, select, merge, seed, positions, dtype;
  DeviceRef memory;
  size_t keys_at, values_at, scores_at, births_at, ranks_at, words_at, counts_at, scratch_at;
  std::vector<uint64_t> touched;  // a layer's last writer, as the context counts launches
  Cache() : Object(Kind::Cache) {}
  size_t bytes() const override { return memory->bytes(); }
  int32_t width() const { return wkv_words(select, merge); }
  bool later() const { return !wkv_in_one_launch(select, merge, interval); }
  int32_t group() const { return heads / kv_heads; }
  /** Where its heads lie in rows that begin with its KV head kv_head; \`out_columns\`: of a row of outputs. */
  RowHeads row_heads(int32_t out_columns, int32_t kv_head) const { return RowHeads(group(), kv_heads, head_dim, out_columns, kv_head); }
  int64_t row_bytes() const { return int64_t{head_dim} * (dtype == WKV_F32 ? 4 : 2); }
  int64_t head(int32_t layer, int32_t sequence, int32_t kv_head) const { return (int64_t{layer} * sequences + sequence) * kv_heads + kv_head; }
  void check_layer(int32_t layer) const;
  /** Says that the kernel just launched writes a layer. */
  void touch(const Context& ctx, int32_t layer) { touched[layer] = ctx.launches; }
  /** Whether it does not: the next kernel may then read the layer before this one has ended. */
  bool untouched(const Context& ctx, int32_t layer) const { return touched[layer] != ctx.launches; }
  CacheView view(int32_t layer) const;
};
using CacheRef = std::shared_ptr<Cache>;

CacheRef find_cache(int32_t context, int32_t handle, int32_t layer);
TensorRef find_victims(int32_t context, int32_t handle, const Cache& cache);

/** The angle at a position, in turns of 2^32 from -1/2 to 1/2. */
__device__ inline float phase_at(uint32_t position, uint32_t high, uint32_t low) {
  return static_cast<float>(static_cast<int32_t>(position * high + __umulhi(position, low)));
}

/** Cosine and sine of a pair at a position, and a pair turned by them: the same bits wherever a decode step stores a key. */
__device__ inline float2 turn_at(uint32_t position, uint64_t phase) {
  float2 turn;
  sincospif(phase_at(position, static_cast<uint32_t>(phase >> 32), static_cast<uint32_t>(phase)) * 0x1p-31f, &turn.y, &turn.x);
  return turn;
}
__device__ inline float2 rotated(float2 pair, float2 turn) {
  return make_float2(fmaf(pair.x, turn.x, -(pair.y * turn.y)), fmaf(pair.x, turn.y, pair.y * turn.x));
}

/** Calls body with a value of the cache's element type. */
template <typename Body>
void by_cache_type(int32_t dtype, Body body) {
  if (dtype == WKV_F32) body(float());
  else if (dtype == WKV_F16) body(__half());
  else body(__nv_bfloat16());
}

/** Whether a softmax's sum is a number: it is none when a query or key was none. */
__device__ inline bool is_sum(float sum) { return sum > 0.0f && sum <= 3.4e38f; }

/** |a - b|^2 of two stored rows, by one warp; a call, as few policies need it. */
template <typename T>
static __device__ __noinline__ float warp_gap(const T* a, const T* b, int32_t dim) {
  float total = 0.0f;
  for (int32_t d = threadIdx.x & 31; d < dim; d += 32) {
    const float x = to_float(a[d]) - to_float(b[d]);
    total += x * x;
  }
  return warp_sum(total);
}

/** New keys and values of the sequences, in floats: a head's key, how far apart rows lie, and a value from its key. */
struct NewRows {
  const float* keys;
  int64_t row, value;
};

/** Launches what is left of a step when wkv_attend's launch left it to a second one: the layer's weights lie in \`weights\`. */
void settle_step(Context& ctx, const Cache& cache, const CacheView& view, const NewRows& rows, const float* weights, const int32_t* victims);

}  // namespace wkv
`,
  "cuda/chain.cu": `/**
 * chain.cu: products of one row that follow each other in a graph are one launch: what attention gave to the next layer's queries, say.
 *
 *   x += attended . output;  hidden = silu(norm(x) . gate) * (norm(x) . up);  x += hidden . down;  qkv = norm(x) . w
 *
 * While a graph is recorded they wait here until another op comes. Large weights go to chain_grid.cu, such as the shared memory of one
 * cluster holds to chain_cluster.cu; a product that stays alone goes to matvec.cu.
 */
#include "chain.cuh"

#include <algorithm>

namespace wkv {
namespace {
/** Bytes of shared memory that any kernel needs beside x. */
constexpr int32_t kBesideX = 40 * 1024;
bool whole16(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }
}  // namespace

bool Chain::take(const Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, bool int8, const OutputView& to) {
  const bool known = int8 || w.dtype == WKV_F16 || w.dtype == WKV_BF16;
  if (ctx.capability < 90 || in.rows != 1 || !known || w.columns % 32 != 0 || !whole16(in.x) || !whole16(in.norm)) return false;
  if (up.data && up.dtype != w.dtype) return false;
  if (w.columns * (int8 ? 2 : 4) + kBesideX > ctx.shared_limit) return false;
  if (products_.size() == kMostLinks || (!products_.empty() && (products_[0].w.dtype != w.dtype || int8_ != int8))) return false;
  const Span reads(in.x, in.columns), norm(in.norm, in.columns), bias(to.bias, w.rows), writes(to.out, w.rows);
  if (reads.meets(writes) || norm.meets(writes) || bias.meets(writes)) return false;
  int32_t after = -1;
  bool reads_given = false, writes_given = false;
  for (int32_t i = 0; i < static_cast<int32_t>(products_.size()); i++) {
    const Product& before = products_[i];
    const int32_t columns = before.w.columns, rows = before.w.rows;
    const Span gave(before.to.out, rows);
    if (gave.meets(norm) || gave.meets(bias) || writes.meets(Span(before.in.norm, columns)) || writes.meets(Span(before.to.bias, rows))) return false;
    if (gave.meets(reads) || gave.meets(writes) || writes.meets(Span(before.in.x, columns))) after = i;
    reads_given |= gave.meets(reads), writes_given |= gave.meets(writes);
  }
  if (writes_given && !reads_given) return false;  // a graph that times one op
  products_.push_back({in, w, up, to, after});
  int8_ = int8;
  return true;
}

void Chain::launch(Context& ctx) {
  const std::vector<Product> products = std::exchange(products_, {});
  if (products.size() > 1 && chain_grid(ctx, products)) return;
  for (size_t i = 0; i < products.size();) {
    const size_t together = int8_ ? chain_cluster(ctx, &products[i], products.size() - i) : 0;
    i += std::max<size_t>(together, 1);
    if (together > 0) continue;
    const Product& alone = products[i - 1];
    const bool started = matvec(ctx, alone.in, alone.w, alone.up, int8_, alone.to);
    require(started, "A product of one row found no kernel");
  }
}

void Context::flush() {
  if (chain) chain->launch(*this);
}

}  // namespace wkv
`,
  "cuda/chain.cuh": `/** chain.cuh: products of one row that are recorded one after another, and may become one launch: chain.cu (which do), chain_cluster.cu (of
 *  small weights), chain_grid.cu (of large ones). */
#pragma once
#include "linear.cuh"

namespace wkv {

constexpr int32_t kMostLinks = 8;  // of a chain

/** A product of a chain. */
struct Product {
  InputView in;
  WeightView w, up;
  OutputView to;
  int32_t after;  // the last one before that must have ended, in all blocks, when this one begins to read or write; -1: none
};

/** What is recorded and not launched yet. All of one type, rounded to 8 bits or not. */
class Chain {
 public:
  /** Takes a product in; false, and nothing changed, where it must be launched by itself. */
  bool take(const Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, bool int8, const OutputView& to);
  /** Launches what was taken in. */
  void launch(Context& ctx);

 private:
  std::vector<Product> products_;
  bool int8_ = false;
};

/** One launch of them all; false, and nothing launched, where their weights are small or there is no room. */
bool chain_grid(Context& ctx, const std::vector<Product>& products);
/** One launch of as many as find room from the first on, which it counts; none where they are not two. */
size_t chain_cluster(Context& ctx, const Product* first, size_t count);

/** Floats in global memory. */
struct Span {
  const float *begin, *end;
  Span(const float* begin, int32_t count) : begin(begin), end(begin ? begin + count : begin) {}
  bool meets(const Span& other) const { return begin < other.end && other.begin < end; }
  bool operator==(const Span& other) const { return begin == other.begin && end == other.end; }
};

}  // namespace wkv
`,
  "cuda/chain_cluster.cu": `/**
 * chain_cluster.cu: a chain of products (chain.cu) of weights so small that launches would take longer than they.
 *
 * One cluster of 16 blocks does it all. A block owns a 16th of the rows of every weight, and has them brought to its shared memory before
 * the kernel in front has ended. Every block holds each x whole: it norms it, rounds it to 8 bits in blocks of 32 as matvec.cu does, and
 * pushes its part of the result to all blocks, where a barrier counts the bytes. Results go to global memory as well, so that a graph
 * leaves what its ops would have left one by one.
 *
 * A result is pushed only where a later link reads it, and every block waits for all of it there, so nothing is on its way to a block that
 * has ended. Sums are in a fixed order. Bytes moved: the weights, once.
 */
#include <algorithm>

#include "chain.cuh"
#include "chunk.cuh"
#include "cluster.cuh"
#include "mma.cuh"

namespace wkv {
namespace {

constexpr int32_t kOwnShared = 4096;  // bytes that the kernel declares itself, at most
constexpr int kBlocks = 16, kThreads = 1024, kWarps = kThreads / 32;
constexpr int kQuad = 4;  // rows that a warp takes at once

/** One product, as the kernel sees it. Places are bytes of a block's shared memory, -1 for none. */
struct Link {
  WeightView w, up;  // w . x, or gated with up where up has data
  const float *x, *norm, *bias;
  float* out;
  float epsilon;
  int32_t add, activation;
  uint32_t after;                 // the links whose results this one waits for, as the first, a bit each
  int32_t x_at, out_at;           // x, and the result where another link reads it: whole, in every block
  int32_t norm_at, bias_at;       // bias: of this block's rows
  int32_t old_at;                 // what the result is added to: whole, or of this block's rows where no link gave it
  int32_t own;                    // rows of a block, at most: block b has the b-th of them
  int32_t first, rows;            // a block's, in its own copy
  int32_t row_bytes[4], w_at[4], up_at[4];  // by plane, as WeightView's: a row's; where this block's rows of the weights lie
  bool reads_x, reads_old;        // from global memory
};

struct ChainView {
  int32_t count, rounded_at, rounded_bytes;  // two areas for x in 8 bits, used in turn
  int32_t pieces;                            // 16 bytes of vectors that a block copies first, at most
  Link links[kMostLinks];
};

/** Has this block's rows of a weight brought to its shared memory, which a barrier counts. */
__device__ inline void bring_rows(const Link& link, const WeightView& w, const int32_t (&at)[4], uint8_t* shared, uint64_t* barrier) {
  const void* const planes[4] = {w.data, w.scales, w.high, w.subs};
#pragma unroll
  for (int p = 0; p < 4; p++) {
    const int32_t bytes = link.rows * link.row_bytes[p];
    if (bytes > 0) copy_bulk(shared + at[p], static_cast<const uint8_t*>(planes[p]) + int64_t{link.first} * link.row_bytes[p], bytes, barrier);
  }
}

/** A weight as it lies in shared memory. */
__device__ inline WeightView kept_weight(const WeightView& w, const int32_t (&at)[4], uint8_t* shared) {
  return {w.dtype, w.rows, w.columns, shared + at[0], reinterpret_cast<const __half*>(shared + at[1]), shared + at[2], reinterpret_cast<const uint16_t*>(shared + at[3])};
}

/** x, times the norm's weight, into shared memory in 8 bits. The norm's scale, which changes no rounding, is left to do: meanwhile the last
 *  warp finds it. */
template <int kType>
__device__ inline void round_x(const Link& link, uint8_t* shared, int4* to, float* scale) {
  const float4 *x = reinterpret_cast<const float4*>(shared + link.x_at), *norm = reinterpret_cast<const float4*>(shared + link.norm_at);
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, fours = link.w.columns / 4;
  const bool normed = link.norm_at >= 0;
  if (warp == kWarps - 1) {
    float squares = 0.0f;
#pragma unroll 4
    for (int32_t i = lane; i < fours; i += 32) {
      const float4 v = x[i];
      squares += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
    }
    squares = warp_sum(squares);
    if (lane == 0) *scale = normed ? rsqrtf(__fdividef(squares, static_cast<float>(link.w.columns)) + link.epsilon) : 1.0f;
  }
  for (int32_t start = warp * 32; start < fours; start += kThreads) {
    const int32_t i = start + lane;
    const bool inside = i < fours;
    float4 v = inside ? x[i] : make_float4(0, 0, 0, 0);
    if (inside && normed) {
      const float4 n = norm[i];
      v = make_float4(v.x * n.x, v.y * n.y, v.z * n.z, v.w * n.w);
    }
    keep_rounded<kType>(v, i, link.w.columns, to);
  }
}

/** This block's part of a link's result; x lies in 8 bits as in matvec.cu. A warp takes 4 rows at once, 8 lanes each. */
template <int kType, bool kGated>
__device__ inline void multiply(const Link& link, uint8_t* shared, const int4* x, float scale, const uint64_t* given) {
  constexpr int kColumns = ChunkOf<kType>::kColumns, kLanes = 32 / kQuad;
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunks = link.w.columns / kColumns, turns = (chunks + kLanes - 1) / kLanes;
  const WeightView w = kept_weight(link.w, link.w_at, shared), up = kept_weight(link.up, link.up_at, shared);
  const float2* scales = reinterpret_cast<const float2*>(x + link.w.columns / 16);
  for (int32_t task = warp; task * kQuad < link.rows; task += kWarps) {
    const int32_t row = task * kQuad + lane / kLanes;
    float value = 0.0f, other = 0.0f;
#pragma unroll (kGated ? 1 : 3)
    for (int32_t turn = 0; turn < turns; turn++) {  // the same in all lanes
      const int32_t at = turn * kLanes + lane % kLanes, here = min(at, chunks - 1);
      const int4 low = x[here], high = kType == WKV_Q8_0 ? make_int4(0, 0, 0, 0) : x[chunks + here];
      float2 of = scales[here * kColumns / 32];
      if (at >= chunks) of = make_float2(0.0f, 0.0f);
      ChunkOf<kType> chunk;
      chunk.template load<From::Shared>(w, row * chunks + here);
      value += chunk.product(low, high, of);
      if (!kGated) continue;
      chunk.template load<From::Shared>(up, row * chunks + here);
      other += chunk.product(low, high, of);
    }
#pragma unroll
    for (int o = kLanes / 2; o > 0; o >>= 1) {
      value += __shfl_xor_sync(0xffffffffu, value, o);
      if (kGated) other += __shfl_xor_sync(0xffffffffu, other, o);
    }
    value *= scale;
    if (kGated) value = activate(link.activation, value, other * scale);
    if (link.bias) value += reinterpret_cast<const float*>(shared + link.bias_at)[row];
    if (link.add) value += reinterpret_cast<const float*>(shared + link.old_at)[link.reads_old ? row : link.first + row];
    float4 four;
    four.x = __shfl_sync(0xffffffffu, value, 0), four.y = __shfl_sync(0xffffffffu, value, kLanes);
    four.z = __shfl_sync(0xffffffffu, value, 2 * kLanes), four.w = __shfl_sync(0xffffffffu, value, 3 * kLanes);
    const int32_t at = link.first / kQuad + task;
    if (link.out_at >= 0 && lane < kBlocks) push(reinterpret_cast<const float4*>(shared + link.out_at) + at, four, given, lane);
    if (lane == kBlocks) reinterpret_cast<float4*>(link.out)[at] = four;
  }
}

template <int kType>
__global__ void __launch_bounds__(kThreads, 1) cluster_kernel(const __grid_constant__ ChainView chain) {
  extern __shared__ int4 shared16[];
  __shared__ uint64_t brought[kMostLinks], given[kMostLinks];  // barriers: a link's weights are here; its result is, from all blocks
  uint8_t* shared = reinterpret_cast<uint8_t*>(shared16);
  const int32_t tid = threadIdx.x, warp = tid / 32;
  __shared__ float scales[2];  // of the norms, in turn
  __shared__ Link links[kMostLinks];
  // Read once from here, each link's numbers would be waited for where they are needed.
  for (int32_t k = tid; k < chain.count * static_cast<int32_t>(sizeof(Link) / 8); k += kThreads) reinterpret_cast<uint64_t*>(links)[k] = reinterpret_cast<const uint64_t*>(chain.links)[k];

  if (tid == 0) {
    for (int32_t i = 0; i < chain.count; i++) open_barrier(&brought[i]), open_barrier(&given[i]);
  }
  __syncthreads();
  if (tid < chain.count) {
    Link& link = links[tid];
    link.first = min(link.w.rows, static_cast<int32_t>(blockIdx.x) * link.own), link.rows = min(link.w.rows - link.first, link.own);
  }
  __syncthreads();
  say_begun();
  if (tid == 0) {
    for (int32_t i = 0; i < chain.count; i++) {
      const Link& link = links[i];
      expect(&brought[i], link.rows * (link.row_bytes[0] + link.row_bytes[1] + link.row_bytes[2] + link.row_bytes[3]) * (link.up.data ? 2 : 1));
      if (link.out_at >= 0) expect(&given[i], link.w.rows * 4);
      bring_rows(link, link.w, link.w_at, shared, &brought[i]);
      if (link.up.data) bring_rows(link, link.up, link.up_at, shared, &brought[i]);
    }
  }
  for (int32_t i = 0; i < chain.count; i++) {  // into the second-level cache
    const Link& link = links[i];
    if (link.norm && tid * 32 < link.w.columns) asm volatile("prefetch.global.L2 [%0];" ::"l"(link.norm + tid * 32) : "memory");
    if (link.bias && tid * 32 < link.rows) asm volatile("prefetch.global.L2 [%0];" ::"l"(link.bias + link.first + tid * 32) : "memory");
  }
  // Vectors that earlier kernels may have written: which 16 bytes a thread copies is known before they are.
  const float* from = nullptr;
  float4* to = nullptr;
  const auto find = [&](int32_t piece) {
    for (int32_t i = 0; i < chain.count; i++) {
      const Link& link = links[i];
      const auto within = [&](bool there, int32_t at, const float* begin, int32_t count) {
        if (!there) return false;
        if (piece < count / 4) from = begin + piece * 4, to = reinterpret_cast<float4*>(shared + at) + piece;
        return (piece -= count / 4) < 0;
      };
      if (within(link.reads_x, link.x_at, link.x, link.w.columns) || within(link.norm_at >= 0, link.norm_at, link.norm, link.w.columns)) return true;
      if (within(link.bias_at >= 0, link.bias_at, link.bias + link.first, link.rows) || within(link.reads_old, link.old_at, link.out + link.first, link.rows)) return true;
    }
    return false;
  };
  bool there = find(tid);

  wait_for_previous();
  let_next_start();
  for (int32_t piece = tid; there;) {
    copy_async<16>(to, from);
    piece += kThreads;
    there = piece < chain.pieces && find(piece);
  }
  end_copies();
  wait_copies<0>();
  __syncthreads();
  await_begun();

#pragma unroll 1
  for (int32_t i = 0; i < chain.count; i++) {
    const Link& link = links[i];
    int4* rounded = reinterpret_cast<int4*>(shared + chain.rounded_at + i % 2 * chain.rounded_bytes);
    const bool rounds = warp * 128 < link.w.columns || warp == kWarps - 1, multiplies = warp * kQuad < link.rows;
    if (rounds) {
      for (uint32_t left = link.after; left; left &= left - 1) await(&given[__ffs(left) - 1]);
      round_x<kType>(link, shared, rounded, &scales[i % 2]);
    }
    if (multiplies) await(&brought[i]);
    __syncthreads();
    if (!multiplies) continue;
    if (link.up.data) multiply<kType, true>(link, shared, rounded, scales[i % 2], &given[i]);
    else multiply<kType, false>(link, shared, rounded, scales[i % 2], &given[i]);
  }
}

bool suits(const WeightView& w) { return w.rows % kQuad == 0 && w.columns % 64 == 0; }

/** Where everything lies in shared memory. */
class Layout {
 public:
  /** Takes the next product in; false where it does not suit a cluster. */
  bool add(const Context& ctx, const Product& product);
  const ChainView& view() const { return view_; }
  size_t bytes() const { return size_t(view_.rounded_at) + 2 * size_t(view_.rounded_bytes); }

 private:
  ChainView view_{};
  int32_t used_ = 0, widest_ = 0;  // bytes of shared memory; columns of the widest x
  uint32_t awaited_ = 0;           // links whose results a link waits for
};

bool Layout::add(const Context& ctx, const Product& product) {
  const InputView& in = product.in;
  const WeightView &w = product.w, &up = product.up;
  const OutputView& to = product.to;
  if (!suits(w) || reinterpret_cast<uintptr_t>(to.out) % 16 != 0) return false;
  const Span reads(in.x, in.columns), writes(to.out, w.rows);
  Link link{};
  link.w = w, link.up = up, link.x = in.x, link.norm = in.norm, link.bias = to.bias, link.out = to.out;
  link.epsilon = in.epsilon, link.add = to.add, link.activation = to.activation;
  link.out_at = link.norm_at = link.bias_at = link.old_at = -1;

  int32_t gives_x = -1, gives_old = -1;
  for (int32_t i = 0; i < view_.count; i++) {
    const Link& before = view_.links[i];
    const Span gave(before.out, before.w.rows);
    // Another block may not have read it yet.
    if (before.reads_x && writes.meets(Span(before.x, before.w.columns))) return false;
    if ((before.norm && writes.meets(Span(before.norm, before.w.columns))) || (before.bias && writes.meets(Span(before.bias, before.w.rows)))) return false;
    if ((in.norm && gave.meets(Span(in.norm, in.columns))) || (to.bias && gave.meets(Span(to.bias, w.rows)))) return false;
    if (gave.meets(reads)) {
      if (!(gave == reads)) return false;
      gives_x = i;
    }
    if (gave.meets(writes)) {
      if (!(gave == writes) || !to.add) return false;
      gives_old = i;
    }
  }

  int64_t used = used_;
  const auto room = [&](int64_t bytes) {
    const int64_t at = used;
    used += static_cast<int64_t>(round_up(size_t(bytes), 128));
    return static_cast<int32_t>(at);
  };
  link.own = divide_up(w.rows, kQuad * kBlocks) * kQuad;
  int32_t outs[2] = {gives_x, gives_old}, at[2] = {-1, -1};
  for (int k = 0; k < 2; k++) {
    if (outs[k] < 0) continue;
    const Link& before = view_.links[outs[k]];
    at[k] = before.out_at >= 0 ? before.out_at : k == 1 && outs[0] == outs[1] ? at[0] : room(before.w.rows * 4);
    link.after |= 1u << outs[k] & ~awaited_;
  }
  link.reads_x = gives_x < 0, link.x_at = gives_x < 0 ? room(in.columns * 4) : at[0];
  link.reads_old = to.add && gives_old < 0;
  if (to.add) link.old_at = gives_old < 0 ? room(link.own * 4) : at[1];
  if (in.norm) link.norm_at = room(in.columns * 4);
  if (to.bias) link.bias_at = room(link.own * 4);
  for (int p = 0; p < 4; p++) {
    const Plane plane = plane_of(w.dtype, p);
    link.row_bytes[p] = w.columns / plane.columns * plane.bytes, link.w_at[p] = room(int64_t{link.own} * link.row_bytes[p]);
    if (up.data) link.up_at[p] = room(int64_t{link.own} * link.row_bytes[p]);
  }
  const int32_t widest = std::max(widest_, in.columns), rounded = static_cast<int32_t>(round_up(size_t(widest) + widest / 4, 128));
  if (used + 2 * rounded + kOwnShared > ctx.shared_limit) return false;

  for (int k = 0; k < 2; k++) {
    if (outs[k] >= 0) view_.links[outs[k]].out_at = at[k], awaited_ |= 1u << outs[k];
  }
  view_.links[view_.count++] = link;
  view_.rounded_at = used_ = static_cast<int32_t>(used), view_.rounded_bytes = rounded, widest_ = widest;
  view_.pieces += ((link.reads_x ? in.columns : 0) + (in.norm ? in.columns : 0) + (to.bias ? link.own : 0) + (link.reads_old ? link.own : 0)) / 4;
  return true;
}

}  // namespace

size_t chain_cluster(Context& ctx, const Product* first, size_t count) {
  Layout layout;
  size_t taken = 0;
  while (taken < count && layout.add(ctx, first[taken])) taken++;
  if (taken < 2) return 0;
  const int32_t dtype = first->w.dtype;
  const auto together = [&](auto type) {
    if constexpr (is_quantised(type.value)) {
      const Shape shape{kBlocks, kThreads, layout.bytes(), kBlocks};
      const auto kernel = cluster_kernel<type.value>;
      allow_shared(kernel, shape.shared);
      if (clusters_at_once(kernel, shape) == 0) return false;
      launch(ctx, kernel, shape, layout.view());
      return true;
    } else {
      return false;
    }
  };
  return (wkv_has_pieces(dtype) ? by_pieces(dtype, together) : by_type(dtype, together)) ? taken : 0;
}

}  // namespace wkv
`,
  "cuda/chain_grid.cu": `/**
 * chain_grid.cu: a chain of products (chain.cu) of weights that no shared memory holds, in one launch of a block a multiprocessor.
 *
 * A unit is 4 to 64 rows of a weight, or half as many of gate and of up. One warp of a block brings units to a ring in shared memory by bulk
 * copies; 16 others share their columns, and where rows are short the rows. Weights depend on nothing, so they keep coming while blocks wait
 * for each other's results, and the first ones are asked for before the kernel in front has ended. Blocks read neighbouring units at a time,
 * as memory likes it. They get unlike shares of its bandwidth, so they claim units one by one; but where results are added to what is there
 * a block's units are fixed, and what they are added to is asked for first: behind so many copies it comes late.
 *
 * Results go through global memory. Where a product waits for one before, blocks tell that they have ended it by adding to a counter; its
 * highest bit turns over when all have, so that it needs no clearing. Every block then stages x whole: floats, or 8 bits in blocks of 32 as
 * matvec.cu has them; the norm's scale multiplies finished sums. A unit's sums are the same in whichever block, in a fixed order.
 *
 * Blocks wait for each other, so all of them must be on the device at once: graphs take turns (Context::start).
 *
 * Bytes moved: the weights, once. The 436 MB of a layer of Llama 3 8B in bf16 take 108 us on an H200 when such launches follow each other, 87%
 * of what it reads. 122 us: pairs of rows that a warp takes alone, as each of 2,112 warps then reads elsewhere; 226: each piece of a unit
 * counted, and its unit found in a list; 111: no claims, and what results are added to asked for at the end. A cooperative launch, whose
 * blocks begin together, takes 2 us longer behind attention.
 */
#include <algorithm>

#include "chain.cuh"
#include "chunk.cuh"
#include "cluster.cuh"

namespace wkv {
namespace {

constexpr int kWorkers = 512, kWarps = kWorkers / 32, kThreads = kWorkers + 32;
constexpr int kQuad = 4;                                // rows that a warp takes at once
constexpr int32_t kMostStages = 16, kOwnShared = 4096;  // of a ring; bytes that the kernel declares itself, at most
constexpr int32_t kMostHeld = 16;                       // units whose sums wait, at most
constexpr int kClaims = 3;                              // claims of a block under way

/** One product, as the kernel sees it. */
struct Link {
  WeightView w, up;  // w . x, or gated with up where up has data
  const float *x, *norm, *bias;
  float* out;
  float epsilon;
  int32_t add, activation, after;
  int32_t counts;  // whether a later one waits for it
  int32_t ways, unit_rows, own, units, pieces;  // warps that share a row; rows of a unit, and results; pieces of a row
  int32_t held;                                 // units whose results are finished together, one a thread
  int32_t row_bytes[4], piece_bytes[4], place[4];  // by plane: of a row, of a piece of it; where pieces begin in a stage
};

struct GridView {
  int32_t count, stages, stage_bytes, sums_at, ring_at;  // places in shared memory, behind x
  uint32_t *ended, *claimed;                             // one a link
  Link links[kMostLinks];
};

/** What a stage of the ring holds. */
struct Held {
  int16_t link, last;  // last: of the unit's pieces
  int32_t unit, piece;
};

__device__ inline const uint8_t* plane_begin(const WeightView& w, int p) {
  return p == 0 ? w.data : p == 1 ? reinterpret_cast<const uint8_t*>(w.scales) : p == 2 ? w.high : reinterpret_cast<const uint8_t*>(w.subs);
}

/** Whether all blocks have ended a link. */
__device__ inline bool all_ended(const uint32_t* counter, uint32_t before) {
  uint32_t now;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  return ((now ^ before) & 0x80000000u) != 0;
}

/** x, times the norm's weight, into shared memory, and each warp's sum of squares. */
template <int kType>
__device__ inline void stage_x(const Link& link, int4* shared, float* area) {
  constexpr bool kInt8 = is_quantised(kType);
  constexpr int kFours = ChunkOf<kType>::kFours, kAtOnce = 4;
  const int32_t fours = link.w.columns / 4, plane = Staged<kType, kInt8>::plane(link.w.columns), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float4 *x = reinterpret_cast<const float4*>(link.x), *norm = reinterpret_cast<const float4*>(link.norm);
  float squares = 0.0f;
  for (int32_t start = warp * 32; start < fours; start += kWorkers * kAtOnce) {
    float4 v[kAtOnce], n[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) {
      const int32_t i = start + k * kWorkers + lane;
      v[k] = i < fours ? __ldcg(x + i) : make_float4(0, 0, 0, 0);  // not from the first-level cache, which may hold what x was
      n[k] = i < fours && norm ? __ldg(norm + i) : make_float4(1, 1, 1, 1);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) {
      if (start + k * kWorkers >= fours) break;
      const int32_t i = start + k * kWorkers + lane;
      squares += v[k].x * v[k].x + v[k].y * v[k].y + (v[k].z * v[k].z + v[k].w * v[k].w);
      v[k] = make_float4(v[k].x * n[k].x, v[k].y * n[k].y, v[k].z * n[k].z, v[k].w * n[k].w);
      if constexpr (kInt8) keep_rounded<kType>(v[k], i, link.w.columns, shared);
      else if (i < fours) reinterpret_cast<float4*>(shared)[i % kFours * plane + i / kFours] = v[k];
    }
  }
  squares = warp_sum(squares);
  if (lane == 0) area[warp] = squares;
}

/** A block's n-th unit of link l where units are fixed; the first is in any case. Blocks that get one more are others for each link. */
__device__ inline int32_t nth_unit(int32_t l, int32_t n) { return (blockIdx.x + l * (gridDim.x / 4 + 1)) % gridDim.x + n * gridDim.x; }

/** Brings units to the ring; one warp. Lane 4 r + p asks for plane p, of row r where rows come in pieces, or else of all rows of w (0) or up (1). */
template <int kType>
__device__ inline void bring_units(const GridView& chain, const Link* links, uint8_t* ring, uint64_t* brought, uint64_t* free, Held* held) {
  const int32_t lane = threadIdx.x % 32, plane = lane % 4, span = lane / 4;
  int32_t stage = 0;
  uint32_t parity = 1;
  const auto next = [&] {
    if (++stage == chain.stages) stage = 0, parity ^= 1;
  };
#pragma unroll 1
  for (int32_t l = 0; l < chain.count; l++) {
    const Link& link = links[l];
    const bool gated = link.up.data != nullptr, pieces = link.pieces > 1;
    const int32_t own = link.own, rows = pieces ? 1 : own;  // of a span
    const int32_t spans = pieces ? link.unit_rows : gated ? 2 : 1;
    const bool second = gated && (pieces ? span >= own : span == 1);
    const int32_t row_bytes = link.row_bytes[plane], piece_bytes = link.piece_bytes[plane];
    const bool asks = span < spans && row_bytes > 0;
    const uint8_t* from = plane_begin(second ? link.up : link.w, plane);
    uint8_t* to = ring + link.place[plane] + span * rows * piece_bytes;
    const int32_t within = pieces ? span - (second ? own : 0) : 0;
    int32_t unit = nth_unit(l, 0), claims[kClaims];
    const auto claim = [&] { return lane == 0 ? static_cast<int32_t>(atomicAdd(&chain.claimed[l], 1)) : 0; };
    if (!link.add) {
#pragma unroll
      for (int k = 0; k < kClaims; k++) claims[k] = claim();
    }
#pragma unroll 1
    while (unit < link.units) {
      const int32_t row = unit * own + within;
#pragma unroll 1
      for (int32_t piece = 0; piece < link.pieces; piece++) {
        int32_t bytes = 0;
        if (asks) bytes = pieces ? row < link.w.rows ? min(piece_bytes, row_bytes - piece * piece_bytes) : 0 : min(rows, link.w.rows - row) * row_bytes;
        bytes = (bytes + 15) / 16 * 16;
        const int32_t all = __reduce_add_sync(0xffffffffu, bytes);
        await(&free[stage], parity);
        if (lane == 0) held[stage] = {static_cast<int16_t>(l), static_cast<int16_t>(piece + 1 == link.pieces), unit, piece}, expect(&brought[stage], all);
        __syncwarp();
        if (bytes > 0) copy_bulk(to + stage * chain.stage_bytes, from + int64_t{row} * row_bytes + piece * piece_bytes, bytes, &brought[stage]);
        next();
      }
      unit += gridDim.x;
      if (link.add) continue;
      unit = static_cast<int32_t>(gridDim.x) + __shfl_sync(0xffffffffu, claims[0], 0);
#pragma unroll
      for (int k = 1; k < kClaims; k++) claims[k - 1] = claims[k];
      claims[kClaims - 1] = unit < link.units ? claim() : -1;
    }
    if (link.add || lane != 0) continue;
    const int32_t most = max(0, link.units - static_cast<int32_t>(gridDim.x)) + kClaims * static_cast<int32_t>(gridDim.x);
    bool last = unit - static_cast<int32_t>(gridDim.x) == most - 1;
#pragma unroll
    for (int k = 0; k < kClaims; k++) last |= claims[k] == most - 1;
    if (last) chain.claimed[l] = 0;  // nobody claims any more
  }
  await(&free[stage], parity);
  if (lane == 0) held[stage] = {static_cast<int16_t>(chain.count), 0, 0, 0}, arrive(&brought[stage]);
}

/** All warps but that one. */
__device__ inline void workers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kWorkers) : "memory"); }

/** The sums of kQuad values over all lanes: the k-th in lanes from 32 / kQuad * k on. */
__device__ inline float quad_sum(float (&v)[kQuad], int32_t lane) {
#pragma unroll
  for (int n = kQuad / 2, o = 16; n > 0; n /= 2, o /= 2) {
    const bool high = lane & o;
#pragma unroll
    for (int k = 0; k < n; k++) {
      const float mine = high ? v[k + n] : v[k], other = high ? v[k] : v[k + n];
      v[k] = mine + __shfl_xor_sync(0xffffffffu, other, o);
    }
  }
#pragma unroll
  for (int o = 16 / kQuad; o > 0; o /= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], o);
  return v[0];
}

/** Finishes the results of \`count\` units whose sums are there, [unit][row of the unit][way]: a thread one. plus: what is added. */
__device__ inline void finish_units(const Link& link, const float* sums, const int32_t* units, int32_t count, float scale, float plus) {
  const int32_t u = threadIdx.x / link.own, r = threadIdx.x % link.own, ways = link.ways;
  if (u >= count) return;
  const int32_t row = units[u] * link.own + r;
  if (row >= link.w.rows) return;
  const auto sum = [&](int32_t row_of_unit) {
    const float* from = sums + (u * link.unit_rows + row_of_unit) * ways;
    if (ways < 4) return (ways == 1 ? from[0] : from[0] + from[1]) * scale;
    float4 v[kWarps / 4];
#pragma unroll
    for (int k = 0; k < kWarps / 4; k++) v[k] = k * 4 < ways ? reinterpret_cast<const float4*>(from)[k] : make_float4(0, 0, 0, 0);
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kWarps / 4; k++) total += v[k].x + v[k].y + (v[k].z + v[k].w);
    return total * scale;
  };
  float value = sum(r);
  if (link.up.data) value = activate(link.activation, value, sum(link.own + r));
  else if (!link.add && link.bias) value += __ldg(link.bias + row);
  link.out[row] = value + plus;
}

template <int kType>
__global__ void __launch_bounds__(kThreads, 1) grid_kernel(const __grid_constant__ GridView chain) {
  constexpr bool kInt8 = is_quantised(kType);
  constexpr int kColumns = ChunkOf<kType>::kColumns, kFours = ChunkOf<kType>::kFours;
  extern __shared__ __align__(128) int4 shared16[];
  __shared__ Link links[kMostLinks];
  __shared__ uint64_t brought[kMostStages], free[kMostStages];  // barriers
  __shared__ Held held[kMostStages];
  __shared__ int32_t units[kMostHeld];
  __shared__ float squares[kWarps];
  const int32_t tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  for (int32_t k = tid; k < chain.count * static_cast<int32_t>(sizeof(Link) / 8); k += kThreads) reinterpret_cast<uint64_t*>(links)[k] = reinterpret_cast<const uint64_t*>(chain.links)[k];
  if (tid < chain.stages) open_barrier(&brought[tid]), open_barrier(&free[tid], kWarps), barriers_opened();
  __syncthreads();
  uint8_t* shared = reinterpret_cast<uint8_t*>(shared16);
  const uint8_t* ring = shared + chain.ring_at;
  float* sums = reinterpret_cast<float*>(shared + chain.sums_at);
  if (warp == kWarps) {
    let_next_start();
    return bring_units<kType>(chain, links, shared + chain.ring_at, brought, free, held);
  }
  if (tid < chain.count && links[tid].norm) {  // into the second-level cache
    for (int32_t c = blockIdx.x * 32; c < links[tid].w.columns; c += gridDim.x * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(links[tid].norm + c) : "memory");
  }

  wait_for_previous();
  let_next_start();
  uint32_t before = 0;
  if (tid < chain.count) before = *const_cast<volatile uint32_t*>(chain.ended + tid);  // no link ends without this block
  int32_t stage = 0, over = -1;
  uint32_t parity = 0;
#pragma unroll 1
  for (int32_t l = 0; l < chain.count; l++) {
    const Link& link = links[l];
    if (link.after > over) {
      if (tid == link.after) {
        while (!all_ended(&chain.ended[tid], before)) {}
      }
      over = link.after;
    }
    workers_sync();  // x's room is free, too
    float plus = 0.0f;  // what this thread's result is added to
    const auto find_plus = [&](int32_t n) {
      const int32_t row = nth_unit(l, n + tid / link.own) * link.own + tid % link.own;
      if (!link.add || tid >= link.held * link.own || row >= link.w.rows) return;
      plus = __ldcg(link.out + row);
      if (link.bias) plus += __ldg(link.bias + row);
    };
    find_plus(0);
    stage_x<kType>(link, shared16, squares);
    workers_sync();
    float scale = 1.0f;
    if (link.norm) {
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < kWarps; k++) sum += squares[k];
      scale = rsqrtf(__fdividef(sum, static_cast<float>(link.w.columns)) + link.epsilon);
    }
    const int32_t chunks = link.w.columns / kColumns, plane = Staged<kType, kInt8>::plane(link.w.columns);
    const bool gated = link.up.data != nullptr;
    const int32_t way = warp % link.ways, group = warp / link.ways, i = way * 32 + lane, piece_chunks = link.ways * 32;
    const float2* scales = reinterpret_cast<const float2*>(shared16 + link.w.columns / 16);
    // Where the warp's rows begin in a stage, by plane.
    const auto row_of = [&](int k) { return gated ? (k / (kQuad / 2) * link.unit_rows + group * kQuad) / 2 + k % (kQuad / 2) : group * kQuad + k; };
    uint32_t begins[kQuad][4];
#pragma unroll
    for (int k = 0; k < kQuad; k++) {
#pragma unroll
      for (int p = 0; p < 4; p++) begins[k][p] = link.place[p] + row_of(k) * link.piece_bytes[p];
    }
    const int32_t sum_at = row_of(lane / (32 / kQuad)) * link.ways + way, unit_sums = link.unit_rows * link.ways;
    float total[kQuad] = {};
    int32_t count = 0, finished = 0;
#pragma unroll 1
    while (true) {
      await(&brought[stage], parity);
      const Held here = held[stage];
      if (here.link != l) break;
      const int32_t at = here.piece * piece_chunks + i;
      if (at < chunks) {
        const uint8_t* from = ring + stage * chain.stage_bytes;
        ChunkOf<kType> chunk[kQuad];
#pragma unroll
        for (int k = 0; k < kQuad; k++) {
          const WeightView w{kType, 1, 0, from + begins[k][0], reinterpret_cast<const __half*>(from + begins[k][1]), from + begins[k][2], reinterpret_cast<const uint16_t*>(from + begins[k][3])};
          chunk[k].template load<From::Shared>(w, i);
        }
        if constexpr (kInt8) {
          const float2 of = scales[at * kColumns / 32];
          const int4 low = shared16[at], high = kType == WKV_Q8_0 ? make_int4(0, 0, 0, 0) : shared16[chunks + at];
#pragma unroll
          for (int k = 0; k < kQuad; k++) total[k] += chunk[k].product(low, high, of);
        } else {
#pragma unroll
          for (int p = 0; p < kFours; p++) {
            const float4 y = reinterpret_cast<const float4*>(shared16)[p * plane + at];
#pragma unroll
            for (int k = 0; k < kQuad; k++) {
              const float4 u = chunk[k].four(p);
              total[k] = fmaf(u.x, y.x, fmaf(u.y, y.y, fmaf(u.z, y.z, fmaf(u.w, y.w, total[k]))));
            }
          }
        }
      }
      __syncwarp();
      if (lane == 0) arrive(&free[stage]);
      if (++stage == chain.stages) stage = 0, parity ^= 1;
      if (!here.last) continue;
      const float sum = quad_sum(total, lane);
      if (lane % (32 / kQuad) == 0) sums[count * unit_sums + sum_at] = sum;
      if (tid == 0) units[count] = here.unit;
#pragma unroll
      for (int k = 0; k < kQuad; k++) total[k] = 0.0f;
      if (++count < link.held) continue;
      workers_sync();
      finish_units(link, sums, units, count, scale, plus);
      finished += count, count = 0;
      find_plus(finished);
      workers_sync();
    }
    workers_sync();
    finish_units(link, sums, units, count, scale, plus);
    if (!link.counts) continue;
    workers_sync();
    if (tid == 0) {
      const uint32_t one = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
      asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(&chain.ended[l]), "r"(one) : "memory");
    }
  }
}

/** Fills in how rows are shared out and where things lie; false where there is no room, or copies would not be of whole 16 bytes. */
template <int kType>
bool lay_out(GridView& chain, int32_t shared_limit, size_t* shared) {
  constexpr int kColumns = ChunkOf<kType>::kColumns;
  int32_t widest = 0;
  chain.stage_bytes = 0;
  for (int32_t i = 0; i < chain.count; i++) {
    Link& link = chain.links[i];
    const int32_t columns = link.w.columns, chunks = columns / kColumns;
    widest = std::max(widest, columns);
    for (link.ways = 1; link.ways < kWarps && link.ways * 32 < chunks;) link.ways *= 2;
    link.unit_rows = kQuad * kWarps / link.ways, link.pieces = divide_up(chunks, link.ways * 32);
    const int32_t piece_columns = link.pieces > 1 ? link.ways * 32 * kColumns : columns, own = link.up.data ? link.unit_rows / 2 : link.unit_rows;
    link.own = own, link.units = divide_up(link.w.rows, own), link.held = std::min(kMostHeld, kWorkers / own);
    int32_t at = 0;
    for (int p = 0; p < 4; p++) {
      const Plane plane = plane_of(kType, p);
      if (columns % plane.columns != 0) return false;
      link.row_bytes[p] = columns / plane.columns * plane.bytes, link.piece_bytes[p] = piece_columns / plane.columns * plane.bytes, link.place[p] = at;
      if (link.row_bytes[p] * (link.pieces > 1 ? 1 : own) % 16 != 0) return false;
      at += static_cast<int32_t>(round_up(size_t(link.piece_bytes[p]) * link.unit_rows, 128));
    }
    chain.stage_bytes = std::max(chain.stage_bytes, at);
  }
  const size_t x = round_up(size_t(Staged<kType, is_quantised(kType)>::row(widest)) * 16, 128), limit = size_t(shared_limit) - kOwnShared;
  chain.sums_at = static_cast<int32_t>(x), chain.ring_at = static_cast<int32_t>(x + size_t(kMostHeld) * kQuad * kWarps * 4);
  if (size_t(chain.ring_at) + 2 * size_t(chain.stage_bytes) > limit) return false;
  chain.stages = std::min(kMostStages, static_cast<int32_t>((limit - chain.ring_at) / chain.stage_bytes));
  *shared = size_t(chain.ring_at) + size_t(chain.stages) * chain.stage_bytes;
  return true;
}

}  // namespace

bool chain_grid(Context& ctx, const std::vector<Product>& products) {
  if (ctx.shared_device) return false;
  GridView chain{};
  int64_t bytes = 0;
  chain.count = static_cast<int32_t>(products.size());
  for (int32_t i = 0; i < chain.count; i++) {
    const Product& from = products[i];
    Link& link = chain.links[i];
    link.w = from.w, link.up = from.up, link.x = from.in.x, link.norm = from.in.norm, link.bias = from.to.bias, link.out = from.to.out;
    link.epsilon = from.in.epsilon, link.add = from.to.add, link.activation = from.to.activation, link.after = from.after;
    if (from.after >= 0) chain.links[from.after].counts = 1;
    bytes += int64_t{from.w.rows} * wkv_row_bytes(from.w.dtype, from.w.columns) * (from.up.data ? 2 : 1);
  }
  if (bytes < ctx.least_grid) return false;
  const auto together = [&](auto type) {
    if constexpr (type.value != WKV_F32) {
      size_t shared;
      if (!lay_out<type.value>(chain, ctx.shared_limit, &shared)) return false;
      const auto counters = std::make_shared<DeviceMemory>(2 * kMostLinks * sizeof(uint32_t));
      ctx.zero(counters->as<void>(), counters->bytes());
      ctx.hold(counters);
      chain.ended = counters->as<uint32_t>(), chain.claimed = chain.ended + kMostLinks;
      launch(ctx, grid_kernel<type.value>, {dim3(ctx.processors), dim3(kThreads), shared}, chain);
      ctx.recording->takes_device = true;
      return true;
    } else {
      return false;
    }
  };
  const int32_t dtype = products[0].w.dtype;
  return wkv_has_pieces(dtype) ? by_pieces(dtype, together) : by_type(dtype, together);
}

}  // namespace wkv
`,
  "cuda/chunk.cuh": `/** chunk.cuh: a few columns of a weight's row in a lane's registers, and their products with x; used by matvec.cu and the chains. */
#pragma once
#include "linear.cuh"

namespace wkv {

/** Where a chunk is read: in global memory, once, or in shared memory. */
enum class From { Global, Shared };

template <From kFrom>
__device__ inline int4 load16(const void* from) {
  if constexpr (kFrom == From::Shared) return *static_cast<const int4*>(from);
  int4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}
template <From kFrom>
__device__ inline int2 load8(const void* from) {
  if constexpr (kFrom == From::Shared) return *static_cast<const int2*>(from);
  int2 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.s32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}
template <From kFrom>
__device__ inline uint32_t load4(const void* from) {
  if constexpr (kFrom == From::Shared) return *static_cast<const uint32_t*>(from);
  uint32_t v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}
template <From kFrom>
__device__ inline uint32_t load2(const void* from) {
  if constexpr (kFrom == From::Shared) return *static_cast<const uint16_t*>(from);
  uint16_t v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(from));
  return v;
}

__device__ inline float low_half(uint32_t v) { return __half2float(__ushort_as_half(static_cast<uint16_t>(v))); }
__device__ inline float high_half(uint32_t v) { return __half2float(__ushort_as_half(static_cast<uint16_t>(v >> 16))); }

__host__ __device__ constexpr int chunk_columns(int dtype) { return dtype == WKV_F32 ? 4 : dtype == WKV_Q8_0 ? 16 : dtype > WKV_Q8_0 ? 32 : 8; }

/** 16 bytes of a weight's row; chunk i of the whole tensor. */
template <int kType>
struct Chunk {
  static constexpr int kColumns = chunk_columns(kType), kFours = kColumns / 4;
  int4 data;
  uint32_t scales;  // one f16, or scale and minimum

  template <From kFrom = From::Global>
  __device__ void load(const WeightView& w, uint32_t i) {
    data = load16<kFrom>(w.data + size_t{i} * 16);
    if (kType == WKV_Q8_0) scales = load2<kFrom>(w.scales + i / 2);
    if (kType == WKV_Q4_0) scales = load2<kFrom>(w.scales + i);
    if (kType == WKV_Q4_1) scales = load4<kFrom>(w.scales + size_t{i} * 2);
  }
  __device__ uint32_t word(int i) const { return static_cast<uint32_t>(i == 0 ? data.x : i == 1 ? data.y : i == 2 ? data.z : data.w); }

  /** Columns 4 p to 4 p + 3. */
  __device__ float4 four(int p) const {
    if (kType == WKV_F32) return make_float4(__int_as_float(data.x), __int_as_float(data.y), __int_as_float(data.z), __int_as_float(data.w));
    if (kType == WKV_F16) {
      const uint32_t a = word(2 * p), b = word(2 * p + 1);
      return make_float4(low_half(a), high_half(a), low_half(b), high_half(b));
    }
    if (kType == WKV_BF16) {
      const uint32_t a = word(2 * p), b = word(2 * p + 1);
      return make_float4(__uint_as_float(a << 16), __uint_as_float(a & 0xffff0000u), __uint_as_float(b << 16), __uint_as_float(b & 0xffff0000u));
    }
    const float s = low_half(scales), m = kType == WKV_Q4_1 ? high_half(scales) : 0.0f;
    if (kType == WKV_Q8_0) {
      const int32_t a = static_cast<int32_t>(word(p));
      return make_float4((a << 24 >> 24) * s, (a << 16 >> 24) * s, (a << 8 >> 24) * s, (a >> 24) * s);
    }
    const int32_t a = static_cast<int32_t>(word(p % 4) >> (p / 4 * 4)), middle = kType == WKV_Q4_0 ? 8 : 0;
    const auto wide = [&](int shift) { return fmaf(static_cast<float>((a >> shift & 15) - middle), s, m); };
    return make_float4(wide(0), wide(8), wide(16), wide(24));
  }

  /** The product with the same columns of x in 8 bits: \`low\` as the words of data, Q4's high halves in \`high\`; of: scale and sum. */
  __device__ float product(int4 low, int4 high, float2 of) const {
    constexpr uint32_t kMask = kType == WKV_Q8_0 ? 0xffffffffu : 0x0f0f0f0fu;
    int32_t dot = __dp4a(static_cast<int32_t>(data.x & kMask), low.x, 0);
    dot = __dp4a(static_cast<int32_t>(data.y & kMask), low.y, dot);
    dot = __dp4a(static_cast<int32_t>(data.z & kMask), low.z, dot);
    dot = __dp4a(static_cast<int32_t>(data.w & kMask), low.w, dot);
    if (kType != WKV_Q8_0) {
      dot = __dp4a(static_cast<int32_t>(data.x >> 4 & kMask), high.x, dot);
      dot = __dp4a(static_cast<int32_t>(data.y >> 4 & kMask), high.y, dot);
      dot = __dp4a(static_cast<int32_t>(data.z >> 4 & kMask), high.z, dot);
      dot = __dp4a(static_cast<int32_t>(data.w >> 4 & kMask), high.w, dot);
    }
    const float scale = low_half(scales);
    float value = static_cast<float>(dot) * (scale * of.x);
    if (kType == WKV_Q4_1) value = fmaf(high_half(scales), of.y, value);
    if (kType == WKV_Q4_0) value = fmaf(scale, -8.0f * of.y, value);
    return value;
  }
};

/** 32 columns of a type of quants.h; chunk i of the whole tensor. */
template <int kType>
struct PieceChunk {
  static constexpr wkv_form kForm = wkv_form_of(kType);
  static constexpr int kColumns = 32, kFours = 8;
  int4 data;         // with 2 low bits, its first half
  int2 high;
  uint32_t scales, subs;

  template <From kFrom = From::Global>
  __device__ void load(const WeightView& w, uint32_t i) {
    if (kForm.low == 4) {
      data = load16<kFrom>(w.data + size_t{i} * 16);
    } else {
      const int2 both = load8<kFrom>(w.data + size_t{i} * 8);
      data.x = both.x, data.y = both.y;
    }
    if (kForm.high == 1) high.x = static_cast<int32_t>(load4<kFrom>(w.high + size_t{i} * 4));
    if (kForm.high == 2) high = load8<kFrom>(w.high + size_t{i} * 8);
    if (kForm.subs) subs = load2<kFrom>(w.subs + i), scales = load4<kFrom>(w.scales + size_t{i / 8} * 2);
    else scales = kForm.least ? load4<kFrom>(w.scales + size_t{i} * 2) : load2<kFrom>(w.scales + i);
  }

  /** Columns 16 half + 4 v to + 3 as int8. */
  __device__ int32_t word(int half, int v) const {
    const auto pick = [&](int i) { return static_cast<uint32_t>(i == 0 ? data.x : i == 1 ? data.y : i == 2 ? data.z : data.w); };
    uint32_t q = kForm.low == 4 ? pick(v) >> (half * 4) & 0x0f0f0f0fu : pick(half) >> (v * 2) & 0x03030303u;
    if (kForm.high == 1) q |= (static_cast<uint32_t>(high.x) >> (half * 4 + v) & 0x01010101u) << kForm.low;
    if (kForm.high == 2) q |= (static_cast<uint32_t>(half ? high.y : high.x) >> (v * 2) & 0x03030303u) << kForm.low;
    if (kType == WKV_IQ4_NL) return static_cast<int32_t>(iq4_values(q));
    return static_cast<int32_t>(kForm.middle ? __vsub4(q, kForm.middle * 0x01010101u) : q);
  }

  /** The product with the same columns of x in 8 bits, columns 0 to 15 in \`low\`; of: scale and sum. */
  __device__ float product(int4 low, int4 high_x, float2 of) const {
    const auto dot = [&](int half, int4 x) {
      return __dp4a(word(half, 3), x.w, __dp4a(word(half, 2), x.z, __dp4a(word(half, 1), x.y, __dp4a(word(half, 0), x.x, 0))));
    };
    const float first = static_cast<float>(dot(0, low)), second = static_cast<float>(dot(1, high_x)), d = low_half(scales), least = high_half(scales);
    const int32_t sub0 = static_cast<int32_t>(subs & 255), sub1 = static_cast<int32_t>(subs >> 8);
    if (!kForm.subs) {
      const float value = (first + second) * (d * of.x);
      return kForm.least ? fmaf(least, of.y, value) : value;
    }
    if (kType == WKV_Q2_K) {
      constexpr int32_t kOnes = 0x01010101;
      const float sum = static_cast<float>(__dp4a(kOnes, low.w, __dp4a(kOnes, low.z, __dp4a(kOnes, low.y, __dp4a(kOnes, low.x, 0))))) * of.x;
      const float value = (first * static_cast<float>(sub0 & 15) + second * static_cast<float>(sub1 & 15)) * (d * of.x);
      return value - least * (static_cast<float>(sub0 >> 4) * sum + static_cast<float>(sub1 >> 4) * (of.y - sum));
    }
    if (kForm.least) return (first + second) * (d * static_cast<float>(sub0) * of.x) - least * static_cast<float>(sub1) * of.y;
    return (first * static_cast<float>(static_cast<int8_t>(sub0)) + second * static_cast<float>(static_cast<int8_t>(sub1))) * (d * of.x);
  }
};

/** Rounds four columns of x, number i of its fours, to 8 bits and leaves them as product() takes them: Q8_0 in order, others the low halves of
 *  all blocks of 32, then the high halves; behind them scale and sum of every block. All lanes take part, of neighbouring fours. */
template <int kType>
__device__ inline void keep_rounded(float4 v, int32_t i, int32_t columns, int4* to) {
  float2 of;
  const int32_t word = round_four(v, &of.x, &of.y);
  if (i >= columns / 4) return;
  reinterpret_cast<int32_t*>(to)[kType == WKV_Q8_0 ? i : (i / 4 % 2 * (columns / 32) + i / 8) * 4 + i % 4] = word;
  if (i % 8 == 0) reinterpret_cast<float2*>(to + columns / 16)[i / 8] = of;
}

template <int kType>
using ChunkOf = std::conditional_t<wkv_has_pieces(kType), PieceChunk<kType>, Chunk<kType>>;

/** Rows of x in shared memory, so laid out that neighbouring lanes read neighbouring 16 bytes.
 *  Floats: the p-th four columns of every chunk lie together. 8 bits: as keep_rounded leaves them. */
template <int kType, bool kInt8>
struct Staged {
  static constexpr int kFours = ChunkOf<kType>::kFours;
  /** In units of 16 bytes: from one four to the next, of a row; the former keeps writes free of conflicts. */
  static __host__ __device__ int32_t plane(int32_t columns) { return kFours == 1 ? 0 : (columns / chunk_columns(kType) + 7) / 8 * 8 + 8 / kFours; }
  static __host__ __device__ int32_t row(int32_t columns) {
    if (kInt8) return columns / 16 + columns / 64 + (columns / 32 % 2);
    return kFours == 1 ? columns / 4 : plane(columns) * kFours;
  }
};

}  // namespace wkv
`,
  "cuda/cluster.cuh": `/** cluster.cuh: barriers in shared memory that count bytes (sm_90): of bulk copies from global memory, and of what the blocks of a cluster push
 *  into each other's memory. */
#pragma once
#include "common.cuh"

namespace wkv {

__device__ inline uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

/** Writes into another block's memory, at the place of one's own \`at\`, and counts the bytes on its barrier. */
template <typename V>
__device__ inline void push(const V* at, const V& value, const uint64_t* barrier, int32_t block) {
#if __CUDA_ARCH__ >= 900
  uint32_t to, counts;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(at)), "r"(block));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counts) : "r"(shared_address(barrier)), "r"(block));
  const auto* words = reinterpret_cast<const uint32_t*>(&value);
  if constexpr (sizeof(V) == 8) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to), "r"(words[0]), "r"(words[1]), "r"(counts) : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(V) / 4); i += 4) {
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to + i * 4), "r"(words[i]), "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3]), "r"(counts) : "memory");
    }
  }
#endif
}

/** Makes a barrier that so many arrivals and the bytes they announce complete. */
__device__ inline void open_barrier(uint64_t* barrier, uint32_t arrivals = 1) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}
/** Lets copies see barriers that this thread opened. */
__device__ inline void barriers_opened() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ inline void arrive(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}
__device__ inline void expect(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#endif
}
/** Waits for the barrier's first completion, or for one of another parity. */
__device__ inline void await(const uint64_t* barrier, uint32_t parity = 0) {
#if __CUDA_ARCH__ >= 900
  uint32_t done;
  do {
    asm volatile("{\\n.reg .pred p;\\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\\nselp.u32 %0, 1, 0, p;\\n}" : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
  } while (!done);
#endif
}
/** Has whole 16 bytes copied from global to shared memory, which a barrier counts. */
__device__ inline void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
#endif
}

/** Says that this block has begun and its barriers are open; await_begun waits for all of the cluster. */
__device__ inline void say_begun() {
  barriers_opened();
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void await_begun() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
/** After it the blocks of a cluster see what each wrote to global memory before. */
__device__ inline void cluster_sync(int32_t blocks) {
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;\\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

// ---- host ----

/** How many clusters of this size the device runs at once. */
template <typename Kernel>
int32_t clusters_at_once(Kernel kernel, const Shape& shape) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {shape.cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid, config.blockDim = shape.block, config.dynamicSmemBytes = shape.shared, config.attrs = &attribute, config.numAttrs = 1;
  int count = 0;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess || cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
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
#include "../quants.h"

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
    count_bytes(static_cast<int64_t>(bytes_));
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() {
    cudaFree(data_);
    count_bytes(-static_cast<int64_t>(bytes_));
  }
  template <typename T>
  T* as(size_t byte = 0) const { return reinterpret_cast<T*>(static_cast<uint8_t*>(data_) + byte); }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};
using DeviceRef = std::shared_ptr<DeviceMemory>;

/** Host memory that kernels reach, given back with its last owner. */
class HostMemory {
 public:
  explicit HostMemory(size_t bytes) { check(cudaHostAlloc(&data_, bytes, cudaHostAllocMapped), "Allocating host memory"); }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;
  ~HostMemory() { cudaFreeHost(data_); }
  template <typename T>
  T* as(size_t byte = 0) const { return reinterpret_cast<T*>(static_cast<uint8_t*>(data_) + byte); }

 private:
  void* data_ = nullptr;
};

// ---- data errors: found on the device, read after a run ----

enum class Fault : int32_t { None, Token, Target, NanLogit, NanAttention, NanScore, Full, Rank, OneStep };

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

WKV_HD constexpr bool is_quantised(int32_t dtype) { return dtype >= WKV_Q8_0; }

/**
 * A weight as kernels see it. Quantised rows lie in planes, each with a part for every 32 columns:
 * - data: 32 bytes (Q8_0); 16 bytes of low and high halves, as in the file (4 low bits); 8 bytes (2 low bits: columns 4 v .. 4 v + 3 at
 *   bit 2 v of bytes 0 to 3, columns 16 + 4 v .. of bytes 4 to 7).
 * - scales: an f16, or a pair (scale, minimum); K types have a pair for every 256 columns.
 * - high: 4 bytes (1 bit: columns 4 v .. at bit v, 16 + 4 v .. at bit 4 + v) or 8 (2 bits, as the low 2).
 * - subs: 2 bytes, the sub-scales of K types (wkv_piece in quants.h).
 */
struct WeightView {
  int32_t dtype, rows, columns;
  const uint8_t* data;
  const __half* scales;
  const uint8_t* high;
  const uint16_t* subs;
};

/** Bytes of 32 columns in each plane; scales: of 256 columns in K types. */
WKV_HD constexpr int32_t data_bytes(int32_t dtype) { return wkv_form_of(dtype).low * 4; }
WKV_HD constexpr int32_t high_bytes(int32_t dtype) { return wkv_form_of(dtype).high * 4; }
WKV_HD constexpr int32_t subs_bytes(int32_t dtype) { return wkv_form_of(dtype).subs ? 2 : 0; }
WKV_HD constexpr int32_t scale_bytes(int32_t dtype) { return wkv_form_of(dtype).least || wkv_form_of(dtype).subs ? 4 : 2; }
/** Columns that share an entry of the plane of scales. */
WKV_HD constexpr int32_t scale_columns(int32_t dtype) { return wkv_form_of(dtype).columns; }

/** A plane of a weight, 0 to 3 as WeightView has them: so many bytes for every so many columns. */
struct Plane {
  int32_t columns, bytes;
};
WKV_HD constexpr Plane plane_of(int32_t dtype, int p) {
  if (!is_quantised(dtype)) return {1, p > 0 ? 0 : dtype == WKV_F32 ? 4 : 2};
  if (p == 0) return {32, data_bytes(dtype)};
  if (p == 1) return {scale_columns(dtype), scale_bytes(dtype)};
  return {32, p == 2 ? high_bytes(dtype) : subs_bytes(dtype)};
}

/** Number i of 32 columns of a type of quants.h, from their parts of the planes. */
WKV_HD inline float piece_number(int32_t dtype, const uint8_t* data, const uint8_t* high, uint32_t subs, float d, float least, int32_t i) {
  const wkv_form form = wkv_form_of(dtype);
  const int32_t half = i / 16, v = i % 16 / 4, c = i % 4;
  int32_t q = form.low == 4 ? data[i % 16] >> (half * 4) & 15 : data[half * 4 + c] >> (v * 2) & 3;
  if (form.high == 1) q |= (high[c] >> (half * 4 + v) & 1) << form.low;
  if (form.high == 2) q |= (high[half * 4 + c] >> (v * 2) & 3) << form.low;
  if (dtype == WKV_IQ4_NL) {
    constexpr int8_t values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    return d * static_cast<float>(values[q]);
  }
  const int32_t first = static_cast<int32_t>(subs & 255), second = static_cast<int32_t>(subs >> 8), own = half ? second : first;
  const float x = static_cast<float>(q - form.middle);
  if (dtype == WKV_Q2_K) return d * static_cast<float>(own & 15) * x - least * static_cast<float>(own >> 4);
  if (form.subs && form.least) return d * static_cast<float>(first) * x - least * static_cast<float>(second);
  if (form.subs) return d * static_cast<float>(static_cast<int8_t>(own)) * x;
  return d * x + least;
}

struct Tensor : Object {
  int32_t dtype, rows, columns;
  size_t scales_at = 0, high_at = 0, subs_at = 0;  // where the other planes begin
  DeviceRef memory;
  std::shared_ptr<HostMemory> mirror;  // the same numbers, of what wkv_sample writes: they are read without a copy
  Tensor(int32_t dtype, int32_t rows, int32_t columns);
  size_t bytes() const override { return memory->bytes(); }
  float* f32() const { return memory->as<float>(); }
  int32_t* i32() const { return memory->as<int32_t>(); }
  float* row(int64_t r) const { return f32() + r * columns; }
  WeightView view() const { return {dtype, rows, columns, memory->as<uint8_t>(), memory->as<__half>(scales_at), memory->as<uint8_t>(high_at), memory->as<uint16_t>(subs_at)}; }
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
  bool takes_device = false;  // a kernel's blocks wait for each other, one a multiprocessor
  std::vector<std::shared_ptr<void>> holds;
  Graph() : Object(Kind::Graph) {}
  ~Graph() override {
    if (run) cudaGraphExecDestroy(run);
  }
};

class Chain;

/** One GPU. Ops go to \`stream\`, which may be recording; graphs and copies to \`side\`, as they may run meanwhile. Between two entries
 *  nothing runs but what wkv_graph_start started, which an op that is not recorded waits for, so the two need no order. */
struct Context : ContextBase {
  int32_t device = 0, processors = 0;
  int32_t shared_limit = 0;  // bytes a block; WKV_CUDA_SHARED_KB lowers it, to test what smaller GPUs take
  bool shared_device = false;  // other processes' kernels run beside ours (MPS)
  int64_t least_grid = 0;    // bytes of weights from which chain_grid.cu is the fastest; WKV_CUDA_GRID_MB sets it, to test that on small ones
  int32_t capability = 0;    // 90 for 9.0: the device's, or that of the code it runs when this is lower
  std::string name;          // for wkv_device
  cudaStream_t stream = nullptr, side = nullptr;
  DeviceRef taken;
  FaultWord* word = nullptr;
  std::shared_ptr<Graph> recording;
  std::shared_ptr<Graph> going;     // what wkv_graph_start started, until it is known to have ended
  std::unique_ptr<Failure> failed;  // what that run failed with, until wkv_graph_poll tells it
  DeviceRef scratch;  // an op's intermediate results; a graph holds the one it was recorded with
  std::shared_ptr<Chain> chain;  // products that are recorded and not launched yet (chain.cu); null: none ever
  uint64_t launches = 0;
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
  /** Launches the products that wait in \`chain\`; launch() does so first. */
  void flush();
  /** Launches a graph so many times. Two that take the device never run at once: each might have what the other waits for. */
  void start(const Graph& graph, int32_t times = 1);
  /** Ends an op: checks its launches and, unless a graph is recorded, waits for it and for its faults. */
  void submitted();
  /** Waits for a stream, and fails with the fault that kernels left. */
  void finish(cudaStream_t ran);
  /** Waits for what wkv_graph_start started, and keeps its failure. */
  void settle();
  void copy(void* to, const void* from, size_t bytes);
  void zero(void* to, size_t bytes);

 private:
  void release();
};

/** An entry that may find a graph running. */
template <typename Body>
int32_t entry_meanwhile(int32_t handle, Body body) {
  return entry_of<Context>(handle, [&](Context& context) {
    require_device();
    check(cudaSetDevice(context.device), "Choosing the device");
    body(context);
  });
}

/** An entry that finds nothing running, unless it only records. */
template <typename Body>
int32_t entry(int32_t handle, Body body) {
  return entry_meanwhile(handle, [&](Context& context) {
    if (!context.recording) context.settle();
    body(context);
  });
}

/** Lets a kernel use this much shared memory: what it declares itself, 26 KB at most, counts towards the 48 KB that need no leave. */
template <typename Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  if (bytes > 22 * 1024) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), "Shared memory");
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
  ctx.flush();
  allow_shared(kernel, shape.shared);
  ctx.launches++;
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
  if (wkv_has_pieces(w.dtype)) {
    const int64_t scale = i / scale_columns(w.dtype) * (scale_bytes(w.dtype) / 2);
    const float least = scale_bytes(w.dtype) == 4 ? __half2float(w.scales[scale + 1]) : 0.0f;
    return piece_number(w.dtype, w.data + block * data_bytes(w.dtype), w.high + block * high_bytes(w.dtype), subs_bytes(w.dtype) ? w.subs[block] : 0, __half2float(w.scales[scale]), least, within);
  }
  if (w.dtype == WKV_Q8_0) return reinterpret_cast<const int8_t*>(w.data)[block * 32 + within] * __half2float(w.scales[block]);
  const int32_t nibble = w.data[block * 16 + within % 16] >> (within / 16 * 4) & 15;
  if (w.dtype == WKV_Q4_0) return (nibble - 8) * __half2float(w.scales[block]);
  return fmaf(nibble, __half2float(w.scales[block * 2]), __half2float(w.scales[block * 2 + 1]));
}

}  // namespace wkv
`,
  "cuda/cublaslt.cu": `/**
 * cublaslt.cu: products of many rows by cuBLASLt, loaded at run time.
 *
 * Products go to scratch, a run of x's rows at a time, and a kernel takes them on to \`out\` with factor, bias, sum or gate. Tensor cores cut
 * sums off instead of rounding them, so a product covers at most 2048 columns; the next is added to it. Where x was rounded once to 16
 * bits a product covers all columns, as what is cut off is less than that, and goes to \`out\` itself where nothing but a sum is asked for.
 * Declared here is the part of the interface that is used, the same in versions 12 and 13. Kernels are chosen once a shape; sums over
 * blocks are made in a fixed order.
 */
#include "cublaslt.cuh"

#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "fours.cuh"

namespace wkv {
namespace {

using Opaque = void*;
struct Algorithm {
  uint64_t data[8];
};
struct Choice {
  Algorithm algorithm;
  size_t workspace;
  int32_t status;
  float waves;
  int32_t reserved[4];
};
enum : int32_t { kCompute32F = 68, kTransA = 3, kOpTranspose = 1, kWorkspaceBytes = 1, kReductions = 3, kReductionInOrder = 2, kAlignA = 5, kAlignB = 6, kAlignC = 7, kAlignD = 8, kReal32F = 0, kReal16F = 2, kRealBF16 = 14 };

constexpr size_t kWorkspace = size_t{32} << 20, kMostResults = size_t{256} << 20;  // bytes
constexpr int32_t kMostColumns = 2048;

struct Library {
  std::string name;
  Opaque handle = nullptr;
  std::mutex lock;
  std::map<std::tuple<int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int64_t>, Choice> chosen;  // by Product's numbers; status -1: none
  int32_t (*create)(Opaque*) = nullptr;
  int32_t (*desc_create)(Opaque*, int32_t, int32_t) = nullptr;
  int32_t (*desc_set)(Opaque, int32_t, const void*, size_t) = nullptr;
  int32_t (*desc_destroy)(Opaque) = nullptr;
  int32_t (*layout_create)(Opaque*, int32_t, uint64_t, uint64_t, int64_t) = nullptr;
  int32_t (*layout_destroy)(Opaque) = nullptr;
  int32_t (*preference_create)(Opaque*) = nullptr;
  int32_t (*preference_set)(Opaque, int32_t, const void*, size_t) = nullptr;
  int32_t (*preference_destroy)(Opaque) = nullptr;
  int32_t (*choose)(Opaque, Opaque, Opaque, Opaque, Opaque, Opaque, Opaque, int32_t, Choice*, int32_t*) = nullptr;
  int32_t (*matmul)(Opaque, Opaque, const void*, const void*, Opaque, const void*, Opaque, const void*, const void*, Opaque, void*, Opaque, const Algorithm*, void*, size_t, cudaStream_t) = nullptr;

  Library() {
    for (const char* file : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
      void* opened = dlopen(file, RTLD_NOW | RTLD_LOCAL);
      if (!opened) continue;
      const auto find = [&](const char* symbol, auto& function) {
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(opened, symbol));
        return function != nullptr;
      };
      if (find("cublasLtCreate", create) && find("cublasLtMatmulDescCreate", desc_create) && find("cublasLtMatmulDescSetAttribute", desc_set) &&
          find("cublasLtMatmulDescDestroy", desc_destroy) && find("cublasLtMatrixLayoutCreate", layout_create) && find("cublasLtMatrixLayoutDestroy", layout_destroy) &&
          find("cublasLtMatmulPreferenceCreate", preference_create) && find("cublasLtMatmulPreferenceSetAttribute", preference_set) &&
          find("cublasLtMatmulPreferenceDestroy", preference_destroy) && find("cublasLtMatmulAlgoGetHeuristic", choose) && find("cublasLtMatmul", matmul) && create(&handle) == 0) {
        name = file;
        return;
      }
      handle = nullptr;
      dlclose(opened);
    }
  }
};

/** Opened at its first use; never closed, as graphs may hold its kernels. */
Library& library() {
  static Library* const opened = new Library;
  return *opened;
}

/** What describes a product of \`rows\` rows of x, \`columns\` columns wide: in cuBLASLt's column order, out [J, rows] = w [C, J]^T . x [C, rows];
 *  rows of w and x are row_length numbers apart, those of out \`stride\`. */
struct Product {
  Library& lib;
  Opaque desc = nullptr, w = nullptr, x = nullptr, out = nullptr;
  Choice choice{};
  bool good = false;

  Product(Library& lib, int32_t type, int32_t out_type, int32_t w_rows, int32_t rows, int32_t columns, int32_t row_length, int64_t stride) : lib(lib) {
    const int32_t transpose = kOpTranspose;
    if (lib.desc_create(&desc, kCompute32F, kReal32F) || lib.desc_set(desc, kTransA, &transpose, sizeof transpose)) return;
    if (lib.layout_create(&w, type, columns, w_rows, row_length) || lib.layout_create(&x, type, columns, rows, row_length)) return;
    if (lib.layout_create(&out, out_type, w_rows, rows, stride)) return;
    const std::lock_guard<std::mutex> hold(lib.lock);
    const auto key = std::make_tuple(type, out_type, w_rows, rows, columns, row_length, stride);
    auto found = lib.chosen.find(key);
    if (found == lib.chosen.end()) found = lib.chosen.emplace(key, choose(int64_t{row_length} * (type == kReal32F ? 4 : 2))).first;
    choice = found->second;
    good = choice.status == 0;
  }
  Product(const Product&) = delete;
  ~Product() {
    for (const Opaque layout : {w, x, out}) {
      if (layout) lib.layout_destroy(layout);
    }
    if (desc) lib.desc_destroy(desc);
  }
  Choice choose(int64_t row_bytes) const {
    Choice first{};
    first.status = -1;
    Opaque preference = nullptr;
    const size_t workspace = kWorkspace;
    const uint32_t reductions = kReductionInOrder, alignment = row_bytes % 16 ? 4 : 16, aligned = 16;
    int32_t count = 0;
    if (lib.preference_create(&preference) == 0 && lib.preference_set(preference, kWorkspaceBytes, &workspace, sizeof workspace) == 0 &&
        lib.preference_set(preference, kReductions, &reductions, sizeof reductions) == 0 && lib.preference_set(preference, kAlignA, &alignment, sizeof alignment) == 0 &&
        lib.preference_set(preference, kAlignB, &alignment, sizeof alignment) == 0 && lib.preference_set(preference, kAlignC, &aligned, sizeof aligned) == 0 &&
        lib.preference_set(preference, kAlignD, &aligned, sizeof aligned) == 0) {
      Choice best{};
      if (lib.choose(lib.handle, desc, w, x, out, out, preference, 1, &best, &count) == 0 && count == 1) first = best;
    }
    if (preference) lib.preference_destroy(preference);
    return first;
  }
  void run(const void* from_w, const void* from_x, void* to, bool add, void* workspace, cudaStream_t stream) const {
    const float alpha = 1.0f, beta = add ? 1.0f : 0.0f;
    const int32_t status = lib.matmul(lib.handle, desc, &alpha, from_w, w, from_x, x, &beta, to, out, to, out, &choice.algorithm, workspace, kWorkspace, stream);
    if (status) fail(WKV_DEVICE, lib.name + " failed with status " + std::to_string(status));
  }
};

/** Rows of x that are done at a time, in runs of about one length; \`size\`: bytes of a result. */
int32_t rows_at_once(int32_t rows, const WeightView& w, bool gated, int64_t size) {
  const int64_t fit = std::max<int64_t>(64, int64_t{kMostResults} / size / w.rows / (gated ? 2 : 1) / 64 * 64);
  const int64_t runs = (rows + fit - 1) / fit;
  return static_cast<int32_t>(std::min<int64_t>(rows, (rows + runs * 64 - 1) / (runs * 64) * 64));
}

/** fours: all rows begin on a multiple of 4 numbers, and end on one. */
template <typename R>
__global__ void __launch_bounds__(256) finish_kernel(const R* product, const R* second, const float* factors, int32_t t0, int32_t columns, bool fours, OutputView to) {
  wait_for_previous();
  let_next_start();
  const int64_t from = int64_t{blockIdx.x} * columns;
  const int32_t t = t0 + blockIdx.x;
  const float factor = factors ? factors[t] : 1.0f;
  if (!fours) {
    for (int32_t j = blockIdx.y * 256 + threadIdx.x; j < columns; j += gridDim.y * 256) {
      const float first = to_float(product[from + j]) * factor;
      to.put(t, j, second ? activate(to.activation, first, to_float(second[from + j]) * factor) : first);
    }
    return;
  }
  float* const out = to.out + t * to.stride;
  for (int32_t j = (blockIdx.y * 256 + threadIdx.x) * 4; j < columns; j += gridDim.y * 1024) {
    Four<float> x = each<float>(four_at(product + from + j), [&](R v, int) { return to_float(v) * factor; });
    if (second) {
      const Four<R> up = four_at(second + from + j);
      x = each<float>(x, [&](float v, int k) { return activate(to.activation, v, to_float(up.x[k]) * factor); });
    }
    if (to.bias) {
      const float* bias = to.bias + j;
      x = each<float>(x, [&](float v, int k) { return v + bias[k]; });
    }
    if (to.add) {
      const Four<float> before = four_at(out + j);
      x = each<float>(x, [&](float v, int k) { return before.x[k] + v; });
    }
    four_at(out + j) = x;
  }
}

template <typename R>
void finish(Context& ctx, const void* product, const void* second, const float* factors, int32_t t0, int32_t rows, int32_t columns, const OutputView& to) {
  const bool fours = columns % 4 == 0 && to.stride % 4 == 0 && reinterpret_cast<uintptr_t>(to.out) % 16 == 0;
  launch(ctx, finish_kernel<R>, {dim3(rows, std::min(64, divide_up(columns, fours ? 1024 : 256))), dim3(256)}, static_cast<const R*>(product), static_cast<const R*>(second), factors, t0, columns, fours, to);
}

}  // namespace

bool cublaslt_loaded(std::string* which) {
  *which = library().name;
  return library().handle != nullptr;
}

size_t cublaslt_bytes(int32_t rows, const WeightView& w, bool gated) {
  if (!library().handle) return 0;
  size_t most = 0;
  for (const int64_t size : {2, 4}) most = std::max(most, round_up(size_t(rows_at_once(rows, w, gated, size)) * w.rows * size));
  return kWorkspace + most * (gated ? 2 : 1);
}

bool cublaslt_matmul(Context& ctx, const void* x, int32_t parts, const float* factors, int32_t rows, const WeightView& w, const WeightView& up, const OutputView& to, uint8_t* scratch) {
  Library& lib = library();
  if (!lib.handle) return false;
  const bool gated = up.data != nullptr, once = parts == 1 && w.dtype != WKV_F32;
  const int32_t type = w.dtype == WKV_F32 ? kReal32F : w.dtype == WKV_F16 ? kReal16F : kRealBF16, size = w.dtype == WKV_F32 ? 4 : 2, columns = w.columns;
  // Rows of bf16 have no factors but 1.
  if (once && w.dtype == WKV_BF16 && !gated && !to.bias && reinterpret_cast<uintptr_t>(to.out) % 16 == 0 && to.stride % 4 == 0) {
    const Product direct(lib, type, kReal32F, w.rows, rows, columns, columns, to.stride);
    if (direct.good) return direct.run(w.data, x, to.out, to.add, scratch, ctx.stream), true;
  }
  // What goes through the activation is rounded once too, where f16's few exponents are not in the way.
  const bool narrow = once && gated && w.dtype == WKV_BF16;
  const int32_t result = narrow ? kRealBF16 : kReal32F, result_size = narrow ? 2 : 4;
  const int32_t step = rows_at_once(rows, w, gated, result_size), last = (rows - 1) % step + 1, wide = once ? columns : std::min(columns, kMostColumns), rest = columns % wide;
  // With full and last runs of rows, and full and last runs of columns.
  const auto product_of = [&](int32_t rows, int32_t columns) { return Product(lib, type, result, w.rows, rows, columns, w.columns, w.rows); };
  const Product whole = product_of(step, wide), end = product_of(last, wide), whole_rest = product_of(step, rest ? rest : wide), end_rest = product_of(last, rest ? rest : wide);
  if (!whole.good || !end.good || !whole_rest.good || !end_rest.good) return false;
  uint8_t* results[2] = {scratch + kWorkspace, nullptr};
  if (gated) results[1] = results[0] + round_up(size_t(step) * w.rows * result_size);
  for (int32_t t0 = 0; t0 < rows; t0 += step) {
    const int32_t count = std::min(step, rows - t0);
    for (int g = 0; g <= int(gated); g++) {
      bool add = false;
      for (int32_t c = 0; c < columns; c += wide) {
        const bool full = columns - c >= wide;
        const Product& product = count == step ? (full ? whole : whole_rest) : (full ? end : end_rest);
        for (int32_t part = parts - 1; part >= 0; part--) {  // the lowest first
          const uint8_t* from = static_cast<const uint8_t*>(x) + ((int64_t{part} * rows + t0) * columns + c) * size;
          product.run((g ? up : w).data + int64_t{c} * size, from, results[g], add, scratch, ctx.stream);
          add = true;
        }
      }
    }
    if (narrow) finish<__nv_bfloat16>(ctx, results[0], results[1], factors, t0, count, w.rows, to);
    else finish<float>(ctx, results[0], results[1], factors, t0, count, w.rows, to);
  }
  return true;
}

}  // namespace wkv
`,
  "cuda/cublaslt.cuh": `/** cublaslt.cuh: the products of cuBLASLt, where that library is installed; it is looked for at run time and nothing needs it. */
#pragma once
#include "linear.cuh"

namespace wkv {

/** Whether it was found, and as what. */
bool cublaslt_loaded(std::string* which);

/** Bytes of scratch for cublaslt_matmul. */
size_t cublaslt_bytes(int32_t rows, const WeightView& w, bool gated);
/** out = x . w^T, gated where up has data, for weights that are not quantised. x: \`parts\` matrices [rows, C] of w's dtype, one after the other,
 *  whose sum times factors[t] (null, or of bf16: 1) is row t. False, and nothing launched, when there is no cuBLASLt or it has no kernel for the shape. */
bool cublaslt_matmul(Context& ctx, const void* x, int32_t parts, const float* factors, int32_t rows, const WeightView& w, const WeightView& up, const OutputView& to, uint8_t* scratch);

}  // namespace wkv
`,
  "cuda/embed.cu": `/**
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

/** By a block; \`to\` may be \`from\`. */
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
`,
  "cuda/fours.cuh": `/** fours.cuh: rows four numbers at a time. */
#pragma once
#include "common.cuh"

namespace wkv {

/** Four numbers of a row; where they lie in memory, a multiple of four from an aligned start. */
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};
template <typename To, typename From, typename Body>
__device__ inline Four<To> each(const Four<From>& from, Body body) {
  Four<To> to;
#pragma unroll
  for (int k = 0; k < 4; k++) to.x[k] = body(from.x[k], k);
  return to;
}
template <typename T>
__device__ inline const Four<T>& four_at(const T* from) { return *reinterpret_cast<const Four<T>*>(from); }
template <typename T>
__device__ inline Four<T>& four_at(T* from) { return *reinterpret_cast<Four<T>*>(from); }

}  // namespace wkv
`,
  "cuda/linear.cu": `/**
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

/** out = in . w^T, or gated with \`up\` (data null: not), by kernels for many rows. */
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
`,
  "cuda/linear.cuh": `/** linear.cuh: what the files of wkv_linear and wkv_gated share: linear.cu (ops), matvec.cu (few rows), chain.cu (one row, in graphs),
 *  matmul.cu (more rows). */
#pragma once
#include <type_traits>

#include "common.cuh"

namespace wkv {

/** An input: rows [0, rows) of x with their norm (null: none). */
struct InputView {
  const float* x;
  int32_t rows, columns;
  const float* norm;
  float epsilon;
  bool half;  // may be rounded once to the type of 16-bit weights
};

/** activation(gate) * up, a wkv_activation; (1 + tanh(u)) / 2 = 1 / (1 + e^-2u). */
__device__ inline float activate(int32_t activation, float gate, float up) {
  const float s = activation == WKV_GELU_TANH ? gate * (1.5957691216f + 0.0713548162726f * gate * gate) : gate;
  return __fdividef(gate, 1.0f + __expf(-s)) * up;
}

/** Where results go: row t at out + t * stride. */
struct OutputView {
  float* out;
  int64_t stride;
  const float* bias;
  int32_t add;
  int32_t activation;  // of gated ones
  __device__ void put(int32_t t, int32_t j, float value) const {
    float* to = out + t * stride + j;
    if (bias) value += bias[j];
    *to = add ? *to + value : value;
  }
};

/** out = norm(in) . w^T, or activation(norm(in) . w^T) * (norm(in) . up^T) where up has data; weights must be of one dtype. One launch that
 *  reads in as it is. False, and nothing launched, when the shape needs matmul. */
bool matvec(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, bool int8, const OutputView& to);

/** The same for up to kSkinnyRows rows and f16 or bf16 weights, whose columns must be a multiple of 32. False, and nothing launched, for others. */
constexpr int32_t kSkinnyRows = 64;
bool matmul_skinny(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, const OutputView& to);

/** Rows of x in 8 bits. Of a block of 32, in words of 4 columns: 0, 4, 1, 5, 2, 6, 3, 7, as the tensor cores' lanes take them.
 *  of[block * stride + t]: the scale of row t's block, and scale times the sum of the rounded; stride is even. */
struct RoundedView {
  const int8_t* q;
  const float2* of;
  int32_t rows, stride;
};

/** Rows of x as sums of two f16 or bf16, [high, low][rows][C], low ones left out of a half input; true values are factors[t] times as
 *  large. */
struct SplitView {
  const uint8_t* parts;
  const float* factors;
  int32_t rows;
};

/** Bytes of scratch that norm_rows, round_rows and split_rows need. */
inline size_t prepared_bytes(const InputView& in) { return round_up(size_t(in.rows) * (in.columns + 1) * 4); }
RoundedView round_rows(Context& ctx, const InputView& in, uint8_t* scratch);
SplitView split_rows(Context& ctx, const InputView& in, bool bf16, uint8_t* scratch);
/** norm(x), or x itself where there is no norm. */
const float* norm_rows(Context& ctx, const InputView& in, uint8_t* scratch);

/** out = x . w^T, gated where up has data; weights must be of one dtype. */
void matmul_int8(Context& ctx, const RoundedView& x, const WeightView& w, const WeightView& up, const OutputView& to);
/** The same for f16 and bf16 weights; columns must be a multiple of 32. */
void matmul_half(Context& ctx, const SplitView& x, const WeightView& w, const WeightView& up, const OutputView& to);
/** out = x . w^T in f32. */
void matmul_f32(Context& ctx, const float* x, int32_t rows, const WeightView& w, const OutputView& to);

/** Calls body with the type of a weight that has no pieces as a constant. */
template <typename Body>
auto by_type(int32_t dtype, Body body) {
  switch (dtype) {
    case WKV_F32: return body(std::integral_constant<int, WKV_F32>());
    case WKV_F16: return body(std::integral_constant<int, WKV_F16>());
    case WKV_BF16: return body(std::integral_constant<int, WKV_BF16>());
    case WKV_Q8_0: return body(std::integral_constant<int, WKV_Q8_0>());
    case WKV_Q4_0: return body(std::integral_constant<int, WKV_Q4_0>());
    default: return body(std::integral_constant<int, WKV_Q4_1>());
  }
}

/** The same for the types of quants.h. */
template <typename Body>
auto by_pieces(int32_t dtype, Body body) {
  switch (dtype) {
    case WKV_Q5_0: return body(std::integral_constant<int, WKV_Q5_0>());
    case WKV_Q5_1: return body(std::integral_constant<int, WKV_Q5_1>());
    case WKV_Q2_K: return body(std::integral_constant<int, WKV_Q2_K>());
    case WKV_Q3_K: return body(std::integral_constant<int, WKV_Q3_K>());
    case WKV_Q4_K: return body(std::integral_constant<int, WKV_Q4_K>());
    case WKV_Q5_K: return body(std::integral_constant<int, WKV_Q5_K>());
    case WKV_Q6_K: return body(std::integral_constant<int, WKV_Q6_K>());
    default: return body(std::integral_constant<int, WKV_IQ4_NL>());
  }
}

/** IQ4_NL's values of the four numbers in the bytes of a word. */
__device__ inline uint32_t iq4_values(uint32_t q) {
  const uint32_t selector = (q & 0xf) | (q >> 4 & 0xf0) | (q >> 8 & 0xf00) | (q >> 12 & 0xf000);
  const uint32_t low = __byte_perm(0xbfad9881u, 0xf6eaddcfu, selector & 0x7777), high = __byte_perm(0x26190d01u, 0x71594535u, selector & 0x7777);
  const uint32_t upper = (q >> 3 & 0x01010101u) * 255u;  // numbers from 8 on
  return (low & ~upper) | (high & upper);
}

/** Four neighbours of a block of 32 numbers in 8 bits, as round_row of loops.cpp rounds them but for ties. 8 neighbouring lanes hold a block; all 32
 *  lanes take part. Gives the four as a word, and the block's scale and sum in every lane. */
__device__ inline int32_t round_four(float4 v, float* scale, float* sum) {
  const auto bits = [](float x) { return __float_as_uint(fabsf(x)); };
  uint32_t high = max(max(bits(v.x), bits(v.y)), max(bits(v.z), bits(v.w)));
#pragma unroll
  for (int o = 1; o < 8; o <<= 1) high = max(high, __shfl_xor_sync(0xffffffffu, high, o));
  const float most = __uint_as_float(high);
  const bool finite = most <= 3.402823466e38f;  // or else nothing that comes of it is
  float inverse;
  asm("rcp.approx.f32 %0, %1;" : "=f"(inverse) : "f"(most));
  inverse = finite && most > 0.0f ? 127.0f * inverse : 0.0f;
  const auto rounded = [&](float x) { return finite ? static_cast<int32_t>(rintf(x * inverse)) : 0; };
  const int32_t a = rounded(v.x), b = rounded(v.y), c = rounded(v.z), d = rounded(v.w);
  int32_t total = a + b + c + d;
#pragma unroll
  for (int o = 1; o < 8; o <<= 1) total += __shfl_xor_sync(0xffffffffu, total, o);
  *scale = finite ? most * (1.0f / 127.0f) : __uint_as_float(0x7fc00000u);
  *sum = *scale * static_cast<float>(total);
  return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24;
}

}  // namespace wkv
`,
  "cuda/matmul.cu": `/**
 * matmul.cu: x after norm and rounding, and out[t, j] = x[t] . w[j] in f32 for many rows of x.
 *
 * matmul_f32: a block owns a tile of 64 x 64 of out and walks along C in steps of 32; weights are widened on their way into shared memory.
 * Bytes moved: w once a 64 rows of x, x once a 64 rows of w.
 */
#include "fours.cuh"
#include "linear.cuh"

namespace wkv {
namespace {

/** A block's row of x, and the scale of its norm. */
__device__ inline float row_scale(const InputView& in, const float* x) {
  __shared__ double area[32];
  if (!in.norm) return 1.0f;
  double squares = 0.0;
  if (in.columns % 4 == 0) {
    for (int32_t c = threadIdx.x * 4; c < in.columns; c += 1024) {
      const Four<float> four = four_at(x + c);
#pragma unroll
      for (int k = 0; k < 4; k++) squares += static_cast<double>(four.x[k]) * four.x[k];
    }
  } else {
    for (int32_t c = threadIdx.x; c < in.columns; c += 256) squares += static_cast<double>(x[c]) * x[c];
  }
  return 1.0f / sqrtf(static_cast<float>(block_sum(squares, area) / in.columns) + in.epsilon);
}

__global__ void __launch_bounds__(256) norm_kernel(InputView in, float* out) {
  wait_for_previous();
  let_next_start();
  const float* x = in.x + int64_t{blockIdx.x} * in.columns;
  const float scale = row_scale(in, x);
  for (int32_t c = threadIdx.x; c < in.columns; c += 256) out[int64_t{blockIdx.x} * in.columns + c] = x[c] * scale * in.norm[c];
}

__global__ void __launch_bounds__(256) round_kernel(InputView in, int32_t* q, float2* of, int32_t stride) {
  wait_for_previous();
  let_next_start();
  const int32_t words = in.columns / 4, lane = threadIdx.x % 32;
  const float* x = in.x + int64_t{blockIdx.x} * in.columns;
  const float scale = row_scale(in, x);
  for (int32_t start = threadIdx.x - lane; start < words; start += 256) {
    const int32_t i = start + lane;
    float4 v = make_float4(0, 0, 0, 0);
    if (i < words) {
      v = reinterpret_cast<const float4*>(x)[i];
      if (in.norm) {
        const float4 n = __ldg(reinterpret_cast<const float4*>(in.norm) + i);
        v = make_float4(v.x * scale * n.x, v.y * scale * n.y, v.z * scale * n.z, v.w * scale * n.w);
      }
    }
    float2 both;
    const int32_t word = round_four(v, &both.x, &both.y);
    if (i >= words) continue;
    q[int64_t{blockIdx.x} * words + i / 8 * 8 + i % 4 * 2 + i / 4 % 2] = word;
    if (i % 8 == 0) of[int64_t{i / 8} * stride + blockIdx.x] = both;
  }
}

/** f16 has few exponents, so there the row's highest number is brought to 2^14 by a power of two. Columns are a multiple of 4. */
template <bool kBf16>
__global__ void __launch_bounds__(256) split_kernel(InputView in, uint8_t* parts, float* factors) {
  using T = std::conditional_t<kBf16, __nv_bfloat16, __half>;
  __shared__ float area[32];
  wait_for_previous();
  let_next_start();
  const int32_t columns = in.columns;
  const float* x = in.x + int64_t{blockIdx.x} * columns;
  const float scale = row_scale(in, x);
  const auto values = [&](int32_t c) {
    const Four<float> own = four_at(x + c);
    if (!in.norm) return own;
    const Four<float> norm = four_at(in.norm + c);
    return each<float>(own, [&](float v, int k) { return v * scale * norm.x[k]; });
  };
  float factor = 1.0f;
  if (!kBf16) {
    float most = 0.0f;
    for (int32_t c = threadIdx.x * 4; c < columns; c += 1024) {
      const Four<float> v = values(c);
      most = fmaxf(fmaxf(most, fmaxf(fabsf(v.x[0]), fabsf(v.x[1]))), fmaxf(fabsf(v.x[2]), fabsf(v.x[3])));
    }
    most = block_max(most, area);
    if (most > 0.0f && most <= 3.402823466e38f) factor = ldexpf(1.0f, max(ilogbf(most) - 14, -120));
  }
  T *high = reinterpret_cast<T*>(parts) + int64_t{blockIdx.x} * columns, *low = high + int64_t{in.rows} * columns;
#pragma unroll 4
  for (int32_t c = threadIdx.x * 4; c < columns; c += 1024) {
    const Four<float> v = each<float>(values(c), [&](float v, int) { return kBf16 ? v : v / factor; });
    const Four<T> first = each<T>(v, [](float v, int) { return from_float<T>(v); });
    four_at(high + c) = first;
    if (!in.half) four_at(low + c) = each<T>(v, [&](float v, int k) { return from_float<T>(v - to_float(first.x[k])); });
  }
  if (threadIdx.x == 0) factors[blockIdx.x] = factor;
}

constexpr int kPieces = -1;  // any type of quants.h

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
  if (kType == kPieces) return make_float4(weight_at(w, row, column), weight_at(w, row, column + 1), weight_at(w, row, column + 2), weight_at(w, row, column + 3));
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

constexpr int kTile = 64;

/** A thread owns outputs [4 ty, 4 ty + 4) x {tx, tx + 16, tx + 32, tx + 48} of the tile. */
template <int kType>
__global__ void __launch_bounds__(256) matmul_f32_kernel(const float* x, int32_t rows, WeightView w, OutputView to) {
  wait_for_previous();
  let_next_start();
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

}  // namespace

const float* norm_rows(Context& ctx, const InputView& in, uint8_t* scratch) {
  if (!in.norm) return in.x;
  float* out = reinterpret_cast<float*>(scratch);
  launch(ctx, norm_kernel, {dim3(in.rows), dim3(256)}, in, out);
  return out;
}

RoundedView round_rows(Context& ctx, const InputView& in, uint8_t* scratch) {
  const int32_t stride = (in.rows + 1) / 2 * 2;
  float2* of = reinterpret_cast<float2*>(scratch + size_t(in.rows) * in.columns);
  launch(ctx, round_kernel, {dim3(in.rows), dim3(256)}, in, reinterpret_cast<int32_t*>(scratch), of, stride);
  return {reinterpret_cast<int8_t*>(scratch), of, in.rows, stride};
}

SplitView split_rows(Context& ctx, const InputView& in, bool bf16, uint8_t* scratch) {
  float* factors = reinterpret_cast<float*>(scratch + size_t(in.rows) * in.columns * 4);
  launch(ctx, bf16 ? split_kernel<true> : split_kernel<false>, {dim3(in.rows), dim3(256)}, in, scratch, factors);
  return {scratch, factors, in.rows};
}

void matmul_f32(Context& ctx, const float* x, int32_t rows, const WeightView& w, const OutputView& to) {
  const dim3 grid(divide_up(w.rows, kTile), divide_up(rows, kTile));
  if (wkv_has_pieces(w.dtype)) return launch(ctx, matmul_f32_kernel<kPieces>, {grid, dim3(256)}, x, rows, w, to);
  by_type(w.dtype, [&](auto type) { launch(ctx, matmul_f32_kernel<type.value>, {grid, dim3(256)}, x, rows, w, to); });
}

}  // namespace wkv
`,
  "cuda/matmul_half.cu": `/**
 * matmul_half.cu: out[t, j] = x[t] . w[j] for f16 and bf16 w and x in f32, on the tensor cores.
 *
 * x is the sum of two numbers of w's type (split_rows), good to 2^-18 (bf16) or 2^-22 (f16) of it; their products with w are exact and
 * are summed in f32. Tensor cores cut sums off instead of rounding them, so only 32 columns are left to them at a time, and ordinary
 * additions do the rest. A block owns kRows rows of w (gated: half of them of gate, half of up) and kTokens rows of x; stages of both are
 * copied into shared memory while it works.
 * Bytes moved: w once a kTokens rows of x, x once a kRows rows of w (from the second level).
 */
#include "tile.cuh"

namespace wkv {
namespace {

using Many = Plan<2, 4, 4, 4, 1, 3, 1>;

/** A stage's rows of w, then of x, in shared memory; an odd multiple of 64 bytes long, so that a warp's reads touch every bank once. */
template <typename P>
struct Stage {
  static constexpr int kRowW = P::kBlocks % 2 ? P::kBlocks * 64 : P::kBlocks * 64 + 64, kRowX = P::kBlocks * 128 + 64;
  static constexpr int kAtX = P::kRows * kRowW, kBytes = kAtX + P::kTokens * kRowX;
};

template <bool kBf16, typename P>
__global__ void __launch_bounds__(kTileThreads, P::kResident) matmul_half_kernel(SplitView x, WeightView w, WeightView up, int32_t gated, OutputView to) {
  using S = Stage<P>;
  extern __shared__ __align__(16) uint8_t shared[];
  const Tile<P> tile(w, up, gated, x.rows, 1);
  const int32_t blocks = w.columns / 32;
  const auto fetch_w = [&](int32_t s) {
    uint8_t* stage = shared + s % P::kStages * S::kBytes;
    const int32_t first = s * P::kBlocks, have = min(P::kBlocks, blocks - first);
#pragma unroll 1
    for (int u = threadIdx.x; u < P::kRows * P::kBlocks * 4; u += kTileThreads) {
      const int r = u / (P::kBlocks * 4), c = u % (P::kBlocks * 4);
      if (c < have * 4) copy_async<16>(stage + r * S::kRowW + c * 16, tile.weight(r).data + (tile.row_in(r) * blocks + first) * 64 + c * 16);
    }
  };
  const auto fetch_x = [&](int32_t s) {
    uint8_t* stage = shared + s % P::kStages * S::kBytes + S::kAtX;
    const int32_t first = s * P::kBlocks, have = min(P::kBlocks, blocks - first);
#pragma unroll 1
    for (int u = threadIdx.x; u < P::kTokens * P::kBlocks * 8; u += kTileThreads) {
      const int t = u / (P::kBlocks * 8), c = u % (P::kBlocks * 8);
      if (c < have * 8) {
        const int64_t row = c / 4 % 2 * int64_t{x.rows} + tile.token_in(t);  // high and low take turns a block
        copy_async<16>(stage + t * S::kRowX + c * 16, x.parts + (row * blocks + first + c / 8) * 64 + c % 4 * 16);
      }
    }
  };

  const int32_t stages = (blocks + P::kBlocks - 1) / P::kBlocks;
#pragma unroll 1
  for (int32_t s = 0; s < P::kStages - 1; s++) {
    if (s < stages) fetch_w(s);
  }
  wait_for_previous();
  let_next_start();
#pragma unroll 1
  for (int32_t s = 0; s < P::kStages - 1; s++) {
    if (s < stages) fetch_x(s);
    end_copies();
  }

  float total[P::kW][P::kX][4] = {};
  for (int32_t s = 0; s < stages; s++) {
    wait_copies<P::kStages - 2>();
    __syncthreads();
    if (s + P::kStages - 1 < stages) fetch_w(s + P::kStages - 1), fetch_x(s + P::kStages - 1);
    end_copies();
    const uint8_t* stage = shared + s % P::kStages * S::kBytes;
    const int32_t have = min(P::kBlocks, blocks - s * P::kBlocks);
#pragma unroll
    for (int b = 0; b < P::kBlocks; b++) {
      if (b >= have) break;
      // A lane takes 8 neighbouring columns of w and of x where the tensor core sees columns 2 i, 8 + 2 i of two products: any order will do.
      int32_t a[P::kW][2][4];
#pragma unroll
      for (int m = 0; m < P::kW; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int r = (tile.along_w * P::kW + m) * 16 + h * 8 + tile.group;
          const int4 v = *reinterpret_cast<const int4*>(stage + r * S::kRowW + b * 64 + tile.i * 16);
          a[m][0][h] = v.x, a[m][0][2 + h] = v.y, a[m][1][h] = v.z, a[m][1][2 + h] = v.w;
        }
      }
#pragma unroll
      for (int n = 0; n < P::kX; n++) {
        const uint8_t* from = stage + S::kAtX + ((tile.along_x * P::kX + n) * 8 + tile.group) * S::kRowX + b * 128 + tile.i * 16;
        const int4 high = *reinterpret_cast<const int4*>(from), low = *reinterpret_cast<const int4*>(from + 64);
#pragma unroll
        for (int m = 0; m < P::kW; m++) {
          const float zero[4] = {};
          float sum[4];
          mma_half<kBf16>(sum, a[m][0], low.x, low.y, zero);
          mma_half<kBf16>(sum, a[m][1], low.z, low.w, sum);
          mma_half<kBf16>(sum, a[m][0], high.x, high.y, sum);
          mma_half<kBf16>(sum, a[m][1], high.z, high.w, sum);
#pragma unroll
          for (int k = 0; k < 4; k++) total[m][n][k] += sum[k];
        }
      }
    }
  }
  wait_copies<0>();
  tile.finish(total, x.factors, reinterpret_cast<float*>(shared), to);
}

template <bool kBf16>
void launch_matmul(Context& ctx, const SplitView& x, const WeightView& w, const WeightView& up, const OutputView& to) {
  const int32_t gated = up.data != nullptr;
  const dim3 grid(divide_up(x.rows, Many::kTokens), divide_up(w.rows, Many::kRows >> gated));
  launch(ctx, matmul_half_kernel<kBf16, Many>, {grid, dim3(kTileThreads), Many::kStages * Stage<Many>::kBytes}, x, w, up, gated, to);
}

}  // namespace

void matmul_half(Context& ctx, const SplitView& x, const WeightView& w, const WeightView& up, const OutputView& to) {
  if (w.dtype == WKV_BF16) launch_matmul<true>(ctx, x, w, up, to);
  else launch_matmul<false>(ctx, x, w, up, to);
}

}  // namespace wkv
`,
  "cuda/matmul_int8.cu": `/**
 * matmul_int8.cu: out[t, j] = x[t] . w[j] for quantised w and x in 8 bits, on the tensor cores.
 *
 * In each block of 32 columns (16 where a type has scales for them) the product is an integer, exact; it is then scaled by w's and x's
 * scale and added in f32, as the CPU does:
 *   total += dot * (w_scale * x_scale) [+ w_least * x_sum]          Q4_0, Q5_0: - w_scale * middle * x_sum, as their values are stored so
 * A block owns kRows rows of w (gated: half of them of gate, half of up) and kTokens rows of x, and walks along C in stages that are copied
 * into shared memory while it works; w is widened to 8 bits in registers. Few rows of x: up to 8 blocks, a cluster, share the columns out
 * and add up their sums out of each other's shared memory, in a fixed order.
 * Bytes moved: w once a kTokens rows of x, x once a kRows rows of w (from the second level).
 */
#include <algorithm>

#include "tile.cuh"

namespace wkv {
namespace {

constexpr int kRoom = 98304;  // bytes of stages: all GPUs have 99 KB a block, and two blocks share a multiprocessor of sm_90

/** Where a stage's parts lie in shared memory, in bytes. Rows are padded so that a warp's reads touch every bank once. */
template <int kType, typename P>
struct Stage {
  static constexpr wkv_form kForm = wkv_form_of(kType);
  static constexpr bool kPair = scale_bytes(kType) == 4;  // scale and minimum
  static constexpr int kData = data_bytes(kType) * P::kBlocks, kHigh = high_bytes(kType) * P::kBlocks, kSubs = subs_bytes(kType) * P::kBlocks;
  static constexpr int kScales = kForm.subs ? 4 : scale_bytes(kType) * P::kBlocks;
  static constexpr int kRowData = kData + 16, kRowHigh = kHigh ? kHigh + 16 : 0, kRowX = P::kBlocks * 32 + 32;
  static constexpr int kAtHigh = P::kRows * kRowData, kAtSubs = kAtHigh + P::kRows * kRowHigh, kAtScales = kAtSubs + P::kRows * kSubs;
  static constexpr int kAtX = kAtScales + P::kRows * kScales, kAtOf = kAtX + P::kTokens * kRowX, kBytes = kAtOf + P::kBlocks * P::kTokens * 8;
  static constexpr int kStages = kRoom / kBytes < P::kStages ? kRoom / kBytes : P::kStages;
  static constexpr int kShared = kStages * kBytes > P::kSums ? kStages * kBytes : P::kSums;
  static_assert(kStages >= 2 && 8 % P::kBlocks == 0 && kBytes % 16 == 0);
};

/** Copies the first \`have\` of kBytes bytes of each of kCount rows, kUnit at once. */
template <int kUnit, int kBytes, int kCount, typename From, typename To>
__device__ inline void copy_rows(int have, From from, To to) {
  constexpr int kUnits = kBytes / kUnit;
#pragma unroll 1
  for (int u = threadIdx.x; u < kCount * kUnits; u += kTileThreads) {
    const int r = u / kUnits, c = u % kUnits * kUnit;
    if (c < have) copy_async<kUnit>(to(r) + c, from(r) + c);
  }
}

template <int kType, typename P>
__global__ void __launch_bounds__(kTileThreads, P::kResident) matmul_int8_kernel(RoundedView x, WeightView w, WeightView up, int32_t gated, OutputView to, int32_t parts) {
  using S = Stage<kType, P>;
  extern __shared__ __align__(16) uint8_t shared[];
  const Tile<P> tile(w, up, gated, x.rows, parts);
  const int32_t blocks = w.columns / 32, stages = (blocks + P::kBlocks - 1) / P::kBlocks, begin = stages * tile.part / parts, count = stages * (tile.part + 1) / parts - begin;
  const auto fetch_w = [&](int32_t s) {
    uint8_t* stage = shared + s % S::kStages * S::kBytes;
    const int32_t first = (begin + s) * P::kBlocks, have = min(P::kBlocks, blocks - first);
    const auto block = [&](int r) { return tile.row_in(r) * blocks + first; };
    copy_rows<16, S::kData, P::kRows>(have * data_bytes(kType), [&](int r) { return tile.weight(r).data + block(r) * data_bytes(kType); }, [&](int r) { return stage + r * S::kRowData; });
    if constexpr (S::kHigh > 0) {
      const auto from = [&](int r) { return tile.weight(r).high + block(r) * high_bytes(kType); };
      const auto place = [&](int r) { return stage + S::kAtHigh + r * S::kRowHigh; };
      if (S::kForm.subs || blocks % 4 == 0) copy_rows<16, S::kHigh, P::kRows>(have * high_bytes(kType), from, place);
      else copy_rows<4, S::kHigh, P::kRows>(have * high_bytes(kType), from, place);
    }
    if constexpr (S::kForm.subs) {
      copy_rows<S::kSubs, S::kSubs, P::kRows>(S::kSubs, [&](int r) { return reinterpret_cast<const uint8_t*>(tile.weight(r).subs + block(r)); }, [&](int r) { return stage + S::kAtSubs + r * S::kSubs; });
      copy_rows<4, 4, P::kRows>(4, [&](int r) { return reinterpret_cast<const uint8_t*>(tile.weight(r).scales + block(r) / 8 * 2); }, [&](int r) { return stage + S::kAtScales + r * 4; });
    } else {
      constexpr int kOne = scale_bytes(kType);
      const auto from = [&](int r) { return reinterpret_cast<const uint8_t*>(tile.weight(r).scales) + block(r) * kOne; };
      const auto place = [&](int r) { return stage + S::kAtScales + r * S::kScales; };
      if (kOne == 4 || blocks % 2 == 0) {
        copy_rows<4, S::kScales, P::kRows>(have * kOne, from, place);
      } else {
#pragma unroll 1
        for (int u = threadIdx.x; u < P::kRows * P::kBlocks; u += kTileThreads) {
          const int r = u / P::kBlocks, b = u % P::kBlocks;
          if (b < have) *reinterpret_cast<__half*>(place(r) + b * kOne) = *reinterpret_cast<const __half*>(from(r) + b * kOne);
        }
      }
    }
  };
  const auto fetch_x = [&](int32_t s) {
    uint8_t* stage = shared + s % S::kStages * S::kBytes;
    const int32_t first = (begin + s) * P::kBlocks, have = min(P::kBlocks, blocks - first);
    copy_rows<16, P::kBlocks * 32, P::kTokens>(have * 32, [&](int t) { return reinterpret_cast<const uint8_t*>(x.q) + (tile.token_in(t) * blocks + first) * 32; }, [&](int t) { return stage + S::kAtX + t * S::kRowX; });
#pragma unroll 1
    for (int u = threadIdx.x; u < P::kBlocks * P::kTokens / 2; u += kTileThreads) {
      const int b = u / (P::kTokens / 2), t = u % (P::kTokens / 2) * 2;
      if (b < have) copy_async<16>(stage + S::kAtOf + (b * P::kTokens + t) * 8, x.of + int64_t{first + b} * x.stride + min(tile.t0 + t, x.stride - 2));
    }
  };

#pragma unroll 1
  for (int32_t s = 0; s < S::kStages - 1; s++) {
    if (s < count) fetch_w(s);
  }
  wait_for_previous();
  let_next_start();
#pragma unroll 1
  for (int32_t s = 0; s < S::kStages - 1; s++) {
    if (s < count) fetch_x(s);
    end_copies();
  }

  // Integers are added to the bits of a float so large that its last place is 1: the sum is that float plus the dot product.
  constexpr float kLarge = 12582912.0f;
  const int32_t large[4] = {0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000};
  const auto real = [](int32_t sum) { return __int_as_float(sum) - kLarge; };
  // Whether each 16 columns have a product of their own; Q2_K's scales go into its few-bit numbers instead, and so do its minima.
  constexpr bool kHalves = S::kForm.halves && kType != WKV_Q2_K;
  constexpr bool kShifted = S::kForm.middle > 0 && !kHalves, kLeast = S::kForm.least || kShifted;
  float total[P::kW][P::kX][4] = {};
#pragma unroll 1
  for (int32_t s = 0; s < count; s++) {
    wait_copies<S::kStages - 2>();
    __syncthreads();
    if (s + S::kStages - 1 < count) fetch_w(s + S::kStages - 1), fetch_x(s + S::kStages - 1);
    end_copies();
    const uint8_t* stage = shared + s % S::kStages * S::kBytes;
    const int32_t have = min(P::kBlocks, blocks - (begin + s) * P::kBlocks);
#pragma unroll(P::kX * P::kW <= 2 ? P::kBlocks : 1)
    for (int b = 0; b < P::kBlocks; b++) {
      if (b >= have) break;
      int32_t a[P::kW][4], minima[P::kW][4];
      float scale[P::kW][2], second_scale[P::kW][2], least[P::kW][2];
#pragma unroll
      for (int m = 0; m < P::kW; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int r = (tile.along_w * P::kW + m) * 16 + h * 8 + tile.group, i = tile.i;
          uint32_t q[2];  // columns 4 i to 4 i + 3, and from 16 on
          const uint32_t* data = reinterpret_cast<const uint32_t*>(stage + r * S::kRowData + b * data_bytes(kType));
          if constexpr (S::kForm.low == 8) q[0] = data[i], q[1] = data[4 + i];
          if constexpr (S::kForm.low == 4) q[0] = data[i] & 0x0f0f0f0fu, q[1] = data[i] >> 4 & 0x0f0f0f0fu;
          if constexpr (S::kForm.low == 2) q[0] = data[0] >> (2 * i) & 0x03030303u, q[1] = data[1] >> (2 * i) & 0x03030303u;
          const uint32_t* high = reinterpret_cast<const uint32_t*>(stage + S::kAtHigh + r * S::kRowHigh + b * high_bytes(kType));
          if constexpr (S::kForm.high == 1) q[0] |= (high[0] >> i & 0x01010101u) << S::kForm.low, q[1] |= (high[0] >> (4 + i) & 0x01010101u) << S::kForm.low;
          if constexpr (S::kForm.high == 2) q[0] |= (high[0] >> (2 * i) & 0x03030303u) << S::kForm.low, q[1] |= (high[1] >> (2 * i) & 0x03030303u) << S::kForm.low;
          if constexpr (kType == WKV_IQ4_NL) q[0] = iq4_values(q[0]), q[1] = iq4_values(q[1]);
          if constexpr (kHalves && S::kForm.middle > 0) q[0] = __vsub4(q[0], S::kForm.middle * 0x01010101u), q[1] = __vsub4(q[1], S::kForm.middle * 0x01010101u);

          const uint8_t* at = stage + S::kAtScales + r * S::kScales + (S::kForm.subs ? 0 : b * scale_bytes(kType));
          float2 of = make_float2(0, 0);
          if constexpr (S::kPair) of = __half22float2(*reinterpret_cast<const __half2*>(at));
          else of.x = __half2float(*reinterpret_cast<const __half*>(at));
          least[m][h] = S::kForm.least ? of.y : 0.0f;
          scale[m][h] = second_scale[m][h] = of.x;
          if constexpr (S::kForm.subs) {
            const uint32_t subs = *reinterpret_cast<const uint16_t*>(stage + S::kAtSubs + r * S::kSubs + b * 2), first = subs & 255, second = subs >> 8;
            if constexpr (kType == WKV_Q2_K) {  // products of 2 and 4 bits are of 6
              q[0] *= first & 15, q[1] *= second & 15;
              minima[m][h] = static_cast<int32_t>((first >> 4) * 0x01010101u), minima[m][2 + h] = static_cast<int32_t>((second >> 4) * 0x01010101u);
              least[m][h] = -of.y;
            } else if constexpr (S::kForm.least) {
              scale[m][h] = of.x * static_cast<float>(first), least[m][h] = -of.y * static_cast<float>(second);
            } else {
              scale[m][h] = of.x * static_cast<float>(static_cast<int8_t>(first)), second_scale[m][h] = of.x * static_cast<float>(static_cast<int8_t>(second));
            }
          }
          if constexpr (kShifted) least[m][h] = -static_cast<float>(S::kForm.middle) * scale[m][h];
          a[m][h] = static_cast<int32_t>(q[0]), a[m][2 + h] = static_cast<int32_t>(q[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < P::kX; n++) {
        const int t = (tile.along_x * P::kX + n) * 8;
        const int2 words = *reinterpret_cast<const int2*>(stage + S::kAtX + (t + tile.group) * S::kRowX + b * 32 + tile.i * 8);
        const float4 of = *reinterpret_cast<const float4*>(stage + S::kAtOf + (b * P::kTokens + t + 2 * tile.i) * 8);
#pragma unroll
        for (int m = 0; m < P::kW; m++) {
          float (&sum)[4] = total[m][n];
          int32_t dot[4], other[4];
          if constexpr (kHalves) {
            mma_int8_short(dot, a[m][0], a[m][1], words.x, large);
            mma_int8_short(other, a[m][2], a[m][3], words.y, large);
#pragma unroll
            for (int k = 0; k < 4; k++) sum[k] = fmaf(fmaf(real(dot[k]), scale[m][k / 2], real(other[k]) * second_scale[m][k / 2]), k % 2 ? of.z : of.x, sum[k]);
          } else {
            mma_int8(dot, a[m], words.x, words.y, large);
            if constexpr (kType == WKV_Q2_K) mma_int8(other, minima[m], words.x, words.y, large);
#pragma unroll
            for (int k = 0; k < 4; k++) {
              const float x_scale = k % 2 ? of.z : of.x, x_sum = k % 2 ? of.w : of.y;
              sum[k] = fmaf(real(dot[k]), scale[m][k / 2] * x_scale, sum[k]);
              if constexpr (kType == WKV_Q2_K) sum[k] = fmaf(real(other[k]), least[m][k / 2] * x_scale, sum[k]);
              else if constexpr (kLeast) sum[k] = fmaf(least[m][k / 2], x_sum, sum[k]);
            }
          }
        }
      }
    }
  }

  wait_copies<0>();
  tile.finish(total, nullptr, reinterpret_cast<float*>(shared), to);
}

template <int kType, typename P>
void launch_matmul(Context& ctx, const RoundedView& x, const WeightView& w, const WeightView& up, const OutputView& to) {
  const int32_t gated = up.data != nullptr, tiles = divide_up(w.rows, P::kRows >> gated), groups = divide_up(x.rows, P::kTokens), stages = divide_up(w.columns / 32, P::kBlocks);
  const int32_t parts = groups == 1 ? share_columns(ctx, tiles, stages) : 1;
  launch(ctx, matmul_int8_kernel<kType, P>, {dim3(groups * parts, tiles), dim3(kTileThreads), Stage<kType, P>::kShared, uint32_t(parts)}, x, w, up, gated, to, parts);
}

template <int kType>
void matmul_typed(Context& ctx, const RoundedView& x, const WeightView& w, const WeightView& up, const OutputView& to) {
  constexpr int kBlocks = data_bytes(kType) + high_bytes(kType) > 20 ? 4 : 8;
  if (x.rows <= 8) return launch_matmul<kType, Plan<8, 1, 1, 1, kBlocks, 5, 2>>(ctx, x, w, up, to);
  if (x.rows <= 16) return launch_matmul<kType, Plan<8, 1, 1, 2, kBlocks, 5, 2>>(ctx, x, w, up, to);
  if (x.rows <= 32) return launch_matmul<kType, Plan<8, 1, 1, 4, 4, 5, 2>>(ctx, x, w, up, to);
  if (x.rows <= 64) return launch_matmul<kType, Plan<8, 1, 1, 8, 4, 5, 2>>(ctx, x, w, up, to);
  launch_matmul<kType, Plan<2, 4, 4, 4, 4, 2, 2>>(ctx, x, w, up, to);
}

}  // namespace

void matmul_int8(Context& ctx, const RoundedView& x, const WeightView& w, const WeightView& up, const OutputView& to) {
  const auto typed = [&](auto type) {
    if constexpr (is_quantised(type.value)) matmul_typed<type.value>(ctx, x, w, up, to);
  };
  if (wkv_has_pieces(w.dtype)) by_pieces(w.dtype, typed);
  else by_type(w.dtype, typed);
}

}  // namespace wkv
`,
  "cuda/matmul_skinny.cu": `/**
 * matmul_skinny.cu: out[t, j] = norm(x[t]) . w[j] for up to 64 rows of x in f32 and f16 or bf16 w, on the tensor cores.
 *
 * As in matmul_half.cu x is the sum of two numbers of w's type, products are exact, and ordinary additions take over every 32 columns. Here
 * w is all there is to move, so a block owns kRows rows of it (gated: 16 of gate and 16 of up in turn) and every row of x: stages of w lie
 * in a ring in shared memory, asked for before x is there; x goes through registers, where it meets the norm's weight and is split, into two
 * buffers, one stage ahead of its use. The norm's scale, known at the end, multiplies the finished sums. \`gridDim.x\` blocks share the columns
 * where rows are few; they are a cluster, and add up their sums in a fixed order out of each other's shared memory.
 * Bytes moved: w once, x once a kRows rows of w (from the second level).
 * Tried and slower (16 rows, Llama-3-8B's products on an H100: 5.8 ms a step): stages of 64 columns, five of them (7.7: a stage then takes as
 * long as x's way from the second level); three stages (5.9); w from memory into registers (6.9); a ring a warp, without barriers (6.7);
 * 16 warps (6.7); later stages asked into the second level before x is there (6.2); one block a multiprocessor that walks over tiles.
 */
#include <algorithm>

#include "tile.cuh"

namespace wkv {
namespace {

constexpr int kThreads = 256;

/** How a block is laid out: warps along w, the rest along the columns; tiles of 16 rows of w and of 8 of x a warp; blocks of 32 columns a
 *  stage; stages; blocks that share a multiprocessor. */
template <int kAlongW_, int kTilesW, int kTilesX, int kBlocks_, int kStages_, int kResident_>
struct Layout {
  static constexpr int kAlongW = kAlongW_, kAlongC = 8 / kAlongW, kW = kTilesW, kX = kTilesX, kBlocks = kBlocks_, kStages = kStages_, kResident = kResident_;
  static constexpr int kRows = 16 * kW * kAlongW, kTokens = 8 * kX;
  static constexpr int kRow = kBlocks * 64;                                     // bytes of a row of w, or of x's high or low half, in a stage
  static constexpr int kStage = kRows * kRow, kHalf = kTokens * kRow;           // bytes
  static constexpr int kAtX = kStages * kStage, kBytes = kAtX + 2 * 2 * kHalf;  // two buffers of x
  static constexpr int kStride = kRows + 4;                                     // of sums
  static constexpr int kShared = std::max(kBytes, kAlongC * kTokens * kStride * 4);
};

/** Where 16 bytes of a stage's row lie: odd rows have their halves of 128 bytes exchanged, so that a warp's reads touch every bank once. */
template <int kBlocks>
__device__ inline int place(int row, int chunk) { return (kBlocks == 1 ? chunk : chunk ^ (row % 2 * 4)) * 16; }

/** Two floats as the sum of two pairs of w's type. */
template <bool kBf16>
__device__ inline void split_pair(float a, float b, uint32_t* high, uint32_t* low) {
  if constexpr (kBf16) {
    const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
    *high = *reinterpret_cast<const uint32_t*>(&h);
    const __nv_bfloat162 l = __floats2bfloat162_rn(a - __uint_as_float(*high << 16), b - __uint_as_float(*high & 0xffff0000u));
    *low = *reinterpret_cast<const uint32_t*>(&l);
  } else {
    const __half2 h = __floats2half2_rn(a, b);
    *high = *reinterpret_cast<const uint32_t*>(&h);
    const __half2 l = __floats2half2_rn(a - __low2float(h), b - __high2float(h));
    *low = *reinterpret_cast<const uint32_t*>(&l);
  }
}

template <bool kBf16, typename P>
__global__ void __launch_bounds__(kThreads, P::kResident) skinny_kernel(InputView in, WeightView w, WeightView up, int32_t gated, OutputView to) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ float factors[2][P::kTokens], squares[P::kTokens], scales[P::kTokens];
  const int32_t blocks = in.columns / 32, stages = (blocks + P::kBlocks - 1) / P::kBlocks, part = blockIdx.x, parts = gridDim.x;
  const int32_t begin = stages * part / parts, count = stages * (part + 1) / parts - begin, j0 = blockIdx.y * (P::kRows >> gated);
  const int warp = threadIdx.x / 32, along_w = warp / P::kAlongC, along_c = warp % P::kAlongC, group = threadIdx.x % 32 / 4, i = threadIdx.x % 4;

  // This thread's 16 bytes of some rows of each stage of w; past the end the last row stands in.
  constexpr int kChunks = P::kBlocks * 4, kRowsAtOnce = kThreads / kChunks, kPasses = P::kRows / kRowsAtOnce;
  const int own_row = threadIdx.x / kChunks, own_chunk = threadIdx.x % kChunks;
  const uint8_t* from[kPasses];
#pragma unroll
  for (int p = 0; p < kPasses; p++) {
    const int r = own_row + p * kRowsAtOnce;
    const int64_t row = min(w.rows - 1, j0 + (gated ? r / 32 * 16 + r % 16 : r));
    from[p] = (gated && r / 16 % 2 ? up.data : w.data) + (row * blocks + begin * P::kBlocks) * 64 + own_chunk * 16;
  }
  const auto fetch = [&](int32_t s) {
    if (s < count && (begin + s) * P::kBlocks + own_chunk / 4 < blocks) {
      uint8_t* stage = shared + s % P::kStages * P::kStage + own_row * P::kRow + place<P::kBlocks>(own_row, own_chunk);
#pragma unroll
      for (int p = 0; p < kPasses; p++) copy_async<16>(stage + p * kRowsAtOnce * P::kRow, from[p] + s * P::kRow);
    }
    end_copies();
  };

  // And its 4 columns of some rows of x.
  constexpr int kFours = P::kBlocks * 8, kTokensAtOnce = kThreads / kFours, kLoads = (P::kTokens + kTokensAtOnce - 1) / kTokensAtOnce;
  const int own_token = threadIdx.x / kFours, own_four = threadIdx.x % kFours;
  float4 next[kLoads], weight = make_float4(1, 1, 1, 1);
  float squared[kLoads] = {};
  const auto load = [&](int32_t s) {
    const int32_t four = (begin + s) * kFours + own_four;
    const bool inside = s < count && four < blocks * 8;
    if (in.norm && inside) weight = __ldg(reinterpret_cast<const float4*>(in.norm) + four);
#pragma unroll
    for (int l = 0; l < kLoads; l++) {
      const int t = own_token + l * kTokensAtOnce;
      next[l] = inside && t < in.rows ? reinterpret_cast<const float4*>(in.x)[int64_t{t} * blocks * 8 + four] : make_float4(0, 0, 0, 0);
    }
  };
  const auto split = [&](int32_t s) {
    uint8_t* buffer = shared + P::kAtX + s % 2 * 2 * P::kHalf;
#pragma unroll
    for (int l = 0; l < kLoads; l++) {
      const int t = own_token + l * kTokensAtOnce;
      if (t >= P::kTokens) break;
      float4 v = next[l];
      squared[l] += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
      if (in.norm) v = make_float4(v.x * weight.x, v.y * weight.y, v.z * weight.z, v.w * weight.w);
      if (!kBf16) {  // f16 has few exponents, so the stage's highest number is brought to 2^14 by a power of two
        float most = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
#pragma unroll
        for (int o = 1; o < kFours; o <<= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));
        const int32_t bits = __float_as_int(most) >> 23, exponent = bits == 0 || bits == 255 ? 127 : max(1, bits - 14);
        const float inverse = __int_as_float((254 - exponent) << 23);
        v = make_float4(v.x * inverse, v.y * inverse, v.z * inverse, v.w * inverse);
        if (own_four == 0) factors[s % 2][t] = __int_as_float(exponent << 23);
      }
      uint2 high, low;
      split_pair<kBf16>(v.x, v.y, &high.x, &low.x), split_pair<kBf16>(v.z, v.w, &high.y, &low.y);
      uint8_t* at = buffer + t * P::kRow + place<P::kBlocks>(t, own_four / 2) + own_four % 2 * 8;
      *reinterpret_cast<uint2*>(at) = high;
      *reinterpret_cast<uint2*>(at + P::kHalf) = low;
    }
  };

#pragma unroll
  for (int s = 0; s < P::kStages - 1; s++) fetch(s);
  wait_for_previous();
  let_next_start();
  load(0);
  split(0);
  load(1);

  float total[P::kW][P::kX][4] = {};
#pragma unroll 1
  for (int32_t s = 0; s < count; s++) {
    wait_copies<P::kStages - 2>();
    __syncthreads();
    fetch(s + P::kStages - 1);
    split(s + 1);
    load(s + 2);
    const uint8_t* stage = shared + s % P::kStages * P::kStage;
    const uint8_t* buffer = shared + P::kAtX + s % 2 * 2 * P::kHalf;
    const int32_t have = min(P::kBlocks, blocks - (begin + s) * P::kBlocks);
#pragma unroll
    for (int block = 0; block < P::kBlocks; block += P::kAlongC) {
      const int b = block + along_c;
      if (b >= have) break;
      // A lane takes 8 neighbouring columns of w and of x where the tensor core sees columns 2 i, 8 + 2 i of two products: any order will do.
      int32_t a[P::kW][2][4];
#pragma unroll
      for (int m = 0; m < P::kW; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int r = (along_w * P::kW + m) * 16 + h * 8 + group;
          const int4 v = *reinterpret_cast<const int4*>(stage + r * P::kRow + place<P::kBlocks>(group, b * 4 + i));
          a[m][0][h] = v.x, a[m][0][2 + h] = v.y, a[m][1][h] = v.z, a[m][1][2 + h] = v.w;
        }
      }
#pragma unroll
      for (int n = 0; n < P::kX; n++) {
        const uint8_t* at = buffer + (n * 8 + group) * P::kRow + place<P::kBlocks>(group, b * 4 + i);
        const int4 high = *reinterpret_cast<const int4*>(at), low = *reinterpret_cast<const int4*>(at + P::kHalf);
        float2 factor = make_float2(1, 1);
        if (!kBf16) factor = *reinterpret_cast<const float2*>(&factors[s % 2][n * 8 + 2 * i]);
#pragma unroll
        for (int m = 0; m < P::kW; m++) {
          const float zero[4] = {};
          float sum[4];
          mma_half<kBf16>(sum, a[m][0], low.x, low.y, zero);
          mma_half<kBf16>(sum, a[m][1], low.z, low.w, sum);
          mma_half<kBf16>(sum, a[m][0], high.x, high.y, sum);
          mma_half<kBf16>(sum, a[m][1], high.z, high.w, sum);
#pragma unroll
          for (int k = 0; k < 4; k++) total[m][n][k] = kBf16 ? total[m][n][k] + sum[k] : fmaf(sum[k], k % 2 ? factor.y : factor.x, total[m][n][k]);
        }
      }
    }
  }

  // Sums of this block: [c][t][r].
  wait_copies<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int m = 0; m < P::kW; m++) {
#pragma unroll
    for (int n = 0; n < P::kX; n++) {
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int t = n * 8 + 2 * i + k % 2, r = (along_w * P::kW + m) * 16 + k / 2 * 8 + group;
        sums[(along_c * P::kTokens + t) * P::kStride + r] = total[m][n][k];
      }
    }
  }
  if (in.norm) {
#pragma unroll
    for (int l = 0; l < kLoads; l++) {
      const int t = own_token + l * kTokensAtOnce;
      if (t >= P::kTokens) break;
#pragma unroll
      for (int o = 1; o < kFours; o <<= 1) squared[l] += __shfl_xor_sync(0xffffffffu, squared[l], o);
      if (own_four == 0) squares[t] = squared[l];
    }
  }
  if (parts > 1) arrive_cluster(), wait_cluster();
  else __syncthreads();
  if (threadIdx.x < P::kTokens) {
    double all = 0.0;
    if (in.norm) {
      for (int32_t rank = 0; rank < parts; rank++) all += parts > 1 ? load_peer(&squares[threadIdx.x], rank) : squares[threadIdx.x];
    }
    scales[threadIdx.x] = in.norm ? 1.0f / sqrtf(static_cast<float>(all / in.columns) + in.epsilon) : 1.0f;
  }
  __syncthreads();
  const auto sum = [&](int t, int r) {
    float all = 0.0f;
#pragma unroll
    for (int c = 0; c < P::kAlongC; c++) {
      const float* at = sums + (c * P::kTokens + t) * P::kStride + r;
      if (parts == 1) {
        all += *at;
        continue;
      }
      float own[kMostParts];
#pragma unroll
      for (int rank = 0; rank < kMostParts; rank++) own[rank] = rank < parts ? load_peer(at, rank) : 0.0f;
#pragma unroll
      for (int rank = 0; rank < kMostParts; rank++) all += own[rank];
    }
    return all * scales[t];
  };
  const int wide = P::kRows >> gated, outputs = wide * in.rows;
  for (int o = outputs * part / parts + threadIdx.x; o < outputs * (part + 1) / parts; o += kThreads) {
    const int t = o / wide, r = gated ? o % wide / 16 * 32 + o % 16 : o % wide;
    const int32_t j = j0 + o % wide;
    if (j < w.rows) to.put(t, j, gated ? activate(to.activation, sum(t, r), sum(t, r + 16)) : sum(t, r));
  }
  if (parts > 1) arrive_cluster(), wait_cluster();  // the others still read
}

template <bool kBf16, typename P>
void launch_skinny(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, const OutputView& to) {
  const int32_t gated = up.data != nullptr, tiles = divide_up(w.rows, P::kRows >> gated);
  const int32_t parts = share_columns(ctx, tiles, divide_up(w.columns, P::kBlocks * 32));
  launch(ctx, skinny_kernel<kBf16, P>, {dim3(parts, tiles), dim3(kThreads), size_t(P::kShared), uint32_t(parts)}, in, w, up, gated, to);
}

template <bool kBf16>
bool skinny_typed(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, const OutputView& to) {
  const auto by = [&](auto layout) {
    launch_skinny<kBf16, decltype(layout)>(ctx, in, w, up, to);
    return true;
  };
  if (in.rows <= 8) return by(Layout<4, 2, 1, 4, 2, 2>());
  if (in.rows <= 16) return by(Layout<8, 1, 2, 4, 2, 2>());
  if (in.rows <= 32) return by(Layout<8, 1, 4, 4, 2, 2>());
  return in.rows <= 64 && by(Layout<8, 2, 8, 2, 2, 1>());
}

}  // namespace

bool matmul_skinny(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, const OutputView& to) {
  return w.dtype == WKV_BF16 ? skinny_typed<true>(ctx, in, w, up, to) : skinny_typed<false>(ctx, in, w, up, to);
}

}  // namespace wkv
`,
  "cuda/matvec.cu": `/**
 * matvec.cu: wkv_linear and wkv_gated for few rows of x, in one launch.
 *
 *   out[t, j] = norm(x[t]) . w[j] + bias[j] (+ out[t, j])          x [rows, C], w [J, C]
 *   out[t, j] = activation(norm(x[t]) . gate[j]) * (norm(x[t]) . up[j])
 *
 * A block holds all of kRows rows of x in shared memory and owns a run of pairs of weight rows: rows 2 p and 2 p + 1 of w, or row p of gate
 * and of up. \`ways\` warps share a pair, each lane with every (32 * ways)th chunk of 16 bytes of both rows; so that small matrices, too, keep
 * all multiprocessors busy. A lane keeps 3 or 4 chunks of each row in flight: it asks for the first before it waits for x, and for another as
 * soon as it has used one. Sums meet in shared memory in a fixed order. Bytes moved: w once a kRows rows.
 * With f32 precision the norm's scale multiplies the finished sum, so it is not waited for; 8 bits are rounded from normed numbers, as the
 * CPU does. Weights are widened in registers.
 */
#include <algorithm>

#include "chunk.cuh"

namespace wkv {
namespace {

constexpr int kThreads = 512;

/** Blocks on a multiprocessor at once. */
constexpr int resident(int rows) { return rows == 1 ? 2 : 1; }

/** How the pairs of a launch are shared out. */
struct Share {
  int32_t pairs, block_pairs, ways, warps;
  bool gated;
};

/** The norm's scale of row t from the warps' sums of squares. */
template <int kRows>
__device__ inline float norm_scale(const double (*area)[kRows], int32_t t, const InputView& in) {
  const int warps = blockDim.x / 32;
  double part[4] = {};
#pragma unroll
  for (int w = 0; w < kThreads / 32; w++) {
    if (w < warps) part[w % 4] += area[w][t];
  }
  return 1.0f / sqrtf(static_cast<float>((part[0] + part[1] + (part[2] + part[3])) / in.columns) + in.epsilon);
}

/** x into shared memory in 8 bits; waits for the norm. */
template <int kType, int kRows>
__device__ inline void stage_int8(const InputView& in, const float* x, int32_t rows, int4* shared, double (*area)[kRows]) {
  const int32_t fours = in.columns / 4, warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = Staged<kType, true>::row(in.columns);
  const float4* x4 = reinterpret_cast<const float4*>(x);
  if (in.norm) {
#pragma unroll
    for (int t = 0; t < kRows; t++) {
      double squares = 0.0;
      if (t < rows) {
        for (int32_t i = threadIdx.x; i < fours; i += blockDim.x) {
          const float4 v = x4[int64_t{t} * fours + i];
          squares += static_cast<double>(v.x) * v.x + static_cast<double>(v.y) * v.y + static_cast<double>(v.z) * v.z + static_cast<double>(v.w) * v.w;
        }
      }
      squares = warp_sum(squares);
      if (lane == 0) area[warp][t] = squares;
    }
    __syncthreads();
  }
  for (int t = 0; t < kRows; t++) {
    const float norm = in.norm ? norm_scale(area, t, in) : 1.0f;
    for (int32_t start = warp * 32; start < fours; start += blockDim.x) {
      const int32_t i = start + lane;
      const bool inside = i < fours;
      float4 v = make_float4(0, 0, 0, 0);
      if (inside && t < rows) v = x4[int64_t{t} * fours + i];
      if (inside && in.norm) {
        const float4 n = __ldg(reinterpret_cast<const float4*>(in.norm) + i);
        v = make_float4(v.x * norm * n.x, v.y * norm * n.y, v.z * norm * n.z, v.w * norm * n.w);
      }
      keep_rounded<kType>(v, i, in.columns, shared + t * row);
    }
  }
}

/** x, times the norm's weight, into shared memory; the scale that norm_scale() gives is left to do. */
template <int kType, int kRows>
__device__ inline void stage_f32(const InputView& in, const float* x, int32_t rows, int4* shared, double (*area)[kRows]) {
  constexpr int kFours = ChunkOf<kType>::kFours;
  const int32_t fours = in.columns / 4, plane = Staged<kType, false>::plane(in.columns), row = Staged<kType, false>::row(in.columns);
#pragma unroll
  for (int t = 0; t < kRows; t++) {
    const float4* from = reinterpret_cast<const float4*>(x) + int64_t{t} * fours;
    float4* to = reinterpret_cast<float4*>(shared) + t * row;
    float squares = 0.0f;
#pragma unroll 2
    for (int32_t i = threadIdx.x; i < fours; i += blockDim.x) {
      float4 v = t < rows ? from[i] : make_float4(0, 0, 0, 0);
      if (in.norm) {
        const float4 n = __ldg(reinterpret_cast<const float4*>(in.norm) + i);
        squares += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
        v = make_float4(v.x * n.x, v.y * n.y, v.z * n.z, v.w * n.w);
      }
      to[i % kFours * plane + i / kFours] = v;
    }
    if (in.norm) {
      const double total = warp_sum(static_cast<double>(squares));
      if (threadIdx.x % 32 == 0) area[threadIdx.x / 32][t] = total;
    }
  }
}

template <int kType, bool kInt8, int kRows>
__global__ void __launch_bounds__(kThreads, resident(kRows)) matvec_kernel(InputView in, WeightView w, WeightView second, OutputView to, Share share) {
  extern __shared__ int4 shared[];
  __shared__ double area[kThreads / 32][kRows];
  __shared__ float norm_scales[kRows];
  constexpr int kColumns = ChunkOf<kType>::kColumns, kFours = ChunkOf<kType>::kFours, kDepth = wkv_has_pieces(kType) ? 2 : kType >= WKV_Q8_0 ? 3 : 4;
  const int32_t chunks = in.columns / kColumns, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t way = warp % share.ways, groups = share.warps / share.ways, first = way * 32 + lane, step = share.ways * 32;
  const int32_t first_pair = blockIdx.x * share.block_pairs, pairs = min(share.block_pairs, share.pairs - first_pair);
  const int32_t group = warp < share.warps ? warp / share.ways : pairs;
  const int32_t t0 = blockIdx.y * kRows, rows = min(kRows, in.rows - t0);
  const int32_t row = Staged<kType, kInt8>::row(in.columns), plane = Staged<kType, kInt8>::plane(in.columns);
  float* sums = reinterpret_cast<float*>(shared + kRows * row);  // [pair][row of the pair][t][way]

  // What comes next: chunk \`next\` of the pair whose rows begin at chunks \`start_a\` and \`start_b\`.
  ChunkOf<kType> a[kDepth], b[kDepth];
  int32_t next_pair = group, next = first;
  uint32_t start_a, start_b;
  const auto begin_pair = [&] {
    const uint32_t p = first_pair + next_pair;
    start_a = (share.gated ? p : 2 * p) * chunks;
    start_b = share.gated || 2 * p + 1 == uint32_t(w.rows) ? start_a : start_a + chunks;
  };
  begin_pair();
  const auto load = [&](int slot) {
    if (next_pair >= pairs) return;
    if (next < chunks) a[slot].load(w, start_a + next), b[slot].load(second, start_b + next);
    next += step;
    if (next >= chunks + lane) {  // the same in all lanes
      next = first, next_pair += groups;
      begin_pair();
    }
  };
#pragma unroll
  for (int slot = 0; slot < kDepth; slot++) load(slot);
  if (in.norm) {  // into the second-level cache
    for (int32_t c = threadIdx.x * 32; c < in.columns; c += blockDim.x * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(in.norm + c) : "memory");
  }

  wait_for_previous();
  let_next_start();
  const float* x = in.x + int64_t{t0} * in.columns;
  if constexpr (kInt8) stage_int8<kType, kRows>(in, x, rows, shared, area);
  else stage_f32<kType, kRows>(in, x, rows, shared, area);
  __syncthreads();
  if (threadIdx.x < kRows) norm_scales[threadIdx.x] = kInt8 || !in.norm ? 1.0f : norm_scale(area, threadIdx.x, in);

  float total_a[kRows] = {}, total_b[kRows] = {};
  int32_t pair = group, at = first;
  while (pair < pairs) {
#pragma unroll
    for (int slot = 0; slot < kDepth; slot++) {
      if (pair >= pairs) break;
      if (at < chunks) {
#pragma unroll
        for (int t = 0; t < kRows; t++) {
          const int4* from = shared + t * row;
          if constexpr (kInt8) {
            const float2 of = reinterpret_cast<const float2*>(from + in.columns / 16)[at * kColumns / 32];
            const int4 low = from[at], high = kType == WKV_Q8_0 ? make_int4(0, 0, 0, 0) : from[chunks + at];
            total_a[t] += a[slot].product(low, high, of), total_b[t] += b[slot].product(low, high, of);
          } else {
#pragma unroll
            for (int p = 0; p < kFours; p++) {
              const float4 y = reinterpret_cast<const float4*>(from)[p * plane + at], u = a[slot].four(p), v = b[slot].four(p);
              total_a[t] = fmaf(u.x, y.x, fmaf(u.y, y.y, fmaf(u.z, y.z, fmaf(u.w, y.w, total_a[t]))));
              total_b[t] = fmaf(v.x, y.x, fmaf(v.y, y.y, fmaf(v.z, y.z, fmaf(v.w, y.w, total_b[t]))));
            }
          }
        }
      }
      load(slot);
      at += step;
      if (at < chunks + lane) continue;
#pragma unroll
      for (int t = 0; t < kRows; t++) {
        const float sum_a = warp_sum(total_a[t]), sum_b = warp_sum(total_b[t]);
        if (lane == 0) sums[(pair * 2 * kRows + t) * share.ways + way] = sum_a, sums[((pair * 2 + 1) * kRows + t) * share.ways + way] = sum_b;
        total_a[t] = total_b[t] = 0.0f;
      }
      at = first, pair += groups;
    }
  }
  __syncthreads();

  const auto sum = [&](int32_t local, int32_t t) {
    float total = 0.0f;
    for (int32_t i = 0; i < share.ways; i++) total += sums[(local * kRows + t) * share.ways + i];
    return total * norm_scales[t];
  };
  const int32_t wide = share.gated ? pairs : 2 * pairs;
  for (int32_t o = threadIdx.x; o < wide * rows; o += blockDim.x) {
    const int32_t t = o / wide, local = o % wide;
    if (share.gated) to.put(t0 + t, first_pair + local, activate(to.activation, sum(2 * local, t), sum(2 * local + 1, t)));
    else if (first_pair * 2 + local < w.rows) to.put(t0 + t, first_pair * 2 + local, sum(local, t));
  }
}

constexpr int32_t kMostPairs = 512, kMostSums = 4096;  // of a block

/** Gives each multiprocessor the blocks it can hold, and their warps the same number of steps. With one block of one row of x the head of
 *  Llama 3 read 3.16 TB/s on an H200, with two 4.14; with three or four, which do not all run at once, 3.71 and 3.95. */
Share share_out(int32_t pairs, int32_t chunks, int32_t rows, int32_t processors) {
  Share best{pairs, std::min(kMostPairs, divide_up(pairs, processors * resident(rows))), 1, 0, false};
  int64_t least = INT64_MAX;
  for (int32_t ways = 1; ways <= kThreads / 32; ways *= 2) {
    if (ways > 1 && best.block_pairs * 2 * rows * ways > kMostSums) break;
    const int64_t steps = int64_t{divide_up(best.block_pairs, kThreads / 32 / ways)} * (2 * divide_up(chunks, 32 * ways) + 1);
    if (steps < least) least = steps, best.ways = ways;
  }
  best.warps = std::min(kThreads / 32, best.block_pairs * best.ways);
  return best;
}

template <int kType, bool kInt8, int kRows>
bool launch_matvec(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, const OutputView& to) {
  const int32_t chunks = in.columns / chunk_columns(kType);
  Share share = share_out(up.data ? w.rows : divide_up(w.rows, 2), chunks, kRows, ctx.processors);
  share.gated = up.data != nullptr;
  const size_t shared = size_t(kRows) * Staged<kType, kInt8>::row(in.columns) * 16 + size_t(share.block_pairs) * 2 * kRows * share.ways * 4;
  if (shared + 1024 > size_t(ctx.shared_limit)) return false;
  const int32_t warps = std::max(share.warps, std::min(kThreads / 32, divide_up(in.columns, 128)));  // those without a pair help with x
  launch(ctx, matvec_kernel<kType, kInt8, kRows>, {dim3(divide_up(share.pairs, share.block_pairs), divide_up(in.rows, kRows)), dim3(warps * 32), shared}, in, w, share.gated ? up : w, to, share);
  return true;
}

template <int kType, bool kInt8>
bool matvec_typed(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, const OutputView& to) {
  if (in.columns % chunk_columns(kType) != 0 || int64_t{w.rows} * (in.columns / chunk_columns(kType)) > UINT32_MAX) return false;
  if (in.rows > 1 && launch_matvec<kType, kInt8, 4>(ctx, in, w, up, to)) return true;
  return launch_matvec<kType, kInt8, 1>(ctx, in, w, up, to);
}

}  // namespace

bool matvec(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, bool int8, const OutputView& to) {
  if (up.data && w.dtype != up.dtype) return false;
  if (wkv_has_pieces(w.dtype)) {
    return int8 && by_pieces(w.dtype, [&](auto type) { return matvec_typed<type.value, true>(ctx, in, w, up, to); });
  }
  return by_type(w.dtype, [&](auto type) {
    if constexpr (is_quantised(type.value)) {
      if (int8) return matvec_typed<type.value, true>(ctx, in, w, up, to);
    }
    return matvec_typed<type.value, false>(ctx, in, w, up, to);
  });
}

}  // namespace wkv
`,
  "cuda/mma.cuh": `/** mma.cuh: copies into shared memory that do not wait, products of the tensor cores (sm_80 and later), and clusters (sm_90). */
#pragma once
#include <cstdint>

namespace wkv {

template <int kBytes>
__device__ inline void copy_async(void* shared, const void* from) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes) : "memory");
}
__device__ inline void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/** Waits until all but the last kLeft groups of this thread's copies have arrived. */
template <int kLeft>
__device__ inline void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory"); }

/** d = a [16 x 32] . b [32 x 8] + c in integers. Lane 4 g + i has a: 4 columns from 4 i of row g, of row g + 8, and both from 16 + 4 i;
 *  b: 4 rows from 4 i of column g, and from 16 + 4 i; c, d: columns 2 i, 2 i + 1 of row g, then of row g + 8. */
__device__ inline void mma_int8(int32_t (&d)[4], const int32_t (&a)[4], int32_t b0, int32_t b1, const int32_t (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

/** The same of 16 columns: a without what lies from 16 + 4 i on, b without b1. */
__device__ inline void mma_int8_short(int32_t (&d)[4], int32_t a0, int32_t a1, int32_t b, const int32_t (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(b), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

/** d = a [16 x 16] . b [16 x 8] + c in f32, a and b f16 or bf16. Lane 4 g + i has a: columns 2 i, 2 i + 1 of row g, of row g + 8, and both from
 *  8 + 2 i; b: rows 2 i, 2 i + 1 of column g, and from 8 + 2 i; c, d as above. */
template <bool kBf16>
__device__ inline void mma_half(float (&d)[4], const int32_t (&a)[4], int32_t b0, int32_t b1, const float (&c)[4]) {
  if constexpr (kBf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
}

/** Blocks that a cluster can have on every GPU that has clusters. */
constexpr int kMostParts = 8;

__device__ inline void arrive_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ inline void wait_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
/** A float of shared memory in block \`rank\` of the cluster. */
__device__ inline float load_peer(const float* own, int32_t rank) {
  float value = 0.0f;
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(own))), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
#endif
  return value;
}
/** The sum of this float over the cluster's blocks, in their order. */
__device__ inline float sum_peers(const float* own, int32_t parts) {
  float each[kMostParts], all = 0.0f;
#pragma unroll
  for (int rank = 0; rank < kMostParts; rank++) each[rank] = rank < parts ? load_peer(own, rank) : 0.0f;
#pragma unroll
  for (int rank = 0; rank < kMostParts; rank++) all += each[rank];
  return all;
}

}  // namespace wkv
`,
  "cuda/prefill.cu": `/**
 * prefill.cu: wkv_prefill, many tokens of one sequence at once: causal attention whose columns are also summed into the scores.
 *
 *   p[t, i] = softmax_i(scale * rotate(q[t], len + t) . rotate(k[i], i)),  i <= len + t;  out[t] = sum_i p[t, i] v[i]
 *   (scores capped, and i > len + t - window, where asked)
 *   a[i] += mean_g sum_t p[t, i]
 *
 * Six launches; no matrix of rows x length is ever in memory. Columns are counted by entry: the cached slots as they lie, then the new
 * tokens (softmax and sums do not mind the order).
 * 1. arrive: rounds the new k and v to what will be stored, and leaves q, scaled, and all k, both rotated, and all v in scratch, as rows
 *    of one width, so that whatever follows loads plain tiles, or as tiles, with zeros behind the last row. A warp owns a row.
 * 2. forward: a block owns 64 or 128 rows of one query head and walks over the entries with a running maximum; it leaves out and each
 *    row's logarithm of its sum, \`lse\`. Bytes moved: K and V once a block, mostly from the second-level cache.
 * 3. columns: a block owns 64 or 128 entries for one query head and walks over the rows that see them: p = 2^(score - lse). Bytes moved:
 *    q once a block, from the second-level cache.
 * 4. join: a thread owns an entry and adds its query heads' columns to its score.
 * 5. settle: a block owns one KV head and brings it back to its budget; nothing to do while tokens fit.
 * 6. place: a warp owns 8 entries and writes their state, and the rows of new ones, to the cache. Bytes moved: new rows twice.
 * Scores are in units of ln 2: q is scaled by scale / ln 2.
 *
 * 2 and 3 come thrice. With a 16-bit cache: on tensor cores, q, rotated k, v and p rounded to f16 (bf16 values are exact in it unless
 * tiny), sums in f32; many rows of heads of up to 128 dimensions on sm_90a by prefill_wgmma.cu, others here. With an f32 cache, or heads
 * wider than 256: in f32 throughout.
 */
#include <algorithm>
#include <type_traits>

#include "fours.cuh"
#include "prefill.cuh"
#include "settle.cuh"

namespace wkv {
namespace {

constexpr float kPerLn2 = 1.44269504f;

// ---- arrive ----

/** As scratch holds it; what f16 does not reach is cut off, but what is no number or infinite stays so, to be found. */
template <typename S>
__device__ S narrowed(float x);
template <>
__device__ float narrowed<float>(float x) { return x; }
template <>
__device__ __half narrowed<__half>(float x) {
  return __float2half_rn(fabsf(x) > 65504.0f && fabsf(x) < INFINITY ? copysignf(65504.0f, x) : x);
}

__device__ inline float2 turned(float2 x, float2 turn) { return make_float2(x.x * turn.x - x.y * turn.y, x.y * turn.x + x.x * turn.y); }
template <typename T>
__device__ float2 rounded(float2 x) { return make_float2(to_float(from_float<T>(x.x)), to_float(from_float<T>(x.y))); }

/** A row of scratch. */
template <typename S>
struct ScratchRow {
  S* rows;
  int64_t row;
  int32_t width;
  bool tiled;
  __device__ void put(int32_t d, float x) const { rows[tiled ? tiled_at(row, d, width) : row * width + d] = narrowed<S>(x); }
};

/** One row by a warp: pair(i) gives the dimensions i and i + pairs, single(d) those that are not rotated; then zeros. */
template <typename S, typename Pair, typename Single>
__device__ void write_row(const CacheView& c, const ScratchRow<S>& to, Pair pair, Single single) {
  const int32_t lane = threadIdx.x & 31, pairs = c.rope.pairs;
  for (int32_t i = lane; i < pairs; i += 32) {
    const float2 x = pair(i);
    to.put(i, x.x), to.put(i + pairs, x.y);
  }
  for (int32_t d = 2 * pairs + lane; d < c.head_dim; d += 32) to.put(d, single(d));
  for (int32_t d = c.head_dim + lane; d < to.width; d += 32) to.put(d, 0.0f);
}

/** T: the cache's type, S: that of the scratch rows. */
template <typename T, typename S>
__global__ void __launch_bounds__(256) arrive_kernel(PrefillView p) {
  wait_for_previous();
  let_next_start();
  const CacheView& c = p.cache;
  const RopeView& rope = c.rope;
  const int32_t which = blockIdx.y, dim = c.head_dim, pairs = rope.pairs, lane = threadIdx.x & 31;
  const int32_t first = blockIdx.x * 8 + (threadIdx.x >> 5), step = gridDim.x * 8;
  const int32_t n = which < c.heads ? which / c.group() : which - c.heads;
  const Counts& counts = c.counts[p.head(n)];
  const int32_t kept = counts.kept, columns = p.row.columns(dim);
  const int64_t place = c.text ? counts.steps : kept;
  const auto row_of = [&](S* rows, int32_t row) { return ScratchRow<S>{rows, row, p.width, p.tiled}; };
  const auto clear_row = [&](const ScratchRow<S>& to) {
    for (int32_t d = lane; d < p.width; d += 32) to.put(d, 0.0f);
  };
  const auto source = [&](const float* from, int32_t i) { return make_float2(from[rope.source(i)], from[rope.source(i + pairs)]); };
  if (which < c.heads) {
    for (int32_t t = first; t < p.lines; t += step) {
      const auto to = row_of(p.queries_of<S>(which), t);
      if (t >= p.rows) {
        clear_row(to);
        continue;
      }
      const float* from = p.qkv + int64_t{t} * columns + p.row.query(0, which) * dim;
      const auto pair = [&](int32_t i) {
        const float2 x = turned(source(from, i), rope.at(place + t, i));
        return make_float2(x.x * p.scale, x.y * p.scale);
      };
      write_row(c, to, pair, [&](int32_t d) { return from[d] * p.scale; });
    }
    return;
  }
  const T *stored_keys = c.keys_of<T>(p.head(n)), *stored_values = c.values_of<T>(p.head(n));
  const int32_t* ranks = c.ranks + p.head(n) * (c.slots + 1);
  const int32_t length = kept + p.rows, end = p.tiled ? tiles_of(length) * kTile : length;
  for (int32_t i = first; i < end; i += step) {
    const auto key = row_of(p.keys_of<S>(n), i), value = row_of(p.values_of<S>(n), i);
    if (i >= length) {
      clear_row(key), clear_row(value);
      continue;
    }
    if (i < kept) {
      const T *from_key = stored_keys + int64_t{i} * dim, *from_value = stored_values + int64_t{i} * dim;
      const auto pair = [&](int32_t j) {
        const float2 x = make_float2(to_float(from_key[j]), to_float(from_key[j + pairs]));
        return c.text ? x : turned(x, rope.at(ranks[i], j));
      };
      write_row(c, key, pair, [&](int32_t d) { return to_float(from_key[d]); });
      for (int32_t d = lane; d < p.width; d += 32) value.put(d, d < dim ? to_float(from_value[d]) : 0.0f);
      continue;
    }
    const int32_t t = i - kept;
    const float* from_row = p.qkv + int64_t{t} * columns;
    const float *from_key = from_row + p.row.key(n) * dim, *from_value = from_row + p.row.value(n) * dim;
    T *new_key = p.new_keys_of<T>(n) + int64_t{t} * dim, *new_value = p.new_values_of<T>(n) + int64_t{t} * dim;
    const auto pair = [&](int32_t j) {
      const float2 x = source(from_key, j), turn = rope.at(place + t, j), kept_as = rounded<T>(c.text ? turned(x, turn) : x);
      new_key[j] = from_float<T>(kept_as.x), new_key[j + pairs] = from_float<T>(kept_as.y);
      return c.text ? kept_as : turned(kept_as, turn);
    };
    write_row(c, key, pair, [&](int32_t d) { return to_float(new_key[d] = from_float<T>(from_key[d])); });
    for (int32_t d = lane; d < p.width; d += 32) {
      float x = 0.0f;
      if (d < dim) x = to_float(new_value[d] = from_float<T>(from_value[d]));
      value.put(d, x);
    }
  }
}

/** The pairs [i, i + 4) of a row: the four from dimension i on, and those \`pairs\` further. */
struct Pairs {
  Four<float> low, high;
  __device__ Pairs turned(const RopeView& rope, int64_t position, int32_t i) const {
    Pairs to;
    if (position < rope.positions) {
      const int64_t at = position * rope.pairs + i;
      const Four<float> cosine = four_at(rope.cosines + at), sine = four_at(rope.sines + at);
#pragma unroll
      for (int k = 0; k < 4; k++) to.low.x[k] = low.x[k] * cosine.x[k] - high.x[k] * sine.x[k], to.high.x[k] = high.x[k] * cosine.x[k] + low.x[k] * sine.x[k];
      return to;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float2 both = wkv::turned(make_float2(low.x[k], high.x[k]), rope.at(position, i + k));
      to.low.x[k] = both.x, to.high.x[k] = both.y;
    }
    return to;
  }
};

/** arrive for 16-bit caches whose rows are pairs through and through, a multiple of 4 of them: a thread takes 8 numbers of a row. */
template <typename T>
__global__ void __launch_bounds__(256) arrive_fours_kernel(PrefillView p) {
  wait_for_previous();
  let_next_start();
  const CacheView& c = p.cache;
  const RopeView& rope = c.rope;
  const int32_t which = blockIdx.y, dim = c.head_dim, pairs = rope.pairs, parts = p.width / 8;
  const int32_t n = which < c.heads ? which / c.group() : which - c.heads;
  const Counts& counts = c.counts[p.head(n)];
  const int32_t kept = counts.kept, columns = p.row.columns(dim), length = kept + p.rows;
  const int64_t place = c.text ? counts.steps : kept;
  const auto put = [&](__half* rows, int32_t row, int32_t d, const Four<float>& x) {
    four_at(rows + (p.tiled ? tiled_at(row, d, p.width) : int64_t{row} * p.width + d)) = each<__half>(x, [](float v, int) { return narrowed<__half>(v); });
  };
  const auto put_pairs = [&](__half* rows, int32_t row, int32_t i, const Pairs& x) { put(rows, row, i, x.low), put(rows, row, i + pairs, x.high); };
  const auto source = [&](const float* from, int32_t i) {
    if (!rope.interleaved) return Pairs{four_at(from + i), four_at(from + i + pairs)};
    const Four<float> a = four_at(from + 2 * i), b = four_at(from + 2 * i + 4);
    return Pairs{{a.x[0], a.x[2], b.x[0], b.x[2]}, {a.x[1], a.x[3], b.x[1], b.x[3]}};
  };
  const auto widened = [](const Four<T>& x) { return each<float>(x, [](T v, int) { return to_float(v); }); };
  const auto narrow = [](const Four<float>& x) { return each<T>(x, [](float v, int) { return from_float<T>(v); }); };
  const bool query = which < c.heads;
  const int32_t end = query ? static_cast<int32_t>(p.lines) : p.tiled ? tiles_of(length) * kTile : length, full = query ? p.rows : length;
  for (int64_t item = int64_t{blockIdx.x} * 256 + threadIdx.x; item < int64_t{end} * parts; item += int64_t{gridDim.x} * 256) {
    const int32_t row = static_cast<int32_t>(item / parts), part = static_cast<int32_t>(item % parts), i = part * 4, d = part * 8;
    if (row >= full || d >= dim) {
      // Behind the last row, and behind a row's end.
      for (int32_t o = 0; o < 8; o += 4) {
        if (query) put(p.queries_of<__half>(which), row, d + o, {});
        else put(p.keys_of<__half>(n), row, d + o, {}), put(p.values_of<__half>(n), row, d + o, {});
      }
      continue;
    }
    if (query) {
      Pairs x = source(p.qkv + int64_t{row} * columns + p.row.query(0, which) * dim, i).turned(rope, place + row, i);
#pragma unroll
      for (int k = 0; k < 4; k++) x.low.x[k] *= p.scale, x.high.x[k] *= p.scale;
      put_pairs(p.queries_of<__half>(which), row, i, x);
      continue;
    }
    __half *keys = p.keys_of<__half>(n), *values = p.values_of<__half>(n);
    if (row < kept) {
      const T *key = c.keys_of<T>(p.head(n)) + int64_t{row} * dim, *value = c.values_of<T>(p.head(n)) + int64_t{row} * dim;
      const Pairs x{widened(four_at(key + i)), widened(four_at(key + i + pairs))};
      put_pairs(keys, row, i, c.text ? x : x.turned(rope, c.ranks[p.head(n) * (c.slots + 1) + row], i));
      for (int32_t o = 0; o < 8; o += 4) put(values, row, d + o, widened(four_at(value + d + o)));
      continue;
    }
    const int32_t t = row - kept;
    const float* from_row = p.qkv + int64_t{t} * columns;
    const float *key = from_row + p.row.key(n) * dim, *value = from_row + p.row.value(n) * dim;
    T *new_key = p.new_keys_of<T>(n) + int64_t{t} * dim, *new_value = p.new_values_of<T>(n) + int64_t{t} * dim;
    Pairs x = source(key, i);
    if (c.text) x = x.turned(rope, place + t, i);
    const Four<T> low = narrow(x.low), high = narrow(x.high);
    four_at(new_key + i) = low, four_at(new_key + i + pairs) = high;
    x = {widened(low), widened(high)};
    put_pairs(keys, row, i, c.text ? x : x.turned(rope, place + t, i));
    for (int32_t o = 0; o < 8; o += 4) {
      const Four<T> v = narrow(four_at(value + d + o));
      four_at(new_value + d + o) = v;
      put(values, row, d + o, widened(v));
    }
  }
}

// ---- on tensor cores ----

constexpr int kThreads = 128, kWarps = kThreads / 32;

/** Shared rows are 16 bytes longer than wide, so that the 8 rows that one ldmatrix reads lie in different banks. */
template <int kDim>
constexpr int kStride = kDim + 8;

__device__ inline uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }
__device__ inline void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/** Starts the copy of kRows rows from \`from\` into shared memory, zeros from row \`count\` on (of which nothing is read). */
template <int kDim, int kRows>
__device__ void copy_rows(__half* to, const __half* from, int32_t count) {
  constexpr int kParts = kDim / 8, kStep = kThreads / kParts;  // 16 bytes a part; rows a step
  const int32_t row = threadIdx.x / kParts, part = threadIdx.x % kParts;
  const uint32_t to_at = shared_address(to + row * kStride<kDim> + part * 8);
  from += threadIdx.x * 8;
#pragma unroll
  for (int k = 0; k < kRows / kStep; k++) {
    const uint32_t bytes = row + k * kStep < count ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_at + k * kStep * kStride<kDim> * 2), "l"(from + k * kThreads * 8), "r"(bytes) : "memory");
  }
}

/** Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8 and gets (l / 4, 2 (l % 4)) and its right neighbour. */
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}
__device__ inline void load_matrices_across(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}

/** c [16, 8] += a [16, 16] b [16, 8]. Lane l holds c at row l / 4 (0, 1) and l / 4 + 8 (2, 3), columns 2 (l % 4) and the next. */
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/** Where a lane's ldmatrix of a [16, 16] left factor begins: rows 0-7, 8-15, then the same 8 columns on. */
template <int kDim>
__device__ uint32_t left_address(const __half* tile) {
  const int lane = threadIdx.x & 31;
  return shared_address(tile + lane % 16 * kStride<kDim> + lane / 16 * 8);
}
/** The same for two [16, 8] right factors that lie as rows of [16, 16], each row a column: columns 0-7, then 8-15. */
template <int kDim>
__device__ uint32_t right_address(const __half* tile) {
  const int lane = threadIdx.x & 31;
  return shared_address(tile + (lane / 16 * 8 + lane % 8) * kStride<kDim> + lane / 8 % 2 * 8);
}
template <int kDim>
__device__ constexpr uint32_t offset_of(int row, int column) { return (row * kStride<kDim> + column) * 2; }

/** A warp owns kTiles times 16 rows; kKeys entries at a time. */
template <int kDim, int kTiles, int kKeys>
constexpr size_t forward_shared() { return size_t(kTiles * 16 * kWarps + 2 * kKeys) * kStride<kDim> * 2; }

/** kBent: scores may be capped or windowed. */
template <int kDim, int kTiles, int kKeys, bool kBent>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(PrefillView p, Faults faults) {
  extern __shared__ uint4 shared16[];
  wait_for_previous();
  let_next_start();
  constexpr int kRows = kTiles * 16 * kWarps;
  const CacheView& c = p.cache;
  const int32_t warp = threadIdx.x >> 5, lane = threadIdx.x & 31, h = blockIdx.x, n = h / c.group();
  const int32_t t0 = (gridDim.y - 1 - blockIdx.y) * kRows;  // the longest first
  const int32_t kept = c.counts[p.head(n)].kept, length = kept + min(t0 + kRows, p.rows);
  const int32_t warp_t = t0 + warp * kTiles * 16, reach = kept + warp_t;  // the last entry that the warp's first row sees
  __half* q = reinterpret_cast<__half*>(shared16);
  __half *key = q + kRows * kStride<kDim>, *value = key + kKeys * kStride<kDim>;
  const __half *keys = p.keys_of<__half>(n), *values = p.values_of<__half>(n);
  const uint32_t q_at = left_address<kDim>(q + warp * kTiles * 16 * kStride<kDim>), key_at = right_address<kDim>(key);
  const uint32_t value_at = left_address<kDim>(value);  // across, this gives right factors

  copy_rows<kDim, kRows>(q, p.queries_of<__half>(h) + int64_t{t0} * kDim, p.rows - t0);
  copy_rows<kDim, kKeys>(key, keys, length);
  float acc[kTiles][kDim / 8][4] = {}, most[kTiles][2], sum[kTiles][2] = {};
#pragma unroll
  for (int m = 0; m < kTiles; m++) most[m][0] = most[m][1] = -INFINITY;

  for (int32_t first = 0; first < length; first += kKeys) {
    const bool seen = first <= reach + kTiles * 16 - 1;  // by some row of this warp
    float s[kTiles][kKeys / 8][4] = {};
    copy_wait();
    __syncthreads();
    copy_rows<kDim, kKeys>(value, values + int64_t{first} * kDim, length - first);
    if (seen) {
#pragma unroll
      for (int k = 0; k < kDim; k += 16) {
        uint32_t a[kTiles][4];
#pragma unroll
        for (int m = 0; m < kTiles; m++) load_matrices(a[m], q_at + offset_of<kDim>(m * 16, k));
#pragma unroll
        for (int i = 0; i < kKeys / 16; i++) {
          uint32_t b[4];
          load_matrices(b, key_at + offset_of<kDim>(i * 16, k));
#pragma unroll
          for (int m = 0; m < kTiles; m++) multiply(s[m][2 * i], a[m], b[0], b[1]), multiply(s[m][2 * i + 1], a[m], b[2], b[3]);
        }
      }
    }
    copy_wait();
    __syncthreads();
    if (first + kKeys < length) copy_rows<kDim, kKeys>(key, keys + int64_t{first + kKeys} * kDim, length - first - kKeys);
    if (!seen) continue;
    if constexpr (kBent) {
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
#pragma unroll
        for (int i = 0; i < kKeys / 8; i++) {
#pragma unroll
          for (int x = 0; x < 4; x++) s[m][i][x] = p.bend(s[m][i][x], n, kept, min(first + i * 8 + lane % 4 * 2 + x % 2, length - 1), warp_t + m * 16 + x / 2 * 8 + lane / 4);
        }
      }
    }
    if (first + kKeys - 1 > reach) {
      const int32_t ahead = reach - first + lane / 4 - lane % 4 * 2;
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
#pragma unroll
        for (int i = 0; i < kKeys / 8; i++) {
#pragma unroll
          for (int x = 0; x < 4; x++) {
            if (i * 8 + x % 2 > ahead + m * 16 + x / 2 * 8) s[m][i][x] = -INFINITY;
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        // The first entry has a finite score for every row, so \`highest\` is finite; rows past the end are never written.
        float highest = most[m][r];
#pragma unroll
        for (int i = 0; i < kKeys / 8; i++) highest = fmaxf(highest, fmaxf(s[m][i][2 * r], s[m][i][2 * r + 1]));
        highest = quad_max(highest);
        const float shrink = power_of_2(most[m][r] - highest);
        most[m][r] = highest;
        float add = 0.0f;
#pragma unroll
        for (int i = 0; i < kKeys / 8; i++) {
          s[m][i][2 * r] = power_of_2(s[m][i][2 * r] - highest);
          s[m][i][2 * r + 1] = power_of_2(s[m][i][2 * r + 1] - highest);
          add += s[m][i][2 * r] + s[m][i][2 * r + 1];
        }
        sum[m][r] = sum[m][r] * shrink + add;
#pragma unroll
        for (int i = 0; i < kDim / 8; i++) acc[m][i][2 * r] *= shrink, acc[m][i][2 * r + 1] *= shrink;
      }
    }
#pragma unroll
    for (int k = 0; k < kKeys / 16; k++) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
        const float(&left)[4] = s[m][2 * k], (&right)[4] = s[m][2 * k + 1];
        a[m][0] = packed(left[0], left[1]), a[m][1] = packed(left[2], left[3]), a[m][2] = packed(right[0], right[1]), a[m][3] = packed(right[2], right[3]);
      }
#pragma unroll
      for (int i = 0; i < kDim / 16; i++) {
        uint32_t b[4];
        load_matrices_across(b, value_at + offset_of<kDim>(k * 16, i * 16));
#pragma unroll
        for (int m = 0; m < kTiles; m++) multiply(acc[m][2 * i], a[m], b[0], b[1]), multiply(acc[m][2 * i + 1], a[m], b[2], b[3]);
      }
    }
  }

#pragma unroll
  for (int m = 0; m < kTiles; m++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int32_t t = warp_t + lane / 4 + m * 16 + r * 8;
      const float total = quad_sum(sum[m][r]), inverse = 1.0f / total;
      if (t >= p.rows) continue;
      if (lane % 4 == 0) {
        p.lse[int64_t{h} * p.lines + t] = most[m][r] + log2f(total);
        if (!is_sum(total)) faults.report(Fault::NanAttention, p.layer);
      }
      float* out = p.out_of(t, h);
#pragma unroll
      for (int i = 0; i < kDim / 8; i++) {
        const int32_t d = i * 8 + lane % 4 * 2;
        if (d < c.head_dim) *reinterpret_cast<float2*>(out + d) = make_float2(acc[m][i][2 * r] * inverse, acc[m][i][2 * r + 1] * inverse);
      }
    }
  }
}

constexpr int kQueries = 64;  // rows that the columns take at a time
template <int kDim>
constexpr size_t columns_shared() { return size_t(2 * kQueries) * kStride<kDim> * 2 + 2 * kQueries * 4; }

/** A warp holds kTiles times 16 entries in registers. The scores come out across: a row of c is an entry, a column a query. */
template <int kDim, int kTiles, bool kBent>
__global__ void __launch_bounds__(kThreads) columns_kernel(PrefillView p) {
  extern __shared__ uint4 shared16[];
  wait_for_previous();
  let_next_start();
  constexpr int kEntries = kTiles * 16 * kWarps;
  static_assert(kEntries <= 2 * kQueries, "the entries pass through the queries' memory");
  const CacheView& c = p.cache;
  const int32_t warp = threadIdx.x >> 5, lane = threadIdx.x & 31, h = blockIdx.x, n = h / c.group();
  const int32_t kept = c.counts[p.head(n)].kept, length = kept + p.rows;
  __half* tiles = reinterpret_cast<__half*>(shared16);  // [2, kQueries]
  float* lse = reinterpret_cast<float*>(tiles + 2 * kQueries * kStride<kDim>);
  const __half* queries = p.queries_of<__half>(h);
  const auto lse_of = [&](int32_t t) { return t < p.rows ? p.lse[int64_t{h} * p.lines + t] : INFINITY; };  // a row past the end weighs nothing

  for (int32_t first = blockIdx.y * kEntries; first < length; first += gridDim.y * kEntries) {
    const int32_t own = first + warp * kTiles * 16 + lane / 4;
    uint32_t key[kTiles][kDim / 16][4];
    __syncthreads();
    copy_rows<kDim, kEntries>(tiles, p.keys_of<__half>(n) + int64_t{first} * kDim, length - first);
    copy_wait();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
#pragma unroll
      for (int k = 0; k < kDim / 16; k++) load_matrices(key[m][k], left_address<kDim>(tiles + (warp * kTiles + m) * 16 * kStride<kDim>) + offset_of<kDim>(0, k * 16));
    }
    __syncthreads();

    float total[kTiles][2] = {};
    int32_t t0 = max(0, first - kept) / kQueries * kQueries, turn = 0;
    copy_rows<kDim, kQueries>(tiles, queries + int64_t{t0} * kDim, p.rows - t0);
    if (threadIdx.x < kQueries) lse[threadIdx.x] = lse_of(t0 + threadIdx.x);
    for (; t0 < p.rows; t0 += kQueries, turn ^= 1) {
      copy_wait();
      __syncthreads();
      const int32_t next = t0 + kQueries;
      float next_lse = 0.0f;
      if (next < p.rows) {
        copy_rows<kDim, kQueries>(tiles + (turn ^ 1) * kQueries * kStride<kDim>, queries + int64_t{next} * kDim, p.rows - next);
        if (threadIdx.x < kQueries) next_lse = lse_of(next + threadIdx.x);
      }
      const uint32_t query_at = right_address<kDim>(tiles + turn * kQueries * kStride<kDim>);
      const bool all_seen = first + kEntries - 1 <= kept + t0;
#pragma unroll
      for (int q0 = 0; q0 < kQueries; q0 += 32) {
        float s[kTiles][4][4] = {};
#pragma unroll
        for (int k = 0; k < kDim / 16; k++) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            uint32_t b[4];
            load_matrices(b, query_at + offset_of<kDim>(q0 + i * 16, k * 16));
#pragma unroll
            for (int m = 0; m < kTiles; m++) multiply(s[m][2 * i], key[m][k], b[0], b[1]), multiply(s[m][2 * i + 1], key[m][k], b[2], b[3]);
          }
        }
        if constexpr (kBent) {
#pragma unroll
          for (int m = 0; m < kTiles; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
              for (int x = 0; x < 4; x++) s[m][i][x] = p.bend(s[m][i][x], n, kept, min(own + m * 16 + x / 2 * 8, length - 1), t0 + q0 + i * 8 + lane % 4 * 2 + x % 2);
            }
          }
        }
        if (!all_seen) {
#pragma unroll
          for (int m = 0; m < kTiles; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
              for (int x = 0; x < 4; x++) {
                if (own + m * 16 + x / 2 * 8 > kept + t0 + q0 + i * 8 + lane % 4 * 2 + x % 2) s[m][i][x] = -INFINITY;
              }
            }
          }
        }
        float add[kTiles][2] = {};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float2 l = *reinterpret_cast<const float2*>(lse + turn * kQueries + q0 + i * 8 + lane % 4 * 2);
#pragma unroll
          for (int m = 0; m < kTiles; m++) {
            add[m][0] += power_of_2(s[m][i][0] - l.x) + power_of_2(s[m][i][1] - l.y);
            add[m][1] += power_of_2(s[m][i][2] - l.x) + power_of_2(s[m][i][3] - l.y);
          }
        }
#pragma unroll
        for (int m = 0; m < kTiles; m++) total[m][0] += add[m][0], total[m][1] += add[m][1];
      }
      if (threadIdx.x < kQueries) lse[(turn ^ 1) * kQueries + threadIdx.x] = next_lse;
    }
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int32_t entry = own + m * 16 + r * 8;
        const float sum = quad_sum(total[m][r]);
        if (lane % 4 == 0 && entry < length) p.columns[h * p.entries + entry] = sum;
      }
    }
  }
}

// ---- in f32 ----

constexpr int kSide = 64, kDepth = 32;           // a block takes 64 rows and 64 entries at a time, 32 dimensions of them
constexpr int kFactor = kSide * (kDepth + 4);    // floats of one factor

/** A block has 16 x 16 threads; thread (y, x) gets the scores of rows 4 y + i and entries x + 16 j. */
__device__ void exact_scores(float (&s)[4][4], float* area, const float* queries, int32_t rows, const float* keys, int32_t entries, int32_t width) {
  float *q = area, *k = area + kFactor;
  const int32_t y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll
  for (int i = 0; i < 4; i++) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.0f;
  for (int32_t d0 = 0; d0 < width; d0 += kDepth) {
    __syncthreads();
#pragma unroll
    for (int part = 0; part < kSide * kDepth / 4 / 256; part++) {
      const int32_t i = threadIdx.x + part * 256, row = i / (kDepth / 4), d = i % (kDepth / 4) * 4;
      const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      *reinterpret_cast<float4*>(q + row * (kDepth + 4) + d) = row < rows ? *reinterpret_cast<const float4*>(queries + int64_t{row} * width + d0 + d) : zero;
      *reinterpret_cast<float4*>(k + row * (kDepth + 4) + d) = row < entries ? *reinterpret_cast<const float4*>(keys + int64_t{row} * width + d0 + d) : zero;
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; d += 4) {
      float4 a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        a[i] = *reinterpret_cast<const float4*>(q + (4 * y + i) * (kDepth + 4) + d);
        b[i] = *reinterpret_cast<const float4*>(k + (x + 16 * i) * (kDepth + 4) + d);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) s[i][j] = fmaf(a[i].x, b[j].x, fmaf(a[i].y, b[j].y, fmaf(a[i].z, b[j].z, fmaf(a[i].w, b[j].w, s[i][j]))));
      }
    }
  }
}

/** kParts: how often 64 dimensions fit the width, or more. */
template <int kParts>
__global__ void __launch_bounds__(256) exact_forward_kernel(PrefillView p, Faults faults) {
  __shared__ __align__(16) float area[2 * kFactor];  // of exact_scores, then 64 x 64 of the values
  __shared__ __align__(16) float weights[kSide][kSide + 4];
  wait_for_previous();
  let_next_start();
  const CacheView& c = p.cache;
  const int32_t y = threadIdx.x / 16, x = threadIdx.x % 16, h = blockIdx.x, n = h / c.group();
  const int32_t t0 = (gridDim.y - 1 - blockIdx.y) * kSide, kept = c.counts[p.head(n)].kept, length = kept + min(t0 + kSide, p.rows);
  const float *queries = p.queries_of<float>(h) + int64_t{t0} * p.width, *keys = p.keys_of<float>(n), *values = p.values_of<float>(n);
  float acc[kParts][4][4] = {}, most[4], sum[4] = {};
#pragma unroll
  for (int i = 0; i < 4; i++) most[i] = -INFINITY;
  for (int32_t first = 0; first < length; first += kSide) {
    float s[4][4], shrink[4];
    exact_scores(s, area, queries, p.rows - t0, keys + int64_t{first} * p.width, length - first, p.width);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float highest = most[i], add = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int32_t entry = first + x + 16 * j, t = t0 + 4 * y + i;
        if (p.bent()) s[i][j] = p.bend(s[i][j], n, kept, min(entry, length - 1), t);
        if (entry > kept + t) s[i][j] = -INFINITY;
        highest = fmaxf(highest, s[i][j]);
      }
#pragma unroll
      for (int o = 8; o > 0; o >>= 1) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, o));
      // The first entry has a finite score for every row, so \`highest\` is finite; rows past the end are never written.
      shrink[i] = exp2f(most[i] - highest);
      most[i] = highest;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float w = exp2f(s[i][j] - highest);
        weights[4 * y + i][x + 16 * j] = w;
        add += w;
      }
      sum[i] = sum[i] * shrink[i] + add;
    }
#pragma unroll
    for (int part = 0; part < kParts; part++) {
      if (part * 64 >= p.width) break;
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kSide * 16 / 256; k++) {
        const int32_t row = y + k * 16;
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (first + row < length) v = *reinterpret_cast<const float4*>(values + int64_t{first + row} * p.width + part * 64 + x * 4);
        *reinterpret_cast<float4*>(area + row * 64 + x * 4) = v;
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int d = 0; d < 4; d++) acc[part][i][d] *= shrink[i];
      }
#pragma unroll 4
      for (int j = 0; j < kSide; j += 4) {
        float4 w[4], v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          w[i] = *reinterpret_cast<const float4*>(&weights[4 * y + i][j]);
          v[i] = *reinterpret_cast<const float4*>(area + (j + i) * 64 + x * 4);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const auto add = [&](float weight, const float4& row) {
            acc[part][i][0] = fmaf(weight, row.x, acc[part][i][0]), acc[part][i][1] = fmaf(weight, row.y, acc[part][i][1]);
            acc[part][i][2] = fmaf(weight, row.z, acc[part][i][2]), acc[part][i][3] = fmaf(weight, row.w, acc[part][i][3]);
          };
          add(w[i].x, v[0]), add(w[i].y, v[1]), add(w[i].z, v[2]), add(w[i].w, v[3]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float total = sum[i];
#pragma unroll
    for (int o = 8; o > 0; o >>= 1) total += __shfl_xor_sync(0xffffffffu, total, o);
    const int32_t t = t0 + 4 * y + i;
    if (t >= p.rows) continue;
    if (x == 0) {
      p.lse[int64_t{h} * p.lines + t] = most[i] + log2f(total);
      if (!is_sum(total)) faults.report(Fault::NanAttention, p.layer);
    }
#pragma unroll
    for (int part = 0; part < kParts; part++) {
#pragma unroll
      for (int d = 0; d < 4; d++) {
        const int32_t column = part * 64 + x * 4 + d;
        if (column < c.head_dim) p.out_of(t, h)[column] = acc[part][i][d] / total;
      }
    }
  }
}

__global__ void __launch_bounds__(256) exact_columns_kernel(PrefillView p) {
  __shared__ __align__(16) float area[2 * kFactor];  // of exact_scores, then 16 x 64 sums
  wait_for_previous();
  let_next_start();
  const CacheView& c = p.cache;
  const int32_t y = threadIdx.x / 16, x = threadIdx.x % 16, h = blockIdx.x, n = h / c.group();
  const int32_t kept = c.counts[p.head(n)].kept, length = kept + p.rows;
  for (int32_t first = blockIdx.y * kSide; first < length; first += gridDim.y * kSide) {
    float total[4] = {};
    for (int32_t t0 = max(0, first - kept) / kSide * kSide; t0 < p.rows; t0 += kSide) {
      float s[4][4], add[4] = {};
      exact_scores(s, area, p.queries_of<float>(h) + int64_t{t0} * p.width, p.rows - t0, p.keys_of<float>(n) + int64_t{first} * p.width, length - first, p.width);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int32_t t = t0 + 4 * y + i;
        if (t >= p.rows) continue;
        const float lse = p.lse[int64_t{h} * p.lines + t];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int32_t entry = first + x + 16 * j;
          if (entry > kept + t) continue;
          if (p.bent()) s[i][j] = p.bend(s[i][j], n, kept, entry, t);
          add[j] += exp2f(s[i][j] - lse);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; j++) total[j] += add[j];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 4; j++) area[y * kSide + x + 16 * j] = total[j];
    __syncthreads();
    if (threadIdx.x < kSide && first + threadIdx.x < length) {
      float sum = 0.0f;
      for (int i = 0; i < 16; i++) sum += area[i * kSide + threadIdx.x];
      p.columns[h * p.entries + first + threadIdx.x] = sum;
    }
  }
}

// ---- settle ----

/** The scores with what the columns add, and the rest of each entry's state; a thread owns an entry. */
__global__ void __launch_bounds__(256) join_kernel(PrefillView p) {
  wait_for_previous();
  let_next_start();
  const CacheView& c = p.cache;
  const int32_t n = blockIdx.y, i = blockIdx.x * 256 + threadIdx.x;
  const Counts& counts = c.counts[p.head(n)];
  const int32_t kept = counts.kept;
  if (i >= kept + p.rows) return;
  const bool cached = i < kept;
  const Entries own = c.entries(p.head(n)), e = p.entries_of(n);
  float sum = 0.0f;
  for (int32_t g = 0; g < c.group(); g++) sum += p.columns[(n * c.group() + g) * p.entries + i];
  e.score[i] = (cached ? own.score[i] : 0.0f) + sum / static_cast<float>(c.group());
  e.birth[i] = cached ? own.birth[i] : counts.steps + 1 + i - kept;
  e.rank[i] = cached ? own.rank[i] : i;
  for (int32_t w = 0; w < c.width; w++) e.words[w * e.stride + i] = cached ? own.words[w * own.stride + i] : 0;
}

template <typename T>
__global__ void __launch_bounds__(512) settle_kernel(PrefillView p, Faults faults) {
  __shared__ SettleArea area;
  wait_for_previous();
  let_next_start();
  const CacheView& c = p.cache;
  const int32_t n = blockIdx.x;
  const int64_t head = p.head(n);
  Counts& counts = c.counts[head];
  const int32_t kept = counts.kept, steps = counts.steps;
  __syncthreads();
  if (threadIdx.x == 0) counts.steps = steps + p.rows, p.places_of(n)[0] = -1;
  __syncthreads();
  settle<T>(c, head, p.entries_of(n), kept, p.rows, p.new_keys_of<T>(n), p.new_values_of<T>(n), -1, faults, area, p.order + n * Leaving<T>::kScratch * p.entries, p.places_of(n));
}

constexpr int kPlaced = 8;  // entries of a warp

/** Writes what settle left of the entries to the cache: the state of those that lie there, state and rows of the others. */
template <typename T>
__global__ void __launch_bounds__(256) place_kernel(PrefillView p) {
  wait_for_previous();
  let_next_start();
  const CacheView& c = p.cache;
  const int32_t n = blockIdx.y, lane = threadIdx.x & 31, first = (blockIdx.x * 8 + threadIdx.x / 32) * kPlaced;
  const int32_t *places = p.places_of(n), kept = places[0], total = kept + p.rows;
  if (kept < 0 || first >= total) return;
  const Entries own = c.entries(p.head(n)), e = p.entries_of(n);
  int32_t to = -1;
  if (lane < kPlaced && first + lane < total) {
    const int32_t i = first + lane, rank = e.rank[i];
    to = i >= kept ? places[1 + i - kept] : rank >= 0 ? i : -1;
    if (to >= 0) {
      own.score[to] = e.score[i], own.birth[to] = e.birth[i], own.rank[to] = rank;
      for (int32_t w = 0; w < c.width; w++) own.words[w * own.stride + to] = e.words[w * e.stride + i];
    }
  }
  const auto copy = [&](auto word) {
    using Word = decltype(word);
    const int32_t words = static_cast<int32_t>(c.head_dim * sizeof(T) / sizeof(Word));
    const Word *keys = reinterpret_cast<const Word*>(p.new_keys_of<T>(n)), *values = reinterpret_cast<const Word*>(p.new_values_of<T>(n));
    Word *to_keys = reinterpret_cast<Word*>(c.keys_of<T>(p.head(n))), *to_values = reinterpret_cast<Word*>(c.values_of<T>(p.head(n)));
    for (int32_t i = 0; i < kPlaced; i++) {
      const int32_t slot = __shfl_sync(0xffffffffu, to, i), t = first + i - kept;
      if (slot < 0 || t < 0) continue;
      for (int32_t d = lane; d < 2 * words; d += 32) {
        const bool value = d >= words;
        const int64_t at = d - (value ? words : 0);
        (value ? to_values : to_keys)[int64_t{slot} * words + at] = (value ? values : keys)[int64_t{t} * words + at];
      }
    }
  };
  if (c.head_dim * sizeof(T) % 16 == 0) copy(uint4());
  else copy(T());
}

// ---- launches ----

/** Blocks of \`size\` entries of each query head: no more than keep the chip busy, as all but \`kept\`, which only the device knows, may be
 *  empty. A block takes every gridDim.y-th. */
dim3 entry_blocks(const PrefillView& p, int32_t size) {
  return dim3(p.cache.heads, std::min(divide_up(p.entries, size), divide_up(2048, p.cache.heads)));
}

template <typename T, typename S>
void arrive(Context& ctx, const PrefillView& p) {
  const RopeView& rope = p.cache.rope;
  if constexpr (sizeof(T) == 2 && std::is_same_v<S, __half>) {
    if (rope.pairs % 4 == 0 && 2 * rope.pairs == p.cache.head_dim) {
      return launch(ctx, arrive_fours_kernel<T>, {dim3(std::min(divide_up(p.entries, 16), 64), p.cache.heads + p.cache.kv_heads), 256}, p);
    }
  }
  launch(ctx, arrive_kernel<T, S>, {dim3(std::min(divide_up(p.entries, 32), 64), p.cache.heads + p.cache.kv_heads), 256}, p);
}

template <int kDim, int kTiles, int kKeys, bool kBent>
void forward(Context& ctx, const PrefillView& p) {
  const dim3 grid(p.cache.heads, divide_up(p.rows, kTiles * 16 * kWarps));
  launch(ctx, forward_kernel<kDim, kTiles, kKeys, kBent>, {grid, kThreads, forward_shared<kDim, kTiles, kKeys>()}, p, ctx.faults());
}

template <int kDim, int kTiles, bool kBent>
void columns(Context& ctx, const PrefillView& p) {
  launch(ctx, columns_kernel<kDim, kTiles, kBent>, {entry_blocks(p, kTiles * 16 * kWarps), kThreads, columns_shared<kDim>()}, p);
}

/** Blocks of 64 rows where those of 128 would leave multiprocessors idle, or where scores are bent, which takes registers. */
template <int kDim>
void attend(Context& ctx, const PrefillView& p) {
  constexpr int kKeys = kDim > 128 ? 32 : 64, kTiles = kDim > 128 ? 1 : 2;
  if (p.bent()) return forward<kDim, 1, kKeys, true>(ctx, p), columns<kDim, 1, true>(ctx, p);
  if (int64_t{divide_up(p.rows, 128)} * p.cache.heads < 2 * ctx.processors) forward<kDim, 1, kKeys, false>(ctx, p);
  else forward<kDim, kTiles, kKeys, false>(ctx, p);
  columns<kDim, kTiles, false>(ctx, p);
}

template <int kParts>
void attend_exactly(Context& ctx, const PrefillView& p) {
  launch(ctx, exact_forward_kernel<kParts>, {dim3(p.cache.heads, divide_up(p.rows, kSide)), 256}, p, ctx.faults());
  launch(ctx, exact_columns_kernel, {entry_blocks(p, kSide), 256}, p);
}

bool is_exact(const Cache& cache) { return cache.dtype == WKV_F32 || cache.head_dim > 256; }

int32_t width_of(const Cache& cache) {
  if (is_exact(cache)) return divide_up(cache.head_dim, 64) * 64;
  return cache.head_dim <= 64 ? 64 : cache.head_dim <= 128 ? 128 : 256;
}

template <typename T>
void run(Context& ctx, const Cache& cache, const PrefillView& p) {
  if (is_exact(cache)) {
    arrive<T, float>(ctx, p);
    if (p.width <= 128) attend_exactly<2>(ctx, p);
    else attend_exactly<8>(ctx, p);
  } else if constexpr (!std::is_same_v<T, float>) {
    arrive<T, __half>(ctx, p);
    if (p.tiled) attend_wgmma(ctx, p);
    else if (p.width == 64) attend<64>(ctx, p);
    else if (p.width == 128) attend<128>(ctx, p);
    else attend<256>(ctx, p);
  }
  launch(ctx, join_kernel, {dim3(divide_up(p.entries, 256), cache.kv_heads), 256}, p);
  launch(ctx, settle_kernel<T>, {cache.kv_heads, 512}, p, ctx.faults());
  launch(ctx, place_kernel<T>, {dim3(divide_up(p.entries, 8 * kPlaced), cache.kv_heads), 256}, p);
}

}  // namespace
}  // namespace wkv

using namespace wkv;

int32_t wkv_prefill(int32_t context, int32_t handle, int32_t layer, int32_t kv_head, int32_t sequence, int32_t out, int32_t qkv, int32_t rows, float scale, float softcap, int32_t window) {
  return entry(context, [&](Context& ctx) {
    const CacheRef cache = find_cache(context, handle, layer);
    require(sequence >= 0 && sequence < cache->sequences, "sequence must be between 0 and " + std::to_string(cache->sequences - 1) + ": " + std::to_string(sequence));
    require(rows >= 1, "rows must be at least 1: " + std::to_string(rows));
    check_softcap(softcap);
    require(window >= 0, "window must be at least 0: " + std::to_string(window));
    require(!wkv_by_step(cache->select), "this policy keeps a record of each step's weights: feed its tokens one by one");
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, -1);
    const RowHeads row = cache->row_heads(to->columns, kv_head);
    const TensorRef from = find_tensor(context, qkv, "qkv", WKV_F32, rows, row.columns(cache->head_dim));
    ctx.hold(cache, from, to);
    PrefillView p{};
    p.cache = cache->view(layer);
    p.row = row;
    p.layer = layer;
    p.sequence = sequence;
    p.rows = rows;
    p.qkv = from->f32();
    p.out = to->f32();
    p.width = width_of(*cache);
    p.scale = scale * kPerLn2;
    p.softcap = softcap * kPerLn2;
    p.window = window;
    p.tiled = !is_exact(*cache) && wgmma_takes(ctx, p);
    p.entries = int64_t{cache->slots} + rows;
    p.lines = rows;
    if (p.tiled) p.entries = int64_t{tiles_of(p.entries)} * kTile, p.lines = int64_t{tiles_of(rows)} * kTile;
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
      const int64_t states = cache->kv_heads * p.entries;
      const int64_t wide = int64_t{p.width} * (is_exact(*cache) ? 4 : 2);
      p.q = take(cache->heads * p.lines, wide);
      p.keys = take(states, wide);
      p.values = take(states, wide);
      p.new_keys = take(int64_t{cache->kv_heads} * rows, cache->row_bytes());
      p.new_values = take(int64_t{cache->kv_heads} * rows, cache->row_bytes());
      p.lse = floats(cache->heads * p.lines);
      p.columns = floats(cache->heads * p.entries);
      p.score = floats(states);
      p.by_rank = floats(states);
      p.measure = floats(states);
      p.words = reinterpret_cast<uint32_t*>(ints(states * cache->width()));
      p.birth = ints(states);
      p.rank = ints(states);
      p.freed = ints(states);
      p.order = ints(states * Leaving<float>::kScratch);
      p.places = ints(cache->kv_heads * (int64_t{rows} + 1));
      if (pass == 0) scratch = ctx.reserve(bytes);
    }
    by_cache_type(cache->dtype, [&](auto type) { run<decltype(type)>(ctx, *cache, p); });
    cache->touch(ctx, layer);
    ctx.submitted();
  });
}
`,
  "cuda/prefill.cuh": `/** prefill.cuh: what prefill.cu (arrive, settle, products of any GPU) and prefill_wgmma.cu (products of sm_90a) share. */
#pragma once
#include "cache.cuh"

namespace wkv {

struct PrefillView {
  CacheView cache;
  RowHeads row;
  int32_t layer, sequence, rows;
  int32_t width;  // of a scratch row: D and zeros
  const float* qkv;
  float* out;
  float scale, softcap;  // in units of ln 2; softcap 0: none
  int32_t window;        // 0: none
  bool tiled;            // rows of q, keys and values lie as tiled_at says
  // Scratch.
  int64_t entries, lines;           // slots + rows, rows; in tiles both are whole tiles
  void* q;                          // [H, lines, width], rotated, in the library's order, scaled
  void *keys, *values;              // [N, entries, width], keys rotated
  uint8_t *new_keys, *new_values;   // [N, rows, D], as stored
  float* lse;                       // [H, lines]
  float* columns;                   // [H, entries]
  float *score, *by_rank, *measure; // [N, entries]
  uint32_t* words;                  // [N, words a token, entries]
  int32_t *birth, *rank, *freed;
  int32_t* order;                   // [N, 6, entries]
  int32_t* places;                  // [N, 1 + rows]: as of Settling::place, first -1 where nothing is to be written

  /** Whether scores are more than products. */
  __host__ __device__ bool bent() const { return softcap > 0.0f || window > 0; }
  /** The score of entry i for row t, a finite low number outside the window: what a row adds up before the first entry that it sees
   *  is then shrunk to nothing. */
  __device__ float bend(float s, int32_t n, int32_t kept, int32_t i, int32_t t) const {
    if (window > 0) {
      const int32_t rank = i < kept ? cache.ranks[head(n) * (cache.slots + 1) + i] : i;
      if (rank <= kept + t - window) return -1.0e30f;
    }
    return softcap > 0.0f ? softcap * tanhf(s / softcap) : s;
  }
  __device__ int32_t* places_of(int32_t n) const { return places + n * (int64_t{rows} + 1); }
  /** The state of one head's entries. */
  __device__ Entries entries_of(int32_t n) const {
    const int64_t at = n * entries;
    uint32_t* own = words + at * cache.width;
    return {score + at, birth + at, rank + at, own, entries, cache.gapped() ? reinterpret_cast<float*>(own) : nullptr, by_rank + at, measure + at, nullptr, freed + at};
  }
  /** Where a query head's output of row t goes. */
  __device__ float* out_of(int64_t t, int32_t h) const { return out + (t * row.kv_heads * row.group + row.query(0, h)) * cache.head_dim; }
  __device__ int64_t head(int32_t n) const { return cache.first + int64_t{sequence} * cache.kv_heads + n; }
  template <typename T>
  __device__ T* new_keys_of(int32_t n) const { return reinterpret_cast<T*>(new_keys) + int64_t{n} * rows * cache.head_dim; }
  template <typename T>
  __device__ T* new_values_of(int32_t n) const { return reinterpret_cast<T*>(new_values) + int64_t{n} * rows * cache.head_dim; }
  template <typename S>
  __device__ S* queries_of(int32_t h) const { return static_cast<S*>(q) + int64_t{h} * lines * width; }
  template <typename S>
  __device__ S* keys_of(int32_t n) const { return static_cast<S*>(keys) + n * entries * width; }
  template <typename S>
  __device__ S* values_of(int32_t n) const { return static_cast<S*>(values) + n * entries * width; }
};

constexpr int32_t kTile = 128;  // rows and entries that a block of prefill_wgmma.cu takes at a time
__host__ __device__ constexpr int32_t tiles_of(int64_t count) { return static_cast<int32_t>((count + kTile - 1) / kTile); }

/** Where in shared memory wgmma looks for number d of a row of f16 (its swizzle of 128 bytes), and so in scratch: 8 rows of 64 numbers
 *  lie together, the next 64 of these rows behind them, and the row's eights are exchanged. Whole eights of rows are one piece. */
__host__ __device__ inline int64_t tiled_at(int64_t row, int32_t d, int32_t width) {
  return ((row / 8 * (width / 64) + d / 64) * 8 + row % 8) * 64 + ((d / 8 ^ static_cast<int32_t>(row)) & 7) * 8 + d % 8;
}

__device__ inline float power_of_2(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
__device__ inline uint32_t packed(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
/** Over the four lanes that share a row of c. */
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

/** Whether this library has code for this GPU's wgmma, and the op fits it. */
bool wgmma_takes(const Context& ctx, const PrefillView& p);
/** Forward and columns of tiled scratch. */
void attend_wgmma(Context& ctx, const PrefillView& p);

}  // namespace wkv
`,
  "cuda/prefill_wgmma.cu": `/**
 * prefill_wgmma.cu: prefill.cu's forward and columns for GPUs with wgmma (sm_90a), heads of 64 or 128 dimensions, scores as they are.
 *
 * A block has two warpgroups that compute, 64 rows each, and a warp that brings tiles to shared memory, each as one bulk copy: scratch
 * already lies as wgmma reads it (tiled_at).
 * forward: a block owns 128 rows of one query head and walks over the entries, 128 at a time. A warpgroup has the next scores computed
 * and the last weights multiplied with their values at once; the warpgroups take turns, so that one computes weights while the tensor
 * cores work for the other. Weights are under a reference that follows the row's highest score at a distance of 2^8 at most, so sums are
 * seldom rescaled.
 * columns: a block owns 128 entries for one query head and walks over the rows that see them, 128 at a time; the next tile's scores are
 * computed while a tile's weights are added up.
 * FLOPs of rows^2 / 2 causal pairs: 4 D a pair and query head forward, 2 D in columns. Bytes moved: K and V, or q, once a block, mostly
 * from the second-level cache: 64 KB and 32 KB for 128 x 128 pairs.
 * Tried and left: a third stage of tiles forward, and no turns (6% slower at 32,768 rows); in columns some powers of 2 by a polynomial, to
 * spare the special function units (5% to 15% slower).
 */
#include "cluster.cuh"
#include "prefill.cuh"

namespace wkv {
namespace {

constexpr int kGroups = 2, kComputing = kGroups * 128, kAllThreads = kComputing + 128;  // registers change hands by warpgroups

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/** Registers of a thread of the warpgroup that brings tiles, and of the others. */
__device__ inline void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 24;"); }
__device__ inline void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 240;"); }
/** Named barriers of the two warpgroups. */
__device__ inline void turn_wait(int which) { asm volatile("bar.sync %0, %1;" ::"r"(which + 1), "n"(kComputing) : "memory"); }
__device__ inline void turn_give(int which) { asm volatile("bar.arrive %0, %1;" ::"r"(which + 1), "n"(kComputing) : "memory"); }

// ---- wgmma ----

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/** Waits until all but the last kLeft groups of products have been computed. */
template <int kLeft>
__device__ inline void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory"); }
/** Keeps the compiler from moving what reads or writes registers of products across. */
template <int kCount>
__device__ inline void hold(float (&c)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])::"memory");
}

/** Describes a tile to wgmma: swizzled by 128 bytes; \`leading\` bytes between pieces of 64 columns (of a factor that lies across), \`stride\`
 *  between eights of rows. */
__device__ inline uint64_t described(const void* tile, uint32_t leading, uint32_t stride) {
  return uint64_t{(shared_address(tile) & 0x3ffff) >> 4} | uint64_t{leading >> 4} << 16 | uint64_t{stride >> 4} << 32 | uint64_t{1} << 62;
}

#define WKV_C4(c, i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define WKV_C32(c) WKV_C4(c, 0), WKV_C4(c, 1), WKV_C4(c, 2), WKV_C4(c, 3), WKV_C4(c, 4), WKV_C4(c, 5), WKV_C4(c, 6), WKV_C4(c, 7)
#define WKV_C64(c) WKV_C32(c), WKV_C4(c, 8), WKV_C4(c, 9), WKV_C4(c, 10), WKV_C4(c, 11), WKV_C4(c, 12), WKV_C4(c, 13), WKV_C4(c, 14), WKV_C4(c, 15)
#define WKV_R32 \\
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, " \\
  "%29, %30, %31"
#define WKV_R64 \\
  WKV_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, " \\
  "%57, %58, %59, %60, %61, %62, %63"

/** c [64, 128] = a b^T (+ c): 16 columns of a [64, .] and b [128, .]. */
__device__ inline void multiply(float (&c)[16][4], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\\n.reg .pred p;\\nsetp.ne.b32 p, %66, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " WKV_R64 "}, %64, %65, p, 1, 1, 0, 0;\\n}\\n"
      : WKV_C64(c)
      : "l"(a), "l"(b), "r"(int32_t{add}));
}
/** c [64, 128 or 64] += a b: a [64, 16] in registers, b 16 rows that lie across. */
__device__ inline void multiply_across(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " WKV_R64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\\n"
               : WKV_C64(c)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ inline void multiply_across(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " WKV_R32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\\n"
               : WKV_C32(c)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/** Starts s [64, 128] = a b^T for tiles of kDim columns; \`a\` describes 64 rows, \`b\` 128. */
template <int kDim>
__device__ inline void start_scores(float (&s)[16][4], uint64_t a, uint64_t b) {
#pragma unroll
  for (int k = 0; k < kDim / 16; k++) {
    const uint64_t on = k / 4 * 64 + k % 4 * 2;  // 64 columns are a piece of 1024 bytes, 16 of them 32 bytes
    multiply(s, a + on, b + on, k > 0);
  }
}

#endif  // sm_90a

// ---- forward ----

constexpr int kForwardStages = 2;
template <int kDim>
constexpr size_t forward_shared() { return size_t(1 + 2 * kForwardStages) * kTile * kDim * 2 + 1024; }

template <int kDim>
__global__ void __launch_bounds__(kAllThreads, 1) forward_kernel(PrefillView p, Faults faults) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared8[];
  __shared__ uint64_t q_full, key_full[kForwardStages], key_empty[kForwardStages], value_full[kForwardStages], value_empty[kForwardStages];
  constexpr uint32_t kBytes = kTile * kDim * 2, kEight = kDim * 16;  // of a tile, and of 8 rows of it
  uint8_t* const q = shared8 + (-shared_address(shared8) & 1023);
  uint8_t *const key = q + kBytes, *const value = key + kForwardStages * kBytes;
  const int32_t warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    open_barrier(&q_full, 1);
    for (int i = 0; i < kForwardStages; i++) open_barrier(&key_full[i], 1), open_barrier(&value_full[i], 1), open_barrier(&key_empty[i], kComputing / 32), open_barrier(&value_empty[i], kComputing / 32);
    barriers_opened();
  }
  __syncthreads();
  wait_for_previous();
  let_next_start();
  const CacheView& c = p.cache;
  const int32_t h = blockIdx.x, n = h / c.group(), t0 = (gridDim.y - 1 - blockIdx.y) * kTile;  // the longest first
  const int32_t kept = c.counts[p.head(n)].kept, tiles = tiles_of(kept + min(t0 + kTile, p.rows));
  if (warp >= kComputing / 32) {
    give_registers();
    if (threadIdx.x != kComputing) return;
    const uint8_t *keys = reinterpret_cast<const uint8_t*>(p.keys_of<__half>(n)), *values = reinterpret_cast<const uint8_t*>(p.values_of<__half>(n));
    expect(&q_full, kBytes);
    copy_bulk(q, p.queries_of<__half>(h) + int64_t{t0} * kDim, kBytes, &q_full);
    for (int32_t i = 0; i < tiles; i++) {
      const int32_t stage = i % kForwardStages;
      const uint32_t parity = i / kForwardStages % 2 ^ 1;
      await(&key_empty[stage], parity);
      expect(&key_full[stage], kBytes);
      copy_bulk(key + stage * kBytes, keys + int64_t{i} * kBytes, kBytes, &key_full[stage]);
      await(&value_empty[stage], parity);
      expect(&value_full[stage], kBytes);
      copy_bulk(value + stage * kBytes, values + int64_t{i} * kBytes, kBytes, &value_full[stage]);
    }
    return;
  }

  take_registers();
  const int32_t group = warp / 4, first_t = t0 + group * 64, own_t = first_t + warp % 4 * 16 + lane / 4;
  const uint64_t q_at = described(q + group * 8 * kEight, 0, kEight), key_at = described(key, 0, kEight), value_at = described(value, 1024, kEight);
  float acc[kDim / 8][4] = {}, s[kTile / 8][4], most[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  uint32_t weights[kTile / 16][4];

  // What the scores of a tile come to: in s weights under \`most\`; gives what earlier ones shrink by.
  const auto weigh = [&](int32_t i, float (&shrink)[2]) {
    if (i * kTile + kTile - 1 > kept + first_t) {
      const int32_t ahead = kept + own_t - i * kTile - lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kTile / 8; j++) {
#pragma unroll
        for (int x = 0; x < 4; x++) {
          if (j * 8 + x % 2 > ahead + x / 2 * 8) s[j][x] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float highest = s[0][2 * r];
#pragma unroll
      for (int j = 0; j < kTile / 8; j++) highest = fmaxf(highest, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      highest = quad_max(highest);
      // The first entry has a finite score for every row, so this becomes finite with the first tile.
      const float reference = highest > most[r] + 8.0f ? highest : most[r];
      shrink[r] = power_of_2(most[r] - reference);
      most[r] = reference;
      float add = 0.0f;
#pragma unroll
      for (int j = 0; j < kTile / 8; j++) {
        s[j][2 * r] = power_of_2(s[j][2 * r] - reference);
        s[j][2 * r + 1] = power_of_2(s[j][2 * r + 1] - reference);
        add += s[j][2 * r] + s[j][2 * r + 1];
      }
      sum[r] = sum[r] * shrink[r] + add;
    }
  };
  const auto pack = [&] {
#pragma unroll
    for (int k = 0; k < kTile / 16; k++) {
      const float(&left)[4] = s[2 * k], (&right)[4] = s[2 * k + 1];
      weights[k][0] = packed(left[0], left[1]), weights[k][1] = packed(left[2], left[3]), weights[k][2] = packed(right[0], right[1]), weights[k][3] = packed(right[2], right[3]);
    }
  };
  const auto start_values = [&](int32_t stage) {
#pragma unroll
    for (int k = 0; k < kTile / 16; k++) multiply_across(acc, weights[k], value_at + stage * (kBytes >> 4) + k * 2 * (kEight >> 4));
    products_end();
  };

  float shrink[2];
  if (group == 1) turn_give(0);
  await(&q_full, 0);
  await(&key_full[0], 0);
  hold(s);
  products_begin();
  start_scores<kDim>(s, q_at, key_at);
  products_end();
  products_wait<0>();
  hold(s);
  if (lane == 0) arrive(&key_empty[0]);
  weigh(0, shrink);
  pack();
  for (int32_t i = 1; i < tiles; i++) {
    const int32_t stage = i % kForwardStages, before = (i - 1) % kForwardStages;
    await(&key_full[stage], i / kForwardStages % 2);
    turn_wait(group);
    hold(s), hold(acc);
    products_begin();
    start_scores<kDim>(s, q_at, key_at + stage * (kBytes >> 4));
    products_end();
    await(&value_full[before], (i - 1) / kForwardStages % 2);
    start_values(before);
    turn_give(group ^ 1);
    products_wait<1>();
    hold(s);
    if (lane == 0) arrive(&key_empty[stage]);
    weigh(i, shrink);
    products_wait<0>();
    hold(acc);
    if (lane == 0) arrive(&value_empty[before]);
    pack();
    if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
      for (int j = 0; j < kDim / 8; j++) acc[j][0] *= shrink[0], acc[j][1] *= shrink[0], acc[j][2] *= shrink[1], acc[j][3] *= shrink[1];
    }
  }
  await(&value_full[(tiles - 1) % kForwardStages], (tiles - 1) / kForwardStages % 2);
  hold(acc);
  products_begin();
  start_values((tiles - 1) % kForwardStages);
  products_wait<0>();
  hold(acc);

#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int32_t t = own_t + r * 8;
    const float total = quad_sum(sum[r]), inverse = 1.0f / total;
    // A row past the end weighs nothing in the columns.
    if (lane % 4 == 0) p.lse[int64_t{h} * p.lines + t] = t < p.rows ? most[r] + log2f(total) : INFINITY;
    if (t >= p.rows) continue;
    if (lane % 4 == 0 && !is_sum(total)) faults.report(Fault::NanAttention, p.layer);
    float* out = p.out_of(t, h);
#pragma unroll
    for (int j = 0; j < kDim / 8; j++) {
      const int32_t d = j * 8 + lane % 4 * 2;
      if (d < c.head_dim) *reinterpret_cast<float2*>(out + d) = make_float2(acc[j][2 * r] * inverse, acc[j][2 * r + 1] * inverse);
    }
  }
#endif
}

// ---- columns ----

constexpr int kColumnStages = 4;
template <int kDim>
constexpr size_t columns_shared() { return size_t(1 + kColumnStages) * kTile * kDim * 2 + kColumnStages * kTile * 4 + 1024; }

/** The scores come out across: a row of s is an entry, a column a row of q. */
template <int kDim>
__global__ void __launch_bounds__(kAllThreads, 1) columns_kernel(PrefillView p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared8[];
  __shared__ uint64_t key_full, full[kColumnStages], empty[kColumnStages];
  constexpr uint32_t kBytes = kTile * kDim * 2, kEight = kDim * 16;
  uint8_t* const key = shared8 + (-shared_address(shared8) & 1023);
  uint8_t* const q = key + kBytes;
  float* const lse = reinterpret_cast<float*>(q + kColumnStages * kBytes);
  const int32_t warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    open_barrier(&key_full, 1);
    for (int i = 0; i < kColumnStages; i++) open_barrier(&full[i], 1), open_barrier(&empty[i], kComputing / 32);
    barriers_opened();
  }
  __syncthreads();
  wait_for_previous();
  let_next_start();
  const CacheView& c = p.cache;
  const int32_t h = blockIdx.x, n = h / c.group(), first = blockIdx.y * kTile;
  const int32_t kept = c.counts[p.head(n)].kept, length = kept + p.rows;
  if (first >= length) return;
  const int32_t start = max(0, first - kept) / kTile, tiles = tiles_of(p.rows) - start;
  if (warp >= kComputing / 32) {
    give_registers();
    if (threadIdx.x != kComputing) return;
    expect(&key_full, kBytes);
    copy_bulk(key, p.keys_of<__half>(n) + int64_t{first} * kDim, kBytes, &key_full);
    for (int32_t i = 0; i < tiles; i++) {
      const int32_t stage = i % kColumnStages;
      await(&empty[stage], i / kColumnStages % 2 ^ 1);
      expect(&full[stage], kBytes + kTile * 4);
      copy_bulk(q + stage * kBytes, p.queries_of<__half>(h) + int64_t{start + i} * kTile * kDim, kBytes, &full[stage]);
      copy_bulk(lse + stage * kTile, p.lse + int64_t{h} * p.lines + int64_t{start + i} * kTile, kTile * 4, &full[stage]);
    }
    return;
  }

  take_registers();
  const int32_t group = warp / 4, first_own = first + group * 64, own = first_own + warp % 4 * 16 + lane / 4;
  const uint64_t key_at = described(key + group * 8 * kEight, 0, kEight), q_at = described(q, 0, kEight);
  float total[2] = {}, s[2][kTile / 8][4];
  const auto begin = [&](int32_t i, float (&to)[kTile / 8][4]) {
    const int32_t stage = i % kColumnStages;
    await(&full[stage], i / kColumnStages % 2);
    hold(to);
    products_begin();
    start_scores<kDim>(to, key_at, q_at + stage * (kBytes >> 4));
    products_end();
  };
  const auto add = [&](int32_t i, float (&from)[kTile / 8][4]) {
    const int32_t stage = i % kColumnStages, t0 = (start + i) * kTile;
    hold(from);
    if (first_own + 63 > kept + t0) {
      const int32_t behind = own - kept - t0 - lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kTile / 8; j++) {
#pragma unroll
        for (int x = 0; x < 4; x++) {
          if (behind + x / 2 * 8 > j * 8 + x % 2) from[j][x] = -INFINITY;
        }
      }
    }
    float sums[2] = {};
#pragma unroll
    for (int j = 0; j < kTile / 8; j++) {
      const float2 l = *reinterpret_cast<const float2*>(lse + stage * kTile + j * 8 + lane % 4 * 2);
      sums[0] += power_of_2(from[j][0] - l.x) + power_of_2(from[j][1] - l.y);
      sums[1] += power_of_2(from[j][2] - l.x) + power_of_2(from[j][3] - l.y);
    }
    total[0] += sums[0], total[1] += sums[1];
    __syncwarp();
    if (lane == 0) arrive(&empty[stage]);
  };
  await(&key_full, 0);
  begin(0, s[0]);
  for (int32_t i = 0;; i += 2) {
    if (i + 1 == tiles) {
      products_wait<0>();
      add(i, s[0]);
      break;
    }
    begin(i + 1, s[1]);
    products_wait<1>();
    add(i, s[0]);
    if (i + 2 == tiles) {
      products_wait<0>();
      add(i + 1, s[1]);
      break;
    }
    begin(i + 2, s[0]);
    products_wait<1>();
    add(i + 1, s[1]);
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float sum = quad_sum(total[r]);
    if (lane % 4 == 0 && own + r * 8 < length) p.columns[h * p.entries + own + r * 8] = sum;
  }
#endif
}

template <int kDim>
void attend(Context& ctx, const PrefillView& p) {
  launch(ctx, forward_kernel<kDim>, {dim3(p.cache.heads, p.lines / kTile), kAllThreads, forward_shared<kDim>()}, p, ctx.faults());
  launch(ctx, columns_kernel<kDim>, {dim3(p.cache.heads, p.entries / kTile), kAllThreads, columns_shared<kDim>()}, p);
}

}  // namespace

bool wgmma_takes(const Context& ctx, const PrefillView& p) {
  // This file is compiled for sm_90a alone, which nothing but 9.0 runs.
  static const bool has_code = [] {
    cudaFuncAttributes attributes;
    const cudaError_t loaded = cudaFuncGetAttributes(&attributes, columns_kernel<128>);
    cudaGetLastError();
    return loaded == cudaSuccess && attributes.binaryVersion == 90 && attributes.ptxVersion == 90;
  }();
  return has_code && !p.bent() && p.width <= 128 && columns_shared<128>() + 1024 <= size_t(ctx.shared_limit) && p.rows >= kTile / 2;
}

void attend_wgmma(Context& ctx, const PrefillView& p) {
  if (p.width == 64) attend<64>(ctx, p);
  else attend<128>(ctx, p);
}

}  // namespace wkv
`,
  "cuda/runtime.cu": `/** runtime.cu: contexts, tensors and graphs of the CUDA library. */
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>

#include "chain.cuh"
#include "cublaslt.cuh"

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
  *status = word.fault == Fault::Full || word.fault == Fault::Rank || word.fault == Fault::OneStep ? WKV_INVALID : WKV_DATA;
  switch (word.fault) {
    case Fault::Token: return "Token " + n(0) + " is outside the table of " + n(1);
    case Fault::Target: return "Target " + n(0) + " is outside the vocabulary of " + n(1);
    case Fault::NanLogit: return "The logit of token " + n(0) + " is not a number";
    case Fault::NanAttention: return "The attention of layer " + n(0) + " is not a number";
    case Fault::NanScore: return "What rank " + n(0) + " is chosen by is not a number";
    case Fault::Full: return "The cache is full: its policy keeps every token, and it has " + n(0) + " slots";
    case Fault::OneStep: return "This policy chooses by the weights of one step: feed the tokens that the cache has no room for one by one";
    default: return "Rank " + n(0) + " may not leave a cache of " + n(1) + " tokens with " + n(2) + " sinks and " + n(3) + " recent";
  }
}
}  // namespace

namespace {
/** A whole number from the environment. */
int64_t environment(const char* name, int64_t least, int64_t most, int64_t otherwise) {
  const char* text = std::getenv(name);
  if (!text || !*text) return otherwise;
  char* end = nullptr;
  const long long number = std::strtoll(text, &end, 10);
  if (*end || number < least || number > most) {
    fail(WKV_INVALID, std::string(name) + " must be a whole number between " + std::to_string(least) + " and " + std::to_string(most) + ": current value is \\"" + text + "\\"");
  }
  return number;
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
  int mps = 0;
  check(cudaDeviceGetAttribute(&mps, cudaDevAttrMpsEnabled, device), "Asking for the device");
  shared_device = mps != 0;
  capability = properties.major * 10 + properties.minor;
  const int64_t shared_kb = static_cast<int64_t>(properties.sharedMemPerBlockOptin / 1024);
  shared_limit = static_cast<int32_t>(environment("WKV_CUDA_SHARED_KB", 48, shared_kb, shared_kb) * 1024);
  least_grid = environment("WKV_CUDA_GRID_MB", 0, 1 << 20, 64) << 20;
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

namespace {
std::mutex turn_mutex;
std::map<int32_t, Context*> turns;  // by device: whose graph took it last
}  // namespace

Context::~Context() { release(); }

void Context::release() {
  if (going) cudaStreamSynchronize(side);
  {
    std::lock_guard<std::mutex> lock(turn_mutex);
    const auto turn = turns.find(device);
    if (turn != turns.end() && turn->second == this) turns.erase(turn);
  }
  if (word) cudaFreeHost(word);
  if (side) cudaStreamDestroy(side);
  if (stream) cudaStreamDestroy(stream);
}

uint8_t* Context::reserve(size_t bytes) {
  if (!scratch || scratch->bytes() < bytes) scratch = std::make_shared<DeviceMemory>(round_up(bytes, size_t{1} << 20));
  hold(scratch);
  return scratch->as<uint8_t>();
}

void Context::start(const Graph& graph, int32_t times) {
  std::unique_lock<std::mutex> lock(turn_mutex, std::defer_lock);
  if (graph.takes_device) {
    lock.lock();
    Context*& last = turns[device];
    if (last && last != this) {
      cudaEvent_t ended;
      check(cudaEventCreateWithFlags(&ended, cudaEventDisableTiming), "Making an event");
      const std::shared_ptr<void> owner(ended, [](void* event) { cudaEventDestroy(static_cast<cudaEvent_t>(event)); });
      check(cudaEventRecord(ended, last->side), "Recording an event");
      check(cudaStreamWaitEvent(side, ended), "Waiting for another context's graph");
    }
    last = this;
  }
  for (int32_t i = 0; i < times; i++) check(cudaGraphLaunch(graph.run, side), "Launching a graph");
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

void Context::settle() {
  if (!going) return;
  const std::shared_ptr<Graph> ended = std::move(going);
  going.reset();
  try {
    finish(side);
  } catch (const Failure& failure) {
    failed = std::make_unique<Failure>(failure);
  }
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
bool finite(const uint8_t* half) { return (half[1] & 0x7c) != 0x7c; }
[[noreturn]] void refuse_scale(int64_t row, int64_t block) {
  fail(WKV_DATA, "Row " + std::to_string(row) + ": The scale of block " + std::to_string(block) + " is not finite");
}

/** Rows of a quantised weight, spread over the planes of WeightView. */
struct Planes {
  std::vector<uint8_t> data, scales, high, subs;
  Planes(int32_t dtype, int64_t columns, int64_t rows)
      : data(size_t(rows * columns / 32 * data_bytes(dtype))), scales(size_t(rows * columns / scale_columns(dtype) * scale_bytes(dtype))),
        high(size_t(rows * columns / 32 * high_bytes(dtype))), subs(size_t(rows * columns / 32 * subs_bytes(dtype))) {}
};

/** Spreads rows in file order out. */
Planes split(const Tensor& tensor, int32_t row, int32_t rows, const uint8_t* from) {
  const int32_t dtype = tensor.dtype;
  const wkv_form form = wkv_form_of(dtype);
  const int64_t pieces = tensor.columns / 32, blocks = tensor.columns / form.columns;
  Planes to(dtype, tensor.columns, rows);
  const int32_t q = data_bytes(dtype), s = scale_bytes(dtype), h = high_bytes(dtype);
  for (int64_t i = 0; i < rows * pieces; i++) {
    const int64_t block = i * 32 / form.columns;
    const uint8_t* at = from + block * form.bytes;
    if (!wkv_has_pieces(dtype)) {
      if (!finite(at) || (s == 4 && !finite(at + 2))) refuse_scale(row + i / pieces, block % blocks);
      std::memcpy(to.scales.data() + i * s, at, size_t(s));
      std::memcpy(to.data.data() + i * q, at + s, size_t(q));
      continue;
    }
    wkv_piece piece;
    wkv_read_piece(dtype, at, form.subs ? static_cast<int32_t>(i % 8) : 0, &piece);
    const uint16_t pair[2] = {piece.d, piece.least};
    const auto* halves = reinterpret_cast<const uint8_t*>(pair);
    if (!finite(halves) || !finite(halves + 2)) refuse_scale(row + i / pieces, block % blocks);
    std::memcpy(to.scales.data() + block * s, pair, size_t(s));
    if (form.subs) std::memcpy(to.subs.data() + i * 2, piece.sub, 2);
    uint8_t *data = to.data.data() + i * q, *high = to.high.data() + i * h;
    for (int32_t k = 0; k < 32; k++) {
      const int32_t half = k / 16, v = k % 16 / 4, c = k % 4, low = piece.q[k] & ((1 << form.low) - 1), rest = piece.q[k] >> form.low;
      const auto put = [](uint8_t& byte, int32_t bits) { byte = static_cast<uint8_t>(byte | bits); };
      if (form.low == 4) put(data[k % 16], low << (half * 4));
      else put(data[half * 4 + c], low << (v * 2));
      if (form.high == 1) put(high[c], rest << (half * 4 + v));
      if (form.high == 2) put(high[half * 4 + c], rest << (v * 2));
    }
  }
  return to;
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
  size_t bytes = size_t(rows) * wkv_row_bytes(dtype, columns);
  if (is_quantised(dtype)) {
    const size_t pieces = size_t(rows) * (columns / 32);
    scales_at = round_up(pieces * data_bytes(dtype));
    high_at = round_up(scales_at + size_t(rows) * (columns / scale_columns(dtype)) * scale_bytes(dtype));
    subs_at = round_up(high_at + pieces * high_bytes(dtype));
    bytes = round_up(subs_at + pieces * subs_bytes(dtype));  // whole 16 bytes can be read
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
    std::string products;
    give_text("CUDA, " + ctx.name + ", " + (cublaslt_loaded(&products) ? products : "no cuBLASLt"), out, out_bytes);
  });
}

int32_t wkv_tensor_open(int32_t context, int32_t dtype, int32_t rows, int32_t columns, int32_t* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    require_buffer(out, out_bytes, 4, "out");
    require(dtype >= WKV_F32 && dtype <= WKV_IQ4_NL, "dtype " + std::to_string(dtype) + " is unknown");
    require(rows >= 1 && columns >= 1, "rows and columns must be at least 1: " + std::to_string(rows) + " x " + std::to_string(columns));
    const int32_t whole = wkv_form_of(dtype).columns;
    require(columns % whole == 0, "columns must be a multiple of " + std::to_string(whole) + " for quantised rows of this type: " + std::to_string(columns));
    const auto tensor = std::make_shared<Tensor>(dtype, rows, columns);
    ctx.zero(tensor->memory->as<void>(), tensor->memory->bytes());
    *out = add_handle(context, tensor);
  });
}

int32_t wkv_tensor_write(int32_t context, int32_t handle, int32_t row, int32_t rows, const void* data, int32_t data_bytes) {
  return entry(context, [&](Context& ctx) {
    const TensorRef tensor = find_tensor(context, handle, "tensor");
    check_rows(*tensor, row, rows);
    const int64_t bytes = wkv_row_bytes(tensor->dtype, tensor->columns);
    require_buffer(data, data_bytes, rows * bytes, "data");
    if (tensor->mirror) {
      ctx.settle();  // a graph that runs while another is recorded may be about to write it
      std::memcpy(tensor->mirror->as<void>(row * bytes), data, size_t(rows * bytes));
    }
    if (!is_quantised(tensor->dtype)) {
      ctx.copy(tensor->memory->as<uint8_t>(row * bytes), data, size_t(rows * bytes));
      return;
    }
    const Planes planes = split(*tensor, row, rows, static_cast<const uint8_t*>(data));
    const auto copy = [&](size_t plane, const std::vector<uint8_t>& from) {
      if (!from.empty()) ctx.copy(tensor->memory->as<uint8_t>(plane + from.size() / rows * row), from.data(), from.size());
    };
    copy(0, planes.data);
    copy(tensor->scales_at, planes.scales);
    copy(tensor->high_at, planes.high);
    copy(tensor->subs_at, planes.subs);
  });
}

int32_t wkv_tensor_read(int32_t context, int32_t handle, int32_t row, int32_t rows, void* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    const TensorRef tensor = find_tensor(context, handle, "tensor");
    check_rows(*tensor, row, rows);
    const bool as_floats = is_quantised(tensor->dtype);
    const int64_t bytes = as_floats ? int64_t{tensor->columns} * 4 : wkv_row_bytes(tensor->dtype, tensor->columns);
    require_buffer(out, out_bytes, rows * bytes, "out");
    if (tensor->mirror) {
      ctx.settle();
      std::memcpy(out, tensor->mirror->as<void>(row * bytes), size_t(rows * bytes));
      return;
    }
    if (!as_floats) {
      ctx.copy(out, tensor->memory->as<uint8_t>(row * bytes), size_t(rows * bytes));
      return;
    }
    const int32_t dtype = tensor->dtype, columns = tensor->columns, s = scale_bytes(dtype);
    Planes planes(dtype, columns, rows);
    const auto copy = [&](size_t plane, std::vector<uint8_t>& to) {
      if (!to.empty()) ctx.copy(to.data(), tensor->memory->as<uint8_t>(plane + to.size() / rows * row), to.size());
    };
    copy(0, planes.data);
    copy(tensor->scales_at, planes.scales);
    copy(tensor->high_at, planes.high);
    copy(tensor->subs_at, planes.subs);
    auto* to = static_cast<float*>(out);
    for (size_t b = 0; b < size_t(rows) * (columns / 32); b++, to += 32) {
      const uint8_t* scales = planes.scales.data() + b * 32 / scale_columns(dtype) * s;
      const float scale = half_to_float(scales), least = s == 4 ? half_to_float(scales + 2) : 0.0f;
      const uint8_t* from = planes.data.data() + b * data_bytes(dtype);
      uint16_t subs = 0;
      if (!planes.subs.empty()) std::memcpy(&subs, planes.subs.data() + b * 2, 2);
      for (int32_t i = 0; i < 32; i++) {
        if (wkv_has_pieces(dtype)) to[i] = piece_number(dtype, from, planes.high.data() + b * high_bytes(dtype), subs, scale, least, i);
        else if (dtype == WKV_Q8_0) to[i] = static_cast<float>(static_cast<int8_t>(from[i])) * scale;
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
    ctx.chain = std::make_shared<Chain>();
    ctx.recording_failed = false;
  });
}

int32_t wkv_graph_end(int32_t context, int32_t* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    require(ctx.recording != nullptr, "No graph is being recorded");
    std::exception_ptr unlaunched;
    try {
      if (!ctx.recording_failed) ctx.flush();
    } catch (...) {
      unlaunched = std::current_exception();
    }
    ctx.chain.reset();
    const std::shared_ptr<Graph> graph = std::move(ctx.recording);
    ctx.recording.reset();
    cudaGraph_t captured = nullptr;
    const cudaError_t error = cudaStreamEndCapture(ctx.stream, &captured);
    const std::shared_ptr<void> owner(captured, [](void* g) {
      if (g) cudaGraphDestroy(static_cast<cudaGraph_t>(g));
    });
    if (unlaunched) std::rethrow_exception(unlaunched);
    require(!ctx.recording_failed, "An op of the graph failed when it was recorded");
    check(error, "Recording a graph");
    require_buffer(out, out_bytes, 4, "out");
    check(cudaGraphInstantiate(&graph->run, captured, 0), "Making a graph");
    *out = add_handle(context, graph);
  });
}

int32_t wkv_graph_run(int32_t context, int32_t handle, int32_t times) {
  return entry_meanwhile(context, [&](Context& ctx) {
    ctx.running = true;  // perhaps while another thread records a graph, which this leaves alone
    require(times >= 0, "times must not be negative: " + std::to_string(times));
    const auto graph = find<Graph>(context, handle, Kind::Graph, "graph");
    ctx.settle();
    ctx.start(*graph, times);
    ctx.finish(ctx.side);
  });
}

int32_t wkv_graph_start(int32_t context, int32_t handle) {
  return entry_meanwhile(context, [&](Context& ctx) {
    ctx.running = true;
    const auto graph = find<Graph>(context, handle, Kind::Graph, "graph");
    ctx.settle();
    ctx.failed.reset();
    ctx.start(*graph);
    ctx.going = graph;
  });
}

int32_t wkv_graph_poll(int32_t context, int32_t* out, int32_t out_bytes) {
  return entry_meanwhile(context, [&](Context& ctx) {
    ctx.running = true;
    require_buffer(out, out_bytes, 4, "out");
    if (ctx.going && cudaStreamQuery(ctx.side) == cudaErrorNotReady) {
      cudaGetLastError();
      *out = 0;
      return;
    }
    ctx.settle();
    *out = 1;
    if (!ctx.failed) return;
    const std::unique_ptr<Failure> failure = std::move(ctx.failed);
    throw *failure;
  });
}
`,
  "cuda/sample.cu": `/**
 * sample.cu: wkv_sample, wkv_log_prob and wkv_divergence, from logits [B, vocabulary] to tokens and to their probabilities.
 *
 *   tokens[b] = the highest logit (temperature 0), or a draw from those that top-k, top-p and min-p leave
 *   out[i] = logits[i, targets[i]] - max - log(sum_j exp(logits[i, j] - max))
 *   out[i] = sum_j p (log p - log q), p and q being the softmaxes of row i of logits and of others; and whether their highest are one token
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
  __syncwarp();  // the barrier is one for warps, not for threads
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
  double sums[32], sum, parts[3];
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

__global__ void __launch_bounds__(kThreads) sample_kernel(int32_t* tokens, int32_t* mirror, const float* logits, int32_t count, const float* settings, int32_t* rng, Faults faults) {
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
    else if (writes) tokens[b] = mirror[b] = top.token;
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
  tokens[b] = mirror[b] = static_cast<int32_t>(last);
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

__global__ void __launch_bounds__(kThreads) divergence_kernel(float* out, const float* logits, const float* others, int32_t count, Faults faults) {
  __shared__ Board board;
  wait_for_previous();
  let_next_start();
  const int64_t b = blockIdx.x / row_blocks();
  const Slice slice(logits + b * count, count);
  const float* other = others + b * count;
  const bool writes = row_rank() == 0 && threadIdx.x == 0;
  const Top top = highest(board, slice);
  row_sync();
  const Top other_top = highest(board, Slice(other, count));
  const int32_t bad = min(top.bad, other_top.bad);
  if (bad != INT_MAX) {
    if (writes) faults.report(Fault::NanLogit, bad);
    row_sync();
    return;
  }
  double p = 0.0, q = 0.0, apart = 0.0;
  slice.each<1>([&](float x, int32_t token) {
    const float below = x - top.most, other_below = other[token] - other_top.most, share = expf(below);
    p += share, q += expf(other_below);
    // What has no probability adds nothing, however far below the highest its logits are.
    if (share > 0.0f) apart += static_cast<double>(share) * (static_cast<double>(below) - static_cast<double>(other_below));
  });
  p = block_sum(p, board.sums), q = block_sum(q, board.sums), apart = block_sum(apart, board.sums);
  if (threadIdx.x == 0) board.parts[0] = p, board.parts[1] = q, board.parts[2] = apart;
  row_sync();
  if (writes) {
    p = q = apart = 0.0;
    for (int32_t r = 0; r < row_blocks(); r++) {
      const double* parts = peer(&board.parts[0], r);
      p += parts[0], q += parts[1], apart += parts[2];
    }
    out[2 * b] = static_cast<float>(fmax(0.0, apart / p - log(p) + log(q)));
    out[2 * b + 1] = top.token == other_top.token ? 1.0f : 0.0f;
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
    if (!to->mirror) {
      const size_t bytes = to->memory->bytes();
      const auto mirror = std::make_shared<HostMemory>(bytes);
      ctx.copy(mirror->as<void>(), to->i32(), bytes);
      to->mirror = mirror;
    }
    ctx.hold(from, rules, state, to);
    launch(ctx, sample_kernel, shape_of(ctx, from->rows, from->columns), to->i32(), to->mirror->as<int32_t>(), from->f32(), from->columns, rules->f32(), state->i32(), ctx.faults());
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

int32_t wkv_divergence(int32_t context, int32_t out, int32_t logits, int32_t others, int32_t rows) {
  return entry(context, [&](Context& ctx) {
    const TensorRef from = find_tensor(context, logits, "logits", WKV_F32, rows, -1);
    const TensorRef with = find_tensor(context, others, "others", WKV_F32, rows, from->columns);
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, 2);
    require(rows >= 1, "rows must be at least 1");
    ctx.hold(from, with, to);
    launch(ctx, divergence_kernel, shape_of(ctx, rows, from->columns), to->f32(), from->f32(), with->f32(), from->columns, ctx.faults());
    ctx.submitted();
  });
}
`,
  "cuda/settle.cu": `/**
 * settle.cu: steps 3 to 6 of a decode step with given weights: wkv_insert, and the second launch of policies that choose by more than
 * wkv_attend's one launch knows.
 *
 *   a[i] += weights[rank[i]];  then one settle a head (settle.cuh)         weights [B, N (M + 1)] in rank order
 *
 * A block owns one KV head of one sequence and keeps its state in shared memory where it fits: the steps to a choice are many and short, so
 * what they wait for is memory. Bytes moved: the head's state (12 bytes a slot and its words, read and written), its weights, three rows; all
 * keys or values, one to three times, for rules that measure rows.
 */
#include "settle.cuh"

namespace wkv {
namespace {

constexpr int32_t kArrays = 6;  // of state and scratch that may lie in shared memory

template <typename T>
__global__ void __launch_bounds__(512) settle_kernel(CacheView c, NewRows rows, const float* weights, const int32_t* victims, int32_t near, Faults faults) {
  extern __shared__ float shared[];  // near: [kArrays, slots + 1]
  __shared__ SettleArea area;
  __shared__ alignas(16) T key[512], value[512];
  wait_for_previous();
  let_next_start();
  const int32_t unit = blockIdx.x, n = unit % c.kv_heads, dim = c.head_dim;
  const int64_t head = c.first + unit, b = unit / c.kv_heads;
  Counts& counts = c.counts[head];
  const int32_t kept = counts.kept, step = counts.steps + 1;
  const Entries own = c.entries(head);
  Entries e = own;
  const int64_t stride = c.slots + 1;
  if (near) {
    e.score = shared, e.birth = reinterpret_cast<int32_t*>(shared + stride), e.rank = reinterpret_cast<int32_t*>(shared + 2 * stride);
    e.by_rank = shared + 3 * stride, e.measure = shared + 4 * stride, e.now = own.now ? shared + 5 * stride : nullptr;
  }
  const float *k = rows.keys + b * rows.row + int64_t{n} * dim, *v = k + rows.value;
  for (int32_t i = threadIdx.x; i < dim; i += blockDim.x) {
    float x = k[c.rope.source(i)];
    if (c.text && i < 2 * c.rope.pairs) {
      const int32_t pair = i % c.rope.pairs;
      const float2 both = make_float2(k[c.rope.source(pair)], k[c.rope.source(pair + c.rope.pairs)]);
      const float2 turned = rotated(both, turn_at(static_cast<uint32_t>(step - 1), c.rope.phases[pair]));
      x = i < c.rope.pairs ? turned.x : turned.y;
    }
    key[i] = from_float<T>(x);
    value[i] = from_float<T>(v[i]);
  }
  const float *given = weights + unit * stride, *of_layer = weights + b * c.kv_heads * stride;
  for (int32_t i = threadIdx.x; i <= kept; i += blockDim.x) {
    const bool cached = i < kept;
    const int32_t rank = cached ? own.rank[i] : kept;
    e.score[i] = (cached ? own.score[i] : 0.0f) + given[rank];
    e.birth[i] = cached ? own.birth[i] : step;
    e.rank[i] = rank;
    for (int32_t w = 0; w < c.width && !cached; w++) e.words[w * e.stride + i] = 0;
    if (!c.later) continue;
    float now = given[rank];
    if (c.select == WKV_SELECT_LOWEST_NOW) {
      now = 0.0f;
      for (int32_t h = 0; h < c.kv_heads; h++) now += of_layer[h * stride + rank];
      now /= static_cast<float>(c.kv_heads);
    }
    e.now[i] = now;
  }
  __syncthreads();
  if (threadIdx.x == 0) counts.steps = step;
  __syncthreads();
  settle<T>(c, head, e, kept, 1, key, value, victims ? victims[unit] : -1, faults, area);
}

}  // namespace

void settle_step(Context& ctx, const Cache& cache, const CacheView& view, const NewRows& rows, const float* weights, const int32_t* victims) {
  const size_t shared = size_t(kArrays) * (cache.slots + 1) * 4;
  const bool near = shared + 32 * 1024 <= static_cast<size_t>(ctx.shared_limit);
  by_cache_type(cache.dtype, [&](auto type) {
    launch(ctx, settle_kernel<decltype(type)>, {cache.sequences * cache.kv_heads, 512, near ? shared : 0}, view, rows, weights, victims, near, ctx.faults());
  });
}

}  // namespace wkv

using namespace wkv;

int32_t wkv_insert(int32_t context, int32_t handle, int32_t layer, int32_t kv, int32_t weights, int32_t victims) {
  return entry(context, [&](Context& ctx) {
    const CacheRef cache = find_cache(context, handle, layer);
    const int32_t n_heads = cache->kv_heads;
    const TensorRef rows = find_tensor(context, kv, "kv", WKV_F32, cache->sequences, 2 * n_heads * cache->head_dim);
    const TensorRef given = find_tensor(context, weights, "weights", WKV_F32, cache->sequences, n_heads * (cache->slots + 1));
    const TensorRef forced = find_victims(context, victims, *cache);
    ctx.hold(cache, rows, given, forced);
    settle_step(ctx, *cache, cache->view(layer), {rows->f32(), rows->columns, int64_t{n_heads} * cache->head_dim}, given->f32(), forced ? forced->i32() : nullptr);
    cache->touch(ctx, layer);
    ctx.submitted();
  });
}
`,
  "cuda/settle.cuh": `/** settle.cuh: steps 4 to 6 of a decode step for one head by one block: select, merge, insert; used by settle.cu and prefill.cu. */
#pragma once
#include "cache.cuh"

namespace wkv {

constexpr int32_t kMany = 8;  // tokens that leave together rather than one by one

/** Shared memory of settle. */
struct SettleArea {
  float value[32];
  int32_t rank[32], bad[32];
  int32_t around[4];       // entries of the ranks victim - 1 .. victim + 2; -1: none
  int32_t targets[WKV_SPREAD_RANKS];  // entries of the ranks behind the victim; -1: none
  int32_t freed, arrived_left, first_freed, holes, into;
  float sum[512];          // a row's worth; zeros where eights go past it
  float part[16 * 128];    // each warp's part of some dimensions of it
};

/** One head while tokens leave it: entries [0, kept) are its slots, [kept, total) the incoming tokens. All threads call everything. */
template <typename T>
struct Settling {
  const CacheView& c;
  const int64_t head;
  const Entries& e;
  const int32_t kept, total;
  T *const in_keys, *const in_values;
  SettleArea& area;
  const int32_t tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, threads = blockDim.x, warps = threads >> 5, dim = c.head_dim;
  const int32_t step = c.counts[head].steps;
  T *const keys = c.keys_of<T>(head), *const values = c.values_of<T>(head);

  __device__ T* key_of(int32_t entry) const { return entry < kept ? keys + int64_t{entry} * dim : in_keys + int64_t{entry - kept} * dim; }
  __device__ T* value_of(int32_t entry) const { return entry < kept ? values + int64_t{entry} * dim : in_values + int64_t{entry - kept} * dim; }
  __device__ float average(int32_t entry) const { return wkv_average(e.score[entry], step - e.birth[entry] + 1); }
  /** The weight of a token's value in a merge, and what an average rule minimises. */
  __device__ float weight(int32_t entry) const { return c.select == WKV_SELECT_LITERAL_AVERAGE ? e.score[entry] : average(entry); }
  __device__ bool there(int32_t entry) const { return e.rank[entry] >= 0; }

  /** Notes this step's weights, whether or not a token leaves. */
  __device__ void note() const {
    const bool often = c.select == WKV_SELECT_LEAST_OFTEN;
    if (c.merge == WKV_MERGE_NEAREST_VOTES) {
      for (int32_t i = kept + tid; i < total; i += threads) e.number(0)[i] = 1.0f;
      __syncthreads();
    }
    if (!often && c.select != WKV_SELECT_WINDOW) return;
    const float threshold = 1.0f / static_cast<float>(total);
    const int32_t bit = (step - 1) % WKV_OFTEN_STEPS;
    for (int32_t i = tid; i < total; i += threads) {
      if (often) {
        uint32_t& word = e.words[bit / 32 * e.stride + i];
        word = e.now[i] > threshold ? word | 1u << bit % 32 : word & ~(1u << bit % 32);
      } else {
        e.number((step - 1) % WKV_WINDOW_STEPS)[i] = e.now[i];
      }
    }
    __syncthreads();
  }

  /** Eight numbers of a row from dimension d on, zeros behind its end. */
  __device__ void read_eight(const T* row, int32_t d, float (&x)[8]) const {
    if (dim % 8 == 0) {
      uint4 words[sizeof(T) / 2];
#pragma unroll
      for (int w = 0; w < static_cast<int>(sizeof(T) / 2); w++) words[w] = reinterpret_cast<const uint4*>(row + d)[w];
#pragma unroll
      for (int k = 0; k < 8; k++) x[k] = to_float(reinterpret_cast<const T*>(words)[k]);
    } else {
      for (int k = 0; k < 8; k++) x[k] = d + k < dim ? to_float(row[d + k]) : 0.0f;
    }
  }

  /** Lanes that share a row, eight dimensions each at a time. */
  __device__ int32_t lanes_of(int32_t most) const { return dim <= 64 ? 8 : dim <= 128 ? 16 : most; }

  /** area.sum[d] = sum over tokens of weights[i] * rows[i][d], in a fixed order. */
  template <typename Row>
  __device__ void add_rows(Row row, const float* weights) const {
    const int32_t lanes = lanes_of(16), own = 32 / lanes;
    for (int32_t first = 0; first < dim; first += lanes * 8) {
      const int32_t d = first + lane % lanes * 8;
      float sums[8] = {};
      if (d < dim) {
#pragma unroll 4
        for (int32_t i = warp * own + lane / lanes; i < total; i += warps * own) {
          if (!there(i)) continue;
          float x[8];
          read_eight(row(i), d, x);
#pragma unroll
          for (int k = 0; k < 8; k++) sums[k] = fmaf(weights[i], x[k], sums[k]);
        }
      }
      for (int o = lanes; o < 32; o *= 2) {
#pragma unroll
        for (int k = 0; k < 8; k++) sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], o);
      }
      __syncthreads();
      if (lane < lanes) {
#pragma unroll
        for (int k = 0; k < 8; k++) area.part[(warp * lanes + lane) * 8 + k] = sums[k];
      }
      __syncthreads();
      for (int32_t x = tid; x < lanes * 8; x += threads) {
        float sum = 0.0f;
        for (int32_t w = 0; w < warps; w++) sum += area.part[w * lanes * 8 + x];
        area.sum[first + x] = sum;
      }
    }
    __syncthreads();
  }

  /** measure[i] = finish(sums over a row's dimensions of part(number, dimension)); some lanes a row, some rows a warp at once. */
  template <typename Row, typename Part, typename Finish>
  __device__ void measure_rows(Row row, Part part, Finish finish) const {
    constexpr int kAtOnce = 4;
    const int32_t lanes = lanes_of(32), own = 32 / lanes;
    for (int32_t base = warp * kAtOnce * own; base < total; base += warps * kAtOnce * own) {
      const int32_t i = base + lane / lanes;
      float2 sums[kAtOnce] = {};
      for (int32_t d = lane % lanes * 8; d < dim; d += lanes * 8) {
        float x[kAtOnce][8] = {};
#pragma unroll
        for (int r = 0; r < kAtOnce; r++) {
          if (i + r * own < total && there(i + r * own)) read_eight(row(i + r * own), d, x[r]);
        }
#pragma unroll
        for (int r = 0; r < kAtOnce; r++) {
#pragma unroll
          for (int k = 0; k < 8; k++) {
            const float2 y = part(x[r][k], d + k);
            sums[r].x += y.x, sums[r].y += y.y;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) {
        for (int o = lanes / 2; o > 0; o /= 2) {
          sums[r].x += __shfl_xor_sync(0xffffffffu, sums[r].x, o);
          sums[r].y += __shfl_xor_sync(0xffffffffu, sums[r].y, o);
        }
        if (lane % lanes == 0 && i + r * own < total) e.measure[i + r * own] = finish(sums[r]);
      }
    }
    __syncthreads();
  }

  /** Measures all tokens before the first leaves. */
  __device__ void measure_all() const {
    const auto key = [&](int32_t i) { return key_of(i); };
    const auto value = [&](int32_t i) { return value_of(i); };
    switch (c.select) {
      case WKV_SELECT_LEAST_OFTEN:
      case WKV_SELECT_WINDOW:
        for (int32_t i = tid; i < total; i += threads) {
          float sum = 0.0f;
          if (c.select == WKV_SELECT_WINDOW) {
            for (int32_t w = 0; w < WKV_WINDOW_STEPS; w++) sum += e.number(w)[i];
            sum /= WKV_WINDOW_STEPS;
          } else {
            int32_t count = 0;
            for (int32_t w = 0; w < WKV_OFTEN_WORDS; w++) count += __popc(e.words[w * e.stride + i]);
            sum = static_cast<float>(count);
          }
          e.measure[i] = sum;
        }
        __syncthreads();
        break;
      case WKV_SELECT_KEY_NORM:
        measure_rows(key, [](float x, int32_t) { return make_float2(x * x, 0.0f); }, [](float2 s) { return s.x; });
        break;
      case WKV_SELECT_SUM_VALUE_NORM:
        measure_rows(value, [](float x, int32_t) { return make_float2(fabsf(x), 0.0f); }, [](float2 s) { return s.x; });
        break;
      case WKV_SELECT_OUTPUT_ERROR:
        add_rows(value, e.now);
        measure_rows(value, [&](float x, int32_t d) { return make_float2((x - area.sum[d]) * (x - area.sum[d]), 0.0f); }, [](float2 s) { return sqrtf(s.x); });
        break;
      default: break;
    }
  }

  /** What key-likeness measures, anew whenever a token leaves: each normalised key times the sum of all of them. */
  __device__ void measure_likeness() const {
    const auto key = [&](int32_t i) { return key_of(i); };
    measure_rows(key, [](float x, int32_t) { return make_float2(x * x, 0.0f); }, [](float2 s) { return 1.0f / fmaxf(sqrtf(s.x), 1e-12f); });
    add_rows(key, e.measure);
    measure_rows(key, [&](float x, int32_t d) { return make_float2(x * area.sum[d], x * x); }, [](float2 s) { return s.x * (1.0f / fmaxf(sqrtf(s.y), 1e-12f)); });
  }

  /** The entry whose value is the lowest, the lowest rank of equals, in area.rank[0] (its rank) and area.value[0]; in area.bad[0] the
   *  lowest rank without one. value(entry, rank) is asked for the tokens of ranks that may(rank). */
  template <typename May, typename Value>
  __device__ void find_least(May may, Value value) const {
    float least = INFINITY;
    int32_t best = INT_MAX, bad = INT_MAX;
    for (int32_t i = tid; i < total; i += threads) {
      const int32_t rank = e.rank[i];
      if (rank < 0 || !may(rank)) continue;
      const float x = value(i, rank);
      if (isnan(x)) bad = min(bad, rank);
      if (x < least || (x == least && rank < best)) least = x, best = rank;
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
      area.value[0] = least, area.rank[0] = best, area.bad[0] = bad;
    }
    __syncthreads();
  }

  /** Leaves the rank that minimises the policy's value in area.rank[0], and the lowest that has none in area.bad[0]. */
  __device__ void pick(int32_t count) const {
    const bool gapped = c.gapped(), pools = c.select == WKV_SELECT_WINDOW;
    if (c.select == WKV_SELECT_KEY_LIKENESS) measure_likeness();
    if (gapped || pools) {
      for (int32_t i = tid; i < total; i += threads) {
        if (there(i)) e.by_rank[e.rank[i]] = gapped ? average(i) : e.measure[i];
      }
      __syncthreads();
    }
    find_least([&](int32_t rank) { return wkv_evictable(rank, count, c.sinks, c.recent); }, [&](int32_t i, int32_t rank) {
      if (gapped && rank + 1 == count) return INFINITY;  // the newest has no right neighbour to be merged with
      wkv_token t{rank, e.score[i], weight(i), 0.0f, 0.0f, 0.0f};
      if (gapped) t.right = e.by_rank[rank + 1], t.measure = e.gap[i];
      else if (pools) t.measure = pooled(rank, count);
      else if (c.later) t.now = e.now ? e.now[i] : 0.0f, t.measure = e.measure[i];
      return wkv_select_value(c.select, t);
    });
  }

  /** The mean over neighbouring ranks, those of recent tokens counting as 0. */
  __device__ float pooled(int32_t rank, int32_t count) const {
    float sum = 0.0f;
    for (int32_t r = max(0, rank - WKV_WINDOW_POOL / 2); r <= rank + WKV_WINDOW_POOL / 2; r++) {
      if (r < count - c.recent) sum += e.by_rank[r];
    }
    return sum / WKV_WINDOW_POOL;
  }

  __device__ void update_gap(int32_t entry, int32_t right) const {
    const float gap = warp_gap(value_of(entry), value_of(right), dim);
    if (lane == 0) e.gap[entry] = gap;
  }

  /** The newest cached token and those that arrive have right neighbours now. */
  __device__ void update_gaps() const {
    if (tid == 0) area.around[0] = -1;
    __syncthreads();
    for (int32_t i = tid; i < kept; i += threads) {
      if (e.rank[i] == kept - 1) area.around[0] = i;
    }
    __syncthreads();
    for (int32_t i = kept - 1 + warp; i < total - 1; i += warps) {
      const int32_t entry = i < kept ? area.around[0] : i;
      if (entry >= 0) update_gap(entry, i + 1);
    }
    __syncthreads();
  }

  /** Takes rank j of \`count\` out and hands its rows on; the turn-th of a step. */
  __device__ void leave(int32_t j, int32_t count, int32_t turn) const {
    if (tid < WKV_SPREAD_RANKS) area.targets[tid] = -1;
    __syncthreads();
    for (int32_t i = tid; i < total; i += threads) {
      const int32_t rank = e.rank[i];
      if (rank < 0) continue;
      if (rank >= j - 1 && rank <= j + 2) area.around[rank - j + 1] = i;
      if (rank > j && rank <= j + WKV_SPREAD_RANKS) area.targets[rank - j - 1] = i;
      if (rank == j) e.rank[i] = -1;
      else if (rank > j) e.rank[i] = rank - 1;
    }
    __syncthreads();
    const int32_t left = area.around[0], victim = area.around[1], right = area.around[2], far = area.around[3];
    const int32_t into = hand_on(victim, right, j, turn);
    if (tid == 0) {
      Counts& counts = c.counts[head];
      counts.event[0] = static_cast<float>(e.birth[victim] - 1);
      counts.event[1] = into >= 0 ? static_cast<float>(e.birth[into] - 1) : -1.0f;
      counts.event[2] = weight(victim);
      counts.event[3] = into >= 0 ? weight(into) : right >= 0 ? weight(right) : 0.0f;
      if (into >= 0) counts.merged++;
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
    if (c.gapped() && right >= 0) {
      if (warp == 0 && left >= 0) update_gap(left, right);
      if (warp == 1 && far >= 0) update_gap(right, far);
      __syncthreads();
    }
  }

  /** to = body(from, to) in each dimension, rounded once; \`threads\` of them call it, \`t\` being the first dimension. */
  template <typename Body>
  __device__ void join(const T* from, T* to, int32_t t, int32_t stride, Body body) const {
    for (int32_t d = t; d < dim; d += stride) to[d] = from_float<T>(body(to_float(from[d]), to_float(to[d])));
  }

  /** What becomes of the victim's rows; gives the entry that took them in, or -1. */
  __device__ int32_t hand_on(int32_t victim, int32_t right, int32_t j, int32_t turn) const {
    const auto merge = [&](float w_v, float w_r) { return [=](float v, float r) { return wkv_merged(w_v, v, w_r, r); }; };
    switch (c.merge) {
      case WKV_MERGE_RIGHT:
      case WKV_MERGE_RIGHT_LIGHT: {
        if (right < 0) return -1;
        const float w_v = wkv_given(c.merge, weight(victim)), w_r = weight(right);
        if (w_v + w_r > 0.0f) join(value_of(victim), value_of(right), tid, threads, merge(w_v, w_r));
        return right;
      }
      case WKV_MERGE_SPREAD: return spread(victim, turn);
      case WKV_MERGE_NEAREST: {
        const int32_t to = nearest(victim, j);
        if (to < 0) return -1;
        const float likeness = -area.value[0];
        float& threshold = c.counts[head].threshold;
        const float before = threshold;
        __syncthreads();
        if (tid == 0) threshold = before == WKV_UNSET ? likeness : (before + likeness) * 0.5f;
        if (before != WKV_UNSET && likeness < before) return -1;
        const auto halve = [=](float v, float r) { return wkv_halved(r, likeness, v); };
        join(key_of(victim), key_of(to), tid, threads, halve);
        join(value_of(victim), value_of(to), tid, threads, halve);
        return to;
      }
      case WKV_MERGE_NEAREST_VOTES: {
        const int32_t to = nearest(victim, j);
        if (to < 0 || -area.value[0] < WKV_VOTES_LIKENESS) return -1;
        float* votes = e.number(0);
        const float w_v = votes[victim] * weight(victim), w_r = votes[to] * weight(to);
        __syncthreads();
        if (tid == 0) votes[to] += votes[victim];
        if (w_v + w_r > 0.0f) {
          join(key_of(victim), key_of(to), tid, threads, merge(w_v, w_r));
          join(value_of(victim), value_of(to), tid, threads, merge(w_v, w_r));
        }
        return to;
      }
      default: return -1;
    }
  }

  __device__ int32_t spread(int32_t victim, int32_t turn) const {
    float scores = 0.0f;
    int32_t count = 0;
    for (; count < WKV_SPREAD_RANKS && area.targets[count] >= 0; count++) scores += e.score[area.targets[count]];
    if (count == 0) return -1;
    const int32_t heads = c.kv_heads, index = static_cast<int32_t>(head);
    const float draw = wkv_draw(c.seed, index / (heads * c.sequences), index / heads % c.sequences, index % heads, step - (total - kept), turn);
    if (!wkv_spreads(e.score[victim], scores, count, draw)) return -1;
    for (int32_t i = warp; i < count; i += warps) {
      join(value_of(victim), value_of(area.targets[i]), lane, 32, [](float v, float x) { return x + v * (1.0f / WKV_SPREAD_RANKS); });
    }
    return area.targets[0];
  }

  /** The entry whose key is most like the victim's, which has left; -1: it was alone. Its cosine is -area.value[0]. */
  __device__ int32_t nearest(int32_t victim, int32_t j) const {
    const T* own = key_of(victim);
    float squares = 0.0f;
    for (int32_t d = lane; d < dim; d += 32) squares += to_float(own[d]) * to_float(own[d]);
    squares = warp_sum(squares);
    for (int32_t d = tid; d < (dim + 7) / 8 * 8; d += threads) area.sum[d] = d < dim ? to_float(own[d]) : 0.0f;
    __syncthreads();
    measure_rows([&](int32_t i) { return key_of(i); }, [&](float x, int32_t d) { return make_float2(x * area.sum[d], x * x); }, [&](float2 s) { return wkv_cosine(s.x, s.y, squares); });
    find_least([](int32_t) { return true; }, [&](int32_t i, int32_t) { return -e.measure[i]; });
    if (area.rank[0] == INT_MAX) return -1;
    for (int32_t i = tid; i < total; i += threads) {
      if (e.rank[i] == area.rank[0]) area.into = i;
    }
    __syncthreads();
    return area.into;
  }

  /** Writes entry \`from\`'s state to a slot; a warp calls it. */
  __device__ void fill(const Entries& own, int32_t slot, int32_t from) const {
    const T *key = key_of(from), *value = value_of(from);
    for (int32_t d = lane; d < dim; d += 32) keys[int64_t{slot} * dim + d] = key[d], values[int64_t{slot} * dim + d] = value[d];
    for (int32_t w = lane; w < c.width; w += 32) own.words[w * own.stride + slot] = e.words[w * e.stride + from];
    if (lane == 0) own.score[slot] = e.score[from], own.birth[slot] = e.birth[from], own.rank[slot] = e.rank[from];
  }

  /** Gives the tokens that arrived slots: freed ones in the order of leaving, then unused ones. Used slots stay the first ones. With
   *  \`places\` their slots are told, -1 for those that have left, behind \`kept\`, and neither they nor the state of those that stayed are
   *  written. */
  __device__ void place(int32_t arrived, int32_t* places) const {
    const int32_t freed = area.freed, stayed = kept - freed, left = stayed + area.arrived_left;
    const Entries own = c.entries(head);
    if (!places && own.rank != e.rank) {
      for (int32_t i = tid; i < kept; i += threads) {
        if (!there(i)) continue;
        own.score[i] = e.score[i], own.birth[i] = e.birth[i], own.rank[i] = e.rank[i];
        if (own.words == e.words) continue;
        for (int32_t w = 0; w < c.width; w++) own.words[w * own.stride + i] = e.words[w * e.stride + i];
      }
    }
    if (tid == 0) {
      area.holes = freed;
      if (left < kept && e.freed) {
        area.holes = 0;
        for (int32_t i = 0; i < freed; i++) {
          if (e.freed[i] < left) e.freed[area.holes++] = e.freed[i];
        }
      }
    }
    __syncthreads();
    const int32_t holes = area.holes;
    const auto slot_of = [&](int32_t t) {
      const int32_t rank = e.rank[kept + t], order = rank - stayed;
      return rank < 0 ? -1 : order >= holes ? kept + order - holes : e.freed ? e.freed[order] : area.first_freed;
    };
    if (places) {
      for (int32_t t = tid; t < arrived; t += threads) places[1 + t] = slot_of(t);
      if (tid == 0) places[0] = kept;
    } else {
      for (int32_t t = warp; t < arrived; t += warps) {
        const int32_t slot = slot_of(t);
        if (slot >= 0) fill(own, slot, kept + t);
      }
    }
    if (tid == 0) c.counts[head].kept = left;
    if (left >= kept) return;
    // More left than arrived: tokens move down into the holes, in the order of their slots.
    if (warp > 0) return;
    int32_t next = area.arrived_left;
    for (int32_t base = left; base < kept; base += 32) {
      uint32_t moves = __ballot_sync(0xffffffffu, base + lane < kept && there(base + lane));
      for (; moves; moves &= moves - 1) fill(own, e.freed[next++], base + __ffs(moves) - 1);
    }
  }
};

/**
 * Tokens that leave in numbers. Of most rules a token's value does not change while others leave, and which tokens may leave does not
 * either: then the victims are the first of the evictable ones in the order of (value, rank), and with T(r) = the turn at which rank r
 * leaves (ranks as they are before the first leaves; a token that stays: never), a victim's right neighbour in its turn is the next rank
 * to the right with a later T. So each token takes in, one after the other, x - 1, then p(x - 1), p(p(x - 1)), ... as long as they leave
 * before x, p being the next rank to the left with a later T. Runs of ranks with rising T are walked by a warp each, the value of the
 * moment in registers, from left to right, waiting for the ends of runs further left: the same sums in the same order as one by one.
 * Where the oldest leaves and gives to ranks behind it, the block does that turn by turn. Rules by cost, whose merges change the costs of two
 * neighbours, go one by one.
 */
template <typename T>
struct Leaving {
  const Settling<T>& s;
  const Entries& e;
  SettleArea& area;
  const int64_t stride;
  int32_t* const scratch;  // [kScratch, stride]
  const int32_t tid = s.tid, warp = s.warp, lane = s.lane, threads = s.threads, warps = s.warps, total = s.total;
  static constexpr int kScratch = 6, kNever = INT_MAX;
  static constexpr int kSlab = 128, kPer = kSlab / 32, kAhead = 8;  // dimensions of a row that a warp holds; rows on their way

  __device__ int32_t* array(int i) const { return scratch + i * stride; }
  __device__ int32_t* turns() const { return array(4); }     // T, by rank
  __device__ int32_t* entries() const { return array(5); }   // by rank

  /** Whether a rule's values stay while tokens leave. */
  static __device__ bool takes(const CacheView& c) {
    const bool stays = c.select == WKV_SELECT_OLDEST || c.select == WKV_SELECT_LOWEST_AVERAGE || c.select == WKV_SELECT_LITERAL_AVERAGE || c.select == WKV_SELECT_LOWEST_SUM ||
                       c.select == WKV_SELECT_LEAST_OFTEN || c.select == WKV_SELECT_KEY_NORM || c.select == WKV_SELECT_SUM_VALUE_NORM;
    if (c.merge == WKV_MERGE_SPREAD) return c.select == WKV_SELECT_OLDEST;
    return stays && (c.merge == WKV_MERGE_NONE || wkv_merges_right(c.merge));
  }

  /** The sum over the threads before this one, and over all in area.into; exact, as all are whole numbers. */
  __device__ int32_t sum_before(int32_t x) const {
    int32_t sum = x;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      const int32_t y = __shfl_up_sync(0xffffffffu, sum, o);
      if (lane >= o) sum += y;
    }
    __syncthreads();
    if (lane == 31) area.rank[warp] = sum;
    __syncthreads();
    int32_t before = 0, all = 0;
    for (int w = 0; w < warps; w++) {
      if (w == warp) before = all;
      all += area.rank[w];
    }
    __syncthreads();
    if (tid == 0) area.into = all;
    __syncthreads();
    return before + sum - x;
  }

  /** Sorts \`count\` pairs of arrays 0 (keys) and 1 (ranks) by key, equals as they are; gives the array of ranks. */
  __device__ int32_t* sort(int32_t count) const {
    constexpr int kBits = 7, kDigits = 1 << kBits;
    uint32_t* const counts = reinterpret_cast<uint32_t*>(area.part);  // [warps, kDigits]
    static_assert(sizeof area.part >= 16 * kDigits * 4, "a count a warp and digit");
    const int32_t own = (count + warps * 32 - 1) / (warps * 32) * 32, first = min(warp * own, count), end = min(first + own, count);
    int from = 0;
    for (int shift = 0; shift < 32; shift += kBits, from ^= 2) {
      const uint32_t* keys = reinterpret_cast<const uint32_t*>(array(from));
      const int32_t* ranks = array(from + 1);
      uint32_t* to_keys = reinterpret_cast<uint32_t*>(array(from ^ 2));
      int32_t* to_ranks = array((from ^ 2) + 1);
      const auto digit_of = [&](uint32_t key) { return key >> shift & (kDigits - 1); };
      for (int32_t i = lane; i < kDigits; i += 32) counts[warp * kDigits + i] = 0;
      __syncwarp();
      for (int32_t i = first + lane; i < end; i += 32) atomicAdd(&counts[warp * kDigits + digit_of(keys[i])], 1u);
      __syncthreads();
      // Where each warp's numbers of each digit begin.
      uint32_t sum = 0;
      if (tid < kDigits) {
        for (int w = 0; w < warps; w++) {
          const uint32_t x = counts[w * kDigits + tid];
          counts[w * kDigits + tid] = sum;
          sum += x;
        }
      }
      const uint32_t before = sum_before(tid < kDigits ? static_cast<int32_t>(sum) : 0);
      if (tid < kDigits) {
        for (int w = 0; w < warps; w++) counts[w * kDigits + tid] += before;
      }
      __syncthreads();
      for (int32_t base = first; base < end; base += 32) {
        const bool inside = base + lane < end;
        const uint32_t key = inside ? keys[base + lane] : 0, digit = inside ? digit_of(key) : kDigits;
        const uint32_t same = __match_any_sync(0xffffffffu, digit);
        const int32_t at = __popc(same & ((1u << lane) - 1));
        uint32_t place = 0;
        if (inside) place = counts[warp * kDigits + digit] + at;
        __syncwarp();
        if (inside && at == 0) counts[warp * kDigits + digit] += __popc(same);
        __syncwarp();
        if (inside) to_keys[place] = key, to_ranks[place] = ranks[base + lane];
      }
      __syncthreads();
    }
    return array(from + 1);
  }

  /** Of a float, so that lower ones come first; both zeros are equal. */
  static __device__ uint32_t key_of(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }

  /** The next rank to the left of r with a later turn than r's; -1: none. highs: the latest turns of 32 and of 1024 ranks. */
  __device__ int32_t later_left(int32_t r, const int32_t* highs, const int32_t* highest) const {
    const int32_t own = turns()[r];
    int32_t i = r - 1;
    while (i >= 0) {
      if ((i & 1023) == 1023 && highest[i >> 10] <= own) i -= 1024;
      else if ((i & 31) == 31 && highs[i >> 5] <= own) i -= 32;
      else if (turns()[i] > own) return i;
      else i--;
    }
    return -1;
  }

  /** Merges all victims to the right; lefts: p of each, done: flags, how many slabs of a rank's row took in all that they ever will. */
  __device__ void merge(const int32_t* lefts, volatile int32_t* done) const {
    const int32_t* const at = turns();
    const float* const weights = e.by_rank;
    for (int32_t slab = 0; slab * kSlab < s.dim; slab++) {
      const int32_t d0 = slab * kSlab + lane;
      const auto read = [&](int32_t rank, float (&x)[kPer]) {
        const T* row = s.value_of(entries()[rank]);
#pragma unroll
        for (int k = 0; k < kPer; k++) x[k] = d0 + k * 32 < s.dim ? to_float(row[d0 + k * 32]) : 0.0f;
      };
      __syncthreads();
      if (tid == 0) area.holes = 0;
      __syncthreads();
      for (;;) {
        int32_t base = 0;
        if (lane == 0) base = atomicAdd(&area.holes, 32);
        base = __shfl_sync(0xffffffffu, base, 0);
        if (base >= total) break;
        // Runs of two and more begin where the turn before is later and that behind is too.
        const int32_t r = base + lane;
        const bool begins = r + 1 < total && at[r] < at[r + 1] && !(r > 0 && at[r - 1] < at[r]);
        uint32_t starts = __ballot_sync(0xffffffffu, begins);
        for (; starts; starts &= starts - 1) {
          int32_t x = base + __ffs(starts) - 1;
          float value[kPer];
          read(x, value);
          // x holds its last value; its right neighbour takes it in, and what else leaves before that.
          while (x + 1 < total && at[x] < at[x + 1]) {
            float own[kPer];
            read(x + 1, own);
            const int32_t turn = at[x + 1];
            const float weight = weights[x + 1];
            const auto take = [&](float average, const float (&from)[kPer]) {
              const float w = wkv_given(s.c.merge, average);
              if (!(w + weight > 0.0f)) return;
#pragma unroll
              for (int k = 0; k < kPer; k++) own[k] = to_float(from_float<T>(wkv_merged(w, from[k], weight, own[k])));
            };
            take(weights[x], value);
            int32_t next = lefts[x], count = 0;
            float rows[kAhead][kPer], factors[kAhead];
            do {
              count = 0;
#pragma unroll
              for (int u = 0; u < kAhead; u++) {
                if (next < 0 || at[next] >= turn) continue;
                while (done[next] <= slab) {}
                __threadfence_block();
                factors[u] = weights[next];
                read(next, rows[u]);
                next = lefts[next], count = u + 1;
              }
#pragma unroll
              for (int u = 0; u < kAhead; u++) {
                if (u < count) take(factors[u], rows[u]);
              }
            } while (count == kAhead);
            x++;
#pragma unroll
            for (int k = 0; k < kPer; k++) value[k] = own[k];
          }
          T* row = s.value_of(entries()[x]);
#pragma unroll
          for (int k = 0; k < kPer; k++) {
            if (d0 + k * 32 < s.dim) row[d0 + k * 32] = from_float<T>(value[k]);
          }
          __threadfence_block();
          __syncwarp();
          if (lane == 0) done[x] = slab + 1;
        }
      }
      __syncthreads();
    }
  }

  /** The rank whose value is none, or INT_MAX; \`values\` of evictable ranks go to array 0 as keys, the ranks to array 1. */
  __device__ int32_t value_all(int32_t first, int32_t evictable) const {
    const CacheView& c = s.c;
    if (tid == 0) area.bad[0] = INT_MAX;
    __syncthreads();
    for (int32_t i = tid; i < evictable; i += threads) {
      const int32_t rank = first + i, entry = entries()[rank];
      const float value = wkv_select_value(c.select, {rank, e.score[entry], e.by_rank[rank], 0.0f, e.now ? e.now[entry] : 0.0f, c.later ? e.measure[entry] : 0.0f});
      if (isnan(value)) atomicMin(&area.bad[0], rank);
      array(0)[i] = static_cast<int32_t>(key_of(value)), array(1)[i] = rank;
    }
    __syncthreads();
    return area.bad[0];
  }

  /** Has the oldest leave, \`leaving\` times over, each giving its value to ranks behind it or not; counts them and says what the last did. */
  __device__ void spread_oldest(int32_t first, int32_t leaving) const {
    for (int32_t turn = 0; turn < leaving; turn++) {
      const int32_t rank = first + turn, victim = entries()[rank];
      if (tid < WKV_SPREAD_RANKS) area.targets[tid] = rank + 1 + tid < total ? entries()[rank + 1 + tid] : -1;
      __syncthreads();
      const int32_t into = s.spread(victim, turn);
      if (tid == 0) tell(victim, area.targets[0], into), into >= 0 ? s.c.counts[s.head].merged++ : s.c.counts[s.head].evicted++;
      __syncthreads();
    }
  }

  /** What the last token to leave did. */
  __device__ void tell(int32_t victim, int32_t right, int32_t into) const {
    Counts& counts = s.c.counts[s.head];
    counts.event[0] = static_cast<float>(e.birth[victim] - 1);
    counts.event[1] = into >= 0 ? static_cast<float>(e.birth[into] - 1) : -1.0f;
    counts.event[2] = s.weight(victim);
    counts.event[3] = into >= 0 ? s.weight(into) : right >= 0 ? s.weight(right) : 0.0f;
  }

  /** Has \`leaving\` tokens leave; false, and a fault is reported, when one has no value. */
  __device__ bool run(int32_t leaving, int32_t arrived, const Faults& faults) const {
    const CacheView& c = s.c;
    const int32_t first = c.sinks, evictable = total - c.recent - first;
    for (int32_t i = tid; i < total; i += threads) {
      const int32_t rank = e.rank[i];
      entries()[rank] = i, turns()[rank] = kNever;
      e.by_rank[rank] = s.weight(i);
    }
    __syncthreads();
    const int32_t bad = value_all(first, evictable);
    if (bad != INT_MAX) {
      if (tid == 0) faults.report(Fault::NanScore, bad);
      return false;
    }
    const int32_t* order = c.select == WKV_SELECT_OLDEST ? array(1) : sort(evictable);
    // The victims' slots in the order of leaving.
    int32_t freed = 0;
    for (int32_t base = 0; base < leaving; base += threads) {
      const int32_t i = base + tid;
      int32_t entry = INT_MAX;
      if (i < leaving) turns()[order[i]] = i, entry = entries()[order[i]];
      const int32_t at = freed + sum_before(entry < s.kept);
      if (entry < s.kept) e.freed[at] = entry;
      freed += area.into;
    }
    const int32_t last = order[leaving - 1];
    if (tid == 0) area.freed = freed;
    __syncthreads();
    int32_t dropped = c.merge == WKV_MERGE_NONE ? leaving : 0;
    if (c.merge == WKV_MERGE_SPREAD) spread_oldest(first, leaving);
    if (wkv_merges_right(c.merge)) {
      // The sort's arrays are free again.
      int32_t *highs = array(0), *lefts = array(2), *done = array(3), *highest = highs + (total + 31) / 32;
      for (int32_t k = warp; k * 32 < total; k += warps) {
        const int32_t r = k * 32 + lane, high = __reduce_max_sync(0xffffffffu, r < total ? turns()[r] : 0);
        if (lane == 0) highs[k] = high;
      }
      __syncthreads();
      for (int32_t k = warp; k * 1024 < total; k += warps) {
        const int32_t i = k * 32 + lane, high = __reduce_max_sync(0xffffffffu, i * 32 < total ? highs[i] : 0);
        if (lane == 0) highest[k] = high;
      }
      __syncthreads();
      for (int32_t r = tid; r < total; r += threads) {
        const int32_t turn = turns()[r];
        if (turn == kNever) continue;
        lefts[r] = later_left(r, highs, highest);
        // What takes nothing in is ready.
        done[r] = r > 0 && turns()[r - 1] < turn ? 0 : INT_MAX;
      }
      __syncthreads();
      merge(lefts, done);
      // Those behind whom nobody stays or leaves later have nobody to go to.
      if (tid == 0) {
        for (int32_t r = total - 1; r >= 0 && turns()[r] != kNever; r = lefts[r]) dropped++;
        area.into = dropped;
      }
      __syncthreads();
      dropped = area.into;
    }
    // The right neighbour of the last one: all others have left.
    if (tid == 0) area.around[0] = INT_MAX, area.arrived_left = arrived - (leaving - area.freed), area.first_freed = area.freed > 0 ? e.freed[0] : 0;
    __syncthreads();
    for (int32_t r = last + 1 + tid; r < total; r += threads) {
      if (turns()[r] != kNever) continue;
      atomicMin(&area.around[0], r);
      break;
    }
    __syncthreads();
    if (tid == 0 && c.merge != WKV_MERGE_SPREAD) {
      const int32_t right = area.around[0] == INT_MAX ? -1 : entries()[area.around[0]];
      tell(entries()[last], right, wkv_merges_right(c.merge) ? right : -1);
      c.counts[s.head].merged += leaving - dropped, c.counts[s.head].evicted += dropped;
    }
    // Ranks close up.
    int32_t left = 0;
    for (int32_t base = 0; base < total; base += threads) {
      const int32_t r = base + tid;
      const bool stays = r < total && turns()[r] == kNever;
      const int32_t rank = left + sum_before(stays);
      if (r < total) e.rank[entries()[r]] = stays ? rank : -1;
      left += area.into;
    }
    __syncthreads();
    return true;
  }
};

/**
 * Steps 4 to 6 for one head; scores already have this step's weights, counts->steps counts it. While too many tokens are left the
 * policy's victim (rank \`forced\` at first, -1: none) leaves; what is left of the incoming tokens, whose rows are in_keys and in_values,
 * then goes into free slots. \`e\` is the head's own state or a copy, which is written back. \`order\`: scratch of Leaving, of e's stride; null:
 * there is none, and tokens leave one by one. \`places\`: as of Settling::place; untouched after a fault.
 */
template <typename T>
__device__ void settle(const CacheView& c, int64_t head, const Entries& e, int32_t kept, int32_t arrived, T* in_keys, T* in_values, int32_t forced, const Faults& faults, SettleArea& area, int32_t* order = nullptr, int32_t* places = nullptr) {
  const int32_t tid = threadIdx.x, total = kept + arrived, target = wkv_target(total, c.slots, c.interval);
  const Settling<T> s{c, head, e, kept, total, in_keys, in_values, area};
  if (tid == 0) area.freed = 0, area.arrived_left = arrived;
  if (c.later) s.note();
  if (c.gapped()) s.update_gaps();
  if (total > target && c.select == WKV_SELECT_NONE) {
    if (tid == 0) faults.report(Fault::Full, c.slots);
    return;
  }
  if (total > target && !e.now && wkv_uses_now(c.select)) {
    if (tid == 0) faults.report(Fault::OneStep, 0);
    return;
  }
  if (total > target && c.select == WKV_SELECT_LITERAL_AVERAGE) {
    for (int32_t i = tid; i < total; i += blockDim.x) e.score[i] = s.average(i);
    __syncthreads();
  }
  if (total > target && c.later) s.measure_all();
  if (order && total - target >= kMany && Leaving<T>::takes(c)) {
    __syncthreads();
    if (Leaving<T>{s, e, area, e.stride, order}.run(total - target, arrived, faults)) s.place(arrived, places);
    return;
  }
  for (int32_t count = total, turn = 0; count > target; count--, turn++, forced = -1) {
    __syncthreads();
    if (tid < 4) area.around[tid] = -1;
    if (tid == 0 && forced != -1) area.rank[0] = forced, area.bad[0] = INT_MAX;
    if (forced == -1) s.pick(count);
    else __syncthreads();
    const int32_t j = area.rank[0], bad = area.bad[0];
    if (bad != INT_MAX) {
      if (tid == 0) faults.report(Fault::NanScore, bad);
      return;
    }
    if (!wkv_evictable(j, count, c.sinks, c.recent)) {
      if (tid == 0) faults.report(Fault::Rank, j == INT_MAX ? -1 : j, count, c.sinks, c.recent);
      return;
    }
    __syncthreads();
    s.leave(j, count, turn);
  }
  __syncthreads();
  s.place(arrived, places);
}

}  // namespace wkv
`,
  "cuda/tile.cuh": `/** tile.cuh: how the tensor-core kernels (matmul_int8.cu, matmul_half.cu, matmul_skinny.cu) share out a product, and how the first two finish it. */
#pragma once
#include <algorithm>

#include "linear.cuh"
#include "mma.cuh"

namespace wkv {

constexpr int kTileThreads = 256;

/** Parts of the columns for \`tiles\` blocks of that many stages: three blocks for two multiprocessors, so that the next launch's find room
 *  beside them, and a few stages a part. */
inline int32_t share_columns(const Context& ctx, int32_t tiles, int32_t stages) {
  if (ctx.capability < 90) return 1;
  return std::max(1, std::min({kMostParts, ctx.processors * 3 / 2 / tiles, stages / 4}));
}

/** How a block is laid out: warps along w and x; tiles of 16 rows of w and of 8 of x a warp; blocks of 32 columns a stage; at most so many
 *  stages; blocks that share a multiprocessor. */
template <int kWarpsW, int kWarpsX, int kTilesW, int kTilesX, int kBlocks_, int kStages_, int kResident_>
struct Plan {
  static_assert(kWarpsW * kWarpsX * 32 == kTileThreads);
  static constexpr int kAlongX = kWarpsX, kW = kTilesW, kX = kTilesX, kBlocks = kBlocks_, kStages = kStages_, kResident = kResident_;
  static constexpr int kRows = 16 * kTilesW * kWarpsW, kTokens = 8 * kTilesX * kWarpsX;
  static constexpr int kStride = kRows + 4, kSums = kTokens * kStride * 4;  // of the sums of a cluster's blocks, in shared memory; bytes
};

/** The rows of w (gated: 16 of gate, 16 of up, in turn) and of x that a block owns. \`parts\` blocks, a cluster, share their columns. */
template <typename P>
struct Tile {
  WeightView w, up;
  int32_t gated, rows, parts, part, t0, j0;
  int along_w, along_x, group, i;  // the warp's place; the lane is 4 group + i
  __device__ Tile(const WeightView& w, const WeightView& up, int32_t gated, int32_t rows, int32_t parts) : w(w), up(up), gated(gated), rows(rows), parts(parts) {
    part = blockIdx.x % parts, t0 = blockIdx.x / parts * P::kTokens, j0 = blockIdx.y * (P::kRows >> gated);
    const int warp = threadIdx.x / 32;
    along_w = warp / P::kAlongX, along_x = warp % P::kAlongX, group = threadIdx.x % 32 / 4, i = threadIdx.x % 4;
  }
  __device__ int32_t row_out(int r) const { return j0 + (gated ? r / 32 * 16 + r % 16 : r); }
  /** Past the end the last row stands in. */
  __device__ int64_t row_in(int r) const { return min(w.rows - 1, row_out(r)); }
  __device__ int64_t token_in(int t) const { return min(rows - 1, t0 + t); }
  __device__ const WeightView& weight(int r) const { return gated && r / 16 % 2 ? up : w; }

  /** Adds up the cluster's blocks and gives the results to \`to\`, those of x's row t times factors[t] (null: as they are). \`shared\` is free
   *  once all of the block's threads have come here. */
  __device__ void finish(const float (&total)[P::kW][P::kX][4], const float* factors, float* shared, const OutputView& to) const {
    const auto put = [&](int t, int r, float first, float second) {
      const int32_t j = row_out(r);
      if (t0 + t >= rows || j >= w.rows) return;
      const float factor = factors ? factors[t0 + t] : 1.0f;
      to.put(t0 + t, j, gated ? activate(to.activation, first * factor, second * factor) : first * factor);
    };
    const auto each = [&](auto body) {
#pragma unroll
      for (int m = 0; m < P::kW; m++) {
#pragma unroll
        for (int n = 0; n < P::kX; n++) {
#pragma unroll
          for (int k = 0; k < 4; k++) body((along_x * P::kX + n) * 8 + 2 * i + k % 2, (along_w * P::kW + m) * 16 + k / 2 * 8 + group, m, n, k);
        }
      }
    };
    if (parts == 1 && (!gated || P::kW % 2 == 0)) {
      return each([&](int t, int r, int m, int n, int k) {
        if (!gated || m % 2 == 0) put(t, r, total[m][n][k], total[(m + 1) % P::kW][n][k]);
      });
    }
    __syncthreads();
    each([&](int t, int r, int m, int n, int k) { shared[t * P::kStride + r] = total[m][n][k]; });
    if (parts > 1) arrive_cluster(), wait_cluster();
    else __syncthreads();
    const auto sum = [&](int t, int r) {
      const float* at = shared + t * P::kStride + r;
      return parts == 1 ? *at : sum_peers(at, parts);
    };
    const int wide = P::kRows >> gated, outputs = P::kTokens * wide;
    for (int o = outputs * part / parts + threadIdx.x; o < outputs * (part + 1) / parts; o += kTileThreads) {
      const int t = o / wide, r = gated ? o % wide / 16 * 32 + o % 16 : o % wide;
      if (t0 + t < rows) put(t, r, sum(t, r), gated ? sum(t, r + 16) : 0.0f);
    }
    if (parts > 1) arrive_cluster(), wait_cluster();  // the others still read
  }
};

}  // namespace wkv
`,
  "handles.cpp": `/** handles.cpp: the handle table, and the entries of wkv.h that know no device. */
#include "handles.hpp"

#include <algorithm>
#include <atomic>
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
std::atomic<int64_t> held{0};
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

void count_bytes(int64_t change) { held += change; }

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

int32_t wkv_memory(int32_t context, double* out, int32_t out_bytes) {
  return entry_of<ContextBase>(context, [&](ContextBase&) {
    require_buffer(out, out_bytes, 8, "out");
    *out = static_cast<double>(held.load());
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
  bool running = false;           // in a function that runs graphs, whose failures leave a recording alone
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

/** What wkv_qk_norm asks of its numbers and its weights' columns. */
inline void check_qk_norm(int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t q_columns, int32_t k_columns) {
  require(heads >= 1 && heads <= 4096 && kv_heads >= 1 && kv_heads <= 4096 && head_dim >= 1 && head_dim <= 4096, "heads, kv_heads and head_dim must be between 1 and 4096: " + std::to_string(heads) + ", " + std::to_string(kv_heads) + ", " + std::to_string(head_dim));
  require(q_columns == head_dim || q_columns == heads * head_dim, "q_weight has " + std::to_string(q_columns) + " columns, expected " + std::to_string(head_dim) + " or " + std::to_string(heads * head_dim));
  require(k_columns == head_dim || k_columns == kv_heads * head_dim, "k_weight has " + std::to_string(k_columns) + " columns, expected " + std::to_string(head_dim) + " or " + std::to_string(kv_heads * head_dim));
}

inline void check_softcap(float softcap) { require(softcap >= 0.0f && softcap <= 3.0e38f, "softcap must be 0 or a number above it: " + std::to_string(softcap)); }

/** Adds to what wkv_memory gives. */
void count_bytes(int64_t change);

/** Copies a text out, cut to out_bytes and ended by a zero. */
void give_text(const std::string& text, char* out, int32_t out_bytes);

}  // namespace wkv
`,
  "policy.h": `/** policy.h: the score, select and merge rules, compiled into both libraries so that they choose alike (docs/policies.md has their blocks). */
#ifndef WKV_POLICY_H
#define WKV_POLICY_H
#include <stdint.h>

#include "wkv.h"

#ifdef __CUDACC__
#define WKV_HD __host__ __device__
#else
#define WKV_HD
#endif

constexpr int32_t WKV_OFTEN_STEPS = 400;                          /* steps that least-often looks back on */
constexpr int32_t WKV_OFTEN_WORDS = (WKV_OFTEN_STEPS + 31) / 32;  /* a bit each */
constexpr int32_t WKV_WINDOW_STEPS = 32;                          /* weights that window keeps */
constexpr int32_t WKV_WINDOW_POOL = 5;                            /* ranks that it pools */
constexpr int32_t WKV_SPREAD_RANKS = 16;                          /* ranks that spread gives a value to */
constexpr float WKV_VOTES_LIKENESS = 0.8f;                        /* the cosine below which nearest-votes drops */
constexpr float WKV_UNSET = -2.0f;                                /* a threshold of nearest before its first cosine */

/** What a rule may look at in a token. */
struct wkv_token {
  int32_t rank;
  float score;    /* a */
  float average;  /* a / n: the paper's weight */
  float right;    /* the right neighbour's average */
  float now;      /* its weight in this step */
  float measure;  /* what wkv_measures names */
};

/** The average attention a / n of a token. */
WKV_HD inline float wkv_average(float score, int32_t steps) { return score / (float)steps; }

/** Whether the token of this rank may leave, of \`total\` tokens with the new one. */
WKV_HD inline bool wkv_evictable(int32_t rank, int32_t total, int32_t sinks, int32_t recent) {
  return rank >= sinks && rank < total - recent;
}

/** Tokens that are left after a step with \`total\` of them. */
WKV_HD inline int32_t wkv_target(int32_t total, int32_t slots, int32_t interval) { return total > slots ? slots + 1 - interval : total; }

/** Whether the rule needs the gap |V_j - V_r|^2 to the right neighbour. */
WKV_HD inline bool wkv_uses_gap(int32_t select) { return select == WKV_SELECT_MERGE_COST || select == WKV_SELECT_MERGE_COST_LINEAR; }

/** Whether the rule asks for a measure of stored rows: a norm, a likeness or a distance. */
WKV_HD inline bool wkv_measures_rows(int32_t select) {
  return select == WKV_SELECT_KEY_NORM || select == WKV_SELECT_KEY_LIKENESS || select == WKV_SELECT_SUM_VALUE_NORM || select == WKV_SELECT_OUTPUT_ERROR;
}

/** Words of 32 bits that a token carries beside score and birth; the gap is the first of a rule that uses it. */
WKV_HD inline int32_t wkv_words(int32_t select, int32_t merge) {
  if (wkv_uses_gap(select)) return 1;
  if (select == WKV_SELECT_LEAST_OFTEN) return WKV_OFTEN_WORDS;
  if (select == WKV_SELECT_WINDOW) return WKV_WINDOW_STEPS;
  return merge == WKV_MERGE_NEAREST_VOTES ? 1 : 0;
}

/** Whether the rule keeps a record of each step's own weights, which column sums do not hold. */
WKV_HD inline bool wkv_by_step(int32_t select) { return select == WKV_SELECT_LEAST_OFTEN || select == WKV_SELECT_WINDOW; }

/** Whether the rule chooses by the weights of the present step. */
WKV_HD inline bool wkv_uses_now(int32_t select) { return select == WKV_SELECT_LOWEST_NOW || select == WKV_SELECT_OUTPUT_ERROR; }

/** Whether the victim's value goes into its right neighbour's. */
WKV_HD inline bool wkv_merges_right(int32_t merge) { return merge == WKV_MERGE_RIGHT || merge == WKV_MERGE_RIGHT_LIGHT; }

/** What the victim weighs in that merge, of its average. */
WKV_HD inline float wkv_given(int32_t merge, float w_v) { return merge == WKV_MERGE_RIGHT_LIGHT ? 0.25f * w_v : w_v; }

/** Whether wkv_attend's one launch can choose and act, or a second one must see all weights of the step. */
WKV_HD inline bool wkv_in_one_launch(int32_t select, int32_t merge, int32_t interval) {
  return interval == 1 && select <= WKV_SELECT_LOWEST_SUM && (merge == WKV_MERGE_NONE || wkv_merges_right(merge));
}

/** Ward's cost of merging a token with its right neighbour: attention as mass, gap = |V_j - V_r|^2. */
WKV_HD inline float wkv_merge_cost(int32_t select, float w_j, float w_r, float gap) {
  const float mass = w_j + w_r;
  if (!(mass > 0.0f)) return 0.0f;
  if (select == WKV_SELECT_MERGE_COST_LINEAR) gap = __builtin_sqrtf(gap);
  return w_j * w_r / mass * gap;
}

/** What the victim minimises; where merges cost, the caller passes over the newest token, which has no right neighbour. */
WKV_HD inline float wkv_select_value(int32_t select, const wkv_token& t) {
  switch (select) {
    case WKV_SELECT_OLDEST: return (float)t.rank;
    case WKV_SELECT_MERGE_COST:
    case WKV_SELECT_MERGE_COST_LINEAR: return wkv_merge_cost(select, t.average, t.right, t.measure);
    case WKV_SELECT_LOWEST_SUM: return t.score;
    case WKV_SELECT_LOWEST_NOW: return t.now;
    case WKV_SELECT_KEY_NORM:
    case WKV_SELECT_KEY_LIKENESS: return -t.measure;
    case WKV_SELECT_LEAST_OFTEN:
    case WKV_SELECT_WINDOW: return t.measure;
    case WKV_SELECT_SUM_VALUE_NORM: return t.score * t.measure;
    case WKV_SELECT_OUTPUT_ERROR: return 1.0f - t.now < 0x1p-16f ? 3.402823466e38f : t.now / (1.0f - t.now) * t.measure;
    default: return t.average;
  }
}

/** x . y / (|x| |y|) of their sums of products; tiny norms count as 1e-12. */
WKV_HD inline float wkv_cosine(float xy, float xx, float yy) {
  const float x = __builtin_sqrtf(xx), y = __builtin_sqrtf(yy);
  return xy / ((x > 1e-12f ? x : 1e-12f) * (y > 1e-12f ? y : 1e-12f));
}

/** The number in [0, 1) that spread draws: MurmurHash3's finaliser, chained over its words. */
WKV_HD inline float wkv_draw(uint32_t seed, uint32_t layer, uint32_t sequence, uint32_t head, uint32_t step, uint32_t turn) {
  const uint32_t words[6] = {seed, layer, sequence, head, step, turn};
  uint32_t h = 0;
  for (int i = 0; i < 6; i++) {
    h = (h ^ words[i]) + 0x9e3779b9u;
    h ^= h >> 16, h *= 0x85ebca6bu;
    h ^= h >> 13, h *= 0xc2b2ae35u;
    h ^= h >> 16;
  }
  return (float)(h >> 8) * (1.0f / 16777216.0f);
}

/** Whether spread adds a value to its targets: sums of the victim and of all \`count\` targets together. */
WKV_HD inline bool wkv_spreads(float score, float targets, int32_t count, float draw) {
  const float mean = targets / (float)count;
  return mean > 0.0f ? draw < score / mean : score > 0.0f;
}

/** Half of a number and of its likeness times another: what nearest leaves of two keys or values. */
WKV_HD inline float wkv_halved(float r, float likeness, float v) { return (r + likeness * v) * 0.5f; }

/** The merged value of one dimension: a convex combination, computed in f32 and rounded once when stored. */
WKV_HD inline float wkv_merged(float w_v, float v, float w_r, float r) {
  return (w_v * v + w_r * r) / (w_v + w_r);
}

#endif
`,
  "quants.h": `/**
 * quants.h: how GGUF's blocks of few-bit numbers lie in a file, taken apart 32 columns at a time; compiled into both libraries, which lay
 * the parts out as their loops like them. The blocks are those of ggml-common.h; Q8_0, Q4_0 and Q4_1 are so simple that each library
 * takes them as they are.
 */
#ifndef WKV_QUANTS_H
#define WKV_QUANTS_H
#include <stdint.h>
#include <string.h>

#include "policy.h"

/** What a type's blocks are: a number is d * sub * (q - middle) - least * sub', with q of \`low\` + \`high\` bits. */
struct wkv_form {
  int32_t columns, bytes;  /* of a block in the file */
  int32_t low, high;       /* bits of q: the low and the high ones lie apart */
  int32_t middle;          /* what q is counted from */
  bool subs;               /* a K type: its 8 pieces of 32 columns have scales of their own, integers times those of the block */
  bool least;              /* a minimum belongs to each scale */
  bool halves;             /* each 16 columns have a scale of their own, not each 32 */
};

WKV_HD constexpr wkv_form wkv_form_of(int32_t dtype) {
  switch (dtype) {
    case WKV_Q8_0: return {32, 34, 8, 0, 0, false, false, false};
    case WKV_Q4_0: return {32, 18, 4, 0, 8, false, false, false};
    case WKV_Q4_1: return {32, 20, 4, 0, 0, false, true, false};
    case WKV_Q5_0: return {32, 22, 4, 1, 16, false, false, false};
    case WKV_Q5_1: return {32, 24, 4, 1, 0, false, true, false};
    case WKV_Q2_K: return {256, 84, 2, 0, 0, true, true, true};
    case WKV_Q3_K: return {256, 110, 2, 1, 4, true, false, true};
    case WKV_Q4_K: return {256, 144, 4, 0, 0, true, true, false};
    case WKV_Q5_K: return {256, 176, 4, 1, 0, true, true, false};
    case WKV_Q6_K: return {256, 210, 4, 2, 32, true, false, true};
    case WKV_IQ4_NL: return {32, 18, 4, 0, 0, false, false, false};
    default: return {1, 0, 0, 0, 0, false, false, false};
  }
}

/** Whether rows of this type are blocks that wkv_read_piece takes apart. */
WKV_HD constexpr bool wkv_has_pieces(int32_t dtype) { return dtype >= WKV_Q5_0 && dtype <= WKV_IQ4_NL; }

/** Bytes of a row in the file. */
inline int64_t wkv_row_bytes(int32_t dtype, int32_t columns) {
  if (dtype >= WKV_Q8_0) return int64_t{columns} / wkv_form_of(dtype).columns * wkv_form_of(dtype).bytes;
  return int64_t{columns} * (dtype == WKV_F16 || dtype == WKV_BF16 ? 2 : 4);
}

/** What IQ4_NL's 16 numbers stand for. */
constexpr int8_t WKV_IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/** 32 columns of a block. */
struct wkv_piece {
  uint8_t q[32];
  uint8_t sub[2];      /* K types. Q4_K, Q5_K: scale and minimum. Q2_K: for each half the scale in the low, the minimum in the high 4 bits.
                          Q3_K, Q6_K: for each half the scale, signed. */
  uint16_t d, least;   /* the f16 scale and minimum of the block, 0 where it has none */
};

/** 6-bit scale and minimum of piece p, of the 12 bytes that Q4_K and Q5_K have for 8 pieces. */
inline void wkv_read_subs(const uint8_t* s, int32_t p, uint8_t* sub) {
  if (p < 4) {
    sub[0] = s[p] & 63, sub[1] = s[p + 4] & 63;
  } else {
    sub[0] = static_cast<uint8_t>((s[p + 4] & 15) | s[p - 4] >> 6 << 4);
    sub[1] = static_cast<uint8_t>(s[p + 4] >> 4 | s[p] >> 6 << 4);
  }
}

/** Takes piece p of a block apart; p is 0 for blocks of 32 columns. */
inline void wkv_read_piece(int32_t dtype, const uint8_t* block, int32_t p, wkv_piece* out) {
  const auto half = [&](int32_t at) {
    uint16_t bits;
    memcpy(&bits, block + at, 2);
    return bits;
  };
  const auto byte = [](int32_t x) { return static_cast<uint8_t>(x); };
  out->sub[0] = out->sub[1] = 0;
  out->least = 0;
  switch (dtype) {
    case WKV_Q5_0:
    case WKV_Q5_1: {
      const int32_t at = dtype == WKV_Q5_0 ? 2 : 4;
      out->d = half(0);
      if (dtype == WKV_Q5_1) out->least = half(2);
      uint32_t high;
      memcpy(&high, block + at, 4);
      for (int32_t i = 0; i < 32; i++) out->q[i] = byte((block[at + 4 + i % 16] >> (i / 16 * 4) & 15) | static_cast<int32_t>(high >> i & 1) << 4);
      return;
    }
    case WKV_IQ4_NL:
      out->d = half(0);
      for (int32_t i = 0; i < 32; i++) out->q[i] = byte(block[2 + i % 16] >> (i / 16 * 4) & 15);
      return;
    case WKV_Q2_K:
      out->d = half(80), out->least = half(82);
      memcpy(out->sub, block + 2 * p, 2);
      for (int32_t i = 0; i < 32; i++) out->q[i] = byte(block[16 + p / 4 * 32 + i] >> (p % 4 * 2) & 3);
      return;
    case WKV_Q3_K:
      out->d = half(108);
      for (int32_t h = 0; h < 2; h++) {
        const int32_t s = 2 * p + h, low = block[96 + s % 8] >> (s / 8 * 4) & 15, high = block[104 + s % 4] >> (s / 4 * 2) & 3;
        out->sub[h] = byte((low | high << 4) - 32);
      }
      for (int32_t i = 0; i < 32; i++) out->q[i] = byte((block[32 + p / 4 * 32 + i] >> (p % 4 * 2) & 3) | (block[i] >> p & 1) << 2);
      return;
    case WKV_Q4_K:
    case WKV_Q5_K: {
      out->d = half(0), out->least = half(2);
      wkv_read_subs(block + 4, p, out->sub);
      const uint8_t* q = block + (dtype == WKV_Q4_K ? 16 : 48) + p / 2 * 32;
      for (int32_t i = 0; i < 32; i++) out->q[i] = byte((q[i] >> (p % 2 * 4) & 15) | (dtype == WKV_Q5_K ? (block[16 + i] >> p & 1) << 4 : 0));
      return;
    }
    default: /* WKV_Q6_K */
      out->d = half(208);
      memcpy(out->sub, block + 192 + 2 * p, 2);
      for (int32_t i = 0; i < 32; i++) out->q[i] = byte((block[p / 4 * 64 + p % 2 * 32 + i] >> (p % 4 / 2 * 4) & 15) | (block[128 + p / 4 * 32 + i] >> (p % 4 * 2) & 3) << 4);
  }
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
  "rows.hpp": `/** rows.hpp: where a cache's heads lie in rows of queries, keys and values, which may have more heads than the cache; used by both libraries. */
#pragma once
#include "handles.hpp"
#include "policy.h"

namespace wkv {

/** Places in a row [(H + 2 N) D] of queries, keys and values, and in one of outputs [H D], in units of D. */
struct RowHeads {
  int32_t group = 0;     // query heads a KV head
  int32_t kv_heads = 0;  // of the row
  int32_t first = 0;     // the row's KV head that is the cache's first

  RowHeads() = default;
  /** For a cache of \`own\` KV heads, of which kv_head is the first; \`out_columns\`: of a row of outputs. */
  RowHeads(int32_t group, int32_t own, int32_t head_dim, int32_t out_columns, int32_t kv_head) : group(group), kv_heads(out_columns / (group * head_dim)), first(kv_head) {
    const int32_t columns = group * head_dim;
    require(out_columns % columns == 0 && kv_heads >= own, "out has " + std::to_string(out_columns) + " columns, expected " + std::to_string(own * columns) + ", or more of " + std::to_string(columns) + " a KV head");
    require(kv_head >= 0 && kv_head <= kv_heads - own, "kv_head must be between 0 and " + std::to_string(kv_heads - own) + ": " + std::to_string(kv_head));
  }

  WKV_HD int32_t columns(int32_t head_dim) const { return (group + 2) * kv_heads * head_dim; }
  /** Query head g of the cache's KV head n; of an output, too. */
  WKV_HD int64_t query(int32_t n, int32_t g) const { return int64_t{first + n} * group + g; }
  WKV_HD int64_t key(int32_t n) const { return int64_t{kv_heads} * group + first + n; }
  WKV_HD int64_t value(int32_t n) const { return key(n) + kv_heads; }
};

}  // namespace wkv
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

#define WKV_ABI_VERSION 5

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

/** Element types; a quantised row is a sequence of GGUF blocks, of 256 columns where the name ends in K, of 32 elsewhere (quants.h). */
enum wkv_dtype {
  WKV_F32 = 0,
  WKV_F16 = 1,
  WKV_BF16 = 2,
  WKV_I32 = 3,
  WKV_Q8_0 = 4, /* 34 bytes a block: f16 scale, 32 int8 */
  WKV_Q4_0 = 5, /* 18 bytes a block: f16 scale, 32 4-bit values less 8 */
  WKV_Q4_1 = 6, /* 20 bytes a block: f16 scale, f16 minimum, 32 4-bit values */
  WKV_Q5_0 = 7, /* 22 bytes a block */
  WKV_Q5_1 = 8, /* 24 */
  WKV_Q2_K = 9, /* 84 */
  WKV_Q3_K = 10, /* 110 */
  WKV_Q4_K = 11, /* 144 */
  WKV_Q5_K = 12, /* 176 */
  WKV_Q6_K = 13, /* 210 */
  WKV_IQ4_NL = 14, /* 18 */
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
  WKV_SELECT_LITERAL_AVERAGE = 5,   /* the same as 2, but the averages replace the scores for good in every step that overflows */
  WKV_SELECT_LOWEST_SUM = 6,        /* the lowest sum a */
  WKV_SELECT_LOWEST_NOW = 7,        /* the lowest weight of this step, mean over the KV heads: one choice a layer */
  WKV_SELECT_LEAST_OFTEN = 8,       /* the fewest of the last 400 steps whose weight was above 1 / tokens */
  WKV_SELECT_KEY_NORM = 9,          /* the highest |K| */
  WKV_SELECT_KEY_LIKENESS = 10,     /* the highest cosine with the mean of the normalised keys */
  WKV_SELECT_WINDOW = 11,           /* the lowest weight over the last 32 steps, averaged over neighbouring ranks */
  WKV_SELECT_SUM_VALUE_NORM = 12,   /* the lowest a |V|_1 */
  WKV_SELECT_OUTPUT_ERROR = 13,     /* the lowest p / (1 - p) |V - o|, o the mean output of the group */
};

/** What happens to the token that leaves. */
enum wkv_merge {
  WKV_MERGE_NONE = 0,          /* dropped */
  WKV_MERGE_RIGHT = 1,         /* its value is merged into the next rank's, weighted with both averages */
  WKV_MERGE_SPREAD = 2,        /* by chance a 16th of its value is added to each of the next 16 ranks' */
  WKV_MERGE_NEAREST = 3,       /* key and value are merged into those of the likest key, if it is like enough */
  WKV_MERGE_NEAREST_VOTES = 4, /* the same for any likest key, weighted with votes and recent weights */
  WKV_MERGE_RIGHT_LIGHT = 5,   /* as 1, its own average counting a quarter */
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

/** What the gate of a feed-forward part goes through. */
enum wkv_activation {
  WKV_SILU = 0,      /* x / (1 + e^-x) */
  WKV_GELU_TANH = 1, /* x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) */
};

/** How a linear op holds its input. */
enum wkv_precision {
  WKV_PRECISION_F32 = 0,  /* as it is */
  WKV_PRECISION_INT8 = 1, /* for quantised weights: rounded to 8 bits in blocks of 32 */
  WKV_PRECISION_HALF = 2, /* for F16 and BF16 weights: as it is, or rounded once to their type, where products of many rows gain by that */
};

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

/** Bytes that all contexts of this process hold on the device: what was opened, and memory that ops share. */
WKV_API int32_t wkv_memory(int32_t context, double* out /* [1] */, int32_t out_bytes);

/** Bytes that a tensor, rotation or cache holds. */
WKV_API int32_t wkv_bytes(int32_t context, int32_t handle, double* out /* [1] */, int32_t out_bytes);

/* ---- tensors ---- */

/** Opens a tensor of zeros. columns must be whole blocks of a quantised dtype. */
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

/** Starts one run of a graph and, on a GPU, returns while it goes on; other functions of the context wait for it where they must.
 *  Waiting so for a short run is cheaper than having a thread wake for wkv_graph_run. */
WKV_API int32_t wkv_graph_start(int32_t context, int32_t graph);

/** Gives 1 when the run that was started last has ended, else 0. Fails, once, where that run failed. */
WKV_API int32_t wkv_graph_poll(int32_t context, int32_t* out /* [1] */, int32_t out_bytes);

/* ---- ops on activations ---- */

/** op: out[i] = scale * table[tokens[i]]. An id outside the table is WKV_DATA. */
WKV_API int32_t wkv_embed(int32_t context, int32_t out /* [>= rows, C] */, int32_t table /* [vocabulary, C] */, int32_t tokens /* I32 [1, >= rows] */, int32_t rows, float scale);

/** op: out[i] = x[i] / sqrt(mean(x[i]^2) + epsilon) * weight (+ what out held, when add is 1); out may be x. */
WKV_API int32_t wkv_rmsnorm(int32_t context, int32_t out, int32_t x, int32_t rows, int32_t weight /* [1, C] */, float epsilon, int32_t add);

/** op: wkv_rmsnorm of queries and keys where they lie, before they are rotated. The weights tell what is normed: every head on its own
 *  ([1, D]), or all query heads and all key heads together ([1, H * D] and [1, N * D]). */
WKV_API int32_t wkv_qk_norm(int32_t context, int32_t qkv /* [>= rows, (H + 2 N) * D] */, int32_t rows, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t q_weight, int32_t k_weight, float epsilon);

/** op: x[i] = cap tanh(x[i] / cap) where it lies; cap above 0. */
WKV_API int32_t wkv_softcap(int32_t context, int32_t x /* [>= rows, C] */, int32_t rows, float cap);

/** op: out[i, out_column + j] = norm(x[x_row + i]) . w[j] + bias[j] (+ what out held, when add is 1), for rows i and all rows j of w.
 *  norm and bias are 0 or tensors [1, C]; norm is wkv_rmsnorm's. out must not be x unless norm, x and out are of one width and add is 1. */
WKV_API int32_t wkv_linear(int32_t context, int32_t out, int32_t out_column, int32_t x, int32_t x_row, int32_t rows, int32_t norm, float epsilon, int32_t w /* [J, C] */, int32_t bias, int32_t add, int32_t precision);

/** op: out[i, j] = activation(norm(x[i]) . gate[j]) * (norm(x[i]) . up[j]). */
WKV_API int32_t wkv_gated(int32_t context, int32_t out, int32_t x, int32_t rows, int32_t norm, float epsilon, int32_t gate /* [J, C] */, int32_t up /* [J, C] */, int32_t activation, int32_t precision);

/* ---- cache ---- */

/** Opens a rotation of the first 2 * count dimensions of a head by position * frequencies[i]; tables reach \`positions\` ranks, 2^21 at most. */
WKV_API int32_t wkv_rope_open(int32_t context, int32_t head_dim, int32_t pairs, const float* frequencies /* [count] */, int32_t frequencies_bytes, int32_t positions, int32_t* out /* [1] */, int32_t out_bytes);

/** Opens an empty cache of exactly \`slots\` tokens a KV head, in every layer and sequence; nothing is allocated later.
 *  interval: tokens that leave, one after another, when it overflows; seed: of policies that draw.
 *  Must hold: 0 <= sinks, 0 <= recent, sinks + recent <= slots; 1 <= interval <= max(1, slots - sinks - recent);
 *  heads a multiple of kv_heads; the rotation is of this head
 *  dimension and, with positions in the cache, of more than \`slots\` positions; dtype F32, F16 or BF16. */
WKV_API int32_t wkv_cache_open(int32_t context, int32_t rope, int32_t layers, int32_t sequences, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t slots, int32_t sinks, int32_t recent, int32_t interval, int32_t select, int32_t merge, int32_t seed, int32_t positions, int32_t dtype, int32_t* out /* [1] */, int32_t out_bytes);

/** Empties one sequence, or all of them (-1). */
WKV_API int32_t wkv_cache_reset(int32_t context, int32_t cache, int32_t sequence);

/** Copies a wkv_cache_field of one layer, sequence and KV head out. */
WKV_API int32_t wkv_cache_read(int32_t context, int32_t cache, int32_t field, int32_t layer, int32_t sequence, int32_t kv_head, void* out, int32_t out_bytes);

/** op: one decode step of one layer for every sequence (the paper's Algorithm 1). The new token attends over cache and itself at
 *  rank \`kept\`; every token's mean weight over its query heads is added to its score; if kept + 1 > slots the policy picks
 *  \`interval\` victims, merges or drops them, and the new token takes a freed slot. k and v are rounded to the cache's type first.
 *  softcap: 0, or the scores s = scale q . k become softcap tanh(s / softcap) before the softmax.
 *  victims: 0, or I32 [B, N], the rank that must leave first (-1: the policy's own choice).
 *  kv_head: the row's KV head that is the cache's first. Rows may have more heads than the cache, with as many query heads a KV head:
 *  H and N are the row's, and the others' outputs stay as they are. */
WKV_API int32_t wkv_attend(int32_t context, int32_t cache, int32_t layer, int32_t kv_head, int32_t out /* [B, H * D] */, int32_t qkv /* [B, (H + 2 N) * D] */, float scale, float softcap, int32_t victims);

/** op: steps 3 to 6 of wkv_attend with attention weights that the caller computed: kv[b] holds N keys, then N values. */
WKV_API int32_t wkv_insert(int32_t context, int32_t cache, int32_t layer, int32_t kv /* [B, 2 N * D] */, int32_t weights /* [B, N * (M + 1)], rank order */, int32_t victims);

/** op: \`rows\` tokens of one sequence at once: causal attention over cache and tokens, each column's sum of weights added to its score
 *  as if streamed. When kept + rows > slots the policy is then applied with the state of that moment until slots + 1 - interval are
 *  left. Refused for policies that keep a record of each step's weights, and to let tokens leave for those that choose by one
 *  step's weights (wkv_by_step, wkv_uses_now in policy.h).
 *  window: 0, or how many ranks a token looks back on, itself counted: those before weigh nothing. kv_head and softcap are wkv_attend's. */
WKV_API int32_t wkv_prefill(int32_t context, int32_t cache, int32_t layer, int32_t kv_head, int32_t sequence, int32_t out /* [>= rows, H * D] */, int32_t qkv /* [>= rows, (H + 2 N) * D] */, int32_t rows, float scale, float softcap, int32_t window);

/* ---- from logits to tokens ---- */

/** op: the next token of each row of logits. settings: F32 [B, 4]: temperature (0: the first of the highest), top-k (0: all), top-p
 *  (1: all), min-p (0: all), applied as top-k, top-p, min-p, temperature. rng: I32 [B, 4]: seed low, seed high, draws so far, unused. */
WKV_API int32_t wkv_sample(int32_t context, int32_t tokens /* I32 [1, B] */, int32_t logits /* [B, vocabulary] */, int32_t settings, int32_t rng);

/** op: out[i] = natural logarithm of the probability of targets[i] under logits[i]. */
WKV_API int32_t wkv_log_prob(int32_t context, int32_t out /* [1, >= rows] */, int32_t logits /* [>= rows, vocabulary] */, int32_t targets /* I32 [1, >= rows] */, int32_t rows);

/** op: how far the distributions of \`others\` are from those of \`logits\`. out[i] = the Kullback-Leibler divergence of row i in nats,
 *  sum over j of p (ln p - ln q) with p of \`logits\` and q of \`others\`, and 1 where the first of the highest is the same in both, else 0. */
WKV_API int32_t wkv_divergence(int32_t context, int32_t out /* [>= rows, 2] */, int32_t logits /* [>= rows, vocabulary] */, int32_t others /* [>= rows, vocabulary] */, int32_t rows);

#endif
`,
};
