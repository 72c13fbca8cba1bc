// Compiled once per instruction set; see common/simd.h.
#include "kmeans_assign/tiles.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace speechlm {
namespace SX_SIMD {
namespace {

// A tile keeps its sums in registers: rows x vectors of them, and per pair of codes one vector of each panel and one
// broadcast per row. Sums may wrap around on the way: the last one is in range.
#if defined(__AVX512BW__)
constexpr int kRows = 12, kPanels = 2;

// multiply_add(sum, a, b): sum + the products of both halves.
#define SX_TILE(name, attribute, multiply_add)                                                                     \
  attribute void name(int32_t* out, const int32_t* rows, const int32_t* panels, int64_t pairs) {                   \
    __m512i sums[kRows][kPanels];                                                                                  \
    _Pragma("GCC unroll 12") for (int i = 0; i < kRows; ++i) { sums[i][0] = sums[i][1] = _mm512_setzero_si512(); } \
    for (int64_t p = 0; p < pairs; ++p) {                                                                          \
      const __m512i first = _mm512_loadu_si512(panels + p * kPanel);                                               \
      const __m512i second = _mm512_loadu_si512(panels + (pairs + p) * kPanel);                                    \
      _Pragma("GCC unroll 12") for (int i = 0; i < kRows; ++i) {                                                   \
        const __m512i row = _mm512_set1_epi32(rows[p * kRows + i]);                                                \
        sums[i][0] = multiply_add(sums[i][0], row, first);                                                         \
        sums[i][1] = multiply_add(sums[i][1], row, second);                                                        \
      }                                                                                                            \
    }                                                                                                              \
    _Pragma("GCC unroll 12") for (int i = 0; i < kRows; ++i) {                                                     \
      _mm512_storeu_si512(out + i * kPanel, sums[i][0]);                                                           \
      _mm512_storeu_si512(out + (kRows + i) * kPanel, sums[i][1]);                                                 \
    }                                                                                                              \
  }
#define SX_MULTIPLY_ADD(sum, a, b) _mm512_add_epi32(sum, _mm512_madd_epi16(a, b))
SX_TILE(tile, , SX_MULTIPLY_ADD)
SX_TILE(tile_vnni, __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))), _mm512_dpwssd_epi32)
#undef SX_MULTIPLY_ADD
#undef SX_TILE

#elif defined(__AVX2__)
constexpr int kRows = 6, kPanels = 1;

void tile(int32_t* out, const int32_t* rows, const int32_t* panels, int64_t pairs) {
  __m256i sums[kRows][2];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) sums[i][0] = sums[i][1] = _mm256_setzero_si256();
  for (int64_t p = 0; p < pairs; ++p) {
    const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panels + p * kPanel));
    const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panels + p * kPanel + 8));
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const __m256i row = _mm256_set1_epi32(rows[p * kRows + i]);
      sums[i][0] = _mm256_add_epi32(sums[i][0], _mm256_madd_epi16(row, first));
      sums[i][1] = _mm256_add_epi32(sums[i][1], _mm256_madd_epi16(row, second));
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * kPanel), sums[i][0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * kPanel + 8), sums[i][1]);
  }
}

#else
constexpr int kRows = 4, kPanels = 1;

void tile(int32_t* out, const int32_t* rows, const int32_t* panels, int64_t pairs) {
  uint32_t sums[kRows][kPanel] = {};  // unsigned: wrapping around is defined
  for (int64_t p = 0; p < pairs; ++p) {
    int16_t a[kRows][2], b[kPanel][2];
    std::memcpy(a, rows + p * kRows, sizeof a);
    std::memcpy(b, panels + p * kPanel, sizeof b);
    for (int i = 0; i < kRows; ++i) {
      for (int64_t j = 0; j < kPanel; ++j) {
        sums[i][j] += static_cast<uint32_t>(a[i][0] * b[j][0]) + static_cast<uint32_t>(a[i][1] * b[j][1]);
      }
    }
  }
  std::memcpy(out, sums, sizeof sums);
}
#endif

