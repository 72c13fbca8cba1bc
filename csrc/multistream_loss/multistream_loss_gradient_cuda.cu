// The second kernel of multistream_loss on the GPU: from logits to the sum of all streams' gradients, in place. A
// thread owns a column and holds the logits and gradients of a few rows, so that every stream still sees the logits. It
// owns its column of its split's sums as well: no atomics, the same bits in every run.
#include "multistream_loss/loss_kernels.cuh"

namespace speechlm {
namespace {

constexpr int kRows = kGradientRows;
constexpr int kThreads = kGradientColumns;

// The place of a column in a scope, -1 if it is outside. Slices ascend.
__device__ inline int64_t place_in_scope(const LossTable& table, const LossStream& s, int64_t column) {
  int64_t low = 0, high = s.num_slices;  // the last slice that begins at the column or before is in [low - 1, high - 1]
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (table.slices[s.first_slice + middle].begin <= column) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == 0) return -1;
  const PlacedSlice& slice = table.slices[s.first_slice + low - 1];
  const int64_t at = column - slice.begin;
  return at < slice.count ? slice.before + at : -1;
}

// What a thread of the gradient kernel knows of its column and of the rows that it holds.
template <typename Acc>
struct ColumnRows {
  int64_t column;
  const LossTerms<Acc>* terms;  // in shared memory, [num_streams, kRows]
  const int32_t* targets;       // the same
};

// Adds the gradients of stream k to `grad`; returns their sum over the rows. `bias`: of the column.
template <bool kCap, typename Acc>
__device__ inline Acc add_stream(const ColumnRows<Acc>& at, int64_t k, const Acc (&z)[kRows], Acc bias,
                                 Softcap<Acc>& cap, Acc (&grad)[kRows]) {
  Acc sum = 0;
#pragma unroll
  for (int four = 0; four < kRows; four += 4) {
    const auto target = *reinterpret_cast<const Vec<int32_t, 4>*>(at.targets + k * kRows + four);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (target.v[i] == kNotLive) continue;  // the same for all threads
      const int r = four + i;
      const LossTerms<Acc> of = at.terms[k * kRows + r];
      const Acc y = logit_of<kCap>(z[r], bias, cap);
      Acc value = of.scale * exponential(y - of.largest) - of.minus;
      if (target.v[i] == at.column) value -= of.minus_target;
      if (kCap) value *= 1 - cap.tangent * cap.tangent;  // the slope of the cap
      grad[r] += value;
      sum += value;
    }
  }
  return sum;
}

// The same from the exponentials that the streams of a tile share; `factor`: of the stream and the column. The terms of
// a stream that is not live are 0.
template <typename Acc>
__device__ inline Acc add_stream_from_exponentials(const ColumnRows<Acc>& at, int64_t k, const Acc (&e)[kRows],
                                                   Acc factor, Acc (&grad)[kRows]) {
  Acc sum = 0, hits = 0;
#pragma unroll
  for (int four = 0; four < kRows; four += 4) {
    const auto target = *reinterpret_cast<const Vec<int32_t, 4>*>(at.targets + k * kRows + four);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = four + i;
      const LossTerms<Acc> of = at.terms[k * kRows + r];
      const Acc value = of.scale * e[r];
      sum += value;
      grad[r] += value * factor;
      if (target.v[i] == at.column) {
        grad[r] -= of.minus_target;
        hits += of.minus_target;
      }
    }
  }
  return sum * factor - hits;
}

// Minimum resident blocks per multiprocessor, for __launch_bounds__: by itself the compiler aims at more of them, and
// spills.
template <typename T, bool kCap>
constexpr int kMinBlocksPerSm = sizeof(Accumulator<T>) == sizeof(double) ? 4 : (kCap ? 5 : 6);

