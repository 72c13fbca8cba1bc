// scatter_sum on the GPU: a radix sort of (table row, source), sums over fixed chunks of the sorted pairs, and passes
// that join, in order, the runs that chunk borders cut: no atomics on values, so the bits are the same every time.
// Chunks that lie inside one run are joined in fixed groups first, so that a run over C chunks takes C / kGroup + 2
// kGroup additions after one another and not C. A compact result has a row per run; a prefix sum over the runs' last
// pairs numbers them. A whole result is written once: the rows of the runs by the sums, the others with zeros.
#include "common/cuda/cub.cuh"
#include "common/cuda/cuda.cuh"
#include "common/cuda/vec.cuh"
#include "common/cuda/warp.cuh"
#include "common/tensor/small_float.h"
#include "scatter_sum/scatter_sum.h"

namespace speechlm {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 128;  // sorted pairs that one block sums
constexpr int kGroup = 64;   // chunks that are joined first where all are of one run
constexpr int kDepth = 8;    // rows of the values whose loads are under way at the same time

// What CUB needs for the sort and the prefix sum of `count` pairs. To ask it takes microseconds on the host, and a
// training step asks for the same number of pairs every time.
size_t cub_bytes(int device, uint32_t count) {
  struct Answer {
    int device = -1;
    uint32_t count = 0;
    size_t bytes = 0;
  };
  thread_local Answer last;
  if (last.device != device || last.count != count) {
    size_t sort = 0, scan = 0;
    sort_pairs<uint32_t, uint32_t>(nullptr, sort, nullptr, nullptr, nullptr, nullptr, count, 0, 32, nullptr);
    exclusive_sum<uint32_t, uint32_t>(nullptr, scan, nullptr, nullptr, count + 1, nullptr);
    last = {device, count, sort > scan ? sort : scan};
  }
  return last.bytes;
}

// The pieces of the workspace.
template <typename Acc>
struct Workspace {
  uint32_t* keys_in;  // after the sort: 1 where a run ends
  uint32_t* keys;     // sorted table rows; pads and bad ids are V and sort last
  uint32_t* sources_in;
  uint32_t* sources;  // see Source
  uint32_t* run;      // [N * S + 1] runs that end before each pair: the number of the pair's run; last: of all runs
  void* temp;         // CUB's; what follows is written later and lies in the same place
  size_t temp_bytes;
  Acc* partials;    // [chunks, 2, D]: of the run that enters a chunk, and of the one that leaves it
  Acc* group_sums;  // [groups, D]: of the run that fills a group and began before it
  int64_t chunks, groups;
  int64_t bytes;  // of all pieces

  Workspace(void* base, const EmbedShape& shape, int device) {
    const int64_t M = shape.num_rows * shape.num_streams;
    BumpAllocator memory(base);
    chunks = ceil_div(M, kChunk);
    groups = chunks / kGroup;  // the last chunks may be fewer than a group
    keys_in = memory.allocate<uint32_t>(M + 1);
    keys = memory.allocate<uint32_t>(M);
    sources_in = memory.allocate<uint32_t>(M);
    sources = memory.allocate<uint32_t>(M);
    run = memory.allocate<uint32_t>(M + 1);
    BumpAllocator before_sums = memory;
    temp_bytes = cub_bytes(device, static_cast<uint32_t>(M));
    temp = before_sums.allocate<char>(static_cast<int64_t>(temp_bytes));
    partials = memory.allocate<Acc>(chunks * 2 * shape.width);
    group_sums = memory.allocate<Acc>(groups * shape.width);
    bytes = memory.used() > before_sums.used() ? memory.used() : before_sums.used();
  }
};

// Where a pair's summand comes from, in 32 bits that are taken apart without a division: row n of the values above,
// stream s in the lowest bits. It fits, as N * S < 2^31 and 2^bits < 2 S.
struct Source {
  int bits;

  explicit Source(int64_t num_streams) : bits(0) {
    while ((int64_t{1} << bits) < num_streams) ++bits;
  }
  __device__ uint32_t pack(uint32_t n, uint32_t s) const { return n << bits | s; }
  __device__ uint32_t row(uint32_t source) const { return source >> bits; }
  __device__ uint32_t stream(uint32_t source) const { return source & ((1u << bits) - 1); }
};

// Indices of pairs have 32 bits: M < 2^31, and a step of the whole grid is at most 2^28.
template <typename Id>
__global__ void __launch_bounds__(kThreads) keys_kernel(const EmbedShape shape, const EmbedRule rule, const Id* ids,
                                                        const Source source, uint32_t* keys, uint32_t* sources) {
  const auto S = static_cast<uint32_t>(shape.num_streams);
  const auto M = static_cast<uint32_t>(shape.num_rows) * S;
  const uint32_t step = gridDim.x * kThreads;
#pragma unroll 1
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < M; i += step) {
    const uint32_t n = i / S, s = i - n * S;
    const int64_t row = table_row(rule, shape.table_rows, ids[i], s);
    keys[i] = static_cast<uint32_t>(row >= 0 ? row : shape.table_rows);
    sources[i] = source.pack(n, s);
  }
}

