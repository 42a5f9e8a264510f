/** loops.cpp: the loops of loops.hpp in 8-wide vectors; compiled once for each instruction set, with WKV_ISA as its name. */
#include "loops.hpp"

#include <cmath>
#include <cstring>

#include "../policy.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef WKV_ISA
#define WKV_ISA portable
#endif
#define WKV_TEXT2(x) #x
#define WKV_TEXT(x) WKV_TEXT2(x)

namespace wkv {
namespace WKV_ISA {
namespace {

typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));

inline f8 load(const float* p) {
  f8 v;
  std::memcpy(&v, p, 32);
  return v;
}
inline void store(float* p, f8 v) { std::memcpy(p, &v, 32); }
inline f8 spread(float x) { return f8{x, x, x, x, x, x, x, x}; }
inline float sum(f8 v) {
#if defined(__AVX2__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}

inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t rest = h & 0x7fff;
  float value;
  uint32_t bits;
  if (rest >= 0x7c00) bits = 0x7f800000 | (rest & 0x3ff) << 13;
  else if (rest >= 0x400) bits = (rest << 13) + (112u << 23);
  else {
    value = static_cast<float>(rest) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

inline uint16_t float_to_half(float value) {
#if defined(__F16C__)
  return _cvtss_sh(value, 0);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;
  if (bits < 0x38800000) {
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    // Adding 0.5 rounds the last bit of a subnormal half to even.
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000);
  }
  bits += 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((bits - (112u << 23)) >> 13);
#endif
}

inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline f8 load_halves(const uint8_t* p) {
#if defined(__F16C__)
  return (f8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  uint16_t h[8];
  std::memcpy(h, p, 16);
  f8 v;
  for (int i = 0; i < 8; i++) v[i] = half_to_float(h[i]);
  return v;
#endif
}

inline f8 load_bf16(const uint8_t* p) {
  uint16_t h[8];
  std::memcpy(h, p, 16);
  i8 bits;
  for (int i = 0; i < 8; i++) bits[i] = static_cast<int32_t>(static_cast<uint32_t>(h[i]) << 16);
  return (f8)bits;
}

template <int32_t kType>
inline f8 load8(const uint8_t* p) {
  if (kType == WKV_F32) return load(reinterpret_cast<const float*>(p));
  return kType == WKV_F16 ? load_halves(p) : load_bf16(p);
}

template <int32_t kType>
inline float load1(const uint8_t* row, int32_t i) {
  if (kType == WKV_F32) {
    float value;
    std::memcpy(&value, row + 4 * i, 4);
    return value;
  }
  uint16_t h;
  std::memcpy(&h, row + 2 * i, 2);
  return kType == WKV_F16 ? half_to_float(h) : bf16_to_float(h);
}

template <int32_t kType>
inline void store1(uint8_t* row, int32_t i, float value) {
  if (kType == WKV_F32) {
    std::memcpy(row + 4 * i, &value, 4);
    return;
  }
  const uint16_t h = kType == WKV_F16 ? float_to_half(value) : float_to_bf16(value);
  std::memcpy(row + 2 * i, &h, 2);
}

constexpr int32_t size_of(int32_t dtype) { return dtype == WKV_F32 ? 4 : 2; }

/** Calls body with the cache type as a constant. */
#define WKV_BY_TYPE(dtype, body)          \
  switch (dtype) {                        \
    case WKV_F32: body(WKV_F32); break;   \
    case WKV_F16: body(WKV_F16); break;   \
    default: body(WKV_BF16); break;       \
  }

/** exp to about 1e-7 relative (range reduction by ln 2 in two parts, a polynomial of degree 6); 0 below -87. */
inline f8 exponential(f8 x) {
  const f8 low = spread(-87.0f), high = spread(88.0f);
  const i8 under = x < low;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const f8 magic = spread(12582912.0f);
  const f8 shifted = x * spread(1.44269504f) + magic;
  const f8 n = shifted - magic;
  const f8 r = x - n * spread(0.693359375f) - n * spread(-2.12194440e-4f);
  f8 p = spread(1.9875691500e-4f);
  p = p * r + spread(1.3981999507e-3f);
  p = p * r + spread(8.3334519073e-3f);
  p = p * r + spread(4.1665795894e-2f);
  p = p * r + spread(1.6666665459e-1f);
  p = p * r + spread(5.0000001201e-1f);
  p = p * r * r + r + spread(1.0f);
  const i8 power = ((i8)shifted + 127) << 23;
  const f8 value = p * (f8)power;
  return (f8)((i8)value & ~under);
}

// ---- weights ----

constexpr int32_t block_bytes(int32_t dtype) { return dtype == WKV_Q8_0 ? 272 : dtype == WKV_Q4_0 ? 144 : 160; }

typedef uint8_t b32 __attribute__((vector_size(32)));
typedef uint8_t b8 __attribute__((vector_size(8)));
typedef int8_t s8 __attribute__((vector_size(8)));

inline b32 load_bytes(const uint8_t* p) {
  b32 v;
  std::memcpy(&v, p, 32);
  return v;
}
/** 8 bytes as floats, signed or not. */
inline f8 widen(const uint8_t* p) {
  b8 v;
  std::memcpy(&v, p, 8);
  return __builtin_convertvector(v, f8);
}
inline f8 widen_signed(const uint8_t* p) {
  s8 v;
  std::memcpy(&v, p, 8);
  return __builtin_convertvector(v, f8);
}

/** The numbers of a piece as int8, q - middle or what IQ4_NL's stand for: vector v has columns 4 v .. 4 v + 3, row by row. */
template <int32_t kType>
inline void unpack(const uint8_t* from, b32 (&w)[8]) {
  constexpr wkv_form form = wkv_form_of(kType);
  if (form.low == 4) {
    for (int32_t v = 0; v < 4; v++) {
      const b32 both = load_bytes(from + v * 32);
      w[v] = both & 15, w[4 + v] = both >> 4;
    }
  } else {
    const b32 first = load_bytes(from), second = load_bytes(from + 32);
    for (int32_t v = 0; v < 4; v++) w[v] = first >> (2 * v) & 3, w[4 + v] = second >> (2 * v) & 3;
  }
  const uint8_t* high = from + (form.low == 4 ? 128 : 64);
  if (form.high == 1) {
    const b32 bits = load_bytes(high);
    for (int32_t v = 0; v < 4; v++) w[v] |= (bits >> v & 1) << form.low, w[4 + v] |= (bits >> (4 + v) & 1) << form.low;
  }
  if (form.high == 2) {
    const b32 first = load_bytes(high), second = load_bytes(high + 32);
    for (int32_t v = 0; v < 4; v++) w[v] |= (first >> (2 * v) & 3) << form.low, w[4 + v] |= (second >> (2 * v) & 3) << form.low;
  }
  if (kType == WKV_IQ4_NL) {
#if defined(__AVX2__)
    __m128i values;
    std::memcpy(&values, WKV_IQ4_VALUES, 16);
    const __m256i table = _mm256_broadcastsi128_si256(values);
    for (int32_t v = 0; v < 8; v++) w[v] = (b32)_mm256_shuffle_epi8(table, (__m256i)w[v]);
#else
    for (int32_t v = 0; v < 8; v++) {
      for (int32_t i = 0; i < 32; i++) w[v][i] = static_cast<uint8_t>(WKV_IQ4_VALUES[w[v][i]]);
    }
#endif
  } else if (form.middle) {
    for (int32_t v = 0; v < 8; v++) w[v] -= static_cast<uint8_t>(form.middle);
  }
}

/** A piece's scales and minima for 8 rows: of its first and its second 16 columns. A number is scale * int8 + least. */
struct PieceScales {
  f8 scale[2], least[2];
};

template <int32_t kType>
inline PieceScales piece_scales(const uint8_t* group, int32_t piece) {
  constexpr wkv_form form = wkv_form_of(kType);
  const uint8_t* at = group + piece_at(kType, piece);
  const f8 none = spread(0.0f);
  if (!form.subs) {
    const f8 d = load_halves(at), least = form.least ? load_halves(at + 16) : none;
    return {{d, d}, {least, least}};
  }
  const uint8_t* of = group + super_at(kType, piece);
  const f8 d = load_halves(of);
  if (kType == WKV_Q2_K) {
    const f8 m = load_halves(of + 16), first = widen(at), second = widen(at + 8);
    uint8_t mins[16];
    for (int32_t i = 0; i < 16; i++) mins[i] = at[i] >> 4;
    const f8 m0 = widen(mins), m1 = widen(mins + 8), sixteen = spread(16.0f);
    return {{d * (first - m0 * sixteen), d * (second - m1 * sixteen)}, {-m * m0, -m * m1}};
  }
  if (form.least) {
    const f8 scale = d * widen(at), least = -load_halves(of + 16) * widen(at + 8);
    return {{scale, scale}, {least, least}};
  }
  return {{d * widen_signed(at), d * widen_signed(at + 8)}, {none, none}};
}

template <int32_t kType>
inline void dequantise_piece(const uint8_t* group, int32_t piece, f8* out) {
  const PieceScales of = piece_scales<kType>(group, piece);
  b32 w[8];
  unpack<kType>(group + piece_at(kType, piece) + piece_head(kType), w);
  for (int32_t v = 0; v < 8; v++) {
    const i8 packed = (i8)w[v];
    for (int32_t c = 0; c < 4; c++) out[4 * v + c] = __builtin_convertvector(packed << (24 - 8 * c) >> 24, f8) * of.scale[v / 4] + of.least[v / 4];
  }
}

/** Calls body with a type of quants.h as a constant. */
#define WKV_BY_PIECES(dtype, body)            \
  switch (dtype) {                            \
    case WKV_Q5_0: body(WKV_Q5_0); break;     \
    case WKV_Q5_1: body(WKV_Q5_1); break;     \
    case WKV_Q2_K: body(WKV_Q2_K); break;     \
    case WKV_Q3_K: body(WKV_Q3_K); break;     \
    case WKV_Q4_K: body(WKV_Q4_K); break;     \
    case WKV_Q5_K: body(WKV_Q5_K); break;     \
    case WKV_Q6_K: body(WKV_Q6_K); break;     \
    default: body(WKV_IQ4_NL); break;         \
  }

/** Columns [0, n) of a group as floats, n <= 32: out[c] holds column `column + c` of the 8 rows. */
inline void dequantise(int32_t dtype, const uint8_t* weight, int32_t columns, int32_t rows, int64_t group, int32_t column, int32_t n, f8* out) {
  switch (dtype) {
    case WKV_F32: {
      const float* w = reinterpret_cast<const float*>(weight) + group * 8 * columns + column;
      const int32_t have = rows - group * 8 < 8 ? static_cast<int32_t>(rows - group * 8) : 8;
      for (int32_t c = 0; c < n; c++) out[c] = spread(0.0f);
      for (int32_t r = 0; r < have; r++) {
        for (int32_t c = 0; c < n; c++) out[c][r] = w[static_cast<int64_t>(r) * columns + c];
      }
      return;
    }
    case WKV_F16:
    case WKV_BF16: {
      const uint8_t* w = weight + (group * columns + column) * 16;
      for (int32_t c = 0; c < n; c++) out[c] = dtype == WKV_F16 ? load_halves(w + c * 16) : load_bf16(w + c * 16);
      return;
    }
    default: break;
  }
  if (wkv_has_pieces(dtype)) {
    const uint8_t* at = weight + group * piece_at(dtype, columns / 32);
#define WKV_BODY(type) dequantise_piece<type>(at, column / 32, out)
    WKV_BY_PIECES(dtype, WKV_BODY)
#undef WKV_BODY
    return;
  }
  const uint8_t* block = weight + (group * (columns / 32) + column / 32) * block_bytes(dtype);
  const f8 scale = load_halves(block);
  const f8 least = dtype == WKV_Q4_1 ? load_halves(block + 16) : spread(0.0f);
  const uint8_t* q = block + (dtype == WKV_Q4_1 ? 32 : 16);
  if (dtype == WKV_Q8_0) {
    for (int32_t v = 0; v < 8; v++) {
      i8 packed;
      std::memcpy(&packed, q + v * 32, 32);
      for (int32_t c = 0; c < 4; c++) out[4 * v + c] = __builtin_convertvector(packed << (24 - 8 * c) >> 24, f8) * scale;
    }
    return;
  }
  const int32_t middle = dtype == WKV_Q4_0 ? 8 : 0;
  for (int32_t v = 0; v < 4; v++) {
    i8 packed;
    std::memcpy(&packed, q + v * 32, 32);
    for (int32_t c = 0; c < 4; c++) {
      const i8 byte = packed >> (8 * c);
      out[4 * v + c] = __builtin_convertvector((byte & 15) - middle, f8) * scale + least;
      out[16 + 4 * v + c] = __builtin_convertvector((byte >> 4 & 15) - middle, f8) * scale + least;
    }
  }
}

void weight_row(int32_t dtype, const uint8_t* weight, int32_t columns, int64_t row, float* out) {
  f8 block[32];
  for (int32_t c = 0; c < columns; c += 32) {
    const int32_t n = columns - c < 32 ? columns - c : 32;
    dequantise(dtype, weight, columns, 0, row / 8, c, n, block);
    for (int32_t i = 0; i < n; i++) out[c + i] = block[i][row % 8];
  }
}

template <int32_t kRows>
inline void add_products(const f8* block, int32_t n, const float* x, int32_t columns, float* tile) {
  f8 total[kRows];
  for (int32_t t = 0; t < kRows; t++) total[t] = load(tile + t * 8);
  for (int32_t c = 0; c < n; c++) {
    for (int32_t t = 0; t < kRows; t++) total[t] += block[c] * spread(x[static_cast<int64_t>(t) * columns + c]);
  }
  for (int32_t t = 0; t < kRows; t++) store(tile + t * 8, total[t]);
}

void group_f32(int32_t dtype, const uint8_t* weight, int32_t columns, int32_t rows, int64_t group, const float* x, int32_t count, float* tile) {
  std::memset(tile, 0, static_cast<size_t>(count) * 32);
  f8 block[32];
  for (int32_t c = 0; c < columns; c += 32) {
    const int32_t n = columns - c < 32 ? columns - c : 32;
    dequantise(dtype, weight, columns, rows, group, c, n, block);
    int32_t t = 0;
    for (; t + 4 <= count; t += 4) add_products<4>(block, n, x + static_cast<int64_t>(t) * columns + c, columns, tile + t * 8);
    for (; t < count; t++) add_products<1>(block, n, x + static_cast<int64_t>(t) * columns + c, columns, tile + t * 8);
  }
}

void round_row(const float* x, int32_t columns, int8_t* rounded, float* scales, float* sums) {
  for (int32_t b = 0; b < columns / 32; b++, x += 32, rounded += 32) {
    f8 highest8 = spread(0.0f), none8 = spread(0.0f);
    for (int32_t i = 0; i < 32; i += 8) {
      const f8 v = load(x + i), magnitude = (f8)((i8)v & 0x7fffffff);
      highest8 = magnitude > highest8 ? magnitude : highest8;
      none8 += v * spread(0.0f);
    }
    float most = 0.0f;
    for (int32_t i = 0; i < 8; i++) most = highest8[i] > most ? highest8[i] : most;
    const float none = sum(none8);
    if (std::isnan(none)) {  // x is not finite: nor is what comes of it
      std::memset(rounded, 0, 32);
      scales[b] = sums[b] = none;
      continue;
    }
    const float scale = most / 127.0f, inverse = most > 0.0f ? 127.0f / most : 0.0f;
    int32_t total = 0;
    for (int32_t i = 0; i < 32; i++) {
      const int32_t q = static_cast<int32_t>(__builtin_rintf(x[i] * inverse));
      rounded[i] = static_cast<int8_t>(q);
      total += q;
    }
    scales[b] = scale;
    sums[b] = scale * static_cast<float>(total);
  }
}

#if defined(__AVX2__)
inline __m256i spread4(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

/** total + the sums of 4 products of signed bytes in each lane: |w| <= 128 and |x| <= 127, so a pair of products fits 16 bits. */
inline __m256i add_signed(__m256i total, __m256i w, __m256i x) {
  const __m256i magnitude = _mm256_abs_epi8(w), signed_x = _mm256_sign_epi8(x, w);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpbusd_epi32(total, magnitude, signed_x);
#else
  return _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, signed_x), _mm256_set1_epi16(1)));
#endif
}
#endif

/** Sums over the first and the second 16 columns of int8 weights times x, for each of the 8 rows. */
template <int32_t kType, int32_t kRows>
inline void half_products(const b32 (&w)[8], const int8_t* x, int64_t x_stride, i8 (&first)[kRows], i8 (&second)[kRows]) {
#if defined(__AVX2__)
  for (int32_t half = 0; half < 2; half++) {
    __m256i total[kRows];
    for (int32_t t = 0; t < kRows; t++) total[t] = _mm256_setzero_si256();
    for (int32_t v = 4 * half; v < 4 * half + 4; v++) {
      const __m256i own = (__m256i)w[v];
      for (int32_t t = 0; t < kRows; t++) {
        const __m256i four = spread4(x + t * x_stride + v * 4);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
        total[t] = wkv_form_of(kType).middle || kType == WKV_IQ4_NL ? add_signed(total[t], own, four) : _mm256_dpbusd_epi32(total[t], own, four);
#else
        // 8 products of at most 32 * 127 stay below 2^15; only IQ4_NL has larger numbers.
        if (kType == WKV_IQ4_NL) total[t] = add_signed(total[t], own, four);
        else if (wkv_form_of(kType).middle) total[t] = _mm256_add_epi16(total[t], _mm256_maddubs_epi16(_mm256_abs_epi8(own), _mm256_sign_epi8(four, own)));
        else total[t] = _mm256_add_epi16(total[t], _mm256_maddubs_epi16(own, four));
#endif
      }
    }
    for (int32_t t = 0; t < kRows; t++) {
#if !(defined(__AVX512VNNI__) && defined(__AVX512VL__))
      if (kType != WKV_IQ4_NL) total[t] = _mm256_madd_epi16(total[t], _mm256_set1_epi16(1));
#endif
      (half ? second : first)[t] = (i8)total[t];
    }
  }
#else
  for (int32_t t = 0; t < kRows; t++) {
    const int8_t* row = x + t * x_stride;
    int32_t total[2][8] = {};
    for (int32_t v = 0; v < 8; v++) {
      for (int32_t i = 0; i < 32; i++) total[v / 4][i / 4] += static_cast<int8_t>(w[v][i]) * row[v * 4 + i % 4];
    }
    std::memcpy(&first[t], total[0], 32);
    std::memcpy(&second[t], total[1], 32);
  }
#endif
}

/** Sums over 32 columns of weight (0..15 or int8) times x, for each of the 8 rows; Q4 values are taken as stored. */
template <int32_t kType, int32_t kRows>
inline void integer_products(const uint8_t* q, const int8_t* x, int64_t x_stride, i8* totals) {
#if defined(__AVX2__)
  __m256i total[kRows];
  for (int32_t t = 0; t < kRows; t++) total[t] = _mm256_setzero_si256();
  if (kType == WKV_Q8_0) {
    for (int32_t v = 0; v < 8; v++) {
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + v * 32));
      for (int32_t t = 0; t < kRows; t++) total[t] = add_signed(total[t], w, spread4(x + t * x_stride + v * 4));
    }
  } else {
    const __m256i low = _mm256_set1_epi8(15);
    for (int32_t v = 0; v < 4; v++) {
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + v * 32));
      const __m256i first = _mm256_and_si256(packed, low), second = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
      for (int32_t t = 0; t < kRows; t++) {
        const __m256i x_first = spread4(x + t * x_stride + v * 4), x_second = spread4(x + t * x_stride + 16 + v * 4);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
        total[t] = _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(total[t], first, x_first), second, x_second);
