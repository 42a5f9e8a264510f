/**
 * prefill.cu: wkv_prefill, many tokens of one sequence at once: causal attention whose columns are also summed into the scores.
 *
 *   p[t, i] = softmax_i(scale * rotate(q[t], len + t) . rotate(k[i], i)),  i <= len + t;  out[t] = sum_i p[t, i] v[i]
 *   (scores capped, and i > len + t - window, where asked)
 *   a[i] += mean_g sum_t p[t, i]
 *
 * Six launches; no matrix of rows x length is ever in memory. Columns are counted by entry: the cached slots as they lie, then the new
 * tokens (softmax and sums do not mind the order).
 * 1. arrive: rounds the new k and v to what will be stored, and leaves q, scaled, and all k, both rotated, and all v in scratch, as rows
 *    of one width, so that whatever follows loads plain tiles, or as tiles, with zeros behind the last row. A warp owns a row.
 * 2. forward: a block owns 64 or 128 rows of one query head and walks over the entries with a running maximum; it leaves out and each
 *    row's logarithm of its sum, `lse`. Bytes moved: K and V once a block, mostly from the second-level cache.
 * 3. columns: a block owns 64 or 128 entries for one query head and walks over the rows that see them: p = 2^(score - lse). Bytes moved:
 *    q once a block, from the second-level cache.
 * 4. join: a thread owns an entry and adds its query heads' columns to its score.
 * 5. settle: a block owns one KV head and brings it back to its budget; nothing to do while tokens fit.
 * 6. place: a warp owns 8 entries and writes their state, and the rows of new ones, to the cache. Bytes moved: new rows twice.
 * Scores are in units of ln 2: q is scaled by scale / ln 2.
 *
 * 2 and 3 come thrice. With a 16-bit cache: on tensor cores, q, rotated k, v and p rounded to f16 (bf16 values are exact in it unless
 * tiny), sums in f32; many rows of heads of up to 128 dimensions on sm_90a by prefill_wgmma.cu, others here. With an f32 cache, or heads
 * wider than 256: in f32 throughout.
 */
#include <algorithm>
#include <type_traits>

#include "fours.cuh"
#include "prefill.cuh"
#include "settle.cuh"

