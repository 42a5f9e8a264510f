/** runtime.cpp: contexts, tensors and graphs of the CPU library. */
#include <sched.h>
#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <new>
#include <system_error>

#include "common.hpp"

namespace wkv {

namespace {
constexpr size_t kLarge = size_t{1} << 20;
}

void* zeroed(size_t bytes) {
  void* memory = nullptr;
  if (bytes >= kLarge) {
    memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
  } else {
    const size_t size = (bytes + 64) / 64 * 64;
    memory = std::aligned_alloc(64, size);
    if (!memory) throw std::bad_alloc();
    std::memset(memory, 0, size);
  }
  count_bytes(static_cast<int64_t>(bytes));
  return memory;
}

void release(void* memory, size_t bytes) {
  count_bytes(-static_cast<int64_t>(bytes));
  if (bytes >= kLarge) munmap(memory, bytes);
  else std::free(memory);
}

TensorRef find_tensor(int32_t context, int32_t handle, const char* what, int32_t dtype, int32_t rows, int32_t columns) {
  TensorRef tensor = find_tensor(context, handle, what);
  require(tensor->dtype == dtype, std::string(what) + " is of another dtype (" + std::to_string(tensor->dtype) + ", expected " + std::to_string(dtype) + ")");
  require(rows >= 0 && tensor->rows >= rows, std::string(what) + " has " + std::to_string(tensor->rows) + " rows, expected at least " + std::to_string(rows));
  require(columns < 0 || tensor->columns == columns, std::string(what) + " has " + std::to_string(tensor->columns) + " columns, expected " + std::to_string(columns));
  return tensor;
}

Context::Context(int32_t count) : loops(pick_loops()), threads(count) {}

// ---- tensors ----

namespace {
bool quantised(int32_t dtype) { return dtype >= WKV_Q8_0; }
/** Bytes of 8 rows. */
int64_t group_bytes(int32_t dtype, int32_t columns) { return wkv_has_pieces(dtype) ? piece_at(dtype, columns / 32) : 8 * wkv_row_bytes(dtype, columns); }
/** F32 and I32 lie row by row, weights of every other type in groups of 8 rows. */
bool grouped(int32_t dtype) { return dtype != WKV_F32 && dtype != WKV_I32; }

void require_finite(uint16_t half, int32_t block) {
  if ((half & 0x7c00) == 0x7c00) fail(WKV_DATA, "The scale of block " + std::to_string(block) + " is not finite");
}

/** Puts one row in file order into its place within its group of 8: the types of quants.h. */
void scatter_pieces(int32_t dtype, int32_t columns, uint8_t* group, int32_t lane, const uint8_t* row) {
  const wkv_form form = wkv_form_of(dtype);
  wkv_piece piece;
  for (int32_t b = 0; b < columns / 32; b++) {
    const int32_t block = b * 32 / form.columns;
    wkv_read_piece(dtype, row + int64_t{block} * form.bytes, form.subs ? b % 8 : 0, &piece);
    require_finite(piece.d, block);
    require_finite(piece.least, block);
    uint8_t *at = group + piece_at(dtype, b), *scales = form.subs ? group + super_at(dtype, b) : at;
    std::memcpy(scales + lane * 2, &piece.d, 2);
    if (form.least) std::memcpy(scales + 16 + lane * 2, &piece.least, 2);
    if (form.subs) at[lane] = piece.sub[0], at[8 + lane] = piece.sub[1];
    uint8_t* const low = at + piece_head(dtype) + lane * 4;
    uint8_t* const high = low + (form.low == 4 ? 128 : 64);
    // A byte is shared by columns of one row only, so its other bits are this row's too.
    for (int32_t c = 0; c < 4; c++) {
      for (int32_t v = 0; v < 4; v++) {
        if (form.low == 4) low[v * 32 + c] = 0;
      }
      if (form.low == 2) low[c] = low[32 + c] = 0;
      for (int32_t h = 0; h < form.high; h++) high[h * 32 + c] = 0;
    }
    for (int32_t i = 0; i < 32; i++) {
      const int32_t half = i / 16, v = i % 16 / 4, c = i % 4, first = piece.q[i] & ((1 << form.low) - 1), rest = piece.q[i] >> form.low;
      const auto put = [](uint8_t& byte, int32_t bits) { byte = static_cast<uint8_t>(byte | bits); };
      if (form.low == 4) put(low[v * 32 + c], first << (half * 4));
      else put(low[half * 32 + c], first << (v * 2));
      if (form.high == 1) put(high[c], rest << (half * 4 + v));
      if (form.high == 2) put(high[half * 32 + c], rest << (v * 2));
    }
  }
}

/** The same for all types but F32 and I32. */
void scatter(int32_t dtype, int32_t columns, uint8_t* group, int32_t lane, const uint8_t* row) {
  if (!quantised(dtype)) {
    for (int32_t c = 0; c < columns; c++) std::memcpy(group + (c * 8 + lane) * 2, row + c * 2, 2);
    return;
  }
  if (wkv_has_pieces(dtype)) return scatter_pieces(dtype, columns, group, lane, row);
  const int32_t bytes = wkv_form_of(dtype).bytes, heads = dtype == WKV_Q4_1 ? 2 : 1, vectors = dtype == WKV_Q8_0 ? 8 : 4;
  for (int32_t b = 0; b < columns / 32; b++, row += bytes, group += bytes * 8) {
    for (int32_t h = 0; h < heads; h++) {
      std::memcpy(group + h * 16 + lane * 2, row + h * 2, 2);
      uint16_t half;
      std::memcpy(&half, row + h * 2, 2);
      require_finite(half, b);
    }
    for (int32_t v = 0; v < vectors; v++) std::memcpy(group + heads * 16 + v * 32 + lane * 4, row + heads * 2 + v * 4, 4);
  }
}
}  // namespace

Tensor::Tensor(int32_t dtype, int32_t rows, int32_t columns) : Object(Kind::Tensor), dtype(dtype), rows(rows), columns(columns) {
  // Below 2^64: 2^31 rows of 2^33 bytes.
  if (grouped(dtype)) memory.resize((size_t(rows) + 7) / 8 * static_cast<size_t>(group_bytes(dtype, columns)));
  else memory.resize(size_t(rows) * static_cast<size_t>(wkv_row_bytes(dtype, columns)));
}

}  // namespace wkv

