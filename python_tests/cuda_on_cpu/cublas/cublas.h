// cuBLAS as csrc calls it: matrices by columns, checked memory, products of 16 bits summed in float.
#pragma once

#include "common/cuda/cublas.h"

namespace cuda_on_cpu {

struct CublasHandle {
  void* stream = nullptr;
  int pointer_mode = 0, math_mode = 0;
  int math_mode_of_product = -1;                          // of the last one
  int next_status = 0;                                    // that the next product gives, once
  int fail_after = -1;                                    // products until one fails; -1: none does
  bool ignores_transposes = false, sums_in_half = false;  // of a library with an error
};
// The handle of address 0.
CublasHandle& cublas_handle();

speechlm::CublasApi cublas_api();

}  // namespace cuda_on_cpu
