#include "common/cuda/cublas.h"

#include <dlfcn.h>

#include <climits>
#include <stdexcept>

#include "common/check.h"

namespace speechlm {
namespace {

constexpr const char* kOp = "cuBLAS";

CublasApi& api() {
  static CublasApi one;
  return one;
}

const char* status_name(int status) {
  switch (status) {
    case 1: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case 3: return "CUBLAS_STATUS_ALLOC_FAILED";
    case 7: return "CUBLAS_STATUS_INVALID_VALUE";
    case 8: return "CUBLAS_STATUS_ARCH_MISMATCH";
    case 11: return "CUBLAS_STATUS_MAPPING_ERROR";
    case 13: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case 14: return "CUBLAS_STATUS_INTERNAL_ERROR";
    case 15: return "CUBLAS_STATUS_NOT_SUPPORTED";
    case 16: return "CUBLAS_STATUS_LICENSE_ERROR";
    default: return "an unknown status";
  }
}

void check(int status, const char* what) {
  if (status == cublas::kSuccess) return;
  throw std::runtime_error(concat("speechlm_ext: ", what, ": ", status_name(status), " (", status, ")"));
}

int type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return cublas::kFloat16;
    case DType::kBFloat16: return cublas::kBFloat16;
    case DType::kFloat32: return cublas::kFloat32;
    default: break;
  }
  throw std::invalid_argument(concat(kOp, ": factors must be float16, bfloat16 or float32; got ", name_of(dtype)));
}

int as_int(int64_t value, const char* name) {
  SX_CHECK(value >= 1 && value <= INT_MAX, kOp, ": ", name, " must be 1 to 2^31 - 1; got ", value);
  return static_cast<int>(value);
}

// Gives the handle a math mode, and back the one that it had.
class MathMode {
 public:
  MathMode(void* handle, int mode) : handle_(handle) {
    check(api().get_math_mode(handle, &before_), "cublasGetMathMode");
    check(api().set_math_mode(handle, mode), "cublasSetMathMode");
  }
  ~MathMode() { api().set_math_mode(handle_, before_); }
  MathMode(const MathMode&) = delete;
  MathMode& operator=(const MathMode&) = delete;

 private:
  void* handle_;
  int before_ = cublas::kDefaultMath;
};

void enqueue(const Product& p, void* handle) {
  // cuBLAS counts by columns: memory that holds rows of C holds columns of C' = B' A', and likewise the factors.
  const int type = type_of(p.dtype);
  const auto transpose = [](bool is) { return is ? cublas::kTranspose : cublas::kNoTranspose; };
  check(api().gemm_ex(handle, transpose(p.is_b_transposed), transpose(p.is_a_transposed), as_int(p.n, "n"),
                      as_int(p.m, "m"), as_int(p.k, "k"), &p.alpha, p.b, type, as_int(p.b_stride, "B's stride"), p.a,
                      type, as_int(p.a_stride, "A's stride"), &p.beta, p.c, cublas::kFloat32,
                      as_int(p.c_stride, "C's stride"), cublas::kCompute32F, cublas::kDefaultAlgorithm),
        "cublasGemmEx");
}

CublasApi found_in(void* library) {
  CublasApi found;
  const auto take = [&](const char* name, auto& function) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
    return function != nullptr;
  };
  const bool has_all = take("cublasGemmEx", found.gemm_ex) && take("cublasGetStream_v2", found.get_stream) &&
                       take("cublasGetPointerMode_v2", found.get_pointer_mode) &&
                       take("cublasGetMathMode", found.get_math_mode) && take("cublasSetMathMode", found.set_math_mode);
  return has_all ? found : CublasApi();
}

}  // namespace

std::string use_cublas_of(const std::string& library) {
  // RTLD_NOLOAD: only a library that is loaded already. dlsym on a handle searches that library, then those that it
  // was linked with: so of two versions in a process this finds the one that made torch's handles.
  for (const char* name : {library.c_str(), "libcublas.so.13", "libcublas.so.12", "libcublas.so.11"}) {
    void* handle = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) continue;
    api() = found_in(handle);
    dlclose(handle);  // it stays, as torch holds it
    if (api().gemm_ex != nullptr) break;
  }
  if (api().gemm_ex == nullptr) api() = found_in(RTLD_DEFAULT);
  return cublas_library();
}

void use_cublas(const CublasApi& other) { api() = other; }

std::string cublas_library() {
  Dl_info info;
  if (api().gemm_ex == nullptr || dladdr(reinterpret_cast<void*>(api().gemm_ex), &info) == 0) return "";
  return info.dli_fname;
}

void multiply(const Product& p, void* handle, void* stream) {
  SX_CHECK(api().gemm_ex != nullptr, kOp, ": torch has loaded no cuBLAS in this process");
  if (p.m == 0 || p.n == 0) return;
  SX_CHECK(p.a_stride >= (p.is_a_transposed ? p.m : p.k), kOp, ": rows of A overlap");
  SX_CHECK(p.b_stride >= (p.is_b_transposed ? p.k : p.n), kOp, ": rows of B overlap");
  SX_CHECK(p.c_stride >= p.n, kOp, ": rows of C overlap");
  void* its_stream = nullptr;
  int pointer_mode = cublas::kHostPointers;
  check(api().get_stream(handle, &its_stream), "cublasGetStream");
  // Another thread's or another device's handle; setting its stream would take its workspace away.
  SX_CHECK(its_stream == stream, kOp,
           ": the handle is not of the given stream; take it in the same thread, by "
           "torch.cuda.current_blas_handle()");
  check(api().get_pointer_mode(handle, &pointer_mode), "cublasGetPointerMode");
  SX_CHECK(pointer_mode == cublas::kHostPointers, kOp, ": the handle takes scalars from device memory");
  if (p.dtype == DType::kFloat32) return enqueue(p, handle);  // TF32 or not is the handle's math mode, torch's choice
  const MathMode mode(handle, cublas::kDefaultMath | cublas::kNoReducedPrecision);
  enqueue(p, handle);
}

}  // namespace speechlm
