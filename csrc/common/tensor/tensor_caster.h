// The pybind11 caster through which tensors reach the kernels. It reads a torch.Tensor by its Python attributes, so
// this module needs no torch headers and one build serves every torch.
//
// Anything is accepted here; TensorView::expect then refuses it by the argument's name, which a caster does not know.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "common/tensor/tensor_view.h"

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

// Attribute names, made once: a small op's call takes no longer than a few dozen look-ups.
struct AttributeNames {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* get_device = PyUnicode_InternFromString("get_device");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* is_cuda = PyUnicode_InternFromString("is_cuda");
};

inline const AttributeNames& attribute_names() {
  static const AttributeNames names;
  return names;
}

inline pybind11::object checked(PyObject* fresh) {
  if (fresh == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(fresh);
}

inline pybind11::object attribute(pybind11::handle source, PyObject* name) {
  return checked(PyObject_GetAttr(source.ptr(), name));
}

inline pybind11::object called(pybind11::handle source, PyObject* method) {
  return checked(PyObject_CallMethodObjArgs(source.ptr(), method, nullptr));
}

// torch's dtypes are singletons that live as long as torch, so a small table of (object, enum) pairs saves the repr.
inline DType dtype_of(pybind11::handle tensor) {
  static std::vector<std::pair<PyObject*, DType>> known;  // guarded by the GIL
  pybind11::object dtype = attribute(tensor, attribute_names().dtype);
  for (const auto& [object, value] : known) {
    if (object == dtype.ptr()) return value;
  }
  const DType value = dtype_from_name(pybind11::str(dtype).cast<std::string>().c_str());
  known.emplace_back(dtype.inc_ref().ptr(), value);
  return value;
}

inline std::vector<int64_t> int_tuple(const pybind11::object& tuple) {
  std::vector<int64_t> out;
  if (!PyTuple_Check(tuple.ptr())) throw pybind11::type_error("speechlm_ext: a tensor's sizes are no tuple");
  const Py_ssize_t count = PyTuple_GET_SIZE(tuple.ptr());
  out.reserve(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    out.push_back(pybind11::handle(PyTuple_GET_ITEM(tuple.ptr(), i)).cast<int64_t>());
  }
  return out;
}

inline TensorView view_of(pybind11::handle source) {
  const AttributeNames& names = attribute_names();
  TensorView view;
  if (!PyObject_HasAttr(source.ptr(), names.data_ptr) || !PyObject_HasAttr(source.ptr(), names.get_device)) {
    view.not_a_tensor = Py_TYPE(source.ptr())->tp_name;
    return view;
  }
  view.dtype = dtype_of(source);
  view.sizes = int_tuple(attribute(source, names.shape));
  view.strides = int_tuple(called(source, names.stride));
  if (attribute(source, names.is_cpu).ptr() == Py_True) {
    view.device = Device::kCpu;
  } else if (attribute(source, names.is_cuda).ptr() == Py_True) {
    view.device = Device::kCuda;
    view.device_index = called(source, names.get_device).cast<int>();
  } else {
    return view;  // "another device": its pointer may not even exist (meta)
  }
  view.data = reinterpret_cast<void*>(called(source, names.data_ptr).cast<uintptr_t>());
  place(view);
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
