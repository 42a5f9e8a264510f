/**
 * chain.cu: products of one row that follow each other in a graph, of weights so small that launches would take longer than they, in one
 * launch: what attention gave to the next layer's queries, say.
 *
 *   x += attended . output;  hidden = silu(norm(x) . gate) * (norm(x) . up);  x += hidden . down;  qkv = norm(x) . w
 *
 * One cluster of 16 blocks does it all. A block owns a 16th of the rows of every weight, and has them brought to its shared memory before
 * the kernel in front has ended. Every block holds each x whole: it norms it, rounds it to 8 bits in blocks of 32 as matvec.cu does, and
 * pushes its part of the result to all blocks, where a barrier counts the bytes. Results go to global memory as well, so that a graph
 * leaves what its ops would have left one by one.
 *
 * A warp takes 4 rows at once, 8 lanes a row, each every eighth chunk of 16 bytes; sums in a fixed order. Bytes moved: the weights, once.
 */
#include <algorithm>

#include "chain.cuh"
#include "chunk.cuh"
#include "cluster.cuh"

namespace wkv {
namespace {

constexpr int kBlocks = 16, kThreads = 512, kWarps = kThreads / 32, kQuad = 4;  // rows that a warp takes at once

/** A block's quads of `rows` rows: at most this many, of which block b has the b-th. */
__host__ __device__ inline int32_t quads_of(int32_t rows) { return (rows / kQuad + kBlocks - 1) / kBlocks; }

/** Bytes of a plane that `rows` rows have. */
struct PlaneBytes {
  int32_t data, scales, high, subs;
  __host__ __device__ PlaneBytes(const WeightView& w, int32_t rows)
      : data(rows * (w.columns / 32) * data_bytes(w.dtype)), scales(rows * (w.columns / scale_columns(w.dtype)) * scale_bytes(w.dtype)), high(rows * (w.columns / 32) * high_bytes(w.dtype)), subs(rows * (w.columns / 32) * subs_bytes(w.dtype)) {}
  __host__ __device__ int32_t all() const { return data + scales + high + subs; }
};

/** Calls body with a quantised type as a constant. */
template <typename Body>
__device__ inline float by_quantised(int32_t dtype, const Body& body) {
  switch (dtype) {
    case WKV_Q8_0: return body(std::integral_constant<int, WKV_Q8_0>());
    case WKV_Q4_0: return body(std::integral_constant<int, WKV_Q4_0>());
    case WKV_Q4_1: return body(std::integral_constant<int, WKV_Q4_1>());
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

/** Has bytes brought to shared memory, which a barrier counts; whole 16 bytes. */
__device__ inline void bring_bulk(uint8_t* to, const void* from, int32_t bytes, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  if (bytes > 0) asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier)) : "memory");
#endif
}

/** A block's rows of a weight, in its shared memory from `at` on. */
__device__ inline WeightView kept_weight(const WeightView& w, uint8_t* at, int32_t rows) {
  const PlaneBytes bytes(w, rows);
  WeightView kept = w;
  kept.data = at;
  kept.scales = reinterpret_cast<const __half*>(at + bytes.data);
  kept.high = at + bytes.data + bytes.scales;
  kept.subs = reinterpret_cast<const uint16_t*>(at + bytes.data + bytes.scales + bytes.high);
  return kept;
}

/** Has them brought. */
__device__ inline void bring_weight(const WeightView& w, uint8_t* at, int32_t first, int32_t rows, uint64_t* barrier) {
  const PlaneBytes skipped(w, first), bytes(w, rows);
  bring_bulk(at, w.data + skipped.data, bytes.data, barrier);
  bring_bulk(at += bytes.data, reinterpret_cast<const uint8_t*>(w.scales) + skipped.scales, bytes.scales, barrier);
  bring_bulk(at += bytes.scales, w.high + skipped.high, bytes.high, barrier);
  bring_bulk(at += bytes.high, reinterpret_cast<const uint8_t*>(w.subs) + skipped.subs, bytes.subs, barrier);
}

/** This lane's part of the product of a row with x in 8 bits, laid out as in matvec.cu: every eighth chunk. */
template <int kType>
__device__ inline float part_of_row(const WeightView& w, int32_t row, const int4* x) {
  constexpr int kColumns = ChunkOf<kType>::kColumns;
  const int32_t chunks = w.columns / kColumns;
  const float2* scales = reinterpret_cast<const float2*>(x + w.columns / 16);
  float total = 0.0f;
#pragma unroll 3
  for (int32_t at = threadIdx.x % 8; at < chunks; at += 8) {
    ChunkOf<kType> chunk;
    chunk.template load<From::Shared>(w, row * chunks + at);
    total += chunk.product(x[at], kType == WKV_Q8_0 ? make_int4(0, 0, 0, 0) : x[chunks + at], scales[at * kColumns / 32]);
  }
  return total;
}

/** x, normed, into shared memory in 8 bits; each warp that takes part sums up the squares for itself. */
__device__ inline void round_x(const Link& link, const float4* x, const float4* norm, int4* to) {
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, fours = link.w.columns / 4, blocks = link.w.columns / 32;
  if (warp * 32 >= fours) return;
  float scale = 1.0f;
  if (norm) {
    float squares = 0.0f;
#pragma unroll 4
    for (int32_t i = lane; i < fours; i += 32) {
      const float4 v = x[i];
      squares += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
    }
    scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(link.w.columns) + link.epsilon);
  }
  int32_t* words = reinterpret_cast<int32_t*>(to);
  float2* scales = reinterpret_cast<float2*>(to + link.w.columns / 16);
  for (int32_t start = warp * 32; start < fours; start += kThreads) {
    const int32_t i = start + lane;
    const bool inside = i < fours;
    float4 v = inside ? x[i] : make_float4(0, 0, 0, 0);
    if (inside && norm) {
      const float4 n = norm[i];
      v = make_float4(v.x * scale * n.x, v.y * scale * n.y, v.z * scale * n.z, v.w * scale * n.w);
    }
    float2 of;
    const int32_t word = round_four(v, &of.x, &of.y);
    if (!inside) continue;
    words[link.w.dtype == WKV_Q8_0 ? i : (i / 4 % 2 * blocks + i / 8) * 4 + i % 4] = word;
    if (i % 8 == 0) scales[i / 8] = of;
  }
}

