// bfloat16 and float16 on the CPU: storage of 16 bits, arithmetic in float, rounding to nearest even. Written without
// branches on memory and without denormal floats, so that compilers vectorize it and flush-to-zero modes change
// nothing. CUDA kernels use it as well.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SX_SMALL_FLOAT_FN __host__ __device__ __forceinline__
#else
// Always inline: see cmake/simd.cmake.
#define SX_SMALL_FLOAT_FN inline __attribute__((always_inline))
#endif

namespace speechlm {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
SX_SMALL_FLOAT_FN To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Types of a tensor of floats, for explicit instantiations: SX_FOR_FLOATS(SX_INSTANTIATE).
#define SX_FOR_FLOATS(X) \
  X(float)               \
  X(double)              \
  X(BFloat16)            \
  X(Float16)

// The type of sums.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

SX_SMALL_FLOAT_FN float widen(float v) { return v; }
SX_SMALL_FLOAT_FN double widen(double v) { return v; }
SX_SMALL_FLOAT_FN float widen(BFloat16 v) { return bits_as<float>(static_cast<uint32_t>(v.bits) << 16); }
SX_SMALL_FLOAT_FN float widen(Float16 v) {
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  // A subnormal half gets an exponent that a float can have, and the leading one that it brings is subtracted again.
  const uint32_t normal = magnitude + (exponent == 0x0f800000u ? 0x70000000u : 0x38000000u);
  const float subnormal = bits_as<float>(magnitude + 0x38800000u) - bits_as<float>(uint32_t{0x38800000u});
  const uint32_t bits = exponent == 0 ? bits_as<uint32_t>(subnormal) : normal;
  return bits_as<float>(bits | static_cast<uint32_t>(v.bits & 0x8000u) << 16);
}

SX_SMALL_FLOAT_FN void narrow(float v, float& out) { out = v; }
SX_SMALL_FLOAT_FN void narrow(double v, double& out) { out = v; }
SX_SMALL_FLOAT_FN void narrow(float v, BFloat16& out) {
  const uint32_t bits = bits_as<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
SX_SMALL_FLOAT_FN void narrow(float v, Float16& out) {
  const uint32_t all = bits_as<uint32_t>(v);
  const uint32_t sign = all & 0x80000000u;
  const uint32_t bits = all ^ sign;
  const uint32_t normal = (bits + 0xc8000fffu + (bits >> 13 & 1u)) >> 13;
  // Adding 0.5 puts the last bit of a subnormal half at the last bit of the float, which rounds it.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(bits) + 0.5f) - 0x3f000000u;
  uint32_t half = bits < 0x38800000u ? subnormal : normal;
  if (bits >= 0x47800000u) half = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out.bits = static_cast<uint16_t>(half | sign >> 16);
}

}  // namespace speechlm
