// The factorised softmax on the CPU: exp(b - top) of every stream that shares the exponentials of a row (see
// kMaxBiasRange). They are the same for all rows.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "multistream_loss/rows/loss_rows.h"
#include "multistream_loss/rows/loss_terms.h"
#include "multistream_loss/rows/loss_tiles.h"

namespace speechlm {

template <typename T>
class LossFactors {
 public:
  LossFactors(const LossRowsArgs<T>& args, const LossLoops<T>& loops)
      : num_columns_(args.num_columns), streams_(args.streams), tops_(args.num_streams) {
    // The other terms need the logits themselves.
    if (args.options.softcap > 0 || args.options.label_smoothing > 0 || args.token_entropy != nullptr) return;
    for (auto& tile : loss_tiles(args, static_cast<size_t>(args.num_streams))) {
      if (tile.size() < 2) continue;
      values_.resize(static_cast<size_t>(args.num_bias * args.num_columns));
      bool is_narrow = true;
      for (int64_t k : tile) is_narrow = is_narrow && fill(args, loops, k);
      if (is_narrow) tiles_.push_back(std::move(tile));
    }
  }

  // The tiles whose streams all have a narrow bias.
  const std::vector<std::vector<int64_t>>& tiles() const { return tiles_; }
  // Largest bias of a stream.
  T top(int64_t k) const { return tops_[k]; }
  // By column; null for a stream without bias, whose factors are 1.
  const T* of(int64_t k) const {
    return streams_[k].bias < 0 ? nullptr : values_.data() + streams_[k].bias * num_columns_;
  }

 private:
  // False if the bias is too wide, or not finite.
  bool fill(const LossRowsArgs<T>& args, const LossLoops<T>& loops, int64_t k) {
    const LossStream& s = args.streams[k];
    if (s.bias < 0) return true;
    const T* bias = args.bias + s.bias * num_columns_;
    const LossSlice* slices = args.slices + s.first_slice;
    T top = -std::numeric_limits<T>::infinity();
    for (int64_t i = 0; i < s.num_slices; ++i) {
      top = std::max(top, loops.max(bias + slices[i].begin, nullptr, slices[i].count));
    }
    if (!std::isfinite(top)) return false;
    tops_[k] = top;
    const T least = top - static_cast<T>(kMaxBiasRange);
    T* values = values_.data() + s.bias * num_columns_;
    for (int64_t i = 0; i < s.num_slices; ++i) {
      const T* from = bias + slices[i].begin;
      bool is_narrow = true;
      for (int64_t j = 0; j < slices[i].count; ++j) is_narrow &= from[j] >= least;  // not so for a NaN
      if (!is_narrow) return false;
      loops.exp_sum(values + slices[i].begin, from, nullptr, slices[i].count, top);
    }
    return true;
  }

  int64_t num_columns_;
  const LossStream* streams_;
  std::vector<T> values_;  // [num_bias, num_columns], inside the scopes
  std::vector<T> tops_;
  std::vector<std::vector<int64_t>> tiles_;
};

}  // namespace speechlm
