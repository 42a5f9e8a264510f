/**
 * chain_grid.cu: a chain of products (chain.cu) of weights that no shared memory holds, in one launch of a block a multiprocessor.
 *
 * A unit is 4 to 64 rows of a weight, or half as many of gate and of up. One warp of a block brings units to a ring in shared memory by bulk
 * copies; 16 others share their columns, and where rows are short the rows. Weights depend on nothing, so they keep coming while blocks wait
 * for each other's results, and the first ones are asked for before the kernel in front has ended. Blocks read neighbouring units at a time,
 * as memory likes it. They get unlike shares of its bandwidth, so they claim units one by one; but where results are added to what is there
 * a block's units are fixed, and what they are added to is asked for first: behind so many copies it comes late.
 *
 * Results go through global memory. Where a product waits for one before, blocks tell that they have ended it by adding to a counter; its
 * highest bit turns over when all have, so that it needs no clearing. Every block then stages x whole: floats, or 8 bits in blocks of 32 as
 * matvec.cu has them; the norm's scale multiplies finished sums. A unit's sums are the same in whichever block, in a fixed order.
 *
 * Blocks wait for each other, so all of them must be on the device at once: graphs take turns (Context::start).
 *
 * Bytes moved: the weights, once. The 436 MB of a layer of Llama 3 8B in bf16 take 108 us on an H200 when such launches follow each other, 87%
 * of what it reads. 122 us: pairs of rows that a warp takes alone, as each of 2,112 warps then reads elsewhere; 226: each piece of a unit
 * counted, and its unit found in a list; 111: no claims, and what results are added to asked for at the end. A cooperative launch, whose
 * blocks begin together, takes 2 us longer behind attention.
 */
#include <algorithm>

#include "chain.cuh"
#include "chunk.cuh"
#include "cluster.cuh"

