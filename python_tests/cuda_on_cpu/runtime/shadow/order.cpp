#include "cuda_on_cpu/runtime/shadow/order.h"

#include <algorithm>

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

bool Known::has(const Segment& segment) const {
  const auto block = blocks_.find(segment.block);
  if (block == blocks_.end()) return false;
  if (segment.epoch < block->second.epoch) return true;
  const auto thread = block->second.threads.find(segment.thread);
  return thread != block->second.threads.end() && segment.stamp <= thread->second;
}

void Known::join(const Known& other) {
  for (const auto& [block, theirs] : other.blocks_) {
    OfBlock& mine = blocks_[block];
    mine.epoch = std::max(mine.epoch, theirs.epoch);
    for (const auto& [thread, stamp] : theirs.threads) {
      uint32_t& last = mine.threads[thread];
      last = std::max(last, stamp);
    }
  }
}

void Known::add(uint32_t block, const Clocks& clocks, int thread, int num_threads) {
  OfBlock& own = blocks_[block];
  own.epoch = std::max(own.epoch, clocks.epoch());
  const int first = thread / 32 * 32;
  for (int t = first; t < std::min(first + 32, num_threads); ++t) {
    const uint32_t stamp = clocks.known(thread, t);
    if (stamp > 0) own.threads[t] = std::max(own.threads[t], stamp);
  }
}

KnownPtr joined(const KnownPtr& a, const KnownPtr& b) {
  if (a == nullptr || a == b) return b;
  if (b == nullptr) return a;
  auto both = std::make_shared<Known>(*a);
  both->join(*b);
  return both;
}

}  // namespace cuda_on_cpu
