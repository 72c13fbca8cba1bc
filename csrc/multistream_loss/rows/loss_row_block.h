// The row kernel of multistream_loss on the CPU: one row after the other of a block that belongs to one thread. A row
// of gradient is kept beside the row of logits, because every stream must still see the logits that the others have
// used.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "multistream_loss/rows/loss_factors.h"

namespace speechlm {

template <typename T>
class RowBlock {
 public:
  RowBlock(const LossRowsArgs<T>& args, const LossFactors<T>& factors, T* sums)
      : a_(args),
        loops_(loss_loops<T>()),
        factors_(factors),
        sums_(sums),
        loss_(args.num_streams),
        correct_(args.num_streams),
        count_(args.num_streams),
        is_done_(args.num_streams) {
    int64_t widest = 0;
    for (int64_t k = 0; k < a_.num_streams; ++k) widest = std::max(widest, a_.streams[k].width);
    e_.resize(widest);
    if (a_.options.softcap > 0) {
      capped_.resize(widest);
      tanh_.resize(widest);
    }
    if (a_.want_grad) grad_.resize(a_.num_columns);
  }

  void row(int64_t r) {
    T* logits = a_.logits + r * a_.num_columns;
    const int64_t first = a_.rows[r] * a_.num_targets;
    int64_t num_live = 0, last = 0;
    for (int64_t k = 0; k < a_.num_streams; ++k) {
      is_done_[k] = !is_live(first, k);
      if (is_done_[k]) continue;
      ++num_live;
      ++count_[k];
      last = k;
    }
    if (num_live == 1 && a_.want_grad && !(a_.options.softcap > 0)) {  // text, mostly
      only_stream(last, first + a_.streams[last].index, logits);
      return;
    }
    if (a_.want_grad) std::fill(grad_.begin(), grad_.end(), T{0});
    for (const auto& tile : factors_.tiles()) share_exponentials(tile, first, logits);
    for (int64_t k = 0; k < a_.num_streams; ++k) {
      if (!is_done_[k]) stream(k, first + a_.streams[k].index, logits);
    }
    if (a_.want_grad) std::copy(grad_.begin(), grad_.end(), logits);
  }

  const std::vector<double>& loss() const { return loss_; }
  const std::vector<int64_t>& correct() const { return correct_; }
  const std::vector<int64_t>& count() const { return count_; }

 private:
  // Where a target is in the row and in its scope; -1: outside the scope.
  struct Target {
    int64_t column = -1;
    int64_t in_scope = -1;
  };
  struct Gradient {
    LossTerms<T> terms;
    Target target;
  };

  bool is_live(int64_t first, int64_t k) const { return a_.live[first + a_.streams[k].index] != 0; }

  const T* bias_of(int64_t k) const {
    return a_.streams[k].bias < 0 ? nullptr : a_.bias + a_.streams[k].bias * a_.num_columns;
  }

  Target find_target(const LossStream& s, int64_t at) const {
    int64_t before = 0;
    for (int64_t i = 0; i < s.num_slices; ++i) {
      const LossSlice& slice = a_.slices[s.first_slice + i];
      const int64_t id = a_.targets[at];
      if (id >= slice.id && id - slice.id < slice.count) return {slice.begin + id - slice.id, before + id - slice.id};
      before += slice.count;
    }
    return {};
  }

  // Records a token's loss; returns the terms of its gradient.
  LossTerms<T> record(int64_t k, int64_t at, const SoftmaxSums<T>& sums, T at_target, bool is_correct) {
    const T coef_nll = a_.coef_nll ? a_.coef_nll[at] : T{0};
    const TokenLoss<T> token = token_loss(sums, at_target, a_.streams[k].width, a_.options, a_.coef[at], coef_nll);
    loss_[k] += token.loss;
    correct_[k] += is_correct;
    if (a_.token_nll) a_.token_nll[at] = token.nll;
    if (a_.token_entropy) a_.token_entropy[at] = token.log_total - sums.weighted / sums.total;
    return token.terms;
  }

