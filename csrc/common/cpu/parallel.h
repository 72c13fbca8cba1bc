// parallel_for on the OpenMP runtime that torch has loaded.
//
// Linking libgomp here would often load a second one beside torch's own (its file name is mangled in some wheels), with
// a second pool of threads fighting over the same cores. So nothing is linked: use_openmp_of() looks GOMP_parallel up
// in the dependency tree of libtorch_cpu, whichever runtime that is (GNU, LLVM and Intel all export it). Without one
// the loops run on the calling thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <string>

#include "common/host_device.h"

namespace speechlm {

// Finds the OpenMP runtime of an already loaded library (libtorch_cpu.so). Returns the runtime's file, "" for none.
std::string use_openmp_of(const std::string& library_path);

// The file of the runtime in use, "" when loops run on the calling thread.
std::string openmp_runtime();

// Runs fn() on `threads` threads at once, this one among them.
void run_team(int threads, const std::function<void()>& fn);

// While it lives, Intel's MKL computes on the calling thread alone. `works` is false where that library is not known.
class OneMklThread {
 public:
  OneMklThread();
  ~OneMklThread();
  OneMklThread(const OneMklThread&) = delete;
  OneMklThread& operator=(const OneMklThread&) = delete;
  bool works() const { return before_ >= 0; }

 private:
  int before_ = -1;
};

// Calls body(begin, end) over [0, n) in chunks of at least `grain`, on up to `threads` threads. Chunk borders depend on
// n, grain and threads alone. An exception in a body is thrown again here.
template <typename Body>
void parallel_for(int64_t n, int64_t grain, int threads, const Body& body) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t max_chunks = ceil_div(n, grain);
  threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), max_chunks));
  if (threads == 1) {
    body(int64_t{0}, n);
    return;
  }
  // Four chunks a thread evens out cores that other programs slow down.
  const int64_t chunks = std::min<int64_t>(max_chunks, int64_t{threads} * 4);
  const int64_t size = ceil_div(n, chunks);
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  run_team(threads, [&] {
    for (int64_t chunk = next++; chunk < chunks; chunk = next++) {
      const int64_t begin = chunk * size;
      const int64_t end = std::min(n, begin + size);
      if (begin >= end) return;
      try {
        body(begin, end);
      } catch (...) {  // must not leave an OpenMP region
        if (!failed.exchange(true)) error = std::current_exception();
        return;
      }
    }
  });
  if (failed) std::rethrow_exception(error);
}

inline void atomic_min(std::atomic<int64_t>& least, int64_t value) {
  int64_t seen = least;
  while (value < seen && !least.compare_exchange_weak(seen, value)) {
  }
}

}  // namespace speechlm
