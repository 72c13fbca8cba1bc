// add_rms_norm, rope_and_store and silu_mul on the GPU, one kernel each. Bytes that must move: every input and output
// once. Values are rounded where transformers' layers round them, and products that it rounds are not contracted.
#include <type_traits>

#include "common/cuda/vec.cuh"
#include "common/cuda/warp.cuh"
#include "decode_layer/decode_layer.h"

namespace speechlm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <typename T>
__device__ inline Accumulator<T> rounded(Accumulator<T> v) {
  T small;
  narrow(v, small);
  return widen(small);
}

__device__ inline float product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double product(double a, double b) { return __dmul_rn(a, b); }

// The sum of all threads' values, in every thread, in one order. `memory`: [kWarps].
template <typename Acc>
__device__ inline Acc block_sum(Acc* memory, Acc value) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = value;
  __syncthreads();
  Acc sum = Acc{0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += memory[w];
  __syncthreads();
  return sum;
}

template <typename Acc>
__device__ inline Acc inverse_norm(Acc squares, int64_t width, double eps) {
  return Acc{1} / sqrt(squares / static_cast<Acc>(width) + static_cast<Acc>(eps));
}

template <typename T>
__device__ inline Accumulator<T> times_weight(Accumulator<T> normed, T weight, bool rounds_last) {
  return rounded<T>(product(rounds_last ? normed : rounded<T>(normed), widen(weight)));
}

// A block for each row; the second pass finds the row in the cache.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads) norm_kernel(const NormArgs<T> a) {
  using Acc = Accumulator<T>;
  SX_SHARED(Acc, memory, kWarps);
  const int64_t row = blockIdx.x, num_vecs = a.width / kVec;
  const auto vecs = [&](auto* base) {
    return reinterpret_cast<
        std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(base)>>, const Vec<T, kVec>*, Vec<T, kVec>*>>(
        base + row * a.width);
  };
  const Vec<T, kVec>* x = vecs(a.x);
  Acc squares = Acc{0};
  for (int64_t v = threadIdx.x; v < num_vecs; v += kThreads) {
    Vec<T, kVec> value = x[v];
    if (a.residual != nullptr) {
      const Vec<T, kVec> other = vecs(a.residual)[v];
#pragma unroll
      for (int j = 0; j < kVec; ++j) narrow(widen(value.v[j]) + widen(other.v[j]), value.v[j]);
      vecs(a.summed)[v] = value;
    }
#pragma unroll
    for (int j = 0; j < kVec; ++j) squares += widen(value.v[j]) * widen(value.v[j]);
  }
  const Acc factor = inverse_norm(block_sum(memory, squares), a.width, a.eps);
  const Vec<T, kVec>* source = a.residual != nullptr ? vecs(static_cast<const T*>(a.summed)) : x;
  for (int64_t v = threadIdx.x; v < num_vecs; v += kThreads) {
    const Vec<T, kVec> value = source[v], weight = reinterpret_cast<const Vec<T, kVec>*>(a.weight)[v];
    Vec<T, kVec> out;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      narrow(times_weight<T>(widen(value.v[j]) * factor, weight.v[j], a.rounds_last), out.v[j]);
    }
    vecs(a.normed)[v] = out;
  }
}

// x cos + rotate_half(x) sin of the pair (first, second) at column i. Tables in float: rounded once; in T: after each
// operation.
template <typename T, typename C>
__device__ inline void rotate(const C* cos, const C* sin, int64_t i, int64_t half, Accumulator<T>& first,
                              Accumulator<T>& second) {
  using Acc = Accumulator<T>;
  const auto times = [](Acc x, C factor) {
    const Acc exact = product(x, static_cast<Acc>(widen(factor)));
    return std::is_same_v<T, C> ? rounded<T>(exact) : exact;
  };
  const Acc low = times(first, cos[i]) - times(second, sin[i]);
  second = times(second, cos[half + i]) + times(first, sin[half + i]);
  first = low;
}

// Minimum resident blocks per multiprocessor, for __launch_bounds__: by itself the compiler aims at more of them, and
// spills around the division.
constexpr int kMinBlocksPerSm = 3;

