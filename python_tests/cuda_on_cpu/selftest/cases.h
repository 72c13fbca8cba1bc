// What the files of test kernels share: arrays in global memory, and kernels by name.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "common/cuda/cuda.cuh"

namespace cuda_on_cpu {

constexpr int kBlock = 96;  // three warps

using Cases = std::map<std::string, std::function<std::vector<float>()>>;
Cases block_cases();   // selftest.cu: within a block
Cases grid_cases();    // grid.cu: between the blocks of a launch
Cases limits_cases();  // limits.cu: arithmetic, alignment, variables, and limits of a launch

template <typename T>
struct Buffer {
  explicit Buffer(int n) : size(n) { cudaMalloc(&data, n * sizeof(T)); }
  Buffer(int n, T value) : Buffer(n) {
    for (int i = 0; i < n; ++i) data[i] = value;
  }
  ~Buffer() { cudaFree(data); }
  T* data = nullptr;
  int size;
};

inline std::vector<float> floats(const float* p, int n) { return std::vector<float>(p, p + n); }

}  // namespace cuda_on_cpu