// Block (x, y): kThreads columns from x * kThreads on, the rows of split y.
template <typename T, bool kCap>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm<T, kCap>)
    gradient_kernel(const LossRowsArgs<T> a, const LossTable table, const LossWorkspace<Accumulator<T>> w) {
  using Acc = Accumulator<T>;
  SX_DYNAMIC_SHARED(LossTerms<Acc>, terms);  // [num_streams, kRows], and then their targets
  const auto num_streams = static_cast<int>(a.num_streams);
  auto* targets = reinterpret_cast<int32_t*>(terms + num_streams * kRows);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t split_begin = static_cast<int64_t>(blockIdx.y) * w.split_rows;
  const int64_t split_end = min(a.num_rows, split_begin + w.split_rows);
  Softcap<Acc> cap(a.options.softcap);
  uint64_t sharing = 0;  // tiles that share exponentials
  for (int64_t t = 0; t < table.num_tiles; ++t) {
    if (shares_exponentials(table, w, t)) sharing |= uint64_t{1} << t;
  }
  for (int64_t begin = split_begin; begin < split_end; begin += kRows) {
    const auto count = static_cast<int>(min(static_cast<int64_t>(kRows), split_end - begin));
    if (begin > split_begin) __syncthreads();  // all have read the terms of the rows before
    for (int i = static_cast<int>(threadIdx.x); i < num_streams * kRows; i += kThreads) {
      const int r = i / num_streams, k = i % num_streams;  // neighbours in memory for neighbouring threads
      const int64_t from = (begin + r) * a.num_streams + k;
      targets[k * kRows + r] = r < count ? w.target[from] : kNotLive;
      terms[k * kRows + r] = r < count ? w.terms[from] : LossTerms<Acc>{static_cast<Acc>(NAN), 0, 0, 0};
    }
    __syncthreads();
    if (column >= a.num_columns) continue;
    const ColumnRows<Acc> at{column, terms, targets};
    T* logits = a.logits + begin * a.num_columns + column;
    Acc grad[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) grad[r] = 0;
    for (int64_t t = 0; t < table.num_tiles; ++t) {
      const int64_t first = table.tile_begins[t], last = table.tile_begins[t + 1];
      const int64_t place = place_in_scope(table, table.streams[table.members[first]], column);
      if (place < 0) continue;
      const bool shares = (sharing >> t & 1u) != 0;
      Acc z[kRows];  // read again for every tile: the caches have them, and the registers do not
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        z[r] = r < count ? widen(logits[r * a.num_columns]) : Acc{0};
        if (!shares) continue;
        const Acc largest = terms[table.members[first] * kRows + r].largest;
        z[r] = largest == largest ? exponential(z[r] - largest) : Acc{0};
      }
      for (int64_t m = first; m < last; ++m) {
        const int64_t k = table.members[m];
        const LossStream& s = table.streams[k];
        const int64_t at_bias = s.bias * a.num_columns + column;
        Acc sum;
        if (shares) {
          sum = add_stream_from_exponentials(at, k, z, s.bias < 0 ? Acc{1} : w.factors[at_bias], grad);
        } else {
          sum = add_stream<kCap>(at, k, z, s.bias < 0 ? Acc{0} : a.bias[at_bias], cap, grad);
        }
        if (w.partials == nullptr || s.sums_row < 0) continue;
        Acc& partial = w.partials[blockIdx.y * a.num_sums + s.sums + place];
        partial = begin == split_begin ? sum : partial + sum;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < count) narrow(grad[r], logits[r * a.num_columns]);
    }
  }
}

}  // namespace

template <typename T>
void launch_gradient(const LossRowsArgs<T>& args, const LossTable& table, const LossWorkspace<Accumulator<T>>& w,
                     cudaStream_t stream) {
  const auto kernel = args.options.softcap > 0 ? &gradient_kernel<T, true> : &gradient_kernel<T, false>;
  const auto columns = static_cast<unsigned>(ceil_div(args.num_columns, kThreads));
  const auto splits = static_cast<unsigned>(w.num_splits);
  // At most 36 KiB, for 64 streams of double: within the default limit of every device.
  const size_t shared = args.num_streams * kRows * (sizeof(LossTerms<Accumulator<T>>) + sizeof(int32_t));
  SX_LAUNCH(kernel, dim3(columns, splits), kThreads, shared, stream, args, table, w);
  cuda_check(cudaGetLastError(), "multistream_loss: launch of the gradient");
}

#define SX_INSTANTIATE(T)                                                                                          \
  template void launch_gradient<T>(const LossRowsArgs<T>&, const LossTable&, const LossWorkspace<Accumulator<T>>&, \
                                   cudaStream_t);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