namespace wkv {
namespace {

constexpr int kWorkers = 512, kWarps = kWorkers / 32, kThreads = kWorkers + 32;
constexpr int kQuad = 4;                                // rows that a warp takes at once
constexpr int32_t kMostStages = 16, kOwnShared = 4096;  // of a ring; bytes that the kernel declares itself, at most
constexpr int32_t kMostHeld = 16;                       // units whose sums wait, at most
constexpr int kClaims = 3;                              // claims of a block under way

/** One product, as the kernel sees it. */
struct Link {
  WeightView w, up;  // w . x, or gated with up where up has data
  const float *x, *norm, *bias;
  float* out;
  float epsilon;
  int32_t add, activation, after;
  int32_t counts;  // whether a later one waits for it
  int32_t ways, unit_rows, own, units, pieces;  // warps that share a row; rows of a unit, and results; pieces of a row
  int32_t held;                                 // units whose results are finished together, one a thread
  int32_t row_bytes[4], piece_bytes[4], place[4];  // by plane: of a row, of a piece of it; where pieces begin in a stage
};

struct GridView {
  int32_t count, stages, stage_bytes, sums_at, ring_at;  // places in shared memory, behind x
  uint32_t *ended, *claimed;                             // one a link
  Link links[kMostLinks];
};

/** What a stage of the ring holds. */
struct Held {
  int16_t link, last;  // last: of the unit's pieces
  int32_t unit, piece;
};

__device__ inline const uint8_t* plane_begin(const WeightView& w, int p) {
  return p == 0 ? w.data : p == 1 ? reinterpret_cast<const uint8_t*>(w.scales) : p == 2 ? w.high : reinterpret_cast<const uint8_t*>(w.subs);
}

/** Whether all blocks have ended a link. */
__device__ inline bool all_ended(const uint32_t* counter, uint32_t before) {
  uint32_t now;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  return ((now ^ before) & 0x80000000u) != 0;
}

/** x, times the norm's weight, into shared memory, and each warp's sum of squares. */
template <int kType>
__device__ inline void stage_x(const Link& link, int4* shared, float* area) {
  constexpr bool kInt8 = is_quantised(kType);
  constexpr int kFours = ChunkOf<kType>::kFours, kAtOnce = 4;
  const int32_t fours = link.w.columns / 4, plane = Staged<kType, kInt8>::plane(link.w.columns), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float4 *x = reinterpret_cast<const float4*>(link.x), *norm = reinterpret_cast<const float4*>(link.norm);
  float squares = 0.0f;
  for (int32_t start = warp * 32; start < fours; start += kWorkers * kAtOnce) {
    float4 v[kAtOnce], n[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) {
      const int32_t i = start + k * kWorkers + lane;
      v[k] = i < fours ? __ldcg(x + i) : make_float4(0, 0, 0, 0);  // not from the first-level cache, which may hold what x was
      n[k] = i < fours && norm ? __ldg(norm + i) : make_float4(1, 1, 1, 1);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) {
      if (start + k * kWorkers >= fours) break;
      const int32_t i = start + k * kWorkers + lane;
      squares += v[k].x * v[k].x + v[k].y * v[k].y + (v[k].z * v[k].z + v[k].w * v[k].w);
      v[k] = make_float4(v[k].x * n[k].x, v[k].y * n[k].y, v[k].z * n[k].z, v[k].w * n[k].w);
      if constexpr (kInt8) keep_rounded<kType>(v[k], i, link.w.columns, shared);
      else if (i < fours) reinterpret_cast<float4*>(shared)[i % kFours * plane + i / kFours] = v[k];
    }
  }
  squares = warp_sum(squares);
  if (lane == 0) area[warp] = squares;
}

/** A block's n-th unit of link l where units are fixed; the first is in any case. Blocks that get one more are others for each link. */
__device__ inline int32_t nth_unit(int32_t l, int32_t n) { return (blockIdx.x + l * (gridDim.x / 4 + 1)) % gridDim.x + n * gridDim.x; }

/** Brings units to the ring; one warp. Lane 4 r + p asks for plane p, of row r where rows come in pieces, or else of all rows of w (0) or up (1). */
template <int kType>
__device__ inline void bring_units(const GridView& chain, const Link* links, uint8_t* ring, uint64_t* brought, uint64_t* free, Held* held) {
  const int32_t lane = threadIdx.x % 32, plane = lane % 4, span = lane / 4;
  int32_t stage = 0;
  uint32_t parity = 1;
  const auto next = [&] {
    if (++stage == chain.stages) stage = 0, parity ^= 1;
  };
#pragma unroll 1
  for (int32_t l = 0; l < chain.count; l++) {
    const Link& link = links[l];
    const bool gated = link.up.data != nullptr, pieces = link.pieces > 1;
    const int32_t own = link.own, rows = pieces ? 1 : own;  // of a span
    const int32_t spans = pieces ? link.unit_rows : gated ? 2 : 1;
    const bool second = gated && (pieces ? span >= own : span == 1);
    const int32_t row_bytes = link.row_bytes[plane], piece_bytes = link.piece_bytes[plane];
    const bool asks = span < spans && row_bytes > 0;
    const uint8_t* from = plane_begin(second ? link.up : link.w, plane);
    uint8_t* to = ring + link.place[plane] + span * rows * piece_bytes;
    const int32_t within = pieces ? span - (second ? own : 0) : 0;
    int32_t unit = nth_unit(l, 0), claims[kClaims];
    const auto claim = [&] { return lane == 0 ? static_cast<int32_t>(atomicAdd(&chain.claimed[l], 1)) : 0; };
    if (!link.add) {
#pragma unroll
      for (int k = 0; k < kClaims; k++) claims[k] = claim();
    }
#pragma unroll 1
    while (unit < link.units) {
      const int32_t row = unit * own + within;
#pragma unroll 1
      for (int32_t piece = 0; piece < link.pieces; piece++) {
        int32_t bytes = 0;
        if (asks) bytes = pieces ? row < link.w.rows ? min(piece_bytes, row_bytes - piece * piece_bytes) : 0 : min(rows, link.w.rows - row) * row_bytes;
        bytes = (bytes + 15) / 16 * 16;
        const int32_t all = __reduce_add_sync(0xffffffffu, bytes);
        await(&free[stage], parity);
        if (lane == 0) held[stage] = {static_cast<int16_t>(l), static_cast<int16_t>(piece + 1 == link.pieces), unit, piece}, expect(&brought[stage], all);
        __syncwarp();
        if (bytes > 0) copy_bulk(to + stage * chain.stage_bytes, from + int64_t{row} * row_bytes + piece * piece_bytes, bytes, &brought[stage]);
        next();
      }
      unit += gridDim.x;
      if (link.add) continue;
      unit = static_cast<int32_t>(gridDim.x) + __shfl_sync(0xffffffffu, claims[0], 0);
#pragma unroll
      for (int k = 1; k < kClaims; k++) claims[k - 1] = claims[k];
      claims[kClaims - 1] = unit < link.units ? claim() : -1;
    }
    if (link.add || lane != 0) continue;
    const int32_t most = max(0, link.units - static_cast<int32_t>(gridDim.x)) + kClaims * static_cast<int32_t>(gridDim.x);
    bool last = unit - static_cast<int32_t>(gridDim.x) == most - 1;
#pragma unroll
    for (int k = 0; k < kClaims; k++) last |= claims[k] == most - 1;
    if (last) chain.claimed[l] = 0;  // nobody claims any more
  }
  await(&free[stage], parity);
  if (lane == 0) held[stage] = {static_cast<int16_t>(chain.count), 0, 0, 0}, arrive(&brought[stage]);
}

/** All warps but that one. */
__device__ inline void workers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kWorkers) : "memory"); }

