// delay_pack on the CPU: threads take runs of output rows. Within a segment the labels are the ids one row later, so
// the ids are gathered tile by tile, and each tile is copied to the labels while it is in L1.
// Bytes moved per id: 8 + 4 read (int64 ids, fp32 weights), 8 + 8 + 4 written.
#include <cstring>
#include <vector>

#include "common/parallel.h"
#include "delay_pack/delay_pack.h"

namespace speechlm {
namespace {

constexpr int64_t kTileBytes = 8 * 1024;     // ids of one tile: a quarter of a common L1 data cache
constexpr int64_t kGrainBytes = 128 * 1024;  // less than this is not worth waking a thread

// One stream shift: element (t, s) of the output reads element (t, s) of the input plus `shift`.
struct StreamShift {
  int64_t delay;
  int64_t shift;  // -delay * S
  int64_t pad;
  int64_t offset;
};

template <typename Id>
class Packer {
 public:
  explicit Packer(const DelayPackArgs<Id>& args) : a_(args), S_(args.shape.num_streams), streams_(S_) {
    for (int64_t s = 0; s < S_; ++s) {
      streams_[s] = {a_.meta.delays[s], -a_.meta.delays[s] * S_, a_.meta.pad_ids[s], a_.meta.id_offsets[s]};
    }
    tile_rows_ = std::max<int64_t>(1, kTileBytes / (S_ * static_cast<int64_t>(sizeof(Id))));
  }

  // Rows [begin, end) of the block.
  void rows(int64_t begin, int64_t end) const {
    const DelayPackShape& shape = a_.shape;
    int64_t i = find_segment(a_.meta.offsets, shape.tail, begin, 0, shape.num_segments);
    for (int64_t row = begin; row < end; ++i) {
      const int64_t first = a_.meta.offsets[i] + i * shape.tail;
      const int64_t length = a_.meta.offsets[i + 1] - a_.meta.offsets[i];
      const int64_t stop = std::min(end, first + length + shape.tail);
      while (row < stop) {
        const int64_t tile_end = std::min(stop, row + tile_rows_);
        segment_tile(i, first, length, row, tile_end);
        row = tile_end;
      }
    }
  }

 private:
  // Rows [begin, end) of segment i, which starts at row `first` and has `length` frames.
  void segment_tile(int64_t i, int64_t first, int64_t length, int64_t begin, int64_t end) const {
    const int64_t before = a_.meta.offsets[i] * S_;
    const Id* ids = a_.segment_ids ? a_.segment_ids[i] : a_.ids + before;
    const float* weight = a_.segment_weight ? a_.segment_weight[i] : (a_.weight ? a_.weight + before : nullptr);
    const int64_t last = first + length + a_.shape.tail - 1;
    // Every stream has a frame in rows [inner_begin, inner_end).
    const int64_t inner_begin = std::clamp(first + std::max<int64_t>(a_.shape.max_delay, 1), begin, end);
    const int64_t inner_end = std::clamp(first + length + a_.shape.min_delay, inner_begin, end);
    for (int64_t row = begin; row < inner_begin; ++row) edge_row(row, first, length, ids, weight);
    if (inner_begin < inner_end) inner_rows(inner_begin, inner_end, first, ids, weight);
    for (int64_t row = inner_end; row < end; ++row) edge_row(row, first, length, ids, weight);

    for (int64_t row = begin; row < end; ++row) a_.out_position[row] = static_cast<int32_t>(row - first);
    const int64_t from = std::max(begin, first + 1);
    if (from < end) {
      std::memcpy(a_.out_labels + (from - 1) * S_, a_.out_ids + from * S_, (end - from) * S_ * sizeof(Id));
    }
    if (end - 1 == last) {
      for (int64_t s = 0; s < S_; ++s) {
        a_.out_labels[last * S_ + s] = static_cast<Id>(streams_[s].pad);
        a_.out_weight[last * S_ + s] = 0.0f;
      }
    }
  }

