// In place of csrc's header: tensors of the CPU count as CUDA tensors, and kernels may touch their memory.
#pragma once

#include "cuda_on_cpu/kernel/device.h"

namespace speechlm {

inline constexpr bool kOneDevice = true;

template <typename View>
void place(View& view) {
  view.device = decltype(view.device)::kCuda;
  view.device_index = cuda_on_cpu::machine().tensors_on;
  int64_t span = view.numel() > 0 ? 1 : 0;  // elements up to the last one
  for (int64_t d = 0; d < view.rank() && span > 0; ++d) span += (view.sizes[d] - 1) * view.strides[d];
  cuda_on_cpu::allow_memory(view.data, span * size_of(view.dtype));
}

}  // namespace speechlm