/** The sums of kQuad values over all lanes: the k-th in lanes from 32 / kQuad * k on. */
__device__ inline float quad_sum(float (&v)[kQuad], int32_t lane) {
#pragma unroll
  for (int n = kQuad / 2, o = 16; n > 0; n /= 2, o /= 2) {
    const bool high = lane & o;
#pragma unroll
    for (int k = 0; k < n; k++) {
      const float mine = high ? v[k + n] : v[k], other = high ? v[k] : v[k + n];
      v[k] = mine + __shfl_xor_sync(0xffffffffu, other, o);
    }
  }
#pragma unroll
  for (int o = 16 / kQuad; o > 0; o /= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], o);
  return v[0];
}

/** Finishes the results of `count` units whose sums are there, [unit][row of the unit][way]: a thread one. plus: what is added. */
__device__ inline void finish_units(const Link& link, const float* sums, const int32_t* units, int32_t count, float scale, float plus) {
  const int32_t u = threadIdx.x / link.own, r = threadIdx.x % link.own, ways = link.ways;
  if (u >= count) return;
  const int32_t row = units[u] * link.own + r;
  if (row >= link.w.rows) return;
  const auto sum = [&](int32_t row_of_unit) {
    const float* from = sums + (u * link.unit_rows + row_of_unit) * ways;
    if (ways < 4) return (ways == 1 ? from[0] : from[0] + from[1]) * scale;
    float4 v[kWarps / 4];
#pragma unroll
    for (int k = 0; k < kWarps / 4; k++) v[k] = k * 4 < ways ? reinterpret_cast<const float4*>(from)[k] : make_float4(0, 0, 0, 0);
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kWarps / 4; k++) total += v[k].x + v[k].y + (v[k].z + v[k].w);
    return total * scale;
  };
  float value = sum(r);
  if (link.up.data) value = activate(link.activation, value, sum(link.own + r));
  else if (!link.add && link.bias) value += __ldg(link.bias + row);
  link.out[row] = value + plus;
}

