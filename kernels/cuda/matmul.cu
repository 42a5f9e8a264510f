/**
 * matmul.cu: x after norm and rounding, and out[t, j] = x[t] . w[j] in f32 for many rows of x.
 *
 * matmul_f32: a block owns a tile of 64 x 64 of out and walks along C in steps of 32; weights are widened on their way into shared memory.
 * Bytes moved: w once a 64 rows of x, x once a 64 rows of w.
 */
#include "fours.cuh"
#include "linear.cuh"

namespace wkv {
namespace {

/** A block's row of x, and the scale of its norm. */
__device__ inline float row_scale(const InputView& in, const float* x) {
  __shared__ double area[32];
  if (!in.norm) return 1.0f;
  double squares = 0.0;
  if (in.columns % 4 == 0) {
    for (int32_t c = threadIdx.x * 4; c < in.columns; c += 1024) {
      const Four<float> four = four_at(x + c);
#pragma unroll
      for (int k = 0; k < 4; k++) squares += static_cast<double>(four.x[k]) * four.x[k];
    }
  } else {
    for (int32_t c = threadIdx.x; c < in.columns; c += 256) squares += static_cast<double>(x[c]) * x[c];
  }
  return 1.0f / sqrtf(static_cast<float>(block_sum(squares, area) / in.columns) + in.epsilon);
}

__global__ void __launch_bounds__(256) norm_kernel(InputView in, float* out) {
  wait_for_previous();
  let_next_start();
  const float* x = in.x + int64_t{blockIdx.x} * in.columns;
  const float scale = row_scale(in, x);
  for (int32_t c = threadIdx.x; c < in.columns; c += 256) out[int64_t{blockIdx.x} * in.columns + c] = x[c] * scale * in.norm[c];
}

__global__ void __launch_bounds__(256) round_kernel(InputView in, int32_t* q, float2* of, int32_t stride) {
  wait_for_previous();
  let_next_start();
  const int32_t words = in.columns / 4, lane = threadIdx.x % 32;
  const float* x = in.x + int64_t{blockIdx.x} * in.columns;
  const float scale = row_scale(in, x);
  for (int32_t start = threadIdx.x - lane; start < words; start += 256) {
    const int32_t i = start + lane;
    float4 v = make_float4(0, 0, 0, 0);
    if (i < words) {
      v = reinterpret_cast<const float4*>(x)[i];
      if (in.norm) {
        const float4 n = __ldg(reinterpret_cast<const float4*>(in.norm) + i);
        v = make_float4(v.x * scale * n.x, v.y * scale * n.y, v.z * scale * n.z, v.w * scale * n.w);
      }
    }
    float2 both;
    const int32_t word = round_four(v, &both.x, &both.y);
    if (i >= words) continue;
    q[int64_t{blockIdx.x} * words + i / 8 * 8 + i % 4 * 2 + i / 4 % 2] = word;
    if (i % 8 == 0) of[int64_t{i / 8} * stride + blockIdx.x] = both;
  }
}

/** f16 has few exponents, so there the row's highest number is brought to 2^14 by a power of two. Columns are a multiple of 4. */
template <bool kBf16>
__global__ void __launch_bounds__(256) split_kernel(InputView in, uint8_t* parts, float* factors) {
  using T = std::conditional_t<kBf16, __nv_bfloat16, __half>;
  __shared__ float area[32];
  wait_for_previous();
  let_next_start();
  const int32_t columns = in.columns;
  const float* x = in.x + int64_t{blockIdx.x} * columns;
  const float scale = row_scale(in, x);
  const auto values = [&](int32_t c) {
    const Four<float> own = four_at(x + c);
    if (!in.norm) return own;
    const Four<float> norm = four_at(in.norm + c);
    return each<float>(own, [&](float v, int k) { return v * scale * norm.x[k]; });
  };
  float factor = 1.0f;
  if (!kBf16) {
    float most = 0.0f;
    for (int32_t c = threadIdx.x * 4; c < columns; c += 1024) {
      const Four<float> v = values(c);
      most = fmaxf(fmaxf(most, fmaxf(fabsf(v.x[0]), fabsf(v.x[1]))), fmaxf(fabsf(v.x[2]), fabsf(v.x[3])));
    }
    most = block_max(most, area);
    if (most > 0.0f && most <= 3.402823466e38f) factor = ldexpf(1.0f, max(ilogbf(most) - 14, -120));
  }
  T *high = reinterpret_cast<T*>(parts) + int64_t{blockIdx.x} * columns, *low = high + int64_t{in.rows} * columns;
#pragma unroll 4
  for (int32_t c = threadIdx.x * 4; c < columns; c += 1024) {
    const Four<float> v = each<float>(values(c), [&](float v, int) { return kBf16 ? v : v / factor; });
    const Four<T> first = each<T>(v, [](float v, int) { return from_float<T>(v); });
    four_at(high + c) = first;
    if (!in.half) four_at(low + c) = each<T>(v, [&](float v, int k) { return from_float<T>(v - to_float(first.x[k])); });
  }
  if (threadIdx.x == 0) factors[blockIdx.x] = factor;
}

constexpr int kPieces = -1;  // any type of quants.h

/** Reads 4 columns of a row at once. */
template <int kType>
__device__ inline float4 weights4(const WeightView& w, int64_t row, int32_t column) {
  const int64_t i = row * w.columns + column;
  if (kType == WKV_F32) return __ldg(reinterpret_cast<const float4*>(w.data + i * 4));
  if (kType == WKV_F16) {
    const uint2 raw = __ldg(reinterpret_cast<const uint2*>(w.data + i * 2));
    const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&raw.x)), b = __half22float2(*reinterpret_cast<const __half2*>(&raw.y));
    return make_float4(a.x, a.y, b.x, b.y);
  }
  if (kType == WKV_BF16) {
    const uint2 raw = __ldg(reinterpret_cast<const uint2*>(w.data + i * 2));
    return make_float4(__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u), __uint_as_float(raw.y << 16), __uint_as_float(raw.y & 0xffff0000u));
  }
  if (kType == kPieces) return make_float4(weight_at(w, row, column), weight_at(w, row, column + 1), weight_at(w, row, column + 2), weight_at(w, row, column + 3));
  const int64_t block = row * (w.columns / 32) + column / 32;
  if (kType == WKV_Q8_0) {
    const int32_t raw = __ldg(reinterpret_cast<const int32_t*>(w.data + block * 32 + column % 32));
    const float s = __half2float(__ldg(w.scales + block));
    return make_float4((raw << 24 >> 24) * s, (raw << 16 >> 24) * s, (raw << 8 >> 24) * s, (raw >> 24) * s);
  }
  const int32_t within = column % 32;
  const uint32_t raw = __ldg(reinterpret_cast<const uint32_t*>(w.data + block * 16 + within % 16)) >> (within / 16 * 4);
  const int32_t middle = kType == WKV_Q4_0 ? 8 : 0;
  float s, m = 0.0f;
  if (kType == WKV_Q4_1) {
    const float2 both = __half22float2(__ldg(reinterpret_cast<const __half2*>(w.scales) + block));
    s = both.x, m = both.y;
  } else {
    s = __half2float(__ldg(w.scales + block));
  }
  const auto wide = [&](int shift) { return fmaf(static_cast<float>(static_cast<int32_t>(raw >> shift & 15) - middle), s, m); };
  return make_float4(wide(0), wide(8), wide(16), wide(24));
}

