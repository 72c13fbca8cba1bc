// delay_pack on the GPU: one pass, one thread per (row, stream) element of the block. A thread block owns a run of
// rows, finds their segments between two binary searches, and every element is stored at its row as id and at the
// row before as label, so ids and weights are read once. Bytes per id: 12 read, 20 written (int64 ids).
#include "common/cuda/cuda.cuh"
#include "delay_pack/delay_pack.h"
#include "delay_pack/segment.h"

namespace speechlm {
namespace {

constexpr int kThreads = 256;
constexpr int kTileElements = 2048;

template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads) delay_pack_kernel(const DelayPackArgs<In, Out> a, const int tile_rows) {
  const DelayPackShape& shape = a.shape;
  const int S = static_cast<int>(shape.num_streams);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; j <= shape.num_sequences; j += step) {
    a.out_cu_seqlens[j] = static_cast<int32_t>(sequence_row(a.meta, shape.tail, j));
  }
  const int64_t num_tiles = ceil_div(shape.num_rows, tile_rows);
  for (int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const int64_t row0 = tile * tile_rows;
    const int64_t left = shape.num_rows - row0;
    const int rows = left < tile_rows ? static_cast<int>(left) : tile_rows;
    const int64_t seg_lo = find_segment(a.meta, shape.tail, row0, 0, shape.num_segments);
    const int64_t seg_hi = find_segment(a.meta, shape.tail, row0 + rows - 1, seg_lo, shape.num_segments) + 1;
    PackSegment seg = segment_at(a.meta, shape, seg_lo);
    for (int e = threadIdx.x; e < rows * S; e += blockDim.x) {
      const int r = e / S;
      const int s = e - r * S;
      const int64_t row = row0 + r;
      if (row >= seg.row + seg.rows) {  // a thread's rows only rise
        seg = segment_at(a.meta, shape, find_segment(a.meta, shape.tail, row, seg.index + 1, seg_hi));
      }
      const PackElement x =
          element_at(a.meta, shape, seg, a.ids + seg.element, a.weight != nullptr ? a.weight + seg.element : nullptr,
                     a.fill_weight, row - seg.row, s);
      const int64_t to = row * S + s;
      const Out id = static_cast<Out>(x.id);
      a.out_ids[to] = id;
      if (row > seg.sequence_row) {
        a.out_labels[to - S] = id;
        a.out_weight[to - S] = x.weight;
      }
      if (seg.last && row == seg.row + seg.rows - 1) {
        a.out_labels[to] = static_cast<Out>(a.meta.ends[s]);
        a.out_weight[to] = 0.0f;
      }
      if (a.out_stream_map != nullptr) a.out_stream_map[to] = x.frame;
      if (s == 0) {
        a.out_position[row] = static_cast<int32_t>(row - seg.sequence_row);
        if (a.out_segment_map != nullptr) a.out_segment_map[row] = static_cast<int32_t>(seg.index);
      }
      if (a.bad != nullptr && (x.bad || static_cast<int64_t>(id) != x.id)) atomicExch(a.bad, 1);
    }
  }
}

template <typename Id>
__global__ void __launch_bounds__(kThreads) delay_unpack_kernel(const DelayUnpackArgs<Id> a, const int tile_rows) {
  const int S = static_cast<int>(a.shape.num_streams);
  const int64_t num_tiles = ceil_div(a.shape.num_frames, tile_rows);
  for (int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const int64_t frame0 = tile * tile_rows;
    const int64_t left = a.shape.num_frames - frame0;
    const int frames = left < tile_rows ? static_cast<int>(left) : tile_rows;
    for (int e = threadIdx.x; e < frames * S; e += blockDim.x) {
      const int f = e / S;
      const int s = e - f * S;
      const int64_t frame = frame0 + f;
      int64_t i = 0;
      for (int64_t hi = a.shape.num_segments; hi - i > 1;) {
        const int64_t middle = i + (hi - i) / 2;
        if (a.out_offsets[middle] <= frame) {
          i = middle;
        } else {
          hi = middle;
        }
      }
      const int64_t row = frame - a.out_offsets[i] + a.cu_seqlens[i] + a.delays[s];
      a.out[frame * S + s] = a.ids[row * S + s];
    }
  }
}

int tile_rows_for(int64_t num_streams) { return static_cast<int>(kTileElements / num_streams); }

}  // namespace

template <typename In, typename Out>
void delay_pack_cuda(const DelayPackArgs<In, Out>& args, int device, void* stream) {
  const DeviceGuard guard(device);
  const int tile_rows = tile_rows_for(args.shape.num_streams);
  const auto kernel = delay_pack_kernel<In, Out>;
  SX_LAUNCH(kernel, grid_for(args.shape.num_rows, tile_rows), kThreads, 0, static_cast<cudaStream_t>(stream), args,
            tile_rows);
  cuda_check(cudaGetLastError(), "delay_pack launch");
}

template <typename Id>
void delay_unpack_cuda(const DelayUnpackArgs<Id>& args, int device, void* stream) {
  if (args.shape.num_frames == 0) return;
  const DeviceGuard guard(device);
  const int tile_rows = tile_rows_for(args.shape.num_streams);
  SX_LAUNCH(delay_unpack_kernel<Id>, grid_for(args.shape.num_frames, tile_rows), kThreads, 0,
            static_cast<cudaStream_t>(stream), args, tile_rows);
  cuda_check(cudaGetLastError(), "delay_unpack launch");
}

template void delay_pack_cuda<int32_t, int32_t>(const DelayPackArgs<int32_t, int32_t>&, int, void*);
template void delay_pack_cuda<int32_t, int64_t>(const DelayPackArgs<int32_t, int64_t>&, int, void*);
template void delay_pack_cuda<int64_t, int32_t>(const DelayPackArgs<int64_t, int32_t>&, int, void*);
template void delay_pack_cuda<int64_t, int64_t>(const DelayPackArgs<int64_t, int64_t>&, int, void*);
template void delay_unpack_cuda<int32_t>(const DelayUnpackArgs<int32_t>&, int, void*);
template void delay_unpack_cuda<int64_t>(const DelayUnpackArgs<int64_t>&, int, void*);

}  // namespace speechlm