// The lower end, in an order of roundings that all that follows keeps to.
inline float low_of(float product, float scale, float half_norm, float norm, float residual, const RowTerms& r) {
  const float z = product * scale * r.alpha;
  return (half_norm * r.beta_low - z) - (norm * r.rho + residual * r.hat + r.eta);
}

// Bits of the centroids that are not above `end`.
inline uint32_t mask_of(const float* low, float end) {
  int32_t is_below[kPanel];  // all ones or zero
  for (int64_t k = 0; k < kPanel; ++k) is_below[k] = low[k] > end ? 0 : -1;
#if defined(__AVX2__)
  const auto* at = reinterpret_cast<const float*>(is_below);
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_loadu_ps(at))) |
         static_cast<uint32_t>(_mm256_movemask_ps(_mm256_loadu_ps(at + 8))) << 8;
#else
  uint32_t mask = 0;
  for (int64_t k = 0; k < kPanel; ++k) mask |= (static_cast<uint32_t>(is_below[k]) & 1u) << k;
  return mask;
#endif
}

uint32_t ends(float* low, float* least, const int32_t* products, const RowTerms& row, const CentroidTerms& c) {
  const RowTerms r = row;
  float high[kPanel];
  for (int64_t k = 0; k < kPanel; ++k) {
    const float z = static_cast<float>(products[k]) * c.scale[k] * r.alpha;
    const float error = c.norm[k] * r.rho + c.residual[k] * r.hat + r.eta;
    low[k] = (c.half_norm[k] * r.beta_low - z) - error;
    high[k] = (c.half_norm[k] * r.beta_high - z) + error;
  }
  for (int64_t half = kPanel / 2; half > 0; half /= 2) {
    for (int64_t k = 0; k < half; ++k) high[k] = high[k + half] < high[k] ? high[k + half] : high[k];
  }
  *least = high[0] < *least ? high[0] : *least;
  return mask_of(low, *least);
}

void below(const int32_t* products, const RowTerms* rows, const CentroidTerms& c, const float* least, uint32_t* masks) {
  for (int panel = 0; panel < kPanels; ++panel) {
    const int64_t from = panel * kPanel;
    for (int i = 0; i < kRows; ++i, products += kPanel, ++masks) {
      const RowTerms r = rows[i];
      float low[kPanel];
      for (int64_t j = 0; j < kPanel; ++j) {
        const int64_t k = from + j;
        low[j] = low_of(static_cast<float>(products[j]), c.scale[k], c.half_norm[k], c.norm[k], c.residual[k], r);
      }
      *masks = mask_of(low, least[i]);
    }
  }
}

typedef double Doubles __attribute__((vector_size(kVector * sizeof(double))));
typedef int32_t Ints __attribute__((vector_size(kVector * sizeof(int32_t))));

