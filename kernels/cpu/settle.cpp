/** settle.cpp: steps 4 to 6 of a decode step: select, merge, insert. The rules are in policy.h, their blocks in docs/policies.md. */
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

  /** Gives the tokens that arrived slots: freed ones in the order of leaving, then unused ones. Used slots stay the first `count`. */
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
