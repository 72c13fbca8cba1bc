// Warp-wide intrinsics. Every lane that the mask names must reach the same call; a lane that is missing is a fault.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda_on_cpu/kernel/device.h"

namespace cuda_on_cpu {

enum class WarpOp {
  kSync,
  kShfl,
  kShflUp,
  kShflDown,
  kShflXor,
  kBallot,
  kAny,
  kAll,
  kMatchAny,
  kMatchAll,
  kAddU,
  kMinU,
  kMaxU,
  kMinS,
  kMaxS,
  kAnd,
  kOr,
  kXor
};
const char* name_of(WarpOp op);

// `argument` is the lane, delta or lane mask of a shuffle, with the width in the upper half.
uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t value, int argument, const Site& site);

template <typename T>
uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "shuffles move values of up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T shuffle(WarpOp op, unsigned mask, T value, int argument, int width, const Site& site) {
  return from_bits<T>(warp_collective(op, mask, to_bits(value), (width << 16) | (argument & 0xffff), site));
}

}  // namespace cuda_on_cpu

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, SX_SITE) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::WarpOp::kShfl, mask, value, lane, width, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SX_SITE) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::WarpOp::kShflUp, mask, value, static_cast<int>(delta), width, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SX_SITE) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::WarpOp::kShflDown, mask, value, static_cast<int>(delta), width, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, SX_SITE) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::WarpOp::kShflXor, mask, value, lane_mask, width, site);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, SX_SITE) {
  cuda_on_cpu::warp_collective(cuda_on_cpu::WarpOp::kSync, mask, 0, 0, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SX_SITE) {
  return static_cast<unsigned>(
      cuda_on_cpu::warp_collective(cuda_on_cpu::WarpOp::kBallot, mask, predicate != 0, 0, site));
}
inline int __any_sync(unsigned mask, int predicate, SX_SITE) {
  return static_cast<int>(cuda_on_cpu::warp_collective(cuda_on_cpu::WarpOp::kAny, mask, predicate != 0, 0, site));
}
inline int __all_sync(unsigned mask, int predicate, SX_SITE) {
  return static_cast<int>(cuda_on_cpu::warp_collective(cuda_on_cpu::WarpOp::kAll, mask, predicate != 0, 0, site));
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, SX_SITE) {
  return static_cast<unsigned>(
      cuda_on_cpu::warp_collective(cuda_on_cpu::WarpOp::kMatchAny, mask, cuda_on_cpu::to_bits(value), 0, site));
}
template <typename T>
unsigned __match_all_sync(unsigned mask, T value, int* all_equal, SX_SITE) {
  const auto lanes = static_cast<unsigned>(
      cuda_on_cpu::warp_collective(cuda_on_cpu::WarpOp::kMatchAll, mask, cuda_on_cpu::to_bits(value), 0, site));
  *all_equal = lanes != 0;
  return lanes;
}

#define SX_WARP_REDUCE(name, type, op)                                                                      \
  inline type name(unsigned mask, type value, SX_SITE) {                                                    \
    return static_cast<type>(                                                                               \
        cuda_on_cpu::warp_collective(cuda_on_cpu::WarpOp::op, mask, cuda_on_cpu::to_bits(value), 0, site)); \
  }
SX_WARP_REDUCE(__reduce_add_sync, unsigned, kAddU)
SX_WARP_REDUCE(__reduce_add_sync, int, kAddU)
SX_WARP_REDUCE(__reduce_min_sync, unsigned, kMinU)
SX_WARP_REDUCE(__reduce_min_sync, int, kMinS)
SX_WARP_REDUCE(__reduce_max_sync, unsigned, kMaxU)
SX_WARP_REDUCE(__reduce_max_sync, int, kMaxS)
SX_WARP_REDUCE(__reduce_and_sync, unsigned, kAnd)
SX_WARP_REDUCE(__reduce_or_sync, unsigned, kOr)
SX_WARP_REDUCE(__reduce_xor_sync, unsigned, kXor)
#undef SX_WARP_REDUCE
