// The logits of a stream's scope on the CPU, and the choice of a column from them.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "multistream_sample/multistream_sample.h"
#include "multistream_sample/sample_loops.h"

namespace speechlm {

// The logits of a scope in column order, in blocks. One per thread; it keeps its memory.
class ScopeLogits {
 public:
  // Makes room for n logits behind one that put_first may add; returns their address.
  float* begin(int64_t n);
  void put_first(float x);
  void put_last(float x);
  // Pads the last block, and finds the maximum. False if there is none, or a NaN or +inf.
  bool finish();

  // Sums the weights at temperature 1.
  int64_t total();
  // Penalizes the logits at these places, each once. They may occur several times.
  void penalize(const std::vector<int32_t>& places, float penalty);
  // The place that is chosen.
  int64_t choose(const SampleSettings& settings, const SampleChoice& choice, double number);

  int64_t size() const { return size_; }
  // The logit before it was penalized.
  float at(int64_t place) const;
  float largest() const { return largest_; }

 private:
  struct Item {
    uint64_t rank;  // ascending from the best column on
    int64_t weight;
  };
  uint64_t border(int64_t count, int64_t limit);
  uint64_t rank_of(int64_t place) const;
  int64_t first_largest() const;
  float bound_of_top_k(int64_t k);
  float bound_of_weights(Weighing how, double weight) const;
  int64_t list_from(float bound);
  int64_t keep_best(int64_t count, int64_t k);
  int64_t weigh(int64_t count, Weighing how);
  int64_t draw_from_listed(int64_t count, int64_t limit, int64_t least, double number);

  const SampleLoops* loops_ = nullptr;
  std::vector<float> memory_, maxima_, groups_, few_;
  std::vector<int64_t> sums_, weights_;
  std::vector<int32_t> places_, buckets_;
  std::vector<uint64_t> ranks_;
  std::vector<Item> items_;
  std::vector<bool> is_penalized_;
  std::vector<std::pair<int32_t, float>> unpenalized_;
  float* x_ = nullptr;
  int64_t size_ = 0, blocks_ = 0, total_ = 0;
  float largest_ = 0;
  bool has_nan_ = false, has_total_ = false;
};

}  // namespace speechlm