__global__ void __launch_bounds__(kThreads, 1) chain_kernel(const __grid_constant__ ChainView chain) {
  extern __shared__ int4 shared16[];
  __shared__ uint64_t brought[kMostLinks], given[kMostLinks];  // barriers: a link's weights are here; its result is, from all blocks
  uint8_t* shared = reinterpret_cast<uint8_t*>(shared16);
  const int32_t tid = threadIdx.x, warp = tid / 32, lane = tid % 32, block = blockIdx.x;
  const auto first_of = [&](const Link& link) { return min(link.w.rows, block * quads_of(link.w.rows) * kQuad); };
  const auto rows_of = [&](const Link& link) { return min(link.w.rows - first_of(link), quads_of(link.w.rows) * kQuad); };

  if (tid == 0) {
    for (int32_t i = 0; i < chain.count; i++) open_barrier(&brought[i]), open_barrier(&given[i]);
  }
  __syncwarp();
  say_begun();
  if (tid == 0) {
    for (int32_t i = 0; i < chain.count; i++) {
      const Link& link = chain.links[i];
      const int32_t first = first_of(link), rows = rows_of(link);
      expect(&brought[i], PlaneBytes(link.w, rows).all() + (link.up.data ? PlaneBytes(link.up, rows).all() : 0));
      if (link.out_at >= 0) expect(&given[i], link.w.rows * 4);
      bring_weight(link.w, shared + link.w_at, first, rows, &brought[i]);
      if (link.up.data) bring_weight(link.up, shared + link.up_at, first, rows, &brought[i]);
    }
  }
  for (int32_t i = 0; i < chain.count; i++) {  // into the second-level cache
    const Link& link = chain.links[i];
    if (link.norm && tid * 32 < link.w.columns) asm volatile("prefetch.global.L2 [%0];" ::"l"(link.norm + tid * 32) : "memory");
    if (link.bias && tid * 32 < rows_of(link)) asm volatile("prefetch.global.L2 [%0];" ::"l"(link.bias + first_of(link) + tid * 32) : "memory");
  }

  wait_for_previous();
  let_next_start();
  for (int32_t i = 0; i < chain.count; i++) {
    const Link& link = chain.links[i];
    const auto copy = [&](int32_t at, const float* from, int32_t count) {
      for (int32_t k = tid; k < count / 4; k += kThreads) reinterpret_cast<float4*>(shared + at)[k] = __ldcg(reinterpret_cast<const float4*>(from) + k);
    };
    if (link.reads_x) copy(link.x_at, link.x, link.w.columns);
    if (link.norm) copy(link.norm_at, link.norm, link.w.columns);
    if (link.bias) copy(link.bias_at, link.bias + first_of(link), rows_of(link));
    if (link.reads_old) copy(link.old_at, link.out + first_of(link), rows_of(link));
  }
  __syncthreads();
  await_begun();

#pragma unroll 1
  for (int32_t i = 0; i < chain.count; i++) {
    const Link& link = chain.links[i];
    const int32_t first = first_of(link), rows = rows_of(link);
    for (int32_t k = 0; k < i; k++) {
      if (link.after >> k & 1) await(&given[k]);
    }
    int4* rounded = reinterpret_cast<int4*>(shared + chain.rounded_at + i % 2 * chain.rounded_bytes);
    round_x(link, reinterpret_cast<const float4*>(shared + link.x_at), link.norm ? reinterpret_cast<const float4*>(shared + link.norm_at) : nullptr, rounded);
    await(&brought[i]);
    __syncthreads();

    const auto product = [&](const WeightView& w, int32_t at, int32_t row) {
      const WeightView kept = kept_weight(w, shared + at, rows);
      float total = by_quantised(w.dtype, [&](auto type) { return part_of_row<type.value>(kept, row, rounded); });
#pragma unroll
      for (int o = 4; o > 0; o >>= 1) total += __shfl_xor_sync(0xffffffffu, total, o);
      return total;
    };
    for (int32_t quad = warp; quad * kQuad < rows; quad += kWarps) {
      const int32_t row = quad * kQuad + lane / 8;
      float value = product(link.w, link.w_at, row);
      if (link.up.data) value = activate(link.activation, value, product(link.up, link.up_at, row));
      if (link.bias) value += reinterpret_cast<const float*>(shared + link.bias_at)[row];
      if (link.add) value += reinterpret_cast<const float*>(shared + link.old_at)[link.reads_old ? row : first + row];
      float4 four;
      four.x = __shfl_sync(0xffffffffu, value, 0), four.y = __shfl_sync(0xffffffffu, value, 8);
      four.z = __shfl_sync(0xffffffffu, value, 16), four.w = __shfl_sync(0xffffffffu, value, 24);
      const int32_t at = first / kQuad + quad;
      if (link.out_at >= 0 && lane < kBlocks) push(reinterpret_cast<const float4*>(shared + link.out_at) + at, four, &given[i], lane);
      if (lane == kBlocks) reinterpret_cast<float4*>(link.out)[at] = four;
    }
  }
  // Before a block ends, all that others push into its memory must have come.
  for (int32_t i = 0; i < chain.count; i++) {
    if (chain.links[i].out_at >= 0) await(&given[i]);
  }
}

