// Version, variant, commit, compiler and CUDA version of this build; CMake fills build_info.cpp.in.
#pragma once

#include <string>

namespace speechlm {

struct BuildInfo {
  std::string version;         // "0.1.0", of the Python files that it was built with
  std::string variant;         // "cpu", or "cu130" for kernels of CUDA 13.0
  std::string version_commit;  // "" when the sources were no git checkout
  std::string compiler;
  std::string cuda_version;  // "" when the CUDA kernels were left out
  std::string cuda_archs;    // "80-real;90a-real;100-real;100-virtual"
};

BuildInfo build_info();

}  // namespace speechlm
