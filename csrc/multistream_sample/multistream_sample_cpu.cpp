// multistream_sample on the CPU: a request belongs to one thread, which takes stream 0 first, so that streams which
// have ended or have no scope cost nothing.
#include "multistream_sample/multistream_sample.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "common/cpu/parallel.h"
#include "multistream_sample/sampler_cpu.h"
#include "multistream_sample/sampling_math.h"
#include "multistream_sample/state_machine.h"

namespace speechlm {
namespace {

constexpr int64_t kGrainColumns = 1 << 14;  // fewer are not worth waking a thread

template <typename T>
class Sampler {
 public:
  Sampler(const SampleArgs<T>& args, ScopeLogits& scope, std::vector<int32_t>& places)
      : args_(args), a_(args.state), load_(load_loop<T>()), scope_(scope), places_(places) {}

  void request(int64_t b) {
    const Position p = position_of(a_, b);
    const int64_t S = a_.num_streams, first = a_.first_stream;
    int64_t* tokens = a_.tokens + b * S;
    float* logprob = a_.logprob + b * S;
    uint8_t* is_content = a_.is_content + b * S;
    int64_t ended = p.finish, slowest = 0;
    bool has_failed = false;
    if (first > 0) {  // stream 0's token does not change until the row is complete
      ended = ended_by(a_, p, stream_row(a_, p, b, 0), tokens[0]);
      has_failed = a_.failed[b] != 0;
    }
    for (int64_t s = first; s < a_.end_stream; ++s) {
      const StreamRow row = stream_row(a_, p, b, s);
      const int64_t forced = forced_token(a_, p, b, s);
      is_content[s] = has_content(row, s, ended);
      logprob[s] = 0;
      tokens[s] = forced >= 0 ? forced : fill_token(a_, p, b, s);
      if (is_content[s] && !sample(p, row, b, s, forced, tokens[s], logprob[s])) has_failed = true;
      if (s == 0) ended = ended_by(a_, p, row, tokens[0]);
    }
    a_.failed[b] = has_failed;
    if (a_.end_stream < S) {
      for (int64_t s = a_.end_stream; s < S; ++s) {
        is_content[s] = 0;
        logprob[s] = 0;
        tokens[s] = fill_token(a_, p, b, s);
      }
      a_.done[b] = p.done;
      return;
    }
    for (int64_t s = 0; s < S; ++s) slowest = std::max(slowest, used_delay(a_, p, b, s));
    // A stream that fails after stream 0 was sampled ends its request in this row too.
    if (has_failed && is_content[0]) {
      tokens[0] = a_.eos_id;
      logprob[0] = 0;
    }
    const int64_t kept_row = history_row(a_, p, b);
    for (int64_t s = 0; kept_row >= 0 && s < S; ++s) {
      a_.history[kept_row * S + s] = tokens[s];
      a_.history_logprob[kept_row * S + s] = is_content[s] ? logprob[s] : std::numeric_limits<float>::quiet_NaN();
    }
    if (!p.done) advance(a_, p, b, has_failed, ended, slowest);
    a_.done[b] = a_.progress[b].done != 0;
  }

 private:
  // The token of a stream with content, and its log-probability. False if it fails.
  bool sample(const Position& p, const StreamRow& row, int64_t b, int64_t s, int64_t forced, int64_t& token,
              float& logprob) {
    if (forced >= 0) {
      score(row, b, s, forced, logprob);
      return true;
    }
    if (!fill(row, b, s)) {
      token = s == 0 ? a_.eos_id : a_.pad_ids[s];
      return false;
    }
    const float largest = scope_.largest();
    const int64_t total = scope_.total();
    const SampleSettings& settings = a_.settings[row.settings];
    const SampleChoice& choice = a_.choice[row.settings];
    places_.clear();
    if (has_penalty(settings, choice)) find_repeated(p, b, s, choice.repetition_window);
    scope_.penalize(places_, settings.repetition_penalty);
    const double number = is_greedy(settings, choice) ? 0.0 : uniform(a_.request[b].seed, p.row, s);
    const int64_t place = scope_.choose(settings, choice, number);
    logprob = logprob_of(scope_.at(place), largest, total);
    token = a_.column_ids[column_at(place)];
    return true;
  }

