/**
 * matmul_skinny.cu: out[t, j] = norm(x[t]) . w[j] for up to 64 rows of x in f32 and f16 or bf16 w, on the tensor cores.
 *
 * As in matmul_half.cu x is the sum of two numbers of w's type, products are exact, and ordinary additions take over every 32 columns. Here
 * w is all there is to move, so a block owns kRows rows of it (gated: 16 of gate and 16 of up in turn) and every row of x: stages of w lie
 * in a ring in shared memory, asked for before x is there; x goes through registers, where it meets the norm's weight and is split, into two
 * buffers, one stage ahead of its use. The norm's scale, known at the end, multiplies the finished sums. `gridDim.x` blocks share the columns
 * where rows are few; they are a cluster, and add up their sums in a fixed order out of each other's shared memory.
 * Bytes moved: w once, x once a kRows rows of w (from the second level).
 * Tried and slower (16 rows, Llama-3-8B's products on an H100: 5.8 ms a step): stages of 64 columns, five of them (7.7: a stage then takes as
 * long as x's way from the second level); three stages (5.9); w from memory into registers (6.9); a ring a warp, without barriers (6.7);
 * 16 warps (6.7); later stages asked into the second level before x is there (6.2); one block a multiprocessor that walks over tiles.
 */
#include <algorithm>

#include "tile.cuh"

namespace wkv {
namespace {

constexpr int kThreads = 256;

/** How a block is laid out: warps along w, the rest along the columns; tiles of 16 rows of w and of 8 of x a warp; blocks of 32 columns a
 *  stage; stages; blocks that share a multiprocessor. */
template <int kAlongW_, int kTilesW, int kTilesX, int kBlocks_, int kStages_, int kResident_>
struct Layout {
  static constexpr int kAlongW = kAlongW_, kAlongC = 8 / kAlongW, kW = kTilesW, kX = kTilesX, kBlocks = kBlocks_, kStages = kStages_, kResident = kResident_;
  static constexpr int kRows = 16 * kW * kAlongW, kTokens = 8 * kX;
  static constexpr int kRow = kBlocks * 64;                                     // bytes of a row of w, or of x's high or low half, in a stage
  static constexpr int kStage = kRows * kRow, kHalf = kTokens * kRow;           // bytes
  static constexpr int kAtX = kStages * kStage, kBytes = kAtX + 2 * 2 * kHalf;  // two buffers of x
  static constexpr int kStride = kRows + 4;                                     // of sums
  static constexpr int kShared = std::max(kBytes, kAlongC * kTokens * kStride * 4);
};

/** Where 16 bytes of a stage's row lie: odd rows have their halves of 128 bytes exchanged, so that a warp's reads touch every bank once. */
template <int kBlocks>
__device__ inline int place(int row, int chunk) { return (kBlocks == 1 ? chunk : chunk ^ (row % 2 * 4)) * 16; }

/** Two floats as the sum of two pairs of w's type. */
template <bool kBf16>
__device__ inline void split_pair(float a, float b, uint32_t* high, uint32_t* low) {
  if constexpr (kBf16) {
    const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
    *high = *reinterpret_cast<const uint32_t*>(&h);
    const __nv_bfloat162 l = __floats2bfloat162_rn(a - __uint_as_float(*high << 16), b - __uint_as_float(*high & 0xffff0000u));
    *low = *reinterpret_cast<const uint32_t*>(&l);
  } else {
    const __half2 h = __floats2half2_rn(a, b);
    *high = *reinterpret_cast<const uint32_t*>(&h);
    const __half2 l = __floats2half2_rn(a - __low2float(h), b - __high2float(h));
    *low = *reinterpret_cast<const uint32_t*>(&l);
  }
}

template <bool kBf16, typename P>
__global__ void __launch_bounds__(kThreads, P::kResident) skinny_kernel(InputView in, WeightView w, WeightView up, int32_t gated, OutputView to) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ float factors[2][P::kTokens], squares[P::kTokens], scales[P::kTokens];
  const int32_t blocks = in.columns / 32, stages = (blocks + P::kBlocks - 1) / P::kBlocks, part = blockIdx.x, parts = gridDim.x;
  const int32_t begin = stages * part / parts, count = stages * (part + 1) / parts - begin, j0 = blockIdx.y * (P::kRows >> gated);
  const int warp = threadIdx.x / 32, along_w = warp / P::kAlongC, along_c = warp % P::kAlongC, group = threadIdx.x % 32 / 4, i = threadIdx.x % 4;

