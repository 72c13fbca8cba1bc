// In place of CUDA's header: with it a .cu file compiles as host C++. Kernels run with one fiber per thread, in an
// order that a seed decides, and every load and store is checked. docs/testing.md lists the faults that this finds.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

#include "cuda_on_cpu/kernel/atomics.h"
#include "cuda_on_cpu/kernel/device.h"
#include "cuda_on_cpu/kernel/half.h"
#include "cuda_on_cpu/kernel/host_api.h"
#include "cuda_on_cpu/kernel/intrinsics.h"
#include "cuda_on_cpu/kernel/memory.h"
#include "cuda_on_cpu/kernel/warp.h"
