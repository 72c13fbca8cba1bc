// delay_pack on the CPU: threads take runs of output rows. Rows in which every stream with content shows a frame of it
// go through the vector loop of rows_simd.cpp, which writes ids, labels and weights as it reads; the rows at a
// segment's edges follow the definition in segment.h one by one. Bytes moved per id: 8 + 4 read (int64 ids, fp32
// weights), 8 + 8 + 4 written.
#include <atomic>
#include <numeric>

#include "common/cpu/parallel.h"
#include "delay_pack/delay_pack.h"
#include "delay_pack/rows.h"
#include "delay_pack/segment.h"

namespace speechlm {

namespace {

constexpr int64_t kGrainBytes = 128 * 1024;  // less than this is not worth waking a thread

template <typename In, typename Out>
class Packer {
 public:
  explicit Packer(const DelayPackArgs<In, Out>& args)
      : a_(args),
        m_(args.meta),
        S_(args.shape.num_streams),
        check_(args.bad != nullptr),
        loop_(pack_rows_loop<In, Out>()) {}

  // Packs rows [begin, end) of the block. Returns whether an id among them is invalid.
  bool rows(int64_t begin, int64_t end) {
    int64_t i = find_segment(m_, a_.shape.tail, begin, 0, a_.shape.num_segments);
    for (int64_t row = begin; row < end; ++i) {
      const PackSegment seg = segment_at(m_, a_.shape, i);
      const int64_t stop = std::min(end, seg.row + seg.rows);
      if (row < stop) segment_rows(seg, row, stop);
      row = std::max(row, stop);
    }
    return bad_;
  }

 private:
  void segment_rows(const PackSegment& seg, int64_t begin, int64_t end) {
    const In* ids = a_.segment_ids ? a_.segment_ids[seg.index] : a_.ids + seg.element;
    const float* weight =
        a_.segment_weight ? a_.segment_weight[seg.index] : (a_.weight ? a_.weight + seg.element : nullptr);
    // Every stream with content shows a frame of it in rows [inner_begin, inner_end), and the row above is of the same
    // sequence.
    int64_t slowest = 0, fastest = std::numeric_limits<int64_t>::max();
    for (int64_t s = 0; s < seg.width; ++s) {
      slowest = std::max(slowest, m_.delays[s]);
      fastest = std::min(fastest, m_.delays[s]);
    }
    const int64_t content = seg.row + seg.prefix;
    int64_t inner_begin = std::max(content + slowest, seg.sequence_row + 1);
    inner_begin = std::clamp(inner_begin, begin, end);
    const int64_t inner_end = std::clamp(content + seg.frames + fastest, inner_begin, end);
    int64_t row = begin;
    for (; row < inner_begin; ++row) edge_row(seg, ids, weight, row);
    if (inner_begin < inner_end) row = inner_rows(seg, ids, weight, inner_begin, inner_end);
    for (; row < end; ++row) edge_row(seg, ids, weight, row);
    if (end == seg.row + seg.rows && seg.last) {
      for (int64_t s = 0; s < S_; ++s) {
        a_.out_labels[(end - 1) * S_ + s] = static_cast<Out>(m_.ends[s]);
        a_.out_weight[(end - 1) * S_ + s] = 0.0f;
      }
    }
    for (row = begin; row < end; ++row) a_.out_position[row] = static_cast<int32_t>(row - seg.sequence_row);
    if (a_.out_segment_map != nullptr) {
      std::fill(a_.out_segment_map + begin, a_.out_segment_map + end, static_cast<int32_t>(seg.index));
    }
    if (a_.out_stream_map != nullptr) {
      for (row = begin; row < end; ++row) map_row(seg, row);
    }
  }

  // Whole periods from `begin` on; returns the first row that is left.
  int64_t inner_rows(const PackSegment& seg, const In* ids, const float* weight, int64_t begin, int64_t end) {
    set_period(seg);
    const int64_t periods = (end - begin) / period_.rows;
    if (periods == 0) return begin;
    const int64_t from = (begin - seg.row - seg.prefix) * seg.width;
    PackRows<In, Out> run;
    run.ids = ids + from;
    run.weight = weight ? weight + from : nullptr;
    run.width = seg.width;
    run.out_ids = a_.out_ids + begin * S_;
    run.out_labels = a_.out_labels + (begin - 1) * S_;
    run.out_weight = a_.out_weight + (begin - 1) * S_;
    run.periods = periods;
    bad_ |= loop_(run, period_, check_);
    return begin + periods * period_.rows;
  }

