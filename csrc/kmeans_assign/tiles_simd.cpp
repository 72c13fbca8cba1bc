// Compiled once per instruction set; see common/simd.h.
#include "kmeans_assign/tiles.h"

#include <cmath>
#include <cstring>

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

void bounds(const int32_t* products, const RowTerms* rows, const CentroidTerms& c, float* least, float* low,
            uint32_t* masks) {
  for (int panel = 0; panel < kPanels; ++panel) {
    const int64_t from = panel * kPanel;
    for (int i = 0; i < kRows; ++i, products += kPanel, low += kPanel, ++masks) {
      const RowTerms r = rows[i];
      float high[kPanel];
      for (int64_t j = 0; j < kPanel; ++j) {
        const float z = static_cast<float>(products[j]) * c.scale[from + j] * r.alpha;
        const float error = c.norm[from + j] * r.rho + c.residual[from + j] * r.hat + r.eta;
        low[j] = (c.half_norm[from + j] * r.beta_low - z) - error;
        high[j] = (c.half_norm[from + j] * r.beta_high - z) + error;
      }
      float lowest = least[i];
      for (int64_t j = 0; j < kPanel; ++j) lowest = high[j] < lowest ? high[j] : lowest;
      least[i] = lowest;
      uint32_t mask = 0;
      for (int64_t j = 0; j < kPanel; ++j) mask |= static_cast<uint32_t>(!(low[j] > lowest)) << j;
      *masks = mask;
    }
  }
}

constexpr int64_t kLanes = 8;

double join(const double* lanes) {
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

Quantised quantise(int16_t* codes, const double* __restrict value, int64_t width) {
  double squares[kLanes] = {}, largest[kLanes] = {};
  int64_t f = 0;
  const auto look = [&](int64_t at, int64_t j) {
    const double v = value[at];
    const double magnitude = v < 0 ? -v : v;
    squares[j] += v * v;
    largest[j] = magnitude > largest[j] ? magnitude : largest[j];
  };
  for (; f + kLanes <= width; f += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) look(f + j, j);
  }
  for (int64_t j = 0; f + j < width; ++j) look(f + j, j);
  Quantised out;
  const double total = join(squares);
  double most = 0;
  for (double lane : largest) most = lane > most ? lane : most;
  // Squares that overflow or lose digits say nothing.
  out.fits = total < 1e300 && (most == 0 || most > 1e-140);
  const int64_t padded = (width + 1) / 2 * 2;
  if (!out.fits || most == 0) {
    std::memset(codes, 0, static_cast<size_t>(padded) * sizeof(int16_t));
    return out;
  }
  out.norm = std::sqrt(total);
  // Each code is rounded by up to a half, the norm of all by up to sqrt(F) / 2.
  const double by_norm = out.norm / (kMostCodeNorm - 1 - 0.5 * std::sqrt(static_cast<double>(width)));
  const double by_largest = most / 32766;
  out.scale = by_norm > by_largest ? by_norm : by_largest;
  const double inverse = 1 / out.scale;
  double residuals[kLanes] = {}, hats[kLanes] = {};
  const auto round = [&](int64_t at, int64_t j) {
    constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to whole numbers
    const double code = (value[at] * inverse + kMagic) - kMagic;
    const double rest = value[at] - code * out.scale;
    residuals[j] += rest * rest;
    hats[j] += code * code;
    codes[at] = static_cast<int16_t>(static_cast<int32_t>(code));
  };
  f = 0;
  for (; f + kLanes <= width; f += kLanes) {
#pragma GCC ivdep
    for (int64_t j = 0; j < kLanes; ++j) round(f + j, j);
  }
  for (int64_t j = 0; f + j < width; ++j) round(f + j, j);
  if (width % 2 != 0) codes[width] = 0;
  // 2^-40: far more than these sums, and the subtraction of the centre before them, can have lost.
  out.residual = std::sqrt(join(residuals)) * (1 + 0x1p-40) + out.norm * 0x1p-50;
  out.hat = std::sqrt(join(hats)) * out.scale * (1 + 0x1p-40);
  return out;
}

template <typename T>
bool subtract(double* __restrict value, const T* __restrict x, const double* __restrict centre, int64_t width) {
  double lanes[kLanes] = {};  // 0 * x is 0, or NaN where x is not finite
  int64_t f = 0;
  for (; f + kLanes <= width; f += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const auto v = static_cast<double>(widen(x[f + j]));
      lanes[j] += 0 * v;
      value[f + j] = v - centre[f + j];
    }
  }
  for (int64_t j = 0; f + j < width; ++j) {
    const auto v = static_cast<double>(widen(x[f + j]));
    lanes[j] += 0 * v;
    value[f + j] = v - centre[f + j];
  }
  return join(lanes) == 0;
}

template <typename T>
double distance(const double* __restrict x, const T* __restrict centroid, int64_t width) {
  double lanes[kDistanceLanes] = {};
  int64_t f = 0;
  for (; f + kDistanceLanes <= width; f += kDistanceLanes) {
    for (int64_t j = 0; j < kDistanceLanes; ++j) {
      const double d = x[f + j] - static_cast<double>(widen(centroid[f + j]));
      lanes[j] += d * d;
    }
  }
  for (int64_t j = 0; f + j < width; ++j) {
    const double d = x[f + j] - static_cast<double>(widen(centroid[f + j]));
    lanes[j] += d * d;
  }
  for (int64_t step = kDistanceLanes / 2; step > 0; step /= 2) {
    for (int64_t j = 0; j < step; ++j) lanes[j] += lanes[j + step];
  }
  return lanes[0];
}

}  // namespace

const KmeansLoops& kmeans_loops_of() {
  static const KmeansLoops table = [] {
    KmeansLoops loops{kRows, kPanels, &tile, &bounds, &quantise};
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
