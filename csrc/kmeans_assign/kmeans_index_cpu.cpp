// Codes and terms of the centroids, in the layout of kmeans_assign's tiles.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/cpu/parallel.h"
#include "kmeans_assign/kmeans_assign.h"
#include "kmeans_assign/tiles.h"

namespace speechlm {
namespace {

// FNV-1a over the numbers as doubles; -0 counts as 0.
template <typename C>
uint64_t hash_of(const C* row, int64_t width) {
  uint64_t hash = 14695981039346656037u;
  for (int64_t f = 0; f < width; ++f) {
    hash = (hash ^ bits_as<uint64_t>(static_cast<double>(row[f]) + 0.0)) * 1099511628211u;
  }
  return hash;
}

// Marks every centroid that equals an earlier one. A copy can never be the label, and many of them would be compared
// again for each row near them.
template <typename C>
std::vector<char> copies_of(const C* centroids, int64_t num_clusters, int64_t width, int threads) {
  std::vector<std::pair<uint64_t, int64_t>> keys(num_clusters);
  parallel_for(num_clusters, 64, threads, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) keys[k] = {hash_of(centroids + k * width, width), k};
  });
  std::sort(keys.begin(), keys.end());
  std::vector<char> copies(num_clusters);
  for (int64_t i = 1, first = 0; i < num_clusters; ++i) {
    if (keys[i].first != keys[first].first) first = i;
    const C* a = centroids + keys[first].second * width;
    const C* b = centroids + keys[i].second * width;
    copies[keys[i].second] = i != first && std::equal(a, a + width, b);
  }
  return copies;
}

// terms [4, padded K].
void write_terms(float* terms, const std::vector<Quantized>& found, const std::vector<char>& copies, double unit,
                 int64_t padded) {
  constexpr double kUp = 1 + 0x1p-20;  // these ends must not be rounded down
  constexpr float kNever = std::numeric_limits<float>::infinity();
  const auto num_clusters = static_cast<int64_t>(found.size());
  for (int64_t k = 0; k < padded; ++k) {
    float* scale = terms + k;
    float* half_norm = scale + padded;
    float* norm = half_norm + padded;
    float* residual = norm + padded;
    *scale = *norm = *residual = 0;
    *half_norm = kNever;
    if (k >= num_clusters || copies[k]) continue;
    const Quantized& q = found[k];
    *half_norm = static_cast<float>((q.norm / unit) * (q.norm / unit) / 2);
    *scale = static_cast<float>(q.scale / unit);
    *norm = q.fits ? static_cast<float>(q.norm / unit * kUp) : std::numeric_limits<float>::infinity();
    *residual = static_cast<float>(q.residual / unit * kUp);
  }
}

}  // namespace

template <typename C>
void kmeans_index_cpu(const KmeansIndexArgs<C>& a, int threads) {
  const KmeansLoops& loops = kmeans_loops();
  const KmeansRowLoops<C>& rows = kmeans_row_loops<C>();
  const int64_t K = a.num_clusters, F = a.width, pairs = (F + 1) / 2, padded = padded_clusters(K);
  const double norm_share = norm_share_of(F);
  const bool is_coarse = a.coarse_codes != nullptr;
  const int64_t short_pairs = coarse_pairs(F);
  std::vector<Quantized> found(K), coarse(is_coarse ? K : 0);
  parallel_for(padded, 16, threads, [&](int64_t begin, int64_t end) {
    std::vector<double> value(std::max(padded_width(F), 2 * short_pairs));
    std::vector<int32_t> codes(value.size());
    for (int64_t k = begin; k < end; ++k) {
      if (k < K) {
        rows.subtract(value.data(), a.centroids + k * F, a.centre, F);
        found[k] = loops.quantize(codes.data(), value.data(), padded_width(F), norm_share);
      } else {
        std::fill(codes.begin(), codes.end(), 0);
      }
      int32_t* to = a.codes + k / kPanel * kPanel * pairs + k % kPanel;
      for (int64_t p = 0; p < pairs; ++p) to[p * kPanel] = pair_of(&codes[2 * p]);
      if (!is_coarse) continue;
      auto* bits = reinterpret_cast<uint16_t*>(codes.data());
      if (k < K) coarse[k] = loops.round(bits, value.data(), 2 * short_pairs);
      to = a.coarse_codes + k / kPanel * kPanel * short_pairs + k % kPanel;
      for (int64_t p = 0; p < short_pairs; ++p) std::memcpy(to + p * kPanel, bits + 2 * p, sizeof *to);
    }
  });
  double unit = 0;
  for (const Quantized& q : found) unit = std::max(unit, q.norm);
  if (unit == 0) unit = 1;
  *a.unit = unit;
  const std::vector<char> copies = copies_of(a.centroids, K, F, threads);
  write_terms(a.terms, found, copies, unit, padded);
  if (is_coarse) write_terms(a.coarse_terms, coarse, copies, unit, padded);
}

template void kmeans_index_cpu<float>(const KmeansIndexArgs<float>&, int);
template void kmeans_index_cpu<double>(const KmeansIndexArgs<double>&, int);

}  // namespace speechlm
