/** runtime.cu: contexts, tensors and graphs of the CUDA library. */
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>

#include "chain.cuh"
#include "cublaslt.cuh"

namespace wkv {

// ---- failures of the device ----

namespace {
std::mutex lost_mutex;
std::string lost;  // the failure with which the device was lost; empty: it was not

/** 13.0 for 13000. */
std::string version_text(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

/** Why there is no device, and what would be right. */
[[noreturn]] void fail_no_device(cudaError_t error) {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  cudaGetLastError();
  const std::string needed = "a driver for CUDA " + std::to_string(CUDART_VERSION / 1000) + ".0 or later";
  if (driver == 0) fail(WKV_DEVICE, "There is no NVIDIA driver: install " + needed);
  const std::string found = "The NVIDIA driver is for CUDA " + version_text(driver);
  if (error == cudaErrorInsufficientDriver) fail(WKV_DEVICE, found + ", and this library needs " + needed);
  if (error == cudaErrorNoDevice || error == cudaSuccess) {
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    fail(WKV_DEVICE, found + " and finds no GPU: nvidia-smi must list one" + (visible ? std::string(", and CUDA_VISIBLE_DEVICES let it be seen (\"") + visible + "\")" : ""));
  }
  fail(WKV_DEVICE, found + " and opens no GPU: " + cudaGetErrorString(error));
}
}  // namespace

void fail_device(cudaError_t error, const std::string& what) {
  cudaGetLastError();  // an error that goes away must not reach the next call
  const std::string text = what + ": " + cudaGetErrorString(error);
  size_t free = 0, all = 0;
  const cudaError_t now = cudaMemGetInfo(&free, &all);
  if (now == cudaSuccess && error == cudaErrorMemoryAllocation) {
    fail(WKV_MEMORY, text + ", " + std::to_string(free) + " of " + std::to_string(all) + " bytes are free");
  }
  if (now != cudaSuccess) {
    cudaGetLastError();
    std::lock_guard<std::mutex> lock(lost_mutex);
    if (lost.empty()) lost = text;
  }
  require_device();
  fail(WKV_DEVICE, text);
}

void require_device() {
  std::lock_guard<std::mutex> lock(lost_mutex);
  if (!lost.empty()) fail(WKV_DEVICE, lost + "; with this failure the GPU's memory is lost to this process, which must start anew");
}

// ---- context ----

namespace {
__global__ void probe() {}

std::string fault_text(const FaultWord& word, int32_t* status) {
  const auto n = [&](int i) { return std::to_string(word.values[i]); };
  *status = word.fault == Fault::Full || word.fault == Fault::Rank || word.fault == Fault::OneStep ? WKV_INVALID : WKV_DATA;
  switch (word.fault) {
    case Fault::Token: return "Token " + n(0) + " is outside the table of " + n(1);
    case Fault::Target: return "Target " + n(0) + " is outside the vocabulary of " + n(1);
    case Fault::NanLogit: return "The logit of token " + n(0) + " is not a number";
    case Fault::NanAttention: return "The attention of layer " + n(0) + " is not a number";
    case Fault::NanScore: return "What rank " + n(0) + " is chosen by is not a number";
    case Fault::Full: return "The cache is full: its policy keeps every token, and it has " + n(0) + " slots";
    case Fault::OneStep: return "This policy chooses by the weights of one step: feed the tokens that the cache has no room for one by one";
    default: return "Rank " + n(0) + " may not leave a cache of " + n(1) + " tokens with " + n(2) + " sinks and " + n(3) + " recent";
  }
}
}  // namespace

namespace {
/** A whole number from the environment. */
int64_t environment(const char* name, int64_t least, int64_t most, int64_t otherwise) {
  const char* text = std::getenv(name);
  if (!text || !*text) return otherwise;
  char* end = nullptr;
  const long long number = std::strtoll(text, &end, 10);
  if (*end || number < least || number > most) {
    fail(WKV_INVALID, std::string(name) + " must be a whole number between " + std::to_string(least) + " and " + std::to_string(most) + ": current value is \"" + text + "\"");
  }
  return number;
}
}  // namespace

Context::Context() {
  require_device();
  int32_t count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) fail_no_device(error);
  check(cudaSetDevice(device), "Choosing the device");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "Asking for the device's properties");
  int32_t driver = 0;
  check(cudaDriverGetVersion(&driver), "Asking for the driver's version");
  processors = properties.multiProcessorCount;
  int mps = 0;
  check(cudaDeviceGetAttribute(&mps, cudaDevAttrMpsEnabled, device), "Asking for the device");
  shared_device = mps != 0;
  capability = properties.major * 10 + properties.minor;
  const int64_t shared_kb = static_cast<int64_t>(properties.sharedMemPerBlockOptin / 1024);
  shared_limit = static_cast<int32_t>(environment("WKV_CUDA_SHARED_KB", 48, shared_kb, shared_kb) * 1024);
  least_grid = environment("WKV_CUDA_GRID_MB", 0, 1 << 20, 64) << 20;
  name = std::string(properties.name) + ", sm_" + std::to_string(capability) + ", " + std::to_string(processors) + " multiprocessors, driver " + version_text(driver);
  if (properties.major < 8) fail(WKV_DEVICE, name + ": the GPU is too old, compute capability 8.0 or later is needed");
  cudaFuncAttributes attributes;
  const cudaError_t loaded = cudaFuncGetAttributes(&attributes, probe);
  if (loaded == cudaErrorNoKernelImageForDevice || loaded == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    fail(WKV_DEVICE, name + ": the library was built for other GPUs; WKV_CUDA_TARGETS=sm_" + std::to_string(capability) + " builds it for this one");
  }
  check(loaded, "Loading the kernels");
  capability = std::min(capability, attributes.ptxVersion);
  try {
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "Opening a stream");
    check(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking), "Opening a stream");
    taken = std::make_shared<DeviceMemory>(sizeof(int32_t));
    zero(taken->as<void>(), sizeof(int32_t));
    check(cudaHostAlloc(reinterpret_cast<void**>(&word), sizeof(FaultWord), cudaHostAllocMapped), "Allocating host memory");
    *word = FaultWord{};
  } catch (...) {
    release();
    throw;
  }
}

