// kmeans_assign: the nearest centroid of every row, certified to be the float64 argmin.
//
// With x and the centroids taken relative to a centre, argmin_k |x - c_k|^2 = argmin_k |c_k|^2 / 2 - x.c_k. Rows and
// centroids are rounded to a low precision, xh = s_x q_x and ch_k = s_k q_k, so that a fast matrix product gives
// Q = q_x.q_k. The rounding errors |x - xh| and |c_k - ch_k| are known, and with them a bound for every pair:
//   |x.c_k - s_x s_k Q| <= |x - xh| |c_k| + |xh| |c_k - ch_k|
// Centroids whose interval reaches below the least upper end are rescored in float64 by direct distances; mostly there
// is one. Where the processor has a tile unit, codes are bfloat16 at first, and rows with many such centroids get
// finer ones. docs/ops/kmeans_assign.md has the proof.
//
// All is kept in float, relative to unit * max(unit, |x|), where unit is the largest |c_k|, so nothing overflows.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "common/host_device.h"
#include "common/tensor/small_float.h"

namespace speechlm {

constexpr int64_t kPanel = 16;  // centroids whose codes are interleaved on the CPU

// Pairs of coarse codes, of a row or centroid, are padded to this.
constexpr int64_t kCoarsePairs = 16;
inline int64_t coarse_pairs(int64_t width) { return ceil_div(width, 2 * kCoarsePairs) * kCoarsePairs; }

// A bound of the tile unit's rounding errors, in any order of additions: fewer than 1.3 (F + 64) of them, each at most
// 2^-24 of the sum of magnitudes.
inline double coarse_product_error(int64_t width) { return 0x1p-24 * 1.3 * static_cast<double>(width + 64); }

// Multiples of 2^-24 that each bound gets for the roundings of its own arithmetic in float, counted in the docs.
constexpr double kFloatSlack = 16;
// And the addend for numbers below float's normal ones, which may count as 0: a product of codes is up to 2^31 times a
// scale of up to 2^-126.
constexpr double kFloatFloor = 4e-33;
// The smallest factor of the half norms: times an infinite one it must not be 0 * infinity.
constexpr double kMinBeta = 0x1p-126;
// The largest norm of codes of 16 bits: the product of two is below 2^31.
constexpr double kMaxCodeNorm = 46340;

// The float64 distance that decides near ties is one number on every device: partial sums of the columns f, f + 32, ...
// by products and sums that round by themselves, then added in halves, lane j and lane j + 16 first.
constexpr int kDistanceLanes = 32;

// The terms of a row in its bounds.
struct RowTerms {
  float alpha = 0;      // s_x / max(unit, |x|)
  float beta_low = 0;   // unit / max(unit, |x|), rounded so that the lower end is low
  float beta_high = 0;  // and so that the upper one is high
  float rho = 0;        // |x - xh| / max(unit, |x|), and slack: times |c_k|
  float hat = 0;        // |xh| / max(unit, |x|): times |c_k - ch_k|
  float eta = 0;        // error of a direct float64 distance
};

// The terms of the centroids, relative to unit: arrays of the padded number of centroids.
struct CentroidTerms {
  const float* scale = nullptr;      // s_k
  const float* half_norm = nullptr;  // |c_k|^2 / 2; infinite for a copy of an earlier centroid
  const float* norm = nullptr;       // |c_k|
  const float* residual = nullptr;   // |c_k - ch_k|
};

// x and the centroids have types of their own.
template <typename T, typename C>
struct KmeansAssignArgs {
  int64_t num_rows = 0;                   // N
  int64_t num_clusters = 0;               // K
  int64_t width = 0;                      // F
  const T* x = nullptr;                   // [N, F]
  const C* centroids = nullptr;           // [K, F] as given
  const int32_t* codes = nullptr;         // [padded K / 16, ceil(F / 2), 16] pairs of 16-bit codes; the CPU's
  CentroidTerms terms;                    // of padded K
  const int32_t* coarse_codes = nullptr;  // [padded K / 16, coarse pairs, 16] pairs of bfloat16; or null
  CentroidTerms coarse_terms;
  const double* centre = nullptr;  // [F]
  double unit = 0;
  bool exact = true;           // if not, fine codes have no bounds; coarse ones alone would be wrong too often
  bool products_only = false;  // no labels: for benchmarks of the products alone
  int32_t* labels = nullptr;   // [N]; -1: a row that is not finite
  double* distance = nullptr;  // [N] squared, NaN for -1; or null
  int64_t* counts = nullptr;   // [3] rows rescored, their candidates, rows that are not finite
};

// Labels and distances are equal for any number of threads and instruction set, counts for those without a tile unit.
template <typename T, typename C>
void kmeans_assign_cpu(const KmeansAssignArgs<T, C>& args, int threads);

// K rounded up to the size of `codes` and the terms.
inline int64_t padded_clusters(int64_t num_clusters) {
  constexpr int64_t kMultiple = 2 * kPanel;  // a tile of AVX-512 takes two panels
  return round_up(num_clusters, kMultiple);
}

// On a GPU a thread takes this many clusters at once: the rows of the centroids' codes, their terms and the products of
// a row are padded to it, by zeros with an infinite half norm.
constexpr int64_t kClusterGroup = 4;
SX_HOST_DEVICE inline int64_t padded_groups(int64_t num_clusters) { return round_up(num_clusters, kClusterGroup); }

// On a GPU: rows to float16 codes with their terms, a product of the codes by the vendor's library, then the labels.
template <typename T>
struct KmeansQuantizeArgs {
  int64_t num_rows = 0;
  int64_t width = 0;               // F
  int64_t padded_width = 0;        // of the codes
  const T* x = nullptr;            // [N, F]
  const double* centre = nullptr;  // [F]
  const double* unit = nullptr;    // [1]
  bool exact = true;
  uint16_t* codes = nullptr;  // [N, padded F] float16
  RowTerms* terms = nullptr;  // [N]; eta is NaN for a row that is not finite
};

template <typename T>
void kmeans_quantize_rows_cuda(const KmeansQuantizeArgs<T>& args, int device, void* stream);

template <typename T, typename C>
struct KmeansRescoreArgs {
  int64_t num_rows = 0;
  int64_t num_clusters = 0;
  int64_t width = 0;
  const float* products = nullptr;  // [N, padded K]
  const T* x = nullptr;             // [N, F]
  const C* centroids = nullptr;     // [K, F]
  CentroidTerms terms;
  const RowTerms* rows = nullptr;        // [N]
  int32_t* labels = nullptr;             // [N]
  double* distance = nullptr;            // [N] or null
  unsigned long long* counts = nullptr;  // [3], added to
};

// Equal in every run. Nothing waits for the device.
template <typename T, typename C>
void kmeans_rescore_cuda(const KmeansRescoreArgs<T, C>& args, int device, void* stream);

// All of it in one call.
template <typename T, typename C>
struct KmeansChunksArgs {
  KmeansQuantizeArgs<T> rows;        // of all rows; `codes` holds code_rows of them, `terms` all
  KmeansRescoreArgs<T, C> labels;    // of all rows; without products and the rows' terms
  const uint16_t* codes = nullptr;   // [padded K, padded F] of the centroids
  int64_t chunk = 0, code_rows = 0;  // rows at a time; a multiple of `chunk`, unless it is all rows
  float* products = nullptr;         // [2, chunk, padded K]; one buffer is enough for one chunk
  void* blas = nullptr;              // torch's cuBLAS handle
};

template <typename T, typename C>
void kmeans_assign_cuda(const KmeansChunksArgs<T, C>& args, int device, void* stream);

template <typename C>
struct KmeansIndexArgs {
  int64_t num_clusters = 0;
  int64_t width = 0;
  const C* centroids = nullptr;    // [K, F], finite
  const double* centre = nullptr;  // [F]
  int32_t* codes = nullptr;        // as above
  float* terms = nullptr;          // [4, padded K]: scale, half norm, norm, residual
  double* unit = nullptr;
  int32_t* coarse_codes = nullptr;  // or null, both
  float* coarse_terms = nullptr;
};

template <typename C>
void kmeans_index_cpu(const KmeansIndexArgs<C>& args, int threads);

}  // namespace speechlm
