// decode_attention on the GPU, in two kernels. A block takes kCudaSplit keys of one key/value head for up to kHeads of
// the query heads that share it: scores, their softmax, and the weighted sum of the values. The second kernel joins a
// head's splits in order. Lengths are read on the device; the grid covers the whole cache, and blocks past a request's
// keys return at once. Bytes that must move: every key and value that is attended to, once.
#include <limits>

#include "common/cuda/vec.cuh"
#include "common/cuda/warp.cuh"
#include "decode_layer/decode_layer.h"

namespace speechlm {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kInFlight = 4;  // loads of a thread
constexpr size_t kMaxShared = 48 * 1024;
constexpr int kSplitKeys = static_cast<int>(kCudaSplit);

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }

template <typename Acc>
struct Partials {
  int64_t num_splits;
  Acc* outs;     // [M, H, splits, F]
  Acc* largest;  // [M, H, splits]
  Acc* totals;   // [M, H, splits]
};

// How the threads of a block share keys and values.
struct SplitPlan {
  int lanes;         // of a key, a power of two up to 32
  int value_groups;  // groups of threads with different keys, 0: a value has more vectors than there are threads
  int head_groups;   // blocks that share a key/value head
};

// Scores of the block's keys, unscaled, in `scores` [kHeads, kSplitKeys].
template <typename T, int kHeads, int kVec>
__device__ inline void score_keys(const AttentionArgs<T>& a, const T* keys, int count, int lanes,
                                  const Accumulator<T>* query, Accumulator<T>* scores) {
  using Acc = Accumulator<T>;
  const int size = static_cast<int>(a.cache.key_size), num_vecs = size / kVec;
  const int thread = static_cast<int>(threadIdx.x), groups = kThreads / lanes, group = thread / lanes;
  // A key of more vectors than lanes takes several rounds.
  for (int first = 0; first == 0 || first < num_vecs; first += lanes) {
    const int v = first + thread % lanes;
    Acc q[kHeads][kVec];
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) q[i][j] = v < num_vecs ? query[i * size + v * kVec + j] : Acc{0};
    }
    for (int base = 0; base < count; base += kInFlight * groups) {  // the same rounds for all, for the shuffles
      Vec<T, kVec> x[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int key = base + u * groups + group;
        if (key < count && v < num_vecs) {
          x[u] = reinterpret_cast<const Vec<T, kVec>*>(keys + key * a.cache.key_row_stride)[v];
        } else {
#pragma unroll
          for (int j = 0; j < kVec; ++j) narrow(Acc{0}, x[u].v[j]);
        }
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int key = base + u * groups + group;
#pragma unroll
        for (int i = 0; i < kHeads; ++i) {
          Acc sum = Acc{0};
#pragma unroll
          for (int j = 0; j < kVec; ++j) sum += q[i][j] * widen(x[u].v[j]);
          for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kFullMask, sum, step);
          if (key < count && thread % lanes == 0) {
            Acc& score = scores[i * kSplitKeys + key];
            score = first == 0 ? sum : score + sum;
          }
        }
      }
    }
  }
}

// Scores become exp(score - largest); the same for all lanes of the warp.
template <typename T>
__device__ inline void weigh_keys(const AttentionArgs<T>& a, Accumulator<T>* scores, int count, Accumulator<T>& largest,
                                  Accumulator<T>& total) {
  using Acc = Accumulator<T>;
  constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const Acc scale = static_cast<Acc>(a.scale), softcap = static_cast<Acc>(a.softcap);
  largest = -kInfinity;
  for (int k = lane; k < count; k += 32) {
    Acc score = scores[k] * scale;
    if (softcap > Acc{0}) score = softcap * hyperbolic_tangent(score / softcap);
    scores[k] = score;
    largest = score > largest ? score : largest;  // what is no number shows in the sums
  }
  largest = warp_reduce(largest, [](Acc x, Acc y) { return y > x ? y : x; });
  // Without a finite score the weights are 0 here; merge_kernel decides whether another split has one.
  const Acc base = largest == -kInfinity ? Acc{0} : largest;
  total = Acc{0};
  for (int k = lane; k < count; k += 32) {
    const Acc weight = exponential(scores[k] - base);
    scores[k] = weight;
    total += weight;
  }
  total = warp_sum(total);
}

// sums = weights times values of one vector of columns, over keys first, first + step, ...
template <typename T, int kHeads, int kVec>
__device__ inline void add_values(const AttentionArgs<T>& a, const T* values, int column, int first, int step,
                                  int count, const Accumulator<T>* weights, Accumulator<T> (&sums)[kHeads][kVec]) {
  using Acc = Accumulator<T>;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) sums[i][j] = Acc{0};
  }
  for (int base = first; base < count; base += kInFlight * step) {
    Vec<T, kVec> x[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int key = base + u * step;
      if (key < count) x[u] = reinterpret_cast<const Vec<T, kVec>*>(values + key * a.cache.value_row_stride)[column];
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int key = base + u * step;
      if (key >= count) break;
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        const Acc weight = weights[i * kSplitKeys + key];
#pragma unroll
        for (int j = 0; j < kVec; ++j) sums[i][j] += weight * widen(x[u].v[j]);
      }
    }
  }
}

