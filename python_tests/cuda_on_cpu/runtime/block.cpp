#include "cuda_on_cpu/runtime/block.h"

#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <stdexcept>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {
namespace {

constexpr size_t kStaticLimit = 48 * 1024, kLimit = 227 * 1024;  // bytes of shared memory of a block on an H100
constexpr size_t kBetween = 64;                                  // bytes after each array that belong to none

Block* g_running = nullptr;

// Stacks and shared memory are kept for the next launch.
char* stack_of(size_t index) {
  static std::vector<char*> stacks;
  while (stacks.size() <= index) {
    void* memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("cuda_on_cpu: no memory for the stacks of a block's threads");
    mprotect(memory, 4096, PROT_NONE);  // a stack that overflows must not run into the next
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[index];
}

SharedShadow& shadow_of(size_t slot) {
  static std::vector<std::unique_ptr<SharedShadow>> shadows;
  while (shadows.size() <= slot) {
    shadows.push_back(std::make_unique<SharedShadow>(kLimit + 32 * kBetween));  // with room for the gaps
  }
  return *shadows[slot];
}

}  // namespace

int Quiet::depth = 0;

Block* running() { return g_running; }

Block::Block(const Launch& launch, int slot, std::mt19937_64& random)
    : launch_(launch), random_(random), shadow_(shadow_of(slot)) {
  num_threads_ = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  threads_.resize(num_threads_);
  for (int t = 0; t < num_threads_; ++t) {
    threads_[t].stack = stack_of(static_cast<size_t>(slot) * 1024 + static_cast<size_t>(t));
  }
}

uint3 Block::index_of(uint32_t number) const {
  const dim3& grid = launch_.grid;
  return {Index(number % grid.x), Index(number / grid.x % grid.y), Index(number / (grid.x * grid.y))};
}

std::string Block::index_text(uint32_t number) const {
  const uint3 index = index_of(number);
  return concat("(", index.x, ", ", index.y, ", ", index.z, ")");
}

void Block::start(uint32_t number) {
  number_ = number;
  shadow_.reset(num_threads_);
  arrays_.clear();
  used_ = static_bytes_ = 0;
  done_ = at_barrier_ = 0;
  collectives_.assign((num_threads_ + kWarp - 1) / kWarp, {});
  ready_.clear();
  next_ = 0;
  if (launch_.dynamic_bytes > 0) shared(this, launch_.dynamic_bytes, 128, "dynamic shared memory");
  const uint3 index = index_of(number);
  const dim3& size = launch_.block;
  for (int t = 0; t < num_threads_; ++t) {
    Thread& thread = threads_[t];
    thread.state = Thread::State::kReady;
    thread.copies.clear();
    thread.copy_group = thread.unchanged = 0;
    thread.fake_stack = nullptr;
    thread.segment = 0;
    thread.known = thread.fenced = thread.seen = nullptr;
    const auto i = static_cast<unsigned>(t);
    thread.self.linear = t;
    thread.self.thread_idx = {Index(i % size.x), Index(i / size.x % size.y), Index(i / (size.x * size.y))};
    thread.self.block_idx = index;
    thread.self.block_dim = {Index(size.x), Index(size.y), Index(size.z)};
    thread.self.grid_dim = {Index(launch_.grid.x), Index(launch_.grid.y), Index(launch_.grid.z)};
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack + 4096;
    thread.context.uc_stack.ss_size = kStackBytes - 4096;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, &Block::entry, 0);
  }
  // Whole warps or single lanes first, as the seed will have it: some faults need the one order, some the other.
  by_warp_ = random_() & 1;
}

