// multistream_embed on the CPU: rows are shared among threads, and the table rows of the next output row are fetched
// ahead, because they lie anywhere in a table far larger than the caches.
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "common/cpu/parallel.h"
#include "multistream_embed/fetch.h"
#include "multistream_embed/multistream_embed.h"
#include "multistream_embed/rows.h"

namespace speechlm {

#define SX_LOOPS(set)         \
  namespace set {             \
  template <typename T>       \
  const RowLoops<T>& loops(); \
  }
SX_LOOPS(generic)
#ifdef SPEECHLM_SIMD_X86
SX_LOOPS(avx2)
SX_LOOPS(avx512)
#endif
#undef SX_LOOPS

template <typename T>
const RowLoops<T>& row_loops() {
#ifdef SPEECHLM_SIMD_X86
  if (simd_in_use() == Simd::kAvx512) return avx512::loops<T>();
  if (simd_in_use() == Simd::kAvx2) return avx2::loops<T>();
#endif
  return generic::loops<T>();
}

namespace {

// The rows that one output row sums: the table's, then the features'.
template <typename T>
struct Members {
  std::array<const T*, kMostStreams + 1> rows;
  std::array<double, kMostStreams + 1> scale;
  int64_t count = 0;
};

template <typename T, typename Id>
void find_members(const EmbedArgs<T, Id>& a, int64_t n, Members<T>& m, int64_t& bad) {
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
    Members<T> members[2];
    find_members(a, begin, members[begin % 2], bad);
    for (int64_t n = begin; n < end; ++n) {
      const Members<T>& now = members[n % 2];
      if (n + 1 < end) {
        Members<T>& next = members[(n + 1) % 2];
        find_members(a, n + 1, next, bad);
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
    for (int64_t seen = first_bad; bad < seen && !first_bad.compare_exchange_weak(seen, bad);) {
    }
  });
  *a.bad = first_bad;
}

bool place_features_cpu(const FeaturePlaces& p) {
  std::fill(p.slots, p.slots + p.num_rows, -1);
  for (int64_t m = 0; m < p.num_features; ++m) {
    const int64_t n = p.positions[m];
    if (n < 0 || n >= p.num_rows || p.slots[n] >= 0) return false;
    p.slots[n] = static_cast<int32_t>(m);
  }
  return true;
}

#define SX_INSTANTIATE(T)                                                             \
  template const RowLoops<T>& row_loops<T>();                                         \
  template void multistream_embed_cpu<T, int32_t>(const EmbedArgs<T, int32_t>&, int); \
  template void multistream_embed_cpu<T, int64_t>(const EmbedArgs<T, int64_t>&, int);
SX_INSTANTIATE(float)
SX_INSTANTIATE(double)
SX_INSTANTIATE(BFloat16)
SX_INSTANTIATE(Float16)
#undef SX_INSTANTIATE

}  // namespace speechlm
