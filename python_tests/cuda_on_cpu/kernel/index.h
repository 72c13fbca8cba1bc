// Indices of the grid, with 32 bits as on a GPU: a sum or product that does not fit in them is a fault.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda_on_cpu/kernel/fault.h"

namespace cuda_on_cpu {

class Index {
 public:
  constexpr explicit Index(unsigned value = 0) : value_(value) {}
  constexpr operator unsigned() const { return value_; }

 private:
  unsigned value_;
};

[[noreturn]] void index_overflow(int64_t exact, const char* operation, const void* instruction);

// `exact`: the result without a limit of 32 bits.
__attribute__((no_sanitize("thread"), noinline)) inline Index checked_index(int64_t exact, const char* operation) {
  if (exact >= 0 && exact >> 32 != 0) {
    index_overflow(exact, operation, __builtin_return_address(0));
  }
  return Index(static_cast<unsigned>(exact));  // below 0 it wraps, which differences of indices may mean
}

// Of up to 32 bits: with a 64-bit number the result has 64 bits by itself.
template <typename T>
constexpr bool kIsNarrow = std::is_integral_v<T> && sizeof(T) <= 4;

#define SX_INDEX_OPERATOR(op, name)                                                                     \
  __attribute__((always_inline)) inline Index operator op(Index a, Index b) {                           \
    return checked_index(static_cast<int64_t>(unsigned(a)) op static_cast<int64_t>(unsigned(b)), name); \
  }                                                                                                     \
  template <typename T, typename = std::enable_if_t<kIsNarrow<T>>>                                      \
  __attribute__((always_inline)) inline Index operator op(Index a, T b) {                               \
    return checked_index(static_cast<int64_t>(unsigned(a)) op static_cast<int64_t>(b), name);           \
  }                                                                                                     \
  template <typename T, typename = std::enable_if_t<kIsNarrow<T>>>                                      \
  __attribute__((always_inline)) inline Index operator op(T a, Index b) {                               \
    return checked_index(static_cast<int64_t>(a) op static_cast<int64_t>(unsigned(b)), name);           \
  }
SX_INDEX_OPERATOR(+, "sum")
SX_INDEX_OPERATOR(*, "product")
#undef SX_INDEX_OPERATOR

}  // namespace cuda_on_cpu
