// Launches, faults, and the check of every address that a kernel touches.
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "cuda_on_cpu/kernel/events.h"
#include "cuda_on_cpu/kernel/memory.h"
#include "cuda_on_cpu/runtime/block.h"

namespace cuda_on_cpu {
namespace {

struct Range {
  const char* begin;
  const char* end;
};

std::mutex g_launch;  // one kernel at a time
uint64_t g_seed = 0, g_launches = 0;
std::vector<Range> g_allowed;
Range g_arguments{nullptr, nullptr};

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

void run_grid(const char* kernel, const Site& site, dim3 grid, dim3 block, size_t dynamic_bytes,
              void (*call)(const void*), const void* arguments, size_t argument_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > 1024 || block.z > 64) {
    fault(concat(kernel, ": a block of ", threads, " threads; a GPU takes 1 to 1024"), site);
  }
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535) {
    fault(concat(kernel, ": a grid of ", grid.x, " x ", grid.y, " x ", grid.z, "; a GPU takes 1 to 65535 in y and z"),
          site);
  }
  if (dynamic_bytes > 227 * 1024) {
    fault(concat(kernel, ": ", dynamic_bytes, " bytes of dynamic shared memory; an H100 has 232448"), site);
  }
  count_event(concat(source_name(site), ": ", kernel));
  const std::lock_guard<std::mutex> one(g_launch);
  std::mt19937_64 random(g_seed * 0x9E3779B97F4A7C15ull + ++g_launches);
  const char* begin = static_cast<const char*>(arguments);
  g_arguments = {begin, begin + argument_bytes};
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  Block runner(kernel, site, grid, block, dynamic_bytes, call, arguments, random);
  for (const uint64_t i : order) {
    const auto x = static_cast<unsigned>(i % grid.x);
    const auto y = static_cast<unsigned>(i / grid.x % grid.y);
    runner.run({x, y, static_cast<unsigned>(i / (uint64_t{grid.x} * grid.y))});
  }
}

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
    const std::string wrong = shadow.access(p, bytes, kind, thread.self.linear, instruction);
    if (wrong.empty()) return;
    const size_t offset = static_cast<size_t>(p - shadow.data());
    const SharedArray* array = block->array_at(offset);
    std::string what = wrong;
    if (array != nullptr) what += concat(": ", array->name, ", byte ", offset - array->begin, " of ", array->bytes);
    if (shadow.other != nullptr) what += concat("; the other access is at ", source_of(shadow.other));
    fault_at(what, instruction);
  }
  if (inside(g_arguments, p, bytes) || in_this_module(p)) return;
  for (size_t i = g_allowed.size(); i-- > 0;) {
    if (inside(g_allowed[i], p, bytes)) {
      if (reinterpret_cast<uintptr_t>(p) % std::min<size_t>(bytes, 16) != 0 && (bytes & (bytes - 1)) == 0) {
        fault_at(concat("misaligned access of ", bytes, " bytes"), instruction);
      }
      std::swap(g_allowed[i], g_allowed.back());  // the same one is likely to be next
      return;
    }
  }
  fault_at(concat(kind == Access::kRead ? "read" : "write", " of ", bytes,
                  " bytes of global memory that belong to no argument of the kernel"),
           instruction);
}

}  // namespace cuda_on_cpu