  // One stream after the other: the tile stays in L1, and the loop's body is a load, an add and a store. A row's
  // weights belong to the row before it, whose labels they weigh.
  void inner_rows(int64_t begin, int64_t end, int64_t first, const Id* ids, const float* weight) const {
    const int64_t rows = end - begin;
    for (int64_t s = 0; s < S_; ++s) {
      const Id* from = ids + (begin - first) * S_ + streams_[s].shift + s;
      Id* to = a_.out_ids + begin * S_ + s;
      const int64_t offset = streams_[s].offset;
      for (int64_t r = 0; r < rows; ++r) to[r * S_] = wrapping_add(from[r * S_], offset);
    }
    float* out_weight = a_.out_weight + (begin - 1) * S_;
    if (weight == nullptr) {
      std::fill(out_weight, out_weight + rows * S_, 1.0f);
      return;
    }
    for (int64_t s = 0; s < S_; ++s) {
      const float* from = weight + (begin - first) * S_ + streams_[s].shift + s;
      for (int64_t r = 0; r < rows; ++r) out_weight[r * S_ + s] = from[r * S_];
    }
  }

  void edge_row(int64_t row, int64_t first, int64_t length, const Id* ids, const float* weight) const {
    const int64_t t = row - first;
    Id* out = a_.out_ids + row * S_;
    float* out_weight = t > 0 ? a_.out_weight + (row - 1) * S_ : nullptr;
    for (int64_t s = 0; s < S_; ++s) {
      const int64_t frame = t - streams_[s].delay;
      const bool real = frame >= 0 && frame < length;
      out[s] = real ? wrapping_add(ids[frame * S_ + s], streams_[s].offset) : static_cast<Id>(streams_[s].pad);
      if (out_weight != nullptr) out_weight[s] = !real ? 0.0f : (weight ? weight[frame * S_ + s] : 1.0f);
    }
  }

