// The state machine of a request, for both devices: which streams have content in its next row, and its next state.
//
// Rows are counted from the one in which a stream without delay shows the segment's frame 0. In row j stream s carries
// frame j - delays[s]: fill before frame 0, content, and fill again from the frame in which stream 0 ends the segment.
#pragma once

#include "common/host_device.h"
#include "multistream_sample/multistream_sample.h"

namespace speechlm {

// The state of a request before the row.
struct Position {
  int64_t segment, step, row, finish;
  int64_t following;  // frame 0 of the next segment, counted from this one's
  int32_t has_next;   // or 0; not bool, so that there is no padding, which a copy reads and nothing writes
  int32_t done;
};

// Segments are clamped to those that there are, so that no value of the state is an address outside its tensors.
SX_HOST_DEVICE inline Position position_of(const SampleState& a, int64_t b) {
  const SampleProgress& now = a.progress[b];
  Position p;
  p.segment = now.segment < 0 ? 0 : (now.segment < a.num_segments ? now.segment : a.num_segments - 1);
  p.step = now.step;
  p.row = now.row;
  p.finish = now.finish;
  p.following = wrapping_add(now.finish, a.tail + 2);
  const int64_t segments = a.request[b].num_segments;
  p.has_next = p.segment + 1 < (segments < a.num_segments ? segments : a.num_segments);
  p.done = now.done != 0;
  return p;
}

// The columns that stream s may sample in the row. Whether it has content depends on stream 0's token too: see
// has_content.
struct StreamRow {
  int64_t settings;     // index of its settings
  int64_t frame;        // of the segment that it is in
  int64_t limit;        // frames that the segment may have
  int64_t first, last;  // columns of its scope, the end of the segment apart
  bool is_ahead;        // in the next segment already, before stream 0
  bool is_live;         // has a scope, and frame 0 is reached
  bool may_end;         // stream 0: the end of the segment is allowed
};

SX_HOST_DEVICE inline StreamRow stream_row(const SampleState& a, const Position& p, int64_t b, int64_t s) {
  StreamRow r;
  r.frame = wrapping_subtract(p.step, a.delays[s]);
  r.is_ahead = p.finish >= 0 && p.has_next && r.frame >= p.following;
  int64_t origin = wrapping_subtract(p.row, p.step);  // row of frame 0
  if (r.is_ahead) {
    r.frame = wrapping_subtract(r.frame, p.following);
    origin = wrapping_add(origin, p.following);
  }
  const int64_t segment = b * a.num_segments + p.segment + (r.is_ahead ? 1 : 0);
  const SampleLimits& limits = a.limits[segment];
  const int64_t rows_left = wrapping_subtract(limits.row_limit, origin);
  r.limit = limits.max_frames < rows_left ? limits.max_frames : rows_left;
  r.settings = segment * a.num_streams + s;
  const int64_t first = a.choice[r.settings].first_column, last = a.choice[r.settings].end_column;
  r.is_live = last > first && r.frame >= 0 && !p.done;
  r.first = first > a.bounds[s] ? first : a.bounds[s];
  r.last = last < a.bounds[s + 1] ? last : a.bounds[s + 1];
  r.may_end = false;
  if (s == 0) {
    const bool is_past = r.frame >= r.limit;
    r.may_end = is_past || r.frame >= limits.min_frames;
    if (is_past) r.last = r.first;
  }
  if (r.last < r.first) r.last = r.first;
  return r;
}

// `ended`: frames of the segment if its end is out, in this row at the latest, else -1.
SX_HOST_DEVICE inline bool has_content(const StreamRow& r, int64_t s, int64_t ended) {
  const int64_t end = r.is_ahead ? -1 : ended;
  if (s == 0) return r.is_live && end < 0;
  return r.is_live && r.frame < (end < 0 ? r.limit : end);
}

// `ended` after stream 0's token.
SX_HOST_DEVICE inline int64_t ended_by(const SampleState& a, const Position& p, const StreamRow& stream0,
                                       int64_t token) {
  return has_content(stream0, 0, p.finish) && token == a.eos_id ? stream0.frame : p.finish;
}

// The caller's id for this row, or -1.
SX_HOST_DEVICE inline int64_t forced_token(const SampleState& a, const Position& p, int64_t b, int64_t s) {
  if (p.done || p.row < 0 || p.row >= a.num_forced) return -1;
  return a.forced[(b * a.num_forced + p.row) * a.num_streams + s];
}

// The token of a stream without content: its fill, or in stream 0 the marker of the next segment.
SX_HOST_DEVICE inline int64_t fill_token(const SampleState& a, const Position& p, int64_t b, int64_t s) {
  const int64_t frame = wrapping_subtract(p.step, a.delays[s]);
  if (s == 0 && p.finish >= 0 && p.has_next && frame == p.following - 1 && !p.done) {
    return a.limits[b * a.num_segments + p.segment + 1].marker;
  }
  return a.pad_ids[s];
}

// Row of the history that this row becomes, or -1.
SX_HOST_DEVICE inline int64_t history_row(const SampleState& a, const Position& p, int64_t b) {
  return p.done || p.row < 0 || p.row >= a.num_history ? -1 : b * a.num_history + p.row;
}

// The delay of stream s where it has content in the request's segment, else 0.
SX_HOST_DEVICE inline int64_t used_delay(const SampleState& a, const Position& p, int64_t b, int64_t s) {
  const SampleChoice& choice = a.choice[(b * a.num_segments + p.segment) * a.num_streams + s];
  return choice.end_column > choice.first_column ? a.delays[s] : 0;
}

// Moves the request past the row. `slowest`: the largest used delay.
SX_HOST_DEVICE inline void advance(const SampleState& a, const Position& p, int64_t b, bool has_failed, int64_t ended,
                                   int64_t slowest) {
  SampleProgress next;
  next.segment = p.segment;
  next.step = wrapping_add(p.step, 1);
  next.row = wrapping_add(p.row, 1);
  next.finish = has_failed ? p.finish : ended;
  const int64_t level = a.delays[0] + 1;  // rows until stream 0 is through
  const int64_t rest = next.finish > 0 && slowest > level ? slowest : level;
  const bool is_over = !p.has_next && next.finish >= 0 && next.step >= wrapping_add(next.finish, rest);
  next.done = has_failed || is_over ? 1 : 0;
  next.failed = has_failed ? 1 : 0;
  next.arrived = 0;
  if (next.done == 0 && p.has_next && p.finish >= 0 && wrapping_subtract(next.step, a.delays[0]) >= p.following) {
    ++next.segment;
    next.step = wrapping_subtract(next.step, p.following);
    next.finish = -1;
  }
  a.progress[b] = next;
}

}  // namespace speechlm
