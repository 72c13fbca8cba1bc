// Norm, rotation and gate over packed rows, compiled once per instruction set; see common/cpu/simd.h.
#include <cmath>

#include "packed_layer/exponential.h"
#include "packed_layer/loops.h"

namespace speechlm {
namespace SX_SIMD {
namespace {

template <typename Term>
inline float sum_of(int64_t n, const Term& term) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += term(i + j);
  }
  for (int64_t j = 0; i + j < n; ++j) lanes[j] += term(i + j);
  return join(lanes);
}

void norm(const PackedNorm& a, int64_t begin, int64_t end) {
  const int64_t D = a.width;
  for (int64_t row = begin; row < end; ++row) {
    const float* __restrict x = a.x + row * D;
    float* __restrict out = a.out + row * D;
    const float* __restrict weight = a.weight;
    const float mean = sum_of(D, [&](int64_t i) { return x[i] * x[i]; }) / static_cast<float>(D);
    const float inverse = 1.0f / std::sqrt(mean + a.eps);
    a.inverse[row] = inverse;
    for (int64_t i = 0; i < D; ++i) out[i] = weight[i] * (x[i] * inverse);
  }
}

// With y = x r, r = (mean x² + eps)^-1/2 and g = grad · weight: dx = r (g - y mean(g y)), dweight = Σ grad y.
void norm_backward(const PackedNorm& a, int64_t begin, int64_t end, float* __restrict grad_weight) {
  const int64_t D = a.width;
  const float* __restrict weight = a.weight;
  for (int64_t i = 0; i < D; ++i) grad_weight[i] = 0;
  for (int64_t row = begin; row < end; ++row) {
    const float* __restrict x = a.x + row * D;
    const float* __restrict grad = a.grad + row * D;
    float* __restrict grad_x = a.grad_x + row * D;
    const float r = a.inverse[row];
    const float dot = sum_of(D, [&](int64_t i) { return (grad[i] * weight[i]) * (x[i] * r); }) / static_cast<float>(D);
    for (int64_t i = 0; i < D; ++i) {
      const float y = x[i] * r;
      grad_weight[i] += grad[i] * y;
      grad_x[i] = r * (grad[i] * weight[i] - y * dot);
    }
  }
}

// Forward: (a, b) -> (a cos₁ - b sin₁, b cos₂ + a sin₂) over the halves of a head; backward: the transposed matrix.
void rotary(const PackedRotary& a, int64_t begin, int64_t end) {
  const int64_t E = a.head_size, half = E / 2;
  for (int64_t row = begin; row < end; ++row) {
    const float* __restrict cos = a.cos + row * E;
    const float* __restrict sin = a.sin + row * E;
    for (int64_t h = 0; h < a.num_heads; ++h) {
      const float* __restrict x = a.x + (row * a.num_heads + h) * E;
      float* __restrict out = a.out + (row * a.num_heads + h) * E;
      if (a.is_backward) {
        for (int64_t i = 0; i < half; ++i) {
          out[i] = x[i] * cos[i] + x[i + half] * sin[i + half];
          out[i + half] = x[i + half] * cos[i + half] - x[i] * sin[i];
        }
      } else {
        for (int64_t i = 0; i < half; ++i) {
          out[i] = x[i] * cos[i] - x[i + half] * sin[i];
          out[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half];
        }
      }
    }
  }
}

// 1 / (1 + e^-x) without an overflow.
inline float sigmoid(float x) {
  const float e = exponential(x < 0 ? x : -x);
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

void swiglu(const PackedGate& a, int64_t begin, int64_t end) {
  const float* __restrict gate = a.gate;
  const float* __restrict up = a.up;
  float* __restrict out = a.out;
  for (int64_t i = begin; i < end; ++i) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

void swiglu_backward(const PackedGate& a, int64_t begin, int64_t end) {
  const float* __restrict gate = a.gate;
  const float* __restrict up = a.up;
  const float* __restrict grad = a.grad;
  float* __restrict grad_gate = a.grad_gate;
  float* __restrict grad_up = a.grad_up;
  for (int64_t i = begin; i < end; ++i) {
    const float s = sigmoid(gate[i]);
    grad_up[i] = grad[i] * (gate[i] * s);
    grad_gate[i] = grad[i] * up[i] * (s * (1.0f + gate[i] * (1.0f - s)));
  }
}

}  // namespace

const PackedLayerLoops& packed_layer_loops() {
  static const PackedLayerLoops table{&norm, &norm_backward, &rotary, &swiglu, &swiglu_backward};
  return table;
}

}  // namespace SX_SIMD
}  // namespace speechlm
