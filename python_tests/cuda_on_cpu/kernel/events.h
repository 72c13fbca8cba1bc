// What the ops' host code asked of the GPU: kernel launches, copies, waits. Counted by name, for launch budgets.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace cuda_on_cpu {

void count_event(const std::string& name);
// The counts since the last call.
std::map<std::string, uint64_t> take_events();

}  // namespace cuda_on_cpu
