// The running block: its threads as fibers, the places where they wait, its shared memory. Private to the runtime.
#pragma once

#include <ucontext.h>

#include <array>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_on_cpu/kernel/device.h"
#include "cuda_on_cpu/kernel/warp.h"
#include "cuda_on_cpu/runtime/shadow.h"

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
  int quiet = 0;  // kept across switches, see Quiet
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
  Block(const char* kernel, const Site& site, dim3 grid, dim3 block, size_t dynamic_bytes, void (*call)(const void*),
        const void* arguments, std::mt19937_64& random);
  void run(uint3 index);

  Thread& current() { return threads_[current_]; }
  int barrier(Vote vote, int predicate, const Site& site);
  uint64_t collective(WarpOp op, unsigned mask, uint64_t value, int argument, const Site& site);
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

  std::string kernel_;
  Site launched_at_;
  dim3 grid_, block_;
  size_t dynamic_bytes_;
  void (*call_)(const void*);
  const void* arguments_;
  std::mt19937_64& random_;
  std::vector<Thread> threads_;
  std::vector<std::vector<Collective>> collectives_;  // per warp, those still open
  std::vector<SharedArray> arrays_;
  SharedShadow shadow_;
  size_t used_ = 0;
  ucontext_t host_;
  void* host_fake_stack_ = nullptr;
  const void* host_stack_ = nullptr;
  size_t host_stack_size_ = 0;
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
