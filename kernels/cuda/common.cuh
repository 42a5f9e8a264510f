/** common.cuh: what every file of the CUDA library shares: the context with its stream, device memory, tensors, data errors, reductions. */
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>
#include <utility>
#include <vector>

#include "../handles.hpp"
#include "../quants.h"

namespace wkv {

/** Throws the failure that a CUDA error is, and remembers it when the device is lost to this process with it. */
[[noreturn]] void fail_device(cudaError_t error, const std::string& what);

/** Fails once the device is lost to this process, with the text of the first failure. */
void require_device();

/** Turns a CUDA error into a failure. */
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail_device(error, what);
}

/** Device memory, given back with its last owner. */
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) : bytes_(bytes) {
    const cudaError_t error = cudaMalloc(&data_, bytes ? bytes : 1);
    if (error != cudaSuccess) fail_device(error, "Allocating " + std::to_string(bytes) + " bytes on the device");
    count_bytes(static_cast<int64_t>(bytes_));
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() {
    cudaFree(data_);
    count_bytes(-static_cast<int64_t>(bytes_));
  }
  template <typename T>
  T* as(size_t byte = 0) const { return reinterpret_cast<T*>(static_cast<uint8_t*>(data_) + byte); }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};
using DeviceRef = std::shared_ptr<DeviceMemory>;

/** Host memory that kernels reach, given back with its last owner. */
class HostMemory {
 public:
  explicit HostMemory(size_t bytes) { check(cudaHostAlloc(&data_, bytes, cudaHostAllocMapped), "Allocating host memory"); }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;
  ~HostMemory() { cudaFreeHost(data_); }
  template <typename T>
  T* as(size_t byte = 0) const { return reinterpret_cast<T*>(static_cast<uint8_t*>(data_) + byte); }

 private:
  void* data_ = nullptr;
};

// ---- data errors: found on the device, read after a run ----

enum class Fault : int32_t { None, Token, Target, NanLogit, NanAttention, NanScore, Full, Rank, OneStep };

/** What the first faulty thread left. */
struct FaultWord {
  Fault fault;
  int32_t values[4];
};

/** Where kernels report; passed by value. The first report since the last read wins. */
struct Faults {
  int32_t* taken;   // device memory
  FaultWord* word;  // host memory, mapped
  __device__ void report(Fault fault, int32_t a, int32_t b = 0, int32_t c = 0, int32_t d = 0) const {
    if (atomicCAS(taken, 0, 1) != 0) return;
    word->values[0] = a, word->values[1] = b, word->values[2] = c, word->values[3] = d;
    word->fault = fault;
    __threadfence_system();
  }
};

// ---- tensors ----

WKV_HD constexpr bool is_quantised(int32_t dtype) { return dtype >= WKV_Q8_0; }

/**
 * A weight as kernels see it. Quantised rows lie in planes, each with a part for every 32 columns:
 * - data: 32 bytes (Q8_0); 16 bytes of low and high halves, as in the file (4 low bits); 8 bytes (2 low bits: columns 4 v .. 4 v + 3 at
 *   bit 2 v of bytes 0 to 3, columns 16 + 4 v .. of bytes 4 to 7).
 * - scales: an f16, or a pair (scale, minimum); K types have a pair for every 256 columns.
 * - high: 4 bytes (1 bit: columns 4 v .. at bit v, 16 + 4 v .. at bit 4 + v) or 8 (2 bits, as the low 2).
 * - subs: 2 bytes, the sub-scales of K types (wkv_piece in quants.h).
 */
struct WeightView {
  int32_t dtype, rows, columns;
  const uint8_t* data;
  const __half* scales;
  const uint8_t* high;
  const uint16_t* subs;
};

/** Bytes of 32 columns in each plane; scales: of 256 columns in K types. */
WKV_HD constexpr int32_t data_bytes(int32_t dtype) { return wkv_form_of(dtype).low * 4; }
WKV_HD constexpr int32_t high_bytes(int32_t dtype) { return wkv_form_of(dtype).high * 4; }
WKV_HD constexpr int32_t subs_bytes(int32_t dtype) { return wkv_form_of(dtype).subs ? 2 : 0; }
WKV_HD constexpr int32_t scale_bytes(int32_t dtype) { return wkv_form_of(dtype).least || wkv_form_of(dtype).subs ? 4 : 2; }
/** Columns that share an entry of the plane of scales. */
WKV_HD constexpr int32_t scale_columns(int32_t dtype) { return wkv_form_of(dtype).columns; }

/** A plane of a weight, 0 to 3 as WeightView has them: so many bytes for every so many columns. */
struct Plane {
  int32_t columns, bytes;
};
WKV_HD constexpr Plane plane_of(int32_t dtype, int p) {
  if (!is_quantised(dtype)) return {1, p > 0 ? 0 : dtype == WKV_F32 ? 4 : 2};
  if (p == 0) return {32, data_bytes(dtype)};
  if (p == 1) return {scale_columns(dtype), scale_bytes(dtype)};
  return {32, p == 2 ? high_bytes(dtype) : subs_bytes(dtype)};
}

