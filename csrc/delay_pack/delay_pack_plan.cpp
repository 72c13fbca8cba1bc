// Checks the table that describes a block, on the host, before a kernel reads it.
#include "delay_pack/delay_pack.h"
#include "delay_pack/segment.h"

namespace speechlm {
namespace {

constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();

// [n + 1] counts from 0 up to `total`.
void check_offsets(const char* name, const char* total_name, const int64_t* offsets, int64_t n, int64_t total) {
  SX_CHECK(offsets[0] == 0, "delay_pack: ", name, " must start at 0; got ", offsets[0]);
  for (int64_t i = 0; i < n; ++i) {
    SX_CHECK(offsets[i + 1] >= offsets[i], "delay_pack: ", name, " must not fall; ", name, "[", i + 1,
             "] = ", offsets[i + 1], " after ", offsets[i]);
  }
  SX_CHECK(offsets[n] == total, "delay_pack: the last of ", name, " must be the number of ", total_name, ", ", total,
           "; got ", offsets[n]);
}

}  // namespace

DelayPackShape delay_pack_plan(const int64_t* table, int64_t table_len, DelayPackShape shape) {
  const int64_t n = shape.num_segments, g = shape.num_groups, S = shape.num_streams;
  SX_CHECK(n >= 0 && g >= -1, "delay_pack: offsets and groups must have at least one entry");
  SX_CHECK(S >= 1 && S <= kMaxPackStreams, "delay_pack: there must be 1 to ", kMaxPackStreams, " streams; got ", S);
  // Before anything is multiplied: no count is larger than the table that it is about.
  SX_CHECK(n <= table_len && g <= table_len && shape.num_specials <= table_len && shape.num_frames >= 0 &&
               shape.num_specials >= 0,
           "delay_pack: the table has ", table_len, " entries, which does not fit the counts given with it");
  const auto is_rows = [n](int64_t rows) { return rows == 0 || rows == 1 || rows == n; };
  SX_CHECK(shape.num_frames >= 0 && shape.num_specials >= 0 && is_rows(shape.offset_rows) &&
               is_rows(shape.limit_rows) && (shape.weight_rows == 0 || shape.weight_rows == n) &&
               table_len == shape.table_size(),
           "delay_pack: the table has ", table_len, " entries, which does not fit the counts given with it");
  const DelayPackMeta m = DelayPackMeta::at(table, shape);
  check_offsets("offsets", "frames", m.offsets, n, shape.num_frames);
  if (m.special_offsets) check_offsets("special offsets", "special ids", m.special_offsets, n, shape.num_specials);
  if (m.groups) check_offsets("groups", "segments", m.groups, g, n);
  shape.num_sequences = m.groups ? g : n;
  for (int64_t s = 0; s < S; ++s) {
    SX_CHECK(m.delays[s] >= 0 && m.delays[s] <= kMaxRows, "delay_pack: delays[", s, "] must be 0 or more frames; got ",
             m.delays[s]);
    shape.max_delay = std::max(shape.max_delay, m.delays[s]);
  }
  SX_CHECK(shape.tail >= 0 && shape.tail <= shape.max_delay, "delay_pack: tail must be 0 to ", shape.max_delay,
           " rows, the largest delay; got ", shape.tail);
  const int64_t frames = shape.num_frames + shape.num_specials;
  SX_CHECK(frames <= kMaxRows && (shape.tail == 0 || n <= (kMaxRows - frames) / shape.tail),
           "delay_pack: the packed block would have more than 2^31 - 1 rows, which cu_seqlens (int32) cannot hold; "
           "pack fewer segments at a time");
  shape.num_rows = frames + n * shape.tail;

  for (int64_t i = 0; i < n && m.special_offsets; ++i) {
    const int64_t specials = m.special_offsets[i + 1] - m.special_offsets[i];
    SX_CHECK(m.prefix[i] >= 0 && m.prefix[i] <= specials, "delay_pack: the prefix of segment ", i, " has ", m.prefix[i],
             " ids; the segment has ", specials, " special ids");
  }
  shape.num_elements = m.width ? 0 : shape.num_frames * S;
  for (int64_t i = 0; i < n && m.width; ++i) {
    SX_CHECK(m.width[i] >= 1 && m.width[i] <= S, "delay_pack: segment ", i, " has ", m.width[i], " streams; 1 to ", S,
             " are possible, as many as delays has");
    SX_CHECK(m.element[i] == shape.num_elements, "delay_pack: segment ", i, " starts at id ", shape.num_elements,
             ", but the table says ", m.element[i]);
    shape.num_elements += (m.offsets[i + 1] - m.offsets[i]) * m.width[i];
  }
  for (int64_t i = 0, group = 0; i < n && m.groups; ++i) {
    while (m.groups[group + 1] <= i) ++group;
    SX_CHECK(m.group_first[i] == m.groups[group] && m.group_end[i] == m.groups[group + 1], "delay_pack: segment ", i,
             " is in the group of segments ", m.groups[group], " to ", m.groups[group + 1], ", but the table says ",
             m.group_first[i], " to ", m.group_end[i]);
  }
  for (int64_t i = 0; i < shape.limit_rows * S; ++i) {
    SX_CHECK(m.limits[i] >= 0, "delay_pack: num_ids must be 0 or more; got ", m.limits[i], " for stream ", i % S);
  }
  return shape;
}

DelayPackShape delay_unpack_shape(const int64_t* cu_seqlens, const int64_t* out_offsets, const int64_t* delays,
                                  int64_t num_segments, int64_t num_streams, int64_t num_rows, int64_t num_frames) {
  SX_CHECK(num_segments >= 0, "delay_unpack: cu_seqlens must have at least one entry");
  SX_CHECK(num_streams >= 1 && num_streams <= kMaxPackStreams, "delay_unpack: there must be 1 to ", kMaxPackStreams,
           " streams; got ", num_streams);
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

}  // namespace speechlm
