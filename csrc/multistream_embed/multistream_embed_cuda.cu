// multistream_embed on the GPU. Forward: a warp per row, ids in registers, 16-byte loads, one store. Backward: a radix
// sort of (table row, place), sums over fixed chunks of the sorted pairs, and a second pass that joins the runs which
// chunk borders cut, in order: no atomics on values, so the bits are the same every time.
#include "common/cub.cuh"
#include "common/cuda.cuh"
#include "common/small_float.h"
#include "common/vec.cuh"
#include "multistream_embed/multistream_embed.h"

namespace speechlm {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 128;  // sorted pairs that one block sums
constexpr unsigned kFull = 0xffffffffu;

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
    for (int64_t first = 0; first < num_vecs; first += 32) {     // the same rounds for all lanes, for the shuffles
      const int64_t v = first + lane;
      Acc acc[kVec];
      for (int i = 0; i < kVec; ++i) acc[i] = Acc{0};
      bool is_first = true;
      for (int s = 0; s < S; ++s) {
        const int64_t row = __shfl_sync(kFull, s < 32 ? low : high, s % 32);
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
      if (v < num_vecs) {
        Vec<T, kVec> out;
        for (int i = 0; i < kVec; ++i) narrow(acc[i], out.v[i]);
        reinterpret_cast<Vec<T, kVec>*>(a.out + n * a.shape.width)[v] = out;
      }
    }
  }
}

// Where the pieces of the workspace lie.
template <typename Acc>
struct Workspace {
  uint32_t* keys_in;
  uint32_t* keys;  // sorted table rows; pads and bad ids are V and come last
  uint32_t* places_in;
  uint32_t* places;  // n * S + s
  Acc* partials;     // [chunks, 2, D]: of the run that enters a chunk, and of the one that leaves it
  void* temp;
  size_t temp_bytes;
  int64_t chunks;

  static int64_t layout(void* base, const EmbedShape& shape, Workspace& w) {
    const int64_t M = shape.num_rows * shape.num_streams;
    char* at = static_cast<char*>(base);
    int64_t used = 0;
    const auto take = [&](int64_t bytes) {
      char* here = at + used;
      used += (bytes + 255) / 256 * 256;
      return static_cast<void*>(here);
    };
    w.chunks = (M + kChunk - 1) / kChunk;
    w.keys_in = static_cast<uint32_t*>(take(4 * M));
    w.keys = static_cast<uint32_t*>(take(4 * M));
    w.places_in = static_cast<uint32_t*>(take(4 * M));
    w.places = static_cast<uint32_t*>(take(4 * M));
    w.partials = static_cast<Acc*>(take(w.chunks * 2 * shape.width * static_cast<int64_t>(sizeof(Acc))));
    w.temp_bytes = 0;
    sort_pairs<uint32_t, uint32_t>(nullptr, w.temp_bytes, nullptr, nullptr, nullptr, nullptr, M, 0, 32, nullptr);
    w.temp = take(static_cast<int64_t>(w.temp_bytes));
    return used;
  }
};

template <typename T, typename Id>
__global__ void __launch_bounds__(kThreads)
    keys_kernel(const ScatterSumArgs<T, Id> a, uint32_t* keys, uint32_t* places) {
  const int64_t M = a.shape.num_rows * a.shape.num_streams;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < M; i += step) {
    const int64_t row = table_row(a.rule, a.shape.table_rows, a.ids[i], i % a.shape.num_streams);
    keys[i] = static_cast<uint32_t>(row >= 0 ? row : a.shape.table_rows);
    places[i] = static_cast<uint32_t>(i);
  }
}

// Block (c, d): the sorted pairs of chunk c, columns of tile d.
template <typename T, typename Id, int kVec>
__global__ void __launch_bounds__(kThreads)
    chunks_kernel(const ScatterSumArgs<T, Id> a, const Workspace<Accumulator<T>> w) {
  using Acc = Accumulator<T>;
  const int64_t M = a.shape.num_rows * a.shape.num_streams, D = a.shape.width, V = a.shape.table_rows;
  SX_SHARED(uint32_t, keys, kChunk + 2);  // with the neighbours on both sides
  SX_SHARED(uint32_t, places, kChunk);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunk;
  const int count = static_cast<int>(M - begin < kChunk ? M - begin : kChunk);
  const auto none = static_cast<uint32_t>(V);
  for (int i = static_cast<int>(threadIdx.x); i < kChunk + 2; i += kThreads) {
    const int64_t from = begin + i - 1;
    keys[i] = from >= 0 && from < M ? w.keys[from] : none;
    if (i < count) places[i] = w.places[begin + i];
  }
  __syncthreads();
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kVec;
  if (column >= D) return;
  Acc acc[kVec];
  bool starts_here = false;
  for (int i = 0; i < count; ++i) {
    const uint32_t key = keys[i + 1];
    if (key == none) break;
    const int64_t n = places[i] / a.shape.num_streams;
    const auto x = *reinterpret_cast<const Vec<T, kVec>*>(a.values + n * D + column);
    const Acc scale = a.rule.has_scale ? static_cast<Acc>(a.rule.scale[places[i] % a.shape.num_streams]) : Acc{1};
    const bool run_starts = keys[i] != key;
    const bool fresh = run_starts || i == 0;
    if (fresh) starts_here = run_starts;
    for (int e = 0; e < kVec; ++e) {
      const Acc value = scale * widen(x.v[e]);
      acc[e] = fresh ? value : acc[e] + value;
    }
    const bool ends_here = keys[i + 2] != key;
    if (!ends_here && i + 1 < count) continue;
    if (starts_here && ends_here) {
      Vec<T, kVec> out;
      for (int e = 0; e < kVec; ++e) narrow(acc[e], out.v[e]);
      *reinterpret_cast<Vec<T, kVec>*>(a.out + static_cast<int64_t>(key) * D + column) = out;
    } else {
      Acc* partial = w.partials + (static_cast<int64_t>(blockIdx.x) * 2 + (starts_here ? 1 : 0)) * D + column;
      for (int e = 0; e < kVec; ++e) partial[e] = acc[e];
    }
  }
}

