// Which instruction set the CPU kernels use. Files named *_simd.cpp are compiled once for each set, in the namespace
// SX_SIMD, with -ffp-contract=off: a product and a sum round twice on every path, so all paths give equal bits.
//
//   SX_DECLARE_SIMD(const Loops& loops())                            // in every set's namespace
//   inline const Loops& loops() { return SX_SELECT_SIMD(loops()); }  // of the set in use
#pragma once

#include <string>
#include <vector>

namespace speechlm {

enum class Simd { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };

// The set in use: the best that the processor has, or the one that use_simd() chose.
Simd simd_in_use();

// How products of bfloat16 tiles are made: not at all, by the processor's tile unit (AMX), which goes with kAvx512, or
// by plain C++ for tests on processors without one.
enum class Tiles { kNone, kAmx, kEmulated };
Tiles tiles_in_use();

// Names of the sets that are compiled in and that this processor has: "generic", "avx2", "avx512", "amx" (avx512 with
// the tile unit).
std::vector<std::string> simd_available();
std::string simd_name();

// Chooses a set by name, "" for the best one; "emulated-amx" is the best one with tiles in plain C++. Throws
// std::invalid_argument for one that cannot be used here.
void use_simd(const std::string& name);

}  // namespace speechlm

#ifdef SPEECHLM_SIMD_X86
#define SX_DECLARE_SIMD(...) \
  namespace generic {        \
  __VA_ARGS__;               \
  }                          \
  namespace avx2 {           \
  __VA_ARGS__;               \
  }                          \
  namespace avx512 {         \
  __VA_ARGS__;               \
  }
#define SX_SELECT_SIMD(...)                             \
  (simd_in_use() == Simd::kAvx512 ? avx512::__VA_ARGS__ \
   : simd_in_use() == Simd::kAvx2 ? avx2::__VA_ARGS__   \
                                  : generic::__VA_ARGS__)
#else
#define SX_DECLARE_SIMD(...) \
  namespace generic {        \
  __VA_ARGS__;               \
  }
#define SX_SELECT_SIMD(...) generic::__VA_ARGS__
#endif
