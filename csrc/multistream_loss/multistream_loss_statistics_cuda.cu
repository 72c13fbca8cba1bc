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

// A batch of a thread: columns [at, at + kBatch), of which those in [begin, end) belong to a slice.
struct Batch {
  int64_t at;
  int64_t begin;
  int64_t end;

  template <typename Acc>
  __device__ bool is_whole() const {
    return begin <= at && at + kBatch<Acc> <= end;
  }
  __device__ bool has(int i) const { return begin <= at + i && at + i < end; }
};

// Calls f for the thread's batches of all slices.
template <typename Acc, typename Function>
__device__ inline void for_each_batch(const PlacedSlice* slices, int64_t num_slices, const Function& f) {
  constexpr int64_t kStep = static_cast<int64_t>(kThreads) * kBatch<Acc>;
  for (int64_t s = 0; s < num_slices; ++s) {
    const int64_t begin = slices[s].begin, end = begin + slices[s].count;
    int64_t at = begin - begin % kBatch<Acc> + static_cast<int64_t>(threadIdx.x) * kBatch<Acc>;
    for (; at < end; at += kStep) f(Batch{at, begin, end});
  }
}

// `out` = the batch's columns of a row, `outside` for those of no slice, which are not read. `vectors`: whether batches
// are aligned to 16 bytes.
template <typename From, typename Acc>
__device__ inline void load(const From* row, const Batch& batch, bool vectors, Acc outside, Acc (&out)[kBatch<Acc>]) {
  constexpr int kWidth = 16 / sizeof(From);
  if (vectors && batch.is_whole<Acc>()) {
#pragma unroll
    for (int first = 0; first < kBatch<Acc>; first += kWidth) {
      const auto part = *reinterpret_cast<const Vec<From>*>(row + batch.at + first);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) out[first + i] = widen(part.v[i]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kBatch<Acc>; ++i) out[i] = batch.has(i) ? static_cast<Acc>(widen(row[batch.at + i])) : outside;
}

template <typename T>
__device__ inline bool loads_vectors(const LossRowsArgs<T>& a) {
  return a.num_columns % kBatch<Accumulator<T>> == 0 && is_aligned(a.logits) && is_aligned(a.bias);
}

// Adds a batch of logits; `bias` is the stream's row, or null.
template <bool kWhole, bool kCap, bool kExtra, typename Acc>
__device__ inline void update(SoftmaxSums<Acc>& soft, const Acc (&z)[kBatch<Acc>], const Acc* bias, const Batch& batch,
                              bool vectors, Softcap<Acc>& cap) {
  Acc y[kBatch<Acc>], added[kBatch<Acc>];
  if (bias != nullptr) {
    load(bias, batch, vectors, Acc{0}, added);
  } else {
#pragma unroll
    for (int i = 0; i < kBatch<Acc>; ++i) added[i] = 0;
  }
  Acc largest = soft.largest;
#pragma unroll
  for (int i = 0; i < kBatch<Acc>; ++i) {
    y[i] = kWhole || batch.has(i) ? logit_of<kCap>(z[i], added[i], cap) : static_cast<Acc>(-INFINITY);
    largest = larger(largest, y[i]);
  }
  rescale_to<kExtra>(soft, largest);
  const Acc origin = origin_of(largest);
#pragma unroll
  for (int i = 0; i < kBatch<Acc>; ++i) {
    const Acc x = y[i] - origin;
    const Acc e = exponential(x);
    soft.total += e;
    if (kExtra) {
      soft.weighted += e * factor_of(x);
      if (kWhole || batch.has(i)) soft.all += y[i];
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
__device__ __forceinline__ void read_row(const LossRowsArgs<T>& a, const LossTable& table, const T* row,
                                         const PlacedSlice* slices, int64_t num_slices, unsigned live, int member,
                                         SoftmaxSums<Accumulator<T>>* parts) {
  using Acc = Accumulator<T>;
  const int thread = static_cast<int>(threadIdx.x);
  const bool vectors = loads_vectors(a);
  Softcap<Acc> cap(a.options.softcap);
  const int only = __ffs(static_cast<int>(live)) - 1;
  SoftmaxSums<Acc> soft[kTile];
  const Acc* bias[kTile];
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    const int64_t k = __shfl_sync(kFullMask, member, kTile == 1 ? only : i);
    const int64_t of = table.streams[k].bias;
    bias[i] = of < 0 ? nullptr : a.bias + of * a.num_columns;
  }
  const auto is_live = [&](int i) { return kTile == 1 || (live >> i & 1u) != 0; };
  const auto read = [&](auto whole, const Batch& batch) {
    constexpr bool kWhole = decltype(whole)::value;
    Acc z[kBatch<Acc>];
    load(row, batch, vectors, Acc{0}, z);
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (is_live(i)) update<kWhole, kCap, kExtra>(soft[i], z, bias[i], batch, vectors, cap);
    }
  };
  for_each_batch<Acc>(slices, num_slices, [&](const Batch& batch) {
    if (batch.is_whole<Acc>()) {
      read(std::true_type{}, batch);
    } else {
      read(std::false_type{}, batch);
    }
  });
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    if (!is_live(i)) continue;
    across_warp<kExtra>(soft[i]);
    if (thread % 32 == 0) parts[(kTile == 1 ? only : i) * kWarps + thread / 32] = soft[i];
  }
}

// The same for a tile that shares exponentials (see kMaxBiasRange): the row's maximum first, then one exponential per
// column, and one product per column and stream. Returns the maximum; a part has the sum of the products as its total,
// and the largest product in place of a largest logit.
template <typename T>
__device__ __forceinline__ Accumulator<T> read_row_shared(const LossRowsArgs<T>& a, const LossTable& table,
                                                          const LossWorkspace<Accumulator<T>>& w, const T* row,
                                                          const PlacedSlice* slices, int64_t num_slices, unsigned live,
                                                          int member, Accumulator<T>* warps,
                                                          SoftmaxSums<Accumulator<T>>* parts) {
  using Acc = Accumulator<T>;
  const int thread = static_cast<int>(threadIdx.x);
  const bool vectors = loads_vectors(a);
  constexpr Acc kNothing = static_cast<Acc>(-INFINITY);
  Acc largest = kNothing;
  for_each_batch<Acc>(slices, num_slices, [&](const Batch& batch) {
    Acc z[kBatch<Acc>];
    load(row, batch, vectors, kNothing, z);
#pragma unroll
    for (int i = 0; i < kBatch<Acc>; ++i) largest = larger(largest, z[i]);
  });
  largest = warp_reduce(largest, [](Acc x, Acc y) { return larger(x, y); });
  if (thread % 32 == 0) warps[thread / 32] = largest;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) largest = larger(largest, warps[i]);

  Acc total[kLossTile], top[kLossTile];
  const Acc* factors[kLossTile];
#pragma unroll
  for (int i = 0; i < kLossTile; ++i) {
    const int64_t of = table.streams[__shfl_sync(kFullMask, member, i)].bias;
    factors[i] = of < 0 ? nullptr : w.factors + of * a.num_columns;
    total[i] = top[i] = 0;
  }
  for_each_batch<Acc>(slices, num_slices, [&](const Batch& batch) {
    Acc e[kBatch<Acc>];
    load(row, batch, vectors, kNothing, e);
#pragma unroll
    for (int i = 0; i < kBatch<Acc>; ++i) e[i] = exponential(e[i] - largest);
#pragma unroll
    for (int i = 0; i < kLossTile; ++i) {
      if ((live >> i & 1u) == 0) continue;
      Acc factor[kBatch<Acc>];
      if (factors[i] != nullptr) {
        load(factors[i], batch, vectors, Acc{0}, factor);
      } else {
#pragma unroll
        for (int j = 0; j < kBatch<Acc>; ++j) factor[j] = 1;
      }
#pragma unroll
      for (int j = 0; j < kBatch<Acc>; ++j) {
        const Acc product = e[j] * factor[j];
        total[i] += product;
        top[i] = larger(top[i], product);
      }
    }
  });
#pragma unroll
  for (int i = 0; i < kLossTile; ++i) {
    if ((live >> i & 1u) == 0) continue;
    const Acc sum = warp_sum(total[i]);
    const Acc likeliest = warp_reduce(top[i], [](Acc x, Acc y) { return larger(x, y); });
    if (thread % 32 != 0) continue;
    parts[i * kWarps + thread / 32].total = sum;
    parts[i * kWarps + thread / 32].largest = likeliest;
  }
  return largest;
}

