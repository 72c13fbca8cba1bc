// The first kernel of multistream_loss on the GPU: a block per row, an online softmax per stream. Streams of equal
// slices are taken in tiles, so that the row is read once for all of them. Bytes that must move: the chunk of logits,
// once for every tile that a row has live; the streams' biases are the same for all rows and come from the caches.
#include <type_traits>

#include "common/cuda/warp.cuh"
#include "multistream_loss/loss_kernels.cuh"

namespace speechlm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Independent loads per thread.
template <typename Acc>
constexpr int kLoadsInFlight = sizeof(Acc) == sizeof(double) ? 4 : 8;

// Passes over NaN, which the sums find.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// Nothing but -inf so far: any finite number in place of the maximum gives sums of 0.
template <typename Acc>
__device__ inline Acc origin_of(Acc largest) {
  return largest == static_cast<Acc>(-INFINITY) ? Acc{0} : largest;
}

// The exponent as a factor: beside the maximum's 1, e^-87 counts for nothing, and 0 * -inf would be NaN.
template <typename Acc>
__device__ inline Acc factor_of(Acc x) {
  return larger(x, Acc{-87});
}

// Rescales the running sums to a new maximum.
template <bool kExtra, typename Acc>
__device__ inline void rescale_to(SoftmaxSums<Acc>& soft, Acc largest) {
  const Acc shift = soft.largest - origin_of(largest);
  const Acc factor = exponential(shift);
  if (kExtra) soft.weighted = factor * (soft.weighted + factor_of(shift) * soft.total);
  soft.total *= factor;
  soft.largest = largest;
}

// Adds logits z[0], z[1], ... of columns that are kThreads apart, `count` of them where not kWhole.
template <bool kWhole, bool kCap, bool kExtra, typename Acc>
__device__ inline void update(SoftmaxSums<Acc>& soft, const Acc (&z)[kLoadsInFlight<Acc>], const Acc* bias, int count,
                              Softcap<Acc>& cap) {
  Acc y[kLoadsInFlight<Acc>];
  Acc largest = soft.largest;
#pragma unroll
  for (int i = 0; i < kLoadsInFlight<Acc>; ++i) {
    const bool is_there = kWhole || i < count;
    y[i] = is_there ? logit_of<kCap>(z[i], bias != nullptr ? bias[i * kThreads] : Acc{0}, cap)
                    : static_cast<Acc>(-INFINITY);
    largest = larger(largest, y[i]);
  }
  rescale_to<kExtra>(soft, largest);
  const Acc origin = origin_of(largest);
#pragma unroll
  for (int i = 0; i < kLoadsInFlight<Acc>; ++i) {
    const Acc x = y[i] - origin;
    const Acc e = exponential(x);
    soft.total += e;
    if (kExtra) {
      soft.weighted += e * factor_of(x);
      if (kWhole || i < count) soft.all += y[i];
    }
  }
}

// The warp's softmax, in its first lane.
template <bool kExtra, typename Acc>
__device__ inline void across_warp(SoftmaxSums<Acc>& soft) {
  const Acc largest = warp_reduce(soft.largest, [](Acc a, Acc b) { return larger(a, b); });
  rescale_to<kExtra>(soft, largest);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    soft.total += __shfl_down_sync(kFullMask, soft.total, step);
    if (kExtra) {
      soft.weighted += __shfl_down_sync(kFullMask, soft.weighted, step);
      soft.all += __shfl_down_sync(kFullMask, soft.all, step);
    }
  }
}