template <int kType>
__global__ void __launch_bounds__(kThreads, 1) grid_kernel(const __grid_constant__ GridView chain) {
  constexpr bool kInt8 = is_quantised(kType);
  constexpr int kColumns = ChunkOf<kType>::kColumns, kFours = ChunkOf<kType>::kFours;
  extern __shared__ __align__(128) int4 shared16[];
  __shared__ Link links[kMostLinks];
  __shared__ uint64_t brought[kMostStages], free[kMostStages];  // barriers
  __shared__ Held held[kMostStages];
  __shared__ int32_t units[kMostHeld];
  __shared__ float squares[kWarps];
  const int32_t tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  for (int32_t k = tid; k < chain.count * static_cast<int32_t>(sizeof(Link) / 8); k += kThreads) reinterpret_cast<uint64_t*>(links)[k] = reinterpret_cast<const uint64_t*>(chain.links)[k];
  if (tid < chain.stages) open_barrier(&brought[tid]), open_barrier(&free[tid], kWarps), barriers_opened();
  __syncthreads();
  uint8_t* shared = reinterpret_cast<uint8_t*>(shared16);
  const uint8_t* ring = shared + chain.ring_at;
  float* sums = reinterpret_cast<float*>(shared + chain.sums_at);
  if (warp == kWarps) {
    let_next_start();
    return bring_units<kType>(chain, links, shared + chain.ring_at, brought, free, held);
  }
  if (tid < chain.count && links[tid].norm) {  // into the second-level cache
    for (int32_t c = blockIdx.x * 32; c < links[tid].w.columns; c += gridDim.x * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(links[tid].norm + c) : "memory");
  }

  wait_for_previous();
  let_next_start();
  uint32_t before = 0;
  if (tid < chain.count) before = *const_cast<volatile uint32_t*>(chain.ended + tid);  // no link ends without this block
  int32_t stage = 0, over = -1;
  uint32_t parity = 0;
#pragma unroll 1
  for (int32_t l = 0; l < chain.count; l++) {
    const Link& link = links[l];
    if (link.after > over) {
      if (tid == link.after) {
        while (!all_ended(&chain.ended[tid], before)) {}
      }
      over = link.after;
    }
    workers_sync();  // x's room is free, too
    float plus = 0.0f;  // what this thread's result is added to
    const auto find_plus = [&](int32_t n) {
      const int32_t row = nth_unit(l, n + tid / link.own) * link.own + tid % link.own;
      if (!link.add || tid >= link.held * link.own || row >= link.w.rows) return;
      plus = __ldcg(link.out + row);
      if (link.bias) plus += __ldg(link.bias + row);
    };
    find_plus(0);
    stage_x<kType>(link, shared16, squares);
    workers_sync();
    float scale = 1.0f;
    if (link.norm) {
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < kWarps; k++) sum += squares[k];
      scale = rsqrtf(__fdividef(sum, static_cast<float>(link.w.columns)) + link.epsilon);
    }
    const int32_t chunks = link.w.columns / kColumns, plane = Staged<kType, kInt8>::plane(link.w.columns);
    const bool gated = link.up.data != nullptr;
    const int32_t way = warp % link.ways, group = warp / link.ways, i = way * 32 + lane, piece_chunks = link.ways * 32;
    const float2* scales = reinterpret_cast<const float2*>(shared16 + link.w.columns / 16);
    // Where the warp's rows begin in a stage, by plane.
    const auto row_of = [&](int k) { return gated ? (k / (kQuad / 2) * link.unit_rows + group * kQuad) / 2 + k % (kQuad / 2) : group * kQuad + k; };
    uint32_t begins[kQuad][4];
#pragma unroll
    for (int k = 0; k < kQuad; k++) {
#pragma unroll
      for (int p = 0; p < 4; p++) begins[k][p] = link.place[p] + row_of(k) * link.piece_bytes[p];
    }
    const int32_t sum_at = row_of(lane / (32 / kQuad)) * link.ways + way, unit_sums = link.unit_rows * link.ways;
    float total[kQuad] = {};
    int32_t count = 0, finished = 0;
#pragma unroll 1
    while (true) {
      await(&brought[stage], parity);
      const Held here = held[stage];
      if (here.link != l) break;
      const int32_t at = here.piece * piece_chunks + i;
      if (at < chunks) {
        const uint8_t* from = ring + stage * chain.stage_bytes;
        ChunkOf<kType> chunk[kQuad];
#pragma unroll
        for (int k = 0; k < kQuad; k++) {
          const WeightView w{kType, 1, 0, from + begins[k][0], reinterpret_cast<const __half*>(from + begins[k][1]), from + begins[k][2], reinterpret_cast<const uint16_t*>(from + begins[k][3])};
          chunk[k].template load<From::Shared>(w, i);
        }
        if constexpr (kInt8) {
          const float2 of = scales[at * kColumns / 32];
          const int4 low = shared16[at], high = kType == WKV_Q8_0 ? make_int4(0, 0, 0, 0) : shared16[chunks + at];
#pragma unroll
          for (int k = 0; k < kQuad; k++) total[k] += chunk[k].product(low, high, of);
        } else {
#pragma unroll
          for (int p = 0; p < kFours; p++) {
            const float4 y = reinterpret_cast<const float4*>(shared16)[p * plane + at];
#pragma unroll
            for (int k = 0; k < kQuad; k++) {
              const float4 u = chunk[k].four(p);
              total[k] = fmaf(u.x, y.x, fmaf(u.y, y.y, fmaf(u.z, y.z, fmaf(u.w, y.w, total[k]))));
            }
          }
        }
      }
      __syncwarp();
      if (lane == 0) arrive(&free[stage]);
      if (++stage == chain.stages) stage = 0, parity ^= 1;
      if (!here.last) continue;
      const float sum = quad_sum(total, lane);
      if (lane % (32 / kQuad) == 0) sums[count * unit_sums + sum_at] = sum;
      if (tid == 0) units[count] = here.unit;
#pragma unroll
      for (int k = 0; k < kQuad; k++) total[k] = 0.0f;
      if (++count < link.held) continue;
      workers_sync();
      finish_units(link, sums, units, count, scale, plus);
      finished += count, count = 0;
      find_plus(finished);
      workers_sync();
    }
    workers_sync();
    finish_units(link, sums, units, count, scale, plus);
    if (!link.counts) continue;
    workers_sync();
    if (tid == 0) {
      const uint32_t one = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
      asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(&chain.ended[l]), "r"(one) : "memory");
    }
  }
}

