// CUDA's runtime, launches, devices and errors, for every .cu file. The three macros replace the CUDA syntax that a
// host C++ compiler cannot read; a cuda_runtime.h that lets .cu files compile as C++ has its own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda/device_guard.cuh"
#include "common/cuda/error.cuh"
#include "common/host_device.h"

#ifndef SX_LAUNCH
// SX_LAUNCH(kernel<T>, grid, block, dynamic_smem_bytes, stream, args...)
#define SX_LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<(grid), (block), (smem), (stream)>>>(__VA_ARGS__)
// SX_SHARED(float, tile, 256) declares static shared memory; SX_DYNAMIC_SHARED(float, tile) the dynamic part.
#define SX_SHARED(type, name, count) __shared__ type name[count]
#define SX_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char sx_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(sx_dynamic_shared)
#endif

namespace speechlm {

// Blocks for n items, within the limits of every device; kernels loop with a grid stride over the rest.
inline unsigned grid_for(int64_t items, int64_t per_block) {
  constexpr int64_t kMaxBlocks = 1 << 20;
  const int64_t blocks = ceil_div(items, per_block);
  return static_cast<unsigned>(blocks < 1 ? 1 : (blocks < kMaxBlocks ? blocks : kMaxBlocks));
}

// Allocates the pieces of a workspace one after the other, each at a multiple of 256 bytes. With a null base it only
// counts the bytes.
class BumpAllocator {
 public:
  explicit BumpAllocator(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* allocate(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return piece;
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace speechlm
