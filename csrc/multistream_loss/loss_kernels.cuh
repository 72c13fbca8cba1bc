// Shared by the CUDA kernels of multistream_loss: the table of streams on the device, the workspace between the
// kernels, and the arithmetic of one logit.
#pragma once

#include <cmath>

#include "common/cuda/vec.cuh"
#include "multistream_loss/rows/loss_terms.h"

namespace speechlm {

constexpr int kLossTile = 8;       // streams of equal slices that one pass over a row serves
constexpr int kGradientRows = 16;  // rows whose logits and gradients a thread of the gradient kernel holds
constexpr int kGradientColumns = 128;
constexpr int32_t kTargetOutside = -1;  // a live target outside its scope: its loss is NaN
constexpr int32_t kNotLive = -2;
// Consecutive columns that a thread of the statistics kernel takes at a time: one or two loads of 16 bytes.
template <typename Acc>
constexpr int kBatch = sizeof(Acc) == sizeof(double) ? 4 : 8;

// A slice, and the number of columns of the scope before it.
struct PlacedSlice {
  int64_t id;
  int64_t begin;
  int64_t count;
  int64_t before;
};

// In device memory. A tile is up to kLossTile streams that have the same slices.
struct LossTable {
  const LossStream* streams = nullptr;   // [num_streams]
  const PlacedSlice* slices = nullptr;   // in the order of args.slices
  const int64_t* tile_begins = nullptr;  // [num_tiles + 1] of members
  const int64_t* members = nullptr;      // [num_streams] the streams, tile by tile
  int64_t num_tiles = 0;
};

// The pieces of the workspace.
template <typename Acc>
struct LossWorkspace {
  int64_t* table = nullptr;
  // [num_rows, num_streams]. In a tile that shares exponentials, `largest` is that of z itself for all its streams, and
  // NaN in a row where none of them is live.
  LossTerms<Acc>* terms = nullptr;
  double* loss = nullptr;      // [num_rows, num_streams] coef * loss
  int32_t* target = nullptr;   // [num_rows, num_streams] its column, or one of the two constants above
  uint8_t* correct = nullptr;  // [num_rows, num_streams]
  Acc* partials = nullptr;     // [num_splits, num_sums] column sums of each split of the rows
  int64_t split_rows = 0;      // a multiple of kGradientRows
  int64_t num_splits = 0;
  // The factorised softmax (see kMaxBiasRange); null where it is not used.
  Acc* factors = nullptr;        // [num_bias, num_columns] exp(b - top), inside the scopes
  Acc* tops = nullptr;           // [num_streams] the largest bias
  uint8_t* is_narrow = nullptr;  // [num_streams] whether the bias allows it
};

// Whether the streams of a tile share the exponentials of a row. It depends on values that only the device knows.
template <typename Acc>
__device__ inline bool shares_exponentials(const LossTable& table, const LossWorkspace<Acc>& w, int64_t tile) {
  const int64_t first = table.tile_begins[tile], last = table.tile_begins[tile + 1];
  if (w.factors == nullptr || last - first < 2) return false;
  for (int64_t m = first; m < last; ++m) {
    if (w.is_narrow[table.members[m]] == 0) return false;
  }
  return true;
}

// e^x for x <= 0, by way of 2^x: fewer instructions than expf, and an error that is no larger than that of rounding a
// logit of the size of x, which every y = z + bias has.
__device__ inline float exponential(float x) { return exp2f(x * 1.44269504088896341f); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }

template <typename Acc>
struct Softcap {
  Acc limit;
  Acc inverse;
  Acc tangent = 0;  // tanh of the latest logit

  __device__ explicit Softcap(double softcap)
      : limit(static_cast<Acc>(softcap)), inverse(static_cast<Acc>(softcap > 0 ? 1 / softcap : 0)) {}
};

// The logit that a stream sees.
template <bool kCap, typename Acc>
__device__ inline Acc logit_of(Acc z, Acc bias, Softcap<Acc>& cap) {
  if (!kCap) return z + bias;
  cap.tangent = hyperbolic_tangent((z + bias) * cap.inverse);
  return cap.limit * cap.tangent;
}

template <typename T>
void launch_factors(const LossRowsArgs<T>& args, const LossTable& table, const LossWorkspace<Accumulator<T>>& w,
                    cudaStream_t stream);
template <typename T>
void launch_statistics(const LossRowsArgs<T>& args, const LossTable& table, const LossWorkspace<Accumulator<T>>& w,
                       cudaStream_t stream);
template <typename T>
void launch_gradient(const LossRowsArgs<T>& args, const LossTable& table, const LossWorkspace<Accumulator<T>>& w,
                     cudaStream_t stream);

}  // namespace speechlm