// ends[i] = 1 where a run ends, over M + 1 elements.
__global__ void __launch_bounds__(kThreads)
    ends_kernel(const uint32_t* keys, uint32_t M, uint32_t none, uint32_t* ends) {
  const uint32_t step = gridDim.x * kThreads;
#pragma unroll 1
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i <= M; i += step) {
    ends[i] = i < M && keys[i] != none && (i + 1 == M || keys[i + 1] != keys[i]) ? 1u : 0u;
  }
}

__global__ void touched_kernel(const uint32_t* last_run, int64_t* touched) { *touched = *last_run; }

// The table row of each run.
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const uint32_t* keys, const uint32_t* run, uint32_t M, int64_t* rows) {
  const uint32_t step = gridDim.x * kThreads;
#pragma unroll 1
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < M; i += step) {
    if (run[i + 1] != run[i]) rows[run[i]] = keys[i];
  }
}

// Zeros in the rows of the table that have no run: a warp looks up 32 rows, one in each lane, and writes them together.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    gaps_kernel(const uint32_t* keys, uint32_t M, int64_t table_rows, int64_t width, T* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  for (int64_t first = warp * 32; first < table_rows; first += step) {
    const int64_t row = first + lane;
    uint32_t low = 0, high = M;  // the first pair whose key is not below the row
    while (low < high) {
      const uint32_t middle = (low + high) / 2;
      if (keys[middle] < row) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    const bool is_gap = row < table_rows && (low == M || keys[low] != row);
    const auto num_vecs = static_cast<unsigned>(width / kVec);
    for (unsigned gaps = __ballot_sync(kFullMask, is_gap); gaps != 0; gaps &= gaps - 1) {
      auto* to = reinterpret_cast<Packed<T, kVec>*>(out + (first + __ffs(static_cast<int>(gaps)) - 1) * width);
      for (unsigned v = lane; v < num_vecs; v += 32) store_streaming(to + v, filled<T, kVec>(T{}));
    }
  }
}

