// Kernels are compiled with -fsanitize=thread, which makes the compiler call one of these functions at every load and
// store. The sanitizer's own runtime is not linked; runtime.cpp checks the accesses.
#include <cstddef>

#include "cuda_on_cpu/kernel/memory.h"

using cuda_on_cpu::Access;
using cuda_on_cpu::touch;

#define SX_HOOK(name, bytes, kind) \
  void name(void* address) { touch(address, bytes, kind, __builtin_return_address(0)); }
#define SX_HOOKS(bytes)                                         \
  SX_HOOK(__tsan_read##bytes, bytes, Access::kRead)             \
  SX_HOOK(__tsan_write##bytes, bytes, Access::kWrite)           \
  SX_HOOK(__tsan_unaligned_read##bytes, bytes, Access::kRead)   \
  SX_HOOK(__tsan_unaligned_write##bytes, bytes, Access::kWrite) \
  SX_HOOK(__tsan_volatile_read##bytes, bytes, Access::kRead)    \
  SX_HOOK(__tsan_volatile_write##bytes, bytes, Access::kWrite)

extern "C" {
SX_HOOKS(1)
SX_HOOKS(2)
SX_HOOKS(4)
SX_HOOKS(8)
SX_HOOKS(16)
void __tsan_read_range(void* address, size_t bytes) {
  if (bytes > 0) touch(address, bytes, Access::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  if (bytes > 0) touch(address, bytes, Access::kWrite, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// The guard of a function's static object; kernels have none.
signed char __tsan_atomic8_load(const volatile signed char* address, int) {
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}
}
