/** mma.cuh: copies into shared memory that do not wait, products of the tensor cores (sm_80 and later), and clusters (sm_90). */
#pragma once
#include <cstdint>

namespace wkv {

template <int kBytes>
__device__ inline void copy_async(void* shared, const void* from) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes) : "memory");
}
__device__ inline void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/** Waits until all but the last kLeft groups of this thread's copies have arrived. */
template <int kLeft>
__device__ inline void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory"); }

/** d = a [16 x 32] . b [32 x 8] + c in integers. Lane 4 g + i has a: 4 columns from 4 i of row g, of row g + 8, and both from 16 + 4 i;
 *  b: 4 rows from 4 i of column g, and from 16 + 4 i; c, d: columns 2 i, 2 i + 1 of row g, then of row g + 8. */
__device__ inline void mma_int8(int32_t (&d)[4], const int32_t (&a)[4], int32_t b0, int32_t b1, const int32_t (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

/** The same of 16 columns: a without what lies from 16 + 4 i on, b without b1. */
__device__ inline void mma_int8_short(int32_t (&d)[4], int32_t a0, int32_t a1, int32_t b, const int32_t (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(b), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

/** d = a [16 x 16] . b [16 x 8] + c in f32, a and b f16 or bf16. Lane 4 g + i has a: columns 2 i, 2 i + 1 of row g, of row g + 8, and both from
 *  8 + 2 i; b: rows 2 i, 2 i + 1 of column g, and from 8 + 2 i; c, d as above. */
template <bool kBf16>
__device__ inline void mma_half(float (&d)[4], const int32_t (&a)[4], int32_t b0, int32_t b1, const float (&c)[4]) {
  if constexpr (kBf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
}

/** Blocks that a cluster can have on every GPU that has clusters. */
constexpr int kMostParts = 8;

__device__ inline void arrive_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ inline void wait_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
/** A float of shared memory in block `rank` of the cluster. */
__device__ inline float load_peer(const float* own, int32_t rank) {
  float value = 0.0f;
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(own))), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
#endif
  return value;
}
/** The sum of this float over the cluster's blocks, in their order. */
__device__ inline float sum_peers(const float* own, int32_t parts) {
  float each[kMostParts], all = 0.0f;
#pragma unroll
  for (int rank = 0; rank < kMostParts; rank++) each[rank] = rank < parts ? load_peer(own, rank) : 0.0f;
#pragma unroll
  for (int rank = 0; rank < kMostParts; rank++) all += each[rank];
  return all;
}

}  // namespace wkv
