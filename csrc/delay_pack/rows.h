// The inner loop of delay_pack on the CPU, by instruction set: rows in which every stream with content shows a frame.
#pragma once

#include <cstdint>

#include "common/cpu/simd.h"

namespace speechlm {

constexpr int64_t kPackLanes = 4;
constexpr int64_t kMaxPeriod = 256;  // lcm(S, kPackLanes) for S up to 64

// Sources of the ids of a few rows: S * rows == elements == a whole number of vectors. Element e is in stream e % S of
// row e / S.
struct PackPeriod {
  int64_t elements = 0;
  int64_t rows = 0;
  bool narrow = false;         // some streams are without content
  bool limited = false;        // raw ids have limits
  int64_t index[kMaxPeriod];   // of the element's id, counted from the undelayed frame of the first row
  int64_t mask[kMaxPeriod];    // -1; 0 in a stream without content, whose offset is its pad
  int64_t offset[kMaxPeriod];  // added to the id
  int64_t limit[kMaxPeriod];   // raw ids must be below it, as unsigned numbers; 1 in a stream without content
  float factor[kMaxPeriod];    // of the weight
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

// With `check`: true if an id is outside its limit or does not fit Out.
template <typename In, typename Out>
using PackRowsLoop = bool (*)(const PackRows<In, Out>& rows, const PackPeriod& period, bool check);

SX_DECLARE_SIMD(template <typename In, typename Out> PackRowsLoop<In, Out> pack_rows_loop())

template <typename In, typename Out>
PackRowsLoop<In, Out> pack_rows_loop() {  // of simd_in_use()
  return SX_SELECT_SIMD(pack_rows_loop<In, Out>());
}

}  // namespace speechlm
