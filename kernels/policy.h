/** policy.h: the score, select and merge rules, compiled into both libraries so that they choose alike (DESIGN: the step; paper: Algorithm 1). */
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

/** Whether the token of this rank may leave, of `total` tokens with the new one. */
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
