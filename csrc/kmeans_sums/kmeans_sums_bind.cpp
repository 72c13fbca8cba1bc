// Python binding of kmeans_sums: check every tensor, then run the kernel of their device.
#include "kmeans_sums/kmeans_sums.h"

#include "common/bind.h"
#include "common/tensor/arguments.h"
#include "common/tensor/tensor_caster.h"

namespace speechlm {
namespace {

namespace py = pybind11;

// On a GPU `labels` are in the order of `order`, ascending.
void kmeans_sums(const TensorView& x, const TensorView& labels, const TensorView& offset, const TensorView& step,
                 const TensorView& sums, const std::optional<TensorView>& counts,
                 const std::optional<TensorView>& order, int threads, uintptr_t stream) {
  constexpr const char* kSums = "kmeans_sums";
  const Expect expect(kSums, "x", x);
  expect(x, "x", kFloats, {-1, -1});
  const int64_t N = x.sizes[0], F = x.sizes[1];
  SX_CHECK(expect.on_cuda() ? order.has_value() : counts.has_value(), kSums, ": ",
           expect.on_cuda() ? "order" : "counts", " must be given");
  double* const total = expect.ptr<double>(sums, "sums", {-1, F});
  const int64_t K = sums.sizes[0];
  with_float(x.dtype, [&](auto value) {
    using T = decltype(value);
    KmeansSumsArgs<T> args;
    args.num_rows = N;
    args.num_clusters = K;
    args.width = F;
    args.x = x.ptr<T>();
    args.labels = expect.ptr<int32_t>(labels, "labels", {N});
    args.offset = expect.ptr<double>(offset, "offset", {F});
    args.step = expect.ptr<double>(step, "step", {F});
    args.sums = total;
    args.counts = expect.ptr<int64_t>(counts, "counts", {K});
    const int64_t* by_label = expect.ptr<int64_t>(order, "order", {N});
    const py::gil_scoped_release no_gil;
    if (!expect.on_cuda()) return kmeans_sums_cpu(args, threads);
    if constexpr (kHasCuda) kmeans_sums_cuda(args, by_label, x.device_index, reinterpret_cast<void*>(stream));
  });
}

}  // namespace

void bind_kmeans_sums(py::module_& m) {
  m.def("kmeans_sums", &kmeans_sums, py::arg("x"), py::arg("labels"), py::arg("offset"), py::arg("step"),
        py::arg("sums"), py::arg("counts").none(true), py::arg("order").none(true), py::arg("threads"),
        py::arg("stream"));
}

}  // namespace speechlm
