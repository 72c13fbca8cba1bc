// kmeans_assign on the CPU: blocks of rows against all centroids, panel by panel, so that a block's codes stay in the
// second-level cache and a panel's in the first; products never leave it.
#include "kmeans_assign/kmeans_assign.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "kmeans_assign/tiles.h"

namespace speechlm {

#define SX_LOOPS(set)                             \
  namespace set {                                 \
  const KmeansLoops& kmeans_loops_of();           \
  template <typename T>                           \
  const KmeansRowLoops<T>& kmeans_row_loops_of(); \
  }
SX_LOOPS(generic)
#ifdef SPEECHLM_SIMD_X86
SX_LOOPS(avx2)
SX_LOOPS(avx512)
#endif
#undef SX_LOOPS

const KmeansLoops& kmeans_loops() {
#ifdef SPEECHLM_SIMD_X86
  if (simd_in_use() == Simd::kAvx512) return avx512::kmeans_loops_of();
  if (simd_in_use() == Simd::kAvx2) return avx2::kmeans_loops_of();
#endif
  return generic::kmeans_loops_of();
}

template <typename T>
const KmeansRowLoops<T>& kmeans_row_loops() {
#ifdef SPEECHLM_SIMD_X86
  if (simd_in_use() == Simd::kAvx512) return avx512::kmeans_row_loops_of<T>();
  if (simd_in_use() == Simd::kAvx2) return avx2::kmeans_row_loops_of<T>();
#endif
  return generic::kmeans_row_loops_of<T>();
}

template const KmeansRowLoops<float>& kmeans_row_loops<float>();
template const KmeansRowLoops<double>& kmeans_row_loops<double>();
template const KmeansRowLoops<BFloat16>& kmeans_row_loops<BFloat16>();
template const KmeansRowLoops<Float16>& kmeans_row_loops<Float16>();

namespace {

constexpr int64_t kBlockBytes = 192 << 10;  // of a block's codes
constexpr int64_t kMostBlockRows = 384;
constexpr int64_t kSmall = 1 << 20;  // products, for which waking another thread takes longer than it saves

struct Candidate {
  int32_t cluster;
  float low;
};

// The centroids that may be the nearest of one row, in ascending order.
class Candidates {
 public:
  void clear() {
    count_ = 0;
    more_.clear();
  }

  void add(const Candidate& candidate, float least) {
    if (count_ == kFirst && more_.empty()) prune(least);
    if (count_ < kFirst) {
      first_[count_++] = candidate;
    } else {
      more_.push_back(candidate);
    }
  }

  // Leaves those that still may be.
  void prune(float least) {
    const auto is_above = [&](const Candidate& c) { return c.low > least; };
    count_ = std::remove_if(first_, first_ + count_, is_above) - first_;
    more_.erase(std::remove_if(more_.begin(), more_.end(), is_above), more_.end());
  }

  int64_t size() const { return count_ + static_cast<int64_t>(more_.size()); }
  const Candidate& operator[](int64_t i) const { return i < count_ ? first_[i] : more_[i - count_]; }

