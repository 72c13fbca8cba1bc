// 16-byte vectors of any element type, for loads and stores that move a full sector per instruction.
#pragma once

#include "common/cuda/cuda.cuh"

namespace speechlm {

template <typename T, int kCount = 16 / sizeof(T)>
struct alignas(sizeof(T) * kCount) Vec {
  T v[kCount];
};

template <typename T>
__host__ __device__ inline bool is_aligned(const T* pointer, size_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace speechlm
