// Python's door to delay_pack: checks of every tensor, then the kernel of the tensors' device. No arithmetic here.
#include <optional>

#include "bind.h"
#include "common/cuda_build.h"
#include "common/tensor_caster.h"
#include "delay_pack/delay_pack.h"

namespace speechlm {
namespace {

namespace py = pybind11;

constexpr auto kIds = {DType::kInt32, DType::kInt64};

// Where the packed block goes.
struct Outputs {
  const TensorView& ids;
  const TensorView& labels;
  const TensorView& weight;
  const TensorView& position;
  const TensorView& cu_seqlens;

  void check(DType id_dtype, Device on, const DelayPackShape& shape) const {
    ids.expect("delay_pack: out_ids", {id_dtype}, on, {shape.num_rows, shape.num_streams});
    labels.expect("delay_pack: out_labels", {id_dtype}, on, {shape.num_rows, shape.num_streams});
    weight.expect("delay_pack: out_weight", {DType::kFloat32}, on, {shape.num_rows, shape.num_streams});
    position.expect("delay_pack: position", {DType::kInt32}, on, {shape.num_rows});
    cu_seqlens.expect("delay_pack: cu_seqlens", {DType::kInt32}, on, {shape.num_segments + 1});
  }

  template <typename Id>
  DelayPackArgs<Id> args(const DelayPackShape& shape, const TensorView& table) const {
    DelayPackArgs<Id> args;
    args.shape = shape;
    args.meta = DelayPackMeta::at(table.ptr<int64_t>(), shape);
    args.out_ids = ids.ptr<Id>();
    args.out_labels = labels.ptr<Id>();
    args.out_weight = weight.ptr<float>();
    args.out_position = position.ptr<int32_t>();
    args.out_cu_seqlens = cu_seqlens.ptr<int32_t>();
    return args;
  }
};

template <typename Id>
void pack(const TensorView& ids, const std::optional<TensorView>& weight, const TensorView& table,
          const DelayPackShape& shape, const Outputs& out, int threads, uintptr_t stream) {
  DelayPackArgs<Id> args = out.args<Id>(shape, table);
  args.ids = ids.ptr<Id>();
  args.weight = weight ? weight->ptr<float>() : nullptr;
  const py::gil_scoped_release no_gil;
  if (ids.device == Device::kCpu) {
    delay_pack_cpu(args, threads);
    return;
  }
#ifdef SPEECHLM_HAVE_CUDA
  delay_pack_cuda(args, ids.device_index, reinterpret_cast<void*>(stream));
#else
  (void)stream;
#endif
}

void delay_pack(const TensorView& ids, const std::optional<TensorView>& weight, const TensorView& host_table,
                const TensorView& table, int64_t num_segments, bool trim, const TensorView& out_ids,
                const TensorView& out_labels, const TensorView& out_weight, const TensorView& position,
                const TensorView& cu_seqlens, int threads, uintptr_t stream) {
  const Device on = ids.device;
  if (on == Device::kCuda) require_cuda_build("delay_pack");
  ids.expect("delay_pack: ids", kIds, on == Device::kCuda ? Device::kCuda : Device::kCpu, {-1, -1});
  const int64_t S = ids.sizes[1];
  host_table.expect("delay_pack: host_table", {DType::kInt64}, Device::kCpu, {-1});
  table.expect("delay_pack: table", {DType::kInt64}, on, {host_table.sizes[0]});
  const DelayPackShape shape =
      delay_pack_shape(host_table.ptr<int64_t>(), host_table.sizes[0], num_segments, S, ids.sizes[0], trim);
  if (weight) weight->expect("delay_pack: loss_weight", {DType::kFloat32}, on, {ids.sizes[0], S});
  const Outputs out{out_ids, out_labels, out_weight, position, cu_seqlens};
  out.check(ids.dtype, on, shape);
  auto run = ids.dtype == DType::kInt64 ? &pack<int64_t> : &pack<int32_t>;
  run(ids, weight, table, shape, out, threads, stream);
}

template <typename Id>
void pack_segments(const std::vector<TensorView>& segments, const std::vector<TensorView>& weights,
                   const TensorView& table, const DelayPackShape& shape, const Outputs& out, int threads) {
  std::vector<const Id*> ids;
  std::vector<const float*> weight;
  for (const TensorView& segment : segments) ids.push_back(segment.ptr<Id>());
  for (const TensorView& segment : weights) weight.push_back(segment.ptr<float>());
  DelayPackArgs<Id> args = out.args<Id>(shape, table);
  args.segment_ids = ids.data();
  args.segment_weight = weights.empty() ? nullptr : weight.data();
  const py::gil_scoped_release no_gil;
  delay_pack_cpu(args, threads);
}

// The list form on the CPU: segments are read where they lie.
void delay_pack_segments(const std::vector<TensorView>& segments, const std::vector<TensorView>& weights,
                         const TensorView& table, bool trim, const TensorView& out_ids, const TensorView& out_labels,
                         const TensorView& out_weight, const TensorView& position, const TensorView& cu_seqlens,
                         int threads) {
  SX_CHECK(!segments.empty(), "delay_pack: segments must not be empty");
  SX_CHECK(weights.empty() || weights.size() == segments.size(), "delay_pack: ", weights.size(), " weights for ",
           segments.size(), " segments");
  segments[0].expect("delay_pack: segments[0]", kIds, Device::kCpu, {-1, -1});
  const DType dtype = segments[0].dtype;
  const int64_t S = segments[0].sizes[1];
  const int64_t num_segments = static_cast<int64_t>(segments.size());
  table.expect("delay_pack: table", {DType::kInt64}, Device::kCpu, {num_segments + 1 + 3 * S});
  const int64_t* offsets = table.ptr<int64_t>();
  for (size_t i = 0; i < segments.size(); ++i) {
    const int64_t frames = offsets[i + 1] - offsets[i];
    segments[i].expect(concat("delay_pack: segments[", i, "]").c_str(), {dtype}, Device::kCpu, {frames, S});
    if (weights.empty()) continue;
    weights[i].expect(concat("delay_pack: loss_weight[", i, "]").c_str(), {DType::kFloat32}, Device::kCpu, {frames, S});
  }
  const DelayPackShape shape = delay_pack_shape(offsets, table.sizes[0], num_segments, S, offsets[num_segments], trim);
  const Outputs out{out_ids, out_labels, out_weight, position, cu_seqlens};
  out.check(dtype, Device::kCpu, shape);
  auto run = dtype == DType::kInt64 ? &pack_segments<int64_t> : &pack_segments<int32_t>;
  run(segments, weights, table, shape, out, threads);
}

template <typename Id>
void unpack(const TensorView& ids, const TensorView& table, const DelayPackShape& shape, const TensorView& out,
            int threads, uintptr_t stream) {
  DelayUnpackArgs<Id> args;
  args.shape = shape;
  args.cu_seqlens = table.ptr<int64_t>();
  args.out_offsets = args.cu_seqlens + shape.num_segments + 1;
  args.delays = args.out_offsets + shape.num_segments + 1;
  args.ids = ids.ptr<Id>();
  args.out = out.ptr<Id>();
  const py::gil_scoped_release no_gil;
  if (ids.device == Device::kCpu) {
    delay_unpack_cpu(args, threads);
    return;
  }
#ifdef SPEECHLM_HAVE_CUDA
  delay_unpack_cuda(args, ids.device_index, reinterpret_cast<void*>(stream));
#else
  (void)stream;
#endif
}

void delay_unpack(const TensorView& ids, const TensorView& host_table, const TensorView& table, int64_t num_segments,
                  const TensorView& out, int threads, uintptr_t stream) {
  const Device on = ids.device;
  if (on == Device::kCuda) require_cuda_build("delay_unpack");
  ids.expect("delay_unpack: ids", kIds, on == Device::kCuda ? Device::kCuda : Device::kCpu, {-1, -1});
  const int64_t S = ids.sizes[1];
  SX_CHECK(num_segments >= 0, "delay_unpack: cu_seqlens must have at least one entry");
  host_table.expect("delay_unpack: host_table", {DType::kInt64}, Device::kCpu, {2 * (num_segments + 1) + S});
  table.expect("delay_unpack: table", {DType::kInt64}, on, {host_table.sizes[0]});
  out.expect("delay_unpack: out", {ids.dtype}, on, {-1, S});
  const int64_t* host = host_table.ptr<int64_t>();
  const DelayPackShape shape = delay_unpack_shape(host, host + num_segments + 1, host + 2 * (num_segments + 1),
                                                  num_segments, S, ids.sizes[0], out.sizes[0]);
  auto run = ids.dtype == DType::kInt64 ? &unpack<int64_t> : &unpack<int32_t>;
  run(ids, table, shape, out, threads, stream);
}

}  // namespace

void bind_delay_pack(py::module_& m) {
  m.def("delay_pack", &delay_pack, py::arg("ids"), py::arg("loss_weight").none(true), py::arg("host_table"),
        py::arg("table"), py::arg("num_segments"), py::arg("trim"), py::arg("out_ids"), py::arg("out_labels"),
        py::arg("out_weight"), py::arg("position"), py::arg("cu_seqlens"), py::arg("threads"), py::arg("stream"));
  m.def("delay_pack_segments", &delay_pack_segments, py::arg("segments"), py::arg("weights"), py::arg("table"),
        py::arg("trim"), py::arg("out_ids"), py::arg("out_labels"), py::arg("out_weight"), py::arg("position"),
        py::arg("cu_seqlens"), py::arg("threads"));
  m.def("delay_unpack", &delay_unpack, py::arg("ids"), py::arg("host_table"), py::arg("table"), py::arg("num_segments"),
        py::arg("out"), py::arg("threads"), py::arg("stream"));
}

}  // namespace speechlm
