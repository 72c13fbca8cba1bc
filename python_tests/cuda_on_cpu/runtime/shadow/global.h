// The last accesses to each byte of global memory in the running launch, to find races in any order of blocks: two
// accesses, one of them a write, of threads that nothing orders.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_on_cpu/runtime/shadow/order.h"
#include "cuda_on_cpu/runtime/shadow/shared.h"

namespace cuda_on_cpu {

class Block;

class GlobalShadow {
 public:
  void start_launch();  // everything before it is ordered
  // Checks an access by the block's current thread and records it. Returns the fault, or "".
  std::string access(const char* address, size_t bytes, Access kind, Block& block, const void* instruction);
  // The instruction of the access that the last error names as the other party.
  const void* other = nullptr;

 private:
  struct Mark {
    uint32_t segment = 0;     // number of the segment; the highest bit: an atomic operation
    int32_t instruction = 0;  // from an address in this module
  };
  struct Cell {
    Mark write;
    std::array<Mark, 3> reads;  // some of them, where there are more
  };
  // Cells of a few bytes each: as many as the smallest access to the page has had.
  struct Page {
    int shift = 4;
    std::vector<Cell> cells = std::vector<Cell>(kPageBytes >> 4);
  };
  static constexpr size_t kPageBytes = 4096;
  static constexpr uint32_t kAtomic = 1u << 31;

  Page& page_at(uintptr_t number);
  void split(Page& page, int shift);
  uint32_t segment_of(Block& block);
  bool ordered(const Mark& mark, Block& block) const;
  Mark* place_of(Cell& cell, const Mark& now, Block& block);
  std::string race(const char* what, const Mark& with, Block& block);

  std::vector<Segment> segments_;  // of this launch
  uint32_t first_segment_ = 1;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  size_t num_cells_ = 0;
  struct Recent {
    uintptr_t number = 0;
    Page* page = nullptr;
  };
  std::array<Recent, 64> recent_;
  uint32_t random_ = 0;
};

}  // namespace cuda_on_cpu
