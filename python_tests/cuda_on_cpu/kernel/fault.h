// A fault ends the launch: its message names the error, the thread, the kernel and the place in the source.
#pragma once

#include <string>

#include "common/check.h"

namespace cuda_on_cpu {

using speechlm::concat;
std::string hex(unsigned value);

// A place in a kernel's source. As a default argument, here() is the place of the call.
struct Site {
  const char* file = "";
  int line = 0;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const { return line == other.line && std::string(file) == other.file; }
  std::string text() const;
};

// Ends the running kernel; never returns. Outside a kernel it throws std::runtime_error.
[[noreturn]] void fault(const std::string& what, const Site& site);
// The same for an instruction, whose file and line are looked up in the debug information.
[[noreturn]] void fault_at(const std::string& what, const void* instruction);

}  // namespace cuda_on_cpu

#define SX_SITE ::cuda_on_cpu::Site site = ::cuda_on_cpu::Site::here()
