/** tile.cuh: how the tensor-core kernels (matmul_int8.cu, matmul_half.cu, matmul_skinny.cu) share out a product, and how the first two finish it. */
#pragma once
#include <algorithm>

#include "linear.cuh"
#include "mma.cuh"

namespace wkv {

constexpr int kTileThreads = 256;

/** Parts of the columns for `tiles` blocks of that many stages: three blocks for two multiprocessors, so that the next launch's find room
 *  beside them, and a few stages a part. */
inline int32_t share_columns(const Context& ctx, int32_t tiles, int32_t stages) {
  if (ctx.capability < 90) return 1;
  return std::max(1, std::min({kMostParts, ctx.processors * 3 / 2 / tiles, stages / 4}));
}

/** How a block is laid out: warps along w and x; tiles of 16 rows of w and of 8 of x a warp; blocks of 32 columns a stage; at most so many
 *  stages; blocks that share a multiprocessor. */
template <int kWarpsW, int kWarpsX, int kTilesW, int kTilesX, int kBlocks_, int kStages_, int kResident_>
struct Plan {
  static_assert(kWarpsW * kWarpsX * 32 == kTileThreads);
  static constexpr int kAlongX = kWarpsX, kW = kTilesW, kX = kTilesX, kBlocks = kBlocks_, kStages = kStages_, kResident = kResident_;
  static constexpr int kRows = 16 * kTilesW * kWarpsW, kTokens = 8 * kTilesX * kWarpsX;
  static constexpr int kStride = kRows + 4, kSums = kTokens * kStride * 4;  // of the sums of a cluster's blocks, in shared memory; bytes
};

/** The rows of w (gated: 16 of gate, 16 of up, in turn) and of x that a block owns. `parts` blocks, a cluster, share their columns. */
template <typename P>
struct Tile {
  WeightView w, up;
  int32_t gated, rows, parts, part, t0, j0;
  int along_w, along_x, group, i;  // the warp's place; the lane is 4 group + i
  __device__ Tile(const WeightView& w, const WeightView& up, int32_t gated, int32_t rows, int32_t parts) : w(w), up(up), gated(gated), rows(rows), parts(parts) {
    part = blockIdx.x % parts, t0 = blockIdx.x / parts * P::kTokens, j0 = blockIdx.y * (P::kRows >> gated);
    const int warp = threadIdx.x / 32;
    along_w = warp / P::kAlongX, along_x = warp % P::kAlongX, group = threadIdx.x % 32 / 4, i = threadIdx.x % 4;
  }
  __device__ int32_t row_out(int r) const { return j0 + (gated ? r / 32 * 16 + r % 16 : r); }
  /** Past the end the last row stands in. */
  __device__ int64_t row_in(int r) const { return min(w.rows - 1, row_out(r)); }
  __device__ int64_t token_in(int t) const { return min(rows - 1, t0 + t); }
  __device__ const WeightView& weight(int r) const { return gated && r / 16 % 2 ? up : w; }

  /** Adds up the cluster's blocks and gives the results to `to`, those of x's row t times factors[t] (null: as they are). `shared` is free
   *  once all of the block's threads have come here. */
  __device__ void finish(const float (&total)[P::kW][P::kX][4], const float* factors, float* shared, const OutputView& to) const {
    const auto put = [&](int t, int r, float first, float second) {
      const int32_t j = row_out(r);
      if (t0 + t >= rows || j >= w.rows) return;
      const float factor = factors ? factors[t0 + t] : 1.0f;
      to.put(t0 + t, j, gated ? activate(to.activation, first * factor, second * factor) : first * factor);
    };
    const auto each = [&](auto body) {
#pragma unroll
      for (int m = 0; m < P::kW; m++) {
#pragma unroll
        for (int n = 0; n < P::kX; n++) {
#pragma unroll
          for (int k = 0; k < 4; k++) body((along_x * P::kX + n) * 8 + 2 * i + k % 2, (along_w * P::kW + m) * 16 + k / 2 * 8 + group, m, n, k);
        }
      }
    };
    if (parts == 1 && (!gated || P::kW % 2 == 0)) {
      return each([&](int t, int r, int m, int n, int k) {
        if (!gated || m % 2 == 0) put(t, r, total[m][n][k], total[(m + 1) % P::kW][n][k]);
      });
    }
    __syncthreads();
    each([&](int t, int r, int m, int n, int k) { shared[t * P::kStride + r] = total[m][n][k]; });
    if (parts > 1) arrive_cluster(), wait_cluster();
    else __syncthreads();
    const auto sum = [&](int t, int r) {
      const float* at = shared + t * P::kStride + r;
      return parts == 1 ? *at : sum_peers(at, parts);
    };
    const int wide = P::kRows >> gated, outputs = P::kTokens * wide;
    for (int o = outputs * part / parts + threadIdx.x; o < outputs * (part + 1) / parts; o += kTileThreads) {
      const int t = o / wide, r = gated ? o % wide / 16 * 32 + o % 16 : o % wide;
      if (t0 + t < rows) put(t, r, sum(t, r), gated ? sum(t, r + 16) : 0.0f);
    }
    if (parts > 1) arrive_cluster(), wait_cluster();  // the others still read
  }
};

}  // namespace wkv
