// Sampling arithmetic that the CPU and the CUDA kernels share: random numbers, the order of logits, the integer limits
// of top-p and min-p, the repetition penalty.
#pragma once

#include <cmath>

#include "common/host_device.h"
#include "multistream_sample/multistream_sample.h"

namespace speechlm {

constexpr int64_t kOneWeight = int64_t{1} << 40;  // weight of the most probable column
// Adding it to a weight in [0, 1] rounds that to a multiple of 2^-40, in the last bit of the sum.
constexpr double kWeightMagic = 6144.0;
constexpr int64_t kWeightMagicBits = 0x40b8000000000000;

// Philox 4x32-10 (Salmon et al. 2011) of (row, stream) with the seed as its key: a number in [0, 1) with 53 bits.
SX_HOST_DEVICE inline double uniform(int64_t seed, int64_t row, int64_t stream) {
  const auto wide_seed = static_cast<uint64_t>(seed), wide_row = static_cast<uint64_t>(row);
  auto key0 = static_cast<uint32_t>(wide_seed), key1 = static_cast<uint32_t>(wide_seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(wide_row), c1 = static_cast<uint32_t>(wide_row >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream), c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0, product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const uint64_t bits = uint64_t{c0} << 21 ^ uint64_t { c1 } >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

// Larger for larger logits, equal for equal ones; not for NaN.
SX_HOST_DEVICE inline uint32_t key_of(float x) {
  const auto bits = bits_as<uint32_t>(x + 0.0f);  // -0 becomes 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

SX_HOST_DEVICE inline float value_of(uint32_t key) {
  return bits_as<float>(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

SX_HOST_DEVICE inline bool is_greedy(const SampleSettings& settings, const SampleChoice& choice) {
  return !(settings.temperature > 0) || choice.top_k == 1;
}

// How many of `size` columns top-k keeps.
SX_HOST_DEVICE inline int64_t kept_by(int32_t top_k, int64_t size) { return top_k > 0 && top_k < size ? top_k : size; }

// top-p keeps the fewest columns, best first, whose weights reach this; 0: all. Never less than the first column.
SX_HOST_DEVICE inline int64_t top_p_limit(float top_p, int64_t total) {
  if (!(top_p < 1)) return 0;
  const double limit = std::ceil(static_cast<double>(top_p) * static_cast<double>(total));
  return limit >= 1 ? static_cast<int64_t>(limit) : 1;
}

// min-p drops columns that weigh less than this.
SX_HOST_DEVICE inline int64_t min_weight(float min_p) {
  if (!(min_p > 0)) return 0;
  return min_p < 1 ? static_cast<int64_t>(std::ceil(static_cast<double>(min_p) * static_cast<double>(kOneWeight)))
                   : kOneWeight;
}

// The column drawn is the first whose weight and those before it sum up to more than this.
SX_HOST_DEVICE inline int64_t target_of(double number, int64_t total) {
  const auto target = static_cast<int64_t>(std::floor(number * static_cast<double>(total)));
  return target < total ? target : total - 1;
}

// Log-probability of the token with logit x. `total` is the sum of all columns' weights at temperature 1.
SX_HOST_DEVICE inline float logprob_of(float x, float largest, int64_t total) {
  const double sum = static_cast<double>(total) * 0x1p-40;
  return static_cast<float>(static_cast<double>(x) - static_cast<double>(largest) - std::log(sum));
}

SX_HOST_DEVICE inline bool has_penalty(const SampleSettings& settings, const SampleChoice& choice) {
  const float penalty = settings.repetition_penalty;
  return penalty > 0 && penalty <= 3.402823466e38f && penalty != 1 && choice.repetition_window > 0;
}

// A finite logit stays finite; -inf, a column that is not allowed, stays -inf.
SX_HOST_DEVICE inline float penalized(float x, float penalty) {
  constexpr float kLargest = 3.402823466e38f;
  if (!(x >= -kLargest)) return x;
  const float changed = x > 0 ? x / penalty : x * penalty;
  return changed > kLargest ? kLargest : (changed < -kLargest ? -kLargest : changed);
}

// The column of stream s with this id, or -1.
SX_HOST_DEVICE inline int64_t column_of(const SampleState& a, int64_t s, int64_t id) {
  int64_t lo = a.bounds[s], hi = a.bounds[s + 1];
  while (lo < hi) {
    const int64_t middle = lo + (hi - lo) / 2;
    if (a.column_ids[middle] < id) {
      lo = middle + 1;
    } else {
      hi = middle;
    }
  }
  return lo < a.bounds[s + 1] && a.column_ids[lo] == id ? lo : -1;
}

}  // namespace speechlm
