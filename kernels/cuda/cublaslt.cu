/**
 * cublaslt.cu: products of many rows by cuBLASLt, loaded at run time.
 *
 * Products go to scratch, a run of x's rows at a time, and a kernel takes them on to `out` with factor, bias, sum or gate. Tensor cores cut
 * sums off instead of rounding them, so a product covers at most 2048 columns; the next is added to it. Where x was rounded once to 16
 * bits a product covers all columns, as what is cut off is less than that, and goes to `out` itself where nothing but a sum is asked for.
 * Declared here is the part of the interface that is used, the same in versions 12 and 13. Kernels are chosen once a shape; sums over
 * blocks are made in a fixed order.
 */
#include "cublaslt.cuh"

#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "fours.cuh"

namespace wkv {
namespace {

using Opaque = void*;
struct Algorithm {
  uint64_t data[8];
};
struct Choice {
  Algorithm algorithm;
  size_t workspace;
  int32_t status;
  float waves;
  int32_t reserved[4];
};
enum : int32_t { kCompute32F = 68, kTransA = 3, kOpTranspose = 1, kWorkspaceBytes = 1, kReductions = 3, kReductionInOrder = 2, kAlignA = 5, kAlignB = 6, kAlignC = 7, kAlignD = 8, kReal32F = 0, kReal16F = 2, kRealBF16 = 14 };

constexpr size_t kWorkspace = size_t{32} << 20, kMostResults = size_t{256} << 20;  // bytes
constexpr int32_t kMostColumns = 2048;

struct Library {
  std::string name;
  Opaque handle = nullptr;
  std::mutex lock;
  std::map<std::tuple<int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int64_t>, Choice> chosen;  // by Product's numbers; status -1: none
  int32_t (*create)(Opaque*) = nullptr;
  int32_t (*desc_create)(Opaque*, int32_t, int32_t) = nullptr;
  int32_t (*desc_set)(Opaque, int32_t, const void*, size_t) = nullptr;
  int32_t (*desc_destroy)(Opaque) = nullptr;
  int32_t (*layout_create)(Opaque*, int32_t, uint64_t, uint64_t, int64_t) = nullptr;
  int32_t (*layout_destroy)(Opaque) = nullptr;
  int32_t (*preference_create)(Opaque*) = nullptr;
  int32_t (*preference_set)(Opaque, int32_t, const void*, size_t) = nullptr;
  int32_t (*preference_destroy)(Opaque) = nullptr;
  int32_t (*choose)(Opaque, Opaque, Opaque, Opaque, Opaque, Opaque, Opaque, int32_t, Choice*, int32_t*) = nullptr;
  int32_t (*matmul)(Opaque, Opaque, const void*, const void*, Opaque, const void*, Opaque, const void*, const void*, Opaque, void*, Opaque, const Algorithm*, void*, size_t, cudaStream_t) = nullptr;

  Library() {
    for (const char* file : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
      void* opened = dlopen(file, RTLD_NOW | RTLD_LOCAL);
      if (!opened) continue;
      const auto find = [&](const char* symbol, auto& function) {
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(opened, symbol));
        return function != nullptr;
      };
      if (find("cublasLtCreate", create) && find("cublasLtMatmulDescCreate", desc_create) && find("cublasLtMatmulDescSetAttribute", desc_set) &&
          find("cublasLtMatmulDescDestroy", desc_destroy) && find("cublasLtMatrixLayoutCreate", layout_create) && find("cublasLtMatrixLayoutDestroy", layout_destroy) &&
          find("cublasLtMatmulPreferenceCreate", preference_create) && find("cublasLtMatmulPreferenceSetAttribute", preference_set) &&
          find("cublasLtMatmulPreferenceDestroy", preference_destroy) && find("cublasLtMatmulAlgoGetHeuristic", choose) && find("cublasLtMatmul", matmul) && create(&handle) == 0) {
        name = file;
        return;
      }
      handle = nullptr;
      dlclose(opened);
    }
  }
};

/** Opened at its first use; never closed, as graphs may hold its kernels. */
Library& library() {
  static Library* const opened = new Library;
  return *opened;
}

/** What describes a product of `rows` rows of x, `columns` columns wide: in cuBLASLt's column order, out [J, rows] = w [C, J]^T . x [C, rows];
 *  rows of w and x are row_length numbers apart, those of out `stride`. */
struct Product {
  Library& lib;
  Opaque desc = nullptr, w = nullptr, x = nullptr, out = nullptr;
  Choice choice{};
  bool good = false;

