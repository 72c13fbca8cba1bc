// multistream_embed: out[n] = sum over s of scale[s] * table[ids[n, s] + offset[s]], where pads add nothing; and
// scatter_sum, which is its backward: grad[v] = sum of scale[s] * values[n] over all (n, s) with ids[n, s] + offset[s]
// == v. With one stream and no pads scatter_sum is the public op segment_sum.
//
// Sums are kept in float (double for double) and rounded once. scatter_sum adds in the order of (n, s) within pieces
// and then piece by piece (CPU: kPiece members from the first on; CUDA: chunks of the sorted pairs), so the bits depend
// neither on threads nor on chance, only on which of the two devices it was.
#pragma once

#include <cstdint>

#include "common/check.h"

namespace speechlm {

constexpr int kMostStreams = 64;
constexpr int64_t kPiece = 256;

struct EmbedShape {
  int64_t num_rows = 0;     // N
  int64_t num_streams = 0;  // S
  int64_t table_rows = 0;   // V
  int64_t width = 0;        // D
};

// How an id becomes a row of the table; small enough to be a kernel's argument.
struct EmbedRule {
  bool has_pad = false;
  bool has_scale = false;
  int64_t pad_id = 0;
  int64_t offset[kMostStreams] = {};
  double scale[kMostStreams] = {};
};

template <typename T, typename Id>
struct EmbedArgs {
  EmbedShape shape;
  EmbedRule rule;
  const Id* ids = nullptr;   // [N, S]
  const T* table = nullptr;  // [V, D]
  T* out = nullptr;          // [N, D]
  int64_t* bad = nullptr;    // [1]: n * S + s of the first id outside the table, else N * S
};

template <typename T, typename Id>
struct ScatterSumArgs {
  EmbedShape shape;
  EmbedRule rule;
  const Id* ids = nullptr;    // [N, S]
  const T* values = nullptr;  // [N, D]
  T* out = nullptr;           // [V, D], zero before
  void* workspace = nullptr;  // CUDA only: scatter_sum_workspace bytes
};

template <typename T, typename Id>
void multistream_embed_cpu(const EmbedArgs<T, Id>& args, int threads);
template <typename T, typename Id>
void scatter_sum_cpu(const ScatterSumArgs<T, Id>& args, int threads);

// `stream` is a cudaStream_t; the launches are asynchronous and can be captured.
template <typename T, typename Id>
void multistream_embed_cuda(const EmbedArgs<T, Id>& args, int device, void* stream);
template <typename T, typename Id>
void scatter_sum_cuda(const ScatterSumArgs<T, Id>& args, int device, void* stream);
// Bytes of device memory that scatter_sum_cuda needs beside its tensors.
int64_t scatter_sum_workspace(const EmbedShape& shape, bool is_double);

// The row of the table for an id of stream s; -1 for a pad, -2 for one outside the table.
template <typename Id>
#ifdef __CUDACC__
__host__ __device__
#endif
    inline int64_t table_row(const EmbedRule& rule, int64_t table_rows, Id id, int64_t s) {
  if (rule.has_pad && static_cast<int64_t>(id) == rule.pad_id) return -1;
  const int64_t row = static_cast<int64_t>(id) + rule.offset[s];
  return row >= 0 && row < table_rows ? row : -2;
}

}  // namespace speechlm