  // `at` is the token's place in targets, coef, …; e(i) is where the exponentials of slice i go.
  template <typename Z, typename B, typename E>
  Gradient softmax(int64_t k, int64_t at, const Z& z, const B& b, const E& e) {
    const LossStream& s = a_.streams[k];
    const LossSlice* slices = a_.slices + s.first_slice;
    const Target target = find_target(s, at);
    SoftmaxSums<T> sums;
    T at_target = std::numeric_limits<T>::quiet_NaN();
    int64_t before = 0;
    for (int64_t i = 0; i < s.num_slices; before += slices[i++].count) {
      const LossSlice& slice = slices[i];
      sums.largest = std::max(sums.largest, loops_.max(z(i), b(i), slice.count));
      if (a_.options.label_smoothing > 0) sums.all += loops_.sum(z(i), b(i), slice.count);
      const int64_t column = target.in_scope - before;
      if (column >= 0 && column < slice.count) at_target = z(i)[column] + (b(i) ? b(i)[column] : T{0});
    }
    // Before the exponentials take the logits' place.
    for (int64_t i = 0; a_.token_entropy && i < s.num_slices; ++i) {
      sums.weighted += loops_.exp_dot(z(i), b(i), slices[i].count, sums.largest);
    }
    for (int64_t i = 0; i < s.num_slices; ++i) {
      sums.total += loops_.exp_sum(e(i), z(i), b(i), slices[i].count, sums.largest);
    }
    return {record(k, at, sums, at_target, at_target == sums.largest), target};
  }

  // The live streams of a tile, if it has several: one exponential per column for all of them.
  void share_exponentials(const std::vector<int64_t>& tile, int64_t first, const T* logits) {
    const auto num_live = std::count_if(tile.begin(), tile.end(), [&](int64_t k) { return is_live(first, k); });
    if (num_live < 2) return;
    const LossStream& any = a_.streams[tile.front()];
    const LossSlice* slices = a_.slices + any.first_slice;
    T largest = -std::numeric_limits<T>::infinity(), total = 0;
    for (int64_t i = 0; i < any.num_slices; ++i) {
      largest = std::max(largest, loops_.max(logits + slices[i].begin, nullptr, slices[i].count));
    }
    for (int64_t i = 0, before = 0; i < any.num_slices; before += slices[i++].count) {
      total += loops_.exp_sum(&e_[before], logits + slices[i].begin, nullptr, slices[i].count, largest);
    }
    for (const int64_t k : tile) {
      if (is_done_[k]) continue;
      is_done_[k] = true;
      add_from_exponentials(k, first + a_.streams[k].index, logits, largest, total);
    }
  }

  // One stream from the exponentials e_ of the logits alone; `total` is their sum.
  void add_from_exponentials(int64_t k, int64_t at, const T* logits, T largest, T total) {
    const LossStream& s = a_.streams[k];
    const LossSlice* slices = a_.slices + s.first_slice;
    const T* factors = factors_.of(k);
    const Target target = find_target(s, at);
    SoftmaxSums<T> softmax;
    softmax.largest = largest + factors_.top(k);
    T likeliest = 0, at_target = std::numeric_limits<T>::quiet_NaN();
    bool is_correct = false;
    if (factors == nullptr) {
      softmax.total = total;
    } else {
      for (int64_t i = 0, before = 0; i < s.num_slices; before += slices[i++].count) {
        softmax.total += loops_.dot_max(&e_[before], factors + slices[i].begin, slices[i].count, &likeliest);
      }
    }
    if (target.column >= 0) {
      at_target = logits[target.column];
      is_correct =
          factors == nullptr ? at_target == largest : e_[target.in_scope] * factors[target.column] == likeliest;
      if (factors != nullptr) at_target += bias_of(k)[target.column];
    }
    const LossTerms<T> terms = record(k, at, softmax, at_target, is_correct);
    if (!a_.want_grad) return;
    T* sums = s.sums_row >= 0 ? sums_ + s.sums : nullptr;
    if (factors == nullptr) {
      add(s, slices, sums, terms.scale, 0);
    } else {
      for (int64_t i = 0, before = 0; i < s.num_slices; before += slices[i++].count) {
        const int64_t begin = slices[i].begin;
        loops_.accumulate_product(&grad_[begin], sums ? sums + before : nullptr, &e_[before], factors + begin,
                                  slices[i].count, terms.scale);
      }
    }
    subtract_at_target({terms, target}, grad_.data(), sums);
  }

