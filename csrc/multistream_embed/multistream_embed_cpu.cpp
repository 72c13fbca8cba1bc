// multistream_embed on the CPU: rows are shared among threads, and the table rows of the next output row are
// prefetched, because they are scattered over a table far larger than the caches.
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "common/cpu/parallel.h"
#include "multistream_embed/fetch.h"
#include "multistream_embed/multistream_embed.h"
#include "multistream_embed/rows.h"

namespace speechlm {

namespace {

// The rows whose sum is one output row: the table's, then the features'.
template <typename T>
struct SummandRows {
  std::array<const T*, kMaxStreams + 1> rows;
  std::array<double, kMaxStreams + 1> scale;
  int64_t count = 0;
};

template <typename T, typename Id>
void find_summands(const EmbedArgs<T, Id>& a, int64_t n, SummandRows<T>& m, int64_t& bad) {
  m.count = 0;
  const int64_t S = a.shape.num_streams;
  for (int64_t s = 0; s < S; ++s) {
    const int64_t row = table_row(a.rule, a.shape.table_rows, a.ids[n * S + s], s);
    if (row == -2) bad = std::min(bad, n * S + s);
    if (row < 0) continue;
    m.rows[m.count] = a.table + row * a.shape.width;
    m.scale[m.count++] = a.rule.scale[s];
  }
  if (a.slots != nullptr && a.slots[n] >= 0) {
    m.rows[m.count] = a.features + a.slots[n] * a.shape.width;
    m.scale[m.count++] = 1.0;
  }
}

}  // namespace

template <typename T, typename Id>
void multistream_embed_cpu(const EmbedArgs<T, Id>& a, int threads) {
  using Acc = Accumulator<T>;
  const int64_t N = a.shape.num_rows, D = a.shape.width;
  const RowLoops<T>& loops = row_loops<T>();
  std::atomic<int64_t> first_bad{N * a.shape.num_streams};
  const int64_t row_bytes = (a.shape.num_streams + 1) * D * static_cast<int64_t>(sizeof(T));
  parallel_for(N, kGrainBytes / std::max<int64_t>(row_bytes, 1), threads, [&](int64_t begin, int64_t end) {
    int64_t bad = N * a.shape.num_streams;
    std::vector<Acc> acc(a.rule.has_scale ? D : 0);
    SummandRows<T> summands[2];
    find_summands(a, begin, summands[begin % 2], bad);
    for (int64_t n = begin; n < end; ++n) {
      const SummandRows<T>& now = summands[n % 2];
      if (n + 1 < end) {
        SummandRows<T>& next = summands[(n + 1) % 2];
        find_summands(a, n + 1, next, bad);
        for (int64_t i = 0; i < next.count; ++i) fetch(next.rows[i], D * static_cast<int64_t>(sizeof(T)));
      }
      if (D == 0) continue;  // the ids are checked all the same
      T* out = a.out + n * D;
      if (now.count == 0) {
        std::memset(static_cast<void*>(out), 0, D * sizeof(T));
      } else if (a.rule.has_scale) {
        loops.set(acc.data(), now.rows[0], D, static_cast<Acc>(now.scale[0]));
        for (int64_t i = 1; i < now.count; ++i) loops.add(acc.data(), now.rows[i], D, static_cast<Acc>(now.scale[i]));
        loops.store(out, acc.data(), D);
      } else if (now.count == 1) {
        std::memcpy(static_cast<void*>(out), now.rows[0], D * sizeof(T));
      } else {
        loops.sum(out, now.rows.data(), now.count, D);
      }
    }
    atomic_min(first_bad, bad);
  });
  *a.bad = first_bad;
}

bool scatter_slots_cpu(const FeaturePlaces& p) {
  std::fill(p.slots, p.slots + p.num_rows, -1);
  for (int64_t m = 0; m < p.num_features; ++m) {
    const int64_t n = p.positions[m];
    if (n < 0 || n >= p.num_rows || p.slots[n] >= 0) return false;
    p.slots[n] = static_cast<int32_t>(m);
  }
  return true;
}

#define SX_INSTANTIATE(T)                                                             \
  template void multistream_embed_cpu<T, int32_t>(const EmbedArgs<T, int32_t>&, int); \
  template void multistream_embed_cpu<T, int64_t>(const EmbedArgs<T, int64_t>&, int);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
