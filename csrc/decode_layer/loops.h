// The inner loops of a decode layer, by instruction set.
#pragma once

#include <cstdint>

#include "common/cpu/simd.h"
#include "decode_layer/decode_layer.h"

namespace speechlm {

constexpr int64_t kCpuLanes = 16;
inline int64_t padded_lanes(int64_t width) { return round_up(width, kCpuLanes); }

// Rows of x that share each read of the weight.
constexpr int64_t kLinearRows = 16;

// Keys of a split on the CPU.
constexpr int64_t kCpuSplit = 128;

// One split of the keys of one key/value head, for the Q heads that share it.
template <typename T>
struct SplitArgs {
  using Acc = Accumulator<T>;
  int64_t num_heads = 0;  // Q
  int64_t count = 0;      // keys, 1 to kCpuSplit
  int64_t key_size = 0, value_size = 0, key_stride = 0, value_stride = 0;
  Acc scale = 1, softcap = 0;
  const Acc* query = nullptr;  // [Q, padded E], zeros after each head
  const T* keys = nullptr;     // [count, E], key_stride apart
  const T* values = nullptr;   // [count, F], value_stride apart
  Acc* scores = nullptr;       // [Q, kCpuSplit], scratch
  Acc* out = nullptr;          // [Q, padded F]: sum of exp(score - largest) * value
  Acc* largest = nullptr;      // [Q]
  Acc* total = nullptr;        // [Q]: sum of exp(score - largest)
};

template <typename T>
struct DecodeLinearLoops {
  using Acc = Accumulator<T>;
  // Columns [begin, end) of the output, for `count` <= kLinearRows rows from row `first`; x holds these, wide and
  // padded with zeros to whole lanes.
  void (*columns)(const LinearArgs<T>& args, const Acc* x, int64_t x_stride, int64_t first, int64_t count,
                  int64_t begin, int64_t end);
};

template <typename T>
struct DecodeRowLoops {
  using Acc = Accumulator<T>;
  void (*widen_row)(Acc* out, const T* row, int64_t width);  // padded with zeros to whole lanes
  void (*norm)(const NormArgs<T>& args, int64_t row);
  void (*silu_mul)(T* out, const T* gate, const T* up, int64_t width);
};

template <typename T, typename C>
struct RotaryLoops {
  void (*row)(const RotaryArgs<T, C>& args, int64_t row, Accumulator<T>* scratch);  // scratch: [padded E]
};

template <typename T>
struct DecodeAttentionLoops {
  using Acc = Accumulator<T>;
  void (*split)(const SplitArgs<T>& args);
  // out [F] of one head from `count` splits, which are `stride` heads apart; a sink is a score without a value.
  void (*merge)(T* out, const SplitArgs<T>& splits, int64_t count, int64_t stride, const Acc* sink);
};

SX_DECLARE_SIMD(template <typename T> const DecodeLinearLoops<T>& decode_linear_loops())
SX_DECLARE_SIMD(template <typename T> const DecodeRowLoops<T>& decode_row_loops())
SX_DECLARE_SIMD(template <typename T, typename C> const RotaryLoops<T, C>& rotary_loops())
SX_DECLARE_SIMD(template <typename T> const DecodeAttentionLoops<T>& decode_attention_loops())

template <typename T>
const DecodeLinearLoops<T>& decode_linear_loops() {  // of simd_in_use()
  return SX_SELECT_SIMD(decode_linear_loops<T>());
}
template <typename T>
const DecodeRowLoops<T>& decode_row_loops() {
  return SX_SELECT_SIMD(decode_row_loops<T>());
}
template <typename T, typename C>
const RotaryLoops<T, C>& rotary_loops() {
  return SX_SELECT_SIMD(rotary_loops<T, C>());
}
template <typename T>
const DecodeAttentionLoops<T>& decode_attention_loops() {
  return SX_SELECT_SIMD(decode_attention_loops<T>());
}

}  // namespace speechlm