using namespace wkv;

int32_t wkv_context_open(int32_t threads, int32_t* out, int32_t out_bytes) {
  return guarded(nullptr, [&] {
    require(out != nullptr && out_bytes >= 4, "out must hold 4 bytes");
    require(threads >= 0 && threads <= 1024, "threads must be between 0 and 1024: " + std::to_string(threads));
    if (threads == 0) {
      cpu_set_t set;
      CPU_ZERO(&set);
      threads = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    }
    try {
      *out = add_handle(0, std::make_shared<Context>(threads));
    } catch (const std::system_error& error) {
      fail(WKV_MEMORY, error.what());  // a thread could not be started
    }
  });
}

int32_t wkv_device(int32_t context, char* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    require(out != nullptr && out_bytes >= 1, "out must hold a text");
    const int32_t threads = ctx.threads.count();
    const std::string text = std::string("CPU, ") + ctx.loops->name + ", " + std::to_string(threads) + (threads == 1 ? " thread" : " threads");
    give_text(text, out, out_bytes);
  });
}

int32_t wkv_tensor_open(int32_t context, int32_t dtype, int32_t rows, int32_t columns, int32_t* out, int32_t out_bytes) {
  return entry(context, [&](Context&) {
    require_buffer(out, out_bytes, 4, "out");
    require(dtype >= WKV_F32 && dtype <= WKV_IQ4_NL, "dtype " + std::to_string(dtype) + " is unknown");
    require(rows >= 1 && columns >= 1, "rows and columns must be at least 1: " + std::to_string(rows) + " x " + std::to_string(columns));
    const int32_t whole = wkv_form_of(dtype).columns;
    require(columns % whole == 0, "columns must be a multiple of " + std::to_string(whole) + " for quantised rows of this type: " + std::to_string(columns));
    *out = add_handle(context, std::make_shared<Tensor>(dtype, rows, columns));
  });
}

