// The row kernel of multistream_loss: from a chunk of shared logits Z = h W^T to the losses of all streams and, in
// place, to the sum over streams of their logit gradients.
//
// Stream s sees the logits z + bias[s] (bias[s] = e_s W^T + bias) over its scope, a few slices of the chunk's columns:
//   loss = (1 - ls) * nll + ls * mean(lse - y) + z_loss * lse^2,  y = softcap(z + bias), lse = logsumexp(y)
// and adds d(coef * loss + coef_nll * nll)/dz to the columns of its scope.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "common/tensor/small_float.h"

namespace speechlm {

constexpr int64_t kMostLossStreams = 64;

struct LossOptions {
  double z_loss = 0;
  double label_smoothing = 0;
  double softcap = 0;  // 0: none
};

// Columns [begin, begin + count) of the chunk hold the ids from `id` on.
struct LossSlice {
  int64_t id;
  int64_t begin;
  int64_t count;
};

struct LossStream {
  int64_t index;        // column of targets, live, coef
  int64_t first_slice;  // of its slices
  int64_t num_slices;
  int64_t width;  // columns of its scope
  int64_t sums;   // where its column sums start in a block of sums, -1: not wanted
};

// T is the type of the logits; all else is float, or double for double. The CPU takes float and double.
template <typename T>
struct LossRowsArgs {
  using Acc = Accumulator<T>;
  int64_t num_rows = 0;     // of the chunk
  int64_t num_columns = 0;  // of the chunk
  int64_t num_targets = 0;  // S: columns of targets, live, coef, coef_nll, token_nll, token_entropy
  int64_t num_tokens = 0;   // their rows
  int64_t num_streams = 0;  // that this chunk serves
  LossOptions options;
  bool want_grad = false;
  const LossStream* streams = nullptr;  // [num_streams]
  const LossSlice* slices = nullptr;
  T* logits = nullptr;                // [num_rows, num_columns]; becomes the gradient
  const int64_t* rows = nullptr;      // [num_rows] row of targets etc. that each row of the chunk is
  const int64_t* targets = nullptr;   // [*, S]
  const uint8_t* live = nullptr;      // [*, S]
  const Acc* coef = nullptr;          // [*, S]
  const Acc* coef_nll = nullptr;      // [*, S] or null
  const Acc* bias = nullptr;          // [num_streams, num_columns] or null
  Acc* token_nll = nullptr;           // [*, S] or null
  Acc* token_entropy = nullptr;       // [*, S] or null; of each live token's softmax, in nats
  double* stream_loss = nullptr;      // [num_streams] += coef * loss
  int64_t* stream_correct = nullptr;  // [num_streams] += targets that are the most likely id
  int64_t num_sums = 0;               // columns of all sums that are wanted
  Acc* column_sums = nullptr;         // [num_sums] += gradient of each stream, summed over the rows
};

// Equal to the bit for any number of threads: rows are taken in blocks whose borders depend on the sizes alone.
template <typename T>
void multistream_loss_rows_cpu(const LossRowsArgs<T>& args, int threads);

// Equal to the bit in every run. Nothing waits for the device: the tables of streams and slices go there as parameters
// of small kernels. A row index outside the targets, which the host cannot see, gives NaN losses and no gradient.
template <typename T>
void multistream_loss_rows_cuda(const LossRowsArgs<T>& args, void* workspace, int device, void* stream);
// Bytes of the workspace for args whose sizes, streams, slices, want_grad and num_sums are set.
template <typename T>
int64_t multistream_loss_workspace(const LossRowsArgs<T>& args);

}  // namespace speechlm
