/**
 * attend_tensor.cu: wkv_attend's cache of f16 or bf16 read on the tensor cores; the step around it is attend.cuh.
 *
 *   s[g, i] = q[g] . rotate(k[i], rank i), products of 16 rows (8 query heads, each high and low part) by 8 slots
 *   o[d, g] += v[i, d] 2^(s[g, i] - highest), products of 16 dimensions by 8 query heads over 8 slots
 *
 * Accuracy: q and the exponentials are sums of two 16-bit numbers; keys that are turned by their rank are turned in f32 and rounded to
 * f16, others and values are taken as they are stored; all sums are f32.
 *
 * Lane 4 g + i takes 16-byte parts of rows as they lie, since neither sum minds its order: of keys, parts i, i + 4, .. of slot g and what
 * they are turned with; of values, parts g, g + 8, .. of slots 2 i and 2 i + 1. The products give it the scores of query head g for slots
 * 2 i and 2 i + 1, which is just what it has to bring to the second product. A chunk's keys are turned while the products of the chunk
 * before are made, the first one's before q is there. Keys are turned by rank * (angle a position, in turns of 2^32): it wraps as turns do.
 * Instructions of a warp, 128 dimensions: some 57 a slot, of them 27 to turn its key. Bytes moved: 4 D a slot, and its state.
 *
 * Tried, and not kept (16 sequences of 2,048 tokens on an H100): lanes that bring just what they read, without whole lines, 78 us
 * instead of 61; scores that leave a multiprocessor to one block rather than go to scratch, 11% longer at 8,192 tokens (H200); blocks of
 * 16 warps, no gain at any size; one block of a sequence and head instead of two, 16 to 33% longer; four where two have room,
 * 28 to 44% longer, eight, 40 to 106%; exponentials of two items at once instead of eight, 272 us instead of 226 at 8,192 tokens; blocks of
 * 16 warps that have a sequence and head alone, 58 us instead of 54; scores added up by some warps sooner than by others, 58 instead of 56;
 * values summed four items behind the keys, under a highest score that rises, so that one's instructions hide the other's bytes, 62.
 */
#include "attend.cuh"
#include "mma.cuh"

namespace wkv {
namespace {

template <typename T_, int kGroup_, int kDim_>
struct TensorCut {
  using T = T_;
  static constexpr int kGroup = kGroup_, kDim = kDim_, kPass = kGroup, kStride = 8;
  static constexpr int kItems = 1, kRows = kChunk, kAtOnce = 1, kWords = kDim / 32, kStages = 4;
  static constexpr int kSets = kGroup > 8 ? 2 : 1;            // high and low parts of q beside each other in one product, or in two
  static constexpr int kQuery = kDim / 16 * kSets * 512;
};

/** d += a [16 x 8] . b [8 x 8] in f32. Lane 4 g + i has a: columns 2 i, 2 i + 1 of rows g and g + 8; b: rows 2 i, 2 i + 1 of column g. */
template <bool kBf16>
__device__ inline void mma_narrow(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  if constexpr (kBf16) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b));
  }
}

/** Two numbers as a word of f16 (beyond its range: its largest) or bf16, and back. */
template <typename T>
__device__ inline uint32_t pack(float first, float second) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __half>) asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
template <typename T>
__device__ inline float2 unpack(uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) return __half22float2(*reinterpret_cast<const __half2*>(&word));
  else return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

template <typename Cut>
struct TensorWay : AttendStep<Cut> {
  using Step = AttendStep<Cut>;
  using T = typename Cut::T;
  using Step::a, Step::c, Step::area, Step::warp, Step::lane, Step::dim, Step::pairs, Step::keys, Step::values, Step::items, Step::scores, Step::kept, Step::length;
  using Step::kGroup, Step::kDim, Step::kWords, Step::kStages, Step::kWarps;
  static constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  static constexpr int kQuery = Cut::kQuery, kSets = Cut::kSets, kResident = kGroup > 8 || kDim > 128 ? 1 : 2;
  static constexpr int kParts = kDim / 64;             // of a key: 16 bytes and what they are turned with; of a value: of two slots
  static constexpr int kSteps = kDim / 16;             // products of a chunk's keys
  static constexpr int kMine = kGroup > 8 ? 2 : 1;     // query heads whose scores a lane has: g and g + 8
  static constexpr int kOutputs = 4 * kParts;          // products of a chunk's values
  static constexpr bool kHeld = kSets * kSteps <= 8;   // q stays in registers