// The run that leaves a chunk in which it starts, joined with its parts in the chunks behind.
template <typename T, typename Id>
__global__ void __launch_bounds__(kThreads)
    join_kernel(const ScatterSumArgs<T, Id> a, const Workspace<Accumulator<T>> w) {
  using Acc = Accumulator<T>;
  const int64_t M = a.shape.num_rows * a.shape.num_streams, D = a.shape.width;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunk;
  const int64_t end = begin + kChunk;
  if (end >= M) return;
  const uint32_t key = w.keys[end - 1];
  if (key == static_cast<uint32_t>(a.shape.table_rows) || w.keys[end] != key) return;
  // It started before this chunk if all of the chunk and the pair before it are of the same run.
  if (begin > 0 && w.keys[begin] == key && w.keys[begin - 1] == key) return;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (column >= D) return;
  Acc acc = w.partials[(static_cast<int64_t>(blockIdx.x) * 2 + 1) * D + column];
  for (int64_t c = blockIdx.x + 1; c < w.chunks && w.keys[c * kChunk] == key; ++c) {
    acc += w.partials[c * 2 * D + column];
  }
  narrow(acc, a.out[static_cast<int64_t>(key) * D + column]);
}

int bits_for(int64_t most) {
  int bits = 1;
  while (bits < 32 && (most >> bits) > 0) ++bits;
  return bits;
}

template <typename T>
bool can_load_vectors(const T* p, const T* q, int64_t width) {
  constexpr int kVec = 16 / sizeof(T);
  return width % kVec == 0 && is_aligned(p) && is_aligned(q);
}

void check_shape(const EmbedShape& shape) {
  SX_CHECK(shape.num_rows * shape.num_streams < (int64_t{1} << 31) && shape.table_rows < (int64_t{1} << 31),
           "multistream_embed: more than 2^31 ids or table rows at a time");
}

}  // namespace

template <typename T, typename Id>
void multistream_embed_cuda(const EmbedArgs<T, Id>& args, int device, void* stream) {
  if (args.shape.num_rows == 0 || args.shape.width == 0) return;
  check_shape(args.shape);
  const DeviceGuard guard(device);
  constexpr int kVec = 16 / sizeof(T);
  const bool fast = can_load_vectors(args.table, args.out, args.shape.width);
  const auto kernel = fast ? &embed_kernel<T, Id, kVec> : &embed_kernel<T, Id, 1>;
  SX_LAUNCH(kernel, grid_for(args.shape.num_rows, kThreads / 32), kThreads, 0, static_cast<cudaStream_t>(stream), args);
  cuda_check(cudaGetLastError(), "multistream_embed launch");
}

int64_t scatter_sum_workspace(const EmbedShape& shape, bool is_double) {
  check_shape(shape);
  if (is_double) {
    Workspace<double> w;
    return Workspace<double>::layout(nullptr, shape, w);
  }
  Workspace<float> w;
  return Workspace<float>::layout(nullptr, shape, w);
}

template <typename T, typename Id>
void scatter_sum_cuda(const ScatterSumArgs<T, Id>& args, int device, void* stream) {
  const int64_t M = args.shape.num_rows * args.shape.num_streams;
  if (M == 0 || args.shape.width == 0) return;
  check_shape(args.shape);
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  Workspace<Accumulator<T>> w;
  Workspace<Accumulator<T>>::layout(args.workspace, args.shape, w);
  const auto keys = &keys_kernel<T, Id>;
  SX_LAUNCH(keys, grid_for(M, kThreads), kThreads, 0, on, args, w.keys_in, w.places_in);
  sort_pairs(w.temp, w.temp_bytes, w.keys_in, w.keys, w.places_in, w.places, M, 0, bits_for(args.shape.table_rows), on);
  constexpr int kVec = 16 / sizeof(T);
  const bool fast = can_load_vectors(args.values, args.out, args.shape.width) && is_aligned(w.partials);
  const auto chunks = fast ? &chunks_kernel<T, Id, kVec> : &chunks_kernel<T, Id, 1>;
  const auto tiles = [&](int per_thread) {
    return static_cast<unsigned>((args.shape.width + kThreads * per_thread - 1) / (kThreads * per_thread));
  };
  const auto blocks = static_cast<unsigned>(w.chunks);
  SX_LAUNCH(chunks, dim3(blocks, tiles(fast ? kVec : 1)), kThreads, 0, on, args, w);
  const auto join = &join_kernel<T, Id>;
  SX_LAUNCH(join, dim3(blocks, tiles(1)), kThreads, 0, on, args, w);
  cuda_check(cudaGetLastError(), "scatter_sum launch");
}

#define SX_INSTANTIATE(T)                                                                     \
  template void multistream_embed_cuda<T, int32_t>(const EmbedArgs<T, int32_t>&, int, void*); \
  template void multistream_embed_cuda<T, int64_t>(const EmbedArgs<T, int64_t>&, int, void*); \
  template void scatter_sum_cuda<T, int32_t>(const ScatterSumArgs<T, int32_t>&, int, void*);  \
  template void scatter_sum_cuda<T, int64_t>(const ScatterSumArgs<T, int64_t>&, int, void*);
SX_INSTANTIATE(float)
SX_INSTANTIATE(double)
SX_INSTANTIATE(BFloat16)
SX_INSTANTIATE(Float16)
#undef SX_INSTANTIATE

}  // namespace speechlm
