// kmeans_assign on the CPU: blocks of rows against all centroids, panel by panel, so that a block's codes stay in the
// second-level cache and a panel's in the first; products never leave it.
#include "kmeans_assign/kmeans_assign.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "common/cpu/aligned.h"
#include "common/cpu/amx.h"
#include "common/cpu/parallel.h"
#include "kmeans_assign/tiles.h"

namespace speechlm {

namespace {

constexpr int64_t kBlockBytes = 192 << 10, kCoarseBlockBytes = 768 << 10;  // of a block's codes
constexpr int64_t kMaxBlockRows = 384;
constexpr int64_t kSmall = 1 << 20;  // products, for which waking another thread takes longer than it saves

struct Candidate {
  int32_t cluster;
  float low;
};

// The candidates for the nearest centroid of one row, in ascending order.
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

  // Leaves those whose lower end is not above `least`.
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

// `product_error`: of the products, as a share of the codes' norms.
RowTerms terms_of(const Quantized& q, double unit, int64_t width, bool exact, double product_error) {
  RowTerms r;
  if (!q.fits) {
    r.eta = std::numeric_limits<float>::infinity();
    return r;
  }
  const double inverse = 1 / std::max(unit, q.norm);
  const double beta = std::max(unit * inverse, kMinBeta);
  r.alpha = static_cast<float>(q.scale * inverse);
  r.beta_low = r.beta_high = static_cast<float>(beta);
  if (!exact) return r;
  constexpr double kSlack = kFloatSlack * 0x1p-24, kUp = 1 + 0x1p-20;
  r.beta_low = static_cast<float>(std::max(beta * (1 - kSlack), kMinBeta));
  r.beta_high = static_cast<float>(beta * (1 + kSlack));
  r.rho = static_cast<float>((q.residual + 2 * (kSlack + product_error) * q.hat) * inverse * kUp);
  r.hat = static_cast<float>(q.hat * inverse * kUp);
  const double direct = 0x1p-52 * static_cast<double>(width + 8) * (q.norm / unit) * (q.norm * inverse);
  r.eta = static_cast<float>(direct * kUp + kFloatFloor);
  return r;
}

// Compares rows with all centroids by codes of one kind: leaves the candidates for the nearest of each row.
template <typename Product>
class Scan {
 public:
  Scan(const PanelLoops<Product>& loops, const int32_t* codes, const CentroidTerms& terms, int64_t pairs,
       int64_t max_rows)
      : loops_(loops),
        codes_(codes),
        centroids_(terms),
        pairs_(pairs),
        row_codes_(padded(max_rows) * pairs),
        rows_(padded(max_rows)),
        columns_(kColumns * stride(max_rows)),
        stride_(stride(max_rows)),
        wanted_(padded(max_rows)),
        candidates_(padded(max_rows)),
        products_(loops.rows * loops.panels * kPanel),
        masks_(loops.rows * loops.panels) {}

  // num_rows rounded up to the step of a tile.
  int64_t padded(int64_t num_rows) const { return round_up(num_rows, loops_.step); }

  int32_t* row_codes() { return row_codes_.data(); }
  Candidates& candidates(int64_t i) { return candidates_[i]; }

  // Row i, whose codes are written; it gets no candidates if it is not `wanted`.
  void begin(int64_t i, const RowTerms& terms, bool wanted) {
    rows_[i] = terms;
    const float column[] = {terms.alpha, terms.beta_low, terms.rho,
                            terms.hat,   terms.eta,      std::numeric_limits<float>::infinity()};
    for (int64_t c = 0; c < kColumns; ++c) columns_[c * stride_ + i] = column[c];
    wanted_[i] = wanted;
    candidates_[i].clear();
  }

  // Rows [0, num_rows). A row with more than `max_candidates` candidates keeps none.
  void run(int64_t num_rows, int64_t num_clusters, int64_t max_candidates, bool products_only) {
    for (int64_t first = 0; first < num_clusters; first += loops_.panels * kPanel) {
      const CentroidTerms panel = from(first);
      for (int64_t i = 0; i < padded(num_rows); i += loops_.rows) {
        const int count = static_cast<int>(std::min<int64_t>(loops_.rows, padded(num_rows) - i));
        loops_.tile(products_.data(), row_codes_.data() + i * pairs_, codes_ + first * pairs_, pairs_, count);
        if (products_only) continue;
        loops_.below(products_.data(), columns(i), panel, masks_.data(), count);
        for (int p = 0; p < loops_.panels; ++p) {
          for (int j = 0; j < count; ++j) {
            const int64_t at = p * loops_.rows + j;
            if (j % 4 == 0 && j + 4 <= count && none_of_four(at)) {
              j += 3;
            } else if (masks_[at] != 0) {
              collect(products_.data() + at * kPanel, i + j, first + p * kPanel, num_clusters, max_candidates);
            }
          }
        }
      }
    }
    for (int64_t i = 0; i < num_rows; ++i) candidates_[i].prune(least(i));
  }

