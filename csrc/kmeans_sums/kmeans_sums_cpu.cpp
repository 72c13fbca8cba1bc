// Sums of each cluster's rows on the CPU. Where the sums of all clusters fit into the cache, each thread takes rows and
// has sums of its own, which are then added. Else the rows are taken in the order of their labels, so that the sums of
// one cluster stay in cache while they grow, and each thread has columns of its own.
#include "kmeans_sums/kmeans_sums.h"

#include <algorithm>
#include <mutex>
#include <vector>

#include "common/cpu/parallel.h"

namespace speechlm {
namespace {

constexpr int64_t kCacheBytes = 256 << 10;
constexpr int64_t kMinColumns = 64;  // of a thread
constexpr int64_t kMinRows = 1024;
constexpr int64_t kSmall = 1 << 15;  // values, for which waking another thread takes longer than it saves

template <typename T>
void add_row(double* __restrict sums, const T* __restrict x, const double* __restrict offset,
             const double* __restrict rounder, int64_t count) {
  for (int64_t f = 0; f < count; ++f) {
    sums[f] += ((static_cast<double>(widen(x[f])) - offset[f]) + rounder[f]) - rounder[f];
  }
}

template <typename T>
void by_rows(const KmeansSumsArgs<T>& a, const double* rounder, int threads) {
  const int64_t K = a.num_clusters, F = a.width;
  std::mutex mutex;
  parallel_for(a.num_rows, kMinRows, threads, [&](int64_t first, int64_t last) {
    std::vector<double> sums(K * F);
    std::vector<int64_t> counts(K);
    for (int64_t n = first; n < last; ++n) {
      const int64_t k = a.labels[n];
      if (k < 0 || k >= K) continue;
      ++counts[k];
      add_row(sums.data() + k * F, a.x + n * F, a.offset, rounder, F);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t i = 0; i < K * F; ++i) a.sums[i] += sums[i];  // exact, so whose turn it is does not matter
    for (int64_t k = 0; k < K; ++k) a.counts[k] += counts[k];
  });
}

template <typename T>
void by_columns(const KmeansSumsArgs<T>& a, const double* rounder, int threads) {
  const int64_t N = a.num_rows, K = a.num_clusters, F = a.width;
  const auto is_label = [&](int64_t n) { return a.labels[n] >= 0 && a.labels[n] < K; };
  std::vector<int64_t> begin(K + 1), order(N);
  for (int64_t n = 0; n < N; ++n) {
    if (is_label(n)) ++begin[a.labels[n] + 1];
  }
  for (int64_t k = 0; k < K; ++k) {
    a.counts[k] += begin[k + 1];
    begin[k + 1] += begin[k];
  }
  const int64_t num_labelled = begin[K];
  for (int64_t n = 0; n < N; ++n) {
    if (is_label(n)) order[begin[a.labels[n]]++] = n;
  }
  parallel_for(F, std::max(kMinColumns, ceil_div(F, threads)), threads, [&](int64_t first, int64_t last) {
    for (int64_t i = 0; i < num_labelled; ++i) {
      const int64_t n = order[i];
      add_row(a.sums + a.labels[n] * F + first, a.x + n * F + first, a.offset + first, rounder + first, last - first);
    }
  });
}

}  // namespace

template <typename T>
void kmeans_sums_cpu(const KmeansSumsArgs<T>& a, int threads) {
  std::vector<double> rounder(a.width);
  for (int64_t f = 0; f < a.width; ++f) rounder[f] = a.step[f] * kRounder;
  if (a.num_rows * a.width < kSmall) threads = 1;
  const bool fits = a.num_clusters * a.width * static_cast<int64_t>(sizeof(double)) <= kCacheBytes;
  fits ? by_rows(a, rounder.data(), threads) : by_columns(a, rounder.data(), threads);
}

#define SX_INSTANTIATE(T) template void kmeans_sums_cpu<T>(const KmeansSumsArgs<T>&, int);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
