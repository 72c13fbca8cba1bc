// Selection without sorting a scope: top-k looks at the few columns above a bound that is found from maxima of groups,
// top-p at the one bucket of logits in which the border lies, and a draw at one block of columns.
#include "multistream_sample/selection.h"

#include <algorithm>
#include <limits>

#include "multistream_sample/choice.h"

namespace speechlm {

#define SX_LOOPS(set)                   \
  namespace set {                       \
  const SampleLoops& sample_loops_of(); \
  template <typename T>                 \
  LoadLoop<T> load_loop_of();           \
  }
SX_LOOPS(generic)
#ifdef SPEECHLM_SIMD_X86
SX_LOOPS(avx2)
SX_LOOPS(avx512)
#endif
#undef SX_LOOPS

const SampleLoops& sample_loops() {
#ifdef SPEECHLM_SIMD_X86
  if (simd_in_use() == Simd::kAvx512) return avx512::sample_loops_of();
  if (simd_in_use() == Simd::kAvx2) return avx2::sample_loops_of();
#endif
  return generic::sample_loops_of();
}

template <typename T>
LoadLoop<T> load_loop() {
#ifdef SPEECHLM_SIMD_X86
  if (simd_in_use() == Simd::kAvx512) return avx512::load_loop_of<T>();
  if (simd_in_use() == Simd::kAvx2) return avx2::load_loop_of<T>();
#endif
  return generic::load_loop_of<T>();
}
template LoadLoop<float> load_loop<float>();
template LoadLoop<BFloat16> load_loop<BFloat16>();
template LoadLoop<Float16> load_loop<Float16>();

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

float* Scope::begin(int64_t n) {
  loops_ = &sample_loops();
  constexpr int64_t kLine = 16;  // floats of a cache line
  grow(memory_, n + 2 * kLine + kSampleBlock + 1);
  const auto address = reinterpret_cast<uintptr_t>(memory_.data()) / sizeof(float);
  x_ = memory_.data() + (2 * kLine - static_cast<int64_t>(address % kLine));
  size_ = n;
  has_total_ = false;
  unpenalised_.clear();
  return x_;
}

void Scope::put_first(float x) {
  *--x_ = x;
  ++size_;
}

void Scope::put_last(float x) { x_[size_++] = x; }

bool Scope::finish() {
  blocks_ = (size_ + kSampleBlock - 1) / kSampleBlock;
  std::fill(x_ + size_, x_ + blocks_ * kSampleBlock, -kInfinity);
  grow(maxima_, blocks_ * kSampleLanes);
  grow(sums_, blocks_);
  has_nan_ = loops_->maxima(x_, blocks_, maxima_.data(), &largest_);
  return !has_nan_ && largest_ > -kInfinity && largest_ < kInfinity;
}

int64_t Scope::total() {
  total_ = loops_->sums(x_, blocks_, {largest_, 1.0f}, sums_.data());
  has_total_ = true;
  return total_;
}

void Scope::penalise(const std::vector<int32_t>& places, float penalty) {
  if (places.empty()) return;
  is_penalised_.resize(std::max<size_t>(is_penalised_.size(), size_));
  for (const int32_t place : places) {
    if (is_penalised_[place]) continue;
    is_penalised_[place] = true;
    unpenalised_.emplace_back(place, x_[place]);
    x_[place] = penalised(x_[place], penalty);
  }
  for (const int32_t place : places) is_penalised_[place] = false;
  loops_->maxima(x_, blocks_, maxima_.data(), &largest_);
  has_total_ = false;
}

float Scope::at(int64_t place) const {
  for (const auto& [changed, x] : unpenalised_) {
    if (changed == place) return x;
  }
  return x_[place];
}

uint64_t Scope::rank_of(int64_t place) const {
  return uint64_t{~key_of(x_[place])} << 32 | static_cast<uint64_t>(place);
}

int64_t Scope::choose(const SampleSettings& settings, const SampleChoice& choice, double number) {
  if (is_greedy(settings, choice)) return first_largest();
  const int64_t k = kept_by(choice.top_k, size_);
  if (k < size_) return choose_of_top_k(k, settings, number);
  const Weighing how{largest_, settings.temperature};
  Kept kept{-kInfinity, std::numeric_limits<int32_t>::max(), least_weight(settings.min_p)};
  const bool all = !(settings.top_p < 1) && kept.least == 0;
  if (settings.top_p < 1) {
    const int64_t least = kept.least;
    kept = top_p_border(how, settings.top_p);
    kept.least = least;
  }
  return draw(how, kept, all, number);
}

int64_t Scope::first_largest() const {
  int64_t b = 0;
  while (std::find(&maxima_[b * kSampleLanes], &maxima_[b * kSampleLanes] + kSampleLanes, largest_) ==
         &maxima_[b * kSampleLanes] + kSampleLanes) {
    ++b;
  }
  return std::find(x_ + b * kSampleBlock, x_ + size_, largest_) - x_;
}

// At least k columns have this logit or a larger one: k groups of columns have a maximum that does.
float Scope::lower_bound(int64_t k) {
  int64_t count = blocks_ * kSampleLanes;
  if (count < k) return -kInfinity;
  // Fewer and larger groups are as good, as long as there are some more than k.
  int64_t parts = 1;
  while ((blocks_ / (2 * parts)) * kSampleLanes >= 2 * k) parts *= 2;
  const int64_t width = blocks_ / parts * kSampleLanes;
  groups_.assign(maxima_.begin(), maxima_.begin() + width);
  for (int64_t i = width; i < count; i += width) {
    const int64_t n = std::min(width, count - i);
    for (int64_t j = 0; j < n; ++j) groups_[j] = std::max(groups_[j], maxima_[i + j]);
  }
  std::nth_element(groups_.begin(), groups_.begin() + (k - 1), groups_.end(), std::greater<float>());
  return groups_[k - 1];
}

int64_t Scope::choose_of_top_k(int64_t k, const SampleSettings& settings, double number) {
  grow(places_, blocks_ * kSampleBlock);
  int64_t count = loops_->at_least(x_, blocks_, maxima_.data(), lower_bound(k), places_.data());
  while (places_[count - 1] >= size_) --count;  // what fills the last block up
  if (count > k) {
    ranks_.resize(count);
    for (int64_t i = 0; i < count; ++i) ranks_[i] = rank_of(places_[i]);
    std::nth_element(ranks_.begin(), ranks_.begin() + (k - 1), ranks_.end());
    const uint64_t last = ranks_[k - 1];
    count = std::remove_if(places_.begin(), places_.begin() + count, [&](int32_t p) { return rank_of(p) > last; }) -
            places_.begin();
  }
  // Now they are k, in the order of their columns.
  const int64_t padded = (k + kSampleLanes - 1) / kSampleLanes * kSampleLanes;
  few_.assign(padded, -kInfinity);
  grow(weights_, padded);
  for (int64_t i = 0; i < k; ++i) few_[i] = x_[places_[i]];
  loops_->weights(few_.data(), padded, {largest_, settings.temperature}, weights_.data());
  int64_t sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += weights_[i];
  if (const int64_t limit = top_p_limit(settings.top_p, sum)) {
    items_.resize(k);
    for (int64_t i = 0; i < k; ++i) items_[i] = {rank_of(places_[i]), weights_[i]};
    const uint64_t last = border(items_, limit);
    for (int64_t i = 0; i < k; ++i) weights_[i] = rank_of(places_[i]) <= last ? weights_[i] : 0;
  }
  const int64_t least = least_weight(settings.min_p);
  sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += weights_[i] = weights_[i] >= least ? weights_[i] : 0;
  int64_t target = target_of(number, sum);
  return places_[reach(weights_.data(), target)];
}

// Rank of the last item of the shortest beginning whose weights reach `limit`.
uint64_t Scope::border(std::vector<Item>& items, int64_t limit) {
  auto begin = items.begin(), end = items.end();
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, [](const Item& a, const Item& b) { return a.rank < b.rank; });
    int64_t sum = 0;
    for (auto i = begin; i != middle; ++i) sum += i->weight;
    if (sum >= limit) {
      end = middle;
    } else {
      limit -= sum;
      begin = middle;
    }
  }
  return begin->rank;
}

