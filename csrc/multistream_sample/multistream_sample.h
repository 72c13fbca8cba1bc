// multistream_sample: one row of tokens, one per stream, for every request of a batch, and the request moved past it.
//
// speechlm_ext/ops/multistream_sample/reference.py defines every token to the bit. All sums that decide are sums of
// integers: a column's weight is round(2^40 e^((x - max) / temperature)), so no order of additions matters.
//
// A row may be sampled in several calls, a few streams at a time. A call reads from the outputs of those before it
// stream 0's token, and in `failed` whether a stream has failed. Only the last call moves the request.
//
//   state_machine.h     which streams have content in this row, and the next state of the request
//   sampling_math.h     random numbers, sampling settings, the order of logits: shared by both kinds of kernels
//   sample_loops.h      the CPU's loops over the columns of a scope, by instruction set
//   sampler_cpu.h       the CPU's top-k, top-p and draw
//   device/             the same by a block of threads
#pragma once

#include <cstdint>

#include "common/tensor/small_float.h"

namespace speechlm {

constexpr int kMaxSampleStreams = 64;
// Columns of one stream: the largest sum of weights stays below 2^61.
constexpr int64_t kMaxSampleColumns = int64_t{1} << 20;

// Columns of the packed tensors; see speechlm_ext/ops/multistream_sample/decode_state.py.
struct SampleSettings {
  float temperature, top_p, min_p, repetition_penalty;
};
struct SampleChoice {
  int32_t first_column, end_column, top_k, repetition_window;
};
struct SampleLimits {
  int64_t min_frames, max_frames, row_limit, marker;
};
struct SampleRequest {
  int64_t seed, num_segments, source, guide;
};
struct SampleProgress {
  int64_t segment, step, row, finish, done, failed, arrived;
};

// Everything but the logits. By value, it is a kernel's argument.
struct SampleState {
  int64_t num_requests = 0;    // B
  int64_t num_segments = 0;    // G
  int64_t num_streams = 0;     // S
  int64_t first_stream = 0;    // of those that this call samples; the outputs hold the streams before it
  int64_t end_stream = 0;      // behind the last one; at S the row is complete
  int64_t num_columns = 0;     // C
  int64_t num_forced = 0;      // R
  int64_t num_history = 0;     // H
  int64_t allowed_stride = 0;  // 0: one row of `allowed` for all
  int64_t eos_id = 0;
  int64_t eos_column = 0;
  int64_t tail = 0;
  int64_t bounds[kMaxSampleStreams + 1] = {};
  int64_t delays[kMaxSampleStreams] = {};
  int64_t pad_ids[kMaxSampleStreams] = {};
  const int64_t* column_ids = nullptr;       // [C]
  const SampleSettings* settings = nullptr;  // [B, G, S]
  const SampleChoice* choice = nullptr;      // [B, G, S]
  const SampleLimits* limits = nullptr;      // [B, G]
  const SampleRequest* request = nullptr;    // [B]
  const float* guidance = nullptr;           // [B]
  SampleProgress* progress = nullptr;        // [B]
  const int64_t* forced = nullptr;           // [B, R, S]
  int64_t* history = nullptr;                // [B, H, S]
  float* history_logprob = nullptr;          // [B, H, S]
  const uint8_t* allowed = nullptr;          // [1 or B, C] or null
  int64_t* tokens = nullptr;                 // [B, S]
  float* logprob = nullptr;                  // [B, S]
  uint8_t* is_content = nullptr;             // [B, S]
  uint8_t* failed = nullptr;                 // [B]
  uint8_t* done = nullptr;                   // [B]
};

// T: float, BFloat16, Float16.
template <typename T>
struct SampleArgs {
  SampleState state;
  const T* logits = nullptr;  // [num_rows, C], rows `row_stride` elements apart
  int64_t num_rows = 0;
  int64_t row_stride = 0;
};

template <typename T>
void multistream_sample_cpu(const SampleArgs<T>& args, int threads);
// One launch, no wait, no allocation: it can be captured in a graph, and replays move the state on.
template <typename T>
void multistream_sample_cuda(const SampleArgs<T>& args, int device, void* stream);

}  // namespace speechlm
