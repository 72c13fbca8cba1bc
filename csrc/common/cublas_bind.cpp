// Python bindings of common/cuda/cublas.h.
#include "common/bind.h"
#include "common/cuda/cublas.h"
#include "common/tensor/arguments.h"
#include "common/tensor/tensor_caster.h"

namespace speechlm {
namespace {

namespace py = pybind11;

constexpr const char* kOp = "cublas_product";

// How a matrix lies in memory: rows of `stride` elements, or the rows of its transposed.
struct Layout {
  bool is_transposed;
  int64_t stride;

  Layout(const TensorView& view, const char* name) {
    const int64_t rows = view.sizes[0], columns = view.sizes[1];
    // The stride of a dimension with one element says nothing.
    const bool has_rows = view.strides[1] == 1 || columns == 1, has_columns = view.strides[0] == 1 || rows == 1;
    const int64_t row_stride = rows == 1 ? columns : view.strides[0];
    const int64_t column_stride = columns == 1 ? rows : view.strides[1];
    is_transposed = !(has_rows && row_stride >= columns);
    stride = is_transposed ? column_stride : row_stride;
    SX_CHECK(!is_transposed || (has_columns && column_stride >= rows), kOp, ": ", name,
             " must be contiguous in one of its dimensions; got ", view.describe(), " with strides ", view.strides[0],
             ", ", view.strides[1]);
  }
};

void product(const TensorView& a, const TensorView& b, const TensorView& out, double alpha, double beta,
             uintptr_t handle, uintptr_t stream) {
  const auto check = [&](const TensorView& view, const char* name, std::initializer_list<DType> dtypes) {
    SX_CHECK(view.not_a_tensor.empty() && view.device == Device::kCuda && view.rank() == 2, kOp, ": ", name,
             " must be a matrix on a GPU; got ", view.describe());
    bool fits = false;
    for (const DType dtype : dtypes) fits = fits || view.dtype == dtype;
    SX_CHECK(fits, kOp, ": ", name, " has the wrong dtype; got ", view.describe());
    SX_CHECK(view.device_index == out.device_index, kOp, ": ", name, " must be on the device of out, ", out.describe(),
             "; got ", view.describe());
  };
  check(out, "out", {DType::kFloat32});
  check(a, "a", {DType::kFloat16, DType::kBFloat16, DType::kFloat32});
  check(b, "b", {a.dtype});
  Product p;
  p.m = out.sizes[0], p.n = out.sizes[1], p.k = a.sizes[1];
  SX_CHECK(a.sizes[0] == p.m && b.sizes[0] == p.k && b.sizes[1] == p.n, kOp, ": sizes do not fit: ", a.describe(),
           " times ", b.describe(), " into ", out.describe());
  SX_CHECK(p.k > 0, kOp, ": a product of no terms; got ", a.describe());
  if (p.m == 0 || p.n == 0) return;
  const Layout of_a(a, "a"), of_b(b, "b"), of_out(out, "out");
  SX_CHECK(!of_out.is_transposed, kOp, ": the rows of out must be contiguous; got ", out.describe(), " with strides ",
           out.strides[0], ", ", out.strides[1]);
  p.dtype = a.dtype;
  p.a = a.data, p.is_a_transposed = of_a.is_transposed, p.a_stride = of_a.stride;
  p.b = b.data, p.is_b_transposed = of_b.is_transposed, p.b_stride = of_b.stride;
  p.c = out.ptr<float>(), p.c_stride = of_out.stride;
  p.alpha = static_cast<float>(alpha), p.beta = static_cast<float>(beta);
  const py::gil_scoped_release no_gil;
  multiply(p, reinterpret_cast<void*>(handle), reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_cublas(py::module_& m) {
  m.def("use_cublas_of", &use_cublas_of, py::arg("library"));
  m.def("cublas_library", &cublas_library);
  m.def("cublas_product", &product, py::arg("a"), py::arg("b"), py::arg("out"), py::arg("alpha"), py::arg("beta"),
        py::arg("handle"), py::arg("stream"));
}

}  // namespace speechlm
