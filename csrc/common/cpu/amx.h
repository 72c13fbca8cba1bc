// The tile unit of x86 (AMX) with products of bfloat16, where compiler, processor and operating system have it.
#pragma once

#include <cstdint>

// SPEECHLM_HAVE_AMX comes from the build: cmake/simd.cmake tries compiler and assembler.

namespace speechlm {
namespace amx {

// True if it can be used. The first call requests it from the operating system, which is needed once per process.
bool enable();

// While one lives, the calling thread's eight tiles are 16 rows of 64 bytes each.
class Tiles {
 public:
  Tiles();
  ~Tiles();
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace amx
}  // namespace speechlm
