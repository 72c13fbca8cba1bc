// multistream_loss on the CPU: blocks of rows on threads, and their sums in one order.
#include "multistream_loss/multistream_loss.h"

#include <algorithm>
#include <vector>

#include "common/cpu/parallel.h"
#include "multistream_loss/rows/loss_row_block.h"

namespace speechlm {

namespace {

constexpr int64_t kMinBlockRows = 8;
constexpr int64_t kMaxBlocks = 16;
constexpr int64_t kSmall = 1 << 16;      // logits, for which waking another thread takes longer than it saves
constexpr int64_t kSumsBytes = 2 << 20;  // of all blocks' column sums together

// Adds the blocks' sums of one stream to its row of column_sums.
template <typename T>
void add_blocks(const LossRowsArgs<T>& a, const LossStream& s, const T* sums, int64_t blocks, int threads) {
  T* out = a.column_sums + s.sums_row * a.num_columns;
  for (int64_t i = 0; i < s.num_slices; sums += a.slices[s.first_slice + i++].count) {
    const LossSlice& slice = a.slices[s.first_slice + i];
    parallel_for(slice.count, 4096, threads, [&](int64_t begin, int64_t end) {
      for (int64_t block = 0; block < blocks; ++block) {
        const T* from = sums + block * a.num_sums;
        for (int64_t j = begin; j < end; ++j) out[slice.begin + j] += from[j];
      }
    });
  }
}

}  // namespace

template <typename T>
void multistream_loss_rows_cpu(const LossRowsArgs<T>& a, int threads) {
  if (a.num_rows == 0) return;
  const bool with_sums = a.want_grad && a.column_sums != nullptr && a.num_sums > 0;
  const int64_t bytes = with_sums ? a.num_sums * static_cast<int64_t>(sizeof(T)) : 1;
  const int64_t max_blocks = std::clamp<int64_t>(kSumsBytes / bytes, 2, kMaxBlocks);
  const int64_t block_rows = std::max(kMinBlockRows, ceil_div(a.num_rows, max_blocks));
  const int64_t blocks = ceil_div(a.num_rows, block_rows);
  const LossFactors<T> factors(a, loss_loops<T>());
  std::vector<T> sums(with_sums ? blocks * a.num_sums : 0);
  std::vector<std::vector<double>> loss(blocks);
  std::vector<std::vector<int64_t>> correct(blocks), count(blocks);
  if (a.num_rows * a.num_columns < kSmall) threads = 1;
  parallel_for(blocks, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      RowBlock<T> work(a, factors, sums.data() + (with_sums ? block * a.num_sums : 0));
      const int64_t stop = std::min(a.num_rows, (block + 1) * block_rows);
      for (int64_t r = block * block_rows; r < stop; ++r) work.row(r);
      loss[block] = work.loss();
      correct[block] = work.correct();
      count[block] = work.count();
    }
  });
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t k = 0; k < a.num_streams; ++k) {
      const int64_t index = a.streams[k].index;
      a.stream_loss[index] += loss[block][k];
      a.stream_correct[index] += correct[block][k];
      a.stream_count[index] += count[block][k];
    }
  }
  for (int64_t k = 0; with_sums && k < a.num_streams; ++k) {
    const LossStream& s = a.streams[k];
    if (s.sums_row >= 0) add_blocks(a, s, sums.data() + s.sums, blocks, threads);
  }
}

template void multistream_loss_rows_cpu<float>(const LossRowsArgs<float>&, int);
template void multistream_loss_rows_cpu<double>(const LossRowsArgs<double>&, int);

}  // namespace speechlm
