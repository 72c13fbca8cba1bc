// scatter_sum on the GPU: a radix sort of (table row, place), sums over fixed chunks of the sorted pairs, and passes
// that join, in order, the runs that chunk borders cut: no atomics on values, so the bits are the same every time.
// Chunks that lie inside one run are joined in fixed groups first, so that a run over C chunks takes C / kGroup + 2
// kGroup additions after one another and not C. A compact result has a row per run; a prefix sum over the runs' last
// pairs numbers them.
#include "common/cuda/cub.cuh"
#include "common/cuda/cuda.cuh"
#include "common/cuda/vec.cuh"
#include "common/tensor/small_float.h"
#include "scatter_sum/scatter_sum.h"

namespace speechlm {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 128;  // sorted pairs that one block sums
constexpr int kGroup = 64;   // chunks that are joined first where all are of one run

// The pieces of the workspace.
template <typename Acc>
struct Workspace {
  uint32_t* keys_in;  // after the sort: 1 where a run ends
  uint32_t* keys;     // sorted table rows; pads and bad ids are V and sort last
  uint32_t* places_in;
  uint32_t* places;  // n * S + s
  uint32_t* run;     // [N * S + 1] runs that end before each pair: the number of the pair's run; last: of all runs
  void* temp;
  size_t temp_bytes;
  Acc* partials;    // [chunks, 2, D]: of the run that enters a chunk, and of the one that leaves it
  Acc* group_sums;  // [groups, D]: of the run that fills a group and began before it
  int64_t chunks, groups;
  int64_t bytes;  // of all pieces

  Workspace(void* base, const EmbedShape& shape) {
    const int64_t M = shape.num_rows * shape.num_streams;
    BumpAllocator memory(base);
    chunks = ceil_div(M, kChunk);
    keys_in = memory.allocate<uint32_t>(M + 1);
    keys = memory.allocate<uint32_t>(M);
    places_in = memory.allocate<uint32_t>(M);
    places = memory.allocate<uint32_t>(M);
    run = memory.allocate<uint32_t>(M + 1);
    size_t sort = 0, scan = 0;
    sort_pairs<uint32_t, uint32_t>(nullptr, sort, nullptr, nullptr, nullptr, nullptr, M, 0, 32, nullptr);
    exclusive_sum<uint32_t, uint32_t>(nullptr, scan, nullptr, nullptr, M + 1, nullptr);
    temp_bytes = sort > scan ? sort : scan;
    temp = memory.allocate<char>(static_cast<int64_t>(temp_bytes));
    // Last, so that the sort finds the rest without knowing their type.
    partials = memory.allocate<Acc>(chunks * 2 * shape.width);
    groups = chunks / kGroup;  // the last chunks may be fewer than a group
    group_sums = memory.allocate<Acc>(groups * shape.width);
    bytes = memory.used();
  }
};

template <typename Id>
__global__ void __launch_bounds__(kThreads)
    keys_kernel(const EmbedShape shape, const EmbedRule rule, const Id* ids, uint32_t* keys, uint32_t* places) {
  const int64_t M = shape.num_rows * shape.num_streams;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < M; i += step) {
    const int64_t row = table_row(rule, shape.table_rows, ids[i], i % shape.num_streams);
    keys[i] = static_cast<uint32_t>(row >= 0 ? row : shape.table_rows);
    places[i] = static_cast<uint32_t>(i);
  }
}

// ends[i] = 1 where a run ends, over M + 1 elements.
__global__ void __launch_bounds__(kThreads)
    ends_kernel(const uint32_t* keys, int64_t M, uint32_t none, uint32_t* ends) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i <= M; i += step) {
    ends[i] = i < M && keys[i] != none && (i + 1 == M || keys[i + 1] != keys[i]) ? 1u : 0u;
  }
}

__global__ void touched_kernel(const uint32_t* last_run, int64_t* touched) { *touched = *last_run; }

// The table row of each run.
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const uint32_t* keys, const uint32_t* run, int64_t M, int64_t* rows) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < M; i += step) {
    if (run[i + 1] != run[i]) rows[run[i]] = keys[i];
  }
}

// Block (c, d): the sorted pairs of chunk c, columns of tile d.
template <typename T, int kVec, bool kCompact>
__global__ void __launch_bounds__(kThreads)
    chunks_kernel(const ScatterSumArgs<T> a, const Workspace<Accumulator<T>> w) {
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
  Acc acc[kVec] = {};
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
      const int64_t row = kCompact ? w.run[begin + i] : key;
      *reinterpret_cast<Vec<T, kVec>*>(a.out + row * D + column) = out;
    } else {
      Acc* partial = w.partials + (static_cast<int64_t>(blockIdx.x) * 2 + (starts_here ? 1 : 0)) * D + column;
      for (int e = 0; e < kVec; ++e) partial[e] = acc[e];
    }
  }
}

// Whether all pairs of a group are of the run `key`.
template <typename Acc>
__device__ bool is_filled(const Workspace<Acc>& w, int64_t group, int64_t M, uint32_t key) {
  const int64_t begin = group * kGroup * kChunk, end = begin + kGroup * kChunk;
  return end <= M && w.keys[begin] == key && w.keys[end - 1] == key;
}

