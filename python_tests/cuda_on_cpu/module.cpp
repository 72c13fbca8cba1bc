// The module that the tests load: every op's binding over its CUDA kernels on the CPU, and the shim's own test kernels.
#include <pybind11/stl.h>

#include <stdexcept>
#include <utility>
#include <vector>

#include "common/bind.h"
#include "cuda_on_cpu/cublas/cublas.h"
#include "cuda_on_cpu/kernel/device.h"
#include "cuda_on_cpu/kernel/driver.h"
#include "cuda_on_cpu/kernel/events.h"
#include "cuda_on_cpu/selftest/selftest.h"

namespace py = pybind11;

namespace {

// The two devices and the calling thread, for test_devices.py.
void bind_machine(py::module_& m) {
  using cuda_on_cpu::context_stack, cuda_on_cpu::machine, cuda_on_cpu::Machine;
  py::class_<Machine>(m, "Machine")
      .def_readwrite("tensors_on", &Machine::tensors_on)
      .def_readwrite("next_error", &Machine::next_error)
      .def_readwrite("runtime_version", &Machine::runtime_version)
      .def_readwrite("driver_version", &Machine::driver_version)
      .def_readwrite("shared_bytes", &Machine::shared_bytes)
      .def_readwrite("is_capturing", &Machine::is_capturing)
      .def_readonly("launched_on", &Machine::launched_on)
      .def_property_readonly("contexts",
                             [](const Machine& self) {
                               std::vector<CUdevice> found;
                               for (CUdevice device = 0; device < cuda_on_cpu::kDevices; ++device) {
                                 if (self.references[device] > 0) found.push_back(device);
                               }
                               return found;
                             })
      .def_property(
          "capability", [](const Machine& self) { return py::make_tuple(self.capability[0], self.capability[1]); },
          [](Machine& self, std::pair<int, int> value) {
            self.capability[0] = value.first;
            self.capability[1] = value.second;
          });
  m.def("machine", &machine, py::return_value_policy::reference);
  m.def("reset_machine", [] { machine() = Machine(); });
  m.def("context_stack", [] { return context_stack(); });
  // What another runtime of the process does.
  m.def("make_context", [](CUdevice device) {
    CUcontext context = nullptr;
    if (cuDevicePrimaryCtxRetain(&context, device) != CUDA_SUCCESS) throw std::invalid_argument("no such device");
  });
  m.def("make_current", [](CUdevice device) { context_stack() = {device}; });
}

// The cuBLAS that csrc finds, for test_cublas.py.
void bind_library(py::module_& m) {
  using cuda_on_cpu::cublas_handle, cuda_on_cpu::CublasHandle;
  speechlm::use_cublas(cuda_on_cpu::cublas_api());
  py::class_<CublasHandle>(m, "CublasHandle")
      .def_readwrite("pointer_mode", &CublasHandle::pointer_mode)
      .def_readwrite("math_mode", &CublasHandle::math_mode)
      .def_readonly("math_mode_of_product", &CublasHandle::math_mode_of_product)
      .def_readwrite("next_status", &CublasHandle::next_status)
      .def_readwrite("fail_after", &CublasHandle::fail_after)
      .def_readwrite("ignores_transposes", &CublasHandle::ignores_transposes)
      .def_readwrite("sums_in_half", &CublasHandle::sums_in_half);
  m.def("cublas_handle", &cublas_handle, py::return_value_policy::reference);
  m.def("reset_cublas", [](bool is_loaded) {
    cublas_handle() = CublasHandle();
    speechlm::use_cublas(is_loaded ? cuda_on_cpu::cublas_api() : speechlm::CublasApi());
  });
}

}  // namespace

PYBIND11_MODULE(_cuda_on_cpu, m) {
  m.doc() = "CUDA kernels on the CPU, for tests.";
  speechlm::bind_ops(m);
  m.def("set_seed", &cuda_on_cpu::set_seed, py::arg("seed"));
  m.def("forget_memory", &cuda_on_cpu::forget_memory);
  bind_machine(m);
  bind_library(m);
  m.def("take_events", &cuda_on_cpu::take_events);
  m.def("keep_schedule", &cuda_on_cpu::keep_schedule);
  m.def("take_schedule", [] {
    py::list out;
    for (const auto& e : cuda_on_cpu::take_schedule()) out.append(py::make_tuple(e.what, e.name, e.stream, e.event));
    return out;
  });
  m.def("selftest_names", &cuda_on_cpu::selftest_names);
  m.def("selftest", &cuda_on_cpu::selftest, py::arg("name"));
}
