/** chunk.cuh: a few columns of a weight's row in a lane's registers, and their products with x; used by matvec.cu and the chains. */
#pragma once
#include "linear.cuh"

namespace wkv {

/** Where a chunk is read: in global memory, once, or in shared memory. */
enum class From { Global, Shared };

template <From kFrom>
__device__ inline int4 load16(const void* from) {
  if constexpr (kFrom == From::Shared) return *static_cast<const int4*>(from);
  int4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}
template <From kFrom>
__device__ inline int2 load8(const void* from) {
  if constexpr (kFrom == From::Shared) return *static_cast<const int2*>(from);
  int2 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.s32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}
template <From kFrom>
__device__ inline uint32_t load4(const void* from) {
  if constexpr (kFrom == From::Shared) return *static_cast<const uint32_t*>(from);
  uint32_t v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}
template <From kFrom>
__device__ inline uint32_t load2(const void* from) {
  if constexpr (kFrom == From::Shared) return *static_cast<const uint16_t*>(from);
  uint16_t v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(from));
  return v;
}

__device__ inline float low_half(uint32_t v) { return __half2float(__ushort_as_half(static_cast<uint16_t>(v))); }
__device__ inline float high_half(uint32_t v) { return __half2float(__ushort_as_half(static_cast<uint16_t>(v >> 16))); }

__host__ __device__ constexpr int chunk_columns(int dtype) { return dtype == WKV_F32 ? 4 : dtype == WKV_Q8_0 ? 16 : dtype > WKV_Q8_0 ? 32 : 8; }

/** 16 bytes of a weight's row; chunk i of the whole tensor. */
template <int kType>
struct Chunk {
  static constexpr int kColumns = chunk_columns(kType), kFours = kColumns / 4;
  int4 data;
  uint32_t scales;  // one f16, or scale and minimum

  template <From kFrom = From::Global>
  __device__ void load(const WeightView& w, uint32_t i) {
    data = load16<kFrom>(w.data + size_t{i} * 16);
    if (kType == WKV_Q8_0) scales = load2<kFrom>(w.scales + i / 2);
    if (kType == WKV_Q4_0) scales = load2<kFrom>(w.scales + i);
    if (kType == WKV_Q4_1) scales = load4<kFrom>(w.scales + size_t{i} * 2);
  }
  __device__ uint32_t word(int i) const { return static_cast<uint32_t>(i == 0 ? data.x : i == 1 ? data.y : i == 2 ? data.z : data.w); }

  /** Columns 4 p to 4 p + 3. */
  __device__ float4 four(int p) const {
    if (kType == WKV_F32) return make_float4(__int_as_float(data.x), __int_as_float(data.y), __int_as_float(data.z), __int_as_float(data.w));
    if (kType == WKV_F16) {
      const uint32_t a = word(2 * p), b = word(2 * p + 1);
      return make_float4(low_half(a), high_half(a), low_half(b), high_half(b));
    }
    if (kType == WKV_BF16) {
      const uint32_t a = word(2 * p), b = word(2 * p + 1);
      return make_float4(__uint_as_float(a << 16), __uint_as_float(a & 0xffff0000u), __uint_as_float(b << 16), __uint_as_float(b & 0xffff0000u));
    }
    const float s = low_half(scales), m = kType == WKV_Q4_1 ? high_half(scales) : 0.0f;
    if (kType == WKV_Q8_0) {
      const int32_t a = static_cast<int32_t>(word(p));
      return make_float4((a << 24 >> 24) * s, (a << 16 >> 24) * s, (a << 8 >> 24) * s, (a >> 24) * s);
    }
    const int32_t a = static_cast<int32_t>(word(p % 4) >> (p / 4 * 4)), middle = kType == WKV_Q4_0 ? 8 : 0;
    const auto wide = [&](int shift) { return fmaf(static_cast<float>((a >> shift & 15) - middle), s, m); };
    return make_float4(wide(0), wide(8), wide(16), wide(24));
  }

  /** The product with the same columns of x in 8 bits: `low` as the words of data, Q4's high halves in `high`; of: scale and sum. */
  __device__ float product(int4 low, int4 high, float2 of) const {
    constexpr uint32_t kMask = kType == WKV_Q8_0 ? 0xffffffffu : 0x0f0f0f0fu;
    int32_t dot = __dp4a(static_cast<int32_t>(data.x & kMask), low.x, 0);
    dot = __dp4a(static_cast<int32_t>(data.y & kMask), low.y, dot);
    dot = __dp4a(static_cast<int32_t>(data.z & kMask), low.z, dot);
    dot = __dp4a(static_cast<int32_t>(data.w & kMask), low.w, dot);
    if (kType != WKV_Q8_0) {
      dot = __dp4a(static_cast<int32_t>(data.x >> 4 & kMask), high.x, dot);
      dot = __dp4a(static_cast<int32_t>(data.y >> 4 & kMask), high.y, dot);
      dot = __dp4a(static_cast<int32_t>(data.z >> 4 & kMask), high.z, dot);
      dot = __dp4a(static_cast<int32_t>(data.w >> 4 & kMask), high.w, dot);
    }
    const float scale = low_half(scales);
    float value = static_cast<float>(dot) * (scale * of.x);
    if (kType == WKV_Q4_1) value = fmaf(high_half(scales), of.y, value);
    if (kType == WKV_Q4_0) value = fmaf(scale, -8.0f * of.y, value);
    return value;
  }
};

/** 32 columns of a type of quants.h; chunk i of the whole tensor. */
template <int kType>
struct PieceChunk {
  static constexpr wkv_form kForm = wkv_form_of(kType);
  static constexpr int kColumns = 32, kFours = 8;
  int4 data;         // with 2 low bits, its first half
  int2 high;
  uint32_t scales, subs;

