// multistream_embed on the CPU. Forward: rows are shared among threads, and the table rows of the next output row are
// fetched ahead, because they lie anywhere in a table far larger than the caches. Backward: pairs (id, place) are
// sorted by id, and each touched row of the gradient is summed by one thread and written once.
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "common/parallel.h"
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

constexpr int64_t kGrainBytes = 128 * 1024;  // less than this is not worth waking a thread
constexpr int64_t kLine = 64;
constexpr int64_t kAhead = 4096;  // bytes of each coming row that are fetched ahead

void fetch(const void* row, int64_t bytes) {
  const char* p = static_cast<const char*>(row);
  for (int64_t b = 0; b < std::min(bytes, kAhead); b += kLine) __builtin_prefetch(p + b, 0, 2);
}

// The table rows of one output row.
template <typename T>
struct Members {
  std::array<const T*, kMostStreams> rows;
  std::array<double, kMostStreams> scale;
  int64_t count = 0;
};

template <typename T, typename Id>
Members<T> members_of(const EmbedArgs<T, Id>& a, int64_t n, int64_t& bad) {
  Members<T> m;
  const int64_t S = a.shape.num_streams;
  for (int64_t s = 0; s < S; ++s) {
    const int64_t row = table_row(a.rule, a.shape.table_rows, a.ids[n * S + s], s);
    if (row == -2) bad = std::min(bad, n * S + s);
    if (row < 0) continue;
    m.rows[m.count] = a.table + row * a.shape.width;
    m.scale[m.count++] = a.rule.scale[s];
  }
  return m;
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
    Members<T> next = members_of(a, begin, bad);
    for (int64_t n = begin; n < end; ++n) {
      const Members<T> now = next;
      if (n + 1 < end) {
        next = members_of(a, n + 1, bad);
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

namespace {

struct Pair {
  uint32_t row;
  uint32_t place;  // n * S + s
};

// Stable sort by row: bytes that all rows share are skipped.
void sort_pairs_by_row(std::vector<Pair>& pairs, int64_t table_rows) {
  constexpr int kBits = 11;
  std::vector<Pair> other(pairs.size());
  for (int shift = 0; shift < 32 && (table_rows - 1) >> shift > 0; shift += kBits) {
    std::array<uint32_t, (1 << kBits) + 1> start{};
    for (const Pair& p : pairs) ++start[(p.row >> shift & ((1u << kBits) - 1)) + 1];
    for (size_t i = 1; i < start.size(); ++i) start[i] += start[i - 1];
    for (const Pair& p : pairs) other[start[p.row >> shift & ((1u << kBits) - 1)]++] = p;
    pairs.swap(other);
  }
}

// Members [begin, end) of the sorted pairs, all of one row. A run of up to kPiece members is one piece, which writes
// the row; the pieces of a longer run write partial sums, which are added in order afterwards.
struct Piece {
  int64_t begin;
  int64_t end;
  int64_t partial;  // index of the partial sum, -1: writes the row itself
};

}  // namespace

template <typename T, typename Id>
void scatter_sum_cpu(const ScatterSumArgs<T, Id>& a, int threads) {
  using Acc = Accumulator<T>;
  const int64_t N = a.shape.num_rows, S = a.shape.num_streams, D = a.shape.width;
  if (D == 0) return;
  SX_CHECK(N * S < (int64_t{1} << 32) && a.shape.table_rows <= (int64_t{1} << 32),
           "multistream_embed: more than 2^32 ids or table rows at a time");
  std::vector<Pair> pairs;
  pairs.reserve(N * S);
  for (int64_t i = 0; i < N * S; ++i) {
    const int64_t row = table_row(a.rule, a.shape.table_rows, a.ids[i], i % S);
    if (row >= 0) pairs.push_back({static_cast<uint32_t>(row), static_cast<uint32_t>(i)});
  }
  sort_pairs_by_row(pairs, a.shape.table_rows);

  const int64_t M = static_cast<int64_t>(pairs.size());
  std::vector<Piece> pieces;
  std::vector<std::pair<int64_t, int64_t>> long_runs;  // pieces [first, last) of a run that was split
  int64_t num_partials = 0;
  for (int64_t begin = 0, end; begin < M; begin = end) {
    for (end = begin + 1; end < M && pairs[end].row == pairs[begin].row;) ++end;
    const bool is_long = end - begin > kPiece;
    if (is_long) long_runs.emplace_back(pieces.size(), pieces.size() + (end - begin + kPiece - 1) / kPiece);
    for (int64_t b = begin; b < end; b += kPiece) {
      pieces.push_back({b, std::min(end, b + kPiece), is_long ? num_partials++ : -1});
    }
  }
  std::vector<Acc> partials(num_partials * D);
  const RowLoops<T>& loops = row_loops<T>();
  const auto source = [&](int64_t i) { return a.values + pairs[i].place / S * D; };
  const int64_t piece_bytes = D * static_cast<int64_t>(sizeof(T)) * 2;
  parallel_for(static_cast<int64_t>(pieces.size()), kGrainBytes / std::max<int64_t>(piece_bytes, 1), threads,
               [&](int64_t first, int64_t last) {
                 std::vector<Acc> own(D);
                 for (int64_t p = first; p < last; ++p) {
                   const Piece& piece = pieces[p];
                   T* out = a.out + pairs[piece.begin].row * D;
                   if (p + 1 < last) fetch(source(pieces[p + 1].begin), D * static_cast<int64_t>(sizeof(T)));
                   if (piece.end == piece.begin + 1 && piece.partial < 0 && !a.rule.has_scale) {
                     std::memcpy(static_cast<void*>(out), source(piece.begin), D * sizeof(T));
                     continue;
                   }
                   Acc* acc = piece.partial >= 0 ? partials.data() + piece.partial * D : own.data();
                   for (int64_t i = piece.begin; i < piece.end; ++i) {
                     const Acc scale = a.rule.has_scale ? static_cast<Acc>(a.rule.scale[pairs[i].place % S]) : Acc{1};
                     (i == piece.begin ? loops.set : loops.add)(acc, source(i), D, scale);
                   }
                   if (piece.partial < 0) loops.store(out, acc, D);
                 }
               });
  parallel_for(static_cast<int64_t>(long_runs.size()), 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const Piece& head = pieces[long_runs[r].first];
      Acc* acc = partials.data() + head.partial * D;
      for (int64_t p = long_runs[r].first + 1; p < long_runs[r].second; ++p) {
        const Acc* more = partials.data() + pieces[p].partial * D;
        for (int64_t i = 0; i < D; ++i) acc[i] += more[i];
      }
      loops.store(a.out + pairs[head.begin].row * D, acc, D);
    }
  });
}

#define SX_INSTANTIATE(T)                                                             \
  template const RowLoops<T>& row_loops<T>();                                         \
  template void multistream_embed_cpu<T, int32_t>(const EmbedArgs<T, int32_t>&, int); \
  template void multistream_embed_cpu<T, int64_t>(const EmbedArgs<T, int64_t>&, int); \
  template void scatter_sum_cpu<T, int32_t>(const ScatterSumArgs<T, int32_t>&, int);  \
  template void scatter_sum_cpu<T, int64_t>(const ScatterSumArgs<T, int64_t>&, int);
SX_INSTANTIATE(float)
SX_INSTANTIATE(double)
SX_INSTANTIATE(BFloat16)
SX_INSTANTIATE(Float16)
#undef SX_INSTANTIATE

}  // namespace speechlm
