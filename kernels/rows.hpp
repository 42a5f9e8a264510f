/** rows.hpp: where a cache's heads lie in rows of queries, keys and values, which may have more heads than the cache; used by both libraries. */
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
  /** For a cache of `own` KV heads, of which kv_head is the first; `out_columns`: of a row of outputs. */
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
