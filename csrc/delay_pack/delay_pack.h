// delay_pack: from ragged segments of ids to one packed, delay-interleaved block with labels, weights and positions.
//
// A segment is a run of virtual frames: its prefix (special ids), its content, its suffix (special ids). Row t of the
// segment shows in stream s its virtual frame t - delay[s], or a fill where there is no such frame. A special id is in
// stream 0, with pads in the others; content that is narrower than S leaves pads in the streams it does not fill.
// Segments of one group form a sequence: positions and labels run on from one to the next. A row's label is the next
// row of its sequence.
//
// All metadata arrives as one int64 table, so that a GPU needs one small copy for it; see DelayPackMeta::at.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/check.h"
#include "common/host_device.h"

namespace speechlm {

constexpr int64_t kMaxPackStreams = 64;

struct DelayPackShape {
  // Given by the caller.
  int64_t num_segments = 0;
  int64_t num_groups = -1;  // -1: no groups are given, every segment is a sequence
  int64_t num_streams = 0;
  int64_t num_frames = 0;    // of content, over all segments
  int64_t num_specials = 0;  // ids in the prefixes and suffixes of all segments
  int64_t has_widths = 0;    // 0: the content of every segment fills all streams
  int64_t offset_rows = 0;   // rows of id_offsets: none, 1, or one per segment
  int64_t limit_rows = 0;    // rows of num_ids: none, 1, or one per segment
  int64_t weight_rows = 0;   // rows of segment_weight: none, or one per segment
  int64_t tail = 0;          // rows that follow each segment's last frame
  // Derived by delay_pack_plan.
  int64_t num_elements = 0;   // ids of content
  int64_t num_rows = 0;       // rows of the block
  int64_t num_sequences = 0;  // groups, or segments
  int64_t max_delay = 0;

  int64_t table_size() const {
    return num_segments + 1 + (num_specials > 0 ? 2 * num_segments + 1 + 2 * num_specials : 0) +
           (has_widths ? 2 * num_segments : 0) + (num_groups >= 0 ? num_groups + 1 + 2 * num_segments : 0) +
           (3 + offset_rows + limit_rows + weight_rows) * num_streams;
  }
};

// The table's columns in their order; null for those that the shape leaves out.
struct DelayPackMeta {
  const int64_t* offsets = nullptr;          // [n + 1] content frames before each segment
  const int64_t* delays = nullptr;           // [S]
  const int64_t* pads = nullptr;             // [S] fill before a segment's first frame, and of streams without content
  const int64_t* ends = nullptr;             // [S] fill after a segment's last frame
  const int64_t* special_offsets = nullptr;  // [n + 1] special ids before each segment
  const int64_t* prefix = nullptr;           // [n] number of special ids before the content
  const int64_t* specials = nullptr;         // [num_specials]
  const double* special_weight = nullptr;    // [num_specials] as labels, bit by bit
  const int64_t* width = nullptr;            // [n] streams that a segment's content fills
  const int64_t* element = nullptr;          // [n] ids of content before each segment
  const int64_t* groups = nullptr;           // [g + 1] segments before each group
  const int64_t* group_first = nullptr;      // [n] first segment of the segment's group
  const int64_t* group_end = nullptr;        // [n] segment after the last of the segment's group
  const int64_t* id_offsets = nullptr;       // [1 or n, S]
  const int64_t* limits = nullptr;           // [1 or n, S] raw ids must be below
  const double* segment_weight = nullptr;    // [n, S] factor of the content's weights, bit by bit

  static DelayPackMeta at(const int64_t* table, const DelayPackShape& shape) {
    const int64_t n = shape.num_segments, S = shape.num_streams;
    DelayPackMeta m;
    const auto take = [&table](int64_t count) {
      const int64_t* column = table;
      table += count;
      return column;
    };
    m.offsets = take(n + 1);
    m.delays = take(S);
    m.pads = take(S);
    m.ends = take(S);
    if (shape.num_specials > 0) {
      m.special_offsets = take(n + 1);
      m.prefix = take(n);
      m.specials = take(shape.num_specials);
      m.special_weight = reinterpret_cast<const double*>(take(shape.num_specials));
    }
    if (shape.has_widths) {
      m.width = take(n);
      m.element = take(n);
    }
    if (shape.num_groups >= 0) {
      m.groups = take(shape.num_groups + 1);
      m.group_first = take(n);
      m.group_end = take(n);
    }
    if (shape.offset_rows > 0) m.id_offsets = take(shape.offset_rows * S);
    if (shape.limit_rows > 0) m.limits = take(shape.limit_rows * S);
    if (shape.weight_rows > 0) m.segment_weight = reinterpret_cast<const double*>(take(shape.weight_rows * S));
    return m;
  }
};

template <typename In, typename Out>
struct DelayPackArgs {
  DelayPackShape shape;
  DelayPackMeta meta;             // memory of the device that runs the kernel
  float fill_weight = 0.0f;       // weight of a fill in a stream with content
  const In* ids = nullptr;        // [num_elements]
  const float* weight = nullptr;  // [num_elements]; null: 1 for every id
  // The first id (weight) of each segment, or null. The CPU needs no concatenated ids.
  const In* const* segment_ids = nullptr;
  const float* const* segment_weight = nullptr;
  Out* out_ids = nullptr;              // [num_rows, S]
  Out* out_labels = nullptr;           // [num_rows, S]
  float* out_weight = nullptr;         // [num_rows, S]
  int32_t* out_position = nullptr;     // [num_rows]
  int32_t* out_cu_seqlens = nullptr;   // [num_sequences + 1]
  int32_t* out_segment_map = nullptr;  // [num_rows]; null: not wanted
  int32_t* out_stream_map = nullptr;   // [num_rows, S]; null: not wanted
  int32_t* bad = nullptr;              // [1]: set to 1 for an invalid id; null: not checked
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

// Checks the table (host memory) and derives the shape. Throws std::invalid_argument.
DelayPackShape delay_pack_plan(const int64_t* table, int64_t table_len, DelayPackShape given);

// Likewise for unpack, whose table carries the packed offsets; also checks the frame offsets that Python derived.
DelayPackShape delay_unpack_shape(const int64_t* cu_seqlens, const int64_t* out_offsets, const int64_t* delays,
                                  int64_t num_segments, int64_t num_streams, int64_t num_rows, int64_t num_frames);

template <typename In, typename Out>
void delay_pack_cpu(const DelayPackArgs<In, Out>& args, int threads);
template <typename Id>
void delay_unpack_cpu(const DelayUnpackArgs<Id>& args, int threads);

// `stream` is a cudaStream_t; the launch is asynchronous.
template <typename In, typename Out>
void delay_pack_cuda(const DelayPackArgs<In, Out>& args, int device, void* stream);
template <typename Id>
void delay_unpack_cuda(const DelayUnpackArgs<Id>& args, int device, void* stream);

}  // namespace speechlm
