# Files csrc/<op>/*_simd.cpp are compiled once per instruction set, in the namespace SX_SIMD; csrc/common/cpu/simd.h chooses
# at run time. Nothing that these files define may be shared with other files as an inline function: the linker keeps one
# copy, which might use instructions that the processor lacks.
set(SPEECHLM_SIMD_SETS generic)
set(SIMD_FLAGS_generic "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64" AND CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  list(APPEND SPEECHLM_SIMD_SETS avx2 avx512)
  set(SIMD_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(SIMD_FLAGS_avx512 -mavx512f -mavx512bw -mavx512vl -mfma -mf16c)
  add_compile_definitions(SPEECHLM_SIMD_X86) # for every target here: all see the same declarations
endif()

# The tile unit. Compilers know it since GCC 11 and Clang 11, but a compiler's assembler may be older.
if(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  include(CheckCXXSourceCompiles)
  check_cxx_source_compiles("
    #include <immintrin.h>
    __attribute__((target(\"amx-tile,amx-bf16\"))) void f(const void* config) {
      _tile_loadconfig(config);
      _tile_dpbf16ps(0, 1, 2);
    }
    int main() {}" SPEECHLM_AMX_COMPILES)
  if(SPEECHLM_AMX_COMPILES)
    target_compile_definitions(speechlm_core PRIVATE SPEECHLM_HAVE_AMX)
  endif()
endif()

set(SIMD_SOURCES "")
foreach(op IN LISTS SPEECHLM_OPS)
  file(GLOB OP_SIMD_SOURCES CONFIGURE_DEPENDS csrc/${op}/*_simd.cpp)
  list(APPEND SIMD_SOURCES ${OP_SIMD_SOURCES})
endforeach()
# Without -fno-trapping-math (floating-point traps stay masked here) GCC does not vectorize a comparison.
foreach(set IN LISTS SPEECHLM_SIMD_SETS)
  add_library(speechlm_simd_${set} OBJECT ${SIMD_SOURCES})
  target_include_directories(speechlm_simd_${set} PRIVATE csrc)
  target_compile_definitions(speechlm_simd_${set} PRIVATE SX_SIMD=${set})
  target_compile_options(speechlm_simd_${set} PRIVATE ${SPEECHLM_OPTIMIZE} -Wall -Wextra -ffp-contract=off -fno-trapping-math ${SIMD_FLAGS_${set}})
  target_sources(speechlm_core PRIVATE $<TARGET_OBJECTS:speechlm_simd_${set}>)
endforeach()
