// Faults on purpose, for builds that are run under a sanitizer: one that does not report them is not looking.
#include <memory>
#include <vector>

#include "common/bind.h"
#include "common/cpu/parallel.h"

namespace speechlm {

void bind_planted(pybind11::module_& m) {
  // Threads add to one counter without a lock: each of them once, however busy the machine is.
  m.def("planted_race", [](int threads) {
    int64_t sum = 0;
    run_team(threads, [&] {
      for (int64_t i = 0; i < 1000; ++i) sum += i;
    });
    return sum;
  });
  m.def("planted_overrun", [](int index) {
    const std::unique_ptr<int[]> values(new int[4]());
    return values[index];
  });
  m.def("planted_overflow", [](int value) { return value + 2147483647; });
}

}  // namespace speechlm
