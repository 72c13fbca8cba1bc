// Sums of rows, compiled once per instruction set; see common/cpu/simd.h.
#include "multistream_embed/rows.h"

namespace speechlm {
namespace SX_SIMD {
namespace {

// Sums of 64 elements stay in registers while the rows pass.
constexpr int64_t kBlock = 64;

template <typename T>
void set(Accumulator<T>* __restrict acc, const T* __restrict row, int64_t n, Accumulator<T> scale) {
  for (int64_t i = 0; i < n; ++i) acc[i] = scale * widen(row[i]);
}

template <typename T>
void add(Accumulator<T>* __restrict acc, const T* __restrict row, int64_t n, Accumulator<T> scale) {
  for (int64_t i = 0; i < n; ++i) acc[i] = acc[i] + scale * widen(row[i]);
}

template <typename T>
void store(T* __restrict out, const Accumulator<T>* __restrict acc, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(acc[i], out[i]);
}

template <typename T>
void sum(T* __restrict out, const T* const* rows, int64_t count, int64_t n) {
  int64_t begin = 0;
  for (; begin + kBlock <= n; begin += kBlock) {
    Accumulator<T> acc[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) acc[i] = widen(rows[0][begin + i]);
    for (int64_t r = 1; r < count; ++r) {
      const T* __restrict row = rows[r] + begin;
      for (int64_t i = 0; i < kBlock; ++i) acc[i] = acc[i] + widen(row[i]);
    }
    for (int64_t i = 0; i < kBlock; ++i) narrow(acc[i], out[begin + i]);
  }
  for (; begin < n; ++begin) {
    Accumulator<T> acc = widen(rows[0][begin]);
    for (int64_t r = 1; r < count; ++r) acc = acc + widen(rows[r][begin]);
    narrow(acc, out[begin]);
  }
}

}  // namespace

template <typename T>
const RowLoops<T>& row_loops() {
  static const RowLoops<T> table{&set<T>, &add<T>, &store<T>, &sum<T>};
  return table;
}

#define SX_INSTANTIATE(T) template const RowLoops<T>& row_loops<T>();
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace SX_SIMD
}  // namespace speechlm
