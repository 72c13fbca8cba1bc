// Kernels with a planted fault of arithmetic, alignment or an unset variable, and launches that a GPU refuses.
#include "common/cuda/vec.cuh"
#include "cuda_on_cpu/selftest/cases.h"

namespace {

using cuda_on_cpu::Buffer;
using cuda_on_cpu::floats;
using cuda_on_cpu::kBlock;

constexpr int kLarge = 1 << 26;

using Vec4 = speechlm::Vec<float, 4>;
using Vec2 = speechlm::Vec<float, 2>;

// ---- right --------------------------------------------------------------------------------------------------------
// Offsets of more than 2^31 in 64 bits, and differences of indices below 0.
__global__ void wide_offsets(int rows, float* out) {
  const int64_t offset = static_cast<int64_t>(rows) * rows + int64_t{blockIdx.x} * (1u << 31) * 4;
  const int before = static_cast<int>(threadIdx.x) - 5, same = static_cast<int>(threadIdx.x - 5);
  out[threadIdx.x] = offset > (int64_t{1} << 31) && before == same ? 1.0f : 0.0f;
}

// ---- wrong --------------------------------------------------------------------------------------------------------
__global__ void misaligned_vector(const float* in, Vec4* out) {
  out[threadIdx.x] = *reinterpret_cast<const Vec4*>(in + 2);  // PLANTED misaligned_vector
}

__global__ void misaligned_pair(const float* in, Vec2* out) {
  out[threadIdx.x] = *reinterpret_cast<const Vec2*>(in + 1);  // PLANTED misaligned_pair
}

__global__ void misaligned_shared(Vec4* out) {
  SX_SHARED(float, tile, 8);
  if (threadIdx.x < 8) tile[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = *reinterpret_cast<const Vec4*>(&tile[1]);  // PLANTED misaligned_shared
}

__global__ void overflow_of_int(const float* in, int rows, int width, float* out) {
  const int offset = rows * width;  // PLANTED overflow_of_int
  out[threadIdx.x] = in[offset < 0 ? 0 : 1];
}

__global__ void overflow_of_index(const float* in, unsigned width, float* out) {
  const unsigned offset = (threadIdx.x + 64) * width;  // PLANTED overflow_of_index
  out[threadIdx.x] = in[offset == 0 ? 0 : 1];
}

__global__ void shift_by_all_bits(int bits, float* out) {
  out[threadIdx.x] = static_cast<float>(1 << bits);  // PLANTED shift_by_all_bits
}

struct TwoArrays {
  float first[kBlock], second[kBlock];
};

__global__ void into_the_next_array(float* out) {
  SX_SHARED(TwoArrays, both, 1);
  both[0].first[threadIdx.x + 1] = 1.0f;  // PLANTED into_the_next_array
  both[0].second[threadIdx.x] = 2.0f;
  __syncthreads();
  out[threadIdx.x] = both[0].first[threadIdx.x];
}

__noinline__ void set_if(bool is_set, int* value) {
  if (is_set) *value = 1;
}

__global__ void unset_index(const float* in, float* out) {
  int index;
  set_if(threadIdx.x != 3, &index);
  out[threadIdx.x] = in[index];  // PLANTED unset_index
}

__global__ void unset_value(float* out) {  // a wrong result, which a test of the values finds
  int value;
  set_if(threadIdx.x != 3, &value);
  out[threadIdx.x] = static_cast<float>(value);
}

// ---- launches -----------------------------------------------------------------------------------------------------
__global__ void nothing(float*) {}

__global__ void large_arrays(float* out) {
  SX_SHARED(float, first, 8 * 1024);
  SX_SHARED(float, second, 4 * 1024 + 1);
  first[threadIdx.x] = second[threadIdx.x] = 1.0f;
  out[threadIdx.x] = first[threadIdx.x];
}

struct LargeParameter {
  char bytes[4096];
};
__global__ void large_parameters(float*, LargeParameter) {}

__global__ void uses_dynamic(float* out) {
  SX_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = 1.0f;
  out[threadIdx.x] = tile[threadIdx.x];
}

}  // namespace

namespace cuda_on_cpu {

Cases limits_cases() {
  const auto launched = [](auto kernel, auto... arguments) {
    return [=] {
      const Buffer<float> in(kBlock, 1.0f), out(kBlock);
      SX_LAUNCH(kernel, 1, kBlock, 0, nullptr, in.data, arguments..., out.data);
      return floats(out.data, kBlock);
    };
  };
  const auto to_out = [](void (*kernel)(float*)) {
    return [=] {
      const Buffer<float> out(kBlock);
      SX_LAUNCH(kernel, 1, kBlock, 0, nullptr, out.data);
      return floats(out.data, kBlock);
    };
  };
  const auto vectors = [](auto* type, auto kernel) {
    return [=] {
      const Buffer<float> in(8, 1.0f);
      const Buffer<std::remove_pointer_t<decltype(type)>> out(kBlock);
      SX_LAUNCH(kernel, 1, kBlock, 0, nullptr, in.data, out.data);
      return std::vector<float>{};
    };
  };
  return {
      {"wide_offsets",
       [] {
         const Buffer<float> out(kBlock);
         SX_LAUNCH(wide_offsets, 1, kBlock, 0, nullptr, 1 << 20, out.data);
         return floats(out.data, kBlock);
       }},
      {"misaligned_vector", vectors(static_cast<Vec4*>(nullptr), misaligned_vector)},
      {"misaligned_pair", vectors(static_cast<Vec2*>(nullptr), misaligned_pair)},
      {"misaligned_shared",
       [] {
         const Buffer<Vec4> out(kBlock);
         SX_LAUNCH(misaligned_shared, 1, kBlock, 0, nullptr, out.data);
         return std::vector<float>{};
       }},
      {"overflow_of_int", launched(overflow_of_int, kLarge, 64)},
      {"overflow_of_index", launched(overflow_of_index, static_cast<unsigned>(kLarge))},
      {"shift_by_all_bits",
       [] {
         const Buffer<float> out(kBlock);
         SX_LAUNCH(shift_by_all_bits, 1, kBlock, 0, nullptr, 32, out.data);
         return floats(out.data, kBlock);
       }},
      {"into_the_next_array", to_out(into_the_next_array)},
      {"unset_index", launched(unset_index)},
      {"unset_value", to_out(unset_value)},
      {"large_arrays",
       [] {
         const Buffer<float> out(kBlock);
         SX_LAUNCH(large_arrays, 1, kBlock, 0, nullptr, out.data);  // PLANTED large_arrays
         return floats(out.data, kBlock);
       }},
      {"large_parameters",
       [] {
         const Buffer<float> out(kBlock);
         SX_LAUNCH(large_parameters, 1, kBlock, 0, nullptr, out.data, LargeParameter{});  // PLANTED large_parameters
         return floats(out.data, kBlock);
       }},
      {"too_many_threads",
       [] {
         const Buffer<float> out(kBlock);
         SX_LAUNCH(nothing, 1, dim3(32, 33), 0, nullptr, out.data);  // PLANTED too_many_threads
         return floats(out.data, kBlock);
       }},
      {"tall_grid",
       [] {
         const Buffer<float> out(kBlock);
         SX_LAUNCH(nothing, dim3(1, 65536), 1, 0, nullptr, out.data);  // PLANTED tall_grid
         return floats(out.data, kBlock);
       }},
      {"dynamic_without_attribute",
       [] {
         const Buffer<float> out(kBlock);
         SX_LAUNCH(uses_dynamic, 1, kBlock, 49 * 1024, nullptr, out.data);  // PLANTED dynamic_without_attribute
         return floats(out.data, kBlock);
       }},
      {"dynamic_with_attribute",
       [] {
         const Buffer<float> out(kBlock);
         const auto kernel = &large_arrays;  // another kernel's attribute does not count
         cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 60 * 1024);
         const auto dynamic = +[](float* p) { uses_dynamic(p); };
         cudaFuncSetAttribute(dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, 60 * 1024);
         SX_LAUNCH(dynamic, 1, kBlock, 60 * 1024, nullptr, out.data);
         return floats(out.data, kBlock);
       }},
  };
}

}  // namespace cuda_on_cpu