  // This thread's 16 bytes of some rows of each stage of w; past the end the last row stands in.
  constexpr int kChunks = P::kBlocks * 4, kRowsAtOnce = kThreads / kChunks, kPasses = P::kRows / kRowsAtOnce;
  const int own_row = threadIdx.x / kChunks, own_chunk = threadIdx.x % kChunks;
  const uint8_t* from[kPasses];
#pragma unroll
  for (int p = 0; p < kPasses; p++) {
    const int r = own_row + p * kRowsAtOnce;
    const int64_t row = min(w.rows - 1, j0 + (gated ? r / 32 * 16 + r % 16 : r));
    from[p] = (gated && r / 16 % 2 ? up.data : w.data) + (row * blocks + begin * P::kBlocks) * 64 + own_chunk * 16;
  }
  const auto fetch = [&](int32_t s) {
    if (s < count && (begin + s) * P::kBlocks + own_chunk / 4 < blocks) {
      uint8_t* stage = shared + s % P::kStages * P::kStage + own_row * P::kRow + place<P::kBlocks>(own_row, own_chunk);
#pragma unroll
      for (int p = 0; p < kPasses; p++) copy_async<16>(stage + p * kRowsAtOnce * P::kRow, from[p] + s * P::kRow);
    }
    end_copies();
  };

  // And its 4 columns of some rows of x.
  constexpr int kFours = P::kBlocks * 8, kTokensAtOnce = kThreads / kFours, kLoads = (P::kTokens + kTokensAtOnce - 1) / kTokensAtOnce;
  const int own_token = threadIdx.x / kFours, own_four = threadIdx.x % kFours;
  float4 next[kLoads], weight = make_float4(1, 1, 1, 1);
  float squared[kLoads] = {};
  const auto load = [&](int32_t s) {
    const int32_t four = (begin + s) * kFours + own_four;
    const bool inside = s < count && four < blocks * 8;
    if (in.norm && inside) weight = __ldg(reinterpret_cast<const float4*>(in.norm) + four);
#pragma unroll
    for (int l = 0; l < kLoads; l++) {
      const int t = own_token + l * kTokensAtOnce;
      next[l] = inside && t < in.rows ? reinterpret_cast<const float4*>(in.x)[int64_t{t} * blocks * 8 + four] : make_float4(0, 0, 0, 0);
    }
  };
  const auto split = [&](int32_t s) {
    uint8_t* buffer = shared + P::kAtX + s % 2 * 2 * P::kHalf;
#pragma unroll
    for (int l = 0; l < kLoads; l++) {
      const int t = own_token + l * kTokensAtOnce;
      if (t >= P::kTokens) break;
      float4 v = next[l];
      squared[l] += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
      if (in.norm) v = make_float4(v.x * weight.x, v.y * weight.y, v.z * weight.z, v.w * weight.w);
      if (!kBf16) {  // f16 has few exponents, so the stage's highest number is brought to 2^14 by a power of two
        float most = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
#pragma unroll
        for (int o = 1; o < kFours; o <<= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));
        const int32_t bits = __float_as_int(most) >> 23, exponent = bits == 0 || bits == 255 ? 127 : max(1, bits - 14);
        const float inverse = __int_as_float((254 - exponent) << 23);
        v = make_float4(v.x * inverse, v.y * inverse, v.z * inverse, v.w * inverse);
        if (own_four == 0) factors[s % 2][t] = __int_as_float(exponent << 23);
      }
      uint2 high, low;
      split_pair<kBf16>(v.x, v.y, &high.x, &low.x), split_pair<kBf16>(v.z, v.w, &high.y, &low.y);
      uint8_t* at = buffer + t * P::kRow + place<P::kBlocks>(t, own_four / 2) + own_four % 2 * 8;
      *reinterpret_cast<uint2*>(at) = high;
      *reinterpret_cast<uint2*>(at + P::kHalf) = low;
    }
  };

#pragma unroll
  for (int s = 0; s < P::kStages - 1; s++) fetch(s);
  wait_for_previous();
  let_next_start();
  load(0);
  split(0);
  load(1);

