/**
 * prefill_wgmma.cu: prefill.cu's forward and columns for GPUs with wgmma (sm_90a), heads of 64 or 128 dimensions, scores as they are.
 *
 * A block has two warpgroups that compute, 64 rows each, and a warp that brings tiles to shared memory, each as one bulk copy: scratch
 * already lies as wgmma reads it (tiled_at).
 * forward: a block owns 128 rows of one query head and walks over the entries, 128 at a time. A warpgroup has the next scores computed
 * and the last weights multiplied with their values at once; the warpgroups take turns, so that one computes weights while the tensor
 * cores work for the other. Weights are under a reference that follows the row's highest score at a distance of 2^8 at most, so sums are
 * seldom rescaled.
 * columns: a block owns 128 entries for one query head and walks over the rows that see them, 128 at a time; the next tile's scores are
 * computed while a tile's weights are added up.
 * FLOPs of rows^2 / 2 causal pairs: 4 D a pair and query head forward, 2 D in columns. Bytes moved: K and V, or q, once a block, mostly
 * from the second-level cache: 64 KB and 32 KB for 128 x 128 pairs.
 * Tried and left: a third stage of tiles forward, and no turns (6% slower at 32,768 rows); in columns some powers of 2 by a polynomial, to
 * spare the special function units (5% to 15% slower).
 */
#include "cluster.cuh"
#include "prefill.cuh"

namespace wkv {
namespace {

constexpr int kGroups = 2, kComputing = kGroups * 128, kAllThreads = kComputing + 128;  // registers change hands by warpgroups

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/** Registers of a thread of the warpgroup that brings tiles, and of the others. */
__device__ inline void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 24;"); }
__device__ inline void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 240;"); }
/** Named barriers of the two warpgroups. */
__device__ inline void turn_wait(int which) { asm volatile("bar.sync %0, %1;" ::"r"(which + 1), "n"(kComputing) : "memory"); }
__device__ inline void turn_give(int which) { asm volatile("bar.arrive %0, %1;" ::"r"(which + 1), "n"(kComputing) : "memory"); }

// ---- wgmma ----

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/** Waits until all but the last kLeft groups of products have been computed. */
template <int kLeft>
__device__ inline void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory"); }
/** Keeps the compiler from moving what reads or writes registers of products across. */
template <int kCount>
__device__ inline void hold(float (&c)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])::"memory");
}

/** Describes a tile to wgmma: swizzled by 128 bytes; `leading` bytes between pieces of 64 columns (of a factor that lies across), `stride`
 *  between eights of rows. */
__device__ inline uint64_t described(const void* tile, uint32_t leading, uint32_t stride) {
  return uint64_t{(shared_address(tile) & 0x3ffff) >> 4} | uint64_t{leading >> 4} << 16 | uint64_t{stride >> 4} << 32 | uint64_t{1} << 62;
}

#define WKV_C4(c, i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define WKV_C32(c) WKV_C4(c, 0), WKV_C4(c, 1), WKV_C4(c, 2), WKV_C4(c, 3), WKV_C4(c, 4), WKV_C4(c, 5), WKV_C4(c, 6), WKV_C4(c, 7)
#define WKV_C64(c) WKV_C32(c), WKV_C4(c, 8), WKV_C4(c, 9), WKV_C4(c, 10), WKV_C4(c, 11), WKV_C4(c, 12), WKV_C4(c, 13), WKV_C4(c, 14), WKV_C4(c, 15)
#define WKV_R32 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, " \
  "%29, %30, %31"
#define WKV_R64 \
  WKV_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, " \
  "%57, %58, %59, %60, %61, %62, %63"

