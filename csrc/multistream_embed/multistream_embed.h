// multistream_embed: out[n] = sum over s of scale[s] * table[ids[n, s] + offset[s]], where pads add nothing, plus the
// row of continuous features that belongs there, if one does. Its backward is in scatter_sum.h.
//
// Sums are kept in float (double for double), in the order of the streams with the feature last, and rounded once.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "common/host_device.h"

namespace speechlm {

constexpr int kMaxStreams = 64;

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
  int64_t offset[kMaxStreams] = {};
  double scale[kMaxStreams] = {};
};

template <typename T, typename Id>
struct EmbedArgs {
  EmbedShape shape;
  EmbedRule rule;
  const Id* ids = nullptr;         // [N, S]
  const T* table = nullptr;        // [V, D]
  const T* features = nullptr;     // [M, D], or null
  const int32_t* slots = nullptr;  // [N]: the row of features that each output row takes in, -1 for none; or null
  T* out = nullptr;                // [N, D]
  int64_t* bad = nullptr;          // n * S + s of the first id outside the table, else left as it is (CUDA) or N * S
};

// The output row of each feature; the slots are their inverse.
struct FeaturePlaces {
  int64_t num_features = 0;            // M
  int64_t num_rows = 0;                // N
  const int64_t* positions = nullptr;  // [M] distinct rows of the output, in any order
  int32_t* slots = nullptr;            // [N]; CUDA: -1 before
  int64_t* bad = nullptr;              // CUDA, or null: becomes -1 if a position is out of range or used twice
};

template <typename T, typename Id>
void multistream_embed_cpu(const EmbedArgs<T, Id>& args, int threads);
// Fills the slots. False if a position is out of range or used twice.
bool scatter_slots_cpu(const FeaturePlaces& places);

// `stream` is a cudaStream_t; the launches are asynchronous and can be captured.
template <typename T, typename Id>
void multistream_embed_cuda(const EmbedArgs<T, Id>& args, int device, void* stream);
// A position out of range is left out; of a position used twice the last feature counts.
void scatter_slots_cuda(const FeaturePlaces& places, int device, void* stream);

// The row of the table for an id of stream s; -1 for a pad, -2 for one outside the table.
template <typename Id>
SX_HOST_DEVICE inline int64_t table_row(const EmbedRule& rule, int64_t table_rows, Id id, int64_t s) {
  if (rule.has_pad && static_cast<int64_t>(id) == rule.pad_id) return -1;
  const int64_t wide = static_cast<int64_t>(id), offset = rule.offset[s];
  const int64_t row = wrapping_add(wide, offset);
  const bool overflow = ((wide ^ row) & (offset ^ row)) < 0;
  return row >= 0 && row < table_rows && !overflow ? row : -2;
}

}  // namespace speechlm