  const int g, i;
  uint4* const query;                                  // [kSteps, kSets, lane]
  uint32_t turns[kParts * 8];                          // of the pairs that this lane turns: angles a position
  uint32_t turned[kWords * 4];                         // a chunk's keys, this lane's part
  float sums[kMine][kOutputs][4];
  // The next item to bring: its first slot, this lane's first piece of 16 bytes, and how far it is to that of the item behind it.
  int32_t next, next_slot;
  const T* from;
  int64_t apart;
  uint32_t place[kWords];                              // pieces of an item that this lane brings: where they lie in shared memory
  bool whole;                                          // items are whole chunks of full rows
  int32_t key_at[kWords];                              // pieces of an item that this lane takes, of keys

  __device__ TensorWay(const AttendView& a, const Faults& faults, typename Step::Area& area, uint8_t* shared)
      : Step(a, faults, area, shared), g(lane >> 2), i(lane & 3), query(reinterpret_cast<uint4*>(shared + a.plan.q_at)) {}

  /** The angles a position of the pairs that this lane turns. */
  __device__ void read_turns() {
#pragma unroll
    for (int n = 0; n < kParts * 8; n += 4) {
      const int32_t x = (i + n / 8 * 4) * 8 + n % 8;
      uint4 four = make_uint4(0, 0, 0, 0);
      if (x < pairs && !c.text) four = *reinterpret_cast<const uint4*>(c.rope.turns + x);
      turns[n] = four.x, turns[n + 1] = four.y, turns[n + 2] = four.z, turns[n + 3] = four.w;
    }
  }

  /** Keeps a pair of a query head as the products take it: in f16, or as keys that are not turned are stored. */
  __device__ void keep_q(int32_t x, int32_t head, float2 numbers) {
    const int32_t u = x / 8, j = x % 8, of = (head % 8 * 4 + u % 4) * 4 + j % 4 / 2 * 2 + head / 8;
    auto* to = reinterpret_cast<uint16_t*>(query) + j % 2;
    const auto put = [&](int32_t step, float number) {
      number = fmaf(number, 0.0f, number);  // an infinity must not end as the largest f16
      const bool stored = kBf16 && c.text;
      const uint32_t high = stored ? pack<__nv_bfloat16>(number, 0.0f) : pack<__half>(number, 0.0f);
      const float left = number - (stored ? unpack<__nv_bfloat16>(high).x : unpack<__half>(high).x);
      const uint32_t low = stored ? pack<__nv_bfloat16>(left, 0.0f) : pack<__half>(left, 0.0f);
      to[(step * kSets * 128 + of) * 2] = static_cast<uint16_t>(high);
      to[(step * kSets * 128 + (kSets == 1 ? of + 1 : of + 128)) * 2] = static_cast<uint16_t>(low);
    };
    put(u / 4 * 4 + j / 4, numbers.x);
    put(u / 4 * 4 + 2 + j / 4, numbers.y);
  }

  // ---- items: a chunk's rows, as they lie but for their order within 128 bytes, so that no two lanes read from one bank ----

  static constexpr int kAcross = kDim / 8;  // pieces of a row
  static __device__ int32_t place_of(int32_t row, int32_t piece) { return row * kAcross + (piece ^ (row / 2 % 4 * 2 ^ row % 2 * 4)); }
  __device__ uint4* item(int32_t n) const { return items + n % kStages * kWords * 32; }

  __device__ void begin_keys() {
    next = 0, next_slot = this->slot_at(this->item_at(0)), from = keys + int64_t{next_slot} * dim + lane * 8;
    apart = int64_t{this->slot_step(0)} * dim;
    const auto find_places = [&](int32_t across) {
#pragma unroll
      for (int w = 0; w < kWords; w++) place[w] = shared_address(items + place_of((w * 32 + lane) / across, (w * 32 + lane) % across));
    };
    if (dim == kDim) find_places(kAcross);
    else find_places(dim / 8);
    whole = dim == kDim && c.slots % kChunk == 0;
    if (whole) return;
    // What is never brought must be numbers.
    for (int n = 0; n < kStages * kWords; n++) items[n * 32 + lane] = make_uint4(0, 0, 0, 0);
    __syncwarp();
  }

