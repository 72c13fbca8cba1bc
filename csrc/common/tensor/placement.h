// The device of a tensor's memory: the one that torch reports. A build that runs CUDA kernels on the tensors of the CPU
// has its own version of this file.
#pragma once

namespace speechlm {

inline constexpr bool kOneDevice = false;  // true: every tensor is on every device

template <typename View>
void place(View&) {}

}  // namespace speechlm
