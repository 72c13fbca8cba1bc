// Launches, faults, and the check of every address that a kernel touches.
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "cuda_on_cpu/kernel/events.h"
#include "cuda_on_cpu/kernel/memory.h"
#include "cuda_on_cpu/runtime/grid.h"

namespace cuda_on_cpu {
namespace {

struct Range {
  const char* begin;
  const char* end;
};

constexpr uint64_t kMostBlocks = 1 << 20;

std::mutex g_launch;  // one kernel at a time
uint64_t g_seed = 0, g_launches = 0;
std::vector<Range> g_allowed;
Range g_arguments{nullptr, nullptr};
std::unordered_map<const void*, size_t> g_dynamic_shared;  // of kernels that may have more than 48 KB

// The module's own data: constants and tables.
bool in_this_module(const char* p) {
  static const std::vector<Range> segments = [] {
    std::vector<Range> found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          std::vector<Range> mine;
          bool here = false;
          const auto me = reinterpret_cast<const char*>(&in_this_module);
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
            const char* begin = reinterpret_cast<const char*>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
            mine.push_back({begin, begin + info->dlpi_phdr[i].p_memsz});
            here = here || (me >= mine.back().begin && me < mine.back().end);
          }
          if (here) *static_cast<std::vector<Range>*>(out) = mine;
          return here ? 1 : 0;
        },
        &found);
    return found;
  }();
  return std::any_of(segments.begin(), segments.end(), [&](const Range& r) { return p >= r.begin && p < r.end; });
}

// "embed_cuda.cu" of a path.
std::string source_name(const Site& site) {
  const std::string path = site.file;
  return path.substr(path.find_last_of('/') + 1);
}

bool inside(const Range& r, const char* p, size_t bytes) { return p >= r.begin && p + bytes <= r.end; }

// "file:line" of an instruction, by addr2line where it is installed.
std::string source_of(const void* instruction) {
  Dl_info info;
  if (instruction == nullptr || dladdr(instruction, &info) == 0) return "an unknown place";
  const auto base = reinterpret_cast<uintptr_t>(info.dli_fbase);
  auto offset = reinterpret_cast<uintptr_t>(instruction) - 1;  // a return address: the call is before it
  // A program at a fixed address keeps absolute addresses in its debug information.
  const auto* header = static_cast<const ElfW(Ehdr)*>(info.dli_fbase);
  if (header->e_type == ET_DYN) offset -= base;
  // -i lists what was inlined there, the innermost first: the first that is not one of these headers is the kernel's.
  const std::string command = concat("addr2line -i -e '", info.dli_fname, "' 0x", std::hex, offset, " 2>/dev/null");
  std::string text;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char line[1024];
    while (std::fgets(line, sizeof line, pipe) != nullptr) {
      const std::string place = std::string(line).substr(0, std::string(line).find_first_of(" \n"));
      if (place.empty() || place[0] == '?') continue;
      text = place;
      const bool header = text.find("/cuda_on_cpu/") != std::string::npos && text.find(".h:") != std::string::npos;
      if (!header) break;
    }
    pclose(pipe);
  }
  if (text.empty()) text = info.dli_sname != nullptr ? info.dli_sname : info.dli_fname;
  return text;
}

}  // namespace

std::string Site::text() const { return concat(file[0] ? file : "?", ":", line); }

std::string hex(unsigned value) {
  std::ostringstream out;
  out << "0x" << std::hex << value;
  return out.str();
}

void fault(const std::string& what, const Site& site) {
  ++Quiet::depth;  // for the rest of the launch
  if (running() == nullptr) {
    --Quiet::depth;
    throw std::runtime_error(concat("cuda_on_cpu: ", what, "\n  at ", site.text()));
  }
  running()->fail(what, site.text());
}

void fault_at(const std::string& what, const void* instruction) {
  ++Quiet::depth;
  const std::string where = source_of(instruction);
  if (running() == nullptr) {
    --Quiet::depth;
    throw std::runtime_error(concat("cuda_on_cpu: ", what, "\n  at ", where));
  }
  running()->fail(what, where);
}

const Self& self() {
  static const Self host;
  return running() != nullptr ? running()->current().self : host;
}

int block_barrier(Vote vote, int predicate, const Site& site) {
  const Quiet quiet;
  if (running() == nullptr) fault("__syncthreads outside a kernel", site);
  return running()->barrier(vote, predicate, site);
}

void* shared_array(const void* tag, size_t bytes, size_t align, const char* name) {
  const Quiet quiet;
  if (running() == nullptr) fault(concat("shared array ", name, " outside a kernel"), Site{});
  return running()->shared(tag, bytes, align, name);
}

void* dynamic_shared() {
  const Quiet quiet;
  if (running() == nullptr) fault("dynamic shared memory outside a kernel", Site{});
  return running()->dynamic();
}

void set_seed(uint64_t seed) {
  g_seed = seed;
  g_launches = 0;
}

void allow_memory(const void* data, size_t bytes) {
  const char* begin = static_cast<const char*>(data);
  if (data != nullptr && bytes > 0) g_allowed.push_back({begin, begin + bytes});
}

void forget_memory() { g_allowed.clear(); }