/** Number i of 32 columns of a type of quants.h, from their parts of the planes. */
WKV_HD inline float piece_number(int32_t dtype, const uint8_t* data, const uint8_t* high, uint32_t subs, float d, float least, int32_t i) {
  const wkv_form form = wkv_form_of(dtype);
  const int32_t half = i / 16, v = i % 16 / 4, c = i % 4;
  int32_t q = form.low == 4 ? data[i % 16] >> (half * 4) & 15 : data[half * 4 + c] >> (v * 2) & 3;
  if (form.high == 1) q |= (high[c] >> (half * 4 + v) & 1) << form.low;
  if (form.high == 2) q |= (high[half * 4 + c] >> (v * 2) & 3) << form.low;
  if (dtype == WKV_IQ4_NL) {
    constexpr int8_t values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    return d * static_cast<float>(values[q]);
  }
  const int32_t first = static_cast<int32_t>(subs & 255), second = static_cast<int32_t>(subs >> 8), own = half ? second : first;
  const float x = static_cast<float>(q - form.middle);
  if (dtype == WKV_Q2_K) return d * static_cast<float>(own & 15) * x - least * static_cast<float>(own >> 4);
  if (form.subs && form.least) return d * static_cast<float>(first) * x - least * static_cast<float>(second);
  if (form.subs) return d * static_cast<float>(static_cast<int8_t>(own)) * x;
  return d * x + least;
}

struct Tensor : Object {
  int32_t dtype, rows, columns;
  size_t scales_at = 0, high_at = 0, subs_at = 0;  // where the other planes begin
  DeviceRef memory;
  std::shared_ptr<HostMemory> mirror;  // the same numbers, of what wkv_sample writes: they are read without a copy
  Tensor(int32_t dtype, int32_t rows, int32_t columns);
  size_t bytes() const override { return memory->bytes(); }
  float* f32() const { return memory->as<float>(); }
  int32_t* i32() const { return memory->as<int32_t>(); }
  float* row(int64_t r) const { return f32() + r * columns; }
  WeightView view() const { return {dtype, rows, columns, memory->as<uint8_t>(), memory->as<__half>(scales_at), memory->as<uint8_t>(high_at), memory->as<uint16_t>(subs_at)}; }
};
using TensorRef = std::shared_ptr<Tensor>;

inline TensorRef find_tensor(int32_t context, int32_t handle, const char* what) {
  return find<Tensor>(context, handle, Kind::Tensor, what);
}
/** A tensor of this dtype with at least these rows and exactly these columns (-1: any). */
TensorRef find_tensor(int32_t context, int32_t handle, const char* what, int32_t dtype, int32_t rows, int32_t columns);

// ---- context ----

/** A captured graph, and all that its kernels read and write. */
struct Graph : Object {
  cudaGraphExec_t run = nullptr;
  bool takes_device = false;  // a kernel's blocks wait for each other, one a multiprocessor
  std::vector<std::shared_ptr<void>> holds;
  Graph() : Object(Kind::Graph) {}
  ~Graph() override {
    if (run) cudaGraphExecDestroy(run);
  }
};

class Chain;

/** One GPU. Ops go to `stream`, which may be recording; graphs and copies to `side`, as they may run meanwhile. Between two entries
 *  nothing runs but what wkv_graph_start started, which an op that is not recorded waits for, so the two need no order. */
struct Context : ContextBase {
  int32_t device = 0, processors = 0;
  int32_t shared_limit = 0;  // bytes a block; WKV_CUDA_SHARED_KB lowers it, to test what smaller GPUs take
  bool shared_device = false;  // other processes' kernels run beside ours (MPS)
  int64_t least_grid = 0;    // bytes of weights from which chain_grid.cu is the fastest; WKV_CUDA_GRID_MB sets it, to test that on small ones
  int32_t capability = 0;    // 90 for 9.0: the device's, or that of the code it runs when this is lower
  std::string name;          // for wkv_device
  cudaStream_t stream = nullptr, side = nullptr;
  DeviceRef taken;
  FaultWord* word = nullptr;
  std::shared_ptr<Graph> recording;
  std::shared_ptr<Graph> going;     // what wkv_graph_start started, until it is known to have ended
  std::unique_ptr<Failure> failed;  // what that run failed with, until wkv_graph_poll tells it
  DeviceRef scratch;  // an op's intermediate results; a graph holds the one it was recorded with
  std::shared_ptr<Chain> chain;  // products that are recorded and not launched yet (chain.cu); null: none ever
  uint64_t launches = 0;
  Context();
  ~Context() override;