namespace {
std::mutex turn_mutex;
std::map<int32_t, Context*> turns;  // by device: whose graph took it last
}  // namespace

Context::~Context() { release(); }

void Context::release() {
  if (going) cudaStreamSynchronize(side);
  {
    std::lock_guard<std::mutex> lock(turn_mutex);
    const auto turn = turns.find(device);
    if (turn != turns.end() && turn->second == this) turns.erase(turn);
  }
  if (word) cudaFreeHost(word);
  if (side) cudaStreamDestroy(side);
  if (stream) cudaStreamDestroy(stream);
}

uint8_t* Context::reserve(size_t bytes) {
  if (!scratch || scratch->bytes() < bytes) scratch = std::make_shared<DeviceMemory>(round_up(bytes, size_t{1} << 20));
  hold(scratch);
  return scratch->as<uint8_t>();
}

void Context::start(const Graph& graph, int32_t times) {
  std::unique_lock<std::mutex> lock(turn_mutex, std::defer_lock);
  if (graph.takes_device) {
    lock.lock();
    Context*& last = turns[device];
    if (last && last != this) {
      cudaEvent_t ended;
      check(cudaEventCreateWithFlags(&ended, cudaEventDisableTiming), "Making an event");
      const std::shared_ptr<void> owner(ended, [](void* event) { cudaEventDestroy(static_cast<cudaEvent_t>(event)); });
      check(cudaEventRecord(ended, last->side), "Recording an event");
      check(cudaStreamWaitEvent(side, ended), "Waiting for another context's graph");
    }
    last = this;
  }
  for (int32_t i = 0; i < times; i++) check(cudaGraphLaunch(graph.run, side), "Launching a graph");
}

void Context::submitted() {
  check(cudaGetLastError(), "Launching a kernel");
  if (!recording) finish(stream);
}

void Context::finish(cudaStream_t ran) {
  check(cudaStreamSynchronize(ran), "Running kernels");
  if (word->fault == Fault::None) return;
  int32_t status;
  const std::string text = fault_text(*word, &status);
  *word = FaultWord{};
  zero(taken->as<void>(), sizeof(int32_t));
  fail(status, text);
}

void Context::settle() {
  if (!going) return;
  const std::shared_ptr<Graph> ended = std::move(going);
  going.reset();
  try {
    finish(side);
  } catch (const Failure& failure) {
    failed = std::make_unique<Failure>(failure);
  }
}

void Context::copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, side), "Copying");
  check(cudaStreamSynchronize(side), "Copying");
}

void Context::zero(void* to, size_t bytes) {
  check(cudaMemsetAsync(to, 0, bytes, side), "Clearing memory");
  check(cudaStreamSynchronize(side), "Clearing memory");
}

// ---- tensors ----