  Product(Library& lib, int32_t type, int32_t out_type, int32_t w_rows, int32_t rows, int32_t columns, int32_t row_length, int64_t stride) : lib(lib) {
    const int32_t transpose = kOpTranspose;
    if (lib.desc_create(&desc, kCompute32F, kReal32F) || lib.desc_set(desc, kTransA, &transpose, sizeof transpose)) return;
    if (lib.layout_create(&w, type, columns, w_rows, row_length) || lib.layout_create(&x, type, columns, rows, row_length)) return;
    if (lib.layout_create(&out, out_type, w_rows, rows, stride)) return;
    const std::lock_guard<std::mutex> hold(lib.lock);
    const auto key = std::make_tuple(type, out_type, w_rows, rows, columns, row_length, stride);
    auto found = lib.chosen.find(key);
    if (found == lib.chosen.end()) found = lib.chosen.emplace(key, choose(int64_t{row_length} * (type == kReal32F ? 4 : 2))).first;
    choice = found->second;
    good = choice.status == 0;
  }
  Product(const Product&) = delete;
  ~Product() {
    for (const Opaque layout : {w, x, out}) {
      if (layout) lib.layout_destroy(layout);
    }
    if (desc) lib.desc_destroy(desc);
  }
  Choice choose(int64_t row_bytes) const {
    Choice first{};
    first.status = -1;
    Opaque preference = nullptr;
    const size_t workspace = kWorkspace;
    const uint32_t reductions = kReductionInOrder, alignment = row_bytes % 16 ? 4 : 16, aligned = 16;
    int32_t count = 0;
    if (lib.preference_create(&preference) == 0 && lib.preference_set(preference, kWorkspaceBytes, &workspace, sizeof workspace) == 0 &&
        lib.preference_set(preference, kReductions, &reductions, sizeof reductions) == 0 && lib.preference_set(preference, kAlignA, &alignment, sizeof alignment) == 0 &&
        lib.preference_set(preference, kAlignB, &alignment, sizeof alignment) == 0 && lib.preference_set(preference, kAlignC, &aligned, sizeof aligned) == 0 &&
        lib.preference_set(preference, kAlignD, &aligned, sizeof aligned) == 0) {
      Choice best{};
      if (lib.choose(lib.handle, desc, w, x, out, out, preference, 1, &best, &count) == 0 && count == 1) first = best;
    }
    if (preference) lib.preference_destroy(preference);
    return first;
  }
  void run(const void* from_w, const void* from_x, void* to, bool add, void* workspace, cudaStream_t stream) const {
    const float alpha = 1.0f, beta = add ? 1.0f : 0.0f;
    const int32_t status = lib.matmul(lib.handle, desc, &alpha, from_w, w, from_x, x, &beta, to, out, to, out, &choice.algorithm, workspace, kWorkspace, stream);
    if (status) fail(WKV_DEVICE, lib.name + " failed with status " + std::to_string(status));
  }
};

/** Rows of x that are done at a time, in runs of about one length; `size`: bytes of a result. */
int32_t rows_at_once(int32_t rows, const WeightView& w, bool gated, int64_t size) {
  const int64_t fit = std::max<int64_t>(64, int64_t{kMostResults} / size / w.rows / (gated ? 2 : 1) / 64 * 64);
  const int64_t runs = (rows + fit - 1) / fit;
  return static_cast<int32_t>(std::min<int64_t>(rows, (rows + runs * 64 - 1) / (runs * 64) * 64));
}

/** fours: all rows begin on a multiple of 4 numbers, and end on one. */
template <typename R>
__global__ void __launch_bounds__(256) finish_kernel(const R* product, const R* second, const float* factors, int32_t t0, int32_t columns, bool fours, OutputView to) {
  wait_for_previous();
  let_next_start();
  const int64_t from = int64_t{blockIdx.x} * columns;
  const int32_t t = t0 + blockIdx.x;
  const float factor = factors ? factors[t] : 1.0f;
  if (!fours) {
    for (int32_t j = blockIdx.y * 256 + threadIdx.x; j < columns; j += gridDim.y * 256) {
      const float first = to_float(product[from + j]) * factor;
      to.put(t, j, second ? activate(to.activation, first, to_float(second[from + j]) * factor) : first);
    }
    return;
  }
  float* const out = to.out + t * to.stride;
  for (int32_t j = (blockIdx.y * 256 + threadIdx.x) * 4; j < columns; j += gridDim.y * 1024) {
    Four<float> x = each<float>(four_at(product + from + j), [&](R v, int) { return to_float(v) * factor; });
    if (second) {
      const Four<R> up = four_at(second + from + j);
      x = each<float>(x, [&](float v, int k) { return activate(to.activation, v, to_float(up.x[k]) * factor); });
    }
    if (to.bias) {
      const float* bias = to.bias + j;
      x = each<float>(x, [&](float v, int k) { return v + bias[k]; });
    }
    if (to.add) {
      const Four<float> before = four_at(out + j);
      x = each<float>(x, [&](float v, int k) { return before.x[k] + v; });
    }
    four_at(out + j) = x;
  }
}

template <typename R>
void finish(Context& ctx, const void* product, const void* second, const float* factors, int32_t t0, int32_t rows, int32_t columns, const OutputView& to) {
  const bool fours = columns % 4 == 0 && to.stride % 4 == 0 && reinterpret_cast<uintptr_t>(to.out) % 16 == 0;
  launch(ctx, finish_kernel<R>, {dim3(rows, std::min(64, divide_up(columns, fours ? 1024 : 256))), dim3(256)}, static_cast<const R*>(product), static_cast<const R*>(second), factors, t0, columns, fours, to);
}

}  // namespace

