// delay_pack on the GPU: one pass, one thread per (row, stream) element of the block. A thread block owns a run of
// rows, finds their segments between two binary searches, and every element is stored at its row as id and at the
// row before as label, so ids and weights are read once. Bytes per id: 12 read, 20 written (int64 ids).
#include "common/cuda.cuh"
#include "delay_pack/delay_pack.h"

namespace speechlm {
namespace {

constexpr int kThreads = 256;
constexpr int kTileElements = 2048;

template <typename Id>
__global__ void __launch_bounds__(kThreads) delay_pack_kernel(const DelayPackArgs<Id> a, const int tile_rows) {
  const DelayPackShape& shape = a.shape;
  const int S = static_cast<int>(shape.num_streams);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i <= shape.num_segments; i += step) {
    a.out_cu_seqlens[i] = static_cast<int32_t>(a.meta.offsets[i] + i * shape.tail);
  }
  const int64_t num_tiles = (shape.num_rows + tile_rows - 1) / tile_rows;
  for (int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const int64_t row0 = tile * tile_rows;
    const int64_t left = shape.num_rows - row0;
    const int rows = left < tile_rows ? static_cast<int>(left) : tile_rows;
    const int64_t seg_lo = find_segment(a.meta.offsets, shape.tail, row0, 0, shape.num_segments);
    const int64_t seg_hi = find_segment(a.meta.offsets, shape.tail, row0 + rows - 1, seg_lo, shape.num_segments) + 1;
    for (int e = threadIdx.x; e < rows * S; e += blockDim.x) {
      const int r = e / S;
      const int s = e - r * S;
      const int64_t row = row0 + r;
      const int64_t i = find_segment(a.meta.offsets, shape.tail, row, seg_lo, seg_hi);
      const int64_t begin = a.meta.offsets[i];
      const int64_t length = a.meta.offsets[i + 1] - begin;
      const int64_t t = row - (begin + i * shape.tail);
      const int64_t frame = t - a.meta.delays[s];
      const bool real = frame >= 0 && frame < length;
      const int64_t from = (begin + frame) * S + s;
      const int64_t to = row * S + s;
      const Id pad = static_cast<Id>(a.meta.pad_ids[s]);
      const Id id = real ? wrapping_add(a.ids[from], a.meta.id_offsets[s]) : pad;
      a.out_ids[to] = id;
      if (t > 0) {
        a.out_labels[to - S] = id;
        a.out_weight[to - S] = !real ? 0.0f : (a.weight != nullptr ? a.weight[from] : 1.0f);
      }
      if (t == length + shape.tail - 1) {
        a.out_labels[to] = pad;
        a.out_weight[to] = 0.0f;
      }
      if (s == 0) a.out_position[row] = static_cast<int32_t>(t);
    }
  }
}

template <typename Id>
__global__ void __launch_bounds__(kThreads) delay_unpack_kernel(const DelayUnpackArgs<Id> a, const int tile_rows) {
  const int S = static_cast<int>(a.shape.num_streams);
  const int64_t num_tiles = (a.shape.num_frames + tile_rows - 1) / tile_rows;
  for (int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const int64_t frame0 = tile * tile_rows;
    const int64_t left = a.shape.num_frames - frame0;
    const int frames = left < tile_rows ? static_cast<int>(left) : tile_rows;
    const int64_t seg_lo = find_segment(a.out_offsets, 0, frame0, 0, a.shape.num_segments);
    const int64_t seg_hi = find_segment(a.out_offsets, 0, frame0 + frames - 1, seg_lo, a.shape.num_segments) + 1;
    for (int e = threadIdx.x; e < frames * S; e += blockDim.x) {
      const int f = e / S;
      const int s = e - f * S;
      const int64_t frame = frame0 + f;
      const int64_t i = find_segment(a.out_offsets, 0, frame, seg_lo, seg_hi);
      const int64_t row = frame - a.out_offsets[i] + a.cu_seqlens[i] + a.delays[s];
      a.out[frame * S + s] = a.ids[row * S + s];
    }
  }
}

int tile_rows_for(int64_t num_streams) {
  SX_CHECK(num_streams <= (1 << 20), "delay_pack: at most 2^20 streams on CUDA; got ", num_streams);
  return num_streams >= kTileElements ? 1 : static_cast<int>(kTileElements / num_streams);
}

}  // namespace

template <typename Id>
void delay_pack_cuda(const DelayPackArgs<Id>& args, int device, void* stream) {
  const DeviceGuard guard(device);
  const int tile_rows = tile_rows_for(args.shape.num_streams);
  SX_LAUNCH(delay_pack_kernel<Id>, grid_for(args.shape.num_rows, tile_rows), kThreads, 0,
            static_cast<cudaStream_t>(stream), args, tile_rows);
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

template void delay_pack_cuda<int32_t>(const DelayPackArgs<int32_t>&, int, void*);
template void delay_pack_cuda<int64_t>(const DelayPackArgs<int64_t>&, int, void*);
template void delay_unpack_cuda<int32_t>(const DelayUnpackArgs<int32_t>&, int, void*);
template void delay_unpack_cuda<int64_t>(const DelayUnpackArgs<int64_t>&, int, void*);

}  // namespace speechlm
