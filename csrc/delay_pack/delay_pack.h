// delay_pack: from ragged segments of ids to one packed, delay-interleaved block with labels, weights and positions.
//
// Row m of the block is frame t of segment i; stream s shows the segment's frame t - delay[s], or the stream's pad
// where the segment has no such frame. Row m's label is row m+1 of the same segment (pads after the last).
//
// All metadata arrives as one int64 table, so that a GPU needs one small copy for it:
//   pack:   [ offsets (n+1) | delays (S) | pad_ids (S) | id_offsets (S) ]
//   unpack: [ cu_seqlens (n+1) | delays (S) ]
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/check.h"

namespace speechlm {

#ifdef __CUDACC__
#define SX_HOST_DEVICE __host__ __device__
#else
#define SX_HOST_DEVICE
#endif

struct DelayPackShape {
  int64_t num_segments = 0;
  int64_t num_streams = 0;
  int64_t num_frames = 0;  // input rows
  int64_t num_rows = 0;    // output rows
  int64_t max_delay = 0;
  int64_t min_delay = 0;
  int64_t tail = 0;  // rows added to each segment: max_delay, or 0 when trimmed
};

struct DelayPackMeta {
  const int64_t* offsets = nullptr;
  const int64_t* delays = nullptr;
  const int64_t* pad_ids = nullptr;
  const int64_t* id_offsets = nullptr;

  static DelayPackMeta at(const int64_t* table, const DelayPackShape& shape) {
    const int64_t* delays = table + shape.num_segments + 1;
    return {table, delays, delays + shape.num_streams, delays + 2 * shape.num_streams};
  }
};

template <typename Id>
struct DelayPackArgs {
  DelayPackShape shape;
  DelayPackMeta meta;             // memory of the device that runs the kernel
  const Id* ids = nullptr;        // [num_frames, S]
  const float* weight = nullptr;  // [num_frames, S]; null: 1 for every id
  // On the CPU segments may lie apart, which saves concatenating them: the first id (weight) of each, or null.
  const Id* const* segment_ids = nullptr;
  const float* const* segment_weight = nullptr;
  Id* out_ids = nullptr;              // [num_rows, S]
  Id* out_labels = nullptr;           // [num_rows, S]
  float* out_weight = nullptr;        // [num_rows, S]
  int32_t* out_position = nullptr;    // [num_rows]
  int32_t* out_cu_seqlens = nullptr;  // [n+1]
};

template <typename Id>
struct DelayUnpackArgs {
  DelayPackShape shape;  // num_rows: packed rows in; num_frames: frames out
  const int64_t* cu_seqlens = nullptr;
  const int64_t* out_offsets = nullptr;
  const int64_t* delays = nullptr;
  const Id* ids = nullptr;  // [num_rows, S]
  Id* out = nullptr;        // [num_frames, S]
};

// Checks the table (host memory) and derives the shape from it. Throws std::invalid_argument.
DelayPackShape delay_pack_shape(const int64_t* table, int64_t table_len, int64_t num_segments, int64_t num_streams,
                                int64_t num_frames, bool trim);

// Likewise for unpack, whose table carries the packed offsets; also checks the frame offsets that Python derived.
DelayPackShape delay_unpack_shape(const int64_t* cu_seqlens, const int64_t* out_offsets, const int64_t* delays,
                                  int64_t num_segments, int64_t num_streams, int64_t num_rows, int64_t num_frames);

template <typename Id>
void delay_pack_cpu(const DelayPackArgs<Id>& args, int threads);
template <typename Id>
void delay_unpack_cpu(const DelayUnpackArgs<Id>& args, int threads);

// `stream` is a cudaStream_t; the launch is asynchronous.
template <typename Id>
void delay_pack_cuda(const DelayPackArgs<Id>& args, int device, void* stream);
template <typename Id>
void delay_unpack_cuda(const DelayUnpackArgs<Id>& args, int device, void* stream);

// id + offset in unsigned arithmetic: it wraps for absurd values where signed overflow would be undefined.
template <typename Id>
SX_HOST_DEVICE inline Id wrapping_add(Id id, int64_t offset) {
  return static_cast<Id>(static_cast<uint64_t>(static_cast<int64_t>(id)) + static_cast<uint64_t>(offset));
}

// The segment that holds `row`: the last i in [lo, hi) whose first row, offsets[i] + i * tail, is at most `row`.
SX_HOST_DEVICE inline int64_t find_segment(const int64_t* offsets, int64_t tail, int64_t row, int64_t lo, int64_t hi) {
  while (hi - lo > 1) {
    const int64_t middle = lo + (hi - lo) / 2;
    if (offsets[middle] + middle * tail <= row) {
      lo = middle;
    } else {
      hi = middle;
    }
  }
  return lo;
}

}  // namespace speechlm