  Faults faults() const { return {taken->as<int32_t>(), word}; }
  /** Memory for this op's intermediate results, good until the op ends. */
  uint8_t* reserve(size_t bytes);
  /** Keeps what an op uses for as long as the graph that is recorded. */
  template <typename... Refs>
  void hold(const Refs&... refs) {
    if (recording) (recording->holds.push_back(refs), ...);
  }
  /** Launches the products that wait in `chain`; launch() does so first. */
  void flush();
  /** Launches a graph so many times. Two that take the device never run at once: each might have what the other waits for. */
  void start(const Graph& graph, int32_t times = 1);
  /** Ends an op: checks its launches and, unless a graph is recorded, waits for it and for its faults. */
  void submitted();
  /** Waits for a stream, and fails with the fault that kernels left. */
  void finish(cudaStream_t ran);
  /** Waits for what wkv_graph_start started, and keeps its failure. */
  void settle();
  void copy(void* to, const void* from, size_t bytes);
  void zero(void* to, size_t bytes);

 private:
  void release();
};

/** An entry that may find a graph running. */
template <typename Body>
int32_t entry_meanwhile(int32_t handle, Body body) {
  return entry_of<Context>(handle, [&](Context& context) {
    require_device();
    check(cudaSetDevice(context.device), "Choosing the device");
    body(context);
  });
}

/** An entry that finds nothing running, unless it only records. */
template <typename Body>
int32_t entry(int32_t handle, Body body) {
  return entry_meanwhile(handle, [&](Context& context) {
    if (!context.recording) context.settle();
    body(context);
  });
}

/** Lets a kernel use this much shared memory: what it declares itself, 26 KB at most, counts towards the 48 KB that need no leave. */
template <typename Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  if (bytes > 22 * 1024) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), "Shared memory");
}

/** How a kernel is launched; `cluster`: blocks along x that share their memory. */
struct Shape {
  dim3 grid, block;
  size_t shared = 0;
  uint32_t cluster = 1;
};

/** Launches a kernel on the context's stream, through which all ops go. From sm_90 on its blocks may start while the kernel before it
 *  ends (programmatic dependent launch), so every kernel calls wait_for_previous() before it reads or writes what earlier kernels did. */
template <typename... Parameters, typename... Arguments>
void launch(Context& ctx, void (*kernel)(Parameters...), const Shape& shape, Arguments&&... arguments) {
  ctx.flush();
  allow_shared(kernel, shape.shared);
  ctx.launches++;
  cudaLaunchAttribute attributes[2];
  uint32_t count = 0;
  if (ctx.capability >= 90) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim = {shape.cluster, 1, 1};
    count++;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid, config.blockDim = shape.block, config.dynamicSmemBytes = shape.shared, config.stream = ctx.stream;
  config.attrs = attributes, config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "Launching a kernel");
}

inline int32_t divide_up(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }
inline size_t round_up(size_t bytes, size_t to = 256) { return (bytes + to - 1) / to * to; }

// ---- device helpers ----

/** Waits until the kernels before this one have ended and what they wrote can be seen. */
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/** Lets the next kernel's blocks start where there is room for them. Only after wait_for_previous(): so a kernel that runs knows that all
 *  but the one before it have ended. */
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}
__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
  return x;
}

/** The block's sum in a fixed order, in every thread; `area` holds 32 doubles. */
__device__ inline double block_sum(double x, double* area) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  x = warp_sum(x);
  __syncthreads();
  if (lane == 0) area[warp] = x;
  __syncthreads();
  double total = 0.0;
  for (int w = 0; w < warps; w++) total += area[w];
  return total;
}

/** The block's highest, in every thread; `area` holds 32 floats. */
__device__ inline float block_max(float x, float* area) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  x = warp_max(x);
  __syncthreads();
  if (lane == 0) area[warp] = x;
  __syncthreads();
  float most = area[0];
  for (int w = 1; w < warps; w++) most = fmaxf(most, area[w]);
  return most;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

/** One number of a weight. */
__device__ inline float weight_at(const WeightView& w, int64_t row, int32_t column) {
  const int64_t i = row * w.columns + column;
  switch (w.dtype) {
    case WKV_F32: return reinterpret_cast<const float*>(w.data)[i];
    case WKV_F16: return __half2float(reinterpret_cast<const __half*>(w.data)[i]);
    case WKV_BF16: return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(w.data)[i]);
    default: break;
  }
  const int64_t block = row * (w.columns / 32) + column / 32;
  const int32_t within = column % 32;
  if (wkv_has_pieces(w.dtype)) {
    const int64_t scale = i / scale_columns(w.dtype) * (scale_bytes(w.dtype) / 2);
    const float least = scale_bytes(w.dtype) == 4 ? __half2float(w.scales[scale + 1]) : 0.0f;
    return piece_number(w.dtype, w.data + block * data_bytes(w.dtype), w.high + block * high_bytes(w.dtype), subs_bytes(w.dtype) ? w.subs[block] : 0, __half2float(w.scales[scale]), least, within);
  }
  if (w.dtype == WKV_Q8_0) return reinterpret_cast<const int8_t*>(w.data)[block * 32 + within] * __half2float(w.scales[block]);
  const int32_t nibble = w.data[block * 16 + within % 16] >> (within / 16 * 4) & 15;
  if (w.dtype == WKV_Q4_0) return (nibble - 8) * __half2float(w.scales[block]);
  return fmaf(nibble, __half2float(w.scales[block * 2]), __half2float(w.scales[block * 2 + 1]));
}

}  // namespace wkv
