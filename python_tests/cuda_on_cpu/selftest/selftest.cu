// Kernels with one planted fault each, and kernels that are right in ways that are easy to get wrong. test_shim.py runs
// them by name, in many orders of threads, and requires the fault, or its absence, every time.
#include "cuda_on_cpu/selftest/selftest.h"

#include "common/cuda/cub.cuh"
#include "cuda_on_cpu/selftest/cases.h"

namespace {

using cuda_on_cpu::Buffer;
using cuda_on_cpu::floats;
using cuda_on_cpu::kBlock;

// ---- right --------------------------------------------------------------------------------------------------------
__global__ void block_sum(const float* in, float* out, int n) {
  SX_SHARED(float, part, kBlock / 32);
  float sum = 0.0f;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += in[i];
  for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kBlock / 32; ++w) sum += part[w];
    out[blockIdx.x] = sum;
  }
}

__global__ void copy_async(const float4* in, float4* out) {
  SX_SHARED(float4, tile, kBlock);
  __pipeline_memcpy_async(&tile[threadIdx.x], &in[threadIdx.x], sizeof(float4));
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  out[threadIdx.x] = tile[kBlock - 1 - threadIdx.x];
}

__global__ void warp_exchange(int* out) {  // ordered by __syncwarp alone
  SX_SHARED(int, slot, kBlock);
  slot[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncwarp();
  out[threadIdx.x] = slot[threadIdx.x ^ 1];
}

__global__ void count(unsigned* out) {
  SX_SHARED(unsigned, total, 1);
  if (threadIdx.x == 0) total[0] = 0;
  __syncthreads();
  atomicAdd(&total[0], threadIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) out[0] = total[0];
}

__global__ void vote_and_reduce(float* out) {
  const unsigned lane = threadIdx.x % 32;
  const int even = __syncthreads_count(threadIdx.x % 2 == 0);
  const int all = __syncthreads_and(1) && !__syncthreads_and(threadIdx.x != 5) && __syncthreads_or(threadIdx.x == 5);
  const unsigned sum = __reduce_add_sync(0xffffffffu, lane);
  const int most = __reduce_max_sync(0xffffffffu, static_cast<int>(lane));
  const unsigned like_me = __match_any_sync(0xffffffffu, lane % 2);
  if (threadIdx.x == 0) {
    out[0] = static_cast<float>(even);
    out[1] = static_cast<float>(all);
    out[2] = static_cast<float>(sum);
    out[3] = static_cast<float>(most);
    out[4] = static_cast<float>(like_me);
  }
}

__global__ void three_dimensions(float* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  out[i] = static_cast<float>(i);
}

__global__ void sixteen_bits(float* out) {  // halfway cases go to the even neighbour
  out[0] = __bfloat162float(__float2bfloat16_rn(1.0f + 0.00390625f));
  out[1] = __bfloat162float(__float2bfloat16_rn(1.0f + 0.0039066f));
  out[2] = __half2float(__float2half_rn(1.0f + 0.00048828125f));
  out[3] = __half2float(__float2half_rn(1.0f + 0.0004887f));
  out[4] = __half2float(__float2half_rn(65520.0f));
  out[5] = __half2float(__float2half_rn(6.0e-8f));
}

__global__ void shuffles(float* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int up = __shfl_up_sync(0xffffffffu, lane, 3);
  const int down = __shfl_down_sync(0xffffffffu, lane, 5);
  const int third_of_eight = __shfl_sync(0xffffffffu, lane, 2, 8);
  out[threadIdx.x] = static_cast<float>(up + 100 * down + 10000 * third_of_eight);
}

__global__ void warp_values(float* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned bits = 1u << lane % 8 | 0x100u;
  int all_equal[2];
  const unsigned whole = __match_all_sync(0xffffffffu, 7.5f, &all_equal[0]);
  const unsigned none = __match_all_sync(0xffffffffu, lane / 31, &all_equal[1]);
  const float values[] = {static_cast<float>(__ballot_sync(0xffffffffu, lane % 3 == 0)),
                          static_cast<float>(whole == 0xffffffffu && all_equal[0] && none == 0 && !all_equal[1]),
                          static_cast<float>(__reduce_min_sync(0xffffffffu, lane - 20)),
                          static_cast<float>(__reduce_min_sync(0xffffffffu, static_cast<unsigned>(lane - 20))),
                          static_cast<float>(__reduce_max_sync(0xffffffffu, static_cast<unsigned>(lane))),
                          static_cast<float>(__reduce_and_sync(0xffffffffu, bits)),
                          static_cast<float>(__reduce_or_sync(0xffffffffu, bits)),
                          static_cast<float>(__reduce_xor_sync(0xffffffffu, lane < 31 ? bits : 0u))};
  for (int i = lane; i < 8 && threadIdx.x < 32; i += 32) out[i] = values[i];
}

__global__ void atomics(int* numbers, unsigned* bits, __nv_bfloat162* pair, float* sum) {
  const int i = static_cast<int>(threadIdx.x);
  atomicMin(&numbers[0], 40 - i);
  atomicMax(&numbers[1], i - 40);
  atomicSub(&numbers[2], i);
  int seen = atomicAdd(&numbers[3], 0), expected;  // a maximum by compare-and-swap
  do {
    expected = seen;
    seen = atomicCAS(&numbers[3], expected, expected > i * i ? expected : i * i);
  } while (seen != expected);
  if (atomicExch(&numbers[4], 1) == 0) atomicAdd(&numbers[5], 1);  // one thread alone finds it free
  atomicOr(&bits[0], 1u << i % 32);
  atomicAnd(&bits[1], ~(1u << i % 32 / 2));
  atomicXor(&bits[2], 1u << i % 5);
  atomicAdd(pair, __nv_bfloat162{__float2bfloat16_rn(1.0f), __float2bfloat16_rn(-0.5f)});
  atomicAdd(sum, 0.5f);
}

__global__ void cached_access(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  __stcs(&out[i], __ldg(&in[i]) + __ldcs(&in[kBlock - 1 - i]));
}

// ---- wrong --------------------------------------------------------------------------------------------------------
__global__ void missing_barrier(float* out) {
  SX_SHARED(float, tile, kBlock);
  tile[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = tile[kBlock - 1 - threadIdx.x];  // PLANTED missing_barrier
}

__global__ void missing_second_barrier(float* out) {
  SX_SHARED(float, tile, 1);
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x == 0) tile[0] = static_cast<float>(round);  // PLANTED missing_second_barrier
    __syncthreads();
    out[threadIdx.x] = tile[0];
  }
}

