#include "common/cpu/cpu_info.h"

#include "common/cpu/amx.h"

namespace speechlm {

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) found.push_back("avx2");
  if (__builtin_cpu_supports("fma")) found.push_back("fma");
  if (__builtin_cpu_supports("avx512f")) found.push_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) found.push_back("avx512bw");
#if defined(__clang__) || __GNUC__ >= 10
  if (__builtin_cpu_supports("avx512bf16")) found.push_back("avx512bf16");
#endif
  if (amx::enable()) found.push_back("amx-bf16");
#elif defined(__aarch64__)
  found.push_back("neon");
#endif
  return found;
}

}  // namespace speechlm
