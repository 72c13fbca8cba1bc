// Sampling on the CPU without sorting a scope: a cheap bound below which no column can be kept leaves a few columns,
// and all later steps read only those. Without any filter a draw reads one block of columns.
#include "multistream_sample/sampler_cpu.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "multistream_sample/sampling_math.h"

namespace speechlm {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <typename T>
void grow(std::vector<T>& v, int64_t size) {
  if (static_cast<int64_t>(v.size()) < size) v.resize(size);
}

// The first place whose weight and those before it sum up to more than `target`.
int64_t reach(const int64_t* weights, int64_t& target) {
  int64_t i = 0;
  while (target >= weights[i]) target -= weights[i++];
  return i;
}

}  // namespace

float* ScopeLogits::begin(int64_t n) {
  loops_ = &sample_loops();
  constexpr int64_t kLine = 16;  // floats of a cache line
  grow(memory_, n + 2 * kLine + kSampleBlock + 1);
  const auto address = reinterpret_cast<uintptr_t>(memory_.data()) / sizeof(float);
  x_ = memory_.data() + (2 * kLine - static_cast<int64_t>(address % kLine));
  size_ = n;
  has_total_ = false;
  unpenalized_.clear();
  return x_;
}

void ScopeLogits::put_first(float x) {
  *--x_ = x;
  ++size_;
}

void ScopeLogits::put_last(float x) { x_[size_++] = x; }

bool ScopeLogits::finish() {
  blocks_ = ceil_div(size_, kSampleBlock);
  std::fill(x_ + size_, x_ + blocks_ * kSampleBlock, -kInfinity);
  grow(maxima_, blocks_ * kSampleLanes);
  grow(sums_, blocks_);
  has_nan_ = loops_->maxima(x_, blocks_, maxima_.data(), &largest_);
  return !has_nan_ && largest_ > -kInfinity && largest_ < kInfinity;
}

int64_t ScopeLogits::total() {
  total_ = loops_->sums(x_, blocks_, {largest_, 1.0f}, sums_.data());
  has_total_ = true;
  return total_;
}

void ScopeLogits::penalize(const std::vector<int32_t>& places, float penalty) {
  if (places.empty()) return;
  is_penalized_.resize(std::max<size_t>(is_penalized_.size(), size_));
  for (const int32_t place : places) {
    if (is_penalized_[place]) continue;
    is_penalized_[place] = true;
    unpenalized_.emplace_back(place, x_[place]);
    x_[place] = penalized(x_[place], penalty);
  }
  for (const int32_t place : places) is_penalized_[place] = false;
  loops_->maxima(x_, blocks_, maxima_.data(), &largest_);
  has_total_ = false;
}

float ScopeLogits::at(int64_t place) const {
  for (const auto& [changed, x] : unpenalized_) {
    if (changed == place) return x;
  }
  return x_[place];
}

uint64_t ScopeLogits::rank_of(int64_t place) const {
  return uint64_t{~key_of(x_[place])} << 32 | static_cast<uint64_t>(place);
}

int64_t ScopeLogits::choose(const SampleSettings& settings, const SampleChoice& choice, double number) {
  if (is_greedy(settings, choice)) return first_largest();
  const Weighing how{largest_, settings.temperature};
  const int64_t k = kept_by(choice.top_k, size_), least = min_weight(settings.min_p);
  if (k < size_) {
    const int64_t count = keep_best(list_from(bound_of_top_k(k)), k);
    const int64_t sum = weigh(count, how);
    return draw_from_listed(count, top_p_limit(settings.top_p, sum), least, number);
  }
  int64_t sum = total_;
  if ((settings.top_p < 1 || least == 0) && !(has_total_ && how.temperature == 1)) {
    sum = loops_->sums(x_, blocks_, how, sums_.data());
  }
  const int64_t limit = top_p_limit(settings.top_p, sum);
  if (limit > 0) {
    // Columns that weigh less than this are not needed to reach the limit, all together.
    const double spare = static_cast<double>(sum - limit) / static_cast<double>(size_);
    int64_t count = list_from(bound_of_weights(how, spare));
    if (weigh(count, how) < limit) {  // roundings
      count = list_from(-kInfinity);
      weigh(count, how);
    }
    return draw_from_listed(count, limit, least, number);
  }
  if (least > 0) {
    const int64_t count = list_from(bound_of_weights(how, static_cast<double>(least)));
    weigh(count, how);
    return draw_from_listed(count, 0, least, number);
  }
  int64_t target = target_of(number, sum);
  const int64_t first = reach(sums_.data(), target) * kSampleBlock;
  grow(weights_, kSampleBlock);
  loops_->weights(x_ + first, kSampleBlock, how, weights_.data());
  return first + reach(weights_.data(), target);
}

int64_t ScopeLogits::first_largest() const {
  int64_t b = 0;
  while (std::find(&maxima_[b * kSampleLanes], &maxima_[b * kSampleLanes] + kSampleLanes, largest_) ==
         &maxima_[b * kSampleLanes] + kSampleLanes) {
    ++b;
  }
  return std::find(x_ + b * kSampleBlock, x_ + size_, largest_) - x_;
}