namespace wkv {
namespace {

constexpr float kPerLn2 = 1.44269504f;

// ---- arrive ----

/** As scratch holds it; what f16 does not reach is cut off, but what is no number or infinite stays so, to be found. */
template <typename S>
__device__ S narrowed(float x);
template <>
__device__ float narrowed<float>(float x) { return x; }
template <>
__device__ __half narrowed<__half>(float x) {
  return __float2half_rn(fabsf(x) > 65504.0f && fabsf(x) < INFINITY ? copysignf(65504.0f, x) : x);
}

__device__ inline float2 turned(float2 x, float2 turn) { return make_float2(x.x * turn.x - x.y * turn.y, x.y * turn.x + x.x * turn.y); }
template <typename T>
__device__ float2 rounded(float2 x) { return make_float2(to_float(from_float<T>(x.x)), to_float(from_float<T>(x.y))); }

/** A row of scratch. */
template <typename S>
struct ScratchRow {
  S* rows;
  int64_t row;
  int32_t width;
  bool tiled;
  __device__ void put(int32_t d, float x) const { rows[tiled ? tiled_at(row, d, width) : row * width + d] = narrowed<S>(x); }
};

/** One row by a warp: pair(i) gives the dimensions i and i + pairs, single(d) those that are not rotated; then zeros. */
template <typename S, typename Pair, typename Single>
__device__ void write_row(const CacheView& c, const ScratchRow<S>& to, Pair pair, Single single) {
  const int32_t lane = threadIdx.x & 31, pairs = c.rope.pairs;
  for (int32_t i = lane; i < pairs; i += 32) {
    const float2 x = pair(i);
    to.put(i, x.x), to.put(i + pairs, x.y);
  }
  for (int32_t d = 2 * pairs + lane; d < c.head_dim; d += 32) to.put(d, single(d));
  for (int32_t d = c.head_dim + lane; d < to.width; d += 32) to.put(d, 0.0f);
}

/** T: the cache's type, S: that of the scratch rows. */
template <typename T, typename S>
__global__ void __launch_bounds__(256) arrive_kernel(PrefillView p) {
  wait_for_previous();
  let_next_start();
  const CacheView& c = p.cache;
  const RopeView& rope = c.rope;
  const int32_t which = blockIdx.y, dim = c.head_dim, pairs = rope.pairs, lane = threadIdx.x & 31;
  const int32_t first = blockIdx.x * 8 + (threadIdx.x >> 5), step = gridDim.x * 8;
  const int32_t n = which < c.heads ? which / c.group() : which - c.heads;
  const Counts& counts = c.counts[p.head(n)];
  const int32_t kept = counts.kept, columns = p.row.columns(dim);
  const int64_t place = c.text ? counts.steps : kept;
  const auto row_of = [&](S* rows, int32_t row) { return ScratchRow<S>{rows, row, p.width, p.tiled}; };
  const auto clear_row = [&](const ScratchRow<S>& to) {
    for (int32_t d = lane; d < p.width; d += 32) to.put(d, 0.0f);
  };
  const auto source = [&](const float* from, int32_t i) { return make_float2(from[rope.source(i)], from[rope.source(i + pairs)]); };
  if (which < c.heads) {
    for (int32_t t = first; t < p.lines; t += step) {
      const auto to = row_of(p.queries_of<S>(which), t);
      if (t >= p.rows) {
        clear_row(to);
        continue;
      }
      const float* from = p.qkv + int64_t{t} * columns + p.row.query(0, which) * dim;
      const auto pair = [&](int32_t i) {
        const float2 x = turned(source(from, i), rope.at(place + t, i));
        return make_float2(x.x * p.scale, x.y * p.scale);
      };
      write_row(c, to, pair, [&](int32_t d) { return from[d] * p.scale; });
    }
    return;
  }
  const T *stored_keys = c.keys_of<T>(p.head(n)), *stored_values = c.values_of<T>(p.head(n));
  const int32_t* ranks = c.ranks + p.head(n) * (c.slots + 1);
  const int32_t length = kept + p.rows, end = p.tiled ? tiles_of(length) * kTile : length;
  for (int32_t i = first; i < end; i += step) {
    const auto key = row_of(p.keys_of<S>(n), i), value = row_of(p.values_of<S>(n), i);
    if (i >= length) {
      clear_row(key), clear_row(value);
      continue;
    }
    if (i < kept) {
      const T *from_key = stored_keys + int64_t{i} * dim, *from_value = stored_values + int64_t{i} * dim;
      const auto pair = [&](int32_t j) {
        const float2 x = make_float2(to_float(from_key[j]), to_float(from_key[j + pairs]));
        return c.text ? x : turned(x, rope.at(ranks[i], j));
      };
      write_row(c, key, pair, [&](int32_t d) { return to_float(from_key[d]); });
      for (int32_t d = lane; d < p.width; d += 32) value.put(d, d < dim ? to_float(from_value[d]) : 0.0f);
      continue;
    }
    const int32_t t = i - kept;
    const float* from_row = p.qkv + int64_t{t} * columns;
    const float *from_key = from_row + p.row.key(n) * dim, *from_value = from_row + p.row.value(n) * dim;
    T *new_key = p.new_keys_of<T>(n) + int64_t{t} * dim, *new_value = p.new_values_of<T>(n) + int64_t{t} * dim;
    const auto pair = [&](int32_t j) {
      const float2 x = source(from_key, j), turn = rope.at(place + t, j), kept_as = rounded<T>(c.text ? turned(x, turn) : x);
      new_key[j] = from_float<T>(kept_as.x), new_key[j + pairs] = from_float<T>(kept_as.y);
      return c.text ? kept_as : turned(kept_as, turn);
    };
    write_row(c, key, pair, [&](int32_t d) { return to_float(new_key[d] = from_float<T>(from_key[d])); });
    for (int32_t d = lane; d < p.width; d += 32) {
      float x = 0.0f;
      if (d < dim) x = to_float(new_value[d] = from_float<T>(from_value[d]));
      value.put(d, x);
    }
  }
}

/** The pairs [i, i + 4) of a row: the four from dimension i on, and those `pairs` further. */
struct Pairs {
  Four<float> low, high;
  __device__ Pairs turned(const RopeView& rope, int64_t position, int32_t i) const {
    Pairs to;
    if (position < rope.positions) {
      const int64_t at = position * rope.pairs + i;
      const Four<float> cosine = four_at(rope.cosines + at), sine = four_at(rope.sines + at);
#pragma unroll
      for (int k = 0; k < 4; k++) to.low.x[k] = low.x[k] * cosine.x[k] - high.x[k] * sine.x[k], to.high.x[k] = high.x[k] * cosine.x[k] + low.x[k] * sine.x[k];
      return to;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float2 both = wkv::turned(make_float2(low.x[k], high.x[k]), rope.at(position, i + k));
      to.low.x[k] = both.x, to.high.x[k] = both.y;
    }
    return to;
  }
};

/** arrive for 16-bit caches whose rows are pairs through and through, a multiple of 4 of them: a thread takes 8 numbers of a row. */
template <typename T>
__global__ void __launch_bounds__(256) arrive_fours_kernel(PrefillView p) {
  wait_for_previous();
  let_next_start();
  const CacheView& c = p.cache;
  const RopeView& rope = c.rope;
  const int32_t which = blockIdx.y, dim = c.head_dim, pairs = rope.pairs, parts = p.width / 8;
  const int32_t n = which < c.heads ? which / c.group() : which - c.heads;
  const Counts& counts = c.counts[p.head(n)];
  const int32_t kept = counts.kept, columns = p.row.columns(dim), length = kept + p.rows;
  const int64_t place = c.text ? counts.steps : kept;
  const auto put = [&](__half* rows, int32_t row, int32_t d, const Four<float>& x) {
    four_at(rows + (p.tiled ? tiled_at(row, d, p.width) : int64_t{row} * p.width + d)) = each<__half>(x, [](float v, int) { return narrowed<__half>(v); });
  };
  const auto put_pairs = [&](__half* rows, int32_t row, int32_t i, const Pairs& x) { put(rows, row, i, x.low), put(rows, row, i + pairs, x.high); };
  const auto source = [&](const float* from, int32_t i) {
    if (!rope.interleaved) return Pairs{four_at(from + i), four_at(from + i + pairs)};
    const Four<float> a = four_at(from + 2 * i), b = four_at(from + 2 * i + 4);
    return Pairs{{a.x[0], a.x[2], b.x[0], b.x[2]}, {a.x[1], a.x[3], b.x[1], b.x[3]}};
  };
  const auto widened = [](const Four<T>& x) { return each<float>(x, [](T v, int) { return to_float(v); }); };
  const auto narrow = [](const Four<float>& x) { return each<T>(x, [](float v, int) { return from_float<T>(v); }); };
  const bool query = which < c.heads;
  const int32_t end = query ? static_cast<int32_t>(p.lines) : p.tiled ? tiles_of(length) * kTile : length, full = query ? p.rows : length;
  for (int64_t item = int64_t{blockIdx.x} * 256 + threadIdx.x; item < int64_t{end} * parts; item += int64_t{gridDim.x} * 256) {
    const int32_t row = static_cast<int32_t>(item / parts), part = static_cast<int32_t>(item % parts), i = part * 4, d = part * 8;
    if (row >= full || d >= dim) {
      // Behind the last row, and behind a row's end.
      for (int32_t o = 0; o < 8; o += 4) {
        if (query) put(p.queries_of<__half>(which), row, d + o, {});
        else put(p.keys_of<__half>(n), row, d + o, {}), put(p.values_of<__half>(n), row, d + o, {});
      }
      continue;
    }
    if (query) {
      Pairs x = source(p.qkv + int64_t{row} * columns + p.row.query(0, which) * dim, i).turned(rope, place + row, i);
#pragma unroll
      for (int k = 0; k < 4; k++) x.low.x[k] *= p.scale, x.high.x[k] *= p.scale;
      put_pairs(p.queries_of<__half>(which), row, i, x);
      continue;
    }
    __half *keys = p.keys_of<__half>(n), *values = p.values_of<__half>(n);
    if (row < kept) {
      const T *key = c.keys_of<T>(p.head(n)) + int64_t{row} * dim, *value = c.values_of<T>(p.head(n)) + int64_t{row} * dim;
      const Pairs x{widened(four_at(key + i)), widened(four_at(key + i + pairs))};
      put_pairs(keys, row, i, c.text ? x : x.turned(rope, c.ranks[p.head(n) * (c.slots + 1) + row], i));
      for (int32_t o = 0; o < 8; o += 4) put(values, row, d + o, widened(four_at(value + d + o)));
      continue;
    }
    const int32_t t = row - kept;
    const float* from_row = p.qkv + int64_t{t} * columns;
    const float *key = from_row + p.row.key(n) * dim, *value = from_row + p.row.value(n) * dim;
    T *new_key = p.new_keys_of<T>(n) + int64_t{t} * dim, *new_value = p.new_values_of<T>(n) + int64_t{t} * dim;
    Pairs x = source(key, i);
    if (c.text) x = x.turned(rope, place + t, i);
    const Four<T> low = narrow(x.low), high = narrow(x.high);
    four_at(new_key + i) = low, four_at(new_key + i + pairs) = high;
    x = {widened(low), widened(high)};
    put_pairs(keys, row, i, c.text ? x : x.turned(rope, place + t, i));
    for (int32_t o = 0; o < 8; o += 4) {
      const Four<T> v = narrow(four_at(value + d + o));
      four_at(new_value + d + o) = v;
      put(values, row, d + o, widened(v));
    }
  }
}

// ---- on tensor cores ----

constexpr int kThreads = 128, kWarps = kThreads / 32;

/** Shared rows are 16 bytes longer than wide, so that the 8 rows that one ldmatrix reads lie in different banks. */
template <int kDim>
constexpr int kStride = kDim + 8;

__device__ inline uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }
__device__ inline void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/** Starts the copy of kRows rows from `from` into shared memory, zeros from row `count` on (of which nothing is read). */
template <int kDim, int kRows>
__device__ void copy_rows(__half* to, const __half* from, int32_t count) {
  constexpr int kParts = kDim / 8, kStep = kThreads / kParts;  // 16 bytes a part; rows a step
  const int32_t row = threadIdx.x / kParts, part = threadIdx.x % kParts;
  const uint32_t to_at = shared_address(to + row * kStride<kDim> + part * 8);
  from += threadIdx.x * 8;
#pragma unroll
  for (int k = 0; k < kRows / kStep; k++) {
    const uint32_t bytes = row + k * kStep < count ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_at + k * kStep * kStride<kDim> * 2), "l"(from + k * kThreads * 8), "r"(bytes) : "memory");
  }
}

/** Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8 and gets (l / 4, 2 (l % 4)) and its right neighbour. */
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}
__device__ inline void load_matrices_across(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}

/** c [16, 8] += a [16, 16] b [16, 8]. Lane l holds c at row l / 4 (0, 1) and l / 4 + 8 (2, 3), columns 2 (l % 4) and the next. */
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/** Where a lane's ldmatrix of a [16, 16] left factor begins: rows 0-7, 8-15, then the same 8 columns on. */
template <int kDim>
__device__ uint32_t left_address(const __half* tile) {
  const int lane = threadIdx.x & 31;
  return shared_address(tile + lane % 16 * kStride<kDim> + lane / 16 * 8);
}
/** The same for two [16, 8] right factors that lie as rows of [16, 16], each row a column: columns 0-7, then 8-15. */
template <int kDim>
__device__ uint32_t right_address(const __half* tile) {
  const int lane = threadIdx.x & 31;
  return shared_address(tile + (lane / 16 * 8 + lane % 8) * kStride<kDim> + lane / 8 % 2 * 8);
}
template <int kDim>
__device__ constexpr uint32_t offset_of(int row, int column) { return (row * kStride<kDim> + column) * 2; }

/** A warp owns kTiles times 16 rows; kKeys entries at a time. */
template <int kDim, int kTiles, int kKeys>
constexpr size_t forward_shared() { return size_t(kTiles * 16 * kWarps + 2 * kKeys) * kStride<kDim> * 2; }

