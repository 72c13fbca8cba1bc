// The multistream_embed kernels on plain memory of exact size, against loops that follow the definition.
#include <random>

#include "common/small_float.h"
#include "multistream_embed/multistream_embed.h"
#include "tests/check.h"

namespace speechlm {
namespace {

template <typename T, typename Id>
void compare(int64_t N, int64_t S, int64_t V, int64_t D, bool scaled, int threads) {
  std::mt19937 random(static_cast<unsigned>(N * 31 + D));
  std::vector<Id> ids(N * S);
  for (auto& id : ids) id = static_cast<Id>(random() % 3 == 0 ? 1 : random() % V);
  std::vector<T> table(V * D), values(N * D), out(N * D), grad(V * D);
  // Small whole numbers are exact in every type, so any order of summation gives the same.
  for (auto& v : table) narrow(static_cast<Accumulator<T>>(static_cast<int>(random() % 5) - 2), v);
  for (auto& v : values) narrow(static_cast<Accumulator<T>>(static_cast<int>(random() % 3) - 1), v);
  for (auto& v : grad) narrow(Accumulator<T>{0}, v);
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
  int64_t bad = N * S;
  EmbedArgs<T, Id> forward;
  forward.shape = {N, S, V, D};
  forward.rule = rule;
  forward.ids = ids.data();
  forward.table = table.data();
  forward.out = out.data();
  forward.bad = &bad;
  ScatterSumArgs<T, Id> backward;
  backward.shape = forward.shape;
  backward.rule = rule;
  backward.ids = ids.data();
  backward.values = values.data();
  backward.out = grad.data();
#ifdef SPEECHLM_CUDA_ON_CPU
  (void)threads;
  std::vector<double> workspace(scatter_sum_workspace(forward.shape, sizeof(T) == 8) / sizeof(double) + 64);
  backward.workspace = workspace.data();
  multistream_embed_cuda(forward, 0, nullptr);
  scatter_sum_cuda(backward, 0, nullptr);
#else
  multistream_embed_cpu(forward, threads);
  scatter_sum_cpu(backward, threads);
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

}  // namespace
}  // namespace speechlm
