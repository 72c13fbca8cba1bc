// For bindings: checks of an op's tensors, and the choice of a template by their types.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "common/tensor/small_float.h"
#include "common/tensor/tensor_view.h"

namespace speechlm {

#ifdef SPEECHLM_HAVE_CUDA
inline constexpr bool kHasCuda = true;
#else
inline constexpr bool kHasCuda = false;  // `if constexpr (kHasCuda)` leaves calls of CUDA kernels out of the link
#endif

constexpr auto kFloats = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
constexpr auto kWideFloats = {DType::kFloat32, DType::kFloat64};
constexpr auto kIds = {DType::kInt32, DType::kInt64};

// Calls run(T{}) with the type of a tensor of kFloats.
template <typename Run>
auto with_float(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat64: return run(double{});
    case DType::kBFloat16: return run(BFloat16{});
    case DType::kFloat16: return run(Float16{});
    default: return run(float{});
  }
}

// Calls run(T{}) with float or double.
template <typename Run>
auto with_wide_float(DType dtype, const Run& run) {
  return dtype == DType::kFloat64 ? run(double{}) : run(float{});
}

// Calls run(Id{}) with the type of a tensor of kIds.
template <typename Run>
auto with_id(DType dtype, const Run& run) {
  return dtype == DType::kInt64 ? run(int64_t{}) : run(int32_t{});
}

template <typename T>
inline constexpr DType kDType = DType::kOther;
template <>
inline constexpr DType kDType<uint8_t> = DType::kBool;  // bytes that are no bools have no other use than workspaces
template <>
inline constexpr DType kDType<int32_t> = DType::kInt32;
template <>
inline constexpr DType kDType<int64_t> = DType::kInt64;
template <>
inline constexpr DType kDType<float> = DType::kFloat32;
template <>
inline constexpr DType kDType<double> = DType::kFloat64;
template <>
inline constexpr DType kDType<BFloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDType<Float16> = DType::kFloat16;

// Checks the tensors of one call of an op, which must be contiguous and on one device.
class Expect {
 public:
  using Shape = std::initializer_list<int64_t>;  // -1: any size

  Expect(const char* op, Device on) : op_(op), on_(on) {
    SX_CHECK(kHasCuda || on != Device::kCuda, op,
             ": this build has no CUDA kernels (`speechlm doctor` tells why); install with nvcc on PATH and "
             "SPEECHLM_CUDA=ON, or move the tensors to the CPU");
  }
  // On the device of `first`, an argument of that name.
  Expect(const char* op, const char* name, const TensorView& first)
      : Expect(op, first.device == Device::kCuda ? Device::kCuda : Device::kCpu) {
    first_ = &first;
    first_name_ = name;
  }

  bool on_cuda() const { return on_ == Device::kCuda; }

  const TensorView& operator()(const TensorView& view, const char* name, std::initializer_list<DType> dtypes,
                               Shape shape) const {
    view.expect(op_, name, dtypes, on_, shape);
    SX_CHECK(first_ == nullptr || view.device_index == first_->device_index, op_, ": ", name,
             " must be on the device of ", first_name_, ", ", first_->describe(), "; got ", view.describe());
    return view;
  }

  // The same for elements of type T; gives their address.
  template <typename T>
  T* ptr(const TensorView& view, const char* name, Shape shape) const {
    static_assert(kDType<T> != DType::kOther, "the type of a tensor's elements");
    return (*this)(view, name, {kDType<T>}, shape).template ptr<T>();
  }
  // Null for none.
  template <typename T>
  T* ptr(const std::optional<TensorView>& view, const char* name, Shape shape) const {
    return view ? ptr<T>(*view, name, shape) : nullptr;
  }

  // The address of a workspace of at least `bytes` bytes.
  void* workspace(const TensorView& view, int64_t bytes) const {
    (*this)(view, "workspace", {DType::kUInt8}, {-1});
    SX_CHECK(view.sizes[0] >= bytes, op_, ": workspace must have ", bytes, " bytes; got ", view.describe());
    SX_CHECK(reinterpret_cast<uintptr_t>(view.data) % 16 == 0, op_, ": workspace must begin at a multiple of 16 bytes");
    return view.data;
  }

 private:
  const char* op_;
  Device on_;
  const TensorView* first_ = nullptr;
  const char* first_name_ = "";
};

}  // namespace speechlm
