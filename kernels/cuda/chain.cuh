/** chain.cuh: products of one row that are recorded one after another, and may become one launch (chain.cu). */
#pragma once
#include "linear.cuh"

namespace wkv {

constexpr int32_t kMostLinks = 8;  // of a chain

/** One product, as the kernel sees it. Places are bytes of a block's shared memory, -1 for none. */
struct Link {
  WeightView w, up;  // w . x, or gated with up where up has data
  const float *x, *norm, *bias;
  float* out;
  float epsilon;
  int32_t add, activation;
  uint32_t after;                 // the links whose results this one waits for, as the first, a bit each
  int32_t x_at, out_at;           // x, and the result where another link reads it: whole, in every block
  int32_t norm_at, bias_at;       // bias: of this block's rows
  int32_t old_at;                 // what the result is added to: whole, or of this block's rows where no link gave it
  int32_t own;                    // rows of a block, at most: block b has the b-th of them
  int32_t first, rows;            // a block's, in its own copy
  int32_t row_bytes[4], w_at[4], up_at[4];  // by plane, as WeightView's: a row's; where this block's rows of the weights lie
  bool reads_x, reads_old;        // from global memory
};

struct ChainView {
  int32_t count, rounded_at, rounded_bytes;  // two areas for x in 8 bits, used in turn
  int32_t pieces;                            // 16 bytes of vectors that a block copies first, at most
  Link links[kMostLinks];
};

/** What is recorded and not launched yet. */
class Chain {
 public:
  /** Takes a product in; false, and nothing changed, where it must be launched by itself. */
  bool take(const Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, const OutputView& to);
  /** Launches what was taken in. */
  void launch(Context& ctx);
  void clear() { view_.count = view_.pieces = used_ = widest_ = 0, awaited_ = 0; }

 private:
  ChainView view_{};
  int32_t used_ = 0, widest_ = 0;  // bytes of shared memory; columns of the widest x
  uint32_t awaited_ = 0;           // links whose results a link waits for
};

}  // namespace wkv
