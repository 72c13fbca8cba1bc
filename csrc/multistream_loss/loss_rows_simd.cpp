// The inner loops over the columns of one row, compiled once per instruction set; see common/cpu/simd.h.
#include "multistream_loss/rows/loss_rows.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace speechlm {
namespace SX_SIMD {
namespace {

constexpr int64_t kLanes = 64;

// e^x for x <= 0, within 2 units in the last place; 0 below -87, where float has no normal numbers left; NaN for NaN.
// x = k ln 2 + r, |r| <= ln 2 / 2, e^r by the polynomial of Cephes' expf (Moshier 1989).
inline float exponential(float x) {
  const float kept = x < -87.0f ? -87.0f : x;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(t) in the low bits
  const float shifted = kept * 1.44269504088896341f + kMagic;
  const float k = shifted - kMagic;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const uint32_t exponent = (bits + 127u) << 23;
  float power;
  std::memcpy(&power, &exponent, sizeof power);
  const float r = (kept - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = (p * (r * r) + r + 1.0f) * power;
  return x < -87.0f ? 0.0f : y;
}

inline double exponential(double x) { return std::exp(x); }

// The lanes' sum in a fixed order.
template <typename T>
T join(const T* lanes) {
  T part[8] = {};
  for (int64_t i = 0; i < kLanes; i += 8) {
    for (int64_t j = 0; j < 8; ++j) part[j] += lanes[i + j];
  }
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

template <typename T, bool kBias>
T max_of(const T* __restrict z, const T* __restrict bias, int64_t n) {
  T lanes[kLanes];
  for (T& lane : lanes) lane = -std::numeric_limits<T>::infinity();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const T v = kBias ? z[i + j] + bias[i + j] : z[i + j];
      lanes[j] = v > lanes[j] ? v : lanes[j];
    }
  }
  for (; i < n; ++i) {
    const T v = kBias ? z[i] + bias[i] : z[i];
    lanes[0] = v > lanes[0] ? v : lanes[0];
  }
  T largest = lanes[0];
  for (T lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

template <typename T, bool kBias>
T sum_of(const T* __restrict z, const T* __restrict bias, int64_t n) {
  T lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += kBias ? z[i + j] + bias[i + j] : z[i + j];
  }
  for (int64_t j = 0; i + j < n; ++j) lanes[j] += kBias ? z[i + j] + bias[i + j] : z[i + j];
  return join(lanes);
}

template <typename T, bool kBias>
T exp_sum_of(T* out, const T* z, const T* __restrict bias, int64_t n, T largest) {
  T lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma GCC ivdep  // `out` is `z` or does not overlap it
    for (int64_t j = 0; j < kLanes; ++j) {
      const T e = exponential((kBias ? z[i + j] + bias[i + j] : z[i + j]) - largest);
      out[i + j] = e;
      lanes[j] += e;
    }
  }
  for (int64_t j = 0; i + j < n; ++j) {
    const T e = exponential((kBias ? z[i + j] + bias[i + j] : z[i + j]) - largest);
    out[i + j] = e;
    lanes[j] += e;
  }
  return join(lanes);
}

template <typename T, bool kBias>
T exp_dot_of(const T* __restrict z, const T* __restrict bias, int64_t n, T largest) {
  T lanes[kLanes] = {};
  const auto term = [&](int64_t i) {
    const T x = (kBias ? z[i] + bias[i] : z[i]) - largest;
    const T kept = x < T{-87} ? T{-87} : x;  // 0 * -infinity is 0 here
    return exponential(kept) * kept;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += term(i + j);
  }
  for (int64_t j = 0; i + j < n; ++j) lanes[j] += term(i + j);
  return join(lanes);
}

template <typename T>
T dot_max(const T* __restrict e, const T* __restrict f, int64_t n, T* largest) {
  T lanes[kLanes] = {}, tops[kLanes];
  for (T& top : tops) top = *largest;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const T v = e[i + j] * f[i + j];
      lanes[j] += v;
      tops[j] = v > tops[j] ? v : tops[j];
    }
  }
  for (int64_t j = 0; i + j < n; ++j) {
    const T v = e[i + j] * f[i + j];
    lanes[j] += v;
    tops[j] = v > tops[j] ? v : tops[j];
  }
  for (T top : tops) *largest = top > *largest ? top : *largest;
  return join(lanes);
}

template <typename T>
T max(const T* z, const T* bias, int64_t n) {
  return bias ? max_of<T, true>(z, bias, n) : max_of<T, false>(z, bias, n);
}

template <typename T>
T sum(const T* z, const T* bias, int64_t n) {
  return bias ? sum_of<T, true>(z, bias, n) : sum_of<T, false>(z, bias, n);
}

template <typename T>
T exp_sum(T* out, const T* z, const T* bias, int64_t n, T largest) {
  return bias ? exp_sum_of<T, true>(out, z, bias, n, largest) : exp_sum_of<T, false>(out, z, bias, n, largest);
}

template <typename T>
T exp_dot(const T* z, const T* bias, int64_t n, T largest) {
  return bias ? exp_dot_of<T, true>(z, bias, n, largest) : exp_dot_of<T, false>(z, bias, n, largest);
}

template <typename T>
void accumulate_product(T* __restrict out, T* __restrict sums, const T* __restrict e, const T* __restrict f, int64_t n,
                        T scale) {
  if (sums == nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] += scale * e[i] * f[i];
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const T v = scale * e[i] * f[i];
    out[i] += v;
    sums[i] += v;
  }
}

template <typename T>
void accumulate(T* __restrict out, T* __restrict sums, const T* __restrict e, int64_t n, T scale, T minus) {
  if (sums == nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] += scale * e[i] - minus;
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const T v = scale * e[i] - minus;
    out[i] += v;
    sums[i] += v;
  }
}

template <typename T>
void finish(T* __restrict e, T* __restrict sums, int64_t n, T scale, T minus) {
  if (sums == nullptr) {
    for (int64_t i = 0; i < n; ++i) e[i] = scale * e[i] - minus;
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    e[i] = scale * e[i] - minus;
    sums[i] += e[i];
  }
}

}  // namespace

template <typename T>
const LossLoops<T>& loss_loops() {
  static const LossLoops<T> table{
      &max<T>, &sum<T>, &exp_sum<T>, &exp_dot<T>, &dot_max<T>, &accumulate_product<T>, &accumulate<T>, &finish<T>};
  return table;
}

template const LossLoops<float>& loss_loops<float>();
template const LossLoops<double>& loss_loops<double>();

}  // namespace SX_SIMD
}  // namespace speechlm
