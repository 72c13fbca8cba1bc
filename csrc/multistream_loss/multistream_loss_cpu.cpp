// The row kernel of multistream_loss on the CPU. A block of rows belongs to one thread, which keeps a row of gradient
// beside the row of logits, because every stream must still see the logits that the others have used.
#include "multistream_loss/multistream_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/cpu/parallel.h"
#include "multistream_loss/loss_rows.h"
#include "multistream_loss/loss_terms.h"

namespace speechlm {

namespace {

constexpr int64_t kMinBlockRows = 8;
constexpr int64_t kMaxBlocks = 16;
constexpr int64_t kSmall = 1 << 16;      // logits, for which waking another thread takes longer than it saves
constexpr int64_t kSumsBytes = 2 << 20;  // of all blocks' column sums together

template <typename T>
class RowBlock {
 public:
  RowBlock(const LossRowsArgs<T>& args, T* sums)
      : a_(args), loops_(loss_loops<T>()), sums_(sums), loss_(args.num_streams), correct_(args.num_streams) {
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
      if (!a_.live[first + a_.streams[k].index]) continue;
      ++num_live;
      last = k;
    }
    if (num_live == 1 && a_.want_grad && !(a_.options.softcap > 0)) {  // text, mostly
      only_stream(last, first + a_.streams[last].index, logits);
      return;
    }
    if (a_.want_grad) std::fill(grad_.begin(), grad_.end(), T{0});
    for (int64_t k = 0; k < a_.num_streams && num_live > 0; ++k) {
      const int64_t at = first + a_.streams[k].index;
      if (a_.live[at]) stream(k, at, logits);
    }
    if (a_.want_grad) std::copy(grad_.begin(), grad_.end(), logits);
  }

  const std::vector<double>& loss() const { return loss_; }
  const std::vector<int64_t>& correct() const { return correct_; }

 private:
  // The gradient's terms, and the target's column.
  struct Gradient {
    LossTerms<T> terms;
    int64_t target = -1;  // column of the row; -1: outside the scope
    int64_t target_in_scope = -1;
  };

  // `at` is the token's place in targets, coef, …; e(i) is where the exponentials of slice i go.
  template <typename Z, typename B, typename E>
  Gradient softmax(int64_t k, int64_t at, const Z& z, const B& b, const E& e) {
    const LossStream& s = a_.streams[k];
    const LossSlice* slices = a_.slices + s.first_slice;
    SoftmaxSums<T> sums;
    T at_target = 0;
    Gradient out;
    int64_t before = 0;
    for (int64_t i = 0; i < s.num_slices; before += slices[i++].count) {
      const LossSlice& slice = slices[i];
      sums.largest = std::max(sums.largest, loops_.max(z(i), b(i), slice.count));
      if (a_.options.label_smoothing > 0) sums.all += loops_.sum(z(i), b(i), slice.count);
      const int64_t column = a_.targets[at] - slice.id;
      if (column < 0 || column >= slice.count) continue;
      out.target = slice.begin + column;
      out.target_in_scope = before + column;
      at_target = z(i)[column] + (b(i) ? b(i)[column] : T{0});
    }
    // Before the exponentials take the logits' place.
    for (int64_t i = 0; a_.token_entropy && i < s.num_slices; ++i) {
      sums.weighted += loops_.exp_dot(z(i), b(i), slices[i].count, sums.largest);
    }
    for (int64_t i = 0; i < s.num_slices; ++i) {
      sums.total += loops_.exp_sum(e(i), z(i), b(i), slices[i].count, sums.largest);
    }
    const T coef_nll = a_.coef_nll ? a_.coef_nll[at] : T{0};
    const TokenLoss<T> token = token_loss(sums, at_target, s.width, a_.options, a_.coef[at], coef_nll);
    loss_[k] += token.loss;
    correct_[k] += token.is_correct;
    if (a_.token_nll) a_.token_nll[at] = token.nll;
    if (a_.token_entropy) a_.token_entropy[at] = token.log_total - sums.weighted / sums.total;
    out.terms = token.terms;
    return out;
  }

