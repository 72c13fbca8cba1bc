// decode_linear, compiled once per instruction set; see common/cpu/simd.h. A tile keeps the sums of a few rows of x
// with a few rows of the weight in registers, sixteen partial sums each, while K passes.
#include "decode_layer/lanes.h"
#include "decode_layer/loops.h"

namespace speechlm {
namespace SX_SIMD {
namespace {

// Rows of x in the largest tile, and rows of the weight in a tile of that many rows or fewer.
#if defined(__AVX512BW__)
constexpr int kMaxTileRows = 6;
constexpr int tile_columns(int rows) { return rows <= 2 ? 8 : 4; }
#elif defined(__AVX2__)
constexpr int kMaxTileRows = 2;
constexpr int tile_columns(int rows) { return rows == 1 ? 4 : 2; }
#else
constexpr int kMaxTileRows = 2;
constexpr int tile_columns(int) { return 2; }
#endif

template <typename T, int kRows, int kColumns>
void tile(const LinearArgs<T>& a, const Accumulator<T>* x, int64_t x_stride, int64_t row, int64_t column) {
  using Acc = Accumulator<T>;
  const T* weight = a.weight + column * a.weight_stride;
  Lanes<Acc> parts[kRows][kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) parts[i][j] = fill(Acc{0});
  }
  const auto add = [&](int64_t k, const auto& load_weight) {
    Lanes<Acc> w[kColumns];
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) w[j] = load_weight(weight + j * a.weight_stride + k);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Lanes<Acc> v = load(x + i * x_stride + k);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) parts[i][j] = multiply_add(w[j], v, parts[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= a.width; k += kLanes) add(k, [](const T* w) { return load(w); });
  if (k < a.width) add(k, [n = a.width - k](const T* w) { return load_part(w, n); });
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      Acc value = sum(parts[i][j]);
      if (a.bias != nullptr) value += widen(a.bias[column + j]);
      narrow(value, a.out[(row + i) * a.num_outputs + column + j]);
    }
  }
}

template <typename T, int kRows, int kColumns>
void tiles(const LinearArgs<T>& a, const Accumulator<T>* x, int64_t x_stride, int64_t row, int64_t column, int rows) {
  if (rows == kRows) {
    tile<T, kRows, kColumns>(a, x, x_stride, row, column);
  } else if constexpr (kRows > 1) {
    tiles<T, kRows - 1, kColumns>(a, x, x_stride, row, column, rows);
  }
}

template <typename T, int kColumns>
void column_tile(const LinearArgs<T>& a, const Accumulator<T>* x, int64_t x_stride, int64_t first, int64_t count,
                 int64_t column) {
  for (int64_t i = 0; i < count;) {
    const int64_t left = count - i;
    // Seven are four and three, not six and one: small tiles wait for their loads.
    const int rows = static_cast<int>(left <= kMaxTileRows ? left : kMaxTileRows > 4 ? 4 : kMaxTileRows);
    tiles<T, kMaxTileRows, kColumns>(a, x + i * x_stride, x_stride, first + i, column, rows);
    i += rows;
  }
}

template <typename T>
void columns(const LinearArgs<T>& a, const Accumulator<T>* x, int64_t x_stride, int64_t first, int64_t count,
             int64_t begin, int64_t end) {
  int64_t n = begin;
  constexpr int kWide = tile_columns(1), kUsual = tile_columns(kMaxTileRows);
  if (count == 1) {
    for (; n + kWide <= end; n += kWide) tile<T, 1, kWide>(a, x, x_stride, first, n);
  } else if (count == 2) {
    constexpr int kPair = tile_columns(2);
    for (; n + kPair <= end; n += kPair) tile<T, 2, kPair>(a, x, x_stride, first, n);
  } else {
    for (; n + kUsual <= end; n += kUsual) column_tile<T, kUsual>(a, x, x_stride, first, count, n);
  }
  for (; n < end; ++n) column_tile<T, 1>(a, x, x_stride, first, count, n);
}

}  // namespace

template <typename T>
const DecodeLinearLoops<T>& decode_linear_loops() {
  static const DecodeLinearLoops<T> table{&columns<T>};
  return table;
}

#define SX_INSTANTIATE(T) template const DecodeLinearLoops<T>& decode_linear_loops<T>();
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace SX_SIMD
}  // namespace speechlm