constexpr int kTile = 64;

/** A thread owns outputs [4 ty, 4 ty + 4) x {tx, tx + 16, tx + 32, tx + 48} of the tile. */
template <int kType>
__global__ void __launch_bounds__(256) matmul_f32_kernel(const float* x, int32_t rows, WeightView w, OutputView to) {
  wait_for_previous();
  let_next_start();
  __shared__ __align__(16) float xs[32][kTile + 4], ws[32][kTile + 4];  // transposed
  const int32_t columns = w.columns, t0 = blockIdx.y * kTile, j0 = blockIdx.x * kTile, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float total[4][4] = {};
  for (int32_t c0 = 0; c0 < columns; c0 += 32) {
    __syncthreads();
    if (columns % 4 == 0) {
#pragma unroll
      for (int u = threadIdx.x; u < kTile * 8; u += 256) {
        const int32_t i = u / 8, c = u % 8 * 4;
        float4 a = make_float4(0, 0, 0, 0), b = a;
        if (c0 + c < columns) {
          if (t0 + i < rows) a = *reinterpret_cast<const float4*>(x + int64_t{t0 + i} * columns + c0 + c);
          if (j0 + i < w.rows) b = weights4<kType>(w, j0 + i, c0 + c);
        }
        xs[c][i] = a.x, xs[c + 1][i] = a.y, xs[c + 2][i] = a.z, xs[c + 3][i] = a.w;
        ws[c][i] = b.x, ws[c + 1][i] = b.y, ws[c + 2][i] = b.z, ws[c + 3][i] = b.w;
      }
    } else {
      for (int u = threadIdx.x; u < kTile * 32; u += 256) {
        const int32_t i = u / 32, c = u % 32;
        const bool inside = c0 + c < columns;
        xs[c][i] = inside && t0 + i < rows ? x[int64_t{t0 + i} * columns + c0 + c] : 0.0f;
        ws[c][i] = inside && j0 + i < w.rows ? weight_at(w, j0 + i, c0 + c) : 0.0f;
      }
    }
    __syncthreads();
#pragma unroll 8
    for (int c = 0; c < 32; c++) {
      const float4 a = *reinterpret_cast<const float4*>(&xs[c][ty * 4]);
      const float av[4] = {a.x, a.y, a.z, a.w};
      float bv[4];
#pragma unroll
      for (int l = 0; l < 4; l++) bv[l] = ws[c][tx + 16 * l];
#pragma unroll
      for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int l = 0; l < 4; l++) total[k][l] = fmaf(av[k], bv[l], total[k][l]);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < 4; k++) {
#pragma unroll
    for (int l = 0; l < 4; l++) {
      if (t0 + ty * 4 + k < rows && j0 + tx + 16 * l < w.rows) to.put(t0 + ty * 4 + k, j0 + tx + 16 * l, total[k][l]);
    }
  }
}

}  // namespace

