// Loads and stores that are more than a pointer's: vectors, cache hints, asynchronous copies, atomics.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_on_cpu/kernel/device.h"

// Functions of the runtime's own headers do their own bookkeeping.
#define SX_UNWATCHED __attribute__((no_sanitize("thread"), noinline))

namespace cuda_on_cpu {

enum class Access { kRead, kWrite, kAtomic };

// One access by the running thread; a fault if it may not be. Does nothing on the host.
void touch(const void* address, size_t bytes, Access kind, const void* instruction);
// The same from within the runtime.
void check_access(const void* address, size_t bytes, Access kind, const void* instruction);

// __threadfence, and the parts of an atomic operation: before it another block may run, and after it; `finish` tells
// which accesses the operations on that address order.
void fence();
void begin_atomic(const void* address);
void finish_atomic(const void* address, bool has_changed, const void* instruction);

// A library's access to a matrix: a fault unless all of it belongs to the arguments of the call.
void expect_memory(const void* address, size_t bytes, const char* what);

void copy_later(void* to, const void* from, size_t bytes, const Site& site);
void commit_copies();
void wait_for_copies(int groups_left);

// A fault unless the address is a multiple of `bytes`.
void check_aligned(const void* address, size_t bytes, const char* what, const void* instruction);

}  // namespace cuda_on_cpu

// CUDA's vectors. Copying one is one access of its size, at an address that must be a multiple of it.
#define SX_VECTOR(T, name, count, list)                                                      \
  struct alignas(sizeof(T) * (count)) name {                                                 \
    T list;                                                                                  \
    name() = default;                                                                        \
    name(const name& other) { take(other); }                                                 \
    name& operator=(const name& other) {                                                     \
      take(other);                                                                           \
      return *this;                                                                          \
    }                                                                                        \
    SX_UNWATCHED void take(const name& other) {                                              \
      const void* instruction = __builtin_return_address(0);                                 \
      ::cuda_on_cpu::check_aligned(&other, sizeof(name), #name, instruction);                \
      ::cuda_on_cpu::check_aligned(this, sizeof(name), #name, instruction);                  \
      ::cuda_on_cpu::touch(&other, sizeof(name), ::cuda_on_cpu::Access::kRead, instruction); \
      ::cuda_on_cpu::touch(this, sizeof(name), ::cuda_on_cpu::Access::kWrite, instruction);  \
      std::memcpy(static_cast<void*>(this), &other, sizeof(name));                           \
    }                                                                                        \
  };
#define SX_COMMA ,
SX_VECTOR(float, float2, 2, x SX_COMMA y)
SX_VECTOR(float, float4, 4, x SX_COMMA y SX_COMMA z SX_COMMA w)
SX_VECTOR(int, int2, 2, x SX_COMMA y)
SX_VECTOR(int, int4, 4, x SX_COMMA y SX_COMMA z SX_COMMA w)
SX_VECTOR(unsigned, uint2, 2, x SX_COMMA y)
SX_VECTOR(unsigned, uint4, 4, x SX_COMMA y SX_COMMA z SX_COMMA w)
SX_VECTOR(long long, longlong2, 2, x SX_COMMA y)
SX_VECTOR(double, double2, 2, x SX_COMMA y)
#undef SX_VECTOR

inline float2 make_float2(float x, float y) {
  float2 v;
  v.x = x, v.y = y;
  return v;
}
inline float4 make_float4(float x, float y, float z, float w) {
  float4 v;
  v.x = x, v.y = y, v.z = z, v.w = w;
  return v;
}
inline int4 make_int4(int x, int y, int z, int w) {
  int4 v;
  v.x = x, v.y = y, v.z = z, v.w = w;
  return v;
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  uint4 v;
  v.x = x, v.y = y, v.z = z, v.w = w;
  return v;
}

// Cache hints change no value.
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T v) {
  *p = v;
}
template <typename T>
void __stcg(T* p, T v) {
  *p = v;
}

// cp.async: the source is read, and the shared bytes change, only at the wait; until then they count as unwritten.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, SX_SITE) {
  cuda_on_cpu::copy_later(to, from, bytes, site);
}
inline void __pipeline_commit() { cuda_on_cpu::commit_copies(); }
inline void __pipeline_wait_prior(int groups_left) { cuda_on_cpu::wait_for_copies(groups_left); }

inline void __threadfence() { cuda_on_cpu::fence(); }
inline void __threadfence_block() {}
