// The inner loops of a packed layer, by instruction set. Sums run in sixteen lanes or in the order of their terms, with
// fused products, whatever the set, so all sets give equal bits.
#pragma once

#include <cstdint>

#include "common/cpu/simd.h"
#include "packed_layer/packed_layer.h"

namespace speechlm {

constexpr int64_t kQueryRows = 16;  // queries that share each read of the keys

// Scratch for one sequence of T rows, padded to whole lanes: keys and values with rows as columns, [E, padded T] each;
// scores and their gradients [kQueryRows, padded T] each.
inline int64_t attention_scratch(int64_t padded_rows, int64_t head_size) {
  return 2 * (head_size + kQueryRows) * padded_rows;
}

struct PackedLayerLoops {
  void (*norm)(const PackedNorm& args, int64_t begin, int64_t end);
  // grad_weight [D] is that of these rows alone.
  void (*norm_backward)(const PackedNorm& args, int64_t begin, int64_t end, float* grad_weight);
  void (*rotary)(const PackedRotary& args, int64_t begin, int64_t end);
  void (*swiglu)(const PackedGate& args, int64_t begin, int64_t end);
  void (*swiglu_backward)(const PackedGate& args, int64_t begin, int64_t end);
};

struct PackedAttentionLoops {
  void (*forward)(const PackedAttention& args, int64_t sequence, int64_t kv_head, float* scratch);
  void (*backward)(const PackedAttention& args, int64_t sequence, int64_t kv_head, float* scratch);
};

SX_DECLARE_SIMD(const PackedLayerLoops& packed_layer_loops(); const PackedAttentionLoops& packed_attention_loops();)

inline const PackedLayerLoops& packed_layer_loops() { return SX_SELECT_SIMD(packed_layer_loops()); }
inline const PackedAttentionLoops& packed_attention_loops() { return SX_SELECT_SIMD(packed_attention_loops()); }

}  // namespace speechlm