namespace {
void check_rows(const Tensor& tensor, int32_t row, int32_t rows) {
  require(row >= 0 && rows >= 1 && row <= tensor.rows - rows, "rows " + std::to_string(row) + " to " + std::to_string(int64_t{row} + rows) + " of " + std::to_string(tensor.rows) + " asked for");
}
}  // namespace

int32_t wkv_tensor_write(int32_t context, int32_t handle, int32_t row, int32_t rows, const void* data, int32_t data_bytes) {
  return entry(context, [&](Context&) {
    const TensorRef tensor = find_tensor(context, handle, "tensor");
    check_rows(*tensor, row, rows);
    const int64_t bytes = wkv_row_bytes(tensor->dtype, tensor->columns);
    require_buffer(data, data_bytes, rows * bytes, "data");
    if (!grouped(tensor->dtype)) {
      std::memcpy(tensor->memory.data() + row * bytes, data, static_cast<size_t>(rows * bytes));
      return;
    }
    for (int64_t r = row; r < int64_t{row} + rows; r++) {
      try {
        scatter(tensor->dtype, tensor->columns, tensor->memory.data() + r / 8 * group_bytes(tensor->dtype, tensor->columns), static_cast<int32_t>(r % 8), static_cast<const uint8_t*>(data) + (r - row) * bytes);
      } catch (const Failure& failure) {
        fail(failure.status, "Row " + std::to_string(r) + ": " + failure.what());
      }
    }
  });
}

int32_t wkv_tensor_read(int32_t context, int32_t handle, int32_t row, int32_t rows, void* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    const TensorRef tensor = find_tensor(context, handle, "tensor");
    check_rows(*tensor, row, rows);
    const bool as_floats = quantised(tensor->dtype);
    const int64_t bytes = as_floats ? int64_t{tensor->columns} * 4 : wkv_row_bytes(tensor->dtype, tensor->columns);
    require_buffer(out, out_bytes, rows * bytes, "out");
    auto* to = static_cast<uint8_t*>(out);
    for (int64_t r = row; r < int64_t{row} + rows; r++, to += bytes) {
      if (!grouped(tensor->dtype)) {
        std::memcpy(to, tensor->memory.data() + r * bytes, static_cast<size_t>(bytes));
      } else if (as_floats) {
        ctx.loops->weight_row(tensor->dtype, tensor->memory.data(), tensor->columns, r, reinterpret_cast<float*>(to));
      } else {
        const uint8_t* group = tensor->memory.data() + r / 8 * 8 * bytes;
        for (int32_t c = 0; c < tensor->columns; c++) std::memcpy(to + c * 2, group + (c * 8 + r % 8) * 2, 2);
      }
    }
  });
}

// ---- graphs ----

int32_t wkv_graph_begin(int32_t context) {
  return entry(context, [&](Context& ctx) {
    if (ctx.recording) fail(WKV_INVALID, "A graph is being recorded already");
    ctx.recording = std::make_shared<Graph>();
    ctx.recording_failed = false;
  });
}

int32_t wkv_graph_end(int32_t context, int32_t* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    require(ctx.recording != nullptr, "No graph is being recorded");
    const std::shared_ptr<Graph> graph = std::move(ctx.recording);
    ctx.recording.reset();
    require(!ctx.recording_failed, "An op of the graph failed when it was recorded");
    require_buffer(out, out_bytes, 4, "out");
    *out = add_handle(context, graph);
  });
}

int32_t wkv_graph_run(int32_t context, int32_t handle, int32_t times) {
  return entry(context, [&](Context& ctx) {
    ctx.running = true;  // perhaps while another thread records a graph, which this leaves alone
    require(times >= 0, "times must not be negative: " + std::to_string(times));
    const auto graph = find<Graph>(context, handle, Kind::Graph, "graph");
    for (int32_t i = 0; i < times; i++) {
      for (const Op& op : graph->ops) op();
    }
  });
}

int32_t wkv_graph_start(int32_t context, int32_t handle) { return wkv_graph_run(context, handle, 1); }

int32_t wkv_graph_poll(int32_t context, int32_t* out, int32_t out_bytes) {
  return entry(context, [&](Context& ctx) {
    ctx.running = true;
    require_buffer(out, out_bytes, 4, "out");
    *out = 1;  // wkv_graph_start has run it
  });
}
