// Sums, maxima and prefix sums of a block's threads, and the shared memory that the kernel's steps use in turn.
#pragma once

#include "common/cuda/warp.cuh"
#include "multistream_sample/state_machine.h"

namespace speechlm {

using Wide = unsigned long long;  // the type of 64-bit atomics

constexpr int kSampleThreads = 256;
constexpr int kSampleWarps = kSampleThreads / 32;
constexpr int kMaxListed = 1024;  // buckets of a histogram, and columns that are compared with each other

struct BlockMemory {
  union {  // a histogram
    Wide amounts[kMaxListed];
    unsigned counts[kMaxListed];
  };
  Wide ranks[kMaxListed];
  Wide warps[kSampleWarps];
  Wide found, before;
  unsigned count;
  int place;
  int finished;  // the request whose last block this is, or -1
  Position position;
};

__device__ inline int thread_index() { return static_cast<int>(threadIdx.x); }

// The sum of all threads' values, in every thread.
__device__ inline Wide block_sum(BlockMemory& m, Wide value) {
  value = warp_sum(value);
  if (thread_index() % 32 == 0) m.warps[thread_index() / 32] = value;
  __syncthreads();
  Wide sum = 0;
  for (int w = 0; w < kSampleWarps; ++w) sum += m.warps[w];
  __syncthreads();
  return sum;
}

__device__ inline Wide block_max(BlockMemory& m, Wide value) {
  value = warp_reduce(value, [](Wide a, Wide b) { return b > a ? b : a; });
  if (thread_index() % 32 == 0) m.warps[thread_index() / 32] = value;
  __syncthreads();
  for (int w = 0; w < kSampleWarps; ++w) value = m.warps[w] > value ? m.warps[w] : value;
  __syncthreads();
  return value;
}

// The sum of the values of this lane and those before it.
__device__ inline Wide warp_prefix(Wide value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Wide other = __shfl_up_sync(kFullMask, value, step);
    if (thread_index() % 32 >= step) value += other;
  }
  return value;
}

// The sum of the values of the threads before this one; `total` becomes that of all.
__device__ inline Wide block_prefix(BlockMemory& m, Wide value, Wide& total) {
  const Wide mine = warp_prefix(value);
  if (thread_index() % 32 == 31) m.warps[thread_index() / 32] = mine;
  __syncthreads();
  Wide before = mine - value;
  total = 0;
  for (int w = 0; w < kSampleWarps; ++w) {
    if (w < thread_index() / 32) before += m.warps[w];
    total += m.warps[w];
  }
  __syncthreads();
  return before;
}

// The histogram of amounts, or of columns. In shared memory a GPU adds 32 bits by itself, but 64 in a loop of
// compare-and-swap, so what fits in 32 bits is counted there.
template <typename Amount>
__device__ inline Amount* histogram_of(BlockMemory& m) {
  if constexpr (sizeof(Amount) == sizeof(unsigned)) {
    return m.counts;
  } else {
    return m.amounts;
  }
}

// Adds to a histogram; slot -1: nothing. All lanes of a warp must call it: if their slots agree, one of them adds.
template <typename Amount>
__device__ inline void add_to(Amount* histogram, int slot, Amount amount) {
  const int first = __shfl_sync(kFullMask, slot, 0);
  if (__all_sync(kFullMask, slot == first)) {
    const Amount sum = warp_sum(amount);
    if (thread_index() % 32 == 0 && slot >= 0) atomicAdd(&histogram[slot], sum);
  } else if (slot >= 0) {
    atomicAdd(&histogram[slot], amount);
  }
}

// The slot in which the sum of the slots from the first on reaches `target` (at least 1); `before` becomes the sum of
// those before it. The histogram has kEach slots for each thread, and reaches the target.
template <int kEach, typename Amount>
__device__ inline int locate(BlockMemory& m, const Amount* histogram, Wide target, Wide& before) {
  Wide mine = 0, total;
  for (int i = 0; i < kEach; ++i) mine += histogram[thread_index() * kEach + i];
  Wide sum = block_prefix(m, mine, total);
  if (sum < target && target <= sum + mine) {
    int slot = thread_index() * kEach;
    while (sum + histogram[slot] < target) sum += histogram[slot++];
    m.found = static_cast<Wide>(slot);
    m.before = sum;
  }
  __syncthreads();
  before = m.before;
  return static_cast<int>(m.found);
}

}  // namespace speechlm
