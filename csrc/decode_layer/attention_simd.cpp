// decode_attention over one split of the keys, compiled once per instruction set; see common/cpu/simd.h. The heads that
// share keys and values take them one after the other while these are in the first cache.
#include <limits>

#include "decode_layer/lanes.h"
#include "decode_layer/loops.h"

namespace speechlm {
namespace SX_SIMD {
namespace {

// Heads and lanes of a tile of outputs that stays in registers.
#if defined(__AVX512BW__)
constexpr int kTileHeads = 4, kTileLanes = 4;
#else
constexpr int kTileHeads = 2, kTileLanes = 2;
#endif

// Scores of 16 keys, those past `count` minus infinity.
template <typename T>
void score_keys(const SplitArgs<T>& a, int64_t first, int64_t count, bool is_whole) {
  using Acc = Accumulator<T>;
  const int64_t E = a.key_size, padded = padded_lanes(E);
  for (int64_t q = 0; q < a.num_heads; ++q) {
    const Acc* query = a.query + q * padded;
    Lanes<Acc> parts[kLanes];
    for (int64_t k = 0; k < kLanes; ++k) {
      parts[k] = fill(Acc{0});
      if (k >= count) continue;
      const T* key = a.keys + (first + k) * a.key_stride;
      if (is_whole) {
        for (int64_t e = 0; e < E; e += kLanes) parts[k] = multiply_add(load(key + e), load(query + e), parts[k]);
      } else {
        for (int64_t e = 0; e < E; e += kLanes) {
          parts[k] = multiply_add(load_part(key + e, E - e), load(query + e), parts[k]);
        }
      }
    }
    Acc* scores = a.scores + q * kCpuSplit + first;
    store(scores, sums(parts) * fill(a.scale));
    if (a.softcap > 0) {
      for (int64_t k = 0; k < count; ++k) scores[k] = a.softcap * std::tanh(scores[k] / a.softcap);
    }
    for (int64_t k = count; k < kLanes; ++k) scores[k] = -std::numeric_limits<Acc>::infinity();
  }
}

// out = sum of score * value, for kHeads heads and kParts times 16 values.
template <typename T, int kHeads, int kParts, typename Load>
void add_values(const SplitArgs<T>& a, int64_t head, int64_t first, const Load& load_value) {
  using Acc = Accumulator<T>;
  Lanes<Acc> sums[kHeads][kParts];
#pragma GCC unroll 4
  for (int q = 0; q < kHeads; ++q) {
#pragma GCC unroll 4
    for (int f = 0; f < kParts; ++f) sums[q][f] = fill(Acc{0});
  }
  const T* value = a.values + first;
  const Acc* scores = a.scores + head * kCpuSplit;
  for (int64_t k = 0; k < a.count; ++k, value += a.value_stride) {
    Lanes<Acc> v[kParts];
#pragma GCC unroll 4
    for (int f = 0; f < kParts; ++f) v[f] = load_value(value + f * kLanes);
#pragma GCC unroll 4
    for (int q = 0; q < kHeads; ++q) {
      const Lanes<Acc> weight = fill(scores[q * kCpuSplit + k]);
#pragma GCC unroll 4
      for (int f = 0; f < kParts; ++f) sums[q][f] = multiply_add(weight, v[f], sums[q][f]);
    }
  }
  const int64_t padded = padded_lanes(a.value_size);
#pragma GCC unroll 4
  for (int q = 0; q < kHeads; ++q) {
#pragma GCC unroll 4
    for (int f = 0; f < kParts; ++f) store(a.out + (head + q) * padded + first + f * kLanes, sums[q][f]);
  }
}

template <typename T, int kHeads>
void add_values_of_heads(const SplitArgs<T>& a, int64_t head) {
  const int64_t F = a.value_size;
  const auto whole = [](const T* v) { return load(v); };
  int64_t f = 0;
  for (; f + kTileLanes * kLanes <= F; f += kTileLanes * kLanes) add_values<T, kHeads, kTileLanes>(a, head, f, whole);
  for (; f + kLanes <= F; f += kLanes) add_values<T, kHeads, 1>(a, head, f, whole);
  if (f < F) add_values<T, kHeads, 1>(a, head, f, [n = F - f](const T* v) { return load_part(v, n); });
}

template <typename T>
void split(const SplitArgs<T>& a) {
  using Acc = Accumulator<T>;
  constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
  const bool is_whole = a.key_size % kLanes == 0;
  for (int64_t k = 0; k < a.count; k += kLanes) {
    score_keys(a, k, a.count - k < kLanes ? a.count - k : kLanes, is_whole);
  }
  for (int64_t q = 0; q < a.num_heads; ++q) {
    Acc* scores = a.scores + q * kCpuSplit;
    Lanes<Acc> most = fill(-kInfinity);  // scores that are no numbers show in the sums
    for (int64_t k = 0; k < a.count; k += kLanes) most = larger(load(scores + k), most);
    Acc by_lane[kLanes];
    store(by_lane, most);
    Acc largest = by_lane[0];
    for (int64_t j = 1; j < kLanes; ++j) largest = by_lane[j] > largest ? by_lane[j] : largest;
    // Without a finite score the weights are 0 here; merge() decides whether another split has one.
    const Lanes<Acc> base = fill(largest == -kInfinity ? Acc{0} : largest);
    Lanes<Acc> total = fill(Acc{0});
    for (int64_t k = 0; k < a.count; k += kLanes) {
      const Lanes<Acc> weight = exponential(load(scores + k) - base);
      store(scores + k, weight);
      total = total + weight;
    }
    a.largest[q] = largest;
    a.total[q] = sum(total);
  }
  int64_t q = 0;
  for (; q + kTileHeads <= a.num_heads; q += kTileHeads) add_values_of_heads<T, kTileHeads>(a, q);
  for (; q < a.num_heads; ++q) add_values_of_heads<T, 1>(a, q);
}

template <typename T>
void merge(T* out, const SplitArgs<T>& s, int64_t count, int64_t stride, const Accumulator<T>* sink) {
  using Acc = Accumulator<T>;
  const int64_t padded = padded_lanes(s.value_size);
  Acc largest = sink != nullptr ? *sink : s.largest[0];
  for (int64_t i = 0; i < count; ++i) largest = s.largest[i * stride] > largest ? s.largest[i * stride] : largest;
  const auto weight_of = [&](Acc score) {
    Acc lanes[kLanes];
    store(lanes, exponential(fill(score - largest)));
    return lanes[0];
  };
  Acc total = sink != nullptr ? weight_of(*sink) : Acc{0};
  for (int64_t i = 0; i < count; ++i) total += weight_of(s.largest[i * stride]) * s.total[i * stride];
  for (int64_t f = 0; f < s.value_size; f += kLanes) {
    Lanes<Acc> sums = fill(Acc{0});
    for (int64_t i = 0; i < count; ++i) {
      sums = multiply_add(fill(weight_of(s.largest[i * stride])), load(s.out + i * stride * padded + f), sums);
    }
    store_part(out + f, sums / fill(total), s.value_size - f);
  }
}

}  // namespace

template <typename T>
const DecodeAttentionLoops<T>& decode_attention_loops() {
  static const DecodeAttentionLoops<T> table{&split<T>, &merge<T>};
  return table;
}

#define SX_INSTANTIATE(T) template const DecodeAttentionLoops<T>& decode_attention_loops<T>();
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace SX_SIMD
}  // namespace speechlm
