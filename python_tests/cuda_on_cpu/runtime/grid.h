// A launch: which of its blocks run at the same time, and which of them runs next.
#pragma once

#include <memory>
#include <random>
#include <unordered_map>
#include <vector>

#include "cuda_on_cpu/runtime/block.h"
#include "cuda_on_cpu/runtime/shadow/global.h"

namespace cuda_on_cpu {

class Grid {
 public:
  Grid(const Launch& launch, uint64_t seed);
  void run();

  // At an atomic operation on global memory, or a fence: now and then another block goes on.
  void maybe_yield(Block& block);
  void finish_atomic(const void* address, bool has_changed, const void* instruction, Block& block);
  static GlobalShadow& shadow();

 private:
  bool starts_block(Block& block);

  const Launch& launch_;
  std::mt19937_64 random_;
  uint64_t next_ = 0;            // place in order_ of the next block to start
  std::vector<uint32_t> order_;  // of the blocks
  std::vector<std::unique_ptr<Block>> resident_;
  uint64_t steps_ = 1;  // between two changes of the block at other places, on average
  // What a fence covers before the atomic operations on an address, since the launch began.
  std::unordered_map<const void*, KnownPtr> told_;
};

// The launch that is running, or null.
Grid* running_grid();

}  // namespace cuda_on_cpu
