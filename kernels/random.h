/** random.h: the counter-based random numbers of wkv_sample, the same on both libraries. */
#ifndef WKV_RANDOM_H
#define WKV_RANDOM_H
#include <stdint.h>

#ifdef __CUDACC__
#define WKV_RANDOM_HD __host__ __device__
#else
#define WKV_RANDOM_HD
#endif

/** Uniform in [0, 1) with 24 bits: SplitMix64's output function at place `draw` of the stream `seed`. */
WKV_RANDOM_HD inline float wkv_uniform(uint64_t seed, uint32_t draw) {
  uint64_t z = seed + 0x9e3779b97f4a7c15ull * ((uint64_t)draw + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return (float)(z >> 40) * (1.0f / 16777216.0f);
}

#endif
