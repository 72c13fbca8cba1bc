// What every .cu file includes. The macros are the only CUDA syntax that a host C++ compiler cannot read, so with
// SPEECHLM_CUDA_ON_CPU the same files compile as plain C++ against a shim that defines them.
#pragma once

#include <cstdint>

#include "common/check.h"

#ifdef SPEECHLM_CUDA_ON_CPU
#include "cuda_on_cpu/shim.h"
#else
#include <cuda_runtime.h>

// SX_LAUNCH(kernel<T>, grid, block, dynamic_smem_bytes, stream, args...)
#define SX_LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<(grid), (block), (smem), (stream)>>>(__VA_ARGS__)
// SX_SHARED(float, tile, 256) declares static shared memory; SX_DYNAMIC_SHARED(float, tile) the dynamic part.
#define SX_SHARED(type, name, count) __shared__ type name[count]
#define SX_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char sx_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(sx_dynamic_shared)
#endif

namespace speechlm {

inline void cuda_check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // clear it, or the next launch would report this one again
    throw std::runtime_error(concat("speechlm_ext: ", what, ": ", cudaGetErrorString(status)));
  }
}

// Makes `device` current for a launch and puts the old one back, as torch expects.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cuda_check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) {
      cuda_check(cudaSetDevice(device), "cudaSetDevice");
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Blocks for n items, within what every device takes; kernels loop with a grid stride over the rest.
inline unsigned grid_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  constexpr int64_t kMost = 1 << 20;
  return static_cast<unsigned>(blocks < 1 ? 1 : (blocks < kMost ? blocks : kMost));
}

}  // namespace speechlm