namespace {
bool finite(const uint8_t* half) { return (half[1] & 0x7c) != 0x7c; }
[[noreturn]] void refuse_scale(int64_t row, int64_t block) {
  fail(WKV_DATA, "Row " + std::to_string(row) + ": The scale of block " + std::to_string(block) + " is not finite");
}

/** Rows of a quantised weight, spread over the planes of WeightView. */
struct Planes {
  std::vector<uint8_t> data, scales, high, subs;
  Planes(int32_t dtype, int64_t columns, int64_t rows)
      : data(size_t(rows * columns / 32 * data_bytes(dtype))), scales(size_t(rows * columns / scale_columns(dtype) * scale_bytes(dtype))),
        high(size_t(rows * columns / 32 * high_bytes(dtype))), subs(size_t(rows * columns / 32 * subs_bytes(dtype))) {}
};

/** Spreads rows in file order out. */
Planes split(const Tensor& tensor, int32_t row, int32_t rows, const uint8_t* from) {
  const int32_t dtype = tensor.dtype;
  const wkv_form form = wkv_form_of(dtype);
  const int64_t pieces = tensor.columns / 32, blocks = tensor.columns / form.columns;
  Planes to(dtype, tensor.columns, rows);
  const int32_t q = data_bytes(dtype), s = scale_bytes(dtype), h = high_bytes(dtype);
  for (int64_t i = 0; i < rows * pieces; i++) {
    const int64_t block = i * 32 / form.columns;
    const uint8_t* at = from + block * form.bytes;
    if (!wkv_has_pieces(dtype)) {
      if (!finite(at) || (s == 4 && !finite(at + 2))) refuse_scale(row + i / pieces, block % blocks);
      std::memcpy(to.scales.data() + i * s, at, size_t(s));
      std::memcpy(to.data.data() + i * q, at + s, size_t(q));
      continue;
    }
    wkv_piece piece;
    wkv_read_piece(dtype, at, form.subs ? static_cast<int32_t>(i % 8) : 0, &piece);
    const uint16_t pair[2] = {piece.d, piece.least};
    const auto* halves = reinterpret_cast<const uint8_t*>(pair);
    if (!finite(halves) || !finite(halves + 2)) refuse_scale(row + i / pieces, block % blocks);
    std::memcpy(to.scales.data() + block * s, pair, size_t(s));
    if (form.subs) std::memcpy(to.subs.data() + i * 2, piece.sub, 2);
    uint8_t *data = to.data.data() + i * q, *high = to.high.data() + i * h;
    for (int32_t k = 0; k < 32; k++) {
      const int32_t half = k / 16, v = k % 16 / 4, c = k % 4, low = piece.q[k] & ((1 << form.low) - 1), rest = piece.q[k] >> form.low;
      const auto put = [](uint8_t& byte, int32_t bits) { byte = static_cast<uint8_t>(byte | bits); };
      if (form.low == 4) put(data[k % 16], low << (half * 4));
      else put(data[half * 4 + c], low << (v * 2));
      if (form.high == 1) put(high[c], rest << (half * 4 + v));
      if (form.high == 2) put(high[half * 4 + c], rest << (v * 2));
    }
  }
  return to;
}

float half_to_float(const uint8_t* p) {
  __half_raw raw;
  std::memcpy(&raw.x, p, 2);
  return __half2float(__half(raw));
}

void check_rows(const Tensor& tensor, int32_t row, int32_t rows) {
  require(row >= 0 && rows >= 1 && row <= tensor.rows - rows, "rows " + std::to_string(row) + " to " + std::to_string(int64_t{row} + rows) + " of " + std::to_string(tensor.rows) + " asked for");
}
}  // namespace

Tensor::Tensor(int32_t dtype, int32_t rows, int32_t columns) : Object(Kind::Tensor), dtype(dtype), rows(rows), columns(columns) {
  size_t bytes = size_t(rows) * wkv_row_bytes(dtype, columns);
  if (is_quantised(dtype)) {
    const size_t pieces = size_t(rows) * (columns / 32);
    scales_at = round_up(pieces * data_bytes(dtype));
    high_at = round_up(scales_at + size_t(rows) * (columns / scale_columns(dtype)) * scale_bytes(dtype));
    subs_at = round_up(high_at + pieces * high_bytes(dtype));
    bytes = round_up(subs_at + pieces * subs_bytes(dtype));  // whole 16 bytes can be read
  }
  memory = std::make_shared<DeviceMemory>(bytes);
}

