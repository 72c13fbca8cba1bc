// scatter_sum on the CPU: a radix sort of the pairs, then each touched row of the result is summed by one thread and
// written once.
#include "scatter_sum/scatter_sum.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "common/cpu/parallel.h"
#include "multistream_embed/fetch.h"
#include "multistream_embed/rows.h"

namespace speechlm {
namespace {

// By row, stable; digits that are zero in every row are skipped.
void radix_sort(std::vector<RowPair>& pairs, int64_t table_rows) {
  constexpr int kBits = 11;
  std::vector<RowPair> other(pairs.size());
  for (int shift = 0; shift < 32 && (table_rows - 1) >> shift > 0; shift += kBits) {
    std::array<uint32_t, (1 << kBits) + 1> start{};
    for (const RowPair& p : pairs) ++start[(p.row >> shift & ((1u << kBits) - 1)) + 1];
    for (size_t i = 1; i < start.size(); ++i) start[i] += start[i - 1];
    for (const RowPair& p : pairs) other[start[p.row >> shift & ((1u << kBits) - 1)]++] = p;
    pairs.swap(other);
  }
}

// Members [begin, end) of the sorted pairs, all of one row. A run of up to kPiece members is one piece, which writes
// the row; the pieces of a longer run write partial sums, which are added in order afterwards.
struct Piece {
  int64_t begin;
  int64_t end;
  int64_t out;      // row of the result
  int64_t partial;  // index of the partial sum, -1: writes the row itself
};

}  // namespace

template <typename Id>
SortedPairs sort_pairs_cpu(const EmbedShape& shape, const EmbedRule& rule, const Id* ids) {
  const int64_t N = shape.num_rows, S = shape.num_streams;
  SX_CHECK(N * S < (int64_t{1} << 32) && shape.table_rows <= (int64_t{1} << 32),
           "scatter_sum: more than 2^32 ids or table rows at a time");
  SortedPairs sorted;
  sorted.shape = shape;
  std::vector<RowPair>& pairs = sorted.pairs;
  pairs.reserve(N * S);
  for (int64_t i = 0; i < N * S; ++i) {
    const int64_t row = table_row(rule, shape.table_rows, ids[i], i % S);
    if (row >= 0) pairs.push_back({static_cast<uint32_t>(row), static_cast<uint32_t>(i)});
    if (row == -2 && sorted.first_bad < 0) sorted.first_bad = i;
  }
  radix_sort(pairs, shape.table_rows);
  for (size_t i = 0; i < pairs.size(); ++i) sorted.touched += i == 0 || pairs[i].row != pairs[i - 1].row;
  return sorted;
}

template <typename T>
void scatter_sum_cpu(const ScatterSumArgs<T>& a, const SortedPairs& sorted, int threads) {
  using Acc = Accumulator<T>;
  const std::vector<RowPair>& pairs = sorted.pairs;
  const int64_t M = static_cast<int64_t>(pairs.size()), S = a.shape.num_streams, D = a.shape.width;
  std::vector<Piece> pieces;
  std::vector<std::pair<int64_t, int64_t>> long_runs;  // pieces [first, last) of a run that was split
  int64_t num_partials = 0, run = 0;
  for (int64_t begin = 0, end; begin < M; begin = end, ++run) {
    for (end = begin + 1; end < M && pairs[end].row == pairs[begin].row;) ++end;
    if (a.rows != nullptr) a.rows[run] = pairs[begin].row;
    const bool is_long = end - begin > kPiece;
    if (is_long) long_runs.emplace_back(pieces.size(), pieces.size() + ceil_div(end - begin, kPiece));
    for (int64_t b = begin; b < end; b += kPiece) {
      const int64_t out = a.rows != nullptr ? run : static_cast<int64_t>(pairs[begin].row);
      pieces.push_back({b, std::min(end, b + kPiece), out, is_long ? num_partials++ : -1});
    }
  }
  if (D == 0) return;
  std::vector<Acc> partials(num_partials * D);
  const RowLoops<T>& loops = row_loops<T>();
  const auto source = [&](int64_t i) { return a.values + pairs[i].place / S * D; };
  const int64_t piece_bytes = D * static_cast<int64_t>(sizeof(T)) * 2;
  parallel_for(static_cast<int64_t>(pieces.size()), kGrainBytes / std::max<int64_t>(piece_bytes, 1), threads,
               [&](int64_t first, int64_t last) {
                 std::vector<Acc> own(D);
                 for (int64_t p = first; p < last; ++p) {
                   const Piece& piece = pieces[p];
                   T* out = a.out + piece.out * D;
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
      loops.store(a.out + head.out * D, acc, D);
    }
  });
}

template SortedPairs sort_pairs_cpu(const EmbedShape&, const EmbedRule&, const int32_t*);
template SortedPairs sort_pairs_cpu(const EmbedShape&, const EmbedRule&, const int64_t*);
#define SX_INSTANTIATE(T) template void scatter_sum_cpu(const ScatterSumArgs<T>&, const SortedPairs&, int);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
