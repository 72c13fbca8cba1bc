// The CPU's loops over the columns of a scope, by instruction set. A scope is copied into blocks of kSampleBlock floats
// first, the last one filled up with -inf, so that no loop has a remainder. All sums are sums of integers and all else
// is exact, so all sets give equal bits.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "common/small_float.h"

namespace speechlm {

constexpr int64_t kSampleLanes = 16;
constexpr int64_t kSampleBlock = 16 * kSampleLanes;
constexpr int64_t kSampleBuckets = 1024;

// weight = round(2^40 e^((x - largest) / temperature)), the largest's is 2^40.
struct Weighing {
  float largest;
  float temperature;
};

// Which columns count: those above `value`, those equal to it up to column `last`, if they weigh at least `least`.
struct Kept {
  float value;
  int32_t last;
  int64_t least;
};

struct SampleLoops {
  // The maximum of every kSampleLanes-th column of each block, lane by lane: maxima [blocks * kSampleLanes]. NaNs are
  // passed over. Returns whether there is one; `largest` is the maximum of all.
  bool (*maxima)(const float* x, int64_t blocks, float* maxima, float* largest);
  // The sum of each block's weights. Returns the sum of all.
  int64_t (*sums)(const float* x, int64_t blocks, Weighing how, int64_t* sums);
  // The same of the columns that are kept.
  int64_t (*kept_sums)(const float* x, int64_t blocks, Weighing how, Kept kept, int64_t* sums);
  // The weights of n columns, a multiple of kSampleLanes.
  void (*weights)(const float* x, int64_t n, Weighing how, int64_t* weights);
  // Sums of weights by bucket [kSampleBuckets]; a larger x is in the same bucket or one before it.
  void (*histogram)(const float* x, int64_t blocks, Weighing how, int64_t* buckets);
  // Columns of that bucket; columns of at least `value`. In ascending order; return how many.
  int64_t (*in_bucket)(const float* x, int64_t blocks, Weighing how, int32_t bucket, int32_t* columns);
  int64_t (*at_least)(const float* x, int64_t blocks, const float* maxima, float value, int32_t* columns);
};

const SampleLoops& sample_loops();  // of simd_in_use()

// x = z, or u + guidance * (z - u) where u is not null and z not -inf; -inf where not allowed (null: all are).
template <typename T>
using LoadLoop = void (*)(float* x, const T* z, const T* u, float guidance, const uint8_t* allowed, int64_t n);

template <typename T>
LoadLoop<T> load_loop();  // of simd_in_use()

}  // namespace speechlm
