// kmeans_assign on the GPU, last step: picks each row's nearest centroid from the coarse products. A block handles
// kRows rows, so that the centroids' terms are loaded once for all of them. One pass over a row's products, four at a
// time, finds the least upper bound, and each thread keeps the two lowest of its groups' lower bounds; unless a thread
// has two groups below the least upper bound (overflow), those hold all candidates. If there is more than one, a warp
// rescores each by its direct float64 distance. Bytes that must move: the products once.
#include <cmath>

#include "common/cuda/vec.cuh"
#include "common/cuda/warp.cuh"
#include "kmeans_assign/kmeans_assign.h"

namespace speechlm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4;
constexpr int kGroup = kClusterGroup;  // clusters of a thread's load: 16 bytes

struct ScoreBounds {
  float low;
  float high;
};

// Bounds of one score. NaN, which only infinite terms give, becomes "may be anything": here for the lower bound; fminf,
// which the upper one goes to, leaves it out. The roundings are spelled out, so that a second call gives the same bits.
__device__ inline ScoreBounds bounds_of(float product, float scale, float half_norm, float norm, float residual,
                                        const RowTerms& r) {
  const float z = -__fmul_rn(product, scale);
  const float error = __fmaf_rn(norm, r.rho, __fmaf_rn(residual, r.hat, r.eta));
  const float low = __fmaf_rn(z, r.alpha, __fmul_rn(half_norm, r.beta_low));
  const float high = __fmaf_rn(z, r.alpha, __fmul_rn(half_norm, r.beta_high));
  return {fmaxf(__fsub_rn(low, error), -INFINITY), __fadd_rn(high, error)};
}

using Group = Vec<float, kGroup>;

__device__ inline Group load(const float* at) { return *reinterpret_cast<const Group*>(at); }

// The smallest float64 distance and its centroid, the lowest index among equals.
struct Nearest {
  double distance;
  int64_t cluster;

  __device__ void update(double d, int64_t k) {
    if (d < distance || (d == distance && k < cluster)) {
      distance = d;
      cluster = k;
    }
  }
};

// By a warp, to the bit as the CPU does it: nothing is contracted to a fused multiply-add.
template <typename T, typename C>
__device__ inline double direct_distance(const KmeansRescoreArgs<T, C>& a, int64_t n, int64_t k) {
  const T* x = a.x + n * a.width;
  const C* c = a.centroids + k * a.width;
  double sum = 0;
  for (int64_t f = threadIdx.x % kDistanceLanes; f < a.width; f += kDistanceLanes) {
    const double d = static_cast<double>(widen(x[f])) - static_cast<double>(c[f]);
    sum = __dadd_rn(sum, __dmul_rn(d, d));
  }
  return warp_sum(sum);
}

struct Shared {
  float least[kRows][kWarps];
  int count[kRows];     // candidates in the list
  int overflow[kRows];  // whether a thread had two groups
  int list[kRows][kThreads * kGroup];
  Nearest nearest[kWarps];
};

// The lower bound of one score, as the pass over all of them has it.
template <typename T, typename C>
__device__ inline float low_of(const KmeansRescoreArgs<T, C>& a, const RowTerms& r, int64_t n, int64_t k) {
  return bounds_of(a.products[n * padded_groups(a.num_clusters) + k], a.terms.scale[k], a.terms.half_norm[k],
                   a.terms.norm[k], a.terms.residual[k], r)
      .low;
}

// Compares the `count` candidates in `list`; the block's nearest so far stays in s.nearest, warp by warp.
template <typename T, typename C>
__device__ inline void compare(const KmeansRescoreArgs<T, C>& a, Shared& s, const int* list, int count, int64_t n) {
  const auto warp = static_cast<int>(threadIdx.x / 32);
  Nearest found = s.nearest[warp];
  __syncwarp();
  for (int i = warp; i < count; i += kWarps) found.update(direct_distance(a, n, list[i]), list[i]);
  if (threadIdx.x % 32 == 0) s.nearest[warp] = found;
}

// Labels row n, whose candidates are listed, or searched again after an overflow. All threads must call it.
template <typename T, typename C>
__device__ inline void rescore(const KmeansRescoreArgs<T, C>& a, Shared& s, int i, int64_t n, float least) {
  const auto thread = static_cast<int>(threadIdx.x);
  const RowTerms r = a.rows[n];
  if (r.eta != r.eta) {  // the row is not finite
    if (thread == 0) {
      a.labels[n] = -1;
      if (a.distance != nullptr) a.distance[n] = NAN;
      atomicAdd(a.counts + 2, 1ULL);
    }
    return;
  }
  const bool overflow = s.overflow[i] != 0;
  int64_t total = s.count[i], label = s.list[i][0];
  if (overflow || total > 1) {  // in the fast mode: equal scores, and those that are no numbers
    if (thread < kWarps) s.nearest[thread] = {INFINITY, a.num_clusters};
    __syncthreads();
    if (!overflow) {
      compare(a, s, s.list[i], static_cast<int>(total), n);
    } else {
      total = 0;
      for (int64_t first = 0; first < a.num_clusters; first += kThreads) {
        if (thread == 0) s.count[i] = 0;
        __syncthreads();
        const int64_t k = first + thread;
        if (k < a.num_clusters && low_of(a, r, n, k) <= least) {
          s.list[i][atomicAdd(&s.count[i], 1)] = static_cast<int>(k);
        }
        __syncthreads();
        total += s.count[i];
        compare(a, s, s.list[i], s.count[i], n);
        __syncthreads();
      }
    }
    __syncthreads();
    if (thread == 0) {
      Nearest best = s.nearest[0];
      for (int w = 1; w < kWarps; ++w) best.update(s.nearest[w].distance, s.nearest[w].cluster);
      a.labels[n] = static_cast<int32_t>(best.cluster);
      if (a.distance != nullptr) a.distance[n] = best.distance;
      atomicAdd(a.counts, 1ULL);
      atomicAdd(a.counts + 1, static_cast<unsigned long long>(total));
    }
    return;
  }
  if (thread < 32) {
    const double d = a.distance != nullptr ? direct_distance(a, n, label) : 0.0;
    if (thread == 0) {
      a.labels[n] = static_cast<int32_t>(label);
      if (a.distance != nullptr) a.distance[n] = d;
    }
  }
}