 private:
  static constexpr int64_t kFirst = 24;
  int64_t count_ = 0;
  Candidate first_[kFirst];
  std::vector<Candidate> more_;
};

template <typename T>
bool all_finite(const T* x, int64_t width) {
  for (int64_t f = 0; f < width; ++f) {
    if (!std::isfinite(widen(x[f]))) return false;
  }
  return true;
}

RowTerms terms_of(const Quantised& q, double unit, int64_t width, bool exact) {
  RowTerms r;
  if (!q.fits) {
    r.eta = std::numeric_limits<float>::infinity();
    return r;
  }
  const double inverse = 1 / std::max(unit, q.norm);
  const double beta = std::max(unit * inverse, kLeastBeta);
  r.alpha = static_cast<float>(q.scale * inverse);
  r.beta_low = r.beta_high = static_cast<float>(beta);
  if (!exact) return r;
  constexpr double kSlack = kFloatSlack * 0x1p-24, kUp = 1 + 0x1p-20;
  r.beta_low = static_cast<float>(std::max(beta * (1 - kSlack), kLeastBeta));
  r.beta_high = static_cast<float>(beta * (1 + kSlack));
  r.rho = static_cast<float>((q.residual + 2 * kSlack * q.hat) * inverse * kUp);
  r.hat = static_cast<float>(q.hat * inverse * kUp);
  const double direct = 0x1p-52 * static_cast<double>(width + 8) * (q.norm / unit) * (q.norm * inverse);
  r.eta = static_cast<float>(direct * kUp + kFloatFloor);
  return r;
}

template <typename T, typename C>
class RowBlock {
 public:
  RowBlock(const KmeansAssignArgs<T, C>& args, int64_t most_rows)
      : a_(args),
        loops_(kmeans_loops()),
        pairs_((a_.width + 1) / 2),
        norm_share_(norm_share_of(a_.width)),
        value_(padded_width(a_.width)),
        row_codes_(padded_width(a_.width)),
        codes_(most_rows * pairs_),
        terms_(most_rows),
        least_(most_rows),
        candidates_(most_rows),
        finite_(most_rows) {}

  // Rows [begin, end).
  void run(int64_t begin, int64_t end) {
    const int64_t num_rows = end - begin;
    const int64_t padded = (num_rows + loops_.rows - 1) / loops_.rows * loops_.rows;
    quantise(begin, num_rows, padded);
    for (int64_t first = 0; first < a_.num_clusters; first += loops_.panels * kPanel) {
      const CentroidTerms c{a_.terms.scale + first, a_.terms.half_norm + first, a_.terms.norm + first,
                            a_.terms.residual + first};
      for (int64_t i = 0; i < padded; i += loops_.rows) {
        loops_.tile(products_, codes_.data() + i * pairs_, a_.codes + first * pairs_, pairs_);
        if (a_.products_only) continue;
        loops_.below(products_, &terms_[i], c, &least_[i], masks_);
        for (int t = 0; t < loops_.panels * loops_.rows; ++t) {
          if (masks_[t] != 0) collect(t, i + t % loops_.rows, first + t / loops_.rows * kPanel);
        }
      }
    }
    for (int64_t i = 0; i < num_rows && !a_.products_only; ++i) settle(begin + i, i);
  }

  int64_t reranked = 0, compared = 0, not_finite = 0;

 private:
  void quantise(int64_t begin, int64_t num_rows, int64_t padded) {
    const KmeansRowLoops<T>& rows = kmeans_row_loops<T>();
    std::fill(value_.begin(), value_.end(), 0.0);
    for (int64_t i = 0; i < padded; ++i) {
      const T* x = a_.x + (begin + i) * a_.width;
      if (i < num_rows) {
        rows.subtract(value_.data(), x, a_.centre, a_.width);
      } else {
        std::fill(value_.begin(), value_.end(), 0.0);
      }
      const auto width = static_cast<int64_t>(value_.size());
      const Quantised q = loops_.quantise(row_codes_.data(), value_.data(), width, norm_share_);
      finite_[i] = i < num_rows && (q.fits || all_finite(x, a_.width));
      terms_[i] = terms_of(q, a_.unit, a_.width, a_.exact);
      least_[i] = std::numeric_limits<float>::infinity();
      candidates_[i].clear();
      int32_t* to = codes_.data() + i / loops_.rows * loops_.rows * pairs_ + i % loops_.rows;
      for (int64_t p = 0; p < pairs_; ++p) to[p * loops_.rows] = pair_of(&row_codes_[2 * p]);
    }
  }

  void collect(int tile_row, int64_t row, int64_t first) {
    if (!finite_[row]) return;
    float low[kPanel];
    const CentroidTerms panel{a_.terms.scale + first, a_.terms.half_norm + first, a_.terms.norm + first,
                              a_.terms.residual + first};
    uint32_t mask = loops_.ends(low, &least_[row], products_ + tile_row * kPanel, terms_[row], panel);
    for (; mask != 0; mask &= mask - 1) {
      const int64_t j = __builtin_ctz(mask), k = first + j;
      if (k >= a_.num_clusters) return;
      candidates_[row].add({static_cast<int32_t>(k), low[j]}, least_[row]);
    }
  }

