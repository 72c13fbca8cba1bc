// The inner loops of kmeans_assign, compiled once per instruction set; see common/cpu/simd.h.
#include "kmeans_assign/tiles.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
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
  attribute void name(int32_t* out, const int32_t* rows, const int32_t* panels, int64_t pairs, int) {              \
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

void tile(int32_t* out, const int32_t* rows, const int32_t* panels, int64_t pairs, int) {
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

void tile(int32_t* out, const int32_t* rows, const int32_t* panels, int64_t pairs, int) {
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

// The order of roundings is the same in every set, and so are the bounds.

// Raises the threshold of the first test by the rounding errors of its own arithmetic.
constexpr float kEndSlack = 0x1p-18f;

#if defined(__AVX512BW__)
inline __m512 load_products(const float* from) { return _mm512_loadu_ps(from); }
inline __m512 load_products(const int32_t* from) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(from)); }

// The compiler's own loops take five times as long, a fifth of all.
struct CentroidVectors {
  explicit CentroidVectors(const CentroidTerms& c, int64_t at = 0)
      : scale(_mm512_loadu_ps(c.scale + at)),
        half_norm(_mm512_loadu_ps(c.half_norm + at)),
        norm(_mm512_loadu_ps(c.norm + at)),
        residual(_mm512_loadu_ps(c.residual + at)) {}
  __m512 scale, half_norm, norm, residual;
};

template <typename Product>
inline __m512 product_of(const Product* products, const CentroidVectors& c, float alpha) {
  return _mm512_mul_ps(_mm512_mul_ps(load_products(products), c.scale), _mm512_set1_ps(alpha));
}

inline __m512 error_of(const CentroidVectors& c, const RowTerms& r) {
  return _mm512_add_ps(
      _mm512_add_ps(_mm512_mul_ps(c.norm, _mm512_set1_ps(r.rho)), _mm512_mul_ps(c.residual, _mm512_set1_ps(r.hat))),
      _mm512_set1_ps(r.eta));
}

inline __m512 score_of(const __m512& z, const CentroidVectors& c, float beta) {
  return _mm512_sub_ps(_mm512_mul_ps(c.half_norm, _mm512_set1_ps(beta)), z);
}

inline uint32_t mask_of(const __m512& low, float end) {
  return _mm512_cmp_ps_mask(low, _mm512_set1_ps(end), _CMP_NGT_UQ);
}

template <typename Product>
uint32_t bounds(float* low, float* least, const Product* products, const RowTerms& r, const CentroidTerms& terms) {
  const CentroidVectors c(terms);
  const __m512 z = product_of(products, c, r.alpha), error = error_of(c, r);
  const __m512 lower = _mm512_sub_ps(score_of(z, c, r.beta_low), error);
  const __m512 upper = _mm512_add_ps(score_of(z, c, r.beta_high), error);
  // No number: of a centroid that always is a candidate.
  const __m512 infinity = _mm512_set1_ps(std::numeric_limits<float>::infinity());
  const float end =
      _mm512_reduce_min_ps(_mm512_mask_blend_ps(_mm512_cmp_ps_mask(upper, upper, _CMP_ORD_Q), infinity, upper));
  *least = end < *least ? end : *least;
  _mm512_storeu_ps(low, lower);
  return mask_of(lower, *least);
}

template <typename Product, int num_rows, int num_panels>
void below(const Product* products, const RowColumns& rows, const CentroidTerms& terms, uint16_t* masks, int count) {
  static_assert(kRowVector == 16, "a vector");
  alignas(64) float limit[(num_rows + kRowVector - 1) / kRowVector * kRowVector];
  for (int panel = 0; panel < num_panels; ++panel) {
    const CentroidVectors c(terms, panel * kPanel);
    const __m512 norm = _mm512_set1_ps(_mm512_reduce_max_ps(c.norm));
    const __m512 residual = _mm512_set1_ps(_mm512_reduce_max_ps(c.residual));
    for (int i = 0; i < count; i += kRowVector) {
      const __m512 error = _mm512_add_ps(_mm512_add_ps(_mm512_mul_ps(norm, _mm512_loadu_ps(rows.rho + i)),
                                                       _mm512_mul_ps(residual, _mm512_loadu_ps(rows.hat + i))),
                                         _mm512_loadu_ps(rows.eta + i));
      const __m512 end = _mm512_add_ps(_mm512_loadu_ps(rows.least + i), error);
      _mm512_store_ps(limit + i, _mm512_add_ps(end, _mm512_mul_ps(_mm512_abs_ps(end), _mm512_set1_ps(kEndSlack))));
    }
    for (int i = 0; i < count; ++i) {
      const int at = panel * num_rows + i;
      const __m512 z = product_of(products + at * kPanel, c, rows.alpha[i]);
      masks[at] = static_cast<uint16_t>(mask_of(score_of(z, c, rows.beta_low[i]), limit[i]));
    }
  }
}

#else
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

template <typename Product>
uint32_t bounds(float* low, float* least, const Product* products, const RowTerms& row, const CentroidTerms& c) {
  const RowTerms r = row;
  float high[kPanel];
  for (int64_t k = 0; k < kPanel; ++k) {
    const float z = static_cast<float>(products[k]) * c.scale[k] * r.alpha;
    const float error = c.norm[k] * r.rho + c.residual[k] * r.hat + r.eta;
    low[k] = (c.half_norm[k] * r.beta_low - z) - error;
    const float end = (c.half_norm[k] * r.beta_high - z) + error;
    high[k] = end == end ? end : std::numeric_limits<float>::infinity();  // of a centroid that always is a candidate
  }
  for (int64_t half = kPanel / 2; half > 0; half /= 2) {
    for (int64_t k = 0; k < half; ++k) high[k] = high[k + half] < high[k] ? high[k + half] : high[k];
  }
  *least = high[0] < *least ? high[0] : *least;
  return mask_of(low, *least);
}

template <typename Product, int num_rows, int num_panels>
void below(const Product* products, const RowColumns& rows, const CentroidTerms& c, uint16_t* masks, int count) {
  float limit[num_rows];
  for (int panel = 0; panel < num_panels; ++panel) {
    const int64_t from = panel * kPanel;
    float norm = 0, residual = 0;
    for (int64_t k = from; k < from + kPanel; ++k) {
      norm = std::max(norm, c.norm[k]);
      residual = std::max(residual, c.residual[k]);
    }
    for (int i = 0; i < count; ++i) {
      const float end = rows.least[i] + (norm * rows.rho[i] + residual * rows.hat[i] + rows.eta[i]);
      limit[i] = end + std::abs(end) * kEndSlack;
    }
    for (int i = 0; i < count; ++i) {
      const Product* at = products + (panel * num_rows + i) * kPanel;
      const float alpha = rows.alpha[i], beta = rows.beta_low[i];
      float score[kPanel];
      for (int64_t j = 0; j < kPanel; ++j) {
        const int64_t k = from + j;
        score[j] = c.half_norm[k] * beta - static_cast<float>(at[j]) * c.scale[k] * alpha;
      }
      masks[panel * num_rows + i] = static_cast<uint16_t>(mask_of(score, limit[i]));
    }
  }
}
#endif

constexpr int64_t kLanes = 4;
typedef double Doubles __attribute__((vector_size(kLanes * sizeof(double))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

inline Doubles load(const double* from) {
  Doubles v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline double join(const Doubles& v) { return (v[0] + v[1]) + (v[2] + v[3]); }

// Norm and whether it fits; `peak` becomes the largest magnitude.
Quantized measure(const double* value, int64_t padded, double& peak) {
  Doubles squares[2] = {}, largest[2] = {};
  for (int64_t f = 0; f < padded; f += kVector) {
    for (int64_t i = 0; i < 2; ++i) {
      const Doubles v = load(value + f + i * kLanes);
      const Doubles magnitude = v < 0 ? -v : v;
      squares[i] += v * v;
      largest[i] = magnitude > largest[i] ? magnitude : largest[i];
    }
  }
  const double total = join(squares[0] + squares[1]);
  peak = 0;
  for (int64_t j = 0; j < kVector; ++j) {
    const double magnitude = largest[j / kLanes][j % kLanes];
    peak = magnitude > peak ? magnitude : peak;
  }
  Quantized out;
  // Squares that overflow or lose digits say nothing.
  out.fits = total < 1e300 && (peak == 0 || peak > 1e-140);
  if (out.fits) out.norm = std::sqrt(total);
  return out;
}

// Residual and norm of the codes, rounded up: 2^-40 is far more than these sums, and the subtraction of the centre
// before them, can have lost.
void set_errors(Quantized& out, double residual, double code_norm) {
  out.residual = residual * (1 + 0x1p-40) + out.norm * 0x1p-50;
  out.hat = code_norm * out.scale * (1 + 0x1p-40);
}

Quantized quantize(int32_t* codes, const double* value, int64_t padded, double norm_share) {
  double peak = 0;
  Quantized out = measure(value, padded, peak);
  if (!out.fits || peak == 0) {
    std::memset(codes, 0, static_cast<size_t>(padded) * sizeof(int32_t));
    return out;
  }
  const double by_norm = out.norm * norm_share, by_largest = peak * (1.0 / 32766);
  out.scale = by_norm > by_largest ? by_norm : by_largest;
  const double inverse = 1 / out.scale;
  Doubles residuals = {}, hats = {};
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to whole numbers
  for (int64_t f = 0; f < padded; f += kLanes) {
    const Doubles v = load(value + f);
    const Doubles code = (v * inverse + kMagic) - kMagic;
    const Doubles rest = v - code * out.scale;
    residuals += rest * rest;
    hats += code * code;
    const Ints whole = __builtin_convertvector(code, Ints);
    std::memcpy(codes + f, &whole, sizeof whole);
  }
  set_errors(out, std::sqrt(join(residuals)), std::sqrt(join(hats)));
  return out;
}

Quantized round(uint16_t* codes, const double* value, int64_t padded) {
  double peak = 0;
  Quantized out = measure(value, padded, peak);
  if (!out.fits || peak == 0) {
    std::memset(codes, 0, static_cast<size_t>(padded) * sizeof(uint16_t));
    return out;
  }
  out.scale = std::ldexp(1.0, std::ilogb(peak));  // the largest code is in [1, 2)
  const double inverse = 1 / out.scale;
  typedef double Wide __attribute__((vector_size(kVector * sizeof(double))));
  typedef float Floats __attribute__((vector_size(kVector * sizeof(float))));
  typedef uint32_t Bits __attribute__((vector_size(kVector * sizeof(uint32_t))));
  typedef uint16_t Codes __attribute__((vector_size(kVector * sizeof(uint16_t))));
  Wide residuals = {}, hats = {};
  for (int64_t f = 0; f < padded; f += kVector) {
    Wide v;
    std::memcpy(&v, value + f, sizeof v);
    v *= inverse;
    const Floats single = __builtin_convertvector(v, Floats);
    Bits bits;
    std::memcpy(&bits, &single, sizeof bits);
    bits = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const Codes code = __builtin_convertvector(bits, Codes);
    std::memcpy(codes + f, &code, sizeof code);
    bits <<= 16;
    Floats hat;
    std::memcpy(&hat, &bits, sizeof hat);
    const Wide wide = __builtin_convertvector(hat, Wide);
    const Wide rest = v - wide;  // exact, and so is the scale
    residuals += rest * rest;
    hats += wide * wide;
  }
  double residual = 0, code_norm = 0;
  for (int64_t j = 0; j < kVector; ++j) {
    residual += residuals[j];
    code_norm += hats[j];
  }
  set_errors(out, std::sqrt(residual) * out.scale, std::sqrt(code_norm));
  return out;
}

template <typename T>
void subtract(double* __restrict value, const T* __restrict x, const double* __restrict centre, int64_t width) {
  for (int64_t f = 0; f < width; ++f) value[f] = static_cast<double>(widen(x[f])) - centre[f];
}

template <typename T>
inline Doubles load_wide(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return __builtin_convertvector(v, Doubles);
  } else {
    Doubles v;
    for (int64_t j = 0; j < kLanes; ++j) v[j] = static_cast<double>(widen(from[j]));
    return v;
  }
}

constexpr int64_t kSums = kDistanceLanes / kLanes;

template <typename T>
inline void add_squares(Doubles (&sums)[kSums], const double* x, const T* centroid) {
#pragma GCC unroll 8
  for (int64_t j = 0; j < kSums; ++j) {
    const Doubles d = load(x + j * kLanes) - load_wide(centroid + j * kLanes);
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

const KmeansLoops& kmeans_loops() {
  static const KmeansLoops table = [] {
    KmeansLoops loops{
        {kRows, kPanels, kRows, &tile, &below<int32_t, kRows, kPanels>, &bounds<int32_t>},
        {kCoarseRows, kCoarsePanels, kCoarseStep, nullptr, &below<float, kCoarseRows, kCoarsePanels>, &bounds<float>},
        &quantize,
        &round};
#if defined(__AVX512BW__)
    if (__builtin_cpu_supports("avx512vnni")) loops.fine.tile = &tile_vnni;
#endif
    return loops;
  }();
  return table;
}

template <typename T>
const KmeansRowLoops<T>& kmeans_row_loops() {
  static const KmeansRowLoops<T> table{&subtract<T>, &distance<T>};
  return table;
}

#define SX_INSTANTIATE(T) template const KmeansRowLoops<T>& kmeans_row_loops<T>();
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace SX_SIMD
}  // namespace speechlm
