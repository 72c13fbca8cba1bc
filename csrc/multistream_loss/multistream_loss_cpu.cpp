// The row kernel on the CPU. A block of rows belongs to one thread, which keeps a row of gradient beside the row of
// logits, because every stream must still see the logits that the others have used.
#include "multistream_loss/multistream_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/cpu/parallel.h"
#include "multistream_loss/loss_rows.h"

namespace speechlm {

#define SX_LOOPS(set)                  \
  namespace set {                      \
  template <typename T>                \
  const LossLoops<T>& loss_loops_of(); \
  }
SX_LOOPS(generic)
#ifdef SPEECHLM_SIMD_X86
SX_LOOPS(avx2)
SX_LOOPS(avx512)
#endif
#undef SX_LOOPS

template <typename T>
const LossLoops<T>& loss_loops() {
#ifdef SPEECHLM_SIMD_X86
  if (simd_in_use() == Simd::kAvx512) return avx512::loss_loops_of<T>();
  if (simd_in_use() == Simd::kAvx2) return avx2::loss_loops_of<T>();
#endif
  return generic::loss_loops_of<T>();
}

namespace {

constexpr int64_t kMinBlockRows = 8;
constexpr int64_t kMostBlocks = 16;
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
  // What the softmax of one stream in one row gives, before any gradient.
  struct Softmax {
    T scale;  // of exp(y - largest) in the gradient
    T minus;  // from every column of the scope
    T minus_target;
    int64_t target;  // column of the row; -1: a target that is not live
    int64_t target_in_scope;
  };

  // `at` is the token's place in targets, coef, …; e(i) is where the exponentials of slice i go.
  template <typename Z, typename B, typename E>
  Softmax softmax(int64_t k, int64_t at, const Z& z, const B& b, const E& e) {
    const LossStream& s = a_.streams[k];
    const LossSlice* slices = a_.slices + s.first_slice;
    T largest = -std::numeric_limits<T>::infinity(), at_target = 0, all = 0;
    Softmax out{0, 0, 0, -1, -1};
    int64_t before = 0;
    for (int64_t i = 0; i < s.num_slices; before += slices[i++].count) {
      const LossSlice& slice = slices[i];
      largest = std::max(largest, loops_.max(z(i), b(i), slice.count));
      if (a_.options.label_smoothing > 0) all += loops_.sum(z(i), b(i), slice.count);
      const int64_t column = a_.targets[at] - slice.id;
      if (column < 0 || column >= slice.count) continue;
      out.target = slice.begin + column;
      out.target_in_scope = before + column;
      at_target = z(i)[column] + (b(i) ? b(i)[column] : T{0});
    }
    T dot = 0;  // before the exponentials take the logits' place
    for (int64_t i = 0; a_.token_entropy && i < s.num_slices; ++i) {
      dot += loops_.exp_dot(z(i), b(i), slices[i].count, largest);
    }
    T total = 0;
    for (int64_t i = 0; i < s.num_slices; ++i) total += loops_.exp_sum(e(i), z(i), b(i), slices[i].count, largest);
    const T lse = largest + std::log(total);
    const T nll = lse - at_target;
    const T ls = static_cast<T>(a_.options.label_smoothing), zl = static_cast<T>(a_.options.z_loss);
    T loss = nll;
    if (ls > 0) loss = (1 - ls) * nll + ls * (lse - all / static_cast<T>(s.width));
    loss += zl * lse * lse;
    const T coef = a_.coef[at], coef_nll = a_.coef_nll ? a_.coef_nll[at] : T{0};
    loss_[k] += static_cast<double>(coef) * static_cast<double>(loss);
    correct_[k] += at_target == largest;
    if (a_.token_nll) a_.token_nll[at] = nll;
    if (a_.token_entropy) a_.token_entropy[at] = std::log(total) - dot / total;
    out.scale = (coef * (1 + 2 * zl * lse) + coef_nll) / total;
    out.minus = coef * ls / static_cast<T>(s.width);
    out.minus_target = coef * (1 - ls) + coef_nll;
    return out;
  }

