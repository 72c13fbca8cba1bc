// The CPU's loops over the columns of a scope, by instruction set. A scope is copied into blocks of kSampleBlock floats
// first, the last one filled up with -inf, so that no loop has a remainder. All sums are sums of integers and all else
// is exact, so all sets give equal bits.
#pragma once

#include <cstdint>

#include "common/cpu/simd.h"
#include "common/tensor/small_float.h"

namespace speechlm {

constexpr int64_t kSampleLanes = 16;
constexpr int64_t kSampleBlock = 16 * kSampleLanes;

// weight = round(2^40 e^((x - largest) / temperature)), the largest's is 2^40.
struct Weighing {
  float largest;
  float temperature;
};

struct SampleLoops {
  // The maximum of every kSampleLanes-th column of each block, lane by lane: maxima [blocks * kSampleLanes]. NaNs are
  // passed over. Returns whether there is one; `largest` is the maximum of all.
  bool (*maxima)(const float* x, int64_t blocks, float* maxima, float* largest);
  // The sum of each block's weights. Returns the sum of all.
  int64_t (*sums)(const float* x, int64_t blocks, Weighing how, int64_t* sums);
  // The weights of n columns, a multiple of kSampleLanes.
  void (*weights)(const float* x, int64_t n, Weighing how, int64_t* weights);
  // Columns of at least `value`, in ascending order; returns how many.
  int64_t (*at_least)(const float* x, int64_t blocks, const float* maxima, float value, int32_t* columns);
};

SX_DECLARE_SIMD(const SampleLoops& sample_loops())

inline const SampleLoops& sample_loops() { return SX_SELECT_SIMD(sample_loops()); }  // of simd_in_use()

// x = z, or u + guidance * (z - u) where u is not null and z not -inf; -inf where not allowed (null: all are).
template <typename T>
using LoadLoop = void (*)(float* x, const T* z, const T* u, float guidance, const uint8_t* allowed, int64_t n);

SX_DECLARE_SIMD(template <typename T> LoadLoop<T> load_loop())

template <typename T>
LoadLoop<T> load_loop() {  // of simd_in_use()
  return SX_SELECT_SIMD(load_loop<T>());
}

}  // namespace speechlm
