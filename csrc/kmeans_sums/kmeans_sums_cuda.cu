// Sums of each cluster's rows on the GPU: a block takes a piece of the rows in the order of their labels and a thread a
// column of them; a thread adds up a run of equal labels and then adds that to the cluster's sum. The atomic additions
// are exact, so their order changes nothing. Bytes that must move: the rows once.
#include "common/cuda/cuda.cuh"
#include "kmeans_sums/kmeans_sums.h"

namespace speechlm {
namespace {

constexpr int kThreads = 128;      // columns
constexpr int kPiece = kThreads;   // rows, one for each thread to look up
constexpr int kLoadsInFlight = 8;  // independent loads per thread

template <typename T>
// Eight blocks per multiprocessor: by itself the compiler aims at more of them, and spills.
__global__ void __launch_bounds__(kThreads, 8) sums_kernel(const KmeansSumsArgs<T> a, const int64_t* order) {
  // Of a piece, read by all threads together: else each group of rows would wait for its order, then for its values.
  SX_SHARED(int64_t, rows, kPiece);
  SX_SHARED(int32_t, labels, kPiece);
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  const bool has_column = column < a.width;
  const double offset = has_column ? a.offset[column] : 0, rounder = has_column ? a.step[column] * kRounder : 0;
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kPiece; begin < a.num_rows;
       begin += static_cast<int64_t>(gridDim.x) * kPiece) {
    __syncthreads();
    const int64_t mine = min(begin + threadIdx.x, a.num_rows - 1);
    rows[threadIdx.x] = order[mine];
    labels[threadIdx.x] = begin + threadIdx.x < a.num_rows ? a.labels[mine] : -1;
    __syncthreads();
    if (!has_column) continue;
    const auto count = static_cast<int>(min(static_cast<int64_t>(kPiece), a.num_rows - begin));
    int32_t cluster = -1;
    double sum = 0;
    for (int first = 0; first < count; first += kLoadsInFlight) {
      T value[kLoadsInFlight];
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; ++i) value[i] = a.x[rows[first + i] * a.width + column];
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; ++i) {
        const int32_t label = labels[first + i];
        if (label < 0 || label >= a.num_clusters) continue;
        if (label != cluster) {
          if (cluster >= 0) atomicAdd(a.sums + static_cast<int64_t>(cluster) * a.width + column, sum);
          cluster = label;
          sum = 0;
        }
        sum += ((static_cast<double>(widen(value[i])) - offset) + rounder) - rounder;
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