#else
        // 16 products of at most 15 * 127 stay below 2^15.
        total[t] = _mm256_add_epi16(total[t], _mm256_add_epi16(_mm256_maddubs_epi16(first, x_first), _mm256_maddubs_epi16(second, x_second)));
#endif
      }
    }
#if !(defined(__AVX512VNNI__) && defined(__AVX512VL__))
    for (int32_t t = 0; t < kRows; t++) total[t] = _mm256_madd_epi16(total[t], _mm256_set1_epi16(1));
#endif
  }
  for (int32_t t = 0; t < kRows; t++) totals[t] = (i8)total[t];
#else
  for (int32_t t = 0; t < kRows; t++) {
    int32_t total[8] = {};
    const int8_t* row = x + t * x_stride;
    for (int32_t v = 0; v < (kType == WKV_Q8_0 ? 8 : 4); v++) {
      for (int32_t r = 0; r < 8; r++) {
        for (int32_t c = 0; c < 4; c++) {
          const uint8_t byte = q[v * 32 + r * 4 + c];
          if (kType == WKV_Q8_0) total[r] += static_cast<int8_t>(byte) * row[v * 4 + c];
          else total[r] += (byte & 15) * row[v * 4 + c] + (byte >> 4) * row[16 + v * 4 + c];
        }
      }
    }
    std::memcpy(&totals[t], total, 32);
  }