  // The row's only live stream: its gradient takes the place of its logits.
  void only_stream(int64_t k, int64_t at, T* logits) {
    const LossStream& s = a_.streams[k];
    const LossSlice* slices = a_.slices + s.first_slice;
    const T* bias = a_.bias ? a_.bias + k * a_.num_columns : nullptr;
    const auto z = [&](int64_t i) { return logits + slices[i].begin; };
    const auto b = [&](int64_t i) { return bias ? bias + slices[i].begin : nullptr; };
    const Softmax soft = softmax(k, at, z, b, z);
    T* sums = s.sums >= 0 ? sums_ + s.sums : nullptr;
    int64_t before = 0, done = 0;
    for (int64_t i = 0; i < s.num_slices; before += slices[i++].count) {
      std::fill(logits + done, logits + slices[i].begin, T{0});
      loops_.finish(z(i), sums ? sums + before : nullptr, slices[i].count, soft.scale, soft.minus);
      done = slices[i].begin + slices[i].count;
    }
    std::fill(logits + done, logits + a_.num_columns, T{0});
    subtract_at_target(soft, logits, sums);
  }

  void stream(int64_t k, int64_t at, const T* logits) {
    const LossStream& s = a_.streams[k];
    const LossSlice* slices = a_.slices + s.first_slice;
    const T* bias = a_.bias ? a_.bias + k * a_.num_columns : nullptr;
    const bool capped = a_.options.softcap > 0;
    if (capped) cap(s, slices, logits, bias);
    starts_.resize(s.num_slices);
    for (int64_t i = 0, before = 0; i < s.num_slices; before += slices[i++].count) starts_[i] = before;
    // A slice's logits lie in the row with their bias, or capped, one slice after the other.
    const auto z = [&](int64_t i) -> const T* { return capped ? &capped_[starts_[i]] : logits + slices[i].begin; };
    const auto b = [&](int64_t i) -> const T* { return capped || !bias ? nullptr : bias + slices[i].begin; };
    const auto e = [&](int64_t i) { return &e_[starts_[i]]; };
    const Softmax soft = softmax(k, at, z, b, e);
    if (!a_.want_grad) return;
    T* sums = s.sums >= 0 ? sums_ + s.sums : nullptr;
    if (!capped) {
      add(s, slices, sums, soft.scale, soft.minus);
      subtract_at_target(soft, grad_.data(), sums);
      return;
    }
    // By the chain rule every gradient is multiplied by the slope of the cap, 1 - tanh^2.
    for (int64_t i = 0; i < s.width; ++i) {
      const T tanh = tanh_[i];
      const T at_this = i == soft.target_in_scope ? soft.minus_target : T{0};
      e_[i] = (soft.scale * e_[i] - soft.minus - at_this) * (1 - tanh * tanh);
    }
    add(s, slices, sums, 1, 0);
  }

  static void subtract_at_target(const Softmax& soft, T* grad, T* sums) {
    if (soft.target < 0) return;
    grad[soft.target] -= soft.minus_target;
    if (sums) sums[soft.target_in_scope] -= soft.minus_target;
  }

  void add(const LossStream& s, const LossSlice* slices, T* sums, T scale, T minus) {
    int64_t before = 0;
    for (int64_t i = 0; i < s.num_slices; before += slices[i++].count) {
      loops_.accumulate(&grad_[slices[i].begin], sums ? sums + before : nullptr, &e_[before], slices[i].count, scale,
                        minus);
    }
  }

  void cap(const LossStream& s, const LossSlice* slices, const T* logits, const T* bias) {
    const T most = static_cast<T>(a_.options.softcap);
    int64_t before = 0;
    for (int64_t i = 0; i < s.num_slices; before += slices[i++].count) {
      for (int64_t j = 0; j < slices[i].count; ++j) {
        const int64_t column = slices[i].begin + j;
        tanh_[before + j] = std::tanh((logits[column] + (bias ? bias[column] : T{0})) / most);
        capped_[before + j] = most * tanh_[before + j];
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
  const int64_t most = std::clamp<int64_t>(kSumsBytes / bytes, 2, kMostBlocks);
  const int64_t block_rows = std::max(kMinBlockRows, (a.num_rows + most - 1) / most);
  const int64_t blocks = (a.num_rows + block_rows - 1) / block_rows;
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

template const LossLoops<float>& loss_loops<float>();
template const LossLoops<double>& loss_loops<double>();
template void multistream_loss_rows_cpu<float>(const LossRowsArgs<float>&, int);
template void multistream_loss_rows_cpu<double>(const LossRowsArgs<double>&, int);

}  // namespace speechlm
