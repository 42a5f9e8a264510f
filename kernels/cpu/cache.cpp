/** cache.cpp: rotations and caches, and wkv_insert. */
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
