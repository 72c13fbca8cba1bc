// Sixteen values that are computed side by side, for the *_simd.cpp files of this folder alone: one or two registers
// where the instruction set has them, an array elsewhere. Every operation rounds alike in every set, so all sets give
// equal bits; sums over lanes add the upper half to the lower, down to one value.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/tensor/small_float.h"

namespace speechlm {
namespace SX_SIMD {
namespace {

constexpr int64_t kLanes = 16;

template <typename S>
struct Lanes {
  S v[kLanes];
};

template <typename S, typename Make>
inline Lanes<S> each(const Make& make) {
  Lanes<S> out;
  for (int64_t j = 0; j < kLanes; ++j) out.v[j] = make(j);
  return out;
}

template <typename T>
inline Lanes<Accumulator<T>> load_each(const T* from) {
  return each<Accumulator<T>>([&](int64_t j) { return widen(from[j]); });
}

inline Lanes<double> load(const double* from) { return load_each(from); }
inline void store(double* to, const Lanes<double>& a) { std::memcpy(to, a.v, sizeof a.v); }
inline Lanes<double> fill(double s) {
  return each<double>([&](int64_t) { return s; });
}

#define SX_ARRAY_LANES(S)                                                                 \
  inline Lanes<S> operator+(const Lanes<S>& a, const Lanes<S>& b) {                       \
    return each<S>([&](int64_t j) { return a.v[j] + b.v[j]; });                           \
  }                                                                                       \
  inline Lanes<S> operator-(const Lanes<S>& a, const Lanes<S>& b) {                       \
    return each<S>([&](int64_t j) { return a.v[j] - b.v[j]; });                           \
  }                                                                                       \
  inline Lanes<S> operator*(const Lanes<S>& a, const Lanes<S>& b) {                       \
    return each<S>([&](int64_t j) { return a.v[j] * b.v[j]; });                           \
  }                                                                                       \
  inline Lanes<S> operator/(const Lanes<S>& a, const Lanes<S>& b) {                       \
    return each<S>([&](int64_t j) { return a.v[j] / b.v[j]; });                           \
  }                                                                                       \
  inline Lanes<S> multiply_add(const Lanes<S>& a, const Lanes<S>& b, const Lanes<S>& c) { \
    return each<S>([&](int64_t j) { return std::fma(a.v[j], b.v[j], c.v[j]); });          \
  }                                                                                       \
  /* b where either is no number. */                                                      \
  inline Lanes<S> larger(const Lanes<S>& a, const Lanes<S>& b) {                          \
    return each<S>([&](int64_t j) { return a.v[j] > b.v[j] ? a.v[j] : b.v[j]; });         \
  }                                                                                       \
  inline Lanes<S> smaller(const Lanes<S>& a, const Lanes<S>& b) {                         \
    return each<S>([&](int64_t j) { return a.v[j] < b.v[j] ? a.v[j] : b.v[j]; });         \
  }                                                                                       \
  template <typename Combine>                                                             \
  inline S fold(Lanes<S> a, const Combine& combine) {                                     \
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {                                \
      for (int64_t j = 0; j < half; ++j) a.v[j] = combine(a.v[j], a.v[j + half]);         \
    }                                                                                     \
    return a.v[0];                                                                        \
  }                                                                                       \
  inline S sum(const Lanes<S>& a) {                                                       \
    return fold(a, [](S x, S y) { return x + y; });                                       \
  }                                                                                       \
  /* The sum of each. */                                                                  \
  inline Lanes<S> sums(const Lanes<S>* a) {                                               \
    return each<S>([&](int64_t j) { return sum(a[j]); });                                 \
  }
SX_ARRAY_LANES(double)

inline Lanes<double> exponential(const Lanes<double>& x) {
  return each<double>([&](int64_t j) { return std::exp(x.v[j]); });
}

#if defined(__AVX512BW__)
template <>
struct Lanes<float> {
  __m512 v;
};
using Floats = Lanes<float>;

inline Floats load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline Floats load(const BFloat16* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Floats load(const Float16* from) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}
inline void store(float* to, const Floats& a) { _mm512_storeu_ps(to, a.v); }
inline Floats fill(float s) { return {_mm512_set1_ps(s)}; }
inline Floats operator+(const Floats& a, const Floats& b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(const Floats& a, const Floats& b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(const Floats& a, const Floats& b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(const Floats& a, const Floats& b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline Floats larger(const Floats& a, const Floats& b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats smaller(const Floats& a, const Floats& b) { return {_mm512_min_ps(a.v, b.v)}; }

template <typename Combine>
inline float fold(Floats a, const Combine& combine) {
  a = combine(a, Floats{_mm512_shuffle_f32x4(a.v, a.v, 0x4e)});
  a = combine(a, Floats{_mm512_shuffle_f32x4(a.v, a.v, 0xb1)});
  a = combine(a, Floats{_mm512_shuffle_ps(a.v, a.v, 0x4e)});
  a = combine(a, Floats{_mm512_shuffle_ps(a.v, a.v, 0xb1)});
  return _mm512_cvtss_f32(a.v);
}

inline float sum(const Floats& a) {
  return fold(a, [](const Floats& x, const Floats& y) { return x + y; });
}

inline Floats sums(const Floats* a) {
  // Each step halves the lanes of a value and puts two values beside each other.
  __m512 half[8], quarter[4], pair[2];
  for (int i = 0; i < 8; ++i) {
    const int at = (i & 1) * 8 + (i >> 1);  // with the order of the other steps: value j ends in lane j
    half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[at].v, a[at + 4].v, 0x44),
                            _mm512_shuffle_f32x4(a[at].v, a[at + 4].v, 0xee));
  }
  for (int i = 0; i < 4; ++i) {
    quarter[i] = _mm512_add_ps(_mm512_shuffle_f32x4(half[2 * i], half[2 * i + 1], 0x88),
                               _mm512_shuffle_f32x4(half[2 * i], half[2 * i + 1], 0xdd));
  }
  for (int i = 0; i < 2; ++i) {
    pair[i] = _mm512_add_ps(_mm512_shuffle_ps(quarter[2 * i], quarter[2 * i + 1], 0x44),
                            _mm512_shuffle_ps(quarter[2 * i], quarter[2 * i + 1], 0xee));
  }
  return {_mm512_add_ps(_mm512_shuffle_ps(pair[0], pair[1], 0x88), _mm512_shuffle_ps(pair[0], pair[1], 0xdd))};
}

// y 2^k, where k is in the low bits of `shifted`, in two steps, so that 2^k may be too large or small for a float.
inline Floats scale_by_power(const Floats& y, const Floats& shifted) {
  const __m512i k = _mm512_sub_epi32(_mm512_castps_si512(shifted.v), _mm512_set1_epi32(0x4b400000));
  const __m512i first = _mm512_srai_epi32(k, 1), one = _mm512_set1_epi32(127);
  const __m512i second = _mm512_sub_epi32(k, first);
  const __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(first, one), 23));
  const __m512 b = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(second, one), 23));
  return {_mm512_mul_ps(_mm512_mul_ps(y.v, a), b)};
}

#elif defined(__AVX2__)
template <>
struct Lanes<float> {
  __m256 low, high;
};
using Floats = Lanes<float>;

inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline __m256 load_half(const BFloat16* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline __m256 load_half(const Float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Floats load(const BFloat16* from) { return {load_half(from), load_half(from + 8)}; }
inline Floats load(const Float16* from) { return {load_half(from), load_half(from + 8)}; }
inline void store(float* to, const Floats& a) {
  _mm256_storeu_ps(to, a.low);
  _mm256_storeu_ps(to + 8, a.high);
}
inline Floats fill(float s) { return {_mm256_set1_ps(s), _mm256_set1_ps(s)}; }
#define SX_EACH_HALF(name, function) \
  inline Floats name(const Floats& a, const Floats& b) { return {function(a.low, b.low), function(a.high, b.high)}; }
SX_EACH_HALF(operator+, _mm256_add_ps)
SX_EACH_HALF(operator-, _mm256_sub_ps)
SX_EACH_HALF(operator*, _mm256_mul_ps)
SX_EACH_HALF(operator/, _mm256_div_ps)
SX_EACH_HALF(larger, _mm256_max_ps)
SX_EACH_HALF(smaller, _mm256_min_ps)
#undef SX_EACH_HALF
inline Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

template <typename Combine>
inline float fold(const Floats& a, const Combine& combine) {
  const auto both = [&](__m256 x, __m256 y) { return combine(Floats{x, x}, Floats{y, y}).low; };
  __m256 v = both(a.low, a.high);
  v = both(v, _mm256_permute2f128_ps(v, v, 0x01));
  v = both(v, _mm256_shuffle_ps(v, v, 0x4e));
  v = both(v, _mm256_shuffle_ps(v, v, 0xb1));
  return _mm256_cvtss_f32(v);
}

inline float sum(const Floats& a) {
  return fold(a, [](const Floats& x, const Floats& y) { return x + y; });
}

// Of eight values.
inline __m256 sums_of_eight(const Floats* a) {
  __m256 quarter[4], pair[2];
  for (int i = 0; i < 4; ++i) {
    const __m256 x = _mm256_add_ps(a[i].low, a[i].high), y = _mm256_add_ps(a[i + 4].low, a[i + 4].high);
    quarter[i] = _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
  }
  for (int i = 0; i < 2; ++i) {
    pair[i] = _mm256_add_ps(_mm256_shuffle_ps(quarter[2 * i], quarter[2 * i + 1], 0x44),
                            _mm256_shuffle_ps(quarter[2 * i], quarter[2 * i + 1], 0xee));
  }
  return _mm256_add_ps(_mm256_shuffle_ps(pair[0], pair[1], 0x88), _mm256_shuffle_ps(pair[0], pair[1], 0xdd));
}
inline Floats sums(const Floats* a) { return {sums_of_eight(a), sums_of_eight(a + 8)}; }

inline __m256 scale_half(__m256 y, __m256 shifted) {
  const __m256i k = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(0x4b400000));
  const __m256i first = _mm256_srai_epi32(k, 1), one = _mm256_set1_epi32(127);
  const __m256i second = _mm256_sub_epi32(k, first);
  const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(first, one), 23));
  const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(second, one), 23));
  return _mm256_mul_ps(_mm256_mul_ps(y, a), b);
}
inline Floats scale_by_power(const Floats& y, const Floats& shifted) {
  return {scale_half(y.low, shifted.low), scale_half(y.high, shifted.high)};
}