TensorRef find_tensor(int32_t context, int32_t handle, const char* what, int32_t dtype, int32_t rows, int32_t columns) {
  TensorRef tensor = find_tensor(context, handle, what);
  require(tensor->dtype == dtype, std::string(what) + " is of another dtype (" + std::to_string(tensor->dtype) + ", expected " + std::to_string(dtype) + ")");
  require(rows >= 0 && tensor->rows >= rows, std::string(what) + " has " + std::to_string(tensor->rows) + " rows, expected at least " + std::to_string(rows));
  require(columns < 0 || tensor->columns == columns, std::string(what) + " has " + std::to_string(tensor->columns) + " columns, expected " + std::to_string(columns));
  return tensor;
}

}  // namespace wkv

using namespace wkv;

int32_t wkv_context_open(int32_t threads, int32_t* out, int32_t out_bytes) {
  return guarded(nullptr, [&] {
    require(out != nullptr && out_bytes >= 4, "out must hold 4 bytes");
    require(threads >= 0 && threads <= 1024, "threads must be between 0 and 1024: " + std::to_string(threads));
    *out = add_handle(0, std::make_shared<Context>());
  });
}

int32_t wkv_device(int32_t context, char* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    require(out != nullptr && out_bytes >= 1, "out must hold a text");
    std::string products;
    give_text("CUDA, " + ctx.name + ", " + (cublaslt_loaded(&products) ? products : "no cuBLASLt"), out, out_bytes);
  });
}

int32_t wkv_tensor_open(int32_t context, int32_t dtype, int32_t rows, int32_t columns, int32_t* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    require_buffer(out, out_bytes, 4, "out");
    require(dtype >= WKV_F32 && dtype <= WKV_IQ4_NL, "dtype " + std::to_string(dtype) + " is unknown");
    require(rows >= 1 && columns >= 1, "rows and columns must be at least 1: " + std::to_string(rows) + " x " + std::to_string(columns));
    const int32_t whole = wkv_form_of(dtype).columns;
    require(columns % whole == 0, "columns must be a multiple of " + std::to_string(whole) + " for quantised rows of this type: " + std::to_string(columns));
    const auto tensor = std::make_shared<Tensor>(dtype, rows, columns);
    ctx.zero(tensor->memory->as<void>(), tensor->memory->bytes());
    *out = add_handle(context, tensor);
  });
}

int32_t wkv_tensor_write(int32_t context, int32_t handle, int32_t row, int32_t rows, const void* data, int32_t data_bytes) {
  return entry(context, [&](Context& ctx) {
    const TensorRef tensor = find_tensor(context, handle, "tensor");
    check_rows(*tensor, row, rows);
    const int64_t bytes = wkv_row_bytes(tensor->dtype, tensor->columns);
    require_buffer(data, data_bytes, rows * bytes, "data");
    if (tensor->mirror) {
      ctx.settle();  // a graph that runs while another is recorded may be about to write it
      std::memcpy(tensor->mirror->as<void>(row * bytes), data, size_t(rows * bytes));
    }
    if (!is_quantised(tensor->dtype)) {
      ctx.copy(tensor->memory->as<uint8_t>(row * bytes), data, size_t(rows * bytes));
      return;
    }
    const Planes planes = split(*tensor, row, rows, static_cast<const uint8_t*>(data));
    const auto copy = [&](size_t plane, const std::vector<uint8_t>& from) {
      if (!from.empty()) ctx.copy(tensor->memory->as<uint8_t>(plane + from.size() / rows * row), from.data(), from.size());
    };
    copy(0, planes.data);
    copy(tensor->scales_at, planes.scales);
    copy(tensor->high_at, planes.high);
    copy(tensor->subs_at, planes.subs);
  });
}

