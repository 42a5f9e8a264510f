/**
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