// The column of a token's target, or kTargetOutside.
template <typename T>
__device__ inline int64_t find_target(const LossRowsArgs<T>& a, const LossTable& table, const LossStream& s,
                                      int64_t at) {
  const int64_t id = a.targets[at];
  for (int64_t i = 0; i < s.num_slices; ++i) {
    const PlacedSlice slice = table.slices[s.first_slice + i];
    if (id >= slice.id && id - slice.id < slice.count) return slice.begin + (id - slice.id);
  }
  return kTargetOutside;
}

// From the sums of a softmax to the loss of stream k in the chunk's row r, and the terms of its gradient, in which
// `origin` is taken off the logits.
template <typename T>
__device__ inline void record(const LossRowsArgs<T>& a, const LossStream& s, const LossWorkspace<Accumulator<T>>& w,
                              const SoftmaxSums<Accumulator<T>>& soft, int64_t r, int64_t k, int64_t column,
                              Accumulator<T> at_target, bool is_correct, Accumulator<T> origin) {
  using Acc = Accumulator<T>;
  const int64_t at = a.rows[r] * a.num_targets + s.index;
  const Acc coef_nll = a.coef_nll != nullptr ? a.coef_nll[at] : Acc{0};
  const TokenLoss<Acc> token = token_loss(soft, at_target, s.width, a.options, a.coef[at], coef_nll);
  if (a.token_nll != nullptr) a.token_nll[at] = token.nll;
  if (a.token_entropy != nullptr) a.token_entropy[at] = token.log_total - soft.weighted / soft.total;
  const int64_t here = r * a.num_streams + k;
  w.loss[here] = token.loss;
  w.correct[here] = is_correct ? 1 : 0;
  w.target[here] = static_cast<int32_t>(column);
  w.terms[here] = token.terms;
  w.terms[here].largest = origin;
}

