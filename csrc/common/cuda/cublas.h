// Matrix products on a GPU by the cuBLAS that torch has loaded: nothing is linked and no header of cuBLAS is needed, so
// that one build serves every torch. The handle is torch's own (`torch.cuda.current_blas_handle()`), which torch has
// given its current stream and a workspace; that stream may be capturing a graph.
//
// Factors of 16 bits, sums in float32 (CUBLAS_COMPUTE_32F, no reduction below float32), an output in float32 that may
// be added to: independent of torch.backends.cuda.matmul.
#pragma once

#include <cstdint>
#include <string>

#include "common/tensor/tensor_view.h"

namespace speechlm {

// The functions that are used, with cuBLAS's enumerations as integers; their values have been the same since CUDA 11.
struct CublasApi {
  int (*gemm_ex)(void* handle, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha, const void* a,
                 int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type,
                 int ldc, int compute, int algorithm) = nullptr;
  int (*get_stream)(void* handle, void** stream) = nullptr;
  int (*get_pointer_mode)(void* handle, int* mode) = nullptr;
  int (*get_math_mode)(void* handle, int* mode) = nullptr;
  int (*set_math_mode)(void* handle, int mode) = nullptr;
};

namespace cublas {

constexpr int kSuccess = 0;
constexpr int kNoTranspose = 0, kTranspose = 1;
constexpr int kFloat32 = 0, kFloat16 = 2, kBFloat16 = 14;    // cudaDataType
constexpr int kCompute32F = 68;                              // CUBLAS_COMPUTE_32F
constexpr int kDefaultAlgorithm = -1;                        // CUBLAS_GEMM_DEFAULT
constexpr int kHostPointers = 0;                             // CUBLAS_POINTER_MODE_HOST
constexpr int kDefaultMath = 0, kNoReducedPrecision = 0x10;  // ..._DISALLOW_REDUCED_PRECISION_REDUCTION

}  // namespace cublas

// Takes the functions from the cuBLAS that `library` (torch's, by its path) uses, else from one that is loaded; loads
// none. Returns cublas_library().
std::string use_cublas_of(const std::string& library);
// Takes the functions from `api`: for tests.
void use_cublas(const CublasApi& api);
// The path of the library in use; "" for none.
std::string cublas_library();

// C [m, n] = alpha A B + beta C, row by row. With beta = 0, C is not read.
struct Product {
  int64_t m = 0, n = 0, k = 0;
  DType dtype = DType::kFloat16;  // of A and B: float16, bfloat16, float32
  const void* a = nullptr;        // [m, k]; of a transposed one the k rows of m elements are in memory
  const void* b = nullptr;        // [k, n]; likewise
  bool is_a_transposed = false, is_b_transposed = false;
  int64_t a_stride = 0, b_stride = 0;  // elements between the rows in memory
  float* c = nullptr;
  int64_t c_stride = 0;
  float alpha = 1, beta = 0;
};

// Enqueues the product on `stream`, which must be that of `handle`; the handle's device must be current. Float32
// factors are multiplied in TF32 if torch allows it. Throws std::invalid_argument for what cuBLAS cannot take, and
// std::runtime_error with the status's name for its errors.
void multiply(const Product& product, void* handle, void* stream);

}  // namespace speechlm
