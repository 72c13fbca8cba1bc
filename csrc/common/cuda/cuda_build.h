// What a binding says when CUDA tensors come to a build without CUDA kernels.
#pragma once

#include "common/check.h"

namespace speechlm {

inline void require_cuda_build(const char* op) {
#ifndef SPEECHLM_HAVE_CUDA
  SX_CHECK(false, op,
           ": this build has no CUDA kernels (`speechlm doctor` tells why); install with nvcc on PATH and "
           "SPEECHLM_CUDA=ON, or move the tensors to the CPU");
#else
  (void)op;
#endif
}

}  // namespace speechlm
