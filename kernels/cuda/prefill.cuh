/** prefill.cuh: what prefill.cu (arrive, settle, products of any GPU) and prefill_wgmma.cu (products of sm_90a) share. */
#pragma once
#include "cache.cuh"

namespace wkv {

struct PrefillView {
  CacheView cache;
  RowHeads row;
  int32_t layer, sequence, rows;
  int32_t width;  // of a scratch row: D and zeros
  const float* qkv;
  float* out;
  float scale, softcap;  // in units of ln 2; softcap 0: none
  int32_t window;        // 0: none
  bool tiled;            // rows of q, keys and values lie as tiled_at says
  // Scratch.
  int64_t entries, lines;           // slots + rows, rows; in tiles both are whole tiles
  void* q;                          // [H, lines, width], rotated, in the library's order, scaled
  void *keys, *values;              // [N, entries, width], keys rotated
  uint8_t *new_keys, *new_values;   // [N, rows, D], as stored
  float* lse;                       // [H, lines]
  float* columns;                   // [H, entries]
  float *score, *by_rank, *measure; // [N, entries]
  uint32_t* words;                  // [N, words a token, entries]
  int32_t *birth, *rank, *freed;
  int32_t* order;                   // [N, 6, entries]
  int32_t* places;                  // [N, 1 + rows]: as of Settling::place, first -1 where nothing is to be written

  /** Whether scores are more than products. */
  __host__ __device__ bool bent() const { return softcap > 0.0f || window > 0; }
  /** The score of entry i for row t, a finite low number outside the window: what a row adds up before the first entry that it sees
   *  is then shrunk to nothing. */
  __device__ float bend(float s, int32_t n, int32_t kept, int32_t i, int32_t t) const {
    if (window > 0) {
      const int32_t rank = i < kept ? cache.ranks[head(n) * (cache.slots + 1) + i] : i;
      if (rank <= kept + t - window) return -1.0e30f;
    }
    return softcap > 0.0f ? softcap * tanhf(s / softcap) : s;
  }
  __device__ int32_t* places_of(int32_t n) const { return places + n * (int64_t{rows} + 1); }
  /** The state of one head's entries. */
  __device__ Entries entries_of(int32_t n) const {
    const int64_t at = n * entries;
    uint32_t* own = words + at * cache.width;
    return {score + at, birth + at, rank + at, own, entries, cache.gapped() ? reinterpret_cast<float*>(own) : nullptr, by_rank + at, measure + at, nullptr, freed + at};
  }
  /** Where a query head's output of row t goes. */
  __device__ float* out_of(int64_t t, int32_t h) const { return out + (t * row.kv_heads * row.group + row.query(0, h)) * cache.head_dim; }
  __device__ int64_t head(int32_t n) const { return cache.first + int64_t{sequence} * cache.kv_heads + n; }
  template <typename T>
  __device__ T* new_keys_of(int32_t n) const { return reinterpret_cast<T*>(new_keys) + int64_t{n} * rows * cache.head_dim; }
  template <typename T>
  __device__ T* new_values_of(int32_t n) const { return reinterpret_cast<T*>(new_values) + int64_t{n} * rows * cache.head_dim; }
  template <typename S>
  __device__ S* queries_of(int32_t h) const { return static_cast<S*>(q) + int64_t{h} * lines * width; }
  template <typename S>
  __device__ S* keys_of(int32_t n) const { return static_cast<S*>(keys) + n * entries * width; }
  template <typename S>
  __device__ S* values_of(int32_t n) const { return static_cast<S*>(values) + n * entries * width; }
};

constexpr int32_t kTile = 128;  // rows and entries that a block of prefill_wgmma.cu takes at a time
__host__ __device__ constexpr int32_t tiles_of(int64_t count) { return static_cast<int32_t>((count + kTile - 1) / kTile); }

/** Where in shared memory wgmma looks for number d of a row of f16 (its swizzle of 128 bytes), and so in scratch: 8 rows of 64 numbers
 *  lie together, the next 64 of these rows behind them, and the row's eights are exchanged. Whole eights of rows are one piece. */
__host__ __device__ inline int64_t tiled_at(int64_t row, int32_t d, int32_t width) {
  return ((row / 8 * (width / 64) + d / 64) * 8 + row % 8) * 64 + ((d / 8 ^ static_cast<int32_t>(row)) & 7) * 8 + d % 8;
}

__device__ inline float power_of_2(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
__device__ inline uint32_t packed(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
/** Over the four lanes that share a row of c. */
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

/** Whether this library has code for this GPU's wgmma, and the op fits it. */
bool wgmma_takes(const Context& ctx, const PrefillView& p);
/** Forward and columns of tiled scratch. */
void attend_wgmma(Context& ctx, const PrefillView& p);

}  // namespace wkv
