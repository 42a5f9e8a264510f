/**
 * quants.h: how GGUF's blocks of few-bit numbers lie in a file, taken apart 32 columns at a time; compiled into both libraries, which lay
 * the parts out as their loops like them. The blocks are those of ggml-common.h; Q8_0, Q4_0 and Q4_1 are so simple that each library
 * takes them as they are.
 */
#ifndef WKV_QUANTS_H
#define WKV_QUANTS_H
#include <stdint.h>
#include <string.h>

#include "policy.h"

/** What a type's blocks are: a number is d * sub * (q - middle) - least * sub', with q of `low` + `high` bits. */
struct wkv_form {
  int32_t columns, bytes;  /* of a block in the file */
  int32_t low, high;       /* bits of q: the low and the high ones lie apart */
  int32_t middle;          /* what q is counted from */
  bool subs;               /* a K type: its 8 pieces of 32 columns have scales of their own, integers times those of the block */
  bool least;              /* a minimum belongs to each scale */
  bool halves;             /* each 16 columns have a scale of their own, not each 32 */
};

WKV_HD constexpr wkv_form wkv_form_of(int32_t dtype) {
  switch (dtype) {
    case WKV_Q8_0: return {32, 34, 8, 0, 0, false, false, false};
    case WKV_Q4_0: return {32, 18, 4, 0, 8, false, false, false};
    case WKV_Q4_1: return {32, 20, 4, 0, 0, false, true, false};
    case WKV_Q5_0: return {32, 22, 4, 1, 16, false, false, false};
    case WKV_Q5_1: return {32, 24, 4, 1, 0, false, true, false};
    case WKV_Q2_K: return {256, 84, 2, 0, 0, true, true, true};
    case WKV_Q3_K: return {256, 110, 2, 1, 4, true, false, true};
    case WKV_Q4_K: return {256, 144, 4, 0, 0, true, true, false};
    case WKV_Q5_K: return {256, 176, 4, 1, 0, true, true, false};
    case WKV_Q6_K: return {256, 210, 4, 2, 32, true, false, true};
    case WKV_IQ4_NL: return {32, 18, 4, 0, 0, false, false, false};
    default: return {1, 0, 0, 0, 0, false, false, false};
  }
}

/** Whether rows of this type are blocks that wkv_read_piece takes apart. */
WKV_HD constexpr bool wkv_has_pieces(int32_t dtype) { return dtype >= WKV_Q5_0 && dtype <= WKV_IQ4_NL; }

/** Bytes of a row in the file. */
inline int64_t wkv_row_bytes(int32_t dtype, int32_t columns) {
  if (dtype >= WKV_Q8_0) return int64_t{columns} / wkv_form_of(dtype).columns * wkv_form_of(dtype).bytes;
  return int64_t{columns} * (dtype == WKV_F16 || dtype == WKV_BF16 ? 2 : 4);
}

/** What IQ4_NL's 16 numbers stand for. */
constexpr int8_t WKV_IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/** 32 columns of a block. */
struct wkv_piece {
  uint8_t q[32];
  uint8_t sub[2];      /* K types. Q4_K, Q5_K: scale and minimum. Q2_K: for each half the scale in the low, the minimum in the high 4 bits.
                          Q3_K, Q6_K: for each half the scale, signed. */
  uint16_t d, least;   /* the f16 scale and minimum of the block, 0 where it has none */
};

/** 6-bit scale and minimum of piece p, of the 12 bytes that Q4_K and Q5_K have for 8 pieces. */
inline void wkv_read_subs(const uint8_t* s, int32_t p, uint8_t* sub) {
  if (p < 4) {
    sub[0] = s[p] & 63, sub[1] = s[p + 4] & 63;
  } else {
    sub[0] = static_cast<uint8_t>((s[p + 4] & 15) | s[p - 4] >> 6 << 4);
    sub[1] = static_cast<uint8_t>(s[p + 4] >> 4 | s[p] >> 6 << 4);
  }
}

/** Takes piece p of a block apart; p is 0 for blocks of 32 columns. */
inline void wkv_read_piece(int32_t dtype, const uint8_t* block, int32_t p, wkv_piece* out) {
  const auto half = [&](int32_t at) {
    uint16_t bits;
    memcpy(&bits, block + at, 2);
    return bits;
  };
  const auto byte = [](int32_t x) { return static_cast<uint8_t>(x); };
  out->sub[0] = out->sub[1] = 0;
  out->least = 0;
  switch (dtype) {
    case WKV_Q5_0:
    case WKV_Q5_1: {
      const int32_t at = dtype == WKV_Q5_0 ? 2 : 4;
      out->d = half(0);
      if (dtype == WKV_Q5_1) out->least = half(2);
      uint32_t high;
      memcpy(&high, block + at, 4);
      for (int32_t i = 0; i < 32; i++) out->q[i] = byte((block[at + 4 + i % 16] >> (i / 16 * 4) & 15) | static_cast<int32_t>(high >> i & 1) << 4);
      return;
    }
    case WKV_IQ4_NL:
      out->d = half(0);
      for (int32_t i = 0; i < 32; i++) out->q[i] = byte(block[2 + i % 16] >> (i / 16 * 4) & 15);
      return;
    case WKV_Q2_K:
      out->d = half(80), out->least = half(82);
      memcpy(out->sub, block + 2 * p, 2);
      for (int32_t i = 0; i < 32; i++) out->q[i] = byte(block[16 + p / 4 * 32 + i] >> (p % 4 * 2) & 3);
      return;
    case WKV_Q3_K:
      out->d = half(108);
      for (int32_t h = 0; h < 2; h++) {
        const int32_t s = 2 * p + h, low = block[96 + s % 8] >> (s / 8 * 4) & 15, high = block[104 + s % 4] >> (s / 4 * 2) & 3;
        out->sub[h] = byte((low | high << 4) - 32);
      }
      for (int32_t i = 0; i < 32; i++) out->q[i] = byte((block[32 + p / 4 * 32 + i] >> (p % 4 * 2) & 3) | (block[i] >> p & 1) << 2);
      return;
    case WKV_Q4_K:
    case WKV_Q5_K: {
      out->d = half(0), out->least = half(2);
      wkv_read_subs(block + 4, p, out->sub);
      const uint8_t* q = block + (dtype == WKV_Q4_K ? 16 : 48) + p / 2 * 32;
      for (int32_t i = 0; i < 32; i++) out->q[i] = byte((q[i] >> (p % 2 * 4) & 15) | (dtype == WKV_Q5_K ? (block[16 + i] >> p & 1) << 4 : 0));
      return;
    }
    default: /* WKV_Q6_K */
      out->d = half(208);
      memcpy(out->sub, block + 192 + 2 * p, 2);
      for (int32_t i = 0; i < 32; i++) out->q[i] = byte((block[p / 4 * 64 + p % 2 * 32 + i] >> (p % 4 / 2 * 4) & 15) | (block[128 + p / 4 * 32 + i] >> (p % 4 * 2) & 3) << 4);
  }
}

#endif