#endif
}

template <int32_t kType, int32_t kRows>
inline void group_rows(const uint8_t* block, int32_t blocks, const int8_t* x, const float* scales, const float* sums, float* tile) {
  f8 total[kRows];
  for (int32_t t = 0; t < kRows; t++) total[t] = spread(0.0f);
  const int64_t stride = int64_t{blocks} * 32;
  for (int32_t b = 0; b < blocks; b++, block += block_bytes(kType)) {
    const f8 scale = load_halves(block);
    i8 products[kRows];
    integer_products<kType, kRows>(block + (kType == WKV_Q4_1 ? 32 : 16), x + b * 32, stride, products);
    for (int32_t t = 0; t < kRows; t++) {
      const int64_t at = static_cast<int64_t>(t) * blocks + b;
      total[t] += __builtin_convertvector(products[t], f8) * (scale * spread(scales[at]));
      if (kType == WKV_Q4_1) total[t] += load_halves(block + 16) * spread(sums[at]);
      if (kType == WKV_Q4_0) total[t] -= scale * spread(8.0f * sums[at]);
    }
  }
  for (int32_t t = 0; t < kRows; t++) store(tile + t * 8, total[t]);
}

/** Adds the products of a piece with kRows rows of x to their tile. */
template <int32_t kType, int32_t kRows>
inline void add_piece(const PieceScales& of, const b32 (&w)[8], const int8_t* x, int64_t x_stride, const float* scales, const float* sums, int64_t stride, float* tile) {
  constexpr wkv_form form = wkv_form_of(kType);
  i8 first[kRows], second[kRows];
  half_products<kType, kRows>(w, x, x_stride, first, second);
  for (int32_t t = 0; t < kRows; t++) {
    const f8 scale = spread(scales[t * stride]);
    f8 total = load(tile + t * 8);
    if (form.halves) total += __builtin_convertvector(first[t], f8) * (of.scale[0] * scale) + __builtin_convertvector(second[t], f8) * (of.scale[1] * scale);
    else total += __builtin_convertvector(first[t] + second[t], f8) * (of.scale[0] * scale);
    if (kType == WKV_Q2_K) {
      int32_t sum = 0;
      for (int32_t i = 0; i < 16; i++) sum += x[t * x_stride + i];
      const float half = scales[t * stride] * static_cast<float>(sum);
      total += of.least[0] * spread(half) + of.least[1] * spread(sums[t * stride] - half);
    } else if (form.least) {
      total += of.least[0] * spread(sums[t * stride]);
    }
    store(tile + t * 8, total);
  }
}

