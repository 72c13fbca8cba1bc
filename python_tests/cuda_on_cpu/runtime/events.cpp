#include "cuda_on_cpu/kernel/events.h"

#include <mutex>
#include <utility>

namespace cuda_on_cpu {
namespace {

std::mutex g_mutex;
std::map<std::string, uint64_t> g_events;

bool g_is_kept = false;
std::vector<Enqueued> g_schedule;

}  // namespace

void count_event(const std::string& name) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  ++g_events[name];
}

std::map<std::string, uint64_t> take_events() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  return std::exchange(g_events, {});
}

void keep_schedule(bool is_kept) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_is_kept = is_kept;
  g_schedule.clear();
}

void note_stream(const char* what, const char* name, const void* stream, const void* event) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  if (!g_is_kept) return;
  g_schedule.push_back({what, name, reinterpret_cast<uintptr_t>(stream), reinterpret_cast<uintptr_t>(event)});
}

std::vector<Enqueued> take_schedule() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  return std::exchange(g_schedule, {});
}

}  // namespace cuda_on_cpu
