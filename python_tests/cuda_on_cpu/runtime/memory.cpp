#include "cuda_on_cpu/kernel/memory.h"

#include <algorithm>

#include "cuda_on_cpu/runtime/block.h"

namespace cuda_on_cpu {

void check_aligned(const void* address, size_t bytes, const char* what, const void* instruction) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  const Quiet quiet;
  fault_at(concat("misaligned ", what, ": its address must be a multiple of ", bytes, " bytes"), instruction);
}

void index_overflow(int64_t exact, const char* operation, const void* instruction) {
  ++Quiet::depth;  // for the rest of the launch
  fault_at(concat("a ", operation, " of 32-bit indices is ", exact, ": more than 32 bits"), instruction);
}

void copy_later(void* to, const void* from, size_t bytes, const Site& site) {
  const Quiet quiet;
  if (running() == nullptr) fault("asynchronous copy outside a kernel", site);
  if (bytes != 4 && bytes != 8 && bytes != 16) fault(concat("cp.async copies 4, 8 or 16 bytes; got ", bytes), site);
  const void* here = __builtin_return_address(0);
  check_aligned(to, bytes, "cp.async", here);
  check_aligned(from, bytes, "cp.async", here);
  Block& block = *running();
  if (!block.shadow().contains(to)) fault("cp.async must copy into shared memory", site);
  check_access(from, bytes, Access::kRead, here);
  check_access(to, bytes, Access::kWrite, here);
  block.shadow().unwritten(static_cast<size_t>(static_cast<char*>(to) - block.shadow().data()), bytes);
  Thread& thread = block.current();
  thread.copies.push_back({to, from, bytes, thread.copy_group});
}

void commit_copies() {
  if (running() != nullptr) ++running()->current().copy_group;
}

void wait_for_copies(int groups_left) {
  const Quiet quiet;
  if (running() == nullptr) return;
  Thread& thread = running()->current();
  const int done_before = thread.copy_group - groups_left;
  const void* here = __builtin_return_address(0);
  auto& copies = thread.copies;
  for (const PendingCopy& copy : copies) {
    if (copy.group >= done_before) continue;
    check_access(copy.to, copy.bytes, Access::kWrite, here);
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
  copies.erase(
      std::remove_if(copies.begin(), copies.end(), [&](const PendingCopy& c) { return c.group < done_before; }),
      copies.end());
}

}  // namespace cuda_on_cpu
