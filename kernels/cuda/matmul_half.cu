/**
 * matmul_half.cu: out[t, j] = x[t] . w[j] for f16 and bf16 w and x in f32, on the tensor cores.
 *
 * x is the sum of two numbers of w's type (split_rows), good to 2^-18 (bf16) or 2^-22 (f16) of it; their products with w are exact and
 * are summed in f32. Tensor cores cut sums off instead of rounding them, so only 32 columns are left to them at a time, and ordinary
 * additions do the rest. A block owns kRows rows of w (gated: half of them of gate, half of up) and kTokens rows of x; stages of both are
 * copied into shared memory while it works.
 * Bytes moved: w once a kTokens rows of x, x once a kRows rows of w (from the second level).
 */
#include "tile.cuh"

namespace wkv {
namespace {

using Many = Plan<2, 4, 4, 4, 1, 3, 1>;

/** A stage's rows of w, then of x, in shared memory; an odd multiple of 64 bytes long, so that a warp's reads touch every bank once. */
template <typename P>
struct Stage {
  static constexpr int kRowW = P::kBlocks % 2 ? P::kBlocks * 64 : P::kBlocks * 64 + 64, kRowX = P::kBlocks * 128 + 64;
  static constexpr int kAtX = P::kRows * kRowW, kBytes = kAtX + P::kTokens * kRowX;
};

template <bool kBf16, typename P>
__global__ void __launch_bounds__(kTileThreads, P::kResident) matmul_half_kernel(SplitView x, WeightView w, WeightView up, int32_t gated, OutputView to) {
  using S = Stage<P>;
  extern __shared__ __align__(16) uint8_t shared[];
  const Tile<P> tile(w, up, gated, x.rows, 1);
  const int32_t blocks = w.columns / 32;
  const auto fetch_w = [&](int32_t s) {
    uint8_t* stage = shared + s % P::kStages * S::kBytes;
    const int32_t first = s * P::kBlocks, have = min(P::kBlocks, blocks - first);
#pragma unroll 1
    for (int u = threadIdx.x; u < P::kRows * P::kBlocks * 4; u += kTileThreads) {
      const int r = u / (P::kBlocks * 4), c = u % (P::kBlocks * 4);
      if (c < have * 4) copy_async<16>(stage + r * S::kRowW + c * 16, tile.weight(r).data + (tile.row_in(r) * blocks + first) * 64 + c * 16);
    }
  };
  const auto fetch_x = [&](int32_t s) {
    uint8_t* stage = shared + s % P::kStages * S::kBytes + S::kAtX;
    const int32_t first = s * P::kBlocks, have = min(P::kBlocks, blocks - first);
#pragma unroll 1
    for (int u = threadIdx.x; u < P::kTokens * P::kBlocks * 8; u += kTileThreads) {
      const int t = u / (P::kBlocks * 8), c = u % (P::kBlocks * 8);
      if (c < have * 8) {
        const int64_t row = c / 4 % 2 * int64_t{x.rows} + tile.token_in(t);  // high and low take turns a block
        copy_async<16>(stage + t * S::kRowX + c * 16, x.parts + (row * blocks + first + c / 8) * 64 + c % 4 * 16);
      }
    }
  };

  const int32_t stages = (blocks + P::kBlocks - 1) / P::kBlocks;
#pragma unroll 1
  for (int32_t s = 0; s < P::kStages - 1; s++) {
    if (s < stages) fetch_w(s);
  }
  wait_for_previous();
  let_next_start();
#pragma unroll 1
  for (int32_t s = 0; s < P::kStages - 1; s++) {
    if (s < stages) fetch_x(s);
    end_copies();
  }

  float total[P::kW][P::kX][4] = {};
  for (int32_t s = 0; s < stages; s++) {
    wait_copies<P::kStages - 2>();
    __syncthreads();
    if (s + P::kStages - 1 < stages) fetch_w(s + P::kStages - 1), fetch_x(s + P::kStages - 1);
    end_copies();
    const uint8_t* stage = shared + s % P::kStages * S::kBytes;
    const int32_t have = min(P::kBlocks, blocks - s * P::kBlocks);
#pragma unroll
    for (int b = 0; b < P::kBlocks; b++) {
      if (b >= have) break;
      // A lane takes 8 neighbouring columns of w and of x where the tensor core sees columns 2 i, 8 + 2 i of two products: any order will do.
      int32_t a[P::kW][2][4];
#pragma unroll
      for (int m = 0; m < P::kW; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int r = (tile.along_w * P::kW + m) * 16 + h * 8 + tile.group;
          const int4 v = *reinterpret_cast<const int4*>(stage + r * S::kRowW + b * 64 + tile.i * 16);
          a[m][0][h] = v.x, a[m][0][2 + h] = v.y, a[m][1][h] = v.z, a[m][1][2 + h] = v.w;
        }
      }
#pragma unroll
      for (int n = 0; n < P::kX; n++) {
        const uint8_t* from = stage + S::kAtX + ((tile.along_x * P::kX + n) * 8 + tile.group) * S::kRowX + b * 128 + tile.i * 16;
        const int4 high = *reinterpret_cast<const int4*>(from), low = *reinterpret_cast<const int4*>(from + 64);
#pragma unroll
        for (int m = 0; m < P::kW; m++) {
          const float zero[4] = {};
          float sum[4];
          mma_half<kBf16>(sum, a[m][0], low.x, low.y, zero);
          mma_half<kBf16>(sum, a[m][1], low.z, low.w, sum);
          mma_half<kBf16>(sum, a[m][0], high.x, high.y, sum);
          mma_half<kBf16>(sum, a[m][1], high.z, high.w, sum);
#pragma unroll
          for (int k = 0; k < 4; k++) total[m][n][k] += sum[k];
        }
      }
    }
  }
  wait_copies<0>();
  tile.finish(total, x.factors, reinterpret_cast<float*>(shared), to);
}

template <bool kBf16>
void launch_matmul(Context& ctx, const SplitView& x, const WeightView& w, const WeightView& up, const OutputView& to) {
  const int32_t gated = up.data != nullptr;
  const dim3 grid(divide_up(x.rows, Many::kTokens), divide_up(w.rows, Many::kRows >> gated));
  launch(ctx, matmul_half_kernel<kBf16, Many>, {grid, dim3(kTileThreads), Many::kStages * Stage<Many>::kBytes}, x, w, up, gated, to);
}

}  // namespace

void matmul_half(Context& ctx, const SplitView& x, const WeightView& w, const WeightView& up, const OutputView& to) {
  if (w.dtype == WKV_BF16) launch_matmul<true>(ctx, x, w, up, to);
  else launch_matmul<false>(ctx, x, w, up, to);
}

}  // namespace wkv
