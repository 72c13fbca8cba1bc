// The inner loop of delay_pack on the CPU: rows in which every stream with content shows a frame of it.
#pragma once

#include <cstdint>

#include "common/cpu/simd.h"

namespace speechlm {

constexpr int64_t kPackLanes = 4;
constexpr int64_t kMostPeriod = 256;  // lcm(S, kPackLanes) for S up to 64

// Where the ids of a few rows come from, S * rows == elements == a whole number of vectors. Element e is in stream
// e % S of row e / S.
struct PackPeriod {
  int64_t elements = 0;
  int64_t rows = 0;
  bool narrow = false;         // some streams are without content
  bool limited = false;        // raw ids have limits
  int64_t index[kMostPeriod];  // of its id, from the segment's frame that stands at the first row undelayed
  int64_t mask[kMostPeriod];   // -1; 0 in a stream without content, whose offset is its pad
  int64_t offset[kMostPeriod];
  int64_t limit[kMostPeriod];  // raw ids must be below, as unsigned numbers; of a stream without content: 1
  float factor[kMostPeriod];   // of the weight
};

// The next `periods` periods; labels and weights are written one row up.
template <typename In, typename Out>
struct PackRows {
  const In* ids;
  const float* weight;  // null: 1
  int64_t width;        // ids of one frame
  Out* out_ids;
  Out* out_labels;
  float* out_weight;
  int64_t periods;
};

// True where an id is outside its limit or does not fit Out. Only looks if `check`.
template <typename In, typename Out>
using PackRowsLoop = bool (*)(const PackRows<In, Out>& rows, const PackPeriod& period, bool check);

template <typename In, typename Out>
PackRowsLoop<In, Out> pack_rows_loop();  // of simd_in_use()

}  // namespace speechlm
