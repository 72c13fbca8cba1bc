// decode_attention on the CPU: threads share the splits of all rows and key/value heads; then each head's splits are
// joined in order.
#include <algorithm>
#include <vector>

#include "common/cpu/aligned.h"
#include "common/cpu/parallel.h"
#include "decode_layer/loops.h"

namespace speechlm {

namespace {

struct Split {
  int64_t row, first_key, count;
};

}  // namespace

template <typename T>
void decode_attention_cpu(const AttentionArgs<T>& a, int threads) {
  using Acc = Accumulator<T>;
  const CacheView<const T>& cache = a.cache;
  const int64_t M = a.num_rows, H = a.num_heads, G = cache.num_heads, E = cache.key_size, F = cache.value_size;
  if (H == 0 || G == 0) return;
  const int64_t Q = H / G, padded_E = padded_lanes(E), padded_F = padded_lanes(F);
  std::vector<Split> splits;
  std::vector<int64_t> first_split(M + 1, 0);
  for (int64_t m = 0; m < M; ++m) {
    const KeyRange range = key_range(a, m);
    for (int64_t k = range.begin; k < range.end; k += kCpuSplit) {
      splits.push_back({m, k, std::min(kCpuSplit, range.end - k)});
    }
    first_split[m + 1] = static_cast<int64_t>(splits.size());
  }
  const int64_t num_splits = first_split[M];
  AlignedVector<Acc> outs(num_splits * H * padded_F), queries(M * H * padded_E), largest(num_splits * H),
      totals(num_splits * H);
  for (int64_t i = 0; i < M * H; ++i) {
    decode_row_loops<T>().widen_row(queries.data() + i * padded_E, a.query + i * E, E);
  }
  const DecodeAttentionLoops<T>& loops = decode_attention_loops<T>();
  // Of split i and the heads of key/value head g.
  const auto args_of = [&](int64_t i, int64_t g) {
    SplitArgs<T> s;
    s.num_heads = Q;
    s.key_size = E;
    s.value_size = F;
    s.out = outs.data() + (i * H + g * Q) * padded_F;
    s.largest = largest.data() + i * H + g * Q;
    s.total = totals.data() + i * H + g * Q;
    return s;
  };
  const int64_t split_work = kCpuSplit * Q * (E + F);
  constexpr int64_t kGrainWork = 16 * 1024;  // products: less is not worth waking a thread
  parallel_for(num_splits * G, ceil_div(kGrainWork, std::max<int64_t>(split_work, 1)), threads,
               [&](int64_t begin, int64_t end) {
                 AlignedVector<Acc> scores(Q * kCpuSplit);
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t i = item / G, g = item % G;
                   const Split& split = splits[i];
                   SplitArgs<T> s = args_of(i, g);
                   s.count = split.count;
                   s.key_stride = cache.key_row_stride;
                   s.value_stride = cache.value_row_stride;
                   s.scale = static_cast<Acc>(a.scale);
                   s.softcap = static_cast<Acc>(a.softcap);
                   s.query = queries.data() + (split.row * H + g * Q) * padded_E;
                   s.keys = cache.key(a.slot[split.row], split.first_key, g);
                   s.values = cache.value(a.slot[split.row], split.first_key, g);
                   s.scores = scores.data();
                   loops.split(s);
                 }
               });
  constexpr int64_t kGrainHeads = 64;
  parallel_for(M * H, kGrainHeads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = i / H, h = i % H, count = first_split[m + 1] - first_split[m];
      T* out = a.out + i * F;
      if (count == 0) {
        for (int64_t f = 0; f < F; ++f) narrow(Acc{0}, out[f]);
        continue;
      }
      SplitArgs<T> s = args_of(first_split[m], 0);
      s.out += h * padded_F;
      s.largest += h;
      s.total += h;
      loops.merge(out, s, count, H, a.sinks != nullptr ? a.sinks + h : nullptr);
    }
  });
}

#define SX_INSTANTIATE(T) template void decode_attention_cpu<T>(const AttentionArgs<T>&, int);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
