// The multistream_embed kernels on plain memory of exact size, against loops that follow the definition.
#include <random>
#include <set>

#include "common/tensor/small_float.h"
#include "multistream_embed/multistream_embed.h"
#include "scatter_sum/scatter_sum.h"
#include "tests/check.h"

namespace speechlm {
namespace {

template <typename T, typename Id>
void compare(int64_t N, int64_t S, int64_t V, int64_t D, bool scaled, int threads) {
  std::mt19937 random(static_cast<unsigned>(N * 31 + D));
  std::vector<Id> ids(N * S);
  for (auto& id : ids) id = static_cast<Id>(random() % 3 == 0 ? 1 : random() % V);
  const int64_t F = N / 2;
  std::vector<T> table(V * D), values(N * D), features(F * D), out(N * D), grad(V * D);
  // Small whole numbers are exact in every type, so any order of summation gives the same.
  for (auto& v : table) narrow(static_cast<Accumulator<T>>(static_cast<int>(random() % 5) - 2), v);
  for (auto& v : values) narrow(static_cast<Accumulator<T>>(static_cast<int>(random() % 3) - 1), v);
  for (auto& v : features) narrow(static_cast<Accumulator<T>>(static_cast<int>(random() % 7) - 3), v);
  for (auto& v : grad) narrow(Accumulator<T>{0}, v);
  std::vector<int64_t> positions(F);
  for (int64_t m = 0; m < F; ++m) positions[m] = N - 1 - 2 * m;
  EmbedRule rule;
  rule.has_pad = true;
  rule.has_scale = scaled;
  for (int64_t s = 0; s < S; ++s) rule.scale[s] = s % 2 ? -1.0 : 2.0;
  std::vector<double> want_out(N * D, 0.0), want_grad(V * D, 0.0);
  for (int64_t i = 0; i < N * S; ++i) {
    if (ids[i] == 0) continue;
    const double scale = scaled ? rule.scale[i % S] : 1.0;
    for (int64_t d = 0; d < D; ++d) {
      want_out[i / S * D + d] += scale * widen(table[ids[i] * D + d]);
      want_grad[ids[i] * D + d] += scale * widen(values[i / S * D + d]);
    }
  }
  for (int64_t m = 0; m < F; ++m) {
    for (int64_t d = 0; d < D; ++d) want_out[positions[m] * D + d] += widen(features[m * D + d]);
  }
  int64_t bad = N * S;
  std::vector<int32_t> slots(N, -1);
  const FeaturePlaces places{F, N, positions.data(), slots.data(), nullptr};
  EmbedArgs<T, Id> forward;
  forward.shape = {N, S, V, D};
  forward.rule = rule;
  forward.ids = ids.data();
  forward.table = table.data();
  forward.features = features.data();
  forward.slots = slots.data();
  forward.out = out.data();
  forward.bad = &bad;
  ScatterSumArgs<T> backward;
  backward.shape = forward.shape;
  backward.rule = rule;
  backward.values = values.data();
  backward.out = grad.data();
  std::vector<T> sums;
  std::vector<int64_t> rows;
  const auto make_compact = [&](int64_t touched) {
    sums.resize(touched * D);
    rows.resize(touched);
    backward.out = sums.data();
    backward.rows = rows.data();
  };
#ifdef SPEECHLM_CUDA_ON_CPU
  (void)threads;
  std::vector<double> workspace(scatter_sum_workspace(forward.shape, sizeof(T) == 8, 0) / sizeof(double) + 64);
  int64_t touched = -1;
  scatter_slots_cuda(places, 0, nullptr);
  multistream_embed_cuda(forward, 0, nullptr);
  sort_pairs_cuda(forward.shape, rule, ids.data(), workspace.data(), &touched, 0, nullptr);
  scatter_sum_cuda(backward, workspace.data(), 0, nullptr);
  make_compact(touched);
  scatter_sum_cuda(backward, workspace.data(), 0, nullptr);
#else
  EXPECT(scatter_slots_cpu(places));
  multistream_embed_cpu(forward, threads);
  const SortedPairs sorted = sort_pairs_cpu(forward.shape, rule, ids.data());
  EXPECT(sorted.first_bad == -1);
  scatter_sum_cpu(backward, sorted, threads);
  make_compact(sorted.touched);
  scatter_sum_cpu(backward, sorted, threads);
#endif
  EXPECT(bad == N * S);
  const auto same = [](const std::vector<T>& got, const std::vector<double>& want) {
    for (size_t i = 0; i < got.size(); ++i) {
      T rounded;
      narrow(static_cast<Accumulator<T>>(want[i]), rounded);
      if (widen(got[i]) != widen(rounded)) return false;
    }
    return true;
  };
  EXPECT(same(out, want_out));
  EXPECT(same(grad, want_grad));
  // Compact: the same rows, ascending, and as many as there are different ids.
  std::set<Id> different(ids.begin(), ids.end());
  different.erase(0);
  EXPECT(std::equal(rows.begin(), rows.end(), different.begin(), different.end()));
  for (size_t k = 0; k < rows.size(); ++k) {
    for (int64_t d = 0; d < D; ++d) EXPECT(widen(sums[k * D + d]) == widen(grad[rows[k] * D + d]));
  }
}

TEST(multistream_embed_matches_the_definition) {
  for (int threads : {1, 3}) {
    compare<float, int64_t>(70, 9, 40, 68, false, threads);
    compare<float, int32_t>(300, 3, 11, 33, true, threads);
    compare<double, int64_t>(33, 2, 9, 6, false, threads);
    compare<BFloat16, int32_t>(90, 4, 17, 72, true, threads);
    compare<Float16, int64_t>(64, 1, 5, 8, false, threads);
  }
}

// Positions that no row has, or that two features share.
TEST(multistream_embed_refuses_places) {
  const auto fits = [](const std::vector<int64_t>& positions) {
    std::vector<int32_t> slots(4, -1);
    int64_t bad = 0;
    const FeaturePlaces places{static_cast<int64_t>(positions.size()), 4, positions.data(), slots.data(), &bad};
#ifdef SPEECHLM_CUDA_ON_CPU
    scatter_slots_cuda(places, 0, nullptr);
    return bad == 0;
#else
    return scatter_slots_cpu(places);
#endif
  };
  EXPECT(fits({3, 0, 2}));
  EXPECT(fits({}));
  EXPECT(!fits({3, 4}));
  EXPECT(!fits({-1}));
  EXPECT(!fits({1, 2, 1}));
}

}  // namespace
}  // namespace speechlm
