/** linear.cuh: what the files of wkv_linear and wkv_gated share: linear.cu (ops), matvec.cu (few rows), chain.cu (one row, in graphs),
 *  matmul.cu (more rows). */
#pragma once
#include <type_traits>

#include "common.cuh"

namespace wkv {

/** An input: rows [0, rows) of x with their norm (null: none). */
struct InputView {
  const float* x;
  int32_t rows, columns;
  const float* norm;
  float epsilon;
  bool half;  // may be rounded once to the type of 16-bit weights
};

/** activation(gate) * up, a wkv_activation; (1 + tanh(u)) / 2 = 1 / (1 + e^-2u). */
__device__ inline float activate(int32_t activation, float gate, float up) {
  const float s = activation == WKV_GELU_TANH ? gate * (1.5957691216f + 0.0713548162726f * gate * gate) : gate;
  return __fdividef(gate, 1.0f + __expf(-s)) * up;
}

/** Where results go: row t at out + t * stride. */
struct OutputView {
  float* out;
  int64_t stride;
  const float* bias;
  int32_t add;
  int32_t activation;  // of gated ones
  __device__ void put(int32_t t, int32_t j, float value) const {
    float* to = out + t * stride + j;
    if (bias) value += bias[j];
    *to = add ? *to + value : value;
  }
};

/** out = norm(in) . w^T, or activation(norm(in) . w^T) * (norm(in) . up^T) where up has data; weights must be of one dtype. One launch that
 *  reads in as it is. False, and nothing launched, when the shape needs matmul. */
bool matvec(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, bool int8, const OutputView& to);

/** The same for up to kSkinnyRows rows and f16 or bf16 weights, whose columns must be a multiple of 32. False, and nothing launched, for others. */
constexpr int32_t kSkinnyRows = 64;
bool matmul_skinny(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, const OutputView& to);

/** Rows of x in 8 bits. Of a block of 32, in words of 4 columns: 0, 4, 1, 5, 2, 6, 3, 7, as the tensor cores' lanes take them.
 *  of[block * stride + t]: the scale of row t's block, and scale times the sum of the rounded; stride is even. */
struct RoundedView {
  const int8_t* q;
  const float2* of;
  int32_t rows, stride;
};

/** Rows of x as sums of two f16 or bf16, [high, low][rows][C], low ones left out of a half input; true values are factors[t] times as
 *  large. */
struct SplitView {
  const uint8_t* parts;
  const float* factors;
  int32_t rows;
};

/** Bytes of scratch that norm_rows, round_rows and split_rows need. */
inline size_t prepared_bytes(const InputView& in) { return round_up(size_t(in.rows) * (in.columns + 1) * 4); }
RoundedView round_rows(Context& ctx, const InputView& in, uint8_t* scratch);
SplitView split_rows(Context& ctx, const InputView& in, bool bf16, uint8_t* scratch);
/** norm(x), or x itself where there is no norm. */
const float* norm_rows(Context& ctx, const InputView& in, uint8_t* scratch);

/** out = x . w^T, gated where up has data; weights must be of one dtype. */
void matmul_int8(Context& ctx, const RoundedView& x, const WeightView& w, const WeightView& up, const OutputView& to);
/** The same for f16 and bf16 weights; columns must be a multiple of 32. */
void matmul_half(Context& ctx, const SplitView& x, const WeightView& w, const WeightView& up, const OutputView& to);
/** out = x . w^T in f32. */
void matmul_f32(Context& ctx, const float* x, int32_t rows, const WeightView& w, const OutputView& to);

/** Calls body with the type of a weight that has no pieces as a constant. */
template <typename Body>
auto by_type(int32_t dtype, Body body) {
  switch (dtype) {
    case WKV_F32: return body(std::integral_constant<int, WKV_F32>());
    case WKV_F16: return body(std::integral_constant<int, WKV_F16>());
    case WKV_BF16: return body(std::integral_constant<int, WKV_BF16>());
    case WKV_Q8_0: return body(std::integral_constant<int, WKV_Q8_0>());
    case WKV_Q4_0: return body(std::integral_constant<int, WKV_Q4_0>());
    default: return body(std::integral_constant<int, WKV_Q4_1>());
  }
}

/** The same for the types of quants.h. */
template <typename Body>
auto by_pieces(int32_t dtype, Body body) {
  switch (dtype) {
    case WKV_Q5_0: return body(std::integral_constant<int, WKV_Q5_0>());
    case WKV_Q5_1: return body(std::integral_constant<int, WKV_Q5_1>());
    case WKV_Q2_K: return body(std::integral_constant<int, WKV_Q2_K>());
    case WKV_Q3_K: return body(std::integral_constant<int, WKV_Q3_K>());
    case WKV_Q4_K: return body(std::integral_constant<int, WKV_Q4_K>());
    case WKV_Q5_K: return body(std::integral_constant<int, WKV_Q5_K>());
    case WKV_Q6_K: return body(std::integral_constant<int, WKV_Q6_K>());
    default: return body(std::integral_constant<int, WKV_IQ4_NL>());
  }
}

/** IQ4_NL's values of the four numbers in the bytes of a word. */
__device__ inline uint32_t iq4_values(uint32_t q) {
  const uint32_t selector = (q & 0xf) | (q >> 4 & 0xf0) | (q >> 8 & 0xf00) | (q >> 12 & 0xf000);
  const uint32_t low = __byte_perm(0xbfad9881u, 0xf6eaddcfu, selector & 0x7777), high = __byte_perm(0x26190d01u, 0x71594535u, selector & 0x7777);
  const uint32_t upper = (q >> 3 & 0x01010101u) * 255u;  // numbers from 8 on
  return (low & ~upper) | (high & upper);
}

/** Four neighbours of a block of 32 numbers in 8 bits, as round_row of loops.cpp rounds them but for ties. 8 neighbouring lanes hold a block; all 32
 *  lanes take part. Gives the four as a word, and the block's scale and sum in every lane. */
__device__ inline int32_t round_four(float4 v, float* scale, float* sum) {
  const auto bits = [](float x) { return __float_as_uint(fabsf(x)); };
  uint32_t high = max(max(bits(v.x), bits(v.y)), max(bits(v.z), bits(v.w)));
#pragma unroll
  for (int o = 1; o < 8; o <<= 1) high = max(high, __shfl_xor_sync(0xffffffffu, high, o));
  const float most = __uint_as_float(high);
  const bool finite = most <= 3.402823466e38f;  // or else nothing that comes of it is
  float inverse;
  asm("rcp.approx.f32 %0, %1;" : "=f"(inverse) : "f"(most));
  inverse = finite && most > 0.0f ? 127.0f * inverse : 0.0f;
  const auto rounded = [&](float x) { return finite ? static_cast<int32_t>(rintf(x * inverse)) : 0; };
  const int32_t a = rounded(v.x), b = rounded(v.y), c = rounded(v.z), d = rounded(v.w);
  int32_t total = a + b + c + d;
#pragma unroll
  for (int o = 1; o < 8; o <<= 1) total += __shfl_xor_sync(0xffffffffu, total, o);
  *scale = finite ? most * (1.0f / 127.0f) : __uint_as_float(0x7fc00000u);
  *sum = *scale * static_cast<float>(total);
  return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24;
}

}  // namespace wkv
