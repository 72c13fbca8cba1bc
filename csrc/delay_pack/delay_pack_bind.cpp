// Python bindings of delay_pack: check every tensor, then run the kernel of the tensors' device.
#include "common/bind.h"
#include "common/tensor/arguments.h"
#include "common/tensor/tensor_caster.h"
#include "delay_pack/delay_pack.h"

namespace speechlm {
namespace {

namespace py = pybind11;

constexpr const char* kOp = "delay_pack";

// In the order of DelayPackShape's given fields.
DelayPackShape shape_of(const std::vector<int64_t>& counts) {
  SX_CHECK(counts.size() == 10, kOp, ": 10 counts are needed; got ", counts.size());
  return {counts[0], counts[1], counts[2], counts[3], counts[4], counts[5], counts[6], counts[7], counts[8], counts[9]};
}

DelayPackShape plan(const TensorView& host_table, const std::vector<int64_t>& counts) {
  const int64_t* table = Expect(kOp, Device::kCpu).ptr<int64_t>(host_table, "host_table", {-1});
  return delay_pack_plan(table, host_table.sizes[0], shape_of(counts));
}

// Of the packed block: ids, labels, weight, position, cu_seqlens; if wanted segment_map, stream_map.
using Outputs = std::vector<TensorView>;

// Calls run(args, In{}) for ids of type `in`, with everything in args but the ids and weights.
template <typename Run>
void with_args(const Expect& expect, const DelayPackShape& shape, const int64_t* table, double fill_weight,
               const Outputs& out, const std::optional<TensorView>& bad, DType in, const Run& run) {
  SX_CHECK(out.size() == 5 || out.size() == 7, kOp, ": 5 or 7 outputs are needed");
  const int64_t N = shape.num_rows, S = shape.num_streams;
  expect(out[0], "out_ids", kIds, {N, S});
  with_id(in, [&](auto from) {
    with_id(out[0].dtype, [&](auto to) {
      using Out = decltype(to);
      DelayPackArgs<decltype(from), Out> args;
      args.shape = shape;
      args.meta = DelayPackMeta::at(table, shape);
      args.fill_weight = static_cast<float>(fill_weight);
      args.out_ids = out[0].ptr<Out>();
      args.out_labels = expect.ptr<Out>(out[1], "out_labels", {N, S});
      args.out_weight = expect.ptr<float>(out[2], "out_weight", {N, S});
      args.out_position = expect.ptr<int32_t>(out[3], "position", {N});
      args.out_cu_seqlens = expect.ptr<int32_t>(out[4], "cu_seqlens", {shape.num_sequences + 1});
      args.bad = expect.ptr<int32_t>(bad, "bad", {1});
      if (out.size() == 7) {
        args.out_segment_map = expect.ptr<int32_t>(out[5], "segment_map", {N});
        args.out_stream_map = expect.ptr<int32_t>(out[6], "stream_map", {N, S});
      }
      run(args, from);
    });
  });
}

// `table` is the host table's copy on the GPU; none on the CPU.
void delay_pack(const TensorView& ids, const std::optional<TensorView>& weight, const TensorView& host_table,
                const std::optional<TensorView>& table, const std::vector<int64_t>& counts, double fill_weight,
                const Outputs& out, const std::optional<TensorView>& bad, int threads, uintptr_t stream) {
  const Expect expect(kOp, "ids", ids);
  const DelayPackShape shape = plan(host_table, counts);
  expect(ids, "ids", kIds, {-1, -1});
  SX_CHECK(ids.numel() == shape.num_elements, kOp, ": ids must have ", shape.num_elements, " ids; got ",
           ids.describe());
  SX_CHECK(table || !expect.on_cuda() || kOneDevice, kOp, ": the table must be given on CUDA");
  const int64_t* here = table ? expect.ptr<int64_t>(*table, "table", {host_table.sizes[0]}) : host_table.ptr<int64_t>();
  const float* weights = expect.ptr<float>(weight, "loss_weight", {ids.sizes[0], ids.sizes[1]});
  with_args(expect, shape, here, fill_weight, out, bad, ids.dtype, [&](auto& args, auto from) {
    args.ids = ids.ptr<decltype(from)>();
    args.weight = weights;
    const py::gil_scoped_release no_gil;
    if (!expect.on_cuda()) return delay_pack_cpu(args, threads);
    if constexpr (kHasCuda) delay_pack_cuda(args, ids.device_index, reinterpret_cast<void*>(stream));
  });
}

template <typename T>
std::vector<const T*> pointers(const std::vector<uintptr_t>& addresses) {
  std::vector<const T*> out;
  for (uintptr_t address : addresses) out.push_back(reinterpret_cast<const T*>(address));
  return out;
}

// The list form on the CPU, without concatenating. The addresses come from tensors that Python has just checked and
// that it keeps alive; checking hundreds of small tensors from here would cost more than packing.
void delay_pack_segments(const std::vector<uintptr_t>& segments, const std::vector<uintptr_t>& weights, bool wide,
                         const TensorView& table, const std::vector<int64_t>& counts, double fill_weight,
                         const Outputs& out, const std::optional<TensorView>& bad, int threads) {
  const DelayPackShape shape = plan(table, counts);
  const auto n = static_cast<size_t>(shape.num_segments);
  SX_CHECK(segments.size() == n && (weights.empty() || weights.size() == n), kOp, ": ", segments.size(),
           " segments and ", weights.size(), " weights for ", n, " segments");
  const auto run = [&](auto& args, auto from) {
    const auto ids = pointers<decltype(from)>(segments);
    const auto weight = pointers<float>(weights);
    args.segment_ids = ids.data();
    args.segment_weight = weights.empty() ? nullptr : weight.data();
    const py::gil_scoped_release no_gil;
    delay_pack_cpu(args, threads);
  };
  with_args(Expect(kOp, Device::kCpu), shape, table.ptr<int64_t>(), fill_weight, out, bad,
            wide ? DType::kInt64 : DType::kInt32, run);
}

void delay_unpack(const TensorView& ids, const TensorView& host_table, const TensorView& table, int64_t num_segments,
                  const TensorView& out, int threads, uintptr_t stream) {
  constexpr const char* kUnpack = "delay_unpack";
  const Expect expect(kUnpack, "ids", ids);
  expect(ids, "ids", kIds, {-1, -1});
  const int64_t S = ids.sizes[1], entries = num_segments + 1;
  SX_CHECK(num_segments >= 0, kUnpack, ": cu_seqlens must have at least one entry");
  const int64_t* host = Expect(kUnpack, Device::kCpu).ptr<int64_t>(host_table, "host_table", {2 * entries + S});
  const int64_t* here = expect.ptr<int64_t>(table, "table", {host_table.sizes[0]});
  expect(out, "out", {ids.dtype}, {-1, S});
  const DelayPackShape shape =
      delay_unpack_shape(host, host + entries, host + 2 * entries, num_segments, S, ids.sizes[0], out.sizes[0]);
  with_id(ids.dtype, [&](auto id) {
    using Id = decltype(id);
    const DelayUnpackArgs<Id> args{shape, here, here + entries, here + 2 * entries, ids.ptr<Id>(), out.ptr<Id>()};
    const py::gil_scoped_release no_gil;
    if (!expect.on_cuda()) return delay_unpack_cpu(args, threads);
    if constexpr (kHasCuda) delay_unpack_cuda(args, ids.device_index, reinterpret_cast<void*>(stream));
  });
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
