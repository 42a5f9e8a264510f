/**
 * planted.cu: one bug for each tool of compute-sanitizer; sanitize_cuda.ts runs it to see that each tool would report one.
 *
 *   nvcc -std=c++17 -O1 -lineinfo -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 -cudart static
 *     tests/planted.cu -o build/planted && build/planted memcheck
 */
#include <cstdio>
#include <cstring>

constexpr int kThreads = 128;

/** memcheck: the last thread writes behind the end. */
__global__ void write_out_of_bounds(int* out, int count) {
  if (threadIdx.x <= unsigned(count)) out[threadIdx.x] = int(threadIdx.x);
}

/** racecheck: a neighbour's word is read with no barrier after it is written. */
__global__ void race_in_shared(int* out) {
  __shared__ int words[kThreads];
  words[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = words[(threadIdx.x + 37) % kThreads];
}

/** initcheck: sums what nothing wrote. */
__global__ void read_uninitialised(const int* in, int* out) { out[threadIdx.x] = in[threadIdx.x] + 1; }

/** synccheck: odd threads wait at a barrier of the warp's even ones. */
__global__ void foreign_barrier(int* out) {
  out[threadIdx.x] = 1;
  if (threadIdx.x % 2 == 1) __syncwarp(0x55555555u);
  out[threadIdx.x] += 1;
}

int main(int count, char** words) {
  const char* tool = count > 1 ? words[1] : "";
  // An allocation of the exact size, and one beside it that is never written.
  int *out = nullptr, *empty = nullptr;
  if (cudaMalloc(&out, kThreads * sizeof(int)) != cudaSuccess || cudaMalloc(&empty, kThreads * sizeof(int)) != cudaSuccess) {
    std::fprintf(stderr, "no GPU: %s\n", cudaGetErrorString(cudaGetLastError()));
    return 1;
  }
  if (!std::strcmp(tool, "memcheck")) write_out_of_bounds<<<1, kThreads + 32>>>(out, kThreads);
  else if (!std::strcmp(tool, "racecheck")) race_in_shared<<<1, kThreads>>>(out);
  else if (!std::strcmp(tool, "initcheck")) read_uninitialised<<<1, kThreads>>>(empty, out);
  else if (!std::strcmp(tool, "synccheck")) foreign_barrier<<<1, kThreads>>>(out);
  else {
    std::fprintf(stderr, "usage: planted memcheck|racecheck|initcheck|synccheck\n");
    return 2;
  }
  cudaDeviceSynchronize();
  std::printf("%s\n", cudaGetErrorString(cudaGetLastError()));
  cudaFree(empty);
  cudaFree(out);
  return 0;
}