  // The row's only live stream: its gradient takes the place of its logits.
  void only_stream(int64_t k, int64_t at, T* logits) {
    const LossStream& s = a_.streams[k];
    const LossSlice* slices = a_.slices + s.first_slice;
    const T* bias = a_.bias ? a_.bias + k * a_.num_columns : nullptr;
    const auto z = [&](int64_t i) { return logits + slices[i].begin; };
    const auto b = [&](int64_t i) { return bias ? bias + slices[i].begin : nullptr; };
    const Gradient grad = softmax(k, at, z, b, z);
    T* sums = s.sums >= 0 ? sums_ + s.sums : nullptr;
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
    const T* bias = a_.bias ? a_.bias + k * a_.num_columns : nullptr;
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
    T* sums = s.sums >= 0 ? sums_ + s.sums : nullptr;
    if (!capped) {
      add(s, slices, sums, grad.terms.scale, grad.terms.minus);
      subtract_at_target(grad, grad_.data(), sums);
      return;
    }
    // By the chain rule every gradient is multiplied by the slope of the cap, 1 - tanh^2.
    for (int64_t i = 0; i < s.width; ++i) {
      const T tanh = tanh_[i];
      const T at_this = i == grad.target_in_scope ? grad.terms.minus_target : T{0};
      e_[i] = (grad.terms.scale * e_[i] - grad.terms.minus - at_this) * (1 - tanh * tanh);
    }
    add(s, slices, sums, 1, 0);
  }

  static void subtract_at_target(const Gradient& grad, T* columns, T* sums) {
    if (grad.target < 0) return;
    columns[grad.target] -= grad.terms.minus_target;
    if (sums) sums[grad.target_in_scope] -= grad.terms.minus_target;
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
  T* sums_;
  std::vector<double> loss_;
  std::vector<int64_t> correct_;
  std::vector<T> e_, capped_, tanh_, grad_;
  std::vector<int64_t> starts_;
};

}  // namespace

template <typename T>
void multistream_loss_rows_cpu(const LossRowsArgs<T>& a, int threads) {
  if (a.num_rows == 0) return;
  const bool with_sums = a.want_grad && a.column_sums != nullptr && a.num_sums > 0;
  const int64_t bytes = with_sums ? a.num_sums * static_cast<int64_t>(sizeof(T)) : 1;
  const int64_t max_blocks = std::clamp<int64_t>(kSumsBytes / bytes, 2, kMaxBlocks);
  const int64_t block_rows = std::max(kMinBlockRows, ceil_div(a.num_rows, max_blocks));
  const int64_t blocks = ceil_div(a.num_rows, block_rows);
  std::vector<T> sums(with_sums ? blocks * a.num_sums : 0);
  std::vector<std::vector<double>> loss(blocks);
  std::vector<std::vector<int64_t>> correct(blocks);
  if (a.num_rows * a.num_columns < kSmall) threads = 1;
  parallel_for(blocks, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      RowBlock<T> work(a, sums.data() + (with_sums ? block * a.num_sums : 0));
      const int64_t stop = std::min(a.num_rows, (block + 1) * block_rows);
      for (int64_t r = block * block_rows; r < stop; ++r) work.row(r);
      loss[block] = work.loss();
      correct[block] = work.correct();
    }
  });
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t k = 0; k < a.num_streams; ++k) {
      a.stream_loss[k] += loss[block][k];
      a.stream_correct[k] += correct[block][k];
    }
  }
  if (!with_sums) return;
  parallel_for(a.num_sums, 4096, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = 0; block < blocks; ++block) {
      const T* from = sums.data() + block * a.num_sums;
      for (int64_t i = begin; i < end; ++i) a.column_sums[i] += from[i];
    }
  });
}

template void multistream_loss_rows_cpu<float>(const LossRowsArgs<float>&, int);
template void multistream_loss_rows_cpu<double>(const LossRowsArgs<double>&, int);

}  // namespace speechlm
