/**
 * matmul_int8.cu: out[t, j] = x[t] . w[j] for quantised w and x in 8 bits, on the tensor cores.
 *
 * In each block of 32 columns (16 where a type has scales for them) the product is an integer, exact; it is then scaled by w's and x's
 * scale and added in f32, as the CPU does:
 *   total += dot * (w_scale * x_scale) [+ w_least * x_sum]          Q4_0, Q5_0: - w_scale * middle * x_sum, as their values are stored so
 * A block owns kRows rows of w (gated: half of them of gate, half of up) and kTokens rows of x, and walks along C in stages that are copied
 * into shared memory while it works; w is widened to 8 bits in registers. Few rows of x: up to 8 blocks, a cluster, share the columns out
 * and add up their sums out of each other's shared memory, in a fixed order.
 * Bytes moved: w once a kTokens rows of x, x once a kRows rows of w (from the second level).
 */
#include <algorithm>

#include "tile.cuh"

namespace wkv {
namespace {

constexpr int kRoom = 98304;  // bytes of stages: all GPUs have 99 KB a block, and two blocks share a multiprocessor of sm_90

/** Where a stage's parts lie in shared memory, in bytes. Rows are padded so that a warp's reads touch every bank once. */
template <int kType, typename P>
struct Stage {
  static constexpr wkv_form kForm = wkv_form_of(kType);
  static constexpr bool kPair = scale_bytes(kType) == 4;  // scale and minimum
  static constexpr int kData = data_bytes(kType) * P::kBlocks, kHigh = high_bytes(kType) * P::kBlocks, kSubs = subs_bytes(kType) * P::kBlocks;
  static constexpr int kScales = kForm.subs ? 4 : scale_bytes(kType) * P::kBlocks;
  static constexpr int kRowData = kData + 16, kRowHigh = kHigh ? kHigh + 16 : 0, kRowX = P::kBlocks * 32 + 32;
  static constexpr int kAtHigh = P::kRows * kRowData, kAtSubs = kAtHigh + P::kRows * kRowHigh, kAtScales = kAtSubs + P::kRows * kSubs;
  static constexpr int kAtX = kAtScales + P::kRows * kScales, kAtOf = kAtX + P::kTokens * kRowX, kBytes = kAtOf + P::kBlocks * P::kTokens * 8;
  static constexpr int kStages = kRoom / kBytes < P::kStages ? kRoom / kBytes : P::kStages;
  static constexpr int kShared = kStages * kBytes > P::kSums ? kStages * kBytes : P::kSums;
  static_assert(kStages >= 2 && 8 % P::kBlocks == 0 && kBytes % 16 == 0);
};

/** Copies the first `have` of kBytes bytes of each of kCount rows, kUnit at once. */
template <int kUnit, int kBytes, int kCount, typename From, typename To>
__device__ inline void copy_rows(int have, From from, To to) {
  constexpr int kUnits = kBytes / kUnit;
#pragma unroll 1
  for (int u = threadIdx.x; u < kCount * kUnits; u += kTileThreads) {
    const int r = u / kUnits, c = u % kUnits * kUnit;
    if (c < have) copy_async<kUnit>(to(r) + c, from(r) + c);
  }
}

template <int kType, typename P>
__global__ void __launch_bounds__(kTileThreads, P::kResident) matmul_int8_kernel(RoundedView x, WeightView w, WeightView up, int32_t gated, OutputView to, int32_t parts) {
  using S = Stage<kType, P>;
  extern __shared__ __align__(16) uint8_t shared[];
  const Tile<P> tile(w, up, gated, x.rows, parts);
  const int32_t blocks = w.columns / 32, stages = (blocks + P::kBlocks - 1) / P::kBlocks, begin = stages * tile.part / parts, count = stages * (tile.part + 1) / parts - begin;
  const auto fetch_w = [&](int32_t s) {
    uint8_t* stage = shared + s % S::kStages * S::kBytes;
    const int32_t first = (begin + s) * P::kBlocks, have = min(P::kBlocks, blocks - first);
    const auto block = [&](int r) { return tile.row_in(r) * blocks + first; };
    copy_rows<16, S::kData, P::kRows>(have * data_bytes(kType), [&](int r) { return tile.weight(r).data + block(r) * data_bytes(kType); }, [&](int r) { return stage + r * S::kRowData; });
    if constexpr (S::kHigh > 0) {
      const auto from = [&](int r) { return tile.weight(r).high + block(r) * high_bytes(kType); };
      const auto place = [&](int r) { return stage + S::kAtHigh + r * S::kRowHigh; };
      if (S::kForm.subs || blocks % 4 == 0) copy_rows<16, S::kHigh, P::kRows>(have * high_bytes(kType), from, place);
      else copy_rows<4, S::kHigh, P::kRows>(have * high_bytes(kType), from, place);
    }
    if constexpr (S::kForm.subs) {
      copy_rows<S::kSubs, S::kSubs, P::kRows>(S::kSubs, [&](int r) { return reinterpret_cast<const uint8_t*>(tile.weight(r).subs + block(r)); }, [&](int r) { return stage + S::kAtSubs + r * S::kSubs; });
      copy_rows<4, 4, P::kRows>(4, [&](int r) { return reinterpret_cast<const uint8_t*>(tile.weight(r).scales + block(r) / 8 * 2); }, [&](int r) { return stage + S::kAtScales + r * 4; });
    } else {
      constexpr int kOne = scale_bytes(kType);
      const auto from = [&](int r) { return reinterpret_cast<const uint8_t*>(tile.weight(r).scales) + block(r) * kOne; };
      const auto place = [&](int r) { return stage + S::kAtScales + r * S::kScales; };
      if (kOne == 4 || blocks % 2 == 0) {
        copy_rows<4, S::kScales, P::kRows>(have * kOne, from, place);
      } else {
#pragma unroll 1
        for (int u = threadIdx.x; u < P::kRows * P::kBlocks; u += kTileThreads) {
          const int r = u / P::kBlocks, b = u % P::kBlocks;
          if (b < have) *reinterpret_cast<__half*>(place(r) + b * kOne) = *reinterpret_cast<const __half*>(from(r) + b * kOne);
        }
      }
    }
  };
  const auto fetch_x = [&](int32_t s) {
    uint8_t* stage = shared + s % S::kStages * S::kBytes;
    const int32_t first = (begin + s) * P::kBlocks, have = min(P::kBlocks, blocks - first);
    copy_rows<16, P::kBlocks * 32, P::kTokens>(have * 32, [&](int t) { return reinterpret_cast<const uint8_t*>(x.q) + (tile.token_in(t) * blocks + first) * 32; }, [&](int t) { return stage + S::kAtX + t * S::kRowX; });
#pragma unroll 1
    for (int u = threadIdx.x; u < P::kBlocks * P::kTokens / 2; u += kTileThreads) {
      const int b = u / (P::kTokens / 2), t = u % (P::kTokens / 2) * 2;
      if (b < have) copy_async<16>(stage + S::kAtOf + (b * P::kTokens + t) * 8, x.of + int64_t{first + b} * x.stride + min(tile.t0 + t, x.stride - 2));
    }
  };

#pragma unroll 1
  for (int32_t s = 0; s < S::kStages - 1; s++) {
    if (s < count) fetch_w(s);
  }
  wait_for_previous();
  let_next_start();
#pragma unroll 1
  for (int32_t s = 0; s < S::kStages - 1; s++) {
    if (s < count) fetch_x(s);
    end_copies();
  }

  // Integers are added to the bits of a float so large that its last place is 1: the sum is that float plus the dot product.
  constexpr float kLarge = 12582912.0f;
  const int32_t large[4] = {0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000};
  const auto real = [](int32_t sum) { return __int_as_float(sum) - kLarge; };
  // Whether each 16 columns have a product of their own; Q2_K's scales go into its few-bit numbers instead, and so do its minima.
  constexpr bool kHalves = S::kForm.halves && kType != WKV_Q2_K;
  constexpr bool kShifted = S::kForm.middle > 0 && !kHalves, kLeast = S::kForm.least || kShifted;
  float total[P::kW][P::kX][4] = {};
#pragma unroll 1
  for (int32_t s = 0; s < count; s++) {
    wait_copies<S::kStages - 2>();
    __syncthreads();
    if (s + S::kStages - 1 < count) fetch_w(s + S::kStages - 1), fetch_x(s + S::kStages - 1);
    end_copies();
    const uint8_t* stage = shared + s % S::kStages * S::kBytes;
    const int32_t have = min(P::kBlocks, blocks - (begin + s) * P::kBlocks);
#pragma unroll(P::kX * P::kW <= 2 ? P::kBlocks : 1)
    for (int b = 0; b < P::kBlocks; b++) {
      if (b >= have) break;
      int32_t a[P::kW][4], minima[P::kW][4];
      float scale[P::kW][2], second_scale[P::kW][2], least[P::kW][2];
#pragma unroll
      for (int m = 0; m < P::kW; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int r = (tile.along_w * P::kW + m) * 16 + h * 8 + tile.group, i = tile.i;
          uint32_t q[2];  // columns 4 i to 4 i + 3, and from 16 on
          const uint32_t* data = reinterpret_cast<const uint32_t*>(stage + r * S::kRowData + b * data_bytes(kType));
          if constexpr (S::kForm.low == 8) q[0] = data[i], q[1] = data[4 + i];
          if constexpr (S::kForm.low == 4) q[0] = data[i] & 0x0f0f0f0fu, q[1] = data[i] >> 4 & 0x0f0f0f0fu;
          if constexpr (S::kForm.low == 2) q[0] = data[0] >> (2 * i) & 0x03030303u, q[1] = data[1] >> (2 * i) & 0x03030303u;
          const uint32_t* high = reinterpret_cast<const uint32_t*>(stage + S::kAtHigh + r * S::kRowHigh + b * high_bytes(kType));
          if constexpr (S::kForm.high == 1) q[0] |= (high[0] >> i & 0x01010101u) << S::kForm.low, q[1] |= (high[0] >> (4 + i) & 0x01010101u) << S::kForm.low;
          if constexpr (S::kForm.high == 2) q[0] |= (high[0] >> (2 * i) & 0x03030303u) << S::kForm.low, q[1] |= (high[1] >> (2 * i) & 0x03030303u) << S::kForm.low;
          if constexpr (kType == WKV_IQ4_NL) q[0] = iq4_values(q[0]), q[1] = iq4_values(q[1]);
          if constexpr (kHalves && S::kForm.middle > 0) q[0] = __vsub4(q[0], S::kForm.middle * 0x01010101u), q[1] = __vsub4(q[1], S::kForm.middle * 0x01010101u);

          const uint8_t* at = stage + S::kAtScales + r * S::kScales + (S::kForm.subs ? 0 : b * scale_bytes(kType));
          float2 of = make_float2(0, 0);
          if constexpr (S::kPair) of = __half22float2(*reinterpret_cast<const __half2*>(at));
          else of.x = __half2float(*reinterpret_cast<const __half*>(at));
          least[m][h] = S::kForm.least ? of.y : 0.0f;
          scale[m][h] = second_scale[m][h] = of.x;
          if constexpr (S::kForm.subs) {
            const uint32_t subs = *reinterpret_cast<const uint16_t*>(stage + S::kAtSubs + r * S::kSubs + b * 2), first = subs & 255, second = subs >> 8;
            if constexpr (kType == WKV_Q2_K) {  // products of 2 and 4 bits are of 6
              q[0] *= first & 15, q[1] *= second & 15;
              minima[m][h] = static_cast<int32_t>((first >> 4) * 0x01010101u), minima[m][2 + h] = static_cast<int32_t>((second >> 4) * 0x01010101u);
              least[m][h] = -of.y;
            } else if constexpr (S::kForm.least) {
              scale[m][h] = of.x * static_cast<float>(first), least[m][h] = -of.y * static_cast<float>(second);
            } else {
              scale[m][h] = of.x * static_cast<float>(static_cast<int8_t>(first)), second_scale[m][h] = of.x * static_cast<float>(static_cast<int8_t>(second));
            }
          }
          if constexpr (kShifted) least[m][h] = -static_cast<float>(S::kForm.middle) * scale[m][h];
          a[m][h] = static_cast<int32_t>(q[0]), a[m][2 + h] = static_cast<int32_t>(q[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < P::kX; n++) {
        const int t = (tile.along_x * P::kX + n) * 8;
        const int2 words = *reinterpret_cast<const int2*>(stage + S::kAtX + (t + tile.group) * S::kRowX + b * 32 + tile.i * 8);
        const float4 of = *reinterpret_cast<const float4*>(stage + S::kAtOf + (b * P::kTokens + t + 2 * tile.i) * 8);
#pragma unroll
        for (int m = 0; m < P::kW; m++) {
          float (&sum)[4] = total[m][n];
          int32_t dot[4], other[4];
          if constexpr (kHalves) {
            mma_int8_short(dot, a[m][0], a[m][1], words.x, large);
            mma_int8_short(other, a[m][2], a[m][3], words.y, large);
#pragma unroll
            for (int k = 0; k < 4; k++) sum[k] = fmaf(fmaf(real(dot[k]), scale[m][k / 2], real(other[k]) * second_scale[m][k / 2]), k % 2 ? of.z : of.x, sum[k]);
          } else {
            mma_int8(dot, a[m], words.x, words.y, large);
            if constexpr (kType == WKV_Q2_K) mma_int8(other, minima[m], words.x, words.y, large);
#pragma unroll
            for (int k = 0; k < 4; k++) {
              const float x_scale = k % 2 ? of.z : of.x, x_sum = k % 2 ? of.w : of.y;
              sum[k] = fmaf(real(dot[k]), scale[m][k / 2] * x_scale, sum[k]);
              if constexpr (kType == WKV_Q2_K) sum[k] = fmaf(real(other[k]), least[m][k / 2] * x_scale, sum[k]);
              else if constexpr (kLeast) sum[k] = fmaf(least[m][k / 2], x_sum, sum[k]);
            }
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
  const int32_t gated = up.data != nullptr, tiles = divide_up(w.rows, P::kRows >> gated), groups = divide_up(x.rows, P::kTokens), stages = divide_up(w.columns / 32, P::kBlocks);
  const int32_t parts = groups == 1 ? share_columns(ctx, tiles, stages) : 1;
  launch(ctx, matmul_int8_kernel<kType, P>, {dim3(groups * parts, tiles), dim3(kTileThreads), Stage<kType, P>::kShared, uint32_t(parts)}, x, w, up, gated, to, parts);
}

template <int kType>
void matmul_typed(Context& ctx, const RoundedView& x, const WeightView& w, const WeightView& up, const OutputView& to) {
  constexpr int kBlocks = data_bytes(kType) + high_bytes(kType) > 20 ? 4 : 8;
  if (x.rows <= 8) return launch_matmul<kType, Plan<8, 1, 1, 1, kBlocks, 5, 2>>(ctx, x, w, up, to);
  if (x.rows <= 16) return launch_matmul<kType, Plan<8, 1, 1, 2, kBlocks, 5, 2>>(ctx, x, w, up, to);
  if (x.rows <= 32) return launch_matmul<kType, Plan<8, 1, 1, 4, 4, 5, 2>>(ctx, x, w, up, to);
  if (x.rows <= 64) return launch_matmul<kType, Plan<8, 1, 1, 8, 4, 5, 2>>(ctx, x, w, up, to);
  launch_matmul<kType, Plan<2, 4, 4, 4, 4, 2, 2>>(ctx, x, w, up, to);
}

}  // namespace

void matmul_int8(Context& ctx, const RoundedView& x, const WeightView& w, const WeightView& up, const OutputView& to) {
  const auto typed = [&](auto type) {
    if constexpr (is_quantised(type.value)) matmul_typed<type.value>(ctx, x, w, up, to);
  };
  if (wkv_has_pieces(w.dtype)) by_pieces(w.dtype, typed);
  else by_type(w.dtype, typed);
}

}  // namespace wkv
