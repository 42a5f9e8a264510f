/**
 * matvec.cu: wkv_linear and wkv_gated for few rows of x, in one launch.
 *
 *   out[t, j] = norm(x[t]) . w[j] + bias[j] (+ out[t, j])          x [rows, C], w [J, C]
 *   out[t, j] = activation(norm(x[t]) . gate[j]) * (norm(x[t]) . up[j])
 *
 * A block holds all of kRows rows of x in shared memory and owns a run of pairs of weight rows: rows 2 p and 2 p + 1 of w, or row p of gate
 * and of up. `ways` warps share a pair, each lane with every (32 * ways)th chunk of 16 bytes of both rows; so that small matrices, too, keep
 * all multiprocessors busy. A lane keeps 3 or 4 chunks of each row in flight: it asks for the first before it waits for x, and for another as
 * soon as it has used one. Sums meet in shared memory in a fixed order. Bytes moved: w once a kRows rows.
 * With f32 precision the norm's scale multiplies the finished sum, so it is not waited for; 8 bits are rounded from normed numbers, as the
 * CPU does. Weights are widened in registers.
 */
#include <algorithm>

#include "chunk.cuh"

namespace wkv {
namespace {

constexpr int kThreads = 512;

/** Blocks on a multiprocessor at once. */
constexpr int resident(int rows) { return rows == 1 ? 2 : 1; }

/** How the pairs of a launch are shared out. */
struct Share {
  int32_t pairs, block_pairs, ways, warps;
  bool gated;
};

/** The norm's scale of row t from the warps' sums of squares. */
template <int kRows>
__device__ inline float norm_scale(const double (*area)[kRows], int32_t t, const InputView& in) {
  const int warps = blockDim.x / 32;
  double part[4] = {};
#pragma unroll
  for (int w = 0; w < kThreads / 32; w++) {
    if (w < warps) part[w % 4] += area[w][t];
  }
  return 1.0f / sqrtf(static_cast<float>((part[0] + part[1] + (part[2] + part[3])) / in.columns) + in.epsilon);
}

/** x into shared memory in 8 bits; waits for the norm. */
template <int kType, int kRows>
__device__ inline void stage_int8(const InputView& in, const float* x, int32_t rows, int4* shared, double (*area)[kRows]) {
  const int32_t fours = in.columns / 4, warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = Staged<kType, true>::row(in.columns);
  const float4* x4 = reinterpret_cast<const float4*>(x);
  if (in.norm) {
#pragma unroll
    for (int t = 0; t < kRows; t++) {
      double squares = 0.0;
      if (t < rows) {
        for (int32_t i = threadIdx.x; i < fours; i += blockDim.x) {
          const float4 v = x4[int64_t{t} * fours + i];
          squares += static_cast<double>(v.x) * v.x + static_cast<double>(v.y) * v.y + static_cast<double>(v.z) * v.z + static_cast<double>(v.w) * v.w;
        }
      }
      squares = warp_sum(squares);
      if (lane == 0) area[warp][t] = squares;
    }
    __syncthreads();
  }
  for (int t = 0; t < kRows; t++) {
    const float norm = in.norm ? norm_scale(area, t, in) : 1.0f;
    for (int32_t start = warp * 32; start < fours; start += blockDim.x) {
      const int32_t i = start + lane;
      const bool inside = i < fours;
      float4 v = make_float4(0, 0, 0, 0);
      if (inside && t < rows) v = x4[int64_t{t} * fours + i];
      if (inside && in.norm) {
        const float4 n = __ldg(reinterpret_cast<const float4*>(in.norm) + i);
        v = make_float4(v.x * norm * n.x, v.y * norm * n.y, v.z * norm * n.z, v.w * norm * n.w);
      }
      keep_rounded<kType>(v, i, in.columns, shared + t * row);
    }
  }
}

/** x, times the norm's weight, into shared memory; the scale that norm_scale() gives is left to do. */
template <int kType, int kRows>
__device__ inline void stage_f32(const InputView& in, const float* x, int32_t rows, int4* shared, double (*area)[kRows]) {
  constexpr int kFours = ChunkOf<kType>::kFours;
  const int32_t fours = in.columns / 4, plane = Staged<kType, false>::plane(in.columns), row = Staged<kType, false>::row(in.columns);
#pragma unroll
  for (int t = 0; t < kRows; t++) {
    const float4* from = reinterpret_cast<const float4*>(x) + int64_t{t} * fours;
    float4* to = reinterpret_cast<float4*>(shared) + t * row;
    float squares = 0.0f;
#pragma unroll 2
    for (int32_t i = threadIdx.x; i < fours; i += blockDim.x) {
      float4 v = t < rows ? from[i] : make_float4(0, 0, 0, 0);
      if (in.norm) {
        const float4 n = __ldg(reinterpret_cast<const float4*>(in.norm) + i);
        squares += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
        v = make_float4(v.x * n.x, v.y * n.y, v.z * n.z, v.w * n.w);
      }
      to[i % kFours * plane + i / kFours] = v;
    }
    if (in.norm) {
      const double total = warp_sum(static_cast<double>(squares));
      if (threadIdx.x % 32 == 0) area[threadIdx.x / 32][t] = total;
    }
  }
}

template <int kType, bool kInt8, int kRows>
__global__ void __launch_bounds__(kThreads, resident(kRows)) matvec_kernel(InputView in, WeightView w, WeightView second, OutputView to, Share share) {
  extern __shared__ int4 shared[];
  __shared__ double area[kThreads / 32][kRows];
  __shared__ float norm_scales[kRows];
  constexpr int kColumns = ChunkOf<kType>::kColumns, kFours = ChunkOf<kType>::kFours, kDepth = wkv_has_pieces(kType) ? 2 : kType >= WKV_Q8_0 ? 3 : 4;
  const int32_t chunks = in.columns / kColumns, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t way = warp % share.ways, groups = share.warps / share.ways, first = way * 32 + lane, step = share.ways * 32;
  const int32_t first_pair = blockIdx.x * share.block_pairs, pairs = min(share.block_pairs, share.pairs - first_pair);
  const int32_t group = warp < share.warps ? warp / share.ways : pairs;
  const int32_t t0 = blockIdx.y * kRows, rows = min(kRows, in.rows - t0);
  const int32_t row = Staged<kType, kInt8>::row(in.columns), plane = Staged<kType, kInt8>::plane(in.columns);
  float* sums = reinterpret_cast<float*>(shared + kRows * row);  // [pair][row of the pair][t][way]

  // What comes next: chunk `next` of the pair whose rows begin at chunks `start_a` and `start_b`.
  ChunkOf<kType> a[kDepth], b[kDepth];
  int32_t next_pair = group, next = first;
  uint32_t start_a, start_b;
  const auto begin_pair = [&] {
    const uint32_t p = first_pair + next_pair;
    start_a = (share.gated ? p : 2 * p) * chunks;
    start_b = share.gated || 2 * p + 1 == uint32_t(w.rows) ? start_a : start_a + chunks;
  };
  begin_pair();
  const auto load = [&](int slot) {
    if (next_pair >= pairs) return;
    if (next < chunks) a[slot].load(w, start_a + next), b[slot].load(second, start_b + next);
    next += step;
    if (next >= chunks + lane) {  // the same in all lanes
      next = first, next_pair += groups;
      begin_pair();
    }
  };
#pragma unroll
  for (int slot = 0; slot < kDepth; slot++) load(slot);
  if (in.norm) {  // into the second-level cache
    for (int32_t c = threadIdx.x * 32; c < in.columns; c += blockDim.x * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(in.norm + c) : "memory");
  }

  wait_for_previous();
  let_next_start();
  const float* x = in.x + int64_t{t0} * in.columns;
  if constexpr (kInt8) stage_int8<kType, kRows>(in, x, rows, shared, area);
  else stage_f32<kType, kRows>(in, x, rows, shared, area);
  __syncthreads();
  if (threadIdx.x < kRows) norm_scales[threadIdx.x] = kInt8 || !in.norm ? 1.0f : norm_scale(area, threadIdx.x, in);

  float total_a[kRows] = {}, total_b[kRows] = {};
  int32_t pair = group, at = first;
  while (pair < pairs) {
#pragma unroll
    for (int slot = 0; slot < kDepth; slot++) {
      if (pair >= pairs) break;
      if (at < chunks) {
#pragma unroll
        for (int t = 0; t < kRows; t++) {
          const int4* from = shared + t * row;
          if constexpr (kInt8) {
            const float2 of = reinterpret_cast<const float2*>(from + in.columns / 16)[at * kColumns / 32];
            const int4 low = from[at], high = kType == WKV_Q8_0 ? make_int4(0, 0, 0, 0) : from[chunks + at];
            total_a[t] += a[slot].product(low, high, of), total_b[t] += b[slot].product(low, high, of);
          } else {
#pragma unroll
            for (int p = 0; p < kFours; p++) {
              const float4 y = reinterpret_cast<const float4*>(from)[p * plane + at], u = a[slot].four(p), v = b[slot].four(p);
              total_a[t] = fmaf(u.x, y.x, fmaf(u.y, y.y, fmaf(u.z, y.z, fmaf(u.w, y.w, total_a[t]))));
              total_b[t] = fmaf(v.x, y.x, fmaf(v.y, y.y, fmaf(v.z, y.z, fmaf(v.w, y.w, total_b[t]))));
            }
          }
        }
      }
      load(slot);
      at += step;
      if (at < chunks + lane) continue;
#pragma unroll
      for (int t = 0; t < kRows; t++) {
        const float sum_a = warp_sum(total_a[t]), sum_b = warp_sum(total_b[t]);
        if (lane == 0) sums[(pair * 2 * kRows + t) * share.ways + way] = sum_a, sums[((pair * 2 + 1) * kRows + t) * share.ways + way] = sum_b;
        total_a[t] = total_b[t] = 0.0f;
      }
      at = first, pair += groups;
    }
  }
  __syncthreads();

  const auto sum = [&](int32_t local, int32_t t) {
    float total = 0.0f;
    for (int32_t i = 0; i < share.ways; i++) total += sums[(local * kRows + t) * share.ways + i];
    return total * norm_scales[t];
  };
  const int32_t wide = share.gated ? pairs : 2 * pairs;
  for (int32_t o = threadIdx.x; o < wide * rows; o += blockDim.x) {
    const int32_t t = o / wide, local = o % wide;
    if (share.gated) to.put(t0 + t, first_pair + local, activate(to.activation, sum(2 * local, t), sum(2 * local + 1, t)));
    else if (first_pair * 2 + local < w.rows) to.put(t0 + t, first_pair * 2 + local, sum(local, t));
  }
}

constexpr int32_t kMostPairs = 512, kMostSums = 4096;  // of a block

/** Gives each multiprocessor the blocks it can hold, and their warps the same number of steps. With one block of one row of x the head of
 *  Llama 3 read 3.16 TB/s on an H200, with two 4.14; with three or four, which do not all run at once, 3.71 and 3.95. */
Share share_out(int32_t pairs, int32_t chunks, int32_t rows, int32_t processors) {
  Share best{pairs, std::min(kMostPairs, divide_up(pairs, processors * resident(rows))), 1, 0, false};
  int64_t least = INT64_MAX;
  for (int32_t ways = 1; ways <= kThreads / 32; ways *= 2) {
    if (ways > 1 && best.block_pairs * 2 * rows * ways > kMostSums) break;
    const int64_t steps = int64_t{divide_up(best.block_pairs, kThreads / 32 / ways)} * (2 * divide_up(chunks, 32 * ways) + 1);
    if (steps < least) least = steps, best.ways = ways;
  }
  best.warps = std::min(kThreads / 32, best.block_pairs * best.ways);
  return best;
}

template <int kType, bool kInt8, int kRows>
bool launch_matvec(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, const OutputView& to) {
  const int32_t chunks = in.columns / chunk_columns(kType);
  Share share = share_out(up.data ? w.rows : divide_up(w.rows, 2), chunks, kRows, ctx.processors);
  share.gated = up.data != nullptr;
  const size_t shared = size_t(kRows) * Staged<kType, kInt8>::row(in.columns) * 16 + size_t(share.block_pairs) * 2 * kRows * share.ways * 4;
  if (shared + 1024 > size_t(ctx.shared_limit)) return false;
  const int32_t warps = std::max(share.warps, std::min(kThreads / 32, divide_up(in.columns, 128)));  // those without a pair help with x
  launch(ctx, matvec_kernel<kType, kInt8, kRows>, {dim3(divide_up(share.pairs, share.block_pairs), divide_up(in.rows, kRows)), dim3(warps * 32), shared}, in, w, share.gated ? up : w, to, share);
  return true;
}

template <int kType, bool kInt8>
bool matvec_typed(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, const OutputView& to) {
  if (in.columns % chunk_columns(kType) != 0 || int64_t{w.rows} * (in.columns / chunk_columns(kType)) > UINT32_MAX) return false;
  if (in.rows > 1 && launch_matvec<kType, kInt8, 4>(ctx, in, w, up, to)) return true;
  return launch_matvec<kType, kInt8, 1>(ctx, in, w, up, to);
}

}  // namespace

bool matvec(Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, bool int8, const OutputView& to) {
  if (up.data && w.dtype != up.dtype) return false;
  if (wkv_has_pieces(w.dtype)) {
    return int8 && by_pieces(w.dtype, [&](auto type) { return matvec_typed<type.value, true>(ctx, in, w, up, to); });
  }
  return by_type(w.dtype, [&](auto type) {
    if constexpr (is_quantised(type.value)) {
      if (int8) return matvec_typed<type.value, true>(ctx, in, w, up, to);
    }
    return matvec_typed<type.value, false>(ctx, in, w, up, to);
  });
}

}  // namespace wkv
