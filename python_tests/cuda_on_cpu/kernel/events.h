// What the ops' host code asked of the GPU: kernel launches, copies, waits. Counted by name, for launch budgets.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace cuda_on_cpu {

void count_event(const std::string& name);
// The counts since the last call.
std::map<std::string, uint64_t> take_events();

// The order that the host asked of the streams: what was enqueued on which of them, and the events between them. Kept
// only while a test wants it.
struct Enqueued {
  std::string what;  // "launch", "product", "record" or "wait"
  std::string name;  // of the kernel
  uintptr_t stream;
  uintptr_t event;
};
void keep_schedule(bool is_kept);
void note_stream(const char* what, const char* name, const void* stream, const void* event = nullptr);
std::vector<Enqueued> take_schedule();

}  // namespace cuda_on_cpu
