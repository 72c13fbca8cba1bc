// multistream_loss on the GPU, from the table of streams to the sums: statistics of every row, gradients in place, and
// then the sums over the rows, in one order whatever the device does.
#include <algorithm>
#include <vector>

#include "multistream_loss/loss_kernels.cuh"
#include "multistream_loss/rows/loss_tiles.h"

namespace speechlm {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPieceWords = 480;       // of the table, so that a kernel's parameters stay below 4 KiB
constexpr int64_t kMinSplitRows = 64;      // four rounds of the gradient kernel for one line of column sums
constexpr int64_t kGradientBlocks = 2048;  // a few rounds of blocks on the largest devices

struct TablePiece {
  int64_t first;
  int64_t count;
  int64_t words[kPieceWords];
};

__global__ void __launch_bounds__(kThreads) table_kernel(const TablePiece piece, int64_t* table) {
  for (int64_t i = threadIdx.x; i < piece.count; i += kThreads) table[piece.first + i] = piece.words[i];
}

// Block k: loss, correct and live targets of stream k.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    totals_kernel(const LossRowsArgs<T> a, const LossTable table, const LossWorkspace<Accumulator<T>> w) {
  SX_SHARED(double, loss, kThreads);
  SX_SHARED(int64_t, correct, kThreads);
  SX_SHARED(int64_t, live, kThreads);
  const auto thread = static_cast<int>(threadIdx.x);
  double my_loss = 0;
  int64_t my_correct = 0, my_live = 0;
  for (int64_t r = thread; r < a.num_rows; r += kThreads) {
    const int64_t at = r * gridDim.x + blockIdx.x;
    my_loss += w.loss[at];
    my_correct += w.correct[at];
    my_live += w.target[at] != kNotLive ? 1 : 0;
  }
  loss[thread] = my_loss;
  correct[thread] = my_correct;
  live[thread] = my_live;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) {
      loss[thread] += loss[thread + half];
      correct[thread] += correct[thread + half];
      live[thread] += live[thread + half];
    }
    __syncthreads();
  }
  if (thread != 0) return;
  const int64_t index = table.streams[blockIdx.x].index;
  a.stream_loss[index] += loss[0];
  a.stream_correct[index] += correct[0];
  a.stream_count[index] += live[0];
}

// Block (x, k): kThreads columns of the scope of stream k, over the splits.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(const LossRowsArgs<T> a, const LossTable table, const LossWorkspace<Accumulator<T>> w) {
  const LossStream& s = table.streams[blockIdx.y];
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (s.sums_row < 0 || place >= s.width) return;
  Accumulator<T> sum = 0;
  for (int64_t split = 0; split < w.num_splits; ++split) sum += w.partials[split * a.num_sums + s.sums + place];
  int64_t i = s.first_slice;
  while (place - table.slices[i].before >= table.slices[i].count) ++i;
  a.column_sums[s.sums_row * a.num_columns + table.slices[i].begin + (place - table.slices[i].before)] += sum;
}

template <typename T>
int64_t num_slices_of(const LossRowsArgs<T>& args) {
  int64_t total = 0;
  for (int64_t k = 0; k < args.num_streams; ++k) total += args.streams[k].num_slices;
  return total;
}

static_assert(sizeof(LossStream) == 7 * sizeof(int64_t) && sizeof(PlacedSlice) == 4 * sizeof(int64_t),
              "the table is an array of int64");

template <typename T>
int64_t table_words(const LossRowsArgs<T>& args) {  // with as many tiles as streams
  return 7 * args.num_streams + 4 * num_slices_of(args) + (args.num_streams + 1) + args.num_streams;
}

// The words of the table; `table` becomes the addresses of its parts if it starts at `base`.
template <typename T>
std::vector<int64_t> build_table(const LossRowsArgs<T>& args, const int64_t* base, LossTable& table) {
  std::vector<int64_t> words;
  words.reserve(table_words(args));
  for (int64_t k = 0; k < args.num_streams; ++k) {
    const LossStream& s = args.streams[k];
    words.insert(words.end(), {s.index, s.first_slice, s.num_slices, s.width, s.bias, s.sums_row, s.sums});
  }
  table.streams = reinterpret_cast<const LossStream*>(base);
  table.slices = reinterpret_cast<const PlacedSlice*>(base + words.size());
  for (int64_t k = 0; k < args.num_streams; ++k) {  // first_slice counts in this order
    int64_t before = 0;
    for (int64_t i = 0; i < args.streams[k].num_slices; ++i) {
      const LossSlice& slice = args.slices[args.streams[k].first_slice + i];
      words.insert(words.end(), {slice.id, slice.begin, slice.count, before});
      before += slice.count;
    }
  }
  std::vector<int64_t> tile_begins, members;
  for (const auto& tile : loss_tiles(args, kLossTile)) {
    tile_begins.push_back(static_cast<int64_t>(members.size()));
    members.insert(members.end(), tile.begin(), tile.end());
  }
  table.num_tiles = static_cast<int64_t>(tile_begins.size());
  tile_begins.push_back(args.num_streams);
  table.tile_begins = base + words.size();
  words.insert(words.end(), tile_begins.begin(), tile_begins.end());
  table.members = base + words.size();
  words.insert(words.end(), members.begin(), members.end());
  return words;
}

