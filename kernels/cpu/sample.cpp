/** sample.cpp: wkv_sample, wkv_log_prob and wkv_divergence, from logits to tokens and to their probabilities. */
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
    require(rows >= 1 && ids->columns >= rows && to->columns >= rows, "targets and out must have at least `rows` columns, and rows be at least 1");
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
