// What functions need that the CPU kernels and the CUDA kernels share.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SX_HOST_DEVICE __host__ __device__
#else
#define SX_HOST_DEVICE
#endif

namespace speechlm {

// In unsigned arithmetic: they wrap for absurd values where signed overflow would be undefined.
SX_HOST_DEVICE inline int64_t wrapping_add(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}
SX_HOST_DEVICE inline int64_t wrapping_subtract(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
}

}  // namespace speechlm
