// The inner loops of kmeans_assign on the CPU, by instruction set. Codes are integers of 16 bits: their products are
// exact in 32 bits, whatever the order, so every set gives equal bits, and a multiply-add of two pairs takes half the
// instructions of float.
#pragma once

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
  bool fits = true;     // false: beyond what squares in float64 can hold
};

constexpr int kMostTileRows = 12;
constexpr int kMostTilePanels = 2;

struct KmeansLoops {
  int rows;    // of a tile, up to kMostTileRows
  int panels;  // of a tile, 1 or 2
  // out[panel][row][kPanel] = dot products of `rows` rows, [pairs][rows] pairs of codes, with `panels` panels.
  void (*tile)(int32_t* out, const int32_t* rows, const int32_t* panels, int64_t pairs);
  // For each panel and row of the tile: the least upper end so far, and which centroids (bits) of the panel have a
  // lower end that is not above it. low[panel][row][kPanel].
  void (*bounds)(const int32_t* products, const RowTerms* rows, const CentroidTerms& panel, float* least, float* low,
                 uint32_t* masks);
  // Codes of `value` [F], which is relative to the centre; the odd one out is paired with 0.
  Quantised (*quantise)(int16_t* codes, const double* value, int64_t width);
};

// The loops that depend on the type of a row.
template <typename T>
struct KmeansRowLoops {
  // value = x - centre. False: x is not finite.
  bool (*subtract)(double* value, const T* x, const double* centre, int64_t width);
  // Squared distance of x to a centroid.
  double (*distance)(const double* x, const T* centroid, int64_t width);
};

const KmeansLoops& kmeans_loops();  // of simd_in_use()
template <typename T>
const KmeansRowLoops<T>& kmeans_row_loops();

}  // namespace speechlm