/** kBent: scores may be capped or windowed. */
template <int kDim, int kTiles, int kKeys, bool kBent>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(PrefillView p, Faults faults) {
  extern __shared__ uint4 shared16[];
  wait_for_previous();
  let_next_start();
  constexpr int kRows = kTiles * 16 * kWarps;
  const CacheView& c = p.cache;
  const int32_t warp = threadIdx.x >> 5, lane = threadIdx.x & 31, h = blockIdx.x, n = h / c.group();
  const int32_t t0 = (gridDim.y - 1 - blockIdx.y) * kRows;  // the longest first
  const int32_t kept = c.counts[p.head(n)].kept, length = kept + min(t0 + kRows, p.rows);
  const int32_t warp_t = t0 + warp * kTiles * 16, reach = kept + warp_t;  // the last entry that the warp's first row sees
  __half* q = reinterpret_cast<__half*>(shared16);
  __half *key = q + kRows * kStride<kDim>, *value = key + kKeys * kStride<kDim>;
  const __half *keys = p.keys_of<__half>(n), *values = p.values_of<__half>(n);
  const uint32_t q_at = left_address<kDim>(q + warp * kTiles * 16 * kStride<kDim>), key_at = right_address<kDim>(key);
  const uint32_t value_at = left_address<kDim>(value);  // across, this gives right factors

  copy_rows<kDim, kRows>(q, p.queries_of<__half>(h) + int64_t{t0} * kDim, p.rows - t0);
  copy_rows<kDim, kKeys>(key, keys, length);
  float acc[kTiles][kDim / 8][4] = {}, most[kTiles][2], sum[kTiles][2] = {};
#pragma unroll
  for (int m = 0; m < kTiles; m++) most[m][0] = most[m][1] = -INFINITY;

  for (int32_t first = 0; first < length; first += kKeys) {
    const bool seen = first <= reach + kTiles * 16 - 1;  // by some row of this warp
    float s[kTiles][kKeys / 8][4] = {};
    copy_wait();
    __syncthreads();
    copy_rows<kDim, kKeys>(value, values + int64_t{first} * kDim, length - first);
    if (seen) {
#pragma unroll
      for (int k = 0; k < kDim; k += 16) {
        uint32_t a[kTiles][4];
#pragma unroll
        for (int m = 0; m < kTiles; m++) load_matrices(a[m], q_at + offset_of<kDim>(m * 16, k));
#pragma unroll
        for (int i = 0; i < kKeys / 16; i++) {
          uint32_t b[4];
          load_matrices(b, key_at + offset_of<kDim>(i * 16, k));
#pragma unroll
          for (int m = 0; m < kTiles; m++) multiply(s[m][2 * i], a[m], b[0], b[1]), multiply(s[m][2 * i + 1], a[m], b[2], b[3]);
        }
      }
    }
    copy_wait();
    __syncthreads();
    if (first + kKeys < length) copy_rows<kDim, kKeys>(key, keys + int64_t{first + kKeys} * kDim, length - first - kKeys);
    if (!seen) continue;
    if constexpr (kBent) {
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
#pragma unroll
        for (int i = 0; i < kKeys / 8; i++) {
#pragma unroll
          for (int x = 0; x < 4; x++) s[m][i][x] = p.bend(s[m][i][x], n, kept, min(first + i * 8 + lane % 4 * 2 + x % 2, length - 1), warp_t + m * 16 + x / 2 * 8 + lane / 4);
        }
      }
    }
    if (first + kKeys - 1 > reach) {
      const int32_t ahead = reach - first + lane / 4 - lane % 4 * 2;
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
#pragma unroll
        for (int i = 0; i < kKeys / 8; i++) {
#pragma unroll
          for (int x = 0; x < 4; x++) {
            if (i * 8 + x % 2 > ahead + m * 16 + x / 2 * 8) s[m][i][x] = -INFINITY;
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        // The first entry has a finite score for every row, so `highest` is finite; rows past the end are never written.
        float highest = most[m][r];
#pragma unroll
        for (int i = 0; i < kKeys / 8; i++) highest = fmaxf(highest, fmaxf(s[m][i][2 * r], s[m][i][2 * r + 1]));
        highest = quad_max(highest);
        const float shrink = power_of_2(most[m][r] - highest);
        most[m][r] = highest;
        float add = 0.0f;
#pragma unroll
        for (int i = 0; i < kKeys / 8; i++) {
          s[m][i][2 * r] = power_of_2(s[m][i][2 * r] - highest);
          s[m][i][2 * r + 1] = power_of_2(s[m][i][2 * r + 1] - highest);
          add += s[m][i][2 * r] + s[m][i][2 * r + 1];
        }
        sum[m][r] = sum[m][r] * shrink + add;
#pragma unroll
        for (int i = 0; i < kDim / 8; i++) acc[m][i][2 * r] *= shrink, acc[m][i][2 * r + 1] *= shrink;
      }
    }
#pragma unroll
    for (int k = 0; k < kKeys / 16; k++) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
        const float(&left)[4] = s[m][2 * k], (&right)[4] = s[m][2 * k + 1];
        a[m][0] = packed(left[0], left[1]), a[m][1] = packed(left[2], left[3]), a[m][2] = packed(right[0], right[1]), a[m][3] = packed(right[2], right[3]);
      }
#pragma unroll
      for (int i = 0; i < kDim / 16; i++) {
        uint32_t b[4];
        load_matrices_across(b, value_at + offset_of<kDim>(k * 16, i * 16));
#pragma unroll
        for (int m = 0; m < kTiles; m++) multiply(acc[m][2 * i], a[m], b[0], b[1]), multiply(acc[m][2 * i + 1], a[m], b[2], b[3]);
      }
    }
  }

#pragma unroll
  for (int m = 0; m < kTiles; m++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int32_t t = warp_t + lane / 4 + m * 16 + r * 8;
      const float total = quad_sum(sum[m][r]), inverse = 1.0f / total;
      if (t >= p.rows) continue;
      if (lane % 4 == 0) {
        p.lse[int64_t{h} * p.lines + t] = most[m][r] + log2f(total);
        if (!is_sum(total)) faults.report(Fault::NanAttention, p.layer);
      }
      float* out = p.out_of(t, h);
#pragma unroll
      for (int i = 0; i < kDim / 8; i++) {
        const int32_t d = i * 8 + lane % 4 * 2;
        if (d < c.head_dim) *reinterpret_cast<float2*>(out + d) = make_float2(acc[m][i][2 * r] * inverse, acc[m][i][2 * r + 1] * inverse);
      }
    }
  }
}

constexpr int kQueries = 64;  // rows that the columns take at a time
template <int kDim>
constexpr size_t columns_shared() { return size_t(2 * kQueries) * kStride<kDim> * 2 + 2 * kQueries * 4; }

