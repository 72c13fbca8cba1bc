#include "cuda_on_cpu/runtime/shadow.h"

#include <algorithm>
#include <cstring>
#include <sstream>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_on_cpu {

Clocks::Clocks(int num_threads) : clock_(num_threads) {
  for (int t = 0; t < num_threads; ++t) {
    clock_[t].fill(0);
    clock_[t][t % 32] = 1;
  }
}

void Clocks::warp_sync(int warp, unsigned mask) {
  const int first = warp * 32;
  std::array<uint32_t, 32> joined{};
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1) || first + lane >= static_cast<int>(clock_.size())) continue;
    for (int i = 0; i < 32; ++i) joined[i] = std::max(joined[i], clock_[first + lane][i]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1) || first + lane >= static_cast<int>(clock_.size())) continue;
    clock_[first + lane] = joined;
    ++clock_[first + lane][lane];
  }
}

bool Clocks::ordered(int before, uint32_t epoch, uint32_t stamp, int now) const {
  if (before == now || epoch < epoch_) return true;
  return before / 32 == now / 32 && clock_[now][before % 32] >= stamp;
}

SharedShadow::SharedShadow(int num_threads, size_t bytes) : clocks(num_threads), cells_(bytes), storage_(bytes + 256) {
  const auto base = reinterpret_cast<uintptr_t>(storage_.data());
  data_ = storage_.data() + (256 - base % 256) % 256;
  reset(num_threads);
}

void SharedShadow::reset(int num_threads) {
  clocks = Clocks(num_threads);
  std::fill(cells_.begin(), cells_.end(), Cell{});
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(data_, cells_.size());
#endif
  std::memset(data_, 0xFF, cells_.size());
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(data_, cells_.size());
#endif
}

void SharedShadow::open(size_t begin, size_t bytes) {
  for (size_t i = begin; i < begin + bytes; ++i) cells_[i].open = true;
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
