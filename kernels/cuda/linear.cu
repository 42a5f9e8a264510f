/**
 * linear.cu: wkv_linear and wkv_gated, the projections of prefill and decode.
 *
 *   out[t, j] = norm(x[t]) . w[j] + bias[j] (+ out[t, j])            x [rows, C], w [J, C], out [rows, J of a wider tensor]
 *   out[t, j] = silu(norm(x[t]) . gate[j]) * (norm(x[t]) . up[j])
 *
 * Up to 8 rows (matvec): every block norms and rounds all rows of x into shared memory (x comes from the second-level cache), then each
 * of its 8 warps owns one row of w at a time for all rows of x. Bytes moved: w once.
 * More rows (matmul): x is normed and rounded once into scratch; a block owns a tile of 64 x 64 of out and walks along C in steps of 32.
 * Bytes moved: w once a 64 rows of x, x once a 64 rows of w.
 * With int8 precision x is rounded as loops.cpp's round_row does (per 32 columns: scale = max |x| / 127), products are integers (dp4a);
 * otherwise weights are widened in registers and products are f32.
 */
#include <algorithm>
#include <type_traits>

#include "common.cuh"

namespace wkv {
namespace {

/** An input: rows [0, rows) of x with their norm (null: none). */
struct InputView {
  const float* x;
  int32_t rows, columns;
  const float* norm;
  float epsilon;
};

/** Where results go: row t at out + t * stride. */
struct OutputView {
  float* out;
  int64_t stride;
  const float* bias;
  int32_t add;
  __device__ void put(int32_t t, int32_t j, float value) const {
    float* to = out + t * stride + j;
    if (bias) value += bias[j];
    *to = add ? *to + value : value;
  }
};

__device__ inline float silu_times(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

/** One block of 32 numbers, a lane each, in 8 bits: returns the rounded number, and the scale and sum in every lane. */
__device__ inline int32_t round_lane(float x, float* scale, float* sum) {
  const float most = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(fabsf(x))));
  if (!(most <= 3.402823466e38f)) {  // x is not finite: nor is what comes of it
    *scale = *sum = __uint_as_float(0x7fc00000u);
    return 0;
  }
  const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
  const int32_t q = static_cast<int32_t>(rintf(x * inverse));
  *scale = most / 127.0f;
  *sum = *scale * static_cast<float>(__reduce_add_sync(0xffffffffu, q));
  return q;
}

// ---- dot products of one block of 32 columns in 8 bits ----

/** The quants of one block as words; low and high nibbles of Q4 apart, in column order. */
template <int kType>
struct Block8 {
  int32_t words[8];
  float scale, least;
  __device__ Block8(const WeightView& w, int64_t block) {
    if (kType == WKV_Q8_0) {
      const int4* from = reinterpret_cast<const int4*>(w.data) + block * 2;
      const int4 a = __ldg(from), b = __ldg(from + 1);
      words[0] = a.x, words[1] = a.y, words[2] = a.z, words[3] = a.w, words[4] = b.x, words[5] = b.y, words[6] = b.z, words[7] = b.w;
    } else {
      const int4 a = __ldg(reinterpret_cast<const int4*>(w.data) + block);
      const int32_t packed[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
      for (int v = 0; v < 4; v++) words[v] = packed[v] & 0x0f0f0f0f, words[v + 4] = packed[v] >> 4 & 0x0f0f0f0f;
    }
    if (kType == WKV_Q4_1) {
      const float2 both = __half22float2(__ldg(reinterpret_cast<const __half2*>(w.scales) + block));
      scale = both.x, least = both.y;
    } else {
      scale = __half2float(__ldg(w.scales + block)), least = 0.0f;
    }
  }
  /** Adds the product with a block of x, whose words lie at `q`. */
  __device__ float product(const int32_t* q, float x_scale, float x_sum) const {
    const int4 a = *reinterpret_cast<const int4*>(q), b = *reinterpret_cast<const int4*>(q + 4);
    int32_t dot = __dp4a(words[0], a.x, 0);
    dot = __dp4a(words[1], a.y, dot), dot = __dp4a(words[2], a.z, dot), dot = __dp4a(words[3], a.w, dot);
    dot = __dp4a(words[4], b.x, dot), dot = __dp4a(words[5], b.y, dot), dot = __dp4a(words[6], b.z, dot), dot = __dp4a(words[7], b.w, dot);
    float value = static_cast<float>(dot) * (scale * x_scale);
    if (kType == WKV_Q4_1) value += least * x_sum;
    if (kType == WKV_Q4_0) value -= scale * (8.0f * x_sum);
    return value;
  }
};

/** total[t] += this lane's share of w[row] . x[t], x in 8 bits in shared memory. */
template <int kType, int kRows>
__device__ inline void dots_int8(const WeightView& w, int64_t row, const int32_t* q, const float* scales, const float* sums, float* total) {
  const int32_t blocks = w.columns / 32, lane = threadIdx.x & 31;
  for (int32_t b = lane; b < blocks; b += 32) {
    const Block8<kType> block(w, row * blocks + b);
#pragma unroll
    for (int t = 0; t < kRows; t++) total[t] += block.product(q + (t * blocks + b) * 8, scales[t * blocks + b], sums[t * blocks + b]);
  }
}

// ---- dot products in f32 ----

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

/** total[t] += this lane's share of w[row] . x[t], x [kRows, C] in shared memory. */
template <int kType, int kRows>
__device__ inline void dots_f32(const WeightView& w, int64_t row, const float* x, float* total) {
  const int32_t columns = w.columns, lane = threadIdx.x & 31;
  if (columns % 4 == 0) {
    for (int32_t c = lane * 4; c < columns; c += 128) {
      const float4 v = weights4<kType>(w, row, c);
#pragma unroll
      for (int t = 0; t < kRows; t++) {
        const float4 y = *reinterpret_cast<const float4*>(x + t * columns + c);
        total[t] = fmaf(v.x, y.x, fmaf(v.y, y.y, fmaf(v.z, y.z, fmaf(v.w, y.w, total[t]))));
      }
    }
    return;
  }
  for (int32_t c = lane; c < columns; c += 32) {
    const float v = weight_at(w, row, c);
#pragma unroll
    for (int t = 0; t < kRows; t++) total[t] = fmaf(v, x[t * columns + c], total[t]);
  }
}

// ---- up to 8 rows ----

template <int kRows, bool kInt8>
size_t matvec_shared(int32_t columns) {
  return kInt8 ? size_t(kRows) * (columns + columns / 32 * 8) : size_t(kRows) * columns * 4;
}

template <int kType, bool kInt8, int kRows, bool kGated>
__global__ void __launch_bounds__(256) matvec_kernel(InputView in, WeightView w, WeightView up, OutputView to) {
  extern __shared__ int4 shared4[];
  __shared__ double area[8][kRows];
  __shared__ float norms[kRows];
  const int32_t columns = in.columns, blocks = columns / 32, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int32_t first = blockIdx.y * kRows, rows = min(kRows, in.rows - first);
  const float* x = in.x + int64_t{first} * columns;
  if (in.norm) {
    double squares[kRows];
#pragma unroll
    for (int t = 0; t < kRows; t++) {
      squares[t] = 0.0;
      if (t < rows) {
        for (int32_t c = threadIdx.x; c < columns; c += 256) squares[t] += static_cast<double>(x[int64_t{t} * columns + c]) * x[int64_t{t} * columns + c];
      }
      squares[t] = warp_sum(squares[t]);
      if (lane == 0) area[warp][t] = squares[t];
    }
    __syncthreads();
    if (threadIdx.x < kRows) {
      double total = 0.0;
      for (int i = 0; i < 8; i++) total += area[i][threadIdx.x];
      norms[threadIdx.x] = 1.0f / sqrtf(static_cast<float>(total / columns) + in.epsilon);
    }
    __syncthreads();
  }
  const auto value = [&](int32_t t, int32_t c) {
    if (t >= rows) return 0.0f;
    const float v = x[int64_t{t} * columns + c];
    return in.norm ? v * norms[t] * in.norm[c] : v;
  };
  int8_t* q = reinterpret_cast<int8_t*>(shared4);
  float *scales = reinterpret_cast<float*>(q + kRows * columns), *sums = scales + kRows * blocks, *floats = reinterpret_cast<float*>(shared4);
  if (kInt8) {
    for (int32_t u = warp; u < kRows * blocks; u += 8) {
      float scale, sum;
      const int32_t rounded = round_lane(value(u / blocks, u % blocks * 32 + lane), &scale, &sum);
      q[u * 32 + lane] = static_cast<int8_t>(rounded);
      if (lane == 0) scales[u] = scale, sums[u] = sum;
    }
  } else {
    for (int32_t t = 0; t < kRows; t++) {
      for (int32_t c = threadIdx.x; c < columns; c += 256) floats[t * columns + c] = value(t, c);
    }
  }
  __syncthreads();
  for (int64_t j = int64_t{blockIdx.x} * 8 + warp; j < w.rows; j += int64_t{gridDim.x} * 8) {
    float total[kRows] = {}, ups[kRows] = {};
    if constexpr (kInt8) {
      dots_int8<kType, kRows>(w, j, reinterpret_cast<const int32_t*>(q), scales, sums, total);
      if (kGated) dots_int8<kType, kRows>(up, j, reinterpret_cast<const int32_t*>(q), scales, sums, ups);
    } else {
      dots_f32<kType, kRows>(w, j, floats, total);
      if (kGated) dots_f32<kType, kRows>(up, j, floats, ups);
    }
#pragma unroll
    for (int t = 0; t < kRows; t++) {
      float result = warp_sum(total[t]);
      if (kGated) result = silu_times(result, warp_sum(ups[t]));
      if (lane == t && t < rows) to.put(first + t, static_cast<int32_t>(j), result);
    }
  }
}

// ---- more rows ----

/** Norms x into floats (out) or into 8 bits (q, scales, sums); a block owns a row. */
__global__ void __launch_bounds__(256) prepare_kernel(InputView in, float* out, int8_t* q, float* scales, float* sums) {
  __shared__ double area[32];
  const int64_t t = blockIdx.x;
  const int32_t columns = in.columns, blocks = columns / 32;
  const float* x = in.x + t * columns;
  float scale = 1.0f;
  if (in.norm) {
    double squares = 0.0;
    for (int32_t c = threadIdx.x; c < columns; c += 256) squares += static_cast<double>(x[c]) * x[c];
    scale = 1.0f / sqrtf(static_cast<float>(block_sum(squares, area) / columns) + in.epsilon);
  }
  const auto value = [&](int32_t c) { return in.norm ? x[c] * scale * in.norm[c] : x[c]; };
  if (out) {
    for (int32_t c = threadIdx.x; c < columns; c += 256) out[t * columns + c] = value(c);
    return;
  }
  const int32_t lane = threadIdx.x & 31;
  for (int32_t b = threadIdx.x >> 5; b < blocks; b += 8) {
    float s, sum;
    q[t * columns + b * 32 + lane] = static_cast<int8_t>(round_lane(value(b * 32 + lane), &s, &sum));
    if (lane == 0) scales[t * blocks + b] = s, sums[t * blocks + b] = sum;
  }
}

constexpr int kTile = 64;

/** A thread owns outputs [4 ty, 4 ty + 4) x {tx, tx + 16, tx + 32, tx + 48} of the tile. */
template <int kType>
__global__ void __launch_bounds__(256) matmul_int8_kernel(const int8_t* q, const float* scales, const float* sums, int32_t rows, WeightView w, OutputView to) {
  __shared__ __align__(16) int32_t xs[kTile][12], ws[kTile][12];  // 8 words and padding that keeps 16-byte loads free of conflicts
  __shared__ float x_scale[kTile], x_sum[kTile], w_scale[kTile], w_least[kTile];
  const int32_t blocks = w.columns / 32, t0 = blockIdx.y * kTile, j0 = blockIdx.x * kTile, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float total[4][4] = {};
  for (int32_t b = 0; b < blocks; b++) {
    __syncthreads();
    const int32_t i = threadIdx.x % 64;
    if (threadIdx.x < 64) {
      if (j0 + i < w.rows) {
        const Block8<kType> block(w, int64_t{j0 + i} * blocks + b);
#pragma unroll
        for (int v = 0; v < 8; v++) ws[i][v] = block.words[v];
        w_scale[i] = block.scale, w_least[i] = block.least;
      } else {
#pragma unroll
        for (int v = 0; v < 8; v++) ws[i][v] = 0;
        w_scale[i] = 0.0f, w_least[i] = 0.0f;
      }
    } else if (threadIdx.x < 128) {
      const bool inside = t0 + i < rows;
      x_scale[i] = inside ? scales[int64_t{t0 + i} * blocks + b] : 0.0f;
      x_sum[i] = inside ? sums[int64_t{t0 + i} * blocks + b] : 0.0f;
    } else {
      const int32_t half = (threadIdx.x - 128) / 64;
      int4 v = make_int4(0, 0, 0, 0);
      if (t0 + i < rows) v = *reinterpret_cast<const int4*>(q + int64_t{t0 + i} * w.columns + b * 32 + half * 16);
      *reinterpret_cast<int4*>(&xs[i][half * 4]) = v;
    }
    __syncthreads();
    int32_t dot[4][4] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int4 a[4], c[4];
#pragma unroll
      for (int k = 0; k < 4; k++) a[k] = *reinterpret_cast<const int4*>(&xs[ty * 4 + k][half * 4]), c[k] = *reinterpret_cast<const int4*>(&ws[tx + 16 * k][half * 4]);
#pragma unroll
      for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int l = 0; l < 4; l++) dot[k][l] = __dp4a(a[k].x, c[l].x, __dp4a(a[k].y, c[l].y, __dp4a(a[k].z, c[l].z, __dp4a(a[k].w, c[l].w, dot[k][l]))));
      }
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float s = x_scale[ty * 4 + k], sum = x_sum[ty * 4 + k];
#pragma unroll
      for (int l = 0; l < 4; l++) {
        const float ws1 = w_scale[tx + 16 * l];
        total[k][l] += static_cast<float>(dot[k][l]) * (ws1 * s);
        if (kType == WKV_Q4_1) total[k][l] += w_least[tx + 16 * l] * sum;
        if (kType == WKV_Q4_0) total[k][l] -= ws1 * (8.0f * sum);
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

template <int kType>
__global__ void __launch_bounds__(256) matmul_f32_kernel(const float* x, int32_t rows, WeightView w, OutputView to) {
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

/** out[t, j] = silu(gate[t, j]) * up[t, j]; out may be gate. */
__global__ void __launch_bounds__(256) silu_kernel(float* gate, int64_t stride, const float* up, int32_t columns) {
  float* g = gate + blockIdx.y * stride;
  const float* u = up + int64_t{blockIdx.y} * columns;
  for (int32_t c = blockIdx.x * 256 + threadIdx.x; c < columns; c += gridDim.x * 256) g[c] = silu_times(g[c], u[c]);
}

/** x, when out is x too: blocks that write must not change what others read. */
__global__ void __launch_bounds__(256) copy_kernel(float* to, const float* from, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < count; i += int64_t{gridDim.x} * 256) to[i] = from[i];
}

// ---- launches ----

/** Calls body with the weight's type as a constant; `quantised_only` leaves the others out. */
template <typename Body>
void by_type(int32_t dtype, Body body) {
  switch (dtype) {
    case WKV_F32: return body(std::integral_constant<int, WKV_F32>());
    case WKV_F16: return body(std::integral_constant<int, WKV_F16>());
    case WKV_BF16: return body(std::integral_constant<int, WKV_BF16>());
    case WKV_Q8_0: return body(std::integral_constant<int, WKV_Q8_0>());
    case WKV_Q4_0: return body(std::integral_constant<int, WKV_Q4_0>());
    default: return body(std::integral_constant<int, WKV_Q4_1>());
  }
}

template <int kType, bool kInt8, int kRows, bool kGated>
bool launch_matvec(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, const OutputView& to) {
  const size_t shared = matvec_shared<kRows, kInt8>(in.columns);
  if (shared + 2048 > size_t(ctx.shared_limit)) return false;
  const auto kernel = matvec_kernel<kType, kInt8, kRows, kGated>;
  allow_shared(kernel, shared);
  const int32_t blocks = std::min(divide_up(w.rows, 8), ctx.processors * 4);
  kernel<<<dim3(blocks, divide_up(in.rows, kRows)), 256, shared, ctx.stream>>>(in, w, up, to);
  return true;
}

/** False when not even one row of x fits shared memory. */
template <int kType, bool kInt8, bool kGated>
bool matvec(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, const OutputView& to) {
  if (in.rows > 4 && launch_matvec<kType, kInt8, 8, kGated>(ctx, in, w, up, to)) return true;
  if (in.rows > 2 && launch_matvec<kType, kInt8, 4, kGated>(ctx, in, w, up, to)) return true;
  if (in.rows > 1 && launch_matvec<kType, kInt8, 2, kGated>(ctx, in, w, up, to)) return true;
  return launch_matvec<kType, kInt8, 1, kGated>(ctx, in, w, up, to);
}

/** x as matmul wants it. */
struct Prepared {
  const float* x;
  int8_t* q;
  float *scales, *sums;
};

size_t prepared_bytes(const InputView& in) { return round_up(size_t(in.rows) * in.columns * 4); }

Prepared prepare(Context& ctx, const InputView& in, bool int8, uint8_t* scratch) {
  const size_t count = size_t(in.rows) * in.columns;
  Prepared p{in.x, nullptr, nullptr, nullptr};
  if (int8) {
    p.q = reinterpret_cast<int8_t*>(scratch);
    p.scales = reinterpret_cast<float*>(scratch + count);
    p.sums = p.scales + count / 32;
  } else if (in.norm) {
    p.x = reinterpret_cast<float*>(scratch);
  } else {
    return p;
  }
  prepare_kernel<<<in.rows, 256, 0, ctx.stream>>>(in, int8 ? nullptr : const_cast<float*>(p.x), p.q, p.scales, p.sums);
  return p;
}

void matmul(Context& ctx, const Prepared& p, int32_t rows, bool int8, const WeightView& w, const OutputView& to) {
  const dim3 grid(divide_up(w.rows, kTile), divide_up(rows, kTile));
  by_type(w.dtype, [&](auto type) {
    if constexpr (is_quantised(type.value)) {
      if (int8) {
        matmul_int8_kernel<type.value><<<grid, 256, 0, ctx.stream>>>(p.q, p.scales, p.sums, rows, w, to);
        return;
      }
    }
    matmul_f32_kernel<type.value><<<grid, 256, 0, ctx.stream>>>(p.x, rows, w, to);
  });
}

constexpr int32_t kMatvecRows = 8;

/** out = in . w^T, or gated with `up` (data null: not). */
void project(Context& ctx, InputView in, const WeightView& w, const WeightView& up, bool int8, const OutputView& to, bool aliased) {
  const bool gated = up.data != nullptr;
  const size_t own = prepared_bytes(in);
  uint8_t* scratch = ctx.reserve(own * 2 + size_t(in.rows) * w.rows * 4);
  if (in.rows <= kMatvecRows && (!gated || w.dtype == up.dtype)) {
    if (aliased) {
      float* copied = reinterpret_cast<float*>(scratch + own);
      copy_kernel<<<std::min(1024, divide_up(int64_t{in.rows} * in.columns, 256)), 256, 0, ctx.stream>>>(copied, in.x, int64_t{in.rows} * in.columns);
      in.x = copied;
    }
    bool done = false;
    by_type(w.dtype, [&](auto type) {
      if constexpr (is_quantised(type.value)) {
        if (int8) {
          done = gated ? matvec<type.value, true, true>(ctx, in, w, up, to) : matvec<type.value, true, false>(ctx, in, w, up, to);
          return;
        }
      }
      done = gated ? matvec<type.value, false, true>(ctx, in, w, up, to) : matvec<type.value, false, false>(ctx, in, w, up, to);
    });
    if (done) return;
  }
  const Prepared p = prepare(ctx, in, int8, scratch);
  matmul(ctx, p, in.rows, int8, w, to);
  if (!gated) return;
  float* ups = reinterpret_cast<float*>(scratch + own * 2);
  matmul(ctx, p, in.rows, int8, up, OutputView{ups, w.rows, nullptr, 0});
  silu_kernel<<<dim3(divide_up(w.rows, 256), in.rows), 256, 0, ctx.stream>>>(to.out, to.stride, ups, w.rows);
}

TensorRef find_weight(int32_t context, int32_t handle, const char* what) {
  const TensorRef w = find_tensor(context, handle, what);
  require(w->dtype != WKV_I32, std::string(what) + " is of dtype I32");
  return w;
}

/** Checks and holds an op's input, as linear.cpp does. */
InputView find_input(Context& ctx, int32_t context, int32_t x, int32_t x_row, int32_t rows, int32_t norm, float epsilon, int32_t columns, int32_t precision, TensorRef* found) {
  require(rows >= 1 && x_row >= 0, "rows must be at least 1 and x_row at least 0: " + std::to_string(rows) + ", " + std::to_string(x_row));
  require(x_row <= INT32_MAX - rows, "x_row is too large");
  require(precision == WKV_PRECISION_F32 || precision == WKV_PRECISION_INT8, "precision " + std::to_string(precision) + " is unknown");
  *found = find_tensor(context, x, "x", WKV_F32, x_row + rows, columns);
  TensorRef weight;
  if (norm) weight = find_tensor(context, norm, "norm", WKV_F32, 1, columns);
  ctx.hold(*found, weight);
  return {(*found)->row(x_row), rows, columns, weight ? weight->f32() : nullptr, epsilon};
}

}  // namespace
}  // namespace wkv

using namespace wkv;

int32_t wkv_linear(int32_t context, int32_t out, int32_t out_column, int32_t x, int32_t x_row, int32_t rows, int32_t norm, float epsilon, int32_t w, int32_t bias, int32_t add, int32_t precision) {
  return entry(context, [&](Context& ctx) {
    const TensorRef weight = find_weight(context, w, "w");
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, -1);
    require(out_column >= 0 && out_column <= to->columns - weight->rows, "out has " + std::to_string(to->columns) + " columns, expected " + std::to_string(weight->rows) + " from column " + std::to_string(out_column));
    require(add == 0 || add == 1, "add must be 0 or 1: " + std::to_string(add));
    TensorRef plus, from;
    if (bias) plus = find_tensor(context, bias, "bias", WKV_F32, 1, weight->rows);
    const InputView in = find_input(ctx, context, x, x_row, rows, norm, epsilon, weight->columns, precision, &from);
    const bool int8 = is_quantised(weight->dtype) && precision == WKV_PRECISION_INT8;
    require(to != from || norm || int8, "out must not be x unless x is normed or rounded first");
    ctx.hold(weight, to, plus);
    project(ctx, in, weight->view(), WeightView{}, int8, {to->f32() + out_column, to->columns, plus ? plus->f32() : nullptr, add}, to == from);
    ctx.submitted();
  });
}

int32_t wkv_gated(int32_t context, int32_t out, int32_t x, int32_t rows, int32_t norm, float epsilon, int32_t gate, int32_t up, int32_t activation, int32_t precision) {
  return entry(context, [&](Context& ctx) {
    const TensorRef w_gate = find_weight(context, gate, "gate"), w_up = find_weight(context, up, "up");
    require(w_gate->rows == w_up->rows && w_gate->columns == w_up->columns, "gate and up are of different shapes");
    require(activation == WKV_SILU, "activation " + std::to_string(activation) + " is unknown");
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, w_gate->rows);
    TensorRef from;
    const InputView in = find_input(ctx, context, x, 0, rows, norm, epsilon, w_gate->columns, precision, &from);
    const bool int8 = is_quantised(w_gate->dtype) && is_quantised(w_up->dtype) && precision == WKV_PRECISION_INT8;
    require(to != from, "out must not be x");
    ctx.hold(w_gate, w_up, to);
    project(ctx, in, w_gate->view(), w_up->view(), int8, {to->f32(), to->columns, nullptr, 0}, false);
    ctx.submitted();
  });
}
