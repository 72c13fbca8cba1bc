// Top-k and top-p by a block of threads without sorting, and the draw in column order.
//
// Columns are ranked by (logit, then the lower column); a column's rank is a number of 64 bits that grows from the best
// one on. Top-k and top-p keep the ranks up to a border: the k-th column's, or that of the column in which the
// sum of the weights reaches the limit. A histogram over the distance from the maximum finds the bucket of the border;
// the columns of that bucket, few as a rule, are compared with each other. If they are many (ties), digits of the rank
// split them until they are few.
#pragma once

#include "multistream_sample/device/scope.cuh"

namespace speechlm {

constexpr Wide kNoBorder = ~Wide{0};

__device__ inline Wide rank_of(float x, int place) {
  return static_cast<Wide>(~key_of(x)) << 32 | static_cast<Wide>(place);
}

__device__ inline float logit_of_rank(Wide rank) { return value_of(~static_cast<uint32_t>(rank >> 32)); }

// A larger logit is in the same bucket or one before it.
struct Buckets {
  float largest, scale;

  __device__ Buckets(float largest_, float smallest) : largest(largest_) {
    const float range = largest_ - smallest;
    const float steps = static_cast<float>(kMaxListed) / range;
    scale = range > 0 && steps < INFINITY ? steps : 0.0f;
  }
  __device__ int operator()(float x) const {
    const float steps = (largest - x) * scale;
    constexpr auto kLast = static_cast<float>(kMaxListed - 1);
    return static_cast<int>(steps < kLast ? steps : kLast);
  }
};

struct CountOne {
  __device__ unsigned operator()(float) const { return 1; }
};

// The rank at which the amounts of the columns, best first, reach `target` (at least 1, at most their sum).
template <typename T, typename Amount>
__device__ Wide find_border(BlockMemory& m, const BlockScope<T>& scope, const Buckets& bucket_of, const Amount& amount,
                            Wide target) {
  using Count = decltype(amount(0.0f));
  Count* const amounts = histogram_of<Count>(m);
  const int thread = thread_index();
  const auto clear = [&](int count) {
    __syncthreads();
    for (int i = thread; i < count; i += kSampleThreads) amounts[i] = 0;
    if (thread == 0) m.count = 0;
    __syncthreads();
  };
  clear(kMaxListed);
  for (int first = 0; first < scope.size; first += kSampleThreads) {
    const int place = first + thread;
    const float x = place < scope.size ? scope(place) : 0.0f;
    add_to(amounts, place < scope.size ? bucket_of(x) : -1, place < scope.size ? amount(x) : Count{0});
  }
  __syncthreads();
  Wide before;
  const int bucket = locate<kMaxListed / kSampleThreads>(m, amounts, target, before);
  Wide prefix = 0;
  int shift = 64;  // members of the bucket agree with the border in the bits from here on
  const auto is_member = [&](int place, float x) {
    return bucket_of(x) == bucket && (shift == 64 || rank_of(x, place) >> shift == prefix);
  };
  for (;;) {
    clear(kSampleThreads);
    for (int first = 0; first < scope.size; first += kSampleThreads) {
      const int place = first + thread;
      const float x = place < scope.size ? scope(place) : 0.0f;
      const bool is_in = place < scope.size && is_member(place, x);
      const unsigned lanes = __ballot_sync(kFullMask, is_in);
      unsigned begin = 0;
      if (thread % 32 == 0 && lanes != 0) begin = atomicAdd(&m.count, static_cast<unsigned>(__popc(lanes)));
      begin = __shfl_sync(kFullMask, begin, 0);
      const unsigned slot = begin + static_cast<unsigned>(__popc(lanes & ((1u << thread % 32) - 1u)));
      if (is_in && slot < kMaxListed) m.ranks[slot] = rank_of(x, place);
    }
    __syncthreads();
    if (m.count <= kMaxListed) break;
    const int next = shift - (shift == 32 ? 16 : 8);  // a place has fewer than 24 bits
    clear(kSampleThreads);
    for (int first = 0; first < scope.size; first += kSampleThreads) {
      const int place = first + thread;
      const float x = place < scope.size ? scope(place) : 0.0f;
      const bool is_in = place < scope.size && is_member(place, x);
      const int digit = static_cast<int>(rank_of(x, place) >> next & 255u);
      add_to(amounts, is_in ? digit : -1, is_in ? amount(x) : Count{0});
    }
    __syncthreads();
    Wide skipped;
    const int digit = locate<1>(m, amounts, target - before, skipped);
    before += skipped;
    prefix = prefix << (shift - next) | static_cast<Wide>(digit);
    shift = next;
  }
  const int count = static_cast<int>(m.count);
  for (int i = thread; i < count; i += kSampleThreads) amounts[i] = amount(logit_of_rank(m.ranks[i]));
  __syncthreads();
  for (int i = thread; i < count; i += kSampleThreads) {
    const Wide rank = m.ranks[i];
    Wide sum = before;
    for (int j = 0; j < count; ++j) sum += m.ranks[j] < rank ? amounts[j] : 0;
    if (sum < target && target <= sum + amounts[i]) m.found = rank;
  }
  __syncthreads();
  return m.found;
}

// Sums the weights of the columns up to the border.
template <typename T>
__device__ Wide sum_of_kept(BlockMemory& m, const BlockScope<T>& scope, const Weigher& weigh, Wide border) {
  Wide sum = 0;
  for (int place = thread_index(); place < scope.size; place += kSampleThreads) {
    const float x = scope(place);
    if (rank_of(x, place) <= border) sum += weigh(x);
  }
  return block_sum(m, sum);
}

// The first place, of those up to the border that weigh at least `least`, at which the weights sum up to more than
// number * their sum.
template <typename T>
__device__ int draw(BlockMemory& m, const BlockScope<T>& scope, const Weigher& weigh, Wide border, Wide least,
                    double number) {
  const int thread = thread_index(), lane = thread % 32;
  const auto weight_at = [&](int place) -> Wide {
    if (place >= scope.size) return 0;
    const float x = scope(place);
    const Wide weight = weigh(x);
    return rank_of(x, place) <= border && weight >= least ? weight : 0;
  };
  // A piece of neighbouring places for each thread, summed up by a warp.
  const int length = (scope.size + 32 * kSampleThreads - 1) / (32 * kSampleThreads) * 32;
  for (int piece = thread / 32; piece < kSampleThreads; piece += kSampleWarps) {
    Wide sum = 0;
    for (int i = lane; i < length; i += 32) sum += weight_at(piece * length + i);
    sum = warp_sum(sum);
    if (lane == 0) m.amounts[piece] = sum;
  }
  __syncthreads();
  Wide total;
  const Wide mine = m.amounts[thread], before = block_prefix(m, mine, total);
  const auto target = static_cast<Wide>(target_of(number, static_cast<int64_t>(total)));
  if (before <= target && target < before + mine) {
    m.found = static_cast<Wide>(thread);
    m.before = before;
  }
  __syncthreads();
  if (thread < 32) {
    Wide sum = m.before;
    for (int place = static_cast<int>(m.found) * length + lane;; place += 32) {
      const Wide reached = sum + warp_prefix(weight_at(place));
      const unsigned lanes = __ballot_sync(kFullMask, reached > target);
      if (lanes != 0) {
        if (lane == __ffs(static_cast<int>(lanes)) - 1) m.place = place;
        break;
      }
      sum = __shfl_sync(kFullMask, reached, 31);
    }
  }
  __syncthreads();
  return m.place;
}

}  // namespace speechlm
