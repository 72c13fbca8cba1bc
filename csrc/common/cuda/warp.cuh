// Reductions over the 32 lanes of a warp; every lane gets the result. All lanes must call them.
#pragma once

#include "common/cuda/cuda.cuh"

namespace speechlm {

constexpr unsigned kFullMask = 0xffffffffu;

template <typename T, typename Combine>
__device__ inline T warp_reduce(T value, const Combine& combine) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(kFullMask, value, step));
  return value;
}

template <typename T>
__device__ inline T warp_sum(T value) {
  return warp_reduce(value, [](T a, T b) { return a + b; });
}

}  // namespace speechlm