/** A warp holds kTiles times 16 entries in registers. The scores come out across: a row of c is an entry, a column a query. */
template <int kDim, int kTiles, bool kBent>
__global__ void __launch_bounds__(kThreads) columns_kernel(PrefillView p) {
  extern __shared__ uint4 shared16[];
  wait_for_previous();
  let_next_start();
  constexpr int kEntries = kTiles * 16 * kWarps;
  static_assert(kEntries <= 2 * kQueries, "the entries pass through the queries' memory");
  const CacheView& c = p.cache;
  const int32_t warp = threadIdx.x >> 5, lane = threadIdx.x & 31, h = blockIdx.x, n = h / c.group();
  const int32_t kept = c.counts[p.head(n)].kept, length = kept + p.rows;
  __half* tiles = reinterpret_cast<__half*>(shared16);  // [2, kQueries]
  float* lse = reinterpret_cast<float*>(tiles + 2 * kQueries * kStride<kDim>);
  const __half* queries = p.queries_of<__half>(h);
  const auto lse_of = [&](int32_t t) { return t < p.rows ? p.lse[int64_t{h} * p.lines + t] : INFINITY; };  // a row past the end weighs nothing

  for (int32_t first = blockIdx.y * kEntries; first < length; first += gridDim.y * kEntries) {
    const int32_t own = first + warp * kTiles * 16 + lane / 4;
    uint32_t key[kTiles][kDim / 16][4];
    __syncthreads();
    copy_rows<kDim, kEntries>(tiles, p.keys_of<__half>(n) + int64_t{first} * kDim, length - first);
    copy_wait();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
#pragma unroll
      for (int k = 0; k < kDim / 16; k++) load_matrices(key[m][k], left_address<kDim>(tiles + (warp * kTiles + m) * 16 * kStride<kDim>) + offset_of<kDim>(0, k * 16));
    }
    __syncthreads();

    float total[kTiles][2] = {};
    int32_t t0 = max(0, first - kept) / kQueries * kQueries, turn = 0;
    copy_rows<kDim, kQueries>(tiles, queries + int64_t{t0} * kDim, p.rows - t0);
    if (threadIdx.x < kQueries) lse[threadIdx.x] = lse_of(t0 + threadIdx.x);
    for (; t0 < p.rows; t0 += kQueries, turn ^= 1) {
      copy_wait();
      __syncthreads();
      const int32_t next = t0 + kQueries;
      float next_lse = 0.0f;
      if (next < p.rows) {
        copy_rows<kDim, kQueries>(tiles + (turn ^ 1) * kQueries * kStride<kDim>, queries + int64_t{next} * kDim, p.rows - next);
        if (threadIdx.x < kQueries) next_lse = lse_of(next + threadIdx.x);
      }
      const uint32_t query_at = right_address<kDim>(tiles + turn * kQueries * kStride<kDim>);
      const bool all_seen = first + kEntries - 1 <= kept + t0;
#pragma unroll
      for (int q0 = 0; q0 < kQueries; q0 += 32) {
        float s[kTiles][4][4] = {};
#pragma unroll
        for (int k = 0; k < kDim / 16; k++) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            uint32_t b[4];
            load_matrices(b, query_at + offset_of<kDim>(q0 + i * 16, k * 16));
#pragma unroll
            for (int m = 0; m < kTiles; m++) multiply(s[m][2 * i], key[m][k], b[0], b[1]), multiply(s[m][2 * i + 1], key[m][k], b[2], b[3]);
          }
        }
        if constexpr (kBent) {
#pragma unroll
          for (int m = 0; m < kTiles; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
              for (int x = 0; x < 4; x++) s[m][i][x] = p.bend(s[m][i][x], n, kept, min(own + m * 16 + x / 2 * 8, length - 1), t0 + q0 + i * 8 + lane % 4 * 2 + x % 2);
            }
          }
        }
        if (!all_seen) {
#pragma unroll
          for (int m = 0; m < kTiles; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
              for (int x = 0; x < 4; x++) {
                if (own + m * 16 + x / 2 * 8 > kept + t0 + q0 + i * 8 + lane % 4 * 2 + x % 2) s[m][i][x] = -INFINITY;
              }
            }
          }
        }
        float add[kTiles][2] = {};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float2 l = *reinterpret_cast<const float2*>(lse + turn * kQueries + q0 + i * 8 + lane % 4 * 2);
#pragma unroll
          for (int m = 0; m < kTiles; m++) {
            add[m][0] += power_of_2(s[m][i][0] - l.x) + power_of_2(s[m][i][1] - l.y);
            add[m][1] += power_of_2(s[m][i][2] - l.x) + power_of_2(s[m][i][3] - l.y);
          }
        }
#pragma unroll
        for (int m = 0; m < kTiles; m++) total[m][0] += add[m][0], total[m][1] += add[m][1];
      }
      if (threadIdx.x < kQueries) lse[(turn ^ 1) * kQueries + threadIdx.x] = next_lse;
    }
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int32_t entry = own + m * 16 + r * 8;
        const float sum = quad_sum(total[m][r]);
        if (lane % 4 == 0 && entry < length) p.columns[h * p.entries + entry] = sum;
      }
    }
  }
}

// ---- in f32 ----

constexpr int kSide = 64, kDepth = 32;           // a block takes 64 rows and 64 entries at a time, 32 dimensions of them
constexpr int kFactor = kSide * (kDepth + 4);    // floats of one factor

/** A block has 16 x 16 threads; thread (y, x) gets the scores of rows 4 y + i and entries x + 16 j. */
__device__ void exact_scores(float (&s)[4][4], float* area, const float* queries, int32_t rows, const float* keys, int32_t entries, int32_t width) {
  float *q = area, *k = area + kFactor;
  const int32_t y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll
  for (int i = 0; i < 4; i++) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.0f;
  for (int32_t d0 = 0; d0 < width; d0 += kDepth) {
    __syncthreads();
#pragma unroll
    for (int part = 0; part < kSide * kDepth / 4 / 256; part++) {
      const int32_t i = threadIdx.x + part * 256, row = i / (kDepth / 4), d = i % (kDepth / 4) * 4;
      const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      *reinterpret_cast<float4*>(q + row * (kDepth + 4) + d) = row < rows ? *reinterpret_cast<const float4*>(queries + int64_t{row} * width + d0 + d) : zero;
      *reinterpret_cast<float4*>(k + row * (kDepth + 4) + d) = row < entries ? *reinterpret_cast<const float4*>(keys + int64_t{row} * width + d0 + d) : zero;
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; d += 4) {
      float4 a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        a[i] = *reinterpret_cast<const float4*>(q + (4 * y + i) * (kDepth + 4) + d);
        b[i] = *reinterpret_cast<const float4*>(k + (x + 16 * i) * (kDepth + 4) + d);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) s[i][j] = fmaf(a[i].x, b[j].x, fmaf(a[i].y, b[j].y, fmaf(a[i].z, b[j].z, fmaf(a[i].w, b[j].w, s[i][j]))));
      }
    }
  }
}

