// multistream_embed on the GPU: a warp per row, which finds the rows to add up first, has the loads of four of them
// under way before it adds the first, and stores once. Bytes that must move: every real id's row of the table, every
// feature, every row of the output, once each.
#include "common/cuda/vec.cuh"
#include "common/cuda/warp.cuh"
#include "common/tensor/small_float.h"
#include "multistream_embed/multistream_embed.h"

namespace speechlm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm = 3;
constexpr int kDepth = 4;    // rows whose loads are under way at the same time
constexpr int kColumns = 2;  // vectors of each that a lane loads

// -0: what can be added to any value, -0 among them, and leaves its bits.
template <typename T>
__device__ __forceinline__ T nothing() {
  T out;
  narrow(-Accumulator<T>{0}, out);
  return out;
}

// A row's vectors v, v + 32, ...; nothing where the row has none, or where there is no row.
template <typename T, int kVec, int kCount>
__device__ __forceinline__ void load(const Packed<T, kVec>* row, bool is_row, unsigned v, unsigned num_vecs,
                                     Packed<T, kVec> (&out)[kCount]) {
#pragma unroll
  for (unsigned c = 0; c < kCount; ++c) {
    out[c] = filled<T, kVec>(nothing<T>());
    if (is_row && v + 32 * c < num_vecs) out[c] = row[v + 32 * c];
  }
}

// sums += factor * vectors
template <bool kHasScale, typename T, int kVec>
__device__ __forceinline__ void add(Accumulator<T> (&sums)[kColumns][kVec], const Packed<T, kVec> (&vectors)[kColumns],
                                    Accumulator<T> factor) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const auto x = repacked<Vec<T, kVec>>(vectors[c]);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sums[c][i] += kHasScale ? factor * widen(x.v[i]) : widen(x.v[i]);
  }
}

template <typename T, typename Id, int kVec, bool kHasScale>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) embed_kernel(const EmbedArgs<T, Id> a) {
  using Acc = Accumulator<T>;
  using V = Packed<T, kVec>;
  using Rows = Vec<int32_t, kDepth>;
  SX_SHARED(Rows, lists, kWarps * (kMaxStreams / kDepth));  // each warp's rows of the table, in their order; then -1
  SX_SHARED(Acc, scales, kHasScale ? kWarps * kMaxStreams : 1);
  const int S = static_cast<int>(a.shape.num_streams);
  const auto row_bytes = static_cast<uint32_t>(a.shape.width * static_cast<int64_t>(sizeof(T)));
  const auto num_vecs = static_cast<unsigned>(a.shape.width / kVec);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  Rows* const list = lists + warp * (kMaxStreams / kDepth);
  Acc* const scale = scales + (kHasScale ? warp * kMaxStreams : 0);
  const auto table_at = [&](int32_t row) {
    const uint64_t bytes = static_cast<uint64_t>(static_cast<uint32_t>(row)) * row_bytes;
    return reinterpret_cast<const V*>(reinterpret_cast<const char*>(a.table) + bytes);
  };
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + warp; n < a.shape.num_rows; n += step) {
    int count = 0;
#pragma unroll 1
    for (int first = 0; first < S; first += 32) {
      const int s = first + lane;
      int64_t row = s < S ? table_row(a.rule, a.shape.table_rows, a.ids[n * S + s], s) : -1;
      if (row == -2 && a.bad != nullptr) {
        atomicMin(reinterpret_cast<unsigned long long*>(a.bad), static_cast<unsigned long long>(n * S + s));
      }
      const unsigned real = __ballot_sync(kFullMask, row >= 0);
      const int place = count + __popc(real & ((1u << lane) - 1));
      if (row >= 0) {
        list[place / kDepth].v[place % kDepth] = static_cast<int32_t>(row);
        if (kHasScale) scale[place] = a.rule.has_scale ? static_cast<Acc>(a.rule.scale[s]) : Acc{1};
      }
      count += __popc(real);
    }
    if (lane < kDepth && (count + lane) / kDepth == count / kDepth && count < kMaxStreams) {
      list[count / kDepth].v[(count + lane) % kDepth] = -1;  // the rest of the last group
      if (kHasScale) scale[count + lane] = Acc{1};
    }
    __syncwarp();
    const int64_t slot = a.slots != nullptr ? a.slots[n] : -1;
    const V* feature = reinterpret_cast<const V*>(a.features + slot * a.shape.width);  // read if slot >= 0
    V* const out = reinterpret_cast<V*>(a.out + n * a.shape.width);
    if (count + (slot >= 0 ? 1 : 0) == 1 && (!kHasScale || count == 0)) {  // text, or a feature: a copy
      const V* from = count == 1 ? table_at(list[0].v[0]) : feature;
      for (unsigned v = lane; v < num_vecs; v += 32 * kDepth) {
        V x[kDepth];
        load<T, kVec>(from, true, v, num_vecs, x);
#pragma unroll
        for (unsigned j = 0; j < kDepth; ++j) {
          if (v + 32 * j < num_vecs) store_streaming(out + v + 32 * j, x[j]);
        }
      }
    } else {
      for (unsigned v = lane; v < num_vecs; v += 32 * kColumns) {
        Acc acc[kColumns][kVec];
        for (int c = 0; c < kColumns; ++c) {
          for (int i = 0; i < kVec; ++i) acc[c][i] = count > 0 || slot >= 0 ? -Acc{0} : Acc{0};
        }
        for (int done = 0; done < count; done += kDepth) {
          const Rows rows = list[done / kDepth];
          V x[kDepth][kColumns];
#pragma unroll
          for (int j = 0; j < kDepth; ++j) load<T, kVec>(table_at(rows.v[j]), rows.v[j] >= 0, v, num_vecs, x[j]);
#pragma unroll
          for (int j = 0; j < kDepth; ++j) add<kHasScale, T, kVec>(acc, x[j], kHasScale ? scale[done + j] : Acc{1});
        }
        if (slot >= 0) {
          V x[kColumns];
          load<T, kVec>(feature, true, v, num_vecs, x);
          add<false, T, kVec>(acc, x, Acc{1});
        }
        for (int c = 0; c < kColumns; ++c) {
          if (v + 32 * c < num_vecs) store_streaming(out + v + 32 * c, repacked<V>(rounded<T, kVec>(acc[c])));
        }
      }
    }
    __syncwarp();  // the list is read
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
  SX_CHECK(args.shape.width * static_cast<int64_t>(sizeof(T)) < (int64_t{1} << 32),
           "multistream_embed: a row of the table of 4 GiB or more");
  constexpr int kVec = 16 / sizeof(T);
  const bool fast = args.shape.width % kVec == 0 && is_aligned(args.table) && is_aligned(args.out) &&
                    is_aligned(args.features);  // null is aligned
  const auto vectors = args.rule.has_scale ? &embed_kernel<T, Id, kVec, true> : &embed_kernel<T, Id, kVec, false>;
  const auto kernel = fast ? vectors : &embed_kernel<T, Id, 1, true>;
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
