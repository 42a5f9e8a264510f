/**
 * matmul_int8.cu: out[t, j] = x[t] . w[j] for quantised w and x in 8 bits, on the tensor cores.
 *
 * In each block of 32 columns the product is an integer, exact; it is then scaled by w's and x's scale and added in f32, as the CPU does:
 *   total += dot * (w_scale * x_scale) [+ w_least * x_sum]          Q4_0: - w_scale * 8 * x_sum, as its values are stored plus 8
 * A block owns kRows rows of w (gated: half of them of gate, half of up) and kTokens rows of x, and walks along C in stages that are copied
 * into shared memory while it works. Few rows of x: the 8 warps share the columns out, and their sums meet in shared memory in a fixed
 * order; many: each warp has a tile of its own. Bytes moved: w once a kTokens rows of x, x once a kRows rows of w (from the second level).
 */
#include "tile.cuh"

namespace wkv {
namespace {

using Few = Plan<1, 1, 2, 1, 8, 8, 3>;
using Some = Plan<1, 1, 2, 4, 8, 4, 2>;
using More = Plan<1, 1, 2, 8, 8, 3, 2>;
using Many = Plan<2, 4, 4, 4, 4, 2, 2>;

/** Where a stage's parts lie in shared memory, in bytes. Rows are padded so that a warp's reads touch every bank once. */
template <int kType, typename P>
struct Stage {
  static constexpr int kQuants = kType == WKV_Q8_0 ? 32 : 16, kScale = kType == WKV_Q4_1 ? 4 : 2;
  static constexpr int kRowW = P::kBlocks * kQuants + 16, kRowX = P::kBlocks * 32 + 32;
  static constexpr int kAtX = P::kRows * kRowW, kAtOf = kAtX + P::kTokens * kRowX, kAtScales = kAtOf + P::kBlocks * P::kTokens * 8;
  static constexpr int kBytes = kAtScales + P::kRows * P::kBlocks * kScale;
  static constexpr int kShared = P::kStages * kBytes > P::kSums ? P::kStages * kBytes : P::kSums;
};

template <int kType, typename P>
__global__ void __launch_bounds__(kTileThreads, P::kResident) matmul_int8_kernel(RoundedView x, WeightView w, WeightView up, int32_t gated, OutputView to) {
  using S = Stage<kType, P>;
  extern __shared__ __align__(16) uint8_t shared[];
  const Tile<P> tile(w, up, gated, x.rows);
  const int32_t blocks = w.columns / 32;
  const auto fetch_w = [&](int32_t s) {
    uint8_t* stage = shared + s % P::kStages * S::kBytes;
    constexpr int kChunks = P::kBlocks * S::kQuants / 16;
    const int32_t first = s * P::kBlocks, have = min(P::kBlocks, blocks - first);
#pragma unroll 1
    for (int u = threadIdx.x; u < P::kRows * kChunks; u += kTileThreads) {
      const int r = u / kChunks, c = u % kChunks;
      if (c * 16 < have * S::kQuants) copy_async<16>(stage + r * S::kRowW + c * 16, tile.data(r) + (tile.row_in(r) * blocks + first) * S::kQuants + c * 16);
    }
    constexpr int kFour = 4 / S::kScale;  // blocks whose scales are 4 bytes
    uint8_t* scales = stage + S::kAtScales;
    if (blocks % kFour == 0) {
#pragma unroll 1
      for (int u = threadIdx.x; u < P::kRows * P::kBlocks / kFour; u += kTileThreads) {
        const int r = u / (P::kBlocks / kFour), b = u % (P::kBlocks / kFour) * kFour;
        if (b < have) copy_async<4>(scales + (r * P::kBlocks + b) * S::kScale, tile.scales(r) + (tile.row_in(r) * blocks + first + b) * (S::kScale / 2));
      }
    } else {
#pragma unroll 1
      for (int u = threadIdx.x; u < P::kRows * P::kBlocks; u += kTileThreads) {
        const int r = u / P::kBlocks, b = u % P::kBlocks;
        if (b < have) reinterpret_cast<__half*>(scales)[u] = tile.scales(r)[tile.row_in(r) * blocks + first + b];
      }
    }
  };
  const auto fetch_x = [&](int32_t s) {
    uint8_t* stage = shared + s % P::kStages * S::kBytes;
    const int32_t first = s * P::kBlocks, have = min(P::kBlocks, blocks - first);
#pragma unroll 1
    for (int u = threadIdx.x; u < P::kTokens * P::kBlocks * 2; u += kTileThreads) {
      const int t = u / (P::kBlocks * 2), c = u % (P::kBlocks * 2);
      if (c < have * 2) copy_async<16>(stage + S::kAtX + t * S::kRowX + c * 16, x.q + (tile.token_in(t) * blocks + first) * 32 + c * 16);
    }
#pragma unroll 1
    for (int u = threadIdx.x; u < P::kBlocks * P::kTokens / 2; u += kTileThreads) {
      const int b = u / (P::kTokens / 2), t = u % (P::kTokens / 2) * 2;
      if (b < have) copy_async<16>(stage + S::kAtOf + (b * P::kTokens + t) * 8, x.of + int64_t{first + b} * x.stride + min(tile.t0 + t, x.stride - 2));
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

  // Integers are added to the bits of a float so large that its last place is 1: the sum is that float plus the dot product.
  constexpr float kLarge = 12582912.0f;
  const int32_t large[4] = {0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000};
  float total[P::kW][P::kX][4] = {};
  for (int32_t s = 0; s < stages; s++) {
    wait_copies<P::kStages - 2>();
    __syncthreads();
    if (s + P::kStages - 1 < stages) fetch_w(s + P::kStages - 1), fetch_x(s + P::kStages - 1);
    end_copies();
    const uint8_t* stage = shared + s % P::kStages * S::kBytes;
    const int32_t have = min(P::kBlocks, blocks - s * P::kBlocks);
#pragma unroll
    for (int b = tile.along_c; b < P::kBlocks; b += P::kAlongC) {
      if (b >= have) break;
      int32_t a[P::kW][4];
      float scale[P::kW][2], least[P::kW][2];
#pragma unroll
      for (int m = 0; m < P::kW; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int r = (tile.along_w * P::kW + m) * 16 + h * 8 + tile.group;
          const int32_t* from = reinterpret_cast<const int32_t*>(stage + r * S::kRowW + b * S::kQuants) + tile.i;
          if (kType == WKV_Q8_0) a[m][h] = from[0], a[m][2 + h] = from[4];
          else a[m][h] = from[0] & 0x0f0f0f0f, a[m][2 + h] = from[0] >> 4 & 0x0f0f0f0f;
          const __half* of = reinterpret_cast<const __half*>(stage + S::kAtScales) + (r * P::kBlocks + b) * (S::kScale / 2);
          scale[m][h] = __half2float(of[0]);
          least[m][h] = kType == WKV_Q4_1 ? __half2float(of[S::kScale / 2 - 1]) : kType == WKV_Q4_0 ? -8.0f * scale[m][h] : 0.0f;
        }
      }
#pragma unroll
      for (int n = 0; n < P::kX; n++) {
        const int t = (tile.along_x * P::kX + n) * 8;
        const int2 words = *reinterpret_cast<const int2*>(stage + S::kAtX + (t + tile.group) * S::kRowX + b * 32 + tile.i * 8);
        const float4 of = *reinterpret_cast<const float4*>(stage + S::kAtOf + (b * P::kTokens + t + 2 * tile.i) * 8);
#pragma unroll
        for (int m = 0; m < P::kW; m++) {
          int32_t dot[4];
          mma_int8(dot, a[m], words.x, words.y, large);
#pragma unroll
          for (int k = 0; k < 4; k++) {
            float& sum = total[m][n][k];
            sum = fmaf(__int_as_float(dot[k]) - kLarge, scale[m][k / 2] * (k % 2 ? of.z : of.x), sum);
            if (kType != WKV_Q8_0) sum = fmaf(least[m][k / 2], k % 2 ? of.w : of.y, sum);
          }
        }
      }
    }
  }

  wait_copies<0>();
  tile.finish(total, nullptr, reinterpret_cast<float*>(shared), to);
}

template <int kType, typename P>
void launch_matmul(Context& ctx, const RoundedView& x, const WeightView& w, const WeightView& up, const OutputView& to) {
  const int32_t gated = up.data != nullptr;
  const dim3 grid(divide_up(x.rows, P::kTokens), divide_up(w.rows, P::kRows >> gated));
  launch(ctx, matmul_int8_kernel<kType, P>, {grid, dim3(kTileThreads), Stage<kType, P>::kShared}, x, w, up, gated, to);
}

template <int kType>
void matmul_typed(Context& ctx, const RoundedView& x, const WeightView& w, const WeightView& up, const OutputView& to) {
  if (x.rows <= Few::kTokens) return launch_matmul<kType, Few>(ctx, x, w, up, to);
  if (x.rows <= Some::kTokens) return launch_matmul<kType, Some>(ctx, x, w, up, to);
  if (x.rows <= More::kTokens) return launch_matmul<kType, More>(ctx, x, w, up, to);
  launch_matmul<kType, Many>(ctx, x, w, up, to);
}

}  // namespace

void matmul_int8(Context& ctx, const RoundedView& x, const WeightView& w, const WeightView& up, const OutputView& to) {
  switch (w.dtype) {
    case WKV_Q8_0: return matmul_typed<WKV_Q8_0>(ctx, x, w, up, to);
    case WKV_Q4_0: return matmul_typed<WKV_Q4_0>(ctx, x, w, up, to);
    default: return matmul_typed<WKV_Q4_1>(ctx, x, w, up, to);
  }
}

}  // namespace wkv