bool cublaslt_loaded(std::string* which) {
  *which = library().name;
  return library().handle != nullptr;
}

size_t cublaslt_bytes(int32_t rows, const WeightView& w, bool gated) {
  if (!library().handle) return 0;
  size_t most = 0;
  for (const int64_t size : {2, 4}) most = std::max(most, round_up(size_t(rows_at_once(rows, w, gated, size)) * w.rows * size));
  return kWorkspace + most * (gated ? 2 : 1);
}

bool cublaslt_matmul(Context& ctx, const void* x, int32_t parts, const float* factors, int32_t rows, const WeightView& w, const WeightView& up, const OutputView& to, uint8_t* scratch) {
  Library& lib = library();
  if (!lib.handle) return false;
  const bool gated = up.data != nullptr, once = parts == 1 && w.dtype != WKV_F32;
  const int32_t type = w.dtype == WKV_F32 ? kReal32F : w.dtype == WKV_F16 ? kReal16F : kRealBF16, size = w.dtype == WKV_F32 ? 4 : 2, columns = w.columns;
  // Rows of bf16 have no factors but 1.
  if (once && w.dtype == WKV_BF16 && !gated && !to.bias && reinterpret_cast<uintptr_t>(to.out) % 16 == 0 && to.stride % 4 == 0) {
    const Product direct(lib, type, kReal32F, w.rows, rows, columns, columns, to.stride);
    if (direct.good) return direct.run(w.data, x, to.out, to.add, scratch, ctx.stream), true;
  }
  // What goes through the activation is rounded once too, where f16's few exponents are not in the way.
  const bool narrow = once && gated && w.dtype == WKV_BF16;
  const int32_t result = narrow ? kRealBF16 : kReal32F, result_size = narrow ? 2 : 4;
  const int32_t step = rows_at_once(rows, w, gated, result_size), last = (rows - 1) % step + 1, wide = once ? columns : std::min(columns, kMostColumns), rest = columns % wide;
  // With full and last runs of rows, and full and last runs of columns.
  const auto product_of = [&](int32_t rows, int32_t columns) { return Product(lib, type, result, w.rows, rows, columns, w.columns, w.rows); };
  const Product whole = product_of(step, wide), end = product_of(last, wide), whole_rest = product_of(step, rest ? rest : wide), end_rest = product_of(last, rest ? rest : wide);
  if (!whole.good || !end.good || !whole_rest.good || !end_rest.good) return false;
  uint8_t* results[2] = {scratch + kWorkspace, nullptr};
  if (gated) results[1] = results[0] + round_up(size_t(step) * w.rows * result_size);
  for (int32_t t0 = 0; t0 < rows; t0 += step) {
    const int32_t count = std::min(step, rows - t0);
    for (int g = 0; g <= int(gated); g++) {
      bool add = false;
      for (int32_t c = 0; c < columns; c += wide) {
        const bool full = columns - c >= wide;
        const Product& product = count == step ? (full ? whole : whole_rest) : (full ? end : end_rest);
        for (int32_t part = parts - 1; part >= 0; part--) {  // the lowest first
          const uint8_t* from = static_cast<const uint8_t*>(x) + ((int64_t{part} * rows + t0) * columns + c) * size;
          product.run((g ? up : w).data + int64_t{c} * size, from, results[g], add, scratch, ctx.stream);
          add = true;
        }
      }
    }
    if (narrow) finish<__nv_bfloat16>(ctx, results[0], results[1], factors, t0, count, w.rows, to);
    else finish<float>(ctx, results[0], results[1], factors, t0, count, w.rows, to);
  }
  return true;
}

}  // namespace wkv