/** The same for the types of quants.h: a piece is unpacked once for all rows of x. */
template <int32_t kType>
inline void pieces_typed(const uint8_t* weight, int32_t columns, int64_t group, const int8_t* x, const float* scales, const float* sums, int32_t count, float* tile) {
  const int32_t blocks = columns / 32;
  const uint8_t* own = weight + group * piece_at(kType, blocks);
  std::memset(tile, 0, static_cast<size_t>(count) * 32);
  b32 w[8];
  for (int32_t b = 0; b < blocks; b++) {
    const PieceScales of = piece_scales<kType>(own, b);
    unpack<kType>(own + piece_at(kType, b) + piece_head(kType), w);
    int32_t t = 0;
    for (; t + 4 <= count; t += 4) add_piece<kType, 4>(of, w, x + int64_t{t} * columns + b * 32, columns, scales + int64_t{t} * blocks + b, sums + int64_t{t} * blocks + b, blocks, tile + t * 8);
    for (; t < count; t++) add_piece<kType, 1>(of, w, x + int64_t{t} * columns + b * 32, columns, scales + int64_t{t} * blocks + b, sums + int64_t{t} * blocks + b, blocks, tile + t * 8);
  }
}

template <int32_t kType>
inline void group_typed(const uint8_t* weight, int32_t columns, int64_t group, const int8_t* x, const float* scales, const float* sums, int32_t count, float* tile) {
  const int32_t blocks = columns / 32;
  const uint8_t* block = weight + group * blocks * block_bytes(kType);
  int32_t t = 0;
  for (; t + 4 <= count; t += 4) group_rows<kType, 4>(block, blocks, x + int64_t{t} * columns, scales + int64_t{t} * blocks, sums + int64_t{t} * blocks, tile + t * 8);
  for (; t < count; t++) group_rows<kType, 1>(block, blocks, x + int64_t{t} * columns, scales + int64_t{t} * blocks, sums + int64_t{t} * blocks, tile + t * 8);
}

