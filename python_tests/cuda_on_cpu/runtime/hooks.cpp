// Kernels are compiled with -fsanitize=thread, which makes the compiler call one of these functions at every load and
// store, and with -fsanitize=signed-integer-overflow,bounds,..., which makes it call another one at such an error. The
// sanitizers' own runtimes are not linked; runtime.cpp checks the accesses.
#include <cstddef>

#include <cstdint>

#include "cuda_on_cpu/kernel/memory.h"
#include "cuda_on_cpu/runtime/block.h"

using cuda_on_cpu::Access;
using cuda_on_cpu::concat;
using cuda_on_cpu::fault;
using cuda_on_cpu::Quiet;
using cuda_on_cpu::Site;
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

// `place` begins with the place in the source.
struct Place {
  const char* file;
  unsigned line;
};
#define SX_ERROR_HOOK(name, what, ...)                             \
  void __ubsan_handle_##name(const Place* place, __VA_ARGS__) {    \
    const Quiet quiet;                                             \
    fault(what, Site{place->file, static_cast<int>(place->line)}); \
  }
SX_ERROR_HOOK(add_overflow, "signed overflow of a sum", uintptr_t, uintptr_t)
SX_ERROR_HOOK(sub_overflow, "signed overflow of a difference", uintptr_t, uintptr_t)
SX_ERROR_HOOK(mul_overflow, "signed overflow of a product", uintptr_t, uintptr_t)
SX_ERROR_HOOK(negate_overflow, "signed overflow of a negation", uintptr_t)
SX_ERROR_HOOK(divrem_overflow, "division by 0, or signed overflow of a quotient", uintptr_t, uintptr_t)
SX_ERROR_HOOK(shift_out_of_bounds, "shift by less than 0 bits, or by all bits and more", uintptr_t, uintptr_t)
SX_ERROR_HOOK(out_of_bounds, concat("index ", static_cast<int64_t>(index), " outside an array"), uintptr_t index)
}
