// The tile unit of x86 (AMX) with products of bfloat16, where compiler, processor and operating system have it.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 11)
#define SPEECHLM_HAVE_AMX
#endif

namespace speechlm {
namespace amx {

// True if it can be used. The first call asks the operating system for it, which it wants once for a process.
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