  // The row's only live stream: its gradient takes the place of its logits.
  void only_stream(int64_t k, int64_t at, T* logits) {
    const LossStream& s = a_.streams[k];
    const LossSlice* slices = a_.slices + s.first_slice;
    const T* bias = bias_of(k);
    const auto z = [&](int64_t i) { return logits + slices[i].begin; };
    const auto b = [&](int64_t i) { return bias ? bias + slices[i].begin : nullptr; };
    const Gradient grad = softmax(k, at, z, b, z);
    T* sums = s.sums_row >= 0 ? sums_ + s.sums : nullptr;
    int64_t before = 0, done = 0;
    for (int64_t i = 0; i < s.num_slices; before += slices[i++].count) {
      std::fill(logits + done, logits + slices[i].begin, T{0});
      loops_.finish(z(i), sums ? sums + before : nullptr, slices[i].count, grad.terms.scale, grad.terms.minus);
      done = slices[i].begin + slices[i].count;
    }
    std::fill(logits + done, logits + a_.num_columns, T{0});
    subtract_at_target(grad, logits, sums);
  }

  void stream(int64_t k, int64_t at, const T* logits) {
    const LossStream& s = a_.streams[k];
    const LossSlice* slices = a_.slices + s.first_slice;
    const T* bias = bias_of(k);
    const bool capped = a_.options.softcap > 0;
    if (capped) cap(s, slices, logits, bias);
    starts_.resize(s.num_slices);
    for (int64_t i = 0, before = 0; i < s.num_slices; before += slices[i++].count) starts_[i] = before;
    // A slice's logits: in the row, with their bias; or capped, one slice after the other.
    const auto z = [&](int64_t i) -> const T* { return capped ? &capped_[starts_[i]] : logits + slices[i].begin; };
    const auto b = [&](int64_t i) -> const T* { return capped || !bias ? nullptr : bias + slices[i].begin; };
    const auto e = [&](int64_t i) { return &e_[starts_[i]]; };
    const Gradient grad = softmax(k, at, z, b, e);
    if (!a_.want_grad) return;
    T* sums = s.sums_row >= 0 ? sums_ + s.sums : nullptr;
    if (!capped) {
      add(s, slices, sums, grad.terms.scale, grad.terms.minus);
      subtract_at_target(grad, grad_.data(), sums);
      return;
    }
    // By the chain rule every gradient is multiplied by the slope of the cap, 1 - tanh^2.
    for (int64_t i = 0; i < s.width; ++i) {
      const T tanh = tanh_[i];
      const T at_this = i == grad.target.in_scope ? grad.terms.minus_target : T{0};
      e_[i] = (grad.terms.scale * e_[i] - grad.terms.minus - at_this) * (1 - tanh * tanh);
    }
    add(s, slices, sums, 1, 0);
  }

  static void subtract_at_target(const Gradient& grad, T* columns, T* sums) {
    if (grad.target.column < 0) return;
    columns[grad.target.column] -= grad.terms.minus_target;
    if (sums) sums[grad.target.in_scope] -= grad.terms.minus_target;
  }

  void add(const LossStream& s, const LossSlice* slices, T* sums, T scale, T minus) {
    int64_t before = 0;
    for (int64_t i = 0; i < s.num_slices; before += slices[i++].count) {
      loops_.accumulate(&grad_[slices[i].begin], sums ? sums + before : nullptr, &e_[before], slices[i].count, scale,
                        minus);
    }
  }

  void cap(const LossStream& s, const LossSlice* slices, const T* logits, const T* bias) {
    const T limit = static_cast<T>(a_.options.softcap);
    int64_t before = 0;
    for (int64_t i = 0; i < s.num_slices; before += slices[i++].count) {
      for (int64_t j = 0; j < slices[i].count; ++j) {
        const int64_t column = slices[i].begin + j;
        tanh_[before + j] = std::tanh((logits[column] + (bias ? bias[column] : T{0})) / limit);
        capped_[before + j] = limit * tanh_[before + j];
      }
    }
  }

  const LossRowsArgs<T>& a_;
  const LossLoops<T>& loops_;
  const LossFactors<T>& factors_;
  T* sums_;  // of the block, stream after stream, each as wide as its scope
  std::vector<double> loss_;
  std::vector<int64_t> correct_, count_;
  std::vector<bool> is_done_;  // streams of the current row
  std::vector<T> e_, capped_, tanh_, grad_;
  std::vector<int64_t> starts_;
};

}  // namespace speechlm
