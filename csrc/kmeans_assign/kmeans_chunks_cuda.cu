// kmeans_assign on the GPU: rows to codes, then chunk by chunk the product of the codes and the labels. There are two
// buffers of products: the next chunk's product runs while a chunk's labels are found, on a second stream. Bytes that
// must move: the rows and the centroids' codes once; products should stay in the second-level cache.
#include <algorithm>

#include "common/cuda/cublas.h"
#include "common/cuda/side_stream.cuh"
#include "kmeans_assign/kmeans_assign.h"

namespace speechlm {

template <typename T, typename C>
void kmeans_assign_cuda(const KmeansChunksArgs<T, C>& a, int device, void* stream) {
  const int64_t num_rows = a.rows.num_rows, padded = padded_groups(a.labels.num_clusters), width = a.rows.padded_width;
  if (num_rows == 0) return;
  const DeviceGuard guard(device);
  SideStream streams(device, static_cast<cudaStream_t>(stream), num_rows > a.chunk);
  // Events: of each buffer, that its products are there, and that they have been read.
  constexpr int kWritten = 0, kRead = 2;
  int64_t chunks = 0;
  for (int64_t begin = 0; begin < num_rows; begin += a.code_rows) {
    const int64_t end = std::min(begin + a.code_rows, num_rows);
    KmeansQuantizeArgs<T> rows = a.rows;
    rows.num_rows = end - begin;
    rows.x += begin * rows.width;
    rows.terms += begin;  // of all rows, as the side stream reads those of earlier chunks meanwhile
    kmeans_quantize_rows_cuda(rows, device, stream);
    for (int64_t first = begin; first < end; first += a.chunk, ++chunks) {
      const auto buffer = static_cast<int>(chunks % 2);
      KmeansRescoreArgs<T, C> labels = a.labels;
      labels.num_rows = std::min(a.chunk, end - first);
      float* products = a.products + buffer * a.chunk * padded;
      labels.products = products;
      labels.x += first * labels.width;
      labels.rows = a.rows.terms + first;
      labels.labels += first;
      if (labels.distance != nullptr) labels.distance += first;
      Product p;
      p.m = labels.num_rows, p.n = padded, p.k = width;
      p.a = a.rows.codes + (first - begin) * width, p.a_stride = width;
      p.b = a.codes, p.b_stride = width, p.is_b_transposed = true;
      p.c = products, p.c_stride = padded;
      if (chunks >= 2) streams.main_waits(kRead + buffer);
      multiply(p, a.blas, stream);
      streams.signal_main(kWritten + buffer);
      streams.side_waits(kWritten + buffer);
      kmeans_rescore_cuda(labels, device, streams.side());
      streams.signal_side(kRead + buffer);
    }
  }
  streams.join();
}

#define SX_INSTANTIATE(T)                                                                    \
  template void kmeans_assign_cuda<T, float>(const KmeansChunksArgs<T, float>&, int, void*); \
  template void kmeans_assign_cuda<T, double>(const KmeansChunksArgs<T, double>&, int, void*);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
