// TensorView: pointer, dtype, device and shape of a tensor. No torch, no Python: tensor_caster.h fills one from a
// torch.Tensor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/tensor/placement.h"

namespace speechlm {

enum class DType { kInt32, kInt64, kUInt8, kBool, kFloat16, kBFloat16, kFloat32, kFloat64, kOther };
enum class Device { kCpu, kCuda, kOther };

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kUInt8: return "uint8";
    case DType::kBool: return "bool";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
    case DType::kOther: break;
  }
  return "another dtype";
}

inline const char* name_of(Device device) {
  switch (device) {
    case Device::kCpu: return "cpu";
    case Device::kCuda: return "cuda";
    case Device::kOther: break;
  }
  return "another device";
}

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kInt64:
    case DType::kFloat64: return 8;
    case DType::kInt32:
    case DType::kFloat32: return 4;
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
    case DType::kUInt8:
    case DType::kBool: return 1;
    case DType::kOther: break;
  }
  return 0;
}

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kOther;
  Device device = Device::kOther;
  int device_index = -1;  // -1 on the CPU
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;  // in elements
  std::string not_a_tensor;      // the Python type's name when the argument was no tensor at all

  int64_t rank() const { return static_cast<int64_t>(sizes.size()); }

  int64_t numel() const {
    int64_t n = 1;
    for (int64_t size : sizes) n *= size;
    return n;
  }

  bool is_contiguous() const {
    if (numel() == 0) return true;  // whatever its strides say
    int64_t expected = 1;
    for (int64_t d = rank() - 1; d >= 0; --d) {
      if (sizes[d] != 1 && strides[d] != expected) return false;
      expected *= sizes[d];
    }
    return true;
  }

  template <typename T>
  T* ptr() const {
    return static_cast<T*>(data);
  }

  // "int32 [812, 9] on cuda:0", for error messages.
  std::string describe() const {
    if (!not_a_tensor.empty()) return "a " + not_a_tensor;
    std::string text = concat(name_of(dtype), " [");
    for (size_t d = 0; d < sizes.size(); ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
    text += concat("] on ", name_of(device));
    if (device_index >= 0) text += ":" + std::to_string(device_index);
    return text;
  }

  // Checks every property that a contiguous-memory kernel relies on. Errors name the op and the argument. A size of -1
  // in `shape` matches anything.
  const TensorView& expect(const char* op, const char* name, std::initializer_list<DType> dtypes, Device on,
                           std::initializer_list<int64_t> shape) const {
    SX_CHECK(not_a_tensor.empty(), op, ": ", name, " must be a torch.Tensor; got ", describe());
    SX_CHECK(device == on || kOneDevice, op, ": ", name, " must be on ", name_of(on), "; got ", describe());
    SX_CHECK(std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end(), op, ": ", name, " must be ",
             names_of(dtypes), "; got ", describe());
    SX_CHECK(rank() == static_cast<int64_t>(shape.size()), op, ": ", name, " must have ", shape.size(),
             " dimensions; got ", describe());
    for (size_t d = 0; d < shape.size(); ++d) {
      const int64_t size = shape.begin()[d];
      SX_CHECK(size < 0 || sizes[d] == size, op, ": ", name, " must have size ", size, " in dimension ", d, "; got ",
               describe());
    }
    SX_CHECK(is_contiguous(), op, ": ", name, " must be contiguous; got ", describe(), " with other strides");
    return *this;
  }

 private:
  static std::string names_of(std::initializer_list<DType> dtypes) {
    std::string text;
    for (DType dtype : dtypes) text += (text.empty() ? "" : " or ") + std::string(name_of(dtype));
    return text;
  }
};

}  // namespace speechlm
