/**
 * Measures how fast a GPU reads its memory, in bytes a second: the ceiling of a decode step, which hardly writes. Built and run by memory.ts.
 *
 * Two kernels read 1 GiB, beyond any L2, in several shapes each: `loads`, in which every thread has 8 loads of 16 bytes under way, and from
 * compute capability 9.0 on `bulk`, in which one thread of a block keeps a ring of bulk copies to shared memory under way and nobody looks
 * at what came. A shape's figure is the median of 10 samples of 10 passes between two events, after warming up; a kernel's is that of its
 * best shape. Prints {"loads": B/s, "bulk": B/s or null}.
 */
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr size_t kBytes = size_t{1} << 30;
constexpr int kUnroll = 8, kSamples = 10, kPasses = 10, kWarmUp = 30;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

/** A block reads pieces of blockDim.x x kUnroll x 16 bytes, one of every gridDim.x. */
__global__ void loads(const uint4* data, size_t count, uint32_t* out) {
  const size_t piece = size_t{blockDim.x} * kUnroll;
  uint32_t sum = 0;
  for (size_t at = blockIdx.x * piece; at < count; at += gridDim.x * piece) {
    uint4 x[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; i++) {
      const uint4* from = data + at + size_t(i) * blockDim.x + threadIdx.x;
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x[i].x), "=r"(x[i].y), "=r"(x[i].z), "=r"(x[i].w) : "l"(from));
    }
#pragma unroll
    for (int i = 0; i < kUnroll; i++) sum ^= x[i].x ^ x[i].y ^ x[i].z ^ x[i].w;
  }
  if (sum == 0x9e3779b9u) *out = sum;  // never, but the compiler does not know
}

/** A block reads pieces of `piece` bytes, one of every gridDim.x, with at most `stages` under way. */
__global__ void bulk(const uint8_t* data, size_t bytes, uint32_t piece, uint32_t stages) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t ring[];
  __shared__ uint64_t barriers[32];
  if (threadIdx.x != 0) return;
  const auto shared = [](const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); };
  for (uint32_t s = 0; s < stages; s++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared(barriers + s)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  const size_t pieces = bytes / piece, own = (pieces - blockIdx.x + gridDim.x - 1) / gridDim.x;
  for (size_t i = 0; i < own + stages; i++) {
    const uint32_t s = i % stages, barrier = shared(barriers + s);
    if (i >= stages) {
      const uint32_t parity = (i / stages - 1) & 1;
      uint32_t done = 0;
      while (!done) {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
      }
    }
    if (i >= own) continue;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(piece) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared(ring) + s * piece), "l"(data + (i * gridDim.x + blockIdx.x) * piece), "r"(piece), "r"(barrier) : "memory");
  }
#endif
}

/** Median bytes a second of what `pass` reads. */
template <typename Pass>
double measure(Pass pass) {
  cudaEvent_t start, end;
  check(cudaEventCreate(&start), "Making an event");
  check(cudaEventCreate(&end), "Making an event");
  for (int i = 0; i < kWarmUp; i++) pass();
  std::vector<float> samples;
  for (int i = 0; i < kSamples; i++) {
    check(cudaEventRecord(start), "Recording an event");
    for (int k = 0; k < kPasses; k++) pass();
    check(cudaEventRecord(end), "Recording an event");
    check(cudaEventSynchronize(end), "Reading");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start, end), "Asking for a time");
    samples.push_back(ms);
  }
  check(cudaGetLastError(), "Launching a kernel");
  std::sort(samples.begin(), samples.end());
  return kPasses * double(kBytes) / ((samples[kSamples / 2 - 1] + samples[kSamples / 2]) / 2 / 1e3);
}

}  // namespace

int main() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "Asking for the device");
  uint8_t* data = nullptr;
  check(cudaMalloc(&data, kBytes), "Allocating");
  // No zeros, which hardware may take for less than they are.
  check(cudaMemset(data, 0x5a, kBytes), "Filling");
  uint32_t* out = reinterpret_cast<uint32_t*>(data);
  double best_loads = 0, best_bulk = 0;
  for (const int threads : {256, 512, 1024}) {
    for (const int rounds : {1, 2, 4}) {
      const int grid = device.multiProcessorCount * (2048 / threads) * rounds;
      best_loads = std::max(best_loads, measure([&] { loads<<<grid, threads>>>(reinterpret_cast<const uint4*>(data), kBytes / 16, out); }));
    }
  }
  if (device.major >= 9) {
    for (const uint32_t kb : {8, 16, 32}) {
      for (const uint32_t blocks : {1, 2}) {
        const uint32_t stages = std::min<uint32_t>(32, 208 / blocks / kb), shared = stages * kb * 1024;
        check(cudaFuncSetAttribute(bulk, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), "Shared memory");
        best_bulk = std::max(best_bulk, measure([&] { bulk<<<device.multiProcessorCount * blocks, 32, shared>>>(data, kBytes, kb * 1024, stages); }));
      }
    }
  }
  std::printf("{\"loads\": %.0f, \"bulk\": ", best_loads);
  if (best_bulk > 0) std::printf("%.0f}\n", best_bulk);
  else std::printf("null}\n");
}