// From the parts of read_row.
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
  const int64_t column = find_target(a, table, s, a.rows[r] * a.num_targets + s.index);
  Softcap<Acc> cap(a.options.softcap);
  Acc at_target = static_cast<Acc>(NAN);
  if (column >= 0) {
    const Acc bias = s.bias < 0 ? Acc{0} : a.bias[s.bias * a.num_columns + column];
    at_target = logit_of<kCap>(widen(a.logits[r * a.num_columns + column]), bias, cap);
  }
  record(a, s, w, soft, r, k, column, at_target, at_target == largest, largest);
}

// From the parts of read_row_shared; `largest` is of the logits without bias.
template <typename T>
__device__ inline void finish_shared(const LossRowsArgs<T>& a, const LossTable& table,
                                     const LossWorkspace<Accumulator<T>>& w, const SoftmaxSums<Accumulator<T>>* parts,
                                     int64_t r, int64_t k, Accumulator<T> largest) {
  using Acc = Accumulator<T>;
  const LossStream& s = table.streams[k];
  const int64_t column = find_target(a, table, s, a.rows[r] * a.num_targets + s.index);
  SoftmaxSums<Acc> soft;
  soft.largest = largest + w.tops[k];
  Acc likeliest = 0;
  for (int i = 0; i < kWarps; ++i) {
    soft.total += parts[i].total;
    likeliest = larger(likeliest, parts[i].largest);
  }
  Acc at_target = static_cast<Acc>(NAN);
  bool is_correct = false;
  if (column >= 0) {
    const int64_t at_bias = s.bias * a.num_columns + column;
    const Acc z = widen(a.logits[r * a.num_columns + column]);
    is_correct = exponential(z - largest) * (s.bias < 0 ? Acc{1} : w.factors[at_bias]) == likeliest;
    at_target = z + (s.bias < 0 ? Acc{0} : a.bias[at_bias]);
  }
  record(a, s, w, soft, r, k, column, at_target, is_correct, largest);
}

// Minimum resident blocks per multiprocessor, for __launch_bounds__: on sm_100 a fourth would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMinPlainBlocks = 3;
#else
constexpr int kMinPlainBlocks = 4;
#endif
template <typename T, bool kCap, bool kExtra>
constexpr int kMinBlocksPerSm =
    sizeof(Accumulator<T>) == sizeof(double) ? 1 : (kCap ? 2 : (kExtra ? 3 : kMinPlainBlocks));

// kExtra: with the sums that smoothing and entropy need.
template <typename T, bool kCap, bool kExtra>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm<T, kCap, kExtra>)
    statistics_kernel(const LossRowsArgs<T> a, const LossTable table, const LossWorkspace<Accumulator<T>> w) {
  using Acc = Accumulator<T>;
  SX_SHARED(SoftmaxSums<Acc>, parts, kLossTile * kWarps);
  SX_SHARED(Acc, warps, kWarps);
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
      const int64_t here = r * a.num_streams + member;
      if (static_cast<int>(threadIdx.x) < count && !is_live) {
        w.loss[here] = is_row ? 0.0 : static_cast<double>(NAN);
        w.correct[here] = 0;
        w.target[here] = kNotLive;
        w.terms[here] = {static_cast<Acc>(NAN), 0, 0, 0};
      }
      if (live == 0) continue;
      const LossStream& any = table.streams[table.members[first]];
      const PlacedSlice* slices = table.slices + any.first_slice;
      const bool shares = !kCap && !kExtra && shares_exponentials(table, w, t);
      Acc largest = 0;
      if (shares) {
        largest = read_row_shared(a, table, w, row, slices, any.num_slices, live, member, warps, parts);
      } else if ((live & (live - 1)) == 0) {
        read_row<1, kCap, kExtra>(a, table, row, slices, any.num_slices, live, member, parts);
      } else {
        read_row<kLossTile, kCap, kExtra>(a, table, row, slices, any.num_slices, live, member, parts);
      }
      __syncthreads();
      if (threadIdx.x < 32 && is_live && shares) {
        finish_shared(a, table, w, parts + lane * kWarps, r, member, largest);
      } else if (threadIdx.x < 32 && is_live) {
        finish<kCap, kExtra>(a, table, w, parts + lane * kWarps, r, member);
      } else if (static_cast<int>(threadIdx.x) < count && shares) {
        w.terms[here].largest = largest;
      }
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
