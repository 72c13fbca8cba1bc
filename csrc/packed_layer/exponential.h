// e^x for the *_simd.cpp files of this folder alone.
#pragma once

#include <cstdint>
#include <cstring>

namespace speechlm {
namespace SX_SIMD {
namespace {

// Within 2 units in the last place for x <= 0; 0 below -87, where float has no normal numbers left; NaN for NaN.
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

constexpr int64_t kLanes = 16;

// The lanes' sum in a fixed order.
inline float join(const float* lanes) {
  float part[4];
  for (int64_t j = 0; j < 4; ++j) part[j] = (lanes[j] + lanes[j + 8]) + (lanes[j + 4] + lanes[j + 12]);
  return (part[0] + part[2]) + (part[1] + part[3]);
}

}  // namespace
}  // namespace SX_SIMD
}  // namespace speechlm