/** Floats in global memory. */
struct Span {
  const float *begin, *end;
  Span(const float* begin, int32_t count) : begin(begin), end(begin + count) {}
  bool meets(const Span& other) const { return begin < other.end && other.begin < end; }
  bool operator==(const Span& other) const { return begin == other.begin && end == other.end; }
};

bool suits(const WeightView& w) { return is_quantised(w.dtype) && w.rows % kQuad == 0 && w.columns % 64 == 0; }
bool whole16(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

}  // namespace

bool Chain::take(const Context& ctx, const InputView& in, const WeightView& w, const WeightView& up, const OutputView& to) {
  if (view_.count == kMostLinks || ctx.capability < 90 || in.rows != 1 || !suits(w) || (up.data && up.dtype != w.dtype) || !whole16(in.x) || !whole16(to.out)) return false;
  const Span reads(in.x, in.columns), writes(to.out, w.rows);
  Link link{w, up, in.x, in.norm, to.bias, to.out, in.epsilon, to.add, to.activation, 0, -1, -1, -1, -1, -1, -1, -1, true, to.add != 0};
  if (reads.meets(writes)) return false;

  int32_t gives_x = -1, gives_old = -1;
  for (int32_t i = 0; i < view_.count; i++) {
    const Link& before = view_.links[i];
    const Span gave(before.out, before.w.rows), read(before.x, before.w.columns);
    if (before.reads_x && writes.meets(read)) return false;  // another block may not have read it yet
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

  int32_t used = used_;
  const auto room = [&](int32_t bytes) {
    const int32_t at = used;
    used += static_cast<int32_t>(round_up(size_t(bytes), 128));
    return at;
  };
  const int32_t own = quads_of(w.rows) * kQuad;
  int32_t outs[2] = {gives_x, gives_old}, at[2] = {-1, -1};
  for (int k = 0; k < 2; k++) {
    if (outs[k] < 0) continue;
    const Link& before = view_.links[outs[k]];
    at[k] = before.out_at >= 0 ? before.out_at : k == 1 && outs[0] == outs[1] ? at[0] : room(before.w.rows * 4);
    link.after |= 1u << outs[k];
  }
  link.reads_x = gives_x < 0, link.x_at = gives_x < 0 ? room(in.columns * 4) : at[0];
  link.reads_old = to.add && gives_old < 0;
  if (to.add) link.old_at = gives_old < 0 ? room(own * 4) : at[1];
  if (in.norm) link.norm_at = room(in.columns * 4);
  if (to.bias) link.bias_at = room(own * 4);
  link.w_at = room(PlaneBytes(w, own).all());
  if (up.data) link.up_at = room(PlaneBytes(up, own).all());
  const int32_t widest = std::max(widest_, in.columns), rounded = static_cast<int32_t>(round_up(size_t(widest) + widest / 4, 128));
  if (used + 2 * rounded + 1024 > ctx.shared_limit) return false;

  for (int k = 0; k < 2; k++) {
    if (outs[k] >= 0) view_.links[outs[k]].out_at = at[k];
  }
  view_.links[view_.count++] = link;
  view_.rounded_at = used, view_.rounded_bytes = rounded;
  used_ = used, widest_ = widest;
  return true;
}

void Chain::launch(Context& ctx) {
  if (view_.count == 0) return;
  const ChainView chain = view_;
  clear();
  const Shape shape{kBlocks, kThreads, size_t(chain.rounded_at) + 2 * size_t(chain.rounded_bytes), kBlocks};
  if (chain.count > 1) {
    allow_shared(chain_kernel, shape.shared);
    if (clusters_at_once(chain_kernel, shape) > 0) return wkv::launch(ctx, chain_kernel, shape, chain);
  }
  for (int32_t i = 0; i < chain.count; i++) {
    const Link& link = chain.links[i];
    const InputView in{link.x, 1, link.w.columns, link.norm, link.epsilon, false};
    const bool started = matvec(ctx, in, link.w, link.up, true, {link.out, link.w.rows, link.bias, link.add, link.activation});
    require(started, "A product of one row found no kernel");
  }
}

void Context::flush() {
  if (chain) chain->launch(*this);
}

}  // namespace wkv
