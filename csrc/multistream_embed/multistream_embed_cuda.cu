// multistream_embed on the GPU: a warp per row, ids in registers, 16-byte loads, one store. Bytes that must move: every
// real id's row of the table, every feature, every row of the output, once each.
#include "common/cuda/vec.cuh"
#include "common/cuda/warp.cuh"
#include "common/tensor/small_float.h"
#include "multistream_embed/multistream_embed.h"

namespace speechlm {
namespace {

constexpr int kThreads = 256;

template <typename T, typename Id, int kVec>
__global__ void __launch_bounds__(kThreads, 4) embed_kernel(const EmbedArgs<T, Id> a) {
  using Acc = Accumulator<T>;
  const int S = static_cast<int>(a.shape.num_streams);
  const int64_t num_vecs = a.shape.width / kVec;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; n < a.shape.num_rows;
       n += warps) {
    const auto row_of = [&](int s) -> int64_t {
      if (s >= S) return -1;
      const int64_t row = table_row(a.rule, a.shape.table_rows, a.ids[n * S + s], s);
      if (row == -2 && a.bad != nullptr) {
        atomicMin(reinterpret_cast<unsigned long long*>(a.bad), static_cast<unsigned long long>(n * S + s));
      }
      return row;
    };
    const int64_t low = row_of(lane), high = row_of(lane + 32);  // an array would live in memory
    const int64_t slot = a.slots != nullptr ? a.slots[n] : -1;
    for (int64_t first = 0; first < num_vecs; first += 32) {  // the same rounds for all lanes, for the shuffles
      const int64_t v = first + lane;
      Acc acc[kVec];
      for (int i = 0; i < kVec; ++i) acc[i] = Acc{0};
      bool is_first = true;
      for (int s = 0; s < S; ++s) {
        const int64_t row = __shfl_sync(kFullMask, s < 32 ? low : high, s % 32);
        if (row < 0) continue;
        if (v < num_vecs) {
          const auto x = reinterpret_cast<const Vec<T, kVec>*>(a.table + row * a.shape.width)[v];
          const Acc scale = a.rule.has_scale ? static_cast<Acc>(a.rule.scale[s]) : Acc{1};
          for (int i = 0; i < kVec; ++i) {
            const Acc value = scale * widen(x.v[i]);
            acc[i] = is_first ? value : acc[i] + value;
          }
        }
        is_first = false;
      }
      if (slot >= 0 && v < num_vecs) {
        const auto x = reinterpret_cast<const Vec<T, kVec>*>(a.features + slot * a.shape.width)[v];
        for (int i = 0; i < kVec; ++i) acc[i] = is_first ? widen(x.v[i]) : acc[i] + widen(x.v[i]);
      }
      if (v < num_vecs) {
        Vec<T, kVec> out;
        for (int i = 0; i < kVec; ++i) narrow(acc[i], out.v[i]);
        reinterpret_cast<Vec<T, kVec>*>(a.out + n * a.shape.width)[v] = out;
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) slots_kernel(const FeaturePlaces p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t m = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; m < p.num_features; m += step) {
    const int64_t n = p.positions[m];
    const bool is_row = n >= 0 && n < p.num_rows;
    // The largest wins, so that two of one position give the same result in every run.
    const int before = is_row ? atomicMax(&p.slots[n], static_cast<int>(m)) : -1;
    if (p.bad != nullptr && (!is_row || before >= 0)) {
      atomicExch(reinterpret_cast<unsigned long long*>(p.bad), ~0ULL);  // -1; several threads may find one
    }
  }
}

}  // namespace

template <typename T, typename Id>
void multistream_embed_cuda(const EmbedArgs<T, Id>& args, int device, void* stream) {
  if (args.shape.num_rows == 0 || args.shape.width == 0) return;
  SX_CHECK(
      args.shape.num_rows * args.shape.num_streams < (int64_t{1} << 31) && args.shape.table_rows < (int64_t{1} << 31),
      "multistream_embed: more than 2^31 ids or table rows at a time");
  const DeviceGuard guard(device);
  constexpr int kVec = 16 / sizeof(T);
  const bool fast = args.shape.width % kVec == 0 && is_aligned(args.table) && is_aligned(args.out) &&
                    is_aligned(args.features);  // null is aligned
  const auto kernel = fast ? &embed_kernel<T, Id, kVec> : &embed_kernel<T, Id, 1>;
  SX_LAUNCH(kernel, grid_for(args.shape.num_rows, kThreads / 32), kThreads, 0, static_cast<cudaStream_t>(stream), args);
  cuda_check(cudaGetLastError(), "multistream_embed launch");
}

void scatter_slots_cuda(const FeaturePlaces& places, int device, void* stream) {
  if (places.num_features == 0) return;
  const DeviceGuard guard(device);
  SX_LAUNCH(slots_kernel, grid_for(places.num_features, kThreads), kThreads, 0, static_cast<cudaStream_t>(stream),
            places);
  cuda_check(cudaGetLastError(), "multistream_embed: launch for the features");
}

#define SX_INSTANTIATE(T)                                                                     \
  template void multistream_embed_cuda<T, int32_t>(const EmbedArgs<T, int32_t>&, int, void*); \
  template void multistream_embed_cuda<T, int64_t>(const EmbedArgs<T, int64_t>&, int, void*);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