void expect_memory(const void* address, size_t bytes, const char* what) {
#ifndef SX_NO_HOOKS
  const char* p = static_cast<const char*>(address);
  if (std::any_of(g_allowed.begin(), g_allowed.end(), [&](const Range& r) { return inside(r, p, bytes); })) return;
  fault(concat(what, ": ", bytes, " bytes that belong to no argument of the call"), Site{});
#endif
}

void allow_dynamic_shared(const void* kernel, size_t bytes) { g_dynamic_shared[kernel] = bytes; }

void run_grid(const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  const auto refuse = [&](const auto&... what) { fault(concat(launch.kernel, ": ", what...), launch.site); };
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > 1024 || block.z > 64) {
    refuse("a block of ", block.x, " x ", block.y, " x ", block.z, " threads; a GPU takes 1 to 1024, 64 in z");
  }
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) {
    refuse("a grid of ", grid.x, " x ", grid.y, " x ", grid.z, "; a GPU takes 1 to 65535 in y and z, 2^31 - 1 in x");
  }
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (blocks > kMostBlocks) {
    refuse("a grid of ", blocks, " blocks; the shim takes up to ", kMostBlocks);
  }
  if (launch.parameter_bytes > 4096)
    refuse(launch.parameter_bytes, " bytes of parameters; CUDA before 12.1 takes 4096");
  const auto allowed = g_dynamic_shared.find(launch.function);
  const size_t limit = allowed == g_dynamic_shared.end() ? 48 * 1024 : std::max<size_t>(allowed->second, 48 * 1024);
  if (launch.dynamic_bytes > limit) {
    refuse(launch.dynamic_bytes, " bytes of dynamic shared memory; cudaFuncSetAttribute allows the kernel ", limit);
  }
  count_event(concat(source_name(launch.site), ": ", launch.kernel));
  const std::lock_guard<std::mutex> one(g_launch);
  const char* begin = static_cast<const char*>(launch.arguments);
  g_arguments = {begin, begin + launch.argument_bytes};
  Grid(launch, g_seed * 0x9E3779B97F4A7C15ull + ++g_launches).run();
}

void fence() {
  const Quiet quiet;
  if (running() == nullptr) fault("__threadfence outside a kernel", Site{});
  running_grid()->maybe_yield(*running());
  running()->fence();
}

namespace {

bool is_global(const void* address) { return running() != nullptr && !running()->shadow().contains(address); }

}  // namespace

void begin_atomic(const void* address) {
  const Quiet quiet;
  if (is_global(address)) running_grid()->maybe_yield(*running());
}

void finish_atomic(const void* address, bool has_changed, const void* instruction) {
  const Quiet quiet;
  if (!is_global(address)) return;
  running_grid()->finish_atomic(address, has_changed, instruction, *running());
  running_grid()->maybe_yield(*running());
}

namespace {

// An access of 2, 4, 8 or 16 bytes needs an address that is a multiple of them.
void check_vector(const char* p, size_t bytes, const void* instruction) {
  if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fault_at(concat("misaligned access of ", bytes, " bytes"), instruction);
  }
}

}  // namespace

void touch(const void* address, size_t bytes, Access kind, const void* instruction) {
  if (Quiet::depth > 0) return;
  const Quiet quiet;
  check_access(address, bytes, kind, instruction);
}

void check_access(const void* address, size_t bytes, Access kind, const void* instruction) {
#ifdef SX_NO_HOOKS
  (void)address, (void)bytes, (void)kind, (void)instruction;
  return;
#endif
  Block* block = running();
  if (block == nullptr) return;
  const char* p = static_cast<const char*>(address);
  const Thread& thread = block->current();
  // The thread's own stack first: most accesses are to locals.
  if (p >= thread.stack && p < thread.stack + kStackBytes) return;
  if (inside({reinterpret_cast<const char*>(&thread.self), reinterpret_cast<const char*>(&thread.self + 1)}, p,
             bytes)) {
    return;  // threadIdx and its kin
  }
  SharedShadow& shadow = block->shadow();
  if (shadow.contains(p)) {
    check_vector(p, bytes, instruction);
    const std::string wrong = shadow.access(p, bytes, kind, thread.self.linear, instruction);
    if (wrong.empty()) return;
    const size_t offset = static_cast<size_t>(p - shadow.data());
    const SharedArray* array = block->array_at(offset);
    std::string what = wrong;
    if (array != nullptr) what += concat(": ", array->name, ", byte ", offset - array->begin, " of ", array->bytes);
    if (shadow.other != nullptr) what += concat("; the other access is at ", source_of(shadow.other));
    fault_at(what, instruction);
  }
  for (size_t i = g_allowed.size(); i-- > 0;) {
    if (inside(g_allowed[i], p, bytes)) {
      std::swap(g_allowed[i], g_allowed.back());  // the same one is likely to be next
      check_vector(p, bytes, instruction);
      const std::string wrong = Grid::shadow().access(p, bytes, kind, *block, instruction);
      if (!wrong.empty()) {
        fault_at(concat(wrong, "; the other access is at ", source_of(Grid::shadow().other)), instruction);
      }
      return;
    }
  }
  if (inside(g_arguments, p, bytes) || in_this_module(p)) return;
  fault_at(concat(kind == Access::kRead ? "read" : "write", " of ", bytes,
                  " bytes of global memory that belong to no argument of the kernel"),
           instruction);
}

}  // namespace cuda_on_cpu
