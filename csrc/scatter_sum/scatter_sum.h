// scatter_sum, the backward of multistream_embed: grad[v] = sum of scale[s] * values[n] over all (n, s) with
// ids[n, s] + offset[s] == v. Either the whole gradient [V, D], or, compact, only its K touched rows. With one stream
// and no pads it is the public op segment_sum.
//
// Two steps: pairs (table row, place) are sorted by row, then each run of one row is summed. Sums are kept in float
// (double for double), in the order of (n, s) within pieces and then piece by piece (CPU: kPiece members from the first
// on; CUDA: chunks of the sorted pairs), and rounded once. So the bits depend neither on threads nor on chance, nor on
// whether the result is compact, only on the kind of device.
#pragma once

#include <vector>

#include "multistream_embed/multistream_embed.h"

namespace speechlm {

constexpr int64_t kPiece = 256;

struct RowPair {
  uint32_t row;
  uint32_t place;  // n * S + s
};

// Of the real ids, by row; equal rows keep the order of their places.
struct SortedPairs {
  EmbedShape shape;
  std::vector<RowPair> pairs;
  int64_t touched = 0;     // K, different rows among them
  int64_t first_bad = -1;  // place of the first id outside the table
};

template <typename T>
struct ScatterSumArgs {
  EmbedShape shape;
  EmbedRule rule;
  const T* values = nullptr;  // [N, D]
  T* out = nullptr;           // [V, D], on the CPU zero before; compact: [K, D]
  int64_t* rows = nullptr;    // compact: [K], becomes the touched rows of the table, ascending; else null
};

template <typename Id>
SortedPairs sort_pairs_cpu(const EmbedShape& shape, const EmbedRule& rule, const Id* ids);
template <typename T>
void scatter_sum_cpu(const ScatterSumArgs<T>& args, const SortedPairs& sorted, int threads);

// The same two steps; between them the pairs stay in `workspace`, of scatter_sum_workspace bytes. `touched` becomes K;
// it is null where the result will not be compact.
template <typename Id>
void sort_pairs_cuda(const EmbedShape& shape, const EmbedRule& rule, const Id* ids, void* workspace, int64_t* touched,
                     int device, void* stream);
template <typename T>
void scatter_sum_cuda(const ScatterSumArgs<T>& args, void* workspace, int device, void* stream);
int64_t scatter_sum_workspace(const EmbedShape& shape, bool is_double, int device);

}  // namespace speechlm