__global__ void missing_syncwarp(int* out) {
  SX_SHARED(int, slot, kBlock);
  slot[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = slot[threadIdx.x ^ 1];  // PLANTED missing_syncwarp
}

__global__ void wrong_mask(int* out) {
  int value = static_cast<int>(threadIdx.x);
  if (threadIdx.x % 32 < 16) value = __shfl_xor_sync(0xffffffffu, value, 1);  // PLANTED wrong_mask
  out[threadIdx.x] = value;
}

__global__ void mask_without_caller(int* out) {
  out[threadIdx.x] = __any_sync(0xfffffffeu, 1);  // PLANTED mask_without_caller
}

__global__ void reads_missing_lane(int* out) {
  int value = static_cast<int>(threadIdx.x);
  if (threadIdx.x % 32 < 16) value = __shfl_sync(0x0000ffffu, value, 20);  // PLANTED reads_missing_lane
  out[threadIdx.x] = value;
}

__global__ void overrun(float* out) {
  SX_SHARED(float, tile, kBlock);
  float* const next = tile + 1;  // a pointer, whose bounds the compiler does not know
  next[threadIdx.x] = 1.0f;      // PLANTED overrun
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void dynamic_overrun(float* out) {
  SX_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = 1.0f;  // PLANTED dynamic_overrun
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void shared_race(int* out) {
  SX_SHARED(int, winner, 1);
  winner[0] = static_cast<int>(threadIdx.x);  // PLANTED shared_race
  __syncthreads();
  out[threadIdx.x] = winner[0];
}

__global__ void atomic_against_plain(int* out) {
  SX_SHARED(int, total, 1);
  if (threadIdx.x == 0) total[0] = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    total[0] = 7;  // PLANTED atomic_against_plain
  } else {
    atomicAdd(&total[0], 1);  // PLANTED atomic_against_plain
  }
  __syncthreads();
  out[threadIdx.x] = total[0];
}

__global__ void unwritten_shared(float* out) {
  SX_SHARED(float, tile, kBlock);
  if (threadIdx.x < kBlock / 2) tile[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];  // PLANTED unwritten_shared
}

__global__ void divergent_barriers(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();  // PLANTED divergent_barriers
  } else {
    __syncthreads();  // PLANTED divergent_barriers
  }
  out[threadIdx.x] = 1;
}

__global__ void barrier_after_exit(int* out) {
  out[threadIdx.x] = 1;
  if (threadIdx.x >= 64) return;
  __syncthreads();  // PLANTED barrier_after_exit
}

__global__ void collective_after_exit(int* out) {
  out[threadIdx.x] = 1;
  if (threadIdx.x % 32 >= 30) return;
  out[threadIdx.x] = __all_sync(0xffffffffu, 1);  // PLANTED collective_after_exit
}

__global__ void misaligned(const float* in, float4* out) {
  out[threadIdx.x] = *reinterpret_cast<const float4*>(in + 1);  // PLANTED misaligned
}

__global__ void async_without_wait(const float4* in, float4* out) {
  SX_SHARED(float4, tile, kBlock);
  __pipeline_memcpy_async(&tile[threadIdx.x], &in[threadIdx.x], sizeof(float4));
  __pipeline_commit();
  out[threadIdx.x] = tile[threadIdx.x];  // PLANTED async_without_wait
  __pipeline_wait_prior(0);
}

__global__ void out_of_bounds(const float* in, float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i <= n) out[i] = 2.0f * in[i];  // PLANTED out_of_bounds
}