void group_int8(int32_t dtype, const uint8_t* weight, int32_t columns, int64_t group, const int8_t* x, const float* scales, const float* sums, int32_t count, float* tile) {
  switch (dtype) {
    case WKV_Q8_0: return group_typed<WKV_Q8_0>(weight, columns, group, x, scales, sums, count, tile);
    case WKV_Q4_0: return group_typed<WKV_Q4_0>(weight, columns, group, x, scales, sums, count, tile);
    case WKV_Q4_1: return group_typed<WKV_Q4_1>(weight, columns, group, x, scales, sums, count, tile);
    default: break;
  }
#define WKV_BODY(type) pieces_typed<type>(weight, columns, group, x, scales, sums, count, tile)
  WKV_BY_PIECES(dtype, WKV_BODY)
#undef WKV_BODY

}

void rmsnorm(const float* x, const float* weight, int32_t columns, float epsilon, float* out) {
  double total = 0.0;
  for (int32_t c = 0; c < columns; c++) total += static_cast<double>(x[c]) * x[c];
  const float scale = 1.0f / std::sqrt(static_cast<float>(total / columns) + epsilon);
  for (int32_t c = 0; c < columns; c++) out[c] = x[c] * scale * weight[c];
}

/** gate / (1 + e^-s) * up, s being the gate or, as (1 + tanh(u)) / 2 = 1 / (1 + e^-2u), twice GELU's argument. */
void activate(int32_t activation, float* gate, const float* up, int64_t count) {
  const bool gelu = activation == WKV_GELU_TANH;
  constexpr float kLinear = 1.5957691216f, kCubic = 0.0713548162726f;  // 2 sqrt(2 / pi), and 0.044715 times it
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const f8 g = load(gate + i), s = gelu ? g * (spread(kLinear) + spread(kCubic) * g * g) : g;
    store(gate + i, g / (spread(1.0f) + exponential(-s)) * load(up + i));
  }
  for (; i < count; i++) {
    const float g = gate[i], s = gelu ? g * (kLinear + kCubic * g * g) : g;
    gate[i] = g / (1.0f + std::exp(-s)) * up[i];
  }
}

