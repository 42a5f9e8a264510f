/**
 * chain_cluster.cu: a chain of products (chain.cu) of weights so small that launches would take longer than they.
 *
 * One cluster of 16 blocks does it all. A block owns a 16th of the rows of every weight, and has them brought to its shared memory before
 * the kernel in front has ended. Every block holds each x whole: it norms it, rounds it to 8 bits in blocks of 32 as matvec.cu does, and
 * pushes its part of the result to all blocks, where a barrier counts the bytes. Results go to global memory as well, so that a graph
 * leaves what its ops would have left one by one.
 *
 * A result is pushed only where a later link reads it, and every block waits for all of it there, so nothing is on its way to a block that
 * has ended. Sums are in a fixed order. Bytes moved: the weights, once.
 */
#include <algorithm>

#include "chain.cuh"
#include "chunk.cuh"
#include "cluster.cuh"
#include "mma.cuh"

namespace wkv {
namespace {

constexpr int32_t kOwnShared = 4096;  // bytes that the kernel declares itself, at most
constexpr int kBlocks = 16, kThreads = 1024, kWarps = kThreads / 32;
constexpr int kQuad = 4;  // rows that a warp takes at once

/** One product, as the kernel sees it. Places are bytes of a block's shared memory, -1 for none. */
struct Link {
  WeightView w, up;  // w . x, or gated with up where up has data
  const float *x, *norm, *bias;
  float* out;
  float epsilon;
  int32_t add, activation;
  uint32_t after;                 // the links whose results this one waits for, as the first, a bit each
  int32_t x_at, out_at;           // x, and the result where another link reads it: whole, in every block
  int32_t norm_at, bias_at;       // bias: of this block's rows
  int32_t old_at;                 // what the result is added to: whole, or of this block's rows where no link gave it
  int32_t own;                    // rows of a block, at most: block b has the b-th of them
  int32_t first, rows;            // a block's, in its own copy
  int32_t row_bytes[4], w_at[4], up_at[4];  // by plane, as WeightView's: a row's; where this block's rows of the weights lie
  bool reads_x, reads_old;        // from global memory
};

struct ChainView {
  int32_t count, rounded_at, rounded_bytes;  // two areas for x in 8 bits, used in turn
  int32_t pieces;                            // 16 bytes of vectors that a block copies first, at most
  Link links[kMostLinks];
};

/** Has this block's rows of a weight brought to its shared memory, which a barrier counts. */
__device__ inline void bring_rows(const Link& link, const WeightView& w, const int32_t (&at)[4], uint8_t* shared, uint64_t* barrier) {
  const void* const planes[4] = {w.data, w.scales, w.high, w.subs};
#pragma unroll
  for (int p = 0; p < 4; p++) {
    const int32_t bytes = link.rows * link.row_bytes[p];
    if (bytes > 0) copy_bulk(shared + at[p], static_cast<const uint8_t*>(planes[p]) + int64_t{link.first} * link.row_bytes[p], bytes, barrier);
  }
}

/** A weight as it lies in shared memory. */
__device__ inline WeightView kept_weight(const WeightView& w, const int32_t (&at)[4], uint8_t* shared) {
  return {w.dtype, w.rows, w.columns, shared + at[0], reinterpret_cast<const __half*>(shared + at[1]), shared + at[2], reinterpret_cast<const uint16_t*>(shared + at[3])};
}

/** x, times the norm's weight, into shared memory in 8 bits. The norm's scale, which changes no rounding, is left to do: meanwhile the last
 *  warp finds it. */
template <int kType>
__device__ inline void round_x(const Link& link, uint8_t* shared, int4* to, float* scale) {
  const float4 *x = reinterpret_cast<const float4*>(shared + link.x_at), *norm = reinterpret_cast<const float4*>(shared + link.norm_at);
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, fours = link.w.columns / 4;
  const bool normed = link.norm_at >= 0;
  if (warp == kWarps - 1) {
    float squares = 0.0f;
#pragma unroll 4
    for (int32_t i = lane; i < fours; i += 32) {
      const float4 v = x[i];
      squares += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
    }
    squares = warp_sum(squares);
    if (lane == 0) *scale = normed ? rsqrtf(__fdividef(squares, static_cast<float>(link.w.columns)) + link.epsilon) : 1.0f;
  }
  for (int32_t start = warp * 32; start < fours; start += kThreads) {
    const int32_t i = start + lane;
    const bool inside = i < fours;
    float4 v = inside ? x[i] : make_float4(0, 0, 0, 0);
    if (inside && normed) {
      const float4 n = norm[i];
      v = make_float4(v.x * n.x, v.y * n.y, v.z * n.z, v.w * n.w);
    }
    keep_rounded<kType>(v, i, link.w.columns, to);
  }
}

/** This block's part of a link's result; x lies in 8 bits as in matvec.cu. A warp takes 4 rows at once, 8 lanes each. */
template <int kType, bool kGated>
__device__ inline void multiply(const Link& link, uint8_t* shared, const int4* x, float scale, const uint64_t* given) {
  constexpr int kColumns = ChunkOf<kType>::kColumns, kLanes = 32 / kQuad;
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunks = link.w.columns / kColumns, turns = (chunks + kLanes - 1) / kLanes;
  const WeightView w = kept_weight(link.w, link.w_at, shared), up = kept_weight(link.up, link.up_at, shared);
  const float2* scales = reinterpret_cast<const float2*>(x + link.w.columns / 16);
  for (int32_t task = warp; task * kQuad < link.rows; task += kWarps) {
    const int32_t row = task * kQuad + lane / kLanes;
    float value = 0.0f, other = 0.0f;
#pragma unroll (kGated ? 1 : 3)
    for (int32_t turn = 0; turn < turns; turn++) {  // the same in all lanes
      const int32_t at = turn * kLanes + lane % kLanes, here = min(at, chunks - 1);
      const int4 low = x[here], high = kType == WKV_Q8_0 ? make_int4(0, 0, 0, 0) : x[chunks + here];
      float2 of = scales[here * kColumns / 32];
      if (at >= chunks) of = make_float2(0.0f, 0.0f);
      ChunkOf<kType> chunk;
      chunk.template load<From::Shared>(w, row * chunks + here);
      value += chunk.product(low, high, of);
      if (!kGated) continue;
      chunk.template load<From::Shared>(up, row * chunks + here);
      other += chunk.product(low, high, of);
    }
#pragma unroll
    for (int o = kLanes / 2; o > 0; o >>= 1) {
      value += __shfl_xor_sync(0xffffffffu, value, o);
      if (kGated) other += __shfl_xor_sync(0xffffffffu, other, o);
    }
    value *= scale;
    if (kGated) value = activate(link.activation, value, other * scale);
    if (link.bias) value += reinterpret_cast<const float*>(shared + link.bias_at)[row];
    if (link.add) value += reinterpret_cast<const float*>(shared + link.old_at)[link.reads_old ? row : link.first + row];
    float4 four;
    four.x = __shfl_sync(0xffffffffu, value, 0), four.y = __shfl_sync(0xffffffffu, value, kLanes);
    four.z = __shfl_sync(0xffffffffu, value, 2 * kLanes), four.w = __shfl_sync(0xffffffffu, value, 3 * kLanes);
    const int32_t at = link.first / kQuad + task;
    if (link.out_at >= 0 && lane < kBlocks) push(reinterpret_cast<const float4*>(shared + link.out_at) + at, four, given, lane);
    if (lane == kBlocks) reinterpret_cast<float4*>(link.out)[at] = four;
  }
}

template <int kType>
__global__ void __launch_bounds__(kThreads, 1) cluster_kernel(const __grid_constant__ ChainView chain) {
  extern __shared__ int4 shared16[];
  __shared__ uint64_t brought[kMostLinks], given[kMostLinks];  // barriers: a link's weights are here; its result is, from all blocks
  uint8_t* shared = reinterpret_cast<uint8_t*>(shared16);
  const int32_t tid = threadIdx.x, warp = tid / 32;
  __shared__ float scales[2];  // of the norms, in turn
  __shared__ Link links[kMostLinks];
  // Read once from here, each link's numbers would be waited for where they are needed.
  for (int32_t k = tid; k < chain.count * static_cast<int32_t>(sizeof(Link) / 8); k += kThreads) reinterpret_cast<uint64_t*>(links)[k] = reinterpret_cast<const uint64_t*>(chain.links)[k];

  if (tid == 0) {
    for (int32_t i = 0; i < chain.count; i++) open_barrier(&brought[i]), open_barrier(&given[i]);
  }
  __syncthreads();
  if (tid < chain.count) {
    Link& link = links[tid];
    link.first = min(link.w.rows, static_cast<int32_t>(blockIdx.x) * link.own), link.rows = min(link.w.rows - link.first, link.own);
  }
  __syncthreads();
  say_begun();
  if (tid == 0) {
    for (int32_t i = 0; i < chain.count; i++) {
      const Link& link = links[i];
      expect(&brought[i], link.rows * (link.row_bytes[0] + link.row_bytes[1] + link.row_bytes[2] + link.row_bytes[3]) * (link.up.data ? 2 : 1));
      if (link.out_at >= 0) expect(&given[i], link.w.rows * 4);
      bring_rows(link, link.w, link.w_at, shared, &brought[i]);
      if (link.up.data) bring_rows(link, link.up, link.up_at, shared, &brought[i]);
    }
  }
  for (int32_t i = 0; i < chain.count; i++) {  // into the second-level cache
    const Link& link = links[i];
    if (link.norm && tid * 32 < link.w.columns) asm volatile("prefetch.global.L2 [%0];" ::"l"(link.norm + tid * 32) : "memory");
    if (link.bias && tid * 32 < link.rows) asm volatile("prefetch.global.L2 [%0];" ::"l"(link.bias + link.first + tid * 32) : "memory");
  }
  // Vectors that earlier kernels may have written: which 16 bytes a thread copies is known before they are.
  const float* from = nullptr;
  float4* to = nullptr;
  const auto find = [&](int32_t piece) {
    for (int32_t i = 0; i < chain.count; i++) {
      const Link& link = links[i];
      const auto within = [&](bool there, int32_t at, const float* begin, int32_t count) {
        if (!there) return false;
        if (piece < count / 4) from = begin + piece * 4, to = reinterpret_cast<float4*>(shared + at) + piece;
        return (piece -= count / 4) < 0;
      };
      if (within(link.reads_x, link.x_at, link.x, link.w.columns) || within(link.norm_at >= 0, link.norm_at, link.norm, link.w.columns)) return true;
      if (within(link.bias_at >= 0, link.bias_at, link.bias + link.first, link.rows) || within(link.reads_old, link.old_at, link.out + link.first, link.rows)) return true;
    }
    return false;
  };
  bool there = find(tid);

  wait_for_previous();
  let_next_start();
  for (int32_t piece = tid; there;) {
    copy_async<16>(to, from);
    piece += kThreads;
    there = piece < chain.pieces && find(piece);
  }
  end_copies();
  wait_copies<0>();
  __syncthreads();
  await_begun();

#pragma unroll 1
  for (int32_t i = 0; i < chain.count; i++) {
    const Link& link = links[i];
    int4* rounded = reinterpret_cast<int4*>(shared + chain.rounded_at + i % 2 * chain.rounded_bytes);
    const bool rounds = warp * 128 < link.w.columns || warp == kWarps - 1, multiplies = warp * kQuad < link.rows;
    if (rounds) {
      for (uint32_t left = link.after; left; left &= left - 1) await(&given[__ffs(left) - 1]);
      round_x<kType>(link, shared, rounded, &scales[i % 2]);
    }
    if (multiplies) await(&brought[i]);
    __syncthreads();
    if (!multiplies) continue;
    if (link.up.data) multiply<kType, true>(link, shared, rounded, scales[i % 2], &given[i]);
    else multiply<kType, false>(link, shared, rounded, scales[i % 2], &given[i]);
  }
}

bool suits(const WeightView& w) { return w.rows % kQuad == 0 && w.columns % 64 == 0; }

/** Where everything lies in shared memory. */
class Layout {
 public:
  /** Takes the next product in; false where it does not suit a cluster. */
  bool add(const Context& ctx, const Product& product);
  const ChainView& view() const { return view_; }
  size_t bytes() const { return size_t(view_.rounded_at) + 2 * size_t(view_.rounded_bytes); }

