#include "cuda_on_cpu/kernel/events.h"

#include <mutex>
#include <utility>

namespace cuda_on_cpu {
namespace {

std::mutex g_mutex;
std::map<std::string, uint64_t> g_events;

}  // namespace

void count_event(const std::string& name) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  ++g_events[name];
}

std::map<std::string, uint64_t> take_events() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  return std::exchange(g_events, {});
}

}  // namespace cuda_on_cpu
