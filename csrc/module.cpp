// speechlm_ext._C: the ops, and functions about the build, the processor and the threads.
#include <pybind11/stl.h>

#include <atomic>
#include <exception>
#include <vector>

#include "common/bind.h"
#include "common/build_info.h"
#include "common/cpu/parallel.h"
#include "common/cpu/simd.h"

namespace py = pybind11;

namespace {

// Calls the tasks, each on one thread of a team. A library that would split a call over threads (a matrix product) does
// not do so inside a team, so a task's result does not depend on the number of threads. Small tasks run on this thread,
// since waking a team takes longer, if the library can be kept from splitting them.
void run_tasks(const std::vector<py::function>& tasks, int threads, bool small) {
  if (small || threads <= 1) {
    const speechlm::OneMklThread one;
    if (one.works() || threads <= 1) {
      for (const py::function& task : tasks) task();
      return;
    }
  }
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  {
    const py::gil_scoped_release no_gil;
    speechlm::run_team(threads, [&] {
      // A thread of a team gets one thread by itself, but on some processors another order of sums than a lone one.
      const speechlm::OneMklThread one;
      for (size_t i = next++; i < tasks.size() && !failed; i = next++) {
        const py::gil_scoped_acquire gil;
        try {
          tasks[i]();
        } catch (...) {  // must not leave an OpenMP region
          if (!failed.exchange(true)) error = std::current_exception();
        }
      }
    });
  }
  if (failed) std::rethrow_exception(error);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "speechlm_ext's kernels. Use speechlm_ext.ops; these functions have no stable signature.";
  speechlm::bind_ops(m);
#ifdef SPEECHLM_PLANT_FAULTS
  speechlm::bind_planted(m);
#endif

  m.def("use_openmp_of", &speechlm::use_openmp_of, py::arg("library_path"));
  m.def("run_tasks", &run_tasks, py::arg("tasks"), py::arg("threads"), py::arg("small") = false);
  m.def("openmp_runtime", &speechlm::openmp_runtime);
  m.def("simd_available", &speechlm::simd_available);
  m.def("simd_name", &speechlm::simd_name);
  m.def("use_simd", &speechlm::use_simd, py::arg("name"));
  m.def("build_info", [] {
    const speechlm::BuildInfo info = speechlm::build_info();
    py::dict out;
    out["version"] = info.version;
    out["variant"] = info.variant;
    out["commit"] = info.version_commit;
    out["compiler"] = info.compiler;
    out["cuda_version"] = info.cuda_version;
    out["cuda_archs"] = info.cuda_archs;
    return out;
  });
}
