#include "cuda_on_cpu/runtime/grid.h"

#include <algorithm>

namespace cuda_on_cpu {
namespace {

constexpr size_t kMostResident = 4;
constexpr int kMostUnchanged = 1 << 16;

Grid* g_grid = nullptr;

}  // namespace

Grid* running_grid() { return g_grid; }

GlobalShadow& Grid::shadow() {
  static GlobalShadow shadow;
  return shadow;
}

Grid::Grid(const Launch& launch, uint64_t seed) : launch_(launch), random_(seed) {
  order_.resize(uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z);
  for (size_t i = 0; i < order_.size(); ++i) order_[i] = static_cast<uint32_t>(i);
  std::shuffle(order_.begin(), order_.end(), random_);
  // A block that stops while another runs to its end needs rare changes, two blocks in step frequent ones.
  steps_ = uint64_t{1} << (2 + 3 * (random_() % 4));
}

bool Grid::starts_block(Block& block) {
  if (next_ == order_.size()) return false;
  block.start(order_[next_++]);
  return true;
}

void Grid::run() {
  const Quiet quiet;
  shadow().start_launch();
  const struct Current {
    explicit Current(Grid* grid) { g_grid = grid; }
    ~Current() { g_grid = nullptr; }
  } current(this);
  const size_t num_resident = std::min(kMostResident, order_.size());
  for (size_t slot = 0; slot < num_resident; ++slot) {
    resident_.push_back(std::make_unique<Block>(launch_, static_cast<int>(slot), random_));
    starts_block(*resident_.back());
  }
  size_t turn = 0;
  while (!resident_.empty()) {
    Block& block = *resident_[turn];
    block.step();
    bool changes = random_() % (block.has_yielded() ? 2 : steps_) == 0;
    if (block.done()) {
      changes = true;
      if (!starts_block(block)) resident_.erase(resident_.begin() + static_cast<std::ptrdiff_t>(turn));
    }
    if (changes && !resident_.empty()) turn = random_() % resident_.size();
  }
}

void Grid::maybe_yield(Block& block) {
  if (resident_.size() > 1 && random_() % 2 == 0) block.yield();
}

void Grid::finish_atomic(const void* address, bool has_changed, const void* instruction, Block& block) {
  Thread& thread = block.current();
  if (thread.fenced != nullptr || !told_.empty()) {
    KnownPtr& told = told_[address];
    thread.seen = joined(thread.seen, told);
    told = joined(told, thread.fenced);
  }
  thread.unchanged = has_changed ? 0 : thread.unchanged + 1;
  if (thread.unchanged > kMostUnchanged) {
    fault_at(
        concat("waits for another block: ", kMostUnchanged, " atomic operations in a row have changed nothing, and ",
               "blocks of a launch need not run at the same time"),
        instruction);
  }
}

}  // namespace cuda_on_cpu