// Block (m, part): row m; a warp for each head. With kOverAll, part 0 to 2 has all heads of the queries, of the keys,
// or of the values.
template <typename T, typename C, bool kOverAll>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm) rotary_kernel(const RotaryArgs<T, C> a) {
  using Acc = Accumulator<T>;
  SX_SHARED(Acc, memory, kWarps);
  const int64_t m = blockIdx.x, part = blockIdx.y;
  const int64_t H = a.num_heads, G = a.cache.num_heads, E = a.cache.key_size, F = a.cache.value_size;
  const int lane = static_cast<int>(threadIdx.x % 32);
  int64_t begin = part * kWarps, end = begin + kWarps;
  if (kOverAll) {
    begin = part == 0 ? 0 : part == 1 ? H : H + G;
    end = part == 0 ? H : part == 1 ? H + G : H + 2 * G;
  }
  end = end < H + 2 * G ? end : H + 2 * G;
  const bool is_inside = a.is_inside(m);
  const T* row = a.qkv + m * a.qkv_width();
  Acc factor = Acc{1};
  if (kOverAll && part < 2 && (part == 0 ? a.q_norm : a.k_norm) != nullptr) {
    Acc squares = Acc{0};
    for (int64_t i = begin * E + threadIdx.x; i < end * E; i += kThreads) squares += widen(row[i]) * widen(row[i]);
    factor = inverse_norm(block_sum(memory, squares), (end - begin) * E, a.eps);
  }
  for (int64_t unit = begin + threadIdx.x / 32; unit < end; unit += kWarps) {
    if (unit >= H + G) {
      if (!is_inside) continue;
      const T* source = row + (H + G) * E + (unit - H - G) * F;
      T* target = a.cache.value(a.slot[m], a.position[m], unit - H - G);
      for (int64_t f = lane; f < F; f += 32) target[f] = source[f];
      continue;
    }
    const bool is_query = unit < H;
    if (!is_inside) {
      if (!is_query) continue;
      for (int64_t e = lane; e < E; e += 32) narrow(Acc{0}, a.query[(m * H + unit) * E + e]);
      continue;
    }
    const T* source = row + unit * E;
    T* target = is_query ? a.query + (m * H + unit) * E : a.cache.key(a.slot[m], a.position[m], unit - H);
    const T* weight = is_query ? a.q_norm : a.k_norm;
    if (weight != nullptr) {
      if (kOverAll) {
        weight += (unit - begin) * E;
      } else {
        Acc squares = Acc{0};
        for (int64_t e = lane; e < E; e += 32) squares += widen(source[e]) * widen(source[e]);
        factor = inverse_norm(warp_sum(squares), E, a.eps);
      }
    }
    const auto value_of = [&](int64_t e) {
      const Acc v = widen(source[e]);
      return weight != nullptr ? times_weight<T>(v * factor, weight[e], kOverAll) : v;
    };
    if (a.cos == nullptr) {
      for (int64_t e = lane; e < E; e += 32) narrow(value_of(e), target[e]);
      continue;
    }
    const int64_t half = E / 2, at = a.position[m] * E;
    for (int64_t i = lane; i < half; i += 32) {
      Acc first = value_of(i), second = value_of(half + i);
      rotate<T>(a.cos + at, a.sin + at, i, half, first, second);
      narrow(first, target[i]);
      narrow(second, target[half + i]);
    }
  }
}

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads) silu_kernel(const GateArgs<T> a) {
  using Acc = Accumulator<T>;
  const int64_t num_vecs = a.width / kVec, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.num_rows * num_vecs; i += step) {
    const int64_t row = i / num_vecs, v = i % num_vecs;
    const auto* source = reinterpret_cast<const Vec<T, kVec>*>(a.gate_up + row * 2 * a.width);
    const Vec<T, kVec> gate = source[v], up = source[num_vecs + v];
    Vec<T, kVec> out;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const Acc x = widen(gate.v[j]);
      narrow(rounded<T>(x / (Acc{1} + exponential(-x))) * widen(up.v[j]), out.v[j]);
    }
    reinterpret_cast<Vec<T, kVec>*>(a.out)[i] = out;
  }
}

}  // namespace

template <typename T>
void add_rms_norm_cuda(const NormArgs<T>& a, int device, void* stream) {
  if (a.num_rows == 0 || a.width == 0) return;
  SX_CHECK(a.num_rows < (int64_t{1} << 31), "add_rms_norm: more than 2^31 rows at a time");
  const DeviceGuard guard(device);
  constexpr int kVec = 16 / sizeof(T);
  const bool fast = a.width % kVec == 0 && is_aligned(a.x) && is_aligned(a.residual) && is_aligned(a.weight) &&
                    is_aligned(a.normed) && is_aligned(a.summed);  // null is aligned
  const auto kernel = fast ? &norm_kernel<T, kVec> : &norm_kernel<T, 1>;
  SX_LAUNCH(kernel, static_cast<unsigned>(a.num_rows), kThreads, 0, static_cast<cudaStream_t>(stream), a);
  cuda_check(cudaGetLastError(), "add_rms_norm launch");
}

template <typename T, typename C>
void rope_and_store_cuda(const RotaryArgs<T, C>& a, int device, void* stream) {
  const bool over_all = a.norm_over_all && (a.q_norm != nullptr || a.k_norm != nullptr);
  const int64_t blocks = over_all ? 3 : ceil_div(a.num_heads + 2 * a.cache.num_heads, kWarps);
  if (a.num_rows == 0 || blocks == 0) return;
  SX_CHECK(a.num_rows < (int64_t{1} << 31) && blocks < 65536,
           "rope_and_store: more than 2^31 rows, or than 2^19 heads, at a time");
  const DeviceGuard guard(device);
  const auto kernel = over_all ? &rotary_kernel<T, C, true> : &rotary_kernel<T, C, false>;
  const dim3 grid(static_cast<unsigned>(a.num_rows), static_cast<unsigned>(blocks));
  SX_LAUNCH(kernel, grid, kThreads, 0, static_cast<cudaStream_t>(stream), a);
  cuda_check(cudaGetLastError(), "rope_and_store launch");
}

template <typename T>
void silu_mul_cuda(const GateArgs<T>& a, int device, void* stream) {
  if (a.num_rows == 0 || a.width == 0) return;
  const DeviceGuard guard(device);
  constexpr int kVec = 16 / sizeof(T);
  const bool fast = a.width % kVec == 0 && is_aligned(a.gate_up) && is_aligned(a.out);
  const auto kernel = fast ? &silu_kernel<T, kVec> : &silu_kernel<T, 1>;
  const int64_t vecs = a.num_rows * (fast ? a.width / kVec : a.width);
  SX_LAUNCH(kernel, grid_for(vecs, kThreads), kThreads, 0, static_cast<cudaStream_t>(stream), a);
  cuda_check(cudaGetLastError(), "silu_mul launch");
}

#define SX_INSTANTIATE(T)                                             \
  template void add_rms_norm_cuda<T>(const NormArgs<T>&, int, void*); \
  template void silu_mul_cuda<T>(const GateArgs<T>&, int, void*);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE
#define SX_INSTANTIATE(T, C) template void rope_and_store_cuda<T, C>(const RotaryArgs<T, C>&, int, void*);
SX_FOR_TABLES(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
