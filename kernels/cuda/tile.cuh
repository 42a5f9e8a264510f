/** tile.cuh: how the tensor-core kernels (matmul_int8.cu, matmul_half.cu) share out a product and finish it. */
#pragma once
#include "linear.cuh"
#include "mma.cuh"

namespace wkv {

constexpr int kTileThreads = 256;

/** How a block is laid out: warps along w and x, the rest along C; tiles of 16 rows of w and of 8 of x a warp; blocks of 32 columns a
 *  stage; blocks that share a multiprocessor. */
template <int kWarpsW, int kWarpsX, int kTilesW, int kTilesX, int kBlocks_, int kStages_, int kResident_>
struct Plan {
  static constexpr int kAlongX = kWarpsX, kAlongC = 8 / kWarpsW / kWarpsX, kW = kTilesW, kX = kTilesX, kBlocks = kBlocks_, kStages = kStages_, kResident = kResident_;
  static constexpr int kRows = 16 * kTilesW * kWarpsW, kTokens = 8 * kTilesX * kWarpsX;
  static constexpr int kStride = kRows + 4;                                           // of the sums of warps along C, in shared memory
  static constexpr int kSums = kAlongC > 1 ? kAlongC * kTokens * kStride * 4 : 0;  // bytes
};

/** The rows of w (gated: 16 of gate, 16 of up, in turn) and of x that a block owns. */
template <typename P>
struct Tile {
  WeightView w, up;
  int32_t gated, rows, t0, j0;
  int along_w, along_x, along_c, group, i;  // the warp's place; the lane is 4 group + i
  __device__ Tile(const WeightView& w, const WeightView& up, int32_t gated, int32_t rows) : w(w), up(up), gated(gated), rows(rows) {
    t0 = blockIdx.x * P::kTokens, j0 = blockIdx.y * (P::kRows >> gated);
    const int warp = threadIdx.x / 32;
    along_w = warp / (P::kAlongX * P::kAlongC), along_x = warp / P::kAlongC % P::kAlongX, along_c = warp % P::kAlongC;
    group = threadIdx.x % 32 / 4, i = threadIdx.x % 4;
  }
  __device__ int32_t row_out(int r) const { return j0 + (gated ? r / 32 * 16 + r % 16 : r); }
  /** Past the end the last row stands in. */
  __device__ int64_t row_in(int r) const { return min(w.rows - 1, row_out(r)); }
  __device__ int64_t token_in(int t) const { return min(rows - 1, t0 + t); }
  __device__ const uint8_t* data(int r) const { return gated && r / 16 % 2 ? up.data : w.data; }
  __device__ const __half* scales(int r) const { return gated && r / 16 % 2 ? up.scales : w.scales; }

  /** Adds up the warps along C and gives the results to `to`, those of x's row t times factors[t] (null: as they are). `shared` is free. */
  __device__ void finish(const float (&total)[P::kW][P::kX][4], const float* factors, float* shared, const OutputView& to) const {
    const auto put = [&](int t, int r, float first, float second) {
      const int32_t j = row_out(r);
      if (t0 + t >= rows || j >= w.rows) return;
      const float factor = factors ? factors[t0 + t] : 1.0f;
      to.put(t0 + t, j, gated ? activate(to.activation, first * factor, second * factor) : first * factor);
    };
    if constexpr (P::kAlongC == 1) {
#pragma unroll
      for (int m = 0; m < P::kW; m++) {
        if (gated && m % 2) continue;
#pragma unroll
        for (int n = 0; n < P::kX; n++) {
#pragma unroll
          for (int k = 0; k < 4; k++) {
            put((along_x * P::kX + n) * 8 + 2 * i + k % 2, (along_w * P::kW + m) * 16 + k / 2 * 8 + group, total[m][n][k], total[(m + 1) % P::kW][n][k]);
          }
        }
      }
    } else {
      __syncthreads();
#pragma unroll
      for (int m = 0; m < P::kW; m++) {
#pragma unroll
        for (int n = 0; n < P::kX; n++) {
#pragma unroll
          for (int k = 0; k < 4; k++) {
            const int t = (along_x * P::kX + n) * 8 + 2 * i + k % 2, r = (along_w * P::kW + m) * 16 + k / 2 * 8 + group;
            shared[(along_c * P::kTokens + t) * P::kStride + r] = total[m][n][k];
          }
        }
      }
      __syncthreads();
      const auto sum = [&](int t, int r) {
        float all = 0.0f;
#pragma unroll
        for (int c = 0; c < P::kAlongC; c++) all += shared[(c * P::kTokens + t) * P::kStride + r];
        return all;
      };
      const int wide = P::kRows >> gated;
      for (int o = threadIdx.x; o < P::kTokens * wide; o += kTileThreads) {
        const int t = o / wide, r = gated ? o % wide / 16 * 32 + o % 16 : o % wide;
        put(t, r, sum(t, r), gated ? sum(t, r + 16) : 0.0f);
      }
    }
  }
};

}  // namespace wkv
