/** cublaslt.cuh: the products of cuBLASLt, where that library is installed; it is looked for at run time and nothing needs it. */
#pragma once
#include "linear.cuh"

namespace wkv {

/** Whether it was found, and as what. */
bool cublaslt_loaded(std::string* which);

/** Bytes of scratch for cublaslt_matmul. */
size_t cublaslt_bytes(int32_t rows, const WeightView& w, bool gated);
/** out = x . w^T, gated where up has data, for weights that are not quantised. x: `parts` matrices [rows, C] of w's dtype, one after the other,
 *  whose sum times factors[t] (null, or of bf16: 1) is row t. False, and nothing launched, when there is no cuBLASLt or it has no kernel for the shape. */
bool cublaslt_matmul(Context& ctx, const void* x, int32_t parts, const float* factors, int32_t rows, const WeightView& w, const WeightView& up, const OutputView& to, uint8_t* scratch);

}  // namespace wkv