template <typename T, typename C>
// At least three blocks per multiprocessor: each has 32 KB of loads under way.
__global__ void __launch_bounds__(kThreads, 3) rescore_kernel(const KmeansRescoreArgs<T, C> a) {
  SX_SHARED(Shared, shared, 1);
  Shared& s = shared[0];
  const auto thread = static_cast<int>(threadIdx.x);
  const int64_t groups = ceil_div(a.num_rows, kRows), stride = padded_groups(a.num_clusters);
  const auto padded = static_cast<unsigned>(stride);  // up to 2^31
  for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    const int64_t first = group * kRows;
    RowTerms rows[kRows];
    const float* products[kRows];
    float least[kRows], low[kRows], next[kRows];
    int lowest[kRows];  // first cluster of the group of `low`
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t n = min(first + i, a.num_rows - 1);
      rows[i] = a.rows[n];
      products[i] = a.products + n * stride;
      least[i] = low[i] = next[i] = INFINITY;
      lowest[i] = thread * kGroup;
    }
#pragma unroll 1
    for (unsigned k = thread * kGroup; k < padded; k += kThreads * kGroup) {
      Group product[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) product[i] = load(products[i] + k);
      const Group scale = load(a.terms.scale + k), half_norm = load(a.terms.half_norm + k);
      const Group norm = load(a.terms.norm + k), residual = load(a.terms.residual + k);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float lower = INFINITY;
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const ScoreBounds e =
              bounds_of(product[i].v[j], scale.v[j], half_norm.v[j], norm.v[j], residual.v[j], rows[i]);
          least[i] = fminf(least[i], e.high);
          lower = fminf(lower, e.low);
        }
        next[i] = fminf(next[i], fmaxf(low[i], lower));
        lowest[i] = lower < low[i] ? static_cast<int>(k) : lowest[i];
        low[i] = fminf(low[i], lower);
      }
    }
    if (thread < kRows) s.count[thread] = s.overflow[thread] = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      least[i] = warp_reduce(least[i], [](float a, float b) { return fminf(a, b); });
      if (thread % 32 == 0) s.least[i][thread / 32] = least[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      for (int w = 0; w < kWarps; ++w) least[i] = fminf(least[i], s.least[i][w]);
      if (static_cast<unsigned>(thread * kGroup) >= padded) continue;  // this thread saw none
      if (low[i] <= least[i] && first + i < a.num_rows) {
        const int64_t end = min(static_cast<int64_t>(lowest[i]) + kGroup, a.num_clusters);
        for (int64_t k = lowest[i]; k < end; ++k) {
          if (low_of(a, rows[i], first + i, k) <= least[i]) {
            s.list[i][atomicAdd(&s.count[i], 1)] = static_cast<int>(k);
          }
        }
      }
      if (next[i] <= least[i] && static_cast<unsigned>((thread + kThreads) * kGroup) < padded)
        atomicMax(&s.overflow[i], 1);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < kRows && first + i < a.num_rows; ++i) {
      float end = least[0];  // registers have no index
#pragma unroll
      for (int j = 1; j < kRows; ++j) end = j == i ? least[j] : end;
      rescore(a, s, i, first + i, end);
      __syncthreads();
    }
  }
}

}  // namespace

template <typename T, typename C>
void kmeans_rescore_cuda(const KmeansRescoreArgs<T, C>& args, int device, void* stream) {
  if (args.num_rows == 0) return;
  const DeviceGuard guard(device);
  const auto kernel = &rescore_kernel<T, C>;
  SX_LAUNCH(kernel, grid_for(args.num_rows, kRows), kThreads, 0, static_cast<cudaStream_t>(stream), args);
  cuda_check(cudaGetLastError(), "kmeans_assign: launch of the labels");
}

#define SX_INSTANTIATE(T)                                                                      \
  template void kmeans_rescore_cuda<T, float>(const KmeansRescoreArgs<T, float>&, int, void*); \
  template void kmeans_rescore_cuda<T, double>(const KmeansRescoreArgs<T, double>&, int, void*);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
