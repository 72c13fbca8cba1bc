// The delay_pack kernels on plain memory, against a loop that follows the definition.
#include <algorithm>
#include <limits>
#include <random>

#include "common/cpu/parallel.h"
#include "delay_pack/delay_pack.h"
#include "tests/check.h"

namespace speechlm {
namespace {

struct Case {
  std::vector<int64_t> lengths;
  std::vector<int64_t> delays;
  bool trim;
};

// The table of segments that fill all streams, without anything special, and its counts.
std::vector<int64_t> table_of(const Case& c, DelayPackShape& given) {
  const int64_t S = static_cast<int64_t>(c.delays.size());
  std::vector<int64_t> table{0};
  for (int64_t length : c.lengths) table.push_back(table.back() + length);
  given.num_segments = static_cast<int64_t>(c.lengths.size());
  given.num_streams = S;
  given.num_frames = table.back();
  given.offset_rows = 1;
  given.tail = c.trim ? 0 : *std::max_element(c.delays.begin(), c.delays.end());
  table.insert(table.end(), c.delays.begin(), c.delays.end());
  for (int k = 0; k < 2; ++k) {  // pads, and what comes after the last frame
    for (int64_t s = 0; s < S; ++s) table.push_back(-1 - s);
  }
  for (int64_t s = 0; s < S; ++s) table.push_back(1000 * s);
  return table;
}

template <typename In, typename Out>
void compare(const Case& c, int threads) {
  const int64_t n = static_cast<int64_t>(c.lengths.size());
  const int64_t S = static_cast<int64_t>(c.delays.size());
  DelayPackShape given;
  const std::vector<int64_t> table = table_of(c, given);
  const auto shape = delay_pack_plan(table.data(), static_cast<int64_t>(table.size()), given);
  const int64_t frames = shape.num_frames;

  std::mt19937 random(static_cast<unsigned>(frames + S));
  std::vector<In> ids(frames * S);
  std::vector<float> weight(frames * S);
  for (auto& id : ids) id = static_cast<In>(random() % 1000);
  for (auto& w : weight) w = static_cast<float>(random() % 1000);
  std::vector<Out> out(shape.num_rows * S, 777), labels(shape.num_rows * S, 777);
  std::vector<float> out_weight(shape.num_rows * S, -5);
  std::vector<int32_t> position(shape.num_rows, -5), cu(n + 1, -5);
  DelayPackArgs<In, Out> args;
  args.shape = shape;
  args.meta = DelayPackMeta::at(table.data(), shape);
  args.ids = ids.data();
  args.weight = weight.data();
  args.out_ids = out.data();
  args.out_labels = labels.data();
  args.out_weight = out_weight.data();
  args.out_position = position.data();
  args.out_cu_seqlens = cu.data();
#ifdef SPEECHLM_CUDA_ON_CPU
  (void)threads;
  delay_pack_cuda(args, 0, nullptr);
#else
  delay_pack_cpu(args, threads);
#endif

  int64_t row = 0;
  for (int64_t i = 0; i < n; ++i) {
    EXPECT(cu[i] == row);
    const int64_t rows = c.lengths[i] + shape.tail;
    for (int64_t t = 0; t < rows; ++t, ++row) {
      EXPECT(position[row] == t);
      for (int64_t s = 0; s < S; ++s) {
        auto at = [&](int64_t time, bool is_label) {
          const int64_t frame = time - c.delays[s];
          const bool real = time < rows && frame >= 0 && frame < c.lengths[i];
          const int64_t from = (args.meta.offsets[i] + frame) * S + s;
          if (is_label) EXPECT(out_weight[row * S + s] == (real ? weight[from] : 0.0f));
          return real ? static_cast<Out>(ids[from] + 1000 * s) : static_cast<Out>(-1 - s);
        };
        EXPECT(out[row * S + s] == at(t, false));
        EXPECT(labels[row * S + s] == at(t + 1, true));
      }
    }
  }
  EXPECT(row == shape.num_rows);
  EXPECT(cu[n] == row);
}

TEST(delay_pack_matches_its_definition) {
  const std::vector<Case> cases = {
      {{5, 0, 3}, {0, 1, 2}, false},
      {{5, 0, 3}, {0, 1, 2}, true},
      {{1, 2, 3000, 1}, {4, 0, 9}, false},
      {{2000}, {0}, false},
      {{7, 900, 2}, {3, 3, 3, 3}, true},
      {{0, 0}, {2, 5}, false},
      {{0, 0}, {2, 5}, true},
      {{}, {1}, false},
      {std::vector<int64_t>(999, 2), {0, 1}, false},
      {{20000}, {0, 1, 2, 3, 4, 5, 6, 7, 8}, false},
  };
  for (const Case& c : cases) {
    for (int threads : {1, 3}) {
      compare<int32_t, int32_t>(c, threads);
      compare<int32_t, int64_t>(c, threads);
      compare<int64_t, int32_t>(c, threads);
      compare<int64_t, int64_t>(c, threads);
    }
  }
}

TEST(delay_pack_refuses_bad_tables) {
  auto error = [](const Case& c, auto&& change) {
    DelayPackShape given;
    std::vector<int64_t> table = table_of(c, given);
    change(table, given);
    return testing::error_of([&] { delay_pack_plan(table.data(), static_cast<int64_t>(table.size()), given); });
  };
  using Table = std::vector<int64_t>&;
  using Shape = DelayPackShape&;
  const auto says = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  const Case c{{4, 2}, {0, 1}, false};
  EXPECT(error(c, [](Table, Shape) {}).empty());
  EXPECT(says(error(c, [](Table t, Shape) { t.pop_back(); }), "table has 10 entries"));
  EXPECT(says(error(c, [](Table t, Shape) { t[1] = 7; }), "offsets[2] = 6 after 7"));
  EXPECT(says(error(c, [](Table t, Shape) { t[2] = 7; }), "the last of offsets must be the number of frames, 6"));
  EXPECT(says(error(c, [](Table t, Shape) { t[2] = std::numeric_limits<int64_t>::max(); }), "the last of offsets"));
  EXPECT(says(error(c, [](Table t, Shape) { t[3] = -1; }), "delays[0]"));
  EXPECT(says(error(c, [](Table, Shape s) { s.tail = 2; }), "tail must be 0 to 1 rows"));
  EXPECT(says(error(c, [](Table, Shape s) { s.num_streams = 65; }), "1 to 64 streams; got 65"));
  EXPECT(says(error(c, [](Table t, Shape s) { t[3] = s.tail = 2147483647; }), "2^31 - 1 rows"));
}

}  // namespace
}  // namespace speechlm
