// Runs one kernel of selftest.cu; returns its output, or throws the fault.
#pragma once

#include <string>
#include <vector>

namespace cuda_on_cpu {

std::vector<std::string> selftest_names();
std::vector<float> selftest(const std::string& name);

}  // namespace cuda_on_cpu
