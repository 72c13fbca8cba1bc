// Atomic operations: they never race with each other, but do with plain accesses that no barrier keeps apart.
#pragma once

#include "cuda_on_cpu/kernel/half.h"
#include "cuda_on_cpu/kernel/memory.h"

namespace cuda_on_cpu {

template <typename T, typename F>
SX_UNWATCHED T atomic_update(T* p, const void* instruction, const char* name, F&& f) {
  check_aligned(p, sizeof(T), name, instruction);
  begin_atomic(p);
  touch(p, sizeof(T), Access::kAtomic, instruction);
  T old;
  std::memcpy(static_cast<void*>(&old), p, sizeof(T));
  const T fresh = f(old);
  const bool has_changed = std::memcmp(static_cast<const void*>(&fresh), p, sizeof(T)) != 0;
  std::memcpy(static_cast<void*>(p), &fresh, sizeof(T));
  finish_atomic(p, has_changed, instruction);
  return old;
}

}  // namespace cuda_on_cpu

#define SX_ATOMIC(name, T, expression)                                                                                \
  SX_UNWATCHED inline T name(T* p, T v) {                                                                             \
    return cuda_on_cpu::atomic_update(p, __builtin_return_address(0), #name, [&](T old) -> T { return expression; }); \
  }
#define SX_ATOMIC_INTEGER(T)                                                                  \
  SX_ATOMIC(atomicAdd, T, static_cast<T>(old + v))                                            \
  SX_ATOMIC(atomicMin, T, old < v ? old : v)                                                  \
  SX_ATOMIC(atomicMax, T, old > v ? old : v)                                                  \
  SX_ATOMIC(atomicExch, T, ((void)old, v))                                                    \
  SX_ATOMIC(atomicAnd, T, old& v)                                                             \
  SX_ATOMIC(atomicOr, T, old | v)                                                             \
  SX_ATOMIC(atomicXor, T, old ^ v)                                                            \
  SX_UNWATCHED inline T atomicCAS(T* p, T expected, T v) {                                    \
    return cuda_on_cpu::atomic_update(p, __builtin_return_address(0), "atomicCAS",            \
                                      [&](T old) -> T { return old == expected ? v : old; }); \
  }
SX_ATOMIC_INTEGER(unsigned)
SX_ATOMIC_INTEGER(unsigned long long)
#undef SX_ATOMIC_INTEGER
SX_ATOMIC(atomicAdd, int, static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(v)))
SX_ATOMIC(atomicSub, int, static_cast<int>(static_cast<unsigned>(old) - static_cast<unsigned>(v)))
SX_ATOMIC(atomicMin, int, old < v ? old : v)
SX_ATOMIC(atomicMax, int, old > v ? old : v)
SX_ATOMIC(atomicExch, int, ((void)old, v))
SX_ATOMIC(atomicExch, float, ((void)old, v))
SX_ATOMIC(atomicAdd, float, old + v)
SX_ATOMIC(atomicAdd, double, old + v)
SX_ATOMIC(atomicAdd, __half, old + v)
SX_ATOMIC(atomicAdd, __nv_bfloat16, old + v)
SX_ATOMIC(atomicAdd, __half2, (__half2{old.x + v.x, old.y + v.y}))
SX_ATOMIC(atomicAdd, __nv_bfloat162, (__nv_bfloat162{old.x + v.x, old.y + v.y}))
#undef SX_ATOMIC

SX_UNWATCHED inline int atomicCAS(int* p, int expected, int v) {
  return cuda_on_cpu::atomic_update(p, __builtin_return_address(0), "atomicCAS",
                                    [&](int old) { return old == expected ? v : old; });
}
SX_UNWATCHED inline unsigned short atomicCAS(unsigned short* p, unsigned short expected, unsigned short v) {
  return cuda_on_cpu::atomic_update(p, __builtin_return_address(0), "atomicCAS",
                                    [&](unsigned short old) { return old == expected ? v : old; });
}
