// The grid as kernels see it: indices, block barriers, shared memory, and the launch itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

#include "cuda_on_cpu/kernel/driver.h"
#include "cuda_on_cpu/kernel/events.h"
#include "cuda_on_cpu/kernel/fault.h"
#include "cuda_on_cpu/kernel/index.h"

struct uint3 {
  cuda_on_cpu::Index x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace cuda_on_cpu {

constexpr int kWarp = 32;

// Indices of the running thread. One operating-system thread runs all of them in turn.
struct Self {
  uint3 thread_idx;
  uint3 block_idx;
  uint3 block_dim;
  uint3 grid_dim;
  int linear = 0;  // index in the block
  int lane() const { return linear % kWarp; }
  int warp() const { return linear / kWarp; }
};
const Self& self();

enum class Vote { kNone, kCount, kAnd, kOr };
int block_barrier(Vote vote, int predicate, const Site& site);

// The block's array of that tag, the same for all its threads; 0xFF bytes that no thread may read before a write.
void* shared_array(const void* tag, size_t bytes, size_t align, const char* name);
void* dynamic_shared();

// Seed of the order of blocks, warps and lanes, and of nothing else.
void set_seed(uint64_t seed);
// Memory that kernels may touch besides shared memory: a tensor, or an allocation of cudaMalloc.
void allow_memory(const void* data, size_t bytes);
void forget_memory();
// What cudaFuncSetAttribute allows a kernel: without it, 48 KB of dynamic shared memory.
void allow_dynamic_shared(const void* kernel, size_t bytes);

struct Launch {
  const char* kernel;
  Site site;
  dim3 grid, block;
  size_t dynamic_bytes;
  size_t parameter_bytes;
  const void* function;
  // `call(arguments)` runs the kernel once; it and the kernel read nothing of the host but those arguments.
  void (*call)(const void*);
  const void* arguments;
  size_t argument_bytes;
};
void run_grid(const Launch& launch);

template <typename... Parameters, typename... Arguments>
void launch(const char* name, const Site& site, dim3 grid, dim3 block, size_t dynamic_bytes,
            void (*kernel)(Parameters...), Arguments&&... arguments) {
  using Call = std::pair<void (*)(Parameters...), std::tuple<std::decay_t<Parameters>...>>;
  // By value, as the driver copies them at the launch.
  const Call copy(kernel, std::tuple<std::decay_t<Parameters>...>(std::forward<Arguments>(arguments)...));
  const auto call = [](const void* p) {
    std::apply(static_cast<const Call*>(p)->first, static_cast<const Call*>(p)->second);
  };
  note_launch();
  size_t parameters = 0;
  ((parameters =
        (parameters + alignof(Parameters) - 1) / alignof(Parameters) * alignof(Parameters) + sizeof(Parameters)),
   ...);
  run_grid({name, site, grid, block, dynamic_bytes, parameters, reinterpret_cast<const void*>(kernel), call, &copy,
            sizeof(copy)});
}

}  // namespace cuda_on_cpu

#define threadIdx (::cuda_on_cpu::self().thread_idx)
#define blockIdx (::cuda_on_cpu::self().block_idx)
#define blockDim (::cuda_on_cpu::self().block_dim)
#define gridDim (::cuda_on_cpu::self().grid_dim)
constexpr int warpSize = cuda_on_cpu::kWarp;

#define SX_LAUNCH(kernel, grid, block, smem, stream, ...)                                                   \
  (::cuda_on_cpu::note_stream("launch", #kernel, (stream)),                                                 \
   ::cuda_on_cpu::launch(#kernel, ::cuda_on_cpu::Site{__FILE__, __LINE__}, (grid), (block), (smem), kernel, \
                         __VA_ARGS__))
#define SX_SHARED(type, name, count)                 \
  static const char name##_tag = 0;                  \
  type(&name)[count] = *static_cast<type(*)[count]>( \
      ::cuda_on_cpu::shared_array(&name##_tag, sizeof(type) * (count), alignof(type), #name))
#define SX_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::cuda_on_cpu::dynamic_shared())

inline void __syncthreads(SX_SITE) { cuda_on_cpu::block_barrier(cuda_on_cpu::Vote::kNone, 0, site); }
inline int __syncthreads_count(int predicate, SX_SITE) {
  return cuda_on_cpu::block_barrier(cuda_on_cpu::Vote::kCount, predicate, site);
}
inline int __syncthreads_and(int predicate, SX_SITE) {
  return cuda_on_cpu::block_barrier(cuda_on_cpu::Vote::kAnd, predicate, site);
}
inline int __syncthreads_or(int predicate, SX_SITE) {
  return cuda_on_cpu::block_barrier(cuda_on_cpu::Vote::kOr, predicate, site);
}
