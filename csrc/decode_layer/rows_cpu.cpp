// add_rms_norm, rope_and_store and silu_mul on the CPU: threads share the rows.
#include <algorithm>

#include "common/cpu/aligned.h"
#include "common/cpu/parallel.h"
#include "decode_layer/loops.h"

namespace speechlm {

namespace {

// Values that a thread should have: fewer are not worth waking it.
constexpr int64_t kGrainValues = 16 * 1024;

int64_t grain_of(int64_t width) { return ceil_div(kGrainValues, std::max<int64_t>(width, 1)); }

}  // namespace

template <typename T>
void add_rms_norm_cpu(const NormArgs<T>& a, int threads) {
  const DecodeRowLoops<T>& loops = decode_row_loops<T>();
  parallel_for(a.num_rows, grain_of(a.width), threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) loops.norm(a, m);
  });
}

template <typename T, typename C>
void rope_and_store_cpu(const RotaryArgs<T, C>& a, int threads) {
  const RotaryLoops<T, C>& loops = rotary_loops<T, C>();
  parallel_for(a.num_rows, grain_of(a.qkv_width()), threads, [&](int64_t begin, int64_t end) {
    AlignedVector<Accumulator<T>> head(padded_lanes(a.cache.key_size));
    for (int64_t m = begin; m < end; ++m) loops.row(a, m, head.data());
  });
}

template <typename T>
void silu_mul_cpu(const GateArgs<T>& a, int threads) {
  const DecodeRowLoops<T>& loops = decode_row_loops<T>();
  parallel_for(a.num_rows, grain_of(a.width), threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* gate = a.gate_up + m * 2 * a.width;
      loops.silu_mul(a.out + m * a.width, gate, gate + a.width, a.width);
    }
  });
}

#define SX_INSTANTIATE(T)                                     \
  template void add_rms_norm_cpu<T>(const NormArgs<T>&, int); \
  template void silu_mul_cpu<T>(const GateArgs<T>&, int);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE
#define SX_INSTANTIATE(T, C) template void rope_and_store_cpu<T, C>(const RotaryArgs<T, C>&, int);
SX_FOR_TABLES(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
