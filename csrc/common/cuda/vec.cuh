// 16-byte vectors of any element type, for loads and stores that move a full sector per instruction.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/cuda/cuda.cuh"
#include "common/tensor/small_float.h"

namespace speechlm {

template <typename T, int kCount = 16 / sizeof(T)>
struct alignas(sizeof(T) * kCount) Vec {
  T v[kCount];
};

// A vector as a value that waits to be used: 16 bytes in four registers, where 16-bit elements would take one each.
template <typename T, int kCount>
using Packed = std::conditional_t<sizeof(Vec<T, kCount>) == 16, uint4, Vec<T, kCount>>;

template <typename To, typename From>
__device__ __forceinline__ To repacked(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

// A vector of one value.
template <typename T, int kCount>
__device__ __forceinline__ Packed<T, kCount> filled(T value) {
  Vec<T, kCount> out;
#pragma unroll
  for (int i = 0; i < kCount; ++i) out.v[i] = value;
  return repacked<Packed<T, kCount>>(out);
}

// A vector of sums, rounded.
template <typename T, int kCount>
__device__ __forceinline__ Vec<T, kCount> rounded(const Accumulator<T>* sums) {
  Vec<T, kCount> out;
  if constexpr (kCount % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) narrow_pair<T>(sums[i], sums[i + 1], out.v + i);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) narrow(sums[i], out.v[i]);
  }
  return out;
}

// A store of what this kernel and the next ones will not read soon: it is first to leave the caches.
__device__ __forceinline__ void store_streaming(uint4* to, const uint4& value) { __stcs(to, value); }
template <typename T>
__device__ __forceinline__ void store_streaming(Vec<T, 1>* to, const Vec<T, 1>& value) {
  *to = value;
}

template <typename T>
__host__ __device__ inline bool is_aligned(const T* pointer, size_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace speechlm