  void set_period(const PackSegment& seg) {
    const bool own_rule = a_.shape.offset_rows > 1 || a_.shape.limit_rows > 1 || a_.shape.weight_rows > 0;
    if (period_.elements > 0 && period_width_ == seg.width && (!own_rule || period_segment_ == seg.index)) return;
    period_width_ = seg.width;
    period_segment_ = seg.index;
    const int64_t offset_row = a_.shape.offset_rows > 1 ? seg.index : 0;
    const int64_t limit_row = a_.shape.limit_rows > 1 ? seg.index : 0;
    period_.elements = std::lcm(S_, kPackLanes);
    period_.rows = period_.elements / S_;
    period_.narrow = seg.width < S_;
    period_.limited = m_.limits != nullptr;
    for (int64_t e = 0; e < period_.elements; ++e) {
      const int64_t row = e / S_, s = e % S_;
      const bool live = s < seg.width;
      period_.index[e] = live ? (row - m_.delays[s]) * seg.width + s : (row - m_.delays[0]) * seg.width;
      period_.mask[e] = live ? -1 : 0;
      period_.offset[e] = !live ? m_.pads[s] : (m_.id_offsets ? m_.id_offsets[offset_row * S_ + s] : 0);
      period_.limit[e] = !live ? 1 : (m_.limits ? m_.limits[limit_row * S_ + s] : -1);
      period_.factor[e] =
          !live ? 0.0f : (m_.segment_weight ? static_cast<float>(m_.segment_weight[seg.index * S_ + s]) : 1.0f);
    }
  }

  void edge_row(const PackSegment& seg, const In* ids, const float* weight, int64_t row) {
    const bool has_label = row > seg.sequence_row;
    for (int64_t s = 0; s < S_; ++s) {
      const PackElement x = element_at(m_, a_.shape, seg, ids, weight, a_.fill_weight, row - seg.row, s);
      const Out id = static_cast<Out>(x.id);
      bad_ |= check_ && (x.bad || static_cast<int64_t>(id) != x.id);
      a_.out_ids[row * S_ + s] = id;
      if (!has_label) continue;
      a_.out_labels[(row - 1) * S_ + s] = id;
      a_.out_weight[(row - 1) * S_ + s] = x.weight;
    }
  }

  void map_row(const PackSegment& seg, int64_t row) {
    for (int64_t s = 0; s < S_; ++s) {
      const int64_t frame = row - seg.row - m_.delays[s] - seg.prefix;
      const bool real = s < seg.width && frame >= 0 && frame < seg.frames;
      a_.out_stream_map[row * S_ + s] = real ? static_cast<int32_t>(seg.frame + frame) : -1;
    }
  }

  const DelayPackArgs<In, Out>& a_;
  const DelayPackMeta& m_;
  const int64_t S_;
  const bool check_;
  const PackRowsLoop<In, Out> loop_;
  bool bad_ = false;
  PackPeriod period_;
  int64_t period_width_ = 0;
  int64_t period_segment_ = 0;
};

}  // namespace

template <typename In, typename Out>
void delay_pack_cpu(const DelayPackArgs<In, Out>& args, int threads) {
  const DelayPackShape& shape = args.shape;
  for (int64_t j = 0; j <= shape.num_sequences; ++j) {
    args.out_cu_seqlens[j] = static_cast<int32_t>(sequence_row(args.meta, shape.tail, j));
  }
  std::atomic<bool> bad{false};
  const int64_t row_bytes = shape.num_streams * static_cast<int64_t>(2 * sizeof(Out) + sizeof(float));
  parallel_for(shape.num_rows, kGrainBytes / row_bytes, threads, [&](int64_t begin, int64_t end) {
    Packer<In, Out> packer(args);
    if (packer.rows(begin, end)) bad = true;
  });
  if (args.bad != nullptr) *args.bad = bad;
}

template <typename Id>
void delay_unpack_cpu(const DelayUnpackArgs<Id>& args, int threads) {
  const int64_t S = args.shape.num_streams;
  if (args.shape.num_frames == 0) return;
  const int64_t grain = kGrainBytes / (S * static_cast<int64_t>(sizeof(Id)));
  parallel_for(args.shape.num_frames, grain, threads, [&](int64_t begin, int64_t end) {
    const int64_t* found = std::upper_bound(args.out_offsets, args.out_offsets + args.shape.num_segments, begin);
    int64_t i = found - args.out_offsets - 1;
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

template void delay_pack_cpu<int32_t, int32_t>(const DelayPackArgs<int32_t, int32_t>&, int);
template void delay_pack_cpu<int32_t, int64_t>(const DelayPackArgs<int32_t, int64_t>&, int);
template void delay_pack_cpu<int64_t, int32_t>(const DelayPackArgs<int64_t, int32_t>&, int);
template void delay_pack_cpu<int64_t, int64_t>(const DelayPackArgs<int64_t, int64_t>&, int);
template void delay_unpack_cpu<int32_t>(const DelayUnpackArgs<int32_t>&, int);
template void delay_unpack_cpu<int64_t>(const DelayUnpackArgs<int64_t>&, int);

}  // namespace speechlm
