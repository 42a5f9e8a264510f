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
  const int32_t step, dim;

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
    }
  }

  /** The mean of the normalised keys, into lists.sum. */
  void find_anchor() const {
    lists.sum.assign(dim, 0.0f);
    for (int32_t i = 0; i < r.count; i++) {
      read(key(i), lists.row.data());
      const float norm = norm_of(lists.row.data());
      if (norm > 0.0f) loops.add_scaled(lists.sum.data(), lists.row.data(), 1.0f / norm, dim);
    }
    for (float& x : lists.sum) x /= static_cast<float>(r.count);
  }
  /** The weighted sum of all values, into lists.sum: the mean output of the group's query heads. */
  void find_output() const {
    lists.sum.assign(dim, 0.0f);
    for (int32_t i = 0; i < r.count; i++) {
      read(value(i), lists.row.data());
      loops.add_scaled(lists.sum.data(), lists.row.data(), now()[i], dim);
    }
  }
  float norm_of(const float* x) const {
    float squares = 0.0f;
    for (int32_t d = 0; d < dim; d++) squares += x[d] * x[d];
    return std::sqrt(squares);
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
          m[i] = sum;
          break;
        }
        case WKV_SELECT_KEY_NORM:
          read(key(i), row);
          m[i] = norm_of(row);
          break;
        case WKV_SELECT_SUM_VALUE_NORM:
          read(value(i), row);
          m[i] = 0.0f;
          for (int32_t d = 0; d < dim; d++) m[i] += std::fabs(row[d]);
          break;
        case WKV_SELECT_OUTPUT_ERROR:
          read(value(i), row);
          for (int32_t d = 0; d < dim; d++) row[d] -= lists.sum[d];
          m[i] = norm_of(row);
          break;
        default: break;
      }
    }
  }
  /** Measures that change whenever a token leaves. */
  void measure_likeness() const {
    find_anchor();
    const float length = norm_of(lists.sum.data());
    float* row = lists.row.data();
    for (int32_t i = 0; i < r.count; i++) {
      read(key(i), row);
      float dot = 0.0f;
      for (int32_t d = 0; d < dim; d++) dot += row[d] * lists.sum[d];
      const float both = norm_of(row) * length;
      measure()[i] = both > 0.0f ? dot / both : 0.0f;
    }
  }
  float pooled(int32_t rank) const {
    float sum = 0.0f;
    for (int32_t i = rank - WKV_WINDOW_POOL / 2; i <= rank + WKV_WINDOW_POOL / 2; i++) {
      if (i >= 0 && i < r.count) sum += measure()[i];
    }
    return sum;
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
  int32_t hand_on(int32_t j) const {
    if (cache.merge == WKV_MERGE_RIGHT && j + 1 < r.count) {
      const float w_v = weight(j), w_r = weight(j + 1);
      if (w_v + w_r > 0.0f) loops.merge(cache.dtype, w_v, value(j), w_r, value(j + 1), dim);
      return j + 1;
    }
    return -1;
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
  const Head h{loops, cache, head, r, incoming, lists, counts.steps, cache.head_dim};
  const int32_t arrived = r.count - counts.kept;
  lists.now.assign(now ? now : r.score, (now ? now : r.score) + r.count);
  lists.measure.assign(r.count, 0.0f);
  lists.row.resize(cache.head_dim);
  lists.freed.clear();
  h.note();
  const bool gapped = wkv_uses_gap(cache.select);
  if (gapped) {
    for (int32_t rank = counts.kept - 1; rank + 1 < r.count; rank++) h.update_gap(rank);
  }
  const int32_t target = wkv_target(r.count, cache.slots, cache.interval);
  if (r.count > target) {
    if (cache.select == WKV_SELECT_NONE) fail(WKV_INVALID, "The cache is full: its policy keeps every token, and it has " + std::to_string(cache.slots) + " slots");
    if (cache.select == WKV_SELECT_LITERAL_AVERAGE) {
      for (int32_t i = 0; i < r.count; i++) r.score[i] = h.average(i);
    }
    h.measure_all();
  }
  for (; r.count > target; forced = -1) {
    const int32_t j = forced != -1 ? forced : h.pick();
    if (!wkv_evictable(j, r.count, cache.sinks, cache.recent)) fail(WKV_INVALID, "Rank " + std::to_string(j) + " may not leave a cache of " + std::to_string(r.count) + " tokens with " + std::to_string(cache.sinks) + " sinks and " + std::to_string(cache.recent) + " recent");
    counts.event[0] = static_cast<float>(r.birth[j] - 1);
    counts.event[2] = h.weight(j);
    const int32_t into = h.hand_on(j);
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
