// Sums of each cluster's rows on the GPU: a block takes a piece of the rows in the order of their labels and a thread a
// column of them; a thread adds up a run of equal labels and then adds that to the cluster's sum. The atomic additions
// are exact, so their order changes nothing. Bytes that must move: the rows once.
#include "common/cuda/cuda.cuh"
#include "kmeans_assign/kmeans_sums.h"

namespace speechlm {
namespace {

constexpr int kThreads = 128;      // columns
constexpr int kPiece = 128;        // rows
constexpr int kLoadsInFlight = 8;  // independent loads per thread

template <typename T>
// Eight blocks per multiprocessor: by itself the compiler aims at more of them, and spills.
__global__ void __launch_bounds__(kThreads, 8) sums_kernel(const KmeansSumsArgs<T> a, const int64_t* order) {
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (column >= a.width) return;
  const double offset = a.offset[column], rounder = a.step[column] * kRounder;
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kPiece; begin < a.num_rows;
       begin += static_cast<int64_t>(gridDim.x) * kPiece) {
    const int64_t end = min(begin + kPiece, a.num_rows);
    int32_t cluster = -1;
    double sum = 0;
    for (int64_t first = begin; first < end; first += kLoadsInFlight) {
      int32_t label[kLoadsInFlight];
      double value[kLoadsInFlight];
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; ++i) {
        const int64_t n = order[min(first + i, end - 1)];
        label[i] = first + i < end ? a.labels[n] : -1;
        value[i] = static_cast<double>(widen(a.x[n * a.width + column]));
      }
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; ++i) {
        if (label[i] < 0 || label[i] >= a.num_clusters) continue;
        if (label[i] != cluster) {
          if (cluster >= 0) atomicAdd(a.sums + static_cast<int64_t>(cluster) * a.width + column, sum);
          cluster = label[i];
          sum = 0;
        }
        sum += ((value[i] - offset) + rounder) - rounder;
      }
    }
    if (cluster >= 0) atomicAdd(a.sums + static_cast<int64_t>(cluster) * a.width + column, sum);
  }
}

}  // namespace

template <typename T>
void kmeans_sums_cuda(const KmeansSumsArgs<T>& args, const int64_t* order, int device, void* stream) {
  if (args.num_rows == 0 || args.width == 0) return;
  const DeviceGuard guard(device);
  const dim3 grid(grid_for(args.num_rows, kPiece), static_cast<unsigned>(ceil_div(args.width, kThreads)));
  SX_LAUNCH(sums_kernel<T>, grid, kThreads, 0, static_cast<cudaStream_t>(stream), args, order);
  cuda_check(cudaGetLastError(), "kmeans_assign: launch of the sums");
}

#define SX_INSTANTIATE(T) template void kmeans_sums_cuda<T>(const KmeansSumsArgs<T>&, const int64_t*, int, void*);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