  template <From kFrom = From::Global>
  __device__ void load(const WeightView& w, uint32_t i) {
    if (kForm.low == 4) {
      data = load16<kFrom>(w.data + size_t{i} * 16);
    } else {
      const int2 both = load8<kFrom>(w.data + size_t{i} * 8);
      data.x = both.x, data.y = both.y;
    }
    if (kForm.high == 1) high.x = static_cast<int32_t>(load4<kFrom>(w.high + size_t{i} * 4));
    if (kForm.high == 2) high = load8<kFrom>(w.high + size_t{i} * 8);
    if (kForm.subs) subs = load2<kFrom>(w.subs + i), scales = load4<kFrom>(w.scales + size_t{i / 8} * 2);
    else scales = kForm.least ? load4<kFrom>(w.scales + size_t{i} * 2) : load2<kFrom>(w.scales + i);
  }

  /** Columns 16 half + 4 v to + 3 as int8. */
  __device__ int32_t word(int half, int v) const {
    const auto pick = [&](int i) { return static_cast<uint32_t>(i == 0 ? data.x : i == 1 ? data.y : i == 2 ? data.z : data.w); };
    uint32_t q = kForm.low == 4 ? pick(v) >> (half * 4) & 0x0f0f0f0fu : pick(half) >> (v * 2) & 0x03030303u;
    if (kForm.high == 1) q |= (static_cast<uint32_t>(high.x) >> (half * 4 + v) & 0x01010101u) << kForm.low;
    if (kForm.high == 2) q |= (static_cast<uint32_t>(half ? high.y : high.x) >> (v * 2) & 0x03030303u) << kForm.low;
    if (kType == WKV_IQ4_NL) return static_cast<int32_t>(iq4_values(q));
    return static_cast<int32_t>(kForm.middle ? __vsub4(q, kForm.middle * 0x01010101u) : q);
  }

  /** The product with the same columns of x in 8 bits, columns 0 to 15 in `low`; of: scale and sum. */
  __device__ float product(int4 low, int4 high_x, float2 of) const {
    const auto dot = [&](int half, int4 x) {
      return __dp4a(word(half, 3), x.w, __dp4a(word(half, 2), x.z, __dp4a(word(half, 1), x.y, __dp4a(word(half, 0), x.x, 0))));
    };
    const float first = static_cast<float>(dot(0, low)), second = static_cast<float>(dot(1, high_x)), d = low_half(scales), least = high_half(scales);
    const int32_t sub0 = static_cast<int32_t>(subs & 255), sub1 = static_cast<int32_t>(subs >> 8);
    if (!kForm.subs) {
      const float value = (first + second) * (d * of.x);
      return kForm.least ? fmaf(least, of.y, value) : value;
    }
    if (kType == WKV_Q2_K) {
      constexpr int32_t kOnes = 0x01010101;
      const float sum = static_cast<float>(__dp4a(kOnes, low.w, __dp4a(kOnes, low.z, __dp4a(kOnes, low.y, __dp4a(kOnes, low.x, 0))))) * of.x;
      const float value = (first * static_cast<float>(sub0 & 15) + second * static_cast<float>(sub1 & 15)) * (d * of.x);
      return value - least * (static_cast<float>(sub0 >> 4) * sum + static_cast<float>(sub1 >> 4) * (of.y - sum));
    }
    if (kForm.least) return (first + second) * (d * static_cast<float>(sub0) * of.x) - least * static_cast<float>(sub1) * of.y;
    return (first * static_cast<float>(static_cast<int8_t>(sub0)) + second * static_cast<float>(static_cast<int8_t>(sub1))) * (d * of.x);
  }
};

/** Rounds four columns of x, number i of its fours, to 8 bits and leaves them as product() takes them: Q8_0 in order, others the low halves of
 *  all blocks of 32, then the high halves; behind them scale and sum of every block. All lanes take part, of neighbouring fours. */
template <int kType>
__device__ inline void keep_rounded(float4 v, int32_t i, int32_t columns, int4* to) {
  float2 of;
  const int32_t word = round_four(v, &of.x, &of.y);
  if (i >= columns / 4) return;
  reinterpret_cast<int32_t*>(to)[kType == WKV_Q8_0 ? i : (i / 4 % 2 * (columns / 32) + i / 8) * 4 + i % 4] = word;
  if (i % 8 == 0) reinterpret_cast<float2*>(to + columns / 16)[i / 8] = of;
}

template <int kType>
using ChunkOf = std::conditional_t<wkv_has_pieces(kType), PieceChunk<kType>, Chunk<kType>>;

/** Rows of x in shared memory, so laid out that neighbouring lanes read neighbouring 16 bytes.
 *  Floats: the p-th four columns of every chunk lie together. 8 bits: as keep_rounded leaves them. */
template <int kType, bool kInt8>
struct Staged {
  static constexpr int kFours = ChunkOf<kType>::kFours;
  /** In units of 16 bytes: from one four to the next, of a row; the former keeps writes free of conflicts. */
  static __host__ __device__ int32_t plane(int32_t columns) { return kFours == 1 ? 0 : (columns / chunk_columns(kType) + 7) / 8 * 8 + 8 / kFours; }
  static __host__ __device__ int32_t row(int32_t columns) {
    if (kInt8) return columns / 16 + columns / 64 + (columns / 32 % 2);
    return kFours == 1 ? columns / 4 : plane(columns) * kFours;
  }
};

}  // namespace wkv