/** c [64, 128] = a b^T (+ c): 16 columns of a [64, .] and b [128, .]. */
__device__ inline void multiply(float (&c)[16][4], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " WKV_R64 "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
      : WKV_C64(c)
      : "l"(a), "l"(b), "r"(int32_t{add}));
}
/** c [64, 128 or 64] += a b: a [64, 16] in registers, b 16 rows that lie across. */
__device__ inline void multiply_across(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " WKV_R64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
               : WKV_C64(c)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ inline void multiply_across(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " WKV_R32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
               : WKV_C32(c)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/** Starts s [64, 128] = a b^T for tiles of kDim columns; `a` describes 64 rows, `b` 128. */
template <int kDim>
__device__ inline void start_scores(float (&s)[16][4], uint64_t a, uint64_t b) {
#pragma unroll
  for (int k = 0; k < kDim / 16; k++) {
    const uint64_t on = k / 4 * 64 + k % 4 * 2;  // 64 columns are a piece of 1024 bytes, 16 of them 32 bytes
    multiply(s, a + on, b + on, k > 0);
  }
}

#endif  // sm_90a

// ---- forward ----

constexpr int kForwardStages = 2;
template <int kDim>
constexpr size_t forward_shared() { return size_t(1 + 2 * kForwardStages) * kTile * kDim * 2 + 1024; }

template <int kDim>
__global__ void __launch_bounds__(kAllThreads, 1) forward_kernel(PrefillView p, Faults faults) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared8[];
  __shared__ uint64_t q_full, key_full[kForwardStages], key_empty[kForwardStages], value_full[kForwardStages], value_empty[kForwardStages];
  constexpr uint32_t kBytes = kTile * kDim * 2, kEight = kDim * 16;  // of a tile, and of 8 rows of it
  uint8_t* const q = shared8 + (-shared_address(shared8) & 1023);
  uint8_t *const key = q + kBytes, *const value = key + kForwardStages * kBytes;
  const int32_t warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    open_barrier(&q_full, 1);
    for (int i = 0; i < kForwardStages; i++) open_barrier(&key_full[i], 1), open_barrier(&value_full[i], 1), open_barrier(&key_empty[i], kComputing / 32), open_barrier(&value_empty[i], kComputing / 32);
    barriers_opened();
  }
  __syncthreads();
  wait_for_previous();
  let_next_start();
  const CacheView& c = p.cache;
  const int32_t h = blockIdx.x, n = h / c.group(), t0 = (gridDim.y - 1 - blockIdx.y) * kTile;  // the longest first
  const int32_t kept = c.counts[p.head(n)].kept, tiles = tiles_of(kept + min(t0 + kTile, p.rows));
  if (warp >= kComputing / 32) {
    give_registers();
    if (threadIdx.x != kComputing) return;
    const uint8_t *keys = reinterpret_cast<const uint8_t*>(p.keys_of<__half>(n)), *values = reinterpret_cast<const uint8_t*>(p.values_of<__half>(n));
    expect(&q_full, kBytes);
    copy_bulk(q, p.queries_of<__half>(h) + int64_t{t0} * kDim, kBytes, &q_full);
    for (int32_t i = 0; i < tiles; i++) {
      const int32_t stage = i % kForwardStages;
      const uint32_t parity = i / kForwardStages % 2 ^ 1;
      await(&key_empty[stage], parity);
      expect(&key_full[stage], kBytes);
      copy_bulk(key + stage * kBytes, keys + int64_t{i} * kBytes, kBytes, &key_full[stage]);
      await(&value_empty[stage], parity);
      expect(&value_full[stage], kBytes);
      copy_bulk(value + stage * kBytes, values + int64_t{i} * kBytes, kBytes, &value_full[stage]);
    }
    return;
  }

  take_registers();
  const int32_t group = warp / 4, first_t = t0 + group * 64, own_t = first_t + warp % 4 * 16 + lane / 4;
  const uint64_t q_at = described(q + group * 8 * kEight, 0, kEight), key_at = described(key, 0, kEight), value_at = described(value, 1024, kEight);
  float acc[kDim / 8][4] = {}, s[kTile / 8][4], most[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  uint32_t weights[kTile / 16][4];

  // What the scores of a tile come to: in s weights under `most`; gives what earlier ones shrink by.
  const auto weigh = [&](int32_t i, float (&shrink)[2]) {
    if (i * kTile + kTile - 1 > kept + first_t) {
      const int32_t ahead = kept + own_t - i * kTile - lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kTile / 8; j++) {
#pragma unroll
        for (int x = 0; x < 4; x++) {
          if (j * 8 + x % 2 > ahead + x / 2 * 8) s[j][x] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float highest = s[0][2 * r];
#pragma unroll
      for (int j = 0; j < kTile / 8; j++) highest = fmaxf(highest, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      highest = quad_max(highest);
      // The first entry has a finite score for every row, so this becomes finite with the first tile.
      const float reference = highest > most[r] + 8.0f ? highest : most[r];
      shrink[r] = power_of_2(most[r] - reference);
      most[r] = reference;
      float add = 0.0f;
#pragma unroll
      for (int j = 0; j < kTile / 8; j++) {
        s[j][2 * r] = power_of_2(s[j][2 * r] - reference);
        s[j][2 * r + 1] = power_of_2(s[j][2 * r + 1] - reference);
        add += s[j][2 * r] + s[j][2 * r + 1];
      }
      sum[r] = sum[r] * shrink[r] + add;
    }
  };
  const auto pack = [&] {
#pragma unroll
    for (int k = 0; k < kTile / 16; k++) {
      const float(&left)[4] = s[2 * k], (&right)[4] = s[2 * k + 1];
      weights[k][0] = packed(left[0], left[1]), weights[k][1] = packed(left[2], left[3]), weights[k][2] = packed(right[0], right[1]), weights[k][3] = packed(right[2], right[3]);
    }
  };
  const auto start_values = [&](int32_t stage) {
#pragma unroll
    for (int k = 0; k < kTile / 16; k++) multiply_across(acc, weights[k], value_at + stage * (kBytes >> 4) + k * 2 * (kEight >> 4));
    products_end();
  };

  float shrink[2];
  if (group == 1) turn_give(0);
  await(&q_full, 0);
  await(&key_full[0], 0);
  hold(s);
  products_begin();
  start_scores<kDim>(s, q_at, key_at);
  products_end();
  products_wait<0>();
  hold(s);
  if (lane == 0) arrive(&key_empty[0]);
  weigh(0, shrink);
  pack();
  for (int32_t i = 1; i < tiles; i++) {
    const int32_t stage = i % kForwardStages, before = (i - 1) % kForwardStages;
    await(&key_full[stage], i / kForwardStages % 2);
    turn_wait(group);
    hold(s), hold(acc);
    products_begin();
    start_scores<kDim>(s, q_at, key_at + stage * (kBytes >> 4));
    products_end();
    await(&value_full[before], (i - 1) / kForwardStages % 2);
    start_values(before);
    turn_give(group ^ 1);
    products_wait<1>();
    hold(s);
    if (lane == 0) arrive(&key_empty[stage]);
    weigh(i, shrink);
    products_wait<0>();
    hold(acc);
    if (lane == 0) arrive(&value_empty[before]);
    pack();
    if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
      for (int j = 0; j < kDim / 8; j++) acc[j][0] *= shrink[0], acc[j][1] *= shrink[0], acc[j][2] *= shrink[1], acc[j][3] *= shrink[1];
    }
  }
  await(&value_full[(tiles - 1) % kForwardStages], (tiles - 1) / kForwardStages % 2);
  hold(acc);
  products_begin();
  start_values((tiles - 1) % kForwardStages);
  products_wait<0>();
  hold(acc);

#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int32_t t = own_t + r * 8;
    const float total = quad_sum(sum[r]), inverse = 1.0f / total;
    // A row past the end weighs nothing in the columns.
    if (lane % 4 == 0) p.lse[int64_t{h} * p.lines + t] = t < p.rows ? most[r] + log2f(total) : INFINITY;
    if (t >= p.rows) continue;
    if (lane % 4 == 0 && !is_sum(total)) faults.report(Fault::NanAttention, p.layer);
    float* out = p.out_of(t, h);
#pragma unroll
    for (int j = 0; j < kDim / 8; j++) {
      const int32_t d = j * 8 + lane % 4 * 2;
      if (d < c.head_dim) *reinterpret_cast<float2*>(out + d) = make_float2(acc[j][2 * r] * inverse, acc[j][2 * r + 1] * inverse);
    }
  }
#endif
}

// ---- columns ----

constexpr int kColumnStages = 4;
template <int kDim>
constexpr size_t columns_shared() { return size_t(1 + kColumnStages) * kTile * kDim * 2 + kColumnStages * kTile * 4 + 1024; }

/** The scores come out across: a row of s is an entry, a column a row of q. */
template <int kDim>
__global__ void __launch_bounds__(kAllThreads, 1) columns_kernel(PrefillView p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared8[];
  __shared__ uint64_t key_full, full[kColumnStages], empty[kColumnStages];
  constexpr uint32_t kBytes = kTile * kDim * 2, kEight = kDim * 16;
  uint8_t* const key = shared8 + (-shared_address(shared8) & 1023);
  uint8_t* const q = key + kBytes;
  float* const lse = reinterpret_cast<float*>(q + kColumnStages * kBytes);
  const int32_t warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    open_barrier(&key_full, 1);
    for (int i = 0; i < kColumnStages; i++) open_barrier(&full[i], 1), open_barrier(&empty[i], kComputing / 32);
    barriers_opened();
  }
  __syncthreads();
  wait_for_previous();
  let_next_start();
  const CacheView& c = p.cache;
  const int32_t h = blockIdx.x, n = h / c.group(), first = blockIdx.y * kTile;
  const int32_t kept = c.counts[p.head(n)].kept, length = kept + p.rows;
  if (first >= length) return;
  const int32_t start = max(0, first - kept) / kTile, tiles = tiles_of(p.rows) - start;
  if (warp >= kComputing / 32) {
    give_registers();
    if (threadIdx.x != kComputing) return;
    expect(&key_full, kBytes);
    copy_bulk(key, p.keys_of<__half>(n) + int64_t{first} * kDim, kBytes, &key_full);
    for (int32_t i = 0; i < tiles; i++) {
      const int32_t stage = i % kColumnStages;
      await(&empty[stage], i / kColumnStages % 2 ^ 1);
      expect(&full[stage], kBytes + kTile * 4);
      copy_bulk(q + stage * kBytes, p.queries_of<__half>(h) + int64_t{start + i} * kTile * kDim, kBytes, &full[stage]);
      copy_bulk(lse + stage * kTile, p.lse + int64_t{h} * p.lines + int64_t{start + i} * kTile, kTile * 4, &full[stage]);
    }
    return;
  }

  take_registers();
  const int32_t group = warp / 4, first_own = first + group * 64, own = first_own + warp % 4 * 16 + lane / 4;
  const uint64_t key_at = described(key + group * 8 * kEight, 0, kEight), q_at = described(q, 0, kEight);
  float total[2] = {}, s[2][kTile / 8][4];
  const auto begin = [&](int32_t i, float (&to)[kTile / 8][4]) {
    const int32_t stage = i % kColumnStages;
    await(&full[stage], i / kColumnStages % 2);
    hold(to);
    products_begin();
    start_scores<kDim>(to, key_at, q_at + stage * (kBytes >> 4));
    products_end();
  };
  const auto add = [&](int32_t i, float (&from)[kTile / 8][4]) {
    const int32_t stage = i % kColumnStages, t0 = (start + i) * kTile;
    hold(from);
    if (first_own + 63 > kept + t0) {
      const int32_t behind = own - kept - t0 - lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kTile / 8; j++) {
#pragma unroll
        for (int x = 0; x < 4; x++) {
          if (behind + x / 2 * 8 > j * 8 + x % 2) from[j][x] = -INFINITY;
        }
      }
    }
    float sums[2] = {};
#pragma unroll
    for (int j = 0; j < kTile / 8; j++) {
      const float2 l = *reinterpret_cast<const float2*>(lse + stage * kTile + j * 8 + lane % 4 * 2);
      sums[0] += power_of_2(from[j][0] - l.x) + power_of_2(from[j][1] - l.y);
      sums[1] += power_of_2(from[j][2] - l.x) + power_of_2(from[j][3] - l.y);
    }
    total[0] += sums[0], total[1] += sums[1];
    __syncwarp();
    if (lane == 0) arrive(&empty[stage]);
  };
  await(&key_full, 0);
  begin(0, s[0]);
  for (int32_t i = 0;; i += 2) {
    if (i + 1 == tiles) {
      products_wait<0>();
      add(i, s[0]);
      break;
    }
    begin(i + 1, s[1]);
    products_wait<1>();
    add(i, s[0]);
    if (i + 2 == tiles) {
      products_wait<0>();
      add(i + 1, s[1]);
      break;
    }
    begin(i + 2, s[0]);
    products_wait<1>();
    add(i + 1, s[1]);
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float sum = quad_sum(total[r]);
    if (lane % 4 == 0 && own + r * 8 < length) p.columns[h * p.entries + own + r * 8] = sum;
  }
