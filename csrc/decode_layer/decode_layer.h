// The parts of a decode step of one Transformer layer, for M rows, one of each request:
//
//   decode_linear     out = x weightᵀ + bias
//   add_rms_norm      summed = x + residual, normed = RMSNorm(summed)
//   rope_and_store    queries and keys normed and rotated; keys and values written into the cache
//   decode_attention  each row over its slot of the cache, keys in splits of a fixed size
//   silu_mul          silu(gate) * up
//
// Sums are kept in float (double for double). On the CPU every sum has one order, which depends neither on the other
// rows nor on threads or instruction sets.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "common/host_device.h"
#include "common/tensor/small_float.h"

namespace speechlm {

template <typename T>
struct LinearArgs {
  int64_t num_rows = 0;       // M
  int64_t width = 0;          // K
  int64_t num_outputs = 0;    // N
  int64_t weight_stride = 0;  // elements from a row of the weight to the next
  const T* x = nullptr;       // [M, K]
  const T* weight = nullptr;  // [N, K]
  const T* bias = nullptr;    // [N], or null
  T* out = nullptr;           // [M, N]
};

template <typename T>
struct NormArgs {
  int64_t num_rows = 0;  // M
  int64_t width = 0;     // D
  double eps = 0;
  bool rounds_last = false;     // multiply by the weight before the only rounding, not after it
  const T* x = nullptr;         // [M, D]
  const T* residual = nullptr;  // [M, D], or null
  const T* weight = nullptr;    // [D]
  T* normed = nullptr;          // [M, D]
  T* summed = nullptr;          // [M, D]; null without a residual
};

// The keys and values of one layer. A slot's rows and a row's heads: [G, E] and [G, F], contiguous.
template <typename T>
struct CacheView {
  int64_t num_slots = 0;                                                                         // B
  int64_t num_rows = 0;                                                                          // R
  int64_t num_heads = 0;                                                                         // G
  int64_t key_size = 0;                                                                          // E
  int64_t value_size = 0;                                                                        // F
  int64_t key_slot_stride = 0, key_row_stride = 0, value_slot_stride = 0, value_row_stride = 0;  // in elements
  T* keys = nullptr;
  T* values = nullptr;

  SX_HOST_DEVICE T* key(int64_t slot, int64_t row, int64_t head) const {
    return keys + slot * key_slot_stride + row * key_row_stride + head * key_size;
  }
  SX_HOST_DEVICE T* value(int64_t slot, int64_t row, int64_t head) const {
    return values + slot * value_slot_stride + row * value_row_stride + head * value_size;
  }
};

// C is the type of the tables: T or float. SX_FOR_TABLES(SX_INSTANTIATE) for explicit instantiations.
#define SX_FOR_TABLES(X) \
  X(float, float)        \
  X(double, double)      \
  X(BFloat16, BFloat16)  \
  X(Float16, Float16)    \
  X(BFloat16, float)     \
  X(Float16, float)
template <typename T, typename C>
struct RotaryArgs {
  int64_t num_rows = 0;       // M
  int64_t num_heads = 0;      // H
  int64_t num_positions = 0;  // P, of the tables; without tables R
  double eps = 0;
  bool norm_over_all = false;
  CacheView<T> cache;
  const T* qkv = nullptr;  // [M, H E + G E + G F]
  const C* cos = nullptr;  // [P, E]; both null: no rotation
  const C* sin = nullptr;
  const int64_t* position = nullptr;  // [M]
  const int64_t* slot = nullptr;      // [M]
  const T* q_norm = nullptr;          // [E] or [H E]; null: no norm
  const T* k_norm = nullptr;          // [E] or [G E]; null: no norm
  T* query = nullptr;                 // [M, H, E]

  SX_HOST_DEVICE int64_t qkv_width() const {
    return (num_heads + cache.num_heads) * cache.key_size + cache.num_heads * cache.value_size;
  }
  // Whether a row's slot and position are in the cache and in the tables.
  SX_HOST_DEVICE bool is_inside(int64_t m) const {
    return slot[m] >= 0 && slot[m] < cache.num_slots && position[m] >= 0 && position[m] < cache.num_rows &&
           position[m] < num_positions;
  }
};

template <typename T>
struct AttentionArgs {
  using Acc = Accumulator<T>;
  int64_t num_rows = 0;   // M
  int64_t num_heads = 0;  // H
  double scale = 1;
  int64_t window = 0;  // 0: none
  double softcap = 0;  // 0: none
  CacheView<const T> cache;
  const T* query = nullptr;          // [M, H, E]
  const int64_t* lengths = nullptr;  // [M]
  const int64_t* slot = nullptr;     // [M]
  const Acc* sinks = nullptr;        // [H], or null
  T* out = nullptr;                  // [M, H, F]
};

// Rows of a slot that a query attends to.
struct KeyRange {
  int64_t begin = 0, end = 0;
};

template <typename T>
SX_HOST_DEVICE inline KeyRange key_range(const AttentionArgs<T>& a, int64_t m) {
  if (a.slot[m] < 0 || a.slot[m] >= a.cache.num_slots) return {};
  const int64_t length = a.lengths[m] < a.cache.num_rows ? a.lengths[m] : a.cache.num_rows;
  if (length <= 0) return {};
  return {a.window > 0 && a.window < length ? length - a.window : 0, length};
}

template <typename T>
struct GateArgs {
  int64_t num_rows = 0;        // M
  int64_t width = 0;           // I
  const T* gate_up = nullptr;  // [M, 2 I]
  T* out = nullptr;            // [M, I]
};

template <typename T>
void decode_linear_cpu(const LinearArgs<T>& args, int threads);
template <typename T>
void add_rms_norm_cpu(const NormArgs<T>& args, int threads);
template <typename T, typename C>
void rope_and_store_cpu(const RotaryArgs<T, C>& args, int threads);
template <typename T>
void decode_attention_cpu(const AttentionArgs<T>& args, int threads);
template <typename T>
void silu_mul_cpu(const GateArgs<T>& args, int threads);

// `stream` is a cudaStream_t; the launches are asynchronous and can be captured.
template <typename T>
void add_rms_norm_cuda(const NormArgs<T>& args, int device, void* stream);
template <typename T, typename C>
void rope_and_store_cuda(const RotaryArgs<T, C>& args, int device, void* stream);
// `partials` has decode_attention_partials() elements.
template <typename T>
void decode_attention_cuda(const AttentionArgs<T>& args, Accumulator<T>* partials, int device, void* stream);
template <typename T>
void silu_mul_cuda(const GateArgs<T>& args, int device, void* stream);

// Keys that one block of threads reads on a GPU.
constexpr int64_t kCudaSplit = 256;

// Of a row, at most.
inline int64_t cuda_splits(int64_t num_keys, int64_t window) {
  return ceil_div(window > 0 && window < num_keys ? window : num_keys, kCudaSplit);
}

// Partial results of decode_attention_cuda: an output, a maximum and a sum for each head of each split.
inline int64_t decode_attention_partials(int64_t num_rows, int64_t num_heads, int64_t num_splits, int64_t value_size) {
  return num_rows * num_heads * num_splits * (value_size + 2);
}

}  // namespace speechlm
