// Python bindings of scatter_sum, in two steps: the sort, whose result has the number of touched rows, and the sums.
#include "common/bind.h"
#include "common/tensor/arguments.h"
#include "common/tensor/tensor_caster.h"
#include "multistream_embed/bind_rule.h"
#include "scatter_sum/scatter_sum.h"

namespace speechlm {
namespace {

namespace py = pybind11;

constexpr const char* kOp = "scatter_sum";

SortedPairs sort_pairs_on_cpu(const TensorView& ids, std::optional<int64_t> pad_id, const std::vector<int64_t>& offsets,
                              int64_t table_rows) {
  Expect(kOp, Device::kCpu)(ids, "ids", kIds, {-1, -1});
  const EmbedRule rule = rule_of(kOp, ids.sizes[1], pad_id, offsets, {});
  const EmbedShape shape{ids.sizes[0], ids.sizes[1], table_rows, 0};
  const py::gil_scoped_release no_gil;
  return with_id(ids.dtype, [&](auto id) { return sort_pairs_cpu(shape, rule, ids.ptr<decltype(id)>()); });
}

// Calls run(args) for both devices; `rows` makes the result compact.
template <typename Run>
void with_args(const Expect& expect, EmbedShape shape, const TensorView& values, const std::vector<double>& scale,
               const TensorView& out, const std::optional<TensorView>& rows, const Run& run) {
  expect(values, "values", kFloats, {shape.num_rows, -1});
  shape.width = values.sizes[1];
  expect(out, "out", {values.dtype}, {rows ? -1 : shape.table_rows, shape.width});
  with_float(values.dtype, [&](auto value) {
    using T = decltype(value);
    run(ScatterSumArgs<T>{shape, rule_of(kOp, shape.num_streams, std::nullopt, {}, scale), values.ptr<T>(),
                          out.ptr<T>(), expect.ptr<int64_t>(rows, "rows", {out.sizes[0]})});
  });
}

void scatter_sum_on_cpu(const TensorView& values, const SortedPairs& sorted, const std::vector<double>& scale,
                        const TensorView& out, const std::optional<TensorView>& rows, int threads) {
  with_args(Expect(kOp, Device::kCpu), sorted.shape, values, scale, out, rows, [&](const auto& args) {
    SX_CHECK(!rows || rows->sizes[0] == sorted.touched, kOp, ": rows must have ", sorted.touched, " elements");
    const py::gil_scoped_release no_gil;
    scatter_sum_cpu(args, sorted, threads);
  });
}

int64_t workspace_bytes(const EmbedShape& shape, bool is_double, int device) {
  if constexpr (kHasCuda) return scatter_sum_workspace(shape, is_double, device);
  return 0;
}

void sort_pairs_on_cuda(const TensorView& ids, std::optional<int64_t> pad_id, const std::vector<int64_t>& offsets,
                        int64_t table_rows, const TensorView& workspace, const std::optional<TensorView>& touched,
                        uintptr_t stream) {
  const Expect expect(kOp, Device::kCuda);
  expect(ids, "ids", kIds, {-1, -1});
  int64_t* const num_touched = expect.ptr<int64_t>(touched, "touched", {1});
  const EmbedRule rule = rule_of(kOp, ids.sizes[1], pad_id, offsets, {});
  const EmbedShape shape{ids.sizes[0], ids.sizes[1], table_rows, 0};
  void* const space = expect.workspace(workspace, workspace_bytes(shape, false, ids.device_index));
  const py::gil_scoped_release no_gil;
  with_id(ids.dtype, [&](auto id) {
    if constexpr (kHasCuda) {
      sort_pairs_cuda(shape, rule, ids.ptr<decltype(id)>(), space, num_touched, ids.device_index,
                      reinterpret_cast<void*>(stream));
    }
  });
}

void scatter_sum_on_cuda(const TensorView& values, int64_t num_streams, int64_t table_rows,
                         const std::vector<double>& scale, const TensorView& out, const std::optional<TensorView>& rows,
                         const TensorView& workspace, uintptr_t stream) {
  const Expect expect(kOp, Device::kCuda);
  expect(values, "values", kFloats, {-1, -1});
  const EmbedShape shape{values.sizes[0], num_streams, table_rows, values.sizes[1]};
  void* const space =
      expect.workspace(workspace, workspace_bytes(shape, values.dtype == DType::kFloat64, values.device_index));
  with_args(expect, shape, values, scale, out, rows, [&](const auto& args) {
    const py::gil_scoped_release no_gil;
    if constexpr (kHasCuda) {
      scatter_sum_cuda(args, space, values.device_index, reinterpret_cast<void*>(stream));
    }
  });
}

}  // namespace

void bind_scatter_sum(py::module_& m) {
  // Local, because the tests load two modules that have this type.
  py::class_<SortedPairs>(m, "SortedPairs", py::module_local())
      .def_readonly("touched", &SortedPairs::touched)
      .def_readonly("first_bad", &SortedPairs::first_bad);
  m.def("sort_pairs", &sort_pairs_on_cpu, py::arg("ids"), py::arg("pad_id").none(true), py::arg("offsets"),
        py::arg("table_rows"));
  m.def("scatter_sum", &scatter_sum_on_cpu, py::arg("values"), py::arg("sorted"), py::arg("scale"), py::arg("out"),
        py::arg("rows").none(true), py::arg("threads"));
  m.def(
      "scatter_sum_workspace",
      [](const TensorView& values, int64_t num_streams, int64_t table_rows) {
        const Expect expect(kOp, Device::kCuda);
        expect(values, "values", kFloats, {-1, -1});
        const EmbedShape shape{values.sizes[0], num_streams, table_rows, values.sizes[1]};
        return workspace_bytes(shape, values.dtype == DType::kFloat64, values.device_index);
      },
      py::arg("values"), py::arg("num_streams"), py::arg("table_rows"));
  m.def("sort_pairs_cuda", &sort_pairs_on_cuda, py::arg("ids"), py::arg("pad_id").none(true), py::arg("offsets"),
        py::arg("table_rows"), py::arg("workspace"), py::arg("touched").none(true), py::arg("stream"));
  m.def("scatter_sum_cuda", &scatter_sum_on_cuda, py::arg("values"), py::arg("num_streams"), py::arg("table_rows"),
        py::arg("scale"), py::arg("out"), py::arg("rows").none(true), py::arg("workspace"), py::arg("stream"));
}

}  // namespace speechlm