void Block::step() {
  yielded_ = false;
  while (next_ < ready_.size() && threads_[ready_[next_]].state != Thread::State::kReady) ++next_;
  if (next_ == ready_.size()) {
    ready_.clear();
    next_ = 0;
    for (int t = 0; t < num_threads_; ++t) {
      if (threads_[t].state == Thread::State::kReady) ready_.push_back(t);
    }
    if (ready_.empty()) {
      report_stuck();
      throw std::runtime_error(error_);
    }
    std::shuffle(ready_.begin(), ready_.end(), random_);
    if (by_warp_) {
      const int warp = ready_.front() / kWarp;
      std::stable_partition(ready_.begin(), ready_.end(), [&](int t) { return t / kWarp == warp; });
    }
  }
  g_running = this;
  switch_to(ready_[next_++]);
  g_running = nullptr;
  if (!error_.empty()) throw std::runtime_error(error_);
}

void Block::entry() {
  Block* block = g_running;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &block->host_stack_, &block->host_stack_size_);
#endif
  Quiet::depth = 0;
  block->launch_.call(block->launch_.arguments);
  Quiet::depth = 1;
  if (!block->current().copies.empty()) {
    fault("the thread ends with asynchronous copies that it never waited for", Site{});
  }
  block->current().state = Thread::State::kDone;
  ++block->done_;
  block->switch_back(true);
}

void Block::switch_to(int index) {
  current_ = index;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&host_fake_stack_, threads_[index].stack + 4096, kStackBytes - 4096);
#endif
  swapcontext(&host_, &threads_[index].context);
  Quiet::depth = 1;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(host_fake_stack_, nullptr, nullptr);
#endif
}

void Block::switch_back([[maybe_unused]] bool finished) {
  Thread& thread = current();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(finished ? nullptr : &thread.fake_stack, host_stack_, host_stack_size_);
#endif
  thread.quiet = Quiet::depth;
  swapcontext(&thread.context, &host_);
  Quiet::depth = thread.quiet;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(thread.fake_stack, &host_stack_, &host_stack_size_);
#endif
}

void Block::wait(Thread::State state, const Site& site) {
  current().state = state;
  current().waits_at = site;
  switch_back(false);
}

void* Block::shared(const void* tag, size_t bytes, size_t align, const char* name) {
  for (const SharedArray& array : arrays_) {
    if (array.tag == tag) return shadow_.data() + array.begin;
  }
  align = std::max<size_t>(align, 16);
  const bool is_static = tag != this;
  if (is_static) static_bytes_ += bytes;
  if (static_bytes_ > kStaticLimit || static_bytes_ + launch_.dynamic_bytes > kLimit) {
    fault(concat("too much shared memory: with ", name, " ", static_bytes_, " bytes of arrays and ",
                 launch_.dynamic_bytes, " dynamic; a GPU gives ", kStaticLimit, " to arrays and an H100 ", kLimit,
                 " in all"),
          launch_.site);
  }
  const size_t begin = (used_ + align - 1) / align * align;
  if (begin + bytes > shadow_.size()) fault(concat("more than 32 shared arrays, at ", name), launch_.site);
  arrays_.push_back({tag, begin, bytes, name});
  shadow_.open(begin, bytes);
  used_ = begin + bytes + kBetween;
  return shadow_.data() + begin;
}

void* Block::dynamic() {
  if (launch_.dynamic_bytes == 0) {
    fault("dynamic shared memory is used, but the launch asked for none", launch_.site);
  }
  return shared(this, launch_.dynamic_bytes, 128, "dynamic shared memory");
}

const SharedArray* Block::array_at(size_t offset) const {
  const SharedArray* nearest = nullptr;
  for (const SharedArray& array : arrays_) {
    if (array.begin <= offset) nearest = &array;
  }
  return nearest;
}

void Block::fail(const std::string& what, const std::string& where) {
  const Self& me = current().self;
  const auto index = [](auto v) { return concat("(", v.x, ", ", v.y, ", ", v.z, ")"); };
  error_ = concat("cuda_on_cpu: ", what, "\n  at ", where, "\n  in ", launch_.kernel, ", block ", index(me.block_idx),
                  ", thread ", index(me.thread_idx), ", launched at ", launch_.site.text());
  switch_back(true);
  std::abort();  // the block never runs a thread again
}

}  // namespace cuda_on_cpu
