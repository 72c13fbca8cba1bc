// The inner loops over one row of D elements, by instruction set.
#pragma once

#include <cstdint>

#include "common/cpu/simd.h"
#include "common/tensor/small_float.h"

namespace speechlm {

template <typename T>
struct RowLoops {
  using Acc = Accumulator<T>;
  void (*set)(Acc* acc, const T* row, int64_t n, Acc scale);            // acc = scale * row
  void (*add)(Acc* acc, const T* row, int64_t n, Acc scale);            // acc += scale * row
  void (*store)(T* out, const Acc* acc, int64_t n);                     // out = acc, rounded
  void (*sum)(T* out, const T* const* rows, int64_t count, int64_t n);  // out = sum of whole rows, count >= 1
};

SX_DECLARE_SIMD(template <typename T> const RowLoops<T>& row_loops())

template <typename T>
const RowLoops<T>& row_loops() {  // of simd_in_use()
  return SX_SELECT_SIMD(row_loops<T>());
}

}  // namespace speechlm