void softcap(float* x, int64_t count, float cap) {
  for (int64_t i = 0; i < count; i++) x[i] = cap * std::tanh(x[i] / cap);
}

// ---- attention ----

void read_row(int32_t dtype, const uint8_t* row, int32_t count, float* out) {
#define WKV_BODY(type) for (int32_t i = 0; i < count; i++) out[i] = load1<type>(row, i)
  WKV_BY_TYPE(dtype, WKV_BODY)
#undef WKV_BODY
}

void write_row(int32_t dtype, const float* values, int32_t count, uint8_t* row) {
#define WKV_BODY(type) for (int32_t i = 0; i < count; i++) store1<type>(row, i, values[i])
  WKV_BY_TYPE(dtype, WKV_BODY)
#undef WKV_BODY
}

/** One row as floats, rotated, of any shape. */
template <int32_t kType>
inline void read_key(const uint8_t* row, int32_t head_dim, const float* cosines, const float* sines, int32_t pairs, float* out) {
  for (int32_t i = 0; i < pairs; i++) {
    const float x = load1<kType>(row, i), y = load1<kType>(row, i + pairs);
    out[i] = x * cosines[i] - y * sines[i];
    out[i + pairs] = x * sines[i] + y * cosines[i];
  }
  for (int32_t i = 2 * pairs; i < head_dim; i++) out[i] = load1<kType>(row, i);
}

inline float dot(const float* a, const float* b, int32_t count) {
  f8 total = spread(0.0f);
  int32_t i = 0;
  for (; i + 8 <= count; i += 8) total += load(a + i) * load(b + i);
  float rest = sum(total);
  for (; i < count; i++) rest += a[i] * b[i];
  return rest;
}

constexpr int32_t kAhead = 12;

/** Asks for the row kAhead behind row i: once tokens have left, rows lie in no order that the hardware would foresee. Not inlined, GCC
 *  takes it for a function without effect and drops it. */
__attribute__((always_inline)) inline void ask_ahead(const StoredRows& rows, int32_t i, int64_t row_bytes) {
  if (i + kAhead >= rows.count) return;
  const uint8_t* row = rows.data + rows.slots[i + kAhead] * row_bytes;
  for (int64_t line = 0; line < row_bytes; line += 64) __builtin_prefetch(row + line);
}

/** kHeads products with rows that are rotated in registers, a vector of pairs at a time; pairs and head_dim are multiples of 8. */
template <int32_t kType, int32_t kHeads>
void vector_scores(const StoredRows& keys, const Rotation& rotation, const float* q, float scale, float* scores, int64_t stride) {
  const int32_t size = size_of(kType), dim = keys.head_dim, pairs = rotation.pairs;
  for (int32_t i = 0; i < keys.count; i++) {
    const uint8_t* row = keys.data + keys.slots[i] * int64_t{dim} * size;
    ask_ahead(keys, i, int64_t{dim} * size);
    const float *cosines = rotation.cosines + int64_t{i} * pairs, *sines = rotation.sines + int64_t{i} * pairs;
    f8 total[kHeads];
    for (int32_t g = 0; g < kHeads; g++) total[g] = spread(0.0f);
    for (int32_t d = 0; d < pairs; d += 8) {
      const f8 x = load8<kType>(row + d * size), y = load8<kType>(row + (d + pairs) * size), c = load(cosines + d), s = load(sines + d);
      const f8 first = x * c - y * s, second = x * s + y * c;
      for (int32_t g = 0; g < kHeads; g++) total[g] += first * load(q + g * dim + d) + second * load(q + g * dim + d + pairs);
    }
    for (int32_t d = 2 * pairs; d < dim; d += 8) {
      const f8 x = load8<kType>(row + d * size);
      for (int32_t g = 0; g < kHeads; g++) total[g] += x * load(q + g * dim + d);
    }
    for (int32_t g = 0; g < kHeads; g++) scores[g * stride + i] = scale * sum(total[g]);
  }
}

