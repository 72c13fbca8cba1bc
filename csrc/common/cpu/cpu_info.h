// What the processor can do, for run-time dispatch and for `speechlm doctor`.
#pragma once

#include <string>
#include <vector>

namespace speechlm {

// Names of the instruction sets that matter here and that this processor has, e.g. {"avx2", "fma"}.
std::vector<std::string> cpu_features();

}  // namespace speechlm
