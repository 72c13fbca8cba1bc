// The loops over the columns of a scope, compiled once per instruction set; see common/cpu/simd.h.
#include "multistream_sample/sample_loops.h"

#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC's own header, see its bug 105593
#endif

namespace speechlm {
namespace SX_SIMD {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kWide = kBytes / sizeof(float);
constexpr int64_t kRows = kSampleBlock / kSampleLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// See sampling_math.h, none of whose functions may be used here.
constexpr double kMagic = 6144.0;
constexpr int64_t kMagicBits = 0x40b8000000000000;

// Vectors of a register; arithmetic and comparisons are those of their elements.
typedef float Floats __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef double Doubles __attribute__((vector_size(kBytes)));
typedef int64_t Longs __attribute__((vector_size(kBytes)));

#define SX_INLINE inline __attribute__((always_inline))

SX_INLINE Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename V, typename T>
SX_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
SX_INLINE Floats all(float v) { return v - Floats{}; }

// Bit i is set where element i of a comparison holds.
SX_INLINE uint32_t bits_of(Ints mask) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epi32_mask(reinterpret_cast<__m512i>(mask), _mm512_setzero_si512());
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWide; ++i) bits |= (static_cast<uint32_t>(mask[i]) & 1u) << i;
  return bits;
#endif
}

// e^x for x <= 0, within 2 units in the last place; 0 below -87 and for NaN.
// x = k ln 2 + r, |r| <= ln 2 / 2, e^r by the polynomial of Cephes' expf (Moshier 1989).
SX_INLINE Floats exponential(Floats x) {
  const Ints counts = x >= -87.0f;
  const Floats kept = x > -87.0f ? x : all(-87.0f);
  const Floats shifted = kept * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Floats k = shifted - 12582912.0f;
  const Floats power = reinterpret_cast<Floats>((reinterpret_cast<Ints>(shifted) + 127) << 23);
  const Floats r = (kept - k * 0.693359375f) + k * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Floats y = (p * (r * r) + r + 1.0f) * power;
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(y) & counts);
}

// The two halves of a vector, widened.
SX_INLINE void widen_halves(Floats v, Doubles& low, Doubles& high) {
#if defined(__AVX512F__)
  const auto whole = reinterpret_cast<__m512>(v);
  const __m512 swapped = _mm512_shuffle_f32x4(whole, whole, 0x4e);
  low = reinterpret_cast<Doubles>(_mm512_cvtps_pd(_mm512_castps512_ps256(whole)));
  high = reinterpret_cast<Doubles>(_mm512_cvtps_pd(_mm512_castps512_ps256(swapped)));
#elif defined(__AVX2__)
  const auto whole = reinterpret_cast<__m256>(v);
  low = reinterpret_cast<Doubles>(_mm256_cvtps_pd(_mm256_castps256_ps128(whole)));
  high = reinterpret_cast<Doubles>(_mm256_cvtps_pd(_mm256_extractf128_ps(whole, 1)));
#else
  low = Doubles{v[0], v[1]};
  high = Doubles{v[2], v[3]};
#endif
}

struct Weights {
  Longs low, high;  // of the first and the second half of the columns, plus kMagicBits
};

// kScaled: with a temperature other than 1.
template <bool kScaled>
SX_INLINE Weights weights_of(Floats x, const Weighing& how) {
  Floats scaled = x - how.largest;
  if (kScaled) scaled = scaled / how.temperature;
  const Floats e = exponential(scaled);
  Doubles low, high;
  widen_halves(e, low, high);
  return {reinterpret_cast<Longs>(low + kMagic), reinterpret_cast<Longs>(high + kMagic)};
}

SX_INLINE int64_t sum_of(Longs v) {
  int64_t sum = 0;
  for (int i = 0; i < kWide / 2; ++i) sum += v[i];
  return sum;
}

bool maxima(const float* x, int64_t blocks, float* out, float* largest) {
  Ints is_nan{};
  Floats top = all(-kInfinity);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t lane = 0; lane < kSampleLanes; lane += kWide) {
      Floats highest = all(-kInfinity);
      for (int64_t row = 0; row < kRows; ++row) {
        const Floats v = load(x + b * kSampleBlock + row * kSampleLanes + lane);
        highest = v > highest ? v : highest;
        is_nan |= v != v;
      }
      top = highest > top ? highest : top;
      store(out + b * kSampleLanes + lane, highest);
    }
  }
  *largest = -kInfinity;
  for (int i = 0; i < kWide; ++i) *largest = top[i] > *largest ? top[i] : *largest;
  return bits_of(is_nan) != 0;
}

template <bool kScaled>
int64_t sums_of(const float* x, int64_t blocks, const Weighing& how, int64_t* sums) {
  int64_t total = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    Longs low{}, high{};
    for (int64_t i = 0; i < kSampleBlock; i += kWide) {
      const Weights w = weights_of<kScaled>(load(x + b * kSampleBlock + i), how);
      low += w.low - kMagicBits;
      high += w.high - kMagicBits;
    }
    total += sums[b] = sum_of(low + high);
  }
  return total;
}

int64_t sums(const float* x, int64_t blocks, Weighing how, int64_t* out) {
  return how.temperature == 1 ? sums_of<false>(x, blocks, how, out) : sums_of<true>(x, blocks, how, out);
}

void weights(const float* x, int64_t n, Weighing how, int64_t* out) {
  for (int64_t i = 0; i < n; i += kWide) {
    const Weights w = weights_of<true>(load(x + i), how);
    store(out + i, w.low - kMagicBits);
    store(out + i + kWide / 2, w.high - kMagicBits);
  }
}

// Appends the columns from `first` on whose bits are set.
SX_INLINE int64_t append(uint32_t bits, int64_t first, int32_t* columns, int64_t count) {
  for (; bits != 0; bits &= bits - 1) columns[count++] = static_cast<int32_t>(first + __builtin_ctz(bits));
  return count;
}

int64_t at_least(const float* x, int64_t blocks, const float* maxima, float value, int32_t* columns) {
  int64_t count = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    Ints any{};
    for (int64_t lane = 0; lane < kSampleLanes; lane += kWide) any |= load(maxima + b * kSampleLanes + lane) >= value;
    if (bits_of(any) == 0) continue;
    for (int64_t i = b * kSampleBlock; i < (b + 1) * kSampleBlock; i += kWide) {
      count = append(bits_of(load(x + i) >= value), i, columns, count);
    }
  }
  return count;
}

template <typename T>
void load_columns(float* __restrict x, const T* __restrict z, const T* __restrict u, float guidance,
                  const uint8_t* __restrict allowed, int64_t n) {
  if (u == nullptr) {
    for (int64_t i = 0; i < n; ++i) x[i] = widen(z[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const float given = widen(z[i]), free = widen(u[i]);
      const float guided = free + guidance * (given - free);
      x[i] = given == -kInfinity ? given : guided;
    }
  }
  if (allowed == nullptr) return;
  for (int64_t i = 0; i < n; ++i) x[i] = allowed[i] != 0 ? x[i] : -kInfinity;
}

}  // namespace

const SampleLoops& sample_loops() {
  static const SampleLoops table{&maxima, &sums, &weights, &at_least};
  return table;
}

template <typename T>
LoadLoop<T> load_loop() {
  return &load_columns<T>;
}

template LoadLoop<float> load_loop<float>();
template LoadLoop<BFloat16> load_loop<BFloat16>();
template LoadLoop<Float16> load_loop<Float16>();

}  // namespace SX_SIMD
}  // namespace speechlm