template <int32_t kType>
void typed_scores(const StoredRows& keys, const Rotation& rotation, const float* q, int32_t heads, float scale, float* scores, int64_t stride) {
  const int32_t dim = keys.head_dim;
  if (dim % 8 == 0 && rotation.pairs % 8 == 0) {
    int32_t g = 0;
    for (; g + 4 <= heads; g += 4) vector_scores<kType, 4>(keys, rotation, q + g * dim, scale, scores + g * stride, stride);
    if (heads - g == 3) vector_scores<kType, 3>(keys, rotation, q + g * dim, scale, scores + g * stride, stride);
    if (heads - g == 2) vector_scores<kType, 2>(keys, rotation, q + g * dim, scale, scores + g * stride, stride);
    if (heads - g == 1) vector_scores<kType, 1>(keys, rotation, q + g * dim, scale, scores + g * stride, stride);
    return;
  }
  float key[512];
  for (int32_t i = 0; i < keys.count; i++) {
    const int64_t at = int64_t{i} * rotation.pairs;
    read_key<kType>(keys.data + keys.slots[i] * int64_t{dim} * size_of(kType), dim, rotation.cosines + at, rotation.sines + at, rotation.pairs, key);
    for (int32_t g = 0; g < heads; g++) scores[g * stride + i] = scale * dot(q + g * dim, key, dim);
  }
}

void scores(const StoredRows& keys, const Rotation& rotation, const float* q, int32_t heads, float scale, float* out, int64_t stride) {
#define WKV_BODY(type) typed_scores<type>(keys, rotation, q, heads, scale, out, stride)
  WKV_BY_TYPE(keys.dtype, WKV_BODY)
#undef WKV_BODY
}

/** 16 dimensions of kHeads outputs stay in registers over all rows. */
template <int32_t kType, int32_t kHeads>
void typed_values(const StoredRows& values, const float* weights, int64_t stride, float* out) {
  const int32_t size = size_of(kType), head_dim = values.head_dim;
  const int64_t bytes = int64_t{head_dim} * size;
  int32_t d = 0;
  for (; d + 16 <= head_dim; d += 16) {
    f8 low[kHeads], high[kHeads];
    for (int32_t g = 0; g < kHeads; g++) low[g] = load(out + g * head_dim + d), high[g] = load(out + g * head_dim + d + 8);
    for (int32_t i = 0; i < values.count; i++) {
      const uint8_t* row = values.data + values.slots[i] * bytes + d * size;
      if (d == 0) ask_ahead(values, i, bytes);
      const f8 a = load8<kType>(row), b = load8<kType>(row + 8 * size);
      for (int32_t g = 0; g < kHeads; g++) {
        const f8 w = spread(weights[g * stride + i]);
        low[g] += w * a;
        high[g] += w * b;
      }
    }
    for (int32_t g = 0; g < kHeads; g++) store(out + g * head_dim + d, low[g]), store(out + g * head_dim + d + 8, high[g]);
  }
  for (; d < head_dim; d++) {
    for (int32_t g = 0; g < kHeads; g++) {
      float total = out[g * head_dim + d];
      for (int32_t i = 0; i < values.count; i++) total += weights[g * stride + i] * load1<kType>(values.data + values.slots[i] * bytes, d);
      out[g * head_dim + d] = total;
    }
  }
}

template <int32_t kType>
void typed_values(const StoredRows& values, const float* weights, int64_t stride, int32_t heads, float* out) {
  const int64_t step = values.head_dim;
  int32_t g = 0;
  for (; g + 4 <= heads; g += 4) typed_values<kType, 4>(values, weights + g * stride, stride, out + g * step);
  if (heads - g == 3) typed_values<kType, 3>(values, weights + g * stride, stride, out + g * step);
  if (heads - g == 2) typed_values<kType, 2>(values, weights + g * stride, stride, out + g * step);
  if (heads - g == 1) typed_values<kType, 1>(values, weights + g * stride, stride, out + g * step);
}

void weighted_values(const StoredRows& values, const float* weights, int64_t stride, int32_t heads, float* out) {
#define WKV_BODY(type) typed_values<type>(values, weights, stride, heads, out)
  WKV_BY_TYPE(values.dtype, WKV_BODY)
#undef WKV_BODY
}

float highest(const float* x, int64_t count) {
  float most = -INFINITY;
  int64_t i = 0;
  if (count >= 8) {
    f8 best = load(x);
    for (i = 8; i + 8 <= count; i += 8) {
      const f8 v = load(x + i);
      best = v > best ? v : best;
    }
    for (int32_t j = 0; j < 8; j++) most = best[j] > most ? best[j] : most;
  }
  for (; i < count; i++) most = x[i] > most ? x[i] : most;
  return most;
}