 private:
  static constexpr int64_t kColumns = 6;

  // Of a column: a vector may reach beyond the last row.
  int64_t stride(int64_t max_rows) const { return (padded(max_rows) / kRowVector + 2) * kRowVector; }

  RowColumns columns(int64_t i) const {
    const float* at = columns_.data() + i;
    return {at, at + stride_, at + 2 * stride_, at + 3 * stride_, at + 4 * stride_, at + 5 * stride_};
  }

  float& least(int64_t i) { return columns_[5 * stride_ + i]; }

  CentroidTerms from(int64_t first) const {
    return {centroids_.scale + first, centroids_.half_norm + first, centroids_.norm + first,
            centroids_.residual + first};
  }

  bool none_of_four(int64_t at) const {
    uint64_t masks;
    std::memcpy(&masks, &masks_[at], sizeof masks);
    return masks == 0;
  }

  void collect(const Product* products, int64_t row, int64_t first, int64_t num_clusters, int64_t max_candidates) {
    if (!wanted_[row]) return;
    float low[kPanel];
    uint32_t mask = loops_.bounds(low, &least(row), products, rows_[row], from(first));
    for (; mask != 0; mask &= mask - 1) {
      const int64_t j = __builtin_ctz(mask), k = first + j;
      if (k >= num_clusters) return;
      candidates_[row].add({static_cast<int32_t>(k), low[j]}, least(row));
    }
    if (candidates_[row].size() <= max_candidates) return;
    candidates_[row].prune(least(row));
    if (candidates_[row].size() <= max_candidates) return;
    candidates_[row].clear();
    wanted_[row] = false;
  }

  PanelLoops<Product> loops_;
  const int32_t* codes_;
  CentroidTerms centroids_;
  int64_t pairs_;
  AlignedVector<int32_t> row_codes_;
  std::vector<RowTerms> rows_;
  AlignedVector<float> columns_;  // alpha, beta, rho, hat, eta, least of all rows
  int64_t stride_;
  std::vector<char> wanted_;
  std::vector<Candidates> candidates_;
  AlignedVector<Product> products_;
  std::vector<uint16_t> masks_;
};

template <typename T, typename C>
class RowAssigner {
 public:
  RowAssigner(const KmeansAssignArgs<T, C>& args, int64_t max_rows)
      : a_(args),
        loops_(kmeans_loops()),
        norm_share_(norm_share_of(a_.width)),
        value_(std::max(padded_width(a_.width), 2 * coarse_pairs(a_.width))),
        codes_(value_.size()),
        fine_(loops_.fine, a_.codes, a_.terms, (a_.width + 1) / 2, max_rows) {
    if (!is_coarse()) return;
    PanelLoops<float> loops = loops_.coarse;
    loops.tile = coarse_tile(tiles_in_use());
    coarse_.emplace(loops, a_.coarse_codes, a_.coarse_terms, coarse_pairs(a_.width), max_rows);
    if (tiles_in_use() == Tiles::kAmx) unit_.emplace();
  }

  // Rows [begin, end).
  void run(int64_t begin, int64_t end) {
    const int64_t num_rows = end - begin;
    if (!is_coarse()) {
      for (int64_t i = 0; i < fine_.padded(num_rows); ++i) quantize(i, i < num_rows ? begin + i : -1);
      fine_.run(num_rows, a_.num_clusters, kAll, a_.products_only);
      for (int64_t i = 0; i < num_rows && !a_.products_only; ++i) rescore(begin + i, fine_.candidates(i));
      return;
    }
    for (int64_t i = 0; i < coarse_->padded(num_rows); ++i) round(i, i < num_rows ? begin + i : -1);
    coarse_->run(num_rows, a_.num_clusters, kMaxCoarseCandidates, a_.products_only);
    if (a_.products_only) return;
    again_.clear();
    for (int64_t i = 0; i < num_rows; ++i) {
      Candidates& candidates = coarse_->candidates(i);
      if (candidates.size() == 0 && is_finite(begin + i)) {
        again_.push_back(begin + i);
      } else {
        rescore(begin + i, candidates);
      }
    }
    const auto num_again = static_cast<int64_t>(again_.size());
    for (int64_t i = 0; i < fine_.padded(num_again); ++i) quantize(i, i < num_again ? again_[i] : -1);
    fine_.run(num_again, a_.num_clusters, kAll, false);
    for (int64_t i = 0; i < num_again; ++i) rescore(again_[i], fine_.candidates(i));
  }

