#include "common/simd.h"

#include <algorithm>
#include <atomic>

#include "common/check.h"

namespace speechlm {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512"};

Simd best() {
#if defined(SPEECHLM_SIMD_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return Simd::kAvx512;
  }
  if (__builtin_cpu_supports("avx2")) return Simd::kAvx2;
#endif
  return Simd::kGeneric;
}

std::atomic<int> chosen{-1};

}  // namespace

Simd simd_in_use() {
  const int now = chosen.load(std::memory_order_relaxed);
  if (now >= 0) return static_cast<Simd>(now);
  static const Simd found = best();
  return found;
}

std::vector<std::string> simd_available() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(best()); ++i) names.emplace_back(kNames[i]);
  return names;
}

std::string simd_name() { return kNames[static_cast<int>(simd_in_use())]; }

void use_simd(const std::string& name) {
  if (name.empty()) {
    chosen = -1;
    return;
  }
  const std::vector<std::string> names = simd_available();
  const auto found = std::find(names.begin(), names.end(), name);
  SX_CHECK(found != names.end(), "use_simd: ", name, " is not one of this processor's instruction sets");
  chosen = static_cast<int>(found - names.begin());
}

}  // namespace speechlm
