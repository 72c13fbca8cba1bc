// Products of bfloat16 codes. The tile unit multiplies and adds in float, rounding to nearest; numbers below the normal
// ones count as 0. Bytes: 4 KiB of codes from the caches per 32 x 32 x 32 products, which is the bandwidth of the
// caches.
#include <algorithm>

#include "common/cpu/amx.h"
#include "kmeans_assign/tiles.h"

#ifdef SPEECHLM_HAVE_AMX
#include <immintrin.h>
#endif

namespace speechlm {
namespace {

constexpr int64_t kUnitRows = 16, kUnitPairs = 16;
constexpr int64_t kUnit = kUnitRows * kUnitPairs;  // pairs of a tile of the unit

#ifdef SPEECHLM_HAVE_AMX
// Features that are summed at a time, in steps of the unit: then the centroids' codes, 16 KiB, and the sums of all rows
// stay in the first-level cache, and the second-level one brings the rows' codes only.
constexpr int64_t kSteps = 8;

__attribute__((target("amx-tile,amx-bf16"))) void by_unit(float* out, const int32_t* rows, const int32_t* panels,
                                                          int64_t pairs, int count) {
  constexpr int64_t kStride = kUnitPairs * sizeof(int32_t), kSums = kUnitRows * kPanel;
  // The instructions' wrappers do not say that they read memory.
  __asm__ volatile("" ::: "memory");
  for (int64_t begin = 0; begin < pairs * kUnitRows; begin += kSteps * kUnit) {
    const int64_t end = std::min(begin + kSteps * kUnit, pairs * kUnitRows);
    for (int64_t i = 0; i < count; i += 2 * kUnitRows) {
      float* to = out + i * kPanel;
      float* to_more = to + kCoarseRows * kPanel;
      if (begin == 0) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      } else {
        _tile_loadd(0, to, kStride);
        _tile_loadd(1, to + kSums, kStride);
        _tile_loadd(2, to_more, kStride);
        _tile_loadd(3, to_more + kSums, kStride);
      }
      const int32_t* row = rows + i * pairs;
      const int32_t* more_rows = row + kUnitRows * pairs;
      for (int64_t at = begin; at < end; at += kUnit) {
        _tile_loadd(4, row + at, kStride);
        _tile_loadd(6, panels + at, kStride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, more_rows + at, kStride);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(7, panels + kPanel * pairs + at, kStride);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, to, kStride);
      _tile_stored(1, to + kSums, kStride);
      _tile_stored(2, to_more, kStride);
      _tile_stored(3, to_more + kSums, kStride);
    }
  }
  __asm__ volatile("" ::: "memory");
}
#endif

float first_of(int32_t pair) { return widen(BFloat16{static_cast<uint16_t>(static_cast<uint32_t>(pair))}); }
float second_of(int32_t pair) { return widen(BFloat16{static_cast<uint16_t>(static_cast<uint32_t>(pair) >> 16)}); }

void in_plain_code(float* out, const int32_t* rows, const int32_t* panels, int64_t pairs, int count) {
  for (int64_t panel = 0; panel < kCoarsePanels; ++panel) {
    for (int64_t i = 0; i < count; ++i) {
      const int32_t* row = rows + i / kUnitRows * kUnitRows * pairs + i % kUnitRows * kUnitPairs;
      float sums[kPanel] = {};
      for (int64_t p = 0; p < pairs; ++p) {
        const int32_t a = row[p / kUnitPairs * kUnit + p % kUnitPairs];
        const int32_t* centroids = panels + (panel * pairs + p) * kPanel;
        for (int64_t k = 0; k < kPanel; ++k) {
          sums[k] += first_of(a) * first_of(centroids[k]) + second_of(a) * second_of(centroids[k]);
        }
      }
      std::copy(sums, sums + kPanel, out + (panel * kCoarseRows + i) * kPanel);
    }
  }
}

}  // namespace

CoarseTile coarse_tile(Tiles tiles) {
#ifdef SPEECHLM_HAVE_AMX
  if (tiles == Tiles::kAmx) return &by_unit;
#else
  (void)tiles;
#endif
  return &in_plain_code;
}

}  // namespace speechlm
