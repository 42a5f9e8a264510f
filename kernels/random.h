/** random.h: the counter-based random numbers of wkv_sample, the same on both libraries. */
#ifndef WKV_RANDOM_H
#define WKV_RANDOM_H
#include <stdint.h>

#ifdef __CUDACC__
#define WKV_RANDOM_HD __host__ __device__
#else
#define WKV_RANDOM_HD
#endif

/** SplitMix64's output function. */
WKV_RANDOM_HD inline uint64_t wkv_mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

/** Uniform in [0, 1) with 24 bits: place `draw` of the stream `seed`; seeds are mixed first, so that near ones share nothing. */
WKV_RANDOM_HD inline float wkv_uniform(uint64_t seed, uint32_t draw) {
  const uint64_t z = wkv_mix(wkv_mix(seed) + 0x9e3779b97f4a7c15ull * ((uint64_t)draw + 1));
  return (float)(z >> 40) * (1.0f / 16777216.0f);
}

#endif