// At least k columns have this logit or a larger one: k groups of columns have a maximum that does.
float ScopeLogits::bound_of_top_k(int64_t k) {
  const int64_t count = blocks_ * kSampleLanes;
  if (count < k) return -kInfinity;
  // Fewer and larger groups are as good, as long as there are some more than k.
  int64_t parts = 1;
  while (blocks_ / (2 * parts) * kSampleLanes >= 2 * k) parts *= 2;
  const int64_t width = blocks_ / parts * kSampleLanes;
  groups_.assign(maxima_.begin(), maxima_.begin() + width);
  for (int64_t i = width; i < count; i += width) {
    const int64_t n = std::min(width, count - i);
    for (int64_t j = 0; j < n; ++j) groups_[j] = std::max(groups_[j], maxima_[i + j]);
  }
  std::nth_element(groups_.begin(), groups_.begin() + (k - 1), groups_.end(), std::greater<float>());
  return groups_[k - 1];
}

// Columns with a smaller logit weigh less than that.
float ScopeLogits::bound_of_weights(Weighing how, double weight) const {
  constexpr double kMargin = 0.01;  // far more than all roundings of an exponent
  const double below = std::log(weight / static_cast<double>(kOneWeight)) - kMargin;
  const double bound = static_cast<double>(how.largest) + below * static_cast<double>(how.temperature);
  if (!(bound > -std::numeric_limits<float>::max())) return -kInfinity;
  return std::nextafter(static_cast<float>(bound), -kInfinity);
}

// Lists the places with at least this logit, in the order of their columns.
int64_t ScopeLogits::list_from(float bound) {
  grow(places_, blocks_ * kSampleBlock);
  int64_t count = loops_->at_least(x_, blocks_, maxima_.data(), bound, places_.data());
  while (places_[count - 1] >= size_) --count;  // the padding of the last block
  return count;
}

// Leaves the k best of the listed places.
int64_t ScopeLogits::keep_best(int64_t count, int64_t k) {
  if (count == k) return k;
  ranks_.resize(count);
  for (int64_t i = 0; i < count; ++i) ranks_[i] = rank_of(places_[i]);
  std::nth_element(ranks_.begin(), ranks_.begin() + (k - 1), ranks_.end());
  const uint64_t last = ranks_[k - 1];
  const auto end = places_.begin() + count;
  return std::remove_if(places_.begin(), end, [&](int32_t place) { return rank_of(place) > last; }) - places_.begin();
}

// Weighs the listed places; returns their sum.
int64_t ScopeLogits::weigh(int64_t count, Weighing how) {
  const int64_t padded = round_up(count, kSampleLanes);
  few_.assign(padded, -kInfinity);
  grow(weights_, padded);
  for (int64_t i = 0; i < count; ++i) few_[i] = x_[places_[i]];
  loops_->weights(few_.data(), padded, how, weights_.data());
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += weights_[i];
  return sum;
}

// Draws from the listed places, of which the best that reach `limit` (0: all) and weigh at least `least` are kept.
int64_t ScopeLogits::draw_from_listed(int64_t count, int64_t limit, int64_t least, double number) {
  if (limit > 0) {
    const uint64_t last = border(count, limit);
    for (int64_t i = 0; i < count; ++i) weights_[i] = rank_of(places_[i]) <= last ? weights_[i] : 0;
  }
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += weights_[i] = weights_[i] >= least ? weights_[i] : 0;
  int64_t target = target_of(number, sum);
  return places_[reach(weights_.data(), target)];
}

// Rank of the last of the listed places, best first, that are needed for their weights to reach `limit`. A histogram
// over the distance from the maximum leaves the few of its bucket.
uint64_t ScopeLogits::border(int64_t count, int64_t limit) {
  constexpr int32_t kBuckets = 256;
  const float range = largest_ - *std::min_element(few_.begin(), few_.begin() + count);
  const float steps = static_cast<float>(kBuckets - 1) / range;
  const float scale = range > 0 && steps < kInfinity ? steps : 0.0f;
  // A larger logit is in the same bucket or one before it.
  buckets_.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    const float step = (largest_ - few_[i]) * scale;
    buckets_[i] = static_cast<int32_t>(step < kBuckets - 1 ? step : kBuckets - 1);
  }
  int64_t sums[kBuckets] = {};
  for (int64_t i = 0; i < count; ++i) sums[buckets_[i]] += weights_[i];
  int64_t rest = limit - 1;
  const auto bucket = static_cast<int32_t>(reach(sums, rest));
  items_.clear();
  for (int64_t i = 0; i < count; ++i) {
    if (buckets_[i] == bucket) items_.push_back({rank_of(places_[i]), weights_[i]});
  }
  ++rest;
  auto begin = items_.begin(), end = items_.end();
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, [](const Item& a, const Item& b) { return a.rank < b.rank; });
    int64_t sum = 0;
    for (auto i = begin; i != middle; ++i) sum += i->weight;
    if (sum >= rest) {
      end = middle;
    } else {
      rest -= sum;
      begin = middle;
    }
  }
  return begin->rank;
}

}  // namespace speechlm