template <typename T, int kHeads, int kVec>
__global__ void __launch_bounds__(kThreads, kHeads <= 4 ? 4 : 2)
    split_kernel(const AttentionArgs<T> a, const Partials<Accumulator<T>> p, const SplitPlan plan) {
  using Acc = Accumulator<T>;
  SX_DYNAMIC_SHARED(Acc, memory);
  const int64_t G = a.cache.num_heads, H = a.num_heads, Q = H / G;
  const int64_t block = blockIdx.x, split = block % p.num_splits, rest = block / p.num_splits;
  const int64_t head_group = rest % plan.head_groups, g = rest / plan.head_groups % G, m = rest / plan.head_groups / G;
  const KeyRange range = key_range(a, m);
  const int64_t begin = range.begin + split * kCudaSplit;
  if (begin >= range.end) return;
  const int count = static_cast<int>(range.end - begin < kCudaSplit ? range.end - begin : kCudaSplit);
  const int thread = static_cast<int>(threadIdx.x), E = static_cast<int>(a.cache.key_size),
            F = static_cast<int>(a.cache.value_size);
  const int64_t first_head = head_group * kHeads;  // of those that share the keys
  const int heads = static_cast<int>(Q - first_head < kHeads ? Q - first_head : kHeads);

  Acc* query = memory;                           // [kHeads, E]
  Acc* scores = query + kHeads * E;              // [kHeads, kSplitKeys]
  Acc* by_group = scores + kHeads * kSplitKeys;  // [value_groups, kHeads, F]
  for (int i = thread; i < kHeads * E; i += kThreads) {
    query[i] = i < heads * E ? widen(a.query[(m * H + g * Q + first_head) * E + i]) : Acc{0};
  }
  __syncthreads();
  score_keys<T, kHeads, kVec>(a, a.cache.key(a.slot[m], begin, g), count, plan.lanes, query, scores);
  __syncthreads();
  for (int i = thread / 32; i < kHeads; i += kWarps) {
    Acc largest, total;
    weigh_keys(a, scores + i * kSplitKeys, count, largest, total);
    if (thread % 32 == 0 && i < heads) {
      const int64_t at = (m * H + g * Q + first_head + i) * p.num_splits + split;
      p.largest[at] = largest;
      p.totals[at] = total;
    }
  }
  __syncthreads();
  const T* values = a.cache.value(a.slot[m], begin, g);
  const int columns = F / kVec;
  const auto out_of = [&](int i) { return p.outs + ((m * H + g * Q + first_head + i) * p.num_splits + split) * F; };
  Acc sums[kHeads][kVec];
  if (plan.value_groups == 0) {
    for (int column = thread; column < columns; column += kThreads) {
      add_values<T, kHeads, kVec>(a, values, column, 0, 1, count, scores, sums);
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          if (i < heads) out_of(i)[column * kVec + j] = sums[i][j];
        }
      }
    }
    return;
  }
  const int group = thread / columns, column = thread % columns;
  if (group < plan.value_groups) {
    add_values<T, kHeads, kVec>(a, values, column, group, plan.value_groups, count, scores, sums);
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) by_group[(group * kHeads + i) * F + column * kVec + j] = sums[i][j];
    }
  }
  __syncthreads();
  for (int i = thread; i < heads * F; i += kThreads) {
    Acc sum = Acc{0};
    for (int n = 0; n < plan.value_groups; ++n) sum += by_group[n * kHeads * F + i];
    out_of(i / F)[i % F] = sum;
  }
}

// Block (m, h): head h of row m.
template <typename T>
__global__ void __launch_bounds__(kThreads) merge_kernel(const AttentionArgs<T> a, const Partials<Accumulator<T>> p) {
  using Acc = Accumulator<T>;
  const int64_t m = blockIdx.x, h = blockIdx.y, at = m * a.num_heads + h, F = a.cache.value_size;
  const KeyRange range = key_range(a, m);
  const int64_t count = ceil_div(range.end - range.begin, kCudaSplit);
  T* out = a.out + at * F;
  const Acc *largest_of = p.largest + at * p.num_splits, *total_of = p.totals + at * p.num_splits;
  const Acc* outs = p.outs + at * p.num_splits * F;
  const bool has_sink = a.sinks != nullptr;
  Acc largest = Acc{0}, total = Acc{0};
  if (count > 0) {
    largest = has_sink ? a.sinks[h] : largest_of[0];
    for (int64_t s = 0; s < count; ++s) largest = largest_of[s] > largest ? largest_of[s] : largest;
    if (has_sink) total = exponential(a.sinks[h] - largest);
    for (int64_t s = 0; s < count; ++s) total += exponential(largest_of[s] - largest) * total_of[s];
  }
  for (int64_t f = threadIdx.x; f < F; f += kThreads) {
    Acc sum = Acc{0};
    for (int64_t s = 0; s < count; ++s) sum += exponential(largest_of[s] - largest) * outs[s * F + f];
    narrow(count > 0 ? sum / total : Acc{0}, out[f]);
  }
}

