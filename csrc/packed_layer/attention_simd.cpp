// Causal attention of one sequence and one key/value head, compiled once per instruction set; see common/cpu/simd.h.
//
// Sixteen queries at a time, so that hardly a score behind the diagonal is computed: their scores against all keys up
// to the last of them, in scratch, then softmax, then the product with the values. Products are blocks of four rows and
// two registers, summed in the order of their terms.
#include <algorithm>
#include <cmath>
#include <limits>

#include "packed_layer/exponential.h"
#include "packed_layer/loops.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace speechlm {
namespace SX_SIMD {
namespace {

#if defined(__AVX512F__)
using Register = __m512;
inline Register load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Register a) { _mm512_storeu_ps(to, a); }
inline Register fill(float s) { return _mm512_set1_ps(s); }
inline Register multiply_add(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
using Register = __m256;
inline Register load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Register a) { _mm256_storeu_ps(to, a); }
inline Register fill(float s) { return _mm256_set1_ps(s); }
inline Register multiply_add(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }
#else
struct Register {
  float v[4];
};
inline Register load(const float* from) { return {{from[0], from[1], from[2], from[3]}}; }
inline void store(float* to, const Register& a) { std::memcpy(to, a.v, sizeof a.v); }
inline Register fill(float s) { return {{s, s, s, s}}; }
inline Register multiply_add(const Register& a, const Register& b, const Register& c) {
  Register out;
  for (int j = 0; j < 4; ++j) out.v[j] = std::fma(a.v[j], b.v[j], c.v[j]);
  return out;
}
#endif
constexpr int64_t kWidth = sizeof(Register) / sizeof(float);

// A matrix whose element (i, j) is at data[i * row + j * column].
struct Matrix {
  const float* data;
  int64_t row, column;
};

// kRows rows and kRegisters registers of columns of out (+)= a b; b has rows of adjacent elements, b_row apart.
template <int kRows, int kRegisters, bool kAdds>
inline void block(float* out, int64_t out_row, const Matrix& a, const float* b, int64_t b_row, int64_t terms) {
  Register sums[kRows][kRegisters];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kRegisters; ++j) sums[i][j] = kAdds ? load(out + i * out_row + j * kWidth) : fill(0);
  }
  for (int64_t t = 0; t < terms; ++t) {
    Register right[kRegisters];
    for (int j = 0; j < kRegisters; ++j) right[j] = load(b + t * b_row + j * kWidth);
    for (int i = 0; i < kRows; ++i) {
      const Register left = fill(a.data[i * a.row + t * a.column]);
      for (int j = 0; j < kRegisters; ++j) sums[i][j] = multiply_add(left, right[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kRegisters; ++j) store(out + i * out_row + j * kWidth, sums[i][j]);
  }
}

template <int kRegisters, bool kAdds>
inline void columns(float* out, int64_t out_row, Matrix a, const float* b, int64_t b_row, int64_t rows, int64_t terms) {
  for (; rows >= 4; rows -= 4, out += 4 * out_row, a.data += 4 * a.row)
    block<4, kRegisters, kAdds>(out, out_row, a, b, b_row, terms);
  if (rows == 3) block<3, kRegisters, kAdds>(out, out_row, a, b, b_row, terms);
  if (rows == 2) block<2, kRegisters, kAdds>(out, out_row, a, b, b_row, terms);
  if (rows == 1) block<1, kRegisters, kAdds>(out, out_row, a, b, b_row, terms);
}

// out [rows, num_columns] (+)= a [rows, terms] b [terms, num_columns]; num_columns a multiple of kLanes.
template <bool kAdds>
void multiply(float* out, int64_t out_row, const Matrix& a, const float* b, int64_t b_row, int64_t rows,
              int64_t num_columns, int64_t terms) {
  int64_t j = 0;
  for (; j + 2 * kWidth <= num_columns; j += 2 * kWidth)
    columns<2, kAdds>(out + j, out_row, a, b + j, b_row, rows, terms);
  for (; j < num_columns; j += kWidth) columns<1, kAdds>(out + j, out_row, a, b + j, b_row, rows, terms);
}

inline int64_t whole_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// to [E, padded T] from rows [T, E] that are `stride` apart; zeros behind column T.
void transpose(float* to, int64_t padded, const float* from, int64_t stride, int64_t rows, int64_t size) {
  for (int64_t e = 0; e < size; ++e) {
    for (int64_t t = 0; t < rows; ++t) to[e * padded + t] = from[t * stride + e];
    for (int64_t t = rows; t < padded; ++t) to[e * padded + t] = 0;
  }
}

// The queries [first, first + count) of a sequence, and the keys [low, high) that any of them sees; low is a multiple
// of kLanes.
struct Span {
  int64_t first, count, low, high;
  int64_t keys() const { return high - low; }
};

inline Span span_of(const PackedAttention& a, int64_t first, int64_t rows) {
  const int64_t count = std::min(kQueryRows, rows - first);
  const int64_t low = a.window > 0 ? std::max<int64_t>(0, first - a.window + 1) : 0;
  return {first, count, low / kLanes * kLanes, first + count};
}

// The first key that query i of the sequence sees, counted from span.low.
inline int64_t first_key(const PackedAttention& a, const Span& span, int64_t i) {
  return a.window > 0 ? std::max<int64_t>(0, i - a.window + 1 - span.low) : 0;
}

// Scores of one query to weights e^(scale s - shift) over keys [begin, end); zeros elsewhere up to `padded`.
inline void to_weights(float* __restrict s, int64_t begin, int64_t end, int64_t padded, float scale, float shift) {
  for (int64_t j = 0; j < begin; ++j) s[j] = 0;
  for (int64_t j = begin; j < end; ++j) s[j] = exponential(s[j] * scale - shift);
  for (int64_t j = end; j < padded; ++j) s[j] = 0;
}

inline float largest_of(const float* __restrict s, int64_t begin, int64_t end, float scale) {
  float lanes[kLanes];
  for (float& lane : lanes) lane = -std::numeric_limits<float>::infinity();
  int64_t j = begin;
  const auto larger = [](float x, float y) { return x > y ? x : y; };
  for (; j + kLanes <= end; j += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = larger(s[j + l] * scale, lanes[l]);
  }
  for (; j < end; ++j) lanes[0] = larger(s[j] * scale, lanes[0]);
  float largest = lanes[0];
  for (float lane : lanes) largest = larger(lane, largest);
  return largest;
}

inline float total_of(const float* __restrict s, int64_t padded) {
  float lanes[kLanes] = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += s[j + l];
  }
  return join(lanes);
}