// One reading of the row for the streams of a tile whose bits in `live` are set; with kTile == 1 that is a single one.
// `member` is, in lane i, the tile's stream i. The result of stream i and this warp goes to parts[i * kWarps + warp].
template <int kTile, bool kCap, bool kExtra, typename T>
__device__ __forceinline__ void read_row(const LossRowsArgs<T>& a, const T* row, const PlacedSlice* slices,
                                         int64_t num_slices, unsigned live, int member,
                                         SoftmaxSums<Accumulator<T>>* parts) {
  using Acc = Accumulator<T>;
  const int thread = static_cast<int>(threadIdx.x);
  Softcap<Acc> cap(a.options.softcap);
  const int only = __ffs(static_cast<int>(live)) - 1;
  SoftmaxSums<Acc> soft[kTile];
  const Acc* bias[kTile];
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    const int64_t k = __shfl_sync(kFullMask, member, kTile == 1 ? only : i);
    bias[i] = a.bias != nullptr ? a.bias + k * a.num_columns : nullptr;
  }
  const auto is_live = [&](int i) { return kTile == 1 || (live >> i & 1u) != 0; };
  const auto read = [&](auto whole, int64_t column, int count) {
    constexpr bool kWhole = decltype(whole)::value;
    Acc z[kLoadsInFlight<Acc>];
#pragma unroll
    for (int i = 0; i < kLoadsInFlight<Acc>; ++i)
      z[i] = kWhole || i < count ? widen(row[column + i * kThreads]) : Acc{0};
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (!is_live(i)) continue;
      update<kWhole, kCap, kExtra>(soft[i], z, bias[i] != nullptr ? bias[i] + column : nullptr, count, cap);
    }
  };
  for (int64_t s = 0; s < num_slices; ++s) {
    const int64_t begin = slices[s].begin, count = slices[s].count;
    int64_t at = thread;
    for (; at + (kLoadsInFlight<Acc> - 1) * kThreads < count; at += kLoadsInFlight<Acc> * kThreads) {
      read(std::true_type{}, begin + at, kLoadsInFlight<Acc>);
    }
    if (at < count) read(std::false_type{}, begin + at, static_cast<int>((count - at + kThreads - 1) / kThreads));
  }
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    if (!is_live(i)) continue;
    across_warp<kExtra>(soft[i]);
    if (thread % 32 == 0) parts[(kTile == 1 ? only : i) * kWarps + thread / 32] = soft[i];
  }
}

// From the warps' parts to the loss of stream k in the chunk's row r, and the terms of its gradient.
template <bool kCap, bool kExtra, typename T>
__device__ inline void finish(const LossRowsArgs<T>& a, const LossTable& table, const LossWorkspace<Accumulator<T>>& w,
                              const SoftmaxSums<Accumulator<T>>* parts, int64_t r, int64_t k) {
  using Acc = Accumulator<T>;
  SoftmaxSums<Acc> soft;
  Acc largest = soft.largest;
  for (int i = 0; i < kWarps; ++i) largest = larger(largest, parts[i].largest);
  soft.largest = largest;
  for (int i = 0; i < kWarps; ++i) {
    SoftmaxSums<Acc> part = parts[i];
    rescale_to<kExtra>(part, largest);
    soft.total += part.total;
    soft.weighted += part.weighted;
    soft.all += part.all;
  }
  const LossStream& s = table.streams[k];
  const int64_t at = a.rows[r] * a.num_targets + s.index;
  const int64_t id = a.targets[at];
  Softcap<Acc> cap(a.options.softcap);
  Acc at_target = 0;
  int32_t target = kTargetOutside;
  for (int64_t i = 0; i < s.num_slices; ++i) {
    const PlacedSlice slice = table.slices[s.first_slice + i];
    if (id < slice.id || id - slice.id >= slice.count) continue;
    const int64_t column = slice.begin + (id - slice.id);
    target = static_cast<int32_t>(column);
    const Acc bias = a.bias != nullptr ? a.bias[k * a.num_columns + column] : Acc{0};
    at_target = logit_of<kCap>(widen(a.logits[r * a.num_columns + column]), bias, cap);
  }
  const Acc coef_nll = a.coef_nll != nullptr ? a.coef_nll[at] : Acc{0};
  const TokenLoss<Acc> token = token_loss(soft, at_target, s.width, a.options, a.coef[at], coef_nll);
  if (a.token_nll != nullptr) a.token_nll[at] = token.nll;
  if (a.token_entropy != nullptr) a.token_entropy[at] = token.log_total - soft.weighted / soft.total;
  const int64_t here = r * a.num_streams + k;
  w.loss[here] = token.loss;
  w.correct[here] = token.is_correct ? 1 : 0;
  w.target[here] = target;
  w.terms[here] = token.terms;
}

