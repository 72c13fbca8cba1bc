// Python's door to kmeans_assign: checks of every tensor, then the kernel of their device. No arithmetic here.
#include <optional>
#include <type_traits>

#include "bind.h"
#include "common/cpu/simd.h"
#include "common/cuda/cuda_build.h"
#include "common/tensor/tensor_caster.h"
#include "kmeans_assign/kmeans_assign.h"
#include "kmeans_assign/kmeans_sums.h"

namespace speechlm {
namespace {

namespace py = pybind11;

constexpr const char* kOp = "kmeans_assign";
constexpr auto kFloats = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
constexpr auto kWide = {DType::kFloat32, DType::kFloat64};
constexpr int64_t kRowTerms = sizeof(RowTerms) / sizeof(float);

// Calls run(T{}) with the type of the rows.
template <typename Run>
void with_float(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat64: return run(double{});
    case DType::kBFloat16: return run(BFloat16{});
    case DType::kFloat16: return run(Float16{});
    default: return run(float{});
  }
}

// Both or neither.
void expect_coarse(const std::optional<TensorView>& codes, const std::optional<TensorView>& terms, int64_t padded,
                   int64_t width) {
  SX_CHECK(codes.has_value() == terms.has_value(), "kmeans_assign: coarse codes go with coarse terms");
  if (!codes) return;
  codes->expect("kmeans_assign: coarse codes", {DType::kInt32}, Device::kCpu,
                {padded / kPanel, coarse_pairs(width), kPanel});
  terms->expect("kmeans_assign: coarse terms", {DType::kFloat32}, Device::kCpu, {4, padded});
}

CentroidTerms centroid_terms(const float* first, int64_t padded) {
  return {first, first + padded, first + 2 * padded, first + 3 * padded};
}

void kmeans_index(const TensorView& centroids, const TensorView& centre, const TensorView& codes,
                  const TensorView& terms, const TensorView& unit, const std::optional<TensorView>& coarse_codes,
                  const std::optional<TensorView>& coarse_terms, int threads) {
  constexpr Device on = Device::kCpu;
  centroids.expect("kmeans_assign: centroids", kWide, on, {-1, -1});
  const int64_t K = centroids.sizes[0], F = centroids.sizes[1], padded = padded_clusters(K);
  centre.expect("kmeans_assign: centre", {DType::kFloat64}, on, {F});
  codes.expect("kmeans_assign: codes", {DType::kInt32}, on, {padded / kPanel, (F + 1) / 2, kPanel});
  terms.expect("kmeans_assign: terms", {DType::kFloat32}, on, {4, padded});
  unit.expect("kmeans_assign: unit", {DType::kFloat64}, on, {1});
  expect_coarse(coarse_codes, coarse_terms, padded, F);
  const auto run = [&](auto value) {
    using C = decltype(value);
    const KmeansIndexArgs<C> args{K,
                                  F,
                                  centroids.ptr<C>(),
                                  centre.ptr<double>(),
                                  codes.ptr<int32_t>(),
                                  terms.ptr<float>(),
                                  unit.ptr<double>(),
                                  coarse_codes ? coarse_codes->ptr<int32_t>() : nullptr,
                                  coarse_terms ? coarse_terms->ptr<float>() : nullptr};
    const py::gil_scoped_release no_gil;
    kmeans_index_cpu(args, threads);
  };
  centroids.dtype == DType::kFloat64 ? run(double{}) : run(float{});
}

void kmeans_assign(const TensorView& x, const TensorView& centroids, const TensorView& codes, const TensorView& terms,
                   const TensorView& centre, const TensorView& unit, const std::optional<TensorView>& coarse_codes,
                   const std::optional<TensorView>& coarse_terms, bool exact, const TensorView& labels,
                   const std::optional<TensorView>& distance, const TensorView& counts, int threads,
                   bool products_only) {
  constexpr Device on = Device::kCpu;
  x.expect("kmeans_assign: x", kFloats, on, {-1, -1});
  const int64_t N = x.sizes[0], F = x.sizes[1];
  centroids.expect("kmeans_assign: centroids", kWide, on, {-1, F});
  const int64_t K = centroids.sizes[0], padded = padded_clusters(K);
  SX_CHECK(K >= 1 && K < (int64_t{1} << 31), "kmeans_assign: 1 to 2^31 - 1 centroids; got ", K);
  codes.expect("kmeans_assign: codes", {DType::kInt32}, on, {padded / kPanel, (F + 1) / 2, kPanel});
  terms.expect("kmeans_assign: terms", {DType::kFloat32}, on, {4, padded});
  centre.expect("kmeans_assign: centre", {DType::kFloat64}, on, {F});
  unit.expect("kmeans_assign: unit", {DType::kFloat64}, on, {1});
  labels.expect("kmeans_assign: labels", {DType::kInt32}, on, {N});
  if (distance) distance->expect("kmeans_assign: distance", {DType::kFloat64}, on, {N});
  counts.expect("kmeans_assign: counts", {DType::kInt64}, on, {3});
  expect_coarse(coarse_codes, coarse_terms, padded, F);
  with_float(x.dtype, [&](auto row_value) {
    const auto run = [&](auto centroid_value) {
      using T = decltype(row_value);
      using C = decltype(centroid_value);
      KmeansAssignArgs<T, C> args;
      args.num_rows = N;
      args.num_clusters = K;
      args.width = F;
      args.x = x.ptr<T>();
      args.centroids = centroids.ptr<C>();
      args.codes = codes.ptr<int32_t>();
      args.terms = centroid_terms(terms.ptr<float>(), padded);
      if (coarse_codes) {
        args.coarse_codes = coarse_codes->ptr<int32_t>();
        args.coarse_terms = centroid_terms(coarse_terms->ptr<float>(), padded);
      }
      args.centre = centre.ptr<double>();
      args.unit = *unit.ptr<double>();
      args.exact = exact;
      args.products_only = products_only;
      args.labels = labels.ptr<int32_t>();
      args.distance = distance ? distance->ptr<double>() : nullptr;
      args.counts = counts.ptr<int64_t>();
      const py::gil_scoped_release no_gil;
      kmeans_assign_cpu(args, threads);
    };
    centroids.dtype == DType::kFloat64 ? run(double{}) : run(float{});
  });
}

void kmeans_rows(const TensorView& x, const TensorView& centre, const TensorView& unit, bool exact,
                 const TensorView& codes, const TensorView& terms, uintptr_t stream) {
  require_cuda_build(kOp);
#ifdef SPEECHLM_HAVE_CUDA
  constexpr Device on = Device::kCuda;
  x.expect("kmeans_assign: x", kFloats, on, {-1, -1});
  const int64_t N = x.sizes[0], F = x.sizes[1];
  centre.expect("kmeans_assign: centre", {DType::kFloat64}, on, {F});
  unit.expect("kmeans_assign: unit", {DType::kFloat64}, on, {1});
  codes.expect("kmeans_assign: row codes", {DType::kFloat16}, on, {-1, -1});
  terms.expect("kmeans_assign: row terms", {DType::kFloat32}, on, {-1, kRowTerms});
  SX_CHECK(codes.sizes[0] >= N && codes.sizes[1] >= F && terms.sizes[0] >= N,
           "kmeans_assign: row codes and terms must hold ", N, " rows; got ", codes.describe(), " and ",
           terms.describe());
  with_float(x.dtype, [&](auto value) {
    using T = decltype(value);
    const KmeansRowsArgs<T> args{N,
                                 F,
                                 codes.sizes[1],
                                 x.ptr<T>(),
                                 centre.ptr<double>(),
                                 unit.ptr<double>(),
                                 exact,
                                 codes.ptr<uint16_t>(),
                                 terms.ptr<RowTerms>()};
    const py::gil_scoped_release no_gil;
    kmeans_rows_cuda(args, x.device_index, reinterpret_cast<void*>(stream));
  });
#endif
}

void kmeans_settle(const TensorView& products, const TensorView& x, const TensorView& centroids,
                   const TensorView& terms, const TensorView& rows, const TensorView& labels,
                   const std::optional<TensorView>& distance, const TensorView& counts, uintptr_t stream) {
  require_cuda_build(kOp);
#ifdef SPEECHLM_HAVE_CUDA
  constexpr Device on = Device::kCuda;
  x.expect("kmeans_assign: x", kFloats, on, {-1, -1});
  const int64_t N = x.sizes[0], F = x.sizes[1];
  centroids.expect("kmeans_assign: centroids", kWide, on, {-1, F});
  const int64_t K = centroids.sizes[0];
  products.expect("kmeans_assign: products", {DType::kFloat32}, on, {N, K});
  terms.expect("kmeans_assign: terms", {DType::kFloat32}, on, {4, K});
  rows.expect("kmeans_assign: row terms", {DType::kFloat32}, on, {N, kRowTerms});
  labels.expect("kmeans_assign: labels", {DType::kInt32}, on, {N});
  if (distance) distance->expect("kmeans_assign: distance", {DType::kFloat64}, on, {N});
  counts.expect("kmeans_assign: counts", {DType::kInt64}, on, {3});
  SX_CHECK(K >= 1 && K < (int64_t{1} << 31), "kmeans_assign: 1 to 2^31 - 1 centroids; got ", K);
  with_float(x.dtype, [&](auto row_value) {
    const auto run = [&](auto centroid_value) {
      using T = decltype(row_value);
      using C = decltype(centroid_value);
      const KmeansSettleArgs<T, C> args{N,
                                        K,
                                        F,
                                        products.ptr<float>(),
                                        x.ptr<T>(),
                                        centroids.ptr<C>(),
                                        centroid_terms(terms.ptr<float>(), K),
                                        rows.ptr<RowTerms>(),
                                        labels.ptr<int32_t>(),
                                        distance ? distance->ptr<double>() : nullptr,
                                        counts.ptr<unsigned long long>()};
      const py::gil_scoped_release no_gil;
      kmeans_settle_cuda(args, x.device_index, reinterpret_cast<void*>(stream));
    };
    centroids.dtype == DType::kFloat64 ? run(double{}) : run(float{});
  });
#endif
}

void kmeans_sums(const TensorView& x, const TensorView& labels, const TensorView& offset, const TensorView& step,
                 const TensorView& sums, const std::optional<TensorView>& counts,
                 const std::optional<TensorView>& order, int threads, uintptr_t stream) {
  const bool on_cuda = x.device == Device::kCuda;
  if (on_cuda) require_cuda_build(kOp);
  const Device on = on_cuda ? Device::kCuda : Device::kCpu;
  x.expect("kmeans_sums: x", kFloats, on, {-1, -1});
  const int64_t N = x.sizes[0], F = x.sizes[1];
  labels.expect("kmeans_sums: labels", {DType::kInt32}, on, {N});
  offset.expect("kmeans_sums: offset", {DType::kFloat64}, on, {F});
  step.expect("kmeans_sums: step", {DType::kFloat64}, on, {F});
  sums.expect("kmeans_sums: sums", {DType::kFloat64}, on, {-1, F});
  if (counts) counts->expect("kmeans_sums: counts", {DType::kInt64}, on, {sums.sizes[0]});
  if (order) order->expect("kmeans_sums: order", {DType::kInt64}, on, {N});
  SX_CHECK(on_cuda ? order.has_value() : counts.has_value(), "kmeans_sums: ", on_cuda ? "order" : "counts",
           " must be given");
  with_float(x.dtype, [&](auto value) {
    using T = decltype(value);
    const KmeansSumsArgs<T> args{N,
                                 sums.sizes[0],
                                 F,
                                 x.ptr<T>(),
                                 labels.ptr<int32_t>(),
                                 offset.ptr<double>(),
                                 step.ptr<double>(),
                                 sums.ptr<double>(),
                                 counts ? counts->ptr<int64_t>() : nullptr};
    const py::gil_scoped_release no_gil;
#ifdef SPEECHLM_HAVE_CUDA
    if (on_cuda) {
      kmeans_sums_cuda(args, order->ptr<int64_t>(), x.device_index, reinterpret_cast<void*>(stream));
      return;
    }
#else
    (void)stream;
#endif
    kmeans_sums_cpu(args, threads);
  });
}

}  // namespace

