// The CPU's inner loops over the columns of one row, by instruction set. Sums run in 64 lanes whatever the set, so all
// sets give equal bits. `bias` may be null everywhere, the factors `f` nowhere.
#pragma once

#include <cstdint>

#include "common/cpu/simd.h"

namespace speechlm {

template <typename T>
struct LossLoops {
  // Largest z + bias; NaNs are passed over (exp_sum finds them).
  T (*max)(const T* z, const T* bias, int64_t n);
  // Sum of z + bias.
  T (*sum)(const T* z, const T* bias, int64_t n);
  // out = exp(z + bias - largest); their sum. `out` may be `z`.
  T (*exp_sum)(T* out, const T* z, const T* bias, int64_t n, T largest);
  // Sum of exp(x) * x, x = z + bias - largest.
  T (*exp_dot)(const T* z, const T* bias, int64_t n, T largest);
  // Sum of e * f, and their largest product or *largest, which passes over NaNs.
  T (*dot_max)(const T* e, const T* f, int64_t n, T* largest);
  // v = scale * e * f; out += v, and sums += v unless null.
  void (*accumulate_product)(T* out, T* sums, const T* e, const T* f, int64_t n, T scale);
  // v = scale * e - minus; out += v, and sums += v unless null.
  void (*accumulate)(T* out, T* sums, const T* e, int64_t n, T scale, T minus);
  // e = scale * e - minus, and sums += e unless null.
  void (*finish)(T* e, T* sums, int64_t n, T scale, T minus);
};

SX_DECLARE_SIMD(template <typename T> const LossLoops<T>& loss_loops())

template <typename T>
const LossLoops<T>& loss_loops() {  // of simd_in_use()
  return SX_SELECT_SIMD(loss_loops<T>());
}

}  // namespace speechlm
