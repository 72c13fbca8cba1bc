// Which accesses of a launch happened before which: vector clocks. Within a block barriers order everything, and
// __syncwarp the lanes of its mask; between blocks only __threadfence does, before the atomic operation that tells of
// the work and after the atomic operation that sees it.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace cuda_on_cpu {

// A thread's accesses between two points at which its clock changes.
struct Segment {
  uint32_t block;
  uint32_t epoch;  // block barriers before it
  uint32_t stamp;
  int thread;
};

// Order among threads of a block, by barriers and __syncwarp alone: one component per lane.
class Clocks {
 public:
  explicit Clocks(int num_threads);
  void block_barrier() { ++epoch_; }
  void warp_sync(int warp, unsigned mask);
  void advance(int thread) { ++clock_[thread][thread % 32]; }
  uint32_t epoch() const { return epoch_; }
  uint32_t stamp(int thread) const { return clock_[thread][thread % 32]; }
  // The last stamp of `other`, a lane of the same warp, that `thread` knows.
  uint32_t known(int thread, int other) const { return clock_[thread][other % 32]; }
  // Whether an access of `before` with that epoch and stamp happened before everything that `now` does from here on.
  bool ordered(int before, uint32_t epoch, uint32_t stamp, int now) const;

 private:
  uint32_t epoch_ = 1;
  std::vector<std::array<uint32_t, 32>> clock_;
};

// The accesses that a thread knows by fences and atomic operations.
class Known {
 public:
  bool has(const Segment& segment) const;
  void join(const Known& other);
  // What `thread` of the block knows at a fence: the block before its last barrier, and the thread's warp.
  void add(uint32_t block, const Clocks& clocks, int thread, int num_threads);

 private:
  struct OfBlock {
    uint32_t epoch = 0;               // everything before this epoch
    std::map<int, uint32_t> threads;  // and these threads up to a stamp
  };
  std::map<uint32_t, OfBlock> blocks_;
};

using KnownPtr = std::shared_ptr<const Known>;  // null: nothing
KnownPtr joined(const KnownPtr& a, const KnownPtr& b);

}  // namespace cuda_on_cpu
