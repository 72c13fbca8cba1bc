// Kernels with one fault each, for the tool of compute-sanitizer that must find it: planted memcheck|racecheck|...
// They lie in the namespace of the ops' kernels, by which the tools are told what to look at.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace speechlm {

constexpr int kCount = 100;  // 400 bytes, less than the 512 that allocations are apart

__global__ void overrun(int* values) { values[kCount + threadIdx.x % 16] = 1; }

__global__ void read_uninitialized(const int* values, int* out) { out[threadIdx.x] = values[threadIdx.x] + 1; }

__global__ void race(int* out) {
  __shared__ int values[128];
  values[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = values[(threadIdx.x + 64) % 128];  // no barrier: another warp may not have written yet
}

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();  // half of a warp's threads never come
    out[threadIdx.x] = 1;
  }
}

}  // namespace speechlm

int main(int argc, char** argv) {
  const char* tool = argc > 1 ? argv[1] : "";
  int *values = nullptr, *out = nullptr;
  if (cudaMalloc(&values, speechlm::kCount * sizeof(int)) != cudaSuccess ||
      cudaMalloc(&out, 128 * sizeof(int)) != cudaSuccess) {
    std::fprintf(stderr, "planted: no device memory\n");
    return 2;
  }
  if (!std::strcmp(tool, "memcheck")) {
    speechlm::overrun<<<1, 32>>>(values);
  } else if (!std::strcmp(tool, "initcheck")) {
    speechlm::read_uninitialized<<<1, 64>>>(values, out);
  } else if (!std::strcmp(tool, "racecheck")) {
    speechlm::race<<<1, 128>>>(out);
  } else if (!std::strcmp(tool, "synccheck")) {
    speechlm::divergent_barrier<<<1, 128>>>(out);
  } else {
    std::fprintf(stderr, "planted: expected memcheck, initcheck, racecheck or synccheck, got '%s'\n", tool);
    return 2;
  }
  cudaDeviceSynchronize();
  return 0;
}
