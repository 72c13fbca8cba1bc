#include "common/cpu/simd.h"

#include <algorithm>
#include <atomic>

#include "common/check.h"
#include "common/cpu/amx.h"

namespace speechlm {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "amx", "emulated-amx"};
constexpr int kAmxName = 3, kEmulatedName = 4;

Simd best_set() {
#if defined(SPEECHLM_SIMD_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return Simd::kAvx512;
  }
  if (__builtin_cpu_supports("avx2")) return Simd::kAvx2;
#endif
  return Simd::kGeneric;
}

// Of kNames.
int best() {
  static const int found = [] {
    const Simd set = best_set();
    return set == Simd::kAvx512 && amx::enable() ? kAmxName : static_cast<int>(set);
  }();
  return found;
}

std::atomic<int> chosen{-1};

int in_use() {
  const int now = chosen.load(std::memory_order_relaxed);
  return now >= 0 ? now : best();
}

}  // namespace

Simd simd_in_use() {
  const int now = in_use();
  return static_cast<Simd>(std::min(now == kEmulatedName ? best() : now, static_cast<int>(Simd::kAvx512)));
}

Tiles tiles_in_use() {
  const int now = in_use();
  return now == kAmxName ? Tiles::kAmx : now == kEmulatedName ? Tiles::kEmulated : Tiles::kNone;
}

std::vector<std::string> simd_available() { return {kNames, kNames + best() + 1}; }

std::string simd_name() { return kNames[in_use()]; }

void use_simd(const std::string& name) {
  if (name.empty()) {
    chosen = -1;
    return;
  }
  std::vector<std::string> names = simd_available();
  names.resize(kEmulatedName);
  names.emplace_back(kNames[kEmulatedName]);
  const auto found = std::find(names.begin(), names.end(), name);
  SX_CHECK(found != names.end(), "use_simd: ", name, " is not one of this processor's instruction sets");
  chosen = static_cast<int>(found - names.begin());
}

}  // namespace speechlm