// Block (c, d): the sorted pairs of chunk c, columns of tile d. A thread has kVec columns; the block has as many
// threads as there are columns for, up to kThreads.
template <typename T, int kVec, bool kHasScale>
__global__ void __launch_bounds__(kThreads)
    chunks_kernel(const ScatterSumArgs<T> a, const Workspace<Accumulator<T>> w, const Source source) {
  using Acc = Accumulator<T>;
  using V = Packed<T, kVec>;
  const auto M = static_cast<uint32_t>(a.shape.num_rows * a.shape.num_streams);
  const int64_t D = a.shape.width;
  SX_SHARED(uint32_t, keys, kChunk + 2);  // with the neighbours on both sides
  SX_SHARED(uint32_t, rows, kChunk);      // of the values
  SX_SHARED(Acc, scales, kHasScale ? kChunk : 1);
  const uint32_t begin = blockIdx.x * kChunk;
  const auto none = static_cast<uint32_t>(a.shape.table_rows);
  for (uint32_t i = threadIdx.x; i < kChunk + 2; i += blockDim.x) {
    const uint32_t from = begin + i - 1;  // wraps before the first pair
    keys[i] = from < M ? w.keys[from] : none;
    if (i >= kChunk) continue;
    const uint32_t packed = begin + i < M ? w.sources[begin + i] : 0;
    rows[i] = source.row(packed);
    if (kHasScale) scales[i] = static_cast<Acc>(a.rule.scale[source.stream(packed)]);
  }
  __syncthreads();
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kVec;
  if (column >= D) return;
  const auto row_bytes = static_cast<uint32_t>(D * static_cast<int64_t>(sizeof(T)));
  const char* const values = reinterpret_cast<const char*>(a.values + column);
  Acc acc[kVec] = {};
  bool starts_here = false;
  uint32_t before = keys[0];
  for (int first = 0; first < kChunk && keys[first + 1] != none; first += kDepth) {
    V x[kDepth];
#pragma unroll
    for (int j = 0; j < kDepth; ++j) {
      x[j] = filled<T, kVec>(T{});
      const char* row = values + static_cast<uint64_t>(rows[first + j]) * row_bytes;
      if (keys[first + j + 1] != none) x[j] = *reinterpret_cast<const V*>(row);
    }
#pragma unroll
    for (int j = 0; j < kDepth; ++j) {
      const int i = first + j;
      const uint32_t key = keys[i + 1];
      if (key == none) break;
      const bool run_starts = before != key;
      const bool fresh = run_starts || i == 0;
      if (fresh) starts_here = run_starts;
      before = key;
      const auto value = repacked<Vec<T, kVec>>(x[j]);
      for (int e = 0; e < kVec; ++e) {
        const Acc summand = kHasScale ? scales[i] * widen(value.v[e]) : widen(value.v[e]);
        acc[e] = fresh ? summand : acc[e] + summand;
      }
      const bool ends_here = keys[i + 2] != key;
      if (!ends_here && i + 1 < kChunk) continue;
      if (starts_here && ends_here) {
        const int64_t row = a.rows != nullptr ? w.run[begin + i] : key;
        *reinterpret_cast<V*>(a.out + row * D + column) = repacked<V>(rounded<T, kVec>(acc));
      } else {
        Acc* partial = w.partials + (static_cast<int64_t>(blockIdx.x) * 2 + (starts_here ? 1 : 0)) * D + column;
        for (int e = 0; e < kVec; ++e) partial[e] = acc[e];
      }
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
  return is_double ? Workspace<double>(nullptr, shape, device).bytes : Workspace<float>(nullptr, shape, device).bytes;
}

template <typename Id>
void sort_pairs_cuda(const EmbedShape& shape, const EmbedRule& rule, const Id* ids, void* workspace, int64_t* touched,
                     int device, void* stream) {
  if (shape.num_rows * shape.num_streams == 0) return;
  check_shape(shape);
  const auto M = static_cast<uint32_t>(shape.num_rows * shape.num_streams);
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const Workspace<float> w(workspace, shape, device);
  SX_LAUNCH(keys_kernel<Id>, grid_for(M, kThreads), kThreads, 0, on, shape, rule, ids, Source(shape.num_streams),
            w.keys_in, w.sources_in);
  size_t temp_bytes = w.temp_bytes;
  sort_pairs(w.temp, temp_bytes, w.keys_in, w.keys, w.sources_in, w.sources, M, 0, bits_for(shape.table_rows), on);
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
  const int64_t D = args.shape.width;
  if (args.shape.num_rows * args.shape.num_streams == 0) return;
  check_shape(args.shape);
  SX_CHECK(D * static_cast<int64_t>(sizeof(T)) < (int64_t{1} << 32), "scatter_sum: rows of 4 GiB or more");
  const auto M = static_cast<uint32_t>(args.shape.num_rows * args.shape.num_streams);
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const Workspace<Accumulator<T>> w(workspace, args.shape, device);
  if (args.rows != nullptr) {
    SX_LAUNCH(rows_kernel, grid_for(M, kThreads), kThreads, 0, on, w.keys, w.run, M, args.rows);
  }
  if (D > 0) {
    constexpr int kVec = 16 / sizeof(T);
    const bool fast = D % kVec == 0 && is_aligned(args.values) && is_aligned(args.out) && is_aligned(w.partials);
    const auto vectors = args.rule.has_scale ? &chunks_kernel<T, kVec, true> : &chunks_kernel<T, kVec, false>;
    const auto single = args.rule.has_scale ? &chunks_kernel<T, 1, true> : &chunks_kernel<T, 1, false>;
    const auto chunks = fast ? vectors : single;
    const int64_t columns = ceil_div(D, fast ? kVec : 1);
    const auto threads = static_cast<unsigned>(round_up(columns < kThreads ? columns : kThreads, 32));
    const auto tiles = [](int64_t items, int64_t each) { return static_cast<unsigned>(ceil_div(items, each)); };
    const auto blocks = static_cast<unsigned>(w.chunks);
    SX_LAUNCH(chunks, dim3(blocks, tiles(columns, threads)), threads, 0, on, args, w, Source(args.shape.num_streams));
    if (w.groups > 1) {
      const dim3 grid(static_cast<unsigned>(w.groups), tiles(D, kThreads));
      SX_LAUNCH(groups_kernel<T>, grid, kThreads, 0, on, args, w);
    }
    SX_LAUNCH(join_kernel<T>, dim3(blocks, tiles(D, kThreads)), kThreads, 0, on, args, w);
    if (args.rows == nullptr) {
      const auto gaps = fast ? &gaps_kernel<T, kVec> : &gaps_kernel<T, 1>;
      SX_LAUNCH(gaps, grid_for(args.shape.table_rows, kThreads), kThreads, 0, on, w.keys, M, args.shape.table_rows, D,
                args.out);
    }
  }
  cuda_check(cudaGetLastError(), "scatter_sum launch");
}

template void sort_pairs_cuda(const EmbedShape&, const EmbedRule&, const int32_t*, void*, int64_t*, int, void*);
template void sort_pairs_cuda(const EmbedShape&, const EmbedRule&, const int64_t*, void*, int64_t*, int, void*);
#define SX_INSTANTIATE(T) template void scatter_sum_cuda(const ScatterSumArgs<T>&, void*, int, void*);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
