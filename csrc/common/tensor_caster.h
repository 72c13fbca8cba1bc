// The one pybind11 caster through which tensors reach the kernels. It reads a torch.Tensor by its Python attributes,
// so this module needs no torch headers and one build serves every torch.
//
// Anything is accepted here; TensorView::expect then refuses it by the argument's name, which a caster does not know.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "common/tensor_view.h"
#ifdef SPEECHLM_CUDA_ON_CPU
#include "cuda_on_cpu/device.h"
#endif

namespace speechlm {

inline DType dtype_from_name(const char* text) {  // "torch.int32"
  const char* dot = std::strrchr(text, '.');
  const std::string name = dot ? dot + 1 : text;
  for (DType d : {DType::kInt32, DType::kInt64, DType::kUInt8, DType::kBool, DType::kFloat16, DType::kBFloat16,
                  DType::kFloat32, DType::kFloat64}) {
    if (name == name_of(d)) return d;
  }
  return DType::kOther;
}

// torch's dtypes are singletons that live as long as torch, so a small table of (object, enum) pairs saves the repr.
inline DType dtype_of(pybind11::handle tensor) {
  static std::vector<std::pair<PyObject*, DType>> known;  // guarded by the GIL
  pybind11::object dtype = tensor.attr("dtype");
  for (const auto& [object, value] : known) {
    if (object == dtype.ptr()) return value;
  }
  const DType value = dtype_from_name(pybind11::str(dtype).cast<std::string>().c_str());
  known.emplace_back(dtype.inc_ref().ptr(), value);
  return value;
}

inline std::vector<int64_t> int_tuple(pybind11::handle tuple) {
  std::vector<int64_t> out;
  for (pybind11::handle item : tuple) out.push_back(item.cast<int64_t>());
  return out;
}

inline TensorView view_of(pybind11::handle source) {
  TensorView view;
  if (!pybind11::hasattr(source, "data_ptr") || !pybind11::hasattr(source, "get_device")) {
    view.not_a_tensor = Py_TYPE(source.ptr())->tp_name;
    return view;
  }
  view.dtype = dtype_of(source);
  view.sizes = int_tuple(source.attr("shape"));
  view.strides = int_tuple(source.attr("stride")());
  if (source.attr("is_cuda").cast<bool>()) {
    view.device = Device::kCuda;
    view.device_index = source.attr("get_device")().cast<int>();
  } else if (source.attr("is_cpu").cast<bool>()) {
    view.device = Device::kCpu;
  } else {
    return view;  // "another device": its pointer may not even exist (meta)
  }
  view.data = reinterpret_cast<void*>(source.attr("data_ptr")().cast<uintptr_t>());
#ifdef SPEECHLM_CUDA_ON_CPU
  view.device = Device::kCuda;
  view.device_index = 0;
  if (view.is_contiguous()) cuda_on_cpu::allow_memory(view.data, view.numel() * size_of(view.dtype));
#endif
  return view;
}

}  // namespace speechlm

namespace pybind11::detail {

template <>
struct type_caster<speechlm::TensorView> {
  PYBIND11_TYPE_CASTER(speechlm::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool /*convert*/) {
    value = speechlm::view_of(source);
    return true;
  }

  static handle cast(const speechlm::TensorView&, return_value_policy, handle) {
    throw type_error("a TensorView never goes back to Python: outputs are allocated there");
  }
};

}  // namespace pybind11::detail
