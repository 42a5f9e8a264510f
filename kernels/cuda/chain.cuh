/** chain.cuh: products of one row that are recorded one after another, and may become one launch: chain.cu (which do), chain_cluster.cu (of
 *  small weights), chain_grid.cu (of large ones). */
#pragma once
#include "linear.cuh"

namespace wkv {

constexpr int32_t kMostLinks = 8;  // of a chain

/** A product of a chain. */
struct Product {
  InputView in;
  WeightView w, up;
  OutputView to;
  int32_t after;  // the last one before that must have ended, in all blocks, when this one begins to read or write; -1: none
};

/** What is recorded and not launched yet. All of one type, rounded to 8 bits or not. */
class Chain {
 public:
  /** Takes a product in; false, and nothing changed, where it must be launched by itself. */
  bool take(const Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, bool int8, const OutputView& to);
  /** Launches what was taken in. */
  void launch(Context& ctx);

 private:
  std::vector<Product> products_;
  bool int8_ = false;
};

/** One launch of them all; false, and nothing launched, where their weights are small or there is no room. */
bool chain_grid(Context& ctx, const std::vector<Product>& products);
/** One launch of as many as find room from the first on, which it counts; none where they are not two. */
size_t chain_cluster(Context& ctx, const Product* first, size_t count);

/** Floats in global memory. */
struct Span {
  const float *begin, *end;
  Span(const float* begin, int32_t count) : begin(begin), end(begin ? begin + count : begin) {}
  bool meets(const Span& other) const { return begin < other.end && other.begin < end; }
  bool operator==(const Span& other) const { return begin == other.begin && end == other.end; }
};

}  // namespace wkv
