// The inner loops of kmeans_assign on the CPU, by instruction set. Codes are integers of 16 bits: their products are
// exact in 32 bits, whatever the order, so every set gives equal bits, and a multiply-add of two pairs takes half the
// instructions of float.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/simd.h"
#include "kmeans_assign/kmeans_assign.h"

namespace speechlm {

// A row or centroid in 16 bits: value = scale * code + residual.
struct Quantised {
  double norm = 0;  // of the value
  double scale = 0;
  double residual = 0;  // its norm, rounded up
  double hat = 0;       // norm of scale * code, rounded up
  bool fits = true;     // false: beyond what squares in float64 can hold, or not finite
};

// Values and codes are padded with zeros to whole vectors.
constexpr int64_t kVector = 4;
inline int64_t padded_width(int64_t width) { return (width + kVector - 1) / kVector * kVector; }

constexpr int kMostTileRows = 12;
constexpr int kMostTilePanels = 2;

struct KmeansLoops {
  int rows;    // of a tile, up to kMostTileRows
  int panels;  // of a tile, 1 or 2
  // out[panel][row][kPanel] = dot products of `rows` rows, [pairs][rows] pairs of codes, with `panels` panels.
  void (*tile)(int32_t* out, const int32_t* rows, const int32_t* panels, int64_t pairs);
  // masks[panel][row]: which centroids (bits) of the panel have a lower end that is not above the row's `least`.
  void (*below)(const int32_t* products, const RowTerms* rows, const CentroidTerms& panel, const float* least,
                uint32_t* masks);
  // Of one row and a panel: low[kPanel]; lowers `least` to the least upper end; which centroids are not above it then.
  uint32_t (*ends)(float* low, float* least, const int32_t* products, const RowTerms& row, const CentroidTerms& panel);
  // Codes of `value` [padded F], which is relative to the centre. `norm_share`: 1 / the norm that codes may have when
  // they are rounded.
  Quantised (*quantise)(int32_t* codes, const double* value, int64_t padded, double norm_share);
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
  return 1 / (kMostCodeNorm - 1 - 0.5 * std::sqrt(static_cast<double>(width)));
}

const KmeansLoops& kmeans_loops();  // of simd_in_use()
template <typename T>
const KmeansRowLoops<T>& kmeans_row_loops();

}  // namespace speechlm
