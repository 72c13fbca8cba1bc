// Python's door to delay_pack: checks of every tensor, then the kernel of the tensors' device. No arithmetic here.
#include <optional>

#include "bind.h"
#include "common/cuda/cuda_build.h"
#include "common/tensor/tensor_caster.h"
#include "delay_pack/delay_pack.h"

namespace speechlm {
namespace {

namespace py = pybind11;

constexpr auto kIds = {DType::kInt32, DType::kInt64};

// In the order of DelayPackShape's given fields.
DelayPackShape shape_of(const std::vector<int64_t>& counts) {
  SX_CHECK(counts.size() == 10, "delay_pack: 10 counts are needed; got ", counts.size());
  return {counts[0], counts[1], counts[2], counts[3], counts[4], counts[5], counts[6], counts[7], counts[8], counts[9]};
}

DelayPackShape plan(const TensorView& host_table, const std::vector<int64_t>& counts) {
  host_table.expect("delay_pack: host_table", {DType::kInt64}, Device::kCpu, {-1});
  return delay_pack_plan(host_table.ptr<int64_t>(), host_table.sizes[0], shape_of(counts));
}

// Where the packed block goes: ids, labels, weight, position, cu_seqlens; and where asked segment_map, stream_map.
using Outputs = std::vector<TensorView>;

void check_outputs(const Outputs& out, const std::optional<TensorView>& bad, Device on, const DelayPackShape& shape) {
  SX_CHECK(out.size() == 5 || out.size() == 7, "delay_pack: 5 or 7 outputs are needed");
  const int64_t N = shape.num_rows, S = shape.num_streams;
  out[0].expect("delay_pack: out_ids", kIds, on, {N, S});
  out[1].expect("delay_pack: out_labels", {out[0].dtype}, on, {N, S});
  out[2].expect("delay_pack: out_weight", {DType::kFloat32}, on, {N, S});
  out[3].expect("delay_pack: position", {DType::kInt32}, on, {N});
  out[4].expect("delay_pack: cu_seqlens", {DType::kInt32}, on, {shape.num_sequences + 1});
  if (bad) bad->expect("delay_pack: bad", {DType::kInt32}, on, {1});
  if (out.size() == 5) return;
  out[5].expect("delay_pack: segment_map", {DType::kInt32}, on, {N});
  out[6].expect("delay_pack: stream_map", {DType::kInt32}, on, {N, S});
}

template <typename In, typename Out>
DelayPackArgs<In, Out> args_of(const DelayPackShape& shape, const TensorView& table, double fill_weight,
                               const Outputs& out, const std::optional<TensorView>& bad) {
  DelayPackArgs<In, Out> args;
  args.shape = shape;
  args.meta = DelayPackMeta::at(table.ptr<int64_t>(), shape);
  args.fill_weight = static_cast<float>(fill_weight);
  args.out_ids = out[0].ptr<Out>();
  args.out_labels = out[1].ptr<Out>();
  args.out_weight = out[2].ptr<float>();
  args.out_position = out[3].ptr<int32_t>();
  args.out_cu_seqlens = out[4].ptr<int32_t>();
  if (out.size() > 5) {
    args.out_segment_map = out[5].ptr<int32_t>();
    args.out_stream_map = out[6].ptr<int32_t>();
  }
  args.bad = bad ? bad->ptr<int32_t>() : nullptr;
  return args;
}

template <typename Body>
void with_ids(DType in, DType out, const Body& body) {
  const bool wide_in = in == DType::kInt64, wide_out = out == DType::kInt64;
  if (wide_in && wide_out) return body(int64_t{}, int64_t{});
  if (wide_in) return body(int64_t{}, int32_t{});
  if (wide_out) return body(int32_t{}, int64_t{});
  body(int32_t{}, int32_t{});
}

// `table` is the host table on the GPU; on the CPU it is not given.
void delay_pack(const TensorView& ids, const std::optional<TensorView>& weight, const TensorView& host_table,
                const std::optional<TensorView>& table, const std::vector<int64_t>& counts, double fill_weight,
                const Outputs& out, const std::optional<TensorView>& bad, int threads, uintptr_t stream) {
  const Device on = ids.device;
  if (on == Device::kCuda) require_cuda_build("delay_pack");
  const DelayPackShape shape = plan(host_table, counts);
  ids.expect("delay_pack: ids", kIds, on == Device::kCuda ? Device::kCuda : Device::kCpu, {-1, -1});
  SX_CHECK(ids.numel() == shape.num_elements, "delay_pack: ids must have ", shape.num_elements, " ids; got ",
           ids.describe());
  SX_CHECK(table.has_value() || on == Device::kCpu || kOneDevice, "delay_pack: the table must be given on CUDA");
  if (table) table->expect("delay_pack: table", {DType::kInt64}, on, {host_table.sizes[0]});
  if (weight) weight->expect("delay_pack: loss_weight", {DType::kFloat32}, on, {ids.sizes[0], ids.sizes[1]});
  check_outputs(out, bad, on, shape);
  with_ids(ids.dtype, out[0].dtype, [&](auto in, auto to) {
    auto args = args_of<decltype(in), decltype(to)>(shape, table ? *table : host_table, fill_weight, out, bad);
    args.ids = ids.ptr<decltype(in)>();
    args.weight = weight ? weight->ptr<float>() : nullptr;
    const py::gil_scoped_release no_gil;
    if (on == Device::kCpu) return delay_pack_cpu(args, threads);
#ifdef SPEECHLM_HAVE_CUDA
    delay_pack_cuda(args, ids.device_index, reinterpret_cast<void*>(stream));
#else
    (void)stream;
#endif
  });
}

template <typename T>
std::vector<const T*> pointers(const std::vector<uintptr_t>& addresses) {
  std::vector<const T*> out;
  for (uintptr_t address : addresses) out.push_back(reinterpret_cast<const T*>(address));
  return out;
}

// The list form on the CPU: segments are read where they lie. Their addresses come from tensors that Python has just
// checked and that it keeps alive; looking at each of hundreds of small tensors from here would cost more than packing.
void delay_pack_segments(const std::vector<uintptr_t>& segments, const std::vector<uintptr_t>& weights, bool wide,
                         const TensorView& table, const std::vector<int64_t>& counts, double fill_weight,
                         const Outputs& out, const std::optional<TensorView>& bad, int threads) {
  const DelayPackShape shape = plan(table, counts);
  const auto n = static_cast<size_t>(shape.num_segments);
  SX_CHECK(segments.size() == n && (weights.empty() || weights.size() == n), "delay_pack: ", segments.size(),
           " segments and ", weights.size(), " weights for ", n, " segments");
  check_outputs(out, bad, Device::kCpu, shape);
  with_ids(wide ? DType::kInt64 : DType::kInt32, out[0].dtype, [&](auto in, auto to) {
    auto args = args_of<decltype(in), decltype(to)>(shape, table, fill_weight, out, bad);
    const auto ids = pointers<decltype(in)>(segments);
    const auto weight = pointers<float>(weights);
    args.segment_ids = ids.data();
    args.segment_weight = weights.empty() ? nullptr : weight.data();
    const py::gil_scoped_release no_gil;
    delay_pack_cpu(args, threads);
  });
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
        py::arg("table").none(true), py::arg("counts"), py::arg("fill_weight"), py::arg("out"),
        py::arg("bad").none(true), py::arg("threads"), py::arg("stream"));
  m.def("delay_pack_segments", &delay_pack_segments, py::arg("segments"), py::arg("weights"), py::arg("wide"),
        py::arg("table"), py::arg("counts"), py::arg("fill_weight"), py::arg("out"), py::arg("bad").none(true),
        py::arg("threads"));
  m.def("delay_unpack", &delay_unpack, py::arg("ids"), py::arg("host_table"), py::arg("table"), py::arg("num_segments"),
        py::arg("out"), py::arg("threads"), py::arg("stream"));
}

}  // namespace speechlm
