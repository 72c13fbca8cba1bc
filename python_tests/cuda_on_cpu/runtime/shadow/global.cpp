#include "cuda_on_cpu/runtime/shadow/global.h"

#include <algorithm>

#include "cuda_on_cpu/runtime/block.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kMostCells = 8 << 20;  // 256 MB; more are dropped between launches

const char* origin() { return reinterpret_cast<const char*>(&joined); }

}  // namespace

void GlobalShadow::start_launch() {
  first_segment_ += static_cast<uint32_t>(segments_.size());
  segments_.clear();
  if (num_cells_ < kMostCells && first_segment_ < kAtomic / 2) return;
  pages_.clear();
  recent_.fill({});
  num_cells_ = 0;
  first_segment_ = 1;
}

GlobalShadow::Page& GlobalShadow::page_at(uintptr_t number) {
  Recent& recent = recent_[number % recent_.size()];
  if (recent.page == nullptr || recent.number != number) {
    std::unique_ptr<Page>& page = pages_[number];
    if (page == nullptr) {
      page = std::make_unique<Page>();
      num_cells_ += page->cells.size();
    }
    recent = {number, page.get()};
  }
  return *recent.page;
}

void GlobalShadow::split(Page& page, int shift) {
  const int by = page.shift - shift;
  std::vector<Cell> cells(page.cells.size() << by);
  for (size_t i = 0; i < cells.size(); ++i) cells[i] = page.cells[i >> by];
  num_cells_ += cells.size() - page.cells.size();
  page.cells = std::move(cells);
  page.shift = shift;
}

uint32_t GlobalShadow::segment_of(Block& block) {
  Thread& thread = block.current();
  const Clocks& clocks = block.shadow().clocks;
  const Segment now{block.number(), clocks.epoch(), clocks.stamp(thread.self.linear), thread.self.linear};
  if (thread.segment >= first_segment_) {
    const Segment& last = segments_[thread.segment - first_segment_];
    if (last.epoch == now.epoch && last.stamp == now.stamp) return thread.segment;
  }
  segments_.push_back(now);
  return thread.segment = first_segment_ + static_cast<uint32_t>(segments_.size()) - 1;
}

bool GlobalShadow::ordered(const Mark& mark, Block& block) const {
  const uint32_t number = mark.segment & ~kAtomic;
  if (number < first_segment_) return true;
  const Segment& before = segments_[number - first_segment_];
  const Thread& thread = block.current();
  if (before.block == block.number() &&
      block.shadow().clocks.ordered(before.thread, before.epoch, before.stamp, thread.self.linear)) {
    return true;
  }
  return thread.known != nullptr && thread.known->has(before);
}

std::string GlobalShadow::race(const char* what, const Mark& with, Block& block) {
  const Segment& before = segments_[(with.segment & ~kAtomic) - first_segment_];
  other = origin() + with.instruction;
  return concat("race on global memory: ", what, " thread ", before.thread, " of ",
                before.block == block.number() ? std::string("the same block, with no barrier between")
                                               : concat("block ", block.index_text(before.block),
                                                        ", with no fence, atomic operation and fence between"));
}

// In place of a read that this one comes after. Else reads of as many blocks as possible are kept, two of one block
// where there is room, and of a block's readers any.
GlobalShadow::Mark* GlobalShadow::place_of(Cell& cell, const Mark& now, Block& block) {
  std::array<uint32_t, 3> blocks;
  for (size_t i = 0; i < 3; ++i) {
    if (cell.reads[i].segment == now.segment || ordered(cell.reads[i], block)) return &cell.reads[i];
    blocks[i] = segments_[cell.reads[i].segment - first_segment_].block;
  }
  random_ = random_ * 1664525u + 1013904223u;
  const uint32_t pick = random_ >> 16;
  for (size_t i = 0; i < 3; ++i) {
    const size_t other = i == 2 ? 0 : i + 1;
    if (blocks[i] == blocks[other]) return &cell.reads[pick % 2 == 0 ? i : other];
  }
  for (size_t i = 0; i < 3; ++i) {
    if (blocks[i] == block.number()) return &cell.reads[i];
  }
  return &cell.reads[pick % 3];
}

std::string GlobalShadow::access(const char* address, size_t bytes, Access kind, Block& block,
                                 const void* instruction) {
  const auto begin = reinterpret_cast<uintptr_t>(address), end = begin + bytes;
  const int shift = std::min(__builtin_ctzll(begin | bytes | 16), 4);
  Mark now{segment_of(block), static_cast<int32_t>(static_cast<const char*>(instruction) - origin())};
  if (kind == Access::kAtomic) now.segment |= kAtomic;
  for (uintptr_t at = begin; at < end;) {
    Page& page = page_at(at / kPageBytes);
    if (page.shift > shift) split(page, shift);
    const uintptr_t stop = std::min(end, (at / kPageBytes + 1) * kPageBytes);
    const size_t last = (stop - 1) % kPageBytes >> page.shift;
    for (size_t i = at % kPageBytes >> page.shift; i <= last; ++i) {
      Cell& cell = page.cells[i];
      const bool both_atomic = kind == Access::kAtomic && (cell.write.segment & kAtomic) != 0;
      if (!both_atomic && !ordered(cell.write, block)) {
        return race(kind == Access::kRead ? "read here, written by" : "written here and by", cell.write, block);
      }
      if (kind != Access::kRead) {
        for (const Mark& read : cell.reads) {
          if (!ordered(read, block)) return race("written here, read by", read, block);
        }
        cell.write = now;
        cell.reads.fill({});
        continue;
      }
      *place_of(cell, now, block) = now;
    }
    at = stop;
  }
  return "";
}

}  // namespace cuda_on_cpu
