// The sums of each cluster's rows, for the next centroids. Every value is taken relative to its feature's offset and
// rounded to a multiple of its feature's step, a power of two that makes every partial sum exact in float64: so the
// bits do not depend on the order, and threads may add as they like (Demmel and Nguyen 2013).
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/tensor/small_float.h"

namespace speechlm {

template <typename T>
struct KmeansSumsArgs {
  int64_t num_rows = 0;             // N
  int64_t num_clusters = 0;         // K
  int64_t width = 0;                // F
  const T* x = nullptr;             // [N, F]
  const int32_t* labels = nullptr;  // [N]; a row with a label outside [0, K) is left out; on a GPU in `order`
  const double* offset = nullptr;   // [F]
  const double* step = nullptr;     // [F]
  double* sums = nullptr;           // [K, F], added to
  int64_t* counts = nullptr;        // [K], added to; the CPU's alone
};

// Adding this and taking it away again rounds to a multiple of the step.
constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52

template <typename T>
void kmeans_sums_cpu(const KmeansSumsArgs<T>& args, int threads);

// `order` [N]: the rows by ascending label; args.labels [N]: their labels in this order.
template <typename T>
void kmeans_sums_cuda(const KmeansSumsArgs<T>& args, const int64_t* order, int device, void* stream);

}  // namespace speechlm