  int64_t reranked = 0, compared = 0, not_finite = 0;

 private:
  static constexpr int64_t kAll = std::numeric_limits<int64_t>::max();
  static constexpr int64_t kMaxCoarseCandidates = 32;  // above this, fine codes are cheaper than float64 rescoring

  bool is_coarse() const { return a_.coarse_codes != nullptr && tiles_in_use() != Tiles::kNone; }

  bool is_finite(int64_t n) const { return all_finite(a_.x + n * a_.width, a_.width); }

  // Row n less the centre, padded with zeros; n = -1: all zeros.
  void load(int64_t n) {
    if (n >= 0) {
      kmeans_row_loops<T>().subtract(value_.data(), a_.x + n * a_.width, a_.centre, a_.width);
    }
    std::fill(value_.begin() + (n >= 0 ? a_.width : 0), value_.end(), 0.0);
  }

  void quantize(int64_t i, int64_t n) {
    load(n);
    const Quantized q = loops_.quantize(codes_.data(), value_.data(), padded_width(a_.width), norm_share_);
    fine_.begin(i, terms_of(q, a_.unit, a_.width, a_.exact, 0), n >= 0 && (q.fits || is_finite(n)));
    const int64_t pairs = (a_.width + 1) / 2, rows = loops_.fine.rows;
    int32_t* to = fine_.row_codes() + i / rows * rows * pairs + i % rows;
    for (int64_t p = 0; p < pairs; ++p) to[p * rows] = pair_of(&codes_[2 * p]);
  }

  void round(int64_t i, int64_t n) {
    load(n);
    auto* codes = reinterpret_cast<uint16_t*>(codes_.data());
    const int64_t pairs = coarse_pairs(a_.width), group = kPanel * kCoarsePairs;
    const Quantized q = loops_.round(codes, value_.data(), 2 * pairs);
    coarse_->begin(i, terms_of(q, a_.unit, a_.width, true, coarse_product_error(a_.width)), n >= 0 && q.fits);
    int32_t* to = coarse_->row_codes() + i / kPanel * kPanel * pairs + i % kPanel * kCoarsePairs;
    for (int64_t p = 0; p < pairs; p += kCoarsePairs) {
      std::memcpy(to + p / kCoarsePairs * group, codes + 2 * p, kCoarsePairs * sizeof(int32_t));
    }
  }

  void rescore(int64_t n, const Candidates& candidates) {
    if (candidates.size() == 0) {  // only of a row that is not finite
      ++not_finite;
      a_.labels[n] = -1;
      if (a_.distance != nullptr) a_.distance[n] = std::numeric_limits<double>::quiet_NaN();
      return;
    }
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
  double norm_share_;
  AlignedVector<double> value_;
  AlignedVector<int32_t> codes_;
  Scan<int32_t> fine_;
  std::optional<Scan<float>> coarse_;
  std::optional<amx::Tiles> unit_;
  std::vector<int64_t> again_;
};

}  // namespace

template <typename T, typename C>
void kmeans_assign_cpu(const KmeansAssignArgs<T, C>& a, int threads) {
  const KmeansLoops& loops = kmeans_loops();
  const bool is_coarse = a.coarse_codes != nullptr && tiles_in_use() != Tiles::kNone;
  const int64_t row_bytes = (a.width + 1) / 2 * 4, block_bytes = is_coarse ? kCoarseBlockBytes : kBlockBytes;
  const int64_t tile_rows = is_coarse ? kCoarseStep : loops.fine.rows;
  if (a.num_rows * a.num_clusters * a.width < kSmall) threads = 1;
  // A block for every thread, at least.
  int64_t rows = std::min(kMaxBlockRows, std::max<int64_t>(block_bytes / std::max<int64_t>(row_bytes, 1), 1));
  rows = std::min(rows, ceil_div(a.num_rows, threads));
  rows = std::max(round_up(rows, tile_rows), tile_rows);
  const int64_t blocks = ceil_div(a.num_rows, rows);
  std::vector<std::array<int64_t, 3>> counts(blocks);
  parallel_for(blocks, 1, threads, [&](int64_t begin, int64_t end) {
    RowAssigner<T, C> block(a, rows);
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
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