__global__ void forgets_the_last(float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n - 1) out[i] = 1.0f;
}

}  // namespace

namespace cuda_on_cpu {

Cases block_cases() {
  const auto to_int = [](void (*kernel)(int*), size_t dynamic = 0) {
    return [=] {
      const Buffer<int> out(kBlock);
      SX_LAUNCH(kernel, 1, kBlock, dynamic, nullptr, out.data);
      return std::vector<float>(out.data, out.data + kBlock);
    };
  };
  const auto to_float = [](void (*kernel)(float*), size_t dynamic = 0) {
    return [=] {
      const Buffer<float> out(kBlock);
      SX_LAUNCH(kernel, 1, kBlock, dynamic, nullptr, out.data);
      return floats(out.data, kBlock);
    };
  };
  const auto copy = [](void (*kernel)(const float4*, float4*)) {
    return [=] {
      const Buffer<float4> in(kBlock), out(kBlock);
      for (int i = 0; i < kBlock; ++i) in.data[i] = make_float4(i, i, i, i);
      SX_LAUNCH(kernel, 1, kBlock, 0, nullptr, in.data, out.data);
      return floats(&out.data->x, 4 * kBlock);
    };
  };
  return {
      {"block_sum",
       [] {
         const Buffer<float> in(1000), out(3);
         for (int i = 0; i < 1000; ++i) in.data[i] = static_cast<float>(i % 7);
         SX_LAUNCH(block_sum, 3, kBlock, 0, nullptr, in.data, out.data, 1000);
         return floats(out.data, 3);
       }},
      {"copy_async", copy(copy_async)},
      {"warp_exchange", to_int(warp_exchange)},
      {"count",
       [] {
         const Buffer<unsigned> out(1);
         SX_LAUNCH(count, 1, kBlock, 0, nullptr, out.data);
         return std::vector<float>{static_cast<float>(out.data[0])};
       }},
      {"vote_and_reduce",
       [] {
         const Buffer<float> out(5);
         SX_LAUNCH(vote_and_reduce, 1, kBlock, 0, nullptr, out.data);
         return floats(out.data, 5);
       }},
      {"three_dimensions",
       [] {
         const Buffer<float> out(4 * 3 * 2 * 2 * 3 * 2);
         SX_LAUNCH(three_dimensions, dim3(2, 3, 2), dim3(4, 3, 2), 0, nullptr, out.data);
         return floats(out.data, out.size);
       }},
      {"sixteen_bits",
       [] {
         const Buffer<float> out(6);
         SX_LAUNCH(sixteen_bits, 1, 1, 0, nullptr, out.data);
         return floats(out.data, 6);
       }},
      {"shuffles", to_float(shuffles)},
      {"warp_values",
       [] {
         const Buffer<float> out(8);
         SX_LAUNCH(warp_values, 1, kBlock, 0, nullptr, out.data);
         return floats(out.data, 8);
       }},
      {"atomics",
       [] {
         const Buffer<int> numbers(6);
         const Buffer<unsigned> bits(3);
         const Buffer<__nv_bfloat162> pair(1);
         const Buffer<float> sum(1);
         for (int i = 0; i < 6; ++i) numbers.data[i] = 0;
         bits.data[0] = bits.data[2] = 0;
         bits.data[1] = 0xffffffffu;
         pair.data[0] = __nv_bfloat162{__float2bfloat16_rn(0.0f), __float2bfloat16_rn(0.0f)};
         sum.data[0] = 0.0f;
         SX_LAUNCH(atomics, 1, kBlock, 0, nullptr, numbers.data, bits.data, pair.data, sum.data);
         std::vector<float> out(numbers.data, numbers.data + 6);
         out.insert(out.end(), bits.data, bits.data + 3);
         out.insert(out.end(), {__bfloat162float(pair.data[0].x), __bfloat162float(pair.data[0].y), sum.data[0]});
         return out;
       }},
      {"cached_access",
       [] {
         const Buffer<float> in(kBlock), out(kBlock);
         for (int i = 0; i < kBlock; ++i) in.data[i] = static_cast<float>(i * i);
         SX_LAUNCH(cached_access, 1, kBlock, 0, nullptr, in.data, out.data);
         return floats(out.data, kBlock);
       }},
      {"cub",
       [] {
         // Keys by their bits 1 and 2 alone: 5, 4, 3, 2 are 2, 2, 1, 1 there, and equal ones keep their order.
         const std::vector<uint32_t> keys = {5, 4, 3, 2}, values = {0, 1, 2, 3};
         std::vector<uint32_t> keys_out(4), values_out(4), sums(4);
         size_t bytes = 0;
         const auto sort = [&](void* temp) {
           speechlm::sort_pairs(temp, bytes, keys.data(), keys_out.data(), values.data(), values_out.data(), 4, 1, 3,
                                nullptr);
         };
         sort(nullptr);
         std::vector<char> temp(bytes);
         sort(temp.data());
         speechlm::exclusive_sum(nullptr, bytes, keys.data(), sums.data(), 4, nullptr);
         speechlm::exclusive_sum(temp.data(), bytes, keys.data(), sums.data(), 4, nullptr);
         std::vector<float> out(values_out.begin(), values_out.end());
         out.insert(out.end(), sums.begin(), sums.end());
         return out;
       }},
      {"missing_barrier", to_float(missing_barrier)},
      {"missing_second_barrier", to_float(missing_second_barrier)},
      {"missing_syncwarp", to_int(missing_syncwarp)},
      {"wrong_mask", to_int(wrong_mask)},
      {"mask_without_caller", to_int(mask_without_caller)},
      {"reads_missing_lane", to_int(reads_missing_lane)},
      {"overrun", to_float(overrun)},
      {"dynamic_overrun", to_float(dynamic_overrun, (kBlock - 1) * sizeof(float))},
      {"shared_race", to_int(shared_race)},
      {"atomic_against_plain", to_int(atomic_against_plain)},
      {"unwritten_shared", to_float(unwritten_shared)},
      {"divergent_barriers", to_int(divergent_barriers)},
      {"barrier_after_exit", to_int(barrier_after_exit)},
      {"collective_after_exit", to_int(collective_after_exit)},
      {"misaligned",
       [] {
         const Buffer<float> in(8);
         const Buffer<float4> out(kBlock);
         for (int i = 0; i < 8; ++i) in.data[i] = 0.0f;
         SX_LAUNCH(misaligned, 1, kBlock, 0, nullptr, in.data, out.data);
         return floats(&out.data->x, 4);
       }},
      {"async_without_wait", copy(async_without_wait)},
      {"out_of_bounds",
       [] {
         const Buffer<float> in(100), out(100);
         for (int i = 0; i < 100; ++i) in.data[i] = 1.0f;
         SX_LAUNCH(out_of_bounds, 2, kBlock, 0, nullptr, in.data, out.data, 100);
         return floats(out.data, 100);
       }},
      {"forgets_the_last",
       [] {
         const Buffer<float> out(100);
         SX_LAUNCH(forgets_the_last, 2, kBlock, 0, nullptr, out.data, 100);
         return floats(out.data, 100);
       }},
  };
}

namespace {

const Cases& cases() {
  static const Cases all = [] {
    Cases found = block_cases();
    found.merge(grid_cases());
    found.merge(limits_cases());
    return found;
  }();
  return all;
}

}  // namespace

std::vector<std::string> selftest_names() {
  std::vector<std::string> names;
  for (const auto& item : cases()) names.push_back(item.first);
  return names;
}

std::vector<float> selftest(const std::string& name) {
  forget_memory();
  return cases().at(name)();
}

}  // namespace cuda_on_cpu
