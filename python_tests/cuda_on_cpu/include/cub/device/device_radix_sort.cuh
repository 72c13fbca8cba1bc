// In place of CUB's header: a stable sort on the host. As CUB's, with temp == nullptr it only sets temp_bytes.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace cub::DeviceRadixSort {

template <typename Key, typename Value>
cudaError_t SortPairs(void* temp, size_t& temp_bytes, const Key* keys_in, Key* keys_out, const Value* values_in,
                      Value* values_out, int64_t n, int begin_bit, int end_bit, cudaStream_t) {
  cuda_on_cpu::note_launch();  // the size, too, is the current device's
  if (temp == nullptr) return temp_bytes = 1, cudaSuccess;
  cuda_on_cpu::count_event("cub::DeviceRadixSort::SortPairs");
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
  return cudaSuccess;
}

}  // namespace cub::DeviceRadixSort