template <typename Acc>
size_t shared_bytes(int heads, int64_t key_size, int64_t value_size, int value_groups) {
  return sizeof(Acc) * static_cast<size_t>(heads * (key_size + kCudaSplit + value_groups * value_size));
}

template <typename T, int kHeads, int kVec>
void launch(const AttentionArgs<T>& a, const Partials<Accumulator<T>>& p, cudaStream_t stream) {
  using Acc = Accumulator<T>;
  const int64_t E = a.cache.key_size, F = a.cache.value_size, Q = a.num_heads / a.cache.num_heads;
  SplitPlan plan{1, 0, static_cast<int>(ceil_div(Q, kHeads))};
  while (plan.lanes < 32 && plan.lanes < E / kVec) plan.lanes *= 2;
  if (F / kVec <= kThreads) plan.value_groups = static_cast<int>(kThreads / (F / kVec));
  // Fewer groups where their sums do not fit.
  while (plan.value_groups > 1 && shared_bytes<Acc>(kHeads, E, F, plan.value_groups) > kMaxShared) --plan.value_groups;
  const size_t shared = shared_bytes<Acc>(kHeads, E, F, plan.value_groups);
  if constexpr (kHeads > 1) {
    if (shared > kMaxShared) return launch<T, kHeads / 2, kVec>(a, p, stream);
  }
  SX_CHECK(shared <= kMaxShared, "decode_attention: heads of ", E, " keys and ", F,
           " values do not fit into the GPU's shared memory");
  const int64_t blocks = a.num_rows * a.cache.num_heads * plan.head_groups * p.num_splits;
  SX_CHECK(blocks < (int64_t{1} << 31), "decode_attention: more than 2^31 splits of keys at a time");
  const auto kernel = &split_kernel<T, kHeads, kVec>;
  SX_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreads, shared, stream, a, p, plan);
  cuda_check(cudaGetLastError(), "decode_attention launch");
}

}  // namespace

template <typename T>
void decode_attention_cuda(const AttentionArgs<T>& a, Accumulator<T>* partials, int device, void* stream) {
  using Acc = Accumulator<T>;
  const CacheView<const T>& cache = a.cache;
  const int64_t heads = a.num_rows * a.num_heads, F = cache.value_size;
  if (heads == 0 || F == 0) return;
  SX_CHECK(a.num_rows < (int64_t{1} << 31) && a.num_heads < 65536,
           "decode_attention: more than 2^31 rows, or than 2^16 heads, at a time");
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t splits = cuda_splits(cache.num_rows, a.window);
  const Partials<Acc> p{splits, partials, partials + heads * splits * F, partials + heads * splits * (F + 1)};
  if (splits > 0 && cache.num_slots > 0) {
    constexpr int kVec = 16 / sizeof(T);
    const auto is_whole = [&](int64_t elements) { return elements % kVec == 0; };
    const bool fast = is_whole(cache.key_size) && is_whole(F) && is_whole(cache.key_slot_stride) &&
                      is_whole(cache.key_row_stride) && is_whole(cache.value_slot_stride) &&
                      is_whole(cache.value_row_stride) && is_aligned(cache.keys) && is_aligned(cache.values);
    const int64_t shared_by = a.num_heads / cache.num_heads;
    if (!fast) {
      launch<T, 1, 1>(a, p, on);
    } else if (sizeof(T) == 8 || shared_by == 1) {
      launch<T, 1, kVec>(a, p, on);
    } else if constexpr (sizeof(T) < 8) {
      if (shared_by == 2) {
        launch<T, 2, kVec>(a, p, on);
      } else if (shared_by <= 4) {
        launch<T, 4, kVec>(a, p, on);
      } else {
        launch<T, 8, kVec>(a, p, on);
      }
    }
  }
  const dim3 grid(static_cast<unsigned>(a.num_rows), static_cast<unsigned>(a.num_heads));
  SX_LAUNCH(merge_kernel<T>, grid, kThreads, 0, on, a, p);
  cuda_check(cudaGetLastError(), "decode_attention: launch of the merge");
}

#define SX_INSTANTIATE(T) template void decode_attention_cuda<T>(const AttentionArgs<T>&, Accumulator<T>*, int, void*);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