int32_t wkv_tensor_read(int32_t context, int32_t handle, int32_t row, int32_t rows, void* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    const TensorRef tensor = find_tensor(context, handle, "tensor");
    check_rows(*tensor, row, rows);
    const bool as_floats = is_quantised(tensor->dtype);
    const int64_t bytes = as_floats ? int64_t{tensor->columns} * 4 : wkv_row_bytes(tensor->dtype, tensor->columns);
    require_buffer(out, out_bytes, rows * bytes, "out");
    if (tensor->mirror) {
      ctx.settle();
      std::memcpy(out, tensor->mirror->as<void>(row * bytes), size_t(rows * bytes));
      return;
    }
    if (!as_floats) {
      ctx.copy(out, tensor->memory->as<uint8_t>(row * bytes), size_t(rows * bytes));
      return;
    }
    const int32_t dtype = tensor->dtype, columns = tensor->columns, s = scale_bytes(dtype);
    Planes planes(dtype, columns, rows);
    const auto copy = [&](size_t plane, std::vector<uint8_t>& to) {
      if (!to.empty()) ctx.copy(to.data(), tensor->memory->as<uint8_t>(plane + to.size() / rows * row), to.size());
    };
    copy(0, planes.data);
    copy(tensor->scales_at, planes.scales);
    copy(tensor->high_at, planes.high);
    copy(tensor->subs_at, planes.subs);
    auto* to = static_cast<float*>(out);
    for (size_t b = 0; b < size_t(rows) * (columns / 32); b++, to += 32) {
      const uint8_t* scales = planes.scales.data() + b * 32 / scale_columns(dtype) * s;
      const float scale = half_to_float(scales), least = s == 4 ? half_to_float(scales + 2) : 0.0f;
      const uint8_t* from = planes.data.data() + b * data_bytes(dtype);
      uint16_t subs = 0;
      if (!planes.subs.empty()) std::memcpy(&subs, planes.subs.data() + b * 2, 2);
      for (int32_t i = 0; i < 32; i++) {
        if (wkv_has_pieces(dtype)) to[i] = piece_number(dtype, from, planes.high.data() + b * high_bytes(dtype), subs, scale, least, i);
        else if (dtype == WKV_Q8_0) to[i] = static_cast<float>(static_cast<int8_t>(from[i])) * scale;
        else to[i] = static_cast<float>((from[i % 16] >> (i / 16 * 4) & 15) - (dtype == WKV_Q4_0 ? 8 : 0)) * scale + least;
      }
    }
  });
}

// ---- graphs ----

int32_t wkv_graph_begin(int32_t context) {
  return entry(context, [&](Context& ctx) {
    if (ctx.recording) fail(WKV_INVALID, "A graph is being recorded already");
    check(cudaStreamBeginCapture(ctx.stream, cudaStreamCaptureModeRelaxed), "Starting to record");
    ctx.recording = std::make_shared<Graph>();
    ctx.chain = std::make_shared<Chain>();
    ctx.recording_failed = false;
  });
}

int32_t wkv_graph_end(int32_t context, int32_t* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    require(ctx.recording != nullptr, "No graph is being recorded");
    std::exception_ptr unlaunched;
    try {
      if (!ctx.recording_failed) ctx.flush();
    } catch (...) {
      unlaunched = std::current_exception();
    }
    ctx.chain.reset();
    const std::shared_ptr<Graph> graph = std::move(ctx.recording);
    ctx.recording.reset();
    cudaGraph_t captured = nullptr;
    const cudaError_t error = cudaStreamEndCapture(ctx.stream, &captured);
    const std::shared_ptr<void> owner(captured, [](void* g) {
      if (g) cudaGraphDestroy(static_cast<cudaGraph_t>(g));
    });
    if (unlaunched) std::rethrow_exception(unlaunched);
    require(!ctx.recording_failed, "An op of the graph failed when it was recorded");
    check(error, "Recording a graph");
    require_buffer(out, out_bytes, 4, "out");
    check(cudaGraphInstantiate(&graph->run, captured, 0), "Making a graph");
    *out = add_handle(context, graph);
  });
}

int32_t wkv_graph_run(int32_t context, int32_t handle, int32_t times) {
  return entry_meanwhile(context, [&](Context& ctx) {
    ctx.running = true;  // perhaps while another thread records a graph, which this leaves alone
    require(times >= 0, "times must not be negative: " + std::to_string(times));
    const auto graph = find<Graph>(context, handle, Kind::Graph, "graph");
    ctx.settle();
    ctx.start(*graph, times);
    ctx.finish(ctx.side);
  });
}

int32_t wkv_graph_start(int32_t context, int32_t handle) {
  return entry_meanwhile(context, [&](Context& ctx) {
    ctx.running = true;
    const auto graph = find<Graph>(context, handle, Kind::Graph, "graph");
    ctx.settle();
    ctx.failed.reset();
    ctx.start(*graph);
    ctx.going = graph;
  });
}

int32_t wkv_graph_poll(int32_t context, int32_t* out, int32_t out_bytes) {
  return entry_meanwhile(context, [&](Context& ctx) {
    ctx.running = true;
    require_buffer(out, out_bytes, 4, "out");
    if (ctx.going && cudaStreamQuery(ctx.side) == cudaErrorNotReady) {
      cudaGetLastError();
      *out = 0;
      return;
    }
    ctx.settle();
    *out = 1;
    if (!ctx.failed) return;
    const std::unique_ptr<Failure> failure = std::move(ctx.failed);
    throw *failure;
  });
}
