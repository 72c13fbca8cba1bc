// The CUB algorithms that the ops use. Like CUB's own, each is called twice: with temp == nullptr it only sets
// temp_bytes. Counts have 32 bits, because CUB's kernels for 64 are slower.
#pragma once

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "common/cuda/cuda.cuh"

namespace speechlm {

// Sorts pairs by bits [begin_bit, end_bit) of unsigned keys; equal keys keep their order.
template <typename Key, typename Value>
void sort_pairs(void* temp, size_t& temp_bytes, const Key* keys_in, Key* keys_out, const Value* values_in,
                Value* values_out, uint32_t n, int begin_bit, int end_bit, cudaStream_t stream) {
  cuda_check(cub::DeviceRadixSort::SortPairs(temp, temp_bytes, keys_in, keys_out, values_in, values_out, n, begin_bit,
                                             end_bit, stream),
             "cub::DeviceRadixSort::SortPairs");
}

// out[i] = in[0] + ... + in[i - 1].
template <typename In, typename Out>
void exclusive_sum(void* temp, size_t& temp_bytes, const In* in, Out* out, uint32_t n, cudaStream_t stream) {
  cuda_check(cub::DeviceScan::ExclusiveSum(temp, temp_bytes, in, out, n, stream), "cub::DeviceScan::ExclusiveSum");
}

}  // namespace speechlm