// Minimum resident blocks per multiprocessor, for __launch_bounds__.
template <typename T, bool kCap, bool kExtra>
constexpr int kMinBlocksPerSm = sizeof(Accumulator<T>) == sizeof(double) ? 1 : (kCap ? 2 : (kExtra ? 3 : 4));

// kExtra: with the sums that smoothing and entropy need.
template <typename T, bool kCap, bool kExtra>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm<T, kCap, kExtra>)
    statistics_kernel(const LossRowsArgs<T> a, const LossTable table, const LossWorkspace<Accumulator<T>> w) {
  using Acc = Accumulator<T>;
  SX_SHARED(SoftmaxSums<Acc>, parts, kLossTile * kWarps);
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int64_t r = blockIdx.x; r < a.num_rows; r += gridDim.x) {
    const int64_t n = a.rows[r];
    const bool is_row = n >= 0 && n < a.num_tokens;
    const T* row = a.logits + r * a.num_columns;
    for (int64_t t = 0; t < table.num_tiles; ++t) {
      const int64_t first = table.tile_begins[t];
      const auto count = static_cast<int>(table.tile_begins[t + 1] - first);
      const int member = lane < count ? static_cast<int>(table.members[first + lane]) : 0;
      const bool is_live = lane < count && is_row && a.live[n * a.num_targets + table.streams[member].index] != 0;
      const unsigned live = __ballot_sync(kFullMask, is_live);  // the same in every warp
      if (static_cast<int>(threadIdx.x) < count && !is_live) {
        const int64_t here = r * a.num_streams + member;
        w.loss[here] = is_row ? 0.0 : static_cast<double>(NAN);
        w.correct[here] = 0;
        w.target[here] = kNotLive;
      }
      if (live == 0) continue;
      const LossStream& any = table.streams[table.members[first]];
      const PlacedSlice* slices = table.slices + any.first_slice;
      if ((live & (live - 1)) == 0) {
        read_row<1, kCap, kExtra>(a, row, slices, any.num_slices, live, member, parts);
      } else {
        read_row<kLossTile, kCap, kExtra>(a, row, slices, any.num_slices, live, member, parts);
      }
      __syncthreads();
      if (threadIdx.x < 32 && is_live) finish<kCap, kExtra>(a, table, w, parts + lane * kWarps, r, member);
      __syncthreads();  // before the next tile's parts take their place
    }
  }
}

}  // namespace

template <typename T>
void launch_statistics(const LossRowsArgs<T>& args, const LossTable& table, const LossWorkspace<Accumulator<T>>& w,
                       cudaStream_t stream) {
  const bool extra = args.options.label_smoothing > 0 || args.token_entropy != nullptr;
  const auto plain = extra ? &statistics_kernel<T, false, true> : &statistics_kernel<T, false, false>;
  const auto capped = extra ? &statistics_kernel<T, true, true> : &statistics_kernel<T, true, false>;
  const auto kernel = args.options.softcap > 0 ? capped : plain;
  SX_LAUNCH(kernel, grid_for(args.num_rows, 1), kThreads, 0, stream, args, table, w);
  cuda_check(cudaGetLastError(), "multistream_loss: launch of the statistics");
}

#define SX_INSTANTIATE(T)                                                                                            \
  template void launch_statistics<T>(const LossRowsArgs<T>&, const LossTable&, const LossWorkspace<Accumulator<T>>&, \
                                     cudaStream_t);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