Kept Scope::top_p_border(Weighing how, float top_p) {
  grow(buckets_, kSampleBuckets);
  loops_->histogram(x_, blocks_, how, buckets_.data());
  int64_t sum = 0;
  for (int64_t i = 0; i < kSampleBuckets; ++i) sum += buckets_[i];
  int64_t target = top_p_limit(top_p, sum) - 1;
  const int64_t bucket = reach(buckets_.data(), target);
  grow(places_, blocks_ * kSampleBlock);
  const int64_t count = loops_->in_bucket(x_, blocks_, how, static_cast<int32_t>(bucket), places_.data());
  const int64_t padded = (count + kSampleLanes - 1) / kSampleLanes * kSampleLanes;
  few_.assign(padded, -kInfinity);
  grow(weights_, padded);
  for (int64_t i = 0; i < count; ++i) few_[i] = x_[places_[i]];
  loops_->weights(few_.data(), padded, how, weights_.data());
  items_.resize(count);
  for (int64_t i = 0; i < count; ++i) items_[i] = {rank_of(places_[i]), weights_[i]};
  const uint64_t last = border(items_, target + 1);
  return {value_of(~static_cast<uint32_t>(last >> 32)), static_cast<int32_t>(last & 0xffffffffu), 0};
}

int64_t Scope::draw(Weighing how, const Kept& kept, bool all, double number) {
  int64_t sum = total_;
  if (!all) {
    sum = loops_->kept_sums(x_, blocks_, how, kept, sums_.data());
  } else if (!has_total_ || how.temperature != 1) {
    sum = loops_->sums(x_, blocks_, how, sums_.data());
  }
  int64_t target = target_of(number, sum);
  const int64_t block = reach(sums_.data(), target), first = block * kSampleBlock;
  grow(weights_, kSampleBlock);
  loops_->weights(x_ + first, kSampleBlock, how, weights_.data());
  for (int64_t i = 0; i < kSampleBlock && !all; ++i) {
    const float v = x_[first + i];
    const bool is_kept = v > kept.value || (v == kept.value && first + i <= kept.last);
    if (!is_kept || weights_[i] < kept.least) weights_[i] = 0;
  }
  return first + reach(weights_.data(), target);
}

}  // namespace speechlm