void forward(const PackedAttention& a, int64_t sequence, int64_t kv_head, float* scratch) {
  const int64_t H = a.num_heads, G = a.num_kv_heads, E = a.head_size, shared = H / G;
  const int64_t start = a.bounds[sequence], rows = a.bounds[sequence + 1] - start, padded = whole_lanes(rows);
  const float *keys = a.k + (start * G + kv_head) * E, *values = a.v + (start * G + kv_head) * E;
  float *keys_T = scratch, *scores = scratch + 2 * E * padded;
  transpose(keys_T, padded, keys, G * E, rows, E);
  for (int64_t h = kv_head * shared; h < (kv_head + 1) * shared; ++h) {
    for (int64_t first = 0; first < rows; first += kQueryRows) {
      const Span span = span_of(a, first, rows);
      const int64_t width = whole_lanes(span.keys()), at = (start + first) * H + h;
      multiply<false>(scores, padded, {a.q + at * E, H * E, 1}, keys_T + span.low, padded, span.count, width, E);
      for (int64_t i = 0; i < span.count; ++i) {
        float* s = scores + i * padded;
        const int64_t begin = first_key(a, span, first + i), end = first + i + 1 - span.low;
        const float largest = largest_of(s, begin, end, a.scale);
        to_weights(s, begin, end, width, a.scale, largest);
        const float total = total_of(s, width), inverse = 1.0f / total;
        for (int64_t j = 0; j < width; ++j) s[j] *= inverse;
        a.logsumexp[at + i * H] = largest + std::log(total);
      }
      multiply<false>(a.out + at * E, H * E, {scores, padded, 1}, values + span.low * G * E, G * E, span.count, E,
                      span.keys());
    }
  }
}

void backward(const PackedAttention& a, int64_t sequence, int64_t kv_head, float* scratch) {
  const int64_t H = a.num_heads, G = a.num_kv_heads, E = a.head_size, shared = H / G;
  const int64_t start = a.bounds[sequence], rows = a.bounds[sequence + 1] - start, padded = whole_lanes(rows);
  const int64_t head = (start * G + kv_head) * E;
  const float *keys = a.k + head, *values = a.v + head;
  float *keys_T = scratch, *values_T = keys_T + E * padded;
  float *weights = values_T + E * padded, *slopes = weights + kQueryRows * padded;
  transpose(keys_T, padded, keys, G * E, rows, E);
  transpose(values_T, padded, values, G * E, rows, E);
  for (int64_t t = 0; t < rows; ++t) {
    std::fill_n(a.grad_k + head + t * G * E, E, 0.0f);
    std::fill_n(a.grad_v + head + t * G * E, E, 0.0f);
  }
  for (int64_t h = kv_head * shared; h < (kv_head + 1) * shared; ++h) {
    for (int64_t first = 0; first < rows; first += kQueryRows) {
      const Span span = span_of(a, first, rows);
      const int64_t width = whole_lanes(span.keys()), at = (start + first) * H + h;
      const Matrix query{a.q + at * E, H * E, 1}, grad{a.grad + at * E, H * E, 1};
      multiply<false>(weights, padded, query, keys_T + span.low, padded, span.count, width, E);
      multiply<false>(slopes, padded, grad, values_T + span.low, padded, span.count, width, E);
      for (int64_t i = 0; i < span.count; ++i) {
        float* __restrict p = weights + i * padded;
        float* __restrict d = slopes + i * padded;
        const float *g = grad.data + i * H * E, *o = a.out + (at + i * H) * E;
        float lanes[kLanes] = {};
        for (int64_t e = 0; e < E; e += kLanes) {
          for (int64_t l = 0; l < kLanes; ++l) lanes[l] += g[e + l] * o[e + l];
        }
        const float mean = join(lanes);  // Σ p d
        to_weights(p, first_key(a, span, first + i), first + i + 1 - span.low, width, a.scale, a.logsumexp[at + i * H]);
        // Where a weight is 0 behind the diagonal the slope may be anything finite or not: it must not count.
        for (int64_t j = 0; j < width; ++j) d[j] = p[j] == 0 ? 0.0f : p[j] * (d[j] - mean) * a.scale;
      }
      multiply<false>(a.grad_q + at * E, H * E, {slopes, padded, 1}, keys + span.low * G * E, G * E, span.count, E,
                      span.keys());
      const int64_t from = head + span.low * G * E;
      multiply<true>(a.grad_k + from, G * E, {slopes, 1, padded}, query.data, H * E, span.keys(), E, span.count);
      multiply<true>(a.grad_v + from, G * E, {weights, 1, padded}, grad.data, H * E, span.keys(), E, span.count);
    }
  }
}

}  // namespace

const PackedAttentionLoops& packed_attention_loops() {
  static const PackedAttentionLoops table{&forward, &backward};
  return table;
}

}  // namespace SX_SIMD
}  // namespace speechlm