  float total[P::kW][P::kX][4] = {};
#pragma unroll 1
  for (int32_t s = 0; s < count; s++) {
    wait_copies<P::kStages - 2>();
    __syncthreads();
    fetch(s + P::kStages - 1);
    split(s + 1);
    load(s + 2);
    const uint8_t* stage = shared + s % P::kStages * P::kStage;
    const uint8_t* buffer = shared + P::kAtX + s % 2 * 2 * P::kHalf;
    const int32_t have = min(P::kBlocks, blocks - (begin + s) * P::kBlocks);
#pragma unroll
    for (int block = 0; block < P::kBlocks; block += P::kAlongC) {
      const int b = block + along_c;
      if (b >= have) break;
      // A lane takes 8 neighbouring columns of w and of x where the tensor core sees columns 2 i, 8 + 2 i of two products: any order will do.
      int32_t a[P::kW][2][4];
#pragma unroll
      for (int m = 0; m < P::kW; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int r = (along_w * P::kW + m) * 16 + h * 8 + group;
          const int4 v = *reinterpret_cast<const int4*>(stage + r * P::kRow + place<P::kBlocks>(group, b * 4 + i));
          a[m][0][h] = v.x, a[m][0][2 + h] = v.y, a[m][1][h] = v.z, a[m][1][2 + h] = v.w;
        }
      }
#pragma unroll
      for (int n = 0; n < P::kX; n++) {
        const uint8_t* at = buffer + (n * 8 + group) * P::kRow + place<P::kBlocks>(group, b * 4 + i);
        const int4 high = *reinterpret_cast<const int4*>(at), low = *reinterpret_cast<const int4*>(at + P::kHalf);
        float2 factor = make_float2(1, 1);
        if (!kBf16) factor = *reinterpret_cast<const float2*>(&factors[s % 2][n * 8 + 2 * i]);
#pragma unroll
        for (int m = 0; m < P::kW; m++) {
          const float zero[4] = {};
          float sum[4];
          mma_half<kBf16>(sum, a[m][0], low.x, low.y, zero);
          mma_half<kBf16>(sum, a[m][1], low.z, low.w, sum);
          mma_half<kBf16>(sum, a[m][0], high.x, high.y, sum);
          mma_half<kBf16>(sum, a[m][1], high.z, high.w, sum);
#pragma unroll
          for (int k = 0; k < 4; k++) total[m][n][k] = kBf16 ? total[m][n][k] + sum[k] : fmaf(sum[k], k % 2 ? factor.y : factor.x, total[m][n][k]);
        }
      }
    }
  }

  // Sums of this block: [c][t][r].
  wait_copies<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int m = 0; m < P::kW; m++) {
#pragma unroll
    for (int n = 0; n < P::kX; n++) {
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int t = n * 8 + 2 * i + k % 2, r = (along_w * P::kW + m) * 16 + k / 2 * 8 + group;
        sums[(along_c * P::kTokens + t) * P::kStride + r] = total[m][n][k];
      }
    }
  }
  if (in.norm) {
#pragma unroll
    for (int l = 0; l < kLoads; l++) {
      const int t = own_token + l * kTokensAtOnce;
      if (t >= P::kTokens) break;
#pragma unroll
      for (int o = 1; o < kFours; o <<= 1) squared[l] += __shfl_xor_sync(0xffffffffu, squared[l], o);
      if (own_four == 0) squares[t] = squared[l];
    }
  }
  if (parts > 1) arrive_cluster(), wait_cluster();
  else __syncthreads();
  if (threadIdx.x < P::kTokens) {
    double all = 0.0;
    if (in.norm) {
      for (int32_t rank = 0; rank < parts; rank++) all += parts > 1 ? load_peer(&squares[threadIdx.x], rank) : squares[threadIdx.x];
    }
    scales[threadIdx.x] = in.norm ? 1.0f / sqrtf(static_cast<float>(all / in.columns) + in.epsilon) : 1.0f;
  }
  __syncthreads();
  const auto sum = [&](int t, int r) {
    float all = 0.0f;
#pragma unroll
    for (int c = 0; c < P::kAlongC; c++) {
      const float* at = sums + (c * P::kTokens + t) * P::kStride + r;
      if (parts == 1) {
        all += *at;
        continue;
      }
      float own[kMostParts];
#pragma unroll
      for (int rank = 0; rank < kMostParts; rank++) own[rank] = rank < parts ? load_peer(at, rank) : 0.0f;
#pragma unroll
      for (int rank = 0; rank < kMostParts; rank++) all += own[rank];
    }
    return all * scales[t];
  };
  const int wide = P::kRows >> gated, outputs = wide * in.rows;
  for (int o = outputs * part / parts + threadIdx.x; o < outputs * (part + 1) / parts; o += kThreads) {
    const int t = o / wide, r = gated ? o % wide / 16 * 32 + o % 16 : o % wide;
    const int32_t j = j0 + o % wide;
    if (j < w.rows) to.put(t, j, gated ? activate(to.activation, sum(t, r), sum(t, r + 16)) : sum(t, r));
  }
  if (parts > 1) arrive_cluster(), wait_cluster();  // the others still read
}

template <bool kBf16, typename P>
void launch_skinny(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, const OutputView& to) {
  const int32_t gated = up.data != nullptr, tiles = divide_up(w.rows, P::kRows >> gated);
  const int32_t parts = share_columns(ctx, tiles, divide_up(w.columns, P::kBlocks * 32));
  launch(ctx, skinny_kernel<kBf16, P>, {dim3(parts, tiles), dim3(kThreads), size_t(P::kShared), uint32_t(parts)}, in, w, up, gated, to);
}

template <bool kBf16>
bool skinny_typed(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, const OutputView& to) {
  const auto by = [&](auto layout) {
    launch_skinny<kBf16, decltype(layout)>(ctx, in, w, up, to);
    return true;
  };
  if (in.rows <= 8) return by(Layout<4, 2, 1, 4, 2, 2>());
  if (in.rows <= 16) return by(Layout<8, 1, 2, 4, 2, 2>());
  if (in.rows <= 32) return by(Layout<8, 1, 4, 4, 2, 2>());
  return in.rows <= 64 && by(Layout<8, 2, 8, 2, 2, 1>());
}

}  // namespace

bool matmul_skinny(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, const OutputView& to) {
  return w.dtype == WKV_BF16 ? skinny_typed<true>(ctx, in, w, up, to) : skinny_typed<false>(ctx, in, w, up, to);
}

}  // namespace wkv
