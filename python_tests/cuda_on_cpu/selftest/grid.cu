// Kernels whose blocks share global memory: right by fences and atomic operations, or with one planted fault each.
#include "cuda_on_cpu/selftest/cases.h"

namespace {

using cuda_on_cpu::Buffer;
using cuda_on_cpu::floats;
using cuda_on_cpu::kBlock;

constexpr int kBlocks = 6;
constexpr int kManyBlocks = 64;  // more than are resident at a time

// ---- right --------------------------------------------------------------------------------------------------------
// Each block writes a part; the last one to arrive, all of whose threads read all parts, resets the counter.
__global__ void last_block(const float* in, float* parts, unsigned* arrived, float* out) {
  SX_SHARED(int, is_last, 1);
  parts[blockIdx.x * kBlock + threadIdx.x] = 2.0f * in[blockIdx.x * kBlock + threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last[0] = atomicAdd(arrived, 1u) == gridDim.x - 1 ? 1 : 0;
    __threadfence();
  }
  __syncthreads();
  if (is_last[0] == 0) return;
  float sum = 0.0f;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b * kBlock + threadIdx.x];
  out[threadIdx.x] = sum;
  if (threadIdx.x == 0) *arrived = 0;
}

// A chain of two counters: what block 0 has written goes through a block of the second half to the last one.
__global__ void chain(int* first, unsigned* counters, int* out) {
  if (blockIdx.x == 0) {
    *first = 7;
    __threadfence();
    atomicExch(&counters[0], 1u);
    return;
  }
  if (blockIdx.x == 1) {
    while (atomicAdd(&counters[0], 0u) == 0) {
    }
    __threadfence();
    atomicExch(&counters[1], 1u);
    return;
  }
  while (atomicAdd(&counters[1], 0u) == 0) {
  }
  __threadfence();
  *out = *first;
}

__global__ void exchange_by_global(int* slots, int* out) {
  slots[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = slots[kBlock - 1 - threadIdx.x];
}

__global__ void count_over_blocks(unsigned* out) { atomicAdd(out, threadIdx.x); }

// ---- wrong --------------------------------------------------------------------------------------------------------
__global__ void blocks_overlap(float* out) {
  out[blockIdx.x * (kBlock - 1) + threadIdx.x] = 1.0f;  // PLANTED blocks_overlap
}

// All threads of a block read the state; one of them arrives, and the last block to do so moves the state on.
__global__ void reads_after_arrival(int* state, unsigned* arrived, int* out) {
  SX_SHARED(int, is_last, 1);
  out[blockIdx.x * kBlock + threadIdx.x] = *state;  // PLANTED reads_after_arrival
  if (threadIdx.x == 0) {
    __threadfence();
    is_last[0] = atomicAdd(arrived, 1u) == gridDim.x - 1 ? 1 : 0;
    __threadfence();
  }
  __syncthreads();
  if (is_last[0] != 0 && threadIdx.x == 0) *state += 1;  // PLANTED reads_after_arrival
}

__global__ void missing_first_fence(float* parts, unsigned* arrived, float* out) {
  parts[blockIdx.x] = 1.0f;  // PLANTED missing_first_fence
  const bool is_last = atomicAdd(arrived, 1u) == gridDim.x - 1;
  __threadfence();
  if (!is_last) return;
  float sum = 0.0f;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b];  // PLANTED missing_first_fence
  *out = sum;
}

__global__ void missing_last_fence(float* parts, unsigned* arrived, float* out) {
  parts[blockIdx.x] = 1.0f;  // PLANTED missing_last_fence
  __threadfence();
  if (atomicAdd(arrived, 1u) != gridDim.x - 1) return;
  float sum = 0.0f;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b];  // PLANTED missing_last_fence
  *out = sum;
}

// Thread 0's fence does not cover what the other threads write: no barrier is before it.
__global__ void fence_of_one_thread(float* parts, unsigned* arrived, float* out) {
  SX_SHARED(int, is_last, 1);
  parts[blockIdx.x * kBlock + threadIdx.x] = 1.0f;  // PLANTED fence_of_one_thread
  if (threadIdx.x == 0) {
    __threadfence();
    is_last[0] = atomicAdd(arrived, 1u) == gridDim.x - 1 ? 1 : 0;
    __threadfence();
  }
  __syncthreads();
  if (is_last[0] == 0) return;
  float sum = 0.0f;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b * kBlock + threadIdx.x];  // PLANTED fence_of_one_thread
  out[threadIdx.x] = sum;
}

__global__ void plain_flag(int* flag, int* out) {
  if (blockIdx.x == 0) {
    *flag = 1;  // PLANTED plain_flag
  } else {
    out[blockIdx.x] = *flag;  // PLANTED plain_flag
  }
}

__global__ void plain_read_of_counter(unsigned* counter, unsigned* out) {
  atomicAdd(counter, 1u);      // PLANTED plain_read_of_counter
  out[blockIdx.x] = *counter;  // PLANTED plain_read_of_counter
}

__global__ void exchange_without_barrier(int* slots, int* out) {
  slots[threadIdx.x] = static_cast<int>(threadIdx.x);  // PLANTED exchange_without_barrier
  out[threadIdx.x] = slots[kBlock - 1 - threadIdx.x];  // PLANTED exchange_without_barrier
}