/** kParts: how often 64 dimensions fit the width, or more. */
template <int kParts>
__global__ void __launch_bounds__(256) exact_forward_kernel(PrefillView p, Faults faults) {
  __shared__ __align__(16) float area[2 * kFactor];  // of exact_scores, then 64 x 64 of the values
  __shared__ __align__(16) float weights[kSide][kSide + 4];
  wait_for_previous();
  let_next_start();
  const CacheView& c = p.cache;
  const int32_t y = threadIdx.x / 16, x = threadIdx.x % 16, h = blockIdx.x, n = h / c.group();
  const int32_t t0 = (gridDim.y - 1 - blockIdx.y) * kSide, kept = c.counts[p.head(n)].kept, length = kept + min(t0 + kSide, p.rows);
  const float *queries = p.queries_of<float>(h) + int64_t{t0} * p.width, *keys = p.keys_of<float>(n), *values = p.values_of<float>(n);
  float acc[kParts][4][4] = {}, most[4], sum[4] = {};
#pragma unroll
  for (int i = 0; i < 4; i++) most[i] = -INFINITY;
  for (int32_t first = 0; first < length; first += kSide) {
    float s[4][4], shrink[4];
    exact_scores(s, area, queries, p.rows - t0, keys + int64_t{first} * p.width, length - first, p.width);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float highest = most[i], add = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int32_t entry = first + x + 16 * j, t = t0 + 4 * y + i;
        if (p.bent()) s[i][j] = p.bend(s[i][j], n, kept, min(entry, length - 1), t);
        if (entry > kept + t) s[i][j] = -INFINITY;
        highest = fmaxf(highest, s[i][j]);
      }
#pragma unroll
      for (int o = 8; o > 0; o >>= 1) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, o));
      // The first entry has a finite score for every row, so `highest` is finite; rows past the end are never written.
      shrink[i] = exp2f(most[i] - highest);
      most[i] = highest;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float w = exp2f(s[i][j] - highest);
        weights[4 * y + i][x + 16 * j] = w;
        add += w;
      }
      sum[i] = sum[i] * shrink[i] + add;
    }
#pragma unroll
    for (int part = 0; part < kParts; part++) {
      if (part * 64 >= p.width) break;
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kSide * 16 / 256; k++) {
        const int32_t row = y + k * 16;
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (first + row < length) v = *reinterpret_cast<const float4*>(values + int64_t{first + row} * p.width + part * 64 + x * 4);
        *reinterpret_cast<float4*>(area + row * 64 + x * 4) = v;
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int d = 0; d < 4; d++) acc[part][i][d] *= shrink[i];
      }
#pragma unroll 4
      for (int j = 0; j < kSide; j += 4) {
        float4 w[4], v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          w[i] = *reinterpret_cast<const float4*>(&weights[4 * y + i][j]);
          v[i] = *reinterpret_cast<const float4*>(area + (j + i) * 64 + x * 4);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const auto add = [&](float weight, const float4& row) {
            acc[part][i][0] = fmaf(weight, row.x, acc[part][i][0]), acc[part][i][1] = fmaf(weight, row.y, acc[part][i][1]);
            acc[part][i][2] = fmaf(weight, row.z, acc[part][i][2]), acc[part][i][3] = fmaf(weight, row.w, acc[part][i][3]);
          };
          add(w[i].x, v[0]), add(w[i].y, v[1]), add(w[i].z, v[2]), add(w[i].w, v[3]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float total = sum[i];
#pragma unroll
    for (int o = 8; o > 0; o >>= 1) total += __shfl_xor_sync(0xffffffffu, total, o);
    const int32_t t = t0 + 4 * y + i;
    if (t >= p.rows) continue;
    if (x == 0) {
      p.lse[int64_t{h} * p.lines + t] = most[i] + log2f(total);
      if (!is_sum(total)) faults.report(Fault::NanAttention, p.layer);
    }
#pragma unroll
    for (int part = 0; part < kParts; part++) {
#pragma unroll
      for (int d = 0; d < 4; d++) {
        const int32_t column = part * 64 + x * 4 + d;
        if (column < c.head_dim) p.out_of(t, h)[column] = acc[part][i][d] / total;
      }
    }
  }
}

__global__ void __launch_bounds__(256) exact_columns_kernel(PrefillView p) {
  __shared__ __align__(16) float area[2 * kFactor];  // of exact_scores, then 16 x 64 sums
  wait_for_previous();
  let_next_start();
  const CacheView& c = p.cache;
  const int32_t y = threadIdx.x / 16, x = threadIdx.x % 16, h = blockIdx.x, n = h / c.group();
  const int32_t kept = c.counts[p.head(n)].kept, length = kept + p.rows;
  for (int32_t first = blockIdx.y * kSide; first < length; first += gridDim.y * kSide) {
    float total[4] = {};
    for (int32_t t0 = max(0, first - kept) / kSide * kSide; t0 < p.rows; t0 += kSide) {
      float s[4][4], add[4] = {};
      exact_scores(s, area, p.queries_of<float>(h) + int64_t{t0} * p.width, p.rows - t0, p.keys_of<float>(n) + int64_t{first} * p.width, length - first, p.width);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int32_t t = t0 + 4 * y + i;
        if (t >= p.rows) continue;
        const float lse = p.lse[int64_t{h} * p.lines + t];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int32_t entry = first + x + 16 * j;
          if (entry > kept + t) continue;
          if (p.bent()) s[i][j] = p.bend(s[i][j], n, kept, entry, t);
          add[j] += exp2f(s[i][j] - lse);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; j++) total[j] += add[j];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 4; j++) area[y * kSide + x + 16 * j] = total[j];
    __syncthreads();
    if (threadIdx.x < kSide && first + threadIdx.x < length) {
      float sum = 0.0f;
      for (int i = 0; i < 16; i++) sum += area[i * kSide + threadIdx.x];
      p.columns[h * p.entries + first + threadIdx.x] = sum;
    }
  }
}

// ---- settle ----

