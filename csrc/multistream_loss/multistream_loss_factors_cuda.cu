// The factorised softmax's part that is the same for all rows: exp(b - top) of every stream with a bias, and whether
// its range allows it (see kMaxBiasRange). Only the device knows the values, so it decides.
#include "common/cuda/warp.cuh"
#include "multistream_loss/loss_kernels.cuh"

namespace speechlm {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// Block k: stream k.
template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    factors_kernel(const Acc* biases, int64_t num_columns, const LossTable table, const LossWorkspace<Acc> w) {
  SX_SHARED(Acc, tops, kWarps);
  SX_SHARED(int, wide, kWarps);
  const auto thread = static_cast<int>(threadIdx.x);
  const LossStream& s = table.streams[blockIdx.x];
  if (s.bias < 0) {
    if (thread == 0) {
      w.tops[blockIdx.x] = 0;
      w.is_narrow[blockIdx.x] = 1;
    }
    return;
  }
  const Acc* bias = biases + s.bias * num_columns;
  const PlacedSlice* slices = table.slices + s.first_slice;
  Acc top = static_cast<Acc>(-INFINITY);
  for (int64_t i = 0; i < s.num_slices; ++i) {
    for (int64_t j = thread; j < slices[i].count; j += kThreads) {
      const Acc b = bias[slices[i].begin + j];
      if (b > top) top = b;
    }
  }
  top = warp_reduce(top, [](Acc x, Acc y) { return x > y ? x : y; });
  if (thread % 32 == 0) tops[thread / 32] = top;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) top = tops[i] > top ? tops[i] : top;
  const Acc least = top - static_cast<Acc>(kMaxBiasRange);
  bool is_wide = false;
  for (int64_t i = 0; i < s.num_slices; ++i) {
    for (int64_t j = thread; j < slices[i].count; j += kThreads) {
      const int64_t column = slices[i].begin + j;
      is_wide = is_wide || !(bias[column] >= least);  // also for a NaN
      w.factors[s.bias * num_columns + column] = exponential(bias[column] - top);
    }
  }
  const unsigned any = __ballot_sync(kFullMask, is_wide);
  if (thread % 32 == 0) wide[thread / 32] = any != 0 ? 1 : 0;
  __syncthreads();
  if (thread != 0) return;
  for (int i = 0; i < kWarps; ++i) is_wide = is_wide || wide[i] != 0;
  w.tops[blockIdx.x] = top;
  w.is_narrow[blockIdx.x] = !is_wide && top - top == 0 ? 1 : 0;
}

}  // namespace

template <typename T>
void launch_factors(const LossRowsArgs<T>& args, const LossTable& table, const LossWorkspace<Accumulator<T>>& w,
                    cudaStream_t stream) {
  SX_LAUNCH(factors_kernel<Accumulator<T>>, static_cast<unsigned>(args.num_streams), kThreads, 0, stream, args.bias,
            args.num_columns, table, w);
  cuda_check(cudaGetLastError(), "multistream_loss: launch of the factors");
}

#define SX_INSTANTIATE(T)                                                                                         \
  template void launch_factors<T>(const LossRowsArgs<T>&, const LossTable&, const LossWorkspace<Accumulator<T>>&, \
                                  cudaStream_t);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
