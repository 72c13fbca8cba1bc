// decode_linear on the CPU: threads share the rows of the weight, which is read from memory once for every kLinearRows
// rows of x.
#include <algorithm>

#include "common/cpu/aligned.h"
#include "common/cpu/parallel.h"
#include "decode_layer/loops.h"

namespace speechlm {

namespace {

// Rows of the weight that stay in a core's cache while all rows of x pass.
constexpr int64_t kPanelBytes = 256 * 1024;
constexpr int64_t kColumnStep = 8;  // a whole number of tiles

}  // namespace

template <typename T>
void decode_linear_cpu(const LinearArgs<T>& a, int threads) {
  using Acc = Accumulator<T>;
  const DecodeLinearLoops<T>& loops = decode_linear_loops<T>();
  const int64_t stride = padded_lanes(a.width);
  // As wide as sums, and whole lanes: as it is, or copied.
  AlignedVector<Acc> copied;
  const Acc* x = nullptr;
  if constexpr (std::is_same_v<T, Acc>) {
    if (stride == a.width) x = a.x;
  }
  if (x == nullptr) {
    copied.resize(a.num_rows * stride);
    for (int64_t m = 0; m < a.num_rows; ++m) {
      decode_row_loops<T>().widen_row(copied.data() + m * stride, a.x + m * a.width, a.width);
    }
    x = copied.data();
  }
  const int64_t step_bytes = kColumnStep * std::max<int64_t>(a.width, 1) * static_cast<int64_t>(sizeof(T));
  const int64_t panel = kColumnStep * std::max<int64_t>(1, kPanelBytes / step_bytes);
  constexpr int64_t kGrainBytes = 32 * 1024;  // less is not worth waking a thread
  const int64_t grain = ceil_div(kGrainBytes, step_bytes);
  parallel_for(ceil_div(a.num_outputs, kColumnStep), grain, threads, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kColumnStep, a.num_outputs);
    for (int64_t n = begin * kColumnStep; n < last; n += panel) {
      for (int64_t m = 0; m < a.num_rows; m += kLinearRows) {
        loops.columns(a, x + m * stride, stride, m, std::min(kLinearRows, a.num_rows - m), n,
                      std::min(last, n + panel));
      }
    }
  });
}

#define SX_INSTANTIATE(T) template void decode_linear_cpu<T>(const LinearArgs<T>&, int);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
