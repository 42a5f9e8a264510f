/** cache.cu: rotations and caches. */
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
