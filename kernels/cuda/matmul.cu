/**
 * matmul.cu: out[t, j] = x[t] . w[j] for many rows of x.
 *
 * x is normed and rounded once into scratch (prepare); a block owns a tile of 64 x 64 of out and walks along C in steps of 32.
 * Bytes moved: w once a 64 rows of x, x once a 64 rows of w.
 */
#include "linear.cuh"

namespace wkv {
namespace {

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

/** Norms x into floats (out) or into 8 bits (q, scales, sums); a block owns a row. */
__global__ void __launch_bounds__(256) prepare_kernel(InputView in, float* out, int8_t* q, float* scales, float* sums) {
  wait_for_previous();
  let_next_start();
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
  wait_for_previous();
  let_next_start();
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
  launch(ctx, prepare_kernel, {dim3(in.rows), dim3(256)}, in, int8 ? nullptr : const_cast<float*>(p.x), p.q, p.scales, p.sums);
  return p;
}

void matmul(Context& ctx, const Prepared& p, int32_t rows, bool int8, const WeightView& w, const OutputView& to) {
  const dim3 grid(divide_up(w.rows, kTile), divide_up(rows, kTile));
  by_type(w.dtype, [&](auto type) {
    if constexpr (is_quantised(type.value)) {
      if (int8) {
        launch(ctx, matmul_int8_kernel<type.value>, {grid, dim3(256)}, p.q, p.scales, p.sums, rows, w, to);
        return;
      }
    }
    launch(ctx, matmul_f32_kernel<type.value>, {grid, dim3(256)}, p.x, rows, w, to);
  });
}

}  // namespace wkv
