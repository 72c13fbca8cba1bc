// The id and weight of one element (row, stream) of the block: the definition for the CPU's edge rows and the GPU.
#pragma once

#include "delay_pack/delay_pack.h"

namespace speechlm {

// Row of the block at which segment i starts; i == n gives the number of rows.
SX_HOST_DEVICE inline int64_t first_row(const DelayPackMeta& meta, int64_t tail, int64_t i) {
  return meta.offsets[i] + (meta.special_offsets ? meta.special_offsets[i] : 0) + i * tail;
}

// Row of the block at which sequence j starts.
SX_HOST_DEVICE inline int64_t sequence_row(const DelayPackMeta& meta, int64_t tail, int64_t j) {
  return first_row(meta, tail, meta.groups ? meta.groups[j] : j);
}

// The segment that holds `row`: the last i in [lo, hi) whose first row is at most `row`.
SX_HOST_DEVICE inline int64_t find_segment(const DelayPackMeta& meta, int64_t tail, int64_t row, int64_t lo,
                                           int64_t hi) {
  while (hi - lo > 1) {
    const int64_t middle = lo + (hi - lo) / 2;
    if (first_row(meta, tail, middle) <= row) {
      lo = middle;
    } else {
      hi = middle;
    }
  }
  return lo;
}

struct PackSegment {
  int64_t index;
  int64_t row;           // of the block
  int64_t rows;          // virtual frames and tail
  int64_t sequence_row;  // row at which its sequence starts
  bool last;             // its last row is its sequence's
  int64_t prefix;
  int64_t frames;
  int64_t suffix;
  int64_t special;  // its first special id
  int64_t frame;    // its first content frame
  int64_t element;  // its first content id
  int64_t width;
};

SX_HOST_DEVICE inline PackSegment segment_at(const DelayPackMeta& m, const DelayPackShape& shape, int64_t i) {
  PackSegment seg;
  seg.index = i;
  seg.row = first_row(m, shape.tail, i);
  seg.rows = first_row(m, shape.tail, i + 1) - seg.row;
  seg.sequence_row = m.groups ? first_row(m, shape.tail, m.group_first[i]) : seg.row;
  seg.last = !m.groups || first_row(m, shape.tail, m.group_end[i]) == seg.row + seg.rows;
  seg.frame = m.offsets[i];
  seg.frames = m.offsets[i + 1] - seg.frame;
  seg.prefix = m.special_offsets ? m.prefix[i] : 0;
  seg.special = m.special_offsets ? m.special_offsets[i] : 0;
  seg.suffix = m.special_offsets ? m.special_offsets[i + 1] - seg.special - seg.prefix : 0;
  seg.width = m.width ? m.width[i] : shape.num_streams;
  seg.element = m.width ? m.element[i] : seg.frame * shape.num_streams;
  return seg;
}

struct PackElement {
  int64_t id;
  float weight;
  int32_t frame;  // content frame that it came from, -1 for anything else
  bool bad;       // a raw id outside its limit, or a sum that int64 cannot hold
};

// Row t of the segment, stream s; `ids` and `weight` are the segment's own.
template <typename In>
SX_HOST_DEVICE inline PackElement element_at(const DelayPackMeta& m, const DelayPackShape& shape,
                                             const PackSegment& seg, const In* ids, const float* weight,
                                             float fill_weight, int64_t t, int64_t s) {
  const int64_t S = shape.num_streams;
  const int64_t v = t - m.delays[s];
  const int64_t content = v - seg.prefix;
  const bool live = s < seg.width;
  if (content >= 0 && content < seg.frames) {
    if (!live) return {m.pads[s], 0.0f, -1, false};
    const int64_t at = content * seg.width + s;
    const int64_t raw = static_cast<int64_t>(ids[at]);
    const int64_t limit_row = shape.limit_rows > 1 ? seg.index : 0;
    const bool bad =
        m.limits != nullptr && static_cast<uint64_t>(raw) >= static_cast<uint64_t>(m.limits[limit_row * S + s]);
    const float factor = m.segment_weight ? static_cast<float>(m.segment_weight[seg.index * S + s]) : 1.0f;
    const int64_t offset_row = shape.offset_rows > 1 ? seg.index : 0;
    const int64_t offset = m.id_offsets ? m.id_offsets[offset_row * S + s] : 0;
    const int64_t id = wrapping_add(raw, offset);
    const bool overflow = ((raw ^ id) & (offset ^ id)) < 0;
    return {id, (weight ? weight[at] : 1.0f) * factor, static_cast<int32_t>(seg.frame + content), bad || overflow};
  }
  if (v < 0) return {m.pads[s], live ? fill_weight : 0.0f, -1, false};
  if (v >= seg.prefix + seg.frames + seg.suffix)
    return {live ? m.ends[s] : m.pads[s], live ? fill_weight : 0.0f, -1, false};
  if (s > 0) return {m.pads[s], 0.0f, -1, false};
  const int64_t special = seg.special + (content < 0 ? v : v - seg.frames);
  return {m.specials[special], static_cast<float>(m.special_weight[special]), -1, false};
}

}  // namespace speechlm