void bind_kmeans_assign(py::module_& m) {
  m.def("kmeans_index", &kmeans_index, py::arg("centroids"), py::arg("centre"), py::arg("codes"), py::arg("terms"),
        py::arg("unit"), py::arg("coarse_codes").none(true), py::arg("coarse_terms").none(true), py::arg("threads"));
  m.def("kmeans_assign", &kmeans_assign, py::arg("x"), py::arg("centroids"), py::arg("codes"), py::arg("terms"),
        py::arg("centre"), py::arg("unit"), py::arg("coarse_codes").none(true), py::arg("coarse_terms").none(true),
        py::arg("exact"), py::arg("labels"), py::arg("distance").none(true), py::arg("counts"), py::arg("threads"),
        py::arg("products_only") = false);
  m.def("has_coarse_tiles", [] { return tiles_in_use() != Tiles::kNone; });
  m.def("kmeans_sums", &kmeans_sums, py::arg("x"), py::arg("labels"), py::arg("offset"), py::arg("step"),
        py::arg("sums"), py::arg("counts").none(true), py::arg("order").none(true), py::arg("threads"),
        py::arg("stream"));
  m.def("kmeans_rows_cuda", &kmeans_rows, py::arg("x"), py::arg("centre"), py::arg("unit"), py::arg("exact"),
        py::arg("codes"), py::arg("terms"), py::arg("stream"));
  m.def("kmeans_settle_cuda", &kmeans_settle, py::arg("products"), py::arg("x"), py::arg("centroids"), py::arg("terms"),
        py::arg("rows"), py::arg("labels"), py::arg("distance").none(true), py::arg("counts"), py::arg("stream"));
}

}  // namespace speechlm
