#include "cuda_on_cpu/runtime/shadow/shared.h"

#include <algorithm>
#include <cstring>
#include <sstream>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_on_cpu {

SharedShadow::SharedShadow(size_t bytes) : clocks(0), cells_(bytes), used_(bytes), storage_(bytes + 256) {
  const auto base = reinterpret_cast<uintptr_t>(storage_.data());
  data_ = storage_.data() + (256 - base % 256) % 256;
}

void SharedShadow::reset(int num_threads) {
  clocks = Clocks(num_threads);
  std::fill_n(cells_.begin(), used_, Cell{});
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(data_, used_);
#endif
  std::memset(data_, 0xFF, used_);
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(data_, used_);
#endif
  used_ = 0;
}

void SharedShadow::open(size_t begin, size_t bytes) {
  for (size_t i = begin; i < begin + bytes; ++i) cells_[i].open = true;
  used_ = std::max(used_, begin + bytes);
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(data_ + begin, bytes);
#endif
}

void SharedShadow::unwritten(size_t begin, size_t bytes) {
  std::memset(data_ + begin, 0xFF, bytes);
  for (size_t i = begin; i < begin + bytes; ++i) cells_[i].written = false;
}

std::string SharedShadow::access(const void* address, size_t bytes, Access kind, int thread, const void* instruction) {
  const size_t begin = static_cast<size_t>(static_cast<const char*>(address) - data_);
  other = nullptr;
  const auto race = [&](const char* what, const Stamp& with) {
    other = with.instruction;
    std::ostringstream out;
    out << "race on shared memory: " << what << " thread " << with.thread
        << " of the same block, with no barrier between";
    return out.str();
  };
  for (size_t i = begin; i < begin + bytes; ++i) {
    if (i >= cells_.size() || !cells_[i].open) return "shared-memory overrun";
    Cell& cell = cells_[i];
    const Stamp now{clocks.epoch(), clocks.stamp(thread), thread, instruction};
    const auto unordered = [&](const Stamp& with) {
      return with.thread >= 0 && !clocks.ordered(with.thread, with.epoch, with.stamp, thread);
    };
    const bool both_atomic = kind == Access::kAtomic && cell.atomic;
    const bool writes = kind != Access::kRead;
    if (kind != Access::kWrite && !cell.written) {
      return "read of shared memory that no thread of the block has written";
    }
    if (!both_atomic && unordered(cell.write)) {
      return race(writes ? "written here and by" : "read here, written by", cell.write);
    }
    if (writes) {
      for (const Stamp* with : {&cell.read, &cell.read_too}) {
        if (unordered(*with)) return race("written here, read by", *with);
      }
    }
    if (writes) {
      cell.written = true;
      cell.atomic = kind == Access::kAtomic;
      cell.write = now;
    } else if (!unordered(cell.read)) {
      cell.read = now;
    } else if (!unordered(cell.read_too)) {
      cell.read_too = now;
    }
  }
  return "";
}

}  // namespace cuda_on_cpu