inline Doubles load(const double* from) {
  Doubles v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline double join(const Doubles& v) { return (v[0] + v[1]) + (v[2] + v[3]); }

Quantised quantise(int32_t* codes, const double* value, int64_t padded, double norm_share) {
  Doubles squares = {}, largest = {};
  for (int64_t f = 0; f < padded; f += kVector) {
    const Doubles v = load(value + f);
    const Doubles magnitude = v < 0 ? -v : v;
    squares += v * v;
    largest = magnitude > largest ? magnitude : largest;
  }
  const double total = join(squares);
  double most = 0;
  for (int64_t j = 0; j < kVector; ++j) most = largest[j] > most ? largest[j] : most;
  Quantised out;
  // Squares that overflow or lose digits say nothing.
  out.fits = total < 1e300 && (most == 0 || most > 1e-140);
  if (!out.fits || most == 0) {
    std::memset(codes, 0, static_cast<size_t>(padded) * sizeof(int32_t));
    return out;
  }
  out.norm = std::sqrt(total);
  const double by_norm = out.norm * norm_share, by_largest = most * (1.0 / 32766);
  out.scale = by_norm > by_largest ? by_norm : by_largest;
  const double inverse = 1 / out.scale;
  Doubles residuals = {}, hats = {};
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to whole numbers
  for (int64_t f = 0; f < padded; f += kVector) {
    const Doubles v = load(value + f);
    const Doubles code = (v * inverse + kMagic) - kMagic;
    const Doubles rest = v - code * out.scale;
    residuals += rest * rest;
    hats += code * code;
    const Ints whole = __builtin_convertvector(code, Ints);
    std::memcpy(codes + f, &whole, sizeof whole);
  }
  // 2^-40: far more than these sums, and the subtraction of the centre before them, can have lost.
  out.residual = std::sqrt(join(residuals)) * (1 + 0x1p-40) + out.norm * 0x1p-50;
  out.hat = std::sqrt(join(hats)) * out.scale * (1 + 0x1p-40);
  return out;
}

template <typename T>
void subtract(double* __restrict value, const T* __restrict x, const double* __restrict centre, int64_t width) {
  for (int64_t f = 0; f < width; ++f) value[f] = static_cast<double>(widen(x[f])) - centre[f];
}

template <typename T>
inline Doubles load_wide(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    typedef float Floats __attribute__((vector_size(kVector * sizeof(float))));
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return __builtin_convertvector(v, Doubles);
  } else {
    Doubles v;
    for (int64_t j = 0; j < kVector; ++j) v[j] = static_cast<double>(widen(from[j]));
    return v;
  }
}

constexpr int64_t kSums = kDistanceLanes / kVector;

template <typename T>
inline void add_squares(Doubles (&sums)[kSums], const double* x, const T* centroid) {
#pragma GCC unroll 8
  for (int64_t j = 0; j < kSums; ++j) {
    const Doubles d = load(x + j * kVector) - load_wide(centroid + j * kVector);
    sums[j] += d * d;
  }
}

template <typename T>
double distance(const double* __restrict x, const T* __restrict centroid, int64_t width) {
  Doubles sums[kSums];
#pragma GCC unroll 8
  for (int64_t j = 0; j < kSums; ++j) sums[j] = Doubles{};
  int64_t f = 0;
  for (; f + kDistanceLanes <= width; f += kDistanceLanes) add_squares(sums, x + f, centroid + f);
  if (f < width) {
    double rest_x[kDistanceLanes] = {}, rest[kDistanceLanes] = {};
    for (int64_t j = 0; f + j < width; ++j) {
      rest_x[j] = x[f + j];
      rest[j] = static_cast<double>(widen(centroid[f + j]));
    }
    add_squares(sums, rest_x, rest);
  }
#pragma GCC unroll 8
  for (int64_t step = kSums / 2; step > 0; step /= 2) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < step; ++j) sums[j] += sums[j + step];
  }
  return (sums[0][0] + sums[0][2]) + (sums[0][1] + sums[0][3]);
}

}  // namespace

const KmeansLoops& kmeans_loops_of() {
  static const KmeansLoops table = [] {
    KmeansLoops loops{kRows, kPanels, &tile, &below, &ends, &quantise};
#if defined(__AVX512BW__)
    if (__builtin_cpu_supports("avx512vnni")) loops.tile = &tile_vnni;
#endif
    return loops;
  }();
  return table;
}

template <typename T>
const KmeansRowLoops<T>& kmeans_row_loops_of() {
  static const KmeansRowLoops<T> table{&subtract<T>, &distance<T>};
  return table;
}

template const KmeansRowLoops<float>& kmeans_row_loops_of<float>();
template const KmeansRowLoops<double>& kmeans_row_loops_of<double>();
template const KmeansRowLoops<BFloat16>& kmeans_row_loops_of<BFloat16>();
template const KmeansRowLoops<Float16>& kmeans_row_loops_of<Float16>();

}  // namespace SX_SIMD
}  // namespace speechlm
