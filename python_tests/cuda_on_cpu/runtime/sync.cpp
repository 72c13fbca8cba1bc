// Where a block's threads wait for each other: barriers, warp operations, and what fences make known.
#include <algorithm>
#include <map>

#include "cuda_on_cpu/runtime/block.h"

namespace cuda_on_cpu {

void Block::yield() {
  yielded_ = true;
  switch_back(false);
}

void Block::fence() {
  Thread& thread = current();
  thread.known = joined(thread.known, thread.seen);
  thread.seen = nullptr;
  auto covered = thread.known == nullptr ? std::make_shared<Known>() : std::make_shared<Known>(*thread.known);
  covered->add(number_, shadow_.clocks, thread.self.linear, num_threads_);
  thread.fenced = covered;
  shadow_.clocks.advance(thread.self.linear);  // what the thread does from here on is not covered
}

int Block::barrier(Vote vote, int predicate, const Site& site) {
  if (done_ > 0) {
    fault(concat("block barrier after ", done_, " of ", num_threads_, " threads have left the kernel"), site);
  }
  if (at_barrier_ > 0 && !(barrier_site_ == site)) {
    fault(concat("divergent block barriers: other threads of the block wait at ", barrier_site_.text()), site);
  }
  barrier_site_ = site;
  vote_ = vote;
  Thread& thread = current();
  thread.result = predicate != 0;
  if (++at_barrier_ == num_threads_) {
    finish_barrier();
    // The last thread to arrive resumes in turn, not at once: any thread may be the first after a barrier.
    thread.waits_at = site;
    switch_back(false);
  } else {
    wait(Thread::State::kAtBarrier, site);
  }
  return current().result;
}

void Block::finish_barrier() {
  int count = 0;
  for (const Thread& thread : threads_) count += thread.result;
  const int result = vote_ == Vote::kCount ? count
                     : vote_ == Vote::kAnd ? count == num_threads_
                     : vote_ == Vote::kOr  ? count > 0
                                           : 0;
  KnownPtr known;
  for (const Thread& thread : threads_) known = joined(known, thread.known);
  for (Thread& thread : threads_) {
    thread.result = result;
    thread.state = Thread::State::kReady;
    thread.known = known;
  }
  at_barrier_ = 0;
  shadow_.clocks.block_barrier();
}

uint64_t Block::collective(WarpOp op, unsigned mask, uint64_t value, int argument, const Site& site) {
  Thread& thread = current();
  const int lane = thread.self.lane(), warp = thread.self.warp();
  const int lanes = std::min(kWarp, num_threads_ - warp * kWarp);
  const unsigned exist = lanes == kWarp ? 0xffffffffu : (1u << lanes) - 1;
  if (!(mask >> lane & 1)) {
    fault(concat(name_of(op), ": lane ", lane, " calls it with a mask that does not name it (", hex(mask), ")"), site);
  }
  if (mask & ~exist) {
    fault(concat(name_of(op), ": the mask ", hex(mask), " names lanes that the warp of ", lanes, " does not have"),
          site);
  }
  auto& open = collectives_[warp];
  size_t which = 0;
  while (which < open.size() && !(open[which].mask & mask)) ++which;
  if (which == open.size()) {
    open.emplace_back();
    open.back().op = op;
    open.back().mask = mask;
    open.back().site = site;
  }
  Collective& slot = open[which];
  if (slot.op != op || slot.mask != mask || !(slot.site == site)) {
    fault(concat(name_of(op), " with mask ", hex(mask), ": other lanes of the warp wait at ", slot.site.text(), " in ",
                 name_of(slot.op), " with mask ", hex(slot.mask)),
          site);
  }
  slot.arrived |= 1u << lane;
  slot.value[lane] = value;
  slot.argument[lane] = argument;
  if (slot.arrived == mask) {
    finish_collective(warp, which);
    thread.waits_at = site;
    switch_back(false);
  } else {
    wait(Thread::State::kAtCollective, site);
  }
  return current().collective_result;
}

void Block::finish_collective(int warp, size_t which) {
  const Collective slot = collectives_[warp][which];
  collectives_[warp].erase(collectives_[warp].begin() + static_cast<std::ptrdiff_t>(which));
  if (slot.op == WarpOp::kSync) {
    shadow_.clocks.warp_sync(warp, slot.mask);
    KnownPtr known;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (slot.mask >> lane & 1) known = joined(known, threads_[warp * kWarp + lane].known);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      if (slot.mask >> lane & 1) threads_[warp * kWarp + lane].known = known;
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(slot.mask >> lane & 1)) continue;
    Thread& thread = threads_[warp * kWarp + lane];
    thread.collective_result = result_of(slot, lane);
    thread.state = Thread::State::kReady;
  }
}

void Block::report_stuck() {
  error_ = concat("cuda_on_cpu: the block cannot go on: ", lanes_waiting_at(), "\n  in ", launch_.kernel,
                  ", launched at ", launch_.site.text());
}

std::string Block::lanes_waiting_at() const {
  std::map<std::string, int> waiting;
  for (const Thread& thread : threads_) {
    if (thread.state == Thread::State::kAtBarrier) ++waiting["the block barrier at " + thread.waits_at.text()];
    if (thread.state == Thread::State::kDone) ++waiting["the end of the kernel"];
  }
  for (size_t warp = 0; warp < collectives_.size(); ++warp) {
    for (const Collective& slot : collectives_[warp]) {
      const std::string text = concat(name_of(slot.op), " at ", slot.site.text(), " (warp ", warp, ", mask ",
                                      hex(slot.mask), ", missing ", hex(slot.mask & ~slot.arrived), ")");
      waiting[text] += __builtin_popcount(slot.arrived);
    }
  }
  std::string out;
  for (const auto& [where, count] : waiting) {
    out += concat(out.empty() ? "" : "; ", count, count == 1 ? " thread" : " threads", " at ", where);
  }
  return out;
}

}  // namespace cuda_on_cpu
