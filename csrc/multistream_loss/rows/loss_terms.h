// From the sums of a softmax to the loss of a token and the terms of its gradient: one formula for both devices.
#pragma once

#include <cmath>

#include "common/host_device.h"
#include "multistream_loss/multistream_loss.h"

namespace speechlm {

// Over the logits y of a scope.
template <typename Acc>
struct SoftmaxSums {
  Acc largest = static_cast<Acc>(-INFINITY);
  Acc total = 0;     // of e = exp(y - largest)
  Acc weighted = 0;  // of e * (y - largest), for the entropy
  Acc all = 0;       // of y, for the smoothing
};

// The gradient of one stream in one row: scale * exp(y - largest) - minus, and minus_target from the target's column.
template <typename Acc>
struct alignas(16) LossTerms {
  Acc largest;
  Acc scale;
  Acc minus;
  Acc minus_target;
};

// Several streams of equal slices share the exponentials of a row where their biases allow it (the factorised softmax):
//   exp(z + b - largest - top) = exp(z - largest) * exp(b - top),  largest = max z,  top = max b,
// so a row takes one exponential per column, and a stream one product. Its total is at least exp(min b - top): within
// this range nothing of weight underflows. A bias with a wider range, or one that is not finite, is added to the
// logits.
constexpr double kMaxBiasRange = 40;

template <typename Acc>
struct TokenLoss {
  Acc nll;
  Acc log_total;  // the entropy is log_total - weighted / total
  double loss;    // coef * loss
  LossTerms<Acc> terms;
};

// `at_target`: the target's logit, NaN for a target outside the scope. `columns`: of the scope.
template <typename Acc>
SX_HOST_DEVICE inline TokenLoss<Acc> token_loss(const SoftmaxSums<Acc>& sums, Acc at_target, int64_t columns,
                                                const LossOptions& options, Acc coef, Acc coef_nll) {
  const auto width = static_cast<Acc>(columns);
  const auto ls = static_cast<Acc>(options.label_smoothing), zl = static_cast<Acc>(options.z_loss);
  const Acc log_total = std::log(sums.total);
  const Acc lse = sums.largest + log_total;
  const Acc nll = lse - at_target;
  Acc loss = nll;
  if (ls > 0) loss = (1 - ls) * nll + ls * (lse - sums.all / width);
  loss += zl * lse * lse;
  return {nll,
          log_total,
          static_cast<double>(coef) * static_cast<double>(loss),
          {sums.largest, (coef * (1 + 2 * zl * lse) + coef_nll) / sums.total, coef * ls / width,
           coef * (1 - ls) + coef_nll}};
}

}  // namespace speechlm
