// The CUB algorithms that the ops use, behind one header: CUB itself on a GPU, the standard library where the tests run
// kernels on the CPU. Like CUB's own, each is called twice: with temp == nullptr it only sets temp_bytes.
#pragma once

#include "common/cuda/cuda.cuh"

#ifdef SPEECHLM_CUDA_ON_CPU
#include <algorithm>
#include <numeric>
#include <vector>
#else
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#endif

namespace speechlm {

// Sorts pairs by bits [begin_bit, end_bit) of unsigned keys; equal keys keep their order.
template <typename Key, typename Value>
void sort_pairs(void* temp, size_t& temp_bytes, const Key* keys_in, Key* keys_out, const Value* values_in,
                Value* values_out, int64_t n, int begin_bit, int end_bit, cudaStream_t stream) {
#ifdef SPEECHLM_CUDA_ON_CPU
  (void)stream;
  if (temp == nullptr) {
    temp_bytes = 1;
    return;
  }
  const int width = end_bit - begin_bit;
  const Key mask = width >= static_cast<int>(8 * sizeof(Key)) ? ~Key{0} : (Key{1} << width) - 1;
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return (keys_in[a] >> begin_bit & mask) < (keys_in[b] >> begin_bit & mask);
  });
  for (int64_t i = 0; i < n; ++i) {
    keys_out[i] = keys_in[order[i]];
    values_out[i] = values_in[order[i]];
  }
#else
  cuda_check(cub::DeviceRadixSort::SortPairs(temp, temp_bytes, keys_in, keys_out, values_in, values_out, n, begin_bit,
                                             end_bit, stream),
             "cub::DeviceRadixSort::SortPairs");
#endif
}

// out[i] = in[0] + ... + in[i - 1].
template <typename In, typename Out>
void exclusive_sum(void* temp, size_t& temp_bytes, const In* in, Out* out, int64_t n, cudaStream_t stream) {
#ifdef SPEECHLM_CUDA_ON_CPU
  (void)stream;
  if (temp == nullptr) {
    temp_bytes = 1;
    return;
  }
  Out sum = 0;
  for (int64_t i = 0; i < n; ++i) {  // in and out may be one array
    const Out next = sum + static_cast<Out>(in[i]);
    out[i] = sum;
    sum = next;
  }
#else
  cuda_check(cub::DeviceScan::ExclusiveSum(temp, temp_bytes, in, out, n, stream), "cub::DeviceScan::ExclusiveSum");
#endif
}

}  // namespace speechlm
