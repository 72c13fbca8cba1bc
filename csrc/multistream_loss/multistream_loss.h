// The row kernel of multistream_loss: from a chunk of shared logits Z = h W^T to the losses of all streams and, in
// place, to the sum over streams of their logit gradients.
//
// Stream s sees the logits z + bias[s] (bias[s] = e_s W^T + bias) over its scope, a few slices of the chunk's columns;
// a stream without a vector in a model without a bias sees z itself:
//   loss = (1 - ls) * nll + ls * mean(lse - y) + z_loss * lse^2,  y = softcap(z + bias), lse = logsumexp(y)
// and adds d(coef * loss + coef_nll * nll)/dz to the columns of its scope.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "common/tensor/small_float.h"

namespace speechlm {

constexpr int64_t kMaxLossStreams = 64;

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
  int64_t width;     // columns of its scope
  int64_t bias;      // its row of bias, -1: none
  int64_t sums_row;  // its row of column_sums, -1: not wanted
  int64_t sums;      // columns of the scopes of the streams before it that want sums
};

// T is the type of the logits; all else is float, or double for double. The CPU takes float and double.
template <typename T>
struct LossRowsArgs {
  using Acc = Accumulator<T>;
  int64_t num_rows = 0;     // rows of the chunk
  int64_t num_columns = 0;  // columns of the chunk
  int64_t num_targets = 0;  // S: columns of targets, live, coef, coef_nll, token_nll, token_entropy
  int64_t num_tokens = 0;   // N: rows of the same tensors
  int64_t num_streams = 0;  // streams whose scopes are in the chunk
  LossOptions options;
  bool want_grad = false;               // logits become their gradient
  const LossStream* streams = nullptr;  // [num_streams]
  const LossSlice* slices = nullptr;    // stream after stream, see LossStream::first_slice
  T* logits = nullptr;                  // [num_rows, num_columns]; with want_grad it becomes the gradient
  const int64_t* rows = nullptr;        // [num_rows] in [0, N): the row of targets etc. of each row of the chunk
  const int64_t* targets = nullptr;     // [N, S] ids
  const uint8_t* live = nullptr;        // [N, S] bool: whether the target counts; outside its scope its loss is NaN
  const Acc* coef = nullptr;            // [N, S] factor of the loss
  const Acc* coef_nll = nullptr;        // [N, S] factor of the nll in the gradient, or null
  int64_t num_bias = 0;                 // rows of bias
  const Acc* bias = nullptr;            // [num_bias, num_columns] added to the logits of the streams that have a row
  Acc* token_nll = nullptr;             // [N, S] or null; written where live
  Acc* token_entropy = nullptr;         // [N, S] or null; of each live token's softmax, in nats
  double* stream_loss = nullptr;        // [S] += coef * loss
  int64_t* stream_correct = nullptr;    // [S] += live targets that are the most likely id
  int64_t* stream_count = nullptr;      // [S] += live targets
  int64_t num_sums = 0;                 // columns of the scopes of all streams that want sums
  int64_t num_sums_rows = 0;            // these streams
  Acc* column_sums = nullptr;           // [num_sums_rows, num_columns] += gradient of each stream, summed over the rows
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
