// State of each byte of a block's shared memory: whether it may be touched, whether, when and by which thread it was
// written. It finds overruns, reads of unwritten bytes, and races, the first time they happen and in any order of
// threads: two accesses race if no barrier orders them, whichever came first in this run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda_on_cpu/kernel/memory.h"
#include "cuda_on_cpu/runtime/shadow/order.h"

namespace cuda_on_cpu {

class SharedShadow {
 public:
  explicit SharedShadow(size_t bytes);
  void reset(int num_threads);  // for the next block
  char* data() { return data_; }
  size_t size() const { return cells_.size(); }
  bool contains(const void* address) const {
    const char* p = static_cast<const char*>(address);
    return p >= data_ && p < data_ + cells_.size();
  }
  void open(size_t begin, size_t bytes);       // part of an array from now on, unwritten
  void unwritten(size_t begin, size_t bytes);  // cp.async: the old bytes are gone, the new ones have not arrived
  // Checks one access and records it. Returns the fault, or "".
  std::string access(const void* address, size_t bytes, Access kind, int thread, const void* instruction);
  Clocks clocks;
  // The instruction of the access that the last error names as the other party, or null.
  const void* other = nullptr;

 private:
  struct Stamp {
    uint32_t epoch = 0, stamp = 0;
    int32_t thread = -1;
    const void* instruction = nullptr;
  };
  struct Cell {  // of one byte
    bool open = false, written = false, atomic = false;
    Stamp write, read, read_too;  // two readers, so that a write by one of them still meets the other
  };
  std::vector<Cell> cells_;
  size_t used_ = 0;  // bytes up to the end of the last array
  std::vector<char> storage_;
  char* data_ = nullptr;
};

}  // namespace cuda_on_cpu
