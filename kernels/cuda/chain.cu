/**
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