/** The scores with what the columns add, and the rest of each entry's state; a thread owns an entry. */
__global__ void __launch_bounds__(256) join_kernel(PrefillView p) {
  wait_for_previous();
  let_next_start();
  const CacheView& c = p.cache;
  const int32_t n = blockIdx.y, i = blockIdx.x * 256 + threadIdx.x;
  const Counts& counts = c.counts[p.head(n)];
  const int32_t kept = counts.kept;
  if (i >= kept + p.rows) return;
  const bool cached = i < kept;
  const Entries own = c.entries(p.head(n)), e = p.entries_of(n);
  float sum = 0.0f;
  for (int32_t g = 0; g < c.group(); g++) sum += p.columns[(n * c.group() + g) * p.entries + i];
  e.score[i] = (cached ? own.score[i] : 0.0f) + sum / static_cast<float>(c.group());
  e.birth[i] = cached ? own.birth[i] : counts.steps + 1 + i - kept;
  e.rank[i] = cached ? own.rank[i] : i;
  for (int32_t w = 0; w < c.width; w++) e.words[w * e.stride + i] = cached ? own.words[w * own.stride + i] : 0;
}

template <typename T>
__global__ void __launch_bounds__(512) settle_kernel(PrefillView p, Faults faults) {
  __shared__ SettleArea area;
  wait_for_previous();
  let_next_start();
  const CacheView& c = p.cache;
  const int32_t n = blockIdx.x;
  const int64_t head = p.head(n);
  Counts& counts = c.counts[head];
  const int32_t kept = counts.kept, steps = counts.steps;
  __syncthreads();
  if (threadIdx.x == 0) counts.steps = steps + p.rows, p.places_of(n)[0] = -1;
  __syncthreads();
  settle<T>(c, head, p.entries_of(n), kept, p.rows, p.new_keys_of<T>(n), p.new_values_of<T>(n), -1, faults, area, p.order + n * Leaving<T>::kScratch * p.entries, p.places_of(n));
}

constexpr int kPlaced = 8;  // entries of a warp

/** Writes what settle left of the entries to the cache: the state of those that lie there, state and rows of the others. */
template <typename T>
__global__ void __launch_bounds__(256) place_kernel(PrefillView p) {
  wait_for_previous();
  let_next_start();
  const CacheView& c = p.cache;
  const int32_t n = blockIdx.y, lane = threadIdx.x & 31, first = (blockIdx.x * 8 + threadIdx.x / 32) * kPlaced;
  const int32_t *places = p.places_of(n), kept = places[0], total = kept + p.rows;
  if (kept < 0 || first >= total) return;
  const Entries own = c.entries(p.head(n)), e = p.entries_of(n);
  int32_t to = -1;
  if (lane < kPlaced && first + lane < total) {
    const int32_t i = first + lane, rank = e.rank[i];
    to = i >= kept ? places[1 + i - kept] : rank >= 0 ? i : -1;
    if (to >= 0) {
      own.score[to] = e.score[i], own.birth[to] = e.birth[i], own.rank[to] = rank;
      for (int32_t w = 0; w < c.width; w++) own.words[w * own.stride + to] = e.words[w * e.stride + i];
    }
  }
  const auto copy = [&](auto word) {
    using Word = decltype(word);
    const int32_t words = static_cast<int32_t>(c.head_dim * sizeof(T) / sizeof(Word));
    const Word *keys = reinterpret_cast<const Word*>(p.new_keys_of<T>(n)), *values = reinterpret_cast<const Word*>(p.new_values_of<T>(n));
    Word *to_keys = reinterpret_cast<Word*>(c.keys_of<T>(p.head(n))), *to_values = reinterpret_cast<Word*>(c.values_of<T>(p.head(n)));
    for (int32_t i = 0; i < kPlaced; i++) {
      const int32_t slot = __shfl_sync(0xffffffffu, to, i), t = first + i - kept;
      if (slot < 0 || t < 0) continue;
      for (int32_t d = lane; d < 2 * words; d += 32) {
        const bool value = d >= words;
        const int64_t at = d - (value ? words : 0);
        (value ? to_values : to_keys)[int64_t{slot} * words + at] = (value ? values : keys)[int64_t{t} * words + at];
      }
    }
  };
  if (c.head_dim * sizeof(T) % 16 == 0) copy(uint4());
  else copy(T());
}

// ---- launches ----

/** Blocks of `size` entries of each query head: no more than keep the chip busy, as all but `kept`, which only the device knows, may be
 *  empty. A block takes every gridDim.y-th. */
dim3 entry_blocks(const PrefillView& p, int32_t size) {
  return dim3(p.cache.heads, std::min(divide_up(p.entries, size), divide_up(2048, p.cache.heads)));
}

template <typename T, typename S>
void arrive(Context& ctx, const PrefillView& p) {
  const RopeView& rope = p.cache.rope;
  if constexpr (sizeof(T) == 2 && std::is_same_v<S, __half>) {
    if (rope.pairs % 4 == 0 && 2 * rope.pairs == p.cache.head_dim) {
      return launch(ctx, arrive_fours_kernel<T>, {dim3(std::min(divide_up(p.entries, 16), 64), p.cache.heads + p.cache.kv_heads), 256}, p);
    }
  }
  launch(ctx, arrive_kernel<T, S>, {dim3(std::min(divide_up(p.entries, 32), 64), p.cache.heads + p.cache.kv_heads), 256}, p);
}

template <int kDim, int kTiles, int kKeys, bool kBent>
void forward(Context& ctx, const PrefillView& p) {
  const dim3 grid(p.cache.heads, divide_up(p.rows, kTiles * 16 * kWarps));
  launch(ctx, forward_kernel<kDim, kTiles, kKeys, kBent>, {grid, kThreads, forward_shared<kDim, kTiles, kKeys>()}, p, ctx.faults());
}

template <int kDim, int kTiles, bool kBent>
void columns(Context& ctx, const PrefillView& p) {
  launch(ctx, columns_kernel<kDim, kTiles, kBent>, {entry_blocks(p, kTiles * 16 * kWarps), kThreads, columns_shared<kDim>()}, p);
}

