/**
 * loops.hpp: the CPU library's loops over numbers, compiled once for each instruction set (loops.cpp) and picked at run time.
 *
 * Weights other than F32 lie in groups of 8 rows, so that one vector holds one column of 8 rows:
 * - F16, BF16: [group][column][8 rows].
 * - quantised: [group][block of 32 columns]: 8 f16 scales, (Q4_1) 8 f16 minima, then vectors of 32 bytes; a vector holds, row by
 *   row, 4 neighbouring columns: Q8_0 columns 4 v .. 4 v + 3 in vector v; Q4 those in its low, columns 16 + 4 v .. in its high halves.
 * - the other types (quants.h): of a K type, for each 256 columns 8 f16 scales and, where there are any, 8 f16 minima of the blocks, then
 *   the pieces. A piece of 32 columns has its 8 first and 8 second sub-scales (K) or 8 f16 scales and minima; then vectors as above, whose
 *   bytes hold the low bits (4: as Q4; 2: columns 4 v .. at bit 2 v of the first of two vectors, 16 + 4 v .. of the second), then the high
 *   ones (1: at bit v and bit 4 + v of one vector; 2: as the low 2).
 */
#pragma once
#include <cstdint>

#include "../quants.h"

namespace wkv {

/** Stored rows of a head that attention reads: row i lies at data + slots[i] * head_dim elements. */
struct StoredRows {
  const uint8_t* data;
  int32_t dtype, head_dim;
  const int32_t* slots;
  int32_t count;
};

/** Bytes of a piece's scales in a group, and of all that 32 columns take beside the block's own. */
constexpr int32_t piece_head(int32_t dtype) { return wkv_form_of(dtype).subs ? 16 : wkv_form_of(dtype).least ? 32 : 16; }
constexpr int32_t piece_bytes(int32_t dtype) { return piece_head(dtype) + (wkv_form_of(dtype).low == 4 ? 128 : 64) + wkv_form_of(dtype).high * 32; }
/** Bytes of the scales of 8 K blocks. */
constexpr int32_t super_bytes(int32_t dtype) { return !wkv_form_of(dtype).subs ? 0 : wkv_form_of(dtype).least ? 32 : 16; }
/** Where a piece lies in its group, and that of the scales of its block. */
constexpr int64_t super_at(int32_t dtype, int32_t piece) { return int64_t{piece / 8} * (super_bytes(dtype) + 8 * piece_bytes(dtype)); }
constexpr int64_t piece_at(int32_t dtype, int32_t piece) {
  return wkv_form_of(dtype).subs ? super_at(dtype, piece) + super_bytes(dtype) + piece % 8 * piece_bytes(dtype) : int64_t{piece} * piece_bytes(dtype);
}

/** Tables of a rotation from some rank on, [ranks, pairs]; pairs 0: the rows are read as they are. */
struct Rotation {
  const float* cosines;
  const float* sines;
  int32_t pairs;
};

struct Loops {
  const char* name;

  /** out[columns] = one row of a weight that is not F32. */
  void (*weight_row)(int32_t dtype, const uint8_t* weight, int32_t columns, int64_t row, float* out);
  /** x[columns] in 8 bits: per block of 32, scale = max |x| / 127 and sum = scale * sum of the rounded. */
  void (*round_row)(const float* x, int32_t columns, int8_t* rounded, float* scales, float* sums);
  void (*rmsnorm)(const float* x, const float* weight, int32_t columns, float epsilon, float* out);
  /** tile[t][8] = x[t] . the 8 rows of group `group`. */
  void (*group_f32)(int32_t dtype, const uint8_t* weight, int32_t columns, int32_t rows, int64_t group, const float* x, int32_t count, float* tile);
  /** The same from 8-bit rows; scales and sums are [count, columns / 32]. */
  void (*group_int8)(int32_t dtype, const uint8_t* weight, int32_t columns, int64_t group, const int8_t* x, const float* scales, const float* sums, int32_t count, float* tile);
  /** gate[i] = activation(gate[i]) * up[i], a wkv_activation. */
  void (*activate)(int32_t activation, float* gate, const float* up, int64_t count);
  /** x = cap * tanh(x / cap). */
  void (*softcap)(float* x, int64_t count, float cap);

  void (*read_row)(int32_t dtype, const uint8_t* row, int32_t count, float* out);
  void (*write_row)(int32_t dtype, const float* values, int32_t count, uint8_t* row);
  /** scores[g * stride + i] = scale * q[g] . rotated row i, for `heads` query heads. */
  void (*scores)(const StoredRows& keys, const Rotation& rotation, const float* q, int32_t heads, float scale, float* scores, int64_t stride);
  /** out[g] += sum over i of weights[g * stride + i] * row i. */
  void (*weighted_values)(const StoredRows& values, const float* weights, int64_t stride, int32_t heads, float* out);
  float (*highest)(const float* x, int64_t count);
  /** x = exp(x - highest); gives the sum. */
  float (*exponentials)(float* x, int64_t count, float highest);
  /** into += factor * x. */
  void (*add_scaled)(float* into, const float* x, float factor, int64_t count);
  /** r = the merge of v into r, weighted w_v and w_r (policy.h), rounded once. */
  void (*merge)(int32_t dtype, float w_v, const uint8_t* v, float w_r, uint8_t* r, int32_t count);
  /** |a - b|^2 of two stored rows. */
  float (*gap)(int32_t dtype, const uint8_t* a, const uint8_t* b, int32_t count);

  /** scores[t][i] = scale * q[t] . column i of keys, for keys transposed [head_dim, key_stride]. */
  void (*block_scores)(const float* q, int32_t rows, int32_t head_dim, const float* keys, int64_t key_stride, int32_t count, float scale, float* scores, int64_t stride);
  /** out[t] = sum over i of weights[t][i] * values[i], rows of `out` out_stride apart. */
  void (*block_values)(const float* weights, int64_t stride, int32_t rows, int32_t count, const float* values, int32_t head_dim, float* out, int64_t out_stride);
};

#if defined(__x86_64__)
namespace x86_64_v1 { extern const Loops loops; }
namespace x86_64_v3 { extern const Loops loops; }
namespace x86_64_v4_vnni { extern const Loops loops; }
#else
namespace portable { extern const Loops loops; }
#endif

/** The fastest set that this processor runs. */
inline const Loops* pick_loops() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (v3 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) return &x86_64_v4_vnni::loops;
  if (v3) return &x86_64_v3::loops;
  return &x86_64_v1::loops;
#else
  return &portable::loops;
#endif
}

}  // namespace wkv
