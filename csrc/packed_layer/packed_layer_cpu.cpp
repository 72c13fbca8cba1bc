// The parts of a packed layer on the CPU: threads share the rows, or the sequences and heads.
#include "packed_layer/packed_layer.h"

#include <algorithm>
#include <vector>

#include "common/cpu/aligned.h"
#include "common/cpu/parallel.h"
#include "packed_layer/loops.h"

namespace speechlm {
namespace {

// Values that a thread should have: fewer are not worth waking it.
constexpr int64_t kGrainValues = 16 * 1024;
// Rows whose share of a norm's weight gradient is summed first.
constexpr int64_t kNormRows = 64;

int64_t grain_of(int64_t width) { return ceil_div(kGrainValues, std::max<int64_t>(width, 1)); }

template <typename Body>
void for_each_head(const PackedAttention& a, int threads, const Body& body) {
  int64_t longest = 0;
  for (int64_t s = 0; s < a.num_sequences; ++s) longest = std::max<int64_t>(longest, a.bounds[s + 1] - a.bounds[s]);
  if (longest == 0 || a.num_kv_heads == 0) return;
  const int64_t size = attention_scratch(round_up(longest, kAttentionLanes), a.head_size);
  parallel_for(a.num_sequences * a.num_kv_heads, 1, threads, [&](int64_t begin, int64_t end) {
    AlignedVector<float> scratch(size);
    for (int64_t i = begin; i < end; ++i) body(i / a.num_kv_heads, i % a.num_kv_heads, scratch.data());
  });
}

}  // namespace

void packed_rms_norm_cpu(const PackedNorm& a, int threads) {
  const PackedLayerLoops& loops = packed_layer_loops();
  parallel_for(a.num_rows, grain_of(a.width), threads, [&](int64_t begin, int64_t end) { loops.norm(a, begin, end); });
}

void packed_rms_norm_backward_cpu(const PackedNorm& a, int threads) {
  const PackedLayerLoops& loops = packed_layer_loops();
  const int64_t num_blocks = ceil_div(a.num_rows, kNormRows);
  std::vector<float> parts(num_blocks * a.width);
  parallel_for(num_blocks, ceil_div(grain_of(a.width), kNormRows), threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      loops.norm_backward(a, b * kNormRows, std::min((b + 1) * kNormRows, a.num_rows), parts.data() + b * a.width);
  });
  std::fill_n(a.grad_weight, a.width, 0.0f);
  for (int64_t b = 0; b < num_blocks; ++b) {
    for (int64_t i = 0; i < a.width; ++i) a.grad_weight[i] += parts[b * a.width + i];
  }
}

void packed_rotary_cpu(const PackedRotary& a, int threads) {
  const PackedLayerLoops& loops = packed_layer_loops();
  parallel_for(a.num_rows, grain_of(a.num_heads * a.head_size), threads,
               [&](int64_t begin, int64_t end) { loops.rotary(a, begin, end); });
}

void packed_swiglu_cpu(const PackedGate& a, int threads) {
  const PackedLayerLoops& loops = packed_layer_loops();
  const auto run = a.grad == nullptr ? loops.swiglu : loops.swiglu_backward;
  parallel_for(a.num_values, kGrainValues, threads, [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

void packed_attention_cpu(const PackedAttention& a, int threads) {
  for_each_head(a, threads, [&, forward = packed_attention_loops().forward](int64_t sequence, int64_t head, float* s) {
    forward(a, sequence, head, s);
  });
}

void packed_attention_backward_cpu(const PackedAttention& a, int threads) {
  for_each_head(a, threads,
                [&, backward = packed_attention_loops().backward](int64_t sequence, int64_t head, float* s) {
                  backward(a, sequence, head, s);
                });
}

}  // namespace speechlm
