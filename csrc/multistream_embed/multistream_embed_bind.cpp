// Python's door to multistream_embed: checks of every tensor, then the kernel of the tensors' device.
#include <pybind11/stl.h>

#include "bind.h"
#include "common/cuda/cuda_build.h"
#include "multistream_embed/bind_types.h"

namespace speechlm {

void bind_scatter_sum(pybind11::module_& m);

namespace {

namespace py = pybind11;

constexpr const char* kOp = "multistream_embed";

// CPU: returns (place of the first bad id or -1, -1 if the positions are bad else 0). CUDA: writes both to `bad` [2],
// which holds N * S twice before; `slots` [N] holds -1 before.
std::pair<int64_t, int64_t> multistream_embed(const TensorView& ids, const TensorView& table,
                                              std::optional<int64_t> pad_id, const std::vector<int64_t>& offsets,
                                              const std::vector<double>& scale,
                                              const std::optional<TensorView>& features,
                                              const std::optional<TensorView>& positions, const TensorView& out,
                                              const std::optional<TensorView>& slots,
                                              const std::optional<TensorView>& bad, int threads, uintptr_t stream) {
  const Device on = ids.device;
  if (on == Device::kCuda) require_cuda_build(kOp);
  ids.expect("multistream_embed: ids", kIds, on == Device::kCuda ? Device::kCuda : Device::kCpu, {-1, -1});
  table.expect("multistream_embed: table", kFloats, on, {-1, -1});
  const EmbedShape shape{ids.sizes[0], ids.sizes[1], table.sizes[0], table.sizes[1]};
  out.expect("multistream_embed: out", {table.dtype}, on, {shape.num_rows, shape.width});
  if (bad) bad->expect("multistream_embed: bad", {DType::kInt64}, on, {2});
  FeaturePlaces places;
  std::vector<int32_t> own_slots;
  if (features) {
    SX_CHECK(positions.has_value(), kOp, ": features need positions");
    features->expect("multistream_embed: features", {table.dtype}, on, {-1, shape.width});
    positions->expect("multistream_embed: feature_positions", {DType::kInt64}, on, {features->sizes[0]});
    SX_CHECK(features->sizes[0] < (int64_t{1} << 31), kOp, ": at most 2^31 - 1 features; got ", features->sizes[0]);
    places = {features->sizes[0], shape.num_rows, positions->ptr<int64_t>(), nullptr,
              bad ? bad->ptr<int64_t>() + 1 : nullptr};
    if (on == Device::kCuda) {
      SX_CHECK(slots.has_value(), kOp, ": slots must be given on CUDA");
      places.slots = slots->expect("multistream_embed: slots", {DType::kInt32}, on, {shape.num_rows}).ptr<int32_t>();
    } else {
      own_slots.resize(shape.num_rows);
      places.slots = own_slots.data();
    }
  }
  const EmbedRule rule = rule_of(kOp, shape.num_streams, pad_id, offsets, scale);
  return with_float(table.dtype, [&](auto value) {
    return with_id(ids.dtype, [&](auto id) -> std::pair<int64_t, int64_t> {
      EmbedArgs<decltype(value), decltype(id)> args;
      args.shape = shape;
      args.rule = rule;
      args.ids = ids.ptr<decltype(id)>();
      args.table = table.ptr<decltype(value)>();
      args.features = features ? features->ptr<decltype(value)>() : nullptr;
      args.slots = places.slots;
      args.out = out.ptr<decltype(value)>();
      args.bad = bad ? bad->ptr<int64_t>() : nullptr;
      const py::gil_scoped_release no_gil;
      if (on == Device::kCpu) {
        if (features && !place_features_cpu(places)) return {-1, -1};
        const int64_t none = shape.num_rows * shape.num_streams;
        int64_t first_bad = none;
        args.bad = &first_bad;
        multistream_embed_cpu(args, threads);
        return {first_bad == none ? -1 : first_bad, 0};
      }
#ifdef SPEECHLM_HAVE_CUDA
      if (features) place_features_cuda(places, ids.device_index, reinterpret_cast<void*>(stream));
      multistream_embed_cuda(args, ids.device_index, reinterpret_cast<void*>(stream));
#else
      (void)stream;
#endif
      return {-1, 0};
    });
  });
}

}  // namespace

void bind_multistream_embed(py::module_& m) {
  m.def("multistream_embed", &multistream_embed, py::arg("ids"), py::arg("table"), py::arg("pad_id").none(true),
        py::arg("offsets"), py::arg("scale"), py::arg("features").none(true), py::arg("positions").none(true),
        py::arg("out"), py::arg("slots").none(true), py::arg("bad").none(true), py::arg("threads"), py::arg("stream"));
  bind_scatter_sum(m);
}

}  // namespace speechlm
