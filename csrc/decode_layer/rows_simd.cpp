// Norm, rotation and gate of one row, compiled once per instruction set; see common/cpu/simd.h. Values are rounded
// where transformers' layers round them.
#include <type_traits>

#include "decode_layer/lanes.h"
#include "decode_layer/loops.h"

namespace speechlm {
namespace SX_SIMD {
namespace {

// Calls body(first, count) for every sixteen of n values, the last of them perhaps fewer.
template <typename Body>
inline void by_lanes(int64_t n, const Body& body) {
  for (int64_t i = 0; i < n; i += kLanes) body(i, n - i < kLanes ? n - i : kLanes);
}

template <typename T>
void widen_row(Accumulator<T>* out, const T* row, int64_t width) {
  by_lanes(width, [&](int64_t i, int64_t n) { store(out + i, load_part(row + i, n)); });
}

// 1 / sqrt(mean of squares + eps).
template <typename T>
Accumulator<T> inverse_norm(const T* row, int64_t width, double eps) {
  using Acc = Accumulator<T>;
  Lanes<Acc> squares = fill(Acc{0});
  by_lanes(width, [&](int64_t i, int64_t n) {
    const Lanes<Acc> v = load_part(row + i, n);
    squares = multiply_add(v, v, squares);
  });
  return Acc{1} / std::sqrt(sum(squares) / static_cast<Acc>(width) + static_cast<Acc>(eps));
}

template <typename T>
inline Lanes<Accumulator<T>> times_weight(const Lanes<Accumulator<T>>& normed, const Lanes<Accumulator<T>>& weight,
                                          bool rounds_last) {
  return rounded<T>((rounds_last ? normed : rounded<T>(normed)) * weight);
}

template <typename T>
void norm(const NormArgs<T>& a, int64_t row) {
  using Acc = Accumulator<T>;
  const int64_t D = a.width;
  const T* source = a.x + row * D;
  if (a.residual != nullptr) {
    T* summed = a.summed + row * D;
    by_lanes(D, [&](int64_t i, int64_t n) {
      store_part(summed + i, load_part(source + i, n) + load_part(a.residual + row * D + i, n), n);
    });
    source = summed;
  }
  const Lanes<Acc> factor = fill(inverse_norm(source, D, a.eps));
  T* normed = a.normed + row * D;
  by_lanes(D, [&](int64_t i, int64_t n) {
    const Lanes<Acc> v = load_part(source + i, n) * factor;
    store_part(normed + i, times_weight<T>(v, load_part(a.weight + i, n), a.rounds_last), n);
  });
}

template <typename T>
void silu_mul(T* out, const T* gate, const T* up, int64_t width) {
  using Acc = Accumulator<T>;
  by_lanes(width, [&](int64_t i, int64_t n) {
    const Lanes<Acc> v = load_part(gate + i, n);
    const Lanes<Acc> silu = v / (exponential(fill(Acc{0}) - v) + fill(Acc{1}));
    store_part(out + i, rounded<T>(silu) * load_part(up + i, n), n);
  });
}

// One head, normed with `weight` if that is not null, in `head` [padded E].
template <typename T>
void norm_head(Accumulator<T>* head, const T* source, const T* weight, Accumulator<T> factor, bool rounds_last,
               int64_t size) {
  by_lanes(size, [&](int64_t i, int64_t n) {
    Lanes<Accumulator<T>> v = load_part(source + i, n);
    if (weight != nullptr) v = times_weight<T>(v * fill(factor), load_part(weight + i, n), rounds_last);
    store(head + i, v);
  });
}

// x cos + rotate_half(x) sin. Tables in float: rounded once; in T: after each operation.
template <typename T, typename C>
void rotate_head(T* out, const Accumulator<T>* head, const C* cos, const C* sin, int64_t size) {
  using Acc = Accumulator<T>;
  const int64_t half = size / 2;
  const auto product = [](const Lanes<Acc>& a, const Lanes<Acc>& b) {
    if constexpr (std::is_same_v<T, C>) return rounded<T>(a * b);
    return a * b;
  };
  by_lanes(half, [&](int64_t i, int64_t n) {
    const Lanes<Acc> first = load_part(head + i, n), second = load_part(head + half + i, n);
    store_part(out + i, product(first, load_part(cos + i, n)) - product(second, load_part(sin + i, n)), n);
    store_part(out + half + i,
               product(second, load_part(cos + half + i, n)) + product(first, load_part(sin + half + i, n)), n);
  });
}

template <typename T, typename C>
void rotary_row(const RotaryArgs<T, C>& a, int64_t m, Accumulator<T>* head) {
  const int64_t H = a.num_heads, G = a.cache.num_heads, E = a.cache.key_size, F = a.cache.value_size;
  T* query = a.query + m * H * E;
  if (!a.is_inside(m)) {
    if (H * E > 0) std::memset(static_cast<void*>(query), 0, H * E * sizeof(T));
    return;
  }
  const int64_t slot = a.slot[m], position = a.position[m];
  const T* row = a.qkv + m * a.qkv_width();
  const auto turn = [&](const T* source, const T* weight, int64_t num_heads, const auto& target) {
    const bool over_all = weight != nullptr && a.norm_over_all;
    Accumulator<T> factor = over_all ? inverse_norm(source, num_heads * E, a.eps) : Accumulator<T>{1};
    for (int64_t h = 0; h < num_heads; ++h) {
      if (weight != nullptr && !over_all) factor = inverse_norm(source + h * E, E, a.eps);
      norm_head(head, source + h * E, over_all ? weight + h * E : weight, factor, over_all, E);
      if (a.cos == nullptr) {
        by_lanes(E, [&](int64_t i, int64_t n) { store_part(target(h) + i, load(head + i), n); });
      } else {
        rotate_head(target(h), head, a.cos + position * E, a.sin + position * E, E);
      }
    }
  };
  turn(row, a.q_norm, H, [&](int64_t h) { return query + h * E; });
  turn(row + H * E, a.k_norm, G, [&](int64_t g) { return a.cache.key(slot, position, g); });
  if (G * F > 0)
    std::memcpy(static_cast<void*>(a.cache.value(slot, position, 0)), row + (H + G) * E, G * F * sizeof(T));
}

}  // namespace

template <typename T>
const DecodeRowLoops<T>& decode_row_loops() {
  static const DecodeRowLoops<T> table{&widen_row<T>, &norm<T>, &silu_mul<T>};
  return table;
}

template <typename T, typename C>
const RotaryLoops<T, C>& rotary_loops() {
  static const RotaryLoops<T, C> table{&rotary_row<T, C>};
  return table;
}

#define SX_INSTANTIATE(T) template const DecodeRowLoops<T>& decode_row_loops<T>();
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE
#define SX_INSTANTIATE(T, C) template const RotaryLoops<T, C>& rotary_loops<T, C>();
SX_FOR_TABLES(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace SX_SIMD
}  // namespace speechlm