#else
using Floats = Lanes<float>;
SX_ARRAY_LANES(float)
inline Floats load(const float* from) { return load_each(from); }
inline Floats load(const BFloat16* from) { return load_each(from); }
inline Floats load(const Float16* from) { return load_each(from); }
inline void store(float* to, const Floats& a) { std::memcpy(to, a.v, sizeof a.v); }
inline Floats fill(float s) {
  return each<float>([&](int64_t) { return s; });
}
inline Floats scale_by_power(const Floats& y, const Floats& shifted) {
  return each<float>([&](int64_t j) {
    const uint32_t k = bits_as<uint32_t>(shifted.v[j]) - 0x4b400000u;
    const uint32_t first = (k >> 1) | (k & 0x80000000u), second = k - first;
    return y.v[j] * bits_as<float>((first + 127u) << 23) * bits_as<float>((second + 127u) << 23);
  });
}
#endif
#undef SX_ARRAY_LANES

// e^x within 2 units in the last place; x = k ln 2 + r, |r| <= ln 2 / 2, e^r by the polynomial of Cephes' expf (Moshier
// 1989). 0 and infinity beyond float's range; NaN for NaN.
inline Floats exponential(const Floats& x) {
  const Floats kept = smaller(fill(89.0f), larger(fill(-104.0f), x));
  const Floats magic = fill(12582912.0f);  // 1.5 * 2^23: adding it leaves k in the low bits
  const Floats shifted = multiply_add(kept, fill(1.44269504088896341f), magic);
  const Floats k = shifted - magic;
  const Floats r = multiply_add(k, fill(2.12194440e-4f), multiply_add(k, fill(-0.693359375f), kept));
  Floats p = multiply_add(fill(1.9875691500e-4f), r, fill(1.3981999507e-3f));
  p = multiply_add(p, r, fill(8.3334519073e-3f));
  p = multiply_add(p, r, fill(4.1665795894e-2f));
  p = multiply_add(p, r, fill(1.6666665459e-1f));
  p = multiply_add(p, r, fill(5.0000001201e-1f));
  return scale_by_power(multiply_add(p, r * r, r) + fill(1.0f), shifted);
}

// The first n of 16 values, zeros after them; nothing else is read.
template <typename T>
inline Lanes<Accumulator<T>> load_part(const T* from, int64_t n) {
  if (n >= kLanes) return load(from);
  Accumulator<T> values[kLanes] = {};
  for (int64_t j = 0; j < n; ++j) values[j] = widen(from[j]);
  return load(values);
}

// Rounded; the first n of them.
template <typename T>
inline void store_part(T* to, const Lanes<Accumulator<T>>& a, int64_t n) {
  Accumulator<T> values[kLanes];
  store(values, a);
  for (int64_t j = 0; j < (n < kLanes ? n : kLanes); ++j) narrow(values[j], to[j]);
}

// Rounded to T and wide again.
template <typename T>
inline Lanes<Accumulator<T>> rounded(const Lanes<Accumulator<T>>& a) {
  T values[kLanes];
  store_part(values, a, kLanes);
  return load(values);
}
template <>
inline Floats rounded<float>(const Floats& a) {
  return a;
}

}  // namespace
}  // namespace SX_SIMD
}  // namespace speechlm
