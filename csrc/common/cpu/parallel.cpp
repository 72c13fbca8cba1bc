#include "common/cpu/parallel.h"

#include <dlfcn.h>

// ThreadSanitizer does not see how an OpenMP runtime hands work over and takes it back, since the runtime is not
// compiled with it: a sanitized build announces both.
#ifdef __SANITIZE_THREAD__
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
#else
static inline void __tsan_acquire(void*) {}
static inline void __tsan_release(void*) {}
#endif

namespace speechlm {
namespace {

// The entry that compilers call for `#pragma omp parallel`; its ABI has not changed since GCC 4.9.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<GompParallel> gomp_parallel{nullptr};

// MKL is part of libtorch_cpu on x86. Sets the calling thread's number of threads (0: the global one), returns the old.
using MklThreads = int (*)(int);

std::atomic<MklThreads> mkl_threads{nullptr};

}  // namespace

std::string use_openmp_of(const std::string& library_path) {
  // RTLD_NOLOAD: only a library that is loaded already. dlsym on a handle searches that library, then its dependencies
  // in order.
  if (void* handle = dlopen(library_path.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {
    gomp_parallel = reinterpret_cast<GompParallel>(dlsym(handle, "GOMP_parallel"));
    mkl_threads = reinterpret_cast<MklThreads>(dlsym(handle, "MKL_Set_Num_Threads_Local"));
  }
  return openmp_runtime();
}

std::string openmp_runtime() {
  Dl_info info;
  GompParallel entry = gomp_parallel;
  if (entry == nullptr || dladdr(reinterpret_cast<void*>(entry), &info) == 0) return "";
  return info.dli_fname;
}

OneMklThread::OneMklThread() {
  if (MklThreads set = mkl_threads) before_ = set(1);
}

OneMklThread::~OneMklThread() {
  if (works()) mkl_threads.load()(before_);
}

void run_team(int threads, const std::function<void()>& fn) {
  GompParallel entry = gomp_parallel;
  if (entry == nullptr || threads <= 1) {
    fn();
    return;
  }
  struct Team {
    const std::function<void()>& fn;
    char handed_over = 0, taken_back = 0;
  } team{fn};
  auto call = [](void* data) {
    auto* mine = static_cast<Team*>(data);
    __tsan_acquire(&mine->handed_over);
    mine->fn();
    __tsan_release(&mine->taken_back);
  };
  __tsan_release(&team.handed_over);
  entry(call, &team, static_cast<unsigned>(threads), 0);
  __tsan_acquire(&team.taken_back);
}

}  // namespace speechlm