/** Blocks of 64 rows where those of 128 would leave multiprocessors idle, or where scores are bent, which takes registers. */
template <int kDim>
void attend(Context& ctx, const PrefillView& p) {
  constexpr int kKeys = kDim > 128 ? 32 : 64, kTiles = kDim > 128 ? 1 : 2;
  if (p.bent()) return forward<kDim, 1, kKeys, true>(ctx, p), columns<kDim, 1, true>(ctx, p);
  if (int64_t{divide_up(p.rows, 128)} * p.cache.heads < 2 * ctx.processors) forward<kDim, 1, kKeys, false>(ctx, p);
  else forward<kDim, kTiles, kKeys, false>(ctx, p);
  columns<kDim, kTiles, false>(ctx, p);
}

template <int kParts>
void attend_exactly(Context& ctx, const PrefillView& p) {
  launch(ctx, exact_forward_kernel<kParts>, {dim3(p.cache.heads, divide_up(p.rows, kSide)), 256}, p, ctx.faults());
  launch(ctx, exact_columns_kernel, {entry_blocks(p, kSide), 256}, p);
}

bool is_exact(const Cache& cache) { return cache.dtype == WKV_F32 || cache.head_dim > 256; }

int32_t width_of(const Cache& cache) {
  if (is_exact(cache)) return divide_up(cache.head_dim, 64) * 64;
  return cache.head_dim <= 64 ? 64 : cache.head_dim <= 128 ? 128 : 256;
}

template <typename T>
void run(Context& ctx, const Cache& cache, const PrefillView& p) {
  if (is_exact(cache)) {
    arrive<T, float>(ctx, p);
    if (p.width <= 128) attend_exactly<2>(ctx, p);
    else attend_exactly<8>(ctx, p);
  } else if constexpr (!std::is_same_v<T, float>) {
    arrive<T, __half>(ctx, p);
    if (p.tiled) attend_wgmma(ctx, p);
    else if (p.width == 64) attend<64>(ctx, p);
    else if (p.width == 128) attend<128>(ctx, p);
    else attend<256>(ctx, p);
  }
  launch(ctx, join_kernel, {dim3(divide_up(p.entries, 256), cache.kv_heads), 256}, p);
  launch(ctx, settle_kernel<T>, {cache.kv_heads, 512}, p, ctx.faults());
  launch(ctx, place_kernel<T>, {dim3(divide_up(p.entries, 8 * kPlaced), cache.kv_heads), 256}, p);
}

}  // namespace
}  // namespace wkv

using namespace wkv;

int32_t wkv_prefill(int32_t context, int32_t handle, int32_t layer, int32_t kv_head, int32_t sequence, int32_t out, int32_t qkv, int32_t rows, float scale, float softcap, int32_t window) {
  return entry(context, [&](Context& ctx) {
    const CacheRef cache = find_cache(context, handle, layer);
    require(sequence >= 0 && sequence < cache->sequences, "sequence must be between 0 and " + std::to_string(cache->sequences - 1) + ": " + std::to_string(sequence));
    require(rows >= 1, "rows must be at least 1: " + std::to_string(rows));
    check_softcap(softcap);
    require(window >= 0, "window must be at least 0: " + std::to_string(window));
    require(!wkv_by_step(cache->select), "this policy keeps a record of each step's weights: feed its tokens one by one");
    const TensorRef to = find_tensor(context, out, "out", WKV_F32, rows, -1);
    const RowHeads row = cache->row_heads(to->columns, kv_head);
    const TensorRef from = find_tensor(context, qkv, "qkv", WKV_F32, rows, row.columns(cache->head_dim));
    ctx.hold(cache, from, to);
    PrefillView p{};
    p.cache = cache->view(layer);
    p.row = row;
    p.layer = layer;
    p.sequence = sequence;
    p.rows = rows;
    p.qkv = from->f32();
    p.out = to->f32();
    p.width = width_of(*cache);
    p.scale = scale * kPerLn2;
    p.softcap = softcap * kPerLn2;
    p.window = window;
    p.tiled = !is_exact(*cache) && wgmma_takes(ctx, p);
    p.entries = int64_t{cache->slots} + rows;
    p.lines = rows;
    if (p.tiled) p.entries = int64_t{tiles_of(p.entries)} * kTile, p.lines = int64_t{tiles_of(rows)} * kTile;
    // Cut the scratch memory: once to know its size, once to have it.
    uint8_t* scratch = nullptr;
    for (int pass = 0; pass < 2; pass++) {
      size_t bytes = 0;
      const auto take = [&](int64_t count, int64_t size) {
        uint8_t* part = scratch + bytes;
        bytes += round_up(size_t(count * size));
        return part;
      };
      const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count, 4)); };
      const auto ints = [&](int64_t count) { return reinterpret_cast<int32_t*>(take(count, 4)); };
      const int64_t states = cache->kv_heads * p.entries;
      const int64_t wide = int64_t{p.width} * (is_exact(*cache) ? 4 : 2);
      p.q = take(cache->heads * p.lines, wide);
      p.keys = take(states, wide);
      p.values = take(states, wide);
      p.new_keys = take(int64_t{cache->kv_heads} * rows, cache->row_bytes());
      p.new_values = take(int64_t{cache->kv_heads} * rows, cache->row_bytes());
      p.lse = floats(cache->heads * p.lines);
      p.columns = floats(cache->heads * p.entries);
      p.score = floats(states);
      p.by_rank = floats(states);
      p.measure = floats(states);
      p.words = reinterpret_cast<uint32_t*>(ints(states * cache->width()));
      p.birth = ints(states);
      p.rank = ints(states);
      p.freed = ints(states);
      p.order = ints(states * Leaving<float>::kScratch);
      p.places = ints(cache->kv_heads * (int64_t{rows} + 1));
      if (pass == 0) scratch = ctx.reserve(bytes);
    }
    by_cache_type(cache->dtype, [&](auto type) { run<decltype(type)>(ctx, *cache, p); });
    cache->touch(ctx, layer);
    ctx.submitted();
  });
}
