// bfloat16 and float16: storage of 16 bits, arithmetic in float, rounding to nearest even; every NaN becomes 0x7fff,
// the one that a GPU's own conversions give. For the CPU it is written without branches on memory and without denormal
// floats, so that compilers vectorize it and flush-to-zero modes change nothing; a GPU has an instruction for each.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SX_SMALL_FLOAT_FN __host__ __device__ __forceinline__
#else
// Always inline: see cmake/simd.cmake.
#define SX_SMALL_FLOAT_FN inline __attribute__((always_inline))
#endif

// The GPU that the code is compiled for converts by itself.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define SX_NATIVE_CONVERSIONS
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
#ifdef SX_NATIVE_CONVERSIONS
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v.bits));
  return out;
#else
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  // A subnormal half gets an exponent that a float can have, and the leading one that it brings is subtracted again.
  const uint32_t normal = magnitude + (exponent == 0x0f800000u ? 0x70000000u : 0x38000000u);
  const float subnormal = bits_as<float>(magnitude + 0x38800000u) - bits_as<float>(uint32_t{0x38800000u});
  const uint32_t bits = exponent == 0 ? bits_as<uint32_t>(subnormal) : normal;
  return bits_as<float>(bits | static_cast<uint32_t>(v.bits & 0x8000u) << 16);
#endif
}

constexpr uint16_t kNaN16 = 0x7fff;

SX_SMALL_FLOAT_FN void narrow(float v, float& out) { out = v; }
SX_SMALL_FLOAT_FN void narrow(double v, double& out) { out = v; }
SX_SMALL_FLOAT_FN void narrow(float v, BFloat16& out) {
#ifdef SX_NATIVE_CONVERSIONS
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
#else
  const uint32_t bits = bits_as<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? kNaN16 : rounded);
#endif
}
SX_SMALL_FLOAT_FN void narrow(float v, Float16& out) {
#ifdef SX_NATIVE_CONVERSIONS
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
#else
  const uint32_t all = bits_as<uint32_t>(v);
  const uint32_t sign = all & 0x80000000u;
  const uint32_t bits = all ^ sign;
  const uint32_t normal = (bits + 0xc8000fffu + (bits >> 13 & 1u)) >> 13;
  // Adding 0.5 puts the last bit of a subnormal half at the last bit of the float, which rounds it.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(bits) + 0.5f) - 0x3f000000u;
  uint32_t half = bits < 0x38800000u ? subnormal : normal;
  half = (bits >= 0x47800000u ? 0x7c00u : half) | sign >> 16;
  out.bits = static_cast<uint16_t>(bits > 0x7f800000u ? kNaN16 : half);
#endif
}

// Two neighbours: a GPU rounds both in one instruction.
template <typename T>
SX_SMALL_FLOAT_FN void narrow_pair(Accumulator<T> first, Accumulator<T> second, T* out) {
  narrow(first, out[0]);
  narrow(second, out[1]);
}
#ifdef SX_NATIVE_CONVERSIONS
#define SX_NARROW_PAIR(T, instruction)                                                \
  template <>                                                                         \
  __host__ __device__ __forceinline__ void narrow_pair<T>(float a, float b, T* out) { \
    uint32_t both;                                                                    \
    asm(instruction " %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));                    \
    out[0].bits = static_cast<uint16_t>(both);                                        \
    out[1].bits = static_cast<uint16_t>(both >> 16);                                  \
  }
SX_NARROW_PAIR(BFloat16, "cvt.rn.bf16x2.f32")
SX_NARROW_PAIR(Float16, "cvt.rn.f16x2.f32")
#undef SX_NARROW_PAIR
#endif

}  // namespace speechlm
