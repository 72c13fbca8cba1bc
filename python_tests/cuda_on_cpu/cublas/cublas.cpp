#include "cuda_on_cpu/cublas/cublas.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cuda_on_cpu/kernel/events.h"
#include "cuda_on_cpu/kernel/half.h"
#include "cuda_on_cpu/runtime/grid.h"

namespace cuda_on_cpu {

CublasHandle& cublas_handle() {
  static CublasHandle one;
  return one;
}

namespace {

constexpr int kInvalidValue = 7, kInternalError = 14, kNotSupported = 15;

CublasHandle& handle_at(void* handle) {
  return handle == nullptr ? cublas_handle() : *static_cast<CublasHandle*>(handle);
}

// A factor, by columns, of which the product takes `rows` x `columns` elements after the transposition.
class Factor {
 public:
  Factor(const void* data, int type, int64_t stride, bool is_transposed, int64_t rows, int64_t columns)
      : is_transposed_(is_transposed), rows_(is_transposed ? columns : rows) {
    const int64_t in_memory = is_transposed ? rows : columns;
    const int64_t size = type == speechlm::cublas::kFloat32 ? 4 : 2;
    values_.reserve(rows_ * in_memory);
    for (int64_t j = 0; j < in_memory; ++j) {
      const char* column = static_cast<const char*>(data) + j * stride * size;
      expect_memory(column, rows_ * size, "cublasGemmEx reads a factor");
      for (int64_t i = 0; i < rows_; ++i) values_.push_back(value(column + i * size, type));
    }
  }
  float operator()(int64_t i, int64_t j) const {
    return is_transposed_ ? values_[j + i * rows_] : values_[i + j * rows_];
  }

 private:
  static float value(const char* at, int type) {
    float wide;
    uint16_t bits;
    if (type == speechlm::cublas::kFloat32) return std::memcpy(&wide, at, 4), wide;
    std::memcpy(&bits, at, 2);
    return type == speechlm::cublas::kFloat16 ? float16_value(bits) : bfloat16_value(bits);
  }

  bool is_transposed_;
  int64_t rows_;  // in memory
  std::vector<float> values_;
};

int gemm_ex(void* handle, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha, const void* a,
            int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc,
            int compute, int) {
  CublasHandle& own = handle_at(handle);
  own.math_mode_of_product = own.math_mode;
  if (own.next_status != 0) return std::exchange(own.next_status, 0);
  if (own.fail_after >= 0 && own.fail_after-- == 0) return kInternalError;
  if (own.ignores_transposes) transpose_a = transpose_b = 0;
  if (m < 0 || n < 0 || k < 0 || lda < std::max(1, transpose_a ? k : m) || ldb < std::max(1, transpose_b ? n : k) ||
      ldc < std::max(1, m)) {
    return own.ignores_transposes ? 0 : kInvalidValue;
  }
  if (a_type != b_type || c_type != speechlm::cublas::kFloat32 || compute != speechlm::cublas::kCompute32F) {
    return kNotSupported;
  }
  count_event("cublasGemmEx");
  note_stream("product", "", own.stream);
  const Factor left(a, a_type, lda, transpose_a != 0, m, k), right(b, b_type, ldb, transpose_b != 0, k, n);
  const float scale = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
  for (int64_t j = 0; j < n; ++j) {
    float* column = static_cast<float*>(c) + j * ldc;
    expect_memory(column, m * 4, "cublasGemmEx writes C");
    for (int64_t i = 0; i < m; ++i) {
      float sum = 0;
      for (int64_t l = 0; l < k; ++l) {
        sum += left(i, l) * right(l, j);
        if (own.sums_in_half) sum = float16_value(float16_bits(sum));
      }
      column[i] = keep == 0 ? scale * sum : scale * sum + keep * column[i];
    }
  }
  return 0;
}

int get_stream(void* handle, void** stream) { return *stream = handle_at(handle).stream, 0; }
int get_pointer_mode(void* handle, int* mode) { return *mode = handle_at(handle).pointer_mode, 0; }
int get_math_mode(void* handle, int* mode) { return *mode = handle_at(handle).math_mode, 0; }
int set_math_mode(void* handle, int mode) { return handle_at(handle).math_mode = mode, 0; }

}  // namespace

speechlm::CublasApi cublas_api() { return {gemm_ex, get_stream, get_pointer_mode, get_math_mode, set_math_mode}; }

}  // namespace cuda_on_cpu