float exponentials(float* x, int64_t count, float most) {
  f8 total = spread(0.0f);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const f8 e = exponential(load(x + i) - spread(most));
    store(x + i, e);
    total += e;
  }
  float rest = sum(total);
  if (i < count) {
    f8 tail = spread(-INFINITY);
    for (int64_t j = i; j < count; j++) tail[j - i] = x[j] - most;
    tail = exponential(tail);
    for (int64_t j = i; j < count; j++) rest += x[j] = tail[j - i];
  }
  return rest;
}

void add_scaled(float* into, const float* x, float factor, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) store(into + i, load(into + i) + spread(factor) * load(x + i));
  for (; i < count; i++) into[i] += factor * x[i];
}

void merge(int32_t dtype, float w_v, const uint8_t* v, float w_r, uint8_t* r, int32_t count) {
#define WKV_BODY(type) for (int32_t i = 0; i < count; i++) store1<type>(r, i, wkv_merged(w_v, load1<type>(v, i), w_r, load1<type>(r, i)))
  WKV_BY_TYPE(dtype, WKV_BODY)
#undef WKV_BODY
}

float gap(int32_t dtype, const uint8_t* a, const uint8_t* b, int32_t count) {
  float total = 0.0f;
#define WKV_BODY(type)                                          \
  for (int32_t i = 0; i < count; i++) {                         \
    const float d = load1<type>(a, i) - load1<type>(b, i);      \
    total += d * d;                                             \
  }
  WKV_BY_TYPE(dtype, WKV_BODY)
#undef WKV_BODY
  return total;
}

template <int32_t kRows>
inline void score_rows(const float* q, int32_t head_dim, const float* keys, int64_t key_stride, int32_t count, float scale, float* out, int64_t stride) {
  for (int32_t i = 0; i < count; i += 16) {
    f8 low[kRows], high[kRows];
    for (int32_t t = 0; t < kRows; t++) low[t] = high[t] = spread(0.0f);
    for (int32_t d = 0; d < head_dim; d++) {
      const f8 a = load(keys + d * key_stride + i), b = load(keys + d * key_stride + i + 8);
      for (int32_t t = 0; t < kRows; t++) {
        const f8 w = spread(q[t * head_dim + d]);
        low[t] += w * a;
        high[t] += w * b;
      }
    }
    for (int32_t t = 0; t < kRows; t++) store(out + t * stride + i, low[t] * spread(scale)), store(out + t * stride + i + 8, high[t] * spread(scale));
  }
}

void block_scores(const float* q, int32_t rows, int32_t head_dim, const float* keys, int64_t key_stride, int32_t count, float scale, float* out, int64_t stride) {
  int32_t t = 0;
  for (; t + 4 <= rows; t += 4) score_rows<4>(q + t * head_dim, head_dim, keys, key_stride, count, scale, out + t * stride, stride);
  for (; t < rows; t++) score_rows<1>(q + t * head_dim, head_dim, keys, key_stride, count, scale, out + t * stride, stride);
}

template <int32_t kRows>
inline void value_rows(const float* weights, int64_t stride, int32_t count, const float* values, int32_t head_dim, float* out, int64_t out_stride) {
  int32_t d = 0;
  for (; d + 16 <= head_dim; d += 16) {
    f8 low[kRows], high[kRows];
    for (int32_t t = 0; t < kRows; t++) low[t] = high[t] = spread(0.0f);
    for (int32_t i = 0; i < count; i++) {
      const f8 a = load(values + int64_t{i} * head_dim + d), b = load(values + int64_t{i} * head_dim + d + 8);
      for (int32_t t = 0; t < kRows; t++) {
        const f8 w = spread(weights[t * stride + i]);
        low[t] += w * a;
        high[t] += w * b;
      }
    }
    for (int32_t t = 0; t < kRows; t++) store(out + t * out_stride + d, low[t]), store(out + t * out_stride + d + 8, high[t]);
  }
  for (; d < head_dim; d++) {
    for (int32_t t = 0; t < kRows; t++) {
      float total = 0.0f;
      for (int32_t i = 0; i < count; i++) total += weights[t * stride + i] * values[int64_t{i} * head_dim + d];
      out[t * out_stride + d] = total;
    }
  }
}

void block_values(const float* weights, int64_t stride, int32_t rows, int32_t count, const float* values, int32_t head_dim, float* out, int64_t out_stride) {
  int32_t t = 0;
  for (; t + 4 <= rows; t += 4) value_rows<4>(weights + t * stride, stride, count, values, head_dim, out + t * out_stride, out_stride);
  for (; t < rows; t++) value_rows<1>(weights + t * stride, stride, count, values, head_dim, out + t * out_stride, out_stride);
}

}  // namespace

const Loops loops = {
    WKV_TEXT(WKV_ISA), weight_row, round_row, rmsnorm, group_f32, group_int8, activate, softcap, read_row, write_row, scores, weighted_values,
    highest, exponentials, add_scaled, merge, gap, block_scores, block_values,
};

}  // namespace WKV_ISA
}  // namespace wkv