  void settle(int64_t n, int64_t i) {
    if (!finite_[i]) {
      ++not_finite;
      a_.labels[n] = -1;
      if (a_.distance != nullptr) a_.distance[n] = std::numeric_limits<double>::quiet_NaN();
      return;
    }
    Candidates& candidates = candidates_[i];
    candidates.prune(least_[i]);
    int64_t label = candidates[0].cluster;
    const bool again = candidates.size() > 1;  // without bounds: equal scores, and those that are no numbers
    if (again || a_.distance != nullptr) {
      for (int64_t f = 0; f < a_.width; ++f) value_[f] = static_cast<double>(widen(a_.x[n * a_.width + f]));
    }
    if (again) {
      ++reranked;
      compared += candidates.size();
      double best = std::numeric_limits<double>::infinity();
      for (int64_t c = 0; c < candidates.size(); ++c) {  // ascending, so the first of equals wins
        const double d = distance(candidates[c].cluster);
        if (d < best) {
          best = d;
          label = candidates[c].cluster;
        }
      }
    }
    a_.labels[n] = static_cast<int32_t>(label);
    if (a_.distance != nullptr) a_.distance[n] = distance(label);
  }

  double distance(int64_t cluster) const {
    return kmeans_row_loops<C>().distance(value_.data(), a_.centroids + cluster * a_.width, a_.width);
  }

  const KmeansAssignArgs<T, C>& a_;
  const KmeansLoops& loops_;
  int64_t pairs_;
  double norm_share_;
  std::vector<double> value_;
  std::vector<int32_t> row_codes_;
  std::vector<int32_t> codes_;
  std::vector<RowTerms> terms_;
  std::vector<float> least_;
  std::vector<Candidates> candidates_;
  std::vector<char> finite_;
  int32_t products_[kMostTileRows * kMostTilePanels * kPanel];
  uint32_t masks_[kMostTileRows * kMostTilePanels];
};

}  // namespace

template <typename T, typename C>
void kmeans_assign_cpu(const KmeansAssignArgs<T, C>& a, int threads) {
  const KmeansLoops& loops = kmeans_loops();
  const int64_t row_bytes = (a.width + 1) / 2 * 4;
  if (a.num_rows * a.num_clusters * a.width < kSmall) threads = 1;
  // A block for every thread, at least.
  int64_t rows = std::min(kMostBlockRows, std::max<int64_t>(kBlockBytes / std::max<int64_t>(row_bytes, 1), 1));
  rows = std::min(rows, (a.num_rows + threads - 1) / threads);
  rows = std::max<int64_t>((rows + loops.rows - 1) / loops.rows, 1) * loops.rows;
  const int64_t blocks = (a.num_rows + rows - 1) / rows;
  std::vector<std::array<int64_t, 3>> counts(blocks);
  parallel_for(blocks, 1, threads, [&](int64_t begin, int64_t end) {
    RowBlock<T, C> block(a, rows);
    for (int64_t b = begin; b < end; ++b) {
      block.reranked = block.compared = block.not_finite = 0;
      block.run(b * rows, std::min(a.num_rows, (b + 1) * rows));
      counts[b] = {block.reranked, block.compared, block.not_finite};
    }
  });
  for (const auto& count : counts) {
    for (int i = 0; i < 3; ++i) a.counts[i] += count[i];
  }
}

#define SX_INSTANTIATE(T)                                                            \
  template void kmeans_assign_cpu<T, float>(const KmeansAssignArgs<T, float>&, int); \
  template void kmeans_assign_cpu<T, double>(const KmeansAssignArgs<T, double>&, int);
SX_INSTANTIATE(float)
SX_INSTANTIATE(double)
SX_INSTANTIATE(BFloat16)
SX_INSTANTIATE(Float16)
#undef SX_INSTANTIATE

}  // namespace speechlm
