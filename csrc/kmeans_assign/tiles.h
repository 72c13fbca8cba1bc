// The inner loops of kmeans_assign on the CPU, by instruction set. Fine codes are integers of 16 bits: their products
// are exact in 32 bits, whatever the order, so every set gives equal bits, and a multiply-add of two pairs takes half
// the instructions of float. Coarse codes are bfloat16, for processors with a tile unit, which is several times as
// fast.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/cpu/simd.h"
#include "kmeans_assign/kmeans_assign.h"

namespace speechlm {

// A row or centroid in codes: value = scale * code + residual.
struct Quantized {
  double norm = 0;  // of the value
  double scale = 0;
  double residual = 0;  // its norm, rounded up
  double hat = 0;       // norm of scale * code, rounded up
  bool fits = true;     // false: squares overflow or underflow in float64, or not finite
};

// Values and codes are padded with zeros to whole vectors.
constexpr int64_t kVector = 8;
inline int64_t padded_width(int64_t width) { return round_up(width, kVector); }

constexpr int kMaxTilePanels = 2;

// A coarse tile: rows in steps of two of the tile unit's, which are 16 rows (or centroids) of 16 pairs of codes.
constexpr int kCoarseRows = 128, kCoarseStep = 32, kCoarsePanels = 2;

// The rows of a tile as `below` reads them; arrays may be read up to a multiple of kRowVector.
constexpr int kRowVector = 16;
struct RowColumns {
  const float* alpha;
  const float* beta_low;
  const float* rho;
  const float* hat;
  const float* eta;
  const float* least;  // upper end so far
};

// For products of fine (int32_t) or coarse (float) codes.
template <typename Product>
struct PanelLoops {
  int rows;    // of a tile
  int panels;  // of a tile, 1 or 2
  int step;    // a tile may have fewer rows, `count`, which is a multiple of this
  // out[panel][row][kPanel] = dot products of `count` rows with `panels` panels. Pairs of codes of the rows are
  // [pairs][rows] if fine, [row / 16][pairs / 16][16][16] if coarse.
  void (*tile)(Product* out, const int32_t* rows, const int32_t* panels, int64_t pairs, int count);
  // masks[panel][row]: bits of the panel's centroids that may have a lower end that is not above the row's `least`. A
  // cheap first test: it takes the widest interval of the panel for all.
  void (*below)(const Product* products, const RowColumns& rows, const CentroidTerms& panel, uint16_t* masks,
                int count);
  // Of one row and a panel: the lower ends low[kPanel]; lowers `least` to the least upper end; returns the bits of the
  // centroids whose lower end is not above it.
  uint32_t (*bounds)(float* low, float* least, const Product* products, const RowTerms& row,
                     const CentroidTerms& panel);
};

struct KmeansLoops {
  PanelLoops<int32_t> fine;
  PanelLoops<float> coarse;  // without a tile: see coarse_tile()
  // Fine codes of `value` [padded F], which is relative to the centre. `norm_share`: 1 / the norm that codes may have
  // when they are rounded.
  Quantized (*quantize)(int32_t* codes, const double* value, int64_t padded, double norm_share);
  // Coarse codes, the bits of bfloat16.
  Quantized (*round)(uint16_t* codes, const double* value, int64_t padded);
};

// The loops that depend on the type of a row.
template <typename T>
struct KmeansRowLoops {
  // value = x - centre.
  void (*subtract)(double* value, const T* x, const double* centre, int64_t width);
  // Squared distance of x to a centroid.
  double (*distance)(const double* x, const T* centroid, int64_t width);
};

// Two codes as a tile takes them.
inline int32_t pair_of(const int32_t* codes) {
  return static_cast<int32_t>((static_cast<uint32_t>(codes[0]) & 0xffffu) | static_cast<uint32_t>(codes[1]) << 16);
}

// Each code is rounded by up to a half, the norm of all by up to sqrt(F) / 2.
inline double norm_share_of(int64_t width) {
  return 1 / (kMaxCodeNorm - 1 - 0.5 * std::sqrt(static_cast<double>(width)));
}

// A product of coarse codes by the tile unit or in plain C++; with the first the calling thread must hold amx::Tiles.
using CoarseTile = void (*)(float* out, const int32_t* rows, const int32_t* panels, int64_t pairs, int count);
CoarseTile coarse_tile(Tiles tiles);

SX_DECLARE_SIMD(const KmeansLoops& kmeans_loops())
SX_DECLARE_SIMD(template <typename T> const KmeansRowLoops<T>& kmeans_row_loops())

inline const KmeansLoops& kmeans_loops() { return SX_SELECT_SIMD(kmeans_loops()); }  // of simd_in_use()
template <typename T>
const KmeansRowLoops<T>& kmeans_row_loops() {  // of simd_in_use()
  return SX_SELECT_SIMD(kmeans_row_loops<T>());
}

}  // namespace speechlm