  /** There are but `length` items of keys: values take the places behind them. */
  __device__ void end_keys() { next = length; }

  /** The next item is now on its way: `length` items of keys, then as many of values. */
  __device__ void bring_item() {
    if (next == length) next_slot = this->slot_at(this->item_at(0)), from = values + int64_t{next_slot} * dim + lane * 8;
    if (next < 2 * length) {
      const uint32_t stage = static_cast<uint32_t>(next) % kStages * (kWords * 512);
      const auto bring_piece = [&](int w) { bring(place[w] + stage, from + w * 256, true); };
      if (whole) {
#pragma unroll
        for (int w = 0; w < kWords; w++) bring_piece(w);
      } else {
        const int32_t pieces = min(c.slots - next_slot, kChunk) * (dim / 8) - lane;
#pragma unroll
        for (int w = 0; w < kWords; w++) {
          if (w * 32 < pieces) bring_piece(w);
        }
      }
    }
    close_item();
    next_slot += this->slot_step(0), from += apart;
    next++;
  }
  /** The item that is waited for next has come, to all lanes. */
  __device__ void await_item() {
    await_items<kStages - 1>();
    __syncwarp();
  }

  // ---- scores ----

  /** Turns this lane's part of an item of keys by the rank of its slot. */
  __device__ void turn(int32_t n, int32_t ranks) {
    const uint32_t rank = __shfl_sync(0xffffffffu, ranks, n % 4 * kChunk + g);
#pragma unroll
    for (int w = 0; w < kWords; w++) {
      const uint4 part = item(n)[key_at[w]];
      turned[w * 4] = part.x, turned[w * 4 + 1] = part.y, turned[w * 4 + 2] = part.z, turned[w * 4 + 3] = part.w;
    }
    if (c.text) return;
#pragma unroll
    for (int w = 0; w < kParts * 4; w++) {
      uint32_t &first = turned[w / 4 * 8 + w % 4], &second = turned[w / 4 * 8 + 4 + w % 4];
      const float2 was = unpack<T>(first), other = unpack<T>(second);
      float cosines[2], sines[2];
#pragma unroll
      for (int k = 0; k < 2; k++) {
        // The high bits of the angle as a number from 1 to 2, a turn too large.
        const float angle = fmaf(__uint_as_float(__funnelshift_r(rank * turns[w * 2 + k], 0x7f, 9)), 6.28318530718f, -6.28318530718f);
        cosines[k] = __cosf(angle), sines[k] = __sinf(angle);
      }
      first = pack<__half>(was.x * cosines[0] - other.x * sines[0], was.y * cosines[1] - other.y * sines[1]);
      second = pack<__half>(was.x * sines[0] + other.x * cosines[0], was.y * sines[1] + other.y * cosines[1]);
    }
  }

  /** The first keys, before q is there. */
  __device__ void begin_scores(int32_t ranks) {
#pragma unroll
    for (int w = 0; w < kWords; w++) {
      const int32_t x = (i + w / 2 * 4) * 8;
      key_at[w] = place_of(g, (w % 2 ? this->second_of(x) : this->first_of(x)) / 8);
    }
    if (length == 0) return;
    await_item();
    turn(0, ranks);
  }

