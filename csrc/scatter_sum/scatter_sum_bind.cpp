// Python's door to scatter_sum, in two steps: the sort, whose result tells how many rows are touched, and the sums.
#include <pybind11/stl.h>

#include "common/cuda/cuda_build.h"
#include "multistream_embed/bind_types.h"
#include "scatter_sum/scatter_sum.h"

namespace speechlm {

void bind_scatter_sum(pybind11::module_& m);

namespace {

namespace py = pybind11;

constexpr const char* kOp = "scatter_sum";

SortedPairs sort_pairs_on_cpu(const TensorView& ids, std::optional<int64_t> pad_id, const std::vector<int64_t>& offsets,
                              int64_t table_rows) {
  ids.expect("scatter_sum: ids", kIds, Device::kCpu, {-1, -1});
  const EmbedRule rule = rule_of(kOp, ids.sizes[1], pad_id, offsets, {});
  const EmbedShape shape{ids.sizes[0], ids.sizes[1], table_rows, 0};
  const py::gil_scoped_release no_gil;
  return with_id(ids.dtype, [&](auto id) { return sort_pairs_cpu(shape, rule, ids.ptr<decltype(id)>()); });
}

// The checks of both devices; `rows` makes the result compact.
template <typename T>
ScatterSumArgs<T> args_of(EmbedShape shape, const TensorView& values, const std::vector<double>& scale,
                          const TensorView& out, const std::optional<TensorView>& rows, Device on) {
  values.expect("scatter_sum: values", kFloats, on, {shape.num_rows, -1});
  shape.width = values.sizes[1];
  out.expect("scatter_sum: out", {values.dtype}, on, {rows ? -1 : shape.table_rows, shape.width});
  if (rows) rows->expect("scatter_sum: rows", {DType::kInt64}, on, {out.sizes[0]});
  ScatterSumArgs<T> args;
  args.shape = shape;
  args.rule = rule_of(kOp, shape.num_streams, std::nullopt, {}, scale);
  args.values = values.ptr<T>();
  args.out = out.ptr<T>();
  args.rows = rows ? rows->ptr<int64_t>() : nullptr;
  return args;
}

void scatter_sum_on_cpu(const TensorView& values, const SortedPairs& sorted, const std::vector<double>& scale,
                        const TensorView& out, const std::optional<TensorView>& rows, int threads) {
  with_float(values.dtype, [&](auto value) {
    const auto args = args_of<decltype(value)>(sorted.shape, values, scale, out, rows, Device::kCpu);
    SX_CHECK(!rows || rows->sizes[0] == sorted.touched, kOp, ": rows must have ", sorted.touched, " elements");
    const py::gil_scoped_release no_gil;
    scatter_sum_cpu(args, sorted, threads);
  });
}

#ifdef SPEECHLM_HAVE_CUDA
int64_t workspace_bytes(int64_t num_rows, int64_t num_streams, int64_t table_rows, int64_t width, bool is_double) {
  return scatter_sum_workspace({num_rows, num_streams, table_rows, width}, is_double);
}

void* checked_workspace(const TensorView& workspace, const EmbedShape& shape, bool is_double) {
  workspace.expect("scatter_sum: workspace", {DType::kUInt8}, Device::kCuda, {-1});
  const int64_t needed = scatter_sum_workspace(shape, is_double);
  SX_CHECK(workspace.sizes[0] >= needed, kOp, ": workspace must have ", needed, " bytes");
  return workspace.ptr<void>();
}

void sort_pairs_on_cuda(const TensorView& ids, std::optional<int64_t> pad_id, const std::vector<int64_t>& offsets,
                        int64_t table_rows, const TensorView& workspace, const std::optional<TensorView>& touched,
                        uintptr_t stream) {
  ids.expect("scatter_sum: ids", kIds, Device::kCuda, {-1, -1});
  if (touched) touched->expect("scatter_sum: touched", {DType::kInt64}, Device::kCuda, {1});
  const EmbedRule rule = rule_of(kOp, ids.sizes[1], pad_id, offsets, {});
  const EmbedShape shape{ids.sizes[0], ids.sizes[1], table_rows, 0};
  void* const space = checked_workspace(workspace, shape, false);
  const py::gil_scoped_release no_gil;
  with_id(ids.dtype, [&](auto id) {
    sort_pairs_cuda(shape, rule, ids.ptr<decltype(id)>(), space, touched ? touched->ptr<int64_t>() : nullptr,
                    ids.device_index, reinterpret_cast<void*>(stream));
  });
}

void scatter_sum_on_cuda(const TensorView& values, int64_t num_streams, int64_t table_rows,
                         const std::vector<double>& scale, const TensorView& out, const std::optional<TensorView>& rows,
                         const TensorView& workspace, uintptr_t stream) {
  with_float(values.dtype, [&](auto value) {
    values.expect("scatter_sum: values", kFloats, Device::kCuda, {-1, -1});
    const EmbedShape shape{values.sizes[0], num_streams, table_rows, values.sizes[1]};
    const auto args = args_of<decltype(value)>(shape, values, scale, out, rows, Device::kCuda);
    void* const space = checked_workspace(workspace, shape, values.dtype == DType::kFloat64);
    const py::gil_scoped_release no_gil;
    scatter_sum_cuda(args, space, values.device_index, reinterpret_cast<void*>(stream));
  });
}
#else
template <typename... Arguments>
int64_t not_built(const Arguments&...) {
  require_cuda_build(kOp);
  return 0;
}
constexpr auto workspace_bytes = not_built<int64_t, int64_t, int64_t, int64_t, bool>;
constexpr auto sort_pairs_on_cuda = not_built<TensorView, std::optional<int64_t>, std::vector<int64_t>, int64_t,
                                              TensorView, std::optional<TensorView>, uintptr_t>;
constexpr auto scatter_sum_on_cuda = not_built<TensorView, int64_t, int64_t, std::vector<double>, TensorView,
                                               std::optional<TensorView>, TensorView, uintptr_t>;
#endif

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
  m.def("scatter_sum_workspace", workspace_bytes, py::arg("num_rows"), py::arg("num_streams"), py::arg("table_rows"),
        py::arg("width"), py::arg("is_double"));
  m.def("sort_pairs_cuda", sort_pairs_on_cuda, py::arg("ids"), py::arg("pad_id").none(true), py::arg("offsets"),
        py::arg("table_rows"), py::arg("workspace"), py::arg("touched").none(true), py::arg("stream"));
  m.def("scatter_sum_cuda", scatter_sum_on_cuda, py::arg("values"), py::arg("num_streams"), py::arg("table_rows"),
        py::arg("scale"), py::arg("out"), py::arg("rows").none(true), py::arg("workspace"), py::arg("stream"));
}

}  // namespace speechlm
