#include "common/parallel.h"

#include <dlfcn.h>

namespace speechlm {
namespace {

// The entry that compilers call for `#pragma omp parallel`; its ABI has not changed since GCC 4.9.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<GompParallel> gomp_parallel{nullptr};

}  // namespace

std::string use_openmp_of(const std::string& library_path) {
  // RTLD_NOLOAD: only what is loaded already. dlsym on a handle searches that library, then its dependencies in order.
  if (void* handle = dlopen(library_path.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {
    gomp_parallel = reinterpret_cast<GompParallel>(dlsym(handle, "GOMP_parallel"));
  }
  return openmp_runtime();
}

std::string openmp_runtime() {
  Dl_info info;
  GompParallel entry = gomp_parallel;
  if (entry == nullptr || dladdr(reinterpret_cast<void*>(entry), &info) == 0) return "";
  return info.dli_fname;
}

void run_team(int threads, const std::function<void()>& fn) {
  GompParallel entry = gomp_parallel;
  if (entry == nullptr || threads <= 1) {
    fn();
    return;
  }
  auto call = [](void* data) { (*static_cast<const std::function<void()>*>(data))(); };
  entry(call, const_cast<void*>(static_cast<const void*>(&fn)), static_cast<unsigned>(threads), 0);
}

}  // namespace speechlm