// The sum over a group of chunks that lie inside one run.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    groups_kernel(const ScatterSumArgs<T> a, const Workspace<Accumulator<T>> w) {
  using Acc = Accumulator<T>;
  const int64_t M = a.shape.num_rows * a.shape.num_streams, D = a.shape.width;
  const int64_t group = blockIdx.x;
  if (group == 0) return;  // no run began before it
  const uint32_t key = w.keys[group * kGroup * kChunk - 1];
  if (key == static_cast<uint32_t>(a.shape.table_rows) || !is_filled(w, group, M, key)) return;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (column >= D) return;
  const Acc* partial = w.partials + group * kGroup * 2 * D + column;
  Acc acc = partial[0];
  for (int c = 1; c < kGroup; ++c) acc += partial[c * 2 * D];
  w.group_sums[group * D + column] = acc;
}

// The run that leaves a chunk in which it starts, joined with its parts in the chunks behind.
template <typename T>
__global__ void __launch_bounds__(kThreads) join_kernel(const ScatterSumArgs<T> a, const Workspace<Accumulator<T>> w) {
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
  for (int64_t c = blockIdx.x + 1; c < w.chunks && w.keys[c * kChunk] == key;) {
    if (c % kGroup == 0 && is_filled(w, c / kGroup, M, key)) {
      acc += w.group_sums[c / kGroup * D + column];
      c += kGroup;
    } else {
      acc += w.partials[c * 2 * D + column];
      ++c;
    }
  }
  const int64_t row = a.rows != nullptr ? w.run[end - 1] : key;
  narrow(acc, a.out[row * D + column]);
}

int bits_for(int64_t largest) {
  int bits = 1;
  while (bits < 32 && (largest >> bits) > 0) ++bits;
  return bits;
}

void check_shape(const EmbedShape& shape) {
  SX_CHECK(shape.num_rows * shape.num_streams < (int64_t{1} << 31) && shape.table_rows < (int64_t{1} << 31),
           "scatter_sum: more than 2^31 ids or table rows at a time");
}

}  // namespace

int64_t scatter_sum_workspace(const EmbedShape& shape, bool is_double, int device) {
  check_shape(shape);
  const DeviceGuard guard(device);  // CUB's need depends on the device
  return is_double ? Workspace<double>(nullptr, shape).bytes : Workspace<float>(nullptr, shape).bytes;
}

template <typename Id>
void sort_pairs_cuda(const EmbedShape& shape, const EmbedRule& rule, const Id* ids, void* workspace, int64_t* touched,
                     int device, void* stream) {
  const int64_t M = shape.num_rows * shape.num_streams;
  if (M == 0) return;
  check_shape(shape);
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const Workspace<float> w(workspace, shape);
  SX_LAUNCH(keys_kernel<Id>, grid_for(M, kThreads), kThreads, 0, on, shape, rule, ids, w.keys_in, w.places_in);
  size_t temp_bytes = w.temp_bytes;
  sort_pairs(w.temp, temp_bytes, w.keys_in, w.keys, w.places_in, w.places, M, 0, bits_for(shape.table_rows), on);
  if (touched != nullptr) {
    const auto none = static_cast<uint32_t>(shape.table_rows);
    SX_LAUNCH(ends_kernel, grid_for(M + 1, kThreads), kThreads, 0, on, w.keys, M, none, w.keys_in);
    exclusive_sum(w.temp, temp_bytes, w.keys_in, w.run, M + 1, on);
    SX_LAUNCH(touched_kernel, 1u, 1u, 0, on, w.run + M, touched);
  }
  cuda_check(cudaGetLastError(), "scatter_sum: launch of the sort");
}

template <typename T>
void scatter_sum_cuda(const ScatterSumArgs<T>& args, void* workspace, int device, void* stream) {
  const int64_t M = args.shape.num_rows * args.shape.num_streams, D = args.shape.width;
  if (M == 0) return;
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const Workspace<Accumulator<T>> w(workspace, args.shape);
  if (args.rows != nullptr) {
    SX_LAUNCH(rows_kernel, grid_for(M, kThreads), kThreads, 0, on, w.keys, w.run, M, args.rows);
  }
  constexpr int kVec = 16 / sizeof(T);
  const bool fast = D % kVec == 0 && is_aligned(args.values) && is_aligned(args.out) && is_aligned(w.partials);
  const auto dense = fast ? &chunks_kernel<T, kVec, false> : &chunks_kernel<T, 1, false>;
  const auto compact = fast ? &chunks_kernel<T, kVec, true> : &chunks_kernel<T, 1, true>;
  const auto chunks = args.rows != nullptr ? compact : dense;
  const auto tiles = [&](int per_thread) { return static_cast<unsigned>(ceil_div(D, kThreads * per_thread)); };
  const auto blocks = static_cast<unsigned>(w.chunks);
  if (D > 0) {
    SX_LAUNCH(chunks, dim3(blocks, tiles(fast ? kVec : 1)), kThreads, 0, on, args, w);
    if (w.groups > 1) {
      SX_LAUNCH(groups_kernel<T>, dim3(static_cast<unsigned>(w.groups), tiles(1)), kThreads, 0, on, args, w);
    }
    SX_LAUNCH(join_kernel<T>, dim3(blocks, tiles(1)), kThreads, 0, on, args, w);
  }
  cuda_check(cudaGetLastError(), "scatter_sum launch");
}

template void sort_pairs_cuda(const EmbedShape&, const EmbedRule&, const int32_t*, void*, int64_t*, int, void*);
template void sort_pairs_cuda(const EmbedShape&, const EmbedRule&, const int64_t*, void*, int64_t*, int, void*);
#define SX_INSTANTIATE(T) template void scatter_sum_cuda(const ScatterSumArgs<T>&, void*, int, void*);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
