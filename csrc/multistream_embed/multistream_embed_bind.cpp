// Python's door to multistream_embed and scatter_sum: checks of every tensor, then the kernel of the tensors' device.
#include <pybind11/stl.h>

#include <optional>

#include "bind.h"
#include "common/cuda_build.h"
#include "common/simd.h"
#include "common/small_float.h"
#include "common/tensor_caster.h"
#include "multistream_embed/multistream_embed.h"

namespace speechlm {
namespace {

namespace py = pybind11;

constexpr auto kIds = {DType::kInt32, DType::kInt64};
constexpr auto kFloats = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

EmbedRule rule_of(const char* op, int64_t num_streams, std::optional<int64_t> pad_id,
                  const std::vector<int64_t>& offsets, const std::vector<double>& scale) {
  SX_CHECK(num_streams <= kMostStreams, op, ": at most ", kMostStreams, " streams; got ", num_streams);
  const auto count = static_cast<size_t>(num_streams);
  SX_CHECK(offsets.empty() || offsets.size() == count, op, ": offsets must have ", count, " values");
  SX_CHECK(scale.empty() || scale.size() == count, op, ": scale must have ", count, " values");
  EmbedRule rule;
  rule.has_pad = pad_id.has_value();
  rule.pad_id = pad_id.value_or(0);
  rule.has_scale = !scale.empty();
  std::copy(offsets.begin(), offsets.end(), rule.offset);
  std::copy(scale.begin(), scale.end(), rule.scale);
  return rule;
}

// Calls run(T{}, Id{}) with the element types of two tensors.
template <typename Run>
void with_types(DType value, DType id, const Run& run) {
  const auto with_id = [&](auto v) { id == DType::kInt64 ? run(v, int64_t{}) : run(v, int32_t{}); };
  switch (value) {
    case DType::kFloat64: return with_id(double{});
    case DType::kBFloat16: return with_id(BFloat16{});
    case DType::kFloat16: return with_id(Float16{});
    default: return with_id(float{});
  }
}

void multistream_embed(const TensorView& ids, const TensorView& table, std::optional<int64_t> pad_id,
                       const std::vector<int64_t>& offsets, const std::vector<double>& scale, const TensorView& out,
                       const std::optional<TensorView>& bad, int threads, uintptr_t stream) {
  const char* op = "multistream_embed";
  const Device on = ids.device;
  if (on == Device::kCuda) require_cuda_build(op);
  ids.expect("multistream_embed: ids", kIds, on == Device::kCuda ? Device::kCuda : Device::kCpu, {-1, -1});
  table.expect("multistream_embed: table", kFloats, on, {-1, -1});
  out.expect("multistream_embed: out", {table.dtype}, on, {ids.sizes[0], table.sizes[1]});
  if (bad) bad->expect("multistream_embed: bad", {DType::kInt64}, on, {1});
  SX_CHECK(bad || on != Device::kCpu, op, ": bad must be given on the CPU");
  const EmbedRule rule = rule_of(op, ids.sizes[1], pad_id, offsets, scale);
  with_types(table.dtype, ids.dtype, [&](auto value, auto id) {
    EmbedArgs<decltype(value), decltype(id)> args;
    args.shape = {ids.sizes[0], ids.sizes[1], table.sizes[0], table.sizes[1]};
    args.rule = rule;
    args.ids = ids.ptr<decltype(id)>();
    args.table = table.ptr<decltype(value)>();
    args.out = out.ptr<decltype(value)>();
    args.bad = bad ? bad->ptr<int64_t>() : nullptr;
    const py::gil_scoped_release no_gil;
    if (on == Device::kCpu) return multistream_embed_cpu(args, threads);
#ifdef SPEECHLM_HAVE_CUDA
    multistream_embed_cuda(args, ids.device_index, reinterpret_cast<void*>(stream));
#else
    (void)stream;
#endif
  });
}

void scatter_sum(const TensorView& values, const TensorView& ids, std::optional<int64_t> pad_id,
                 const std::vector<int64_t>& offsets, const std::vector<double>& scale, const TensorView& out,
                 const std::optional<TensorView>& workspace, int threads, uintptr_t stream) {
  const char* op = "scatter_sum";
  const Device on = ids.device;
  if (on == Device::kCuda) require_cuda_build(op);
  ids.expect("scatter_sum: ids", kIds, on == Device::kCuda ? Device::kCuda : Device::kCpu, {-1, -1});
  values.expect("scatter_sum: values", kFloats, on, {ids.sizes[0], -1});
  out.expect("scatter_sum: out", {values.dtype}, on, {-1, values.sizes[1]});
  const EmbedShape shape{ids.sizes[0], ids.sizes[1], out.sizes[0], out.sizes[1]};
#ifdef SPEECHLM_HAVE_CUDA
  if (on == Device::kCuda) {
    SX_CHECK(workspace.has_value(), op, ": workspace must be given on CUDA");
    workspace->expect("scatter_sum: workspace", {DType::kUInt8}, on, {-1});
    const int64_t needed = scatter_sum_workspace(shape, values.dtype == DType::kFloat64);
    SX_CHECK(workspace->sizes[0] >= needed, op, ": workspace must have ", needed, " bytes");
  }
#endif
  const EmbedRule rule = rule_of(op, ids.sizes[1], pad_id, offsets, scale);
  with_types(values.dtype, ids.dtype, [&](auto value, auto id) {
    ScatterSumArgs<decltype(value), decltype(id)> args;
    args.shape = shape;
    args.rule = rule;
    args.ids = ids.ptr<decltype(id)>();
    args.values = values.ptr<decltype(value)>();
    args.out = out.ptr<decltype(value)>();
    args.workspace = workspace ? workspace->ptr<void>() : nullptr;
    const py::gil_scoped_release no_gil;
    if (on == Device::kCpu) return scatter_sum_cpu(args, threads);
#ifdef SPEECHLM_HAVE_CUDA
    scatter_sum_cuda(args, ids.device_index, reinterpret_cast<void*>(stream));
#else
    (void)stream;
#endif
  });
}

int64_t workspace_bytes(int64_t num_rows, int64_t num_streams, int64_t table_rows, int64_t width, bool is_double) {
#ifdef SPEECHLM_HAVE_CUDA
  return scatter_sum_workspace({num_rows, num_streams, table_rows, width}, is_double);
#else
  (void)num_rows, (void)num_streams, (void)table_rows, (void)width, (void)is_double;
  require_cuda_build("scatter_sum");
  return 0;
#endif
}

}  // namespace

void bind_multistream_embed(py::module_& m) {
  m.def("multistream_embed", &multistream_embed, py::arg("ids"), py::arg("table"), py::arg("pad_id").none(true),
        py::arg("offsets"), py::arg("scale"), py::arg("out"), py::arg("bad").none(true), py::arg("threads"),
        py::arg("stream"));
  m.def("scatter_sum", &scatter_sum, py::arg("values"), py::arg("ids"), py::arg("pad_id").none(true),
        py::arg("offsets"), py::arg("scale"), py::arg("out"), py::arg("workspace").none(true), py::arg("threads"),
        py::arg("stream"));
  m.def("scatter_sum_workspace", &workspace_bytes, py::arg("num_rows"), py::arg("num_streams"), py::arg("table_rows"),
        py::arg("width"), py::arg("is_double"));
}

}  // namespace speechlm