  void score(const StreamRow& row, int64_t b, int64_t s, int64_t token, float& logprob) {
    const int64_t column = column_of(a_, s, token);
    const bool is_end = s == 0 && column == a_.eos_column;
    const bool is_in_scope = is_end ? row.may_end : column >= row.first && column < row.last;
    if (column < 0 || !is_in_scope || (a_.allowed != nullptr && !allowed(b)[column])) return;
    const bool good = fill(row, b, s);
    logprob = good ? logprob_of(scope_.at(place_of(column)), scope_.largest(), scope_.total())
                   : std::numeric_limits<float>::quiet_NaN();
  }

  const uint8_t* allowed(int64_t b) const { return a_.allowed + b * a_.allowed_stride; }

  // Copies the allowed logits to the scope. False if they have no finite maximum, or a NaN.
  bool fill(const StreamRow& row, int64_t b, int64_t s) {
    first_ = row.first;
    last_ = row.last;
    has_end_before_ = has_end_behind_ = false;
    float* x = scope_.begin(last_ - first_);
    const SampleRequest& request = a_.request[b];
    if (request.source < 0 || request.source >= args_.num_rows || request.guide >= args_.num_rows) return false;
    const T* z = args_.logits + request.source * args_.row_stride;
    const T* u = request.guide < 0 ? nullptr : args_.logits + request.guide * args_.row_stride;
    const auto load = [&](float* out, int64_t column, int64_t n) {
      load_(out, z + column, u == nullptr ? nullptr : u + column, a_.guidance[b],
            a_.allowed == nullptr ? nullptr : allowed(b) + column, n);
    };
    load(x, first_, last_ - first_);
    if (s == 0) {
      const int64_t end = a_.eos_column;
      const bool is_inside = end >= first_ && end < last_;
      if (is_inside && !row.may_end) x[end - first_] = -std::numeric_limits<float>::infinity();
      if (!is_inside && row.may_end) {
        float logit;
        load(&logit, end, 1);
        has_end_before_ = end < first_;
        has_end_behind_ = !has_end_before_;
        has_end_before_ ? scope_.put_first(logit) : scope_.put_last(logit);
      }
    }
    return scope_.finish();
  }

  int64_t column_at(int64_t place) const {
    const int64_t column = first_ + place - (has_end_before_ ? 1 : 0);
    return column < first_ || column >= last_ ? a_.eos_column : column;
  }

  // Of an allowed column.
  int64_t place_of(int64_t column) const {
    if (has_end_before_) return column == a_.eos_column ? 0 : column - first_ + 1;
    return has_end_behind_ && column == a_.eos_column ? last_ - first_ : column - first_;
  }

  // Places of the ids that the stream had in the last rows, some of them several times. The end is not among them.
  void find_repeated(const Position& p, int64_t b, int64_t s, int64_t window) {
    const int64_t stop = std::min(p.row, a_.num_history);
    for (int64_t r = p.row > window ? p.row - window : 0; r < stop; ++r) {
      const int64_t id = a_.history[(b * a_.num_history + r) * a_.num_streams + s];
      if (s == 0 && id == a_.eos_id) continue;
      const int64_t column = column_of(a_, s, id);
      if (column >= first_ && column < last_) places_.push_back(static_cast<int32_t>(place_of(column)));
    }
  }

  const SampleArgs<T>& args_;
  const SampleState& a_;
  LoadLoop<T> load_;
  ScopeLogits& scope_;
  std::vector<int32_t>& places_;
  int64_t first_ = 0, last_ = 0;
  bool has_end_before_ = false, has_end_behind_ = false;
};

}  // namespace

template <typename T>
void multistream_sample_cpu(const SampleArgs<T>& args, int threads) {
  const SampleState& a = args.state;
  const int64_t columns = std::max<int64_t>(a.bounds[a.end_stream] - a.bounds[a.first_stream], 1);
  const int64_t grain = std::max<int64_t>(1, kGrainColumns / columns);
  parallel_for(a.num_requests, grain, threads, [&](int64_t begin, int64_t end) {
    thread_local ScopeLogits scope;
    thread_local std::vector<int32_t> places;
    Sampler<T> sampler(args, scope, places);
    for (int64_t b = begin; b < end; ++b) sampler.request(b);
  });
}

template void multistream_sample_cpu<float>(const SampleArgs<float>&, int);
template void multistream_sample_cpu<BFloat16>(const SampleArgs<BFloat16>&, int);
template void multistream_sample_cpu<Float16>(const SampleArgs<Float16>&, int);

}  // namespace speechlm