  /** The products of q with the keys that are turned. */
  template <bool kStored, typename Query>
  __device__ void multiply_all(const Query& of, float (&d)[2][4]) const {
#pragma unroll
    for (int k = 0; k < kSteps; k++) {
#pragma unroll
      for (int set = 0; set < kSets; set++) {
        const uint4 q = of(k * kSets + set);
        const int32_t rows[4] = {static_cast<int32_t>(q.x), static_cast<int32_t>(q.y), static_cast<int32_t>(q.z), static_cast<int32_t>(q.w)};
        float(&sum)[4] = d[kSets == 1 ? k % 2 : set];
        mma_half<kStored>(sum, rows, static_cast<int32_t>(turned[k * 2]), static_cast<int32_t>(turned[k * 2 + 1]), sum);
      }
    }
  }
  template <typename Query>
  __device__ void multiply(const Query& of, float (&s)[kMine][2]) const {
    float d[2][4] = {};
    if (kBf16 && c.text) multiply_all<true>(of, d);
    else multiply_all<false>(of, d);
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const float first = d[0][k] + d[1][k], second = d[0][2 + k] + d[1][2 + k];
      if constexpr (kMine == 1) s[0][k] = first + second;
      else s[0][k] = first, s[1][k] = second;
    }
  }

  /** Where this lane's scores of item n lie, of query head g; those of g + 8 are 64 further on. */
  __device__ float2* scores_at(int32_t n) const { return reinterpret_cast<float2*>(scores + ((n * kWarps + warp) * kGroup + (g ^ n % 4)) * kChunk + 2 * i); }

  /** Leaves the exponentials of this warp's scores, under its own highest, in `scores`, its softmax in area.part; `ranks` are those of the
   *  thread's own entries. */
  __device__ void score(int32_t ranks) {
    uint4 held[kHeld ? kSteps * kSets : 1];
    if constexpr (kHeld) {
#pragma unroll
      for (int k = 0; k < kSteps * kSets; k++) held[k] = query[k * 32 + lane];
    }
    const auto of = [&](int k) {
      if constexpr (kHeld) return held[k];
      else return query[k * 32 + lane];
    };
    float most[kMine];
#pragma unroll
    for (int m = 0; m < kMine; m++) most[m] = -FLT_MAX;
    int32_t next_ranks = this->read_rank(this->entry_at(1)), left = kept - this->slot_at(this->item_at(0)) - 2 * i;
#pragma unroll 1
    for (int32_t n = 0; n < length; n++) {
      float s[kMine][2];
      multiply(of, s);
      __syncwarp();  // all lanes have read the item whose place the next one takes
      bring_item();
      if (n + 1 < length) {
        if (n % 4 == 3) ranks = next_ranks, next_ranks = this->read_rank(this->entry_at((n + 1) / 4 + 1));
        await_item();
        turn(n + 1, ranks);
      }
#pragma unroll
      for (int m = 0; m < kMine; m++) {
        if (a.softcap > 0.0f) s[m][0] = a.capped(s[m][0]), s[m][1] = a.capped(s[m][1]);
        if (left < 1) s[m][0] = -INFINITY;
        if (left < 2) s[m][1] = -INFINITY;
        most[m] = fmaxf(most[m], fmaxf(s[m][0], s[m][1]));
        if (g < kGroup) scores_at(n)[m * 32] = make_float2(s[m][0], s[m][1]);
      }
      left -= this->slot_step(0);
    }
    float total[kMine] = {};
#pragma unroll
    for (int m = 0; m < kMine; m++) {
      most[m] = fmaxf(most[m], __shfl_xor_sync(0xffffffffu, most[m], 1));
      most[m] = fmaxf(most[m], __shfl_xor_sync(0xffffffffu, most[m], 2));
    }
    if (g < kGroup) {
      constexpr int kTurns = kMine == 1 ? 8 : 4;  // whose scores are asked for together
#pragma unroll 1
      for (int32_t first = 0; first < length; first += kTurns) {
        float2 s[kTurns][kMine];
#pragma unroll
        for (int k = 0; k < kTurns; k++) {
#pragma unroll
          for (int m = 0; m < kMine; m++) {
            if (first + k < length) s[k][m] = scores_at(first + k)[m * 32];
          }
        }
#pragma unroll
        for (int k = 0; k < kTurns; k++) {
          if (first + k >= length) break;
#pragma unroll
          for (int m = 0; m < kMine; m++) {
            const float2 p = make_float2(power(s[k][m].x - most[m]), power(s[k][m].y - most[m]));
            total[m] += p.x + p.y;
            scores_at(first + k)[m * 32] = p;
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kMine; m++) {
      total[m] += __shfl_xor_sync(0xffffffffu, total[m], 1);
      total[m] += __shfl_xor_sync(0xffffffffu, total[m], 2);
      if (i == 0 && g < kGroup) area.part[warp][g + m * 8] = make_float2(most[m], total[m]);
    }
    __syncwarp();
  }

  // ---- output ----

  /** Sums of exponentials times values. */
  __device__ void sum_values(int32_t) {
#pragma unroll
    for (int n = 0; n < kMine * kOutputs * 4; n++) sums[n / 4 / kOutputs][n / 4 % kOutputs][n % 4] = 0.0f;
    int32_t value_at[kWords];
#pragma unroll
    for (int w = 0; w < kWords; w++) value_at[w] = place_of(2 * i + w % 2, g + w / 2 * 8);
    float2 next_p[kMine];
    const auto read_p = [&](int32_t n) {
#pragma unroll
      for (int m = 0; m < kMine; m++) next_p[m] = n < length && g < kGroup ? scores_at(n)[m * 32] : make_float2(0.0f, 0.0f);
    };
    read_p(0);
#pragma unroll 1
    for (int32_t n = 0; n < length; n++) {
      await_item();
      float2 p[kMine];
#pragma unroll
      for (int m = 0; m < kMine; m++) p[m] = next_p[m];
      read_p(n + 1);
      uint4 words[kWords];
#pragma unroll
      for (int w = 0; w < kWords; w++) words[w] = item(length + n)[value_at[w]];
      __syncwarp();
      bring_item();
      uint32_t high[kMine], low[kMine];
#pragma unroll
      for (int m = 0; m < kMine; m++) {
        high[m] = pack<T>(p[m].x, p[m].y);
        const float2 rounded = unpack<T>(high[m]);
        low[m] = pack<T>(p[m].x - rounded.x, p[m].y - rounded.y);
      }
      // Number r of this lane's dimensions, of both slots.
      const auto both = [&](int r) {
        const auto word = [&](const uint4& x) { return r % 8 / 2 == 0 ? x.x : r % 8 / 2 == 1 ? x.y : r % 8 / 2 == 2 ? x.z : x.w; };
        return __byte_perm(word(words[r / 8 * 2]), word(words[r / 8 * 2 + 1]), r % 2 ? 0x7632 : 0x5410);
      };
#pragma unroll
      for (int r = 0; r < kOutputs; r++) {
        const uint32_t first = both(r), second = both(r + kOutputs);
#pragma unroll
        for (int m = 0; m < kMine; m++) {
          mma_narrow<kBf16>(sums[m][r], first, second, high[m]);
          mma_narrow<kBf16>(sums[m][r], first, second, low[m]);
        }
      }
    }
    await_items<0>();
  }

  /** Leaves them in this warp's region. */
  __device__ void keep_sums(int32_t) {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kMine; m++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int32_t head = m * 8 + 2 * i + h;
        if (head >= kGroup) continue;
#pragma unroll
        for (int r = 0; r < kParts * 8; r += 4) {
          const auto number = [&](int k) { return sums[m][(r + k) % kOutputs][(r + k) / kOutputs * 2 + h]; };
          *reinterpret_cast<float4*>(reinterpret_cast<float*>(items) + head * kDim + (g + r / 8 * 8) * 8 + r % 8) = make_float4(number(0), number(1), number(2), number(3));
        }
      }
    }
  }
};

