/** policy.h: the score, select and merge rules, compiled into both libraries so that they choose alike (docs/policies.md has their blocks). */
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

/** Whether the token of this rank may leave, of `total` tokens with the new one. */
WKV_HD inline bool wkv_evictable(int32_t rank, int32_t total, int32_t sinks, int32_t recent) {
  return rank >= sinks && rank < total - recent;
}

/** Tokens that are left after a step with `total` of them. */
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

/** Whether spread adds a value to its targets: sums of the victim and of all `count` targets together. */
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