 private:
  ChainView view_{};
  int32_t used_ = 0, widest_ = 0;  // bytes of shared memory; columns of the widest x
  uint32_t awaited_ = 0;           // links whose results a link waits for
};

bool Layout::add(const Context& ctx, const Product& product) {
  const InputView& in = product.in;
  const WeightView &w = product.w, &up = product.up;
  const OutputView& to = product.to;
  if (!suits(w) || reinterpret_cast<uintptr_t>(to.out) % 16 != 0) return false;
  const Span reads(in.x, in.columns), writes(to.out, w.rows);
  Link link{};
  link.w = w, link.up = up, link.x = in.x, link.norm = in.norm, link.bias = to.bias, link.out = to.out;
  link.epsilon = in.epsilon, link.add = to.add, link.activation = to.activation;
  link.out_at = link.norm_at = link.bias_at = link.old_at = -1;

  int32_t gives_x = -1, gives_old = -1;
  for (int32_t i = 0; i < view_.count; i++) {
    const Link& before = view_.links[i];
    const Span gave(before.out, before.w.rows);
    // Another block may not have read it yet.
    if (before.reads_x && writes.meets(Span(before.x, before.w.columns))) return false;
    if ((before.norm && writes.meets(Span(before.norm, before.w.columns))) || (before.bias && writes.meets(Span(before.bias, before.w.rows)))) return false;
    if ((in.norm && gave.meets(Span(in.norm, in.columns))) || (to.bias && gave.meets(Span(to.bias, w.rows)))) return false;
    if (gave.meets(reads)) {
      if (!(gave == reads)) return false;
      gives_x = i;
    }
    if (gave.meets(writes)) {
      if (!(gave == writes) || !to.add) return false;
      gives_old = i;
    }
  }

  int64_t used = used_;
  const auto room = [&](int64_t bytes) {
    const int64_t at = used;
    used += static_cast<int64_t>(round_up(size_t(bytes), 128));
    return static_cast<int32_t>(at);
  };
  link.own = divide_up(w.rows, kQuad * kBlocks) * kQuad;
  int32_t outs[2] = {gives_x, gives_old}, at[2] = {-1, -1};
  for (int k = 0; k < 2; k++) {
    if (outs[k] < 0) continue;
    const Link& before = view_.links[outs[k]];
    at[k] = before.out_at >= 0 ? before.out_at : k == 1 && outs[0] == outs[1] ? at[0] : room(before.w.rows * 4);
    link.after |= 1u << outs[k] & ~awaited_;
  }
  link.reads_x = gives_x < 0, link.x_at = gives_x < 0 ? room(in.columns * 4) : at[0];
  link.reads_old = to.add && gives_old < 0;
  if (to.add) link.old_at = gives_old < 0 ? room(link.own * 4) : at[1];
  if (in.norm) link.norm_at = room(in.columns * 4);
  if (to.bias) link.bias_at = room(link.own * 4);
  for (int p = 0; p < 4; p++) {
    const Plane plane = plane_of(w.dtype, p);
    link.row_bytes[p] = w.columns / plane.columns * plane.bytes, link.w_at[p] = room(int64_t{link.own} * link.row_bytes[p]);
    if (up.data) link.up_at[p] = room(int64_t{link.own} * link.row_bytes[p]);
  }
  const int32_t widest = std::max(widest_, in.columns), rounded = static_cast<int32_t>(round_up(size_t(widest) + widest / 4, 128));
  if (used + 2 * rounded + kOwnShared > ctx.shared_limit) return false;

  for (int k = 0; k < 2; k++) {
    if (outs[k] >= 0) view_.links[outs[k]].out_at = at[k], awaited_ |= 1u << outs[k];
  }
  view_.links[view_.count++] = link;
  view_.rounded_at = used_ = static_cast<int32_t>(used), view_.rounded_bytes = rounded, widest_ = widest;
  view_.pieces += ((link.reads_x ? in.columns : 0) + (in.norm ? in.columns : 0) + (to.bias ? link.own : 0) + (link.reads_old ? link.own : 0)) / 4;
  return true;
}

}  // namespace

size_t chain_cluster(Context& ctx, const Product* first, size_t count) {
  Layout layout;
  size_t taken = 0;
  while (taken < count && layout.add(ctx, first[taken])) taken++;
  if (taken < 2) return 0;
  const int32_t dtype = first->w.dtype;
  const auto together = [&](auto type) {
    if constexpr (is_quantised(type.value)) {
      const Shape shape{kBlocks, kThreads, layout.bytes(), kBlocks};
      const auto kernel = cluster_kernel<type.value>;
      allow_shared(kernel, shape.shared);
      if (clusters_at_once(kernel, shape) == 0) return false;
      launch(ctx, kernel, shape, layout.view());
      return true;
    } else {
      return false;
    }
  };
  return (wkv_has_pieces(dtype) ? by_pieces(dtype, together) : by_type(dtype, together)) ? taken : 0;
}

}  // namespace wkv