void upload(const std::vector<int64_t>& words, int64_t* table, cudaStream_t stream) {
  const auto total = static_cast<int64_t>(words.size());
  for (int64_t first = 0; first < total; first += kPieceWords) {
    TablePiece piece{first, std::min(kPieceWords, total - first), {}};
    std::copy_n(words.begin() + first, piece.count, piece.words);
    SX_LAUNCH(table_kernel, 1u, kThreads, 0, stream, piece, table);
  }
}

// Places the pieces of `w` from `base` on; returns their bytes.
template <typename T>
int64_t layout(void* base, const LossRowsArgs<T>& args, LossWorkspace<Accumulator<T>>& w) {
  using Acc = Accumulator<T>;
  BumpAllocator memory(base);
  const int64_t pairs = args.num_rows * args.num_streams;
  w.table = memory.allocate<int64_t>(table_words(args));
  w.terms = memory.allocate<LossTerms<Acc>>(pairs);
  w.loss = memory.allocate<double>(pairs);
  w.target = memory.allocate<int32_t>(pairs);
  w.correct = memory.allocate<uint8_t>(pairs);
  // Borders that depend on the sizes alone, so that every device adds in the same order.
  const int64_t blocks = ceil_div(args.num_columns, kGradientColumns);
  const int64_t max_splits = std::clamp<int64_t>(kGradientBlocks / std::max<int64_t>(blocks, 1), 1, 64);
  w.split_rows = round_up(std::max(kMinSplitRows, ceil_div(args.num_rows, max_splits)), kGradientRows);
  w.num_splits = ceil_div(args.num_rows, w.split_rows);
  w.partials = args.want_grad && args.num_sums > 0 ? memory.allocate<Acc>(w.num_splits * args.num_sums) : nullptr;
  if (args.num_bias > 0) {
    w.factors = memory.allocate<Acc>(args.num_bias * args.num_columns);
    w.tops = memory.allocate<Acc>(args.num_streams);
    w.is_narrow = memory.allocate<uint8_t>(args.num_streams);
  }
  return memory.used();
}

}  // namespace

template <typename T>
int64_t multistream_loss_workspace(const LossRowsArgs<T>& args) {
  LossWorkspace<Accumulator<T>> w;
  return layout(nullptr, args, w);
}

template <typename T>
void multistream_loss_rows_cuda(const LossRowsArgs<T>& args, void* workspace, int device, void* stream) {
  if (args.num_rows == 0) return;
  SX_CHECK(args.num_columns < (int64_t{1} << 31), "multistream_loss: more than 2^31 - 1 columns in a chunk");
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  LossWorkspace<Accumulator<T>> w;
  layout(workspace, args, w);
  if (args.column_sums == nullptr) w.partials = nullptr;
  LossTable table;
  upload(build_table(args, w.table, table), w.table, on);
  // The other terms need the logits themselves, and a stream by itself has no one to share with.
  const bool plain = !(args.options.softcap > 0 || args.options.label_smoothing > 0) && args.token_entropy == nullptr;
  if (!plain || table.num_tiles == args.num_streams) w.factors = nullptr;
  if (w.factors != nullptr) launch_factors(args, table, w, on);
  launch_statistics(args, table, w, on);
  SX_LAUNCH(totals_kernel<T>, static_cast<unsigned>(args.num_streams), kThreads, 0, on, args, table, w);
  if (args.want_grad) {
    launch_gradient(args, table, w, on);
    if (w.partials != nullptr) {
      int64_t widest = 0;
      for (int64_t k = 0; k < args.num_streams; ++k) widest = std::max(widest, args.streams[k].width);
      const dim3 grid(static_cast<unsigned>(ceil_div(widest, kThreads)), static_cast<unsigned>(args.num_streams));
      SX_LAUNCH(column_sums_kernel<T>, grid, kThreads, 0, on, args, table, w);
    }
  }
  cuda_check(cudaGetLastError(), "multistream_loss: launch of the sums");
}

#define SX_INSTANTIATE(T)                                                 \
  template int64_t multistream_loss_workspace<T>(const LossRowsArgs<T>&); \
  template void multistream_loss_rows_cuda<T>(const LossRowsArgs<T>&, void*, int, void*);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