/** Fills in how rows are shared out and where things lie; false where there is no room, or copies would not be of whole 16 bytes. */
template <int kType>
bool lay_out(GridView& chain, int32_t shared_limit, size_t* shared) {
  constexpr int kColumns = ChunkOf<kType>::kColumns;
  int32_t widest = 0;
  chain.stage_bytes = 0;
  for (int32_t i = 0; i < chain.count; i++) {
    Link& link = chain.links[i];
    const int32_t columns = link.w.columns, chunks = columns / kColumns;
    widest = std::max(widest, columns);
    for (link.ways = 1; link.ways < kWarps && link.ways * 32 < chunks;) link.ways *= 2;
    link.unit_rows = kQuad * kWarps / link.ways, link.pieces = divide_up(chunks, link.ways * 32);
    const int32_t piece_columns = link.pieces > 1 ? link.ways * 32 * kColumns : columns, own = link.up.data ? link.unit_rows / 2 : link.unit_rows;
    link.own = own, link.units = divide_up(link.w.rows, own), link.held = std::min(kMostHeld, kWorkers / own);
    int32_t at = 0;
    for (int p = 0; p < 4; p++) {
      const Plane plane = plane_of(kType, p);
      if (columns % plane.columns != 0) return false;
      link.row_bytes[p] = columns / plane.columns * plane.bytes, link.piece_bytes[p] = piece_columns / plane.columns * plane.bytes, link.place[p] = at;
      if (link.row_bytes[p] * (link.pieces > 1 ? 1 : own) % 16 != 0) return false;
      at += static_cast<int32_t>(round_up(size_t(link.piece_bytes[p]) * link.unit_rows, 128));
    }
    chain.stage_bytes = std::max(chain.stage_bytes, at);
  }
  const size_t x = round_up(size_t(Staged<kType, is_quantised(kType)>::row(widest)) * 16, 128), limit = size_t(shared_limit) - kOwnShared;
  chain.sums_at = static_cast<int32_t>(x), chain.ring_at = static_cast<int32_t>(x + size_t(kMostHeld) * kQuad * kWarps * 4);
  if (size_t(chain.ring_at) + 2 * size_t(chain.stage_bytes) > limit) return false;
  chain.stages = std::min(kMostStages, static_cast<int32_t>((limit - chain.ring_at) / chain.stage_bytes));
  *shared = size_t(chain.ring_at) + size_t(chain.stages) * chain.stage_bytes;
  return true;
}

}  // namespace

bool chain_grid(Context& ctx, const std::vector<Product>& products) {
  if (ctx.shared_device) return false;
  GridView chain{};
  int64_t bytes = 0;
  chain.count = static_cast<int32_t>(products.size());
  for (int32_t i = 0; i < chain.count; i++) {
    const Product& from = products[i];
    Link& link = chain.links[i];
    link.w = from.w, link.up = from.up, link.x = from.in.x, link.norm = from.in.norm, link.bias = from.to.bias, link.out = from.to.out;
    link.epsilon = from.in.epsilon, link.add = from.to.add, link.activation = from.to.activation, link.after = from.after;
    if (from.after >= 0) chain.links[from.after].counts = 1;
    bytes += int64_t{from.w.rows} * wkv_row_bytes(from.w.dtype, from.w.columns) * (from.up.data ? 2 : 1);
  }
  if (bytes < ctx.least_grid) return false;
  const auto together = [&](auto type) {
    if constexpr (type.value != WKV_F32) {
      size_t shared;
      if (!lay_out<type.value>(chain, ctx.shared_limit, &shared)) return false;
      const auto counters = std::make_shared<DeviceMemory>(2 * kMostLinks * sizeof(uint32_t));
      ctx.zero(counters->as<void>(), counters->bytes());
      ctx.hold(counters);
      chain.ended = counters->as<uint32_t>(), chain.claimed = chain.ended + kMostLinks;
      launch(ctx, grid_kernel<type.value>, {dim3(ctx.processors), dim3(kThreads), shared}, chain);
      ctx.recording->takes_device = true;
      return true;
    } else {
      return false;
    }
  };
  const int32_t dtype = products[0].w.dtype;
  return wkv_has_pieces(dtype) ? by_pieces(dtype, together) : by_type(dtype, together);
}

}  // namespace wkv