__global__ void waits_for_all_blocks(unsigned* arrived, float* out) {
  atomicAdd(arrived, 1u);
  while (atomicAdd(arrived, 0u) < gridDim.x) {  // PLANTED waits_for_all_blocks
  }
  out[blockIdx.x] = 1.0f;
}

// No data race, yet wrong: another block may add between the two operations. Some orders of the blocks show it.
__global__ void lost_update(unsigned* counter) {
  const unsigned before = atomicAdd(counter, 0u);
  atomicExch(counter, before + 1);
}

}  // namespace

namespace cuda_on_cpu {

Cases grid_cases() {
  const auto by_counter = [](void (*kernel)(float*, unsigned*, float*)) {
    return [=] {
      const Buffer<float> parts(kBlocks * kBlock), out(kBlock, 0.0f);
      const Buffer<unsigned> arrived(1, 0u);
      SX_LAUNCH(kernel, kBlocks, kBlock, 0, nullptr, parts.data, arrived.data, out.data);
      return floats(out.data, 1);
    };
  };
  const auto single_threads = [](void (*kernel)(float*, unsigned*, float*)) {
    return [=] {
      const Buffer<float> parts(kBlocks), out(1);
      const Buffer<unsigned> arrived(1, 0u);
      SX_LAUNCH(kernel, kBlocks, 1, 0, nullptr, parts.data, arrived.data, out.data);
      return floats(out.data, 1);
    };
  };
  const auto by_slots = [](void (*kernel)(int*, int*)) {
    return [=] {
      const Buffer<int> slots(kBlock), out(kBlock);
      SX_LAUNCH(kernel, 1, kBlock, 0, nullptr, slots.data, out.data);
      return std::vector<float>(out.data, out.data + kBlock);
    };
  };
  return {
      {"last_block",
       [] {
         const Buffer<float> in(kBlocks * kBlock, 1.0f), parts(kBlocks * kBlock), out(kBlock);
         const Buffer<unsigned> arrived(1, 0u);
         SX_LAUNCH(last_block, kBlocks, kBlock, 0, nullptr, in.data, parts.data, arrived.data, out.data);
         std::vector<float> result = floats(out.data, kBlock);
         result.push_back(static_cast<float>(arrived.data[0]));
         return result;
       }},
      {"chain",
       [] {
         const Buffer<int> first(1, 0), out(1);
         const Buffer<unsigned> counters(2, 0u);
         SX_LAUNCH(chain, 3, 1, 0, nullptr, first.data, counters.data, out.data);
         return std::vector<float>{static_cast<float>(out.data[0])};
       }},
      {"exchange_by_global", by_slots(exchange_by_global)},
      {"exchange_without_barrier", by_slots(exchange_without_barrier)},
      {"count_over_blocks",
       [] {
         const Buffer<unsigned> out(1, 0u);
         SX_LAUNCH(count_over_blocks, kBlocks, kBlock, 0, nullptr, out.data);
         return std::vector<float>{static_cast<float>(out.data[0])};
       }},
      {"blocks_overlap",
       [] {
         const Buffer<float> out(kBlocks * kBlock);
         SX_LAUNCH(blocks_overlap, kBlocks, kBlock, 0, nullptr, out.data);
         return floats(out.data, 1);
       }},
      {"reads_after_arrival",
       [] {
         const Buffer<int> state(1, 3), out(kBlocks * kBlock);
         const Buffer<unsigned> arrived(1, 0u);
         SX_LAUNCH(reads_after_arrival, kBlocks, kBlock, 0, nullptr, state.data, arrived.data, out.data);
         return std::vector<float>(out.data, out.data + kBlock);
       }},
      {"missing_first_fence", single_threads(missing_first_fence)},
      {"missing_last_fence", single_threads(missing_last_fence)},
      {"fence_of_one_thread", by_counter(fence_of_one_thread)},
      {"plain_flag",
       [] {
         const Buffer<int> flag(1, 0), out(kBlocks);
         SX_LAUNCH(plain_flag, kBlocks, 1, 0, nullptr, flag.data, out.data);
         return std::vector<float>(out.data, out.data + kBlocks);
       }},
      {"plain_read_of_counter",
       [] {
         const Buffer<unsigned> counter(1, 0u), out(kBlocks);
         SX_LAUNCH(plain_read_of_counter, kBlocks, 1, 0, nullptr, counter.data, out.data);
         return std::vector<float>(out.data, out.data + kBlocks);
       }},
      {"waits_for_all_blocks",
       [] {
         const Buffer<unsigned> arrived(1, 0u);
         const Buffer<float> out(kManyBlocks);
         SX_LAUNCH(waits_for_all_blocks, kManyBlocks, 1, 0, nullptr, arrived.data, out.data);
         return floats(out.data, kManyBlocks);
       }},
      {"lost_update",
       [] {
         const Buffer<unsigned> counter(1, 0u);
         SX_LAUNCH(lost_update, kManyBlocks, 1, 0, nullptr, counter.data);
         return std::vector<float>{static_cast<float>(counter.data[0])};
       }},
  };
}

}  // namespace cuda_on_cpu
