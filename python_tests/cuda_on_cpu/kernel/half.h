// __half and __nv_bfloat16: stored in 16 bits, computed in float, rounded to nearest even, as the GPU does.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_on_cpu/kernel/memory.h"

namespace cuda_on_cpu {

inline uint16_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

inline float bfloat16_value(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const float size = std::fabs(value);
  if (value != value) return 0x7FFF;
  if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7C00u);
  int exponent;
  std::frexp(size, &exponent);
  // Ten bits behind the leading one; below 2^-14 the step stays 2^-24.
  const int step = exponent - 11 < -24 ? -24 : exponent - 11;
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -step)));  // to nearest even
  if (step == -24) return static_cast<uint16_t>(sign | steps);
  return static_cast<uint16_t>(sign | ((static_cast<uint32_t>(step + 24) << 10) + steps));
}

inline float float16_value(uint16_t half) {
  const int exponent = half >> 10 & 31;
  const int fraction = half & 1023;
  float size;
  if (exponent == 31) {
    size = fraction ? NAN : INFINITY;
  } else {
    size = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                         : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  }
  return half & 0x8000 ? -size : size;
}

}  // namespace cuda_on_cpu

#define SX_SMALL_FLOAT(name, bits_of, value_of)                                \
  struct name {                                                                \
    uint16_t bits;                                                             \
    name() = default;                                                          \
    name(float value) : bits(cuda_on_cpu::bits_of(value)) {}                   \
    operator float() const { return cuda_on_cpu::value_of(bits); }             \
    name& operator+=(name o) { return *this = name(float(*this) + float(o)); } \
    name& operator-=(name o) { return *this = name(float(*this) - float(o)); } \
    name& operator*=(name o) { return *this = name(float(*this) * float(o)); } \
  };                                                                           \
  inline name operator+(name a, name b) { return name(float(a) + float(b)); }  \
  inline name operator-(name a, name b) { return name(float(a) - float(b)); }  \
  inline name operator*(name a, name b) { return name(float(a) * float(b)); }  \
  inline name operator/(name a, name b) { return name(float(a) / float(b)); }  \
  inline name operator-(name a) { return name(-float(a)); }
SX_SMALL_FLOAT(__half, float16_bits, float16_value)
SX_SMALL_FLOAT(__nv_bfloat16, bfloat16_bits, bfloat16_value)
#undef SX_SMALL_FLOAT

struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __half __float2half_rn(float v) { return __half(v); }
inline __half __float2half(float v) { return __half(v); }
inline float __half2float(__half v) { return float(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
inline float __bfloat162float(__nv_bfloat16 v) { return float(v); }
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__nv_bfloat16(a), __nv_bfloat16(b)}; }
inline float2 __half22float2(__half2 v) { return make_float2(float(v.x), float(v.y)); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return make_float2(float(v.x), float(v.y)); }
