// Python bindings of kmeans_assign: check every tensor, then run the kernel of their device.
#include "common/bind.h"
#include "common/cpu/simd.h"
#include "common/tensor/arguments.h"
#include "common/tensor/tensor_caster.h"
#include "kmeans_assign/kmeans_assign.h"

namespace speechlm {
namespace {

namespace py = pybind11;

constexpr const char* kOp = "kmeans_assign";
constexpr int64_t kRowTerms = sizeof(RowTerms) / sizeof(float);

// The coarse codes and their terms: both or neither.
struct Coarse {
  int32_t* codes;
  float* terms;

  Coarse(const Expect& expect, const std::optional<TensorView>& codes_, const std::optional<TensorView>& terms_,
         int64_t padded, int64_t width)
      : codes(expect.ptr<int32_t>(codes_, "coarse codes", {padded / kPanel, coarse_pairs(width), kPanel})),
        terms(expect.ptr<float>(terms_, "coarse terms", {4, padded})) {
    SX_CHECK(codes_.has_value() == terms_.has_value(), kOp, ": coarse codes go with coarse terms");
  }
};

CentroidTerms centroid_terms(const float* first, int64_t padded) {
  if (first == nullptr) return {};
  return {first, first + padded, first + 2 * padded, first + 3 * padded};
}

void check_clusters(int64_t num_clusters) {
  SX_CHECK(num_clusters >= 1 && num_clusters < (int64_t{1} << 31), kOp, ": 1 to 2^31 - 1 centroids; got ",
           num_clusters);
}

// On a GPU they are read by 16 bytes.
void check_vectors(const float* data, const char* name) {
  SX_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, kOp, ": ", name, " must begin at a multiple of 16 bytes");
}

void kmeans_index(const TensorView& centroids, const TensorView& centre, const TensorView& codes,
                  const TensorView& terms, const TensorView& unit, const std::optional<TensorView>& coarse_codes,
                  const std::optional<TensorView>& coarse_terms, int threads) {
  const Expect expect(kOp, Device::kCpu);
  expect(centroids, "centroids", kWideFloats, {-1, -1});
  const int64_t K = centroids.sizes[0], F = centroids.sizes[1], padded = padded_clusters(K);
  const Coarse coarse(expect, coarse_codes, coarse_terms, padded, F);
  with_wide_float(centroids.dtype, [&](auto value) {
    using C = decltype(value);
    KmeansIndexArgs<C> args;
    args.num_clusters = K;
    args.width = F;
    args.centroids = centroids.ptr<C>();
    args.centre = expect.ptr<double>(centre, "centre", {F});
    args.codes = expect.ptr<int32_t>(codes, "codes", {padded / kPanel, (F + 1) / 2, kPanel});
    args.terms = expect.ptr<float>(terms, "terms", {4, padded});
    args.unit = expect.ptr<double>(unit, "unit", {1});
    args.coarse_codes = coarse.codes;
    args.coarse_terms = coarse.terms;
    const py::gil_scoped_release no_gil;
    kmeans_index_cpu(args, threads);
  });
}

void kmeans_assign(const TensorView& x, const TensorView& centroids, const TensorView& codes, const TensorView& terms,
                   const TensorView& centre, const TensorView& unit, const std::optional<TensorView>& coarse_codes,
                   const std::optional<TensorView>& coarse_terms, bool exact, const TensorView& labels,
                   const std::optional<TensorView>& distance, const TensorView& counts, int threads,
                   bool products_only) {
  const Expect expect(kOp, Device::kCpu);
  expect(x, "x", kFloats, {-1, -1});
  const int64_t N = x.sizes[0], F = x.sizes[1];
  expect(centroids, "centroids", kWideFloats, {-1, F});
  const int64_t K = centroids.sizes[0], padded = padded_clusters(K);
  check_clusters(K);
  const Coarse coarse(expect, coarse_codes, coarse_terms, padded, F);
  with_float(x.dtype, [&](auto row_value) {
    with_wide_float(centroids.dtype, [&](auto centroid_value) {
      using T = decltype(row_value);
      using C = decltype(centroid_value);
      KmeansAssignArgs<T, C> args;
      args.num_rows = N;
      args.num_clusters = K;
      args.width = F;
      args.x = x.ptr<T>();
      args.centroids = centroids.ptr<C>();
      args.codes = expect.ptr<int32_t>(codes, "codes", {padded / kPanel, (F + 1) / 2, kPanel});
      args.terms = centroid_terms(expect.ptr<float>(terms, "terms", {4, padded}), padded);
      args.coarse_codes = coarse.codes;
      args.coarse_terms = centroid_terms(coarse.terms, padded);
      args.centre = expect.ptr<double>(centre, "centre", {F});
      args.unit = *expect.ptr<double>(unit, "unit", {1});
      args.exact = exact;
      args.products_only = products_only;
      args.labels = expect.ptr<int32_t>(labels, "labels", {N});
      args.distance = expect.ptr<double>(distance, "distance", {N});
      args.counts = expect.ptr<int64_t>(counts, "counts", {3});
      const py::gil_scoped_release no_gil;
      kmeans_assign_cpu(args, threads);
    });
  });
}

template <typename T>
KmeansQuantizeArgs<T> quantize_args(const Expect& expect, const TensorView& x, const TensorView& centre,
                                    const TensorView& unit, bool exact, const TensorView& codes,
                                    const TensorView& terms) {
  const int64_t N = x.sizes[0], F = x.sizes[1];
  expect(codes, "row codes", {DType::kFloat16}, {-1, -1});
  expect(terms, "row terms", {DType::kFloat32}, {-1, kRowTerms});
  SX_CHECK(codes.sizes[1] >= F && terms.sizes[0] >= N, kOp, ": row codes and terms must hold ", N, " rows; got ",
           codes.describe(), " and ", terms.describe());
  KmeansQuantizeArgs<T> args;
  args.num_rows = N;
  args.width = F;
  args.padded_width = codes.sizes[1];
  args.x = x.ptr<T>();
  args.centre = expect.ptr<double>(centre, "centre", {F});
  args.unit = expect.ptr<double>(unit, "unit", {1});
  args.exact = exact;
  args.codes = codes.ptr<uint16_t>();
  args.terms = terms.ptr<RowTerms>();
  return args;
}

// Without the products and the rows' terms.
template <typename T, typename C>
KmeansRescoreArgs<T, C> rescore_args(const Expect& expect, const TensorView& x, const TensorView& centroids,
                                     const TensorView& terms, const TensorView& labels,
                                     const std::optional<TensorView>& distance, const TensorView& counts) {
  const int64_t N = x.sizes[0], K = centroids.sizes[0], padded = padded_groups(K);
  expect(counts, "counts", {DType::kInt64}, {3});
  KmeansRescoreArgs<T, C> args;
  args.num_rows = N;
  args.num_clusters = K;
  args.width = x.sizes[1];
  args.x = x.ptr<T>();
  args.centroids = centroids.ptr<C>();
  args.terms = centroid_terms(expect.ptr<float>(terms, "terms", {4, padded}), padded);
  check_vectors(args.terms.scale, "terms");
  args.labels = expect.ptr<int32_t>(labels, "labels", {N});
  args.distance = expect.ptr<double>(distance, "distance", {N});
  args.counts = counts.ptr<unsigned long long>();
  return args;
}

void kmeans_quantize_rows(const TensorView& x, const TensorView& centre, const TensorView& unit, bool exact,
                          const TensorView& codes, const TensorView& terms, uintptr_t stream) {
  const Expect expect(kOp, Device::kCuda);
  expect(x, "x", kFloats, {-1, -1});
  with_float(x.dtype, [&](auto value) {
    const auto args = quantize_args<decltype(value)>(expect, x, centre, unit, exact, codes, terms);
    SX_CHECK(codes.sizes[0] >= args.num_rows, kOp, ": row codes must hold ", args.num_rows, " rows; got ",
             codes.describe());
    const py::gil_scoped_release no_gil;
    if constexpr (kHasCuda) kmeans_quantize_rows_cuda(args, x.device_index, reinterpret_cast<void*>(stream));
  });
}

void kmeans_rescore(const TensorView& products, const TensorView& x, const TensorView& centroids,
                    const TensorView& terms, const TensorView& rows, const TensorView& labels,
                    const std::optional<TensorView>& distance, const TensorView& counts, uintptr_t stream) {
  const Expect expect(kOp, Device::kCuda);
  expect(x, "x", kFloats, {-1, -1});
  const int64_t N = x.sizes[0];
  expect(centroids, "centroids", kWideFloats, {-1, x.sizes[1]});
  check_clusters(centroids.sizes[0]);
  expect(rows, "row terms", {DType::kFloat32}, {N, kRowTerms});
  with_float(x.dtype, [&](auto row_value) {
    with_wide_float(centroids.dtype, [&](auto centroid_value) {
      auto args = rescore_args<decltype(row_value), decltype(centroid_value)>(expect, x, centroids, terms, labels,
                                                                              distance, counts);
      args.products = expect.ptr<float>(products, "products", {N, padded_groups(args.num_clusters)});
      check_vectors(args.products, "products");
      args.rows = rows.ptr<RowTerms>();
      const py::gil_scoped_release no_gil;
      if constexpr (kHasCuda) kmeans_rescore_cuda(args, x.device_index, reinterpret_cast<void*>(stream));
    });
  });
}

// `products` [buffers, chunk, padded K] and `row_codes` give the sizes of the chunks.
void kmeans_assign_on_gpu(const TensorView& x, const TensorView& centroids, const TensorView& codes,
                          const TensorView& terms, const TensorView& centre, const TensorView& unit, bool exact,
                          const TensorView& labels, const std::optional<TensorView>& distance, const TensorView& counts,
                          const TensorView& row_codes, const TensorView& row_terms, const TensorView& products,
                          uintptr_t blas, uintptr_t stream) {
  const Expect expect(kOp, Device::kCuda);
  expect(x, "x", kFloats, {-1, -1});
  const int64_t N = x.sizes[0], F = x.sizes[1];
  expect(centroids, "centroids", kWideFloats, {-1, F});
  const int64_t K = centroids.sizes[0], padded = padded_groups(K);
  check_clusters(K);
  expect(products, "products", {DType::kFloat32}, {-1, -1, padded});
  const int64_t chunk = products.sizes[1], code_rows = row_codes.rank() == 2 ? row_codes.sizes[0] : 0;
  SX_CHECK(N == 0 || (chunk >= 1 && (N <= chunk || products.sizes[0] >= 2)), kOp,
           ": products must have two buffers of at least one row; got ", products.describe());
  SX_CHECK(N == 0 || code_rows >= N || (code_rows >= chunk && code_rows % chunk == 0), kOp,
           ": row codes must hold all rows or a multiple of ", chunk, "; got ", row_codes.describe());
  with_float(x.dtype, [&](auto row_value) {
    with_wide_float(centroids.dtype, [&](auto centroid_value) {
      using T = decltype(row_value);
      using C = decltype(centroid_value);
      KmeansChunksArgs<T, C> args;
      args.rows = quantize_args<T>(expect, x, centre, unit, exact, row_codes, row_terms);
      args.labels = rescore_args<T, C>(expect, x, centroids, terms, labels, distance, counts);
      expect(codes, "codes", {DType::kFloat16}, {padded, args.rows.padded_width});
      args.codes = codes.ptr<uint16_t>();
      args.chunk = chunk;
      args.code_rows = code_rows;
      args.products = products.ptr<float>();
      check_vectors(args.products, "products");
      args.blas = reinterpret_cast<void*>(blas);
      const py::gil_scoped_release no_gil;
      if constexpr (kHasCuda) kmeans_assign_cuda(args, x.device_index, reinterpret_cast<void*>(stream));
    });
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
  m.def("kmeans_rows_cuda", &kmeans_quantize_rows, py::arg("x"), py::arg("centre"), py::arg("unit"), py::arg("exact"),
        py::arg("codes"), py::arg("terms"), py::arg("stream"));
  m.def("kmeans_assign_cuda", &kmeans_assign_on_gpu, py::arg("x"), py::arg("centroids"), py::arg("codes"),
        py::arg("terms"), py::arg("centre"), py::arg("unit"), py::arg("exact"), py::arg("labels"),
        py::arg("distance").none(true), py::arg("counts"), py::arg("row_codes"), py::arg("row_terms"),
        py::arg("products"), py::arg("blas"), py::arg("stream"));
  m.def("kmeans_rescore_cuda", &kmeans_rescore, py::arg("products"), py::arg("x"), py::arg("centroids"),
        py::arg("terms"), py::arg("rows"), py::arg("labels"), py::arg("distance").none(true), py::arg("counts"),
        py::arg("stream"));
}

}  // namespace speechlm