const float* norm_rows(Context& ctx, const InputView& in, uint8_t* scratch) {
  if (!in.norm) return in.x;
  float* out = reinterpret_cast<float*>(scratch);
  launch(ctx, norm_kernel, {dim3(in.rows), dim3(256)}, in, out);
  return out;
}

RoundedView round_rows(Context& ctx, const InputView& in, uint8_t* scratch) {
  const int32_t stride = (in.rows + 1) / 2 * 2;
  float2* of = reinterpret_cast<float2*>(scratch + size_t(in.rows) * in.columns);
  launch(ctx, round_kernel, {dim3(in.rows), dim3(256)}, in, reinterpret_cast<int32_t*>(scratch), of, stride);
  return {reinterpret_cast<int8_t*>(scratch), of, in.rows, stride};
}

SplitView split_rows(Context& ctx, const InputView& in, bool bf16, uint8_t* scratch) {
  float* factors = reinterpret_cast<float*>(scratch + size_t(in.rows) * in.columns * 4);
  launch(ctx, bf16 ? split_kernel<true> : split_kernel<false>, {dim3(in.rows), dim3(256)}, in, scratch, factors);
  return {scratch, factors, in.rows};
}

void matmul_f32(Context& ctx, const float* x, int32_t rows, const WeightView& w, const OutputView& to) {
  const dim3 grid(divide_up(w.rows, kTile), divide_up(rows, kTile));
  if (wkv_has_pieces(w.dtype)) return launch(ctx, matmul_f32_kernel<kPieces>, {grid, dim3(256)}, x, rows, w, to);
  by_type(w.dtype, [&](auto type) { launch(ctx, matmul_f32_kernel<type.value>, {grid, dim3(256)}, x, rows, w, to); });
}

}  // namespace wkv
