// kmeans_assign on the GPU, first step: rows to float16 codes and their error bounds, a warp per row. Bytes that must
// move: the rows once, their codes once.
#include <cmath>

#include "common/cuda/warp.cuh"
#include "kmeans_assign/kmeans_assign.h"

namespace speechlm {
namespace {

constexpr int kThreads = 256;

// A product of float16 codes sums F exact terms in float, in an order and with a rounding of the hardware's own:
// blocks of terms are aligned to the largest and cut off, which loses at most 2^-22 of the sum of magnitudes a term.
__device__ inline double product_error(int64_t width) { return 0x1p-22 * static_cast<double>(width + 8); }

// The power of two of that exponent, which must be one of a normal number.
__device__ inline double power_of_two(int exponent) {
  return bits_as<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

__device__ inline int exponent_of(double normal) {
  return static_cast<int>(bits_as<uint64_t>(normal) >> 52 & 2047) - 1023;
}

// To the nearest float16, by an instruction where there is one.
__device__ inline Float16 to_half(float value) {
  Float16 out;
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  narrow(value, out);
#endif
  return out;
}

__device__ inline float from_half(Float16 value) {
#ifdef __CUDA_ARCH__
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
  return out;
#else
  return widen(value);
#endif
}

template <typename T>
__global__ void __launch_bounds__(kThreads) quantize_rows_kernel(const KmeansQuantizeArgs<T> a) {
  const auto lane = static_cast<int>(threadIdx.x % 32);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  const double unit = *a.unit, per_unit = 1 / unit;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; n < a.num_rows; n += warps) {
    const T* x = a.x + n * a.width;
    uint16_t* codes = a.codes + n * a.padded_width;
    double squares = 0, largest = 0, check = 0;  // 0 * x is 0, or NaN where x is not finite
    for (int64_t f = lane; f < a.width; f += 32) {
      const auto v = static_cast<double>(widen(x[f]));
      const double value = v - a.centre[f];
      check += 0 * v;
      squares += value * value;
      largest = fmax(largest, fabs(value));
    }
    check = warp_sum(check);
    squares = warp_sum(squares);
    largest = warp_reduce(largest, [](double a, double b) { return fmax(a, b); });
    const bool is_finite = check == 0;
    // Squares that overflow or lose digits say nothing.
    const bool fits = is_finite && squares < 1e300 && (largest == 0 || largest > 1e-140);
    double residuals = 0, hats = 0;  // in units of the scale
    const bool has_codes = fits && largest > 0;
    const int exponent = has_codes ? exponent_of(largest) - 13 : 0;  // a code is below 2^14
    const double scale = power_of_two(exponent), inverse = power_of_two(-exponent);
    for (int64_t f = lane; f < a.padded_width; f += 32) {
      Float16 code{0};
      if (has_codes && f < a.width) {
        const double value = (static_cast<double>(widen(x[f])) - a.centre[f]) * inverse;
        code = to_half(static_cast<float>(value));
        const auto hat = static_cast<double>(from_half(code));
        residuals += (value - hat) * (value - hat);
        hats += hat * hat;
      }
      codes[f] = code.bits;
    }
    residuals = warp_sum(residuals);
    hats = warp_sum(hats);
    if (lane != 0) continue;
    RowTerms r;
    if (!is_finite) {
      r.eta = static_cast<float>(NAN);
    } else if (!fits) {
      r.eta = static_cast<float>(INFINITY);
    } else {
      const double norm = sqrt(squares), hat = sqrt(hats) * scale * (1 + 0x1p-40);
      const double size = fmax(unit, norm), per_size = 1 / size, beta = fmax(unit * per_size, kMinBeta);
      constexpr double kSlack = kFloatSlack * 0x1p-24, kUp = 1 + 0x1p-20;
      r.alpha = static_cast<float>(scale * per_size);
      r.beta_low = r.beta_high = static_cast<float>(beta);
      if (a.exact) {
        const double residual = sqrt(residuals) * scale * (1 + 0x1p-40) + norm * 0x1p-50;
        r.beta_low = static_cast<float>(fmax(beta * (1 - kSlack), kMinBeta));
        r.beta_high = static_cast<float>(beta * (1 + kSlack));
        r.rho = static_cast<float>((residual + 2 * (kSlack + product_error(a.width)) * hat) * per_size * kUp);
        r.hat = static_cast<float>(hat * per_size * kUp);
        const double direct = 0x1p-52 * static_cast<double>(a.width + 8) * (norm * per_unit) * (norm * per_size);
        r.eta = static_cast<float>(direct * kUp + kFloatFloor);
      }
    }
    a.terms[n] = r;
  }
}

}  // namespace

template <typename T>
void kmeans_quantize_rows_cuda(const KmeansQuantizeArgs<T>& args, int device, void* stream) {
  if (args.num_rows == 0) return;
  const DeviceGuard guard(device);
  SX_LAUNCH(quantize_rows_kernel<T>, grid_for(args.num_rows, kThreads / 32), kThreads, 0,
            static_cast<cudaStream_t>(stream), args);
  cuda_check(cudaGetLastError(), "kmeans_assign: launch of the codes");
}

#define SX_INSTANTIATE(T) template void kmeans_quantize_rows_cuda<T>(const KmeansQuantizeArgs<T>&, int, void*);
SX_FOR_FLOATS(SX_INSTANTIATE)
#undef SX_INSTANTIATE

}  // namespace speechlm