#endif
}

template <int kDim>
void attend(Context& ctx, const PrefillView& p) {
  launch(ctx, forward_kernel<kDim>, {dim3(p.cache.heads, p.lines / kTile), kAllThreads, forward_shared<kDim>()}, p, ctx.faults());
  launch(ctx, columns_kernel<kDim>, {dim3(p.cache.heads, p.entries / kTile), kAllThreads, columns_shared<kDim>()}, p);
}

}  // namespace

bool wgmma_takes(const Context& ctx, const PrefillView& p) {
  // This file is compiled for sm_90a alone, which nothing but 9.0 runs.
  static const bool has_code = [] {
    cudaFuncAttributes attributes;
    const cudaError_t loaded = cudaFuncGetAttributes(&attributes, columns_kernel<128>);
    cudaGetLastError();
    return loaded == cudaSuccess && attributes.binaryVersion == 90 && attributes.ptxVersion == 90;
  }();
  return has_code && !p.bent() && p.width <= 128 && columns_shared<128>() + 1024 <= size_t(ctx.shared_limit) && p.rows >= kTile / 2;
}

void attend_wgmma(Context& ctx, const PrefillView& p) {
  if (p.width == 64) attend<64>(ctx, p);
  else attend<128>(ctx, p);
}

}  // namespace wkv
