// A block: its threads as fibers, the places where they wait, its shared memory. Private to the runtime.
#pragma once

#include <ucontext.h>

#include <array>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_on_cpu/kernel/device.h"
#include "cuda_on_cpu/kernel/warp.h"
#include "cuda_on_cpu/runtime/shadow/shared.h"

namespace cuda_on_cpu {

struct PendingCopy {  // a cp.async whose data has not arrived
  void* to;
  const void* from;
  size_t bytes;
  int group;
};

struct Thread {
  enum class State { kReady, kAtBarrier, kAtCollective, kDone };
  Self self;
  State state = State::kReady;
  ucontext_t context;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's, kept across switches
  Site waits_at;
  int result = 0;  // of a block barrier
  uint64_t collective_result = 0;
  std::vector<PendingCopy> copies;
  int copy_group = 0;
  int quiet = 0;         // kept across switches, see Quiet
  uint32_t segment = 0;  // the number of its last one, see GlobalShadow
  // By fences: what it knows; what its last fence covers, which its atomic operations tell; and what the atomic
  // operations since have told it, which it knows at its next fence.
  KnownPtr known, fenced, seen;
  int unchanged = 0;  // atomic operations in a row that changed nothing
};

// While one exists, accesses are the runtime's own and are not checked: templates that it shares with kernels may be
// linked in their instrumented form.
class Quiet {
 public:
  Quiet() { ++depth; }
  ~Quiet() { --depth; }
  static int depth;
};

// A warp-wide operation that some of its lanes have reached.
struct Collective {
  WarpOp op;
  unsigned mask = 0;
  unsigned arrived = 0;
  Site site;
  std::array<uint64_t, kWarp> value{};
  std::array<int, kWarp> argument{};
};

struct SharedArray {
  const void* tag;
  size_t begin;
  size_t bytes;
  std::string name;
};

// The result of `lane` of a collective that all its lanes have reached.
uint64_t result_of(const Collective& slot, int lane);

class Block {
 public:
  // `slot`: its place among the blocks that are resident at the same time.
  Block(const Launch& launch, int slot, std::mt19937_64& random);
  void start(uint32_t number);  // the next block of the grid, in place of the one that is done
  // Runs one thread until it waits, yields or ends. Throws std::runtime_error for a fault.
  void step();
  bool done() const { return done_ == num_threads_; }
  bool has_yielded() const { return yielded_; }  // in the last step: a place where other blocks matter

  uint32_t number() const { return number_; }
  std::string index_text(uint32_t number) const;
  Thread& current() { return threads_[current_]; }
  int barrier(Vote vote, int predicate, const Site& site);
  uint64_t collective(WarpOp op, unsigned mask, uint64_t value, int argument, const Site& site);
  void yield();
  void fence();
  void* shared(const void* tag, size_t bytes, size_t align, const char* name);
  void* dynamic();
  const SharedArray* array_at(size_t offset) const;
  SharedShadow& shadow() { return shadow_; }
  [[noreturn]] void fail(const std::string& what, const std::string& where);

 private:
  static void entry();
  void wait(Thread::State state, const Site& site);
  void switch_to(int index);
  void switch_back(bool finished);
  void finish_barrier();
  void finish_collective(int warp, size_t which);
  void report_stuck();
  std::string lanes_waiting_at() const;
  uint3 index_of(uint32_t number) const;

  const Launch& launch_;
  std::mt19937_64& random_;
  std::vector<Thread> threads_;
  std::vector<int> ready_;  // in the order of this round; those from next_ on have not run in it
  size_t next_ = 0;
  bool by_warp_ = false, yielded_ = false;
  std::vector<std::vector<Collective>> collectives_;  // per warp, those still open
  std::vector<SharedArray> arrays_;
  SharedShadow& shadow_;
  size_t used_ = 0, static_bytes_ = 0;
  ucontext_t host_;
  void* host_fake_stack_ = nullptr;
  const void* host_stack_ = nullptr;
  size_t host_stack_size_ = 0;
  uint32_t number_ = 0;
  int current_ = -1;
  int num_threads_ = 0, done_ = 0, at_barrier_ = 0;
  Vote vote_ = Vote::kNone;
  Site barrier_site_;
  std::string error_;
};

constexpr size_t kStackBytes = 256 * 1024;  // address space of each thread; pages are used when touched

// The block whose thread is running, or null on the host.
Block* running();

}  // namespace cuda_on_cpu