  const DelayPackArgs<Id>& a_;
  const int64_t S_;
  std::vector<StreamShift> streams_;
  int64_t tile_rows_;
};

}  // namespace

DelayPackShape delay_pack_shape(const int64_t* table, int64_t table_len, int64_t num_segments, int64_t num_streams,
                                int64_t num_frames, bool trim) {
  SX_CHECK(num_segments >= 0, "delay_pack: offsets must have at least one entry");
  SX_CHECK(num_streams >= 1, "delay_pack: ids must have at least one stream; got ", num_streams);
  SX_CHECK(table_len == num_segments + 1 + 3 * num_streams, "delay_pack: the table has ", table_len, " entries; ",
           num_segments, " segments and ", num_streams, " streams need ", num_segments + 1 + 3 * num_streams);
  DelayPackShape shape;
  shape.num_segments = num_segments;
  shape.num_streams = num_streams;
  shape.num_frames = num_frames;
  const DelayPackMeta meta = DelayPackMeta::at(table, shape);
  SX_CHECK(meta.offsets[0] == 0, "delay_pack: offsets must start at 0; got ", meta.offsets[0]);
  for (int64_t i = 0; i < num_segments; ++i) {
    SX_CHECK(meta.offsets[i + 1] >= meta.offsets[i], "delay_pack: offsets must not fall; offsets[", i + 1,
             "] = ", meta.offsets[i + 1], " after ", meta.offsets[i]);
  }
  SX_CHECK(meta.offsets[num_segments] == num_frames, "delay_pack: the last offset must be the number of frames, ",
           num_frames, "; got ", meta.offsets[num_segments]);
  shape.min_delay = std::numeric_limits<int64_t>::max();
  for (int64_t s = 0; s < num_streams; ++s) {
    SX_CHECK(meta.delays[s] >= 0 && meta.delays[s] <= std::numeric_limits<int32_t>::max(), "delay_pack: delays[", s,
             "] must be 0 or more frames; got ", meta.delays[s]);
    shape.max_delay = std::max(shape.max_delay, meta.delays[s]);
    shape.min_delay = std::min(shape.min_delay, meta.delays[s]);
  }
  shape.tail = trim ? 0 : shape.max_delay;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  SX_CHECK(num_frames <= kMost && (shape.tail == 0 || num_segments <= (kMost - num_frames) / shape.tail),
           "delay_pack: the packed block would have more than 2^31 - 1 rows, which cu_seqlens (int32) cannot hold; "
           "pack fewer segments at a time");
  shape.num_rows = num_frames + num_segments * shape.tail;
  return shape;
}

DelayPackShape delay_unpack_shape(const int64_t* cu_seqlens, const int64_t* out_offsets, const int64_t* delays,
                                  int64_t num_segments, int64_t num_streams, int64_t num_rows, int64_t num_frames) {
  SX_CHECK(num_segments >= 0, "delay_unpack: cu_seqlens must have at least one entry");
  SX_CHECK(num_streams >= 1, "delay_unpack: ids must have at least one stream; got ", num_streams);
  DelayPackShape shape;
  shape.num_segments = num_segments;
  shape.num_streams = num_streams;
  shape.num_rows = num_rows;
  shape.num_frames = num_frames;
  for (int64_t s = 0; s < num_streams; ++s) {
    SX_CHECK(delays[s] >= 0, "delay_unpack: delays[", s, "] must be 0 or more frames; got ", delays[s]);
    shape.max_delay = std::max(shape.max_delay, delays[s]);
  }
  SX_CHECK(cu_seqlens[0] == 0 && out_offsets[0] == 0, "delay_unpack: cu_seqlens must start at 0; got ", cu_seqlens[0]);
  for (int64_t i = 0; i < num_segments; ++i) {
    const int64_t rows = cu_seqlens[i + 1] - cu_seqlens[i];
    SX_CHECK(rows >= 0, "delay_unpack: cu_seqlens must not fall; cu_seqlens[", i + 1, "] = ", cu_seqlens[i + 1],
             " after ", cu_seqlens[i]);
    SX_CHECK(out_offsets[i + 1] - out_offsets[i] == std::max<int64_t>(0, rows - shape.max_delay),
             "delay_unpack: segment ", i, " has ", rows, " rows, which does not fit its ",
             out_offsets[i + 1] - out_offsets[i], " frames");
  }
  SX_CHECK(cu_seqlens[num_segments] == num_rows, "delay_unpack: cu_seqlens must end at the number of rows, ", num_rows,
           "; got ", cu_seqlens[num_segments]);
  SX_CHECK(out_offsets[num_segments] == num_frames, "delay_unpack: the output has ", num_frames, " frames; ",
           out_offsets[num_segments], " are needed");
  return shape;
}

template <typename Id>
void delay_pack_cpu(const DelayPackArgs<Id>& args, int threads) {
  const DelayPackShape& shape = args.shape;
  for (int64_t i = 0; i <= shape.num_segments; ++i) {
    args.out_cu_seqlens[i] = static_cast<int32_t>(args.meta.offsets[i] + i * shape.tail);
  }
  if (shape.num_rows == 0) return;
  const Packer<Id> packer(args);
  const int64_t row_bytes = shape.num_streams * static_cast<int64_t>(2 * sizeof(Id) + sizeof(float));
  parallel_for(shape.num_rows, kGrainBytes / row_bytes, threads,
               [&](int64_t begin, int64_t end) { packer.rows(begin, end); });
}

template <typename Id>
void delay_unpack_cpu(const DelayUnpackArgs<Id>& args, int threads) {
  const int64_t S = args.shape.num_streams;
  if (args.shape.num_frames == 0) return;
  const int64_t grain = kGrainBytes / (S * static_cast<int64_t>(sizeof(Id)));
  parallel_for(args.shape.num_frames, grain, threads, [&](int64_t begin, int64_t end) {
    int64_t i = find_segment(args.out_offsets, 0, begin, 0, args.shape.num_segments);
    for (int64_t frame = begin; frame < end; ++i) {
      const int64_t stop = std::min(end, args.out_offsets[i + 1]);
      const int64_t to_row = args.cu_seqlens[i] - args.out_offsets[i];
      for (; frame < stop; ++frame) {
        const Id* row = args.ids + (frame + to_row) * S;
        for (int64_t s = 0; s < S; ++s) args.out[frame * S + s] = row[args.delays[s] * S + s];
      }
    }
  });
}

template void delay_pack_cpu<int32_t>(const DelayPackArgs<int32_t>&, int);
template void delay_pack_cpu<int64_t>(const DelayPackArgs<int64_t>&, int);
template void delay_unpack_cpu<int32_t>(const DelayUnpackArgs<int32_t>&, int);
template void delay_unpack_cpu<int64_t>(const DelayUnpackArgs<int64_t>&, int);

}  // namespace speechlm
