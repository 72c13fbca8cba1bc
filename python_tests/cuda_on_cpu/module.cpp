// The module that the tests load: every op's binding over its CUDA kernels on the CPU, and the shim's own test kernels.
#include <pybind11/stl.h>

#include "bind.h"
#include "cuda_on_cpu/kernel/device.h"
#include "cuda_on_cpu/kernel/events.h"
#include "cuda_on_cpu/selftest/selftest.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda_on_cpu, m) {
  m.doc() = "CUDA kernels on the CPU, for tests.";
  speechlm::bind_ops(m);
  m.def("set_seed", &cuda_on_cpu::set_seed, py::arg("seed"));
  m.def("forget_memory", &cuda_on_cpu::forget_memory);
  m.def("take_events", &cuda_on_cpu::take_events);
  m.def("selftest_names", &cuda_on_cpu::selftest_names);
  m.def("selftest", &cuda_on_cpu::selftest, py::arg("name"));
}
