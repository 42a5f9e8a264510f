/** fours.cuh: rows four numbers at a time. */
#pragma once
#include "common.cuh"

namespace wkv {

/** Four numbers of a row; where they lie in memory, a multiple of four from an aligned start. */
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};
template <typename To, typename From, typename Body>
__device__ inline Four<To> each(const Four<From>& from, Body body) {
  Four<To> to;
#pragma unroll
  for (int k = 0; k < 4; k++) to.x[k] = body(from.x[k], k);
  return to;
}
template <typename T>
__device__ inline const Four<T>& four_at(const T* from) { return *reinterpret_cast<const Four<T>*>(from); }
template <typename T>
__device__ inline Four<T>& four_at(T* from) { return *reinterpret_cast<Four<T>*>(from); }

}  // namespace wkv
