// CUDA C++ as host C++: what a .cu file sees when it is compiled with SPEECHLM_CUDA_ON_CPU. Kernels run with one fiber
// per thread, in an order that a seed decides, and every load and store is checked. See docs/testing.md for what this
// shows and what it cannot.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

#include "cuda_on_cpu/atomics.h"
#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/half.h"
#include "cuda_on_cpu/host_api.h"
#include "cuda_on_cpu/intrinsics.h"
#include "cuda_on_cpu/memory.h"
#include "cuda_on_cpu/warp.h"