template <typename T, int kDim>
void by_heads(Context& ctx, const Cache& cache, const AttendView& a) {
  if (cache.group() <= 4) return start_attend<TensorWay<TensorCut<T, 4, kDim>>>(ctx, cache, a);
  if (cache.group() <= 8) return start_attend<TensorWay<TensorCut<T, 8, kDim>>>(ctx, cache, a);
  start_attend<TensorWay<TensorCut<T, 16, kDim>>>(ctx, cache, a);
}

template <typename T>
void by_dim(Context& ctx, const Cache& cache, const AttendView& a) {
  if (cache.head_dim <= 64) return by_heads<T, 64>(ctx, cache, a);
  if (cache.head_dim <= 128) return by_heads<T, 128>(ctx, cache, a);
  start_attend<TensorWay<TensorCut<T, 4, 256>>>(ctx, cache, a);
}

}  // namespace

bool attend_tensor(Context& ctx, const Cache& cache, const AttendView& a) {
  if (cache.dtype == WKV_F32 || cache.head_dim % 16 != 0 || cache.rope->count % 8 != 0) return false;
  if (cache.head_dim > 256 || (cache.head_dim > 128 && cache.group() > 4)) return false;
  if (cache.dtype == WKV_F16) by_dim<__half>(ctx, cache, a);
  else by_dim<__nv_bfloat16>(ctx, cache, a);
  return true;
}

}  // namespace wkv
