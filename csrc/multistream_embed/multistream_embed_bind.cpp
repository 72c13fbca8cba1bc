// Python bindings of multistream_embed: check every tensor, then run the kernel of the tensors' device.
#include "common/bind.h"
#include "common/tensor/arguments.h"
#include "common/tensor/tensor_caster.h"
#include "multistream_embed/bind_rule.h"

namespace speechlm {
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
  const Expect expect(kOp, "ids", ids);
  expect(ids, "ids", kIds, {-1, -1});
  expect(table, "table", kFloats, {-1, -1});
  const EmbedShape shape{ids.sizes[0], ids.sizes[1], table.sizes[0], table.sizes[1]};
  expect(out, "out", {table.dtype}, {shape.num_rows, shape.width});
  int64_t* const bad_places = expect.ptr<int64_t>(bad, "bad", {2});
  FeaturePlaces places;
  std::vector<int32_t> own_slots;
  if (features) {
    SX_CHECK(positions.has_value(), kOp, ": features need positions");
    expect(*features, "features", {table.dtype}, {-1, shape.width});
    const int64_t count = features->sizes[0];
    SX_CHECK(count < (int64_t{1} << 31), kOp, ": at most 2^31 - 1 features; got ", count);
    places.num_features = count;
    places.num_rows = shape.num_rows;
    places.positions = expect.ptr<int64_t>(*positions, "feature_positions", {count});
    places.bad = bad ? bad_places + 1 : nullptr;
    if (expect.on_cuda()) {
      SX_CHECK(slots.has_value(), kOp, ": slots must be given on CUDA");
      places.slots = expect.ptr<int32_t>(*slots, "slots", {shape.num_rows});
    } else {
      own_slots.resize(shape.num_rows);
      places.slots = own_slots.data();
    }
  }
  const EmbedRule rule = rule_of(kOp, shape.num_streams, pad_id, offsets, scale);
  return with_float(table.dtype, [&](auto value) {
    return with_id(ids.dtype, [&](auto id) -> std::pair<int64_t, int64_t> {
      using T = decltype(value);
      EmbedArgs<T, decltype(id)> args;
      args.shape = shape;
      args.rule = rule;
      args.ids = ids.ptr<decltype(id)>();
      args.table = table.ptr<T>();
      args.features = features ? features->ptr<T>() : nullptr;
      args.slots = places.slots;
      args.out = out.ptr<T>();
      args.bad = bad_places;
      const py::gil_scoped_release no_gil;
      if (!expect.on_cuda()) {
        if (features && !scatter_slots_cpu(places)) return {-1, -1};
        const int64_t none = shape.num_rows * shape.num_streams;
        int64_t first_bad = none;
        args.bad = &first_bad;
        multistream_embed_cpu(args, threads);
        return {first_bad == none ? -1 : first_bad, 0};
      }
      if constexpr (kHasCuda) {
        if (features) scatter_slots_cuda(places, ids.device_index, reinterpret_cast<void*>(stream));
        multistream_embed_cuda(args, ids.device_index, reinterpret_cast<void*>(stream));
      }
      return {-1, 0};
    });
  });
}

}  // namespace

void bind_multistream_embed(py::module_& m) {
  m.def("multistream_embed", &multistream_embed, py::arg("ids"), py::arg("table"), py::arg("pad_id").none(true),
        py::arg("offsets"), py::arg("scale"), py::arg("features").none(true), py::arg("positions").none(true),
        py::arg("out"), py::arg("slots").none(true), py::arg("bad").none(true), py::arg("threads"), py::arg("stream"));
}

}  // namespace speechlm
