// The logits of a stream's scope for a block of threads, by place: the allowed columns, in order. The first places are
// cached in shared memory.
#pragma once

#include <cmath>

#include "multistream_sample/device/block.cuh"
#include "multistream_sample/sampling_math.h"

namespace speechlm {

// e^x for x <= 0, within 2 units in the last place; 0 below -87 and for NaN. Equal to the CPU's to the bit:
// products and sums round one by one.
__device__ inline float exponential_of(float x) {
  const float kept = x > -87.0f ? x : -87.0f;
  const float shifted = __fadd_rn(__fmul_rn(kept, 1.44269504088896341f), 12582912.0f);
  const float k = __fsub_rn(shifted, 12582912.0f);
  const float power = __uint_as_float((__float_as_uint(shifted) + 127u) << 23);
  const float r = __fadd_rn(__fsub_rn(kept, __fmul_rn(k, 0.693359375f)), __fmul_rn(k, 2.12194440e-4f));
  float p = __fadd_rn(__fmul_rn(r, 1.9875691500e-4f), 1.3981999507e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 8.3334519073e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 4.1665795894e-2f);
  p = __fadd_rn(__fmul_rn(p, r), 1.6666665459e-1f);
  p = __fadd_rn(__fmul_rn(p, r), 5.0000001201e-1f);
  const float y = __fmul_rn(__fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.0f), power);
  return x >= -87.0f ? y : 0.0f;
}

struct Weigher {
  float largest, temperature;

  __device__ Wide operator()(float x) const {
    float scaled = __fsub_rn(x, largest);
    if (temperature != 1.0f) scaled = __fdiv_rn(scaled, temperature);
    const double rounded = __dadd_rn(static_cast<double>(exponential_of(scaled)), kWeightMagic);
    return bits_as<Wide>(rounded) - static_cast<Wide>(kWeightMagicBits);
  }
};

template <typename T>
class BlockScope {
 public:
  int size = 0;

  // `cached` logits have room in `cache`. False if the request's row of logits is none.
  __device__ bool open(const SampleArgs<T>& args, const StreamRow& row, int64_t b, int64_t s, float* cache,
                       int cached) {
    const SampleState& a = args.state;
    const SampleRequest& request = a.request[b];
    first_ = row.first;
    size = static_cast<int>(row.last - row.first);
    end_ = s == 0 ? a.eos_column : -1;
    cache_ = cache;
    if (s == 0) {
      const bool is_inside = end_ >= row.first && end_ < row.last;
      if (is_inside && !row.may_end) forbidden_ = static_cast<int>(end_ - row.first);
      if (!is_inside && row.may_end) {
        shift_ = end_ < row.first ? 1 : 0;
        end_place_ = shift_ ? 0 : size;
        ++size;
      }
    }
    cached_ = size < cached ? size : cached;
    if (request.source < 0 || request.source >= args.num_rows || request.guide >= args.num_rows) return false;
    conditional_ = args.logits + request.source * args.row_stride;
    guide_ = request.guide < 0 ? nullptr : args.logits + request.guide * args.row_stride;
    guidance_ = a.guidance[b];
    allowed_ = a.allowed == nullptr ? nullptr : a.allowed + b * a.allowed_stride;
    return true;
  }

  __device__ int64_t column_at(int place) const { return place == end_place_ ? end_ : first_ + place - shift_; }
  // Of an allowed column.
  __device__ int place_of(int64_t column) const {
    return end_place_ >= 0 && column == end_ ? end_place_ : static_cast<int>(column - first_) + shift_;
  }

  // From memory; the first places are kept in the cache.
  __device__ float load(int place) {
    const float x = read(place);
    if (place < cached_) cache_[place] = x;
    return x;
  }

  __device__ float raw(int place) const { return place < cached_ ? cache_[place] : read(place); }

  // After the penalty.
  __device__ float operator()(int place) const {
    const float x = raw(place);
    return repeated_ != nullptr && (repeated_[place / 32] >> place % 32 & 1u) != 0 ? penalized(x, penalty_) : x;
  }

  // Bits of the places to penalize.
  __device__ void penalize(const unsigned* repeated, float penalty) {
    repeated_ = repeated;
    penalty_ = penalty;
  }

 private:
  __device__ float read(int place) const {
    if (place == forbidden_) return -INFINITY;
    const int64_t column = column_at(place);
    if (allowed_ != nullptr && allowed_[column] == 0) return -INFINITY;
    const float given = widen(conditional_[column]);
    if (guide_ == nullptr || given == -INFINITY) return given;
    const float free = widen(guide_[column]);
    return __fadd_rn(free, __fmul_rn(guidance_, __fsub_rn(given, free)));
  }

  const T* conditional_ = nullptr;
  const T* guide_ = nullptr;
  const uint8_t* allowed_ = nullptr;
  const unsigned* repeated_ = nullptr;
  float* cache_ = nullptr;
  int64_t first_ = 0, end_ = -1;
  float guidance_ = 0, penalty_ = 1;
  int cached_ = 0, shift_ = 0, end_place_ = -1, forbidden_ = -1;
};

}  // namespace speechlm
