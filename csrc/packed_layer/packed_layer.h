// The parts of a training step of one Transformer layer over packed rows that lie between its matrix products, forward
// and backward, on the CPU in float32. Each reads and writes its tensors once; torch's own ops take three to ten
// passes.
//
// Axes: N packed rows, D width of the residual stream, I width inside the feed-forward part, H heads, G key/value
// heads, E head size.
#pragma once

#include <cstdint>

namespace speechlm {

struct PackedNorm {
  int64_t num_rows = 0, width = 0;
  float eps = 0;
  const float *x = nullptr, *weight = nullptr;  // [N, D], [D]
  float *out = nullptr, *inverse = nullptr;     // forward: [N, D], and 1 / root of the mean square [N]
  const float* grad = nullptr;                  // backward: of out
  float *grad_x = nullptr, *grad_weight = nullptr;
};
void packed_rms_norm_cpu(const PackedNorm& args, int threads);
// Reads x, weight, inverse and grad. The weight's gradient is summed over blocks of rows, then over the blocks in
// order: its bits do not depend on the threads.
void packed_rms_norm_backward_cpu(const PackedNorm& args, int threads);

struct PackedRotary {
  int64_t num_rows = 0, num_heads = 0, head_size = 0;
  bool is_backward = false;                    // the transposed rotation
  const float *cos = nullptr, *sin = nullptr;  // [N, E]
  const float* x = nullptr;                    // [N, H, E]
  float* out = nullptr;
};
void packed_rotary_cpu(const PackedRotary& args, int threads);

struct PackedGate {
  int64_t num_values = 0;
  const float *gate = nullptr, *up = nullptr;
  float* out = nullptr;         // forward: silu(gate) * up
  const float* grad = nullptr;  // backward: of out
  float *grad_gate = nullptr, *grad_up = nullptr;
};
void packed_swiglu_cpu(const PackedGate& args, int threads);

struct PackedAttention {
  int64_t num_rows = 0, num_heads = 0, num_kv_heads = 0, head_size = 0;  // E a multiple of kAttentionLanes
  int64_t num_sequences = 0;
  int64_t window = 0;  // rows that a row attends to, itself included; 0: all before it
  float scale = 1;
  const int32_t* bounds = nullptr;                       // cu_seqlens [n + 1], checked
  const float *q = nullptr, *k = nullptr, *v = nullptr;  // [N, H, E], [N, G, E], [N, G, E]
  float *out = nullptr, *logsumexp = nullptr;            // [N, H, E], [N, H]
  const float* grad = nullptr;                           // backward: of out
  float *grad_q = nullptr, *grad_k = nullptr, *grad_v = nullptr;
};
constexpr int64_t kAttentionLanes = 16;
// Causal attention inside each sequence. A pair of sequence and key/value head is one task, so no bit depends on the
// threads or on other sequences.
void packed_attention_cpu(const PackedAttention& args, int threads);
void packed_attention_backward_cpu(const PackedAttention& args, int threads);

}  // namespace speechlm
