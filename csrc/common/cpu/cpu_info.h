// Instruction sets of the processor, for run-time dispatch and for `speechlm doctor`.
#pragma once

#include <string>
#include <vector>

namespace speechlm {

// Names of those of interest that this processor has, e.g. {"avx2", "fma"}.
std::vector<std::string> cpu_features();

}  // namespace speechlm
